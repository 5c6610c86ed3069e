"""A run that goes on on another machine: what is taken over, what is chosen anew, and what is said."""
import os
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, flags, read_log
from test_train import assert_same_run, final_state

import train_gpt2
from plumbing import checkpoint, machine
from train_gpt2 import TrainConfig, UserError, adopt_choices, parse_args


def begin(shard_folder, out, **changes) -> None:
    """Train, then take the last checkpoint away, so that the run goes on from step 4."""
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=out, **changes)))
    (out / f"model_{TINY['max_steps']:06d}.pt").unlink()


def go_on(shard_folder, out, **changes) -> dict:
    """Give the command again -> the settings in the last checkpoint."""
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=out, **changes)))
    return final_state(out)["train_config"]


@pytest.mark.parametrize("kind, changes, B", [
    ("cpu", {}, 2),  # the stored one
    ("NVIDIA H100", {}, 8),  # chosen anew: all windows of a step
    ("cpu", {"activation_checkpointing": True}, 8),  # other memory
    ("cpu", {"micro_batch_size": 4}, 4),  # the user's
])
def test_b_is_taken_over_on_the_same_kind_of_device_only(kind, changes, B, shard_folder, tmp_path, monkeypatch):
    begin(shard_folder, tmp_path, micro_batch_size=2)
    monkeypatch.setattr(machine, "device_kind", lambda device: kind)
    stored = go_on(shard_folder, tmp_path, **{"micro_batch_size": None, **changes})
    assert (stored["micro_batch_size"], stored["device_kind"]) == (B, kind)
    lines = read_log(tmp_path, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_neither_b_nor_compile_is_taken_over_at_another_number_of_ranks(monkeypatch):
    monkeypatch.setattr(train_gpt2, "min_over_ranks", lambda value, device, world_size: value)
    stored = {"micro_batch_size": 2, "compile": True, "world_size": 1, "device_kind": "cpu",
              "activation_checkpointing": False}
    cpu = torch.device("cpu")
    for world_size, B, was_compiled in ((1, 2, True), (2, 0, None)):
        config = TrainConfig(dtype="float32")
        assert adopt_choices(config, stored, cpu, world_size) == was_compiled
        assert config.micro_batch_size == B and config.compile is None


def test_checkpoints_of_before_device_kinds_were_stored_are_those_of_a_cpu():
    stored = {"micro_batch_size": 2, "compile": False, "world_size": 1, "activation_checkpointing": False}
    config = TrainConfig(dtype="float32")
    assert adopt_choices(config, stored, torch.device("cpu"), 1) is False and config.micro_batch_size == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_run_in_a_folder_whose_name_is_no_utf_8_is_resumed(shard_folder, tmp_path):
    """PyTorch cannot map a file of that name; it must not be taken for damaged."""
    out = tmp_path / os.fsdecode(b"out\xff")
    begin(shard_folder, out)
    go_on(shard_folder, out)
    assert read_log(out, "run")[-1]["origin"] == "step 4"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_of_before_scalers_were_stored_is_resumed_bit_by_bit(optimizer, shard_folder, tmp_path):
    whole, older = tmp_path / "whole", tmp_path / "older"
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=whole, optimizer=optimizer)))
    begin(shard_folder, older, optimizer=optimizer)
    state = checkpoint.load(older / "model_000004.pt")
    del state["scaler"], state["train_config"]["device_kind"]
    checkpoint.save(older, 4, state)
    go_on(shard_folder, older, optimizer=optimizer)
    assert_same_run(whole, older)


def test_a_stored_compile_is_no_wish_of_the_user_s(shard_folder, tmp_path, monkeypatch, capsys):
    """The run was compiled; where it goes on there is no compiler: it is eager from there, and says so."""
    begin(shard_folder, tmp_path)
    state = checkpoint.load(tmp_path / "model_000004.pt")
    state["train_config"]["compile"] = True
    checkpoint.save(tmp_path, 4, state)

    def missing(function, **options):
        raise FileNotFoundError("g++")

    monkeypatch.setattr(torch, "compile", missing)
    assert go_on(shard_folder, tmp_path)["compile"] is False
    assert "compile | no: no working compiler (FileNotFoundError)" in capsys.readouterr().out


def test_a_stored_dtype_that_is_none_is_refused():
    for dtype in ("float64", "int7", 3):
        with pytest.raises(UserError, match="has the unknown dtype"):
            adopt_choices(TrainConfig(), {"dtype": dtype}, torch.device("cpu"), 1)


def test_a_stored_bfloat16_is_told_where_the_hardware_has_none(shard_folder, tmp_path, monkeypatch):
    begin(shard_folder, tmp_path, dtype="bfloat16")
    monkeypatch.setattr(machine, "is_native", lambda dtype, device: dtype == torch.float32)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError) as error:
        go_on(shard_folder, tmp_path, dtype=None)
    for words in ("is trained in bfloat16, which cpu cannot multiply natively", "--dtype bfloat16", "--init_from"):
        assert words in str(error.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert go_on(shard_folder, tmp_path, dtype="bfloat16")["dtype"] == "bfloat16"  # the first remedy
    other = tmp_path.with_name("other")  # the second
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=other, init_from=tmp_path, dtype=None)))
    assert final_state(other)["train_config"]["dtype"] == "float32"


def test_a_device_of_another_kind_on_one_rank_counts_for_all(monkeypatch):
    """Else the ranks would go on with different batch sizes; here the other rank says 0."""
    monkeypatch.setattr(train_gpt2, "min_over_ranks", lambda value, device, world_size: 0)
    stored = {"micro_batch_size": 2, "compile": True, "world_size": 2, "dtype": "float16"}
    config = TrainConfig(dtype="float32")
    assert adopt_choices(config, {**stored, "dtype": "float32"}, torch.device("cpu"), 2) is None
    assert config.micro_batch_size == 0
    with pytest.raises(UserError, match="is trained in float16, which cpu cannot multiply natively"):
        adopt_choices(TrainConfig(), stored, torch.device("cpu"), 2)


def test_every_step_but_the_first_reads_windows_that_were_announced(shard_folder, tmp_path, monkeypatch):
    announced, late = [], []
    window = train_gpt2.DataLoaderLite._window

    def read(self, index):
        tokens = window(self, index)
        if self.shuffle and (*tokens,) not in announced:
            late.append(index)
        return tokens

    monkeypatch.setattr(train_gpt2.DataLoaderLite, "_window", read)
    monkeypatch.setattr(train_gpt2.shards, "announce", lambda tokens, start, stop: announced.append(
        (*tokens[start:stop],)))
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=tmp_path)))
    assert late == list(range(12))  # the first step's eight windows, and the four that it reads for the second


def test_the_time_that_a_step_waited_for_data_is_in_the_log(shard_folder, tmp_path, monkeypatch):
    import time

    original = train_gpt2.DataLoaderLite._window
    monkeypatch.setattr(train_gpt2.DataLoaderLite, "_window",
                        lambda self, index: (time.sleep(0.01), original(self, index))[1])
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=tmp_path, max_steps=4)))
    waited = [(line["data_ms"], line["dt_ms"]) for line in read_log(tmp_path, "train")]
    assert all(80 <= data_ms <= dt_ms for data_ms, dt_ms in waited[1:])  # eight windows a step; the first has four more
    assert np.isfinite(waited).all()
