"""Work over a network that fails now and then: retries, and a bar that shows how far it is."""
import itertools
import sys
import time

from plumbing.cli import UserError, explain


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


def progress_bar(total: int, initial: int, unit: str, quiet: bool = False):
    """A tqdm bar; where nobody watches, in a job's log file, a line every half minute."""
    from tqdm import tqdm

    seen = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(total=total, initial=initial, unit=unit, unit_scale=True, dynamic_ncols=True,
                disable=quiet or sys.stderr is None, mininterval=0.5 if seen else 30)
