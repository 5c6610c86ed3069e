"""Shards that change under a live run, a thousand of them, and what a run calls the same data.

    pytest tests/test_live_data.py
"""
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import flags, make_loader, mostly_slow, posix, read_log, run, write_shards

import train_gpt2
from plumbing import checkpoint, shards
from plumbing.files import DataError
from plumbing.runlog import RunLog
from plumbing.shard_file import Shard, open_shard
from train_gpt2 import parse_args


def change(path, how: str) -> None:
    """Do to a file what happens to shards under a live run."""
    data = path.read_bytes()
    if how == "cut":
        os.truncate(path, len(data) // 2)
    elif how == "emptied":
        os.truncate(path, 0)
    elif how == "gone":
        path.unlink()
    elif how == "moved":
        path.parent.rename(path.parent.with_name("elsewhere"))
    elif how == "rewritten":
        path.write_bytes(data[:128] + data[130:] + b"\1\0")
    elif how == "replaced":
        other = path.with_name("other")
        other.write_bytes(data[:128] + bytes(reversed(data[128:])))
        shutil.copystat(path, other)
        os.replace(other, path)
    elif how == "longer":
        path.write_bytes(data + b"\1\0")


HOW = ["cut", "emptied", "gone", "moved", "rewritten", "replaced", "longer"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_a_shard_that_changes_while_it_is_in_use_is_named(how, suffix, tmp_path):
    folder = write_shards(tmp_path / "data", train=(3000,))
    path = folder / "edufineweb_train_000001.npy"
    if suffix == ".bin":
        np.load(path).tofile(folder / "train.bin")
        path.unlink()
        path = folder / "train.bin"
    loader = make_loader(folder, "train", 4, 16)
    loader.batch(0)
    change(path, how)
    with pytest.raises(DataError, match=f"shard {path} (was changed|is gone or was moved) while it was in use"):
        for i in range(1, 40):
            shards.read_ahead(loader, i, 1)
            loader.batch(i)


def test_a_new_date_or_a_copy_is_no_reason_to_stop(tmp_path):
    folder = write_shards(tmp_path / "data")
    path = folder / "edufineweb_train_000001.npy"
    loader = make_loader(folder, "train", 4, 16)
    before = [loader.batch(i)[0].tolist() for i in range(9)]
    os.utime(path, (1, 1))
    shutil.copyfile(path, folder / "copy")
    os.replace(folder / "copy", path)
    path.chmod(0o444)
    assert [loader.batch(i)[0].tolist() for i in range(9)] == before


@pytest.mark.parametrize("how", mostly_slow(["rewritten", "cut", "gone"]))
def test_a_run_whose_shard_changes_ends_in_one_line_and_continues_once_it_is_restored(how, tmp_path, monkeypatch,
                                                                                      capsys):
    data, out = write_shards(tmp_path / "data", train=(3000,)), tmp_path / "out"
    path, log_step = data / "edufineweb_train_000001.npy", RunLog.train
    good = path.read_bytes()

    def train(self, step, *values, **options):
        log_step(self, step, *values, **options)
        if step == 4:
            change(path, how)

    monkeypatch.setattr(RunLog, "train", train)
    with pytest.raises(OSError, match=f"shard {path} .* restore it, and the same command continues"):
        train_gpt2.main(parse_args(flags(data=data, out_dir=out, checkpoint_every=2)))
    monkeypatch.undo()
    assert checkpoint.load(checkpoint.newest(out))["step"] >= 2
    path.write_bytes(good)
    train_gpt2.main(parse_args(flags(data=data, out_dir=out, checkpoint_every=2)))
    assert "resumed after step" in capsys.readouterr().out
    assert [line["step"] for line in read_log(out, "train")] == [1, 2, 3, 4, 5, 6]


def test_a_thousand_shards_need_no_descriptors(tmp_path, monkeypatch):
    """With room for sixteen more files than are open, a run trains on 300 shards, saves and ends well."""
    resource = pytest.importorskip("resource")
    data = write_shards(tmp_path / "data", train=[50] * 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    train_gpt2.main(parse_args(flags(data=data, out_dir=tmp_path / "warm")))  # opens what stays open
    highest = max(map(int, os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 17, hard))
    try:
        train_gpt2.main(parse_args(flags(data=data, out_dir=tmp_path / "out")))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert checkpoint.newest(tmp_path / "out").name == "model_000006.pt"


def test_too_many_open_files_name_the_limit(shard_folder, monkeypatch):
    def full(*arguments, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(DataError, match="Too many open files: raise the limit with ulimit -n"):
        open_shard(shard_folder / "edufineweb_train_000001.npy")


CUT_UNDER_A_READ = """
import os, sys
import numpy as np
from plumbing import cli
from plumbing.shard_file import Shard, open_shard
from pathlib import Path
def read():
    shard = open_shard(Path(sys.argv[1]))
    shard[0:9]
    state = shard.stat()
    Shard.stat = lambda shard: state  # as if the file were cut between the look at it and the read
    os.truncate(sys.argv[1], 0)
    shard[60_000:60_009]
cli.run_command(read)
"""


@posix
def test_a_shard_that_is_cut_during_a_read_does_not_end_without_a_word(tmp_path):
    path = next(write_shards(tmp_path / "data", train=(90_000,)).glob("*train*"))
    (tmp_path / "cut.py").write_text(CUT_UNDER_A_READ)
    result = run([path], script=tmp_path / "cut.py")
    assert result.returncode == -signal.SIGBUS
    assert "Bus error" in result.stderr and "shard_file.py" in result.stderr


def test_a_shard_larger_than_the_memory_is_mapped(tmp_path, monkeypatch):
    """As nanoGPT's train.bin of 17 GB on a laptop: the system refuses PyTorch's mapping, which could be written to."""
    def refuse(*arguments, **named):
        raise RuntimeError("unable to mmap 17000000000 bytes from file: Cannot allocate memory (12)")

    path = next(write_shards(tmp_path / "data", train=(900,)).glob("*train*"))
    whole = open_shard(path)[0:900]
    monkeypatch.setattr(torch, "from_file", refuse)
    assert np.array_equal(open_shard(path)[100:200], whole[100:200])


def test_a_shard_is_sliced_as_an_array_is(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 999, dtype=np.uint16)
    np.save(tmp_path / "x.npy", tokens)
    shard = open_shard(tmp_path / "x.npy")
    part = shard.part(100, 300)
    assert isinstance(part, Shard) and len(shard) == 999 and len(part) == 200
    for window in (slice(0, 10), slice(990, 2000), slice(5, 3), slice(None), slice(998, None), slice(-3, None)):
        assert shard[window].tolist() == tokens[window].tolist()
        assert part[window].tolist() == tokens[100:300][window].tolist()
        assert shard[window].dtype == np.uint16


def fingerprint(folder) -> dict:
    """What a checkpoint keeps of the data."""
    return shards.fingerprint(make_loader(folder, "train", 4, 16), make_loader(folder, "val", 4, 16))


def test_the_fingerprint_of_earlier_versions_is_still_that_of_the_same_data(tmp_path):
    """The hash over number, begin, middle and end of each shard, by its definition."""
    import hashlib

    folder = write_shards(tmp_path / "data", train=(3_000_001, 900))
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*train*")):
        tokens = np.load(path)
        hashed.update(f"{len(tokens)} ".encode())
        parts = [tokens] if len(tokens) <= 2**20 else [tokens[:1024], tokens[1499488:1500512], tokens[-1024:]]
        for part in parts:
            hashed.update(part.tobytes())
    assert fingerprint(folder)["sha256"] == hashed.hexdigest()


def rewrite(path, start: int, stop: int) -> None:
    """Change tokens of a shard."""
    tokens = np.load(path)
    tokens[start:stop] = (tokens[start:stop].astype(int) + 1) % 50257
    np.save(path, tokens)


@pytest.mark.parametrize("what", ["a tenth of a large shard", "order", "validation", "boundaries", "one token"])
def test_other_data_with_as_many_windows_are_noticed(what, tmp_path):
    folder = write_shards(tmp_path / "data", train=(3_000_000, 1601, 1601), val=900)
    first, second, third = sorted(folder.glob("*train*"))
    before = fingerprint(folder)
    if what == "a tenth of a large shard":
        rewrite(first, 400_000, 700_000)
    elif what == "order":
        second.rename(folder / "edufineweb_train_000009.npy")
    elif what == "validation":
        rewrite(folder / "edufineweb_val_000000.npy", 899, 900)
    elif what == "boundaries":
        tokens = np.concatenate([np.load(second), np.load(third)])
        np.save(second, tokens[:801])
        np.save(third, tokens[801:])
    else:
        rewrite(third, 1000, 1001)
    after = fingerprint(folder)
    assert before["n_windows"] == after["n_windows"] and before != after
    loaders = [make_loader(folder, split, 4, 16) for split in ("train", "val")]
    with pytest.raises(DataError, match="have other tokens than when the run began"):
        shards.check_same({"data": before, "train_config": {}}, *loaders)


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_other_token_among_those_that_a_validation_reads_is_noticed(split, tmp_path):
    folder = write_shards(tmp_path / "data", train=(3_000_000,), val=3_000_000)

    def loaders(**changes):
        return [make_loader(folder, split, 4, 16, **changes) for split in ("train", "val")]

    before = shards.fingerprint(*loaders())
    rewrite(next(folder.glob(f"*{split}*")), 123_456, 123_457)  # between the sampled windows
    with pytest.raises(DataError, match="have other tokens than when the run began"):
        shards.check_same({"data": before, "train_config": {}}, *loaders())
    shards.check_same({"data": before, "train_config": {}}, *loaders(val_tokens=320))  # of a branch: not comparable


def test_a_change_behind_the_tokens_that_are_hashed_whole_is_noticed(tmp_path):
    folder = write_shards(tmp_path / "data", train=(3_000_000,))

    def loaders():
        return [make_loader(folder, split, 4, 16, val_tokens=320) for split in ("train", "val")]

    before = shards.fingerprint(*loaders())
    rewrite(next(folder.glob("*train*")), 400_000, 700_000)  # within one of the windows that are spread over it
    with pytest.raises(DataError, match="the training data have other tokens than when the run began"):
        shards.check_same({"data": before, "train_config": {}}, *loaders())


def test_one_other_token_of_a_text_is_noticed(tmp_path):
    text = tmp_path / "x.txt"
    text.write_text("One two three four.\n" * 200_000)  # more tokens than are hashed as a whole
    before = fingerprint(text)
    text.write_text("One two three four.\n" * 80_000 + "One two three five.\n" + "One two three four.\n" * 119_999)
    after = fingerprint(text)
    assert before["n_windows"] == after["n_windows"] and before != after
    assert 16 * before["n_windows"] > 2**20


def test_the_same_data_elsewhere_under_other_names_are_the_same(tmp_path):
    folder = write_shards(tmp_path / "data", train=(2_000_000, 900))
    before = fingerprint(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    for path in moved.glob("*.npy"):
        path.rename(path.with_name(path.name.replace("edufineweb", "mine")))
    assert fingerprint(moved) == before
    earlier = {key: value for key, value in before.items() if "windows_" not in key}
    loaders = [make_loader(moved, split, 4, 16) for split in ("train", "val")]
    for known in (before, earlier, {"n_windows": before["n_windows"]}, {}):
        shards.check_same({"data": known, "train_config": {}}, *loaders)
