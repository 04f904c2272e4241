"""GGUF files: converted weight by weight, refused whole, and used as a recipe's base."""

import json
import os

import pytest
import torch
from san.adapted import text
from tiny import rows, write_recipe, write_rows
from tiny_gguf import gguf_model, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from san_llm.errors import InputError
from san_llm.models.from_gguf import convert_gguf
from san_llm.models.locate import locate


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_arrives_rounded_to_bf16_and_the_logits_are_the_models(tmp_path, tied):
    model = gguf_model(tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    (tmp_path / "LICENSE.txt").write_text("take it")
    folder = convert_gguf(path, tmp_path / "converted")
    stock, problems = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(problems.values())
    expected = model.state_dict()
    found = stock.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(torch.bfloat16)), name
    assert stock.config.tie_word_embeddings == tied
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        wanted = model(text()).logits
        got = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(text()).logits
    assert torch.allclose(got, wanted, atol=1e-5)
    assert (folder / "LICENSE.txt").read_text() == "take it"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not list(folder.glob("*.bin"))


def test_the_tokenizer_reads_and_writes_every_text(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", gguf_model(num_hidden_layers=1))
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "converted"))
    for sentence in ("What is the sum?\n\n  1 + 2", "naïve 猫 \t x", "the the"):
        tokens = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokens) == sentence
    assert tokenizer.tokenize("in the") == ["i", "n", "Ġthe"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
    settings = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 0)


@pytest.fixture
def whole(tmp_path):
    return write_gguf(tmp_path / "whole.gguf", gguf_model(num_hidden_layers=2)).read_bytes()


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.2, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_one_line_and_nothing_is_written(here, whole, share):
    path = here / "cut.gguf"
    path.write_bytes(whole[: max(4, int(len(whole) * share))])
    with pytest.raises(InputError, match=r"cut\.gguf: cannot be read as a model: \S") as caught:
        convert_gguf(path, here / "converted")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(set(os.listdir(here)) - {"whole.gguf"}) == ["cut.gguf"]


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", b"\x00" * 100])
def test_another_kind_of_file_is_one_line_and_nothing_is_written(here, content):
    path = here / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.gguf: not a GGUF file: it does not begin with"):
        convert_gguf(path, here / "converted")
    assert os.listdir(here) == ["other.gguf"]


def test_a_folder_a_missing_file_and_noise_are_one_line(here):
    with pytest.raises(InputError, match=r"nowhere\.gguf: cannot be read: No such file"):
        convert_gguf(here / "nowhere.gguf", here / "converted")
    (here / "folder.gguf").mkdir()
    with pytest.raises(InputError, match=r"folder\.gguf: cannot be read: Is a directory"):
        convert_gguf(here / "folder.gguf", here / "converted")
    noise = here / "noise.gguf"
    noise.write_bytes(b"GGUF" + bytes(torch.randint(0, 256, (4000,)).tolist()))
    with pytest.raises(InputError, match=r"noise\.gguf: cannot be read as a model"):
        convert_gguf(noise, here / "converted")
    assert not (here / "converted").exists()


def test_a_family_that_is_not_supported_is_refused(here):
    path = write_gguf(here / "other.gguf", gguf_model(num_hidden_layers=1), architecture="stablelm")
    with pytest.raises(InputError, match="stablelm"):
        convert_gguf(path, here / "converted")
    assert os.listdir(here) == ["other.gguf"]


def test_what_stands_in_the_way_is_kept_unless_it_may_be_replaced(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", gguf_model(num_hidden_layers=1))
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="has files in it"):
        convert_gguf(path, tmp_path / "converted")
    assert os.listdir(tmp_path / "converted") == ["mine.txt"]
    convert_gguf(path, tmp_path / "converted", overwrite=True)
    assert not (tmp_path / "converted" / "mine.txt").exists()
    assert (tmp_path / "converted" / "model.safetensors").is_file()


def test_a_located_file_is_converted_once_and_again_when_it_changes(here, monkeypatch, capsys):
    monkeypatch.setenv("SAN_LLM_CACHE", str(here / "cache"))
    path = write_gguf(here / "tiny.gguf", gguf_model(num_hidden_layers=1))
    first = locate("tiny.gguf")
    assert first.startswith(str(here / "cache" / "gguf" / "tiny-"))
    assert "converting tiny.gguf once" in capsys.readouterr().err
    assert locate(str(path)) == first
    assert "converting" not in capsys.readouterr().err
    write_gguf(path, gguf_model(num_hidden_layers=2))
    second = locate("tiny.gguf")
    assert second != first
    assert json.loads((here / second / "config.json").read_text())["num_hidden_layers"] == 2
    with pytest.raises(InputError, match=r"nowhere\.gguf: no such file"):
        locate("nowhere.gguf")


@pytest.mark.slow
def test_a_recipe_trains_evaluates_and_merges_over_a_gguf_base(command, here):
    write_gguf(here / "tiny.gguf", gguf_model(num_hidden_layers=1))
    data = write_rows(here / "data" / "boolq" / "test.json", rows(12))
    recipe = write_recipe(here / "mine.yaml", here / "tiny.gguf", data)
    trained = command("train", recipe, "training.max_steps=2", "data.cutoff=512", "--json")
    assert trained.returncode == 0, trained.stderr
    run = json.loads(trained.stdout)["run"]
    asked = ("eval", "--tasks", "boolq", "--data", data.parents[1], "--limit", 1, "--json")
    scored = command(*asked)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["model"] == str(here / "tiny.gguf")
    merged = command("merge")
    assert merged.returncode == 0, merged.stderr
    model = AutoModelForCausalLM.from_pretrained(here / run / "merged")
    assert model.config.num_hidden_layers == 1
    tokenizer = AutoTokenizer.from_pretrained(here / run / "merged")
    assert tokenizer.tokenize("in the") == ["i", "n", "Ġthe"]
