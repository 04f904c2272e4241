#!/bin/sh
# Makes what lies beside it, and was last run with the code of commit 0879049:
#
#     cp tests/made_before/make.sh /tmp && git checkout 0879049
#     mkdir demo && cd demo && PYTHON=../.venv/bin/python sh /tmp/make.sh
#
# (git ignores demo/, so that the manifests say that nothing was changed). Later versions have to
# read these files as they are: do not make them again, but put others beside them.
set -eu
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 COLUMNS=120
export SAN_LLM_CACHE="${TMPDIR:-/tmp}/san-llm-made-before"
root=$(git rev-parse --show-toplevel)
export PYTHONPATH="$root:$root/tests"
san_llm() { "$PYTHON" -m san_llm "$@"; }
relative() {  # Names this folder and the checkout by relative paths, and seals checkpoints anew.
    grep -rlI "$root" . | xargs -r sed -i "s|$PWD/||g; s|$root/||g"
    sed -i 's/"platform": ".*"/"platform": "Linux"/' $(find . -name '*manifest.json')
    "$PYTHON" - <<'PYTHON'
import hashlib, json, pathlib

for seal in pathlib.Path().glob("runs/*/checkpoints/*/sha256.json"):
    value = json.loads(seal.read_text())
    for name, known in value["files"].items():
        data = (seal.parent / name).read_bytes()
        known.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    seal.write_text(json.dumps(value, indent=2) + "\n")
PYTHON
}

# A random LLaMA that has learned the form of an answer, but not which is right.
"$PYTHON" - <<'PYTHON'
import random
from pathlib import Path

import torch
from tiny import CHARACTERS, rows, tiny_model, tiny_tokenizer, write_recipe, write_rows

from san_llm.data.prompts import training_prompt

tokenizer = tiny_tokenizer()
model = tiny_model(seed=0, num_hidden_layers=2, intermediate_size=40).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
dice = random.Random(0)
for step in range(400):
    loss = 0
    for _ in range(8):
        question = "".join(dice.choices(CHARACTERS, k=dice.randrange(8, 280)))
        word = dice.choice(["true", "false", "solution1", "solution2"])
        prompt = training_prompt("alpaca", question)
        ids, after = (
            tokenizer(text, return_tensors="pt").input_ids
            for text in (prompt, f"the correct answer is {word}</s>")
        )
        labels = torch.cat([torch.full_like(ids, -100), after], 1)
        loss = loss + model(torch.cat([ids, after], 1), labels=labels).loss / 8
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
model.eval().save_pretrained("base")
tokenizer.save_pretrained("base")
training = {
    "max_steps": 9,
    "epochs": 9.0,
    "batch_size": 8,
    "micro_batch_size": 1,
    "learning_rate": 2e-2,
    "warmup_steps": 2,
    "evaluate_every": 3,
    "sample_prompts": ["Is 7 even?"],
}
scales = {"name": "san", "adapt_embedding": True, "shift": True}
rows_file = write_rows(Path("rows.json"), rows(28))
write_recipe(Path("small.yaml"), Path("base"), rows_file, training=training, method=scales)
PYTHON

# Runs: one stopped by SIGTERM within its steps, two of which the adapter alone is kept, one whole.
(exec "$PYTHON" -m san_llm train small.yaml --output runs/stopped) & stopped=$!
until grep -qs '"step": 4, ' runs/stopped/log.jsonl; do sleep 0.01; done
kill -TERM $stopped
wait $stopped || test $? = 75
low_rank="training.max_steps=4 training.learning_rate=5e-3 method.rank=2"
for method in "san_lora method.carrier=lora" "lora method.name=lora"; do
    set -- $method
    shifts=$(test "$1" = lora || echo method.adapt_embedding=false method.shift=false)
    san_llm train small.yaml $2 $low_rank $shifts --output "runs/$1"
    mkdir -p adapters
    mv "runs/$1/adapter" "adapters/$1"
    rm -r "runs/$1"
done
san_llm train small.yaml training.keep_checkpoints=1 --output runs/whole
relative

# Evaluations, in the run's folder, and a merge.
for protocol in generate loglik; do
    asked="--tasks boolq,piqa --limit 3 --protocol $protocol"
    san_llm eval $asked --base-only --output "runs/whole/eval/$protocol-base"
    san_llm eval $asked --output "runs/whole/eval/$protocol-adapter"
done
san_llm merge --verify
rm runs/latest
relative

# What the commands say of it.
mkdir said
san_llm runs --json > said/runs.json
san_llm diff runs/whole --json > said/diff.json
san_llm compare runs/whole/eval/loglik-base runs/whole/eval/loglik-adapter --json \
    > said/compare.json
san_llm generate --adapter runs/whole/adapter --compare --json "Is 7 even?" > said/generate.json
san_llm generate --model runs/whole/merged --json "Is 7 even?" > said/generate_merged.json
san_llm show runs/whole --terminal > said/show.txt
"$PYTHON" - <<'PYTHON'
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import san_llm

logits = {}
for folder in ("adapters/san_lora", "adapters/lora", "runs/whole/adapter"):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), folder).eval()
    with torch.no_grad():
        logits[folder] = model(torch.arange(4, 16)[None]).logits[0, -4:].contiguous()
save_file(logits, "said/logits.safetensors")
PYTHON
relative
rm small.yaml
