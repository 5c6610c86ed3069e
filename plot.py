"""log.jsonl -> loss.png: training and validation loss, HellaSwag, learning rate; several runs in one picture.

    python plot.py log                              # log/loss.png, as training draws it after a validation
    python plot.py log/a log/b --x hours            # two runs, one over the other, into ./loss.png

The training loss of single steps is thin and pale, with its average over 2 % of the steps, at least nine, on it;
validation has dots; the legend has the last value of each, of the training loss the mean over the last 20 steps.
Dotted lines show OpenAI's GPT-2 124M where the data is FineWeb-Edu. Hours are those of training, without evaluation.
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path

from plumbing.cli import UserError, parse_flags, run_command
from plumbing.curve import draw, read_log


@dataclass
class PlotConfig:
    """What to draw: every field is a flag, but for the runs."""

    runs: list = field(default_factory=lambda: ["log"])  # folders that hold a log.jsonl, or such files (default: log)
    x: str = "tokens"  # tokens, steps or hours
    out: str = ""  # picture to write: .png, .svg or .pdf (empty: loss.png beside a single log, else in this folder)


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    config = PlotConfig(**parse_flags(PlotConfig, argv, "Draw log.jsonl.", positional=("runs",)))
    if config.x not in ("tokens", "steps", "hours"):
        raise UserError(f"--x is {config.x!r}, it must be tokens, steps or hours")
    logs = {}
    for name in config.runs:
        try:
            lines = read_log(name)
        except OSError as error:
            inside = next((f", such as {path.parent}" for path in sorted(Path(name).glob("*/log.jsonl"))), "")
            raise UserError(f"no log.jsonl in {name!r} ({error.strerror}): name a folder that training wrote to"
                            f"{inside}") from error
        if not any(line["kind"] in ("train", "val") for line in lines):
            raise UserError(f"{name} has no losses to draw yet")
        logs[name] = lines
    first = Path(config.runs[0])
    beside = first if first.is_dir() else first.parent
    out = Path(config.out or (beside / "loss.png" if len(logs) == 1 else "loss.png"))
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out is {config.out!r}, it must end in .png, .svg or .pdf")
    try:
        draw(logs, out, config.x)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): choose another --out") from error
    print(out)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
