"""The fractal block as rows, and the part of it that lives under a path. Pure Python over small tuples, cached.

Columns c = 0 (shallowest, one conv) ... C-1 (deepest, R = 2**(C-1) convs, one per row). Column c's j-th conv spans the
rows j*s ... (j+1)*s - 1 with s = 2**(C-1-c). The columns that start at row r read one tensor, the join of row r-1 (the
block's input for r = 0), so their convs can be one wide conv; the columns that end at row r meet in the join of row r.
Both are contiguous ranges that end with column C-1. Source: Larsson et al. 2016 (arXiv:1605.07648), section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

MAX_COLUMNS = 8


class Unit(NamedTuple):
    """One conv-BN-ReLU: column ``column``'s ``step``-th, from row ``start`` to row ``end``; ``id`` counts by row."""

    id: int
    column: int
    step: int
    start: int
    end: int


class Schedule(NamedTuple):
    columns: int
    rows: int
    units: tuple[Unit, ...]
    starts: tuple[tuple[Unit, ...], ...]  # per row, the units that start there
    ends: tuple[tuple[Unit, ...], ...]  # per row, the units that meet in its join, shallow first


class Plan(NamedTuple):
    """What runs: the units that live, per row; the inputs of every live join (empty: the join is dead)."""

    live: tuple[tuple[Unit, ...], ...]
    joins: tuple[tuple[Unit, ...], ...]
    units: tuple[int, ...]  # ids of the units that live


@cache
def schedule(columns: int) -> Schedule:
    """The rows of a block of this many columns.

    Example:
        >>> [len(row) for row in schedule(3).starts]
        [3, 1, 2, 1]
    """
    if not isinstance(columns, int) or not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"schedule: expected columns from 1 to {MAX_COLUMNS}, got {columns!r}")
    rows = 2 ** (columns - 1)
    units: list[Unit] = []
    starts: list[tuple[Unit, ...]] = []
    for row in range(rows):
        first = len(units)
        for column in range(columns):
            span = 2 ** (columns - 1 - column)
            if row % span == 0:
                units.append(Unit(len(units), column, row // span, row, row + span - 1))
        starts.append(tuple(units[first:]))
    ends = tuple(tuple(sorted((u for u in units if u.end == row), key=lambda u: u.column)) for row in range(rows))
    return Schedule(columns, rows, tuple(units), tuple(starts), ends)


def live_units(s: Schedule, keep: Any) -> list[Any]:
    """Whether the block's output depends on a unit, for every unit in the schedule's order.

    Args:
        s: the block's rows.
        keep: [R][C] bools, or a bool tensor [R, C] or [R, C, N], of which the host reads nothing: whether column c is
            kept in the join of row r. What does not end at a row is ignored.
    Example:
        >>> live_units(schedule(2), [[True, True], [True, False]])  # the deeper column is kept where nobody reads it
        [True, False, False]
    """
    found: list[Any] = [None] * len(s.units)
    read: list[Any] = [None] * s.rows  # per row, whether a unit that reads its join lives
    for row in range(s.rows - 1, -1, -1):
        for unit in s.ends[row]:
            kept = keep[row][unit.column]
            found[unit.id] = kept = kept if row == s.rows - 1 else kept & read[row]
            if unit.start > 0:
                before = read[unit.start - 1]
                read[unit.start - 1] = kept if before is None else before | kept
    return found


@lru_cache(maxsize=4096)
def plan(columns: int, keep: tuple[bool, ...]) -> Plan:
    """The live set of a path.

    Args:
        columns: C.
        keep: R*C values, row by row: whether column c is kept in the join of row r. Values of columns that do not end
            at a row, and of joins that nobody reads, are ignored.
    Raises:
        ValueError: a join that lives keeps no branch, or ``keep`` has the wrong length.
    Example:
        >>> plan(2, (True, True, True, False)).units  # only the single conv of column 0
        (0,)
    """
    s = schedule(columns)
    if len(keep) != s.rows * columns:
        raise ValueError(f"plan: expected keep of {s.rows}*{columns} values, got {len(keep)}")
    lives = live_units(s, [keep[at : at + columns] for at in range(0, len(keep), columns)])
    starts, joins = (tuple(tuple(u for u in row if lives[u.id]) for row in rows) for rows in (s.starts, s.ends))
    for row in range(s.rows - 1, -1, -1):
        if not joins[row] and (row == s.rows - 1 or starts[row + 1]):
            raise ValueError(f"fractal_block: expected the path to keep a branch of the join of row {row}, got none")
    return Plan(starts, joins, tuple(u.id for row in starts for u in row))


@cache
def everything(columns: int) -> Plan:
    """The plan of the dense execution: every unit and every join."""
    s = schedule(columns)
    return Plan(s.starts, s.ends, tuple(range(len(s.units))))


def spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Increasing numbers as half-open ranges: indexing by a tensor would copy it from the host.

    Example:
        >>> spans([0, 1, 3])
        [(0, 2), (3, 4)]
    """
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n:
            found[-1] = found[-1][0], n + 1
        else:
            found.append((n, n + 1))
    return found


@lru_cache(maxsize=256)
def _pieces(ranges: tuple[tuple[int, int], ...], size: int) -> tuple[list[int], list[int]]:
    """The sizes of the pieces that ranges cut an axis into, and which of the pieces are the ranges."""
    sizes: list[int] = []
    own: list[int] = []
    at = 0
    for first, last in ranges:
        own.append(len(sizes) + (first > at))
        sizes += [first - at] * (first > at) + [last - first]
        at = last
    return sizes + [size - at] * (size > at), own


def cut(t: Any, ranges: Sequence[tuple[int, int]], dim: int = 0) -> list[Any]:
    """The parts of a tensor at increasing ranges of an axis: views, by one call.

    Example:
        >>> import torch
        >>> [part.tolist() for part in cut(torch.arange(5), [(0, 1), (2, 4)])]
        [[0], [2, 3]]
    """
    sizes, own = _pieces(tuple(ranges), t.shape[dim])
    pieces = t.split_with_sizes(sizes, dim)
    return [pieces[i] for i in own]


@lru_cache(maxsize=4096)
def runs(units: tuple[Unit, ...]) -> tuple[tuple[Unit, ...], ...]:
    """Units of one row as runs of neighbouring columns: each can be one conv on a slice of the wide weight."""
    own = {u.id: u for u in units}
    return tuple(tuple(own[i] for i in range(first, last)) for first, last in spans(own))
