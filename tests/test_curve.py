"""The losses of build-nanogpt's own script, met by the real command from the same weights and tokens.

    pytest tests/test_curve.py
"""
import json
import signal

import numpy as np
import pytest
import torch
from helpers import ENCODING, ROOT, mostly_slow, needs, read_log, run, run_until

from plumbing import checkpoint
from plumbing.tokenizer import gpt2_encoding
from train_gpt2 import GPT, GPTConfig

CURVE = json.loads((ROOT / "tests" / "build_nanogpt_curve.json").read_text(encoding="utf-8"))
TOLERANCE = 2e-6


def initial_weights() -> GPT:
    """The weights that the recorded run began with, by its description."""
    model = GPT(GPTConfig(**CURVE["model"]))
    names = sorted(name for name, _ in model.named_parameters())  # wte once, as lm_head shares it
    for i, name in enumerate(names):
        weight = model.get_parameter(name)
        with torch.no_grad():
            if name.endswith(".bias"):
                weight.zero_()
            elif ".ln_" in name:
                weight.fill_(1)
            else:
                drawn = np.random.RandomState(1000 + i).standard_normal(tuple(weight.shape)) * 0.02
                weight.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return model


@needs(*ENCODING)
@pytest.mark.parametrize("micro_batch_size, steps", mostly_slow([(16, 10), (CURVE["B"], 101)]))
def test_losses_norms_and_rates_are_those_of_build_nanogpt(micro_batch_size, steps, tmp_path):
    """The default run is stopped once it has printed step 10, so only its first validation is compared."""
    tokens = np.array(gpt2_encoding().encode_ordinary((ROOT / "input.txt").read_text(encoding="utf-8")), np.uint16)
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "x_val_000000.npy", tokens[:25_000])
    np.save(data / "x_train_000001.npy", tokens[25_000:])
    model = initial_weights()
    empty = {"optimizers": [], "train_config": {}, "step": 0, "val_loss": 0.0, "scaler": {}}
    start = checkpoint.save(tmp_path, 0, {"model": model.state_dict(), "model_config": CURVE["model"], **empty})
    given = {name: CURVE[name] for name in ("total_batch_size", "max_lr", "min_lr", "warmup_steps", "max_steps",
                                            "weight_decay", "grad_clip", "val_tokens")}
    given |= {"data": data, "out_dir": tmp_path / "out", "init_from": start, "sequence_length": CURVE["T"],
              "micro_batch_size": micro_batch_size, "device": "cpu", "dtype": "float32", "val_every": 50,
              "hellaswag_every": 0, "sample_every": 0, "checkpoint_every": 0}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    words += ["--no-shuffle", "--no-compile", "--log_every", "1"]
    if steps == 101:
        result = run(words)
        assert result.returncode == 0, result.stderr
    else:
        code, printed = run_until(words, f"step {steps:3}/101", signal.SIGTERM)
        assert code == 0, printed
    ours = read_log(tmp_path / "out", "train")
    theirs = CURVE["train"][:len(ours)]
    assert len(ours) >= steps
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, len(ours) + 1))
    for key in ("loss", "norm", "lr"):
        apart = [abs(one[key] - other[key]) for one, other in zip(ours, theirs)]
        assert max(apart) < TOLERANCE, f"{key} at step {np.argmax(apart) + 1}"
    val = {str(line["step"]): line["loss"] for line in read_log(tmp_path / "out", "val")}
    expected = {step: loss for step, loss in CURVE["val"].items() if int(step) <= len(ours)}
    assert expected and expected.keys() <= val.keys()
    assert all(abs(val[step] - loss) < TOLERANCE for step, loss in expected.items())
