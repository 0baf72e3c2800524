"""Configurations of one kernel, checked and timed by calls of it alone."""

import statistics
from collections.abc import Callable, Sequence

import torch
from swinfast.kernels.configs import Config, override

from bench.cases import Case, Oracle, Wrong, call_arguments, choose_config, inputs_of, operation, tf32_setting
from bench.forms import GAIN
from bench.kernels import problem_of
from bench.peaks import Timer, launches_of
from bench.targets import Target

ROUNDS = 5
QUICK, LONG = 20, 40  # milliseconds of calls in one timing
STICKY = ("CUDA error", "illegal memory access", "misaligned address", "device-side assert", "launch failure")


class Crashed(Exception):
    """The GPU's context is lost: only a new process can go on."""


def outcome_of(error: Exception) -> Exception:
    """An error as it is, or that the GPU's context is lost."""
    return Crashed(problem_of(error)) if any(text in str(error) for text in STICKY) else error


def in_words(outcome: Exception) -> str:
    """What the log says of a candidate that has no time."""
    kind = "wrong" if isinstance(outcome, Wrong) else "crashed" if isinstance(outcome, Crashed) else "failed"
    return f"{kind}: {problem_of(outcome)}"


def winner(times: Sequence[Sequence[float]], gain: float) -> int:
    """Which wins, by [which][round]: the first, unless another takes less, by the gain and in all rounds but one."""
    totals = [statistics.median(rounds) for rounds in times]
    best = min(range(len(times)), key=totals.__getitem__)
    beaten = sum(mine < other for mine, other in zip(times[best], times[0], strict=True))
    return best if totals[best] < (1 - gain) * totals[0] and beaten >= len(times[0]) - 1 else 0


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
        known = []
        for case in self.target.cases:
            inputs = inputs_of(case, self.device)
            with torch.no_grad(), tf32_setting(case.precision):
                known.append((case, inputs, Oracle(case, inputs)))
        for config in tried:
            try:
                outcome = self._checked(config, known)
            except Exception as error:  # a candidate that fails is skipped and named
                outcome = outcome_of(error)
            done(config, outcome)
            if isinstance(outcome, Crashed):
                raise outcome

    def _checked(self, config: Config, known: Sequence[tuple[Case, dict, Oracle]]) -> float:
        """Microseconds of a configuration in a forward, if it is right."""
        total = 0.0
        for case, inputs, oracle in known:
            with torch.no_grad(), tf32_setting(case.precision), override(choose_config(case, config)):
                oracle.check(operation(case)(**call_arguments(case, inputs)))
                total += 1e6 * case.calls * self._time(case, inputs, config)
        return total

    def _time(self, case: Case, inputs: dict, config: Config) -> float:
        return self.timer(self._launches(case, inputs, config), QUICK)

    def rounds(self, tried: Sequence[Config]) -> list[list[list[float]]]:
        """Microseconds of one call by [configuration][case][round], the configurations taking turns."""
        times: list[list[list[float]]] = [[[] for _ in self.target.cases] for _ in tried]
        for number, case in enumerate(self.target.cases):
            inputs = inputs_of(case, self.device)
            with torch.no_grad(), tf32_setting(case.precision):
                launches = [self._launches(case, inputs, config) for config in tried]
                for _ in range(ROUNDS):
                    for mine, launch, config in zip(times, launches, tried, strict=True):
                        with override(choose_config(case, config)):
                            mine[number].append(1e6 * self.timer(launch, LONG))
        return times

    def _launches(self, case: Case, inputs: dict, config: Config) -> Callable[[], object]:
        with override(choose_config(case, config)):
            function, arguments = operation(case), call_arguments(case, inputs)
            return launches_of(lambda: function(**arguments), self.device)
