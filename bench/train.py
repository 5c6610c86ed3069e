"""Training speed side by side: `python bench/train.py`

    ours          train_gpt2.main itself, its loop held between windows
    compiled      the same with torch.compile
    transformers  GPT2LMHeadModel and the plainest correct loop, without dropout
    +memory       the same with glibc and huge pages set as train_gpt2.py sets them
    curriculum    our model in a loop with the habits of build-nanogpt: bfloat16 autocast whatever the hardware,
                  `.item()` and a wait for the device every micro-step, whole shards as int64; --habits takes some only

Each side has a process, and so a peak memory, of its own. They take turns, a window of steps each, also with a process
that times matrix products: the best of them is the ceiling. Medians of the windows, and the range.
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from plumbing import cli, machine, runlog
from plumbing.cli import UserError, parse_flags, run_command
from plumbing.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT, MODELS, PADDED_VOCAB_SIZE, DataLoaderLite, GPTConfig, TrainConfig

SIZES = {  # shape, T, windows a micro-batch on a CPU and on a GPU, steps a window
    "demo": (MODELS["demo"], 64, 16, 256, 20),
    "6x384": (dict(n_layer=6, n_head=6, n_embd=384), 256, 8, 128, 4),
    "gpt2": (MODELS["gpt2"], 1024, 1, 16, 1),
}
SIDES = ("ours", "compiled", "transformers", "+memory", "curriculum")


@dataclass
class BenchConfig:
    """Every field is a flag."""

    sizes: str = "demo,6x384,gpt2"  # which, with commas: demo (T=64), 6x384 (6 layers, T=256), gpt2 (124M, T=1024)
    sides: str = ",".join(SIDES)  # which, with commas
    dtype: str = "float32"  # float32, bfloat16 autocast, or auto; curriculum takes its own
    habits: str = "bf16,sync,int64"  # of the curriculum
    micro_batch_size: int = 0  # windows (0: 16, 8 and 1 on a CPU, 256, 128 and 16 on a GPU)
    grad_accum_steps: int = 1  # micro-steps a step
    windows: int = 5  # of each side
    device: str = "auto"  # cpu or cuda


@dataclass
class Job:
    """What a side needs to know."""

    side: str
    shape: dict
    T: int
    B: int
    grad_accum_steps: int
    dtype: str
    habits: str
    device: str
    data: str

    @property
    def tokens(self) -> int:
        return self.B * self.T * self.grad_accum_steps


class Turns:
    """A side's end of the pipe: it steps only when told to, and says how long the steps took."""

    def __init__(self, pipe, job: Job):
        self.pipe, self.job, self.left, self.started = pipe, job, 1, time.perf_counter()
        self.data_seconds = 0.0

    def step_done(self, loss: float) -> None:
        """After each step; at the end of a window, report and wait for the next."""
        self.left -= 1
        if self.left == 0:
            taken = time.perf_counter() - self.started
            self.pipe.send({"seconds": taken, "loss": loss, "memory": peak_memory(), "data": self.data_seconds})
            self.left, self.data_seconds = self.pipe.recv(), 0.0
            self.started = time.perf_counter()


def peak_memory() -> int:
    """Bytes: of the GPU where one is used, else the most this process has had resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_ours(job: Job, turns: Turns) -> None:
    """train_gpt2.main, unchanged but for a log that holds it and a clock around the loading of data."""
    class HeldLog(runlog.RunLog):
        def train(self, step, loss, *rest, **more):
            super().train(step, loss, *rest, **more)
            turns.step_done(loss)

    def timed(function):
        def call(*arguments):
            started = time.perf_counter()
            result = function(*arguments)
            turns.data_seconds += time.perf_counter() - started
            return result
        return call

    runlog.RunLog = HeldLog
    DataLoaderLite.next_batch, train_gpt2.to_device = timed(DataLoaderLite.next_batch), timed(train_gpt2.to_device)
    with tempfile.TemporaryDirectory() as out_dir:
        train_gpt2.main(TrainConfig(
            data=job.data, out_dir=out_dir, **job.shape, sequence_length=job.T, micro_batch_size=job.B,
            total_batch_size=job.tokens, max_steps=10**6, val_every=0, val_tokens=job.T, hellaswag_every=0,
            sample_every=0, checkpoint_every=0, compile=job.side == "compiled", dtype=job.dtype, device=job.device))


def run_transformers(job: Job, turns: Turns) -> None:
    """The loop of anyone who begins with transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device = machine.pick_device(job.device, 0, 1)
    dtype = machine.pick_dtype(job.dtype, device)[0]
    if job.side == "+memory":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        machine.keep_freed_memory()
    model = GPT2LMHeadModel(GPT2Config(**job.shape, n_positions=job.T, vocab_size=VOCAB_SIZE, resid_pdrop=0.0,
                                       embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.from_numpy(np.load(next(Path(job.data).glob("*train*.npy"))).astype(np.int64))
    at = 0
    while True:
        optimizer.zero_grad()
        for _ in range(job.grad_accum_steps):
            at = (at + job.B * job.T) % (len(tokens) - job.B * job.T)
            x = tokens[at:at + job.B * job.T].view(job.B, job.T).to(device)  # (B, T)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(input_ids=x, labels=x).loss / job.grad_accum_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        turns.step_done(loss.item())


def run_curriculum(job: Job, turns: Turns) -> None:
    """Our model, the curriculum's habits around it."""
    habits = set(job.habits.split(","))
    device = machine.pick_device(job.device, 0, 1)
    wide = "bf16" in habits or machine.pick_dtype(job.dtype, device)[0] == torch.bfloat16
    torch.set_float32_matmul_precision("high")
    model = GPT(GPTConfig(block_size=job.T, vocab_size=PADDED_VOCAB_SIZE, **job.shape)).to(device)
    config = TrainConfig()
    optimizer = train_gpt2.configure_optimizer(model, config, device)
    tokens = np.load(next(Path(job.data).glob("*train*.npy")), mmap_mode=None if "int64" in habits else "r")
    tokens = torch.from_numpy(tokens.astype(np.int64)) if "int64" in habits else tokens
    at = 0
    while True:
        optimizer.zero_grad()
        total = 0.0
        for _ in range(job.grad_accum_steps):
            at = (at + job.B * job.T) % (len(tokens) - job.B * job.T - 1)
            window = torch.as_tensor(tokens[at:at + job.B * job.T + 1]).long().to(device)
            x, y = window[:-1].view(job.B, job.T), window[1:].view(job.B, job.T)  # (B, T) each
            loss = train_gpt2.batch_loss(model, x, y, torch.autocast(device.type, torch.bfloat16, enabled=wide))
            (loss / job.grad_accum_steps).backward()
            if "sync" in habits:
                total += loss.item()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            else:
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        turns.step_done(float(total) / job.grad_accum_steps)


def run_ceiling(job: Job, turns: Turns) -> None:
    """A "loss" that is the best FLOP/s of matrix products as large as the model's."""
    device = machine.pick_device(job.device, 0, 1)
    dtype = machine.pick_dtype(job.dtype, device)[0]
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


def work(pipe, job: Job) -> None:
    """A side's process."""
    sys.stdout = open(os.devnull, "w")
    run = {"ours": run_ours, "compiled": run_ours, "curriculum": run_curriculum, "ceiling": run_ceiling}
    try:
        run.get(job.side, run_transformers)(job, Turns(pipe, job))
    except BaseException as error:
        pipe.send({"error": cli.explain(error)})


def measure(config: BenchConfig, size: str, data: str) -> dict:
    """Seconds of each window, memory and so on of each side at one size."""
    shape, T, on_cpu, on_gpu, steps = SIZES[size]
    device = machine.pick_device(config.device, 0, 1)
    B = config.micro_batch_size or (on_gpu if device.type == "cuda" else on_cpu)
    context, sides = multiprocessing.get_context("spawn"), {}
    for side in ("ceiling", *config.sides.split(",")):
        job = Job(side, shape, T, B, config.grad_accum_steps, config.dtype, config.habits, config.device, data)
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, job), daemon=True)
        process.start()
        there.close()  # else the end of the process would not be noticed
        sides[side] = {"pipe": here, "process": process, "windows": [], "first": receive(side, here)["seconds"]}
    for window in range(config.windows + 1):
        for side, state in sides.items():
            count = 1 if side == "ceiling" else steps
            state["pipe"].send(count)
            state["last"] = receive(side, state["pipe"])
            if window > 0:  # the first one warms up
                state["windows"].append(state["last"]["loss"] if side == "ceiling" else
                                        state["last"]["seconds"] / count)
    for state in sides.values():
        state["process"].kill()
        state["process"].join()
    ceiling = statistics.median(sides.pop("ceiling")["windows"])
    flops = GPT(GPTConfig(block_size=T, vocab_size=PADDED_VOCAB_SIZE, **shape)).flops_per_token(T)
    tokens = B * T * config.grad_accum_steps
    return {"size": size, "B": B, "T": T, "ceiling_gflops": ceiling / 1e9, "sides": {
        side: {"seconds": state["windows"], "tokens_per_s": tokens / statistics.median(state["windows"]),
               "of_ceiling": flops * tokens / statistics.median(state["windows"]) / ceiling,
               "memory_mib": state["last"]["memory"] / 2**20, "loss": state["last"]["loss"],
               "data_share": state["last"]["data"] / state["last"]["seconds"],
               "first_step_s": state["first"]} for side, state in sides.items()}}


def receive(side: str, pipe) -> dict:
    """The next message of a side."""
    try:
        message = pipe.recv()
    except EOFError:
        raise UserError(f"{side} was killed: too little memory? take fewer --sides") from None
    if "error" in message:
        raise UserError(f"{side} failed: {message['error']}")
    return message


def print_table(result: dict, config: BenchConfig) -> None:
    """A size's table."""
    sides = result["sides"]
    print(f"\n{result['size']}, T={result['T']}, B={result['B']}, {config.grad_accum_steps} "
          f"{cli.plural(config.grad_accum_steps, 'micro-step')}, {config.dtype}; ceiling "
          f"{result['ceiling_gflops']:,.0f} GFLOP/s")
    print(f"{'side':>12} {'tokens/s':>9} {'range':>17} {'x transf.':>9} {'x +memory':>9} {'GFLOP/s':>8} "
          f"{'ceiling':>8} {'peak MiB':>9} {'first step s':>12} {'data':>6}")
    for side, values in sides.items():
        rate = values["tokens_per_s"]
        middle = statistics.median(values["seconds"])
        low, high = (rate * middle / of(values["seconds"]) for of in (max, min))
        ratios = [f"{rate / sides[other]['tokens_per_s']:.2f}" if other in sides else "-"
                  for other in ("transformers", "+memory")]
        data = f"{values['data_share']:.2%}" if values["data_share"] else "-"
        print(f"{side:>12} {rate:>9,.0f} {f'{low:,.0f}-{high:,.0f}':>17} {ratios[0]:>9} {ratios[1]:>9} "
              f"{values['of_ceiling'] * result['ceiling_gflops']:>8,.0f} {values['of_ceiling']:>8.1%} "
              f"{values['memory_mib']:>9,.0f} {values['first_step_s']:>12.1f} {data:>6}", flush=True)


def main(config: BenchConfig) -> None:
    """Print a table for each size and one JSON line."""
    for names, known, flag in ((config.sizes, SIZES, "sizes"), (config.sides, SIDES, "sides"),
                               (config.habits, ("bf16", "sync", "int64", ""), "habits")):
        if unknown := [name for name in names.split(",") if name not in known]:
            raise UserError(f"--{flag} takes {', '.join(known)}, with commas between them, not {unknown[0]!r}")
    device = machine.pick_device(config.device, 0, 1)
    print(f"{machine.describe_device(device)}, torch {torch.__version__}")
    results = []
    with tempfile.TemporaryDirectory() as data:
        random = np.random.default_rng(0)
        for split, tokens in (("train", 10_000_000), ("val", 100_000)):
            np.save(f"{data}/{split}_000.npy", random.integers(0, VOCAB_SIZE, tokens, dtype=np.uint16))
        for size in config.sizes.split(","):
            results.append(measure(config, size, data))
            print_table(results[-1], config)
    print(json.dumps({"bench": "train", **vars(config), "torch": torch.__version__, "sizes_measured": results}))


if __name__ == "__main__":
    run_command(main, BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0])))
