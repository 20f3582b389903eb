"""Which backend runs an op, and why one is not there.

Precedence: the ``backend=`` argument, ``with use_backend(name)``, the environment variable ``FRACTAL_BACKEND``, then
automatic. Automatic takes the fastest, by committed measurements, that is available for the device; a backend that was
named never falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

__all__ = ["BackendUnavailable", "available_backends", "use_backend"]

# In the order in which automatic tries them. Triton comes last as long as no measurement on a GPU is committed.
NAMES = ("cpu", "reference", "triton")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
_override: list[str] = []


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do."""


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fractal_kernels._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "fractal_kernels._C":
            raise
        return None, (
            "the C++ extension was not built; with a C++ compiler, pybind11 and ninja there, run "
            "`FRACTAL_BUILD=cpu pip install --no-build-isolation .`, which says what is missing"
        )
    except (ImportError, OSError) as error:
        return None, (
            f"the C++ extension does not load ({error}); rebuild it against the installed PyTorch "
            f"{torch.__version__}: `FRACTAL_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps .`"
        )


_extension = _load()  # at import: torch.compile cannot trace an import
_has_triton = importlib.util.find_spec("triton") is not None
# Triton runs on the CPU, slowly and for tests, where its interpreter is switched on before Triton is imported.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def extension() -> tuple[ModuleType | None, str]:
    """The compiled module and, where it cannot be loaded, the reason and the remedy."""
    return _extension


@cache
def launcher(name: str) -> Any:
    """The four launchers of a backend: ``channel_stats``, ``join_forward`` and the two of the backward."""
    if name == "reference":
        return importlib.import_module("fractal_kernels.reference")
    if name == "triton":
        return importlib.import_module("fractal_kernels.triton")
    assert name == "cpu" and extension()[0] is not None  # resolve() has seen to it
    return _CpuLaunchers()


class _CpuLaunchers:
    def __init__(self) -> None:
        ops = torch.ops.fractal_kernels_cpu
        self.channel_stats = ops.channel_stats.default
        self.join_forward = ops.join_forward.default
        self.join_backward_reduce = ops.join_backward_reduce.default
        self.join_backward_apply = ops.join_backward_apply.default


def why_not(name: str, device_type: str | None = None) -> str:
    """Why a backend cannot be used (for this type of device), or an empty string."""
    if name == "reference":
        return ""
    if name == "triton":
        if not _has_triton:
            return "Triton is not installed; on Linux: pip install triton"
        if _interpreted or device_type == "cuda" or (device_type is None and torch.cuda.is_available()):
            return ""
        if device_type is None:
            return "PyTorch sees no CUDA device"
        return f"it runs on CUDA devices and the inputs are on {device_type}; move them, or use the backend 'reference'"
    if extension()[0] is None:
        return extension()[1]
    if device_type not in (None, "cpu"):
        return f"it runs on the cpu and the inputs are on {device_type}; move them, or use the backend 'reference'"
    return ""


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
    """Runs every op inside the ``with`` block on this backend.

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
    _override.append(name)
    try:
        yield
    finally:
        _override.pop()


def resolve(op: str, backend: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs ``op`` for inputs of this dtype on this type of device."""
    if backend is not None:
        argument, name = "backend", backend
    elif _override:
        argument, name = "use_backend()", _override[-1]
    elif os.environ.get("FRACTAL_BACKEND"):
        argument, name = "FRACTAL_BACKEND", os.environ["FRACTAL_BACKEND"]
    else:
        return next(name for name in NAMES if not why_not(name, device_type))
    if reason := why_not(_known(op, argument, name), device_type):
        raise BackendUnavailable(f"{op}: expected {argument} to be usable here, got {name!r}: {reason}")
    if name == "triton" and dtype not in HALF_AND_SINGLE:
        names = ", ".join(str(d).removeprefix("torch.") for d in HALF_AND_SINGLE)
        got = str(dtype).removeprefix("torch.")
        raise TypeError(f"{op}: expected inputs of dtype {names} on the backend 'triton', got {got}")
    return name
