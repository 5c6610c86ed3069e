"""Measure hellaswag.py against the usual loop over examples, at 124M.

    python -m bench.hellaswag --data hellaswag_val.jsonl

One model with random weights in float32. Two sides take turns in one process:

    usual    one example at a time: four rows of context + ending, padded to the longest; transformers'
             GPT2LMHeadModel; logits of every position; the mean loss over the tokens of the ending
    ours     hellaswag.evaluate with our GPT

Both tokenize every text anew in each run, and both get huge pages for CPU tensors, as train_gpt2.py sets them. The
examples are taken evenly from the whole file, as its first third is shorter than the rest. Times are medians of the
runs. The sides must choose the same endings.
"""
import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.peers import transformers_twin
from hellaswag import encode, evaluate, load_examples
from plumbing import cli
from plumbing.cli import Positive, UserError, parse_flags, run_command
from plumbing.machine import describe_device
from plumbing.progress import progress_bar
from plumbing.ranks import processes
from plumbing.tokenizer import gpt2_encoding
from train_gpt2 import GPT, GPTConfig


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench; every field is a flag."""
    # Data
    data: str = ""  # file of examples (empty: the official validation split, downloaded)
    examples: int = 300  # examples to score (0: all)
    # Runs
    runs: Positive = 3  # runs of each side, in turn

    def __post_init__(self):
        cli.check_values(self)


@torch.no_grad()
def usual_loop(model, examples: list[dict]) -> list[int]:
    """Return the ending with the lowest mean loss for each example, as it is usually computed."""
    encoding, predictions = gpt2_encoding(), []
    for example in examples:
        context = encoding.encode_ordinary(example["ctx"])
        endings = [encoding.encode_ordinary(" " + ending) for ending in example["endings"]]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.int64)  # (4, T)
        mask = torch.zeros_like(tokens)  # (4, T)
        for i, ending in enumerate(endings):
            tokens[i, :len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context):len(context) + len(ending)] = 1
        logits = model(tokens).logits[:, :-1].contiguous()  # (4, T-1, V)
        targets, mask = tokens[:, 1:].contiguous(), mask[:, 1:].contiguous()  # (4, T-1) each
        losses = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none")
        losses = losses.view(4, -1) * mask  # (4, T-1)
        predictions.append((losses.sum(dim=1) / mask.sum(dim=1)).argmin().item())
    return predictions


def measure(config: BenchConfig, sides: dict, n: int) -> tuple[dict, dict]:
    """Run the sides in turn, on n examples each -> the seconds of each run, and the predictions."""
    times, predictions = {side: [] for side in sides}, {}
    with progress_bar(len(sides) * config.runs * n, 0, " examples") as bar:
        for _ in range(config.runs):
            for side, run in sides.items():
                encode.cache_clear()
                started = time.perf_counter()
                predictions[side] = run()
                times[side].append(time.perf_counter() - started)
                bar.update(n)
    return times, predictions


def main(config: BenchConfig) -> None:
    """Print the table and one JSON line. Raises UserError if the sides choose different endings."""
    with processes("cpu") as world:
        examples = load_examples(path=config.data)
        n = min(config.examples or len(examples), len(examples))
        examples = [examples[i * len(examples) // n] for i in range(n)]
        torch.manual_seed(0)
        ours = GPT(GPTConfig())
        theirs = transformers_twin(ours)
        sides = {"usual": lambda: usual_loop(theirs, examples),
                 "ours": lambda: evaluate(ours, examples, world)["predictions"]}
        times, predictions = measure(config, sides, n)
        print(f"{n} examples, GPT-2 124M with random weights, float32, {describe_device(world.device)}")
    differing = sum(a != b for a, b in zip(predictions["usual"], predictions["ours"]))
    middle = {side: statistics.median(taken) for side, taken in times.items()}
    print(f"{'side':>6} {'seconds':>8} {'each run':>22} {'examples/s':>11} {'x usual':>8}")
    for side, seconds in middle.items():
        runs = " ".join(f"{value:.1f}" for value in times[side])
        print(f"{side:>6} {seconds:>8.1f} {runs:>22} {n / seconds:>11.2f} {middle['usual'] / seconds:>8.2f}")
    print(f"differing predictions: {differing} of {n}")
    print(json.dumps({"bench": "hellaswag", "examples": n, "times": times, "differing": differing,
                      "ratio": middle["usual"] / middle["ours"]}))
    if differing:
        raise UserError("the sides chose different endings")


if __name__ == "__main__":
    run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
