"""GPT-2 (124M) from scratch, aiming at OpenAI's own 3.29 nats per token on FineWeb-Edu.

    python train_gpt2.py --data my.txt                        # your own text
    python fineweb.py                                         # the data: 10 billion tokens
    python train_gpt2.py                                      # one GPU; without data, a demo
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # eight GPUs, the same experiment

The same command again resumes; --help lists all settings. In reading order:

    1 configuration     3 data                      5 evaluation, training
    2 model             4 optimizer, schedule       6 the command, presets

Shapes: B batch, T time, C channels, nh heads, hs head size (C = nh * hs), V vocabulary.
`world` is this process among all ranks: rank, world_size, device, autocast, stop flag.
plumbing/ can be skipped: no model, no optimizer and no training logic is in there.
"""
if __name__ == "__main__":
    from plumbing.cli import end_quietly
    end_quietly()  # on Ctrl-C, while PyTorch is imported

import contextlib
import functools
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import hellaswag
from plumbing import checkpoint, cli, files, machine, models, progress, run_folder, shards
from plumbing.ranks import World, processes
from plumbing.runlog import RunLog, describe_start
from plumbing.sampling import sample_text
from plumbing.tokenizer import VOCAB_SIZE

# -----------------------------------------------------------------------------
# 1. Configuration. A field is a flag, its comment the flag's help text.
# -----------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run, by default GPT-2 124M. Raises UserError for a wrong value."""
    # Data
    data: str = "edu_fineweb10B"  # folder of token shards, or a text file
    sequence_length: cli.Positive = 1024  # tokens per sequence
    shuffle: bool = True  # new random order of the sequences in each epoch
    seed: int = 1337  # seed for the initial weights and the data order
    # Model
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"] = "gpt2"  # shape of a new model
    n_layer: int = 0  # blocks (0: from --model)
    n_head: int = 0  # attention heads per block (0: from --model)
    n_embd: int = 0  # channels (0: from --model)
    init_from: str = ""  # initial weights: gpt2 to gpt2-xl, a transformers folder, a checkpoint
    branch_from: str = ""  # checkpoint to continue in a new run, under another schedule
    # Optimization
    total_batch_size: cli.Positive = 524288  # tokens per optimizer step, over all GPUs
    max_steps: int = 19073  # optimizer steps (0: only evaluate)
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw for all, or muon for the blocks
    max_lr: float = 6e-4  # learning rate after the warmup
    min_lr: float = 6e-5  # learning rate at the end
    warmup_steps: int = 715  # steps of linear warmup
    decay: Literal["cosine", "linear"] = "cosine"  # shape of the decay to min_lr
    decay_steps: int = 0  # length of the final decay in steps (0: all after the warmup)
    weight_decay: float = 0.1  # weight decay of tensors with two or more dimensions
    grad_clip: float = 1.0  # largest gradient norm (0: no clipping)
    # Evaluation
    eval_only: bool = False  # evaluate the newest checkpoint, or --init_from
    val_every: int = 250  # steps between validations (0: first and last only)
    val_tokens: cli.Positive = 10485760  # tokens per validation, at most
    hellaswag_every: int = 250  # steps between HellaSwag evaluations (0: never)
    hellaswag_limit: int = 0  # HellaSwag examples, from the start of the file (0: all)
    hellaswag_data: str = ""  # HellaSwag file, .jsonl or .jsonl.gz (empty: downloaded)
    sample_every: int = 250  # steps between samples (0: never)
    sample_prompt: cli.Prompt = "Hello, I'm a language model,"  # text that the samples continue
    # Output
    out_dir: str = "log"  # folder of the run; one found there is resumed
    checkpoint_every: int = 1000  # steps between checkpoints (0: only after the last step)
    keep_checkpoints: cli.Positive = 2  # newest checkpoints to keep
    keep_best: bool = False  # also keep best.pt, of the lowest validation loss
    log_every: int = 0  # steps between printed lines (0: about one per second)
    logger: Literal["", "tensorboard", "wandb", "trackio"] = ""  # also gets the logged numbers
    # Machine
    micro_batch_size: int = 0  # sequences per forward pass on each GPU (0: as many as fit)
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: cli.Dtype = "auto"  # precision of matrix products (auto: by hardware)
    compile: bool | None = None  # torch.compile (default: if it pays)
    activation_checkpointing: bool = False  # recompute blocks: less memory, more time
    deterministic: bool = False  # bit-identical reruns on CUDA too, slower
    yes: bool = False  # start even if it takes a week or all memory

    def __post_init__(self):
        machine.check_settings(self)


MAY_CHANGE_ON_RESUME = {  # anything else would make it another experiment
    "out_dir", "micro_batch_size", "device", "compile", "activation_checkpointing",
    "deterministic", "keep_checkpoints", "keep_best", "checkpoint_every", "log_every", "logger",
    "val_every", "sample_every", "sample_prompt", "hellaswag_every", "hellaswag_limit",
    "hellaswag_data", "yes",
}
MAY_CHANGE_ON_BRANCH = MAY_CHANGE_ON_RESUME | {  # the schedule too
    "branch_from", "init_from", "max_steps", "max_lr", "min_lr", "warmup_steps", "decay",
    "decay_steps", "val_tokens",
}

# -----------------------------------------------------------------------------
# 2. Model. GPT-2 as released: pre-norm, learned positions, tanh GELU, biases,
# one matrix for embedding and output.
# -----------------------------------------------------------------------------

class CausalSelfAttention(nn.Module):
    """Attention of each position to itself and those before it, (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x, cache=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 x (B, T, C)
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(heads).transpose(1, 2) for t in (q, k, v))  # 3 x (B, nh, T, hs)
        mask, is_causal = None, True
        if cache is not None:  # generating: the past comes from the cache
            k, v, mask, is_causal = cache.append(k, v)  # k, v: (B, nh, past + T, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers around a GELU, (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, 4C) in between


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream, (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


@dataclass
class GPTConfig:
    """Shape of a model; the defaults are GPT-2 124M."""
    block_size: int = 1024  # positions
    vocab_size: int = 50257  # rows of the embedding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


PADDED_VOCAB_SIZE = 50304  # of new models: a multiple of 128 is faster
MODELS = {
    "gpt2": {},  # 124M parameters: the defaults of GPTConfig
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "demo": dict(n_layer=3, n_head=2, n_embd=64),  # 3M
}


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). State-dict keys are the released ones; matrices are nn.Linear's."""

    def __init__(self, config: GPTConfig):
        machine.check_shape(config)
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one matrix for both
        self.activation_checkpointing = False
        self.init_weights()

    @progress.busy("initializing the weights")
    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weights, with PyTorch's global generator."""
        for name, weight in self.named_parameters():
            if name.endswith(".bias"):
                weight.zero_()
            elif ".ln_" in name:
                weight.fill_(1.0)
            elif name.endswith(".c_proj.weight"):  # adds to the residual stream, 2 per block
                weight.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                weight.normal_(0.0, 0.02)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> logits (B, T, V); with targets (B, T) -> mean loss in nats, ()."""
        logits = self.lm_head(self.hidden_states(idx, cache))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))

    def hidden_states(self, idx, cache=None):
        """idx (B, T) -> (B, T, C). `cache`, one per block, holds the positions before idx."""
        past = cache[0].length if cache else 0
        T = idx.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} positions, but the model has {self.config.block_size}")
        positions = torch.arange(past, past + T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = recompute(block, x, use_reentrant=False)  # (B, T, C)
            else:
                x = block(x, cache[i] if cache else None)  # (B, T, C)
        return self.transformer.ln_f(x)

    def count_parameters(self) -> int:
        """Count the weights, the shared embedding once."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def load(cls, source) -> "GPT":
        """Load a run, .pt file, transformers folder or OpenAI name; raises OSError or UserError."""
        shape, weights = models.read_model(source)
        with models.checked_against(shape, weights, source):
            model = cls(GPTConfig(**shape))
            model.load_state_dict(weights)
        return model

    from_pretrained = load  # the usual name


# -----------------------------------------------------------------------------
# 3. Data. Shards of uint16 tokens, memory-mapped, cut into windows of T tokens.
# -----------------------------------------------------------------------------

class DataLoaderLite:
    """Micro-batches of windows, in an order that depends on neither B nor the number of ranks.

    A shard of n tokens holds (n - 1) // T windows, numbered in file-name order; an epoch visits each
    once. There is no state: batch(i) depends on i alone, so that resuming needs no bookkeeping.
    """

    def __init__(self, config: TrainConfig, split: str, world: World, vocab_size: int = VOCAB_SIZE):
        self.B, self.T, self.seed = config.micro_batch_size, config.sequence_length, config.seed
        self.world, self.vocab_size = world, min(vocab_size, VOCAB_SIZE)
        self.shuffle = config.shuffle and split == "train"
        self.names, self.shards = zip(*shards.open_tokens(config.data, split, config.out_dir, world))
        counts = [max(0, len(shard) - 1) // self.T for shard in self.shards]  # windows per shard
        self.ends = np.cumsum(counts)
        self.n_windows = sum(counts)
        shards.require_windows(self.n_windows, config, split)
        self.hashes = shards.check_samples(self, config.val_tokens + 1)
        self.permutation = functools.lru_cache(maxsize=2)(self.permutation)  # of two epochs

    def batch(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return micro-batch i of this rank: x and y, (B, T) int64 each, on its device."""
        windows = []
        for shard, start in self.locate(i):
            windows.append(self.shards[shard][start:start + self.T + 1])
            shards.check_tokens(windows[-1], self.names[shard], self.vocab_size)
        tokens = torch.from_numpy(np.stack(windows))  # (B, T + 1) uint16
        if self.world.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.world.device, non_blocking=True)  # overlaps
        x, y = tokens[:, :-1].long(), tokens[:, 1:].long()  # (B, T) each
        return x.to(self.world.device), y.to(self.world.device)

    def locate(self, i: int):
        """Yield the shard and the first token of each window of micro-batch i."""
        first = (i * self.world.world_size + self.world.rank) * self.B  # its first window
        for index in range(first, first + self.B):
            epoch, window = divmod(index, self.n_windows)
            if self.shuffle:
                window = self.permutation(epoch)[window]
            shard = int(np.searchsorted(self.ends, window, side="right"))
            windows_before = self.ends[shard - 1] if shard else 0
            yield shard, int(window - windows_before) * self.T

    def permutation(self, epoch: int) -> np.ndarray:
        """Shuffle the windows. RandomState's stream is the same in all versions of NumPy."""
        return np.random.RandomState([self.seed, epoch]).permutation(self.n_windows)


# -----------------------------------------------------------------------------
# 4. Optimizer and schedule
# -----------------------------------------------------------------------------

def configure_optimizers(model: GPT, config: TrainConfig, device: torch.device) -> list:
    """Make AdamW for all weights, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay is for matrices alone; the betas are GPT-3's. Muon's updates get the size of AdamW's
    (Liu et al. 2025): one rate serves both. `eager` leaves the import of torch.compile out.
    """
    by_muon = {}
    if config.optimizer == "muon":
        by_muon = {name: p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    rest = [p for name, p in model.named_parameters() if name not in by_muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cuda", "cpu")
    optimizers = [machine.eager(torch.optim.AdamW)(groups, lr=config.max_lr, betas=(0.9, 0.95), fused=fused)]
    if by_muon:
        optimizers.append(machine.eager(torch.optim.Muon)(
            by_muon.values(), lr=config.max_lr, weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw"))
    return optimizers


def get_lr(step: int, config: TrainConfig) -> float:
    """Return the learning rate for step `step`, counting from 0: warmup, stable phase, decay."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    start = config.max_steps - config.decay_steps if config.decay_steps else config.warmup_steps
    if step < start:
        return config.max_lr
    done = min(1.0, (step - start) / max(1, config.max_steps - start))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.decay == "cosine" else 1 - done
    return config.min_lr + left * (config.max_lr - config.min_lr)


# -----------------------------------------------------------------------------
# 5. Evaluation and training. A run in out_dir continues exactly where it stopped.
# -----------------------------------------------------------------------------

@torch.no_grad()
def evaluate_val_loss(model, loader: DataLoaderLite, val_tokens: int, world: World) -> float:
    """Return the mean loss in nats over the first val_tokens. Raises Stopped after a signal."""
    n_windows = max(1, min(val_tokens // loader.T, loader.n_windows))
    losses = [torch.zeros((), device=world.device)]
    # first window of each batch of this rank
    firsts = range(world.rank * loader.B, n_windows, world.world_size * loader.B)
    for i, first in enumerate(progress.track(firsts, "validation", "batches")):
        if world.stop.is_set():
            break
        x, y = loader.batch(i)
        counted = min(loader.B, n_windows - first)
        y[counted:] = -100  # ignored by cross_entropy: the last batch keeps its shape
        with world.autocast:
            losses.append(counted * model(x, y))
    return world.sum_on_host([torch.stack(losses).to(world.double).sum()])[0] / n_windows


def build_model(config: TrainConfig, state: dict | None) -> GPT:
    """Load the model of a checkpoint or of --init_from, or build a new one."""
    torch.manual_seed(config.seed)
    if state or config.init_from:
        model = GPT.load(state or models.with_gpt2_tokens(config.init_from))
    else:
        sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
        shape = MODELS[config.model] | {name: size for name, size in sizes.items() if size}
        model = GPT(GPTConfig(config.sequence_length, PADDED_VOCAB_SIZE, **shape))
    model.activation_checkpointing = config.activation_checkpointing
    return model


def parallelize(raw_model: GPT, config: TrainConfig, world: World) -> nn.Module:
    """Compile the model, if configured, and have several ranks average their gradients."""
    model = raw_model
    if config.compile:
        model = machine.compiled(model, getattr(torch, config.dtype), config.deterministic)
    if world.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


class Run:
    """One rank's part of a training run."""

    def __init__(self, config: TrainConfig, world: World, folder: files.Lock | None):
        state, resuming = run_folder.to_continue(
            config, world, MAY_CHANGE_ON_RESUME, MAY_CHANGE_ON_BRANCH)
        self.raw_model = build_model(config, state).to(world.device)  # the plain module
        self.start = describe_start(config, PRESETS, world, self.raw_model, state, resuming)
        config, world, reasons = machine.resolve(config, state, self.raw_model, world)
        self.config, self.world = config, world  # nothing is "auto" now
        vocab_size = self.raw_model.config.vocab_size
        self.train_loader = DataLoaderLite(config, "train", world, vocab_size)
        self.val_loader = DataLoaderLite(config, "val", world, vocab_size)
        self.optimizers = configure_optimizers(self.raw_model, config, world.device)
        self.scaler = machine.make_scaler(config.dtype, world.device)  # a no-op except in float16
        self.step, self.evaluated = 0, -1  # steps done, and the last step that was evaluated
        self.val_loss, self.best_val_loss = math.nan, math.inf
        self.finite, self.is_whole = True, True  # is_whole: not amid an update
        if state:
            shards.check_same(state, self.train_loader, self.val_loader)
            checkpoint.restore(state, self.optimizers, self.scaler, world.device)
            self.step, self.val_loss = state["step"], state["val_loss"]
            self.best_val_loss = state["best_val_loss"] if resuming else math.inf
            self.evaluated = self.step if resuming and state["evaluated"] else self.step - 1
        self.log = RunLog(config, self.raw_model, world, folder)
        self.log.print_summary(self.train_loader, self.val_loader, self.start | reasons)
        self.hellaswag_examples = []
        if self.evaluated < config.max_steps:  # otherwise the run is finished
            self.hellaswag_examples = hellaswag.examples_for_training(config, self.raw_model, world)
        self.model = parallelize(self.raw_model, config, world)  # compiled and wrapped
        self.log.start(self.val_loader, self.start, self.evaluated)

    def is_due(self, every: int) -> bool:
        """Return True at every multiple of `every`, and after the last step."""
        return self.step == self.config.max_steps or (every > 0 and self.step % every == 0)

    def evaluate(self) -> None:
        """Save a checkpoint and run the evaluations, whichever are due at this step."""
        config, step = self.config, self.step
        if step > 0 and self.is_due(config.checkpoint_every):
            self.save()  # first, so that a kill during the evaluations costs nothing
        if step == 0 or self.is_due(config.val_every):
            self.val_loss = evaluate_val_loss(self.model, self.val_loader, config.val_tokens, self.world)
            self.log.val(step, self.val_loss)
            is_best = step > 0 and self.val_loss < self.best_val_loss
            if config.keep_best and is_best and self.save(name=checkpoint.BEST):
                self.best_val_loss = self.val_loss
        if self.hellaswag_examples and step > 0 and self.is_due(config.hellaswag_every):
            result = hellaswag.evaluate(self.raw_model, self.hellaswag_examples, self.world)
            self.log.hellaswag(step, result)
        if config.sample_every and self.is_due(config.sample_every):
            self.log.sample(step, sample_text(self.raw_model, config.sample_prompt, self.world))
        self.evaluated = step
        if step == config.max_steps:
            self.save(required=True)  # again, now that it is evaluated

    def save(self, required: bool = False, name: str = "") -> bool:
        """Write a checkpoint; unless it is `required`, a failure is a warning, and False."""
        state = {
            "model": self.raw_model.state_dict(),  # weights
            "model_config": asdict(self.raw_model.config),  # its shape
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],  # moments
            "scaler": self.scaler.state_dict(),  # empty unless in float16
            "train_config": asdict(self.config),  # compared when the run is resumed
            "machine": machine.identity(self.world),  # for which B and compile were chosen
            "data": shards.fingerprint(self.train_loader, self.val_loader),  # hashes
            "step": self.step,  # steps done: gives the position in the data
            "val_loss": self.val_loss,  # the last one
            "best_val_loss": self.best_val_loss,
            "origin_sha256": self.start["origin_sha256"],  # of --init_from's weights
            "evaluated": self.evaluated == self.step,  # if not, resuming begins with it
        }
        return run_folder.write(self, state, required, name)

    def train(self) -> float:
        """Train to the last step; return its validation loss. Raises Stopped after a signal."""
        config, world, model, scaler = self.config, self.world, self.model, self.scaler
        # gradients of micro-batches add up: B affects memory, not the result
        tokens_at_once = config.micro_batch_size * config.sequence_length * world.world_size
        grad_accum_steps = config.total_batch_size // tokens_at_once
        param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        x, y = self.train_loader.batch(self.step * grad_accum_steps)  # (B, T) each
        # the last iteration only evaluates: n updates give n + 1 models
        for step in range(self.step, config.max_steps + 1):
            if step > self.evaluated:
                self.evaluate()
            if step == config.max_steps:
                break

            t0, data_seconds = time.perf_counter(), 0.0
            loss_sum = torch.zeros((), device=world.device)
            for micro_step in progress.track(range(grad_accum_steps), f"step {step + 1}", "micro-steps"):
                if world.stop.is_set() and world.world_size == 1:
                    break  # sum_on_host() raises Stopped before this step changes anything
                # gradients add up locally, so the ranks average them only once, at the end
                sync = world.world_size == 1 or micro_step == grad_accum_steps - 1
                with contextlib.nullcontext() if sync else model.no_sync():
                    with world.autocast:
                        # a mean over B sequences; the sum of them is the mean over the step
                        loss = model(x, y) / grad_accum_steps
                    scaler.scale(loss).backward()
                loss_sum += loss.detach()
                t1 = time.perf_counter()
                i = step * grad_accum_steps + micro_step
                x, y = self.train_loader.batch(i + 1)  # read while the device still computes
                data_seconds += time.perf_counter() - t1
            shards.read_ahead(self.train_loader, (step + 1) * grad_accum_steps + 1, grad_accum_steps)
            scale = scaler.scale(torch.ones((), device=world.device))  # without a wait
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(self.raw_model.parameters(), config.grad_clip or math.inf)
            # the one wait for the device per step; raises Stopped on all ranks if one must stop
            sums = world.sum_on_host([loss_sum, norm, scale])
            loss, norm, scale = (total / world.world_size for total in sums)
            self.finite = math.isfinite(loss) and math.isfinite(norm)
            lr = get_lr(step, config)
            for group in param_groups:
                group["lr"] = lr
            self.is_whole = False
            if self.finite:  # otherwise this step changes no weight on any rank
                for optimizer in self.optimizers:
                    optimizer.step()
            scaler.update()  # halves it after an overflow, doubles it after 2,000 good steps
            self.raw_model.zero_grad(set_to_none=True)
            self.step, self.is_whole = step + 1, True

            # everything that follows is diagnostics; five bad steps in a row end the run
            self.log.train(self.step, loss, lr, norm, time.perf_counter() - t0, data_seconds, scale)
        self.log.end(self.step, self.val_loss, stopped=False)
        return self.val_loss


def evaluate_only(config: TrainConfig, world: World) -> float:
    """Return the validation loss of the run in out_dir, or of --init_from."""
    state = run_folder.to_evaluate(config, world)
    step = state["step"] if state else 0
    raw_model = build_model(config, state).to(world.device)
    start = describe_start(config, PRESETS, world, raw_model, state)
    config, world, reasons = machine.resolve(config, None, raw_model, world)
    loader = DataLoaderLite(config, "val", world, raw_model.config.vocab_size)
    log = RunLog(config, raw_model, world)
    log.print_summary(None, loader, start | reasons)
    log.start(loader, start)
    model = parallelize(raw_model, config, world)
    val_loss = evaluate_val_loss(model, loader, config.val_tokens, world)
    log.val(step, val_loss)
    if config.sample_every:
        log.sample(step, sample_text(raw_model, config.sample_prompt, world))
    log.end(step, val_loss, stopped=False)
    return val_loss


# -----------------------------------------------------------------------------
# 6. The command and its presets
# -----------------------------------------------------------------------------

# Defaults that the flags override; from Python: TrainConfig(**PRESETS["fast"])
PRESETS = {
    "gpt2": {},
    # fewer tokens to the same loss (docs/speed.md), untried at 124M
    "fast": dict(optimizer="muon", max_lr=3.6e-3, min_lr=0.0, decay="linear", warmup_steps=250),
    # for a text file, on two CPU cores
    "demo": dict(
        data="input.txt", model="demo", out_dir="log/demo", total_batch_size=1024, sequence_length=64,
        max_steps=180, optimizer="muon", warmup_steps=20, max_lr=3e-2, min_lr=0.0, weight_decay=0.0,
        val_every=60, hellaswag_every=0, sample_every=60, sample_prompt="The old woman",
        val_tokens=65536, checkpoint_every=60, compile=False, dtype="float32"),
}


def defaults_for(flags: dict) -> dict:
    """Return what these flags override: a preset, demo for a text file, otherwise gpt2."""
    preset, data = flags.get("preset"), flags.get("data", TrainConfig.data)
    no_shards = preset is None and not shards.has_shards(TrainConfig.data)
    if "data" not in flags and (preset == "demo" or no_shards):
        here = Path("input.txt")
        data = str(here if here.exists() else Path(__file__).with_name("input.txt"))
    preset = preset or ("demo" if Path(data).is_file() else "gpt2")
    defaults = PRESETS[preset] | {"data": data, "preset": preset}
    if Path(data).name not in (TrainConfig.data, "input.txt"):  # data of your own
        defaults["out_dir"] = f"log/{Path(data).resolve().stem}"
    return defaults


def parse_args(argv: list[str]) -> TrainConfig:
    """Read the flags, and put the defaults under them."""
    about = "Train GPT-2 on token shards or a text. The same command again resumes."
    return TrainConfig(**cli.parse_flags(TrainConfig, argv, about, (), PRESETS, defaults_for))


def main(config: TrainConfig) -> float:
    """Train, resuming what out_dir holds; return the last validation loss in nats per token.

    Raises UserError or OSError for what the user can fix, FloatingPointError if the run diverges,
    and Stopped (a KeyboardInterrupt) after a signal; what has been done is saved then.
    """
    trains = config.max_steps > 0 and not config.eval_only
    with (machine.explained_errors(config), cli.stop_signal(obey=trains) as stop,
          processes(config.device, config.deterministic, stop) as world):
        if not trains:
            return evaluate_only(config, world)
        with run_folder.hold(config.out_dir, world) as folder:
            run = Run(config, world, folder)
            with machine.explained_errors(run.config), run_folder.saved_on_errors(run):
                return run.train()


if __name__ == "__main__":
    cli.run_command(lambda: main(parse_args(sys.argv[1:])))
