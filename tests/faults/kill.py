"""Kill training at random moments, run the same command again, and compare with a run that nothing disturbed.

    python tests/faults/kill.py --kills 200 --seed 1 --ranks 1        # also --compile, --dtype float16

Moments: any time while it trains, any time since the process began, in the middle of a checkpoint's write, before it
is renamed, after that and before older ones are deleted, in half a line of the log, in validation, HellaSwag and a
sample, before the picture is drawn, and in the optimizer's update. Each round kills a run several times, lets it end,
and compares the sha256 of weights, optimizer, and all that is logged. With several ranks all processes die at once, or
one does and torchrun ends the rest.
"""
import collections
import concurrent.futures
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

from faults.common import Row, checkpoint_steps, digest, finish, kill_all, run_flags, said, start, wait_for

from plumbing import cli

PASSES = {  # of each place in a whole run, about: the random moment is one of them
    "write": 8, "rename": 8, "prune": 8, "log": 40, "validation": 120, "hellaswag": 12, "sample": 4, "update": 24,
    "picture": 5,
}


@dataclass
class KillConfig:
    """What to kill, how often."""

    kills: int = 20  # in all
    seed: int = 1  # of the moments
    ranks: int = 1  # processes of the run
    per_round: int = 8  # kills of one run, before it may end
    places: str = ""  # where to kill, in turn, such as write,rename,log (empty: as chance has it)
    optimizer: str = "adamw"  # adamw or muon
    compile: bool = False  # torch.compile
    dtype: str = "float32"  # float32, bfloat16 or float16


def kill_once(arguments, ranks: int, chance: random.Random, seconds: float, wanted: str = "") -> tuple[str, str]:
    """Start the run and kill it at a random moment, or at one of the place that is wanted.

    -> where that was, or "" where the run ended before, and what the run has printed.
    """
    how = "place" if wanted else chance.choice(["training", "training", "any time", "place", "place"])
    if how == "place":
        place = wanted or chance.choice(list(PASSES))
        process = start(arguments, ranks, f"kill:{place}:{chance.randint(1, max(1, PASSES[place] // 3))}")
        process.wait(180)
        killed = process.returncode == -9 if ranks == 1 else "exitcode  : -9" in said(process)
        return place if killed else ended(process), said(process)
    process = start(arguments, ranks)
    if how == "training":
        wait_for(process, "| loss ")
    time.sleep(chance.uniform(0, seconds / 2 if how == "training" else seconds + 3))
    if process.poll() is not None:
        return ended(process), said(process)
    kill_all(process)
    return how, said(process)


def ended(process) -> str:
    """"", having made sure that a run which was not killed ended well."""
    finish(process)
    return ""


def went_on(output: str, step: int) -> bool:
    """Whether a run that has printed this began at the newest checkpoint, step 0 where there was none."""
    return "output |" not in output or (f"resumed after step {step}\n" if step else "new weights\n") in output


def play_round(config: KillConfig, changes: dict, kills: int, seed: int, seconds: float, expected: str):
    """Kill one run so many times at most, let it end, compare -> Counter of where it was killed."""
    chance, places = random.Random(seed), collections.Counter()
    folder, newest = Path(tempfile.mkdtemp()) / "run", 0
    arguments = run_flags(folder, **changes)
    wanted = [place for place in config.places.split(",") if place]
    if unknown := set(wanted) - set(PASSES):
        raise cli.UserError(f"no place {min(unknown)!r}: --places takes {', '.join(PASSES)}, commas between them")
    for i in range(kills):
        where, output = kill_once(arguments, config.ranks, chance, seconds, wanted[i % len(wanted)] if wanted else "")
        assert went_on(output, newest), f"seed {seed}: {dict(places)} {where}: not from step {newest}: {output[-999:]}"
        newest = max(checkpoint_steps(folder), default=0)  # each of them must be whole
        if where:
            places[where] += 1
    process = start(arguments, config.ranks)
    assert went_on(finish(process), newest), f"seed {seed}: {dict(places)}: not from step {newest}: {said(process)}"
    got = digest(folder)
    assert got == expected, f"seed {seed}: {dict(places)}: the run in {folder} differs\n{said(process)}"
    if config.places:
        assert newest, f"seed {seed}: no kill came after the first checkpoint"
    leftovers = [path.name for path in folder.glob("*.tmp")]
    assert not leftovers, f"seed {seed}: {leftovers} were left"
    shutil.rmtree(folder.parent)
    return places


def kills(config: KillConfig, workers: int = 1) -> Row:
    """Rounds until there were config.kills kills, `workers` at a time -> the line for docs/faults.md."""
    changes = {"optimizer": config.optimizer, "compile": config.compile or None, "dtype": config.dtype, "n_layer": 1}
    chance, places, rounds = random.Random(config.seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        process = start(run_flags(Path(folder) / "whole", **changes), config.ranks)
        wait_for(process, "| loss ")
        began = time.monotonic()
        finish(process)
        seconds, expected = time.monotonic() - began, digest(Path(folder) / "whole")
        while (left := config.kills - places.total()) > 0:
            sizes = [min(config.per_round, left - i * config.per_round) for i in range(workers)]
            for found in pool.map(lambda size: play_round(config, changes, size, chance.getrandbits(32), seconds,
                                                          expected), [size for size in sizes if size > 0]):
                places += found
                rounds += 1
                print(f"{places.total()} of {config.kills} kills: {dict(places)}", flush=True)
    name = ", ".join([f"{config.ranks} {cli.plural(config.ranks, 'rank')}", config.optimizer,
                      *(["torch.compile"] if config.compile else []),
                      *([config.dtype] if config.dtype != "float32" else [])])
    where = ", ".join(f"{n} {place}" for place, n in sorted(places.items()))
    return Row(f"SIGKILL, {name}", places.total(),
               f"{rounds} runs ended with the sha256 of an undisturbed one ({where})")


if __name__ == "__main__":
    cli.run_command(lambda: print(*kills(KillConfig(**cli.parse_flags(
        KillConfig, sys.argv[1:], "Kill training at random moments and compare.")), workers=2), sep=" | "))
