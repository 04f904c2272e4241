"""Merges over quantized bases, in a stock process, against the quantized base + adapter in fp32."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from merge.stock import stock_logits, verify_in_this_process
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from san.adapted import adapt, family_model, text
from tiny import rows, tiny_model, tiny_tokenizer, write_recipe, write_rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from san_llm.errors import InputError, SanError
from san_llm.merge.request import MergeRequest, check_request
from san_llm.merge.run import merge
from san_llm.merge.verify import PROMPTS, verify
from san_llm.models.subject import find_subject
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest

FP32, BF16 = torch.float32, torch.bfloat16
WHOLE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
DOUBLE, SINGLE = {"bnb_4bit_use_double_quant": True}, {"bnb_4bit_use_double_quant": False}
TIED = {"tie_word_embeddings": True}
FP4 = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}

# name: (adapter's options, family, base's config, base's dtype, its quantization)
CASES = {
    "both": ({}, "llama", {}, FP32, DOUBLE),
    "single": ({}, "llama", {}, FP32, SINGLE),
    "fp4": ({}, "llama", {}, FP32, FP4),
    "bf16": ({}, "llama", {}, BF16, DOUBLE),
    "MQA": ({}, "llama", {"num_key_value_heads": 1}, FP32, DOUBLE),
    "MHA": ({}, "llama", {"num_key_value_heads": 4}, FP32, DOUBLE),
    "neuron": ({"mode": "neuron"}, "llama", {}, FP32, DOUBLE),
    "synapse": ({"mode": "synapse"}, "llama", {}, FP32, DOUBLE),
    "attention": ({"links": ["attention"]}, "llama", {}, FP32, SINGLE),
    "mlp, residual": ({"links": ["mlp", "residual"]}, "llama", {}, FP32, SINGLE),
    "few targets": ({"target_modules": ["v_proj", "o_proj"]}, "llama", {}, FP32, DOUBLE),
    "embedding": ({"adapt_embedding": True}, "llama", {}, FP32, DOUBLE),
    "embedding, tied": ({"adapt_embedding": True}, "llama", TIED, FP32, DOUBLE),
    "qwen2": ({}, "qwen2", {}, FP32, DOUBLE),
    "gemma": ({"train_norms": True}, "gemma", {"head_dim": 16}, FP32, DOUBLE),
    "phi3": ({}, "phi3", {}, FP32, DOUBLE),
}
WAYS = ("keep", "dequantize")


def in_fp32(model):
    """Let a 4-bit model compute in fp32 whatever it was quantized from."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    return model.eval()


def quantize(folder, source, dtype=FP32, **options):
    """Save what bitsandbytes makes of a full-precision checkpoint; return the folder."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    if not options.get("load_in_8bit"):
        options = {"load_in_4bit": True} | settings | options
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=FP32, **how).eval()


STOCK = """# forked from: stock
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folders, tokens, out = json.loads(sys.argv[1])
logits = {}
for folder in folders:
    model, problems = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(problems.values()), problems
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    with torch.no_grad():
        logits[folder] = model.eval()(torch.tensor(tokens)).logits
save_file(logits, out)
assert not {"san_llm", "peft"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Merge every case in both ways; return ``{(name, way): (base, adapter, merged, logits)}``."""
    made = {}
    for number, (name, (options, family, changes, dtype, kind)) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        model = family_model(family, dtype=dtype, **(WHOLE | changes))
        model.save_pretrained(folder / "full")
        base = quantize(folder / "base", folder / "full", dtype, **kind)
        adapt(load(folder / "full"), seed=number, **options).save_pretrained(folder / "adapter")
        subject = find_subject(str(base), folder / "adapter")
        for way in WAYS:
            result = merge(MergeRequest(subject, folder / way, "float32", quantized=way))
            assert (result.quantized, result.trained_over) == (way, "4bit")
            assert result.parameters - untied(options, changes) == model.num_parameters()
            made[name, way] = (base, folder / "adapter", folder / way)
    logits = stock_logits(
        STOCK,
        [out for *_, out in made.values()],
        tmp_path_factory.mktemp("stock") / "logits.safetensors",
    )
    return {key: (*paths, logits[str(paths[-1])]) for key, paths in made.items()}


def untied(options, changes):
    """Return how many numbers an output head adds that the base ties to its embedding."""
    tied = changes.get("tie_word_embeddings") and options.get("adapt_embedding")
    return tiny_tokenizer().vocab_size * WHOLE["hidden_size"] if tied else 0


def apart(found, expected):
    """Return the largest difference in units of the largest expected number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", list(CASES))
def test_stock_transformers_answers_as_the_quantized_base_and_adapter(merged, name, way):
    base, adapter, _, logits = merged[name, way]
    with torch.no_grad():
        expected = in_fp32(PeftModel.from_pretrained(load(base), adapter))(text()).logits
        plain = in_fp32(load(base))(text()).logits
    assert apart(logits, expected) < 1e-4
    assert apart(plain, expected) > 1e-1, "the adapter matters"


@pytest.mark.parametrize("name", list(CASES))
def test_a_kept_checkpoint_has_the_codes_of_its_base(merged, name):
    base, _, out, _ = merged[name, "keep"]
    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    codes = {key for key, tensor in before.items() if key.endswith("proj.weight")}
    assert len(codes) >= 4 * 3
    for key in codes:
        assert after[key].dtype == torch.uint8
        assert torch.equal(after[key], before[key]), key
        # One fp32 scale for each block of 64 numbers, two of which are in a byte.
        assert after[f"{key}.absmax"].dtype == torch.float32
        assert len(after[f"{key}.absmax"]) == len(after[key]) * 2 // 64
        assert f"{key}.nested_absmax" not in after
    size = sum(t.numel() * t.itemsize for k, t in after.items() if "proj.weight" in k)
    count = sum(2 * len(after[key]) for key in codes)
    assert size < 4.5 / 8 * count + 200 * len(codes), "4.5 bits a number, and a table of codes each"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is False
    assert config["load_in_4bit"] is True


@pytest.mark.parametrize("name", list(CASES))
def test_a_dequantized_checkpoint_is_a_plain_one(merged, name):
    _, _, out, _ = merged[name, "dequantize"]
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {FP32}
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


def test_scales_below_and_at_zero_were_among_those_merged(merged):
    for name in ("both", "single"):
        saved = load_file(merged[name, "keep"][1] / "adapter_model.safetensors")
        values = torch.cat(list(saved.values()))
        assert (values < 0).any()
        assert (values == 0).any()


def test_stock_inference_as_it_comes_is_near_too(merged):
    # Some CPUs repack 4-bit weights for bf16 arithmetic: scales of either sign must survive that.
    _, adapter, out, _ = merged["both", "keep"]
    base = merged["both", "keep"][0]
    with torch.no_grad():
        expected = in_fp32(PeftModel.from_pretrained(load(base), adapter))(text()).logits
        assert apart(load(out)(text()).logits, expected) < 5e-2


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A full-precision base and, beside it, what 4 and 8 bits make of it."""
    folder = tmp_path_factory.mktemp("full")
    tiny_model(**WHOLE).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    quantize(folder / "4bit", folder / "base", **DOUBLE)
    quantize(folder / "8bit", folder / "base", load_in_8bit=True)
    return folder


def adapter_for(full, folder, **options):
    adapt(load(full / "base"), **options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"carrier": "lora"}, "the lora carrier changes weights within their 4-bit blocks"),
        ({"carrier": "dora"}, "the dora carrier changes weights"),
        ({"shift": True}, "a shift needs biases"),
        (
            {"target_modules": ["q_proj", "v_proj", "down_proj"]},
            r"model\.layers\.1\.input_layernorm: k_proj reads it and has no column scale, ",
        ),
        ({"target_modules": ["o_proj", "up_proj"]}, "post_attention_layernorm: gate_proj reads it"),
        ({"modules_to_save": ["norm"]}, "has whole modules beside its scales"),
        ({"links": "free"}, "links: free trains column scales, which go across the 4-bit blocks"),
    ],
)
def test_what_4_bits_cannot_hold_is_refused_and_dequantized_instead(full, here, options, said):
    subject = find_subject(str(full / "4bit"), adapter_for(full, here / "adapter", **options))
    with pytest.raises(InputError, match=said):
        merge(MergeRequest(subject, Path("out"), quantized="keep"))
    with pytest.raises(InputError, match="--gguf: 4-bit weights of bitsandbytes are not written"):
        merge(MergeRequest(subject, Path("out"), quantized="keep", gguf="f16"))
    assert os.listdir() == ["adapter"]
    merge(MergeRequest(subject, Path("out"), "float32", quantized="dequantize"))
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load(full / "4bit"), here / "adapter")
        expected = in_fp32(adapted)(text()).logits
        assert apart(load("out")(text()).logits, expected) < 1e-4


@pytest.mark.parametrize(
    ("family", "tied", "plain"),
    [("llama", False, None), ("llama", True, None), ("qwen2", False, ["k_proj", "lm_head"])],
)
def test_a_scaled_embedding_is_kept_beside_4_bits(here, family, tied, plain):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    family_model(family, **shape, tie_word_embeddings=tied).save_pretrained("full")
    quantize(here / "base", here / "full", **DOUBLE, llm_int8_skip_modules=plain)
    adapt(load("full"), adapt_embedding=True).save_pretrained("adapter")
    merge(MergeRequest(find_subject("base", Path("adapter")), Path("out"), quantized="keep"))
    stock = load("out")
    assert not stock.config.tie_word_embeddings
    with torch.no_grad():
        expected = in_fp32(PeftModel.from_pretrained(load("base"), "adapter"))(text()).logits
        assert apart(in_fp32(stock)(text()).logits, expected) < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_files_are_cut_to_the_size_asked_for(full, here, way):
    subject = find_subject(str(full / "4bit"), adapter_for(full, here / "adapter"))
    merge(MergeRequest(subject, Path("out"), quantized=way, shard_size=20_000))
    sizes = [path.stat().st_size for path in Path("out").glob("*.safetensors")]
    largest = load("out").model.embed_tokens.weight
    allowed = max(20_000, largest.numel() * largest.element_size()) + 5_000  # and a header
    assert len(sizes) > 2
    assert max(sizes) < allowed


def test_rows_that_share_a_block_are_refused_by_name(here):
    tiny_model(**(WHOLE | {"intermediate_size": 96})).save_pretrained("full")
    quantize(here / "base", here / "full", **DOUBLE)
    adapt(load("full")).save_pretrained("adapter")
    with pytest.raises(InputError, match=r"down_proj: its rows of 96 numbers are not whole blocks"):
        merge(MergeRequest(find_subject("base", Path("adapter")), Path("out"), quantized="keep"))
    merge(MergeRequest(find_subject("base", Path("adapter")), Path("out"), quantized="dequantize"))


def test_8_bits_are_dequantized_but_not_kept(full, here):
    subject = find_subject(str(full / "8bit"), adapter_for(full, here / "adapter"))
    with pytest.raises(InputError, match="only weights in 4 bits can be kept, these are in 8"):
        merge(MergeRequest(subject, Path("out"), quantized="keep"))
    result = merge(MergeRequest(subject, Path("out"), "float32", quantized="dequantize"))
    assert result.trained_over == "8bit"
    stored, found = (load_file(f / "model.safetensors") for f in (full / "8bit", Path("out")))
    saved = load_file("adapter/adapter_model.safetensors")
    name = "model.layers.1.mlp.gate_proj"
    gamma = saved[f"base_model.model.{name}.san_gamma"]
    s = saved["base_model.model.model.layers.1.self_attn.o_proj.san_gamma"]
    numbers = stored[f"{name}.weight"].double() * stored[f"{name}.SCB"].double()[:, None] / 127
    expected = gamma[:, None].double() * numbers * s.double()
    assert torch.allclose(found[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-9)


def test_a_lora_adapter_is_merged_into_the_dequantized_numbers(full, here):
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
    get_peft_model(load(full / "base"), config).save_pretrained("adapter")
    subject = find_subject(str(full / "4bit"), Path("adapter"))
    with pytest.raises(InputError, match="a LORA adapter changes weights within their 4-bit"):
        merge(MergeRequest(subject, Path("out"), quantized="keep"))
    merge(MergeRequest(subject, Path("out"), "float32", quantized="dequantize"))
    with torch.no_grad():
        expected = in_fp32(PeftModel.from_pretrained(load(full / "4bit"), "adapter"))(text()).logits
        assert apart(load("out")(text()).logits, expected) < 1e-4


def test_a_lora_adapter_of_a_tied_head_leaves_the_dequantized_embedding(here):
    tiny_model(**WHOLE, tie_word_embeddings=True).save_pretrained("full")
    quantize(here / "4bit", here / "full")
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    get_peft_model(load("full"), config).save_pretrained("adapter")
    subject = find_subject("4bit", Path("adapter"))
    merge(MergeRequest(subject, Path("out"), "float32", quantized="dequantize"))
    with torch.no_grad():
        expected = in_fp32(PeftModel.from_pretrained(load("4bit"), "adapter"))(text()).logits
        assert apart(load("out")(text()).logits, expected) < 1e-4


def test_a_scale_beyond_the_range_leaves_nothing(full, here):
    adapter_for(full, here / "adapter")
    path = here / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.full_like(v, 1e38) for k, v in load_file(path).items()}, path)
    for way, said in (("keep", "float32 cannot hold"), ("dequantize", "are not finite")):
        with pytest.raises(SanError, match=f"numbers that {said}"):
            merge(
                MergeRequest(
                    find_subject(str(full / "4bit"), Path("adapter")), Path("out"), quantized=way
                )
            )
    assert os.listdir() == ["adapter"]


# --- at the command line ---


def refused(done, message):
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_quantized_base_asks_how(command, full, here):
    adapter_for(full, here / "adapter")
    asked = ("merge", "--adapter", "adapter", "--output", "out", "--model", full / "4bit")
    refused(command(*asked), "--quantized dequantize or --quantized keep")
    refused(command(*asked, "--quantized", "kep"), "'kep' is not one of dequantize, keep (did you")
    asked = (*asked[:-1], full / "base", "--quantized", "keep")
    refused(command(*asked), "not quantized, and the adapter's run did not quantize it")
    config = json.loads((full / "base" / "config.json").read_text())
    (here / "other").mkdir()
    (here / "other" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    refused(command(*asked[:-3], "other", *asked[-2:]), "other: quantized by gptq; only bitsandby")
    assert sorted(os.listdir()) == ["adapter", "other"]


@pytest.fixture
def run(here, full):
    """A finished run that trained over 4 bits of the full-precision base, in bf16."""
    data = write_rows(here / "rows.json", rows(8))
    path = write_recipe(here / "mine.yaml", full / "base", data)
    recipe = load_recipe(path, ["base.quantization=4bit", "base.dtype=bfloat16"])
    folder = new_run(recipe, None, False)
    adapter_for(full, folder / "adapter")
    point_latest(folder)
    return folder


def answers(model):
    """Return the logits of what a verification asks."""
    with torch.no_grad():
        return [
            model(torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])).logits
            for prompt in PROMPTS
        ]


@pytest.mark.parametrize(
    ("way", "stored"),
    [(None, None), ("keep", None), ("dequantize", None), (None, "4bit"), ("dequantize", "8bit")],
)
def test_a_verification_takes_the_model_that_was_merged(full, here, monkeypatch, way, stored):
    verify_in_this_process(monkeypatch)
    changes = [] if stored else ["base.dtype=bfloat16", "base.quantization=4bit"]
    data = write_rows(here / "rows.json", rows(8))
    recipe = load_recipe(write_recipe(here / "mine.yaml", full / (stored or "base"), data), changes)
    folder = new_run(recipe, None, False)
    adapter_for(full, folder / "adapter")
    model = str(full / "base") if way is None else None
    asked = MergeRequest(
        find_subject(model, folder / "adapter"), Path("out"), "float32", False, True, quantized=way
    )
    check = merge(asked).verified
    assert 0 <= check.relative <= check.bound
    assert check.adapter_moved > 10 * check.largest_difference
    assert (check.weight_errors is None) == (way == "keep")
    if way is None:
        again = quantize(here / "again", full / "base", FP32 if stored else BF16, **DOUBLE)
        trained = in_fp32(PeftModel.from_pretrained(load(again), folder / "adapter"))
        pairs = zip(answers(load("out")), answers(trained), strict=True)
        moved = max(float((a - b).abs().max()) for a, b in pairs)
        assert check.quantization_moved == pytest.approx(moved, rel=1e-3)
    else:
        assert check.quantization_moved is None
    file = Path("out/model.safetensors")
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    tensors[f"{name}.absmax" if way == "keep" else name][:64] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SanError, match="is unexplained where"):
        verify(Path("out"), check_request(replace(asked, output=Path("new"))))


@pytest.mark.slow
@pytest.mark.parametrize("way", [None, *WAYS])
def test_each_way_is_verified_against_the_model_that_was_trained(command, run, full, way):
    done = command("merge", "--verify", "--json", *(("--quantized", way) if way else ()))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    check = result["verified"]
    assert 0 <= check["relative"] <= check["bound"]
    assert result["trained_over"] == "4bit"
    assert result["dtype"] == {None: "float32", "keep": "bfloat16", "dequantize": "bfloat16"}[way]
    assert (check["quantization_moved"] is None) == (way is not None)
    assert (check["weight_errors"] is None) == (way == "keep")
    if way is None:
        # Against the trained model itself, worked out here.
        quantize(Path("again"), full / "base", BF16, **DOUBLE)
        kept = in_fp32(PeftModel.from_pretrained(load("again"), run / "adapter"))
        tokens = torch.tensor([tiny_tokenizer()("The capital of France is")["input_ids"]])
        with torch.no_grad():
            moved = (load(run / "merged")(tokens).logits - kept(tokens).logits).abs().max().item()
        assert moved <= check["quantization_moved"] * (1 + 1e-4)
        assert moved > 1e-2
    card = (run / "merged" / "README.md").read_text()
    assert ("outputs are those seen in training." in card) == (way is not None)
    assert ("4 bits and bfloat16" in card) == (way == "keep")


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_stored_quantized_base_goes_all_the_way(command, full, here, bits):
    data = write_rows(here / "rows.json", rows(8))
    recipe = write_recipe(here / "mine.yaml", full / bits, data)
    done = command("train", recipe, f"base.quantization={bits}")
    told = f"base.quantization: {full / bits} is stored in {bits}: leave it out"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {told}")
    for words in (
        ("train", recipe),
        ("eval", "--tasks", "boolq", "--limit", 1),
        ("merge", "--quantized", "dequantize", "--verify"),
    ):
        done = command(*words)
        assert done.returncode == 0, done.stderr
    done = command("merge", "--output", "out", "--model", full / "base", "--verify", "--json")
    assert f"trained over a {bits} base, merged into the full-precision {full}" in done.stderr
    result = json.loads(done.stdout)
    assert result["trained_over"] == bits
    assert result["verified"]["quantization_moved"] > 0
    done = command("merge", "--quantized", "keep", "--output", "kept", "--verify")
    assert done.returncode == (0 if bits == "4bit" else 2), done.stderr


@pytest.mark.slow
def test_one_wrong_scale_in_4_bits_fails_the_verification(command, run, monkeypatch):
    import san_llm.merge.in_memory
    from san_llm.merge.quantized import keep

    def wrong(adapted):
        kept = keep(adapted)
        kept.model.layers[1].mlp.up_proj.weight.quant_state.absmax[:64] *= -1
        return kept

    monkeypatch.setattr(san_llm.merge.in_memory, "keep", wrong)
    for asked, said in (("--verify", "is unexplained where"), (None, "it answers otherwise")):
        done = command("merge", *filter(None, [asked]), "--quantized", "keep")
        assert done.returncode == 1
        assert said in done.stderr
        assert not (run / "merged").exists()
    assert command("merge", "--no-verify", "--quantized", "keep").returncode == 0
