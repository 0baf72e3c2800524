"""Weights change, models are moved, copied and saved: the next answer is right, and what is derived is made once."""

import copy
import io
import pickle
import threading
import weakref

import pytest
import torch
from helpers import random_images, randomise, relative_rms, small_model_args
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import swinfast
from swinfast.fused import Fused

IMAGES = random_images(2, 3, 64, 64, dtype=torch.float64)


def make(timm, **overrides):
    """A float64 model: in it, answers are the same or visibly not."""
    return randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args(**overrides))).double().eval()


def assert_same(fast, model, images=IMAGES):
    with torch.no_grad():
        assert relative_rms(fast(images), model(images)) <= 1e-9


def edit_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def edit_one(name):
    def edit(model):
        with torch.no_grad():
            parameter = model.get_parameter(name)
            parameter[: (len(parameter) + 1) // 2].add_(0.3)  # of one half: a norm would not see it on all

    edit.__name__ = name
    return edit


def edit_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def edit_behind_the_counter(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    if isinstance(model, Fused):
        swinfast.refresh(model)


def load(model):
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()})


def load_assigned(model):
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()}, assign=True)


def replace_a_parameter(model):
    block = model.stages[1].blocks[1]
    block.attn.logit_scale = nn.Parameter(block.attn.logit_scale.detach() + 0.5)


def replace_a_layer(model):
    block = model.stages[0].blocks[1]
    torch.manual_seed(3)
    block.mlp.fc1 = nn.Linear(16, 64, dtype=torch.float64)


def replace_a_block(model):
    model.stages[0].blocks[1] = copy.deepcopy(model.stages[0].blocks[0])


def set_image_size(model):
    model.set_input_size((64, 64), window_size=(8, 4))


def set_one_blocks_window(model):
    model.stages[0].blocks[1].set_input_size((32, 32), (8, 8))


def set_eps(model):
    model.stages[1].blocks[0].norm1.eps = 0.1


def set_approximation(model):
    for block in model.stages[1].blocks:
        block.mlp.act.approximate = "tanh"


def step(model):
    """A fused optimiser edits past PyTorch's counters."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2, fused=True)
    model(IMAGES).square().mean().backward()
    optimiser.step()


EDITS = [
    edit_in_place,
    edit_one("patch_embed.proj.weight"),
    edit_one("patch_embed.norm.bias"),
    edit_one("stages.0.blocks.1.attn.qkv.bias"),
    edit_one("stages.0.blocks.1.attn.meta_mlp.fc1.bias"),
    edit_one("stages.1.blocks.0.attn.logit_scale"),
    edit_one("stages.1.downsample.reduction.weight"),
    edit_one("stages.1.blocks.1.norm3.weight"),
    edit_data,
    edit_behind_the_counter,
    load,
    load_assigned,
    replace_a_parameter,
    replace_a_layer,
    replace_a_block,
    set_image_size,
    set_one_blocks_window,
    set_eps,
    set_approximation,
    step,
]


@pytest.mark.parametrize("warm", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits_are_seen(timm, edit, warm):
    model = make(timm)
    fast = swinfast.optimize(model)
    with torch.no_grad():
        before = fast(IMAGES) if warm else model(IMAGES)
    edit(model)
    edit(fast)
    assert_same(fast, model)
    with torch.no_grad():
        assert relative_rms(fast(IMAGES), before) > 1e-6


@pytest.mark.parametrize("source", ["timm", "reference"])
def test_the_size_of_images_can_be_set(timm, source):
    model = randomise((timm if source == "timm" else swinfast).create_model("swinv2_cr_tiny_224", **small_model_args()))
    model = model.double().eval()
    fast = swinfast.optimize(model)
    assert_same(fast, model)
    for either in (model, fast):
        either.set_input_size(96)
    assert_same(fast, model, random_images(2, 3, 96, 96, dtype=torch.float64))
    for either in (model, fast):
        with pytest.raises(AssertionError, match=r"height \(64\) doesn't match model \(96\)"):
            either(IMAGES)
    fast.patch_embed.strict_img_size = model.patch_embed.strict_img_size = False
    for either in (model, fast):
        either.stages[0].set_input_size((32, 32), (4, 4))
        either.stages[1].set_input_size((32, 32), (4, 4))
    assert_same(fast, model)


def test_slices_of_the_stages(timm):
    """As prune_intermediate_layers takes them."""
    model = make(timm)
    fast = swinfast.optimize(model)
    assert not fast.stages[:1].training
    with torch.no_grad():
        assert (
            relative_rms(fast.stages[:1](fast.patch_embed(IMAGES)), model.stages[:1](model.patch_embed(IMAGES))) <= 1e-9
        )
    for either in (model, fast):
        either.prune_intermediate_layers([0])
        either.eval()
    assert_same(fast.forward_features, model.forward_features)
    assert [row.replaced for row in swinfast.report(fast).rows] == [True] * 3
    swinfast.refresh(fast)
    assert_same(fast.float().double().forward_features, model.float().double().forward_features)


def test_mean_and_std_outlive_another_pass(timm):
    model = make(timm)
    fast = swinfast.optimize(model, mean=[0.1, 0.2, 0.3], std=[0.9, 0.8, 0.7])
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_rms(swinfast.optimize(fast)(pixels), fast(pixels)) <= 1e-12
        assert relative_rms(swinfast.optimize(model)(pixels), fast(pixels)) > 1e-3


def test_the_original_is_untouched(timm):
    model = make(timm)
    classes = [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    fast = swinfast.optimize(model, dtype=torch.float32)
    with torch.no_grad():
        fast(IMAGES)
    edit_in_place(fast)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_inplace_is_the_model_itself(timm):
    model = make(timm)
    with torch.no_grad():
        expected = model(IMAGES)
    assert swinfast.optimize(model, inplace=True) is model
    assert swinfast.report(model).rows
    with torch.no_grad():
        assert relative_rms(model(IMAGES), expected) <= 1e-9


def test_state_dict_keeps_its_keys_and_order(timm):
    model = make(timm)
    fast = swinfast.optimize(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    with torch.no_grad():
        fast(IMAGES)
    assert list(fast.state_dict()) == list(model.state_dict())
    model.load_state_dict(fast.state_dict())


@pytest.mark.parametrize("warm", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_conversions(timm, dtype, warm):
    model = make(timm)
    fast = swinfast.optimize(model)
    if warm:
        with torch.no_grad():
            fast(IMAGES)
    outcome = swinfast.verify(model, fast.to(dtype), IMAGES)
    assert outcome.dtype == dtype
    assert outcome.passed, outcome
    rounded = model.to(dtype).double()
    for module in rounded.modules():  # timm's coordinates stay rounded after such a round trip; fresh ones are exact
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert_same(fast.double(), rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_that_are_not_side_by_side_in_memory(timm, dtype):
    """As views of larger tensors are, which load_state_dict(assign=True) and nn.Parameter take as they are."""
    model = make(timm).to(dtype)
    fast = swinfast.optimize(model)
    with torch.no_grad():
        fast(IMAGES.to(dtype))
    apart = {name: torch.stack([one, one + 1], -1)[..., 0] for name, one in fast.state_dict().items()}
    fast.load_state_dict(apart, assign=True)
    with torch.no_grad():
        assert relative_rms(fast(IMAGES.to(dtype)), model(IMAGES.to(dtype))) <= 1e-5


def test_a_layer_without_weights_yet(timm):
    """Its shape comes with the first input, to the original."""
    model = make(timm)
    fast = swinfast.optimize(model)
    mlp = fast.stages[0].blocks[0].mlp
    mlp.fc1 = nn.LazyLinear(mlp.fc1.out_features, dtype=torch.float64)
    with torch.no_grad():
        first = fast(IMAGES)
        model.stages[0].blocks[0].mlp.fc1 = copy.deepcopy(mlp.fc1)
    assert first.isfinite().all()
    assert_same(fast, model)


def test_another_weight_in_the_same_place(timm):
    """As where a layer goes to another dtype and back: the same parameter, not counted, and often the same address."""
    model = make(timm).float()
    fast = swinfast.optimize(model)
    weights = [either.stages[1].blocks[0].mlp.fc1.weight for either in (model, fast)]
    values = [weight.detach().numpy().copy() for weight in weights]
    for factor in (1.0, 1.5):
        for weight, value in zip(weights, values, strict=True):
            weight.data = torch.empty(0)
            value[::2] *= factor
            weight.data = torch.from_numpy(value)
        with torch.no_grad():
            assert relative_rms(fast(IMAGES.float()), model(IMAGES.float())) <= 1e-5


@pytest.mark.parametrize("part", [lambda stage: stage, lambda stage: stage.blocks], ids=["stages", "blocks"])
def test_what_is_cast_in_parts_is_freed(timm, part):
    """Nothing keeps the weights that were, also before the next call."""
    fast = swinfast.optimize(make(timm).requires_grad_(False))
    fast(IMAGES)
    places = [StorageWeakRef(weight.untyped_storage()) for stage in fast.stages for weight in part(stage).parameters()]
    for stage in fast.stages:
        part(stage).float()
    assert all(place.expired() for place in places)


def test_going_where_it_is_already(timm):
    """What was derived stays, and what is moved leaves nothing behind."""
    fast = swinfast.optimize(make(timm))
    with torch.no_grad():
        fast(IMAGES)
    parts = [fast.patch_embed, fast.stages, *fast.stages]
    plans = [part._swinfast.plan for part in parts]
    assert None not in plans
    fast.to("cpu").to(torch.float64).double()
    assert [part._swinfast.plan for part in parts] == plans
    derived = weakref.ref(plans.pop())
    del plans
    fast.float()
    assert [part._swinfast.plan for part in parts] == [None] * len(parts)
    assert derived() is None


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("warm", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, through_pickle, through_save], ids=lambda f: f.__name__)
def test_copies(timm, copy_of, warm):
    model = make(timm)
    fast = swinfast.optimize(model)
    if warm:
        with torch.no_grad():
            fast(IMAGES)
    other = copy_of(fast)
    assert all(row.replaced for row in swinfast.report(other).rows)
    assert_same(other, model)
    if copy_of is not copy.copy:
        edit_in_place(fast)  # of the first: the copy must not share anything with it
        assert_same(other, model)
    assert type(other.stages[0]) is type(fast.stages[0])


def test_surgery_on_a_shallow_copy(timm):
    """It shares what it was copied from, and no plan: what it computes with may be others' by then."""
    model = make(timm)
    fast, other = swinfast.optimize(model), randomise(copy.deepcopy(model), seed=1)
    stages = []
    with torch.no_grad():
        x = model.stages[0](model.patch_embed(IMAGES))
        for either in (model, fast):
            either.stages[1](x)
            stage = copy.copy(either.stages[1])
            stage._modules = dict(stage._modules) | {"blocks": other.stages[1].blocks}
            stages.append(stage)
        assert relative_rms(stages[1](x), stages[0](x)) <= 1e-9


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle], ids=lambda f: f.__name__)
def test_copies_of_a_compiled_submodule(timm, copy_of):
    """Module.compile binds what it compiles to the module: a copy computes with its own weights."""
    fast = swinfast.optimize(make(timm))
    fast.stages[0].compile(backend="eager")
    fast.patch_embed.compile(backend="eager")
    other = copy_of(fast)
    edit_in_place(other)
    with torch.no_grad():
        expected = swinfast.optimize(make(timm))
        edit_in_place(expected)
        assert relative_rms(other(IMAGES), expected(IMAGES)) <= 1e-9
        assert relative_rms(fast(IMAGES), expected(IMAGES)) > 1e-3


def test_new_modules_of_replaced_classes(timm):
    """As type(part)(...) makes them."""
    model = make(timm)
    fast = swinfast.optimize(model)
    for either in (model, fast):
        embed = either.patch_embed
        new = type(embed)(64, 2, 3, 16, nn.LayerNorm)
        new.load_state_dict(embed.state_dict())
        either.patch_embed = new.to(torch.float64).eval()
        either.stages = type(either.stages)(*either.stages).eval()
    assert_same(fast, model)
    with torch.no_grad():
        x = model.patch_embed(IMAGES)
        assert relative_rms(fast.stages(input=x), model.stages(input=x)) <= 1e-9


def test_a_pickle_holds_no_derived_tensors(timm):
    fast = swinfast.optimize(make(timm))
    cold = len(pickle.dumps(fast))
    with torch.no_grad():
        fast(IMAGES)
    assert len(pickle.dumps(fast)) == cold


def test_reset_classifier_and_new_image_size(timm):
    model = make(timm)
    fast = swinfast.optimize(model)
    with torch.no_grad():
        fast(IMAGES)
    images = random_images(2, 3, 96, 64, dtype=torch.float64)
    for either in (model, fast):
        either.reset_classifier(4)
        randomise(either.head)
        either.set_input_size((96, 64))
    assert_same(fast, model, images)
    with pytest.raises(AssertionError, match="Input image height"):
        fast(IMAGES)


def test_optimizing_twice(timm):
    model = make(timm)
    once = swinfast.optimize(model)
    twice = swinfast.optimize(once)
    assert type(twice.stages[0]) is type(once.stages[0])
    assert_same(twice, model)
    edit_in_place(twice)
    assert_same(once, model)


def test_models_made_under_inference_mode(timm):
    """Inference tensors count no edits, so nothing of them may be remembered."""
    with torch.inference_mode():
        model = make(timm)
        fast = swinfast.optimize(model)
        assert relative_rms(fast(IMAGES), model(IMAGES)) <= 1e-9
        edit_in_place(model)
        edit_in_place(fast)
        assert relative_rms(fast(IMAGES), model(IMAGES)) <= 1e-9


def test_inference_mode_then_training(timm):
    """What was derived under inference mode must not get into a graph."""
    model = make(timm)
    fast = swinfast.optimize(model)
    with torch.inference_mode():
        fast(IMAGES)
    for training in (False, True):
        gradients = []
        for either in (model, fast):
            images = IMAGES.clone().requires_grad_()
            torch.manual_seed(0)  # of the dropout in training mode
            either.train(training)(images).square().sum().backward()
            gradients.append(images.grad)
        assert relative_rms(gradients[1], gradients[0]) <= 1e-9


def test_replicas_of_data_parallel_run_the_original(timm):
    """They hold no parameters to derive anything from."""
    fast = swinfast.optimize(make(timm))
    for module in (fast.patch_embed, fast.stages, fast.stages[0]):
        assert type(module._replicate_for_data_parallel()) is module.original


def test_several_threads(timm):
    model = make(timm)
    fast = swinfast.optimize(model)
    batches = [random_images(1, 3, 64, 64, seed=seed, dtype=torch.float64) for seed in range(8)]
    outputs = {}

    def work(index):
        with torch.no_grad():
            for _ in range(5):
                outputs[index] = fast(batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for index, batch in enumerate(batches):
            assert relative_rms(outputs[index], model(batch)) <= 1e-9


class CountCalls(TorchDispatchMode):
    """Counts aten operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overrides", [{}, {"img_size": 60, "window_size": 7}], ids=["whole windows", "padded"])
def test_the_second_forward_derives_nothing(timm, overrides):
    model = make(timm, **overrides).float()
    fast = swinfast.optimize(model)
    images = random_images(2, 3, model.img_size[0], model.img_size[1])
    counts = []
    with torch.no_grad():
        for _ in range(3):
            with CountCalls() as counter:
                fast(images)
            counts.append(counter.calls)
        with CountCalls() as plain:
            model(images)
    assert plain.calls["relu"] == 4  # the bias MLP of each block
    assert plain.calls["roll"] == 4
    assert counts[0]["relu"] == 4
    for second in counts[1:]:
        for derived in (
            "relu",
            "roll",
            "log",
            "arange",
            "meshgrid",
            "sign",
            "exp",
            "clamp",
            "stack",
            "conv2d",
        ):
            assert derived not in second, derived
        assert "_reorder_linear_weight" not in second
    edit_one("stages.0.blocks.1.attn.meta_mlp.fc1.bias")(fast)
    with torch.no_grad(), CountCalls() as counter:
        fast(images)
    assert counter.calls["relu"] == 2  # only the stage whose weights changed
