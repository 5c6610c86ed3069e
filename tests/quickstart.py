"""Execute docs/quickstart.ipynb in a copy of this repository: python tests/quickstart.py [--write]

It prints the validation losses of the notebook and of this execution. With --write the outputs are stored in the
notebook, without what belongs to this machine: paths, time stamps, what a progress bar has overwritten.
"""
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SECONDS = 3600  # for a cell, at most


def execute(folder: Path, second_steps: int = 0):
    """Execute the notebook in `folder`, on a copy of the code -> the notebook with its outputs.

    With `second_steps` its second training is that short, as a test that has seen the first one to its end can afford.
    Raises nbclient's CellExecutionError if a cell does.
    """
    for name in ("plumbing", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "input.txt"):
        shutil.copy(path, folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells if second_steps else ():
        cell.source = cell.source.replace('PRESETS["demo"] | {', f'PRESETS["demo"] | {{"max_steps": {second_steps}, ')
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                   "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(folder / "docs")}})
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [cleaned(output, folder) for output in joined(cell.outputs)]
    return notebook


def joined(outputs: list) -> list:
    """Join what was written to stdout and stderr in pieces."""
    result = []
    for output in outputs:
        if output.output_type == "stream" and result and result[-1].get("name") == output.name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def cleaned(output, folder: Path):
    """Take from an output what a terminal would not show any more, and the paths of this machine."""
    if output.output_type == "stream":
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.text.replace("\r\n", "\n"))
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
        output.text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    for kind in set(output.get("data", ())) - {"image/png", "text/plain"}:
        del output.data[kind]
    return output


def losses(notebook) -> list[float]:
    """List the validation losses that the outputs of a notebook tell, in order."""
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    return [float(loss) for loss in re.findall(r"\| validation loss (\d+\.\d+)", text)]


def main() -> None:
    """Run the command."""
    stored = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as name:
        notebook = execute(Path(name).resolve())
    print("stored: ", losses(stored))
    print("now:    ", losses(notebook))
    if "--write" in sys.argv[1:]:
        nbformat.write(notebook, NOTEBOOK)
        print(f"{NOTEBOOK.relative_to(ROOT)}: {NOTEBOOK.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
