"""GPT-2 (124M) from scratch, aiming at OpenAI's own 3.29 nats on FineWeb-Edu in 19,073 steps of 524,288 tokens.

    python fineweb.py                                         # the data: 10 billion tokens into edu_fineweb10B/
    python train_gpt2.py                                      # one GPU; without the data, a demo for two CPU cores
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # eight GPUs, the same experiment
    python train_gpt2.py --help                               # every number below is a flag

The same command again resumes. In reading order:

    1 configuration          5 batch size
    2 model                  6 evaluation
    3 data                   7 checkpoints
    4 optimizer, schedule    8 training

Shapes: B batch, T time, C channels, nh heads, hs head size (C = nh * hs), V vocabulary.
"""
import contextlib
import copy
import dataclasses
import functools
import math
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

import hellaswag
from plumbing import checkpoint, machine, runlog, shards
from plumbing.cli import Stopped, UserError, parse_flags, print0, run_command, stop_signal
from plumbing.ranks import from_rank0, min_over_ranks, processes
from plumbing.sampling import KeyValueCache, sample_text
from plumbing.tokenizer import VOCAB_SIZE

# ---------------------------------------------------------------------------------------------------------------------
# 1. Configuration. One dataclass holds every number of the experiment; a field is a flag, its comment the flag's help.
# ---------------------------------------------------------------------------------------------------------------------

PADDED_VOCAB_SIZE = 50304  # what fresh models get: a multiple of 128 makes the largest matrix product faster

MODELS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "demo": dict(n_layer=3, n_head=2, n_embd=64),  # 3M
}


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class TrainConfig:
    """One training run. The defaults reproduce GPT-2 124M; UserError for a value out of its range."""
    data: str = "edu_fineweb10B"  # folder of token shards, or a text file (with the demo's defaults for all the rest)
    model: str = "gpt2"  # shape of a fresh model: gpt2, gpt2-medium, gpt2-large, gpt2-xl or demo
    n_layer: int = 0  # blocks (0: the model's)
    n_head: int = 0  # attention heads a block (0: the model's)
    n_embd: int = 0  # channels (0: the model's)
    init_from: str = ""  # first weights: OpenAI's gpt2 ... gpt2-xl, a transformers folder, a checkpoint (empty: fresh)
    out_dir: str = "log"  # folder for log.jsonl and checkpoints; a run found there is resumed
    seed: int = 1337  # of the first weights and the order of the data
    total_batch_size: int = 524288  # tokens an optimizer step, all ranks together
    micro_batch_size: int = 0  # windows a forward pass, per rank (0: as many as fit)
    sequence_length: int = 1024  # tokens a window
    max_steps: int = 19073  # optimizer steps (0: only evaluate)
    warmup_steps: int = 715  # steps of linear warm-up
    max_lr: float = 6e-4  # learning rate after the warm-up
    min_lr: float = 6e-5  # learning rate at the end
    decay: str = "cosine"  # how the learning rate falls from one to the other: cosine, or linear
    weight_decay: float = 0.1  # on tensors of two or more dimensions
    grad_clip: float = 1.0  # largest gradient norm (0: no clipping)
    recipe: str = "gpt2"  # gpt2: the paper's; fast: Muon and the rest of FAST, under the flags (Python: **FAST)
    optimizer: str = "adamw"  # adamw, or muon: Muon on the blocks' matrices and AdamW on the rest
    shuffle: bool = True  # a new order of the windows each epoch, instead of file order
    val_every: int = 250  # steps between validations (0: only before the first step and after the last)
    val_tokens: int = 10485760  # tokens a validation, at most
    hellaswag_every: int = 250  # steps between HellaSwag evaluations, and one after the last step (0: never)
    hellaswag_limit: int = 0  # examples of it, from the start of the file (0: all)
    hellaswag_data: str = ""  # file of its examples, .jsonl or .jsonl.gz (empty: the validation split, downloaded)
    sample_every: int = 250  # steps between samples (0: never)
    sample_prompt: str = "Hello, I'm a language model,"  # what the samples continue
    checkpoint_every: int = 1000  # steps between checkpoints (0: only after the last step)
    keep_checkpoints: int = 2  # newest checkpoints that stay on disk
    logger: str = ""  # tensorboard, wandb or trackio: where the numbers of log.jsonl go as well
    compile: bool | None = None  # torch.compile (default: where a compiler is found and the run is long enough)
    activation_checkpointing: bool = False  # keep a block's input alone and compute it again in backward: less memory
    deterministic: bool = False  # bit-identical reruns on CUDA too, slower
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # precision of matrix products: float32, or autocast to bfloat16 or float16 (auto: by hardware)

    def __post_init__(self):
        def require(true: bool, name: str, what: str) -> None:
            if not true:
                raise UserError(f"--{name} is {getattr(self, name)!r}, it must be {what}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):  # nan is refused too
                least = int(field.name in ("total_batch_size", "sequence_length", "val_tokens", "keep_checkpoints"))
                require(isinstance(value, (int, field.type)) and least <= value < 2**32, field.name,
                        f"a number from {least} to 2**32 - 1")
            elif field.type is str:
                require(value != "" or field.default == "" or "prompt" in field.name, field.name, "a name or a path")
                setattr(self, field.name, str(value))  # a Path becomes what a checkpoint can hold
        require(self.model in MODELS, "model", "one of " + ", ".join(MODELS))
        require(self.optimizer in ("adamw", "muon"), "optimizer", "adamw or muon")
        require(self.recipe in RECIPES, "recipe", "one of " + ", ".join(RECIPES))
        require(self.decay in ("cosine", "linear"), "decay", "cosine or linear")
        require(self.dtype in DTYPES, "dtype", "auto, float32, bfloat16 or float16")
        require(self.logger in ("", "tensorboard", "wandb", "trackio"), "logger", "tensorboard, wandb or trackio")
        require(self.hellaswag_every or not (self.hellaswag_data or self.hellaswag_limit), "hellaswag_every",
                "more than 0, for example 60, with --hellaswag_data or --hellaswag_limit")
        require(self.min_lr <= self.max_lr, "min_lr", f"at most max_lr, {self.max_lr}")


# --recipe: the paper's optimizer settings, or those that need fewer tokens to the same loss. With 4 layers of 256
# channels the best learning rate is six times AdamW's (bench/recipes.py); so it is here, untried at 124M.
FAST = dict(recipe="fast", optimizer="muon", max_lr=3.6e-3, min_lr=0.0, decay="linear", warmup_steps=250)
RECIPES = {"gpt2": {name: getattr(TrainConfig, name) for name in FAST}, "fast": FAST}

# What changes where the data is a text file: sized for two CPU cores, slow ones and without bf16 too. Validation losses
# on input.txt: AdamW, 96 channels, T=128, 512 tokens a step, 330 steps 5.24; Muon, 240 steps in about that time 4.89;
# with T=64 and 1,024 tokens, 130 steps 4.83; with 64 channels and lr 3e-2, 150 steps in half the time 4.84, 180 4.74.
DEMO = dict(
    data="input.txt", model="demo", out_dir="log/demo", total_batch_size=1024, sequence_length=64, max_steps=180,
    recipe="fast", optimizer="muon", warmup_steps=20, max_lr=3e-2, min_lr=0.0, weight_decay=0.0, val_every=60,
    hellaswag_every=0, sample_every=60, sample_prompt="The old woman", checkpoint_every=60, compile=False,
    dtype="float32",
)


def parse_args(argv: list[str]) -> TrainConfig:
    """Flags -> TrainConfig; a text file as data lays DEMO under the flags. UserError for a wrong flag or value."""
    flags = parse_flags(TrainConfig, argv, "Train GPT-2; the same command again resumes. Without --data and "
                               f"without {TrainConfig.data}/ it runs a demo of less than three minutes on input.txt.")
    if "data" not in flags and not Path(TrainConfig.data).exists():
        built_in = (Path("input.txt"), Path(__file__).with_name("input.txt"))
        flags["data"] = next((str(path) for path in built_in if path.exists()), TrainConfig.data)
    settings = RECIPES.get(flags.get("recipe"), {})
    if Path(flags.get("data", TrainConfig.data)).is_file():
        other = settings if flags.get("recipe") != DEMO["recipe"] else {}
        settings = {**DEMO, **other, "warmup_steps": DEMO["warmup_steps"]}
    return TrainConfig(**{**settings, **flags})


# ---------------------------------------------------------------------------------------------------------------------
# 2. Model. GPT-2 as released: pre-norm, learned positions, tanh GELU, biases, one matrix for embedding and output.
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """Shape of a model; the defaults are GPT-2 124M."""
    block_size: int = 1024  # positions
    vocab_size: int = 50257  # rows of the embedding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self):
        if min(asdict(self).values()) < 1 or self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, and all sizes positive")

    def count_parameters(self) -> int:
        """Number of weights: embeddings, final LayerNorm, and 12 C^2 + 13 C a block."""
        C = self.n_embd
        return (self.vocab_size + self.block_size + 2) * C + self.n_layer * (12 * C + 13) * C


WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x, cache=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 x (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # 3 x (B, nh, T, hs)
        past, mask = cache.length if cache else 0, None
        if cache:
            k, v = cache.append(k, v)  # (B, nh, past + T, hs) each
        if past and T > 1:  # one new position alone sees all
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)  # (T, past + T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past == 0)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers around a GELU, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # by way of (B, T, 4C)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added to the residual stream, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). State-dict keys are those of the released checkpoints, matrices in Linear layout."""

    def __init__(self, config: GPTConfig):
        if 4 * config.count_parameters() + 2**15 * config.n_layer > machine.memory_bytes():  # modules take some too
            raise UserError(f"{config.count_parameters():,} parameters are more than this machine's memory holds: take "
                            "a smaller model")
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.activation_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every weight from PyTorch's global generator.

        | weights                        | drawn                                                              |
        |--------------------------------|--------------------------------------------------------------------|
        | LayerNorm                      | ones                                                               |
        | biases                         | zeros                                                              |
        | c_proj (ends a residual path)  | normal, std 0.02 / sqrt(2 * n_layer): two paths a block are summed |
        | all others, embeddings too     | normal, std 0.02                                                   |
        """
        for name, weight in self.named_parameters():
            if name.endswith(".bias"):
                weight.zero_()
            elif ".ln_" in name:
                weight.fill_(1.0)
            else:
                residual = name.endswith(".c_proj.weight")
                weight.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> (logits (B, T, V), loss); loss is the mean cross-entropy in nats, None without `targets`.

        In training mode with targets the logits are None, to free their memory. `cache` as for hidden_states().
        """
        logits = self.lm_head(self.hidden_states(idx, cache))  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))
        return None if self.training else logits, loss

    def hidden_states(self, idx, cache=None):
        """What lm_head turns into logits: idx (B, T) -> (B, T, C).

        `cache`, from make_cache(), holds the keys and values of the positions before idx; this call adds its own.
        """
        past = cache[0].length if cache else 0
        T = idx.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} positions, but the model has {self.config.block_size}")
        positions = torch.arange(past, past + T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        # With a cache each pass has a new shape, for which cuDNN's attention would first spend 25 ms or more on a plan.
        with sdpa_kernel(WITHOUT_CUDNN) if cache else contextlib.nullcontext():
            for i, block in enumerate(self.transformer.h):
                if self.activation_checkpointing and torch.is_grad_enabled():
                    x = recompute(block, x, use_reentrant=False)  # (B, T, C)
                else:
                    x = block(x, cache[i] if cache else None)  # (B, T, C)
        return self.transformer.ln_f(x)

    def make_cache(self) -> list[KeyValueCache]:
        """An empty key/value cache for `forward`, an entry a block."""
        return [KeyValueCache() for _ in self.transformer.h]

    def count_parameters(self) -> int:
        """Number of weights, the shared embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Operations a training token costs: 6N + 12*L*C*T, N without positions (Chowdhery et al. 2022, app. B)."""
        N = self.count_parameters() - self.transformer.wpe.weight.numel()
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * T

    @classmethod
    def from_pretrained(cls, name_or_folder) -> "GPT":
        """OpenAI's model of that name, or the one in a transformers folder; OSError or UserError if it is no GPT-2."""
        return model_with(*checkpoint.read_transformers(name_or_folder), name_or_folder)


def model_with(shape: dict, weights: dict, source) -> GPT:
    """The model of that shape with those weights; UserError, naming `source`, where they do not fit together."""
    try:
        config = GPTConfig(**shape)
        for key, rows in (("wte", config.vocab_size), ("wpe", config.block_size)):  # before building what may be absurd
            if tuple(getattr(weights.get(f"transformer.{key}.weight"), "shape", ())) != (rows, config.n_embd):
                raise TypeError(f"transformer.{key}.weight is not of shape {(rows, config.n_embd)}")
        if len(weights) != 12 * config.n_layer + 5:
            raise TypeError(f"there are {len(weights)} tensors, {config.n_layer} layers have {12 * config.n_layer + 5}")
        model = GPT(config)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"the weights in {source} are not those of its configuration: {error!s:.300}") from error
    return model


def load_model(source, device="cpu") -> GPT:
    """A run folder (its newest whole checkpoint), a .pt file, a transformers folder or an OpenAI name -> GPT."""
    state = load_state(source)
    model = model_with(state["model_config"], state["model"], source) if state else GPT.from_pretrained(source)
    return model.to(device)


def load_state(source) -> dict | None:
    """The checkpoint that `source` is, or the newest whole one in that run folder; None for any other source."""
    path = Path(source)
    if path.suffix != ".pt" and (not path.is_dir() or (path / "config.json").exists()):
        return None
    state = checkpoint.load(path) if path.suffix == ".pt" else checkpoint.newest(path, print0)[1]
    if state is None:
        inside = next((f": did you mean {folder}?" for folder in path.iterdir() if checkpoint.listing(folder)), "")
        raise UserError(f"{source} holds neither a whole checkpoint nor a transformers model{inside}")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# 3. Data. Shards of uint16 tokens, memory-mapped; window w of T tokens predicts the T tokens one further on.
# ---------------------------------------------------------------------------------------------------------------------

class DataLoaderLite:
    """Batches of windows in an order that depends on the seed and the epoch alone, not on B or on the number of ranks.

    A shard of n tokens holds (n-1)//T windows, numbered through the shards in file-name order. `position`, the same on
    every rank, counts the windows consumed so far: it is all there is to save.
    """

    def __init__(self, data, split, B, T, rank=0, world_size=1, seed=1337, shuffle=True, vocab_size=VOCAB_SIZE):
        self.B, self.T, self.rank, self.world_size, self.vocab_size = B, T, rank, world_size, vocab_size
        self.seed, self.shuffle = seed, shuffle
        self.names, self.shards = zip(*shards.open_tokens(data, split, shuffle))
        self.ends = np.cumsum([max(0, len(shard) - 1) // T for shard in self.shards])  # windows up to each shard's end
        self.n_windows = int(self.ends[-1])
        if self.n_windows == 0:
            raise UserError(f"the {split} split of {str(data)!r} is shorter than one window of {T} + 1 tokens: "
                            "take more data or a smaller --sequence_length")
        for name, shard in zip(self.names, self.shards):
            for start in (0, len(shard) // 2, max(0, len(shard) - 1024)):  # a sample: reading all would take minutes
                self._check(shard[start:start + 1024], name)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)  # a batch can straddle two epochs
        self.seconds = 0.0
        self.reset()

    def _check(self, tokens, name) -> None:
        if tokens.size and tokens.max() >= self.vocab_size:
            raise UserError(f"shard {name} holds the token {tokens.max()}, the vocabulary ends at "
                            f"{self.vocab_size - 1}: prepare it again with the GPT-2 encoding")

    def _permutation(self, epoch: int) -> np.ndarray:
        """The windows in the order of `epoch`, from the one generator whose streams NumPy has frozen for good."""
        return np.random.RandomState([self.seed, epoch]).permutation(self.n_windows)

    def _find(self, index: int) -> tuple[int, int]:
        """Where the `index`-th window since the start of training lies: (shard, first token)."""
        epoch, window = divmod(index, self.n_windows)
        if self.shuffle:
            window = self._order(epoch)[window]
        shard = int(np.searchsorted(self.ends, window, side="right"))
        return shard, int(window - (self.ends[shard - 1] if shard else 0)) * self.T

    def _window(self, index: int) -> np.ndarray:
        """The T+1 tokens of the `index`-th window since the start of training."""
        shard, start = self._find(index)
        tokens = self.shards[shard][start:start + self.T + 1]
        self._check(tokens, self.names[shard])
        return tokens

    def next_batch(self):
        """(x, y), uint16 tensors of shape (B, T) on the CPU: windows position + rank*B and the B-1 after it."""
        began = time.perf_counter()
        first = self.position + self.rank * self.B
        windows = np.stack([self._window(first + i) for i in range(self.B)])  # (B, T+1)
        self.position += self.world_size * self.B
        x, y = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])  # (B, T) each
        self.seconds += time.perf_counter() - began
        return torch.from_numpy(x), torch.from_numpy(y)

    def announce(self, batches: int) -> None:
        """Tell the system that this rank's next `batches` will be read soon, so that it fetches them meanwhile."""
        for batch in range(batches):
            first = self.position + (batch * self.world_size + self.rank) * self.B
            for index in range(first, first + self.B):
                shard, start = self._find(index)
                shards.announce(self.shards[shard], start, start + self.T + 1)

    def take_seconds(self) -> float:
        """Seconds spent in next_batch() since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def reset(self) -> None:
        """Start again at the first window."""
        self.position = 0

    def state_dict(self) -> dict:
        return {"position": self.position, "n_windows": self.n_windows}

    def load_state_dict(self, state: dict) -> None:
        """Go on at a position; UserError where it was counted on other data."""
        before = state.get("n_windows", self.n_windows)
        if before != self.n_windows:
            raise UserError(f"the data have {self.n_windows} windows to train on, they had {before} when the run "
                            "began: restore them, or choose another --out_dir for a new run")
        self.position = state["position"]


def to_device(batch, device):
    """(x, y) uint16 on the CPU -> int64 on the device. CUDA copies while it computes and widens there."""
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True).long() for t in batch)
    return tuple(t.long().to(device) for t in batch)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Optimizer and schedule. AdamW with decay on matrices, or Muon on the blocks'; linear warm-up, then down.
# ---------------------------------------------------------------------------------------------------------------------

class OptimizerPair:
    """Two optimizers, each with parameters of its own, behind the interface of one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state):
        for optimizer, part in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)


def configure_optimizer(model: GPT, config: TrainConfig, device: torch.device):
    """AdamW (0.9, 0.95) on everything, or Muon on the 2-D weights of the blocks and AdamW on the rest.

    Decay falls on tensors of two or more dimensions only. Muon's updates are scaled to the size of AdamW's
    (Liu et al. 2025), so that one learning rate serves both.
    """
    muon = {name: p for name, p in model.named_parameters()
            if config.optimizer == "muon" and ".h." in name and p.dim() == 2}
    rest = [p for name, p in model.named_parameters() if name not in muon]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.max_lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
    if not muon:
        return adamw
    return OptimizerPair(adamw, torch.optim.Muon(muon.values(), lr=config.max_lr, weight_decay=config.weight_decay,
                                                 momentum=0.95, adjust_lr_fn="match_rms_adamw"))


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate of the step after `step` finished ones: linear warm-up, then a cosine or a line to min_lr."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if step >= config.max_steps:
        return config.min_lr
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    left = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + left * (config.max_lr - config.min_lr)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Batch size. B is what fits into the memory; gradient accumulation makes up the rest, so B never decides the result.
# ---------------------------------------------------------------------------------------------------------------------

def pick_micro_batch_size(model: GPT, config: TrainConfig, device, autocast, world_size: int) -> int:
    """B: the largest divisor of a rank's windows per step that fits, the same on every rank.

    CUDA: from the peak memory of the plain model at B=1 and B=2, with room for AdamW's two moments and, with several
    ranks, DDP's buckets (4 bytes per parameter each). Elsewhere: at most 2,048 tokens, as more gain nothing on a CPU.
    """
    T, fits = config.sequence_length, max(1, 2048 // config.sequence_length)
    if device.type == "cuda":
        def run(B: int) -> None:
            idx = torch.zeros(B, T, dtype=torch.int64, device=device)  # (B, T)
            batch_loss(model, idx, idx, autocast).backward()

        copies = 3 if world_size > 1 else 2
        fits = machine.count_fitting_windows(run, device, 4 * copies * model.count_parameters())
        model.zero_grad(set_to_none=True)
    fits = min_over_ranks(fits, device, world_size)
    if fits < 1:
        raise UserError(f"not one window of {T} tokens fits on {device}: take --activation_checkpointing, or a smaller "
                        "--model or --sequence_length")
    windows = count_micro_steps(config, world_size)  # of this rank; B is still open
    return next(B for B in range(min(fits, windows), 0, -1) if windows % B == 0)


def count_micro_steps(config: TrainConfig, world_size: int) -> int:
    """Micro-steps an optimizer step (at B=1 while B is open); UserError names the nearest sizes where none is whole."""
    unit = max(1, config.micro_batch_size) * config.sequence_length * world_size
    if config.total_batch_size % unit:
        below = config.total_batch_size // unit * unit
        raise UserError(f"--total_batch_size {config.total_batch_size} is not a multiple of micro_batch_size x "
                        f"sequence_length x ranks = {unit}: make it {f'{below} or ' if below else ''}{below + unit}"
                        f"{', or change --micro_batch_size' if config.micro_batch_size else ''}")
    return config.total_batch_size // unit


# ---------------------------------------------------------------------------------------------------------------------
# 6. Evaluation. Validation reads the same tokens at any B and number of ranks. Samples come from sampling.py.
# ---------------------------------------------------------------------------------------------------------------------

def batch_loss(model, x, y, autocast):
    """Mean cross-entropy of one batch in nats, x and y (B, T) -> ()."""
    with autocast:
        return model(x, y)[1]


@torch.no_grad()
def evaluate_val_loss(model, loader: DataLoaderLite, val_tokens: int, autocast, device,
                      stop: threading.Event | None = None) -> float:
    """Mean loss in nats over the first min(val_tokens, all) tokens of the split, in whole windows and at least one.

    Stopped, on every rank, where one was told to stop before the end.
    """
    loader.reset()
    n_windows = max(1, min(val_tokens // loader.T, loader.n_windows))
    losses = [torch.zeros((), device=device)]
    for first in range(loader.rank * loader.B, n_windows, loader.world_size * loader.B):
        if stop and stop.is_set():
            break
        x, y = to_device(loader.next_batch(), device)
        counted = min(loader.B, n_windows - first)
        y[counted:] = -100  # cross_entropy leaves these out: the last batch keeps its shape and nothing counts twice
        losses.append(counted * batch_loss(model, x, y, autocast))  # no dropout: training mode only drops the logits
    total = torch.stack(losses).double().sum() if device.type != "mps" else torch.stack(losses).sum()
    return read_on_host([total], stop, loader.world_size)[0] / n_windows


def load_hellaswag(config: TrainConfig, model: GPT, rank: int, world_size: int) -> list[dict]:
    """HellaSwag's examples, the same on every rank; none, with a line that says why, where they cannot be had."""
    if model.config.vocab_size < VOCAB_SIZE:
        print0(f"warning: no HellaSwag: the model has only {model.config.vocab_size} of GPT-2's tokens")
        return []
    try:
        return hellaswag.load_examples(path=config.hellaswag_data, limit=config.hellaswag_limit, rank=rank,
                                       world_size=world_size)
    except UserError as error:
        if config.hellaswag_data:  # a file that was named must be there
            raise
        print0(f"warning: no HellaSwag: {error}")
        return []


def evaluate_hellaswag(model: GPT, examples: list[dict], autocast, device, rank: int, world_size: int,
                       stop: threading.Event) -> dict:
    """hellaswag.evaluate() in the precision of training; every rank scores its part. Stopped as for validation."""
    with autocast:
        return hellaswag.evaluate(model, examples, device, rank=rank, world_size=world_size, stop=stop)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Checkpoints. A run found in out_dir goes on exactly where it stopped; how files are kept whole is in checkpoint.py.
# ---------------------------------------------------------------------------------------------------------------------

# what may differ when a run is resumed (out_dir: the folder may have moved); anything else is another experiment
FREE_TO_CHANGE = {"micro_batch_size", "device", "compile", "activation_checkpointing", "keep_checkpoints", "val_every",
                  "hellaswag_every", "hellaswag_limit", "hellaswag_data", "sample_every", "checkpoint_every", "logger",
                  "out_dir"}


def find_checkpoint(config: TrainConfig, rank: int, world_size: int) -> dict | None:
    """The newest whole state in out_dir: rank 0 chooses the file, every rank reads it."""
    state = None

    def choose() -> str | None:
        nonlocal state
        path, state = checkpoint.newest(config.out_dir, print0)
        if path is None and checkpoint.listing(config.out_dir):
            raise UserError(f"no checkpoint in {config.out_dir} is whole: move them away, or change --out_dir")
        return str(path) if path else None

    path = from_rank0(choose, rank, world_size)
    return state if rank == 0 or not path else checkpoint.load(path)


def adopt_choices(config: TrainConfig, stored: dict, device: torch.device, world_size: int) -> bool | None:
    """Check that `config` continues the run of `stored`. Take over its dtype and, on the same kind of device and number
    of ranks, its B. Returns whether that run was compiled, None if device or ranks differ.
    """
    def on_all_ranks(true: bool) -> bool:
        return bool(min_over_ranks(int(true), device, world_size))

    if config.dtype == "auto":
        config.dtype = stored.get("dtype", "auto")
        if config.dtype not in DTYPES:
            raise UserError(f"the checkpoint in {config.out_dir} has the unknown dtype {config.dtype!r}: move it away")
        if config.dtype != "auto" and not on_all_ranks(machine.is_native(getattr(torch, config.dtype), device)):
            raise UserError(f"the run in {config.out_dir} is trained in {config.dtype}, which {device} cannot multiply "
                            f"natively: go on where it can, add --dtype {config.dtype} to go on here, far slower, or "
                            f"begin a new run from its weights: --init_from {config.out_dir} and another --out_dir")
    for name, value in asdict(config).items():
        if name not in FREE_TO_CHANGE and stored.get(name, value) != value:
            raise UserError(f"the run in {config.out_dir} has --{name} {stored[name]}, not {value}: go on with that, "
                            "or choose another --out_dir for a new run")
    same_kind = on_all_ranks(stored.get("device_kind", "cpu") == machine.device_kind(device))
    if not same_kind or stored.get("world_size") != world_size:
        return None
    if not config.micro_batch_size and stored.get("activation_checkpointing", False) == config.activation_checkpointing:
        config.micro_batch_size = stored["micro_batch_size"]
    return stored["compile"]


def build_model(config: TrainConfig, state: dict | None) -> GPT:
    """The model a run starts from: the checkpoint's, else the one to import, else one with fresh weights."""
    if state:
        model = model_with(state["model_config"], state.pop("model"), config.out_dir)
    elif config.init_from:
        model = load_model(config.init_from)
    else:
        shape = {name: getattr(config, name) or value for name, value in MODELS[config.model].items()}
        model = GPT(GPTConfig(block_size=config.sequence_length, vocab_size=PADDED_VOCAB_SIZE, **shape))
    if config.sequence_length > model.config.block_size:
        raise UserError(f"--sequence_length {config.sequence_length} is more than the model's "
                        f"{model.config.block_size} positions: take that or less")
    return model


def load_optimizer(optimizer, moments: dict, device: torch.device) -> None:
    """Load the optimizer's state. On a CPU it is copied, since the checkpoint's tensors are pages of its file."""
    optimizer.load_state_dict(copy.deepcopy(moments) if device.type == "cpu" else moments)


def save_checkpoint(rank: int, train_config: dict, raw_model, optimizer, scaler, log0, step: int, val_loss: float,
                    last: bool, evaluated: bool = True, prune: bool = True) -> None:
    """Rank 0 writes the state after `step` steps, and whether what is due after them has been evaluated.

    Old checkpoints go if `prune`. A full disk, or a weight that is not finite, is a warning; on the `last` try it is an
    OSError on every rank.
    """
    def write() -> None:
        try:
            log0.sync()
            checkpoint.save(train_config["out_dir"], step, {
                "model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "train_config": train_config, "model_config": asdict(raw_model.config), "step": step,
                "val_loss": val_loss, "evaluated": evaluated,
                "position": step * (train_config["total_batch_size"] // train_config["sequence_length"])})
            if prune:
                checkpoint.prune(train_config["out_dir"], train_config["keep_checkpoints"], step)
        except OSError as error:
            print0(f"warning: {error}; the checkpoints before it stay")
            if last:
                raise

    if last:
        from_rank0(write, rank, train_config["world_size"])
    elif rank == 0:
        write()


# ---------------------------------------------------------------------------------------------------------------------
# 8. Training. main() holds what must be given back at the end; train() sets up and loops.
# ---------------------------------------------------------------------------------------------------------------------

def main(config: TrainConfig) -> float:
    """Train as `config` says, resuming what out_dir holds; returns the last validation loss in nats a token.

    max_steps 0 only evaluates. UserError or OSError for what the user can mend, FloatingPointError for a run that
    diverged: five steps in a row without a finite loss and gradient.
    """
    config = dataclasses.replace(config)  # choices made below are written into this copy
    try:
        with (processes(config.device, config.deterministic) as (rank, world_size, device),
              stop_signal(obey=config.max_steps > 0) as stop, contextlib.ExitStack() as held):
            if config.max_steps:
                from_rank0(lambda: held.enter_context(checkpoint.lock(config.out_dir)), rank, world_size)
            return train(config, rank, world_size, device, stop)
    except (RuntimeError, MemoryError) as error:
        if machine.is_out_of_memory(error):
            raise UserError(machine.memory_remedy(config.micro_batch_size, config.activation_checkpointing)) from error
        if machine.is_lost_connection(error):
            raise ConnectionError("the connection to another rank is lost, see what that one says; the same command "
                                  f"goes on from the last checkpoint ({error})") from error
        raise


def train(config: TrainConfig, rank: int, world_size: int, device: torch.device, stop: threading.Event) -> float:
    """One rank's part of the run, from what is on disk to the last step or the first signal; see main()."""
    # what to go on from
    state = find_checkpoint(config, rank, world_size) if config.max_steps or not config.init_from else None
    resuming = bool(state and config.max_steps)  # evaluation alone resumes nothing
    start_step, val_loss = (state["step"], state["val_loss"]) if resuming else (0, math.nan)
    seen = start_step if resuming and state.get("evaluated", True) else start_step - 1  # its evaluation is in the log
    was_compiled = adopt_choices(config, state["train_config"], device, world_size) if resuming else None
    torch.manual_seed(config.seed)
    raw_model = build_model(config, state).to(device)
    raw_model.activation_checkpointing = config.activation_checkpointing
    origin = f"step {state['step']:,}" if state else checkpoint.describe(config.init_from) or "fresh weights"

    # precision and batch
    dtype, why_dtype = machine.pick_dtype(config.dtype, device)
    dtype = machine.PRECISIONS[min_over_ranks(machine.PRECISIONS.index(dtype), device, world_size)]
    config.dtype = str(dtype).removeprefix("torch.")
    autocast = machine.autocast(dtype, device)
    if not config.micro_batch_size:
        config.micro_batch_size = pick_micro_batch_size(raw_model, config, device, autocast, world_size)
    grad_accum_steps = count_micro_steps(config, world_size)

    # data
    loader = functools.partial(
        DataLoaderLite, config.data, B=config.micro_batch_size, T=config.sequence_length, rank=rank,
        world_size=world_size, vocab_size=min(VOCAB_SIZE, raw_model.config.vocab_size))
    train_loader, val_loader = loader("train", seed=config.seed, shuffle=config.shuffle), loader("val", shuffle=False)
    wants_hellaswag = config.hellaswag_every > 0 and seen < config.max_steps
    examples = load_hellaswag(config, raw_model, rank, world_size) if wants_hellaswag else []

    # speed: raw_model is the plain module, model what is compiled and wrapped
    flops_per_step = raw_model.flops_per_token(config.sequence_length) * config.total_batch_size
    peak = machine.peak_flops(device, dtype) * world_size
    seconds = (config.max_steps - start_step) * flops_per_step / (0.4 * peak)  # a run at 40 % of the peak
    compile_it, why_compile = machine.pick_compile(config.compile, was_compiled, device, seconds)
    config.compile = bool(min_over_ranks(int(compile_it), device, world_size))
    model = machine.compiled(raw_model, dtype, config.deterministic) if config.compile else raw_model
    if world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = configure_optimizer(raw_model, config, device)
    # float16 only, in which small gradients would become 0; otherwise all calls of scaler below do nothing
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if resuming:
        load_optimizer(optimizer, state.pop("optimizer"), device)
        scaler.load_state_dict(state.get("scaler"))
        train_loader.load_state_dict({**state["train_config"], "position": state["position"]})
    del state
    scaler.scale(torch.zeros((), device=device))  # makes the scale, which a stop before the first loss would miss

    runlog.print_plan(config, raw_model, train_loader, val_loader, machine.describe_device(device), grad_accum_steps,
                      why_dtype, why_compile, origin, resuming)
    log0 = runlog.RunLog(config, rank, flops_per_step, peak)
    from_rank0(lambda: log0.open(start_step if resuming else -1, seen), rank, world_size)
    if seen < config.max_steps or not config.max_steps:  # a finished run only repeats its result
        log0.write("run", config=asdict(config), versions=machine.versions(), device=machine.describe_device(device),
                   origin=origin, ranks=world_size, command=runlog.command_line(), model=asdict(raw_model.config),
                   data=shards.describe(config.data, val_loader.shards, config.val_tokens))
    train_config = {**asdict(config), "world_size": world_size, "device_kind": machine.device_kind(device),
                    "n_windows": train_loader.n_windows}
    save = functools.partial(save_checkpoint, rank, train_config, raw_model, optimizer, scaler, log0)
    x, y = to_device(train_loader.next_batch(), device)  # (B, T) each
    stopping, finite = False, True
    try:
        for step in range(start_step, config.max_steps + 1):
            last_step = step == config.max_steps
            if step > seen and (step == 0 or due(step, config.val_every, last_step)):
                val_loss = evaluate_val_loss(model, val_loader, config.val_tokens, autocast, device, stop)
                log0.val(step, val_loss)
            if step > max(seen, 0) and examples and due(step, config.hellaswag_every, last_step):
                log0.hellaswag(step, evaluate_hellaswag(raw_model, examples, autocast, device, rank, world_size, stop))
            if step > seen and config.sample_every and due(step, config.sample_every, last_step):
                log0.sample(step, sample_text(raw_model, config.sample_prompt, autocast, device))
            if step > max(seen, 0) and due(step, config.checkpoint_every, last_step):
                save(step, val_loss, last=last_step, prune=finite)  # a run that diverges deletes no good checkpoint
            seen = max(seen, step)
            if last_step:
                break

            # the optimizer step
            t0 = time.perf_counter()
            loss_sum = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                if stop.is_set() and world_size == 1:
                    break  # what is left of this step would be dropped anyway
                sync = world_size == 1 or micro_step == grad_accum_steps - 1  # ranks add up their gradients once a step
                with contextlib.nullcontext() if sync else model.no_sync():
                    loss = batch_loss(model, x, y, autocast) / grad_accum_steps
                    scaler.scale(loss).backward()
                loss_sum += loss.detach()
                x, y = to_device(train_loader.next_batch(), device)  # read while the device still computes
            train_loader.announce(grad_accum_steps)  # the disk reads the next step's windows while this one computes
            scale = scaler.scale(torch.ones((), device=device))  # the scale itself
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
            totals = read_on_host([loss_sum, norm, scale], stop, world_size)
            loss, norm, scale = (total / world_size for total in totals)
            lr = get_lr(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:  # else this step changes no weight on any rank
                optimizer.step()
            scaler.update()  # halves the scale after an overflow, doubles it after 2,000 steps without one
            raw_model.zero_grad(set_to_none=True)

            # diagnostics only from here on
            log0.train(step + 1, loss, lr, norm, time.perf_counter() - t0, skipped=not finite,
                       data_seconds=train_loader.take_seconds(), scale=scale if scaler.is_enabled() else None)
    except Stopped:  # between micro-steps, or within an evaluation, which is then done again when the run is resumed
        stopping = True
        save(step, val_loss, last=True, evaluated=step <= seen, prune=finite)
    log0.end(step, val_loss, stopping)
    return val_loss


def due(step: int, every: int, last_step: bool) -> bool:
    """Whether something that happens every so many steps (0: never) and after the last happens at this one."""
    return last_step or (every > 0 and step % every == 0)


def read_on_host(values: list, stop: threading.Event | None, world_size: int) -> list[float]:
    """Scalars on the device, summed over the ranks -> numbers, in one transfer: a step's one wait for the device.

    Stopped, on every rank, where one of them was told to stop.
    """
    told = torch.full_like(values[0], bool(stop and stop.is_set()))
    values = torch.stack([value.to(told) for value in (*values, told)])
    if world_size > 1:
        dist.all_reduce(values)
    *values, told = values.tolist()
    if told:
        raise Stopped
    return values


if __name__ == "__main__":
    run_command(lambda: main(parse_args(sys.argv[1:])))
