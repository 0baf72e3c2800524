"""Configurations of one kernel, checked and timed by calls of it alone."""

from collections.abc import Callable, Sequence

import torch
from swinfast.kernels.configs import Config, override

from bench.cases import Case, Oracle, call_arguments, inputs_of, operation, tf32_setting
from bench.forms import GAIN
from bench.kernels import problem_of
from bench.peaks import Timer
from bench.targets import Target

ROUNDS = 5
QUICK, LONG = 20, 40  # milliseconds of calls in one timing
STICKY = ("CUDA error", "illegal memory access", "misaligned address", "device-side assert", "launch failure")


class Crashed(Exception):
    """The GPU's context is lost: only a new process can go on."""


class Bench:
    """Checks and times configurations of one target.

    Attributes:
        calls: How often a forward does what each column of rounds() is the time of.
        gain: The share of a time that a choice must win by.
    """

    gain = GAIN

    def __init__(self, target: Target, device: torch.device, timer: Timer):
        self.target, self.device, self.timer = target, device, timer
        self.calls = [case.calls for case in target.cases]

    def quick(self, tried: Sequence[Config], done: Callable[[Config, float | Exception], None]) -> None:
        """Check each configuration on every case and time it once: microseconds in a forward, or what went wrong."""
        totals: dict[int, float | Exception] = dict.fromkeys(range(len(tried)), 0.0)
        for case in self.target.cases:
            inputs = inputs_of(case, self.device)
            with torch.no_grad(), tf32_setting(case.precision):
                oracle = Oracle(case, inputs)
                for index, config in enumerate(tried):
                    if isinstance(totals[index], float):
                        totals[index] = self._one(case, inputs, oracle, config, totals[index])
                        if isinstance(totals[index], Crashed):
                            done(config, totals[index])
                            raise totals[index]
        for config, total in zip(tried, totals.values(), strict=True):
            done(config, total)

    def _one(self, case: Case, inputs: dict, oracle: Oracle, config: Config, before: float) -> float | Exception:
        with override(lambda *_: config):
            try:
                function, arguments = operation(case), call_arguments(case, inputs)
                oracle.check(function(**arguments))
                return before + 1e6 * case.calls * self.timer(lambda: function(**arguments), QUICK)
            except Exception as error:  # a candidate that fails is skipped and named
                sticky = any(text in str(error) for text in STICKY)
                return Crashed(problem_of(error)) if sticky else error

    def rounds(self, tried: Sequence[Config]) -> list[list[list[float]]]:
        """Microseconds of one call by [configuration][case][round], the configurations taking turns."""
        times = [[[] for _ in self.target.cases] for _ in tried]
        for number, case in enumerate(self.target.cases):
            inputs = inputs_of(case, self.device)
            with torch.no_grad(), tf32_setting(case.precision):
                for _ in range(ROUNDS):
                    for index, config in enumerate(tried):
                        times[index][number].append(self._long(case, inputs, config))
        return times

    def _long(self, case: Case, inputs: dict, config: Config) -> float:
        with override(lambda *_: config):
            function, arguments = operation(case), call_arguments(case, inputs)
            return 1e6 * self.timer(lambda: function(**arguments), LONG)
