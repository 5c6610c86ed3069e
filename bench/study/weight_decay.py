"""Weight decay: on matrices, on everything, on nothing.

Question: does it matter which tensors decay?

Prediction: no. At a decay of 0.1 a weight that gets no gradient loses a tenth in a run of this length, which is too
short for regularization to show, and biases and LayerNorms are less than 2 % of the parameters.
"""
from bench.study.lab import from_json, to_json
from bench.study.page import Report, against, compared, loss_curves, table

VARIANTS = {"on matrices": {}, "on everything": dict(variant="decay_on_all"), "on nothing": dict(weight_decay=0.0)}


def measure(lab) -> dict:
    """Train each variant."""
    return {"tokens_per_step": lab.scale.tokens_per_step, "outcomes": to_json(lab.by_seed(VARIANTS))}


def report(results: dict) -> Report:
    """Compare decay on everything and on nothing with decay on matrices."""
    found = from_json(results["outcomes"])
    apart, rows = against(found, "on matrices")
    return Report([
        compared("decay on biases and LayerNorms too makes no difference", apart["on everything"], 0),
        compared("no decay at all makes no difference", apart["on nothing"], 0),
    ], table(("weight decay of 0.1", "validation loss ± deviation", "above decay on matrices, 95 % interval"), rows),
        {"weight_decay": lambda figure: loss_curves(figure, found, results["tokens_per_step"])})
