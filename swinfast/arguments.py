"""Checks of arguments, of functions and on the command line."""

import argparse
import math
import operator
from typing import Any

from torch import nn

LARGEST = 2**31 - 1  # number that makes sense; JSON's and those of Python have no end


def positive(text: str) -> int:
    """An argparse type for whole numbers of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, got {text!r}")
    return int(text)


def class_count(text: str) -> int:
    """An argparse type for numbers of classes."""
    if not text.isdecimal() or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"must be a number of classes, got {text!r}")
    return int(text)


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


def finite_numbers(values: Any) -> tuple[float, ...] | None:
    """What a mean or std is in finite numbers, None for anything else."""
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        return None
    return numbers if numbers and all(map(math.isfinite, numbers)) else None


def check_model(name: str, value: Any) -> None:
    """TypeError for an argument that is no model."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
