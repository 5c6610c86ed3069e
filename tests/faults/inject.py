"""Run train_gpt2.py's command with one fault, of which the environment variable FAULT says what, where and when.

    FAULT=kill:write:2 python tests/faults/inject.py --data ...      # SIGKILL in the second write of a checkpoint
    FAULT=TERM:validation:5:parent torchrun ... inject.py ...        # SIGTERM to torchrun in the fifth batch of rank 0
    FAULT=raise:step:3:rank1                                         # rank 1 raises in its third backward pass

What: `kill`, `TERM`, `INT` or `TERM+TERM` to this process (with `:parent` to the one that started it), `raise`, `nan`
or `inf` in the `loss`, a `gradient` or the `weights`, or `record`, which does nothing. Where: see PLACES; `tokens` also
writes what each rank is given to train on into the file that TOKENS names. When: at how many-th pass, and for `nan` and
`inf` how many times from there (`nan:gradient:3x2:rank1`). `rankN`: on that rank only, otherwise on rank 0. A job that
torchrun has started again after a failure is left alone. Each rank writes the hash of its weights and moments after
every step into the file that WEIGHTS names, if it does.
"""
import atexit
import hashlib
import json
import math
import os
import signal
import sys
import time

import torch

from plumbing import checkpoint
import hellaswag
from plumbing import curve
from plumbing import cli
from plumbing import files
from plumbing import runlog
from plumbing import sampling
import train_gpt2

what, where, when, *rest = os.environ["FAULT"].split(":")
first, _, times = when.partition("x")
first, times = int(first), int(times or 1)
rank = next((word.removeprefix("rank") for word in rest if word.startswith("rank")), "0")
here = os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
passes = 0


def due() -> bool:
    """Whether a pass of the place is one of those at which the fault happens."""
    global passes
    passes += here
    return here and first <= passes < first + times


def act() -> None:
    """Do it, if it is due."""
    if not due():
        return
    if what == "record":
        return
    if what == "raise":
        raise RuntimeError("the injected fault")
    for name in what.split("+"):
        number = getattr(signal, f"SIG{name.upper()}")
        os.kill(os.getppid() if "parent" in rest else os.getpid(), number)
        while "parent" in rest and signal.getsignal(number) != signal.SIG_DFL:  # until torchrun has passed it on
            time.sleep(0.01)


def before(owner, name: str) -> None:
    """Have act() called before every call of owner.name."""
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        act()
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


class Writing:
    """A file that acts in its fifth write, that is in the middle of a checkpoint."""

    def __init__(self, file):
        self.file, self.writes = file, 0

    def write(self, data):
        self.writes += 1
        if self.writes == 5:
            self.file.flush()
            act()
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


class Tearing:
    """A log file that acts when half of a line is written."""

    def __init__(self, file):
        self.file = file

    def write(self, line):
        half = self.file.write(line[:len(line) // 2])
        act()
        return half + self.file.write(line[half:])

    def __getattr__(self, name):
        return getattr(self.file, name)


def tear_log() -> None:
    original = runlog.RunLog.open

    def open_log(self, *arguments):
        original(self, *arguments)
        self.file = Tearing(self.file)

    runlog.RunLog.open = open_log


def hurt_validation() -> None:
    original = train_gpt2.DataLoaderLite.batch

    def batch(self, i):
        if not self.shuffle:
            act()
        return original(self, i)

    train_gpt2.DataLoaderLite.batch = batch


def record_tokens() -> None:
    original = train_gpt2.DataLoaderLite.batch

    def batch(self, i):
        first = (i * self.world.world_size + self.world.rank) * self.B
        x, y = original(self, i)
        if self.shuffle:
            act()
            with open(f"{os.environ['TOKENS']}.{self.world.rank}", "a") as file:
                file.write(json.dumps([first, torch.cat((x, y), dim=1).tolist()]) + "\n")
        return x, y

    train_gpt2.DataLoaderLite.batch = batch


def hurt_sample() -> None:
    original = sampling.stream_tokens

    def stream_tokens(*arguments, **options):
        for i, token in enumerate(original(*arguments, **options)):
            if i == 5:
                act()
            yield token

    sampling.stream_tokens = stream_tokens


def hurt_write() -> None:
    original = files.open_new
    files.open_new = lambda path: Writing(original(path)) if path.suffixes[:1] == [".pt"] else original(path)


def hurt_rename() -> None:
    original = files.replace

    def replace(temporary, path):
        if path.suffix == ".pt":
            act()
        original(temporary, path)

    files.replace = replace


def hurt_loss() -> None:
    original = train_gpt2.GPT.forward
    value = math.nan if what == "nan" else math.inf

    def forward(self, idx, targets=None, cache=None):
        loss = original(self, idx, targets, cache)
        if targets is not None and torch.is_grad_enabled() and due():
            loss = loss + (value - loss).detach()  # the gradient stays finite
        return loss

    train_gpt2.GPT.forward = forward


def hurt_gradient() -> None:
    original = torch.Tensor.backward
    value = math.nan if what == "nan" else math.inf

    def backward(loss, *arguments, **options):
        return original(loss * value if due() else loss, *arguments, **options)

    torch.Tensor.backward = backward


def record_weights() -> None:
    """Write the hash of all weights and moments after each step into a file of this rank's."""
    configure, train, parts = train_gpt2.configure_optimizers, runlog.RunLog.train, []

    def configure_optimizers(model, *arguments):
        parts[:] = model, configure(model, *arguments)
        return parts[1]

    def log_train(self, *arguments, **options):
        model, optimizers = parts
        tensors = [*model.parameters(), *(value for optimizer in optimizers for state in optimizer.state.values()
                                          for value in state.values())]
        hashed = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors))
        with open(f"{os.environ['WEIGHTS']}.{self.world.rank}", "a") as file:
            file.write(hashed.hexdigest() + "\n")
        train(self, *arguments, **options)

    train_gpt2.configure_optimizers, runlog.RunLog.train = configure_optimizers, log_train


def hurt_picture() -> None:
    runlog.PICTURE_SECONDS = 0
    before(curve, "draw")


def hurt_weights() -> None:
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        result = original(self, *arguments)
        if due():
            with torch.no_grad():
                self.param_groups[0]["params"][0][3] = math.inf
        return result

    torch.optim.AdamW.step = step


PLACES = {
    "step": lambda: before(torch.Tensor, "backward"),
    "update": lambda: before(torch.optim.AdamW, "step"),
    "validation": hurt_validation,
    "tokens": record_tokens,
    "hellaswag": lambda: before(hellaswag, "sum_losses"),
    "sample": hurt_sample,
    "write": hurt_write,
    "rename": hurt_rename,
    "prune": lambda: before(checkpoint, "prune"),  # the checkpoint has its name, older ones are still there
    "log": tear_log,
    "picture": hurt_picture,  # which is then drawn after every validation
    "loss": hurt_loss,
    "weights": hurt_weights,
    "gradient": hurt_gradient,
}

PLACES[where]()
atexit.register(lambda: print(f"passes of {where}: {passes}", flush=True))
if "WEIGHTS" in os.environ:
    record_weights()
if __name__ == "__main__":
    cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))
