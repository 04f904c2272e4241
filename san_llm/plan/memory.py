"""How much memory a training step takes on each device, from a base's config alone.

What is counted is what the step allocates: the weights as they are stored, what autograd keeps of
every block (tensor by tensor, as ``san.lean`` and PEFT's layers leave it), the chunk of logits that
``ops.head_loss`` works on, and what a block's backward pass needs for itself. The sum for a CPU is
held against measured peaks (``benchmarks/plan.py``); the one for a GPU is computed by the same
terms and was not measured. Bytes everywhere; "tokens" are those of one micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from san_llm.architectures.decoders import DOWN, PARENTS, O
from san_llm.architectures.sizes import Shape
from san_llm.launch.malloc import spares_memory
from san_llm.recipe.schema import (
    AdapterMethod,
    DoraMethod,
    DType,
    Ia3Method,
    PeftMethod,
    SanMethod,
)
from san_llm.san.graph import PropagationGraph, propagation_graph

Device = Literal["cpu", "cuda"]
WIDE = 4  # bytes of a number in fp32
BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGITS_AT_ONCE = 2**24  # numbers, as in san_llm.ops.head_loss, which a test compares
ADAM = 2 * WIDE  # AdamW's two moments of a number
# A number of full fine-tuning in mixed precision keeps an fp32 copy and two moments besides itself
# and its gradient (ZeRO, arXiv:1910.02054, section 3.1).
FULL_OPTIMIZER = 12
# Python, the libraries and a trainer before the first weight, measured once on Linux (x86-64) with
# a base of a few thousand numbers; and what a CUDA context with its libraries takes, which was not.
RUNTIME: dict[Device, int] = {"cpu": 640_000_000, "cuda": 600_000_000}
# What malloc's holes come to, of what autograd keeps of tokens: 0.2 to 0.6 were measured. A run
# that spares memory has none (``launch.malloc``).
HOLES = 0.38


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the model sees it.

    Attributes:
        tokens: Tokens of all rows; what packed rows share counts once.
        learned: Tokens that the loss looks at.
        longest: Tokens of the longest row.
        packed: Whether rows lie behind one another, without padding.
        masked: Whether attention has a mask of rows x tokens: padded rows of different lengths do.
    """

    tokens: int
    learned: int
    longest: int
    packed: bool
    masked: bool


def full_batch(rows: int, length: int, packed: bool) -> Batch:
    """Return the largest micro-batch there can be: rows of ``length`` that share nothing."""
    # The last token of a packed row is only predicted.
    seen = length - 1 if packed else length
    tokens = rows * seen
    return Batch(tokens, rows * (length - 1), seen, packed, masked=not packed)


@dataclass(frozen=True)
class Measured:
    """What one of PEFT's tuners comes to on a base (``plan.measured``).

    Attributes:
        trained: Trained numbers by kind of module, over all blocks.
        added: Bytes of all that it adds to the base, what is frozen of it included.
        fixed: Bytes that autograd keeps of a block, whatever the tokens.
        per_token: And a token.
    """

    trained: dict[str, int]
    added: int
    fixed: int
    per_token: float


@dataclass(frozen=True)
class Faked:
    """What a method comes to on a base that no table knows (``plan.faked``).

    Attributes:
        trained: Trained numbers by kind of module, over all blocks.
        added: Bytes of all that it adds to the base.
        kept: Bytes that autograd keeps of all blocks.
        largest: Numbers of the largest Linear of a block.
        rows: Rows of all blocks' Linears.
    """

    trained: dict[str, int]
    added: int
    kept: int
    largest: int
    rows: int


@dataclass(frozen=True)
class Setting:
    """All that the memory of a step depends on.

    Attributes:
        shape: The base's sizes.
        dtype: The dtype of the weights, or of the arithmetic over a quantized base.
        bits: ``4bit``, ``8bit`` or None.
        double_quant: Whether 4 bits' scales are quantized, too.
        method: The recipe's method, or None for full fine-tuning.
        batch: The largest micro-batch.
        checkpointing: Whether activations are computed twice.
        device: The kind of device it runs on.
        devices: How many devices.
        sharded: Whether the base is spread over them (FSDP2).
        measured: What the method comes to, if it is one of PEFT's other tuners.
        faked: What it comes to, if no table knows the base.
    """

    shape: Shape
    dtype: DType
    bits: Literal["4bit", "8bit"] | None
    double_quant: bool
    method: AdapterMethod | None
    batch: Batch
    checkpointing: bool
    device: Device
    devices: int = 1
    sharded: bool = False
    measured: Measured | None = None
    faked: Faked | None = None

    @property
    def trained(self) -> dict[str, int]:
        """Numbers that are trained in each kind of module, over all blocks."""
        if self.faked is not None:
            return self.faked.trained
        if self.measured is not None:
            return self.measured.trained
        if self.method is not None:
            return trained_numbers(self.shape, self.method)
        shape = self.shape
        linears = {name: shape.blocks * math.prod(shape.linears[name]) for name in shape.linears}
        return linears | {"all else": shape.other_numbers}

    @property
    def width(self) -> int:
        """Bytes of a feature."""
        return BYTES[self.dtype]


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a step; ``total`` is their sum.

    Attributes:
        runtime: Python and libraries, or a GPU's context.
        weights: The base, or a device's share of it.
        adapter: What is trained besides the base.
        gradients: The gradients of what is trained.
        optimizer: AdamW's state.
        activations: What autograd keeps from the forward pass.
        logits: What the loss works on.
        work: What is used for a moment by a block's backward pass, beyond what the loss had; and
            weights that are gathered or dequantized.
        holes: What malloc leaves unused between tensors.
        cache: Keys and values of earlier tokens: none while a model trains.
    """

    runtime: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    work: int
    holes: int
    cache: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        kept = self.runtime + self.weights + self.adapter + self.gradients + self.optimizer
        used = self.activations + self.logits + self.work + self.holes
        return kept + used + self.cache


def memory(setting: Setting) -> Memory:
    """Return what a step of a setting takes at its peak, on each device."""
    shape, batch, width = setting.shape, setting.batch, setting.width
    weights, gathered = _weights(setting)
    if setting.method is None:
        trained = shape.linear_numbers + shape.other_numbers
        share = setting.devices if setting.sharded else 1
        adapter, gradients = 0, trained * width // share
        optimizer = trained * (FULL_OPTIMIZER if width < WIDE else ADAM) // share
    else:
        trained = sum(setting.trained.values())
        adapter = gradients = trained * WIDE
        beside = setting.faked or setting.measured
        if beside is not None:
            adapter = beside.added
        optimizer = trained * ADAM
    if setting.devices > 1 and not (setting.sharded and setting.method is None):
        gradients *= 2  # DDP's buckets are copies of them
    block = _kept_by_block(setting)
    stream = batch.tokens * shape.hidden * width
    kept = shape.blocks * (stream if setting.checkpointing else block)
    # The last norm keeps its input and gives an output, in both widths where there are two.
    kept += batch.tokens * shape.hidden * (WIDE + width)
    holes = 0.0
    if setting.device == "cpu" and not spares_memory(setting.checkpointing, setting.bits):
        holes = HOLES * (kept - shape.blocks * _kept_of_weights(setting))
    logits = _loss(setting)
    work = _backward(setting) + (block if setting.checkpointing else 0)
    return Memory(
        runtime=RUNTIME[setting.device],
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        logits=logits,
        work=gathered + max(0, work - logits),
        holes=round(holes),
    )


def traffic(setting: Setting, micro_batches: int = 1) -> int:
    """Return the bytes that each device sends in an optimizer step, and as many that it receives.

    By rings, as ZeRO counts them (arXiv:1910.02054, sections 7.1 and 7.2): of n bytes on N devices
    an all-gather and a reduce-scatter send ``n (N - 1) / N`` each, an all-reduce both. FSDP2
    gathers embedding and head once, and each block twice, for its forward and its backward pass;
    gradients are exchanged once a step, whatever it accumulates.

    Args:
        setting: The step.
        micro_batches: Those that each device accumulates in a step.
    """
    shape, width = setting.shape, setting.width
    whole = (shape.linear_numbers + shape.other_numbers) * width
    if setting.method is None:
        exchanged = whole if setting.sharded else 2 * whole
    else:
        exchanged = 2 * sum(setting.trained.values()) * WIDE
    if setting.sharded:
        once = shape.other_numbers * width
        exchanged += micro_batches * (2 * shape.linear_numbers * width + once)
    return exchanged * (setting.devices - 1) // setting.devices


def trained_numbers(shape: Shape, method: AdapterMethod) -> dict[str, int]:
    """Return how many numbers a method trains in each kind of module, over all blocks.

    Of PEFT's other tuners that is measured.
    """
    counts: dict[str, int] = {}
    if isinstance(method, PeftMethod):
        return counts
    if isinstance(method, SanMethod):
        graph = graph_of(shape, method)
        for node in graph:
            name = node.name.rsplit(".", 1)[-1]
            counts[name] = counts.get(name, 0) + node.trained
        if graph.norms:
            counts["norms"] = sum(norm.trained for norm in graph.norms)
        return counts
    for name in _targets(shape, method):
        d_out, d_in = shape.linears[name]
        if isinstance(method, Ia3Method):
            each = d_in if name in method.feedforward_modules else d_out
        else:
            each = method.rank * (d_out + d_in) + (d_out if method.name == "dora" else 0)
        counts[name] = shape.blocks * each
    return counts


def graph_of(shape: Shape, method: SanMethod) -> PropagationGraph:
    """Return who feeds whom when a method adapts a base of this shape."""
    return propagation_graph(shape.config, method.options)


def _targets(shape: Shape, method: AdapterMethod) -> list[str]:
    names = method.targets(shape.config["model_type"]) or []
    return [name for name in shape.linears if name in names]


def _weights(setting: Setting) -> tuple[int, int]:
    """Return a device's bytes of the base, and those that are gathered for a moment."""
    shape, width = setting.shape, setting.width
    other_bytes = shape.other_numbers * width
    if setting.bits == "4bit" and setting.method is not None:
        # A scale for 64 numbers; doubly quantized it is a byte, with one of fp32 for 256 of them.
        scales = 1 / 64 + WIDE / (64 * 256) if setting.double_quant else WIDE / 64
        # A Linear's weight is widened for its product, there and back.
        sizes = (d_out * d_in for d_out, d_in in shape.linears.values())
        largest = setting.faked.largest if setting.faked else max(sizes)
        return round(shape.linear_numbers * (0.5 + scales)) + other_bytes, largest * width
    if setting.bits == "8bit" and setting.method is not None:
        rows = shape.blocks * sum(d_out for d_out, _ in shape.linears.values())
        rows = setting.faked.rows if setting.faked else rows
        return shape.linear_numbers + rows * WIDE + other_bytes, 0
    whole = shape.linear_numbers * width + other_bytes
    if not setting.sharded:
        return whole, 0
    # The block at work and the next one; and the head, from the loss until its backward pass.
    head = shape.vocabulary * shape.hidden * width
    return whole // setting.devices, 2 * shape.linear_numbers * width // shape.blocks + head


def _kept_by_block(setting: Setting) -> int:
    """Return what autograd keeps of a block between the passes.

    ``wide`` and ``low`` are numbers a token, in fp32 and in the features' dtype.
    """
    shape, batch, method, width = setting.shape, setting.batch, setting.method, setting.width
    if setting.faked is not None:
        return setting.faked.kept // shape.blocks
    hidden, inner, q, kv = shape.hidden, shape.inner, shape.q, shape.kv
    targets = [] if method is None else _targets(shape, method)
    read = sum(shape.linears[name][1] for name in targets)
    written = sum(shape.linears[name][0] for name in targets)
    noise = wide = 0
    # A plain norm widens its input, and keeps that.
    wide, low = 2 * hidden, 3 * inner
    if method is None:
        low += 2 * hidden + 2 * hidden + inner  # the inputs of all Linears, norms unscaled
    elif isinstance(method, SanMethod):
        rows = method.mode != "synapse"
        linked = () if method.mode == "neuron" else method.options.kinds
        lean = method.form == "lean"
        low = (2 if lean and not method.shift else 6) * inner
        if "residual" in linked and lean:
            wide, low = 2, low + 2 * hidden
        elif "residual" in linked or method.options.free:
            low += 2 * hidden  # the norm's output, scaled by products of its readers' own
        if method.train_norms and not ("residual" in linked and lean):
            low += 2 * hidden  # for the gradient of a norm's own weight
        if method.carrier == "scale" and rows:
            folded = lean and "attention" in linked and not method.shift
            low += q + kv + 2 * hidden + (0 if folded else kv)
        if method.carrier != "scale":
            rank = method.rank or 0
            wide += rank * len(targets)
            wide += _inputs(setting, read, targets, bool(method.dropout))
            noise = read * width if method.dropout else 0
            low += q + kv + 2 * hidden if method.carrier == "dora" else 0
    elif isinstance(method, Ia3Method):
        low += sum(
            shape.linears[name][0] for name in targets if name not in method.feedforward_modules
        )
        wide += sum(
            shape.linears[name][1] for name in targets if name in method.feedforward_modules
        )
    elif not isinstance(method, PeftMethod):
        wide += method.rank * len(targets)
        wide += _inputs(setting, read, targets, bool(method.dropout))
        noise = read * WIDE if method.dropout else 0
        if method.name == "dora":
            wide += 2 * written if method.dropout or width == WIDE else written
            low += 0 if method.dropout or width == WIDE else written
    if setting.device == "cuda":
        noise = read if noise else 0  # a byte says what was dropped
    per_token = wide * WIDE + low * width + noise
    if setting.measured is not None:
        per_token += round(setting.measured.per_token)
    # Queries and output, whose sums are wide. Keys and values are shared by a group's query heads,
    # but under a mask SDPA is given a copy for each.
    per_token += 2 * q * width + shape.heads * WIDE + 2 * width * (q if batch.masked else kv)
    if batch.masked:
        per_token += batch.longest * width
    return per_token * batch.tokens + _kept_of_weights(setting)


def _kept_of_weights(setting: Setting) -> int:
    """Return the part of what is kept of a block that does not depend on tokens."""
    if setting.faked is not None:
        return 0
    if setting.measured is not None:
        return setting.measured.fixed
    shape, method = setting.shape, setting.method
    each = [] if method is None else [shape.linears[name] for name in _targets(shape, method)]
    if isinstance(method, SanMethod) and method.carrier == "lora":
        # The norms of rows keep their products.
        written = sum(d_out for d_out, _ in each)
        return (2 * written + 4 * shape.hidden) * (method.rank or 0) * WIDE
    if isinstance(method, DoraMethod):
        # PEFT multiplies B A by an identity matrix, and keeps that.
        numbers = sum(d_in * (d_in + method.rank) for _, d_in in each)
        if setting.width < WIDE and method.dropout:
            numbers += sum(d_out * d_in for d_out, d_in in each)
        return numbers * WIDE
    return 0


def _inputs(setting: Setting, read: int, targets: list[str], dropout: bool) -> int:
    """Return the numbers a token that low-rank matrices keep of what they read."""
    shape = setting.shape
    if dropout or setting.width < WIDE:
        return read  # a copy for each, dropped from or widened
    together: dict[str, int] = {}
    for name in targets:  # readers of one norm share its output
        if name != O:  # attention keeps what it gives
            group = name if name == DOWN else PARENTS[name]
            together[group] = shape.linears[name][1]
    return sum(together.values())


def _loss(setting: Setting) -> int:
    """Return what the output head takes at its peak."""
    shape, batch, width = setting.shape, setting.batch, setting.width
    numbers = batch.learned * shape.vocabulary
    hidden = 2 * batch.learned * shape.hidden * width  # what is chosen, and its gradient
    if setting.method is None:
        # A head that learns keeps all logits: as they come, wide, as log-probabilities, and their
        # gradient.
        return numbers * (3 * WIDE + (width if width < WIDE else 0)) + hidden
    chunk = min(numbers, LOGITS_AT_ONCE)
    return chunk * (WIDE + (width if width < WIDE else 0)) + hidden  # wide, and as they come


def _backward(setting: Setting) -> int:
    """Return what a block's backward pass takes at its peak, beside what was kept."""
    shape, batch, width, method = setting.shape, setting.batch, setting.width, setting.method
    # The gradients of the stream, of the MLP's features, of gate and of up.
    low, wide = shape.hidden + 3 * shape.inner, 0
    lean = isinstance(method, SanMethod) and method.form == "lean"
    if lean and setting.device == "cuda":
        wide = 6 * shape.inner  # on a GPU all tokens are one block of ops.scale's scratch
    if not isinstance(method, (SanMethod, Ia3Method, type(None))) or (
        isinstance(method, SanMethod) and method.carrier != "scale"
    ):
        wide += 2 * shape.inner  # the gradient of what a low-rank path read, before and after noise
    return batch.tokens * (low * width + wide * WIDE)
