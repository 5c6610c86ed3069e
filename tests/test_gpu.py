"""What only a CUDA GPU can show; `pytest -m gpu` runs it where there is one."""
import numpy as np
import pytest
import torch
from conftest import flags, read_log, run
from test_hellaswag import OURS
from test_model import random_gpt2
from test_train import assert_same_run, final_state

import hellaswag
from train_gpt2 import GPT, generate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")]

GPU = {"device": "cuda", "dtype": None, "micro_batch_size": None, "compile": False}


def test_bf16_and_b_are_chosen_and_the_loss_is_the_cpu_s(shard_folder, tmp_path):
    for name, changes in (("cpu", {}), ("gpu", GPU)):
        result = run(flags(data=shard_folder, out_dir=tmp_path / name, **changes))
        assert result.returncode == 0, result.stderr
    stored = final_state(tmp_path / "gpu")["train_config"]
    assert stored["dtype"] == ("bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32")
    assert stored["micro_batch_size"] == 8  # all windows of a step fit
    losses = [[line["loss"] for line in read_log(tmp_path / name, "train")] for name in ("cpu", "gpu")]
    np.testing.assert_allclose(*losses, atol=0.02, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_deterministic_run_is_resumed_bit_by_bit(compiled, shard_folder, tmp_path):
    changes = {**GPU, "data": shard_folder, "deterministic": True, "compile": compiled, "keep_checkpoints": 9}
    for name in ("whole", "resumed"):
        assert run(flags(out_dir=tmp_path / name, **changes)).returncode == 0
    for step in (4, 6):
        (tmp_path / "resumed" / f"model_{step:06d}.pt").unlink()
    result = run(flags(out_dir=tmp_path / "resumed", **changes))
    assert "resumed after step 2" in result.stdout, result.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_hellaswag_s_losses_are_those_of_the_cpu(tmp_path):
    random_gpt2(tmp_path, std=0.1, n_layer=2, n_head=2, n_embd=64, n_positions=256)
    examples, losses = list(hellaswag.iterate_examples(path=OURS)), {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            result = hellaswag.evaluate(GPT.from_pretrained(tmp_path).to(device), examples, torch.device(device))
        losses[device, dtype] = np.array(result["losses"])
    np.testing.assert_allclose(losses["cuda", torch.float32], losses["cpu", torch.float32], atol=1e-3, rtol=0)
    np.testing.assert_allclose(losses["cuda", torch.bfloat16], losses["cpu", torch.float32], atol=0.05, rtol=0)


def test_text_is_that_of_the_cpu(tmp_path):
    random_gpt2(tmp_path, std=0.1, n_layer=2, n_head=2, n_embd=64, n_positions=64)
    model, idx = GPT.from_pretrained(tmp_path), torch.randint(0, 50257, (2, 9))
    expected = generate(model, idx, 80, temperature=0)  # past the block too
    assert torch.equal(generate(model.to("cuda"), idx.to("cuda"), 80, temperature=0).cpu(), expected)
    generator = torch.Generator("cuda")
    draws = [generate(model, idx.to("cuda"), 20, top_p=0.9, num_samples=3, generator=generator.manual_seed(1))
             for _ in range(2)]
    assert torch.equal(*draws) and draws[0].shape == (6, 29)
