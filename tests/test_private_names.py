"""Every private thing of a library that the code relies on, by its name.

A library may change in any release what it does not document. Each such name is in ``TABLE`` with
what it is used for and a small check, so that an upgrade fails here and not in a run. The code is
searched for names with an underscore that are not its own: each must be in the table, and the table
may name nothing that the code does not use.
"""

from __future__ import annotations

import ast
import ctypes
import enum
import functools
import importlib
import inspect
import io
import json
import pickle
import re
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from private_search import Search, is_ours, is_private, names_of, private_parts, resolve
from tiny import tiny_model, tiny_tokenizer

import san_llm
from san_llm.measure.rotation import RENAMES, own_forward

PACKAGE = Path(san_llm.__file__).parent

Check = Callable[[str], None]


@dataclass(frozen=True)
class Private:
    """A name in the table.

    Attributes:
        library: The package that has it.
        name: Its name in the package; the last piece of it stands in the code, or all of it does.
        use: What it is used for.
        check: Called with library and name; raises where the name is not as the code relies on.
    """

    library: str
    name: str
    use: str
    check: Check

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"

    def failure(self) -> str | None:
        """Return what is wrong: in which library, with which name, and what that is used for."""
        try:
            self.check(f"{self.library}.{self.name}")
        except (Exception, pytest.fail.Exception) as error:
            lines = str(error).strip().splitlines() or ["no message"]
            if lines[0].startswith("assert "):  # without words of its own
                lines = [" ".join(" ".join(lines).split())[:300]]
            return (
                f"{self.library} {version_of(self.library)}: {self.name}: {lines[0]} "
                f"({type(error).__name__}). It is used for this: {self.use}"
            )
        return None


def version_of(library: str) -> str:
    if library in ("enum", "os", "importlib", "ctypes"):
        return f"of Python {'.'.join(map(str, sys.version_info[:3]))}"
    return version({"yaml": "PyYAML"}.get(library, library))


# The checks


@functools.cache
def words_of(path: str) -> frozenset[str]:
    """Return the names, ``name.name`` and the texts in the source of a module, class or method."""
    words = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(resolve(path))))):
        match node:
            case ast.Attribute(attr=word, value=ast.Name(id=thing)):
                words |= {word, f"{thing}.{word}"}
            case ast.Attribute(attr=word) | ast.Name(id=word) | ast.Constant(value=str(word)):
                words.add(word)
    return frozenset(words)


def mention(word: str, *places: str) -> None:
    for place in places:
        assert word in words_of(place), f"{place} does not mention {word} any more"


def last(path: str) -> str:
    return path.rpartition(".")[2]


def is_there(path: str) -> None:
    resolve(path)


def is_in(*places: str) -> Check:
    """Return the check that the sources of these modules, classes or methods mention a name."""
    return lambda path: mention(last(path), *places)


def is_of(kind: str) -> Check:
    """Return the check that a class has an attribute, or gives it to itself."""

    def check(path: str) -> None:
        assert last(path) in names_of(resolve(kind)), f"{kind} has no {last(path)} any more"

    return check


def takes(names: str = "", keywords: str = "", for_itself: str = "") -> Check:
    """Return the check of a function's arguments.

    Args:
        names: Its first parameters.
        keywords: Others that it must take; it may ask for no more.
        for_itself: Where the library must go on to call it on ``self``: ours takes its place.
    """
    wanted = names.split()

    def check(path: str) -> None:
        parameters = dict(inspect.signature(resolve(path)).parameters)
        parameters.pop("self", None)
        begins = list(parameters)[: len(wanted)]
        assert begins == wanted, f"it begins with {begins}, and no longer with {wanted}"
        for name in keywords.split():
            assert name in parameters, f"it does not take {name} any more"
        for name in parameters.keys() - {*wanted, *keywords.split()}:
            needed = parameters[name].default is inspect.Parameter.empty
            assert not needed or str(parameters[name]).startswith("*"), f"it needs {name}"
        if for_itself:
            mention(f"self.{last(path)}", for_itself)

    return check


def does(check: Callable[[], None]) -> Check:
    """Return a check that tries out what the code relies on, whatever its name."""
    return lambda path: check()


TABLE: list[Private] = []


def add(library: str, where: str, names: str, use: str, check: Check = is_there) -> None:
    """Put names into the table that stand in the same place of a library."""
    for name in names.split():
        TABLE.append(Private(library, f"{where}.{name}" if where else name, use, check))


# Python's own


def an_enum_grows() -> None:
    class Closed(str, enum.Enum):  # noqa: UP042 - as PEFT's is
        FIRST = "FIRST"

    member = str.__new__(Closed, "LATER")
    member._name_ = member._value_ = "LATER"
    Closed._member_map_["LATER"] = Closed._value2member_map_["LATER"] = member
    Closed._member_names_.append("LATER")
    type.__setattr__(Closed, "LATER", member)
    assert Closed("LATER") is Closed["LATER"] is Closed.LATER is member
    assert list(Closed) == ["FIRST", "LATER"]
    assert "LATER" in Closed.__members__


def a_loader_is_asked() -> None:
    loader = peft.__spec__.loader
    assert callable(loader.exec_module)
    assert isinstance(vars(loader), dict), "nothing can be put on PEFT's loader"
    seen: list[Any] = []
    own = SimpleNamespace(create_module=lambda spec: None, exec_module=seen.append)
    spec = importlib.machinery.ModuleSpec("san_llm_probe", own)
    finder = SimpleNamespace(find_spec=lambda name, *_: spec if name == spec.name else None)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module(spec.name)
    finally:
        sys.meta_path.remove(finder)
        sys.modules.pop(spec.name, None)
    assert len(seen) == 1, "what stands on a loader is not called"


def malloc_is_tuned() -> None:
    if sys.platform == "linux":
        assert callable(ctypes.CDLL(None).mallopt)


CLOSED = "PEFT's types are a closed enum, which takes SAN"
add("enum", "Enum", "_member_map_ _value2member_map_ _member_names_", CLOSED, does(an_enum_grows))
add("enum", "Enum", "_name_ _value_", CLOSED, does(an_enum_grows))
HOOK = "SAN is registered right behind PEFT's import"
add("importlib", "abc.Loader", "exec_module", HOOK, does(a_loader_is_asked))
add("os", "", "_exit", "a worker ends without the interpreter's own end", takes("status"))
add("ctypes", "CDLL", "mallopt", "large tensors go back to the system", does(malloc_is_tuned))


# torch


def attention_on_a_cpu() -> None:
    # Of 4 heads two share a key head; 2 of 5 queries are the last ones.
    query, key, value = (torch.randn(1, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, 2, 5)
    mask[..., 0, 4] = float("-inf")
    scores = query[:, :, 3:] @ key.repeat_interleave(2, 1).mT * 0.5 + mask
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    aten, given = torch.ops.aten, (query[:, :, 3:].detach(), key.detach(), value.detach())
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sums = attend(*given, attn_mask=mask, scale=0.5)
    assert torch.allclose(log_sums, scores.logsumexp(-1), atol=1e-5)
    assert torch.allclose(out, expected, atol=1e-5)
    back = aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = back(torch.ones_like(out), *given, out, log_sums, 0.0, False, attn_mask=mask, scale=0.5)
    wanted = torch.autograd.grad(expected.sum(), (query, key, value))
    assert torch.allclose(found[0], wanted[0][:, :, 3:], atol=1e-5)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found[1:], wanted[1:], strict=True))


def activations_in_place() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    out, ones = torch.empty(4, 4), torch.ones(4, 4)
    aten, functional = torch.ops.aten, torch.nn.functional
    with torch.no_grad():
        assert torch.equal(aten.silu.out(x, out=out), functional.silu(x))
        aten.gelu.out(x, approximate="tanh", out=out)
        assert torch.equal(out, functional.gelu(x, approximate="tanh"))
    (slope,) = torch.autograd.grad(functional.silu(x).sum(), x)
    aten.silu_backward.grad_input(ones, x.detach(), grad_input=out)
    assert torch.allclose(out, slope, atol=1e-6)
    (slope,) = torch.autograd.grad(functional.gelu(x, approximate="tanh").sum(), x)
    aten.gelu_backward.grad_input(ones, x.detach(), approximate="tanh", grad_input=out)
    assert torch.allclose(out, slope, atol=1e-6)


def a_store_is_shared() -> None:
    store = torch.distributed.PrefixStore("job", torch.distributed.HashStore()).clone()
    store.set_timeout(timedelta(seconds=1))
    assert not store.check(["alive"])
    store.set("alive", "1")
    assert store.check(["alive"])
    assert store.get("alive") == b"1"


def after_a_step() -> tuple[Any, Any]:
    """Return an AdamW after a step, of the kind that is Trainer's default, and its schedule."""
    from transformers import TrainingArguments, get_linear_schedule_with_warmup

    assert TrainingArguments(output_dir="unused", use_cpu=True).optim.startswith("adamw_torch")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 4)
    weight.sum().backward()
    optimizer.step()
    schedule.step()
    return optimizer, schedule


def rates_are_kept() -> None:
    from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

    optimizer, schedule = after_a_step()
    state = schedule.state_dict()
    assert (state["last_epoch"], state["_step_count"]) == (1, 2)
    assert (state["base_lrs"], state["_last_lr"]) == ([1.0], [0.75])
    constant = get_constant_schedule_with_warmup(optimizer, 0)
    for each in (schedule, constant, get_cosine_schedule_with_warmup(optimizer, 0, 4)):
        # Of a plain function it would be None; transformers makes partials.
        assert each.state_dict()["lr_lambdas"] == [{}]
        assert isinstance(each.lr_lambdas[0](1), float)


def moments_are_kept() -> None:
    state = after_a_step()[0].state_dict()
    moments = state["state"][0]
    assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert (moments["step"].dtype, moments["step"].shape) == (torch.float32, ())
    settings = {"lr", "params", "initial_lr", "betas", "eps", "weight_decay"}
    settings |= {"decoupled_weight_decay", "amsgrad", "maximize"}
    assert settings <= state["param_groups"][0].keys()


def a_file_is_not_packed() -> None:
    file = io.BytesIO()
    torch.save({"zeros": torch.zeros(10_000)}, file)
    with zipfile.ZipFile(file) as parts:
        assert sum(entry.file_size for entry in parts.infolist()) <= len(file.getvalue())


def code_is_refused() -> None:
    file = io.BytesIO()
    torch.save(functools.partial(print, "code runs"), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def a_full_disk_has_its_words() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no full device here")
    with pytest.raises(RuntimeError, match=r"inline_container|PytorchStreamWriter|iostream error"):
        torch.save({"zeros": torch.zeros(10_000)}, "/dev/full")


def a_failed_worker_is_named() -> None:
    errors = resolve("torch.distributed.elastic.multiprocessing.errors")
    kept = errors.ProcessFailure(local_rank=1, pid=2, exitcode=-9, error_file="none")
    ((rank, failure),) = errors.ChildFailedError("workers", {1: kept}).failures.items()
    assert (rank, failure.exitcode, type(failure.timestamp)) == (1, -9, int)


ATTENTION = "packed rows attend on a CPU by parts, under masks, with heads that share keys"
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
FLASH += f" {FLASH}_backward"
add("torch", "ops.aten", FLASH, ATTENTION, does(attention_on_a_cpu))
IN_PLACE = "activations and their slopes are computed in memory that is there"
add("torch", "ops.aten", "gelu silu", IN_PLACE, does(activations_in_place))
add("torch", "ops.aten", "gelu_backward silu_backward", IN_PLACE, does(activations_in_place))
BEATS = "processes count in the job's store, so that a frozen one is noticed"
FAKED = "plan.faked runs a model's own code on tensors without numbers: there is no public door"
add(
    "torch",
    "_subclasses.fake_tensor",
    "FakeTensorMode",
    FAKED,
    takes(keywords="allow_non_fake_inputs"),
)
add("torch", "distributed.distributed_c10d", "_get_default_store", BEATS, takes())
add("torch", "distributed.Store", "clone set_timeout", BEATS, does(a_store_is_shared))
RATES = "a checkpoint's learning rates are held to this training's"
LAMBDA = "optim.lr_scheduler.LambdaLR"
add(
    "torch",
    LAMBDA,
    "lr_lambdas base_lrs last_epoch _step_count _last_lr",
    RATES,
    does(rates_are_kept),
)
MOMENTS = "a checkpoint's moments are held to this training's"
add("torch", "optim.AdamW", "exp_avg exp_avg_sq initial_lr", MOMENTS, does(moments_are_kept))
add("torch", "optim.AdamW", "decoupled_weight_decay", MOMENTS, does(moments_are_kept))
PLAIN = "a packed file in a checkpoint is none of torch's"
add("torch", "save", "file_size", PLAIN, does(a_file_is_not_packed))
SAFE = "a checkpoint that could run code is known from a damaged one"
add("torch", "load", "UnpicklingError", SAFE, does(code_is_refused))
FULL = "a full disk is known by the words of torch's writer"
add("torch", "save", "PytorchStreamWriter", FULL, does(a_full_disk_has_its_words))
NUMBERS = "DeepSpeed's pickles may hold numbers only"
add("torch", "", "TORCH_FORCE_WEIGHTS_ONLY_LOAD", NUMBERS, is_in("torch.serialization"))
FAILED = "the launcher says which worker failed, and knows that from a job that was stopped"
ELASTIC = "distributed.elastic.multiprocessing"
add("torch", f"{ELASTIC}.errors", "ChildFailedError", FAILED, does(a_failed_worker_is_named))
add("torch", f"{ELASTIC}.api", "SignalException", FAILED)
ONCE = "a backward pass of ours is not differentiated again"
add("torch", "autograd.function", "once_differentiable", ONCE, takes("fn"))


# transformers' Trainer

TRAINER = "transformers.Trainer"
HANDLER = "trainer_callback.CallbackHandler"
trainer = functools.partial(add, "transformers", "Trainer")
replaced = functools.partial(takes, for_itself=TRAINER)
SAVES = "a checkpoint is whole or absent, and holds what a run goes on from"
JUDGES = "what is judged or sampled while a stop is asked for is made up for later"
SKIPS = "a batch whose loss explodes is left out before the weights move"
NO_DICE = "dropout's dice follow from the seed, so that no state of them is kept"
PER_TOKEN = "the loss is one per token of the global batch"
CHECKED = "a checkpoint is looked at before Trainer loads it"


def gpus_are_counted() -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 3
    assert arguments.n_gpu == 3


def state_has_its_fields() -> None:
    from transformers import TrainerState

    wanted = {"global_step", "epoch", "log_history", "best_global_step", "best_metric"}
    wanted |= {"best_model_checkpoint", "max_steps", "num_train_epochs", "num_input_tokens_seen"}
    wanted |= {"train_batch_size", "total_flos"}
    lost = wanted - {field.name for field in fields(TrainerState)}
    assert not lost, f"it has no {', '.join(sorted(lost))} any more"


def files_have_their_names() -> None:
    trainer = resolve("transformers.trainer")
    assert trainer.TRAINER_STATE_NAME == "trainer_state.json"
    assert trainer.OPTIMIZER_NAME == "optimizer.pt"
    assert trainer.SCHEDULER_NAME == "scheduler.pt"
    assert resolve("transformers.trainer_utils.PREFIX_CHECKPOINT_DIR") == "checkpoint"


def the_end_is_logged() -> None:
    assert "train_runtime" in resolve("transformers.trainer_utils.speed_metrics")("train", 0.0)


# Ours takes their place.
trainer("compute_loss", PER_TOKEN, replaced("model inputs return_outputs num_items_in_batch"))
trainer("evaluate", PER_TOKEN, replaced("eval_dataset ignore_keys metric_key_prefix"))
trainer("training_step", NO_DICE, replaced("model inputs num_items_in_batch"))
trainer("log", "a step's log has the neuron scales", replaced("logs start_time"))
trainer("_get_train_sampler", "batches follow from seed and step", replaced("train_dataset"))
trainer("_get_grad_norm", SKIPS, replaced("model grad_norm"))
PLACE = "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time"
trainer("_maybe_log_save_evaluate", JUDGES, replaced(PLACE))
trainer("_save_checkpoint", SAVES, replaced("model trial"))
trainer("_save", "only the adapter is saved", replaced("output_dir state_dict"))
trainer("_load_best_model", "the best weights are whole, or known to be lost", replaced())
trainer("_load_optimizer_and_scheduler", CHECKED, replaced("checkpoint"))
trainer("_load_rng_state", NO_DICE, replaced("checkpoint"))
# Ours calls them, or reads them.
trainer("_get_learning_rate", "a bad batch is reported with its rate", takes())
trainer("_prepare_inputs", "held-out rows go to the device", takes("inputs"))
trainer("_save_optimizer_and_scheduler _save_scaler", SAVES, takes("output_dir"))
trainer("save_model", SAVES, takes("output_dir _internal_call"))
trainer("_internal_call", "a checkpoint is not pushed to the hub", is_in(TRAINER))
trainer("store_flos", SAVES, takes())
trainer("_tr_loss", SKIPS, is_of(TRAINER))
trainer("_globalstep_last_logged model_wrapped callback_handler", JUDGES, is_of(TRAINER))
trainer("model_accepts_loss_kwargs", PER_TOKEN, is_of(TRAINER))
trainer("is_deepspeed_enabled", "DeepSpeed loads files of its own", is_of(TRAINER))
trainer("shift_labels", "a packed batch's labels are counted as they are", is_in(TRAINER))
trainer("save_only_model", "a run over a sharded base resumes", is_in(TRAINER))
trainer("loss grad_norm learning_rate step", "a step's log is read by its keys", is_in(TRAINER))
trainer("train_runtime", "the last line that is logged is no step's", does(the_end_is_logged))
add("transformers", HANDLER, "on_save", JUDGES, takes("args state control"))
add("transformers", HANDLER, "on_evaluate", JUDGES, takes("args state control metrics"))
LOGS = "what is logged goes to log.jsonl and to the view"
add("transformers", HANDLER, "logs", LOGS, is_in(f"transformers.{HANDLER}.on_log"))
ALONE = "several GPUs in one process are never DataParallel"
add("transformers", "TrainingArguments", "_n_gpu", ALONE, does(gpus_are_counted))
add("transformers", "", "TrainerState", CHECKED, does(state_has_its_fields))
add("transformers", "TrainerState", "save_to_json", SAVES, takes("json_path"))
FILES = "trainer_state.json optimizer.pt scheduler.pt checkpoint"
add("transformers", "", FILES, CHECKED, does(files_have_their_names))


# transformers' models

PACKS = "rows are packed side by side, and attention knows where they lie"
LEAN = "scales move into norms, activations and the rotary embedding"
HEAD = "the output head gives the loss, so that the logits are never whole"
MARKS = "a model whose weights are dequantized counts as a plain one"
GEMMA2 = "transformers.models.gemma2.modeling_gemma2"
FAMILIES = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3"
models = functools.partial(add, "transformers", "PreTrainedModel")


def attention_is_chosen() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig()
    config._attn_implementation = "probe"
    assert config._attn_implementation == "probe"
    mention("_attn_implementation", "transformers.models.llama.modeling_llama.LlamaAttention")


def a_class_makes_a_small_copy() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    small = MixtralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    small._experts_implementation = "eager"
    made = MixtralForCausalLM._from_config(small, attn_implementation="eager", dtype=torch.float64)
    assert type(made) is MixtralForCausalLM
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    made(input_ids=torch.tensor([[1, 2]]))  # other implementations of experts know no float64


def attention_is_handed_all() -> None:
    """Run a model whose attention only notes what it is given."""
    from transformers import AttentionInterface

    given: dict[str, Any] = {}

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        given.update(more, layer_idx=module.layer_idx, mask=mask, query=query, key=key)
        return query.transpose(1, 2).contiguous(), None

    model = tiny_model(num_hidden_layers=1)
    AttentionInterface.register("san_llm_probe", attend)
    model.config._attn_implementation = "san_llm_probe"
    mask = torch.arange(3)[None, None, None]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([[5, 6, 7]]),
            position_ids=torch.arange(3)[None],
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=torch.tensor([0, 2]),
            layout="ours",
            past="ours, too",
        )
    assert given["layer_idx"] == 0
    assert (given["query"].shape, given["key"].shape) == ((1, 4, 3, 8), (1, 2, 3, 8))
    assert given["mask"] is mask, "a mask of four dimensions is not handed through"
    assert (given["scaling"], given["dropout"]) == (8**-0.5, 0.0)
    assert (given["layout"], given["past"]) == ("ours", "ours, too")
    assert out.logits.shape[:2] == (1, 2), "logits are not of the places that were asked for"


def windows_are_handed() -> None:
    for name in ("mistral.modeling_mistral.Mistral", "gemma2.modeling_gemma2.Gemma2"):
        mention("sliding_window", f"transformers.models.{name}Attention")


def the_head_is_replaced() -> None:
    model, seen = tiny_model(num_hidden_layers=1), []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape)
        return torch.tensor(3.0)

    model.get_output_embeddings().forward = forward
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert seen == [(1, 3, 32)]
    assert (out.logits.shape, out.logits.item()) == ((), 3.0)


def loading_is_reported() -> None:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        tiny_model(num_hidden_layers=1).save_pretrained(folder)
        assert (Path(folder) / "model.safetensors").is_file()
        _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= loading.keys()


def a_cache_knows_its_windows() -> None:
    from transformers import DynamicCache, MistralConfig

    config = MistralConfig(sliding_window=7, num_hidden_layers=1)
    assert [layer.sliding_window for layer in DynamicCache(config=config).layers] == [7]
    plain = DynamicCache(config=tiny_model(num_hidden_layers=1).config)
    assert [getattr(layer, "sliding_window", "none") for layer in plain.layers] == ["none"]


@functools.cache
def small(model_type: str) -> Any:
    """Return a small model of a family, without memory for its numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "head_dim": 4}
    sizes |= {"num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 16, "pad_token_id": 0}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


def a_block_is_wired(path: str) -> None:
    model_type = last(path)
    model, gemma = small(model_type), model_type.startswith("gemma")
    for node in san_llm.propagation_graph(model.config):
        shape = tuple(model.get_submodule(node.name).weight.shape)
        assert shape == (node.d_out, node.d_in), f"{node.name} has the shape {shape}"
    block = model.model.layers[0]
    assert block.self_attn.layer_idx == 0
    second = "pre_feedforward_layernorm" if gemma and model_type != "gemma" else ""
    for name in ("input_layernorm", second or "post_attention_layernorm"):
        norm = getattr(block, name)
        assert hasattr(norm, "_norm") == gemma, f"{name} is of another make"
        assert isinstance(norm.eps if gemma else norm.variance_epsilon, float)
    activation = block.mlp.activation_fn if model_type == "phi3" else block.mlp.act_fn
    if gemma:
        assert isinstance(activation.act, functools.partial)
        assert activation.act.keywords == {"approximate": "tanh"}
    else:
        assert isinstance(activation, type(resolve("transformers.activations.ACT2FN")["silu"]))
    if model_type != "gemma2":  # whose scores are capped
        assert model.config._attn_implementation == "sdpa"
    assert type(model)._supports_attention_backend
    assert "logits_to_keep" in inspect.signature(model.forward).parameters


def halves_are_rotated() -> None:
    for model_type in ("llama", "mistral", "qwen2", "gemma", "gemma2"):
        forward = own_forward(small(model_type).model.layers[0].self_attn)
        assert isinstance(forward, FunctionType), f"{model_type}: its forward is wrapped"
        assert "apply_rotary_pos_emb" in forward.__code__.co_names, model_type
        rotary = forward.__globals__["apply_rotary_pos_emb"]
        assert list(inspect.signature(rotary).parameters)[:4] == ["q", "k", "cos", "sin"]


def what_renames_stands_before_its_function() -> None:
    renames = resolve(f"{RENAMES}.deprecate_kwarg")

    def forward(cache: Any = None) -> None: ...

    wrapped = renames("past", version="99.0", new_name="cache")(forward)
    assert wrapped.__globals__["__name__"] == RENAMES
    assert wrapped.__wrapped__ is forward


def a_config_says_where_it_lay() -> None:
    assert "_name_or_path" in tiny_model(num_hidden_layers=1).config.to_dict()


def a_stored_quantization_is_a_table() -> None:
    from transformers import LlamaConfig

    stored = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    assert LlamaConfig(quantization_config=stored).quantization_config == stored


def a_call_resets_a_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding()
    tokenizer("x", add_special_tokens=False, verbose=False)
    assert (backend.truncation, backend.padding) == (None, None)


CONFIG = "PretrainedConfig"
add("transformers", CONFIG, "_attn_implementation", PACKS, does(attention_is_chosen))
COPIES = "small copies of a model, to measure its propagation graph"
add("transformers", CONFIG, "_experts_implementation", COPIES, does(a_class_makes_a_small_copy))
add("transformers", "PreTrainedModel", "_from_config", COPIES, does(a_class_makes_a_small_copy))
models("_supports_attention_backend", PACKS)
models("logits_to_keep", PACKS, does(attention_is_handed_all))
GIVEN = "layer_idx scaling dropout layout past"
add("transformers", "AttentionInterface", GIVEN, PACKS, does(attention_is_handed_all))
add("transformers", "AttentionInterface", "sliding_window", PACKS, does(windows_are_handed))
SDPA = takes("module query key value attention_mask")
add("transformers", "integrations.sdpa_attention", "sdpa_attention_forward", PACKS, SDPA)
add("transformers", "masking_utils", "sdpa_mask", PACKS)
add("transformers", "DynamicCache", "layers", PACKS, does(a_cache_knows_its_windows))
BEAMS = "the beams of a prompt share its keys"
add("transformers", "DynamicCache", "batch_repeat_interleave", BEAMS, takes("repeats"))
models("get_output_embeddings", HEAD, does(the_head_is_replaced))
CAPPED = is_in(f"{GEMMA2}.Gemma2ForCausalLM")
add("transformers", "Gemma2Config", "final_logit_softcapping", HEAD, CAPPED)
CAPPED = is_in(f"{GEMMA2}.Gemma2Attention")
add("transformers", "Gemma2Config", "attn_logit_softcapping", PACKS, CAPPED)
BLOCK = "a block's Linears, norms and activation are where they are adapted and folded"
add("transformers", "models", FAMILIES, BLOCK, a_block_is_wired)
for model_type, where, name in (
    ("gemma", "GemmaRMSNorm", "_norm eps"),
    ("gemma", "GELUTanh", "act"),
    ("llama", "LlamaRMSNorm", "variance_epsilon"),
    ("llama", "LlamaMLP", "act_fn"),
    ("phi3", "Phi3MLP", "activation_fn"),
):
    WIRED = does(functools.partial(a_block_is_wired, model_type))
    add("transformers", where, name, LEAN, WIRED)
add("transformers", "models", "apply_rotary_pos_emb", LEAN, does(halves_are_rotated))
RENAMED = does(what_renames_stands_before_its_function)
add("transformers", "utils", "deprecation", LEAN, RENAMED)
add("transformers", "activations", "ACT2FN", LEAN)
LAY = "a config that is written again does not say where the first lay"
add("transformers", CONFIG, "_name_or_path", LAY, does(a_config_says_where_it_lay))
BITS = "4-bit weights are computed with in the dtype that is asked for"
STORED = does(a_stored_quantization_is_a_table)
add("transformers", CONFIG, "bnb_4bit_compute_dtype", BITS, STORED)
CALL = "a call takes away the cutoff and padding that a tokenizer's file asks for"
FAST = "PreTrainedTokenizerFast"
add("transformers", FAST, "backend_tokenizer", CALL, does(a_call_resets_a_tokenizer))
models("hf_quantizer quantization_config", MARKS, is_in("transformers.modeling_utils"))
models("is_loaded_in_4bit is_loaded_in_8bit", MARKS, is_in("transformers.modeling_utils"))
models("is_quantized", MARKS, is_in("transformers.quantizers.base"))
LACKS = "a checkpoint that lacks weights is refused"
models("missing_keys unexpected_keys mismatched_keys", LACKS, does(loading_is_reported))
STAND = takes("save_directory", keywords="max_shard_size save_original_format")
models("save_pretrained", "4-bit weights are saved as they stand", STAND)
TABLES = "a merge finds the tensors of a model's files by what transformers does as it loads them"
SOURCE = takes("source_key weight_renamings weight_converters base_model_prefix meta_state_dict")
add("transformers", "core_model_loading", "rename_source_key", TABLES, SOURCE)
add("transformers", "core_model_loading", "dot_natural_key", TABLES, takes("s"))
MAPPING = "conversion_mapping"
add("transformers", MAPPING, "get_model_conversion_mapping", TABLES, takes("model"))
TRANSPOSES = "transformers.core_model_loading.Transpose"
TAKEN = takes("source_patterns target_patterns operations")
add("transformers", "core_model_loading", "WeightConverter", TABLES, TAKEN)
OPERATIONS = "MergeModulelist Concatenate Chunk Transpose"
add("transformers", "core_model_loading", OPERATIONS, TABLES)
add("transformers", "core_model_loading.Transpose", "check_dims", TABLES, is_in(TRANSPOSES))
SHARE = "each process loads its share of the base"
add("transformers", "distributed", "DistributedConfig", SHARE, takes(keywords="fsdp_size"))
COMES = takes("text stream_end", for_itself="transformers.generation.streamers")
add("transformers", "TextStreamer", "on_finalized_text", "an answer is shown as it comes", COMES)
CURVES = "a resumed run's curves go on where they were"
ASKS = "doctor says where model.load_adapter wants a newer PEFT"
add("transformers", "integrations.peft", "MIN_PEFT_VERSION", ASKS)
add("transformers", "integrations", "TensorBoardCallback", CURVES, takes("tb_writer"))


# PEFT

UTILS = "tuners.tuners_utils"
BASE_TUNER, BASE_LAYER = f"peft.{UTILS}.BaseTuner", f"peft.{UTILS}.BaseTunerLayer"
tuner = functools.partial(add, "peft", f"{UTILS}.BaseTuner")
layer = functools.partial(add, "peft", f"{UTILS}.BaseTunerLayer")
REGISTERS = "PEFT knows SAN by the type in adapter_config.json"
WRAPS = "PEFT wraps the targets through SAN's tuner"
UNLOADS = "PEFT takes SAN's layers out again, merged or not"
DRIVES = "PEFT switches, counts, merges and deletes SAN's vectors"
KEYS = "an adapter's tensors and files are known by PEFT's names"


def a_type_is_there() -> None:
    from peft.utils import PeftType

    assert issubclass(PeftType, str)
    assert issubclass(PeftType, enum.Enum)
    assert PeftType("SAN") is PeftType["SAN"]
    assert "SAN" in list(PeftType)


def san_is_registered() -> None:
    kinds = resolve("peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING")
    assert kinds["SAN"] is san_llm.SanConfig


def tensors_have_their_names() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model(num_hidden_layers=1), config)
    assert list(model.peft_config) == ["default"]
    assert model.base_model.prefix == "lora_"
    target = "base_model.model.model.layers.0.self_attn.q_proj"
    assert f"{target}.base_layer.weight" in dict(model.named_parameters())
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = peft.get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    assert set(kept) == {f"{target}.lora_{matrix}.weight" for matrix in "AB"}


def files_of_an_adapter() -> None:
    assert resolve("peft.utils.CONFIG_NAME") == "adapter_config.json"
    assert resolve("peft.utils.SAFETENSORS_WEIGHTS_NAME") == "adapter_model.safetensors"


def rows_with_adapters_are_passed_on() -> None:
    hooks = "peft.PeftModel._enable_peft_forward_hooks"
    takes("args kwargs")(hooks)
    mention("_enable_peft_forward_hooks", hooks)  # of the tuner
    for place in ("forward", "generate"):
        mention("self._enable_peft_forward_hooks", f"peft.PeftModel.{place}")


add("peft", "utils", "PeftType", REGISTERS, does(a_type_is_there))
KNOWN = takes(keywords="name config_cls model_cls")
add("peft", "utils", "register_peft_method", REGISTERS, KNOWN)
add("peft", "mapping", "PEFT_TYPE_TO_CONFIG_MAPPING", REGISTERS, does(san_is_registered))
# Ours takes their place.
driven = functools.partial(takes, for_itself=BASE_TUNER)
tuner("_prepare_adapter_config", WRAPS, driven("peft_config model_config"))
tuner("_prepare_model", WRAPS, driven("peft_config model"))
tuner("_check_target_module_exists", WRAPS, driven("peft_config key"))
TARGET = "peft_config adapter_name target target_name parent current_key parameter_name"
tuner("_create_and_replace", WRAPS, driven(TARGET))
MERGED = "merge progressbar safe_merge adapter_names"
tuner("_unload_and_optionally_merge", UNLOADS, driven(MERGED))
tuner("_replace_module", UNLOADS, driven("parent child_name new_module child"))
INJECTED = "model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict"
tuner("inject_adapter", WRAPS, driven(INJECTED))
tuner("prefix tuner_layer_cls target_module_mapping", WRAPS, is_of(BASE_TUNER))
ROWS = "a batch whose rows name adapters is refused"
HOOKS = "_enable_peft_forward_hooks adapter_names"
add("peft", "PeftModel", HOOKS, ROWS, does(rows_with_adapters_are_passed_on))
layer("adapter_layer_names other_param_names merged_adapters quantization_backend", DRIVES)
layer("enable_adapters", DRIVES, takes("enabled"))
layer("merge", DRIVES, takes("safe_merge adapter_names"))
layer("unmerge", DRIVES, takes())
layer("_move_adapter_to_device_of_base_layer", DRIVES, takes("adapter_name device"))
UNLOAD = is_in(f"{BASE_TUNER}._unload_and_optionally_merge")
layer("unload_and_optionally_merge_module", UNLOADS, UNLOAD)
layer("base_layer", DRIVES, is_in(f"{BASE_LAYER}.get_base_layer"))
# Ours calls them, or reads them.
tuner("get_model_config", WRAPS, takes("model"))
tuner("peft_config active_adapters model", WRAPS, is_of(BASE_TUNER))
layer("get_base_layer get_base_weight", DRIVES, takes())
layer("set_base_weight", DRIVES, takes("weight_data"))
layer("active_adapters merged disable_adapters", DRIVES)
add("peft", UTILS, "check_adapters_to_merge", DRIVES, takes("module adapter_names"))
add("peft", UTILS, "check_target_module_exists", WRAPS, takes("config key"))
BACKEND = "weights of bitsandbytes are merged into"
QUANTIZED = "utils.quantization_utils"
add("peft", QUANTIZED, "resolve_quantization_backend", BACKEND, takes("base_layer"))
add("peft", "", "base_model.model", KEYS, does(tensors_have_their_names))
add("peft", "", "get_peft_model_state_dict", KEYS, does(tensors_have_their_names))
ADAPTER = "adapter_config.json adapter_model.safetensors"
add("peft", "", ADAPTER, KEYS, does(files_of_an_adapter))
ONLY = "only what is trained is saved: PEFT takes it by a keyword that it does not name"
add("peft", "PeftModel", "state_dict", ONLY, is_in("peft.PeftModel.save_pretrained"))


# bitsandbytes

FOUR = "weights in 4 bits are read, and scaled by their blocks"
EIGHT = "weights in 8 bits are read by their rows"
REPACKS = "4-bit weights are not repacked for fast inference on a CPU, which breaks gradients"


def four_bits() -> Any:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    return Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


def blocks_are_read() -> None:
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    linear = four_bits()
    assert isinstance(linear, torch.nn.Linear)
    weight, state = linear.weight, linear.weight.quant_state
    assert (tuple(state.shape), state.blocksize, state.nested) == ((128, 64), 64, True)
    assert weight.compress_statistics is True
    assert weight.dtype == torch.uint8
    whole = dequantize_4bit(weight.data, state)
    assert whole.dtype == state.dtype == torch.float32
    # Two rows alone, by plain scales of their own.
    absmax = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    state.shape, state.nested, state.absmax = torch.Size((2, 64)), False, absmax[4:6]
    codes = weight.data.view(128, -1)[4:6].reshape(-1, 1)
    assert torch.equal(dequantize_4bit(codes, state), whole[4:6])


def repacking_is_off() -> None:
    linear = four_bits().eval()
    assert hasattr(linear, "support_avx512bf16_for_cpu"), (
        "4-bit layers have no such switch any more"
    )
    linear.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        linear(torch.randn(2, 64))
    assert not getattr(linear.weight.quant_state, "packing_format_for_cpu", False)
    mention("packing_format_for_cpu", "bitsandbytes.functional", "bitsandbytes.nn.modules")
    mention("self.support_avx512bf16_for_cpu", "bitsandbytes.nn.Linear4bit.forward")


def computing_is_set() -> None:
    assert four_bits().compute_dtype == torch.float32


def rows_are_read() -> None:
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    linear = Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    assert isinstance(linear, torch.nn.Linear)
    before = linear.weight.detach().clone()
    linear = linear.to("cpu")
    assert linear.weight.dtype == torch.int8
    rows = linear.weight.data * (linear.weight.SCB[:, None] / 127)
    assert (rows - before).abs().max() < before.abs().max() / 100
    with torch.no_grad():
        linear(torch.randn(2, 64))
    assert linear.weight.SCB is None  # from the first forward on it is elsewhere
    assert (linear.state.SCB.shape, linear.state.CB.dtype) == ((128,), torch.int8)


BNB = "bitsandbytes"
add(BNB, "nn.Params4bit", "quant_state compress_statistics", FOUR, does(blocks_are_read))
STATE = "absmax blocksize nested state2 offset dtype shape"
add(BNB, "functional.QuantState", STATE, FOUR, does(blocks_are_read))
add(BNB, "functional.QuantState", "packing_format_for_cpu", REPACKS, does(repacking_is_off))
add(BNB, "nn.Linear4bit", "support_avx512bf16_for_cpu", REPACKS, does(repacking_is_off))
WIDE = "4-bit layers compute in fp32 where they are compared"
add(BNB, "nn.Linear4bit", "compute_dtype", WIDE, does(computing_is_set))
add(BNB, "nn.Linear8bitLt", "SCB CB", EIGHT, does(rows_are_read))
add(BNB, "functional", "dequantize_4bit dequantize_blockwise", FOUR, takes("A quant_state"))


# Accelerate

ENGINE = "what a launcher asks for is known, or refused"
LAUNCH = "accelerate.utils.launch"


def flags_are_known() -> None:
    parser = resolve("accelerate.commands.launch.launch_command_parser")()
    command = "--num_machines 1 --main_process_port 1 --num_cpu_threads_per_process 1 "
    command += "--num_processes 2 --mixed_precision no --dynamo_backend no -m san_llm"
    for flag in ("--multi_gpu", "--use_fsdp", "--use_deepspeed", "--config_file no.yaml"):
        asked = parser.parse_args([*flag.split(), *command.split()])
        assert (asked.num_processes, asked.training_script) == (2, "san_llm")


def processes_are_counted() -> None:
    takes(keywords="cpu")("accelerate.PartialState")
    mention("self.num_processes", "accelerate.PartialState")


STARTS = "several processes are started by Accelerate's own launcher"
add("accelerate", "commands.launch", "main", STARTS, does(flags_are_known))
ASKED = "ACCELERATE_USE_FSDP ACCELERATE_USE_DEEPSPEED"
add("accelerate", "", ASKED, ENGINE, is_in(LAUNCH, "accelerate.state"))
FSDP = "fsdp_version fsdp_auto_wrap_policy fsdp_reshard_after_forward fsdp_offload_params "
FSDP += "fsdp_activation_checkpointing fsdp_ignored_modules"
add("accelerate", "", FSDP, ENGINE, lambda path: mention(last(path).upper(), LAUNCH))
APART = "processes that would work apart are noticed"
add("accelerate", "PartialState", "num_processes", APART, does(processes_are_counted))


# The others

HUB = "what is no hub id is refused before anything is fetched"
GGUF = "a model is written for llama.cpp, and read again"
HARNESS = "lm-evaluation-harness scores the same choices"
RECIPES = "a recipe has no anchors and tags, and numbers as in YAML 1.2"
LIES = "tensors are read where they lie in their file"


def the_hub_links_to_blobs() -> None:
    from huggingface_hub import try_to_load_from_cache

    with tempfile.TemporaryDirectory() as cache:
        folder = Path(cache) / "models--owner--name"
        file = folder / "snapshots" / "abc" / "config.json"
        for path in (file, folder / "refs" / "main"):
            path.parent.mkdir(parents=True)
            path.write_text("abc", encoding="utf-8")
        cached = try_to_load_from_cache("owner/name", "config.json", cache_dir=cache)
    assert cached == str(file)
    mention("blobs", "huggingface_hub.file_download")


def tensors_lie_in_order() -> None:
    from safetensors.torch import save

    kinds = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"}
    kinds |= {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"}
    kinds |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    tensors = {kind: torch.zeros(2, dtype=getattr(torch, name)) for kind, name in kinds.items()}
    whole = save(tensors, {"made": "here"})
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    assert header.pop("__metadata__") == {"made": "here"}
    assert [facts["dtype"] for facts in header.values()] == list(header)
    assert all(facts["shape"] == [2] for facts in header.values())
    assert max(facts["data_offsets"][1] for facts in header.values()) == len(whole) - 8 - length


def gguf_is_written() -> None:
    from gguf import (
        MODEL_ARCH,
        GGMLQuantizationType,
        GGUFWriter,
        LlamaFileType,
        get_tensor_name_map,
    )
    from gguf.gguf_reader import ReaderTensor

    wanted = "file_type quantization_version tensor context_length embedding_length block_count "
    wanted += "feed_forward_length head_count head_count_kv key_length value_length vocab_size "
    wanted += "rope_dimension_count rope_freq_base layer_norm_rms_eps tokenizer_model token_list "
    wanted += "tokenizer_pre token_types token_merges add_bos_token chat_template "
    wanted += "bos_token_id eos_token_id unk_token_id pad_token_id"
    lost = [name for name in wanted.split() if not hasattr(GGUFWriter, f"add_{name}")]
    assert not lost, f"it cannot add {', '.join(lost)} any more"
    takes("path arch", keywords="use_temp_file")("gguf.GGUFWriter")
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        takes()(f"gguf.GGUFWriter.{step}")
    for kind in ("F16", "BF16", "Q8_0"):
        assert LlamaFileType[f"MOSTLY_{kind}"]
        assert GGMLQuantizationType[kind]
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 1)
    assert names.get_name("lm_head.weight", try_suffixes=(".weight",)) == "output.weight"
    assert {"name", "data", "tensor_type"} <= set(ReaderTensor._fields)


def columns_are_arrow() -> None:
    import datasets
    import pyarrow

    rows = datasets.Dataset(pyarrow.table({"input_ids": [[1, 2], [3]]}), fingerprint="ours")
    assert rows.data.column("input_ids").to_pylist() == [[1, 2], [3]]


def where_installed(check: Check) -> Check:
    def guarded(path: str) -> None:
        pytest.importorskip(path.split(".")[0])
        check(path)

    return guarded


HUB_CLIENT = "huggingface_hub"
add(HUB_CLIENT, "utils", "validate_repo_id", HUB, takes("repo_id"))
ERROR = "huggingface_hub.errors.HfHubHTTPError"
SHOWN = "what the hub says of a push is shown"
add(HUB_CLIENT, "errors.HfHubHTTPError", "server_message", SHOWN, is_of(ERROR))
ASKS = "the hub is looked for where its own client looks"
add(HUB_CLIENT, "constants", "ENDPOINT HF_HUB_OFFLINE HF_HUB_CACHE", ASKS)
LINKS = "a link inside the hub's cache is known from one to another file of the user's"
add(HUB_CLIENT, "file_download", "blobs", LINKS, does(the_hub_links_to_blobs))
HEADER = "__metadata__ data_offsets BF16 F8_E4M3"
add("safetensors", "header", HEADER, LIES, does(tensors_lie_in_order))
add("safetensors", "", "SafetensorError", "a full disk is known from a mistake")
add("gguf", "", "GGUFWriter", GGUF, does(gguf_is_written))
add("gguf", "", "GGUFReader", GGUF, takes("path"))
add("gguf", "quants", "quantize dequantize", GGUF, takes("data qtype"))
add("datasets", "Dataset", "data", "rows are measured in Arrow's memory", does(columns_are_arrow))
harness = functools.partial(add, "lm_eval")
ASKED = "tasks limit task_manager bootstrap_iters apply_chat_template fewshot_as_multiturn"
EVALUATE = takes("model", keywords=ASKED)
harness("", "simple_evaluate", HARNESS, where_installed(EVALUATE))
SAMPLES = where_installed(is_in("lm_eval.evaluator"))
SAID = "samples doc_id doc target arguments resps filtered_resps filter"
harness("evaluator", SAID, HARNESS, SAMPLES)
SCORED = takes("pretrained", keywords="tokenizer batch_size softmax_dtype")
harness("models.huggingface", "HFLM", HARNESS, where_installed(SCORED))
harness("tasks", "TaskManager", HARNESS, where_installed(takes(keywords="include_defaults")))
NAMES = "load all_tasks"
harness("tasks.TaskManager", NAMES, HARNESS, where_installed(is_there))
MADE = "OUTPUT_TYPE eval_docs aggregation dump_config doc_to_choice"
harness("api.task.ConfigurableTask", MADE, HARNESS, where_installed(is_there))
harness("api.metrics", "mean", HARNESS, where_installed(is_there))
FRAMED = takes("chat_history add_generation_prompt")
harness("models.huggingface.HFLM", "apply_chat_template", HARNESS, where_installed(FRAMED))
KNOWS = "max_length max_gen_toks tok_encode"
harness("models.huggingface.HFLM", KNOWS, HARNESS, where_installed(is_there))
TASK = "lm_eval.config.task.TaskConfig"
harness("config.task.TaskConfig", "custom_dataset", HARNESS, where_installed(is_of(TASK)))
NODES = takes("parent index", for_itself="yaml.composer.Composer")
add("yaml", "SafeLoader", "compose_node", RECIPES, NODES)
add("yaml", "SafeLoader", "peek_event", RECIPES, takes())
RESOLVERS = is_in("yaml.resolver.BaseResolver.resolve")
add("yaml", "SafeLoader", "yaml_implicit_resolvers", RECIPES, RESOLVERS)
SCALER = "runtime.fp16.loss_scaler"
add("deepspeed", SCALER, "LossScaler", NUMBERS, where_installed(is_there))
add("deepspeed", "runtime.zero.config", "ZeroStageEnum", NUMBERS, where_installed(is_there))
add("deepspeed", "utils.tensor_fragment", "fragment_address", NUMBERS, where_installed(is_there))


@pytest.mark.parametrize("entry", TABLE, ids=str)
def test_a_library_has_what_the_code_relies_on(entry):
    failure = entry.failure()
    if failure is not None:
        pytest.fail(failure, pytrace=False)


@pytest.mark.parametrize(
    ("library", "name", "check", "why"),
    [
        ("torch", "optim.SGD._gone", is_there, "torch.optim.SGD has no _gone any more"),
        (
            "torch",
            "optim.SGD.step",
            takes("other"),
            "it begins with ['closure'], and no longer with ['other']",
        ),
        ("torch", "optim.SGD.step", takes(keywords="more"), "does not take more any more"),
        ("torch", "save", takes("obj"), "it needs f"),
        (
            "peft",
            "PeftModel._gone",
            is_of("peft.PeftModel"),
            "peft.PeftModel has no _gone any more",
        ),
        ("peft", "PeftModel._gone", is_in("peft.PeftModel"), "does not mention _gone any more"),
    ],
)
def test_a_failure_names_the_library_the_name_and_its_use(library, name, check, why):
    failure = Private(library, name, "what we do with it", check).failure()
    assert failure.startswith(f"{library} {version(library)}: {name}: ")
    assert why in failure
    assert failure.endswith("It is used for this: what we do with it")


def test_no_name_is_in_the_table_twice():
    names = [str(entry) for entry in TABLE]
    assert len(set(names)) == len(names)


# The search


def sources() -> dict[str, str]:
    """Return the package's sources by the names of their modules."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return modules


@functools.cache
def searches() -> dict[str, Search]:
    return {module: Search(source) for module, source in sources().items()}


def test_every_private_name_in_the_code_is_in_the_table():
    known = set().union(*(private_parts(entry.name) for entry in TABLE))
    new = [
        f"{module}, line {min(lines)}: {name}"
        for module, search in searches().items()
        for name, lines in search.names.items()
        if name not in known
    ]
    assert not new, "private names of libraries that are not in TABLE: " + "; ".join(new)


def test_every_private_name_in_the_table_is_used():
    used = {name for search in searches().values() for name in search.names}
    left = {str(e) for e in TABLE if not private_parts(e.name) <= used}
    assert not left, f"the code does not use them any more: {', '.join(sorted(left))}"


def test_every_other_name_in_the_table_stands_in_the_code():
    code = "\n".join(sources().values())
    words = set(re.findall(r"\w+", code))
    left = [str(e) for e in TABLE if last(e.name) not in words and e.name not in code]
    assert not left, f"the code does not use them any more: {', '.join(left)}"


def refused(ours: Any, theirs: Any) -> set[str]:
    """Return the parameters of a library's method that ours, in its place, does not take."""
    own = list(inspect.signature(ours).parameters.values())
    kinds = {parameter.kind for parameter in own}
    open_ended = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} & kinds
    names = [parameter.name for parameter in own]
    return {
        name
        for place, (name, parameter) in enumerate(inspect.signature(theirs).parameters.items())
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        and names[place : place + 1] != [name]
        and not open_ended
    }


def test_what_takes_the_place_of_a_library_s_method_takes_its_arguments():
    compared, wrong = set(), []
    for module, search in searches().items():
        for name, node in search.classes.items():
            if not search.bases(node)[1]:
                continue
            kind = getattr(importlib.import_module(module), name)  # none is inside another
            for method, ours in vars(kind).items():
                theirs = next(
                    (vars(base)[method] for base in kind.__mro__[1:] if method in vars(base)), None
                )
                ours, theirs = (getattr(x, "__func__", x) for x in (ours, theirs))
                if method.startswith("__") or not all(map(inspect.isfunction, (ours, theirs))):
                    continue
                compared.add(method)
                lost = refused(ours, theirs)
                wrong += [f"{module}.{name}.{method} takes no {', '.join(lost)}"] if lost else []
    assert not wrong, "; ".join(wrong)
    assert {"_save_checkpoint", "_create_and_replace", "inject_adapter", "merge"} <= compared


def test_a_method_that_does_not_take_all_is_noticed():
    def theirs(self, model, trial=None): ...
    def same(self, model, trial=None, more=None): ...
    def fewer(self, model): ...
    def other(self, model, attempt=None): ...
    def anything(self, model, **more): ...

    assert not refused(same, theirs)
    assert not refused(anything, theirs)
    assert refused(fewer, theirs) == refused(other, theirs) == {"trial"}


FOREIGN = {
    "an attribute of a module": "import torch\ntorch._assert(True, '')",
    "an attribute of a thing": "def f(config):\n    config._assert = 1",
    "an import": "from torch import _assert",
    "an import under another name": "from torch import _assert as check",
    "a private module": "import torch._assert.inner",
    "something of a private module": "from torch._assert import inner",
    "getattr": "def f(x):\n    return getattr(x, '_assert', None)",
    "a key": "WANTED = {'_assert': 1}",
    "a text with dots": "PATH = 'torch._assert'",
    "a keyword": "def f(x):\n    x.save(_assert=True)",
    "self, where nothing defines it": "class A:\n    def f(self):\n        return self._assert",
    "super": """
        from argparse import ArgumentParser
        class A(ArgumentParser):
            def f(self):
                super()._assert()
    """,
    "a method that the library calls by name": """
        from argparse import ArgumentParser
        class A(ArgumentParser):
            def _assert(self): ...
    """,
}


@pytest.mark.parametrize("source", FOREIGN.values(), ids=FOREIGN)
def test_the_search_sees_a_private_name_of_a_library(source):
    assert set(Search(textwrap.dedent(source)).names) == {"_assert"}


OVERRIDES = {
    "a method": "def _check_value(self, action, value): ...",
    "a method that is called here, too": """
        def _check_value(self, action, value): ...
        def f(self):
            self._check_value(1, 2)
    """,
    "an attribute of the class": "_check_value = None",
    "an attribute of its things": "def f(self):\n            self._check_value = None",
}


@pytest.mark.parametrize("base", ["ArgumentParser", "Between"])
@pytest.mark.parametrize("body", OVERRIDES.values(), ids=OVERRIDES)
def test_the_search_sees_what_takes_the_place_of_a_library_s(body, base):
    source = "from argparse import ArgumentParser\nclass Between(ArgumentParser): ...\n"
    source += f"class A({base}):\n{textwrap.indent(textwrap.dedent(body), '    ')}"
    assert set(Search(source).names) == {"_check_value"}


def test_the_search_sees_what_a_library_keeps_in_its_things():
    source = "from argparse import ArgumentParser\nclass A(ArgumentParser):\n    def f(self):\n"
    # It is set in a method of a base of its base.
    assert set(Search(f"{source}        self._actions = []").names) == {"_actions"}
    assert not Search(f"{source}        self._no_such_thing = []").names


OWN = [
    "def _f(): ...\n_f()",
    "class A:\n    def f(self):\n        self._x = 1\n    def g(self):\n        return self._x",
    "class A:\n    _x = 1\ndef f(a):\n    return a._x + getattr(a, '_x')",
    "class A:\n    def _f(self): ...\nclass B(A):\n    def f(self):\n        super()._f()",
    "from san_llm.errors import _x\nimport san_llm._y",
    "from san_llm import errors\nerrors._x = errors.f(_y=1)",
    "def f(_x): ...\nf(_x=1)",
    "def f(x):\n    return x.__dict__, getattr(x, '__len__'), [_ for _ in x]",
    "def f(x):\n    return x.endswith('_proj'), f'{x}_token', x.removesuffix('_proj')",
    "from typing import TypeVar\n_Kind = TypeVar('_Kind')",
    "from argparse import ArgumentParser\nclass A(ArgumentParser):\n"
    "    def _ours(self): ...\n    def f(self):\n        self._ours()",
    "from pydantic import BaseModel, field_validator\nclass A(BaseModel):\n    x: int\n"
    "    @field_validator('x')\n    @classmethod\n    def _known(cls, value): ...",
    "class Wrong(ValueError):\n    def __init__(self):\n        self._x = 1",
]


@pytest.mark.parametrize("source", OWN)
def test_the_search_passes_over_what_is_our_own(source):
    assert not Search(source).names


def test_the_search_says_on_which_lines_a_name_stands():
    assert Search("import torch\n\ntorch._a(torch._b)\ntorch._a()").names == {
        "_a": {3, 4},
        "_b": {3},
    }


def test_private_is_what_begins_with_an_underscore():
    assert is_private("_x")
    assert is_private("__x")
    assert is_private("_x_")
    assert not any(map(is_private, ("x", "x_", "_", "__", "__x__", "_1")))
    assert private_parts("torch._C._nn.x") == {"_C", "_nn"}
    assert is_ours("san_llm.errors")
    assert not is_ours("san_llm_other")
    assert not is_ours(None)
