"""What a run records of itself - command, commit, origin - and what it takes for the same experiment.

    pytest tests/test_records.py
"""
import shlex
import subprocess
from dataclasses import asdict, replace

import pytest
import torch
from helpers import ROOT, flags, mostly_slow, posix, read_log, run

import train_gpt2
from plumbing import checkpoint, machine, ranks, run_folder, runlog
from plumbing.cli import UserError, check_values
from plumbing.files import CheckpointError
from plumbing.ranks import World
from train_gpt2 import MAY_CHANGE_ON_RESUME, PRESETS, TrainConfig, parse_args


def train(**changes) -> float:
    """Train in this process; returns the validation loss."""
    return train_gpt2.main(parse_args(flags(**changes)))


@pytest.mark.parametrize("name", ["max_steps", "max_lr", "keep_checkpoints"])
def test_true_is_no_number(name):
    with pytest.raises(UserError, match=f"--{name} is True, it must be a number from"):
        TrainConfig(**{name: True})


@pytest.mark.parametrize("config", [
    TrainConfig(), TrainConfig(**PRESETS["fast"]), TrainConfig(**PRESETS["demo"]),
    TrainConfig(**PRESETS["demo"] | {"seed": 3, "out_dir": "a b", "shuffle": False}),
    TrainConfig(**PRESETS["demo"] | {"compile": None}), TrainConfig(compile=True, sample_prompt="- it's"),
    TrainConfig(sample_prompt="", weight_decay=0.0, data="input.txt")])
def test_the_recorded_command_gives_the_same_settings(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edu_fineweb10B").mkdir()
    (tmp_path / "edu_fineweb10B" / "edufineweb_val_000000.npy").touch()
    (tmp_path / "input.txt").touch()
    program, script, *words = shlex.split(runlog.command_line(config, PRESETS, World()))
    assert (program, script) == ("python", "train_gpt2.py") and parse_args(words) == config


def test_the_recorded_command_is_short_and_names_the_launcher(monkeypatch):
    assert runlog.command_line(TrainConfig(), PRESETS, World()) == "python train_gpt2.py"
    demo = TrainConfig(**PRESETS["demo"], seed=2)
    assert runlog.command_line(demo, PRESETS, World()) == "python train_gpt2.py --preset demo --seed 2"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    eight, sixteen = (runlog.command_line(TrainConfig(), PRESETS, World(0, n)) for n in (8, 16))
    assert eight == "torchrun --standalone --nproc_per_node=8 train_gpt2.py"
    assert sixteen == "torchrun --nnodes=2 --nproc_per_node=8 train_gpt2.py"


def test_a_run_that_another_program_starts_records_its_own_command(shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["notebook.py", "--color=yes"])
    train(data=shard_folder, out_dir=tmp_path / "out", max_steps=2, compile=None)
    recorded = read_log(tmp_path / "out", "run")[0]["command"]
    assert parse_args(shlex.split(recorded)[2:]) == parse_args(
        flags(data=shard_folder, out_dir=tmp_path / "out", max_steps=2))
    assert f"\n{recorded}\n" in (tmp_path / "out" / "report.md").read_text()


def test_the_commit_is_that_of_the_repository_itself_and_tells_edits(tmp_path, monkeypatch):
    def git(*words, cwd) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        result = subprocess.run(["git", *identity, *words], cwd=cwd, check=True, capture_output=True, text=True)
        return result.stdout.strip()

    code = tmp_path / "code"
    code.mkdir()
    assert machine.commit(code) == ""
    git("init", "-q", cwd=tmp_path)
    (tmp_path / "thesis.tex").write_text("1")
    git("add", "thesis.tex", cwd=tmp_path)
    git("commit", "-qm", "x", cwd=tmp_path)
    assert machine.commit(code) == ""  # the repository around it is another project's
    git("init", "-q", cwd=code)
    assert machine.commit(code) == ""  # no commit yet
    (code / "a.py").write_text("1")
    git("add", "a.py", cwd=code)
    git("commit", "-qm", "x", cwd=code)
    git("tag", "v1", "-m", "x", cwd=code)
    head = git("rev-parse", "HEAD", cwd=code)
    assert machine.commit(code) == head
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook
    assert machine.commit(code) == head
    (code / "a.py").write_text("2")
    assert machine.commit(code) == f"{head}-dirty"


def spoil(path, **changes) -> None:
    """Change settings in a checkpoint; None takes one out."""
    state = checkpoint.load(path)
    settings = {name: value for name, value in (state["train_config"] | changes).items() if value is not None}
    checkpoint.save(path.parent, state["step"], {**state, "train_config": settings, "path": None})


@pytest.mark.parametrize("name, default, other", mostly_slow([
    ("decay_steps", 0, 2), ("branch_from", "", "x.pt"), ("optimizer", "adamw", "muon"), ("weight_decay", 0.1, 0.2)],
    kept=2))
def test_a_setting_that_a_checkpoint_lacks_counts_as_its_default(name, default, other, finished_copy):
    data, out = finished_copy
    spoil(out / "model_000006.pt", **{name: None})
    path = out / "model_000006.pt"
    config = parse_args(flags(data=data, out_dir=out))
    state = checkpoint.load(path)
    run_folder.check_same_experiment(replace(config, **{name: default}), state, MAY_CHANGE_ON_RESUME, path)
    with pytest.raises(UserError, match=f"--{name}|already holds a run"):
        run_folder.check_same_experiment(replace(config, **{name: other}), state, MAY_CHANGE_ON_RESUME, path)


@pytest.fixture
def finished_copy(shard_folder, tmp_path):
    """(data, out) of a finished run whose files may be changed."""
    train(data=shard_folder, out_dir=tmp_path / "out")
    return shard_folder, tmp_path / "out"


@pytest.mark.parametrize("changes", mostly_slow([
    {"micro_batch_size": "4"}, {"optimizer": "sgd"}, {"micro_batch_size": -1}, {"compile": "yes"}, {"max_steps": 1.5}],
    kept=2))
def test_settings_that_no_run_can_have_are_refused_by_name(changes, finished_copy):
    data, out = finished_copy
    spoil(out / "model_000006.pt", **changes)
    with pytest.raises(CheckpointError, match=rf"model_000006.pt has been changed: --{next(iter(changes))} is"):
        train(data=data, out_dir=out)


@pytest.mark.parametrize("step", [-1, 7])
def test_a_step_beyond_the_run_is_refused_by_name(step, finished_copy):
    data, out = finished_copy
    state = checkpoint.load(out / "model_000006.pt")
    torch.save({**state, "step": step}, out / "model_000008.pt")
    with pytest.raises(CheckpointError, match=rf"model_000008.pt has been changed: it is of step {step} of 6"):
        train(data=data, out_dir=out)


@pytest.mark.parametrize("spelled", mostly_slow(["./data", "moved", "data/", "link"], kept=2))
def test_the_same_data_spelled_otherwise_or_moved_continue(spelled, shard_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(data="data", out_dir="out", max_steps=4)
    if spelled == "moved":
        shard_folder.rename(tmp_path / "moved")
    if spelled == "link":
        (tmp_path / "link").symlink_to(shard_folder, target_is_directory=True)
    (tmp_path / "out" / "model_000004.pt").unlink()
    train(data=spelled, out_dir="out", max_steps=4)
    assert read_log("out", "run")[-1]["origin"] == "resumed after step 2"


@pytest.mark.parametrize("flag, spelled", mostly_slow([
    ("init_from", "moved.pt"), ("branch_from", "other.pt"),
    ("init_from", "./start.pt"), ("init_from", "other.pt"), ("init_from", "absent.pt"),
    ("branch_from", "./start.pt"), ("branch_from", "moved.pt"), ("branch_from", "absent.pt")], kept=2))
def test_initial_weights_are_known_by_what_they_are(flag, spelled, shard_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(data=shard_folder, out_dir="first", max_steps=6)
    (tmp_path / "first" / "model_000004.pt").rename("start.pt")
    (tmp_path / "first" / "model_000006.pt").rename("other.pt")
    train(data=shard_folder, out_dir="out", max_steps=8, **{flag: "start.pt"})
    (tmp_path / "out" / "model_000008.pt").unlink()
    if spelled == "moved.pt":
        (tmp_path / "start.pt").rename("moved.pt")
    if spelled in ("other.pt", "absent.pt"):
        with pytest.raises(UserError, match=f"has --{flag} start.pt, not {spelled}"):
            train(data=shard_folder, out_dir="out", max_steps=8, **{flag: spelled})
        return
    train(data=shard_folder, out_dir="out", max_steps=8, **{flag: spelled})
    assert read_log("out", "run")[-1]["origin"] == "resumed after step 6"


def test_a_tilde_that_the_shell_left_means_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_args(["--out_dir=~/run", "--data=~/data", "--sample_prompt=~ is a tilde"])
    assert (config.out_dir, config.data, config.sample_prompt) == (
        f"{tmp_path}/run", f"{tmp_path}/data", "~ is a tilde")
    check_values(config)
    assert asdict(config)["out_dir"] == f"{tmp_path}/run"


@pytest.mark.parametrize("environment", [
    {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"},
    {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "4"}, {"FLUX_JOB_SIZE": "2"}])
def test_copies_that_do_not_know_of_each_other_are_told_of_torchrun(environment, shard_folder, tmp_path):
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out"), **environment)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "several copies" in result.stderr and "torchrun --nnodes" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_single_process_in_a_larger_job_is_not_refused(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    ranks.check_launcher()
    assert "of SLURM's 8 tasks this is one process" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    ranks.check_launcher()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given, meant", [("--max-steps", "--max_steps"), ("--max_step", "--max_steps"),
                                          ("--no_shuffle", "--no-shuffle")])
def test_a_mistyped_flag_is_told_the_one_that_was_meant(given, meant):
    with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
        parse_args([given, "3"])


@posix
@pytest.mark.parametrize("script", ["train_gpt2", "fineweb", "hellaswag", "generate", "export_hf", "plot"])
def test_ctrl_c_while_a_command_is_imported_ends_in_one_line(script, tmp_path):
    interrupted = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    for name in ("numpy", "torch", "tqdm"):
        (tmp_path / f"{name}.py").write_text(interrupted)
    result = run([], script=ROOT / f"{script}.py", plain=True, PYTHONPATH=str(tmp_path), cwd=tmp_path)
    if script == "plot":  # it imports nothing that takes a while
        assert "no run below" in result.stderr
    else:
        assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")
