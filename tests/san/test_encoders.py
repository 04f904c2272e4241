"""SAN on encoders and encoder-decoders, against dense references wired by hand."""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from san.adapted import dense_linear, held_against_dense
from torch.func import functional_call
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DebertaV2ForMaskedLM,
    LongformerForMaskedLM,
    ModernBertForMaskedLM,
    T5ForConditionalGeneration,
    WhisperForConditionalGeneration,
)

from san_llm import SanConfig

HEADS = {
    "num_heads": 4,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
WIDTHS = {"vocab_size": 97, "d_model": 32, "hidden_size": 32, "intermediate_size": 40}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WIDTHS |= HEADS | IDS
MODELS = {
    # Its attention reads (tokens, rows, channels).
    "longformer": (LongformerForMaskedLM, {"num_hidden_layers": 2, "attention_window": [4, 4],
                                           "max_position_embeddings": 16}),
    # Its q and k also read distances between tokens, of no row.
    "deberta-v2": (DebertaV2ForMaskedLM, {
        "num_hidden_layers": 2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8, "share_att_key": True, "max_position_embeddings": 16}),
    "modernbert": (ModernBertForMaskedLM, {"num_hidden_layers": 2, "cls_token_id": 1,
                                           "sep_token_id": 2}),
    "t5": (T5ForConditionalGeneration, {"d_kv": 8, "d_ff": 40, "num_layers": 2,
                                        "num_decoder_layers": 2}),
    "whisper": (WhisperForConditionalGeneration, {
        "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
        "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 20}),
}  # fmt: skip


def modernbert():
    """A fused q, k, v, then a gated MLP whose second half is multiplied by what is activated."""
    wired, before = {}, None
    for number in range(2):
        here = f"model.layers.{number}."
        wired[here + "attn.Wqkv"] = (before, None)
        wired[here + "attn.Wo"] = (here + "attn.Wqkv", lambda gamma: gamma[-32:])
        wired[here + "mlp.Wi"] = (here + "attn.Wo", None)
        wired[here + "mlp.Wo"] = (here + "mlp.Wi", lambda gamma: gamma[-40:])
        before = here + "mlp.Wo"
    return wired


def bert(layers, q, k, v):
    wired, before = {}, None
    for number in range(2):
        here = f"{layers}.{number}."
        wired |= {here + "attention.self." + name: (before, None) for name in (q, k, v)}
        wired[here + "attention.output.dense"] = (here + "attention.self." + v, None)
        wired[here + "intermediate.dense"] = (here + "attention.output.dense", None)
        wired[here + "output.dense"] = (here + "intermediate.dense", None)
        before = here + "output.dense"
    return wired


def encoder_decoder(tower, own, cross, up, down, ends):
    """Cross-attention's keys and values read what left the encoder, so that nothing feeds them."""
    q, k, v, o = ends
    wired = {}
    for side in ("encoder", "decoder"):
        before = None
        for number in range(2):
            here = tower[side].format(number)
            for attention in (own[side], cross) if side == "decoder" else (own[side],):
                mine = here + attention
                wired[mine + q] = (before, None)
                wired[mine + k] = wired[mine + v] = (None if attention == cross else before, None)
                wired[mine + o] = (mine + v, None)
                before = mine + o
            wired[here + up[side]] = (before, None)
            wired[here + down[side]] = (here + up[side], None)
            before = here + down[side]
    return wired


def both(name):
    return {"encoder": name, "decoder": name}


WIRED = {
    "longformer": bert("longformer.encoder.layer", "query", "key", "value"),
    "deberta-v2": bert("deberta.encoder.layer", "query_proj", "key_proj", "value_proj"),
    "modernbert": modernbert(),
    "t5": encoder_decoder(
        {side: side + ".block.{}." for side in ("encoder", "decoder")},
        both("layer.0.SelfAttention."),
        "layer.1.EncDecAttention.",
        {"encoder": "layer.1.DenseReluDense.wi", "decoder": "layer.2.DenseReluDense.wi"},
        {"encoder": "layer.1.DenseReluDense.wo", "decoder": "layer.2.DenseReluDense.wo"},
        ("q", "k", "v", "o"),
    ),
    "whisper": encoder_decoder(
        {side: f"model.{side}.layers.{{}}." for side in ("encoder", "decoder")},
        both("self_attn."),
        "encoder_attn.",
        both("fc1"),
        both("fc2"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
}


def small(family):
    torch.manual_seed(3)
    made, values = MODELS[family]
    config = AutoConfig.for_model(family, **WIDTHS | values)
    model = made._from_config(config, attn_implementation="eager").double().eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        else:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def inputs(family):
    torch.manual_seed(8)
    ids = torch.randint(3, 97, (2, 6))
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 32).double(), "decoder_input_ids": ids}
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if family == "t5" else {})}


def dense(model, gammas, family):
    weights = {}
    for name, gamma in gammas.items():
        anterior, lay = WIRED[family][name]
        s = torch.ones(()) if anterior is None else gammas[anterior]
        weights |= dense_linear(model, name, gamma, s if lay is None else lay(s))
    return functional_call(model, weights, kwargs=inputs(family)).logits


@pytest.mark.holds("dense")
@pytest.mark.parametrize("family", WIRED)
def test_it_is_the_dense_model_in_logits_and_every_gradient(family, tmp_path):
    _, _, gammas = held_against_dense(
        small(family),
        inputs(family),
        SanConfig(),
        partial(dense, family=family),
        tmp_path,
        gradients={"rtol": 1e-6, "atol": 1e-8},
        merges=1e-8,
        moves=0.05,
    )
    assert gammas.keys() == WIRED[family].keys()


@pytest.mark.parametrize("family", ["modernbert", "bert"])
def test_a_classification_head_is_trained_whole(family):
    values = WIDTHS | MODELS["modernbert"][1] | {"num_labels": 3}
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForSequenceClassification.from_config(config)
    adapted = get_peft_model(model, SanConfig(modules_to_save=["classifier"]))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in trained if "classifier" in name} == {
        "weight",
        "bias",
    }
    assert all("classifier" in name or ".san_gamma" in name for name in trained)
    ids = torch.randint(3, 97, (2, 6))
    adapted(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
