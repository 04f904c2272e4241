"""A recipe: one YAML file that says what is trained, how, on what, and how it is judged.

The schema is strict and frozen; a recipe is data, never code. Reading one imports no torch, so a
misspelt key costs a tenth of a second, not a model load. All mistakes are reported at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from san_llm.data.prompts import PromptStyle
from san_llm.data.tasks import TASKS, find_tasks
from san_llm.errors import InputError, did_you_mean, masked, nearest_file, not_one_of
from san_llm.san.graph import KINDS, TARGETS, check_combination, check_targets

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Kind = Literal["attention", "mlp", "residual"]
PathInProject = tuple[str | int, ...]
_Name = Annotated[str, Field(min_length=1)]
# No run has more of them: what is larger is a slip, and would be counted up to.
MOST, MOST_RANKS = 10**9, 2**16
LONGEST = 256 * 2**10  # bytes of a recipe: what YAML's parser reads in a second


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Base(_Section):
    """The frozen model that is tuned."""

    model: str = Field(
        min_length=1,
        description="a directory, a .gguf file, a name known to `san-llm download`, or a hub id",
    )
    revision: _Name | None = Field(default=None, description="branch, tag or commit of a hub id")
    dtype: DType = Field(
        default="bfloat16", description="dtype of the weights; with 4 or 8 bits, of the arithmetic"
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None,
        description="load the base in 4 or 8 bits; a checkpoint that is in them already needs none",
    )
    quant_type: Literal["nf4", "fp4"] | None = Field(
        default=None, description="the 16 numbers that 4 bits stand for: nf4 unless told otherwise"
    )
    double_quant: bool | None = Field(
        default=None, description="4bit: quantize the scales of its blocks, too; true unless told"
    )
    trust_remote_code: bool = Field(
        default=False, description="let the model's repository run its own code"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_qlora(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("quantization") == "4bit":
            # QLoRA's defaults (arXiv:2305.14314).
            usual = {"quant_type": "nf4", "double_quant": True}
            return value | {k: v for k, v in usual.items() if value.get(k) is None}
        return value

    @model_validator(mode="after")
    def _only_4_bits_have_kinds(self) -> Base:
        for key in ("quant_type", "double_quant"):
            if self.quantization != "4bit" and getattr(self, key) is not None:
                raise ValueError(f"{key}: only quantization 4bit has one")
        return self


class _Targets(_Section):
    name: str  # first, so that a printed recipe begins with it
    target_modules: tuple[str, ...] = Field(
        default=TARGETS, min_length=1, description="the projections that are adapted, by name"
    )

    @field_validator("target_modules")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_targets(value)
        return value


class SanMethod(_Targets):
    """SAN: one neuron scale per output channel, carried into the next projection's columns."""

    name: Literal["san"]
    carrier: Literal["scale", "lora", "dora"] = Field(
        default="scale", description="what holds the neuron scale: a vector, or a low-rank weight"
    )
    mode: Literal["both", "neuron", "synapse"] = Field(
        default="both",
        description="where the scale acts: on a channel's features, on the weights that read them, "
        "or on both, as in the paper",
    )
    shift: bool = Field(
        default=False, description="train a shift of each channel, too; only a Llama can merge it"
    )
    links: tuple[Kind, ...] = Field(
        default=KINDS,
        description="where scales are carried on: attention (v to o), mlp (up to down), residual "
        "(o to gate and up; down to the next block's q, k and v)",
    )
    adapt_embedding: bool = Field(
        default=False,
        description="train a scale of the embedding's channels, too; block 0's q, k and v carry it",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        le=MOST_RANKS,
        description="of the lora and dora carriers, 32 unless told; the scale carrier has none",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="likewise, 64 unless told: the low-rank product counts alpha / rank",
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="likewise, 0.05 unless told: the share of inputs that the low-rank path drops",
    )
    form: Literal["lean", "plain"] = Field(
        default="lean", description="how it is computed, never what: in little memory, or as told"
    )

    @model_validator(mode="before")
    @classmethod
    def _low_rank_defaults(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("carrier") in ("lora", "dora"):
            filled = {
                key: _LowRank.model_fields[key].default for key in ("rank", "alpha", "dropout")
            }
            return value | {k: v for k, v in filled.items() if value.get(k) is None}
        return value

    @model_validator(mode="after")
    def _trains_something(self) -> SanMethod:
        check_combination(self.carrier, self.mode, self.shift, self.links)
        if self.carrier == "scale":
            for key in ("rank", "alpha", "dropout"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: the scale carrier has none; lora and dora do")
        return self


class _LowRank(_Targets):
    rank: int = Field(default=32, ge=1, le=MOST_RANKS, description="rows of A, columns of B")
    alpha: float = Field(
        default=64.0, gt=0, le=1e6, description="the low-rank product counts alpha / rank"
    )
    dropout: float = Field(
        default=0.05, ge=0, lt=1, description="the share of inputs that the low-rank path drops"
    )


class LoraMethod(_LowRank):
    """LoRA (Hu et al. 2021) through PEFT; the defaults are those of LLM-Adapters and DoRA."""

    name: Literal["lora"]


class DoraMethod(_LowRank):
    """DoRA (Liu et al. 2024) through PEFT."""

    name: Literal["dora"]


class Ia3Method(_Targets):
    """IA3 (Liu et al. 2022) through PEFT: k, v and down, as PEFT's own default for LLaMA."""

    name: Literal["ia3"]
    target_modules: tuple[str, ...] = Field(
        default=("k_proj", "v_proj", "down_proj"),
        min_length=1,
        description="the projections that are scaled, by name",
    )
    feedforward_modules: tuple[str, ...] = Field(
        default=("down_proj",), description="those of them whose input is scaled, not their output"
    )


Method = Annotated[SanMethod | LoraMethod | DoraMethod | Ia3Method, Field(discriminator="name")]


class Data(_Section):
    """What is learned from."""

    train: _Name | Annotated[tuple[_Name, ...], Field(min_length=1)] = Field(
        description="'pocket', or one or more JSON / JSONL files"
    )
    held_out: _Name | int = Field(
        default=120,
        description="rows taken out of the training rows, or a file, to choose the best checkpoint",
    )
    prompt: PromptStyle = Field(
        default="llm-adapters",
        description="the text around a row: LLM-Adapters' (aligned: asked as trained), Alpaca's "
        "or the model's own chat template",
    )
    loss: Literal["response", "all"] = Field(
        description="which tokens are learned: the response's and its end token, or all of the text"
    )
    cutoff: int = Field(
        default=256,
        ge=8,
        le=2**24,
        description="tokens a row may have, prompt included; what is longer loses its end",
    )
    limit: int | None = Field(default=None, ge=1, le=MOST, description="use the first rows only")
    workers: int = Field(default=4, ge=1, le=1024, description="more than 1 tokenizes on threads")

    @field_validator("held_out")
    @classmethod
    def _held_out_rows(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 0:
            raise ValueError("expected 0 rows or more, or a file")
        return value


class Training(_Section):
    """How it is learned."""

    epochs: float = Field(
        default=3.0, gt=0, le=1_000_000, description="passes over the rows; 0.5 is half of one"
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=MOST, description="stop here, whatever the epochs"
    )
    batch_size: int = Field(
        default=16, ge=1, le=2**16, description="rows an optimizer step sees, over all processes"
    )
    micro_batch_size: int = Field(
        default=4,
        ge=1,
        le=2**16,
        description="rows a process computes at once at most; changes no result but dropout's dice",
    )
    learning_rate: float = Field(
        gt=0,
        lt=1,
        description="AdamW's, at the end of the warmup; scales take 1e-3 to 5e-3 where matrices "
        "take 2e-4",
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear",
        description="the rate after the warmup: linear and cosine fall to 0 by the end, "
        "constant_with_warmup stays",
    )
    warmup_steps: int = Field(
        default=100, ge=0, le=MOST, description="optimizer steps in which the rate rises from 0"
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="AdamW's pull of what is trained towards 0; for scales, which start at 1, 0",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="a longer gradient of a batch is cut to this length"
    )
    evaluate_every: int = Field(
        default=80,
        ge=1,
        le=MOST,
        description="steps between checkpoints, each judged by held-out loss",
    )
    save_minutes: float = Field(
        default=5.0, gt=0, le=MOST, description="save a checkpoint at least this often, too"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, le=10_000, description="the last ones; the best is kept besides"
    )
    bad_batches: Literal["stop", "skip"] = Field(
        default="stop", description="a batch whose loss explodes: ends the run, or is left out"
    )
    packing: bool = Field(
        default=True,
        description="rows without padding, what they begin alike encoded once; never changes a "
        "result",
    )
    report_to: tuple[Tracker, ...] = Field(default=(), description="trackers that get the log, too")
    sample_prompts: tuple[_Name, ...] = Field(
        default=(), description="asked while it learns; the answers are in the log"
    )
    sample_every: int | None = Field(
        default=None, ge=1, le=MOST, description="steps between them; default: evaluate_every"
    )
    sample_tokens: int = Field(default=32, ge=1, le=2**16, description="of an answer, at most")
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations twice, to keep fewer"
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="of the order of rows, the held-out rows, low-rank starts and dropout",
    )


class Evaluation(_Section):
    """How the result is judged."""

    tasks: tuple[str, ...] = Field(
        default=tuple(TASKS), min_length=1, description="which of the eight are asked, in order"
    )
    data: _Name = Field(
        default="pocket", description="'pocket', or a directory with <task>/test.json"
    )
    prompt: PromptStyle | None = Field(
        default=None, description="the text around a question; default: data.prompt"
    )
    limit: int | None = Field(
        default=None, ge=1, le=MOST, description="ask the first rows of each task only"
    )

    @field_validator("tasks")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(task.name for task in find_tasks(value))


class Recipe(_Section):
    """All of a run. ``name`` is the file's stem unless the file says otherwise."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base
    method: Method
    data: Data
    training: Training
    evaluation: Evaluation = Evaluation()

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML: every key with the value that is used."""
        return yaml.dump(
            self.model_dump(mode="json"),
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=100,
        )


# Keys that do not change what a run comes to, so that one may go on with other values of them.
HARMLESS = (
    *("name", "evaluation", "method.form", "data.workers"),
    *("training.micro_batch_size", "training.gradient_checkpointing", "training.save_minutes"),
    *("training.keep_checkpoints", "training.bad_batches", "training.packing"),
    *("training.report_to", "training.sample_prompts", "training.sample_every"),
    "training.sample_tokens",
)


def harmful_changes(before: Recipe, after: Recipe) -> list[str]:
    """Return ``key: old -> new`` for the differences that would make another run of it."""
    one, two = leaves(before.model_dump(mode="json")), leaves(after.model_dump(mode="json"))
    return [
        f"{key}: {one.get(key)!r} -> {two.get(key)!r}"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in HARMLESS)
    ]


def leaves(value: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested sections as one, by dotted keys."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= leaves(item, f"{above}{key}.") if isinstance(item, dict) else {above + key: item}
    return found


# Asked after YAML's own resolver of whole numbers, which it would match, too.
_NUMBER = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, reading ``1e-4`` as the number that it is in YAML 1.2 and in Python.

    Anchors, aliases, merge keys and tags are refused: a recipe says everything where it stands, and
    a short file cannot unfold into a long one.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise yaml.MarkedYAMLError(
                problem=f"{sign}{event.anchor}: a recipe has no anchors and aliases",
                problem_mark=event.start_mark,
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"{event.tag}: a recipe has no tags", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


# A date is text to a recipe, and "<<" a key like any other.
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rsplit(":", 1)[1] not in ("timestamp", "merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(*_NUMBER)


class _Dumper(yaml.SafeDumper):
    """Writes what any YAML loader reads alike: what one would take for a number gets quotes."""


_Dumper.add_implicit_resolver(*_NUMBER)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Outside double quotes a control character such as U+0085 would come back as a line break.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


@dataclass
class _Source:
    """Where each key of a recipe was written: a line of the file or an argument."""

    file: str
    lines: dict[PathInProject, int] = field(default_factory=dict)
    arguments: dict[PathInProject, str] = field(default_factory=dict)

    def of(self, path: PathInProject) -> str:
        """Return ``file:line`` or the argument that set ``path`` or the nearest key above it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.arguments:
                return f"argument {self.arguments[path[:end]]!r}"
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return self.file


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: The YAML file.
        overrides: ``key=value`` arguments such as ``training.learning_rate=1e-3``; the value is
            read as YAML.

    Raises:
        InputError: with one line for each mistake: where, what was found, what would be right.
    """
    return parse_recipe(_text_of(path), str(path), overrides)


def given_keys(path: Path, overrides: Sequence[str] = ()) -> set[str]:
    """Return the dotted keys that a recipe's file or arguments give; all others are defaults."""
    return set(leaves(_raw(_text_of(path), _Source(str(path)), overrides)))


def micro_batch(training: Training, processes: int) -> int:
    """Return how many rows a process computes at once: a divisor of its share of a batch.

    Raises:
        InputError: when the processes cannot share a batch evenly.
    """
    share, rest = divmod(training.batch_size, processes)
    if rest:
        raise InputError(
            f"training.batch_size: {training.batch_size} is not a multiple of {processes} processes"
        )
    limit = min(training.micro_batch_size, share)
    return next(size for size in range(limit, 0, -1) if share % size == 0)


def check_held_out(held_out: int, rows: int) -> None:
    """Refuse to take more of the training rows out than leave one.

    Raises:
        InputError: naming how many there may be.
    """
    if held_out >= rows:
        raise InputError(
            f"data.held_out: {held_out} of {rows} rows leave none to train on; "
            f"expected 0 to {rows - 1}, or a file"
        )


def section_keys() -> dict[str, list[str]]:
    """Return the keys of each section of a recipe; the method's are those of all methods."""
    methods = {"method": get_args(get_args(Method)[0])}
    return {
        name: list(
            dict.fromkeys(
                key for model in methods.get(name, (info.annotation,)) for key in model.model_fields
            )
        )
        for name, info in Recipe.model_fields.items()
        if name != "name"
    }


def _text_of(path: Path) -> str:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: a pipe or a device; expected a recipe, a YAML file")
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST + 1)
        if len(raw) > LONGEST:
            raise InputError(f"{path}: more than {LONGEST // 2**10} KiB; a recipe is a small file")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: byte {error.start} is not valid") from None


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as text; ``file`` names it in messages. See :func:`load_recipe`."""
    source = _Source(file)
    raw = _raw(text, source, overrides)
    _check_texts(raw, (), source)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).lstrip("._-").rstrip("-")
    raw.setdefault("name", stem or "recipe")
    try:
        # JSON has lists where the schema has tuples; YAML likewise, so validate as JSON does.
        return Recipe.model_validate(_tuples(raw))
    except ValidationError as errors:
        lines = [
            _explain(error, raw, source)
            for error in errors.errors()
            # A list whose items are wrong also counts as too short: said by the items already.
            if not (error["type"] == "too_short" and error["input"])
        ]
        # A value that may be of two kinds gives one error for each.
        raise InputError("\n".join(dict.fromkeys(lines))) from None


def _raw(text: str, source: _Source, overrides: Sequence[str]) -> dict[str, Any]:
    raw = _parse_yaml(text, source)
    if not isinstance(raw, dict):
        raise InputError(
            f"{source.file}: expected a mapping with the sections "
            f"{', '.join(name for name in Recipe.model_fields if name != 'name')}"
            f"{'; rows belong in data.train of a recipe' if isinstance(raw, list) else ''}"
        )
    # The method's name first: it decides which other keys there are.
    for argument in sorted(overrides, key=lambda text: not text.startswith("method.name=")):
        _override(raw, argument, source)
    return raw


def _check_texts(value: Any, path: PathInProject, source: _Source) -> None:
    """Refuse texts that must not be shown or kept: a recipe is printed, and goes into its run."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key, (*path, key), source)
            _check_texts(item, (*path, key), source)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_texts(item, (*path, index), source)
    elif isinstance(value, str):
        where = f"{source.of(path)}: {_dotted(path)}"
        if any(unicodedata.category(c) == "Cc" for c in value):
            raise InputError(f"{where}: has a control character in {value!r}")
        if masked(value) != value:
            raise InputError(
                f"{where}: a password or a token has no place in a recipe; set HF_TOKEN, or sign "
                "in with `hf auth login`"
            )


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _parse_yaml(text: str, source: _Source) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{source.file}: the file is empty")
        _record_lines(node, (), source)
        return loader.construct_document(node)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{source.file}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source.file}: not valid YAML: {_first_line(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "Exceeds the limit" in str(error):  # Python's word on 4,300 digits
        return "a number of too many digits"
    return str(error).splitlines()[0]


def _record_lines(node: yaml.Node, path: PathInProject, source: _Source) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                found = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise InputError(
                    f"{source.file}:{line}: {_dotted((*path, found or 'null'))}: a key must be "
                    "text; write it in quotes"
                )
            name = str(key.value)
            if (*path, name) in source.lines:
                first = source.lines[(*path, name)]
                raise InputError(
                    f"{source.file}:{line}: {_dotted((*path, name))}: given twice, first in "
                    f"line {first}"
                )
            source.lines[(*path, name)] = line
            _record_lines(value, (*path, name), source)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            source.lines[(*path, index)] = item.start_mark.line + 1
            _record_lines(item, (*path, index), source)


def _override(raw: dict[str, Any], argument: str, source: _Source) -> None:
    key, equals, text = argument.partition("=")
    names = tuple(key.split("."))
    if not equals or not all(names):
        raise InputError(
            f"argument {argument!r}: expected key=value, such as training.learning_rate=1e-3"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise InputError(f"argument {argument!r}: the value is not valid YAML: {problem}") from None
    if node is not None:
        _record_lines(node, names, _Source(f"argument {argument!r}"))  # refuses a key given twice
    section = raw
    for depth, name in enumerate(names[:-1], start=1):
        if name not in section:
            section[name] = {}
            source.arguments[names[:depth]] = argument
        below = section[name]
        if not isinstance(below, dict):
            raise InputError(f"argument {argument!r}: {name!r} is a value, not a section")
        section = below
    if names[0] == "method" and names[-1] == "name" and section.get("name") != value:
        # Another method has other options: those written for the old one would all be unknown.
        section.clear()
    section[names[-1]] = value
    source.arguments[names] = argument
    for path in [path for path in source.lines if path[: len(names)] == names]:
        del source.lines[path]  # what stood in the file is no longer what is read


def _dotted(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _strip(location: tuple[int | str, ...], raw: Any, missing: bool) -> PathInProject:
    """Drop what pydantic adds to a location: the tag of a union's member is not in the file."""
    path: list[str | int] = []
    value = raw
    for index, part in enumerate(location):
        inside = isinstance(value, Mapping) and part in value
        listed = isinstance(value, (list, tuple)) and isinstance(part, int)
        absent = missing and index == len(location) - 1
        if not (inside or listed or absent):
            continue
        path.append(part)
        value = value[part] if inside or (listed and int(part) < len(value)) else None
    return tuple(path)


def _fields(path: PathInProject, raw: Mapping[str, Any]) -> list[str]:
    """Return the keys that the schema knows beside ``path``'s last one."""
    model: Any = Recipe
    for part in path[:-1]:
        if part == "method":
            name = raw["method"].get("name") if isinstance(raw.get("method"), Mapping) else None
            members = get_args(get_args(Method)[0])
            named = [m for m in members if m.model_fields["name"].annotation == Literal[name]]
            model = named[0] if named else SanMethod
        else:
            model = model.model_fields[part].annotation
    return list(model.model_fields)


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text",
    "string_unicode": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "too_short": "at least one",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "string_pattern_mismatch": "letters, digits, '.', '_', '-', the first a letter or digit",
}
# Where a value may be of two kinds.
_EITHER: dict[PathInProject, str] = {
    ("data", "train"): "'pocket', a file or a list of files",
    ("data", "held_out"): "a number of rows or a file",
}


def _explain(error: Any, raw: dict[str, Any], source: _Source) -> str:
    kind, context = error["type"], error.get("ctx", {})
    path = _strip(error["loc"], raw, missing=kind == "missing")
    if kind.startswith("union_tag"):
        path = ("method", "name")
    where, key, found = source.of(path), _dotted(path), _listed(error["input"])
    if kind == "extra_forbidden":
        known = _fields(path, raw)
        name = str(path[-1])
        others = next(
            (
                f" (it belongs to {section!r})"
                for section, info in Recipe.model_fields.items()
                if name in getattr(info.annotation, "model_fields", {})
            ),
            "",
        )
        hint = did_you_mean(name, known) or others or f": known here are {', '.join(known)}"
        return f"{where}: {key}: unknown key{hint}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{where}: {key}: missing"
    if kind == "union_tag_invalid":
        names = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        found = _listed(raw["method"]["name"])
        return f"{where}: {key}: {not_one_of(found, names)}"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        return f"{where}: {key}: {not_one_of(found, names)}"
    if kind == "value_error":
        message = str(context["error"])
        return f"{where}: {key}: {message}" if key else f"{where}: {message}"
    shown = "nothing" if found is None else repr(found)
    expected = _EITHER.get(path) or _EXPECTED.get(kind)
    if expected:
        quoted = kind == "string_type" and type(found) in (int, float)
        hint = "; write it in quotes" if quoted and path not in _EITHER else ""
        return f"{where}: {key}: expected {expected}, found {shown}{hint}"
    return f"{where}: {key}: {error['msg'][0].lower()}{error['msg'][1:]}, found {shown}"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


SHIPPED = next(
    folder
    for folder in (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes")
    if folder.is_dir() or folder.parent != Path(__file__).parent
)


SCHEMA = "recipe.schema.json"  # beside the shipped recipes, whose comment for editors names it


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, for editors; :func:`load_recipe` says more."""
    schema = Recipe.model_json_schema()
    schema["required"].remove("name")  # the file's stem, where it says none
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(text: str) -> Path:
    """Return the file of a recipe given as a path, or as the name of a shipped one.

    Raises:
        InputError: naming the nearest shipped recipe.
    """
    path = Path(text)
    if path.is_dir():
        hint = "; a run goes on with --resume" if (path / "recipe.yaml").is_file() else ""
        raise InputError(f"{text}: a directory; expected a recipe, a YAML file{hint}")
    if path.exists():
        return path
    shipped = shipped_recipes()
    # `recipes/NAME.yaml` works outside a clone, too.
    name = path.stem if path.suffix in ("", ".yaml") and path.parent.name in ("", "recipes") else ""
    if name in shipped:
        return shipped[name]
    near = nearest_file(path) if path.suffix or len(path.parts) > 1 else ""
    raise InputError(
        f"{text}: no such recipe{near or did_you_mean(path.stem, shipped)}; "
        f"shipped are {', '.join(shipped)}"
    )


def hardware(path: Path) -> str:
    """Return what a recipe's first comment says of the hardware and time that it needs."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("# Hardware:").strip() if first.startswith("# Hardware:") else ""
