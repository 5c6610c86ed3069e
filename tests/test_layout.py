"""Where code lies: every .py file at the top is a command; what is only imported is in plumbing/.

    pytest tests/test_layout.py
"""
import ast

import pytest
from helpers import ROOT

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
    for folder in (".", "bench", "plumbing", "tests", "tests/faults"):
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
