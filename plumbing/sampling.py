"""Text from a model, one token at a time, keeping the keys and values of what it has read.

    stream_tokens(model, idx, max_new_tokens, choose, ...)   yields the new tokens as they come
    generate(model, idx, max_new_tokens, ...)                returns them all, behind idx
    choose_token(logits, ...)                                draws from the top_k, top_p
    sample_text(model, prompt, world)                        returns the sample of the training log
    read(model, idx, cache)                                  runs the model on positions that follow those in a cache

`model` is a train_gpt2.GPT. Shapes: B batch, T time, C channels, nh heads, hs head size, V vocabulary.
"""
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from plumbing.cli import UserError
from plumbing.model_tokenizer import Gpt2Tokenizer
from plumbing.progress import busy, track
from plumbing.tokenizer import EOT, VOCAB_SIZE, gpt2_encoding

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KeyValueCache:
    """Keys and values of the positions that one block has read, in a buffer that doubles when it is full."""

    def __init__(self, buffer=None, length: int = 0):
        self.buffer, self.length = buffer, length  # (2, B, nh, room, hs), of which `length` positions are in use

    def append(self, k, v):
        """Add k and v of T new positions, (B, nh, T, hs) each.

        Returns k and v of all positions so far, (B, nh, length, hs) each, and what attention needs: a mask
        (T, length), or None, and whether it is causal without one.
        """
        T, past = k.size(2), self.length
        self.length += T
        if past == 0 or self.length > self.buffer.size(3):
            full, self.buffer = self.buffer, k.new_empty(2, *k.shape[:2], past + self.length, k.size(3))
            if past:
                self.buffer[..., :past, :] = full[..., :past, :]
        self.buffer[0, :, :, past:self.length], self.buffer[1, :, :, past:self.length] = k, v
        mask = None
        if past and T > 1:  # a single new position sees everything and needs no mask
            mask = torch.ones(T, self.length, dtype=torch.bool, device=k.device).tril(past)  # (T, length)
        k, v = self.buffer[:, :, :, :self.length]  # (B, nh, length, hs) each
        return k, v, mask, past == 0

    def rows(self, index) -> "KeyValueCache":
        """Copy the rows `index` (R,) of the batch into a new cache; a row may be named more than once."""
        return KeyValueCache(self.buffer[:, index, :, :self.length], self.length)  # (2, R, nh, length, hs)


def new_cache(model) -> list[KeyValueCache]:
    """Make an empty cache, with one entry per block of the model."""
    return [KeyValueCache() for _ in range(model.config.n_layer)]


def read(model, idx, cache):
    """Run the blocks on idx (B, T), whose positions follow those in `cache`, and add them to it -> (B, T, C).

    cuDNN's attention is left out: each pass has a new shape, for which it would first spend 25 ms or more on a plan.
    """
    with sdpa_kernel(WITHOUT_CUDNN):
        return model.hidden_states(idx, cache)


@torch.no_grad()
def stream_tokens(model, idx, max_new_tokens: int, choose, num_samples: int = 1, vocab_size: int = VOCAB_SIZE):
    """Yield the tokens that continue idx (B, T), one position at a time, each (B * num_samples, 1).

    choose(logits (B, V)) returns the next tokens (B, 1); see choose_token(). No id >= `vocab_size` is ever among them.
    A prompt is read once for all its samples. Past block_size the window slides, and every token costs a pass over all
    of it. Raises UserError if the logits are not finite.
    """
    block_size, cache = model.config.block_size, new_cache(model)
    with busy("reading the prompt"):
        h = read(model, idx[:, -block_size:], cache)[:, -1]  # (B, C)
    owners = torch.arange(idx.size(0), device=idx.device).repeat_interleave(num_samples)  # (B * num_samples,)
    idx, h = idx[owners], h[owners]  # from here on there are B * num_samples rows
    cache = [layer.rows(owners) for layer in cache] if idx.size(1) < block_size else None
    for i in range(max_new_tokens):
        if i > 0:
            new = idx[:, -1:]  # (B, 1)
            if idx.size(1) > block_size:  # all positions have shifted: cached keys and values are stale
                new, cache = idx[:, -block_size:], new_cache(model)
            h = read(model, new, cache)[:, -1]  # (B, C)
        next_id = choose(model.lm_head(h)[:, :vocab_size].float())  # (B, V) -> (B, 1)
        idx = torch.cat((idx, next_id), dim=1)
        yield next_id


def choose_token(logits, temperature: float = 1.0, top_k: int | None = 50, top_p: float = 1.0, generator=None):
    """Draw the next token of each row, logits (B, V) -> (B, 1).

    It is drawn from the top_k most likely (None: from all), and of these from the fewest that have the probability
    top_p together (Holtzman et al. 2020); temperature 0 takes the most likely. Raises UserError if the logits are not
    finite.
    """
    likeliest, ids = logits.topk(min(top_k or VOCAB_SIZE, logits.size(-1)))  # (B, top_k) each, in falling order
    if not likeliest[:, 0].isfinite().all():  # nan comes first; to draw from it would end the process on a GPU
        raise UserError("the logits are not finite: use --dtype float32, or an earlier checkpoint")
    if temperature < 1e-30:  # 0, or nothing to divide by
        return ids[:, :1]  # (B, 1)
    p = F.softmax((likeliest - likeliest[:, :1]) / temperature, dim=-1)  # (B, top_k); no overflow near 0
    if top_p < 1:
        p[:, 1:].masked_fill_(p.cumsum(dim=-1)[:, :-1] >= top_p, 0.0)  # the more likely ones have top_p already
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))  # (B, 1)


def generate(model, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = 50, generator=None,
             top_p: float = 1.0):
    """Continue idx (B, T) as stream_tokens() does -> (B, T + max_new_tokens)."""
    choose = functools.partial(choose_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return torch.cat((idx, *stream_tokens(model, idx, max_new_tokens, choose)), dim=1)


def sample_text(model, prompt: str, world) -> str:
    """Sample 32 tokens after the prompt with a fixed seed; return a note if that is impossible."""
    try:
        encoding = gpt2_encoding()
    except (ImportError, OSError) as error:
        return f"(no sample: {error})"
    if model.config.vocab_size < VOCAB_SIZE:
        return f"(no sample: the model has only {model.config.vocab_size} of GPT-2's tokens)"
    idx = torch.tensor([Gpt2Tokenizer().encode(prompt) or [EOT]], device=world.device)  # (1, T)
    try:
        with world.autocast:
            generator = torch.Generator(world.device).manual_seed(42)
            choose = functools.partial(choose_token, generator=generator)
            for next_id in track(stream_tokens(model, idx, 32, choose), "sample", "tokens"):
                idx = torch.cat((idx, next_id), dim=1)  # (1, T + 1 ... T + 32)
                world.check_stop()
    except UserError as error:
        return f"(no sample: {error})"
    return encoding.decode(idx[0].tolist())
