"""What a recipe may say, and probably does not mean: counted, told and never refused."""

from __future__ import annotations

from san_llm.recipe.schema import Method, PeftMethod, Recipe, SanMethod
from san_llm.recipe.steps import steps_of, warmup_of

# The rates that the shipped recipes and the published runs of LoRA and DoRA lie around. Scales
# start at 1 and have to move by tenths (SAN 1e-3 to 5e-3 here, IA3 5e-3 in PEFT's own benchmark);
# matrices start at 0 and may move little (1e-4 to 3e-4).
SCALES, MATRICES = 2e-3, 2e-4
# All weights of a model are tuned at 1e-5 (Stanford Alpaca 2e-5) to 1e-4.
WEIGHTS = 3e-5
FAR = 10  # times what is usual


def usual_rate(method: Method) -> tuple[str, float] | None:
    """Return what a method trains, and the learning rate that it usually takes, where known."""
    if isinstance(method, PeftMethod):
        return None
    if method.name == "full":
        return "whole weights", WEIGHTS
    scales = method.carrier == "scale" if isinstance(method, SanMethod) else method.name == "ia3"
    return ("scales", SCALES) if scales else ("low-rank matrices", MATRICES)


def doubts(recipe: Recipe, rows: int | None) -> list[str]:
    """Return what should be looked at before a recipe is trained, each in one line.

    Args:
        recipe: The recipe.
        rows: Rows that are trained on; None where they are not known.
    """
    found = _of_the_rate(recipe)
    training = recipe.training
    steps = training.max_steps if rows is None else steps_of(training, rows)
    return found if steps is None else found + _of_the_warmup(recipe, steps)


def _of_the_rate(recipe: Recipe) -> list[str]:
    rate = recipe.training.learning_rate
    known = usual_rate(recipe.method)
    if known is None:
        return []
    trained, usual = known
    # Rounded: 2e-4 * 10 is a little more than 2e-3.
    times = round(rate / usual, 6)
    if 1 / FAR < times < FAR:
        return []
    share = f"{times:.3g} times" if times > 1 else f"a {usual / rate:.3g}th of"
    return [f"training.learning_rate is {rate:g}, {share} what {trained} usually take, {usual:g}"]


def _of_the_warmup(recipe: Recipe, steps: int) -> list[str]:
    warmup, rate = warmup_of(recipe.training, steps), recipe.training.learning_rate
    if warmup < steps:
        return []
    highest = rate * (steps - 1) / warmup  # the first step is made at a rate of 0
    return [
        f"the warmup of {warmup:,} steps never ends in a run of {steps:,}: the rate reaches "
        f"{highest:.2g} of the {rate:g} asked; lower training.warmup_steps, or take "
        "training.warmup_share"
    ]
