"""Whatever is in a file: a recipe and rows are read, or refused with one line a mistake."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from san_llm.data.sources import read_rows
from san_llm.errors import InputError
from san_llm.recipe.read import load_recipe
from san_llm.shown import plain

HERE = Path(__file__).parent / "bad_inputs"
ANYWHERE = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEEDS = {
    kind: [
        file.read_bytes() for file in sorted((HERE / kind).iterdir()) if file.stat().st_size < 2000
    ]
    for kind in ("recipes", "rows")
}


def damaged(kind: str) -> st.SearchStrategy[bytes]:
    """Bytes of their own, and known bad files with some bytes replaced, cut, or put twice."""

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        raw = draw(st.sampled_from(SEEDS[kind]))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(raw)))
            end = min(len(raw), at + draw(st.integers(0, 20)))
            put = draw(
                st.binary(max_size=8) | st.sampled_from([b"{", b"[", b"&a ", b"\x1b", b"\0"])
            )
            raw = raw[:at] + put + raw[end:]
        return raw

    return build() | st.binary(max_size=200)


@ANYWHERE
@given(raw=damaged("recipes"))
def test_a_recipe_of_any_bytes_is_read_or_refused(tmp_path, raw):
    path = tmp_path / "any.yaml"
    path.write_bytes(raw)
    try:
        recipe = load_recipe(path)
    except InputError as error:
        for line in str(error).splitlines():
            assert plain(line).isprintable()
    else:
        assert recipe.name


@ANYWHERE
@given(raw=damaged("rows"), suffix=st.sampled_from([".json", ".jsonl"]))
def test_rows_of_any_bytes_are_read_or_refused(tmp_path, raw, suffix):
    path = tmp_path / f"any{suffix}"
    path.write_bytes(raw)
    message, rows = "", []
    try:
        rows = read_rows(path)
    except InputError as error:
        message = str(error)
    assert message.startswith(str(path)) != bool(rows)
    assert "\n" not in message
    for row in rows:
        (row.instruction + row.output).encode()  # whole characters only


@given(text=st.text(max_size=3000))
def test_what_is_shown_is_printable_and_ends(text):
    shown = plain(text)
    assert shown.isprintable()
    assert len(shown) <= 10 * 1010


@pytest.mark.parametrize("secret", ["me:hunter2", "hunter2"])
def test_credentials_of_an_address_are_masked(secret):
    assert plain(f"https://{secret}@example.com/a") == "https://***@example.com/a"
