"""A device that is not the CPU, without one: PyTorch's hook for devices in Python, computed by the CPU's operators.

What it shares with a GPU: a tensor of another device in an operator is an error (but a number, [] on the CPU), and it
is known where the host would have to wait for the device, or copy from it or to it and not go on meanwhile. The
launchers of a backend get the tensors' memory, and run on the CPU. Importing this is for a process of its own: the
device is there from then on.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from fractal_kernels import backends

NAME = "twin"
_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_READ = (_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
_BY_DEFINITION = torch._C.DispatchKey.CompositeExplicitAutograd

waits: list[str] = []  # where the host waited since the list was cleared
copies: list[str] = []  # where it copied to the device without waiting
launched: list[str] = []  # what computed on the device: operators but for views and allocations, and kernels


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, _Module())


class Twin(torch.Tensor):
    """A tensor of the device; ``memory`` is where its values are."""

    memory: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> Twin:
        strides, offset = memory.stride(), memory.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=strides, storage_offset=offset, dtype=memory.dtype, device=torch.device(NAME, 0)
        )
        made.memory = memory
        return made

    def tolist(self) -> list:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        made = self.detach().clone()
        made = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
        return memo.setdefault(id(self), made)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def memory(t: object) -> object:
    """Where a tensor's values are, if it is of the device; what is anything else, as it is."""
    return t.memory if isinstance(t, Twin) else t


def _is_here(device: object) -> bool:
    return device is not None and torch.device(device).type == NAME


def _note(found: list[str]) -> None:
    frames = [f for f in traceback.extract_stack() if "fractal" in f.filename and "/tests/" not in f.filename]
    found.append(f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "a test")


def _run(func, args, kwargs):
    if func.namespace == "fractal_kernels":  # Python code, on tensors of the device
        return func._op_dk(_BY_DEFINITION, *args, **kwargs)
    if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns) and "empty" not in str(func):
        launched.append(str(func))
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = {id(t.memory): t for t in tensors if isinstance(t, Twin)}
    if func in _COPIES:
        made = func is _aten._to_copy.default
        source, target = args[0] if made else args[1], kwargs.get("device", args[0].device)
        no_wait = kwargs.get("non_blocking", False) if made else (*args, *kwargs.values(), False)[2]
        if (source.device.type == NAME) != _is_here(target):
            _note(copies if no_wait and _is_here(target) else waits)
    elif func in _INDEXED:
        if any(i is not None and (i.dtype == torch.bool or not isinstance(i, Twin)) for i in args[1]):
            _note(waits)
    elif here and any(t.dim() and not isinstance(t, Twin) for t in tensors):
        raise RuntimeError(f"{func}: tensors of two devices: {[(str(t.device), list(t.shape)) for t in tensors]}")
    elif func in _READ:
        _note(waits)
    stays = _is_here(kwargs["device"]) if kwargs.get("device") is not None else bool(here)
    args, kwargs = tree_map(memory, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": "cpu"}

    def wrapped(t: object) -> object:
        if not stays or not isinstance(t, torch.Tensor) or isinstance(t, Twin):
            return t
        return here[id(t)] if id(t) in here else Twin(t)

    return tree_map(wrapped, func(*args, **kwargs))


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _note(waits)
    memory(target).copy_(memory(source))
    return target


def _cast(func):
    def cast(*args):
        dtype = torch.get_autocast_dtype(NAME)
        with torch.autocast(NAME, enabled=False):
            return func(*tree_map(lambda t: t.to(dtype) if isinstance(t, torch.Tensor) else t, args))

    return cast


# What makes tensors of nothing, what torch.tensor() copies by, and of autocast what networks here need.
_LIBRARY = torch.library.Library("aten", "IMPL")
for _func in (_aten.empty.memory_format, _aten.empty_strided.default):
    _LIBRARY.impl(_func, lambda *args, _func=_func, **kwargs: _run(_func, args, kwargs), "PrivateUse1")
_LIBRARY.impl(_aten._copy_from.default, _copied, "PrivateUse1")
_OTHERS = torch.library.Library("_", "IMPL")
_OTHERS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _func in (_aten.linear.default, _aten.conv2d.default):
    _LIBRARY.impl(_func, _cast(_func), "AutocastPrivateUse1")


class _Launcher:
    """The launchers of ``cpu`` for tensors of the device, all of whose arguments must be there."""

    def __getattr__(self, kernel: str):
        launch = getattr(_launcher("cpu"), kernel)

        def checked(*args):
            elsewhere = [t.device for t in tree_leaves(args) if isinstance(t, torch.Tensor) and not isinstance(t, Twin)]
            assert not elsewhere, f"{kernel} was given tensors on {elsewhere}"
            launched.append(kernel)
            return launch(*tree_map(memory, args))

        return checked


_launcher, _why_not, _LAUNCHER = backends.launcher, backends.why_not, _Launcher()


@contextmanager
def kernels():
    """Inside, the backend ``cuda`` is there for the device's tensors, by the launchers of ``cpu``."""
    backends.launcher = lambda name: _LAUNCHER if name == "cuda" else _launcher(name)
    backends.why_not = lambda name, device=None: (
        "" if name == "cuda" and (device is None or device.type == NAME) else _why_not(name, device)
    )
    try:
        yield
    finally:
        backends.launcher, backends.why_not = _launcher, _why_not
