"""Efficiency, one change at a time.

Question: what does each change from the plainest correct loop to ours bring, when it is added in the order of
build-nanogpt's lecture, and when it alone is taken away at the end?

Prediction: all loops have the same losses, to 1e-3, but that bfloat16 changes them by up to 0.02 and padding by
ln(50304 / 50257) = 0.0009. On a CPU, bfloat16 doubles the tokens/s, kept memory adds 30 %, a larger micro-batch 20 %,
compiling 10 %; padding, fused AdamW, one read per step and memory mapping each change less than 5 %. Memory mapping
saves 8 bytes per token of the shard; the larger micro-batch costs its logits, 150 MB or more. HellaSwag with a shared
context is 3 times as fast as with four rows per example, generation with a cache 3 times, gigatoken 10 times as fast as
tiktoken.
"""
import importlib
import itertools
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train_gpt2
from bench.study.page import COLORS, Claim, Report, measured, table
from bench.study.stats import CONFIRMED, REFUTED, UNSEEN
from bench.train import peak_memory
from plumbing import cli, machine
from plumbing.ranks import World
from plumbing.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT, PADDED_VOCAB_SIZE, GPTConfig

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Loop:
    """What a loop does; False is the plainest way. In the order of the lecture, and then what is not in it."""
    bf16: bool = False
    compiled: bool = False
    padded: bool = False
    fused: bool = False
    large_batch: bool = False
    one_read: bool = False
    mapped: bool = False
    kept: bool = False


CHANGES = {  # name -> what it is, and lines of run_loop or make_model() that are new or different
    "bf16": ("mixed precision (bfloat16; on a GPU also TF32)", 2),
    "compiled": ("torch.compile", 1),
    "padded": ("vocabulary of 50,304 instead of 50,257", 1),
    "fused": ("fused AdamW", 1),
    "large_batch": ("larger micro-batch", 1),
    "one_read": ("one host read per step", 1),
    "mapped": ("memory-mapped uint16", 1),  # instead of the line that loads
    "kept": ("freed memory kept, huge pages", 2),  # and keep_freed_memory(), a function of 5
}

NEUTRAL = ("padded", "fused", "one_read", "mapped")  # which were predicted to make no difference to a CPU's speed


@dataclass(frozen=True)
class Size:
    """The model, the batch and how long is measured."""
    shape: tuple[int, int, int]  # n_layer, n_head, n_embd
    T: int
    windows: int  # per step
    B: int  # of the larger micro-batch
    steps: int
    shard: int  # tokens in the shard
    changes: tuple[str, ...] = tuple(CHANGES)
    pair_shape: tuple[int, int, int] = (4, 4, 256)  # model for HellaSwag and generation
    examples: int = 30
    new_tokens: int = 128
    text: int = 10**6  # characters to encode
    runs: int = 3  # of each side of a pair
    device: str = "cpu"


SIZES = {
    "cpu": Size((2, 4, 128), T=128, windows=8, B=4, steps=8, shard=10**7),
    "gpu": Size((12, 12, 768), T=1024, windows=32, B=16, steps=10, shard=10**8, pair_shape=(12, 12, 768),
                device="cuda"),
    "quick": Size((2, 2, 64), T=128, windows=4, B=4, steps=3, shard=10**7, changes=("kept",),
                  pair_shape=(2, 2, 128), examples=10, new_tokens=64, text=10**5),
    "toy": Size((1, 1, 16), T=16, windows=4, B=2, steps=2, shard=10**5, changes=("large_batch",),
                pair_shape=(1, 1, 16), examples=4, new_tokens=8, text=10**4, runs=1),
}


def make_model(loop: Loop, size: Size, device: torch.device) -> GPT:
    """Make the model; without the padding, it has the same rows as with it but for the last 47."""
    torch.manual_seed(0)
    L, nh, C = size.shape
    model = GPT(GPTConfig(size.T, PADDED_VOCAB_SIZE, L, nh, C))
    if not loop.padded:
        cut = {name: weight[:VOCAB_SIZE] for name, weight in model.state_dict().items()}  # others have fewer rows
        model = GPT(GPTConfig(size.T, VOCAB_SIZE, L, nh, C))
        model.load_state_dict(cut)
    return model.to(device)


def make_optimizer(loop: Loop, model: GPT, device: torch.device):
    """Make AdamW: ours, which is fused, or PyTorch's own with the same settings."""
    config = train_gpt2.TrainConfig()
    (ours,) = train_gpt2.configure_optimizers(model, config, device)
    if loop.fused:
        return ours
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in ours.param_groups]
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(0.9, 0.95))


def run_loop(loop: Loop, size: Size, shard: str, cache: str) -> dict:
    """Train, in a process of its own; return the losses and seconds of the steps, and the peak memory in bytes."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "THP_MEM_ALLOC_ENABLE": str(int(loop.kept))}
    if loop.kept:
        machine.keep_freed_memory()
    device = torch.device(size.device)
    torch.set_float32_matmul_precision("high" if loop.bf16 else "highest")  # TF32, on a GPU
    dtype = torch.bfloat16 if loop.bf16 else torch.float32
    if loop.mapped:
        tokens = torch.from_numpy(np.load(shard, mmap_mode="c"))  # (n,) uint16
    else:
        tokens = torch.tensor(np.load(shard).astype(np.int32), dtype=torch.long)  # (n,)
    raw_model = make_model(loop, size, device)
    model = machine.compiled(raw_model, dtype, False) if loop.compiled else raw_model
    optimizer = make_optimizer(loop, raw_model, device)
    B = size.B if loop.large_batch else 1
    grad_accum_steps, at, losses, seconds = size.windows // B, 0, [], []
    for _ in range(size.steps + 1):
        started, loss_sum = time.perf_counter(), torch.zeros((), device=device) if loop.one_read else 0.0
        for _ in range(grad_accum_steps):
            window = tokens[at:at + B * size.T + 1].long().to(device)  # (B * T + 1,)
            x, y = window[:-1].view(B, size.T), window[1:].view(B, size.T)  # (B, T) each
            at += B * size.T
            with machine.autocast(dtype, device):
                loss = model(x, y) / grad_accum_steps
            loss.backward()
            loss_sum += loss.detach() if loop.one_read else loss.item()
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_sum))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "first_s": seconds[0], "seconds": seconds[1:], "memory": peak_memory()}


def make_loops(changes: tuple[str, ...]) -> dict[str, Loop]:
    """Return the loops by name: plain, then with each change added, then the last without each of the changes."""
    loops = {"plain": Loop()}
    for name in changes:
        loops[f"+ {name}"] = replace(list(loops.values())[-1], **{name: True})
    ours = list(loops.values())[-1]
    return loops | {f"- {name}": replace(ours, **{name: False}) for name in changes[:-1]}  # the last: the rung before


def possible(size: Size) -> tuple[tuple[str, ...], list[str]]:
    """Return the changes that this machine can make, and notes on the others."""
    device, notes, changes = torch.device(size.device), [], list(size.changes)
    if "bf16" in changes and not machine.is_native(torch.bfloat16, device):
        changes.remove("bf16")
        notes.append("Mixed precision is left out: this machine does not multiply bfloat16 natively.")
    if "kept" in changes and device.type == "cuda":
        changes.remove("kept")
        notes.append("Kept memory is left out: it is for CPUs.")
    return tuple(changes), notes


def turns(runs: int, sides: dict, prepare=lambda: None) -> dict[str, list[float]]:
    """Run the sides in turn, after prepare(), which is not timed -> the seconds of each run."""
    seconds = {side: [] for side in sides}
    for _ in range(runs):
        prepare()
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - started)
    return seconds


def score(size: Size) -> dict:
    """Compare HellaSwag with a shared context and with four rows per example, with one model."""
    import hellaswag
    from bench.hellaswag import usual_loop

    device = torch.device(size.device)
    model = GPT(GPTConfig(1024, VOCAB_SIZE, *size.pair_shape)).to(device)
    world, examples = World(device=device), hellaswag.load_examples(path=ROOT / "tests" / "hellaswag_examples.jsonl")
    examples, chosen = examples[:size.examples], {}

    def ours():
        hellaswag.encode.cache_clear()
        chosen["ours"] = hellaswag.evaluate(model, examples, world)["predictions"]

    def usual():
        with torch.device(device):
            chosen["usual"] = usual_loop(lambda idx: SimpleNamespace(logits=model(idx)), examples)

    seconds = turns(size.runs, {"four rows per example": usual, "context shared": ours})
    return {"unit": "examples/s", "amount": len(examples), "seconds": seconds,
            "same": chosen["ours"] == chosen["usual"]}


def generate(size: Size) -> dict:
    """Compare generation with a cache of keys and values, and without, with one model."""
    from bench.generate import generate_like_build_nanogpt
    from plumbing import sampling

    device = torch.device(size.device)
    model = GPT(GPTConfig(1024, VOCAB_SIZE, *size.pair_shape)).to(device)
    idx, made = torch.randint(VOCAB_SIZE, (1, 32)).to(device), {}  # (1, 32)

    def usual():
        made["usual"] = generate_like_build_nanogpt(model, idx, size.new_tokens).tolist()

    def ours():
        made["ours"] = sampling.generate(model, idx, size.new_tokens, temperature=0).tolist()

    seconds = turns(size.runs, {"all positions again": usual, "key/value cache": ours})
    return {"unit": "tokens/s", "amount": size.new_tokens, "seconds": seconds, "same": made["ours"] == made["usual"]}


def tokenize(size: Size) -> dict:
    """Compare gigatoken, each time with an empty cache of words, with tiktoken on the text in this repository."""
    for package in ("awkward", "gigatoken", "psutil"):
        importlib.import_module(package)  # raises if it is missing: make_encoder would take tiktoken
    import pyarrow as pa

    from plumbing.encode import make_encoder

    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:size.text]
    texts, made = pa.array([text[i:i + 5000] for i in range(0, len(text), 5000)], pa.large_string()), {}
    encoders = {name: make_encoder(name)[0] for name in ("tiktoken", "gigatoken")}

    def encode(name: str) -> None:
        made[name] = encoders[name](texts)[0]

    sides = {name: lambda name=name: encode(name) for name in encoders}
    seconds = turns(size.runs, sides, prepare=encoders["gigatoken"].load)
    return {"unit": "MB/s", "amount": len(text.encode()) / 1e6, "seconds": seconds,
            "same": np.array_equal(made["tiktoken"], made["gigatoken"])}


PAIRS = {"HellaSwag": score, "generation": generate, "tokens": tokenize}


def compare_pairs(size: Size) -> dict[str, dict]:
    """Compare what has units of its own; a pair whose packages are missing has a note instead."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    machine.keep_freed_memory()
    found = {}
    for name, compare in PAIRS.items():
        torch.manual_seed(0)
        try:
            found[name] = compare(size)
        except ImportError as error:
            found[name] = {"note": f"left out: {error}"}
    return found


def measure(lab) -> dict:
    """Run all loops, each in a process of its own, and the pairs."""
    size = SIZES[lab.scale.name]
    changes, notes = possible(size)
    loops, runs = make_loops(changes), {}
    lab.out.mkdir(parents=True, exist_ok=True)
    folder = lab.out.resolve()
    shard, cache = folder / "ladder.npy", folder / "inductor"
    np.save(shard, np.random.default_rng(0).integers(0, VOCAB_SIZE, size.shard, dtype=np.uint16))
    ours = f"+ {changes[-1]}"
    order = [name for name in loops if not name.startswith("- ")]
    for name in ("plain", *(name for name in loops if name.startswith("- "))):
        order += [name, ours]  # which is run just before it, too
    started, rates = time.perf_counter(), []
    for done, name in enumerate(order, 1):
        runs.setdefault(name, []).append(lab.alone(run_loop, loops[name], size, str(shard), str(cache)))
        left = (time.perf_counter() - started) / done * (len(order) - done)
        rates.append((name, size.windows * size.T / statistics.median(runs[name][-1]["seconds"])))
        print(f"{done:>4}/{len(order)} | {rates[-1][1]:,.0f} tokens/s | {name} | ETA {cli.clock(left)}", flush=True)
    shard.unlink()
    found = {}
    for name, some in runs.items():
        seconds = [second for run in some for second in run["seconds"]]
        found[name] = {"tokens_per_s": size.windows * size.T / statistics.median(seconds),
                       "memory": max(run["memory"] for run in some), "losses": some[0]["losses"],
                       "first_s": some[0]["first_s"], "padded": loops[name].padded, "bf16": loops[name].bf16}
    return {"shape": size.shape, "T": size.T, "windows": size.windows, "B": size.B, "steps": size.steps,
            "device": size.device, "shard": size.shard, "changes": changes, "notes": notes, "rates": rates,
            "loops": found, "pairs": lab.alone(compare_pairs, size)}


def gains(results: dict) -> tuple[dict[str, float], float]:
    """Return how many times as fast ours is as without each change, and as `plain`; and the noise of such a ratio.

    Each loop is compared with the mean of the runs of ours just before and after it, the rung before ours with the one
    run after it. The noise is the largest difference of two runs of ours in a row.
    """
    rates, changes = results["rates"], results["changes"]
    (_, rung), (_, ours) = rates[len(changes) - 1:len(changes) + 1]
    found = {changes[-1]: ours / rung}
    for (_, before), (name, rate), (_, after) in zip(rates, rates[1:], rates[2:]):
        if name.startswith(("plain", "- ")):
            found[name.removeprefix("- ")] = (before + after) / 2 / rate
    some = [rate for name, rate in rates if name == f"+ {changes[-1]}"]
    return found, max((abs(after / before - 1) for before, after in itertools.pairwise(some)), default=0.0)


def judge(gain: float, noise: float, neutral: bool) -> str:
    """Return the verdict on a change that was predicted to be `neutral`, within 5 %, or else to be a gain."""
    if neutral and abs(gain - 1) < 0.05:
        return CONFIRMED
    if abs(gain - 1) <= noise:
        return UNSEEN
    return CONFIRMED if gain > 1 and not neutral else REFUTED


def losses_apart(loops: list[dict]) -> float:
    """Return the largest difference of the losses of any two loops at the same step."""
    return max(max(losses) - min(losses) for losses in zip(*(one["losses"] for one in loops)))


def agreement(loops: dict[str, dict]) -> tuple[float, float, float]:
    """Return the largest difference of the losses: of loops alike in vocabulary and dtype, in dtype, and of all."""
    groups, by_dtype = {}, {}
    for one in loops.values():
        groups.setdefault((one["bf16"], one["padded"]), []).append(one)
        by_dtype.setdefault(one["bf16"], []).append(one)
    return (max(map(losses_apart, groups.values())), max(map(losses_apart, by_dtype.values())),
            losses_apart(list(loops.values())))


def draw(figure, results: dict) -> None:
    """Draw the tokens/s of the ladder, and beside it what is left of ours without each change."""
    loops, changes = results["loops"], results["changes"]
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    ladder = ["plain", *(f"+ {name}" for name in changes)]
    rates = [loops[name]["tokens_per_s"] for name in ladder]
    left.barh([name.replace("_", " ") for name in ladder], rates, color=COLORS[0])
    for row, rate in enumerate(rates):
        left.text(rate, row, f" {rate:,.0f}", va="center", fontsize=8)
    left.set(xlabel="tokens/s", xlim=(0, 1.2 * max(rates)))
    found, _ = gains(results)
    shares = [100 / found[name] for name in changes]
    right.barh([f"- {name}".replace("_", " ") for name in changes], shares, color=COLORS[1], hatch="//",
               edgecolor="white")
    right.axvline(100, color=COLORS[0], linestyle="--", linewidth=1)
    right.set(xlabel="% of the tokens/s with all changes")
    for axes in (left, right):
        axes.invert_yaxis()


def without(loops: dict[str, dict], changes: list[str], name: str) -> dict:
    """Return the loop that lacks this change alone: for the last one, the rung before it."""
    rung = f"+ {changes[-2]}" if len(changes) > 1 else "plain"
    return loops[rung] if name == changes[-1] else loops[f"- {name}"]


def tables(results: dict) -> str:
    """Write the table of the loops and that of the pairs."""
    loops, changes, before, rows = results["loops"], results["changes"], results["loops"]["plain"], []
    rows.append(("the plainest correct loop", "", f"{before['tokens_per_s']:,.0f}", "",
                 f"{before['memory'] / 1e6:,.0f}", f"{before['losses'][-1]:.4f}", "", ""))
    ours, (found, _) = loops[f"+ {changes[-1]}"], gains(results)
    for name in changes:
        one, lacking, (text, lines) = loops[f"+ {name}"], without(loops, changes, name), CHANGES[name]
        rows.append((f"+ {text}", lines, f"{one['tokens_per_s']:,.0f}",
                     f"{one['tokens_per_s'] / before['tokens_per_s']:.2f}", f"{one['memory'] / 1e6:,.0f}",
                     f"{one['losses'][-1]:.4f}", f"{1 / found[name]:.2f}",
                     f"{(lacking['memory'] - ours['memory']) / 1e6:+,.0f}"))
        before = one
    heads = ("loop", "lines", "tokens/s", "times the one above", "peak MB", "last loss",
             "tokens/s of the last without it, share", "MB of the last without it")
    pairs = []
    for name, one in results["pairs"].items():
        if "note" not in one:
            slow, fast = ((side, one["amount"] / statistics.median(taken)) for side, taken in one["seconds"].items())
            pairs.append((name, f"{slow[0]}: {slow[1]:,.3g}", f"{fast[0]}: {fast[1]:,.3g}", one["unit"],
                          f"{fast[1] / slow[1]:.1f}"))
    return table(heads, rows) + "\n\n" + table(("pair", "plain", "ours", "unit", "times"), pairs)


def report(results: dict) -> Report:
    """Compare the loops, and the pairs."""
    loops, changes = results["loops"], results["changes"]
    plain, ours, (found, noise) = loops["plain"], loops[f"+ {changes[-1]}"], gains(results)
    alike, in_dtype, all_apart = agreement(loops)
    claims = [
        measured("all loops alike in vocabulary and dtype have the same losses, to 1e-3", alike < 1e-3,
                 f"{alike:.1e} nats; {in_dtype:.1e} with and without padding, {all_apart:.1e} in both dtypes"),
        Claim("our loop is faster than the plainest correct one", judge(found["plain"], noise, False),
              f"{found['plain']:.2f} times the tokens/s, "
              f"{(ours['memory'] - plain['memory']) / 1e6:+,.0f} MB"),
    ]
    for name in changes:
        lacking, neutral = without(loops, changes, name), name in NEUTRAL and results["device"] == "cpu"
        sentence = ("this change alone changes the tokens/s by less than 5 %" if neutral else
                    "the loop is slower without this change alone")
        claims.append(Claim(f"{sentence}: {CHANGES[name][0]}", judge(found[name], noise, neutral),
                            f"with it {found[name]:.2f} times the tokens/s, "
                            f"{(ours['memory'] - lacking['memory']) / 1e6:+,.0f} MB"))
    notes = list(results["notes"])
    for name, one in results["pairs"].items():
        if "note" in one:
            notes.append(f"{name}: {one['note']}.")
            continue
        (slow, before), (fast, after) = one["seconds"].items()
        ratio = statistics.median(before) / statistics.median(after)
        claims.append(measured(f"{name}: {fast} is faster than {slow}, with the same results",
                               ratio > 1 and one["same"], f"{ratio:.1f} times the {one['unit']}"))
    L, nh, C = results["shape"]
    text = (f"{L} layers, {nh} heads, C={C}, T={results['T']}, {results['windows']} windows per step, micro-batches of "
            f"1 or {results['B']}, a shard of {results['shard']:,} tokens; medians of {results['steps']} steps. "
            "The loop with all changes was run anew before and after each that lacks one, and the plainest, which is "
            f"compared with these two; two of its runs in a row differ by up to {noise:.0%}, and what is less is not "
            f"visible. {' '.join(notes)}\n\n")
    return Report(claims, text + tables(results), {"ladder": lambda figure: draw(figure, results)})
