"""Gradients through an optimised model are those of the plain one, in every mode that PyTorch users work in."""

import copy

import pytest
import torch
from helpers import random_images, randomise, small_model_args
from torch import nn

import swinfast
from swinfast import recompute, torch_backend

IMAGES = random_images(2, 3, 64, 64, dtype=torch.float64)


@pytest.fixture
def model(timm):
    return randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args())).double().eval()


def gradients(model, images=IMAGES, **keywords):
    images = images.clone().requires_grad_()
    wanted = [images, *model.parameters()]
    output = model(images)
    weights = random_images(*output.shape, seed=1).to(output)
    return torch.autograd.grad((output * weights).sum(), wanted, **keywords)


def assert_close(got, expected):
    scale = max(gradient.norm() for gradient in expected)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * scale


def test_in_eval_mode_the_forward_is_fused(model, monkeypatch):
    fast = swinfast.optimize(model)
    originals, original_of = [], recompute.original_of

    def spy(module, tensors, prefix=""):
        if not prefix:
            originals.append(module)
        return original_of(module, tensors, prefix)

    monkeypatch.setattr(recompute, "original_of", spy)
    output = fast(IMAGES)
    assert output.requires_grad
    assert not originals
    output.sum().backward()
    assert originals == [fast.stages, fast.patch_embed]  # in the backward pass, each once


def test_in_eval_mode(model):
    assert_close(gradients(swinfast.optimize(model)), gradients(model))


def test_in_parts(timm, monkeypatch):
    monkeypatch.setattr(torch_backend, "CPU_PART", 2 * 56 * 56 * 16)  # two images in stage 1, four in stage 2
    options = small_model_args(img_size=112)
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **options)).double().eval()
    images = random_images(11, 3, 112, 112, dtype=torch.float64)
    assert_close(gradients(swinfast.optimize(model), images), gradients(model, images))


@pytest.mark.parametrize("part", ["patch_embed", "stages", "forward_features"])
def test_outputs_can_be_changed_in_place(model, part):
    """As a ReLU(inplace=True) after a backbone does."""
    results = []
    for either in (model, swinfast.optimize(model)):
        either.zero_grad()
        x = either.patch_embed(IMAGES) if part == "stages" else IMAGES
        output = nn.functional.relu(getattr(either, part)(x), inplace=True)
        output.square().sum().backward()
        results.append([p.grad for p in either.parameters() if p.grad is not None])
    assert_close(results[1], results[0])


def relu_between_stages(model):
    first = model.stages[0](model.patch_embed(IMAGES))
    second = model.stages[1](first)
    return nn.functional.relu(first, inplace=True).sum() + second.sum()


def nothing_after_the_stages(model):
    patches = model.patch_embed(IMAGES)
    output = model.stages(patches)
    patches.mul_(0)
    return output.sum()


@pytest.mark.parametrize("use", [relu_between_stages, nothing_after_the_stages], ids=lambda use: use.__name__)
def test_inputs_can_be_changed_in_place(model, use):
    """A stage keeps none of its input, in timm."""
    results = []
    for either in (model, swinfast.optimize(model)):
        either.zero_grad()
        use(either).backward()
        results.append([p.grad for p in either.parameters() if p.grad is not None])
    assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_on_tensors_fire_once(model, create_graph):
    results, fired = [], []
    for either in (model, swinfast.optimize(model)):
        images = IMAGES.clone().requires_grad_()
        tensors = [images, *either.parameters()]
        counts = [0] * len(tensors)
        for index, tensor in enumerate(tensors):

            def double(gradient, index=index, counts=counts):
                counts[index] += 1
                return 2 * gradient

            tensor.register_hook(double)
        either(images).square().sum().backward(create_graph=create_graph)
        results.append([tensor.grad.detach() for tensor in tensors])
        fired.append(counts)
    assert_close(results[1], results[0])
    assert fired[1] == fired[0] == [1] * len(fired[0])


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("frozen", ["model", "images"])
def test_frozen_between_forward_and_backward(model, frozen, create_graph):
    """What needed gradients in the forward pass still gets them."""
    results = []
    for either in (model, swinfast.optimize(model)):
        images = IMAGES.clone().requires_grad_()
        loss = either(images + 0).square().sum()
        (either if frozen == "model" else images).requires_grad_(False)
        loss.backward(create_graph=create_graph)
        results.append([x.grad for x in (images, *either.parameters()) if x.grad is not None])
        assert results[-1]
    assert_close(results[1], results[0])


@pytest.mark.parametrize("when", ["before", "between"])
def test_compiled_submodules(model, when):
    """Module.compile binds what it compiles to a module: it is not for what the backward pass computes again."""
    fast = swinfast.optimize(model)
    parts = fast.stages[0], fast.stages[1].blocks[0], fast.stages[1].blocks[1].attn

    def compile_parts():
        for part in parts:
            part.compile(backend="eager")

    if when == "before":
        compile_parts()
    images = IMAGES.clone().requires_grad_()
    output = fast(images)
    if when == "between":
        compile_parts()
    weights = random_images(*output.shape, seed=1).to(output)
    got = torch.autograd.grad((output * weights).sum(), [images, *fast.parameters()])
    assert_close(got, gradients(model))


def test_what_was_saved_is_differentiated(model):
    """Whatever became of the weights since, where that is allowed."""
    results = []
    for either in (model, swinfast.optimize(model)):
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            loss = either(IMAGES).square().sum()
            with torch.no_grad():
                for parameter in either.parameters():
                    parameter.mul_(1.1)
            results.append(torch.autograd.grad(loss, list(either.parameters())))
        with torch.no_grad():
            for parameter in either.parameters():
                parameter.div_(1.1)
    assert_close(results[1], results[0])


@pytest.mark.parametrize("lent_as", ["one", "two"])
def test_lent_weights_that_are_tied(model, lent_as):
    """By names of their own they may be lent apart, and get gradients of their own."""
    tie_weights(model)
    names = [f"stages.{stage}.blocks.0.attn.meta_mlp.fc1.weight" for stage in (0, 1)]
    results = []
    for either in (model, swinfast.optimize(model)):
        first = either.get_parameter(names[0]).detach().clone().requires_grad_()
        second = first if lent_as == "one" else (1.1 * first).detach().requires_grad_()
        lent = dict(zip(names, (first, second), strict=True))
        output = torch.func.functional_call(either, lent, (IMAGES,), tie_weights=False)
        results.append(torch.autograd.grad(output.square().sum(), list(dict.fromkeys((first, second)))))
    assert_close(results[1], results[0])


def tie_weights(model):
    first, second = (stage.blocks[0].attn.meta_mlp.fc1 for stage in model.stages)
    second.weight = first.weight


def use_a_stage_twice(model):
    model.stages.insert(1, model.stages[0])


@pytest.mark.parametrize("share", [tie_weights, use_a_stage_twice], ids=lambda share: share.__name__)
def test_shared_weights(model, share):
    results = []
    for either in (model, swinfast.optimize(model)):
        share(either)
        results.append(gradients(either))
    assert_close(results[1], results[0])


def set_window(model):
    model.set_input_size(64, window_size=8)


def set_eps(model):
    model.stages[0].blocks[0].norm1.eps = 0.5


def patch_a_layer(model):
    layer = model.stages[1].blocks[1].mlp.fc2
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)


def replace_a_stage(model):
    model.stages[1] = copy.deepcopy(model.stages[1])


def append_a_stage(model):
    model.stages.append(nn.Tanh())


CHANGES = [set_window, set_eps, patch_a_layer, replace_a_stage, append_a_stage]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_between_forward_and_backward(model, change):
    fast = swinfast.optimize(model)
    loss = fast(IMAGES).square().sum()
    change(fast)
    with pytest.raises(RuntimeError, match="Sequential was changed between its forward and its backward pass"):
        loss.backward()


def test_hooks_and_patches_that_came_after_the_forward(model):
    """They are not for what the backward pass computes again."""
    fast = swinfast.optimize(model)
    expected = gradients(model)
    images = IMAGES.clone().requires_grad_()
    output = fast(images)
    fired = []
    fast.stages[1].register_forward_hook(lambda module, inputs, output: fired.append(1) or 0 * output)
    fast.stages[0].blocks[1].register_forward_hook(lambda module, inputs, output: fired.append(1) or 0 * output)
    fast.stages[1].forward = lambda x: 0 * x
    weights = random_images(*output.shape, seed=1).to(output)
    assert_close(torch.autograd.grad((output * weights).sum(), [images, *fast.parameters()]), expected)
    assert not fired
    assert fast.stages[0].blocks[1]._forward_hooks


def test_stages_that_do_not_begin_with_the_first(model):
    results = []
    for either in (model, swinfast.optimize(model)):
        either.zero_grad()
        either.stages[1:](either.stages[0](either.patch_embed(IMAGES))).square().sum().backward()
        results.append([p.grad for p in either.parameters() if p.grad is not None])
    assert_close(results[1], results[0])


def test_in_training_mode(model):
    """The original computation, dropout of the position bias MLP included."""
    results = []
    for either in (model.train(), swinfast.optimize(model).train()):
        torch.manual_seed(0)
        results.append(gradients(either))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_eval_forward_then_train_then_backward(model):
    """The backward pass computes in the mode of the forward pass, and leaves the model in the one it has."""
    fast = swinfast.optimize(model)
    expected = gradients(model)
    images = IMAGES.clone().requires_grad_()
    output = fast(images)
    fast.train()
    weights = random_images(*output.shape, seed=1).to(output)
    assert_close(torch.autograd.grad((output * weights).sum(), [images, *fast.parameters()]), expected)
    assert all(module.training for module in fast.modules())


def test_dropout_switched_on_alone(model):
    """Monte-Carlo dropout: a dropout inside an eval model in training mode is random in the fused model too."""
    fast = swinfast.optimize(model)
    with torch.no_grad():
        for either in (model, fast):
            either.stages[0].blocks[0].attn.meta_mlp.drop1.train()
        torch.manual_seed(0)
        expected = model(IMAGES)
        torch.manual_seed(0)
        assert torch.allclose(fast(IMAGES), expected)
        assert not torch.allclose(fast(IMAGES), expected)


def test_images_that_only_the_optimised_model_takes(model):
    """uint8 and half images: the backward pass must see them as the original takes them."""
    fast = swinfast.optimize(model)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    half = IMAGES.half()
    for given, taken in ((pixels, ((pixels / 255 - mean) / std).double()), (half, half.double())):
        got = torch.autograd.grad(fast(given).square().sum(), list(fast.parameters()))
        assert_close(got, torch.autograd.grad(model(taken).square().sum(), list(model.parameters())))
    half.requires_grad_()
    (gradient,) = torch.autograd.grad(fast(half).square().sum(), half)
    assert gradient.dtype == torch.float16


def test_frozen_parameters(model):
    fast = swinfast.optimize(model)
    for either in (model, fast):
        for name, parameter in either.named_parameters():
            parameter.requires_grad_("norm" in name)
        either(IMAGES).square().sum().backward()
    for (name, one), other in zip(fast.named_parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) == ("norm" not in name)
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-8, atol=1e-8)


def test_second_derivatives(model):
    def penalty(either):
        images = IMAGES.clone().requires_grad_()
        (first,) = torch.autograd.grad(either(images).square().sum(), images, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [images, *either.parameters()], allow_unused=True)

    got, expected = penalty(swinfast.optimize(model)), penalty(model)
    assert [g is None for g in got] == [g is None for g in expected]
    assert_close([g for g in got if g is not None], [g for g in expected if g is not None])


def test_weights_edited_between_forward_and_backward(model):
    fast = swinfast.optimize(model)
    output = fast(IMAGES)
    with torch.no_grad():
        fast.stages[0].blocks[0].attn.qkv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_functional_call_and_its_gradients(model):
    """Parameters lent for one call, as torch.func.functional_call and ensembles do."""
    fast = swinfast.optimize(model)
    lent = {name: (p.detach() * 1.2).requires_grad_() for name, p in model.named_parameters()}
    results = []
    for either in (model, fast):
        output = torch.func.functional_call(either, lent, (IMAGES,))
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), list(lent.values()))])
    assert_close(results[1], results[0])


def test_torch_func_transforms(model):
    fast = swinfast.optimize(model)
    state = dict(model.named_parameters())

    def loss(parameters, either, images):
        return torch.func.functional_call(either, parameters, (images,)).square().sum()

    expected = torch.func.grad(loss)(state, model, IMAGES)
    got = torch.func.grad(loss)(state, fast, IMAGES)
    assert_close(list(got.values()), list(expected.values()))
    expected = torch.func.vmap(lambda image: model(image[None])[0])(IMAGES)
    assert torch.allclose(torch.func.vmap(lambda image: fast(image[None])[0])(IMAGES), expected)


def test_linearize(model):
    """It traces inside a transform; what it returns may be called again and again."""
    fast = swinfast.optimize(model.requires_grad_(False))
    tangent = torch.randn_like(IMAGES)
    expected = torch.func.jvp(model, (IMAGES,), (tangent,))[1]
    _, derivative = torch.func.linearize(fast, IMAGES)
    for _ in range(2):
        assert_close([derivative(tangent)], [expected])


def test_forward_mode(model):
    fast = swinfast.optimize(model)
    tangent = random_images(2, 3, 64, 64, seed=2, dtype=torch.float64)
    results = [torch.func.jvp(either, (IMAGES,), (tangent,))[1] for either in (model, fast)]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(IMAGES, tangent)
        results.append(torch.autograd.forward_ad.unpack_dual(fast(dual)).tangent)
    assert_close(results[1:], results[:1] * 2)


def test_under_autocast(timm):
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args())).eval()

    def gradient(either, enabled):
        images = IMAGES.to(next(either.parameters()).dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = either(images)
        return torch.autograd.grad(output.double().square().sum(), images)[0].double()

    exact = gradient(copy.deepcopy(model).double(), enabled=False)
    plain, got = (gradient(either, enabled=True) for either in (model, swinfast.optimize(model)))
    assert 1e-3 * exact.norm() < (got - exact).norm() <= 1.5 * (plain - exact).norm()


def test_gradient_checkpointing(model):
    fast = swinfast.optimize(model)
    expected = gradients(model)
    fast.set_grad_checkpointing(True)
    assert_close(gradients(fast), expected)


def test_training_an_optimised_model(model):
    """A few steps in training mode with evaluations between, as in a training loop."""
    results = []
    for either in (model, swinfast.optimize(model)):
        torch.manual_seed(0)
        optimiser = torch.optim.SGD(either.parameters(), lr=1e-4)
        losses = []
        for _ in range(3):
            loss = nn.functional.cross_entropy(either.train()(IMAGES), torch.tensor([1, 2]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                losses.append(either.eval()(IMAGES))
        results.append(torch.stack(losses))
    assert torch.allclose(*results, rtol=1e-7)
