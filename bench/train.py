"""Measure training speed side by side.

    python -m bench.train

    ours            train_gpt2.main itself, held between the windows of steps that are timed
    compiled        the same with torch.compile
    transformers    GPT2LMHeadModel without dropout in the plainest correct loop
    +memory         the same with glibc and huge pages set as train_gpt2.py sets them
    build-nanogpt   our model in a loop with the habits of build-nanogpt's: bfloat16 autocast whatever the hardware,
                    `.item()` and a wait for the device in each micro-step, whole shards as int64; --habits chooses some

Each side has a process, and so a peak memory, of its own. The sides take turns, a window of steps each, and so does a
process that times matrix products: the best of these is the ceiling. Speeds are medians of the windows.
"""
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt2
from plumbing import cli, machine
from plumbing.cli import Dtype, Positive, UserError, parse_flags, run_command
from plumbing.runlog import RunLog
from plumbing.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT, MODELS, PADDED_VOCAB_SIZE, GPTConfig, TrainConfig


class Size(NamedTuple):
    """A model and a batch."""
    shape: dict[str, int]
    T: int
    B_on_cpu: int
    B_on_gpu: int
    steps: int  # optimizer steps per window


def shape_of(**sizes: int) -> dict[str, int]:
    """Return n_layer, n_head and n_embd, those of GPT-2 124M where not given."""
    shape = GPTConfig(**sizes)
    return dict(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)


SIZES = {
    "demo": Size(shape_of(**MODELS["demo"]), T=64, B_on_cpu=16, B_on_gpu=256, steps=20),
    "6x384": Size(shape_of(n_layer=6, n_head=6, n_embd=384), T=256, B_on_cpu=8, B_on_gpu=128, steps=4),
    "gpt2": Size(shape_of(**MODELS["gpt2"]), T=1024, B_on_cpu=1, B_on_gpu=16, steps=1),
}
SIDES = ("ours", "compiled", "transformers", "+memory", "build-nanogpt")
HABITS = ("bf16", "sync", "int64")


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench; every field is a flag."""
    # What is compared
    sizes: str = ",".join(SIZES)  # some of demo (T=64), 6x384 (6 layers, T=256), gpt2 (124M, T=1024), with commas
    sides: str = ",".join(SIDES)  # sides to run, with commas between them
    habits: str = ",".join(HABITS)  # habits of the side build-nanogpt, with commas between them, or none
    # Batch
    micro_batch_size: int = 0  # sequences per forward pass (0: 16, 8 and 1 on a CPU, 256, 128 and 16 on a GPU)
    grad_accum_steps: Positive = 1  # micro-steps per optimizer step
    # Machine
    dtype: Dtype = "float32"  # precision of matrix products (16 bits by autocast; auto: by hardware)
    device: str = "auto"  # auto, cpu or cuda
    windows: Positive = 5  # windows of steps to time on each side

    def __post_init__(self):
        cli.check_values(self)
        for name, known in (("sizes", tuple(SIZES)), ("sides", SIDES), ("habits", (*HABITS, "none"))):
            cli.require(self, name, set(getattr(self, name).split(",")) <= set(known),
                        f"some of {','.join(known)}, with commas between them")


@dataclass(frozen=True)
class Job:
    """What the process of a side needs to know."""
    side: str
    shape: dict[str, int]
    T: int
    B: int
    data: str  # folder of shards
    config: BenchConfig

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.B * self.T * self.config.grad_accum_steps

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Return the device and the dtype of matrix products, as train_gpt2.py chooses them."""
        device = machine.pick_device(self.config.device, 0, 1)
        return device, machine.pick_dtype(self.config.dtype, device)[0]


class Turns:
    """A side's end of the pipe: the side steps only when it is told to, and reports how long the steps took."""

    def __init__(self, pipe):
        self.pipe, self.left, self.started, self.data_seconds = pipe, 1, time.perf_counter(), 0.0

    def step_done(self, loss: float) -> None:
        """Count a step; at the end of a window, report it and wait for the next."""
        self.left -= 1
        if self.left == 0:
            taken = time.perf_counter() - self.started
            self.pipe.send({"seconds": taken, "loss": loss, "memory": peak_memory(), "data": self.data_seconds})
            self.left, self.data_seconds = self.pipe.recv(), 0.0
            self.started = time.perf_counter()


def peak_memory() -> int:
    """Return the peak bytes on the GPU if one is used, otherwise the peak of this process's resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_ours(job: Job, turns: Turns) -> None:
    """Run train_gpt2.main, unchanged but for a log that holds it between windows."""
    class HeldLog(RunLog):
        def train(self, step, loss, *values):
            super().train(step, loss, *values)
            _lr, _norm, _seconds, data_seconds, _scale = values
            turns.data_seconds += data_seconds
            turns.step_done(loss)

    train_gpt2.RunLog = HeldLog
    out_dir = tempfile.mkdtemp(dir=job.data)  # goes with the data, as this process is killed
    train_gpt2.main(TrainConfig(
        data=job.data, out_dir=out_dir, **job.shape, sequence_length=job.T, micro_batch_size=job.B,
        total_batch_size=job.tokens, max_steps=10**6, val_every=0, val_tokens=job.T, hellaswag_every=0, sample_every=0,
        checkpoint_every=0, compile=job.side == "compiled", dtype=job.config.dtype, device=job.config.device,
        yes=True))


def run_transformers(job: Job, turns: Turns) -> None:
    """Train as anyone does who begins with transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device, dtype = job.device_and_dtype()
    if job.side == "+memory":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        machine.keep_freed_memory()
    model = GPT2LMHeadModel(GPT2Config(**job.shape, n_positions=job.T, vocab_size=VOCAB_SIZE, resid_pdrop=0.0,
                                       embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.from_numpy(np.load(next(Path(job.data).glob("*train*.npy"))).astype(np.int64))
    at, n = 0, job.config.grad_accum_steps
    while True:
        optimizer.zero_grad()
        for _ in range(n):
            at = (at + job.B * job.T) % (len(tokens) - job.B * job.T)
            x = tokens[at:at + job.B * job.T].view(job.B, job.T).to(device)  # (B, T)
            with machine.autocast(dtype, device):
                loss = model(input_ids=x, labels=x).loss / n
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        turns.step_done(loss.item() * n)


def run_build_nanogpt(job: Job, turns: Turns) -> None:
    """Train our model with build-nanogpt's habits."""
    habits = set(job.config.habits.split(","))
    device, dtype = job.device_and_dtype()
    autocast = machine.autocast(torch.bfloat16 if "bf16" in habits else dtype, device)
    torch.set_float32_matmul_precision("high")
    model = GPT(GPTConfig(block_size=job.T, vocab_size=PADDED_VOCAB_SIZE, **job.shape)).to(device)
    optimizers = train_gpt2.configure_optimizers(model, TrainConfig(), device)
    tokens = np.load(next(Path(job.data).glob("*train*.npy")), mmap_mode=None if "int64" in habits else "c")
    tokens = torch.from_numpy(tokens.astype(np.int64)) if "int64" in habits else tokens
    at, n = 0, job.config.grad_accum_steps
    while True:
        model.zero_grad()
        total = 0.0
        for _ in range(n):
            at = (at + job.B * job.T) % (len(tokens) - job.B * job.T - 1)
            window = torch.as_tensor(tokens[at:at + job.B * job.T + 1]).long().to(device)
            x, y = window[:-1].view(job.B, job.T), window[1:].view(job.B, job.T)  # (B, T) each
            with autocast:
                loss = model(x, y)
            (loss / n).backward()
            if "sync" in habits:
                total += loss.item()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            else:
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        turns.step_done(float(total) / n)


def run_ceiling(job: Job, turns: Turns) -> None:
    """Report as the loss the best FLOP/s of matrix products as large as the model's."""
    device, dtype = job.device_and_dtype()
    rows, C = (16384, 4096) if device.type == "cuda" else (2048, 768)
    a, b, w = (torch.randn(n, m, device=device, dtype=dtype) for n, m in ((rows, C), (rows, 4 * C), (4 * C, C)))
    while True:
        best = 0.0
        for _ in range(4):
            for product in (lambda: a @ w.T, lambda: b @ w, lambda: b.T @ a):
                started = time.perf_counter()
                product()[0, 0].item()  # reading a value waits for the device
                best = max(best, 8 * rows * C * C / (time.perf_counter() - started))
        turns.step_done(best)


RUNS = {"ours": run_ours, "compiled": run_ours, "transformers": run_transformers, "+memory": run_transformers,
        "build-nanogpt": run_build_nanogpt, "ceiling": run_ceiling}


def work(pipe, job: Job) -> None:
    """Run a side in a process of its own."""
    sys.stdout = open(os.devnull, "w")
    try:
        RUNS[job.side](job, Turns(pipe))
    except BaseException as error:
        pipe.send({"error": cli.explain(error)})


def receive(side: str, pipe) -> dict:
    """Wait for the next message of a side. Raises UserError if the side has failed."""
    try:
        message = pipe.recv()
    except EOFError:
        raise UserError(f"{side} was killed, perhaps for lack of memory: use fewer --sides") from None
    if "error" in message:
        raise UserError(f"{side} failed: {message['error']}")
    return message


def take_turns(config: BenchConfig, size: Size, B: int, data: str) -> dict[str, dict]:
    """Run the sides and the ceiling, a window each in turn.

    Returns for each the `windows` (seconds per step, of the ceiling its FLOP/s), its `last` message, and the seconds
    of its `first` step.
    """
    context, sides = multiprocessing.get_context("spawn"), {}
    try:
        for side in ("ceiling", *config.sides.split(",")):
            here, there = context.Pipe()
            job = Job(side, size.shape, size.T, B, data, config)
            process = context.Process(target=work, args=(there, job), daemon=True)
            process.start()
            there.close()  # otherwise the end of the process would not be noticed
            sides[side] = {"pipe": here, "process": process, "windows": []}
            sides[side]["first"] = receive(side, here)["seconds"]
        for window in range(config.windows + 1):
            for side, state in sides.items():
                count = 1 if side == "ceiling" else size.steps
                state["pipe"].send(count)
                state["last"] = receive(side, state["pipe"])
                if window > 0:  # the first one warms up
                    state["windows"].append(state["last"]["loss"] if side == "ceiling" else
                                            state["last"]["seconds"] / count)
    finally:
        for state in sides.values():
            state["process"].kill()
            state["process"].join()
    return sides


def measure(config: BenchConfig, name: str, data: str) -> dict:
    """Run all sides at one size; return the speed, the memory and so on of each."""
    size = SIZES[name]
    on_gpu = machine.pick_device(config.device, 0, 1).type == "cuda"
    B = config.micro_batch_size or (size.B_on_gpu if on_gpu else size.B_on_cpu)
    sides = take_turns(config, size, B, data)
    ceiling = statistics.median(sides.pop("ceiling")["windows"])
    with torch.device("meta"):  # only counts parameters
        model = GPT(GPTConfig(block_size=size.T, vocab_size=PADDED_VOCAB_SIZE, **size.shape))
    tokens = B * size.T * config.grad_accum_steps
    flops = machine.flops_per_token(model, size.T) * tokens
    result = {"size": name, "B": B, "T": size.T, "ceiling_gflops": ceiling / 1e9, "sides": {}}
    for side, state in sides.items():
        seconds, last = statistics.median(state["windows"]), state["last"]
        result["sides"][side] = {
            "seconds": state["windows"], "tokens_per_s": tokens / seconds, "of_ceiling": flops / seconds / ceiling,
            "memory_mib": last["memory"] / 2**20, "loss": last["loss"], "data_share": last["data"] / last["seconds"],
            "first_step_s": state["first"]}
    return result


def print_table(result: dict, config: BenchConfig) -> None:
    """Print the table of a size."""
    sides = result["sides"]
    print(f"\n{result['size']}, T={result['T']}, B={result['B']}, {config.grad_accum_steps} "
          f"{cli.plural(config.grad_accum_steps, 'micro-step')}, {config.dtype}; ceiling "
          f"{result['ceiling_gflops']:,.0f} GFLOP/s")
    print(f"{'side':>13} {'tokens/s':>9} {'range':>17} {'x transf.':>9} {'x +memory':>9} {'GFLOP/s':>8} "
          f"{'ceiling':>8} {'peak MiB':>9} {'first step s':>12} {'data':>6}")
    for side, values in sides.items():
        rate = values["tokens_per_s"]
        middle = statistics.median(values["seconds"])
        low, high = (rate * middle / of(values["seconds"]) for of in (max, min))
        ratios = [f"{rate / sides[other]['tokens_per_s']:.2f}" if other in sides else "-"
                  for other in ("transformers", "+memory")]
        data = f"{values['data_share']:.2%}" if values["data_share"] else "-"
        print(f"{side:>13} {rate:>9,.0f} {f'{low:,.0f}-{high:,.0f}':>17} {ratios[0]:>9} {ratios[1]:>9} "
              f"{values['of_ceiling'] * result['ceiling_gflops']:>8,.0f} {values['of_ceiling']:>8.1%} "
              f"{values['memory_mib']:>9,.0f} {values['first_step_s']:>12.1f} {data:>6}", flush=True)


def main(config: BenchConfig) -> None:
    """Print a table for each size and one JSON line."""
    device = machine.pick_device(config.device, 0, 1)
    print(f"{machine.describe_device(device)}, torch {torch.__version__}")
    results = []
    with tempfile.TemporaryDirectory() as data:
        random = np.random.default_rng(0)
        for split, tokens in (("train", 10_000_000), ("val", 100_000)):
            np.save(f"{data}/{split}_000.npy", random.integers(0, VOCAB_SIZE, tokens, dtype=np.uint16))
        for name in config.sizes.split(","):
            results.append(measure(config, name, data))
            print_table(results[-1], config)
    print(json.dumps({"bench": "train", **vars(config), "torch": torch.__version__, "sizes_measured": results}))


if __name__ == "__main__":
    run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
