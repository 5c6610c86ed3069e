"""Token files: the shards of fineweb.py, llm.c, modded-nanogpt and nanoGPT, and text files, checked as they open.

    open_tokens(data, split, shuffle)    [(name, tokens), ...] of a folder of shards or of a text file
    announce(tokens, start, stop)        reads ahead
    ShardWriter(path, size)              a shard that has its name only once it is whole
    Manifest(folder)                     what the shards in a folder were made of, and their hashes
    verify(folder)                       compares the shards with it

Tokens are uint16 arrays, memory-mapped where they come from shards: opening ten billion of them reads a few pages.
"""
import contextlib
import hashlib
import io
import itertools
import json
import mmap
import os
from pathlib import Path

import numpy as np

from plumbing.files import DataError, check_inside, open_new, replace, sha256

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT"  # what fineweb.py reads


def open_shard(path: Path) -> np.ndarray:
    """One shard -> its tokens, a memory-mapped uint16 array; DataError where it is not what its name says.

    .npy: as numpy writes it. .bin: llm.c's, 256 int32 of header (20240520, version 1, number of tokens), then tokens;
    train.bin and val.bin without that header: nanoGPT's, tokens alone.
    """
    check_inside(path)
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                if file.read(6) != b"\x93NUMPY":
                    raise ValueError("it does not start as .npy files do")
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise ValueError(f"it holds {tokens.dtype} of shape {tokens.shape}, not one row of uint16")
            if path.stat().st_size != tokens.offset + tokens.nbytes:
                raise ValueError("its size is not what its header says")
            return tokens
        header = np.fromfile(path, dtype=np.int32, count=256)
        if header.size and header[0] == 20240520:
            if header[1:2] != 1:
                raise ValueError("its header is not of version 1, GPT-2 tokens in uint16")
            if header.size < 256 or path.stat().st_size != 1024 + 2 * int(header[2]):
                raise ValueError("its size is not what its header says")
            return np.memmap(path, dtype=np.uint16, mode="r", offset=1024)
        if path.name not in ("train.bin", "val.bin"):
            raise ValueError("it does not start with the magic number 20240520")
        return np.memmap(path, dtype=np.uint16, mode="r")
    except Exception as error:  # numpy's parser of headers lets through what Python's own raises
        raise DataError(f"shard {path} cannot be used: {error}: prepare it again") from error


def read_text(path: Path, split: str) -> np.ndarray:
    """A UTF-8 text file -> the tokens of one split, uint16: the last tenth is val, the rest train."""
    from plumbing.tokenizer import gpt2_encoding

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file ({error}): save it as UTF-8, or name a folder of shards "
                        "instead") from error
    tokens = np.array(gpt2_encoding().encode_ordinary(text), dtype=np.uint16)
    boundary = len(tokens) - len(tokens) // 10
    return tokens[:boundary] if split == "train" else tokens[boundary:]


def open_tokens(data, split: str, shuffle: bool = False) -> list[tuple[str, np.ndarray]]:
    """(name, tokens) of every shard of a split, in file-name order, checked; DataError where there is none.

    `shuffle` tells the system that reads will jump about: it then fetches a window's 4 kB, not megabytes ahead of it.
    """
    data = Path(data)
    if data.is_file():
        return [(f"{data} ({split})", read_text(data, split))]
    if not data.is_dir():
        raise DataError(f"no data {str(data)!r}: --data takes a folder of token shards or a text file")
    if unfinished := next(data.glob("progress*.json"), None):
        raise DataError(f"the shards in {str(data)!r} are not all there: give the fineweb.py command that makes them "
                        f"again, or delete {unfinished.name} to train on those that are")
    paths = sorted(path for path in data.iterdir()
                   if path.suffix in (".npy", ".bin") and split in path.name and not path.name.startswith("."))
    if not paths:
        raise DataError(f"no {split} shards in {str(data)!r}: run python fineweb.py, or name a folder of .npy or .bin "
                        f"files with {split!r} in their names")
    for path in paths:
        if "train" in path.name and "val" in path.name:
            raise DataError(f"shard {path} has both 'train' and 'val' in its name: rename it")
    check_manifests(data)
    found = [(str(path), open_shard(path)) for path in paths]
    for _, tokens in found:
        if shuffle and hasattr(mmap, "MADV_RANDOM") and isinstance(tokens.base, mmap.mmap):
            tokens.base.madvise(mmap.MADV_RANDOM)
    return found


def announce(tokens: np.ndarray, start: int, stop: int) -> None:
    """Have the system read tokens[start:stop] of a mapped shard from the disk ahead of time; returns at once."""
    if isinstance(tokens.base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        offset = tokens.offset % mmap.ALLOCATIONGRANULARITY  # of the first token within the mapping
        first, end = (offset + position * tokens.itemsize for position in (start, stop))
        first -= first % mmap.PAGESIZE
        with contextlib.suppress(OSError):  # it is only a hint
            tokens.base.madvise(mmap.MADV_WILLNEED, first, min(end, len(tokens.base)) - first)


def check_manifests(folder: Path) -> None:
    """DataError where a shard that a manifest of fineweb.py records is not there or has another size."""
    for manifest in sorted(folder.glob("manifest*.json")):
        recorded = []
        with contextlib.suppress(OSError):  # another program's, or damaged: `fineweb.py --verify` will tell
            recorded = read_record(manifest)["shards"]
        for shard in recorded:
            path = folder / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise DataError(f"shard {path} is {'damaged' if path.exists() else 'missing'}: give the fineweb.py "
                                "command that made the folder again, or, to train on what is there, delete "
                                f"{manifest.name}")


def describe(data, val_shards: list[np.ndarray], val_tokens: int) -> dict:
    """What a run's log says of its data: the manifest's source and commit, if any, and the hash of what is validated.

    `val_shards` are the tokens of the validation split, of which the first `val_tokens` count.
    """
    values = {}
    for manifest in sorted(Path(data).glob("manifest*.json"))[:1]:
        with contextlib.suppress(OSError):  # another program's, or another person's
            values = read_record(manifest)
    hashed, left = hashlib.sha256(), val_tokens
    for tokens in val_shards:
        hashed.update(np.ascontiguousarray(tokens[:left], dtype="<u2").data)
        left -= min(left, len(tokens))
    return {"source": values.get("source") or values.get("download"), "revision": values.get("revision"),
            "val_tokens": val_tokens - left, "val_sha256": hashed.hexdigest()}


class ShardWriter:
    """A .npy file of uint16 as np.save writes it, under a temporary name until it is whole.

    It is hashed while it is written, as the shard of `size` tokens that it is expected to become.
    """

    def __init__(self, path: Path, size: int):
        self.path, self.temporary, self.size = path, path.with_name(path.name + ".tmp"), size
        self.tokens = self.documents = 0
        self.file = open_new(self.temporary)
        self.file.write(npy_header(size))
        self.hash = hashlib.sha256(npy_header(size))

    def write(self, tokens: np.ndarray, documents: int) -> None:
        """Append tokens, among which so many documents begin."""
        data = tokens.astype("<u2", copy=False).data
        self.file.write(data)
        self.hash.update(data)
        self.tokens, self.documents = self.tokens + len(tokens), self.documents + documents

    def finish(self) -> dict:
        """Give the shard its name once all of it is on the disk -> its record for the manifest."""
        if self.tokens != self.size:
            self.file.seek(0)
            self.file.write(npy_header(self.tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        record = {"name": self.path.name, "documents": self.documents, "tokens": self.tokens,
                  "bytes": self.temporary.stat().st_size,
                  "sha256": self.hash.hexdigest() if self.tokens == self.size else sha256(self.temporary)}
        replace(self.temporary, self.path)
        return record

    def abandon(self) -> None:
        """Leave nothing behind; does nothing to a finished shard."""
        with contextlib.suppress(OSError):
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def npy_header(tokens: int) -> bytes:
    """The header of a .npy file of so many uint16; numpy pads it to the same 128 bytes for any number."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    return header.getvalue()


class Manifest:
    """What a folder of shards is made of: settings, and of every shard its name, documents, tokens, bytes and sha256.

    It is progress.json while shards are missing and manifest.json when all are there. `node` is put into these names
    where several machines write to one folder. Opening it drops the records from the first shard on that is not there.
    """

    def __init__(self, folder, node: str = ""):
        self.folder = Path(folder)
        self.progress, self.finished = (self.folder / f"{name}{node}.json" for name in ("progress", "manifest"))
        path = self.progress if self.progress.exists() else self.finished
        self.values = read_record(path) if path.exists() else {}
        recorded = self.values.pop("shards", [])
        self.shards = list(itertools.takewhile(self.is_whole, recorded))
        self.missing = [shard["name"] for shard in recorded[len(self.shards):]]
        self.complete = bool(self.values) and path == self.finished and not self.missing

    def is_whole(self, shard: dict) -> bool:
        """Whether a recorded shard is there and of the right size."""
        path = self.folder / shard["name"]
        return path.is_file() and path.stat().st_size == shard["bytes"]

    def require(self, settings: dict) -> None:
        """DataError where the folder was made with other settings, by this node or by another one."""
        for path in (*self.folder.glob("progress*.json"), *self.folder.glob("manifest*.json")):
            try:
                record = read_record(path)
            except FileNotFoundError:
                continue  # another node has just finished and renamed it
            for name, value in settings.items():
                if record.get(name) != value and (name != "node_rank" or path in (self.progress, self.finished)):
                    raise DataError(f"{self.folder} was made with another {name}, {record.get(name)!r} not {value!r}: "
                                    "choose another --out, or the settings of before")

    def begin(self, values: dict) -> None:
        """Record that shards are missing, before any is written."""
        self.values = values
        self._write()
        self.finished.unlink(missing_ok=True)

    def add(self, shard: dict) -> None:
        """Record a shard that is there."""
        self.shards.append(shard)
        self._write()

    def finish(self) -> None:
        """Record that all shards are there."""
        self.values |= {"documents": self.total("documents"), "tokens": self.total("tokens")}
        self._write()
        replace(self.progress, self.finished)

    def total(self, key: str) -> int:
        """The sum of one number over the shards."""
        return sum(shard[key] for shard in self.shards)

    def _write(self) -> None:
        """progress.json, at any instant the old one or the new one."""
        temporary = self.progress.with_name(self.progress.name + ".tmp")
        with open_new(temporary) as file:
            file.write(json.dumps(self.values | {"shards": self.shards}, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, self.progress)


def read_record(path: Path) -> dict:
    """The contents of a manifest; DataError where it is damaged."""
    check_inside(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kinds = [(values["node_rank"], int), (values["num_nodes"], int), (values["shards"], list)]
        for shard in values["shards"]:
            kinds += [(shard["name"], str), (shard["sha256"], str)]
            kinds += [(number, int) for number in (shard["documents"], shard["tokens"], shard["bytes"])]
            kinds += [(number, int) for number in (*shard.get("next", (0, 0, 0)), 0)[:4]]
            if Path(shard["name"]).name != shard["name"] or len(shard.get("next", (0, 0, 0))) != 3:
                raise ValueError(f"bad record {shard}")
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise TypeError("a value is of the wrong kind")
        return values
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}): prepare the folder again, with another --out") from error


def verify(folder, progress=lambda bytes: None) -> tuple[int, int]:
    """(shards, tokens) of a folder, each shard's hash compared with the manifest; DataError names what differs.

    `progress` is called with the size of each shard done.
    """
    folder = Path(folder)
    if any(folder.glob("progress*.json")) or not any(folder.glob("manifest*.json")):
        raise DataError(f"{folder} is not finished: give the command that makes it again")
    records = [read_record(path) for path in sorted(folder.glob("manifest*.json"))]
    shards = {shard["name"]: shard for record in records for shard in record["shards"]}
    nodes = {record["node_rank"] for record in records}
    for name in sorted(set().union(*records) - {"node_rank", "shards", "documents", "tokens"}):
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
        raise DataError(f"{folder}: {', '.join(wrong)}: delete what is damaged or foreign, then give the command that "
                        "made the folder again")
    return len(shards), sum(shard["tokens"] for shard in shards.values())
