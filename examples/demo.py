"""swinfast in one screen: classify real images, check the answers, time the model. `make demo` runs it."""

from pathlib import Path

import torch
from tabulate import tabulate

import swinfast
from swinfast.batch.sources import find_images
from swinfast.benchmark import compare, describe_device, randomise
from swinfast.pipeline import resolve_device

DIGITS = Path(__file__).parent / "digits"
TIMED = "swinv2_cr_tiny_ns_224"


def main() -> None:
    device = resolve_device("auto")
    print(f"swinfast {swinfast.__version__}, PyTorch {torch.__version__}, {describe_device(device)}\n")
    classify(device)
    verify(device)
    time_models(device)


def classify(device: torch.device) -> None:
    """The shipped model on held-out images; the first word of a file's name is what it shows."""
    predictor = swinfast.Predictor(swinfast.create_model(str(DIGITS)), device=device, topk=2)
    results = list(predictor.predict(find_images([DIGITS / "images"])))
    right = [Path(result.filename).name.split("_")[0] == result.labels[0] for result in results]
    rows = [
        (Path(r.filename).name, *(f"{label} {p:.1%}" for label, p in zip(r.labels, r.probabilities, strict=True)))
        for r in results[:6]
    ]
    print(tabulate(rows, headers=("held-out image", "top 1", "top 2")))
    print(f"… {sum(right)} of {len(results)} held-out images right.\n")


def verify(device: torch.device) -> None:
    """The optimised model against the plain one: trained weights on digits, then a full-size model."""
    digits = swinfast.create_model(str(DIGITS)).eval().to(device)
    transform = swinfast.transform_of(digits)
    images = torch.stack([transform.load(file) for file in find_images([DIGITS / "images"])]).to(device)
    print("digits:", swinfast.verify(digits, swinfast.optimize(digits), images))
    model = randomise(swinfast.create_model(TIMED)).eval().to(device)
    print(f"{TIMED}:", swinfast.verify(model, swinfast.optimize(model), torch.randn(2, 3, 224, 224, device=device)))


def time_models(device: torch.device) -> None:
    """Plain and optimised in turn, in one run."""
    model = randomise(swinfast.create_model(TIMED)).eval().to(device)
    fast = swinfast.optimize(model)
    rows = []
    for batch in (1, 8):
        images = torch.randn(batch, 3, 224, 224, device=device)
        both = {"plain": lambda x=images: model(x), "fast": lambda x=images: fast(x)}
        timings = compare(both, rounds=5, device=device)
        plain, optimised = batch / timings["plain"].median, batch / timings["fast"].median
        rows.append((batch, f"{plain:.1f}", f"{optimised:.1f}", f"{optimised / plain:.2f}×"))
    print(f"\n{TIMED} in float32, images/s:")
    print(tabulate(rows, headers=("batch", "plain PyTorch", "swinfast", "speed-up"), disable_numparse=True))


if __name__ == "__main__":
    main()
