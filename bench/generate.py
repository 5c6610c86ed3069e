"""Three ways to write text with GPT-2 124M side by side: `python bench/generate.py`

One model with random weights, one prompt, greedy tokens, float32, three sides in turn in one process:

    curriculum   the whole sequence through the model again for every token, all logits, as build-nanogpt samples
    transformers GPT2LMHeadModel.generate with its key/value cache
    ours         sampling.generate

All get huge pages for CPU tensors, as train_gpt2.py sets them. Medians of the runs. The greedy tokens must agree.
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # bench/ has a generate of its own

import json
import statistics
import time
from dataclasses import dataclass

import torch

from bench.peers import transformers_twin
from plumbing.cli import UserError, parse_flags, run_command
from plumbing.machine import describe_device
from plumbing.ranks import processes
from plumbing.sampling import generate
from plumbing.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT, MODELS, GPTConfig


@dataclass
class BenchConfig:
    """Every field is a flag."""

    model: str = "gpt2"  # shape: gpt2, gpt2-medium, gpt2-large, gpt2-xl or demo
    prompt_tokens: int = 32  # random ones
    new_tokens: int = 256  # written after them
    runs: int = 3  # of each side, in turn
    device: str = "cpu"  # cpu, cuda or mps


@torch.no_grad()
def curriculum(model: GPT, idx, new_tokens: int):
    """The whole sequence again for every token, idx (B, T) -> (B, T + new_tokens)."""
    for _ in range(new_tokens):
        logits = model(idx)[0][:, -1, :VOCAB_SIZE]  # (B, V)
        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def main(config: BenchConfig) -> None:
    """Print a table for each batch size and one JSON line."""
    record = {"bench": "generate", **vars(config)}
    with processes(config.device) as (_, _, device):
        torch.manual_seed(0)
        ours = GPT(GPTConfig(**MODELS[config.model])).to(device).eval()
        theirs = transformers_twin(ours).to(device)
        settings = dict(max_new_tokens=config.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        sides = {
            "curriculum": lambda idx: curriculum(ours, idx, config.new_tokens),
            "transformers": lambda idx: theirs.generate(idx, attention_mask=torch.ones_like(idx), **settings),
            "ours": lambda idx: generate(ours, idx, config.new_tokens, temperature=0),
        }
        print(f"{config.model} with random weights, {config.prompt_tokens} tokens of prompt, {config.new_tokens} new "
              f"ones, float32, {describe_device(device)}")
        for B in (1, 8):
            idx = torch.randint(0, VOCAB_SIZE, (B, config.prompt_tokens), device=device)  # (B, T)
            times, tokens = {side: [] for side in sides}, {}
            for _ in range(config.runs):
                for side, run in sides.items():
                    started = time.perf_counter()
                    tokens[side] = run(idx).cpu()
                    times[side].append(time.perf_counter() - started)
            middle = {side: statistics.median(taken) for side, taken in times.items()}
            print(f"{f'batch {B}':>12} {'seconds':>8} {'each run':>22} {'tokens/s':>9} {'x curriculum':>13} "
                  f"{'x transformers':>15}")
            for side, seconds in middle.items():
                runs = " ".join(f"{value:.1f}" for value in times[side])
                print(f"{side:>12} {seconds:>8.1f} {runs:>22} {B * config.new_tokens / seconds:>9.1f} "
                      f"{middle['curriculum'] / seconds:>13.2f} {middle['transformers'] / seconds:>15.2f}")
            agree = all(torch.equal(tokens["ours"], other) for other in tokens.values())
            print(f"greedy tokens {'agree' if agree else 'differ'}")
            record[f"batch_{B}"] = {"times": times, "agree": agree}
            if not agree:
                raise UserError("the sides wrote different tokens")
    print(json.dumps(record))


if __name__ == "__main__":
    run_command(main, BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0])))
