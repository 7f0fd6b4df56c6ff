"""The command behind docs/quality.md: what it trains, what it requires, and what it writes."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgedistill.evaluation.conditional import Following

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == EXAMPLES:
            del sys.modules[name]


def test_every_training_is_another_one_and_all_fit_into_an_hour_on_two_cores(module: Any) -> None:
    runs, measures, tables = map(module, ("quality_runs", "quality_measures", "quality_tables"))
    made = {(name, seed): run.load(seed) for name, run in runs.RUNS.items() for seed in run.seeds}
    own = [recipe for (name, _), recipe in made.items() if runs.RUNS[name].of is None]
    assert len({recipe.fingerprint for recipe in own}) == len(own)
    assert all(runs.RUNS[run.of].seeds == run.seeds for run in runs.RUNS.values() if run.of)
    assert {run.section for run in runs.RUNS.values()} == {*measures.MEASURES} == {*tables.SECTIONS}
    usual = [run for run in runs.RUNS.values() if run.usual]
    assert sum(len(run.seeds) * run.seconds for run in usual) <= 6600


def test_several_students_together_are_trained_as_long_as_one(module: Any) -> None:
    runs = module("quality_runs").RUNS
    for total in (1, 2, 4):
        lengths = set()
        for students in (1, 2, 4):
            settings = runs[f"msd-{students}-of-{total}"].load(0).settings
            assert settings.students == students
            stages = (settings.score, settings.dmd2.warm_up, settings.dmd2.adversarial)
            lengths.add(tuple(students * stage.iterations for stage in stages))
        assert lengths == {(80 * total, 600 * total, 100 * total)}


def sample(name: str, nfe: int, frechet: float) -> dict[str, Any]:
    return {"run": name, "nfe": nfe, "seed": 0, "report": {"frechet": frechet}}


def test_a_student_for_several_numbers_of_evaluations_may_lose_a_tenth(module: Any) -> None:
    comparisons = module("quality_runs").comparisons
    own = sample("sfd", 2, 1.0)
    assert list(comparisons([own, sample("sfd-v", 2, 1.09)])) == []
    (missed,) = comparisons([own, sample("sfd-v", 2, 1.2)])
    assert missed.startswith("seed 0: sfd-v at 2 evaluation(s) is 1.200 of sfd at 2")


def test_a_student_that_follows_must_beat_the_teacher_in_every_respect(module: Any) -> None:
    problems = module("quality_measures").following_problems
    teachers = [Following("a", 4, 0.9, 0.01, 0.1, 0.8), Following("b", 4, 1.1, 0.001, 0.1, 0.7)]
    better = Following("s", 4, 0.5, 0.005, 0.1, 0.6)
    assert list(problems(better, 0.2, teachers)) == []
    worse = Following("s", 4, 0.9, 0.02, 0.1, 0.75)
    assert [text.split(": ")[1].split(" is ")[0] for text in problems(worse, 0.31, teachers)] == [
        "Frechet distance",
        "distance to the condition",
        "Frechet distance once put right",
        "trains 0.31 of the base's parameters, at most 0.3",
    ]


def test_the_document_is_written_between_its_markers_alone(module: Any, tmp_path: Path) -> None:
    documents, path = module("documents"), tmp_path / "quality.md"
    begin = documents.BEGIN.format("quality.py")
    path.write_text(f"# before\n{begin}old\n{documents.END}\nafter\n")
    for _ in range(2):
        documents.put("new\n", path, "quality.py")
        assert path.read_text() == f"# before\n{begin}\nnew\n\n{documents.END}\nafter\n"
    path.write_text("# before\n")
    with pytest.raises(SystemExit, match="lacks the lines <!-- written by"):
        documents.put("new\n", path, "quality.py")


def test_the_row_of_a_length_names_the_number_of_students_that_comes_nearest(module: Any) -> None:
    tables = module("quality_tables")
    lines = [
        {"run": f"msd-{k}-of-2", "seconds": 9.0, "report": {"frechet": value, "recall": 0.5}}
        for k, value in ((1, 1.2), (2, 1.0), (4, 1.1))
    ]
    (row,) = tables.shared_rows(lines, None)  # lengths that were not trained have none
    assert row == ["2", "1.200 (0.50)", "1.000 (0.50)", "1.100 (0.50)", "2", "9 9 9"]
