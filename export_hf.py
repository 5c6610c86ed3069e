"""Export a checkpoint as a folder that transformers, lm-eval and the tools around them can load.

    python export_hf.py                              # the newest run below log/, to a folder such as out_demo_180/
    python export_hf.py log out/                     # the newest checkpoint of a certain run
    python export_hf.py log/model_019073.pt out/     # a particular one
    python export_hf.py log out/ --push_to_hub OWNER/NAME     # and upload it

    AutoModelForCausalLM.from_pretrained("out/"), AutoTokenizer.from_pretrained("out/")
    lm_eval --model hf --model_args pretrained=out/ --tasks hellaswag

The folder holds config.json, generation_config.json, model.safetensors (without the rows that pad a new model's
vocabulary to 50,304), the files of the model's tokenizer, SHA256SUMS of all these, and a model card, README.md, made
from the run's log. It appears only after its files have been loaded again, with transformers if that is installed, and
have given the same logits as the checkpoint.
"""
if __name__ == "__main__":
    from plumbing.cli import end_quietly
    end_quietly()  # on Ctrl-C, while PyTorch is imported

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from plumbing import models, newest, published, report, transformers_format, upload
from plumbing.cli import UserError, check_values, parse_flags, run_command
from plumbing.model_tokenizer import END, tokenizer_of
from plumbing.progress import busy
from plumbing.tokenizer import VOCAB_SIZE, vocabulary_files
from train_gpt2 import GPT, PADDED_VOCAB_SIZE

TOLERANCE = 1e-4  # largest accepted difference between two logits, computed in float64


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to. Raises UserError for a value out of its range."""
    # Arguments
    model: str = ""  # run folder, .pt file, transformers folder, or gpt2 to gpt2-xl (empty: the newest run below log/)
    out: str = ""  # new folder; one that exists is left alone (empty: out_RUN_STEP)
    # Upload
    push_to_hub: str = ""  # also upload the folder to the Hugging Face hub, as OWNER/NAME

    def __post_init__(self):
        check_values(self)


def write_tokenizer(folder: Path, block_size: int, tokenizer) -> None:
    """Copy the tokenizer that came with the model, or write GPT-2's in transformers' layout, from OpenAI's files."""
    if tokenizer.files:
        for path in tokenizer.files:
            shutil.copyfile(path, folder / path.name)
        return
    files = vocabulary_files()
    shutil.copyfile(files["encoder.json"], folder / "vocab.json")
    shutil.copyfile(files["vocab.bpe"], folder / "merges.txt")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
                "bos_token": END, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def logits_of(model, idx: torch.Tensor) -> torch.Tensor:
    """Compute logits in float64, in which only a difference of the weights shows: idx (1, T) -> (1, T, V)."""
    result = model.double()(idx)
    return getattr(result, "logits", result)  # transformers' models return them in an object


def load_again(folder: Path):
    """Load the model in `folder` with transformers, or with GPT.load if that is missing; return it and the loader."""
    if not find_spec("transformers"):
        return GPT.load(folder), "train_gpt2.py itself, as transformers is not installed"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), f"transformers {transformers.__version__}"


@busy("writing the model, loading it again and comparing the two")
def export(model: GPT, folder: Path, card: str, tokenizer, rows: int) -> str:
    """Write the model, with so many `rows` of vocabulary, into an empty folder and load it; return what to print.

    `model` is of no use afterwards: its memory is given to the one that is loaded. Raises UserError if the two give
    different logits.
    """
    shape = asdict(model.config)
    weights = {**model.state_dict(), "transformer.wte.weight": model.transformer.wte.weight[:rows].detach()}
    ends = sorted(tokenizer.ends)
    generation = {"bos_token_id": tokenizer.first, "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    transformers_format.write_transformers(folder, {**shape, "vocab_size": rows}, weights, generation)
    write_tokenizer(folder, shape["block_size"], tokenizer)
    transformers_format.write_sums(folder)  # without the model card, which people edit
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8
    # one random token per position
    idx = torch.randint(0, rows, (1, shape["block_size"]), generator=torch.Generator().manual_seed(0))  # (1, T)
    expected = logits_of(model, idx)[..., :rows]  # (1, T, rows)
    del weights
    model.to("meta")
    loaded, loader = load_again(folder)
    difference = (logits_of(loaded, idx) - expected).abs().max().item()
    if not difference <= TOLERANCE:  # nan too
        raise UserError(f"the exported model gives other logits, by up to {difference:.1e}, and was deleted: check "
                        "that the weights of the model are finite, and that the disk is sound")
    return f"loaded again by {loader}, its logits differ by at most {difference:.1e}"


def named_alone(flags: dict) -> dict:
    """Return the flags with a single name taken as `out` if no model has it: it is a new folder."""
    name = flags.get("model", "")
    if not name or "out" in flags or name in published.MODELS or name.endswith(".pt"):
        return flags
    if (Path(name) / "config.json").exists():  # rather an earlier export than what is to be exported
        refuse_existing(name)
    if os.path.exists(name) or newest.resembling(name):
        return flags
    return {**flags, "model": "", "out": name}


def refuse_existing(out: str) -> None:
    """Raise UserError if there is a file or folder of that name."""
    if out and os.path.lexists(out):
        raise UserError(f"{out} exists already: name a new folder, python export_hf.py MODEL NEW_FOLDER")


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    flags = parse_flags(ExportConfig, argv, "Export a model for transformers.", ("model", "out"))
    config = models.or_newest(ExportConfig(**named_alone(flags)), "python export_hf.py gpt2")
    if config.push_to_hub:
        upload.check_name(config.push_to_hub)
    source = config.model
    state = models.find(source)
    config = replace(config, out=config.out or newest.export_folder(source, state))
    refuse_existing(config.out)
    out = Path(config.out).absolute()
    tokenizer = tokenizer_of(state or source)
    model = GPT.load(state or source)
    rows = model.config.vocab_size
    if tokenizer.has_gpt2_tokens and rows < VOCAB_SIZE:
        raise UserError(f"{source} has {rows} tokens, too few for GPT-2's encoding")
    if state and rows == PADDED_VOCAB_SIZE:
        rows = VOCAB_SIZE  # the others pad it
    log, step, program = None, 0, ""  # the folder with the run's log, and how much of it is about this checkpoint
    if state and "program" in state:
        program = f", a checkpoint of {state['program']}"
    elif state:
        log = Path(source) if Path(source).is_dir() else Path(source).parent
        step = state["step"]
    parameters = model.count_parameters() - (model.config.vocab_size - rows) * model.config.n_embd
    card = report.model_card(out.name, source + program, parameters, log, step, tokenizer.name)
    del state  # the optimizer's moments are not exported
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot make the folder {temporary} ({error.strerror}): name another one") from error
    try:
        result = export(model, temporary, card, tokenizer, rows)
        os.replace(temporary, out)
    except OSError as error:
        if not error.strerror:  # the message itself says what to do
            raise
        raise UserError(f"cannot write {out} ({error.strerror}): free space, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{config.out}: {result}", flush=True)
    if config.push_to_hub:
        print(upload.push(out, config.push_to_hub, config.out))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
