"""Which composition of a block is the fastest, by the measured times of the kernels that each is made of."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from swinfast.kernels.configs import MANY, at_most
from swinfast.kernels.launch import record
from swinfast.kernels.shapes import PRECISIONS
from swinfast.kernels.stages import AFTER, BOTH_LAYOUTS, forms_of
from swinfast.kernels.windows import LARGEST_TILE
from torch import nn

from bench.candidates import FEW, SIXTEEN_BITS
from bench.cases import FORMS, IN_A_TILE, IN_PARTS, cases_of, choose_forms, model_named, stay_in_cache, tf32_setting
from bench.config_tables import Row

GAIN = 0.02  # that a measured choice must win by
HALVES = (("attention_half", "projection"), ("mlp_half", "mlp_output"))  # which form each is of, and what comes last

Option = tuple[str, str]


class Kind(NamedTuple):
    """The blocks of a model that have sizes in common."""

    channels: int
    tokens: int  # of a window
    rows: int
    few: bool  # what is chosen is to hold for up to about so many rows, not for any number
    present: dict[str, str]  # their forms by part
    many: str  # attention_half for many rows


def precisions_of(precision: str) -> list[str]:
    """The precisions whose rows a measurement in one of them decides."""
    return list(SIXTEEN_BITS) if precision in SIXTEEN_BITS else [precision]


def source_of(about: dict[str, str], models: str, precision: str, numbers: str) -> str:
    """What a row says of where it came from."""
    versions = f"torch {about['torch']}, triton {about['triton']}"
    return f"{about['source']} on {about['device']}, {versions}, {models}, {precision}: {numbers}"


def when_few(rows: int, few: bool) -> dict[str, int]:
    """What a choice that was measured with a number of rows holds for: any number; where they are few, up to as many.

    So what was measured for one number is never hidden by what was for another, and between two the larger counts.
    """
    return {"rows_max": rows} if few else {}


def kinds_of(model: nn.Module, batch: int, precision: str, arch: str, few: bool | None = None) -> list[Kind]:
    """All kinds of blocks that a model has; few: as in Kind, None for what their rows say."""
    found = {}
    for block in (block for stage in model.all_stages() for block in stage.blocks):
        channels, window = block.norm1.normalized_shape[0], tuple(block.window_size)
        rows = at_most(batch * block.feat_size[0] * block.feat_size[1])
        with record(arch), tf32_setting(precision):
            present, many = (
                forms_of(channels, window, PRECISIONS[precision], torch.device("meta"), number)
                for number in (rows, MANY)
            )
        sizes = channels, window[0] * window[1], rows
        found[sizes] = Kind(*sizes, rows <= FEW if few is None else few, present._asdict(), many.attention_half)
    return list(found.values())


def options_of(kind: Kind, parts: Option) -> list[Option]:
    """What can compute one of HALVES, what does at present first.

    Where rows are few, attention must take the table of position biases as it is laid out for many.
    """
    half, last = parts
    found = [(kind.present[half], kind.present[last])]
    for form in dict.fromkeys(forms[half] for forms in FORMS.values()):
        if form in IN_A_TILE and kind.tokens > LARGEST_TILE:
            continue
        if form in IN_PARTS and not (kind.few and stay_in_cache(kind.channels, kind.rows)):
            continue
        if half == "attention_half" and kind.few and form not in (kind.many, *BOTH_LAYOUTS):
            continue
        ends = [kind.present[last]] if form in AFTER else dict.fromkeys(forms[last] for forms in FORMS.values())
        found += [(form, end) for end in ends]
    return list(dict.fromkeys(found))


def named(option: Option) -> str:
    """What computes a half of a block, without a choice that it does not use."""
    return " and ".join(option[:1] if option[0] in AFTER else option)


def rows_of(kind: Kind, parts: Option, best: Option, precision: str, source: str) -> list[Row]:
    """Rows that choose an option where it is not chosen at present."""
    when = {"channels": kind.channels, "tokens": kind.tokens} | when_few(kind.rows, kind.few)
    return [
        {"kernel": part, "precision": precisions_of(precision), "when": when, "blocks": {"use": use}, "source": source}
        for part, use in zip(parts, best, strict=True)
        if use != kind.present[part]
    ]


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
        for kind in kinds_of(model, batch, precision, arch):
            for parts in HALVES:
                now, *others = options_of(kind, parts)
                # the norm after parts takes longer the more of them there are: those are for whole forwards to judge
                others = [option for option in others if option[0] not in IN_PARTS]
                costs = {}
                for option in (now, *others):
                    forms = choose_forms(dict(zip(parts, option, strict=True)), kind.channels)
                    costs[option] = {case.key: case.calls for case in cases_of(model, batch, precision, arch, forms)}
                best, ratio = _cheapest(costs, now, us)
                if best != now:
                    numbers = f"{ratio:.3f} of the kernels' time of {named(now)}"
                    source = source_of(about, f"{name} batch {batch}", precision, numbers)
                    rows += rows_of(kind, parts, best, precision, source)
    return list({(row["kernel"], *row["when"].values()): row for row in rows}.values())


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
