"""Bad inputs that are made when they are tested: damaged copies of good files, links, endless ones.

Each function damages a folder that holds a tiny base (``model``), a finished run of it
(``runs/done``, the last), one that was stopped (``runs/stopped``), rows and a recipe; its decorator
says what is run then, and what the command line answers.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from tiny_gguf import gguf_model, write_gguf

from san_llm.train.checkpoint import SEAL, _seal, best_of

Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        name: What it is called in the test run.
        command: The arguments, as a shell takes them.
        says: A part of the line that it ends with.
        code: The exit code.
        damage: Makes it in a fresh folder.
        environment: Variables that are set for it.
    """

    name: str
    command: str
    says: str
    code: int = 2
    damage: Damage | None = None
    environment: dict[str, str] = field(default_factory=dict)


BUILT: list[Case] = []


def bad(command: str, says: str, code: int = 2, **environment: str) -> Callable[[Damage], Damage]:
    """Register what the decorated function builds as a case."""

    def register(damage: Damage) -> Damage:
        name = damage.__name__
        if any(case.name == name for case in BUILT):
            name += f" in {command.split()[0]}"
        alike = sum(case.name.startswith(name) for case in BUILT)
        name += f" {alike + 1}" if alike else ""
        BUILT.append(Case(name, command, says, code, damage, environment))
        return damage

    return register


def patch(path: Path, changes: dict[str, Any]) -> None:
    """Change keys of a JSON file; None takes one away."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


# --- adapters ---


def adapter(here: Path) -> Path:
    """Return the file with the finished run's numbers."""
    return here / "runs" / "done" / "adapter" / "adapter_model.safetensors"


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def reheader(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file, whatever becomes of it."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


class Bomb:
    """What a pickle runs when it is loaded."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))


def first(tensors: dict[str, Any]) -> str:
    """Return the name of the first tensor, without the header's own entry."""
    return next(name for name in sorted(tensors) if name != "__metadata__")


READERS = ("merge", "diff", "eval --tasks boolq --data data")


def bad_adapter(says: str, commands: tuple[str, ...] = READERS, code: int = 2) -> Any:
    """Register what the decorated function builds once for each command that reads adapters."""

    def register(damage: Damage) -> Damage:
        for command in commands:
            name = f"{damage.__name__} in {command.split()[0]}"
            BUILT.append(Case(name, command, says, code, damage))
        return damage

    return register


@bad_adapter("cut short")
def adapter_cut_short(here: Path) -> None:
    file = adapter(here)
    file.write_bytes(file.read_bytes()[:-100])


@bad_adapter("not a safetensors file, or cut short")
def adapter_cut_in_its_header(here: Path) -> None:
    file = adapter(here)
    file.write_bytes(file.read_bytes()[:200])


@bad_adapter("not a safetensors file, or cut short")
def adapter_empty(here: Path) -> None:
    adapter(here).write_bytes(b"")


@bad_adapter("damaged")
def adapter_with_bytes_behind(here: Path) -> None:
    file = adapter(here)
    file.write_bytes(file.read_bytes() + bytes(64))


@bad_adapter("not a safetensors file, or cut short")
def adapter_with_an_endless_header(here: Path) -> None:
    file = adapter(here)
    file.write_bytes((2**63).to_bytes(8, "little") + file.read_bytes()[8:])


@bad_adapter("header is not JSON")
def adapter_with_a_flipped_bit_in_its_header(here: Path) -> None:
    raw = bytearray(adapter(here).read_bytes())
    raw[8] ^= 0x10
    adapter(here).write_bytes(raw)


@bad_adapter("header is not JSON")
def adapter_with_a_deep_header(here: Path) -> None:
    text = b'{"a":' * 5000 + b"1" + b"}" * 5000
    adapter(here).write_bytes(len(text).to_bytes(8, "little") + text)


@bad_adapter("not a safetensors file")
def adapter_of_zeros(here: Path) -> None:
    adapter(here).write_bytes(bytes(4096))


@bad_adapter("not a safetensors file")
def adapter_of_text(here: Path) -> None:
    adapter(here).write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")


@bad_adapter("damaged")
def adapter_with_a_flipped_bit_in_a_shape(here: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[first(header)]["shape"][0] ^= 64

    reheader(adapter(here), change)


@bad_adapter("damaged")
def adapter_with_an_endless_shape(here: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[first(header)]["shape"] = [2**40, 2**40]

    reheader(adapter(here), change)


@bad_adapter("header is not a table")
def adapter_with_a_negative_shape(here: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[first(header)]["shape"] = [-8, -4]

    reheader(adapter(here), change)


@bad_adapter("is not where the one before it ends")
def adapter_with_offsets_before_the_file(here: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[first(header)]["data_offsets"] = [-1000, -872]

    reheader(adapter(here), change)


@bad_adapter("damaged")
def adapter_with_two_tensors_in_one_place(here: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["a_second"] = header[first(header)]

    reheader(adapter(here), change)


@bad_adapter("header is not a table")
def adapter_with_text_for_offsets(here: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[first(header)]["data_offsets"] = "ab"

    reheader(adapter(here), change)


@bad_adapter("numbers that are not finite", code=1)
def adapter_with_a_nan(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[first(tensors)][0] = float("nan")

    rewrite(adapter(here), change)


@bad_adapter("numbers that are not finite", code=1)
def adapter_with_an_infinity(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[first(tensors)][1] = float("-inf")

    rewrite(adapter(here), change)


@bad_adapter("model.layers.0.mlp.down_proj", ("merge", "eval --tasks boolq --data data"))
def adapter_without_a_vector(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors[first(tensors)]

    rewrite(adapter(here), change)


@bad_adapter("belongs to nothing in this base", ("merge",))
@bad_adapter("nothing here takes", ("eval --tasks boolq --data data",))
def adapter_with_a_vector_too_many(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        name = first(tensors)
        tensors[name.replace("layers.0.", "layers.7.")] = tensors[name].clone()

    rewrite(adapter(here), change)


@bad_adapter("belongs to nothing in this base", ("merge",))
@bad_adapter("nothing here takes", ("eval --tasks boolq --data data",))
def adapter_with_column_scales_that_it_does_not_name(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        name = first(tensors)
        tensors[name.replace("san_gamma", "san_sigma")] = tensors[name].clone()

    rewrite(adapter(here), change)


@bad_adapter("has no sigma for model.layers.0.mlp.down_proj", ("merge",))
@bad_adapter("san_sigma", ("eval --tasks boolq --data data",))
def adapter_without_the_column_scales_that_it_names(here: Path) -> None:
    patch(adapter(here).with_name("adapter_config.json"), {"links": "free"})


@bad_adapter("another base", ("merge", "eval --tasks boolq --data data"))
def adapter_of_a_wider_base(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].repeat(2)

    rewrite(adapter(here), change)


@bad_adapter("belongs to nothing in this base", ("merge",))
@bad_adapter("nothing here takes", ("eval --tasks boolq --data data",))
def adapter_of_another_family(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.layers", "transformer.h")] = tensors.pop(name)

    rewrite(adapter(here), change)


@bad_adapter("not an adapter: no adapter_model.safetensors in it", (READERS[0], READERS[2]))
def adapter_that_is_a_pickle(here: Path) -> None:
    adapter(here).unlink()
    torch.save({"a": Bomb()}, adapter(here).with_suffix(".bin"))


@bad_adapter("not a safetensors file")
def adapter_that_is_a_pickle_by_another_name(here: Path) -> None:
    torch.save({"a": Bomb()}, adapter(here))


@bad_adapter("no adapter yet")
def adapter_without_its_config(here: Path) -> None:
    (adapter(here).parent / "adapter_config.json").unlink()


@bad_adapter("adapter_config.json: not valid JSON")
def adapter_with_half_a_config(here: Path) -> None:
    file = adapter(here).parent / "adapter_config.json"
    file.write_text(file.read_text()[:100])


@bad_adapter("adapter_config.json: not valid JSON")
def adapter_with_a_deep_config(here: Path) -> None:
    (adapter(here).parent / "adapter_config.json").write_text("[" * 100_000)


@bad_adapter("adapter_config.json: expected a JSON object")
def adapter_with_a_list_for_a_config(here: Path) -> None:
    (adapter(here).parent / "adapter_config.json").write_text("[1, 2]")


@bad_adapter("adapter_config.json: not valid JSON")
def adapter_with_a_binary_config(here: Path) -> None:
    (adapter(here).parent / "adapter_config.json").write_bytes(bytes(range(256)))


@bad_adapter("peft_type PROMPT_TUNING puts a prompt that was learned", ("generate hi", READERS[2]))
def adapter_that_learned_a_prompt(here: Path) -> None:
    folder = adapter(here).parent
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.zeros(2, 32)}, adapter(here), metadata={"format": "pt"})


# --- base models ---

TRAIN, MERGE, EVAL = "train good.yaml", "merge", "eval --base-only --tasks boolq --data data"


def bad_base(says: str, commands: tuple[str, ...] = (TRAIN, MERGE, EVAL), code: int = 2) -> Any:
    """Register what the decorated function does to the base once for each command."""
    return bad_adapter(says, commands, code)


@bad_base("config.json in it, so it is not a model")
def base_without_a_config(here: Path) -> None:
    (here / "model" / "config.json").unlink()


@bad_base("config.json: not valid JSON")
def base_with_half_a_config(here: Path) -> None:
    file = here / "model" / "config.json"
    file.write_text(file.read_text()[:100])


@bad_base("config.json: expected a JSON object")
def base_with_a_list_for_a_config(here: Path) -> None:
    (here / "model" / "config.json").write_text("[1]")


@bad_base("config.json: not valid JSON")
def base_with_a_deep_config(here: Path) -> None:
    (here / "model" / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)


@bad_base("config.json: not valid JSON")
def base_with_a_binary_config(here: Path) -> None:
    (here / "model" / "config.json").write_bytes(bytes(range(256)))


@bad_base("no model.safetensors and no model.safetensors.index.json in it")
def base_without_weights(here: Path) -> None:
    (here / "model" / "model.safetensors").unlink()


@bad_base("pytorch_model.bin is a pickle and can run code, so it is never loaded")
def base_that_is_a_pickle(here: Path) -> None:
    (here / "model" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, here / "model" / "pytorch_model.bin")


@bad_base("not a safetensors file, or cut short")
def base_that_is_a_pickle_by_another_name(here: Path) -> None:
    torch.save({"model.norm.weight": Bomb()}, here / "model" / "model.safetensors")


@bad_base("cut short")
def base_cut_short(here: Path) -> None:
    file = here / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@bad_base("damaged")
def base_with_bytes_behind(here: Path) -> None:
    file = here / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")


@bad_base("no model.layers.1.mlp.up_proj.weight")
def base_without_a_weight(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    rewrite(here / "model" / "model.safetensors", change)


@bad_base("its weights have 1 blocks", (TRAIN, EVAL))
def base_without_a_block(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    rewrite(here / "model" / "model.safetensors", change)


@bad_base("shape")
def base_with_a_weight_of_another_shape(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name][:-1].clone()

    rewrite(here / "model" / "model.safetensors", change)


@bad_base("model.layers.1.mlp.up_proj.weight has numbers that are not finite", (TRAIN, EVAL))
def base_with_a_nan(here: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    rewrite(here / "model" / "model.safetensors", change)


def shard(here: Path, name: str) -> None:
    """Make the base a checkpoint of one shard by this name, as its index says."""
    model = here / "model"
    (model / "model.safetensors").rename(here / "elsewhere.safetensors")
    names = list(load_file(here / "elsewhere.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@bad_base("'../elsewhere.safetensors' is not a file in the same folder")
def base_with_a_shard_outside(here: Path) -> None:
    shard(here, "../elsewhere.safetensors")


@bad_base("is not a file in the same folder")
def base_with_a_shard_by_its_whole_path(here: Path) -> None:
    shard(here, str(here / "elsewhere.safetensors"))


@bad_base("model-1.safetensors: cannot be read: No such file")
def base_without_its_shard(here: Path) -> None:
    shard(here, "model-1.safetensors")


@bad_base("not an index of safetensors files")
def base_with_half_an_index(here: Path) -> None:
    shard(here, "model-1.safetensors")
    (here / "model" / "model.safetensors.index.json").write_text('{"weight_map": ')


@bad_base("not an index of safetensors files")
def base_with_numbers_in_its_index(here: Path) -> None:
    shard(here, "model-1.safetensors")
    (here / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')


@bad_base("no tokenizer in it", (TRAIN, EVAL))
def base_without_a_tokenizer(here: Path) -> None:
    for file in (here / "model").glob("tokenizer*"):
        file.unlink()


@bad_base("tokenizer cannot be loaded", (TRAIN, EVAL))
def base_with_half_a_tokenizer(here: Path) -> None:
    file = here / "model" / "tokenizer.json"
    file.write_text(file.read_text()[:200])


@bad_base("tokenizer cannot be loaded", (TRAIN, EVAL))
def base_with_a_tokenizer_of_nothing(here: Path) -> None:
    (here / "model" / "tokenizer.json").write_text("{}")


@bad_base("tokenizer cannot be loaded", (TRAIN, EVAL))
def base_with_a_deep_tokenizer(here: Path) -> None:
    (here / "model" / "tokenizer.json").write_text("[" * 50_000)


@bad_base("needs code of its own", (MERGE,))
def base_with_code_of_its_own(here: Path) -> None:
    code = "import os; os.system('touch pwned')\nclass Model: pass\nclass Config: pass\n"
    (here / "model" / "modeling_evil.py").write_text(code)
    names = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    patch(here / "model" / "config.json", {"auto_map": names})


@bad_base("model type 'evil': transformers has no such model")
def base_of_a_family_that_is_only_code(here: Path) -> None:
    base_with_code_of_its_own(here)
    patch(here / "model" / "config.json", {"model_type": "evil"})


@bad_base("the chat template of", ("train good.yaml data.prompt=chat",))
def base_with_a_template_that_reaches_out(here: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (here / "model" / "chat_template.jinja").write_text(reach)


@bad_base("the chat template of", ("train good.yaml data.prompt=chat",))
def base_with_half_a_template(here: Path) -> None:
    (here / "model" / "chat_template.jinja").write_text("{% for m in messages %}")


@bad_base("a symbolic link out of the folder", (MERGE,))
def base_with_a_link_to_a_secret(here: Path) -> None:
    (here / "secret").write_text("hunter2")
    (here / "model" / "tokenizer.model").symlink_to(here / "secret")


@bad_base("not a file of a model's or adapter's settings")
def base_with_a_config_of_a_gib(here: Path) -> None:
    endless(here / "model" / "config.json", b'{"model_type": "')


# --- GGUF files ---


def gguf(here: Path) -> bytearray:
    """Return the bytes of a small model's GGUF file."""
    return bytearray(write_gguf(here / "good.gguf", gguf_model(num_hidden_layers=1)).read_bytes())


def bad_gguf(says: str) -> Any:
    """Register a case whose function returns the bytes of ``bad.gguf``."""

    def register(build: Callable[[Path], bytes]) -> Damage:
        def damage(here: Path) -> None:
            (here / "bad.gguf").write_bytes(build(here))

        command = "train good.yaml base.model=bad.gguf"
        BUILT.append(Case(build.__name__, command, says, damage=damage))
        return damage

    return register


NOT_A_MODEL = "bad.gguf: cannot be read as a model"


@bad_gguf("bad.gguf: not a GGUF file")
def gguf_empty(here: Path) -> bytes:
    return b""


@bad_gguf("bad.gguf: not a GGUF file")
def gguf_of_text(here: Path) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\n"


@bad_gguf(NOT_A_MODEL)
def gguf_of_four_bytes(here: Path) -> bytes:
    return b"GGUF"


@bad_gguf(NOT_A_MODEL)
def gguf_cut_in_its_header(here: Path) -> bytes:
    return bytes(gguf(here)[:400])


@bad_gguf(NOT_A_MODEL)
def gguf_cut_in_its_numbers(here: Path) -> bytes:
    return bytes(gguf(here)[:-5000])


@bad_gguf(NOT_A_MODEL)
def gguf_of_a_version_to_come(here: Path) -> bytes:
    raw = gguf(here)
    raw[4:8] = (99).to_bytes(4, "little")
    return bytes(raw)


@bad_gguf(NOT_A_MODEL)
def gguf_with_endless_tensors(here: Path) -> bytes:
    raw = gguf(here)
    raw[8:16] = (2**62).to_bytes(8, "little")
    return bytes(raw)


@bad_gguf(NOT_A_MODEL)
def gguf_with_endless_keys(here: Path) -> bytes:
    raw = gguf(here)
    raw[16:24] = (2**62).to_bytes(8, "little")
    return bytes(raw)


@bad_gguf(NOT_A_MODEL)
def gguf_with_an_endless_name(here: Path) -> bytes:
    raw = gguf(here)
    raw[24:32] = (2**40).to_bytes(8, "little")
    return bytes(raw)


@bad_gguf(NOT_A_MODEL)
def gguf_with_zeros_inside(here: Path) -> bytes:
    raw = gguf(here)
    raw[100:2000] = bytes(1900)
    return bytes(raw)


@bad_gguf("bad.gguf: model type 'mamba' is not supported")
def gguf_of_another_family(here: Path) -> bytes:
    return bytes(gguf(here).replace(b"llama", b"mamba"))


# --- rows that are too much ---


def endless(file: Path, start: bytes) -> None:
    """Make a file of a GiB, without taking one on the disk."""
    file.write_bytes(start)
    os.truncate(file, 2**30)


@bad("train good.yaml data.train=huge.json", "a list of more than 256 MiB; write it as .jsonl")
def rows_of_a_gib_on_one_line(here: Path) -> None:
    endless(here / "huge.json", b'[{"instruction": "')


@bad("train good.yaml data.train=huge.jsonl", "huge.jsonl:1: a line of more than 16 MiB")
def lines_of_a_gib(here: Path) -> None:
    endless(here / "huge.jsonl", b'{"instruction": "')


@bad("eval --tasks boolq --data big", "a list of more than 256 MiB")
def test_rows_of_a_gib(here: Path) -> None:
    (here / "big" / "boolq").mkdir(parents=True)
    endless(here / "big" / "boolq" / "test.json", b'[{"instruction": "')


@bad("train half.yaml", "base.dtype float16: gradients of less than 6e-8 would be 0")
@bad("plan half.yaml", "use bfloat16, or float32")
@bad("recipes check half.yaml", "base.dtype float16: gradients of less than 6e-8 would be 0")
def recipe_of_a_dtype_that_loses_small_gradients(here: Path) -> None:
    text = (here / "good.yaml").read_text()
    (here / "half.yaml").write_text(text.replace("float32", "float16"))


PEFT = "method.name=peft 'method.config={peft_type: %s}'"


@bad("train good.yaml method.name=peft", "method.config: missing")
@bad(
    "train good.yaml method.name=peft 'method.config={r: 4}'",
    "method.config: expected a peft_type in it, such as peft_type: VERA",
)
@bad(
    "train good.yaml method.name=peft method.config=5",
    "method.config: expected a section with keys, found 5",
)
@bad("train good.yaml " + PEFT % "VERRA", "(did you mean 'VERA'?)")
@bad(
    "recipes check tuner.yaml",
    "method.config.d_inital: no option of VERA (did you mean 'd_initial'?)",
)
@bad(
    "plan good.yaml " + PEFT % "PROMPT_TUNING",
    "PROMPT_TUNING: it puts a prompt of its own before a text, and rows are packed",
)
@bad(
    "train good.yaml " + PEFT % "ROAD, group_size: 5",
    "method.config: PEFT does not take it as ROAD: ",
)
@bad(
    f"train good.yaml {PEFT % 'HRA'} method.target_modules=publishd",
    "'publishd' is not one of all, published, peft (did you mean 'published'?)",
)
@bad(
    f"train good.yaml {PEFT % 'HRA'} method.target_modules=published",
    "target_modules published: not known of PEFT's tuners; all and peft are",
)
def a_tuner_that_peft_does_not_take(here: Path) -> None:
    text = (here / "good.yaml").read_text()
    section = "{name: peft, config: {peft_type: VERA, d_inital: 0.1}}"
    values = yaml.safe_load(text) | {"method": yaml.safe_load(section)}
    (here / "tuner.yaml").write_text(yaml.safe_dump(values))


@bad("train huge.yaml", "huge.yaml: more than 256 KiB; a recipe is a small file")
def recipe_of_a_gib(here: Path) -> None:
    endless(here / "huge.yaml", b"base: {model: '")


@bad("train good.yaml data.train=pipe.json", "pipe.json: a pipe or a device")
def rows_that_never_come(here: Path) -> None:
    os.mkfifo(here / "pipe.json")


@bad("train pipe.yaml", "pipe.yaml: a pipe or a device")
def recipe_that_never_comes(here: Path) -> None:
    os.mkfifo(here / "pipe.yaml")


@bad("train good.yaml data.train=zero.json", "zero.json: a pipe or a device")
def rows_that_never_end(here: Path) -> None:
    (here / "zero.json").symlink_to("/dev/zero")


@bad("train good.yaml data.train=loop.json", "loop.json: cannot be read: ")
def rows_behind_a_link_to_itself(here: Path) -> None:
    (here / "loop.json").symlink_to(here / "loop.json")


@bad("train good.yaml data.train=[rows.json,more.json]", "more.json: row 1")
def rows_of_which_the_second_file_is_bad(here: Path) -> None:
    (here / "more.json").write_text('[{"instruction": 1}]')


@bad(
    "train good.yaml",
    "tokens, more than the model's context of 32, as in 7 more rows: data.cutoff=32 ",
)
def rows_longer_than_the_context(here: Path) -> None:
    patch(here / "model" / "config.json", {"max_position_embeddings": 32})


@bad("train good.yaml data.held_out=held.json", "held.json: row 1: ")
def held_out_rows_longer_than_the_context(here: Path) -> None:
    row = {"instruction": "Is it " + "long " * 200 + "?", "input": "", "output": "yes"}
    (here / "held.json").write_text(json.dumps([row]))
    recipe = here / "good.yaml"
    recipe.write_text(recipe.read_text().replace("loss:", "cutoff: 4096, loss:"))


@bad("recipes check good.yaml", "good.yaml: data.held_out: held.json: cannot be read: No such file")
def a_checked_recipe_with_held_out_rows_that_are_not_there(here: Path) -> None:
    recipe = here / "good.yaml"
    recipe.write_text(recipe.read_text().replace("held_out: 4", "held_out: held.json"))


@bad("train good.yaml data.held_out=held.json", "held.json: row 1")
def rows_held_out_that_are_bad(here: Path) -> None:
    (here / "held.json").write_text('[{"instruction": 1}]')


@bad("eval --tasks boolq --data data", "expected one of true, false")
def test_rows_with_an_answer_that_is_none(here: Path) -> None:
    row = {"instruction": "a", "output": "b", "answer": "\x1b[31mmaybe"}
    (here / "data" / "boolq" / "test.json").write_text(json.dumps([row]))


@bad("eval --tasks boolq --data data", "no 'answer'")
def test_rows_without_an_answer(here: Path) -> None:
    row = {"instruction": "a", "output": "b"}
    (here / "data" / "boolq" / "test.json").write_text(json.dumps([row]))


@bad("eval --tasks boolq --data data", "more than the model's context of 1,024")
def test_rows_longer_than_the_model_reads(here: Path) -> None:
    row = {"instruction": "a" * 5000, "output": "b", "answer": "true"}
    (here / "data" / "boolq" / "test.json").write_text(json.dumps([row]))


# --- runs ---


def stopped(here: Path) -> Path:
    """Return the last checkpoint of the stopped run."""
    return max((here / "runs" / "stopped" / "checkpoints").glob("checkpoint-*"))


@bad("train runs/stopped --resume", "recipe.yaml")
def run_with_half_a_recipe(here: Path) -> None:
    file = here / "runs" / "stopped" / "recipe.yaml"
    file.write_text(file.read_text()[:60])


@bad("train runs/stopped --resume", "a recipe has no tags")
def run_with_a_recipe_that_runs_code(here: Path) -> None:
    recipe = "base: !!python/object/apply:os.system [touch pwned]\n"
    (here / "runs" / "stopped" / "recipe.yaml").write_text(recipe)


@bad("train runs/stopped --resume", "not UTF-8")
def run_with_a_binary_recipe(here: Path) -> None:
    (here / "runs" / "stopped" / "recipe.yaml").write_bytes(bytes(range(256)))


@bad("eval --tasks boolq --data data", "a symbolic link out of the run's folder")
def run_whose_evaluations_go_elsewhere(here: Path) -> None:
    (here / "precious").mkdir()
    (here / "runs" / "done" / "eval").symlink_to(here / "precious")


@bad("merge --overwrite", "a symbolic link out of the run's folder")
def run_whose_merged_model_goes_elsewhere(here: Path) -> None:
    (here / "precious").mkdir()
    (here / "precious" / "file").write_text("mine")
    (here / "runs" / "done" / "merged").symlink_to(here / "precious")


@bad("train runs/stopped --resume", "a symbolic link out of the run's folder")
def run_whose_log_is_elsewhere(here: Path) -> None:
    (here / "precious").write_text("mine\n")
    (here / "runs" / "stopped" / "log.jsonl").unlink()
    (here / "runs" / "stopped" / "log.jsonl").symlink_to(here / "precious")


@bad("train runs/stopped --resume", "a symbolic link out of the run's folder")
def run_whose_checkpoint_is_elsewhere(here: Path) -> None:
    checkpoint = stopped(here)
    checkpoint.rename(here / "precious")
    checkpoint.symlink_to(here / "precious")


@bad("train runs/stopped --resume", "a symbolic link out of the run's folder")
def run_whose_checkpoints_are_elsewhere(here: Path) -> None:
    checkpoints = stopped(here).parent
    checkpoints.rename(here / "precious")
    checkpoints.symlink_to("../../precious")


def forged(says: str) -> Callable[[Damage], Damage]:
    """Register a checkpoint that the decorated function changes and then seals anew."""

    def register(damage: Damage) -> Damage:
        def seal_anew(here: Path) -> None:
            checkpoint = stopped(here)
            best = best_of(checkpoint)
            damage(checkpoint)
            (checkpoint / SEAL).unlink()
            _seal(checkpoint, best)

        BUILT.append(Case(damage.__name__, "train runs/stopped --resume", says, damage=seal_anew))
        return damage

    return register


def resave(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a file of torch's holds."""
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def remember(checkpoint: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one of the moments of the first parameter."""

    def anew(state: dict[str, Any]) -> None:
        state["state"][0][name] = change(state["state"][0][name])

    resave(checkpoint / "optimizer.pt", anew)


@forged("optimizer.pt: is more than numbers, and was not loaded")
def checkpoint_with_an_optimizer_that_runs_code(checkpoint: Path) -> None:
    torch.save(Bomb(), checkpoint / "optimizer.pt")


@forged("scheduler.pt: is more than numbers, and was not loaded")
def checkpoint_with_a_scheduler_that_runs_code(checkpoint: Path) -> None:
    torch.save(Bomb(), checkpoint / "scheduler.pt")


@forged("optimizer.pt: not a file that torch wrote")
def checkpoint_with_an_optimizer_of_text(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_text("x" * 100)


@forged("optimizer.pt: not a file that torch wrote")
def checkpoint_with_an_optimizer_of_zeros(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    file.write_bytes(bytes(file.stat().st_size))


@forged("scheduler.pt: cannot be read: ")
def checkpoint_with_a_scheduler_of_another_archive(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint / "scheduler.pt", "w") as archive:
        archive.writestr("readme", "nothing of torch's")


@forged("optimizer.pt: is a packed file, which torch does not write")
def checkpoint_with_an_optimizer_that_unpacks_to_a_gib(checkpoint: Path) -> None:
    torch.save({"state": torch.zeros(2**20)}, checkpoint / "big.pt")
    with (
        zipfile.ZipFile(checkpoint / "big.pt") as big,
        zipfile.ZipFile(checkpoint / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for part in big.infolist():
            small.writestr(part.filename, big.read(part))
        small.writestr("more", bytes(2**30))
    (checkpoint / "big.pt").unlink()


@forged("optimizer.pt: is not this training's optimizer")
def checkpoint_with_another_optimizer(checkpoint: Path) -> None:
    resave(checkpoint / "optimizer.pt", lambda state: state["param_groups"].pop())


@forged("optimizer.pt: is not this training's optimizer")
def checkpoint_with_a_number_for_an_optimizer(checkpoint: Path) -> None:
    torch.save({"param_groups": 1, "state": 2}, checkpoint / "optimizer.pt")


@forged("optimizer.pt: betas: expected (0.9, 0.999)")
def checkpoint_with_other_betas(checkpoint: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        state["param_groups"][0]["betas"] = (torch.zeros(9), 2.0)

    resave(checkpoint / "optimizer.pt", change)


@forged("optimizer.pt: state 7000: belongs to no parameter")
def checkpoint_with_moments_of_nothing(checkpoint: Path) -> None:
    resave(checkpoint / "optimizer.pt", lambda s: s["state"].update({7000: s["state"].pop(0)}))


@forged("exp_avg: float32 [5] found")
def checkpoint_with_moments_of_another_shape(checkpoint: Path) -> None:
    remember(checkpoint, "exp_avg", lambda numbers: numbers[:5].clone())


@forged("exp_avg: float32 [1000000, 1000000] found")
def checkpoint_with_moments_of_an_endless_shape(checkpoint: Path) -> None:
    remember(checkpoint, "exp_avg", lambda numbers: numbers[:1].expand(10**6, 10**6))


@forged("exp_avg_sq: float16")
def checkpoint_with_moments_of_another_type(checkpoint: Path) -> None:
    remember(checkpoint, "exp_avg_sq", lambda numbers: numbers.half())


@forged("exp_avg: expected a tensor")
def checkpoint_with_sparse_moments(checkpoint: Path) -> None:
    remember(checkpoint, "exp_avg", lambda numbers: numbers.to_sparse())


@forged("exp_avg: has numbers that are not finite")
def checkpoint_with_a_nan_in_its_moments(checkpoint: Path) -> None:
    remember(checkpoint, "exp_avg", lambda numbers: numbers * float("nan"))


@forged("exp_avg_sq: has numbers that are not finite")
def checkpoint_with_an_infinity_in_its_moments(checkpoint: Path) -> None:
    remember(checkpoint, "exp_avg_sq", lambda numbers: numbers + float("inf"))


@forged("exp_avg_sq: squares below 0")
def checkpoint_with_negative_squares(checkpoint: Path) -> None:
    remember(checkpoint, "exp_avg_sq", lambda numbers: -numbers - 1)


@forged("step: expected 1 to 2")
def checkpoint_of_a_thousand_updates(checkpoint: Path) -> None:
    remember(checkpoint, "step", lambda number: number + 1000)


@forged("scheduler.pt: base_lrs: expected [0.")
def checkpoint_with_another_rate(checkpoint: Path) -> None:
    resave(checkpoint / "scheduler.pt", lambda state: state.update(base_lrs=[1.0, 1.0]))


@forged("scheduler.pt: last_epoch: expected 2")
def checkpoint_with_a_schedule_of_another_step(checkpoint: Path) -> None:
    resave(checkpoint / "scheduler.pt", lambda state: state.update(last_epoch=10**9))


@forged("has no optimizer.pt, so nothing can go on from it")
def checkpoint_without_an_optimizer(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


@forged("scheduler.pt: is missing, so nothing can go on from it")
def checkpoint_without_a_scheduler(checkpoint: Path) -> None:
    (checkpoint / "scheduler.pt").unlink()


@forged("trainer_state.json: cannot be read: No such file or directory")
def checkpoint_without_a_state(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()


@forged("trainer_state.json: not JSON")
def checkpoint_with_half_a_state(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text("{")


@forged("trainer_state.json: not JSON")
def checkpoint_with_a_deep_state(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text("[" * 100_000)


def forged_state(says: str, **changes: Any) -> None:
    """Register a checkpoint with other values in its state."""

    def damage(checkpoint: Path) -> None:
        patch(checkpoint / "trainer_state.json", changes)

    damage.__name__ = f"checkpoint_with {changes}"
    forged(f"trainer_state.json: {says}")(damage)


ENTRY = {"step": 1, "loss": 1.0}
forged_state("expected the state of step 2", global_step=10**9)
forged_state("expected the state of step 2", global_step=-1)
forged_state("log_history: Input should be a valid list", log_history=5)
forged_state("log_history: expected the steps 1 to 2", log_history=[])
forged_state("log_history: expected the steps 1 to 2", log_history=[ENTRY] * 2)
forged_state("log_history.0.step: Field required", log_history=[{"loss": 1.0}])
forged_state(
    "log_history.0.loss: Input should be a valid number", log_history=[ENTRY | {"loss": "x"}]
)
forged_state("epoch: Input should be a finite number", epoch=float("nan"))
forged_state("total_flos: Input should be a valid number", total_flos="many")
forged_state("best_metric: Input should be a finite number", best_metric=float("inf"))
forged_state("best_global_step: expected 2, as in sha256.json", best_global_step=10**9)
forged_state("best_global_step: Input should be a valid integer", best_global_step="../../precious")
NO_BEST = {"best_global_step": None, "best_model_checkpoint": "/elsewhere"}
forged_state("best_global_step: Field required", **NO_BEST)
forged_state("'evil': Trainer's state has no such key", evil=1)


@forged("has no adapter_model.safetensors")
def checkpoint_with_a_pickled_adapter(checkpoint: Path) -> None:
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / ".hidden")


@forged("adapter_model.bin: is no part of a checkpoint")
def checkpoint_with_a_pickle_beside_its_adapter(checkpoint: Path) -> None:
    torch.save(Bomb(), checkpoint / "adapter_model.bin")


@forged("second: is no part of a checkpoint")
def checkpoint_with_an_adapter_inside(checkpoint: Path) -> None:
    (checkpoint / "second").mkdir()
    torch.save(Bomb(), checkpoint / "second" / "adapter_model.bin")


@forged("has no base_model.model.model.layers.0.mlp.down_proj.san_gamma")
def checkpoint_of_another_adapter(checkpoint: Path) -> None:
    rewrite(checkpoint / "adapter_model.safetensors", lambda tensors: tensors.pop(first(tensors)))


@forged("san_gamma: has numbers that are not finite")
def checkpoint_with_a_nan_in_its_adapter(checkpoint: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[first(tensors)][0] = float("nan")

    rewrite(checkpoint / "adapter_model.safetensors", change)


@forged("san_gamma: float32 [64] found, float32 [32] expected")
def checkpoint_of_a_wider_adapter(checkpoint: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[first(tensors)] = tensors[first(tensors)].repeat(2)

    rewrite(checkpoint / "adapter_model.safetensors", change)


@bad("train runs/stopped --resume", "checkpoints: expected a folder; move away what stands there")
def run_with_a_file_for_checkpoints(here: Path) -> None:
    shutil.rmtree(stopped(here).parent)
    (here / "runs" / "stopped" / "checkpoints").write_text("none")


@bad("train runs/stopped --resume", "log.jsonl: expected a file; move away what stands there")
def run_with_a_folder_for_a_log(here: Path) -> None:
    (here / "runs" / "stopped" / "log.jsonl").unlink()
    (here / "runs" / "stopped" / "log.jsonl").mkdir()


@bad("train runs/stopped --resume", "checkpoints: none is whole")
def checkpoint_with_a_flipped_bit(here: Path) -> None:
    file = stopped(here) / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


@bad("train runs/stopped --resume", "checkpoints: none is whole")
def checkpoint_cut_short(here: Path) -> None:
    file = stopped(here) / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])


@bad("train runs/stopped --resume", "checkpoints: none is whole")
def checkpoint_sealed_by_a_pipe(here: Path) -> None:
    (stopped(here) / SEAL).unlink()
    os.mkfifo(stopped(here) / SEAL)


@bad("train good.yaml", "runs/latest: expected a link to the last run")
def latest_that_is_a_folder(here: Path) -> None:
    (here / "runs" / "latest").unlink()
    (here / "runs" / "latest").mkdir()


@bad("train good.yaml --output precious --overwrite", "not a run of ours")
def output_that_is_no_run(here: Path) -> None:
    (here / "precious").mkdir()
    (here / "precious" / "file").write_text("mine")


@bad("train good.yaml --output precious", "has files in it; add --overwrite")
def output_with_files(here: Path) -> None:
    output_that_is_no_run(here)


@bad("merge --output precious", "has files in it; add --overwrite")
def merge_over_files(here: Path) -> None:
    output_that_is_no_run(here)


@bad("eval --tasks boolq --data data --output rows.json", "a file stands there")
def evaluation_over_a_file(here: Path) -> None:
    pass


@bad("eval", "latest: no run yet in this directory")
def last_run_that_is_gone(here: Path) -> None:
    shutil.rmtree(here / "runs" / "done")
    (here / "runs" / "latest").unlink()
    (here / "runs" / "latest").symlink_to("nowhere")


# --- secrets ---

TOKEN = "hf_0123456789abcdefghijABCDEFGHIJ"


@bad("eval --model https://me:hunter2@example.com/a/b", "https://***@example.com/a/b")
def password_in_an_address(here: Path) -> None:
    pass


@bad(f"train good.yaml base.model={TOKEN}", "argument 'base.model=***'")
def token_as_a_model(here: Path) -> None:
    pass


@bad(
    "eval --adapter correct-horse-battery", "***: not an adapter", HF_TOKEN="correct-horse-battery"
)
def token_as_an_adapter(here: Path) -> None:
    pass


# --- task files of one's own ---

OWN = "eval --model model --tasks mine.yaml"


def own_task(here: Path, **keys: Any) -> None:
    """Write a task's file over ``rows.json`` with these keys."""
    (here / "mine.yaml").write_text(json.dumps({"rows": "rows.json", "judge": "exact"} | keys))


@bad(OWN, "mine.yaml:1: judge: 'exakt' is not one of choice, pattern, exact")
def task_with_a_judge_that_is_none(here: Path) -> None:
    own_task(here, judge="exakt")


@bad(OWN, "mine.yaml:1: pattern: judge exact has no use for it; it belongs to pattern")
def task_with_a_key_of_another_judge(here: Path) -> None:
    own_task(here, pattern="a")


@bad(OWN, "mine.yaml:1: pattern: '(a' is not a regular expression: missing ), unterminated")
def task_with_half_a_pattern(here: Path) -> None:
    own_task(here, judge="pattern", pattern="(a")


@bad(
    OWN,
    "rows.json: row 1: no column 'frage'; its columns are 'instruction', 'input', 'output', "
    "'answer'",
)
def task_with_a_column_that_is_not_there(here: Path) -> None:
    own_task(here, question="frage")


@bad(OWN, "rows.json: row 1: no column 'instructions'; its columns are 'instruction',")
def task_with_a_place_for_nothing(here: Path) -> None:
    own_task(here, template="Q: {instructions}")


@bad(OWN, "rows.json: row 1: its answer 'true' is not among the choices 'yes', 'no'")
def task_whose_answer_is_no_choice(here: Path) -> None:
    own_task(here, judge="choice", choices=["yes", "no"])


@bad(OWN, "none.json: no rows in it")
def task_without_rows(here: Path) -> None:
    own_task(here, rows="none.json")
    (here / "none.json").write_text("[]")


@bad(OWN, "rows.json: row 1: its answer 'true' has no number in it")
def task_of_numbers_without_one(here: Path) -> None:
    own_task(here, judge="number")


@bad("eval --model model --tasks boolq,mein.yaml", "no such task file (did you mean 'mine.yaml'?)")
def task_file_that_is_not_there(here: Path) -> None:
    own_task(here)


@bad("eval --model model --tasks mine.yaml --protocol lm-eval", "its own tasks, not mine.yaml")
@bad(
    "eval --model model --tasks boolq,gsm8k --protocol lm-eval", "gsm8k is lm_eval's, boolq is not"
)
def task_of_ones_own_for_the_harness(here: Path) -> None:
    own_task(here)


@bad(
    "train good.yaml 'evaluation.tasks=[boolq, mein.yaml]'", "evaluation.tasks: mein.yaml: no such"
)
def recipe_with_a_task_file_that_is_not_there(here: Path) -> None:
    own_task(here)


@bad("train good.yaml 'evaluation.tasks=[mine.yaml]'", "rows.json: row 1: no column 'frage'")
def recipe_whose_task_has_wrong_rows(here: Path) -> None:
    own_task(here, question="frage")


ROWS = "generate --rows asked.jsonl --output answers.jsonl --model model"


def asked(here: Path, **row: Any) -> None:
    """Write ``asked.jsonl``, one row that is answered."""
    (here / "asked.jsonl").write_text(json.dumps(row))


@bad(ROWS, "asked.jsonl: line 1: has a key 'generated', as its answer would be called: rename it")
def asked_row_with_the_answers_key(here: Path) -> None:
    asked(here, prompt="Why?", generated="So.")


@bad(ROWS, "line 1: can be asked as prompt and completion and as instruction and output; leave one")
def asked_row_of_two_shapes(here: Path) -> None:
    asked(here, prompt="Why?", instruction="Why?")


@bad(ROWS, "asked.jsonl: line 1: a text asks nothing; what asks is a prompt, say")
def asked_text(here: Path) -> None:
    asked(here, text="all of it")


@bad(ROWS, "line 1: its only message is the assistant's, so nothing is asked")
def asked_conversation_that_asks_nothing(here: Path) -> None:
    asked(here, messages=[{"role": "assistant", "content": "So."}])


@bad(ROWS, "line 1: none of the shapes that are read (messages; conversations; prompt and")
def asked_row_of_no_shape(here: Path) -> None:
    asked(here, quesiton="Why?")


@bad(ROWS, "line 1: the prompt has 1,523 tokens, the model's context is 1,024")
def asked_row_too_long(here: Path) -> None:
    asked(here, prompt="y" * 1500)


@bad(
    f"{ROWS} --prompt-style alpaca", "line 1: a conversation cannot be asked in the style 'alpaca'"
)
def asked_conversation_in_alpaca(here: Path) -> None:
    asked(here, messages=[{"role": "user", "content": "Why?"}])


@bad(ROWS, "asked.jsonl: cannot be read: No such file or directory (did you mean 'asket.jsonl'?)")
def asked_file_that_is_not_there(here: Path) -> None:
    (here / "asket.jsonl").write_text("{}")


@bad(ROWS, "answers.jsonl: is there already; add --overwrite to replace it")
def answers_that_are_there(here: Path) -> None:
    asked(here, prompt="Why?")
    (here / "answers.jsonl").write_text("{}")


@bad(ROWS.replace("answers.jsonl", "rows.json/answers.jsonl"), "rows.json is not a folder")
def answers_below_a_file(here: Path) -> None:
    asked(here, prompt="Why?")


@bad(
    ROWS.replace("answers.jsonl", "answers.csv"), "a JSON object a line is written; name it .jsonl"
)
def answers_as_a_table(here: Path) -> None:
    asked(here, prompt="Why?")


@bad(
    "generate --rows asked.jsonl --model model", "--rows: name the file to write, --output answers"
)
def answers_without_a_place(here: Path) -> None:
    asked(here, prompt="Why?")


@bad(
    "generate --rows held-out --output a.jsonl --model model", "model is not of a run, which would"
)
@bad(f"{ROWS} --temperature 1", "--rows takes the likeliest tokens, without --temperature; --lines")
@bad(f"{ROWS} --input x", "--rows and --input exclude each other: a row has its own input")
@bad(f"{ROWS} --lines", "--rows and --lines exclude each other")
@bad(f"{ROWS} hi", "--rows and a prompt exclude each other")
@bad("generate hi --limit 3", "--limit: is of --rows FILE, which is not there")
@bad("generate --lines --compare", "--lines --compare: two answers are no line; add --json")
def asked_together(here: Path) -> None:
    asked(here, prompt="Why?")


@bad("chat --continue", "--continue: no conversation with model + runs/done/adapter so far")
def chat_that_never_was(here: Path) -> None:
    pass


@bad(
    "generate --rows held-out", "the rows of runs/done have changed since, so that which were held"
)
def held_out_rows_that_have_changed(here: Path) -> None:
    (here / "rows.json").write_text((here / "rows.json").read_text() + " ")


def study(here: Path, **changes: Any) -> None:
    """Write ``study.yaml``, which is right but for the changes."""
    told: dict[str, Any] = {
        "recipe": "good.yaml",
        "common": {"data": {"held_out": "rows.json"}},
        "variants": {"san": {"rates": [1e-3, 1e-2]}, "lora": {"method": {"name": "lora"}}},
        "baseline": "lora",
        "seeds": [1, 2],
    }
    (here / "study.yaml").write_text(json.dumps(told | changes, indent=1))


STUDY = "study study.yaml"


@bad(STUDY, "study.yaml:10: variants.san.rates: one rate is no choice: give two or more")
def study_with_one_rate(here: Path) -> None:
    study(here, variants={"san": {"rates": [1e-3]}, "lora": {}})


@bad(STUDY, "seeds: a seed is there twice: 1, 2, 1")
def study_with_a_seed_twice(here: Path) -> None:
    study(here, seeds=[1, 2, 1])


@bad(STUDY, "baseline: 'lore' is none of the variants san, lora (did you mean 'lora'?)")
def study_with_another_baseline(here: Path) -> None:
    study(here, baseline="lore")


@bad(STUDY, "study.yaml:2: recepie: unknown key (did you mean 'recipe'?)")
def study_with_an_unknown_key(here: Path) -> None:
    study(here)
    text = (here / "study.yaml").read_text()
    (here / "study.yaml").write_text(text.replace('"recipe"', '"recepie"'))


@bad(
    STUDY, "variants.lora: argument 'method.rnk=3': method.rnk: unknown key (did you mean 'rank'?)"
)
def study_with_a_wrong_key_in_a_variant(here: Path) -> None:
    study(here, variants={"san": {}, "lora": {"method": {"name": "lora", "rnk": 3}}})


@bad(STUDY, "variants.veri: method.config.peft_type: 'VERI' is not one of")
def study_with_an_unknown_tuner(here: Path) -> None:
    veri = {"method": {"name": "peft", "config": {"peft_type": "VERI"}}}
    study(here, variants={"lora": {"method": {"name": "lora"}}, "veri": veri})


@bad(STUDY, "data.held_out: a seed would take other rows out (4), and rates are chosen by them")
def study_whose_held_out_rows_are_drawn(here: Path) -> None:
    study(here, common={"data": {"held_out": 4}})


@bad(STUDY, "god.yaml: no such recipe (did you mean 'good.yaml'?)")
def study_of_a_recipe_that_is_not_there(here: Path) -> None:
    study(here, recipe="god.yaml")


@bad("study studie.yaml", "studie.yaml: no such file (did you mean 'study.yaml'?)")
def study_that_is_not_there(here: Path) -> None:
    study(here)


@bad("study good.yaml", "good.yaml:1: base: unknown key")
def study_that_is_a_recipe(here: Path) -> None:
    study(here)


@bad("study study.yaml --plan --output rows.json", "rows.json: a file stands there")
def study_into_a_file(here: Path) -> None:
    study(here)


# --- an adapter that training goes on from ---


def without_method(here: Path) -> None:
    """Write ``on.yaml``: the recipe without its method."""
    recipe = yaml.safe_load((here / "good.yaml").read_text())
    del recipe["method"]
    (here / "on.yaml").write_text(yaml.safe_dump(recipe))


@bad("train on.yaml", "on.yaml: method: missing")
@bad("train on.yaml base.adapter=nowhere", "base.adapter: nowhere: not an adapter: no adapter_con")
@bad(
    "train on.yaml base.adapter=model", "base.adapter: model: a model, not an adapter: to train it"
)
def an_adapter_to_go_on_from(here: Path) -> None:
    without_method(here)


@bad("train on.yaml base.adapter=runs/done base.model=wide", "was trained on another base")
def an_adapter_of_another_base(here: Path) -> None:
    without_method(here)
    save_tiny(here / "wide", hidden_size=64, head_dim=16)


@bad(
    "train good.yaml base.adapter=runs/done method.mode=neuron", "method.mode: 'neuron', but runs/"
)
@bad(
    "train good.yaml training.patience=2 data.held_out=0", "training.patience: there are no held-o"
)
@bad(
    "train good.yaml training.rate_floor=0.1", "rate_floor: only of schedule cosine and warmup_sta"
)
@bad("generate hi --system x --run runs/done", "--system: prompt style alpaca has no place for one")
@bad(
    "generate --rows rows.json --output a.jsonl --system x", "--rows and --system exclude each oth"
)
def learning_that_does_not_go_together(here: Path) -> None:
    pass
