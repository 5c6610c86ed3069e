"""What a person sees of a run: the plan card, a line a step, log.jsonl, other loggers, loss.png, report.md."""
import dataclasses
import importlib
import itertools
import json
import math
import os
import shlex
import sys
import time
import uuid
from pathlib import Path

from plumbing.cli import UserError, clock, explain, plural, print0
from plumbing.files import check_inside, open_new

PICTURE_SECONDS = 10  # between two drawings of loss.png, which take 0.3 s each


def print_plan(config, model, train_loader, val_loader, device: str, grad_accum_steps, why_dtype, why_compile, origin,
               resuming):
    """The plan card: all that is about to run, before it runs. `origin` says where the weights come from."""
    B, T, ranks, shape = train_loader.B, train_loader.T, train_loader.world_size, model.config
    parameters = model.count_parameters()
    lr = (f"{config.optimizer}, lr {config.max_lr:g} -> {config.min_lr:g} ({config.decay}) after "
          f"{config.warmup_steps:,} steps of warm-up")
    rows = {
        "device": device,
        "dtype": f"{config.dtype}: {why_dtype}",
        "compile": f"{'yes' if config.compile else 'no'}: {why_compile}",
        "model": f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels, {shape.vocab_size:,} rows of "
                 f"vocabulary: {parameters:,} parameters, {origin}",
        "data": f"{config.data}: {train_loader.n_windows:,} windows of {T:,} tokens to train on, "
                f"{val_loader.n_windows:,} to validate, {'shuffled' if config.shuffle else 'in file order'}",
        "batch": f"{config.total_batch_size:,} = {B} x {T:,} x {ranks} {plural(ranks, 'rank')} x {grad_accum_steps} "
                 f"{plural(grad_accum_steps, 'micro-step')}",
        "schedule": f"{config.max_steps:,} steps, {config.max_steps * config.total_batch_size:,} tokens = "
                    f"{config.max_steps * config.total_batch_size / (train_loader.n_windows * T):.2f} epochs; {lr}",
        "memory": f"{16 * parameters / 2**20:,.0f} MiB at most for weights, gradients, optimizer; activations on top",
        "output": f"{config.out_dir}, {f'resumed after {origin}' if resuming else 'a fresh run'}",
    }
    if not config.max_steps:
        rows = {topic: rows[topic] for topic in ("device", "dtype", "compile", "model", "data")}
    print0("-" * 100)
    for topic, text in rows.items():
        print0(f"{topic:>8} | {text}")
    print0("-" * 100)


def command_line() -> str:
    """The command that started this process, with torchrun before it where there are several on this machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node={ranks}" if ranks else "python"
    return f"{launcher} {shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])}"


class Tracker:
    """The numbers of log.jsonl in tensorboard, wandb or trackio too, named `train/loss` and so on.

    A resumed run (`step` >= 0) goes on where it stopped. UserError where the package is missing or refuses to start.
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
        """Have on the disk what was sent; the services see to that themselves."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Send what is left."""
        if self.writer:
            self.writer.close()
        else:
            self.service.finish()


class RunLog:
    """What a run says while it goes, on rank 0 only: lines on the screen, and one JSON object a line in log.jsonl.

    Evaluation alone (max_steps 0) appends to eval.jsonl instead, so that it never touches the log of a training run.
    loss.png is drawn anew after a validation, PICTURE_SECONDS apart or more, and report.md is written at the end:
    where that fails, one line says so and training goes on.
    """

    def __init__(self, config, rank: int, flops_per_step: float, peak: float):
        self.config, self.rank, self.flops_per_step, self.peak = config, rank, flops_per_step, peak
        self.started, self.bad_steps, self.steps_here = time.perf_counter(), 0, 0
        self.drawn = self.started  # when loss.png was, last
        self.seconds = math.nan  # moving average of a step's time
        self.torn = False  # whether the last write stopped within a line
        self.failed = set()  # what beside the log could not be written, said once
        self.tracker = None
        self.path = Path(config.out_dir) / ("log.jsonl" if config.max_steps else "eval.jsonl")

    def open(self, step: int, seen: int) -> None:
        """On rank 0: open the log and start the logger. Raises UserError or OSError if one of them cannot be had.

        Lines past `step`, the step the run resumes from (-1: a fresh run), are dropped, and of evaluations those past
        `seen`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_inside(self.path)
        if self.config.max_steps:
            self._drop_after(step, seen)
            self.tracker = Tracker(self.config, step) if self.config.logger else None
        self.file = open(self.path, "ab", buffering=0)

    def _drop_after(self, step: int, seen: int) -> None:
        """Keep the lines up to `step`, of evaluations up to `seen`; a line torn by a crash goes too."""
        if step < 0 and self.path.exists() and self.path.stat().st_size:
            names = (self.path.with_name(f"{self.path.name}.old{i or ''}") for i in itertools.count())
            older = next(path for path in names if not os.path.lexists(path))
            print0(f"warning: {self.path} has no checkpoint to go on from: kept as {older}")
            os.replace(self.path, older)
        kept = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                values = json.loads(line)
                if values.get("step", seen) <= (step if values.get("kind") == "train" else seen):
                    kept.append(line + b"\n")
            except (ValueError, AttributeError, TypeError, RecursionError):
                pass
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open_new(temporary) as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def write(self, kind: str, **values) -> None:
        """Append {"kind": kind, ...values}; floats that JSON has no word for (nan, inf) become null."""
        if self.rank > 0:
            return
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
        line = b"\n" * self.torn + json.dumps({"kind": kind, **finite}).encode() + b"\n"
        try:
            self.torn = self.file.write(line) < len(line)
        except OSError as error:
            self.torn = True
            print0(f"warning: cannot write {self.path}: {error}; training goes on")
        if "step" in values:
            numbers = {f"{kind}/{key}": value for key, value in finite.items()
                       if key != "step" and isinstance(value, (int, float))}
            self._track(lambda: self.tracker.log(values["step"], numbers))

    def _try(self, what: str, action) -> None:
        """Do what training can do without; a failure is said, but once until it works again."""
        try:
            action()
            self.failed.discard(what)
        except (Exception, SystemExit) as error:  # a drawing library or a service has dozens of errors
            if what not in self.failed:
                print0(f"warning: no {what}: {explain(error)}")
            self.failed.add(what)

    def _track(self, action) -> None:
        """Do something with the logger, if there is one; after a failure it is left alone."""
        if self.tracker and self.config.logger not in self.failed:
            self._try(self.config.logger, action)

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        if self.rank == 0:
            os.fsync(self.file.fileno())
        self._track(lambda: self.tracker.flush())

    def train(self, step: int, loss: float, lr: float, norm: float, seconds: float, skipped: bool = False,
              data_seconds: float = 0.0, scale: float | None = None) -> None:
        """Log the `step`-th step, which took `seconds`, `data_seconds` of them to read its data.

        `scale` is the gradient scaler's (float16). Raises FloatingPointError after five skipped steps in a row; an
        overflow of the gradients alone, at a scale of 1 or more, does not count: a smaller scale can mend it.
        """
        self.steps_here += 1  # the first step of a process compiles and warms up: the average forgets it
        self.seconds = seconds if self.steps_here <= 2 else 0.9 * self.seconds + 0.1 * seconds
        last, tokens = self.config.max_steps, step * self.config.total_batch_size
        tok_per_s, mfu = self.config.total_batch_size / seconds, self.flops_per_step / seconds / self.peak
        overflow = scale is not None and scale >= 1 and math.isfinite(loss) and not math.isfinite(norm)
        reason = f"overflow at a gradient scale of {scale:,.0f}" if overflow else "not finite"
        print0(f"step {step:>{len(str(last))}}/{last} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
               f"{seconds * 1000:,.0f} ms | {tok_per_s:,.0f} tok/s | MFU {mfu:.1%} | "
               f"ETA {clock(self.seconds * (last - step))}{f' | skipped: {reason}' if skipped else ''}")
        self.write("train", step=step, tokens=tokens, loss=loss, lr=lr, norm=norm, dt_ms=seconds * 1000,
                   data_ms=data_seconds * 1000, tok_per_s=tok_per_s, mfu=mfu,
                   **({"scale": scale} if scale is not None else {}), **({"skipped": True} if skipped else {}))
        self.bad_steps = self.bad_steps + (not overflow) if skipped else 0
        if self.bad_steps == 5:
            self.sync()
            raise FloatingPointError(
                f"five steps in a row without a finite loss and gradient, the last one step {step} (loss {loss}, norm "
                f"{norm}) at {tokens:,} tokens; they changed no weight: try a lower --max_lr"
                f"{' or --dtype float32' if scale is not None else ''} with another --out_dir")

    def val(self, step: int, loss: float) -> None:
        """The validation loss after `step` steps."""
        print0(f"step {step}/{self.config.max_steps} | validation loss {loss:.4f}")
        self.write("val", step=step, loss=loss)
        seconds = time.perf_counter() - self.drawn
        if self.rank == 0 and step < self.config.max_steps and seconds >= PICTURE_SECONDS:  # the last one at the end
            self._try("loss.png", self._draw)
            self.drawn = time.perf_counter()

    def _draw(self) -> None:
        from plumbing import curve

        curve.draw({self.config.out_dir: curve.read_log(self.path)}, self.path.with_name("loss.png"))

    def _report(self) -> None:
        from plumbing import report

        report.write_report(self.config.out_dir)

    def hellaswag(self, step: int, result: dict) -> None:
        """HellaSwag after `step` steps, as hellaswag.evaluate() gives it."""
        acc, acc_norm, n = (result[name] for name in ("acc", "acc_norm", "n"))
        cut = f"; {result['cut']:,} contexts cut on the left" if result["cut"] else ""
        print0(f"step {step}/{self.config.max_steps} | HellaSwag acc_norm {acc_norm:.2%} +- "
               f"{result['acc_norm_stderr']:.2%}, acc {acc:.2%} | {n:,} examples in {result['seconds']:.1f} s{cut}")
        self.write("hellaswag", step=step, acc_norm=acc_norm, acc=acc, n=n)

    def sample(self, step: int, text: str) -> None:
        """What the model writes after `step` steps."""
        print0(f"step {step}/{self.config.max_steps} | sample: {text!r}")
        self.write("sample", step=step, text=text)

    def end(self, step: int, val_loss: float, stopping: bool) -> None:
        """The last words, then those of the logger, which may take long."""
        self._last_words(step, val_loss, stopping)
        self._track(lambda: self.tracker.close())

    def _last_words(self, step: int, val_loss: float, stopping: bool) -> None:
        """The result, in loss.png and report.md too, or how to go on."""
        took = clock(time.perf_counter() - self.started)
        if stopping:
            print0(f"stopped after step {step:,} of {self.config.max_steps:,}: the same command goes on from there")
            return
        if not self.config.max_steps:
            print0(f"validation loss {val_loss:.4f}, nothing trained; written to {self.path}")
            return
        if self.rank == 0:
            self._try("loss.png", self._draw)
            self._try("report.md", self._report)
        tokens = step * self.config.total_batch_size
        files = [name for name in ("checkpoints", "log.jsonl", "loss.png", "report.md") if name not in self.failed]
        print0(f"finished: validation loss {val_loss:.4f} after {step:,} steps and {tokens:,} tokens, {took} since the "
               f"start; {', '.join(files)} in {self.config.out_dir}")
        if Path(self.config.data).name == "input.txt":
            print0("this was a small text; for GPT-2 124M itself run python fineweb.py, which puts 10 billion tokens "
                   "of FineWeb-Edu into edu_fineweb10B/, and python train_gpt2.py again, on a GPU")
