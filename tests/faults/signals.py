"""SIGTERM and Ctrl-C in every part of training: the last finished step is saved, and the resumed run is the same."""
import json
import tempfile
import time
from pathlib import Path

from helpers import ROOT
from faults.common import Row, checkpoint_steps, digest, finish, last_step, run_flags, start, wait_for, whole_digest

PLACES = {"step": 20, "validation": 14, "hellaswag": 3, "sample": 2, "write": 3}  # and at which pass of it
WORDS = {"validation": "a validation", "hellaswag": "HellaSwag", "sample": "a sample", "write": "a checkpoint's write",
         "step": "a step"}


def evaluated(folder: Path, step: int) -> set[str]:
    """What of the evaluation after `step` stands in the log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["kind"] for line in lines if line.get("step") == step} - {"train"}


def stop_and_resume(sign: str, place: str, ranks: int, expected: str) -> None:
    """Send the signal there, check what is left, resume, compare."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        arguments, fault = run_flags(folder), f"{sign}:{place}:{PLACES[place]}{':parent' if ranks > 1 else ''}"
        output = finish(start(arguments, ranks, fault), code=min(1, ranks - 1))  # torchrun ends with 1 after a signal
        assert "stopped after step" in output and output.count("Traceback") == (ranks > 1), output  # torchrun's own
        step = last_step(folder)
        assert checkpoint_steps(folder)[-1] == step, f"{checkpoint_steps(folder)} but step {step} was finished"
        if place in ("validation", "hellaswag"):  # cut short: what it would have said is not there yet
            assert f"passes of {place}: {PLACES[place]}\n" in output or ranks > 1, output[-300:]  # and none after it
            assert {"validation": "val"}.get(place, place) not in evaluated(folder, step)
        finish(start(arguments, ranks))
        assert digest(folder) == expected, f"{sign} in {place} at {ranks} ranks: the resumed run differs"


def signals(ranks: int = 1, signs=("TERM", "INT"), places=tuple(PLACES)) -> list[Row]:
    """Each signal in each place -> lines for docs/faults.md."""
    rows = []
    with tempfile.TemporaryDirectory() as home:
        expected = whole_digest(Path(home) / "whole", ranks)
    for sign in signs:
        for place in places:
            stop_and_resume(sign, place, ranks, expected)
        what = "torchrun" if ranks > 1 else "the process"
        rows.append(Row(f"SIG{sign} to {what} in {', '.join(WORDS[place] for place in places)}; {ranks} rank"
                        f"{'s' * (ranks > 1)}", len(places),
                        "each time a checkpoint of the last finished step, exit code "
                        f"{'0' if ranks == 1 else '1 of torchrun itself'}, resumed to the same sha256"))
    return rows


def one_rank_alone() -> list[Row]:
    """SIGTERM to rank 1 and to nobody else: both ranks agree to stop at the same step."""
    with tempfile.TemporaryDirectory() as home:
        expected = whole_digest(Path(home) / "whole", 2)
        folder = Path(home) / "run"
        arguments = run_flags(folder)
        assert "stopped after step" in finish(start(arguments, 2, "TERM:step:9:rank1"))
        assert checkpoint_steps(folder)[-1] == last_step(folder)
        finish(start(arguments, 2))
        assert digest(folder) == expected
    return [Row("SIGTERM to one of two workers", 1, "both stopped after the same step, resumed to the same sha256")]


def a_second_signal(places=tuple(PLACES), pairs=("TERM+TERM", "INT+TERM")) -> list[Row]:
    """Two signals in a row: the second ends the process by its default action, within the call that sent it."""
    with tempfile.TemporaryDirectory() as home:
        expected = whole_digest(Path(home) / "whole")
    for place in places:
        for signs in pairs:
            with tempfile.TemporaryDirectory() as home:
                arguments = run_flags(Path(home) / "run")
                output = finish(start(arguments, 1, f"{signs}:{place}:{PLACES[place]}"), code=-15)
                assert "stopping after what is under way" in output and "stopped after step" not in output
                finish(start(arguments))
                assert digest(Path(home) / "run") == expected, f"{signs} in {place}: the resumed run differs"
    return [Row(f"a second signal in the same places: {', '.join(pairs)}", len(pairs) * len(places),
                "ended at once, by the signal; resumed to the same sha256")]


def the_demo(places=("step", "validation", "sample", "write", "hellaswag")) -> list[Row]:
    """The real demo with HellaSwag: seconds from the signal to the exit."""
    slowest = {}
    for place in places:
        with tempfile.TemporaryDirectory() as home:
            extra = ["--hellaswag_every", "5", "--hellaswag_data", ROOT / "tests" / "hellaswag_examples.jsonl",
                     "--val_every", "5", "--sample_every", "5", "--checkpoint_every", "5"]
            process = start(["--out_dir", Path(home) / "run", "--data", ROOT / "input.txt", *extra], 1,
                            f"TERM:{place}:{30 if place == 'validation' else 3}", OMP_NUM_THREADS="2")
            wait_for(process, "stopping after what is under way")
            signalled = time.monotonic()
            assert "stopped after step" in finish(process, seconds=30)
            slowest[place] = time.monotonic() - signalled
            assert slowest[place] < 10, f"{slowest[place]:.1f} s to stop in {place}"
    return [Row(f"SIGTERM to the demo in {', '.join(WORDS[place] for place in places)}", len(places),
                f"exit after {', '.join(f'{seconds:.1f}' for seconds in slowest.values())} s")]

