"""What every command shares: flags from a dataclass, errors in one line, signals, printing on rank 0."""
import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import inspect
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

from plumbing import flag_help

BENCH_PACKAGES = ("scipy", "transformers")  # which requirements-dev.txt has, and requirements.txt has not


class UserError(Exception):
    """Raised for what the user can mend. Commands print it as one line, without a traceback, and exit with code 2."""


class Stopped(KeyboardInterrupt):
    """Raised after a signal: when all ranks have agreed to stop, or at once if one alone has nothing to lose.

    As a KeyboardInterrupt it passes through libraries that catch every Exception.
    """


class StopFlag(threading.Event):
    """Set when this process receives a signal, which also raises Stopped at once if at_once() is true by then."""

    def __init__(self):
        super().__init__()
        self.at_once = lambda: os.environ.get("WORLD_SIZE", "1") == "1"  # until training begins


def end_quietly() -> None:
    """Have Ctrl-C end the process with one line at once, until run_command() begins."""
    def end(signum, frame):
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def run_command(main, *arguments):
    """Call main(*arguments) as a command.

    An error that the user can mend ends in one line on stderr and exit code 2, FloatingPointError (a run that diverged)
    in one line and exit code 1. A training run that is stopped ends with exit code 0. Bugs keep their traceback.
    """
    if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == __name__:  # from end_quietly()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process: no file opened later must take its number
            setattr(sys, name, open(os.devnull, "r+"))
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), lambda signum, frame: sys.exit(128 + signum))  # cleans up on its way
    with contextlib.suppress(AttributeError):  # a sample may hold what an ASCII terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.suppress(OSError, ValueError, AttributeError):  # some programs replace stderr
        faulthandler.enable()  # says where, if a disk fails under mapped data (SIGBUS), or a library crashes
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's last words then tell what was raised
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(without_traceback(main))
    try:
        return main(*arguments)
    except Stopped as stop:  # what has been done is saved
        return print0(*stop.args)
    except (UserError, OSError) as error:
        message, code = str(error), 2
    except ModuleNotFoundError as error:
        file = "requirements-dev.txt" if error.name in BENCH_PACKAGES else "requirements.txt"
        message, code = f"{error}: run pip install -r {file}", 2
    except FloatingPointError as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    with contextlib.suppress(OSError):  # one line, in one write: other ranks write to the same terminal
        sys.stderr.write(f"{rank}error: {' '.join(message.split())}\n")
        sys.stderr.flush()
    sys.exit(code)


def without_traceback(main):
    """Return main, such that what the user can mend comes without the lines of code that led to it."""
    def called(*arguments):
        try:
            return main(*arguments)
        except (UserError, OSError) as error:
            raise error.with_traceback(None) from None

    return called


class Range(NamedTuple):
    """The numbers that a field of type Annotated[int, Range(low, high)] accepts, both ends included."""
    low: float = 0
    high: float = 2**32 - 1

    def __str__(self):
        powers = {2**n - 1: f"2**{n} - 1" for n in (31, 32, 63)}
        return f"a number from {self.low} to {powers.get(self.high, self.high)}"


Positive = Annotated[int, Range(1)]  # a plain int or float accepts 0 too
Prompt = Annotated[str, "empty too"]  # a plain str must not be empty, unless it is so by default
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def check_values(config) -> None:
    """Check the values of a dataclass by the types of its fields, in its __post_init__.

    Raises UserError, "--name is x, it must be y", for the first that is wrong. A str must not be empty unless it is so
    by default; a path given for one becomes text, and ~ at its start the home folder.
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind is str:
            if value is not None and not (isinstance(value, str) and value[:1] != "~"):
                value = os.path.expanduser(str(value))  # the shell expands ~ only where a word begins
                object.__setattr__(config, field.name, value)  # a frozen dataclass too
            wrong = "a name or a path" if value == "" and field.default != "" else ""
        else:
            wrong = "" if accepts(kind, value) else describe_type(kind)
            if wrong and get_origin(kind) is Literal and (near := flag_help.nearest(str(value), get_args(kind), 0.5)):
                wrong += f": did you mean {near}?"
        require(config, field.name, not wrong, wrong)


def require(config, name: str, true: bool, what: str) -> None:
    """Raise UserError, "--name is x, it must be what", unless it is true."""
    if not true:
        raise UserError(f"--{name} is {getattr(config, name)!r}, it must be {what}")


def accepts(kind, value) -> bool:
    """Return whether a value is one that a field of this type may have."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (bool, bool | None):
        return isinstance(value, bool) or (value is None and kind is not bool)
    number, *ranges = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if number not in (int, float):
        return True
    low, high = ranges[0] if ranges else Range()
    return isinstance(value, (int, number)) and not isinstance(value, bool) and low <= value <= high  # nan is not


def describe_type(kind) -> str:
    """Say what a field of this type accepts."""
    if get_origin(kind) is Literal:
        *first, last = [str(choice) for choice in get_args(kind) if choice != ""]
        return f"{'one of ' if len(first) > 3 else ''}{', '.join(first)} or {last}"
    if kind in (bool, bool | None):
        return "True or False"
    return str(get_args(kind)[1] if get_origin(kind) is Annotated else Range())


RENAMED = {"recipe": "preset"}  # flags of earlier versions


def parse_flags(cls, argv: list[str], description: str, positional: tuple[str, ...] = (), presets=(),
                defaults=None) -> dict:
    """Read the flags in argv -> {field: value} of those that are given.

    Each field of the dataclass `cls` is a flag. The comment behind it in the source is its help text, and a line that
    is only a comment begins a group of flags. Fields named in `positional` are arguments without a flag. --help ends
    with the commands at the top of the docstring of cls's module. With `presets`, names, there is a flag --preset;
    `defaults` is then a function, {field or "preset": value} as given -> all that lies under it, which --help shows
    and the result holds. Raises UserError, in one line, for a wrong flag.
    """
    helps = {"-h", "-help", "--help"}
    if helps & set(argv):
        given, words = {}, [word for word in argv if word not in helps]
        with contextlib.suppress(UserError):  # what is wrong is not the question
            given = vars(make_parser(cls, description, positional, presets).parse_known_args(words)[0])
        values = defaults(given) if defaults else {}
        make_parser(cls, description, positional, presets, values).print_help()
        sys.exit(0)
    flags = vars(make_parser(cls, description, positional, presets).parse_args(argv))
    flags = {name: value for name, value in flags.items() if value != []}
    if defaults:
        flags = {**defaults(flags), **flags}
        del flags["preset"]
    return flags


def make_parser(cls, description: str, positional: tuple[str, ...], presets, defaults=None):
    """Make the parser of parse_flags(). Its help shows `defaults`, {field: value}, and otherwise those of cls."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m bench.NAME`
    name = spec.name.removesuffix(".__main__") if spec else sys.argv[0].replace("%", "%%")
    words = ["python", f"-m {name}" if spec else name]
    words += [f"[{name.upper()} ...]" if fields[name].type is list else f"[{name.upper()}]" for name in positional]
    if len(fields) > len(positional):
        words.append("[--flag VALUE ...]")
    width = min(100, max(60, shutil.get_terminal_size((100, 24)).columns))
    defaults = {name: field.default for name, field in fields.items()} | (defaults or {})
    note = "In [brackets]: the value that applies here without the flag"
    note += f", from --preset {defaults['preset']}." if "preset" in defaults else "."
    parser = OneLineParser(
        usage=" ".join(words), add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description=textwrap.fill(description, width),
        epilog=flag_help.lay_out(flag_help.examples_of(cls.__module__), os.path.dirname(sys.argv[0]), width),
        formatter_class=lambda prog: flag_help.HelpFormatter(prog, max_help_position=29, width=width))
    group = parser
    if presets:
        shown = f" [{defaults['preset']}]" if "preset" in defaults else ""
        group = parser.add_argument_group("Preset")
        group.add_argument("--preset", choices=tuple(presets), help=f"settings that other flags override{shown}")
    source = source_of(cls)
    for heading, name, text in re.findall(r"^    (?:# (.+)|(\w+): .*?  # (.+))$", source, re.MULTILINE):
        if heading:
            group = parser.add_argument_group(heading)
        elif name in fields:
            add_argument(group, fields[name], text, name in positional, defaults[name])
    if any(action.help.endswith("]") for action in parser._actions):
        parser.description += f"\n\n{note}"
    return parser


def add_argument(group, field, text: str, is_positional: bool, default) -> None:
    """Add the flag of one field of a dataclass, or its argument without a flag; its help shows the default."""
    kind = field.type
    said = "default:" in text and default == field.default
    nothing = default is None or default is dataclasses.MISSING or default == "" or (default is False and kind is bool)
    if not (said or nothing):
        text += f" [{flag_help.show(default)}]"
    options = {"help": text.replace("%", "%%")}
    if kind is bool and field.default is False:
        group.add_argument(f"--{field.name}", action="store_true", **options)
        group.add_argument(f"--no-{field.name}", action="store_false", dest=field.name, help=argparse.SUPPRESS)
    elif kind in (bool, bool | None):
        group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
    elif kind is list:
        group.add_argument(field.name, nargs="*", type=str, **options)
    elif is_positional:
        group.add_argument(field.name, type=kind, nargs="?", **options)
    elif get_origin(kind) is Literal:
        choices = "{" + ",".join(filter(None, get_args(kind))) + "}"
        group.add_argument(f"--{field.name}", metavar=choices, **options)
    else:
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        group.add_argument(f"--{field.name}", type=kind, metavar=flag_help.metavar(field.name, kind), **options)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a UserError: one line, no usage dump, and what to write instead."""

    def parse_args(self, argv: list[str]):
        """Parse the flags; a word that belongs to none is an error."""
        self.argv = argv
        flags, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self.hint_for_unknown(unknown)}")
        return flags

    @property
    def known(self) -> list[str]:
        """List the flags that this command has, in the order of the help."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def hint_for_unknown(self, unknown: list[str]) -> str:
        """Say what may be meant by words that belong to no flag, ": ..." or ""."""
        dashes = ("-", "\u2013", "\u2014")  # from a page that made -- into one
        flags = [word.partition("=")[0] for word in unknown if word.startswith(dashes)]
        hints = [(flag, flag_help.hint_for_flag(flag, self.known)) for flag in flags]
        if not flags and not self._get_positional_actions():
            hints = [(unknown[0], flag_help.hint_for_word(unknown[0], self.argv, self.known))]
        hints = [(word, hint) for word, hint in hints if hint]
        if len(hints) == 1 and len(flags) < 2:
            return f": {hints[0][1]}"
        return "".join(f"; {word}: {hint}" for word, hint in hints)

    def error(self, message: str):
        """Raise the message as a UserError; for a renamed flag it gives the new name."""
        for old, new in RENAMED.items():
            if f"--{old}" in message.replace("=", " ").split():
                raise UserError(f"--{old} is now --{new} (--help lists every flag)")
        flag = message.removeprefix("argument ").partition(":")[0].split("/")[0]
        action = self._option_string_actions.get(flag)
        if message.endswith("expected one argument"):
            message += f", {flag} {action.metavar or 'NAME'}"
        elif "ignored explicit argument" in message:
            message += f": write {flag} or --no-{flag[2:]}"
        elif wrong := re.search(r"invalid (?:int|float) value: '(.*)'", message):
            message += f": {flag_help.hint_for_number(wrong[1], action.type)}"
        elif wrong := re.search(r"invalid choice: '(.*?)'", message):
            near = flag_help.nearest(wrong[1], action.choices)
            message += f": did you mean {near}?" if near else ""
        raise UserError(f"{message} (--help lists every flag)")


source_of = functools.cache(inspect.getsource)  # it parses the whole file


def changed_flags(config, default) -> list[str] | None:
    """Return the flags that make `default` into `config`; None if no flag can, as for compile=None."""
    words = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if value == getattr(default, name):
            continue
        if value is None:
            return None
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return words


def explain(error: Exception) -> str:
    """Return what an exception of some library says, or the one that caused it, in one short line."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def stop_signal(obey: bool = True):
    """Yield a StopFlag that SIGTERM, Ctrl-C or a closed terminal sets; a second signal ends the process at once.

    Without `obey` the first signal does, as there is nothing to save. In a thread other than the main one there are no
    signals, and the flag is never set.
    """
    stop = StopFlag()

    def handle(signum, frame):
        stop.set()
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        if stop.at_once():
            raise Stopped("stopped before the first step of this session: the same command begins it again")
        with contextlib.suppress(OSError):  # the terminal may be gone; and print is not safe in a handler
            os.write(2, b"\nstopping after what is under way (once more to stop at once and lose it)\n")

    if not obey or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {signum: signal.getsignal(signum) for signum in known}
    before = {signum: handler for signum, handler in before.items() if handler != signal.SIG_IGN}  # nohup: SIGHUP
    try:
        for signum in before:
            signal.signal(signum, handle)
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def above_bars():
    """Return a context in which tqdm's bars are off the terminal, so that what is printed has a line of its own."""
    loaded = sys.modules.get("tqdm")
    return loaded.tqdm.external_write_mode() if hasattr(loaded, "tqdm") else contextlib.nullcontext()


def print0(*values) -> None:
    """Print on rank 0 only, flushed so that a pipe or a job's log file shows it at once."""
    if os.environ.get("RANK", "0") == "0" and values:
        try:
            with above_bars():
                print(*values, flush=True)
        except OSError:  # the reader of a pipe has gone: training continues, and log.jsonl has everything
            sys.stdout = open(os.devnull, "w")


def bold(text: str) -> str:
    """Return the text in bold type for a terminal, unchanged for anything else (no-color.org)."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\033[1m{text}\033[0m"


def plural(count: int, noun: str) -> str:
    """Return the noun, with an s unless the count is 1."""
    return noun if count == 1 else noun + "s"


def reasoned(choice: str, reason: str) -> str:
    """Return an automatic choice with its reason; without one if the user has chosen."""
    return f"{choice}: {reason}" if reason else choice


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
