"""fineweb.py on texts of one's own: names, the validation share, what is left to do, and the words on the screen.

    pytest tests/test_prepare.py
"""
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    ENCODING,
    FINEWEB_SCRIPT,
    TEXT,
    command,
    documents,
    fineweb_command,
    flags,
    needs,
    plain_tokens,
    posix,
    prepare,
    python_path,
    set_piece_bytes,
    slow,
    write_jsonl,
    write_parquet,
)

import fineweb
import train_gpt2
from plumbing import manifest as manifests
from plumbing import outlook
from plumbing.cli import UserError
from plumbing.files import DataError
from plumbing.resuming import validation_share
from plumbing.shards import splits_of
from plumbing.sources import name_of

pytestmark = needs(*ENCODING, "datasets", "gigatoken", "awkward")

SMALL = dict(tokenizer="tiktoken")  # which is made faster


def contents(folder) -> dict[str, bytes]:
    """Every file of a folder by its name, but for the lock."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.startswith(".")}


def tokens_of(folder) -> list[int]:
    """The tokens of all shards, in the order of their numbers."""
    paths = sorted(Path(folder).glob("*.npy"), key=lambda path: path.name[-10:])
    return np.concatenate([np.load(path) for path in paths]).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, name", [
    ("my_texts", "my_texts"), ("./some/where/My Texts/", "My_Texts"), ("a/*.jsonl", "a"), ("a/**/x*.txt", "a"),
    ("novel.txt", "novel"), ("data.v2.jsonl.gz", "data_v2"), ("trainData", "Data"), ("my-train-texts", "my_texts"),
    ("validation", "texts"), ("VALID_val_x", "x"), ("Märchen", "Marchen"), ("日本語", "texts"),
    ("-rf $HOME;", "rf_HOME"),
    ("x" * 300, "x" * 40), ("a" * 37 + "valley", "a" * 37 + "val"), ("b" * 36 + "_valley", "b" * 36),
    ("roneneldan/TinyStories", "TinyStories"), ("roneneldan/TinyStories@main/data", "TinyStories-data"),
    ("HuggingFaceFW/fineweb-edu/sample/100BT", "fineweb-edu-sample-100BT"),
    ("https://huggingface.co/datasets/OWNER/NAME/tree/main/FOLDER", "NAME-FOLDER"),
    (fineweb.FINEWEB_EDU, "edufineweb"), (f"hf://datasets/{fineweb.FINEWEB_EDU}", "edufineweb"),
])
def test_the_name_of_a_source_is_short_and_safe_and_no_split(source, name):
    found = name_of(source)
    assert found == name
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", found)
    for split in ("train", "val"):
        assert splits_of(Path(f"{found}_{split}_000000.npy")) == {split}


def test_shards_of_one_s_own_have_the_source_s_name_and_training_takes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_texts").mkdir()
    (tmp_path / "train_texts" / "a.txt").write_text(TEXT[:40_000])
    prepare(source="train_texts", **SMALL)
    assert sorted(contents("texts_shards")) == ["manifest.json", "texts_train_000001.npy", "texts_val_000000.npy"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "train on it: python train_gpt2.py --data texts_shards --preset demo"
    words = last.removeprefix("train on it: python train_gpt2.py ").split()
    train_gpt2.main(train_gpt2.parse_args([*words, *flags(out_dir=None)]))
    assert (tmp_path / "log" / "texts_shards" / "model_000006.pt").exists()
    prepare("--verify", source="train_texts")  # finds the same folder
    prepare(source="train_texts", out="mine", **SMALL)
    assert tokens_of("mine") == tokens_of("texts_shards") == plain_tokens([TEXT[:40_000]]).tolist()


def test_the_default_source_and_downloads_keep_build_nanogpt_s_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fineweb.FineWebConfig().out == fineweb.FineWebConfig(download="a/b").out == "edu_fineweb10B"
    assert fineweb.FineWebConfig().command == "python fineweb.py"
    assert fineweb.FineWebConfig(source="x").out == "x_shards"
    assert fineweb.FineWebConfig(source="x").command == "python fineweb.py --source x"
    assert fineweb.FineWebConfig(source="x", out="y").command == "python fineweb.py --source x --out y"


@pytest.mark.parametrize("k", [None, 0, 2])
def test_a_folder_with_the_names_of_an_earlier_version_goes_on_with_them(k, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    monkeypatch.setattr(fineweb, "name_of", lambda *_, **__: "edufineweb")  # as it was
    prepare(source="a.jsonl", out="edu_fineweb10B", shard_size=2000, **SMALL)
    whole = contents("edu_fineweb10B")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if k is None:  # killed before the first was recorded
        record = json.loads(whole["manifest.json"])
        for path in Path("edu_fineweb10B").glob("*"):
            if "val" not in path.name:
                path.unlink()
        Path("edu_fineweb10B/progress.json").write_text(json.dumps({**record, "shards": []}))
        prepare(source="a.jsonl", out="edu_fineweb10B", shard_size=2000, **SMALL)
    else:
        next(Path("edu_fineweb10B").glob(f"*{k:06d}.npy")).unlink()
        prepare(source="a.jsonl", shard_size=2000, **SMALL)  # --out was its default
    assert contents("edu_fineweb10B") == whole and not Path("a_shards").exists()
    prepare("--verify", out="edu_fineweb10B")


# ---------------------------------------------------------------------------------------------------------------------
# The validation share
# ---------------------------------------------------------------------------------------------------------------------

def test_the_share_is_a_hundredth_and_at_least_a_window_where_there_are_two():
    for tokens, share in ((1, 0), (2, 1), (9, 4), (2049, 1024), (2050, 1025), (5000, 1025), (102_500, 1025),
                          (102_600, 1026), (100_000_000, 1_000_000)):
        assert validation_share(tokens) == share


@pytest.mark.parametrize("piece_bytes", [1000, 4 << 20])
@pytest.mark.parametrize("limit", [0, 1500, 9999])
@pytest.mark.parametrize("fits", [True, False])
def test_fewer_than_two_shards_become_one_of_each_split(fits, limit, piece_bytes, tmp_path, monkeypatch):
    """Also where the tokens, or --max_tokens, fill the only shard exactly."""
    set_piece_bytes(piece_bytes, monkeypatch)
    texts = [None, *documents(60), "", None]
    expected = plain_tokens(text for text in texts if text is not None)[:limit or None]
    size = len(expected) if fits else len(expected) + 100
    prepare(source=write_jsonl(tmp_path / "a.jsonl", texts), out=tmp_path / "out", shard_size=size, max_tokens=limit,
            **SMALL)
    val, train = (np.load(tmp_path / "out" / name) for name in ("a_val_000000.npy", "a_train_000001.npy"))
    share = max(len(expected) // 100, min(1025, len(expected) // 2))
    assert np.array_equal(val, expected[:share]) and np.array_equal(train, expected[share:])
    prepare("--verify", out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["documents"] for shard in record["shards"]] == [int((part == 50256).sum()) for part in (val, train)]


@pytest.mark.parametrize("limit", [0, 5000])
def test_more_than_one_but_fewer_than_two_shards_are_written_again_with_a_share_for_validation(limit, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(60))
    expected = plain_tokens(documents(60))[:limit or None]
    given = dict(source=source, shard_size=len(expected) * 2 // 3, max_tokens=limit, **SMALL)
    prepare(**given, out=tmp_path / "out")
    share, size = max(len(expected) // 100, 1025), len(expected) * 2 // 3
    parts = [np.load(tmp_path / "out" / f"a_{name}.npy") for name in ("val_000000", "train_000001", "train_000002")]
    assert [len(part) for part in parts] == [share, size, len(expected) - share - size]
    assert np.array_equal(np.concatenate(parts), expected)
    prepare("--verify", out=tmp_path / "out")


@pytest.mark.parametrize("shards, limit", [
    ("one, filled", 5000), ("one", 0), ("one and a half", 0), slow("one, filled", 0), slow("one", 5000),
    slow("one and a half", 5000)])
def test_killed_between_the_two_shards_or_anywhere_it_ends_with_the_same_bytes(shards, limit, tmp_path, monkeypatch):
    """At every write of the manifest, rename of a file and hash of a shard, which are all the steps that last."""
    texts = documents(25)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    total = limit or len(plain_tokens(texts))
    size = {"one, filled": total, "one": total + 9, "one and a half": total * 2 // 3}[shards]
    given = dict(source=source, shard_size=size, max_tokens=limit, **SMALL)
    prepare(**given, out=tmp_path / "whole")
    whole = contents(tmp_path / "whole")

    class Killed(BaseException):
        pass

    replace, moments = manifests.replace, 0
    for moment in range(30):
        out, calls = tmp_path / str(moment), []

        def dying(temporary, path, *_, calls=calls, moment=moment, **__):
            calls.append(path)
            if len(calls) == moment // 2 + 1 and moment % 2 == 0:
                raise Killed
            replace(temporary, path)
            if len(calls) == moment // 2 + 1 and moment % 2:
                raise Killed

        monkeypatch.setattr("plumbing.files.replace", dying)
        monkeypatch.setattr(manifests, "replace", dying)
        monkeypatch.setattr(manifests.Manifest, "drop_if_empty", lambda *_, **__: None)  # a kill leaves everything
        try:
            prepare(**given, out=out)
        except Killed:
            moments += 1
        monkeypatch.undo()
        prepare(**given, out=out)
        assert contents(out) == whole, moment
        if moments < moment:  # the last ones came after the end
            break
    assert moments >= 5


def test_a_source_that_grows_keeps_its_validation_split(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", documents(40))
    given = dict(source=tmp_path / "in", out=tmp_path / "out", shard_size=30_000, **SMALL)
    prepare(**given)
    before, first = contents(tmp_path / "out"), plain_tokens(documents(40))
    write_jsonl(tmp_path / "in" / "b.jsonl", documents(90, 7))
    shutil.copytree(tmp_path / "out", tmp_path / "killed")
    prepare(**given)
    after = contents(tmp_path / "out")
    assert after["in_val_000000.npy"] == before["in_val_000000.npy"] and len(before) == 3 and len(after) > 3
    assert tokens_of(tmp_path / "out") == [*first.tolist(), *plain_tokens(documents(90, 7)).tolist()]
    prepare("--verify", out=tmp_path / "out")
    add = manifests.Manifest.add
    for _ in range(2):  # killed once a train shard has been written anew
        with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
            patch.setattr(manifests.Manifest, "add", lambda self, shard, *_, **__: (add(self, shard), 1 / 0))
            prepare(**{**given, "out": tmp_path / "killed"})
    prepare(**{**given, "out": tmp_path / "killed"})
    assert contents(tmp_path / "killed") == after


def test_the_only_shard_of_an_earlier_version_is_kept_until_the_source_grows(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", documents(40))
    given = dict(source=tmp_path / "in", out=tmp_path / "out", **SMALL)
    monkeypatch.setattr(fineweb, "set_apart", lambda shard, *_, **__: shard)  # as it was
    prepare(**given)
    monkeypatch.undo()
    before = contents(tmp_path / "out")
    assert len(before) == 2
    prepare(**given)
    said = capsys.readouterr()
    assert contents(tmp_path / "out") == before and "train on it" not in said.out
    assert "warning: all are in the validation split: to train on more, name another --out" in said.err
    write_jsonl(tmp_path / "in" / "b.jsonl", documents(10, 7))
    prepare(**given)
    expected = plain_tokens(documents(40) + documents(10, 7))
    assert tokens_of(tmp_path / "out") == expected.tolist() and len(contents(tmp_path / "out")) == 3


def test_of_several_nodes_the_first_sets_a_share_of_its_own_apart(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(2):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", documents(40, i))
    for rank in (1, 0):
        prepare(source=tmp_path / "in", out=tmp_path / "out", node_rank=rank, num_nodes=2, **SMALL)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == [
        "in_train_000001.npy", "in_train_010000.npy", "in_val_000000.npy"]
    assert len(np.load(tmp_path / "out" / "in_val_000000.npy")) == 1025
    assert "when all 2 nodes have finished: python fineweb.py --verify --out" in capsys.readouterr().out
    prepare("--verify", out=tmp_path / "out")


@pytest.mark.parametrize("text, said", [
    ("", "warning: only 1 token, too few to train on"),
    ("Hello there.", "warning: only 4 tokens, too few to train on: add texts to"),
    (TEXT[:3000], "tokens are few: good for trying things out"),
])
def test_of_very_few_tokens_it_is_said_what_they_are_good_for(text, said, tmp_path, capsys):
    prepare(source=write_jsonl(tmp_path / "a.jsonl", [text]), out=tmp_path / "out", **SMALL)
    printed = capsys.readouterr()
    assert said.replace("1 token are", "1 token") [:20] in printed.err
    assert ("train on it" in printed.out) == (len(text) > 1000)


# ---------------------------------------------------------------------------------------------------------------------
# What is left to do
# ---------------------------------------------------------------------------------------------------------------------

class Bar:
    """In the place of tqdm's: what is shown, in percent, whenever it moves."""

    def __init__(self, total, initial, *rest):
        self.total, self.n, self.shown = total, initial, []
        self.update(0)

    def update(self, count):
        self.n += count
        if self.total:
            self.shown.append(100 * self.n / self.total)

    def set_postfix_str(self, *rest, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.update(0)


def left(printed: str) -> float:
    """The bytes that the first line says are to be written."""
    amount, unit = re.search(r"about ([\d.,]+) (\w+) (?:left )?to write", printed).groups()
    return float(amount.replace(",", "")) * {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}[unit]


@pytest.mark.parametrize("kind", ["one parquet", "one jsonl", "one txt.gz per story", "unlike files", "dense"])
def test_on_resume_what_is_left_is_honest_and_the_bar_never_falls(kind, tmp_path, monkeypatch, capsys):
    set_piece_bytes(20_000, monkeypatch)
    source = tmp_path / "in"
    source.mkdir()
    texts = documents(300)
    if kind == "one parquet":
        write_parquet(source / "a.parquet", texts, row_group_size=50)
    elif kind == "one jsonl":
        write_jsonl(source / "a.jsonl", texts)
    elif kind == "one txt.gz per story":
        for i, text in enumerate(texts):
            (source / f"{i:03}.txt").write_text(text)
    elif kind == "dense":  # many times more tokens per byte than usual: the estimate from the size is far too low
        texts = ["".join(chr(0x4e00 + 37 * i % 9000) for i in range(k, k + 300)) for k in range(300)]
        write_jsonl(source / "a.jsonl", texts[:150])
        write_jsonl(source / "b.jsonl", texts[150:])
    else:
        write_parquet(source / "a.parquet", texts[:150])
        write_jsonl(source / "b.jsonl.gz", texts[150:])
    total, bars = len(plain_tokens(texts)), []
    size = total // 8
    monkeypatch.setattr(fineweb, "progress_bar", lambda *rest, **__: bars.append(Bar(*rest)) or bars[-1])
    given = dict(source=source, out=tmp_path / "out", shard_size=size, **SMALL)
    prepare(**given)
    capsys.readouterr()
    for k in (7, 5, 3, 1):
        for path in sorted((tmp_path / "out").glob("*.npy"), key=lambda path: path.name[-10:])[k:]:
            path.unlink()
        prepare(**given)
        printed = capsys.readouterr().out
        if "unknown" not in printed:
            assert left(printed) == pytest.approx(2 * (total - k * size), rel=0.8), k
            assert left(printed) > 0
    for bar in bars:
        assert bar.shown == sorted(bar.shown) and bar.shown[-1] == 100 and bar.n == total
        assert all(share < 100 for share in bar.shown[:-2])


def test_bytes_have_the_unit_that_fits():
    for count, said in ((0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (73_200_000, "73.2 MB"), (1e9, "1 GB"),
                        (999_700, "1 MB"), (19.9e9, "19.9 GB"), (1.5e12, "1,500 GB"), (999_000_000, "999 MB")):
        assert outlook.describe_bytes(count) == said


SLOWLY = """
import runpy, time
from plumbing import encode, resuming, texts

texts.PIECE_BYTES = resuming.PIECE_BYTES = 20_000
encode_texts = encode.encode_texts
encode.encode_texts = lambda *values, **options: (time.sleep(0.2), encode_texts(*values, **options))[1]
runpy.run_path({script!r}, run_name="__main__")
"""


@posix
@pytest.mark.parametrize("sign, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_that_the_same_command_goes_on(sign, code, tmp_path):
    """The signal comes after two shards, half a second of the minute that all would take."""
    write_jsonl(tmp_path / "a.jsonl", documents(6000))
    (tmp_path / "slowly.py").write_text(SLOWLY.format(script=str(FINEWEB_SCRIPT)))
    words = fineweb_command(source="a.jsonl", shard_size=5000, tokenizer="tiktoken", num_proc=1)[2:]
    process = subprocess.Popen(command(words, script=tmp_path / "slowly.py"), cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": python_path()})
    while not any((tmp_path / "a_shards").glob("*_train_*.npy")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == code and "Traceback" not in said
    typed = "python fineweb.py --source a.jsonl --shard_size 5000 --tokenizer tiktoken --num_proc 1"
    assert f"stopped: the whole shards are kept; the same command goes on: {typed}\n" in said
    assert not any((tmp_path / "a_shards").glob("*.tmp")) and (tmp_path / "a_shards" / "progress.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

def test_verify_where_there_is_nothing_names_the_folders_that_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", documents(3))
    prepare(source="a.jsonl", **SMALL)
    with pytest.raises((UserError, DataError), match=r"edu_fineweb10B.* did you mean --out a_shards\?"):
        prepare("--verify")


def test_disk_space_is_told_in_units_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda *_, **__: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs [\d.]+ kB and its disk has 1 kB free"):
        prepare(source=write_jsonl(tmp_path / "a.jsonl", documents(50)), out=tmp_path / "out")
