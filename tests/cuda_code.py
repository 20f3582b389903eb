"""The CUDA kernels without a GPU: built to be executed on the host, and as machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
ELEMENTS = ("float", "half", "bfloat16")
INCLUDES = [f"-I{path}" for path in (ROOT / "tests" / "simt", *include_paths())]
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
PROCESSES = 2


def run(command: list[object], **options: object) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout + result.stderr


def every(commands: list[list[object]]) -> list[str]:
    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(run, commands))


def compiler() -> str | None:
    return next(filter(shutil.which, ("c++", "g++")), None)


def host_library(folder: Path, flags: list[str]) -> Path:
    """The kernels and their launchers as a library of operators on the CPU's tensors (tests/simt)."""
    cxx, library = compiler(), folder / "libfractal_simt.so"
    common = [cxx, "-std=c++17", "-fPIC", "-w", "-DFRACTAL_SIMT", TARGET]
    sources = [SOURCES / f"{name}.cu" for name in ("ops", *(f"kernels_{e}" for e in ELEMENTS))]
    sources.append(ROOT / "tests" / "simt" / "device.cpp")
    objects = [folder / f"{source.stem}.o" for source in sources]
    every(
        [
            [*common, *flags, *INCLUDES, "-x", "c++", "-c", s, "-o", o]
            for s, o in zip(sources, objects, strict=True)
        ]
    )  # fmt: skip
    paths = [f(path) for path in library_paths() for f in ("-L{}".format, "-Wl,-rpath,{}".format)]
    run([cxx, "-shared", *flags, *objects, "-o", library, *paths, "-ltorch_cpu", "-lc10", "-ldl"])
    return library


def kernels_of(library: Path) -> set[str]:
    """The instances of the kernels in a library, by mangled name."""
    names = run(["nm", "-D", "--defined-only", library]).split()
    kernels = re.compile(r"cuda\d+(join_forward|join_backward|channel_stats)")
    return {n for n in names if kernels.search(n) and "launchers" not in n}


def demangled(names: set[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return sorted(re.sub(r"fractal::cuda::|void |\(fractal.*", "", line) for line in text.splitlines())


# --- machine code --------------------------------------------------------------------------------


@dataclass
class Code:
    """What the compiler made of one kernel."""

    kernel: str
    element: str
    branches: int = 1
    window: int = 1
    axis: str = "channels"
    lanes: int = 1
    registers: int = 0
    stack: int = 0
    spills: int = 0
    loads: Counter[str] | None = None
    stores: Counter[str] | None = None
    double: int = 0
    capability: int = 90
    first: int = 0  # loads of inputs before the first store

    @property
    def blocks(self) -> int:
        """How many of 128 threads are to fit on a multiprocessor: csrc/cuda/join.cuh."""
        k, plain = self.branches, self.window == 1
        if self.kernel.startswith("merge_"):
            return 4  # one of 512 threads: there are fewer of them than multiprocessors
        if self.kernel == "channel_stats":
            return 6 if self.axis == "pixels" or self.capability == 90 else 4
        if self.kernel == "join_forward":
            return (4 if plain else 3) if k > 3 else (6 if k == 3 else 7) if plain else 4
        if k > 3:
            return 3 if k == 4 and plain else 2
        if self.kernel == "join_backward_reduce":
            if k == 3 and plain and self.axis == "channels" and self.capability < 90:
                return 2
            return 6 - k if plain else 4
        return (5 if k == 1 else 4) if plain else 3

    @property
    def bytes(self) -> int:
        """Of a load of the inputs."""
        wide = 2 if self.window == 4 and self.axis == "pixels" else 1
        return self.lanes * wide * (4 if self.element == "float" else 2)

    @property
    def load(self) -> str:
        """The instruction of one: of memory that nothing writes meanwhile."""
        return {2: "LDG.E.U16", 4: "LDG.E", 8: "LDG.E.64", 16: "LDG.E.128"}[self.bytes] + ".CONSTANT"


def tool(name: str) -> str | None:
    """nvcc, or one of the tools that the toolkit or Triton ships."""
    import importlib.util

    places = [name, f"/usr/local/cuda/bin/{name}"]
    if spec := importlib.util.find_spec("triton"):
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name))
    return next(filter(None, map(shutil.which, places)), None)


def machine_code(folder: Path, capability: int) -> Iterator[Code]:
    """Compiles every kernel for a GPU of this capability."""
    sources = {element: SOURCES / f"kernels_{element}.cu" for element in ELEMENTS} | {"merges": SOURCES / "ops.cu"}
    cubins = [folder / f"{name}_{capability}.cubin" for name in sources]
    flags = ["-std=c++17", "-O3", TARGET, *INCLUDES[1:], "-cubin", f"-arch=sm_{capability}", "-Xptxas", "-v"]
    commands = [[tool("nvcc"), *flags, s, "-o", c] for s, c in zip(sources.values(), cubins, strict=True)]
    for element, cubin, log in zip(sources, cubins, every(commands), strict=True):
        codes = dict(_usage(log, element))
        for name, body in _functions(run([tool("nvdisasm"), cubin])):
            code = codes[name]
            code.loads = Counter(re.findall(r"\bLDG\.E[.\w]*", body))
            code.stores = Counter(re.findall(r"\bSTG\.E[.\w]*", body))
            code.first = len(re.findall(rf"\b{re.escape(code.load)}\s", body.split("STG.E")[0]))
            code.capability = capability
            code.double = len(re.findall(r"\bD(?:ADD|MUL|FMA|SETP)\b", body))
        yield from codes.values()


def _usage(log: str, element: str) -> Iterator[tuple[str, Code]]:
    pattern = (
        r"Compiling entry function '(\w+)'[^\n]*\n[^\n]*Function properties[^\n]*\n\s*(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n[^\n]*Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, log):
        if merge := re.search(r"\d+(merge_[a-z]+)E", name):
            yield (
                name,
                Code(merge[1], element, 1, 1, "channels", 1, int(registers), int(stack), int(stores) + int(loads)),
            )
            continue
        kernel = re.search(r"\d+(join_\w+?|channel_stats)I", name)[1]
        numbers = [int(n) for n in re.findall(r"Li(\d+)E", name)]
        axis = ("channels", "pixels")[int(re.search(r"AxisE(\d)E", name)[1])]
        shape = (1, 1, axis, *numbers) if kernel == "channel_stats" else (*numbers[:2], axis, numbers[2])
        yield name, Code(kernel, element, *shape, int(registers), int(stack), int(stores) + int(loads))


def _functions(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        name = re.match(r"\w+", part)[0]
        yield name, part


if __name__ == "__main__":  # a table, for whoever tunes them
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for code in machine_code(Path(folder), int(sys.argv[1])):
            print(code)
