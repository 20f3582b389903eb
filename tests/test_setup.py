"""setup.py: what it builds, what it says it lacks, and the GPUs that it builds for. Nothing here compiles."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rules():
    """The functions of setup.py."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["setup.py", "--name"])
        patch.chdir(ROOT)
        return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def build(tmp_path, **environment):
    """`setup.py build_ext` into an empty folder, where no compiler is found but those that are named."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path]
    (tmp_path / "bin").mkdir()
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH", "FRACTAL_BUILD")}
    env = {**clean, "PATH": str(tmp_path / "bin"), **environment}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert not list(tmp_path.rglob("*.so"))
    return done.returncode, [line for line in done.stderr.splitlines() if "fractal_kernels: " in line]


def nvcc(folder, release="release 13.0, V13.0.48", architectures="compute_80 compute_90 compute_100"):
    """A program that answers as nvcc does."""
    tool = folder / "bin" / "nvcc"
    tool.parent.mkdir(parents=True, exist_ok=True)
    tool.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "nvcc: NVIDIA (R) Cuda compiler driver"; echo "Cuda compilation tools, {release}" ;;
--list-gpu-arch) printf '%s\\n' {architectures} ;;
esac
""")
    tool.chmod(0o755)
    return tool


# --- what is built -------------------------------------------------------------------------------


def test_source_distribution(tmp_path):
    """Whoever builds from it has what the checkout has."""
    left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=left_out)
    code = f"import setuptools.build_meta; setuptools.build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "tree", capture_output=True, check=True, timeout=120)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = "csrc", "fractal_kernels", "python", "tests", "benchmarks", "docs", "examples"
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    files += [ROOT / name for name in ("Makefile", "constraints.txt", "setup.py", "README.md", "LICENSE")]
    wanted = {str(f.relative_to(ROOT)) for f in files if f.suffix not in (".so", ".pyc") and ".egg-info" not in str(f)}
    assert len(wanted) > 200 and wanted - held == set()


def test_unknown_mode(tmp_path):
    code, lines = build(tmp_path, FRACTAL_BUILD="gpu")
    assert code == 1
    assert lines == ["fractal_kernels: error: FRACTAL_BUILD=gpu: unknown value; expected auto, none, cpu or cuda"]


def test_pure_python(tmp_path):
    assert build(tmp_path, FRACTAL_BUILD="none", CXX="nosuch") == (0, [])


def test_no_compiler(tmp_path):
    """Asked for, it stops; else one line says what is missing and how to get it, and the installation goes on."""
    remedy = "install one (Debian/Ubuntu: apt install g++) or name it by CXX"
    code, lines = build(tmp_path)
    assert code == 0
    want = f"installing without the C++ extension (pure Python): there is no C++ compiler; {remedy}"
    assert lines == [f"fractal_kernels: warning: {want}"]


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_no_compiler_but_asked(tmp_path, mode):
    code, lines = build(tmp_path, FRACTAL_BUILD=mode, CXX="nosuch -pipe")
    assert code == 1
    (line,) = lines
    assert line.startswith(f"fractal_kernels: error: FRACTAL_BUILD={mode}: CXX=nosuch is not a program; install one")


# --- what CUDA needs -----------------------------------------------------------------------------


def test_no_nvcc(rules, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert rules.find_nvcc() is None  # a folder that is named is the only one
    assert rules.missing_cuda().startswith("there is no nvcc; install the CUDA toolkit")


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_is_found(rules, monkeypatch, tmp_path, name):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    tool = nvcc(tmp_path)
    monkeypatch.setenv(name, str(tmp_path))
    assert rules.find_nvcc() == str(tool)


def test_versions_of_cuda(rules, monkeypatch, tmp_path):
    """The major versions are to be the same; a PyTorch without CUDA has the headers, which do."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for theirs, release, want in [
        ("13.0", "release 13.2, V13.2.1", ""),
        (None, "release 12.8, V12.8.93", ""),
        ("12.8", "release 13.0, V13.0.48", "nvcc is of CUDA 13 and PyTorch of CUDA 12.8; install a toolkit of that"),
        ("13.0", "built on Tuesday", f"{tmp_path}/bin/nvcc --version names no release"),
    ]:
        nvcc(tmp_path, release)
        monkeypatch.setattr(torch.version, "cuda", theirs)
        said = rules.missing_cuda()
        assert said.startswith(want) and bool(said) == bool(want), (theirs, release)


def test_cuda_is_asked_for(tmp_path):
    """It stops before anything is compiled."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    code, lines = build(tmp_path, FRACTAL_BUILD="cuda", CXX=compiler, CUDA_HOME=str(tmp_path))
    assert code == 1
    assert lines[0].startswith("fractal_kernels: error: FRACTAL_BUILD=cuda: there is no nvcc; install the CUDA toolkit")


# --- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "known, want",
    [
        ("compute_75 compute_80 compute_90 compute_100 compute_120", ["8.0", "9.0", "10.0+PTX"]),
        ("compute_50 compute_80 compute_90", ["8.0", "9.0+PTX"]),  # an older toolkit
        ("compute_90 compute_100", ["9.0", "10.0+PTX"]),
    ],
)
def test_default_architectures(rules, monkeypatch, tmp_path, known, want):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert rules.architectures(str(nvcc(tmp_path, architectures=known))) == want


def test_architectures_that_are_asked_for(rules, monkeypatch):
    for asked, want in [("8.6;9.0+PTX", ["8.6", "9.0+PTX"]), ("9.0a 12.0", ["9.0a", "12.0"])]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        assert rules.architectures("no nvcc is asked") == want
    for asked in ("Hopper", "90", "9.0+ptx"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        with pytest.raises(ValueError, match=rf"TORCH_CUDA_ARCH_LIST: expected numbers .*, got '{asked[:4]}"):
            rules.architectures("no nvcc is asked")


def test_flags_of_architectures(rules):
    assert rules.gencode(["8.0", "10.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    assert rules.gencode(["9.0a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]
