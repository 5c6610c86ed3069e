"""A checkpoint -> a folder that transformers, lm-eval and the tools around them load.

    python export_hf.py log out/                     # a run's newest checkpoint
    python export_hf.py log/model_019073.pt out/     # or a certain one

    AutoModelForCausalLM.from_pretrained("out/"), AutoTokenizer.from_pretrained("out/")
    lm_eval --model hf --model_args pretrained=out/ --tasks hellaswag

The folder gets config.json, generation_config.json, model.safetensors (50,257 rows: those that pad the vocabulary are
dropped), the tokenizer's files and a model card, README.md, filled from the run's log. It appears only when what was
written has been loaded again, by transformers where that is installed, and gives the logits of the checkpoint.
"""
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

import checkpoint
import report
from runlog import UserError, parse_flags, run_command
from tokenizer import EOT, vocabulary_files
from train_gpt2 import GPT, VOCAB_SIZE, load_model, load_state, model_with

TOLERANCE = 1e-4  # largest difference of a logit, computed in float64, that is accepted
END = "<|endoftext|>"


@dataclass
class ExportConfig:
    """What to export, and whereto."""

    model: str  # a run's folder, a .pt file, a transformers folder, or OpenAI's gpt2 ... gpt2-xl
    out: str  # folder to make


def write_tokenizer(folder: Path, block_size: int) -> None:
    """GPT-2's tokenizer in transformers' layout, from OpenAI's own files."""
    files = vocabulary_files()
    shutil.copyfile(files["encoder.json"], folder / "vocab.json")
    shutil.copyfile(files["vocab.bpe"], folder / "merges.txt")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
                "bos_token": END, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def largest_difference(model: GPT, folder: Path) -> tuple[float, str]:
    """(largest difference of any logit between `model` and what `folder` loads as, who loaded it).

    Of random tokens at every position, in float64, so that what is seen is the weights' and not the rounding's.
    """
    idx = torch.randint(0, VOCAB_SIZE, (1, model.config.block_size), generator=torch.Generator().manual_seed(0))
    expected = model.double()(idx)[0][..., :VOCAB_SIZE]  # (1, T, V)
    if find_spec("transformers"):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().double()
        return (loaded(idx).logits - expected).abs().max().item(), f"transformers {transformers.__version__}"
    loaded = load_model(folder).double()
    return (loaded(idx)[0] - expected).abs().max().item(), "train_gpt2.py itself, as transformers is not installed"


def export(source: str, folder: Path, name: str) -> str:
    """Write the model, named `name`, into an empty folder -> what to say; UserError where it is another one then."""
    state = load_state(source)
    model = model_with(state["model_config"], state["model"], source) if state else GPT.from_pretrained(source)
    shape = asdict(model.config)
    if shape["vocab_size"] < VOCAB_SIZE:
        raise UserError(f"{source} has {shape['vocab_size']} tokens, too few for GPT-2's encoding")
    weights = {**model.state_dict(), "transformer.wte.weight": model.transformer.wte.weight[:VOCAB_SIZE].detach()}
    checkpoint.write_transformers(folder, {**shape, "vocab_size": VOCAB_SIZE}, weights,
                                  {"bos_token_id": EOT, "eos_token_id": EOT})
    write_tokenizer(folder, shape["block_size"])
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it is written for the owner alone
    log = (Path(source).parent if Path(source).suffix == ".pt" else Path(source)) if state else None
    parameters = model.count_parameters() - (shape["vocab_size"] - VOCAB_SIZE) * shape["n_embd"]
    card = report.model_card(name, source, parameters, log, state["step"] if state else 0)
    (folder / "README.md").write_text(card, encoding="utf-8")
    difference, loader = largest_difference(model, folder)
    if not difference <= TOLERANCE:  # nan too
        raise UserError(f"what was written gives other logits than {source}, by up to {difference:.1e}: it was deleted")
    return f"largest difference of a logit {difference:.1e} (loaded again by {loader})"


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    config = ExportConfig(**parse_flags(ExportConfig, argv, "Export a model for transformers.", ("model", "out")))
    out = Path(config.out).resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already: name a new folder")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        said = export(config.model, temporary, out.name)
        if out.is_dir():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        if isinstance(error, checkpoint.CheckpointError) or not error.strerror:
            raise
        raise UserError(f"cannot write {out} ({error.strerror}): free space, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{config.out}: {said}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
