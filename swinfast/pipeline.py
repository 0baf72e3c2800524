"""What Predictor, Embedder and FeatureExtractor share: a model, how images are prepared for it, where it computes."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import parts_of
from .arguments import whole_number
from .batch import engine
from .batch.compute import Arrays, Compute, find_batch_size
from .batch.decode import usable_cores
from .batch.engine import Division, Done
from .batch.formats import Layout
from .batch.run import Summary, write
from .batch.share import Listener
from .batch.sources import Images, Item
from .calls import is_transformed
from .fused import FusedPatchEmbed
from .modules import DTYPES, HOOKS, class_of, foreign_methods, is_hooked, methods
from .optimize import optimize
from .pixels import Crop
from .preprocess import transform_of
from .torch_backend import normalise
from .watch import WATCHED

MOST_WORKERS = 32  # started without being asked for


class Pipeline:
    """An optimised model with what it needs around it. See Predictor, Embedder and FeatureExtractor.

    Args:
        model: A model with a ``pretrained_cfg``, plain or optimised; it is left as it is.
        device: "auto" for a GPU where there is one (under torchrun, that of LOCAL_RANK), or a torch device.
        dtype: To compute in; None for the model's.
        batch_size: Images at a time; "auto" to find a good number by trying some.
        backend: As ``swinfast.optimize`` takes it.
        workers: Processes that decode images; 0 to decode in threads of this one, None for one less than there are
            cores (at least 1, at most 32).
        threads: On a CPU, batches computed at a time, each in a thread; 0 for one, in the caller's thread.
        draft: Let libjpeg decode large images at a fraction of their size: faster, and with other pixels.

    Raises:
        ValueError: An argument is out of range, or the model can't do what is asked.
        RuntimeError: The device is not there.
    """

    what = ""  # in manifests
    endings: tuple[str, ...] = ()  # of outputs

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        batch_size: int | str = 32,
        backend: str = "auto",
        workers: int | None = None,
        threads: int = 0,
        draft: bool = False,
    ):
        self.found_batch_size = isinstance(batch_size, str) and batch_size == "auto"
        if not self.found_batch_size:
            batch_size = whole_number("batch_size", batch_size, 1, "a whole number or auto")
        default_workers = min(MOST_WORKERS, max(1, usable_cores() - 1))
        self.workers = default_workers if workers is None else whole_number("workers", workers, 0)
        self.threads = whole_number("threads", threads, 0)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
        self._check(model)
        self.transform = transform_of(model)
        self.crop = crop_of(model, draft)
        self.device = resolve_device(device)
        self.say = _warn  # takes messages for people
        self._shapes = None
        mean, std = self.transform.mean, self.transform.std
        self.model = optimize(model, backend=backend, mean=mean, std=std).to(self.device, dtype).eval()
        self.batch_size = self._find_batch_size() if self.found_batch_size else batch_size

    def write(
        self,
        images: Images | str | Path | Iterable[str | Path],
        output: str | Path,
        *,
        resume: bool = False,
        strict: bool = False,
        part_size: int | None = None,
        devices: Sequence[str] = (),
        watch: Listener | None = None,
    ) -> Summary:
        """Write the results of any number of images to a file, in finished parts that survive whatever happens.

        Args:
            images: Files, folders, patterns, tar shards, parquet files, or Images for more choices.
            output: The file; its ending says the format. Beside it come OUTPUT.manifest.json, and .errors.csv where
                images failed: they could not be read, or what the model made of them is not finite.
            resume: Go on where an earlier run with the same inputs, settings and model ended; start where there is
                none, and do nothing where it is finished.
            strict: Stop at the first image that fails.
            part_size: Images after which results are safe, rounded up to whole batches; None for 1024, or fewer where
                these would take more than 256 MiB.
            devices: Compute on all of these, in a process for each, instead of this object's device.
            watch: Called after every batch with its names and, for each, None or the reason of a failure.

        Under torchrun (RANK and WORLD_SIZE) every process has to call this with the same arguments; each does its
        share, rank 0 writes the output, and all return once it is there.

        Raises:
            ValueError: A wrong ending; or results of something else are there to resume, or processes that share the
                work find different inputs (ResumeError).
            StrictError: An image failed, and strict.
            OSError: The output can't be written; what is finished stays.
            TypeError: images is something else than paths.
        """
        return write(self, as_images(images), Path(output), resume, strict, part_size, devices, watch)

    @property
    def layout(self) -> Layout:
        """What the rows of outputs hold."""
        raise NotImplementedError

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape of a row and dtype of each output."""
        if self._shapes is None:
            self._probe()
        return self._shapes

    def no_rows(self) -> Arrays:
        """Arrays of no images, as outputs have them."""
        return {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in self.shapes.items()}

    @staticmethod
    def check_device(device: str) -> None:
        """ValueError for what is no device, RuntimeError for one that is not there."""
        resolve_device(device)

    def move(self, device: str) -> None:
        """Compute on another device from now on."""
        self.device = resolve_device(device)
        self.model.to(self.device)

    def compute(self) -> Compute:
        """What computes batches for one run."""
        self._probe()  # derives everything before threads would do it at the same time
        return Compute(self._outputs, self.device, self.threads, self.say)

    def compute_pixels(self, pixels: Tensor) -> Arrays:
        """Outputs of one batch of uint8 pixels [B, H, W, C]."""
        compute = Compute(self._outputs, self.device, 0, self.say)
        return compute.finish(compute.start(pixels))

    def settings(self) -> dict[str, Any]:
        """What results depend on, but for the inputs."""
        layout = asdict(self.layout)
        layout["labels"] = blake2b("\n".join(self.layout.labels).encode(), digest_size=16).hexdigest()
        layout["arrays"] = {name: [shape, str(dtype)] for name, (shape, dtype) in self.layout.arrays.items()}
        return {
            "what": self.what,
            "model": self._digest(),
            "transform": asdict(self.transform),
            "draft": self.crop.draft,
            "dtype": str(next(self.model.parameters()).dtype),
            "batch_size": self.batch_size,
        } | layout

    def _check(self, model: nn.Module) -> None:
        """Refuse a model that can't do it."""

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs for images [B, C, H, W] that the model takes."""
        raise NotImplementedError

    def _outputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """For uint8 pixels [B, H, W, C] on the device."""
        return self._forward(self._prepared(pixels.permute(0, 3, 1, 2)))

    def _prepared(self, images: Tensor) -> Tensor:
        """uint8 images as they are, where the patch embedding normalises them on their way; else normalised."""
        if self._takes_pixels():
            return images
        return normalise(images, (self.transform.mean, self.transform.std), next(self.model.parameters()).dtype)

    def _takes_pixels(self) -> bool:
        """Whether the model is one that does nothing with images before its patch embedding, which is replaced."""
        model, embed = self.model, self.model._modules.get("patch_embed")
        cls = class_of(model)
        if parts_of(cls) is None or not isinstance(embed, FusedPatchEmbed) or embed.plan().reason:
            return False
        patched = foreign_methods(cls) or any(name in model.__dict__ for name in methods(cls))
        patched = patched or "forward" in embed.__dict__
        return not (patched or is_hooked(model) or is_hooked(embed) or is_transformed())

    def _probe(self) -> None:
        """Compute one black image."""
        pixels = torch.zeros((1, *self.crop.shape), dtype=torch.uint8, device=self.device)
        with torch.inference_mode():
            outputs = self._outputs(pixels)
        self._shapes = {name: (tuple(out.shape[1:]), out.cpu().numpy().dtype) for name, out in outputs.items()}

    def _run(self, files: Images | str | Path | Iterable[str | Path]) -> Iterator[Done]:
        """Results batch by batch, in order."""
        items = files if isinstance(files, Images) else _items(files)
        steps = Division(sys.maxsize, self.batch_size).divide(items, wanted={0})  # one part has them all
        done = engine.run(steps, self.crop, self.compute(), self.workers)
        try:
            yield from (step for step in done if isinstance(step, Done))
        finally:
            done.close()

    def _find_batch_size(self) -> int:
        self._probe()
        return find_batch_size(self._outputs, self.crop.shape, self.device)

    def _digest(self) -> str:
        """Of the weights, of what the model is made of, and of the names of what was hung onto it."""
        digest = blake2b(digest_size=16)
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, module in self.model.named_modules():
            cls, own = class_of(module), module.__dict__
            settings = {key: own[key] for key in WATCHED if key in own}
            hooks = [[_name_of(hook) for hook in own[kind].values()] for kind in HOOKS]
            patched = {key: _name_of(own[key]) for key in methods(cls) if key in own}
            digest.update(repr((name, _name_of(cls), module.extra_repr(), settings, hooks, patched)).encode())
        return digest.hexdigest()


def _name_of(function: Any) -> str:
    """The same in every process."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def crop_of(model: nn.Module, draft: bool = False) -> Crop:
    """How images become pixels for a model."""
    return replace(transform_of(model).crop, draft=draft)


def as_images(images: Images | str | Path | Iterable[str | Path]) -> Images:
    """Images from one path or several; TypeError for something else than paths."""
    return images if isinstance(images, Images) else Images(tuple(_paths("images", images)))


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device for "auto" or a device's name.

    Raises:
        ValueError: It is no device's name.
        RuntimeError: This machine does not have it.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be "auto" or a device such as "cpu" or "cuda:1", got {device!r}') from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RuntimeError(f"device {str(device)!r} is not available here: {str(error).splitlines()[0]}") from error
    return device


def _items(files: str | Path | Iterable[str | Path]) -> Iterator[Item]:
    """The images meant by paths, each of which is looked at once it is needed."""
    for path in _paths("files", files):
        yield from Images((path,))


def _paths(name: str, paths: Any) -> Iterator[str]:
    """An argument's one path or several; TypeError for something else."""
    several = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike)
    for path in paths if several else (paths,):
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"{name} must be paths, one or several, or Images, got {type(path).__name__}")
        yield str(os.fsdecode(path))


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
