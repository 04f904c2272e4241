"""The README of a run's adapter: what the hub and a reader want to know of it.

Written with the adapter. Each evaluation brings its scores in, as the hub's ``model-index`` and as
a table between two marks; whatever else somebody has written into the card stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from san_llm import __version__
from san_llm.errors import InputError, first_line
from san_llm.files import sha256_of, write_text
from san_llm.models.download import model_folder
from san_llm.protocol.prompts import PromptStyle, evaluation_prompt
from san_llm.recipe.read import to_yaml
from san_llm.recipe.schema import Recipe
from san_llm.runs.folder import recipe_of
from san_llm.runs.record import METRICS, Accuracy, EvaluationResults, MergeResult, read_metrics
from san_llm.shown import nats, with_error

CARD = "README.md"
_BEGIN, _END = "<!-- scores -->", "<!-- end of scores -->"


def write_card(run: Path, folder: Path) -> None:
    """Write a new card.

    Args:
        run: The run, with its recipe and metrics.
        folder: The adapter's folder, which may not have its name yet.

    Raises:
        InputError: when the folder is not a run, or has no metrics yet.
    """
    from huggingface_hub import ModelCardData

    recipe, metrics = recipe_of(run), read_metrics(run)
    if metrics is None:
        raise InputError(f"{run}: no {METRICS} in it, so its training has not come to its end")
    method, base = recipe.method.kind, recipe.base.model
    named = f"  # san-llm download {base}" if model_folder(base) else ""
    load = [
        *(
            ["import san_llm  # pip install san-llm; makes SAN known to PEFT"]
            if method == "san"
            else []
        ),
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"BASE = {str(model_folder(base) or base)!r}{named}",
        "model = AutoModelForCausalLM.from_pretrained(BASE)",
        'model = PeftModel.from_pretrained(model, "THIS FOLDER")',
        "tokenizer = AutoTokenizer.from_pretrained(BASE)",
    ]
    whole = method == "full"
    head = ModelCardData(
        base_model=hub_id(recipe.base.model),
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        tags=[method, "san-llm"],
        model_name=recipe.name,
    )
    loss = metrics.held_out_loss
    lines = [
        "---",
        head.to_yaml().rstrip(),
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"{f'Every weight of `{base}`' if whole else f'A {method} adapter over `{base}`'}, "
        f"trained by san-llm {__version__}: "
        f"{metrics.trained_numbers:,} numbers, {metrics.steps:,} steps, "
        f"{metrics.rows:,} rows of {trained_on(recipe)}.",
        *([] if loss is None else ["", f"Loss on held-out rows: {loss:.4f} a token."]),
        "",
        _BEGIN,
        _END,
        "",
        *asking_section(recipe.data.prompt, LOAD if whole else load, recipe.data.date),
        "",
        f"`san-llm generate {'RUN' if whole else '--adapter'}` writes prompts so by itself.",
        "",
        *recipe_section(recipe),
    ]
    write_text(folder / CARD, "\n".join(lines) + "\n")


def add_scores(adapter: Path, name: str, results: EvaluationResults) -> None:
    """Put an evaluation's scores into an adapter's card, in place of earlier ones.

    One that was made without a card gets none.

    Args:
        adapter: The adapter's folder.
        name: What the model is called where the card does not say it.
        results: What the evaluation came to.

    Raises:
        InputError: when the card's head is not what the hub reads.
    """
    import yaml
    from huggingface_hub import EvalResult, ModelCard

    path = adapter / CARD
    if not path.is_file():
        return
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        first = first_line(error)
        raise InputError(f"{path}: cannot be read as a model card: {first}") from None
    data = Path(results.data).name  # where it lies is nothing to a reader
    about = f"{data} rows, protocol {results.protocol}, prompts {results.prompt}"
    head: Any = card.data
    head.model_name = head.model_name or name
    head.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task} ({data})",
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric} ({how})",
            metric_value=round(value, 4),
        )
        for task, metric, how, value in _measured(results)
    ]
    rows = [_row(task.task, task, task.n) for task in results.tasks]
    if results.average is not None:
        counted = sum(task.n for task in results.tasks if not task.graded)
        rows.append(_row("**average**", results.average, counted))
    rows += [
        f"| {loss.task} | {nats(loss.loss, loss.standard_error)} nats a token | {loss.n:,} |"
        for loss in results.losses
    ]
    top = [
        f"Accuracy in percent ({about}):",
        "",
        "| task | accuracy | rows |",
        "| --- | --: | --: |",
    ]
    text = "\n".join([_BEGIN, *top, *rows, _END])
    marked = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    write_text(path, marked.sub(lambda _: text, str(card), count=1))


def _measured(results: EvaluationResults) -> list[tuple[str, str, str, float]]:
    """Return each task, what was measured of it, how it was judged, and the value."""
    accuracies = [
        (
            task.task,
            str(task.judge) if task.graded else "accuracy",
            task.judge or results.protocol,
            task.accuracy,
        )
        for task in results.tasks
    ]
    return accuracies + [(loss.task, "loss", "nats a token", loss.loss) for loss in results.losses]


def _row(name: str, score: Accuracy, rows: int) -> str:
    return f"| {name} | {with_error(score.accuracy, score.standard_error)} | {rows:,} |"


def hub_id(base: str) -> str | None:
    """Return the base as the hub knows it; a folder of this machine is nothing to a reader."""
    if "/" not in base or Path(base).exists():
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base


def trained_on(recipe: Recipe) -> str:
    """Return the names of a recipe's training data."""
    return ", ".join(source.label for source in recipe.data.sources)


def asking_section(style: PromptStyle, load: list[str], date: str | None = None) -> list[str]:
    """Return the lines of a card that ask a model in Python as it was asked in training.

    Args:
        style: The prompt style of its training.
        load: The lines of Python behind which ``model`` and ``tokenizer`` are loaded.
        date: What the chat template wrote as today's in training, where it was told one.
    """
    if style == "chat":
        about, special = "its chat template", ", add_special_tokens=False"
        about += f" with {date} for today's date" if date else ""
        prompt = [
            'turns = [{"role": "user", "content": "QUESTION"}]',
            "prompt = tokenizer.apply_chat_template(",
            "    turns, tokenize=False, add_generation_prompt=True",
            ")",
        ]
    else:
        about, special = "the text below, not its chat template", ""
        text = evaluation_prompt(style, "QUESTION").splitlines(keepends=True)
        prompt = ["prompt = (", *(f"    {json.dumps(line)}" for line in text), ")"]
    tokens = [f'tokens = tokenizer(prompt, return_tensors="pt"{special})']
    if style == "llm-adapters-aligned":  # as data.encode.evaluation_text
        tokens = [
            "# The last space is read as a part of the answer's first word.",
            'tokens = tokenizer(prompt + "the", return_tensors="pt", return_offsets_mapping=True)',
            'read = tokens.pop("offset_mapping")[0, :, 1] <= len(prompt)',
            "tokens = {name: values[:, read] for name, values in tokens.items()}",
        ]
    return [
        f"It learned to answer in {about} (prompt style `{style}`). In Python:",
        "",
        "```python",
        *load,
        *prompt,
        *tokens,
        "answer = model.generate(**tokens, max_new_tokens=256, do_sample=False)[0]",
        'new = answer[tokens["input_ids"].shape[1] :]',
        "print(tokenizer.decode(new, skip_special_tokens=True))",
        "```",
    ]


def recipe_section(recipe: Recipe) -> list[str]:
    """Return the lines of a card that hold the recipe."""
    return ["The recipe:", "", "```yaml", to_yaml(recipe).rstrip(), "```"]


LOAD = [  # a merged model, in the words of its card
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
    'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
]


def model_card(result: MergeResult, recipe: Recipe | None, method: str, text: bool) -> str:
    """Return the README of a merged model.

    Args:
        result: What was merged.
        recipe: Of the adapter's run, where there was one.
        method: The adapter's.
        text: Whether the model goes on from a text.
    """
    name = Path(result.base).name
    base_card = hub_id(result.base)
    base = f"[{base_card}](https://huggingface.co/{base_card})" if base_card else name
    head = ["---", "library_name: transformers"]
    head += ["pipeline_tag: text-generation"] if text else []
    head += [f"base_model: {base_card}"] if base_card else []
    head += ["tags:", "- san-llm", f"- {method.lower()}", "---"]
    made = f"with a {method} adapter merged into its weights"
    if result.whole:
        made = "with every weight trained"
    lines = [
        *head,
        "",
        f"# {name} tuned with {method}",
        "",
        f"{base} {made} "
        f"by san-llm {__version__}. It is a stock checkpoint: `transformers` loads it as it is.",
        "",
        f"- Parameters: {result.parameters:,}, stored as {result.stored_as}.",
    ]
    if not result.whole:
        digest = sha256_of(Path(result.adapter) / "adapter_model.safetensors")
        lines.append(f"- Adapter: sha256 `{digest}`.")
    if result.quantized:
        lines.append(
            f"- The adapter was trained over the base in {result.trained_over}, and merged into "
            "those weights: outputs are those seen in training"
            f"{', but for the rounding of activations' if result.trained_over == '8bit' else ''}."
        )
    elif result.trained_over:
        lines.append(
            f"- The adapter was trained over the base in {result.trained_over}, and merged into "
            "the full-precision base: outputs differ from those seen in training by the base's "
            "quantization error."
        )
    if recipe is not None:
        lines += [
            f"- Data: {trained_on(recipe)}; prompt style `{recipe.data.prompt}`.",
            "",
            *asking_section(recipe.data.prompt, LOAD, recipe.data.date),
            "",
            *recipe_section(recipe),
        ]
    return "\n".join(lines) + "\n"
