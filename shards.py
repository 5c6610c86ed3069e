"""Token files: the shards of fineweb.py, llm.c, modded-nanogpt and nanoGPT, and text files, checked as they open.

    open_tokens(data, split, shuffle)    [(name, tokens), ...] of a folder of shards or of a text file

Tokens are uint16 arrays, memory-mapped where they come from shards: opening ten billion of them reads a few pages.
"""
import mmap
from pathlib import Path

import numpy as np


class DataError(OSError):
    """Data that is not there or cannot be trained on; the message names the file and the remedy."""


def open_shard(path: Path) -> np.ndarray:
    """One shard -> its tokens, a memory-mapped uint16 array; DataError where it is not what its name says.

    .npy: as numpy writes it. .bin: llm.c's, 256 int32 of header (20240520, version 1, number of tokens), then tokens;
    train.bin and val.bin without that header: nanoGPT's, tokens alone.
    """
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
    from tokenizer import gpt2_encoding

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
    paths = sorted(path for path in data.iterdir()
                   if path.suffix in (".npy", ".bin") and split in path.name and not path.name.startswith("."))
    if not paths:
        raise DataError(f"no {split} shards in {str(data)!r}: it needs .npy or .bin files with {split!r} in the name")
    for path in paths:
        if "train" in path.name and "val" in path.name:
            raise DataError(f"shard {path} has both 'train' and 'val' in its name: rename it")
    found = [(str(path), open_shard(path)) for path in paths]
    for _, tokens in found:
        if shuffle and hasattr(mmap, "MADV_RANDOM") and isinstance(tokens.base, mmap.mmap):
            tokens.base.madvise(mmap.MADV_RANDOM)
    return found
