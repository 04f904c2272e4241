"""From generated text to accuracy: the eight patterns on literal text, and the statistics."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from san_llm.evaluate.score import Judged, TaskScore, average, judge_text, parse_answer, score
from san_llm.protocol.tasks import TASKS, find_tasks

# task; generated text; the published extraction's answer
TEXTS = [
    ("boolq", "the correct answer is true", "true"),
    ("boolq", "the correct answer is false", "false"),
    ("boolq", "It is untrue.", "true"),
    ("boolq", "true or false? false", "true"),
    ("boolq", "The correct answer is True", None),
    ("boolq", "FALSE", None),
    ("boolq", "yes", None),
    ("piqa", "the correct answer is solution1", "solution1"),
    ("piqa", "the correct answer is solution2", "solution2"),
    ("piqa", "solution3, or solution2", "solution2"),
    ("piqa", "Solution1", None),
    ("piqa", "solution 1", None),
    ("social_i_qa", "the correct answer is answer3", "answer3"),
    ("social_i_qa", "answer6 answer5", "answer5"),
    ("social_i_qa", "Answer1", None),
    ("hellaswag", "the correct answer is ending4", "ending4"),
    ("hellaswag", "ending5", None),
    ("hellaswag", "ending: ending1", "ending1"),
    ("winogrande", "the correct answer is option2", "option2"),
    ("winogrande", "option3", None),
    ("winogrande", "option12", "option1"),
    ("ARC-Easy", "the correct answer is answer1", "answer1"),
    ("ARC-Easy", "the correct answer is answer0", None),
    ("ARC-Challenge", "the correct answer is answer4", "answer4"),
    ("ARC-Challenge", "answer2answer1", "answer2"),
    ("openbookqa", "the correct answer is answer5", "answer5"),
    ("openbookqa", "the correct answer is", None),
    ("openbookqa", "", None),
]


@pytest.mark.parametrize(("task", "text", "answer"), TEXTS)
def test_the_first_answer_in_a_text_is_taken_in_its_own_case(task, text, answer):
    assert parse_answer(TASKS[task], text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("true\n\n### Response:\nfalse", "true"),
        ("I cannot say.\n\n### Response:\ntrue", None),
        ("### Response: true", None),
        ("### Instruction:\nfalse", "false"),
        (" \n false", "false"),
    ],
)
def test_what_follows_a_second_response_mark_is_not_read(text, answer):
    # The published script splits prompt and answer at "### Response:" and keeps the part between
    # the first mark, which ends the prompt, and the next.
    prompt = "### Instruction:\nIs it so?\n\n### Response:\n"
    published = (prompt + text).split("### Response:")[1].strip()
    found = [published.find(word) for word in ("true", "false")]
    expected = None
    if max(found) >= 0:
        expected = "true" if found[1] < 0 or 0 <= found[0] < found[1] else "false"
    assert expected == answer
    assert parse_answer(TASKS["boolq"], text) == answer


@pytest.mark.parametrize("name", list(TASKS))
@given(st.data())
@settings(deadline=None, max_examples=30)
def test_the_answer_is_the_one_whose_first_mention_comes_first(name, data):
    task = TASKS[name]
    parts = data.draw(st.lists(st.sampled_from([*task.answers, " ", "the ", "Answer1", "ansewr"])))
    text = "".join(parts)
    mentions = {answer: text.find(answer) for answer in task.answers if answer in text}
    expected = min(mentions, key=mentions.__getitem__) if mentions else None
    assert parse_answer(task, text) == expected


def judged(parsed, answer="true", task="boolq", row=0):
    return Judged(task, row, "prompt", "output", parsed, answer, parsed == answer)


def test_a_generated_answer_says_nothing_of_likelihoods():
    row = judge_text(TASKS["boolq"], 3, "asked", "the correct answer is true", "true")
    assert row.correct_norm is None
    assert row.to_json() == {
        "task": "boolq",
        "row": 3,
        "prompt": "asked",
        "output": "the correct answer is true",
        "parsed": "true",
        "answer": "true",
        "correct": True,
    }


def test_a_score_counts_right_wrong_and_unparseable_rows():
    rows = [judged("true"), judged("false"), judged(None), judged("true"), judged(None)]
    # 2 of 5: p (1 - p) / (n - 1) = 0.4 * 0.6 / 4 = 0.06
    assert score(TASKS["boolq"], rows) == TaskScore("boolq", 5, 2, 2, 0.4, math.sqrt(0.06))


@given(st.lists(st.booleans(), min_size=2, max_size=60))
@settings(deadline=None, max_examples=50)
def test_the_standard_error_is_that_of_a_mean_of_zeros_and_ones(rights):
    found = score(TASKS["boolq"], [judged("true" if right else "false") for right in rights])
    mean = sum(rights) / len(rights)
    variance = sum((right - mean) ** 2 for right in rights) / (len(rights) - 1)
    assert found.accuracy == pytest.approx(mean)
    assert found.standard_error == pytest.approx(math.sqrt(variance / len(rights)), abs=1e-12)


def test_one_row_has_no_standard_error_and_neither_has_an_average_with_it():
    single = score(TASKS["boolq"], [judged("true")])
    assert (single.accuracy, single.standard_error) == (1.0, None)
    other = TaskScore("piqa", 10, 5, 0, 0.5, 0.1)
    assert average([single, other]) == (0.75, None)


def test_the_average_is_over_tasks_not_over_rows():
    scores = [
        TaskScore("boolq", 1000, 900, 0, 0.9, 0.01),
        TaskScore("piqa", 10, 3, 0, 0.3, 0.15),
        TaskScore("openbookqa", 10, 6, 0, 0.6, 0.16),
    ]
    mean, error = average(scores)
    assert mean == pytest.approx(0.6)
    # sqrt(0.0001 + 0.0225 + 0.0256) / 3
    assert error == pytest.approx(0.2195449 / 3, rel=1e-6)


def test_every_answer_of_every_task_is_found_in_the_text_that_training_teaches():
    for task in find_tasks(TASKS):
        for answer in task.answers:
            text = f"the correct answer is {answer}"
            assert parse_answer(task, text) == answer
