"""How much memory a computation takes, by the operators that it calls."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts bytes of what operators make.

    Attributes:
        peak: The most that were alive at a time.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage)
        self.alive = {key: storage for key, storage in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.sizes()))
        return out

    def sizes(self) -> Iterator[int]:
        """Bytes of each storage that is alive; one may have been resized."""
        for reference in self.alive.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            yield 0 if storage is None else storage.nbytes()


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of the tensors in it. Packed weights are opaque: they have none."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not x.is_mkldnn]
    return [x.untyped_storage() for x in tensors]
