"""The verdict on a run, from its log: report.md beside it, and the model card of an exported model.

    write_report(folder)        writes report.md, as training does at its end
    model_card(name, ...)       returns README.md of an exported folder
    result(lines)               returns the line on top of both: "validation loss 10.82 -> 4.74 in 180 steps"
    verdict(folder, lines)      returns the line below it

A run reproduces GPT-2 124M only if its model is that model (plumbing/reference.py has checked it), began with new
weights, and reached OpenAI's loss on the same tokens in windows of the same length. OpenAI's loss is the one that
`--init_from gpt2 --eval_only` has measured on the run's validation split, or the published one if the manifest of the
data shows the source that it belongs to. Numbers are compared as they are printed, with four decimals.
"""
import hashlib
import json
import shlex
import statistics
from pathlib import Path

from plumbing import accuracy, curve, published
from plumbing.cli import clock, plural
from plumbing.curve import last
from plumbing.files import atomic_write, set_aside
from plumbing.shards import FINEWEB_EDU


def openai_loss(folder: Path, run: dict) -> tuple[float, str] | None:
    """Return OpenAI's GPT-2 124M's loss on the validation tokens of a run, and where it is from; None if unknown."""
    data, T = run["data"], run["config"]["sequence_length"]
    tokens, evaluation, measured = data.get("val_sha256"), None, None
    for line in curve.read_log(folder / "eval.jsonl") if (folder / "eval.jsonl").is_file() else []:
        if line["kind"] == "run":
            evaluation = line
        elif line["kind"] == "val" and line.get("loss") is not None and tokens and evaluation:
            same_tokens = evaluation["data"].get("val_sha256") == tokens
            same_windows = evaluation["config"].get("sequence_length") == T
            # a folder of that name has another origin
            if same_tokens and same_windows and evaluation.get("origin") == "OpenAI's gpt2":
                measured = line["loss"], f"measured on the same tokens, {evaluation['config'].get('dtype')}"
    if measured:
        return measured
    same_tokens = data.get("source") == FINEWEB_EDU and data.get("val_tokens") == published.LOSS_TOKENS
    if same_tokens and T == published.LOSS_WINDOW:
        return published.LOSS, "published for the same source, commit and tokens"
    return None


def result(lines: list[dict]) -> str:
    """Say in a few words what the run has reached, and from where if its first validation was at its start."""
    vals = [line for line in lines if line["kind"] == "val" and line.get("loss") is not None]
    trained, steps = curve.final_train_losses(lines), last(lines, "train").get("step", 0)
    if not vals and not trained:
        return "no loss yet"
    if not vals:
        return f"training loss {statistics.fmean(trained):.2f} after {steps:,} {plural(steps, 'step')}"
    begin, end = vals[0], vals[-1]
    if begin["step"] == end["step"]:
        return f"validation loss {end['loss']:.2f} after {end['step']:,} {plural(end['step'], 'step')}"
    took = end["step"] - begin["step"]
    return f"validation loss {begin['loss']:.2f} -> {end['loss']:.2f} in {took:,} {plural(took, 'step')}"


def verdict(folder: Path, lines: list[dict]) -> str:
    """Say in one line whether the run is a reproduction, by how much it is not, or why that cannot be said."""
    if is_demo(lines):
        return demo_verdict(lines)
    if not curve.is_fineweb_edu(lines):
        return "No reference exists for the loss on this data: OpenAI's is known for FineWeb-Edu only."
    if obstacle := why_not_comparable(lines):
        return obstacle
    run, loss = last(lines, "run"), last(lines, "val").get("loss")
    reference = openai_loss(folder, run)
    if reference is None:
        config = run["config"]
        command = shlex.join(["python", "train_gpt2.py", "--init_from", "gpt2", "--eval_only", "--data",
                              config["data"], "--val_tokens", str(config["val_tokens"]),
                              "--out_dir", config["out_dir"]])
        return (f"No verdict: OpenAI's loss on this validation split is not known. `{command}` measures it; the "
                "training command, given again, then writes this file anew.")
    if loss is None:
        return "Not reproduced: the run has no validation loss."
    reached, text = compare(loss, last(lines, "hellaswag"), reference[0])
    branch = run["config"].get("branch_from")
    from_where = f" The run branched from {branch}." if branch else ""
    return f"{'Reproduced' if reached else 'Not reproduced'}: {text}.{from_where}"


def why_not_comparable(lines: list[dict]) -> str:
    """Say why a run on FineWeb-Edu is no reproduction, or cannot be known to be one; empty if it can be compared."""
    config, window = last(lines, "run")["config"], published.LOSS_WINDOW
    checks = [line.get("gpt2") for line in lines if line["kind"] == "run"]  # one per session
    if False in checks:
        return "No reproduction of GPT-2 124M: the model has another shape, or computes something else."
    if config["sequence_length"] != window:
        return (f"No reproduction of GPT-2 124M: the model was trained on windows of {config['sequence_length']:,} "
                f"tokens, not {window:,}.")
    began_with = initial_weights(config)
    if began_with is None:
        return (f"No verdict: the run branched from {config['branch_from']}, and no log beside that file tells which "
                "weights it began with. Put that run's log.jsonl there, and give the training command again.")
    if began_with:
        return f"No reproduction: the run began with the weights of {began_with}."
    if None in checks:
        command = shlex.join(["python", "train_gpt2.py", "--eval_only", "--data", config["data"],
                              "--out_dir", config["out_dir"]])
        return ("No verdict: the log was written by an earlier version, which did not check that the model is GPT-2 "
                f"124M. `{command}` evaluates its checkpoint with this version, to compare with OpenAI's loss; a new "
                "run, in another --out_dir, gets a verdict.")
    return ""


def initial_weights(config: dict) -> str | None:
    """Trace a run through those it branched from: what it took its first weights from, empty if they were new.

    Returns None if a log on the way cannot be read.
    """
    visited = set()
    while not config.get("init_from"):
        branch = config.get("branch_from")
        if not branch:
            return ""
        try:
            lines = curve.read_log(Path(branch).parent)
        except OSError:
            return None
        config = last(lines, "run").get("config")
        if not config or branch in visited:
            return None
        visited.add(branch)
    return config["init_from"]


def compare(loss: float, scored: dict, reference: float) -> tuple[bool, str]:
    """Compare a run with OpenAI's GPT-2: whether it is as good, and the numbers. `scored` is its HellaSwag line."""
    apart = round(loss, 4) - round(reference, 4)
    side = "above" if apart > 0 else "below"
    text = f"validation loss {loss:.4f}, {abs(apart):.4f} {side} OpenAI's {reference:.4f}"
    if scored.get("n") != published.HELLASWAG_EXAMPLES or scored["acc_norm"] is None:
        return apart <= 0, f"{text}; HellaSwag was not measured on all examples"
    known = published.HELLASWAG_ACC_NORM
    points = round(scored["acc_norm"], 4) - known
    side = "below" if points < 0 else "above"
    text += f"; HellaSwag {scored['acc_norm']:.2%}, {abs(100 * points):.2f} points {side} {known:.2%}"
    return apart <= 0 and points >= 0, text


def is_demo(lines: list[dict]) -> bool:
    """Return whether a run has the data of the demo and the settings that define its loss."""
    run, settings = last(lines, "run"), published.DEMO["settings"]
    config, data = run.get("config", {}), run.get("data", {})
    same_settings = {name: config.get(name) for name in settings} == settings
    return same_settings and data.get("val_sha256") == published.DEMO["val_sha256"]


def demo_is_as_expected(lines: list[dict]) -> bool | None:
    """Return whether the demo's final loss is as expected; None if the log is another run's or lacks it."""
    val = last(lines, "val")
    if not is_demo(lines) or val.get("step") != published.DEMO["settings"]["max_steps"]:
        return None
    return val.get("loss") is not None and abs(val["loss"] - published.DEMO["loss"]) <= published.DEMO["tolerance"]


def demo_verdict(lines: list[dict]) -> str:
    """Say in one line whether the demo went as expected, and what to do if not."""
    as_expected, loss = demo_is_as_expected(lines), last(lines, "val").get("loss")
    if as_expected is None:
        return f"No verdict yet: the demo ends after {published.DEMO['settings']['max_steps']} steps."
    reached = "no validation loss" if loss is None else f"validation loss {loss:.4f}"
    usual = f"{published.DEMO['loss']:.2f} +- {published.DEMO['tolerance']:.2f}"
    if as_expected:
        return f"As expected: {reached}; the demo gives {usual} on the machines tried."
    return (f"Not as expected: {reached}, but the demo gives {usual} on the machines tried. If you have changed the "
            "code, that is the reason; otherwise run pytest, which shows what computes wrongly here.")


def remark(lines: list[dict]) -> str:
    """Return what to add to the demo's loss on the screen; empty for any other run."""
    return {None: "", True: ", as expected,", False: ", not as expected (see report.md),"}[demo_is_as_expected(lines)]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format rows of cells as a Markdown table whose columns stand one below the other, the last one ragged."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    widths[-1] = 0
    rows.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def results(folder: Path, lines: list[dict]) -> str:
    """Tabulate what the run reached, beside OpenAI's numbers if they may be compared."""
    run, val, scored, rows = last(lines, "run"), last(lines, "val"), last(lines, "hellaswag"), []
    loss = openai_loss(folder, run) if curve.is_fineweb_edu(lines) else None
    if val.get("loss") is not None:
        rows.append(["validation loss, nats per token", f"{val['loss']:.4f} after {val['step']:,} steps",
                     f"{loss[0]:.4f}, {loss[1]}" if loss else "not known for these tokens"])
    if scored.get("acc_norm") is not None:
        p, n = scored["acc_norm"], scored["n"]
        rows.append(["HellaSwag acc_norm, completion style",
                     f"{accuracy.describe(p, n)} on {n:,} {plural(n, 'example')} after {scored['step']:,} steps",
                     f"{published.HELLASWAG_ACC_NORM:.2%} on {published.HELLASWAG_EXAMPLES:,}, published"])
    return table(["", "this run", "OpenAI's GPT-2 124M"], rows) if rows else "There are no results yet."


def facts(lines: list[dict]) -> str:
    """Tabulate what ran, on what, and for how long; below stands the command, to be copied."""
    run, train = last(lines, "run"), [line for line in lines if line["kind"] == "train"]
    config, data, shape = run["config"], run["data"], run["model"]
    sessions = [line for line in lines if line["kind"] == "run"]
    rows = [["data", config["data"] + (f", made of {data['source']}" if data.get("source") else "")]]
    if shape:
        rows.insert(0, ["model", f"{shape['n_layer']} layers, {shape['n_head']} heads, {shape['n_embd']} channels, "
                                 f"{shape['block_size']:,} positions, from {sessions[0].get('origin')}"])
    if train:
        rows += facts_of_training(lines, train, config)
    ranks = f", {run['ranks']} ranks" if run.get("ranks", 1) > 1 else ""
    compiled = "compiled" if config["compile"] else "not compiled"
    rows += [["device", f"{run['device']}{ranks}; {config['dtype']}, {compiled}"],
             ["versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)]]
    if not run.get("command"):
        return table(["", ""], rows)
    times = f", given {len(sessions)} times, as it was resumed" if len(sessions) > 1 else ""
    return f"{table(['', ''], rows)}\n\nThe command{times}:\n\n```sh\n{run['command']}\n```"


def facts_of_training(lines: list[dict], train: list[dict], config: dict) -> list[list[str]]:
    """Return the rows about the optimizer steps, whose lines are `train`."""
    final, hours = train[-1], sum(line.get("dt_ms") or 0 for line in train) / 3.6e6
    speeds, mfus = ([line[key] for line in train if line.get(key) is not None] for key in ("tok_per_s", "mfu"))
    speed = f"{statistics.median(speeds):,.0f} tokens/s" if speeds else "not known"
    speed += f", MFU {statistics.median(mfus):.1%}" if mfus else ""  # only where the device's peak is known
    rows = [
        ["tokens", f"{final['tokens']:,} in {final['step']:,} steps of {config['total_batch_size']:,}, windows of "
                   f"{config['sequence_length']:,}"],
        ["training loss", describe_training_loss(curve.final_train_losses(lines))],
        ["optimizer", f"{config['optimizer']}, learning rate {config['max_lr']:g} to {config['min_lr']:g} after "
                      f"{config['warmup_steps']:,} steps of warmup, weight decay {config['weight_decay']:g}, "
                      f"gradients clipped to {config['grad_clip']:g}"],
        ["time", f"{hours:.3g} hours ({clock(3600 * hours)}) of steps, evaluation not counted"],
        ["speed", f"{speed}, median of the steps"],
    ]
    if skipped := sum(line.get("skipped", False) for line in train):
        rows.append(["skipped steps", f"{skipped}, because their loss or gradient was not finite"])
    return rows


def describe_training_loss(losses: list[float]) -> str:
    """Say the mean of the last training losses, which the smoothed curve ends in, and of how many steps it is."""
    if not losses:
        return "never finite"
    return f"{statistics.fmean(losses):.4f}, " + (
        f"mean of the last {len(losses)} steps" if len(losses) > 1 else "of the last step")


def not_measured(lines: list[dict]) -> str:
    """Say in one line what a reader might look for and will not find."""
    missing = [name for kind, name in (("val", "validation loss"), ("hellaswag", "HellaSwag")) if not last(lines, kind)]
    return "Not measured: " + ", ".join([*missing, "any other benchmark", "bias, toxicity and memorised text"]) + "."


def write_report(folder) -> Path:
    """Write report.md into a run's folder, from its log, and return its path. Raises OSError if that fails."""
    folder = Path(folder)
    lines = curve.read_log(folder)
    picture = "![training and validation loss](loss.png)\n\n" if (folder / "loss.png").exists() else ""
    text = (f"# {curve.run_names([folder])[0]}: {result(lines)}\n\n**{verdict(folder, lines)}**\n\n{picture}"
            f"{results(folder, lines)}\n\n{facts(lines)}\n\n{not_measured(lines)}\n")
    path, content = folder / "report.md", text.encode("utf-8", errors="backslashreplace")  # names need not be UTF-8
    if path.is_file():
        before, _, signature = path.read_bytes().rpartition(b"\n<!-- ")
        if signature != sign(before):
            set_aside(path, "is not as it was written here")
    with atomic_write(path) as file:
        file.write(content + b"\n<!-- " + sign(content))
    return path


def sign(content: bytes) -> bytes:
    """Return the comment that ends a report, by which one that somebody has edited or brought is known."""
    return f"train_gpt2.py {hashlib.sha256(content).hexdigest()} -->\n".encode()


def model_card(name: str, source: str, parameters: int, folder: Path | None, step: int, tokenizer: str) -> str:
    """Return README.md of a model exported from `source`, with what the log in `folder` says of it up to `step`.

    `tokenizer` says whose the tokenizer is.
    """
    data, about = "", f"No log of its training could be read. {not_measured([])}\n"
    try:
        lines = [line for line in curve.read_log(folder) if line.get("step", 0) <= step] if folder else []
        if lines:
            about = (f"{result(lines).capitalize()}. {verdict(folder, lines)}\n\n## Results\n\n"
                     f"{results(folder, lines)}\n\n{not_measured(lines)}\n\n## Training\n\n{facts(lines)}\n")
            data = "datasets: [HuggingFaceFW/fineweb-edu]\nlanguage: en\n" if curve.is_fineweb_edu(lines) else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        pass  # the log of another program or version: the model is exported all the same
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2]
{data}---

# {name}

A GPT-2 with {parameters:,} parameters and {tokenizer}, exported from {source}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})  # the path to this folder
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
```

{about}"""
