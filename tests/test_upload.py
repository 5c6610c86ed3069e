"""export_hf.py --push_to_hub: the real client uploads to a hub on loopback; what was exported stays in any case.

    pytest tests/test_upload.py
"""
import re

import pytest
from helpers import ENCODING, ROOT, needs, random_gpt2, run
from hub import hub, use_here

import export_hf
from plumbing.cli import UserError

pytestmark = needs(*ENCODING, "transformers")
SCRIPT = ROOT / "export_hf.py"


@pytest.fixture
def loopback(tmp_path):
    """(the environment that makes a loopback server the hub, with a token that may write; its handler class)."""
    random_gpt2(tmp_path / "model", n_layer=1, n_head=2, n_embd=16, n_positions=32)
    with hub({}, tmp_path / "cache") as (environment, handler):
        yield {**environment, "HF_TOKEN": handler.token}, handler


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_exported_folder_is_uploaded(loopback, tmp_path, monkeypatch):
    environment, handler = loopback
    result = run(["model", "out", "--push_to_hub", "me/small"], cwd=tmp_path, script=SCRIPT, **environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("out: loaded again by") and lines[1].startswith("uploaded to http://127.0.0.1:")
    assert lines[1].endswith("/me/small")
    assert handler.uploaded == {"me/small": contents(tmp_path / "out")}
    monkeypatch.chdir(tmp_path)
    use_here(environment, monkeypatch)
    export_hf.main(["model", "again", "--push_to_hub", "me/small"])  # a repository that exists gets another commit
    assert handler.uploaded == {"me/small": contents(tmp_path / "again")}


@pytest.mark.parametrize("name, changes, trouble, message", [
    ("me/small", {"HF_TOKEN": ""}, None, "log in with `hf auth login`"),
    ("me/small", {"HF_TOKEN": "hf_wrong"}, None, "log in with `hf auth login`"),
    ("other/small", {}, None, "you may not write to other/small: name one of your own"),
    ("me/small", {"HF_HUB_OFFLINE": "1"}, None, "unset HF_HUB_OFFLINE"),
    ("me/small", {"HF_ENDPOINT": "http://127.0.0.1:9"}, None, "check the network"),
    ("me/small", {}, "/commit/", "the hub answered 418, which refuses it"),
    ("me/small", {}, "/put/", "the hub answered 418, which refuses it"),
])
def test_an_upload_that_fails_is_one_line_and_the_folder_stays(name, changes, trouble, message, loopback, tmp_path,
                                                               monkeypatch):
    environment, handler = loopback
    handler.trouble = staticmethod(lambda path: 418 if trouble and trouble in path else None)
    monkeypatch.chdir(tmp_path)
    use_here({**environment, **changes}, monkeypatch)
    with pytest.raises(UserError) as error:
        export_hf.main(["model", "out", "--push_to_hub", name])
    line = str(error.value)
    assert line.startswith(f"cannot upload to {name}: {message}") and "\n" not in line
    assert f"upload it with `hf upload {name} out .`" in line and "hf_" not in line.replace("hf_hub", "")
    assert "model.safetensors" in contents(tmp_path / "out") and "README.md" in contents(tmp_path / "out")


def test_the_command_that_uploads_later_can_be_typed(loopback, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_here({**loopback[0], "HF_TOKEN": ""}, monkeypatch)
    with pytest.raises(UserError, match=re.escape("`hf upload me/small 'my out' .`")):
        export_hf.main(["model", "my out", "--push_to_hub", "me/small"])


@pytest.mark.parametrize("name", ["small", "me/", "/small", "me/small/more", "https://hub/me/small", "me/a b", "me/-x",
                                  "me/x.", "me/x.git", "me/a--b", "me/é", "me/" + "a" * 97])
def test_a_name_of_another_form_is_refused_before_anything_is_exported(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"--push_to_hub is {name!r}, it must be OWNER/NAME")):
        export_hf.main(["no model yet", "out", "--push_to_hub", name])
