"""Sizes: what numbers make a model, and how window_size, window_ratio and img_size are resolved for each stage."""

import operator
from collections.abc import Iterable, Sequence

from torch import _assert

Size = tuple[int, int]
WindowSize = int | Size | Sequence[int | Size]


def pair(value: int | Sequence[int]) -> Size:
    return (value, value) if isinstance(value, int) else tuple(value)


def whole_number(name: str, value: int, least: int) -> int:
    """An argument of any integral type; ValueError for another or one that is less than it may be."""
    numbers = _whole_numbers([value])
    if not numbers or numbers[0] < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return numbers[0]


def stage_numbers(name: str, values: Sequence[int], least: int, count: int | None = None) -> tuple[int, ...]:
    """An argument with a whole number for each of so many stages, or of any number of them; else ValueError."""
    numbers = _whole_numbers(values)
    if not numbers or min(numbers) < least or len(numbers) != (count or len(numbers)):
        stages = "each stage" if count is None else f"each of {count} stages"
        raise ValueError(f"{name} must be whole numbers of at least {least}, one for {stages}, got {values!r}")
    return numbers


def image_size(img_size: int | Sequence[int]) -> Size:
    """img_size as (H, W); ValueError where it is none."""
    size = _whole_numbers(img_size) or _whole_numbers([img_size, img_size])
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"Expected a positive image size (H, W), got {size or img_size}.")
    return size


def _whole_numbers(values: Iterable[int]) -> tuple[int, ...]:
    """Values of integral types as int; none of them where one is of another type."""
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        return ()


def halve(size: Size) -> Size:
    return tuple((s + 1) // 2 for s in size)


def stage_input(grid: Size, index: int) -> Size:
    """The map that enters a stage, before its merging."""
    scale = 2 ** max(index - 1, 0)
    return tuple((g + scale - 1) // scale for g in grid)


def stage_windows(window_size: WindowSize, count: int) -> tuple[Size, ...]:
    onepair = isinstance(window_size, Sequence) and len(window_size) == 2 and isinstance(window_size[0], int)
    if isinstance(window_size, int) or onepair:
        window_size = (window_size,) * count
    _assert(len(window_size) == count, f"Expected {count} stage window sizes, got {window_size}.")
    windows = tuple(pair(window) for window in window_size)
    _assert(all(w > 0 for window in windows for w in window), f"Window sizes must be positive, got {windows}.")
    return windows


def stage_ratios(window_ratio: int | Sequence[int], count: int) -> tuple[int, ...]:
    ratios = (window_ratio,) * count if isinstance(window_ratio, int) else tuple(window_ratio)
    _assert(len(ratios) == count, f"Expected {count} stage window ratios, got {ratios}.")
    _assert(all(ratio > 0 for ratio in ratios), f"Window ratios must be positive, got {ratios}.")
    return ratios


def windows_from_ratio(grid: Size, window_ratio: int | Sequence[int], count: int) -> tuple[Size, ...]:
    return tuple(tuple(max(1, g // ratio) for g in grid) for ratio in stage_ratios(window_ratio, count))
