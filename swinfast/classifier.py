"""The classifier as a whole, replaced: for few images on a GPU one CUDA graph spans all that it does."""

from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor, nn

from . import graphs
from .adapters import HOOKS, class_of, foreign_methods, is_a, methods, patches
from .autocast import autocast_dtype
from .calls import is_traced, is_transformed, kind_of, needs_grad
from .fused import Fused, FusedPatchEmbed
from .graphs import Graphs
from .plan import Plan, SequencePlan, version_of
from .sequence import FusedStages
from .watch import Watch

CALLED = ("forward_features", "forward_head")  # by the original forward, which a graph goes around
LAYERS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Conv2d, nn.Dropout, nn.Flatten, nn.Identity, nn.Linear)
POOLS = (
    "SelectAdaptivePool2d", "FastAdaptiveAvgPool", "FastAdaptiveMaxPool", "FastAdaptiveAvgMaxPool",
    "FastAdaptiveCatAvgMaxPool", "AdaptiveAvgMaxPool2d", "AdaptiveCatAvgMaxPool2d",
)  # fmt: skip


class ClassifierPlan:
    """How a classifier runs as one: the plans of its parts, which hold while one pass over all finds nothing new.

    Attributes:
        is_one: Whether it can; what swinfast does not know in a model or its head is called part by part.
        parameters: All inside.
        graphs: The CUDA graphs of the whole.
    """

    def __init__(self, model: "FusedClassifier", patch_embed: Plan, stages: SequencePlan):
        self.patch_embed, self.stages = patch_embed, stages
        in_head = tuple(model.head.parameters())
        self.is_one = _is_known(model) and all(type(parameter) is nn.Parameter for parameter in in_head)
        self.parameters = tuple(dict.fromkeys((*patch_embed.parameters, *stages.parameters, *in_head)))
        self.graphs = Graphs(torch.contiguous_format)
        self._watch = Watch(list(model.modules()), self.parameters)
        parts = model.patch_embed, model.stages, *model.stages
        self._plans = [(part._swinfast, part._swinfast.plan) for part in parts]
        self._tables: dict[Hashable, tuple[list[int], tuple]] = {}  # with the versions of the weights they came from

    def holds(self, model: "FusedClassifier") -> bool:
        """Whether the plans are still the parts', and the model is what it was."""
        return (
            all(settings.plan is plan for settings, plan in self._plans)
            and not any(map(model.__dict__.__contains__, CALLED))
            and self._watch.holds()
            and not self._watch.is_random()
        )

    def tables(self, model: "FusedClassifier", kind: Hashable) -> tuple:
        """What the backends of all parts need of the parameters: the same objects for as long as they are right."""
        versions = list(map(version_of, self.parameters))
        kept = self._tables.get(kind)
        if kept is None or kept[0] != versions:
            tables = model.patch_embed.tables(self.patch_embed, kind), *model.stages.tables(self.stages, kind)
            kept = self._tables[kind] = versions, tables
        return kept[1]

    @property
    def derivations(self) -> int:
        return self.patch_embed.derivations + self.stages.derivations

    @property
    def may_be_captured(self) -> bool:
        return self.patch_embed.may_be_captured and self.stages.may_be_captured

    def graph_pays(self, images: Tensor) -> bool:
        """By the input of the first stage, as where the stages are called by themselves."""
        proj = self.patch_embed.spec.proj
        patches = images.shape[2] // proj.kernel_size[0] * (images.shape[3] // proj.kernel_size[1])
        first = self.stages.plans[0]
        return first.backend.graph_pays(len(images) * patches * proj.out_channels, images.device, proj.weight.dtype)


def _is_known(model: nn.Module) -> bool:
    """Whether a model does with its parts what its class does, and all of its head is known."""
    cls, head = class_of(model), model.head
    if foreign_methods(cls) or not is_a("ClassifierHead", type(head), cls):
        return False
    if next(patches(head), None) is not None or any(method in head.__dict__ for method in methods(type(head))):
        return False
    if any(getattr(m, hooks) for m in head.modules() for hooks in HOOKS):
        return False
    inside = ((type(child), type(parent)) for parent in head.modules() for child in parent.children())
    return all(one in LAYERS or (one.__name__ in POOLS and is_a(one.__name__, one, parent)) for one, parent in inside)


class FusedClassifier(Fused):
    """Images to logits in one CUDA graph, where that pays; else part by part, each replaced by itself."""

    def plan(self) -> ClassifierPlan | None:
        """How the classifier runs as one, None where each part must run by itself."""
        kept = self._swinfast.plan
        if kept is None or not kept.holds(self):
            plans = self._plans()
            kept = self._swinfast.plan = ClassifierPlan(self, *plans) if plans is not None else None
        return kept if kept is not None and kept.is_one else None

    def _plans(self) -> tuple[Plan, SequencePlan] | None:
        patch_embed, stages = self.patch_embed, self.stages
        if not isinstance(patch_embed, FusedPatchEmbed) or not isinstance(stages, FusedStages):
            return None
        if any(method in self.__dict__ for method in CALLED):
            return None
        for part in (patch_embed, stages):
            if "forward" in part.__dict__ or any(getattr(part, hooks) for hooks in HOOKS):
                return None
        plans = patch_embed.plan(), stages.plan()
        return plans if plans[1] is not None else None

    def forward(self, x: Tensor) -> Tensor:
        if self.training or is_traced(x) or is_transformed() or not self._may_be_captured(x):
            return super().forward(x)
        kind, kept = kind_of(x), self._swinfast.plan
        if kept is not None and kept.graphs and self._pays(kept, x):
            out = kept.graphs.replayed(
                x,
                kind,
                holds=lambda: self.plan() is kept,
                reads=lambda: kept.tables(self, kind),
                made=lambda: kept.derivations,
            )
            if out is not None:
                return out
        plan = self.plan()
        if plan is None or not self._pays(plan, x) or self._is_unchecked():
            return super().forward(x)
        return plan.graphs.run(
            x,
            kind,
            reads=lambda: plan.tables(self, kind),
            compute=partial(self._compute, plan),
            plain=partial(self.original.forward, self, x),
        )

    def _may_be_captured(self, x: Tensor) -> bool:
        """Before anything is known of the model. Under autocast PyTorch keeps weights that it cast, which a graph would
        read and edits would not reach."""
        wanted = self._swinfast.cuda_graphs is not False and x.dim() == 4
        return wanted and graphs.on_gpu(x) and autocast_dtype(x.device) is None

    def _pays(self, plan: ClassifierPlan, x: Tensor) -> bool:
        return graphs.may_run(self._swinfast.cuda_graphs, plan, x) and not needs_grad(x, plan.parameters)

    def _is_unchecked(self) -> bool:
        return any(module._swinfast.unchecked for module in (self.patch_embed, *self.stages))

    def _compute(self, plan: ClassifierPlan, tables: tuple, x: Tensor) -> Tensor:
        first = plan.patch_embed
        held = [self.patch_embed._run(first.backend, first.spec, tables[0], x)]
        return self.forward_head(self.stages.compute(plan.stages, tables[1:], held.pop()))
