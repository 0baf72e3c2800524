"""Engines are timed only where their answers are right, and one that fails stops no other."""

import copy
import sys

import pytest
import torch
from helpers import relative_rms, small_model_args

import swinfast
from swinfast import backends, engines, triton_backend
from swinfast.benchmark import PeakMemory, randomise
from swinfast.engines import Engine, WrongAnswer, compiled_engine, eager_engine, measure, swinfast_engine

CPU = torch.device("cpu")


@pytest.fixture
def plain():
    return randomise(swinfast.create_model("swinv2_cr_tiny_224", **small_model_args())).eval()


def run(plain, *chosen: Engine, dtype=torch.float32, batch=2, rounds=1):
    return measure(plain, chosen, dtype, batch, CPU, rounds)


def scaled(factor: float):
    """An engine whose answers are off by a factor."""

    def build(plain, dtype):
        model = copy.deepcopy(plain).to(dtype)
        return lambda images: factor * model(images)

    return build


def test_errors_stand_beside_speeds(plain):
    comparison = run(plain, swinfast_engine(), eager_engine("plain"), dtype=torch.bfloat16)
    assert not comparison.left_out
    assert [one.engine for one in comparison.measured] == ["swinfast", "plain eager"]
    for one in comparison.measured:
        assert 1e-4 < one.error < 0.1
        assert 0 <= one.agreement <= 1
        assert one.timing.median > 0
        assert one.peak_memory is None


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_errors_are_against_float64_over_at_least_eight_images(plain, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(engines, "compare", lambda candidates, *args, **options: {})
    run(plain, Engine("peer", lambda plain, dtype: lambda x: seen.append(x) or plain(x)), batch=batch)
    images = torch.cat(seen)
    assert len(images) == {1: 8, 3: 9, 16: 16}[batch]
    assert len(images.flatten(1).unique(dim=0)) == len(images)
    oracle = copy.deepcopy(plain).double()(images.double())
    error = relative_rms(1.00001 * plain(images).double(), oracle)
    monkeypatch.undo()
    (one,) = run(plain, Engine("peer", scaled(1.00001)), batch=batch).measured
    assert one.error == pytest.approx(error, rel=0.05)


def test_the_oracle_has_the_rounded_weights_and_images(plain):
    def exact(plain, dtype):
        model = copy.deepcopy(plain).to(dtype).double()
        return lambda images: model(images.double())

    (one,) = run(plain, Engine("exact", exact), dtype=torch.bfloat16).measured
    assert one.error < 1e-12


def test_agreement_is_with_the_oracle(plain):
    def build(plain, dtype):
        def forward(images):
            out = plain(images).clone()
            first = out[0].topk(2)  # of each pair of images the first has its two largest outputs swapped
            out[0, first.indices] = first.values.flip(0)
            return out

        return forward

    generous = dict.fromkeys(engines.FAR_OFF, 10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "FAR_OFF", generous)
        (one,) = run(plain, Engine("peer", build)).measured
    assert one.agreement == 0.5


def test_a_wrong_swinfast_is_an_error(plain):
    def build(plain, dtype):
        fast = swinfast.optimize(plain, dtype=dtype)
        with torch.no_grad():
            fast.stages[1].blocks[0].norm2.weight.mul_(1.01)
        return fast

    with pytest.raises(WrongAnswer, match="swinfast in float32 is wrong, so its speed means nothing: FAILED"):
        run(plain, eager_engine("plain"), Engine("swinfast", build, verified=True))


@pytest.mark.filterwarnings("ignore:Triton failed:UserWarning")
def test_pytorch_in_place_of_triton_is_not_measured_as_swinfast(plain, monkeypatch):
    def fail(*args):
        raise RuntimeError("no C compiler\nfound")

    monkeypatch.setattr(backends, "PREFER_TRITON", ("cpu", "cuda"))
    monkeypatch.setattr(triton_backend, "why_not_on", lambda device: None)  # a CPU, also beside a GPU
    for function in ("stage", "patch_embed"):
        monkeypatch.setattr(triton_backend, function, fail)
    comparison = run(plain, swinfast_engine(), eager_engine("plain"))
    assert [one.engine for one in comparison.measured] == ["plain eager"]
    said = "Triton failed at a module, so it would be another backend's speed: RuntimeError: no C compiler"
    assert comparison.left_out == {"swinfast": said}


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU nothing stands in for one")
@pytest.mark.filterwarnings("ignore:no CUDA graph:UserWarning")
@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("no room")])
def test_a_graph_that_failed_is_told(plain, captures, error):
    captures.error = error
    ours, eager = run(plain, swinfast_engine(), eager_engine("plain")).measured
    assert ours.graph_failure == (error and "OutOfMemoryError: no room") and eager.graph_failure is None


def test_a_floor_has_no_answers(plain):
    seen = []
    floor = Engine("floor", lambda plain, dtype: lambda images: seen.append(images), answers=False)
    comparison = run(plain, floor, eager_engine("plain"), rounds=3)
    assert [(one.engine, one.error is None) for one in comparison.measured] == [("floor", True), ("plain eager", False)]
    assert len(seen) == 1 + 3  # in turn with the other


def test_swinfast_is_checked_at_the_batch_size_that_is_timed(plain):
    """Right on the few images of verify, wrong on the whole batch."""

    def build(plain, dtype):
        fast = swinfast.optimize(plain, dtype=dtype)
        forward = fast.forward
        fast.forward = lambda images: forward(images) * (1.001 if len(images) == 16 else 1)
        return fast

    with pytest.raises(WrongAnswer, match="at batch 16, at most"):
        run(plain, Engine("swinfast", build, verified=True), batch=16)
    assert run(plain, Engine("swinfast", build, verified=True), batch=8).measured


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_peer_that_is_far_off_is_left_out(plain, factor):
    comparison = run(plain, Engine("peer", scaled(factor)), eager_engine("plain"))
    assert [one.engine for one in comparison.measured] == ["plain eager"]
    assert comparison.left_out["peer"].startswith("relative RMS error")


def test_a_peer_that_fails_is_left_out(plain):
    def breaks(plain, dtype):
        raise torch.OutOfMemoryError("out of memory\nby far")

    calls = []

    def breaks_later(plain, dtype):
        return lambda x: plain(x) if calls.append(0) or len(calls) < 6 else breaks(plain, dtype)

    chosen = (Engine("early", breaks), Engine("late", breaks_later), eager_engine("plain"))
    comparison = run(plain, *chosen, rounds=2)
    assert [one.engine for one in comparison.measured] == ["plain eager"]
    assert comparison.left_out == dict.fromkeys(("early", "late"), "OutOfMemoryError: out of memory")
    assert len(calls) == 6  # once it has failed, it is not called again


@pytest.mark.parametrize("batch", [10**15, 10**20])
def test_no_room_for_the_images(plain, batch):
    comparison = run(plain, swinfast_engine(), eager_engine("plain"), batch=batch)
    assert not comparison.measured
    assert list(comparison.left_out) == ["swinfast", "plain eager"]
    assert all("Error: " in reason for reason in comparison.left_out.values())


def test_memory_of_a_shared_pool_is_told_once(plain, monkeypatch):
    class Memory:
        of = staticmethod(lambda call: 1000)

    monkeypatch.setattr(engines, "PeakMemory", lambda device: Memory)
    pooled = [eager_engine(name)._replace(shares_pool=True) for name in "ab"]
    comparison = run(plain, swinfast_engine(), *pooled, eager_engine("c"))
    assert [one.peak_memory for one in comparison.measured] == [1000, 1000, None, 1000]
    assert [compiled_engine("d", mode).shares_pool for mode in (None, "max-autotune")] == [False, True]


def test_a_device_without_a_clock_is_refused(plain):
    with pytest.raises(ValueError, match=r"device must be a CPU or a GPU of CUDA or ROCm, .* got meta"):
        measure(plain, [eager_engine("plain")], torch.float32, 1, torch.device("meta"))


def test_engines_of_another_model_have_their_own_oracle(plain):
    other = randomise(swinfast.create_model("swinv2_cr_tiny_224", **small_model_args(num_classes=5)), seed=1).eval()
    comparison = run(plain, eager_engine("plain"), eager_engine("plain")._replace(model="other", plain=other))
    first, second = comparison.measured
    assert (first.model, second.model) == (None, "other")
    assert first.plain is plain and second.plain is other
    assert first.error < 1e-5 and second.error < 1e-5


def test_no_two_engines_find_the_same_images_in_a_cache(plain, monkeypatch):
    seen = {"a": [], "b": []}

    def engine(name):
        return Engine(name, lambda plain, dtype: lambda x: seen[name].append(x.data_ptr()) or plain(x))

    def timed(candidates, *args, **options):
        for calls in seen.values():
            calls.clear()
        for candidate in candidates.values():
            for _ in range(5):
                candidate()
        return {}

    monkeypatch.setattr(engines, "compare", timed)
    run(plain, engine("a"), engine("b"))
    assert len(set(seen["a"])) == len(set(seen["b"])) == 5
    assert not set(seen["a"]) & set(seen["b"])


def test_compiled_code_is_forgotten(plain, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(0))
    monkeypatch.setitem(sys.modules, "torch._dynamo", sys.modules.get("torch._dynamo"))
    run(plain, eager_engine("plain"))
    assert resets


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_has_weights_activations_and_what_is_held():
    device = torch.device("cuda")
    memory = PeakMemory(device)
    weights = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    peak = memory.of(lambda: torch.empty(1 << 27, dtype=torch.uint8, device=device).fill_(0))
    assert 3 << 26 <= peak < 4 << 26
    del weights
