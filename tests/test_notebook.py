"""The quickstart notebook is whole, private and true.

    pytest tests/test_notebook.py
    pytest tests/test_notebook.py -m slow    # executes it anew
"""
import base64
import json
import re
import shlex
import socket
from typing import NamedTuple

import pytest
from helpers import ENCODING, command_configs, needs

from plumbing.cli import parse_flags
from plumbing.published import DEMO

pytestmark = needs("nbclient", "nbformat", "ipykernel", "matplotlib", *ENCODING)


class Cells(NamedTuple):
    """The notebook, and the texts of its outputs."""
    notebook: dict
    outputs: list[dict]
    text: str


@pytest.fixture(scope="module")
def tool():
    """tests/quickstart.py, which imports packages that may be missing."""
    import quickstart

    return quickstart


@pytest.fixture(scope="module")
def cells(tool) -> Cells:
    import nbformat

    notebook = nbformat.read(tool.NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return Cells(notebook, outputs, "".join(output.get("text", "") for output in outputs))


def test_the_notebook_is_valid_and_small(cells, tool):
    import nbformat

    nbformat.validate(cells.notebook)
    assert tool.NOTEBOOK.stat().st_size < 500_000
    lengths = [len(cell.source.splitlines()) for cell in cells.notebook.cells]
    assert max(lengths) <= 30 and len(lengths) > 15  # short cells


def test_every_cell_has_run_in_order_and_without_an_error(cells):
    code = [cell for cell in cells.notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code[1:])  # the first gets the code
    assert not [output for output in cells.outputs if output.output_type == "error"]
    assert "error:" not in cells.text and "Traceback" not in cells.text


def test_the_outputs_are_readable_and_tell_nothing_of_a_machine(cells):
    assert not re.search(r"[\r\x1b\x08]", cells.text)
    whole = json.dumps(cells.notebook)
    assert not re.search(r"/(home|root|tmp|work|Users|var|opt|usr|mnt)/", whole)
    host = socket.gethostname()
    assert len(host) < 5 or host not in whole
    assert not [cell for cell in cells.notebook.cells if "execution" in cell.metadata]  # time stamps


def test_the_pictures_are_png(cells):
    pictures = [output.data["image/png"] for output in cells.outputs if "image/png" in output.get("data", ())]
    assert len(pictures) == 2
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_the_commands_of_the_notebook_have_flags_that_exist(cells):
    sources = "\n".join(cell.source for cell in cells.notebook.cells).replace("\\\n", " ")
    commands = re.findall(r"^!?python (\w+)\.py\b(.*)$", sources, re.MULTILINE)
    assert {name for name, _ in commands} >= {"train_gpt2", "fineweb", "generate", "plot"}
    for name, words in commands:
        config, positional = command_configs()[name]
        config(**parse_flags(config, shlex.split(words), "", positional))


def test_the_outputs_agree_with_the_recorded_result_of_the_demo(cells, tool):
    found = tool.losses(cells.notebook)
    assert len(found) == 8  # two runs, four validations each
    assert found[3] == pytest.approx(DEMO["loss"], abs=DEMO["tolerance"])
    assert found[7] == pytest.approx(found[3], abs=0.05)


def test_outputs_are_cleaned_as_a_terminal_shows_them(tmp_path, tool):
    from nbformat.v4 import new_output

    pieces = [new_output("stream", name="stdout", text=text) for text in (
        f"reading {tmp_path}/log/demo\r\n 10 %|#   |\r100", " %|####|\r\n\x1b[1mdone\x1b[0m  \n")]
    (output,) = tool.joined(pieces)
    assert tool.cleaned(output, tmp_path).text == "reading log/demo\n100 %|####|\ndone\n"
    shown = new_output("display_data", data={"image/png": "x", "text/plain": "<Image>", "text/html": "<x>"})
    assert tool.cleaned(shown, tmp_path).data.keys() == {"image/png", "text/plain"}


@pytest.mark.slow
def test_the_notebook_runs_and_gives_the_stored_losses(cells, tmp_path, tool):
    stored, now = tool.losses(cells.notebook), tool.losses(tool.execute(tmp_path, second_steps=30))
    assert now[:4] == pytest.approx(stored[:4], abs=0.05)  # another CPU rounds otherwise
    assert len(now) == 6 and now[4] == pytest.approx(stored[4], abs=0.05) and now[5] < now[4]  # the second, cut short
