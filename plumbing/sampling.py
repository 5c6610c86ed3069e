"""Text from a model, a token at a time, with the keys and values of what it has read kept.

    stream_tokens(model, idx, max_new_tokens, ...)    yields the new tokens as they come
    generate(model, idx, max_new_tokens, ...)         all of them behind idx
    sample_text(model, prompt, autocast, device)      the sample of the training log
    KeyValueCache                                     what a block keeps; made by model.make_cache()

`model` is a train_gpt2.GPT. Shapes: B batch, T time, C channels, nh heads, hs head size, V vocabulary.
"""
import torch
import torch.nn.functional as F

from plumbing.cli import UserError
from plumbing.tokenizer import EOT, VOCAB_SIZE, gpt2_encoding


class KeyValueCache:
    """Keys and values of the positions a block has read, in a buffer that doubles when it is full."""

    def __init__(self, buffer=None, length: int = 0):
        self.buffer, self.length = buffer, length  # (2, B, nh, room, hs), the first `length` of the room in use

    def append(self, k, v):
        """k and v of new positions, (B, nh, T, hs) -> those of all so far, (2, B, nh, length, hs)."""
        past, self.length = self.length, self.length + k.size(2)
        if past == 0 or self.length > self.buffer.size(3):
            full, self.buffer = self.buffer, k.new_empty(2, *k.shape[:2], past + self.length, k.size(3))
            if past:
                self.buffer[..., :past, :] = full[..., :past, :]
        self.buffer[0, :, :, past:self.length], self.buffer[1, :, :, past:self.length] = k, v
        return self.buffer[:, :, :, :self.length]  # (2, B, nh, length, hs)

    def rows(self, index) -> "KeyValueCache":
        """A cache of its own for the rows `index` (R,) of the batch; a row may come more than once."""
        return KeyValueCache(self.buffer[:, index, :, :self.length], self.length)  # (2, R, nh, length, hs)


@torch.no_grad()
def stream_tokens(model, idx, max_new_tokens: int, temperature=1.0, top_k: int | None = 50, generator=None,
                  top_p: float = 1.0, num_samples: int = 1):
    """Yield the tokens that continue idx (B, T), a position at a time, each (B * num_samples, 1).

    They are drawn from the top_k likeliest (None: from all), and of these from the fewest that have the probability
    top_p together (Holtzman et al. 2020); temperature 0 takes the likeliest. Never an id >= 50,257. A prompt is read
    once for all its samples. Past block_size the window slides, and every token costs a pass over all of it. Raises
    UserError if the logits are not finite.
    """
    block_size, cache = model.config.block_size, model.make_cache()
    h = model.hidden_states(idx[:, -block_size:], cache)[:, -1]  # (B, C)
    owners = torch.arange(idx.size(0), device=idx.device).repeat_interleave(num_samples)  # (B * num_samples,)
    idx, h = idx[owners], h[owners]  # from here on there are B * num_samples rows
    cache = [layer.rows(owners) for layer in cache] if idx.size(1) < block_size else None
    for i in range(max_new_tokens):
        if i > 0:
            new = idx[:, -1:]  # (B, 1)
            if idx.size(1) > block_size:  # all positions have shifted: cached keys and values are stale
                new, cache = idx[:, -block_size:], model.make_cache()
            h = model.hidden_states(new, cache)[:, -1]  # (B, C)
        logits = model.lm_head(h)[:, :VOCAB_SIZE].float()  # (B, V)
        likeliest, ids = logits.topk(min(top_k or VOCAB_SIZE, logits.size(-1)))  # (B, top_k) each, in falling order
        if not likeliest[:, 0].isfinite().all():  # nan comes first; to draw from it would end the process on a GPU
            raise UserError("the logits are not finite: take --dtype float32, or an earlier checkpoint")
        if temperature < 1e-30:  # 0, or nothing to divide by
            next_id = ids[:, :1]  # (B, 1)
        else:
            p = F.softmax((likeliest - likeliest[:, :1]) / temperature, dim=-1)  # (B, top_k); no overflow near 0
            if top_p < 1:
                p[:, 1:].masked_fill_(p.cumsum(dim=-1)[:, :-1] >= top_p, 0.0)  # where likelier ones have top_p already
            next_id = ids.gather(1, torch.multinomial(p, 1, generator=generator))  # (B, 1)
        idx = torch.cat((idx, next_id), dim=1)
        yield next_id


def generate(model, idx, max_new_tokens: int, temperature=1.0, top_k: int | None = 50, generator=None,
             top_p: float = 1.0, num_samples: int = 1):
    """Continue idx (B, T) as stream_tokens() does -> (B * num_samples, T + max_new_tokens)."""
    new = stream_tokens(model, idx, max_new_tokens, temperature, top_k, generator, top_p, num_samples)
    return torch.cat((idx.repeat_interleave(num_samples, dim=0), *new), dim=1)


def sample_text(model, prompt: str, autocast, device) -> str:
    """Sample 32 tokens after the prompt with a fixed seed; return a note if there can be none."""
    try:
        encoding = gpt2_encoding()
    except (ImportError, OSError) as error:
        return f"(no sample: {error})"
    if model.config.vocab_size < VOCAB_SIZE:
        return f"(no sample: the model has only {model.config.vocab_size} of GPT-2's tokens)"
    idx = torch.tensor([encoding.encode(prompt, allowed_special="all") or [EOT]], device=device)  # (1, T)
    try:
        with autocast:
            ids = generate(model, idx, 32, generator=torch.Generator(device).manual_seed(42))  # (1, T + 32)
    except UserError as error:
        return f"(no sample: {error})"
    return encoding.decode(ids[0].tolist())
