"""The three ways to have swinfast: a wheel, an editable install, a plain checkout. Nothing is downloaded."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("swinfast", "kernels", "reference", "setup.py", "pyproject.toml", "README.md", "LICENSE")
IMPORT_ALL = """
import importlib, pkgutil, swinfast, swinfast.kernels, swinfast.reference
for package in (swinfast, swinfast.reference, swinfast.kernels):
    for module in pkgutil.iter_modules([package.__path__[0]], package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from swinfast.labels import imagenet_labels
assert len(imagenet_labels()) == 1000
print(swinfast.__file__, swinfast.kernels.__file__, swinfast.reference.__file__, sep="\\n")
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a build needs, so that it leaves nothing behind in this one."""
    folder = tmp_path / "checkout"
    for name in SOURCES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        (folder / name).parent.mkdir(exist_ok=True)
        copy(source, folder / name)
    return folder


@pytest.fixture
def python(tmp_path):
    """The interpreter of a clean environment that sees the dependencies of this one, but not its swinfast."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    interpreter = tmp_path / "env/bin/python"
    site = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(interpreter, "-c", "import torch", cwd=tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        run(interpreter, "-c", "import swinfast.models", cwd=tmp_path)
    return interpreter


def run(*command, cwd=None):
    clean = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=clean)
    if done.returncode:
        print(done.stdout, done.stderr)
    done.check_returncode()
    return done.stdout


def install(python, *arguments):
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--no-build-isolation", *arguments)


def test_wheel(checkout, python, tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout)
    (wheel,) = tmp_path.glob("swinfast-*.whl")
    install(python, wheel)
    files = run(python, "-c", IMPORT_ALL, cwd=tmp_path).split()
    assert all(str(tmp_path / "env") in file for file in files)
    assert run(python.parent / "swinfast", "--version").startswith("swinfast 0.")
    tables = "from swinfast.kernels import configs, gate; print(*map(len, map(configs.rows, gate.ARCHS)))"
    assert all(int(count) for count in run(python, "-c", tables, cwd=tmp_path).split())
    assert run(python, "-c", IMPORT_ALL, cwd=checkout)  # Python started in the checkout


def test_source_distribution(tmp_path):
    """All that the README names, and tests that run, are in it."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist"))
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", build, tmp_path, cwd=folder).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        files = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    expected = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert len(expected) > 200
    assert not {file for file in expected if "egg-info" not in str(file)} - files


def test_editable(checkout, python, tmp_path):
    install(python, "-e", checkout)
    files = run(python, "-c", IMPORT_ALL, cwd=tmp_path).split()
    assert all(str(checkout) in file for file in files)


def test_plain_checkout(checkout, python):
    files = run(python, "-c", IMPORT_ALL, cwd=checkout).split()
    assert all(str(checkout) in file for file in files)


@pytest.mark.parametrize("name", ["kernels", "reference"])
def test_no_names_of_their_own(checkout, python, name):
    """transformers asks for a package `kernels`, and models of a `reference` would be unknown to swinfast."""
    code = f"try:\n    import {name}\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert run(python, "-c", code, cwd=checkout).strip() == f"import swinfast.{name}, not {name}"


def test_nothing_imports_what_is_optional(python, checkout):
    optional = {"triton", "timm", "torchvision", "pyarrow", "ray", "pandas"}
    code = f"import sys, swinfast, swinfast.cli, swinfast.ray; print({optional} & set(sys.modules))"
    assert run(python, "-c", code, cwd=checkout).strip() == "set()"
