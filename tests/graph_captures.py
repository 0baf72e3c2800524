"""What captures CUDA graphs in the tests: a GPU, or a stand-in; and the model that they are captured of."""

from contextlib import contextmanager, suppress

import torch
from helpers import SMALL, make, random_images, relative_rms

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


def assert_right(fast, model, x):
    assert relative_rms(fast(x), model(x)) <= 1e-5


def edit(either):
    with torch.no_grad():
        for parameter in either.stages.parameters():
            parameter[: (len(parameter) + 1) // 2].add_(0.2)


class Captures:
    """Counts captures and replays; stands in for a GPU where there is none."""

    def __init__(self):
        self.captured = self.replayed = 0
        self.error: Exception | None = None
        self.stream = 0
        self.real = graphs.capture

    def capture(self, compute, device):
        if self.error is not None:
            raise self.error
        self.captured += 1
        if device.type == "cuda":
            launch, output = self.real(compute, device)
        else:
            output = compute()

            def launch():
                with torch.no_grad(), suppress(RuntimeError, AttributeError, TypeError):
                    output.fill_(torch.nan)  # what a graph of other modules would leave, where these can't compute
                    output.copy_(compute())

        def replay():
            self.replayed += 1
            launch()

        if device.type == "cpu":
            output.fill_(torch.nan)  # a capture computes nothing
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
