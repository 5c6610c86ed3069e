"""What happens inside a run: hooks of the study that record it, in ten lines for a run of your own.

    import train_gpt2
    from bench.study.watch import watching

    settings = train_gpt2.PRESETS["demo"] | {"out_dir": "log/watched", "sample_every": 0}
    with watching(every=20) as records:
        train_gpt2.main(train_gpt2.TrainConfig(**settings))
    for record in records:
        print(record["step"], record["logit_std"], record["entropy"], record["updates"])

Training is not changed: the recorded run has the losses of the same run without hooks.
"""
import contextlib
import math
import statistics
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt2

KINDS = ("wte", "wpe", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of matrices
RANKS = (10, 100, 1000)  # where classes of tokens end, by the rank of their frequency


@contextlib.contextmanager
def watching(every: int, noise: int = 0, windows: int = 32):
    """Yield a list that gets a record after each `every` steps of what is trained within the block.

    A record looks at `windows` windows of the validation set. It has, for the model after `step` steps: `logit_std` and
    `logit_max`; `entropy`, by layer, of attention as a share of the largest possible; `by_position`, (T,) losses in
    nats; `by_rank`, the mean losses of classes of tokens by the rank of their frequency; `updates`, by kind of matrix,
    norm of the next update / norm of the weights. With `noise`, also `noise`: the estimates of `gradient_noise` from
    that many micro-batches.
    """
    records = []

    class Watched(train_gpt2.Run):
        def evaluate(self):
            super().evaluate()
            if self.step % every == 1 % every and self.before:  # the step after a record has just been taken
                records[-1]["updates"] = update_ratios(self.before, matrices(self.raw_model))
            self.before = {}
            if self.step % every == 0 or self.step == self.config.max_steps:
                record = {"step": self.step, **look(self.raw_model, self.val_loader, self.ranks, self.world, windows)}
                if noise:
                    record["noise"] = gradient_noise(self.raw_model, self.train_loader, self.step, noise, self.world)
                records.append(record)
                self.before = {name: weight.clone() for name, weight in matrices(self.raw_model).items()}

        def train(self):
            self.before, self.ranks = {}, frequency_ranks(self.train_loader, self.raw_model.config.vocab_size)
            return super().train()

    with mock.patch.object(train_gpt2, "Run", Watched):
        yield records


def kind_of(name: str) -> str:
    """Name the kind of matrix that a parameter is; empty if it is none."""
    return next((kind for kind in KINDS if f"{kind}.weight" in name), "")


def matrices(model) -> dict[str, torch.Tensor]:
    """Return the matrices of a model, detached."""
    return {name: weight.detach() for name, weight in model.named_parameters() if kind_of(name)}


def update_ratios(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return, by kind of matrix, the mean of norm(after - before) / norm(before)."""
    ratios = {}
    for name, weight in before.items():
        ratio = (after[name] - weight).norm() / weight.norm().clamp_min(1e-12)
        ratios.setdefault(kind_of(name), []).append(float(ratio))
    return {kind: statistics.fmean(values) for kind, values in ratios.items()}


def frequency_ranks(loader, vocab_size: int) -> torch.Tensor:
    """Return the rank, from 0, of each token id by its frequency in the first shards, (V,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for shard in loader.shards[:2]:
        counts += np.bincount(np.asarray(shard[:2_000_000]), minlength=vocab_size)[:vocab_size]
    ranks = np.empty(vocab_size, dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(vocab_size)
    return torch.from_numpy(ranks)


def attention_entropy(qkv: torch.Tensor, n_head: int) -> float:
    """Return the mean entropy of causal attention, as a share of that of equal weights, ln(positions).

    `qkv` is c_attn's output, (B, T, 3C). The first position, which has no choice, is left out.
    """
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    q, k, _ = (t.view(B, T, n_head, C // n_head).transpose(1, 2).float() for t in qkv.split(C, dim=2))
    scores = q @ k.transpose(-2, -1) / math.sqrt(C // n_head)  # (B, nh, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # (B, nh, T, T)
    entropy = torch.special.entr(weights).sum(dim=-1)  # (B, nh, T)
    largest = torch.arange(1, T + 1, device=qkv.device).log()  # (T,)
    return float((entropy[..., 1:] / largest[1:]).mean())


@torch.no_grad()
def look(model, loader, ranks: torch.Tensor, world, windows: int) -> dict:
    """Run the model over the first `windows` of `loader`; return what a record has, but for the updates."""
    entropies, losses, targets, logit_squares, logit_max = [], [], [], [], 0.0
    hooks = [block.attn.c_attn.register_forward_hook(
        lambda module, inputs, qkv, n_head=block.attn.n_head: entropies[-1].append(attention_entropy(qkv, n_head)))
        for block in model.transformer.h]
    try:
        for i in range(max(1, min(windows, loader.n_windows) // loader.B)):
            x, y = loader.batch(i)  # (B, T) each
            entropies.append([])
            with world.autocast:
                logits = model(x).float()  # (B, T, V)
            losses.append(F.cross_entropy(logits.transpose(1, 2), y, reduction="none").cpu())  # (B, T)
            targets.append(y.cpu())
            centred = logits - logits.mean(dim=-1, keepdim=True)
            logit_squares.append(float(centred.square().mean()))
            logit_max = max(logit_max, float(centred.max()))
    finally:
        for hook in hooks:
            hook.remove()
    losses, classes = torch.cat(losses), ranks[torch.cat(targets)]  # (windows, T) each
    by_rank, low = {}, 0
    for high in (*RANKS, len(ranks)):
        chosen = losses[(classes >= low) & (classes < high)]
        if low < high and len(chosen):
            by_rank[f"{low + 1}-{high}"] = float(chosen.mean())
        low = max(low, high)
    return {"logit_std": math.sqrt(statistics.fmean(logit_squares)), "logit_max": logit_max,
            "entropy": [statistics.fmean(layer) for layer in zip(*entropies, strict=True)],
            "by_position": losses.mean(dim=0).tolist(), "by_rank": by_rank}


def noise_scale(small: float, big: float, B_small: int, B_big: int) -> tuple[float, float]:
    """Return |G|^2 and trace(S), unbiased, from squared gradient norms at two batch sizes.

    McCandlish et al. 2018, appendix A.1: E|g(B)|^2 = |G|^2 + trace(S) / B, with trace(S) of one token's gradients. The
    noise scale is trace(S) / |G|^2, in the unit of B.
    """
    squared = (B_big * big - B_small * small) / (B_big - B_small)
    trace = (small - big) / (1 / B_small - 1 / B_big)
    return squared, trace


def gradient_noise(model, loader, step: int, count: int, world) -> dict[str, float]:
    """Estimate |G|^2 and trace(S) from the gradients of `count` micro-batches; B is in tokens.

    The batches are far from those that training reads next. Gradients of the run are none at this time.
    """
    total, squares = None, []
    for i in range(count):
        with world.autocast:
            loss = model(*loader.batch((step + 1) * 7919 + i))
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        squares.append(float(flat.square().sum()))
        total = flat if total is None else total + flat
    B = loader.B * loader.T
    squared, trace = noise_scale(statistics.fmean(squares), float((total / count).square().sum()), B, B * count)
    return {"squared": squared, "trace": trace}
