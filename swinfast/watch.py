"""Whether modules are still what they were: what somebody may have changed about them since.

Asked at every call, so it is a few passes in C over flat lists, microseconds for a stage.
"""

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter

from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .adapters import HOOKS, class_of, is_dropout, methods

WATCHED = (  # attributes of modules that answers depend on
    "window_size", "shift_size", "num_heads", "img_size", "strict_img_size", "eps", "approximate", "kernel_size",
    "stride", "padding", "dilation", "groups", "padding_mode", "pool_type", "flatten", "output_size", "dim",
    "start_dim", "end_dim", "dim_reduce", "dim_cat",
)  # fmt: skip

is_training = itemgetter("training")  # of a module's attributes


class Watch:
    """Modules as they are now.

    Hooks of the first module and attributes that somebody gives it are its own affair: it is called by its owner.

    Attributes:
        modules: Which they are.
    """

    def __init__(self, modules: Sequence[nn.Module], placed: Sequence[Tensor]):
        """placed: Tensors whose place in memory counts."""
        self.modules = list(modules)
        self._placed, self._places = placed, list(map(Tensor.data_ptr, placed))
        self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in placed]
        self._memories = [memory.cdata for memory in self._memory]
        self._types = list(map(type, self.modules))
        tables = [table for m in self.modules for table in (m._modules, m._parameters) if table]
        self._tables = [table.values() for table in tables]
        self._contents = list(chain.from_iterable(self._tables))  # children and parameters
        self._hooks = [getattr(m, hooks) for m in self.modules[1:] for hooks in HOOKS]
        self._hooked = any(self._hooks)
        self._attributes = [m.__dict__ for m in self.modules[1:]]
        self._counts = list(map(len, self._attributes))  # a method that is patched on a module is one more
        classes = dict.fromkeys((one, class_of(m)) for m in self.modules for one in (type(m), class_of(m)))
        self._classes, self._names = zip(*((one, name) for one, cls in classes for name in methods(cls)), strict=True)
        self._methods = list(map(getattr, self._classes, self._names))
        watched = [(m.__dict__, name) for m in self.modules for name in WATCHED if name in m.__dict__]
        self._owners, self._settings_names = zip(*watched, strict=True) if watched else ((), ())
        self._settings = list(map(dict.get, self._owners, self._settings_names))
        self._dropouts = [m.__dict__ for m in self.modules if is_dropout(type(m))]

    def holds(self) -> bool:
        """Whether all is as it was: children, parameters and their places, types, hooks, methods and settings."""
        contents = list(chain.from_iterable(self._tables))
        return (
            len(contents) == len(self._contents)
            and all(map(is_, contents, self._contents))
            and list(map(type, self.modules)) == self._types
            and list(map(len, self._attributes)) == self._counts
            and any(self._hooks) == self._hooked
            and list(map(getattr, self._classes, self._names)) == self._methods
            and list(map(Tensor.data_ptr, self._placed)) == self._places
            and not any(map(UntypedStorage._expired, self._memories))  # else the places may be others' by now
            and self.settings_hold()
        )

    def settings_hold(self) -> bool:
        """Whether the attributes that answers depend on are what they were."""
        return list(map(dict.get, self._owners, self._settings_names)) == self._settings

    def is_random(self) -> bool:
        """Whether a dropout inside is in training mode."""
        return any(map(is_training, self._dropouts))
