"""What the options of eval and merge name: a model, an adapter over its base, the last run."""

import json
from pathlib import Path

import pytest
from tiny import write_recipe

from san_llm.errors import InputError
from san_llm.models import subject as subjects
from san_llm.models.adapter import named_base
from san_llm.models.subject import find_subject
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest


def adapter(folder, **config):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SAN"} | config))
    return folder


@pytest.fixture
def run(here):
    """The last run, finished, over the base ``models/mine`` in 4 bits."""
    recipe = load_recipe(
        write_recipe(here / "mine.yaml", Path("models/mine"), here / "rows.json"),
        ["base.quantization=4bit"],
    )
    folder = new_run(recipe, None, False)
    adapter(folder / "adapter", base_model_name_or_path="models/other")
    point_latest(folder)
    return folder


def test_by_default_it_is_the_last_runs_adapter_over_its_recipes_base(run):
    subject = find_subject()
    assert (subject.base.model, subject.base.quantization) == ("models/mine", "4bit")
    assert (subject.adapter, subject.run) == (run / "adapter", run)
    assert subject.recipe is not None
    assert str(subject) == f"models/mine + {run}/adapter"


@pytest.mark.parametrize(
    ("config", "on_gpu"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float64"}, "float32"),
        ({}, "float32"),
    ],
)
def test_a_model_without_a_run_has_its_own_dtype_on_a_gpu_and_fp32_on_a_cpu(
    run, here, monkeypatch, config, on_gpu
):
    (here / "own").mkdir()
    (here / "own" / "config.json").write_text(json.dumps(config))
    alone = adapter(here / "alone", base_model_name_or_path="own")
    for gpus, dtype in ((0, "float32"), (1, on_gpu)):
        monkeypatch.setattr(subjects, "gpus", lambda count=gpus: count)
        assert find_subject("own").base.dtype == dtype
        assert find_subject(adapter=alone).base.dtype == dtype
        assert find_subject("own", dtype="float16").base.dtype == "float16"


def test_base_only_leaves_the_adapter_out_and_keeps_how_the_base_is_loaded(run):
    subject = find_subject(base_only=True)
    assert (subject.adapter, subject.base.quantization) == (None, "4bit")
    assert str(subject) == "models/mine"


def test_an_adapter_in_a_run_takes_the_runs_base_and_one_elsewhere_the_base_it_names(run, here):
    for named in (run / "adapter", run):
        subject = find_subject(adapter=named)
        assert (subject.base.model, subject.run) == ("models/mine", run)
        assert subject.adapter == run / "adapter"
    alone = adapter(here / "alone", base_model_name_or_path="models/other")
    subject = find_subject(adapter=alone)
    assert (subject.base.model, subject.base.dtype) == ("models/other", "float32")
    assert (subject.run, subject.recipe) == (None, None)


def test_a_model_beside_an_adapter_is_its_base_and_alone_it_is_all(run, here):
    alone = adapter(here / "alone", base_model_name_or_path="models/other")
    assert find_subject("models/x", alone).base.model == "models/x"
    assert find_subject("models/x", run / "adapter").base.model == "models/x"
    subject = find_subject("models/x")
    assert (subject.base.model, subject.adapter, subject.recipe) == ("models/x", None, None)
    assert subject == find_subject("models/x", base_only=True)


def test_a_merged_model_is_asked_as_it_was_trained(run, here):
    assert find_subject().prompt == "alpaca"
    assert find_subject("models/x").prompt is None
    merged = here / "merged"
    merged.mkdir()
    told = merged / "merge_manifest.json"
    told.write_text('{"prompt": "chat"}')
    assert find_subject(str(merged)).prompt == "chat"
    assert find_subject(str(merged), adapter(here / "alone")).prompt is None
    told.write_text('{"prompt": "alpacca"}')
    with pytest.raises(InputError, match=r"prompt style 'alpacca'.*alpaca"):
        _ = find_subject(str(merged)).prompt


def test_a_run_that_was_not_finished_says_how_to_go_on(run):
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=f"{run}: no adapter yet: .*`san-llm train {run} --resume"):
        find_subject()


def test_contradictions_and_nothing_to_find_are_refused(here):
    with pytest.raises(InputError, match="--base-only and --adapter exclude each other"):
        find_subject(adapter=Path("x"), base_only=True)
    with pytest.raises(InputError, match="runs/latest: no run yet in this directory"):
        find_subject()
    (here / "runs").mkdir()
    (here / "runs" / "latest").symlink_to("gone")
    with pytest.raises(InputError, match="runs/latest: no run yet in this directory"):
        find_subject()


def test_a_run_or_an_adapter_is_named_by_its_folder(run, here):
    other = new_run(load_recipe(here / "mine.yaml"), Path("runs/other"), False)
    for named in (run, run / "adapter"):
        assert find_subject(run=named) == find_subject(adapter=named)
    assert find_subject(run=other, base_only=True).run == other
    assert find_subject(run=run / "adapter", base_only=True).adapter is None
    assert find_subject("models/x", run=run).base.model == "models/x"
    alone = adapter(here / "alone", base_model_name_or_path="models/other")
    assert find_subject(run=alone) == find_subject(adapter=alone)
    with pytest.raises(InputError, match=f"{run} and --adapter x: both name an adapter"):
        find_subject(adapter=Path("x"), run=run)
    with pytest.raises(InputError, match=r"nowhere: not an adapter: no adapter_config\.json"):
        find_subject(run=Path("nowhere"))
    (here / "merged").mkdir()
    (here / "merged" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"merged: a model, neither a run .* name it with --model"):
        find_subject(run=Path("merged"))


def test_which_run_was_taken_is_said_unless_it_was_named(run, capsys):
    find_subject()
    assert capsys.readouterr().err == f"run: {run}\n"
    find_subject(run=run)
    find_subject("models/x")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "does not name its base model; give it with --model"),
        ('{"base_model_name_or_path": null}', "does not name its base model"),
        ('{"base_model_name_or_path": ""}', "does not name its base model"),
    ],
)
def test_a_config_that_names_no_base_is_refused(here, text, message):
    folder = adapter(here / "alone")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        named_base(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000], ids=["bytes", "deep"])
def test_a_config_that_is_no_text_is_refused(here, content):
    folder = adapter(here / "alone")
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"adapter_config\.json: not valid JSON"):
        named_base(folder)


def test_a_folder_without_a_config_is_no_adapter(here):
    with pytest.raises(InputError, match=r"nowhere: not an adapter: no adapter_config\.json"):
        named_base(here / "nowhere")
