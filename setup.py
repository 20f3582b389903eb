"""Builds the optional C++ extension fractal_kernels._C; everything else about the project is in pyproject.toml.

FRACTAL_BUILD  auto (default): the extension where it can be built, else pure Python and one line saying why
               none: pure Python     cpu: the extension, or stop     cuda: the extension with CUDA kernels, or stop
CXX, MAX_JOBS  as usual: the compiler, and how many run at a time
"""

import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

os.chdir(Path(__file__).resolve().parent)
MODE = os.environ.get("FRACTAL_BUILD", "auto") or "auto"
TORCH_TARGET = 0x020B000000000000  # 2.11: the oldest PyTorch that can load the build


def fail(reason: str) -> None:
    sys.exit(f"fractal_kernels: error: FRACTAL_BUILD={MODE}: {reason}")


def degrade(reason: str) -> None:
    """The extension cannot be built: stop if it was asked for, else go on without it."""
    if MODE != "auto":
        fail(reason)
    print(f"fractal_kernels: warning: installing without the C++ extension (pure Python): {reason}", file=sys.stderr)


def missing() -> str:
    """What the build lacks and how to get it, or an empty string. Chooses the compiler (CXX) on the way."""
    if not importlib.util.find_spec("torch"):
        return "PyTorch is not installed here; pip install torch, then install with pip --no-build-isolation"
    if not importlib.util.find_spec("pybind11"):
        return "pybind11 is not installed; pip install pybind11"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing; install Python's headers (Debian/Ubuntu: apt install python3-dev)"
    asked = shlex.split(os.environ.get("CXX", ""))
    compiler = next(filter(shutil.which, asked[:1] or ["c++", "g++", "clang++"]), None)
    if not compiler:
        found = f"CXX={asked[0]} is not a program" if asked else "there is no C++ compiler"
        return f"{found}; install one (Debian/Ubuntu: apt install g++) or name it by CXX"
    os.environ.setdefault("CXX", compiler)
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # ninja of this environment
    import torch

    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        return f"PyTorch is {torch.__version__}, 2.11 or later is needed; pip install --upgrade torch"
    return ""


def simd_targets(sources: list[str]) -> str:
    """The instruction sets that csrc/cpu has a translation unit for on this machine's architecture, by file name."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = [Path(source).stem.split("_")[-1] for source in sources]
    return ",".join(n for n in names if n != "ops" and (x86 or not n.startswith(("avx", "sse"))))


def extension() -> dict[str, object]:
    """The arguments of setup() that build the extension, or none."""
    if MODE not in ("auto", "none", "cpu", "cuda"):
        fail("unknown value; expected auto, none, cpu or cuda")
    if MODE == "cuda":
        fail("this version has no CUDA sources; use auto, cpu or none")
    if not {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
        return {}  # only metadata are wanted
    if {"editable_wheel", "develop", "--inplace", "-i"} & set(sys.argv):
        for stale in glob("fractal_kernels/_C.*"):
            os.remove(stale)  # an older build in the source tree must not outlive its sources
    reason = "" if MODE == "none" else missing()
    if reason:
        degrade(reason)
    if reason or MODE == "none":
        return {}

    import pybind11
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    class Build(BuildExtension):
        def run(self) -> None:
            for output in self.get_outputs():
                Path(output).unlink(missing_ok=True)
            try:
                super().run()
            except Exception as error:
                degrade(f"the C++ build failed ({str(error).splitlines()[0]}); the compiler's words are above (pip -v)")
                self.extensions = self.distribution.ext_modules = []

    sources = sorted(glob("csrc/cpu/*.cpp"))
    module = Extension(
        "fractal_kernels._C",
        ["csrc/binding.cpp", *sources],
        language="c++",
        depends=[f for f in glob("csrc/**/*", recursive=True) if f.endswith((".h", ".inc"))],
        define_macros=[("TORCH_TARGET_VERSION", f"0x{TORCH_TARGET:016x}ULL"), ("FRACTAL_SIMD", simd_targets(sources))],
        include_dirs=[pybind11.get_include(), *include_paths()],  # pybind11's own headers before PyTorch's copy of them
        library_dirs=library_paths(),
        libraries=["torch_cpu"],  # the stable ABI's functions are there, in CUDA builds too
        # -O2: the kernels are vectorised by hand, and -O3 compiles them six times as long for nothing.
        extra_compile_args=["-O2", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wno-psabi"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(
    packages=find_packages(include=["fractal_kernels*"]) + find_packages("python", include=["fractalnet*"]),
    package_dir={"fractalnet": "python/fractalnet"},
    package_data={
        "fractal_kernels": ["py.typed"],
        "fractal_kernels.triton": ["tuned.json"],
        "fractalnet": ["recipes/*.yaml"],
    },
    include_package_data=False,
    **extension(),
)
