"""loss.png: what is drawn is what the log says, nothing is clipped, and greyscale keeps runs apart."""
import io
import itertools
import json
import os
import signal

import numpy as np
import pytest
from conftest import ROOT, flags, read_log, run

import train_gpt2
from plumbing import curve, files, runlog

SCRIPT = ROOT / "plot.py"
INJECT = ROOT / "tests" / "faults" / "inject.py"
FINEWEB = "HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT"


def write_log(folder, steps=40, source=None, hellaswag=False, offset=0.0):
    """A log.jsonl as training writes it, with round numbers: 2 s and 100 tokens a step -> its folder."""
    folder.mkdir(parents=True)
    lines, scores = [{"kind": "run", "config": {"total_batch_size": 100}, "data": {"source": source}}], int(hellaswag)
    for step in range(steps + 1):
        loss = offset + 3 + 8 / (1 + step / 4)
        if step:
            lines.append({"kind": "train", "step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-4 * step,
                          "norm": 1, "dt_ms": 2000, "tok_per_s": 50, "mfu": 0.5})
        if step % 10 == 0:
            lines.append({"kind": "val", "step": step, "loss": loss + 0.1})
            lines += [{"kind": "hellaswag", "step": step, "acc_norm": 0.25 + step / 1e5, "acc": 0.3, "n": 9}] * scores
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def figure_of(*folders, x="tokens"):
    figure = curve.make_figure({folder.name: curve.read_log(folder) for folder in folders}, x)
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("x, unit", [("tokens", 100), ("steps", 1), ("hours", 2 / 3600)])
def test_the_lines_are_those_of_the_log(x, unit, tmp_path):
    figure = figure_of(write_log(tmp_path / "a", hellaswag=True), x=x)
    loss, hellaswag, rate = figure.axes
    steps = np.arange(1, 41)
    train, average, val = loss.lines
    np.testing.assert_allclose(train.get_xdata(), steps * unit)
    np.testing.assert_allclose(train.get_ydata(), 3 + 8 / (1 + steps / 4))
    np.testing.assert_allclose(average.get_ydata()[10], np.mean(train.get_ydata()[6:15]))
    np.testing.assert_allclose(average.get_ydata()[[0, -1]], train.get_ydata()[[0, -1]])
    np.testing.assert_allclose(average.get_ydata()[-2], np.mean(train.get_ydata()[-3:]))
    said = figure.legends[0].get_texts()[0].get_text()
    mean = np.mean(train.get_ydata()[-20:])
    assert f"a: train {mean:.4f}, validation {val.get_ydata()[-1]:.4f}, HellaSwag 25.04%" in said
    np.testing.assert_allclose(val.get_xdata(), np.arange(0, 41, 10) * unit)
    np.testing.assert_allclose(val.get_ydata(), 3.1 + 8 / (1 + np.arange(0, 41, 10) / 4))
    np.testing.assert_allclose(hellaswag.lines[0].get_ydata(), 0.25 + np.arange(0, 41, 10) / 1e5)
    np.testing.assert_allclose(rate.lines[0].get_ydata(), 1e-4 * steps)
    assert train.get_linewidth() < average.get_linewidth() and train.get_alpha() < 0.5
    assert {"tokens": "tokens", "steps": "steps", "hours": "hours"}[x] in rate.get_xlabel()


@pytest.mark.parametrize("source, shown", [(FINEWEB, True), ("kjj0/finewebedu10B-gpt2@x", True), ("my_texts", False),
                                           (None, False)])
def test_openai_s_lines_are_drawn_on_fineweb_edu_alone(source, shown, tmp_path):
    loss, hellaswag, _ = figure_of(write_log(tmp_path / "a", source=source, hellaswag=True)).axes
    levels = [{line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == ":"}
              for panel in (loss, hellaswag)]
    assert levels == ([{3.2924}, {0.2955}] if shown else [set(), set()])
    assert not shown or loss.get_ylim()[0] < 3.2924 < loss.get_ylim()[1]


@pytest.mark.parametrize("folders, source", [(1, FINEWEB), (1, None), (2, FINEWEB), (6, None)])
def test_nothing_is_clipped_and_nothing_covers_the_end(folders, source, tmp_path):
    names = [tmp_path / f"a_rather_long_name_{i}" for i in range(folders)]
    figure = figure_of(*(write_log(name, steps=2000, source=source, hellaswag=True, offset=i / 10)
                         for i, name in enumerate(names)))
    width, height = figure.canvas.get_width_height()
    assert width == 800 and height < 900
    texts = [text for text in figure.findobj(match=lambda artist: hasattr(artist, "get_fontsize")) if text.get_text()]
    assert len(texts) > 20
    assert min(text.get_fontsize() for text in texts) >= 8
    drawn = figure.get_tightbbox(figure.canvas.get_renderer())  # all that is drawn, in inches of 100 pixels
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and 100 * drawn.x1 <= width and 100 * drawn.y1 <= height
    legend = figure.legends[0]
    said = "".join(text.get_text() for text in legend.get_texts())
    assert all(f"_{i}: train" in said for i in range(folders))
    assert legend.get_window_extent().y0 > figure.axes[0].get_window_extent().y1  # above the curves


def test_colours_survive_greyscale():
    from matplotlib.colors import to_rgb

    grey = [np.dot(to_rgb(color), (0.299, 0.587, 0.114)) for color, _, _ in curve.STYLES]
    for a, b in itertools.pairwise(grey):
        assert abs(a - b) > 0.3
    styles = curve.STYLES
    lines = {(dashes, color) for color, dashes, _ in styles}
    assert len({marker for _, _, marker in styles}) == len(lines) == len(styles)
    assert max(grey) < 0.75  # on white


def test_the_command_draws_a_run_and_several(tmp_path):
    from PIL import Image

    write_log(tmp_path / "log")
    write_log(tmp_path / "other")
    for arguments, name in (([], "log/loss.png"), (["log/log.jsonl"], "log/loss.png"), (["log", "other"], "loss.png"),
                            (["log", "--out", "x.png", "--x", "hours"], "x.png")):
        result = run(arguments, cwd=tmp_path, script=SCRIPT)
        assert (result.returncode, result.stdout) == (0, f"{name}\n"), result.stderr
        with Image.open(tmp_path / name) as image:
            assert image.size[0] == 800
            assert len(image.convert("L").getcolors(256)) > 20
        (tmp_path / name).unlink()
    assert run(["log", "--out", "x.svg"], cwd=tmp_path, script=SCRIPT).returncode == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "other", "x.svg"]


@pytest.mark.parametrize("arguments, message", [
    (["nothing"], "no log.jsonl in 'nothing' (No such file or directory)"),
    (["empty"], "no log.jsonl in 'empty'"),
    (["."], "name a folder that training wrote to, such as bad"),
    (["bad"], "bad has no losses to draw yet"),
    (["log", "--x", "epochs"], "--x is 'epochs', it must be tokens, steps or hours"),
    (["log", "--out", "x.txt"], "--out is 'x.txt', it must be a name that ends in .png, .svg or .pdf"),
    (["log", "--out", "no/x.png"], "cannot write no/x.png (No such file or directory)"),
])
def test_wrong_arguments(arguments, message, tmp_path):
    write_log(tmp_path / "log")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "log.jsonl").write_bytes(b'\xff\n[1]\n{"kind": "run"\n{"no": "kind"}\n7\n')
    result = run(arguments, cwd=tmp_path, script=SCRIPT)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


HOSTILE = ['{"kind": "train"}', '{"kind": "train", "step": "5", "loss": 3}', '{"kind": "val", "step": 5, "loss": NaN}',
           '{"kind": "val", "step": 5, "loss": [1]}', '{"kind": "val", "step": 5, "loss": 1e308}', "[" * 100_000,
           '{"kind": "val", "step": 1e400, "loss": 3}', '{"kind": "val", "step": 5, "loss": 1' + "0" * 400 + "}", "7",
           '{"kind": "run"}', '{"kind": "run", "config": null, "data": "x"}', '{"kind": "hellaswag", "step": 9}',
           '{"kind": "hellaswag", "step": 9, "acc_norm": "high"}', '{"kind": ["run"]}', "null", "[]"]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_lines_of_other_programs_do_no_harm(line, tmp_path):
    folder = write_log(tmp_path / "log", hellaswag=True)
    with open(folder / "log.jsonl", "a") as file:
        file.write(line + "\n")
    for x in ("tokens", "hours"):
        assert len(figure_of(folder, x=x).axes[0].lines) == 3


def test_odd_names_and_settings(tmp_path):
    write_log(tmp_path / "q$x^$_%s")
    write_log(tmp_path / "_hidden")
    result = run(["q$x^$_%s", "_hidden"], cwd=tmp_path, script=SCRIPT, MPLBACKEND="nonsense")
    assert (result.returncode, result.stderr) == (0, "") and (tmp_path / "loss.png").exists()
    figure = curve.make_figure({"_hidden": curve.read_log(tmp_path / "_hidden")}, "steps")
    assert "_hidden: train" in figure.legends[0].get_texts()[0].get_text()


def test_a_picture_is_whole_or_the_one_of_before(tmp_path, monkeypatch):
    folder = write_log(tmp_path / "log")
    curve.draw({"log": curve.read_log(folder)}, folder / "loss.png")
    before = (folder / "loss.png").read_bytes()

    class FullDisk(io.FileIO):
        def write(self, data):
            super().write(data[:1000])
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "open_new", lambda path, *_, **__: FullDisk(path, "x"))
    with pytest.raises(OSError):
        curve.draw({"log": curve.read_log(folder)}, folder / "loss.png")
    assert (folder / "loss.png").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "loss.png"]


@pytest.mark.parametrize("spoil", ["torn", "null", "one step", "only val", "no run line"])
def test_logs_as_they_come(spoil, tmp_path):
    folder = write_log(tmp_path / "log")
    lines = (folder / "log.jsonl").read_text().splitlines()
    if spoil == "torn":
        lines.append('{"kind": "train", "step": 41, "lo')
    elif spoil == "null":  # a loss that was not finite
        lines = [line.replace('"loss": ', '"loss": null, "was": ') if "train" in line else line for line in lines]
    elif spoil == "one step":
        lines = lines[:3]
    elif spoil == "only val":
        lines = [line for line in lines if "train" not in line]
    else:
        lines = lines[1:]
    (folder / "log.jsonl").write_text("\n".join(lines))
    result = run(["log"], cwd=tmp_path, script=SCRIPT)
    assert result.returncode == 0 and (folder / "loss.png").exists(), result.stderr
    assert result.stderr == ""


def test_training_draws_it_after_a_validation(shard_folder, tmp_path):
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out"), script=INJECT, FAULT="kill:picture:2")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "report.md").exists()


def test_training_draws_it_seldom_and_at_the_end(shard_folder, tmp_path, monkeypatch):
    clock, drawn = itertools.count(0, 3), []
    monkeypatch.setattr(runlog.time, "perf_counter", lambda *_, **__: next(clock) / 10)  # 0.3 s between two looks
    monkeypatch.setattr(curve, "draw", lambda runs, out, *_, **__: drawn.append(next(clock) / 10))
    arguments = flags(data=shard_folder, out_dir=tmp_path / "out", max_steps=30, val_every=1)
    train_gpt2.main(train_gpt2.parse_args(arguments))
    gaps = np.diff(drawn)
    assert len(gaps) >= 2 and gaps[:-1].min() >= 10 and gaps.max() < 20


def test_training_goes_on_without_matplotlib_and_says_so_once(shard_folder, tmp_path):
    script = tmp_path / "hide.py"
    script.write_text("import sys\nsys.modules['matplotlib'] = None\nimport train_gpt2\n"
                      "train_gpt2.main(train_gpt2.parse_args(sys.argv[1:]))\n")
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out"), script=script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("warning: no loss.png: ModuleNotFoundError") == 1
    assert "checkpoints, log.jsonl, report.md in" in result.stdout
    assert not (tmp_path / "out" / "loss.png").exists()
    assert "loss.png" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_picture_that_cannot_be_written(tmp_path):
    folder = write_log(tmp_path / "log")
    folder.chmod(0o500)
    result = run(["log"], cwd=tmp_path, script=SCRIPT)
    assert result.returncode == 2 and "cannot write" in result.stderr
    folder.chmod(0o700)


def test_the_log_of_a_real_run_can_be_drawn_by_hours(shard_folder, tmp_path):
    assert run(flags(data=shard_folder, out_dir=tmp_path / "out")).returncode == 0
    figure = figure_of(tmp_path / "out", x="hours")
    hours = sum(line["dt_ms"] for line in read_log(tmp_path / "out", "train")) / 3.6e6
    assert figure.axes[0].lines[0].get_xdata()[-1] == pytest.approx(hours)
    assert (tmp_path / "out" / "loss.png").exists() and (tmp_path / "out" / "report.md").exists()
