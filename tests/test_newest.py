"""Commands without a model: which run below log/ they take, what they say, and what a mistyped name suggests.

    pytest tests/test_newest.py
"""
import dataclasses
import os
import shutil

import pytest
from helpers import ENCODING, ROOT, flags, needs, run, write_log, write_shards

import export_hf
import hellaswag
import plot
from generate import GenerateConfig
from plumbing import models
from plumbing.cli import UserError
from plumbing.files import CheckpointError

pytestmark = needs(*ENCODING)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of 6 steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(flags(data=write_shards(folder / "data"), out_dir=folder / "run"), cwd=folder).returncode == 0
    return folder / "run"


def place(trained, folder, date, step=6):
    """A copy of the run, its newest checkpoint of that step and date."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    (folder / "model_000006.pt").rename(folder / f"model_{step:06d}.pt")
    for path in folder.iterdir():
        os.utime(path, (date, date))


def test_it_is_the_run_of_the_newest_checkpoint_whatever_the_depth_and_the_step(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = GenerateConfig()
    with pytest.raises(UserError, match=r"has a checkpoint: train one first, python train_gpt2.py, or name a model, "
                                        r"such as --model gpt2"):
        models.or_newest(config)
    assert models.or_newest(dataclasses.replace(config, model="gpt2")).model == "gpt2"
    for i, folder in enumerate(["", "b", "a/deep/er", "c"]):
        place(trained, tmp_path / "log" / folder, 1000 + i, step=10 - i)
        assert models.or_newest(config).model == str(os.path.normpath(f"log/{folder}"))
        assert capsys.readouterr().err == f"using {os.path.normpath(f'log/{folder}')}, step {10 - i}\n"
    os.utime("log/b/model_000009.pt", (5000, 5000))
    assert models.or_newest(config).model == "log/b"
    (tmp_path / "elsewhere").mkdir()
    place(trained, tmp_path / "elsewhere" / "linked", 6000)
    (tmp_path / "log" / "link").symlink_to(tmp_path / "elsewhere" / "linked")
    (tmp_path / "elsewhere" / "linked" / "circle").symlink_to(tmp_path / "log")
    assert models.or_newest(config).model == "log/link"


@pytest.mark.parametrize("spoil", ["empty", "cut", "foreign", "text", "half-written", "transformers", "folder"])
def test_what_cannot_be_read_is_passed_over(spoil, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(trained, tmp_path / "log" / "good", 1000)
    bad = tmp_path / "log" / "bad"
    place(trained, bad, 2000)
    for path in bad.glob("model_*.pt"):
        data = path.read_bytes()
        path.unlink()
        if spoil == "half-written":
            path.with_name(f"{path.name}.tmp").write_bytes(data[:999])
        elif spoil == "folder":
            path.mkdir()
        elif spoil == "transformers":
            path.write_bytes(data)
            (bad / "config.json").write_text("{}")
        else:
            path.write_bytes({"empty": b"", "cut": data[:-200], "foreign": b"PK\3\4", "text": b"hello"}[spoil])
    assert models.or_newest(GenerateConfig()).model == "log/good"
    shutil.rmtree("log/good")
    with pytest.raises(UserError, match=r"no run below .*log has a checkpoint"):
        models.or_newest(GenerateConfig())


def test_an_older_checkpoint_of_the_newest_run_will_do(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place(trained, tmp_path / "log" / "demo", 1000)
    (tmp_path / "log" / "demo" / "model_000006.pt").write_bytes(b"cut off")
    assert models.or_newest(GenerateConfig()).model == "log/demo"
    assert "using log/demo, step 4" in capsys.readouterr().err


@pytest.mark.slow
def test_every_command_takes_it(trained, tmp_path):
    place(trained, tmp_path / "log" / "demo", 1000)
    examples = ROOT / "tests" / "hellaswag_examples.jsonl"
    for script, arguments in (("generate.py", ["--max_new_tokens", "2", "--device", "cpu"]), ("plot.py", []),
                              ("export_hf.py", []), ("export_hf.py", ["mine/"]),
                              ("hellaswag.py", ["--data", examples, "--limit", "2"])):
        result = run(arguments, cwd=tmp_path, script=ROOT / script)
        assert result.returncode == 0, result.stderr
        assert "using log/demo, step 6\n" in result.stderr and "using" not in result.stdout
    assert (tmp_path / "out_demo_6" / "config.json").exists() and (tmp_path / "mine" / "config.json").exists()
    assert (tmp_path / "log" / "demo" / "loss.png").exists()
    for arguments in ([], ["mine"]):  # what is there stays
        result = run(arguments, cwd=tmp_path, script=ROOT / "export_hf.py")
        assert result.returncode == 2 and "exists already: name a new folder" in result.stderr


def test_a_name_alone_is_a_model_where_there_is_one_and_else_the_new_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(trained, tmp_path / "log" / "demo", 1000)
    for name in ("log/demo", "log/demo/model_000006.pt", "gpt2", "missing.pt", "demo", "log/dem"):
        assert export_hf.named_alone({"model": name}) == {"model": name}
    assert export_hf.named_alone({"model": "new/"}) == {"model": "", "out": "new/"}
    assert export_hf.named_alone({"model": "x", "out": "y"}) == {"model": "x", "out": "y"}


@pytest.mark.parametrize("name, guess", [
    ("demo", "log/demo"), ("log/dmeo", "log/demo"), ("demo/", "log/demo"), ("deeper", "log/a/deeper"), ("zebra", None),
    ("log/demo/model_000180.pt", "log/demo/model_000006.pt"), ("a/deeper", "log/a/deeper"), ("elsewhere/x.pt", None),
])
def test_a_name_that_resembles_a_run_is_suggested(name, guess, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(trained, tmp_path / "log" / "demo", 1000)
    place(trained, tmp_path / "log" / "a" / "deeper", 900)
    with pytest.raises((UserError, CheckpointError)) as caught:
        models.read_model(name)
    said = str(caught.value)
    assert (f"did you mean {guess}?" in said) if guess else "did you mean" not in said
    with pytest.raises(UserError, match=r"log holds neither .*: did you mean log/demo\?"):
        models.find("log")


def test_plot_takes_the_log_that_was_written_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run below log/ has a log with losses: train first"):
        plot.main([])
    for i, name in enumerate(["old", "new", "torn", "empty"]):
        path = write_log(tmp_path / "log" / name, steps=20 + 10 * i) / "log.jsonl"
        if name in ("torn", "empty"):
            path.write_text('{"kind": "run", "conf' if name == "torn" else "")
        os.utime(path, (1000 + i, 1000 + i))
    plot.main([])
    said = capsys.readouterr()
    assert (said.out, said.err) == ("log/new/loss.png\n", "using log/new, step 30\n")
    with pytest.raises(UserError, match=r"name a folder that training wrote to, such as log/old"):
        plot.main(["old"])


def test_hellaswag_s_ranks_say_it_once(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place(trained, tmp_path / "log", 1000)
    monkeypatch.setenv("RANK", "1")
    assert models.or_newest(hellaswag.HellaSwagConfig()).model == "log"
    assert capsys.readouterr().err == ""
