"""Shards as fineweb.py writes them, and the manifest that says what they were made of.

    ShardWriter(path, size)    a shard that gets its name only once it is whole
    Manifest(folder)           the settings, and the hash of every shard
    verify(folder)             compares the shards with the manifest
"""
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np

from plumbing.files import DataError, atomic_write, check_inside, replace, sha256

NAME = re.compile(r"(.+)_(?:train|val)_\d{6}\.npy")  # of a shard
GIVEN = 1 << 24  # tokens that one shard gives another at a time


class ShardWriter:
    """Writes a .npy file of uint16, as np.save does, under a temporary name until it is whole.

    The data are hashed as they are written, with the header of a shard of `size` tokens, which most shards become. Call
    finish() or abandon() at the end.
    """

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size
        self.tokens = self.documents = 0
        self.stack = contextlib.ExitStack()  # closes the file and renames it; deletes it after an error
        self.file = self.stack.enter_context(atomic_write(path))
        self.file.write(npy_header(size))
        self.hash = hashlib.sha256(npy_header(size))

    def write(self, tokens: np.ndarray, documents: int) -> None:
        """Append tokens, in which `documents` documents begin."""
        data = tokens.astype("<u2", copy=False).data
        self.file.write(data)
        self.hash.update(data)
        self.tokens, self.documents = self.tokens + len(tokens), self.documents + documents

    def give(self, count: int, documents: int, other) -> None:
        """Keep the first `count` tokens, in which `documents` documents begin, and append the rest to another shard."""
        self.file.flush()
        begin = len(npy_header(self.size))
        tokens = np.memmap(self.file.name, "<u2", "r", begin, (self.tokens,))
        for start in range(count, self.tokens, GIVEN):
            other.write(tokens[start:start + GIVEN], 0)
        other.documents += self.documents - documents
        del tokens  # of the file that becomes shorter
        self.file.truncate(begin + 2 * count)
        self.tokens, self.documents = count, documents

    def finish(self) -> dict:
        """Put the shard on the disk under its own name, and return its record for the manifest."""
        with self.stack:
            if self.tokens != self.size:  # the last shard, as a rule: correct the header and hash the file anew
                self.file.seek(0)
                self.file.write(npy_header(self.tokens))
            self.file.flush()
            digest = self.hash.hexdigest() if self.tokens == self.size else sha256(Path(self.file.name))
            size = os.fstat(self.file.fileno()).st_size
        return {"name": self.path.name, "documents": self.documents, "tokens": self.tokens, "bytes": size,
                "sha256": digest}

    def abandon(self) -> None:
        """Delete the temporary file. Does nothing to a finished shard."""
        with contextlib.suppress(OSError), self.stack:
            raise OSError("abandoned")  # on which atomic_write deletes the file


def npy_header(tokens: int) -> bytes:
    """Return the header of a .npy file of uint16 tokens. numpy pads it to 128 bytes for any number of tokens."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    return header.getvalue()


class Manifest:
    """A record of a folder of shards: the settings, and the name, documents, tokens, bytes and sha256 of every shard.

    The file is progress.json while shards are missing, and manifest.json once all are there. If several machines write
    to one folder, `node` is part of these names. If a recorded shard is missing when the manifest is opened, it and all
    later ones are to be written again; those that are there are `stale` until then.
    """

    def __init__(self, folder, node: str = ""):
        self.folder = Path(folder)
        self.progress, self.finished = (self.folder / f"{name}{node}.json" for name in ("progress", "manifest"))
        path = self.progress if self.progress.exists() else self.finished
        values = read_record(path) if path.exists() else {}
        recorded = values.get("shards", [])
        self.shards = list(itertools.takewhile(self.is_whole, recorded))
        self.missing = [shard["name"] for shard in recorded[len(self.shards):]]
        self.stale = list(filter(self.is_whole, [*recorded[len(self.shards):], *values.get("stale", [])]))
        names = (shard["name"] for shard in [*recorded, *self.stale])
        self.prefix = next((match[1] for match in map(NAME.fullmatch, names) if match), "")  # of the shards' names
        settings = {key: value for key, value in values.items() if key not in ("shards", "stale")}
        self.values = settings if self.is_begun(values) else {}
        self.complete = bool(self.values) and path == self.finished and not self.missing

    def is_whole(self, shard: dict) -> bool:
        """Return whether a recorded shard is there and has the right size."""
        path = self.folder / shard["name"]
        return path.is_file() and path.stat().st_size == shard["bytes"]

    def is_begun(self, record: dict) -> bool:
        """Return whether a folder has any whole shard of a record: otherwise it was a failed try, and binds nobody."""
        return any(map(self.is_whole, [*record.get("shards", []), *record.get("stale", [])])) or (
            bool(record.get("download")) and any(self.folder.glob("*.bin")))

    def others(self) -> list[dict]:
        """Return the records of other nodes that have written shards to the folder."""
        paths = {*self.folder.glob("progress*.json"), *self.folder.glob("manifest*.json")}
        records = []
        for path in sorted(paths - {self.progress, self.finished}):
            with contextlib.suppress(FileNotFoundError):  # it has just finished, and renamed it
                records.append(read_record(path))
        return [record for record in records if self.is_begun(record)]

    def require(self, settings: dict) -> None:
        """Raise DataError if the folder was made with other settings, by this node or by another one."""
        for record in (*([self.values] if self.values else []), *self.others()):
            for name, value in settings.items():
                if record.get(name) != value and (name != "node_rank" or record is self.values):
                    raise DataError(f"{self.folder} was made with another {name}, {record.get(name)!r} not {value!r}: "
                                    "choose another --out, or use the earlier settings")

    def begin(self, values: dict) -> None:
        """Mark the folder as unfinished, before any shard is written."""
        self.values = values
        self._write()
        self.finished.unlink(missing_ok=True)

    def share_is_too_large(self) -> bool:
        """Return whether the first of two shards is for validation, and the second one is smaller."""
        sizes = [shard["tokens"] for shard in self.shards]
        return len(sizes) == 2 and sizes[1] < sizes[0] == self.values["shard_size"]

    def begin_again(self, **values) -> None:
        """Have all shards written again, with other settings."""
        self.shards, self.stale = [], [*self.shards, *self.stale]
        self.begin(self.values | values)

    def drop_last(self) -> None:
        """Have the last shard written again."""
        self.stale.append(self.shards.pop())

    def add(self, shard: dict) -> None:
        """Add the record of a finished shard."""
        self.shards.append(shard)
        self.stale = [each for each in self.stale if each["name"] != shard["name"]]
        self._write()

    def finish(self, **more) -> None:
        """Mark the folder as finished, and record the totals and what is given."""
        self.values |= {"documents": self.total("documents"), "tokens": self.total("tokens"), **more}
        for shard in self.stale:  # the source gives fewer than it did
            (self.folder / shard["name"]).unlink(missing_ok=True)
        self.stale = []
        self._write()
        replace(self.progress, self.finished)

    def drop_if_empty(self) -> None:
        """Delete progress.json if there is no shard, not even one that a kill left unrecorded, after an error."""
        is_begun = self.is_begun(self.values | {"shards": self.shards, "stale": self.stale})
        if not is_begun and not any(self.folder.glob("*.npy")):
            self.progress.unlink(missing_ok=True)

    def total(self, key: str) -> int:
        """Sum one number over the shards."""
        return sum(shard[key] for shard in self.shards)

    def _write(self) -> None:
        """Write progress.json."""
        with atomic_write(self.progress) as file:
            stale = {"stale": self.stale} if self.stale else {}
            file.write(json.dumps(self.values | {"shards": self.shards} | stale, indent=1).encode())


def read_record(path: Path) -> dict:
    """Read a manifest. Raises DataError if it is damaged."""
    check_inside(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kinds = [(values["node_rank"], int), (values["num_nodes"], int), (values["shards"], list)]
        for shard in [*values["shards"], *values.get("stale", [])]:
            kinds += [(shard["name"], str), (shard["sha256"], str)]
            kinds += [(number, int) for number in (shard["documents"], shard["tokens"], shard["bytes"])]
            kinds += [(number, int) for number in (*shard.get("next", (0, 0, 0)), 0)[:4]]
            if Path(shard["name"]).name != shard["name"] or len(shard.get("next", (0, 0, 0))) != 3:
                raise ValueError(f"bad record {shard}")
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise TypeError("a value is of the wrong type")
        return values
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}): prepare the folder again, with another --out") from error


def is_begun_with(folder, source: str) -> bool:
    """Return whether a manifest in a folder says that its shards are of this source."""
    for path in (*Path(folder).glob("progress*.json"), *Path(folder).glob("manifest*.json")):
        with contextlib.suppress(OSError):  # damaged, or another program's
            if read_record(path).get("source") == source:
                return True
    return False


def verify(folder, progress=lambda bytes: None) -> tuple[int, int]:
    """Compare the hash of each shard in a folder with its manifest. Returns (number of shards, number of tokens).

    Calls progress(bytes) after each shard. Raises DataError, with the names, if shards are damaged, missing or foreign.
    """
    folder = Path(folder)
    if any(folder.glob("progress*.json")) or not any(folder.glob("manifest*.json")):
        others = sorted(path.parent for path in folder.parent.glob("*/manifest*.json") if not folder.exists())
        hint = f"; did you mean --out {shlex.quote(str(others[0]))}?" if others else ""
        state = "is not finished" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {state}: run the command that makes it again{hint}")
    records = [read_record(path) for path in sorted(folder.glob("manifest*.json"))]
    shards = {shard["name"]: shard for record in records for shard in record["shards"]}
    nodes = {record["node_rank"] for record in records}
    own = {"node_rank", "source", "shards", "documents", "tokens", "skipped_rows"}  # what nodes may differ in
    for name in sorted(set().union(*records) - own):
        if any(record.get(name) != records[0].get(name) for record in records):
            raise DataError(f"{folder}: the nodes differ in {name}: give each the same settings and source")
    wrong = [f"node {node} has not finished" for node in range(records[0]["num_nodes"]) if node not in nodes]
    wrong += [f"{path.name} is in no manifest" for path in sorted(folder.iterdir())
              if path.suffix in (".npy", ".bin") and path.name not in shards]
    for name, shard in shards.items():
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256(folder / name) != shard["sha256"]:
            wrong.append(f"{name} is damaged")
        progress(shard["bytes"])
    if wrong:
        raise DataError(f"{folder}: {', '.join(wrong)}: delete what is damaged or foreign, then run the command that "
                        "made the folder again")
    return len(shards), sum(shard["tokens"] for shard in shards.values())
