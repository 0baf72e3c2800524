"""What errors say."""

import torch

NO_MEMORY = ("out of memory", "ALLOC_FAILED")  # in what CUDA, Triton and libraries say that allocate for themselves


def in_a_line(error: Exception, *unnamed: type[Exception]) -> str:
    """An error's type, unless it is one of the unnamed, and the first line of what it says."""
    lines = str(error).strip().splitlines()[:1]
    kind = "" if lines and isinstance(error, unnamed) else type(error).__name__
    return ": ".join(filter(None, (kind, *lines)))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left on a GPU, whoever found that."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in NO_MEMORY)


def raise_out_of_memory(error: Exception) -> None:
    """Raise an error that says so as PyTorch's own kind, which callers know to handle."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if is_out_of_memory(error):
        raise torch.OutOfMemoryError(str(error)) from error
