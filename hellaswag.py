"""HellaSwag: does a model find the real ending of a story likelier than three false ones? (Zellers et al. 2019)

    python hellaswag.py                                # the newest run below log/, on all 10,042 examples
    python hellaswag.py --model gpt2                   # OpenAI's weights; also a transformers folder or a .pt file
    python hellaswag.py --model log --style harness    # as lm-eval scores it
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model log

Each style gives two accuracies: for `acc` the model chooses the ending with the lowest summed loss, for `acc_norm` the
one with the lowest mean loss.

    completion    context and " " + ending, encoded separately; the mean is over tokens (as in build-nanogpt)
    harness       lm-eval's task: cleaned texts, "activity_label: ctx_a Ctx_b", context and ending encoded together; the
                  mean is over the characters of the ending

An example is four rows of tokens, context + ending. The beginning that its rows share, nearly all of the context, is
read once, into the model's key/value cache. The endings follow, and logits are computed only for ending tokens.

    1 data    2 rendering    3 scoring    4 the command

Shapes: n examples, R rows in a pass, L shared tokens, T tokens after them, C channels, V vocabulary.
"""
if __name__ == "__main__":
    from plumbing.cli import end_quietly
    end_quietly()  # on Ctrl-C, while PyTorch is imported

import dataclasses
import functools
import itertools
import math
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from plumbing import accuracy, cli, jsonl, machine, models, network, progress, published, sampling, tokenizer
from plumbing.batching import Row, Work, assign_batches, make_batches, make_passes
from plumbing.cli import Dtype, Stopped, UserError, print0
from plumbing.ranks import World, processes
from plumbing.tokenizer import VOCAB_SIZE

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/data/"
FILES = {  # size in bytes and SHA-256, which TensorFlow Datasets lists too
    "train": (47496131, "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d"),
    "val": (12246618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    "test": (11752147, "da082b00543e422b8d25394614d102944586986def4de5cd1bd36d86bcb76261"),
}
FOLDER = "hellaswag"  # for downloads
MAX_CHARACTERS = 200_000  # per example, many times the official ones'
Style = Literal["completion", "harness"]


@dataclass(frozen=True)
class HellaSwagConfig:
    """One evaluation: every field is a flag."""
    # What is scored
    model: str = ""  # run folder, .pt file, transformers folder, or gpt2 to gpt2-xl (empty: the newest run below log/)
    data: str = ""  # file of examples, .jsonl or .jsonl.gz (empty: downloads the official one)
    split: Literal["val", "train"] = "val"  # official file to score; the labels of test are not public
    limit: int = 0  # examples, from the start of the file (0: all)
    # How it is scored
    style: Style = "completion"  # way of scoring, build-nanogpt's (completion) or lm-eval's (harness)
    batch_tokens: int = 0  # ending tokens per forward pass; fewer need less memory (0: 1024 on a CPU, else 4096)
    out: str = ""  # new .jsonl file for the losses and predictions of each example (empty: none)
    # Machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: Dtype = "auto"  # precision of matrix products (auto: by hardware; 16 bits by autocast)

    def __post_init__(self):
        cli.check_values(self)


# -----------------------------------------------------------------------------
# 1. Data. Official files are whole or absent, and each example is checked before any is scored.
# -----------------------------------------------------------------------------


def iterate_examples(split: str = "val", path: str | Path | None = None, style: Style = "completion") -> Iterator[dict]:
    """Yield the examples of an official split, downloaded if it is missing, or of your own file in the same schema.

    Raises UserError, naming the line, at the first example that cannot be scored in this style.
    """
    if not path:
        path = Path(FOLDER) / f"hellaswag_{split}.jsonl"
        network.download(URL + path.name, path, *FILES[split])
    for number, example in jsonl.read_jsonl(path):
        check_example(example, f"{path}, line {number}", style)
        yield example


def check_example(example: dict, name: str, style: Style) -> None:
    """Raise UserError, beginning with `name`, unless an example has everything that a style needs."""
    def require(true, otherwise: str) -> None:
        if not true:
            raise UserError(f"{name}: {otherwise}")

    require(isinstance(example, dict), "this is not a JSON object")
    require(len(str(example)) < MAX_CHARACTERS, f"it has more than {MAX_CHARACTERS:,} characters")
    for key in ("ctx",) if style == "completion" else ("activity_label", "ctx_a", "ctx_b"):
        require(isinstance(example.get(key), str), f"it has no text {key!r}, which --style {style} needs")
    require(context_of(example, style).strip(), "its context is empty")
    endings, label = example.get("endings"), example.get("label")
    require(isinstance(endings, list) and len(endings) == 4, "its 'endings' are not a list of four texts")
    for i, ending in enumerate(endings):
        has_words = isinstance(ending, str) and (ending if style == "completion" else clean(ending)).strip()
        require(has_words, f"its ending {i} is empty or not a text")
    require(str(label) in ("0", "1", "2", "3"), f"its 'label' is {label!r}, not the number of an ending, 0 to 3")


def load_examples(split: str = "val", path: str | Path | None = None, limit: int = 0, style: Style = "completion",
                  world: World | None = None) -> list[dict]:
    """Load the first `limit` examples (0: all) on rank 0 and send them to the other ranks.

    Raises UserError on every rank if rank 0 cannot load them.
    """
    def load() -> list[dict]:
        try:
            examples = list(itertools.islice(iterate_examples(split, path, style), limit or None))
            encode("")  # raises now, not in the middle of a run, if the encoding cannot be loaded
        except ModuleNotFoundError as error:
            raise UserError(f"{error}: run pip install -r requirements.txt") from error
        except OSError as error:
            raise UserError(str(error)) from error
        if not examples:
            raise UserError(f"there are no examples in {path}")
        return examples

    return (world or World()).from_rank0(load)


def examples_for_training(config, model, world: World) -> list[dict]:
    """Load the examples that a TrainConfig asks for, or none, with a warning, if they cannot be had."""
    if config.hellaswag_every == 0:
        return []
    if model.config.vocab_size < VOCAB_SIZE:
        print0(f"warning: no HellaSwag: the model has only {model.config.vocab_size} of GPT-2's tokens")
        return []
    try:
        return load_examples(path=config.hellaswag_data, limit=config.hellaswag_limit, world=world)
    except UserError as error:
        if config.hellaswag_data:  # a file that the user has named must be usable
            raise
        print0(f"warning: no HellaSwag: {error}")
        return []


# -----------------------------------------------------------------------------
# 2. Rendering. An example -> the tokens of its context and of its four endings.
# -----------------------------------------------------------------------------


encode = functools.cache(tokenizer.encode)  # a training run scores the same texts again and again


def clean(text: str) -> str:
    """Remove the marks that WikiHow's articles left in a text, as lm-eval does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def context_of(example: dict, style: Style) -> str:
    """Return the text that the endings continue."""
    if style == "completion":
        return example["ctx"]
    return clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")


def encode_example(example: dict, style: Style) -> tuple[list[int], list[list[int]], list[int]]:
    """Return the tokens of the context, those of each ending, and what acc_norm divides each summed loss by."""
    text = context_of(example, style)
    if style == "completion":
        endings = [encode(" " + ending) for ending in example["endings"]]
        return encode(text), endings, [len(ending) for ending in endings]
    endings = [clean(ending) for ending in example["endings"]]
    context = encode(text.rstrip())  # spaces at its end belong to the ending: the encoding joins them to a word
    rows = [encode(f"{text} {ending}") for ending in endings]
    return context, [tokens[len(context):] for tokens in rows], [len(ending) for ending in endings]


def render_example(example: dict, style: Style = "completion") -> tuple[torch.Tensor, torch.Tensor, int]:
    """Render an example as four rows, context + ending, padded with zeros -> (tokens (4, T), mask (4, T), label).

    The mask is 1 on the tokens of the ending. Nothing is cut.
    """
    context, endings, _ = encode_example(example, style)
    T = len(context) + max(map(len, endings))
    tokens, mask = torch.zeros(4, T, dtype=torch.int64), torch.zeros(4, T, dtype=torch.int64)
    for i, ending in enumerate(endings):
        end = len(context) + len(ending)
        tokens[i, :end] = torch.tensor(context + ending)
        mask[i, len(context):end] = 1
    return tokens, mask, int(example["label"])


# -----------------------------------------------------------------------------
# 3. Scoring. Examples -> rows -> batches that share beginnings -> passes over similar rows -> losses -> accuracies.
# -----------------------------------------------------------------------------


def cut_rows(context: list[int], ending: list[int], block_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield (tokens, how many of the last are predicted) so that each token of the ending is predicted once.

    Contexts lose tokens on the left, as in lm-eval. An ending longer than the block, which lm-eval refuses, continues
    in a second row, after as many of the tokens before it as fit.
    """
    tokens, done = context + ending, len(context)
    while done < len(tokens):
        stop = min(len(tokens), done + block_size)
        yield tokens[max(0, stop - block_size - 1):stop], stop - done  # the last token is predicted, not read
        done = stop


def make_work(example: int, context: list[int], endings: list[list[int]], block_size: int) -> Work:
    """Make the rows of an example and count the tokens that they share: the whole context, unless it was cut."""
    rows = [Row(example, i, *cut) for i, ending in enumerate(endings) for cut in cut_rows(context, ending, block_size)]
    contexts = [row.tokens[:-max(2, row.scored)] for row in rows]  # leaves a token to read before an ending of one
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*contexts))
    return Work(len(list(shared)), rows)


def score_batch(model, batch: list[Work], batch_tokens: int, device) -> Iterator[tuple[tuple[Row, ...], torch.Tensor]]:
    """Yield (rows, their summed losses (R,) in nats) for each pass, until every row of the batch is scored."""
    L, cache = batch[0].shared, sampling.new_cache(model)
    last = torch.empty(len(batch), 0, model.config.n_embd, device=device)  # (n, 0, C)
    if L:
        prefixes = torch.tensor([item.rows[0].tokens[:L] for item in batch])  # (n, L)
        last = sampling.read(model, to_device(prefixes, device), cache)[:, -1:]  # (n, 1, C), predicts the next token
    first = L - last.size(1)  # position of the first hidden state of each row
    rows = sorted(((i, row) for i, item in enumerate(batch) for row in item.rows), key=lambda pair: len(pair[1].tokens))
    for part in make_passes([len(row.tokens) - 1 - L for _, row in rows], batch_tokens):
        owners, members = zip(*rows[part])
        end = len(members[-1].tokens) - 1  # the last token of a row is predicted, not read
        idx = torch.zeros(len(members), end - L, dtype=torch.int64)  # (R, T)
        targets = torch.full((len(members), end - first), -1)  # (R, L - first + T), -1 where nothing is predicted
        for i, row in enumerate(members):
            read = row.tokens[L:-1]
            idx[i, :len(read)] = torch.tensor(read)
            targets[i, :len(row.tokens) - 1 - first][-row.scored:] = torch.tensor(row.tokens[-row.scored:])
        owners = to_device(torch.tensor(owners), device)  # (R,)
        copies = [layer.rows(owners) for layer in cache] if L else sampling.new_cache(model)
        h = sampling.read(model, to_device(idx, device), copies)  # (R, T, C)
        yield members, sum_losses(model, torch.cat((last[owners].to(h), h), dim=1), targets)


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Copy a tensor from the host to the device; CUDA copies it while it computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def sum_losses(model, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Hidden states (R, T, C) and targets (R, T) on the host, -1 where nothing is predicted -> summed losses (R,)."""
    R, T, C = h.shape
    h, targets, losses = h.view(R * T, C), targets.view(R * T), torch.zeros(R * T, device=h.device)
    at_once = 128 if h.device.type == "cpu" else 1024  # a CPU reuses the memory of 25 MB of logits, not of 50
    for positions in (targets >= 0).nonzero().squeeze(1).split(at_once):  # (predicted,)
        expected, positions = to_device(targets[positions], h.device), to_device(positions, h.device)
        logits = model.lm_head(h[positions]).float()  # (predicted, V)
        losses[positions] = F.cross_entropy(logits, expected, reduction="none")
    return losses.view(R, T).sum(dim=1)


def score_work(model, work: list[Work], batch_tokens: int, world: World) -> np.ndarray:
    """Score all examples, each on one of the ranks -> summed losses (n, 4) in nats, the same on every rank.

    Raises UserError if memory runs out, and Stopped on every rank if one of them has received a signal.
    """
    batches = assign_batches(make_batches(work, batch_tokens), world.world_size)[world.rank]
    scored, n_rows = [], sum(len(item.rows) for batch in batches for item in batch)
    passes = (result for batch in batches for result in score_batch(model, batch, batch_tokens, world.device))
    try:
        with world.autocast, progress.counted("HellaSwag", n_rows, "endings") as count:
            for rows, losses in passes:
                scored.append((rows, losses))  # copied to the host at the end, so that the device never waits for it
                count(len(rows))
                if world.stop.is_set():
                    break
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        raise UserError("out of memory in HellaSwag: train with --hellaswag_every 0, or run hellaswag.py with less "
                        f"than --batch_tokens {batch_tokens}") from error
    sums = np.zeros((len(work) + 1, 4))  # the last row says whether to stop
    sums[-1] = world.stop.is_set()
    for rows, losses in scored:
        np.add.at(sums, ([row.example for row in rows], [row.ending for row in rows]), losses.cpu().numpy())
    if world.world_size > 1:
        gathered = torch.from_numpy(sums).to(world.device)  # (n + 1, 4)
        dist.all_reduce(gathered)
        sums = gathered.cpu().numpy()
    if sums[-1].any():
        raise Stopped
    return sums[:-1]  # (n, 4)


@torch.no_grad()
def evaluate(model, examples: Iterable[dict], world: World | None = None, batch_tokens: int = 0,
             style: Style = "completion") -> dict:
    """Score `examples` (dicts in HellaSwag's schema) with a GPT; the ranks share the work and all get the result.

    Returns acc and acc_norm, each with its `acc_interval` and `acc_stderr` (see plumbing/accuracy.py), n, `cut`
    (examples whose context lost tokens to fit the block), `seconds`, and lists with an entry per example:
    `predictions`, the ending that acc_norm chooses, `acc_predictions`, `losses`, the mean per token of each ending in
    nats, and its `tokens`. An accuracy is nan if a loss is not finite.

    Raises UserError for an example that cannot be scored and if memory runs out, Stopped on all ranks after a signal.
    """
    started = time.perf_counter()
    world = world or World()
    batch_tokens = batch_tokens or (1024 if world.device.type == "cpu" else 4096)
    if style not in get_args(Style):
        raise UserError(f"no style {style!r}, it must be {' or '.join(get_args(Style))}")
    work, labels, tokens, divisors, cut = [], [], [], [], 0
    for i, example in enumerate(progress.track(examples, "encoding HellaSwag", "examples")):
        world.check_stop()
        check_example(example, f"example {i + 1}", style)
        context, endings, lengths = encode_example(example, style)
        if max(map(max, (context, *endings))) >= model.config.vocab_size:
            raise UserError(f"the model has {model.config.vocab_size} tokens, too few for GPT-2's encoding")
        work.append(make_work(i, context, endings, model.config.block_size))
        labels.append(int(example["label"]))
        tokens.append([len(ending) for ending in endings])
        divisors.append(lengths)
        cut += len(context) + max(tokens[-1]) > model.config.block_size + 1
    if not work:
        raise UserError("there are no examples to score")
    sums = score_work(model, work, batch_tokens, world)  # (n, 4)
    predictions = {"acc": sums.argmin(axis=1), "acc_norm": (sums / divisors).argmin(axis=1)}  # (n,) each
    result = {"n": len(work), "cut": cut, "predictions": predictions["acc_norm"].tolist(),
              "acc_predictions": predictions["acc"].tolist(), "losses": (sums / tokens).tolist(), "tokens": tokens,
              "seconds": time.perf_counter() - started}
    for name, chosen in predictions.items():
        right = float((chosen == labels).mean()) if np.isfinite(sums).all() else math.nan
        result |= {name: right, f"{name}_interval": accuracy.interval(right, len(work)),
                   f"{name}_stderr": accuracy.standard_error(right, len(work))}
    return result


# -----------------------------------------------------------------------------
# 4. The command
# -----------------------------------------------------------------------------


def report(config: HellaSwagConfig, result: dict, block_size: int) -> None:
    """Print the result, beside the published one for OpenAI's models. Raises OSError if stdout cannot be written."""
    known = published.HELLASWAG.get((config.model, config.style)) if config.split == "val" else None
    n, seconds = result["n"], result["seconds"]
    for i, name in enumerate(("acc", "acc_norm")):
        beside = f" | published for all {published.HELLASWAG_EXAMPLES:,}: {known[i]:.2%}" if known else ""
        print(f"{name:>8} | {accuracy.describe(result[name], n)}{beside}")
    cut = f"; {result['cut']:,} contexts cut on the left to fit {block_size} positions" if result["cut"] else ""
    print(f"{'n':>8} | {n:,} examples in {seconds:.1f} s: {n / seconds:.1f} examples/s{cut}", flush=True)


def rows_of(examples: list[dict], result: dict) -> Iterator[dict]:
    """Yield what --out stores of each example."""
    for i, example in enumerate(examples):
        yield {"example": i + 1, "label": int(example["label"]), "acc_prediction": result["acc_predictions"][i],
               "acc_norm_prediction": result["predictions"][i], "losses": result["losses"][i],
               "tokens": result["tokens"][i]}


def main(argv: list[str]) -> None:
    """Run the command with these flags."""
    from train_gpt2 import GPT  # here, as train_gpt2 imports this file

    flags = cli.parse_flags(HellaSwagConfig, argv, "Score a GPT-2 on HellaSwag: acc and acc_norm.")
    config = models.or_newest(HellaSwagConfig(**flags))
    if config.out:
        jsonl.check_new_file(config.out, "choose another --out")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does and leaves as little behind
    with processes(config.device) as world:
        model = GPT.load(models.with_gpt2_tokens(config.model)).to(world.device)
        examples = load_examples(config.split, config.data, config.limit, config.style, world)
        dtype, why = machine.pick_dtype(config.dtype, world.device)
        if world.rank == 0:
            count = f"{len(examples):,} {cli.plural(len(examples), 'example')}"
            print(f"{config.model} on {count} of {config.data or f'the {config.split} split'}, {config.style} style; "
                  f"{machine.describe_device(world.device)}, "
                  f"{cli.reasoned(str(dtype).removeprefix('torch.'), why)}", flush=True)
        world = dataclasses.replace(world, autocast=machine.autocast(dtype, world.device))
        result = evaluate(model, examples, world, config.batch_tokens, config.style)
        if math.isnan(result["acc"]):
            raise FloatingPointError(f"{config.model} gives losses that are not finite: use --dtype float32, or "
                                     "name an earlier checkpoint")
        if world.rank == 0:
            report(config, result, model.config.block_size)
        if world.rank == 0 and config.out:
            jsonl.write_jsonl(config.out, rows_of(examples, result), "choose another --out")


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
