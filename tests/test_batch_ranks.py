"""One run in several processes under torchrun, which here are copies of the test's own."""

import os
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context

import pytest
from torch import distributed

import swinfast
from swinfast.batch.parts import ResumeError
from swinfast.batch.ranks import between_ranks
from swinfast.batch.run import Summary
from swinfast.batch.share import StrictError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def predictor(model) -> swinfast.Predictor:
    return swinfast.Predictor(model, batch_size=2, device="cpu", workers=0)


@pytest.fixture
def as_ranks(monkeypatch) -> Callable[..., list]:
    """Calls a function with each rank at the same time; what it returns or raises, None where it is killed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))

    def call(function: Callable[[int], object], world: int = 2) -> list:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        processes, ends = [], []
        for rank in range(world):
            ours, theirs = get_context("fork").Pipe(duplex=False)
            processes.append(get_context("fork").Process(target=answer, args=(function, rank, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            ends.append(ours)
        for process in processes:
            process.join(60)
        return [end.recv() if process.exitcode == 0 else None for process, end in zip(processes, ends, strict=True)]

    def answer(function, rank, end) -> None:
        os.environ["RANK"] = str(rank)
        try:
            end.send(function(rank))
        except Exception as error:
            error.__cause__ = error.__context__ = None
            end.send(error)

    return call


def test_two_runs(as_ranks, predictor, images, tmp_path):
    """One right after the other; each returns in all ranks once the output is there, which is that of one process."""

    def write(rank: int) -> list[object]:
        outputs = [tmp_path / f"{number}.csv" for number in range(2)]
        return [(predictor.write(images, out, part_size=2).images, out.read_bytes()) for out in outputs]

    first, second = as_ranks(write)
    assert first == second
    os.environ["WORLD_SIZE"] = "1"
    predictor.write(images, tmp_path / "expected.csv", part_size=2)
    assert first == [(11, (tmp_path / "expected.csv").read_bytes())] * 2


@pytest.mark.parametrize("other", [slice(8), slice(2, None), slice(None, None, -1)], ids=["fewer", "later", "reversed"])
@pytest.mark.parametrize("which", [0, 1])
def test_other_inputs(as_ranks, predictor, images, tmp_path, other, which):
    def write(rank: int) -> Summary:
        return predictor.write(images[other] if rank == which else images, tmp_path / "out.csv", part_size=2)

    for error in as_ranks(write):
        assert isinstance(error, ResumeError) and "rank 1 has read other inputs than rank 0" in str(error)
    assert not (tmp_path / "out.csv").exists()


def test_other_settings(as_ranks, model_folder, images, tmp_path):
    """They are seen before anything is begun."""

    def write(rank: int) -> Summary:
        model = swinfast.create_model(str(model_folder))
        return swinfast.Predictor(model, topk=3 + rank, device="cpu", workers=0).write(images, tmp_path / "out.csv")

    for error in as_ranks(write):
        assert type(error) is ValueError
        assert str(error) == "ranks must have the same settings; from rank 0 to rank 1: topk was 3, is 4"
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("which", [0, 1])
def test_rank_that_is_killed(as_ranks, predictor, images, tmp_path, which):
    def write(rank: int) -> Summary:
        return predictor.write(
            images, tmp_path / "out.csv", part_size=2, watch=lambda *batch: os._exit(9) if rank == which else None
        )

    answers = as_ranks(write)
    assert answers[which] is None
    assert "another rank has ended before the run was done" in str(answers[1 - which])


def test_another_try(as_ranks, predictor, images, tmp_path):
    """In the same processes, after one of them failed: nothing of the first is in the way."""

    def write(rank: int) -> list[object]:
        with pytest.raises(StrictError if rank == 0 else RuntimeError):
            predictor.write([str(tmp_path / "missing.png"), *images], tmp_path / "out.csv", part_size=2, strict=True)
        return predictor.write(images, tmp_path / "out.csv", part_size=2).images

    assert as_ranks(write) == [11, 11]


def test_another_try_while_the_error_is_held(as_ranks, predictor, images, tmp_path):
    """As in a handler, or a notebook."""

    def write(rank: int) -> list[object]:
        try:
            predictor.write([str(tmp_path / "missing.png"), *images], tmp_path / "out.csv", part_size=2, strict=True)
        except (StrictError, RuntimeError):
            return predictor.write(images, tmp_path / "out.csv", part_size=2).images

    assert as_ranks(write) == [11, 11]


def test_errors_that_are_held_keep_no_rank_waiting(as_ranks):
    """Of four each is connected to two others, and hears of the third by them."""

    def held(rank: int) -> str:
        errors = []
        try:
            with between_ranks() as exchange:
                exchange(rank)
                if rank == 1:
                    raise KeyError(rank)
                exchange(rank)
        except (KeyError, RuntimeError) as error:
            errors.append(error)
            time.sleep(1)  # else the end of a process would tell the others
            return type(errors[0]).__name__, time.monotonic()

    names, ends = zip(*as_ranks(held, 4), strict=True)
    assert names == ("RuntimeError", "KeyError", "RuntimeError", "RuntimeError")
    assert max(ends) - min(ends) < 0.9


def test_restarted_ranks(as_ranks, monkeypatch, predictor, images, tmp_path):
    """torchrun's store holds what the ranks of the try before left there."""
    port = int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore("127.0.0.1", port, None, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    output = tmp_path / "out.csv"
    assert None in as_ranks(lambda rank: predictor.write(images, output, watch=lambda *batch: os._exit(9)))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    def again(rank: int) -> int:
        time.sleep(0.5 * (rank == 0))  # the other one finds what is there of rank 0
        return predictor.write(images, output, resume=True).images

    assert as_ranks(again) == [11, 11]
    del store


@pytest.mark.parametrize("which", [0, 1])
def test_rank_that_does_not_begin(as_ranks, predictor, images, tmp_path, which):
    def write(rank: int) -> Summary:
        return predictor.write(images, tmp_path / ("missing/out.csv" if rank == which else "out.csv"), part_size=2)

    answers = as_ranks(write)
    assert isinstance(answers[which], FileNotFoundError)
    assert "another rank has ended before the run was done" in str(answers[1 - which])


def test_other_outputs(as_ranks, predictor, images, tmp_path):
    for error in as_ranks(lambda rank: predictor.write(images, tmp_path / f"{rank}.csv")):
        assert 'from rank 0 to rank 1: output was "0.csv", is "1.csv"' in str(error)


def test_a_process_that_is_alone_under_torchrun(monkeypatch, predictor, images, tmp_path):
    """As where each rank writes its own output."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert predictor.write(images, tmp_path / "out.csv").images == 11
