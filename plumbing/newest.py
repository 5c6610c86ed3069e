"""The run that a command takes if none is named, and the runs whose names resemble one that does not exist.

    newest_first(name, root)   folders below log/ that hold such files, by the date of the newest
    resembling(name)           what a mistyped name may mean, as it has to be typed
"""
import difflib
import itertools
import os
from pathlib import Path

from plumbing.files import walk

ROOT = "log"  # where training writes, unless --out_dir says otherwise
CHECKPOINTS = "model_*.pt"
FILES = 200_000  # that are looked at: somebody may name a whole disk


def newest_first(name: str = CHECKPOINTS, root=ROOT) -> list[Path]:
    """List `root` and the folders below it that hold files of such a name, that with the newest of them first.

    Empty files do not count, nor do folders that cannot be read. One of transformers' is no run.
    """
    dates = {}
    for path in itertools.islice(walk(Path(root)), FILES):
        try:
            if path.match(name) and path.is_file() and (status := path.stat()).st_size:
                dates[path.parent] = max(dates.get(path.parent, (0, "")), (status.st_mtime_ns, path.name))
        except OSError:  # it has just been deleted
            continue
    runs = [folder for folder in dates if not (folder / "config.json").exists()]
    return sorted(runs, key=lambda folder: (dates[folder], folder), reverse=True)


def resembling(name: str, pattern: str = CHECKPOINTS) -> str | None:
    """Return the run below log/ that a name without a file or folder may mean: its last part, or nearly its name."""
    runs = [folder.as_posix() for folder in newest_first(pattern)]
    wanted = os.path.normpath(name)
    same = [run for run in runs if run.endswith(f"/{wanted}")]
    near = difflib.get_close_matches(wanted, [*runs, *map(os.path.basename, runs)], 1, 0.75)
    return next((run for run in runs for found in same[:1] or near if run == found or run.endswith(f"/{found}")), None)


def export_folder(source: str, state: dict | None) -> str:
    """Return the folder for a model if none is named, such as out_demo_180 for step 180 of log/demo."""
    name = f"{Path(state['path']).absolute().parent.name}_{state['step']}" if state else Path(source).absolute().name
    return f"out_{name}"
