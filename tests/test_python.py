"""Training, generating and scoring from Python: the snippets of docs/python.md, and runs that share a process.

    pytest tests/test_python.py
"""
import gc
import math
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import ENCODING, ROOT, assert_same_run, flags, needs, python_path, read_log

import train_gpt2
from plumbing import checkpoint, run_folder
from plumbing.cli import Stopped
from plumbing.tokenizer import encode, gpt2_encoding
from train_gpt2 import PRESETS, TrainConfig, get_lr, main, parse_args

PAGE = ROOT / "docs" / "python.md"


def snippets() -> list[str]:
    """The Python blocks of the page."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def config(shard_folder, out, **changes) -> TrainConfig:
    return parse_args(flags(data=shard_folder, out_dir=out, **changes))


@pytest.mark.slow
@needs(*ENCODING)
def test_the_snippets_run_in_order_and_give_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    (tmp_path / "input.txt").write_text(text[:60_000], encoding="utf-8")
    small = {"max_steps": 2, "warmup_steps": 1, "total_batch_size": 128, "val_tokens": 640, "sample_every": 0}
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"] | small | {"n_layer": 1, "device": "cpu"})
    main(TrainConfig(**PRESETS["demo"]))
    capsys.readouterr()
    names = {}
    printed = []
    for snippet in snippets():
        exec(compile(snippet, PAGE.name, "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(printed) == 6
    assert "parameters" in printed[0] and printed[1].startswith("The old woman")
    model, tokens = names["model"], torch.tensor([encode("The old woman looked at the sea.")])
    with torch.no_grad():
        mean = model(tokens[:, :-1], tokens[:, 1:]).item()
        by_hand = [F.log_softmax(model(tokens[:, :i])[0, -1], dim=-1)[tokens[0, i]].item()
                   for i in range(1, tokens.size(1))]  # each token from those before it alone
    assert f"mean {mean:.4f}" in printed[2]
    assert names["losses"].tolist() == pytest.approx([-loss for loss in by_hand], abs=1e-4)
    for token in tokens[0, 1:].tolist():
        assert repr(gpt2_encoding().decode([token])) in printed[2]
    assert names["val_loss"] == read_log("log/python", "val")[-1]["loss"]
    assert set(names["results"]) == {1e-2, 3e-2} and all(map(math.isfinite, names["results"].values()))
    assert [line["step"] for line in names["steps"]] == list(range(1, 21))


def open_files() -> list[str]:
    """What this process has open, but for pipes and what has been deleted."""
    gc.collect()
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return sorted(path for path in found if path.startswith("/") and not path.endswith("(deleted)"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_runs_one_after_another_leave_nothing_behind_and_are_those_of_their_own(shard_folder, tmp_path, monkeypatch):
    """An error, an interruption, other settings, deterministic and not: each run is what it is in a new process."""
    main(config(shard_folder, tmp_path / "first"))
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    import torch._inductor.utils  # by the deterministic run, which sets TORCHINDUCTOR_CACHE_DIR

    files, threads, variables = open_files(), threading.active_count(), dict(os.environ)
    precision = torch.get_float32_matmul_precision()

    main(config(shard_folder, tmp_path / "strict", deterministic=True))
    with pytest.raises(OSError, match=r"no checkpoint nothing\.pt"):
        main(config(shard_folder, tmp_path / "none", branch_from="nothing.pt", max_steps=4))
    with monkeypatch.context() as patched:
        patched.setattr(train_gpt2, "get_lr", lambda step, *rest, **__: get_lr(step, *rest) + 0 / (3 - step))
        with pytest.raises(ZeroDivisionError):
            main(config(shard_folder, tmp_path / "out"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, step=5)
        with pytest.raises(Stopped):
            main(config(shard_folder, tmp_path / "out"))
    assert [path.name for path in checkpoint.listing(tmp_path / "out")] == ["model_000004.pt", "model_000005.pt"]
    main(config(shard_folder, tmp_path / "other", n_embd=8, seed=2, optimizer="muon"))
    main(config(shard_folder, tmp_path / "out"))
    assert_same_run(tmp_path / "first", tmp_path / "out")

    assert {sign: signal.getsignal(sign) for sign in handlers} == handlers
    assert (threading.active_count(), dict(os.environ)) == (threads, variables)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == precision
    assert open_files() == files
    for folder in tmp_path.iterdir():
        with run_folder.lock(folder):  # each is free
            pass


@pytest.mark.slow
def test_drawing_leaves_the_back_end_of_a_notebook_to_the_notebook(tmp_path):
    code = ("import os, sys\nfrom plumbing.curve import draw\n"
            "draw({'a': [{'kind': 'val', 'step': 1, 'loss': 2.0}]}, 'loss.png')\n"
            "import matplotlib\nprint(os.environ.get('MPLBACKEND'), matplotlib.get_backend(auto_select=False))\n"
            "print('matplotlib.pyplot' in sys.modules)")
    for named, backend in (("svg", "svg"), ("no_such", None), ("", None)):
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={
            **os.environ, "PYTHONPATH": python_path(), "MPLBACKEND": named})
        assert result.stdout.splitlines() == [f"{named} {backend}", "False"], result.stderr


def interrupt_at(patched, step: int) -> None:
    """Have this process receive Ctrl-C once that step is done."""
    logged = train_gpt2.RunLog.train

    def log(self, done, *values, **options):
        logged(self, done, *values, **options)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    patched.setattr(train_gpt2.RunLog, "train", log)


def test_an_interruption_ends_a_loop_over_runs(shard_folder, tmp_path, monkeypatch, capsys):
    """What follows in the cell must not take the result of half a run for that of a whole one."""
    interrupt_at(monkeypatch, step=3)
    begun = []
    with pytest.raises(KeyboardInterrupt):
        for seed in (1, 2):
            begun.append(seed)
            main(config(shard_folder, tmp_path / str(seed), seed=seed))
    assert begun == [1] and "stopped after step 3 of 6: the same command continues" in capsys.readouterr().out


def test_a_run_in_a_thread_is_that_of_the_main_thread(shard_folder, tmp_path):
    main(config(shard_folder, tmp_path / "main"))
    found = []
    thread = threading.Thread(target=lambda: found.append(main(config(shard_folder, tmp_path / "thread"))))
    thread.start()
    thread.join(60)
    assert found == [read_log(tmp_path / "main", "val")[-1]["loss"]]
    assert_same_run(tmp_path / "main", tmp_path / "thread")


@pytest.mark.slow
def test_many_compiled_runs_in_a_process_are_all_compiled(shard_folder, tmp_path, monkeypatch):
    """PyTorch gives a function up after eight models; each run compiles its own anew, here with a back end of ours."""
    compiled, compile_model = [], torch.compile

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, *_, **options: compile_model(model, backend=backend, **options))
    counts = []
    for i in range(10):
        before = len(compiled)
        main(config(shard_folder, tmp_path / str(i), compile=True, max_steps=1, warmup_steps=1, n_layer=1))
        counts.append(len(compiled) - before)
    assert min(counts) == max(counts) >= 2, counts


NOTEBOOK = """
from train_gpt2 import main, parse_args
from plumbing.cli import Stopped
arguments = {!r}
main(parse_args(arguments))
"""


@pytest.mark.slow
def test_in_a_notebook_a_cell_is_interrupted_and_goes_on(shard_folder, tmp_path):
    """A real kernel, and the interrupt that the button sends."""
    manager = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    env = {**os.environ, "PYTHONPATH": python_path()}
    kernel, client = manager.start_new_kernel(cwd=str(tmp_path), env=env)
    try:
        outputs = []

        def execute(code, timeout=120):
            outputs.clear()
            reply = client.execute_interactive(code, timeout=timeout, output_hook=outputs.append)
            return reply["content"], "".join(
                message["content"].get("text", "") for message in outputs if message["msg_type"] == "stream")

        words = flags(data=shard_folder, out_dir="out", max_steps=4000, val_every=0, checkpoint_every=0)
        timer = threading.Timer(25, kernel.interrupt_kernel)
        timer.start()
        content, printed = execute(NOTEBOOK.format(words))
        assert content["status"] == "error" and content["ename"] == "Stopped", content
        step = int(re.search(r"stopped after step ([\d,]+) of 4,000", printed)[1].replace(",", ""))
        assert (tmp_path / "out" / f"model_{step:06d}.pt").exists()
        content, printed = execute("import signal; print(signal.getsignal(2) is signal.default_int_handler)")
        assert printed.strip() == "True"
        timer = threading.Timer(10, kernel.interrupt_kernel)
        timer.start()
        content, printed = execute("main(parse_args(arguments))")
        assert f"resumed after step {step:,}" in printed
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
