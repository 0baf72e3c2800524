"""Checkpoints: read a file, whatever it is, into a state_dict; load it whole or not at all."""

import argparse
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

# Where training scripts put the weights; the averaged ones first, as timm takes them.
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")
MERGING_AT_THE_END = "layers.0.downsample.reduction.weight"
LAST_IN_STAGE = re.compile(r"^layers\.(\d+)\.downsample\.")
_LOADING = threading.Lock()


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read, or that does not fit the model. The model is as it was."""


def load_checkpoint(model: nn.Module, path: str | Path, *, with_classifier: bool = True) -> None:
    """Load a checkpoint into a Swin Transformer V2 model.

    Takes safetensors and PyTorch files (read with weights_only=True), state_dicts nested under ``model`` or
    ``state_dict``, old ones with ``tau`` and ``head.`` keys, and those of the paper's authors.

    Args:
        model: The model; on an error it is left as it was.
        path: The file.
        with_classifier: Load the classifier; without it the file's ``head.fc`` is left out.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file can't be read, its keys or shapes differ from the model's, or it holds other numbers
            than floating-point ones.
    """
    state = read_checkpoint(path)
    if not with_classifier:
        state = {key: value for key, value in state.items() if not key.startswith("head.fc.")}
    load_state(model, state, str(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """model.load_state_dict(state), with one error for all that does not fit, and before anything is changed."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    kinds = [
        f"{key} is {_kind_of(state[key])}"
        for key in expected
        if key in state and _kind_of(state[key]) not in ("", str(expected[key].dtype))
    ]
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes, "no plain numbers": kinds}
    if any(found.values()):
        lists = "".join(f"\n  {name} ({len(keys)}): {', '.join(keys)}" for name, keys in found.items() if keys)
        raise CheckpointError(f"{source} does not fit {type(model).__name__}:{lists}")
    on_meta = any(value.is_meta for value in expected.values())  # there is nothing to copy into
    model.load_state_dict(state, assign=on_meta)


def _kind_of(value: Tensor) -> str:
    """What a tensor is whose values are no floating-point numbers in memory, "" for one whose are."""
    if value.layout != torch.strided:
        return str(value.layout)
    if value.is_meta:
        return "without values, on meta"
    return "" if value.is_floating_point() else str(value.dtype)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a file, under today's names.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file holds no state_dict that can be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    return modern_names(_unwrap(content, path))


def _is_safetensors(path: Path) -> bool:
    """By content, since names lie: eight bytes of header length, then JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[4:8] == b"\0\0\0\0")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        with _with_namespaces():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no PyTorch checkpoint of plain tensors: it is something else, damaged, or holds Python "
            "objects, which are not loaded because loading them can run code"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise nearly any type: IndexError, struct.error, …
        raise CheckpointError(f"{path} can't be read as a PyTorch checkpoint: {error}") from error


@contextmanager
def _with_namespaces() -> Iterator[None]:
    """Let checkpoints hold the arguments that timm's training keeps. What is let in is so for the whole process."""
    with _LOADING:
        if argparse.Namespace in torch.serialization.get_safe_globals():  # by the program, which goes on to need it
            yield
            return
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict inside a training checkpoint, without the prefixes of wrappers."""
    seen = set()  # a file may hold what holds itself
    while isinstance(content, Mapping) and id(content) not in seen:
        seen.add(id(content))
        nest = next((name for name in NESTS if isinstance(content.get(name), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state_dict, but a {type(content).__name__}")
    foreign = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if foreign:
        raise CheckpointError(f"{path} holds no state_dict: these entries are no tensors: {', '.join(foreign[:8])}")
    state = dict(content)
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Old checkpoints to today's: ``tau`` to logit_scale = log(1 / tau), ``head.`` to ``head.fc.``.

    And those of the paper's authors: without what a model computes from its sizes, and with patch merging at the begin
    of the next stage in place of the end of one.
    """
    state = {key: value for key, value in state.items() if key.rpartition(".")[2] not in COMPUTED}
    if MERGING_AT_THE_END in state:
        state = {LAST_IN_STAGE.sub(lambda at: f"layers.{int(at[1]) + 1}.downsample.", k): v for k, v in state.items()}
    if "head.fc.weight" in state:
        return state
    modern = {}
    for key, value in state.items():
        if key.rpartition(".")[2] == "tau" and not _kind_of(value):
            key, value = key.removesuffix("tau") + "logit_scale", torch.log(1 / value)
        if key.startswith("head."):
            key = "head.fc." + key.removeprefix("head.")
        modern[key] = value
    return modern


def adapt_first_convolution(weight: Tensor, in_chans: int) -> Tensor:
    """RGB weights [C, 3, h, w] for other channels: summed for one, else repeated and scaled to keep the size."""
    if weight.shape[1] == in_chans:
        return weight
    if in_chans == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.repeat(1, -(-in_chans // weight.shape[1]), 1, 1)[:, :in_chans]
    return repeated * (weight.shape[1] / in_chans)
