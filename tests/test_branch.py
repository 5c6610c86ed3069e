"""Runs that begin from a checkpoint of another one, and evaluations that a kill must not cost anything.

    pytest tests/test_branch.py
"""
import json

import pytest
from helpers import ENCODING, ROOT, final_state, flags, mostly_slow, needs, read_log, run, same, write_shards

import train_gpt2
from plumbing.cli import UserError
from train_gpt2 import parse_args

INJECT = ROOT / "tests" / "faults" / "inject.py"


def train(shard_folder, out, **changes) -> float:
    return train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=out, **changes)))


def numbers(folder, after: int = 0) -> list:
    """What the log has of the steps after `after`, but for times."""
    lines = read_log(folder, "train") + read_log(folder, "val")
    return [(line["kind"], line["step"], line["loss"], line.get("norm"), line.get("lr")) for line in lines
            if line["step"] > after]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_branch_under_the_same_schedule_is_the_run_that_went_on(optimizer, shard_folder, tmp_path):
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    changes = {"optimizer": optimizer, "keep_checkpoints": 9}
    train(shard_folder, whole, **changes)
    train(shard_folder, branch, branch_from=whole / "model_000002.pt", **changes)
    assert numbers(branch) == numbers(whole, after=2)
    one, other = final_state(whole), final_state(branch)
    assert all(same(one[key], other[key]) for key in ("model", "optimizers", "step", "val_loss", "data"))
    assert read_log(branch, "run")[0]["origin"] == f"step 2 of {whole / 'model_000002.pt'}"


@pytest.mark.slow
def test_a_decay_branched_from_the_stable_phase_is_the_run_that_had_it_from_the_start(shard_folder, tmp_path):
    stable = {"decay": "linear", "keep_checkpoints": 9, "warmup_steps": 2}
    train(shard_folder, tmp_path / "long", **stable, max_steps=20, decay_steps=5)
    train(shard_folder, tmp_path / "short", **stable, max_steps=10, decay_steps=4)
    train(shard_folder, tmp_path / "branch", **stable, max_steps=10, decay_steps=4,
          branch_from=tmp_path / "long" / "model_000006.pt")
    assert numbers(tmp_path / "branch", after=6) == numbers(tmp_path / "short", after=6)
    assert [line["lr"] for line in read_log(tmp_path / "branch", "train")] == pytest.approx(
        [0.01, 0.00775, 0.0055, 0.00325])
    one, other = final_state(tmp_path / "short", 10), final_state(tmp_path / "branch", 10)
    assert all(same(one[key], other[key]) for key in ("model", "optimizers"))


def test_a_finished_run_is_extended_by_a_branch_and_its_refusal_says_so(shard_folder, tmp_path):
    train(shard_folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"continue with --max_steps 6; to train longer.* use --branch_from") as error:
        train(shard_folder, tmp_path / "out", max_steps=9)
    named = str(error.value).split("--branch_from ")[1].split()[0]
    train(shard_folder, tmp_path / "longer", max_steps=9, branch_from=named)
    assert [line["step"] for line in read_log(tmp_path / "longer", "train")] == [7, 8, 9]


def test_the_same_command_resumes_a_branch(shard_folder, tmp_path):
    train(shard_folder, tmp_path / "first")
    changes = {"max_steps": 12, "branch_from": tmp_path / "first" / "model_000006.pt", "keep_checkpoints": 9}
    for name in ("whole", "cut"):
        train(shard_folder, tmp_path / name, **changes)
    for path in (tmp_path / "cut").glob("model_*.pt"):
        if path.name > "model_000008.pt":
            path.unlink()
    train(shard_folder, tmp_path / "cut", **changes)
    assert read_log(tmp_path / "cut", "run")[-1]["origin"] == "resumed after step 8"
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("changes, message", mostly_slow([
    ({"seed": 7}, "has --seed 1337, not 7"), ({"total_batch_size": 64}, "has --total_batch_size 128, not 64"),
    ({"optimizer": "muon"}, "has --optimizer adamw, not muon"), ({"shuffle": False}, "has --shuffle True, not False"),
    ({"weight_decay": 0.2}, "has --weight_decay 0.1, not 0.2"),
], kept=2))
def test_a_branch_keeps_data_model_and_optimizer(changes, message, shard_folder, tmp_path):
    if not (tmp_path / "first").exists():
        train(shard_folder, tmp_path / "first")
    with pytest.raises(UserError, match=message):
        train(shard_folder, tmp_path / "branch", branch_from=tmp_path / "first" / "model_000006.pt", **changes)
    assert not list((tmp_path / "branch").glob("*.pt"))


@needs(*ENCODING)
@pytest.mark.parametrize("checkpoint_every, place, number", mostly_slow([
    (0, "validation", 8), (0, "hellaswag", 1), (0, "sample", 2),
    (6, "validation", 8), (6, "hellaswag", 1), (6, "sample", 2)]))
def test_a_kill_in_the_last_evaluations_costs_no_step(checkpoint_every, place, number, shard_folder, tmp_path):
    """The checkpoint of the last step is there before they begin; nothing is trained again, and the log is whole."""
    changes = {"data": shard_folder, "val_every": 0, "sample_every": 6, "checkpoint_every": checkpoint_every,
               "hellaswag_every": 6, "hellaswag_limit": 2, "hellaswag_data": ROOT / "tests/hellaswag_examples.jsonl"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert run(flags(**changes, out_dir=whole)).returncode == 0
    result = run(flags(**changes, out_dir=killed), script=INJECT, FAULT=f"kill:{place}:{number}")
    assert result.returncode == -9 and (killed / "model_000006.pt").exists(), result.stdout + result.stderr
    again = run(flags(**changes, out_dir=killed))
    assert again.returncode == 0 and "resumed after step 6" in again.stdout and "| loss" not in again.stdout
    assert numbers(killed) == numbers(whole)
    for kind in ("sample", "hellaswag"):
        assert read_log(killed, kind) == read_log(whole, kind)
    before = (killed / "log.jsonl").read_bytes()
    last = run(flags(**changes, out_dir=killed))  # now it is finished: nothing is evaluated again
    assert last.returncode == 0 and "| validation loss" not in last.stdout and "finished" in last.stdout
    assert (killed / "log.jsonl").read_bytes() == before


def test_what_is_no_branch_is_told(shard_folder, tmp_path):
    first, last = tmp_path / "first", tmp_path / "first" / "model_000006.pt"
    train(shard_folder, first)
    with pytest.raises(UserError, match=rf"--branch_from takes a .pt file, such as {last}"):
        train(shard_folder, tmp_path / "out", max_steps=9, branch_from=first)
    assert not (tmp_path / "out").exists()  # nothing is left where nothing was begun
    with pytest.raises(UserError, match=rf"{first} already holds a run: choose another --out_dir for the branch"):
        train(shard_folder, first, branch_from=last)


def test_eval_only_needs_a_checkpoint_and_tells_of_other_data(shard_folder, tmp_path, capsys):
    with pytest.raises(UserError, match=r"no checkpoint in \S+: name a run's --out_dir, or --init_from"):
        train(shard_folder, tmp_path / "none", eval_only=True)
    assert not (tmp_path / "none").exists()
    train(shard_folder, tmp_path / "out")
    other = write_shards(tmp_path / "other", seed=1)
    train(other, tmp_path / "out", eval_only=True)
    assert f"note: the run was trained on {shard_folder}, this evaluates on {other}" in capsys.readouterr().out


def test_a_branch_must_go_beyond_its_checkpoint(shard_folder, tmp_path):
    train(shard_folder, tmp_path / "first")
    for max_steps in (3, 6):
        with pytest.raises(UserError, match=rf"--max_steps is {max_steps}, it must be more than the 6 steps of"):
            train(shard_folder, tmp_path / "out", max_steps=max_steps,
                  branch_from=tmp_path / "first" / "model_000006.pt")


def test_eval_only_added_to_the_run_s_own_command_evaluates_the_run(shard_folder, tmp_path):
    """Otherwise --init_from is what is evaluated, also in the folder of a run."""
    first = train(shard_folder, tmp_path / "first")
    tuned = {"out_dir": tmp_path / "tuned", "init_from": tmp_path / "first", "max_steps": 4, "max_lr": 0.02}
    last = train_gpt2.main(parse_args(flags(data=shard_folder, **tuned)))
    assert train_gpt2.main(parse_args(flags(data=shard_folder, **tuned, eval_only=True))) == last != first
    del tuned["init_from"]
    assert train_gpt2.main(parse_args(flags(data=shard_folder, **tuned, eval_only=True))) == last
    tuned["init_from"] = tmp_path / "first" / "model_000006.pt"
    assert train_gpt2.main(parse_args(flags(data=shard_folder, **tuned, eval_only=True))) == first


def test_eval_only_evaluates_what_is_there_and_changes_nothing(shard_folder, tmp_path):
    loss = train(shard_folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert train(shard_folder, tmp_path / "out", eval_only=True, max_steps=99, seed=3) == loss
    lines = [json.loads(line) for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines()]
    assert [(line["kind"], line.get("step")) for line in lines] == [("run", None), ("val", 6)]
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}
    assert train(shard_folder, tmp_path / "other", eval_only=True,
                 branch_from=tmp_path / "out" / "model_000006.pt") == loss
