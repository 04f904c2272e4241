"""An adapter that lies with the tokenizer and the template it was trained with, as TRL saves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATE, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from san_llm import SanConfig
from san_llm.errors import InputError
from san_llm.merge.run import copy_companions
from san_llm.models.load import load_base
from san_llm.models.locate import find_base
from san_llm.models.tokenizer import load_tokenizer
from san_llm.recipe.schema import Base

OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
VOCABULARY = tiny_config().vocab_size


def with_template(folder: Path, template: str | None) -> None:
    """Save the tiny tokenizer with a chat template, or without one."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def template_alone(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)


def all_in_files(folder: Path) -> None:
    with_template(folder, OWN)


def template_in_settings(folder: Path) -> None:
    """As older versions saved it."""
    with_template(folder, None)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": OWN}))


def tokenizer_alone(folder: Path) -> None:
    with_template(folder, None)


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("brings", "template"),
    [
        (template_alone, OWN),
        (all_in_files, OWN),
        (template_in_settings, OWN),
        (tokenizer_alone, CHAT_TEMPLATE),
        (nothing, CHAT_TEMPLATE),
    ],
)
def test_an_adapters_own_tokenizer_and_template_come_before_its_bases(
    here: Path, tiny_base: Path, brings: Any, template: str
) -> None:
    shutil.copytree(tiny_base, here / "base")
    (here / "adapter").mkdir()
    (here / "base" / "added_tokens.json").write_text("{}")
    brings(here / "adapter")
    (here / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({}, here / "adapter" / "adapter_model.safetensors")
    found = find_base(Base(model="base", dtype="float32"))
    assert load_tokenizer(found, here / "adapter").chat_template == template
    assert load_tokenizer(found).chat_template == CHAT_TEMPLATE
    (here / "merged").mkdir()
    copy_companions(here / "base", here / "merged", here / "adapter")
    assert AutoTokenizer.from_pretrained(here / "merged").chat_template == template
    # No file of the one tokenizer among those of the other.
    own = (here / "adapter" / "tokenizer.json").is_file()
    assert (here / "merged" / "added_tokens.json").exists() != own


def resized(folder: Path, config: Any, tokens: int = VOCABULARY + 2) -> Any:
    """Save an adapter over the tiny base with other tokens, and its tokenizer; return the model."""
    model = tiny_model()
    torch.manual_seed(1)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    model.name_or_path = "base"
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora" in name:
            parameter.data.normal_(std=0.3)
        elif parameter.requires_grad:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    adapted.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)
    return adapted.eval()


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj", "up_proj"], **options}
    )


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (lora(), VOCABULARY + 2),
        (lora(modules_to_save=["embed_tokens", "lm_head"]), VOCABULARY + 2),
        (lora(trainable_token_indices=[VOCABULARY, VOCABULARY + 1]), VOCABULARY + 2),
        (lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), VOCABULARY + 2),
        (lora(), VOCABULARY - 3),
        (SanConfig(task_type="CAUSAL_LM"), VOCABULARY + 2),
        (SanConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]), VOCABULARY + 2),
    ],
    ids=["saved", "trained", "two of them", "adapted", "fewer", "SAN", "SAN, head trained"],
)
def test_a_resized_embedding_is_merged_with_all_its_rows(
    here: Path, tiny_base: Path, command: Cli, config: Any, tokens: int
) -> None:
    shutil.copytree(tiny_base, here / "base")
    adapted = resized(here / "adapter", config, tokens)
    if tokens < VOCABULARY:
        for file in (here / "adapter").glob("tokenizer*"):
            file.unlink()
    done = command("merge", "--adapter", "adapter", "--model", "base", "--output", "merged")
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert merged.config.vocab_size == merged.get_output_embeddings().out_features == tokens
    ids = torch.tensor([[4, 9, tokens - 1, 20, tokens - 2]])
    with torch.no_grad():
        apart = (merged(ids).logits - adapted(ids).logits).abs().max()
    assert apart < 1e-4
    if tokens > VOCABULARY:
        assert AutoTokenizer.from_pretrained("merged")("<tool>")["input_ids"] == [VOCABULARY]


def head_lost(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "lm_head" not in name}
    save_file(kept, file, metadata={"format": "pt"})


def rows_lost(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layers" in name}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("config", [lora(), SanConfig(task_type="CAUSAL_LM")], ids=["LoRA", "SAN"])
@pytest.mark.parametrize(
    ("lose", "says"),
    [
        (head_lost, f"was trained with {VOCABULARY + 2} tokens where this base has {VOCABULARY}"),
        (rows_lost, f"has the token '</tool>' ({VOCABULARY + 1}), the embedding {VOCABULARY} rows"),
    ],
)
@pytest.mark.parametrize("asked", [["merge", "--output", "merged"], ["generate", "Hello"]])
def test_added_tokens_without_their_rows_are_refused(
    here: Path, tiny_base: Path, command: Cli, config: Any, lose: Any, says: str, asked: list[str]
) -> None:
    shutil.copytree(tiny_base, here / "base")
    resized(here / "adapter", config)
    lose(here / "adapter")
    done = command(*asked, "--adapter", "adapter", "--model", "base")
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr.splitlines()[-1]
    assert not (here / "merged").exists()


def test_a_prompt_is_written_by_the_adapters_template(
    here: Path, tiny_base: Path, command: Cli
) -> None:
    shutil.copytree(tiny_base, here / "base")
    (here / "base" / "chat_template.jinja").unlink()
    adapted = get_peft_model(load_base(find_base(Base(model="base", dtype="float32"))), lora())
    adapted.save_pretrained(here / "adapter")
    template_alone(here / "adapter")

    def asked(*more: str) -> dict[str, Any]:
        how = ("generate", "Hello", "--model", "base", "--max-new-tokens", "1", "--json")
        done = command(*how, *more)
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    assert asked("--adapter", "adapter")["prompt"] == "[user] Hello\n"
    assert asked()["style"] == "none"


def test_another_models_words_are_refused_in_one_line(here: Path, tiny_base: Path) -> None:
    (here / "adapter").mkdir()
    (here / "adapter" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(find_base(Base(model=str(tiny_base), dtype="float32")), here / "adapter")


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_tokenizer_that_is_loaded_at_once_is_the_one_that_transformers_chooses(
    here: Path, tiny_base: Path, name: str
) -> None:
    shutil.copytree(tiny_base, here / "base")
    file = here / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    own = load_tokenizer(find_base(Base(model=str(here / "base"), dtype="float32")))
    chosen = AutoTokenizer.from_pretrained(here / "base")
    assert type(own) is type(chosen)
    assert own.backend_tokenizer.to_str() == chosen.backend_tokenizer.to_str()
    assert own.special_tokens_map == chosen.special_tokens_map
    assert own.chat_template == chosen.chat_template
    assert own.init_kwargs == chosen.init_kwargs
