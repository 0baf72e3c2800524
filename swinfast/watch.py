"""Whether modules are still what they were: what somebody may have changed about them since.

Asked at every call, so it is a few passes in C over flat lists, microseconds for a stage.
"""

import weakref
from collections.abc import Sequence
from itertools import chain, repeat
from operator import is_, itemgetter

from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .modules import HOOKS, class_of, is_dropout, methods

WATCHED = (  # attributes of modules that answers depend on
    "window_size", "shift_size", "num_heads", "img_size", "strict_img_size", "eps", "approximate", "kernel_size",
    "stride", "padding", "dilation", "groups", "padding_mode", "pool_type", "flatten", "output_size", "dim",
    "start_dim", "end_dim", "dim_reduce", "dim_cat", "dynamic_img_pad", "output_fmt", "pretrained_window_size",
)  # fmt: skip

is_training = itemgetter("training")  # of a module's attributes


class Watch:
    """A module and those inside it, as they are now.

    Hooks of the module itself and attributes that somebody gives it are its own affair: it is called by its owner. It
    is not kept: it keeps the watch, and in a circle they would hold their memory until garbage is collected.

    Attributes:
        inside: The modules inside.
    """

    def __init__(self, module: nn.Module, placed: Sequence[Tensor]):
        """placed: Tensors whose place in memory counts."""
        self._module = weakref.ref(module)
        _, *self.inside = modules = list(module.modules())
        self._placed, self._places = placed, list(map(Tensor.data_ptr, placed))
        self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in placed]
        self._memories = [memory.cdata for memory in self._memory]
        self._type, self._types = type(module), list(map(type, self.inside))
        tables = [table for m in modules for table in (m._modules, m._parameters) if table]
        self._tables = [table.values() for table in tables]
        self._contents = list(chain.from_iterable(self._tables))  # children and parameters
        self._hooks = [getattr(m, hooks) for m in self.inside for hooks in HOOKS]
        self._hooked = any(self._hooks)
        self._attributes = [m.__dict__ for m in self.inside]
        self._counts = list(map(len, self._attributes))  # a method that is patched on a module is one more
        classes = dict.fromkeys((one, class_of(m)) for m in modules for one in (type(m), class_of(m)))
        self._classes, self._names = zip(*((one, name) for one, cls in classes for name in methods(cls)), strict=True)
        self._methods = self._methods_now()
        self._own_settings = {name: module.__dict__[name] for name in WATCHED if name in module.__dict__}
        watched = [(m.__dict__, name) for m in self.inside for name in WATCHED if name in m.__dict__]
        self._owners, self._settings_names = zip(*watched, strict=True) if watched else ((), ())
        self._settings = list(map(dict.get, self._owners, self._settings_names))
        self._dropouts = [m.__dict__ for m in self.inside if is_dropout(type(m))]

    def holds(self, module: nn.Module) -> bool:
        """Whether all is as it was: children, parameters and their places, types, hooks, methods and settings."""
        contents = list(chain.from_iterable(self._tables))
        return (
            len(contents) == len(self._contents)
            and all(map(is_, contents, self._contents))
            and type(module) is self._type
            and list(map(type, self.inside)) == self._types
            and list(map(len, self._attributes)) == self._counts
            and any(self._hooks) == self._hooked
            and self._methods_now() == self._methods
            and list(map(Tensor.data_ptr, self._placed)) == self._places
            and not any(map(UntypedStorage._expired, self._memories))  # else the places may be others' by now
            and self.settings_hold(module)
        )

    def _methods_now(self) -> list:
        """A ScriptModule's class has none that can be asked for."""
        return list(map(getattr, self._classes, self._names, repeat(None)))

    def settings_hold(self, module: nn.Module) -> bool:
        """Whether it is the same module, and the attributes that answers depend on are what they were."""
        own = self._own_settings
        return (
            self._module() is module
            and list(map(module.__dict__.get, own)) == list(own.values())
            and list(map(dict.get, self._owners, self._settings_names)) == self._settings
        )

    def is_random(self) -> bool:
        """Whether a dropout inside is in training mode."""
        return any(map(is_training, self._dropouts))
