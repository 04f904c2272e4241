"""What a training needs before its first step: rows as tokens, the adapted model, its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.trainer_utils import set_seed

from san_llm.data.batches import Pack, Pad, pad_id
from san_llm.data.encode import encoding_of
from san_llm.data.ends import turn_end
from san_llm.data.rows import Row
from san_llm.data.shapes import unread_line
from san_llm.data.split import Split, split_held_out, unread_of
from san_llm.data.task_rows import kind_of
from san_llm.data.tokenized import Encoded, Rows, encode_rows, kept_rows, refuse_longer
from san_llm.errors import InputError, SanError
from san_llm.launch.engine import Engine, check_engine, load_weights_only, take_engine
from san_llm.launch.malloc import spares_memory, without_holes
from san_llm.launch.processes import is_first, world_size
from san_llm.models.adapter import add_adapter, load_adapter, trainable_parameters
from san_llm.models.load import load_base
from san_llm.models.locate import FoundBase, find_base
from san_llm.models.rotary import alike_to
from san_llm.models.tokenizer import training_tokenizer
from san_llm.progress import say
from san_llm.recipe.carried_on import adapter_folder, refuse_other_method
from san_llm.recipe.doubts import doubts
from san_llm.recipe.schema import Data, Recipe, micro_batch
from san_llm.recipe.steps import rates_of, steps_of, warmup_of
from san_llm.runs.record import RowKind
from san_llm.train.packed_attention import can_pack, has_dropout, use_packed_attention
from san_llm.train.samples import Samples


@dataclass(frozen=True)
class TokenRows:
    """The rows of a recipe as tokens.

    Attributes:
        train: The rows that are learned from.
        held_out: The rows that judge; None where none are held out.
        sha256: The checksum of each file that they are from.
        names: Returns the rows of ``train`` as they were read, which say where they stand.
        kind: What the rows are.
        system: The system prompt that every row of ``train`` begins with, or None.
        parts: Of each row of ``held_out`` the file or source whose loss is told apart; empty where
            there is one.
    """

    train: Encoded
    held_out: Encoded | None
    sha256: dict[str, str]
    names: Callable[[], list[Row]]
    kind: RowKind
    system: str | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """All that a training begins with, the same in every process.

    Attributes:
        engine: How processes work together.
        found: The base.
        data: The rows.
        tokenizer: The base's tokenizer, with the chat template that rows are written in.
        samples: The prompts that are asked while it learns.
        arguments: What Trainer is told.
        model: The base with its adapter, or the base whose every weight is trained.
        vocabulary: How many tokens the base knows.
        collator: Makes batches of rows: packed, or padded.
        trained_numbers: How many numbers are trained.
        before: The folder of the adapter that training goes on from, if it does.
    """

    engine: Engine
    found: FoundBase
    data: TokenRows
    tokenizer: PreTrainedTokenizerFast
    samples: Samples
    arguments: TrainingArguments
    model: Any
    vocabulary: int
    collator: Pack | Pad
    trained_numbers: int
    before: Path | None = None


def prepare(recipe: Recipe, run: Path, found: FoundBase | None) -> Prepared:
    """Return what a training begins with; the fewest seconds are lost on what is refused.

    Raises:
        InputError: when the data, the base or the number of processes cannot serve.
    """
    engine = take_engine()
    check_engine(engine, recipe)
    if engine == "DeepSpeed":
        load_weights_only()
    micro_batch(recipe.training, world_size())  # before anything is loaded
    found = found or find_base(recipe.base)
    recipe.method.targets(found.config["model_type"])  # refuses what no such model has
    before = adapter_folder(recipe.base.adapter)
    if before is not None:
        refuse_other_method(recipe, before, found.config["model_type"])
    tokenizer = training_tokenizer(recipe, found)
    samples = Samples(recipe, tokenizer)
    data = token_rows(recipe, tokenizer, found)
    arguments = trainer_arguments(recipe, run, data)
    if arguments.use_cpu and spares_memory(
        recipe.training.gradient_checkpointing, found.trained_bits
    ):
        without_holes()
    base = load_base(found, sharded=engine == "FSDP2")
    vocabulary = base.get_input_embeddings().num_embeddings  # which may be adapted, next
    samples.check(base.config)
    set_seed(recipe.training.seed)  # here, so that every method's dice begin alike
    if recipe.method.name == "full":
        model: Any = base.requires_grad_(True)
    elif before is not None:
        model = load_adapter(base, before, trainable=True)
    else:
        model = add_adapter(base, recipe.method)
    collator: Pack | Pad = Pad(pad_id(tokenizer))
    longest = max(max(Rows(rows).lengths) for rows in (data.train, data.held_out) if rows)
    if recipe.training.packing and can_pack(base) and longest <= alike_to(base.config):
        use_packed_attention(base)
        draws = has_dropout(model) or bool(getattr(recipe.method, "dropout", None))
        collator = Pack(share=not draws)
    trained = trainable_parameters(model)
    return Prepared(
        *(engine, found, data, tokenizer, samples, arguments, model, vocabulary, collator, trained),
        before,
    )


def token_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, found: FoundBase) -> TokenRows:
    """Return a recipe's rows as tokens, and tell how many there are.

    Args:
        recipe: What to do.
        tokenizer: The base's tokenizer.
        found: The base.

    Raises:
        InputError: when a file, a row or the tokenizer cannot serve, or a row is too long.
    """
    split = split_held_out(recipe)
    encoding = encoding_of(recipe.data, tokenizer, found.vocabulary)
    train = encode_rows(split.train, encoding)
    held_out = encode_rows(split.held_out, encoding) if split.held_out else None

    refuse_longer(train, split.train, encoding, found.context)
    if held_out:
        refuse_longer(held_out, split.held_out, encoding, found.context)
    if is_first():
        _tell_rows(train, held_out, split, recipe.data)
        if recipe.data.prompt == "chat" and (letters := turn_end(tokenizer).text):
            say(f"  {letters!r} ends a turn in the template, and is no token of this base's")
        for doubt in doubts(recipe, len(train.rows)):
            say(f"warning: {doubt}")
    names = partial(kept_rows, train, split.train, encoding)
    parts: tuple[str, ...] = ()
    if held_out and len(split.parts or split.taken) > 1:
        parts = tuple(map(split.part_of, kept_rows(held_out, split.held_out, encoding)))
    if recipe.training.patience is not None and held_out is None:
        raise InputError("training.patience: there are no held-out rows to wait for")
    kind = kind_of(split.train)
    return TokenRows(train, held_out, split.sha256, names, kind, split.system, parts)


def _tell_rows(train: Encoded, held_out: Encoded | None, split: Split, data: Data) -> None:
    if len(split.taken) > 1:
        for taken in split.taken:
            say(f"  {taken.source}: {taken.taken:,} of {taken.there:,} rows")
    lost = [
        f"{count:,} {what}"
        for count, what in (
            (train.dropped, "dropped (the cutoff cut the whole response away)"),
            (train.cut, "cut short (the cutoff took the response's end)"),
        )
        if count
    ]
    say(
        f"data: {len(train.rows):,} rows, {train.supervised:,} tokens to learn"
        + (f"; {len(held_out.rows):,} held out" if held_out else "")
        + ("; " + ", ".join(lost) if lost else "")
    )
    if unread := unread_of(split.taken):
        say(f"  keys that are not read: {unread_line(unread)}")
    if split.system is not None:
        say("  all begin with one system prompt, which the model will be asked with, too")
    if split.duplicates:
        say(
            f"  {split.duplicates:,} rows say the same as one before; data.drop_duplicates=true "
            "leaves them out"
        )
    if split.twins:
        say(f"  {split.twins:,} held-out rows are training rows, too: their loss says nothing new")
    if train.thoughts:
        say(f"  {train.thoughts:,} turns lose their thinking: the chat template leaves it out")
    if train.controls:
        what = "its letters" if data.special_tokens == "text" else "that token"
        other = "tokens" if data.special_tokens == "text" else "text"
        say(
            f"  {train.controls:,} rows have a control token in their words ({train.control}, "
            f"say), which is learned as {what}: data.special_tokens={other} changes that"
        )


def trainer_arguments(recipe: Recipe, run: Path, data: TokenRows) -> TrainingArguments:
    """Return what Trainer is told: the recipe's ``training``, by its own names."""
    training, judged = recipe.training, data.held_out is not None
    micro = micro_batch(training, world_size())
    steps = steps_of(training, len(data.train.rows))
    schedule, told = rates_of(training, steps)
    # Of one thing the newer name, and that of transformers before 5.23.
    kept = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    arguments = TrainingArguments(
        output_dir=str(run / "checkpoints"),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // (micro * world_size()),
        learning_rate=training.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=told,
        warmup_steps=warmup_of(training, steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        data_seed=training.seed,
        eval_strategy="steps" if judged else "no",
        eval_steps=training.evaluate_every,
        save_strategy="steps",
        save_steps=training.evaluate_every,
        load_best_model_at_end=judged,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(training.report_to) or "none",
        run_name=run.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        **{
            f"{kept}_checkpointing": training.gradient_checkpointing,
            f"{kept}_checkpointing_kwargs": {"use_reentrant": False},
        },
    )
    if arguments.world_size != world_size():
        raise SanError(
            f"the launcher started {world_size()} processes, but Trainer sees "
            f"{arguments.world_size}: they would train apart"
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: one process each, never DataParallel
    return arguments
