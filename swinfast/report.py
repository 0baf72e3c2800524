"""What runs where in an optimised model."""

from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from .arguments import check_model
from .fused import Fused, FusedComputation, FusedStage, not_optimized
from .graphs import Graphs
from .modules import class_of
from .plan import Plan
from .specs import BlockSpec, MergeSpec, PatchEmbedSpec


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
        graphs: A line for each module that has CUDA graphs, or could not have one.
    """

    rows: tuple[Row, ...]
    training: bool
    graphs: tuple[str, ...] = ()

    def __str__(self) -> str:
        table = tabulate(
            [(row.name, row.kind, "replaced" if row.replaced else "original", row.detail) for row in self.rows],
            headers=("module", "kind", "runs", "by, or why"),
        )
        note = "In training mode: the original computation runs everywhere until model.eval().\n\n"
        return (note if self.training else "") + "\n".join((table, *self.graphs))


def report(model: nn.Module) -> Report:
    """What runs each module of an optimised model, as it stands now.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: The model has not been through ``swinfast.optimize``.
    """
    check_model("model", model)
    rows, graphs = [], []
    training = False
    for name, module in model.named_modules():
        if isinstance(module, FusedComputation):
            training |= module.training
            rows += _rows(name, module, module.plan())
        if isinstance(module, Fused) and module._swinfast.plan is not None:
            graphs += _graphs(name or class_of(module).__name__, module._swinfast.plan.graphs)
    if not rows:
        raise not_optimized(model)
    return Report(tuple(rows), training, tuple(graphs))


def _graphs(name: str, graphs: Graphs) -> list[str]:
    if graphs.failure is not None:
        return [f"{name}: no CUDA graph, since capturing one failed: {graphs.failure}"]
    return [f"{name}: CUDA graphs for {len(graphs)} inputs"] if len(graphs) else []


def _rows(name: str, module: FusedComputation, plan: Plan) -> list[Row]:
    reason = plan.why_original(module)
    if not isinstance(module, FusedStage):
        return [_row(name, module.adapter.kind, plan, plan.spec, reason)]
    prefix = f"{name}." if name else ""
    blocks = plan.spec.blocks if plan.spec else [None] * len(module.blocks)
    rows = [_row(f"{prefix}blocks.{index}", "block", plan, block, reason) for index, block in enumerate(blocks)]
    if not isinstance(module.downsample, nn.Identity):
        merge = plan.spec.merge if plan.spec else None
        rows.insert(0, _row(f"{prefix}downsample", "patch merging", plan, merge, reason))
    return rows


def _row(
    name: str, kind: str, plan: Plan, spec: PatchEmbedSpec | MergeSpec | BlockSpec | None, reason: str | None
) -> Row:
    if reason is not None:
        return Row(name, kind, False, reason)
    parameter = plan.parameters[0]
    detail = plan.backend.describe(spec, parameter.dtype, parameter.device)
    return Row(name, kind, True, detail if plan.note is None else f"{detail} ({plan.note})")
