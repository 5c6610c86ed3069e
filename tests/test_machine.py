"""What is chosen for a machine: device, dtype, compiler, memory. Functions put in torch.cuda's place play the GPU.

    pytest tests/test_machine.py
"""
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import ENCODING, ROOT, flags, mostly_slow, needs, read_log, run

import train_gpt2
from plumbing import machine
from plumbing.cli import UserError
from plumbing.ranks import World
from plumbing.sampling import choose_token, stream_tokens
from train_gpt2 import GPT, GPTConfig, TrainConfig

GiB = 2**30
GPU = torch.device("cuda:0")


@pytest.fixture
def card(monkeypatch):
    """Call it to put a GPU with these properties in the place of what torch.cuda says."""
    def install(capability=(9, 0), archs=("sm_80", "sm_90"), name="NVIDIA H100 80GB HBM3", bf16=None, init=None):
        bf16 = capability >= (8, 0) if bf16 is None else bf16
        for function, result in {
            "device_count": 1, "get_device_name": name, "get_device_capability": capability,
            "get_arch_list": list(archs), "is_bf16_supported": bf16,
        }.items():
            monkeypatch.setattr(torch.cuda, function, lambda *arguments, result=result, **options: result)
        monkeypatch.setattr(torch.cuda, "init", init or (lambda: None))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return install


OLD_DRIVER = """
import sys
import torch
torch.cuda.device_count = lambda: 1
def init():
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
                       "driver by downloading it.\\nAlternatively, install another PyTorch.")
torch.cuda.init = init
import train_gpt2
from plumbing import cli
cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))
"""


def test_a_driver_that_is_too_old_is_told_in_one_line_and_the_cpu_can_be_named(shard_folder, tmp_path):
    """The driver's management library counts one card, and CUDA does not start."""
    script = tmp_path / "old_driver.py"
    script.write_text(OLD_DRIVER)
    real = {"script": script, "PYTORCH_NVML_BASED_CUDA_CHECK": "0"}  # as users have it
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out", device=None), **real)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: cuda:0 is there, but PyTorch") and "is too old (found version 12020)" in line
    assert "update the NVIDIA driver" in line and "use --device cpu" in line
    assert run(flags(data=shard_folder, out_dir=tmp_path / "out", device="cpu"), **real).returncode == 0


def test_a_card_for_which_pytorch_has_no_code_is_told(card):
    card(capability=(6, 1), archs=("sm_75", "sm_80", "sm_90", "compute_90"), name="GeForce GTX 1080")
    for name in ("auto", "cuda", "cuda:0"):
        with pytest.raises(OSError, match=r"no code for cuda:0, GeForce GTX 1080, of compute capability 6.1, only for "
                                          r"sm_75 sm_80 .* another CUDA .* --device cpu"):
            machine.pick_device(name, 0, 1)
    assert machine.pick_device("cpu", 0, 1).type == "cpu"
    card(capability=(8, 6), archs=("sm_75", "sm_80", "sm_90"), name="NVIDIA A10")
    assert machine.pick_device("auto", 0, 1) == GPU


def test_a_card_that_cannot_be_opened_or_has_no_memory_is_told(card, monkeypatch):
    def init():
        raise torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization with error: device >= 0")

    card(init=init)
    with pytest.raises(OSError, match=r"cannot use it \(CUDA call failed lazily .* update the NVIDIA driver"):
        machine.pick_device("auto", 0, 1)
    card(init=lambda: warnings.warn("Found GPU0 which is of cuda capability 6.1. " * 13, stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.pick_device("auto", 0, 1) == GPU

    def full(*size, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(OSError, match=r"cuda:0 has no free memory: stop the process that holds it .* another --device"):
        machine.pick_device("auto", 0, 1)


@pytest.mark.parametrize("capability, archs, runs", [  # NVIDIA's compatibility rules (CUDA C++ programming guide, 5.1)
    ((8, 0), "sm_80", True), ((8, 6), "sm_80", True), ((8, 0), "sm_86", False), ((9, 0), "sm_80 sm_86", False),
    ((9, 0), "sm_80 compute_80", True), ((7, 5), "sm_70", True), ((7, 0), "sm_75 sm_80 compute_90", False),
    ((9, 0), "sm_90a", True), ((10, 0), "sm_100", True), ((10, 3), "sm_100f", True), ((12, 0), "sm_100f", False),
    ((10, 3), "sm_100a compute_100a", False), ((12, 1), "sm_90 compute_120", True), ((6, 1), "", False),
    ((13, 0), "sm_90 gpu_130", True),  # a notation that is not known
])
def test_which_cards_run_the_code_of_a_pytorch(capability, archs, runs):
    assert machine.has_code_for(capability, archs.split()) == runs


def test_expandable_segments_are_the_default_and_the_user_s_setting_wins(card, monkeypatch):
    import os

    card()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    machine.pick_device("cuda", 0, 1)
    assert "PYTORCH_ALLOC_CONF" not in os.environ and os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # remembered, and put back at the end
    machine.pick_device("cuda", 0, 1)
    assert os.environ["PYTORCH_ALLOC_CONF"] == ""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    machine.pick_device("cuda", 0, 1)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_dtype_is_bfloat16_or_float16_or_float32_by_what_the_card_multiplies(card):
    for capability, dtype in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16),
                              ((7, 0), torch.float16), ((6, 1), torch.float32)):
        card(capability=capability)
        assert machine.pick_dtype("auto", GPU)[0] == dtype
        assert machine.pick_dtype("float32", GPU) == (torch.float32, "")


def test_autocast_multiplies_in_its_dtype_and_can_be_entered_twice():
    cpu, a = torch.device("cpu"), torch.ones(4, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        context = machine.autocast(dtype, cpu)
        for _ in range(2):
            with context:
                assert (a @ a).dtype == dtype
        assert (a @ a).dtype == torch.float32


def test_compiling_follows_the_user_then_the_run_so_far_then_its_length(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "compile", lambda function, *_, **options: function)
    for wanted, before, seconds, compiles in (
            (None, None, 599, False), (None, None, 601, True), (False, True, 9999, False), (True, False, 1, True),
            (None, True, 1, True), (None, False, 9999, False)):
        assert machine.pick_compile(wanted, before, cpu, seconds)[0] == compiles

    def missing(function, *_, **options):
        raise FileNotFoundError("g++")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(OSError, match=r"no working compiler .* or use --no-compile"):
        machine.pick_compile(True, None, cpu, 9999)
    for before in (None, True):  # what was stored is no wish of the user's
        assert machine.pick_compile(None, before, cpu, 9999) == (False, "no working compiler (FileNotFoundError)")


def test_an_evaluation_alone_is_too_short_to_compile_for(monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "pick_compile", lambda *question, **__: (
        asked.append(question[-1]) or (False, "played")))
    model = GPT(GPTConfig(block_size=1024, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    for changes in ({}, {"eval_only": True}, {"max_steps": 0}):
        machine.resolve(TrainConfig(dtype="float32", **changes), None, model, World())
    assert asked[0] > 600 and asked[1:] == [0, 0]


def test_a_compiled_model_is_one_graph_of_its_dtype_and_deterministic_where_asked(monkeypatch):
    import torch._dynamo.config
    import torch._inductor.config
    import torch.compiler.config

    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    monkeypatch.setattr(torch._inductor.config, "deterministic", False)
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    machine.compiled(torch.nn.Linear(2, 2), torch.bfloat16, deterministic=False)
    assert torch._dynamo.config.optimize_ddp is False and torch._inductor.config.deterministic is False
    tags = {torch.compiler.config.cache_key_tag}
    machine.compiled(torch.nn.Linear(2, 2), torch.float16, deterministic=True)
    assert torch._inductor.config.deterministic is True
    assert torch.compiler.config.cache_key_tag not in tags  # what was compiled for another dtype is not taken


class Memory:
    """A GPU's memory as a forward and backward pass of B windows sees it: `fixed` and `each` bytes, `size` in all."""

    def __init__(self, monkeypatch, fixed: int, each: int, size: int, words: str = "CUDA out of memory"):
        self.fixed, self.each, self.size, self.words, self.peak = fixed, each, size, words, 0
        for name, value in {"reset_peak_memory_stats": None, "empty_cache": None, "memory_reserved": 0,
                            "mem_get_info": (size, size)}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *device, value=value, **__: value)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, *_, **__: self.peak)

    def run(self, B: int) -> None:
        self.peak = self.fixed + B * self.each
        if self.peak > self.size:
            raise RuntimeError(self.words)


@pytest.mark.parametrize("size, other, fits", [
    (40, 2, 16),  # (0.9 * 40 - 1 - 2) / 2
    (40, 14, 10),
    (4, 2, 1),  # two do not fit: one is tried
    (6, 9, 1),  # both fit, but not with what comes on top: one is tried
    (2, 0, 0),  # not even one
])
def test_the_micro_batch_that_fits_and_the_arithmetic_behind_it(size, other, fits, monkeypatch):
    memory = Memory(monkeypatch, GiB, 2 * GiB, size * GiB)
    assert machine.count_fitting_windows(memory.run, GPU, other * GiB) == fits


def test_only_memory_that_ran_out_makes_the_micro_batch_smaller(monkeypatch):
    memory = Memory(monkeypatch, GiB, 2 * GiB, 4 * GiB, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas")
    assert machine.count_fitting_windows(memory.run, GPU, 0) == 1
    memory.words = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        machine.count_fitting_windows(memory.run, GPU, 0)


def test_memory_for_adamw_and_for_ddp_s_buckets_is_counted(monkeypatch):
    model, asked = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)), []
    monkeypatch.setattr(machine, "count_fitting_windows", lambda run, device, other, *_, **__: asked.append(other) or 5)
    monkeypatch.setattr(World, "min", lambda self, value, *_, **__: value)
    for world_size, windows, B in ((1, 16, 4), (2, 8, 4)):
        assert machine.pick_micro_batch_size(model, 8, windows, World(0, world_size, GPU)) == B
    assert asked == [8 * model.count_parameters(), 12 * model.count_parameters()]
    monkeypatch.setattr(World, "min", lambda self, value, *_, **__: 0)  # of another rank
    with pytest.raises(UserError, match="not one window of 8 tokens fits on cuda:0"):
        machine.pick_micro_batch_size(model, 8, 8, World(0, 2, GPU))


def test_sequences_longer_than_the_model_s_positions_are_refused():
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(UserError, match="--sequence_length is 16, it must be at most the model's 8 positions"):
        machine.resolve(TrainConfig(sequence_length=16), None, model, World())


def test_b_is_the_largest_divisor_that_fits_a_cpu():
    for total, T, expected in ((524288, 1024, 2), (512, 128, 4), (96 * 64, 64, 32), (90 * 64, 64, 30), (4096, 4096, 1)):
        assert machine.pick_micro_batch_size(None, T, total // T, World()) == expected


def test_memory_that_runs_out_is_recognised_in_the_words_of_every_library():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert machine.is_out_of_memory(error.value)
    assert machine.is_out_of_memory(torch.OutOfMemoryError("no words"))
    for words in ("CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory",
                  "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                  "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                  "NCCL error in: unhandled cuda error\nLast error:\nFailed to CUDA calloc async 608 bytes"):
        assert machine.is_out_of_memory(RuntimeError(words))
    assert not machine.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    for B, recomputes, remedy in ((8, False, "--micro_batch_size 4"), (1, False, "--activation_checkpointing"),
                                  (1, True, "a smaller --model")):
        assert remedy in machine.memory_remedy(B, recomputes)


def test_the_peak_is_the_table_s_or_measured_on_random_numbers(card, monkeypatch):
    machine.measured_peak.cache_clear()
    card()
    assert machine.known_peak(GPU, torch.bfloat16) == 989e12 and machine.known_peak(GPU, torch.float32) == 989e12 / 2
    card(capability=(7, 5), name="Tesla T4")
    assert machine.known_peak(GPU, torch.float16) == 65e12
    card(name="NVIDIA of tomorrow")
    assert machine.known_peak(GPU, torch.bfloat16) is machine.known_peak(torch.device("cpu"), torch.float32) is None
    factors, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b, *_, **__: factors.append(a) or product(a, b))
    assert machine.measured_peak(torch.device("cpu"), torch.float32) > 1e8
    assert len(factors) == 4 and all(0.9 < factor.std() < 1.1 for factor in factors)


@pytest.mark.parametrize("evaluated", [False, pytest.param(True, marks=needs(*ENCODING))])
def test_attention_of_cudnn_is_for_training_alone(evaluated, shard_folder, tmp_path, monkeypatch):
    """In every pass of the real loop: whether gradients are kept, and whether cuDNN's attention is allowed."""
    passes, original = [], torch.nn.functional.scaled_dot_product_attention

    def recording(*arguments, **options):
        passes.append((torch.is_grad_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return original(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    changes = {"sample_every": 1, "hellaswag_every": 1, "hellaswag_limit": 2,
               "hellaswag_data": ROOT / "tests" / "hellaswag_examples.jsonl"} if evaluated else {}
    train_gpt2.main(train_gpt2.parse_args(flags(data=shard_folder, out_dir=tmp_path, max_steps=1, **changes)))
    training_and_validation, samples_and_hellaswag = {(True, True), (False, True)}, {(False, False)}
    assert set(passes) == training_and_validation | (samples_and_hellaswag if evaluated else set())
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_of_cudnn_is_off_while_a_token_is_made_and_not_between_tokens(monkeypatch):
    passes, original = [], torch.nn.functional.scaled_dot_product_attention

    def recording(*arguments, **options):
        passes.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    model = GPT(GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=8))
    for _ in stream_tokens(model, torch.zeros(1, 3, dtype=torch.int64), 12, choose_token):  # past the block, too
        assert torch.backends.cuda.cudnn_sdp_enabled(), "the switch outlasts a step of the generator"
    assert passes == [False] * 12


RESIDENT = """
import sys
from pathlib import Path
import torch
from plumbing import checkpoint
def anonymous() -> int:  # bytes that are not pages of a file
    return sum(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = anonymous()
state = checkpoint.load(sys.argv[1])
total = sum(float(tensor.sum()) for tensor in state["model"].values())
print(anonymous() - before, total)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it needs Linux's /proc")
def test_a_checkpoint_is_read_as_pages_of_its_file(tmp_path):
    """128 MB of weights, all of them read, take less than 32 MB that ranks cannot share."""
    from plumbing import checkpoint

    weights = {f"weight{i}": torch.full((2**20,), i, dtype=torch.float32) for i in range(32)}
    path = checkpoint.save(tmp_path, 1, {**{key: kind() for key, kind in checkpoint.KEYS.items()}, "model": weights})
    done = subprocess.run([sys.executable, "-c", RESIDENT, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken, total = done.stdout.split()
    assert float(total) == 2**20 * sum(range(32))
    assert int(taken) < 32e6


@pytest.mark.skipif(sys.platform != "linux", reason="it needs Linux's /proc")
@pytest.mark.parametrize("optimizer", mostly_slow(["adamw", "muon"]))
def test_nothing_of_a_checkpoint_s_file_is_held_once_a_run_goes_on(optimizer, shard_folder, tmp_path, monkeypatch):
    """Weights and moments must be copies: a pruned file gives its space back only when nothing holds it any more."""
    out, held = tmp_path / "out", []
    changes = {"data": shard_folder, "out_dir": out, "optimizer": optimizer}
    train_gpt2.main(train_gpt2.parse_args(flags(**changes)))
    (out / "model_000006.pt").unlink()
    log = train_gpt2.RunLog.train
    monkeypatch.setattr(train_gpt2.RunLog, "train", lambda self, *arguments, **options: (
        held.extend(line for line in open("/proc/self/maps") if str(out) in line), log(self, *arguments, **options)))
    train_gpt2.main(train_gpt2.parse_args(flags(**changes)))
    assert len(read_log(out, "train")) == 6 and held == []
