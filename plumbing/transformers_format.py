"""GPT-2 in transformers' layout: read, from a folder or from OpenAI by name, and written, with hashes of the files.

    read_transformers(name_or_folder)   (shape, weights) of a GPT-2
    write_transformers(folder, ...)     the other way round
    check_sums, write_sums              SHA256SUMS of an exported folder
"""
import json
import re
from pathlib import Path

from plumbing import published
from plumbing.files import CheckpointError, check_inside, first_line, sha256

SETTINGS = {  # of GPT-2's config.json: with another value it is another model
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
}
SUMS = "SHA256SUMS"  # of an exported folder
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # matrices that transformers keeps as (in, out)


def read_transformers(name_or_folder) -> tuple[dict, dict]:
    """Read a GPT-2 in transformers' layout -> (shape, weights): GPTConfig's fields, and a state dict.

    Takes a folder with config.json and model.safetensors, whole or in parts, or one of OpenAI's names, which
    huggingface_hub downloads. Raises CheckpointError if it cannot be had or is not a GPT-2.
    """
    from safetensors import SafetensorError

    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = download_openai(str(name_or_folder))
    try:
        check_inside(folder / "config.json")
        check_sums(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, value in SETTINGS.items():
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


def read_safetensors(folder: Path) -> dict:
    """Read all tensors of a folder's model.safetensors, or of the parts that its index lists."""
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
    """Download OpenAI's model and return its folder. Raises CheckpointError if it cannot be had."""
    if name not in published.MODELS:
        raise CheckpointError(f"no model {name!r}: name a folder, a .pt file or one of {', '.join(published.MODELS)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # the hub's client has dozens of errors for "no network"
        raise CheckpointError(
            f"cannot download {name} from the Hugging Face hub: check the network, or name a folder that holds its "
            f"config.json and model.safetensors ({type(error).__name__}: {first_line(error)})") from error
