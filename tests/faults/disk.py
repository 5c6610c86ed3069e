"""A full disk and a read-only folder: a real full file system where one can be mounted, and a limit on file sizes."""
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import ROOT, flags, write_shards
from faults.common import Row, checkpoint_steps, finish, start, wait_for

LONG = {"max_steps": 240, "val_every": 40, "checkpoint_every": 20}
MOUNT = ["unshare", "--map-root-user", "--mount", "--kill-child"]


def can_mount() -> bool:
    """Whether this user may mount a file system in a name space of its own."""
    try:
        words = [*MOUNT, "mount", "-t", "tmpfs", "-o", "size=1m", "none", tempfile.gettempdir()]
        return subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        return False


def limited(what: str) -> list[Row]:
    """One kind of file of the running process cannot grow past a size for a while: writes fail, as on a full disk."""
    import resource  # Linux has what is needed of it

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        process = start(flags(data=write_shards(Path(home) / "data"), out_dir=folder, **LONG), 1,
                        "record:picture:1" if what == "picture" else "")
        wait_for(process, "step  65/")  # between two checkpoints
        process.send_signal(signal.SIGSTOP)
        size = {"checkpoint": 300_000, "log": (folder / "log.jsonl").stat().st_size + 300, "picture": 30_000}[what]
        warning = {"checkpoint": ".pt, is the disk full?", "log": "log.jsonl: [Errno", "picture": "no loss.png"}[what]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        before = checkpoint_steps(folder)
        process.send_signal(signal.SIGCONT)
        wait_for(process, warning)
        if what != "log":  # else what the process prints would soon not fit its file either
            wait_for(process, "step 115/")
        process.send_signal(signal.SIGSTOP)
        assert checkpoint_steps(folder)[:2] == before, "the good checkpoints are not what they were"
        assert not list(folder.glob("*.tmp")), "a temporary file was left"
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        process.send_signal(signal.SIGCONT)
        output = finish(process)
        assert warning in output and "finished: validation loss" in output
        assert checkpoint_steps(folder) == [220, 240]
        steps = [line["step"] for line in read_log(folder)]
        assert steps[-1] == 240 and len(steps) >= 180 and (len(set(steps)) == 240 or what == "log")
    return [Row(f"no file may grow past {size:,} bytes, then all may again: the {what}", 1, "a warning, training went "
                "on, the checkpoints before it whole, no temporary file, then written again")]


def read_log(folder: Path) -> list[dict]:
    """The lines of steps in a log that may have torn ones; what follows a torn line is whole."""
    lines, torn = [], 0
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            torn += 1
    assert torn <= 1
    return [line for line in lines if line["kind"] == "train"]


INSIDE = """
set -e
mount -t tmpfs -o size=34m none {home}
cd {home}
cp -r {data} data
head -c 20000000 /dev/zero > filler
({command} > {output} 2>&1; echo "exit code $?" >> {output}) &
{wait}
for i in {{1..20}}; do ls -A run | tr '\n' ' '; echo; sleep 0.02; done > {output}.ls
rm filler
wait
ls -A run > {output}.end
cp -r run {kept}
"""


def real() -> list[Row]:
    """A file system of its own in which one checkpoint finds room, and then there is room for all."""
    with tempfile.TemporaryDirectory() as outside:
        base = Path(outside)
        data, output, kept = write_shards(base / "data"), base / "output", base / "kept"
        (base / "home").mkdir()
        script = INSIDE.format(
            home=base / "home", data=data, output=output, kept=kept,
            command=" ".join([sys.executable, str(ROOT / "train_gpt2.py"), *flags(data="data", out_dir="run", **LONG)]),
            wait=f"until grep -q 'step 150/' {output}; do sleep 0.05; done")
        subprocess.run([*MOUNT, "bash", "-c", script], check=True, timeout=180)
        text = output.read_text()
        assert "exit code 0" in text and "finished: validation loss" in text, text[-2000:]
        assert "is the disk full?" in text, text
        assert ".tmp" not in (base / "output.end").read_text()
        seen = (base / "output.ls").read_text().splitlines()  # while it is full: one may be there while it is written
        assert len(seen) == 20 and sum(".tmp" in names for names in seen) < 10, seen
        assert checkpoint_steps(kept) == [220, 240]
        warned = text.count("is the disk full?")
    return [Row("a full file system", 1, f"{warned} checkpoints failed with a warning and left no temporary file, "
                "training went on; once there was room they were whole")]


def read_only() -> list[Row]:
    """An output folder that cannot be made, and one that is there and read-only, where a file system can be mounted."""
    with tempfile.TemporaryDirectory() as home:
        base = Path(home)
        data, mounted = write_shards(base / "data"), base / "home"
        output = finish(start(flags(data=data, out_dir="/proc/nowhere")), code=2)
        assert output.count("\n") == 1 and "error: cannot write to /proc/nowhere" in output
        if can_mount():
            mounted.mkdir()
            words = " ".join([sys.executable, str(ROOT / "train_gpt2.py"), *flags(data=data, out_dir=mounted / "run")])
            script = f"mount -t tmpfs none {mounted}; mkdir {mounted}/run; mount -o remount,ro {mounted}; {words}"
            result = subprocess.run([*MOUNT, "bash", "-ec", script], text=True, capture_output=True)
            assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
            assert f"error: cannot write to {mounted}/run: Read-only file system" in result.stderr, result.stderr
    return [Row("an output folder that cannot be made, and one that is read-only", 1 + can_mount(),
                "refused in one line, exit code 2")]


def disk() -> list[Row]:
    """All of it; the real file system where one can be mounted."""
    rows = [row for what in ("checkpoint", "log", "picture") for row in limited(what)]
    if can_mount():
        rows += real()
    else:
        rows.append(Row("a full file system", 0, "not tried: this user may not mount one"))
    return rows + read_only()
