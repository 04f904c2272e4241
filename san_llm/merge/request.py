"""What a merge was asked, and all of it checked before anything is written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from san_llm.architectures.decoders import FAMILIES
from san_llm.errors import InputError, check_one_of
from san_llm.export.gguf import KINDS, check_exportable
from san_llm.files import read_json, refuse_files
from san_llm.merge.whole import WholeTask
from san_llm.models.adapter import Adapter, open_adapter
from san_llm.models.agree import check_base
from san_llm.models.hub import check_push
from san_llm.models.locate import Bits, FoundBase, config_here, find_base, stored_bits
from san_llm.models.subject import Subject, find_subject, told_last_run
from san_llm.models.tokenizer import tokenizer_folder
from san_llm.models.weights import DTYPES, read_weights
from san_llm.recipe.schema import Base

SHARD_SIZE = 5 * 10**9  # bytes; as transformers' files had for years
QUANTIZED = ("dequantize", "keep")


@dataclass(frozen=True)
class MergeRequest:
    """What a merge is asked for.

    Attributes:
        subject: An adapter, of any method that PEFT can merge, and its base.
        output: The folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the one the base is stored in,
            bfloat16 for a dequantized one. Of a model in 4 bits, what is not.
        overwrite: Replace what is in ``output``.
        verified: Compare with base + adapter before the folder gets its name: whole, or with None
            as much as costs next to nothing (``merge.checked``).
        shard_size: Bytes that one file of weights may hold; None: ``SHARD_SIZE``, or of a measured
            model what one file of its base does.
        quantized: None merges into the full-precision base. ``dequantize`` merges into the numbers
            that the base had when it was quantized in training, ``keep`` leaves those in 4 bits.
        gguf: Write ``model.gguf`` beside the weights, as ``f16``, ``bf16`` or ``q8_0``.
        push_to: The hub id to upload the folder to, when it is whole.
        private: Whether a repository that is made for it is seen by its owner alone.
    """

    subject: Subject
    output: Path
    dtype: str | None = None
    overwrite: bool = False
    verified: bool | None = None
    shard_size: int | None = None
    quantized: str | None = None
    gguf: str | None = None
    push_to: str | None = None
    private: bool = False


@dataclass(frozen=True)
class MergeTask:
    """A request that can be carried out.

    Attributes:
        request: What was asked.
        adapter: The adapter.
        found: The base to merge into, with the quantization that is merged over, if any.
        dtype: The dtype of the merged weights.
        trained: The base as it was in training, where that was quantized and this one is not.
        trained_over: In which bits the base was in training, or None.
    """

    request: MergeRequest
    adapter: Adapter
    found: FoundBase
    dtype: str
    trained: Base | None
    trained_over: Bits | None


def merge_request(
    model: str | None,
    adapter: Path | None,
    output: Path | None,
    run: Path | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    verified: bool | None = None,
    shard_size: int | None = None,
    quantized: str | None = None,
    gguf: str | None = None,
    push_to: str | None = None,
    private: bool = False,
) -> MergeRequest:
    """Return the request that a command's options make.

    Args:
        model: The base; default: the one that the adapter names.
        adapter: The adapter's folder, or its run's; default: the last run's.
        output: Default: ``merged/`` in the run's folder.
        run: Instead of ``adapter``: a run's folder, or an adapter's.
        dtype: As in :class:`MergeRequest`, like all that follow.
        overwrite: As in :class:`MergeRequest`.
        verified: As in :class:`MergeRequest`.
        shard_size: As in :class:`MergeRequest`.
        quantized: As in :class:`MergeRequest`.
        gguf: As in :class:`MergeRequest`.
        push_to: As in :class:`MergeRequest`.
        private: As in :class:`MergeRequest`.

    Raises:
        InputError: when an option cannot be followed, there is no such adapter, or no place to
            save.
    """
    check_values(dtype, quantized, gguf, push_to, private)
    if adapter is None and run is None:
        run = told_last_run()
    subject = find_subject(model, adapter, run=run)
    if output is None:
        if subject.run is None:
            named = adapter or run
            raise InputError(f"{named}: not in a run's folder; say where to save with --output")
        output = subject.run / "merged"
    return MergeRequest(
        *(subject, output, dtype, overwrite, verified, shard_size),
        *(quantized, gguf, push_to, private),
    )


def check_values(
    dtype: str | None, quantized: str | None, gguf: str | None, push_to: str | None, private: bool
) -> None:
    """Refuse options that no adapter and base could follow.

    Raises:
        InputError: naming the option.
    """
    for option, value, known in (
        ("--dtype", dtype, DTYPES),
        ("--quantized", quantized, QUANTIZED),
        ("--gguf", gguf, KINDS),
    ):
        if value is not None:
            check_one_of(option, value, known)
    if private and push_to is None:
        raise InputError("--private: says how to --push, which is not asked for")


def check_whole(request: MergeRequest) -> WholeTask:
    """Return a request for a model that was trained whole; refuse what cannot be done with it.

    Raises:
        InputError: when an option cannot be followed, or a file cannot be read.
    """
    check_values(request.dtype, request.quantized, request.gguf, request.push_to, request.private)
    if request.quantized is not None:
        raise InputError("--quantized: the run trained every weight, over a base that was not")
    if request.verified:
        raise InputError(
            "--verify: the run trained every weight, so its model is copied: there is no base + "
            "adapter to compare it with"
        )
    refuse_files(request.output, request.overwrite)
    if request.push_to is not None:
        check_push(request.push_to)
    found = find_base(request.subject.base)
    check_base(found)
    if request.gguf is not None:
        check_exportable(found.folder, found.config)
    return WholeTask(
        found, request.dtype or request.subject.base.dtype, request.shard_size or SHARD_SIZE
    )


def check_request(request: MergeRequest) -> MergeTask:
    """Return a request with its adapter and base looked up; refuse what cannot be merged.

    Raises:
        InputError: when the adapter or base cannot be read, or do not go together as asked.
    """
    subject, quantized = request.subject, request.quantized
    check_values(request.dtype, quantized, request.gguf, request.push_to, request.private)
    if subject.adapter is None:
        raise InputError("there is no adapter to merge")
    refuse_files(request.output, request.overwrite)
    if request.push_to is not None:
        check_push(request.push_to)
    adapter = open_adapter(subject.adapter)
    if quantized == "keep" and adapter.measured:
        raise InputError(
            "--quantized keep: needs to know which norm each Linear reads, which is known of "
            f"{', '.join(FAMILIES)} alone: use --quantized dequantize"
        )
    if quantized == "keep" and adapter.method != "SAN":
        raise InputError(
            f"{adapter.folder}: a {adapter.method} adapter changes weights within their 4-bit "
            "blocks; only SAN's scales can keep them: use --quantized dequantize"
        )
    if adapter.method != "SAN":
        from san_llm.merge.peft import check_biases, check_mergeable

        check_mergeable(adapter)
    found = find_base(subject.base)
    if adapter.method != "SAN":
        check_biases(adapter, found)
    check_base(found)
    if tokenizer_folder(found.folder, adapter.folder) == adapter.folder:
        from san_llm.models.tokenizer import load_tokenizer

        load_tokenizer(found, adapter.folder)  # refuses one that knows more than the embedding
    if "auto_map" in found.config:
        raise InputError(f"{found.base.model}: its config needs code of its own: not a stock model")
    if request.verified and adapter.measured:
        _check_answers(found)
    trained = subject.recipe.base if subject.recipe else subject.base
    trained_over = found.bits or _trained_bits(trained)
    if quantized is not None:
        found = as_trained(found, trained)
        if quantized == "keep" and trained_over == "8bit":
            raise InputError(
                f"{found.base.model}: only weights in 4 bits can be kept, these are in 8: use "
                "--quantized dequantize"
            )
    elif found.bits:
        raise InputError(
            f"{found.base.model}: a quantized checkpoint has no full-precision weights; name the "
            "model that it was made from, or say how to merge over this one: --quantized "
            "dequantize or --quantized keep"
        )
    if request.gguf is not None:
        _check_gguf(quantized, found, adapter)
    elsewhere = trained if quantized is None and trained_over else None
    streamed = quantized is None and adapter.method == "SAN" and adapter.measured
    dtype = _dtype(request, found, _stored(found) if streamed else None)
    return MergeTask(request, adapter, found, dtype, elsewhere, trained_over)


def _check_answers(found: FoundBase) -> None:
    """Refuse to compare answers of a model that goes on from no text."""
    from san_llm.models.load import load_config

    try:
        load_config(found)
    except InputError as error:
        raise InputError(f"--verify: compares what models answer to texts: {error}") from error


def as_trained(found: FoundBase, trained: Base) -> FoundBase:
    """Return a base with the quantization that an adapter was trained over.

    Args:
        found: The base to merge into.
        trained: The one in the recipe of the adapter's run.

    Raises:
        InputError: when nothing says that there was one.
    """
    base = found.base
    if found.bits is not None:
        return replace(found, base=base.model_copy(update={"quantization": None}))
    if trained.quantization is None:
        raise InputError(
            f"{base.model}: not quantized, and the adapter's run did not quantize it: merge "
            "without --quantized, or name the quantized base with --model"
        )
    update = {"model": base.model, "revision": base.revision}
    return replace(found, base=trained.model_copy(update=update))


def _trained_bits(trained: Base) -> Bits | None:
    """Return in which bits a base was trained over; one that is not here any more in none."""
    if trained.quantization is not None:
        return trained.quantization
    config = config_here(trained)
    return None if config is None else stored_bits(trained.model, read_json(config))


def _check_gguf(quantized: str | None, found: FoundBase, adapter: Adapter) -> None:
    if quantized == "keep":
        raise InputError("--gguf: 4-bit weights of bitsandbytes are not written; dequantize")
    check_exportable(tokenizer_folder(found.folder, adapter.folder), found.config)
    if adapter.options.get("shift"):
        raise InputError("--gguf: a shift merges into biases, which readers pass over")


def _stored(found: FoundBase) -> str | None:
    """Return the dtype of most of a base's numbers."""
    sizes: Counter[str] = Counter()
    for tensor in read_weights(found.folder):
        sizes[tensor.dtype] += tensor.size
    most = max(sizes, key=lambda kind: sizes[kind], default=None)
    return next((name for name, kind in DTYPES.items() if kind == most), None)


def _dtype(request: MergeRequest, found: FoundBase, stored: str | None) -> str:
    own = stored or found.config.get("dtype") or found.config.get("torch_dtype") or "float32"
    if own == "float64":  # read, but not written: half of its places are no training's
        own = "float32"
    if request.quantized == "keep" and found.base.quantization is not None:
        own = found.base.dtype  # its codes are those of weights in this dtype
    dtype = request.dtype or ("bfloat16" if request.quantized == "dequantize" else own)
    if dtype not in DTYPES:
        raise InputError(f"{found.base.model}: is stored as {dtype}; say which --dtype to save")
    return str(dtype)
