"""Names of classes."""

import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path

from torch import nn

LABEL_TYPES = ("name", "description", "detail")
DEFINITIONS = "data/_info/imagenet_synset_to_definition.txt"


@lru_cache(maxsize=1)
def _imagenet() -> tuple[tuple[str, str], ...]:
    """(id, lemmas) of the WordNet synset of each class of ImageNet-1k (ILSVRC 2012), in their order."""
    text = (resources.files(__package__) / "imagenet_classes.tsv").read_text(encoding="utf-8")
    return tuple(tuple(line.split("\t")) for line in text.splitlines())


@lru_cache(maxsize=1)
def _definitions() -> dict[str, str]:
    """Definitions of synsets by their id, from timm's files; timm itself is not imported."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        raise ValueError("label_type 'detail' needs timm, whose files hold the definitions: pip install timm")
    text = (Path(spec.origin).parent / DEFINITIONS).read_text(encoding="utf-8")
    return dict(line.split("\t", 1) for line in text.splitlines())


def imagenet_labels(label_type: str = "description") -> tuple[str, ...]:
    """Names of the 1000 classes of ImageNet-1k (ILSVRC 2012), in the order of models trained on it.

    Args:
        label_type: "description" for the lemmas of the classes' WordNet synsets, "name" for the synsets' ids
            (n01440764), "detail" for the lemmas and the definition, which timm must be there for.

    Raises:
        ValueError: Another label type, or no timm.
    """
    if label_type not in LABEL_TYPES:
        raise ValueError(f"label_type must be one of {', '.join(LABEL_TYPES)}, got {label_type!r}")
    if label_type == "detail":
        return tuple(f"{lemmas}: {_definitions()[synset]}" for synset, lemmas in _imagenet())
    return tuple(row[LABEL_TYPES.index(label_type)] for row in _imagenet())


def labels_of(model: nn.Module, classes: int) -> tuple[str, ...]:
    """The model's own ``label_names``, ImageNet's for 1000 classes, or else the class numbers.

    Names may come by class number, as timm has them where some are missing; JSON makes strings of the numbers.
    """
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    if isinstance(names, Mapping):
        names = [names.get(number, names.get(str(number), number)) for number in range(classes)]
    names = tuple(map(str, names))
    if len(names) == classes:
        return names
    return imagenet_labels() if classes == 1000 else tuple(map(str, range(classes)))
