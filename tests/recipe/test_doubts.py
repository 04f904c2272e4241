"""What a recipe is warned of, and how long its rate rises."""

import pytest

from san_llm.recipe.doubts import doubts
from san_llm.recipe.read import load_recipe, parse_recipe
from san_llm.recipe.shipped import shipped_recipes
from san_llm.recipe.steps import steps_of, warmup_of

GOOD = """\
base: {model: some/model}
method: {name: san}
data: {train: pocket, loss: response}
training: {learning_rate: 2e-3}
"""


def recipe(*overrides):
    return parse_recipe(GOOD, "mine.yaml", overrides)


@pytest.mark.parametrize(
    ("method", "rate", "share"),
    [
        ("name=san", 2e-4, "a 10th of what scales usually take, 0.002"),
        ("name=san", 2.1e-4, None),
        ("name=san", 1.9e-2, None),
        ("name=san", 2e-2, "10 times what scales usually take, 0.002"),
        ("name=ia3", 1e-4, "a 20th of what scales usually take, 0.002"),
        ("carrier=dora", 2e-3, "10 times what low-rank matrices usually take, 0.0002"),
        ("name=lora", 5e-3, "25 times what low-rank matrices usually take, 0.0002"),
        ("name=dora", 1.9e-3, None),
        ("name=lora", 2.1e-5, None),
        ("name=lora", 2e-5, "a 10th of what low-rank matrices usually take, 0.0002"),
        ("name=full", 1e-4, None),
        ("name=full", 2e-3, "66.7 times what whole weights usually take, 3e-05"),
    ],
)
def test_a_rate_ten_times_under_or_over_what_a_method_takes_is_told(method, rate, share):
    found = doubts(recipe(f"method.{method}", f"training.learning_rate={rate}"), rows=10**6)
    assert found == ([] if share is None else [f"training.learning_rate is {rate:g}, {share}"])


@pytest.mark.parametrize(
    ("warmup", "rows", "told"),
    [
        ("warmup_steps=100", 50, "the warmup of 100 steps never ends in a run of 12: the rate "),
        ("warmup_steps=12", 50, "the warmup of 12 steps never ends in a run of 12: the rate "),
        ("warmup_steps=11", 50, None),
        ("warmup_steps=100", None, None),
        ("warmup_share=0.9", 50, None),
    ],
)
def test_a_warmup_that_a_run_never_leaves_is_told(warmup, rows, told):
    found = doubts(recipe(f"training.{warmup}"), rows)
    assert [line[: len(told or "")] for line in found] == ([] if told is None else [told])


def test_the_rate_that_is_reached_is_told():
    # 12 steps, the first at a rate of 0: eleven hundredths of 5e-3.
    (found,) = doubts(recipe("training.learning_rate=5e-3", "training.warmup_steps=100"), 50)
    assert "reaches 0.00055 of the 0.005 asked" in found


def test_a_warmup_is_a_tenth_of_the_steps_unless_told():
    for rows, steps, warmup in ((50, 12, 2), (170_300, 31932, 3194)):
        training = recipe().training
        assert (steps_of(training, rows), warmup_of(training, steps)) == (steps, warmup)
    assert warmup_of(recipe("training.warmup_share=0").training, 100) == 0
    assert warmup_of(recipe("training.warmup_steps=7").training, 100) == 7
    assert steps_of(recipe("training.max_steps=5").training, 10**6) == 5


def test_no_shipped_recipe_is_in_doubt():
    for file in shipped_recipes().values():
        assert doubts(load_recipe(file), rows=170_300) == []
