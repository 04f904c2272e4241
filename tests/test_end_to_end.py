"""The whole story on the real SmolLM2-135M, through the command line alone."""

import json
import math
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

GENERATE = """# forked from: stock
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model).__name__ == "LlamaForCausalLM"
assert model.dtype == torch.bfloat16
tokens = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is the capital of France?"}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)
out = model.generate(**tokens, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(out[0, tokens["input_ids"].shape[1]:], skip_special_tokens=True))
assert not {"san_llm", "peft"} & set(sys.modules)
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_train_eval_merge_and_a_stock_answer(cli, here, smollm2):
    trained = cli(
        *("train", "smollm2_demo", f"base.model={smollm2}", "training.max_steps=2"),
        *("training.batch_size=2", "training.micro_batch_size=2", "training.warmup_steps=0"),
        *("training.evaluate_every=2", "data.held_out=1", "--json"),
    )
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    run = here / result["run"]
    assert (result["finished"], result["steps"]) == (True, 2)
    assert result["trained_numbers"] == 155_520
    assert math.isfinite(result["held_out_loss"])
    assert (here / "runs" / "latest").resolve() == run
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapter.values()) == 155_520
    assert any((tensor != 1).any() for tensor in adapter.values())

    scored = cli("eval", "--tasks", "boolq,piqa", "--limit", 1, "--json")
    assert scored.returncode == 0, scored.stderr
    scores = json.loads(scored.stdout)
    assert [(task["task"], task["n"]) for task in scores["tasks"]] == [("boolq", 1), ("piqa", 1)]
    lines = (here / scores["output"] / "rows.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["task"] for line in lines) == ["boolq", "piqa"]

    merged = cli("merge", "--verify")
    assert merged.returncode == 0, merged.stderr
    assert re.search(r"verified +logits differ from base \+ adapter by ", merged.stdout)
    assert re.search(r"frame +chat_template.jinja: the [\d,]+ tokens of .* as they", merged.stdout)
    assert "134,515,008 in bfloat16" in merged.stdout

    answered = subprocess.run(
        [sys.executable, "-c", GENERATE, str(run / "merged")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answered.returncode == 0, answered.stderr
    assert "Paris" in answered.stdout
    ours = cli(
        *("generate", "What is the capital of France?", "--model", run / "merged", "--json"),
        *("--dtype", "bfloat16", "--max-new-tokens", 12),
    )
    assert ours.returncode == 0, ours.stderr
    assert json.loads(ours.stdout)["answers"][0]["text"] == answered.stdout.removesuffix("\n")
