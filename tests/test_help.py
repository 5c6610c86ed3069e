"""--help reads well, shows what applies, and a mistyped flag is told what to write.

    pytest tests/test_help.py
"""
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from helpers import ROOT, command_configs, run, write_shards

import train_gpt2
from plumbing import flag_help
from plumbing.cli import UserError, parse_flags

CONFIGS = command_configs()


def help_of(name: str, capsys, argv=()) -> str:
    """Print the help of a command in this process."""
    config, positional = CONFIGS[name]
    with pytest.raises(SystemExit) as stop:
        if name == "train_gpt2":
            train_gpt2.parse_args([*argv, "--help"])
        else:
            parse_flags(config, [*argv, "--help"], "What it does.", positional)
    assert stop.value.code == 0
    return capsys.readouterr().out


def entries(text: str) -> dict[str, str]:
    """Parse a help -> {name: its help text}, in order, with the lines joined."""
    found = re.findall(r"^  (--\w+|\w+)\b.*(?:\n {10,}\S.*)*", text.partition("\nExamples:")[0], re.MULTILINE)
    whole = re.findall(r"^  (?:--\w+|\w+)\b.*(?:\n {10,}\S.*)*", text.partition("\nExamples:")[0], re.MULTILINE)
    return {name.strip("-"): " ".join(entry.split()) for name, entry in zip(found, whole)}


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("name", CONFIGS)
def test_help_fits_the_terminal_and_names_what_a_value_is(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(name, capsys)
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    assert not re.search(r"\b(STR|INT|FLOAT|options:|positional arguments:)", text)
    shown, (config, _) = entries(text), CONFIGS[name]
    for field in dataclasses.fields(config):
        if get_origin(field.type) is Literal:
            assert "{" + ",".join(filter(None, get_args(field.type))) + "}" in shown[field.name]
    assert text.endswith("\n") and shown.keys() >= {field.name for field in dataclasses.fields(config)}


def test_help_of_training_is_in_groups_and_its_examples_come_last(capsys):
    text = help_of("train_gpt2", capsys)
    assert re.findall(r"^(\w+):\n", text, re.MULTILINE) == [
        "Preset", "Data", "Model", "Optimization", "Evaluation", "Output", "Machine", "Examples"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "." not in name])
def test_the_examples_are_commands_that_work(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    examples = help_of(name, capsys).partition("\nExamples:\n")[2].replace(" \\\n", " ")
    commands = [line for line in examples.splitlines() if not line.startswith("  #")]
    assert len(commands) >= 3
    for line in commands:
        words = shlex.split(line.rpartition(" | ")[2], comments=True)
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        config, positional = CONFIGS[words[place].removesuffix(".py")]
        config(**parse_flags(config, words[place + 1:], "", positional))


def test_the_examples_work_from_another_folder(tmp_path):
    text = run(["--help"], cwd=tmp_path, COLUMNS="300").stdout
    scripts = re.findall(r"(\S+\.py)", text.partition("Examples:")[2])
    assert len(scripts) == 4 and all(Path(tmp_path, script).exists() for script in scripts)
    assert f"usage: python {ROOT}/train_gpt2.py" in text


@pytest.mark.parametrize("given", [[], ["--preset", "fast"], ["--preset", "gpt2"], ["--data", "my.txt"],
                                   ["--preset", "demo"], ["--max_steps", "oops", "--junk"]])
@pytest.mark.parametrize("shards", [False, True])
def test_help_shows_the_defaults_that_apply(given, shards, capsys, tmp_path, monkeypatch):
    """What stands in brackets is what parse_args() gives with the same flags."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("text")
    Path("input.txt").write_text("text")
    if shards:
        write_shards(tmp_path / "edu_fineweb10B")
    text = help_of("train_gpt2", capsys, given)
    config = train_gpt2.parse_args([] if "oops" in given else given)
    preset = "gpt2" if shards else "demo"
    preset = given[1] if given[:1] == ["--preset"] else "demo" if given[:1] == ["--data"] else preset
    assert f"from --preset {preset}." in text
    for name, entry in entries(text).items():
        shown = re.search(r" \[(.*)\]$", entry)
        value = preset if name == "preset" else getattr(config, name)
        if shown is None:
            assert value in ("", None) or value is False
        elif isinstance(value, bool):
            assert shown[1] == ("on" if value else "off")
        elif isinstance(value, (int, float)):
            assert type(value)(shown[1]) == value, name  # as one may type it
        else:
            assert shown[1].strip('"') == value, name


MISTAKES = [
    ("--lr 3e-4", "it is --max_lr here"), ("--learning_rate 3e-4", "it is --max_lr here"),
    ("--learning-rate=3e-4", "it is --max_lr here"), ("-lr 3e-4", "it is --max_lr here"),
    ("--batch_size 4", "--total_batch_size is in tokens per optimizer step, --micro_batch_size in sequences"),
    ("--bs 4", "--micro_batch_size in sequences"), ("-b 4", "it is --micro_batch_size here"),
    ("--B 4", "it is --micro_batch_size here"), ("--T 64", "it is --sequence_length here"),
    ("--device_batch_size 4", "it is --micro_batch_size here"),
    ("--per_device_train_batch_size 4", "it is --micro_batch_size here"),
    ("--epochs 3", "use --max_steps"), ("--num_train_epochs 3", "use --max_steps"),
    ("--steps 10", "it is --max_steps here"), ("--max_iters 10", "it is --max_steps here"),
    ("--num_iterations 10", "it is --max_steps here"), ("--max-steps 10", "did you mean --max_steps?"),
    ("--maxsteps 10", "did you mean --max_steps?"), ("--context_length 64", "it is --sequence_length here"),
    ("--block_size 64", "it is --sequence_length here"), ("--seq_len 64", "it is --sequence_length here"),
    ("--dropout 0.1", "there is none"), ("--gpus 2", "torchrun --standalone --nproc_per_node=8"),
    ("--nproc_per_node 8", "torchrun --standalone --nproc_per_node=8"),
    ("--output out", "it is --out_dir here"), ("--outdir out", "it is --out_dir here"),
    ("--output_dir out", "it is --out_dir here"), ("--out out", "it is --out_dir here"),
    ("--resume", "the same command resumes"), ("--resume_from_checkpoint log", "the same command resumes"),
    ("--checkpoint x.pt", "it is --init_from here"), ("--ckpt x.pt", "it is --init_from here"),
    ("--version", "git log -1"), ("-v", "git log -1"), ("-data my.txt", "did you mean --data?"),
    ("\u2014data my.txt", "did you mean --data?"), ("--dat my.txt", "did you mean --data?"),
    ("--dataset my.txt", "it is --data here"), ("--data_path my.txt", "it is --data here"),
    ("--eval_interval 10", "it is --val_every here"), ("--eval_iters 10", "it is --val_tokens here"),
    ("--weight_deacy 0.1", "did you mean --weight_decay?"), ("--warmup 10", "it is --warmup_steps here"),
    ("--gradient_accumulation_steps 8", "it follows from --total_batch_size"),
    ("--beta2 0.95", "configure_optimizers()"), ("--num_layers 4", "it is --n_layer here"),
    ("--fp16", "use --dtype"), ("--wandb", "use --logger wandb"), ("--save_steps 100", "it is --checkpoint_every here"),
    ("--gradient_checkpointing", "it is --activation_checkpointing here"),
    ("--no_shuffle", "did you mean --no-shuffle?"),
    ("--max_grad_norm 1", "it is --grad_clip here"), ("--vocab_size 50304", "the tokens are GPT-2's"),
    ("--lr 1 --wd 2", "; --lr: it is --max_lr here; --wd: it is --weight_decay here"),
    ("my.txt", "did you mean --data my.txt?"), ("max_steps=10", "did you mean --max_steps=10?"),
    ("max_steps 10", "did you mean --max_steps ...?"), ("--data a.txt b.txt", "--data takes one value"),
    ("--sample_prompt Once upon a time", "--sample_prompt takes one value, in quotes if it has spaces"),
    ("--compile True", "--compile takes no value: write --compile or --no-compile"),
    ("--compile=False", "write --compile or --no-compile"), ("--keep_best=1", "write --keep_best or --no-keep_best"),
    ("--keep_best true", "write --keep_best or --no-keep_best"),
    ("--data", "--data: expected one argument, --data PATH"), ("--data=", "--data is '', it must be a name or a path"),
    ("--max_steps --max_lr 1", "expected one argument, --max_steps STEPS"), ("--preset", "expected one argument"),
    ("--preset dmeo", "did you mean demo?"), ("--preset=Fast", "did you mean fast?"),
    ("--optimizer moun", "did you mean muon?"), ("--dtype bf16", "did you mean bfloat16?"),
    ("--dtype fp16", "did you mean float16?"), ("--model gpt2-lrage", "did you mean gpt2-large?"),
    ("--total_batch_size 0.5M", "write 500000"), ("--max_steps 1e4", "write 10000"),
    ("--total_batch_size 2**19", "write 524288"), ("--total_batch_size 524,288", "write 524288"),
    ("--max_lr 0,001", "write 0.001"), ("--max_steps ten", "a whole number, such as 20000"),
    ("--max_lr fast", "a number, such as 0.001 or 1e-3"),
]


@pytest.mark.parametrize("line, message", MISTAKES)
def test_a_mistake_is_told_what_to_write(line, message):
    with pytest.raises(UserError) as error:
        train_gpt2.parse_args(line.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_empty_word_is_an_error_too():
    with pytest.raises(UserError, match="unrecognized arguments: : did you mean --data"):
        train_gpt2.parse_args([""])


@pytest.mark.parametrize("line", ["--qqq 3", "--foo", "--ab", "--x=3"])
def test_nonsense_gets_no_suggestion(line):
    with pytest.raises(UserError, match=r"unrecognized arguments: \S+( 3)? \(--help lists every flag\)"):
        train_gpt2.parse_args(line.split())


@pytest.mark.parametrize("name, words, message", [
    ("generate", ["log/demo"], "did you mean --model log/demo?"), ("generate", ["--ckpt", "x"], "it is --model here"),
    ("generate", ["Once upon"], "did you mean --prompt 'Once upon'?"), ("generate", ["--temp", "1"], "--temperature"),
    ("generate", ["--length", "9"], "it is --max_new_tokens here"), ("generate", ["--n", "2"], "it is --num_samples"),
    ("generate", ["--num-samples", "2"], "did you mean --num_samples?"),
    ("hellaswag", ["log/demo"], "did you mean --model log/demo?"), ("hellaswag", ["--gpus", "2"], "torchrun"),
    ("fineweb", ["my_texts"], "did you mean --source my_texts?"), ("fineweb", ["--resume"], "the same command"),
    ("fineweb", ["--data", "my_texts"], "it is --source here"),
    ("fineweb", ["--workers", "2"], "it is --num_proc here"),
    ("export_hf", ["a", "b", "c"], "unrecognized arguments: c ("), ("plot", ["--output", "x.png"], "it is --out here"),
])
def test_mistakes_at_the_other_commands(name, words, message):
    config, positional = CONFIGS[name]
    with pytest.raises(UserError) as error:
        parse_flags(config, words, "", positional)
    assert message in str(error.value)


@pytest.mark.parametrize("text, value", [("0.5M", 500_000), ("1e4", 10_000), ("2**19", 2**19), ("512*1024", 2**19),
                                         ("10k", 10_000), ("1.5B", 1_500_000_000), ("1_000.0", 1000)])
def test_the_number_that_was_meant(text, value):
    with pytest.raises(ValueError):
        int(text)
    assert flag_help.hint_for_number(text, int) == f"write {value}"


def test_numbers_as_python_writes_them():
    config = train_gpt2.parse_args(["--total_batch_size", "524_288", "--max_lr", "1e-3", "--min_lr", ".5E-4"])
    assert (config.total_batch_size, config.max_lr, config.min_lr) == (2**19, 1e-3, 5e-5)


def test_the_tables_name_flags_that_exist_and_each_name_leads_to_one():
    flags = [{field.name for field in dataclasses.fields(config)} for config, _ in CONFIGS.values()]
    needed = {name for _, names, _ in flag_help.INSTEAD for name in names.split()}
    assert flag_help.OTHER_NAMES.keys() | needed <= set.union(*flags)
    for own in flags[:1]:  # of training
        rows = [words for words, names, _ in flag_help.INSTEAD if not names or own & set(names.split())]
        rows += [words for name, words in flag_help.OTHER_NAMES.items() if name in own - {"model"}]
        words = [word for row in rows for word in row.split()]
        assert [word for word in words if words.count(word) > 1 or word in own] == []
