"""Verification: right merges pass in a stock process, tampered ones fail and leave nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from san.adapted import adapt
from tiny import save_tiny
from transformers import AutoModelForCausalLM

import san_llm.merge.run
import san_llm.merge.verify as verifying
from san_llm.errors import SanError
from san_llm.merge.request import MergeRequest, check_request
from san_llm.merge.run import merge
from san_llm.merge.stock_logits import place_in_fp32
from san_llm.merge.verify import verify
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
@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.fresh), "float16"]
)
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


@pytest.mark.fresh
@pytest.mark.slow
def test_a_checkpoint_that_does_not_load_is_one_line(pair):
    merge(MergeRequest(pair, Path("out")))
    (Path("out") / "config.json").write_text("{}")
    with pytest.raises(SanError, match="out: stock transformers cannot load it: ") as caught:
        check("out", "float32")
    assert len(str(caught.value).splitlines()) == 1


def stock(folder, *options, **environment):
    script = Path(san_llm.merge.run.__file__).with_name("stock_logits.py")
    Path("prompts.json").write_text("[[5, 6, 7]]")
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

    def answered(*arguments):
        answers = stock(*arguments)
        order.append("the merged model's process has ended")
        return answers

    def loaded(*arguments, **settings):
        order.append(settings["place"])
        return load(*arguments, **settings)

    monkeypatch.setattr(verifying, "_stock_answers", answered)
    monkeypatch.setattr(verifying, "load_base", loaded)
    check("m", "float32")
    assert order == ["the merged model's process has ended", torch.device("cpu")]


@pytest.mark.parametrize(
    ("free", "place"), [(80e9, "cuda:0"), (38e9, "cuda:0"), (36e9, "cpu"), (0, "cpu")]
)
def test_a_model_of_8_billion_numbers_is_held_in_fp32_where_there_is_room(monkeypatch, free, place):
    assert place_in_fp32(8 * 10**9) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80e9))
    assert place_in_fp32(8 * 10**9) == torch.device(place)
