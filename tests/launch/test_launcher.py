"""Which worker a launcher names when several have failed."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from san_llm.launch.launcher import first_failure

KILLED, ASKED = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([(1, 5), (KILLED, 5)], (1, KILLED)),  # the others fail within the second, as it is gone
        ([(KILLED, 5), (1, 5)], (0, KILLED)),
        ([(1, 5), (ASKED, 5)], (0, 1)),  # the launcher ends those that are left
        ([(1, 5), (1, 5)], (0, 1)),
        ([(1, 5), (KILLED, 35)], (0, 1)),  # it did not end when it was asked to
        ([(ASKED, 4), (1, 5)], (0, ASKED)),
    ],
)
def test_the_first_is_the_earliest_and_one_that_a_signal_ended_before_others(ends, first):
    failures = {}
    for rank, (code, second) in enumerate(ends):
        failures[rank] = ProcessFailure(rank, 100 + rank, code, "no file")
        failures[rank].timestamp = second
    assert first_failure(ChildFailedError("workers", failures)) == first
