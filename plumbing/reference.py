"""Whether a model is GPT-2 124M: its shape, and what its code computes.

    is_gpt2(model)          both of the following, for the log of a run
    has_gpt2_shape(model)   GPTConfig's defaults, with 50,257 or 50,304 rows of vocabulary, and the published size
    computes_gpt2(model)    a narrow copy with fixed weights gives the logits and the loss of transformers' GPT-2

A copy is compared because a run's own weights have nothing to be compared with. It has all layers, heads and positions
of the default, so that a change in some layers only, or a window shorter than the context, is noticed too.
"""
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from plumbing import published, sampling
from plumbing.tokenizer import VOCAB_SIZE

VOCAB_SIZES = (VOCAB_SIZE, 50304)  # as published, and padded
NARROW = {"vocab_size": 64, "n_embd": 48}  # of the copy; everything else is as the configuration has it by default
SCALES = {  # standard deviations of the fixed weights; 0.5 for the others
    "wte.weight": 0.02, "wpe.weight": 0.02, "c_proj.weight": 0.003, "c_proj.bias": 0.01,
    "ln_f.weight": 20.0, "ln_f.bias": 5.0,
}
POSITIONS = (0, 1, 2, 5, 14, 37, 98, 200, 300, 511, 777, 1023)
TOKENS = (0, 17, 40, 63)
TOLERANCE = 1e-4  # of the standard deviation of the logits
LOGITS = (  # of transformers' GPT2LMHeadModel, at POSITIONS (rows) for TOKENS (columns)
    (2.935108, 0.991202, -4.003181, 6.683464), (3.315514, 1.031595, -2.617078, 7.102142),
    (3.065444, 0.516242, -4.613150, 4.331000), (2.468306, 0.521658, -5.153701, 3.230573),
    (3.772339, 1.393729, -4.639267, 2.806810), (2.542179, 2.134069, -3.359397, 6.161171),
    (2.872024, 0.759658, -3.942213, 4.857818), (2.129095, 0.299633, -3.146525, 5.440224),
    (3.070969, 1.175665, -4.665906, 5.543924), (1.419496, 1.759126, -3.688530, 5.992169),
    (4.189263, 1.354013, -6.292182, 4.340827), (2.802230, 2.359557, -3.574648, 4.352477),
)
LOSS = 7.474760  # its mean over all positions, in nats


def is_gpt2(model) -> bool:
    """Return whether a train_gpt2.GPT is GPT-2 124M."""
    return has_gpt2_shape(model) and computes_gpt2(model)


def has_gpt2_shape(model) -> bool:
    """Return whether the model has the shape of GPT-2 124M, with or without rows that pad the vocabulary."""
    config, rows = model.config, model.config.vocab_size
    try:
        same_fields = config == type(config)(vocab_size=rows)
    except TypeError:  # a configuration that has no defaults
        return False
    # GPT-2's own number of parameters, in case somebody has edited the defaults
    same_size = model.count_parameters() - (rows - VOCAB_SIZE) * config.n_embd == published.PARAMETERS
    return rows in VOCAB_SIZES and same_fields and same_size


def fixed_weight(name: str, shape) -> torch.Tensor:
    """Draw the weight of that name, the same in every version of NumPy.

    The residual stream is small, so that the epsilon of the LayerNorms matters. Everything else is large, biases and
    LayerNorms included, so that no part can be missing unnoticed.
    """
    std = SCALES.get(".".join(name.split(".")[-2:]), 0.5)
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(std * draws).float()


def fixed_tokens(count: int) -> torch.Tensor:
    """Draw the tokens that the copy reads, (1, count) int64."""
    return torch.from_numpy(np.random.RandomState(1337).randint(0, NARROW["vocab_size"], (1, count))).long()


def computes_gpt2(model) -> bool:
    """Return whether a narrow copy, made with the model's own classes, gives the reference's logits and loss.

    Takes a second or two, on the CPU. PyTorch's random state and precision stay as they are.
    """
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            copy = type(model)(type(model.config)(**NARROW))
            for name, weight in copy.named_parameters():
                weight.data.copy_(fixed_weight(name, weight.shape))
            return all(matches(logits, loss) for logits, loss in outputs(copy))
    except Exception:  # a class of another kind can fail in any way
        return False
    finally:
        torch.set_float32_matmul_precision(precision)


def outputs(model):
    """Yield (logits (1, T, V), loss ()) of the model in each of the ways in which it is run here.

    These are training, training with activation checkpointing, evaluation, and reading in parts with a key/value cache.
    """
    tokens = fixed_tokens(POSITIONS[-1] + 2)  # (1, T + 1)
    idx, targets = tokens[:, :-1], tokens[:, 1:]  # (1, T) each
    yield model.train()(idx), model(idx, targets)
    model.activation_checkpointing = True
    yield model(idx), model(idx, targets)
    model.activation_checkpointing = False
    with torch.no_grad():
        yield model.eval()(idx), model(idx, targets)
        cache = sampling.new_cache(model)
        parts = [sampling.read(model, part, cache) for part in idx.split((600, 423, 1), dim=1)]  # (1, ..., C) each
        logits = model.lm_head(torch.cat(parts, dim=1))
        yield logits, F.cross_entropy(logits[0], targets[0])


def matches(logits, loss) -> bool:
    """Return whether logits (1, T, V) and their loss are the reference's."""
    expected = torch.tensor(LOGITS)
    difference = (logits[0, POSITIONS][:, TOKENS] - expected).abs().max()
    return bool(difference <= TOLERANCE * expected.std() and abs(loss - LOSS) <= TOLERANCE)  # False for nan
