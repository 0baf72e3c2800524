"""torch.compile and torch.export see through an optimised model, and a compiled one sees edited weights.

The graph is checked without a code generator (aot_eager) everywhere, and with Inductor where a C++ compiler is found.
"""

import operator
import re
import shutil

import pytest
import torch
from helpers import random_images, randomise, relative_rms, small_model_args
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import swinfast

IMAGES = random_images(3, 3, 64, 64, dtype=torch.float64)
OPTIONS = {
    "whole windows": {},
    "padded": {"img_size": 60, "window_size": 7},
    "odd grid": {"img_size": 66, "window_size": 3, "dynamic_img_size": True},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()


def make(timm, source="timm", **overrides):
    create = timm.create_model if source == "timm" else swinfast.create_model
    model = randomise(create("swinv2_cr_tiny_224", **small_model_args(**overrides))).double().eval()
    return model, swinfast.optimize(model)


@pytest.mark.parametrize(("name", "source"), [*((name, "timm") for name in OPTIONS), ("whole windows", "reference")])
def test_compile(timm, name, source):
    model, fast = make(timm, source, **OPTIONS[name])
    dynamic = name == "padded"
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    size = OPTIONS[name].get("img_size", 64)
    with torch.no_grad():
        for batch in (3, 5, 2) if dynamic else (3,):
            images = random_images(batch, 3, size, size, dtype=torch.float64)
            assert relative_rms(compiled(images), model(images)) <= 1e-9


def test_export_for_images_of_any_size(timm):
    """The example has a grid of two windows, of which a slice of one would fix the size."""
    model, fast = make(timm, dynamic_img_size=True, window_size=8)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(fast, (IMAGES,), dynamic_shapes=(sizes,), strict=False)
    images = random_images(2, 3, 96, 160, dtype=torch.float64)
    with torch.no_grad():
        assert relative_rms(exported.module()(images), model(images)) <= 1e-9


def test_biases_of_shifted_windows_are_no_slices_in_a_graph(timm):
    """Inductor took minutes to compile those for batches of any size."""
    _, fast = make(timm)
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module.forward

    with torch.no_grad():
        torch.compile(fast, fullgraph=True, backend=backend, dynamic=True)(IMAGES)
    (graph,) = graphs
    functions = {node.target for node in graph.nodes}
    assert torch.nn.functional.layer_norm in functions and operator.setitem not in functions


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_make_fx(timm, warm, pre_dispatch):
    model, fast = make(timm)
    with torch.no_grad():
        if warm:
            fast(IMAGES)
        graph = make_fx(fast, tracing_mode="real", pre_dispatch=pre_dispatch)(IMAGES)
        assert relative_rms(graph(2 * IMAGES), model(2 * IMAGES)) <= 1e-9


def test_a_call_with_fake_tensors_leaves_nothing(timm):
    """Whatever is computed under the mode is fake, real images too."""
    model, fast = make(timm)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert fast(IMAGES).shape == (3, 10)
        assert relative_rms(fast(IMAGES), model(IMAGES)) <= 1e-9


def test_compile_with_a_dropout_switched_on_alone(timm):
    _, fast = make(timm)
    fast.stages[0].blocks[0].attn.meta_mlp.drop1.train()
    assert swinfast.report(fast).rows[1].detail == "a dropout inside it is in training mode"
    assert not swinfast.report(fast).rows[1].replaced
    compiled = torch.compile(fast, backend="aot_eager")
    with torch.no_grad():
        assert not torch.equal(compiled(IMAGES), compiled(IMAGES))


def test_symbolic_tracing_sees_the_original(timm):
    """torch.fx, and timm's feature extractors on top of it."""
    model, fast = make(timm)
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(fast, concrete_args={"x": torch.fx.PH})
        assert relative_rms(traced(IMAGES), model(IMAGES)) <= 1e-9


def test_compile_sees_edited_weights(timm):
    model, fast = make(timm)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = compiled(IMAGES)
        for either in (model, fast):
            block = either.stages[1].blocks[1]
            block.attn.meta_mlp.fc2.weight.mul_(2)
            block.attn.logit_scale.sub_(0.4)
            block.mlp.fc1.weight.mul_(1.1)
        assert relative_rms(compiled(IMAGES), model(IMAGES)) <= 1e-9
        assert relative_rms(compiled(IMAGES), before) > 1e-4


def keep_weights_as_buffers(model):
    block = model.stages[0].blocks[1]
    for module, name in ((block.mlp.fc2, "weight"), (block.attn, "logit_scale")):
        weight = module.get_parameter(name).detach() * 1.5
        delattr(module, name)
        module.register_buffer(name, weight)


def replace_a_layer(model):
    model.stages[1].blocks[0].mlp.fc1 = torch.nn.Sequential(model.stages[1].blocks[0].mlp.fc1, torch.nn.Tanh())


def change_eps(model):
    model.stages[1].blocks[1].norm1.eps = 0.1


def test_compile_sees_what_is_changed_after_a_call(timm):
    model, fast = make(timm)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(IMAGES)
        for change in (keep_weights_as_buffers, replace_a_layer, change_eps):
            before = model(IMAGES)
            change(model)
            change(fast)
            assert relative_rms(model(IMAGES), before) > 1e-6
            assert relative_rms(compiled(IMAGES), model(IMAGES)) <= 1e-9, change.__name__
        fast.stages[0].blocks[0].attn.meta_mlp.drop1.train()
        assert not torch.equal(compiled(IMAGES), compiled(IMAGES))


def test_compiled_calls_check_few_guards(timm):
    """Each is checked at every call, and the slowest say that a module has no attribute of a name."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list  # private, and for this alone

    guards = []
    for model in make(timm):
        with torch.no_grad():
            torch.compile(model, backend="eager")(IMAGES)
        (entry,) = _debug_get_cache_entry_list(type(model).forward.__code__)
        torch.compiler.reset()  # both share a forward
        guards.append(re.findall(r"\+- (?!\w*Manager\b)(\w+)", str(entry.guard_manager)))
    plain, fast = guards
    assert len(plain) > 500
    assert len(fast) <= 2 * len(plain)
    assert fast.count("NO_HASATTR") <= plain.count("NO_HASATTR")


def test_compile_with_gradients(timm):
    model, fast = make(timm)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    results = []
    for either, parameters in ((model, model.parameters()), (compiled, fast.parameters())):
        results.append(torch.autograd.grad(either(IMAGES).square().sum(), list(parameters)))
    scale = max(gradient.norm() for gradient in results[0])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() <= 1e-9 * scale


def test_compile_after_a_stage_must_stay_original(timm):
    """A layer replaced by a foreign one after optimize: the compiled model computes with it."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, fast = make(timm)
    for either in (model, fast):
        layer = either.stages[0].blocks[1].mlp.fc2
        layer.__class__ = Doubled
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_rms(compiled(IMAGES), model(IMAGES)) <= 1e-9


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="Inductor needs a C++ compiler")
def test_inductor(timm):
    model, fast = make(timm, **OPTIONS["padded"])
    compiled = torch.compile(fast.float(), fullgraph=True)
    images = random_images(3, 3, 60, 60)
    with torch.no_grad():
        assert relative_rms(compiled(images), model.float()(images)) <= 1e-5


@pytest.mark.parametrize(("name", "source"), [*((name, "timm") for name in OPTIONS), ("whole windows", "reference")])
def test_export_with_dynamic_batch(timm, name, source):
    model, fast = make(timm, source, **OPTIONS[name])
    size = OPTIONS[name].get("img_size", 64)
    example = random_images(2, 3, size, size, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(fast, (example,), dynamic_shapes=({0: batch},))
    operations = {str(node.target) for node in program.graph.nodes}
    assert "aten.conv2d.default" not in operations  # that of the original patch embedding
    exported = program.module()
    with torch.no_grad():
        for count in (1, 2, 7):
            images = random_images(count, 3, size, size, dtype=torch.float64)
            assert relative_rms(exported(images), model(images)) <= 1e-9


def test_export_keeps_parameters_by_name(timm):
    _, fast = make(timm)
    exported = torch.export.export(fast, (IMAGES,))
    assert set(exported.state_dict) == set(fast.state_dict())


def test_jit_trace(timm):
    model, fast = make(timm)
    with pytest.warns((torch.jit.TracerWarning, DeprecationWarning)):
        traced = torch.jit.trace(fast, IMAGES, check_trace=False)
    with torch.no_grad():
        assert relative_rms(traced(IMAGES), model(IMAGES)) <= 1e-9


def test_meta_device_gives_shapes(timm):
    _, fast = make(timm, **OPTIONS["padded"])
    fast = fast.to("meta")
    assert fast(torch.empty(5, 3, 60, 60, device="meta")).shape == (5, 10)


def test_fake_tensors_give_shapes(timm):
    model, _ = make(timm)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fast = swinfast.optimize(model.float())
        assert fast(mode.from_tensor(IMAGES.float())).shape == (3, 10)
    model, fast = make(timm)  # nothing fake is kept for later
    with torch.no_grad():
        assert relative_rms(fast(IMAGES), model(IMAGES)) <= 1e-9
