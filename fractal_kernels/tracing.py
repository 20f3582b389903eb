"""What ``fuse`` follows a model with: a tracer that stops at what is looked for, and what puts a model back."""

from __future__ import annotations

import math
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.fx
from torch import nn
from torch.nn.parameter import is_lazy

from .modules import BNReLUJoin, DropPathJoin, MeanJoin


class Tracer(torch.fx.Tracer):
    """Follows containers down to the modules that are looked for, and past this package's functions; not into
    ``opaque`` modules, which cannot be traced."""

    def __init__(self, opaque: set[nn.Module]) -> None:
        package = sys.modules[__package__]
        super().__init__(autowrap_modules=(math, package))  # type: ignore[arg-type]
        # Not its classes: a forward may ask for them.
        self._autowrap_function_ids -= {id(value) for value in vars(package).values() if isinstance(value, type)}
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, BNReLUJoin, DropPathJoin, MeanJoin)
        return isinstance(m, leaves) or m in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Hooks of a container see what goes into it and comes out, and may change that: in the graph they read it.
        What else they do with it is traced as far as they take it for a tensor."""
        of_output = m._forward_hooks or m._backward_hooks or m._backward_pre_hooks
        if not (of_output or m._forward_pre_hooks) or self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        self.create_proxy("call_function", hooks_of_a_container, (args, kwargs), {})
        out = super().call_module(m, forward, args, kwargs)
        if of_output:
            self.create_proxy("call_function", hooks_of_a_container, (out,), {})
        return out


def hooks_of_a_container(*seen: Any) -> None:
    """In a graph, for hooks that may do anything."""


def is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a ``forward`` of its own, see and may change its output or gradients."""
    hooks = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


PUT_BACK = {list, dict, set, OrderedDict, defaultdict, deque, torch.Generator}


def _held(module: nn.Module) -> list[Any]:
    """What holds the attributes of a module: its dictionary, and Python's containers in that, not of classes of their
    own, which need not let themselves be filled again. And the random generators among them."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [vars(module)]
    while waiting:
        value = waiting.pop()
        if id(value) not in found:
            found[id(value)] = value
            if type(value) is not torch.Generator:
                inner = value.values() if isinstance(value, dict) else value
                waiting += [v for v in inner if type(v) in PUT_BACK]
    return list(found.values())


def _version(t: torch.Tensor) -> int | None:
    """None: it was made in inference mode, and has none."""
    return None if t.is_inference() else t._version


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """A trace runs ``forward``: modes, assigned attributes, buffers and random numbers are put back."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, _version(b), b.detach().clone()) for b in model.buffers() if not is_lazy(b)]
    modules = [m for m, _ in modes if not isinstance(m, torch.jit.ScriptModule)]  # whose state is not Python's
    held = [v for m in modules for v in _held(m)]
    before = [v.get_state() if isinstance(v, torch.Generator) else v.copy() for v in held]
    numpy, python = sys.modules.get("numpy"), random.getstate()
    drawn = numpy.random.get_state() if numpy else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(drawn)
        for value, was in zip(held, before, strict=True):
            if isinstance(value, torch.Generator):
                value.set_state(was)
                continue
            value.clear()
            value.extend(was) if isinstance(value, (list, deque)) else value.update(was)
        for module, mode in modes:
            module.training = mode
        with torch.inference_mode():  # outside of which nobody writes into what was made in it
            for buffer, version, value in buffers:
                if version != _version(buffer) or (version is None and not buffer.is_meta and buffer.ne(value).any()):
                    buffer.copy_(value)
