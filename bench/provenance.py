"""Where a measurement was made and of what: columns that every row of a result file has."""

from datetime import date

import torch
import triton

from swinfast.benchmark import describe_device
from swinfast.measurements import commit_of_this, driver_of


def provenance(device: torch.device, source: str) -> dict[str, str]:
    """Device, versions, commit, date and what kind of number it is: "measured", or why it is no measurement."""
    return {
        "device": describe_device(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": driver_of(device) or "",
        "commit": commit_of_this(),
        "date": date.today().isoformat(),
        "source": source,
    }
