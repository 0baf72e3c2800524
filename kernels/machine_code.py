"""Machine code for NVIDIA's GPUs: looking into it, and refusing what its compiler got wrong.

ptxas 12.8, which Triton 3.6 and 3.7 bring along for GPUs up to compute capability 9.0, computes addresses of matrix
products of some kernels from a register that nothing has written. Such a kernel reads beyond its shared memory, which
ends the CUDA context, or multiplies other numbers (seen on an H200). So what Triton compiles of this package is looked
into before it can be launched, and what is wrong is compiled again by the ptxas that Triton brings along for newer GPUs
(12.9 or 13.1, which compile the same PTX well).
"""

import hashlib
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import triton

T = TypeVar("T")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCH = 90  # whose products take addresses from uniform registers, and whose kernels that ptxas compiles
RULES = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
MARK = f"looked_into_{RULES}"  # a file beside the kernels in Triton's cache in which nothing was found by these rules
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
REGISTER = re.compile(r"(g?desc\[)?\b(U?R)(\d+)\b")
PREDICATE = re.compile(r"U?P(\d|T)")
WRITE_NONE = ("UISETP", "UTMA", "UBLK", "ST", "RED")  # whose first operand, a register, is read
ADDRESS = ("U", "R2UR", "HGMMA")  # instructions that addresses of products are computed with; and IADD3 with a carry
PARTS = (  # take bits or halves of registers, or one of two, and may be given a register of which nothing is taken
    "UPRMT", "UP2UR", "ULOP3", "PRMT", "LOP3", "SHFL", "SEL", "FSEL", "HFMA2", "F2FP",
)  # fmt: skip
FOUR, TWO = ("HMMA", "IMMA", "LDSM", "MOVM"), ("CS2R", "D")  # write more than one register, as .128 and .64 say
STACK = ("R", 1)  # the stack's pointer, of 32 bits


class Miscompiled(RuntimeError):
    """A kernel reads what nothing has written."""


def look_into(cubin: bytes, tool: str, option: str) -> str:
    """What one of the tools that come with Triton says of machine code for NVIDIA's GPUs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def unwritten(sass: str) -> list[str]:
    """Instructions that compute addresses from registers before anything has written these, in the order of the code.

    What is computed from such a register is written no more than that is: a copy of nothing is nothing. For one the
    compiler also takes the stack's pointer, of which nobody needs an upper half.
    """
    written: set[tuple[str, int]] = set()
    found = []
    for line in sass.splitlines():
        instruction = INSTRUCTION.search(line)
        if instruction is None:
            continue
        name, operands = instruction[1], [operand.strip() for operand in instruction[2].split(",")]
        while len(operands) > 1 and PREDICATE.fullmatch(operands[0]):  # which some instructions write, too
            del operands[0]
        first = re.match(r"(U?R)(\d+)\b", operands[0])
        writes = []
        if first and not name.startswith(WRITE_NONE):
            writes = [(first[1], int(first[2]) + k) for k in range(_width(name))]
            operands = operands[1:]
        reads = set(_reads(name, operands))
        wrong = not name.startswith(PARTS) and (reads - written - {STACK} or (STACK in reads and ".X" in name))
        carries = name.startswith("IADD3") and any(PREDICATE.fullmatch(one) for one in operands)
        if wrong and (carries or name.startswith(ADDRESS)):
            found.append(" ".join(instruction.groups()))
        if wrong:
            written.difference_update(writes)
        else:
            written.update(writes)
    return found


def _width(name: str) -> int:
    """How many registers an instruction writes, at most."""
    if product := re.match(r"HGMMA\.64x(\d+)x", name):
        return int(product[1]) // 2
    if ".128" in name or name.startswith(FOUR):
        return 4
    return 2 if ".64" in name or ".WIDE" in name or name.startswith(TWO) else 1


def _reads(name: str, operands: list[str]) -> Iterator[tuple[str, int]]:
    """Registers, of a product those of its descriptor alone. A descriptor is two of them; where the left factor of a
    product is in registers, the latter two of its four."""
    for operand in operands:
        for kind, register, number in REGISTER.findall(operand):
            place = int(number)
            if name.startswith("HGMMA") and register == "R":
                continue
            if kind == "gdesc[":
                places = range(place + (2 if re.match(r"R\d", operands[0]) else 0), place + 4)
            else:
                places = range(place, place + (2 if kind == "desc[" or name.startswith("UIADD3.64") else 1))
            for one in places:
                yield register, one


_one_at_a_time = threading.Lock()


@contextmanager
def newer_compiler() -> Iterator[None]:
    """Have Triton compile anew, by its ptxas for newer GPUs. In its cache that takes the place of what was refused."""
    nvidia, compilation = triton.knobs.nvidia, triton.knobs.compilation
    with _one_at_a_time, nvidia.scope(), compilation.scope():  # else one would restore what another had set
        nvidia.ptxas = nvidia.ptxas_blackwell.path
        compilation.always_compile = True
        yield


_listener: Any = ...  # what refuse_miscompiled has set


def refuse_miscompiled() -> None:
    """From now on, have Triton raise Miscompiled where it would return a kernel of this package that is.

    Triton has a place for one listener, whose last owner may be somebody else by the next launch.
    """
    global _listener
    before = triton.knobs.compilation.listener
    if before is _listener:
        return

    def listener(*, src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], **rest: Any) -> None:
        if before is not None:
            before(src=src, metadata=metadata, metadata_group=metadata_group, **rest)
        function, target = getattr(getattr(src, "fn", None), "fn", None), metadata["target"]
        ours = str(getattr(function, "__module__", None)).startswith(f"{__package__}.")
        if ours and (target.backend, target.arch) == ("cuda", ARCH):
            _check(function.__name__, metadata_group)

    triton.knobs.compilation.listener = _listener = listener


def well_compiled(compile: Callable[..., T], *args: Any, **options: Any) -> T:
    """What a function of Triton's returns that compiles; where that is refused, by the newer compiler.

    Raises:
        Miscompiled: That was refused, too.
    """
    refuse_miscompiled()
    try:
        return compile(*args, **options)
    except Miscompiled:
        with newer_compiler():
            return compile(*args, **options)


def _check(name: str, files: dict[str, str]) -> None:
    cubin, ptx = (next((Path(f) for f in files.values() if f.endswith(ending)), None) for ending in (".cubin", ".ptx"))
    if cubin is None or cubin.with_name(MARK).exists():
        return
    try:
        multiplies = ptx is None or b"wgmma" in ptx.read_bytes()  # the tool takes half a second
        found = unwritten(look_into(cubin.read_bytes(), "nvdisasm", "-c")) if multiplies else []
    except (OSError, subprocess.CalledProcessError):
        return  # without the tool nobody knows
    if found:
        raise Miscompiled(
            f"{name} was compiled to machine code that reads what nothing has written ({found[0]}): a bug of ptxas, "
            "which TRITON_PTXAS_PATH can replace by another"
        )
    with suppress(OSError):
        cubin.with_name(MARK).touch()
