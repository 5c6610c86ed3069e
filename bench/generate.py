"""Measure three ways to generate text with GPT-2 124M, side by side.

    python -m bench.generate

One model with random weights, one prompt, the likeliest token each time, float32. Three sides take turns in one
process:

    build-nanogpt   the whole sequence through the model again for every token, with the logits of all positions
    transformers    GPT2LMHeadModel.generate with its key/value cache
    ours            sampling.generate

All of them get huge pages for CPU tensors, as train_gpt2.py sets them. Times are medians of the runs. The sides must
generate the same tokens.
"""
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from bench.peers import transformers_twin
from plumbing import cli
from plumbing.cli import Positive, UserError, parse_flags, run_command
from plumbing.machine import describe_device
from plumbing.ranks import processes
from plumbing.sampling import generate
from plumbing.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT, MODELS, GPTConfig


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench; every field is a flag."""
    # Text
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"] = "gpt2"  # shape of the model
    prompt_tokens: Positive = 32  # random tokens in the prompt
    new_tokens: Positive = 256  # tokens generated after it
    # Runs
    runs: Positive = 3  # runs of each side, in turn
    device: str = "cpu"  # cpu, cuda or mps

    def __post_init__(self):
        cli.check_values(self)
        room = GPTConfig().block_size - self.prompt_tokens
        cli.require(self, "new_tokens", self.new_tokens <= room, f"at most {room} after such a prompt")


@torch.no_grad()
def generate_like_build_nanogpt(model: GPT, idx, new_tokens: int):
    """Read the whole sequence again for every token, idx (B, T) -> (B, T + new_tokens)."""
    for _ in range(new_tokens):
        logits = model(idx)[:, -1, :VOCAB_SIZE]  # (B, V)
        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def measure(config: BenchConfig, sides: dict, idx) -> dict:
    """Run the sides in turn on the prompts idx (B, T), print a table, return their `times` and whether they `agree`."""
    times, tokens = {side: [] for side in sides}, {}
    for _ in range(config.runs):
        for side, run in sides.items():
            started = time.perf_counter()
            tokens[side] = run(idx).cpu()
            times[side].append(time.perf_counter() - started)
    middle = {side: statistics.median(taken) for side, taken in times.items()}
    B = idx.size(0)
    print(f"{f'batch {B}':>13} {'seconds':>8} {'each run':>22} {'tokens/s':>9} {'x build-nanogpt':>15} "
          f"{'x transformers':>15}")
    for side, seconds in middle.items():
        runs = " ".join(f"{value:.1f}" for value in times[side])
        print(f"{side:>13} {seconds:>8.1f} {runs:>22} {B * config.new_tokens / seconds:>9.1f} "
              f"{middle['build-nanogpt'] / seconds:>15.2f} {middle['transformers'] / seconds:>15.2f}")
    agree = all(torch.equal(tokens["ours"], other) for other in tokens.values())
    print(f"the tokens {'agree' if agree else 'differ'}", flush=True)
    return {"times": times, "agree": agree}


def main(config: BenchConfig) -> None:
    """Print a table for each batch size and one JSON line. Raises UserError if the sides generate different tokens."""
    record = {"bench": "generate", **vars(config)}
    with processes(config.device) as world:
        torch.manual_seed(0)
        ours = GPT(GPTConfig(**MODELS[config.model])).to(world.device)
        theirs = transformers_twin(ours).to(world.device)
        settings = dict(max_new_tokens=config.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        sides = {
            "build-nanogpt": lambda idx: generate_like_build_nanogpt(ours, idx, config.new_tokens),
            "transformers": lambda idx: theirs.generate(idx, attention_mask=torch.ones_like(idx), **settings),
            "ours": lambda idx: generate(ours, idx, config.new_tokens, temperature=0),
        }
        print(f"{config.model} with random weights, {config.prompt_tokens} tokens of prompt, {config.new_tokens} new "
              f"tokens, float32, {describe_device(world.device)}")
        for B in (1, 8):
            idx = torch.randint(0, VOCAB_SIZE, (B, config.prompt_tokens), device=world.device)  # (B, T)
            record[f"batch_{B}"] = measure(config, sides, idx)
            if not record[f"batch_{B}"]["agree"]:
                raise UserError("the sides generated different tokens")
    print(json.dumps(record))


if __name__ == "__main__":
    run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
