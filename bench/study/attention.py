"""Attention, fused and written out.

Question: how do scaled_dot_product_attention and the written-out softmax compare in time and peak memory, forward and
backward, and where does each win?

Prediction: outputs and gradients are equal to 1e-5. Written out, attention needs three matrices of T x T per head at
its peak: 12 * T^2 bytes for each of the 12 heads, 2.4 GB at T = 4,096, 4 times as much per doubling of T. Fused, it
needs about six tensors as large as the queries, 75 MB at T = 4,096, twice as much per doubling. Fused is faster from
T = 256 on, and 4 times as fast at T = 4,096; at T = 128 neither is faster by more than a fifth.
"""
import math
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.study.mapping import give_back_memory, growth
from bench.study.page import COLORS, Report, measured, table
from plumbing import machine

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Size:
    """How much attention is measured; in float32, but that times and memory on a GPU are in bfloat16."""
    lengths: tuple[int, ...]
    B: int = 1
    heads: int = 12
    hs: int = 64
    seconds: float = 3.0  # for the timing at one length, if three repetitions fit
    dtype: torch.dtype = torch.float32


SIZES = {"cpu": Size((128, 256, 512, 1024, 2048, 4096)),
         "gpu": Size((128, 256, 512, 1024, 2048, 4096, 8192), B=4, dtype=torch.bfloat16),
         "quick": Size((128, 256, 512, 1024), heads=4, seconds=0.3),
         "toy": Size((64, 128, 256), heads=2, hs=16, seconds=0.05)}


def written_out(q, k, v):
    """Attend with the softmax written out, (B, nh, T, hs) each -> (B, nh, T, hs)."""
    T = q.size(-2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.size(-1)))  # (B, nh, T, T)
    scores = scores.masked_fill(future, -math.inf)  # each step's name is reused: what autograd does not keep is freed
    scores = F.softmax(scores, dim=-1)
    return scores @ v


def fused(q, k, v):
    """Attend with PyTorch's function, (B, nh, T, hs) each -> (B, nh, T, hs)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


SIDES = {"fused": fused, "written out": written_out}


def inputs(size: Size, T: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw queries, keys, values, which want gradients, and the gradient of the output, (B, nh, T, hs) each."""
    generator = torch.Generator().manual_seed(T)
    drawn = [torch.randn(size.B, size.heads, T, size.hs, generator=generator).to(device, dtype) for _ in range(4)]
    return [*(tensor.requires_grad_() for tensor in drawn[:3]), drawn[3]]


def attend(side: str, q, k, v, upstream) -> list[torch.Tensor]:
    """Return a side's output and the gradients of q, k and v, (B, nh, T, hs) each."""
    out = SIDES[side](q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def compare(size: Size, name: str) -> list[dict]:
    """Return for each T the largest differences between the sides, and each side's seconds, taken in turn."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as training does; read when the first tensor is made
    machine.keep_freed_memory()
    device, found = torch.device(name), []
    for T in size.lengths:
        given = inputs(size, T, device, torch.float32)
        ours, theirs = (attend(side, *given) for side in SIDES)
        apart = [float((a - b).abs().max()) for a, b in zip(ours, theirs)]
        largest = [float(b.abs().max()) for b in theirs]
        given, ours, theirs = inputs(size, T, device, size.dtype), None, None
        times, began = {side: [] for side in SIDES}, time.perf_counter()
        while len(times["fused"]) < 4 or (time.perf_counter() - began < size.seconds and len(times["fused"]) < 101):
            for side, taken in times.items():
                machine_ready(device)
                started = time.perf_counter()
                attend(side, *given)
                machine_ready(device)
                taken.append(time.perf_counter() - started)
        found.append({"T": T, "difference": apart, "largest": largest,
                      "seconds": {side: statistics.median(taken[1:]) for side, taken in times.items()}})  # [0] warms up
    return found


def machine_ready(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(size: Size, name: str) -> list[dict[str, int]]:
    """Return by side, for each T, the bytes at the peak of forward and backward, without queries, keys and values."""
    give_back_memory()
    device, found = torch.device(name), []
    for T in (16, *size.lengths):  # the first loads what the libraries load
        given = inputs(size, T, device, size.dtype)
        found.append({side: growth(lambda side=side, given=given: attend(side, *given), device) for side in SIDES})
    return found[1:]


def measure(lab) -> dict:
    """Time the sides in one process, which keeps freed memory, and measure memory in another, which gives it back."""
    size, device = SIZES[lab.scale.name], lab.scale.device
    rows = [row | {"peak": peak} for row, peak in zip(lab.alone(compare, size, device), lab.alone(peaks, size, device))]
    return {"B": size.B, "heads": size.heads, "hs": size.hs, "bytes": size.dtype.itemsize, "rows": rows}


def draw(figure, rows: list[dict]) -> None:
    """Draw time and peak memory by T."""
    for axes, key, unit, label in zip(figure.subplots(1, 2), ("seconds", "peak"), (1e-3, 1e6),
                                      ("forward and backward, ms", "peak memory, MB")):
        for i, (side, style) in enumerate(zip(SIDES, ("-o", "--s"))):
            axes.loglog([row["T"] for row in rows], [row[key][side] / unit for row in rows], style, color=COLORS[i],
                        label=side)
        axes.set_xticks([row["T"] for row in rows], [f"{row['T']:,}" for row in rows], rotation=45)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="T, tokens", ylabel=label)
    figure.axes[0].legend()


def wins(rows: list[dict]) -> str:
    """Say where each side is the faster one."""
    faster = {side: [f"{row['T']:,}" for row in rows if min(row["seconds"], key=row["seconds"].get) == side]
              for side in SIDES}
    return "; ".join(f"{side} is faster at T = {', '.join(found)}" for side, found in faster.items() if found)


def report(results: dict) -> Report:
    """Compare differences, time and memory."""
    rows = results["rows"]
    last, before = rows[-1], rows[-2]
    apart = max(max(row["difference"]) for row in rows)
    relative = max(a / b for row in rows for a, b in zip(row["difference"], row["largest"]))
    growths = {side: last["peak"][side] / max(1, before["peak"][side]) for side in SIDES}
    matrices = last["peak"]["written out"] / (
        results["B"] * results["heads"] * last["T"] ** 2 * results["bytes"])
    ratios = [row["seconds"]["written out"] / row["seconds"]["fused"] for row in rows]
    lines = [(f"{row['T']:,}", *(f"{row['seconds'][side] * 1e3:.2f}" for side in SIDES), f"{ratio:.2f}",
              *(f"{row['peak'][side] / 1e6:,.1f}" for side in SIDES), f"{max(row['difference']):.1e}")
             for row, ratio in zip(rows, ratios)]
    heads = ("T", "fused, ms", "written out, ms", "ratio", "fused, peak MB", "written out, peak MB",
             "largest difference")
    text = (f"B={results['B']}, {results['heads']} heads of {results['hs']}, forward and backward. {wins(rows)}. "
            "Differences are of outputs and gradients in float32.\n\n")
    long = [ratio for row, ratio in zip(rows, ratios) if row["T"] >= 256]
    by_T = {row["T"]: ratio for row, ratio in zip(rows, ratios)}
    claims = [
        measured("fused and written-out attention are equal to 1e-5", apart < TOLERANCE,
                 f"{apart:.1e} at most, {relative:.1e} of the largest value"),
        measured("written out, attention needs 4 times the memory for twice the T", 3.6 < growths["written out"] < 4.4,
                 f"{growths['written out']:.2f} times from T = {before['T']:,} to {last['T']:,}; {matrices:.1f} "
                 "matrices of T x T per head"),
        measured("fused, it needs twice the memory for twice the T", 1.6 < growths["fused"] < 2.4,
                 f"{growths['fused']:.2f} times; {last['peak']['fused'] / 1e6:,.0f} MB instead of "
                 f"{last['peak']['written out'] / 1e6:,.0f}"),
        measured("fused is faster from T = 256 on", min(long) > 1,
                 f"{min(long):.2f} to {max(long):.2f} times as fast, {ratios[0]:.2f} at T = {rows[0]['T']}"),
    ]
    if 128 in by_T:
        claims.append(measured("at T = 128 neither is faster by more than a fifth", 1 / 1.2 < by_T[128] < 1.2,
                               f"{by_T[128]:.2f} times as fast"))
    if 4096 in by_T:
        claims.append(measured("at T = 4,096 fused is 3 to 5 times as fast", 3 < by_T[4096] < 5,
                               f"{by_T[4096]:.2f} times"))
    return Report(claims, text + table(heads, lines), {"attention": lambda figure: draw(figure, rows)})
