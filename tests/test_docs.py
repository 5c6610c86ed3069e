"""README.md and docs/: every command in them is run, or listed with the reason why not; links and names exist.

    pytest tests/test_docs.py
"""
import contextlib
import functools
import io
import json
import operator
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import ENCODING, ROOT, needs, python_path, run

import export_hf
import fineweb
import generate
import hellaswag
import plot
import train_gpt2
from plumbing.tokenizer import encode

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORDS = {"faults.md", "mutants.md"}  # pages that are written by a command: they show no usage
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|torchrun|pytest|pip|lm_eval|tensorboard|head|sbatch|bench/|\.ci/)")
EXAMPLES = "tests/hellaswag_examples.jsonl"

# How a command is made quick: these flags come before its own, which win over them,
BEFORE = {
    "train_gpt2.py": "--hellaswag_every 0 --sample_every 0",
    "fineweb.py": "--source my_texts --out edu_fineweb10B",
    "hellaswag.py": f"--data {EXAMPLES}",
}
# and these behind, so that they win. Training takes the smallest model on 8 sequences per step.
AFTER = {
    "train_gpt2.py": "--n_layer 2 --n_head 2 --n_embd 16 --sequence_length 16 --total_batch_size 128 --max_steps 6 "
                     "--micro_batch_size 4 --warmup_steps 2 --decay_steps 0 --val_tokens 320 --checkpoint_every 2 "
                     "--dtype float32 --device cpu",
    "fineweb.py": "--shard_size 2000",
    "hellaswag.py": "--limit 4 --device cpu",
    "generate.py": "--max_new_tokens 4 --device cpu",
}
# Words that stand for something else in the test: files that this repository does not hold, or other steps.
REPLACED = {
    "log/model_019073.pt": "log/model_000006.pt",
    "log/model_019000.pt": "log/model_000004.pt",
    "log/stable/model_010000.pt": "log/stable/model_000006.pt",
    "hellaswag_val_2000.jsonl": EXAMPLES,
    "/shared/fineweb_edu": "edu_fineweb10B",
}
OPENAI = {"--model", "--init_from"}  # after these flags, the name gpt2 stands for weights that are downloaded

# Commands that are not run, by how they begin.
NOT_RUN = {
    "pip install": "needs a package index",
    "python fineweb.py --download": "needs a network",
    "python export_hf.py log/demo out/ --push_to_hub": "needs a network; tests/test_upload.py has a hub",
    "lm_eval": "downloads HellaSwag; tests/test_export.py calls lm-eval itself",
    "tensorboard": "runs until it is stopped",
    "torchrun --nnodes=2": "needs several machines",
    "sbatch": "needs a cluster",
    "bench/gpu.sh": "needs a GPU; tests/test_bench.py runs it on a CPU",
    "python -m bench.": "takes minutes; tests/test_bench.py and tests/test_study.py run them at toy size",
    "python tests/faults/run.py": "takes minutes; tests/test_faults.py runs its parts",
    "python tests/mutants.py": "takes most of an hour; tests/test_mutants.py checks what it would do",
    "pytest": "is what runs this",
    ".ci/run": "runs this",
}
# Flags in the texts that belong to other programs.
FOREIGN = {"standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts", "model_args",
           "tasks", "logdir", "array", "cpus-per-task", "wrap", "signal", "requeue", "open-mode", "nodes", "time",
           "ntasks-per-node", "gpus-per-node", "outfile", "rdzv_id", "block_size", "learning_rate", "start"}


class Command(NamedTuple):
    """A command in a page."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def reason(self) -> str | None:
        """Why it is not run; None if it is."""
        return next((reason for start, reason in NOT_RUN.items() if self.text.startswith(start)), None)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced code block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found]


def commands_of(page: Path) -> list[Command]:
    """Return the commands of a page in order, without comments; A && B are two."""
    found = []
    for language, text in blocks(page):
        if language in ("", "sh"):
            for line in re.sub(r"\\\n\s*", "", text).splitlines():
                line = re.sub(r"\s+# .*", "", line).strip()
                assert not line or COMMAND.match(line), f"{page.name}: no command that this test knows: {line}"
                found += [Command(page.name, part) for part in line.split(" && ") if part]
    return found


COMMANDS = [command for page in PAGES for command in commands_of(page)]


def made_quick(command: Command) -> tuple[str, list[str], int]:
    """Return (script, arguments, ranks) of a command, with what makes it quick."""
    words = [REPLACED.get(word, word) for word in command.words]
    words = ["openai" if word == "gpt2" and before in OPENAI else word for before, word in zip(["", *words], words)]
    ranks = 2 if words[0] == "torchrun" else 1
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[place], words[place + 1:]
    if "--verify" not in arguments:
        after = AFTER.get(script, "")
        if "--branch_from" in arguments:  # beyond where that run has ended
            after += " --max_steps 12"
        if "--decay_steps" in arguments:
            after += " --decay_steps 2"
        if ranks > 1 and script == "train_gpt2.py":  # not the folder of a run that has ended
            after += " --out_dir log/ranks"
        arguments = [*BEFORE.get(script, "").split(), *arguments, *after.split()]
    return script, arguments, ranks


def fill(folder: Path) -> None:
    """Lay out the repository, with small texts, where the commands run."""
    for name in ("plumbing", "bench", "tests", *(path.name for path in ROOT.glob("*.py"))):
        (folder / name).symlink_to(ROOT / name)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    (folder / "input.txt").write_text(text[:60_000], encoding="utf-8")
    (folder / "my.txt").write_text(text[60_000:90_000], encoding="utf-8")
    (folder / "my_texts").mkdir()
    documents = [json.dumps({"text": story}) for story in text[90_000:120_000].split("\n\n")]
    (folder / "my_texts" / "stories.jsonl").write_text("\n".join(documents), encoding="utf-8")


def fill_others(folder: Path) -> None:
    """Lay out what other projects leave: nanoGPT, build-nanogpt, llm.c, datasets, and a folder of texts."""
    from datasets import Dataset
    from helpers import nanogpt, write_build_nanogpt

    text = (folder / "input.txt").read_text(encoding="utf-8")
    stories, tokens = text.split("\n\n")[:60], np.array(encode(text), dtype=np.uint16)
    folders = ["nanoGPT/data/openwebtext", "nanoGPT/data/shakespeare_char", "nanoGPT/out", "build-nanogpt/log",
               "build-nanogpt/edu_fineweb10B", "llm.c/dev/data/fineweb10B", "my_stories"]
    for name in folders:
        (folder / name).mkdir(parents=True)
    header = np.zeros(256, dtype=np.int32)
    for split, part in (("val", tokens[:2000]), ("train", tokens[2000:])):
        part.tofile(folder / "nanoGPT/data/openwebtext" / f"{split}.bin")
        np.save(folder / "build-nanogpt/edu_fineweb10B" / f"edufineweb_{split}_000000.npy", part)
        header[:3] = 20240520, 1, len(part)
        (folder / "llm.c/dev/data/fineweb10B" / f"fineweb_{split}_000000.bin").write_bytes(
            header.tobytes() + part.tobytes())
    (folder / "nanoGPT/data/shakespeare_char/input.txt").write_text(text[:30_000], encoding="utf-8")
    model = train_gpt2.GPT(train_gpt2.GPTConfig(16, 50304, n_layer=2, n_head=2, n_embd=8))
    torch.save(nanogpt(model.state_dict()), folder / "nanoGPT/out/ckpt.pt")
    write_build_nanogpt(folder / "build-nanogpt/log/model_19072.pt", dict(model.state_dict()))
    Dataset.from_dict({"text": stories}).save_to_disk(folder / "my_dataset")
    for i, story in enumerate(stories):
        (folder / "my_stories" / f"{i}.txt").write_text(story, encoding="utf-8")


# Commands that are run in this process, as they import transformers or are many.
HERE = {"export_hf.py": export_hf.main, "fineweb.py": fineweb.main, "generate.py": generate.main,
        "hellaswag.py": hellaswag.main, "plot.py": plot.main}


def execute_here(main, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Do what a command does, in this process and in `folder`."""
    code, streams = 0, [contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())]
    with contextlib.chdir(folder), streams[0] as stdout, streams[1] as stderr, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(signal, "signal", lambda *_, **__: None)  # hellaswag.py sets one for its process
        try:
            main(arguments)
        except Exception:
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def execute(command: Command, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in `folder` to its end."""
    first, pipe, second = command.text.rpartition(" | ")
    script, arguments, ranks = made_quick(Command(command.page, second))
    if not pipe and ranks == 1 and script in HERE:
        return execute_here(HERE[script], arguments, folder)
    if not pipe:
        return run(arguments, ranks, cwd=folder, script=folder / script)
    line = f"set -o pipefail; {first} | {shlex.join([sys.executable, script, *arguments])}"
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": python_path()})


@pytest.mark.dist
@pytest.mark.slow
@needs(*ENCODING, "datasets", "gigatoken", "matplotlib", "safetensors", "tensorboard", "transformers")
def test_every_command_runs(tmp_path):
    """In the order of the pages, in one folder: what one command leaves, others use."""
    fill(tmp_path)
    fill_others(tmp_path)
    failures, done = [], set()
    for command in COMMANDS:
        known = command.text, (tmp_path / "edu_fineweb10B").exists()  # without shards, training is the demo
        if command.reason or known in done:
            continue
        done.add(known)
        result = execute(command, tmp_path)
        if result.returncode:
            failures.append(f"{command.page}: {command.text}\n{result.stdout[-500:]}{result.stderr[-1000:]}")
        if not (tmp_path / "openai").exists():  # what stands for OpenAI's weights
            result = execute_here(export_hf.main, ["log/demo", "openai"], tmp_path)
            assert result.returncode == 0, result.stderr
    assert not failures, "\n\n".join(failures)


def test_what_is_not_run_is_in_the_pages():
    """No exception outlives its command."""
    assert [start for start in NOT_RUN if not any(command.text.startswith(start) for command in COMMANDS)] == []


def test_commands_begin_with_a_script_or_program_that_is_there():
    for command in COMMANDS:
        if command.words[:2] == ["python", "-m"]:
            module = ROOT / command.words[2].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), command
        for word in command.words:
            if word.endswith((".py", ".sh")) and not word.startswith("-"):
                assert (ROOT / word).is_file(), command


def known_flags() -> set[str]:
    """Every flag of our commands: the fields of their dataclasses."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "bench").rglob("*.py"), ROOT / "tests" / "faults" / "run.py"]
    fields = {name for path in sources for name in
              re.findall(r"^    (\w+): .+  # ", path.read_text(encoding="utf-8"), re.MULTILINE)}
    return fields | {"help", "preset"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    flags = re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text(encoding="utf-8"))
    known = known_flags() | FOREIGN
    assert {flag for flag in flags if flag.removeprefix("no-") not in known} == set()


def names_in_code() -> set[str]:
    """The names that docs/changing.md says are to be changed: `name`, `name(...)` or `Class.name`."""
    section = (ROOT / "docs" / "changing.md").read_text(encoding="utf-8")
    return set(re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)(?:\([^`]*\))?`", section))


@pytest.mark.parametrize("name", [
    "get_lr", "configure_optimizers", "GPT.hidden_states", "CausalSelfAttention.forward", "TrainConfig"])
def test_what_is_to_be_changed_is_there(name):
    assert name in names_in_code()
    assert operator.attrgetter(name)(train_gpt2)


def test_readme_names_the_sections_of_train_gpt2():
    source = Path(train_gpt2.__file__).read_text(encoding="utf-8")
    sections = re.findall(r"^# (\d)\. ([\w ,]+)", source, re.MULTILINE)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()).lower()
    assert len(sections) > 3
    for number, title in sections:
        assert f"{number} {title.strip().lower()}" in text


def test_python_in_the_pages_imports_what_exists():
    for page in PAGES:
        for language, text in blocks(page):
            if language == "python":
                compile(text, page.name, "exec")
                exec("\n".join(re.findall(r"^from train_gpt2 import .+", text, re.MULTILINE)), {})


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if page.name not in RECORDS], ids=lambda page: page.name)
def test_page_begins_with_its_command(page):
    title, blank, fence, first = page.read_text(encoding="utf-8").splitlines()[:4]
    assert title.startswith("# ") and not blank and fence == "```"
    assert COMMAND.match(first)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path) if path else page
        assert where.exists(), target
        assert not anchor or anchor in anchors(where), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words_are_plain(page):
    text = page.read_text(encoding="utf-8")
    assert [word for word in ("plan card", "the curriculum", "DESIGN") if word in text] == []
