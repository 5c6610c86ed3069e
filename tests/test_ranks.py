"""Several ranks: errors of rank 0 alone reach all of them, and torch.compile changes nothing that a rank computes.

    pytest tests/test_ranks.py
"""
import re

import numpy as np
import pytest
import torch.distributed as dist
from helpers import ROOT, assert_same_run, final_state, flags, read_log, run

from plumbing import checkpoint, ranks, run_folder

pytestmark = pytest.mark.dist
INJECT = ROOT / "tests" / "faults" / "inject.py"

LAST_SAVE_FAILS = """
import sys
import train_gpt2
from plumbing import checkpoint, cli
original = checkpoint.save
def save(folder, step, state, *more, **options):
    if step == 6:
        raise checkpoint.CheckpointError("cannot write model_000006.pt, is the disk full?")
    return original(folder, step, state, *more, **options)
checkpoint.save = save
cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))
"""


def refused_by_both(arguments, message, **options) -> None:
    """The job ends with torchrun's code, and both ranks say the same line: one that was not told would be mute."""
    result = run(arguments, 2, **options)
    assert result.returncode == 1, result.stdout + result.stderr
    said = {line.split("error: ", 1)[1] for line in result.stderr.splitlines() if line.startswith("rank ")
            and ": error: " in line}
    assert len(said) == 1 and message in said.pop(), result.stderr
    for rank in (0, 1):
        assert f"rank {rank}: error: " in result.stderr, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lock", "no whole checkpoint", "log", "last save"])
def test_an_error_of_rank_0_alone_is_raised_on_every_rank(fault, shard_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    arguments = flags(data=shard_folder, out_dir=out)
    if fault == "no whole checkpoint":
        (out / "model_000005.pt").write_bytes(b"nothing")
        refused_by_both(arguments, "no checkpoint in")
    elif fault == "lock":
        with run_folder.lock(out):
            refused_by_both(arguments, "another run is training into")
    elif fault == "log":
        (out / "log.jsonl").mkdir()
        refused_by_both(arguments, "log.jsonl is not a file: move it away")
    else:
        script = tmp_path / "fail.py"
        script.write_text(LAST_SAVE_FAILS)
        refused_by_both(arguments, "cannot write model_000006.pt", script=script)
        assert [path.name for path in checkpoint.listing(out)] == ["model_000002.pt", "model_000004.pt"]


CARDS_DIFFER = """
import os, sys
import torch
import train_gpt2
from plumbing import cli, machine
native = {"0": torch.bfloat16, "1": torch.float16}[os.environ["RANK"]]
machine.is_native = lambda dtype, *_, **__: dtype in (native, torch.float16, torch.float32)
machine.pick_dtype = lambda *_, **__: (native, "played")
cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))
"""


BUG = """
import sys
import train_gpt2
from plumbing import checkpoint, cli
def newest(*_, **__):
    raise RuntimeError("what nobody thought of")
checkpoint.newest = newest
cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))
"""


@pytest.mark.slow
def test_a_bug_on_rank_0_keeps_its_traceback_and_is_told_to_the_others(shard_folder, tmp_path):
    script = tmp_path / "bug.py"
    script.write_text(BUG)
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out"), 2, script=script)
    assert result.returncode == 1 and "rank 1: error: what nobody thought of" in result.stderr, result.stderr
    assert "Traceback" in result.stderr and "RuntimeError: what nobody thought of" in result.stderr


@pytest.mark.slow
def test_ranks_with_different_cards_take_the_dtype_that_all_have(shard_folder, tmp_path):
    script = tmp_path / "differ.py"
    script.write_text(CARDS_DIFFER)
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out", dtype=None), 2, script=script)
    assert result.returncode == 0, result.stderr
    assert final_state(tmp_path / "out")["train_config"]["dtype"] == "float16"
    lines = read_log(tmp_path / "out", "train")
    assert [line["scale"] for line in lines] == [65536] * 6 and all(line["norm"] < 2 for line in lines)


def test_ranks_wait_for_each_other_for_half_an_hour(monkeypatch):
    """HellaSwag's download is on rank 0 alone; NCCL's own limit is ten minutes."""
    given = {}
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, *_, **options: given.update(options))
    monkeypatch.setattr(dist, "barrier", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ranks, "fresh_store", lambda *arguments, **__: ("fresh", *arguments))
    with ranks.processes("cpu") as world:
        assert (world.rank, world.world_size) == (0, 2)
    assert given["timeout"].total_seconds() == 1800
    assert given["store"] == ("fresh", 0, 2)  # in which nothing stands of ranks that are dead


@pytest.mark.slow
def test_two_compiled_ranks_have_the_losses_of_eager_ones_and_are_resumed_bit_by_bit(shard_folder, tmp_path):
    """A rank is killed in the fifth update; what goes on from step 4 compiles anew, into a cache of its own."""
    changes = {"data": shard_folder, "micro_batch_size": 2, "optimizer": "muon", "activation_checkpointing": True,
               "n_layer": 1}
    for name in ("eager", "whole", "killed"):
        fault = {"script": INJECT, "FAULT": "kill:update:5"} if name == "killed" else {}
        result = run(flags(**changes, out_dir=tmp_path / name, compile=name != "eager"), 2, **fault,
                     TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        assert result.returncode == int(name == "killed"), result.stderr
    losses = [[line["loss"] for line in read_log(tmp_path / name, "train")] for name in ("eager", "whole")]
    np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)
    assert final_state(tmp_path / "whole")["train_config"]["compile"] is True
    result = run(flags(**changes, out_dir=tmp_path / "killed", compile=None), 2,  # the stored choice is taken over
                 TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "another"))
    assert "resumed after step 4" in result.stdout and "compile | yes: as in the run so far" in result.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_s_last_words_on_a_wrong_setting_are_short(shard_folder, tmp_path):
    """It prints the traceback of each rank that was not stopped by it first, here without the code within."""
    result = run(flags(data=shard_folder, out_dir=tmp_path, total_batch_size=100), ranks=2)
    assert result.returncode == 1 and "error: --total_batch_size 100 is not a multiple of" in result.stderr
    tracebacks = re.findall(r"traceback : Traceback(.*?)\n *\n", result.stderr, re.DOTALL)
    assert tracebacks, result.stderr
    assert all("machine.py" not in text and len(text.splitlines()) < 9 for text in tracebacks), result.stderr
