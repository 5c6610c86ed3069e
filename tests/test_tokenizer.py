"""The encoding against tiktoken's published test strings, and against transformers' own implementation of GPT-2's.

    pytest tests/test_tokenizer.py
"""
import hashlib
import importlib.util
import random
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ENCODING, needs, vocabulary
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plumbing import tokenizer
from plumbing.tokenizer import EOT, encode, encode_in_pieces, gpt2_encoding

pytestmark = needs(*ENCODING)

# from tiktoken's tests: what GPT-2's encoding makes of a run of zeros, by its length
ZEROS = {1: [15], 2: [405], 3: [830], 4: [2388], 5: [20483], 6: [10535], 7: [24598], 8: [8269], 9: [10535, 830],
         10: [8269, 405], 11: [8269, 830], 12: [8269, 2388], 13: [8269, 20483], 14: [8269, 10535], 15: [8269, 24598],
         16: [25645], 17: [8269, 10535, 830]}


def test_published_strings():
    encoding = gpt2_encoding()
    assert encoding.encode("hello world") == [31373, 995]
    assert encoding.encode("hello <|endoftext|>", allowed_special="all") == [31373, 220, EOT]
    assert encoding.n_vocab == 50257
    for length, tokens in ZEROS.items():
        assert encoding.encode("0" * length) == tokens


def test_hashes_are_those_tiktoken_pins():
    import inspect

    from tiktoken_ext import openai_public

    source = inspect.getsource(openai_public.gpt2)
    for name, digest in tokenizer.SHA256.items():
        assert digest in source
        assert hashlib.sha256((vocabulary() / name).read_bytes()).hexdigest() == digest


def test_equals_transformers_on_odd_text():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer(str(vocabulary() / "encoder.json"), str(vocabulary() / "vocab.bpe"))
    generator = random.Random(0)
    alphabet = "abc xyzEST'sve  \n\t0123.,!?éß漢字🙂\u200b\u00a0"
    for _ in range(300):
        text = "".join(generator.choices(alphabet, k=40))
        ours = gpt2_encoding().encode_ordinary(text)
        assert ours == theirs(text)["input_ids"]
        assert gpt2_encoding().decode(ours) == text


def test_a_tampered_vocabulary_is_refused(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / "data" / name).write_bytes((vocabulary() / name).read_bytes())
    with open(tmp_path / "data" / "vocab.bpe", "a") as file:
        file.write("x y\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_, **__: spec)
    with pytest.raises(OSError, match="not OpenAI's"):
        gpt2_encoding.__wrapped__()


def test_leaves_the_environment_and_the_temporary_folder_alone(tmp_path, monkeypatch):
    import os
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    gpt2_encoding.__wrapped__()
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Texts of any length: encode() is tiktoken's encode_ordinary, in pieces
# ---------------------------------------------------------------------------------------------------------------------

ODD = ["a", "b ", "ll", "'", "'s", "'ll", " ", "  ", "\n", "\r\n", "\t", "\x1c", "\x1f", "\x85", "\xa0", "\u3000",
       "\u200b", "1", "\u0663", ".", "!?", "\u4e2d", "\u3002", "\u3001", "e\u0301", "\U0001f642", "\0", "\ud83d",
       "\ude42", "_", "<|endoftext|>"]


@given(st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=40), st.integers(1, 9), st.randoms())
@example(["  ", "a"], 1, random.Random(0))
@example([" ", "a", "'ll", "\n\n", " "], 1, random.Random(0))
@settings(max_examples=500)
def test_text_encoded_in_pieces_has_tiktoken_s_tokens(words, piece, rng):
    text = "".join(words)
    before, tokenizer.PIECE = tokenizer.PIECE, piece
    try:
        assert encode(text) == gpt2_encoding().encode_ordinary(text)
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(5)))
        chunks = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
        arrays = list(encode_in_pieces(chunks))
        assert all(array.dtype == np.uint16 for array in arrays)
        assert [token for array in arrays for token in array.tolist()] == encode(text)
    finally:
        tokenizer.PIECE = before


def test_a_cut_beside_any_character_changes_nothing(monkeypatch):
    monkeypatch.setattr(tokenizer, "PIECE", 1)
    for code in (*range(0x3100), *range(0x3100, 0x110000, 997)):
        c = chr(code)
        text = f"a{c}{c}b{c} 1{c}, {c}.{c}\u4e2d{c}"
        assert encode(text) == gpt2_encoding().encode_ordinary(text), hex(code)


@pytest.mark.parametrize("parts", [
    (" " * 1_200_000, " a"), ("\n \t" * 400_000, "\n."), ("x" + " " * 1_100_000, "\n\ud800 y"), (" " * 1_200_000,)])
def test_a_million_blanks_are_encoded(parts):
    """They make tiktoken panic, with an exception that is no Exception. All but the last blank are one word to it."""
    expected = [token for part in parts for token in gpt2_encoding().encode_ordinary(part)]
    assert encode("".join(parts)) == expected
    assert gpt2_encoding().decode(expected) == "".join(parts).replace("\ud800", "\ufffd")


@pytest.mark.parametrize("unit", ["a", "7", "'", ".", "\n", "\u6f22", "a1", "'s", "\xa0x", "e\u0301"])
def test_long_runs_of_anything_are_encoded_as_tiktoken_does(unit):
    text = unit * 250_000
    assert encode(text) == gpt2_encoding().encode_ordinary(text)


def test_a_large_text_is_encoded_without_holding_it():
    line = "A line of a large file, with a number 12345 and blanks   \n" * 200
    sizes = [len(array) for array in encode_in_pieces(line for _ in range(300))]
    assert len(sizes) > 20 and max(sizes) < 60_000
    assert sum(sizes) == len(encode(line * 300))


def test_cutting_a_long_word_that_comes_in_chunks_takes_linear_time(monkeypatch):
    searched = []

    class Counting:
        def search(self, text, start):
            searched.append(len(text) - start)
            return CUT.search(text, start)

    CUT = tokenizer.CUT
    monkeypatch.setattr(tokenizer, "CUT", Counting())
    assert "".join(tokenizer.cut_text("x" * 1000 for _ in range(1000))) == "x" * 1_000_000
    assert sum(searched) < 2_100_000
