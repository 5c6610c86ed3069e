"""The real command, start to end: learning, resuming bit by bit, several ranks, and what it leaves on disk.

    pytest tests/test_train.py
"""
import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import (
    ENCODING,
    ROOT,
    PoisonedLoss,
    assert_same_run,
    command,
    final_state,
    flags,
    make_loader,
    mostly_slow,
    needs,
    posix,
    read_log,
    run,
    run_until,
    train_in_process,
    write_shards,
)

import train_gpt2
from plumbing import checkpoint, curve, machine
from plumbing.cli import UserError
from plumbing.ranks import World, fresh_store
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, evaluate_val_loss, parse_args


def test_a_run_learns_logs_and_leaves_checkpoints(shard_folder, tmp_path):
    out = tmp_path / "out"
    result = run(flags(data=shard_folder, out_dir=out, sample_every=3))
    assert result.returncode == 0, result.stderr
    assert "128 = 4 x 16 x 1 rank x 2 micro-steps" in result.stdout
    assert "new weights" in result.stdout and "ETA" in result.stdout and "tokens/s" in result.stdout
    assert [line["step"] for line in read_log(out, "val")] == [0, 3, 6]
    assert [line["step"] for line in read_log(out, "sample")] == [0, 3, 6]
    lines = read_log(out, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, 7)]
    config = TrainConfig(warmup_steps=2, max_steps=6, max_lr=0.01, min_lr=0.001)
    assert [line["lr"] for line in lines] == [train_gpt2.get_lr(step, config) for step in range(6)]
    keys = {"kind", "step", "tokens", "loss", "lr", "norm", "dt_ms", "data_ms", "tok_per_s", "mfu"}
    assert all(set(line) == keys for line in lines)
    assert abs(lines[0]["loss"] - np.log(50304)) < 0.1 and lines[-1]["loss"] < lines[0]["loss"]
    assert read_log(out, "run")[0]["config"]["max_steps"] == 6
    assert sorted(p.name for p in out.glob("*.pt*")) == ["model_000004.pt", "model_000006.pt"]
    state = torch.load(out / "model_000006.pt", weights_only=True)
    assert set(state) == {*checkpoint.KEYS, "evaluated", "scaler"}
    assert state["step"] == 6 and state["evaluated"] is True
    assert set(state["model"]) == set(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16)).state_dict())
    assert state["val_loss"] == read_log(out, "val")[-1]["loss"]

    again = run(flags(data=shard_folder, out_dir=out, sample_every=3))
    assert again.returncode == 0 and "already finished: validation loss" in again.stdout
    assert len(read_log(out, "train")) == 6


@posix
@pytest.mark.parametrize("how, optimizer", mostly_slow([("SIGTERM", "adamw"), ("SIGHUP", "muon")]))
def test_a_stopped_run_ends_as_if_it_had_never_stopped(how, optimizer, shard_folder, tmp_path):
    """Two epochs, stopped twice; tests/faults has SIGKILL and more places."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    long = {"data": shard_folder, "max_steps": 40, "val_every": 15, "checkpoint_every": 10, "optimizer": optimizer}
    run(flags(out_dir=whole, **long)).check_returncode()
    for text in ("step 13/", "step 28/"):
        code, printed = run_until(flags(out_dir=out, **long), text, getattr(signal, how))
        assert code == 0 and "stopped after step" in printed, printed
        assert not (out / "model_000040.pt").exists(), "it was not stopped in time"
    last = run(flags(out_dir=out, **long))
    assert last.returncode == 0 and "resumed after step" in last.stdout, last.stderr
    assert_same_run(whole, out, 40)


def test_resuming_falls_back_to_the_checkpoint_before_a_damaged_one(shard_folder, tmp_path):
    for name in ("whole", "damaged"):
        assert run(flags(data=shard_folder, out_dir=tmp_path / name)).returncode == 0
    path = tmp_path / "damaged" / "model_000006.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    result = run(flags(data=shard_folder, out_dir=tmp_path / "damaged"))
    assert "model_000006.pt is not a whole checkpoint" in result.stdout and "resumed after step 4" in result.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


RECORDER = """
import os, sys, json
import train_gpt2
original = train_gpt2.DataLoaderLite.batch
def recording(self, i, *more, **options):
    x, y = original(self, i, *more, **options)
    if self.shuffle:
        with open(f"{sys.argv[1]}/rank{self.world.rank}of{self.world.world_size}", "a") as file:
            file.write(json.dumps([i, x.tolist(), y.tolist()]) + chr(10))
    return x, y
train_gpt2.DataLoaderLite.batch = recording
wrapper = train_gpt2.nn.parallel.DistributedDataParallel
original_no_sync = wrapper.no_sync
def no_sync(self, *more, **options):
    with open(f"{sys.argv[1]}/no_sync", "a") as file:
        file.write("x")
    return original_no_sync(self, *more, **options)
wrapper.no_sync = no_sync
train_gpt2.main(train_gpt2.parse_args(sys.argv[2:]))
"""


def recorded_windows(folder, world_size) -> list:
    """What the ranks were given, put back into the order of a single process."""
    ranks = [[json.loads(line) for line in open(folder / f"rank{rank}of{world_size}")] for rank in range(world_size)]
    order = []
    for batches in zip(*ranks):
        assert len({position for position, _, _ in batches}) == 1
        order += [window for _, x, y in batches for window in zip(x, y)]
    return order


@pytest.mark.dist
def test_two_ranks_see_the_tokens_and_have_the_losses_of_one(shard_folder, tmp_path):
    script = tmp_path / "record.py"
    script.write_text(RECORDER)
    for ranks in (1, 2):
        arguments = flags(data=shard_folder, out_dir=tmp_path / f"out{ranks}", micro_batch_size=2)
        result = run([tmp_path, *arguments], ranks, script=script)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "no_sync").read_text() == "x" * 12  # the first of two micro-steps, of 6 steps on 2 ranks
    one, two = recorded_windows(tmp_path, 1), recorded_windows(tmp_path, 2)
    assert one[:48] == two[:48]  # what the 6 steps used; each has fetched one batch more
    for kind in ("train", "val"):
        losses = [[line["loss"] for line in read_log(tmp_path / f"out{ranks}", kind)] for ranks in (1, 2)]
        np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)
    assert len(read_log(tmp_path / "out2", "train")) == 6  # rank 0 alone writes


def test_the_log_is_on_the_disk_before_the_checkpoint_that_it_leads_to(shard_folder, tmp_path, monkeypatch):
    """A power cut after a checkpoint would otherwise leave a run whose log lacks the steps before it."""
    out, fsync, rename = tmp_path / "out0", os.fsync, os.replace
    on_disk, left = [0], []

    def synced(number, *_, **__):
        fsync(number)
        if (out / "log.jsonl").exists() and os.path.samestat(os.fstat(number), os.stat(out / "log.jsonl")):
            on_disk.append(os.fstat(number).st_size)

    def renamed(source, target, *_, **__):
        if str(target).endswith(".pt"):
            left.append((out / "log.jsonl").stat().st_size - on_disk[-1])
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    train_in_process(tmp_path, data=shard_folder, max_steps=4)
    assert left == [0, 0, 0]  # at steps 2 and 4, and at 4 again, evaluated


class Full:
    """A log of which the fourth line finds room for 20 bytes only."""

    def __init__(self, file):
        self.file, self.lines = file, 0

    def write(self, line: bytes) -> int:
        self.lines += 1
        return self.file.write(line[:20] if self.lines == 4 else line)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_line_of_the_log_that_is_torn_spoils_no_other(shard_folder, tmp_path, monkeypatch):
    opened = train_gpt2.RunLog.open

    def open_full(log, *arguments, **options):
        opened(log, *arguments, **options)
        log.file = Full(log.file)

    monkeypatch.setattr(train_gpt2.RunLog, "open", open_full)
    _, out = train_in_process(tmp_path, data=shard_folder, max_steps=3)
    # lines of the run, a validation and step 1 come first
    assert [line["step"] for line in curve.read_log(out) if line["kind"] == "train"] == [1, 3]


def counted(method, calls: list):
    """The method of tensors, which also appends the tensor to `calls`."""
    def counting(tensor, *arguments, **options):
        calls.append(tensor)
        return method(tensor, *arguments, **options)
    return counting


@pytest.mark.parametrize("dtype", mostly_slow(["float16", "float32"]))
def test_a_step_waits_for_the_device_once(dtype, shard_folder, tmp_path, monkeypatch):
    """Every way to read a tensor on the host, counted: ten steps more are ten reads more."""
    reads = []
    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name), reads))
    counts = []
    machine.measured_peak(torch.device("cpu"), getattr(torch, dtype))  # reads a clock, once per process
    for max_steps in (5, 15):
        reads.clear()
        train_in_process(tmp_path, data=shard_folder, max_steps=max_steps, val_every=0, checkpoint_every=0,
                         dtype=dtype)
        counts.append(len(reads))
    assert counts[1] - counts[0] == 10 and counts[0] >= 5


def test_ranks_find_each_other_anew_in_a_store_that_is_old(monkeypatch):
    """Three attempts in the store that torchrun keeps, one of which a rank did not live to join."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("ADDR", "127.0.0.1"), ("PORT", str(server.port))):
        monkeypatch.setenv(f"MASTER_{name}", value)
    assert fresh_store(0, 2) is None  # not under torchrun
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for attempt in range(3):
            stores = [pool.submit(fresh_store, rank, 3) for rank in (2, 0, 1)]
            stores = [store.result(timeout=30) for store in stores]
            assert not any(store.check(["mark"]) for store in stores)
            stores[attempt].set("mark", str(attempt))
            assert [store.get("mark") for store in stores] == [str(attempt).encode()] * 3
            server.set("token/1", "of a rank that died before it was seen")


def test_rank_0_waits_for_the_ranks_of_its_own_attempt(monkeypatch):
    """Replies of an earlier attempt are in the store, and one rank is late."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(server.port)),
                        ("TORCHELASTIC_USE_AGENT_STORE", "True")):
        monkeypatch.setenv(name, value)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for store in [pool.submit(fresh_store, rank, 3) for rank in range(3)]:
            store.result(timeout=30)
        old = server.get("token/2")
        stores = [pool.submit(fresh_store, 2, 3)]
        while server.get("token/2") == old:
            time.sleep(0.01)
        stores.append(pool.submit(fresh_store, 0, 3))
        while server.get("token/2") not in server.get("seen").split():
            time.sleep(0.01)
        time.sleep(0.1)
        assert not stores[1].done()
        stores.append(pool.submit(fresh_store, 1, 3))
        stores = [store.result(timeout=30) for store in stores]
    stores[0].set("mark", "x")
    assert [store.get("mark") for store in stores] == [b"x"] * 3


def test_micro_batches_give_the_gradient_of_one_batch(shard_folder, tmp_path, monkeypatch):
    gradients = {}
    original = torch.nn.utils.clip_grad_norm_
    for B in (1, 2, 8):
        def keep(parameters, *limit, B=B, **options):
            parameters = list(parameters)
            gradients.setdefault(B, torch.cat([p.grad.flatten() for p in parameters]))
            return original(parameters, *limit, **options)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        train_in_process(tmp_path, data=shard_folder, micro_batch_size=B, max_steps=1)
    for B in (1, 2):
        torch.testing.assert_close(gradients[B], gradients[8], atol=1e-7, rtol=1e-4)
    # and it is the gradient of the definition: the mean over all eight windows
    torch.manual_seed(TrainConfig.seed)
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=16))
    x, y = make_loader(shard_folder, "train", 8, 16).batch(0)
    logits = model(x)
    (-logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients[8], expected, atol=1e-7, rtol=1e-4)


def test_both_optimizers_take_the_rate_of_the_schedule(shard_folder, tmp_path, monkeypatch):
    taken = []
    for kind in (torch.optim.AdamW, torch.optim.Muon):
        def step(optimizer, *arguments, original=kind.step, **options):
            taken.append({group["lr"] for group in optimizer.param_groups})
            return original(optimizer, *arguments, **options)
        monkeypatch.setattr(kind, "step", step)
    train_in_process(tmp_path, data=shard_folder, optimizer="muon")
    config = TrainConfig(warmup_steps=2, max_steps=6, max_lr=0.01, min_lr=0.001)
    assert taken == [{train_gpt2.get_lr(step, config)} for step in range(6) for _ in range(2)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # float16: the gradient scaled up, and down again
@pytest.mark.parametrize("clip", [0, 1e-3])
def test_clipping_bounds_the_gradient(clip, dtype, shard_folder, tmp_path):
    """AdamW's first moment after one step is a tenth of the gradient it was given; the logged norm is unclipped."""
    _, out = train_in_process(tmp_path, data=shard_folder, grad_clip=clip, dtype=dtype, max_steps=1)
    moments = final_state(out, 1)["optimizers"][0]["state"].values()
    given = torch.cat([moment["exp_avg"].flatten() for moment in moments]).norm().item() / 0.1
    logged = read_log(out, "train")[0]["norm"]
    assert logged > 0.1 and given == pytest.approx(clip or logged, rel=1e-3)


def test_validation_is_the_same_at_any_batch_and_counts_each_token_once(shard_folder):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.wte.weight.normal_(std=0.5)
    windows = make_loader(shard_folder, "val", 43, 16)
    assert windows.n_windows == 43
    x, y = windows.batch(0)
    by_window = torch.stack([model(x[i:i + 1], y[i:i + 1]) for i in range(43)]).double()
    for val_tokens, counted in ((16 * 43, 43), (10**9, 43), (320, 20), (325, 20), (1, 1)):
        for B in (1, 3, 20, 64):
            loss = evaluate_val_loss(model, make_loader(shard_folder, "val", B, 16), val_tokens, World())
            assert loss == pytest.approx(by_window[:counted].mean().item(), abs=1e-5)


class Apart(World):
    """One of several ranks, which keeps its sums for itself."""

    def sum_on_host(self, values):
        return [value.item() for value in values]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_together_validate_each_window_once(world_size, tmp_path):
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    data = write_shards(tmp_path / "data", high=64)
    for B in (1, 4, 64):  # whose last batches are not full
        losses = [evaluate_val_loss(model, make_loader(data, "val", B, 16, rank, world_size), 16 * 41,
                                    Apart(rank, world_size)) for rank in range(world_size)]
        alone = evaluate_val_loss(model, make_loader(data, "val", B, 16), 16 * 41, World())
        assert sum(losses) == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
def test_training_reduces_the_loss_to_that_of_the_data(tmp_path):
    """Tokens that repeat with period 7 can be learned by heart; the loss must get there, with either optimizer."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        np.save(folder / f"x_{split}.npy", np.tile(np.arange(7, dtype=np.uint16), 300))
    for optimizer in ("adamw", "muon"):
        loss, _ = train_in_process(tmp_path, data=folder, optimizer=optimizer, max_steps=60, val_every=0, n_embd=64)
        assert loss < 0.3


def test_max_steps_0_evaluates_and_touches_no_training_log(shard_folder, tmp_path):
    loss, out = train_in_process(tmp_path, data=shard_folder)
    before = (out / "log.jsonl").read_bytes()
    config = parse_args(flags(data=shard_folder, out_dir=out, max_steps=0))
    assert train_gpt2.main(config) == loss  # the newest checkpoint's
    fresh = train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=tmp_path / "fresh", max_steps=0)))
    assert abs(fresh - np.log(50304)) < 0.1
    assert (out / "log.jsonl").read_bytes() == before
    assert [json.loads(line)["loss"] for line in open(out / "eval.jsonl") if '"val"' in line] == [loss]
    assert not list((tmp_path / "fresh").glob("*.pt"))


def test_init_from_a_transformers_folder_and_from_a_checkpoint(shard_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32))
    theirs.eval().save_pretrained(tmp_path / "hf")
    x, y = make_loader(shard_folder, "val", 43, 16).batch(0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    loss, _ = train_in_process(tmp_path, data=shard_folder, init_from=tmp_path / "hf", max_steps=0, val_tokens=10**6)
    assert loss == pytest.approx(expected, abs=1e-4)
    tuned, out = train_in_process(tmp_path, data=shard_folder, init_from=tmp_path / "hf", val_tokens=10**6)
    assert GPT.load(out).config.vocab_size == 50257  # imported models are not padded
    loss, _ = train_in_process(tmp_path, data=shard_folder, init_from=out / "model_000006.pt", max_steps=0,
                               val_tokens=10**6)
    assert loss == pytest.approx(tuned, abs=1e-6)


@pytest.mark.parametrize("optimizer", mostly_slow(["adamw", "muon"]))
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer, shard_folder, tmp_path, monkeypatch):
    original, calls = GPT.forward, []

    def poisoned(self, idx, targets=None, *more, **options):
        loss = original(self, idx, targets, *more, **options)
        if targets is not None and loss.requires_grad:
            calls.append(loss)
            if len(calls) in poisoned_calls:
                return PoisonedLoss.apply(loss)
        return loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    poisoned_calls = {6}  # the second micro-step of step 3
    changes = {"data": shard_folder, "optimizer": optimizer, "checkpoint_every": 1, "keep_checkpoints": 9}
    _, out = train_in_process(tmp_path, **changes)
    before, after, next_one = (final_state(out, step)["model"] for step in (2, 3, 4))
    torch.testing.assert_close(before, after, atol=0, rtol=0)
    assert not torch.equal(after["lm_head.weight"], next_one["lm_head.weight"])
    assert [line["step"] for line in read_log(out, "train") if line.get("skipped")] == [3]
    assert read_log(out, "train")[2]["norm"] is None

    calls.clear()
    poisoned_calls = set(range(3, 100))  # from step 2 on
    with pytest.raises(FloatingPointError, match=r"five steps in a row .* step 6 "):
        train_in_process(tmp_path, **{**changes, "max_steps": 20})

    calls.clear()
    poisoned_calls = {*range(3, 11), *range(13, 21)}  # four steps, and after a good one four more
    _, out = train_in_process(tmp_path, **{**changes, "max_steps": 12, "checkpoint_every": 0})
    assert [line["step"] for line in read_log(out, "train") if line.get("skipped")] == [2, 3, 4, 5, 7, 8, 9, 10]


def test_without_shards_the_demo_lies_under_the_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_args([])
    assert config == TrainConfig(**PRESETS["demo"] | {"data": str(ROOT / "input.txt")})
    assert parse_args(["--max_lr", "0.5", "--seed", "3"]).max_lr == 0.5
    assert parse_args(["--max_lr", "0.5"]).model == "demo"
    (tmp_path / "input.txt").write_text("mine")
    assert parse_args([]).data == "input.txt"
    write_shards(tmp_path / "edu_fineweb10B")
    assert parse_args([]) == TrainConfig()
    assert parse_args(["--data", "input.txt"]).model == "demo"


def test_the_defaults_are_the_experiment():
    config = TrainConfig()
    assert (config.model, config.max_steps, config.total_batch_size) == ("gpt2", 19073, 524288)
    assert config.sequence_length == 1024
    assert (config.max_lr, config.min_lr, config.warmup_steps, config.weight_decay) == (6e-4, 6e-5, 715, 0.1)
    assert (config.grad_clip, config.val_tokens, config.optimizer, config.compile) == (1.0, 10485760, "adamw", None)


def test_help_names_every_field_with_its_default(tmp_path):
    write_shards(tmp_path / "edu_fineweb10B")
    result = run(["--help"], cwd=tmp_path)
    assert result.returncode == 0
    texts = re.split(r"^  (?=-)", result.stdout, flags=re.MULTILINE)
    for field in dataclasses.fields(TrainConfig):
        text = " ".join(next(text for text in texts if text.startswith(f"--{field.name}")).split())
        assert len(text.split()) > 4  # more than the name
        if field.default not in (None, "") and field.default is not False:
            shown = re.search(r"\[([^\[]+)\]", text)[1].strip('"')
            assert type(field.default)(shown == "on" if field.default is True else shown) == field.default


IMPORTER = """
import contextlib, importlib, io, os, sys
for name in sys.argv[1:]:
    for module in [module for module in sys.modules if module.split(".")[0] in {*sys.argv[1:], "plumbing"}]:
        del sys.modules[module]  # so that each is the first to be imported
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        importlib.import_module(name)
    assert not printed.getvalue() and os.listdir() == [], name
"""


def test_importing_any_module_first_is_silent_and_leaves_nothing(tmp_path):
    modules = [path.stem for path in ROOT.glob("*.py")]
    modules += [f"plumbing.{path.stem}" for path in ROOT.glob("plumbing/*.py")]
    script, folder = tmp_path / "script.py", tmp_path / "empty"
    script.write_text(IMPORTER)
    folder.mkdir()
    result = run(modules, script=script, cwd=folder, PYTHONDONTWRITEBYTECODE="1")
    assert len(modules) > 40 and (result.returncode, result.stdout, result.stderr) == (0, "", "")


WITHOUT_COMPILER = """
import sys
import train_gpt2
train_gpt2.main(train_gpt2.parse_args(sys.argv[1:]))
assert "torch._dynamo" not in sys.modules
"""


def test_a_run_that_compiles_nothing_never_imports_the_compiler(shard_folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_COMPILER)
    arguments = flags(data=shard_folder, out_dir=tmp_path / "out", optimizer="muon", sample_every=3)
    result = run(arguments, script=script, plain=True)
    assert result.returncode == 0, result.stderr


def test_training_on_shards_needs_torch_and_numpy_alone(shard_folder, tmp_path):
    """The other packages are hidden; the run goes on, and says of the sample that there is none."""
    script = tmp_path / "hide.py"
    script.write_text("import sys\nfor name in ('tiktoken', 'safetensors', 'huggingface_hub', 'transformers'):\n"
                      "    sys.modules[name] = None\nimport train_gpt2\n"
                      "train_gpt2.main(train_gpt2.parse_args(sys.argv[1:]))\n")
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out", sample_every=6), script=script)
    assert result.returncode == 0, result.stderr
    assert "no sample" in result.stdout and "finished" in result.stdout


def test_a_log_without_a_checkpoint_is_kept(shard_folder, tmp_path):
    _, out = train_in_process(tmp_path, data=shard_folder)
    for path in out.glob("*.pt"):
        path.unlink()
    before = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl.old").write_text("that of a run before")
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=out)))
    assert (out / "log.jsonl.old").read_text() == "that of a run before"
    assert (out / "log.jsonl.old1").read_bytes() == before
    assert len(read_log(out, "train")) == 6


@pytest.mark.slow
@needs(*ENCODING)
def test_a_reader_that_leaves_and_an_ascii_terminal_do_no_harm(shard_folder, tmp_path):
    arguments = flags(data=shard_folder, out_dir=tmp_path / "out", sample_every=2, sample_prompt="café")
    process = subprocess.Popen(command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONIOENCODING": "ascii"})
    while b"caf" not in (line := process.stdout.readline()):
        assert line
    assert rb"caf\xe9" in line
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert len(read_log(tmp_path / "out", "train")) == 6


def test_out_of_memory_names_half_of_b(shard_folder, tmp_path, monkeypatch):
    def full(*arguments, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(World, "sum_on_host", full)
    with pytest.raises(UserError, match="run the same command with --micro_batch_size 2"):
        train_in_process(tmp_path, data=shard_folder)
