"""Draw log.jsonl: training and validation loss, HellaSwag, learning rate; several runs in one picture.

    python plot.py                            # the newest run below log/: its loss.png, as training draws it
    python plot.py log/a log/b --x hours      # compares two runs in ./loss.png
    python plot.py log --out curve.svg        # for a page or a paper

The training loss of single steps is pale. The line on it is its moving average, after n steps over the last sqrt(n) of
them: 13 of 180, 138 of 19,073. Dots are validation losses. The legend gives the last value of each curve. A steep start
is cut off, with a note, so that the second half of a run fills at least a third of the height. Dotted lines show
OpenAI's GPT-2 124M if the data are FineWeb-Edu. Hours are hours of training, without evaluation.
"""
import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plumbing import newest
from plumbing.cli import UserError, check_values, parse_flags, require, run_command
from plumbing.curve import draw, read_log
from plumbing.progress import busy, track

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class PlotConfig:
    """What to draw. Raises UserError for a value out of its range."""
    # Arguments
    runs: list = field(default_factory=list)  # run folders, or log.jsonl files (default: the newest run below log/)
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
        runs = [*newest.newest_first("log.jsonl", name), *filter(None, [newest.resembling(name, "log.jsonl")])]
        inside = f", such as {runs[0]}" if runs else ""
        raise UserError(f"no log.jsonl in {name!r} ({error.strerror}): name a folder that training wrote to"
                        f"{inside}") from error
    if not any(line["kind"] in ("train", "val") for line in lines):
        raise UserError(f"{name} has no losses to draw yet")
    return lines


def newest_losses() -> dict[str, list[dict]]:
    """Return {run: its log} for that below log/ to which losses were written last, and say which it is."""
    for folder in newest.newest_first("log.jsonl"):
        with contextlib.suppress(UserError):
            lines = read_losses(str(folder))
            step = max(line["step"] for line in lines if line["kind"] in ("train", "val"))
            print(f"using {folder}, step {step:,}", file=sys.stderr, flush=True)
            return {str(folder): lines}
    raise UserError(f"no run below {newest.ROOT}/ has a log with losses: train first, python train_gpt2.py, or name a "
                    "run's folder")


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    config = PlotConfig(**parse_flags(PlotConfig, argv, "Draw the log of one or more runs.", positional=("runs",)))
    logs = {name: read_losses(name) for name in track(config.runs, "reading logs", "runs")} or newest_losses()
    out = Path(config.out or "loss.png")
    if not config.out and len(logs) == 1:
        run = Path(next(iter(logs)))
        out = (run if run.is_dir() else run.parent) / "loss.png"
    try:
        with busy("drawing"):
            draw(logs, out, config.x)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): choose another --out") from error
    print(out)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
