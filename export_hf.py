"""A checkpoint -> a folder that transformers, lm-eval and the tools around them load.

    python export_hf.py log out/                     # a run's newest checkpoint
    python export_hf.py log/model_019073.pt out/     # or a certain one

    AutoModelForCausalLM.from_pretrained("out/"), AutoTokenizer.from_pretrained("out/")
    lm_eval --model hf --model_args pretrained=out/ --tasks hellaswag

The folder gets config.json, generation_config.json, model.safetensors (50,257 rows: those that pad the vocabulary are
dropped), the tokenizer's files, SHA256SUMS of these, and a model card, README.md, filled from the run's log. It appears
only when what was written has been loaded again, by transformers where that is installed, and gives the logits of the
checkpoint.
"""
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from plumbing import checkpoint, report
from plumbing.cli import UserError, parse_flags, run_command
from plumbing.tokenizer import EOT, VOCAB_SIZE, vocabulary_files
from train_gpt2 import GPT, load_model, load_state, model_with

TOLERANCE = 1e-4  # largest difference of a logit, computed in float64, that is accepted
END = "<|endoftext|>"


@dataclass
class ExportConfig:
    """What to export, and whereto."""

    model: str  # a run's folder, a .pt file, a transformers folder, or OpenAI's gpt2 ... gpt2-xl
    out: str  # folder to make; it must not be there


def write_tokenizer(folder: Path, block_size: int) -> None:
    """GPT-2's tokenizer in transformers' layout, from OpenAI's own files."""
    files = vocabulary_files()
    shutil.copyfile(files["encoder.json"], folder / "vocab.json")
    shutil.copyfile(files["vocab.bpe"], folder / "merges.txt")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
                "bos_token": END, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def logits_of(model, idx: torch.Tensor) -> torch.Tensor:
    """idx (1, T) -> logits (1, T, 50257) in float64, so that a difference is the weights' and not the rounding's."""
    result = model.double()(idx)
    logits = result[0] if isinstance(result, tuple) else result.logits  # ours or transformers'
    return logits[..., :VOCAB_SIZE]


def load_again(folder: Path):
    """(the model in `folder`, who loaded it): transformers where it is installed, else our own reader."""
    if not find_spec("transformers"):
        return load_model(folder), "train_gpt2.py itself, as transformers is not installed"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), f"transformers {transformers.__version__}"


def export(model: GPT, folder: Path, card: str) -> str:
    """Write the model into an empty folder -> what to say; UserError where it is another one then. Uses `model` up."""
    shape = asdict(model.config)
    weights = {**model.state_dict(), "transformer.wte.weight": model.transformer.wte.weight[:VOCAB_SIZE].detach()}
    checkpoint.write_transformers(folder, {**shape, "vocab_size": VOCAB_SIZE}, weights,
                                  {"bos_token_id": EOT, "eos_token_id": EOT})
    write_tokenizer(folder, shape["block_size"])
    checkpoint.write_sums(folder)  # not of the model card, which people edit
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names may be no text
    # random tokens at every position, through both
    idx = torch.randint(0, VOCAB_SIZE, (1, shape["block_size"]), generator=torch.Generator().manual_seed(0))  # (1, T)
    expected = logits_of(model, idx)  # (1, T, V)
    del weights
    model.to("meta")  # room for the one to compare with
    loaded, loader = load_again(folder)
    difference = (logits_of(loaded, idx) - expected).abs().max().item()
    if not difference <= TOLERANCE:  # nan too
        raise UserError(f"what was written gives other logits, by up to {difference:.1e}, and was deleted: is a weight "
                        "of the model not finite, or the disk failing?")
    return f"largest difference of a logit {difference:.1e} (loaded again by {loader})"


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    config = ExportConfig(**parse_flags(ExportConfig, argv, "Export a model for transformers.", ("model", "out")))
    source, out = config.model, Path(config.out).absolute()
    if os.path.lexists(out):
        raise UserError(f"{config.out} is there already: name a new folder")
    state = load_state(source)
    model = model_with(state["model_config"], state["model"], source) if state else GPT.from_pretrained(source)
    padding = model.config.vocab_size - VOCAB_SIZE
    if padding < 0:
        raise UserError(f"{source} has {model.config.vocab_size} tokens, too few for GPT-2's encoding")
    log = (Path(source).parent if Path(source).suffix == ".pt" else Path(source)) if state else None
    parameters = model.count_parameters() - padding * model.config.n_embd
    card = report.model_card(out.name, source, parameters, log, state["step"] if state else 0)
    del state  # the optimizer's moments are not exported
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot make the folder {temporary} ({error.strerror}): name another one") from error
    try:
        said = export(model, temporary, card)
        os.replace(temporary, out)
    except OSError as error:
        if not error.strerror:  # it says itself what to do
            raise
        raise UserError(f"cannot write {out} ({error.strerror}): free space, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{config.out}: {said}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
