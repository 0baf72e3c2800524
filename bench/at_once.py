"""How many bytes may lie between two kernels of a stage, compared by the CUDA graphs of whole forwards.

The images of a stage go through it in parts that keep to the limit (kernels.stages). Smaller parts leave more in the
cache for the kernel after, and less work for each kernel.
"""

import time
from collections.abc import Iterator
from statistics import median

from swinfast.kernels.configs import Choose, Config, config

from bench.alone import Crashed, in_words, outcome_of, winner
from bench.cases import model_named
from bench.config_tables import Row
from bench.forms import precisions_of, source_of
from bench.in_forward import GAIN, Forward, rounds_of
from bench.peaks import Timer
from bench.targets import Log

AT_ONCE = "at_once"
LIMITS = (16, 24, 32, 48, 64, 96, 160, 1 << 19)  # MB; the last is none


def limit_rows(forward: Forward, arch: str, timer: Timer, log: Log, deadline: float) -> Iterator[Row]:
    """Rows of the limits that win, stage by stage, as they are found.

    Args:
        deadline: Of time.monotonic, after which no comparison begins.

    Raises:
        Crashed: The GPU's context is lost.
    """
    blocks = (block for stage in model_named(forward.name).stages for block in stage.blocks)
    for channels in dict.fromkeys(block.attn.qkv.in_features for block in blocks):
        if time.monotonic() > deadline:
            print("out of time: not every limit was tried")
            return
        present = config(AT_ONCE, arch, forward.precision, channels=channels)
        what = f"{AT_ONCE} channels={channels} {forward.precision} {forward.name} batch {forward.batch}"
        rivals = {}
        for limit in (present, *(Config({"MB": megabytes}, 4, 1, "a candidate") for megabytes in LIMITS)):
            choose = _only(channels, limit)
            launches = sum(case.calls for case in forward.cases(arch, choose))  # one number for each number of parts
            if launches in rivals:
                continue
            try:
                rivals[launches] = limit, forward.launches(choose)
            except Exception as error:
                outcome = outcome_of(error)
                log.note(what, str(limit.blocks["MB"]), in_words(outcome))
                if isinstance(outcome, Crashed):
                    raise outcome from error
        if next(iter(rivals.values()), (None,))[0] is not present or len(rivals) < 2:
            continue  # what there is now fails, so nothing beats it; or all images fit
        tried = [limit for limit, _ in rivals.values()]
        times = [rounds for (rounds,) in rounds_of([[launch] for _, launch in rivals.values()], timer)]
        us = [median(rounds) for rounds in times]
        for limit, one in zip(tried, us, strict=True):
            log.note(what, str(limit.blocks["MB"]), "timed", us=round(one, 3))
        place = winner(times, GAIN)
        best = tried[place].blocks
        print(f"{what}: {best['MB']} MB {'wins' if place else 'stays'}, {us[place]:.1f} µs", flush=True)
        if place:
            numbers = f"{us[place]:.1f} us in a forward against {us[0]:.1f} us of {present.blocks['MB']} MB"
            yield {
                "kernel": AT_ONCE,
                "precision": precisions_of(forward.precision),
                "when": {"channels": channels},
                "blocks": best,
                "source": source_of(log.about, f"{forward.name} batch {forward.batch}", forward.precision, numbers),
            }


def _only(channels: int, limit: Config) -> Choose:
    """A limit for one stage, by its channels."""
    return lambda kernel, shape: limit if kernel == AT_ONCE and shape["channels"] == channels else None
