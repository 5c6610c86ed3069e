"""What the study changes in train_gpt2.py, each variant by a subclass or a function in another's place.

    with variant("untied"):
        train_gpt2.main(config)
"""
import contextlib
import math
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import train_gpt2
from train_gpt2 import GPT, MLP, Block

VARIANTS = {"gpt2": lambda replace: None}  # name -> function(replace); replace(name, value) changes train_gpt2


def named(function):
    """Enter a variant into VARIANTS."""
    VARIANTS[function.__name__] = function
    return function


@contextlib.contextmanager
def variant(name: str):
    """Let train_gpt2 be that variant within the block."""
    with contextlib.ExitStack() as stack:
        VARIANTS[name](lambda attribute, value: stack.enter_context(mock.patch.object(train_gpt2, attribute, value)))
        yield


@named
def untied(replace):
    """The output has a matrix of its own, drawn like the embedding and after all other weights."""
    class Untied(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.lm_head.weight = nn.Parameter(torch.empty_like(self.transformer.wte.weight).normal_(0.0, 0.02))

    replace("GPT", Untied)


@named
def unscaled_residual(replace):
    """Projections into the residual stream begin with a standard deviation of 0.02, like the other weights."""
    class Unscaled(GPT):
        @torch.no_grad()
        def init_weights(self):
            super().init_weights()
            for block in self.transformer.h:
                for projection in (block.attn.c_proj, block.mlp.c_proj):
                    projection.weight *= math.sqrt(2 * self.config.n_layer)

    replace("GPT", Unscaled)


@named
def no_positions(replace):
    """Positions are not embedded: their matrix is zero, and is not trained."""
    class WithoutPositions(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.transformer.wpe.weight.requires_grad_(False).zero_()

    replace("GPT", WithoutPositions)


@named
def exact_gelu(replace):
    """The GELU is the exact one, with the error function."""
    class Exact(MLP):
        def forward(self, x):
            return self.c_proj(F.gelu(self.c_fc(x)))  # (B, T, 4C) in between

    replace("MLP", Exact)


@named
def no_biases(replace):
    """Linear layers and LayerNorms have no bias: it is zero, and is not trained."""
    class WithoutBiases(GPT):
        def __init__(self, config):
            super().__init__(config)
            for name, weight in self.named_parameters():
                if name.endswith(".bias"):
                    weight.requires_grad_(False)

    replace("GPT", WithoutBiases)


@named
def post_norm(replace):
    """Each sum of the residual stream is normalized, as in the first Transformer and in GPT-1."""
    class PostNorm(Block):
        def forward(self, x, cache=None):
            x = self.ln_1(x + self.attn(x, cache))
            return self.ln_2(x + self.mlp(x))

    replace("Block", PostNorm)


@named
def constant(replace):
    """The learning rate stays at its peak after the warmup."""
    replace("get_lr", lambda step, config: config.max_lr * min(1.0, (step + 1) / max(1, config.warmup_steps)))


@named
def decay_on_all(replace):
    """Weight decay is for biases and LayerNorms too."""
    original = train_gpt2.configure_optimizers

    def configure_optimizers(model, config, device):
        optimizers = original(model, config, device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["weight_decay"] = config.weight_decay
        return optimizers

    replace("configure_optimizers", configure_optimizers)
