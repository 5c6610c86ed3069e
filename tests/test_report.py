"""report.md and the loggers, of real runs: what they say is what log.jsonl and the arithmetic say.

    pytest tests/test_report.py
"""
import dataclasses
import json
import re
import shlex
import shutil
import signal
import statistics
import subprocess

import pytest
import torch
from helpers import (
    ENCODING,
    FINEWEB,
    OURS,
    ROOT,
    TINY,
    flags,
    needs,
    once,
    posix,
    random_gpt2,
    read_log,
    run,
    run_until,
    wilson_ends,
    write_shards,
)
from hub import hub, with_gpt2

import train_gpt2
from fineweb import FINEWEB_EDU
from plumbing import published, report, runlog, shards
from plumbing.curve import read_log as lines_of
from train_gpt2 import MAY_CHANGE_ON_RESUME, PRESETS, TrainConfig

pytestmark = needs(*ENCODING)


def claim(folder, source):
    """A manifest that says what the shards in `folder` are of."""
    record = {"source": source, "revision": "c" * 40, "node_rank": 0, "num_nodes": 1, "shards": []}
    (folder / "manifest.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run on shards that claim to be FineWeb-Edu, with HellaSwag, stopped once and resumed."""
    def make(folder):
        data = claim(write_shards(folder / "data"), FINEWEB)
        arguments = flags(data=data, out_dir=folder / "log", max_steps=60, hellaswag_every=30, hellaswag_data=OURS)
        code, printed = run_until(arguments, "step 40/", signal.SIGTERM)
        assert code == 0, printed
        assert not (folder / "log" / "report.md").exists()
        result = run(arguments, whole=True)
        assert result.returncode == 0 and "resumed after step" in result.stdout, result.stderr

    return once(tmp_path_factory, "report", make) / "log"


def test_the_report_says_what_the_log_says(finished):
    text, train = (finished / "report.md").read_text(), read_log(finished, "train")
    val, scored = read_log(finished, "val")[-1], read_log(finished, "hellaswag")[-1]
    assert f"{val['loss']:.4f} after 60 steps" in text
    low, high = wilson_ends(round(30 * scored["acc_norm"]), 30)
    interval = f"95% interval {100 * low:.2f} to {high:.2%}"
    assert f"| {scored['acc_norm']:.2%} ({interval}) on 30 examples after 60 steps" in text
    assert "7,680 in 60 steps of 128, windows of 16" in text
    assert f"{sum(line['dt_ms'] for line in train) / 3.6e6:.3g} hours (0:" in text
    assert f"{statistics.mean(line['loss'] for line in train[-7:]):.4f}, mean of the last 7 steps" in text
    assert f"{statistics.median(line['tok_per_s'] for line in train):,.0f} tokens/s" in text
    assert f"torch {torch.__version__}" in text
    begin, end = read_log(finished, "val")[0]["loss"], val["loss"]
    assert text.startswith(f"# log: validation loss {begin:.2f} -> {end:.2f} in 60 steps\n\n**")
    command = re.search("The command, given 2 times, as it was resumed:\n\n```sh\n(.*)\n```\n", text)[1]
    assert command == read_log(finished, "run")[-1]["command"]
    assert re.match(r"python train_gpt2\.py --data .* --n_layer 2 ", command)
    assert "![training and validation loss](loss.png)" in text and (finished / "loss.png").exists()
    assert FINEWEB in text and "from new weights" in text
    assert "No reproduction of GPT-2 124M: the model has another shape" in text
    assert text.count("\n\n|") == 2 and "Not measured: any other benchmark" in text


@pytest.mark.parametrize("mfu, expected", [(0.42, "tokens/s, MFU 42.0%, median of the steps"),
                                           (None, "tokens/s, median of the steps")])
def test_mfu_is_reported_where_it_is_known(mfu, expected, finished, tmp_path):
    folder = edited(finished, tmp_path, lambda line: line.update(mfu=mfu) if line["kind"] == "train" else None)
    text = report.write_report(folder).read_text()
    assert expected in text and "nan" not in text and text.count("MFU") == (mfu is not None)


@pytest.mark.parametrize("lines, expected", [
    ([("val", 0, 10.8249), ("train", 180, 4.8), ("val", 60, 5.0), ("val", 180, 4.7391)],
     "validation loss 10.82 -> 4.74 in 180 steps"),
    ([("val", 60, 5.0), ("val", 1260, 4.0)], "validation loss 5.00 -> 4.00 in 1,200 steps"),  # branched
    ([("val", 0, 10.8), ("train", 1, 10.8), ("val", 1, 10.7)], "validation loss 10.80 -> 10.70 in 1 step"),
    ([("val", 0, 10.8)], "validation loss 10.80 after 0 steps"), ([("val", 9, 4), ("val", 10, None)],
                                                                   "validation loss 4.00 after 9 steps"),
    ([("train", step, step) for step in range(1, 5)], "training loss 3.50 after 4 steps"),
    ([("train", 1, None)], "no loss yet"), ([], "no loss yet"),
])
def test_the_result_in_a_line(lines, expected):
    lines = [{"kind": kind, "step": step, "loss": loss} for kind, step, loss in lines]
    assert report.result(lines) == expected


def test_the_report_reads_as_plain_text_and_its_command_can_be_pasted(tmp_path):
    """Columns stand one below the other; the shell reads from the command what was given, whatever the names."""
    data = "it's a | folder"
    (tmp_path / data).mkdir()
    write_shards(tmp_path / data)
    given = flags(data=data, out_dir="my `log`", max_steps=2, warmup_steps=0)
    result = run(given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "my `log`" / "report.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = [[place for place, letter in enumerate(row) if letter == "|" and row[place - 1] != "\\"]
                   for row in table.splitlines()]
        assert len(columns) > 2 and len({tuple(places[:-1]) for places in columns}) == 1, table
    command = re.search("```sh\n(.*)\n```", text)[1]
    words = subprocess.run(["bash", "-c", f"python() {{ printf '%s\\0' \"$@\"; }}; {command}"], capture_output=True,
                           text=True, check=True).stdout.split("\0")[:-1]
    assert words[0] == "train_gpt2.py"
    theirs, ours = (dataclasses.asdict(train_gpt2.parse_args(list(map(str, part)))) for part in (words[1:], given))
    told = read_log(tmp_path / "my `log`", "run")[0]["config"]
    assert theirs["data"] == data and {key: theirs[key] for key in ours if ours[key] == told[key]} == {
        key: ours[key] for key in ours if ours[key] == told[key]}


def test_the_log_tells_whether_the_model_is_gpt2_124m(finished, tmp_path, monkeypatch):
    """TINY is not; a model of 124M would be, as the model itself is asked."""
    assert [line["gpt2"] for line in read_log(finished, "run")] == [False, False]
    monkeypatch.setattr(runlog.reference, "is_gpt2", lambda model, *_, **__: model.count_parameters() > 0)
    arguments = flags(data=finished.parent / "data", out_dir=tmp_path, max_steps=1, warmup_steps=0)
    train_gpt2.main(train_gpt2.parse_args(arguments))
    assert read_log(tmp_path, "run")[0]["gpt2"] is True


def test_the_pinned_source_is_fineweb_s():
    assert FINEWEB_EDU == FINEWEB


@pytest.fixture
def short_windows(monkeypatch):
    """The published loss counts as measured in windows as short as TINY's."""
    monkeypatch.setattr(published, "LOSS_WINDOW", TINY["sequence_length"])


def call_it_gpt2(folder):
    """Rewrite the log as if the model were GPT-2 124M."""
    lines = [line | {"gpt2": True} if line["kind"] == "run" else line for line in lines_of(folder)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edited(finished, tmp_path, edit):
    """A copy of the finished run whose lines went through `edit`."""
    shutil.copytree(finished, tmp_path / "log")
    lines = [edit(line) or line for line in lines_of(finished)]
    (tmp_path / "log" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "log"


def reached(loss, acc_norm=0.31, n=10_042, gpt2=True, **changes):
    """An edit of lines: the run ended with that loss and HellaSwag on FineWeb-Edu's own validation tokens."""
    def edit(line):
        if line["kind"] == "val":
            line["loss"] = loss
        elif line["kind"] == "hellaswag":
            line.update(acc_norm=acc_norm, n=n)
        elif line["kind"] == "run":
            line["config"].update({"sequence_length": 1024, **changes})
            line["data"]["val_tokens"] = 10_485_760
            line["gpt2"] = gpt2
    return edit


@pytest.mark.parametrize("edit, expected", [
    (reached(3.28), "Reproduced: validation loss 3.2800, 0.0124 below OpenAI's 3.2924; HellaSwag 31.00%, 1.45 points "
                    "above 29.55%."),
    (reached(3.29243, acc_norm=2967 / 10042), "Reproduced: validation loss 3.2924, 0.0000 below OpenAI's 3.2924; "
                                              "HellaSwag 29.55%, 0.00 points above 29.55%."),
    (reached(3.29247), "Not reproduced: validation loss 3.2925, 0.0001 above"),
    (reached(3.35), "Not reproduced: validation loss 3.3500, 0.0576 above OpenAI's 3.2924; HellaSwag 31.00%"),
    (reached(3.28, acc_norm=0.28), "Not reproduced: validation loss 3.2800, 0.0124 below OpenAI's 3.2924; HellaSwag "
                                   "28.00%, 1.55 points below 29.55%."),
    (reached(3.28, n=1000), "Reproduced: validation loss 3.2800, 0.0124 below OpenAI's 3.2924; HellaSwag was not "
                            "measured on all examples."),
    (reached(None), "Not reproduced: the run has no validation loss."),
    (reached(3.28, init_from="gpt2"), "No reproduction: the run began with the weights of gpt2."),
    (reached(3.28, sequence_length=512), "No reproduction of GPT-2 124M: the model was trained on windows of 512 "
                                         "tokens, not 1,024."),
    (reached(3.28, gpt2=False), "No reproduction of GPT-2 124M: the model has another shape, or computes something "
                                "else."),
    (reached(3.28, gpt2=None), "No verdict: the log was written by an earlier version"),
])
def test_the_verdict_against_the_published_numbers(edit, expected, finished, tmp_path):
    folder = edited(finished, tmp_path, edit)
    report.write_report(folder)
    text = (folder / "report.md").read_text()
    assert f"**{expected}" in text
    compared = expected.startswith(("Reproduced", "Not reproduced: val"))
    assert not compared or "| 3.2924, published for the same source, commit and tokens |" in text
    assert "None" not in text


@pytest.mark.parametrize("source, tokens, T", [
    ("HuggingFaceFW/fineweb-edu/sample/10BT", 10_485_760, 1024), (FINEWEB, 10_000_000, 1024),
    ("kjj0/finewebedu10B-gpt2", 10_485_760, 1024), (FINEWEB, 10_485_760, 512), (FINEWEB, 10_485_760, 1024)])
def test_the_published_loss_is_of_the_pinned_source_alone(source, tokens, T, finished, tmp_path):

    def edit(line):
        reached(3.28)(line)
        if line["kind"] == "run":
            line["data"].update(source=source, val_tokens=tokens)
            line["config"]["sequence_length"] = T
    folder = edited(finished, tmp_path, edit)
    known = (source, tokens, T) == (FINEWEB, 10_485_760, 1024)
    words = report.verdict(folder, lines_of(folder))
    expected = "Reproduced" if known else "No verdict: OpenAI's loss on this validation split"
    if T != 1024:
        expected = "No reproduction of GPT-2 124M: the model was trained on windows of 512 tokens"
    assert words.startswith(expected), words
    assert ("3.2924" in report.write_report(folder).read_text()) == known


@pytest.mark.parametrize("gpt2, expected", [
    ((True, True), "Reproduced: "), ((False, True), "No reproduction of GPT-2 124M: the model has another shape"),
    ((True, False), "No reproduction of GPT-2 124M"), ((None, True), "No verdict: the log was written by an earlier"),
])
def test_every_session_of_a_run_must_have_been_gpt2(gpt2, expected, finished, tmp_path):
    """The log of an earlier version has no such key: the verdict says how to evaluate the checkpoint."""
    checks = iter(gpt2)

    def edit(line):
        reached(3.28)(line)
        if line["kind"] == "run":
            line["gpt2"] = next(checks)
            if line["gpt2"] is None:
                del line["gpt2"]
    folder = edited(finished, tmp_path, edit)
    words = report.verdict(folder, lines_of(folder))
    assert words.startswith(expected)
    if None in gpt2:
        command = shlex.split(re.search("`(python .*)`", words)[1])
        config = read_log(folder, "run")[-1]["config"]
        assert command == ["python", "train_gpt2.py", "--eval_only", "--data", config["data"], "--out_dir",
                           config["out_dir"]]
        result = run(flags(data=config["data"], out_dir=folder, eval_only=True))
        assert result.returncode == 0, result.stderr
        assert [line["gpt2"] for line in lines_of(folder / "eval.jsonl") if line["kind"] == "run"] == [False]


@pytest.mark.parametrize("parent, expected", [
    ({"init_from": ""}, "Reproduced: "), ({"init_from": "gpt2"}, "No reproduction: the run began with the weights of "
                                                                 "gpt2."),
    ({"init_from": "", "branch_from": "itself"}, "No verdict: the run branched from "), (None, "No verdict: the run "),
])
def test_a_branched_run_tells_its_origin_and_is_traced_to_its_first_weights(parent, expected, finished, tmp_path):
    branch = str(tmp_path / "parent" / "model_000040.pt")
    if parent is not None:
        (tmp_path / "parent").mkdir()
        parent = {**parent, **({"branch_from": branch} if "branch_from" in parent else {})}
        (tmp_path / "parent" / "log.jsonl").write_text(json.dumps({"kind": "run", "config": parent}) + "\n")
    folder = edited(finished, tmp_path, reached(3.28, branch_from=branch))
    words = report.verdict(folder, lines_of(folder))
    assert words.startswith(expected)
    assert branch in words or parent == {"init_from": "gpt2"}


def test_a_run_that_branches_names_the_checkpoint(finished, tmp_path):
    """The real command: its table says what it began with."""
    checkpoint = finished / "model_000060.pt"
    result = run(flags(data=finished.parent / "data", out_dir=tmp_path / "log", branch_from=checkpoint, max_steps=64))
    assert result.returncode == 0, result.stderr
    assert f"from step 60 of {checkpoint} |" in (tmp_path / "log" / "report.md").read_text()


# ------------------------------------------------------------------------------------------------------------ the demo

def demo_log(folder, losses, val_sha256=published.DEMO["val_sha256"], **changes):
    """The log of a demo, as far as the verdict on it is concerned -> its folder."""
    folder.mkdir(exist_ok=True)
    config = {**dataclasses.asdict(TrainConfig(**PRESETS["demo"])), "micro_batch_size": 16, "compile": False, **changes}
    lines = [{"kind": "run", "config": config, "data": {"val_sha256": val_sha256}, "device": "cpu", "gpt2": False}]
    lines += [{"kind": "val", "step": step, "loss": loss} for step, loss in losses.items()]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_record_of_the_demo_has_the_preset_s_settings():
    """All of them, but for those that cannot change the loss or are only about where things are and what is shown."""
    config, record = dataclasses.asdict(TrainConfig(**PRESETS["demo"])), published.DEMO["settings"]
    free = MAY_CHANGE_ON_RESUME | {"data", "eval_only", "val_tokens"}
    assert record == {name: value for name, value in config.items() if name not in free}


def test_the_record_of_the_demo_has_the_hash_of_its_validation_tokens():
    (_, tokens), = shards.open_tokens(ROOT / "input.txt", "val")
    described = shards.describe(ROOT / "input.txt", [tokens], PRESETS["demo"]["val_tokens"])
    assert described["val_sha256"] == published.DEMO["val_sha256"]


@pytest.mark.parametrize("losses, changes, expected, remark", [
    ({0: 10.8, 180: 4.7279}, {}, "As expected: validation loss 4.7279; the demo gives 4.73 +- 0.03", ", as expected,"),
    ({180: 4.7391}, {"device": "cpu", "micro_batch_size": 4}, "As expected: validation loss 4.7391;", ", as expected,"),
    ({180: 4.80}, {}, "Not as expected: validation loss 4.8000, but the demo gives", ", not as expected (see"),
    ({180: 4.65}, {}, "Not as expected: validation loss 4.6500, but the demo gives", ", not as expected (see"),
    ({180: None}, {}, "Not as expected: no validation loss, but", ", not as expected (see"),
    ({120: 4.89}, {}, "No verdict yet: the demo ends after 180 steps.", ""), ({}, {}, "No verdict yet", ""),
    ({180: 4.7279}, {"seed": 7}, "No reference exists for the loss on this data", ""),
    ({180: 4.7279}, {"dtype": "bfloat16"}, "No reference exists for the loss on this data", ""),
    ({180: 4.7279}, {"n_embd": 128}, "No reference exists for the loss on this data", ""),
    ({180: 4.7279}, {"val_sha256": "0" * 64}, "No reference exists for the loss on this data", ""),
])
def test_the_verdict_on_the_demo(losses, changes, expected, remark, tmp_path):
    lines = lines_of(demo_log(tmp_path / "log", losses, **changes))
    assert report.verdict(tmp_path / "log", lines).startswith(expected)
    assert report.remark(lines).startswith(remark) and bool(report.remark(lines)) == bool(remark)


@pytest.mark.slow
@pytest.mark.parametrize("expected, words", [(4.73, "not as expected (see report.md)"), (10.82, "as expected")])
def test_the_last_lines_of_the_demo_tell_it(expected, words, tmp_path, monkeypatch, capsys):
    """One step with learning rate 0, which counts as the demo: the loss is that of new weights."""
    settings = {**published.DEMO["settings"], "max_steps": 1, "warmup_steps": 0, "max_lr": 0.0}
    monkeypatch.setitem(published.DEMO, "settings", settings)
    monkeypatch.setitem(published.DEMO, "loss", expected)
    train_gpt2.main(train_gpt2.parse_args(
        ["--data", str(ROOT / "input.txt"), "--out_dir", str(tmp_path), "--max_steps", "1", "--warmup_steps", "0",
         "--max_lr", "0", "--val_every", "0", "--sample_every", "0", "--device", "cpu"]))
    printed = capsys.readouterr().out
    assert re.search(rf"finished: validation loss (10\.82\d\d) -> \1, {re.escape(words)}, after 1 step ", printed)
    assert f"**{words.split(' (')[0].capitalize()}: validation loss 10.8" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("source", ["my/fineweb-edu_filtered", "HuggingFaceFW/fineweb-edu-score-2"])
def test_what_only_looks_like_fineweb_edu_has_no_reference(source, finished, tmp_path):
    folder = edited(finished, tmp_path, lambda line: line.get("data", {}).update(source=source))
    assert report.verdict(folder, lines_of(folder)).startswith("No reference exists for the loss on this data")


def test_logs_without_a_hash_are_not_of_the_same_tokens(finished, tmp_path, short_windows):
    folder = edited(finished, tmp_path, lambda line: line.get("data", {}).update(val_sha256=None))
    call_it_gpt2(folder)
    lines = [{**line, "origin": "OpenAI's gpt2"} for line in lines_of(folder) if line["kind"] in ("run", "val")]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.verdict(folder, lines_of(folder)).startswith("No verdict: OpenAI's loss on this")
    (folder / "eval.jsonl").write_text('{"kind": "val", "step": 0}\n{"kind": "run", "config": null}\n[\n')
    assert report.verdict(folder, lines_of(folder)).startswith("No verdict")


def test_other_data_have_no_reference(shard_folder, tmp_path):
    claim(shard_folder, "my_texts")
    assert run(flags(data=shard_folder, out_dir=tmp_path / "log")).returncode == 0
    text = (tmp_path / "log" / "report.md").read_text()
    assert "**No reference exists for the loss on this data" in text and "3.2924" not in text and "29.55" not in text
    assert "Not measured: HellaSwag" in text


@pytest.mark.slow
def test_openai_s_loss_counts_where_it_was_measured_on_the_same_tokens(finished, tmp_path, short_windows):
    """`--init_from gpt2 --eval_only` into the run's folder, OpenAI's weights from a hub on loopback."""
    random_gpt2(tmp_path / "model", std=0.02, n_layer=2, n_head=2, n_embd=16, n_positions=32)
    log = tmp_path / "log"
    shutil.copytree(finished, log)
    call_it_gpt2(log)
    data = finished.parent / "data"
    other = claim(write_shards(tmp_path / "other", seed=7), FINEWEB)
    shutil.copytree(tmp_path / "model", tmp_path / "gpt2")  # a folder of that name is not OpenAI's model
    assert run(flags(data=data, out_dir=log, max_steps=0, init_from="gpt2"), cwd=tmp_path).returncode == 0
    assert report.verdict(log, lines_of(log)).startswith("No verdict")
    script = with_gpt2(tmp_path / "model", ROOT / "train_gpt2.py", tmp_path)
    with hub({"models/openai-community/gpt2": tmp_path / "model"}, tmp_path / "cache") as (environment, _):
        for changes in ({"data": other}, {"val_tokens": 160}, {"sequence_length": 8},
                        {"init_from": tmp_path / "model"}):
            arguments = flags(**{"data": data, "out_dir": log, "max_steps": 0, "init_from": "gpt2", **changes})
            result = run(arguments, script=script, **environment)
            assert result.returncode == 0, result.stderr
            assert report.verdict(log, lines_of(log)).startswith("No verdict"), changes
        words = shlex.split(re.search("`(python .*)`", report.verdict(log, lines_of(log)))[1])[2:]
        assert words[-1] == read_log(log, "run")[0]["config"]["out_dir"]  # here it is a copy, and T is not 1,024
        given = [*words[:-1], str(log), "--sequence_length", "16", "--total_batch_size", "128", "--dtype", "float32"]
        result = run(given, script=script, **environment)
        assert result.returncode == 0, result.stderr
    theirs = [line["loss"] for line in lines_of(log / "eval.jsonl") if line["kind"] == "val"][-1]
    ours = read_log(log, "val")[-1]["loss"]
    words = "Reproduced" if ours <= theirs else "Not reproduced"
    expected = f"{words}: validation loss {ours:.4f}, {abs(ours - theirs):.4f} "
    assert report.verdict(log, lines_of(log)).startswith(expected)
    again = run(flags(data=data, out_dir=log, max_steps=60, hellaswag_every=30, hellaswag_data=OURS))
    assert again.returncode == 0, again.stderr
    text = (log / "report.md").read_text()
    assert f"{theirs:.4f}, measured on the same tokens, float32" in text
    assert text.count("given 2 times, as it was resumed") == 1  # a finished run that is given again trains nothing


def test_a_manifest_of_another_program_does_no_harm(shard_folder, tmp_path):
    (shard_folder / "manifest.json").write_text("[1, 2")
    result = run(flags(data=shard_folder, out_dir=tmp_path / "log"))
    assert result.returncode == 0, result.stderr
    assert read_log(tmp_path / "log", "run")[0]["data"]["source"] is None


# ------------------------------------------------------------------------------------------------------------- loggers

def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard itself reads from an event folder: {name: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@posix
@pytest.mark.slow
def test_tensorboard_has_the_numbers_of_the_log_once_each(shard_folder, tmp_path):
    """Also of a run that was killed after steps that are done again when it is resumed."""
    pytest.importorskip("tensorboard")
    arguments = flags(data=shard_folder, out_dir=tmp_path, max_steps=60, checkpoint_every=10, logger="tensorboard",
                      hellaswag_every=30, hellaswag_data=OURS)
    code, printed = run_until(arguments, "step 47/", signal.SIGKILL)
    assert code == -signal.SIGKILL, printed
    result = run(arguments)
    assert result.returncode == 0 and "resumed after step 40" in result.stdout, result.stderr
    found = scalars(tmp_path / "tensorboard")
    for kind, keys in (("train", ("loss", "lr", "norm", "tok_per_s", "dt_ms", "tokens")), ("val", ("loss",)),
                       ("hellaswag", ("acc_norm", "acc", "n"))):
        for key in keys:
            expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in read_log(tmp_path, kind)]
            assert len(expected) > 1 and found[f"{kind}/{key}"] == expected, (kind, key)


@pytest.mark.slow
@pytest.mark.dist
def test_evaluation_alone_and_other_ranks_leave_the_logger_alone(shard_folder, tmp_path):
    arguments = flags(data=shard_folder, out_dir=tmp_path / "log", logger="tensorboard")
    result = run(arguments, ranks=2, whole=True)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "log" / "tensorboard").iterdir())) == 1
    assert (tmp_path / "log" / "loss.png").exists()
    assert ", 2 ranks; float32" in (tmp_path / "log" / "report.md").read_text()
    before = scalars(tmp_path / "log" / "tensorboard")
    assert run([*arguments, "--max_steps", "0"]).returncode == 0
    assert scalars(tmp_path / "log" / "tensorboard") == before and len(before["train/loss"]) == 6
    without = run(flags(data=shard_folder, out_dir=tmp_path / "log", logger=None), ranks=2)
    assert without.returncode == 0, without.stderr  # the logger may differ when a run is resumed


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_named(name, shard_folder, tmp_path):
    script = tmp_path / "hide.py"
    script.write_text(f"import sys\nsys.modules['{name}'] = None\nimport train_gpt2\nfrom plumbing import cli\n"
                      "cli.run_command(lambda: train_gpt2.main(train_gpt2.parse_args(sys.argv[1:])))\n")
    result = run(flags(data=shard_folder, out_dir=tmp_path / "log", logger=name), script=script)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (f"error: --logger {name} needs a package that is not here: pip "
                                                      f"install {name}")
    assert not list((tmp_path / "log").glob("*.pt"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_a_service_is_told(name, shard_folder, tmp_path):
    """A module of that name records the calls: their packages are not installed with the tests."""
    (tmp_path / f"{name}.py").write_text(f"""
import json
def write(*values):
    with open({str(tmp_path / 'calls.jsonl')!r}, "a") as file:
        file.write(json.dumps(values) + "\\n")
def init(**options):
    write("init", options)
def log(numbers, step):
    write("log", step, numbers)
    if step == 5:
        raise ConnectionError("the service is gone")
def finish():
    write("finish")
""")
    arguments = flags(data=shard_folder, out_dir=tmp_path / "log", logger=name)
    result = run(arguments, PYTHONPATH=f"{tmp_path}:{report.__file__.rsplit('/', 1)[0]}")
    assert result.returncode == 0, result.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    kind, options = calls[0]
    assert kind == "init" and options["project"] == "gpt2" and options["resume"] == "allow"
    assert options["config"]["max_steps"] == 6
    losses = [(step, numbers["train/loss"]) for kind, step, numbers in calls[1:] if "train/loss" in numbers]
    assert losses == [(line["step"], line["loss"]) for line in read_log(tmp_path / "log", "train")][:5]
    assert result.stdout.count(f"warning: no {name}: ConnectionError: the service is gone") == 1
    assert len(read_log(tmp_path / "log", "train")) == TINY["max_steps"]
    again = run(arguments, PYTHONPATH=f"{tmp_path}:{report.__file__.rsplit('/', 1)[0]}")
    assert again.returncode == 0
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    second = [call[1] for call in calls if call[0] == "init"][1]
    assert [second.get(key) for key in ("id", "name")] == [options.get(key) for key in ("id", "name")]
    assert calls[-1] == ["finish"]
