"""What log.jsonl says, and the picture of it: losses, HellaSwag, learning rate, OpenAI's numbers beside them."""
import io
import json
import math
import os
import re
from pathlib import Path

OPENAI_LOSS = 3.2924  # of OpenAI's GPT-2 124M on FineWeb-Edu's first 10,485,760 validation tokens, nats a token
OPENAI_HELLASWAG = 0.2955  # its acc_norm on all 10,042 validation examples, completion style
STYLES = (  # of run after run: dark and light take turns, so that greyscale keeps them apart
    ("#08306b", "-", "o"), ("#fd8d3c", "-", "s"), ("#00441b", "--", "^"), ("#df65b0", "--", "D"),
    ("#252525", "-.", "v"), ("#41b6c4", "-.", "P"),
)


def read_log(path) -> list[dict]:
    """The lines of a log.jsonl, or of the one in a folder, that are whole; OSError where there is none."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(sound(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError):  # torn by a crash, being written, or foreign
            continue
    return lines


def sound(line: dict) -> dict:
    """A line as training writes it: what should be a finite number or a dict and is not becomes None or empty.

    ValueError, TypeError or KeyError where nothing can be made of it.
    """
    if line["kind"] == "run":
        return {**line, **{key: line[key] if isinstance(line.get(key), dict) else {} for key in
                           ("config", "data", "model", "versions")}}
    if line["kind"] not in ("train", "val", "hellaswag") or not 0 <= line["step"] < 2**53:
        raise ValueError("not a line of numbers")
    numbers = {key: value if isinstance(value, (int, float)) and abs(value) < 1e30 else None
               for key, value in line.items() if key not in ("kind", "skipped")}
    return {**line, **numbers}


def last(lines: list[dict], kind: str) -> dict:
    """The last line of a kind, or an empty one."""
    return next((line for line in reversed(lines) if line["kind"] == kind), {})


def is_fineweb_edu(lines: list[dict]) -> bool:
    """Whether a run's data is FineWeb-Edu, by what the manifest of its shards says."""
    source = str(last(lines, "run").get("data", {}).get("source"))
    return bool(re.match(r"(HuggingFaceFW/fineweb-edu|kjj0/finewebedu10B-gpt2)([@/]|$)", source))


def series(lines: list[dict], kind: str, key: str, x: str):
    """(x, y) arrays (n,) of one number of the log, where it is finite; x in steps, tokens or hours."""
    import numpy as np

    per_step = last(lines, "run").get("config", {}).get("total_batch_size", 1)
    points = [(line["step"], line[key]) for line in lines if line["kind"] == kind and line.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T  # (n,) each
    if x == "tokens":
        return steps * per_step, values
    if x == "hours":
        timed = [(line["step"], line.get("dt_ms") or 0) for line in lines if line["kind"] == "train"]
        train = np.array([(0, 0), *timed], dtype=float)  # (n + 1, 2)
        return np.interp(steps, train[:, 0], train[:, 1].cumsum() / 3.6e6), values
    return steps, values


def smooth(values):
    """Each of (n,) values averaged with its neighbours: 2 % of them, at least 9, fewer at both ends -> (n,)."""
    import numpy as np

    i, n = np.arange(len(values)), len(values)
    reach = np.minimum(np.minimum(i, n - 1 - i), max(4, n // 100))
    first, end = i - reach, i + reach + 1
    total = np.concatenate(([0.0], np.cumsum(values)))  # (n + 1,)
    return (total[end] - total[first]) / (end - first)


def final_train_loss(lines: list[dict]) -> float:
    """The mean training loss of the last 20 steps that have one; nan where there is none."""
    losses = [line["loss"] for line in lines if line["kind"] == "train" and line.get("loss") is not None][-20:]
    return sum(losses) / len(losses) if losses else math.nan


def short(count: float) -> str:
    """A number of tokens with k, M, B or T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def draw(runs: dict[str, list[dict]], out, x: str = "tokens") -> None:
    """Draw {name: lines of its log} into the picture `out`: whole, or the one of before and an OSError.

    ModuleNotFoundError where matplotlib is missing.
    """
    out, picture = Path(out), io.BytesIO()
    make_figure(runs, x).savefig(picture, format=out.suffix[1:])
    temporary = out.with_name(out.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link that leads elsewhere
    try:
        temporary.write_bytes(picture.getvalue())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def make_figure(runs: dict[str, list[dict]], x: str):
    """{name: lines of its log} -> a matplotlib Figure, 800 pixels wide: loss, HellaSwag where scored, learning rate."""
    import numpy as np

    os.environ["MPLBACKEND"] = "agg"  # no window; importing matplotlib fails where this names a back end it lacks
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    scored = any(line["kind"] == "hellaswag" for lines in runs.values() for line in lines)
    heights = [3.0, 1.3, 0.9] if scored else [3.0, 0.9]
    figure = Figure(figsize=(8, sum(heights) + 0.9 + 0.2 * len(runs)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    loss, rate, entries, lowest, highest = panels[0], panels[-1], [], [], []
    for i, (name, lines) in enumerate(runs.items()):
        color, dashes, marker = STYLES[i % len(STYLES)]
        dots = dict(color=color, marker=marker, markersize=5, markeredgecolor="white")
        (at, train), (val_at, val) = series(lines, "train", "loss", x), series(lines, "val", "loss", x)
        scores_at, scores = series(lines, "hellaswag", "acc_norm", x)
        loss.plot(at, train, color=color, alpha=0.25, linewidth=0.6)
        loss.plot(at, smooth(train), color=color, linestyle=dashes, linewidth=1.6)
        loss.plot(val_at, val, linestyle="none", **dots)
        if scored:
            panels[1].plot(scores_at, scores, linestyle=dashes, **dots)
        rate.plot(*series(lines, "train", "lr", x), color=color, linestyle=dashes, linewidth=1.4)
        said = [f"train {final_train_loss(lines):.4f}"] if len(train) else []
        said += [*(f"validation {y:.4f}" for y in val[-1:]), *(f"HellaSwag {y:.2%}" for y in scores[-1:])]
        label = f" {name}: {', '.join(said)}".replace("$", r"\$")  # a leading _ would hide it, $ begins a formula
        entries.append(Line2D([], [], linestyle=dashes, label=label, **dots))
        long = len(train) > 1000  # then the steep start is left out
        lowest += [*np.sort(train)[len(train) // 100:][:1], *val]  # but for the luckiest 1 % of the steps
        highest += [*(smooth(train)[len(train) // 50:][:1] if long else train), *(val[-1:] if long else val)]
    if any(map(is_fineweb_edu, runs.values())):
        known = dict(color="black", linestyle=":", linewidth=1.2)
        loss.axhline(OPENAI_LOSS, **known)
        if scored:
            panels[1].axhline(OPENAI_HELLASWAG, **known)
        entries.append(Line2D([], [], label=f" OpenAI's GPT-2 124M, published: {OPENAI_LOSS}, HellaSwag "
                                            f"{OPENAI_HELLASWAG:.2%}", **known))
        lowest.append(OPENAI_LOSS)
    if highest:
        margin = 0.05 * (max(highest) - min(lowest)) or 0.1
        loss.set_ylim(min(lowest) - margin, max(highest) + margin)
    loss.set_ylabel("loss, nats a token")
    rate.set_ylabel("learning\nrate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate.set_xlabel({"tokens": "tokens", "steps": "optimizer steps", "hours": "hours of training"}[x])
    if x == "tokens":
        rate.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if scored:
        panels[1].set_ylabel("HellaSwag\nacc_norm")
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    figure.align_ylabels()
    figure.legend(handles=entries, loc="outside upper center", fontsize=9, frameon=False)  # above: it covers nothing
    return figure
