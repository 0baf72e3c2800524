"""What torchrun's processes tell each other in the course of a run."""

import functools
import itertools
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed

Exchange = Callable[[Any], list[Any]]  # takes a value in each rank, gives every rank the values of all
LONGEST = timedelta(days=30)  # that one rank may compute for longer than another
_runs = itertools.count()  # the same in all ranks


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; 0 of 1 without torchrun, and for who says that it is alone."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("RANK", 0)) if world > 1 else 0, world


@contextmanager
def between_ranks() -> Iterator[Exchange]:
    """An Exchange for one run; without torchrun, of a single process.

    Where a rank leaves with an error, or is killed, the next exchange of the others is a RuntimeError.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield lambda value: [value]
        return
    is_ours = not distributed.is_initialized()
    if is_ours:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        name = f"swinfast/{attempt}/{next(_runs)}"  # what the store holds of another run misleads
        store = distributed.PrefixStore(name, _store())
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group = distributed.new_group(backend="gloo", timeout=LONGEST)

    def exchange(value: Any) -> list[Any]:
        values = [None] * world
        try:
            distributed.all_gather_object(values, value, group)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they have the group, too
            if not isinstance(error, RuntimeError):
                raise
            reason = str(error).partition(". ")[0]
            raise RuntimeError(
                f"another rank has ended before the run was done, finished parts stay: {reason}"
            ) from error
        return values

    try:
        yield exchange
    finally:
        distributed.destroy_process_group(None if is_ours else group)
        group = None  # the connections end with the last reference, and who keeps an error keeps this frame


@functools.cache
def _store() -> "distributed.Store":
    """Where the ranks meet. Rank 0 may be serving it: it stays for as long as the process."""
    return next(distributed.rendezvous("env://"))[0]
