"""Compiling one launch for an architecture, with no GPU, and judging what came out.

A configuration is refused where its kernel spills registers to memory, needs more shared or tensor memory than the
architecture gives a program, or multiplies without the matrix instructions. Products of float32 that are not allowed to
be TF32 ("ieee") are ordinary multiply-adds: no matrix instruction computes them.
"""

import hashlib
import importlib
import re
import tempfile
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from .configs import Config
from .launch import Launch
from .machine_code import RULES, look_into, well_compiled

PRODUCTS = {  # matrix instructions by what their text in the assembly is
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma.sync": "mma.sync",
    "mfma": "v_mfma",
}
DERIVED = {
    "TILE", "COUNT", "PRECISION", "LOG2_E", "EXACT_GELU", "HAS_BIAS", "BLOCK", "BLOCK_D", "BLOCK_HIDDEN", "IMAGES",
    "AHEAD",
}  # fmt: skip
TENSOR_MEMORY = 512  # columns
WAIT = "griddepcontrol.wait"  # for the kernel before an overlapped one
ACCESS = re.compile(r"\b(?:ld|st|cp|red|atom)\.[\w.:]*global")


class Arch(NamedTuple):
    """What an architecture gives: shared memory in bytes, registers as 32-bit ones per unit of warps."""

    target: GPUTarget
    shared_per_program: int
    shared_per_unit: int  # a streaming multiprocessor or compute unit
    warps_per_unit: int
    programs_per_unit: int
    products: tuple[str, ...]  # the matrix instructions that count


ARCHS = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 64, 32, ("mma.sync",)),
    "sm_89": Arch(GPUTarget("cuda", 89, 32), 99 << 10, 100 << 10, 48, 24, ("mma.sync",)),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 64, 32, ("wgmma", "mma.sync")),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 64, 32, ("tcgen05", "mma.sync")),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 32, 32, ("mfma",)),
}


class Job(NamedTuple):
    """One compilation; what a process needs for it is plain data."""

    arch: str
    precision: str
    module: str
    function: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list]
    config: Config
    named: dict[str, Any]  # constants by name
    key: str  # the same for two jobs that compile the same

    @property
    def kernel(self) -> str:
        """linear, merge_norm, …, and cpb_bias.table for a module of several kernels."""
        module = self.module.rpartition(".")[2]
        part = self.function.removeprefix("_").removesuffix("_kernel")
        return module if part == module else f"{module}.{part}"

    @property
    def shape(self) -> str:
        """What the launch's constants say about its shape, in short."""
        streams = (name for name in ("residual", "x", "images") if self.signature.get(name, "i")[0] in "*t")
        words = [f"{name}={self.signature[name].strip('*')}" for name in list(streams)[:1]]
        for name, value in self.named.items():
            if name not in DERIVED and name not in self.config.blocks and value is not False:
                words.append(name.lower() if value is True else f"{name.lower()}={value}")
        return " ".join(words)


class Measured(NamedTuple):
    """What a compilation gave."""

    registers: int = 0  # per thread
    spilled: int = 0  # bytes per thread
    shared: int = 0  # bytes per program
    tensor_memory: int = 0  # columns
    product: str = ""  # the matrix instruction, "" for none
    error: str = ""  # why it did not compile
    waits: bool = False  # for the kernel before it, before any access to memory


def job_of(launched: Launch, arch: str, precision: str) -> Job:
    """What Triton's own launcher would compile for these arguments on an architecture."""
    kernel, config = launched.kernel, launched.config
    kwargs = {**launched.constants, "num_warps": config.num_warps, "num_stages": config.num_stages}
    backend, bind = _binder(kernel, arch)
    bound, specialization, _ = bind(*launched.args, **kwargs)
    _, signature, constants, attrs = kernel._pack_args(backend, kwargs, bound, specialization, None)
    named = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
    job = Job(
        arch=arch,
        precision=precision,
        module=kernel.fn.__module__,
        function=kernel.fn.__name__,
        signature=signature,
        constants=constants,
        attrs=attrs,
        config=config,
        named=named,
        key="",
    )
    compilers = triton.__version__, backend.hash(), RULES
    what = (compilers, kernel.cache_key, signature, named, attrs, *config.options.values(), arch)
    return job._replace(key=hashlib.sha256(repr(what).encode()).hexdigest())


def jobs_of(launches: Iterable[tuple[Launch, str]], arch: str) -> list[Job]:
    """What launches, each with its precision, compile on an architecture, each thing once.

    What PyTorch's library computes is nothing to compile.
    """
    jobs: dict[str, Job] = {}
    for launched, precision in launches:
        if launched.kernel is not None:
            job = job_of(launched, arch, precision)
            jobs.setdefault(job.key, job)
    return list(jobs.values())


@cache
def _binder(kernel: Any, arch: str) -> tuple[Any, Any]:
    backend = make_backend(ARCHS[arch].target)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def measure(job: Job) -> Measured:
    """Compile one job. Triton's own cache is left alone: thousands of kernels that nothing will run would fill it."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return compile_ahead(job)


def compile_ahead(job: Job) -> Measured:
    """Compile one job into Triton's cache, where a launch on such a GPU finds it."""
    try:
        compiled = compile_job(job)
    except Exception as error:  # whatever a compiler throws is what the row reports
        return Measured(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200])
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    if "cubin" in compiled.asm:
        registers, spilled = _cuda_resources(compiled.asm["cubin"])
    else:
        registers, spilled = _amd_resources(assembly)
    product = next((name for name, text in PRODUCTS.items() if text in assembly), "")
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return Measured(registers, spilled, compiled.metadata.shared, tensor_memory, product, waits=waits_first(assembly))


def compile_job(job: Job) -> CompiledKernel:
    """What Triton makes of a job, from its cache or into it."""
    kernel = getattr(importlib.import_module(job.module), job.function)
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(kernel, job.signature, job.constants, job.attrs)
    return well_compiled(triton.compile, source, target=ARCHS[job.arch].target, options=job.config.options)


def waits_first(assembly: str) -> bool:
    """Whether a kernel in PTX waits for the one before it, and does so before it reads or writes memory."""
    access = ACCESS.search(assembly)
    return WAIT in assembly and (access is None or assembly.index(WAIT) < access.start())


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes on the stack): spills are the only use of it."""
    text = look_into(cubin, "cuobjdump", "-res-usage")
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def _amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers with the accumulators', bytes of scratch memory)."""
    vector, scratch = (
        re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return int(vector[1]), int(scratch[1])


def programs_per_unit(job: Job, measured: Measured) -> int:
    """How many programs a streaming multiprocessor or compute unit holds at once."""
    arch = ARCHS[job.arch]
    limits = [arch.programs_per_unit, arch.warps_per_unit // job.config.num_warps]
    if arch.target.backend == "hip":  # four SIMDs of 512 registers a lane, by eight
        waves = 4 * (512 // max(8, -(-measured.registers // 8) * 8))
        limits.append(waves // job.config.num_warps)
        limits.append(arch.shared_per_unit // max(1, measured.shared))
    else:  # 65536 registers, by 256 a warp; a kilobyte of shared memory a program is the driver's
        limits.append(65536 // (job.config.num_warps * max(256, -(-measured.registers // 8) * 256)))
        limits.append(arch.shared_per_unit // (measured.shared + 1024))
        limits.append(TENSOR_MEMORY // max(1, measured.tensor_memory))
    return min(limits)


def problems(job: Job, measured: Measured) -> list[str]:
    """Why a configuration is refused, nothing where it is fit."""
    arch = ARCHS[job.arch]
    if measured.error:
        return [f"does not compile: {measured.error}"]
    found = []
    if measured.spilled:
        found.append(f"spills {measured.spilled} bytes a thread")
    if measured.shared > arch.shared_per_program:
        found.append(f"needs {measured.shared >> 10} KB of shared memory, there are {arch.shared_per_program >> 10}")
    if measured.tensor_memory > TENSOR_MEMORY:
        found.append(f"needs {measured.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY}")
    if job.config.blocks.get("OVERLAPPED") and not measured.waits:
        found.append("overlaps with the kernel before it and does not wait for that first")
    wanted = wanted_products(job)
    if wanted and measured.product not in wanted:
        found.append(f"multiplies with {measured.product or 'no matrix instruction'}, expected {' or '.join(wanted)}")
    return found


def wanted_products(job: Job) -> tuple[str, ...]:
    """The matrix instructions of which one must be there; none for kernels without products or with exact float32."""
    if "PRECISION" not in job.named:
        return ("wgmma",) if job.module.endswith("warpgroups") else ()
    if job.precision == "float32" and job.named["PRECISION"] == "ieee":
        return ()
    products = ARCHS[job.arch].products
    rows = job.named.get("BLOCK_M", job.named.get("SLOTS", 0))
    if job.arch == "sm_90" and job.precision != "tf32" and job.config.num_warps >= 4 and rows >= 64:
        return ("wgmma",)
    return products
