"""The tuning sweep: measures configurations of every kernel on this GPU and writes its table.

`python -m bench.tune [--model NAME …] [--batch N] [--dtypes float16] [--kernels linear …] [--minutes M] [--resume]`

For each kernel and shape of a forward, in every composition of the blocks: candidates (bench.candidates) are compiled
in parallel; what spills, does not fit or lost its matrix instructions is refused; what remains must be as right as
plain PyTorch, and is timed. The fastest then run against the present choice in interleaved rounds, and a row replaces a
choice only where it wins by more than 2 % and in all rounds but one. Last, the compositions are compared by the times
of their kernels. For few images all is timed by whole forwards, and the compositions, where all kernels are asked for,
come first. Every outcome is a line of a log, by which --resume goes on where an earlier run stopped.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from swinfast.kernels.configs import FOLDER, MANY, Config, tile
from swinfast.kernels.gate import ARCHS, Job, Measured, compile_ahead, jobs_of, problems
from swinfast.kernels.launch import arch_of
from swinfast.kernels.shapes import PRECISIONS
from tabulate import tabulate

from bench import OUT_OF_TIME, RESULTS
from bench.alone import Bench, Crashed, in_words, outcome_of, winner
from bench.candidates import FEW, SIXTEEN_BITS, candidates
from bench.cases import launch_of
from bench.config_tables import Row, update
from bench.forms import form_rows, precisions_of, source_of, when_few
from bench.in_forward import Compositions, Failing, forwards_of, in_forwards
from bench.kernels import KERNELS, compilers
from bench.peaks import Timer, timer_of
from bench.tables import slug
from bench.targets import Log, Target, find_targets
from swinfast.arguments import positive
from swinfast.measurements import provenance
from swinfast.pipeline import resolve_device

FINALISTS = 3  # that run against the present choice
FEW_IMAGES = 8  # up to which kernels are timed in whole forwards
AHEAD = 4  # targets whose candidates are being compiled
TARGET_WAIT = 60.0  # seconds for the candidates of one target: a compiler can take minutes over a hopeless one

Wait = Callable[[float], list[str]]


def compile_target(target: Target, tried: Sequence[Config], arch: str, pool: Pool | None) -> Wait:
    """Start to compile all candidates; what is returned waits so many seconds, and says why each is refused, or ""."""
    if pool is None or arch not in ARCHS:
        return lambda seconds: [""] * len(tried)
    pending: list[list[tuple[Job, AsyncResult]]] = []
    for config in tried:
        jobs = jobs_of(((launch_of(case, config, arch), case.precision) for case in target.cases), arch)
        pending.append([(job, pool.apply_async(compile_ahead, (job,))) for job in jobs])

    def wait(seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        return ["; ".join(_refusals(jobs, deadline)[:1]) for jobs in pending]

    return wait


def _refusals(jobs: Sequence[tuple[Job, AsyncResult]], deadline: float) -> list[str]:
    found = []
    for job, result in jobs:
        try:
            measured = result.get(max(0.1, deadline - time.monotonic()))
        except Exception as error:  # a timeout, or a compiler's process that died
            measured = Measured(error=type(error).__name__)
        found += problems(job, measured)
    return found


class Final(NamedTuple):
    """The outcome of a target: microseconds in a forward of the best configuration and of the present one."""

    best: Config
    us: float
    present_us: float | None  # None where the present one can't run or is wrong
    wins: bool
    by_case: list[float]  # microseconds of one call of the best, or of each forward with it


def decide(bench: Bench, tried: Sequence[Config], times: Sequence[Sequence[Sequence[float]]], present: bool) -> Final:
    """Which of the finalists wins. If present, the first of them is the present choice, which holds unless beaten."""
    medians = [[statistics.median(rounds) for rounds in one] for one in times]
    totals = [sum(n * us for n, us in zip(bench.calls, one, strict=True)) for one in medians]
    if not present:
        best = min(range(len(tried)), key=totals.__getitem__)
        return Final(tried[best], totals[best], None, True, medians[best])
    turns = [
        [sum(n * us for n, us in zip(bench.calls, turn, strict=True)) for turn in zip(*one, strict=True)]
        for one in times
    ]
    best = winner(turns, bench.gain)
    return Final(tried[best], totals[best], totals[0], best > 0, medians[best])


def tune_target(
    target: Target, tried: Sequence[Config], refused: Sequence[str], bench: Bench, log: Log
) -> Final | None:
    """Check and time the candidates, the first of which is the present choice; None where nothing can run."""
    known, times = log.of(target), {}
    fresh = []
    for config, problem in zip(tried, refused, strict=True):
        entry = known.get(tile(config))
        if problem and not (target.in_use and config is tried[0]):  # what is in use is measured, whatever is said of it
            if entry is None or entry["outcome"] == "timed":  # by an earlier run, which did not know of the problem
                log.write(target, tile(config), f"refused: {problem}")
            continue
        if entry is not None and (config is not tried[0] or entry["outcome"].startswith("crashed")):
            if entry["outcome"] == "timed":
                times[tile(config)] = entry["us"]
            continue
        fresh.append(config)

    def done(config: Config, outcome: float | Exception) -> None:
        if isinstance(outcome, float):
            times[tile(config)] = outcome
            log.write(target, tile(config), "timed", us=round(outcome, 3))
        else:
            log.write(target, tile(config), in_words(outcome))

    if fresh:
        bench.quick(fresh, done)
    present = tile(tried[0]) in times
    rivals = sorted((one for one in tried[1:] if tile(one) in times), key=lambda one: times[tile(one)])[:FINALISTS]
    finalists = [tried[0], *rivals] if present else rivals
    if not finalists:
        return None
    try:
        rounds = bench.rounds(finalists)
    except Exception as error:
        outcome = outcome_of(error)
        if isinstance(outcome, Crashed):  # by one of them, who knows which
            for config in finalists[1:] or finalists:
                done(config, outcome)
        raise outcome from error
    final = decide(bench, finalists, rounds, present)
    log.write(
        target, "final", "final", present=tile(tried[0]), best=tile(final.best), blocks=final.best.blocks,
        num_warps=final.best.num_warps, num_stages=final.best.num_stages, us=final.us, present_us=final.present_us,
        wins=final.wins, by_case=final.by_case,
    )  # fmt: skip
    return final


def known_final(target: Target, log: Log) -> Final | None:
    """The outcome of an earlier run, where it still is about the present choice, or has become it."""
    entry = log.of(target).get("final")
    if entry is None or tile(target.present) not in (entry["present"], entry["best"]):
        return None
    best = Config(entry["blocks"], entry["num_warps"], entry["num_stages"], "")
    wins = entry["wins"] and tile(target.present) != entry["best"]
    return Final(best, entry["us"], entry["present_us"], wins, entry["by_case"])


def row_of(target: Target, final: Final, about: dict[str, str], models: str, where: str) -> Row:
    """A row of the table for a choice that wins; where says what its times are of, nothing where they are its own.

    What was found in whole forwards holds for as many rows alone: there are few images.
    """
    rows = dict(target.sizes).get("rows", MANY)
    few = rows < MANY and (bool(where) or rows <= FEW)  # there are kernels whose choice is one for any number
    time = f"{final.us:.1f} us {where}".strip()
    former = "none that runs" if final.present_us is None else f"{final.present_us:.1f} us of {tile(target.present)}"
    return {
        "kernel": target.kernel,
        "precision": precisions_of(target.precision),
        "when": {name: size for name, size in target.sizes if name != "rows"} | when_few(rows, few),
        "blocks": final.best.blocks,
        "num_warps": final.best.num_warps,
        "num_stages": final.best.num_stages,
        "source": source_of(about, models, target.precision, f"{time} against {former}"),
    }


def sweep(
    targets: Sequence[Target], arch: str, most: int, bench: Callable[[Target], Bench], pool: Pool | None, log: Log,
    deadline: float, found: Callable[[Target, Final], None],
) -> tuple[list[tuple[Target, Final]], int]:  # fmt: skip
    """Outcomes of the targets that fit in before the deadline (of time.monotonic), and how many were left."""
    finals: list[tuple[Target, Final]] = []
    started: dict[str, tuple[list[Config], Wait]] = {}
    todo = [target for target in targets if known_final(target, log) is None]
    for target in targets:
        final = known_final(target, log)
        if final is None:
            for ahead in todo[:AHEAD]:  # compiling is some targets ahead
                if str(ahead) not in started:
                    tried = candidates(ahead.kernel, dict(ahead.sizes), ahead.precision, ahead.present, arch, most)
                    started[str(ahead)] = tried, compile_target(ahead, tried, arch, pool)
            tried, wait = started[str(target)]
            refused = wait(min(TARGET_WAIT, max(0.0, deadline - time.monotonic())))
            if time.monotonic() > deadline:
                print(f"out of time: left for --resume: {len(todo)} targets")
                break
            todo.remove(target)
            final = tune_target(target, tried, refused, bench(target), log)
            if final is None:
                print(f"{target}: {'FAILED: ' if target.in_use else ''}nothing runs", flush=True)
                continue
            print(f"{target}: {tile(final.best)}{' wins' if final.wins else ' stays'}, {final.us:.1f} µs", flush=True)
        finals.append((target, final))
        if final.wins:
            found(target, final)
    return finals, len(todo)


def main(argv: Sequence[str] | None = None, timer_of: Callable[..., Timer] = timer_of) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if set(SIXTEEN_BITS) <= set(options.dtypes):
        _parser().error("--dtypes: float16 and bfloat16 have their rows in common, give one of them")
    deadline = time.monotonic() + 60 * options.minutes
    device = resolve_device(options.device)
    gpu = device.type == "cuda"
    models = options.model or (["swinv2_cr_tiny_ns_224"] if gpu else ["small"])
    batch = options.batch or (256 if gpu else 1)
    in_forward = options.in_forward if options.in_forward is not None else gpu and batch <= FEW_IMAGES
    arch, timer = arch_of(device), timer_of(device)
    about = provenance(device, "measured" if gpu else "interpreter")
    where = "in a forward" if in_forward else ""
    log = Log(options.log or RESULTS / f"tune_{slug(about['device'])}.jsonl", about, options.resume, where)
    table = options.table or (FOLDER / f"{arch}.json" if gpu else None)
    rows: list[Row] = []

    def found(*new: Row) -> None:
        rows.extend(new)
        if table and new:
            update(table, new)

    forwards = forwards_of(models, batch, device)
    bench_of = in_forwards(forwards, device, timer) if in_forward else partial(Bench, device=device, timer=timer)
    what = f"{' '.join(models)} batch {batch}"
    try:
        with compilers(device) as pool:
            compositions = Compositions(arch, timer, pool, log, deadline)
            if in_forward and set(KERNELS) <= set(options.kernels):
                for precision in options.dtypes:
                    for row in compositions.rows(forwards(precision)):
                        found(row)
            targets = find_targets(models, batch, options.dtypes, arch, options.kernels)
            if in_forward:
                targets = [target for target in targets if target.in_use and "rows" in dict(target.sizes)]
            known = f", {sum(bool(log.of(target)) for target in targets)} in the log" if options.resume else ""
            print(f"{len(targets)} targets{known} on {about['device']}, table {table or 'not written'}", flush=True)
            finals, left = sweep(
                targets, arch, options.candidates, bench_of, pool, log, deadline,
                lambda target, final: found(row_of(target, final, about, what, where)),
            )  # fmt: skip
    except Failing as error:
        print(f"FAILED: {error}; --no-in-forward finds what runs")
        return 1
    except Crashed as crash:
        minutes = f"{(deadline - time.monotonic()) / 60:.2f}"
        print(f"the GPU's context is lost ({crash}): going on in a new process", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "bench.tune", *argv, "--resume", "--minutes", minutes])
    if not in_forward:
        us = {c.key: one for target, final in finals for c, one in zip(target.cases, final.by_case, strict=True)}
        for precision in options.dtypes:
            found(*form_rows(models, batch, precision, arch, us, about))
    print(report(finals))
    for row in rows:
        print(json.dumps(row))
    print(f"{len(finals)} of {len(targets)} targets, {len(rows)} rows{'' if gpu else '; no measurement: no GPU'}")
    done = {str(target) for target, _ in finals}
    if not left and any(target.in_use and str(target) not in done for target in targets):
        return 1  # nothing runs, as was said
    return OUT_OF_TIME if left or compositions.cut else 0


def report(finals: Sequence[tuple[Target, Final]]) -> str:
    """What was found, by what it saves in a forward."""
    lines = []
    for target, final in finals:
        before = final.present_us
        saved = (before or final.us) - final.us
        lines.append((str(target), tile(target.present), before, tile(final.best), final.us, saved))
    lines.sort(key=lambda line: -line[-1])
    headers = ("target", "before", "µs", "now", "µs", "saved")
    return tabulate(lines, headers=headers, floatfmt=".1f", missingval="-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", metavar="NAME", help="default: swinv2_cr_tiny_ns_224 (small without GPU)")
    parser.add_argument("--batch", type=positive, help="images of the forward (default: 256; 1 without a GPU)")
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["float16"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--candidates", type=positive, default=24, help="of each target at most (default: %(default)s)")
    in_forward = f"time whole forwards with each candidate (default: on a GPU, at up to {FEW_IMAGES} images)"
    parser.add_argument("--in-forward", action=argparse.BooleanOptionalAction, help=in_forward)
    parser.add_argument("--minutes", type=float, default=8.0, help="at most (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="count what the log has of an earlier run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", type=Path, metavar="FILE", help="default: the table of this GPU's architecture")
    parser.add_argument("--log", type=Path, metavar="FILE", help="default: bench/results/tune_<device>.jsonl")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
