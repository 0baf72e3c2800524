"""What captures CUDA graphs in the tests: a GPU, or a stand-in; and the model that they are captured of."""

from contextlib import contextmanager

import torch
from helpers import SMALL, make, random_images, relative_rms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import swinfast
from swinfast import graphs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = SMALL | {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "num_heads": (1, 2)}


def tiny(timm):
    return make(timm, TINY, "timm").to(DEVICE).requires_grad_(False)


def optimised(model, backend="triton" if DEVICE.type == "cuda" else "torch", **options):
    return swinfast.optimize(model, backend=backend, **options)


def images(batch=1, seed=0, size=16):
    return random_images(batch, 3, size, size, seed=seed).to(DEVICE)


def warmed(model, **options):
    fast = optimised(model, **options)
    for seed in range(3):
        fast(images(seed=seed))
    return fast


def spans_any(fast):
    """Whether there is a graph of the whole classifier."""
    return fast._swinfast.plan is not None and len(fast._swinfast.plan.graphs) > 0


def assert_right(fast, model, x):
    assert relative_rms(fast(x), model(x)) <= 1e-5


def edit(either):
    with torch.no_grad():
        for parameter in either.stages.parameters():
            parameter[: (len(parameter) + 1) // 2].add_(0.2)


EMPTY = torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.set_


class Tape(TorchDispatchMode):
    """Records operators with the memory that they read and wrote, and computes the same on it again, as a GPU would."""

    def __init__(self):
        super().__init__()
        self.operators: list[tuple] = []
        self.empty: list[tuple[torch.Tensor, int]] = []
        self.loaded: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in EMPTY:  # no work for a GPU: it keeps what was put there
            self.empty.append((out.detach(), out._version))
            return out
        inputs = tree_map(lambda one: one.detach() if isinstance(one, torch.Tensor) else one, (args, kwargs or {}))
        self.operators.append((func, *inputs, [one.detach() for one in _tensors(out)]))
        return out

    def play(self) -> None:
        """What it is to be loaded into is overwritten in the end: a graph uses its memory again."""
        with torch.no_grad():
            for func, args, kwargs, outputs in self.operators:
                for made, kept in zip(_tensors(func(*args, **kwargs)), outputs, strict=True):
                    if made.data_ptr() != kept.data_ptr():
                        kept.copy_(made)
            for one in self.loaded:
                one.fill_(torch.nan)


def _tensors(out: object) -> list[torch.Tensor]:
    return [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]


class Captures:
    """Counts captures and replays; stands in for a GPU where there is none."""

    def __init__(self):
        self.captured = self.replayed = self.room = 0
        self.error: Exception | None = None
        self.stream = 0
        self.real = graphs.capture

    def capture(self, compute, device, room):
        if self.error is not None:
            raise self.error
        self.captured += 1
        self.room = room
        if device.type == "cuda":
            launch, output = self.real(compute, device, room)
        else:
            with Tape() as tape:
                output = compute()
            tape.loaded = [one for one, version in tape.empty if one._version == version]  # nobody has written to it
            launch = tape.play
            output.detach().fill_(torch.nan)  # a capture computes nothing

        def replay():
            self.replayed += 1
            launch()

        return replay, output

    @contextmanager
    def on_stream(self, number: int):
        if DEVICE.type == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):
                yield
                torch.cuda.current_stream().synchronize()
            return
        before, self.stream = self.stream, number
        yield
        self.stream = before
