"""Warmup, schedule and clipping, and what happens inside a run.

Question: what do warmup, the shape of the decay and clipping change, and how do updates, logits, attention and the
losses of positions and tokens move during training?

Prediction: pre-norm at this size hardly needs warmup: none, short and long end within 0.03 nats. Cosine and linear
decay are equal; a constant rate is worse by 0.05 nats or more, and a linear fall in the last fifth makes up for it.
Clipping at 1 makes no difference, since norms are above 1 in the first steps alone. Updates are 0.1 to 2 % of the
weights and fall with the learning rate; attention starts uniform and its entropy falls; frequent tokens are learned
first, and late positions have the lower loss.
"""
from bench.study.lab import from_json, to_json
from bench.study.page import Report, against, band, compared, curve_axis, mean, measured, table


def variants(scale) -> dict[str, dict]:
    """Return what is tried, name -> arguments of trial()."""
    steps = scale.steps
    return {
        "GPT-2": dict(watch=max(min(4, steps // 2), steps // 15)),
        "no warmup": dict(warmup_steps=0),
        "short warmup": dict(warmup_steps=max(1, steps // 60)),
        "long warmup": dict(warmup_steps=steps // 3),
        "linear": dict(decay="linear"),
        "constant": dict(variant="constant"),
        "constant, then linear": dict(decay="linear", decay_steps=max(1, steps // 5)),
        "no clipping": dict(grad_clip=0.0),
    }


def measure(lab) -> dict:
    """Train each variant, and watch GPT-2's own recipe."""
    return {"tokens_per_step": lab.scale.tokens_per_step, "outcomes": to_json(lab.by_seed(variants(lab.scale)))}


def figure_of_runs(figure, found: dict, tokens_per_step: int) -> None:
    """Draw the losses, warmups on the left, schedules on the right."""
    groups = (("GPT-2", "no warmup", "short warmup", "long warmup"),
              ("GPT-2", "linear", "constant", "constant, then linear"))
    for place, names in enumerate(groups):
        axes = figure.add_subplot(1, 2, place + 1)
        for index, name in enumerate(names):
            x, losses = curve_axis(found[name], tokens_per_step, 0.05)
            label = {"GPT-2": ("GPT-2: a tenth" if place == 0 else "GPT-2: cosine")}.get(name, name)
            band(axes, x, losses, label, index)
        axes.set(title=("warmup", "schedule")[place], xlabel="million tokens", ylabel="training loss, nats per token")
        axes.legend()


def figure_of_norms(figure, found: dict, tokens_per_step: int) -> None:
    """Draw gradient norms, and the ratio of updates to weights by kind of matrix."""
    axes = figure.add_subplot(1, 2, 1)
    for index, name in enumerate(("GPT-2", "no warmup", "no clipping")):
        steps = len(found[name][0].norm)
        x = [(step + 1) * tokens_per_step / 1e6 for step in range(steps)]
        band(axes, x, [one.norm for one in found[name]], name, index)
    axes.set(title="gradient norm before clipping", xlabel="million tokens", ylabel="norm", yscale="log")
    axes.legend()
    axes = figure.add_subplot(1, 2, 2)
    records = [[record for record in one.records if "updates" in record] for one in found["GPT-2"]]
    x = [record["step"] * tokens_per_step / 1e6 for record in records[0]]
    for index, kind in enumerate(records[0][0]["updates"]):
        band(axes, x, [[record["updates"][kind] for record in some] for some in records], kind, index)
    axes.set(title="size of an update / size of the weights", xlabel="million tokens", ylabel="ratio", yscale="log")
    axes.legend(ncols=2)


def figure_of_inside(figure, outcomes: list, tokens_per_step: int) -> None:
    """Draw logits, attention, and the losses by position and by frequency, of GPT-2's own recipe."""
    axes = figure.subplots(2, 2)
    records = [one.records for one in outcomes]
    x = [record["step"] * tokens_per_step / 1e6 for record in records[0]]
    band(axes[0, 0], x, [[record["logit_std"] for record in some] for some in records], "deviation", 0)
    band(axes[0, 0], x, [[record["logit_max"] for record in some] for some in records], "largest", 1)
    axes[0, 0].set(title="logits", ylabel="logit", yscale="log")
    for layer in range(len(records[0][0]["entropy"])):
        entropies = [[record["entropy"][layer] for record in some] for some in records]
        band(axes[0, 1], x, entropies, f"block {layer + 1}", layer)
    axes[0, 1].set(title="entropy of attention", ylabel="share of uniform")
    for index, at in enumerate(sorted({len(x) // 5, len(x) // 2, len(x) - 1})):
        losses = [binned(some[at]["by_position"]) for some in records]
        width = len(records[0][0]["by_position"]) / len(losses[0])
        middles = [(i + 0.5) * width for i in range(len(losses[0]))]
        band(axes[1, 0], middles, losses, f"{x[at]:.2f} million tokens", index)
    axes[1, 0].set(title="loss by position", xlabel="position", ylabel="nats")
    axes[1, 0].margins(y=0.4)  # room for the legend
    for index, ranks in enumerate(records[0][0]["by_rank"]):
        losses = [[record["by_rank"][ranks] for record in some] for some in records]
        band(axes[1, 1], x, losses, f"ranks {ranks}", index)
    axes[1, 1].set(title="loss by frequency of the token", xlabel="million tokens", ylabel="nats")
    for one in axes.flat:
        one.legend(fontsize="small")
    figure.set_size_inches(8, 6.4)


def binned(losses: list[float], bins: int = 16) -> list[float]:
    """Return the means of `bins` equal stretches of positions."""
    width = max(1, len(losses) // bins)
    return [mean(losses[i:i + width]) for i in range(0, len(losses) - width + 1, width)]


def report(results: dict) -> Report:
    """Compare each variant with GPT-2's own recipe, and say what moved within it."""
    found = from_json(results["outcomes"])
    apart, rows = against(found, "GPT-2")
    first, last = ([one.records[i] for one in found["GPT-2"]] for i in (0, -1))
    updates = [record["updates"] for one in found["GPT-2"] for record in one.records[1:] if "updates" in record]
    low, high = (pick(value for update in updates for value in update.values()) for pick in (min, max))
    entropy = [mean(mean(record["entropy"]) for record in records) for records in (first, last)]
    ends = [mean(binned(record["by_position"])[i] for record in last) for i in (0, -1)]
    above = [mean(norm > 1 for norm in one.norm) for one in found["GPT-2"]]
    rows = [(*row, f"{max(max(one.norm) for one in found[row[0]]):.1f}") for row in rows]
    text = table(("variant", "validation loss ± deviation", "above GPT-2, 95 % interval", "largest norm"), rows)
    text += f"\n\nThe gradient norm is above 1, and so clipped, in {mean(above):.0%} of the steps of GPT-2's recipe."
    return Report([
        compared("training without warmup ends as well", apart["no warmup"], 0, 0.03),
        compared("a long warmup, a third of the run, ends as well", apart["long warmup"], 0, 0.03),
        compared("linear decay ends as well as cosine", apart["linear"], 0),
        compared("a constant rate ends higher", apart["constant"], 1),
        compared("constant, then linear in the last fifth, ends as well as cosine", apart["constant, then linear"], 0),
        compared("clipping at 1 makes no difference", apart["no clipping"], 0),
        measured("updates are 0.1 to 2 % of the weights", low > 0.001 and high < 0.02, f"{low:.2%} to {high:.2%}"),
        measured("attention begins uniform and sharpens", entropy[0] > 0.99 and entropy[1] < 0.95,
                 f"{entropy[0]:.0%} to {entropy[1]:.0%} of the entropy of equal weights"),
        measured("late positions have a lower loss than early ones", ends[1] < ends[0],
                 f"{ends[0]:.2f} in the first 16th, {ends[1]:.2f} in the last"),
    ], text, {"dynamics_runs": lambda figure: figure_of_runs(figure, found, results["tokens_per_step"]),
              "dynamics_norms": lambda figure: figure_of_norms(figure, found, results["tokens_per_step"]),
              "dynamics_inside": lambda figure: figure_of_inside(figure, found["GPT-2"], results["tokens_per_step"])})
