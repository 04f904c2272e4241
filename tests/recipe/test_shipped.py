"""The shipped recipes: valid, short, and right about the models that they name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from transformers import LlamaConfig, LlamaForCausalLM

from san_llm.architectures.decoders import TARGETS
from san_llm.errors import InputError
from san_llm.models.adapter import adapter_config, add_adapter, trainable_parameters
from san_llm.plan.bases import KNOWN
from san_llm.recipe.read import load_recipe, parse_recipe, to_yaml
from san_llm.recipe.schema import Recipe
from san_llm.recipe.shipped import about, hardware, shipped_configs, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "llama13b_commonsense",
    "llama2_7b_commonsense",
    "llama3_8b_commonsense",
    "llama3_8b_commonsense_4bit",
    "llama3_8b_commonsense_dora",
    "llama3_8b_commonsense_lora",
    "llama3_8b_commonsense_san_dora",
    "llama7b_commonsense",
    "llama7b_commonsense_4bit",
    "smollm2_demo",
]
CONFIGS = [
    f"accelerate/{name}"
    for name in ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2", "two_nodes")
]
# As the README lists them: by base.
SORTED = [
    "llama7b_commonsense",
    "llama7b_commonsense_4bit",
    "llama13b_commonsense",
    "llama2_7b_commonsense",
    "llama3_8b_commonsense",
    "llama3_8b_commonsense_4bit",
    "llama3_8b_commonsense_san_dora",
    "llama3_8b_commonsense_dora",
    "llama3_8b_commonsense_lora",
]
# Those of low-rank matrices, in the five modules of the published runs.
LOW_RANK = [name for name in NAMES if name.endswith(("_lora", "_dora"))]
SCALES = [name for name in NAMES if name not in LOW_RANK]
PUBLISHED = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# Inputs and outputs of LLaMA-3-8B's q, k, v, up and down.
SIDES = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 14_336), (14_336, 4096)]
# One number for each output of q, k, v, o, gate, up and down, in every block.
TRAINED = {
    "7b": 32 * (4096 + 4096 + 4096 + 4096 + 11_008 + 11_008 + 4096),
    "13b": 40 * (5120 + 5120 + 5120 + 5120 + 13_824 + 13_824 + 5120),
    "8b": 32 * (4096 + 1024 + 1024 + 4096 + 14_336 + 14_336 + 4096),
    "135m": 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576),
}
# Those that SAN trains, and all of the base.
PARAMETERS = {
    "huggyllama/llama-7b": (TRAINED["7b"], 6_738_415_616),
    "meta-llama/Llama-2-7b-hf": (TRAINED["7b"], 6_738_415_616),
    "huggyllama/llama-13b": (TRAINED["13b"], 13_015_864_320),
    "meta-llama/Meta-Llama-3-8B": (TRAINED["8b"], 8_030_261_248),
    "smollm2-135m": (TRAINED["135m"], 134_515_008),
}


def trained_by(name: str) -> int:
    """Return how many numbers a shipped recipe trains."""
    if name in SCALES:
        return PARAMETERS[recipe(name).base.model][0]
    magnitudes = sum(d_out for _, d_out in SIDES) * name.endswith("dora")
    return 32 * (32 * sum(map(sum, SIDES)) + magnitudes)


def recipe(name: str) -> Recipe:
    return load_recipe(shipped_recipes()[name])


def on_meta(shape: dict[str, Any]) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape))


def test_the_counts_are_the_published_ones():
    assert TRAINED == {"7b": 1_359_872, "13b": 2_129_920, "8b": 1_376_256, "135m": 155_520}


def test_the_shipped_recipes_are_these():
    assert list(shipped_recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_short_and_names_its_hardware(name):
    path = shipped_recipes()[name]
    text = path.read_text(encoding="utf-8")
    assert recipe(name).name == name
    assert len(text.splitlines()) <= 30
    assert "\n# yaml-language-server: $schema=recipe.schema.json\nbase:\n" in text
    assert re.fullmatch(r"# Hardware: .+; .+\.", text.splitlines()[0])
    assert hardware(path) == text.splitlines()[0].removeprefix("# Hardware: ")
    measured = "about" in hardware(path)
    assert measured or "estimated" in hardware(path), "a figure is measured, or says that it is not"


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_trains_the_published_count_on_the_real_shapes(name):
    chosen = recipe(name)
    shape, (_, whole) = KNOWN[chosen.base.model], PARAMETERS[chosen.base.model]
    model = on_meta(shape)
    assert sum(p.numel() for p in model.parameters()) == whole
    model.requires_grad_(False)
    adapted = add_adapter(model, chosen.method)
    assert trainable_parameters(adapted) == trained_by(name)
    if name in LOW_RANK:
        assert tuple(chosen.method.targets()) == PUBLISHED
        share = {"lora": "0.70", "dora": "0.71"}[name[-4:]]  # as DoRA's README has them
        assert f"{100 * trained_by(name) / (whole + trained_by(name)):.2f}" == share
        return
    gammas = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(gammas) == 7 * shape["num_hidden_layers"]
    assert all(p.ndim == 1 for p in gammas.values())
    assert {n.split(".")[-3] for n in gammas} == set(TARGETS)


@pytest.mark.parametrize("name", [name for name in SCALES if name != "smollm2_demo"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_the_other_methods_fit_the_real_shapes_too(name, method):
    chosen = load_recipe(shipped_recipes()[name], [f"method.name={method}"])
    shape = KNOWN[chosen.base.model] | {"num_hidden_layers": 1}
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sides = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    sides += [(hidden, inner), (hidden, inner), (inner, hidden)]
    expected = {
        "lora": sum(32 * (d_in + d_out) for d_in, d_out in sides),
        "dora": sum(32 * (d_in + d_out) + d_out for d_in, d_out in sides),
        "ia3": sum(d_out for _, d_out in sides),
    }
    model = on_meta(shape)
    model.requires_grad_(False)
    assert trainable_parameters(add_adapter(model, chosen.method)) == expected[method]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "smollm2_demo"])
def test_the_large_recipes_keep_the_published_settings(name):
    chosen = recipe(name)
    training, data = chosen.training, chosen.data
    assert (training.batch_size, training.epochs, training.warmup_steps) == (16, 3, 100)
    assert (training.schedule, training.evaluate_every) == ("linear", 80)
    assert (data.cutoff, data.held_out, data.prompt, data.loss) == (256, 120, "llm-adapters", "all")
    assert len(chosen.evaluation.tasks) == 8
    assert chosen.evaluation.limit is None
    assert chosen.base.quantization == ("4bit" if name.endswith("_4bit") else None)


@pytest.mark.parametrize("name", NAMES)
def test_a_4bit_recipe_differs_from_its_full_one_by_base_and_memory_alone(name):
    if not name.endswith("_4bit"):
        assert recipe(name).base.quantization is None
        return
    small, full = recipe(name), recipe(name.removesuffix("_4bit"))
    assert small.base.model == full.base.model
    assert (small.method, small.data, small.evaluation) == (full.method, full.data, full.evaluation)
    assert small.training == full.training.model_copy(update={"micro_batch_size": 4})


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_config_says_what_the_recipe_says(name, tmp_path):
    method = recipe(name).method
    if name in LOW_RANK and method.name != "san":
        return  # PEFT's own
    adapter_config(method).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SAN"
    for key in ("carrier", "mode", "shift", "adapt_embedding", "form"):
        assert saved[key] == getattr(method, key)
    assert saved["links"] == list(method.links)
    assert sorted(saved["target_modules"]) == sorted(method.targets())


def test_the_readme_lists_every_recipe():
    text = (ROOT / "recipes" / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [NAMES[-1], *SORTED]


def test_the_readme_has_the_figures_of_the_recipes():
    text = (ROOT / "recipes" / "README.md").read_text()
    for name in NAMES:
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        chosen = recipe(name)
        assert chosen.base.model in line
        assert f"{trained_by(name):,}" in line
        memory = re.search(r"(\d+) GB", hardware(shipped_recipes()[name]))
        assert memory.group() in line


# --- san-llm recipes ---


def test_list_shows_every_recipe_with_its_base_and_hardware(cli):
    done = cli("recipes", "list", COLUMNS="300")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["recipe", "hardware"]
    recipes, configs = lines[1 : 1 + len(NAMES)], lines[1 + len(NAMES) :]
    for line, name in zip(recipes, NAMES, strict=True):
        assert line.startswith(name)
        assert recipe(name).base.model in line
        assert hardware(shipped_recipes()[name]) in line
    for line, name in zip(configs, CONFIGS, strict=True):
        assert line.startswith(name)
        assert line.removeprefix(name).strip() == about(shipped_configs()[name.split("/")[1]])


def test_list_as_json(cli):
    done = cli("recipes", "list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found) == NAMES + CONFIGS
    assert found["smollm2_demo"]["hardware"] == hardware(shipped_recipes()["smollm2_demo"])
    assert found["accelerate/fsdp2"]["about"] == about(shipped_configs()["fsdp2"])


@pytest.mark.parametrize("name", ["llama7b_commonsense", "accelerate/fsdp2"])
def test_show_prints_the_file_byte_for_byte(cli, name):
    done = cli("recipes", "show", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (ROOT / "recipes" / f"{name}.yaml").read_text()


def test_a_config_for_accelerate_is_copied_under_its_own_name(cli, here):
    assert cli("recipes", "copy", "accelerate/two_nodes").stdout == "two_nodes.yaml\n"
    shipped = ROOT / "recipes" / "accelerate" / "two_nodes.yaml"
    assert (here / "two_nodes.yaml").read_bytes() == shipped.read_bytes()


def test_a_config_that_is_not_shipped_is_refused_with_the_nearest(cli):
    done = cli("recipes", "show", "accelerate/fsdp")
    assert (done.returncode, done.stdout) == (2, "")
    assert "(did you mean 'fsdp2'?)" in done.stderr


def test_copy_makes_a_recipe_to_change_and_never_overwrites_unasked(cli, here):
    done = cli("recipes", "copy", "llama7b_commonsense", "mine.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine.yaml\n", "")
    assert load_recipe(here / "mine.yaml").name == "mine"
    (here / "mine.yaml").write_text("changed")
    done = cli("recipes", "copy", "llama7b_commonsense", "mine.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: mine.yaml: exists; add --overwrite to replace it\n"
    assert (here / "mine.yaml").read_text() == "changed"
    done = cli("recipes", "copy", "llama7b_commonsense", "mine.yaml", "--overwrite")
    assert done.returncode == 0
    assert load_recipe(here / "mine.yaml").base.model == "huggyllama/llama-7b"


@pytest.mark.parametrize("target", ["~/mine.yaml", "~/"])
def test_a_home_that_no_shell_has_named_is_found(command, here, monkeypatch, target):
    monkeypatch.setenv("HOME", str(here / "ann"))
    (here / "ann").mkdir()
    done = command("recipes", "copy", "smollm2_demo", target)
    name = "mine.yaml" if target.endswith("yaml") else "smollm2_demo.yaml"
    assert (done.returncode, done.stdout) == (0, f"{here / 'ann' / name}\n")
    assert list(here.iterdir()) == [here / "ann"]


def test_an_option_finds_the_home_too(command, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "ann"))
    done = command("data", "build", "commonsense", "--from=~/raw")
    assert done.returncode == 2
    assert f"{here / 'ann' / 'raw'}: no such folder" in done.stderr


def test_copy_keeps_the_name_where_no_other_is_given(cli, here):
    (here / "folder").mkdir()
    assert cli("recipes", "copy", "smollm2_demo").stdout == "smollm2_demo.yaml\n"
    assert cli("recipes", "copy", "smollm2_demo", "folder").stdout == "folder/smollm2_demo.yaml\n"
    copies = [here / "smollm2_demo.yaml", here / "folder" / "smollm2_demo.yaml"]
    # The copy names the schema where it is; all else is byte for byte the shipped one.
    beside, there = "$schema=recipe.schema.json\n", f"$schema={(ROOT / 'recipes').as_uri()}/"
    text = shipped_recipes()["smollm2_demo"].read_text()
    assert {path.read_text() for path in copies} == {
        text.replace(beside, f"{there}recipe.schema.json\n")
    }
    assert text.count(beside) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("show", "llama7b"),
            "error: llama7b: no such recipe (did you mean 'llama7b_commonsense'?",
        ),
        (("copy", "nothing"), "error: nothing: no such recipe; shipped are llama13b_commonsense, "),
        (("copy", "smollm2_demo", "no/such/mine.yaml"), "error: no/such: no such folder"),
        (("show", "."), "error: .: a directory; expected a recipe, a YAML file"),
    ],
)
def test_a_wrong_name_or_folder_is_one_line(cli, arguments, message):
    done = cli("recipes", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


def test_check_names_every_mistake_of_every_file(command, here):
    (here / "good.yaml").write_text(shipped_recipes()["smollm2_demo"].read_text())
    (here / "bad.yaml").write_text(
        "base: {model: a, modle: b}\nmethod: {name: san}\n"
        "training: {learning_rate: fast}\ndata: {train: pocket, loss: all}\n"
    )
    mistakes = [
        "bad.yaml:1: base.modle: unknown key (did you mean 'model'?)",
        "bad.yaml:3: training.learning_rate: expected a number, found 'fast'",
    ]
    done = command("recipes", "check", "good.yaml", "llama7b_commonsense")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "good.yaml: ok\nllama7b_commonsense: ok\n"
    done = command("recipes", "check", "bad.yaml", "good.yaml", "gone.yaml")
    assert (done.returncode, done.stdout) == (2, "good.yaml: ok\n")
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines()]
    assert lines[:2] == mistakes
    assert lines[2].startswith("gone.yaml: no such recipe")
    done = command("recipes", "check", "bad.yaml", "good.yaml", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout) == {
        "bad.yaml": {"ok": False, "errors": mistakes, "warnings": []},
        "good.yaml": {"ok": True, "errors": [], "warnings": []},
    }


def test_check_counts_what_is_probably_not_meant(command, here):
    shipped = shipped_recipes()["smollm2_demo"].read_text()
    (here / "slow.yaml").write_text(
        shipped.replace("5e-3", "1e-4").replace("_steps: 6", "_steps: 99")
    )
    done = command("recipes", "check", "slow.yaml")
    assert (done.returncode, done.stdout) == (0, "slow.yaml: ok, 2 warnings\n")
    rate, warmup = done.stderr.splitlines()
    assert rate.startswith("slow.yaml: warning: training.learning_rate is 0.0001, a 20th of ")
    assert warmup.startswith("slow.yaml: warning: the warmup of 99 steps never ends in a run of 40")
    done = command("recipes", "check", "slow.yaml", "--json")
    assert len(json.loads(done.stdout)["slow.yaml"]["warnings"]) == 2


# --- the schema for editors ---


def test_the_schema_beside_the_recipes_is_the_one_that_is_printed(command):
    done = command("recipes", "schema")
    kept = (ROOT / "recipes" / "recipe.schema.json").read_text()
    assert done.stdout == kept, "san-llm recipes schema > recipes/recipe.schema.json"


@pytest.fixture
def editor() -> Draft202012Validator:
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def as_editors_read(text: str):
    # YAML 1.2, as editors have it, takes 5e-3 for a number; PyYAML for text.
    return yaml.safe_load(re.sub(r"(?<= )(\d+)e-(\d+)$", r"\1.0e-\2", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["san", "lora", "dora", "ia3", "full"])
def test_an_editor_takes_the_shipped_recipes_and_resolved_ones(editor, name, method):
    path = shipped_recipes()[name]
    editor.validate(as_editors_read(path.read_text()))
    resolved = to_yaml(load_recipe(path, [f"method.name={method}"]))
    editor.validate(as_editors_read(resolved))


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"modle": "x"}},
        {"base": {"dtype": "fp16"}},
        {"method": {"name": "sna"}},
        {"method": {"rnak": 8}},
        {"training": {"learning_rate": "fast"}},
        {"training": {"batch_size": 0}},
        {"data": {"loss": "none"}},
        {"trianing": {}},
    ],
    ids=str,
)
def test_an_editor_underlines_what_the_recipe_refuses(editor, change):
    value = as_editors_read(shipped_recipes()["smollm2_demo"].read_text())
    for section, keys in change.items():
        value[section] = value.get(section, {}) | keys
    assert not editor.is_valid(value)
    with pytest.raises(InputError):
        parse_recipe(json.dumps(value), "changed.yaml")
