"""What can run a model, measured side by side: first the answers, then the speed.

An engine is timed only where its answers are right. swinfast must pass ``swinfast.verify``; the others must be near the
plain model in float64, and their error stands beside their speed. One that fails is left out, and the reason is told;
so is swinfast where Triton failed at a module, since what PyTorch computes in its place is not what is to be measured.
"""

import copy
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .benchmark import PeakMemory, Timing, compare, copies_beyond_cache, rotating
from .errors import in_a_line
from .fused import Fused, Settings
from .optimize import optimize
from .verify import ABSOLUTE, FACTOR, tf32_as_in_products, verify

Forward = Callable[[Tensor], Tensor]

LEAST_IMAGES = 8  # that errors are taken over
VERIFIED_IMAGES = 4  # that swinfast.verify is given; the error bar holds over all
ORACLE_IMAGES = 32  # at a time, in float64
SETTLE = 3  # calls until a GPU's engine has compiled, captured and allocated what it will
# Relative RMS error from which an engine is wrong and not only less exact: some ten times the noise of plain models.
FAR_OFF = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}


class WrongAnswer(RuntimeError):
    """swinfast fails its own verification."""


class Engine(NamedTuple):
    """Attributes:
    name: As tables show it.
    build: Makes what is called, with weights of its own, from a plain float32 model and the dtype to run in.
    verified: Held to swinfast.verify, and an error where it fails.
    model, plain: Name and plain model of an engine that runs another model than its neighbours.
    shares_pool: Keeps its memory in the pool of torch.compile's CUDA graphs, where it can't be told from others'.
    answers: False for what only bounds the engines that it takes turns with: there is nothing to check.
    """

    name: str
    build: Callable[[nn.Module, torch.dtype], Forward]
    verified: bool = False
    model: str | None = None
    plain: nn.Module | None = None
    shares_pool: bool = False
    answers: bool = True

    @property
    def label(self) -> str:
        """Unique in a run."""
        return self.name if self.model is None else f"{self.model} {self.name}"


@dataclass(frozen=True)
class Measurement:
    """One engine.

    Attributes:
        model, plain: As in Engine; plain is set in any case.
        error: Relative RMS error of its outputs against the plain model in float64, weights rounded to the dtype; None
            where it has no answers.
        agreement: Share of images with the same largest output as there, None where outputs are no [B, classes].
        peak_memory: Bytes that a forward takes, weights included; None where it can't be told: on a CPU, and for
            engines that share a pool with one before them.
        graph_failure: Why swinfast has no CUDA graph of something, where capturing one failed.
    """

    engine: str
    model: str | None
    plain: nn.Module
    timing: Timing
    error: float | None
    agreement: float | None
    peak_memory: int | None
    graph_failure: str | None = None


@dataclass
class Comparison:
    """Engines of one interleaved run, and why others are left out of it, by label."""

    measured: list[Measurement] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def tried(self, label: str, action: Callable[[], object]) -> None:
        """Do something for an engine, which is left out from then on where that fails."""
        if label in self.left_out:
            return
        try:
            action()
        except WrongAnswer:
            raise
        except Exception as error:  # out of memory, a compiler's own types, …: the others go on
            self.left_out[label] = in_a_line(error, ValueError)


def swinfast_engine() -> Engine:
    return Engine("swinfast", lambda plain, dtype: optimize(plain, dtype=dtype), verified=True)


def eager_engine(origin: str) -> Engine:
    """The plain model as it is; origin is the word for where it comes from."""
    return Engine(f"{origin} eager", _converted)


def compiled_engine(origin: str, mode: str | None = None) -> Engine:
    """torch.compile for one shape; "max-autotune" has CUDA graphs on a GPU."""
    name = f"{origin} compiled" if mode is None else f"{origin} compiled, {mode}"
    return Engine(name, compiler_of(_converted, mode), shares_pool=mode is not None)


def compiler_of(build: Callable[[nn.Module, torch.dtype], nn.Module], mode: str | None = None) -> Callable:
    """Like build, with torch.compile after it."""
    return lambda plain, dtype: torch.compile(build(plain, dtype), mode=mode, dynamic=False)


def _converted(plain: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(plain).to(dtype)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model is made for."""
    embed = model.patch_embed
    return embed.proj.in_channels, *embed.img_size


@tf32_as_in_products()
def measure(
    plain: nn.Module, engines: Sequence[Engine], dtype: torch.dtype, batch: int, device: torch.device, rounds: int = 10
) -> Comparison:
    """Check and time engines in one interleaved run.

    Args:
        plain: The model in float32 on the device, in eval mode, with weights that matter (benchmark.randomise).
        engines: Built in this order, and all kept until the end.
        dtype: That models and images are converted to.
        batch: Images at a time.
        rounds: As in benchmark.compare.

    Raises:
        WrongAnswer: A verified engine is wrong.
        ValueError: A device that computes behind the clock's back.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a GPU of CUDA or ROCm, for which there is a clock, got {device}")
    comparison, ready = Comparison(), {}
    try:
        inputs = random_inputs(image_shape(plain), batch, dtype, device)
    except (RuntimeError, TypeError) as error:  # no room for the images, or more of them than 64 bits can count
        comparison.left_out = dict.fromkeys((engine.label for engine in engines), in_a_line(error))
        return comparison
    checked = inputs[: -(-LEAST_IMAGES // batch)]
    oracles: dict[nn.Module, Tensor] = {}

    def prepare(engine: Engine) -> Ready:
        model = plain if engine.plain is None else engine.plain
        if model not in oracles:
            oracles[model] = oracle_of(model, dtype, torch.cat(checked))
        one = prepared(engine, model, dtype, checked, oracles[model])
        pooled = engine.shares_pool and any(other.engine.shares_pool for other in ready.values())
        return one._replace(peak_memory=None) if pooled else one

    try:
        for engine in engines:
            comparison.tried(engine.label, lambda engine=engine: ready.update({engine.label: prepare(engine)}))
        timings = _time({name: one.call for name, one in ready.items()}, inputs, device, rounds, comparison)
        comparison.measured += [one.measurement(timings[name]) for name, one in ready.items() if name in timings]
    finally:
        ready.clear()
        _tidy(device)
    return comparison


class Ready(NamedTuple):
    """An engine whose answers are right."""

    call: Forward
    engine: Engine
    plain: nn.Module
    error: float | None
    agreement: float | None
    peak_memory: int | None

    def measurement(self, timing: Timing) -> Measurement:
        engine = self.engine
        failures = (one.plan.graphs.failure for one in _settings(self.call) if one.plan is not None)
        answers = self.error, self.agreement, self.peak_memory, next(filter(None, failures), None)
        return Measurement(engine.name, engine.model, self.plain, timing, *answers)


def prepared(engine: Engine, plain: nn.Module, dtype: torch.dtype, checked: Sequence[Tensor], oracle: Tensor) -> Ready:
    """Build an engine and look at its answers.

    Raises:
        WrongAnswer: It is to be verified, and wrong.
        ValueError: It is too far off, or Triton failed at a module of it.
    """
    bar = _verified_bar(engine, plain, dtype, checked) if engine.verified else FAR_OFF[dtype]
    device = oracle.device
    memory = PeakMemory(device)
    call = engine.build(plain, dtype)
    if not engine.answers:
        return Ready(call, engine, plain, None, None, None)
    with torch.inference_mode():
        # graphs give out the same memory again and again: .double() copies
        output = torch.cat([call(images).double() for images in checked])
        error = ((output - oracle).square().mean() / oracle.square().mean()).sqrt().item()
        agreement = None
        if output.dim() == 2 and output.numel():
            agreement = (output.argmax(-1) == oracle.argmax(-1)).double().mean().item()
        if not error <= bar:
            far_off = f"relative RMS error {error:.2e} at batch {len(checked[0])}, at most {bar:.1e} is right"
            raise WrongAnswer(_wrong(engine, dtype, far_off)) if engine.verified else ValueError(far_off)
        del output
        for _ in range(SETTLE if device.type == "cuda" else 0):
            call(checked[0])
        peak = memory.of(lambda: call(checked[0]))
    failure = next((one.failure for one in _settings(call) if one.failure is not None), None)
    if failure is not None:
        raise ValueError(f"Triton failed at a module, so it would be another backend's speed: {failure}")
    return Ready(call, engine, plain, error, agreement, peak)


def _settings(call: Forward) -> list[Settings]:
    """Of all modules that swinfast replaced."""
    modules = call.modules() if isinstance(call, nn.Module) else ()
    return [module._swinfast for module in modules if isinstance(module, Fused)]


def _verified_bar(engine: Engine, plain: nn.Module, dtype: torch.dtype, checked: Sequence[Tensor]) -> float:
    """The relative RMS error that the numerics policy allows, once it holds on a few images."""
    images = torch.cat(list(checked))[:VERIFIED_IMAGES]
    outcome = verify(plain, engine.build(plain, dtype), images)  # not the model that is timed: graphs take memory
    if not outcome.passed:
        raise WrongAnswer(_wrong(engine, dtype, str(outcome)))
    return FACTOR * outcome.plain.relative_rms + ABSOLUTE[dtype]


def _wrong(engine: Engine, dtype: torch.dtype, reason: str) -> str:
    return f"{engine.name} in {str(dtype).removeprefix('torch.')} is wrong, so its speed means nothing: {reason}"


def oracle_of(plain: nn.Module, dtype: torch.dtype, images: Tensor) -> Tensor:
    """Outputs in float64 of a model whose weights were rounded to a dtype."""
    oracle = copy.deepcopy(plain).to(dtype).double()
    with torch.inference_mode():
        return torch.cat([oracle(part.double()) for part in images.split(ORACLE_IMAGES)])


def random_inputs(shape: tuple[int, int, int], batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Batches of noise, together larger than what the device caches and enough to check answers on."""
    size = batch * math.prod(shape) * dtype.itemsize
    count = max(copies_beyond_cache(size, device), -(-LEAST_IMAGES // batch))
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(batch, *shape, generator=generator, device=device).to(dtype) for _ in range(count)]


def _time(
    calls: dict[str, Forward], inputs: Sequence[Tensor], device: torch.device, rounds: int, comparison: Comparison
) -> dict[str, Timing]:
    """Timings of all that come through."""
    candidates = {}
    for number, (label, call) in enumerate(calls.items()):
        first = number * len(inputs) // len(calls)  # so that none finds its images in a cache where another left them
        turns = [(images,) for images in (*inputs[first:], *inputs[:first])]
        candidates[label] = partial(comparison.tried, label, rotating(call, turns))
    timings = compare(candidates, rounds, warmup=1, device=device)
    return {label: timing for label, timing in timings.items() if label not in comparison.left_out}


def _tidy(device: torch.device) -> None:
    """Give back what engines held, compiled code included."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
