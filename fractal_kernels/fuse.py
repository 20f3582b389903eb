"""``fuse``: swaps eager conv-BN-ReLU patterns of an existing model for the fused modules."""

from __future__ import annotations

from typing import NamedTuple

import torch.fx
from torch import nn

from .modules import BatchNormReLU2d, BNReLUJoin, DropPathJoin, MeanJoin, StepConv2d

__all__ = ["FuseReport", "fuse"]


class FuseReport(NamedTuple):
    """What :func:`fuse` did: ``fused`` names of batch norms, ``skipped`` (name, reason)."""

    fused: list[str]
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} batch norms with their ReLU"]
        lines += [f"left {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


class _Tracer(torch.fx.Tracer):
    """Follows containers down to the modules that are looked for."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, BNReLUJoin, DropPathJoin, MeanJoin)
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)


def _is_relu(module: nn.Module | None) -> bool:
    """A ReLU that does nothing else: no subclass, no hooks."""
    return type(module) is nn.ReLU and not module._forward_hooks and not module._forward_pre_hooks


def fuse(model: nn.Module, *, recompute: bool = False) -> FuseReport:
    """Replaces every ``BatchNorm2d`` whose only use is a ``ReLU`` module by :class:`BatchNormReLU2d`, in place.

    The ReLU becomes an ``Identity``; parameters, buffers, hooks and ``state_dict`` keys stay as they are. A ReLU that
    is also applied to something else stays, and its batch norm with it. A model that cannot be traced symbolically is
    searched for ``Sequential`` containers instead. A convolution before such a batch norm runs as in
    :func:`conv_bn_relu` (its class is another then): on the CPU, 3x3 ones are faster if the model and its input are in
    channels_last.

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
        pairs = _pairs_of_both_modes(model, modules)
    except Exception as error:  # a forward that cannot be traced raises anything
        pairs = _sequential_pairs(modules)
        reason = f"not traceable ({type(error).__name__}): only its Sequential containers were searched"
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
        setattr(modules[parent], child, nn.Identity())
    for module in modules.values() if recompute else ():
        if type(module) in (nn.Conv2d, StepConv2d):
            module.__class__, module.recompute = StepConv2d, True
    return FuseReport(fused, skipped)


def _pairs_of_both_modes(model: nn.Module, modules: dict[str, nn.Module]) -> list[tuple[str, str, str, str]]:
    """:func:`_traced_pairs`, but for what training and evaluation do not do alike."""
    before = {module: module.training for module in model.modules()}
    try:
        training, evaluation = (_traced_pairs(model.train(mode), modules) for mode in (True, False))
    finally:
        for module, mode in before.items():
            module.training = mode
    other = "it is used in another way in training than in evaluation"
    shared = [pair if pair in evaluation else (*pair[:3], other) for pair in training]
    names = {bn for _, bn, _, _ in training}
    return shared + [(conv, bn, relu, other) for conv, bn, relu, _ in evaluation if bn not in names]


def _traced_pairs(model: nn.Module, modules: dict[str, nn.Module]) -> list[tuple[str, str, str, str]]:
    """(what comes before, batch norm, ReLU, why not) for every batch norm of the traced model."""
    graph = _Tracer().trace(model)
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
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        children = [(child, m) for child, m in module._modules.items() if m is not None]  # repeats too
        prefix = f"{name}." if name else ""
        names = ["", *(child for child, _ in children)]
        for before, (a, first), (b, second) in zip(names, children, children[1:], strict=False):
            if isinstance(first, nn.BatchNorm2d) and _is_relu(second):
                held = [child for parent in modules.values() for child in parent._modules.values()]
                shared = any(sum(m is child for child in held) > 1 for m in (first, second))
                problem = "it or its ReLU module is used elsewhere too" if shared else ""
                pairs.append((prefix + before, prefix + a, prefix + b, problem))
    return pairs
