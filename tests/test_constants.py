"""Tensors that are made once and kept, for all threads and streams."""

import torch

from swinfast.constants import constant


class OnGpu(torch.Tensor):
    """As far as one asks it."""

    is_cuda = True


def test_other_streams_find_what_is_kept_written(monkeypatch):
    done = []

    class Stream:
        def synchronize(self):
            done.append("waited")

    @constant
    def numbers(count):
        done.append("made")
        return torch.zeros(count).as_subclass(OnGpu), "and more"

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    assert numbers(3) is numbers(3)
    assert done == ["made", "waited"]
