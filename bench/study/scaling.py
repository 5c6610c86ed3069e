"""Scaling: loss against parameters and tokens.

Question: does a power law describe the losses of six small models, and what would it say about GPT-2 124M?

Prediction: loss = E + A / N^alpha + B / D^beta fits the losses within 0.05 nats, with exponents between 0.2 and 1 that
are known badly: five parameters from 18 runs in which N varies by a factor of 15 and D by 4. Extrapolated a hundredfold
and more it will be wrong by more than half a nat. That is the caution: such a line is not a forecast.
"""
import json
from pathlib import Path

import numpy as np

from bench.study.lab import from_json, to_json
from bench.study.page import COLORS, Report, mean, measured, table
from bench.study.stats import PowerLaw, fit_power_law
from plumbing import published

SIZES = {"cpu": ((4, 24), (4, 32), (4, 48), (4, 64), (6, 64), (6, 96)),
         "quick": ((4, 32), (4, 48), (4, 64), (4, 80), (6, 64), (6, 80)),
         "toy": ((1, 8), (1, 16), (2, 16), (2, 24), (2, 32), (3, 32)),
         "gpu": ((6, 256), (6, 384), (8, 512), (12, 512), (12, 640), (12, 768))}  # (layers, channels)
LENGTHS = (0.5, 1, 2)  # of the usual number of steps, each a schedule of its own
GPT2 = (124_439_808, 10e9)  # parameters and tokens of the reproduction


def measure(lab) -> dict:
    """Train each size for each number of tokens, with one seed."""
    scale, variants = lab.scale, {}
    for n_layer, n_embd in reversed(SIZES[scale.name]):  # the longest run first: no core waits for it at the end
        for length in reversed(LENGTHS):
            steps = max(2, round(length * scale.steps))
            rate = round(scale.max_lr * (scale.shape["n_embd"] / n_embd) ** 0.5, 6)
            variants[f"{n_layer} layers, {n_embd} channels, {steps} steps"] = dict(
                n_layer=n_layer, n_embd=n_embd, max_steps=steps, max_lr=rate, min_lr=round(rate / 10, 8),
                warmup_steps=max(1, steps // 10), val_every=steps)
    seeds, lab.seeds = lab.seeds, lab.seeds[:1]
    found = lab.by_seed(variants)
    lab.seeds = seeds
    about = Path(lab.data) / "text.json"
    text = json.loads(about.read_text())["val"] if about.exists() else {"tokens": 1, "gpt2_tokens": 1}
    results = {"tokens_per_step": scale.tokens_per_step, "outcomes": to_json(found),
               "gpt2_tokens_per_token": text["gpt2_tokens"] / text["tokens"]}
    return results | {"law": fit_power_law(*points(results))}


def points(results: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return parameters, tokens and final losses of the runs, (n,) each."""
    found = from_json(results["outcomes"])
    N = [one.parameters for some in found.values() for one in some]
    D = [one.val[-1][0] * results["tokens_per_step"] for some in found.values() for one in some]
    return np.array(N, float), np.array(D, float), np.array([one.loss for some in found.values() for one in some])


def draw(figure, results: dict) -> None:
    """Draw losses by parameters with the law through them, and what each run is off."""
    (N, D, losses), law = points(results), PowerLaw(*results["law"])
    axes = figure.add_subplot(1, 2, 1)
    for index, tokens in enumerate(sorted({*D})):
        chosen = tokens == D
        x = np.geomspace(N.min() / 1.2, N.max() * 1.2, 60)
        label = f"{tokens / 1e6:.2f} million tokens"
        axes.plot(N[chosen], losses[chosen], "os^"[index % 3], color=COLORS[index], label=label)
        axes.plot(x, law.loss(x, tokens), color=COLORS[index], linewidth=1)
    axes.set(xscale="log", xlabel="parameters", ylabel="validation loss, nats per token")
    axes.legend()
    axes = figure.add_subplot(1, 2, 2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(law.loss(N, D), losses - law.loss(N, D), "o", color=COLORS[0])
    axes.set(xlabel="loss by the law, nats per token", ylabel="loss above the law, nats")


def report(results: dict) -> Report:
    """Compare the losses with the law, and extrapolate it to GPT-2."""
    (N, D, losses), law = points(results), PowerLaw(*results["law"])
    off = np.abs(losses - law.loss(N, D))
    share = results["gpt2_tokens_per_token"]
    far = float(law.loss(*GPT2)) / share  # nats per token of GPT-2
    rows = [(f"{n:,.0f}", f"{d:,.0f}", f"{loss:.4f}", f"{loss - law.loss(n, d):+.4f}")
            for n, d, loss in sorted(zip(N, D, losses, strict=True))]
    names = ("E", "A", "alpha", "B", "beta")
    fitted = ", ".join(f"{name} = {value:.3g} ± {error:.2g}" for name, value, error in
                       zip(names, law[:5], law.errors, strict=True))
    target = published.LOSS
    known = mean(error / max(1e-9, value) for error, value in ((law.errors[2], law.alpha), (law.errors[4], law.beta)))
    return Report([
        measured("a power law in parameters and tokens fits the losses within 0.05 nats", off.max() < 0.05,
                 f"at most {off.max():.3f} nats off"),
        measured("its exponents are known badly, within 10 % at best", known > 0.1,
                 f"alpha {law.alpha:.2f} ± {law.errors[2]:.2f}, beta {law.beta:.2f} ± {law.errors[4]:.2f}"),
        measured("extrapolated to GPT-2 124M and 10 billion tokens it is off by more than half a nat",
                 abs(far - target) > 0.5, f"{far:.2f} against OpenAI's {target:.2f} on another text"),
    ], table(("parameters", "tokens", "validation loss", "above the law"), rows) + f"\n\n{fitted} (standard errors). "
        f"One token of the study's vocabulary is {share:.2f} of GPT-2's, so that a loss per token of GPT-2 is "
        f"{1 / share:.2f} times as large. **The extrapolation is a caution, not a claim:** text, vocabulary and "
        f"context are not those of the published {target:.2f}, and the sizes are a hundredfold apart.",
        {"scaling": lambda figure: draw(figure, results)})
