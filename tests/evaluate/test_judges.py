"""How generated texts of one's own tasks are judged: against the definitions of their sources."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from san_llm.errors import InputError
from san_llm.evaluate.judges import (
    judged,
    last_number,
    normalized,
    refuse_unreadable,
    rouge_l,
    token_f1,
)
from san_llm.recipe.task_file import TaskFile


def says(judge, **keys):
    return TaskFile(name="mine", rows="r", judge=judge, **keys)


@pytest.mark.parametrize(
    ("judge", "text", "answer", "found"),
    [
        ("exact", "The Cat.", "cat", ("The Cat.", 1)),
        ("exact", " a  big-cat!\n", "BIGCAT", ("a  big-cat!", 1)),
        ("exact", "cats", "cat", ("cats", 0)),
        ("exact", "", "cat", (None, 0)),
        ("exact", "cat\n\n### Response: dog", "cat", ("cat\n\n", 1)),
        ("contains", "It is a Cat, surely", "the cat", ("It is a Cat, surely", 1)),
        ("contains", "a category", "cat", ("a category", 0)),
        ("number", "3 + 4 = 7.", "7", ("7", 1)),
        ("number", "so $1,000 it is", "#### 1000.00", ("1000", 1)),
        ("number", "minus -5", "5", ("-5", 0)),
        ("number", "none", "5", (None, 0)),
        ("f1", "the cat sat", "a cat", ("the cat sat", 2 / 3)),
        ("f1", "dog", "a cat", ("dog", 0)),
        ("rouge-l", "the gunman killed police", "police killed the gunman", (..., 0.5)),
    ],
)
def test_a_text_is_read_and_scored(judge, text, answer, found):
    parsed, value = judged(says(judge), text, answer)
    assert value == pytest.approx(found[1])
    if found[0] is not ...:
        assert (parsed or "").strip() == (found[0] or "").strip()
        assert (parsed is None) == (found[0] is None)


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("yes|no", "I say no, yes", "no"),
        (r"answer: (\w+)", "the answer: B. C", "B"),
        (r"(?i)(x)|y", "Y", "Y"),
        ("yes", "YES", None),
    ],
)
def test_a_pattern_gives_its_first_match_or_its_group(pattern, text, found):
    parsed, value = judged(says("pattern", pattern=pattern), text, "B")
    assert (parsed, value) == (found, float(found == "B"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000", 1000),
        ("1000.0", 1000),
        ("5-3", 3),
        ("x=-2.5", "-2.5"),
        ("-$3", -3),
        ("1,2", 2),
        ("12,345,678.9 dollars.", "12345678.9"),
        ("no", None),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


words = st.lists(st.sampled_from(["the", "cat", "Sat", "on.", "a", "mat"]), max_size=8).map(
    " ".join
)


@given(words, words)
def test_f1_and_rouge_l_are_harmonic_means_of_precision_and_recall(text, answer):
    left, right = normalized(text).split(), normalized(answer).split()
    shared = sum(min(left.count(word), right.count(word)) for word in set(left))
    precision, recall = (shared / max(1, len(side)) for side in (left, right))
    mean = 2 * precision * recall / (precision + recall) if shared else 0
    assert token_f1(text, answer) == pytest.approx(mean)
    left, right = (side.lower().replace(".", "").split() for side in (text, answer))
    longest = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            longest[i + 1][j + 1] = (
                longest[i][j] + 1 if a == b else max(longest[i][j + 1], longest[i + 1][j])
            )
    shared = longest[-1][-1]
    assert rouge_l(text, answer) == pytest.approx(2 * shared / max(1, len(left) + len(right)))


@pytest.mark.parametrize(
    ("judge", "answer", "said"),
    [
        ("exact", "A", "nothing of its answer 'A' is left without articles and punctuation"),
        ("f1", "...", "judge f1 leaves out; judge pattern compares as it stands"),
        ("number", "many", "its answer 'many' has no number in it"),
        ("rouge-l", "мир", "judge rouge-l reads the letters a to z and digits alone"),
    ],
)
def test_an_answer_with_nothing_to_compare_is_refused(judge, answer, said):
    with pytest.raises(InputError, match="row 3: ") as told:
        refuse_unreadable(says(judge), answer, "row 3")
    assert said in str(told.value)
