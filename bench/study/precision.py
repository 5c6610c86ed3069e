"""float32, bfloat16 and float16.

Question: what do the 16-bit formats change in the loss, in speed and in memory, and what does bfloat16 cost where the
hardware does not have it?

Prediction: over 500 steps from the same seed the losses of bfloat16 and float16 autocast stay within 0.01 nats of
float32's. Where the hardware multiplies bfloat16 itself, steps of a larger model are 1.5 to 3 times as fast; where it
does not, they are far slower, and float16 on a CPU is slower too. Memory falls by less than a third: weights, gradients
and moments stay float32.
"""
import statistics
import time
from typing import NamedTuple

import torch

import train_gpt2
from bench.study.lab import from_json, to_json
from bench.study.page import Claim, Report, band, compared, curve_axis, measured, table
from bench.study.stats import CONFIRMED, REFUTED, difference, spread
from bench.train import peak_memory
from plumbing import machine

DTYPES = ("float32", "bfloat16", "float16")


class Size(NamedTuple):
    """The model and the batch whose steps are timed."""
    n_layer: int
    n_head: int
    n_embd: int
    V: int
    B: int
    T: int


SIZES = {"cpu": Size(4, 8, 512, V=4096, B=4, T=256), "gpu": Size(12, 12, 768, V=50304, B=8, T=1024),
         "emulated": Size(2, 4, 128, V=1024, B=1, T=128), "toy": Size(2, 2, 32, V=512, B=1, T=32)}


def measure(lab) -> dict:
    """Train in each precision that the hardware has, and time steps of a larger model in all of them."""
    scale, device = lab.scale, torch.device(lab.scale.device)
    native = {name: machine.is_native(getattr(torch, name), device) for name in DTYPES}
    steps = {"cpu": 500, "gpu": 500}.get(scale.name, scale.steps)
    length = dict(max_steps=steps, val_every=max(1, steps // 5))
    found = lab.by_seed({name: dict(dtype=name, **length) for name in DTYPES if native[name] or scale.name == "toy"})
    size = SIZES.get(scale.name, SIZES["toy"])
    if scale.name == "cpu" and not all(native.values()):
        size = SIZES["emulated"]
    timed = {name: lab.alone(time_steps, name, size, scale.device) for name in DTYPES}
    return {"tokens_per_step": scale.tokens_per_step, "native": native, "timed": timed, "outcomes": to_json(found)}


def time_steps(dtype: str, size: Size, device_name: str) -> dict:
    """Return tokens per second, and the peak memory in bytes, of a model in a process of its own.

    At most twenty steps, and no more after 20 seconds: what the hardware does not have is a hundred times slower.
    """
    device, B, T = torch.device(device_name), size.B, size.T
    torch.manual_seed(1)
    machine.keep_freed_memory()
    model = train_gpt2.GPT(train_gpt2.GPTConfig(T, size.V, size.n_layer, size.n_head, size.n_embd)).to(device)
    optimizers = train_gpt2.configure_optimizers(model, train_gpt2.TrainConfig(yes=True), device)
    scaler = machine.make_scaler(dtype, device)
    tokens = torch.randint(size.V, (B, T + 1), device=device)
    seconds, started = [], time.perf_counter()
    while len(seconds) < 20 and (len(seconds) < 2 or time.perf_counter() - started < 20):
        begun = time.perf_counter()
        with machine.autocast(getattr(torch, dtype), device):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return {"tokens_per_s": B * T / statistics.median(seconds[1:]), "peak_bytes": peak_memory()}


def by_step(found: dict, name: str) -> list[list[float]]:
    """Return, by seed, how far a precision's training losses are above float32's at each step."""
    return [[other - one for one, other in zip(plain.train, some.train, strict=True)]
            for plain, some in zip(found["float32"], found[name], strict=True)]


def figure_of_losses(figure, found: dict, tokens_per_step: int) -> None:
    """Draw the losses, and their differences from float32."""
    axes = figure.add_subplot(1, 2, 1)
    for index, (name, some) in enumerate(found.items()):
        x, losses = curve_axis(some, tokens_per_step)
        band(axes, x, losses, name, index)
    axes.set(xlabel="million tokens", ylabel="training loss, nats per token")
    axes.legend()
    axes = figure.add_subplot(1, 2, 2)
    for index, name in enumerate(found):
        if name != "float32":
            differences = by_step(found, name)
            x = [(i + 1) * tokens_per_step / 1e6 for i in range(len(differences[0]))]
            band(axes, x, differences, name, index)
    axes.set(xlabel="million tokens", ylabel="training loss above float32's, nats")
    if len(found) > 1:
        axes.legend()


def report(results: dict) -> Report:
    """Compare losses, speed and memory with float32's."""
    found, native, timed = from_json(results["outcomes"]), results["native"], results["timed"]
    losses = {name: [one.loss for one in some] for name, some in found.items()}
    base, claims = timed["float32"], []
    rows = []
    for name in DTYPES:
        speed = timed[name]["tokens_per_s"] / base["tokens_per_s"]
        rows.append((name, "yes" if native[name] else "no", spread(losses[name]) if name in losses else "not trained",
                     difference(losses["float32"], losses[name]) if name in losses and name != "float32" else "",
                     f"{timed[name]['tokens_per_s']:,.0f}", f"{speed:.2f}",
                     f"{timed[name]['peak_bytes'] / 2**20:,.0f}"))
        if name == "float32":
            continue
        if name in losses:
            claims.append(compared(f"{name} ends where float32 ends", difference(losses["float32"], losses[name]), 0))
        if native[name]:
            claims.append(measured(f"{name} is at least 1.5 times as fast where the hardware has it", speed >= 1.5,
                                   f"{speed:.2f} times"))
        else:
            claims.append(Claim(f"{name} is slower where the hardware does not have it",
                                CONFIRMED if speed < 1 else REFUTED, f"{speed:.2f} times as fast"))
    worst = {name: max(max(map(abs, some)) for some in by_step(found, name)) for name in found if name != "float32"}
    text = table(("dtype", "in hardware", "validation loss ± deviation", "above float32, 95 % interval", "tokens/s",
                  "times float32", "peak MiB"), rows)
    text += "\n\nSpeed and memory are those of a larger model in a process of its own, without torch.compile."
    text += "".join(f" The largest difference of a training loss is {value:.4f} for {name}."
                    for name, value in worst.items())
    return Report(claims, text,
                  {"precision": lambda figure: figure_of_losses(figure, found, results["tokens_per_step"])})
