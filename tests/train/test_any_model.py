"""Recipes over models that no table knows: trained, asked, merged; and what is refused instead."""

from __future__ import annotations

import json
import logging
from contextlib import suppress

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from san.adapted import moved
from tiny import CHARACTERS, rows, tiny_tokenizer, write_rows
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from san_llm import SanConfig
from san_llm.ask.answers import answers
from san_llm.ask.likelihood import ChoiceQuestion, encode_question, score_choices
from san_llm.ask.losses import score_losses
from san_llm.data.batches import Pad
from san_llm.errors import InputError
from san_llm.merge.stock_logits import greedy
from san_llm.models.adapter import add_adapter
from san_llm.models.load import load_base
from san_llm.models.locate import filled, find_base
from san_llm.models.quantize import dequantize
from san_llm.plan.faked import fake, faked_shape
from san_llm.plan.memory import full_batch
from san_llm.recipe.schema import Base, LoraMethod
from san_llm.train.loss import token_losses

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
# Models that differ in what a trainer stumbles over.
MODELS = {
    "gpt2": GPT,  # Linears the other way round, files without the modules' prefix, a tied head
    "granite": LLAMA_LIKE | {"logits_scaling": 3.0},  # does more to logits than its head
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # takes no positions, nor fewer logits
    "olmoe": LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2},  # experts
}


def save(folder, model_type, **sizes):
    """Save a random model of a type, with the tests' tokenizer, and return its section."""
    torch.manual_seed(0)
    words = {"vocab_size": len(CHARACTERS) + 4, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(model_type, **words, pad_token_id=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Base(model=str(folder), dtype="float32")


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    name = request.param
    return find_base(save(tmp_path_factory.mktemp("bases") / name, name, **MODELS[name]))


@pytest.fixture
def model(base):
    adapted = get_peft_model(load_base(base), SanConfig(task_type="CAUSAL_LM"))
    moved(adapted)
    return adapted.eval()


def stock(model, tokens):
    """Return the logits of one row by the model's own forward, unpadded."""
    return model(input_ids=torch.tensor([tokens])).logits[0].float()


def some_rows(count=4):
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(4, 90, (7 + 3 * n,), generator=drawn).tolist() for n in range(count)]


def test_the_loss_of_a_padded_batch_and_its_gradients_are_those_of_each_row(model):
    texts = some_rows()
    batch = Pad(2)([{"input_ids": text, "labels": [-100] * 3 + text[3:]} for text in texts])

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    wanted = sum(
        F.cross_entropy(stock(model, text)[2:-1], torch.tensor(text[3:]), reduction="sum")
        for text in texts
    )
    by_row = gradients(wanted)
    found = token_losses(model, batch)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, gradient in gradients(found).items():
        scale = by_row[name].abs().max()
        assert scale > 0, name
        assert torch.allclose(gradient, by_row[name], rtol=1e-3, atol=1e-4 * scale), name


def test_losses_and_choices_are_those_of_the_models_own_logits(model):
    labelled = [(text, [-100] * 3 + text[3:]) for text in some_rows()]
    losses = list(score_losses(model, labelled))
    for (text, _), loss in zip(labelled, losses, strict=True):
        logits = stock(model, text)[2:-1]
        wanted = F.cross_entropy(logits, torch.tensor(text[3:]), reduction="sum")
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
    tokenizer = tiny_tokenizer()
    question = ChoiceQuestion("Is it so?", (" yes", " not at all"))
    (scores,) = score_choices(model, tokenizer, [question])
    before, choices = encode_question(question, tokenizer)
    for score, choice in zip(scores, choices, strict=True):
        logits = stock(model, before + choice)[len(before) - 1 : -1].log_softmax(-1)
        assert score.logprob == pytest.approx(
            logits[range(len(choice)), choice].sum().item(), rel=1e-5
        )


def test_texts_are_those_of_stock_search_whatever_shares_the_batch(model):
    answers_are_stock(model)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        (
            "recurrent_gemma",
            LLAMA_LIKE | {"num_hidden_layers": 3, "lru_width": 32},
        ),  # a state that padding is taken into
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),  # has no heads
    ],
)
def test_texts_of_a_model_with_a_state_are_those_of_stock_search(here, model_type, sizes):
    answers_are_stock(load_base(find_base(save(here / "it", model_type, **sizes))).eval())


def answers_are_stock(model):
    tokenizer, prompts = tiny_tokenizer(), some_rows()
    texts = dict(pair for some in answers(model, tokenizer, prompts, None) for pair in some)
    for number, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=4,
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=2,
        )
        alone = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        assert texts[number] == alone


def recipe(folder, base, **more):
    write_rows(folder / "rows.json", rows(20))
    sections = {
        "base": {"model": str(base), "dtype": "float32"},
        "method": {"name": "san"},
        "data": {"train": "rows.json", "held_out": 4, "prompt": "alpaca", "loss": "response"},
        "training": {"batch_size": 4, "max_steps": 3, "learning_rate": 0.05, "evaluate_every": 3},
    }
    (folder / "mine.yaml").write_text(json.dumps(sections | more))
    return "mine.yaml"


@pytest.mark.parametrize(
    "method",
    [
        {"name": "san", "shift": True},  # every Linear of GPT-2 has a bias to hold it
        {"name": "full"},
    ],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_a_recipe_over_gpt2_ends_in_a_stock_model_that_answers_alike(command, here, method):
    save(here / "gpt2", "gpt2", **GPT, n_positions=1024)
    name = recipe(here, "gpt2", method=method)
    planned = command("plan", name, "--json")
    assert planned.returncode == 0, planned.stderr
    rows = "" if method.get("shift") else ", activation"
    form = f"lean: norms{rows}" if method["name"] == "san" else None
    assert json.loads(planned.stdout)["form"] == form
    trained = command("train", name, "--json")
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert result["trained_numbers"] == json.loads(planned.stdout)["trained_numbers"]
    run = here / result["run"]
    scored = command("eval", "--tasks", "boolq", "--limit", 2, "--json")
    assert scored.returncode == 0, scored.stderr
    merged = command("merge", *(() if method["name"] == "full" else ("--verify",)))
    assert merged.returncode == 0, merged.stderr
    whole = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(here / "gpt2").eval()
    assert load_file(run / "merged" / "model.safetensors").keys() == (
        load_file(here / "gpt2" / "model.safetensors").keys()
    )
    tokens = AutoTokenizer.from_pretrained(run / "merged")("Is 2 even?", return_tensors="pt")
    with torch.no_grad():
        found, before = whole(**tokens).logits, base(**tokens).logits
        assert not torch.allclose(found, before, atol=1e-3)
        if method["name"] != "full":
            adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
            assert torch.allclose(found, adapted(**tokens).logits, atol=1e-5)
    if method["name"] == "san":
        shown = command("show", "--output", "pictures", "--json")
        assert shown.returncode == 0, shown.stderr
        changed = command("diff", "--json")
        assert changed.returncode == 0, changed.stderr
        modules = {change["module"] for change in json.loads(changed.stdout)["modules"]}
        assert modules == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_a_plan_draws_the_tree_that_graph_draws(command, here):
    save(here / "gpt2", "gpt2", **GPT, n_positions=1024)
    options = (recipe(here, "gpt2"), "method.links=[attention, mlp]")
    drawn = command("graph", *options).stdout
    tree, left = drawn.split("not adapted:", 1)
    assert "attn.c_proj (32 x 32) gamma <- c_attn (attention)" in tree
    assert "residual" not in tree
    assert f"\n\n{tree}\n" in command("plan", *options).stdout
    assert left.count("\n") == 3  # what is left alone is told by graph alone


def test_a_mask_that_a_model_does_not_take_is_no_news(caplog, monkeypatch):
    """OPT adds its own to one of four axes, which does not fit; PyTorch would log a traceback."""
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "propagate", True)
    sizes = {"hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = filled({"model_type": "opt", "word_embed_proj_dim": 32} | sizes)
    with suppress(InputError):  # older versions of transformers look at OPT's numbers
        assert fake(config, None, "float32", full_batch(2, 8, packed=False)).kept > 0
    assert not caplog.records


@pytest.mark.parametrize(
    ("model_type", "sizes", "target", "said"),
    [
        ("gpt2", GPT, "c_atn", r"c_atn' is no module of a gpt2 \(did you mean 'c_attn'\?\)"),
        (
            "gpt_neox",
            LLAMA_LIKE,
            "embed_out",
            "embed_out' is no.*: transformers .* calls it lm_head",
        ),
    ],
)
def test_a_target_of_lora_that_is_no_module_is_answered_with_one_that_is(
    here, model_type, sizes, target, said
):
    model = load_base(find_base(save(here / "it", model_type, **sizes)))
    if target == "embed_out" and model.get_output_embeddings() is not getattr(model, "lm_head", 0):
        pytest.skip("this version of transformers names its head otherwise")
    with pytest.raises(InputError, match=said):
        add_adapter(model, LoraMethod(name="lora", target_modules=(target,)))


def test_dropout_of_lora_on_experts_is_answered_with_the_key_that_sets_it(here):
    model = load_base(find_base(save(here / "it", "olmoe", **MODELS["olmoe"])))
    with pytest.raises(InputError, match=r"lora_dropout != 0.*: set method.dropout: 0"):
        add_adapter(model, LoraMethod(name="lora", dropout=0.05))


@pytest.mark.parametrize(
    ("model_type", "sizes", "said"),
    [
        ("bert", LLAMA_LIKE, "looks ahead"),
        ("vit", {}, "goes on from no text"),
        ("gemma3", {}, "reads pictures with text"),
        ("bart", {}, "a decoder writes another"),
        ("gpt9", None, "transformers has no such model"),
    ],
)
def test_a_model_that_cannot_learn_text_is_refused_in_a_line(here, model_type, sizes, said):
    if model_type == "bert":
        base = save(here / "it", "bert", **sizes)
    else:
        (here / "it").mkdir()
        (here / "it" / "config.json").write_text(json.dumps({"model_type": model_type}))
        (here / "it" / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
        base = Base(model=str(here / "it"), dtype="float32")
    with pytest.raises(InputError, match=said):
        load_base(find_base(base))


def test_a_model_without_heads_has_sizes():
    config = filled({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2})
    assert faked_shape(config).hidden == 32


def test_an_infinite_number_of_a_config_is_read(here):
    save(here / "it", "mamba2", hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16)
    assert "__float__" in (here / "it" / "config.json").read_text()
    assert find_base(Base(model=str(here / "it"))).config["hidden_size"] == 32


def test_the_likeliest_tokens_of_a_model_that_keeps_no_keys(here):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = load_base(find_base(save(here / "it", "mamba", **sizes))).eval()
    tokens = some_rows(1)[0]
    (found,) = greedy(model, [tokens])
    for new in found:
        assert stock(model, tokens)[-1].argmax() == new
        tokens.append(new)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_layer": 1}, "has num_hidden_layers 1, its weights have transformer.h.1"),
        ({"n_embd": 64}, r"has the shape \(.*\), by its config.json it is \("),
        ({"n_embd": -1}, "config.json: n_embd: expected a whole number from 1 to .*, found -1"),
        ({"n_layer": "three"}, "'n_layer' expected int, got str"),
        ({"n_positions": -4}, "n_positions: expected a whole number"),
    ],
    ids=str,
)
def test_a_config_that_is_not_of_its_weights_is_refused_in_a_line(here, changed, said):
    base = save(here / "it", "gpt2", **GPT)
    file = here / "it" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(InputError, match=said):
        load_base(find_base(base))


def test_gpt2_dequantized_is_a_stock_gpt2(here):
    """Its Linears are quantized the other way round than its files have them."""
    save(here / "it", "gpt2", **GPT)
    base = Base(model=str(here / "it"), dtype="float32", quantization="4bit")
    model = load_base(find_base(base))
    tokens = torch.tensor(some_rows(1))
    before = model(tokens).logits
    dequantize(model).save_pretrained(here / "plain", save_original_format=False)
    plain = AutoModelForCausalLM.from_pretrained(here / "plain")
    assert torch.allclose(plain(tokens).logits, before, atol=0.02 * before.std())


def test_no_plan_is_made_of_a_config_that_makes_no_model():
    config = filled({"model_type": "gpt2", **GPT, "activation_function": "nope"})
    with pytest.raises(InputError, match="transformers makes no gpt2 of it: KeyError: 'nope'"):
        faked_shape(config)


def test_no_plan_is_made_for_pictures_with_text():
    with pytest.raises(InputError, match="reads pictures with text"):
        faked_shape(filled({"model_type": "gemma3"}))


def test_a_class_that_is_not_of_the_models_type_decides_nothing(here):
    """A config.json may name both; that of another type would be read as what it is not."""
    base = save(here / "it", "gpt2", **GPT)
    file = here / "it" / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"architectures": ["Olmo2ForCausalLM"]})
    )
    model = load_base(find_base(base))
    assert type(model).__name__ == "GPT2LMHeadModel"
    graph = get_peft_model(model, SanConfig()).peft_config["default"].graph
    assert graph["model_class"] == "GPT2LMHeadModel"
