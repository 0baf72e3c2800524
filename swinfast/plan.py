"""What a replaced module keeps beside its parameters: the spec it was read into, and what was derived from its
weights, both for as long as they are true.

None of it is module state. It is keyed by everything it was made from, so edited, loaded, cast, moved or replaced
weights are seen at the next call; and a copied, pickled or converted module starts without it. Only edits through
``parameter.data``, which no counter sees, need ``swinfast.refresh``.

What is derived keeps its place in memory when weights are edited or loaded: CUDA graphs read it there.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .adapters import Adapter, why_not
from .autocast import without_autocast
from .backends import Choice, choose
from .graphs import Graphs, is_capturing
from .modules import patches
from .watch import Watch

edits_of = attrgetter("_version")  # how often a tensor was edited


def _count_fused_steps(optimizer: Optimizer, *_: Any) -> None:
    """Optimisers with fused=True edit parameters past the counters of edits."""
    groups = (group["params"] for group in optimizer.param_groups if group.get("fused"))
    torch.autograd.graph.increment_version(list(chain.from_iterable(groups)))


register_optimizer_step_post_hook(_count_fused_steps)


class Plan:
    """How a module runs, for one state of its structure and of where its weights are: a spec, or the reason why the
    original must run.

    Attributes:
        reason: Why the module is left as it is, None where it is replaced.
        spec: What the adapter read, None where the adapter has a reason.
        backend: What computes the module, None where there is a reason; note says more of it, or is None.
        parameters: All parameters inside, in order, each once; places: which is where, once a backward pass may come.
        graphs: The CUDA graphs of the module.
        derivations: How often anything was derived from the weights.
    """

    def __init__(self, adapter: Adapter, module: nn.Module, backend: str, failure: str | None = None):
        """failure: Why Triton, though chosen, can't compute the module, None where it has not failed."""
        self.parameters = tuple(module.parameters())
        self.memory_format = adapter.memory_format
        self.spec, choice = None, Choice(None, reason=why_not(adapter, module))
        if choice.reason is None:
            self.spec = adapter.read(module)
            choice = choose(backend, self.spec, self.parameters[0].device, self.parameters[0].dtype, failure)
        self.backend, self.reason, self.note = choice
        self.graphs = Graphs(adapter.memory_format)
        self.places: dict[str, int] | None = None
        self.derivations = 0
        self._derived: dict[Hashable, tuple[list[int], Any]] = {}  # with the versions of the weights it came from
        self._lock = threading.Lock()
        there = [parameter for parameter in self.parameters if not is_lazy(parameter)]
        self._counts_edits = not any(parameter.is_inference() for parameter in there)

        placed = [p for p in there if p.layout == torch.strided] if self._counts_edits else ()
        self._watch = Watch(module, placed)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module and the places of its weights are still what the plan was made of."""
        return self._watch.holds(module)

    def computes_the_same(self, module: nn.Module) -> bool:
        """Whether the module still computes what the plan was made of, though its weights may be others, or elsewhere,
        and there may be hooks."""
        if self.holds(module):
            return True
        _, *inside = module.modules()
        same = inside == self._watch.inside and self._watch.settings_hold(module)
        return same and next(patches(module), None) is None

    def is_random(self) -> bool:
        """Whether a dropout inside was put into training mode, though the module is not."""
        return self._watch.is_random()

    def why_original(self, module: nn.Module) -> str | None:
        """Why the original runs in eval mode, for the report."""
        if self.reason is None and self.is_random() and not module.training:
            return "a dropout inside it is in training mode"
        return self.reason

    @property
    def may_be_captured(self) -> bool:
        """Whether all that a CUDA graph would read stays in its place for as long as the plan holds."""
        return self.backend is not None and self.backend.capturable and self._counts_edits

    def work(self, x: Tensor) -> int:
        """How much it computes, by the numbers of the stage's input."""
        return x.numel()

    def derived(self, kind: Hashable, derive: Callable[[Any], Any]) -> Any:
        """derive(spec), made once for each kind and state of the weights, and where it was before if that can be.

        Inference tensors count no edits: what comes from them is made at every call. So it is while somebody captures
        a CUDA graph: its replays must derive again, since nothing is computed now.
        """
        if not self._counts_edits or is_capturing(self.parameters[0].device):
            return self._derive(derive)
        kept = self._derived.get(kind)
        if kept is not None and kept[0] == self._versions_now():
            return kept[1]
        with self._lock:
            versions, kept = self._versions_now(), self._derived.get(kind)
            if kept is not None and kept[0] == versions:  # by another thread, meanwhile
                return kept[1]
            made = self._derive(derive)
            if kept is not None and overwrite(kept[1], made):
                made = kept[1]
            if self.parameters[0].is_cuda:  # other streams may use it from now on
                torch.cuda.current_stream(self.parameters[0].device).synchronize()
            self.derivations += 1  # when all of it is there, and before another thread finds it and looks no further
            self._derived[kind] = versions, made
        return made

    def _derive(self, derive: Callable[[Any], Any]) -> Any:
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self.parameters[0].device):
            return derive(self.spec)

    def _versions_now(self) -> list[int]:
        return list(map(edits_of, self.parameters))


class SequencePlan:
    """How modules that follow each other run as one: their plans, one after the other.

    Attributes:
        plans: One for each module.
        parameters: Of all, each once; places as in Plan.
        graphs: The CUDA graphs of the whole.
    """

    def __init__(self, plans: Sequence[Plan]):
        self.plans = tuple(plans)
        self.memory_format = plans[0].memory_format
        self.parameters = tuple(dict.fromkeys(chain.from_iterable(plan.parameters for plan in plans)))
        self.graphs = Graphs(self.memory_format)
        self.places: dict[str, int] | None = None

    def holds(self, plans: Sequence[Plan]) -> bool:
        """Whether these are still the modules' plans."""
        return len(plans) == len(self.plans) and all(map(is_, plans, self.plans))

    def computes_the_same(self, module: nn.Sequential) -> bool:
        return len(module) == len(self.plans) and all(
            plan.computes_the_same(child) for plan, child in zip(self.plans, module, strict=True)
        )

    @property
    def derivations(self) -> int:
        return sum(plan.derivations for plan in self.plans)

    @property
    def may_be_captured(self) -> bool:
        return all(plan.may_be_captured for plan in self.plans)

    def work(self, x: Tensor) -> int:
        """As Plan's, by the first stage's input: those of the others are smaller."""
        return x.numel()


def overwrite(old: Any, new: Any) -> bool:
    """Copy the tensors of a structure of named tuples into those of another; False, and nothing is done, where they
    don't fit each other."""
    pairs = list(_pairs(old, new))
    if None in pairs:
        return False
    for mine, theirs in pairs:
        if mine.data_ptr() != theirs.data_ptr():  # else both are the parameter itself
            mine.copy_(theirs)
    return True


def _pairs(old: Any, new: Any) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Tensors that belong together, None for what does not fit."""
    if type(old) is not type(new):
        yield None
    elif isinstance(old, Tensor):
        same = all(getattr(old, name) == getattr(new, name) for name in ("shape", "dtype", "device"))
        yield (old, new) if same and old.stride() == new.stride() else None
    elif isinstance(old, tuple):
        if len(old) != len(new):
            yield None
        for pair in zip(old, new, strict=False):
            yield from _pairs(*pair)
    elif callable(old) or old != new:
        yield None
