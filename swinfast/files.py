"""Files that are to be written."""

import os
from pathlib import Path


def check_writable(name: str, file: Path, in_place: bool = False) -> None:
    """Find out before any work that a file can't be written; OSError if so.

    Args:
        name: The argument that the file was given as.
        in_place: Whether a file that is there already is written to; else a new one is put in its place.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{name} must be a file, got the folder {file}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{name} must be in a folder that exists, got {file}")
    place, rights = (file, os.W_OK) if in_place and file.exists() else (file.parent, os.W_OK | os.X_OK)
    if not os.access(place, rights):
        raise PermissionError(f"{name} must be a file that can be written, got {file}: no right to write to {place}")
