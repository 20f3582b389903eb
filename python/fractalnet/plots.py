"""The plots of the demo and the studies, as PNG bytes. Drawn without pyplot: no window, no global state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

FULL = "#1b1b1b"
FUSED, EAGER = "#0072b2", "#c8c8c8"


def figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = list(drawn.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return drawn, axes


def png(drawn: Any) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def column_colours(count: int) -> list[Any]:
    """From light to dark with depth."""
    from matplotlib import colormaps

    return [colormaps["plasma"](0.8 - 0.7 * i / max(count - 1, 1)) for i in range(count)]


def losses(history: Sequence[dict[str, Any]]) -> bytes:
    """Hold-out loss of the full network and of every column alone, epoch by epoch."""
    from matplotlib.ticker import MaxNLocator

    drawn, (ax,) = figure(7, 4.2)
    epochs = [h["epoch"] for h in history]
    names = list(history[0]["holdout"])
    colours = dict(zip(names[1:], column_colours(len(names) - 1), strict=True))
    marker = "o" if len(epochs) < 3 else None
    for name in [*names[1:], names[0]]:
        values = [h["holdout"][name]["loss"] for h in history]
        label = "full network" if name == "full" else f"{name} alone"
        width = 2.2 if name == "full" else 1.5
        ax.plot(epochs, values, color=colours.get(name, FULL), linewidth=width, label=label, marker=marker)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("epoch")
    ax.set_ylabel("hold-out loss (cross-entropy, nats)")
    ax.set_title("Loss of the full network and of every column alone")
    ax.legend(frameon=False)
    return png(drawn)


def accuracies(columns: Sequence[dict[str, Any]]) -> bytes:
    """Hold-out accuracy against depth; the bars are the standard error of so many images (Wilson's interval)."""
    from matplotlib.ticker import NullLocator

    drawn, (ax,) = figure(6, 4.2)
    alone = [c for c in columns if c["column"] is not None]
    full = next(c for c in columns if c["column"] is None)
    images = full["images"]

    def percent(c: dict[str, Any]) -> tuple[float, float, float]:
        """Accuracy, and how far Wilson's interval of one standard error reaches down and up."""
        share = c["accuracy"]
        middle = (share + 0.5 / images) / (1 + 1 / images)
        half = math.sqrt(share * (1 - share) / images + 0.25 / images**2) / (1 + 1 / images)
        return 100 * share, max(0.0, 100 * (share - middle + half)), max(0.0, 100 * (middle + half - share))

    values, *errors = zip(*map(percent, alone), strict=True)
    depths = [c["depth"] for c in alone]
    style = {"marker": "o", "markersize": 6, "capsize": 3, "linewidth": 1.5, "elinewidth": 1}
    ax.errorbar(depths, values, yerr=errors, color=FUSED, label="each column alone", **style)
    value, *error = percent(full)
    aside = full["depth"] * 1.06  # beside the deepest column, which is as deep
    single = style | {"marker": "s"}
    ax.errorbar([aside], [value], yerr=[[e] for e in error], color=FULL, label="full network", **single)
    ax.axhline(value, color=FULL, linewidth=0.8, linestyle=(0, (4, 4)))
    for depth, share, ha in [*zip(depths, values, ["right"] * len(depths), strict=True), (aside, value, "left")]:
        shift = -7 if ha == "right" else 7
        place = {"textcoords": "offset points", "ha": ha, "va": "bottom", "fontsize": 9}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        ax.annotate(f"{share:.1f} %", (depth, share), (shift, 4), **place)
    ax.set_xscale("log", base=2)
    ax.set_xticks(depths, [str(d) for d in depths])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(depths[0] / 1.4, depths[-1] * 1.4)
    ax.set_xlabel("depth (convolutions)")
    ax.set_ylabel("hold-out accuracy (%)")
    ax.set_title(f"Accuracy against depth ({images} hold-out images, bars: standard error)", fontsize=11)
    drawn.legend(frameon=False, loc="outside lower center", ncols=2)
    return png(drawn)


def steps(measured: dict[str, Any]) -> bytes:
    """Time of a training step and bytes saved for backward, fused and eager."""
    drawn, axes = figure(7, 3.6, panels=2)
    names = [name for name in ("fused", "eager") if name in measured]
    panels = (
        ("ms", 1.0, "time per step (ms)", "Training step", "speedup", "{:.1f}x as fast"),
        ("saved_bytes", 1e-6, "saved for backward (MB)", "Memory of a step", "saved_share", "{:.2f}x the bytes"),
    )
    for ax, (key, unit, label, title, ratio, words) in zip(axes, panels, strict=True):
        values = [unit * measured[name][key] for name in names]
        bars = ax.bar(names, values, color=[{"fused": FUSED, "eager": EAGER}[name] for name in names], width=0.6)
        ax.bar_label(bars, fmt="%.1f" if max(values) >= 10 else "%.2f", padding=2)
        ax.set_ylim(0, 1.15 * max(values))
        ax.set_ylabel(label)
        ax.set_title(f"{title}: {words.format(measured[ratio])}" if ratio in measured else title, fontsize=11)
        ax.grid(visible=False, axis="x")
    turn = ", measured in turn" if len(names) > 1 else ""
    drawn.supxlabel(
        f"batch of {measured['batch_size']}; time: drop-path mixture{turn}; memory: nothing dropped", fontsize=9
    )
    return png(drawn)


# --- studies ---------------------------------------------------------------------------------------

KINDS = {
    "plain": ("#d55e00", "plain network"),
    "whole": (FUSED, "fractal, nothing dropped"),
    "local": ("#009e73", "fractal, local drop-path"),
    "mixture": (FULL, "fractal, drop-path mixture"),
}


def averaged(runs: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Epochs, and the geometric mean over the seeds of a loss at each of them."""
    epochs = [h["epoch"] for h in runs[0]["history"]]
    seeds = [[h["losses"][name] for h in run["history"]] for run in runs]
    return epochs, [math.exp(sum(map(math.log, values)) / len(values)) for values in zip(*seeds, strict=True)]


def loss_axis(ax: Any) -> None:
    """From chance (log of 10 classes, marked) down; what is worse than twice that is not worth the room."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(top=2 * math.log(10))
    ax.axhline(math.log(10), color="#999999", linewidth=0.8, linestyle=(0, (4, 4)))
    ax.set_xlabel("epoch")


def columns(runs: Sequence[dict[str, Any]]) -> bytes:
    """Training loss over time of every column of a network trained with drop-path, and of the plain network of equal
    depth: the paper's figure 3. One panel for each of the largest numbers of columns, four at most."""
    counts = sorted({run["columns"] for run in runs})[-4:]
    drawn, axes = figure(2.6 + 2.6 * len(counts), 4, panels=len(counts))
    colours = column_colours(counts[-1])
    for ax, count in zip(axes, counts, strict=True):
        of = {kind: [run for run in runs if (run["columns"], run["kind"]) == (count, kind)] for kind in KINDS}
        lines = [("mixture", f"column {c}", {"color": colours[c], "linewidth": 1.4}) for c in range(count)]
        lines += [
            ("mixture", "full", {"color": FULL, "linewidth": 2.2, "label": "full network, drop-path mixture"}),
            ("whole", "full", {"color": FUSED, "linestyle": ":", "label": "full network, nothing dropped"}),
            ("plain", "plain", {"color": KINDS["plain"][0], "linestyle": "--", "label": "plain network"}),
        ]
        for kind, name, style in lines:
            if of[kind]:
                ax.plot(*averaged(of[kind], name), **({"label": f"{name} alone"} | style))
        loss_axis(ax)
        ax.set_title(
            f"C = {count}: {next(run['depth'] for run in runs if run['columns'] == count)} layers", fontsize=11
        )
    axes[0].set_ylabel("training loss (cross-entropy, nats)")
    labels = dict(zip(*reversed(axes[-1].get_legend_handles_labels()), strict=True))
    drawn.legend(labels.values(), labels, frameon=False, loc="outside lower center", ncols=5, fontsize=9)
    return png(drawn)


def depth(runs: Sequence[dict[str, Any]]) -> bytes:
    """Training loss after the last epoch, and hold-out error, against depth; dots are the seeds."""
    drawn, axes = figure(9, 4, panels=2)
    drawn_kinds = [kind for kind in KINDS if any(run["kind"] == kind for run in runs)]
    lines = [(kind, "plain" if kind == "plain" else "full", *KINDS[kind]) for kind in drawn_kinds]
    if "mixture" in drawn_kinds:
        lines.append(("mixture", None, "#999999", "its deepest column alone"))
    panels = (
        (axes[0], "training loss (cross-entropy, nats)", lambda run, name: run["history"][-1]["losses"][name]),
        (axes[1], "hold-out error (%)", lambda run, name: 100 * (1 - run["holdout"][name]["accuracy"])),
    )
    for ax, label, value in panels:
        for kind, name, colour, words in lines:
            points: dict[int, list[float]] = {}
            for run in (run for run in runs if run["kind"] == kind):
                of = name or f"column {run['columns'] - 1}"
                points.setdefault(run["depth"], []).append(value(run, of))
            ax.plot(list(points), [sum(v) / len(v) for v in points.values()], color=colour, label=words)
            for at, values in points.items():
                ax.plot([at] * len(values), values, "o", color=colour, markersize=3)
        depths = sorted({run["depth"] for run in runs})
        ax.set_xscale("log", base=2)
        ax.set_xticks(depths, [str(d) for d in depths])
        ax.minorticks_off()
        ax.set_xlabel("depth (convolutions)")
        ax.set_ylabel(label)
    axes[0].axhline(math.log(10), color="#999999", linewidth=0.8, linestyle=(0, (4, 4)))
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    drawn.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4, fontsize=9)
    return png(drawn)


def early_exit(rows: Sequence[dict[str, Any]]) -> bytes:
    """Accuracy against time: each column alone, the full network, and early exit from the least confidence to the
    highest."""
    drawn, (ax,) = figure(6, 4.2)
    alone = [row for row in rows if row["name"].startswith("column")]
    exits = [row for row in rows if row["confidence"] is not None]
    full = next(row for row in rows if row["name"] == "full")
    for part, colour, label, style in (
        (alone, FUSED, "each column alone", "o-"),
        (exits, "#d55e00", "early exit, by confidence", "s-"),
        ([full], FULL, "full network", "D"),
    ):
        times, shares = [row["ms"] for row in part], [100 * row["accuracy"] for row in part]
        ax.plot(times, shares, style, color=colour, label=label, markersize=5, linewidth=1.3)
    for row in (exits[0], exits[-1]):
        ax.annotate(f"{row['confidence']:g}", (row["ms"], 100 * row["accuracy"]), (5, -12), textcoords="offset points")
    ax.margins(y=0.12)
    ax.set_xlabel("time for the whole hold-out (ms)")
    ax.set_ylabel("hold-out accuracy (%)")
    ax.legend(frameon=False)
    return png(drawn)


def probes(rows: Sequence[dict[str, Any]]) -> bytes:
    """Hold-out accuracy of linear probes against depth, on the joins and on each column alone."""
    drawn, (ax,) = figure(7, 4.2)
    places = list(dict.fromkeys(row["where"] for row in rows))
    colours = [FULL, *column_colours(len(places) - 1)]
    for place, colour in zip(places, colours, strict=True):
        points = [(row["depth"], 100 * row["accuracy"]) for row in rows if row["where"] == place]
        label = "joins of the full network" if place == "join" else f"{place} alone"
        ax.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4, linewidth=1.3)
    ax.set_xlabel("depth (convolutions)")
    ax.set_ylabel("hold-out accuracy of a linear probe (%)")
    ax.legend(frameon=False)
    return png(drawn)
