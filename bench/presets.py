"""Measure how many tokens and seconds the presets gpt2 and fast need to the same loss.

    python -m bench.presets

The text is on any machine: the Python sources of the standard library and the installed packages, each file once, in
the order of their hashes, made into shards by fineweb.py. All runs are train_gpt2.py itself and take minutes:

    1. each preset at several learning rates with one seed, to find its best
    2. each preset at its best learning rate with three seeds
    3. `fast` in a share of the steps, with its whole schedule within them, with three seeds: does it end below `gpt2`?
    4. seconds per step of both, in turn, so that what else ran during 1 to 3 does not matter

If it is stopped, the same command continues. It ends in a table and one JSON line.
"""
import hashlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from plumbing import cli
from plumbing.cli import Positive, UserError, parse_flags, run_command

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench; every field is a flag."""
    # Model and batch
    n_layer: Positive = 4  # blocks
    n_head: Positive = 4  # attention heads per block
    n_embd: Positive = 256  # channels
    sequence_length: Positive = 256  # tokens per sequence
    total_batch_size: Positive = 2048  # tokens per optimizer step
    # Schedule
    max_steps: Positive = 500  # optimizer steps of a whole run
    warmup_steps: int = 20  # steps of linear warmup, in both presets
    gpt2_lr: str = "5e-4,1e-3,2e-3"  # learning rates to try with gpt2, with commas; it ends at a tenth, as in the paper
    fast_lr: str = "1.5e-3,3e-3,6e-3"  # learning rates to try with fast, with commas; it ends at 0
    # Runs
    out: str = "log/presets"  # folder for the shards and the runs
    seeds: Positive = 3  # runs of each kind, with different seeds
    shares: str = "0.2"  # shares of the steps to try with fast, with commas
    val_tokens: Positive = 32768  # tokens per validation
    val_every: Positive = 25  # steps between validations
    parallel: Positive = 2  # runs at a time, each with one thread if there are several
    timing_steps: Positive = 20  # steps of each preset in each of three windows, in turn; the first five are not timed

    def __post_init__(self):
        cli.check_values(self)
        for name in ("gpt2_lr", "fast_lr", "shares"):
            cli.require(self, name, all(re.fullmatch(r"[\d.]+(e-?\d+)?", number) for number in
                                        getattr(self, name).split(",")), "numbers with commas between them")
        cli.require(self, "timing_steps", self.timing_steps > 5, "more than 5")


def prepare(config: BenchConfig) -> Path:
    """Return the folder of shards, written if it is not there: one to validate, and more than an epoch to train on."""
    shard = 4 * config.val_tokens
    folder, text = Path(config.out) / "shards", Path(config.out) / "text.jsonl"
    if not (folder / "manifest.json").exists():
        found = {}
        for root in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}:
            for path in Path(root).rglob("*.py"):
                if 2_000 < path.stat().st_size < 200_000:
                    source = path.read_bytes()
                    found[hashlib.sha256(source).hexdigest()] = source.decode(errors="replace")
        text.parent.mkdir(parents=True, exist_ok=True)
        with open(text, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": found[name]}) + "\n" for name in sorted(found))
        needed = shard + int(1.1 * config.max_steps * config.total_batch_size)
        subprocess.run([sys.executable, ROOT / "fineweb.py", "--source", text, "--out", folder, "--shard_size",
                        str(shard), "--max_tokens", str(needed)], check=True)
    return folder


def command(config: BenchConfig, name: str, preset: str, lr: str, seed: int, steps: int) -> list[str]:
    """Return the command that trains one run into the folder `name`."""
    settings = {
        "data": Path(config.out) / "shards", "out_dir": Path(config.out) / name, "preset": preset, "max_lr": lr,
        "min_lr": float(lr) / 10 if preset == "gpt2" else 0.0, "seed": seed, "max_steps": steps,
        "warmup_steps": config.warmup_steps, "val_every": config.val_every, "val_tokens": config.val_tokens,
        "hellaswag_every": 0, "sample_every": 0, "checkpoint_every": 100, "keep_checkpoints": 1,
        **{key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "sequence_length", "total_batch_size")},
    }
    return [sys.executable, str(ROOT / "train_gpt2.py"), "--no-compile",
            *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]


def log_lines(config: BenchConfig, name: str, kind: str) -> list[dict]:
    """Return the lines of a kind in a run's log."""
    path = Path(config.out) / name / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


def train(config: BenchConfig, runs: list[tuple]) -> dict[tuple, list[tuple[int, float]]]:
    """Run, or finish, each of `runs`, (preset, lr, seed, steps); return its curve, (step, validation loss) pairs."""
    def one(run):
        preset, lr, seed, steps = run
        name = f"{preset}_{lr}_{seed}_{steps}"
        curve = [(line["step"], line["loss"]) for line in log_lines(config, name, "val")]
        if not curve or curve[-1][0] < steps:
            threads = {"OMP_NUM_THREADS": "1"} if config.parallel > 1 else {}
            done = subprocess.run(command(config, name, *run), capture_output=True, text=True,
                                  env={**os.environ, **threads})
            if done.returncode:
                raise UserError(f"the run {name} failed: {done.stderr.strip()[-500:]}")
            curve = [(line["step"], line["loss"]) for line in log_lines(config, name, "val")]
        print(f"{preset:>5} lr {lr:>6} seed {seed} {steps:>5} steps: validation loss {curve[-1][1]:.4f}", flush=True)
        return curve

    with ThreadPoolExecutor(config.parallel) as pool:
        return dict(zip(runs, pool.map(one, runs), strict=True))


def crossing(curve: list[tuple[int, float]], goal: float) -> float:
    """Return the step, interpolated, at which a curve first falls to the goal; inf if it does not."""
    for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
        if next_loss <= goal:
            return step + (next_step - step) * (loss - goal) / (loss - next_loss)
    return float("inf")


def step_seconds(config: BenchConfig, best: dict[str, str]) -> dict[str, float]:
    """Return the median seconds per optimizer step of each preset, from three windows in turn with all threads."""
    steps = {preset: [] for preset in best}
    for _ in range(3):
        for preset, lr in best.items():
            folder = Path(config.out) / "timing"
            shutil.rmtree(folder, ignore_errors=True)
            words = command(config, folder.name, preset, lr, 1, config.timing_steps)
            subprocess.run([*words, "--val_every", "0", "--checkpoint_every", "0"], check=True, capture_output=True)
            lines = log_lines(config, folder.name, "train")[5:]  # after warming up
            steps[preset] += [line["dt_ms"] / 1000 for line in lines]
    return {preset: statistics.median(taken) for preset, taken in steps.items()}


def main(config: BenchConfig) -> None:
    """Print the result of each run, a table, and one JSON line."""
    prepare(config)
    full, seeds = config.max_steps, range(1, config.seeds + 1)
    rates = {"gpt2": config.gpt2_lr.split(","), "fast": config.fast_lr.split(",")}
    tuned = train(config, [(preset, lr, 1, full) for preset in rates for lr in rates[preset]])
    best = {preset: min(rates[preset], key=lambda lr: tuned[preset, lr, 1, full][-1][1]) for preset in rates}
    for preset, lr in best.items():
        if lr in (rates[preset][0], rates[preset][-1]):
            print(f"note: {lr}, the best learning rate for {preset}, is at the end of those tried")
    curves = train(config, [(preset, best[preset], seed, full) for seed in seeds for preset in rates])
    shares = [float(share) for share in config.shares.split(",")]
    short = train(config, [("fast", best["fast"], seed, round(share * full)) for share in shares for seed in seeds])
    seconds = step_seconds(config, best)
    ratio = seconds["fast"] / seconds["gpt2"]

    record = {"bench": "presets", **vars(config), "best": best, "seconds_per_step": seconds, "by_seed": []}
    print(f"\n{config.n_layer}L/{config.n_head}H/{config.n_embd}, T={config.sequence_length}, {full} steps of "
          f"{config.total_batch_size:,} tokens; learning rate {best['gpt2']} for gpt2, {best['fast']} for fast; "
          f"{seconds['gpt2']:.3f} and {seconds['fast']:.3f} s per step, {ratio:.2f} times as long")
    heads = [f"fast, {share:.0%} of steps" for share in shares]
    print(f"{'seed':>4} {'gpt2':>8} {'fast':>8} {'crosses at, tokens':>19} {'seconds':>8}",
          *(f"{head:>24}" for head in heads))
    for seed in seeds:
        gpt2, fast = (curves[preset, best[preset], seed, full] for preset in ("gpt2", "fast"))
        share = crossing(fast, gpt2[-1][1]) / full
        ends = [short["fast", best["fast"], seed, round(share * full)][-1][1] for share in shares]
        print(f"{seed:>4} {gpt2[-1][1]:>8.4f} {fast[-1][1]:>8.4f} {share:>19.1%} {share * ratio:>8.1%}",
              *(f"{end:>16.4f} {end - gpt2[-1][1]:>+7.4f}" for end in ends))
        record["by_seed"].append({"gpt2": gpt2[-1][1], "fast": fast[-1][1], "share_of_tokens": share,
                                  "share_of_seconds": share * ratio, "ends": ends})
    print(json.dumps(record))


if __name__ == "__main__":
    run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
