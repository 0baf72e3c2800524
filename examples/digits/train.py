"""Train the small Swin Transformer V2 CR that ships in this folder: three minutes on one CPU core.

    python examples/digits/train.py             # train, then write and score config.json, model.safetensors, images/
    python examples/digits/train.py --evaluate  # score what is there

Everything is seeded: on one machine, with one version of PyTorch, every run writes the same files. The data comes with
scikit-learn (see README.md), so nothing is downloaded.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import swinfast

HERE = Path(__file__).parent
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEED = 0
HELD_OUT_SHARE = 0.25
IMAGES_PER_LABEL = 2  # written to images/
PICTURE_SIZE = 64  # unlike the model's size, so that preparing a picture has something to resize
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARMUP_SHARE = 0.1

ARCHITECTURE = "swinv2_cr_tiny_224"
# Maps of 12x12 and 6x6 tokens: larger than the window, so that both stages shift theirs, and the second one pads.
MODEL_ARGS: dict[str, Any] = {
    "img_size": 24,
    "patch_size": 2,
    "embed_dim": 48,
    "depths": (2, 2),
    "num_heads": (3, 6),
    "window_size": 4,
}
PRETRAINED_CFG: dict[str, Any] = {
    "tag": "digits",
    "input_size": (3, 24, 24),
    "fixed_input_size": True,
    "crop_pct": 1.0,  # digits reach to the border
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": (0.31, 0.31, 0.31),  # of the training pictures, rounded
    "std": (0.35, 0.35, 0.35),
    "num_classes": len(LABELS),
    "pool_size": (6, 6),
    "first_conv": "patch_embed.proj",
    "classifier": "head.fc",
}


class Digits(NamedTuple):
    """Some of the data set: 8x8 images [N, 8, 8] with values 0 to 16, their labels, and their places in the whole."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save and score, or only score."""
    parser = argparse.ArgumentParser(description="Train or score the digits model.")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=HERE, metavar="FOLDER", help="default: this script's folder")
    parser.add_argument("--evaluate", action="store_true", help="only score the model in the output folder")
    options = parser.parse_args(arguments)
    if not options.evaluate:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)  # sums depend on the number; so small a model gains little from more
        save(train(options.epochs), options.output)
        save_pictures(options.output / "images")
    correct, total = evaluate(swinfast.create_model(str(options.output)))
    print(f"held-out accuracy: {correct}/{total} = {correct / total:.1%}")


def split() -> tuple[Digits, Digits]:
    """The training and the held-out digits: always the same, with the same share of each label."""
    data = load_digits()
    parts = train_test_split(
        np.arange(len(data.target)), test_size=HELD_OUT_SHARE, stratify=data.target, random_state=SEED
    )
    return tuple(Digits(data.images[part], data.target[part], part) for part in parts)


def picture(digit: np.ndarray) -> Image.Image:
    """An 8x8 digit as an image file would hold it: grey, 8 bit, and large enough to look at."""
    pixels = np.round(digit * (255 / 16)).astype(np.uint8)
    return Image.fromarray(pixels).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)


def prepare(model: nn.Module, digits: Digits) -> tuple[Tensor, Tensor]:
    """Inputs [N, 3, H, W], prepared as ``swinfast predict`` prepares image files, and labels [N]."""
    transform = swinfast.transform_of(model)
    inputs = torch.stack([transform(picture(digit)) for digit in digits.images])
    return inputs, torch.from_numpy(digits.labels)


def train(epochs: int) -> nn.Module:
    """A model trained on the training digits."""
    torch.manual_seed(SEED)
    model = swinfast.create_model(ARCHITECTURE, num_classes=len(LABELS), **MODEL_ARGS)
    model.pretrained_cfg = PRETRAINED_CFG
    inputs, labels = prepare(model, split()[0])
    black = swinfast.transform_of(model)(Image.new("L", (PICTURE_SIZE, PICTURE_SIZE)))

    steps = epochs * math.ceil(len(labels) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            images = augment(inputs[batch] - black) + black
            loss = F.cross_entropy(model(images), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.3f}", flush=True)
    return model


def learning_rate_factor(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine down to zero."""
    warmup = WARMUP_SHARE * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def augment(images: Tensor) -> Tensor:
    """Each image rotated, scaled, slanted and moved a little at random; what comes in from outside is 0."""

    def random(limit: float) -> Tensor:
        return (2 * torch.rand(len(images)) - 1) * limit

    angle, slant = random(0.2), random(0.15)
    width, height = 1 + random(0.12), 1 + random(0.12)
    across = torch.stack([width * angle.cos(), slant - angle.sin(), random(0.15)], dim=1)
    down = torch.stack([angle.sin(), height * angle.cos(), random(0.15)], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def save(model: nn.Module, folder: Path) -> None:
    """Write the model as swinfast.create_model(folder) reads it, and timm as "local-dir:folder"."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(LABELS),
        "num_features": model.num_features,
        "global_pool": "avg",
        "label_names": LABELS,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": PRETRAINED_CFG,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = safetensors.torch.save(model.state_dict(), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)  # save_file would leave it readable to its owner alone


def save_pictures(folder: Path) -> None:
    """Write the first few held-out digits of each label as "three_0649.png": label, place in the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, digit in pictured(split()[1]):
        picture(digit).save(folder / name)


def pictured(digits: Digits) -> Iterator[tuple[str, np.ndarray]]:
    """File name and image of those digits that are written as files."""
    for label, name in enumerate(LABELS):
        for position in np.flatnonzero(digits.labels == label)[:IMAGES_PER_LABEL]:
            yield f"{name}_{digits.indices[position]:04d}.png", digits.images[position]


def evaluate(model: nn.Module) -> tuple[int, int]:
    """How many of the held-out digits a model gets right, and how many there are."""
    inputs, labels = prepare(model, split()[1])
    return int((classify(model, inputs) == labels).sum()), len(labels)


def classify(model: nn.Module, inputs: Tensor) -> Tensor:
    """The most probable class of each prepared input, [N]."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(dim=1) for batch in inputs.split(64)])


if __name__ == "__main__":
    main()
