"""What is shown while something takes long, on a terminal, in a log file, in a notebook.

    pytest tests/test_progress.py
"""
import builtins
import io
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, python_path

from plumbing import progress

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a terminal to look at")


def screen(written: str) -> list[str]:
    """What a terminal shows of this: \\r goes back to the start of the line, ESC[A one line up."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row >= len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + len(part):]
            column += len(part)
    return [line.rstrip() for line in lines]


def in_terminal(code: str, columns: int = 100, **environment) -> str:
    """Run code in a process whose stdout and stderr are a terminal; return all that it has written there."""
    termios = pytest.importorskip("termios")

    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24 * (columns > 0), columns))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
                               env={**os.environ, "PYTHONPATH": python_path(), **environment})
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 4096):
            written += block
    except OSError:  # Linux says so at the end
        pass
    os.close(ours)
    assert process.wait(30) == 0, written
    return written.decode()


def wait_for(text: str, file=None) -> None:
    """Wait until `file`, or the captured stderr, holds a text."""
    end = time.monotonic() + 60
    while text not in (file or sys.stderr).getvalue():
        assert time.monotonic() < end, f"no {text!r} in {(file or sys.stderr).getvalue()!r}"
        time.sleep(0.01)


QUICK = "import time\nfrom plumbing import cli, progress\nprogress.DELAY, progress.REDRAW = 0.2, 0.05\n"


@pytest.mark.slow
def test_bars_and_printed_lines_do_not_garble_one_another_on_a_terminal():
    """One bar within another, lines between; at the end only the lines are there."""
    written = in_terminal(QUICK + "cli.print0('first')\n"
                          "for i in progress.track(range(6), 'validation', 'batches'):\n"
                          "    with progress.busy('compiling'):\n"
                          "        time.sleep(0.4)\n"
                          "        cli.print0(f'line {i} that is printed amid them')\n"
                          "        time.sleep(0.1)\n"
                          "cli.print0('last')\n")
    assert re.search(r"validation:  \d\d%\|.*\| [1-5]/6 \[", written) and "compiling: 00:00" in written
    shown = [line for line in screen(written) if line]
    assert shown == ["first", *(f"line {i} that is printed amid them" for i in range(6)), "last"]


@pytest.mark.slow
def test_a_bar_moves_while_a_single_call_takes_long_and_counts_from_its_start():
    written = in_terminal(QUICK + "progress.DELAY = 1.2\n"
                          "with progress.busy('reading a large file'):\n    time.sleep(2.6)")
    seconds = [int(found) for found in re.findall(r"reading a large file: 00:(\d\d)", written)]
    assert 1 <= seconds[0] < seconds[-1] and not any(screen(written))


def test_a_terminal_that_does_not_tell_its_size_has_bars_too():
    assert "waiting: 00:00" in in_terminal(QUICK + "with progress.busy('waiting'):\n    time.sleep(0.6)", columns=0)


def test_what_is_quick_shows_nothing():
    assert in_terminal(QUICK + "progress.DELAY = 9\n"
                       "for i in progress.track(range(3), 'x', 'y'):\n    pass\n"
                       "with progress.busy('z'):\n    time.sleep(0.1)") == ""


def test_without_tqdm_there_are_lines():
    hidden = "import sys\nsys.modules['tqdm'] = None\n"  # an import of it fails
    written = in_terminal(hidden + QUICK + "progress.LINE_EVERY = 0.3\n"
                          "with progress.counted('training', 40, 'micro-steps') as count:\n"
                          "    count(10)\n    time.sleep(0.7)\n")
    lines = [line for line in screen(written) if line]
    assert len(lines) >= 2
    for line in lines:
        passed, left = map(int, re.fullmatch(r"training: 10 of 40 micro-steps, 0:0(\d), 0:0(\d) left", line).groups())
        assert 3 * passed - 2 <= left <= 3 * passed + 3  # seconds, of which fractions are not shown


def test_a_log_file_gets_a_line_each_half_minute_and_no_signs_of_a_terminal(monkeypatch, capsys):
    assert progress.LINE_EVERY == 30 and progress.DELAY == 2
    monkeypatch.setattr(progress, "LINE_EVERY", 0.2)
    for i in progress.track(range(3), "validation", "batches"):
        wait_for(f"validation: {i} of 3 batches, 0:")
    with progress.busy("compiling the model"):
        wait_for("compiling the model: 0:")
    bar = progress.progress_bar(10, 0, "B")
    bar.update(10)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"validation: 0 of 3 batches, 0:\d\d", lines[0])
    assert lines[-1].startswith("100%|") and all(lines)
    assert not any(sign in "".join(lines) for sign in "\r\x1b")


def test_other_ranks_show_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    with progress.busy("compiling"):
        time.sleep(0.2)
    progress.progress_bar(10, 0, "B").close()
    assert capsys.readouterr().err == ""


def test_a_notebook_has_bars_where_it_prints(monkeypatch):
    """It is no terminal, and keeps stdout and stderr apart: on stdout, bars and lines are in order."""
    output = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(progress, "DELAY", 0.1)
    monkeypatch.setattr(progress, "REDRAW", 0.05)
    from plumbing.cli import print0

    with progress.busy("compiling"):
        wait_for("compiling: 00:", output)
        print0("a line")
    print0("another")
    assert [line for line in screen(output.getvalue()) if line] == ["a line", "another"]


def test_no_thread_stays_after_an_error_or_a_break(monkeypatch):
    before = threading.active_count()
    for _ in progress.track(range(3), "x", "y"):
        break
    with pytest.raises(ZeroDivisionError):
        for i in progress.track(iter([0]), "x", "y"):
            1 / i
    with pytest.raises(ZeroDivisionError), progress.busy("x"):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_where_no_thread_can_be_started_work_goes_on(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(progress.track(range(3), "x", "y")) == [0, 1, 2]


def test_training_needs_no_tqdm_to_show_what_is_under_way(monkeypatch, capsys):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest, **more: real(
        "no_such_module" if name == "tqdm" else name, *rest, **more))
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    with progress.busy("training"):
        wait_for("training: 0:")
