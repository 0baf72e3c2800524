"""Checks of arguments."""

import operator
from typing import Any


def whole_number(name: str, value: Any, least: int, expected: str = "a whole number") -> int:
    """An argument of any integral type but bool; ValueError for another or one that is less than it may be."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
