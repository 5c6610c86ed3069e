"""The mutants of safeguards.py can be made of today's code, and docs/mutants.md has each of them.

    pytest tests/test_mutants.py
"""
import mutants
from mutants import MUTANTS, Mutant, Outcome, Trial, problems


def test_every_safeguard_is_in_the_code_once_and_what_replaces_it_compiles():
    assert len(MUTANTS) > 200
    assert problems(MUTANTS) == []


def test_a_text_that_has_moved_a_name_twice_and_what_does_not_compile_are_told(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 1\nz = 2\n")
    texts = [("none", "w = 1", "w"), ("two", "= 1", "= 3"), ("good", "z = 2", "z = 3"), ("bad", "y = 1", "y ="),
             ("good", "x = 1", "x = 2")]
    found = problems([Mutant(name, "a.py", old, new, "", "") for name, old, new in texts], tmp_path)
    assert [line.partition(":")[0] for line in found] == ["none", "two", "bad", "good"]


def test_the_record_has_every_mutant_and_no_other():
    rows = mutants.rows_of(mutants.RECORD.read_text(encoding="utf-8"))
    assert list(rows) == [mutant.name for mutant in MUTANTS]


def test_a_row_tells_found_from_survived_and_neither(tmp_path, monkeypatch):
    """Only a failure of tests that have passed without the mutant counts; the file is put back each time."""
    trial, path = object.__new__(Trial), tmp_path / "a.py"
    mutant = Mutant("m", "a.py", "good", "bad", "", "tests")
    path.write_text("good")
    failed, passed, nothing = Outcome("t", False, ""), Outcome("", True, ""), Outcome("", False, "words")
    cases = {
        ("t", "default"): ((passed, failed), (passed, passed)), ("t", "slow"): ((passed, passed), (passed, failed)),
        ("SURVIVED", ""): ((passed, passed), (nothing, nothing)),
        ("NO VERDICT: words", ""): ((passed, nothing), (passed, failed)),
        ("NO VERDICT: t fails without it", ""): ((failed, failed), (passed, failed)),
        ("NO VERDICT: no tests: words", ""): ((nothing, nothing), (nothing, nothing)),
    }
    for expected, outcomes in cases.items():
        by_run = dict(zip(mutants.RUNS, outcomes))
        monkeypatch.setattr(mutants, "run_tests", lambda folder, tests, run, *_, by_run=by_run, **__: by_run[run][
            path.read_text() == "bad"])
        trial.folder, trial.unchanged = tmp_path, {}
        assert trial.judge(mutant) == expected
        assert path.read_text() == "good"
    monkeypatch.setattr(mutants, "run_tests", lambda *_, **__: [passed, nothing][path.read_text() == "bad"])
    trial.unchanged = {}
    assert trial.judge(mutant._replace(hangs=True)) == ("tests hangs", "default")
