"""Checkpoint files: written whole or not at all, verified before they are trusted, pruned.

    save(folder, step, state)   writes model_{step:06d}.pt atomically
    newest(folder)              the path of the newest whole checkpoint, or None
    load(path)                  the state of one checkpoint, verified; runs no code that a file might carry
    restore(state, ...)         gives the optimizers and the scaler theirs
    prune(folder, keep, step)   deletes all but the newest ones up to a step

A checkpoint is what torch.save makes of tensors, numbers, strings, lists and dicts: a zip file with checksums.
"""
import copy
import math
import os
import re
import zipfile
from pathlib import Path

import torch

from plumbing import foreign
from plumbing.cli import explain, print0
from plumbing.files import CheckpointError, atomic_write, check_inside, first_line
from plumbing.progress import busy

BEST = "best.pt"  # checkpoint with the lowest validation loss, beside the numbered ones
KEYS = {"model": dict, "model_config": dict, "optimizers": list, "train_config": dict, "machine": dict, "data": dict,
        "step": int, "val_loss": float, "best_val_loss": float, "origin_sha256": str}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")  # of a GradScaler


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
        with busy(f"writing {path}"), atomic_write(path) as file:
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
        with busy(f"reading {path}"):
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
    """Raise ValueError, KeyError or TypeError unless `stored` has the groups and the shapes of this optimizer.

    Of an optimizer that is not in MOMENTS only the groups are known.
    """
    parameters, groups = [], stored["param_groups"]
    expected = next((names for kind, names in MOMENTS.items() if isinstance(optimizer, kind)), None)
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
    for index, parameter in parameters if stored["state"] and expected else ():
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
