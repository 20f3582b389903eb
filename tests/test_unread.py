"""What a mask drops is not loaded, for the batch or per sample, nor what is behind the ends of tensors: it lies in
memory that may not be read."""

from __future__ import annotations

import pytest
from unread import read_nothing

WHAT = pytest.mark.parametrize("what", ["dropped", "ends"])


@WHAT
def test_cpu(what):
    read_nothing("cpu", what)


@WHAT
def test_triton_under_the_interpreter(what):
    pytest.importorskip("triton", reason="Triton is not installed")
    read_nothing("triton", what, TRITON_INTERPRET="1")


def test_reading_is_seen():
    """The reference selects after it has loaded everything."""
    with pytest.raises(MemoryError, match="reference read dropped"):
        read_nothing("reference")
