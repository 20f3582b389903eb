"""The schedule and the live set against a brute-force expansion of the recursive rule."""

import itertools
import random

import pytest
import torch

from fractal_kernels.schedule import everything, live_units, plan, runs, schedule


def expand(level: int, columns: int, row: int, source: int):
    """f_level from `row`, reading the join of row `source` (-1: the input): [(column, step, source row, end row)]."""
    column, span = columns - level, 2 ** (level - 1)
    convs = [(column, row // span, source, row + span - 1)]
    if level > 1:
        half = span // 2
        convs += expand(level - 1, columns, row, source)
        convs += expand(level - 1, columns, row + half, row + half - 1)
    return convs


def needed(columns: int, convs, keep) -> set:
    """Follows the path backward from the last join, conv by conv."""
    live, wanted = set(), [2 ** (columns - 1) - 1]
    while wanted:
        row = wanted.pop()
        for column, step, source, end in convs:
            if end == row and keep[row * columns + column] and (column, step) not in live:
                live.add((column, step))
                if source >= 0:
                    wanted.append(source)
    return live


@pytest.mark.parametrize("columns", range(1, 9))
def test_schedule_is_the_recursive_rule(columns):
    s = schedule(columns)
    expected = sorted((c, j, source + 1, end) for c, j, source, end in expand(columns, columns, 0, -1))
    assert sorted(tuple(u)[1:] for u in s.units) == expected
    assert len(s.units) == 2**columns - 1
    assert [u.id for row in s.starts for u in row] == list(range(len(s.units)))
    for row in range(s.rows):
        for units in (s.starts[row], s.ends[row]):  # contiguous ranges that end with the deepest column
            assert [u.column for u in units] == list(range(columns - len(units), columns))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_live_set_exhaustive(columns):
    convs = expand(columns, columns, 0, -1)
    rows = 2 ** (columns - 1)
    checked = 0
    for keep in itertools.product((False, True), repeat=rows * columns):
        try:
            p = plan(columns, keep)
        except ValueError:
            continue
        checked += 1
        units = schedule(columns).units
        assert {(units[i].column, units[i].step) for i in p.units} == needed(columns, convs, keep)
    assert checked > 0


@pytest.mark.parametrize("columns", [4, 5, 6])
def test_live_set_random(columns):
    convs, rng = expand(columns, columns, 0, -1), random.Random(columns)
    units, rows = schedule(columns).units, 2 ** (columns - 1)
    for _ in range(100):
        keep = tuple(rng.random() < 0.8 or c == columns - 1 for _ in range(rows) for c in range(columns))
        p = plan(columns, keep)
        assert {(units[i].column, units[i].step) for i in p.units} == needed(columns, convs, keep)


@pytest.mark.parametrize("columns", [1, 3, 5])
def test_live_units_of_samples(columns):
    """Of tensors, one path per sample; joins that keep nothing are allowed there."""
    s, convs = schedule(columns), expand(columns, columns, 0, -1)
    keep = torch.rand(s.rows, columns, 40, generator=torch.Generator().manual_seed(columns)) < 0.7
    live = torch.stack(live_units(s, keep))
    for n in range(40):
        expected = needed(columns, convs, keep[..., n].flatten().tolist())
        assert {(u.column, u.step) for u in s.units if live[u.id, n]} == expected


def test_live_work_of_the_mixture():
    """The design's expected share of live convs under half global, half local paths with 15 % drop."""
    rng = random.Random(0)
    for columns, share in ((3, 0.59), (4, 0.55), (5, 0.52)):
        s, total = schedule(columns), 0.0
        for column in range(columns):
            keep = tuple(c == column for _ in range(s.rows) for c in range(columns))
            total += len(plan(columns, keep).units) / len(s.units) / columns / 2
        local = 0.0
        for _ in range(1000):
            keep = [False] * (s.rows * columns)
            for row, units in enumerate(s.ends):
                kept = [u for u in units if rng.random() >= 0.15] or [rng.choice(units)]
                for u in kept:
                    keep[row * columns + u.column] = True
            local += len(plan(columns, tuple(keep)).units) / len(s.units) / 1000
        assert abs(total + local / 2 - share) < 0.02


def test_runs():
    starts = schedule(3).starts[0]
    assert [len(r) for r in runs(starts)] == [3]
    assert [len(r) for r in runs((starts[0], starts[2]))] == [1, 1]
    assert everything(3).units == tuple(range(7))


def test_errors():
    with pytest.raises(ValueError, match=r"schedule: expected columns from 1 to 8, got 9"):
        schedule(9)
    with pytest.raises(ValueError, match=r"plan: expected keep of 2\*2 values, got 3"):
        plan(2, (True,) * 3)
    with pytest.raises(ValueError, match="fractal_block: expected the path to keep a branch of the join of row 1"):
        plan(2, (True, True, False, False))
    with pytest.raises(ValueError, match="fractal_block: expected the path to keep a branch of the join of row 0"):
        plan(2, (True, False, False, True))  # whose reader lives
