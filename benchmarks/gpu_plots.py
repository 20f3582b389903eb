"""Plots of a GPU's results, as SVG: kernels against a copy, training steps, and the roofline."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import (
    BACKENDS,
    COUNTS,
    ReportError,
    Row,
    checked,
    intensity,
    label,
    number,
    plots_of,
    rate,
    share,
    step_rate,
)

CONTENDERS = {
    "ours": ("ours, as a CUDA graph", "#0072b2", "o"),
    "triton": ("the same on Triton", "#009e73", "o"),
    "ungraphed": ("ours, without the graph", "#56b4e9", "o"),
    "eager": ("eager", "#8c8c8c", "s"),
    "ours_compiled": ("ours, torch.compile's graphs", "#cc79a7", "o"),
    "compiled": ("torch.compile", "#f0b000", "D"),
    "compiled_graphs": ("torch.compile, reduce-overhead", "#d55e00", "D"),
    "compiled_max": ("torch.compile, max-autotune", "#7a2e00", "D"),
}
FILLS = {"bf16": "full", "fp16": "left", "fp32": "none"}
LAYOUTS = {"nhwc": ("NHWC", "o"), "nchw": ("NCHW", "s")}
MARKS = dict(zip(COUNTS, "vo^<sDP*", strict=True))
GREY, BLACK = "#8c8c8c", "#1b1b1b"
Entries = list[tuple[str, dict[str, Any]]]


def canvas(height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, height), layout="constrained")
    ax = drawn.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_title(title, fontsize=11)
    return drawn, ax


def legend(drawn: Any, entries: Entries) -> None:
    """Of markers alone, below the axes."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **({"linestyle": "none"} | style), label=text) for text, style in entries]
    columns = len(handles) if len(handles) < 4 else (len(handles) + 1) // 2 if len(handles) < 8 else 5
    drawn.legend(handles=handles, frameon=False, loc="outside lower center", ncols=columns, fontsize=9)


def name_rows(ax: Any, texts: Sequence[str], places: Sequence[float]) -> None:
    """Places from the top downwards, each with its words at the left."""
    ax.set_yticks(places, texts)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_ylim(places[-1] + 0.7, places[0] - 0.7)


def look(row: Row) -> dict[str, Any]:
    """Backend by colour, dtype by filling."""
    case = row["case"]
    fill = FILLS.get(case["dtype"], "full")
    return {"color": BACKENDS.get(case["backend"], ("", GREY))[1], "fillstyle": fill, "markersize": 6}


def lanes_of(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """A row of every backend and dtype there is, in a fixed order."""
    return dict(sorted({(row["case"]["backend"], row["case"]["dtype"]): row for row in rows}.items(), reverse=True))


def lane_entries(lanes: dict[tuple[str, str], Row]) -> Entries:
    return [(f"{BACKENDS.get(b, (b, ''))[0]}, {d}", look(row) | {"marker": "o"}) for (b, d), row in lanes.items()]


def draw_kernels(groups: dict[str, list[Row]], machine: dict[str, Any]) -> Any:
    """Every row with a share of a copy: a line per op, in it a lane per backend and dtype."""
    rows = [row for row in groups["gpu"] if share(row) is not None]
    ops, lanes = list(dict.fromkeys(map(label, rows))), lanes_of(rows)
    order = list(lanes)
    drawn, ax = canvas(1.8 + 0.13 * len(ops) * max(len(lanes), 3), f"Kernels on {machine['device']}")
    for row in rows:
        case = row["case"]
        lane = (order.index((case["backend"], case["dtype"])) + 0.5) / len(lanes) - 0.5
        ax.plot(
            100 * share(row), ops.index(label(row)) + 0.8 * lane, LAYOUTS.get(case["layout"], ("", "x"))[1], **look(row)
        )
    for line in range(1, len(ops)):
        ax.axhline(line - 0.5, color="#e6e6e6", linewidth=0.8)
    ax.axvline(100, color=BLACK, linewidth=1, linestyle=(0, (4, 4)))
    name_rows(ax, ops, range(len(ops)))
    ax.set_xlim(0, max(105, *(103 * share(row) for row in rows)))
    ax.set_xlabel("bandwidth, in % of a copy of as many bytes")
    used = [LAYOUTS[key] for key in LAYOUTS if any(row["case"]["layout"] == key for row in rows)]
    legend(drawn, lane_entries(lanes) + [(text, {"marker": mark, "color": GREY}) for text, mark in used])
    return drawn


def draw_steps(groups: dict[str, list[Row]], machine: dict[str, Any]) -> Any:
    """A line per training step, its contenders by time."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = groups["gpu_step"]
    places, texts, before = [], [], None
    for row in rows:
        case = row["case"]
        net = f"{case['net']}, batch {case['batch']}"
        places.append((places[-1] + (1.0 if net == before else 1.6)) if places else 0.0)
        texts.append(f"{net}, {case['precision']}, drop-path {case['drop_path']}")
        before = net
    drawn, ax = canvas(1.7 + 0.24 * (places[-1] + 1), f"Training step on {machine['device']}")
    for row, place in zip(rows, places, strict=True):
        known = {name: f["figure"] for name, f in row["contenders"].items() if name in CONTENDERS}
        ax.plot([min(known.values()), max(known.values())], [place, place], color="#d0d0d0", linewidth=1, zorder=1)
        for name, value in reversed(known.items()):  # ours comes first and is drawn last, on top
            ax.plot(value, place, CONTENDERS[name][2], color=CONTENDERS[name][1], markersize=6)
    name_rows(ax, texts, places)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("time of a step (ms)")
    shown = [words for name, words in CONTENDERS.items() if any(name in row["contenders"] for row in rows)]
    legend(drawn, [(text, {"marker": mark, "color": colour}) for text, colour, mark in shown])
    return drawn


def draw_roofline(groups: dict[str, list[Row]], machine: dict[str, Any]) -> Any:
    """Kernels in channels_last under what a copy and a product of matrices reach here; training steps, whose bytes
    nobody counts, at the right edge."""
    copy, compute = 1e-3 * machine["copy_gb_per_s"], machine["bf16_tflop_per_s"]
    points = [(row, x) for row in groups["gpu"] if row["case"]["layout"] == "nhwc" and (x := intensity(row))]
    steps = [reached for row in groups["gpu_step"] if (reached := step_rate(row))]
    drawn, ax = canvas(5.6, f"Roofline of {machine['device']}")
    left, knee = min([0.05, *(x / 2 for _, x in points)]), compute / copy
    right = 4 * knee
    ax.plot([left, knee, right], [left * copy, compute, compute], color=BLACK, linewidth=1.5)
    ax.annotate(f"bf16 products: {number(compute)} TFLOP/s", (knee, compute), (-6, 4), ha="right", **OFFSET)
    middle = (left * knee) ** 0.5
    ax.annotate(f"copy: {number(1e3 * copy)} GB/s", (middle, middle * copy), (-8, 2), ha="right", **OFFSET)
    for row, x in points:
        ax.plot(x, 1e-3 * x * rate(row), MARKS[row["case"]["op"]], **look(row))
    for reached in steps:
        ax.plot(right, reached, "X", color="#009e73", markersize=7, clip_on=False)
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylabel="rate (TFLOP/s)")
    ax.set_xlabel("operations per byte moved (flop/byte)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ops = [op for op in COUNTS if any(row["case"]["op"] == op for row, _ in points)]
    entries = lane_entries(lanes_of([row for row, _ in points]))
    entries += [(op, {"marker": MARKS[op], "color": GREY}) for op in ops]
    if steps:
        entries.append(("training steps (bytes not counted)", {"marker": "X", "color": "#009e73"}))
    legend(drawn, entries)
    return drawn


OFFSET = {"textcoords": "offset points", "va": "bottom", "fontsize": 9}
DRAW = {"kernels": draw_kernels, "steps": draw_steps, "roofline": draw_roofline}


def plot(result: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes the plots of a result as <name>-<kind>.svg. The same figures give the same
    bytes: no date, ids from a fixed salt, nothing of the user's style."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise ReportError(f"plots need matplotlib: pip install matplotlib ({error})") from error
    groups = checked(result)
    files = {kind: Path(folder) / f"{name}-{kind}.svg" for kind in plots_of(result)}
    for kind, path in files.items():
        buffer = io.BytesIO()
        with style.context(["default", {"svg.hashsalt": kind}]):
            DRAW[kind](groups, result["machine"]).savefig(
                buffer, format="svg", metadata={"Date": None, "Creator": None}
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return list(files.values())
