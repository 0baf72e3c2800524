"""The tables of configurations as files: putting measured rows before predicted ones, and writing them."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from swinfast.kernels.configs import forget, matches

FORMS = ("attention_half", "projection", "mlp_half", "mlp_output")
ANY = {"stream_bytes": (2, 4), "gelu": (0, 1), "in_parts": (0, 1), "held": (0, 1)}  # sizes that have few values
FAR = (1, 10**9)  # beyond what any row names

Row = dict


def merge(rows: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """Rows with measured ones put first among those of their kernel that hold for as many rows of activations.

    The fewer a row holds for, the earlier it comes. Rows that nothing reaches any more are dropped.
    """
    merged = list(rows)
    for row in reversed(measured):
        same = [index for index, other in enumerate(merged) if other["kernel"] == row["kernel"]]
        ordered = sorted((merged[index] for index in same), key=most_rows)
        for index, other in zip(same, ordered, strict=True):
            merged[index] = other
        before = sum(most_rows(other) < most_rows(row) for other in ordered)
        first = same[0] if same else (0 if row["kernel"] in FORMS else len(merged))
        merged.insert(same[before - 1] + 1 if before else first, row)
    return _reachable(merged)


def most_rows(row: Row) -> float:
    """The most rows of activations that a row of a table holds for."""
    return row.get("when", {}).get("rows_max", math.inf)


def _reachable(rows: Sequence[Row]) -> list[Row]:
    """Rows without the precisions in which those above them match every shape."""
    kept: list[Row] = []
    for row in rows:
        precisions = [one for one in row["precision"] if _can_be_chosen(row, one, kept)]
        if precisions:
            kept.append(row | {"precision": precisions})
    return kept


def _can_be_chosen(row: Row, precision: str, above: Sequence[Row]) -> bool:
    rivals = [
        other.get("when", {}) for other in above if other["kernel"] == row["kernel"] and precision in other["precision"]
    ]
    own = row.get("when", {})
    named: dict[str, set[int]] = {}
    for when in (own, *rivals):
        for key, wanted in when.items():
            named.setdefault(key.removesuffix("_max"), set()).update(wanted if isinstance(wanted, list) else [wanted])
    choices = {}
    for key, values in named.items():
        tried = ANY.get(key, (*sorted(values), *(value + 1 for value in values), *FAR))
        choices[key] = [value for value in tried if matches(_only(own, key), {key: value})]
    shapes = (dict(zip(choices, sizes, strict=True)) for sizes in itertools.product(*choices.values()))
    return any(not any(matches(when, shape) for when in rivals) for shape in shapes)


def _only(when: dict, key: str) -> dict:
    return {name: wanted for name, wanted in when.items() if name.removesuffix("_max") == key}


def kept(table: Sequence[Row], default: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """Rows for what few rows of activations get from the default table, which measured rows for any number would hide.

    An architecture's own table is asked before the default one.
    """
    found = []
    for row in measured:
        if most_rows(row) < math.inf:
            continue
        same = [
            [one for one in rows if one["kernel"] == row["kernel"] and row["precision"][0] in one["precision"]]
            for rows in (table, default)
        ]
        for most in sorted({most_rows(other) for other in same[1]} - {math.inf}):
            shape = row["when"] | {"rows": most}
            chosen = next((o for o in same[1] if matches(o.get("when", {}), shape)), None)
            own = any(matches(other.get("when", {}), shape) for other in same[0])
            if chosen is not None and most_rows(chosen) < math.inf and not own:
                precisions = [one for one in row["precision"] if one in chosen["precision"]]
                found.append(chosen | {"when": row["when"] | {"rows_max": most}, "precision": precisions})
    return found


def render(rows: Sequence[Row]) -> str:
    """A table as its file has it: a row on a line, and a blank line between kernels."""
    lines: list[str] = []
    before = None
    for row in rows:
        group = FORMS if row["kernel"] in FORMS else row["kernel"]
        if before not in (None, group):
            lines.append("")
        before = group
        lines.append(f"  {json.dumps(row, ensure_ascii=False)},")
    return "[\n" + "\n".join(lines).removesuffix(",") + "\n]\n"


def update(file: Path, measured: Sequence[Row]) -> None:
    """Put measured rows into a table's file, all at once; a new file where there is none."""
    rows, default = (
        json.loads(one.read_text(encoding="utf-8")) if one.exists() else []
        for one in (file, file.with_name("default.json"))
    )
    draft = file.with_suffix(".draft")
    draft.write_text(render(merge(rows, [*measured, *kept(rows, default, measured)])), encoding="utf-8")
    draft.replace(file)
    forget()
