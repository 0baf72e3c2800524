"""Processes of this package's own, with a pipe to each and one from it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import BinaryIO

from .worker import ANSWERS_FOLLOW


def start(command: Sequence[str]) -> subprocess.Popen:
    """Start a process that imports what this one would, whoever has put together its sys.path."""
    entries = [entry or os.curdir for entry in sys.path if isinstance(entry, str)]  # others are passed over by Python
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entries)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def skip_to_answers(stream: BinaryIO) -> None:
    """Read what a process, a sitecustomize for example, wrote before worker.take_stdout; all there is where it died."""
    for line in stream:
        if line == ANSWERS_FOLLOW:
            return
