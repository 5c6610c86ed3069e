"""Ctrl-C, SIGTERM and a closed terminal wherever a run may be: obeyed within three seconds, with one true line.

    pytest tests/test_stop.py
"""
import os
import signal
import threading
import time

import pytest
import torch
from helpers import ENCODING, ROOT, Forked, command, flags, mostly_slow, needs, python_path, random_gpt2, read_log, run
from hub import hub

import train_gpt2
from plumbing import checkpoint, cli

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as a terminal sends them")
OBEYED = 20  # seconds, on a machine that is busy; what is interrupted would last longer, most of it a minute

# What is slow is made slower, and says "here" once it has begun; the rest of the command is the real one.
SCRIPT = """
import sys, time
import train_gpt2, hellaswag
from plumbing import cli, checkpoint, models, sampling, shards, text_file

def slow(owner, name, seconds, calls=1):
    original, left = getattr(owner, name), [calls]
    def wrapped(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            print("here", file=sys.stderr, flush=True)
        for _ in range(int(seconds * 50) if left[0] <= 0 else 0):
            time.sleep(0.02)
        return original(*arguments, **options)
    setattr(owner, name, wrapped)

{}
cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))
"""
SLOW = {  # where the run is when the signal comes
    "reading a checkpoint": "slow(checkpoint, 'read_state', 60)",
    "set-up": "slow(train_gpt2, 'configure_optimizers', 60)",
    "checking shards": "slow(shards, 'hash_tokens', 60)",
    "the first validation": "slow(train_gpt2.GPT, 'forward', 60)",
    "the first step": "slow(train_gpt2, 'get_lr', 60)",
    "HellaSwag": "slow(hellaswag, 'encode_example', 1, calls=5)",
    "a sample": "slow(sampling, 'choose_token', 1, calls=40)",
}


def stop(arguments, tmp_path, slow: str = "", sign=signal.SIGINT, script=None, wait="here",
         **environment) -> tuple[int, str, str]:
    """Start the command, send the signal once stderr has the text `wait`; return (exit code, stdout, stderr)."""
    if script is None:
        script = tmp_path / "slow.py"
        script.write_text(SCRIPT.format(slow))
    out, err = open(tmp_path / "stdout", "w+"), open(tmp_path / "stderr", "w+")
    process = Forked(command(arguments, script=script)[1:], out, err,
                     {**os.environ, "PYTHONPATH": python_path(), **environment}, tmp_path)
    try:
        began = time.monotonic()
        while wait not in (tmp_path / "stderr").read_text() + (tmp_path / "stdout").read_text():
            assert process.poll() is None and time.monotonic() < began + 90, (tmp_path / "stderr").read_text()
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(sign)
        signalled = time.monotonic()
        code = process.wait(30)
        assert time.monotonic() - signalled < OBEYED
    finally:
        process.send_signal(signal.SIGKILL)
        out.close()
        err.close()
    return code, (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text().replace("here\n", "")


def said(printed: str) -> str:
    """The line that says where a run was stopped; commands to go on with follow."""
    return [line for line in printed.splitlines() if line.startswith("stopped")][-1]


@pytest.mark.parametrize("sign, where", mostly_slow([
    ("SIGINT", "set-up"), ("SIGTERM", "the first step"), ("SIGHUP", "the first validation"),
    ("SIGINT", "checking shards"), ("SIGINT", "the first validation"), ("SIGINT", "the first step"),
    ("SIGTERM", "set-up"), ("SIGTERM", "the first validation"), ("SIGHUP", "set-up"), ("SIGHUP", "the first step"),
], kept=3))
def test_before_the_first_step_a_signal_ends_the_run_at_once_and_leaves_no_checkpoint(
        sign, where, shard_folder, tmp_path):
    code, printed, errors = stop(flags(data=shard_folder, out_dir="out"), tmp_path, SLOW[where],
                                 getattr(signal, sign))
    assert (code, errors) == (0, ""), errors
    begun = where.startswith("the first")
    assert said(printed) == (
        "stopped before the first step: the same command begins again" if begun else
        "stopped before the first step of this session: the same command begins it again")
    assert not list(tmp_path.glob("out/*.pt*")) and printed.count("stopped") == 1
    assert begun or not (tmp_path / "out").exists()  # the lock is given back
    again = run(flags(data=shard_folder, out_dir="out", max_steps=2), cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("where", mostly_slow([
    "the first step", "the first validation", "set-up", "reading a checkpoint"], kept=2))
def test_a_resumed_run_that_is_stopped_before_its_next_step_writes_no_checkpoint_again(where, shard_folder, tmp_path):
    train_gpt2.main(train_gpt2.parse_args(flags(data=shard_folder, out_dir=tmp_path / "out")))
    (tmp_path / "out" / "model_000006.pt").unlink()
    if where == "the first validation":  # the checkpoint of a step whose evaluation was cut short
        path = tmp_path / "out" / "model_000004.pt"
        checkpoint.save(tmp_path / "out", 4, {**checkpoint.load(path), "evaluated": False})
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.pt")}
    changes = {"val_every": 2} if where == "the first validation" else {}
    code, printed, errors = stop(flags(data=shard_folder, out_dir="out", **changes), tmp_path, SLOW[where])
    assert (code, errors) == (0, ""), errors
    assert said(printed) == (
        "stopped after step 4 of 6: the same command continues from there" if where.startswith("the first") else
        "stopped before the first step of this session: the same command begins it again")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.pt")} == before


@needs(*ENCODING)
@pytest.mark.parametrize("where", mostly_slow(["HellaSwag", "a sample"]))
def test_an_evaluation_after_a_step_is_left_at_its_next_token_or_example(where, shard_folder, tmp_path):
    """The step is saved, and what was cut short is done when the run resumes."""
    changes = {"hellaswag_every": 2, "hellaswag_data": ROOT / "tests" / "hellaswag_examples.jsonl"}
    if where == "a sample":
        changes = {"sample_every": 2}
    arguments = flags(data=shard_folder, out_dir="out", **changes)
    code, printed, errors = stop(arguments, tmp_path, SLOW[where], signal.SIGTERM)
    assert code == 0 and "stopping after what is under way" in errors, errors
    assert said(printed) == "stopped after step 2 of 6: the same command continues from there"
    assert run(arguments, cwd=tmp_path).returncode == 0
    kind = {"HellaSwag": "hellaswag", "a sample": "sample"}[where]
    assert [line["step"] for line in read_log(tmp_path / "out", kind)][-3:] == [2, 4, 6]


@pytest.mark.parametrize("where", mostly_slow(["model", "trial"]))
def test_compiling_is_left_at_once(where, shard_folder, tmp_path):
    """A slow function stands in for the compiler's back end, which Dynamo calls."""
    slow = ("import functools, torch\n"
            "def backend(graph, inputs):\n"
            f"    if {where == 'trial'} or len(inputs) > 2:\n"
            "        print('here', file=sys.stderr, flush=True)\n"
            "        time.sleep(60)\n"
            "    return graph.forward\n"
            "torch.compile = functools.partial(torch.compile, backend=backend)\n")
    code, printed, errors = stop(flags(data=shard_folder, out_dir="out", compile=True), tmp_path, slow)
    assert (code, errors) == (0, ""), errors
    assert "the same command" in said(printed) and not list(tmp_path.glob("out/*.pt*"))


@needs(*ENCODING)
@pytest.mark.parametrize("size", [1, 20])  # MB: one that is tokenized in memory, one whose tokens are kept in a file
def test_tokenizing_is_left_at_once(size, tmp_path):
    (tmp_path / "x.txt").write_text((ROOT / "input.txt").read_text(encoding="utf-8") * size, encoding="utf-8")
    slow = "import plumbing.tokenizer\nslow(plumbing.tokenizer, 'gpt2_encoding', 60, calls=3)"
    code, printed, errors = stop(flags(data="x.txt", out_dir="out"), tmp_path, slow)
    assert code == 0 and "Traceback" not in errors, errors
    assert said(printed) == "stopped before the first step of this session: the same command begins it again"
    assert not list(tmp_path.glob("out/tokens*"))


@pytest.mark.parametrize("script, code", [("train_gpt2", 0), ("generate", 130), ("export_hf", 130)])
def test_a_download_is_left_at_once(script, code, shard_folder, tmp_path):
    """The hub answers with the first bytes, then says nothing more for a while."""
    random_gpt2(tmp_path / "model", n_layer=1, n_head=2, n_embd=16, n_positions=32)
    with hub({"models/openai-community/gpt2": tmp_path / "model"}, tmp_path / "cache") as (environment, handler):
        left = threading.Event()

        def be_mute(path):
            if path.endswith("model.safetensors") and len(handler.seen) > 2:
                left.wait(60)

        handler.trouble = staticmethod(be_mute)
        arguments = {"train_gpt2": flags(data=shard_folder, init_from="gpt2", out_dir="out"),
                     "generate": ["--model", "gpt2"], "export_hf": ["gpt2", "out"]}[script]
        starter = tmp_path / "start.py"
        starter.write_text(f"import sys, runpy\nimport requests\n"
                           "from plumbing import hub_files\n"
                           "original = hub_files.in_background\n"
                           "def begin(action):\n"
                           "    print('here', file=sys.stderr, flush=True)\n"
                           "    return original(action)\n"
                           "hub_files.in_background = begin\n"
                           f"runpy.run_path({str(ROOT / script) + '.py'!r}, run_name='__main__')\n")
        got, printed, errors = stop(arguments, tmp_path, script=starter, **environment)
        left.set()
        assert got == code, errors
        begins = "stopped before the first step of this session: the same command begins it again"
        assert said(printed) == begins if code == 0 else "error: interrupted" in errors.splitlines(), errors
        assert not (tmp_path / "out").exists()


def test_waiting_for_a_lock_is_left_at_once(tmp_path):
    import filelock

    script = tmp_path / "wait.py"
    script.write_text("from plumbing import cli, files\n"
                      "def main():\n"
                      "    with files.lock('folder', 'another holds', 'go', seconds=60):\n"
                      "        pass\n"
                      "cli.run_command(main)\n")
    (tmp_path / "folder").mkdir()
    with filelock.FileLock(tmp_path / "folder" / ".lock"):
        code, _, errors = stop([], tmp_path, script=script, wait="waiting for it")
    assert code == 130 and errors.splitlines()[-1] == "error: interrupted"


def test_a_second_signal_still_ends_the_process(shard_folder, tmp_path):
    slow = ("import os, signal\n"
            "def stuck(*_, **__):\n"
            "    try:\n"
            "        print('here', file=sys.stderr, flush=True)\n"
            "        time.sleep(60)\n"
            "    except KeyboardInterrupt:\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "        time.sleep(60)\n"
            "train_gpt2.configure_optimizers = stuck\n")
    code, _, _ = stop(flags(data=shard_folder, out_dir="out"), tmp_path, slow)
    assert code == -signal.SIGTERM


def test_a_signal_is_heard_between_micro_steps(shard_folder, tmp_path, monkeypatch):
    forward, calls = train_gpt2.GPT.forward, []

    def signalled(model, idx, targets=None, *more, **options):
        if targets is not None and torch.is_grad_enabled():
            calls.append(idx)
            if len(calls) == 10:  # the second of eight micro-steps of step 2
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(model, idx, targets, *more, **options)

    monkeypatch.setattr(train_gpt2.GPT, "forward", signalled)
    with pytest.raises(cli.Stopped):
        train_gpt2.main(train_gpt2.parse_args(flags(data=shard_folder, out_dir=tmp_path, micro_batch_size=1)))
    assert len(calls) == 10 and [path.name for path in checkpoint.listing(tmp_path)] == ["model_000001.pt"]


def test_a_signal_that_nohup_has_switched_off_stays_off():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.stop_signal():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.dist
def test_several_ranks_agree_as_before_and_leave_no_checkpoint_of_step_0(shard_folder, tmp_path):
    """Both have the signal before the first validation: neither may leave the other waiting."""
    script = tmp_path / "signalled.py"
    script.write_text("import os, signal, sys\nimport train_gpt2\nfrom plumbing import cli\n"
                      "original = train_gpt2.configure_optimizers\n"
                      "def signalled(*arguments, **options):\n"
                      "    signal.raise_signal(signal.SIGTERM)\n"
                      "    return original(*arguments, **options)\n"
                      "train_gpt2.configure_optimizers = signalled\n"
                      "cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))\n")
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out"), 2, script=script)
    assert result.returncode == 0, result.stderr
    assert said(result.stdout) == "stopped before the first step: the same command begins again"
    assert not list((tmp_path / "out").glob("*.pt*"))
