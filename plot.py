"""log.jsonl -> loss.png: training and validation loss, HellaSwag, learning rate; several runs in one picture.

    python plot.py log                              # log/loss.png, as training draws it after each validation
    python plot.py log/a log/b --x hours            # two runs, one over the other, into ./loss.png

The training loss of single steps is thin and pale, with its average over 2 % of the run on it; validation has dots.
Dotted lines show OpenAI's GPT-2 124M where the data is FineWeb-Edu. Hours are those of training, without evaluation.
"""
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

OPENAI_LOSS = 3.2924  # of OpenAI's GPT-2 124M on FineWeb-Edu's first 10,485,760 validation tokens, nats a token
OPENAI_HELLASWAG = 0.2955  # its acc_norm on all 10,042 validation examples, completion style
STYLES = (  # of run after run: dark and light take turns, so that greyscale keeps them apart
    ("#08306b", "-", "o"), ("#fd8d3c", "-", "s"), ("#00441b", "--", "^"), ("#df65b0", "--", "D"),
    ("#252525", "-.", "v"), ("#41b6c4", "-.", "P"),
)


@dataclass
class PlotConfig:
    """What to draw: every field is a flag, but for the runs."""

    runs: list = field(default_factory=lambda: ["log"])  # folders that hold a log.jsonl, or such files
    x: str = "tokens"  # tokens, steps or hours
    out: str = ""  # picture to write: .png, .svg or .pdf (empty: loss.png beside a single log, else in this folder)


def read_log(path) -> list[dict]:
    """The lines of a log.jsonl, or of the one in a folder, that are whole; OSError where there is none."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # torn by a crash or being written
            continue
        if isinstance(value, dict) and "kind" in value:
            lines.append(value)
    return lines


def is_fineweb_edu(lines: list[dict]) -> bool:
    """Whether a run's data is FineWeb-Edu, by what the manifest of its shards says."""
    runs = [line for line in lines if line["kind"] == "run"]
    source = str((runs[-1].get("data") or {}).get("source")).lower() if runs else ""
    return "fineweb-edu" in source or "finewebedu" in source


def series(lines: list[dict], kind: str, key: str, x: str):
    """(x, y) arrays (n,) of one number of the log, where it is finite; x in steps, tokens or hours."""
    import numpy as np

    runs = [line for line in lines if line["kind"] == "run"]
    per_step = runs[-1]["config"]["total_batch_size"] if runs else 1
    points = [(line["step"], line[key]) for line in lines if line["kind"] == kind and line.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T  # (n,) each
    if x == "tokens":
        return steps * per_step, values
    if x == "hours":
        train = np.array([(0, 0)] + [(line["step"], line["dt_ms"]) for line in lines if line["kind"] == "train"], float)
        return np.interp(steps, train[:, 0], train[:, 1].cumsum() / 3.6e6), values
    return steps, values


def smooth(values):
    """Each of (n,) values averaged with its neighbours: 2 % of them, at least 9, fewer at the steep start -> (n,)."""
    import numpy as np

    i, n = np.arange(len(values)), len(values)
    reach = np.minimum(i, max(4, n // 100))
    first, end = i - reach, np.minimum(n, i + reach + 1)
    total = np.concatenate(([0.0], np.cumsum(values)))  # (n + 1,)
    return (total[end] - total[first]) / (end - first)


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
    figure, out = make_figure(runs, x), Path(out)
    temporary = out.with_name(f"{out.stem}.{os.getpid()}.tmp{out.suffix}")
    try:
        figure.savefig(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def make_figure(runs: dict[str, list[dict]], x: str):
    """{name: lines of its log} -> a matplotlib Figure, 800 pixels wide: loss, HellaSwag where scored, learning rate."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    scored = any(line["kind"] == "hellaswag" for lines in runs.values() for line in lines)
    heights = [3.0, 1.3, 0.9] if scored else [3.0, 0.9]
    figure = Figure(figsize=(8, sum(heights) + 0.9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    loss, hellaswag, rate = panels[0], panels[1] if scored else None, panels[-1]
    lowest, highest = [], []
    for i, (name, lines) in enumerate(runs.items()):
        color, dashes, marker = STYLES[i % len(STYLES)]
        prefix = f"{name}: " if len(runs) > 1 else ""
        at, train = series(lines, "train", "loss", x)
        if len(train):
            average = smooth(train)
            loss.plot(at, train, color=color, alpha=0.25, linewidth=0.6)
            loss.plot(at, average, color=color, linestyle=dashes, linewidth=1.6,
                      label=None if prefix else f"train {average[-1]:.3f}")
            lowest.append(np.percentile(train, 1))
            highest.append(average[len(average) // 50] if len(average) > 1000 else train.max())
        at, val = series(lines, "val", "loss", x)
        scores_at, scores = series(lines, "hellaswag", "acc_norm", x)
        score = f"{scores[-1]:.2%}" if len(scores) else ""
        if len(val):
            loss.plot(at, val, color=color, linestyle="none", marker=marker, markersize=5, markeredgecolor="white",
                      label=f"{prefix}validation {val[-1]:.4f}{score and prefix and f', HellaSwag {score}'}")
            lowest.append(val.min())
            highest.append(val[0] if len(train) <= 1000 else val[-1])
        if scored:
            hellaswag.plot(scores_at, scores, color=color, linestyle=dashes, marker=marker, markersize=4,
                           markeredgecolor="white", label=None if prefix else score or None)
        rate.plot(*series(lines, "train", "lr", x), color=color, linestyle=dashes, linewidth=1.4)
    if any(map(is_fineweb_edu, runs.values())):
        loss.axhline(OPENAI_LOSS, color="black", linestyle=":", linewidth=1.2,
                     label=f"OpenAI's GPT-2 124M {OPENAI_LOSS}")
        lowest.append(OPENAI_LOSS)
        if scored:
            hellaswag.axhline(OPENAI_HELLASWAG, color="black", linestyle=":", linewidth=1.2,
                              label=f"OpenAI's GPT-2 124M {OPENAI_HELLASWAG:.2%}")
    if lowest:
        margin = 0.05 * (max(highest) - min(lowest)) or 0.1
        loss.set_ylim(min(lowest) - margin, max(highest) + margin)
    loss.set_ylabel("loss, nats a token")
    rate.set_ylabel("learning\nrate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate.set_xlabel({"tokens": "tokens", "steps": "optimizer steps", "hours": "hours of training"}[x])
    if x == "tokens":
        rate.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if scored:
        hellaswag.set_ylabel("HellaSwag\nacc_norm")
        hellaswag.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        if panel is not rate and panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, framealpha=0.9, loc="upper right" if panel is loss else "lower right")
    if len(runs) == 1:
        loss.set_title(next(iter(runs)), fontsize=10)
    figure.align_ylabels()
    return figure


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    from runlog import UserError, parse_flags

    config = PlotConfig(**parse_flags(PlotConfig, argv, "Draw log.jsonl.", positional=("runs",)))
    if config.x not in ("tokens", "steps", "hours"):
        raise UserError(f"--x is {config.x!r}, it must be tokens, steps or hours")
    logs = {}
    for name in config.runs:
        try:
            lines = read_log(name)
        except OSError as error:
            raise UserError(f"cannot read {name!r} ({error.strerror}): name a folder that training wrote") from error
        if not any(line["kind"] in ("train", "val") for line in lines):
            raise UserError(f"{name} has no losses to draw yet")
        logs[name] = lines
    first = Path(config.runs[0])
    beside = first if first.is_dir() else first.parent
    out = Path(config.out or (beside / "loss.png" if len(logs) == 1 else "loss.png"))
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out is {config.out!r}, it must end in .png, .svg or .pdf")
    try:
        draw(logs, out, config.x)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): choose another --out") from error
    print(out)


if __name__ == "__main__":
    from runlog import run_command

    run_command(main, sys.argv[1:])
