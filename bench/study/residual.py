"""The initialization of what adds to the residual stream.

Question: what does 0.02 / sqrt(2 * n_layer) do to the residual stream, the gradients and the loss?

Prediction: each block adds the same variance, so the stream's standard deviation grows like the root of the layers with
0.02 everywhere, and hardly depends on the depth with the smaller one. The formula in `added_variance` gives its size.
Losses differ by less than 0.02 nats at 4 layers; at three times the depth the smaller start is better.
"""
import math

import torch

import train_gpt2
from bench.study.lab import from_json, to_json
from bench.study.page import COLORS, Report, band, compared, curve_axis, measured, table
from bench.study.stats import difference, spread
from bench.study.variants import variant

DEPTHS = (4, 12, 24, 48)
NAMES = {"gpt2": "0.02 / sqrt(2L)", "unscaled_residual": "0.02"}


def added_variance(C: int, T: int, std: float) -> float:
    """Return the variance that a block adds to the residual stream at initialization, on average over T positions.

    `std` is that of the projections; other weights have 0.02. LayerNorms give variance 1, so hidden units and values
    have C * 0.02^2. Attention is nearly uniform at the start: position t averages t values, which are taken as
    independent. E[gelu(h)^2] of a normal h is integrated numerically.
    """
    h = C * 0.02**2  # variance of values and of hidden units
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z**2 / 2) / math.sqrt(2 * math.pi)
    gelu = torch.nn.functional.gelu(z * math.sqrt(h), approximate="tanh")
    squared = float(torch.trapezoid(gelu**2 * density, z))
    mean_of_values = sum(1 / t for t in range(1, T + 1)) / T * h
    return C * std**2 * mean_of_values + 4 * C * std**2 * squared


def expected_stds(C: int, T: int, n_layer: int, std: float) -> list[float]:
    """Return the expected standard deviation of the stream before the first and after each block."""
    return [math.sqrt(2 * 0.02**2 + layer * added_variance(C, T, std)) for layer in range(n_layer + 1)]


def at_start(name: str, n_layer: int, C: int, T: int, V: int) -> dict:
    """Return the stream's `std` before the first and after each block of a new model, and its gradient `norm`s."""
    torch.manual_seed(1)
    with variant(name):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(T, V, n_layer, 4, C))
    stds = []
    model.transformer.h[0].register_forward_pre_hook(lambda module, inputs: stds.append(inputs[0].std().item()))
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, inputs, x: stds.append(x.std().item()))
    tokens = torch.randint(V, (4, T + 1))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    norms = [math.sqrt(sum(float(p.grad.square().sum()) for p in block.parameters())) for block in model.transformer.h]
    return {"std": stds, "norm": norms}


def measure(lab) -> dict:
    """Look at new models of several depths; train with and without, at the usual depth and at three times of it."""
    scale = lab.scale
    C, T, V = scale.shape["n_embd"], scale.sequence_length, scale.vocab_size
    depths = DEPTHS if scale.name != "toy" else (4, 12)
    starts = {name: {str(L): at_start(name, L, C, T, V) for L in depths} for name in NAMES}
    deep = dict(n_layer=3 * scale.shape["n_layer"], max_steps=max(2, scale.steps // 2))
    found = lab.by_seed({f"{label}, {layers}": dict(variant=name, **changes) for name, label in NAMES.items()
                         for layers, changes in (("usual depth", {}), ("three times the depth", deep))})
    return {"starts": starts, "C": C, "T": T, "outcomes": to_json(found), "tokens_per_step": scale.tokens_per_step}


def figure_of_starts(figure, starts: dict, C: int, T: int) -> None:
    """Draw the stream by layer, as measured and as expected."""
    for place, (name, label) in enumerate(NAMES.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        for index, (depth, start) in enumerate(starts[name].items()):
            L = int(depth)
            axes.plot(range(L + 1), start["std"], color=COLORS[index], label=f"{L} layers", linewidth=1.8)
            std = 0.02 / math.sqrt(2 * L) if name == "gpt2" else 0.02
            axes.plot(range(L + 1), expected_stds(C, T, L, std), color="black", linestyle=":", linewidth=1,
                      label="expected" if index == 0 else None)
        axes.set(title=f"projections begin with {label}", xlabel="blocks passed",
                 ylabel="standard deviation of the stream", ylim=(0, None))
        axes.legend()


def figure_of_runs(figure, found: dict, tokens_per_step: int) -> None:
    """Draw the training losses at both depths."""
    for place, depth in enumerate(("usual depth", "three times the depth")):
        axes = figure.add_subplot(1, 2, place + 1)
        for index, label in enumerate(NAMES.values()):
            some = found[f"{label}, {depth}"]
            x, losses = curve_axis(some, tokens_per_step)
            band(axes, x, losses, label, index)
        axes.set(title=depth, xlabel="million tokens", ylabel="training loss, nats per token")
        axes.legend()


def report(results: dict) -> Report:
    """Compare the streams with the formula, and the losses with each other."""
    starts, C, T = results["starts"], results["C"], results["T"]
    found = from_json(results["outcomes"])
    losses = {name: [one.loss for one in some] for name, some in found.items()}
    rows, worst = [], 0.0
    for name, label in NAMES.items():
        for depth, start in starts[name].items():
            std = 0.02 / math.sqrt(2 * int(depth)) if name == "gpt2" else 0.02
            expected = expected_stds(C, T, int(depth), std)[-1]
            worst = max(worst, abs(start["std"][-1] / expected - 1))
            rows.append((label, depth, f"{start['std'][-1]:.4f}", f"{expected:.4f}", f"{start['norm'][0]:.3f}",
                         f"{start['norm'][-1]:.3f}"))
    shallowest, *_, deepest = starts["gpt2"]
    (first, last), plain = ([starts[name][depth]["std"][-1] for depth in (shallowest, deepest)] for name in NAMES)
    apart = {depth: difference(losses[f"{NAMES['gpt2']}, {depth}"], losses[f"{NAMES['unscaled_residual']}, {depth}"])
             for depth in ("usual depth", "three times the depth")}
    text = table(("projections begin with", "layers", "std of the stream at the end", "expected",
                  "gradient norm, first block", "last block"), rows)
    text += "\n\n" + table(("run", "validation loss ± deviation"),
                          [(name, spread(some)) for name, some in losses.items()])
    return Report([
        measured(f"with it the stream at the start ends equally large at any depth, up to {deepest} layers",
                 abs(last / first - 1) < 0.1, f"{first:.3f} and {last:.3f}; without {plain[0]:.3f} and {plain[1]:.3f}"),
        measured("the stream's size follows from the sum of variances", worst < 0.15,
                 f"at most {worst:.0%} from the formula"),
        compared("it makes no difference to the loss at the usual depth", apart["usual depth"], 0, 0.02),
        compared("it lowers the loss at three times the depth", apart["three times the depth"], 1),
    ], text, {"residual_start": lambda figure: figure_of_starts(figure, starts, C, T),
              "residual_runs": lambda figure: figure_of_runs(figure, found, results["tokens_per_step"])})
