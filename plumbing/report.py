"""The verdict on a run, from its log: report.md beside it, and the model card of an exported model.

    write_report(folder)        report.md, as training writes it at its end
    model_card(name, ...)       README.md of an exported folder
    verdict(folder, lines)      the line on top of both

A loss is compared only where it is of the same tokens: with what `--init_from gpt2 --max_steps 0` measured on the
run's own validation split, or with the published one where the data's manifest shows the source that it belongs to.
Numbers are compared as they are printed, with four decimals.
"""
import json
import math
import os
import shlex
import statistics
from pathlib import Path

from plumbing import curve
from plumbing.cli import clock
from plumbing.curve import OPENAI_HELLASWAG, OPENAI_LOSS, last
from plumbing.files import open_new
from plumbing.shards import FINEWEB_EDU

PUBLISHED_TOKENS = 10_485_760  # of validation, in windows of 1,024, behind OPENAI_LOSS
HELLASWAG_EXAMPLES = 10_042  # behind OPENAI_HELLASWAG
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}


def openai_loss(folder: Path, run: dict) -> tuple[float, str] | None:
    """(loss in nats a token, where it is from) of OpenAI's GPT-2 124M on the validation tokens of a run, if known."""
    data, T = run["data"], run["config"]["sequence_length"]
    tokens, seen, measured = data.get("val_sha256"), None, None
    for line in curve.read_log(folder / "eval.jsonl") if (folder / "eval.jsonl").is_file() else []:
        if line["kind"] == "run":
            seen = line
        elif line["kind"] == "val" and line.get("loss") is not None and tokens and seen:
            same = seen["data"].get("val_sha256") == tokens and seen["config"].get("sequence_length") == T
            if same and seen.get("origin") == "OpenAI's gpt2":  # not a folder of that name
                measured = line["loss"], f"measured on the same tokens, {seen['config'].get('dtype')}"
    if measured:
        return measured
    if data.get("source") == FINEWEB_EDU and data.get("val_tokens") == PUBLISHED_TOKENS and T == 1024:
        return OPENAI_LOSS, "published for the same source, commit and tokens"
    return None


def verdict(folder: Path, lines: list[dict]) -> str:
    """Reproduced, or by how much not, or why that cannot be said: one line."""
    run, val, scored = last(lines, "run"), last(lines, "val").get("loss"), last(lines, "hellaswag")
    config, shape = run["config"], run["model"]
    if not curve.is_fineweb_edu(lines):
        return "No reference exists for the loss on this data: GPT-2's is known for FineWeb-Edu only."
    if any(shape.get(key) != GPT2[key] for key in GPT2) or config["sequence_length"] != GPT2["block_size"]:
        return "No reproduction of GPT-2 124M: the model has another shape, or was trained on other windows."
    if config["init_from"]:
        return f"No reproduction: the run began with the weights of {config['init_from']}."
    reference = openai_loss(folder, run)
    if reference is None:
        command = shlex.join(["python", "train_gpt2.py", "--init_from", "gpt2", "--max_steps", "0", "--data",
                              config["data"], "--val_tokens", str(config["val_tokens"]),
                              "--out_dir", config["out_dir"]])
        return (f"No verdict: OpenAI's loss on this validation split is not known; `{command}` measures it, and the "
                "training command given again then writes this file anew.")
    if val is None:
        return "Not reproduced: the run has no validation loss."
    apart = round(val, 4) - round(reference[0], 4)
    side = "above" if apart > 0 else "below"
    text = f"validation loss {val:.4f}, {abs(apart):.4f} {side} OpenAI's {reference[0]:.4f}"
    right = apart <= 0
    if scored.get("n") == HELLASWAG_EXAMPLES and scored["acc_norm"] is not None:
        apart = round(scored["acc_norm"], 4) - OPENAI_HELLASWAG
        right = right and apart >= 0
        text += (f"; HellaSwag {scored['acc_norm']:.2%}, {abs(100 * apart):.2f} points "
                 f"{'below' if apart < 0 else 'above'} {OPENAI_HELLASWAG:.2%}")
    else:
        text += "; HellaSwag was not measured on all examples"
    return f"{'Reproduced' if right else 'Not reproduced'}: {text}."


def table(head: list[str], rows: list[list[str]]) -> str:
    """Rows of cells as Markdown."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def results(folder: Path, lines: list[dict]) -> str:
    """What was reached, beside OpenAI's numbers where they may be compared: a table."""
    run, val, scored, rows = last(lines, "run"), last(lines, "val"), last(lines, "hellaswag"), []
    loss = openai_loss(folder, run) if curve.is_fineweb_edu(lines) else None
    if val.get("loss") is not None:
        rows.append(["validation loss, nats a token", f"{val['loss']:.4f} after {val['step']:,} steps",
                     f"{loss[0]:.4f}, {loss[1]}" if loss else "not known for these tokens"])
    if scored.get("acc_norm") is not None:
        p, n = scored["acc_norm"], scored["n"]
        rows.append(["HellaSwag acc_norm, completion style",
                     f"{p:.2%} ± {math.sqrt(p * (1 - p) / max(1, n - 1)):.2%} on {n:,} examples after "
                     f"{scored['step']:,} steps", f"{OPENAI_HELLASWAG:.2%} on {HELLASWAG_EXAMPLES:,}, published"])
    return table(["", "this run", "OpenAI's GPT-2 124M"], rows)


def facts(lines: list[dict]) -> str:
    """What ran, on what, for how long: a table."""
    run, train = last(lines, "run"), [line for line in lines if line["kind"] == "train"]
    config, data, shape = run["config"], run["data"], run["model"]
    sessions = [line for line in lines if line["kind"] == "run"]
    rows = [["data", config["data"] + (f", made of {data['source']}" if data.get("source") else "")]]
    if shape:
        rows.insert(0, ["model", f"{shape['n_layer']} layers, {shape['n_head']} heads, {shape['n_embd']} channels, "
                                 f"{shape['block_size']:,} positions, from {sessions[0].get('origin')}"])
    if train:
        final, hours = train[-1], sum(line["dt_ms"] for line in train) / 3.6e6
        speed, mfu = (statistics.median([line[key] for line in train if line.get(key) is not None] or [math.nan])
                      for key in ("tok_per_s", "mfu"))
        rows += [
            ["tokens", f"{final['tokens']:,} in {final['step']:,} steps of {config['total_batch_size']:,}, windows of "
                       f"{config['sequence_length']:,}"],
            ["training loss", f"{curve.final_train_loss(lines):.4f}, mean of the last {min(20, len(train))} steps"],
            ["optimizer", f"{config['optimizer']}, learning rate {config['max_lr']:g} to {config['min_lr']:g} after "
                          f"{config['warmup_steps']:,} steps of warm-up, weight decay {config['weight_decay']:g}, "
                          f"gradients clipped to {config['grad_clip']:g}"],
            ["time", f"{hours:.3g} hours ({clock(3600 * hours)}) of steps, evaluation not counted"],
            ["speed", f"{speed:,.0f} tokens/s, MFU {mfu:.1%}, medians"],
        ]
        if skipped := sum(line.get("skipped", False) for line in train):
            rows.append(["skipped steps", f"{skipped}, their loss or gradient was not finite"])
    ranks = f", {run['ranks']} ranks" if run.get("ranks", 1) > 1 else ""
    rows += [["device", f"{run['device']}{ranks}; {config['dtype']}, {'' if config['compile'] else 'not '}compiled"],
             ["versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)]]
    if run.get("command"):
        times = f" ({len(sessions)} times: it was resumed)" if len(sessions) > 1 else ""
        rows.append(["command", f"`{run['command']}`{times}"])
    return table(["", ""], rows)


def not_measured(lines: list[dict]) -> str:
    """What a reader might look for and will not find: one line."""
    missing = [name for kind, name in (("val", "validation loss"), ("hellaswag", "HellaSwag")) if not last(lines, kind)]
    return "Not measured: " + ", ".join([*missing, "any other benchmark", "bias, toxicity and memorised text"]) + "."


def write_report(folder) -> Path:
    """Write report.md into a run's folder, from its log -> its path; OSError where that cannot be done."""
    folder = Path(folder)
    lines = curve.read_log(folder)
    picture = "![training and validation loss](loss.png)\n\n" if (folder / "loss.png").exists() else ""
    text = (f"# {folder}\n\n**{verdict(folder, lines)}**\n\n{picture}{results(folder, lines)}\n\n{facts(lines)}\n\n"
            f"{not_measured(lines)}\n")
    path, temporary = folder / "report.md", folder / "report.md.tmp"
    try:
        with open_new(temporary) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))  # names of files may be no text
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def model_card(name: str, source: str, parameters: int, folder: Path | None, step: int) -> str:
    """README.md of a model exported from `source`: what it is, and what the log in `folder` says of it up to `step`."""
    data, about = "", f"No log of its training could be read. {not_measured([])}\n"
    try:
        lines = [line for line in curve.read_log(folder) if line.get("step", 0) <= step] if folder else []
        if lines:
            about = (f"{verdict(folder, lines)}\n\n## Results\n\n{results(folder, lines)}\n\n{not_measured(lines)}\n"
                     f"\n## Training\n\n{facts(lines)}\n")
            data = "datasets: [HuggingFaceFW/fineweb-edu]\nlanguage: en\n" if curve.is_fineweb_edu(lines) else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        pass  # a log of another program or version: the model is exported all the same
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2]
{data}---

# {name}

A GPT-2 with {parameters:,} parameters and GPT-2's tokenizer, exported from {source}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})  # the path to this folder
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
```

{about}"""
