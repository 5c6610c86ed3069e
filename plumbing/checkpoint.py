"""Checkpoint files: written whole or not at all, verified before they are trusted, pruned, one run to a folder.

    save(folder, step, state)   atomic: temporary file, fsync, rename, fsync of the folder
    newest(folder)              (path, state) of the newest whole checkpoint, or (None, None)
    load(path)                  the state of one checkpoint, verified; runs no code that a file might carry
    prune(folder, keep, step)   deletes all but the newest up to a step
    read_transformers(folder)   (shape, weights) of a GPT-2 in transformers' layout, or of OpenAI's by name
    write_transformers(folder)  the other way round
    write_sums, check_sums      the hashes of an exported folder
    lock(folder)                a context in which no other process can train into the folder

A checkpoint is what torch.save makes of tensors, numbers, strings, lists and dicts: a zip file with checksums.
"""
import contextlib
import json
import math
import os
import re
import zipfile
from pathlib import Path

import filelock
import torch

from plumbing.files import check_inside, open_new, replace, sha256

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_SETTINGS = {  # of transformers' config.json: with another value it is another model
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
}
SUMS = "SHA256SUMS"  # of an exported folder
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # matrices that transformers keeps as (in, out)
KEYS = {"model": dict, "optimizer": dict, "model_config": dict, "train_config": dict, "step": int, "position": int,
        "val_loss": float}  # of a checkpoint
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")  # of a GradScaler


class CheckpointError(OSError):
    """A checkpoint that cannot be written, or is not whole; the message names the file."""


def save(folder, step: int, state: dict) -> Path:
    """Write `state` to folder/model_{step:06d}.pt so that at any instant the file is either absent or whole.

    Raises CheckpointError, leaving no partial file, where it cannot be written (a full disk, a read-only folder) or
    holds an inf or nan, as nothing can be trained from that.
    """
    if bad := find_not_finite(state):
        raise CheckpointError(f"after step {step} {bad} is not finite: no checkpoint of it is kept")
    path = Path(folder) / f"model_{step:06d}.pt"
    temporary = path.with_name(path.name + ".tmp")
    try:
        remove_temporary(folder)  # as large as checkpoints: a killed writer's may be what has filled the disk
        with open_new(temporary) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}, is the disk full? Free space and run the same command again "
                              f"({first_line(error)})") from error
    return path


def find_not_finite(state, name: str = "the state") -> str | None:
    """The name of a floating-point tensor in nested dicts, lists and tuples that holds an inf or nan, if any does."""
    if isinstance(state, torch.Tensor):
        return None if torch.isfinite(state).all() else name
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return next((bad for key, part in parts if (bad := find_not_finite(part, str(key)))), None)


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def load(path) -> dict:
    """The state in the checkpoint `path`; CheckpointError if it is not a whole checkpoint.

    Its tensors are pages of the file, read as they are used and shared by all ranks of a machine.
    """
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise FileNotFoundError
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if any(entry.compress_type or entry.external_attr for entry in archive.infolist()):
                raise zipfile.BadZipFile("its directory is damaged")  # torch.save sets neither, and testzip trusts both
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} differs")
        state = read_state(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}") from error
    except MemoryError:
        raise
    except Exception as error:  # what the unpickler makes of bytes that somebody chose can be any
        raise CheckpointError(f"{path} is not a whole checkpoint: {first_line(error)}") from error
    wrong = [key for key, kind in KEYS.items() if not isinstance(state, dict) or not isinstance(state.get(key), kind)]
    if not wrong and not has_sound_scaler(state):
        wrong = ["scaler"]
    if wrong:
        raise CheckpointError(f"{path} is not a checkpoint of train_gpt2.py: {', '.join(wrong)} missing or wrong")
    return state


def read_state(path):
    """What torch.save has written, mapped; read into memory if the name is no UTF-8 or the file system maps nothing."""
    try:
        return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the file itself has been verified: if it is at fault, reading it fails too
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def has_sound_scaler(state: dict) -> bool:
    """Whether the gradient scaler's state holds numbers to go on with; only runs in float16 must have one."""
    scaler = state.get("scaler", {})
    if not scaler:
        return isinstance(scaler, dict) and state["train_config"].get("dtype") != "float16"
    if not isinstance(scaler, dict):
        return False
    numbers = [scaler.get(name) for name in SCALER]
    sound = all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers)
    return sound and scaler["scale"] > 0


def newest(folder, report=print) -> tuple[Path, dict] | tuple[None, None]:
    """(path, state) of the newest whole checkpoint in `folder`, else (None, None); damaged ones go to `report`."""
    for path in reversed(listing(folder)):
        try:
            check_inside(path)
            return path, load(path)
        except OSError as error:
            report(f"warning: {error}; trying the one before it")
    return None, None


def listing(folder) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((path for path in Path(folder).glob("model_*.pt") if re.fullmatch(r"model_\d{6,}", path.stem)),
                  key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
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
    for path in Path(folder).glob("model_*.pt.tmp"):
        path.unlink(missing_ok=True)


def read_transformers(name_or_folder) -> tuple[dict, dict]:
    """A GPT-2 in transformers' layout -> (shape, weights): GPTConfig's fields, and the state dict in Linear layout.

    Takes a folder with config.json and model.safetensors, whole or in parts, or one of OpenAI's names, which
    huggingface_hub downloads. CheckpointError where it cannot be had or is no GPT-2.
    """
    from safetensors import SafetensorError

    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = download_openai(str(name_or_folder))
    try:
        check_inside(folder / "config.json")
        check_sums(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, value in GPT2_SETTINGS.items():
            if settings.get(key, value) != value:
                raise ValueError(f"{key} is {settings[key]!r}, GPT-2's is {value!r}")
        shape = {key: int(settings[key]) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        shape["block_size"] = int(settings["n_positions"])
        if settings.get("n_inner") not in (None, 4 * shape["n_embd"]):
            raise ValueError(f"n_inner is {settings['n_inner']!r}, GPT-2's is 4 * n_embd")
        weights = {}
        for key, weight in read_safetensors(folder).items():
            key = key.removeprefix("transformer.")
            if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the head is wte; the masks are no weights
            weights["transformer." + key] = weight.t() if key.endswith(CONV1D) else weight
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no GPT-2 in transformers' layout: "
                              f"{type(error).__name__}: {first_line(error)}") from error
    return shape, weights


def describe(source: str) -> str:
    """`source`, with its owner where it is a model that read_transformers() downloads."""
    return f"OpenAI's {source}" if source in OPENAI_MODELS and not Path(source).is_dir() else source


def read_safetensors(folder: Path) -> dict:
    """All tensors of a folder's model.safetensors, or of the parts that its model.safetensors.index.json lists."""
    from safetensors.torch import load_file

    names = ["model.safetensors"]
    if not (folder / names[0]).exists():
        index = folder / "model.safetensors.index.json"
        check_inside(index)
        if not index.exists():
            others = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            raise ValueError(f"there is {others[0]}, which can run code, but no model.safetensors: load it with "
                             "transformers and save_pretrained" if others else "there is no model.safetensors")
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"its index names {outside[0]!r}, a file in another folder")
    for name in names:
        check_inside(folder / name)
    return {key: weight for name in names for key, weight in load_file(folder / name).items()}


def check_sums(folder: Path) -> None:
    """ValueError where a file that the folder's SHA256SUMS lists, as exports do, is not what it was."""
    path = folder / SUMS
    if not path.exists():
        return
    check_inside(path)
    for line in path.read_text(encoding="utf-8").split("\n"):
        entry = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\0]+)", line)
        if line and not entry:
            raise ValueError(f"{SUMS} is damaged: export the model again, or delete it")
        if entry:
            check_inside(folder / entry[2])
            if not (folder / entry[2]).is_file() or sha256(folder / entry[2]) != entry[1]:
                raise ValueError(f"{entry[2]} is damaged or missing: export the model again, or, if that is on "
                                 f"purpose, delete {SUMS}")


def write_sums(folder: Path) -> None:
    """SHA256SUMS of all files in the folder, as sha256sum writes and checks it."""
    sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")


def write_transformers(folder, shape: dict, weights: dict, generation: dict) -> None:
    """Write config.json, generation_config.json and model.safetensors for transformers and read_transformers().

    `shape` are GPTConfig's fields; `weights` the state dict, whose lm_head, being wte, is left out. `generation` are
    settings for both configurations. OSError where they cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    settings = {**GPT2_SETTINGS, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32",
                "n_positions": shape["block_size"], "n_ctx": shape["block_size"], "n_inner": None,
                "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02, "use_cache": True,
                **{key: shape[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}, **generation}
    for name, values in (("config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    try:
        save_file({key: (weight.t() if key.endswith(CONV1D) else weight).contiguous()
                   for key, weight in weights.items() if key != "lm_head.weight"},
                  folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise CheckpointError(f"cannot write {folder / 'model.safetensors'}, is the disk full? Free space, or name "
                              f"another folder ({first_line(error)})") from error
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it is written for the owner alone


def download_openai(name: str) -> Path:
    """The folder into which huggingface_hub has put OpenAI's model; CheckpointError where it cannot be had."""
    if name not in OPENAI_MODELS:
        raise CheckpointError(f"no model {name!r}: name a folder, a .pt file or one of {', '.join(OPENAI_MODELS)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # the hub's client has dozens of errors for "no network"
        raise CheckpointError(
            f"cannot download {name} from the Hugging Face hub: check the network, or name a folder that holds its "
            f"config.json and model.safetensors ({type(error).__name__}: {first_line(error)})") from error


@contextlib.contextmanager
def lock(folder):
    """Make `folder` and hold it: OSError where it cannot be written or where a live process holds it already.

    The operating system drops the lock when the process ends, however it ends.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / ".lock")
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        raise OSError(f"another run is training into {folder}: wait for it, or choose another --out_dir") from error
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}: choose another --out_dir") from error
    try:
        yield
    finally:
        held.release()
