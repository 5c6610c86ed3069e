"""What an error of any kind leaves behind: the finished steps. And the checkpoint of the lowest validation loss.

    pytest tests/test_rescue.py
"""
import math

import pytest
import torch
from helpers import ENCODING, assert_same_run, final_state, flags, mostly_slow, needs, posix, read_log, run, same

import hellaswag
import train_gpt2
from plumbing import checkpoint, files


def train(out, data, **changes) -> float:
    """Train in this process; returns the validation loss."""
    return train_gpt2.main(train_gpt2.parse_args(flags(data=data, out_dir=out, **changes)))


def failing(monkeypatch, owner, name: str, error: BaseException, call: int) -> None:
    """Have a function raise an error at the end of its `call`-th call."""
    works, calls = getattr(owner, name), []

    def fails(*arguments, **options):
        calls.append(name)
        result = works(*arguments, **options)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(owner, name, fails)


ERRORS = [  # what raises, at which call, the last finished step, the error
    (train_gpt2, "evaluate_val_loss", 2, 3, MemoryError()),
    (train_gpt2, "evaluate_val_loss", 3, 6, torch.OutOfMemoryError("CUDA out of memory")),
    (train_gpt2.DataLoaderLite, "batch", 20, 4, OSError("shard x was cut")),
    (train_gpt2.DataLoaderLite, "batch", 20, 4, SystemExit(3)),
    (train_gpt2.RunLog, "train", 5, 5, FloatingPointError("diverged")),
    (train_gpt2.RunLog, "train", 5, 5, RuntimeError("a bug")),
]


@pytest.mark.parametrize("case", mostly_slow([(case,) for case in ERRORS]))
def test_an_error_costs_no_finished_step(case, shard_folder, tmp_path, monkeypatch):
    owner, name, call, step, error = case
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(whole, shard_folder, checkpoint_every=0)
    failing(monkeypatch, owner, name, error, call)
    with pytest.raises((type(error), train_gpt2.cli.UserError)):
        train(out, shard_folder, checkpoint_every=0)
    monkeypatch.undo()
    assert [path.name for path in checkpoint.listing(out)] == [f"model_{step:06d}.pt"]
    train(out, shard_folder, checkpoint_every=0)
    assert_same_run(whole, out)


def test_an_error_in_the_middle_of_an_update_saves_nothing_torn(shard_folder, tmp_path, monkeypatch):
    failing(monkeypatch, torch.optim.Muon, "step", RuntimeError("a bug"), 4)  # AdamW has stepped, Muon has not
    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path / "out", shard_folder, optimizer="muon")
    assert [path.name for path in checkpoint.listing(tmp_path / "out")] == ["model_000002.pt"]


@needs(*ENCODING)
def test_an_error_in_hellaswag_or_a_sample_costs_no_finished_step(shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "sample_text", lambda *arguments, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "a", shard_folder, checkpoint_every=0, sample_every=4)
    assert not checkpoint.listing(tmp_path / "a")  # that was before the first step
    example = {"ctx": "A man sits.", "endings": ["He reads.", "He is.", "A.", "B."], "label": 0}
    monkeypatch.setattr(hellaswag, "examples_for_training", lambda *arguments, **__: [example])
    monkeypatch.setattr(hellaswag, "evaluate", lambda *arguments, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "b", shard_folder, checkpoint_every=0, hellaswag_every=4)
    assert [path.name for path in checkpoint.listing(tmp_path / "b")] == ["model_000004.pt"]


@posix
def test_a_signal_of_the_hardware_does_not_end_without_a_word(shard_folder, tmp_path):
    script = tmp_path / "bus.py"
    script.write_text("import os, signal, sys\nimport train_gpt2\n"
                      "train_gpt2.get_lr = lambda *_, **__: os.kill(os.getpid(), signal.SIGBUS)\n"
                      "train_gpt2.cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))\n")
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out"), script=script)
    assert result.returncode != 0
    assert "Fatal Python error: Bus error" in result.stderr and "train_gpt2.py" in result.stderr


ONE_RANK_FAILS = """
import sys
import train_gpt2
from plumbing import cli
evaluate = train_gpt2.evaluate_val_loss
def evaluate_val_loss(model, loader, *rest, **options):
    loss = evaluate(model, loader, *rest, **options)
    calls.append(loss)
    if len(calls) == 2 and loader.world.rank == 1:
        1 / 0
    return loss
calls = []
train_gpt2.evaluate_val_loss = evaluate_val_loss
cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))
"""


def test_keep_best_keeps_the_lowest_validation_loss_across_a_restart(shard_folder, tmp_path, monkeypatch):
    losses = {0: 9.0, 2: 7.0, 4: 5.0, 6: 8.0}

    def train_best(out, **changes):
        played = iter(losses.values())
        monkeypatch.setattr(train_gpt2, "evaluate_val_loss", lambda *arguments, **__: next(played))
        return train(out, shard_folder, val_every=2, keep_checkpoints=9, keep_best=True, **changes)

    train_best(tmp_path / "out")
    best = checkpoint.load(tmp_path / "out" / checkpoint.BEST)
    numbered = checkpoint.load(tmp_path / "out" / "model_000004.pt")
    assert best["step"] == 4 and best["val_loss"] == 5.0
    assert same(best["model"], numbered["model"]) and same(best["optimizers"], numbered["optimizers"])
    assert final_state(tmp_path / "out")["best_val_loss"] == 5.0
    (tmp_path / "out" / "model_000006.pt").unlink()
    losses = {4: 5.0, 6: 8.0}
    train_best(tmp_path / "out")
    assert checkpoint.load(tmp_path / "out" / checkpoint.BEST)["step"] == 4
    assert final_state(tmp_path / "out")["best_val_loss"] == 5.0
    assert checkpoint.newest(tmp_path / "out").name == "model_000006.pt"  # which is what resumes
    assert train_gpt2.GPT.load(tmp_path / "out" / checkpoint.BEST).count_parameters() > 0


@pytest.mark.parametrize("fate", mostly_slow(["deleted", "damaged"]))
def test_a_best_checkpoint_that_is_lost_is_replaced_by_the_next_best(fate, shard_folder, tmp_path):
    def train_best():
        train(tmp_path / "out", shard_folder, val_every=2, keep_checkpoints=9, keep_best=True)

    train_best()
    best = tmp_path / "out" / checkpoint.BEST
    (tmp_path / "out" / "model_000006.pt").unlink()
    state = checkpoint.load(tmp_path / "out" / "model_000004.pt")
    del state["path"]
    checkpoint.save(tmp_path / "out", 4, {**state, "best_val_loss": 1.0})
    if fate == "deleted":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:5000])
    train_best()
    assert checkpoint.load(best)["step"] == 6


def test_a_best_checkpoint_that_cannot_be_written_does_not_count(shard_folder, tmp_path, monkeypatch):
    """As on a full disk: the step is lost, but not those after it that are better than what is kept."""
    losses, save = iter([9.0, 5.0, 6.0, 7.0]), checkpoint.save

    def full(folder, step, state, name="", *more, **options):
        if name == checkpoint.BEST and step == 2:
            raise files.CheckpointError("cannot write best.pt, is the disk full?")
        return save(folder, step, state, name, *more, **options)

    monkeypatch.setattr(train_gpt2, "evaluate_val_loss", lambda *arguments, **__: next(losses))
    monkeypatch.setattr(checkpoint, "save", full)
    train(tmp_path / "out", shard_folder, val_every=2, keep_best=True)
    assert checkpoint.load(tmp_path / "out" / checkpoint.BEST)["step"] == 4


def test_without_keep_best_there_is_none_and_it_may_be_added_later(shard_folder, tmp_path):
    train(tmp_path / "out", shard_folder)
    assert not (tmp_path / "out" / checkpoint.BEST).exists()
    assert final_state(tmp_path / "out")["best_val_loss"] == math.inf
    (tmp_path / "out" / "model_000006.pt").unlink()
    train(tmp_path / "out", shard_folder, keep_best=True)
    assert checkpoint.load(tmp_path / "out" / checkpoint.BEST)["step"] == 6


def test_a_branch_keeps_a_best_of_its_own(shard_folder, tmp_path, monkeypatch):
    train(tmp_path / "first", shard_folder, keep_best=True, checkpoint_every=0)
    state = final_state(tmp_path / "first")
    del state["path"]
    last = checkpoint.save(tmp_path / "first", 6, {**state, "best_val_loss": 1.0})
    train(tmp_path / "branch", shard_folder, keep_best=True, checkpoint_every=0, branch_from=last, max_steps=7)
    assert (tmp_path / "branch" / checkpoint.BEST).exists()


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_keep_the_best_and_the_steps_before_an_error(shard_folder, tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(ONE_RANK_FAILS)
    arguments = flags(data=shard_folder, out_dir=tmp_path / "out", checkpoint_every=0, keep_best=True)
    result = run(arguments, ranks=2, script=script)
    assert result.returncode != 0 and "ZeroDivisionError" in result.stderr
    assert (tmp_path / "out" / checkpoint.BEST).exists()
    assert [path.name for path in checkpoint.listing(tmp_path / "out")] == ["model_000003.pt"]
    assert len(read_log(tmp_path / "out", "train")) >= 3
