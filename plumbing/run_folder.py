"""The folder of a run: held by one process, continued from its newest checkpoint if the experiment is the same.

    hold(folder, world)         a context in which no other process trains into the folder
    to_continue(config, ...)    the state that a run begins with, the same on all ranks
    to_evaluate(config, world)  the state that --eval_only evaluates
    write(run, state)           writes a checkpoint
    saved_on_errors(run)        a context that loses no finished step
"""
import contextlib
import dataclasses
import hashlib
import math
import os
import shlex
from pathlib import Path

from plumbing import checkpoint, files, models, published
from plumbing.cli import Stopped, UserError, changed_flags, print0, require
from plumbing.files import CheckpointError, first_line
from plumbing.ranks import check_launcher


def to_continue(config, world, free_to_change: set[str], free_to_branch: set[str]) -> tuple[dict | None, bool]:
    """Load the newest whole checkpoint in out_dir, else the one to branch from, else nothing.

    Returns it and whether it continues the run in out_dir. Its settings must be those of `config` but for the free
    ones, otherwise UserError names the first that differs.
    """
    path = world.from_rank0(lambda: newest_or_error(config.out_dir))
    if path:
        state = checkpoint.load(path, verify=False)  # checkpoint.newest() has verified it
        check_same_experiment(config, state, free_to_change, path)
        if config.keep_best:  # a loss whose checkpoint was lost keeps no other from being kept
            kept = world.from_rank0(lambda: best_val_loss(config.out_dir))
            state["best_val_loss"] = max(kept, state["best_val_loss"])
        return state, True
    if config.branch_from:
        if Path(config.branch_from).is_dir():  # its newest may be another one tomorrow
            such = next((f", such as {path}" for path in reversed(checkpoint.listing(config.branch_from))), "")
            raise UserError(f"--branch_from takes a .pt file{such}")
        state = checkpoint.load(config.branch_from)
        check_same_experiment(config, state, free_to_branch, config.branch_from)
        require(config, "max_steps", config.max_steps > state["step"],
                f"more than the {state['step']} steps of {config.branch_from}")
        return state, False
    return None, False


def best_val_loss(folder) -> float:
    """Return the validation loss of best.pt in a run's folder; infinity if there is none that is whole."""
    path = Path(folder) / checkpoint.BEST
    try:
        return checkpoint.load(path)["val_loss"] if path.exists() else math.inf
    except OSError as error:
        print0(f"warning: {error}; the next validation writes another")
        return math.inf


def to_evaluate(config, world) -> dict | None:
    """Load the checkpoint to evaluate: the newest whole one in out_dir, else the one to branch from, else nothing.

    With --init_from that is what is evaluated, except by the run's own command with --eval_only added.
    """
    path = world.from_rank0(lambda: newest_or_error(config.out_dir)) or config.branch_from
    state = checkpoint.load(path) if path else None
    if state is None and config.eval_only and not config.init_from:
        raise UserError(f"no checkpoint in {config.out_dir}: name a run's --out_dir, or --init_from")
    if state and config.init_from not in ("", state["train_config"].get("init_from")):
        return None
    if state:
        before = {"data": config.data, "val_tokens": config.val_tokens} | state["train_config"]
        if before["data"] != config.data:
            print0(f"note: the run was trained on {before['data']}, this evaluates on {config.data}")
        if before["val_tokens"] != config.val_tokens:
            print0(f"note: the run has --val_tokens {before['val_tokens']}, this evaluates {config.val_tokens}")
    return state


def describe_origin(config, state: dict | None, resuming: bool) -> str:
    """Say where the weights of a run come from."""
    if state is None:
        return models.describe(config.init_from) or "new weights"
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
        return bool(state["origin_sha256"]) and hash_weights(models.read_model(name)[1]) == state["origin_sha256"]
    except (OSError, UserError):
        return False


def newest_or_error(folder) -> str | None:
    """Return checkpoint.newest(folder). Raises UserError if there are checkpoints but none is whole."""
    path = checkpoint.newest(folder)
    if path is None and checkpoint.listing(folder):
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
        remedy = f"continue with {flags_of(config, state, free)}, or choose another --out_dir for a new run"
        if "max_steps" in free:
            remedy = f"a branch keeps the other settings of its run, add {flags_of(config, state, free)}"
        elif name == "max_steps":
            remedy = (f"continue with --{name} {before}; to train longer, or under another schedule, use --branch_from "
                      f"{path} and another --out_dir")
        raise UserError(f"the run of {path} has --{name} {before}, not {given}: {remedy}")


def flags_of(config, state: dict, free: set[str]) -> str:
    """Return the flags that a command lacks for the settings of a checkpoint, but for those that are free to differ."""
    before = {field.name: state["train_config"].get(field.name, field.default)
              for field in dataclasses.fields(config) if field.name not in free}
    if config.dtype == "auto":  # which takes that of the checkpoint
        before["dtype"] = "auto"
    return shlex.join(changed_flags(dataclasses.replace(config, **before), config))


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


def write(run, state: dict, required: bool = False, name: str = "") -> bool:
    """Have rank 0 write a checkpoint of a Run, after syncing its log, and delete older ones.

    A full disk, or a weight that is not finite, is a warning; if the checkpoint is `required` it is an OSError on every
    rank. Raises UserError if another run has taken the folder. `name` is for a checkpoint beside the numbered ones.
    A run that diverges keeps its good ones. Returns False on rank 0 if it was not written. The checkpoint that the run
    has just been resumed from is not written again.
    """
    if state["step"] == run.start["resumed_from"] and not required and not name:
        return True

    def action() -> bool:
        try:
            run.log.keep_folder()
            run.log.sync()
            checkpoint.save(run.config.out_dir, state["step"], state, name)
            if run.finite and not name:
                checkpoint.prune(run.config.out_dir, run.config.keep_checkpoints, state["step"])
        except OSError as error:
            print0(f"warning: {error}; the checkpoints before it stay")
            if required:
                raise
            return False
        return True

    if required:
        return run.world.from_rank0(action)
    return action() if run.world.rank == 0 else True


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
    """Save the steps that a Run has finished before an error of any kind is passed on, or Stopped after a signal.

    An error in the middle of an update leaves nothing to save. Until this process has finished a step, there is nothing
    either, and a signal raises Stopped at once.
    """
    first, stop = run.step, run.world.stop
    stop.at_once = lambda: run.world.world_size == 1 and run.step == first
    try:
        yield
    except CheckpointError:  # there is no room for one
        raise
    except Stopped:
        stop.at_once = bool  # never
        if run.step > first:  # an unfinished step or evaluation is done again when resuming
            run.save(required=True)
        run.log.end(run.step, run.val_loss, stopped=True)
        raise Stopped from None
    except BaseException:
        if run.is_whole and run.step > 0:
            run.raw_model.zero_grad(set_to_none=True)  # in case that memory has run out
            with contextlib.suppress(Exception):  # the first error is the one to tell
                run.save()
        raise
    finally:
        stop.at_once = bool  # which also lets go of the run
