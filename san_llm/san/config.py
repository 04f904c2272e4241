"""SanConfig: the options of a SAN adapter, as PEFT saves them in ``adapter_config.json``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from san_llm.files import write_text
from san_llm.san.options import HOW_TO_LOAD, Options, options_of

CARD = """\
# A SAN adapter

PEFT does not bring SAN along: without the first line it ends with `KeyError: 'SAN'`.
`pip install san-llm`, then:

```python
import san_llm  # makes SAN known to PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THE BASE")
model = PeftModel.from_pretrained(model, "THIS FOLDER")
```
"""


def _extend_peft_type() -> None:
    # PeftType is a closed enum, and PEFT's registry takes only its members.
    if "SAN" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "SAN")
    member._name_ = member._value_ = "SAN"
    PeftType._member_map_["SAN"] = PeftType._value2member_map_["SAN"] = member
    PeftType._member_names_.append("SAN")
    type.__setattr__(PeftType, "SAN", member)


_extend_peft_type()


@dataclass
class SanConfig(PeftConfig):
    """The options of a SAN adapter (arXiv:2409.06706).

    Every target Linear computes ``y = gamma * (W @ (s * x) + b) + beta`` where ``gamma`` (d_out,)
    is trained and ``s`` (d_in,) is the gamma of the Linear that feeds it.

    Attributes:
        target_modules: Names of the projections to adapt, such as the seven of a LLaMA block; or
            one regular expression over full module names. None or ``"all-linear"``: all of the
            model's, which are then listed here.
        carrier: What holds the neuron scale. ``scale``: a vector of its own; ``lora``, ``dora``:
            the row norms of a low-rank adapted weight, see ``san.formulas``.
        mode: ``both`` (the paper's method), ``neuron`` (features only) or ``synapse`` (the scale
            acts only through the columns of the next projection).
        shift: Also train a neuron shift beta (d_out,), starting at 0.
        links: The kinds of propagation to switch on: ``attention``, ``mlp``, ``residual``; or the
            word ``free``, which switches all off and lets every target train an s of its own.
        adapt_embedding: Also train a scale on the token embedding's features; it feeds q, k and v
            of the first block.
        wiring: Who feeds whom: ``carried`` from one block to the next, as in a LLaMA, or as in the
            ``authors``' code for ViT, see ``san.measured.as_authors``, with ``adapt_embedding``.
        train_norms: Also train the norms of the adapted blocks and those outside of all blocks, the
            last one among them: what is added to their weights and biases, saved as vectors.
        modules_to_save: Names of modules to train and save whole beside the adapter, as in PEFT.
        r: Rank of the ``lora`` and ``dora`` carriers.
        lora_alpha: Their numerator: the low-rank product counts ``lora_alpha / r``.
        lora_dropout: Dropout on the input of their low-rank path.
        form: How it is computed, never what. ``lean``: in about the memory of the frozen base, see
            ``san.lean``; ``plain``: as the formula stands.
        graph: The propagation graph that was measured, of a model that no table knows; filled in
            when the model is adapted, and saved, so that the adapter means the same for ever.
        table: The rows of a family's table, likewise.
        how_to_load: For whoever opens the saved file: what PEFT needs to load it. Always the same.

    Raises:
        InputError: on an unknown option, naming the known ones.
    """

    target_modules: list[str] | str | None = field(default=None)
    carrier: str = field(default=Options.carrier)
    mode: str = field(default=Options.mode)
    shift: bool = field(default=Options.shift)
    links: tuple[str, ...] | list[str] | str = field(default=Options.links)
    adapt_embedding: bool = field(default=Options.adapt_embedding)
    wiring: str = field(default=Options.wiring)
    train_norms: bool = field(default=Options.train_norms)
    modules_to_save: list[str] | None = field(default=None)
    r: int = field(default=Options.rank)
    lora_alpha: float = field(default=Options.alpha)
    lora_dropout: float = field(default=Options.dropout)
    form: str = field(default=Options.form)
    graph: dict[str, Any] | None = field(default=None)
    table: dict[str, Any] | None = field(default=None)
    how_to_load: str = field(default=HOW_TO_LOAD)

    # The names of those that ``train_norms`` trains, of the model that is adapted; never saved.
    norms: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check every option and set PEFT's type."""
        super().__post_init__()
        self.peft_type = PeftType["SAN"]
        options = options_of(self)
        targets = options.target_modules
        self.target_modules = list(targets) if isinstance(targets, tuple) else targets
        self.adapt_embedding = options.adapt_embedding
        self.links = options.links if options.free else list(options.kinds)
        self.how_to_load = HOW_TO_LOAD

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the options, and say in the folder's card how the adapter is loaded.

        PEFT has written its own card before, which does not.
        """
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "README.md"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if "import san_llm" not in text:
            head = re.match(r"---\n.*?\n---\n+", text, re.DOTALL)
            end = head.end() if head else 0
            write_text(path, f"{text[:end]}{CARD}\n{text[end:]}".rstrip() + "\n")
