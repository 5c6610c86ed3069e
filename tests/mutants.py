"""Take each safeguard of safeguards.py out, one at a time, and name the test that notices: writes docs/mutants.md.

    python tests/mutants.py --workers 2                      # all of them, half an hour on two cores
    python tests/mutants.py --only lr_warmup,causal_mask     # these rows of the record anew
    python tests/mutants.py --list                           # the names, and what each takes out

All happens in a copy of the repository. A mutant is found if one of its tests fails that passes on the unchanged copy;
those of the default run come first, then the slow ones. The exit code is 1 if one survives.
"""
import datetime
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from safeguards import MUTANTS, Mutant

from plumbing import cli

RECORD = ROOT / "docs" / "mutants.md"
SECONDS = 300  # for the tests of one mutant
RUNS = {"default": "not slow and not gpu", "slow": "slow and not gpu"}  # name of a run -> pytest's -m
COLUMNS = ("name", "safeguard", "file", "test that finds it", "run", "commit")


@dataclass
class MutantsConfig:
    """What to try."""

    only: str = ""  # names of mutants, with commas between them (empty: all)
    workers: cli.Positive = 1  # mutants that are tried at the same time
    list: bool = False  # print the names, and change nothing


class Outcome(NamedTuple):
    """What pytest said: the first test that failed; if there is none, whether tests have passed; its last words."""

    failed: str
    passed: bool
    said: str


def problems(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """Return one line for each mutant that cannot be made of the code as it is."""
    found = []
    for mutant in mutants:
        path = root / mutant.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(mutant.old) != 1:
            found.append(f"{mutant.name}: its text is {text.count(mutant.old)} times in {mutant.file}, not once")
            continue
        try:
            compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
        except SyntaxError as error:
            found.append(f"{mutant.name}: {mutant.file} does not compile: {error}")
    names = [mutant.name for mutant in mutants]
    return found + [f"{name}: there are two of that name" for name in sorted({*names}) if names.count(name) > 1]


def copy_repository(folder: Path) -> None:
    """Copy the files that git lists, as they are in the working tree, and new ones that it does not ignore."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, listed):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def git(*words: str) -> str:
    """Return what a git command prints in this repository."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def run_tests(folder: Path, tests: str, run: str) -> Outcome:
    """Run tests in the copy up to the first that fails; `tests` are arguments of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=no",
               "--basetemp", str(folder.with_name("pytest")), "-m", RUNS[run], *shlex.split(tests)]
    # no bytecode: a change of the same size in the same second would not be seen
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            said = process.communicate(timeout=SECONDS)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Outcome("", False, f"nothing for {SECONDS} s")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?\.py::.+?)(?: - .*)?$", said, re.MULTILINE)
    passed = re.search(r"^\d+ passed", said, re.MULTILINE)
    return Outcome(failed[1] if failed else "", bool(passed), (said.strip().splitlines() or ["nothing"])[-1])


class Trial:
    """Tries mutants in one copy of the repository, one at a time.

    `unchanged`, which all copies share, has what each selection of tests says without any mutant.
    """

    def __init__(self, folder: Path, unchanged: dict):
        self.folder, self.unchanged = folder, unchanged
        copy_repository(folder)

    def before(self, tests: str, run: str) -> Outcome:
        """Return what the tests say of the unchanged copy."""
        if (tests, run) not in self.unchanged:
            self.unchanged[tests, run] = run_tests(self.folder, tests, run)
        return self.unchanged[tests, run]

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        """Return (the test that finds a mutant, in which run); or (what happened instead, "")."""
        path, tried = self.folder / mutant.file, False
        text = path.read_text(encoding="utf-8")
        for run in RUNS:
            before = self.before(mutant.tests, run)
            if before.failed:
                return f"NO VERDICT: {before.failed} fails without it", ""
            if not before.passed:  # none of these tests is in this run
                continue
            tried = True
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            try:
                outcome = run_tests(self.folder, mutant.tests, run)
            finally:
                path.write_text(text, encoding="utf-8")
            if outcome.failed:
                return outcome.failed, run
            if not outcome.passed:
                return (f"{mutant.tests} hangs", run) if mutant.hangs else (f"NO VERDICT: {outcome.said}", "")
        return ("SURVIVED" if tried else f"NO VERDICT: no tests: {before.said}"), ""


def judge_all(mutants: list[Mutant], workers: int):
    """Yield (mutant, the test that finds it, in which run) for each, in this order, as Trial.judge() says."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(workers) as pool:
        free, unchanged = queue.SimpleQueue(), {}
        for i in range(workers):
            free.put(Trial(Path(folder) / str(i) / "copy", unchanged))

        def judge(mutant: Mutant) -> tuple[str, str]:
            trial = free.get()
            try:
                return trial.judge(mutant)
            finally:
                free.put(trial)

        try:
            for mutant, (test, run) in zip(mutants, pool.map(judge, mutants)):
                yield mutant, test, run
        finally:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C no others are begun


def row(mutant: Mutant, test: str, run: str, commit: str) -> str:
    """Return the row of a mutant in the record."""
    cells = [mutant.name, mutant.safeguard, f"`{mutant.file}`", f"`{test}`" if run else test, run or "-", commit]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def rows_of(text: str) -> dict[str, str]:
    """Return {name: row} of a record."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.endswith(" |")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows[1:]}


def write_record(new: dict[str, str], command: str) -> None:
    """Put new rows into docs/mutants.md, where those of other mutants stay."""
    old = rows_of(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    rows = [(old | new)[mutant.name] for mutant in MUTANTS if mutant.name in old | new]
    runs = [line.split(" | ")[-2] for line in rows]
    found = len(rows) - runs.count("-")
    head = ["# Each safeguard taken out, and the test that notices", "",
            "`python tests/mutants.py` writes this. It takes one safeguard out at a time, in a copy of the repository, "
            "and runs the",
            "tests that should notice: a row names the first that failed, and whether it is in the default run of "
            "pytest or only in", "`pytest -m slow`. A safeguard is a small piece of text in `tests/safeguards.py`.", "",
            f"{len(rows)} safeguards: {found} found ({runs.count('default')} by the default run, {runs.count('slow')} "
            f"by the slow one), {len(rows) - found} not. Last", f"run on {datetime.date.today()}: `{command}`.", "",
            f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    RECORD.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")


def commit_of() -> str:
    """Return the commit that is tried, with a + if something but the record has been changed since."""
    changed = [line for line in git("status", "--porcelain").splitlines() if not line.endswith(RECORD.name)]
    return git("rev-parse", "--short=7", "HEAD").strip() + "+" * bool(changed)


def main(argv: list[str]) -> None:
    """Run the command with these flags."""
    config = MutantsConfig(**cli.parse_flags(MutantsConfig, argv, "Take out one safeguard at a time."))
    if wrong := problems(MUTANTS):
        raise cli.UserError("; ".join(wrong))
    known = {mutant.name: mutant for mutant in MUTANTS}
    names = config.only.split(",") if config.only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise cli.UserError(f"no mutant {unknown[0]!r}: --list names them")
    if config.list:
        print("\n".join(f"{name}: {known[name].safeguard}" for name in names))
        return
    commit, lost, command = commit_of(), 0, shlex.join(["python", "tests/mutants.py", *argv])
    for mutant, test, run in judge_all([known[name] for name in names], config.workers):
        lost += not run
        print(f"{mutant.name}: {test}{run and f' ({run})'}", flush=True)
        write_record({mutant.name: row(mutant, test, run, commit)}, command)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
