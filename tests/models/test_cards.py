"""The card of an adapter: what the hub reads of it, checked by the hub's own client, offline."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from tiny import CHAT_TEMPLATE, rows, save_tiny, tiny_tokenizer, write_recipe, write_rows
from tiny_gguf import MERGES, VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from san_llm.data.encode import evaluation_text
from san_llm.data.rows import Row
from san_llm.models.cards import add_scores, asking_section, hub_id, write_card
from san_llm.protocol.prompts import STYLES
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run
from san_llm.runs.record import Accuracy, EvaluationResults, Metrics, TaskAccuracy


@pytest.fixture
def run(here):
    """A run over a base of the hub, as far as a card looks at it."""
    recipe = write_recipe(here / "mine.yaml", here / "base", here / "rows.json")
    chosen = load_recipe(recipe, ["base.model=owner/llama"])
    folder = new_run(chosen, here / "runs" / "mine", False)
    metrics = {"trained_numbers": 1234, "steps": 40, "rows": 512, "held_out_loss": 1.23456}
    metrics |= {"row_kind": "own", "held_out_losses": {}}
    metrics = dict.fromkeys(Metrics.model_fields, 0) | metrics
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "adapter").mkdir()
    return folder


SCORED = "<!-- scores -->\nold words\n<!-- end of scores -->\n"
RESULTS = EvaluationResults(
    data="pocket",
    protocol="generate",
    prompt="alpaca",
    tasks=(
        TaskAccuracy(task="boolq", n=16, unparseable=0, accuracy=0.5625, standard_error=0.128),
        TaskAccuracy(task="piqa", n=1, unparseable=0, accuracy=1.0, standard_error=None),
    ),
    average=Accuracy(accuracy=0.78125, standard_error=0.064),
)


def test_the_head_is_what_the_hub_asks_for(run):
    write_card(run, run / "adapter")
    path = run / "adapter" / "README.md"
    card = ModelCard.load(path)
    head = metadata_load(path)
    assert head["base_model"] == "owner/llama"
    validate_repo_id(head["base_model"])
    assert head["library_name"] == "peft"
    assert head["pipeline_tag"] == "text-generation"
    assert {"san", "san-llm"} <= set(head["tags"])
    assert yaml.safe_load(card.data.to_yaml()) == head
    for part in ("1,234 numbers, 40 steps, 512 rows", "1.2346 a token", "import san_llm"):
        assert part in card.text
    assert "More Information Needed" not in card.text


def test_a_base_of_this_machine_is_not_named_to_the_hub(here):
    (here / "models" / "mine").mkdir(parents=True)
    for base in ("models/mine", str(here), "smollm2-135m", "a/b/c", "x.gguf"):
        assert hub_id(base) is None
    assert hub_id("owner/llama") == "owner/llama"


def test_scores_go_into_the_index_and_the_text_and_later_ones_replace_them(run):
    adapter = run / "adapter"
    write_card(run, adapter)
    add_scores(adapter, "mine", RESULTS)
    worse = json.loads(json.dumps(RESULTS.written).replace("0.5625", "0.24996"))
    add_scores(adapter, "mine", EvaluationResults(**worse))
    card = ModelCard.load(adapter / "README.md")
    assert card.data.model_name == "mine"
    found = {one.dataset_name: one for one in card.data.eval_results}
    assert {name: one.metric_value for name, one in found.items()} == {
        "boolq (pocket)": 0.25,  # to four digits
        "piqa (pocket)": 1.0,
    }
    assert {one.metric_type for one in found.values()} == {"accuracy"}
    index = metadata_load(adapter / "README.md")["model-index"]
    assert [entry["name"] for entry in index] == ["mine"]
    text = card.text
    for line in ("| boolq | 25.0 ± 12.8 | 16 |", "| piqa | 100.0 | 1 |", "78.1 ± 6.4 | 17 |"):
        assert text.count(line) == 1
    assert "56.2" not in text


def test_what_somebody_wrote_into_a_card_stays(run):
    path = run / "adapter" / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My own\n\nWords.\n")
    add_scores(path.parent, "mine", RESULTS)
    card = ModelCard.load(path)
    assert card.text.strip() == "# My own\n\nWords."
    assert (card.data.license, card.data.tags) == ("mit", ["mine"])
    assert len(card.data.eval_results) == 2
    assert card.data.model_name == "mine"
    path.write_text(
        path.read_text().replace("name: mine", "name: theirs").replace("Words.", SCORED + SCORED)
    )
    add_scores(path.parent, "mine", RESULTS)
    card = ModelCard.load(path)
    assert card.data.model_name == "theirs"
    assert card.text.count("old words") == 1, "the first place is filled anew"
    assert card.text.count("| boolq | 56.2 ± 12.8 | 16 |") == 1


def said(folder: Path) -> str:
    """Return what the Python in a folder's card prints."""
    code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    with redirect_stdout(io.StringIO()) as out:
        exec(code.replace("THIS FOLDER", str(folder)), {})
    return out.getvalue()


def with_start():
    """Return a tokenizer that puts a start token before texts, as its chat template does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def with_spaces():
    """Return a tokenizer with a word that takes the space before it along."""
    words = {word: number for number, word in enumerate(VOCABULARY)}
    backend = Tokenizer(BPE(words, [tuple(merge.split()) for merge in MERGES]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.mark.parametrize("made", [tiny_tokenizer, with_start, with_spaces])
@pytest.mark.parametrize("style", STYLES)
def test_a_card_writes_the_prompt_of_every_style_as_it_is_asked(style, made):
    tokenizer = made()
    lines = "\n".join(asking_section(style, []))
    code = re.search("```python\n(.*?)answer = ", lines, re.DOTALL)[1]
    exec(code, names := {"tokenizer": tokenizer})
    _, tokens = evaluation_text(style, Row(instruction="QUESTION"), tokenizer)
    assert names["tokens"]["input_ids"].tolist() == [tokens]
    assert names["tokens"].keys() == {"input_ids", "attention_mask"}
    assert tokens.count(tokenizer.bos_token_id) == (made == with_start)


@pytest.mark.slow
def test_a_real_run_makes_a_card_and_an_evaluation_completes_it(command, here):
    save_tiny(here / "model")
    write_rows(here / "rows.json", rows(12))
    recipe = write_recipe(here / "mine.yaml", here / "model", here / "rows.json")
    run = Path(json.loads(command("train", recipe, "--json").stdout)["run"])
    path = run / "adapter" / "README.md"
    assert str(here) not in path.read_text().split("---")[1]
    assert ModelCard.load(path).data.eval_results is None
    data = write_rows(here / "data" / "boolq" / "test.json", rows(3)).parents[1]
    asked = ("eval", "--tasks", "boolq", "--data", data, "--json")
    scored = json.loads(command(*asked).stdout)
    (result,) = ModelCard.load(path).data.eval_results
    assert result.metric_value == round(scored["average"]["accuracy"], 4)
    text = path.read_text()
    assert command(*asked, "--base-only").returncode == 0
    assert path.read_text() == text, "the base's scores are not the adapter's"
    assert command("merge").returncode == 0
    for folder, which in ((path.parent, ()), (run / "merged", ("--model", run / "merged"))):
        assert said(folder) == command("generate", "QUESTION", *which).stdout
    path.write_text("---\n[\n---\nbroken\n")
    done = command(*asked)
    assert done.returncode == 0
    assert "scores are not put into the card: " in done.stderr
    assert path.read_text() == "---\n[\n---\nbroken\n"
