"""What captures CUDA graphs in the tests: a GPU, or a stand-in."""

from contextlib import contextmanager

import torch

from swinfast import graphs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
                with torch.no_grad():
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
