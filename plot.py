"""Draw log.jsonl: training and validation loss, HellaSwag, learning rate; several runs in one picture.

    python plot.py log                        # writes log/loss.png, as training does after a validation
    python plot.py log/a log/b --x hours      # compares two runs in ./loss.png
    python plot.py log --out curve.svg        # for a page or a paper

The training loss of single steps is thin and pale; the line on it is its average over 2 % of the steps, at least 9.
Dots are validation losses. The legend gives the last value of each curve, and the training loss as the mean of the last
20 steps. Dotted lines show OpenAI's GPT-2 124M if the data are FineWeb-Edu. Hours are hours of training, without
evaluation.
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plumbing.cli import UserError, check_values, parse_flags, require, run_command
from plumbing.curve import draw, read_log

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class PlotConfig:
    """What to draw. Raises UserError for a value out of its range."""
    # Arguments
    runs: list = field(default_factory=lambda: ["log"])  # run folders, or log.jsonl files (default: log)
    # Picture
    x: Literal["tokens", "steps", "hours"] = "tokens"  # horizontal axis
    out: str = ""  # picture, .png, .svg or .pdf (empty: loss.png in the run's folder, or here for several runs)

    def __post_init__(self):
        check_values(self)
        require(self, "out", not self.out or Path(self.out).suffix in FORMATS, "a name that ends in .png, .svg or .pdf")


def read_losses(name: str) -> list[dict]:
    """Read the log of a run. Raises UserError if there is none, or it has no losses yet."""
    try:
        lines = read_log(name)
    except OSError as error:
        inside = next((f", such as {path.parent}" for path in sorted(Path(name).glob("*/log.jsonl"))), "")
        raise UserError(f"no log.jsonl in {name!r} ({error.strerror}): name a folder that training wrote to"
                        f"{inside}") from error
    if not any(line["kind"] in ("train", "val") for line in lines):
        raise UserError(f"{name} has no losses to draw yet")
    return lines


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    config = PlotConfig(**parse_flags(PlotConfig, argv, "Draw the log of one or more runs.", positional=("runs",)))
    logs = {name: read_losses(name) for name in config.runs}
    out = Path(config.out or "loss.png")
    if not config.out and len(logs) == 1:
        run = Path(config.runs[0])
        out = (run if run.is_dir() else run.parent) / "loss.png"
    try:
        draw(logs, out, config.x)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): choose another --out") from error
    print(out)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
