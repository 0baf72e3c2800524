"""What can be asked of any module: its class, its children, and what somebody has done to it since it was made."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, ModuleType

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
WEIGHTED = (nn.Conv2d, nn.LayerNorm, nn.Linear)
MODULE = frozenset(dir(nn.Module))
LIBRARIES = ("timm.layers.", "swinfast.reference.")  # where the files of known models have their layers from


def _constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which would import the compiler, and Triton with it.

    For what the class of a module answers. A compiled model guards the class already; whatever else is asked of it in
    the graph would be one more guard, checked at every call.
    """
    function._dynamo_marked_constant = True
    return function


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before it was replaced."""
    return _original(type(module))


@_constant
def _original(cls: type[nn.Module]) -> type[nn.Module]:
    return getattr(cls, "original", cls)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own, which must see its calls."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def dropouts(module: nn.Module) -> list[nn.Module]:
    """What makes a module's answers random where it is in training mode, though the module may not be."""
    return [m for m in module.modules() if is_dropout(type(m))]


@_constant
def is_dropout(cls: type[nn.Module]) -> bool:
    """Whether modules of a class give random answers in training mode."""
    return issubclass(cls, nn.Dropout) or cls.__name__ == "DropPath"


def check_children(module: nn.Module, prefix: str, expected: dict) -> Iterator[str]:
    """Each child must be exactly of an expected type, given as a class or a type's name (see is_a); None: may be
    absent."""
    for name in module._modules:
        if name not in expected:
            yield f"{prefix}{name} is unknown to swinfast"
    for name, types in expected.items():
        types = types if isinstance(types, tuple) else (types,)
        child = module._modules.get(name)
        if child is None:
            if None not in types:
                yield f"{prefix}{name} is missing"
        elif type(child) not in types and not any(
            isinstance(t, str) and is_a(t, type(child), class_of(module)) for t in types
        ):
            known = " or ".join(t if isinstance(t, str) else t.__name__ for t in types if t is not None)
            yield unexpected(prefix + name, type(child), known, class_of(module))


@_constant
def is_a(name: str, child: type, parent: type) -> bool:
    """Whether a child is of the type that its parent's own file, or that of a class it is made of, knows by a name; or
    whose full name it is. One that somebody has put there from another file is not."""
    if "." in name:
        return f"{child.__module__}.{child.__qualname__}" == name
    homes = _homes(parent)
    own = child.__module__.startswith(LIBRARIES) or sys.modules.get(child.__module__) in homes
    return own and child.__name__ == name and any(getattr(home, name, None) is child for home in homes)


def unexpected(name: str, cls: type, known: str, parent: type) -> str:
    """Why a module of a class is none of the known ones, which its parent may have in its own file."""
    if cls.__name__ not in known:
        return f"{name} is a {cls.__name__}, expected {known}"
    if cls.__module__ == parent.__module__ and _was_defined_anew(cls):
        return _defined_anew(name, cls)
    return f"{name} is a {cls.__module__}.{cls.__name__}, expected {known}"


def _defined_anew(name: str, cls: type) -> str:
    return f"the class of {name} was defined anew: {cls.__module__} was loaded again after the model was made"


@_constant
def _was_defined_anew(cls: type) -> bool:
    """Whether a class's file has another one in its place by now, as after importlib.reload."""
    now = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
    alike = isinstance(now, type) and (now.__module__, now.__qualname__) == (cls.__module__, cls.__qualname__)
    return alike and now is not cls


def check_insides(module: nn.Module) -> Iterator[str]:
    """Reasons that any module can have: hooks and patches inside it, weights of foreign or mixed kinds."""
    yield from patches(module)
    for name, child in module.named_modules():
        if not name:
            continue
        if is_hooked(child):
            yield f"{name} has hooks"
        for weight in ("weight", "bias") if isinstance(child, WEIGHTED) else ():
            # in this order: that an attribute is missing is a slow guard, by way of Module.__getattr__
            if weight not in child._parameters and getattr(child, weight, None) is not None:
                yield f"{name}.{weight} is no parameter"
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if type(parameter) not in (nn.Parameter, torch.Tensor) and not is_fake(parameter):  # export fakes them
            yield f"{name} is a {type(parameter).__name__}, expected torch.nn.Parameter"
        if parameter.layout != torch.strided:
            yield f"{name} has layout {parameter.layout}, expected torch.strided"
        if parameter.dtype not in DTYPES:
            yield f"{name} is {parameter.dtype}, expected a floating-point dtype of at least 16 bits"
    if len({(parameter.dtype, parameter.device) for parameter in parameters.values()}) > 1:
        yield "its parameters are of several dtypes or devices"


def patches(module: nn.Module) -> Iterator[str]:
    """What was put in place of methods of a module and those inside it, on them or on their classes."""
    for name, child in module.named_modules():
        cls = class_of(child)
        for method in foreign_methods(cls):
            place = name or cls.__name__
            yield _defined_anew(place, cls) if _was_defined_anew(cls) else f"the {method} method of {place} is patched"
        for method in methods(cls) if name else ():
            if method in child.__dict__:
                yield f"the {method} method of {name} is patched"


@_constant
def foreign_methods(cls: type) -> tuple[str, ...]:
    """Methods of a class that are defined elsewhere than the classes it is made of: somebody put them there."""
    homes = [home.__dict__ for home in _homes(cls)]
    found = ((name, getattr(cls, name)) for name in methods(cls))
    others = ((name, method) for name, method in found if method is not nn.Module.forward)
    return tuple(name for name, method in others if not any(getattr(method, "__globals__", None) is h for h in homes))


def _homes(cls: type) -> list[ModuleType]:
    """The files of a class and of those that it is made of, but for PyTorch's."""
    names = (one.__module__ for one in cls.__mro__ if one not in nn.Module.__mro__)
    return [sys.modules[name] for name in names if name in sys.modules]


@_constant
def methods(cls: type) -> tuple[str, ...]:
    """Names of what may be patched: forward, and the other functions of a class that is not PyTorch's."""
    return _methods(cls)


@cache
def _methods(cls: type) -> tuple[str, ...]:
    if cls.__module__.startswith("torch."):
        return ("forward",)
    names = (name for name in dir(cls) if name == "forward" or name not in MODULE)
    return tuple(name for name in names if isinstance(getattr(cls, name), FunctionType) or name == "forward")
