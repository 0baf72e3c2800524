"""Which configurations of a kernel are worth trying: the whole grid around what is plausible, the nearest first."""

import itertools
import math

import triton
from swinfast.kernels.configs import MANY, NO_SIZES, Config, columns, row_tiles, tile
from swinfast.kernels.gate import ARCHS
from swinfast.kernels.shapes import PRECISIONS

GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "linear": {
        "BLOCK_M": (16, 32, 64, 128, 256), "BLOCK_N": (32, 64, 128, 256), "BLOCK_K": (16, 32, 64, 128),
        "PER_UNIT": (0, 1, 2), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5),
    },
    "linear_norm_residual": {
        "BLOCK_M": (16, 32, 64, 128), "BLOCK_K": (16, 32, 64, 128), "num_warps": (4, 8, 16), "num_stages": (2, 3, 4),
    },
    "norm_residual": {"BLOCK_M": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8, 16), "num_stages": (1,)},
    "mlp_block": {
        "BLOCK_M": (16, 32, 64, 128), "BLOCK_HIDDEN": (16, 32, 64, 128), "AHEAD": (0, 2), "num_warps": (4, 8, 16),
        "num_stages": (1, 2, 3),
    },
    "patch_embed": {
        "BLOCK_M": (16, 32, 64, 128, 256), "BLOCK_K": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3),
    },
    "merge_norm": {"BLOCK_M": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8), "num_stages": (1,)},
    "window_attention": {
        "BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128), "IMAGES": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3),
    },
    "attention_block": {"num_warps": (4, 8, 16), "num_stages": (1, 2, 3)},
    "attention_parts": {
        "BLOCK_K": (16, 32, 64, 128, 256), "BLOCK_N": (32, 64, 128, 256), "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    "mlp_parts": {
        "BLOCK_M": (16, 32, 64, 128), "BLOCK_HIDDEN": (32, 64, 128), "BLOCK_K": (32, 64, 128), "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8), "num_stages": (2, 3, 4),
    },
    "qkv_attention": {"BLOCK_K": (16, 32, 64, 128, 256), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)},
}  # fmt: skip
LAUNCH = ("num_warps", "num_stages")
REGISTERS = {4: (96, 128, 168), 8: (80, 128)}  # limits, by a program's warps: each makes room for one more program
LIBRARY = Config({"use": "library"}, 4, 1, "a candidate")  # of linear
WARPGROUPS = {  # where all weights can be held: blocks and warps
    "mlp_block": (
        *(({}, warps) for warps in (16, 8)),
        *(({"CHUNK": chunk, "WIDE": wide}, 8) for chunk in (64, 128) for wide in (64, 128)),
    ),
    "attention_block": (({}, 4), ({"JOINED": 1}, 4)),
}
# which hold rows of channels: in three tiles or in one
IN_TILES = ("attention_block", "linear_norm_residual", "mlp_block", "norm_residual")
FEW_REGISTERS = ("norm_residual", "merge_norm")
DESCRIBES = ("sm_90", "sm_100")  # architectures with an engine that copies what a descriptor describes
OVERLAPS = DESCRIBES  # and that can start a kernel before the one before it is done
SIXTEEN_BITS = ("float16", "bfloat16")  # have the same instructions, and rows in common
FEW = 4096  # rows, up to which candidates lie around those of AROUND, with more and smaller programs than the present
AROUND = {
    "linear": Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128}, 4, 3, ""),
    "linear_norm_residual": Config({"BLOCK_M": 16, "BLOCK_K": 64}, 8, 3, ""),
    "mlp_block": Config({"BLOCK_M": 32, "BLOCK_HIDDEN": 64}, 8, 2, ""),
    "norm_residual": Config({"BLOCK_M": 1}, 2, 1, ""),
    "merge_norm": Config({"BLOCK_M": 1}, 4, 1, ""),
}
WASTE = 1.34  # columns computed over columns wanted
PER_THREAD = (4, 256)  # float32 sums that a thread keeps; of parts, of which it loads many for each, one is enough


def candidates(
    kernel: str, sizes: dict[str, int], precision: str, present: Config, arch: str, most: int = 24
) -> list[Config]:
    """Configurations to try, the present one first, then by how far they are from it (or from AROUND).

    Args:
        kernel: Its name; sizes: what its configuration is looked up by.
        most: So many beside the present one.
    """
    grid = GRIDS[kernel]
    if kernel in IN_TILES:
        grid = {
            "TILE": tuple(dict.fromkeys((columns(sizes["channels"])[0], triton.next_power_of_2(sizes["channels"]))))
        } | grid
    few = sizes.get("rows", MANY) <= FEW
    options = ({}, {"OVERLAPPED": True}) if few and arch in OVERLAPS else ({},)  # a launch takes as long as its kernel
    found = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        usual = {"IMAGES": 1, "PER_UNIT": 0, "AHEAD": 0, "TILE": grid.get("TILE", (0,))[0]}  # what a row need not say
        blocks = {name: size for name, size in settings.items() if name not in LAUNCH and size != usual.get(name)}
        for option in options:
            candidate = Config(blocks | option, settings["num_warps"], settings["num_stages"], "a candidate")
            if candidate[:3] != present[:3] and plausible(kernel, sizes, precision, candidate, arch):
                found.append(candidate)
    center = AROUND.get(kernel, present) if few and not sizes.get("in_parts") else present
    if "use" in center.blocks:  # no distance from a library
        center = Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3, "")
    found += [one for one in _with_options(kernel, present, arch) if plausible(kernel, sizes, precision, one, arch)]

    found = sorted({tile(one): one for one in found}.values(), key=lambda one: _distance(one, center))
    others = [LIBRARY] if kernel == "linear" else []
    if sizes.get("held"):
        others = [
            Config({"use": "warpgroups"} | blocks, warps, 1, "a candidate") for blocks, warps in WARPGROUPS[kernel]
        ]
    others = [one for one in others if one[:3] != present[:3]]
    return [present, *others, *found[: most - len(others)]]


def _with_options(kernel: str, present: Config, arch: str) -> list[Config]:
    """The present choice overlapped, or not if it is, and with other limits of registers where it keeps many."""
    if not arch.startswith("sm_") or "use" in present.blocks:
        return []
    found = []
    if arch in OVERLAPS:
        other = {name: size for name, size in present.blocks.items() if name != "OVERLAPPED"}
        found.append(other if "OVERLAPPED" in present.blocks else other | {"OVERLAPPED": True})
    if kernel not in FEW_REGISTERS:
        limits = REGISTERS.get(present.num_warps, ())
        found += [present.blocks | {"maxnreg": one} for one in limits if one != present.blocks.get("maxnreg")]
    return [present._replace(blocks=blocks, source="a candidate") for blocks in found]


def plausible(kernel: str, sizes: dict[str, int], precision: str, candidate: Config, arch: str) -> bool:
    """Whether a configuration may fit the kernel and the architecture: what is left is for the compiler to say."""
    blocks, threads = candidate.blocks, 32 * candidate.num_warps
    if "PER_UNIT" in blocks and (arch not in DESCRIBES or precision not in SIXTEEN_BITS or sizes["rows"] <= FEW):
        return False
    if "k" in sizes and blocks.get("BLOCK_K", 0) > triton.next_power_of_2(sizes["k"]):
        return False
    if kernel == "window_attention":
        tokens = max(16, triton.next_power_of_2(sizes["tokens"]))
        if max(blocks["BLOCK_M"], blocks["BLOCK_N"]) > tokens:
            return False
        return blocks["BLOCK_M"] * max(blocks["BLOCK_N"], sizes["block_d"]) <= PER_THREAD[1] * threads // 2
    if kernel == "attention_block":
        return True
    if kernel in ("attention_parts", "mlp_parts", "qkv_attention"):
        channels = triton.next_power_of_2(sizes["channels"])
        if blocks["BLOCK_K"] > channels or blocks.get("BLOCK_N", 0) > channels:
            return False
    if kernel in ("attention_parts", "qkv_attention"):
        return True
    if kernel == "mlp_parts":
        width = max(blocks["BLOCK_N"], blocks["BLOCK_HIDDEN"])
    elif "BLOCK_N" in blocks:
        width = blocks["BLOCK_N"]
    else:
        width = _width(candidate, sizes["channels"]) * (4 if kernel == "merge_norm" else 1)
    if blocks["BLOCK_M"] > max(16, sizes.get("rows", MANY)):
        return False
    if "n" in sizes and -(-sizes["n"] // width) * width > WASTE * max(sizes["n"], 64):
        return False
    fewest = 1 if sizes.get("in_parts") else PER_THREAD[0]
    if not fewest <= blocks["BLOCK_M"] * width / threads <= PER_THREAD[1]:
        return False
    if kernel in FEW_REGISTERS:
        return True
    depth = blocks.get("BLOCK_K") or blocks["BLOCK_HIDDEN"]
    stage_bytes = (blocks["BLOCK_M"] + width) * depth * PRECISIONS[precision].itemsize
    return stage_bytes * candidate.num_stages <= ARCHS[arch].shared_per_program if arch in ARCHS else True


def _width(candidate: Config, channels: int) -> int:
    return math.prod(row_tiles(candidate, channels).values())


def _distance(one: Config, other: Config) -> float:
    """Doublings of blocks and warps, stages, and options, that lie between two configurations."""
    sizes = {name: size for name, size in one.blocks.items() if name not in NO_SIZES}
    steps = sum(abs(math.log2(size / other.blocks.get(name, size))) for name, size in sizes.items())
    steps += one.blocks.get("maxnreg") != other.blocks.get("maxnreg")
    steps += sum((name in one.blocks) != (name in other.blocks) for name in ("PER_UNIT", "IMAGES", "AHEAD"))
    return steps + abs(math.log2(one.num_warps / other.num_warps)) + abs(one.num_stages - other.num_stages)
