"""What follows from a recipe's values: how a batch is shared."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from san_llm.errors import InputError
from san_llm.recipe.schema import Training, micro_batch

FEW = st.integers(1, 24)


@settings(max_examples=200, deadline=None)
@given(share=FEW, limit=FEW, processes=FEW)
def test_a_micro_batch_divides_the_share_of_each_process(share, limit, processes):
    training = Training(learning_rate=1e-3, batch_size=share * processes, micro_batch_size=limit)
    divisors = [size for size in range(1, share + 1) if share % size == 0 and size <= limit]
    assert micro_batch(training, processes) == divisors[-1]


@pytest.mark.parametrize(
    ("batch", "limit", "processes", "size"),
    [(12, 4, 2, 3), (12, 4, 1, 4), (12, 12, 3, 4), (12, 5, 4, 3), (8, 16, 2, 4), (7, 3, 1, 1)],
)
def test_sizes_that_do_not_divide_are_made_smaller(batch, limit, processes, size):
    training = Training(learning_rate=1e-3, batch_size=batch, micro_batch_size=limit)
    assert micro_batch(training, processes) == size


@pytest.mark.parametrize(("batch", "processes"), [(3, 2), (12, 5), (1, 2)])
def test_a_batch_that_processes_cannot_share_is_refused(batch, processes):
    with pytest.raises(InputError, match=f"^training.batch_size: {batch} .* {processes} proc"):
        micro_batch(Training(learning_rate=1e-3, batch_size=batch), processes)
