"""Triton's interpreter without the work that it repeats: the same results, sooner.

For every call of a device function it searches the language for what is to be patched, again; it makes a table for
every dtype that it looks up; and it computes every sum and product of integers a second time, in 64 bits, to see
whether it overflows (``sanitize``). The tests' tensors are small, so ``make interpret`` alone has that.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken(sanitize: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=sanitize)
    _once_a_launch()
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
