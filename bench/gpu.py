"""Measure and test everything on a GPU, in two windows of eight minutes each.

    bench/gpu.sh
    bench/gpu.sh --window 2

Window 1: versions and attention kernels; the tests that need a GPU; tokens/s, memory and the first step of the default
run of GPT-2 124M, with a cold and a warm compile cache; flash attention, B=32 and eager for comparison; generation and
HellaSwag; the tests of torch.compile. Window 2: two minutes of training, with the loss curve; float16; the memory of
larger models, with and without activation checkpointing; options of torch.compile; the choice of B on a card that
another process also uses.

The most valuable parts come first, each in a process of its own. A part that fails shows its last lines, makes the
exit code 1 and stops nothing else; a part that does not fit into the time left is left out. The table grows on stdout.
In the folder --out, gpu1.json or gpu2.json holds its rows with all figures, and the .log beside it what the parts
printed; gpu2.png and gpu2.jsonl are the curve and the log of the two minutes. tests/test_bench.py runs both windows on
a CPU.
"""
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import hellaswag
import train_gpt2
from plumbing import cli, machine, sampling
from plumbing.cli import Positive, Range, UserError, parse_flags, run_command
from plumbing.ranks import World
from plumbing.runlog import RunLog
from plumbing.tokenizer import VOCAB_SIZE, gpt2_encoding

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, TWO_MINUTES = "the default run", "training from fresh weights"  # runs that others are compared with
# a process that holds a share of the GPU's memory until its stdin is closed
HOLD = """
import sys, torch
size = int(float(sys.argv[1]) * torch.cuda.get_device_properties(0).total_memory)
held = torch.empty(size, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench, for a GPU by default; every field is a flag."""
    # What runs
    window: Annotated[int, Range(1, 2)] = 1  # half of the parts to run: 1 or 2
    out: str = ""  # folder for figures and logs (empty: $OUT, or bench/results)
    seconds: Positive = 480  # time limit for the window
    device: Literal["cuda", "cpu"] = "cuda"  # cpu tries this script at toy size
    compile: bool | None = None  # torch.compile (default: on a GPU)
    # Training
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"] = "gpt2"  # shape of the model
    sequence_length: Positive = 1024  # tokens per sequence
    total_batch_size: Positive = 524288  # tokens per optimizer step
    steps: Positive = 7  # optimizer steps of the short runs; the first two and a profiled last one are not timed
    train_seconds: Annotated[float, Range(1)] = 120  # length of the training run in window 2, after its first step
    batch: Positive = 32  # micro-batch size to compare with the chosen one
    first_loss: float = 0  # expected loss of the first step, within 0.1 (0: what theory says of random weights)
    # HellaSwag
    repeats: Positive = 30  # times that the tests' thirty HellaSwag examples are scored

    def __post_init__(self):
        cli.check_values(self)
        cli.require(self, "total_batch_size", self.total_batch_size % self.sequence_length == 0,
                    f"a multiple of sequence_length, {self.sequence_length}")


def fill_in(config: BenchConfig) -> BenchConfig:
    """Replace the defaults that depend on the other settings or on the environment by what they stand for."""
    # the logits are normal with variance 0.02^2 C, as ln_f gives every channel variance 1
    theory = math.log(train_gpt2.PADDED_VOCAB_SIZE) + 0.02**2 * shape_of(config.model, config).n_embd / 2
    return dataclasses.replace(
        config, out=config.out or os.environ.get("OUT") or str(ROOT / "bench" / "results"),
        compile=config.device == "cuda" if config.compile is None else config.compile,
        first_loss=config.first_loss or round(theory, 3))


def shape_of(name: str, config: BenchConfig) -> train_gpt2.GPTConfig:
    """Return the shape that training gives a new model of this name."""
    return train_gpt2.GPTConfig(block_size=config.sequence_length, vocab_size=train_gpt2.PADDED_VOCAB_SIZE,
                                **train_gpt2.MODELS[name])


@dataclass
class Part:
    """A process that runs, or has run, one part."""
    name: str
    process: subprocess.Popen
    output: Path  # stdout and stderr
    figures: Path  # JSON


class Report:
    """Runs the parts and keeps the rows of the table and of the JSON file."""

    def __init__(self, config: BenchConfig, folder: Path):
        self.config, self.folder, self.end = config, folder, time.monotonic() + config.seconds
        self.on_cuda = config.device == "cuda"
        self.rows, self.parts, self.figures, self.failed = [], [], {}, False
        self.out = Path(config.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.json, self.log = (self.out / f"gpu{config.window}.{suffix}" for suffix in ("json", "log"))
        self.log.write_text("")

    def row(self, name: str, text: str, values=None, right: bool = True) -> None:
        """Add a row to the table; unless `right` it is a failure."""
        self.failed |= not right
        self._add(name, "done" if right else "failed", text if right else f"failed: {text}", values)

    def leave_out(self, name: str, why: str) -> None:
        """Add the row of something that is left out, and why."""
        self._add(name, "left out", f"left out: {why}", None)

    def _add(self, name: str, state: str, text: str, values) -> None:
        self.rows.append({"part": name, "state": state, "text": text, "values": values})
        print(f"{name:>36} | {text}", flush=True)
        head = {"bench": "gpu", **vars(self.config), "torch": torch.__version__, "python": sys.version.split()[0]}
        temporary = self.json.with_suffix(".tmp")
        temporary.write_text(json.dumps({**head, "rows": self.rows}, indent=1) + "\n")
        os.replace(temporary, self.json)

    def lacks_gpu(self, *names: str) -> bool:
        """Return whether there is no GPU; if so, rows of these names say it."""
        if self.on_cuda:
            return False
        for name in names:
            self.leave_out(name, "no GPU")
        return True

    def start(self, name: str, arguments: list[str], environment: dict[str, str]) -> Part:
        """Start `python ARGUMENTS` in a process group of its own; all parts share one compile cache."""
        output, figures = (self.folder / f"{len(self.parts)}.{suffix}" for suffix in ("out", "json"))
        caches = {f"{kind}_CACHE_DIR": str(self.folder / kind) for kind in ("TORCHINDUCTOR", "TRITON")}
        environment = {**os.environ, **caches, "BENCH_FIGURES": str(figures), **environment}
        with open(output, "w") as file:
            process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file,
                                       stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
        self.parts.append(Part(name, process, output, figures))
        return self.parts[-1]

    def kill(self, part: Part) -> None:
        """Kill what is left of a part and of the processes that it has started, so that nothing stays on the GPU."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()

    def finish(self, part: Part, cap: float) -> str | None:
        """Wait at most `cap` seconds for a part; return what it printed, or None after a row that says why not."""
        left = max(0, self.end - time.monotonic())
        code = None
        try:
            code = part.process.wait(min(cap, left))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill(part)
        text = part.output.read_text(errors="replace")
        with open(self.log, "a") as log:
            log.write(f"\n===== {part.name} =====\n{text}")
        if code == 0:
            return text
        if code is None and left < cap:
            self.leave_out(part.name, f"not done in the {left:.0f} s that were left")
            return None
        print("\n".join(text.splitlines()[-30:]))
        self.row(part.name, f"not done in {cap:.0f} s" if code is None else f"exit code {code}", right=False)
        return None

    def run(self, name: str, arguments: list[str], environment=None, least: float = 20, cap: float = 150) -> str | None:
        """Run `python ARGUMENTS` as a part, if `least` seconds are left; return what it printed, or None."""
        left = self.end - time.monotonic()
        if left >= least:
            return self.finish(self.start(name, arguments, environment or {}), cap)
        self.leave_out(name, f"{max(0, left):.0f} s left, it takes {least:.0f}")
        return None

    def order(self, do: str, **settings) -> dict[str, str]:
        """Return the environment in which this script runs the function `do` of PARTS, which starts at once."""
        common = {"do": do, "config": vars(self.config), "data": str(self.folder), "started": time.monotonic()}
        return {"BENCH_GPU": json.dumps({**common, **settings})}

    def measure(self, name: str, do: str, environment=None, least: float = 20, cap: float = 150, **settings) -> dict:
        """Run the function `do` of PARTS in a process of its own; return its figures, or {} if it fails."""
        environment = {**self.order(do, **settings), **(environment or {})}
        done = self.run(name, ["-m", "bench.gpu"], environment, least, cap) is not None
        self.figures[name] = json.loads(self.parts[-1].figures.read_text()) if done else {}
        return self.figures[name]

    def train(self, name: str, check=lambda figures: ("", True), **settings) -> dict:
        """Train and add a row; check(figures) returns a text for it and whether all is right."""
        figures = self.measure(name, "train", **{"least": 30, **settings})
        if figures:
            text, right = check(figures)
            speed = (f"{figures['tokens_per_s']:,.0f} tokens/s, MFU {figures['mfu']:.1%}, B={figures['B']}, peak "
                     f"{figures['memory_gb']:.1f} GB, first step after {figures['first_step_s']:.1f} s")
            self.row(name, f"{text}; {speed}" if text else speed, figures, right)
        return figures


def compare(losses: list, expected: list, tolerance: float) -> tuple[str, bool]:
    """Compare two runs' losses step by step -> (text, whether all are finite and within the tolerance)."""
    pairs = list(zip(losses, expected))
    if not pairs:
        return "no losses to compare with", False
    for step, pair in enumerate(pairs, start=1):
        if None in pair:
            return f"a loss that is not finite at step {step}", False
    difference = max(abs(loss - other) for loss, other in pairs)
    return f"losses within {difference:.4f} (limit {tolerance}) over {len(pairs)} steps", difference <= tolerance


def train(settings: dict) -> dict:
    """Run the real training loop for `steps` or `train_seconds`, without evaluations and checkpoints.

    The first step's time counts from the start of the process, so that it includes importing PyTorch.
    """
    config, seen, chosen = BenchConfig(**settings["config"]), [], {}
    steps, profiled = settings.get("steps", config.steps), settings.get("profile", False)
    profiler = torch.profiler.profile()

    class WatchedLog(RunLog):
        def train(self, step, loss, *values):
            super().train(step, loss, *values)
            _lr, norm, seconds, _data_seconds, _scale = values
            chosen.update(vars(self.config))
            peak = self.peak or machine.measured_peak(self.world.device, getattr(torch, self.config.dtype))
            seen.append({"seconds": seconds, "loss": loss if math.isfinite(loss) else None,
                         "skipped": not (math.isfinite(loss) and math.isfinite(norm)),
                         "mfu": self.flops_per_step / seconds / peak,
                         "at": time.monotonic() - settings["started"]})
            if profiled and step == steps - 1:
                synchronize(config)
                profiler.start()
            elif profiled and step == steps:
                profiler.stop()
            if step == steps or seen[-1]["at"] - seen[0]["at"] >= settings.get("train_seconds", math.inf):
                signal.raise_signal(signal.SIGTERM)  # the run stops as it does for a user

    train_gpt2.RunLog = WatchedLog
    train_gpt2.Run.evaluate = lambda run: None
    train_gpt2.Run.save = lambda run, **options: None
    with (tempfile.TemporaryDirectory() as out_dir, hold_memory(settings.get("held", 0)),
          contextlib.suppress(cli.Stopped)):
        train_gpt2.main(train_gpt2.TrainConfig(
            data=settings["data"], out_dir=settings.get("out_dir", out_dir), model=config.model, warmup_steps=20,
            sequence_length=config.sequence_length, total_batch_size=config.total_batch_size,
            micro_batch_size=settings.get("B", 0), val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0,
            compile=settings.get("compile", config.compile), device=config.device,
            dtype=settings.get("dtype", "auto"), yes=True))
    timed = seen[2:-1 if profiled else None] or seen[-1:]
    result = {key: [each[key] for each in seen] for key in ("seconds", "loss", "skipped")} | {
        "device": machine.describe_device(torch.device(config.device)), "dtype": chosen["dtype"],
        "B": chosen["micro_batch_size"], "mfu": statistics.median(each["mfu"] for each in timed),
        "tokens_per_s": config.total_batch_size / statistics.median(each["seconds"] for each in timed),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if config.device == "cuda" else 0.0,
        "first_step_s": seen[0]["at"]}
    return {**result, **describe_profile(profiler, config)} if profiled else result


@contextlib.contextmanager
def hold_memory(share: float):
    """Have another process hold that share of the GPU's memory while the context lasts."""
    if not share:
        yield
        return
    command, pipe = [sys.executable, "-c", HOLD, str(share)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        if other.stdout.readline() != "held\n":
            raise RuntimeError(f"the other process could not take {share:.0%} of the memory")
        try:
            yield
        finally:
            other.stdin.close()


def synchronize(config: BenchConfig) -> None:
    """Wait until the GPU has finished all its work."""
    if config.device == "cuda":
        torch.cuda.synchronize()


def kernels(profiler, config: BenchConfig) -> list:
    """Return the profiler's events that did the work: kernels and copies on a GPU, operations on a CPU."""
    events = profiler.key_averages()
    if config.device == "cpu":
        return list(events)
    return [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)]  # which would count the kernels within it again


def attention_of(events: list) -> str:
    """Name the back end of scaled_dot_product_attention in these events: cudnn, flash, efficient or math."""
    names = " ".join(event.key.lower() for event in events)
    known = {"cudnn": "cudnn", "flash": "flash", "fmha": "efficient", "efficient": "efficient"}  # cuDNN's say flash too
    return next((known[word] for word in known if word in names), "math") if names else "no kernels seen"


def describe_profile(profiler, config: BenchConfig) -> dict:
    """Return the kernels that took longest, in ms, the attention back end, and the device-to-host copies."""
    key, events = f"self_{'device' if config.device == 'cuda' else 'cpu'}_time_total", kernels(profiler, config)
    top = sorted(events, key=lambda event: -getattr(event, key))[:12]
    return {"top": [[event.key[:80], getattr(event, key) / 1000, event.count] for event in top],
            "attention": attention_of(events),
            "host_copies": sum(event.count for event in events if "Memcpy DtoH" in event.key)}


def check_machine(settings: dict) -> dict:
    """Return versions, the attention back ends in training and in decoding, and the loss of one eager step."""
    config = BenchConfig(**settings["config"])
    device, cuda = machine.pick_device(config.device, 0, 1), torch.cuda
    found = {"device": machine.describe_device(device), "torch": torch.__version__, "CUDA": torch.version.cuda,
             "cuDNN": torch.backends.cudnn.version(), "Python": sys.version.split()[0]}
    if config.device == "cuda":
        found |= {"capability": cuda.get_device_capability(), "architectures": " ".join(cuda.get_arch_list())}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    print(found, flush=True)

    model, T = build_model(config), config.sequence_length
    nh, hs = model.config.n_head, model.config.n_embd // model.config.n_head
    dtype = machine.pick_dtype("auto", device)[0]
    q, k, v = torch.randn(3, 16, nh, T, hs, dtype=dtype, device=device, requires_grad=True)
    with torch.profiler.profile() as training:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        synchronize(config)
    idx, cache = torch.zeros(1, T // 2, dtype=torch.int64, device=device), sampling.new_cache(model)  # (1, T / 2)
    with torch.no_grad(), machine.autocast(dtype, device):
        sampling.read(model, idx, cache)
        with torch.profiler.profile() as decoding:
            sampling.read(model, idx[:, :1], cache)
            synchronize(config)
    return {"versions": found, "training": attention_of(kernels(training, config)),
            "decoding": attention_of(kernels(decoding, config)),
            "loss": train({**settings, "steps": 1, "compile": False})["loss"][0]}


def build_model(config: BenchConfig) -> train_gpt2.GPT:
    """Build a model with random weights."""
    return train_gpt2.GPT(shape_of(config.model, config)).to(config.device)


def rates(count: int, work, config: BenchConfig) -> list[float]:
    """Return how many of its `count` things work() does per second, the first time and the second."""
    found, device = [], torch.device(config.device)
    for _ in range(2):  # the first one pays for new shapes
        began = time.perf_counter()
        with machine.autocast(machine.pick_dtype("auto", device)[0], device):
            work()
        synchronize(config)
        found.append(count / (time.perf_counter() - began))
    return found


def generate(settings: dict) -> dict:
    """Return the tokens per second of greedy generation at B=1 and B=8."""
    config = BenchConfig(**settings["config"])
    model, new, found = build_model(config), config.sequence_length // 4, {}
    for B in (1, 8):
        idx = torch.zeros(B, 8, dtype=torch.int64, device=config.device)  # (B, 8)
        work = functools.partial(sampling.generate, model, idx, new, temperature=0)
        found[f"B={B}"] = rates(B * new, work, config)
    return found


def score_hellaswag(settings: dict) -> dict:
    """Return the HellaSwag examples per second."""
    config = BenchConfig(**settings["config"])
    encode, encoding = make_encoder()
    hellaswag.encode = functools.cache(encode)
    examples = list(hellaswag.iterate_examples(path=ROOT / "tests" / "hellaswag_examples.jsonl")) * config.repeats
    work = functools.partial(hellaswag.evaluate, build_model(config), examples,
                             World(device=torch.device(config.device)))
    return {"encoding": encoding, "rates": rates(len(examples), work, config)}


def find_peaks(settings: dict) -> dict:
    """Predict or measure the peak bytes of training at B=1, plain and with activation checkpointing."""
    from bench import memory  # only here, as it uses a private part of PyTorch

    machine.memory_bytes = lambda: 2**63  # a prediction takes none of this machine's memory
    config, action = BenchConfig(**settings["config"]), getattr(memory, settings["action"])
    shape, T = shape_of(settings["model"], config), config.sequence_length
    return {"plain": action(shape, 1, T, False), "checkpointing": action(shape, 1, T, True)}


PARTS = {function.__name__: function for function in (train, check_machine, generate, score_hellaswag, find_peaks)}


def run_part(settings: dict) -> None:
    """Run one of PARTS, write its figures, and leave by os._exit().

    Python 3.12.0 to 3.12.2 can otherwise hang for 300 s at exit after a compiled run (CPython gh-113964).
    """
    code = 1
    try:
        Path(os.environ["BENCH_FIGURES"]).write_text(json.dumps(PARTS[settings["do"]](settings)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def make_encoder():
    """Return a function that encodes text, and its name: GPT-2's tokens or, if a package is missing, whole words."""
    try:
        return gpt2_encoding().encode_ordinary, "GPT-2's tokens"
    except (ImportError, OSError) as error:
        pieces = re.compile(r"\w+|\s|[^\w\s]")
        counts = Counter(pieces.findall((ROOT / "input.txt").read_text(encoding="utf-8")))
        ids = {piece: rank for rank, (piece, _) in enumerate(counts.most_common(VOCAB_SIZE))}
        return (lambda text: [ids.get(piece, 0) for piece in pieces.findall(text)],
                f"{len(ids):,} words numbered by how common they are, not GPT-2's tokens ({error})")


def write_tokens(report: Report) -> None:
    """Write nine tenths of input.txt, repeated to 20 million tokens, to train on, and the last tenth to validate."""
    encode, encoding = make_encoder()
    tokens = np.array(encode((ROOT / "input.txt").read_text(encoding="utf-8")), dtype=np.uint16)  # (n,)
    cut = len(tokens) * 9 // 10
    np.save(report.folder / "train_000.npy", np.resize(tokens[:cut], 20_000_000))
    np.save(report.folder / "val_000.npy", tokens[cut:])
    report.row("tokens", f"{len(tokens):,} of input.txt: {encoding}")


def look_at_machine(report: Report) -> None:
    """Add rows for versions, attention back ends and the loss of an eager step."""
    if found := report.measure("versions", "check_machine", least=10):
        report.row("versions", ", ".join(f"{key} {value}" for key, value in found["versions"].items()), found)
        report.row("attention in training", found["training"])
        report.row("attention in decoding", found["decoding"], right=found["decoding"] != "cudnn")
        loss, expected = found["loss"], report.config.first_loss
        right = loss is not None and abs(loss - expected) <= 0.1
        report.row("loss of the first eager step", f"{loss}, expected {expected} +- 0.1", loss, right)


def run_tests(report: Report, name: str, expression: str, cap: float) -> None:
    """Run the tests that need a GPU and match the expression."""
    if report.lacks_gpu(name):
        return
    for package in ("pytest", "xdist"):
        if importlib.util.find_spec(package) is None:
            report.leave_out(name, f"no {package} here")
            return
    arguments = ["-m", "pytest", "-v", "-m", "gpu", "-n0", "tests/test_gpu.py", "-k", expression]
    if output := report.run(name, arguments, cap=cap):
        summary = output.strip().splitlines()[-1].strip("= ")
        report.row(name, summary, right="passed" in summary)  # tests that are all skipped show nothing


def test_eager(report: Report) -> None:
    """Test losses, text and HellaSwag against the CPU, and the eager deterministic resume."""
    run_tests(report, "tests, eager", "not compiled", cap=150)


def test_compiled(report: Report) -> None:
    """Test the compiled deterministic resume."""
    run_tests(report, "tests, compiled", "compiled", cap=240)


def train_by_default(report: Report) -> None:
    """Train by default with a cold compile cache, profiled, and once more with a warm one."""
    cold = report.train(DEFAULT, cap=200, profile=True)
    if cold:
        report.row("attention in the default run", cold["attention"])
        report.row("device-to-host copies per step", f"{cold['host_copies']}" if report.on_cuda else "none on a CPU")
        for name, ms, count in cold["top"]:
            report.row("in the profile of a step", f"{ms:>9.1f} ms {count:>6} x {name}", [name, ms, count])
    warm = report.train("the same, compile cache warm")
    for name, figures, key, goal in (("goal: tokens/s", cold, "tokens_per_s", 500_000),
                                     ("goal: first step, cold", cold, "first_step_s", 90),
                                     ("goal: first step, warm", warm, "first_step_s", 20)):
        if figures and not re.search("H[12]00", figures["device"]):
            report.leave_out(name, f"{goal:,} is for an H100 or H200")
        elif figures:
            met = figures[key] >= goal if key == "tokens_per_s" else figures[key] <= goal
            report.row(name, f"{figures[key]:,.0f} against {goal:,}: {'met' if met else 'missed'}")


def train_otherwise(report: Report) -> None:
    """Train with flash attention instead of cuDNN's at the same B, with another B, and eager."""
    chosen = report.figures[DEFAULT].get("B", 0)
    if not report.lacks_gpu("flash attention"):
        # without a tag of its own, the compile cache would give the default run's kernels: its key lacks the back end
        report.train("flash attention", lambda found: (f"by {found['attention']}", found["attention"] == "flash"),
                     B=chosen, profile=True,
                     environment={"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1", "TORCH_COMPILE_CACHE_KEY_TAG": "flash"})
    B = report.config.batch
    if B == chosen:
        report.leave_out(f"B={B}", "that is B of the default run")
    else:
        report.train(f"B={B}", B=B)
    report.train("eager", compile=False)


def use_model(report: Report) -> None:
    """Measure the speed of generation and of HellaSwag."""
    for B, (first, second) in report.measure("generation", "generate").items():
        report.row(f"generation, {B}", f"{second:,.1f} tokens/s, first pass {first:,.1f}", [first, second])
    if scored := report.measure("HellaSwag", "score_hellaswag"):
        first, second = scored["rates"]
        report.row("HellaSwag", f"{second:,.1f} examples/s, first pass {first:,.1f}: {scored['encoding']}", scored)


def train_from_fresh_weights(report: Report) -> None:
    """Train for two minutes; keep the log and draw the loss curve."""
    def check(figures: dict) -> tuple[str, bool]:
        losses = figures["loss"]
        shown = [f"{losses[step - 1]} at step {step}" for step in (10, 50, 100, len(losses)) if step <= len(losses)]
        return f"loss {', '.join(shown)}", None not in losses and losses[-1] < losses[0]

    seconds, out_dir = report.config.train_seconds, report.folder / "run"
    log, picture = report.out / "gpu2.jsonl", report.out / "gpu2.png"
    for path in (log, picture):  # of an earlier call
        path.unlink(missing_ok=True)
    report.train(TWO_MINUTES, check, cap=seconds + 150, steps=0, train_seconds=seconds, out_dir=str(out_dir))
    if not (out_dir / "log.jsonl").exists():
        return
    shutil.copyfile(out_dir / "log.jsonl", log)
    if importlib.util.find_spec("matplotlib") is None:
        report.leave_out("loss curve", "no matplotlib")
    elif report.run("loss curve", ["plot.py", str(log), "--out", str(picture), "--x", "steps"], cap=60):
        report.row("loss curve", picture.name)


def train_in_float16(report: Report) -> None:
    """Train in float16 with a gradient scaler, and compare with the losses in bfloat16."""
    known = report.figures[TWO_MINUTES]

    def check(figures: dict) -> tuple[str, bool]:
        text, right = compare(figures["loss"], known.get("loss", []), 0.05)
        return f"{text}, {sum(figures['skipped'])} skipped", right

    report.train("float16", check, B=known.get("B", 0), dtype="float16")


def predict_memory(report: Report) -> None:
    """Begin to predict the memory of larger models, which keeps a core, otherwise idle, busy for a minute or two."""
    models = ["gpt2-medium", "gpt2-xl"] if report.on_cuda else [report.config.model]
    for model in models:
        environment = {**report.order("find_peaks", action="predict", model=model), "CUDA_VISIBLE_DEVICES": ""}
        report.start(model, ["-m", "bench.gpu"], environment)


def measure_memory(report: Report) -> None:
    """Measure larger models at B=1, with and without activation checkpointing, and compare with the predictions."""
    for part in [part for part in report.parts if part.name in train_gpt2.MODELS]:
        measured = {}
        if not report.lacks_gpu(f"{part.name}, measured"):
            measured = report.measure(f"{part.name}, measured", "find_peaks", action="measure", model=part.name)
        if report.finish(part, cap=240) is None:
            continue
        for kind, predicted in json.loads(part.figures.read_text()).items():
            text = f"{predicted / 1e9:.2f} GB predicted"
            if kind in measured:
                text += f", {measured[kind] / 1e9:.2f} measured" if measured[kind] else ", does not fit here"
            report.row(f"peak at B=1, {part.name}, {kind}", text, [predicted, measured.get(kind)])


def try_compile_options(report: Report) -> None:
    """Try options of torch.compile one by one; compare with an eager run's losses and the speed without them."""
    known = report.figures[TWO_MINUTES]
    B = known.get("B", 0)
    eager = report.train("eager", B=B, compile=False)

    def check(figures: dict) -> tuple[str, bool]:
        text, right = compare(figures["loss"], eager.get("loss", []), 0.02)
        gain = f", {figures['tokens_per_s'] / known['tokens_per_s']:.3f} x the speed without" if known else ""
        return text + gain, right

    tuning, autotune = "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING", "TORCHINDUCTOR_MAX_AUTOTUNE"
    for name, variables in (("coordinate_descent_tuning", [tuning]),
                            ("max-autotune-no-cudagraphs", [tuning, autotune])):  # what that mode stands for
        if report.config.compile or not report.lacks_gpu(name):
            report.train(name, check, B=B, least=60, cap=240, environment=dict.fromkeys(variables, "1"))


def share_memory(report: Report) -> None:
    """Choose B while another process holds 60 % of the GPU's memory, and train with it."""
    for kind in ("eager", "compiled"):
        name = f"{kind}, 60 % of the memory taken"
        if not report.lacks_gpu(name):
            report.train(name, lambda found: compare(found["loss"], report.figures[TWO_MINUTES].get("loss", []), 0.02),
                         compile=kind == "compiled", held=0.6)


WINDOWS = {
    1: (look_at_machine, test_eager, train_by_default, train_otherwise, use_model, test_compiled),
    2: (predict_memory, train_from_fresh_weights, train_in_float16, measure_memory, try_compile_options, share_memory),
}


def main(config: BenchConfig) -> int:
    """Run all parts of a window; return the exit code."""
    if config.device == "cuda" and not torch.cuda.is_available():  # asked without taking any of its memory
        raise UserError("PyTorch finds no GPU here: use --device cpu and a small --model to try this script")
    config = fill_in(config)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        report = Report(config, Path(folder))
        try:
            for item in (write_tokens, *WINDOWS[config.window]):
                try:
                    item(report)
                except Exception as error:  # the parts that follow still run
                    traceback.print_exc()
                    report.row(item.__name__, cli.explain(error), right=False)
        finally:
            for part in report.parts:
                if part.process.poll() is None:
                    report.kill(part)
    print(f"written to {report.json} and {report.log.name}")
    return int(report.failed)


if __name__ == "__main__":
    if "BENCH_GPU" in os.environ:
        run_part(json.loads(os.environ["BENCH_GPU"]))
    description = __doc__.splitlines()[0]
    sys.exit(run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], description)))))
