"""Which tile sizes, warps and pipeline stages a kernel is launched with, and which kernels a stage is made of.

Nothing is tuned at run time: the choices are rows of configs/<architecture>.json, the first that matches wins, and
configs/default.json covers what an architecture's own table does not. Each row says where it came from.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).with_name("configs")
MANY = 1 << 31  # rows
LARGEST_TILE = 4096  # channels
NO_SIZES = ("maxnreg", "OVERLAPPED")  # among blocks


class Config(NamedTuple):
    """One choice.

    Attributes:
        blocks: Tile sizes by the names of the kernel's constexprs; for a form, or where an operation has several, which
            kernel ("use"). "maxnreg" limits the registers of a thread, so that more programs fit a multiprocessor.
            "OVERLAPPED" lets the kernel be started before the one before it is done: GPUs of compute capability 9.0 and
            newer can.
        num_warps, num_stages: As Triton takes them.
        source: Where the choice came from.
    """

    blocks: dict[str, Any]
    num_warps: int
    num_stages: int
    source: str

    @property
    def sizes(self) -> dict[str, Any]:
        """The blocks, without which kernel has them."""
        return {name: size for name, size in self.blocks.items() if name != "use"}

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles and launches with, beside the constexprs."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if "maxnreg" in self.blocks:
            options["maxnreg"] = self.blocks["maxnreg"]
        if self.blocks.get("OVERLAPPED"):
            options["launch_pdl"] = True
        return options


Choose = Callable[[str, dict[str, int]], Config | None]
_choose: Choose | None = None


@contextmanager
def override(choose: Choose) -> Iterator[None]:
    """Ask ``choose(kernel, shape)`` before the tables, which decide where it returns None: for tuning and tests.

    It holds for every thread.
    """
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


def config(kernel: str, arch: str, precision: str, **shape: int) -> Config:
    """The configuration of a kernel for a shape.

    Args:
        kernel: The kernel's name, or that of a part of a stage that several kernels can compute ("attention_half").
        arch: sm_90, gfx942, …
        precision: float16, bfloat16, float32 or tf32.
        shape: Sizes that rows are matched by: channels, tokens, …

    Raises:
        KeyError: Not even the default table has a row that matches.
    """
    if _choose is not None and (chosen := _choose(kernel, shape)) is not None:
        return chosen
    try:
        return _config(kernel, arch, precision, **shape)
    except TypeError:  # sizes that are symbols while a model is traced have no hash: a configuration is for one shape
        return _config(kernel, arch, precision, **{name: int(size) for name, size in shape.items()})


@lru_cache(maxsize=4096)
def _config(kernel: str, arch: str, precision: str, **shape: int) -> Config:
    for table in (arch, "default"):
        for row in rows(table):
            if row["kernel"] == kernel and precision in row["precision"] and matches(row.get("when", {}), shape):
                return Config(row.get("blocks", {}), row.get("num_warps", 4), row.get("num_stages", 1), row["source"])
    raise KeyError(f"no configuration of {kernel} for {precision} on {arch} with {shape}")


def forget() -> None:
    """Read the tables anew at the next call: they were rewritten."""
    rows.cache_clear()
    _config.cache_clear()


@cache
def rows(table: str) -> list[dict]:
    """The rows of one table, none for an architecture that has no table."""
    file = FOLDER / f"{table}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def matches(when: dict[str, Any], shape: dict[str, int]) -> bool:
    """Whether a shape fits a row: {"channels": 96}, {"channels": [96, 128]} or, for at most, {"channels_max": 128}."""
    for key, wanted in when.items():
        if key.endswith("_max"):
            if shape[key.removesuffix("_max")] > wanted:
                return False
        elif shape[key] not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def tile(chosen: Config) -> str:
    """A configuration in short: 128x64x32 w4 s3.

    Then p2 for two programs to a multiprocessor that stay, r168 for a limit of registers, o for overlapped.
    """
    blocks = "x".join(str(size) for name, size in chosen.blocks.items() if name not in (*NO_SIZES, "PER_UNIT")) or "-"
    stay = f" p{chosen.blocks['PER_UNIT']}" if "PER_UNIT" in chosen.blocks else ""
    limit = f" r{chosen.blocks['maxnreg']}" if "maxnreg" in chosen.blocks else ""
    overlapped = " o" if chosen.blocks.get("OVERLAPPED") else ""
    return f"{blocks} w{chosen.num_warps} s{chosen.num_stages}{stay}{limit}{overlapped}"


def cdiv(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least size."""
    return 1 << (int(size) - 1).bit_length()


def columns(channels: int) -> tuple[int, int]:
    """How a row of channels is cut into one to three tiles of a power of two: (tile, tiles), the fewest wasted.

    96 * 2^k channels are three tiles with nothing wasted.
    """
    return _columns(int(channels))


def at_most(rows: int) -> int:
    """A number of rows as tables are asked for it: rounded up, so that few different ones are."""
    # while a model is traced for any batch size it is a symbol, and a configuration for that is one for many rows
    return power_of_two(max(1, rows)) if isinstance(rows, int) else MANY


def row_tiles(chosen: Config, channels: int) -> dict[str, int]:
    """TILE and COUNT of a kernel that holds whole rows: those of columns(), or tiles of the size that a row names."""
    tile, count = columns(channels)
    if "TILE" in chosen.blocks:
        tile = chosen.blocks["TILE"]
        count = cdiv(channels, tile)
    return {"TILE": tile, "COUNT": count}


@cache
def _columns(channels: int) -> tuple[int, int]:
    choices = []
    for count in (1, 2, 3):
        tile = max(16, power_of_two(cdiv(channels, count)))
        choices.append((tile * count, count, tile))
    _, count, tile = min(choice for choice in choices if choice[2] <= LARGEST_TILE)
    return tile, count
