"""The schedule against its formula, the parameter groups against the rule, Muon's share against the blocks.

    pytest tests/test_optimizer.py
"""
import copy
import math
import shutil

import pytest
import torch
from helpers import ROOT, assert_same_run, flags, read_log, write_shards

import train_gpt2
from plumbing import machine
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, configure_optimizers, get_lr, parse_args

CPU = torch.device("cpu")


def small_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16))


def test_schedule_equals_the_formula_at_every_step():
    config = TrainConfig()
    for step in range(config.max_steps + 100):
        if step < 715:
            expected = 6e-4 * (step + 1) / 715
        elif step < 19073:
            expected = 6e-5 + (6e-4 - 6e-5) * (1 + math.cos(math.pi * (step - 715) / (19073 - 715))) / 2
        else:
            expected = 6e-5
        assert get_lr(step, config) == pytest.approx(expected, rel=1e-12)


def test_schedule_without_warmup_or_with_more_warmup_than_steps():
    assert get_lr(0, TrainConfig(warmup_steps=0)) == 6e-4
    assert get_lr(9, TrainConfig(max_steps=10)) == pytest.approx(6e-4 * 10 / 715)


def test_decay_falls_on_matrices_only():
    model = small_model()
    (optimizer,) = configure_optimizers(model, TrainConfig(weight_decay=0.25), CPU)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.25 for p in group["params"]}
    plain = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() >= 2}
    assert plain == {id(p) for p in model.parameters() if p.dim() < 2}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["fused"]


def test_adamw_takes_the_step_of_the_paper():
    """Loshchilov and Hutter 2019, algorithm 2, worked by hand for two steps."""
    model = small_model()
    config = TrainConfig(max_lr=0.01, min_lr=0.0, weight_decay=0.1)
    (optimizer,) = configure_optimizers(model, config, CPU)
    p = model.transformer.wpe.weight
    expected, m, v = p.detach().clone().double(), 0.0, 0.0
    for t in (1, 2):
        for q in model.parameters():
            q.grad = torch.randn_like(q)
        g = p.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), expected, atol=1e-6, rtol=0)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = small_model()
    adamw, muon = configure_optimizers(model, TrainConfig(optimizer="muon"), CPU)
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert by_muon == {f"transformer.h.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert by_adamw == set(names.values()) - by_muon
    assert [group["momentum"] for group in muon.param_groups] == [0.95]


def test_muon_s_updates_have_the_size_of_adamw_s():
    """Their root mean square is 0.2 of the learning rate for matrices of any shape (Liu et al. 2025, equation 4)."""
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=64))
    config = TrainConfig(optimizer="muon", max_lr=0.01, min_lr=0.0, weight_decay=0.0)
    _, muon = configure_optimizers(model, config, CPU)
    (group,) = muon.param_groups
    before = [p.detach().clone() for p in group["params"]]
    for p in group["params"]:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    sizes = [(p.detach() - old).square().mean().sqrt().item() / 0.01 for p, old in zip(group["params"], before)]
    assert len(sizes) == 4 and sizes == pytest.approx([0.2] * 4, rel=0.2)


def test_muon_continues_from_its_state_dict_bit_by_bit():
    models = [small_model(), small_model()]
    config = TrainConfig(optimizer="muon")
    pairs = [configure_optimizers(model, config, CPU) for model in models]

    def steps(model, optimizers, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.01 * seed
                optimizer.step()

    steps(models[0], pairs[0], 1)
    models[1].load_state_dict(models[0].state_dict())
    for one, other in zip(*pairs):
        other.load_state_dict(copy.deepcopy(one.state_dict()))
    for model, optimizers in zip(models, pairs):
        steps(model, optimizers, 2)
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p, q)


def test_linear_decay_equals_the_formula():
    config = TrainConfig(max_steps=30, warmup_steps=10, max_lr=1.0, min_lr=0.2, decay="linear")
    assert [get_lr(step, config) for step in (0, 9, 10, 15, 20, 30)] == pytest.approx([0.1, 1, 1, 0.8, 0.6, 0.2])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_steps_hold_the_peak_rate_and_fall_at_the_end(decay):
    changes = dict(max_steps=30, max_lr=1.0, min_lr=0.2, decay=decay)
    config = TrainConfig(warmup_steps=5, decay_steps=10, **changes)
    assert [get_lr(step, config) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert {get_lr(step, config) for step in range(5, 21)} == {1.0}
    falling = TrainConfig(warmup_steps=20, **changes)  # the same steps, as a decay of all that is left
    assert [get_lr(step, config) for step in range(20, 31)] == [get_lr(step, falling) for step in range(20, 31)]
    assert get_lr(30, config) == 0.2


def test_presets_lie_under_the_flags(tmp_path):
    text, folder = tmp_path / "a.txt", tmp_path / "shards"  # a text brings the demo's settings, the folder does not
    text.write_text("x")
    folder.mkdir()
    words, own = ["--data", str(folder)], {"data": str(folder), "out_dir": "log/shards"}
    assert parse_args(words) == parse_args([*words, "--preset", "gpt2"]) == TrainConfig(**own)
    fast = parse_args([*words, "--preset", "fast", "--min_lr", "1e-5"])
    assert fast == TrainConfig(**PRESETS["fast"] | own | {"min_lr": 1e-5})
    assert (fast.optimizer, fast.decay, fast.max_lr) == ("muon", "linear", 3.6e-3)
    demo = parse_args([*words, "--preset", "demo"])  # named, it holds for shards too
    assert demo == TrainConfig(**PRESETS["demo"] | own)


@pytest.mark.parametrize("preset", ["gpt2", "fast"])
def test_a_preset_that_is_named_is_taken_whole_for_a_text_file_too(preset, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("x")
    own = {"data": str(text), "out_dir": "log/a"}
    assert parse_args(["--data", str(text)]) == TrainConfig(**PRESETS["demo"] | own)
    assert parse_args(["--data", str(text), "--preset", preset]) == TrainConfig(**PRESETS[preset] | own)


@pytest.mark.parametrize("preset, data", [(None, "input.txt"), ("demo", "input.txt"), ("fast", "edu_fineweb10B")])
@pytest.mark.parametrize("shards_are_there", [False, True])
def test_only_the_demo_falls_back_to_the_built_in_text(shards_are_there, preset, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if shards_are_there:
        write_shards(tmp_path / "edu_fineweb10B")
        data = data if preset else "edu_fineweb10B"
    config = parse_args(["--preset", preset] if preset else [])
    assert config.data == (str(ROOT / data) if data == "input.txt" else data)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_an_eager_optimizer_takes_pytorch_s_steps_and_calls_its_hooks(kind):
    weights, calls = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)], []
    ours, theirs = machine.eager(kind)([weights[0]], lr=0.1), kind([weights[1]], lr=0.1)
    assert isinstance(ours, kind) and repr(ours) == repr(theirs)
    ours.register_step_post_hook(lambda *_: calls.append("post"))
    for seed in range(3):
        for weight in weights:
            weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.ones(4, 3)) and weights[0].grad is None
    assert calls == ["post"] * 3 and weights[0].requires_grad
    again = machine.eager(kind)([weights[0]], lr=0.1)
    again.load_state_dict(ours.state_dict())
    assert str(again.state_dict()) == str(theirs.state_dict())


def test_an_optimizer_of_one_s_own_is_resumed_bit_by_bit(shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "configure_optimizers", lambda model, config, *_, **__: [
        torch.optim.SGD(model.parameters(), lr=config.max_lr, momentum=0.9)])
    whole, out = tmp_path / "whole", tmp_path / "out"
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=whole)))
    shutil.copytree(whole, out)
    (out / "model_000006.pt").unlink()
    train_gpt2.main(parse_args(flags(data=shard_folder, out_dir=out)))
    assert read_log(out, "run")[-1]["origin"] == "resumed after step 4"
    assert_same_run(whole, out)
