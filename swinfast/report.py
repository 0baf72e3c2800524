"""What runs where in an optimised model."""

from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from .adapters import SUPPORTED
from .backends import backend_for
from .fused import FusedComputation, FusedStage
from .plan import Plan


@dataclass(frozen=True)
class Row:
    """One module: its dotted name, what it is, whether it is replaced, and what runs it or why it was left."""

    name: str
    kind: str
    replaced: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """The rows of ``swinfast.report``; str() gives the table.

    Attributes:
        rows: One for each patch embedding, patch merging and block.
        training: The model is in training mode, where the original computation runs.
    """

    rows: tuple[Row, ...]
    training: bool

    def __str__(self) -> str:
        table = tabulate(
            [(row.name, row.kind, "replaced" if row.replaced else "original", row.detail) for row in self.rows],
            headers=("module", "kind", "runs", "by, or why"),
        )
        note = "In training mode: the original computation runs everywhere until model.eval().\n\n"
        return (note if self.training else "") + table


def report(model: nn.Module) -> Report:
    """What runs each module of an optimised model, as it stands now.

    Raises:
        ValueError: The model has not been through ``swinfast.optimize``.
    """
    rows = []
    training = False
    for name, module in model.named_modules():
        if isinstance(module, FusedComputation):
            training |= module.training
            rows += _rows(name, module, module.plan())
    if not rows:
        raise ValueError(f"{type(model).__name__} is not optimized: call swinfast.optimize, which takes {SUPPORTED}")
    return Report(tuple(rows), training)


def _rows(name: str, module: FusedComputation, plan: Plan) -> list[Row]:
    replaced = plan.reason is None
    parameter = plan.parameters[0]
    backend = backend_for(module._swinfast.backend, parameter.device)
    detail = backend.describe(parameter.dtype, parameter.device) if replaced else plan.reason
    if not isinstance(module, FusedStage):
        return [Row(name, module.adapter.kind, replaced, detail)]
    prefix = f"{name}." if name else ""
    rows = [Row(f"{prefix}blocks.{index}", "block", replaced, detail) for index in range(len(module.blocks))]
    if not isinstance(module.downsample, nn.Identity):
        rows.insert(0, Row(f"{prefix}downsample", "patch merging", replaced, detail))
    return rows
