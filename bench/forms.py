"""Which composition of a block is the fastest, by the measured times of the kernels that each is made of."""

from collections.abc import Sequence

import torch
from swinfast.kernels.configs import at_most
from swinfast.kernels.launch import record
from swinfast.kernels.shapes import PRECISIONS
from swinfast.kernels.stages import forms_of
from torch import nn

from bench.candidates import FEW, SIXTEEN_BITS
from bench.cases import FORMS, cases_of, choose_forms, model_named, tf32_setting
from bench.config_tables import Row

GAIN = 0.02  # that a measured choice must win by


def precisions_of(precision: str) -> list[str]:
    """The precisions whose rows a measurement in one of them decides."""
    return list(SIXTEEN_BITS) if precision in SIXTEEN_BITS else [precision]


def source_of(about: dict[str, str], models: str, precision: str, numbers: str) -> str:
    """What a row says of where it came from."""
    versions = f"torch {about['torch']}, triton {about['triton']}"
    return f"{about['source']} on {about['device']}, {versions}, {models}, {precision}: {numbers}"


def form_rows(
    models: Sequence[str], batch: int, precision: str, arch: str, us: dict[tuple, float], about: dict[str, str]
) -> list[Row]:
    """Rows of the forms of blocks that their kernels' measured times speak for, by number of channels.

    Args:
        us: Microseconds of one call by the keys of cases.
    """
    rows = []
    for name in models:
        model = model_named(name)
        for channels, tokens, count, present in _blocks(model, batch, precision, arch):
            few = when_few(count)
            for parts in (("attention_half", "projection"), ("mlp_half", "mlp_output")):
                options = list(dict.fromkeys(tuple(forms[part] for part in parts) for forms in FORMS.values()))
                if few:  # attention_half is the same for any number of rows
                    options = [one for one in options if parts[0] == "mlp_half" or one[0] == present[parts[0]]]
                now = tuple(present[part] for part in parts)
                costs = {}
                for option in dict.fromkeys([now, *options]):
                    forms = choose_forms(dict(zip(parts, option, strict=True)), channels)
                    calls = {case.key: case.calls for case in cases_of(model, batch, precision, arch, forms)}
                    costs[option] = calls
                best, ratio = _cheapest(costs, now, us)
                if best != now:
                    numbers = f"{ratio:.3f} of the kernels' time of {' and '.join(now)}"
                    source = source_of(about, f"{name} batch {batch}", precision, numbers)
                    when = {"channels": channels, "tokens": tokens}
                    rows += [
                        {"kernel": part, "precision": precisions_of(precision), "when": when | few,
                         "blocks": {"use": use}, "source": source}
                        for part, use in zip(parts, best, strict=True) if use != present[part]
                    ]  # fmt: skip
    return list({(row["kernel"], *row["when"].values()): row for row in rows}.values())


def when_few(rows: int) -> dict[str, int]:
    """What a choice that was measured with a number of rows holds for: any number, or few, up to twice as many."""
    return {} if rows > FEW else {"rows_max": 2 * rows}


def _blocks(model: nn.Module, batch: int, precision: str, arch: str) -> list[tuple[int, int, int, dict[str, str]]]:
    """(channels, tokens of a window, rows, present forms) of each kind of block."""
    found = {}
    for block in (block for stage in model.stages for block in stage.blocks):
        channels, window = block.norm1.normalized_shape[0], tuple(block.window_size)
        rows = at_most(batch * block.feat_size[0] * block.feat_size[1])
        with record(arch), tf32_setting(precision):
            forms = forms_of(channels, window, PRECISIONS[precision], torch.device("meta"), rows)
        found[channels, window[0] * window[1], rows] = forms._asdict()
    return [(*sizes, forms) for sizes, forms in found.items()]


def _cheapest(costs: dict[tuple, dict], now: tuple, us: dict[tuple, float]) -> tuple[tuple, float]:
    """The option whose own kernels take the least time, and its share of the present one's; now unless it is beaten."""
    best, ratio = now, 1.0
    for option, calls in costs.items():
        mine = {key: n - costs[now].get(key, 0) for key, n in calls.items() if n > costs[now].get(key, 0)}
        theirs = {key: n - calls.get(key, 0) for key, n in costs[now].items() if n > calls.get(key, 0)}
        if not mine or any(key not in us for key in (*mine, *theirs)):
            continue
        share = sum(n * us[key] for key, n in mine.items()) / sum(n * us[key] for key, n in theirs.items())
        if share < min(ratio, 1 - GAIN):
            best, ratio = option, share
    return best, ratio
