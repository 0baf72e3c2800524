"""Whether modules are still what they were: what somebody may have changed about them since.

Asked at every call, so it is a few passes in C over flat lists, microseconds for a stage.
"""

from collections.abc import Sequence
from itertools import chain

from torch import Tensor, nn

from .adapters import HOOKS, class_of, is_dropout, methods

WATCHED = (  # attributes of modules that answers depend on
    "window_size", "shift_size", "num_heads", "img_size", "strict_img_size", "eps", "approximate", "kernel_size",
    "stride", "padding", "dilation", "groups", "padding_mode", "pool_type", "flatten", "output_size", "dim",
    "start_dim", "end_dim", "dim_reduce", "dim_cat",
)  # fmt: skip


class Watch:
    """Modules as they are now.

    Hooks of the first module and attributes that somebody gives it are its own affair: it is called by its owner.

    Attributes:
        modules: Which they are.
    """

    def __init__(self, modules: Sequence[nn.Module], placed: Sequence[Tensor]):
        """placed: Tensors whose place in memory counts."""
        self.modules = list(modules)
        self._placed = placed
        tables = [table for m in self.modules for table in (m._modules, m._parameters) if table]
        self._contents = [table.values() for table in tables]
        self._attributes = [m.__dict__ for m in self.modules[1:]]
        self._hooks = [getattr(m, hooks) for m in self.modules[1:] for hooks in HOOKS]
        classes = dict.fromkeys(map(class_of, self.modules))
        self._methods = [(cls, method) for cls in classes for method in methods(cls)]
        self._watched = [(m.__dict__, name) for m in self.modules for name in WATCHED if name in m.__dict__]
        self._dropouts = [m for m in self.modules if is_dropout(type(m))]
        self._structure, self._settings = self._structure_now(), self._settings_now()
        self._places = self._places_now()

    def holds(self) -> bool:
        """Whether all is as it was."""
        return self._structure == self._structure_now() and self._places == self._places_now() and self.settings_hold()

    def settings_hold(self) -> bool:
        """Whether the attributes that answers depend on are what they were."""
        return self._settings == self._settings_now()

    def is_random(self) -> bool:
        """Whether a dropout inside is in training mode."""
        return any(dropout.training for dropout in self._dropouts)

    def _structure_now(self) -> tuple:
        """Children and parameters by identity, types, whether there are hooks, and what may be patched: methods of
        classes, and how many attributes each module has, of which a patched method is one more."""
        contents = chain.from_iterable(self._contents)
        types, attributes = list(map(type, self.modules)), list(map(len, self._attributes))
        found = [getattr(cls, method) for cls, method in self._methods]
        return list(map(id, contents)), types, attributes, any(self._hooks), found

    def _settings_now(self) -> list:
        return [attributes.get(name) for attributes, name in self._watched]

    def _places_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._placed))
