"""Configurations of one kernel, and compositions of blocks, timed by the CUDA graph of a whole forward.

For few images a kernel takes some microseconds, as long as it takes to start it, and how it does depends on what runs
before and after it and on what that leaves in the cache.
"""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing.pool import Pool
from typing import Any

import torch
from swinfast.kernels.configs import Choose, Config, override, tile
from swinfast.kernels.shapes import PRECISIONS
from torch import nn

import swinfast
from bench.alone import ROUNDS, Bench, Crashed, in_words, outcome_of, winner
from bench.cases import (
    Case,
    Oracle,
    call_arguments,
    cases_of,
    choose_forms,
    inputs_of,
    model_named,
    operation,
    tf32_setting,
)
from bench.config_tables import Row
from bench.forms import HALVES, Kind, Option, kinds_of, named, options_of, rows_of, source_of
from bench.kernels import COMPILE_WAIT, compile_all, problem_of
from bench.peaks import Timer, launches_of
from bench.targets import Log, Target
from swinfast.benchmark import randomise
from swinfast.calls import kind_of

QUICK, LONG = 8, 20  # milliseconds of forwards in one timing
GAIN = 0.003  # of a forward that a choice must win by: one kernel is a small part of it


class Failing(RuntimeError):
    """A forward that fails as the tables have it: nothing can be timed by it."""


class Forward:
    """A model and images that go through it."""

    def __init__(self, name: str, batch: int, precision: str, device: torch.device):
        """Raises:
        Failing: A kernel can't run as it is chosen now.
        """
        self.name, self.batch, self.precision = name, batch, precision
        self.plain: nn.Module = randomise(model_named(name, device))
        self.images = torch.randn(batch, 3, *self.plain.img_size, device=device).to(PRECISIONS[precision])
        self.right: set[tuple] = set()  # what was checked
        self.fast: nn.Module | None = self._optimised()

    def _optimised(self) -> nn.Module:
        fast = swinfast.optimize(self.plain, dtype=PRECISIONS[self.precision], backend="triton", cuda_graphs=False)
        try:
            self._run(lambda: fast(self.images))  # lays tables of position biases out, before any other choice is made
        except Exception as error:
            what = f"{self.name} batch {self.batch} {self.precision}"
            raise Failing(f"{what} fails as the tables have it: {problem_of(error)}") from error
        return fast

    def _run(self, compute: Callable[[], Any]) -> Any:
        """What Triton alone computes: where that fails at a module, PyTorch would take its place from then on."""
        with warnings.catch_warnings(), torch.no_grad(), tf32_setting(self.precision):
            warnings.filterwarnings("error", "Triton failed")
            return compute()

    def _computation(self) -> Callable[[], torch.Tensor]:
        """The forward as a graph of swinfast's own has it, which reads the tables of position biases; somebody else's
        graph would derive them at each replay."""
        fast, stages = self.fast, self.fast.fused_stages()
        plan = stages.plan()
        tables = stages.tables(plan, kind_of(self.images))
        return lambda: fast.after_fused_stages(stages.compute(plan, tables, fast.fused_embedding()(self.images)))

    def by(self, target: Target, config: Config) -> Callable[[], object]:
        """What launches the forward with a configuration in place of a target's."""

        def choose(kernel: str, shape: dict[str, int]) -> Config | None:
            sizes = tuple((name, int(size)) for name, size in shape.items())
            return config if (kernel, sizes) == (target.kernel, target.sizes) else None

        return self.launches(choose)

    def launches(self, choose: Choose) -> Callable[[], object]:
        """What launches the forward with other configurations; captured where there is a GPU.

        Raises:
            What the kernel raised, where one failed. Another model takes this one's place, which may go on without it.
        """
        self.fast = self.fast or self._optimised()
        computation = self._run(self._computation)

        def forward() -> torch.Tensor:
            with override(choose):
                return self._run(computation)

        try:
            forward()  # compiles what is new, and loads it
            return launches_of(forward, self.images.device)
        except Exception:
            self.fast = None
            raise

    def cases(self, arch: str, choose: Choose) -> list[Case]:
        """What it calls with other compositions."""
        return cases_of(model_named(self.name), self.batch, self.precision, arch, choose)

    def check(self, cases: Sequence[Case], choose: Choose) -> None:
        """Refuse kernels that are wrong with the configurations at hand; each is checked once.

        Raises:
            Wrong: An output is not as right as plain PyTorch.
        """
        for case in cases:
            what = case.operation, case.lookup, tile(case.launch.config), case.key
            if what not in self.right:
                inputs = inputs_of(case, self.images.device)
                with torch.no_grad(), tf32_setting(case.precision):
                    oracle = Oracle(case, inputs)
                    with override(choose):
                        oracle.check(operation(case)(**call_arguments(case, inputs)))
                self.right.add(what)


class InForward(Bench):
    """Checks configurations case by case, and times the forwards of all models with each."""

    gain = GAIN

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
        return rounds_of([[one.by(self.target, config) for one in self.forwards] for config in tried], self.timer)


def rounds_of(launches: Sequence[Sequence[Callable[[], object]]], timer: Timer) -> list[list[list[float]]]:
    """Microseconds by [rival][forward][round], the rivals taking turns."""
    times: list[list[list[float]]] = [[[] for _ in forwards] for forwards in launches]
    for _ in range(ROUNDS):
        for mine, forwards in zip(times, launches, strict=True):
            for found, launch in zip(mine, forwards, strict=True):
                found.append(1e6 * timer(launch, LONG))
    return times


def forwards_of(names: Sequence[str], batch: int, device: torch.device) -> Callable[[str], list[Forward]]:
    """What makes the forwards of all models in a precision, once for each."""

    @cache
    def forwards(precision: str) -> list[Forward]:
        return [Forward(name, batch, precision, device) for name in names]

    return forwards


def in_forwards(
    forwards: Callable[[str], list[Forward]], device: torch.device, timer: Timer
) -> Callable[[Target], InForward]:
    """What makes the bench of a target."""
    return lambda target: InForward(target, device, timer, forwards(target.precision))


class Compositions:
    """Compares the compositions of blocks by whole forwards.

    Attributes:
        cut: Whether there was no time for some of them.
    """

    def __init__(self, arch: str, timer: Timer, pool: Pool | None, log: Log, deadline: float):
        """deadline: Of time.monotonic, after which no comparison begins; pool: What compiles, None to do so on use."""
        self.arch, self.timer, self.pool, self.log, self.deadline = arch, timer, pool, log, deadline
        self.cut = False

    def rows(self, forwards: Sequence[Forward]) -> Iterator[Row]:
        """Rows of the compositions that win, as they are found.

        Raises:
            Crashed: The GPU's context is lost.
        """
        for forward in forwards:
            kinds = kinds_of(model_named(forward.name), forward.batch, forward.precision, self.arch, few=True)
            for kind, parts in itertools.product(kinds, HALVES):
                if time.monotonic() > self.deadline:
                    print("out of time: not every composition was tried")
                    self.cut = True
                    return
                yield from self._compared(forward, kind, parts)

    def _compared(self, forward: Forward, kind: Kind, parts: Option) -> list[Row]:
        """Rows for one half of one kind of block; none where its present composition fails: nothing is beaten."""
        what = f"{' and '.join(parts)} channels={kind.channels} tokens={kind.tokens} rows={kind.rows}"
        what += f" {forward.precision} {forward.name}"
        if self._is_known(what, tuple(kind.present[part] for part in parts)):
            return []
        chosen = {
            one: choose_forms(dict(zip(parts, one, strict=True)), kind.channels) for one in options_of(kind, parts)
        }
        cases = {one: forward.cases(self.arch, choose) for one, choose in chosen.items()}
        left = max(0.0, self.deadline - time.monotonic())
        compile_all(itertools.chain(*cases.values()), self.arch, self.pool, min(COMPILE_WAIT, left))
        present, *others = (
            (option, self._launches(what, option, forward, choose, cases[option])) for option, choose in chosen.items()
        )
        rivals = [present, *(one for one in others if one[1] is not None)]
        if present[1] is None or len(rivals) < 2:
            return []
        times = self._times(what, [launch for _, launch in rivals])
        us = [statistics.median(rounds) for rounds in times]
        for (option, _), one in zip(rivals, us, strict=True):
            self.log.note(what, " ".join(option), "timed", us=round(one, 3))
        place = winner(times, GAIN)
        best = rivals[place][0]
        self.log.note(what, "final", "final", best=best)
        print(f"{what}: {named(best)}{' wins' if place else ' stays'}, {us[place]:.1f} µs", flush=True)
        numbers = f"{us[place]:.1f} us in a forward against {us[0]:.1f} us of {named(present[0])}"
        source = source_of(self.log.about, f"{forward.name} batch {forward.batch}", forward.precision, numbers)
        return rows_of(kind, parts, best, forward.precision, source)

    def _is_known(self, what: str, present: Option) -> bool:
        """Whether what is present now was the best in an earlier run, or that crashed."""
        final = self.log.noted(what).get("final")
        return final is not None and (final["outcome"] != "final" or tuple(final["best"]) == present)

    def _times(self, what: str, launches: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Microseconds by [rival][round]."""
        try:
            return [rounds for (rounds,) in rounds_of([[launch] for launch in launches], self.timer)]
        except Exception as error:
            outcome = outcome_of(error)
            if isinstance(outcome, Crashed):
                self.log.note(what, "final", in_words(outcome))
            raise outcome from error

    def _launches(
        self, what: str, option: Option, forward: Forward, choose: Choose, cases: Sequence[Case]
    ) -> Callable[[], object] | None:
        """What launches the forward with an option, None where that is wrong or fails, which is then in the log."""
        if self.log.noted(what).get(" ".join(option), {}).get("outcome", "").startswith("crashed"):
            return None
        try:
            forward.check(cases, choose)
            return forward.launches(choose)
        except Exception as error:
            outcome = outcome_of(error)
            self.log.note(what, " ".join(option), in_words(outcome))
            if isinstance(outcome, Crashed):
                raise outcome from error
            return None
