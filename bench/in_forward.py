"""Configurations of one kernel, timed by the CUDA graph of a whole forward that they are a part of.

For few images a kernel takes some microseconds, as long as it takes to start it, and how it does depends on what runs
before and after it and on what that leaves in the cache.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from swinfast.kernels.configs import Choose, Config, override
from swinfast.kernels.shapes import PRECISIONS
from torch import nn

import swinfast
from bench.alone import ROUNDS, Bench
from bench.cases import Case, Oracle, model_named, tf32_setting
from bench.peaks import Timer, launches_of
from bench.targets import Target
from swinfast.benchmark import randomise

QUICK, LONG = 8, 20  # milliseconds of forwards in one timing


class Forward:
    """A model and images that go through it."""

    def __init__(self, name: str, batch: int, precision: str, device: torch.device):
        self.precision = precision
        self.plain: nn.Module = randomise(model_named(name, device))
        self.fast = swinfast.optimize(self.plain, dtype=PRECISIONS[precision], backend="triton", cuda_graphs=False)
        self.images = torch.randn(batch, 3, *self.plain.img_size, device=device).to(PRECISIONS[precision])

    def by(self, target: Target, config: Config) -> Callable[[], object]:
        """What launches the forward with a configuration in place of a target's."""

        def choose(kernel: str, shape: dict[str, int]) -> Config | None:
            sizes = tuple((name, int(size)) for name, size in shape.items())
            return config if (kernel, sizes) == (target.kernel, target.sizes) else None

        return self.launches(choose)

    def launches(self, choose: Choose) -> Callable[[], object]:
        """What launches the forward with other configurations; captured where there is a GPU."""

        def forward() -> torch.Tensor:
            with torch.no_grad(), tf32_setting(self.precision), override(choose):
                return self.fast(self.images)

        forward()  # compiles what is new, and loads it
        return launches_of(forward, self.images.device)


class InForward(Bench):
    """Checks configurations case by case, and times the forwards of all models with each."""

    gain = 0.003  # of a forward, of which one kernel is a small part

    def __init__(self, target: Target, device: torch.device, timer: Timer, forwards: Sequence[Forward]):
        super().__init__(target, device, timer)
        self.forwards = forwards
        self.calls = [1] * len(forwards)

    def _checked(self, config: Config, known: Sequence[tuple[Case, dict, Oracle]]) -> float:
        super()._checked(config, known)
        return sum(1e6 * self.timer(one.by(self.target, config), QUICK) for one in self.forwards)

    def _time(self, case: Case, inputs: dict, config: Config) -> float:
        return 0.0  # what counts is the forward

    def rounds(self, tried: Sequence[Config]) -> list[list[list[float]]]:
        """Microseconds by [configuration][forward][round], the configurations taking turns."""
        launches = [[one.by(self.target, config) for one in self.forwards] for config in tried]
        times: list[list[list[float]]] = [[[] for _ in self.forwards] for _ in tried]
        for _ in range(ROUNDS):
            for mine, forwards in zip(times, launches, strict=True):
                for found, launch in zip(mine, forwards, strict=True):
                    found.append(1e6 * self.timer(launch, LONG))
        return times


def in_forwards(names: Sequence[str], batch: int, device: torch.device, timer: Timer) -> Callable[[Target], InForward]:
    """What makes the bench of a target. Models are made once for each precision."""

    @cache
    def forwards(precision: str) -> list[Forward]:
        return [Forward(name, batch, precision, device) for name in names]

    return lambda target: InForward(target, device, timer, forwards(target.precision))
