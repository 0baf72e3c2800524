"""The classifier as a whole, replaced: on a GPU one CUDA graph spans all that it does."""

from collections.abc import Hashable
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from . import graphs
from .adapters import parts_of
from .autocast import autocast_dtype
from .calls import is_traced, is_transformed, kind_of, needs_grad
from .fused import FusedPatchEmbed
from .graphs import Graphs
from .modules import WEIGHTED, class_of, dropouts, foreign_methods, is_a, is_hooked, methods, patches
from .plan import Plan, SequencePlan, edits_of
from .sequence import FusedStages, FusedWhole
from .watch import Watch

CALLED = ("forward_features", "forward_head")  # by the original forward, which a graph goes around
IN_HEAD = ("global_pool", "pool", "drop", "fc", "flatten")
LAYERS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Conv2d, nn.Dropout, nn.Flatten, nn.Identity, nn.Linear)
POOLS = (
    "SelectAdaptivePool2d", "FastAdaptiveAvgPool", "FastAdaptiveMaxPool", "FastAdaptiveAvgMaxPool",
    "FastAdaptiveCatAvgMaxPool", "AdaptiveAvgMaxPool2d", "AdaptiveCatAvgMaxPool2d",
)  # fmt: skip


class ClassifierPlan:
    """How a classifier runs as one: the plans of its parts, which hold while one pass over all finds nothing new.

    Attributes:
        parameters: All inside, and in_rest those of what comes after the stages, which a graph reads as they are.
        graphs: The CUDA graphs of the whole.
        tables: What the parts' backends need of the parameters, with the versions of these that it came from.
    """

    def __init__(self, model: "FusedClassifier", patch_embed: Plan, stages: SequencePlan):
        self.patch_embed, self.stages = patch_embed, stages
        self.in_rest = tuple(chain.from_iterable(part.parameters() for part in model.parts_after_stages()))
        self.parameters = tuple(dict.fromkeys((*patch_embed.parameters, *stages.parameters, *self.in_rest)))
        self.graphs = Graphs(torch.contiguous_format)
        self._watch = Watch(model, self.parameters)
        parts = model.fused_embedding(), model.fused_stages(), *model.fused_stages()
        self._parts = [(part, part._swinfast, part._swinfast.plan) for part in parts]
        self.tables: dict[Hashable, tuple[list[int], tuple]] = {}

    def holds(self, model: "FusedClassifier") -> bool:
        """Whether the plans are still the parts', and the model is what it was."""
        return (
            all(part._swinfast is settings and settings.plan is plan for part, settings, plan in self._parts)
            and not any(map(model.__dict__.__contains__, CALLED))
            and self._watch.holds(model)
            and not self._watch.is_random()
        )

    @property
    def derivations(self) -> int:
        return self.patch_embed.derivations + self.stages.derivations

    @property
    def may_be_captured(self) -> bool:
        return self.patch_embed.may_be_captured and self.stages.may_be_captured

    def work(self, images: Tensor) -> int:
        """Numbers of the first stage's input."""
        proj = self.patch_embed.spec.proj
        patches = images.shape[2] // proj.kernel_size[0] * (images.shape[3] // proj.kernel_size[1])
        return len(images) * patches * proj.out_channels


def _is_known(model: nn.Module) -> bool:
    """Whether a model does with its parts what its class does, and all after its stages is known and can be watched."""
    cls, head = class_of(model), model._modules.get("head")
    parts = parts_of(cls)
    if set(model._modules) != set(parts) or model._parameters or model._buffers:
        return False
    if not is_a("ClassifierHead", type(head), cls) or not all(map(_is_known_in_head, head.modules())):
        return False
    norms = [model._modules[name] for name in parts[2:-1]]
    if any(type(norm) not in (nn.LayerNorm, nn.Identity) or not _is_known_in_head(norm) for norm in norms):
        return False
    if any(next(patches(norm), None) is not None or "forward" in norm.__dict__ for norm in norms):
        return False
    if foreign_methods(cls) or any(getattr(type(model), name) is not getattr(cls, name) for name in CALLED):
        return False
    return next(patches(head), None) is None and not any(
        name in head.__dict__ for name in (*methods(type(head)), *IN_HEAD)
    )


def _is_known_in_head(module: nn.Module) -> bool:
    """Whether nothing that a module computes with is hidden from those who watch its children and parameters."""
    for child in module.children():
        name = type(child).__name__
        if type(child) not in LAYERS and not (name in POOLS and is_a(name, type(child), type(module))):
            return False
    if is_hooked(module):
        return False
    if isinstance(module, WEIGHTED) and not {"weight", "bias"} <= module._parameters.keys():
        return False
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return all(type(p) is nn.Parameter and p.layout == torch.strided and not p.is_inference() for p in own)


class FusedClassifier(FusedWhole):
    """Images to logits in one CUDA graph, where that pays; else part by part, each replaced by itself."""

    def fused_embedding(self) -> nn.Module | None:
        return self._modules.get(parts_of(self.original)[0])

    def fused_stages(self) -> nn.Module | None:
        """The stages."""
        return self._modules.get(parts_of(self.original)[1])

    def parts_after_stages(self) -> list[nn.Module]:
        """What comes after the stages, the head last."""
        return [self._modules[name] for name in parts_of(self.original)[2:]]

    def plan(self) -> ClassifierPlan | None:
        kept = self._swinfast.plan
        if kept is None or not kept.holds(self):
            plans = self._plans()
            kept = self._swinfast.plan = ClassifierPlan(self, *plans) if plans is not None else None
        return kept

    def tables(self, plan: ClassifierPlan, kind: tuple) -> tuple:
        versions = list(map(edits_of, plan.parameters))
        kept = plan.tables.get(kind)
        if kept is None or kept[0] != versions:
            parts = (
                self.fused_embedding().tables(plan.patch_embed, kind),
                *self.fused_stages().tables(plan.stages, kind),
            )
            kept = plan.tables[kind] = versions, (*parts, plan.in_rest)
        return kept[1]

    def _plans(self) -> tuple[Plan, SequencePlan] | None:
        """The plans of the parts, None where something must see them called, or one has no graphs."""
        patch_embed, stages = self.fused_embedding(), self.fused_stages()
        if not isinstance(patch_embed, FusedPatchEmbed) or not isinstance(stages, FusedStages) or not _is_known(self):
            return None
        if any(method in self.__dict__ for method in CALLED) or any(d.training for d in dropouts(self.head)):
            return None
        for part, mixin in ((patch_embed, FusedPatchEmbed), (stages, FusedStages)):
            if type(part).forward is not mixin.forward or "forward" in part.__dict__ or is_hooked(part):
                return None
        plans = patch_embed.plan(), stages.plan()
        graphless = any(part._swinfast.cuda_graphs is False for part in (patch_embed, stages))
        return None if plans[1] is None or graphless else plans

    def forward(self, x: Tensor) -> Tensor:
        if self.training or is_traced(x) or is_transformed():
            return super().forward(x)
        out = self.replayed(x)
        if out is not None:
            return out
        if not self._may_be_captured(x):
            return super().forward(x)
        plan = self.plan()
        if plan is None or self._is_unchecked() or needs_grad(x, plan.parameters):
            return super().forward(x)
        if not graphs.may_run(self._swinfast.cuda_graphs, plan, x):
            return super().forward(x)
        kind = kind_of(x)
        return plan.graphs.run(
            x,
            kind,
            reads=lambda: self.tables(plan, kind),
            compute=partial(self._compute, plan),
            plain=partial(self.original.forward, self, x),
            first=partial(_embed, self.fused_embedding(), plan.patch_embed),
        )

    def _may_be_captured(self, x: Tensor) -> bool:
        """Before anything is known of the model. Under autocast PyTorch keeps weights that it cast, which a graph would
        read and edits would not reach."""
        wanted = self._swinfast.cuda_graphs is not False and x.dim() == 4
        return wanted and graphs.on_gpu(x) and autocast_dtype(x.device) is None

    def _is_unchecked(self) -> bool:
        return any(module._swinfast.unchecked for module in (self.fused_embedding(), *self.fused_stages()))

    def _compute(self, plan: ClassifierPlan, tables: tuple, held: list[Tensor]) -> Tensor:
        """What comes after the patch embedding."""
        return self.after_fused_stages(self.fused_stages().compute(plan.stages, tables[1:-1], held.pop()))

    def after_fused_stages(self, x: Tensor) -> Tensor:
        """The last map to logits."""
        *norms, _ = self.parts_after_stages()
        for norm in norms:
            x = norm(x)
        return self.forward_head(x)


def _embed(patch_embed: FusedPatchEmbed, plan: Plan, tables: tuple, images: Tensor, out: Tensor | None) -> Tensor:
    """The patch embedding by itself. A graph keeps it, and would keep its own owner, were this the classifier's."""
    return patch_embed._run(plan.backend, plan.spec, tables[0], images, out)
