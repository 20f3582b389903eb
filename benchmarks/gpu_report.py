"""What a GPU's results say: a summary that fits a screen, and the README's tables. Nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]

NOT_MEASURED = "Not yet measured."
COMPILED = ("compiled", "compiled_graphs", "compiled_max")  # one contender in three modes: the best one counts
MACHINE = ("device", "torch", "cuda", "copy_gb_per_s", "bf16_tflop_per_s")
CASES = {
    "gpu": ("op", "backend", "dtype", "layout"),
    "gpu_step": ("net", "batch", "precision", "drop_path"),
    "gpu_memory": (),
}
BACKENDS = {"triton": ("Triton", "#0072b2"), "cuda": ("CUDA", "#d55e00")}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BRANCHES, CHANNELS = 3, 64  # of a kernel's row that does not say how many

# Per kernel: operations per element of a branch, operations per output element, passes over the branches' tensors, and
# outputs (or their gradients) passed, in units of a branch's elements. Read off fractal_kernels/triton: an
# addition, multiplication or comparison is one. What is done once per channel or per program counts nothing.
#   y - mean, *scale, +shift: 3    a ReLU or its gate: 1    the sum over the branches, with its factor: 1
#   2x2 window: 3 comparisons for 4 elements, of which one goes on    its gradient's route: 1
#   sums of dz and of dz*(y - mean): 3    dz*scale: 1, + centre + slope*(y - mean): 3    gradient*weight: 1 per output
#   statistics: y - one of the values 1, its sum 1, the sum of its squares 2; merges are per several values
COUNTS = {
    "stats": (4, 0, 1, 0),
    "mean": (1, 0, 1, 1),
    "forward": (5, 0, 1, 1),
    "forward_pool": (4.25, 0, 1, 0.25),
    "reduce": (7, 1, 1, 1),
    "reduce_pool": (8, 1, 1, 0.25),
    "apply": (8, 1, 2, 1),
    "apply_pool": (9, 1, 2, 0.25),
}


OLD_EAGER = (
    "The ratios against eager flatter us: its joins left channels_last, were float32 under autocast, and copied an "
    "index from the host, as in public code. The baseline has been mended since, and not been measured again."
)


class ReportError(Exception):
    """Something that the user has to put right; the text says what."""


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


# --- reading -----------------------------------------------------------------------------------


def is_gpu(result: Any) -> bool:
    return isinstance(result, dict) and "copy_gb_per_s" in (result.get("machine") or ())


def checked(result: dict[str, Any]) -> dict[str, list[Row]]:
    """The rows by group. What the tables need and the file lacks is named."""

    def need(mapping: Any, keys: Iterable[str], where: str) -> None:
        lacking = [key for key in keys if not isinstance(mapping, dict) or key not in mapping]
        if lacking:
            raise ReportError(f"{where}: no {', '.join(lacking)}")

    need(result, ("machine", "date", "commit", "command", "rows"), "result")
    need(result["machine"], MACHINE, "machine")
    groups: dict[str, list[Row]] = {group: [] for group in CASES}
    for at, row in enumerate(result["rows"]):
        need(row, ("group", "what"), f"row {at}")
        if row["group"] in CASES:
            where = f"row {row['what']!r}"
            need(row, ("unit", "contenders", "ratios", "extra"), where)
            need(row["contenders"], ("ours",), f"{where}, contenders")
            for name, figures in row["contenders"].items():
                need(figures, ("figure",), f"{where}, contender {name}")
            for name, figures in row["ratios"].items():
                need(figures, ("figures",), f"{where}, ratio {name}")
            need(row.get("case", {}), CASES[row["group"]], f"{where}, case")
            groups[row["group"]].append(row)
    groups["gpu_step"] = together(groups["gpu_step"])
    return groups


def together(rows: Sequence[Row]) -> list[Row]:
    """A row of each training step: what it was measured against comes in several, each with a figure of ours."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row["case"][name] for name in CASES["gpu_step"])
        of = found.setdefault(key, {**row, "contenders": {}, "ratios": {}, "extra": {}})
        for part in ("contenders", "ratios", "extra"):
            of[part] = {**row[part], **of[part]}  # ours of the first
    return list(found.values())


def rate(row: Row) -> float | None:
    """GB/s of what a kernel moves, by the time of the device where that was measured: no launches are in it."""
    return row["extra"].get("device_gb_per_s", row["extra"].get("gb_per_s"))


def share(row: Row) -> float | None:
    """Of a copy's rate, likewise."""
    return row["extra"].get("device_share_of_copy", row["extra"].get("share_of_copy"))


def label(row: Row) -> str:
    """A kernel by its name, and its branches and channels where they are not the usual ones; a function of two
    directions with the direction."""
    op, direction = row["case"]["op"], row["case"].get("direction")
    if direction and (op not in COUNTS or "share_of_copy" not in row["extra"]):
        return f"{op} {direction}"
    k = row["case"].get("branches", BRANCHES)
    channels = (row["case"].get("shape") or (0, CHANNELS))[1]
    others = [] if k == BRANCHES else [f"{k} branch{'es' if k > 1 else ''}"]
    others += [] if channels == CHANNELS else [f"{channels} channels"]
    return ", ".join([op, *others])


def ratio(row: Row, *names: str) -> float | None:
    """How many times as long as ours the fastest of these contenders takes."""
    return min((row["ratios"][name]["figures"] for name in names if name in row["ratios"]), default=None)


def best_compile(row: Row) -> float | None:
    return ratio(row, *COMPILED)


def times(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}×"


def span(values: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def megabytes(row: Row, what: str) -> str:
    """Of a step without graphs: those hold their memory between steps."""
    extra = row["extra"]
    if f"{what}_mb_ungraphed" not in extra:
        return "–"
    text = f"{number(extra[f'{what}_mb_ungraphed'])} MB"
    if extra.get(f"{what}_mb_eager"):
        text += f", {number(extra[f'{what}_mb_ungraphed'] / extra[f'{what}_mb_eager'])} of eager's"
    if what == "peak" and "graph_mb" in extra:
        text += f"; graphs hold {number(extra['graph_mb'])} MB"
    return text


def intensity(row: Row) -> float | None:
    """Operations per byte of a kernel's row; None of what is not counted."""
    case = row["case"]
    if case["op"] not in COUNTS or case["dtype"] not in BYTES or "gb_per_s" not in row["extra"]:
        return None
    if "share_of_copy" not in row["extra"]:
        return None  # a function that shares a kernel's name
    element, output, passes, outputs = COUNTS[case["op"]]
    k = case.get("branches", BRANCHES)
    return (k * element + output * outputs) / ((k * passes + outputs) * BYTES[case["dtype"]])


def step_rate(row: Row) -> float | None:
    """TFLOP/s of a training step in which nothing is dropped."""
    work = row["extra"].get("tflop")
    if work is None or row["case"]["drop_path"] != "off":
        return None
    return 1e3 * work / row["contenders"]["ours"]["figure"]


# --- lines -------------------------------------------------------------------------------------

STEP = ("net", "batch", "precision", "drop-path", "ours", "vs eager", "vs best torch.compile", "Triton", "ungraphed")
STEP += ("peak memory", "saved for backward")
STEP_WORDS = (  # what the columns that have figures need to be read
    ("ours", "Training steps as CUDA graphs on the CUDA kernels; ratios say how many times as long others take."),
    ("vs best torch.compile", "The best torch.compile is the fastest of its modes."),
    ("Triton", "Triton: ours on those kernels."),
    ("drop-path", "Under the mixture half of our steps run one column alone; the other half run everything and mask."),
    ("precision", "fp32 is without TF32."),
    (
        "peak memory",
        "Memory: without a graph, the most over all paths at any time, and what a forward pass with nothing dropped "
        "keeps.",
    ),
)


def step_cells(row: Row) -> tuple[str, ...]:
    case, ours = row["case"], f"{number(row['contenders']['ours']['figure'])} {row['unit']}"
    others = ("eager",), COMPILED, ("triton",), ("ungraphed",)
    ratios = (times(ratio(row, *names)) for names in others)
    names = [str(case[key]) for key in CASES["gpu_step"]]
    return *names, ours, *ratios, megabytes(row, "peak"), megabytes(row, "saved")


def memory_cells(row: Row) -> tuple[str, ...]:
    ours = f"{number(row['contenders']['ours']['figure'])} {row['unit']}"
    return row["what"], ours, times(ratio(row, "eager")), times(best_compile(row))


def kernel_cells(rows: Sequence[Row]) -> tuple[str, str]:
    """Of one op, dtype and backend over all shapes: bytes/s and share of a copy, and torch.compile's time."""
    rates = [value for row in rows if (value := rate(row)) is not None]
    shares = [value for row in rows if (value := share(row)) is not None]
    compiled = [value for row in rows if (value := best_compile(row)) is not None]
    moved = ([f"{number(max(rates))} GB/s"] if rates else []) + ([span(shares, percent)] if shares else [])
    return ", ".join(moved) or "–", span(compiled, times) if compiled else "–"


def kernel_table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    backends = [name for name in BACKENDS if any(row["case"]["backend"] == name for row in rows)]
    titles = [BACKENDS[name][0] for name in backends]
    lines: list[tuple[str, ...]] = [
        ("op", "dtype", *(text for title in titles for text in (title, f"{title} vs best torch.compile")))
    ]
    for op, dtype in dict.fromkeys((label(row), row["case"]["dtype"]) for row in rows):
        of = [row for row in rows if (label(row), row["case"]["dtype"]) == (op, dtype)]
        texts = [kernel_cells([row for row in of if row["case"]["backend"] == name]) for name in backends]
        lines.append((op, dtype, *(text for pair in texts for text in pair)))
    return lines


def markdown_table(lines: Sequence[Sequence[str]], names: int) -> str:
    """The first line is the header; the first `names` columns are words, the others figures: those without any are
    left out."""
    there = [i for i in range(len(lines[0])) if i < names or any(line[i] != "–" for line in lines[1:])]
    lines = [[line[i] for i in there] for line in lines]
    rule = "|" + "---|" * names + "---:|" * (len(lines[0]) - names)
    header, *rows = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([header, rule, *rows])


# --- the summary -------------------------------------------------------------------------------


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def clipped(lines: Sequence[str], most: int) -> list[str]:
    return [*lines] if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more"]


def stage_lines(stages: dict[str, Any]) -> list[str]:
    lines = []
    for name, stage in stages.items():
        said = (stage.get("said") or "").strip().splitlines() or [""]
        text = "FAILED, see below" if stage.get("failed") else said[0]
        lines.append(f"{name}: {stage.get('seconds', 0):.0f} s  {text}"[:118].rstrip())
    return lines


def failure_lines(stages: dict[str, Any]) -> list[str]:
    """The end of what a failed stage said: there the reason is. The fewer failed, the more lines each."""
    failed = {name: stage for name, stage in stages.items() if stage.get("failed")}
    lines = []
    for name, stage in failed.items():
        said = (stage.get("said") or "no output").strip().splitlines()[-max(1, 6 // len(failed)) :]
        lines += [f"{name} FAILED: {line.strip()}"[:118] for line in said]
    return lines


def extremes(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Per op: the worst and the best share of a copy and ratio to torch.compile, and where."""

    def where(row: Row) -> str:
        case = row["case"]
        shape = case.get("shape", "")
        shape = "×".join(map(str, shape)) if isinstance(shape, (list, tuple)) else str(shape)
        return f"({' '.join([case['backend'], case['dtype'], case['layout'], shape]).strip()})"

    def pair(of: Sequence[Row], value: Callable[[Row], float | None], form: Callable[[float], str]) -> list[str]:
        known = sorted(((v, i) for i, row in enumerate(of) if (v := value(row)) is not None))
        return [f"{form(v)} {where(of[i])}" for v, i in (known[0], known[-1])] if known else ["–", "–"]

    lines: list[tuple[str, ...]] = [("op", "worst", "best")]
    for op in dict.fromkeys(map(label, rows)):
        of = [row for row in rows if label(row) == op]
        if any("share_of_copy" in row["extra"] for row in of):
            lines.append((op, *pair(of, share, percent)))
        if any(best_compile(row) is not None for row in of):
            lines.append((f"{op} vs torch.compile", *pair(of, best_compile, times)))
    return lines


def summary(result: dict[str, Any]) -> str:
    """At most 60 lines: the machine, the stages, training steps, kernels, memory, and last what failed."""
    groups, machine, stages = checked(result), result["machine"], result.get("stages") or {}
    head = [
        f"{machine['device']}, PyTorch {machine['torch']}, CUDA {machine['cuda']}, {result['date'][:10]}, "
        f"{(result['commit'] or 'no commit')[:10]}",
        f"copy {number(machine['copy_gb_per_s'])} GB/s, bf16 {number(machine['bf16_tflop_per_s'])} TFLOP/s; clocks "
        f"{machine.get('clocks', 'unknown')}"[:118],
    ]
    sections = [head, clipped(stage_lines(stages), 9)]
    if steps := groups["gpu_step"]:
        # What does not fit is the best: nobody has to look at it.
        order = sorted(steps, key=lambda row: best_compile(row) or float("inf")) if len(steps) > 14 else steps
        sections.append(clipped(aligned([STEP, *map(step_cells, order)]), 15))
    if groups["gpu"]:
        sections.append(clipped(aligned(extremes(groups["gpu"])), 15))
    if groups["gpu_memory"]:
        header = ("memory", "ours", "vs eager", "vs torch.compile")
        sections.append(clipped(aligned([header, *map(memory_cells, groups["gpu_memory"])]), 5))
    sections.append(clipped(failure_lines(stages), 8))
    return "\n\n".join("\n".join(section) for section in sections if section)


# --- the README --------------------------------------------------------------------------------


def plots_of(result: dict[str, Any]) -> list[str]:
    """The plots for which the result has figures."""
    groups = checked(result)
    there = {
        "kernels": any("share_of_copy" in row["extra"] for row in groups["gpu"]),
        "steps": bool(groups["gpu_step"]),
        "roofline": any(intensity(row) for row in groups["gpu"]) or any(map(step_rate, groups["gpu_step"])),
    }
    return [kind for kind, drawn in there.items() if drawn]


def markdown(result: dict[str, Any], name: str) -> str:
    """What stands between the README's markers for one GPU; `name`: what its files are called."""
    groups, parts = checked(result), []
    if steps := groups["gpu_step"]:
        cells = list(map(step_cells, steps))
        legend = [words for title, words in STEP_WORDS if any(line[STEP.index(title)] != "–" for line in cells)]
        parts.append(" ".join(legend))
        if any("eager" in row["ratios"] and "eager" not in row["extra"] for row in steps):
            parts.append(OLD_EAGER)
        parts.append(markdown_table([STEP, *cells], 4))
    kernels = [row for row in groups["gpu"] if row["case"]["layout"] == "nhwc" and row["case"]["dtype"] != "fp16"]
    if kernels:
        parts += [
            "Kernels and functions in channels_last: bytes moved per second of the device's time, and as a share of "
            "what a copy of as many bytes reaches on it. stats and reduce write next to nothing, so they can be faster "
            "than a copy. Where torch.compile was measured, how many times as long it takes.",
            markdown_table(kernel_table(kernels), 2),
        ]
    if memory := groups["gpu_memory"]:
        header = ("memory", "ours", "vs eager", "vs best torch.compile")
        parts.append(markdown_table([header, *map(memory_cells, memory)], 1))
    machine, commit = result["machine"], result["commit"] or "no commit"
    parts.append(
        f"{machine['device']}, a copy {number(machine['copy_gb_per_s'])} GB/s read and written, products in bf16 "
        f"{number(machine['bf16_tflop_per_s'])} TFLOP/s, PyTorch {machine['torch']}, CUDA {machine['cuda']}; "
        f"{result['date'][:10]}, {commit[:10]}, `{result['command']}`."
    )
    tests = (result.get("stages") or {}).get("test", {})
    if tests.get("failed"):
        parts.append("The tests of this round failed: see its log. Every row was held against a reference before.")
    elif tests:
        parts.append(f"Tests on this GPU: {tests['said'].splitlines()[0]}.")
    if links := [f"[{kind}](benchmarks/results/{name}-{kind}.svg)" for kind in plots_of(result)]:
        parts.append(f"Plots: {', '.join(links)}.")
    return "\n\n".join(parts)
