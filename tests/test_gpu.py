"""What only a CUDA GPU can show, each run in a process of its own.

    pytest tests/test_gpu.py -m gpu -n0
"""
import functools

import numpy as np
import pytest
import torch
from helpers import ENCODING, ROOT, assert_same_run, final_state, flags, needs, read_log, run

import hellaswag
from plumbing import machine
from plumbing.ranks import World
from plumbing.sampling import choose_token, generate, stream_tokens
from train_gpt2 import GPT, GPTConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")]

GPU = {"device": "cuda", "dtype": None, "micro_batch_size": None, "compile": False}
INJECT = ROOT / "tests" / "faults" / "inject.py"


def train(arguments, **options) -> None:
    """Run the command in a plain process, and check that it succeeds."""
    result = run(arguments, plain=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr


def test_dtype_and_b_are_chosen_and_the_losses_are_those_of_the_cpu(shard_folder, tmp_path):
    train(flags(data=shard_folder, out_dir=tmp_path / "cpu"))
    expected = [line["loss"] for line in read_log(tmp_path / "cpu", "train")]
    for name, dtype in (("auto", None), ("float16", "float16"), ("float32", "float32")):
        train(flags(data=shard_folder, out_dir=tmp_path / name, **{**GPU, "dtype": dtype}))
        losses = [line["loss"] for line in read_log(tmp_path / name, "train")]
        np.testing.assert_allclose(losses, expected, atol=0.001 if dtype == "float32" else 0.02, rtol=0)
    state = final_state(tmp_path / "auto")
    stored = state["train_config"]
    assert stored["dtype"] == str(machine.pick_dtype("auto", torch.device("cuda"))[0]).removeprefix("torch.")
    assert stored["micro_batch_size"] == 8  # all windows of a step fit
    assert state["machine"]["device_kind"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_deterministic_run_is_killed_and_resumed_bit_by_bit(compiled, shard_folder, tmp_path):
    changes = {**GPU, "data": shard_folder, "deterministic": True, "compile": compiled}
    train(flags(out_dir=tmp_path / "whole", **changes))
    killed = run(flags(out_dir=tmp_path / "killed", **changes), plain=True, script=INJECT, FAULT="kill:update:5")
    assert killed.returncode == -9, killed.stdout + killed.stderr
    train(flags(out_dir=tmp_path / "killed", **changes))
    assert read_log(tmp_path / "killed", "run")[-1]["origin"] == "resumed after step 4"
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@needs(*ENCODING, "transformers")
def test_hellaswag_s_losses_are_those_of_the_cpu(tmp_path):
    from helpers import random_gpt2  # which needs transformers

    random_gpt2(tmp_path, std=0.1, n_layer=2, n_head=2, n_embd=64, n_positions=256)
    path, losses = ROOT / "tests" / "hellaswag_examples.jsonl", {}
    examples = list(hellaswag.iterate_examples(path=path))
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        device = torch.device(device)
        with machine.autocast(dtype, device):
            result = hellaswag.evaluate(GPT.load(tmp_path).to(device), examples, World(device=device))
        losses[device.type, dtype] = np.array(result["losses"])
    np.testing.assert_allclose(losses["cuda", torch.float32], losses["cpu", torch.float32], atol=1e-3, rtol=0)
    np.testing.assert_allclose(losses["cuda", torch.bfloat16], losses["cpu", torch.float32], atol=0.05, rtol=0)


@needs("transformers")
def test_text_is_that_of_the_cpu(tmp_path):
    from helpers import random_gpt2

    random_gpt2(tmp_path, std=0.1, n_layer=2, n_head=2, n_embd=64, n_positions=64)
    model, idx = GPT.load(tmp_path), torch.randint(0, 50257, (2, 9))
    expected = generate(model, idx, 80, temperature=0)  # past the block too
    assert torch.equal(generate(model.to("cuda"), idx.to("cuda"), 80, temperature=0).cpu(), expected)
    draws = []
    for _ in range(2):
        choose = functools.partial(choose_token, top_p=0.9, generator=torch.Generator("cuda").manual_seed(1))
        draws.append(torch.cat(list(stream_tokens(model, idx.to("cuda"), 20, choose, num_samples=3)), dim=1))
    assert torch.equal(*draws) and draws[0].shape == (6, 20)


def test_no_kernel_of_cudnn_s_attention_runs_in_a_pass_with_a_cache():
    """Look at the kernels; from Hopper on cuDNN's is PyTorch's first choice, on other cards this shows less."""
    model = GPT(GPTConfig(block_size=256, n_layer=1, n_head=12, n_embd=768)).to("cuda")
    idx = torch.zeros(2, 64, dtype=torch.int64, device="cuda")
    with torch.no_grad(), machine.autocast(torch.bfloat16, torch.device("cuda")):
        with torch.profiler.profile() as profiler:
            generate(model, idx, 4, temperature=0)
    names = [event.key for event in profiler.key_averages()]
    assert any("attention" in name for name in names)
    assert not [name for name in names if "cudnn" in name and "attention" in name]
