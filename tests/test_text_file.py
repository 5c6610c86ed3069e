"""A text file as data: documents in it, and the tokens of a large one, which are kept beside the run.

    pytest tests/test_text_file.py
"""
import os
import re
import tracemalloc

import numpy as np
import pytest
from helpers import ENCODING, ROOT, TEXT, flags, make_loader, needs, read_log, run
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt2
from plumbing import published, shards, text_file
from plumbing.cli import UserError
from plumbing.files import DataError, sha256
from plumbing.ranks import World
from plumbing.tokenizer import EOT, gpt2_encoding

pytestmark = needs(*ENCODING)
MARK = "<|endoftext|>"


def tokens_of(path, out_dir="", world=None) -> list[int]:
    """All tokens of a text, train before val."""
    parts = [text_file.open_text(path, split, out_dir, world) for split in ("train", "val")]
    assert len(parts[1]) == sum(map(len, parts)) // 10
    return [token for part in parts for token in part[:].tolist()]


def special(text: str) -> list[int]:
    """What tiktoken makes of a text in which <|endoftext|> is the token."""
    return gpt2_encoding().encode(text, allowed_special={MARK})


@pytest.mark.parametrize("text, expected", [
    (f"One.\n{MARK}\nTwo.\nThree.\n", f"{MARK}One.{MARK}Two.\nThree.\n"),  # as in TinyStories
    (f"{MARK}\nOne.\n{MARK}\nTwo.\n{MARK}\n", f"{MARK}One.{MARK}Two."),  # at the begin and at the end too
    (f"One.\r\n{MARK}\r\nTwo.\r\n", f"{MARK}One.{MARK}Two.\n"),
    (f"One.\n \t{MARK}  \nTwo.", f"{MARK}One.{MARK}Two."),
    (f"One.\n\n{MARK}\n\nTwo.", f"{MARK}One.\n{MARK}\nTwo."),  # a blank line stays
    (f"One.\n{MARK}\n{MARK}\n\n{MARK}\nTwo.", f"{MARK}One.{MARK}Two."),  # nothing between them: no document
    (f"One.\n{MARK}", f"{MARK}One."),
    (f"\ufeff{MARK}\nOne.", f"{MARK}One."),
])
def test_lines_of_endoftext_separate_documents(text, expected, tmp_path):
    (tmp_path / "x.txt").write_text(text, encoding="utf-8", newline="")
    assert tokens_of(tmp_path / "x.txt") == special(expected)


@pytest.mark.parametrize("text", [f"He wrote {MARK} and stopped.\n", f"{MARK}{MARK}\n", f"{MARK} x\n", f"x{MARK}\n",
                                  "<|endoftext|\n>\n", f"<{MARK}\n", "no mark\n\n\n at all\n",
                                  f"x\n{'ab ' * 2**19}{MARK}\n"])
def test_elsewhere_endoftext_stays_text(text, tmp_path):
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    assert tokens_of(tmp_path / "x.txt") == gpt2_encoding().encode_ordinary(text)
    assert EOT not in tokens_of(tmp_path / "x.txt")


def test_a_text_of_nothing_but_marks_is_said_to_be_one(tmp_path):
    (tmp_path / "x.txt").write_text(f"{MARK}\n" * 100)
    with pytest.raises(DataError, match=r"holds nothing but <.endoftext.>: name a file with text"):
        text_file.open_text(tmp_path / "x.txt", "train")


def test_marks_within_lines_are_mentioned_once(tmp_path, capsys):
    path = tmp_path / "x.txt"
    path.write_text(f"One.{MARK}Two.\n{MARK}\nThree.{MARK}\n" * 10)
    tokens_of(path)
    said = capsys.readouterr().out
    assert said.startswith(f"note: {path} has 20 {MARK} within lines, where it stays text") and said.count("note") == 1
    path.write_text(f"One.\n{MARK}\nTwo.\n" * 10)
    tokens_of(path)
    assert capsys.readouterr().out == ""


def test_a_text_that_changes_while_it_is_tokenized_leaves_no_tokens(large, tmp_path, monkeypatch):
    """They would be found again under the hash of another text."""
    def encode_and_append(*arguments, **options):
        for i, tokens in enumerate(works(*arguments, **options)):
            if i == 0:
                with open(large, "a") as file:
                    file.write("One line more.\n")
            yield tokens

    works = text_file.encode_documents
    monkeypatch.setattr(text_file, "encode_documents", encode_and_append)
    with pytest.raises(DataError, match="was changed while it was tokenized: run the same command again"):
        text_file.open_text(large, "train", tmp_path / "out", World(0, 1))
    assert not list((tmp_path / "out").glob("tokens*"))


def test_damaged_tokens_of_a_text_are_made_again_or_named(large, tmp_path, capsys):
    text_file.open_text(large, "train", tmp_path / "out", World(0, 1))
    (cache,) = (tmp_path / "out").glob("tokens*")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-1000])
    text_file.open_text(large, "train", tmp_path / "out", World(0, 1))
    assert cache.read_bytes() == whole
    assert f"{cache} cannot be used" in capsys.readouterr().out
    cache.write_bytes(whole[:len(whole) // 3] + bytes(len(whole) - len(whole) // 3))
    with pytest.raises(DataError, match=f"{cache} \\(made again from {large} if it is deleted\\) does not hold"):
        make_loader(str(large), "train", 4, 16, out_dir=str(tmp_path / "out"))


@settings(max_examples=150)
@given(lines=st.lists(st.sampled_from(["", " ", "One word", f"in {MARK} text", MARK, f" {MARK}\t", "\u6f22\u5b57"]),
                      max_size=9), end=st.sampled_from(["", "\n"]), block=st.integers(20, 60))
def test_documents_by_their_definition(lines, end, block, tmp_path, monkeypatch):
    """Against a split by a regular expression, with a window too small for all lines."""
    monkeypatch.setattr(text_file, "BLOCK", block)
    text = "\n".join(["x", *lines]) + end
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    parts = re.split(rf"^[ \t]*{re.escape(MARK)}[ \t]*(?:\n|\Z)", text, flags=re.MULTILINE)
    documents = [part.removesuffix("\n") for part in parts[:-1]] + parts[-1:]
    expected = gpt2_encoding().encode_ordinary(text)
    if len(parts) > 1:
        expected = [token for document in documents if document
                    for token in [EOT, *gpt2_encoding().encode_ordinary(document)]]
    assert tokens_of(tmp_path / "x.txt") == expected


def train(**changes) -> None:
    """Run train_gpt2.py in this process."""
    train_gpt2.main(train_gpt2.parse_args(flags(**changes)))


def test_the_summary_says_how_many_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stories = TEXT.split("\n\n")[:60]
    (tmp_path / "x.txt").write_text(f"\n{MARK}\n".join(stories), encoding="utf-8")
    train(data="x.txt", out_dir="out", max_steps=1)
    said = capsys.readouterr().out
    assert re.search(r"data \| x\.txt: 60 documents in [\d,]+ windows", said), said
    assert not list((tmp_path / "out").glob("tokens*"))  # a small one is not kept
    (tmp_path / "y.txt").write_text("\n".join(stories), encoding="utf-8")
    train(data="y.txt", out_dir="other", max_steps=1)
    said = capsys.readouterr().out
    assert "data | y.txt: " in said and "documents in" not in said


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A text that counts as large, with marks in it."""
    monkeypatch.setattr(text_file, "IN_MEMORY", 1000)
    path = tmp_path / "large.txt"
    path.write_text(TEXT[:100_000].replace("\n\n", f"\n{MARK}\n"), encoding="utf-8")
    return path


def test_the_tokens_of_a_large_text_are_kept_and_found_again(large, tmp_path, monkeypatch):
    expected, out = tokens_of(large), tmp_path / "new" / "out"
    assert expected == special(MARK + large.read_text(encoding="utf-8").replace(f"\n{MARK}\n", MARK))
    assert tokens_of(large, out, World()) == expected
    cache = out / f"tokens-{sha256(large)[:16]}.npy"
    assert np.load(cache).tolist() == expected and np.load(cache).dtype == np.uint16

    def again(*arguments, **__):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(text_file, "encode_in_pieces", again)
    assert tokens_of(large, out, World()) == expected
    with open(large, "a") as file:
        file.write("More.")
    with pytest.raises(AssertionError, match="tokenized again"):
        tokens_of(large, out, World())
    assert [path.name for path in out.glob("tokens*")] == [cache.name]  # nothing unfinished is left


def test_a_large_text_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "IN_MEMORY", 1 << 20)
    monkeypatch.setattr(text_file, "BLOCK", 1 << 17)
    path = tmp_path / "large.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    (tmp_path / "small.txt").write_text(TEXT[:10_000], encoding="utf-8")
    text_file.tokenize(tmp_path / "small.txt", tmp_path / "warm", World())
    tracemalloc.start()
    try:
        parts = [text_file.open_text(path, split, tmp_path / "out", World()) for split in ("train", "val")]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 0.9 * path.stat().st_size and sum(map(len, parts)) > 3 * 200_000


def test_a_run_on_a_large_text_is_resumed_and_evaluated_from_its_tokens(large, tmp_path, capsys):
    """A bar on stderr once, the split and the losses of a text in memory."""
    out = tmp_path / "out"
    train(data=large, out_dir=out, max_steps=4)
    said = capsys.readouterr()
    documents = large.read_text(encoding="utf-8").count(MARK) + 1
    assert "tokenizing large.txt" in said.err and f"{documents:,} documents in" in said.out
    cache, = out.glob("tokens-*.npy")
    written = cache.stat().st_mtime_ns
    (out / "model_000004.pt").unlink()
    losses = read_log(out, "train")
    for more in ({}, {"eval_only": True}):
        train(data=large, out_dir=out, max_steps=4, **more)
        assert "tokenizing" not in capsys.readouterr().err
    assert [line["loss"] for line in read_log(out, "train")] == [line["loss"] for line in losses]
    assert cache.stat().st_mtime_ns == written
    whole = np.load(cache)
    boundary = len(whole) - len(whole) // 10
    loader = make_loader(large, "val", 1, 16, out_dir=str(out))
    assert loader.batch(0)[0].tolist()[0] == whole[boundary:boundary + 16].tolist()


SMALL_IS_LARGE = """
import sys
import train_gpt2
from plumbing import cli, text_file

text_file.IN_MEMORY = 1000
cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))
"""


@pytest.mark.dist
@pytest.mark.slow
def test_rank_0_tokenizes_a_large_text_for_all(large, tmp_path):
    (tmp_path / "train.py").write_text(SMALL_IS_LARGE)
    result = run(flags(data=large, out_dir=tmp_path / "out2", max_steps=3), ranks=2, script=tmp_path / "train.py")
    assert result.returncode == 0 and result.stderr.count("100%") == 1, result.stderr
    train(data=large, out_dir=tmp_path / "out1", max_steps=3)
    losses = [[line["loss"] for line in read_log(tmp_path / f"out{ranks}", "train")] for ranks in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_folder_that_cannot_be_written_to_is_named(large, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/out"):
        tokens_of(large, tmp_path / "file" / "out", World())

    def full(tokens, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_file, "npy_header", full)
    with pytest.raises(DataError, match=r"cannot write the tokens of .*large\.txt to .*No space left .* --out_dir"):
        tokens_of(large, tmp_path / "out", World())
    assert not list((tmp_path / "out").glob("tokens*"))


def test_a_signal_ends_the_tokenizing(large, tmp_path):
    world = World()
    world.stop.set()
    with pytest.raises(UserError, match="interrupted while tokenizing"):
        tokens_of(large, tmp_path / "out", world)
    assert not list((tmp_path / "out").glob("tokens*"))


def test_the_demo_s_text_is_what_it_was(tmp_path):
    """Its loss is on record: the tokens of input.txt, and nothing in the log folder but what a run writes."""
    assert tokens_of(ROOT / "input.txt", tmp_path, World()) == gpt2_encoding().encode_ordinary(TEXT)
    assert os.listdir(tmp_path) == []
    described = shards.describe("input.txt", make_loader(ROOT / "input.txt", "val", 1, 64).shards, 10485760)
    assert described["val_sha256"] == published.DEMO["val_sha256"]
