"""SAN on pictures and on GPT-2, against dense references wired by hand from their source."""

import json
import re
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from san.adapted import assert_same_gradients, held_against_dense
from torch import nn
from torch.func import functional_call
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from san_llm import SanConfig, propagation_graph
from san_llm.errors import InputError
from san_llm.san.layer import SanConvolution
from san_llm.san.measured import pattern
from san_llm.san.options import options_of

BLOCKS = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
BLOCKS |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 16}
STAGES = {"image_size": 64, "patch_size": 4, "depths": [2, 2]}
TOWERS = {"vision_config": BLOCKS, "text_config": {"num_hidden_layers": 1}}
CONFIGS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "bos_token_id": 1,
             "eos_token_id": 1},
    "vit": BLOCKS,
    "deit": BLOCKS | {"architectures": ["DeiTForImageClassification"]},  # of two
    "dinov2": BLOCKS | {"mlp_ratio": 2},
    "clip": TOWERS,
    "siglip": TOWERS,
    "swin": STAGES | {"embed_dim": 48, "num_heads": [4, 8], "window_size": 4},
    "swinv2": STAGES
    | {"embed_dim": 48, "num_heads": [4, 8], "window_size": 4, "depths": [1, 1]},
    # Of many channels, some of which a ReLU keeps at 0 everywhere.
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]},
    "convnext": STAGES | {"hidden_sizes": [32, 48], "num_stages": 2},
    "convnextv2": STAGES | {"hidden_sizes": [32, 48], "num_stages": 2},
}  # fmt: skip
NO_ATTENTION = ("resnet", "convnext", "convnextv2")
GPT2 = "transformer.h.{}."


def vit_like(block, embedding, attention="attention", o="o_proj"):
    wired = {}
    for number in range(2):
        here, before = block.format(number), block.format(number - 1)
        first = before + "mlp.fc2" if number else embedding
        wired |= {f"{here}{attention}.{x}_proj": (first, None) for x in "qkv"}
        wired[f"{here}{attention}.{o}"] = (f"{here}{attention}.v_proj", None)
        wired[here + "mlp.fc1"] = (f"{here}{attention}.{o}", None)
        wired[here + "mlp.fc2"] = (here + "mlp.fc1", None)
    return wired


def tower_like():
    block, embedding = "vision_model.encoder.layers.{}.", "vision_model.embeddings.patch_embedding"
    return vit_like(block, embedding, "self_attn", "out_proj")


def gpt2():
    wired = {}
    for number in range(2):
        here, before = GPT2.format(number), GPT2.format(number - 1)
        wired[here + "attn.c_attn"] = (before + "mlp.c_proj" if number else "transformer.wte", None)
        wired[here + "attn.c_proj"] = (here + "attn.c_attn", lambda gamma: gamma[64:])
        wired[here + "mlp.c_fc"] = (here + "attn.c_proj", None)
        wired[here + "mlp.c_proj"] = (here + "mlp.c_fc", None)
    return wired


SWIN = {f"{x}_proj": f"attention.{x}_proj" for x in "qkvo"} | {"up": "mlp.fc1", "down": "mlp.fc2"}
SWINV2 = {f"{x[0]}_proj": f"attention.self.{x}" for x in ("query", "key", "value")}
SWINV2 |= {"o_proj": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}


def swin(model, names, blocks):
    first, last = f"{model}.embeddings.patch_embeddings.projection", None
    wired = {}
    for stage in range(2):
        for number in range(blocks):
            at = {
                k: f"{model}.encoder.layers.{stage}.blocks.{number}.{n}" for k, n in names.items()
            }
            wired |= {at[f"{x}_proj"]: (last or first, None) for x in "qkv"}
            wired[at["o_proj"]] = (at["v_proj"], None)
            wired[at["up"]] = (at["o_proj"], None)
            wired[at["down"]] = (at["up"], None)
            last = at["down"]
        if stage == 0:
            reduction = f"{model}.encoder.layers.0.downsample.reduction"
            wired[reduction] = (last, lambda gamma: gamma.repeat(4))
            last = reduction
    return wired


def resnet():
    """What joins blocks is their sum, which a shortcut writes last where there is one."""
    wired, last = {}, "resnet.embedder.embedder.convolution"
    for stage in range(2):
        for number in range(2):
            here = f"resnet.encoder.stages.{stage}.layers.{number}."
            for place in range(3):
                convolution = f"{here}layer.{place}.convolution"
                wired[convolution] = (last, None)
                last = convolution
            if (stage, number) == (1, 0):
                wired[last := f"{here}shortcut.convolution"] = (None, None)
    return wired


def convnext(stages):
    wired = {}
    for stage in range(2):
        for number in range(2):
            here = f"{stages}.{stage}.layers.{number}."
            wired[here + "pwconv1"] = (here + "dwconv", None)
            wired[here + "pwconv2"] = (here + "pwconv1", None)
    wired[f"{stages}.1.downsampling_layer.1"] = (f"{stages}.0.layers.1.pwconv2", None)
    return wired


def authors(block, embedding):
    """Return the map of the authors' ``SAN_base``: nothing feeds the attention's output."""
    wired = {}
    for number in range(2):
        here = block.format(number)
        wired |= {f"{here}attention.{x}_proj": (embedding, None) for x in "qkv"}
        wired[here + "mlp.fc1"] = (f"{here}attention.o_proj", None)
        wired[here + "mlp.fc2"] = (here + "mlp.fc1", None)
    return wired


AUTHORS = {
    "vit": authors("vit.layers.{}.", "vit.embeddings.patch_embeddings.projection"),
    "deit": authors("deit.layers.{}.", "deit.embeddings.patch_embeddings.projection"),
    "dinov2": authors("dinov2.encoder.layer.{}.", "dinov2.embeddings.patch_embeddings.projection"),
}
WIRED = {
    "gpt2": gpt2(),
    "vit": vit_like("vit.layers.{}.", "vit.embeddings.patch_embeddings.projection"),
    "deit": vit_like("deit.layers.{}.", "deit.embeddings.patch_embeddings.projection"),
    "dinov2": vit_like("dinov2.encoder.layer.{}.", "dinov2.embeddings.patch_embeddings.projection"),
    "clip": tower_like(),
    "siglip": tower_like(),
    "swin": swin("swin", SWIN, 2),
    "swinv2": swin("swinv2", SWINV2, 1),
    "resnet": resnet(),
    "convnext": convnext("convnext.encoder.stages"),
    "convnextv2": convnext("convnextv2.encoder.stages"),
}


def small(family):
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **CONFIGS[family])
    made = AutoModelForCausalLM if family == "gpt2" else AutoModelForImageClassification
    model = made.from_config(
        config, attn_implementation=None if family in NO_ATTENTION else "eager"
    )
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    return model.requires_grad_(False)


def inputs(family):
    torch.manual_seed(8)
    if family == "gpt2":
        return {"input_ids": torch.randint(3, 97, (2, 6))}
    size = CONFIGS[family].get("vision_config", CONFIGS[family]).get("image_size", 64)
    return {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float64)}


def along(vector, axis, weight):
    return vector.reshape([-1 if place == axis else 1 for place in range(weight.dim())])


def dense(model, gammas, family, wired=None):
    wired = wired or WIRED[family]
    weights = {}
    for name, gamma in gammas.items():
        module = model.get_submodule(name)
        rows, columns = (1, 0) if isinstance(module, (Conv1D, nn.Embedding)) else (0, 1)
        weight = module.weight * along(gamma, rows, module.weight)
        anterior, lay = wired.get(name, (None, None))
        if anterior in gammas:
            s = gammas[anterior] if lay is None else lay(gammas[anterior])
            weight = weight * along(s, columns, weight)
        weights[f"{name}.weight"] = weight
        if getattr(module, "bias", None) is not None:
            weights[f"{name}.bias"] = gamma * module.bias
    if family == "gpt2" and "transformer.wte" in gammas:  # the head stays as it was
        weights["lm_head.weight"] = model.lm_head.weight
    return functional_call(model, weights, kwargs=inputs(family), tie_weights=False).logits


@pytest.mark.holds("dense")
@pytest.mark.parametrize("first", [False, True], ids=["", "with its embedding"])
@pytest.mark.parametrize("family", WIRED)
def test_it_is_the_dense_model_in_logits_and_every_gradient(family, first, tmp_path):
    base, given = small(family), inputs(family)
    names = {name for name, _ in base.named_modules()}
    if not WIRED[family].keys() <= names:
        pytest.skip("this version of transformers names its modules otherwise")
    if first and "convnext" in family:  # a depthwise convolution reads the patches
        with pytest.raises(InputError, match=r"adapt_embedding: no embedding of a .* feeds a mod"):
            get_peft_model(base, SanConfig(adapt_embedding=True))
        return
    _, _, gammas = held_against_dense(
        base,
        given,
        SanConfig(adapt_embedding=first),
        partial(dense, family=family),
        tmp_path,
        gradients={"rtol": 1e-6, "atol": 1e-8},
        merges=1e-8,
        moves=0.05,
    )
    if first:
        assert {a for a, _ in WIRED[family].values() if a} <= gammas.keys()


@pytest.mark.parametrize("family", AUTHORS)
def test_the_authors_wiring_is_its_own_dense_model(family, tmp_path):
    base, given = small(family), inputs(family)
    names, wired = {name for name, _ in base.named_modules()}, AUTHORS[family]
    if not wired.keys() <= names:
        pytest.skip("this version of transformers names its modules otherwise")
    merged, theirs, gammas = held_against_dense(
        deepcopy(base),
        given,
        SanConfig(wiring="authors"),
        partial(dense, family=family, wired=wired),
        tmp_path,
        gradients={"rtol": 1e-6, "atol": 1e-8},
        merges=1e-8,
        moves=0.05,
    )
    assert {anterior for anterior, _ in wired.values()} <= gammas.keys()
    merged.save_pretrained(tmp_path / "merged")
    stock = type(base).from_pretrained(tmp_path / "merged").double()
    torch.testing.assert_close(stock(**given).logits, theirs, rtol=1e-4, atol=1e-4)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    found = {link["posterior"]: link["anterior"] for link in saved["graph"]["links"]}
    assert found == {posterior: anterior for posterior, (anterior, _) in wired.items()}


def test_the_authors_wiring_is_of_a_plain_vit_alone():
    said = r"wiring 'authors': is that of the authors' code for vit, deit, dinov2, and a {} has"
    for family in ("swin", "gpt2"):
        with pytest.raises(InputError, match=said.format(family)):
            get_peft_model(small(family), SanConfig(wiring="authors"))
    with pytest.raises(InputError, match=said.format("llama")):
        propagation_graph(AutoConfig.for_model("llama"), SanConfig(wiring="authors"))
    with pytest.raises(InputError, match="links: free propagates nothing"):
        SanConfig(wiring="authors", links="free")
    with pytest.raises(
        InputError, match=r"wiring: 'author' is not one of .*did you mean 'authors'"
    ):
        SanConfig(wiring="author")


def test_a_depthwise_convolution_has_a_gamma_and_no_columns():
    base = small("convnext")
    graph = {node.name: node for node in propagation_graph(base, SanConfig(links="free"))}
    depthwise = graph["convnext.encoder.stages.0.layers.0.dwconv"]
    assert (depthwise.d_out, depthwise.gamma, depthwise.sigma) == (32, True, False)
    adapted = get_peft_model(base, SanConfig(links="free"))
    for name, parameter in adapted.named_parameters():
        if ".san_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    logits = adapted(**inputs("convnext")).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs("convnext")).logits, logits, rtol=1e-8, atol=1e-8)


def test_targets_are_no_modules_of_other_kinds_at_the_same_place_of_other_stages():
    """A DINOv3 ConvNeXt has its norm behind the first convolution, and before all others."""
    names, norms = ["stages.0.down.0", "stages.1.down.1"], ["stages.0.down.1", "stages.1.down.0"]
    found = pattern(names, [*names, *norms])
    assert [name for name in (*names, *norms) if re.fullmatch(found, name)] == names
    assert pattern(names, names) == r"stages\.\d+\.down\.0|stages\.\d+\.down\.1"


def test_a_shift_and_the_head_trained_whole():
    base, given = small("vit"), inputs("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # every target has a bias: nothing is told
        adapted = get_peft_model(base, SanConfig(shift=True, modules_to_save=["classifier"]))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("classifier.modules_to_save" in name for name in trained)
    assert any("san_beta" in name for name in trained)
    logits = adapted(**given).logits
    logits.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    for name, parameter in adapted.named_parameters():
        if "san_beta" in name:
            parameter.data += 0.2
    logits = adapted(**given).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**given).logits, logits, rtol=1e-8, atol=1e-8)


def test_a_shift_of_a_module_without_a_bias_is_told_by_its_name():
    with pytest.warns(UserWarning, match=r"downsample\.reduction has no bias.*will never merge"):
        adapted = get_peft_model(small("swin"), SanConfig(shift=True))
    with pytest.raises(InputError, match=r"a stock swin cannot hold .*reduction has none"):
        adapted.merge_and_unload()


LOW_RANK = {"r": 3, "lora_alpha": 2.0}
DENSE = {  # a kernel of 2 x 2 between stages; one over a whole patch
    "convnext": {"target_modules": r".*(pwconv\d|downsampling_layer\.1)"},
    "vit": {"adapt_embedding": True},
}


def matrices(model):
    """Return what low-rank carriers train, by module: A, B and perhaps a magnitude."""
    found = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.removeprefix("base_model.model.").partition(".san_")
        if kind:
            found.setdefault(module, {})[kind.removesuffix(".default")] = parameter
    return found


def dense_low_rank(model, trained, family, carrier, mode):
    """Return logits of the formula's dense kernels: a row is all that makes one channel."""
    rows, gammas = {}, {}
    for name, own in trained.items():
        w = model.get_submodule(name).weight.flatten(1)
        v = w + 2.0 / 3 * own["lora_B"].flatten(1) @ own["lora_A"].flatten(1)
        norm, adapted = w.square().sum(1).sqrt(), v.square().sum(1).sqrt()
        if carrier == "lora":
            gammas[name] = adapted / norm
            rows[name] = v * (norm / adapted)[:, None] if mode == "synapse" else v
        else:
            magnitude, adapted = own.get("magnitude", norm), adapted.detach()
            gammas[name] = magnitude / norm
            rows[name] = v * ((norm if mode == "synapse" else magnitude) / adapted)[:, None]
    weights = {}
    for name, row in rows.items():
        weight = row.reshape(model.get_submodule(name).weight.shape)
        anterior, _ = WIRED[family].get(name, (None, None))
        if anterior in gammas:
            weight = weight * along(gammas[anterior], 1, weight)
        weights[f"{name}.weight"] = weight
    return functional_call(model, weights, kwargs=inputs(family)).logits


@pytest.mark.parametrize(("carrier", "mode"), [("lora", "both"), ("lora", "synapse"),
                                               ("dora", "both"), ("dora", "synapse")])  # fmt: skip
@pytest.mark.parametrize("family", DENSE)
def test_the_matrices_of_a_convolution_are_those_of_a_dense_kernel(family, carrier, mode, tmp_path):
    base, given = small(family), inputs(family)
    plain, before = deepcopy(base), base(**given).logits
    options = SanConfig(carrier=carrier, mode=mode, **LOW_RANK, **DENSE[family])
    adapted = get_peft_model(base, options)
    torch.testing.assert_close(adapted(**given).logits, before, rtol=1e-12, atol=1e-12)
    assert propagation_graph(adapted).trained == adapted.get_nb_trainable_parameters()[0]
    trained = matrices(adapted)
    kernels = [own["lora_A"] for own in trained.values() if own["lora_A"].dim() == 4]
    assert [kernel.shape[0] for kernel in kernels] == [3]
    for own in trained.values():
        own["lora_B"].data += 0.3 * torch.randn_like(own["lora_B"])
        if "magnitude" in own:
            own["magnitude"].data *= 1 + 0.3 * torch.rand_like(own["magnitude"])
    ours = adapted(**given).logits
    theirs = dense_low_rank(plain, trained, family, carrier, mode)
    assert (theirs - before).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    flat = {f"{name} {kind}": p for name, own in trained.items() for kind, p in own.items()}
    assert_same_gradients(ours, theirs, flat)

    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(**given).logits, ours)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(**given).logits, ours, rtol=1e-8, atol=1e-8)
    loaded.unmerge_adapter()
    with loaded.disable_adapter():
        assert torch.equal(loaded(**given).logits, before)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**given).logits, ours, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": 1}, {"padding": "same", "padding_mode": "reflect", "dilation": 2}],
    ids=str,
)
@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_matrices_take_the_stride_padding_and_dilation_of_their_convolution(carrier, options):
    torch.manual_seed(0)
    for made, pixels in ((nn.Conv1d, (9,)), (nn.Conv2d, (9, 8))):
        base = made(4, 6, 3, bias=made is nn.Conv2d, **options).double()
        layer = SanConvolution(base)
        layer.update_layer("default", options_of(SanConfig(carrier=carrier)), True, False, False)
        layer.set_adapter("default")
        x = torch.randn(2, 4, *pixels, dtype=torch.float64)
        torch.testing.assert_close(layer(x), base(x))
        layer.san_lora_B["default"].data.normal_()
        adapted = layer(x)
        assert (adapted - base(x)).abs().max() > 0.1
        layer.merge()
        torch.testing.assert_close(layer(x), adapted)


@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_matrices_are_for_linears_and_dense_convolutions(carrier):
    said = f"carrier '{carrier}': has matrices for Linear layers and dense convolutions, and "
    with pytest.raises(InputError, match=f"{said}.*c_attn is a Conv1D: take carrier 'scale'"):
        get_peft_model(small("gpt2"), SanConfig(carrier=carrier))
    with pytest.raises(InputError, match=f"{said}.*dwconv is a Conv2d in groups, whose channels"):
        get_peft_model(small("convnext"), SanConfig(carrier=carrier))


def test_names_of_older_versions_of_transformers_are_answered_with_todays():
    base = small("vit")
    if "vit.layers.0.attention.q_proj" not in {name for name, _ in base.named_modules()}:
        pytest.skip("this version of transformers names its modules otherwise")
    both = r"'query' matches no module.*: in transformers .* 'query' is q_proj; 'value' is v_proj"
    with pytest.raises(InputError, match=both):
        get_peft_model(base, SanConfig(target_modules=["query", "value"]))
    for target, said in ((["fc1", "output.dense"], "o_proj, fc2"), (".*value", "v_proj")):
        with pytest.raises(InputError, match=f"transformers .* calls it {said}$"):
            propagation_graph(base, SanConfig(target_modules=target))
