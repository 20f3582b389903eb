"""``fuse`` swaps eager conv-BN-ReLU patterns of an existing model for the fused modules, ``unfuse`` swaps them back."""

from __future__ import annotations

import inspect
import itertools
import os
import sys
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.fx
from torch import nn

from .modules import BatchNormReLU2d, BNReLUJoin, ConvBNReLU, FusedReLU, StepConv2d
from .tracing import Tracer, as_it_was, hooks_of_a_container, is_watched

WATCHED = "it has hooks, or a forward of its own, which would see what the ReLU made of its output"
ALONE = "its only use is not a torch.nn.ReLU module (without hooks)"
SOMETIMES = "its only use is a torch.nn.ReLU module in some calls, not in others (training, evaluation, options)"
ELSEWHERE = "it is used elsewhere too"
UNSEEN = "no call of it was seen"
MOST_FLAGS = 3  # of which every combination is traced
# Of a model that cannot be traced: what its forward does with its children is not known.
WHOLE = "its modules were searched, as if it ran each as a whole"


class Use(NamedTuple):
    """Of a call: the module before it, the one that alone has its output, if so, and what has the output in words."""

    before: nn.Module | None
    after: nn.Module | None
    words: str


Uses = dict[nn.Module, list[Use]]  # of batch norms and ReLUs


class _Refused(TypeError):
    """Of a model that this module does not trace; says why."""


class FuseReport(NamedTuple):
    """What :func:`fuse` did: ``fused`` names of batch norms, ``skipped`` (name, reason)."""

    fused: list[str]
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} batch norms with their ReLU"]
        lines += [f"left {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def _is_just(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Whether it is of one of these classes, no subclass, and nobody sees or changes what it takes or returns."""
    if module is None or type(module) not in types:
        return False
    return not is_watched(module) and not module._forward_pre_hooks


def _is_relu(module: nn.Module | None) -> bool:
    return _is_just(module, nn.ReLU, FusedReLU)


def fuse(model: nn.Module, *, recompute: bool = False) -> FuseReport:
    """Replaces every ``BatchNorm2d`` whose only use is a ``ReLU`` module by :class:`BatchNormReLU2d`, in place.

    Parameters, buffers and ``state_dict`` keys stay as they are. The ReLU returns what such a batch norm returned as it
    is, and stays a ReLU to everything else: one module may serve a whole residual block. Left are, among others, a
    batch norm whose ReLU is a function, which nobody can swap (the report names it), one with hooks on its output or
    gradients, or on those of a container that ends in it, and one with a ``forward`` that was set on the object.

    The model's ``forward`` is traced symbolically, in training and in evaluation, with all arguments, with none but the
    required ones, and with every combination of its flags; of what else it does depending on its arguments or on
    chance, nothing is known. Hooks of containers are called with torch.fx's proxies. If it cannot be traced, each of
    its modules is traced by itself, assuming that the model runs each as a whole and holds them all as modules. Code
    that reads the tensor between a batch norm and its ReLU, another method of the model too, sees it with the ReLU
    applied. Under ``torch.compile`` a ReLU that no trace saw do anything else does nothing: where batch norms were
    replaced since, call ``fuse`` again before it.

    Plain 3x3 convolutions (stride and padding 1, no bias, no groups) run as in :func:`conv_bn_relu`, whatever follows
    them (their class is another then): on the CPU they are faster if the model and its input are in channels_last.

    Args:
        model: any module.
        recompute: convolutions that read a fused batch norm compute it again in backward, as in :func:`recomputed`: of
            a chain of convolution, batch norm and ReLU one tensor a step is kept instead of two.
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
    names = {module: name for name, module in model.named_modules()}
    slots = Counter(child for parent in names for child in parent._modules.values())
    with as_it_was(model):
        found = _search(model, slots)
    skipped = [(names[module] or "model", reason) for module, reason in found.failed.items()]
    fused = []
    ours = {bn for module in names if isinstance(module, BNReLUJoin) for bn in module.modules()}
    norms = [m for m in names if isinstance(m, nn.BatchNorm2d) and not isinstance(m, BatchNormReLU2d) and m not in ours]
    for bn in norms:
        uses = found.uses.get(bn, [])
        if problem := _problem(bn, uses) or (ELSEWHERE if bn in found.elsewhere else ""):
            skipped.append((names[bn], problem))
            continue
        # The same attributes, another forward. They are the same objects to whoever else holds them.
        bn.__class__, bn.marks = BatchNormReLU2d, True  # type: ignore[assignment]
        for use in uses:
            use.after.__class__ = FusedReLU
        fused.append(names[bn])
    for relu in names:
        if isinstance(relu, FusedReLU):
            before = {use.before for use in found.uses.get(relu, [])}
            fed = [isinstance(bn, BatchNormReLU2d) and bn.marks and not is_watched(bn) for bn in before]
            relu.alone = bool(fed) and all(fed) and _is_relu(relu) and slots[relu] == 1
    for module in names:
        if type(module) is nn.Conv2d and (recompute or StepConv2d.may_be_ours(module)):
            module.__class__ = StepConv2d
        if type(module) is StepConv2d and recompute:
            module.recompute = True
    return FuseReport(fused, skipped)


def unfuse(model: nn.Module) -> list[str]:
    """Undoes :func:`fuse` in place: for tools that know modules by their class, or by what a ReLU takes and returns
    (attribution, quantization, ``torch.fx``, counters of operations). ``fuse`` may follow again.

    Args:
        model: the whole of what ``fuse`` was given: under torch.compile a ReLU relies on its batch norms. Modules of
            this package that ``fuse`` has not made stay.
    Returns:
        The names of the batch norms, which are ``torch.nn.BatchNorm2d`` again.
    Raises:
        TypeError: model is not a module. ValueError: a batch norm is synchronised (:func:`sync_batch_norm`), which
            PyTorch's would not be, or a module is of another class since (parametrised, say); nothing is changed then.
    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> unfuse(model), fuse(model).fused, unfuse(model)
        ([], ['1'], ['1'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: expected model to be a torch.nn.Module, got {type(model).__name__}")
    steps = [m for m in model.modules() if isinstance(m, ConvBNReLU)]
    own = {m.conv for m in steps}
    plain = {BatchNormReLU2d: nn.BatchNorm2d, FusedReLU: nn.ReLU, StepConv2d: nn.Conv2d}
    found = {m: name for name, m in model.named_modules() if isinstance(m, tuple(plain)) and m not in own}
    made = {m: name for m, name in found.items() if not isinstance(m, BatchNormReLU2d) or m.marks}
    for module, name in made.items():
        if getattr(module, "sync_group", None) is not None:
            raise ValueError(f"unfuse: expected batch norms that are not synchronised, got {name}")
        if type(module) not in plain:
            raise ValueError(f"unfuse: expected {name} as fuse left it, got a {type(module).__name__}")
    for module in made:
        module.__class__ = plain[type(module)]
        for attribute in ("marks", "alone", "recompute"):
            vars(module).pop(attribute, None)
    for step in steps:
        step.conv.recompute = step.recompute
    return [name for module, name in made.items() if type(module) is nn.BatchNorm2d]


def _problem(bn: nn.BatchNorm2d, uses: list[Use]) -> str:
    """Why a batch norm is left, or an empty string."""
    if type(bn) is not nn.BatchNorm2d:
        return f"it is a {type(bn).__name__}, not a torch.nn.BatchNorm2d"
    if is_watched(bn):
        return WATCHED
    if not uses:
        return UNSEEN
    others = sorted({use.words for use in uses if not _is_relu(use.after)})
    if not others:
        return ""
    return f"{SOMETIMES if any(_is_relu(use.after) for use in uses) else ALONE}: {'; '.join(others)}"


class _Found(NamedTuple):
    """Of a search: ``failed`` modules could not be traced, for a reason, and ``opaque`` are those and others that hold
    no batch norm; ``elsewhere`` are batch norms of which not every use may have been seen."""

    uses: Uses
    failed: dict[nn.Module, str]
    opaque: set[nn.Module]
    elsewhere: set[nn.Module]


def _search(model: nn.Module, slots: Counter[nn.Module | None]) -> _Found:
    """The batch norms of a model, or of those of its modules that can be traced."""
    if isinstance(model, torch.jit.ScriptModule):
        return _Found({}, {model: "it is TorchScript"}, {model}, set())
    runs = type(model).forward is not nn.Module.forward  # a ModuleList does not
    with suppress(Exception):  # a forward that cannot be traced raises anything
        return _Found(_uses_in_all_calls(model, set()), {}, set(), set())
    found = _Found({}, {}, set(), set())
    for child in model.children():
        if isinstance(child, nn.BatchNorm2d):
            continue
        if not any(isinstance(m, nn.BatchNorm2d) for m in child.modules()):
            with suppress(Exception), as_it_was(child):
                Tracer(set()).trace(child)
                continue
            found.opaque.add(child)
            continue
        inner = _search(child, slots)
        for module, uses in inner.uses.items():
            found.uses.setdefault(module, []).extend(uses)
        found.failed.update(inner.failed)
        found.opaque.update(inner.opaque)
        found.elsewhere.update(inner.elsewhere)
    found.elsewhere.update(module for module in found.uses if slots[module] > 1)
    if runs:
        try:
            seen = _uses_in_all_calls(model, found.opaque)
        except Exception as error:
            found.failed[model] = f"not traceable ({_place(error)}): {WHOLE}"
            found.opaque.add(model)
        else:
            hidden = {m for other in found.opaque for m in other.modules()}
            for module, uses in seen.items():
                if module in hidden:  # what an opaque module does with it, this trace does not see
                    found.uses.setdefault(module, []).extend(uses)
                    found.elsewhere.add(module)
                else:
                    found.uses[module] = uses
                    found.elsewhere.discard(module)
    return found


def _place(error: Exception) -> str:
    """The error's class, and the line of the model's code at which it came up; or our own reason."""
    if isinstance(error, _Refused):
        return str(error)
    ours = tuple(str(Path(str(module.__file__)).parent) + os.sep for module in (torch, sys.modules[__package__]))
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    at = f" at {Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else ""
    return type(error).__name__ + at


def _uses_in_all_calls(model: nn.Module, opaque: set[nn.Module]) -> Uses:
    """:func:`_uses` in training and in evaluation, with all arguments, without options, of all flags.

    With all arguments it must go through. Of another call that does not, by its own will or because it cannot be
    traced, what it did until then counts.
    """
    if "forward" in vars(model):  # which torch.fx would not trace
        raise _Refused("a forward that was set on the object")
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    flags = {name: value for name, value in defaults.items() if isinstance(value, bool)}
    if len(flags) > MOST_FLAGS:
        raise _Refused(f"more than {MOST_FLAGS} flags")
    turned = itertools.product(*((value, not value) for value in flags.values()))
    calls = [dict(zip(flags, values, strict=True)) for values in turned]
    calls += [defaults | call for call in calls] if len(defaults) > len(flags) else []
    found: Uses = {}
    for mode in (True, False):
        for i, arguments in enumerate(calls):
            with as_it_was(model):
                for module in model.modules():
                    module.training = mode  # not train(), which may do anything
                for module, uses in _uses(model, opaque, arguments, whole=i == 0).items():
                    found.setdefault(module, []).extend(uses)
    return found


def _uses(model: nn.Module, opaque: set[nn.Module], arguments: dict[str, Any], whole: bool) -> Uses:
    """The batch norms of one trace, with these arguments, that are not fused yet, and the ReLUs."""
    tracer, modules = Tracer(opaque), dict(model.named_modules())
    unfinished = False
    try:
        tracer.trace(model, arguments or None)
    except Exception:
        if whole:
            raise
        unfinished = True

    def module_of(node: Any) -> nn.Module | None:
        called = isinstance(node, torch.fx.Node) and node.op in ("call_module", "get_attr")
        return modules.get(str(node.target)) if called else None

    def is_identity(node: Any) -> bool:
        return node.op == "call_module" and _is_just(module_of(node), nn.Identity)

    def source(node: Any) -> Any:
        """What the node reads, past modules that return what they are given."""
        node = node.all_input_nodes[0]
        return source(node) if is_identity(node) and node.all_input_nodes else node

    def readers(node: Any) -> list[Any]:
        """What reads the node, past the same."""
        return [reader for user in node.users for reader in (readers(user) if is_identity(user) else [user])]

    found: Uses = {}
    for node in tracer.graph.nodes:
        module = module_of(node)
        if node.op in ("call_function", "call_method") and _in_words(node, None) in ("relu()", "relu_()"):
            for relu in modules.values():  # one of these may have been called by its method
                if isinstance(relu, nn.ReLU):
                    found.setdefault(relu, []).append(Use(None, None, "relu()"))
        if module is None or isinstance(module, (BatchNormReLU2d, BNReLUJoin)) or module in opaque:
            continue
        if isinstance(module, (nn.BatchNorm2d, nn.ReLU)) and node.op == "call_module":
            before = None
            if node.all_input_nodes and all(r.target is not hooks_of_a_container for r in readers(source(node))):
                before = module_of(source(node))
            users = readers(node)
            after = module_of(users[0]) if len(users) == 1 else None
            words = ", ".join(_in_words(user, module_of(user)) for user in users) or "nothing"
            found.setdefault(module, []).append(Use(before, after, words))
            caller = list(node.meta["nn_module_stack"])[-2:-1]
            if unfinished and (not caller or caller[0] in tracer.module_stack):  # it was running at the end
                found[module].append(Use(None, None, "a call that ended before its use"))
            continue
        words = "an argument" if node.op == "get_attr" else f"{type(module).__name__}, which holds it"
        for inner in module.modules():  # of one of PyTorch's own, inside of which no trace looks
            if isinstance(inner, (nn.BatchNorm2d, nn.ReLU)):
                found.setdefault(inner, []).append(Use(None, None, words))
    return found


def _in_words(node: torch.fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return type(module).__name__
    return "the output" if node.op == "output" else f"{getattr(node.target, '__name__', node.target)}()"
