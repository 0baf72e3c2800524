"""Errors in reports and tables."""


def in_a_line(error: Exception, *unnamed: type[Exception]) -> str:
    """An error's type, unless it is one of the unnamed, and the first line of what it says."""
    lines = str(error).strip().splitlines()[:1]
    kind = "" if lines and isinstance(error, unnamed) else type(error).__name__
    return ": ".join(filter(None, (kind, *lines)))
