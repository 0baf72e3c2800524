"""What is said on standard error."""

import os
import sys

from tqdm import tqdm


def say(message: str) -> None:
    """One line, beside a progress bar. Where it can't be written, as on a full disk, all else goes on without."""
    try:
        tqdm.write(f"swinfast: {message}", file=sys.stderr)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # also for what is left in the buffer
