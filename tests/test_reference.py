"""What counts as GPT-2 124M: the stored logits are transformers' own, and no changed model has them.

    pytest tests/test_reference.py
"""
from dataclasses import dataclass, make_dataclass

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import mostly_slow, needs

import train_gpt2
from plumbing import reference
from plumbing.transformers_format import CONV1D
from train_gpt2 import GPT, MLP, PADDED_VOCAB_SIZE, Block, CausalSelfAttention, GPTConfig

SMALL = dict(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)


@needs("transformers")
def test_the_stored_numbers_are_those_of_transformers():
    """The same weights in their GPT-2, in float64."""
    import transformers

    config = transformers.GPT2Config(**reference.NARROW, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval().double()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith(CONV1D):  # stored as (in, out)
                weight.copy_(reference.fixed_weight(name, weight.shape[::-1]).t())
            else:
                weight.copy_(reference.fixed_weight(name, weight.shape))
        tokens = reference.fixed_tokens(1025)
        logits = theirs(tokens[:, :-1]).logits[0]
    found = logits[list(reference.POSITIONS)][:, list(reference.TOKENS)]
    torch.testing.assert_close(found, torch.tensor(reference.LOGITS).double(), atol=2e-6, rtol=0)
    assert F.cross_entropy(logits, tokens[0, 1:]).item() == pytest.approx(reference.LOSS, abs=1e-6)
    assert found.std() > 1  # a model that says nothing would agree with anything


@pytest.mark.parametrize("precision", mostly_slow(["highest", "high", "medium"]))
def test_our_model_computes_gpt2_and_nothing_is_disturbed(precision):
    """Whatever precision a GPU is allowed; on a CPU that multiplies bfloat16, the lowest would give other logits."""
    model, before = GPT(GPTConfig(**SMALL)), torch.get_float32_matmul_precision()
    state = torch.get_rng_state()
    torch.set_float32_matmul_precision(precision)
    try:
        assert reference.computes_gpt2(model)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("changes, same", [
    ({}, True), ({"vocab_size": PADDED_VOCAB_SIZE}, True), ({"vocab_size": 50432}, False), ({"n_layer": 13}, False),
    ({"n_head": 6}, False), ({"n_embd": 780}, False), ({"block_size": 2048}, False)])
def test_the_shape_of_124m(changes, same):
    with torch.device("meta"):
        assert reference.has_gpt2_shape(GPT(GPTConfig(**changes))) == same


def test_is_gpt2_needs_both(monkeypatch):
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert reference.is_gpt2(model)
    monkeypatch.setattr(MLP, "forward", lambda self, x, *_, **__: self.c_proj(F.relu(self.c_fc(x))))
    assert not reference.is_gpt2(model)


@pytest.mark.parametrize("default", [{"n_layer": 24}, {"n_head": 6}, {"n_embd": 1536}, {"block_size": 2048}])
def test_a_model_is_not_gpt2_because_somebody_edited_the_defaults(default):
    Edited = make_dataclass("Edited", [(name, int, size) for name, size in default.items()], bases=(GPTConfig,))
    with torch.device("meta"):
        model = GPT(Edited(vocab_size=PADDED_VOCAB_SIZE))
    assert not reference.is_gpt2(model)


# ------------------------------------------------------------------------------------------------------ changed models

def after_init(monkeypatch, cls, change):
    """Let change(module) follow the construction of a class."""
    init = cls.__init__

    def changed(self, *arguments, **options):
        init(self, *arguments, **options)
        change(self)
    monkeypatch.setattr(cls, "__init__", changed)


def change_attention(monkeypatch, change):
    """Let change(q, k, options) return what attention is computed from."""
    attend = F.scaled_dot_product_attention

    def changed(q, k, v, *_, **options):
        q, k, options = change(q, k, options)
        return attend(q, k, v, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", changed)


def change_mlp(monkeypatch, activation):
    monkeypatch.setattr(MLP, "forward", lambda self, x, *_, **__: self.c_proj(activation(self.c_fc(x))))


def change_logits(monkeypatch, change):
    forward = GPT.forward

    def changed(self, idx, targets=None, cache=None, *_, **__):
        logits = change(forward(self, idx, None, cache))
        return logits if targets is None else F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))
    monkeypatch.setattr(GPT, "forward", changed)


def rotated(x):
    """Rotary position embedding, (B, nh, T, hs) -> (B, nh, T, hs)."""
    half = x.size(-1) // 2
    angles = torch.arange(x.size(2))[:, None] / 10_000 ** (torch.arange(half) / half)  # (T, hs / 2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


def rope(monkeypatch):
    change_attention(monkeypatch, lambda q, k, options: (rotated(q), rotated(k), options))
    after_init(monkeypatch, GPT, lambda model: model.transformer.pop("wpe"))

    def hidden_states(self, idx, cache=None, *_, **__):
        x = self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)
    monkeypatch.setattr(GPT, "hidden_states", hidden_states)


def rope_beside_wpe(monkeypatch):
    change_attention(monkeypatch, lambda q, k, options: (rotated(q), rotated(k), options))


def no_wpe(monkeypatch):
    after_init(monkeypatch, GPT, lambda model: model.transformer.wpe.register_forward_hook(lambda *io: 0 * io[2]))


def windowed(size):
    def change(q, k, options):
        row = torch.arange(k.size(2) - q.size(2), k.size(2))[:, None]
        distance = row - torch.arange(k.size(2))  # (T, past + T)
        return q, k, {"attn_mask": (distance >= 0) & (distance < size)}
    return lambda monkeypatch: change_attention(monkeypatch, change)


def attention_scale(scale):
    return lambda monkeypatch: change_attention(monkeypatch, lambda q, k, options: (q, k, {**options, "scale": scale}))


def qk_norm(monkeypatch):
    change_attention(monkeypatch, lambda q, k, options: (F.normalize(q, dim=-1), F.normalize(k, dim=-1), options))


def not_causal(monkeypatch):
    change_attention(monkeypatch, lambda q, k, options: (q, k, {}))


def set_epsilon(layers, epsilon):
    def change(model):
        for name, module in model.named_modules():
            if name.endswith(layers):
                module.eps = epsilon
    return lambda monkeypatch: after_init(monkeypatch, GPT, change)


def without_biases(cls):
    def change(model):
        for module in model.modules():
            if isinstance(module, cls):
                module.register_parameter("bias", None)
    return lambda monkeypatch: after_init(monkeypatch, GPT, change)


def post_norm(monkeypatch):
    def forward(self, x, cache=None, *_, **__):
        x = self.ln_1(x + self.attn(x, cache))
        return self.ln_2(x + self.mlp(x))
    monkeypatch.setattr(Block, "forward", forward)


def parallel_block(monkeypatch):
    monkeypatch.setattr(Block, "forward", lambda self, x, cache=None, *_, **__: (
        x + self.attn(self.ln_1(x), cache) + self.mlp(self.ln_2(x))))


def last_block_left_out(monkeypatch):
    after_init(monkeypatch, GPT, lambda model: model.transformer.h[-1].register_forward_hook(lambda *io: io[1][0]))


def dropout(monkeypatch):
    change_mlp(monkeypatch, lambda x: F.gelu(x, approximate="tanh"))
    forward = CausalSelfAttention.forward
    monkeypatch.setattr(CausalSelfAttention, "forward", lambda self, x, cache=None, *_, **__: F.dropout(
        forward(self, x, cache), 0.1, self.training))


def untied_head(monkeypatch):
    after_init(monkeypatch, GPT, lambda model: setattr(
        model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().clone())))


def rms_norm(monkeypatch):
    monkeypatch.setattr(train_gpt2.nn, "LayerNorm", nn.RMSNorm)


def scaled_embedding(monkeypatch):
    after_init(monkeypatch, GPT, lambda model: model.transformer.wte.register_forward_hook(
        lambda *io: io[2] * model.config.n_embd ** 0.5))


def label_smoothing(monkeypatch):
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(GPT, "forward", lambda self, idx, targets=None, cache=None, *_, **__: (
        self.lm_head(self.hidden_states(idx, cache)) if targets is None else
        cross_entropy(self.lm_head(self.hidden_states(idx))[0], targets[0], label_smoothing=0.01)))


def wrong_with_activation_checkpointing(monkeypatch):
    monkeypatch.setattr(train_gpt2, "recompute", lambda block, x, use_reentrant, *_, **__: 1.01 * block(x))


def wrong_with_a_cache(monkeypatch):
    forward = CausalSelfAttention.forward
    monkeypatch.setattr(CausalSelfAttention, "forward", lambda self, x, cache=None, *_, **__: (
        forward(self, x, cache) * (1.01 if cache is not None else 1)))


CHANGES = {
    "RoPE instead of wpe": rope, "RoPE beside wpe": rope_beside_wpe, "no positions": no_wpe,
    "relu": lambda monkeypatch: change_mlp(monkeypatch, F.relu),
    "squared relu": lambda monkeypatch: change_mlp(monkeypatch, lambda x: F.relu(x).square()),
    "gelu with erf": lambda monkeypatch: change_mlp(monkeypatch, F.gelu),
    "silu": lambda monkeypatch: change_mlp(monkeypatch, F.silu),
    "no biases of Linear": without_biases(nn.Linear), "no biases of LayerNorm": without_biases(nn.LayerNorm),
    "epsilon 1e-3": set_epsilon(("ln_1", "ln_2", "ln_f"), 1e-3),
    "epsilon 1e-6": set_epsilon(("ln_1", "ln_2", "ln_f"), 1e-6),
    "epsilon 1e-6 of ln_1": set_epsilon("ln_1", 1e-6), "epsilon 1e-6 of ln_2": set_epsilon("ln_2", 1e-6),
    "epsilon 1e-6 of ln_f": set_epsilon("ln_f", 1e-6), "RMSNorm": rms_norm,
    "attention scale 1": attention_scale(1.0), "attention scale 1/hs": attention_scale(1 / 4), "QK norm": qk_norm,
    "window of 128": windowed(128), "window of 1,000": windowed(1000), "not causal": not_causal,
    "norm after the residual": post_norm, "parallel block": parallel_block, "last block left out": last_block_left_out,
    "dropout": dropout, "untied head": untied_head, "scaled embedding": scaled_embedding,
    "capped logits": lambda monkeypatch: change_logits(monkeypatch, lambda logits: 30 * torch.tanh(logits / 30)),
    "label smoothing": label_smoothing, "wrong with activation checkpointing": wrong_with_activation_checkpointing,
    "wrong with a cache": wrong_with_a_cache,
}


@pytest.mark.parametrize("change", mostly_slow(list(CHANGES.values()), kept=12), ids=CHANGES.keys())
def test_a_changed_model_does_not_compute_gpt2(change, monkeypatch):
    model, matches, found = GPT(GPTConfig(**SMALL)), reference.matches, []
    monkeypatch.setattr(reference, "matches", lambda *output, **__: found.append(matches(*output)) or found[-1])
    change(monkeypatch)
    assert not reference.computes_gpt2(model)
    assert found[-1] is False  # it ran, and computed something else


def test_a_model_that_cannot_be_built_does_not_compute_gpt2(monkeypatch):
    model = GPT(GPTConfig(**SMALL))
    after_init(monkeypatch, Block, lambda block: block.no_such_part)
    assert not reference.computes_gpt2(model)


@pytest.mark.slow
def test_a_mask_that_leaves_nothing_out_is_still_gpt2(monkeypatch):
    """The tools of the tests above do no harm themselves."""
    windowed(1024)(monkeypatch)
    after_init(monkeypatch, GPT, lambda model: None)
    change_mlp(monkeypatch, lambda x: F.gelu(x, approximate="tanh"))
    change_logits(monkeypatch, lambda logits: logits)
    assert reference.computes_gpt2(GPT(GPTConfig(**SMALL)))


def test_a_configuration_without_defaults_is_another_shape():
    @dataclass
    class Bare:
        vocab_size: int
        n_embd: int

    with torch.device("meta"):
        model = GPT(GPTConfig())
    model.config = Bare(50257, 768)
    assert not reference.is_gpt2(model)


def test_a_setting_of_another_architecture_is_another_shape():
    @dataclass
    class Windowed(GPTConfig):
        window: int = 1024

    with torch.device("meta"):
        assert reference.has_gpt2_shape(GPT(Windowed()))
        assert not reference.has_gpt2_shape(GPT(Windowed(window=256)))
