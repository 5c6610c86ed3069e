"""Predict the memory that training needs, without a GPU, and measure it if there is one.

    python -m bench.memory

PyTorch's memory tracker follows two optimizer steps of two micro-steps each under bfloat16 autocast, on fake tensors,
which have shapes but no bytes: at B=1 and B=2, with and without --activation_checkpointing. The difference between B=2
and B=1 is what one more sequence takes; from it follows how many fit into 90 % of a card's memory, less what the CUDA
context takes.
"""
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from plumbing import cli, machine
from plumbing.cli import Positive, parse_flags, run_command
from train_gpt2 import GPT, MODELS, PADDED_VOCAB_SIZE, GPTConfig, TrainConfig, configure_optimizers

CONTEXT_BYTES = 0.6e9  # taken by CUDA and its libraries


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench; every field is a flag."""
    # What is predicted
    models: str = "gpt2,gpt2-medium,gpt2-large,gpt2-xl"  # models, with commas between them
    cards: str = "24,80"  # memory of the cards in GB, with commas between them
    sequence_length: Positive = 1024  # tokens per sequence

    def __post_init__(self):
        cli.check_values(self)
        cli.require(self, "models", set(self.models.split(",")) <= MODELS.keys(),
                    f"some of {','.join(MODELS)}, with commas between them")
        cli.require(self, "cards", all(re.fullmatch(r"\d+(\.\d+)?", card) for card in self.cards.split(",")),
                    "numbers with commas between them")


def train(model: GPT, B: int, T: int, device: torch.device) -> Iterator[list[torch.optim.Optimizer]]:
    """Do two optimizer steps of two micro-steps, as train_gpt2.py does them; yield the optimizers before each."""
    optimizers = configure_optimizers(model, TrainConfig(), device)
    idx = torch.zeros(B, T, dtype=torch.int64, device=device)  # (B, T)
    autocast = machine.autocast(torch.bfloat16, device)
    for _ in range(2):
        for _ in range(2):
            yield optimizers
            with autocast:
                loss = model(idx, idx)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)


def predict(shape: GPTConfig, B: int, T: int, recompute: bool) -> int:
    """Predict the peak bytes with fake tensors; `recompute` is --activation_checkpointing."""
    with FakeTensorMode():
        model = GPT(shape)
        model.activation_checkpointing = recompute
        run = train(model, B, T, torch.device("cpu"))
        tracker = MemTracker()
        tracker.track_external(model, *next(run))
        with tracker:
            for _ in run:
                tracker.reset_mod_stats()  # it follows one forward pass of a module at a time
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def measure(shape: GPTConfig, B: int, T: int, recompute: bool) -> int | None:
    """Measure the peak bytes on the GPU; return None if training does not fit."""
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


def look_at(name: str, recompute: bool, config: BenchConfig) -> dict:
    """Predict the peaks of a model at B=1 and B=2, measure it at B=1 if there is a GPU, and print its row."""
    T, cards = config.sequence_length, config.cards.split(",")
    shape = GPTConfig(block_size=T, vocab_size=PADDED_VOCAB_SIZE, **MODELS[name])
    one, two = (predict(shape, B, T, recompute) for B in (1, 2))
    fixed, per_sequence = 2 * one - two, two - one
    measured = measure(shape, 1, T, recompute) if torch.cuda.is_available() else None
    fits = [max(0, int((0.9 * (float(card) * 1e9 - CONTEXT_BYTES) - fixed) // per_sequence)) for card in cards]
    print(f"{name:>12} {'yes' if recompute else 'no':>13} {fixed / 1e9:>9.2f} {per_sequence / 1e9:>15.2f} "
          f"{one / 1e9:>7.2f} {f'{measured / 1e9:.2f}' if measured else 'no':>9}",
          *(f"{count or 'none':>12}" for count in fits), flush=True)
    return {"model": name, "checkpointing": recompute, "B1": one, "B2": two, "measured_B1": measured,
            "fits": dict(zip(cards, fits, strict=True))}


def main(config: BenchConfig) -> None:
    """Print the table and one JSON line."""
    machine.memory_bytes = lambda: 2**63  # fake tensors take none of this machine's memory
    print(f"T={config.sequence_length}, AdamW, bfloat16 autocast, torch {torch.__version__}; GB are 10^9 bytes\n"
          f"{'model':>12} {'checkpointing':>13} {'fixed GB':>9} {'per sequence GB':>15} {'B=1 GB':>7} {'measured':>9}",
          *(f"{f'B on {size} GB':>12}" for size in config.cards.split(",")))
    rows = [look_at(name, recompute, config) for name in config.models.split(",") for recompute in (False, True)]
    print(json.dumps({"bench": "memory", **vars(config), "rows": rows}))


if __name__ == "__main__":
    run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
