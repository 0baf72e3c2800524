"""Classify image files: find them, decode them in threads beside the model, and give each its top classes."""

import glob
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .adapters import DTYPES
from .optimize import optimize
from .preprocess import transform_of


@dataclass(frozen=True)
class Prediction:
    """The top classes of an image, most probable first."""

    filename: str
    indices: tuple[int, ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why."""

    filename: str
    reason: str


class Predictor:
    """An optimised classifier with what it needs around it.

    Args:
        model: A classifier with a ``pretrained_cfg``, plain or optimised; it is left as it is.
        device: "auto" for a GPU where there is one, or a torch device.
        dtype: To compute in; None for the model's.
        batch_size: Images at a time.
        topk: Classes for each image, at most as many as the model has.
        labels: A name for each class; by default the model's own ``label_names``, ImageNet's for 1000 classes, or the
            class numbers.
        backend: As ``swinfast.optimize`` takes it.

    Raises:
        ValueError: An argument is out of range, or the model is no classifier.
        RuntimeError: The device is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        topk: int = 5,
        labels: Sequence[str] | None = None,
        backend: str = "auto",
    ):
        for name, value in (("batch_size", batch_size), ("topk", topk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
        classes = getattr(model, "num_classes", 0)
        if classes < 1:
            raise ValueError(f"model must be a classifier, {type(model).__name__} has num_classes={classes}")
        self.transform = transform_of(model)
        self.labels = _labels(model, classes) if labels is None else tuple(labels)
        if len(self.labels) != classes:
            raise ValueError(f"labels must name each of the {classes} classes, got {len(self.labels)} names")
        self.device = resolve_device(device)
        self.topk = min(topk, classes)
        self.batch_size = batch_size
        self.model = optimize(model, backend=backend).to(self.device, dtype).eval()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and class indices of the top classes, [B, topk] each, for prepared images [B, C, H, W]."""
        with torch.inference_mode():
            logits = self.model(images.to(self.device, non_blocking=True))
            top = logits.float().softmax(dim=-1).topk(self.topk, dim=-1)
        return top.values.cpu(), top.indices.cpu()

    def predict(self, files: Iterable[str | Path]) -> Iterator[Prediction | Failure]:
        """One result for each file, in order; unreadable files give a Failure. Memory does not grow with the files."""
        with ThreadPoolExecutor(thread_name_prefix="decode") as pool:
            try:
                for batch in _batches(pool, self._load, files, self.batch_size):
                    yield from self._classify(batch)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, file: str | Path) -> Tensor | Failure:
        try:
            return self.transform.load(file)
        except Exception as error:  # damaged files make Pillow's decoders raise nearly any type
            return Failure(str(file), f"{type(error).__name__}: {error}")

    def _classify(self, batch: list[tuple[str, Tensor | Failure]]) -> Iterator[Prediction | Failure]:
        images = [item for _, item in batch if isinstance(item, Tensor)]
        if images:
            probabilities, indices = (top.tolist() for top in self(torch.stack(images)))
            rows = zip(probabilities, indices, strict=True)
        for name, item in batch:
            if isinstance(item, Failure):
                yield item
            else:
                values, classes = next(rows)
                yield Prediction(name, tuple(classes), tuple(self.labels[c] for c in classes), tuple(values))


def find_images(paths: Iterable[str | Path]) -> list[str]:
    """The files meant by files, folders (searched recursively) and glob patterns, each sorted by name.

    A path that is nothing of these stays in the list, so that reading it says what is wrong.
    """
    found = []
    for path in map(str, paths):
        if Path(path).is_dir():
            found += sorted(str(file) for file in Path(path).rglob("*") if _is_image(file))
        elif not Path(path).exists() and glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute ones)
            found += [match for match in matches if Path(match).is_file()] or [path]
        else:
            found.append(path)
    return found


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device for "auto" or a device's name; RuntimeError where this machine does not have it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RuntimeError(f"device {str(device)!r} is not available here: {str(error).splitlines()[0]}") from error
    return device


@lru_cache(maxsize=1)
def imagenet_labels() -> tuple[str, ...]:
    """Names of the 1000 classes of ImageNet-1k (ILSVRC 2012), in the order of models trained on it.

    They are the lemmas of the classes' WordNet synsets.
    """
    text = (resources.files(__package__) / "imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _labels(model: nn.Module, classes: int) -> tuple[str, ...]:
    names = tuple((getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ())
    if len(names) == classes:
        return names
    if classes == 1000:
        return imagenet_labels()
    return tuple(map(str, range(classes)))


def _is_image(file: Path) -> bool:
    image_format = Image.registered_extensions().get(file.suffix.lower())
    readable = image_format in Image.OPEN or image_format == "MPO"  # PDF is only written; MPO is opened as JPEG
    return readable and file.is_file()


def _batches(
    pool: ThreadPoolExecutor, load, files: Iterable[str | Path], size: int
) -> Iterator[list[tuple[str, object]]]:
    """(name, load(file)) in lists of size, with one more list being loaded ahead."""
    waiting: deque[tuple[str, Future]] = deque()
    files = iter(files)
    while True:
        while len(waiting) < 2 * size and (file := next(files, None)) is not None:
            waiting.append((str(file), pool.submit(load, file)))
        if not waiting:
            return
        ready = [waiting.popleft() for _ in range(min(size, len(waiting)))]
        yield [(name, future.result()) for name, future in ready]
