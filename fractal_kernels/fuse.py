"""``fuse``: swaps eager conv-BN-ReLU patterns of an existing model for the fused modules."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch.fx
from torch import nn
from torch.nn.parameter import is_lazy

from .modules import BatchNormReLU2d, BNReLUJoin, DropPathJoin, FusedReLU, MeanJoin, StepConv2d

__all__ = ["FuseReport", "fuse"]


WATCHED = "it has hooks, or a forward of its own, which would see what the ReLU made of its output"


class FuseReport(NamedTuple):
    """What :func:`fuse` did: ``fused`` names of batch norms, ``skipped`` (name, reason)."""

    fused: list[str]
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} batch norms with their ReLU"]
        lines += [f"left {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


class _Tracer(torch.fx.Tracer):
    """Follows containers down to the modules that are looked for, and past this package's functions."""

    def __init__(self) -> None:
        package = sys.modules[__package__]
        super().__init__(autowrap_modules=(math, package))  # type: ignore[arg-type]
        # Not its classes: a forward may ask for them.
        self._autowrap_function_ids -= {id(value) for value in vars(package).values() if isinstance(value, type)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, BNReLUJoin, DropPathJoin, MeanJoin)
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a ``forward`` of its own, see and may change its output or gradients."""
    hooks = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def _is_relu(module: nn.Module | None) -> bool:
    """A ReLU that does nothing else: no subclass, no hooks."""
    return type(module) is nn.ReLU and not _is_watched(module) and not module._forward_pre_hooks


def fuse(model: nn.Module, *, recompute: bool = False) -> FuseReport:
    """Replaces every ``BatchNorm2d`` whose only use is a ``ReLU`` module by :class:`BatchNormReLU2d`, in place.

    The ReLU becomes one that returns its input; parameters, buffers and ``state_dict`` keys stay as they are. A
    ReLU that is also applied to something else stays, and its batch norm with it; so does a batch norm with hooks
    on its output or gradients, or with a ``forward`` that was set on the object. The model's ``forward`` is traced
    symbolically, in training and in evaluation, with all arguments and with none but the required ones; of what
    else it does depending on its arguments, nothing is known. A model that cannot be traced is searched for
    ``Sequential`` containers instead, of which it must use each as a whole. What is read between a batch norm and
    its ReLU has had both. A convolution before such a batch norm runs as in :func:`conv_bn_relu` (its class is
    another then): on the CPU, 3x3 ones are faster if the model and its input are in channels_last.

    Args:
        model: any module.
        recompute: convolutions that read a fused batch norm compute it again in backward, as in :func:`recomputed`: of
            a chain of convolution, batch norm and ReLU one tensor a step is kept instead of two. All convolutions run
            as in :func:`conv_bn_relu` then.
    Returns:
        A report; printing it lists what was left and why.
    Raises:
        TypeError: model is not a module.
    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fuse(model).fused
        ['1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected model to be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    try:
        pairs = _pairs_of_all_calls(model, modules)
    except Exception as error:  # a forward that cannot be traced raises anything
        pairs = _sequential_pairs(modules)
        searched = "only its Sequential containers were searched, as if each ran as a whole"
        reason = f"not traceable ({type(error).__name__}): {searched}"
        skipped = [("model", reason)]
    else:
        skipped = []
    fused = []
    relus = set()
    for conv, bn, relu, problem in pairs:
        module = modules.get(bn)
        if not problem and type(module) is not nn.BatchNorm2d:
            problem = f"it is a {type(module).__name__}, not a torch.nn.BatchNorm2d"
        if problem:
            skipped.append((bn, problem))
            continue
        module.__class__ = BatchNormReLU2d  # the same attributes, another forward
        relus.add(relu)
        fused.append(bn)
        before = modules.get(conv)
        if type(before) is nn.Conv2d and StepConv2d.may_be_ours(before):
            before.__class__ = StepConv2d
    for name in relus:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, FusedReLU().train(modules[name].training))
    for module in modules.values() if recompute else ():
        if type(module) in (nn.Conv2d, StepConv2d):
            module.__class__, module.recompute = StepConv2d, True
    return FuseReport(fused, skipped)


def _containers(module: nn.Module) -> list[Any]:
    """What holds the attributes of a module: its dictionary, and lists, dictionaries and sets in that. Not of classes
    of their own, which need not let themselves be filled again."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [vars(module)]
    while waiting:
        value = waiting.pop()
        if id(value) not in found:
            found[id(value)] = value
            inner = value.values() if isinstance(value, dict) else value
            waiting += [v for v in inner if type(v) in (list, dict, set, OrderedDict)]
    return list(found.values())


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """A trace runs ``forward``: modes, assigned attributes, buffers and PyTorch's random numbers are put back."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not (is_lazy(b) or b.is_inference())]
    modules = [m for m, _ in modes if not isinstance(m, torch.jit.ScriptModule)]  # whose state is not Python's
    held = [c for m in modules for c in _containers(m)]
    before = [copy.copy(c) for c in held]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for container, values in zip(held, before, strict=True):
            container.clear()
            container.extend(values) if isinstance(container, list) else container.update(values)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def _pairs_of_all_calls(model: nn.Module, modules: dict[str, nn.Module]) -> list[tuple[str, str, str, str]]:
    """:func:`_traced_pairs`, but for what training and evaluation, or calls with and without options, do not do alike.

    What a call without options refuses is known only with them.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    found: list[list[tuple[str, str, str, str]]] = []
    with _as_it_was(model):
        for mode in (True, False):
            for module in modules.values():
                module.training = mode  # not train(), which may do anything
            found.append(_traced_pairs(model, modules))
            if defaults:
                with suppress(Exception):
                    found.append(_traced_pairs(model, modules, defaults))
    other = "it is used in another way in training than in evaluation, or without optional arguments"
    every = {pair[1]: pair for pairs in reversed(found) for pair in pairs}
    pairs = [pair if all(pair in pairs for pairs in found) else (*pair[:3], other) for pair in every.values()]
    # A ReLU goes away for all that it is applied to, in every trace.
    kept = {relu for traced in found for _, bn, relu, _ in traced if every[bn][2] != relu}
    kept |= {relu for _, _, relu, problem in pairs if problem}
    shared = "its ReLU module is used elsewhere too"
    return [pair if pair[3] or pair[2] not in kept else (*pair[:3], shared) for pair in pairs]


def _traced_pairs(
    model: nn.Module, modules: dict[str, nn.Module], arguments: dict[str, Any] | None = None
) -> list[tuple[str, str, str, str]]:
    """(what comes before, batch norm, ReLU, why not) for every batch norm of the model, traced with these arguments."""
    graph = _Tracer().trace(model, arguments)
    calls: dict[str, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)

    def module_of(node: torch.fx.Node) -> nn.Module | None:
        return modules.get(str(node.target)) if node.op == "call_module" else None

    problems: dict[str, str] = {}
    relu_of: dict[str, str] = {}
    for name, nodes in calls.items():
        if not isinstance(modules[name], nn.BatchNorm2d) or isinstance(modules[name], BatchNormReLU2d):
            continue
        users = list(nodes[0].users)
        relu_of[name] = str(users[0].target) if len(users) == 1 and users[0].op == "call_module" else ""
        if type(modules[name]) is not nn.BatchNorm2d:
            problems[name] = f"it is a {type(modules[name]).__name__}, not a torch.nn.BatchNorm2d"
        elif len(nodes) > 1:
            problems[name] = "it is called more than once"
        elif _is_watched(modules[name]):
            problems[name] = WATCHED
        elif len(users) != 1 or not _is_relu(module_of(users[0])):
            problems[name] = "its only use is not a torch.nn.ReLU module (without hooks)"
    fusable = {name for name in relu_of if name not in problems}
    for name in fusable:  # its ReLU goes away: everything that it is applied to must be fused
        inputs = [arg for node in calls[relu_of[name]] for arg in node.all_input_nodes]
        if any(arg.op != "call_module" or str(arg.target) not in fusable for arg in inputs):
            problems[name] = "its ReLU module is used elsewhere too"
    before = {name: str(calls[name][0].all_input_nodes[0].target) for name in relu_of}
    return [(before[name], name, relu, problems.get(name, "")) for name, relu in relu_of.items()]


def _sequential_pairs(modules: dict[str, nn.Module]) -> list[tuple[str, str, str, str]]:
    pairs = []
    for name, module in modules.items():
        if not isinstance(module, nn.Sequential):
            continue
        if getattr(module.forward, "__func__", None) is not nn.Sequential.forward:  # a class's, or an object's own
            continue
        children = [(child, m) for child, m in module._modules.items() if m is not None]  # repeats too
        prefix = f"{name}." if name else ""
        names = ["", *(child for child, _ in children)]
        for before, (a, first), (b, second) in zip(names, children, children[1:], strict=False):
            if isinstance(first, nn.BatchNorm2d) and _is_relu(second):
                held = [child for parent in modules.values() for child in parent._modules.values()]
                shared = any(sum(m is child for child in held) > 1 for m in (first, second))
                problem = "it or its ReLU module is used elsewhere too" if shared else ""
                if _is_watched(first):
                    problem = WATCHED
                pairs.append((prefix + before, prefix + a, prefix + b, problem))
    return pairs
