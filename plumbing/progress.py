"""What is under way, shown while it lasts: a bar on a terminal or in a notebook, a line each half minute in a log file.

    track(items, what, unit)      the items, with a bar of how many have been dealt with
    counted(what, total, unit)    a context that gives a function to call with how much has been done
    busy(what)                    a context for what cannot be counted: the seconds so far
    progress_bar(total, ...)      a bar of tqdm's own, which stays when it is full

The first three show nothing in their first two seconds and leave nothing behind. A thread draws them, so they also move
while a single call takes minutes. Only rank 0 shows anything. Without tqdm there are lines instead of bars.
"""
import contextlib
import os
import sys
import threading
import time

from plumbing.cli import clock

DELAY = 2  # seconds before anything is shown
REDRAW = 0.5  # seconds between two drawings of a bar
LINE_EVERY = 30  # seconds between two lines in a log file


class Progress:
    """Work under way, which a thread shows: `done` of `total`, or, without a unit to count in, the time so far."""

    def __init__(self, what: str, total: int | None = None, unit: str = ""):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.started, self.ended = time.monotonic(), threading.Event()
        self.thread = None

    def __enter__(self):
        if is_shown():
            thread = threading.Thread(target=self.show, daemon=True)
            try:
                thread.start()
                self.thread = thread
            except RuntimeError:  # as many threads as this user may have: nothing is shown
                pass
            except BaseException:  # a signal: __exit__() will not be called
                self.ended.set()
                raise
        return self

    def __exit__(self, *error):
        self.ended.set()
        if self.thread:
            self.thread.join(1)  # a terminal may be stopped with Ctrl-S

    def count(self, more: int = 1) -> None:
        """Add to what has been done."""
        self.done += more

    def show(self) -> None:
        """Draw a bar, or write lines, until the work has ended."""
        with contextlib.suppress(OSError, ValueError):  # stderr may have gone
            seconds = DELAY if is_screen() else LINE_EVERY
            while not self.ended.wait(seconds):
                if is_screen():
                    with contextlib.suppress(ModuleNotFoundError):  # then there are lines
                        return self.draw(load_tqdm())
                print(self.line(), file=sys.stderr, flush=True)
                seconds = LINE_EVERY

    def draw(self, bar_class) -> None:
        """Draw a bar until the work has ended."""
        form = {"unit": f" {self.unit}"} if self.unit else {"bar_format": "{desc}: {elapsed}"}
        with bar_class(total=self.total, desc=self.what, leave=False, delay=1e-9, **form) as bar:
            bar.start_t -= time.monotonic() - self.started
            while True:
                bar.n = self.done
                bar.refresh()
                if self.ended.wait(REDRAW):
                    break
        print("\r", end="", file=bar.fp, flush=True)  # below another bar, tqdm leaves the cursor at the end of a line

    def line(self) -> str:
        """Say what is under way, how much of it is done, and how long it has taken and will take."""
        seconds = time.monotonic() - self.started
        if not self.unit:
            return f"{self.what}: {clock(seconds)}"
        of = f" of {self.total:,}" if self.total else ""
        left = f", {clock(seconds * (self.total - self.done) / self.done)} left" if self.total and self.done else ""
        return f"{self.what}: {self.done:,}{of} {self.unit}, {clock(seconds)}{left}"


def track(items, what: str, unit: str):
    """Yield the items and show how many have been dealt with, of all if their number is known."""
    total = len(items) if hasattr(items, "__len__") else None
    with counted(what, total, unit if total != 1 else "") as count:  # of a single one there is nothing to count
        for item in items:
            yield item
            count()


@contextlib.contextmanager
def counted(what: str, total: int | None, unit: str):
    """Give a function to call with the number of units that have just been done (default: 1)."""
    with Progress(what, total, unit) as shown:
        yield shown.count


@contextlib.contextmanager
def busy(what: str):
    """Show what is under way and the time so far. Also a decorator of functions."""
    with Progress(what):
        yield


def progress_bar(total: int, initial: int, unit: str):
    """Return tqdm's bar, which is shown from the start and stays; in a log file it is a line each half minute."""
    return load_tqdm()(total=total, initial=initial, unit=unit, unit_scale=True)


class Lines:
    """A file for tqdm that makes a line on stderr of each of its drawings."""

    def write(self, text: str) -> None:
        """Write a drawing without what moves the cursor."""
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: each line is flushed."""


def is_shown() -> bool:
    """Return whether this process is the one that shows anything."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr is not None


def in_notebook() -> bool:
    """Return whether what is printed goes into a notebook."""
    return type(sys.stdout).__module__.startswith("ipykernel")


def is_screen() -> bool:
    """Return whether a person watches, and a line can be drawn anew."""
    return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def load_tqdm():
    """Return tqdm's class, set to draw where it can be seen, on rank 0 alone; without its own thread.

    That is on stderr; in a notebook, which keeps the two apart, on stdout as print() does; in a log file as lines.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0

        def __init__(self, *arguments, **options):
            place = {"ncols": 80, "nrows": 24, "mininterval": REDRAW if is_screen() else LINE_EVERY}
            if in_notebook():
                place["file"] = sys.stdout
            elif not is_screen():
                place["file"] = Lines()
            elif os.get_terminal_size(sys.stderr.fileno()).columns:  # some terminals do not tell
                place |= {"ncols": None, "nrows": None, "dynamic_ncols": True}
            hidden = {} if is_shown() else {"disable": True}
            super().__init__(*arguments, **{**options, "miniters": 0, **place, **hidden})

    return Bar
