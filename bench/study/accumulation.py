"""Gradient accumulation.

Question: are the gradients that add up over k micro-batches those of one batch, and does peak memory stay the same,
however large the batch is?

Prediction: the gradients differ by rounding alone: by less than 1e-6 of the largest gradient in float32 and 1e-14 in
float64, for every k. At 16 windows per micro-batch the peak of a batch of 256 windows is within 5 % of that of 16; in
one pass, 256 windows need 16 times the memory of 16, within 20 %.
"""
import torch

from bench.study.mapping import give_back_memory, growth
from bench.study.page import COLORS, LINES, Report, measured, table
from train_gpt2 import GPT, GPTConfig

COUNTS, WINDOWS = (1, 2, 4, 8, 16), 16  # micro-batches of a batch of so many windows
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def totals_of(scale) -> list[int]:
    """Return the windows of the batches whose memory is measured; the first is a micro-batch, too."""
    smallest, most = (4, 8) if scale.device == "cuda" else (16, 16)  # more of GPT-2 124M are too many for one pass
    return [smallest * times for times in (1, 2, 4, 8, 16) if times <= most]


def make(scale, windows: int) -> tuple[GPT, torch.Tensor]:
    """Make a model with random weights, and random tokens (windows, T + 1)."""
    torch.manual_seed(0)
    device = torch.device(scale.device)
    model = GPT(GPTConfig(scale.sequence_length, scale.vocab_size, **scale.shape)).to(device)
    tokens = torch.randint(scale.vocab_size, (windows, scale.sequence_length + 1))
    return model, tokens.to(device)


def backward(model: GPT, tokens: torch.Tensor, k: int) -> None:
    """Set the gradients of the mean loss of tokens (windows, T + 1), in k micro-batches."""
    model.zero_grad(set_to_none=False)  # their memory stays
    for part in tokens.chunk(k):
        (model(part[:, :-1], part[:, 1:]) / k).backward()


def gradient(model: GPT, tokens: torch.Tensor, k: int) -> torch.Tensor:
    """Return all gradients of backward() as one vector."""
    backward(model, tokens, k)
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def differences(scale) -> dict[str, list[float]]:
    """Return by dtype, for each of COUNTS, the largest difference from one batch's gradient / its largest entry."""
    found = {}
    for name, dtype in DTYPES.items():
        model, tokens = make(scale, WINDOWS)
        model.to(dtype)
        model.forward = in_dtype(model, dtype)
        whole = gradient(model, tokens, 1)
        found[name] = [float((gradient(model, tokens, k) - whole).abs().max() / whole.abs().max()) for k in COUNTS]
    return found


def in_dtype(model: GPT, dtype: torch.dtype):
    """Return the model's function of the loss, computed in `dtype`: GPT.forward takes logits to float32."""
    def loss(idx, targets):
        logits = model.lm_head(model.hidden_states(idx)).to(dtype)  # (B, T, V)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss


def peaks(scale) -> dict[str, list[int]]:
    """Return the peak bytes for each total, in micro-batches and in one pass, beside weights and gradients."""
    give_back_memory()
    totals = totals_of(scale)
    model, tokens = make(scale, totals[-1])
    backward(model, tokens[:totals[0]], 1)  # the gradients, and what libraries keep, are there from now on
    device, found = tokens.device, {"micro-batches": [], "one pass": []}
    for total in totals:
        for way, k in (("micro-batches", total // totals[0]), ("one pass", 1)):
            runs = [growth(lambda total=total, k=k: backward(model, tokens[:total], k), device) for _ in range(3)]
            found[way].append(min(runs))  # the allocator needs more at times
    return found


def look(scale) -> dict:
    """Measure memory, and then differences, in a process of its own."""
    return {"peaks": peaks(scale), "differences": differences(scale)}


def measure(lab) -> dict:
    """Compare gradients and memory, at the scale's model and T."""
    return {"counts": COUNTS, "totals": totals_of(lab.scale), **lab.alone(look, lab.scale)}


def draw(figure, results: dict) -> None:
    """Draw differences by k, and memory by the batch."""
    left, right = figure.subplots(1, 2)
    for i, (name, values) in enumerate(results["differences"].items()):
        left.loglog(results["counts"][1:], values[1:], f"{LINES[i]}{'os'[i]}", color=COLORS[i], label=name)
    left.set(xlabel="micro-batches", ylabel="difference / largest gradient")
    for i, (name, values) in enumerate(results["peaks"].items()):
        right.loglog(results["totals"], [value / 1e6 for value in values], f"{LINES[i]}{'os'[i]}", color=COLORS[i],
                     label=name)
    right.set(xlabel="windows per batch", ylabel="peak memory of a step's passes, MB")
    right.set_yticks([value / 1e6 for value in values], [f"{value / 1e6:,.1f}" for value in values])  # of one pass
    right.set_yticks([], minor=True)
    for axes, ticks in ((left, results["counts"][1:]), (right, results["totals"])):
        axes.set_xticks(ticks, ticks)
        axes.set_xticks([], minor=True)
        axes.legend()


def report(results: dict) -> Report:
    """Compare gradients and memory."""
    apart = {name: max(values) for name, values in results["differences"].items()}
    micro, one = results["peaks"]["micro-batches"], results["peaks"]["one pass"]
    first, last = results["totals"][0], results["totals"][-1]
    grown = one[-1] / max(1, one[0])
    rows = [(total, f"{some / 1e6:,.1f}", f"{whole / 1e6:,.1f}")
            for total, some, whole in zip(results["totals"], micro, one)]
    gradients = [(k, *(f"{results['differences'][name][i]:.1e}" for name in DTYPES))
                 for i, k in enumerate(results["counts"])]
    text = "\n\n".join((table(("micro-batches", *(f"difference, {name}" for name in DTYPES)), gradients),
                        table(("windows per batch", f"MB in micro-batches of {first}", "MB in one pass"), rows)))
    return Report([
        measured("micro-batches have the gradient of one batch, to 1e-6 of the largest in float32",
                 apart["float32"] < 1e-6, f"{apart['float32']:.1e}"),
        measured("in float64, to 1e-14", apart["float64"] < 1e-14, f"{apart['float64']:.1e}"),
        measured("peak memory does not depend on the batch, within 5 %", max(micro) < 1.05 * min(micro),
                 f"{min(micro) / 1e6:,.1f} to {max(micro) / 1e6:,.1f} MB for {first} to {last} windows"),
        measured(f"in one pass, {last} windows need {last // first} times the memory of {first}, within 20 %",
                 abs(grown / (last / first) - 1) < 0.2, f"{grown:.1f} times"),
    ], text, {"accumulation": lambda figure: draw(figure, results)})
