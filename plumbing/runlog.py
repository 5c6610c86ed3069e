"""What a person sees of a run: the summary, one line per step, log.jsonl, other loggers, loss.png, report.md."""
import contextlib
import dataclasses
import importlib
import json
import math
import os
import shlex
import time
import uuid
from pathlib import Path

import torch

from plumbing import accuracy, checkpoint, cli, machine, reference, run_folder, screen, shards, summary
from plumbing.cli import UserError, bold, clock, explain, plural, print0
from plumbing.files import atomic_write, check_inside, identity, set_aside

PICTURE_SECONDS = 10  # between two drawings of loss.png, which take 0.3 s each


def command_line(config, presets: dict[str, dict], world) -> str:
    """Return the command that gives these settings, whatever program has asked for them.

    It names the preset that leaves the fewest flags to give; the first one's settings are the defaults.
    """
    choices = []
    for name, preset in presets.items():
        default = dataclasses.replace(type(config)(), **preset)
        flags = cli.changed_flags(config, default)
        if flags is not None:
            if config.data != default.data and config.out_dir == default.out_dir:
                flags += ["--out_dir", config.out_dir]  # which is not the default for other data
            named = preset or Path(config.data).is_file()  # for a text file, demo is the default
            choices.append([*(["--preset", name] if named else []), *flags])
    launcher = ["python"]
    if world.world_size > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
        several = f"--nnodes={world.world_size // here}" if here < world.world_size else "--standalone"
        launcher = ["torchrun", several, f"--nproc_per_node={here}"]
    return shlex.join([*launcher, "train_gpt2.py", *min(choices, key=len)])


def describe_start(config, presets: dict[str, dict], world, model, state: dict | None, resuming: bool = False) -> dict:
    """Describe how a run starts: with which command, from which weights, and after which step if it is resumed."""
    return {"command": command_line(config, presets, world),
            "source": str(state["path"] if state else config.init_from),
            "origin": run_folder.describe_origin(config, state, resuming),
            "origin_sha256": run_folder.origin_hash(config, state, resuming, model),
            "resumed_from": state["step"] if resuming else None}


class Tracker:
    """Sends the numbers of log.jsonl to tensorboard, wandb or trackio too, named `train/loss` and so on.

    A resumed run (`step` >= 0) continues where it stopped. Raises UserError if the package is missing or refuses to
    start.
    """

    def __init__(self, config, step: int):
        name, folder, self.writer = config.logger, Path(config.out_dir), None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # drops later steps
                return
            self.service = importlib.import_module(name)
            known = folder / "run_id"  # of this run, where the service knows many
            check_inside(known)
            run_id = known.read_text().strip() if step >= 0 and known.exists() else ""
            run_id = run_id or uuid.uuid4().hex[:8]
            known.write_text(run_id)
            options = ({"id": run_id, "name": config.out_dir, "dir": config.out_dir} if name == "wandb" else
                       {"name": f"{config.out_dir} {run_id}"})
            self.service.init(project="gpt2", resume="allow", config=dataclasses.asdict(config), **options)
        except ModuleNotFoundError as error:
            raise UserError(f"--logger {name} needs a package that is not here: pip install {name}") from error
        except Exception as error:
            raise UserError(f"--logger {name} does not start ({explain(error)}): mend that or leave it out; log.jsonl "
                            "is written in any case") from error

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step."""
        if self.writer:
            for name, number in numbers.items():
                self.writer.add_scalar(name, number, step)
        else:
            self.service.log(numbers, step=step)

    def flush(self) -> None:
        """Write to the disk what was sent; the services see to that themselves."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Send what is left."""
        if self.writer:
            self.writer.close()
        else:
            self.service.finish()


class RunLog:
    """Reports on a run, on rank 0 only: lines on the screen, and one JSON object per line in log.jsonl.

    Evaluation alone appends to eval.jsonl instead, so that it never touches the log of a training run. loss.png is
    drawn anew after a validation, PICTURE_SECONDS apart or more, and report.md is written at the end: if that fails,
    one line says so and training continues.
    """

    def __init__(self, config, model, world, folder=None):
        self.config, self.model, self.world = config, model, world
        self.folder = folder  # the Lock of out_dir, on rank 0 of a run that trains
        self.trains = config.max_steps > 0 and not config.eval_only
        self.flops_per_step = machine.flops_per_token(model, config.sequence_length) * config.total_batch_size
        self.peak = machine.known_peak(world.device, getattr(torch, config.dtype))  # of one rank, None if unknown
        self.started, self.bad_steps = time.perf_counter(), 0
        self.drawn = self.started  # when loss.png was drawn last
        self.lines = screen.StepLines(config)
        self.torn = False  # whether the last write stopped within a line
        self.failed = set()  # what besides the log could not be written, reported once
        self.tracker = None
        self.first_loss, self.remark = "", ""  # before training; on the final loss, if it is the demo's
        self.finished = False  # whether the run was so before it began
        self.script = ""  # hash of train_gpt2.py in the session before
        self.path = Path(config.out_dir) / ("log.jsonl" if self.trains else "eval.jsonl")

    def print_summary(self, train_loader, val_loader, about: dict) -> None:
        """Print all that is about to run, before it runs, and what is unusual about it.

        There is no train_loader if nothing is trained. `about` is what describe_start() and machine.resolve() return.
        Raises UserError, on every rank, for a run that makes no sense on this machine.
        """
        config, world, loaders = self.config, self.world, (train_loader, val_loader)
        print0("-" * 100)
        plan = summary.make_plan(config, self.model, loaders, about)
        for topic, text in summary.rows(config, self.model, world, loaders, about, plan).items():
            print0(f"{topic:>8} | {text}")
        print0("-" * 100)
        for warning in summary.warnings(config, plan, world):
            print0(f"warning: {warning}")
        world.from_rank0(lambda: summary.check(config, plan, world, about))

    def start(self, val_loader, about: dict, evaluated: int = -1) -> None:
        """Open the log, start the logger, and append the line that tells what runs.

        `about` is what describe_start() returns. If the run is resumed, lines past that step are dropped, and of
        evaluations those past `evaluated`. Raises UserError or OSError on every rank if that fails on rank 0.
        """
        step = -1 if about["resumed_from"] is None else about["resumed_from"]
        self.command, self.source = about["command"], about["source"]
        self.world.from_rank0(lambda: self.open(step, evaluated))
        self.finished = self.trains and evaluated == self.config.max_steps  # it only repeats its result
        if self.world.rank == 0 and not self.finished:
            self.write_run(about, val_loader)

    def open(self, step: int, evaluated: int) -> None:
        """Open the log and start the logger, on rank 0."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_inside(self.path)
        if self.trains:
            self._drop_after(step, evaluated)
            self.tracker = Tracker(self.config, step) if self.config.logger else None
        self.file = open(self.path, "a+b", buffering=0)

    def keep_folder(self) -> None:
        """Write the log anew, on rank 0, if it or the run's folder has been renamed or deleted.

        Raises UserError if another run has taken the folder.
        """
        if self.folder is None:
            return
        if fate := self.folder.renew():
            print0(f"warning: {self.config.out_dir}: {fate}, and is made again; training goes on")
        status = os.fstat(self.file.fileno())
        if identity(self.path) == (status.st_dev, status.st_ino):
            return
        set_aside(self.path, "is not this run's log any more")
        self.file.seek(0)
        with atomic_write(self.path) as file:
            file.write(self.file.read())
        self.file.close()
        self.file = open(self.path, "a+b", buffering=0)

    def write_run(self, about: dict[str, str], val_loader) -> None:
        """Append the line that tells what runs: settings, versions, device, data, and whether the model is GPT-2."""
        versions = machine.versions()
        if self.script not in ("", versions["script"]):
            print0("note: train_gpt2.py has changed since this run's last session; it goes on with the new code")
        data = shards.describe(self.config.data, val_loader.shards, self.config.val_tokens)
        self.write("run", config=dataclasses.asdict(self.config), versions=versions,
                   device=machine.describe_device(self.world.device), origin=about["origin"],
                   ranks=self.world.world_size, command=about["command"],
                   model=dataclasses.asdict(self.model.config), data=data, gpt2=reference.is_gpt2(self.model))

    def _drop_after(self, step: int, evaluated: int) -> None:
        """Keep the lines up to `step`, of evaluations up to `evaluated`; a line torn by a crash goes too."""
        if step < 0:
            for name in ("log.jsonl", "report.md", "loss.png", checkpoint.BEST):
                if (self.path.with_name(name)).is_file():
                    set_aside(self.path.with_name(name), "has no checkpoint to continue from")
        kept = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                values = json.loads(line)
                if values.get("kind") == "run" and isinstance(values.get("versions"), dict):
                    self.script = values["versions"].get("script", "")
                last = step if values.get("kind") == "train" else evaluated
                if values.get("step", last) <= last:
                    kept.append(line + b"\n")
            except (ValueError, AttributeError, TypeError, RecursionError):
                pass
        with atomic_write(self.path) as file:
            file.writelines(kept)

    def write(self, kind: str, **values) -> None:
        """Append {"kind": kind, ...values}; floats that JSON has no word for (nan, inf) become null."""
        if self.world.rank > 0:
            return
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
        line = b"\n" * self.torn + json.dumps({"kind": kind, **finite}).encode() + b"\n"
        try:
            self.torn = self.file.write(line) < len(line)
        except OSError as error:
            self.torn = True
            print0(f"warning: cannot write {self.path}: {error}; training continues")
        if "step" in values:
            numbers = {f"{kind}/{key}": value for key, value in finite.items()
                       if key != "step" and isinstance(value, (int, float))}
            self._track(lambda: self.tracker.log(values["step"], numbers))

    def _try(self, what: str, action) -> None:
        """Run an optional action; warn about the first failure only, until it works again."""
        try:
            action()
            self.failed.discard(what)
        except (Exception, SystemExit) as error:  # a drawing library or a service has dozens of errors
            if what not in self.failed:
                print0(f"warning: no {what}: {explain(error)}")
            self.failed.add(what)

    def _track(self, action) -> None:
        """Run an action of the logger, if there is one; after a failure it is left alone."""
        if self.tracker and self.config.logger not in self.failed:
            self._try(self.config.logger, action)

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        if self.world.rank == 0:
            os.fsync(self.file.fileno())
        self._track(lambda: self.tracker.flush())

    def train(self, step: int, loss: float, lr: float, norm: float, seconds: float, data_seconds: float = 0.0,
              scale: float | None = None) -> None:
        """Log an optimizer step, the `step`-th, which took `seconds`, `data_seconds` of them to read its data.

        `scale` is the gradient scaler's (float16). If loss or norm are not finite the step was skipped. Raises
        FloatingPointError after five such steps in a row; an overflow of the gradients alone, at a scale of 1 or more,
        does not count, as a smaller scale can cure it.
        """
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        tokens, tok_per_s = step * self.config.total_batch_size, self.config.total_batch_size / seconds
        mfu = self.flops_per_step / seconds / (self.peak * self.world.world_size) if self.peak else None
        if self.config.dtype != "float16":
            scale = None
        overflow = skipped and scale is not None and scale >= 1 and math.isfinite(loss)
        reason = f"overflow at a gradient scale of {scale:,.0f}" if overflow else "not finite"
        values = dict(loss=loss, lr=lr, norm=norm, dt_ms=seconds * 1000, data_ms=data_seconds * 1000,
                      tok_per_s=tok_per_s, mfu=mfu)
        self.lines.count(seconds)
        if skipped or self.lines.is_due(step):
            print0(self.lines.format(step, values, f"skipped: {reason}" if skipped else ""))
        if self.lines.thins_out(step):
            print0(f"from here on not every step has a line; all are in {self.path}")
        self.write("train", step=step, tokens=tokens, **values,
                   **({"scale": scale} if scale is not None else {}), **({"skipped": True} if skipped else {}))
        self.bad_steps = self.bad_steps + (not overflow) if skipped else 0
        if self.bad_steps == 5:
            self.sync()
            raise FloatingPointError(
                f"five steps in a row without a finite loss and gradient, the last one step {step} (loss {loss}, norm "
                f"{norm}) at {tokens:,} tokens; they changed no weight: try a lower --max_lr"
                f"{' or --dtype float32' if scale is not None else ''} with another --out_dir")

    def _at(self, step: int) -> str:
        return self.lines.at(step) if self.trains else f"step {step}"

    def val(self, step: int, loss: float) -> None:
        """Log the validation loss after `step` steps."""
        print0(bold(f"{self._at(step)} | validation loss {loss:.4f}"))
        self.write("val", step=step, loss=loss)
        seconds = time.perf_counter() - self.drawn
        draws = self.trains and step < self.config.max_steps  # the last picture is drawn at the end
        if self.world.rank == 0 and draws and seconds >= PICTURE_SECONDS:
            with contextlib.suppress(OSError):  # then the picture cannot be drawn either, which is said
                self.keep_folder()
            self._try("loss.png", self._draw)
            self.drawn = time.perf_counter()

    def _draw(self) -> None:
        from plumbing import curve

        curve.draw({self.config.out_dir: curve.read_log(self.path)}, self.path.with_name("loss.png"))

    def _report(self) -> None:
        from plumbing import curve, report

        report.write_report(self.config.out_dir)
        lines = curve.read_log(self.path)
        self.remark = report.remark(lines)
        first = next((line for line in lines if line["kind"] == "val" and line["loss"] is not None), {"step": -1})
        self.first_loss = f"{first['loss']:.4f} -> " if first["step"] == 0 else ""

    def hellaswag(self, step: int, result: dict) -> None:
        """Log HellaSwag after `step` steps, as hellaswag.evaluate() gives it."""
        acc, acc_norm, n = (result[name] for name in ("acc", "acc_norm", "n"))
        cut = f"; {result['cut']:,} contexts cut on the left" if result["cut"] else ""
        print0(f"{self._at(step)} | HellaSwag acc_norm {accuracy.describe(acc_norm, n)}, acc {acc:.2%} | {n:,} "
               f"examples in {result['seconds']:.1f} s{cut}")
        self.write("hellaswag", step=step, acc_norm=acc_norm, acc=acc, n=n)

    def sample(self, step: int, text: str) -> None:
        """Log what the model writes after `step` steps."""
        print0(f"{self._at(step)} | sample: {text!r}")
        self.write("sample", step=step, text=text)

    def end(self, step: int, val_loss: float, stopped: bool) -> None:
        """Print the result, then close the logger, which may take long."""
        self._last_words(step, val_loss, stopped)
        self._track(lambda: self.tracker.close())

    def _last_words(self, step: int, val_loss: float, stopped: bool) -> None:
        """Draw loss.png and write report.md; print the result, or how to continue, and what else to do."""
        config, took = self.config, clock(time.perf_counter() - self.started)
        if stopped:
            if checkpoint.listing(config.out_dir):
                there = "continues from there" if step < config.max_steps else "does the last evaluation"
                print0(f"stopped after step {step:,} of {config.max_steps:,}: the same command {there}")
                print0(screen.commands_to_go_on(config.out_dir, config.sample_prompt, config.out_dir, self.command))
            else:  # a branch's first steps are another run's
                print0(f"stopped before the first step: the same command begins again\n  {screen.here(self.command)}")
            return
        if not self.trains:
            print0(f"validation loss {val_loss:.4f}, nothing trained; written to {self.path}")
            if self.source:  # otherwise the weights were new
                print0(screen.commands_to_go_on(self.source, config.sample_prompt))
            return
        if self.world.rank == 0:
            self._try("loss.png", self._draw)
            self._try("report.md", self._report)
        tokens = step * config.total_batch_size
        files = [name for name in ("checkpoints", "log.jsonl", "loss.png", "report.md") if name not in self.failed]
        already, since = ("already ", "") if self.finished else ("", f" in {took}")
        print0(bold(f"{already}finished: validation loss {self.first_loss}{val_loss:.4f}{self.remark} after {step:,} "
                    f"{plural(step, 'step')} and {tokens:,} tokens{since}"))
        print0(f"  {config.out_dir} has {', '.join(files)}")
        print0(screen.commands_to_go_on(config.out_dir, config.sample_prompt, config.out_dir))
        if Path(config.data).name == "input.txt" and not self.finished:
            print0("this was a small text; for GPT-2 124M itself, on a GPU: python fineweb.py, which writes 10 billion "
                   "tokens of FineWeb-Edu to edu_fineweb10B/, then python train_gpt2.py")
