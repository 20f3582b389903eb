"""Which backend runs an op, and why one is not there.

Precedence: the ``backend=`` argument, ``with use_backend(name)``, the environment variable ``FRACTAL_BACKEND``, then
automatic. Automatic takes the fastest, by committed measurements, that is available for the device; a backend that was
named never falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

from . import compiling

# In the order in which automatic tries them. On an H100 the two for a GPU move about as many bytes a second in
# channels_last, the compiled kernels more of them where pixels are contiguous, and these take the host less time.
NAMES = ("cpu", "cuda", "triton", "reference")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


class _Override(threading.local):
    """What ``use_backend`` says in this thread, innermost last."""

    def __init__(self) -> None:
        self.names: list[str] = []


_override = _Override()
_good: set[int] = set()  # CUDA devices that the compiled kernels run on


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do."""


def _load(name: str, mode: str, title: str, compiler: str) -> tuple[ModuleType | None, str]:
    """A compiled module and, where it cannot be loaded, the reason and the remedy."""
    try:
        return importlib.import_module(f"fractal_kernels.{name}"), ""
    except ModuleNotFoundError as error:
        if error.name != f"fractal_kernels.{name}":
            raise
        return None, (
            f"the {title} extension was not built; with {compiler}, pybind11 and ninja there, run "
            f"`FRACTAL_BUILD={mode} pip install --no-build-isolation .`, which says what is missing"
        )
    except (ImportError, OSError) as error:
        return None, (
            f"the {title} extension does not load ({error}); rebuild it against the installed "
            f"PyTorch {torch.__version__}: `FRACTAL_BUILD={mode} pip install --no-build-isolation --force-reinstall "
            "--no-deps .`"
        )


def _of_this_cuda(module: ModuleType | None, reason: str) -> tuple[ModuleType | None, str]:
    """The compiled CUDA kernels, unless they are of another major version of CUDA than PyTorch."""
    theirs, ours = torch.version.cuda, module.build_info()["cuda"] if module is not None else None
    if theirs is None or ours is None or theirs.split(".")[0] == ours.split(".")[0]:
        return module, reason
    return None, (
        f"the CUDA extension was built by nvcc {ours} and PyTorch {torch.__version__} is of CUDA {theirs}; "
        "rebuild it with a toolkit of that major version: "
        "`FRACTAL_BUILD=cuda pip install --no-build-isolation --force-reinstall --no-deps .`"
    )


# At import: torch.compile cannot trace an import.
_extension = _load("_C", "cpu", "C++", "a C++ compiler")
_cuda = _of_this_cuda(*_load("_cuda", "cuda", "CUDA", "nvcc, a C++ compiler"))
_simulated = False  # the tests' runtime executes the CUDA kernels on tensors of the CPU
_has_triton = importlib.util.find_spec("triton") is not None
# Triton runs on the CPU, slowly and for tests, where its interpreter is switched on before Triton is imported.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def extension(name: str = "cpu") -> tuple[ModuleType | None, str]:
    """The compiled module of the backend ``cpu`` or ``cuda``; reason and remedy where it cannot be loaded."""
    return _extension if name == "cpu" else _cuda


@cache
def launcher(name: str) -> Any:
    """The four launchers of a backend: ``channel_stats``, ``join_forward`` and the two of the backward."""
    if name == "reference":
        return importlib.import_module("fractal_kernels.reference")
    if name == "triton":
        return importlib.import_module("fractal_kernels.triton")
    return _Compiled("simt" if name == "cuda" and _simulated else name)  # resolve() has seen to it that it is there


class _Compiled:
    """The operators that a compiled module registers."""

    def __init__(self, name: str) -> None:
        ops = getattr(torch.ops, f"fractal_kernels_{name}")
        self.channel_stats = ops.channel_stats.default
        self.join_forward = ops.join_forward.default
        self.join_backward_reduce = ops.join_backward_reduce.default
        self.join_backward_apply = ops.join_backward_apply.default


@compiling.assume_constant_result  # the compiler cannot trace the module
def _problem(index: int | None) -> str:
    """Why the compiled CUDA kernels do not run on a device; nothing of a device that is not there."""
    if index in _good:
        return ""
    module = extension("cuda")[0]
    if module is None or not torch.cuda.is_available():
        return ""
    index = torch.cuda.current_device() if index is None else index
    problem = str(module.problem(index))
    if not problem:  # one that there is may pass
        _good.add(index)
    return problem


def why_not(name: str, device: torch.device | None = None) -> str:
    """Why a backend cannot be used (on this device), or an empty string."""
    device_type = None if device is None else device.type
    if name == "reference":
        return ""
    if name == "cpu":
        if extension()[0] is None:
            return extension()[1]
        return "" if device_type in (None, "cpu") else _elsewhere("the cpu", device_type)
    if name == "triton":
        if not _has_triton:
            return "Triton is not installed; on Linux: pip install triton"
        if _interpreted:
            return ""
    elif _simulated:
        return ""
    elif extension("cuda")[0] is None:
        return extension("cuda")[1]
    if device_type not in (None, "cuda"):
        return _elsewhere("CUDA devices", device_type)
    if device_type is None and not torch.cuda.is_available():
        # A driver that is too old is no device to PyTorch; the extension says what to do about it.
        module = extension("cuda")[0] if name == "cuda" else None
        said = "" if module is None else str(module.problem(0))
        return "PyTorch sees no CUDA device" + (f": {said}" if said else "")
    if name == "cuda":
        return str(_problem(device.index if device is not None else None))
    return "" if _has_c_compiler() else "Triton's launches need a C compiler; install gcc, or name one by CC"


@cache
def _finds_c_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


@compiling.assume_constant_result
def _has_c_compiler() -> bool:
    return _finds_c_compiler()


@compiling.assume_constant_result
def _chooses_triton(index: int | None) -> bool:
    """Whether automatic takes Triton: on NVIDIA's devices from sm_80 on."""
    if _interpreted or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(index) >= (8, 0)


def automatic(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors of this dtype on this device where nobody names one."""
    for name in NAMES:
        if _takes(name, dtype) and not why_not(name, device) and (name != "triton" or _chooses_triton(device.index)):
            return name
    return "reference"


def _elsewhere(there: str, device_type: str) -> str:
    return f"it runs on {there} and the inputs are on {device_type}; move them, or use the backend 'reference'"


def available_backends() -> tuple[str, ...]:
    """The backends that work in this environment, in the order in which automatic tries them.

    Example:
        >>> "reference" in available_backends()
        True
    """
    return tuple(name for name in NAMES if not why_not(name))


def _known(op: str, argument: str, name: object) -> str:
    if name not in NAMES:
        raise BackendUnavailable(f"{op}: expected {argument} one of {', '.join(NAMES)}, got {name!r}")
    return str(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the ``with`` block, in this thread, on this backend.

    What ``torch.utils.checkpoint`` computes again in backward runs, on a GPU, in a thread of PyTorch's: it takes
    ``context_fn=lambda: (nullcontext(), use_backend(name))``; or name the backend by argument or environment.

    Args:
        name: one of the backends of :func:`available_backends`.
    Raises:
        BackendUnavailable: the backend is not known or cannot run here; it never falls back.
    Example:
        >>> with use_backend("reference"):
        ...     pass
    """
    _known("use_backend", "name", name)
    if reason := why_not(name):
        raise BackendUnavailable(f"use_backend: expected name to be an available backend, got {name!r}: {reason}")
    _override.names.append(name)
    try:
        yield
    finally:
        _override.names.pop()


def _takes(name: str, dtype: torch.dtype) -> bool:
    return name not in ("triton", "cuda") or dtype in HALF_AND_SINGLE


def resolve(op: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs ``op`` for inputs of this dtype on this device."""
    if backend is not None:
        argument, name = "backend", backend
    elif _override.names:
        argument, name = "use_backend()", _override.names[-1]
    elif os.environ.get("FRACTAL_BACKEND"):
        argument, name = "FRACTAL_BACKEND", os.environ["FRACTAL_BACKEND"]
    else:
        return automatic(device, dtype)
    if reason := why_not(_known(op, argument, name), device):
        raise BackendUnavailable(f"{op}: expected {argument} to be usable here, got {name!r}: {reason}")
    if not _takes(name, dtype):
        names = ", ".join(str(d).removeprefix("torch.") for d in HALF_AND_SINGLE)
        got = str(dtype).removeprefix("torch.")
        raise TypeError(f"{op}: expected inputs of dtype {names} on the backend {name!r}, got {got}")
    return name
