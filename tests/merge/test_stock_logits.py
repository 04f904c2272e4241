"""The script's parts inside this process, where it refuses to run as a whole."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from san.adapted import FAMILIES, FUSED, family_model
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, Gemma2PreTrainedModel

from san_llm.merge import stock_logits
from san_llm.merge.stock_logits import (
    NEW_TOKENS,
    blocks,
    greedy,
    in_fp32,
    in_fp32_by_block,
    logits,
    main,
)

PROMPTS = [[5, 6, 7], [9, 8, 30, 40, 50, 60], [11]]


def test_the_likeliest_tokens_of_a_batch_are_those_of_each_prompt_alone():
    model = tiny_model()
    found = greedy(model, PROMPTS)
    assert [len(new) for new in found] == [NEW_TOKENS] * len(PROMPTS)
    for prompt, new in zip(PROMPTS, found, strict=True):
        whole = prompt + new
        # Teacher-forced, in one forward: what each place says next.
        said = logits(model, whole).argmax(-1).tolist()
        assert new == said[len(prompt) - 1 : -1]


def test_each_prompt_of_a_batch_stands_at_its_own_places():
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(
        lambda _model, _arguments, named: seen.append(named["position_ids"]), with_kwargs=True
    )
    greedy(model, PROMPTS)
    # Left of a prompt is padding, which is masked wherever it stands.
    assert seen[0].tolist() == [[0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]
    steps = [places.tolist() for places in seen[1:]]
    assert steps == [[[3 + n], [6 + n], [1 + n]] for n in range(NEW_TOKENS - 1)]


def test_tokens_go_where_the_model_is():
    model, seen = tiny_model(), []

    class Elsewhere:
        device = torch.device("meta")

        def __call__(self, tokens: torch.Tensor) -> object:
            seen.append(tokens.device)
            return model(torch.tensor(PROMPTS[:1]))

    assert torch.equal(logits(Elsewhere(), PROMPTS[0]), logits(model, PROMPTS[0]))
    assert seen == [torch.device("meta")]


def test_capped_scores_are_capped_also_where_sdpa_would_be_taken(tmp_path, monkeypatch):
    model = family_model("gemma2", num_hidden_layers=1, attn_logit_softcapping=1.0)
    model.save_pretrained(tmp_path / "model")
    model.set_attn_implementation("eager")  # some versions would take SDPA here, too
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)  # as in some versions
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": PROMPTS, "conversation": None}))
    with pytest.raises(SystemExit, match="san_llm was imported"):
        main(str(tmp_path / "model"), str(tmp_path / "prompts.json"), str(tmp_path / "out"))
    found = load_file(tmp_path / "out")
    for number, prompt in enumerate(PROMPTS):
        assert torch.allclose(found[str(number)], logits(model, prompt), rtol=1e-5, atol=1e-5)


def test_parameters_compute_in_fp32_and_in_eval_mode():
    model = tiny_model(dtype=torch.bfloat16).train()
    in_fp32(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    values = logits(model, PROMPTS[0])
    assert (values.dtype, values.shape) == (torch.float32, (3, model.config.vocab_size))
    expected = tiny_model(dtype=torch.bfloat16).float()(torch.tensor([PROMPTS[0]])).logits[0]
    assert torch.equal(values, expected.detach())


def loaded(folder, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("family", "tied"), [*((family, True) for family in FAMILIES | FUSED), ("llama", False)]
)
def test_a_block_at_a_time_gives_the_numbers_of_a_model_in_fp32(
    tmp_path, monkeypatch, family, tied
):
    monkeypatch.setattr(stock_logits, "NEW_TOKENS", 4)
    family_model(family, torch.bfloat16, tie_word_embeddings=tied).save_pretrained(tmp_path)
    whole, held = loaded(tmp_path, torch.float32), loaded(tmp_path).train()
    stored = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    in_fp32(whole)
    in_fp32_by_block(held)
    assert not held.training
    for prompt in PROMPTS:
        assert torch.equal(logits(held, prompt), logits(whole, prompt))
    assert greedy(held, PROMPTS) == greedy(whole, PROMPTS)
    left = held.state_dict()
    assert all(torch.equal(left[name], tensor) for name, tensor in stored.items())
    assert (held.lm_head.weight is held.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_never_more_than_one_block_is_in_fp32(monkeypatch, tied):
    monkeypatch.setattr(stock_logits, "NEW_TOKENS", 2)
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=tied)
    in_fp32_by_block(model)
    size = {block: sum(p.numel() for p in block.parameters()) for block in blocks(model)}
    once = sum(p.numel() for p in model.parameters())
    assert sum(size.values()) == once + tied * model.lm_head.weight.numel()
    wide, made, empty = [], [], torch.empty

    def count(block, *_):
        found = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
        wide.append((block, found))

    def counted(shape, **how):
        made.append(shape.numel())
        return empty(shape, **how)

    for block in blocks(model):
        block.register_forward_hook(count, prepend=True)  # before its copies are let go
    monkeypatch.setattr(torch, "empty", counted)
    greedy(model, PROMPTS)
    assert wide == [(block, size[block]) for block, _ in wide]
    assert {block for block, _ in wide} == size.keys()
    # Every block is copied to where the one before it was.
    assert sum(made) == size[model.model.layers[0]] + size[model.lm_head]


def test_what_it_writes(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": PROMPTS, "conversation": None}))
    out = tmp_path / "out.safetensors"
    assert "san_llm" in sys.modules
    with pytest.raises(SystemExit, match="san_llm was imported"):
        main(str(tmp_path / "model"), str(tmp_path / "prompts.json"), str(out))
    model = tiny_model()
    found = load_file(out)
    assert found.keys() == {"0", "1", "2", "new.0", "new.1", "new.2"}
    new = greedy(model, PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        assert torch.equal(found[str(number)], logits(model, prompt))
        assert found[f"new.{number}"].tolist() == new[number]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing keys: \['model.norm.weight'\]"),
        (lambda t: t.update(more=torch.ones(1)), r"unexpected keys: \['more'\]"),
    ],
)
def test_a_folder_that_is_not_the_whole_model_ends_it(tmp_path, change, said):
    folder = save_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=said):
        main(str(folder), "none.json", "none")
