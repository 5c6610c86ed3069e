"""Export a checkpoint as a folder that transformers, lm-eval and the tools around them can load.

    python export_hf.py log out/                     # the newest checkpoint of a run
    python export_hf.py log/model_019073.pt out/     # a particular one

    AutoModelForCausalLM.from_pretrained("out/"), AutoTokenizer.from_pretrained("out/")
    lm_eval --model hf --model_args pretrained=out/ --tasks hellaswag

The folder holds config.json, generation_config.json, model.safetensors (with 50,257 rows, without those that pad the
vocabulary), the tokenizer's files, SHA256SUMS of all these, and a model card, README.md, made from the run's log. It
appears only after its files have been loaded again, with transformers if that is installed, and have given the same
logits as the checkpoint.
"""
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from plumbing import checkpoint, report, transformers_format
from plumbing.cli import UserError, check_values, parse_flags, run_command
from plumbing.tokenizer import EOT, VOCAB_SIZE, vocabulary_files
from train_gpt2 import GPT

TOLERANCE = 1e-4  # largest accepted difference between two logits, computed in float64
END = "<|endoftext|>"


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to. Raises UserError for a value out of its range."""
    model: str  # run folder, .pt file, transformers folder, or OpenAI's gpt2 to gpt2-xl
    out: str  # new folder; one that exists is left alone

    def __post_init__(self):
        check_values(self)


def write_tokenizer(folder: Path, block_size: int) -> None:
    """Write GPT-2's tokenizer in transformers' layout, from OpenAI's own files."""
    files = vocabulary_files()
    shutil.copyfile(files["encoder.json"], folder / "vocab.json")
    shutil.copyfile(files["vocab.bpe"], folder / "merges.txt")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
                "bos_token": END, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def logits_of(model, idx: torch.Tensor) -> torch.Tensor:
    """Compute logits in float64, in which only a difference of the weights shows: idx (1, T) -> (1, T, 50257)."""
    result = model.double()(idx)
    logits = getattr(result, "logits", result)  # transformers' models return them in an object
    return logits[..., :VOCAB_SIZE]


def load_again(folder: Path):
    """Load the model in `folder` with transformers, or with GPT.load if that is missing; return it and the loader."""
    if not find_spec("transformers"):
        return GPT.load(folder), "train_gpt2.py itself, as transformers is not installed"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), f"transformers {transformers.__version__}"


def export(model: GPT, folder: Path, card: str) -> str:
    """Write the model into an empty folder, load it again, and return what to print.

    `model` is of no use afterwards: its memory is given to the one that is loaded. Raises UserError if the two give
    different logits.
    """
    shape = asdict(model.config)
    weights = {**model.state_dict(), "transformer.wte.weight": model.transformer.wte.weight[:VOCAB_SIZE].detach()}
    transformers_format.write_transformers(folder, {**shape, "vocab_size": VOCAB_SIZE}, weights,
                                           {"bos_token_id": EOT, "eos_token_id": EOT})
    write_tokenizer(folder, shape["block_size"])
    transformers_format.write_sums(folder)  # without the model card, which people edit
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8
    # one random token per position
    idx = torch.randint(0, VOCAB_SIZE, (1, shape["block_size"]), generator=torch.Generator().manual_seed(0))  # (1, T)
    expected = logits_of(model, idx)  # (1, T, V)
    del weights
    model.to("meta")
    loaded, loader = load_again(folder)
    difference = (logits_of(loaded, idx) - expected).abs().max().item()
    if not difference <= TOLERANCE:  # nan too
        raise UserError(f"the exported model gives other logits, by up to {difference:.1e}, and was deleted: check "
                        "that the weights of the model are finite, and that the disk is sound")
    return f"loaded again by {loader}, its logits differ by at most {difference:.1e}"


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    config = ExportConfig(**parse_flags(ExportConfig, argv, "Export a model for transformers.", ("model", "out")))
    source, out = config.model, Path(config.out).absolute()
    if os.path.lexists(out):
        raise UserError(f"{config.out} exists already: name a new folder")
    state = checkpoint.find(source)
    model = GPT.load(state or source)
    padding = model.config.vocab_size - VOCAB_SIZE
    if padding < 0:
        raise UserError(f"{source} has {model.config.vocab_size} tokens, too few for GPT-2's encoding")
    log, step = None, 0  # the folder with the run's log, and how much of it is about this checkpoint
    if state:
        log = Path(source).parent if Path(source).suffix == ".pt" else Path(source)
        step = state["step"]
    parameters = model.count_parameters() - padding * model.config.n_embd
    card = report.model_card(out.name, source, parameters, log, step)
    del state  # the optimizer's moments are not exported
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot make the folder {temporary} ({error.strerror}): name another one") from error
    try:
        result = export(model, temporary, card)
        os.replace(temporary, out)
    except OSError as error:
        if not error.strerror:  # the message itself says what to do
            raise
        raise UserError(f"cannot write {out} ({error.strerror}): free space, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{config.out}: {result}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
