"""Ranks that die or raise, a torchrun that dies with its workers, a run that goes on with another number of ranks."""
import json
import re
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
from helpers import read_log

from plumbing import cli
from faults.common import (
    STEPS, Row, digest, finish, kill_all, left_by, run_flags, said, start, wait_for, whole_digest,
)


def a_killed_worker(times: int = 1) -> list[Row]:
    """SIGKILL of rank 1, or of rank 0, in a step under --max-restarts=2."""
    with tempfile.TemporaryDirectory() as home:
        expected = whole_digest(Path(home) / "whole", 2)
    slowest = 0.0
    for i in range(times):
        with tempfile.TemporaryDirectory() as home:
            started = time.monotonic()
            process = start(run_flags(Path(home) / "run"), 2, f"kill:step:{9 + 4 * i}:rank{(i + 1) % 2}",
                            options=["--standalone", "--nproc-per-node=2", "--max-restarts=2"])
            assert "resumed after step" in finish(process)
            slowest = max(slowest, time.monotonic() - started)
            assert digest(Path(home) / "run") == expected
    return [Row("SIGKILL of one of two workers under torchrun --max-restarts=2", times,
                f"went on by itself to the same sha256, at most {slowest:.0f} s for the whole job")]


def a_raising_rank(places=("step", "validation", "hellaswag")) -> list[Row]:
    """A rank that raises: the other leaves too, and torchrun's last words hold what was raised."""
    slowest = 0.0
    for place in places:
        rank = int(place == "step")
        with tempfile.TemporaryDirectory() as home:
            process = start(run_flags(Path(home) / "run"), 2, f"raise:{place}:{1 + (place == 'step')}:rank{rank}")
            wait_for(process, "the injected fault")
            raised = time.monotonic()
            finish(process, code=1, seconds=60)
            slowest = max(slowest, time.monotonic() - raised)
            assert slowest < 30, f"{slowest:.0f} s until the other rank had left"
            last_words = said(process).rpartition("ChildFailedError")[2]
            assert "RuntimeError: the injected fault" in last_words, last_words
            assert not left_by(Path(home))
    return [Row(f"a rank that raises, in {', '.join(places)}; 2 ranks", len(places),
                f"all left within {slowest:.1f} s; torchrun's report has the message")]


def two_agents() -> list[Row]:
    """Two torchruns on two addresses; the one that does not host the rendezvous dies with its worker and comes back."""
    with tempfile.TemporaryDirectory() as home, socket.socket() as free:
        expected = whole_digest(Path(home) / "whole", 2)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = run_flags(Path(home) / "run")

        def agent(number: int):
            return start(arguments, 2, "", [
                "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
                "--rdzv-id=faults", f"--local-addr=127.0.0.{number}", "--max-restarts=3",
                f"--rdzv-conf=is_host={int(number == 1)}"], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

        first, second = agent(1), agent(2)
        wait_for_step(first, second, 7)
        killed = time.monotonic()
        kill_all(second)
        second = agent(2)
        for process in (first, second):
            finish(process, seconds=300)
        took = time.monotonic() - killed
        assert "resumed after step" in said(first) + said(second)
        assert digest(Path(home) / "run") == expected
    return [Row("SIGKILL of the second of two torchruns with its worker, then started again; "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", 1,
                f"the job went on by itself to the same sha256, {took:.0f} s after the kill it was done")]


def wait_for_step(first, second, step: int) -> None:
    """Wait until rank 0, which either may have, has finished the step."""
    while not re.search(rf"step +{step}/", said(first) + said(second)):
        assert first.poll() is None and second.poll() is None, said(first) + said(second)
        time.sleep(0.01)


def another_world(sizes=((1, 4), (2, 2), (1, 8))) -> list[Row]:
    """The run goes on at other numbers of ranks and another B each time: the same tokens, losses to 1e-4."""
    with tempfile.TemporaryDirectory() as home:
        base, tokens = Path(home), []
        finish(start(run_flags(base / "whole"), 1, TOKENS=str(base / "whole_tokens"), fault="record:tokens:1"))
        for i, (ranks, B) in enumerate(sizes):
            last = i == len(sizes) - 1
            fault = "record:tokens:1" if last else f"TERM:tokens:{18 // B}{':parent' if ranks > 1 else ''}"
            process = start(run_flags(base / "run", micro_batch_size=B), ranks, fault, TOKENS=str(base / f"tokens{i}"))
            output = finish(process, code=1 if ranks > 1 and not last else 0)
            assert ("resumed after step" in output) == (i > 0), output
            tokens.append(by_step(base, f"tokens{i}"))
        whole, seen = by_step(base, "whole_tokens"), {}
        for part in tokens:
            seen |= part  # a step that was dropped is read again
        assert len(whole) >= STEPS and all(seen[step] == whole[step] for step in range(STEPS))
        worst = 0.0
        for kind in ("train", "val"):
            a, b = ([line["loss"] for line in read_log(base / name, kind)] for name in ("whole", "run"))
            assert len(a) == len(b)
            worst = max(worst, float(np.abs(np.subtract(a, b)).max()))
        assert worst <= 1e-4, worst
    chain = " -> ".join(f"{ranks} {cli.plural(ranks, 'rank')}, B={B}" for ranks, B in sizes)
    return [Row(f"stopped and resumed at other sizes: {chain}", len(sizes) - 1,
                f"the same tokens at each of {STEPS} steps, losses within {worst:.1e}")]


def by_step(base: Path, name: str) -> dict[int, list]:
    """{step: its windows in the order of a single process}, from what each rank has recorded."""
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(base.glob(f"{name}.*"))]
    steps: dict[int, list] = {}
    for batches in zip(*ranks):
        for position, windows in batches:
            for i, window in enumerate(windows):
                steps.setdefault((position + i) // 8, {})[position + i] = window
    return {step: [windows[i] for i in sorted(windows)] for step, windows in steps.items() if len(windows) == 8}
