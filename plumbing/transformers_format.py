"""GPT-2 in transformers' layout: read, from a folder or from OpenAI by name, and written, with hashes of the files.

    read_transformers(name_or_folder)   (shape, weights) of a GPT-2
    write_transformers(folder, ...)     the other way round
    check_sums, write_sums              SHA256SUMS of an exported folder
"""
import json
import os
import re
from pathlib import Path

import torch

from plumbing import hub_files, published
from plumbing.file_kinds import LFS, NOT_FETCHED
from plumbing.files import CheckpointError, check_inside, first_line, sha256
from plumbing.progress import busy

SETTINGS = {  # of GPT-2's config.json: with another value it is another model
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
}
CLASSES = ("GPT2LMHeadModel", "GPT2Model")  # the same weights, with and without the head that is wte
TANH_GELU = (  # five names of one formula
    "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast",
)
REFUSED = ("add_cross_attention", "is_encoder_decoder", "pruned_heads", "quantization_config", "auto_map")
ALIASES = {  # of transformers, for the same settings
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
OTHER_WEIGHTS = (".bin", ".safetensors", ".h5", ".msgpack", ".gguf", ".pt", ".onnx", ".ot")
SUMS = "SHA256SUMS"  # of an exported folder
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # matrices that transformers keeps as (in, out)


def read_transformers(name_or_folder) -> tuple[dict, dict]:
    """Read a GPT-2 in transformers' layout -> (shape, weights): GPTConfig's fields, and a state dict.

    Takes a folder with config.json and model.safetensors, whole or in parts, or one of OpenAI's names, which
    huggingface_hub downloads. Raises CheckpointError if it cannot be had, or if anything in it says that it is not a
    GPT-2 as train_gpt2.GPT computes it.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = download_openai(str(name_or_folder))
    try:
        check_inside(folder / "config.json")
        with busy(f"checking {folder}"):
            check_sums(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = read_shape(settings)
        if (folder / "adapter_config.json").exists():
            raise ValueError("there is adapter_config.json, an adapter (LoRA) that changes the model: load both with "
                             "peft, then merge_and_unload() and save_pretrained('NEW_FOLDER')")
        with busy(f"reading {folder}"):
            weights = read_weights(folder)
        if not settings.get("tie_word_embeddings", True) and "lm_head.weight" not in weights:
            raise ValueError("tie_word_embeddings is False, but there is no lm_head.weight")
        wte = weights["transformer.wte.weight"]
        head = weights.setdefault("lm_head.weight", wte)
        if head is not wte and not torch.equal(head, wte):
            raise ValueError("lm_head.weight is another matrix than wte.weight, in GPT-2 they are one")
        weights["lm_head.weight"] = wte
        check_weights(weights, shape["n_layer"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "  # the others are not ours
        raise CheckpointError(
            f"{folder} holds no GPT-2 in transformers' layout: {kind}{first_line(error)}") from error
    return shape, weights


def read_shape(settings: dict) -> dict:
    """Return GPTConfig's fields from config.json. Raises ValueError if it describes another model, or KeyError."""
    kind, classes = settings.get("model_type", "gpt2"), settings.get("architectures") or []
    if kind != "gpt2":
        raise ValueError(f"its model_type is {kind!r}, not 'gpt2'")
    if other := [name for name in classes if name not in CLASSES]:
        raise ValueError(f"it is a {other[0]}, not a GPT2LMHeadModel")
    for key, value in SETTINGS.items():
        found = settings.get(key, value)
        if key == "activation_function":
            found = value if found in TANH_GELU else found
        if found != value and key != "tie_word_embeddings":  # that is for the tensors to show
            raise ValueError(f"{key} is {found!r}, GPT-2's is {value!r}")
    for key in REFUSED:
        if settings.get(key):
            raise ValueError(f"{key} is {settings[key]!r:.100}, GPT-2 has none")
    for key, alias in ALIASES.items():
        if settings.get(alias, settings.get(key)) != settings.setdefault(key, settings.get(alias)):
            raise ValueError(f"{key} is {settings[key]!r}, but {alias}, its other name, is {settings[alias]!r}")
    shape = {key: int(settings[key]) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    shape["block_size"] = int(settings["n_positions"])
    if settings.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise ValueError(f"n_inner is {settings['n_inner']!r}, GPT-2's is 4 * n_embd")
    return shape


def read_weights(folder: Path) -> dict:
    """Read the tensors of a folder under GPT-2's names, with matrices as nn.Linear keeps them."""
    weights = {}
    for key, weight in read_safetensors(folder).items():
        name = key.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal masks of older versions
        if name != "lm_head.weight":
            name = "transformer." + name
        if name in weights:
            raise ValueError(f"there are two tensors {name}")
        weights[name] = weight.t() if name.endswith(CONV1D) else weight
    return weights


def gpt2_keys(n_layer: int) -> set[str]:
    """Return the names of GPT-2's tensors in a state dict of train_gpt2.GPT."""
    parts = [f"{part}.{kind}" for kind in ("weight", "bias")
             for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")]
    blocks = {f"transformer.h.{i}.{part}" for i in range(n_layer) for part in parts}
    ends = ("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias")
    return {*blocks, *ends, "lm_head.weight"}


def check_weights(weights: dict, n_layer: int) -> None:
    """Raise ValueError unless these are exactly the tensors of a GPT-2 with so many layers, in floating point."""
    if n_layer > len(weights):  # what is absurd is refused before it is listed
        raise ValueError(f"there are {len(weights)} tensors for {n_layer} layers")
    expected = gpt2_keys(n_layer)
    if extra := sorted(weights.keys() - expected):
        raise ValueError(f"there is a tensor {extra[0]}, which a GPT-2 of {n_layer} layers does not have")
    if missing := sorted(expected - weights.keys()):
        raise ValueError(f"there is no tensor {missing[0]}, which a GPT-2 of {n_layer} layers has")
    for name, weight in weights.items():
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} is {str(weight.dtype).removeprefix('torch.')}, which is not read: save the model "
                             "in float32")


def read_safetensors(folder: Path) -> dict:
    """Read all tensors of a folder's model.safetensors, or those that its index lists, each from its part."""
    name = "model.safetensors"
    if (folder / name).exists() or os.path.lexists(folder / name):
        return read_part(folder / name)
    index = folder / f"{name}.index.json"
    check_inside(index)
    if not index.exists():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_WEIGHTS)
        can_run = ", which can run code," if others and others[0].endswith(".bin") else ""
        raise ValueError(f"there is {others[0]}{can_run} but no model.safetensors: load it with transformers and "
                         "save_pretrained('NEW_FOLDER')" if others else "there is no model.safetensors")
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"its index names {outside[0]!r}, a file in another folder")
    weights = {}
    for name in names:
        part = read_part(folder / name)
        own = {key for key, place in listed.items() if place == name}
        if part.keys() != own:
            raise ValueError(f"{name} and {index.name} disagree on {sorted(part.keys() ^ own)[0]}")
        weights |= part
    return weights


def read_part(path: Path) -> dict:
    """Read one file of tensors. Raises ValueError if it is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_inside(path)
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(f"{path.name}: {NOT_FETCHED}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not whole: {first_line(error)}: fetch or copy it again") from error


def check_sums(folder: Path) -> None:
    """Raise ValueError if a file that the folder's SHA256SUMS lists has changed; exports have such a list."""
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
    """Write SHA256SUMS of all files in the folder, in the format of sha256sum."""
    sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")


def write_transformers(folder, shape: dict, weights: dict, generation: dict) -> None:
    """Write config.json, generation_config.json and model.safetensors for transformers and read_transformers().

    `shape` are GPTConfig's fields and `weights` the state dict, from which lm_head is left out, as it is wte.
    `generation` are settings for both configurations. Raises OSError if the files cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    settings = {**SETTINGS, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32",
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
    """Download OpenAI's model, at a pinned revision, and return its folder.

    Raises CheckpointError if it cannot be had, or if it is not what OpenAI has published.
    """
    if name not in published.MODELS:
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        hub = f"; one of the hub: hf download {name} --local-dir FOLDER" if on_hub else ""
        raise CheckpointError(
            f"no model {name!r}: name a folder, a .pt file or one of {', '.join(published.MODELS)}{hub}")
    revision, known = published.MODELS[name]
    try:
        folder = hub_files.download_model(f"openai-community/{name}", revision, ("config.json", "model.safetensors"))
    except Exception as error:  # the hub's client has dozens of errors for "no network"
        raise CheckpointError(
            f"cannot download {name} from the Hugging Face hub: check the network, or name a folder that holds its "
            f"config.json and model.safetensors ({type(error).__name__}: {first_line(error)})") from error
    path = folder / "model.safetensors"
    with busy(f"checking {path.name}"):
        found = sha256(path) if known else known
    if found != known:
        raise CheckpointError(f"{path} is not OpenAI's {name}, whose sha256 begins with {known[:12]}: delete "
                              f"{folder.parent.parent} and give the command again, without HF_ENDPOINT if that names "
                              "another hub")
    return folder
