"""What --model and --init_from name: a run folder, a checkpoint, a transformers folder, or OpenAI's weights.

    or_newest(config, how)  a command's settings with the newest run below log/ as the model, if none is named
    find(source)            the checkpoint that a name on the command line means, or None
    read_model(source)      (shape, weights) of any model
    checked_against(...)    a context in which weights that do not fit their shape are refused
"""
import contextlib
import dataclasses
import os
import re
import sys
from pathlib import Path

from plumbing import checkpoint, foreign, newest, published
from plumbing.cli import UserError
from plumbing.files import CheckpointError
from plumbing.model_tokenizer import require_gpt2_tokens
from plumbing.progress import busy
from plumbing.transformers_format import read_transformers


def or_newest(config, how: str = "--model gpt2"):
    """Return a command's settings; without a model they get the newest run below log/, which is said on stderr.

    Runs without a whole checkpoint are passed over. Raises UserError if there is no other, naming `how` as what to
    type instead.
    """
    if config.model:
        return config
    runs = newest.newest_first()
    for folder in runs:
        if path := newest_readable(folder):
            if os.environ.get("RANK", "0") == "0":
                print(f"using {folder}, step {checkpoint.step_of(path):,}", file=sys.stderr, flush=True)
            return dataclasses.replace(config, model=str(folder))
    begun = runs or newest.newest_first("log.jsonl")
    there = f" ({begun[0]} has none that is whole)" if begun else ""
    raise UserError(f"no run below {os.path.abspath(newest.ROOT)} has a checkpoint{there}: train one first, python "
                    f"train_gpt2.py, or name a model, such as {how}")


def newest_readable(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that can be loaded. Checksums are left to find()."""
    for path in reversed(checkpoint.listing(folder)):
        with contextlib.suppress(OSError):
            checkpoint.load(path, verify=False)
            return path
    return None


def find(source) -> dict | None:
    """Load the checkpoint that `source` is, or the newest whole one in that run folder; None for any other source.

    A file may also be nanoGPT's or build-nanogpt's; foreign.convert() then makes it one of ours, without optimizers.
    Raises OSError or UserError that says what a file or folder seems to be if it is none of these.
    """
    path = Path(source)
    if not os.path.exists(path) and source not in published.MODELS:
        beside = [str(each) for each in checkpoint.listing(path.parent)] if path.suffix == ".pt" else []
        if guess := (beside or [newest.resembling(str(source))])[-1]:
            raise UserError(f"no model {str(source)!r}: did you mean {guess}?")
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        newest_path = checkpoint.newest(path)
        if newest_path is None and checkpoint.listing(path):
            raise UserError(f"no checkpoint in {source} is whole: restore one from a copy, or train again")
        if newest_path is None:
            raise UserError(f"{source} holds neither a whole checkpoint nor a transformers model{suggest(path)}")
        return checkpoint.load(newest_path, verify=False)
    if path.suffix != ".pt" and not path.is_file():
        return None
    try:
        return checkpoint.load(path)
    except CheckpointError as error:
        refusal = error
    content = foreign.read(path) if isinstance(refusal, checkpoint.OtherContent) else None
    if state := foreign.convert(content, path):
        return state
    if path.is_file() and (seems := foreign.explain_file(path, content)):
        raise CheckpointError(f"{refusal}. It seems to be {seems}")
    raise refusal


def suggest(folder: Path) -> str:
    """Say what a folder without a model seems to be, or in which folder the model may be; empty if unknown."""
    if seems := foreign.explain_folder(folder):
        return f"; {seems}"
    if runs := newest.newest_first(root=folder):
        return f": did you mean {runs[0]}?"
    inside = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: (
        [int(number) for number in re.findall(r"\d+", path.name)], path.name))  # checkpoint-1000 after checkpoint-500
    found = [path for path in inside if checkpoint.listing(path) or (path / "config.json").is_file()]
    if found:
        return f": did you mean {found[-1]}?"
    seems = [f"; in {path.name}, {seems}" for path in inside if (seems := foreign.explain_folder(path))]
    return seems[-1] if seems else ""


def read_model(source) -> tuple[dict, dict]:
    """Read (shape, weights) of a model: GPTConfig's fields, and the state dict.

    `source` is a run folder (its newest whole checkpoint), a .pt file, also nanoGPT's or build-nanogpt's, a
    transformers folder, one of OpenAI's names, or a state that find() has returned, whose weights are then taken out.
    """
    state = source if isinstance(source, dict) else find(source)
    if state is None:
        return read_transformers(source)
    return state["model_config"], state.pop("model")


def with_gpt2_tokens(source):
    """Return what GPT.load() takes for `source`. Raises UserError if the model's tokens are not GPT-2's."""
    state = find(source)
    require_gpt2_tokens(state or source)
    return state or source


@contextlib.contextmanager
def checked_against(shape: dict, weights: dict, source):
    """Raise UserError, naming `source`, if the weights do not fit the shape, before or while they are loaded."""
    name = source["path"] if isinstance(source, dict) else source
    try:
        # what is absurd is refused before it is built
        for key, rows in (("wte", shape["vocab_size"]), ("wpe", shape["block_size"])):
            matrix = weights.get(f"transformer.{key}.weight")
            if matrix is not None and tuple(matrix.shape) != (rows, shape["n_embd"]):
                raise TypeError(f"transformer.{key}.weight is not of shape {(rows, shape['n_embd'])}")
        if "transformer.wte.weight" not in weights or shape["n_layer"] > len(weights):
            raise TypeError(f"there are {len(weights)} tensors for {shape['n_layer']} layers")
        with busy(f"loading {name}"):
            yield
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"the weights in {name} are not those of its configuration: {error!s:.300}") from error


def describe(source: str) -> str:
    """Return `source`, with its owner if it is a model that is downloaded."""
    return f"OpenAI's {source}" if source in published.MODELS and not Path(source).is_dir() else source
