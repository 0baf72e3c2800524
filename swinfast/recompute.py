"""Gradients of a fused forward: the backward pass computes the original module again and differentiates that."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .adapters import HOOKS


class FusedForward(torch.autograd.Function):
    """module.fused_forward(plan, x) with the gradients of module.original_forward(x); parameters are plan's."""

    @staticmethod
    def forward(ctx, module, plan, x, *parameters):
        ctx.module, ctx.plan = module, plan
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.save_for_backward(x, *parameters)
        return _itself(module.fused_forward(plan, x))

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.plan.computes_the_same():
            raise RuntimeError(
                f"a {type(ctx.module).original.__name__} was changed between its forward and its backward pass, which "
                "computes it again: gradients of what it was can't be had any more"
            )
        x, *parameters = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if not create_graph:
            x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad(), torch.autocast(**ctx.autocast), _as_it_was(ctx.module):
            output = _original(ctx.module, dict(zip(ctx.plan.parameter_names, parameters, strict=True)), x)
        inputs = [x, *parameters]
        wanted = [index for index, need in enumerate(ctx.needs_input_grad[2:]) if need]
        found = torch.autograd.grad(
            output, [inputs[index] for index in wanted], gradient, create_graph=create_graph, allow_unused=True
        )
        gradients = [None] * len(inputs)
        for index, value in zip(wanted, found, strict=True):
            gradients[index] = value
        return None, None, *gradients


def _itself(x: Tensor) -> Tensor:
    """x on the same memory and no view: autograd lets nobody change a view that a function returns in place."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class _OriginalForward(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.original_forward(x)


def _original(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """The original forward with the parameters of the forward pass: torch.func.functional_call may have lent them."""
    if all(parameters[name] is parameter for name, parameter in module.named_parameters()):
        return module.original_forward(x)
    lent = {f"module.{name}": parameter for name, parameter in parameters.items()}
    return torch.func.functional_call(_OriginalForward(module), lent, (x,))


@contextmanager
def _as_it_was(module: nn.Module):
    """The mode that the forward pass ran in, and no hooks inside, though there may be others since."""
    training = [child for child in module.modules() if child.training]
    inside = (child for child in module.modules() if child is not module)
    hooks = [(child, name, getattr(child, name)) for child in inside for name in HOOKS if getattr(child, name)]
    for child in training:
        child.training = False
    for child, name, table in hooks:
        setattr(child, name, type(table)())
    try:
        yield
    finally:
        for child in training:
            child.training = True
        for child, name, table in hooks:
            setattr(child, name, table)
