"""AdamW against Muon.

Question: how many tokens does Muon (preset `fast`) save, at its best learning rate and over whole schedules?

Prediction: from an earlier, smaller record (30 % of the tokens on Python sources), Muon reaches AdamW's final loss in
30 to 50 % of the tokens here, at a best rate about three times AdamW's; a step takes 5 to 10 % longer.
"""
import itertools

from bench.study.batch_size import tuned
from bench.study.lab import from_json, to_json, trial
from bench.study.page import Report, compared, listed, loss_curves, measured, table
from bench.study.stats import difference, spread

LARGER = {"cpu": dict(n_layer=6, n_embd=96), "quick": {}, "toy": {}, "gpu": {}}
RATES = {"AdamW": (0.25, 0.5, 1.0), "Muon": (0.375, 0.75, 1.5)}  # of the usual rate
SHARE = 0.4  # of the steps, in which Muon is also run to its end


def settings_of(scale, optimizer: str, rate: float, steps: int) -> dict:
    """Return trial()'s arguments: the presets gpt2 and fast at this scale."""
    recipe = (dict(min_lr=round(rate / 10, 8)) if optimizer == "AdamW" else
              dict(optimizer="muon", min_lr=0.0, decay="linear"))
    return dict(**LARGER[scale.name], max_lr=rate, max_steps=steps, val_every=max(1, steps // 20), **recipe)


def crossing(curve: list, goal: float) -> float:
    """Return the step, interpolated, at which a curve of (step, loss) first falls to the goal; inf if it does not."""
    for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
        if next_loss <= goal:
            return step + (next_step - step) * (loss - goal) / (loss - next_loss)
    return float("inf")


def measure(lab) -> dict:
    """Tune both, train with all seeds, and Muon also in a share of the steps."""
    scale, searches = lab.scale, {}
    for name, shares in RATES.items():
        rates = tuple(round(share * scale.max_lr, 6) for share in shares)
        searches[name] = rates, lambda rate, name=name: settings_of(scale, name, rate, scale.steps)
    tried = tuned(lab, searches)
    best = {name: min(losses, key=losses.get) for name, losses in tried.items()}
    short = max(2, round(SHARE * scale.steps))
    found = lab.by_seed({
        **{name: settings_of(scale, name, rate, scale.steps) for name, rate in best.items()},
        f"Muon, {SHARE:.0%} of the steps": settings_of(scale, "Muon", best["Muon"], short)})
    timed = {name: trial(seed=99, **settings_of(scale, name, rate, max(4, scale.steps // 10)))
             for name, rate in best.items()}
    seconds = {name: lab.train([one])[one].step_seconds for name, one in timed.items()}  # one run at a time
    return {"tokens_per_step": scale.tokens_per_step, "best": best, "tried": tried, "seconds": seconds,
            "outcomes": to_json(found)}


def report(results: dict) -> Report:
    """Say what Muon saves."""
    found = from_json(results["outcomes"])
    adamw, muon, _ = found.values()
    losses = {name: [one.loss for one in some] for name, some in found.items()}
    steps = adamw[0].val[-1][0]
    shares = [crossing(ours.val, other.loss) / steps for other, ours in zip(adamw, muon, strict=True)]
    slower = results["seconds"]["Muon"] / results["seconds"]["AdamW"]
    edge = [name for name, tried in results["tried"].items()
            if results["best"][name] in (min(map(float, tried)), max(map(float, tried)))]
    rows = [(name, results["best"][name.partition(",")[0]],
             listed(results["tried"].get(name, {})), spread(losses[name])) for name in found]
    name, after = list(found)[2], ", ".join(f"{share:.0%}" for share in shares)
    text = table(("optimizer", "best rate", "tried, first seed", "validation loss ± deviation"), rows)
    text += (f"\n\nMuon reaches AdamW's final loss after {after} of the tokens, a number per seed, within its own "
             f"schedule. A step takes {slower:.2f} times as long.")
    text += "".join(f" The best rate of {one} is at the end of those tried." for one in edge)
    return Report([
        compared("Muon ends lower than AdamW, each at its best rate", difference(losses["AdamW"], losses["Muon"]), -1),
        measured("Muon reaches AdamW's final loss in half of the tokens", max(shares) < 0.5,
                 f"{min(shares):.0%} to {max(shares):.0%} of the tokens, a step {slower:.2f} times as long"),
        compared(f"with its whole schedule in {SHARE:.0%} of the steps, Muon ends no higher than AdamW",
                 difference(losses["AdamW"], losses[name]), -1),
    ], text, {"optimizers": lambda figure: loss_curves(figure, found, results["tokens_per_step"])})
