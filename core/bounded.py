"""JSON from outside, read within bounds: no number and no nesting in it can stop the program or keep it busy."""

from __future__ import annotations

import json
from typing import Any

MAX_DIGITS = 20  # of a whole number: what 64 bits can hold
MAX_DEPTH = 20  # of lists and objects inside each other; what trainers and galleries write has a handful


def number(digits: str) -> int | float:
    """Return a JSON integer, as a float where it has more than MAX_DIGITS digits: infinity beyond a float's range.

    Python refuses to read more than 4,300 digits, and takes a time that grows with their square before that.
    """
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def loads(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is no JSON, or is nested more than MAX_DEPTH deep.
    """
    try:
        value = json.loads(text, parse_int=number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level: list[list[Any] | dict[str, Any]] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        every = (inner for item in level for inner in (item.values() if type(item) is dict else item))
        level = [inner for inner in every if type(inner) is dict or type(inner) is list]
        if not level:
            return value
    raise ValueError("nested too deeply")
