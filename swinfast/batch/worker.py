"""A decoding process. decode.py starts this file as a script, so that it imports Pillow and nothing larger.

It reads pickled lists of sources (paths, or the bytes of files) from its standard input, the Crop's fields and
Pillow's settings before them, and answers each list with a pickled list of reasons, None for a good image, and the good
images' pixels.
"""

import importlib.util
import os
import pickle
import re
import signal
import sys
import warnings
from pathlib import Path

ANSWERS_FOLLOW = b"swinfast: answers follow\n"


def reason_of(error: Exception) -> str:
    """How the failure of an image is told: the error's type and words, the same in every run."""
    return re.sub(r" <_io\.BytesIO object at 0x\w+>", "", f"{type(error).__name__}: {error}")


def load(crop, source):
    """(image, None), or (None, reason) where it can't be read."""
    try:
        return crop.load(source), None
    except Exception as error:  # damaged files make Pillow's decoders raise nearly any type
        return None, reason_of(error)


def take_stdout():
    """The standard output as a stream of answers alone; what else is written there goes to the standard error."""
    if sys.stderr is None:  # closed; opened first, so that no other file becomes descriptor 2, where libraries write
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answers.write(b"\n" + ANSWERS_FOLLOW)  # on a line of its own, whatever was written before
    answers.flush()
    return answers


def main() -> None:
    """Serve until the standard input ends, as it does when the other process does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    warnings.simplefilter("ignore")
    try:
        _serve(sys.stdin.buffer, take_stdout())
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):  # it may end in the middle of a list
        os._exit(0)


def _serve(tasks, answers) -> None:
    pixels, (fields, settings) = _pixels(), pickle.load(tasks)
    pixels.set_pillow(settings)
    crop = pixels.Crop(*fields)
    pickle.dump("ready", answers)
    answers.flush()
    while True:
        images, reasons = zip(*(load(crop, source) for source in pickle.load(tasks)), strict=True)
        pickle.dump(list(reasons), answers)
        for image in images:
            if image is not None:
                answers.write(image.tobytes())
        answers.flush()


def _pixels():
    """swinfast/pixels.py, without the package around it, which imports PyTorch."""
    spec = importlib.util.spec_from_file_location("swinfast_pixels", Path(__file__).parents[1] / "pixels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
