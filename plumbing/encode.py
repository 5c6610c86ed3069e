"""GPT-2 tokens of many texts at once: by gigatoken, with a sample checked against tiktoken, or by tiktoken alone.

    encode, name = make_encoder("gigatoken")        encode(texts) gives (ids of all texts, how many each text has)
    encode_texts(piece, encode, files)              the same for Texts, with one row in CHECK_EVERY checked
    join_documents(ids, lengths, out)               uint16 tokens with EOT before each document
    tokenize_documents(texts)                       all of it for a list of Python strings
"""
import itertools
import sys
import tempfile
import threading
from base64 import b64encode
from pathlib import Path

import numpy as np

from plumbing.cli import UserError, plural
from plumbing.formats import as_utf8
from plumbing.texts import Texts, as_strings
from plumbing.tokenizer import EOT, encode_in_pieces, gpt2_encoding
from plumbing.tokenizer import encode as encode_with_tiktoken

CHECK_PIECES = 20  # pieces of a long text that are compared, some 2 MB
CHECK_EVERY = 1000  # rows; one row of each thousand is compared with tiktoken
END_OF = 437, 1659  # "end" and "of", as they are encoded in <|endoftext|>
REPLACED = 4210  # the token of U+FFFD, which is what becomes of bytes that are not UTF-8
MEMORY_LIMIT = 2 << 30  # bytes used by this process; above them, gigatoken's cache of words is dropped
CACHE_BYTES = 64 << 20  # bytes of text that a thread encodes, at least, before its cache is dropped
TRICKY = ("", " ", "\0", "a", "Hello world", "don't WE'LL I'm it's", "<|endoftext|> is text", " two\n\n\n  three \t",
          "0123456789 3.14 1e-5 \u00bd \u0663", "na\u00efve \u00c4\u00d6\u00dc \u00df", "\u4f60\u597d\u4e16\u754c",
          "\U0001f642 \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea", "e\u0301 \u200b\u2028\u00a0\ufeff", "x" * 999)


class Gigatoken:
    """Encodes Arrow strings with gigatoken: (texts) -> (ids of all texts, uint32; number of ids per text).

    It makes no Python strings and caches the ids of words. Each thread has a tokenizer of its own, because a shared one
    holds a lock.
    """

    def __init__(self):
        import awkward
        import gigatoken
        import psutil

        self.awkward, self.gigatoken, self.memory_info = awkward, gigatoken, psutil.Process().memory_info
        self.thread = threading.local()

    def load(self) -> None:
        """Give this thread a new tokenizer with an empty cache. gigatoken reads the vocabulary from a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gpt2.tiktoken"
            ranks = gpt2_encoding()._mergeable_ranks.items()
            path.write_bytes(b"".join(b64encode(token) + b" %d\n" % rank for token, rank in ranks))
            self.thread.tokenizer = self.gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {})
        self.thread.encoded_bytes = 0

    def __call__(self, texts) -> tuple[np.ndarray, np.ndarray]:
        thread = self.thread
        if not hasattr(thread, "tokenizer"):
            self.load()
        elif thread.encoded_bytes > CACHE_BYTES and self.memory_info().rss > MEMORY_LIMIT:
            self.load()  # the cache has no bound of its own
        thread.encoded_bytes += texts.nbytes
        ragged = thread.tokenizer.encode_batch(self.awkward.from_arrow(texts), parallel=False)
        return self.awkward.to_numpy(self.awkward.flatten(ragged)), self.awkward.to_numpy(self.awkward.num(ragged))


class Tiktoken:
    """Encodes Arrow strings with tiktoken, the reference, in the form of Gigatoken."""

    def __call__(self, texts) -> tuple[np.ndarray, np.ndarray]:
        ids = [encode_with_tiktoken(text) for text in texts.to_pylist()]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(itertools.chain.from_iterable(ids), np.uint32, lengths.sum()), lengths


def make_encoder(tokenizer: str):
    """Return (encoder, name) for the tokenizer "gigatoken" or "tiktoken".

    Falls back to tiktoken, with a warning, if gigatoken cannot be imported; `name` is the tokenizer in use. Raises
    UserError if gigatoken and tiktoken differ on one of the TRICKY texts.
    """
    import pyarrow as pa

    gpt2_encoding()  # create it once, before several threads ask for it
    if tokenizer == "tiktoken":
        return Tiktoken(), "tiktoken"
    try:
        encode = Gigatoken()
        ids, lengths = encode(pa.array(TRICKY, pa.large_string()))
    except ImportError as error:
        print(f"warning: {error}: using tiktoken, many times slower", file=sys.stderr, flush=True)
        return Tiktoken(), "tiktoken"
    for text, found in zip(TRICKY, np.split(ids, np.cumsum(lengths)[:-1])):
        if found.tolist() != encode_with_tiktoken(text):
            raise UserError(f"gigatoken and tiktoken differ on the text {text!r}: use --tokenizer tiktoken")
    return encode, "gigatoken"


def encode_texts(piece: Texts, encode, files: list[str]) -> tuple[Texts, np.ndarray, np.ndarray, tuple]:
    """Return (piece, ids of its texts, number of ids per text, what count_marks() says of them).

    Raises UserError, with the row, if the ids of a checked row are not tiktoken's.
    """
    ids, lengths = encode(piece.texts)
    ends = np.cumsum(lengths)
    for i in np.flatnonzero((piece.rows + piece.file) % CHECK_EVERY == 0).tolist():
        pieces = list(itertools.islice(encode_in_pieces([piece.texts[i].as_py()]), CHECK_PIECES))
        expected, given = np.concatenate([np.empty(0, np.uint16), *pieces]), ids[ends[i] - lengths[i]:ends[i]]
        if not np.array_equal(given[:len(expected)] if len(pieces) == CHECK_PIECES else given, expected):
            raise UserError(f"gigatoken and tiktoken differ on row {piece.rows[i]} (from 0) of {files[piece.file]}: "
                            "start again with --tokenizer tiktoken and another --out")
    return piece, ids, lengths, count_marks(piece.texts, ids)


def count_marks(texts, ids: np.ndarray) -> tuple[int, int, int]:
    """Return how many <|endoftext|>, U+FFFD and tokens there are in Arrow strings, `ids` being their tokens."""
    import pyarrow.compute

    marks = 0
    if np.any(ids[np.flatnonzero(ids[1:] == END_OF[1])] == END_OF[0]):
        # only now, as to look for a number takes a fraction of the time
        marks = pyarrow.compute.sum(pyarrow.compute.count_substring(texts, "<|endoftext|>")).as_py() or 0
    return marks, int(np.count_nonzero(ids == REPLACED)), len(ids)


def warn_of_marks(counts, source: str) -> None:
    """Say what the texts of a source hold that may be meant otherwise; `counts` are sums of count_marks()."""
    marks, replaced, tokens = counts if np.ndim(counts) else (0, 0, 0)
    if marks:
        print(f"warning: the texts of {source} hold <|endoftext|> {marks:,} {plural(marks, 'time')}, which was "
              "encoded as text like any other. If it separates documents, write each to a line of its own first, and "
              "name another --out: python -c \"import json, sys; [print(json.dumps({'text': each})) for each in "
              "sys.stdin.read().split('<|endoftext|>')]\" < FILE.txt > texts.jsonl", file=sys.stderr, flush=True)
    if replaced * 1000 > tokens:
        print(f"warning: {replaced:,} of {tokens:,} tokens are U+FFFD, which stands for bytes that are not UTF-8: if "
              f"{source} is in another encoding, convert it first, such as with iconv -f WINDOWS-1252 -t UTF-8 FILE > "
              "utf8_FILE, and name another --out", file=sys.stderr, flush=True)


def join_documents(ids: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join the ids of documents, each after EOT -> (offset of each document's EOT, uint16 tokens).

    `lengths` is the number of ids per document. The tokens are written into `out` if it is large enough, because
    allocating memory takes as long as the copy itself.
    """
    if ids.max(initial=0) >= EOT:
        raise UserError(f"the tokenizer gave the id {ids.max()}, text has ids below {EOT}: use --tokenizer tiktoken")
    ends, n = np.cumsum(lengths), len(ids) + len(lengths)
    starts = ends - lengths + np.arange(len(lengths))
    tokens = out[:n] if n <= len(out) else np.empty(n, np.uint16)
    tokens[starts] = EOT
    begin = 0
    for i, end in enumerate(ends.tolist(), start=1):  # i EOTs come before this document's first id
        tokens[begin + i:end + i] = ids[begin:end]
        begin = end
    return starts, tokens


def tokenize_documents(texts: list[str]) -> np.ndarray:
    """Encode texts as the shards hold them: uint16 tokens, with EOT before each text."""
    import pyarrow as pa

    encode, _ = make_encoder("gigatoken")
    column = as_strings(pa.array([as_utf8(text) for text in texts], pa.large_binary()))
    return join_documents(*encode(column), np.empty(0, np.uint16))[1]
