"""Continue a prompt with a model of train_gpt2.py, an exported folder or OpenAI's weights.

    python generate.py --model log --prompt "Hello, I'm a language model," --num_samples 4
    python generate.py --model gpt2 --interactive             # one prompt after the other; Ctrl-D ends
    git log -1 | python generate.py --model log --prompt -    # the prompt from stdin

The text comes as it is made, in whole characters; what is said about it goes to stderr. A sample ends with
<|endoftext|>, which is not shown, or after max_new_tokens. How a token is drawn is in sampling.stream_tokens().
"""
import codecs
import contextlib
import importlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from plumbing import machine
from plumbing.cli import UserError, parse_flags, plural, run_command
from plumbing.ranks import processes
from plumbing.sampling import stream_tokens
from plumbing.tokenizer import EOT, VOCAB_SIZE, gpt2_encoding
from train_gpt2 import DTYPES, GPT, load_model

LONGEST = 200_000  # characters of a prompt: tiktoken's stack overflows on a million spaces


@dataclass
class GenerateConfig:
    """What to write: every field is a flag."""

    model: str = "log"  # a run's folder, a .pt file, a transformers folder, or OpenAI's gpt2 ... gpt2-xl
    prompt: str = "Hello, I'm a language model,"  # what to continue; - reads stdin; empty: a new document
    num_samples: int = 1  # continuations of a prompt, made together
    max_new_tokens: int = 200  # tokens a sample, at most
    temperature: float = 1.0  # above 1 more daring, below 1 more cautious, 0: always the likeliest token
    top_k: int = 50  # draw from so many of the likeliest tokens (0: from all)
    top_p: float = 1.0  # and of these from the fewest that have this probability together
    seed: int = 42  # of the draws: the same again gives the same text
    interactive: bool = False  # ask for prompts, each on its own, until Ctrl-D
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # precision of matrix products: float32, or autocast to bfloat16 or float16 (auto: by hardware)

    def __post_init__(self):
        for name, right, what in (
            ("num_samples", 1 <= self.num_samples <= 10_000, "from 1 to 10,000"),
            ("max_new_tokens", 1 <= self.max_new_tokens <= 1_000_000, "from 1 to 1,000,000"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", 0 <= self.top_k < 2**31, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**63, "0 or more"),
            ("dtype", self.dtype in DTYPES, "auto, float32, bfloat16 or float16"),
        ):
            if not right:
                raise UserError(f"--{name} is {getattr(self, name)!r}, it must be {what}")


def continuations(model: GPT, prompt: str, config: GenerateConfig, generator) -> Iterator[tuple[int, str, int]]:
    """Yield (sample, text, tokens): what to show next, whole characters, and how many tokens were made meanwhile.

    All samples are made together. The first is shown as it comes; where it ends the second follows, as far as it is by
    then, and so on. UserError for a prompt that is too long to encode.
    """
    if len(prompt) > LONGEST:
        raise UserError(f"the prompt has {len(prompt):,} characters: take its end, the model reads no more than its "
                        f"last {model.config.block_size:,} tokens")
    encoding, n, shown, made = gpt2_encoding(), config.num_samples, 0, 0
    tokens = encoding.encode(prompt, allowed_special="all") or [EOT]
    idx = torch.tensor([tokens], device=generator.device)  # (1, T)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(n)]  # they keep torn characters back
    waiting, ended = [""] * n, [False] * n
    stream = stream_tokens(model, idx, config.max_new_tokens, config.temperature, config.top_k or None, generator,
                           config.top_p, n)
    for position, ids in enumerate(stream):
        for i, token in enumerate(ids.squeeze(1).tolist()):
            if not ended[i]:
                made, ended[i] = made + 1, token == EOT or position == config.max_new_tokens - 1
                new = b"" if token == EOT else encoding.decode_single_token_bytes(token)
                waiting[i] += decoders[i].decode(new, final=ended[i])
        while shown < n and (waiting[shown] or ended[shown]):
            yield shown, waiting[shown], made
            waiting[shown], made = "", 0
            if not ended[shown]:
                break
            shown += 1
        if all(ended):
            return


def answer(model: GPT, prompt: str, config: GenerateConfig, generator) -> None:
    """Print the prompt and its continuations on stdout, and on stderr how fast they came."""
    started, tokens, last = time.perf_counter(), 0, -1
    for sample, text, made in continuations(model, prompt, config, generator):
        if sample > last:  # a sample begins
            end = "\n" if last >= 0 else ""
            title = f"--- sample {sample + 1} of {config.num_samples}\n" if config.num_samples > 1 else ""
            print(end + title + prompt, end="", flush=True)
        print(text, end="", flush=True)
        last, tokens = sample, tokens + made
    print(flush=True)
    seconds = time.perf_counter() - started
    print(f"({tokens:,} {plural(tokens, 'token')} in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s)",
          file=sys.stderr)


def prompts(config: GenerateConfig) -> Iterator[str]:
    """What is to be continued: the prompt, what stdin holds, or what a person types until Ctrl-D or Ctrl-C."""
    if not config.interactive:
        if config.prompt != "-":
            yield config.prompt
            return
        try:
            yield sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")  # the one that echo adds
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not UTF-8 text ({error}): convert it") from error
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and history
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if line := input("> " if sys.stdin.isatty() else ""):
                yield line
    if sys.stdin.isatty():
        print()  # Ctrl-D leaves the cursor behind the prompt


def main(argv: list[str]) -> None:
    """Run the command with these flags."""
    flags = parse_flags(GenerateConfig, argv, "Continue a prompt with a GPT-2.")
    config = GenerateConfig(**flags)
    if config.interactive and "prompt" in flags:
        raise UserError("--interactive asks for prompts: leave --prompt out")
    with processes(config.device) as (_, _, device):
        model = load_model(config.model, device)
        if model.config.vocab_size < VOCAB_SIZE:
            raise UserError(f"{config.model} has {model.config.vocab_size} tokens, too few for GPT-2's encoding")
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise UserError(f"{config.model} has weights that are not finite: name an earlier checkpoint")
        dtype, why = machine.pick_dtype(config.dtype, device)
        print(f"{config.model}, {model.count_parameters():,} parameters; {machine.describe_device(device)}, "
              f"{str(dtype).removeprefix('torch.')}: {why}", file=sys.stderr)
        generator = torch.Generator(device).manual_seed(config.seed)
        with machine.autocast(dtype, device):
            for prompt in prompts(config):
                try:
                    answer(model, prompt, config, generator)
                except (KeyboardInterrupt, UserError) as error:
                    if not config.interactive:
                        raise
                    print(f"error: {error}" if isinstance(error, UserError) else "\n(stopped)", file=sys.stderr)
                except BrokenPipeError:  # whoever read this has seen enough, as head does
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be flushed has a place to go
                    sys.exit(141)  # as the shell says of SIGPIPE
                except (RuntimeError, MemoryError) as error:
                    if not machine.is_out_of_memory(error):
                        raise
                    raise UserError("out of memory: take fewer --num_samples") from error


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
