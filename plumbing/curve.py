"""What log.jsonl says, and the picture of it: losses, HellaSwag, learning rate, and OpenAI's numbers beside them.

    read_log(path)          returns the lines of a log
    last(lines, kind)       returns the last line of a kind
    draw(runs, out, x)      draws one or more logs into a .png, .svg or .pdf
"""
import contextlib
import io
import json
import math
import os
import re
import sys
from pathlib import Path

from plumbing import published
from plumbing.files import atomic_write, set_aside

PROGRAM = "train_gpt2.py"  # as a picture names what has drawn it
STYLES = (  # color, line and marker of each run; dark and light alternate, so that greyscale keeps them apart
    ("#08306b", "-", "o"), ("#fd8d3c", "-", "s"), ("#00441b", "--", "^"), ("#df65b0", "--", "D"),
    ("#252525", "-.", "v"), ("#41b6c4", "-.", "P"),
)
X_LABELS = {"tokens": "tokens", "steps": "optimizer steps", "hours": "hours of training"}
LONG = 1000  # steps; of a longer run the steep start is left out of the picture


def read_log(path) -> list[dict]:
    """Return the whole lines of a log.jsonl, or of the one in a folder. Raises OSError if there is none."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(clean(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError):  # torn by a crash, unfinished, or foreign
            continue
    return lines


def clean(line: dict) -> dict:
    """Bring a line into the form in which training writes it: a bad number becomes None, a missing dict empty.

    Raises ValueError, TypeError or KeyError if nothing can be made of it.
    """
    if line["kind"] == "run":
        parts = ("config", "data", "model", "versions")
        return {**line, **{key: line[key] if isinstance(line.get(key), dict) else {} for key in parts}}
    if line["kind"] not in ("train", "val", "hellaswag") or not 0 <= line["step"] < 2**53:
        raise ValueError("not a line of numbers")
    numbers = {key: value if isinstance(value, (int, float)) and abs(value) < 1e30 else None
               for key, value in line.items() if key not in ("kind", "skipped")}
    return {**line, **numbers}


def last(lines: list[dict], kind: str) -> dict:
    """Return the last line of a kind, or an empty one."""
    return next((line for line in reversed(lines) if line["kind"] == kind), {})


def is_fineweb_edu(lines: list[dict]) -> bool:
    """Return whether a run's data are FineWeb-Edu, according to the manifest of its shards."""
    source = str(last(lines, "run").get("data", {}).get("source"))
    return bool(re.match(r"(HuggingFaceFW/fineweb-edu|kjj0/finewebedu10B-gpt2)([@/]|$)", source))


def series(lines: list[dict], kind: str, key: str, x: str):
    """Return x and y, (n,) arrays each, of one number of the log, without the missing ones; x as in X_LABELS."""
    import numpy as np

    points = [(line["step"], line[key]) for line in lines if line["kind"] == kind and line.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T  # (n,) each
    if x == "tokens":
        return steps * last(lines, "run").get("config", {}).get("total_batch_size", 1), values
    if x == "hours":
        timed = [(line["step"], line.get("dt_ms") or 0) for line in lines if line["kind"] == "train"]
        train = np.array([(0, 0), *timed], dtype=float)  # (n + 1, 2)
        return np.interp(steps, train[:, 0], train[:, 1].cumsum() / 3.6e6), values
    return steps, values


def smooth(values):
    """Average each of (n,) values with its neighbours: 2 % of all, at least 9, fewer at both ends -> (n,)."""
    import numpy as np

    i, n = np.arange(len(values)), len(values)
    reach = np.minimum(np.minimum(i, n - 1 - i), max(4, n // 100))
    first, end = i - reach, i + reach + 1
    total = np.concatenate(([0.0], np.cumsum(values)))  # (n + 1,)
    return (total[end] - total[first]) / (end - first)


def final_train_loss(lines: list[dict]) -> float:
    """Return the mean training loss of the last 20 steps that have one; nan if there is none."""
    losses = [line["loss"] for line in lines if line["kind"] == "train" and line.get("loss") is not None][-20:]
    return sum(losses) / len(losses) if losses else math.nan


def short(count: float) -> str:
    """Format a number of tokens with k, M, B or T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def draw(runs: dict[str, list[dict]], out, x: str = "tokens") -> None:
    """Draw {name: lines of its log} into the picture `out`, atomically.

    Raises OSError if it cannot be written, and ModuleNotFoundError if matplotlib is missing.
    """
    out, picture = Path(out), io.BytesIO()
    is_png = out.suffix == ".png"
    make_figure(runs, x).savefig(picture, format=out.suffix[1:], metadata={"Software": PROGRAM} if is_png else None)
    if is_png and out.is_file() and PROGRAM.encode() not in out.read_bytes()[:1000]:
        set_aside(out, "is no picture of a run")
    with atomic_write(out) as file:
        file.write(picture.getvalue())


@contextlib.contextmanager
def no_backend():
    """Import matplotlib without the back end that MPLBACKEND names, which it may lack; a notebook's is kept for it."""
    is_first, named = "matplotlib" not in sys.modules, os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib

        if is_first and named:
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = named
        yield
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


def make_figure(runs: dict[str, list[dict]], x: str):
    """Make a matplotlib Figure of {name: lines of its log}, 800 pixels wide.

    Its panels share x: loss, HellaSwag if it was measured, learning rate.
    """
    with no_backend():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    scored = any(line["kind"] == "hellaswag" for lines in runs.values() for line in lines)
    heights = [3.0, 1.3, 0.9] if scored else [3.0, 0.9]
    figure = Figure(figsize=(8, sum(heights) + 0.9 + 0.2 * len(runs)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    entries, lows, highs = [], [], []  # entries of the legend; losses between which the axis must reach
    for i, (name, lines) in enumerate(runs.items()):
        entries.append(plot_run(panels, name, lines, x, STYLES[i % len(STYLES)]))
        low, high = loss_limits(lines)
        lows += low
        highs += high
    if any(map(is_fineweb_edu, runs.values())):
        entries.append(plot_openai(panels))
        lows.append(published.LOSS)
    if highs:
        margin = 0.05 * (max(highs) - min(lows)) or 0.1
        panels[0].set_ylim(min(lows) - margin, max(highs) + margin)
    label_axes(panels, x)
    figure.align_ylabels()
    figure.legend(handles=entries, loc="outside upper center", fontsize=9, frameon=False)  # above: it covers nothing
    return figure


def plot_run(panels: list, name: str, lines: list[dict], x: str, style: tuple[str, str, str]):
    """Plot one run into the panels; return its entry in the legend, with the last value of each curve."""
    from matplotlib.lines import Line2D

    color, dashes, marker = style
    dots = dict(color=color, marker=marker, markersize=5, markeredgecolor="white")
    loss, *hellaswag, rate = panels
    steps, train = series(lines, "train", "loss", x)
    loss.plot(steps, train, color=color, alpha=0.25, linewidth=0.6)
    loss.plot(steps, smooth(train), color=color, linestyle=dashes, linewidth=1.6)
    steps, val = series(lines, "val", "loss", x)
    loss.plot(steps, val, linestyle="none", **dots)
    steps, scores = series(lines, "hellaswag", "acc_norm", x)
    for panel in hellaswag:
        panel.plot(steps, scores, linestyle=dashes, **dots)
    rate.plot(*series(lines, "train", "lr", x), color=color, linestyle=dashes, linewidth=1.4)
    results = [f"train {final_train_loss(lines):.4f}"] if len(train) else []
    results += [*(f"validation {y:.4f}" for y in val[-1:]), *(f"HellaSwag {y:.2%}" for y in scores[-1:])]
    label = f" {name}: {', '.join(results)}".replace("$", r"\$")  # a leading _ would hide it, $ begins a formula
    return Line2D([], [], linestyle=dashes, label=label, **dots)


def loss_limits(lines: list[dict]) -> tuple[list[float], list[float]]:
    """Return losses of a run that must not lie below the axis, and losses that must not lie above it.

    The luckiest 1 % of the steps may lie below, and the steep start of a long run above.
    """
    import numpy as np

    train, val = (series(lines, kind, "loss", "steps")[1] for kind in ("train", "val"))
    low = [*np.sort(train)[len(train) // 100:][:1], *val]
    if len(train) > LONG:
        return low, [*smooth(train)[len(train) // 50:][:1], *val[-1:]]
    return low, [*train, *val]


def plot_openai(panels: list):
    """Plot OpenAI's published numbers as dotted lines; return their entry in the legend."""
    from matplotlib.lines import Line2D

    style = dict(color="black", linestyle=":", linewidth=1.2)
    loss, *hellaswag, _ = panels
    loss.axhline(published.LOSS, **style)
    for panel in hellaswag:
        panel.axhline(published.HELLASWAG_ACC_NORM, **style)
    label = f" OpenAI's GPT-2 124M, published: {published.LOSS}, HellaSwag {published.HELLASWAG_ACC_NORM:.2%}"
    return Line2D([], [], label=label, **style)


def label_axes(panels: list, x: str) -> None:
    """Label the axes, and draw a grid."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    loss, *hellaswag, rate = panels
    loss.set_ylabel("loss, nats per token")
    for panel in hellaswag:
        panel.set_ylabel("HellaSwag\nacc_norm")
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    rate.set_ylabel("learning\nrate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate.set_xlabel(X_LABELS[x])
    if x == "tokens":
        rate.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
