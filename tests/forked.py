"""Processes that begin where PyTorch and matplotlib are imported already, which takes 3 s, and that do what tests need.

It imports little itself, as each process imports it first.
"""
import atexit
import math
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

SERVER = None  # Windows has none
if "forkserver" in multiprocessing.get_all_start_methods():
    SERVER = multiprocessing.get_context("forkserver")
    SERVER.set_forkserver_preload(["torch", "matplotlib.figure", "matplotlib.backends.backend_agg"])


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
    if "WHOLE_RUN" not in environment and Path(argv[0]).name != "plot.py":
        spare()
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    try:
        (runpy.run_path if sys.argv == argv else runpy.run_module)(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def spare() -> None:
    """Leave out half of a small run's time, of which there are tests with a whole run: the picture and the peak."""
    from plumbing import curve, machine, runlog

    curve.draw = lambda *_, **__: None
    runlog.PICTURE_SECONDS = math.inf
    machine.measured_peak = lambda *_, **__: 1e11
