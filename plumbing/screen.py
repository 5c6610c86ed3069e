"""The lines that a run prints while it trains and at its end, each column in its place whatever the values are.

    StepLines(config)                the line of an optimizer step, and which steps get one
    commands_to_go_on(config, ...)   what to do with a run, as commands that work from this folder
"""
import math
import os
import shlex
import shutil
import sys
from pathlib import Path

from plumbing.cli import clock

ROOT = Path(__file__).resolve().parent.parent
FIRST = 20  # steps at the start of a session that each get a line, as people watch them
ROUND = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]


class StepLines:
    """Formats optimizer steps, and decides which of them get a line on the screen."""

    def __init__(self, config):
        self.last, self.log_every = config.max_steps, config.log_every
        self.steps_here, self.total = 0, 0.0  # steps of this session, and their time without the first one's
        self.seconds = math.nan  # moving average of a step's time

    def count(self, seconds: float) -> None:
        """Take note of a step; the averages forget the first one, which compiles and warms up."""
        self.steps_here += 1
        self.total += seconds if self.steps_here > 1 else 0.0
        self.seconds = seconds if self.steps_here <= 2 else 0.9 * self.seconds + 0.1 * seconds

    @property
    def every(self) -> int:
        """Return the number of steps from one line to the next, later on: log_every, or those of about a second."""
        mean = self.total / max(1, self.steps_here - 1)  # seconds; it hardly changes, unlike the moving average
        return self.log_every or next((n for n in ROUND if n * mean >= 1), ROUND[-1])

    def is_due(self, step: int) -> bool:
        """Return whether a step gets a line: the first 20, the last, and those at multiples of `every`."""
        return self.steps_here <= FIRST or step == self.last or step % self.every == 0

    def thins_out(self, step: int) -> bool:
        """Return whether this is the step from which on some get no line."""
        return self.steps_here == FIRST and self.every > 1 and step < self.last

    def at(self, step: int) -> str:
        """Return the beginning of each line of a run."""
        return f"step {step:>{len(str(self.last))}}/{self.last}"

    def format(self, step: int, values: dict, note: str = "") -> str:
        """Return the line of a step with `values` as log.jsonl has them."""
        seconds = values["dt_ms"] / 1000
        columns = [self.at(step), f"loss {column(values['loss'], 7, 4)}", f"lr {values['lr']:.2e}",
                   f"norm {column(values['norm'], 6, 2)}", f"{short_time(seconds):>8}",
                   f"{values['tok_per_s']:>9,.0f} tokens/s"]
        if values["mfu"] is not None:
            columns.append(f"MFU {values['mfu']:5.1%}")
        columns.append(f"ETA {clock(self.seconds * (self.last - step))}")
        return " | ".join([*columns, *([note] if note else [])])


def column(value: float, width: int, digits: int) -> str:
    """Format a number in a column of that width, one that is too large with an exponent."""
    text = f"{value:{width}.{digits}f}"
    return text if len(text) <= width else f"{value:{width}.0e}"


def short_time(seconds: float) -> str:
    """Format the time of a step in at most eight characters."""
    if seconds < 10:
        return f"{1000 * seconds:,.0f} ms"
    return f"{seconds:.1f} s" if seconds < 1000 else clock(seconds)


def program(name: str) -> str:
    """Return how to start one of the commands from the current folder."""
    try:
        path = os.path.relpath(ROOT / name)
    except ValueError:  # another drive
        path = str(ROOT / name)
    python = "python" if shutil.which("python") else Path(sys.executable).name
    return shlex.join([python, path])


def here(command: str) -> str:
    """Return a command that trains, with python or torchrun, as it works from the current folder."""
    start = program("train_gpt2.py")
    command = command.replace("python train_gpt2.py", start, 1)
    return command.replace(" train_gpt2.py", start[start.index(" "):], 1) if command.startswith("torchrun") else command


def commands_to_go_on(model: str, prompt: str, run: str = "", command: str = "") -> str:
    """Return lines with what to do with a model, with the run that made it, and the command that continues that."""
    name = shlex.quote(model)
    words = [f"--prompt={prompt}"] if prompt.startswith("-") else ["--prompt", prompt]
    commands = {"go on": here(command),
                "talk to it": f"{program('generate.py')} --model {name} {shlex.join(words)}",
                "see its curve": f"{program('plot.py')} {shlex.quote(run)}" if run else "",
                "export it": f"{program('export_hf.py')} {name}"}
    return "\n".join(f"  {what + ':':<15}{command}" for what, command in commands.items() if command)
