"""Weight tying.

Question: what does one matrix for embedding and output save, and what does it cost?

Prediction: tying saves V * C parameters, and their gradients and moments: 16 bytes each. At equal steps an untied model
this small is better by less than 0.05 nats, since it has more parameters. At equal parameters, with fewer channels, it
is worse. At 124M, V * C is 31 % of all parameters.
"""
from bench.study.lab import from_json, to_json
from bench.study.page import Report, compared, loss_curves, measured, table
from bench.study.stats import difference, spread


def narrower(shape: dict, V: int, T: int) -> dict:
    """Return the shape whose untied model has about as many parameters as the tied one of `shape`."""
    def count(C: int, matrices: int) -> int:
        return 12 * shape["n_layer"] * C * C + (matrices * V + T) * C

    heads, goal = shape["n_head"], count(shape["n_embd"], 1)
    widths = range(heads, shape["n_embd"] + 1, heads)
    return shape | {"n_embd": min(widths, key=lambda C: abs(count(C, 2) - goal))}


def measure(lab) -> dict:
    """Train tied, untied, and narrower untied models."""
    scale = lab.scale
    small = narrower(scale.shape, scale.vocab_size, scale.sequence_length)
    found = lab.by_seed({"tied": {}, "untied": dict(variant="untied"),
                         "untied, as many parameters": dict(variant="untied", **small)})
    return {"tokens_per_step": scale.tokens_per_step, "outcomes": to_json(found)}


def report(results: dict) -> Report:
    """Compare losses and parameters."""
    found = from_json(results["outcomes"])
    tied, untied, _ = found.values()
    more = untied[0].parameters - tied[0].parameters
    losses = {name: [one.loss for one in some] for name, some in found.items()}
    wider, equal = (difference(losses["tied"], losses[name]) for name in list(found)[1:])
    rows = [(name, f"{some[0].parameters:,}", f"{16 * some[0].parameters / 1e6:.1f}", spread(losses[name]))
            for name, some in found.items()]
    return Report([
        measured("tying saves a vocabulary times the channels in parameters", more > 0,
                 f"{more:,} of {untied[0].parameters:,} ({more / untied[0].parameters:.0%})"),
        compared("at equal steps an untied model has the lower loss", wider, -1),
        compared("at equal parameters the tied model has the lower loss", equal, 1),
    ], table(("model", "parameters", "MB of weights, gradients and moments", "validation loss ± deviation"), rows),
        {"tying": lambda figure: loss_curves(figure, found, results["tokens_per_step"])})
