"""A recipe: one YAML file that says what is trained, how, on what, and how it is judged.

The schema is strict and frozen; a recipe is data, never code. Reading one imports no torch, so a
misspelt key costs a tenth of a second, not a model load. All mistakes are reported at once.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from san_llm.architectures.entry import KINDS
from san_llm.architectures.targets import PEFT_FEEDFORWARD, TargetWord, targets_of
from san_llm.errors import InputError, not_one_of
from san_llm.protocol.prompts import PromptStyle
from san_llm.protocol.tasks import TASKS, find_tasks, is_task_file
from san_llm.protocol.template_date import A_DATE
from san_llm.protocol.templates import NAMES as TEMPLATE_NAMES
from san_llm.san.options import FREE, Options, check_links, check_targets

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Kind = Literal["attention", "mlp", "residual"]
# Chosen by the value, so that a wrong kind in a list is not also told to be another word.
_Links = Annotated[
    Annotated[tuple[Kind, ...], Tag("kinds")] | Annotated[Literal["free"], Tag(FREE)],
    Discriminator(lambda links: FREE if links == FREE else "kinds"),
]
_Name = Annotated[str, Field(min_length=1)]
_Path = Annotated[_Name, AfterValidator(os.path.expanduser)]  # no shell has read it
# A list of names, or a word that stands for some.
Targets = Annotated[
    Annotated[tuple[str, ...], Field(min_length=1), Tag("list")]
    | Annotated[TargetWord, Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "list"),
]
_WORDS = "a list of the projections that are adapted, or all (seven), published "
# No run has more of them: what is larger is a slip, and would be counted up to.
MOST, MOST_RANKS = 10**9, 2**16
# What rows are read from.
ROW_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
# Of the steps: enough for AdamW to know its gradients, at any length of a run.
USUAL_WARMUP = 0.1


class Section(BaseModel):
    """What a file of the user's says: strict, frozen, and no key that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Base(Section):
    """The frozen model that is tuned."""

    model: _Path = Field(
        description="a directory, a .gguf file, a name known to `san-llm download`, or a hub id",
    )
    revision: _Name | None = Field(default=None, description="branch, tag or commit of a hub id")
    adapter: _Path | None = Field(
        default=None,
        description="an adapter over it, or its run, that training goes on from; the method is its",
    )
    dtype: DType = Field(
        default="bfloat16",
        description="dtype of the weights; with 4 or 8 bits, of the arithmetic; float16 answers, "
        "but cannot be trained in",
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


class _Targets(Section):
    name: str  # first, so that a printed recipe begins with it
    target_modules: Targets = Field(
        default="all",
        description=f"{_WORDS}(likewise) or peft (likewise)",
    )

    @field_validator("target_modules")
    @classmethod
    def _known(cls, value: tuple[str, ...] | TargetWord) -> tuple[str, ...] | TargetWord:
        if not isinstance(value, str):
            check_targets(value)
        return value

    @property
    def kind(self) -> str:
        """The method's name, to be shown."""
        return self.name

    def targets(self, model_type: str = "llama") -> list[str] | str | None:
        """Return the names of the Linears that are adapted in a model of this family.

        PEFT's word for all of them, or None for its own choice, where the family is not known.

        Raises:
            InputError: when the family has no such choice.
        """
        return targets_of(self.name, self.target_modules, model_type)


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
        default=False,
        description="train a shift of each channel, too; only a Llama, or targets that "
        "have a bias, can merge it",
    )
    links: _Links = Field(
        default=KINDS,
        description="where scales are carried on: attention (v to o), mlp (up to down), residual "
        "(o to gate and up; down to the next block's q, k and v); free: nowhere, every target "
        "trains column scales of its own",
    )
    adapt_embedding: bool = Field(
        default=False,
        description="train a scale of the embedding's channels, too; block 0's q, k and v carry it",
    )
    wiring: Literal["carried", "authors"] = Field(
        default="carried",
        description="who feeds whom: as carried over from one block to the next, or as in the "
        "authors' code for ViT, whose patches feed q, k and v of every block",
    )
    train_norms: bool = Field(
        default=False,
        description="train the norms' weights and biases, too: of the blocks and behind them",
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

    @field_validator("links", mode="before")
    @classmethod
    def _kinds_or_free(cls, value: Any) -> Any:
        check_links(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _low_rank_defaults(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("carrier") in ("lora", "dora"):
            filled = {
                key: _LowRank.model_fields[key].default for key in ("rank", "alpha", "dropout")
            }
            return value | {k: v for k, v in filled.items() if value.get(k) is None}
        return value

    @property
    def options(self) -> Options:
        """The method's options as the tuner takes them.

        Raises:
            InputError: where they do not go together.
        """
        low_rank = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        given = {name: value for name, value in low_rank.items() if value is not None}
        return Options(
            # Each of the words stands for all of them.
            target_modules=None if isinstance(self.target_modules, str) else self.target_modules,
            carrier=self.carrier,
            mode=self.mode,
            shift=self.shift,
            links=self.links,
            adapt_embedding=self.adapt_embedding,
            wiring=self.wiring,
            train_norms=self.train_norms,
            form=self.form,
            **given,  # type: ignore[arg-type]
        )

    @model_validator(mode="after")
    def _trains_something(self) -> SanMethod:
        for key in ("rank", "alpha", "dropout"):
            if self.carrier == "scale" and getattr(self, key) is not None:
                raise ValueError(f"{key}: the scale carrier has none; lora and dora do")
        _ = self.options  # which refuses what does not go together
        return self


class _LowRank(_Targets):
    target_modules: Targets = Field(
        default="all",
        description=f"{_WORDS}(five: q, k, v, up and down) or peft (PEFT's choice: q and v)",
    )
    rank: int = Field(default=32, ge=1, le=MOST_RANKS, description="rows of A, columns of B")
    alpha: float = Field(
        default=64.0, gt=0, le=1e6, description="the low-rank product counts alpha / rank"
    )
    dropout: float = Field(
        default=0.05, ge=0, lt=1, description="the share of inputs that the low-rank path drops"
    )


class LoraMethod(_LowRank):
    """LoRA (Hu et al. 2021) through PEFT; rank, alpha and dropout as LLM-Adapters has them."""

    name: Literal["lora"]


class DoraMethod(_LowRank):
    """DoRA (Liu et al. 2024) through PEFT; rank, alpha and dropout as published."""

    name: Literal["dora"]


class Ia3Method(_Targets):
    """IA3 (Liu et al. 2022) through PEFT, over all projections' outputs unless told otherwise."""

    name: Literal["ia3"]
    target_modules: Targets = Field(
        default="published",
        description=f"{_WORDS}(seven) or peft (PEFT's choice, of LLaMA k, v and down)",
    )
    feedforward_modules: tuple[str, ...] = Field(
        default=(),
        description="those of them whose input is scaled, not their output; with peft down, "
        "unless told",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_peft(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("target_modules") == "peft":
            return {"feedforward_modules": PEFT_FEEDFORWARD} | value
        return value


class PeftMethod(Section):
    """Any tuner of PEFT that works on a decoder's weights or features, by its name there."""

    name: Literal["peft"]
    config: dict[str, Any] = Field(
        description="peft_type, such as VERA or ROAD, and options of PEFT's config class for it",
    )
    target_modules: Targets | None = Field(
        default=None,
        description="a list of names, or all (seven) or peft (PEFT's choice); default: what "
        "config says, or PEFT",
    )

    @field_validator("config")
    @classmethod
    def _has_a_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        kind = value.get("peft_type")
        if not isinstance(kind, str):
            raise ValueError("expected a peft_type in it, such as peft_type: VERA")
        return {key: _lists(item) for key, item in value.items()} | {"peft_type": kind.upper()}

    @model_validator(mode="after")
    def _targets_once(self) -> PeftMethod:
        if self.target_modules is None:
            return self
        if "target_modules" in self.config:
            raise ValueError("target_modules: given in config, too: take one of them out")
        if self.target_modules == "published":
            raise ValueError(
                "target_modules published: not known of PEFT's tuners; all and peft are"
            )
        return self

    @property
    def kind(self) -> str:
        """The tuner's name, to be shown."""
        return self.peft_type.lower()

    @property
    def peft_type(self) -> str:
        """PEFT's name of the tuner."""
        return str(self.config["peft_type"])

    @property
    def options(self) -> dict[str, Any]:
        """What PEFT's config class is told, but for the tuner's name."""
        return {key: item for key, item in self.config.items() if key != "peft_type"}

    @property
    def dropout(self) -> bool:
        """Whether each row draws at random in training, as far as the options tell."""
        drops = any(key.endswith("dropout") and item for key, item in self.config.items())
        return drops or self.peft_type == "PVERA"

    def targets(self, model_type: str = "llama") -> list[str] | str | None:
        """Return the names of the Linears that are adapted; None where PEFT or config says it."""
        if self.target_modules in (None, "peft"):
            return None
        return targets_of(self.name, self.target_modules, model_type)


class FullMethod(Section):
    """Every weight of the base, in float32; there is no adapter."""

    name: Literal["full"]

    @property
    def kind(self) -> str:
        """The method's name, to be shown."""
        return self.name

    def targets(self, model_type: str = "llama") -> None:
        """Return None: no modules are chosen."""


AdapterMethod = SanMethod | LoraMethod | DoraMethod | Ia3Method | PeftMethod
Method = Annotated[AdapterMethod | FullMethod, Field(discriminator="name")]


class Columns(Section):
    """Which column of a row is which key, where the file names them otherwise."""

    instruction: _Name | None = Field(default=None, description="what is asked")
    input: _Name | None = Field(default=None, description="its context")
    output: _Name | None = Field(default=None, description="the answer to an instruction")
    answer: _Name | None = Field(default=None, description="the label of it")
    prompt: _Name | None = Field(default=None, description="what is asked, beside a completion")
    completion: _Name | None = Field(default=None, description="the answer to a prompt")
    messages: _Name | None = Field(default=None, description="the turns of a conversation")
    conversations: _Name | None = Field(default=None, description="ShareGPT's turns")
    text: _Name | None = Field(default=None, description="what is learned whole")
    system: _Name | None = Field(default=None, description="the system prompt")
    history: _Name | None = Field(default=None, description="the turns before an instruction")
    tools: _Name | None = Field(default=None, description="what may be called")

    @property
    def named(self) -> dict[str, str]:
        """The column of each key that has one."""
        return {key: column for key, column in self.model_dump().items() if column is not None}

    @model_validator(mode="after")
    def _some(self) -> Columns:
        if not self.named:
            raise ValueError(
                "names no column; expected such as {prompt: question, completion: reply}"
            )
        return self


class Source(Section):
    """Rows from one place."""

    path: _Path | None = Field(default=None, description="'pocket' or a file")
    hub: _Name | None = Field(default=None, description="the id of a data set on the hub")
    name: _Name | None = Field(default=None, description="its configuration, where it has several")
    split: _Name = Field(default="train", description="its split")
    revision: _Name | None = Field(default=None, description="its branch, tag or commit")
    columns: Columns | None = Field(default=None, description="as data.columns, of this one alone")
    limit: int | None = Field(default=None, ge=1, le=MOST, description="its first rows only")
    weight: float | None = Field(
        default=None,
        ge=0,
        description="its share of the mix, beside the others' weights: the seed draws so many rows "
        "of each that the shares are right and none is there twice",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("expected a path or a hub id, one of them")
        if self.path is not None:
            given = self.model_fields_set & {"name", "split", "revision"}
            if given:
                raise ValueError(
                    f"{min(given)!r} is of a data set on the hub; {self.path} is a file"
                )
        return self

    @property
    def label(self) -> str:
        """What messages call it."""
        if self.path is not None:
            return self.path
        inside = ", ".join(filter(None, (self.name, self.split)))
        return f"{self.hub} [{inside}]"


def source_of(place: str | Source) -> Source:
    """Return a source as a section: of a file's name, ``#500`` at its end takes its first rows."""
    if isinstance(place, Source):
        return place
    path, mark, limit = place.rpartition("#")
    if mark and limit.isdecimal() and int(limit) and not Path(place).exists():
        return Source(path=path, limit=int(limit))
    return Source(path=place)


# A file's name, or a section.
_Place = Annotated[
    Annotated[_Path, Tag("path")] | Annotated[Source, Tag("source")],
    Discriminator(lambda value: "path" if isinstance(value, str) else "source"),
]


class Data(Section):
    """What is learned from."""

    train: Annotated[
        Annotated[_Place, Tag("one")]
        | Annotated[Annotated[tuple[_Place, ...], Field(min_length=1)], Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, (list, tuple)) else "one"),
    ] = Field(
        description="'pocket', a file (JSON, JSONL, CSV, TSV, parquet, arrow; `file#500`: its "
        "first rows), {hub: ID}, or a list of these"
    )
    held_out: _Path | int | float | Annotated[tuple[_Path, ...], Field(min_length=1)] | None = (
        Field(
            default=None,
            description="to choose the best checkpoint: a number of rows taken out of the training "
            "rows, a share of them below 1, a file or several; default: 120, or a tenth of fewer "
            "than 1,200",
        )
    )
    columns: Columns | None = Field(
        default=None, description="which column is which key, as {prompt: Question, completion: A}"
    )
    drop_duplicates: bool = Field(
        default=False, description="leave out rows that say the same as one before"
    )
    learn: Literal["all turns", "last turn"] = Field(
        default="all turns", description="of a conversation: every answer, or the last"
    )
    special_tokens: Literal["tokens", "text"] = Field(
        default="tokens",
        description="what a control token in a row's own words becomes: that token, or its letters",
    )
    prompt: PromptStyle = Field(
        default="llm-adapters",
        description="the text around a row: LLM-Adapters' (aligned: asked as trained), Alpaca's "
        "or the model's own chat template",
    )
    chat_template: _Name | None = Field(
        default=None,
        description="a template for a base that has none, or instead of its own: "
        f"{', '.join(TEMPLATE_NAMES)}, or a .jinja file",
    )
    date: str | None = Field(
        default=None,
        description="what a chat template that writes today's date writes instead, such as "
        f"{A_DATE}; here and wherever the run's adapter is asked",
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

    @field_validator("date")
    @classmethod
    def _date(cls, value: str | None) -> str | None:
        return None if value is None else check_date(value)

    @field_validator("chat_template")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None and value not in TEMPLATE_NAMES and not value.endswith(".jinja"):
            known = (*TEMPLATE_NAMES, "a .jinja file")
            raise ValueError(not_one_of(value, known))
        return None if value is None else os.path.expanduser(value)

    @model_validator(mode="after")
    def _templated(self) -> Data:
        if self.chat_template is not None and self.prompt != "chat":
            raise ValueError(
                f"chat_template: {self.chat_template} does nothing in the prompt style "
                f"{self.prompt}: set data.prompt to chat"
            )
        return self

    @field_validator("held_out")
    @classmethod
    def _held_out_rows(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"a share is more than 0 and less than 1, found {value}")
        if isinstance(value, int) and value < 0:
            raise ValueError("expected 0 rows or more, a share, or a file")
        for file in value if isinstance(value, tuple) else [value]:
            if isinstance(file, str) and Path(file).suffix.lower() not in ROW_FILES:
                share = "; a share is written as 0.1" if file.endswith("%") else ""
                raise ValueError(
                    f"expected a number of rows, a share or a file ({', '.join(ROW_FILES)}), found "
                    f"{file!r}{share}"
                )
        return value

    @field_validator("train")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        places = value if isinstance(value, tuple) else (value,)
        weights = [source_of(place).weight for place in places]
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            raise ValueError(
                f"{len(given)} of {len(weights)} sources have a weight; expected all or none"
            )
        if given and not sum(given):
            raise ValueError("the weights of all sources are 0, so that none is learned from")
        return value

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where the training rows come from, in order, each with its columns."""
        places = self.train if isinstance(self.train, tuple) else (self.train,)
        made = (source_of(place) for place in places)
        return tuple(
            source if source.columns else source.model_copy(update={"columns": self.columns})
            for source in made
        )

    @property
    def held_out_files(self) -> tuple[str, ...]:
        """The files that held-out rows are in; none where they are taken of the training rows."""
        if isinstance(self.held_out, tuple):
            return self.held_out
        return (self.held_out,) if isinstance(self.held_out, str) else ()


class Training(Section):
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
        description="AdamW's, at the end of the warmup; scales take about 2e-3, low-rank matrices "
        "2e-4: ten times that, or a tenth, is a warning",
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup", "warmup_stable_decay"] = Field(
        default="linear",
        description="the rate after the warmup: linear and cosine fall by the end, "
        "constant_with_warmup stays, warmup_stable_decay stays and falls in the last steps",
    )
    rate_floor: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="what the rate falls to, as a share of it; of cosine and warmup_stable_decay, "
        "0 unless told",
    )
    decay_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="in which share of the run's steps, its last, warmup_stable_decay falls, along "
        "a cosine; 0.2 unless told",
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        le=MOST,
        description="optimizer steps in which the rate rises from 0, instead of a share of them",
    )
    warmup_share: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="the same as a share of the run's steps; 0.1 unless one of the two is told",
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
    patience: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="end when so many held-out losses in a row were none below the best",
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

    @model_validator(mode="before")
    @classmethod
    def _usual_warmup(cls, value: Any) -> Any:
        keys = ("warmup_steps", "warmup_share")
        if isinstance(value, dict) and all(value.get(key) is None for key in keys):
            return value | {"warmup_share": USUAL_WARMUP}
        return value

    @model_validator(mode="after")
    def _one_warmup(self) -> Training:
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise ValueError("warmup_steps and warmup_share say the same: take one of them out")
        return self

    @model_validator(mode="after")
    def _falls_so(self) -> Training:
        falling = {
            "rate_floor": ("cosine", "warmup_stable_decay"),
            "decay_share": ("warmup_stable_decay",),
        }
        for key, schedules in falling.items():
            if getattr(self, key) is not None and self.schedule not in schedules:
                raise ValueError(f"{key}: only of schedule {' and '.join(schedules)}")
        if (self.decay_share or 0) + (self.warmup_share or 0) > 1:
            raise ValueError("decay_share and warmup_share are more than all steps together")
        return self


class Evaluation(Section):
    """How the result is judged."""

    tasks: tuple[str, ...] = Field(
        default=tuple(TASKS),
        min_length=1,
        description="which of the eight are asked, in order, and task files of your own",
    )
    data: _Path = Field(
        default="pocket", description="'pocket', or a directory with <task>/test.json"
    )
    prompt: PromptStyle | None = Field(
        default=None, description="the text around a question; default: data.prompt"
    )
    limit: int | None = Field(
        default=None, ge=1, le=MOST, description="ask the first rows of each task only"
    )
    forgetting: bool = Field(
        default=False,
        description="besides, how much less well than its base the model says a neutral text",
    )

    @field_validator("tasks")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = (
            (os.path.expanduser(name),)
            if is_task_file(name)
            else (task.name for task in find_tasks([name]))
            for name in value
        )
        return tuple(dict.fromkeys(chain.from_iterable(names)))


class Recipe(Section):
    """All of a run. ``name`` is the file's stem unless the file says otherwise."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base
    method: Method
    data: Data
    training: Training
    evaluation: Evaluation = Evaluation()


def _lists(value: Any) -> Any:
    """Return a value of YAML as PEFT has it: with lists where a recipe has tuples."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


def as_tuples(value: Any) -> Any:
    """Return a value of YAML or JSON with tuples for its lists, as a recipe has them."""
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def check_date(text: str) -> str:
    """Return a date as ``data.date`` and ``--date`` have it.

    Raises:
        InputError: for what is none.
    """
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        with suppress(ValueError):
            return date.fromisoformat(text).isoformat()
    raise InputError(f"expected a date such as {A_DATE}, found {text!r}")


def leaves(value: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested sections as one, by dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= leaves(item, f"{above}{key}.") if isinstance(item, dict) else {above + key: item}
    return flat


def check_learnable(recipe: Recipe) -> None:
    """Refuse what a base can be asked in, but not trained in.

    Raises:
        InputError: naming the key and what works.
    """
    if recipe.base.dtype == "float16":
        raise InputError(
            "base.dtype float16: gradients of less than 6e-8 would be 0 there without a word (no "
            "loss is scaled up here); use bfloat16, or float32 on a GPU older than Ampere"
        )
    if recipe.method.name == "full" and recipe.base.quantization is not None:
        raise InputError(
            f"base.quantization {recipe.base.quantization}: method full trains the weights "
            "themselves, which 4 or 8 bits cannot hold; leave it out"
        )
    if recipe.method.name == "full" and recipe.base.dtype != "float32":
        raise InputError(
            f"base.dtype {recipe.base.dtype}: method full trains the weights themselves, and of 16 "
            "bits AdamW's small steps change none; set it to float32"
        )


def refuse_bits(bits: str | None, model: str) -> None:
    """Refuse to train the weights of a base that is stored quantized.

    Raises:
        InputError: naming it.
    """
    if bits is not None:
        raise InputError(
            f"base.model: {model} is stored in {bits}: method full trains the weights themselves; "
            "name the model that it was made from"
        )


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
