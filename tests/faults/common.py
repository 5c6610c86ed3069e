"""What the fault tests share: the run that is broken, how it is broken, and the hash by which two runs are compared."""
import hashlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from helpers import ROOT, Forked, command, flags, python_path, write_shards

from plumbing import checkpoint

INJECT = Path(__file__).with_name("inject.py")
STEPS = 24  # of the run that is broken: more than an epoch, with all that can be due in between
DUE = {"max_steps": STEPS, "val_every": 5, "sample_every": 8, "checkpoint_every": 3, "hellaswag_every": 9,
       "micro_batch_size": 2, "hellaswag_limit": 6, "hellaswag_data": ROOT / "tests" / "hellaswag_examples.jsonl"}
started = []  # all processes of start()
forking = False  # whether start() forks a process in which PyTorch is imported already: pytest has no time for others


class Row(NamedTuple):
    """A line of docs/faults.md."""
    fault: str
    times: int
    outcome: str


def run_flags(folder: Path, **changes) -> list[str]:
    """Flags of the run that is broken, on shards beside its output `folder`: shuffled, accumulating gradients."""
    return flags(data=write_shards(folder.parent / "data"), out_dir=folder, **{**DUE, **changes})


def start(arguments, ranks: int = 1, fault: str = "", options=(), fresh: bool = False, **environment):
    """Start the real command in a session of its own, with a fault as inject.py takes it, its output in a file.

    `options` are torchrun's, instead of the usual ones. `fresh`: never forked. -> subprocess.Popen, or what is like it.
    """
    words = command(arguments, ranks, INJECT if fault else ROOT / "train_gpt2.py")
    if options:
        at = words.index("--standalone")
        words[at:at + 2] = options
    output = tempfile.TemporaryFile()
    environment = {**os.environ, "FAULT": fault, "PYTHONPATH": python_path(), **environment}
    if "picture" in fault:
        environment["WHOLE_RUN"] = "1"
    if forking and not fresh:
        process = Forked(words[1:], output, output, environment)
    else:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env=environment, start_new_session=True)
    process.output = output
    started.append(process)
    return process


def end_all() -> None:
    """SIGKILL what start() has started and what is still there, after a test that failed."""
    while started:
        kill_all(started.pop())


def said(process) -> str:
    """What a process that start() started has printed so far."""
    size = os.fstat(process.output.fileno()).st_size
    return os.pread(process.output.fileno(), size, 0).decode(errors="replace")


def wait_for(process, text: str, seconds: float = 120) -> None:
    """Wait until the process prints `text` or ends."""
    end = time.monotonic() + seconds
    while text not in said(process) and process.poll() is None:
        assert time.monotonic() < end, f"no {text!r} in {seconds} s: {said(process)[-2000:]}"
        time.sleep(0.005)


def finish(process, code: int = 0, seconds: float = 180) -> str:
    """Wait for the end of a process, which must be with this exit code -> what it printed."""
    assert process.wait(seconds) == code, f"exit code {process.returncode}: {said(process)[-3000:]}"
    return said(process)


def left_by(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder, orphans too."""
    import psutil

    found = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [" ".join(words) for words in found if any(str(folder) in word for word in words)]


def family(process) -> list:
    """A process and all that it has started, by psutil; none where it has ended, as its number may be another's now."""
    import psutil

    if process.poll() is not None:
        return []
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_all(process) -> None:
    """SIGKILL a process and all that it has started, as if the machine had lost its power."""
    import psutil

    for member in family(process):
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def digest(folder: Path, step: int = STEPS) -> str:
    """The sha256 of a finished run: weights, optimizer, scaler, position, and all that its log has of every step."""
    hashed = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                hashed.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            hashed.update(repr(value).encode())

    state = checkpoint.load(Path(folder) / f"model_{step:06d}.pt")
    add({key: state[key] for key in ("model", "optimizers", "scaler", "data", "step", "val_loss")})
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] != "run":
            add({key: value for key, value in line.items() if key not in ("dt_ms", "data_ms", "tok_per_s", "mfu")})
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, step + 1)), f"the log's steps are {steps}"
    return hashed.hexdigest()


def whole_digest(folder: Path, ranks: int = 1, **changes) -> str:
    """The hash of a run that nothing disturbs; `folder` must be new."""
    finish(start(run_flags(folder, **changes), ranks))
    return digest(folder, changes.get("max_steps", STEPS))


def last_step(folder: Path) -> int:
    """The last step in a run's log, 0 where there is none."""
    steps = [0]
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        if '"kind": "train"' in line:
            steps.append(json.loads(line)["step"])
    return steps[-1]


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, each of them loaded."""
    return [checkpoint.load(path)["step"] for path in checkpoint.listing(folder)]

