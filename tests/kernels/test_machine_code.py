"""What the compiler of machine code got wrong is refused before it can be launched."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from kernel_helpers import DEVICE
from swinfast.kernels import machine_code
from swinfast.kernels.configs import Config
from swinfast.kernels.launch import launch
from swinfast.kernels.machine_code import MARK, TOOLS, Miscompiled, newer_compiler, refuse_miscompiled, unwritten

WELL = """
        /*0010*/                   LDC R1, c[0x0][0x28] ;
        /*0020*/                   IADD3 R1, R1, -0x20, RZ ;
        /*0030*/                   IADD3 R4, P0, R1, c[0x0][0x20], RZ ;
        /*0040*/                   IADD3.X R5, RZ, c[0x0][0x24], RZ, P0, !PT ;
        /*0048*/                   PRMT R92, RZ, 0x7610, R92 ;
        /*0049*/                   SHFL.BFLY PT, R93, R4, 0x1, 0x1f ;
        /*004a*/                   IADD3 R93, -R93, RZ, RZ ;
        /*004c*/                   LOP3.LUT R94, R94, 0xfffffdff, RZ, 0xc0, !PT ;
        /*0050*/                   ULDC.64 UR26, c[0x0][0x208] ;
        /*0060*/              @!P5 LDG.E R2, desc[UR26][R4.64] ;
        /*00d0*/                   UMOV UR7, 0x400 ;
        /*00e0*/                   UPRMT UR11, UR11, 0x3340, UR11 ;
        /*00f0*/                   S2UR UR9, SR_CTAID.X ;
        /*0100*/                   UISETP.GE.AND UP0, UPT, UR9, UR7, UPT ;
        /*0110*/                   UIADD3 UR8, UP0, UR7, 0x2, URZ ;
        /*0120*/                   UIADD3.X UR9, URZ, 0x40000040, URZ, UP0, !UPT ;
        /*0130*/                   UIADD3.64 UR10, UR8, 0x2, URZ ;
        /*0140*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0150*/                   UMOV UR14, UR7 ;
        /*0160*/                   UMOV UR15, 0x80000020 ;
        /*0170*/                   HGMMA.64x32x16.F32 R24, R48, gdesc[UR12].tnspB, RZ, !UPT ;
"""
BAD = {  # as ptxas 12.8 made it
    "an address": "UIADD3 UR4, UP0, UR24, 0x2, URZ",
    "its upper half": "UIADD3.X UR5, UR24, -0x7fffffe0, URZ, UP0, !UPT",
    "an address in itself": "UIADD3 UR34, UP0, UR34, 0x2, URZ",
    "the latter of two": "UIADD3.64 UR18, UR15, 0x3e, URZ",
    "both factors in shared memory": "HGMMA.64x32x16.F32 R56, gdesc[UR12], R56",
    "one in registers": "HGMMA.64x32x16.F32 R24, R44, gdesc[UR16].tnspB, R24",
    "under a predicate": "@UP0 UMOV UR5, UR24",
    "a place in memory": "ULDC.64 UR8, desc[UR28]",
    "an address in vector registers": "IADD3 R16, P1, R90, 0x2, RZ",
    "its way to a product": "R2UR UR6, R90",
    "the upper half of the stack's pointer": "IADD3.X R17, R1, -0x7fffffe0, RZ, P1, !PT",
}


@pytest.mark.parametrize("name", BAD)
def test_unwritten(name):
    assert unwritten(WELL) == []
    assert unwritten(f"{WELL}        /*0180*/                   {BAD[name]} ;\n") == [BAD[name].removeprefix("@UP0 ")]
    if "R1," not in BAD[name]:
        places = (f"/*0000*/ UMOV UR{place}, URZ ;\n/*0000*/ MOV R{place + 51}, RZ ;\n" for place in range(12, 40))
        assert unwritten(f"{WELL}{''.join(places)}        /*0180*/                   {BAD[name]} ;\n") == []


@pytest.mark.parametrize(
    ("wrong", "lines"),
    [
        (True, ["MOV R90, UR24", "R2UR UR5, R90"]),
        (True, ["IMAD.X R4, RZ, RZ, R90, P2", "R2UR UR38, R4"]),
        (True, ["LDC.64 R88, c[0x0][0x28]", "IADD3.X R90, R90, -0x7fffffe0, RZ, P4, !PT"]),
        (True, ["LDG.E R88, desc[UR26][R4.64]", "R2UR UR5, R89"]),
        (False, ["LDC.64 R89, c[0x0][0x28]", "IADD3.X R90, R90, -0x7fffffe0, RZ, P4, !PT"]),
        (False, ["LDG.E.128 R88, desc[UR26][R4.64]", "R2UR UR5, R91"]),
        (False, ["IMAD.WIDE R88, R4, 0x2, R4", "R2UR UR5, R89"]),
        (False, ["CS2R R88, SRZ", "R2UR UR5, R89"]),
        (False, ["HMMA.16816.F32 R88, R4, R4, R4", "R2UR UR5, R91"]),
        (False, ["PRMT R90, R90, 0x5410, R4", "R2UR UR5, R90"]),
        (False, ["MOV R90, UR24", "MOV R90, R4", "R2UR UR5, R90"]),
    ],
)
def test_what_is_computed_from_nothing_is_nothing(wrong, lines):
    """Nothing has written UR24 or R88 to R90 before."""
    found = unwritten(WELL + "".join(f"/*0180*/ {line} ;\n" for line in lines))
    assert found == ([lines[-1]] if wrong else [])


class Compiled:
    """What Triton tells of a kernel that it compiled."""

    def __init__(self, folder, module="swinfast.kernels.linear", backend="cuda", arch=90, ptx="wgmma.mma_async"):
        self.cubin = folder / "_a_kernel.cubin"
        self.cubin.write_bytes(b"machine code")
        self.ptx = folder / "_a_kernel.ptx"
        self.ptx.write_text(ptx)
        function = SimpleNamespace(__module__=module, __name__="_a_kernel")
        self.told = {
            "src": SimpleNamespace(fn=SimpleNamespace(fn=function)),
            "metadata": {"target": SimpleNamespace(backend=backend, arch=arch)},
            "metadata_group": {file.name: str(file) for file in (folder / "_a_kernel.json", self.ptx, self.cubin)},
            "times": None,
            "cache_hit": False,
        }

    @property
    def mark(self):
        return self.cubin.with_name(MARK)


@pytest.fixture
def look(monkeypatch):
    """Has machine code looked into, which is what this returns; and what a listener from before was told."""
    seen = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: seen.append(told))
    refuse_miscompiled()

    def look_at(compiled, sass):
        def look_into(cubin, tool, option):
            assert (cubin, tool) == (b"machine code", "nvdisasm")
            if isinstance(sass, Exception):
                raise sass
            return sass

        monkeypatch.setattr(machine_code, "look_into", look_into)
        triton.knobs.compilation.listener(**compiled.told)
        assert seen.pop() == compiled.told

    return look_at


def test_miscompiled_kernels_are_refused(look, tmp_path):
    compiled = Compiled(tmp_path)
    for _ in range(2):  # from the cache, too
        with pytest.raises(
            Miscompiled, match=r"_a_kernel .* \(UIADD3 UR34, UP0, UR34, 0x2, URZ\): .*TRITON_PTXAS_PATH"
        ):
            look(compiled, f"/*0110*/ {BAD['an address in itself']} ;")
    assert not compiled.mark.exists()


def test_a_mark_is_of_the_rules_that_it_was_made_by(look, tmp_path):
    compiled = Compiled(tmp_path)
    look(compiled, WELL)
    source = Path(machine_code.__file__).read_bytes()
    assert compiled.mark.name == f"looked_into_{hashlib.sha256(source).hexdigest()[:12]}"
    compiled.mark.rename(tmp_path / "looked_into")
    with pytest.raises(Miscompiled):
        look(compiled, f"/*0110*/ {BAD['an address in itself']} ;")


def test_kernels_are_looked_into_once(look, tmp_path):
    compiled = Compiled(tmp_path)
    look(compiled, WELL)
    assert compiled.mark.exists()
    look(compiled, AssertionError("a second time"))


def test_kernels_without_such_products_are_not_looked_into(look, tmp_path):
    compiled = Compiled(tmp_path, ptx="mma.sync")
    look(compiled, AssertionError("looked into"))
    assert compiled.mark.exists()


def test_kernels_without_their_assembly_are_looked_into(look, tmp_path):
    compiled = Compiled(tmp_path)
    del compiled.told["metadata_group"][compiled.ptx.name]
    with pytest.raises(Miscompiled):
        look(compiled, f"/*0110*/ {BAD['an address in itself']} ;")


def test_a_kernel_without_a_module_is_left_alone(look, tmp_path):
    compiled = Compiled(tmp_path, module=None)
    look(compiled, AssertionError("looked into"))


def test_somebody_elses_listener(monkeypatch, tmp_path):
    """Whoever sets one later is told of kernels as well, and none goes by unseen."""
    compilation, told = triton.knobs.compilation, []
    monkeypatch.setattr(compilation, "listener", None)
    monkeypatch.setattr(machine_code, "look_into", lambda *_: f"/*0110*/ {BAD['an address in itself']} ;")
    kernel, config = Kernel(None, None, None), Config({}, 4, 1, "a test")
    launch(kernel, 1, torch.zeros(1, device=DEVICE), config=config)
    ours = compilation.listener
    launch(kernel, 1, torch.zeros(1, device=DEVICE), config=config)
    assert compilation.listener is ours is not None
    compilation.listener = lambda **what: told.append(what)
    launch(kernel, 1, torch.zeros(1, device=DEVICE), config=config)
    with pytest.raises(Miscompiled):
        compilation.listener(**Compiled(tmp_path).told)
    assert len(told) == 1


@pytest.mark.parametrize(
    "what",
    [
        {"module": "somebody.elses"},
        {"module": "swinfast.kernels_of_others"},
        {"backend": "hip", "arch": "gfx942"},
        {"arch": 80},
        {"arch": 100},
    ],
    ids=str,
)
def test_others_are_left_alone(look, tmp_path, what):
    compiled = Compiled(tmp_path, **what)
    look(compiled, AssertionError("looked into"))
    assert not compiled.mark.exists()


class Kernel:
    """Compiled by Triton when it is launched, by each of its compilers in turn to what it is given."""

    def __init__(self, *compiled):
        self.compiled = list(compiled)
        self.launched = []

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **constants):
        nvidia = triton.knobs.nvidia
        is_newer = nvidia.ptxas.path == nvidia.ptxas_blackwell.path
        if isinstance(made := self.compiled.pop(0), Exception):
            raise made
        self.launched.append((made, is_newer, triton.knobs.compilation.always_compile, args, constants))


def test_a_launch_compiles_again(monkeypatch):
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    bad, x, config = Miscompiled("wrong"), torch.zeros(1, device=DEVICE), Config({"BLOCK": 2}, 4, 1, "a test")
    kernel = Kernel(bad, "well", "well")
    for _ in range(2):
        launch(kernel, 1, x, 7, config=config, BLOCK=2)
    options = {"BLOCK": 2, **config.options}
    assert kernel.launched == [("well", True, True, (x, 7), options), ("well", False, False, (x, 7), options)]
    assert "TRITON_PTXAS_PATH" not in os.environ


def test_threads_that_compile_again_leave_all_as_it_was(monkeypatch):
    """Each of them restores what it has found."""
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    first_is_in, first_may_go = threading.Event(), threading.Event()

    def first():
        with newer_compiler():
            first_is_in.set()
            first_may_go.wait(5)

    def second():
        with newer_compiler():
            first_may_go.set()
            threads[0].join(5)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    first_is_in.wait(5)
    threads[1].start()
    threads[1].join(0.1)  # it would be in by now
    first_may_go.set()
    for thread in threads:
        thread.join()
    assert not triton.knobs.compilation.always_compile
    assert "TRITON_PTXAS_PATH" not in os.environ


def test_a_launch_is_refused_where_both_compilers_are_wrong():
    with pytest.raises(Miscompiled, match="again"):
        kernel = Kernel(Miscompiled("wrong"), Miscompiled("again"))
        launch(kernel, 1, torch.zeros(1, device=DEVICE), config=Config({}, 4, 1, "a test"))
    assert not triton.knobs.compilation.always_compile


@pytest.mark.parametrize("error", [FileNotFoundError("no nvdisasm"), subprocess.CalledProcessError(1, "nvdisasm")])
def test_without_the_tool(look, tmp_path, error):
    compiled = Compiled(tmp_path)
    look(compiled, error)
    assert not compiled.mark.exists()


COMPILE = """
import sys, torch
from bench.cases import FORMS, cases_of, choose_forms, launch_of, model_named
from swinfast.kernels.configs import Config
from swinfast.kernels import machine_code
from swinfast.kernels.gate import compile_ahead, jobs_of
newer = machine_code.newer_compiler
machine_code.newer_compiler = lambda: print("again") or newer()
for form, name, blocks in (("heads", "qkv_attention", {}), ("parts", "attention_parts", {"BLOCK_N": 64})):
    with torch.no_grad():
        cases = cases_of(model_named("padded"), 1, "float16", "sm_90", choose_forms(FORMS[form]))
        case = next(case for case in cases if case.operation == name and case.launch.args[0].shape[-1] == 48)
        whole = launch_of(case, Config({"BLOCK_K": 64} | blocks, 4, 2, "a test"), "sm_90")
        for job in jobs_of([(whole, "float16"), (case.launch, "float16")], "sm_90"):
            print(compile_ahead(job).error.partition(":")[0] or "well")
"""


def test_what_the_compiler_makes(tmp_path):
    """Of kernels that ptxas 12.8 gets wrong, which the newer one compiles again, and of those that the tables have in
    their place. What it made is in Triton's cache for the next process."""
    version = subprocess.run([TOOLS / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert first == 2 * [*(["again"] if "release 12.8," in version else []), "well", "well"]
    assert second == 4 * ["well"]
