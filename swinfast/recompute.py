"""Gradients of a fused forward: the backward pass computes the original module again and differentiates that."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .modules import HOOKS, class_of, methods


class FusedForward(torch.autograd.Function):
    """module.fused_forward(plan, x) with the gradients of the original; parameters are the plan's."""

    @staticmethod
    def forward(ctx, module, plan, x, *parameters):
        ctx.module, ctx.plan, ctx.places = module, plan, _places(module, plan)
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
        if not ctx.plan.computes_the_same(ctx.module):
            raise RuntimeError(
                f"a {type(ctx.module).original.__name__} was changed between its forward and its backward pass, which "
                "computes it again: gradients of what it was can't be had any more"
            )
        create_graph, needed = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        # Others than the tensors themselves: their hooks are for the gradients that this returns, and they may need
        # none by now.
        with torch.enable_grad():
            inputs = [
                saved.view_as(saved)
                if create_graph and (saved.requires_grad or not need)
                else saved.detach().requires_grad_(need)
                for saved, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
        x, *parameters = inputs
        tensors = {path: parameters[number] for path, number in ctx.places.items()}
        # what autocast makes of tensors that are new each time would stay in its cache
        with torch.enable_grad(), torch.autocast(**ctx.autocast, cache_enabled=False):
            output = original_of(ctx.module, tensors)(x)
        wanted = [index for index, need in enumerate(needed) if need]
        found = torch.autograd.grad(
            output, [inputs[index] for index in wanted], gradient, create_graph=create_graph, allow_unused=True
        )
        gradients = [None] * len(inputs)
        for index, value in zip(wanted, found, strict=True):
            gradients[index] = value
        return None, None, *gradients


def _places(module: nn.Module, plan: Any) -> dict[str, int]:
    """Which of the plan's parameters is at each path in the module; a plan keeps what was found."""
    if plan.places is None:
        numbers = {id(parameter): number for number, parameter in enumerate(plan.parameters)}
        named = module.named_parameters(remove_duplicate=False)
        plan.places = {path: numbers[id(parameter)] for path, parameter in named}
    return plan.places


def _itself(x: Tensor) -> Tensor:
    """x on the same memory and no view: autograd lets nobody change a view that a function returns in place."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def original_of(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """The original of a replaced module as its forward pass ran it: in eval mode, without the hooks, patches and
    compiled calls that came since, and with these tensors for its parameters. The module itself is left alone: others
    may be using it.

    Args:
        tensors: By the paths of all places in the module where there is a parameter, shared ones under each.
    """
    cls = class_of(module)
    left_out = {*methods(cls), "_compiled_call_impl"}
    made = object.__new__(cls)
    made.__dict__ = {
        **{name: value for name, value in module.__dict__.items() if name not in left_out},
        **{hooks: OrderedDict() for hooks in HOOKS},
        "training": False,
        "_parameters": {name: tensors.get(prefix + name, value) for name, value in module._parameters.items()},
        "_modules": {
            name: None if child is None else original_of(child, tensors, f"{prefix}{name}.")
            for name, child in module._modules.items()
        },
    }
    return made
