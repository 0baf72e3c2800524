"""What a replaced module keeps beside its parameters: the spec it was read into, and what was derived from its
weights, both for as long as they are true.

None of it is module state. It is keyed by everything it was made from, so edited, loaded, cast, moved or replaced
weights are seen at the next call; and a copied, pickled or converted module starts without it. Only edits through
``parameter.data``, which no counter sees, need ``swinfast.refresh``.
"""

from collections.abc import Callable, Hashable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import HOOKS, Adapter, why_not
from .autocast import without_autocast
from .backends import Choice, choose

_version = attrgetter("_version")


class Plan:
    """How a module runs, for one state of its structure and weights: a spec, or the reason why the original must run.

    Attributes:
        reason: Why the module is left as it is, None where it is replaced.
        spec: What the adapter read, None where the adapter has a reason.
        backend: What computes the module, None where there is a reason; note says more of it, or is None.
        parameters: All parameters inside, in order, and parameter_names their names.
    """

    def __init__(self, adapter: Adapter, module: nn.Module, backend: str):
        named = dict(module.named_parameters())
        self.parameter_names = tuple(named)
        self.parameters = tuple(named.values())
        self.spec, choice = None, Choice(None, reason=why_not(adapter, module))
        if choice.reason is None:
            self.spec = adapter.read(module)
            choice = choose(backend, self.spec, self.parameters[0].device, self.parameters[0].dtype)
        self.backend, self.reason, self.note = choice
        self._derived: dict[Hashable, Any] = {}
        self._counts_edits = not any(parameter.is_inference() for parameter in self.parameters)

        self._modules = list(module.modules())
        self._contents = [table for m in self._modules for table in (m._modules, m._parameters) if table]
        self._attributes = [m.__dict__ for m in self._modules[1:]]
        self._hooks = [getattr(m, hooks) for m in self._modules[1:] for hooks in HOOKS]
        self._windows = [(m, m.window_size, m.shift_size) for m in self._modules if hasattr(m, "shift_size")]
        self._dropouts = [m for m in self._modules if isinstance(m, nn.Dropout) or type(m).__name__ == "DropPath"]
        self._structure, self._weights = self._structure_now(), self._weights_now()

    def holds(self) -> bool:
        """Whether the module and its weights are still what the plan was made of.

        Asked at every call, so it is a few passes in C over flat lists, microseconds for a stage.
        """
        return (
            self._structure == self._structure_now()
            and self._weights == self._weights_now()
            and all(m.window_size == window and m.shift_size == shift for m, window, shift in self._windows)
        )

    def is_random(self) -> bool:
        """Whether a dropout inside was put into training mode, though the module is not."""
        return any(dropout.training for dropout in self._dropouts)

    def derived(self, kind: Hashable, derive: Callable[[Any], Any]) -> Any:
        """derive(spec), made once for each kind.

        Inference tensors count no edits: what comes from them is made at every call.
        """
        if kind in self._derived:
            return self._derived[kind]
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self.parameters[0].device):
            made = derive(self.spec)
        if self._counts_edits:
            self._derived[kind] = made
        return made

    def _structure_now(self) -> tuple:
        """Children and parameters by identity, types, whether there are hooks, and how many attributes each module
        has: a patched forward is one more."""
        contents = chain.from_iterable(map(dict.values, self._contents))
        types, attributes = list(map(type, self._modules)), list(map(len, self._attributes))
        return list(map(id, contents)), types, attributes, any(self._hooks)

    def _weights_now(self) -> tuple | None:
        if not self._counts_edits:
            return None
        return list(map(_version, self.parameters)), list(map(Tensor.data_ptr, self.parameters))
