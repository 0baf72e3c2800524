"""The command line: ``swinfast COMMAND``, one module for each group of commands. ``python -m swinfast`` is the same."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from . import __version__, cli_bench, cli_predict
from .batch.formats import ESCAPE
from .exit_codes import INTERRUPTED, UNREAD, UNUSABLE
from .messages import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, one of exit_codes."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack what is in names and tables
        sys.stdout.reconfigure(errors=ESCAPE)
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", errors=ESCAPE)
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        print(end="", flush=True)  # rather here than as the interpreter ends
        return code
    except BrokenPipeError:  # whoever read the output, such as head, wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
        return UNREAD
    except (ValueError, RuntimeError, OSError, AssertionError) as error:  # timm's checks of sizes are assertions
        say(f"error: {error}")
        return UNUSABLE
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="swinfast", description="Fast Swin Transformer V2 inference.")
    parser.add_argument("--version", action="version", version=f"swinfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cli_predict.add_commands(commands)
    cli_bench.add_commands(commands)
    return parser
