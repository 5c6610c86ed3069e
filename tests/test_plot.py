"""loss.png: what is drawn is what the log says, nothing is clipped, and greyscale keeps runs apart.

    pytest tests/test_plot.py
"""
import io
import itertools
import json
import math
import os
import signal
import sys

import numpy as np
import pytest
from helpers import FINEWEB, ROOT, error_of, flags, posix, read_log, run, slow, write_log

import plot
import train_gpt2
from plumbing import curve, files, report, runlog

pytestmark = pytest.mark.whole

SCRIPT = ROOT / "plot.py"
INJECT = ROOT / "tests" / "faults" / "inject.py"


def train(**changes) -> None:
    """Run train_gpt2.py in this process."""
    train_gpt2.main(train_gpt2.parse_args(flags(**changes)))


def figure_of(*folders, x="tokens"):
    figure = curve.make_figure({folder.name: curve.read_log(folder) for folder in folders}, x)
    figure.canvas.draw()
    return figure


def trailing_means(values) -> list[float]:
    """After each value, the mean of the last ones: of i values the last floor(sqrt(i))."""
    means = []
    for i in range(1, len(values) + 1):
        length = 1
        while (length + 1) ** 2 <= i:
            length += 1
        means.append(math.fsum(values[i - length:i]) / length)
    return means


def invented(steps, val_every=60, base=4.7, late=0.0, noise=0.1, seed=0, source=None):
    """Lines of a log whose loss falls from 10.8 towards `base`, most of it at once; `late` is added in the end."""
    random = np.random.RandomState(seed)
    lines = [{"kind": "run", "config": {"total_batch_size": 1024}, "data": {"source": source}}]
    for step in range(steps + 1):
        loss = base + (10.8 - base) / (1 + step / max(4, steps / 60)) + late * max(0, step - 0.8 * steps) / (steps or 1)
        if step:
            lines.append({"kind": "train", "step": step, "loss": loss + noise * random.randn(), "lr": 6e-4 / step,
                          "dt_ms": 230})
        if step % val_every == 0 or step == steps:
            lines.append({"kind": "val", "step": step, "loss": loss})
    return lines


def texts_of(figure) -> list:
    """All texts of a drawn figure that can be seen: matplotlib keeps marks beyond the ends of an axis, undrawn."""
    beyond = set()
    for axis in [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]:
        low, high = axis.get_view_interval()
        marks = zip(axis.get_ticklocs(), axis.get_ticklabels())
        beyond |= {label for place, label in marks if not low <= place <= high}
    found = figure.findobj(match=lambda artist: hasattr(artist, "get_fontsize") and artist.get_text().strip())
    return [text for text in found if text.get_visible() and text not in beyond]


def drawn(runs, x="tokens"):
    figure = curve.make_figure(runs, x)
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 30, 180, 1000, 19_073])
def test_the_smoothed_curve_ends_in_the_mean_that_is_written(steps, tmp_path):
    lines = invented(steps, val_every=1000)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    figure = curve.make_figure({"a": lines}, "steps")
    average = figure.axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(average, trailing_means(losses), rtol=1e-12)
    assert np.mean(curve.final_train_losses(lines)) == pytest.approx(average[-1], rel=1e-12)
    assert f"a: train {average[-1]:.4f}, validation" in figure.legends[0].get_texts()[0].get_text()
    length = {1: 1, 2: 1, 3: 1, 4: 2, 30: 5, 180: 13, 1000: 31, 19_073: 138}[steps]
    assert len(curve.final_train_losses(lines)) == curve.window(steps) == length
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = dict(report.facts_of_training(lines, [{**line, "tokens": 1} for line in lines if line["kind"] == "train"],
                                        train_gpt2.TrainConfig().__dict__))["training loss"]
    assert row.startswith(f"{average[-1]:.4f}") and (length == 1 or f"mean of the last {length} steps" in row)


def test_the_smoothed_curve_looks_back_only_and_has_no_hook():
    """What comes later changes nothing before it, and where the losses fall all the way, so does the curve."""
    values = np.random.RandomState(0).randn(300)
    for length in (0, 1, 2, 50, 299):
        np.testing.assert_array_equal(curve.smooth(values[:length]), curve.smooth(values)[:length])
    falling = 5 + 6 * np.exp(-np.arange(300) / 20)
    assert (np.diff(curve.smooth(falling)) < 0).all() and curve.smooth(falling)[0] == falling[0]
    np.testing.assert_allclose(curve.smooth([3.0, 1e29, 4.0, 4.0, 4.0, 4.0])[[0, 5]], [3, 4])  # no trace of a spike


@pytest.mark.parametrize("steps, source", [(30, None), (90, None), (180, FINEWEB), (180, None), (1000, None),
                                           (19_073, FINEWEB)])
def test_the_first_drop_does_not_flatten_the_rest(steps, source):
    figure = drawn({"a": invented(steps, val_every=max(5, steps // 40), base=4.0, source=source)})
    loss = figure.axes[0]
    low, high = loss.get_ylim()
    train, average, val = loss.lines[:3]
    later = average.get_ydata()[steps // 2:]
    dots = val.get_ydata()[2 * val.get_xdata() >= 1024 * steps]
    assert low < dots.min() and dots.max() < high and low < later.min() and later.max() < high
    pale = train.get_ydata()[steps // 2:]
    shown = np.quantile(pale, 0.98) - min(np.quantile(pale, 0.01), 3.2924 if source else np.inf)
    assert shown > 0.3 * (high - low)
    notes = [text.get_text() for text in loss.texts]
    top = max(*pale, *train.get_ydata(), *val.get_ydata())
    assert notes == ([f"↑ losses up to {top:.4g} are cut off"] if high < top else [])
    assert steps < 90 or source or notes
    for text in loss.texts:  # the note is where no curve is
        box = text.get_window_extent()
        assert loss.transData.transform((512 * steps, later.max()))[1] < box.y0
        assert box.x0 > loss.transData.transform((512 * steps, low))[0]


@pytest.mark.parametrize("lines", [invented(180, late=20), invented(180, base=10.7, noise=0.01), invented(10),
                                   invented(3), invented(2), invented(1), invented(0)],
                         ids=["diverged", "flat", "10", "3", "2", "1", "0"])
def test_what_has_no_steep_start_or_few_steps_is_shown_as_a_whole(lines):
    loss = drawn({"a": lines}).axes[0]
    low, high = loss.get_ylim()
    everything = np.concatenate([line.get_ydata() for line in loss.lines])
    assert low < everything.min() and everything.max() < high and not loss.texts


def test_each_of_several_runs_is_shown_to_its_end():
    runs = {"long": invented(1000), "short": invented(90, base=6), "tiny": invented(4, base=9.5)}
    loss = drawn(runs).axes[0]
    for lines in runs.values():
        for value in (lines[-1]["loss"], np.mean(curve.final_train_losses(lines))):
            assert loss.get_ylim()[0] < value < loss.get_ylim()[1]


def test_a_single_step_can_be_seen():
    loss, rate = drawn({"a": invented(1, val_every=5)}).axes
    assert loss.lines[1].get_marker() == rate.lines[0].get_marker() == "."


@pytest.mark.parametrize("kinds, key", [
    ("train val", ["training loss per step", "moving average (of 13 steps at the end)", "validation loss"]),
    ("train", ["training loss per step", "moving average (of 13 steps at the end)"]), ("val", ["validation loss"])])
def test_a_key_says_what_is_drawn(kinds, key):
    lines = [line for line in invented(180) if line["kind"] in ("run", *kinds.split())]
    loss = drawn({"a": lines}).axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == key
    handles = loss.get_legend().legend_handles
    assert {handle.get_color() for handle in handles} == {line.get_color() for line in loss.lines}
    both = drawn({"a": lines, "b": lines}).axes[0].get_legend()
    assert [text.get_text() for text in both.get_texts()] == [name.split(" (")[0] for name in key]
    assert {handle.get_color() for handle in both.legend_handles} == {curve.GREY}


@pytest.mark.parametrize("x", ["tokens", slow("steps"), slow("hours")])
@pytest.mark.parametrize("lines", [invented(180), invented(1), invented(19_073, 1000),
                                   invented(60, noise=1e-7, base=10.8)], ids=["demo", "one", "full", "flat"])
def test_numbers_on_the_axes_are_whole(lines, x):
    """No factor such as 1e-2 or +4.7 stands apart from its axis, and no two marks read alike."""
    figure = drawn({"a": lines}, x)
    for axis in [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]:
        assert axis.get_offset_text().get_text() == ""
        marks = [label.get_text() for label in axis.get_ticklabels() if label in texts_of(figure)]
        assert len(set(marks)) == len(marks) and all(len(mark) <= 10 for mark in marks)


@pytest.mark.parametrize("paths, names", [
    (["log"], ["log"]), (["/home/somebody/log/demo"], ["demo"]), (["/home/somebody/log/demo/log.jsonl"], ["demo"]),
    (["log/a", "log/b/"], ["a", "b"]), (["x/log", "y/log", "y/other"], ["x/log", "y/log", "other"]),
    (["log", "log/"], ["1. log", "2. log"]), (["a/log", "b/a/log"], ["here/a/log", "b/a/log"]),
    (["new\nline"], ["new?line"]), (["\udcff"], ["?"]), (["/"], ["/"]),
    (["q" * 100], ["q" * 12 + "…" + "q" * 23]),
    (["q" * 50 + "1" + "q" * 50, "q" * 101], ["1. " + "q" * 12 + "…" + "q" * 23, "2. " + "q" * 12 + "…" + "q" * 23]),
])
def test_a_run_is_named_by_the_end_of_its_path(paths, names, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert curve.run_names(paths) == names
    assert max(map(len, names)) <= 40


def test_the_title_is_the_folder_and_no_path_is_in_the_picture(tmp_path, monkeypatch):
    folder = write_log(tmp_path / "home" / "somebody" / "log" / "demo")
    monkeypatch.chdir(folder)
    for path in (folder, ".", "log.jsonl", "../demo"):
        figure = drawn({str(path): curve.read_log(path)})
        assert figure.legends[0].get_title().get_text() == "demo"
        assert not [text.get_text() for text in texts_of(figure) if "somebody" in text.get_text()]
    curve.draw({str(folder): curve.read_log(folder)}, folder / "x.svg")
    curve.draw({str(folder): curve.read_log(folder)}, folder / "loss.png")
    assert not any(b"somebody" in (folder / name).read_bytes() for name in ("x.svg", "loss.png"))


LONG_NAMES = [f"/somewhere/a_long_name_that_tells_all_settings_of_the_run_and_more_lr_0.001_seed_{i}" for i in range(8)]


@pytest.mark.parametrize("names", [LONG_NAMES[:count] for count in (1, 3, 8)], ids=len)
@pytest.mark.parametrize("steps", [1, 180])
def test_nothing_overlaps(names, steps):
    runs = {name: [*invented(steps + i, seed=i, source=FINEWEB), {"kind": "hellaswag", "step": steps, "acc_norm": 0.2,
                                                                   "n": 30}] for i, name in enumerate(names)}
    figure = drawn(runs)
    width, height = figure.canvas.get_width_height()
    texts = texts_of(figure)
    boxes = {text.get_text() + str(i): text.get_window_extent() for i, text in enumerate(texts)}
    for box in boxes.values():
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), (one, other)


def test_hellaswag_is_drawn_with_its_intervals(tmp_path):
    _, panel, _ = figure_of(write_log(tmp_path / "a", hellaswag=True)).axes
    (bars,) = panel.collections
    ends = np.array([bar[:, 1] for bar in bars.get_segments()])
    p = panel.lines[0].get_ydata()  # Wilson's interval of 9 examples, which begins and ends where |p - x| = 1.96 s(x)
    for x in ends.T:
        np.testing.assert_allclose((p - x)**2, 1.959964**2 * x * (1 - x) / 9, rtol=1e-9)
    assert (ends[:, 0] < p).all() and (p < ends[:, 1]).all()


@pytest.mark.parametrize("x, unit", [("tokens", 100), ("steps", 1), ("hours", 2 / 3600)])
def test_the_lines_are_those_of_the_log(x, unit, tmp_path):
    figure = figure_of(write_log(tmp_path / "a", hellaswag=True), x=x)
    loss, hellaswag, rate = figure.axes
    steps = np.arange(1, 41)
    train, average, val = loss.lines
    np.testing.assert_allclose(train.get_xdata(), steps * unit)
    np.testing.assert_allclose(train.get_ydata(), 3 + 8 / (1 + steps / 4))
    np.testing.assert_allclose(average.get_ydata(), trailing_means(train.get_ydata()))
    said = figure.legends[0].get_texts()[0].get_text()
    mean = np.mean(train.get_ydata()[-6:])
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


@pytest.mark.parametrize("folders, source", [(1, FINEWEB), slow(1, None), slow(2, FINEWEB), (6, None)])
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


def test_the_command_draws_a_run_and_several(tmp_path, monkeypatch, capsys):
    from PIL import Image

    write_log(tmp_path / "log")
    write_log(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    for arguments, name in (([], "log/loss.png"), (["log/log.jsonl"], "log/loss.png"), (["log", "other"], "loss.png"),
                            (["log", "--out", "x.png", "--x", "hours"], "x.png")):
        if arguments:
            plot.main(arguments)
            assert capsys.readouterr() == (f"{name}\n", "")
        else:
            result = run([], cwd=tmp_path, script=SCRIPT)
            assert (result.returncode, result.stdout) == (0, f"{name}\n"), result.stderr
        with Image.open(tmp_path / name) as image:
            assert image.size[0] == 800
            assert len(image.convert("L").getcolors(256)) > 20
        (tmp_path / name).unlink()
    plot.main(["log", "--out", "x.svg"])
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
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "log")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "log.jsonl").write_bytes(b'\xff\n[1]\n{"kind": "run"\n{"no": "kind"}\n7\n')
    monkeypatch.chdir(tmp_path)
    assert message in error_of(plot.main, arguments)
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_command_with_code_2_and_one_line(tmp_path):
    result = run(["nothing"], cwd=tmp_path, script=SCRIPT)
    assert result.returncode == 2 and result.stderr.startswith("error: no log.jsonl in 'nothing'")
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


HOSTILE = ['{"kind": "train"}', '{"kind": "train", "step": "5", "loss": 3}', '{"kind": "val", "step": 5, "loss": NaN}',
           '{"kind": "val", "step": 5, "loss": [1]}', '{"kind": "val", "step": 5, "loss": 1e308}', "[" * 100_000,
           '{"kind": "val", "step": 1e400, "loss": 3}', '{"kind": "val", "step": 5, "loss": 1' + "0" * 400 + "}", "7",
           '{"kind": "run"}', '{"kind": "run", "config": null, "data": "x"}', '{"kind": "hellaswag", "step": 9}',
           '{"kind": "hellaswag", "step": 9, "acc_norm": "high"}', '{"kind": "hellaswag", "step": 9, "acc_norm": 7}',
           '{"kind": "hellaswag", "step": 9, "acc_norm": 0.3, "n": 0}', '{"kind": ["run"]}', "null", "[]"]


@pytest.mark.parametrize("lines", [HOSTILE, *(slow([line]) for line in HOSTILE)],
                         ids=["all", *map(str, range(len(HOSTILE)))])
def test_lines_of_other_programs_do_no_harm(lines, tmp_path):
    folder = write_log(tmp_path / "log", hellaswag=True)
    with open(folder / "log.jsonl", "a") as file:
        file.writelines(line + "\n" for line in lines)
    for x in ("tokens", "hours"):
        assert len(figure_of(folder, x=x).axes[0].lines) == 3


def test_odd_names_and_settings(tmp_path):
    write_log(tmp_path / "q$x^$_%s")
    write_log(tmp_path / "_hidden")
    write_log(tmp_path / "实验\U0010ffff")  # letters that the font lacks
    result = run(["q$x^$_%s", "_hidden", "实验\U0010ffff"], cwd=tmp_path, script=SCRIPT, MPLBACKEND="nonsense")
    assert (result.returncode, result.stderr) == (0, "") and (tmp_path / "loss.png").exists()
    figure = curve.make_figure({"_hidden": curve.read_log(tmp_path / "_hidden")}, "steps")
    assert "_hidden: train" in figure.legends[0].get_texts()[0].get_text()
    figure = drawn({"q$x^$_%s": curve.read_log(tmp_path / "_hidden")})
    assert figure.legends[0].get_title().get_text() == r"q\$x^\$_%s"


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


@pytest.mark.parametrize("spoil", ["torn", "null", slow("one step"), slow("only val"), "no run line"])
def test_logs_as_they_come(spoil, tmp_path, capsys):
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
    plot.main([str(folder)])
    assert (folder / "loss.png").exists() and capsys.readouterr().err == ""


@posix
def test_training_draws_it_after_a_validation(shard_folder, tmp_path):
    result = run(flags(data=shard_folder, out_dir=tmp_path / "out"), whole=True, script=INJECT, FAULT="kill:picture:2")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "report.md").exists()


def test_training_draws_it_seldom_and_at_the_end(shard_folder, tmp_path, monkeypatch):
    clock, drawn = itertools.count(0, 3), []
    monkeypatch.setattr(runlog.time, "perf_counter", lambda *_, **__: next(clock) / 10)  # 0.3 s between two looks
    monkeypatch.setattr(curve, "draw", lambda runs, out, *_, **__: drawn.append(next(clock) / 10))
    train(data=shard_folder, out_dir=tmp_path / "out", max_steps=30, val_every=1, val_tokens=64, checkpoint_every=0,
          compile=False)
    gaps = np.diff(drawn)
    assert len(gaps) >= 2 and gaps[:-1].min() >= 10 and gaps.max() < 20


def test_training_goes_on_without_matplotlib_and_says_so_once(shard_folder, tmp_path, monkeypatch, capsys):
    for name in {"matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)
    train(data=shard_folder, out_dir=tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("warning: no loss.png: ModuleNotFoundError") == 1
    assert "has checkpoints, log.jsonl, report.md\n" in said
    assert not (tmp_path / "out" / "loss.png").exists()
    assert "loss.png" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_picture_that_cannot_be_written(tmp_path):
    folder = write_log(tmp_path / "log")
    folder.chmod(0o500)
    assert "cannot write" in error_of(plot.main, [str(folder)])
    folder.chmod(0o700)


def test_the_log_of_a_real_run_can_be_drawn_by_hours(shard_folder, tmp_path):
    train(data=shard_folder, out_dir=tmp_path / "out")
    figure = figure_of(tmp_path / "out", x="hours")
    hours = sum(line["dt_ms"] for line in read_log(tmp_path / "out", "train")) / 3.6e6
    assert figure.axes[0].lines[0].get_xdata()[-1] == pytest.approx(hours)
    assert (tmp_path / "out" / "loss.png").exists() and (tmp_path / "out" / "report.md").exists()
