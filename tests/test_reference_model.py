"""The variants of both families and the published size of the model, against timm."""

import pytest
import torch
from helpers import random_images, randomise, relative_rms, small_model_args
from swinfast.reference import SwinTransformerV2Cr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import swinfast
from swinfast.variants import VARIANTS

CONFIG_KEYS = ("input_size", "mean", "std", "crop_pct", "interpolation", "num_classes", "hf_hub_id")
OTHER_CONFIG_KEYS = ("architecture", "tag", "fixed_input_size", "pool_size", "crop_mode", "first_conv", "classifier")
MATRIX_OPERATORS = ("convolution", "addmm", "mm", "bmm", "baddbmm")


def shapes(model) -> list[tuple]:
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def test_names_are_timms(timm):
    assert swinfast.list_models() == sorted(timm.list_models("swinv2_*"))
    assert swinfast.list_models(pretrained=True) == sorted(timm.list_models("swinv2_*", pretrained=True))
    assert len(swinfast.list_models()) == 16 + 12


def test_list_models_filters():
    tiny = ["swinv2_cr_tiny_224", "swinv2_cr_tiny_384", "swinv2_cr_tiny_ns_224"]
    assert swinfast.list_models("*cr_tiny*") == tiny
    assert swinfast.list_models("*cr_tiny*", pretrained=True) == ["swinv2_cr_tiny_ns_224.sw_in1k"]
    assert swinfast.list_models("resnet*") == []


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_has_timms_parameters(timm, name):
    ours, theirs = (make(name, device="meta") for make in (swinfast.create_model, timm.create_model))
    assert shapes(ours) == shapes(theirs)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    windows, their_windows = (
        [(block.window_size, block.shift_size) for stage in getattr(model, ours.stages_name) for block in stage.blocks]
        for model in (ours, theirs)
    )
    assert windows == their_windows


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_has_timms_data_config(timm, name):
    ours, theirs = (make(name, device="meta") for make in (swinfast.create_model, timm.create_model))
    for key in CONFIG_KEYS + OTHER_CONFIG_KEYS:
        assert ours.pretrained_cfg[key] == theirs.pretrained_cfg.get(key), key
    assert ours.default_cfg is ours.pretrained_cfg


def test_meta_device_context():
    with torch.device("meta"):
        model = swinfast.create_model("swinv2_cr_giant_384")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.empty(1, 3, 384, 384, device="meta")).shape == (1, 1000)


def test_fresh_blocks_are_the_identity():
    """As in timm: norm gains of zero, so that a fresh model is its embedding, merging and last norm."""
    model = SwinTransformerV2Cr(**small_model_args()).eval()
    x = random_images(1, 8, 8, 16)
    assert torch.equal(model.stages[0].blocks[1](x), x)


def test_tiny_gives_timms_answers(timm):
    theirs = randomise(timm.create_model("swinv2_cr_tiny_ns_224")).eval()
    ours = randomise(swinfast.create_model("swinv2_cr_tiny_ns_224")).eval()
    x = random_images(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_features(x)
        features = ours.forward_features(x)
        assert relative_rms(features, expected) <= 2e-6
        assert relative_rms(ours.forward_head(features), theirs.forward_head(expected)) <= 2e-6
        assert torch.equal(ours(x), ours.forward_head(features))


def test_state_dicts_go_both_ways(timm):
    theirs, ours = (make("swinv2_cr_tiny_224", device="meta") for make in (timm.create_model, swinfast.create_model))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    ours.load_state_dict(theirs.state_dict(), assign=True)


class MatrixOutputs(TorchDispatchMode):
    """Counts the output elements of convolutions and matrix products, of the position bias's MLP too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        if operator.overloadpacket.__name__ in MATRIX_OPERATORS:
            self.count += output.numel()
        return output


def test_published_size():
    """timm's model card: 28.3 M parameters, 4.7 GMACs, 28.5 M activations.

    MACs are those of convolutions and matrix products; activations are their outputs, as the card's counter takes
    them.
    """
    model = swinfast.create_model("swinv2_cr_tiny_ns_224", device="meta").eval()
    x = torch.empty(1, 3, 224, 224, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, MatrixOutputs() as activations:
        model(x)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 28.3
    assert flops.get_total_flops() / 2e9 == pytest.approx(4.7, abs=0.07)
    assert activations.count / 1e6 == pytest.approx(28.45, abs=0.01)


def test_size_is_timms(timm):
    totals = []
    for make in (swinfast.create_model, timm.create_model):
        model = make("swinv2_cr_small_ns_256", device="meta").eval()
        with torch.no_grad(), FlopCounterMode(display=False) as flops, MatrixOutputs() as activations:
            model(torch.empty(2, 3, 256, 256, device="meta"))
        totals.append((flops.get_total_flops(), activations.count))
    assert totals[0] == totals[1]


def test_float64(twins):
    ours, theirs = twins(**small_model_args(dtype=torch.float64))
    x = random_images(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        output = ours(x)
        assert output.dtype == torch.float64
        assert relative_rms(output, theirs(x)) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(twins, dtype):
    """The error against float64 is that of timm in the same dtype, about."""
    ours, theirs = (model.to(dtype) for model in twins(**small_model_args()))
    x = random_images(2, 3, 64, 64).to(dtype)
    with torch.no_grad():
        output, expected = ours(x), theirs(x)
        exact = theirs.double()(x.double())
    assert output.dtype == dtype
    assert relative_rms(output, exact) <= 2 * relative_rms(expected, exact)


@pytest.mark.parametrize("args", [{}, {"dynamic_img_size": True}, {"img_size": 60}], ids=["plain", "dynamic", "padded"])
def test_empty_batch(args):
    model = randomise(SwinTransformerV2Cr(**small_model_args(**args))).eval()
    size = model.img_size
    with torch.no_grad():
        assert model(torch.empty(0, 3, *size)).shape == (0, 10)
        assert model.forward_features(torch.empty(0, 3, *size)).shape[:2] == (0, 32)


def test_memory_format_does_not_matter():
    model = randomise(SwinTransformerV2Cr(**small_model_args())).eval()
    x = random_images(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_rms(model(x.contiguous(memory_format=torch.channels_last)), model(x)) <= 1e-6


def test_gradients_are_timms(twins):
    ours, theirs = twins(**small_model_args(img_size=40, window_size=4, dtype=torch.float64))
    x = random_images(2, 3, 40, 40, dtype=torch.float64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-11, msg=name)
