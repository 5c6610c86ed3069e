"""Measure how the code reads: `python tests/style.py` prints the figures, test_style.py holds them to their limits."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "plumbing", "bench", "bench/study", "tests", "tests/faults")


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """List all functions and methods in a syntax tree."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def count_parameters(function: ast.FunctionDef) -> int:
    """Count the parameters of a function, without self and cls."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def count_locals(function: ast.FunctionDef) -> int:
    """Count the names that a function binds, parameters but self among them."""
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return len(names) + count_parameters(function)


def depth(node: ast.AST) -> int:
    """Return how deep loops are nested in a node, itself included."""
    inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, (ast.For, ast.While))


def public_names(tree: ast.Module) -> list[ast.AST]:
    """List the classes, functions and methods of a module that are for others to use."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found.append(node)
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            # the docstring of a module of PyTorch gives the shapes of its forward()
            found += [method for method in methods if not method.name.startswith("_") and method.name != "forward"]
    return found


def figures() -> dict[str, int | float]:
    """Measure the figures, by name."""
    text = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    written = [line for line in lines if line.strip()]
    modules = [node for node in tree.body if isinstance(node, ast.ClassDef)
               and any(ast.unparse(base) == "nn.Module" for base in node.bases)]
    training = next(function for function in functions(tree) if function.name == "train")
    (loop,) = (node for node in training.body if isinstance(node, ast.For))
    named = [name for path in (*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py"))
             for name in public_names(ast.parse(path.read_text(encoding="utf-8")))]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sibling = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("*.py")}
    everything = [function for folder in FOLDERS for path in (ROOT / folder).glob("*.py")
                  for function in functions(ast.parse(path.read_text(encoding="utf-8")))]
    return {
        "lines of train_gpt2.py": len(lines),
        "mean length of its lines": round(sum(map(len, written)) / len(written), 1),
        "line of its first nn.Module": modules[0].lineno,
        "line where its loop begins": loop.lineno,
        "lines of the loop's body": loop.end_lineno - loop.body[0].lineno + 1,
        "nesting of its loops": depth(loop),
        "local names of the function that trains": count_locals(training),
        "top-level files": len(sibling),
        "lines of hellaswag.py": sibling["hellaswag.py"],
        "lines of fineweb.py": sibling["fineweb.py"],
        "lines of generate.py, export_hf.py, plot.py, at most": max(
            sibling[name] for name in ("generate.py", "export_hf.py", "plot.py")),
        "lines of a function, at most": max(function.end_lineno - function.lineno + 1 for function in everything),
        "parameters of a function, at most": max(map(count_parameters, everything)),
        "public names without a docstring": len([name.name for name in named if not ast.get_docstring(name)]),
        "lines of README.md": len(readme.splitlines()),
        "words of README.md": len(readme.split()),
    }


if __name__ == "__main__":
    for name, figure in figures().items():
        print(f"{name:<56}{figure:>8,}")
