"""DataLoaderLite against a plain list of windows: order, formats, and what is refused.

    pytest tests/test_data.py
"""
import ctypes
import mmap
import os
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ENCODING, ROOT, make_loader, needs, spoil, write_bin, write_shards

from plumbing import shards
from plumbing.files import DataError
from plumbing.ranks import World
from plumbing.tokenizer import gpt2_encoding
from train_gpt2 import DataLoaderLite, TrainConfig


def plain_windows(folder, split, T) -> list[tuple]:
    """Every window of a split in file order, by the definition: (x, y) of T tokens, as tuples."""
    windows = []
    for path in sorted(folder.glob(f"*{split}*.npy")):
        tokens = np.load(path)
        windows += [(tuple(tokens[w * T:w * T + T]), tuple(tokens[w * T + 1:w * T + T + 1]))
                    for w in range(max(0, len(tokens) - 1) // T)]
    return windows


def take(loader, batches, first=0) -> list[tuple]:
    """The windows of `batches` micro-batches from the first-th on, as tuples."""
    rows = []
    for i in range(first, first + batches):
        x, y = loader.batch(i)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (loader.B, loader.T)
        rows += [(tuple(a), tuple(b)) for a, b in zip(x.tolist(), y.tolist())]
    return rows


def test_the_order_changes_with_epoch_and_seed(shard_folder):
    orders = [tuple(take(make_loader(shard_folder, "train", 150, 16, seed=seed), 1)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    loader = make_loader(shard_folder, "train", 149, 16)
    assert loader.n_windows == 93 + 56
    assert take(loader, 1) != take(loader, 1, 1)


def test_the_order_is_pinned(shard_folder):
    """What a checkpoint's position means may never change: these are the numbers of the first release."""
    loader = make_loader(shard_folder, "train", 1, 16, seed=1337)
    windows = plain_windows(shard_folder, "train", 16)
    assert take(loader, 5) == [windows[i] for i in (84, 136, 31, 18, 106)]


def test_a_batch_depends_on_its_number_alone(shard_folder):
    """In any order, again, from another loader, beyond the first epoch."""
    loader, other = (make_loader(shard_folder, "train", 4, 16) for _ in range(2))
    expected = [take(loader, 1, i) for i in range(60)]
    for i in (59, 3, 50, 3, 0, 38, 37):
        assert take(loader, 1, i) == take(other, 1, i) == expected[i]
    assert set(vars(other)) == set(vars(loader))


def test_three_formats_hold_the_same_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 400, dtype=np.uint16)
    batches = []
    for name in ("npy", "llmc", "nanogpt"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "npy":
            np.save(folder / "edufineweb_train_000001.npy", tokens)
        elif name == "llmc":
            write_bin(folder / "fineweb_train_000001.bin", tokens)
        else:
            tokens.tofile(folder / "train.bin")
        batches.append(take(make_loader(folder, "train", 3, 16), 9))
    assert batches[0] == batches[1] == batches[2]


@needs(*ENCODING)
def test_validation_reads_its_split_from_the_start(shard_folder):
    tokens = np.load(shard_folder / "edufineweb_val_000000.npy")
    x, y = make_loader(shard_folder, "val", 4, 16).batch(0)
    assert x.flatten().tolist() == tokens[:64].tolist() and y.flatten().tolist() == tokens[1:65].tolist()


def test_a_text_file_is_split_nine_to_one():
    tokens = gpt2_encoding().encode_ordinary((ROOT / "input.txt").read_text(encoding="utf-8"))
    n_val = len(tokens) // 10
    train, val = (make_loader(ROOT / "input.txt", split, 1, 64, shuffle=False) for split in ("train", "val"))
    assert take(train, 1)[0] == (tuple(tokens[:64]), tuple(tokens[1:65]))
    assert take(val, 1)[0] == (tuple(tokens[-n_val:][:64]), tuple(tokens[-n_val:][1:65]))
    assert (train.n_windows, val.n_windows) == ((len(tokens) - n_val - 1) // 64, (n_val - 1) // 64)


def test_opening_ten_billion_tokens_takes_no_time_and_no_memory(tmp_path):
    resource = pytest.importorskip("resource")
    tokens = np.resize(np.random.default_rng(0).integers(0, 50257, 2**20, dtype=np.uint16), 100_000_000)
    np.save(tmp_path / "edufineweb_val_000000.npy", tokens)
    del tokens
    for i in range(1, 100):  # one file of 100M tokens under a hundred names: 10B in all
        os.link(tmp_path / "edufineweb_val_000000.npy", tmp_path / f"edufineweb_train_{i:06d}.npy")
    make_loader(tmp_path, "val", 4, 1024)  # imports what it needs
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    loader = make_loader(tmp_path, "train", 4, 1024)
    assert time.process_time() - start < 0.5  # of this process: others may use the machine too
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert loader.n_windows == 99 * (99_999_999 // 1024)


@pytest.mark.parametrize("how", ["truncated", "padded", "empty", "dtype", "pickled", "two-dimensional", "magic",
                                 "version", "count", "header", "odd", "header cut", "both names"])
def test_a_bad_shard_is_refused_by_name(shard_folder, how):
    (shard_folder / "._x_train.npy").write_bytes(b"what macOS leaves on other people's disks")
    assert make_loader(shard_folder, "train", 1, 16).n_windows == 149
    spoil(shard_folder, how)
    with pytest.raises(DataError, match=r"shard \S*train\S*"):
        make_loader(shard_folder, "train", 1, 16)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    folder = write_shards(tmp_path / "data", train=(2**20 + 1,))
    path = folder / "edufineweb_train_000001.npy"
    tokens = np.load(path)
    tokens[9_990] = 50257  # outside the sample that is read at the start
    np.save(path, tokens)
    loader = make_loader(folder, "train", 1, 100, shuffle=False)
    take(loader, 99)
    with pytest.raises(DataError, match=r"edufineweb_train_000001\.npy holds the token 50257"):
        loader.batch(99)
    tokens[0] = 50257
    np.save(path, tokens)
    with pytest.raises(DataError, match=r"edufineweb_train_000001\.npy holds the token 50257"):
        make_loader(folder, "train", 1, 100)


def test_a_token_that_only_pads_the_model_s_vocabulary_is_refused(tmp_path):
    folder = write_shards(tmp_path / "data")
    path = folder / "edufineweb_train_000001.npy"
    tokens = np.load(path)
    tokens[5] = 50257
    np.save(path, tokens)
    config = TrainConfig(data=folder, micro_batch_size=1, sequence_length=16)
    with pytest.raises(DataError, match="holds the token 50257, the vocabulary ends at 50256"):
        DataLoaderLite(config, "train", World(), 50304)


@pytest.mark.parametrize("world_size, shuffle", [(1, True), (2, True), (3, False)])
def test_the_windows_announced_are_those_of_the_next_step(world_size, shuffle, shard_folder, monkeypatch):
    """Over two epochs, for each rank; and announcing them changes no token."""
    announced = []
    monkeypatch.setattr(shards.Shard, "read_ahead",
                        lambda shard, start, stop, *_, **__: announced.append(tuple(shard[start:stop])))
    for rank in range(world_size):
        loader, silent = (make_loader(shard_folder, "train", 4, 16, rank, world_size, seed=5, shuffle=shuffle)
                          for _ in range(2))
        for first in range(0, 75, 3):
            announced.clear()
            shards.read_ahead(loader, first, 3)
            read = take(loader, 3, first)
            assert announced == [(*x, y[-1]) for x, y in read]
            assert read == take(silent, 3, first)


@pytest.mark.skipif(sys.platform != "linux", reason="it needs Linux's mincore and posix_fadvise")
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_an_announced_window_comes_into_memory_before_it_is_read(suffix, tmp_path):
    path, tokens = tmp_path / f"train{suffix}", np.arange(2**22, dtype=np.uint32).astype(np.uint16)
    with open(path, "wb") as file:
        if suffix == ".npy":
            np.save(file, tokens)
        else:
            file.write(np.array([20240520, 1, len(tokens), *[0] * 253], dtype=np.int32).tobytes() + tokens.tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    np.save(tmp_path / "val.npy", tokens[:100])
    (_, shard), = shards.open_tokens(tmp_path, "train")
    start, stop = 3_000_000, 3_001_025
    mapped = np.memmap(path, dtype=np.uint16, mode="r", offset=shard.offset)  # to ask what is in memory
    address = mapped.ctypes.data + 2 * start

    def resident() -> list[bool]:
        first, pages = address - address % mmap.PAGESIZE, (ctypes.c_ubyte * 8)()
        length = address + 2 * (stop - start) - first
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), pages) == 0
        return [bool(page & 1) for page in pages[:-(-length // mmap.PAGESIZE)]]

    if any(resident()):
        pytest.skip("the file system of the temporary folder keeps all of it in memory")
    shard.read_ahead(start, stop)
    end = time.monotonic() + 30
    while not all(resident()):
        assert time.monotonic() < end, "it has not been read within 30 s"
        time.sleep(0.001)
    assert np.array_equal(shard[start:stop], tokens[start:stop])
