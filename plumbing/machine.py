"""What this machine can do: which device, which dtype, whether a compiler works, how many FLOP/s at best.

    pick_device(name, local_rank, world_size)       the torch.device of this process
    choose_dtype(wanted, before, world)             (dtype of the matrix products, why), the same on all ranks
    autocast(dtype, device)                         the context in which they are computed in it
    choose_compile(wanted, before, seconds, world)  (whether to compile, why), the same on all ranks
    compiled(model, dtype, deterministic)           the model, compiled with the settings for it
    pick_micro_batch_size(model, T, ...)            the largest micro-batch that fits, the same on all ranks
    resolve(config, state, model, world)            a TrainConfig without any "auto"
    explained_errors(config)                        a context in which the libraries' errors say what to do
    known_peak(device, dtype)                       the denominator of MFU, None if it is unknown
    measured_peak(device, dtype)                    the same, measured
    eager(optimizer_class)                          an optimizer of torch.optim that starts without torch.compile
    keep_freed_memory()                             no page faults for buffers of the last step

`world` is a plumbing.ranks.World.
"""
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing.cli import UserError, check_values, plural, require
from plumbing.progress import busy

# Dense bf16 TFLOP/s without sparsity (fp16 on cards that lack it), from NVIDIA's data sheets; the first entry found in
# the device's name counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A40": 150, "A10G": 70,
    "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 209,
    "RTX 4090": 165, "RTX 3090": 71, "T4": 65, "V100": 125,
}


ASSUMED_SHARE = 0.4  # of the peak, which training reaches; from 0.2 for small models to 0.7


def pick_device(name: str, local_rank: int, world_size: int) -> torch.device:
    """Return the device of this process: `name`, or the best there is. Raises OSError if it cannot be used."""
    there = {"cpu": 1, "cuda": torch.cuda.device_count(),
             "mps": int(torch.backends.mps.is_available() and world_size == 1)}  # gloo cannot add up MPS tensors
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind, _, index = name.partition(":")
    index = int(index) if index.isdecimal() and world_size == 1 else local_rank if kind == "cuda" else 0
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) or (kind != "cpu" and index >= there[kind]):
        raise OSError(f"no device {name!r} for process {local_rank}: --device takes auto, cpu, cuda, cuda:N or mps; "
                      f"this machine has {there['cuda']} CUDA and {there['mps']} MPS devices for PyTorch")
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device(kind, index)
    start_cuda(device)
    return device


def start_cuda(device: torch.device) -> None:
    """Initialise CUDA. Raises OSError if the driver is too old for this PyTorch, or PyTorch has no code for the card.

    device_count() asks the driver's management library, which also counts cards that cannot be used.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # less memory lost between blocks
    this_torch = f"PyTorch {torch.__version__} for CUDA {torch.version.cuda}"
    other_torch = "install PyTorch for another CUDA (pytorch.org/get-started), or use --device cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own words about old cards, a dozen lines
            torch.cuda.init()
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if torch.version.cuda and not has_code_for(capability, torch.cuda.get_arch_list()):
            raise OSError(f"{this_torch} has no code for {device}, {name}, of compute capability {capability[0]}."
                          f"{capability[1]}, only for {' '.join(torch.cuda.get_arch_list())}: {other_torch}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        if is_out_of_memory(error):
            raise OSError(f"{device} has no free memory: stop the process that holds it (nvidia-smi shows it), or take "
                          "another --device") from error
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise OSError(f"{device} is there, but {this_torch} cannot use it ({reason}): update the NVIDIA driver, "
                      f"{other_torch}") from error


def has_code_for(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Return whether code built for one of `arch_list`, such as sm_80 or compute_90, runs on a card of that capability.

    Machine code (sm) runs on its minor version and later ones of the same major version, intermediate code (compute) on
    every later card. With an `a` it runs on exactly that capability, with an `f` within its major version.
    """
    for entry in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry)
        if match is None:  # a notation of a later PyTorch: nothing is refused for that
            return True
        kind, major, minor, suffix = match.groups()
        built_for = (int(major), int(minor))
        any_major = kind == "compute" and not suffix
        if built_for == capability:
            return True
        if suffix != "a" and built_for < capability and (any_major or built_for[0] == capability[0]):
            return True
    return False


PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)  # GPUs that have one also have those before it


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the hardware multiplies matrices of that dtype itself; emulation is slower than float32."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        if dtype == torch.bfloat16:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (7, 0)  # Volta's tensor cores
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # not in every version
        return False
    features = torch.cpu.get_capabilities()
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(features.get(f"avx512_{kind}") or features.get(f"amx_{kind}"))


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype of matrix products: `name`, or for auto the best and why.

    That is bfloat16 if it is native, float16 on older CUDA cards, else float32.
    """
    if name != "auto":
        return getattr(torch, name), ""
    if is_native(torch.bfloat16, device):
        return torch.bfloat16, "autocast, native on this hardware"
    if device.type == "cuda" and is_native(torch.float16, device):
        return torch.float16, "autocast, as this card has no bfloat16"
    return torch.float32, "no native bfloat16 on this hardware"


def choose_dtype(wanted: str, before: str | None, world) -> tuple[torch.dtype, str]:
    """Return the dtype of matrix products for all ranks, and why. `before` is that of the run that is resumed.

    Raises UserError if some rank's hardware does not have that of the run.
    """
    if wanted == "auto" and before is not None:
        known = {str(dtype).removeprefix("torch."): dtype for dtype in PRECISIONS}
        if before not in known:
            raise UserError(f"the checkpoint has the unknown dtype {before!r}: move it away")
        dtype = known[before]
        if not world.all(is_native(dtype, world.device)):
            raise UserError(f"the run is trained in {before}, which {world.device} does not multiply natively: "
                            f"continue where it does, add --dtype {before} to continue here, far slower, or begin a "
                            "new run from its weights with --init_from and another --out_dir")
        return dtype, "as in the run so far"
    dtype, why = pick_dtype(wanted, world.device)
    agreed = PRECISIONS[world.min(PRECISIONS.index(dtype))]
    return agreed, why if agreed == dtype else "the best that all ranks have"


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return a context in which matrix products are computed in `dtype`; it can be entered again and again."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def pick_compile(wanted: bool | None, before: bool | None, device: torch.device, seconds: float) -> tuple[bool, str]:
    """Return whether to compile a run of about `seconds`, and why if nobody has said; a compiler is tried, not guessed.

    `wanted` is what the user says, `before` what the resumed run did on such a machine; None if unknown. Raises OSError
    only if the user wants it and no compiler works.
    """
    if wanted is False:
        return False, ""
    if wanted is None and before is False:
        return False, "as in the run so far"
    if wanted is None and not before and (device.type == "mps" or seconds < 600):
        return False, "on MPS" if device.type == "mps" else "the run is too short to repay it"
    try:
        with busy("trying the compiler"):
            torch.compile(lambda x: x * 2)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, Triton or header surfaces as any of a dozen types
        if wanted:
            raise OSError(f"--compile finds no working compiler ({type(error).__name__}): install a C++ compiler and "
                          "Python's headers, or use --no-compile") from error
        return False, f"no working compiler ({type(error).__name__})"
    if wanted:
        return True, ""
    return True, "as in the run so far" if before else "the run is long enough to repay it"


def make_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """Make a gradient scaler for float16, in which small gradients would become 0; otherwise its calls do nothing."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    scaler.scale(torch.zeros((), device=device))  # makes the scale, which a stop before the first loss would miss
    return scaler


def choose_compile(wanted: bool | None, before: bool | None, seconds: float, world) -> tuple[bool, str]:
    """Decide for all ranks as pick_compile() does for one."""
    mine, why = pick_compile(wanted, before, world.device, seconds)
    agreed = world.all(mine)
    return agreed, why if agreed == mine else "not all ranks have a working compiler"


def compiled(model: torch.nn.Module, dtype: torch.dtype, deterministic: bool) -> torch.nn.Module:
    """Compile the model for fixed shapes and products in `dtype`: once for training and once for validation.

    That happens in the first calls, where it is shown. What earlier runs of this process have compiled is forgotten.
    """
    import torch._dynamo.callback
    import torch._dynamo.config
    import torch._inductor.config
    import torch.compiler.config

    torch.compiler.reset()  # PyTorch compiles a function 8 times, then leaves it as it is
    shown, handler = contextlib.ExitStack(), torch._dynamo.callback.callback_handler
    handler.register_start_callback(lambda *_: shown.enter_context(busy("compiling the model")))
    handler.register_end_callback(lambda *_: shown.close())
    # PyTorch 2.11 leaves autocast's dtype out of its cache's key: a float16 run got what a bfloat16 run had compiled
    torch.compiler.config.cache_key_tag = f"{os.environ.get('TORCH_COMPILE_CACHE_KEY_TAG', '')} {dtype}"
    torch._dynamo.config.optimize_ddp = False  # one graph: splitting it at DDP's buckets hides 2 % of a step at most
    if hasattr(torch._inductor.config, "deterministic"):  # not in every version
        torch._inductor.config.deterministic = deterministic
    return torch.compile(model, dynamic=False)


def flops_per_token(model, T: int) -> int:
    """Count the operations per training token: 6N + 12LCT (Chowdhery et al. 2022, app. B), N without positions."""
    N = sum(weight.numel() for name, weight in model.named_parameters() if ".wpe." not in name)
    return 6 * N + 12 * model.config.n_layer * model.config.n_embd * T


def eager(optimizer_class: type) -> type:
    """Return a class like this one of torch.optim that never imports torch._dynamo, which takes more than a second.

    PyTorch wraps methods of its optimizers for those who compile them, and the wrappers import it. Nobody compiles
    ours, so they get the functions inside the wrappers, which compute the same; hooks and profiler labels stay.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(optimizer_class, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer_class.step))
    return type(optimizer_class.__name__, (optimizer_class,), methods)


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the floating-point operations per second that a known GPU can do at best in `dtype`, None for others.

    From the table; float32 runs as TF32 from Ampere on, at half of bf16.
    """
    if device.type == "cuda" and (dtype != torch.float32 or torch.cuda.get_device_capability(device) >= (8, 0)):
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{known}\b", name):
                return tflops * 1e12 * (0.5 if dtype == torch.float32 else 1)
    return None


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how many floating-point operations per second `device` does in `dtype`: the best of three products."""
    size = 8192 if device.type == "cuda" else 1536
    generator = torch.Generator(device).manual_seed(0)  # products of ones draw less power: a GPU clocks higher
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def expected_flops(device: torch.device, dtype: torch.dtype, world_size: int) -> float:
    """Return the operations per second to expect of all ranks together."""
    return ASSUMED_SHARE * world_size * (known_peak(device, dtype) or measured_peak(device, dtype))


def check_settings(config) -> None:
    """Raise UserError if a setting of a TrainConfig has a wrong value, or contradicts another one."""
    check_values(config)
    require(config, "min_lr", config.min_lr <= config.max_lr, f"at most max_lr, {config.max_lr}")
    ends = config.warmup_steps <= config.max_steps or not (config.decay_steps and config.max_steps)
    require(config, "warmup_steps", ends, f"at most max_steps, {config.max_steps}, to use --decay_steps")
    most = max(0, config.max_steps - config.warmup_steps)
    fits = config.decay_steps <= most or config.max_steps == 0
    require(config, "decay_steps", fits, f"at most max_steps - warmup_steps, {most}")
    used = config.hellaswag_every or not (config.hellaswag_data or config.hellaswag_limit)
    require(config, "hellaswag_every", used, "more than 0 to use HellaSwag's other flags")


def resolve(config, state: dict | None, model, world):
    """Replace every "auto" in a TrainConfig by what suits this machine.

    dtype, B and compile stay those of the run that is resumed (`state` is its checkpoint), B and compile on the same
    kind of machine only. Returns the settings, the World with its autocast, and for the summary the reasons for dtype
    and compile, the speed to expect, and the number of steps done.
    """
    require(config, "sequence_length", config.sequence_length <= model.config.block_size,
            f"at most the model's {model.config.block_size} positions")
    before, step = {}, 0
    if state:
        before, step = state["train_config"], state["step"]
    dtype, why_dtype = choose_dtype(config.dtype, before.get("dtype"), world)
    world = dataclasses.replace(world, autocast=autocast(dtype, world.device))
    if not state or not world.all(state["machine"] == identity(world)):
        before = {}
    B = config.micro_batch_size
    if not B and before.get("activation_checkpointing", False) == config.activation_checkpointing:
        B = before.get("micro_batch_size", 0)
    if not B:
        windows = count_micro_steps(config, world.world_size)  # of this rank in one step, as B is open
        B = pick_micro_batch_size(model, config.sequence_length, windows, world)
    steps = 0 if config.eval_only else config.max_steps - step
    flops = flops_per_token(model, config.sequence_length) * config.total_batch_size * steps
    flops_per_s = expected_flops(world.device, dtype, world.world_size)
    compiles, why_compile = choose_compile(config.compile, before.get("compile"), flops / flops_per_s, world)
    name = str(dtype).removeprefix("torch.")
    config = dataclasses.replace(config, dtype=name, micro_batch_size=B, compile=compiles)
    count_micro_steps(config, world.world_size)  # raises for a B that does not divide the batch
    about = {"dtype": why_dtype, "compile": why_compile, "flops_per_s": flops_per_s, "first_step": step}
    return config, world, about


def count_micro_steps(config, world_size: int) -> int:
    """Count the micro-steps per optimizer step, at B=1 if B is still to be chosen.

    Raises UserError, suggesting the nearest valid sizes, if the number is not whole.
    """
    tokens = max(1, config.micro_batch_size) * config.sequence_length * world_size
    if config.total_batch_size % tokens:
        below = config.total_batch_size // tokens * tokens
        sizes = " or ".join(str(size) for size in (below, below + tokens) if size)
        other = ", or change --micro_batch_size" if config.micro_batch_size else ""
        raise UserError(f"--total_batch_size {config.total_batch_size} is not a multiple of micro_batch_size x "
                        f"sequence_length x ranks = {tokens}: make it {sizes}{other}")
    return config.total_batch_size // tokens


def pick_micro_batch_size(model, T: int, windows: int, world) -> int:
    """Return B: the largest divisor of `windows`, those of a rank per step, that fits, the same on every rank.

    On CUDA the peak memory is measured at B=1 and B=2 before compiling, and room is left for AdamW's two moments and,
    with several ranks, DDP's buckets (4 bytes per parameter each). Elsewhere a micro-batch has at most 2,048 tokens, as
    more gain nothing on a CPU. Raises UserError if not one window of T tokens fits.
    """
    fits = max(1, 2048 // T)
    if world.device.type == "cuda":
        def run(B: int) -> None:
            idx = torch.zeros(B, T, dtype=torch.int64, device=world.device)  # (B, T)
            with world.autocast:
                loss = model(idx, idx)
            loss.backward()

        copies = 3 if world.world_size > 1 else 2
        fits = count_fitting_windows(run, world.device, 4 * copies * model.count_parameters())
        model.zero_grad(set_to_none=True)
    fits = world.min(fits)
    if fits < 1:
        raise UserError(f"not one window of {T} tokens fits on {world.device}: use --activation_checkpointing, or a "
                        "smaller --model or --sequence_length")
    return next(B for B in range(min(fits, windows), 0, -1) if windows % B == 0)


def count_fitting_windows(run, device: torch.device, other_bytes: int) -> int:
    """Count the windows per forward and backward pass that fit into 90 % of a GPU's free memory; 0 if not one does.

    run(B) is such a pass of B windows; the peaks of run(1) and run(2) are extrapolated. `other_bytes` come on top of
    what run() needs. If two do not fit, the answer is 1, which training then tries.
    """
    peaks = []
    try:
        for B in (1, 1, 2):  # the first pass makes the gradients, the other two are measured
            torch.cuda.reset_peak_memory_stats(device)
            run(B)
            peaks.append(torch.cuda.max_memory_allocated(device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    if len(peaks) < 3:
        return max(0, len(peaks) - 1)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return max(1, fitting_windows(peaks[1:], other_bytes, free))


def fitting_windows(peaks: list[int], other_bytes: int, free_bytes: int) -> int:
    """Extrapolate how many windows fit from the peaks of a pass, in bytes, at one and at two windows."""
    per_window = max(1, peaks[1] - peaks[0])
    return int((0.9 * free_bytes - (peaks[0] - per_window) - other_bytes) // per_window)


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees, for the next step, instead of giving it back to the system.

    A logits tensor is hundreds of MB; asked for anew each step, it costs the zeroing of all its pages. Does nothing
    with another C library, or if the user has set glibc's own MALLOC_ variables.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no buffer gets a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


def check_shape(config) -> None:
    """Raise UserError if a GPTConfig is none, or its weights do not fit into this machine's memory."""
    C, L = config.n_embd, config.n_layer
    if min(vars(config).values()) < 1 or C % config.n_head:
        raise UserError(f"n_embd {C} must be a multiple of n_head {config.n_head}, and all sizes positive")
    parameters = (config.vocab_size + config.block_size + 2) * C + L * (12 * C + 13) * C
    if 4 * parameters + 2**15 * L > memory_bytes():  # a module takes some memory too
        raise UserError(f"{parameters:,} parameters are more than this machine's memory holds: use a smaller model")


def memory_bytes() -> int:
    """Return the memory of this machine or container; a number past any model's if the system does not tell."""
    limits = [2**63]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not POSIX
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):  # no container, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def gpu_bytes(device: torch.device) -> int:
    """Return the memory of a GPU."""
    return torch.cuda.mem_get_info(device)[1]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, by its type or by one of the libraries' words for it."""
    words = ("out of memory", "allocate memory", "not enough memory", "_ALLOC_FAILED", "CUDA calloc", "CUDA malloc")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in words)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an exception says that another rank has gone; gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@contextlib.contextmanager
def explained_errors(config):
    """Turn the libraries' errors for lack of memory, or of another rank, into lines that say what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(memory_remedy(config.micro_batch_size, config.activation_checkpointing)) from error
        if is_lost_connection(error):
            raise ConnectionError("the connection to another rank is lost, see what that one says; the same command "
                                  f"continues from the last checkpoint ({error})") from error
        raise


def memory_remedy(micro_batch_size: int, activation_checkpointing: bool) -> str:
    """Say what to do about memory that ran out, in one line."""
    if micro_batch_size > 1:
        remedy = f"--micro_batch_size {micro_batch_size // 2}"
    elif not activation_checkpointing:
        remedy = "--activation_checkpointing"
    else:
        remedy = "a smaller --model or --sequence_length and another --out_dir"
    return f"out of memory at a micro-batch of {max(1, micro_batch_size)}: run the same command with {remedy}"


def identity(world) -> dict:
    """Describe what B and compile are chosen for: the number of ranks, and `cpu`, `mps` or the GPU's name."""
    return {"world_size": world.world_size, "device_kind": device_kind(world.device)}


def device_kind(device: torch.device) -> str:
    """Return `cpu`, `mps`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe_device(device: torch.device) -> str:
    """Name a device for the summary, such as `cpu, 2 threads` or `cuda:0, NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} {plural(threads, 'thread')}" if device.type == "cpu" else str(device)


def versions() -> dict[str, str]:
    """Return the versions of what computes: of Python, PyTorch and this code.

    The commit is known if this is a git checkout of its own; `script` is the beginning of train_gpt2.py's sha256.
    """
    folder = Path(__file__).parents[1]
    return {"python": sys.version.split()[0], "torch": torch.__version__, "commit": commit(folder),
            "script": hashlib.sha256((folder / "train_gpt2.py").read_bytes()).hexdigest()[:12]}


def commit(folder: Path) -> str:
    """Return the commit that is checked out in `folder`, with "-dirty" if a file has been edited; empty if none is.

    A repository that `folder` only lies in is another project's.
    """
    def git(*words: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        result = subprocess.run(["git", *words], cwd=folder, env=environment, capture_output=True, text=True)
        return result.stdout.strip()

    try:
        is_own = os.path.realpath(git("rev-parse", "--show-toplevel") or os.sep) == os.path.realpath(folder)
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") if is_own else ""
    except (OSError, ValueError):  # no git, or a name that is not UTF-8
        return ""
