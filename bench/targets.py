"""What bench.tune decides: targets, and the log of what was found out about each."""

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from swinfast.kernels.configs import Config

from bench.cases import FORMS, Case, cases_of, choose_forms, model_named
from bench.roofline import bytes_of, flops_of

FLOPS_A_BYTE = 200  # that a GPU has time for, about


class Target(NamedTuple):
    """What one row of a table decides: a kernel, sizes and a precision, with all the cases of it."""

    kernel: str
    sizes: tuple[tuple[str, int], ...]
    precision: str
    cases: tuple[Case, ...]
    in_use: bool  # by the present composition of blocks

    @property
    def worth(self) -> float:
        """About the time of all calls, by bytes and operations: what is tuned first."""
        return sum(c.calls * (bytes_of(c.launch) + flops_of(c.launch, c.operation) / FLOPS_A_BYTE) for c in self.cases)

    @property
    def present(self) -> Config:
        return self.cases[0].launch.config

    def __str__(self) -> str:
        return f"{self.kernel} {' '.join(f'{name}={size}' for name, size in self.sizes)} {self.precision}"


def find_targets(
    models: Sequence[str], batch: int, precisions: Sequence[str], arch: str, kernels: Sequence[str]
) -> list[Target]:
    """Targets of all compositions of the models' blocks: those of the present one first, the longest first."""
    cases: dict[tuple, dict[tuple, Case]] = {}
    in_use = set()
    for forms in (None, *map(choose_forms, FORMS.values())):
        for name in models:
            for precision in precisions:
                for case in cases_of(model_named(name), batch, precision, arch, forms):
                    what = (*case.lookup, precision)
                    if case.operation in kernels:
                        cases.setdefault(what, {}).setdefault(case.key, case)
                    if forms is None:
                        in_use.add(what)
    targets = [Target(*what, tuple(found.values()), what in in_use) for what, found in cases.items()]
    return sorted(targets, key=lambda target: (not target.in_use, -target.worth))


class Log:
    """Outcomes as lines of a file. Each says of what it is, so that only those of the same thing count again."""

    def __init__(self, file: Path, about: dict[str, str], resume: bool, where: str = ""):
        """where: What the times are of, if not of kernels alone."""
        self.file, self.about, self.where = file, about, where
        self.known: dict[str, dict[str, dict]] = {}
        if resume and file.exists():
            whole = "".join(file.read_text(encoding="utf-8").rpartition("\n")[:2])
            file.write_text(whole, encoding="utf-8")  # without the half of a line that a killed run may leave
            for entry in map(json.loads, whole.splitlines()):
                self.known.setdefault(entry["target"], {})[entry["config"]] = entry
        file.parent.mkdir(parents=True, exist_ok=True)

    def key(self, target: Target) -> str:
        """The same only for the same kernel's code, shapes, versions and device."""
        module = importlib.import_module(f"swinfast.kernels.{target.kernel}")
        code = sorted(getattr(value, "cache_key", "") for value in vars(module).values() if hasattr(value, "cache_key"))
        versions = [self.about[name] for name in ("device", "torch", "triton")]
        what = (
            target.kernel,
            target.sizes,
            target.precision,
            sorted(map(repr, (c.key for c in target.cases))),
            self.where,
        )
        return hashlib.sha256(repr((what, code, versions)).encode()).hexdigest()[:16]

    def write(self, target: Target, config: str, outcome: str, **numbers: Any) -> None:
        self._add({"target": self.key(target), "config": config, "outcome": outcome} | numbers, str(target))

    def of(self, target: Target) -> dict[str, dict]:
        return self.known.get(self.key(target), {})

    def note(self, what: str, config: str, outcome: str, **numbers: Any) -> None:
        """As write, for what is no kernel's configuration: it counts for the same commit."""
        self._add({"target": self._name(what), "config": config, "outcome": outcome} | numbers, what)

    def noted(self, what: str) -> dict[str, dict]:
        return self.known.get(self._name(what), {})

    def _name(self, what: str) -> str:
        commit = self.about["commit"].removesuffix("-dirty")  # which a row makes it that is written
        versions = [self.about[name] for name in ("device", "torch", "triton")]
        return hashlib.sha256(repr((what, self.where, versions, commit)).encode()).hexdigest()[:16]

    def _add(self, entry: dict, what: str) -> None:
        entry["what"] = f"{what} {self.where}".strip()
        self.known.setdefault(entry["target"], {})[entry["config"]] = entry
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry | self.about) + "\n")
