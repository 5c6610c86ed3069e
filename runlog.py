"""What a person sees of a run: the plan card, a line a step, log.jsonl, and errors in one line.

Nothing here changes what is computed.
"""
import argparse
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

from shards import check_inside, open_new

PICTURE_SECONDS = 10  # between two drawings of loss.png, which take 0.3 s each


class UserError(Exception):
    """Something the user can mend: commands print it as one line, without a traceback, and exit with code 2."""


class Stopped(Exception):
    """The ranks have agreed to stop: one of them has received a signal."""


def run_command(main, *arguments):
    """Call main(*arguments) as a command: what the user can mend ends in one line on stderr and exit code 2.

    Bugs keep their traceback. FloatingPointError (a run that diverged) ends in one line and exit code 1.
    """
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this: no file opened later must take its number
            setattr(sys, name, open(os.devnull, "r+"))
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), lambda signum, frame: sys.exit(128 + signum))  # cleans up on its way
    with contextlib.suppress(AttributeError):  # a sample may hold what an ASCII terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's last words then tell what was raised
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    try:
        return main(*arguments)
    except (UserError, OSError) as error:
        message, code = str(error), 2
    except ModuleNotFoundError as error:
        message, code = f"{error}: run pip install -r requirements.txt", 2
    except FloatingPointError as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"{rank}error: {' '.join(message.split())}", file=sys.stderr, flush=True)  # one line, whatever raised it
    sys.exit(code)


def parse_flags(cls, argv: list[str], description: str, positional: tuple[str, ...] = ()) -> dict:
    """The flags given in argv as {field: value}: each field of the dataclass `cls` is a flag, its trailing comment in
    the source the help text; those named in `positional` are no flags. UserError, one line, for a wrong flag."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    parser = OneLineParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(cls):
        text = comments.get(field.name, "").replace("%", "%%")
        if field.default not in (None, dataclasses.MISSING):
            text += f" (default: {field.default if field.default != '' else 'empty'})"
        if field.name in positional:
            several = {"nargs": "*", "type": str} if field.type is list else {"type": field.type}
            parser.add_argument(field.name, help=text, **several)
        elif field.type in (bool, bool | None):
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, metavar=field.type.__name__.upper(), help=text)
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value != []}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a UserError: one line, no usage dump."""

    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")


def patiently(action, what: str, retries: int, remedy: str):
    """What action() returns, asked again while the network fails; see wait_or_give_up()."""
    for failures in itertools.count(1):
        try:
            return action()
        except (UserError, ModuleNotFoundError):
            raise
        except Exception as error:  # the clients of a network have dozens of errors
            wait_or_give_up(failures, retries, what, error, remedy)


def wait_or_give_up(failures: int, retries: int, what: str, error: Exception, remedy: str, sleep=None) -> None:
    """After `failures` in a row to do `what` wait 1, 2, 4 ... 60 seconds, or raise UserError with the remedy.

    What will fail again is not tried again: other status codes of 4xx than 408 and 429, and a hub that is switched off.
    """
    status = getattr(getattr(error, "response", None), "status_code", 500)
    hopeless = type(error).__name__ == "OfflineModeIsEnabled" or (400 <= status < 500 and status not in (408, 429))
    if failures > retries or hopeless:
        raise UserError(f"cannot {what}: {explain(error)}; {remedy}") from error
    seconds = min(60, 2 ** (failures - 1))
    print(f"\nwarning: cannot {what}: {explain(error)}; trying again in {seconds} s ({failures} of {retries})",
          file=sys.stderr, flush=True)
    (sleep or time.sleep)(seconds)


def explain(error: Exception) -> str:
    """What an exception of some library says, or the one that it came from, in one short line."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def progress_bar(total: int, initial: int, unit: str, quiet: bool = False):
    """A tqdm bar; where nobody watches, in a job's log file, a line every half minute."""
    from tqdm import tqdm

    seen = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(total=total, initial=initial, unit=unit, unit_scale=True, dynamic_ncols=True,
                disable=quiet or sys.stderr is None, mininterval=0.5 if seen else 30)


@contextlib.contextmanager
def stop_signal(obey: bool = True):
    """An Event that SIGTERM, Ctrl-C or a closed terminal sets; a second signal ends the process at once.

    Without `obey` the first one does, as there is nothing to save.
    """
    stop = threading.Event()

    def handle(signum, frame):
        stop.set()
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be gone; and print is not safe in a handler
            os.write(2, b"\nstopping after what is under way (once more to stop at once)\n")

    if not obey or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {signum: signal.signal(signum, handle) for signum in known
              if signal.getsignal(signum) != signal.SIG_IGN}  # nohup ignores SIGHUP
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def print0(*values) -> None:
    """print, on rank 0 only, flushed so that a pipe or a job's log file shows it at once."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(*values, flush=True)
        except OSError:  # whoever read this has gone: training goes on, log.jsonl has it all
            sys.stdout = open(os.devnull, "w")


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


def plural(count: int, noun: str) -> str:
    """The noun, with an s unless there is one of it."""
    return noun if count == 1 else noun + "s"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


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
        overflow at a scale of 1 or more does not count.
        """
        self.steps_here += 1  # the first step of a process compiles and warms up: the average forgets it
        self.seconds = seconds if self.steps_here <= 2 else 0.9 * self.seconds + 0.1 * seconds
        last, tokens = self.config.max_steps, step * self.config.total_batch_size
        tok_per_s, mfu = self.config.total_batch_size / seconds, self.flops_per_step / seconds / self.peak
        overflow = scale is not None and scale >= 1 and not math.isfinite(norm)
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
                f"{norm}) at {tokens:,} tokens; they changed no weight: try a lower --max_lr with another --out_dir")

    def val(self, step: int, loss: float) -> None:
        """The validation loss after `step` steps."""
        print0(f"step {step}/{self.config.max_steps} | validation loss {loss:.4f}")
        self.write("val", step=step, loss=loss)
        seconds = time.perf_counter() - self.drawn
        if self.rank == 0 and step < self.config.max_steps and seconds >= PICTURE_SECONDS:  # the last one at the end
            self._try("loss.png", self._draw)
            self.drawn = time.perf_counter()

    def _draw(self) -> None:
        import plot

        plot.draw({self.config.out_dir: plot.read_log(self.path)}, self.path.with_name("loss.png"))

    def _report(self) -> None:
        import report

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
