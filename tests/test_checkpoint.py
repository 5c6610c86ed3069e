"""Checkpoint files: whole or absent, verified, pruned, locked; and files in transformers' layout that are refused.

    pytest tests/test_checkpoint.py
"""
import functools
import json
import os
import re
import stat
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers import ROOT, posix

from plumbing import checkpoint, files, run_folder, transformers_format
from plumbing.checkpoint import CheckpointError


def state(step=1, **changes) -> dict:
    return {"model": {"w": torch.arange(1000.0)}, "optimizers": [], "model_config": {}, "train_config": {},
            "step": step, "scaler": {}, "val_loss": 1.5, **changes}


def test_save_and_load(tmp_path):
    path = checkpoint.save(tmp_path, 7, state(7))
    assert path == tmp_path / "model_000007.pt"
    loaded = checkpoint.load(path)
    assert loaded["step"] == 7 and torch.equal(loaded["model"]["w"], torch.arange(1000.0))
    assert sorted(os.listdir(tmp_path)) == ["model_000007.pt"]


def test_newest_passes_over_what_is_damaged_and_names_it(tmp_path, capsys):
    for step in (1, 20, 3, 1_000_000):
        checkpoint.save(tmp_path, step, state(step))
    (tmp_path / "model_1000000.pt").write_bytes((tmp_path / "model_1000000.pt").read_bytes()[:-500])
    assert checkpoint.newest(tmp_path).name == "model_000020.pt"
    (told,) = capsys.readouterr().out.splitlines()
    assert "model_1000000.pt is not a whole checkpoint" in told
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_checkpoints_are_listed_by_step(tmp_path):
    for step in (1_000_000, 999_999, 20):
        (tmp_path / f"model_{step:06d}.pt").touch()
    assert [checkpoint.step_of(path) for path in checkpoint.listing(tmp_path)] == [20, 999_999, 1_000_000]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(data)


def put_pickle(path, pickled: bytes):
    """A checkpoint with right checksums around these bytes, which are for the unpickler alone to refuse."""
    with zipfile.ZipFile(path) as good:
        parts = {entry.filename: good.read(entry) for entry in good.infolist()}
    with zipfile.ZipFile(path, "w") as bad:
        for name, content in parts.items():
            bad.writestr(name, pickled if name.endswith("data.pkl") else content)
        for entry in bad.filelist:
            entry.external_attr = 0


@pytest.mark.parametrize("spoil, message", [
    (flip_a_bit, "checksum"),
    (lambda path: path.write_bytes(b""), "not a zip file"),
    (lambda path: path.write_bytes(b"hello" * 100), "not a zip file"),
    (lambda path: torch.save({"weights": 1}, path), "model, model_config, optimizers, .* missing or wrong"),
    (lambda path: torch.save([1, 2], path), "model, model_config, optimizers, .* missing or wrong"),
    (lambda path: torch.save(state(model=[], val_loss="1"), path), "train_gpt2.py: model, val_loss missing or wrong"),
    *((functools.partial(put_pickle, pickled=pickled), "not a whole checkpoint")
      for pickled in (b"\x80\x02h\x05.", b"\x80\x02R.", b"\x80\x02e.", b"\x80\x02K\x01K\x02s.")),  # stack, memo
    (lambda path: torch.save(state(model=print), path), "not a whole checkpoint"),
    (lambda path: path.unlink(), "no checkpoint"),
])
def test_what_is_not_a_whole_checkpoint_is_refused(tmp_path, spoil, message):
    path = checkpoint.save(tmp_path, 1, state())
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(path)
    assert "model_000001.pt" in str(error.value) and "\n" not in str(error.value)


@posix
def test_a_full_disk_leaves_the_last_checkpoint_and_no_partial_file(tmp_path):
    """A file-size limit, since a full disk needs root: the write fails in the middle just the same."""
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from plumbing import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
keys = {{key: kind() for key, kind in checkpoint.KEYS.items()}}
checkpoint.save({str(tmp_path)!r}, 1, keys)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save({str(tmp_path)!r}, 2, keys | {{"model": {{"w": torch.zeros(1_000_000)}}}})
except checkpoint.CheckpointError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot write" in result.stdout and "model_000002.pt" in result.stdout, result.stderr
    assert os.listdir(tmp_path) == ["model_000001.pt"]
    assert checkpoint.load(tmp_path / "model_000001.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model", "optimizers"])
def test_what_is_not_finite_is_not_saved(bad, where, tmp_path):
    spoilt = [{"state": {0: {"exp_avg": torch.tensor([1.0, bad])}}}] if where == "optimizers" else {
        "w": torch.tensor([bad])}
    with pytest.raises(CheckpointError, match=r"after step 3 .* is not finite: no checkpoint of it is kept"):
        checkpoint.save(tmp_path, 3, state(**{where: spoilt}))
    assert not list(tmp_path.iterdir())
    assert checkpoint.save(tmp_path, 3, state(val_loss=float("nan")))  # only tensors count


def test_what_killed_writers_left_goes_before_anything_is_written(tmp_path, monkeypatch):
    """On a disk that it has filled nothing could be written otherwise."""
    (tmp_path / "model_000004.pt.tmp").write_bytes(b"half")
    monkeypatch.setattr(torch, "save", lambda *_, **__: 1 / len(list(tmp_path.glob("model_000004*"))))
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path, 5, state(5))


def test_a_folder_in_place_of_the_temporary_file_is_named(tmp_path):
    (tmp_path / "model_000001.pt.tmp").mkdir()
    with pytest.raises(CheckpointError, match=r"model_000001\.pt\.tmp is a folder, .* move it away"):
        checkpoint.save(tmp_path, 1, state())


def test_an_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as file:
        file.write(b"half of the new")
        assert path.read_bytes() == b"old"
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    with files.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_its_name_before_anything_else(tmp_path, monkeypatch):
    """So that a power cut leaves the old file or the new one."""
    calls, fsync, rename = [], os.fsync, os.replace

    def synced(number, *_, **__):
        status = os.fstat(number)
        calls.append("the folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        fsync(number)

    def renamed(source, target, *_, **__):
        calls.append("the name")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with files.atomic_write(tmp_path / "x") as file:
        file.write(b"new")
    assert calls == ["3 bytes", "the name", "the folder"]


def test_links_out_of_a_folder_and_pipes_in_it_are_refused(tmp_path):
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("x")
    (folder / "link").symlink_to(secret)
    (folder / "inside").write_text("x")
    (folder / "alias").symlink_to("inside")
    os.mkfifo(folder / "pipe")
    for name in ("inside", "alias", "absent"):
        files.check_inside(folder / name)
    for name, problem in (("link", "is a link to another folder"), ("pipe", "is not a file: move it away")):
        with pytest.raises(files.DataError, match=f"{name} {problem}"):
            files.check_inside(folder / name)


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, state(step))
    (tmp_path / "notes.pt").write_bytes(b"mine")
    checkpoint.prune(tmp_path, 2, 10)
    assert sorted(os.listdir(tmp_path)) == ["model_000003.pt", "model_000010.pt", "notes.pt"]


def test_prune_never_trades_the_file_just_written_for_a_damaged_later_one(tmp_path):
    for step in (5, 6, 10, 11):
        checkpoint.save(tmp_path, step, state(step))
    for step in (10, 11):
        (tmp_path / f"model_{step:06d}.pt").write_bytes(b"damaged")
    checkpoint.prune(tmp_path, 1, 6)
    assert checkpoint.newest(tmp_path).name == "model_000006.pt"


@pytest.mark.slow
def test_any_flipped_bit_of_the_archive_is_found_or_harmless(tmp_path):
    """Every bit of the directory at the end and of the headers at the start of a checkpoint as torch.save writes it."""
    path = checkpoint.save(tmp_path, 1, state())
    data, expected = path.read_bytes(), torch.arange(1000.0)
    refused = 0
    for position in [*range(120), *range(len(data) - 900, len(data))]:
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                loaded = checkpoint.load(path)
                assert torch.equal(loaded["model"]["w"], expected) and loaded["step"] == 1
            except CheckpointError:
                refused += 1
    assert refused > 1000


def test_a_flipped_attribute_in_the_directory_is_found_where_a_file_is_not_mapped(tmp_path, monkeypatch):
    """As a folder, which one bit makes it, an entry would be read as memory that nobody has written."""
    load = torch.load

    def unmapped(*arguments, mmap=False, **options):
        if mmap:
            raise RuntimeError("cannot be mapped")
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", unmapped)
    path = checkpoint.save(tmp_path, 1, state())
    data, expected, refused = path.read_bytes(), torch.arange(1000.0), 0
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", data)]
    for position in (entry + 38 for entry in entries):  # of the external attributes
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert torch.equal(checkpoint.load(path)["model"]["w"], expected)
            except CheckpointError:
                refused += 1
    assert refused >= len(entries) > 3


def test_the_lock_is_held_by_one_process_and_falls_with_it(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from plumbing import run_folder\n" \
           f"with run_folder.lock({str(tmp_path)!r}): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OSError, match=r"another run is training into \S+: wait for it"), run_folder.lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with run_folder.lock(tmp_path):
        pass


def test_a_folder_that_is_no_gpt2_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        transformers_format.read_transformers(tmp_path)
    for settings in ({"n_layer": 1}, [], {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-6},
                     {"tie_word_embeddings": False}, {"scale_attn_by_inverse_layer_idx": True},
                     {"vocab_size": 9, "n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 8, "n_inner": 8}):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match="no GPT-2"):
            transformers_format.read_transformers(tmp_path)


def test_openai_names_need_a_network_and_others_are_unknown():
    with pytest.raises(CheckpointError, match="cannot download gpt2-xl from the Hugging Face hub"):
        transformers_format.read_transformers("gpt2-xl")
    with pytest.raises(CheckpointError, match="no model 'gpt5'"):
        transformers_format.read_transformers("gpt5")
