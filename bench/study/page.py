"""docs/study.md and its figures, from the parts' results."""
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.study.stats import Difference, difference, spread, verdict
from plumbing import curve

COLORS = [color for color, _, _ in curve.STYLES]  # dark and light alternate, which grey keeps apart
LINES = ["-", "--", "-.", ":"]


class Claim(NamedTuple):
    """A sentence that was tried, what came of it, and how large the effect is."""
    sentence: str
    verdict: str
    effect: str


class Report(NamedTuple):
    """What a part says: its claims, its text in Markdown, and its figures, name -> draw(matplotlib figure)."""
    claims: list[Claim]
    text: str
    figures: dict[str, Callable]


def compared(sentence: str, found: Difference, predicted: int, negligible: float = 0.01) -> Claim:
    """Return the claim on a difference of losses, with its verdict."""
    return Claim(sentence, verdict(found, predicted, negligible), f"{found} nats")


def against(found: dict[str, list], base: str) -> tuple[dict[str, Difference], list[tuple]]:
    """Return by variant how far its losses are above those of `base`, and rows: name, loss, difference."""
    losses = {name: [one.loss for one in some] for name, some in found.items()}
    apart = {name: difference(losses[base], some) for name, some in losses.items()}
    return apart, [(name, spread(some), "" if name == base else apart[name]) for name, some in losses.items()]


def measured(sentence: str, true: bool, effect: str) -> Claim:
    """Return a claim that a number alone decides."""
    return Claim(sentence, "confirmed" if true else "refuted", effect)


def table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Write a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def listed(losses: dict[str, float]) -> str:
    """Write the losses of the rates that were tried, rate -> loss."""
    return ", ".join(f"{rate}: {loss:.4f}" for rate, loss in sorted(losses.items(), key=lambda item: float(item[0])))


def band(axes, x: Sequence[float], by_seed: Sequence[Sequence[float]], label: str, index: int) -> None:
    """Draw the mean of several seeds' curves, (seeds, n), and a band from the lowest to the highest."""
    values = np.array(by_seed, dtype=float)
    style = dict(color=COLORS[index % len(COLORS)], linestyle=LINES[index // 2 % len(LINES)])
    axes.plot(x, values.mean(axis=0), label=label, linewidth=1.6, **style)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), alpha=0.2, color=style["color"], linewidth=0)


def curve_axis(found: list, tokens_per_step: int, first: float = 0.1) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return million tokens, (n,), and the smoothed training losses of each seed, without the first share of steps."""
    start = int(first * len(found[0].train))
    x = np.arange(1, len(found[0].train) + 1) * tokens_per_step / 1e6
    return x[start:], [curve.smooth(one.train)[start:] for one in found]


def loss_curves(figure, outcomes: dict[str, list], tokens_per_step: int) -> None:
    """Draw the smoothed training losses of variants, name -> outcomes by seed."""
    axes = figure.subplots()
    for index, (name, found) in enumerate(outcomes.items()):
        x, losses = curve_axis(found, tokens_per_step)
        band(axes, x, losses, name, index)
    axes.set(xlabel="million tokens", ylabel="training loss, nats per token")
    figure.legend(loc="outside right upper") if len(outcomes) > 4 else axes.legend()


def draw(path: Path, figure_of: Callable) -> None:
    """Write a figure, 800 pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=100, layout="constrained")
    figure_of(figure)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def mean(values) -> float:
    """Return the mean, of numbers or of an iterator of them."""
    return statistics.fmean(values)
