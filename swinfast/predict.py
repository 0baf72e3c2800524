"""Images through a model: Predictor for classes, Embedder for embeddings, FeatureExtractor for feature maps."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapted, parts_of
from .arguments import whole_number
from .batch.compute import Arrays
from .batch.formats import ARRAYS, PREDICTIONS, Layout
from .batch.sources import Images
from .labels import labels_of
from .modules import class_of
from .pipeline import Pipeline

STORED = ("float32", "float16")
HANDS_OUT = (  # models for features that hand out their stages' maps as they are
    ("timm.models._features", "FeatureListNet"),
    ("timm.models._features", "FeatureHookNet"),
    ("swinfast.reference.features", "FeatureListNet"),
)


@dataclass(frozen=True)
class Prediction:
    """The top classes of an image, most probable first."""

    filename: str
    indices: tuple[int, ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Features:
    """Arrays of an image by name: "embedding" [C], or "stage_0", "stage_1", … [C, H, W]."""

    filename: str
    arrays: Arrays


@dataclass(frozen=True)
class Failure:
    """An image that has no result, and why: it could not be read, or what the model made of it is not finite."""

    filename: str
    reason: str


class Predictor(Pipeline):
    """Classifies images.

    Args:
        model, **options: As of Pipeline; the model must be a classifier.
        topk: Classes for each image, at most as many as the model has.
        labels: A name for each class; by default the model's own ``label_names``, ImageNet's for 1000 classes, or the
            class numbers.
        include_index: Whether files of results have the class numbers beside the labels.
        fullname: Whether files of results name images with their folders.
    """

    what = "predictions"
    endings = PREDICTIONS

    def __init__(
        self,
        model: nn.Module,
        *,
        topk: int = 5,
        labels: Sequence[str] | None = None,
        include_index: bool = True,
        fullname: bool = True,
        **options: Any,
    ):
        topk = whole_number("topk", topk, 1)
        self._check(model)
        classes = model.num_classes
        self.labels = labels_of(model, classes) if labels is None else _names("labels", labels)
        if len(self.labels) != classes:
            raise ValueError(f"labels must name each of the {classes} classes, got {len(self.labels)} names")
        self.topk = min(topk, classes)
        self.include_index = include_index
        self.fullname = fullname
        super().__init__(model, **options)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and class indices of the top classes, [B, topk] each, for prepared images [B, C, H, W]."""
        with torch.inference_mode():
            top = self._forward(images.to(self.device, non_blocking=True))
        return top["prob"].cpu(), top["index"].cpu()

    def predict(self, files: Images | str | Path | Iterable[str | Path]) -> Iterator[Prediction | Failure]:
        """One result for each image, in order; one without a result gives a Failure. Files are as write's images.

        They are taken as they are needed, and memory does not grow with them.
        """
        for done in self._run(files):
            rows = zip(*(done.arrays[key].tolist() for key in ("index", "prob")), strict=True) if done.arrays else None
            for name, reason in zip(done.names, done.reasons, strict=True):
                if reason is not None:
                    yield Failure(name, reason)
                else:
                    classes, probabilities = next(rows)
                    yield Prediction(name, tuple(classes), tuple(self.labels[c] for c in classes), tuple(probabilities))

    @property
    def layout(self) -> Layout:
        return Layout(self.labels, self.topk, self.include_index, self.fullname)

    def _check(self, model: nn.Module) -> None:
        classes = getattr(model, "num_classes", 0)
        if classes < 1:
            raise ValueError(f"model must be a classifier, {type(model).__name__} has num_classes={classes}")

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        top = self.model(images).float().softmax(dim=-1).topk(self.topk, dim=-1)
        return {"index": top.indices, "prob": top.values}


class _ArrayPipeline(Pipeline):
    """Results that are arrays.

    Args:
        model, **options: As of Pipeline.
        stored: "float32", or "float16" for half the space.
    """

    endings = ARRAYS

    def __init__(self, model: nn.Module, *, stored: str = "float32", **options: Any):
        if stored not in STORED:
            raise ValueError(f"stored must be one of {', '.join(STORED)}, got {stored!r}")
        self._stored = getattr(torch, stored)
        super().__init__(model, **options)

    @property
    def layout(self) -> Layout:
        return Layout(arrays=self.shapes)

    def extract(self, files: Images | str | Path | Iterable[str | Path]) -> Iterator[Features | Failure]:
        """One result for each image, as of Predictor.predict."""
        for done in self._run(files):
            row = 0
            for name, reason in zip(done.names, done.reasons, strict=True):
                if reason is not None:
                    yield Failure(name, reason)
                else:
                    yield Features(name, {key: array[row] for key, array in done.arrays.items()})
                    row += 1


class Embedder(_ArrayPipeline):
    """Pooled embeddings of images: the array "embedding", [num_features] for each. Arguments as of _ArrayPipeline."""

    what = "embeddings"

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings [B, num_features] of prepared images [B, C, H, W]."""
        with torch.inference_mode():
            return self._forward(images.to(self.device, non_blocking=True))["embedding"].cpu()

    def _check(self, model: nn.Module) -> None:
        if not hasattr(model, "forward_head"):
            raise ValueError(f"model must have forward_features and forward_head, {type(model).__name__} has none")

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return {"embedding": pooled.to(self._stored)}


class FeatureExtractor(_ArrayPipeline):
    """Feature maps of stages of a model: arrays "stage_0", "stage_1", …, [C, H, W] for each image.

    Args:
        model, **options: As of Pipeline; a whole model, or one with features_only=True, which names its stages itself.
        stages: Their numbers, negative ones from the end; None for all.
        stored: "float32", or "float16" for half the space.
    """

    what = "features"

    def __init__(self, model: nn.Module, *, stages: Sequence[int] | None = None, **options: Any):
        self._check(model)
        self._whole = hasattr(model, "forward_intermediates")
        self.stages = _stages(model, stages, self._whole)
        cls = type(model)
        as_they_are = (cls.__module__, cls.__qualname__) in HANDS_OUT
        self._channels_first = not as_they_are or all(adapter.channels_first for _, adapter in adapted(model))
        super().__init__(model, **options)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps [B, C, H, W] by name, of prepared images [B, C, H, W]."""
        with torch.inference_mode():
            maps = self._forward(images.to(self.device, non_blocking=True))
        return {name: value.cpu() for name, value in maps.items()}

    def _check(self, model: nn.Module) -> None:
        if not hasattr(model, "forward_intermediates") and not hasattr(model, "feature_info"):
            raise ValueError(
                f"model must have forward_intermediates or features_only=True, {type(model).__name__} has neither"
            )

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        if self._whole:
            options = {"indices": list(self.stages), "stop_early": True, "intermediates_only": True}
            maps = self.model.forward_intermediates(images, **options)
        else:
            maps = self.model(images)
            if not self._channels_first:
                maps = [value.permute(0, 3, 1, 2) for value in maps]
        stored = (value.to(self._stored).contiguous() for value in maps)
        return {f"stage_{stage}": value for stage, value in zip(self.stages, stored, strict=True)}


def _names(argument: str, names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"{argument} must be several strings, got {names!r}")
    names = tuple(names)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{argument} must be strings, got {name!r}")
    return names


def _stages(model: nn.Module, stages: Sequence[int] | None, whole: bool) -> tuple[int, ...]:
    """Numbers of the stages that are meant, in order."""
    if not whole:
        if stages is not None:
            raise ValueError(f"stages must be None for a model that has chosen its own, got {stages!r}")
        return tuple(int(name.rpartition(".")[2]) for name in model.feature_info.module_name())
    parts = parts_of(class_of(model))
    count = len(model.feature_info if parts is None else model._modules[parts[1]])
    if stages is None:
        return tuple(range(count))
    try:
        stages = [operator.index(stage) for stage in stages]
    except TypeError as error:
        raise ValueError(f"stages must be whole numbers or None, got {stages!r}") from error
    numbers = sorted({stage % count for stage in stages if -count <= stage < count})
    if len(numbers) != len(stages) or not numbers:
        raise ValueError(f"stages must be different numbers from {-count} to {count - 1}, got {list(stages)}")
    return tuple(numbers)
