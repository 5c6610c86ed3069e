"""hellaswag.py beside the usual loop, at 124M: `python bench/hellaswag.py --data hellaswag_val.jsonl`

One model with random weights, read by two sides in turn, in one process and in float32:

    usual    an example at a time: four rows, context + ending, padded to the longest; transformers' GPT2LMHeadModel;
             logits of every position; the mean loss over the ending's tokens
    ours     hellaswag.evaluate with our GPT

Both tokenize as they go, each time anew, and both get huge pages for CPU tensors, as train_gpt2.py sets them. The
examples are taken evenly from the whole file, since its first third is shorter than the rest. Medians of the runs.
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # bench/ has a hellaswag of its own

import json
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.peers import transformers_twin
from hellaswag import encode, evaluate, load_examples
from plumbing.cli import UserError, parse_flags, run_command
from plumbing.machine import describe_device
from plumbing.network import progress_bar
from plumbing.tokenizer import gpt2_encoding
from train_gpt2 import GPT, GPTConfig, processes


@dataclass
class BenchConfig:
    """Every field is a flag."""

    data: str = ""  # file of examples (empty: the official validation split, downloaded)
    examples: int = 300  # so many of them (0: all)
    runs: int = 3  # of each side, in turn


@torch.no_grad()
def usual_loop(model, examples) -> list[int]:
    """The ending that each example's lowest mean loss chooses, the way it is usually computed."""
    encoding, predictions = gpt2_encoding(), []
    for example in examples:
        context = encoding.encode_ordinary(example["ctx"])
        endings = [encoding.encode_ordinary(" " + ending) for ending in example["endings"]]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.int64)  # (4, T)
        mask = torch.zeros_like(tokens)
        for i, ending in enumerate(endings):
            tokens[i, :len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context):len(context) + len(ending)] = 1
        logits = model(tokens).logits[:, :-1].contiguous()  # (4, T-1, V)
        targets, mask = tokens[:, 1:].contiguous(), mask[:, 1:].contiguous()
        losses = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none")
        losses = losses.view(4, -1) * mask  # (4, T-1)
        predictions.append((losses.sum(dim=1) / mask.sum(dim=1)).argmin().item())
    return predictions


def main(config: BenchConfig) -> None:
    """Print the table and one JSON line."""
    with processes("cpu") as (_, _, device):
        examples = load_examples(path=config.data)
        n = min(config.examples or len(examples), len(examples))
        examples = [examples[i * len(examples) // n] for i in range(n)]
        torch.manual_seed(0)
        ours = GPT(GPTConfig())
        theirs = transformers_twin(ours)
        sides = {"usual": lambda: usual_loop(theirs, examples),
                 "ours": lambda: evaluate(ours, examples, device)["predictions"]}
        times, predictions = {side: [] for side in sides}, {}
        with progress_bar(2 * config.runs * len(examples), 0, " examples") as bar:
            for _ in range(config.runs):
                for side, run in sides.items():
                    encode.cache_clear()
                    started = time.perf_counter()
                    predictions[side] = run()
                    times[side].append(time.perf_counter() - started)
                    bar.update(len(examples))
    differing = sum(a != b for a, b in zip(predictions["usual"], predictions["ours"]))
    middle = {side: statistics.median(taken) for side, taken in times.items()}
    print(f"{len(examples)} examples, GPT-2 124M with random weights, float32, {describe_device(device)}")
    print(f"{'side':>6} {'seconds':>8} {'each run':>22} {'examples/s':>11} {'x usual':>8}")
    for side, seconds in middle.items():
        runs = " ".join(f"{value:.1f}" for value in times[side])
        print(f"{side:>6} {seconds:>8.1f} {runs:>22} {len(examples) / seconds:>11.2f} "
              f"{middle['usual'] / seconds:>8.2f}")
    print(f"differing predictions: {differing} of {len(examples)}")
    print(json.dumps({"bench": "hellaswag", "examples": len(examples), "times": times, "differing": differing,
                      "ratio": middle["usual"] / middle["ours"]}))
    if differing:
        raise UserError("the two sides chose different endings")


if __name__ == "__main__":
    run_command(main, BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0])))
