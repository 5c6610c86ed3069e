"""Break training in every way that the promises of docs/robustness.md speak of, and write down what happened.

    python tests/faults/run.py --full     # the record: writes docs/faults.md, about 50 minutes on two cores
    python tests/faults/run.py            # the small part that pytest runs too, to the screen
    python tests/faults/run.py --full --only disk,soak       # these parts of the record anew

A promise that is broken stands in the table as BROKEN, and the exit code is 1.
"""
import os
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import torch
from faults.common import Row, end_all
from faults.corrupt import checkpoints, corrupt, token_shards
from faults.disk import disk, limited, read_only
from faults.fuzz import fuzz
from faults.kill import PASSES, KillConfig, kills
from faults.not_finite import not_finite
from faults.several_ranks import a_killed_worker, a_raising_rank, another_world, two_agents
from faults.signals import a_second_signal, one_rank_alone, signals, the_demo
from faults.soak import soak
from faults.two_runs import two_runs
from faults.untrusted import payloads, untrusted

from plumbing import machine
from plumbing import cli

RECORD = Path(__file__).parent.parent.parent / "docs" / "faults.md"
# part -> what it is called, what the default tests try, what the slow ones try besides, what the record has
PARTS = {
    "kill": ("SIGKILL anywhere", {
        "1_rank": lambda: [kills(KillConfig(kills=2, places="write,log"))],
    }, {
        "more_places": lambda: [kills(KillConfig(kills=5, places="write,rename,log,validation,prune"))],
        "2_ranks": lambda: [kills(KillConfig(kills=1, ranks=2, places="write", seed=25))],
        "float16": lambda: [kills(KillConfig(kills=2, places="update,rename", dtype="float16", seed=7))],
    }, lambda: [kills(KillConfig(**config), workers=2) for config in (
        dict(kills=200), dict(kills=50, ranks=2, seed=2), dict(kills=30, optimizer="muon", seed=3),
        dict(kills=16, compile=True, seed=4, places=",".join(PASSES)),
        dict(kills=20, dtype="float16", seed=5), dict(kills=8, ranks=2, dtype="float16", seed=6),
        dict(kills=8, ranks=2, compile=True, seed=8, places="write,update,validation,rename"))]),
    "signals": ("Signals", {}, {
        "1_rank": lambda: signals(1, ("TERM",), ("validation", "hellaswag", "write")),
        "1_of_2_ranks": lambda: one_rank_alone(),
        "twice": lambda: a_second_signal(("validation",), ("TERM+TERM",)),
    }, lambda: [*signals(), *signals(2), *one_rank_alone(), *a_second_signal(), *the_demo()]),
    "ranks": ("Ranks and torchrun", {}, {
        "raising": lambda: a_raising_rank(("step",)),
        "killed": lambda: a_killed_worker(),
    }, lambda: [*a_killed_worker(4), *a_raising_rank(), *two_agents()]),
    "world": ("Another number of ranks", {}, {"1_2_1": lambda: another_world()}, lambda: another_world()),
    "disk": ("Disk", {"read_only": lambda: read_only()},
             {"full": lambda: [*limited("checkpoint"), *limited("log")]}, lambda: disk()),
    "corrupt": ("Corruption", {"bits": lambda: [*checkpoints(12, 5), *token_shards(12)]},
                {"more": lambda: corrupt(40, 12)}, lambda: corrupt()),
    "numbers": ("Inf and nan", {}, {"few": lambda: not_finite(few=True)},
                lambda: not_finite()),
    "fuzz": ("Bad input", {"24": lambda: fuzz(24, 1, 1)}, {"100": lambda: fuzz(100, 6, 5)},
             lambda: fuzz(2000, 50, 250)),
    "untrusted": ("Untrusted files", {"payloads": lambda: payloads()}, {"all": lambda: untrusted()},
                  lambda: untrusted()),
    "two_runs": ("Two runs in one folder", {}, {"1_rank": lambda: two_runs(((1, 1),))}, lambda: two_runs()),
    "soak": ("Soak", {}, {"450_steps": lambda: soak(450, settled=150, share=0.1)},
             lambda: [*soak(), *soak(share=0.15, plain=False)]),
}


@dataclass
class FaultsConfig:
    """What to try."""

    full: bool = False  # the record: its parts in docs/faults.md are written anew
    only: str = ""  # parts, such as disk,soak (empty: all)


def try_part(name: str, full: bool) -> tuple[list[Row], float]:
    """The rows of a part, and how long it took; what broke a promise is a row too."""
    _, quick, slow, record = PARTS[name]
    rows, started = [], time.monotonic()
    for action in ([record] if full else [*quick.values(), *slow.values()]):
        try:
            rows += action()
        except Exception as error:
            traceback.print_exc()
            rows.append(Row(name, 0, f"BROKEN: {cli.explain(error)}"))
        finally:
            end_all()
    return rows, time.monotonic() - started


def section(name: str, rows: list[Row], seconds: float) -> str:
    """A part as docs/faults.md has it."""
    table = [f"| {row.fault} | {row.times:,} | {row.outcome} |".replace("\n", " ") for row in rows]
    commit = machine.versions()["commit"][:7]
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=RECORD.parent, text=True,
                             capture_output=True).stdout.splitlines()
    commit += " and changes" * any(not line.endswith(RECORD.name) for line in changed)
    return "\n".join([f"## {PARTS[name][0]}\n", "| fault | times | what happened |", "|---|---|---|", *table,
                      f"\n{cli.clock(seconds)}, `python tests/faults/run.py --full --only {name}`, commit {commit}, "
                      f"{os.cpu_count()} cores of {cpu()}"])


def write_record(sections: dict[str, str]) -> None:
    """Put these sections into docs/faults.md, where those of the other parts stay."""
    old = RECORD.read_text(encoding="utf-8").split("\n## ")[1:] if RECORD.exists() else []
    known = {text.partition("\n")[0]: f"## {text.rstrip()}" for text in old}
    known |= {PARTS[name][0]: text for name, text in sections.items()}
    head = ("# What was tried to break it, and what happened\n\n`python tests/faults/run.py --full` writes this; "
            f"Python {platform.python_version()}, torch {torch.__version__}. Every fault is a real one:\nprocesses are "
            "killed, file systems are full, bits are flipped. A small part of it runs with `pytest`.")
    parts = [known[title] for title, *_ in PARTS.values() if title in known]
    RECORD.write_text("\n\n".join([head, *parts]) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    """Run the command with these flags."""
    config = FaultsConfig(**cli.parse_flags(FaultsConfig, argv, "Try the promises of docs/robustness.md under faults."))
    names = config.only.split(",") if config.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise cli.UserError(f"no part {unknown[0]!r}: --only takes {', '.join(PARTS)}, with commas between them")
    broken = 0
    for name in names:
        rows, seconds = try_part(name, config.full)
        broken += sum(row.outcome.startswith("BROKEN") for row in rows)
        text = section(name, rows, seconds)
        print(f"\n{text}", flush=True)
        if config.full:
            write_record({name: text})
    sys.exit(1 if broken else 0)


def cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.machine()


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
