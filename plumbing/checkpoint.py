"""Checkpoint files: written whole or not at all, verified before they are trusted, pruned.

    to_continue(config, ...)    the state that a run begins with, the same on all ranks
    write(config, state, ...)   a checkpoint of a run
    save(folder, step, state)   writes model_{step:06d}.pt atomically
    newest(folder)              the path of the newest whole checkpoint, or None
    load(path)                  the state of one checkpoint, verified; runs no code that a file might carry
    prune(folder, keep, step)   deletes all but the newest ones up to a step
    lock(folder)                a context in which no other process trains into the folder
    hold(folder, world)         the same for all ranks of a run
    find(source)                the checkpoint that a name on the command line means, or None
    read_model(source)          (shape, weights) of any model: a run, a .pt file, a transformers folder, OpenAI's

A checkpoint is what torch.save makes of tensors, numbers, strings, lists and dicts: a zip file with checksums.
"""
import contextlib
import copy
import dataclasses
import hashlib
import math
import os
import re
import zipfile
from pathlib import Path

import torch

from plumbing import files, foreign, published
from plumbing.cli import UserError, explain, print0, require
from plumbing.files import CheckpointError, atomic_write, check_inside, first_line
from plumbing.model_tokenizer import require_gpt2_tokens
from plumbing.ranks import check_launcher
from plumbing.transformers_format import read_transformers

BEST = "best.pt"  # checkpoint with the lowest validation loss, beside the numbered ones
KEYS = {"model": dict, "model_config": dict, "optimizers": list, "train_config": dict, "machine": dict, "data": dict,
        "step": int, "val_loss": float, "best_val_loss": float, "origin_sha256": str}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")  # of a GradScaler


def to_continue(config, world, free_to_change: set[str], free_to_branch: set[str]) -> tuple[dict | None, bool]:
    """Load the newest whole checkpoint in out_dir, else the one to branch from, else nothing.

    Returns it and whether it continues the run in out_dir. Its settings must be those of `config` but for the free
    ones, otherwise UserError names the first that differs.
    """
    path = world.from_rank0(lambda: newest_or_error(config.out_dir))
    if path:
        state = load(path, verify=False)  # newest() has verified it
        check_same_experiment(config, state, free_to_change, path)
        return state, True
    if config.branch_from:
        if Path(config.branch_from).is_dir():  # its newest may be another one tomorrow
            such = next((f", such as {path}" for path in reversed(listing(config.branch_from))), "")
            raise UserError(f"--branch_from takes a .pt file{such}")
        state = load(config.branch_from)
        check_same_experiment(config, state, free_to_branch, config.branch_from)
        require(config, "max_steps", config.max_steps > state["step"],
                f"more than the {state['step']} steps of {config.branch_from}")
        return state, False
    return None, False


def to_evaluate(config, world) -> dict | None:
    """Load the checkpoint to evaluate: the newest whole one in out_dir, else the one to branch from, else nothing.

    With --init_from that is what is evaluated, except by the run's own command with --eval_only added.
    """
    path = world.from_rank0(lambda: newest_or_error(config.out_dir)) or config.branch_from
    state = load(path) if path else None
    if state is None and config.eval_only and not config.init_from:
        raise UserError(f"no checkpoint in {config.out_dir}: name a run's --out_dir, or --init_from")
    if state and config.init_from not in ("", state["train_config"].get("init_from")):
        return None
    if state and state["train_config"].get("data") != config.data:
        print0(f"note: the run was trained on {state['train_config'].get('data')}, this evaluates on {config.data}")
    return state


def describe_origin(config, state: dict | None, resuming: bool) -> str:
    """Say where the weights of a run come from."""
    if state is None:
        return describe(config.init_from) or "new weights"
    if resuming:
        return f"resumed after step {state['step']:,}"
    return f"step {state['step']:,} of {config.branch_from or config.out_dir}"


def origin_hash(config, state: dict | None, resuming: bool, model) -> str:
    """Hash the weights that a run began with, by which it knows --init_from and --branch_from under another name.

    Empty for new weights, and if a run of an earlier version is resumed.
    """
    if resuming:
        return state["origin_sha256"]
    return hash_weights(model.state_dict()) if config.init_from or config.branch_from else ""


def hash_weights(weights: dict) -> str:
    """Hash names, shapes and the first thousand values of each tensor."""
    hashed = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        values = weight.detach().reshape(-1)[:1000].float().cpu()
        hashed.update(f"{name} {tuple(weight.shape)} ".encode() + values.numpy().tobytes())
    return hashed.hexdigest()


def is_same_source(name: str, before: str, state: dict) -> bool:
    """Return whether --init_from or --branch_from names the weights that a run began with, however it is spelled."""
    if not before or not name or name in published.MODELS:  # these would have to be downloaded first
        return False
    if os.path.exists(name) and os.path.exists(before) and os.path.samefile(name, before):
        return True
    try:
        return bool(state["origin_sha256"]) and hash_weights(read_model(name)[1]) == state["origin_sha256"]
    except (OSError, UserError):
        return False


def newest_or_error(folder) -> str | None:
    """Return newest(folder). Raises UserError if there are checkpoints but none is whole."""
    path = newest(folder)
    if path is None and listing(folder):
        raise UserError(f"no checkpoint in {folder} is whole: move them away, or change --out_dir")
    return str(path) if path else None


def check_same_experiment(config, state: dict, free: set[str], path) -> None:
    """Raise UserError if a setting that is not free differs from that in the checkpoint."""
    check_settings(config, state, path)
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        before = state["train_config"].get(name, field.default)  # what an earlier version did
        if name in free or before == value or (name == "dtype" and value == "auto"):
            continue
        # with a hash of the data their folder may have moved
        if name == "data" and ("sha256" in state["data"] or os.path.realpath(value) == os.path.realpath(before)):
            continue
        if name in ("init_from", "branch_from") and is_same_source(value, before, state):
            continue
        if name == "branch_from" and before == "":
            raise UserError(f"{Path(path).parent} already holds a run: choose another --out_dir for the branch")
        given = "(empty)" if value == "" else value
        remedy = f"continue with --{name} {before}, or choose another --out_dir for a new run"
        if name == "max_steps" and not config.branch_from:
            remedy = (f"continue with --{name} {before}; to train longer, or under another schedule, use --branch_from "
                      f"{path} and another --out_dir")
        raise UserError(f"the run of {path} has --{name} {before}, not {given}: {remedy}")


def check_settings(config, state: dict, path) -> None:
    """Raise CheckpointError if the settings in a checkpoint are none that a run can have."""
    names = {field.name for field in dataclasses.fields(config)}
    settings = {name: value for name, value in state["train_config"].items() if name in names}
    try:
        known = dataclasses.replace(config, **settings)
    except (UserError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has been changed: {first_line(error)}") from error
    if not 0 <= state["step"] <= known.max_steps:
        raise CheckpointError(f"{path} has been changed: it is of step {state['step']} of {known.max_steps}")


def write(config, world, log, state: dict, prune_older: bool, required: bool = False, name: str = "") -> None:
    """Have rank 0 write a checkpoint into out_dir, after syncing the log, and delete older ones if `prune_older`.

    A full disk, or a weight that is not finite, is a warning; if the checkpoint is `required` it is an OSError on every
    rank. Raises UserError if another run has taken the folder. `name` is for a checkpoint beside the numbered ones.
    Without `prune_older` a run that diverges keeps its good ones.
    """
    def action() -> None:
        log.keep_folder()
        try:
            log.sync()
            save(config.out_dir, state["step"], state, name)
            if prune_older and not name:
                prune(config.out_dir, config.keep_checkpoints, state["step"])
        except OSError as error:
            print0(f"warning: {error}; the checkpoints before it stay")
            if required:
                raise

    if required:
        world.from_rank0(action)
    elif world.rank == 0:
        action()


def lock(folder):
    """Return a context that holds a run's folder, so that no other process trains into it; see files.lock()."""
    return files.lock(folder, "another run is training into", "choose another --out_dir")


@contextlib.contextmanager
def hold(folder, world):
    """Hold a run's folder for all ranks; yields the lock on rank 0, None on the others.

    Raises OSError on every rank if another process holds it.
    """
    if world.world_size == 1:
        check_launcher()
    with contextlib.ExitStack() as stack:
        held = []
        world.from_rank0(lambda: held.append(stack.enter_context(lock(folder))))
        yield held[0] if held else None


@contextlib.contextmanager
def saved_on_errors(run):
    """Save the steps that a Run has finished before an error of any kind is passed on.

    An error in the middle of an update leaves nothing to save.
    """
    try:
        yield
    except CheckpointError:  # there is no room for one
        raise
    except BaseException:
        if run.is_whole and run.step > 0:
            run.raw_model.zero_grad(set_to_none=True)  # in case that memory has run out
            with contextlib.suppress(Exception):  # the first error is the one to tell
                run.save()
        raise


def save(folder, step: int, state: dict, name: str = "") -> Path:
    """Write `state` to folder/model_{step:06d}.pt, so that at any instant the file is either absent or whole.

    Raises CheckpointError, leaving no partial file, if it cannot be written (a full disk, a read-only folder) or holds
    an inf or nan, as nothing can be trained from that.
    """
    if bad := find_not_finite(state):
        raise CheckpointError(f"after step {step} {bad} is not finite: no checkpoint of it is kept")
    path = Path(folder) / (name or f"model_{step:06d}.pt")
    try:
        remove_temporary(folder)  # as large as checkpoints: a killed writer's may be what has filled the disk
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"cannot write {path}, is the disk full? Free space and run the same command again "
                              f"({first_line(error)})") from error
    return path


def find_not_finite(state, name: str = "the state") -> str | None:
    """Return the name of a tensor in nested dicts and lists that holds an inf or nan, or None."""
    if isinstance(state, torch.Tensor):
        return None if torch.isfinite(state).all() else name
    parts = []
    if isinstance(state, dict):
        parts = state.items()
    elif isinstance(state, (list, tuple)):
        parts = enumerate(state)
    for key, part in parts:
        if bad := find_not_finite(part, str(key)):
            return bad
    return None


class OtherContent(CheckpointError):
    """A file that is sound, but is no checkpoint of train_gpt2.py."""


def load(path, verify: bool = True) -> dict:
    """Load the checkpoint `path`. Raises CheckpointError if it is not a whole one, OtherContent if it is none of ours.

    Its tensors are pages of the file, read as they are used and shared by all ranks of a machine. `verify` compares the
    checksums, which takes a second per GB.
    """
    kind = CheckpointError
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise FileNotFoundError
        if verify:
            check_archive(path)
        kind = OtherContent
        state = read_state(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}") from error
    except MemoryError:
        raise
    except Exception as error:  # what the unpickler makes of bytes that somebody chose can be any
        raise kind(f"{path} is not a whole checkpoint: {foreign.reason(error)}") from error
    wrong = list(KEYS)
    if isinstance(state, dict):
        upgrade(state)
        wrong = [key for key, kind in KEYS.items() if not isinstance(state.get(key), kind)]
        if not wrong and not has_sound_scaler(state):
            wrong = ["scaler"]
    if wrong:
        hint = f"; {foreign.HINT}" if isinstance(state, dict) and "model_args" in state else ""
        raise OtherContent(f"{path} is not a checkpoint of train_gpt2.py: {', '.join(wrong)} missing or wrong{hint}")
    state["path"] = str(path)
    return state


def check_archive(path) -> None:
    """Raise BadZipFile if a checksum in the archive is wrong; torch.load does not compare them."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type or entry.external_attr for entry in archive.infolist()):
            raise zipfile.BadZipFile("its directory is damaged")  # torch.save sets neither, and testzip trusts both
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"checksum of {damaged} differs")


def read_state(path):
    """Read what torch.save has written, mapped; or into memory, if the file's name or system cannot be mapped."""
    try:
        return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the file itself has been verified: if it is at fault, reading it fails too
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def upgrade(state: dict) -> None:
    """Bring a checkpoint of an earlier version into today's form."""
    config = state.get("train_config")
    if not isinstance(config, dict):
        return
    moments = state.pop("optimizer", None)
    if isinstance(moments, dict):  # one optimizer, or two behind the interface of one
        state.setdefault("optimizers", moments.get("optimizers", [moments]))
    machine = {"world_size": config.pop("world_size", None), "device_kind": config.pop("device_kind", "cpu")}
    state.setdefault("machine", machine)
    state.setdefault("data", {"n_windows": config.pop("n_windows", None)})
    state.setdefault("scaler", {})
    state.setdefault("evaluated", True)
    state.setdefault("best_val_loss", math.inf)
    state.setdefault("origin_sha256", "")
    for gone in ("position", "recipe"):  # the position follows from the step; the settings say what a recipe had set
        state.pop(gone, None)
        config.pop(gone, None)


def has_sound_scaler(state: dict) -> bool:
    """Return whether the gradient scaler's state can be continued from; only runs in float16 must have one."""
    scaler = state["scaler"]
    if not scaler:
        return isinstance(scaler, dict) and state["train_config"].get("dtype") != "float16"
    if not isinstance(scaler, dict):
        return False
    numbers = [scaler.get(name) for name in SCALER]
    sound = all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers)
    return sound and scaler["scale"] > 0


def restore(state: dict, optimizers: list, scaler, device: torch.device) -> None:
    """Load the state of the optimizers and of the gradient scaler, and drop it from `state`.

    Raises CheckpointError if it is not the state of these optimizers.
    """
    stored = state.pop("optimizers")
    try:
        if len(stored) != len(optimizers):
            raise ValueError(f"there are {len(stored)} optimizers, not {len(optimizers)}")
        for optimizer, moments in zip(optimizers, stored):
            check_moments(optimizer, moments)
            # on a CPU they are copied, since the checkpoint's tensors are pages of its file
            optimizer.load_state_dict(copy.deepcopy(moments) if device.type == "cpu" else moments)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"the state of the optimizers in {state['path']} is not that of this model: "
                              f"{explain(error)}: move the file away, and the one before it is used") from error
    scaler.load_state_dict(state["scaler"])


MOMENTS = {  # what an optimizer keeps of a parameter; PyTorch reads and writes it without checking the shape
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"},
}


def check_moments(optimizer, stored: dict) -> None:
    """Raise ValueError, KeyError or TypeError unless `stored` has the groups and the shapes of this optimizer."""
    parameters, groups, expected = [], stored["param_groups"], MOMENTS[type(optimizer)]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError("its groups have other sizes")
    for group, before in zip(optimizer.param_groups, groups):
        parameters += zip(before["params"], group["params"])
        for key, value in group.items():
            if isinstance(value, (float, tuple)) and not like(before[key], value):
                raise ValueError(f"{key} of a group is {before[key]!r:.40}")
    # before the first update there is nothing yet, of any parameter
    if stored["state"].keys() - dict(parameters) or len(stored["state"]) not in (0, len(parameters)):
        raise ValueError(f"it is of {len(stored['state'])} tensors, not {len(parameters)}")
    for index, parameter in parameters if stored["state"] else ():
        moments = stored["state"][index]
        if moments.keys() != expected:
            raise ValueError(f"of tensor {index} there are {', '.join(map(str, moments))}")
        for key, value in moments.items():
            shape = () if key == "step" else tuple(parameter.shape)
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
                raise ValueError(f"{key} of tensor {index} is not a tensor of shape {shape}")
            if key == "step" and not 0 <= value.item() < math.inf:
                raise ValueError(f"step of tensor {index} is {value.item()}")


def like(found, value) -> bool:
    """Return whether `found` is a number where `value` is one, or a tuple of as many."""
    if isinstance(value, tuple):
        return isinstance(found, tuple) and len(found) == len(value) and all(map(like, found, value))
    return isinstance(found, (int, float)) and math.isfinite(found)


def newest(folder) -> Path | None:
    """Return the newest whole checkpoint in `folder`, with a warning for each damaged one that is passed over."""
    for path in reversed(listing(folder)):
        try:
            check_inside(path)
            load(path)
            return path
        except OSError as error:
            print0(f"warning: {error}; trying the one before it")
    return None


def listing(folder) -> list[Path]:
    """List the checkpoints in `folder`, oldest first."""
    paths = [path for path in Path(folder).glob("model_*.pt") if re.fullmatch(r"model_\d{6,}", path.stem)]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.stem.removeprefix("model_"))


def prune(folder, keep: int, step: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`.

    `step` is the one just written: files of later steps are not counted, since they were damaged and passed over.
    """
    written = [path for path in listing(folder) if step_of(path) <= step]
    for path in written[:-keep]:
        path.unlink(missing_ok=True)


def remove_temporary(folder) -> None:
    """Delete what killed writers of checkpoints left behind."""
    for path in (*Path(folder).glob("model_*.pt.tmp"), *Path(folder).glob(f"{BEST}.tmp")):
        if path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)


def find(source) -> dict | None:
    """Load the checkpoint that `source` is, or the newest whole one in that run folder; None for any other source.

    A file may also be nanoGPT's or build-nanogpt's; foreign.convert() then makes it one of ours, without optimizers.
    Raises OSError or UserError that says what a file or folder seems to be if it is none of these.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        newest_path = newest(path)
        if newest_path is None:
            raise UserError(f"{source} holds neither a whole checkpoint nor a transformers model{suggest(path)}")
        return load(newest_path, verify=False)
    if path.suffix != ".pt" and not path.is_file():
        return None
    try:
        return load(path)
    except CheckpointError as error:
        refusal = error
    content = foreign.read(path) if isinstance(refusal, OtherContent) else None
    if state := foreign.convert(content, path):
        return state
    if path.is_file() and (seems := foreign.explain_file(path, content)):
        raise CheckpointError(f"{refusal}. It seems to be {seems}")
    raise refusal


def suggest(folder: Path) -> str:
    """Say what a folder without a model seems to be, or in which folder the model may be; empty if unknown."""
    if seems := foreign.explain_folder(folder):
        return f"; {seems}"
    inside = [path for path in sorted(folder.iterdir()) if listing(path) or (path / "config.json").is_file()]
    return f": did you mean {inside[-1]}?" if inside else ""


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
        yield
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"the weights in {name} are not those of its configuration: {error!s:.300}") from error


def describe(source: str) -> str:
    """Return `source`, with its owner if it is a model that is downloaded."""
    return f"OpenAI's {source}" if source in published.MODELS and not Path(source).is_dir() else source
