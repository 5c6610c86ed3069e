"""One file of tokens: checked when it is opened, then memory-mapped.

    open_shard(path)                          a Shard
    Shard                                     len(shard), and shard[start:stop], an array (n,) of uint16
    check_tokens(tokens, name, vocab_size)    refuses a token that is not in the vocabulary
    check_gpt2(windows, name)                 refuses what cannot be tokens of GPT-2's encoding

The file is mapped but not held open: a thousand shards need no descriptors. Its size and date are looked at before each
window is read, because to read a mapping of a file that has been cut ends the process with SIGBUS.
"""
import contextlib
import errno
import hashlib
import os
from pathlib import Path

import numpy as np

from plumbing.file_kinds import kind_by_bytes
from plumbing.files import DataError, check_inside, first_line
from plumbing.tokenizer import VOCAB_SIZE

HEADERS = {  # what llm.c's other files begin with
    20240801: "tokens of Llama 3, in uint32", 20240522: "HellaSwag, as llm.c prepares it",
    20240326: "weights of llm.c", 20240520: "tokens",
}
# the ids of " the", "," and ".": in English each is more than 2 % of the tokens
OTHER_ENCODINGS = {
    "GPT-NeoX's": (253, 13, 15), "RoBERTa's or OPT's": (5, 6, 4), "BERT's": (1996, 1010, 1012),
    "Llama 2's": (278, 29892, 29889), "Mistral's": (272, 28725, 28723), "T5's": (8, 6, 5),
}
# The third byte of files whose first two may be a token, such as 640, " time", which are those of a pickle
THIRD = {".gz": b"\x08", ".pkl": b"\x95}](c"}
SMALL, WINDOW = 2**20, 1024  # tokens: a shard that is sampled as a whole, and a window of a larger one's sample
PRINTABLE = bytes({*range(32, 127), *b"\t\n\r"})
# tokens of single bytes that text does not have: C0 and C1 in UTF-8, F5 to FF, and control characters
NOT_IN_TEXT = np.isin(np.arange(2**16), (124, 125, *range(177, 197), 199, 200, *range(202, 220)))


class Shard:
    """The tokens in a file, from byte `offset` on. If the file changes, its sample must still be what it was."""

    def __init__(self, path: Path, offset: int, count: int):
        self.path, self.offset, self.count = path, offset, count
        self.state, self.digest, self.tokens = self.stat(), None, None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, window: slice) -> np.ndarray:
        """Copy tokens. Raises DataError if they cannot be read or the file is not what it was when it was opened."""
        state = self.stat()
        if state != self.state:  # a new date alone is no reason to stop
            if state is None or digest(state[0], read_sample(self)) != self.digest:
                raise self.changed()
            self.state, self.tokens = state, None
        if self.tokens is None:
            self.tokens = self.map()
        return self.tokens[window].copy()

    def map(self) -> np.ndarray:
        """Map the tokens by PyTorch, which closes the file; or by numpy, which keeps it open, if it is too large."""
        import torch  # takes seconds to load, which fineweb.py does without

        skipped = self.offset // 2
        if skipped + self.count == 0:  # nothing can be mapped
            return np.empty(0, dtype=np.uint16)
        try:
            mapped = torch.from_file(
                os.fspath(self.path), shared=False, size=skipped + self.count, dtype=torch.uint16)
        except RuntimeError as error:
            self.read([(0, self.count and 1)])  # says what is wrong
            with contextlib.suppress(OSError, ValueError):  # PyTorch's counts as memory, of which there may be less
                return np.memmap(self.path, np.uint16, "r", self.offset, (self.count,))
            raise DataError(f"shard {self.path} cannot be mapped: {first_line(error)}") from error
        return mapped.numpy()[skipped:]

    def remember(self, sample: list[np.ndarray]) -> None:
        """Keep the hash of the sample, by which the tokens are known again if the date of the file changes."""
        self.digest = digest(self.state[0], sample) if self.state else None

    def read(self, windows: list[tuple[int, int]]) -> list[np.ndarray]:
        """Read tokens [start, stop) for each of the windows from the file as it is, without mapping it."""
        found = [np.empty(stop - start, dtype=np.uint16) for start, stop in windows]
        try:
            with open(self.path, "rb", buffering=0) as file:
                for (start, _), tokens in zip(windows, found):
                    left = memoryview(tokens.view(np.uint8))
                    file.seek(self.offset + 2 * start)
                    while left and (count := file.readinto(left)):
                        left = left[count:]
                    if left:
                        raise self.changed()
        except FileNotFoundError as error:
            raise self.changed() from error
        except DataError:
            raise
        except OSError as error:
            raise unreadable(self.path, error) from error
        return found

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the system to read tokens [start, stop) from the disk, and return at once."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), open(self.path, "rb", buffering=0) as file:  # it is only a hint
                os.posix_fadvise(file.fileno(), self.offset + 2 * start, 2 * (stop - start), os.POSIX_FADV_WILLNEED)

    def part(self, start: int, stop: int) -> "Shard":
        """Return tokens [start, stop) as a shard."""
        return Shard(self.path, self.offset + 2 * start, stop - start)

    def stat(self) -> tuple[int, int, int] | None:
        """Return what changes when the file is written or replaced; None if it is gone."""
        with contextlib.suppress(OSError):
            status = os.stat(self.path)
            return status.st_size, status.st_mtime_ns, status.st_ino

    def changed(self) -> DataError:
        """Return the error for a file that is not what it was."""
        what = "was changed" if self.path.exists() else "is gone or was moved"
        return DataError(f"shard {self.path} {what} while it was in use: restore it, and the same command continues "
                         "from the last checkpoint")


def read_sample(tokens: np.ndarray | Shard) -> list[np.ndarray]:
    """Read windows spread over a shard, and as the last ones its begin, middle and end; or a small one whole."""
    windows = [*more_windows(len(tokens)), *sample_windows(len(tokens))]
    if isinstance(tokens, Shard):
        return tokens.read(windows)
    return [tokens[start:stop] for start, stop in windows]


def digest(size: int, sample: list[np.ndarray]) -> bytes:
    """Return a hash of the size of a file and of a sample of its tokens."""
    hashed = hashlib.sha256(str(size).encode())
    for tokens in sample:
        hashed.update(tokens.data)
    return hashed.digest()


def sample_windows(count: int) -> list[tuple[int, int]]:
    """Return [(start, stop), ...]: begin, middle and end of a shard of `count` tokens, or all of it if it is small."""
    size = count if count <= SMALL else WINDOW
    return [(start, start + size) for start in sorted({0, (count - size) // 2, count - size})]


def more_windows(count: int) -> list[tuple[int, int]]:
    """Return [(start, stop), ...]: windows spread over a large shard of `count` tokens; none of a small one."""
    starts = np.linspace(0, count - WINDOW, 32).astype(int).tolist() if count > SMALL else []
    return [(start, start + WINDOW) for start in starts]


def open_shard(path: Path) -> Shard:
    """Open one shard.

    A .npy file is what np.save writes. A .bin file is llm.c's: a header of 256 int32 (20240520, version 1, number of
    tokens), then the tokens. train.bin and val.bin may also be nanoGPT's: tokens without a header. Raises DataError if
    the file is anything else.
    """
    check_inside(path)
    try:
        return Shard(path, *(find_npy(path) if path.suffix.lower() == ".npy" else find_bin(path)))
    except DataError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # numpy passes on whatever Python's parser raises on a bad header
        joint = "" if str(error).endswith(" else") else ":"
        raise DataError(f"shard {path} cannot be used: {error}{joint} prepare it again") from error


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a shard that the system does not let one read; the shard itself may be fine."""
    remedy = "check its permissions and the disk that it is on"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "raise the limit with ulimit -n 4096"
    return DataError(f"shard {path} cannot be read: {error.strerror or error}: {remedy}")


def find_npy(path: Path) -> tuple[int, int]:
    """Return (offset in bytes, number) of the tokens in a .npy file. Raises ValueError if it holds anything else."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head.startswith(b"\x93NUMPY"):
        raise ValueError(f"it does not start as .npy files do{seems(head)}")
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped only to read its header
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        wrong, name = f"it holds {tokens.dtype} of shape {tokens.shape}, not one row of uint16", repr(str(path))
        if tokens.dtype.kind in "iu":
            wrong += f": if they are GPT-2's, np.save({name}, np.load({name}).ravel().astype('uint16')), else"
        raise ValueError(wrong)
    if path.stat().st_size != tokens.offset + tokens.nbytes:
        raise ValueError("its size is not what its header says")
    return tokens.offset, len(tokens)


def find_bin(path: Path) -> tuple[int, int]:
    """Return (offset in bytes, number) of the tokens in a .bin file. Raises ValueError if it holds anything else."""
    with open(path, "rb") as file:
        head = file.read(1024)
    size, header = path.stat().st_size, np.frombuffer(head[:len(head) // 4 * 4], dtype="<i4")
    magic = int(header[0]) if header.size else 0
    if magic == 20240520:
        if header[1:2] != 1:
            raise ValueError("its header is not of version 1, GPT-2 tokens in uint16")
        if header.size < 256 or size != 1024 + 2 * int(header[2]):
            wide = header.size == 256 and size == 1024 + 4 * int(header[2])
            raise ValueError("its size is not what its header says" + wide * ", it seems to hold uint32")
        return 1024, int(header[2])
    if magic in HEADERS:
        raise ValueError(f"its header says that it holds {HEADERS[magic]}, not GPT-2 tokens in uint16")
    if path.name.lower() not in ("train.bin", "val.bin"):
        raise ValueError(f"it does not start with the magic number 20240520{seems(head)} (nanoGPT's files, which have "
                         "no header, must be named train.bin and val.bin)")
    kind = kind_by_bytes(head)
    if kind in THIRD and not (head[2:3] in THIRD[kind] and ends_as(kind, path)):
        kind = ""  # its two bytes are a token
    if kind or (len(head) > 64 and not head.translate(None, PRINTABLE)):
        raise ValueError(f"it seems to be a file of another kind, {kind or 'plain text'}")
    if size % 2:
        raise ValueError(f"its size of {size:,} bytes is odd, while tokens in uint16 have two bytes each")
    return 0, size // 2


def ends_as(kind: str, path: Path) -> bool:
    """Return whether the last byte of a file is one of a file of this kind."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return kind != ".pkl" or file.read() == b"."


def seems(head: bytes) -> str:
    """Say what a file with these first bytes seems to be, if that is known."""
    kind = kind_by_bytes(head)
    return f", it seems to be {kind}" if kind else ""


def check_tokens(tokens: np.ndarray, name: str, vocab_size: int) -> None:
    """Raise DataError if a token is not in the vocabulary."""
    if tokens.size and tokens.max() >= vocab_size:
        raise DataError(f"shard {name} holds the token {tokens.max()}, the vocabulary ends at {vocab_size - 1}: "
                        "prepare it again with the GPT-2 encoding")


def check_gpt2(windows: list[np.ndarray], name: str) -> None:
    """Raise DataError if sampled windows of a shard, the first and the last token among them, are not GPT-2 text.

    Refused is only what text in GPT-2's encoding never looks like, or hardly ever.
    """
    tokens = np.concatenate(windows)
    wrong = width_problem(windows[0]) or zeros_problem(tokens, windows[-1]) or encoding_problem(tokens, name)
    if wrong:
        raise DataError(f"shard {name} does not hold GPT-2 tokens in uint16: {wrong}")


def width_problem(tokens: np.ndarray) -> str:
    """Say what is wrong if the first tokens of a shard are numbers of another kind, read as uint16; else ""."""
    tokens = np.ascontiguousarray(tokens[:len(tokens) // 4 * 4][:4096])
    if len(tokens) < 64:
        return ""
    small = [(tokens[i::4] <= 3).mean() > 0.99 for i in range(4)]
    again = "save them with .astype('uint16') if they are GPT-2's, else prepare it again"
    if small in ([False, True, True, True], [True, True, True, False]):
        return f"they seem to be 64-bit integers (int64): {again}"
    if small in ([False, True, False, True], [True, False, True, False]):
        return f"they seem to be 32-bit integers (uint32 or int32): {again}"
    for kind in ("<f2", "<f4", "<f8"):
        numbers = tokens.view(kind)
        if np.isfinite(numbers).all() and (numbers == np.floor(numbers)).all() and 0 <= numbers.min() < numbers.max():
            return f"they seem to be {numbers.dtype}: {again}"
    if tokens.max() >= VOCAB_SIZE > tokens.byteswap().max() and len(np.unique(tokens)) > 32:
        return "their bytes seem to be in the other order (big-endian): save them with .astype('<u2')"
    return ""


def zeros_problem(tokens: np.ndarray, last: np.ndarray) -> str:
    """Say what is wrong if parts of a shard were never filled; else "". "!" is 0, but GPT-2 has other ids for "!!".

    `tokens` are the whole sample, and `last` its last window, at the end of the shard.
    """
    if len(tokens) < 64:
        return ""
    if tokens.min() == tokens.max() < VOCAB_SIZE:
        return f"all sampled tokens are {tokens[0]}: prepare it again"
    nonzero = np.flatnonzero(last)
    tail = len(last) - (nonzero[-1] + 1 if nonzero.size else 0)
    if tail >= 16:
        more = "" if nonzero.size else " or more"
        return f"it ends in {tail:,}{more} zeros, as if it had not been filled: cut them off, or prepare it again"
    share = ((tokens[1:] == 0) & (tokens[:-1] == 0)).mean()
    return f"{share:.0%} of the sample are zeros beside zeros: prepare it again" if share > 0.05 else ""


def encoding_problem(tokens: np.ndarray, name: str) -> str:
    """Say what is wrong if sampled tokens are of another encoding, of characters or of bytes; else ""."""
    path, again = Path(name), "prepare it again with the GPT-2 encoding"
    largest = int(tokens.max()) if tokens.size else 0
    if path.suffix.lower() == ".bin" and path.with_name("meta.pkl").exists() and largest < 40_000:
        return (f"its largest is {largest} and meta.pkl beside it is that of nanoGPT's own tokenizer, such as one of "
                "characters: name its text file instead, as --data input.txt; or delete meta.pkl if they are GPT-2's")
    if len(tokens) < 256:
        return ""
    counts = np.bincount(tokens)
    distinct, common = np.count_nonzero(counts), set(np.flatnonzero(counts > len(tokens) / 50).tolist())
    for owner, ids in OTHER_ENCODINGS.items():
        if distinct > 300 and common.issuperset(ids):
            return f"they seem to be {owner}: {again}"
    if NOT_IN_TEXT[tokens].mean() > 0.01:
        return f"more than 1 % are bytes that no text has, so they seem to be another encoding's: {again}"
    if len(tokens) >= 10_000 and largest < 512 and (tokens < 128).mean() > 0.5:
        return f"the largest of {len(tokens):,} is {largest}, so they seem to be characters or bytes: {again}"
    if largest < 40_000 and distinct > 1500:
        return (f"the largest of {len(tokens):,} is {largest}, so they seem to be those of a smaller encoding "
                f"(GPT-2's ends at {VOCAB_SIZE - 1}): {again}")
    return ""
