"""Memory that training needs, predicted without a GPU and measured where there is one: `python bench/memory.py`

PyTorch's memory tracker follows two optimizer steps of two micro-steps each on fake tensors, which have shapes but no
bytes, under bfloat16 autocast: at B=1 and B=2, with and without --activation_checkpointing. What is more at B=2 is a
window's share; so many windows fit into 90 % of a card's memory, less what the CUDA context takes.
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from plumbing import machine
from plumbing.cli import UserError, parse_flags, run_command
from train_gpt2 import GPT, MODELS, PADDED_VOCAB_SIZE, GPTConfig, TrainConfig, batch_loss, configure_optimizer

CONTEXT = 0.6e9  # bytes that CUDA and its libraries take


@dataclass
class BenchConfig:
    """Every field is a flag."""

    models: str = "gpt2,gpt2-medium,gpt2-large,gpt2-xl"  # which, with commas
    cards: str = "24,80"  # sizes of cards in GB
    sequence_length: int = 1024  # tokens a window


def train(model: GPT, B: int, T: int, device: torch.device):
    """Two optimizer steps of two micro-steps, as train_gpt2.py does them; yields the optimizer before each."""
    optimizer = configure_optimizer(model, TrainConfig(), device)
    idx = torch.zeros(B, T, dtype=torch.int64, device=device)  # (B, T)
    for _ in range(2):
        for _ in range(2):
            yield optimizer
            batch_loss(model, idx, idx, torch.autocast(device.type, torch.bfloat16)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)


def predict(shape: GPTConfig, B: int, T: int, recompute: bool) -> int:
    """Peak bytes on fake tensors."""
    with FakeTensorMode():
        model = GPT(shape)
        model.activation_checkpointing = recompute
        run = train(model, B, T, torch.device("cpu"))
        tracker = MemTracker()
        tracker.track_external(model, next(run))
        with tracker:
            for _ in run:
                tracker.reset_mod_stats()  # it follows one forward pass of a module at a time
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def measure(shape: GPTConfig, B: int, T: int, recompute: bool) -> int | None:
    """Peak bytes on the GPU; None where they do not fit."""
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    try:
        model = GPT(shape).to(device)
        model.activation_checkpointing = recompute
        list(train(model, B, T, device))
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        model = None
        torch.cuda.empty_cache()


def main(config: BenchConfig) -> None:
    """Print a table and one JSON line."""
    machine.memory_bytes = lambda: 2**63  # fake tensors need none
    cards, T, rows = [float(size) for size in config.cards.split(",")], config.sequence_length, []
    if unknown := [name for name in config.models.split(",") if name not in MODELS]:
        raise UserError(f"--models takes {', '.join(MODELS)}, with commas between them, not {unknown[0]!r}")
    print(f"T={T}, AdamW, bfloat16 autocast, torch {torch.__version__}; GB are 10^9 bytes\n"
          f"{'model':>12} {'checkpointing':>13} {'fixed GB':>9} {'a window GB':>11} {'B=1 GB':>7} {'measured':>9}",
          *(f"{f'B on {size:g} GB':>12}" for size in cards))
    for name in config.models.split(","):
        shape = GPTConfig(block_size=T, vocab_size=PADDED_VOCAB_SIZE, **MODELS[name])
        for recompute in (False, True):
            one, two = (predict(shape, B, T, recompute) for B in (1, 2))
            measured = measure(shape, 1, T, recompute) if torch.cuda.is_available() else None
            fits = [int(max(0, (0.9 * (size * 1e9 - CONTEXT) - (2 * one - two)) // (two - one))) for size in cards]
            rows.append({"model": name, "checkpointing": recompute, "B1": one, "B2": two, "measured_B1": measured,
                         "fits": dict(zip(config.cards.split(","), fits, strict=True))})
            print(f"{name:>12} {'yes' if recompute else 'no':>13} {(2 * one - two) / 1e9:>9.2f} "
                  f"{(two - one) / 1e9:>11.2f} {one / 1e9:>7.2f} {f'{measured / 1e9:.2f}' if measured else 'no':>9}",
                  *(f"{count or 'no':>12}" for count in fits), flush=True)
    print(json.dumps({"bench": "memory", **vars(config), "rows": rows}))


if __name__ == "__main__":
    run_command(main, BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0])))
