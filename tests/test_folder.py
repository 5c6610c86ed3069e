"""A run's folder that is renamed, deleted or taken while the run lives; files in it that are another's.

    pytest tests/test_folder.py
"""
import errno
import json
import os
import threading

import pytest
from helpers import assert_same_run, flags, mostly_slow, read_log, write_shards

import train_gpt2
from plumbing import files, run_folder
from plumbing.cli import UserError


def train(out, data, **changes) -> float:
    """Train in this process; returns the validation loss."""
    return train_gpt2.main(train_gpt2.parse_args(flags(data=data, out_dir=out, **changes)))


def during(monkeypatch, step: int, action) -> None:
    """Have `action` done after a step of training, in the middle of the run."""
    log_step = train_gpt2.RunLog.train

    def logged(self, done, *arguments, **options):
        log_step(self, done, *arguments, **options)
        if done == step:
            action()

    monkeypatch.setattr(train_gpt2.RunLog, "train", logged)


@pytest.fixture
def data(tmp_path):
    return write_shards(tmp_path / "data")


@pytest.fixture
def whole(data, tmp_path):
    """The folder of an undisturbed run."""
    train(tmp_path / "whole", data)
    return tmp_path / "whole"


@pytest.mark.parametrize("fate", mostly_slow(["renamed", "deleted", "lock deleted", "log deleted"], kept=2))
def test_a_folder_that_has_gone_is_made_again_and_nothing_is_lost(fate, data, whole, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"

    def act():
        if fate == "renamed":
            out.rename(tmp_path / "elsewhere")
        elif fate == "deleted":
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        else:
            (out / (".lock" if fate == "lock deleted" else "log.jsonl")).unlink()

    during(monkeypatch, 3, act)
    train(out, data)
    said = capfd.readouterr().out
    assert {"renamed": f"renamed to {tmp_path / 'elsewhere'}", "deleted": "it was deleted",
            "lock deleted": ".lock was deleted", "log deleted": ""}[fate] in said
    assert "disk full" not in said
    assert_same_run(whole, out)


@pytest.mark.parametrize("every", [1, 0])
def test_a_run_whose_folder_another_run_has_taken_stops_and_leaves_it_alone(every, data, tmp_path, monkeypatch):
    out, other = tmp_path / "out", {}

    def act():
        out.rename(tmp_path / "mine")
        monkeypatch.undo()
        train(out, data, seed=7)
        other.update({path.name: path.read_bytes() for path in out.iterdir()})

    during(monkeypatch, 3, act)
    with pytest.raises(UserError, match=f"not this run's folder any more: it was renamed to {tmp_path / 'mine'}"):
        train(out, data, checkpoint_every=every)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == other
    assert len(read_log(tmp_path / "mine", "train")) == (3 if every else 6)  # its own log went on with its folder


def test_a_file_in_the_place_of_the_folder_is_left_alone_and_named(data, tmp_path, monkeypatch):
    def act():
        (tmp_path / "out").rename(tmp_path / "mine")
        (tmp_path / "out").write_text("my notes")

    during(monkeypatch, 3, act)
    with pytest.raises(UserError, match=r"/mine, and what has that name now is left as it is: .*moved away"):
        train(tmp_path / "out", data)
    assert (tmp_path / "out").read_text() == "my notes"


def test_a_folder_that_cannot_be_reached_for_a_while_costs_no_step(data, whole, tmp_path, monkeypatch, capfd):
    """As on a network's file system: an error of stat() when a checkpoint is due is a warning."""
    def act():
        calls = []

        def renew(lock, *arguments, **options):
            calls.append(lock)
            if len(calls) == 1:
                raise OSError(errno.EIO, "Input/output error", str(lock.path))
            return works(lock, *arguments, **options)

        works = files.Lock.renew
        monkeypatch.setattr(files.Lock, "renew", renew)

    during(monkeypatch, 3, act)
    train(tmp_path / "out", data)
    assert "warning: [Errno 5] Input/output error" in capfd.readouterr().out
    assert_same_run(whole, tmp_path / "out")


def test_a_live_run_holds_the_folder_that_replaced_a_deleted_one(tmp_path):
    out = tmp_path / "out"
    with run_folder.lock(out) as held:
        assert held.renew() == ""
        (out / ".lock").unlink()
        assert held.renew() == f"{out / '.lock'} was deleted"
        refused = []

        def second():  # filelock lets one thread lock again what it holds
            with pytest.raises(OSError) as caught, run_folder.lock(out):
                pass
            refused.append(str(caught.value))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert "another run is training into" in refused[0]
    with run_folder.lock(out):
        pass


def test_an_address_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="s3://bucket/run is an address"), run_folder.lock("s3://bucket/run"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.whole
def test_files_of_others_are_set_aside_and_not_overwritten(data, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    texts = {"report.md": b"my thesis", "loss.png": b"my picture", "log.jsonl": b'{"my": "log"}\n',
             "best.pt": b"my model"}
    for name, text in texts.items():
        (out / name).write_bytes(text)
    train(out, data, keep_best=True)
    for name, text in texts.items():
        assert (out / f"{name}.old").read_bytes() == text and (out / name).read_bytes() != text
    assert capsys.readouterr().out.count("kept as") == 4
    (out / "report.md").write_text((out / "report.md").read_text().replace("Not measured", "Measured, and I mean it"))
    (out / "loss.png").write_bytes(b"another picture")
    train(out, data)  # already finished: it writes both anew
    assert "I mean it" in (out / "report.md.old1").read_text()
    assert (out / "loss.png.old1").read_bytes() == b"another picture"
    train(out, data)
    assert not (out / "report.md.old2").exists() and not (out / "loss.png.old2").exists()


def test_a_log_that_was_replaced_is_kept_beside_the_whole_one(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def act():  # as editors save
        (out / "edited").write_text(json.dumps({"kind": "note"}) + "\n")
        (out / "edited").replace(out / "log.jsonl")

    during(monkeypatch, 3, act)
    train(out, data)
    assert "note" in (out / "log.jsonl.old").read_text()
    assert_same_run(whole, out)


def test_set_aside_takes_the_next_free_name(tmp_path):
    for text in ("a", "b", "c"):
        (tmp_path / "x").write_text(text)
        files.set_aside(tmp_path / "x", "is old")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.old": "a", "x.old1": "b", "x.old2": "c"}
