"""Memory mapping.

Question: what does it cost to open tokens on a disk, and how much memory do they take, if they are memory-mapped as
ours are, and if whole shards are loaded as int64 as build-nanogpt does?

Prediction: mapping takes less than 1 ms and less than 1 MB for any number of tokens. Loading takes 8 bytes per token,
14 at its peak, and about 5 ns per token: 0.8 GB and 0.5 s for a shard of 10^8, 80 GB and 50 s for all of 10^10. A
random window of 1,025 tokens takes about 5 µs from memory, and up to 20 µs from a mapped file, as its pages are mapped
when they are first touched.
"""
import contextlib
import ctypes
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.study.page import COLORS, Report, measured, table
from bench.train import peak_memory

TOKENS = {  # by scale: how many tokens are mapped, and up to how many are loaded
    "cpu": ((10**7, 10**8, 10**9, 10**10), 10**8), "gpu": ((10**7, 10**8, 10**9, 10**10), 10**9),
    "quick": ((10**6, 10**7, 10**8, 10**9), 10**7), "toy": ((10**6, 10**7), 10**7)}
WINDOWS, LENGTH = 1000, 1025  # windows that are read, and the tokens of each
OPENS = 3  # times that a file is opened


def give_back_memory() -> None:
    """Have glibc give back each large buffer when it is freed, so that resident memory is what is in use."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, which otherwise grows with what is freed


def resident() -> int:
    """Return this process's resident memory in bytes, or on systems other than Linux the peak of it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(run, device: torch.device) -> int:
    """Return the bytes that run() needs at its peak, on top of what is in use before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError):  # not Linux: there the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    run()
    return peak_memory() - before


def map_tokens(path: Path) -> torch.Tensor:
    """Map a shard, (n,) uint16."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copy on write: torch wants a writable array


def load_tokens(path: Path) -> torch.Tensor:
    """Load a shard as build-nanogpt does, (n,) int64."""
    return torch.tensor(np.load(path).astype(np.int32), dtype=torch.long)


def read_windows(tokens: torch.Tensor, starts: list[int]) -> float:
    """Return the seconds that a window takes, of those that begin there."""
    started = time.perf_counter()
    for start in starts:
        tokens[start:start + LENGTH].long().sum()
    return (time.perf_counter() - started) / len(starts)


def look(paths: list[Path], whole: bool) -> list[dict]:
    """Open each file, and read random windows twice; return the seconds per opening and window, and bytes resident.

    `resident` is once it is open, `touched` once the windows have been read, and `peak` while another is opened.
    The first file is opened once more, before all others, to warm up.
    """
    open_tokens, found = load_tokens if whole else map_tokens, []
    for path in (paths[0], *paths):
        tokens, seconds, before = None, [], resident()
        for _ in range(OPENS):
            tokens = None  # freed before the next is there
            started = time.perf_counter()
            tokens = open_tokens(path)
            seconds.append(time.perf_counter() - started)
        opened = resident() - before
        starts = np.random.default_rng(0).integers(0, len(tokens) - LENGTH, WINDOWS).tolist()
        first, again = read_windows(tokens, starts), read_windows(tokens, starts)
        touched, tokens = resident() - before, None
        peak = growth(lambda path=path: open_tokens(path), torch.device("cpu"))
        found.append({"open_s": statistics.median(seconds), "window_s": first, "again_s": again,
                      "resident": opened, "touched": touched, "peak": peak})
    return found[1:]


def look_both_ways(paths: list[Path], loadable: list[Path]) -> tuple[list[dict], list[dict]]:
    """Look at the mapped files, and at those that are loaded."""
    give_back_memory()
    return look(paths, False), look(loadable, True)


def write_sparse(path: Path, n: int) -> Path:
    """Write a shard of n tokens, all zero, that takes no room on the disk."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(n,))
    return path


def measure(lab) -> dict:
    """Open sparse files of several sizes both ways."""
    sizes, most = TOKENS[lab.scale.name]
    lab.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=lab.out) as folder:
        paths = [write_sparse(Path(folder) / f"{n}.npy", n) for n in sizes]
        mapped, loaded = lab.alone(look_both_ways, paths, [path for path, n in zip(paths, sizes) if n <= most])
    return {"tokens": list(sizes), "mapped": mapped, "loaded": loaded}


def draw(figure, results: dict) -> None:
    """Draw time and memory by the number of tokens; what was not loaded continues the line to the last measurement."""
    sizes, loaded = np.array(results["tokens"]), results["loaded"]
    for axes, key, unit, label in zip(figure.subplots(1, 2), ("open_s", "resident"), (1e-3, 1e6),
                                      ("time to open, ms", "resident memory, MB")):
        by_side = {side: np.array([one[key] for one in results[side]]) / unit for side in ("mapped", "loaded")}
        n = len(loaded)
        axes.loglog(sizes[:n], by_side["loaded"], "-s", color=COLORS[0], label="loaded as int64")
        more = by_side["loaded"][-1] * sizes[n - 1:] / sizes[n - 1]
        axes.loglog(sizes[n - 1:], more, ":s", color=COLORS[0], markerfacecolor="white", label="extrapolated")
        floor = np.maximum(by_side["mapped"], 4096 / 1e6 if key == "resident" else 1e-6)  # a log axis has no zero
        axes.loglog(sizes, floor, "--o", color=COLORS[1], label="memory-mapped")
        axes.set(xlabel="tokens", ylabel=label)
    figure.axes[0].legend()


def report(results: dict) -> Report:
    """Compare time and memory."""
    sizes, mapped, loaded = results["tokens"], results["mapped"], results["loaded"]
    n = len(loaded)
    per_token = loaded[-1]["resident"] / sizes[n - 1]
    slowest, largest = (max(one[key] for one in mapped) for key in ("open_s", "resident"))
    slow, again, memory = mapped[-1]["window_s"], mapped[-1]["again_s"], loaded[-1]["again_s"]
    rows = []
    for i, size in enumerate(sizes):
        one, other = mapped[i], loaded[i] if i < n else None
        rows.append((f"{size:.0e}", f"{one['open_s'] * 1e3:.2f}", f"{one['resident'] / 1e6:.2f}",
                     f"{one['touched'] / 1e6:.1f}", f"{one['window_s'] * 1e6:,.1f}", f"{one['again_s'] * 1e6:.1f}",
                     *((f"{other['open_s'] * 1e3:,.0f}", f"{other['resident'] / 1e6:,.0f}",
                        f"{other['peak'] / 1e6:,.0f}", f"{other['again_s'] * 1e6:.1f}") if other else
                       ("-", f"{8 * size / 1e6:,.0f} by 8 bytes per token", "-", "-"))))
    heads = ("tokens", "mapped: ms to open", "MB", f"MB after {WINDOWS:,} windows", "µs per window", "µs again",
             "loaded: ms to open", "MB", "MB at the peak", "µs per window, again")
    text = ("The files are sparse: no time of a disk is in these figures, only that of the system, which reads ahead "
            "of a page that it does not have yet, zeros here. No memory at all is drawn as one page of 4 KB.\n\n")
    return Report([
        measured("mapping takes less than 1 ms, however many the tokens", slowest < 1e-3,
                 f"{slowest * 1e3:.2f} ms at most, for up to {sizes[-1]:.0e} tokens"),
        measured("mapping takes less than 1 MB, however many the tokens", largest < 1e6, f"{largest / 1e6:.2f} MB"),
        measured("loading takes 8 bytes per token", abs(per_token - 8) < 0.4,
                 f"{per_token:.2f}; {8 * sizes[-1] / 1e9:,.1f} GB for {sizes[-1]:.0e} tokens"),
        measured("loading takes 14 bytes per token at its peak", abs(loaded[-1]["peak"] / sizes[n - 1] - 14) < 0.7,
                 f"{loaded[-1]['peak'] / sizes[n - 1]:.2f}"),
        measured("the first reading of a random window takes at most 20 µs from a mapped file", slow < 20e-6,
                 f"{slow * 1e6:,.1f} µs; again {again * 1e6:.1f} µs, from memory {memory * 1e6:.1f} µs"),
    ], text + table(heads, rows), {"mapping": lambda figure: draw(figure, results)})
