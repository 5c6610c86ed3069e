"""Every mistake a user can make ends in exit code 2 and one line that says what to do.

    pytest tests/test_errors.py
"""
import contextlib
import io
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import ENCODING, error_of, flags, needs, read_log, run, spoil, write_shards

import train_gpt2
from plumbing import checkpoint


def train(arguments) -> float:
    """Run train_gpt2.py in this process."""
    return train_gpt2.main(train_gpt2.parse_args(list(map(str, arguments))))


def refusal(arguments) -> str:
    """The one line with which training refuses, in this process; nothing else may be on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        line = error_of(train, arguments)
    assert said.getvalue() == ""
    return line


def refusal_of_command(arguments, **environment) -> str:
    """The same of the real command, which must end with exit code 2."""
    result = run(arguments, **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize("changes, message", [({"max_step": 3}, "unrecognized arguments: --max_step"),
                                              ({"data": "nowhere"}, "no data 'nowhere': --data takes a folder of")])
def test_the_command_ends_with_one_line_and_code_2(changes, message, tmp_path):
    assert message in refusal_of_command(flags(out_dir=tmp_path / "out", **changes))


@pytest.mark.parametrize("arguments, message", [
    (["--max_step", "3"], "unrecognized arguments: --max_step"),
    (["--recipe", "fast"], "--recipe is now --preset"),
    (["--recipe=fast"], "--recipe is now --preset"),
    (["--preset", "slow"], "--preset: invalid choice: 'slow' (choose from"),
    (["--logger", "file"], "--logger is 'file', it must be tensorboard, wandb or trackio"),
    (["--decay", "sudden"], "--decay is 'sudden', it must be cosine or linear"),
    (["--max_steps", "99", "--warmup_steps", "19", "--decay_steps", "81"], "at most max_steps - warmup_steps, 80"),
    (["--branch_from", "missing.pt"], "no checkpoint missing.pt"),
    (["--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
    (["--max_steps"], "--max_steps: expected one argument"),
    (["--max_steps", "-1"], "--max_steps is -1, it must be a number from 0"),
    (["--max_lr", "nan"], "--max_lr is nan, it must be a number from 0"),
    (["--max_lr", "inf"], "--max_lr is inf"),
    (["--hellaswag_every", "0", "--hellaswag_data", "x.jsonl"], "--hellaswag_every is 0, it must be more than 0"),
    (["--hellaswag_every", "0", "--hellaswag_limit", "9"], "--hellaswag_every is 0, it must be more than 0 to use"),
    (["--min_lr", "1"], "--min_lr is 1.0, it must be at most max_lr"),
    (["--total_batch_size", "0"], "--total_batch_size is 0, it must be a number from 1"),
    (["--keep_checkpoints", "0"], "--keep_checkpoints is 0, it must be a number from 1"),
    (["--seed", "99999999999"], "--seed is 99999999999, it must be a number from 0 to 2**32 - 1"),
    (["--model", "gpt5"], "--model is 'gpt5', it must be one of gpt2, gpt2-medium"),
    (["--optimizer", "sgd"], "--optimizer is 'sgd', it must be adamw or muon"),
    (["--dtype", "int8"], "--dtype is 'int8', it must be auto, float32, bfloat16 or float16"),
    (["--n_embd", "33", "--n_head", "2"], "n_embd 33 must be a multiple of n_head 2"),
    (["--data", "nowhere"], "no data 'nowhere': --data takes a folder of token shards or a text file"),
    (["--init_from", "gpt5"], "no model 'gpt5': name a folder, a .pt file or one of gpt2"),
    (["--init_from", "missing.pt"], "no checkpoint missing.pt"),
    (["--device", "cuda:7"], "no device 'cuda:7' for process 0"),
    (["--device", "abacus"], "--device takes auto, cpu, cuda, cuda:N or mps"),
    (["--data", ""], "--data is '', it must be a name or a path"),
    (["--total_batch_size", "1000"], "make it 896 or 1024"),
    (["--micro_batch_size", "3"], "of micro_batch_size x sequence_length x ranks = 384: make it 384 or 768, or change"),
    (["--total_batch_size", "100"], "= 128: make it 128"),
])
def test_wrong_flags_and_values(arguments, message, tmp_path):
    unchanged = ["--total_batch_size", "512", "--sequence_length", "128", "--no-compile"]  # which is tried first
    assert message in refusal(["--out_dir", str(tmp_path / "out"), *unchanged, *arguments])


@pytest.mark.parametrize("how, message", [
    ("no folder", "no data"), ("empty", "no train shards in"), ("no val", "no val shards in"),
    ("truncated", "edufineweb_train_000001.npy cannot be used"), ("dtype", "not one row of uint16"),
    ("pickled", "edufineweb_train_000001.npy cannot be used"), ("vocabulary", "holds the token 60000"),
    ("short", "is shorter than one window of 16 + 1 tokens"), ("text binary", "is not a UTF-8 text file"),
    pytest.param("text short", "is shorter than one window", marks=needs(*ENCODING)),
    ("text empty", "text.txt is empty: name a file with text"),
])
def test_data_that_cannot_be_used(how, message, tmp_path):
    data = write_shards(tmp_path / "data")
    if how == "no folder":
        data = tmp_path / "nowhere"
    elif how == "empty":
        data = tmp_path / "empty"
        data.mkdir()
    elif how == "no val":
        (data / "edufineweb_val_000000.npy").unlink()
    elif how == "vocabulary":
        np.save(data / "edufineweb_train_000001.npy", np.full(400, 60000, dtype=np.uint16))
    elif how == "short":
        np.save(data / "edufineweb_val_000000.npy", np.zeros(16, dtype=np.uint16))
    elif how.startswith("text"):
        data = tmp_path / "text.txt"
        data.write_bytes({"text short": b"too short a text", "text empty": b"", "text binary": b"\xff\xfe\x00"}[how])
    else:
        spoil(data, how)
    assert message in refusal(flags(data=data, out_dir=tmp_path / "out"))


@pytest.mark.parametrize("changes, message", [
    ({"n_embd": 32}, "has --n_embd 16, not 32"),
    ({"max_steps": 9}, "not 9: continue with --max_steps 6; to train longer, or under another schedule, use --branch"),
    ({"seed": 7}, "has --seed 1337, not 7"), ({"dtype": "bfloat16"}, "has --dtype float32, not bfloat16"),
    ({"shuffle": False}, "has --shuffle True, not False"),
])
def test_the_run_of_another_experiment_is_not_resumed(changes, message, finished_run):
    data, out = finished_run
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = refusal(flags(data=data, out_dir=out, **changes))
    assert message in line and "--out_dir" in line
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}  # nothing is lost


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    data = write_shards(folder / "data")
    train(flags(data=data, out_dir=folder / "out"))
    return data, folder / "out"


def test_what_may_differ_when_resuming(finished_run, tmp_path, capsys):
    """The folder is copied elsewhere, its last checkpoint is gone, and what adapts to the machine is set otherwise."""
    data, out = finished_run
    shutil.copytree(out, tmp_path / "moved")
    (tmp_path / "moved" / "model_000006.pt").unlink()
    train(flags(data=data, out_dir=tmp_path / "moved", micro_batch_size=2, keep_checkpoints=3, val_every=1,
                compile=False, checkpoint_every=1))
    assert "resumed after step 4" in capsys.readouterr().out
    losses = [[line["loss"] for line in read_log(folder, "train")] for folder in (out, tmp_path / "moved")]
    np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)
    assert len(list((tmp_path / "moved").glob("*.pt"))) == 3


def test_data_that_have_changed_are_not_trained_on(tmp_path):
    data = write_shards(tmp_path / "data")
    train(flags(data=data, out_dir=tmp_path / "out"))
    write_shards(data, train=(1500, 950))
    assert "the data have 152 windows to train on, they had 149" in refusal(flags(data=data, out_dir=tmp_path / "out"))


def test_checkpoints_that_are_not_ours(finished_run, tmp_path):
    data, _ = finished_run
    out = tmp_path / "out"
    out.mkdir()
    torch.save({"weights": torch.zeros(3)}, out / "model_000005.pt")
    assert "no checkpoint in" in refusal(flags(data=data, out_dir=out))
    assert (out / "model_000005.pt").exists()
    settings = asdict(train_gpt2.parse_args(flags(data=data, out_dir=out)))
    state = {key: kind() for key, kind in checkpoint.KEYS.items()} | {"model_config": {"n_layer": 1}}
    checkpoint.save(out, 6, {**state, "train_config": settings})
    assert "the weights in" in refusal(flags(data=data, out_dir=out))


def test_an_output_folder_that_cannot_be_written(shard_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot write to" in refusal(flags(data=shard_folder, out_dir=tmp_path / "file"))
    assert "cannot write to /proc/nowhere" in refusal(flags(data=shard_folder, out_dir="/proc/nowhere"))


def test_more_ranks_than_gpus_are_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "0 CUDA" in refusal(["--device", "cuda"])


def test_a_missing_package_is_named_with_its_remedy(tmp_path):
    (tmp_path / "tiktoken.py").write_text("raise ModuleNotFoundError(\"No module named 'tiktoken'\")")
    (tmp_path / "text.txt").write_text("some text " * 100)
    line = refusal_of_command(flags(data=tmp_path / "text.txt", out_dir=tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert "No module named 'tiktoken': run pip install -r requirements.txt" in line


@pytest.mark.parametrize("rank, world_size", [("x", "2"), ("1", "1"), ("-1", "2"), ("0", ""), ("0", "2")])
def test_ranks_that_torchrun_did_not_set(rank, world_size, shard_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert "use torchrun, or unset these variables" in refusal(flags(data=shard_folder, out_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_an_error_of_one_rank_stops_them_all(shard_folder, tmp_path):
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out", total_batch_size=64 * 3), ranks=2)
    assert result.returncode == 1
    assert "rank 0: error: --total_batch_size 192 is not a multiple of" in result.stderr
