"""The Sequential of stages, replaced: where nothing tells it from one computation, it is one."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import graphs
from .calls import is_traced, is_transformed, kind_of, needs_grad
from .errors import in_a_line, raise_out_of_memory
from .fused import Fused, FusedComputation, FusedStage, Settings
from .modules import is_hooked
from .plan import Plan, SequencePlan
from .recompute import FusedForward


class FusedWhole(Fused):
    """Modules that run as one: their plan has the graphs of the whole."""

    def plan(self) -> Any:
        """How they run as one, None where each must run by itself."""
        raise NotImplementedError

    def tables(self, plan: Any, kind: tuple) -> tuple:
        """What their backends need of the parameters: the same objects for as long as they are right."""
        raise NotImplementedError

    def replayed(self, x: Tensor) -> Tensor | None:
        """The answer of a graph, where there is one and nothing has changed since it was captured."""
        plan = self._swinfast.plan
        if plan is None or not plan.graphs or needs_grad(x, plan.parameters):
            return None
        if not graphs.may_replay(x):
            return None
        kind = kind_of(x)
        return plan.graphs.replayed(
            x,
            kind,
            holds=lambda: self.plan() is plan,
            reads=lambda: self.tables(plan, kind),
            made=lambda: plan.derivations,
        )


class FusedStages(FusedWhole):
    """The Sequential of stages: one computation, where nothing in or on a stage could tell it from several.

    On a GPU one CUDA graph spans it, or a large batch goes through it in parts.
    """

    def __getitem__(self, index):
        part = super().__getitem__(index)
        if isinstance(index, slice):  # a Sequential of this class, made by its constructor
            part._swinfast = Settings(self._swinfast.backend, self._swinfast.cuda_graphs)
            part.training = self.training
        return part

    def plan(self) -> SequencePlan | None:
        plans = self._plans()
        kept = self._swinfast.plan
        if plans is None:
            kept = self._swinfast.plan = None
        elif kept is None or not kept.holds(plans):
            kept = self._swinfast.plan = SequencePlan(plans)
        return kept

    def _plans(self) -> list[Plan] | None:
        plans = []
        for stage in self:
            if not isinstance(stage, FusedStage) or stage.training or "forward" in stage.__dict__ or is_hooked(stage):
                return None
            plan = stage.plan()
            if plan.reason is not None or plan.is_random():
                return None
            plans.append(plan)
        return plans

    def forward(self, input: Tensor) -> Tensor:  # by the name that nn.Sequential has for it
        x = input
        if self.training or is_traced(x) or is_transformed():
            return super().forward(x)
        out = self.replayed(x)
        if out is not None:
            return out
        plan = self.plan()
        if plan is None:
            return super().forward(x)
        if needs_grad(x, plan.parameters):
            return FusedForward.apply(self, plan, x.clone(), *plan.parameters)  # as in FusedStage
        return self.fused_forward(plan, x)

    def tables(self, plan: SequencePlan, kind: tuple) -> tuple:
        return tuple(stage.tables(one, kind) for stage, one in zip(self, plan.plans, strict=True))

    def fused_forward(self, plan: SequencePlan, x: Tensor) -> Tensor:
        if not self._is_unchecked() and graphs.may_run(self._swinfast.cuda_graphs, plan, x):
            kind = kind_of(x)
            return plan.graphs.run(
                x,
                kind,
                reads=lambda: self.tables(plan, kind),
                compute=lambda tables, held: self.compute(plan, tables, held.pop()),
                plain=partial(self._without_graph, plan, x),
            )
        return self._without_graph(plan, x)

    def _without_graph(self, plan: SequencePlan, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return self._one_by_one(plan, x)
        return _in_parts(partial(self._at_once, plan), x, plan.memory_format)

    def _is_unchecked(self) -> bool:
        return any(stage._swinfast.unchecked for stage in self)

    def _at_once(self, plan: SequencePlan, x: Tensor) -> Tensor:
        """Stages that free their inputs, where one by one each keeps its own for a fallback.

        Where something fails the stages run again, one by one: that finds the one to blame, and what it falls back to.
        """
        fit = all(one.backend is not None and one.backend.may_fail for one in plan.plans)
        if fit and not self._is_unchecked():
            kind = kind_of(x)
            try:
                return self.compute(plan, self.tables(plan, kind), x)
            except Exception as error:
                raise_out_of_memory(error)
                out = self._one_by_one(plan, x)
                if not any(stage._swinfast.failure for stage in self):
                    problem = in_a_line(error)
                    warnings.warn(f"stages failed together, and not one by one: {problem}", stacklevel=2)
                return out
        return self._one_by_one(plan, x)

    def _one_by_one(self, plan: SequencePlan, x: Tensor) -> Tensor:
        # where no graph can span all stages, because PyTorch computes one, the others may have their own
        forward = FusedComputation.fused_forward if plan.may_be_captured else FusedStage.fused_forward
        for stage, one in zip(self, plan.plans, strict=True):
            x = forward(stage, one, x)
        return x

    def compute(self, plan: SequencePlan, tables: tuple, x: Tensor) -> Tensor:
        """The fused computation of all stages."""
        for stage, one, its_tables in zip(self, plan.plans, tables, strict=True):
            held = [x]
            del x
            x = stage._run(one.backend, one.spec, its_tables, held.pop())
        return x


def _in_parts(run: Callable[[Tensor], Tensor], x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """run(x), some images at a time, about as many each time; it maps maps to maps, which lie in memory like that."""
    parts = -(-x.shape[0] // max(1, graphs.GPU_PART // max(1, x[:1].numel())))
    if parts <= 1:
        return run(x)
    whole, done = None, 0
    for out in map(run, x.chunk(parts)):
        if whole is None:
            shape = (x.shape[0], *out.shape[1:])
            whole = torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=memory_format)
        whole[done : done + len(out)] = out
        done += len(out)
    return whole
