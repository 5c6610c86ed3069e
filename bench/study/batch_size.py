"""Batch size and the gradient noise scale.

Question: what does a larger batch gain in steps, and lose in tokens, and what batch does the gradient's noise call for?

Prediction: at tuned learning rates the smallest batch has the lowest loss over the same tokens, and the largest in the
same steps. The noise scale is a few hundred tokens at the start and grows as the loss falls, to some thousands; batches
below it lose nothing per token, those above do. Kaplan et al. (2020) give 2e8 / loss^4.76 tokens for their models: 0.7
million at GPT-2's 3.29, so half a million is a sound choice late in a run, and wasteful early.
"""
import numpy as np

from bench.study.lab import Outcome, from_json, to_json, trial
from bench.study.page import COLORS, LINES, Report, band, compared, curve_axis, listed, mean, measured, table
from bench.study.stats import difference, spread
from plumbing import published

FACTORS = (0.5, 1, 2, 4)  # of the usual batch
RATES = (0.5, 1.0, 2.0)  # of the usual rate, times the root of the factor


def tuned(lab, searches: dict[str, tuple]) -> dict[str, dict[float, float]]:
    """Return by name the losses of learning rates for the first seed, rate -> loss.

    A search is (rates to try, function of a rate that gives trial()'s arguments). If the best rate is at an end, one
    more is tried there, up to twice. What the searches have to train is trained together.
    """
    rates = {name: sorted(some) for name, (some, _) in searches.items()}
    losses: dict[str, dict[float, float]] = {}
    for _ in range(3):
        trials = {(name, rate): trial(**{"seed": lab.seeds[0], **searches[name][1](rate)})
                  for name, some in rates.items() for rate in some}
        outcomes = lab.train(list(trials.values()))
        losses = {name: {rate: outcomes[trials[name, rate]].loss for rate in some} for name, some in rates.items()}
        best = {name: min(some, key=some.get) for name, some in losses.items()}
        at_an_end = [name for name, some in rates.items() if best[name] in (some[0], some[-1])]
        if not at_an_end:
            break
        for name in at_an_end:
            rates[name] = sorted([*rates[name], best[name] * (0.5 if best[name] == rates[name][0] else 2)])
    return losses


def settings_of(scale, factor: float, rate: float) -> dict:
    """Return trial()'s arguments for a batch `factor` times as large, over the same number of tokens."""
    steps = round(scale.steps / factor)
    return dict(total_batch_size=int(scale.tokens_per_step * factor), max_steps=steps, max_lr=rate,
                min_lr=round(rate / 10, 8), warmup_steps=max(1, round(scale.warmup_steps / factor)),
                val_every=max(1, steps // 6))


def measure(lab) -> dict:
    """Tune the rate of each batch size, then train with all seeds; measure the noise scale in the usual runs."""
    scale, searches = lab.scale, {}
    factors = [factor for factor in FACTORS if scale.tokens_per_step * factor >= scale.sequence_length]
    for factor in factors:
        some = tuple(round(scale.max_lr * factor**0.5 * share, 6) for share in RATES)
        searches[str(factor)] = some, lambda rate, factor=factor: settings_of(scale, factor, rate)
    tried = tuned(lab, searches)
    rates = {factor: min(losses, key=losses.get) for factor, losses in tried.items()}
    found = lab.by_seed({factor: searches[factor][1](rate) for factor, rate in rates.items()})
    windows = scale.tokens_per_step // scale.sequence_length
    every = max(min(4, scale.steps // 2), scale.steps // 10)
    noisy = lab.by_seed({"noise": dict(watch=every, noise=16, micro_batch_size=max(1, windows // 4))})
    return {"tokens_per_step": scale.tokens_per_step, "rates": rates, "tried": tried, "outcomes": to_json(found),
            "noisy": to_json(noisy)}


def noise_scales(outcomes: list[Outcome]) -> tuple[list[int], list[float]]:
    """Return steps, and the noise scale in tokens from the means over the seeds of its two estimates."""
    steps = [record["step"] for record in outcomes[0].records]
    means = [[mean(one.records[i]["noise"][key] for one in outcomes) for key in ("trace", "squared")]
             for i in range(len(steps))]
    return steps, [trace / squared if squared > 0 and trace > 0 else float("nan") for trace, squared in means]


def figure_of_runs(figure, found: dict, tokens_per_step: int) -> None:
    """Draw the losses against tokens, and against steps."""
    for place, unit in enumerate(("million tokens", "steps")):
        axes = figure.add_subplot(1, 2, place + 1)
        for index, (factor, some) in enumerate(found.items()):
            tokens = int(float(factor) * tokens_per_step)
            x, losses = curve_axis(some, tokens)
            band(axes, x if place == 0 else x * 1e6 / tokens, losses, f"{tokens:,} tokens", index)
        axes.set(xlabel=unit, ylabel="training loss, nats per token", xscale=("linear", "log")[place])
        axes.legend(title="batch")


def figure_of_noise(figure, outcomes: list[Outcome], tokens_per_step: int) -> None:
    """Draw the noise scale during training."""
    axes = figure.subplots()
    steps, scales = noise_scales(outcomes)
    x = np.array(steps) * tokens_per_step / 1e6
    axes.plot(x, scales, "o-", color=COLORS[0], label="measured, mean of the seeds")
    axes.axhline(tokens_per_step, color=COLORS[1], linestyle=LINES[1], label="the batch")
    axes.set(xlabel="million tokens", ylabel="gradient noise scale, tokens", yscale="log")
    axes.legend()


def report(results: dict) -> Report:
    """Compare the batch sizes, and say what the noise scale is."""
    found, (noisy,) = from_json(results["outcomes"]), from_json(results["noisy"]).values()
    losses = {factor: [one.loss for one in some] for factor, some in found.items()}
    small, *_, large = found
    steps, scales = noise_scales(noisy)
    known = [(step, scale) for step, scale in zip(steps, scales, strict=True) if scale == scale]
    early, late = known[0][1], mean(scale for _, scale in known[-3:])
    rows = [(f"{int(float(factor) * results['tokens_per_step']):,}", len(some[0].train), results["rates"][factor],
             listed(results["tried"][factor]), spread(losses[factor])) for factor, some in found.items()]
    noise = [(step, f"{step * results['tokens_per_step']:,}", f"{scale:,.0f}") for step, scale in known]
    text = table(("tokens per step", "steps", "best rate", "tried, first seed", "validation loss ± deviation"), rows)
    text += "\n\n" + table(("step", "tokens", "noise scale, tokens"), noise) + (
        "\n\nA batch as large as the noise scale needs twice the tokens of a very small one, and twice the steps of "
        "a very large one (McCandlish et al. 2018). Half a million tokens would be that batch where the noise scale is "
        f"half a million, {5e5 / late:,.0f} times the one at the end of these runs. Kaplan et al. (2020) find 2e8 / "
        f"loss^4.76 tokens for their models, {2e8 / published.LOSS**4.76 / 1e6:.1f} million at OpenAI's "
        f"{published.LOSS:.2f} nats.")
    return Report([
        compared("over the same tokens, the smallest batch ends lowest", difference(losses[small], losses[large]), 1),
        measured("the noise scale grows during training", late > early,
                 f"{early:,.0f} tokens at the start, {late:,.0f} at the end"),
    ], text, {"batch_size_runs": lambda figure: figure_of_runs(figure, found, results["tokens_per_step"]),
              "batch_size_noise": lambda figure: figure_of_noise(figure, noisy, results["tokens_per_step"])})
