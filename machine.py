"""What this machine can do: which device, which dtype, whether a compiler works, how many FLOP/s at best.

    pick_device(name, local_rank, world_size)    the torch.device of this process
    pick_dtype(name, device)                     (dtype of the matrix products, why)
    pick_compile(wanted, device, seconds)        (whether to compile, why)
    fresh_store(rank, world_size)                where ranks find each other
    min_over_ranks(value, device, world_size)    what all ranks can agree on
    peak_flops(device, dtype)                    the denominator of MFU
    keep_freed_memory()                          no page faults for buffers of the last step
"""
import contextlib
import ctypes
import datetime
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

# Dense bf16 TFLOP/s without sparsity, from NVIDIA's data sheets; the first entry found in the device's name counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A40": 150, "A10G": 70,
    "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 209,
    "RTX 4090": 165, "RTX 3090": 71,
}


def pick_device(name: str, local_rank: int, world_size: int) -> torch.device:
    """The device of this process: `name`, or the best there is; OSError where it is not there."""
    there = {"cpu": 1, "cuda": torch.cuda.device_count(),
             "mps": int(torch.backends.mps.is_available() and world_size == 1)}  # gloo cannot add up MPS tensors
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind, _, index = name.partition(":")
    index = int(index) if index.isdecimal() and world_size == 1 else local_rank if kind == "cuda" else 0
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) or (kind != "cpu" and index >= there[kind]):
        raise OSError(f"no device {name!r} for process {local_rank}: --device takes auto, cpu, cuda, cuda:N or mps; "
                      f"this machine has {there['cuda']} CUDA and {there['mps']} MPS devices for PyTorch")
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of the matrix products, why): bfloat16 autocast only where the hardware multiplies it natively."""
    if name != "auto":
        return getattr(torch, name), "as configured"
    features = {}
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in every version
        features = torch.cpu.get_capabilities()
    if ((device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
            or features.get("avx512_bf16") or features.get("amx_bf16")):
        return torch.bfloat16, "autocast, native on this hardware"
    return torch.float32, "no native bfloat16 on this hardware"


def pick_compile(wanted: bool | None, device: torch.device, seconds: float) -> tuple[bool, str]:
    """(whether to compile, why) for a run of about `seconds` without; a compiler is tried, not guessed."""
    if wanted is False:
        return False, "as configured"
    if wanted is None and (device.type == "mps" or seconds < 600):
        return False, "on MPS" if device.type == "mps" else "the run is too short to repay it"
    try:
        torch.compile(lambda x: x * 2)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, Triton or header surfaces as any of a dozen types
        if wanted:
            raise OSError(f"--compile finds no working compiler ({type(error).__name__}): install a C++ compiler and "
                            "Python's headers, or take --no-compile") from error
        return False, f"no working compiler ({type(error).__name__})"
    return True, "as configured" if wanted else "the run is long enough to repay it"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that `device` can do at best in `dtype`.

    From the table on known GPUs (float32 runs as TF32 there, at half of bf16); elsewhere the best of three matrix
    products.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{known}\b", name):
                return tflops * 1e12 * (1 if dtype == torch.bfloat16 else 0.5)
    size = 8192 if device.type == "cuda" else 1536
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def fresh_store(rank: int, world_size: int):
    """The store over which ranks find each other, with a prefix that no earlier attempt of the job has used.

    torchrun keeps one store over restarts (pytorch/pytorch#135712): a rank could read there where one that is dead now
    had listened, and wait for it for half an hour. Its count of restarts does not tell attempts apart, as each of
    several torchruns counts its own. None without torchrun's store: then it is new each time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          timeout=datetime.timedelta(minutes=30))
    token, others = uuid.uuid4().hex.encode(), range(1, world_size)
    store.set(f"token/{rank}", token)
    for _ in range(90_000):  # half an hour
        if rank == 0:
            store.set("seen", b" ".join([token, *(store.get(f"token/{other}") for other in others)]))
            if all(store.check([f"reply/{other}"]) and store.get(f"reply/{other}") == token for other in others):
                return dist.PrefixStore(token.decode(), store)
        elif token in (seen := store.get("seen").split()):  # rank 0 has seen this rank, not one of an earlier attempt
            store.set(f"reply/{rank}", seen[0])
            return dist.PrefixStore(seen[0].decode(), store)
        time.sleep(0.02)
    raise ConnectionError("the other ranks did not come within half an hour: are they all running?")


def min_over_ranks(value: int, device, world_size: int) -> int:
    """The smallest value any rank has: what all of them can agree on."""
    smallest = torch.tensor(value, device=device)
    if world_size > 1:
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def fitting_windows(peaks: list[int], other_bytes: int, free_bytes: int) -> int:
    """Windows that a forward and backward pass can hold, from its peaks in bytes at 1 and at 2 windows."""
    per_window = max(1, peaks[1] - peaks[0])
    return int((0.9 * free_bytes - (peaks[0] - per_window) - other_bytes) // per_window)


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees, for the next step, instead of giving it back to the system.

    A logits tensor is hundreds of MB; asked for anew each step, it costs the zeroing of all its pages. Does nothing
    with another C library, or where the user has set glibc's own MALLOC_ variables.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no buffer gets a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


def memory_bytes() -> int:
    """The memory of this machine, or a number past any model's where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return 2**63


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; only CUDA has a type of its own for it."""
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception says that another rank has gone; gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def memory_remedy(micro_batch_size: int) -> str:
    """What to do about memory that ran out, in one line."""
    remedy = (f"--micro_batch_size {micro_batch_size // 2}" if micro_batch_size > 1 else
              "a smaller --model or --sequence_length and another --out_dir")
    return f"out of memory at a micro-batch of {max(1, micro_batch_size)}: run the same command with {remedy}"


def describe_device(device: torch.device) -> str:
    """A name for the plan card, such as `cpu, 2 threads` or `cuda:0, NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit of this code where it is a git checkout."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        found["commit"] = commit.stdout.strip()
    except OSError:
        found["commit"] = ""
    return found
