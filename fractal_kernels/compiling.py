"""What ``torch.compiler`` says of functions, without importing the compiler, which no import of ours needs.

Evaluation does not need it; a training has it with its first step, as by PyTorch's optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(function: F) -> F:
    """``torch.compiler.assume_constant_result``: the attribute that it sets."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# ``torch.compiler.disable``, as PyTorch's own optimizers have it: the compiler is imported by the first call.
disable: Callable[[F], F] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
