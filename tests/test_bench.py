"""The benches: bench.gpu, which is meant for a GPU, at toy size on the CPU, and the flags of all of them.

    pytest tests/test_bench.py
"""
import dataclasses
import json
import re
import subprocess
import sys

import pytest
from helpers import BENCHES, ROOT, bench_module, mostly_slow

from bench import gpu
from plumbing.cli import UserError, parse_flags

TOY = ["--device", "cpu", "--model", "demo", "--sequence_length", "64", "--total_batch_size", "512", "--steps", "4",
       "--batch", "4", "--repeats", "1", "--train_seconds", "4"]
REPORT = """
import json, sys
from pathlib import Path
from bench import gpu

folder, seconds, parts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
report = gpu.Report(gpu.BenchConfig(device="cpu", out=folder, seconds=seconds), Path(folder))
for name, code, least, cap in parts:
    if report.run(name, ["-c", code], least=least, cap=cap):
        report.row(name, "fine")
sys.exit(report.failed)
"""  # runs a Report of parts (name, code, least, cap)
SLEEP = "import time; print('asleep', flush=True); time.sleep(600)"


def bench(*arguments, timeout=400) -> subprocess.CompletedProcess:
    """Run python with these arguments in the root of the repository."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout, stdin=subprocess.DEVNULL)


def rows_of(path) -> dict[str, dict]:
    """Read the rows of a JSON file -> {part: row}."""
    return {row["part"]: row for row in json.loads(path.read_text())["rows"]}


def headings(path) -> list[str]:
    """Return the names of the parts in a log."""
    return re.findall("^===== (.+) =====$", path.read_text(), re.MULTILINE)


def names(rows: dict[str, dict], state: str) -> set[str]:
    """Return the parts in that state."""
    return {name for name, row in rows.items() if row["state"] == state}


@pytest.mark.parametrize("name", mostly_slow(BENCHES))
def test_bench_starts_as_a_module_and_refuses_an_unknown_flag_in_one_line(name):
    result = bench("-m", f"bench.{name}", "--no_such_flag")
    assert result.returncode == 2 and re.fullmatch("error: .*--no_such_flag.*\n", result.stderr), result.stderr


@pytest.mark.parametrize("name", BENCHES)
def test_bench_lists_every_setting_as_a_flag(name, capsys):
    config = bench_module(name).BenchConfig
    with pytest.raises(SystemExit):
        parse_flags(config, ["--help"], "")
    listed = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert {field.name for field in dataclasses.fields(config)} <= listed


@pytest.mark.parametrize("model, first_loss", [("gpt2", 10.979), ("demo", 10.839)])
def test_gpu_bench_expects_the_first_loss_of_random_weights(model, first_loss):
    assert gpu.fill_in(gpu.BenchConfig(model=model)).first_loss == first_loss


@pytest.mark.slow
def test_window_1_of_the_gpu_bench_runs_on_a_cpu(tmp_path):
    result = bench("-m", "bench.gpu", *TOY, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = rows_of(tmp_path / "gpu1.json")
    trained = {"the default run", "the same, compile cache warm", "B=4", "eager"}
    assert names(rows, "failed") == set()
    assert names(rows, "left out") == {"tests, eager", "flash attention", "tests, compiled", "goal: tokens/s",
                                       "goal: first step, cold", "goal: first step, warm"}
    assert names(rows, "done") == trained | {
        "tokens", "versions", "attention in training", "attention in decoding", "loss of the first eager step",
        "attention in the default run", "device-to-host copies per step", "in the profile of a step",
        "generation, B=1", "generation, B=8", "HellaSwag"}
    for name in trained:
        figures = rows[name]["values"]
        assert figures["tokens_per_s"] > 0 and figures["first_step_s"] > 0 and len(figures["loss"]) == 4
    assert [rows[name]["values"]["B"] for name in ("the default run", "B=4")] == [8, 4]
    assert rows["B=4"]["values"]["loss"] == pytest.approx(rows["eager"]["values"]["loss"], abs=0.02)
    assert headings(tmp_path / "gpu1.log") == ["versions", "the default run", "the same, compile cache warm", "B=4",
                                               "eager", "generation", "HellaSwag"]
    assert "step     4/19073 | loss" in (tmp_path / "gpu1.log").read_text()  # what training itself prints
    for name, row in rows.items():
        assert f"{name:>36} | {row['text']}\n" in result.stdout


@pytest.mark.slow
def test_window_2_of_the_gpu_bench_runs_on_a_cpu(tmp_path):
    result = bench("-m", "bench.gpu", *TOY, "--out", tmp_path, "--window", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = rows_of(tmp_path / "gpu2.json")
    assert names(rows, "failed") == set()
    assert names(rows, "left out") - {"loss curve"} == {
        "demo, measured", "coordinate_descent_tuning", "max-autotune-no-cudagraphs", "eager, 60 % of the memory taken",
        "compiled, 60 % of the memory taken"}
    assert names(rows, "done") - {"loss curve"} == {
        "tokens", "training from fresh weights", "float16", "peak at B=1, demo, plain",
        "peak at B=1, demo, checkpointing", "eager"}
    assert rows["float16"]["values"]["dtype"] == "float16"
    trained = rows["training from fresh weights"]["values"]
    logged = [json.loads(line) for line in (tmp_path / "gpu2.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged if line["kind"] == "train"] == trained["loss"]
    assert sum(trained["seconds"][1:]) < 10  # it stops after four, not after the schedule's 19,073 steps
    if rows["loss curve"]["state"] == "done":
        assert (tmp_path / "gpu2.png").read_bytes().startswith(b"\x89PNG")
    assert headings(tmp_path / "gpu2.log")[0] == "training from fresh weights"
    assert {"float16", "demo", "eager"} <= set(headings(tmp_path / "gpu2.log"))


def run_report(folder, seconds: int, *parts) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """Run a Report of these parts -> (the finished process, {part: text of its row})."""
    result = bench("-c", REPORT, folder, seconds, json.dumps(parts))
    return result, {name: row["text"] for name, row in rows_of(folder / "gpu1.json").items()}


@pytest.mark.slow
def test_gpu_bench_goes_on_after_a_part_that_fails(tmp_path):
    broken = "for i in range(100, 140): print(i)\nraise RuntimeError('the reason')"
    result, rows = run_report(tmp_path, 100, ("broken", broken, 1, 50), ("hanging", SLEEP, 1, 2),
                              ("sound", "print('fine')", 1, 50))
    assert result.returncode == 1, result.stderr
    assert rows == {"broken": "failed: exit code 1", "hanging": "failed: not done in 2 s", "sound": "fine"}
    shown = result.stdout.splitlines()
    assert "RuntimeError: the reason" in shown and "139" in shown and "100" not in shown  # the last thirty lines
    log = (tmp_path / "gpu1.log").read_text()
    assert log.startswith("\n===== broken =====\n100\n101\n") and "RuntimeError: the reason\n" in log
    assert log.endswith("\n===== hanging =====\nasleep\n\n===== sound =====\nfine\n")


@pytest.mark.slow
def test_gpu_bench_leaves_out_what_does_not_fit_in_the_time(tmp_path):
    result, rows = run_report(tmp_path, 5, ("long", "print('fine')", 60, 99), ("short", "print('fine')", 1, 99),
                              ("too long", SLEEP, 0, 99), ("late", "print('fine')", 1, 99))
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"left out: \d s left, it takes 60", rows["long"])
    assert rows["short"] == "fine"
    assert re.fullmatch(r"left out: not done in the \d s that were left", rows["too long"])
    assert rows["late"] == "left out: 0 s left, it takes 1"


def test_gpu_bench_refuses_a_window_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"^--window is 3, it must be a number from 1 to 2$"):
        gpu.main(gpu.BenchConfig(**parse_flags(gpu.BenchConfig, ["--window", "3"], "")))


@pytest.mark.parametrize("flag, value", [("--steps", 0), ("--seconds", -5), ("--train_seconds", "nan"),
                                         ("--total_batch_size", 500)])
def test_gpu_bench_refuses_numbers_that_measure_nothing(flag, value, tmp_path):
    with pytest.raises(UserError, match=f"^{flag} "):
        gpu.main(gpu.BenchConfig(**parse_flags(gpu.BenchConfig, [*TOY, "--out", str(tmp_path), flag, str(value)], "")))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpu_bench_fails_if_the_first_loss_is_not_as_expected(tmp_path):
    result = bench("-m", "bench.gpu", *TOY, "--out", tmp_path, "--first_loss", 9.5, "--seconds", 60)
    assert result.returncode == 1
    assert re.match(r"failed: 10\.8\d*, expected 9.5", rows_of(tmp_path / "gpu1.json")["loss of the first eager step"]
                    ["text"])
