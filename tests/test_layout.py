"""Where code lies: every .py file at the top is a command; what is only imported is in plumbing/.

    pytest tests/test_layout.py
"""
import ast
import re
import subprocess
import sys

import promises
import pytest
from helpers import ROOT, needs

COMMANDS = {path.stem for path in ROOT.glob("*.py")}
PLUMBING = {path.stem for path in (ROOT / "plumbing").glob("*.py")}


def imported(path) -> set[str]:
    """All modules that a file imports, inside of functions too, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def neighbours(stem: str) -> set[str]:
    """The modules of plumbing/ that one of them imports."""
    parts = [name.split(".") for name in imported(ROOT / "plumbing" / f"{stem}.py")]
    return {words[1] for words in parts if words[0] == "plumbing"}


def test_every_top_level_file_is_a_command():
    assert COMMANDS == {"train_gpt2", "fineweb", "hellaswag", "generate", "export_hf", "plot"}
    for stem in COMMANDS:
        assert 'if __name__ == "__main__":' in (ROOT / f"{stem}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("stem", sorted(PLUMBING))
def test_plumbing_imports_no_command(stem):
    assert not {name.split(".")[0] for name in imported(ROOT / "plumbing" / f"{stem}.py")} & COMMANDS


def test_plumbing_s_imports_point_one_way():
    left = {stem: neighbours(stem) for stem in PLUMBING}
    assert any(left.values())
    while left:  # take away what imports nothing that is left; a circle would remain
        free = {stem for stem, needed in left.items() if not needed & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {stem: needed for stem, needed in left.items() if stem not in free}


def test_no_command_but_hellaswag_s_own_imports_training_in_a_circle():
    """train_gpt2 imports hellaswag, as build-nanogpt's does; hellaswag loads a model inside its main()."""
    top = ast.parse((ROOT / "hellaswag.py").read_text(encoding="utf-8")).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert "train_gpt2" not in names


def test_no_module_is_imported_under_its_old_name():
    for folder in (".", "bench", "bench/study", "plumbing", "tests", "tests/faults"):
        for path in (ROOT / folder).glob("*.py"):
            old = {module.split(".")[0] for module in imported(path)} & PLUMBING
            assert not old, f"{path} imports {old}"


def replacements(tree: ast.AST) -> list:
    """The lambdas and functions of a test that monkeypatch.setattr() puts in the place of others."""
    functions, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            found += [node.args[-1]] if isinstance(node.args[-1], ast.Lambda) else []
            found += functions.get(getattr(node.args[-1], "id", ""), [])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.stem)
def test_what_replaces_a_function_takes_any_arguments(path):
    """So that a new argument of a function breaks no test that is not about it."""
    for function in replacements(ast.parse(path.read_text(encoding="utf-8"))):
        assert function.args.vararg and function.args.kwarg, f"line {function.lineno}: give it *_ and **__"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.name)
def test_a_test_file_begins_with_the_command_that_runs_it_and_takes_nothing_from_another(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert f"\n    pytest tests/{path.name}" in (ast.get_docstring(tree, clean=False) or "")
    assert not [name for name in imported(path) if name.startswith(("test_", "conftest"))]


def test_conftest_holds_fixtures_and_hooks_alone():
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions
    for function in functions:
        assert function.name.startswith("pytest_") or "fixture" in ast.unparse(function.decorator_list[0])


def test_a_promise_is_kept_failed_or_not_checked_by_its_tests():
    ends = {"tests/test_curve.py::a": "passed", "tests/test_model.py::b": "failed", "tests/test_model.py::c": "passed",
            "tests/test_train.py::disk": "skipped", "tests/test_layout.py::test_x[test_stop.py]": "passed"}
    said = dict(line.strip().split(" | ")[::-1] for line in promises.lines(ends))
    assert said["losses over many steps: build-nanogpt's own script (1 passed)"] == "kept"
    assert said["GPT-2's architecture and initialization: transformers and the paper (1 of 2 failed)"] == "FAILED"
    assert list(said.values()).count("not checked") == len(promises.PROMISES) - 2


@pytest.mark.parametrize("files, pattern", promises.PROMISES.values())
def test_every_promise_has_tests(files, pattern):
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert all((ROOT / "tests" / f"test_{stem}.py").exists() for stem in files.split())
    assert files or re.search(pattern.replace(r"\[", "").replace("-", ""), text)


@needs("yaml")
def test_the_workflow_runs_what_ci_run_and_the_readme_run():
    import yaml

    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the word on as true
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["cancel-in-progress"]
    linux, others = workflow["jobs"].values()
    assert (linux["runs-on"], linux["steps"][-1]["run"]) == ("ubuntu-latest", ".ci/run")
    assert (ROOT / ".ci" / "run").stat().st_size
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^## Tests\n\n```\n(.*)\n```$", readme, re.MULTILINE)[1]
    assert others["steps"][-1]["run"] == command and others["defaults"]["run"]["shell"] == "bash"
    assert others["strategy"] == {"fail-fast": False, "matrix": {"os": ["macos-latest", "windows-latest"]}}
    oldest = re.search(r"Python ([\d.]+) or newer", readme)[1]
    for job in (linux, others):
        assert job["timeout-minutes"] == 60
        (python,) = (step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
        assert python["python-version"] == oldest and python["cache"] == "pip"


# What Windows lacks: modules, and names in signal and os
LACKING = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
LACKING_NAMES = {f"SIG{name}" for name in "ALRM BUS CONT HUP KILL PIPE STOP TSTP USR1 USR2 WINCH XFSZ".split()}
LACKING_NAMES |= {"fork", "geteuid", "getuid", "killpg", "mkfifo", "openpty", "setsid", "sysconf", "uname"}


def parts_run_at_import(node: ast.AST):
    """Yield the parts of a file that run when it is imported, but for those after a question what the system has."""
    if isinstance(node, ast.If | ast.IfExp | ast.BoolOp) and re.search(r"hasattr\(|os\.name", ast.unparse(node)):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from parts_run_at_import(part)


@pytest.mark.parametrize("folder", [".", "plumbing", "bench", "bench/study", "tests"])
def test_every_module_can_be_imported_on_windows(folder):
    """As far as can be told elsewhere: what is not there is not asked for before a function runs."""
    for path in (ROOT / folder).glob("*.py"):
        for node in parts_run_at_import(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, "attr", "")} & LACKING_NAMES
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                names &= LACKING
            assert not names, f"{path.relative_to(ROOT)}, line {node.lineno}: {names}"


@pytest.mark.slow
def test_every_test_file_can_be_collected_without_what_windows_lacks(tmp_path):
    (tmp_path / "windows.py").write_text(
        "import multiprocessing, os, signal, sys\n"
        "import datasets, filelock, pytest, torch, transformers, xdist\n"  # which know Windows
        f"sys.modules.update(dict.fromkeys({sorted(LACKING)}))\n"
        f"for name in {sorted(LACKING_NAMES - {'geteuid', 'sysconf', 'uname'})}:\n"  # of which libraries ask os.name
        "    vars(signal if name.startswith('SIG') else os).pop(name, None)\n"
        "multiprocessing.get_all_start_methods = lambda: ['spawn']\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-n', '0', '-m', '']))\n")
    result = subprocess.run([sys.executable, tmp_path / "windows.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "error" not in result.stdout.splitlines()[-1], result.stdout[-2000:]
