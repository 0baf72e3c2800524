"""Autocast regions, asked for by device; meta tensors have none."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast region that a call is in, None outside one."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def within_autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """A context in the region of which autocast_dtype told, in another thread or process; None stands for none."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context outside any autocast region."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
