"""Sizes: how window_size, window_ratio and img_size are resolved for each stage."""

from collections.abc import Sequence

Size = tuple[int, int]
WindowSize = int | Size | Sequence[int | Size]


def pair(value: int | Sequence[int]) -> Size:
    return (value, value) if isinstance(value, int) else tuple(value)


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
    assert len(window_size) == count, f"Expected {count} stage window sizes, got {window_size}."
    windows = tuple(pair(window) for window in window_size)
    assert all(w > 0 for window in windows for w in window), f"Window sizes must be positive, got {windows}."
    return windows


def stage_ratios(window_ratio: int | Sequence[int], count: int) -> tuple[int, ...]:
    ratios = (window_ratio,) * count if isinstance(window_ratio, int) else tuple(window_ratio)
    assert len(ratios) == count, f"Expected {count} stage window ratios, got {ratios}."
    assert all(ratio > 0 for ratio in ratios), f"Window ratios must be positive, got {ratios}."
    return ratios


def windows_from_ratio(grid: Size, window_ratio: int | Sequence[int], count: int) -> tuple[Size, ...]:
    return tuple(tuple(max(1, g // ratio) for g in grid) for ratio in stage_ratios(window_ratio, count))
