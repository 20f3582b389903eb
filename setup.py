"""Builds the optional extensions fractal_kernels._C (C++) and ._cuda; everything else is in pyproject.toml.

FRACTAL_BUILD         auto (default): C++ and, if nvcc is of the CUDA that the installed PyTorch is built for, CUDA, as
                      far as they can be built, with one line for each that cannot
                      none: pure Python     cpu: C++, or stop     cuda: C++ and CUDA, or stop
TORCH_CUDA_ARCH_LIST  as usual, for instance "8.0;9.0+PTX"
CXX, MAX_JOBS         as usual: the compiler, and how many run at a time
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import escape as glob_escape
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

os.chdir(Path(__file__).resolve().parent)
MODE = os.environ.get("FRACTAL_BUILD", "auto") or "auto"
TORCH_TARGET = 0x020B000000000000  # 2.11: the oldest PyTorch that can load the build


def fail(reason: str) -> None:
    sys.exit(f"fractal_kernels: error: FRACTAL_BUILD={MODE}: {reason}")


def degrade(what: str, reason: str) -> None:
    """An extension cannot be built: stop if it was asked for, else go on without it."""
    if MODE != "auto":
        fail(reason)
    print(f"fractal_kernels: warning: installing without the {what}: {reason}", file=sys.stderr)


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


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def missing_cuda() -> str:
    """What the CUDA build lacks and how to get it, or an empty string."""
    import torch

    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc; install the CUDA toolkit, and name it by CUDA_HOME if nvcc is not on the PATH"
    release = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if release is None:
        return f"{nvcc} --version names no release"
    theirs = torch.version.cuda
    if theirs and theirs.split(".")[0] != release[1]:
        return f"nvcc is of CUDA {release[1]} and PyTorch of CUDA {theirs}; install a toolkit of that major version"
    return ""


def architectures(nvcc: str) -> list[str]:
    """Compute capabilities to build for, with +PTX where newer devices are to be served too."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in asked:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0 or 9.0+PTX, got {name!r}")
    if asked:
        return asked
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    names = [name for name in ("8.0", "9.0", "10.0") if "compute_" + name.replace(".", "") in known]
    return [*names[:-1], *(f"{name}+PTX" for name in names[-1:])]


def gencode(names: list[str]) -> list[str]:
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def build_cuda(output: Path, folder: Path) -> None:
    """PyTorch's BuildExtension compiles CUDA only beside a PyTorch with CUDA; these sources need headers alone."""
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    nvcc = find_nvcc()
    assert nvcc is not None  # missing_cuda() has seen to it
    names = architectures(nvcc)
    includes = [pybind11.get_include(), sysconfig.get_path("include"), *include_paths()]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode(names)]
    flags += [f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET:016x}ULL", f"-DFRACTAL_ARCHITECTURES={' '.join(names)}"]
    flags += [f"-I{path}" for path in includes]
    linking = ["-shared", "-cudart", "static", *(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    sources = sorted(glob("csrc/cuda/*.cu"))
    objects = [f"{Path(source).name}.o" for source in sources]

    wrappers = ("ccache", "sccache", "distcc", "env")
    host = next(word for word in shlex.split(os.environ["CXX"]) if Path(word).name not in wrappers)

    def line(arguments: list[str]) -> str:  # nvcc knows where CUDA's headers and libraries are
        return shlex.join([nvcc, "-ccbin", host, *arguments]).replace("$", "$$")

    def escaped(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path.resolve()))

    text = f"""rule compile
  command = {line(flags)} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = {line(linking)} $in -o $out
"""
    for source, to in zip(sources, objects, strict=True):
        text += f"build {to}: compile {escaped(Path(source))}\n"
    text += f"build {escaped(output)}: link {' '.join(objects)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([sys.executable, "-m", "ninja", *jobs], cwd=folder, check=True)


def extensions() -> dict[str, object]:
    """The arguments of setup() that build the extensions, or none."""
    if MODE not in ("auto", "none", "cpu", "cuda"):
        fail("unknown value; expected auto, none, cpu or cuda")
    if not {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
        return {}  # only metadata are wanted
    if {"editable_wheel", "develop", "--inplace", "-i"} & set(sys.argv):
        for stale in [*glob("fractal_kernels/_C.*"), *glob("fractal_kernels/_cuda.*")]:
            os.remove(stale)  # an older build in the source tree must not outlive its sources
    reason = "" if MODE == "none" else missing()
    if reason:
        degrade("C++ extension (pure Python)", reason)
    if reason or MODE == "none":
        return {}

    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    class Build(BuildExtension):
        def run(self) -> None:
            for stale in glob(f"{glob_escape(self.build_lib)}/fractal_kernels/_*.so"):
                os.remove(stale)  # also of an extension that is not built this time
            built, compiler = [], self.compiler
            for module in self.extensions:  # one by one, so that one that fails does not take the other with it
                self.extensions, self.compiler = [module], compiler  # run() replaces the compiler's name by an object
                try:
                    super().run()
                    built.append(module)
                except Exception as error:
                    word = (str(error) or type(error).__name__).splitlines()[0]
                    degrade(module.name, f"its build failed ({word}); the compiler's words are above (pip -v)")
            self.extensions = self.distribution.ext_modules = built

        def build_extension(self, ext: Extension) -> None:
            if ext.name.endswith("_cuda"):
                build_cuda(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "cuda")
            else:
                super().build_extension(ext)

    sources = sorted(glob("csrc/cpu/*.cpp"))
    headers = [f for f in glob("csrc/**/*", recursive=True) if f.endswith((".h", ".inc", ".cuh", ".cu"))]
    module = Extension(
        "fractal_kernels._C",
        ["csrc/binding.cpp", *sources],
        language="c++",
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", f"0x{TORCH_TARGET:016x}ULL")],
        include_dirs=[pybind11.get_include(), *include_paths()],  # pybind11's own headers before PyTorch's copy of them
        library_dirs=library_paths(),
        libraries=["torch_cpu"],  # the stable ABI's functions are there, in CUDA builds too
        # -O2: the kernels are vectorised by hand, and -O3 compiles them six times as long for nothing.
        extra_compile_args=["-O2", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wno-psabi"],
    )
    modules = [module]
    if MODE == "cuda" or (MODE == "auto" and torch.version.cuda):
        if reason := missing_cuda():
            degrade("CUDA kernels", reason)
        else:
            modules.append(Extension("fractal_kernels._cuda", [], depends=headers))
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


setup(
    packages=find_packages(include=["fractal_kernels*"]) + find_packages("python", include=["fractalnet*"]),
    package_dir={"fractalnet": "python/fractalnet"},
    package_data={
        "fractal_kernels": ["py.typed"],
        "fractal_kernels.triton": ["tuned.json"],
        "fractalnet": ["py.typed", "recipes/*.yaml", "recipes/*/*.yaml"],
    },
    include_package_data=False,
    **extensions(),
)
