"""The eight tasks: names, spellings, answers and published sizes."""

import pytest

from san_llm.errors import InputError
from san_llm.protocol.tasks import TASKS, find_tasks

# LLM-Adapters' dataset folder (Hu et al. 2023): rows of each test split, and the answers.
PUBLISHED = {
    "boolq": (3270, "true false"),
    "piqa": (1838, "solution1 solution2"),
    "social_i_qa": (1954, "answer1 answer2 answer3 answer4 answer5"),
    "hellaswag": (10042, "ending1 ending2 ending3 ending4"),
    "winogrande": (1267, "option1 option2"),
    "ARC-Easy": (2376, "answer1 answer2 answer3 answer4 answer5"),
    "ARC-Challenge": (1172, "answer1 answer2 answer3 answer4 answer5"),
    "openbookqa": (500, "answer1 answer2 answer3 answer4 answer5"),
}


def test_the_tasks_are_the_published_eight_with_their_sizes_and_answers():
    found = {task.name: (task.test_rows, " ".join(task.answers)) for task in TASKS.values()}
    assert found == PUBLISHED
    assert list(TASKS) == list(PUBLISHED)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("social_iqa", "social_i_qa"),
        ("social_i_qa", "social_i_qa"),
        ("siqa", "social_i_qa"),
        ("arc-easy", "ARC-Easy"),
        ("ARC_Easy", "ARC-Easy"),
        ("arc_challenge", "ARC-Challenge"),
        ("arc-c", "ARC-Challenge"),
        ("BoolQ", "boolq"),
        (" piqa ", "piqa"),
        ("obqa", "openbookqa"),
    ],
)
def test_spellings_in_use_are_understood(spelling, name):
    assert [task.name for task in find_tasks([spelling])] == [name]


def test_tasks_come_in_the_order_named_and_each_once():
    named = ["winogrande", "boolq", "siqa", "social_iqa", "WinoGrande"]
    assert [task.name for task in find_tasks(named)] == ["winogrande", "boolq", "social_i_qa"]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("bolq", "boolq"),
        ("socialiqa", "social_iqa"),
        ("hellaswg", "hellaswag"),
        ("arceasy", "arc_easy"),
        ("open_book_qa", "openbookqa"),
    ],
)
def test_an_unknown_task_lists_the_eight_and_the_nearest(wrong, nearest):
    with pytest.raises(InputError) as error:
        find_tasks(["boolq", wrong])
    assert str(error.value) == (
        f"task {wrong!r} is not one of boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, "
        f"ARC-Challenge, openbookqa (did you mean {nearest!r}?)"
    )


@pytest.mark.parametrize("wrong", ["", "zzz"])
def test_a_task_near_none_lists_the_eight_alone(wrong):
    with pytest.raises(InputError, match=r"is not one of boolq, .*, openbookqa$"):
        find_tasks([wrong])


def test_no_task_at_all_is_refused():
    with pytest.raises(InputError, match="no task named; known are boolq, piqa"):
        find_tasks([])


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_the_pattern_finds_the_first_answer_of_a_text(task):
    for answer in task.answers:
        last = task.answers[-1]
        assert task.pattern.search(f"the correct answer is {answer}, not {last}").group() == answer
    assert task.pattern.search("I do not know.") is None
    assert task.pattern.search(task.answers[0].upper()) is None
