"""A run that goes on on another machine: what is taken over, what is chosen anew, and what is said.

    pytest tests/test_resume.py
"""
import os
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import TINY, assert_same_run, final_state, flags, mostly_slow, read_log

import train_gpt2
from plumbing import checkpoint, machine
from plumbing.cli import UserError
from plumbing.ranks import World
from train_gpt2 import GPT, GPTConfig, TrainConfig, parse_args


def begin(shard_folder, out, **changes) -> None:
    """Train, then take the last checkpoint away, so that the run goes on from step 4."""
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=out, **changes)))
    (out / f"model_{TINY['max_steps']:06d}.pt").unlink()


def go_on(shard_folder, out, **changes) -> dict:
    """Give the command again -> the settings in the last checkpoint."""
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=out, **changes)))
    state = final_state(out)
    return state["train_config"] | state["machine"]


@pytest.mark.parametrize("kind, changes, B", mostly_slow([
    ("cpu", {}, 2),  # the stored one
    ("NVIDIA H100", {}, 8),  # chosen anew: all windows of a step
    ("cpu", {"activation_checkpointing": True}, 8),  # other memory
    ("cpu", {"micro_batch_size": 4}, 4),  # the user's
], kept=2))
def test_b_is_taken_over_on_the_same_kind_of_device_only(kind, changes, B, shard_folder, tmp_path, monkeypatch):
    begin(shard_folder, tmp_path, micro_batch_size=2)
    monkeypatch.setattr(machine, "device_kind", lambda device, *_, **__: kind)
    stored = go_on(shard_folder, tmp_path, **{"micro_batch_size": None, **changes})
    assert (stored["micro_batch_size"], stored["device_kind"]) == (B, kind)
    lines = read_log(tmp_path, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=1024, vocab_size=64, n_layer=1, n_head=1, n_embd=8))


def stored(**changes) -> dict:
    """A checkpoint's settings and machine, as resolve() sees them."""
    settings = {"micro_batch_size": 2, "compile": False, "activation_checkpointing": False, "dtype": "float32"}
    return {"train_config": settings | changes, "step": 4, "machine": {"world_size": 1, "device_kind": "cpu"}}


def test_neither_b_nor_compile_is_taken_over_at_another_number_of_ranks(model, monkeypatch):
    monkeypatch.setattr(World, "min", lambda self, value, *_, **__: value)
    wishes = []
    monkeypatch.setattr(machine, "pick_compile", lambda *wish, **__: wishes.append(wish[1]) or (False, "played"))
    config = TrainConfig(total_batch_size=2**15)
    for world_size, B in ((1, 2), (2, 2)):
        resolved, _, _ = machine.resolve(config, stored(compile=True), model, World(0, world_size))
        assert resolved.micro_batch_size == B  # at two ranks picked anew: 2,048 tokens
    assert wishes == [True, None]
    resolved, _, _ = machine.resolve(config, stored(micro_batch_size=16), model, World(0, 2))
    assert resolved.micro_batch_size == 2
    assert config == TrainConfig(total_batch_size=2**15)  # nothing is written into it


def test_checkpoints_of_before_device_kinds_were_stored_are_those_of_a_cpu(model):
    state = {"train_config": {"micro_batch_size": 4, "world_size": 1, "n_windows": 3, "recipe": "gpt2"}, "step": 4,
             "optimizer": {"state": {}, "param_groups": []}, "position": 8}
    checkpoint.upgrade(state)
    assert state["machine"] == {"world_size": 1, "device_kind": "cpu"} and state["data"] == {"n_windows": 3}
    assert state["train_config"] == {"micro_batch_size": 4} and "position" not in state
    assert state["optimizers"] == [{"state": {}, "param_groups": []}]
    assert machine.resolve(TrainConfig(), state, model, World())[0].micro_batch_size == 4


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_run_in_a_folder_whose_name_is_no_utf_8_is_resumed(shard_folder, tmp_path):
    """PyTorch cannot map a file of that name; it must not be taken for damaged."""
    out = tmp_path / os.fsdecode(b"out\xff")
    begin(shard_folder, out)
    go_on(shard_folder, out)
    assert read_log(out, "run")[-1]["origin"] == "resumed after step 4"


@pytest.mark.parametrize("version, optimizer", mostly_slow([
    ("first", "adamw"), ("first", "muon"), ("with scaler", "adamw"), ("with scaler", "muon")]))
def test_a_checkpoint_of_an_earlier_version_is_resumed_bit_by_bit(version, optimizer, shard_folder, tmp_path):
    """Its keys are those that earlier versions wrote: one optimizer, the loader's position, settings of the machine."""
    whole, older = tmp_path / "whole", tmp_path / "older"
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=whole, optimizer=optimizer)))
    begin(shard_folder, older, optimizer=optimizer)
    path = older / "model_000004.pt"
    state = torch.load(path, weights_only=True)
    moments, before, windows = state.pop("optimizers"), state.pop("machine"), state.pop("data")["n_windows"]
    state["optimizer"] = moments[0] if optimizer == "adamw" else {"optimizers": moments}
    state["train_config"] |= {"world_size": 1, "n_windows": windows, "recipe": "gpt2"}
    state |= {"position": 4 * 8, "evaluated": True}
    del state["train_config"]["decay_steps"], state["train_config"]["branch_from"], state["train_config"]["eval_only"]
    if version == "first":
        del state["scaler"], state["evaluated"]
    else:
        state["train_config"]["device_kind"] = before["device_kind"]
    torch.save(state, path)
    go_on(shard_folder, older, optimizer=optimizer)
    assert_same_run(whole, older)


def test_a_stored_compile_is_no_wish_of_the_user_s(shard_folder, tmp_path, monkeypatch, capsys):
    """The run was compiled; where it goes on there is no compiler: it is eager from there, and says so."""
    begin(shard_folder, tmp_path)
    state = checkpoint.load(tmp_path / "model_000004.pt")
    state["train_config"]["compile"] = True
    checkpoint.save(tmp_path, 4, state)

    def missing(function, *_, **options):
        raise FileNotFoundError("g++")

    monkeypatch.setattr(torch, "compile", missing)
    assert go_on(shard_folder, tmp_path)["compile"] is False
    assert "compile | no: no working compiler (FileNotFoundError)" in capsys.readouterr().out


def test_a_stored_dtype_that_is_none_is_refused():
    for dtype in ("float64", "int7", 3, "auto"):
        with pytest.raises(UserError, match="has the unknown dtype"):
            machine.choose_dtype("auto", dtype, World())


@pytest.mark.slow
def test_a_stored_bfloat16_is_told_where_the_hardware_has_none(shard_folder, tmp_path, monkeypatch):
    begin(shard_folder, tmp_path, dtype="bfloat16")
    monkeypatch.setattr(machine, "is_native", lambda dtype, device, *_, **__: dtype == torch.float32)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError) as error:
        go_on(shard_folder, tmp_path, dtype=None)
    for words in ("is trained in bfloat16, which cpu does not multiply natively", "--dtype bfloat16", "--init_from"):
        assert words in str(error.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert go_on(shard_folder, tmp_path, dtype="bfloat16")["dtype"] == "bfloat16"  # the first remedy
    other = tmp_path.with_name("other")  # the second
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=other, init_from=tmp_path, dtype=None)))
    assert final_state(other)["train_config"]["dtype"] == "float32"


def test_a_device_of_another_kind_on_one_rank_counts_for_all(model, monkeypatch):
    """Else the ranks would go on with different batch sizes; here the other rank says 0, that is another kind."""
    monkeypatch.setattr(World, "all", lambda self, true, *_, **__: False)
    monkeypatch.setattr(World, "min", lambda self, value, *_, **__: value)
    world, state = World(0, 2), stored(micro_batch_size=16)
    state["machine"]["world_size"] = 2
    config = TrainConfig(dtype="float32", total_batch_size=2**15)
    assert machine.resolve(config, state, model, world)[0].micro_batch_size == 2  # picked anew
    with pytest.raises(UserError, match="is trained in float16, which cpu does not multiply natively"):
        machine.choose_dtype("auto", "float16", world)


def test_data_that_have_moved_are_known_again_and_changed_ones_refused(shard_folder, tmp_path):
    """A token changed in the last tenth of each split: as many windows as before, and other losses."""
    out = tmp_path / "out"
    begin(shard_folder, out)
    moved = shard_folder.rename(tmp_path / "moved")
    for split, what in (("train_000002", "training"), ("val_000000", "validation")):
        path = moved / f"edufineweb_{split}.npy"
        tokens = np.load(path)
        tokens[-40] += 1
        np.save(path, tokens)
        with pytest.raises(OSError, match=f"the {what} data have other tokens than when the run began: --data was "):
            go_on(moved, out)
        tokens[-40] -= 1
        np.save(path, tokens)
    assert go_on(moved, out)["data"] == str(moved)


def test_every_step_but_the_first_reads_windows_that_were_announced(shard_folder, tmp_path, monkeypatch):
    announced, late = [], []
    batch = train_gpt2.DataLoaderLite.batch

    def read(self, i, *more, **options):
        x, y = batch(self, i, *more, **options)
        if self.shuffle:
            late.extend(i for window in zip(x.tolist(), y[:, -1].tolist()) if (*window[0], window[1]) not in announced)
        return x, y

    monkeypatch.setattr(train_gpt2.DataLoaderLite, "batch", read)
    monkeypatch.setattr(train_gpt2.shards.Shard, "read_ahead", lambda shard, start, stop, *_, **__: announced.append(
        (*shard[start:stop].tolist(),)))
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=tmp_path)))
    assert late == [0] * 4 + [1] * 4 + [2] * 4  # the first step's two batches, and the one it reads for the second


def test_the_time_that_a_step_waited_for_data_is_in_the_log(shard_folder, tmp_path, monkeypatch):
    import time

    original = train_gpt2.DataLoaderLite.batch
    monkeypatch.setattr(train_gpt2.DataLoaderLite, "batch", lambda *arguments, **options: (
        time.sleep(0.02), original(*arguments, **options))[1])
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=tmp_path, max_steps=2)))
    waited = [(line["data_ms"], line["dt_ms"]) for line in read_log(tmp_path, "train")]
    assert len(waited) == 2 and all(40 <= data_ms <= dt_ms for data_ms, dt_ms in waited)  # two batches per step
    assert np.isfinite(waited).all()


RESUMED = {  # what another value of each setting would do to the rest of a run, and whether it is let
    "elsewhere": "out_dir device micro_batch_size compile activation_checkpointing deterministic",  # but for rounding
    "what is kept and shown": "keep_checkpoints keep_best checkpoint_every logger log_every sample_every sample_prompt "
                              "yes",
    "what is evaluated when, which the log says": "val_every hellaswag_every hellaswag_limit hellaswag_data",
    "no: other weights": "init_from branch_from seed model n_layer n_head n_embd total_batch_size sequence_length "
                         "shuffle optimizer max_lr min_lr warmup_steps decay decay_steps weight_decay grad_clip dtype "
                         "max_steps",
    "no: validation losses of another meaning": "val_tokens",
    "no: other data, which are compared by their tokens": "data",
    "no: no training": "eval_only",
}


def test_every_setting_is_known_to_change_the_rest_of_a_run_or_not():
    """A new one has to be entered above, and in MAY_CHANGE_ON_RESUME if it changes nothing that is computed."""
    names = [name for words in RESUMED.values() for name in words.split()]
    assert sorted(names) == sorted(field.name for field in fields(TrainConfig))
    free = {name for reason, words in RESUMED.items() if not reason.startswith("no: ") for name in words.split()}
    assert free == train_gpt2.MAY_CHANGE_ON_RESUME


def test_a_run_resumed_with_other_samples_checkpoints_and_evaluations_computes_the_same(shard_folder, tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=whole)))
    begin(shard_folder, other)
    go_on(shard_folder, other, sample_prompt="Another", sample_every=6, deterministic=True, keep_checkpoints=1,
          keep_best=True, checkpoint_every=1, micro_batch_size=4)
    assert_same_run(whole, other)
