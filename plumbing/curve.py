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
import warnings
from collections.abc import Iterable
from pathlib import Path

from plumbing import accuracy, published
from plumbing.files import atomic_write, set_aside

PROGRAM = "train_gpt2.py"  # as a picture names what has drawn it
STYLES = (  # color, line and marker of each run; dark and light alternate, so that greyscale keeps them apart
    ("#08306b", "-", "o"), ("#fd8d3c", "-", "s"), ("#00441b", "--", "^"), ("#df65b0", "--", "D"),
    ("#252525", "-.", "v"), ("#41b6c4", "-.", "P"), ("#54278f", (0, (8, 3)), "X"), ("#78c679", (0, (8, 3)), "*"),
)
X_LABELS = {"tokens": "tokens", "steps": "optimizer steps", "hours": "hours of training"}
SHORT = 10  # steps; of a run up to that the whole is shown
MANY = 30  # dots; more of them are smaller
GREY = "#555555"  # of what belongs to no run
NAME = 36  # characters of a run's name that a legend has room for


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
    if line["kind"] == "sample":
        return {**line, "step": int(line["step"]), "text": str(line["text"])}
    if line["kind"] not in ("train", "val", "hellaswag") or not 0 <= line["step"] < 2**53:
        raise ValueError("not a line of numbers")
    numbers = {key: value if isinstance(value, (int, float)) and abs(value) < 1e30 else None
               for key, value in line.items() if key not in ("kind", "skipped")}
    score = numbers.get("acc_norm")
    if line["kind"] == "hellaswag" and score is not None and not (0 <= score <= 1 and (numbers.get("n") or 0) >= 1):
        raise ValueError("not an accuracy")
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


def window(steps: int) -> int:
    """Return how many of `steps` training losses, the last ones, are averaged: the square root of their number.

    That is 5 of 30, 13 of 180, 31 of 1,000 and 138 of 19,073: hardly late where the loss falls fast, and steady later.
    """
    return math.isqrt(steps)


def smooth(values):
    """Average each of (n,) values with those before it, the i-th over the last window(i) of i -> (n,)."""
    import numpy as np

    values, end = np.asarray(values, dtype=float), np.arange(1, len(values) + 1)  # (n,) each
    first = end - np.sqrt(end).astype(int)
    pairs = np.stack((first, end), axis=1).ravel()  # (2n,); reduceat sums between each two, every other sum is ours
    return np.add.reduceat(np.append(values, 0.0), pairs)[::2] / (end - first)


def final_train_losses(lines: list[dict]) -> list[float]:
    """Return the last training losses, whose mean is where the smoothed curve ends; empty if there are none."""
    losses = [line["loss"] for line in lines if line["kind"] == "train" and line.get("loss") is not None]
    return losses[len(losses) - window(len(losses)):]


def run_names(names: Iterable[str]) -> list[str]:
    """Name runs by the fewest last folders of their paths that tell them apart, in at most NAME characters each."""
    paths = [Path(os.path.abspath(name)) for name in names]
    paths = [path.parent if path.name == "log.jsonl" else path for path in paths]
    ends = [["/".join(path.parts[-length:]) for length in range(1, len(path.parts) + 1)] for path in paths]
    found = [next((end for end in mine if sum(end in others for others in ends) == 1), mine[0]) for mine in ends]
    found = ["".join(letter if letter.isprintable() else "?" for letter in name) for name in found]
    short = [name if len(name) <= NAME else f"{name[:NAME // 3]}…{name[1 - 2 * NAME // 3:]}" for name in found]
    return short if len(set(short)) == len(short) else [f"{i + 1}. {name}" for i, name in enumerate(short)]


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font lacks: it draws boxes instead
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
    """Make a matplotlib Figure of {path to a run: lines of its log}, 800 pixels wide.

    Its panels share x: loss, HellaSwag if it was measured, learning rate. The title is the name of the run, of several
    runs the legend has the names.
    """
    with no_backend():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    scored = any(line["kind"] == "hellaswag" for lines in runs.values() for line in lines)
    heights = [3.0, 1.3, 0.9] if scored else [3.0, 0.9]
    figure = Figure(figsize=(8, sum(heights) + 1.1 + 0.2 * len(runs)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    names = [name.replace("$", r"\$") for name in run_names(runs)]  # $ begins a formula
    entries = [plot_run(panels, name, lines, x, STYLES[i % len(STYLES)])
               for i, (name, lines) in enumerate(zip(names, runs.values()))]
    is_fineweb = any(map(is_fineweb_edu, runs.values()))
    if is_fineweb:
        entries.append(plot_openai(panels))
    limit_losses(panels[0], runs.values(), [published.LOSS] if is_fineweb else [])
    add_key(panels[0], list(runs.values()))
    label_axes(panels, x)
    figure.align_ylabels()
    title = names[0] if len(runs) == 1 else None
    figure.legend(handles=entries, loc="outside upper center", fontsize=9, frameon=False, title=title, handlelength=3,
                  title_fontproperties={"weight": "bold", "size": 12})  # above: it covers nothing
    return figure


def plot_run(panels: list, name: str, lines: list[dict], x: str, style: tuple):
    """Plot one run into the panels; return its entry in the legend, with the last value of each curve."""
    import numpy as np
    from matplotlib.lines import Line2D

    color, dashes, marker = style
    dots = dict(color=color, marker=marker, markersize=6, markeredgecolor="white")
    loss, *hellaswag, rate = panels
    steps, train = series(lines, "train", "loss", x)
    loss.plot(steps, train, color=color, alpha=0.35, linewidth=0.7)
    single = {"marker": "."} if len(train) == 1 else {}  # a line of one point would not be seen
    loss.plot(steps, smooth(train), color=color, linestyle=dashes, linewidth=1.8, **single)
    rate.plot(*series(lines, "train", "lr", x), color=color, linestyle=dashes, linewidth=1.4, **single)
    steps, val = series(lines, "val", "loss", x)
    loss.plot(steps, val, linestyle="none", zorder=3, **{**dots, "markersize": 6 if len(val) <= MANY else 4})
    steps, scores = series(lines, "hellaswag", "acc_norm", x)
    counts = [line["n"] for line in lines if line["kind"] == "hellaswag" and line.get("acc_norm") is not None]
    for panel in hellaswag:
        panel.plot(steps, scores, linestyle=dashes, **{**dots, "markersize": 6 if len(scores) <= MANY else 4})
        ends = np.array([accuracy.interval(p, n) for p, n in zip(scores, counts)]).reshape(-1, 2)  # (n, 2)
        panel.vlines(steps, *ends.T, color=color, alpha=0.5, linewidth=1)
    results = [f"train {np.mean(final_train_losses(lines)):.4f}"] if len(train) else []
    results += [*(f"validation {y:.4f}" for y in val[-1:]), *(f"HellaSwag {y:.2%}" for y in scores[-1:])]
    return Line2D([], [], linestyle=dashes, label=f" {name}: {', '.join(results)}", **dots)  # a leading _ would hide it


def limit_losses(panel, logs: Iterable[list[dict]], others: list[float]) -> None:
    """Limit the axis of the losses so that a steep start does not flatten the rest; `others` lie within it too.

    The second half of each run fills at least a third of the height, with all its validation losses. If losses lie
    above the axis, a note says so.
    """
    import numpy as np

    lows, late, all_losses, length = list(others), list(others), [], 0
    for lines in logs:
        (steps, train), (val_steps, val) = (series(lines, kind, "loss", "steps") for kind in ("train", "val"))
        end = max([*steps, *val_steps], default=0)
        rest = np.sort(train[2 * steps >= end])  # 1 % of the steps may lie above, and 1 % below
        late += [*smooth(train)[2 * steps >= end], *rest[len(rest) - len(rest) // 100 - 1:][:1]]
        late += [*val[2 * val_steps >= end], *val[-1:]]
        lows += [*np.sort(train)[len(train) // 100:][:1], *val]
        all_losses += [*train, *val]
        length = max(length, end)
    if not all_losses:
        return
    low, top = min(lows), max(all_losses)
    high = low + max(2.5 * (max(late) - low), 0.1 * (top - low))
    if length <= SHORT or high > low + 0.85 * (top - low):
        margin = 0.05 * (top - low) or 0.1
        panel.set_ylim(low - margin, top + margin)
        return
    panel.set_ylim(low - 0.05 * (high - low), high)
    panel.text(0.99, 0.97, f"↑ losses up to {top:.4g} are cut off", ha="right", va="top", fontsize=9, color=GREY,
               transform=panel.transAxes)  # the second half of the longest run lies lower


def add_key(panel, logs: list[list[dict]]) -> None:
    """Say above the panel of the losses what its lines and dots are."""
    from matplotlib.lines import Line2D

    color = STYLES[0][0] if len(logs) == 1 else GREY
    steps = [len(final_train_losses(lines)) for lines in logs]
    over = f" (of {steps[0]} steps at the end)" if len(logs) == 1 and steps[0] > 1 else ""
    handles = []
    if any(steps):
        handles += [Line2D([], [], color=color, alpha=0.35, linewidth=1, label="training loss per step"),
                    Line2D([], [], color=color, linewidth=1.8, label=f"moving average{over}")]
    if any(last(lines, "val") for lines in logs):
        handles.append(Line2D([], [], color=color, linestyle="none", marker="o", label="validation loss"))
    panel.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(handles) or 1, fontsize=9,
                 frameon=False, columnspacing=1.5, borderaxespad=0.2)


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
    """Label the axes, with plain numbers everywhere, and draw a grid."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter, ScalarFormatter

    loss, *hellaswag, rate = panels
    loss.set_ylabel("loss, nats per token")
    for panel in hellaswag:
        panel.set_ylabel("HellaSwag\n(a guess: 25%)", fontsize=9)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    rate.set_ylabel("learning\nrate")
    rate.set_xlabel(X_LABELS[x])
    for axis in (loss.yaxis, rate.yaxis, rate.xaxis):
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.get_major_formatter().set_scientific(False)
    if x != "hours":
        say = short if x == "tokens" else "{:,.0f}".format
        rate.xaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value)))
    rate.xaxis.set_major_locator(MaxNLocator(7, integer=x == "steps", steps=[1, 2, 2.5, 5, 10]))
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
