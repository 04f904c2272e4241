"""Recipes: strict, every mistake at once with its line, overrides, and a faithful printed form."""

import re
from dataclasses import fields
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from san_llm.architectures.decoders import TARGETS
from san_llm.architectures.entry import KINDS
from san_llm.architectures.lookup import family_targets
from san_llm.data.split import held_out_count
from san_llm.errors import InputError
from san_llm.models.adapter import adapter_config
from san_llm.protocol.prompts import STYLES
from san_llm.protocol.tasks import TASKS
from san_llm.recipe.read import load_recipe, parse_recipe, to_yaml
from san_llm.recipe.schema import Recipe, SanMethod
from san_llm.recipe.shipped import find_recipe, shipped_recipes
from san_llm.san.config import SanConfig
from san_llm.san.options import CARRIERS, FORMS, MODES

GOOD = """\
base:
  model: some/model
method:
  name: san
data:
  train: pocket
  loss: response
training:
  learning_rate: 1e-3
"""


def parse(text: str = GOOD, *overrides: str) -> Recipe:
    return parse_recipe(text, "mine.yaml", overrides)


def mistakes(text: str = GOOD, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as error:
        parse(text, *overrides)
    return str(error.value).splitlines()


def test_a_short_recipe_gets_every_default():
    recipe = parse()
    assert recipe.name == "mine"
    assert (recipe.base.dtype, recipe.base.quantization) == ("bfloat16", None)
    assert recipe.method == SanMethod(name="san")
    assert recipe.data.cutoff == 256
    assert recipe.training.learning_rate == 0.001
    assert recipe.evaluation.tasks == tuple(TASKS)


def test_the_published_settings_are_the_defaults():
    # LLM-Adapters and DoRA: batch 16, 3 epochs, linear, cutoff 256, 120 held out, evaluated every
    # 80 steps; LoRA of rank 32, alpha 64, dropout 0.05. Their warmup of 100 steps suits long runs.
    recipe = parse(GOOD, "method.name=lora")
    training = recipe.training
    assert (training.batch_size, training.epochs) == (16, 3)
    assert (training.warmup_steps, training.warmup_share) == (None, 0.1)
    assert (training.schedule, training.evaluate_every) == ("linear", 80)
    assert (recipe.data.cutoff, held_out_count(recipe.data, 170_000)) == (256, 120)
    assert recipe.data.prompt == "llm-adapters"
    method = recipe.method
    assert (method.rank, method.alpha, method.dropout) == (32, 64, 0.05)


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (2, "  modle: x", ["mine.yaml:1: base.model: missing", "mine.yaml:2: base.modle: unknown "
         "key (did you mean 'model'?)"]),
        (2, "  model: 5", ["mine.yaml:2: base.model: expected text, found 5; write it in quotes"]),
        (2, "  model: ''", ["mine.yaml:2: base.model: expected text, found ''"]),
        (2, "  model:", ["mine.yaml:2: base.model: expected text, found nothing"]),
        (2, "  model: [a]", ["mine.yaml:2: base.model: expected text, found ['a']"]),
        (2, "  model: x\n  dtype: bf16", ["mine.yaml:3: base.dtype: 'bf16' is not one of float32, "
         "bfloat16, float16 (did you mean 'bfloat16'?)"]),
        (2, "  model: x\n  quantization: 4", ["mine.yaml:3: base.quantization: 4 is not one of "
         "4bit, 8bit"]),
        (2, "  model: x\n  trust_remote_code: 1", ["mine.yaml:3: base.trust_remote_code: expected "
         "true or false, found 1"]),
        (2, "  model: x\n  revision: 0123456", ["mine.yaml:3: base.revision: expected text, found "
         "42798; write it in quotes"]),
        (4, "  name: sam", ["mine.yaml:4: method.name: 'sam' is not one of san, lora, dora, ia3, "
         "peft, full (did you mean 'san'?)"]),
        (4, "  name: [san]", ["mine.yaml:4: method.name: ['san'] is not one of san, lora, dora, "
         "ia3, peft, full (did you mean 'san'?)"]),
        (4, "  mode: both", ["mine.yaml:3: method.name: missing"]),
        (4, "  name: san\n  zzzzzz: 8", ["mine.yaml:5: method.zzzzzz: unknown key: known here are "
         "name, target_modules, carrier, mode, shift, links, adapt_embedding, "
         "wiring, train_norms, rank, alpha, dropout, form"]),
        (4, "  name: san\n  rank: 8", ["mine.yaml:3: method: rank: the scale carrier has none; "
         "lora and dora do"]),
        (4, "  name: san\n  carrier: lora\n  shift: true", ["mine.yaml:3: method: shift: the lora "
         "carrier has no neuron shift; the scale carrier does"]),
        (4, "  name: san\n  mode: neurone", ["mine.yaml:5: method.mode: 'neurone' is not one of "
         "both, neuron, synapse (did you mean 'neuron'?)"]),
        (4, "  name: san\n  links: [mlp, atention]", ["mine.yaml:5: method.links[1]: 'atention' is "
         "not one of attention, mlp, residual (did you mean 'attention'?)"]),
        (4, "  name: san\n  links: mlp", ["mine.yaml:5: method.links: expected a list of "
         "attention, mlp, residual, or the word free, found 'mlp'"]),
        (4, "  name: san\n  links:", ["mine.yaml:5: method.links: expected a list of attention, "
         "mlp, residual, or the word free, found nothing"]),
        (4, "  name: san\n  links: fre", ["mine.yaml:5: method.links: expected a list of "
         "attention, mlp, residual, or the word free, found 'fre'"]),
        (4, "  name: san\n  links: [free]", ["mine.yaml:5: method.links: 'free' is not a kind for "
         "a list: write the word alone"]),
        (4, "  name: san\n  mode: neuron\n  links: free", ["mine.yaml:3: method: links: free "
         "trains a row and a column scale of each target, which is mode 'both'; mode 'neuron' has "
         "only one of them"]),
        (4, "  name: ia3\n  target_modules: publishd", ["mine.yaml:5: method.target_modules: "
         "'publishd' is not one of all, published, peft (did you mean 'published'?); names are "
         "written as a list"]),
        (4, "  name: san\n  target_modules: 5", ["mine.yaml:5: method.target_modules: expected a "
         "list, found 5"]),
        (4, "  name: san\n  target_modules: [v_proj, 3]", ["mine.yaml:5: "
         "method.target_modules[1]: expected text, found 3; write it in quotes"]),
        (4, "  name: san\n  target_modules: []", ["mine.yaml:5: method.target_modules: expected at "
         "least one, found []"]),
        (4, "  name: san\n  mode: synapse\n  links: []", ["mine.yaml:3: method: mode 'synapse' "
         "without links trains nothing: switch a link kind on"]),
        (6, "  train: 5", ["mine.yaml:6: data.train: expected 'pocket', a file, {hub: ID} or a "
         "list of these, found 5"]),
        (6, "  train: []", ["mine.yaml:6: data.train: expected 'pocket', a file, {hub: ID} or a "
         "list of these, found []"]),
        (6, "  train: pocket\n  held_out: -1", ["mine.yaml:7: data.held_out: expected 0 rows or "
         "more, a share, or a file"]),
        (6, "  train: pocket\n  held_out: 1.5", ["mine.yaml:7: data.held_out: a share is more "
         "than 0 and less than 1, found 1.5"]),
        (6, "  train: pocket\n  prompt: alpacca", ["mine.yaml:7: data.prompt: 'alpacca' is not one "
         "of llm-adapters, llm-adapters-aligned, alpaca, chat (did you mean 'alpaca'?)"]),
        (6, "  train: pocket\n  cutoff: 7", ["mine.yaml:7: data.cutoff: input should be greater "
         "than or equal to 8, found 7"]),
        (7, "  prompt: alpaca", ["mine.yaml:5: data.loss: missing"]),
        (9, "  learning_rate: 1e-3\n  loss: all", ["mine.yaml:10: training.loss: unknown key (it "
         "belongs to 'data')"]),
        (9, "  learning_rate: 1e-3\n  warmup_steps: 5\n  warmup_share: 0.1", ["mine.yaml:8: "
         "training: warmup_steps and warmup_share say the same: take one of them out"]),
        (9, "  lr: 1e-3", ["mine.yaml:8: training.learning_rate: missing", "mine.yaml:9: "
         "training.lr: unknown key (here it is training.learning_rate)"]),
        (9, "  learning_rate: 1e-3\n  bf16: true", ["mine.yaml:10: training.bf16: unknown key "
         "(here it is base.dtype: bfloat16)"]),
        (9, "  learning_rate: 1e-3\n  early_stopping_patience: 3", ["mine.yaml:10: "
         "training.early_stopping_patience: unknown key (there is none: the checkpoint with the "
         "lowest held-out loss is kept)"]),
        (4, "  name: lora\n  r: 8", ["mine.yaml:5: method.r: unknown key (here it is "
         "method.rank)"]),
        (6, "  train: pocket\n  held_out: 10%", ["mine.yaml:7: data.held_out: expected a number of "
         "rows, a share or a file (.json, .jsonl, .csv, .tsv, .parquet, .arrow), found '10%'; a "
         "share is written as 0.1"]),
        (6, "  train: pocket\n  held_out: rows.txt", ["mine.yaml:7: data.held_out: expected a "
         "number of rows, a share or a file (.json, .jsonl, .csv, .tsv, .parquet, .arrow), found "
         "'rows.txt'"]),
        (6, "  train: {pth: a.json}", ["mine.yaml:6: data.train.pth: unknown key (did you mean "
         "'path'?)"]),
        (6, "  train: [{path: a.json, weight: 1}, b.json]", ["mine.yaml:6: data.train: 1 of 2 "
         "sources have a weight; expected all or none"]),
        (6, "  train: [{path: a.json, weight: 0}]", ["mine.yaml:6: data.train: the weights of all "
         "sources are 0, so that none is learned from"]),
        (6, "  train: {path: a.json, hub: b}", ["mine.yaml:6: data.train: expected a path or a hub "
         "id, one of them"]),
        (6, "  train: {path: a.json, split: b}", ["mine.yaml:6: data.train: 'split' is of a data "
         "set on the hub; a.json is a file"]),
        (6, "  train: a.json\n  columns: {promt: Q}", ["mine.yaml:7: data.columns.promt: unknown "
         "key (did you mean 'prompt'?)"]),
        (6, "  train: a.json\n  columns: {}", ["mine.yaml:7: data.columns: names no column; "
         "expected such as {prompt: question, completion: reply}"]),
        (9, "  learning_rate: fast", ["mine.yaml:9: training.learning_rate: expected a number, "
         "found 'fast'"]),
        (9, "  learning_rate: 0", ["mine.yaml:9: training.learning_rate: input should be greater "
         "than 0, found 0"]),
        (9, "  learning_rate: 2", ["mine.yaml:9: training.learning_rate: input should be less than "
         "1, found 2"]),
        (9, "  learning_rate: .nan", ["mine.yaml:9: training.learning_rate: expected a finite "
         "number, found nan"]),
        (9, "  learning_rate: true", ["mine.yaml:9: training.learning_rate: expected a number, "
         "found True"]),
        (9, "  learning_rate: 1e-3\n  batch_size: 1.5", ["mine.yaml:10: training.batch_size: "
         "expected a whole number, found 1.5"]),
        (9, "  learning_rate: 1e-3\n  batch_size: '16'", ["mine.yaml:10: training.batch_size: "
         "expected a whole number, found '16'"]),
        (9, "  learning_rate: 1e-3\n  seed: -1", ["mine.yaml:10: training.seed: input should be "
         "greater than or equal to 0, found -1"]),
        (8, "trainin:", ["mine.yaml: training: missing", "mine.yaml:8: trainin: unknown key (did "
         "you mean 'training'?)"]),
        (9, "  learning_rate: 1e-3\nevaluation:\n  tasks: [boolq, bolq]", ["mine.yaml:11: "
         "evaluation.tasks: task 'bolq' is not one of boolq, piqa, social_i_qa, hellaswag, "
         "winogrande, ARC-Easy, ARC-Challenge, openbookqa (did you mean 'boolq'?)"]),
        (9, "  learning_rate: 1e-3\nevaluation:\n  tasks: [5]", ["mine.yaml:11: "
         "evaluation.tasks[0]: expected text, found 5; write it in quotes"]),
        (9, "  learning_rate: 1e-3\nevaluation:", ["mine.yaml:10: evaluation: expected a section "
         "with keys, found nothing"]),
        (9, "  learning_rate: 1e-3\nname: a/b", ["mine.yaml:10: name: expected letters, digits, "
         "'.', '_', '-', the first a letter or digit, found 'a/b'"]),
        (9, "  learning_rate: 1e-3\n5: x", ["mine.yaml:10: 5: a key must be text; write it in "
         "quotes"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_what_would_be_right(line, change, message):
    lines = GOOD.splitlines()
    lines[line - 1] = change
    assert mistakes("\n".join(lines)) == message


def test_all_mistakes_are_reported_at_once():
    text = "base: {modle: x, dtype: f}\nmethod: {name: san, mde: 1}\ndata: {train: pocket}\n"
    assert [line.rsplit(": ", 1)[0] for line in mistakes(text + "extra: 1\n")] == [
        "mine.yaml:1: base.model",
        "mine.yaml:1: base.dtype",
        "mine.yaml:1: base.modle",
        "mine.yaml:2: method.mde",
        "mine.yaml:3: data.loss",
        "mine.yaml: training",
        "mine.yaml:4: extra: unknown key",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml: the file is empty"),
        ("# only a comment\n", "mine.yaml: the file is empty"),
        ("- a\n- b\n", "mine.yaml: expected a mapping with the sections base, method, data, "),
        (
            '[{"output": "a"}]',
            "mine.yaml: expected a mapping with the sections base, method, data, training, "
            "evaluation; rows belong in data.train of a recipe",
        ),
        ("hello", "mine.yaml: expected a mapping with the sections base, method, data, "),
        (GOOD + "\tname: x\n", "mine.yaml:10: not valid YAML: "),
        (GOOD + "name: [a\n", "mine.yaml:11: not valid YAML: "),
        (GOOD + "---\n" + GOOD, "mine.yaml:10: not valid YAML: but found another document"),
        (GOOD + "name: a\x00b\n", "mine.yaml: not valid YAML: unacceptable character #x0000"),
        (GOOD + "name: " + "[" * 5000, "mine.yaml: not valid YAML: nested too deeply"),
        (GOOD + "name: " + "9" * 5000, "mine.yaml: not valid YAML: a number of too many digits"),
        (GOOD + "? [a]\n: 1\n", "mine.yaml:10: a list or a mapping: a key must be text"),
        (GOOD + "?\n", "mine.yaml:10: null: a key must be text; write it in quotes"),
        (GOOD + "  yes: 1\n", "mine.yaml:10: training.yes: a key must be text; write it in "),
        (GOOD + "base:\n  model: y\n", "mine.yaml:10: base: given twice, first in line 1"),
        (GOOD + "  seed: 1\n  seed: 2\n", "mine.yaml:11: training.seed: given twice, first in "),
    ],
)
def test_what_is_no_recipe_at_all_is_refused_in_one_line(text, message):
    (found,) = mistakes(text)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("&x 1e-3", "mine.yaml:9: not valid YAML: &x: a recipe has no anchors and aliases"),
        ("*x", "mine.yaml:9: not valid YAML: *x: a recipe has no anchors and aliases"),
        ("&x [*x]", "mine.yaml:9: not valid YAML: &x: a recipe has no anchors and aliases"),
        ("!!float 3", "mine.yaml:9: not valid YAML: tag:yaml.org,2002:float: a recipe has no tags"),
        ("!mine 3", "mine.yaml:9: not valid YAML: !mine: a recipe has no tags"),
        (
            "!!python/object/apply:os.mkdir [was_run]",
            "mine.yaml:9: not valid YAML: tag:yaml.org,2002:python/object/apply:os.mkdir: "
            "a recipe has no tags",
        ),
        ("!!python/name:os.system", "mine.yaml:9: not valid YAML: tag:yaml.org,2002:python/name:"),
    ],
)
def test_anchors_tags_and_python_objects_are_refused(value, message, here):
    (found,) = mistakes(GOOD.replace("1e-3", value))
    assert found.startswith(message)
    (found,) = mistakes(GOOD, f"training.learning_rate={value}")
    assert found.startswith(f"argument 'training.learning_rate={value}': the value is not valid ")
    assert not (here / "was_run").exists()


def test_a_merge_key_is_a_key_like_any_other():
    assert mistakes(GOOD.replace("  model: some/model", "  <<: {model: x}")) == [
        "mine.yaml:1: base.model: missing",
        "mine.yaml:2: base.<<: unknown key: known here are model, revision, adapter, dtype, "
        "quantization, quant_type, double_quant, trust_remote_code",
    ]


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), ("2.5e-3", 2.5e-3), (".5", 0.5)],
)
def test_a_number_in_scientific_notation_is_a_number(written, number):
    assert parse(GOOD.replace("1e-3", written)).training.learning_rate == number
    assert parse(GOOD, f"training.learning_rate={written}").training.learning_rate == number


def test_whole_numbers_stay_whole_and_dates_stay_text():
    recipe = parse(GOOD, "training.batch_size=1_000", "base.revision=2024-01-01", "name='1e5'")
    assert recipe.training.batch_size == 1000
    assert recipe.base.revision == "2024-01-01"
    assert recipe.name == "1e5"


# --- overrides ---


def test_an_override_replaces_any_key():
    recipe = parse(
        GOOD,
        "training.epochs=2",
        "evaluation.tasks=[boolq, social_iqa]",
        "data.train=[a.json, b.jsonl]",
        "base.quantization=4bit",
        "base.model=a=b",
        "data.held_out=held.json",
    )
    assert recipe.training.epochs == 2
    assert recipe.evaluation.tasks == ("boolq", "social_i_qa")
    assert recipe.data.train == ("a.json", "b.jsonl")
    assert recipe.base.quantization == "4bit"
    assert recipe.base.model == "a=b"
    assert recipe.data.held_out == "held.json"


def test_4_bits_are_those_of_qlora_unless_told_otherwise():
    base = parse(GOOD, "base.quantization=4bit").base
    assert (base.quant_type, base.double_quant) == ("nf4", True)
    base = parse(
        GOOD, "base.quantization=4bit", "base.quant_type=fp4", "base.double_quant=false"
    ).base
    assert (base.quant_type, base.double_quant) == ("fp4", False)


@pytest.mark.parametrize("bits", ["8bit", "null"])
@pytest.mark.parametrize("key", ["quant_type=nf4", "double_quant=false"])
def test_only_4_bits_have_kinds(bits, key):
    name = key.split("=")[0]
    assert mistakes(GOOD, f"base.quantization={bits}", f"base.{key}") == [
        f"mine.yaml:1: base: {name}: only quantization 4bit has one"
    ]


def test_null_takes_a_value_back():
    assert parse(GOOD + "  max_steps: 5\n", "training.max_steps=null").training.max_steps is None
    assert parse(GOOD + "  max_steps: 5\n", "training.max_steps=").training.max_steps is None


def test_the_last_of_two_overrides_counts():
    assert parse(GOOD, "training.epochs=2", "training.epochs=5").training.epochs == 5


def test_another_method_starts_from_its_own_defaults():
    text = GOOD.replace("name: san", "name: san\n  mode: neuron\n  target_modules: [q_proj]")
    recipe = parse(text, "method.rank=8", "method.name=lora")
    assert recipe.method.name == "lora"
    assert recipe.method.rank == 8
    assert recipe.method.target_modules == "all"
    assert parse(text, "method.name=san").method.mode == "neuron"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("training.epochs", "expected key=value, such as training.learning_rate=1e-3"),
        ("=1", "expected key=value, such as training.learning_rate=1e-3"),
        (".epochs=1", "expected key=value, such as training.learning_rate=1e-3"),
        ("training..epochs=1", "expected key=value, such as training.learning_rate=1e-3"),
        ("training.epochs=[1", "the value is not valid YAML: "),
        ("training.epochs=" + "[" * 3000, "the value is not valid YAML: nested too deeply"),
        ("data.train.x=1", "'train' is a value, not a section"),
        ("training.epoch=1", "training.epoch: unknown key (did you mean 'epochs'?)"),
        ("learning_rate=1", "learning_rate: unknown key (it belongs to 'training')"),
        ("optimizer.name=sgd", "optimizer: unknown key (there is none: the optimizer is AdamW)"),
        ("lr=1e-3", "lr: unknown key (here it is training.learning_rate)"),
        ("engine.name=x", "engine: unknown key: known here are name, base, method, data, training"),
        (
            "method.name=loro",
            "method.name: 'loro' is not one of san, lora, dora, ia3, peft, full (did you ",
        ),
        ("training.learning_rate=7", "training.learning_rate: input should be less than 1, found "),
        ("training.learning_rate=", "training.learning_rate: expected a number, found nothing"),
        ("training={learning_rate: 7}", "training.learning_rate: input should be less than 1"),
        ("training=3", "training: expected a section with keys, found 3"),
    ],
)
def test_a_wrong_override_is_named_by_itself(argument, message):
    (found,) = mistakes(GOOD, argument)
    assert found.startswith(f"argument {argument!r}: {message}")


def test_an_argument_replaces_what_the_file_says_of_the_warmup_in_the_other_way():
    by_share = GOOD + "  warmup_share: 0.2\n"
    for text, argument, told in (
        (by_share, "training.warmup_steps=7", (7, None)),
        (GOOD + "  warmup_steps: 7\n", "training.warmup_share=0.2", (None, 0.2)),
        (by_share, "training.warmup_share=0.3", (None, 0.3)),
    ):
        training = parse(text, argument).training
        assert (training.warmup_steps, training.warmup_share) == told
    (found,) = mistakes(GOOD, "training.warmup_steps=7", "training.warmup_share=0.2")
    assert found.endswith("say the same: take one of them out")


def test_a_home_is_found_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    recipe = parse(
        GOOD,
        "base.model=~/llama",
        "data.train=[~/a.json, b.json]",
        "data.held_out=~/c.jsonl",
        "evaluation.data=~/tasks",
    )
    assert recipe.base.model == "/home/ann/llama"
    assert recipe.data.train == ("/home/ann/a.json", "b.json")
    assert recipe.data.held_out == "/home/ann/c.jsonl"
    assert recipe.evaluation.data == "/home/ann/tasks"


def test_a_key_given_twice_within_an_override_is_refused():
    (found,) = mistakes(GOOD, "training={seed: 1, seed: 2}")
    assert "training.seed: given twice" in found


# --- files ---


def test_a_file_is_read_with_or_without_a_byte_order_mark(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.yaml").write_bytes(mark + GOOD.replace("\n", "\r\n").encode())
        assert load_recipe(tmp_path / "a.yaml").name == "a"


@pytest.mark.parametrize(
    ("stem", "name"), [("my recipe", "my-recipe"), ("ünï", "n"), ("-", "recipe"), ("a.b", "a.b")]
)
def test_a_name_for_folders_is_made_of_any_file_name(stem, name):
    assert parse_recipe(GOOD, f"some/{stem}.yaml").name == name


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "a.yaml").write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(InputError, match=r"a\.yaml: not UTF-8: byte 0 is not valid"):
        load_recipe(tmp_path / "a.yaml")


def test_a_recipe_is_found_by_path_or_by_shipped_name(here):
    shipped = shipped_recipes()["smollm2_demo"]
    assert find_recipe("smollm2_demo") == shipped
    assert find_recipe("smollm2_demo.yaml") == shipped
    assert find_recipe("recipes/smollm2_demo.yaml") == shipped
    (here / "smollm2_demo").write_text(GOOD)
    assert find_recipe("smollm2_demo").read_text() == GOOD
    with pytest.raises(InputError, match=r"smollm_demo: no such recipe \(did you mean 'smollm2_d"):
        find_recipe("smollm_demo")
    with pytest.raises(InputError, match="no such recipe"):
        find_recipe("elsewhere/smollm2_demo.yaml")
    with pytest.raises(InputError, match="a directory; expected a recipe"):
        find_recipe(".")
    (here / "runs" / "mine-1").mkdir(parents=True)
    (here / "runs" / "mine-1" / "recipe.yaml").write_text(GOOD)
    (here / "mine.yaml").write_text(GOOD)
    for typed, hint in (
        ("mine.yml", "(did you mean 'mine.yaml'?)"),
        ("runs/mine1", "(did you mean 'runs/mine-1'?)"),
        ("runs/mine-1", "; a run goes on with --resume"),
    ):
        with pytest.raises(InputError, match=re.escape(hint)):
            find_recipe(typed)


# --- the printed form ---

NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    st.sampled_from(["1e5", "12e5678", "null", "~", "yes", "0x1f", "2024-01-01", "a: b", "# c"]),
    st.sampled_from(["1_0", "1:30", "=", "<<", "&a", "*a", "!x", "- a", "\u2028", " "]),
)
SOME_TARGETS = st.one_of(
    st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
    st.sampled_from(["all", "published", "peft"]),
)
METHODS = st.one_of(
    st.fixed_dictionaries(
        {"name": st.just("san"), "target_modules": SOME_TARGETS},
        optional={
            "mode": st.sampled_from(["both", "neuron"]),
            "shift": st.booleans(),
            "links": st.lists(st.sampled_from(KINDS), unique=True),
            "adapt_embedding": st.booleans(),
        },
    ),
    st.fixed_dictionaries({"name": st.just("san"), "links": st.just("free")}),
    st.fixed_dictionaries(
        {"name": st.sampled_from(["lora", "dora"])},
        optional={
            "rank": st.integers(1, 512),
            "alpha": st.floats(1e-6, 1e6),
            "dropout": st.floats(0, 0.99),
        },
    ),
    st.fixed_dictionaries({"name": st.just("ia3")}, optional={"target_modules": SOME_TARGETS}),
    st.fixed_dictionaries(
        {
            "name": st.just("peft"),
            "config": st.fixed_dictionaries(
                {"peft_type": st.sampled_from(["VERA", "ROAD"])},
                optional={"r": st.integers(1, 64), "names": st.lists(TEXTS), "of": TEXTS},
            ),
        }
    ),
)
RECIPES = st.fixed_dictionaries(
    {
        "name": NAMES,
        "base": st.fixed_dictionaries(
            {"model": TEXTS},
            optional={
                "revision": st.none() | TEXTS,
                "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
                "quantization": st.sampled_from([None, "8bit"]),
                "trust_remote_code": st.booleans(),
            },
        )
        | st.fixed_dictionaries(
            {"model": TEXTS, "quantization": st.just("4bit")},
            optional={
                "quant_type": st.sampled_from([None, "nf4", "fp4"]),
                "double_quant": st.none() | st.booleans(),
            },
        ),
        "method": METHODS,
        "data": st.fixed_dictionaries(
            {
                "train": TEXTS | st.lists(TEXTS, min_size=1).map(tuple),
                "loss": st.sampled_from(["response", "all"]),
            },
            optional={
                "held_out": st.integers(0, 10**6) | TEXTS.map(lambda text: f"{text}0.json"),
                "prompt": st.sampled_from(STYLES),
                "cutoff": st.integers(8, 10**6),
                "limit": st.none() | st.integers(1, 10**6),
            },
        ),
        "training": st.fixed_dictionaries(
            {"learning_rate": st.floats(0, 1, exclude_min=True, exclude_max=True)},
            optional={
                "epochs": st.floats(1e-6, 1e6) | st.integers(1, 100),
                "max_steps": st.none() | st.integers(1, 10**9),
                "warmup_share": st.none() | st.floats(0, 0.99),
                "weight_decay": st.floats(0, 1e6),
                "seed": st.integers(0, 2**32 - 1),
            },
        ),
        "evaluation": st.fixed_dictionaries(
            {},
            optional={
                "tasks": st.lists(st.sampled_from(list(TASKS)), min_size=1).map(tuple),
                "data": TEXTS,
                "prompt": st.none() | st.sampled_from(STYLES),
            },
        ),
    }
)


def tuples(value):
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


@settings(deadline=None, max_examples=60)
@given(raw=RECIPES)
def test_a_printed_recipe_reads_as_itself(raw):
    recipe = Recipe.model_validate(tuples(raw))
    text = to_yaml(recipe)
    assert parse_recipe(text, "recipe.yaml") == recipe
    # Nothing is left to a default: the printed form has every key.
    assert list(yaml.safe_load(text)) == list(Recipe.model_fields)


@settings(deadline=None, max_examples=100)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.lists(st.sampled_from([*GOOD.splitlines(), "  - a", "x: &a 1", "  ?", "{", "]"])).map(
            "\n".join
        ),
    ),
    overrides=st.lists(
        st.text(max_size=20) | st.sampled_from(["method={}", "data=[]", "base.model.x=1", "a.b="]),
        max_size=3,
    ),
)
def test_any_text_is_a_recipe_or_refused_with_its_file(text, overrides):
    try:
        parse_recipe(text, "any.yaml", overrides)
    except InputError as error:
        lines = str(error).splitlines()
    else:
        lines = []
    assert all(line.startswith(("any.yaml", "argument ")) for line in lines[:1])


def test_the_method_comes_first_in_its_printed_section():
    for name in ("san", "lora", "dora", "ia3", "full"):
        section = yaml.safe_load(to_yaml(parse(GOOD, f"method.name={name}")))["method"]
        assert next(iter(section)) == "name"


# The recipe's words for what SanConfig calls as PEFT's LoraConfig does.
IN_CONFIG = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}


def own_fields() -> set[str]:
    return {f.name for f in fields(SanConfig)} - {f.name for f in fields(PeftConfig)}


def test_the_san_section_has_the_options_of_the_tuner():
    section = {IN_CONFIG.get(name, name) for name in SanMethod.model_fields} - {"name"}
    # modules_to_save would train whole weights: not SAN. how_to_load is a note, and no option; the
    # graph is measured, not chosen, and the table's rows are written into an adapter.
    assert section == own_fields() - {"modules_to_save", "how_to_load", "graph", "table"}


def test_the_san_section_has_the_defaults_of_the_tuner():
    from_recipe, by_default = adapter_config(parse().method), SanConfig()
    assert from_recipe.target_modules == family_targets(by_default.target_modules, "llama")
    for name in own_fields() - {"target_modules"}:
        assert getattr(from_recipe, name) == getattr(by_default, name), name


def test_ia3_scales_every_output_unless_told_to_be_as_peft_has_it():
    by_default = parse(GOOD, "method.name=ia3").method
    assert (by_default.target_modules, by_default.feedforward_modules) == ("published", ())
    as_peft = parse(GOOD, "method.name=ia3", "method.target_modules=peft").method
    assert as_peft.feedforward_modules == ("down_proj",)
    assert set(adapter_config(as_peft).target_modules) == {"k_proj", "v_proj", "down_proj"}
    told = parse(
        GOOD,
        *("method.name=ia3", "method.target_modules=peft", "method.feedforward_modules=[]"),
    )
    assert told.method.feedforward_modules == ()


@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_a_low_rank_carrier_has_the_defaults_of_its_method(carrier):
    config = adapter_config(parse(GOOD, f"method.carrier={carrier}").method)
    plain = parse(GOOD, f"method.name={carrier}").method
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.05)
    assert (plain.rank, plain.alpha, plain.dropout) == (32, 64, 0.05)


def test_every_option_of_the_san_section_reaches_the_tuner():
    text = """{name: san, target_modules: [v_proj, o_proj], carrier: dora, mode: neuron,
        links: [mlp], adapt_embedding: true, rank: 4, alpha: 3.5, dropout: 0.25, form: plain}"""
    written = yaml.safe_load(text)
    config = adapter_config(parse(GOOD, f"method={text}").method)
    for name in set(written) - {"name"}:
        assert getattr(config, IN_CONFIG.get(name, name)) == written[name], name
    assert adapter_config(parse(GOOD, "method.shift=true").method).shift is True
    assert adapter_config(parse(GOOD, "method.links=free").method).links == "free"


@pytest.mark.parametrize(
    ("name", "known"), [("mode", MODES), ("carrier", CARRIERS), ("form", FORMS)]
)
def test_the_san_section_takes_exactly_the_words_of_the_tuner(name, known):
    assert get_args(SanMethod.model_fields[name].annotation) == known


def test_a_recipe_cannot_be_changed_once_read():
    with pytest.raises(ValueError, match="frozen"):
        parse().training.epochs = 5
