"""Triton's interpreter without the work that it repeats: the same results, sooner.

For every call of a device function it searches the language for what is to be patched, again; it makes a table for
every dtype that it looks up; for every value it makes a type, a name and constants of its shape; it converts, splats
and broadcasts what an operator reads, which NumPy does by itself where both are of one dtype; and it computes every sum
and product of integers a second time, in 64 bits, to see whether it overflows (``sanitize``). The tests' tensors are
small, so ``make interpret`` alone has that.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken(sanitize: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=sanitize)
    _once_a_launch()
    _once_a_shape()
    _by_numpy(("fp32", "int64") if sanitize else ("fp32", "int64", "int32"))
    find, found = interpreter._get_np_dtype, {}

    def dtype(of: Any) -> Any:
        of = of.element_ty if isinstance(of, tl.block_type) else of
        if type(of) is not tl.dtype:  # a pointer
            return find(of)
        if of.name not in found:  # not by the dtype, whose hash makes a string
            found[of.name] = find(of)
        return found[of.name]

    interpreter._get_np_dtype = dtype


def _once_a_launch() -> None:
    """Patches a module of the language for the first function that sees it; a launch takes everything back."""
    patch, patched = interpreter._patch_lang, set()

    @cache
    def languages(function: Any) -> frozenset[str]:
        modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def once(function: Any) -> Any:
        scope, seen = interpreter._LangPatchScope(), languages(function)
        if not seen or not seen <= patched:
            scope = patch(function)
            patched.update(seen)
        restore = scope.restore

        def all_back() -> None:
            patched.clear()
            restore()

        scope.restore = all_back
        return scope

    interpreter._patch_lang = once


def _once_a_shape() -> None:
    """What a type and a value know of their shape; names and types of tuples are made when somebody asks."""
    known: dict[tuple[int, ...], tuple[tl.tuple, int, tl.tuple, tl.constexpr]] = {}
    constant = tl.constexpr

    def make_block_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
        sizes = shape.values if type(shape) is tl.tuple else shape
        key = tuple(s.value if type(s) is constant else s for s in sizes)
        if key not in known:
            type_of_shape(self, element_ty, shape)  # checks it
            known[key] = self.shape, self.numel, tl.tuple([constant(s) for s in key]), constant(self.numel)
        self.element_ty = element_ty
        self.shape, self.numel, self.shape_of_values, self.numel_of_values = known[key]

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        block = type.is_block()
        self.shape, self.numel = (type.shape_of_values, type.numel_of_values) if block else (no_shape, one)

    def make_tuple(self: Any, args: Any, type: Any = None) -> None:
        self.values, self.known_type = list(args), type
        if type is not None and not isinstance(type, tl.core.tuple_type):
            self.known_type = tl.core.tuple_type(type)

    def type_of(self: Any) -> Any:
        if self.known_type is None:
            self.known_type = tl.core._type_for_tuple_values(self.values)
        return self.known_type

    def broadcast(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        blocks = left.type.is_block(), right.type.is_block()
        if not any(blocks) or (all(blocks) and left.type.shape is right.type.shape):
            return left, right
        return search(self, left, right)

    search, TritonSemantic.broadcast_impl_value = TritonSemantic.broadcast_impl_value, broadcast
    type_of_shape = tl.block_type.__init__
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
    tl.tuple.type = property(type_of, lambda self, type: setattr(self, "known_type", type))
    tl.tuple.__init__, tl.block_type.__init__, tl.tensor.__init__ = make_tuple, make_block_type, make_tensor
    no_shape, one = tl.tuple([]), constant(1)


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def _by_numpy(computed: tuple[str, ...]) -> None:
    """Operators on two tensors of one dtype, or on one and a number, ``where`` of these, and pointers and an offset."""
    tensor, block, handle, semantic = (
        tl.tensor,
        tl.block_type,
        interpreter.TensorHandle,
        interpreter.interpreter_semantic,
    )
    numbers = {"fp32": np.float32, "int32": np.int32, "int64": np.int64}
    blocks: dict[tuple[str, tuple[int, ...]], tl.block_type] = {}

    @cache
    def number(of: type, value: Any, name: str) -> Any:
        """As one of this dtype; None: the interpreter is to say what becomes of it."""
        if of is int and -(2**31) <= value < 2**31:
            return numbers[name](value)
        normal = of is float and (value in (0, float("inf"), float("-inf")) or 2**-126 <= abs(value) < 2**127)
        return np.float32(value or 0) if normal and name == "fp32" else None  # no minus zero, as there

    def operand(x: Any, name: str) -> Any:
        """The data of what an operator reads; None where it is of another dtype."""
        if type(x) is tensor:
            return x.handle.data if x.dtype.name == name else None
        x = x.value if type(x) is tl.constexpr else x
        return number(type(x), x, name) if type(x) in (int, float) and name in numbers else None

    def is_block(x: Any) -> bool:
        return type(x) is tensor and type(x.type) is block

    def made(data: Any, element: Any, like: Any, blocked: bool) -> Any:
        """A block, if one was read, or a scalar."""
        if blocked:
            key = element.name, data.shape  # not by the element, which may be a pointer: it has no hash
            if key not in blocks:
                blocks[key] = block(element, list(data.shape))
            element = blocks[key]
        result = object.__new__(handle)
        result.data, result.dtype, result.attr = data, like.handle.dtype, {}
        return tensor(result, element)

    def operator(name: str, compute: Callable[..., Any], dtypes: Collection[str], flip: bool, asks: bool) -> None:
        slow = getattr(tensor, name)

        def quick(self: Any, other: Any) -> Any:
            dtype = self.dtype.name
            data = operand(other, dtype) if dtype in dtypes else None
            if data is None:
                return slow(self, other, _semantic=semantic)
            found = compute(data, self.handle.data) if flip else compute(self.handle.data, data)
            return made(found, tl.int1 if asks else self.dtype, self, is_block(self) or is_block(other))

        setattr(tensor, name, quick)

    def add(self: Any, other: Any) -> Any:
        if type(self.dtype) is tl.pointer_type and type(other) is tensor and other.dtype.name in ("int32", "int64"):
            data = semantic.builder.create_addptr(self.handle, other.handle).data
            return made(data, self.dtype, self, is_block(self) or is_block(other))
        return add_numbers(self, other)

    def where(self: Any, condition: Any, x: Any, y: Any) -> Any:
        of = x if type(x) is tensor else y
        if type(of) is tensor and of.dtype.name in computed and condition.dtype.name == "int1":
            a, b = operand(x, of.dtype.name), operand(y, of.dtype.name)
            if a is not None and b is not None:
                return made(np.where(condition.handle.data, a, b), of.dtype, of, any(map(is_block, (condition, x, y))))
        return slow_where(self, condition, x, y)

    for name, compute in ARITHMETIC.items():
        operator(f"__{name}__", compute, computed, False, False)
        operator(f"__r{name}__", compute, computed, True, False)
    for name, compute in COMPARISONS.items():
        operator(f"__{name}__", compute, numbers, False, True)
    for name, compute in {"and": np.bitwise_and, "or": np.bitwise_or}.items():
        operator(f"__{name}__", compute, ("int1",), False, False)
    add_numbers, tensor.__add__ = tensor.__add__, add
    slow_where, TritonSemantic.where = TritonSemantic.where, where
