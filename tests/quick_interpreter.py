"""Triton's interpreter without the work that it repeats: the same results, sooner.

For every call of a device function it searches the language for what is to be patched, again; it makes a table for
every dtype that it looks up; for every value it makes a type, a name and constants of its shape; and it computes every
sum and product of integers a second time, in 64 bits, to see whether it overflows (``sanitize``). The tests' tensors
are small, so ``make interpret`` alone has that.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken(sanitize: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=sanitize)
    _once_a_launch()
    _once_a_shape()
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
