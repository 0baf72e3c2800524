"""Make a model by name: the reference model with the weights and data configuration that belong to it."""

import fnmatch
import inspect
import json
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from . import reference
from .arguments import LARGEST
from .checkpoints import adapt_first_convolution, load_checkpoint, load_state, read_checkpoint
from .errors import in_a_line
from .reference import FeatureListNet, SwinTransformerV2, SwinTransformerV2Cr
from .variants import VARIANTS, data_config

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names for create_model, sorted.

    Args:
        filter: A wildcard pattern, such as "*tiny*".
        pretrained: Only those with published weights, with their tag.
    """
    names = [
        f"{name}.{tag}" if pretrained else name
        for name, (_, _, _, tag, _) in VARIANTS.items()
        if not pretrained or tag != "untrained"
    ]
    return sorted(name for name in names if fnmatch.fnmatch(name, filter or "*"))


def is_folder(name: str | Path) -> bool:
    """Whether a model's name is that of a folder that create_model makes it of, weights and all."""
    return Path(name, CONFIG_FILE).is_file()


def create_model(
    name: str | Path, pretrained: bool = False, checkpoint_path: str | Path = "", **overrides: Any
) -> SwinTransformerV2Cr | SwinTransformerV2 | FeatureListNet:
    """A Swin Transformer V2 model of plain PyTorch, in training mode as timm's are: call .eval() on it.

    Args:
        name: One of list_models(), with or without a tag ("swinv2_cr_tiny_ns_224.sw_in1k"), or a folder that holds a
            config.json and a model.safetensors, whose weights are then loaded, pretrained or not.
        pretrained: Download the published weights from the Hugging Face hub (extra "hub"). A classifier of another
            num_classes starts untrained, and the first convolution is adapted to other in_chans.
        checkpoint_path: Load this file; with num_classes=0 or features_only its classifier is left out.
        **overrides: Arguments of SwinTransformerV2Cr, or SwinTransformerV2 for names without "cr", and
            features_only=True with out_indices for a model that returns a list of feature maps, [B, C, H, W] in the
            former family and [B, H, W, C] in the latter, as timm's.

    Returns:
        The model; its ``pretrained_cfg`` is the data configuration.

    Raises:
        ValueError: An unknown name or tag.
        TypeError: An unknown override, or a name that is none.
        CheckpointError: The weights can't be read or don't fit.
        RuntimeError: There are no published weights, or they can't be downloaded.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be a string or a path, one of list_models() or a folder, got {name!r}")
    folder = Path(name)
    from_folder = is_folder(folder)
    if from_folder:
        architecture, arguments, config = _read_folder(folder)
        pretrained, checkpoint_path = False, checkpoint_path or folder / WEIGHTS_FILE
    else:
        architecture, config = _look_up(str(name))
        arguments = {}
    variant = VARIANTS[architecture]
    made_for = {"img_size": config["input_size"][1:], "num_classes": config["num_classes"]}
    arguments = variant.arguments | made_for | arguments | overrides
    features_only = arguments.pop("features_only", False)
    out_indices = arguments.pop("out_indices", None)
    if out_indices is not None and not features_only:
        raise TypeError("out_indices needs features_only=True")
    if pretrained and checkpoint_path:
        raise ValueError(f"pretrained=True and checkpoint_path={str(checkpoint_path)!r} are two sources of weights")

    try:
        model = getattr(reference, variant.model)(**arguments)
    except Exception as error:  # numbers that make no model raise nearly any type
        if not from_folder or overrides:
            raise
        raise ValueError(f"{folder / CONFIG_FILE} has model_args that make no model: {error}") from error
    keep_classifier = model.num_classes > 0 and not features_only
    if pretrained:
        _load_pretrained(model, config)
    elif checkpoint_path:
        if not keep_classifier:
            model.head.fc = nn.Identity()  # nothing of the file's classifier is wanted, so nothing of it must fit
        load_checkpoint(model, checkpoint_path, with_classifier=keep_classifier)
    if features_only:
        model = FeatureListNet(model, len(model.all_stages()) if out_indices is None else out_indices)
    model.pretrained_cfg = model.default_cfg = config
    return model


def _look_up(name: str) -> tuple[str, dict[str, Any]]:
    architecture, _, tag = name.partition(".")
    if architecture not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise ValueError(f"unknown model {name!r}: name one of {known}, or a folder with a {CONFIG_FILE}")
    config = data_config(architecture)
    if tag not in ("", config["tag"]):
        raise ValueError(f"unknown tag {tag!r}: {architecture} has {config['tag']!r}")
    return architecture, config


def _read_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, arguments and data configuration of a model folder, laid out as timm saves one for the hub."""
    file = folder / CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, str) or architecture not in VARIANTS:
        raise ValueError(f"{file} has architecture {architecture!r}, expected one of {', '.join(VARIANTS)}")
    pretrained_cfg, model_args = content.get("pretrained_cfg", {}), content.get("model_args", {})
    for key, value in (("pretrained_cfg", pretrained_cfg), ("model_args", model_args)):
        if not isinstance(value, dict):
            raise ValueError(f"{file} has {key} {value!r}, expected an object")
    model_args = {
        key: value for key, value in model_args.items() if key not in NO_DIFFERENCE and (key, value) != OUR_ACTIVATION
    }
    known = inspect.signature(getattr(reference, VARIANTS[architecture].model)).parameters
    unknown = model_args.keys() - known.keys()
    if unknown:
        raise ValueError(f"{file} has unknown model_args: {', '.join(sorted(unknown))}")
    config = data_config(architecture) | {"tag": None, "hf_hub_id": None} | pretrained_cfg
    config |= {key: content[key] for key in ("num_classes", "label_names") if key in content}
    _check_entries(file, config)
    _check_entries(file, model_args)
    config |= {key: tuple(config[key]) for key in ("input_size", "mean", "std")}
    arguments = {"num_classes": config["num_classes"], "in_chans": config["input_size"][0]}
    if "global_pool" in config:
        arguments["global_pool"] = config["global_pool"]
    return architecture, arguments | model_args, config


def _check_entries(file: Path, entries: Mapping[str, Any]) -> None:
    """ValueError for an entry that is not what it will be taken for."""
    for key, (expected, is_right) in ENTRIES.items():
        if key in entries and not is_right(entries[key]):
            raise ValueError(f"{file} has {key} {reprlib.repr(entries[key])}, expected {expected}")


def _is(kind: Any, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    return not isinstance(value, NUMBER) or abs(value) <= LARGEST


def _is_list(kind: Any, value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is(kind, one) for one in value)


NO_DIFFERENCE = (  # between answers in eval mode is made by these arguments of timm's
    "attn_drop_rate", "drop_path_rate", "drop_rate", "proj_drop_rate", "sequential_attn", "weight_init",
)  # fmt: skip
OUR_ACTIVATION = ("act_layer", "gelu")
NUMBER = int | float
ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "input_size": ("a list of three whole numbers", lambda value: _is_list(int, value) and len(value) == 3),
    "mean": ("a list of numbers", lambda value: _is_list(NUMBER, value)),
    "std": ("a list of numbers", lambda value: _is_list(NUMBER, value)),
    "crop_pct": ("a number above 0", lambda value: _is(NUMBER, value) and value > 0),
    "interpolation": ("a string", lambda value: _is(str, value)),
    "global_pool": ("a string", lambda value: _is(str, value)),
    "num_classes": ("a whole number of at least 0", lambda value: _is(int, value) and value >= 0),
    "label_names": ("a list of strings", lambda value: value is None or _is(dict, value) or _is_list(str, value)),
}


def _load_pretrained(model: SwinTransformerV2Cr | SwinTransformerV2, config: dict[str, Any]) -> None:
    """Load the published weights, fitted to another number of classes or channels where the model has one."""
    path = _download(config)
    state = read_checkpoint(path)
    fresh = model.state_dict()
    if model.num_classes != config["num_classes"]:
        state = {key: value for key, value in state.items() if not key.startswith("head.fc.")}
        state |= {key: value for key, value in fresh.items() if key.startswith("head.fc.")}
    first = config["first_conv"] + ".weight"
    if first in state:
        state[first] = adapt_first_convolution(state[first], model.in_chans)
    load_state(model, state, str(path))


def _download(config: dict[str, Any]) -> Path:
    name = f"{config['architecture']}.{config['tag']}"
    if not config["hf_hub_id"]:
        raise RuntimeError(f"no pretrained weights are published for {config['architecture']}: use checkpoint_path")
    try:
        import huggingface_hub
    except ImportError as error:
        raise RuntimeError(
            f"pretrained=True needs huggingface_hub to download {name}: pip install 'swinfast[hub]', "
            "or download the weights elsewhere and name the file as checkpoint_path (--checkpoint on the command line)"
        ) from error
    try:
        return Path(huggingface_hub.hf_hub_download(config["hf_hub_id"], WEIGHTS_FILE))
    except Exception as error:  # the hub's client raises its own types, those of its HTTP library, and OSError
        raise RuntimeError(
            f"the weights of {name} can't be downloaded from the Hugging Face hub ({in_a_line(error)}): download them "
            "where there is a network and name the file as checkpoint_path (--checkpoint on the command line)"
        ) from error
