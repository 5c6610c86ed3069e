"""Which tests check which promise; pytest's last lines say how many of them ran and whether they passed."""
import re

PROMISES = {  # what is promised: the test files that check it, and what else by the name of the test
    "GPT-2's architecture and initialization: transformers and the paper": ("model reference", None),
    "GPT-2's tokens: tiktoken": ("tokenizer text_file", None),
    "AdamW, Muon and the schedule: their formulas": ("optimizer", "schedule"),
    "losses over many steps: build-nanogpt's own script": ("curve", None),
    "the order of the tokens, at any batch size and number of ranks": ("data", "two_ranks_see|loader|world-"),
    "killed, stopped or resumed: the same bits": ("stop branch resume", r"\[kill-|\[signals-|bit_by_bit|never_stopped"),
    "an error, or a folder that goes, costs no finished step": ("rescue folder", None),
    "a full disk costs no checkpoint": ("", r"full_disk|\[disk-"),
    "damaged and foreign files are refused by name": ("checkpoint foreign foreign_data", r"\[corrupt-|damaged"),
    "inf and nan change no weight": ("", r"\[numbers-|not_finite|overflow"),
    "nothing that is loaded runs code": ("foreign", r"\[untrusted-"),
    "every mistake of a user is one line with the remedy": ("errors help", r"\[fuzz-"),
    "token shards: a plain loop of tiktoken": ("fineweb sources prepare live_data", None),
    "HellaSwag: plain rows through transformers": ("hellaswag", None),
    "text: transformers' generate": ("generate", None),
    "export and import: the same bits there and back": ("export upload download own_tokenizer", None),
    "float16, and what is chosen for a machine": ("float16 machine", None),
    "the log, the report and the curve say what happened": ("report records plot summary progress", None),
    "README and the pages: their commands and names": ("docs notebook", None),
}


def lines(outcomes: dict[str, str]) -> list[str]:
    """Say for each promise how its tests ended; `outcomes` maps test ids to "passed", "failed" or "skipped"."""
    found = []
    for promise, (stems, pattern) in PROMISES.items():
        files = tuple(f"tests/test_{stem}.py::" for stem in stems.split())
        ends = [outcome for name, outcome in outcomes.items() if name.startswith(files)
                or (pattern and re.search(pattern, name.partition("::")[2]))]
        passed, failed = ends.count("passed"), ends.count("failed")
        state = "FAILED" if failed else "kept" if passed else "not checked"
        counts = f"{failed} of {passed + failed} failed" if failed else f"{passed} passed"
        found.append(f"{state:>11} | {promise} ({counts})")
    return found
