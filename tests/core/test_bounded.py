"""JSON from outside, read within bounds."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import bounded

SCALARS = st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@given(JSON)
def test_what_is_within_the_bounds_is_read_as_ever(value: object) -> None:
    assert bounded.loads(json.dumps(value)) == value


@pytest.mark.parametrize(("digits", "number"), [("9" * 20, 10**20 - 1), ("1" + "0" * 30, 1e30), ("-2", -2)])
def test_a_long_number_is_a_float(digits: str, number: float) -> None:
    assert bounded.loads(f"[{digits}]") == [number]
    assert type(bounded.loads(digits)) is type(number)


def test_numbers_beyond_everything_are_infinite() -> None:
    assert bounded.loads("9" * 5_000) == math.inf
    assert bounded.loads("-" + "9" * 8_000_000) == -math.inf


@pytest.mark.parametrize("depth", [21, 900, 10_000, 1_000_000])
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused(depth: int, opened: str, closed: str) -> None:
    with pytest.raises(ValueError, match="nested"):
        bounded.loads(opened * depth + "1" + closed * depth)
    assert bounded.loads(opened * 20 + "1" + closed * 20)
