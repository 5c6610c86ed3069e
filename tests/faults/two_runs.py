"""Two runs into one folder: the second is refused while the first lives, and not after it died."""
import tempfile
from pathlib import Path

from helpers import flags, write_shards
from faults.common import Row, finish, kill_all, start, wait_for


def two_runs(sizes=((1, 1), (2, 1), (1, 2))) -> list[Row]:
    """At these numbers of ranks of the first and the second run."""
    for first_ranks, second_ranks in sizes:
        with tempfile.TemporaryDirectory() as home:
            arguments = flags(data=write_shards(Path(home) / "data"), out_dir=Path(home) / "run", max_steps=100_000,
                              checkpoint_every=50, compile=False)
            first = start(arguments, first_ranks)
            wait_for(first, "step     60/")
            output = finish(start(arguments, second_ranks), code=2 if second_ranks == 1 else 1, seconds=60)
            assert "another run is training into" in output
            assert first.poll() is None
            kill_all(first)
            second = start(arguments, second_ranks)
            wait_for(second, "resumed after step")
            wait_for(second, "| loss ")
            assert second.poll() is None
            kill_all(second)
    names = ", ".join(f"{a} and {b} ranks" if max(a, b) > 1 else "1 and 1 rank" for a, b in sizes)
    return [Row(f"a second run into the folder of a first; {names}", len(sizes),
                "refused while the first lived, resumed it after SIGKILL")]
