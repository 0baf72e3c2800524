"""Where a run writes: its output, and what lies beside it."""

from pathlib import Path
from typing import NamedTuple


class Places(NamedTuple):
    """Attributes:
    output: The results.
    index: The names of images, beside arrays.
    manifest, errors: Of a finished run: its settings, and the images that failed.
    parts, done: Folders: of a run that is not finished, and the same once it is, about to be deleted.
    """

    output: Path
    index: Path
    manifest: Path
    errors: Path
    parts: Path
    done: Path

    @classmethod
    def of(cls, output: Path) -> "Places":
        ends = (".manifest.json", ".errors.csv", ".parts", ".parts.done")
        return cls(output, output.with_suffix(".index.csv"), *(output.with_name(output.name + end) for end in ends))
