"""HellaSwag: four endings of a story, and whether a model finds the real one likeliest (Zellers et al. 2019).

    python hellaswag.py --model log                    # the newest checkpoint of a run, on all 10,042 examples
    python hellaswag.py --model gpt2                   # OpenAI's weights; also a transformers folder or a .pt file
    python hellaswag.py --model log --style harness    # as lm-eval scores it
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model log

Two ways to score, each with two answers: `acc` takes the ending with the lowest summed loss, `acc_norm` the lowest
mean loss.

    completion    context, then each ending after a space, encoded apart; the mean is over tokens (build-nanogpt)
    harness       lm-eval's task: texts cleaned, `activity_label: ctx_a Ctx_b`, context and ending encoded together; the
                  mean is over the characters of the ending

An example is four rows of tokens, context + ending. What the rows begin with alike, nearly all of the context, is read
once, into the model's key/value cache; the endings follow, and logits are made only where an ending token is predicted.

Shapes: n examples, R rows of a pass, L tokens shared, T tokens after them, C channels, V vocabulary.
"""
import contextlib
import functools
import gzip
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from plumbing import machine
from plumbing.cli import Stopped, UserError, parse_flags, print0, run_command
from plumbing.files import replace, sha256
from plumbing.network import patiently, progress_bar
from plumbing.ranks import from_rank0, processes
from plumbing.tokenizer import gpt2_encoding

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/data/"
FILES = {  # bytes and sha256, as TensorFlow Datasets lists them too
    "train": (47496131, "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d"),
    "val": (12246618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    "test": (11752147, "da082b00543e422b8d25394614d102944586986def4de5cd1bd36d86bcb76261"),
}
STYLES = ("completion", "harness")
FOLDER = "hellaswag"  # where downloads go
RETRIES = 3  # times that a failing network is asked again
MAX_CHARACTERS = 200_000  # of an example, many times an official one's: a million spaces overflow tiktoken's stack
TIMEOUT = (10, 30)  # seconds to wait for a connection, and for the next bytes
PUBLISHED = {  # (acc, acc_norm) of OpenAI's weights on the validation split, where build-nanogpt and lm-eval tell both
    ("gpt2", "completion"): (0.2859, 0.2955), ("gpt2", "harness"): (0.2892, 0.3114),
    ("gpt2-xl", "completion"): (0.3842, 0.4893), ("gpt2-xl", "harness"): (0.4004, 0.5089),
}


@dataclass
class HellaSwagConfig:
    """One evaluation: every field is a flag."""
    model: str = "log"  # run folder, .pt file, transformers folder, or OpenAI's gpt2, gpt2-medium, gpt2-large, gpt2-xl
    data: str = ""  # file of examples, .jsonl or .jsonl.gz (empty: the official one, downloaded)
    split: str = "val"  # which official file: val or train (the labels of test are not public)
    style: str = "completion"  # completion, or harness: lm-eval's task
    limit: int = 0  # examples, from the start of the file (0: all)
    batch_tokens: int = 0  # tokens of endings in a forward pass, of up to 16 passes in memory (0: 1024 on a CPU, 4096)
    out: str = ""  # file for each example's losses and predictions, .jsonl (empty: none)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # precision of matrix products: float32, or autocast to bfloat16 or float16 (auto: by hardware)

    def __post_init__(self):
        for name, known in (("split", ("val", "train")), ("style", STYLES),
                            ("dtype", ("auto", "float32", "bfloat16", "float16"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} is {getattr(self, name)!r}, it must be {' or '.join(known)}")
        if min(self.limit, self.batch_tokens) < 0:
            raise UserError("--limit and --batch_tokens must be at least 0")


# ---------------------------------------------------------------------------------------------------------------------
# 1. Data: the official files, downloaded whole or not at all, and examples that are checked before any is scored.
# ---------------------------------------------------------------------------------------------------------------------

def download(split: str = "val") -> Path:
    """The official file of a split (train, val, test), downloaded unless it is there; UserError where it cannot be had.

    It has its name only once its size and sha256 are right.
    """
    path, (size, digest) = Path(FOLDER) / f"hellaswag_{split}.jsonl", FILES[split]
    if path.is_file() and sha256(path) == digest:
        return path
    if path.exists():
        print0(f"warning: {path} is not the official file: downloading it again")
    patiently(lambda: fetch(URL + path.name, path, size, digest), f"download {path.name}", RETRIES,
              f"check the network, or put the file from {URL}{path.name} into {FOLDER}/ yourself")
    return path


def fetch(url: str, path: Path, size: int, digest: str) -> None:
    """One attempt at a download, which leaves no partial file. OSError without a number where the network fails or
    sends something else, UserError where the file cannot be written."""
    import requests

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with requests.get(url, stream=True, timeout=TIMEOUT) as response, open(temporary, "wb") as file:
            response.raise_for_status()
            with progress_bar(size, 0, "B") as bar:
                for data in response.iter_content(1 << 16):
                    bar.update(file.write(data))
                    if file.tell() > size:
                        break
            file.flush()
            os.fsync(file.fileno())
        if temporary.stat().st_size != size or sha256(temporary) != digest:
            raise OSError(f"{temporary.stat().st_size:,} bytes of {response.headers.get('Content-Type')} came, not the "
                          f"official file of {size:,}")
        replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"cannot write {path}: {error.strerror}") from error  # of this machine, not of the network
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def iterate_examples(split: str = "val", path: str | Path | None = None, style: str = "completion") -> Iterator[dict]:
    """Yield the examples of an official split, or of your own file (.jsonl or .jsonl.gz), as dicts in its schema.

    UserError names the line of the first that cannot be scored in that style.
    """
    path = Path(path) if path else download(split)
    number = 0
    try:
        with open(path, "rb") as raw:
            lines = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    example = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    check_example(example, f"{path}, line {number}", style)
                    yield example
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}, is not JSON in UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def check_example(example: dict, name: str, style: str) -> None:
    """UserError, beginning with `name`, where an example has not all that a style needs."""
    def require(true: bool, what: str) -> None:
        if not true:
            raise UserError(f"{name}: {what}")

    def is_text(value) -> bool:
        return isinstance(value, str) and bool(value.strip())

    require(isinstance(example, dict), "this is not a JSON object")
    require(len(str(example)) < MAX_CHARACTERS, f"it has more than {MAX_CHARACTERS:,} characters")
    for key in ("ctx",) if style == "completion" else ("activity_label", "ctx_a", "ctx_b"):
        require(isinstance(example.get(key), str), f"there is no {key!r}, which --style {style} needs")
    require(is_text(context_of(example, style)), "its context is empty")
    endings, label = example.get("endings"), example.get("label")
    require(isinstance(endings, list) and len(endings) == 4, "there are not four texts under 'endings'")
    for i, ending in enumerate(endings):
        whole = is_text(ending) and (style == "completion" or is_text(clean(ending)))
        require(whole, f"its ending {i} is empty or no text")
    require(str(label) in ("0", "1", "2", "3"), f"its 'label' is {label!r}, not the number of an ending, 0 to 3")


def load_examples(split: str = "val", path: str | Path | None = None, limit: int = 0, style: str = "completion",
                  rank: int = 0, world_size: int = 1) -> list[dict]:
    """The first `limit` examples (0: all), read or downloaded by rank 0 and sent to the others.

    UserError on every rank where rank 0 could not have them.
    """
    def load() -> list[dict]:
        try:
            examples = iterate_examples(split, path, style)
            found = [example for _, example in zip(range(limit or sys.maxsize), examples)]
            if not found:
                raise UserError(f"there are no examples in {path}")
            encode("")  # what encodes them is there too
            return found
        except ModuleNotFoundError as error:
            raise UserError(f"{error}: run pip install -r requirements.txt") from error
        except OSError as error:
            raise UserError(str(error)) from error

    return from_rank0(load, rank, world_size)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Rendering: an example -> the tokens of its context and of its four endings.
# ---------------------------------------------------------------------------------------------------------------------

@functools.cache  # a training run scores the same texts again and again
def encode(text: str) -> list[int]:
    """A text -> its GPT-2 tokens."""
    return gpt2_encoding().encode_ordinary(text)


def clean(text: str) -> str:
    """A text without the marks that WikiHow's articles left in it, as lm-eval cleans it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def context_of(example: dict, style: str) -> str:
    """The text that the endings continue."""
    if style == "completion":
        return example["ctx"]
    return clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")


def encode_example(example: dict, style: str) -> tuple[list[int], list[list[int]], list[int]]:
    """An example -> (tokens of the context, tokens of each ending, what acc_norm divides each summed loss by)."""
    text = context_of(example, style)
    if style == "completion":
        endings = [encode(" " + ending) for ending in example["endings"]]
        return encode(text), endings, [len(ending) for ending in endings]
    endings = [clean(ending) for ending in example["endings"]]
    context = encode(text.rstrip())  # spaces at its end belong to the ending: the encoding joins them to a word
    whole = [encode(f"{text} {ending}") for ending in endings]
    return context, [tokens[len(context):] for tokens in whole], [len(ending) for ending in endings]


def render_example(example: dict, style: str = "completion") -> tuple[torch.Tensor, torch.Tensor, int]:
    """An example as four plain rows -> (tokens (4, T), mask (4, T), label): context + ending, padded with zeros.

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


# ---------------------------------------------------------------------------------------------------------------------
# 3. Scoring: examples -> batches of like context length -> passes of rows of like length -> a loss for each ending.
# ---------------------------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """Tokens to be read in one go, of which the last `scored` are predicted."""
    example: int
    ending: int
    tokens: list[int]
    scored: int


class Work(NamedTuple):
    """What is to be read of one example: rows that begin with the same `shared` tokens."""
    shared: int
    rows: list[Row]

    @property
    def cost(self) -> int:
        """Tokens that go through the model."""
        return self.shared + sum(len(row.tokens) - 1 - self.shared for row in self.rows)


def cut_rows(context: list[int], ending: list[int], block_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield (tokens, how many of the last are to be predicted) so that each token of the ending is predicted once.

    Contexts lose tokens on the left, as in lm-eval. An ending longer than the block, which lm-eval refuses, goes on in
    a second row with as much before it as fits.
    """
    tokens, done = context + ending, len(context)
    while done < len(tokens):
        stop = min(len(tokens), done + block_size)
        yield tokens[max(0, stop - block_size - 1):stop], stop - done  # the last token is predicted, not read
        done = stop


def make_work(example: int, context: list[int], endings: list[list[int]], block_size: int) -> Work:
    """The rows of an example, and how many tokens of the context they share: all of them, unless they were cut."""
    rows = [Row(example, i, *cut) for i, ending in enumerate(endings) for cut in cut_rows(context, ending, block_size)]
    contexts = [row.tokens[:-max(2, row.scored)] for row in rows]  # leaves a token to read before an ending of one
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*contexts))
    return Work(len(list(shared)), rows)


def make_batches(work: list[Work], batch_tokens: int) -> list[list[Work]]:
    """Examples that share prefixes of like length, 16 * batch_tokens at most; all share as much as the first, up to 3
    tokens less than they could.

    The batches depend on the examples alone, not on the number of ranks, so that neither do the results.
    """
    batches, size = [], 0
    for item in sorted(work, key=lambda item: (item.shared, item.cost)):
        size += item.cost
        if not batches or item.shared > batches[-1][0].shared + 3 or size > 16 * batch_tokens:
            batches.append([])
            size = item.cost
        batches[-1].append(item)
    return batches


def deal(batches: list[list[Work]], world_size: int) -> list[list[list[Work]]]:
    """The batches of each rank: the costliest first, each to the rank that has least to do."""
    hands, costs = [[] for _ in range(world_size)], [0] * world_size
    for batch in sorted(batches, key=lambda batch: -sum(item.cost for item in batch)):
        rank = costs.index(min(costs))
        hands[rank].append(batch)
        costs[rank] += sum(item.cost for item in batch)
    return hands


def make_passes(lengths: list[int], batch_tokens: int) -> Iterator[slice]:
    """Yield slices of ascending lengths: one length, or what has batch_tokens at most when padded to its longest, and
    batch_tokens / 16 of padding."""
    start, tokens = 0, 0
    for i, length in enumerate(lengths):
        padded = (i + 1 - start) * length
        if i > start and (padded > batch_tokens or padded - tokens - length > batch_tokens // 16):
            yield slice(start, i)
            start, tokens = i, 0
        tokens += length
    yield slice(start, len(lengths))


def score_batch(model, batch: list[Work], batch_tokens: int, device) -> Iterator[tuple[tuple[Row, ...], torch.Tensor]]:
    """Yield (rows, their summed losses (R,) in nats) for all rows of a batch, a pass at a time."""
    L, cache = batch[0].shared, model.make_cache()
    last = torch.empty(len(batch), 0, model.config.n_embd, device=device)  # (n, 0, C)
    if L:
        prefixes = torch.tensor([item.rows[0].tokens[:L] for item in batch])  # (n, L)
        last = model.hidden_states(send(prefixes, device), cache)[:, -1:]  # (n, 1, C), it predicts what comes next
    first = L - last.size(1)  # the position that the first hidden state of a row is of
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
        owners = send(torch.tensor(owners), device)  # (R,)
        copies = [layer.rows(owners) for layer in cache] if L else model.make_cache()
        h = model.hidden_states(send(idx, device), copies)  # (R, T, C)
        yield members, sum_losses(model, torch.cat((last[owners].to(h), h), dim=1), targets)


def send(tensor: torch.Tensor, device) -> torch.Tensor:
    """A tensor of the host on the device; CUDA copies it while it computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def sum_losses(model, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Hidden states (R, T, C) and targets (R, T) on the host, -1 where nothing is predicted -> summed losses (R,)."""
    R, T, C = h.shape
    h, targets, losses = h.view(R * T, C), targets.view(R * T), torch.zeros(R * T, device=h.device)
    at_once = 128 if h.device.type == "cpu" else 1024  # a CPU reuses the memory of 25 MB of logits, not of 50
    for where in (targets >= 0).nonzero().squeeze(1).split(at_once):  # (predicted,)
        expected, where = send(targets[where], h.device), send(where, h.device)
        logits = model.lm_head(h[where]).float()  # (predicted, V)
        losses[where] = F.cross_entropy(logits, expected, reduction="none")
    return losses.view(R, T).sum(dim=1)


@torch.no_grad()
def evaluate(model, examples: Iterable[dict], device, batch_tokens: int = 0, style: str = "completion", rank: int = 0,
             world_size: int = 1, progress=lambda share: None, stop: threading.Event | None = None) -> dict:
    """Score `examples` (dicts in HellaSwag's schema) with a GPT; every rank works and gets the same result.

    Returns acc and acc_norm, each with its standard error (`acc_stderr`, `acc_norm_stderr`), n, `cut` (examples whose
    context lost tokens to fit the block), `seconds`, and a list with an entry per example: `predictions`, the ending
    that acc_norm chooses, `acc_predictions`, `losses`, the mean loss per token of each ending in nats, and `tokens`,
    of each ending.
    acc and acc_norm are nan where a loss is not finite. `progress` is called with the share that is done. UserError for
    an example that cannot be scored, and where memory runs out; Stopped, on every rank, where `stop` was set on one.
    """
    started = time.perf_counter()
    device = torch.device(device)
    batch_tokens = batch_tokens or (1024 if device.type == "cpu" else 4096)
    if style not in STYLES:
        raise UserError(f"no style {style!r}, it must be {' or '.join(STYLES)}")
    block_size, work, labels, tokens, divisors, cut = model.config.block_size, [], [], [], [], 0
    for i, example in enumerate(examples):
        check_example(example, f"example {i + 1}", style)
        context, endings, lengths = encode_example(example, style)
        work.append(make_work(i, context, endings, block_size))
        labels.append(int(example["label"]))
        tokens.append([len(ending) for ending in endings])
        divisors.append(lengths)
        cut += len(context) + max(tokens[-1]) > block_size + 1
        if max(map(max, (context, *endings))) >= model.config.vocab_size:
            raise UserError(f"the model has {model.config.vocab_size} tokens, too few for GPT-2's encoding")
    if not work:
        raise UserError("there are no examples to score")
    mine = deal(make_batches(work, batch_tokens), world_size)[rank]
    scored, done, n_rows = [], 0, sum(len(item.rows) for batch in mine for item in batch)
    passes = (result for batch in mine for result in score_batch(model, batch, batch_tokens, device))
    try:
        for rows, losses in passes:
            scored.append((rows, losses))  # read only at the end: the device need not wait for the host
            done += len(rows)
            progress(done / n_rows)
            if stop and stop.is_set():
                break
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        raise UserError("out of memory in HellaSwag: train with --hellaswag_every 0, run hellaswag.py with less than "
                        f"--batch_tokens {batch_tokens}") from error
    sums = np.zeros((len(work) + 1, 4))  # the last row: whether to stop
    sums[-1] = bool(stop and stop.is_set())
    for rows, losses in scored:
        np.add.at(sums, ([row.example for row in rows], [row.ending for row in rows]), losses.cpu().numpy())
    if world_size > 1:
        gathered = torch.from_numpy(sums).to(device)  # (n + 1, 4)
        dist.all_reduce(gathered)
        sums = gathered.cpu().numpy()
    if sums[-1].any():
        raise Stopped
    sums = sums[:-1]  # (n, 4)
    predictions = {"acc": sums.argmin(axis=1), "acc_norm": (sums / divisors).argmin(axis=1)}  # (n,) each
    result = {"n": len(work), "cut": cut, "predictions": predictions["acc_norm"].tolist(),
              "acc_predictions": predictions["acc"].tolist(), "losses": (sums / tokens).tolist(), "tokens": tokens,
              "seconds": time.perf_counter() - started}
    for name, chosen in predictions.items():
        right = float((chosen == labels).mean()) if np.isfinite(sums).all() else math.nan
        result |= {name: right, f"{name}_stderr": math.sqrt(right * (1 - right) / max(1, len(work) - 1))}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# 4. The command
# ---------------------------------------------------------------------------------------------------------------------

def check_out(path: str) -> None:
    """Make the folder for --out; UserError, before any work is done, where a file cannot be written there."""
    folder = Path(path).parent
    if os.path.lexists(path):
        raise UserError(f"{path} is there already: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}: choose another --out") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: choose another --out")


def write_out(path: Path, examples: list[dict], result: dict) -> None:
    """A JSON object a line for each example: the whole file, or none and a UserError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            for i, example in enumerate(examples):
                file.write(json.dumps({
                    "example": i + 1, "label": int(example["label"]), "acc_prediction": result["acc_predictions"][i],
                    "acc_norm_prediction": result["predictions"][i], "losses": result["losses"][i],
                    "tokens": result["tokens"][i]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}: choose another --out") from error


def report(config: HellaSwagConfig, result: dict, block_size: int) -> None:
    """Print the result, with the published one beside it for OpenAI's models; OSError where that cannot be done."""
    published = PUBLISHED.get((config.model, config.style)) if config.split == "val" else None
    for i, name in enumerate(("acc", "acc_norm")):
        beside = f" | published for all 10,042: {published[i]:.2%}" if published else ""
        print(f"{name:>8} | {result[name]:.2%} +- {result[f'{name}_stderr']:.2%}{beside}")
    n, seconds = result["n"], result["seconds"]
    cut = f"; {result['cut']:,} contexts cut on the left to fit {block_size} positions" if result["cut"] else ""
    print(f"{'n':>8} | {n:,} examples in {seconds:.1f} s: {n / seconds:.1f} examples/s{cut}", flush=True)


def main(argv: list[str]) -> None:
    """Run the command with these flags."""
    from train_gpt2 import load_model

    config = HellaSwagConfig(**parse_flags(HellaSwagConfig, argv, "Score a model on HellaSwag: acc and acc_norm."))
    if config.out:
        check_out(config.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and leaves as little behind
    with processes(config.device) as (rank, world_size, device):
        model = load_model(config.model, device)
        examples = load_examples(config.split, config.data, config.limit, config.style, rank, world_size)
        dtype, why = machine.pick_dtype(config.dtype, device)
        if rank == 0:
            print(f"{config.model} on {len(examples):,} examples of {config.data or f'the {config.split} split'}, "
                  f"{config.style} style; {machine.describe_device(device)}, "
                  f"{str(dtype).removeprefix('torch.')}: {why}", flush=True)
        with (progress_bar(len(examples), 0, " examples", quiet=rank > 0) as bar,
              machine.autocast(dtype, device)):
            result = evaluate(model, examples, device, config.batch_tokens, config.style, rank, world_size,
                              lambda share: bar.update(int(share * len(examples)) - bar.n))
        if math.isnan(result["acc"]):
            raise FloatingPointError(f"{config.model} gives losses that are not finite: take --dtype float32, or "
                                     "name an earlier checkpoint")
        if rank == 0:
            report(config, result, model.config.block_size)
        if config.out and rank == 0:
            write_out(Path(config.out), examples, result)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
