"""Bases, tokenizers and adapters as a recipe names them, and one line for what cannot be loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from san.adapted import adapt, family_model, logits, text
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, Gemma2PreTrainedModel

from san_llm import SanConfig
from san_llm.errors import InputError, SanError
from san_llm.models import load as loading
from san_llm.models.adapter import (
    adapter_config,
    add_adapter,
    load_adapter,
    open_adapter,
    trainable_parameters,
)
from san_llm.models.load import load_base, load_config, load_model
from san_llm.models.locate import find_base
from san_llm.models.quantize import dequantize, quantization_config
from san_llm.models.subject import find_subject
from san_llm.models.tokenizer import load_tokenizer
from san_llm.recipe.schema import Base, DoraMethod, Ia3Method, LoraMethod, SanMethod

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def base(folder, dtype="float32", **options):
    return Base(model=str(folder), dtype=dtype, **options)


def refusal(load, named):
    """Return the message by which a base is refused, when it is looked up or loaded."""
    return told(InputError, lambda: load(find_base(named)))


@pytest.fixture
def copy(here, tiny_base):
    """A copy of the tiny base, to be spoilt."""
    shutil.copytree(tiny_base, here / "copy")
    return here / "copy"


def told(kind, call, *arguments):
    """Return the one line of the error that a call raises."""
    with pytest.raises(kind) as caught:
        call(*arguments)
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_ia3_over_a_quantized_base_answers_in_the_dtype_that_it_reads(here, quantization):
    folder = save_tiny(here / "wide", hidden_size=64, intermediate_size=128)
    named = base(folder, "bfloat16", quantization=quantization)
    adapted = add_adapter(load_base(find_base(named)), Ia3Method(name="ia3"))
    adapted.save_pretrained(here / "saved")
    read = load_adapter(load_base(find_base(named)), here / "saved")
    for model in (adapted, read):
        assert logits(model.eval()).dtype == torch.bfloat16


def settings_of(monkeypatch, named, **options):
    """Return what transformers is told where this process has the GPU number 1."""
    seen = {}

    def told(folder, **settings):
        seen.update(settings)
        raise SanError("stop here")

    monkeypatch.setattr(loading, "device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", told)
    with pytest.raises(SanError):
        load_base(find_base(named), **options)
    return seen


def test_a_base_is_read_to_its_gpu_at_once_and_its_shares_or_what_is_merged_are_not(
    tiny_base, monkeypatch
):
    whole = base(tiny_base, "bfloat16")
    to_gpu = {"": torch.device("cuda", 1)}
    assert settings_of(monkeypatch, whole)["device_map"] == to_gpu
    assert settings_of(monkeypatch, base(tiny_base, quantization="4bit"))["device_map"] == to_gpu
    assert "device_map" not in settings_of(monkeypatch, whole, dtype=torch.float32)
    monkeypatch.setattr(loading, "world_size", lambda: 2)
    assert "device_map" not in settings_of(monkeypatch, whole, sharded=True)
    monkeypatch.setattr(transformers.integrations, "is_deepspeed_zero3_enabled", lambda: True)
    assert "device_map" not in settings_of(monkeypatch, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_is_loaded_frozen_in_its_dtype_unless_another_is_asked_for(tiny_base, dtype):
    model = load_base(find_base(base(tiny_base, dtype)))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert trainable_parameters(model) == 0
    wide = load_base(find_base(base(tiny_base, dtype)), dtype=torch.float32)
    assert torch.equal(logits(wide.cpu()), logits(tiny_model()))


def test_a_quantized_base_is_quantized_unless_a_dtype_is_asked_for(here):
    folder = save_tiny(here / "b", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    for quantization, name in (("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")):
        model = load_base(find_base(base(folder, quantization=quantization)))
        assert type(model.model.layers[0].mlp.up_proj).__name__ == name
        full = load_base(find_base(base(folder, quantization=quantization)), dtype=torch.float32)
        assert type(full.model.layers[0].mlp.up_proj).__name__ == "Linear"


KINDS = {
    "nf4": {"quantization": "4bit", "double_quant": False},
    "nf4 double": {"quantization": "4bit"},
    "fp4": {"quantization": "4bit", "quant_type": "fp4", "double_quant": False},
    "fp4 double": {"quantization": "4bit", "quant_type": "fp4"},
    "8bit": {"quantization": "8bit"},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose rows are whole blocks of 64."""
    return save_tiny(
        tmp_path_factory.mktemp("wide"),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
    )


@pytest.mark.parametrize("stored", [False, True], ids=["loaded", "stored"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_over_a_quantized_base_are_those_over_its_numbers(wide, here, kind, stored):
    options = KINDS[kind]
    chosen = base(wide, **options)
    if stored:  # by transformers alone, and read without being told how
        AutoModelForCausalLM.from_pretrained(
            wide,
            dtype=torch.float32,
            device_map="cpu",
            quantization_config=quantization_config(chosen),
        ).save_pretrained(here / "small")
        chosen = base(here / "small")
    first = load_base(find_base(chosen))
    linear = first.model.layers[1].mlp.up_proj
    if kind != "8bit":
        state = linear.weight.quant_state
        assert (state.quant_type, state.nested) == (kind[:3], "double" in kind)
        assert linear.compute_dtype == torch.float32

    def gradients(model):
        adapted = adapt(model).train()  # in eval mode 8-bit layers round their inputs as well
        loss = adapted(input_ids=text(), labels=text()).loss
        loss.backward()
        return loss, {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}

    loss, found = gradients(first)
    expected_loss, expected = gradients(dequantize(load_base(find_base(chosen))))
    tolerance = 2e-2 if kind == "8bit" else 1e-4
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert len(found) == 14
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() < 2 * tolerance * largest, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_stored_quantized_base_computes_in_the_recipes_dtype(wide, here, dtype):
    chosen = base(wide, quantization="4bit")
    load_base(find_base(chosen)).save_pretrained("small")
    model = load_base(find_base(base("./small", dtype)))
    assert model.model.layers[0].mlp.up_proj.compute_dtype == getattr(torch, dtype)
    assert model(input_ids=text()).logits.dtype == getattr(torch, dtype)


def test_what_cannot_be_loaded_quantized_is_one_line(wide, here):
    load_base(find_base(base(wide, quantization="8bit"))).save_pretrained("small")
    twice = refusal(load_base, base("./small", quantization="4bit"))
    assert twice == "base.quantization: ./small is stored in 8bit: leave it out"
    path = Path("small/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    other = "./small: quantized by gptq; only bitsandbytes' checkpoints can be read"
    assert refusal(load_base, base("./small")) == other


def test_what_is_wrong_with_a_base_is_one_line(copy):
    assert "no such folder" in refusal(load_config, base("./nowhere"))
    strange = copy / "config.json"
    own = strange.read_text()
    strange.write_text(json.dumps(json.loads(own) | {"attention_dropout": "much"}))
    assert "its config cannot be loaded" in refusal(load_config, base(copy))
    strange.write_text(own)
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    message = refusal(load_base, base(copy))
    assert message.startswith(f"{weights}: cut short: ")
    weights.unlink()
    message = refusal(load_base, base(copy))
    assert message.startswith(f"{copy}: no model.safetensors and no ")
    (copy / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(load_config, base(copy))
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt9"}))
    assert "no such model (did you mean 'gptj'?)" in refusal(load_config, base(copy))
    (copy / "config.json").write_text(json.dumps({"hidden_size": 3}))
    assert "model type None: transformers has no such model" in refusal(load_config, base(copy))


def test_a_pickle_is_never_loaded(copy):
    class Bomb:
        def __reduce__(self):
            return (Path("exploded").touch, ())

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, copy / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refusal(load_base, base(copy))
    assert not Path("exploded").exists()


def test_a_base_without_a_tokenizer_is_one_line(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    message = refusal(load_tokenizer, base(copy))
    assert message.startswith(f"{copy}: no tokenizer in it")


# --- methods ---


def test_each_method_becomes_the_config_that_it_names():
    san = adapter_config(
        SanMethod(name="san", mode="neuron", shift=True, links=("mlp",), target_modules=("v_proj",))
    )
    assert isinstance(san, SanConfig)
    assert (san.carrier, san.mode, san.shift) == ("scale", "neuron", True)
    assert (set(san.links), set(san.target_modules)) == ({"mlp"}, {"v_proj"})
    carried = adapter_config(SanMethod(name="san", carrier="dora", rank=3, alpha=5, dropout=0.25))
    assert (carried.carrier, carried.r, carried.lora_alpha) == ("dora", 3, 5)
    assert carried.lora_dropout == 0.25
    lora = adapter_config(LoraMethod(name="lora", rank=3, alpha=5, dropout=0.25))
    assert isinstance(lora, LoraConfig)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_dora) == (3, 5, 0.25, False)
    assert adapter_config(DoraMethod(name="dora")).use_dora
    chosen = {"target_modules": ("k_proj", "down_proj"), "feedforward_modules": ("down_proj",)}
    ia3 = adapter_config(Ia3Method(name="ia3", **chosen))
    assert isinstance(ia3, IA3Config)
    assert set(ia3.target_modules) == {"k_proj", "down_proj"}
    assert set(ia3.feedforward_modules) == {"down_proj"}
    assert {config.task_type for config in (san, carried, lora, ia3)} == {"CAUSAL_LM"}


def test_the_trained_numbers_of_each_method_are_those_of_its_paper():
    # 4 blocks; outputs of q, k, v, o, gate, up, down: 32, 16, 16, 32, 48, 48, 32.
    outputs, inputs = [32, 16, 16, 32, 48, 48, 32], [32, 32, 32, 32, 32, 32, 48]
    low_rank = sum(2 * (d_out + d_in) for d_out, d_in in zip(outputs, inputs, strict=True))
    expected = {
        SanMethod(name="san"): 4 * sum(outputs),
        SanMethod(name="san", shift=True): 4 * 2 * sum(outputs),
        SanMethod(name="san", adapt_embedding=True): 4 * sum(outputs) + 32,
        LoraMethod(name="lora", rank=2): 4 * low_rank,
        DoraMethod(name="dora", rank=2): 4 * (low_rank + sum(outputs)),
        Ia3Method(name="ia3"): 4 * sum(outputs),
        # k and v by their outputs, down by its input
        Ia3Method(name="ia3", target_modules="peft", feedforward_modules=("down_proj",)): 320,
    }
    for method, count in expected.items():
        assert trainable_parameters(add_adapter(tiny_model(), method)) == count, method


def test_capped_scores_are_computed_as_the_model_says(here, monkeypatch):
    family_model("gemma2").save_pretrained(here / "base")
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)  # as in some versions
    assert load_base(find_base(base(here / "base"))).config._attn_implementation == "eager"


@pytest.mark.parametrize("method", [SanMethod(name="san"), LoraMethod(name="lora")])
def test_a_target_that_matches_nothing_is_refused(method):
    wrong = method.model_copy(update={"target_modules": ("q_prj",)})
    message = told(InputError, add_adapter, tiny_model(), wrong)
    assert "q_prj" in message


# --- adapters ---


@pytest.fixture
def saved(here, tiny_base):
    adapt(AutoModelForCausalLM.from_pretrained(tiny_base)).save_pretrained(here / "adapter")
    return here / "adapter"


def test_a_saved_adapter_is_put_on_its_base_in_eval_mode(saved, tiny_base):
    expected = logits(adapt(tiny_model()))
    model = load_adapter(load_base(find_base(base(tiny_base))), saved)
    assert not model.training
    assert torch.equal(logits(model.cpu()), expected)
    found = find_base(find_subject(str(tiny_base), saved).base)
    subject, tokenizer = load_model(found, saved), load_tokenizer(found)
    assert not subject.training
    assert torch.equal(logits(subject.cpu()), expected)
    assert tokenizer.eos_token == "</s>"
    alone = load_model(found, None)
    assert torch.equal(logits(alone.cpu()), logits(tiny_model()))
    assert not torch.equal(expected, logits(tiny_model()))


def test_what_is_wrong_with_an_adapter_is_one_line(saved, tiny_base, here):
    def load(folder=saved, **changes):
        return told(InputError, load_adapter, tiny_model(**changes), folder)

    assert load(intermediate_size=64).startswith(f"{saved}: its adapter cannot be loaded: ")
    assert load(here / "nowhere") == (
        f"{here}/nowhere: not an adapter: no adapter_config.json in it"
    )
    numbers = saved / "adapter_model.safetensors"
    whole = numbers.read_bytes()
    numbers.write_bytes(whole[:-10])
    assert load().startswith(f"{numbers}: cut short: ")
    numbers.write_bytes(whole)
    numbers.rename(saved / "adapter_model.bin")
    assert load() == f"{saved}: not an adapter: no adapter_model.safetensors in it"


def test_a_lora_of_another_shape_names_the_first_weight_that_does_not_fit(here):
    model = add_adapter(tiny_model(), LoraMethod(name="lora", rank=2))
    model.save_pretrained(here / "lora")
    path = here / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if "layers.1" in name and "lora_B" in name)
    tensors[key] = torch.ones(5, 2)
    save_file(tensors, path, metadata={"format": "pt"})
    message = told(SanError, load_adapter, tiny_model(), here / "lora")
    assert "its adapter cannot be loaded: size mismatch for base_model.model.model.layers.1" in (
        message
    )


def patch(path, keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# As NVlabs/DoRA's code, LLM-Adapters' and PEFT 0.3 wrote them, and as a later PEFT may.
FOREIGN = [
    ({"peft_type": "DORA", "dora_simple": True}, "peft_type: 'DORA'"),
    ({"peft_type": "BOTTLENECK", "bottleneck_size": 256}, "peft_type: 'BOTTLENECK'"),
    ({"peft_type": None}, "peft_type: None"),
    ({"enable_lora": [True, False, True]}, "enable_lora: [True, False, True]"),
    ({"use_future_scaling": True, "peft_version": "9.0.0"}, "use_future_scaling: True"),
    ({"future_scaling": 0}, "future_scaling: 0"),
]


@pytest.mark.parametrize(("keys", "named"), FOREIGN)
def test_an_adapter_of_another_program_is_refused_by_its_file_and_key(here, keys, named):
    add_adapter(tiny_model(), LoraMethod(name="lora", rank=2)).save_pretrained(here / "lora")
    patch(here / "lora" / "adapter_config.json", keys)
    message = told(InputError, open_adapter, here / "lora")
    assert message.startswith(f"{here}/lora/adapter_config.json: {named}: PEFT ")
    assert "--model" in message
    assert ("PEFT 9.0.0" in message) == ("peft_version" in keys)


def test_options_of_another_version_that_are_off_change_nothing(here):
    model = add_adapter(tiny_model(), LoraMethod(name="lora", rank=2))
    model.save_pretrained(here / "lora")
    off = {"enable_lora": None, "merge_weights": False, "patterns": {}, "parts": [], "kind": ""}
    patch(here / "lora" / "adapter_config.json", off | {"peft_version": "9.0.0"})
    loaded = load_adapter(tiny_model(), here / "lora")
    assert torch.equal(logits(loaded.cpu()), logits(model.eval()))


def test_a_foreign_adapter_is_refused_before_its_base_is_loaded(saved, copy):
    patch(saved / "adapter_config.json", {"peft_type": "DORA"})
    found = find_base(base(copy))
    (copy / "model.safetensors").unlink()
    assert "peft_type: 'DORA'" in told(InputError, load_model, found, saved)
