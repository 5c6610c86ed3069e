"""Positions, GELU, biases, and where the norm stands.

Question: which of GPT-2's smaller choices can be seen in the loss?

Prediction: without learned positions the loss is higher by 0.02 to 0.1 nats, since the causal mask alone tells a model
some of them. The exact GELU and no biases make no difference. Post-norm is worse than pre-norm, and far worse without
warmup, which pre-norm hardly needs at this size.
"""
from bench.study.lab import from_json, to_json
from bench.study.page import Report, against, compared, loss_curves, table

VARIANTS = {
    "GPT-2": {}, "no positions": dict(variant="no_positions"), "exact GELU": dict(variant="exact_gelu"),
    "no biases": dict(variant="no_biases"), "post-norm": dict(variant="post_norm"),
    "no warmup": dict(warmup_steps=0), "post-norm, no warmup": dict(variant="post_norm", warmup_steps=0),
}


def measure(lab) -> dict:
    """Train each variant."""
    return {"tokens_per_step": lab.scale.tokens_per_step, "outcomes": to_json(lab.by_seed(VARIANTS))}


def report(results: dict) -> Report:
    """Compare each variant with GPT-2, and post-norm without warmup with pre-norm without."""
    found = from_json(results["outcomes"])
    apart, rows = against(found, "GPT-2")
    without_warmup, _ = against(found, "no warmup")
    return Report([
        compared("learned positions lower the loss", apart["no positions"], 1),
        compared("the exact GELU makes no difference", apart["exact GELU"], 0),
        compared("biases make no difference", apart["no biases"], 0),
        compared("pre-norm has a lower loss than post-norm", apart["post-norm"], 1),
        compared("without warmup post-norm is worse than pre-norm",
                 without_warmup["post-norm, no warmup"], 1),
    ], table(("variant", "validation loss ± deviation", "above GPT-2, with 95 % interval"), rows),
        {"choices": lambda figure: loss_curves(figure, found, results["tokens_per_step"])})
