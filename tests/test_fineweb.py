"""fineweb.py: bytes against a plain loop of tiktoken, restarts after SIGKILL, broken files, disks and networks.

    pytest tests/test_fineweb.py
"""
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

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
    run,
    run_fineweb,
    set_piece_bytes,
    shards,
    slow,
    write_jsonl,
    write_parquet,
)
from hub import COMMIT, hub, use_here

import fineweb
import train_gpt2
from plumbing import encode, texts
from plumbing.cli import UserError
from plumbing.tokenizer import EOT, gpt2_encoding

pytestmark = needs(*ENCODING, "datasets", "gigatoken", "awkward")
pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

FAST = dict(tokenizer="tiktoken")  # which is made faster
ODD = ["", "a", "\0", "nul \0 inside", "🙂 👩‍🚀 naïve ½ 你好", "<|endoftext|>", "see <|endoftext|> here",
       " \t\r\n  x\n", "lone \ud800 surrogate \udfff", "it's WE'LL don't", "\u2028 \x85 \x0b", "2021-01-01", "x" * 5000,
       TEXT[:100_000] * 6]


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokenizer", ["gigatoken", "tiktoken"])
def test_parquet_of_odd_documents_becomes_the_plain_loop_s_bytes(tokenizer, tmp_path):
    ours = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode() for text in ODD]
    ours += [None, b"not \xff utf-8 \xed\xa0\x80", None, *(text.encode() for text in documents(700))]
    binary = pa.array(ours, pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(ours), binary.buffers(), null_count=2)  # as a careless writer does
    source = write_parquet(tmp_path / "odd[1].parquet", texts, row_group_size=300)
    prepare(source=source, out=tmp_path / "out", shard_size=100_000, tokenizer=tokenizer)
    expected = plain_tokens(text.decode("utf-8", "replace") for text in ours if text is not None)
    found = shards(tmp_path / "out")
    assert np.array_equal(np.concatenate(found), expected)
    assert [len(shard) for shard in found[:-1]] == [100_000] * (len(expected) // 100_000) and len(found) > 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"] == len(ours) - 2 and manifest["tokens"] == len(expected)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_of_odd_documents_become_the_plain_loop_s_bytes(suffix, tmp_path):
    texts = [*ODD, None, *documents(700)]
    source = write_jsonl(tmp_path / f"odd.{suffix}", texts)
    prepare(source=source, out=tmp_path / "out", shard_size=100_000)
    expected = plain_tokens(text for text in texts if text is not None)
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), expected)


def test_json_lines_with_bom_blank_lines_bad_utf8_and_no_last_newline(tmp_path):
    source = tmp_path / "raw.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"text": "first"}\r\n\n  \n{"body": 1, "text": "bad \xff"}\n{"text": "last"}')
    prepare(source=source, out=tmp_path / "out", shard_size=4)
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), plain_tokens(["first", "bad \ufffd", "last"]))


@pytest.mark.parametrize("tokenizer", ["gigatoken", "tiktoken"])
def test_a_document_of_a_million_blanks_is_tokenized(tokenizer, tmp_path):
    """It makes tiktoken panic, which compares the first row with gigatoken's."""
    source = write_jsonl(tmp_path / "a.jsonl", [" " * 1_100_000 + "end", "next", "y" * 300_000])
    prepare(source=source, out=tmp_path / "out", tokenizer=tokenizer)
    expected = [EOT, *gpt2_encoding().encode_ordinary(" " * 1_099_999), *gpt2_encoding().encode_ordinary(" end")]
    expected += plain_tokens(["next", "y" * 300_000]).tolist()
    assert np.concatenate(shards(tmp_path / "out")).tolist() == expected


def test_tokenize_documents_is_the_plain_loop():
    texts = ODD + documents(50)
    assert np.array_equal(encode.tokenize_documents(texts), plain_tokens(texts))
    assert encode.tokenize_documents([]).size == 0


def test_a_tokenizer_made_to_forget_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(encode, "CACHE_BYTES", 0)
    set_piece_bytes(10_000, monkeypatch)
    load, loads = encode.Gigatoken.load, []
    monkeypatch.setattr(encode.Gigatoken, "load", lambda self, *_, **__: (loads.append(1), load(self)))
    texts = documents(40)
    prepare(source=write_parquet(tmp_path / "a.parquet", texts), out=tmp_path / "out", shard_size=5000, num_proc=1)
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), plain_tokens(texts))
    assert len(loads) >= 4  # for the check, for the thread and, once it has a piece behind it, again


@pytest.mark.parametrize("write, name", [(write_parquet, "a.parquet"), slow(write_jsonl, "a.jsonl")])
def test_nulls_and_empty_texts_anywhere_in_a_piece(write, name, tmp_path, monkeypatch):
    set_piece_bytes(400, monkeypatch)
    rng = random.Random(1)
    texts = [text[:rng.choice([0, 9, 90])] if rng.random() < 0.97 else None for text in documents(300)]
    source = write(tmp_path / name, texts)
    expected = plain_tokens(text for text in texts if text is not None)
    arguments = dict(source=source, out=tmp_path / "out", shard_size=50, num_proc=1)  # each thread loads a tokenizer
    prepare(**arguments)
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), expected)
    for k in rng.sample(range(len(expected) // 50), 4):  # going on in the middle of a piece, too
        (tmp_path / "out" / f"a_{'train' if k else 'val'}_{k:06d}.npy").unlink()
        prepare(**arguments)
        assert np.array_equal(np.concatenate(shards(tmp_path / "out")), expected)


def test_a_slice_beside_a_null_is_tokenized():
    column = pa.array([None, *(b"d %d" % i for i in range(199))], pa.large_binary())
    for start in (1, 50, 150):  # a slice may keep its parent's bitmap, for which gigatoken panics
        strings = texts.as_strings(column[start:].drop_null())
        tokens = encode.join_documents(*encode.Gigatoken()(strings), np.empty(0, np.uint16))[1]
        assert np.array_equal(tokens, plain_tokens(f"d {i - 1}" for i in range(start, 200)))


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_every_arrow_type_of_text(kind, tmp_path):
    texts = documents(20)
    column = pa.array(texts)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    prepare(source=write_parquet(tmp_path / "a.parquet", column), out=tmp_path / "out", shard_size=1000)
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), plain_tokens(texts))


def test_shards_may_end_anywhere_in_and_around_a_document(tmp_path):
    texts = ["", "one two three", "", "four", None, "five six"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    expected = plain_tokens(text for text in texts if text is not None)
    arguments = dict(source=source, **FAST)
    for size in range(1, len(expected) + 2):
        prepare(**arguments, out=tmp_path / str(size), shard_size=size)
        found = shards(tmp_path / str(size))
        assert np.array_equal(np.concatenate(found), expected)
        sizes = [min(size, len(expected) - i) for i in range(0, len(expected), size)]
        if len(expected) < 2 * size:  # then half of so few are for validation
            sizes = [len(expected) // 2, len(expected) - len(expected) // 2]
        assert [len(shard) for shard in found] == sizes
        for k in range(len(found)):  # and going on after any of them gives the same
            folder = tmp_path / f"{size} {k}"
            shutil.copytree(tmp_path / str(size), folder)
            min(folder.glob(f"*_{k:06d}.npy")).unlink()
            prepare(**arguments, out=folder, shard_size=size)
            assert (folder / "manifest.json").read_bytes() == (tmp_path / str(size) / "manifest.json").read_bytes()
            assert np.array_equal(np.concatenate(shards(folder)), expected)
    for limit in range(1, len(expected) + 3):
        prepare(**arguments, out=tmp_path / f"limit {limit}", shard_size=5, max_tokens=limit)
        assert np.array_equal(np.concatenate(shards(tmp_path / f"limit {limit}")), expected[:limit])


def test_files_of_a_folder_and_of_a_pattern_are_read_in_order(tmp_path):
    texts = documents(40)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_parquet(tmp_path / "in" / "b.parquet", texts[10:20])
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:10])
    write_jsonl(tmp_path / "in" / "deep" / "c.json.gz", texts[20:])
    (tmp_path / "in" / "README.md").write_text("not data")
    (tmp_path / "in" / "dataset_info.json").write_text("not data")
    (tmp_path / "in" / "again.jsonl").symlink_to(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / ".cache").mkdir()
    (tmp_path / "in" / ".cache" / "old.jsonl").write_text("not data")
    (tmp_path / "in" / ".hidden.jsonl").write_text("not data")
    prepare(source=tmp_path / "in", out=tmp_path / "folder", shard_size=3000)
    prepare(source=tmp_path / "in" / "**" / "*", out=tmp_path / "pattern", shard_size=3000)
    for name in ("folder", "pattern"):
        assert np.array_equal(np.concatenate(shards(tmp_path / name)), plain_tokens(texts))


def test_two_nodes_write_every_document_once(tmp_path):
    parts = [documents(25, seed) for seed in range(5)]
    (tmp_path / "in").mkdir()
    for i, part in enumerate(parts):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", part)
    for rank in (1, 0):
        prepare(source=tmp_path / "in", out=tmp_path / "out", shard_size=4000, node_rank=rank, num_nodes=2, **FAST)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.npy"))
    assert [name for name in names if "val" in name] == ["in_val_000000.npy"]
    first, second = (plain_tokens(text for part in parts[rank::2] for text in part) for rank in (0, 1))
    train = {f"in_train_{k:06d}.npy" for k in (*range(1, -(-len(first) // 4000)),
                                                       *range(10_000, 10_000 - (-len(second) // 4000)))}
    assert set(names) == train | {"in_val_000000.npy"}
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), np.concatenate([first, second]))
    prepare("--verify", out=tmp_path / "out")
    for rank in (0, 1):
        prepare(source=tmp_path / "in", out=tmp_path / "few", shard_size=400, max_tokens=5001, node_rank=rank,
                num_nodes=2, **FAST)
    assert sum(map(len, shards(tmp_path / "few"))) == 5001
    with pytest.raises(OSError, match="was made with another shard_size"):  # by the other node
        prepare(source=tmp_path / "in", out=tmp_path / "out", shard_size=300, node_rank=0, num_nodes=2, **FAST)
    (tmp_path / "out" / "manifest_1_of_2.json").unlink()
    with pytest.raises(OSError, match="node 1 has not finished"):
        prepare("--verify", out=tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Killed, full, damaged
# ---------------------------------------------------------------------------------------------------------------------

KILLED = """
import os, runpy, signal, sys, threading, time
from plumbing import manifest

count, seconds = int(sys.argv.pop()), float(sys.argv.pop())
finish, finished = manifest.ShardWriter.finish, []

def finish_and_die(shard):
    finished.append(shard)
    if len(finished) == count:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if len(finished) > count + 2:
        time.sleep(600)  # for its death, which may come late on a busy machine
    return finish(shard)

manifest.ShardWriter.finish = finish_and_die
runpy.run_path({script!r}, run_name="__main__")
"""


@posix
@pytest.mark.parametrize("kills, size", [(1, 500), slow(10, 2500)])
def test_killed_any_time_and_often_it_ends_with_the_same_bytes(kills, size, tmp_path):
    """SIGKILL up to 50 ms after a few more shards have been finished, and at the latest three shards later."""
    source = write_parquet(tmp_path / "a.parquet", documents(size), row_group_size=100)
    arguments = dict(source=source, shard_size=10_000, tokenizer="tiktoken")
    prepare(**arguments, out=tmp_path / "whole")
    whole = sorted(path.name for path in (tmp_path / "whole").glob("*.npy"))
    assert len(whole) > 6 * kills + 2  # as many as may be finished when it dies for the last time
    rng, out, script = random.Random(3), tmp_path / "killed", tmp_path / "killed.py"
    script.write_text(KILLED.format(script=str(FINEWEB_SCRIPT)))
    for _ in range(kills):
        when = [rng.random() * 0.05, rng.randrange(1, 4)]
        killed = run([*fineweb_command(**arguments, out=out)[2:], *when], script=script)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert list(out.glob("*.npy")) and not (out / "manifest.json").exists()
    result = run_fineweb(**arguments, out=out)
    assert result.returncode == 0 and "of them now" in result.stdout, result.stderr
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in whole:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_leaves_whole_shards_and_says_so(tmp_path):
    resource = pytest.importorskip("resource")
    source = write_jsonl(tmp_path / "a.jsonl", documents(400))
    arguments = dict(source=source, out=tmp_path / "out", shard_size=30_000, tokenizer="tiktoken")
    prepare(**arguments)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    last = sorted(path for path in whole if path.endswith(".npy"))[1]
    (tmp_path / "out" / last).unlink()

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    result = subprocess.run(fineweb_command(**arguments), capture_output=True, text=True, preexec_fn=small_disk,
                            timeout=300)
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert "File too large; the whole shards in" in message and "later with: python fineweb.py --source" in message
    assert "Traceback" not in result.stderr
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"a_val_000000.npy", "a_train_000001.npy", "a_train_000003.npy",
                    "progress.json", ".lock0"}  # it was writing a shard, and that one is gone
    prepare(**arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_a_disk_too_small_is_said_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda *_, **__: SimpleNamespace(free=1000))
    source = write_jsonl(tmp_path / "a.jsonl", documents(50))
    with pytest.raises(UserError, match="make room, name another --out, or take less with --max_tokens"):
        prepare(source=source, out=tmp_path / "out")
    assert " kB to write" in capsys.readouterr().out and not (tmp_path / "out").exists()
    prepare(source=source, out=tmp_path / "out", max_tokens=500)  # 1,000 bytes


def test_verify_finds_one_flipped_bit_and_what_is_missing_or_foreign(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(50)), tmp_path / "out"
    prepare(source=source, out=out, shard_size=5000)
    prepare("--verify", out=out)
    assert "all as they were written" in capsys.readouterr().out
    victim = out / "a_train_000001.npy"
    data = bytearray(victim.read_bytes())
    for position in (0, 80, 128, len(data) - 1):
        data[position] ^= 4
        victim.write_bytes(data)
        with pytest.raises(OSError, match=r"train_000001\.npy is damaged"):
            prepare("--verify", out=out)
        data[position] ^= 4
    victim.unlink()
    np.save(out / "stray_train.npy", np.zeros(3, np.uint16))
    with pytest.raises(OSError, match=r"stray_train.npy is in no manifest, a_train_000001.npy is missing"):
        prepare("--verify", out=out)
    (out / "stray_train.npy").unlink()
    prepare(source=source, out=out, shard_size=5000)  # writes what is missing
    prepare("--verify", out=out)
    for folder, fate in ((tmp_path / "none", "does not exist"), (source.parent, "is not finished")):
        with pytest.raises(OSError, match=f"{folder.name} {fate}: run"):
            prepare("--verify", out=folder)


def test_a_shard_that_was_cut_off_is_written_again(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(50)), tmp_path / "out"
    prepare(source=source, out=out, shard_size=5000)
    victim = out / "a_train_000001.npy"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-100])
    prepare(source=source, out=out, shard_size=5000)
    assert f"{victim} is missing or cut off: going on from there" in capsys.readouterr().err
    assert victim.read_bytes() == whole
    prepare("--verify", out=out)


def test_a_finished_folder_is_kept_and_other_settings_are_refused(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(50)), tmp_path / "out"
    prepare(source=source, out=out, shard_size=5000)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if not path.name.startswith(".")}
    prepare(source=source, out=out, shard_size=5000)
    assert capsys.readouterr().out.splitlines()[-2].startswith("finished: ")
    for other in (dict(shard_size=6000), dict(shard_size=5000, max_tokens=100), dict(shard_size=5000, text_column="id"),
                  dict(shard_size=5000, tokenizer="tiktoken")):
        with pytest.raises(OSError, match="was made with another"):
            prepare(**{"source": source, "out": out, **other})
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if not path.name.startswith(".")}
    write_jsonl(source, documents(51))
    (out / "a_train_000001.npy").unlink()
    with pytest.raises(UserError, match="have changed since"):
        prepare(source=source, out=out, shard_size=5000)
    for path in out.glob("*.json"):
        path.unlink()
    with pytest.raises(UserError, match="no manifest says what it is"):
        prepare(source=source, out=out, shard_size=5000)


@pytest.mark.parametrize("record", [
    "not json", "{}", '{"shards": []}', '{"shards": {}, "node_rank": 0, "num_nodes": 1}',
    *(json.dumps({"node_rank": 0, "num_nodes": 1, "shards": [{"documents": 1, "tokens": 1, "sha256": "", **rest}]})
      for rest in ({"name": 3, "bytes": 1}, {"name": "../a", "bytes": 1}, {"name": "a", "bytes": "x"})),
])
def test_a_damaged_manifest_is_named(record, tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(5)), tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(record)
    for arguments in (["--verify"], ["--source", str(source)]):
        with pytest.raises(OSError, match=r"manifest.json is damaged"):
            prepare(*arguments, out=out)


def test_a_source_that_changed_is_noticed(tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl", ["one two three four"] * 9), tmp_path / "out"
    prepare(source=source, out=out, shard_size=7)
    source.write_bytes(source.read_bytes().replace(b"one two three four", b"information system"))
    (out / "a_train_000002.npy").unlink()
    with pytest.raises(UserError, match=r"is not what .* was begun with"):
        prepare(source=source, out=out, shard_size=7)


LONG_WAITS = """
import runpy
from plumbing import network

wait = network.wait
network.wait = lambda seconds, stop=None: wait(600 * seconds, stop)
runpy.run_path({script!r}, run_name="__main__")
"""


def test_ctrl_c_ends_it_while_it_waits_for_the_network(dataset, tmp_path):
    _, folder = dataset
    (tmp_path / "long.py").write_text(LONG_WAITS.format(script=str(FINEWEB_SCRIPT)))
    arguments = fineweb_command(source="some/texts/sample", out=tmp_path / "out")[2:]
    with hub({"datasets/some/texts": folder}, tmp_path / "cache") as (environment, handler):
        handler.trouble = staticmethod(lambda path: "html" if "/resolve/" in path else None)
        process = subprocess.Popen(command(arguments, script=tmp_path / "long.py"), text=True, stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL,
                                   env={**os.environ, **environment, "PYTHONPATH": python_path()})
        while "trying again in 1 s" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            assert "error: interrupted" in process.communicate(timeout=120)[1]  # of the ten minutes that it would wait
        finally:
            process.kill()
        assert process.returncode == 130


def test_two_of_them_do_not_write_to_one_folder(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(5))
    with fineweb.output_folder(fineweb.FineWebConfig(out=str(tmp_path / "out"))):
        result = run_fineweb(source=source, out=tmp_path / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "another fineweb.py is writing" in last


@pytest.mark.parametrize("wrong, message", [
    (dict(text_column="body"), "no column 'body': choose a --text_column of id: int64, text: string"),
    (dict(text_column="id"), "column 'id' holds int64, not text"),
    (dict(source="nothing/here.parquet"), "--source 'nothing/here.parquet' does not exist"),
    (dict(source="*.nothing"), "no file matches --source '*.nothing'"),
    (dict(shard_size=0), "--shard_size is 0, it must be a number from 1 to"),
    (dict(node_rank=2, num_nodes=2), "--node_rank is 2, it must be less than --num_nodes, 2"),
    (dict(num_nodes=2), "--num_nodes is 2, it must be at most the number of files, 1"),
    (dict(tokenizer="word2vec"), "--tokenizer is 'word2vec', it must be gigatoken or tiktoken"),
    (dict(source=""), "--source is '', it must be a name or a path"),
    (dict(max_tokens=1, num_nodes=2), "--max_tokens is 1, it must be 0 or at least --num_nodes, 2"),
    (dict(shard_size=2**40), "--shard_size is 1099511627776, it must be a number from 1 to 1099511627775"),
    (dict(source="some/typo"), "cannot list some/typo on the Hugging Face hub"),
    (dict(max_tokens=-1), "--max_tokens is -1, it must be a number from 0"),
    (dict(node_rank=-1), "--node_rank is -1, it must be a number from 0"),
    (dict(retries=-1), "--retries is -1, it must be a number from 0"),
    (dict(text_column=""), "--text_column is '', it must be a name or a path"),
    (dict(download="some/ready/folder"), "--download is 'some/ready/folder', it must be OWNER/NAME or OWNER/NAME@REV"),
    (dict(download="some/ready", num_nodes=2), "--num_nodes is 2, it must be 1 with --download"),
    (dict(bogus=1), "unrecognized arguments: --bogus 1"),
])
def test_wrong_flags_end_in_one_line_and_leave_nothing(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_parquet(tmp_path / "a.parquet", documents(5))
    with pytest.raises((UserError, OSError)) as error:
        prepare(**{"source": source, "out": tmp_path / "out", "tokenizer": "tiktoken", **wrong})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, message", [
    ("a.parquet", b"<html>not found</html>", "Parquet magic bytes not found"),
    ("a.parquet", b"", "cannot be read"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": broken}\n', "line 2 is not a JSON object"),
    ("a.jsonl", b'{"text": "fine"}\n["text"]\n', "line 2 is not a JSON object"),
    ("a.jsonl", b'{"text": "fine"}\n{"txt": ""}\n', "line 2 has no key 'text'"),
    ("a.jsonl", b'{"text": 5}\n', "line 1 is not a JSON object with a string under 'text'"),
    ("a.jsonl", b'{"text": null}\n', "there is no text in"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 50, mtime=0)[:-9], "Truncated compressed stream"),
    ("a.jsonl.zst", b"no zstd at all", "cannot be read"),
])
def test_broken_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepare(source=tmp_path / name, out=tmp_path / "out")
    assert name in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------

FAKE = """
import awkward
import numpy as np
from plumbing.tokenizer import gpt2_encoding

class Tokenizer:
    @classmethod
    def from_tiktoken(cls, *arguments):
        return cls()

    def encode_batch(self, texts, parallel=None):
        return awkward.Array([[0] if text == {wrong!r} else gpt2_encoding().encode_ordinary(text)
                              for text in texts.to_list()])
"""


@pytest.mark.parametrize("wrong, message", [
    ("Hello world", "differ on the text 'Hello world'"),
    ("not built in", r"differ on row 1000 \(from 0\) of .*a.jsonl: start again with --tokenizer tiktoken"),
])
def test_a_tokenizer_that_errs_is_stopped_at_the_document(wrong, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", fake := ModuleType("gigatoken"))
    exec(FAKE.format(wrong=wrong), vars(fake))
    source = write_jsonl(tmp_path / "a.jsonl", ["one", *["two three"] * 999, "not built in", *documents(9)])
    with pytest.raises(UserError, match=message):
        prepare(source=source, out=tmp_path / "out", shard_size=1000)


def test_a_tokenizer_that_gives_an_id_of_no_text_is_refused():
    """As <|endoftext|> it would end a document, and beyond 65,535 it would become another id in a shard."""
    for wrong in (50256, 65_537):
        with pytest.raises(UserError, match=f"gave the id {wrong}, text has ids below 50256"):
            encode.join_documents(np.array([5, wrong]), np.array([2]), np.empty(0, np.uint16))


def test_without_gigatoken_tiktoken_does_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "gigatoken.py").write_text("raise ImportError('no gigatoken for this machine')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gigatoken", raising=False)
    texts = documents(20)
    prepare(source=write_jsonl(tmp_path / "a.jsonl", texts), out=tmp_path / "out", shard_size=1000)
    assert "warning: no gigatoken for this machine: using tiktoken" in capsys.readouterr().err
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), plain_tokens(texts))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tokenizer"] == "tiktoken"


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def dataset(tmp_path):
    """(texts, a folder laid out as a dataset on the hub)."""
    texts = documents(300)
    folder = tmp_path / "dataset" / "sample" / "10BT"
    folder.mkdir(parents=True)
    write_parquet(folder / "000_00000.parquet", texts[:150], row_group_size=40)
    write_parquet(folder / "001_00000.parquet", texts[150:], row_group_size=40)
    (tmp_path / "dataset" / "data").mkdir()
    write_jsonl(tmp_path / "dataset" / "data" / "x.jsonl.zst", texts[:7])
    return texts, tmp_path / "dataset"


def failing(times: int, what, path_part: str):
    """Trouble for the first so many requests of paths with that part."""
    left = [times]

    def trouble(path):
        left[0] -= path_part in path
        return what if path_part in path and left[0] >= 0 else None

    return staticmethod(trouble)


def test_a_dataset_on_the_hub_is_streamed_and_its_commit_recorded(dataset, tmp_path, monkeypatch):
    texts, folder = dataset
    with hub({"datasets/some/texts": folder}, tmp_path / "cache") as (environment, handler):
        arguments = fineweb_command(source="some/texts/sample/10BT", out=tmp_path / "out", shard_size=20_000)[2:]
        result = run(arguments, script=FINEWEB_SCRIPT, **environment)
        assert result.returncode == 0, result.stderr
        assert np.array_equal(np.concatenate(shards(tmp_path / "out")), plain_tokens(texts))
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["revision"] == COMMIT
        assert manifest["files"][0][0] == f"hf://datasets/some/texts@{COMMIT}/sample/10BT/000_00000.parquet"
        copies = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 10_000]
        assert not copies  # nothing of it is kept twice
        use_here(environment, monkeypatch)
        handler.seen.clear()
        fineweb.main(arguments)  # finished: no network is asked
        assert handler.seen == []
        prepare(source=f"some/texts@{COMMIT}/data", out=tmp_path / "json")
        assert np.array_equal(np.concatenate(shards(tmp_path / "json")), plain_tokens(texts[:7]))


@pytest.mark.parametrize("what, where", [(500, "/api/"), slow(429, "/api/"), slow("html", "/api/"),
                                         slow(503, "/resolve/"), (429, "/resolve/"), ("cut", "001_00000.parquet"),
                                         ("html", "/resolve/")])
def test_a_network_that_fails_for_a_while_changes_nothing(what, where, dataset, tmp_path, monkeypatch):
    texts, folder = dataset
    with hub({"datasets/some/texts": folder}, tmp_path / "cache") as (environment, handler):
        use_here(environment, monkeypatch)
        handler.trouble = failing(1, what, where)
        prepare(source="some/texts/sample", out=tmp_path / "out", shard_size=20_000)
        assert len([path for path in handler.seen if where in path]) > 1  # the one that failed, and others
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), plain_tokens(texts))


@pytest.mark.parametrize("what, where", [(500, "/api/"), (404, "/api/"), slow("html", "/api/"), ("cut", "001_00000"),
                                         slow("html", "001_00000")])
def test_a_network_that_stays_away_is_one_line_with_the_command_that_goes_on(what, where, dataset, tmp_path,
                                                                             monkeypatch):
    texts, folder = dataset
    arguments = dict(source="some/texts/sample", out=tmp_path / "out", shard_size=20_000)
    with hub({"datasets/some/texts": folder}, tmp_path / "cache") as (environment, handler):
        waits = use_here(environment, monkeypatch)
        handler.trouble = staticmethod(lambda path: what if where in path else None)
        with pytest.raises(UserError, match=r"later with: python fineweb\.py --source some/texts/sample") as error:
            prepare(**arguments)
        assert "\n" not in str(error.value)
        assert waits == ([1, 2, 4, 8, 16, 32, 60, 60] if what != 404 else [])  # --retries 8
        assert not list((tmp_path / "out").glob("*.tmp")) and not (tmp_path / "out" / "manifest.json").exists()
        handler.trouble = None
        use_here(environment, monkeypatch)
        prepare(**arguments)
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), plain_tokens(texts))


@pytest.fixture
def ready_made(tmp_path):
    """A folder of .bin shards as llm.c writes them, laid out as a dataset on the hub."""
    folder = tmp_path / "ready"
    folder.mkdir()
    for i, split in enumerate(("val", "train", "train")):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 5000
        tokens = np.random.default_rng(i).integers(0, 50257, 5000).astype(np.uint16)
        (folder / f"finewebedu_{split}_{i:06d}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    (folder / "README.md").write_text("hello")
    return folder


def test_ready_made_shards_are_fetched_and_verified(ready_made, tmp_path, monkeypatch):
    with hub({"datasets/some/ready": ready_made}, tmp_path / "cache") as (environment, _):
        use_here(environment, monkeypatch)
        prepare(download="some/ready", out=tmp_path / "out")
        for path in ready_made.glob("*.bin"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert not (tmp_path / "out" / "README.md").exists()
        prepare(download="some/ready", out=tmp_path / "part", max_tokens=5001)
        assert len(list((tmp_path / "part").glob("*.bin"))) == 2
    prepare("--verify", out=tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["revision"] == COMMIT and manifest["tokens"] == 15_000


def test_ready_made_shards_are_fetched_by_the_address_of_their_page(ready_made, tmp_path, monkeypatch):
    with hub({"datasets/some/ready": ready_made}, tmp_path / "cache") as (environment, _):
        use_here(environment, monkeypatch)
        for name in ("https://huggingface.co/datasets/some/ready", "some/ready", "hf://datasets/some/ready"):
            prepare(download=name, out=tmp_path / "out")
    prepare("--verify", out=tmp_path / "out")


@pytest.mark.parametrize("what", ["cut", "html", 500])
def test_a_download_that_fails_is_not_trusted_and_goes_on(what, ready_made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with hub({"datasets/some/ready": ready_made}, tmp_path / "cache") as (environment, handler):
        waits = use_here(environment, monkeypatch)
        handler.trouble = staticmethod(lambda path: what if "train_000002.bin" in path and "resolve" in path else None)
        with pytest.raises((UserError, OSError), match="--download some/ready"):
            prepare(download="some/ready", out=out, retries=2)
        assert waits == ([1, 2] if what != "html" else []) and not (out / "manifest.json").exists()
        with pytest.raises((UserError, OSError), match="are not all there"):
            train_gpt2.main(train_gpt2.parse_args(flags(data=out, out_dir=tmp_path / "log")))
        handler.trouble = None
        prepare(download="some/ready", out=out, retries=2)
    for path in ready_made.glob("*.bin"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("lfs, message", [
    ({"oid": "0" * 64, "size": 11024, "pointerSize": 130}, r"train_000002.bin arrived damaged and was deleted: fetch"),
    (None, r"the hub has no sha256 of finewebedu_train_000002.bin in some/ready, so it cannot be trusted"),
])
def test_ready_made_shards_are_not_trusted_without_the_hub_s_hash(lfs, message, ready_made, tmp_path, monkeypatch):
    with hub({"datasets/some/ready": ready_made}, tmp_path / "cache") as (environment, handler):
        listing = handler.listing
        monkeypatch.setattr(handler, "listing", lambda *arguments, **__: [
            {**entry, "lfs": lfs} if "000002" in entry["path"] else entry for entry in listing(*arguments)])
        result = run_fineweb(environment, download="some/ready", out=tmp_path / "out")
    assert result.returncode == 2 and re.search(message, result.stderr), result.stderr
    assert not list(tmp_path.glob("out/*000002.bin")) and not (tmp_path / "out" / "manifest.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Together
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_train_gpt2_runs_on_the_shards(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [TEXT[i:i + 3000] for i in range(0, 360_000, 3000)])
    result = run_fineweb(source=source, out=tmp_path / "data", max_tokens=60_000, shard_size=20_000)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2].startswith("finished: 60,000 tokens of ")
    assert "tokens/s" in result.stdout and "3 shards" in result.stdout
    train_gpt2.main(train_gpt2.parse_args(flags(data=tmp_path / "data", out_dir=tmp_path / "log", max_steps=3)))


def test_a_split_that_takes_most_is_warned_of(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", documents(30))
    prepare(source=source, out=tmp_path / "out", shard_size=3000)
    assert re.search(r"warning: 3,000 of [\d,]+ tokens are in the validation split: to train on more, name another "
                     r"--out and --shard_size \d+\n", capsys.readouterr().err)
    prepare(source=source, out=tmp_path / "more", shard_size=400)
    assert "warning" not in capsys.readouterr().err
