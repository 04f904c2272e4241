"""Verification: right merges pass in a stock process, tampered ones fail and leave nothing."""

import json
import os
import subprocess
import sys
from math import nan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from merge.stock import verify_in_this_process
from peft import PeftModel
from safetensors.torch import load_file, save_file
from san.adapted import adapt
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import san_llm.merge.run
import san_llm.merge.verify as verifying
from san_llm.errors import SanError
from san_llm.merge.peft import fold
from san_llm.merge.request import MergeRequest, check_request
from san_llm.merge.run import merge
from san_llm.merge.stock_logits import greedy, in_fp32_by_block, logits, place_in_fp32
from san_llm.merge.verify import PROMPTS, verify
from san_llm.models.adapter import load_adapter, open_adapter
from san_llm.models.subject import find_subject

ROW = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def pair(here):
    """A tiny base and a moved SAN adapter in ``base`` and ``adapter``."""
    save_tiny(here / "base")
    base = AutoModelForCausalLM.from_pretrained(here / "base")
    adapt(base).save_pretrained(here / "adapter")
    return find_subject("base", Path("adapter"))


def tamper(folder, how):
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def flip(tensors):
    """Turn the sign of one row of one weight."""
    tensors[ROW][5] *= -1


def nudge(tensors):
    """Make one row of one weight a tenth larger."""
    tensors[ROW][5] *= 1.1


def check(folder, dtype):
    subject = find_subject("base", Path("adapter"))
    return verify(Path(folder), check_request(MergeRequest(subject, Path("new"), dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_right_merge_passes_however_far_rounding_moves_it(pair, dtype):
    result = merge(MergeRequest(pair, Path("out"), dtype, verified=True)).verified
    assert 0 <= result.relative <= result.bound
    assert result.adapter_moved > 10 * result.largest_difference
    assert result.same_top_word > 0.8
    # This small random model is touchy: bf16 moves its logits by a fifth of their spread.
    assert (result.relative < 1e-4) == (dtype == "float32")
    assert (result.relative > 0.1) == (dtype == "bfloat16")
    assert (result.bound < 2e-3) == (dtype == "float32")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"carrier": "dora", "r": 4}, {"shift": True}])
def test_other_adapters_pass_in_bf16(pair, options):
    base = AutoModelForCausalLM.from_pretrained("base")
    adapt(base, **options).save_pretrained("adapter")
    result = merge(MergeRequest(pair, Path("out"), "bfloat16", verified=True)).verified
    assert result.relative <= result.bound


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "how"), [("float32", flip), ("bfloat16", flip), ("bfloat16", nudge)]
)
def test_one_wrong_row_fails_in_every_dtype(pair, dtype, how):
    merge(MergeRequest(pair, Path("out"), dtype))
    tamper("out", how)
    said = (
        r"^out: differs from base \+ adapter by [0-9.]+, that is [0-9.]+ of the logits' spread; "
        rf"rounding to {dtype} explains [0-9.e-]+, and [0-9.]+ is unexplained where [0-9.]+ is "
        "allowed$"
    )
    with pytest.raises(SanError, match=said) as caught:
        check("out", dtype)
    assert caught.value.exit_code == 1


@pytest.mark.slow
def test_a_merge_that_fails_its_verification_leaves_nothing(pair, monkeypatch):
    # A fault in the writing: the right files are written, and then one row is turned.
    right = san_llm.merge.run.write_weights

    def wrong(folder, *arguments):
        sums = right(folder, *arguments)
        tamper(folder, flip)
        return sums

    monkeypatch.setattr(san_llm.merge.run, "write_weights", wrong)
    with pytest.raises(SanError, match="is unexplained where"):
        merge(MergeRequest(pair, Path("out"), verified=True))
    assert sorted(os.listdir()) == ["adapter", "base"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda tensors: tensors.pop(ROW), f"missing keys: .*{ROW}"),
        (lambda tensors: tensors.update({"more.weight": torch.ones(2)}), "unexpected keys: .*more"),
        (lambda tensors: tensors[ROW].fill_(float("nan")), "differs from base"),
    ],
    ids=["missing", "more", "nan"],
)
def test_a_checkpoint_that_is_not_the_whole_model_fails(pair, how, said):
    merge(MergeRequest(pair, Path("out")))
    tamper("out", how)
    with pytest.raises(SanError, match=said):
        check("out", "float32")


@pytest.mark.slow
def test_a_checkpoint_that_does_not_load_is_one_line(pair):
    merge(MergeRequest(pair, Path("out")))
    (Path("out") / "config.json").write_text("{}")
    with pytest.raises(SanError, match="out: stock transformers cannot load it: ") as caught:
        check("out", "float32")
    assert len(str(caught.value).splitlines()) == 1


def stock(folder, *options, **environment):
    script = Path(san_llm.merge.run.__file__).with_name("stock_logits.py")
    Path("prompts.json").write_text('{"prompts": [[5, 6, 7]], "conversation": null}')
    return subprocess.run(
        [sys.executable, "-P", *options, script, folder, "prompts.json", "logits.safetensors"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.fresh
@pytest.mark.slow
def test_the_stock_process_imports_nothing_of_ours_and_would_say_so(pair, tmp_path):
    merge(MergeRequest(pair, Path("out")))
    done = stock("out", "-X", "importtime")
    assert done.returncode == 0
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert {"torch", "transformers"} <= imported
    assert not [name for name in imported if name.split(".")[0] in ("san_llm", "peft")]
    assert load_file("logits.safetensors")["0"].dtype == torch.float32

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import san_llm\n")
    done = stock("out", PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "san_llm was imported: this was not a stock load"


def test_one_model_is_in_memory_at_a_time_and_on_a_gpu_that_has_room_for_it(pair, monkeypatch):
    merge(MergeRequest(pair, Path("m"), "float32"))
    order = []
    stock, load = verifying._stock_answers, verifying.load_base

    def answered(*arguments, **how):
        answers = stock(*arguments, **how)
        order.append("the merged model's process has ended")
        return answers

    def loaded(*arguments, **settings):
        order.append(settings["place"])
        return load(*arguments, **settings)

    monkeypatch.setattr(verifying, "_stock_answers", answered)
    monkeypatch.setattr(verifying, "load_base", loaded)
    check("m", "float32")
    assert order == ["the merged model's process has ended", torch.device("cpu")]


OPTIONS = [
    ({}, True),
    ({"adapt_embedding": True}, True),
    ({"adapt_embedding": True, "shift": True}, False),
    ({"mode": "synapse"}, False),
]


@pytest.mark.parametrize(("options", "tied"), OPTIONS, ids=str)
def test_a_block_at_a_time_gives_the_numbers_of_base_adapter_and_merge(here, options, tied):
    save_tiny(here / "base", torch.bfloat16, tie_word_embeddings=tied)

    def load(dtype):
        return AutoModelForCausalLM.from_pretrained("base", dtype=dtype)

    adapt(load(torch.bfloat16), **options).save_pretrained("adapter")
    whole, held = (
        load_adapter(load(dtype), Path("adapter")) for dtype in (torch.float32, torch.bfloat16)
    )
    in_fp32_by_block(held.get_base_model())
    stored = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    tokens = [[5, 6, 7], [9, 8, 30, 40, 50, 60]]

    def same(got, wanted):
        return all(map(torch.equal, got, wanted))

    assert same(verifying._logits(held, tokens), verifying._logits(whole, tokens))
    with held.disable_adapter(), whole.disable_adapter():
        assert same(verifying._logits(held, tokens), verifying._logits(whole, tokens))
    merged = fold(whole, Path("adapter"))
    for dtype in (torch.float32, torch.bfloat16):
        wanted = verifying._logits(verifying._rounded(merged, dtype), tokens)
        assert same(verifying._merged_by_block(held, dtype, tokens), wanted)
    left = held.state_dict()
    assert all(torch.equal(left[name], tensor) for name, tensor in stored.items())


@pytest.mark.slow
def test_on_a_cpu_a_model_is_held_in_the_dtype_of_its_files(here, monkeypatch):
    save_tiny(here / "base", torch.bfloat16)
    adapt(AutoModelForCausalLM.from_pretrained("base")).save_pretrained("adapter")
    subject = find_subject("base", Path("adapter"))
    merge(MergeRequest(subject, Path("out")))
    load, run, dtypes = verifying.load_base, subprocess.run, []

    def loaded(found, dtype, place):
        dtypes.append(str(dtype))
        return load(found, dtype, place=place)

    def ran(command, **how):
        dtypes.append(command[-1])
        return run(command, **how)

    monkeypatch.setattr(verifying, "load_base", loaded)
    monkeypatch.setattr(subprocess, "run", ran)
    by_block = check("out", "bfloat16")
    monkeypatch.setattr(verifying, "_held_in", lambda *_: "float32")
    assert check("out", "bfloat16") == by_block
    assert dtypes == ["bfloat16", "torch.bfloat16", "float32", "torch.float32"]


@pytest.mark.parametrize(
    ("options", "quantized", "only"),
    [
        ({"shift": True, "adapt_embedding": True}, None, True),
        ({}, "dequantize", False),
        ({"carrier": "dora", "r": 2}, None, False),
        ({"modules_to_save": ["lm_head"]}, None, False),  # in fp32, whatever the base is in
    ],
    ids=str,
)
def test_an_adapter_of_scales_alone_is_merged_block_by_block(here, options, quantized, only):
    adapt(tiny_model(), **options).save_pretrained("adapter")
    task = SimpleNamespace(
        adapter=open_adapter(Path("adapter")), request=SimpleNamespace(quantized=quantized)
    )
    assert verifying._only_scales(task) is only


@pytest.mark.parametrize(
    ("stored", "place", "held"),
    [
        ([torch.bfloat16], "cpu", "bfloat16"),
        ([torch.float16], "cpu", "float16"),
        ([torch.bfloat16], "cuda", "float32"),
        ([torch.bfloat16, torch.float32], "cpu", "float32"),
        ([torch.float64], "cpu", "float32"),
    ],
    ids=str,
)
def test_weights_of_several_dtypes_and_those_on_a_gpu_are_held_in_fp32(here, stored, place, held):
    tensors = {str(number): torch.ones(2, dtype=dtype) for number, dtype in enumerate(stored)}
    save_file(tensors, "model.safetensors")
    assert verifying._held_in(Path(), torch.device(place)) == held


@pytest.mark.parametrize(
    ("free", "place"), [(80e9, "cuda:0"), (38e9, "cuda:0"), (36e9, "cpu"), (0, "cpu")]
)
def test_a_model_of_8_billion_numbers_is_held_in_fp32_where_there_is_room(monkeypatch, free, place):
    assert place_in_fp32(8 * 10**9) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80e9))
    assert place_in_fp32(8 * 10**9) == torch.device(place)


# --- its decisions, with the script in this process ---


@pytest.fixture
def script(monkeypatch):
    verify_in_this_process(monkeypatch)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def all_logits(model):
    return [logits(model, tiny_tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS]


def apart(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("script")
def test_each_number_of_a_verification_is_what_it_says(pair, capsys):
    merge(MergeRequest(pair, Path("out"), "bfloat16", verified=False))
    result = check("out", "bfloat16")
    assert "\nVerifying: 4 of 4 parts after " in f"\n{capsys.readouterr().err}"
    adapted, merged = PeftModel.from_pretrained(load("base"), "adapter").eval(), load("out")
    got, wanted = all_logits(merged), all_logits(adapted)
    with adapted.disable_adapter():
        moved = apart(all_logits(adapted), wanted)
    tokens = [tiny_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    texts = zip(greedy(merged, tokens), greedy(adapted, tokens), strict=True)
    alike = [
        next((n for n, (a, b) in enumerate(zip(*text, strict=True)) if a != b), 32)
        for text in texts
    ]
    exact = all_logits(adapted.merge_and_unload())
    spread = torch.cat(wanted).std().item()
    top = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(got, wanted, strict=True)])
    found = pytest.approx(apart(got, wanted), rel=1e-3)
    assert result.largest_difference == found
    assert result.relative * spread == found
    assert result.bound == pytest.approx(1.1 * apart(got, exact) / spread + 1e-3, rel=1e-3)
    assert result.adapter_moved == pytest.approx(moved, rel=1e-3)
    assert result.same_top_word == pytest.approx(top.float().mean().item())
    assert 0 < result.same_greedy == sum(alike) / (32 * len(PROMPTS)) < 1
    assert result.quantization_moved is None
    assert result.weight_errors.keys() == load_file("out/model.safetensors").keys()


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousandth_of_the_spread_and_a_tenth_of_rounding_are_allowed(pair, monkeypatch, dtype):
    merge(MergeRequest(pair, Path("out"), dtype, verified=False))
    right, asked = check("out", dtype), [tiny_tokenizer()(p)["input_ids"] for p in PROMPTS]
    explained = (right.bound - 1e-3) / 1.1
    assert (explained == pytest.approx(0, abs=1e-9)) == (dtype == "float32")
    allowed, spread = 1e-3 + 0.1 * explained, right.largest_difference / right.relative
    model = load("out")
    new = greedy(model, asked)

    def check_with(share):
        answers = all_logits(model)
        answers[2][1, 7] += share * allowed * spread
        monkeypatch.setattr(verifying, "_stock_answers", lambda *_, **__: (answers, new, {}))
        return check("out", dtype)

    assert check_with(0.9).same_greedy == right.same_greedy
    for share in (1.1, -1.1, nan):
        with pytest.raises(SanError, match=r"^out: differs from base \+ adapter by ") as caught:
            check_with(share)
        told = abs(share) * allowed if share == share else share
        assert str(caught.value).endswith(
            f"rounding to {dtype} explains {explained:.3g}, and {told:.3g} is unexplained where "
            f"{allowed:.3g} is allowed"
        )


@pytest.mark.usefixtures("script")
def test_a_merge_in_memory_that_is_as_wrong_as_the_file_is_no_excuse(pair, monkeypatch):
    merge(MergeRequest(pair, Path("out"), verified=False))
    tamper("out", flip)
    right = verifying.fold

    def wrong(*arguments):
        merged = right(*arguments)
        merged.get_parameter(ROW).data[5] *= -1
        return merged

    monkeypatch.setattr(verifying, "fold", wrong)
    with pytest.raises(SanError, match="is unexplained where"):
        check("out", "float32")


@pytest.mark.usefixtures("script")
def test_a_weight_that_no_answer_shows_is_found_by_the_formula(pair, monkeypatch):
    merge(MergeRequest(pair, Path("out"), verified=False))
    told = []
    answered = verifying._stock_answers
    monkeypatch.setattr(
        verifying,
        "_stock_answers",
        lambda *asked, **how: told.append(answered(*asked, **how)) or told[0],
    )
    check("out", "float32")
    tamper("out", nudge)
    with pytest.raises(SanError, match=rf"^out: {ROW} is 0\.\d+ of its row's .* the formula"):
        check("out", "float32")


@pytest.mark.parametrize(
    ("one", "other", "worse"), [(1.0, 2.0, 2.0), (2.0, 1.0, 2.0), (nan, 1.0, nan), (1.0, nan, nan)]
)
def test_what_is_not_a_number_is_worse_than_any(one, other, worse):
    assert verifying._worse(one, other) == pytest.approx(worse, nan_ok=True)


def test_a_text_is_shared_up_to_the_first_word_that_differs():
    model, prompt = tiny_model(), [5, 6, 7]
    (own,) = greedy(model, [prompt])
    assert verifying._shared(model, prompt, own) == len(own) == 32
    for place in (0, 1, 31):
        other = [*own[:place], (own[place] + 1) % 90, *own[place + 1 :]]
        assert verifying._shared(model, prompt, other) == place


@pytest.mark.parametrize(
    ("stderr", "said"), [("", "no message"), ("Traceback\nmissing keys: a\n\n", "missing keys: a")]
)
def test_the_script_is_told_all_and_its_last_line_is_the_error(pair, monkeypatch, stderr, said):
    places, commands = [], []

    def run(command, **_how):
        commands.append(command)
        assert json.loads(Path(command[4]).read_text()) == {
            "prompts": [[5, 6], [7]],
            "conversation": None,
        }
        return subprocess.CompletedProcess(command, 1, "", stderr)

    def place(numbers):
        places.append(numbers)
        return torch.device("cuda", 0)

    monkeypatch.setattr(verifying, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(verifying, "place_in_fp32", place)
    with pytest.raises(SanError) as caught:
        verifying._stock_answers(Path("base"), [[5, 6], [7]], "no row")
    assert str(caught.value) == f"base: stock transformers cannot load it: {said}"
    ((python, option, script, folder, prompts, out, device, dtype),) = commands
    assert (python, option, folder) == (sys.executable, "-P", "base")
    assert (device, dtype) == ("cuda:0", "float32")  # on a GPU all of it is held so
    assert Path(script) == Path(verifying.__file__).with_name("stock_logits.py")
    assert Path(prompts).parent == Path(out).parent
    assert not Path(out).parent.exists()
    assert places == [load("base").num_parameters()]
