"""A full disk and a read-only folder: a real full file system where one can be mounted, and a limit on file sizes."""
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT, flags, write_shards
from faults.common import Row, checkpoint_steps, finish, said, start, wait_for

LONG = {"max_steps": 400, "val_every": 40, "checkpoint_every": 20}
MOUNT = ["unshare", "--map-root-user", "--mount", "--kill-child"]


def can_mount() -> bool:
    """Whether this user may mount a file system in a name space of its own."""
    try:
        words = [*MOUNT, "mount", "-t", "tmpfs", "-o", "size=1m", "none", tempfile.gettempdir()]
        return subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        return False


def limited(what: str = "checkpoint", bytes: int = 300_000) -> list[Row]:
    """Files of this process cannot grow past `bytes` for a while: writes fail half-way, as on a full disk."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        process = start(flags(data=write_shards(Path(home) / "data"), out_dir=folder, **LONG))
        wait_for(process, "step  60/")
        process.send_signal(signal.SIGSTOP)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))
        before = checkpoint_steps(folder)
        process.send_signal(signal.SIGCONT)
        wait_for(process, "warning: cannot write" if what != "plot" else "warning: no loss.png")
        wait_for(process, f"step {before[-1] + 50:>3}/")
        process.send_signal(signal.SIGSTOP)
        assert checkpoint_steps(folder)[:2] == before, "the good checkpoints are not what they were"
        assert not list(folder.glob("*.tmp")), "a temporary file was left"
        seen = len(checkpoint_steps(folder)), said(process).count("\n")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        process.send_signal(signal.SIGCONT)
        output = finish(process)
        assert output.count("\n") > seen[1] and "finished: validation loss" in output
        assert checkpoint_steps(folder)[-1] == 400
    return [Row(f"no file may grow past {bytes:,} bytes, then all may again ({what})", 1,
                "a warning, training went on, the checkpoints before it whole, no temporary file, then written again")]


INSIDE = """
set -e
mount -t tmpfs -o size={size}m none {home}
cd {home}
cp -r {data} data
head -c {filler} /dev/zero > filler
({command} > {output} 2>&1; echo "exit code $?" >> {output}) &
{wait}
df -k . | tail -1 > {output}.df
ls -l run >> {output}.df
rm filler
wait
ls run >> {output}.ls
cp -r run {kept}
"""


def real(what: str) -> list[Row]:
    """A file system of its own that is full from the start or gets full in a checkpoint, and then has room again."""
    with tempfile.TemporaryDirectory() as outside:
        base = Path(outside)
        data, output, kept = write_shards(base / "data"), base / "output", base / "kept"
        (base / "home").mkdir()
        # a checkpoint has 10 MB, of which two fit; the log and the picture have to share what is left of the first MB
        filler = {"checkpoint": 20_000_000, "log": 31_000_000}[what]
        arguments = flags(data="data", out_dir="run", **LONG)
        script = INSIDE.format(
            size=34, home=base / "home", data=data, filler=filler, output=output, kept=kept,
            command=" ".join([sys.executable, str(ROOT / "train_gpt2.py"), *arguments]),
            wait=f"until grep -q 'step 150/' {output}; do sleep 0.05; done")
        subprocess.run([*MOUNT, "bash", "-c", script], check=True, timeout=180)
        text = output.read_text()
        assert "exit code 0" in text and "finished: validation loss" in text, text[-2000:]
        assert "warning: cannot write" in text and ("No space left" in text or "unexpected pos" in text), text
        assert ".tmp" not in (base / "output.df").read_text() + (base / "output.ls").read_text()
        assert checkpoint_steps(kept) == [380, 400]
        warned = text.count("warning: ")
    return [Row(f"a full file system ({what})", 1, f"{warned} warnings, training went on; once there was room the "
                "checkpoints were whole, and no temporary file was left")]


def read_only() -> list[Row]:
    """An output folder that cannot be written at all, and one that cannot be from some step on."""
    with tempfile.TemporaryDirectory() as home:
        arguments = flags(data=write_shards(Path(home) / "data"), out_dir="/proc/nowhere")
        output = finish(start(arguments), code=2)
        assert output.count("\n") == 1 and "error: cannot write to /proc/nowhere" in output
    return [Row("an output folder that cannot be written", 1, "refused in one line, exit code 2")]


def disk(full: bool = False) -> list[Row]:
    """All of it; the real file system where one can be mounted."""
    rows = limited()
    if full:
        rows += limited("plot", 30_000)
    if can_mount():
        rows += [*real("checkpoint"), *(real("log") if full else [])]
    elif full:
        rows.append(Row("a full file system", 0, "not tried: this user may not mount one"))
    return rows + read_only()
