"""Tokens and seconds to the same loss, recipe against recipe: `python bench/recipes.py`

The text is what is on any machine: the Python sources of the standard library and of the installed packages, each file
once, in the order of their hashes, made into shards by fineweb.py. Every run is train_gpt2.py itself, in minutes:

    1. each recipe at several learning rates, one seed: the best for each
    2. each recipe at its best, three seeds
    3. `fast` at shares of the steps, its whole schedule within them, three seeds: does it end below `gpt2`?
    4. seconds a step of both, in turn, so that what else ran during 1 to 3 does not matter

Stopped at any point, the same command goes on. It ends in a table and one JSON line.
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import hashlib
import itertools
import json
import shutil
import statistics
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from plumbing.cli import UserError, parse_flags, run_command

ROOT = Path(sys.path[0])


@dataclass
class BenchConfig:
    """Every field is a flag."""

    out: str = "log/recipes"  # folder for the shards and the runs
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads a block
    n_embd: int = 256  # channels
    sequence_length: int = 256  # tokens a window
    total_batch_size: int = 2048  # tokens a step
    max_steps: int = 500  # steps of the full length
    warmup_steps: int = 20  # of both recipes
    seeds: int = 3  # runs of each kind
    gpt2_lr: str = "5e-4,1e-3,2e-3"  # learning rates tried with the recipe gpt2; it ends at a tenth, as in the paper
    fast_lr: str = "1.5e-3,3e-3,6e-3"  # and with fast, which ends at 0
    shares: str = "0.2"  # of the steps, with commas, for fast
    val_tokens: int = 32768  # of each validation
    val_every: int = 25  # steps
    parallel: int = 2  # runs at a time, a thread each
    timing_steps: int = 20  # of each recipe in each of three windows, in turn


def prepare(config: BenchConfig) -> Path:
    """The folder of shards, written if it is not there: a first one to validate and more than an epoch to train on."""
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


def command(config: BenchConfig, name: str, recipe: str, lr: str, seed: int, steps: int) -> list[str]:
    """The command that trains one run into the folder `name`."""
    settings = {
        "data": Path(config.out) / "shards", "out_dir": Path(config.out) / name, "recipe": recipe, "max_lr": lr,
        "min_lr": float(lr) / 10 if recipe == "gpt2" else 0.0, "seed": seed, "max_steps": steps,
        "warmup_steps": config.warmup_steps, "val_every": config.val_every, "val_tokens": config.val_tokens,
        "hellaswag_every": 0, "sample_every": 0, "checkpoint_every": 100, "keep_checkpoints": 1,
        **{key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "sequence_length", "total_batch_size")},
    }
    return [sys.executable, str(ROOT / "train_gpt2.py"), "--no-compile",
            *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]


def log_lines(config: BenchConfig, name: str, kind: str) -> list[dict]:
    """The lines of a kind in a run's log."""
    path = Path(config.out) / name / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


def train(config: BenchConfig, runs: list[tuple]) -> dict[tuple, list[tuple[int, float]]]:
    """Run each (recipe, lr, seed, steps), or finish it -> its (step, validation loss) pairs."""
    def one(run):
        recipe, lr, seed, steps = run
        name = f"{recipe}_{lr}_{seed}_{steps}"
        curve = [(line["step"], line["loss"]) for line in log_lines(config, name, "val")]
        if not curve or curve[-1][0] < steps:
            threads = {"OMP_NUM_THREADS": "1"} if config.parallel > 1 else {}
            done = subprocess.run(command(config, name, *run), capture_output=True, text=True,
                                  env={**os.environ, **threads})
            if done.returncode:
                raise UserError(f"the run {name} failed: {done.stderr.strip()[-500:]}")
            curve = [(line["step"], line["loss"]) for line in log_lines(config, name, "val")]
        print(f"{recipe:>5} lr {lr:>6} seed {seed} {steps:>5} steps: validation loss {curve[-1][1]:.4f}", flush=True)
        return curve

    with ThreadPoolExecutor(config.parallel) as pool:
        return dict(zip(runs, pool.map(one, runs), strict=True))


def crossing(curve: list[tuple[int, float]], goal: float) -> float:
    """The step at which a curve first falls to the goal, between two validations; inf where it does not."""
    for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
        if next_loss <= goal:
            return step + (next_step - step) * (loss - goal) / (loss - next_loss)
    return float("inf")


def step_seconds(config: BenchConfig, best: dict[str, str]) -> dict[str, float]:
    """Median seconds of an optimizer step of each recipe, from three windows in turn with all threads."""
    steps = {recipe: [] for recipe in best}
    for _ in range(3):
        for recipe, lr in best.items():
            folder = Path(config.out) / "timing"
            shutil.rmtree(folder, ignore_errors=True)
            words = command(config, folder.name, recipe, lr, 1, config.timing_steps)
            subprocess.run([*words, "--val_every", "0", "--checkpoint_every", "0"], check=True, capture_output=True)
            lines = log_lines(config, folder.name, "train")[5:]  # after warming up
            steps[recipe] += [line["dt_ms"] / 1000 for line in lines]
    return {recipe: statistics.median(taken) for recipe, taken in steps.items()}


def main(config: BenchConfig) -> None:
    """Print what each part gives, a table, and one JSON line."""
    prepare(config)
    full, seeds = config.max_steps, range(1, config.seeds + 1)
    rates = {"gpt2": config.gpt2_lr.split(","), "fast": config.fast_lr.split(",")}
    tuned = train(config, [(recipe, lr, 1, full) for recipe in rates for lr in rates[recipe]])
    best = {recipe: min(rates[recipe], key=lambda lr: tuned[recipe, lr, 1, full][-1][1]) for recipe in rates}
    for recipe, lr in best.items():
        if lr in (rates[recipe][0], rates[recipe][-1]):
            print(f"note: {lr} is at the end of what was tried for {recipe}")
    curves = train(config, [(recipe, best[recipe], seed, full) for seed in seeds for recipe in rates])
    shares = [float(share) for share in config.shares.split(",") if share]
    short = train(config, [("fast", best["fast"], seed, round(share * full)) for share in shares for seed in seeds])
    seconds = step_seconds(config, best)
    ratio = seconds["fast"] / seconds["gpt2"]

    record = {"bench": "recipes", **vars(config), "best": best, "seconds_a_step": seconds, "seeds_apart": []}
    print(f"\n{config.n_layer}L/{config.n_head}H/{config.n_embd}, T={config.sequence_length}, {full} steps of "
          f"{config.total_batch_size:,} tokens; learning rate {best['gpt2']} for gpt2, {best['fast']} for fast; "
          f"a step {seconds['gpt2']:.3f} and {seconds['fast']:.3f} s, {ratio:.2f} times")
    heads = [f"fast, {share:.0%} of steps" for share in shares]
    print(f"{'seed':>4} {'gpt2':>8} {'fast':>8} {'crosses at, tokens':>19} {'seconds':>8}",
          *(f"{head:>24}" for head in heads))
    for seed in seeds:
        gpt2, fast = (curves[recipe, best[recipe], seed, full] for recipe in ("gpt2", "fast"))
        share = crossing(fast, gpt2[-1][1]) / full
        ends = [short["fast", best["fast"], seed, round(share * full)][-1][1] for share in shares]
        print(f"{seed:>4} {gpt2[-1][1]:>8.4f} {fast[-1][1]:>8.4f} {share:>19.1%} {share * ratio:>8.1%}",
              *(f"{end:>16.4f} {end - gpt2[-1][1]:>+7.4f}" for end in ends))
        record["seeds_apart"].append({"gpt2": gpt2[-1][1], "fast": fast[-1][1], "share_of_tokens": share,
                                      "share_of_seconds": share * ratio, "ends": ends})
    print(json.dumps(record))


if __name__ == "__main__":
    run_command(main, BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0])))
