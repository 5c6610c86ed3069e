"""Files with one JSON object per line, as HellaSwag's examples come and its results are written."""
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from plumbing.cli import UserError
from plumbing.files import atomic_write


def read_jsonl(path) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) for each line of a .jsonl file in UTF-8, which may be compressed with gzip.

    Blank lines are skipped. Raises UserError, naming the line, if one is not JSON, and if the file cannot be read.
    """
    number = 0
    try:
        with open(path, "rb") as raw:
            lines = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}, is not JSON in UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def check_new_file(path, remedy: str) -> None:
    """Make the folder for a new file. Raises UserError, before any work is done, if it cannot be written there."""
    folder = Path(path).parent
    if os.path.lexists(path):
        raise UserError(f"{path} already exists: {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}: {remedy}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: {remedy}")


def write_jsonl(path, rows: Iterable[dict], remedy: str) -> None:
    """Write one JSON object per line. Raises UserError, and leaves no file, if that fails."""
    try:
        with atomic_write(Path(path)) as file:
            for row in rows:
                file.write(json.dumps(row).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: {remedy}") from error
