"""Continue a prompt with a checkpoint of train_gpt2.py, an exported folder or OpenAI's weights.

    python generate.py --prompt "The old woman" --num_samples 4   # the newest run below log/
    python generate.py --model gpt2 --interactive             # asks for one prompt after another; Ctrl-D ends it
    git log -1 | python generate.py --model log --prompt -    # a certain run; reads the prompt from stdin

Text streams to stdout as it is generated, in whole characters; timings go to stderr. A sample ends after max_new_tokens
or at <|endoftext|>, which is not printed. A transformers folder that brings its own tokenizer is given text with that,
and its texts end at its own token. How a token is drawn is in plumbing/sampling.py, choose_token().
"""
if __name__ == "__main__":
    from plumbing.cli import end_quietly
    end_quietly()  # on Ctrl-C, while PyTorch is imported

import contextlib
import functools
import importlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from plumbing import cli, machine, models
from plumbing.cli import Dtype, Prompt, Range, UserError, check_values, parse_flags, plural, require, run_command
from plumbing.model_tokenizer import Gpt2Tokenizer, tokenizer_of
from plumbing.ranks import processes
from plumbing.sampling import choose_token, stream_tokens
from plumbing.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT

GPT2 = Gpt2Tokenizer()


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate, and how. Raises UserError for a value out of its range."""
    # Text
    model: str = ""  # run folder, .pt file, transformers folder, or gpt2 to gpt2-xl (empty: the newest run below log/)
    prompt: Prompt = "Hello, I'm a language model,"  # text to continue (-: read from stdin; empty: begin a new text)
    num_samples: Annotated[int, Range(1, 10_000)] = 1  # samples per prompt, generated as one batch
    max_new_tokens: Annotated[int, Range(1, 1_000_000)] = 200  # tokens per sample, at most
    interactive: bool = False  # ask for prompts, each independent of those before it, until Ctrl-D
    # Sampling
    temperature: Annotated[float, Range(0, 1000)] = 1.0  # 0: the most likely token, 1: as the model predicts
    top_k: Annotated[int, Range(0, 2**31 - 1)] = 50  # most likely tokens to draw from (0: all)
    top_p: Annotated[float, Range(0, 1)] = 1.0  # total probability of the most likely tokens to draw from (1: all)
    seed: Annotated[int, Range(0, 2**63 - 1)] = 42  # seed for the draws
    # Machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: Dtype = "auto"  # precision of matrix products (auto: by hardware; 16 bits by autocast)

    def __post_init__(self):
        check_values(self)
        require(self, "top_p", self.top_p > 0, "more than 0 and at most 1")


def continuations(model: GPT, prompt: str, config: GenerateConfig, generator,
                  tokenizer=GPT2) -> Iterator[tuple[int, str, int]]:
    """Yield (sample, text, tokens): the text to print next, and the number of tokens generated since the last yield.

    All samples are generated at once. The first is printed as it grows; when it ends, what there is of the second
    follows, and so on. Raises UserError if the model has no rows for the prompt's tokens.
    """
    n, current, count = config.num_samples, 0, 0
    tokens, rows = tokenizer.encode(prompt), model.config.vocab_size
    if not tokens and tokenizer.first is None:
        raise UserError(f"{tokenizer.name} has no token that begins a text: give a --prompt")
    tokens = tokens or [tokenizer.first]
    if max(tokens) >= rows:
        raise UserError(f"the prompt has the token {max(tokens)}, but the model only {rows} rows of vocabulary")
    idx = torch.tensor([tokens], device=generator.device)  # (1, T)
    decoders = [tokenizer.decoder(tokens) for _ in range(n)]  # they hold back half characters
    waiting, ended = [""] * n, [False] * n
    choose = functools.partial(choose_token, temperature=config.temperature, top_k=config.top_k or None,
                               top_p=config.top_p, generator=generator)
    steps = stream_tokens(model, idx, config.max_new_tokens, choose, n, min(tokenizer.size, rows))
    for position, ids in enumerate(steps):  # (n, 1) each
        for i, token in enumerate(ids.squeeze(1).tolist()):
            if not ended[i]:
                count += 1
                ended[i] = token in tokenizer.ends or position == config.max_new_tokens - 1
                waiting[i] += "" if token in tokenizer.ends else decoders[i].step(token)
                waiting[i] += decoders[i].end() if ended[i] else ""
        while current < n and (waiting[current] or ended[current]):
            yield current, waiting[current], count
            waiting[current], count = "", 0
            if not ended[current]:
                break
            current += 1
        if all(ended):
            return


def answer(model: GPT, prompt: str, config: GenerateConfig, generator, tokenizer=GPT2) -> None:
    """Print the prompt and its continuations on stdout, and the speed on stderr."""
    started, tokens, last = time.perf_counter(), 0, -1
    for sample, text, count in continuations(model, prompt, config, generator, tokenizer):
        if sample > last:  # a new sample begins
            end = "\n" if last >= 0 else ""
            title = f"--- sample {sample + 1} of {config.num_samples}\n" if config.num_samples > 1 else ""
            print(end + title + prompt, end="", flush=True)
        print(text, end="", flush=True)
        last, tokens = sample, tokens + count
    print(flush=True)
    seconds = time.perf_counter() - started
    print(f"({tokens:,} {plural(tokens, 'token')} in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s)",
          file=sys.stderr)


def prompts(config: GenerateConfig) -> Iterator[str]:
    """Yield the prompt, or what stdin holds, or each line that a person types until Ctrl-D or Ctrl-C."""
    if not config.interactive:
        if config.prompt != "-":
            yield config.prompt
            return
        try:
            yield sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")  # echo adds one
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


def load(config: GenerateConfig, device: torch.device):
    """Load the model and its tokenizer. Raises UserError if they cannot write text."""
    source = models.find(config.model) or config.model
    tokenizer = tokenizer_of(source)
    model = GPT.load(source).to(device)
    if tokenizer.has_gpt2_tokens and model.config.vocab_size < VOCAB_SIZE:
        raise UserError(f"{config.model} has {model.config.vocab_size} tokens, too few for GPT-2's encoding")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{config.model} has weights that are not finite: name an earlier checkpoint")
    return model, tokenizer


def main(argv: list[str]) -> None:
    """Run the command with these flags."""
    flags = parse_flags(GenerateConfig, argv, "Continue a prompt with a GPT-2.")
    config = GenerateConfig(**flags)
    if config.interactive and "prompt" in flags:
        raise UserError("--interactive asks for prompts: leave --prompt out")
    config = models.or_newest(config)
    with processes(config.device) as world:
        device = world.device
        model, tokenizer = load(config, device)
        dtype, why = machine.pick_dtype(config.dtype, device)
        own = f", {tokenizer.name}" if tokenizer.name != GPT2.name else ""
        print(f"{config.model}, {model.count_parameters():,} parameters{own}; {machine.describe_device(device)}, "
              f"{cli.reasoned(str(dtype).removeprefix('torch.'), why)}", file=sys.stderr)
        generator = torch.Generator(device).manual_seed(config.seed)
        with machine.autocast(dtype, device):
            for prompt in prompts(config):
                try:
                    answer(model, prompt, config, generator, tokenizer)
                except (KeyboardInterrupt, UserError) as error:
                    if not config.interactive:
                        raise
                    print(f"error: {error}" if isinstance(error, UserError) else "\n(stopped)", file=sys.stderr)
                except BrokenPipeError:  # the reader of stdout has seen enough, as head has
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a place for what is still to be flushed
                    sys.exit(141)  # as a shell reports SIGPIPE
                except (RuntimeError, MemoryError) as error:
                    if not machine.is_out_of_memory(error):
                        raise
                    raise UserError("out of memory: use a smaller --num_samples") from error


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
