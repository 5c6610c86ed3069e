"""Checkpoints of other programs: nanoGPT's and build-nanogpt's are read, the others named, with the way in.

    read(path)               what torch.save has written, without running any code that the file might carry
    convert(content, path)   a checkpoint of nanoGPT or build-nanogpt as one of ours; None for anything else
    reason(error)            what torch.load says, in one line
    explain_file(path, ...)  what a file seems to be that holds no model for us, and what to do with it
    explain_folder(folder)   the same for a folder

Objects of classes become stand-ins that only keep what the file says of them.
"""
import os
import re
import sys
import threading
import zipfile
from pathlib import Path

import torch

from plumbing.cli import explain
from plumbing.file_kinds import LFS, kind_by_bytes
from plumbing.files import CheckpointError, first_line
from plumbing.transformers_format import check_weights, gpt2_keys

SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
PREFIXES = re.compile(r"^(?:_orig_mod\.|module\.)+")  # of torch.compile and DistributedDataParallel
LOCK = threading.Lock()  # PyTorch's list of known names is the process's
LLM_C = (20240326).to_bytes(4, "little")  # how its files of weights begin
SAVE_AS_NANOGPT = ("torch.save({'model': model.state_dict(), 'model_args': dict(n_layer=..., n_head=..., n_embd=..., "
                   "block_size=..., vocab_size=..., bias=True)}, 'ckpt.pt')")
SAVE_PRETRAINED = "load it with transformers and save it with save_pretrained('NEW_FOLDER'), which writes safetensors"


HINT = "checkpoints of nanoGPT and build-nanogpt can be named by --init_from and --model"


class StandIn:
    """In place of an object of another program's class: it keeps what the file says of it and does nothing."""

    name = ""

    def __new__(cls, *arguments):
        """Make one, whatever the class that it stands for is called with."""
        return object.__new__(cls)

    def __init__(self, *arguments):
        self.fields = {}

    def __setstate__(self, state):
        self.fields = state if isinstance(state, dict) else {}


def read_file(path):
    """Read what torch.save has written, mapped, with a StandIn for every object that is not plain data.

    Raises what PyTorch raises if the file is not whole, or is of another kind. It runs no code of the file: every name
    that PyTorch does not know means a StandIn while it is read.
    """
    with LOCK:  # of two threads, the first to end would take the names from the other
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        stand_ins = [(type("StandIn", (StandIn,), {"name": name}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)


def read(path):
    """Return read_file(path), or None if the file cannot be read."""
    try:
        return read_file(path)
    except MemoryError:
        raise
    except Exception:  # what the unpickler makes of bytes that somebody chose can be any
        return None


def reason(error: Exception) -> str:
    """Return what an exception of torch.load says, in one line, without its terminal codes and its advice."""
    if found := re.search(r"nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", str(error)):
        return f"it holds {found[1]}, an object of another program; {HINT}"
    if "Weights only load failed" in str(error):
        return "its content is damaged, or is not plain data"
    return re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))


def convert(content, path) -> dict | None:
    """Convert a checkpoint of nanoGPT or build-nanogpt to what checkpoint.load() returns, without optimizers.

    `program` in it is the one that wrote it. Biases that nanoGPT leaves out (bias=False) are zeros. A note on stderr
    says that its GELU is not GPT-2's, as it was before nanoGPT had that setting.
    Returns None for anything else. Raises CheckpointError if it is no GPT-2.
    """
    if not isinstance(content, dict) or not is_weights(content.get("model")):
        return None
    if isinstance(content.get("model_args"), dict):
        program, shape, step = "nanoGPT", content["model_args"], content.get("iter_num")
    elif {*SHAPE} <= fields_of(content.get("config")).keys():
        program, shape, step = "build-nanogpt", fields_of(content["config"]), content.get("step")
    else:
        return None
    try:
        biases = shape.get("bias", True)
        shape = {key: int(shape[key]) for key in SHAPE}
        weights = plain_weights(content["model"])
        if not biases:
            add_biases(weights, shape)
        check_weights(weights, shape["n_layer"])
    except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path} seems to be {program}'s, but is no GPT-2: {explain(error)}") from error
    if program == "nanoGPT" and "bias" in content["model_args"] and os.environ.get("RANK", "0") == "0":
        print(f"note: {path} is nanoGPT's, which computes the exact GELU; here it is GPT-2's, by the tanh formula, so "
              "that logits differ a little", file=sys.stderr, flush=True)
    return {"model": weights, "model_config": shape, "train_config": {}, "program": program, "path": str(path),
            "step": step if isinstance(step, int) else 0}


def is_weights(value) -> bool:
    """Return whether a value is a state dict."""
    tensors = value.values() if isinstance(value, dict) else ()
    return bool(tensors) and all(isinstance(weight, torch.Tensor) for weight in tensors)


def fields_of(value) -> dict:
    """Return the fields of an object in a checkpoint, or of a dict that has been made of it."""
    return value.fields if isinstance(value, StandIn) else value if isinstance(value, dict) else {}


def plain_weights(weights: dict) -> dict:
    """Return a state dict under GPT-2's names, without causal masks, with the head that is wte."""
    found = {}
    for key, weight in weights.items():
        key = PREFIXES.sub("", key)
        if key in found:
            raise ValueError(f"there are two tensors {key}")
        if not key.endswith((".attn.bias", ".attn.masked_bias")):
            found[key] = weight
    wte = found.get("transformer.wte.weight")
    if wte is not None and not torch.equal(found.setdefault("lm_head.weight", wte), wte):
        raise ValueError("lm_head.weight is another matrix than transformer.wte.weight, in GPT-2 they are one")
    return found


def add_biases(weights: dict, shape: dict) -> None:
    """Add the biases, all zero, of a model that was trained without."""
    wte = weights["transformer.wte.weight"]
    sizes = {"attn.c_attn": 3 * shape["n_embd"], "mlp.c_fc": 4 * shape["n_embd"]}
    if shape["n_layer"] <= len(weights):
        for key in gpt2_keys(shape["n_layer"]) - weights.keys():
            if key.endswith(".bias"):
                size = next((size for part, size in sizes.items() if part in key), shape["n_embd"])
                weights[key] = torch.zeros(size, dtype=wte.dtype)


def explain_file(path, content=None) -> str:
    """Say what a file seems to be, and how to get a model out of it; empty if that cannot be told.

    `content` is what read_file() has made of it, if that was possible.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(4096)
    start = head[:16]
    if not head.strip(b"\0"):
        return "empty, as a copy or download that broke off leaves it: fetch it again"
    if head.startswith(LFS):
        return "Git LFS's note of a file that is not there yet: fetch it with git lfs pull"
    if start.startswith(b"GGUF"):
        return ("a GGUF file of llama.cpp: transformers reads many of them, from_pretrained(FOLDER, gguf_file=NAME), "
                "and writes a folder to name instead, save_pretrained('NEW_FOLDER')")
    if start.startswith(LLM_C):
        return ("weights of llm.c: its own dev/eval/export_hf.py --input FILE --output FOLDER makes a folder to name "
                "instead")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return f"weights in safetensors: name the folder, {path.parent}, which must hold config.json too"
    if start.startswith(b"\x89HDF"):
        return f"weights of TensorFlow: {SAVE_PRETRAINED}"
    if path.suffix == ".msgpack":
        return f"weights of Flax: {SAVE_PRETRAINED}"
    if ".ckpt." in path.name or path.suffix in (".index", ".meta"):
        return f"a part of a TensorFlow checkpoint: {explain_folder(path.parent) or 'convert it with transformers 4'}"
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return ("a pickle, perhaps of a PyTorch before 1.6: such a file can run code; if you trust it, load it with "
                f"the program that wrote it and save it with {SAVE_AS_NANOGPT}")
    if zipfile.is_zipfile(path) and content is not None:
        return explain_content(content, path)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:  # its list of files is damaged
            return ""
        if any(name.endswith("/constants.pkl") for name in names):
            return f"a TorchScript program: in the program that made it, {SAVE_AS_NANOGPT}"
        if not any(name.endswith("data.pkl") for name in names):
            return "an archive, but none of PyTorch's: unpack it and name what it holds"
    if kind_by_bytes(head) == ".html":
        return "a web page, such as a login or an error page saved in place of the model: fetch it again"
    if not re.search(rb"[\0-\x08\x0e-\x1f]", head):
        return f"text, not a model: for training, name it with --data {path}"
    return ""


def explain_content(content, path: Path) -> str:
    """Say what the content of a file of PyTorch's seems to be; empty if that cannot be told."""
    if isinstance(content, StandIn):
        return f"a whole object, {content.name}, not a state dict: in the program that made it, {SAVE_AS_NANOGPT}"
    keys = {key for key in content if isinstance(key, str)} if isinstance(content, dict) else set()
    if "pytorch-lightning_version" in keys:
        return f"a checkpoint of Lightning: load it with its own LightningModule, then {SAVE_AS_NANOGPT}"
    if {"state", "param_groups"} <= keys:
        return "the state of an optimizer, without a model: name the model's file or folder beside it"
    if path.name.startswith("pytorch_model") or any(key.endswith("attn.masked_bias") for key in keys):
        return f"weights of transformers in the old form: {SAVE_PRETRAINED}"
    weights = content if is_weights(content) else next(
        (content[key] for key in ("model", "state_dict", "model_state_dict", "module", "model_states")
         if key in keys and is_weights(content[key])), None)
    if weights is None:
        return ""
    names = {PREFIXES.sub("", str(key)).removeprefix("model.") for key in weights}
    if any(name.endswith("h.0.attn.c_attn.weight") for name in names):
        return ("the weights of a GPT-2 without its shape, and the number of heads cannot be told from them: save them "
                f"as nanoGPT does, {SAVE_AS_NANOGPT}")
    return f"the weights of another architecture: there is {sorted(names)[0]!r}, which GPT-2 does not have"


def explain_folder(folder) -> str:
    """Say what a folder seems to hold that is neither a run nor a transformers folder; empty if it cannot be told."""
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir())
    curriculum = [name for name in names if re.fullmatch(r"model_\d{1,5}\.pt", name)]
    if curriculum:
        newest = max(curriculum, key=lambda name: int(name[6:-3]))
        return f"its {newest} seems to be a checkpoint of build-nanogpt: name {folder / newest}"
    if "ckpt.pt" in names:
        return f"its ckpt.pt seems to be a checkpoint of nanoGPT: name {folder / 'ckpt.pt'}"
    if "adapter_config.json" in names:
        return ("it holds an adapter (LoRA) without the model that it changes: load both with peft, then "
                "merge_and_unload() and save_pretrained('NEW_FOLDER')")
    if "hparams.json" in names or any(".ckpt." in name or ".data-0000" in name for name in names):
        return ("it seems to be a TensorFlow checkpoint, as OpenAI's first release and gpt-2-simple have: transformers "
                "4 converts it, python -m transformers.models.gpt2.convert_gpt2_original_tf_checkpoint_to_pytorch")
    if any(name.endswith(".distcp") for name in names):
        return (f"it is a distributed checkpoint of PyTorch: python -m torch.distributed.checkpoint.format_utils "
                f"dcp_to_torch {folder} FILE.pt makes one file of it")
    weights = [name for name in names if re.fullmatch(r".*\.safetensors|(pytorch|tf|flax)_model.*\.\w+", name)]
    if weights:
        return f"there is {weights[0]}, but config.json is missing: copy it from where the weights come from"
    files = [name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".gguf"))]
    return f"there is {files[0]}: name that file" if files else ""
