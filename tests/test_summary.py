"""What a run says before it starts and while it goes on: estimates, warnings, refusals, aligned lines, commands.

    pytest tests/test_summary.py
"""
import re
import shlex
import signal
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ENCODING, ROOT, flags, mostly_slow, needs, read_log, run, write_shards

import train_gpt2
from plumbing import cli, curve, machine, models, screen, summary
from plumbing.cli import UserError
from plumbing.ranks import World
from train_gpt2 import PRESETS, TrainConfig, parse_args

GPU = World(device=torch.device("cuda"))  # which no test here touches


class Windows:
    """What the estimate needs of a loader."""

    def __init__(self, n_windows: int):
        self.n_windows, self.shards = n_windows, []


def plan_of(config: TrainConfig, n_windows: int, n_val: int, flops_per_s: float, first_step: int = 0):
    """The plan of a 124M model without its weights."""
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=50304))
    about = {"flops_per_s": flops_per_s, "first_step": first_step}
    return summary.make_plan(config, model, (Windows(n_windows), Windows(n_val)), about)


def train(**changes) -> float:
    """Train in this process; returns the validation loss."""
    return train_gpt2.main(parse_args(flags(**changes)))


@pytest.fixture
def slow_machine(monkeypatch):
    """A machine that does one operation per second."""
    monkeypatch.setattr(machine, "measured_peak", lambda *_, **__: 1.0)


def test_the_estimate_counts_operations_as_the_papers_do():
    """10 billion tokens at 6N + 12LCT operations, and a third of that per token of 78 validations."""
    config = TrainConfig(micro_batch_size=4)
    plan = plan_of(config, n_windows=9_765_625, n_val=97_656, flops_per_s=4e14)
    N = 12 * (12 * 768**2 + 13 * 768) + 50304 * 768 + 2 * 768
    per_token = 6 * N + 12 * 12 * 768 * 1024
    tokens, validated = 19073 * 524288, (1 + 19073 // 250 + 1) * 10485760
    assert plan.seconds == pytest.approx(per_token * (tokens + validated / 3) / 4e14, rel=1e-9)
    assert plan.val_seconds / plan.seconds == pytest.approx(validated / 3 / (tokens + validated / 3))
    assert plan.epochs == pytest.approx(tokens / (9_765_625 * 1024))
    assert plan.state_bytes == 16 * (N + 1024 * 768)


def test_a_run_that_goes_on_counts_only_what_is_left():
    config = TrainConfig(micro_batch_size=4, val_every=0)
    whole = plan_of(config, 9_765_625, 1, 4e14)
    half = plan_of(config, 9_765_625, 1, 4e14, first_step=19073 // 2)
    assert half.seconds / whole.seconds == pytest.approx(0.5, rel=1e-3) and half.epochs == whole.epochs
    assert plan_of(config, 9_765_625, 1, 4e14, first_step=19073).seconds == 0


@pytest.mark.parametrize("changes, warning", [
    ({"max_steps": 700}, "the warmup of 715 steps does not end within the run: try --warmup_steps 70"),
    ({"max_steps": 19073, "n_windows": 4_000_000}, ""), ({"n_windows": 2_400_000}, "4.1 epochs"),
    ({"n_windows": 100, "max_steps": 800}, "4,096.0 epochs: beyond 4, a model memorizes"),
    ({"n_windows": 2000, "max_steps": 800}, "--max_steps 15 is 4 epochs"), ({"flops_per_s": 4e13}, "about 2.5 days")])
def test_what_is_unusual_is_a_warning(changes, warning):
    values = {"n_windows": 9_765_625, "n_val": 1, "flops_per_s": 4e14} | {
        key: value for key, value in changes.items() if key != "max_steps"}
    config = TrainConfig(micro_batch_size=4, max_steps=changes.get("max_steps", 19073))
    found = summary.warnings(config, plan_of(config, **values), GPU)
    assert not found if not warning else len(found) == 1 and warning in found[0]


def test_the_suggested_number_of_steps_is_free_of_the_warning():
    config = TrainConfig(micro_batch_size=4, warmup_steps=0)
    (warning,) = summary.warnings(config, plan_of(config, 100_000, 1, 4e14), GPU)
    fewer = replace(config, max_steps=int(re.search(r"--max_steps (\d+)", warning)[1]))
    assert not summary.warnings(fewer, plan_of(fewer, 100_000, 1, 4e14), GPU)


def test_a_large_model_on_a_cpu_is_told_of_the_small_one():
    config = TrainConfig(micro_batch_size=4, max_steps=2, warmup_steps=1)
    (warning,) = summary.warnings(config, plan_of(config, 10**6, 9, 1e11), World())
    assert "this model is large for cpu" in warning and "--preset demo --data edu_fineweb10B" in warning
    assert not summary.warnings(config, plan_of(config, 10**6, 9, 1e11), GPU)


def test_a_run_of_more_than_a_week_is_refused_and_yes_starts_it(shard_folder, tmp_path, slow_machine):
    changes = dict(data=shard_folder, out_dir=tmp_path / "out", max_steps=2)
    with pytest.raises(UserError, match=r"would take about .* years here \(cpu\): .*--yes"):
        train(**changes)
    assert not (tmp_path / "out" / "log.jsonl").exists() and not list(tmp_path.rglob("*.pt"))
    train(**changes, yes=True)
    assert len(read_log(tmp_path / "out", "train")) == 2
    train(**changes)  # it is finished: nothing is refused


def test_a_started_run_is_not_stopped_for_its_length_but_warned(shard_folder, tmp_path, monkeypatch, capsys):
    changes = dict(data=shard_folder, out_dir=tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(cli.Stopped):
        patch.setattr(train_gpt2.RunLog, "val", lambda log, step, *_, **__: step == 3 and signal.raise_signal(
            signal.SIGTERM))
        train(**changes)
    monkeypatch.setattr(machine, "measured_peak", lambda *_, **__: 1.0)
    capsys.readouterr()
    train(**changes)
    assert re.search("warning: this takes about .* years here", capsys.readouterr().out)


@pytest.mark.parametrize("val_every", mostly_slow([4, 0, 5, 100], kept=2))
def test_the_validations_that_are_counted_are_those_of_the_run(val_every, shard_folder, tmp_path):
    changes = dict(data=shard_folder, out_dir=tmp_path, max_steps=8, val_every=val_every)
    train(**changes)
    logged = [line["step"] for line in read_log(tmp_path, "val")]
    config = replace(parse_args(flags(**changes)), micro_batch_size=4)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(16, 50304, 2, 2, 16))
    one = 9 * 16 * machine.flops_per_token(model, 16) / 3
    for first in (0, 3, 4):
        about = {"flops_per_s": 1, "first_step": first}
        plan = summary.make_plan(config, model, (Windows(9), Windows(9)), about)
        assert round(plan.val_seconds / one) == len([step for step in logged if step > first or first == 0])


@pytest.mark.slow
@needs(*ENCODING)
def test_a_full_size_run_on_a_cpu_names_a_command_that_works_there(tmp_path):
    """The command that the refusal suggests, run as it stands but for fewer steps."""
    write_shards(tmp_path / "my shards", val=3000, train=(9000,))
    refused = run(["--data", "my shards", "--device", "cpu"], cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert "epochs: beyond 4, a model memorizes more than it learns" in refused.stdout
    program, _script, *words = shlex.split(re.search(r"`(python .*?)`", refused.stderr)[1])
    assert program == "python" and words == ["--preset", "demo", "--data", "my shards"]
    result = run([*words, "--max_steps", "3", "--warmup_steps", "1", "--val_tokens", "640", "--device", "cpu"],
                 cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "log" / "my shards" / "model_000003.pt").exists()


def test_a_run_that_memory_cannot_hold_is_refused(shard_folder, tmp_path, monkeypatch):
    model = train_gpt2.GPT(train_gpt2.GPTConfig(16, 50304, 2, 2, 16))
    monkeypatch.setattr(machine, "memory_bytes", lambda *_, **__: 8 * model.count_parameters())
    with pytest.raises(UserError, match=r"needs about \d+ MiB of memory, and cpu has 6 MiB: .*--yes"):
        train(data=shard_folder, out_dir=tmp_path / "out")


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    limits = {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "12345\n"}
    monkeypatch.setattr(machine.Path, "read_text", lambda path, *_, **__: limits[str(path)])
    assert machine.memory_bytes() == 12345


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_the_estimate_of_memory_is_near_the_peak(tmp_path):
    """What a fresh process needs for a pass, as the system counts it, against the estimate."""
    code = f"""
import re, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from train_gpt2 import GPT, GPTConfig
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
model = GPT(GPTConfig(512, 50304, 6, 4, 256))
idx = torch.zeros(1, 512, dtype=torch.int64)
model(idx, idx).backward()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
optimizer.step()
print((peak() - before) * 1024)
"""
    (tmp_path / "peak.py").write_text(code)
    result = run([], script=tmp_path / "peak.py", plain=True)
    measured = int(result.stdout)
    config = TrainConfig(micro_batch_size=1, sequence_length=512)
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(512, 50304, 6, 4, 256))
    plan = summary.make_plan(config, model, (Windows(9), Windows(9)), {"flops_per_s": 1, "first_step": 0})
    assert 0.6 < (plan.state_bytes + plan.pass_bytes) / measured < 1.7


@pytest.mark.parametrize("seconds, text", [
    (0.2, "1 second"), (61, "61 seconds"), (120, "2 minutes"), (3500, "58 minutes"), (5400, "1.5 hours"),
    (47 * 3600, "47 hours"), (3 * 86400, "3.0 days"), (400 * 86400, "1.1 years"), (1e12, "31,710 years")])
def test_durations_read_well(seconds, text):
    assert summary.duration(seconds) == text


def values_of(loss=10.8224, lr=6e-4, norm=1.0, seconds=0.2, speed=5000.0, mfu=None) -> dict:
    return dict(loss=loss, lr=lr, norm=norm, dt_ms=1000 * seconds, data_ms=0.0, tok_per_s=speed, mfu=mfu)


def test_columns_are_aligned_whatever_the_values():
    lines = screen.StepLines(TrainConfig())
    lines.count(1.0)
    rows = [lines.format(step, values_of(**values)) for step, values in [
        (1, {}), (19073, {"loss": 3.2, "norm": 0.1, "seconds": 1e-4, "speed": 3.7e6}), (7, {"loss": 1e9, "norm": 1e7}),
        (99, {"loss": float("nan"), "norm": float("inf"), "seconds": 2500, "speed": 3.0}), (5, {"seconds": 123.4})]]
    bars = [[match.start() for match in re.finditer(r"\|", row)] for row in rows]
    assert all(each == bars[0] for each in bars), rows
    assert "MFU" not in rows[0] and "| MFU 56.7% |" in lines.format(1, values_of(mfu=0.567))


@pytest.mark.parametrize("seconds, log_every, due", [
    (0.001, 0, [1000, 2000]), (0.06, 0, [40, 60]), (0.3, 0, [25, 30]), (0.5, 0, [22, 24]), (1.5, 0, [21, 22]),
    (100.0, 0, [21, 22]), (0.001, 7, [21, 28]), (100.0, 30, [30, 60])])
def test_after_twenty_steps_a_line_comes_about_each_second(seconds, log_every, due):
    lines, printed = screen.StepLines(TrainConfig(log_every=log_every)), []
    for step in range(1, 3001):
        lines.count(9 * seconds if step == 1 else seconds)  # the first step compiles
        printed += [step] * lines.is_due(step)
    assert printed[:20] == list(range(1, 21)) and [step for step in printed if step > 20][:2] == due
    assert lines.is_due(19073)


@pytest.mark.slow
def test_every_step_is_logged_whether_or_not_it_is_printed(shard_folder, tmp_path):
    result = run(flags(data=shard_folder, out_dir=tmp_path, max_steps=40, log_every=15))
    printed = [int(step) for step in re.findall(r"step +(\d+)/40 \| loss", result.stdout)]
    assert printed == [*range(1, 21), 30, 40]
    lines = read_log(tmp_path, "train")
    assert [line["step"] for line in lines] == list(range(1, 41)) and all(line["mfu"] is None for line in lines)
    assert re.findall(r"^step +\d+/40", result.stdout, re.MULTILINE)[0] == "step  0/40"


def test_nothing_is_said_to_be_configured_and_one_thread_is_singular(shard_folder, tmp_path):
    result = run(flags(data=shard_folder, out_dir=tmp_path, max_steps=1, warmup_steps=0, compile=False))
    rows = dict(re.findall(r"^ *(\w+) \| (.*)$", result.stdout, re.MULTILINE))
    assert (rows["device"], rows["dtype"], rows["compile"]) == ("cpu, 1 thread", "float32", "no")
    assert "1 step," in rows["schedule"]


@pytest.mark.slow
@needs(*ENCODING, "transformers", "matplotlib")
def test_the_last_lines_are_commands_that_work_from_any_folder(shard_folder, tmp_path):
    """Each command under the result, run as it stands, from a folder that is not the repository's."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    result = run(flags(data=shard_folder, out_dir="log/it's", sample_prompt="It's"), cwd=folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"finished: validation loss 10\.\d{4} -> \d+\.\d{4} after 6 steps", result.stdout)
    commands = re.findall(r"^  [a-z ]+: +python (.*)$", result.stdout, re.MULTILINE)
    assert [screen.Path(shlex.split(words)[0]).name for words in commands] == ["generate.py", "plot.py", "export_hf.py"]
    for script, *words in map(shlex.split, commands):
        result = run(words, script=script, cwd=folder)
        assert result.returncode == 0, (script, result.stderr)


def test_bold_type_is_for_terminals_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.bold("x") == "x"  # pytest's stdout is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda *_, **__: True, raising=False)
    assert cli.bold("x") == "\033[1mx\033[0m"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert cli.bold("x") == "x"


def test_an_own_text_or_folder_gets_a_run_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("text")
    write_shards(tmp_path / "shards.d")
    (tmp_path / "input.txt").touch()
    assert parse_args(["--data", "my.txt"]).out_dir == "log/my"
    assert parse_args(["--data", "shards.d/", "--preset", "demo"]).out_dir == "log/shards"
    assert parse_args(["--data", "my.txt", "--out_dir", "x"]).out_dir == "x"
    assert parse_args(["--data", "shards.d"]).out_dir == "log/shards"
    assert parse_args(["--data", "my.txt", "--preset", "gpt2"]).out_dir == "log/my"
    assert parse_args(["--data", "edu_fineweb10B"]).out_dir == parse_args(["--preset", "gpt2"]).out_dir == "log"
    assert parse_args([]).out_dir == parse_args(["--data", "input.txt"]).out_dir == PRESETS["demo"]["out_dir"]


def test_a_change_of_the_script_is_told_when_a_run_goes_on(shard_folder, tmp_path, monkeypatch, capsys):
    changes = dict(data=shard_folder, out_dir=tmp_path / "out")
    for script in ("a", "a", "b"):
        with monkeypatch.context() as patch, pytest.raises(cli.Stopped):
            patch.setattr(machine, "versions", lambda *_, script=script, **__: {"script": script})
            patch.setattr(train_gpt2.RunLog, "train", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
            train(**changes)
        assert ("train_gpt2.py has changed" in capsys.readouterr().out) == (script == "b")


def test_all_flags_that_a_command_lacks_are_named_at_once(shard_folder, tmp_path):
    """For a run that goes on and for a branch of it: with the flags that the error names it works."""
    train(data=shard_folder, out_dir=tmp_path / "out", max_steps=4)
    for changes in ({"out_dir": tmp_path / "out"}, {"out_dir": tmp_path / "b", "max_steps": 8,
                                                    "branch_from": tmp_path / "out" / "model_000004.pt"}):
        given = {"data": shard_folder, "dtype": "float32", "device": "cpu", "hellaswag_every": 0, "sample_every": 0,
                 "micro_batch_size": 4, **changes}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        with pytest.raises(UserError) as error:
            train_gpt2.main(parse_args(words))
        assert ("a branch keeps the other settings" in str(error.value)) == ("branch_from" in changes)
        missing = shlex.split(re.search(r"(?:continue with|, add) ([^,]*)", str(error.value))[1])
        assert {"--n_layer", "--n_embd", "--total_batch_size", "--sequence_length"} <= set(missing)
        train_gpt2.main(parse_args([*words, *missing]))


def test_a_command_is_told_as_it_works_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert screen.here("python train_gpt2.py --data 'a b'") == "python train_gpt2.py --data 'a b'"
    (tmp_path / "x y").mkdir()
    monkeypatch.chdir(tmp_path / "x y")
    for command in ("python train_gpt2.py --seed 1", "torchrun --standalone --nproc_per_node=2 train_gpt2.py --seed 1"):
        script = next(word for word in shlex.split(screen.here(command)) if word.endswith("train_gpt2.py"))
        assert screen.Path(script).resolve() == ROOT / "train_gpt2.py" and screen.here("") == ""


@pytest.mark.slow
@pytest.mark.parametrize("log_every, said", [(7, True), (1, False)])
def test_it_is_said_once_from_where_on_steps_have_no_line(log_every, said, shard_folder, tmp_path, capsys):
    train(data=shard_folder, out_dir=tmp_path, max_steps=42, val_every=0, log_every=log_every)
    lines = capsys.readouterr().out.splitlines()
    told = [i for i, line in enumerate(lines) if line.startswith("from here on not every step has a line")]
    assert len(told) == said and all(lines[i - 1].startswith("step 20/42 | loss") for i in told)


def test_a_gpu_that_cannot_hold_the_weights_refuses_the_run(monkeypatch):
    config, about = TrainConfig(micro_batch_size=4), {"resumed_from": None, "command": "python train_gpt2.py"}
    plan = plan_of(config, 9_765_625, 9, 4e14)
    monkeypatch.setattr(machine, "gpu_bytes", lambda *_, **__: plan.state_bytes)
    summary.check(config, plan, GPU, about)
    monkeypatch.setattr(machine, "gpu_bytes", lambda *_, **__: plan.state_bytes - 1)
    with pytest.raises(UserError, match=r"needs about 1,899 MiB of memory, and cuda has .*: use a smaller --model"):
        summary.check(config, plan, GPU, about)
    summary.check(replace(config, yes=True), plan, GPU, about)


def test_evaluation_on_fewer_tokens_than_the_run_s_is_noted(shard_folder, tmp_path, capsys):
    train(data=shard_folder, out_dir=tmp_path, max_steps=2)
    capsys.readouterr()
    for val_tokens in (320, 160):
        train(data=shard_folder, out_dir=tmp_path, max_steps=2, eval_only=True, val_tokens=val_tokens)
        noted = "note: the run has --val_tokens 320, this evaluates 160" in capsys.readouterr().out
        assert noted == (val_tokens == 160)


def test_a_warmup_longer_than_the_run_is_what_a_decay_is_refused_for():
    with pytest.raises(UserError, match="--warmup_steps is 30, it must be at most max_steps, 20, to use --decay_steps"):
        TrainConfig(max_steps=20, warmup_steps=30, decay_steps=5)
    TrainConfig(max_steps=20, warmup_steps=30)


def test_the_samples_are_among_the_lines_of_a_log(shard_folder, tmp_path):
    train(data=shard_folder, out_dir=tmp_path, max_steps=2, sample_every=2)
    samples = [line for line in curve.read_log(tmp_path) if line["kind"] == "sample"]
    assert samples == read_log(tmp_path, "sample") and [line["step"] for line in samples] == [0, 2]


def test_a_run_whose_only_checkpoint_is_damaged_is_not_recommended(tmp_path):
    (tmp_path / "model_000004.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"is whole: restore one from a copy, or train again$"):
        models.find(tmp_path)


def test_new_weights_are_no_best_checkpoint(shard_folder, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(cli.Stopped):
        patch.setattr(train_gpt2.RunLog, "train", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        patch.setattr(train_gpt2.RunLog, "val", lambda log, step, *_, **__: seen.append(step))
        seen = []
        train(data=shard_folder, out_dir=tmp_path, keep_best=True, val_every=3)
    assert seen == [0] and not (tmp_path / "best.pt").exists()
