"""A long run with everything that happens in one: memory, open files, threads and disk stay what they were."""
import json
import tempfile
import time
from pathlib import Path

from helpers import flags, write_shards
from faults.common import DUE, Row, finish, left_by, said, start


# glibc gives freed memory back at once and keeps the rest in one place: what is resident is what is in use
PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def soak(steps: int = 3000, settled: int = 300, share: float = 0.05, plain: bool = True) -> list[Row]:
    """Watch the run's process from outside at every checkpoint: what it has in the last third of the steps after the
    first `settled`, beside the first third; the most of files and threads, and the least of disk and memory, which are
    more while a step or a checkpoint is under way. Memory may differ by `share`. `plain`: with PLAIN_MALLOC, else as
    users have it, where what was freed stays resident.
    """
    import psutil

    with tempfile.TemporaryDirectory() as home:
        folder, seen = Path(home) / "run", []
        settings = {**DUE, "max_steps": steps, "val_every": 50, "sample_every": 50, "checkpoint_every": 25,
                    "hellaswag_every": 100, "n_layer": 1}
        process = start(flags(data=write_shards(Path(home) / "data"), out_dir=folder, **settings), 1,
                        "record:picture:1",  # a picture after each validation, from the first one on
                        fresh=True, **(PLAIN_MALLOC if plain else {}))
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.02)
            try:
                step = max((int(path.stem[6:]) for path in folder.glob("model_*.pt")), default=0)
                if step > (seen[-1][0] if seen else 0):
                    disk = sum(path.lstat().st_size for path in folder.iterdir()
                               if path.name not in ("log.jsonl", "loss.png") and path.suffix != ".tmp")
                    seen.append((step, watched.memory_info().rss, watched.num_fds(), watched.num_threads(), disk))
            except (psutil.Error, FileNotFoundError):  # it has just ended, or deleted a checkpoint
                continue
        finish(process)
        third = (steps - settled) // 3
        early = [each for each in seen if settled <= each[0] <= settled + third]
        late = [each for each in seen if each[0] > steps - third]
        assert len(early) > 3 and len(late) > 3, f"seen at {[each[0] for each in seen]}"
        (files, threads), (files_after, threads_after) = (
            [max(each[i] for each in part) for i in (2, 3)] for part in (early, late))
        (memory, disk), (memory_after, disk_after) = (
            [min(each[i] for each in part) for i in (1, 4)] for part in (early, late))
        memory, memory_after = memory / 2**20, memory_after / 2**20
        assert memory_after <= (1 + share) * memory, f"memory grew from {memory:.0f} to {memory_after:.0f} MiB"
        assert files_after <= files + 1 and threads_after <= threads, f"{files_after} files, {threads_after} threads"
        assert disk_after <= disk + 4096, f"the folder grew from {disk:,} to {disk_after:,} bytes"
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        per_step = (folder / "log.jsonl").stat().st_size / steps
        assert sum(line["kind"] == "train" for line in lines) == steps and not left_by(folder)
        warned = [line for line in said(process).splitlines() if "warning" in line and "epochs" not in line]
        assert not warned, warned  # it sees the same few tokens again and again
    return [Row(f"{steps:,} steps with validation, HellaSwag, samples, pictures and checkpoints; glibc "
                f"{'told to give back what is freed' if plain else 'as it is shipped, keeping what is freed'}", 1,
                f"from step {settled} to {settled + third:,} -> in the last {third}: the least "
                f"resident memory {memory:.0f} -> {memory_after:.0f} MiB, and disk beside log.jsonl and its picture "
                f"{disk / 2**20:.1f} -> {disk_after / 2**20:.1f} MiB, the most open files {files} -> "
                f"{files_after} and threads {threads} -> {threads_after}; log.jsonl grows by "
                f"{per_step:.0f} bytes a step")]
