"""What every command shares: flags from a dataclass, errors in one line, signals, printing on rank 0."""
import argparse
import contextlib
import dataclasses
import inspect
import os
import re
import signal
import sys
import threading


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


def explain(error: Exception) -> str:
    """What an exception of some library says, or the one that it came from, in one short line."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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


def plural(count: int, noun: str) -> str:
    """The noun, with an s unless there is one of it."""
    return noun if count == 1 else noun + "s"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
