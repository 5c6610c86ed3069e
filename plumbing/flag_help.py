"""How --help reads, and what is said of a flag or a value that is not right.

The tables hold what other projects call our flags, and what to do instead of flags that we do not have. A name counts
only for commands that have our flag; the first that fits wins.
"""
import argparse
import difflib
import inspect
import os
import re
import sys
import textwrap

OTHER_NAMES = {  # ours: theirs, as in nanoGPT, build-nanogpt, nanochat, llm.c, transformers, Lightning
    "max_lr": "lr learning_rate max_learning_rate peak_lr base_lr",
    "min_lr": "final_lr lr_min lr_end min_learning_rate",
    "sequence_length": "block_size context context_length context_size ctx_len n_ctx T t seq_len seq_length "
                       "max_seq_len max_seq_length max_length n_positions sequence_len",
    "micro_batch_size": "B b device_batch_size per_device_train_batch_size mbs micro_bs microbatch_size",
    "total_batch_size": "global_batch_size tokens_per_step batch_tokens",
    "max_steps": "steps iters iterations max_iters n_steps num_steps num_iterations num_iters train_steps total_steps "
                 "max_train_steps",
    "n_layer": "layers n_layers num_layers num_hidden_layers depth",
    "n_head": "heads n_heads num_heads num_attention_heads",
    "n_embd": "d_model dim embd emb_dim embed_dim hidden_size hidden_dim n_embed model_dim width",
    "optimizer": "optim opt",
    "warmup_steps": "warmup warmup_iters num_warmup_steps",
    "weight_decay": "wd",
    "grad_clip": "clip clip_grad clip_grad_norm gradient_clip gradient_clip_val gradient_clipping max_grad_norm",
    "eval_only": "eval evaluate only_eval do_eval",
    "val_every": "eval_every eval_interval eval_steps eval_freq val_interval val_loss_every",
    "val_tokens": "eval_iters eval_batches eval_tokens val_steps",
    "sample_prompt": "prompt start",
    "checkpoint_every": "save_every save_steps save_interval save_freq ckpt_every ckpt_interval checkpoint_interval",
    "keep_checkpoints": "save_total_limit keep_last max_checkpoints",
    "keep_best": "save_best load_best_model_at_end",
    "log_every": "log_interval log_steps log_freq logging_steps print_every",
    "logger": "trackio report_to tracker",
    "init_from": "from_pretrained pretrained model_name_or_path checkpoint ckpt weights load load_from finetune",
    "out_dir": "out output outdir output_dir log_dir logdir run_dir run_name save_dir name",
    "out": "out_dir output outdir output_dir output_path save_dir outfile o",
    "source": "dataset data data_dir data_path input text texts file files folder path remote_name",
    "data": "dataset data_dir data_path dataset_path text file input input_file train_file train_data corpus",
    "num_proc": "workers num_workers threads processes nproc jobs j",
    "shard_size": "tokens_per_shard",
    "text_column": "column field key text_field text_key",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing checkpoint_activations",
    "compile": "torch_compile use_compile",
    "dtype": "precision torch_dtype",
    "device": "accelerator mps",
    "model": "checkpoint ckpt ckpt_path model_name model_path model_name_or_path model_type init_from out_dir run",
    "prompt": "start text input p",
    "num_samples": "n n_samples samples num_return_sequences",
    "max_new_tokens": "max_tokens n_tokens num_tokens new_tokens max_length length tokens",
    "temperature": "temp",
    "limit": "examples max_examples max_samples n num_examples num_samples",
    "seed": "random_seed manual_seed",
}

INSTEAD = [  # (names, flags of which the command must have one, what to do)
    ("batch_size bs train_batch_size", "total_batch_size",
     "--total_batch_size is in tokens per optimizer step, --micro_batch_size in sequences per forward pass"),
    ("epochs epoch num_epochs n_epochs num_train_epochs max_epochs", "max_steps",
     "use --max_steps: steps x --total_batch_size tokens; the summary before step 0 gives the epochs"),
    ("resume resume_from resume_from_checkpoint resume_training continue auto_resume restart", "max_steps",
     "not needed: the same command resumes the run in --out_dir"),
    ("resume continue", "shard_size", "not needed: the same command continues"),
    ("gpus n_gpus ngpu num_gpus gpu_ids devices nproc nproc_per_node num_processes world_size ddp distributed",
     "max_steps style", "start it with torchrun --standalone --nproc_per_node=8 instead of python, for 8 GPUs"),
    ("gradient_accumulation_steps grad_accum_steps grad_accum accumulation_steps accumulate_grad_batches", "max_steps",
     "it follows from --total_batch_size and --micro_batch_size"),
    ("dropout attn_pdrop resid_pdrop embd_pdrop", "max_steps", "there is none; to add it, change GPT in train_gpt2.py"),
    ("bias", "max_steps", "the model always has biases, as GPT-2; to change it, see GPT in train_gpt2.py"),
    ("beta1 beta2 betas adam_beta1 adam_beta2 adam_epsilon eps", "max_steps",
     "it is set in configure_optimizers() in train_gpt2.py"),
    ("vocab_size tokenizer tokenizer_name encoding", "max_steps", "the tokens are GPT-2's, always"),
    ("num_workers workers", "max_steps", "not needed: the data are memory-mapped and read ahead"),
    ("lr_decay_iters lr_decay_steps", "max_steps", "the rate falls until the last step, --max_steps"),
    ("generate do_sample", "max_steps", "a command of its own: python generate.py"),
    ("wandb use_wandb wandb_log wandb_project", "logger", "use --logger wandb"),
    ("tensorboard", "logger", "use --logger tensorboard"),
    ("bf16 fp16 fp32 half amp float16 bfloat16 mixed_precision", "dtype", "use --dtype bfloat16, float16 or float32"),
    ("cpu", "device", "use --device cpu"),
    ("cuda gpu", "device", "use --device cuda, which is the default if there is a GPU"),
    ("lr_schedule lr_scheduler lr_scheduler_type scheduler schedule", "decay", "use --decay cosine or linear"),
    ("version v V", "", "this is a script, not a package: git log -1 shows its version"),
]


METAVARS = {  # what a value is, by the name of its field; the first that fits
    r"_every$|steps$": "STEPS", r"tokens$|^(total_batch|shard)_size$|^sequence_length$": "TOKENS",
    "^micro_batch_size$": "SEQUENCES", "_lr$": "RATE", "^(model|init_from)$": "MODEL", "prompt": "TEXT",
    "^device$": "DEVICE", "column": "NAME", "^(download|push_to_hub)$": "OWNER/NAME",
    "^(data|.*_data|out|out_dir|branch_from|source|folder|corpus)$": "PATH",
}


def metavar(name: str, kind) -> str:
    """Return what stands for the value of a flag in the help."""
    found = (word for pattern, word in METAVARS.items() if re.search(pattern, name))
    return next(found, {int: "N", float: "X"}.get(kind, "TEXT"))


def show(value) -> str:
    """Write a default as one would type it: 524_288, 6e-4, on, "two words"."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}" if value == 0 or value >= 0.01 else re.sub(r"\.?0*e-0*", "e-", f"{value:e}")
    return f'"{value}"' if " " in str(value) else str(value)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps help texts between words only: a-name/as-long-as-this stays whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def examples_of(module: str) -> list[str]:
    """Return the first indented lines of a module's docstring: commands, with comments behind them."""
    text = inspect.cleandoc(sys.modules[module].__doc__ or "")
    block = re.search(r"(?:^    .+\n?)+", text, re.MULTILINE)
    return block.group().splitlines() if block else []


def lay_out(examples: list[str], folder: str, width: int) -> str:
    """Lay out commands as they work if our scripts are in `folder`, the comments in a column or, if narrow, above."""
    pairs = [re.split(r"\s+# ", line.strip(), maxsplit=1) for line in examples]
    for pair in pairs:
        pair[0] = re.sub(r"(?<= )\w+\.py\b", lambda match: os.path.join(folder, match.group()), pair[0])
    column = max((len(pair[0]) for pair in pairs), default=0) + 3
    if any(column + len(pair[1]) > width - 4 for pair in pairs if len(pair) > 1):
        lines = [line for command, *comment in pairs for line in [*(f"# {text}" for text in comment), command]]
    else:
        lines = [f"{command:{column}}# {comment[0]}" if comment else command for command, *comment in pairs]
    shape = dict(width=width - 4, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    for i, line in enumerate(lines):
        if len(line) > width - 2:  # breaks between flags, not before a value
            whole = re.sub(r"(--\w+) (?!--)", "\\1\u00a0", line)
            lines[i] = " \\\n  ".join(textwrap.wrap(whole, **shape)).replace("\u00a0", " ")
    return "\n".join(["Examples:", *(f"  {line}" for line in lines)]) if lines else ""


def nearest(word: str, words, cutoff: float = 0.65) -> str:
    """Return the word that looks most like this one, or ""."""
    found = difflib.get_close_matches(word.lower(), list(words), 1, cutoff)
    return found[0] if found else ""


def hint_for_flag(flag: str, known: list[str]) -> str:
    """Say what to write instead of a flag that a command does not have, given those it has; "" if unknown."""
    word = flag.lstrip("-\u2013\u2014").replace("-", "_")
    for names, needed, text in INSTEAD:
        if word in names.split() and (not needed or {f"--{name}" for name in needed.split()} & set(known)):
            return text
    for name, names in OTHER_NAMES.items():
        if word in names.split() and f"--{name}" in known:
            return f"it is --{name} here"
    by_word = {flag.strip("-").replace("-", "_"): flag for flag in known}
    near = nearest(word, by_word)
    return f"did you mean {by_word[near]}?" if near else ""


def hint_for_word(word: str, argv: list[str], known: list[str]) -> str:
    """Say what may be meant by a word of the command line that belongs to no flag; "" if unknown."""
    place = argv.index(word) if word in argv else 0
    before, flag = argv[max(0, place - 1)], argv[max(0, place - 2)]
    name = word.partition("=")[0]
    if f"--{name}" in known:
        return f"did you mean --{word}{'' if '=' in word else ' ...'}?"
    if word.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0") and before in known:
        return f"{before} takes no value: write {before} or --no-{before.removeprefix('--no-').lstrip('-')}"
    if flag in known and place >= 2 and not before.startswith("-"):
        return f"{flag} takes one value, in quotes if it has spaces"
    main = "--prompt" if " " in word and "--prompt" in known else next(flag for flag in known if flag != "--preset")
    return f"did you mean {main} {word!r}?" if " " in word else f"did you mean {main} {word}?"


def hint_for_number(text: str, kind: type) -> str:
    """Say how to write a number that int() or float() does not read, such as 0.5M, 1e4, 2**19 or 524,288."""
    if kind is float:
        text = text.replace(",", ".").removesuffix(".")
    units = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
    factors = re.fullmatch(r"(\d+)(\*\*?)(\d{1,9})", text)
    amount = re.fullmatch(r"([\d.]+(?:e\d{1,2})?)([kmbg]?)", text.replace(",", "").replace("_", "").lower())
    try:
        if factors:
            a, b = int(factors[1]), int(factors[3])
            value = a * b if factors[2] == "*" else a ** min(b, 64)
        else:
            value = float(amount[1]) * units.get(amount[2], 1)
        return f"write {int(value) if kind is int or value == int(value) else value}"
    except (TypeError, ValueError):
        return "a whole number, such as 20000 or 20_000" if kind is int else "a number, such as 0.001 or 1e-3"
