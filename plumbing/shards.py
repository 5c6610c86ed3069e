"""Token files: shards of fineweb.py, llm.c, modded-nanogpt and nanoGPT, and text files. Each is checked when opened.

    open_tokens(data, split, shuffle)    [(name, tokens), ...] for a folder of shards or a text file
    read_ahead(tokens, start, stop)      has the system read tokens before they are needed

Tokens are uint16 arrays. Those of shards are memory-mapped: opening ten billion of them reads a few pages.
"""
import contextlib
import hashlib
import mmap
from pathlib import Path

import numpy as np

from plumbing.files import DataError, check_inside
from plumbing.manifest import read_record

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
    from plumbing.tokenizer import encode

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file ({error}): save it as UTF-8, or name a folder of shards "
                        "instead") from error
    if not text.strip():
        raise DataError(f"{path} is empty: name a file with text")
    tokens = np.array(encode(text), dtype=np.uint16)
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


def has_shards(folder) -> bool:
    """Return whether a folder holds anything but what a try of fineweb.py leaves that wrote no shard."""
    folder = Path(folder)
    return folder.exists() and (not folder.is_dir() or any(
        not path.name.startswith((".", "progress")) for path in folder.iterdir()))


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
