"""A channel map is read off pairs of channels, and means the same at any width."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from san_llm.measure.maps import ChannelMap, find_map
from san_llm.san.formulas import carried

COUNTS = st.integers(1, 4)


@st.composite
def maps(draw):
    """A form, and two sizes of a writer and a reader that it fits."""
    parts = draw(COUNTS)
    units = draw(COUNTS) if parts == 1 else 1
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    repeat, tile = draw(COUNTS), draw(COUNTS)
    form = ChannelMap(parts, units, float(before), float(after), repeat, tile)
    sizes = []
    for head in (draw(st.integers(2, 5)), draw(st.integers(2, 9))):
        read = units * head
        sizes.append((parts * read * (1 + before + after), parts * read * repeat * tile))
    return form, sizes


@given(maps())
def test_a_form_is_found_and_fits_another_width(drawn):
    form, ((d_out, d_in), wider) = drawn
    found = find_map(form.source(d_out, d_in), d_out)
    assert found is not None
    assert (found.source(*wider) == form.source(*wider)).all()


@given(maps())
def test_as_a_carry_it_takes_the_same_channels(drawn):
    form, sizes = drawn
    for d_out, d_in in sizes:
        carry = form.carry(d_out, d_in)
        assert (carried(np.arange(d_out), carry) == form.source(d_out, d_in)).all()


def test_by_hand():
    # GPT-NeoX keeps q, k and v of each head together: two heads of two channels.
    assert find_map(np.array([4, 5, 10, 11]), 12) == ChannelMap(2, 1, 2.0, 0.0)
    # Two value heads for four query heads.
    assert find_map(np.array([0, 1, 0, 1, 2, 3, 2, 3]), 4) == ChannelMap(1, 2, 0, 0, 2)
    # Four neighbours, side by side.
    assert find_map(np.array([0, 1, 2] * 4), 3).source(6, 24).tolist() == [0, 1, 2, 3, 4, 5] * 4
    assert find_map(np.array([0, 2, 1]), 3) is None
