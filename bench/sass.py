"""How many instructions a program's warp issues, counted in the machine code that a configuration compiles to."""

import re
from typing import Any

from swinfast.kernels.gate import Job, compile_job
from swinfast.kernels.machine_code import look_into


def issued_instructions(job: Job) -> float:
    """Instructions that each warp of a program issues, on a path through all of the kernel and its loops.

    Raises:
        Uncountable: The machine code has other loops than the kernel's source.
    """
    return count(look_into(compile_job(job).asm["cubin"], "nvdisasm", "-c"), trips(job))


class Uncountable(ValueError):
    """Machine code with loops that are not in the source, such as those that wait."""


def trips(job: Job) -> list[int]:
    """How often each loop of a kernel runs, in the order of their ends: an inner loop before the one around it."""
    size = job.named
    if job.kernel == "attention_block":
        return [size["HEADS"]]
    if job.kernel == "window_attention":
        blocks = (size["KEYS"] - size["TAIL"]) // size["BLOCK_N"]
        return [blocks - 1] * (blocks > 2) + [size["IMAGES"]] * (size["IMAGES"] > 1)
    if job.kernel == "mlp_block":
        return [-(-size["HIDDEN"] // size["BLOCK_HIDDEN"]) - size.get("AHEAD", 0)]  # those ahead are outside the loop
    if job.kernel in ("attention_parts", "mlp_parts", "qkv_attention"):
        channels = size["C"] if "C" in size else size["HEADS"] * size["HEAD_DIM"]
        return [-(-channels // size[block]) for block in ("BLOCK_K", "BLOCK_N") if block in size]
    return [-(-size["K"] // size["BLOCK_K"])] if "BLOCK_K" in size else []


def count(sass: str, trips: list[int]) -> float:
    """Instructions, those inside loops as often as these run. A loop is a branch back to an earlier label."""
    labels, instructions, loops = {}, 0, []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = instructions
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            instructions += 1
            branch = re.search(r"\bBRA(?:\.\w+)* .*`\((\.L_\w+)\)", line)
            if branch and branch[1] in labels and instructions - labels[branch[1]] > 1:  # not the endless last branch
                loops.append((labels[branch[1]], instructions))
    if len(loops) > len(trips):
        raise Uncountable(f"{len(loops)} loops in the machine code, {len(trips)} in the source")
    while len(loops) < len(trips):  # short loops are unrolled
        trips = [often for place, often in enumerate(trips) if place != trips.index(min(trips))]
    runs = [1] * instructions
    for (start, end), often in zip(loops, trips, strict=True):
        runs[start:end] = [often * count for count in runs[start:end]]
    return sum(runs)


def arguments(launched: Any) -> dict[str, Any]:
    """A launch's arguments and constants by the names of the kernel's parameters."""
    names = launched.kernel.arg_names if launched.kernel else ()
    return dict(zip(names, launched.args, strict=False)) | launched.config.blocks | launched.constants
