"""Tensors that are made once and kept, for all threads and streams."""

import torch
from torch.func import functionalize

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


def test_nothing_is_kept_of_a_transform():
    """Its tensors end with it."""

    @constant
    def numbers(count):
        return torch.zeros(count)

    wrapped = functionalize(lambda x: x + numbers(3))(torch.ones(3))
    assert torch.equal(wrapped, torch.ones(3))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(numbers(3))
