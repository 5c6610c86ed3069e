"""--dtype float16: a gradient scaler that overflows are left to, and that resumes and several ranks agree on.

    pytest tests/test_float16.py
"""
import math
import signal

import numpy as np
import pytest
import torch
from helpers import (
    ENCODING,
    PoisonedLoss,
    assert_same_run,
    final_state,
    flags,
    mostly_slow,
    needs,
    read_log,
    run,
    same,
    train_in_process,
)

import train_gpt2
from plumbing import checkpoint
from plumbing.cli import Stopped

EACH = {"dtype": "float16", "checkpoint_every": 1, "keep_checkpoints": 99}


@pytest.fixture
def poison(monkeypatch):
    """Call it with numbers of steps, counted from 1 in each process, whose gradient shall not be finite."""
    original, state = train_gpt2.GPT.forward, {"calls": 0, "steps": set()}

    def poisoned(self, idx, targets=None, *more, **options):
        loss = original(self, idx, targets, *more, **options)
        if targets is None or not loss.requires_grad:
            return loss
        state["calls"] += 1  # of which a step has two
        return PoisonedLoss.apply(loss) if (state["calls"] + 1) // 2 in state["steps"] else loss

    monkeypatch.setattr(train_gpt2.GPT, "forward", poisoned)
    return lambda steps: state.update(calls=0, steps=set(steps))


def test_losses_are_those_of_float32_and_the_scaler_is_in_log_and_checkpoint(shard_folder, tmp_path):
    for dtype in ("float32", "float16"):
        result = run(flags(data=shard_folder, out_dir=tmp_path / dtype, dtype=dtype))
        assert result.returncode == 0, result.stderr
        assert f"dtype | {dtype}" in result.stdout
    losses = [[line["loss"] for line in read_log(tmp_path / dtype, "train")] for dtype in ("float32", "float16")]
    np.testing.assert_allclose(*losses, atol=0.01, rtol=0)
    assert losses[0] != losses[1]
    assert all(weight.dtype == torch.float32 for weight in final_state(tmp_path / "float16")["model"].values())
    assert [line["scale"] for line in read_log(tmp_path / "float16", "train")] == [65536] * 6
    scaler = final_state(tmp_path / "float16")["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (65536, 6)
    assert final_state(tmp_path / "float32")["scaler"] == {}
    assert not any("scale" in line for line in read_log(tmp_path / "float32", "train"))


@pytest.mark.parametrize("optimizer", mostly_slow(["adamw", "muon"]))
def test_an_overflow_halves_the_scale_changes_nothing_and_is_logged(optimizer, shard_folder, tmp_path, poison, capsys):
    poison([3, 4])
    _, out = train_in_process(tmp_path, data=shard_folder, optimizer=optimizer, **EACH)
    lines = read_log(out, "train")
    assert [line["scale"] for line in lines] == [65536] * 3 + [32768, 16384, 16384]
    assert [bool(line.get("skipped")) for line in lines] == [False, False, True, True, False, False]
    assert "skipped: overflow at a gradient scale of 65,536\n" in capsys.readouterr().out
    weights = [final_state(out, step)["model"]["lm_head.weight"] for step in (2, 4, 5)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.slow
def test_overflows_stop_the_run_only_five_steps_after_the_scale_has_fallen_below_1(shard_folder, tmp_path, poison):
    poison(range(3, 12))  # nine in a row
    _, out = train_in_process(tmp_path, data=shard_folder, **EACH, max_steps=13)
    assert sum(line.get("skipped", False) for line in read_log(out, "train")) == 9
    poison(range(3, 99))
    halvings = int(math.log2(65536)) + 1  # until it is 1/2
    with pytest.raises(FloatingPointError, match=f"five steps in a row .* step {2 + halvings + 5} "):
        train_in_process(tmp_path, data=shard_folder, **EACH, max_steps=50)


def test_an_overflow_of_the_forward_pass_is_no_overflow_that_a_scale_mends(shard_folder, tmp_path, capsys):
    """Weights that are finite, and products of theirs past 65,504: five steps, and samples that are told, end it."""
    _, out = train_in_process(tmp_path, data=shard_folder)
    state = final_state(out)
    for name, weight in state["model"].items():
        if ".mlp." in name and name.endswith("weight"):
            weight.mul_(10_000)
    checkpoint.save(tmp_path, 1, state)
    with pytest.raises(FloatingPointError, match=r"five steps in a row .* step 5 .*--dtype float32"):
        train_in_process(tmp_path, data=shard_folder, dtype="float16", init_from=tmp_path / "model_000001.pt",
                         max_steps=50, sample_every=2)
    assert "skipped: not finite" in capsys.readouterr().out


def test_a_bad_loss_with_a_good_gradient_is_no_overflow(shard_folder, tmp_path, monkeypatch):
    original = train_gpt2.GPT.forward
    monkeypatch.setattr(train_gpt2.GPT, "forward", lambda *arguments, **options: (
        (loss := original(*arguments, **options)) + (math.nan - loss).detach()))
    with pytest.raises(FloatingPointError, match=r"five steps in a row .* step 5 "):
        train_in_process(tmp_path, data=shard_folder, dtype="float16", max_steps=50)


def test_the_scaler_s_state_is_resumed(shard_folder, tmp_path, poison):
    """The overflow is in step 3; the run that goes on from step 4 has the scale that came of it, and the same bits."""
    poison([3])
    _, whole = train_in_process(tmp_path, data=shard_folder, **EACH)
    poison([3])
    _, resumed = train_in_process(tmp_path, data=shard_folder, **EACH)
    for step in (5, 6):
        (resumed / f"model_{step:06d}.pt").unlink()
    poison([])
    train_gpt2.main(train_gpt2.parse_args(flags(data=shard_folder, out_dir=resumed, **EACH)))
    assert_same_run(whole, resumed)
    states = [final_state(folder)["scaler"] for folder in (whole, resumed)]
    assert states[0] == states[1] and (states[0]["scale"], states[0]["_growth_tracker"]) == (32768, 3)


@pytest.mark.parametrize("spoil", mostly_slow([
    lambda scaler: {**scaler, "scale": "65536"}, lambda scaler: {**scaler, "scale": math.nan}, lambda scaler: {},
    lambda scaler: {**scaler, "scale": 0.0}, lambda scaler: {"scale": 1.0}, lambda scaler: [1.0], lambda scaler: None,
    lambda scaler: {**scaler, "_growth_tracker": torch.zeros(2)},
], kept=2))
def test_a_checkpoint_with_a_damaged_scaler_is_named_and_the_one_before_used(spoil, shard_folder, tmp_path, capsys):
    _, out = train_in_process(tmp_path, data=shard_folder, dtype="float16")
    state = final_state(out)
    checkpoint.save(out, 6, {**state, "scaler": spoil(state["scaler"])})
    train_gpt2.main(train_gpt2.parse_args(flags(data=shard_folder, out_dir=out, dtype="float16")))
    printed = capsys.readouterr().out
    assert "model_000006.pt is not a checkpoint of train_gpt2.py: scaler missing or wrong" in printed
    assert "resumed after step 4" in printed
    assert same(state, final_state(out))


def test_a_stop_before_the_first_loss_is_a_stop(shard_folder, tmp_path, monkeypatch, capsys):
    """The scaler makes its scale with the first loss, which does not come to that here."""
    for name in ("fresh", "resumed"):
        out = tmp_path / "out"
        if name == "resumed":
            (out / "model_000006.pt").unlink()
        with monkeypatch.context() as patched:
            patched.setattr(train_gpt2.Run, "train", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Stopped):
                train_gpt2.main(train_gpt2.parse_args(flags(data=shard_folder, out_dir=out, dtype="float16")))
        said = "stopped before the first step: the same" if name == "fresh" else "stopped after step 4 of 6: the same"
        assert said in capsys.readouterr().out
        assert (out / "model_000004.pt").exists() == (name == "resumed") and not (out / "model_000000.pt").exists()
        train_gpt2.main(train_gpt2.parse_args(flags(data=shard_folder, out_dir=out, dtype="float16")))
    assert final_state(out)["scaler"]["_growth_tracker"] == 6


@pytest.mark.slow
@needs(*ENCODING)
def test_float16_goes_with_activation_checkpointing_samples_and_evaluation(shard_folder, tmp_path):
    loss, out = train_in_process(tmp_path, data=shard_folder, dtype="float16", activation_checkpointing=True,
                                 sample_every=3)
    assert "no sample" not in read_log(out, "sample")[-1]["text"]
    again = train_gpt2.main(train_gpt2.parse_args(flags(data=shard_folder, out_dir=out, dtype="float16", max_steps=0)))
    assert again == loss


@pytest.mark.slow
def test_what_was_compiled_for_bfloat16_is_not_taken_for_float16(shard_folder, tmp_path):
    """PyTorch 2.11 keeps compiled graphs under a key without autocast's dtype: one cache for both runs."""
    losses = {}
    for dtype, compiled in (("bfloat16", True), ("float16", True), ("float16", False), ("bfloat16", False)):
        out = tmp_path / f"{dtype}-{compiled}"
        result = run(flags(data=shard_folder, out_dir=out, dtype=dtype, compile=compiled, n_layer=1, max_steps=3),
                     TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        assert result.returncode == 0, result.stderr
        losses[dtype, compiled] = np.array([line["loss"] for line in read_log(out, "train")])
    apart = abs(losses["float16", False] - losses["bfloat16", False]).max()
    assert abs(losses["float16", True] - losses["float16", False]).max() < apart / 4
