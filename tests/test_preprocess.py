"""Prepared images are timm's, bit for bit."""

import math
import re

import numpy as np
import pytest
import torch
from helpers import write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import swinfast
from swinfast import pixels
from swinfast.preprocess import Transform

ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # Orientation: rotate by 90 degrees to show


@pytest.fixture(scope="module")
def photos() -> dict[str, Image.Image]:
    datasets = pytest.importorskip("sklearn.datasets")
    return {name: Image.fromarray(datasets.load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}


@pytest.fixture(scope="module")
def timm_transform(timm):
    """Makes timm's evaluation transform for a model, with an image opened as timm's ImageDataset does it."""

    def make(model):
        config = timm.data.model_config.resolve_input_data_config(model)
        transform = timm.data.create_transform(**config)
        mode = {1: "L", 3: "RGB"}[config["input_size"][0]]
        return lambda image: transform(image.convert(mode))

    return make


def sixteen_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


KINDS = {
    # how to make it of a photo, file ending, how to save it
    "RGB": (lambda photo: photo, "png", {}),
    "JPEG": (lambda photo: photo, "jpg", {"quality": 80}),
    "WebP": (lambda photo: photo, "webp", {}),
    "L": (lambda photo: photo.convert("L"), "png", {}),
    "L JPEG": (lambda photo: photo.convert("L"), "jpg", {}),
    "P": (lambda photo: photo.convert("P"), "png", {}),
    "P, one transparent colour": (lambda photo: photo.convert("P"), "png", {"transparency": 3}),
    "P, an alpha for each colour": (lambda photo: photo.convert("P"), "png", {"transparency": bytes(range(256))}),
    "GIF": (lambda photo: photo, "gif", {}),
    "RGBA": (with_alpha, "png", {}),
    "LA": (lambda photo: with_alpha(photo).convert("LA"), "png", {}),
    "CMYK JPEG": (lambda photo: photo.convert("CMYK"), "jpg", {}),
    "YCbCr TIFF": (lambda photo: photo.convert("YCbCr"), "tif", {}),
    "LAB TIFF": (lambda photo: photo.convert("LAB"), "tif", {}),
    "16 bit": (sixteen_bit, "png", {}),
    "16 bit TIFF": (sixteen_bit, "tif", {}),
    "32 bit": (lambda photo: sixteen_bit(photo).convert("I"), "tif", {}),
    "float": (lambda photo: photo.convert("F"), "tif", {}),
    "1 bit": (lambda photo: photo.convert("1"), "png", {}),
    "EXIF orientation": (lambda photo: photo, "jpg", {"exif": ROTATED}),
}
SIZES = {
    "1 by 1": (1, 1),
    "smaller than the crop": (31, 47),
    "very wide": (1600, 9),
    "very high": (9, 1600),
    "one row": (300, 1),
    "just the resized size": (248, 248),
    "just the crop": (224, 224),
    "one more": (249, 250),
    "odd difference": (331, 225),
    "2 by 3": (2, 3),
}
MODELS = {
    "224, crop 0.9": ("swinv2_cr_tiny_224", {}),
    "256, crop 1": ("swinv2_cr_small_ns_256", {}),
    "384, crop 1": ("swinv2_cr_tiny_384", {}),
    "not square": ("swinv2_cr_tiny_224", {"img_size": (160, 288)}),
    "not square, crop 1": ("swinv2_cr_tiny_384", {"img_size": (288, 160)}),
    "another size": ("swinv2_cr_tiny_224", {"img_size": 72}),
    "one channel": ("swinv2_cr_tiny_224", {"in_chans": 1}),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def transforms(request, timm, timm_transform):
    name, args = request.param
    ours = swinfast.transform_of(swinfast.create_model(name, device="meta", **args))
    theirs = timm.create_model(name, device="meta", **args)
    assert swinfast.transform_of(theirs) == ours
    return ours, timm_transform(theirs)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_file_of_any_kind(tmp_path, photos, timm, timm_transform, kind):
    change, ending, options = kind
    file = tmp_path / f"image.{ending}"
    change(photos["china"]).save(file, **options)
    model = timm.create_model("swinv2_cr_tiny_ns_224", device="meta")
    got = swinfast.transform_of(model).load(file)
    with Image.open(file) as image:
        expected = timm_transform(model)(image)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert got.std() > 0.1
    assert torch.equal(got, expected)


def test_exif_orientation_is_not_applied(tmp_path, photos):
    photos["china"].save(tmp_path / "plain.jpg")
    photos["china"].save(tmp_path / "rotated.jpg", exif=ROTATED)
    transform = Transform((64, 64))
    assert torch.equal(transform.load(tmp_path / "rotated.jpg"), transform.load(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("name", ["china", "flower"])
def test_photo_for_each_model(photos, transforms, name):
    ours, theirs = transforms
    for image in (photos[name], photos[name].transpose(Image.Transpose.ROTATE_90)):
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_size_for_each_model(transforms, size):
    ours, theirs = transforms
    image = noise(*size)
    assert torch.equal(ours(image), theirs(image))


side, crop = st.integers(1, 90), st.integers(2, 90)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    image=st.tuples(side, side),
    size=st.one_of(st.tuples(crop, crop), crop.map(lambda value: (value, value))),
    crop_pct=st.sampled_from([1.7, 1.0, 0.95, 0.9, 0.875, 0.5]),
    interpolation=st.sampled_from(["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]),
)
def test_any_sizes(timm, image, size, crop_pct, interpolation):
    image = noise(*image)
    theirs = timm.data.create_transform(input_size=(3, *size), crop_pct=crop_pct, interpolation=interpolation)
    assert torch.equal(Transform(size, crop_pct, interpolation)(image), theirs(image))


def test_image_is_left_as_it_is(photos):
    image = photos["china"].convert("P")
    before = image.copy()
    Transform((32, 32))(image)
    assert image.mode == "P"
    assert image.tobytes() == before.tobytes()


def test_transform_of():
    transform = swinfast.transform_of(swinfast.create_model("swinv2_cr_tiny_384", device="meta"))
    assert transform == Transform((384, 384), 1.0, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    features = swinfast.create_model("swinv2_cr_tiny_384", features_only=True, img_size=64, device="meta")
    assert swinfast.transform_of(features).size == (64, 64)
    assert swinfast.transform_of(swinfast.optimize(features)).size == (64, 64)


def test_transform_of_timms_features(timm):
    """They know their patch embedding's size of images alone."""
    features = timm.create_model("swinv2_cr_tiny_224", features_only=True, img_size=64)
    assert not hasattr(features, "img_size")
    assert swinfast.transform_of(features).size == (64, 64)
    assert swinfast.transform_of(swinfast.optimize(features)).size == (64, 64)


@pytest.mark.parametrize("optimised", [False, True])
def test_transform_of_a_wrapper(optimised):
    """Its config is often the model's, which tells nothing of its size; what else has a size may mean another thing."""
    inside, model = nn.Identity(), swinfast.create_model("swinv2_cr_tiny_384", img_size=64)
    inside.img_size, model.img_size = 7, 7
    wrapper = nn.Sequential(inside, model)
    wrapper.pretrained_cfg = {"input_size": (3, 96, 96)}
    if optimised:
        wrapper = swinfast.optimize(wrapper)
    assert swinfast.transform_of(wrapper).size == (64, 64)


def test_mean_and_std_for_one_channel():
    transform = swinfast.transform_of(swinfast.create_model("swinv2_cr_tiny_224", in_chans=1, device="meta"))
    assert transform.mean == pytest.approx((0.449,))
    assert transform.std == pytest.approx((0.226,))
    assert transform(noise(300, 200)).shape == (1, 224, 224)


def configured(**config) -> nn.Module:
    model = nn.Identity()
    model.pretrained_cfg = config
    return model


def test_transform_of_without_details_is_timms(timm):
    """What a config leaves out has timm's defaults."""
    expected = timm.data.resolve_data_config({}, pretrained_cfg={"input_size": (3, 32, 48)})
    transform = swinfast.transform_of(configured(input_size=(3, 32, 48)))
    names = ("crop_pct", "interpolation", "mean", "std")
    assert [getattr(transform, name) for name in names] == [expected[name] for name in names]
    assert transform.size == (32, 48)
    assert swinfast.transform_of(configured(mean=(0.5,), std=[0.25])).mean == (0.5, 0.5, 0.5)


def test_transform_of_nothing_chosen_is_timms(timm):
    """None stands for timm's defaults, and so does a crop_pct of 0."""
    names = ("input_size", "crop_pct", "interpolation", "mean", "std", "crop_mode")
    for config in (dict.fromkeys(names), {"crop_pct": 0, "interpolation": "", "crop_mode": ""}):
        expected = timm.data.resolve_data_config({}, pretrained_cfg=config)
        transform = swinfast.transform_of(configured(**config))
        assert [getattr(transform, name) for name in names[1:5]] == [expected[name] for name in names[1:5]]
        assert (3, *transform.size) == expected["input_size"]


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Identity(), "Identity has no pretrained_cfg to prepare images by"),
        (configured(crop_mode="squash"), "crop_mode must be 'center', got 'squash'"),
        (configured(interpolation="random"), "interpolation must be one of Pillow's filters, got 'random'"),
        (configured(input_size=(4, 32, 32)), "image files have 1 or 3 channels, the model takes 4"),
        (configured(mean=(0.5, 0.5)), r"mean must have 3 values, got \(0\.5, 0\.5\)"),
        (configured(std=(0.5, 0.5)), r"std must have 3 values, got \(0\.5, 0\.5\)"),
        (configured(std=(0.5, 0.5, 0)), r"std must be above 0, got \(0\.5, 0\.5, 0\.0\)"),
        (configured(mean=0.5), "mean must be a sequence of numbers, one for each channel, got 0.5"),
        (configured(std="none"), "std must be a sequence of numbers, one for each channel, got 'none'"),
        (configured(interpolation=3), "interpolation must be one of Pillow's filters, got 3"),
        *[
            (configured(crop_pct=value), f"crop_pct must be a number above 0, got {value!r}")
            for value in (-0.9, "0.9", math.nan, math.inf)
        ],
        *[
            (configured(input_size=value), f"input_size must be three whole numbers, .*, got {re.escape(repr(value))}")
            for value in (224, "224", (224, 224), (3, 0, 224), (3, 22.4, 224))
        ],
    ],
    ids=lambda value: str(getattr(value, "pretrained_cfg", "")),
)
def test_errors_of_transform_of(model, message):
    with pytest.raises(ValueError, match=message):
        swinfast.transform_of(model)


def test_padding_is_black():
    """A crop larger than the resized image, which only crop_pct above 1 gives."""
    transform = Transform((64, 64), crop_pct=2.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = transform(Image.new("RGB", (32, 32), "white"))
    assert pixels.sum().item() == math.prod((3, 32, 32))
    assert pixels[:, 16:48, 16:48].min() == 1


@pytest.mark.parametrize(
    "size, transform, part",
    [
        ((500, 375), Transform((224, 224)), (224, 224)),
        ((40, 3000), Transform((224, 224)), (224, 224)),
        ((3000, 60), Transform((224, 224)), (224, 224)),
        ((224, 5000), Transform((224, 224)), (224, 224)),
        ((1, 2000), Transform((32, 64), crop_pct=1.3), (49, 32)),
        ((2000, 1), Transform((32, 64), crop_pct=1.3), (64, 24)),
        ((3, 900), Transform((32, 32), crop_pct=2.0), (16, 32)),
    ],
    ids=["photo", "40 by 3000", "3000 by 60", "224 by 5000", "1 by 2000", "2000 by 1", "3 by 900"],
)
def test_strips_are_resized_in_part(size, transform, part, monkeypatch):
    """What a strip would grow to beyond the crop is never computed; the crop is the same but for rounding.

    With a crop_pct above 1 the strip is narrower than the crop. The contrast is low, so that nothing overshoots: Pillow
    clips between its two passes, whose order may differ here.
    """
    noise_of_few = np.random.default_rng(0).integers(100, 156, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise_of_few)
    whole = np.asarray(transform.crop(image), dtype=int)
    monkeypatch.setattr(pixels, "LARGEST_RESIZED", 0)
    resize, resized = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, to, *a, **k: resized.append(to) or resize(self, to, *a, **k)
    )
    difference = np.abs(np.asarray(transform.crop(image), dtype=int) - whole)
    assert difference.max() <= 2
    assert difference.mean() < 0.25
    if size != (500, 375):
        assert resized == [part]


def test_a_file_that_is_open(tmp_path):
    path = write_image(tmp_path / "image.png")
    transform = Transform((16, 16))
    with path.open("rb") as file:
        assert torch.equal(transform.load(file), transform.load(path))
