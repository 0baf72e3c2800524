"""Names of classes."""

from functools import lru_cache
from importlib import resources

from torch import nn

LABEL_TYPES = ("name", "description", "detail")


@lru_cache(maxsize=1)
def _imagenet() -> tuple[tuple[str, str, str], ...]:
    """(id, lemmas, definition) of the WordNet synset of each class of ImageNet-1k (ILSVRC 2012), in their order."""
    text = (resources.files(__package__) / "imagenet_classes.tsv").read_text(encoding="utf-8")
    return tuple(tuple(line.split("\t")) for line in text.splitlines())


def imagenet_labels(label_type: str = "description") -> tuple[str, ...]:
    """Names of the 1000 classes of ImageNet-1k (ILSVRC 2012), in the order of models trained on it.

    Args:
        label_type: "description" for the lemmas of the classes' WordNet synsets, "name" for the synsets' ids
            (n01440764), "detail" for the lemmas and the definition.
    """
    if label_type not in LABEL_TYPES:
        raise ValueError(f"label_type must be one of {', '.join(LABEL_TYPES)}, got {label_type!r}")
    detail = {"name": "{0}", "description": "{1}", "detail": "{1}: {2}"}[label_type]
    return tuple(detail.format(*row) for row in _imagenet())


def labels_of(model: nn.Module, classes: int) -> tuple[str, ...]:
    """The model's own ``label_names``, ImageNet's for 1000 classes, or else the class numbers."""
    names = tuple((getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ())
    if len(names) == classes:
        return names
    return imagenet_labels() if classes == 1000 else tuple(map(str, range(classes)))
