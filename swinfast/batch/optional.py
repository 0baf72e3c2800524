"""Libraries that only some inputs and outputs need."""

import importlib
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional library; RuntimeError with what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise RuntimeError(f"this needs {library}, which is not installed: pip install 'swinfast[{extra}]'") from error
