"""Token files: shards of fineweb.py, llm.c, modded-nanogpt and nanoGPT, and text files. Each is checked when opened.

    open_tokens(data, split, shuffle)    [(name, tokens), ...] for a folder of shards or a text file
    read_ahead(tokens, start, stop)      has the system read tokens before they are needed
    ShardWriter(path, size)              a shard that gets its name only once it is whole
    Manifest(folder)                     what the shards in a folder were made of, and their hashes
    verify(folder)                       compares the shards with the manifest

Tokens are uint16 arrays. Those of shards are memory-mapped: opening ten billion of them reads a few pages.
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

from plumbing.files import DataError, atomic_write, check_inside, replace, sha256

# the source that fineweb.py reads by default
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT"


def open_shard(path: Path) -> np.ndarray:
    """Open one shard as a memory-mapped uint16 array.

    A .npy file is what np.save writes. A .bin file is llm.c's: a header of 256 int32 (20240520, version 1, number of
    tokens), then the tokens. train.bin and val.bin may also be nanoGPT's: tokens without a header. Raises DataError if
    the file is anything else.
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
    except Exception as error:  # numpy passes on whatever Python's parser raises on a bad header
        raise DataError(f"shard {path} cannot be used: {error}: prepare it again") from error


def read_text(path: Path, split: str) -> np.ndarray:
    """Encode a UTF-8 text file and return the uint16 tokens of one split: the last tenth is val, the rest train."""
    from plumbing.tokenizer import gpt2_encoding

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file ({error}): save it as UTF-8, or name a folder of shards "
                        "instead") from error
    if not text.strip():
        raise DataError(f"{path} is empty: name a file with text")
    tokens = np.array(gpt2_encoding().encode_ordinary(text), dtype=np.uint16)
    boundary = len(tokens) - len(tokens) // 10
    return tokens[:boundary] if split == "train" else tokens[boundary:]


def open_tokens(data, split: str, shuffle: bool = False) -> list[tuple[str, np.ndarray]]:
    """Return (name, tokens) for every shard of a split, in file-name order. `data` may also be a text file.

    `shuffle` tells the system that reads will be in random order, so that it fetches only a window's 4 kB and not the
    megabytes after it. Raises DataError if there are no shards, or if one is bad or missing.
    """
    data = Path(data)
    if data.is_file():
        return [(f"{data} ({split})", read_text(data, split))]
    if not data.is_dir():
        raise DataError(f"no data {str(data)!r}: --data takes a folder of token shards or a text file")
    if unfinished := next(data.glob("progress*.json"), None):
        raise DataError(f"the shards in {str(data)!r} are not all there: run the same fineweb.py command again, "
                        f"or delete {unfinished.name} to train on those that are")
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


def require_windows(n_windows: int, config, split: str) -> None:
    """Raise DataError if a split has no window of a TrainConfig's length."""
    if n_windows == 0:
        raise DataError(f"the {split} split of {config.data!r} is shorter than one window of {config.sequence_length} "
                        "+ 1 tokens: use more data or a smaller --sequence_length")


def check_samples(names: list[str], shards: list[np.ndarray], vocab_size: int) -> str:
    """Check a sample of the tokens of each shard, as reading all would take minutes; or all, if it is a small one.

    Returns a hash of the sample and of the number of tokens, by which a resumed run recognizes its data.
    """
    hashed = hashlib.sha256()
    for name, shard in zip(names, shards):
        hashed.update(f"{len(shard)} ".encode())
        size = len(shard) if len(shard) <= 2**20 else 1024
        for start in sorted({0, (len(shard) - size) // 2, len(shard) - size}):
            tokens = shard[start:start + size]
            check_tokens(tokens, name, vocab_size)
            hashed.update(np.ascontiguousarray(tokens, dtype="<u2").data)
    return hashed.hexdigest()


def check_tokens(tokens: np.ndarray, name: str, vocab_size: int) -> None:
    """Raise DataError if a token is not in the vocabulary."""
    if tokens.size and tokens.max() >= vocab_size:
        raise DataError(f"shard {name} holds the token {tokens.max()}, the vocabulary ends at {vocab_size - 1}: "
                        "prepare it again with the GPT-2 encoding")


def fingerprint(train_loader, val_loader) -> dict:
    """Describe the data of a run, so that it recognizes them when it is resumed."""
    return {"n_windows": train_loader.n_windows, "sha256": train_loader.sha256, "val_sha256": val_loader.sha256}


def check_same(state: dict, train_loader, val_loader) -> None:
    """Raise DataError if the data are not those of a checkpoint's fingerprint; older ones have no hashes in it."""
    before, now = state["data"], fingerprint(train_loader, val_loader)
    remedy = (f"--data was {state['train_config'].get('data')}: restore it, or choose another --out_dir for a new run "
              "without --branch_from")
    if before.get("n_windows") not in (None, now["n_windows"]):
        raise DataError(f"the data have {now['n_windows']} windows to train on, they had {before['n_windows']} when "
                        f"the run began: {remedy}")
    for key, split in (("sha256", "training"), ("val_sha256", "validation")):
        if before.get(key) not in (None, now[key]):
            raise DataError(f"the {split} data have other tokens than when the run began: {remedy}")


def read_ahead(tokens: np.ndarray, start: int, stop: int) -> None:
    """Ask the system to read tokens[start:stop] of a mapped shard from the disk, and return at once."""
    if isinstance(tokens.base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        offset = tokens.offset % mmap.ALLOCATIONGRANULARITY  # of the first token, within the mapping
        first, end = (offset + position * tokens.itemsize for position in (start, stop))
        first -= first % mmap.PAGESIZE
        with contextlib.suppress(OSError):  # it is only a hint
            tokens.base.madvise(mmap.MADV_WILLNEED, first, min(end, len(tokens.base)) - first)


def check_manifests(folder: Path) -> None:
    """Raise DataError if a shard in a manifest of fineweb.py is missing or has another size."""
    for manifest in sorted(folder.glob("manifest*.json")):
        recorded = []
        with contextlib.suppress(OSError):  # another program's, or damaged, which `fineweb.py --verify` reports
            recorded = read_record(manifest)["shards"]
        for shard in recorded:
            path = folder / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                problem = "damaged" if path.exists() else "missing"
                raise DataError(f"shard {path} is {problem}: run the fineweb.py command that made the folder again, "
                                f"or delete {manifest.name} to train on the shards that are there")


def describe(data, val_shards: list[np.ndarray], val_tokens: int) -> dict:
    """Describe the data of a run for its log: source and commit from the manifest, if any, and the validation hash.

    `val_shards` are the tokens of the validation split; the first `val_tokens` of them are hashed.
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
    to one folder, `node` is part of these names. If a recorded shard is missing, its record and all later ones are
    dropped when the manifest is opened.
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
        """Return whether a recorded shard is there and has the right size."""
        path = self.folder / shard["name"]
        return path.is_file() and path.stat().st_size == shard["bytes"]

    def require(self, settings: dict) -> None:
        """Raise DataError if the folder was made with other settings, by this node or by another one."""
        for path in (*self.folder.glob("progress*.json"), *self.folder.glob("manifest*.json")):
            try:
                record = read_record(path)
            except FileNotFoundError:
                continue  # another node has just finished and renamed it
            for name, value in settings.items():
                if record.get(name) != value and (name != "node_rank" or path in (self.progress, self.finished)):
                    raise DataError(f"{self.folder} was made with another {name}, {record.get(name)!r} not {value!r}: "
                                    "choose another --out, or use the earlier settings")

    def begin(self, values: dict) -> None:
        """Mark the folder as unfinished, before any shard is written."""
        self.values = values
        self._write()
        self.finished.unlink(missing_ok=True)

    def add(self, shard: dict) -> None:
        """Add the record of a finished shard."""
        self.shards.append(shard)
        self._write()

    def finish(self) -> None:
        """Mark the folder as finished."""
        self.values |= {"documents": self.total("documents"), "tokens": self.total("tokens")}
        self._write()
        replace(self.progress, self.finished)

    def total(self, key: str) -> int:
        """Sum one number over the shards."""
        return sum(shard[key] for shard in self.shards)

    def _write(self) -> None:
        """Write progress.json."""
        with atomic_write(self.progress) as file:
            file.write(json.dumps(self.values | {"shards": self.shards}, indent=1).encode())


def read_record(path: Path) -> dict:
    """Read a manifest. Raises DataError if it is damaged."""
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
            raise TypeError("a value is of the wrong type")
        return values
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}): prepare the folder again, with another --out") from error


def verify(folder, progress=lambda bytes: None) -> tuple[int, int]:
    """Compare the hash of each shard in a folder with its manifest. Returns (number of shards, number of tokens).

    Calls progress(bytes) after each shard. Raises DataError, with the names, if shards are damaged, missing or foreign.
    """
    folder = Path(folder)
    if any(folder.glob("progress*.json")) or not any(folder.glob("manifest*.json")):
        raise DataError(f"{folder} is not finished: run the command that makes it again")
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
        raise DataError(f"{folder}: {', '.join(wrong)}: delete what is damaged or foreign, then run the command that "
                        "made the folder again")
    return len(shards), sum(shard["tokens"] for shard in shards.values())
