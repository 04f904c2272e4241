"""A study from its file to its results: what is due is run, what is done is kept, all is compared.

It can be stopped at any moment and goes on; runs that are there are found by what they were made
of, so that a variant more costs only its own runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from san_llm.errors import InputError, SanError
from san_llm.files import write_text
from san_llm.look.figures import check_matplotlib
from san_llm.progress import Bar, bar, say
from san_llm.recipe.read import to_yaml
from san_llm.runs.lock import sole_writer
from san_llm.study.evaluations import Asked, asked_of, find_evaluation
from san_llm.study.found import (
    FAILED,
    LOGS,
    RECIPES,
    RUNS,
    Inputs,
    keep_failure,
    read_trials,
)
from san_llm.study.grid import Grid
from san_llm.study.pictures import save_study_drawings
from san_llm.study.plan import StudyPlan, plan_study
from san_llm.study.read import load_study
from san_llm.study.record import StudyResult, write_study
from san_llm.study.results import results_of
from san_llm.study.schema import Cell, Study
from san_llm.study.work import Ended, Job, work

STUDIES = Path("studies")


@dataclass(frozen=True)
class StudyRequest:
    """What ``san-llm study`` was asked.

    Attributes:
        file: The study's file.
        processes: How many runs at once.
        accelerate: A config file of Accelerate's for each training, or the name of a shipped one.
        output: The study's folder; None: ``studies/<name>``.
        retry: Try again what failed.
    """

    file: Path
    processes: int = 1
    accelerate: Path | None = None
    output: Path | None = None
    retry: bool = False


def begin(request: StudyRequest) -> UnderWay:
    """Return a study, read and checked with all its variants, tasks and rows; nothing is run.

    Raises:
        InputError: when something in it cannot be right.
    """
    study = load_study(request.file)
    folder = request.output or STUDIES / study.name
    if folder.is_file():
        raise InputError(f"{folder}: a file stands there; expected the study's folder")
    if request.retry:
        shutil.rmtree(folder / FAILED, ignore_errors=True)
    return UnderWay(study, folder, request, asked_of(study))


class UnderWay:
    """A study under way.

    Attributes:
        study: What its file says.
        folder: Where all of it is.
        grid: Its runs, as they stood at the last look.
    """

    def __init__(self, study: Study, folder: Path, request: StudyRequest, asked: Asked) -> None:
        self.study, self.folder = study, folder
        self._request, self._asked = request, asked
        self._inputs = Inputs()
        self._cells: dict[str, Cell] = {}
        self._done: set[str] = set()
        self.grid = self._look()

    def _look(self) -> Grid:
        self.grid = Grid(self.study, read_trials(self.folder), self._inputs)
        return self.grid

    def plan(self) -> StudyPlan:
        """Return what the study will take."""
        return plan_study(self.grid, self._request.processes)

    def commands(self) -> list[str]:
        """Return what can begin now, a command each, which may run side by side."""
        return [job.command for job in self._jobs()]

    def finish(self) -> StudyResult:
        """Run what is due until nothing is, write what all of it came to, and return that.

        Raises:
            StopAskedError: when this process was asked to stop.
            InputError: when a run's input turns out to be wrong.
            SanError: when an evaluation fails.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with sole_writer(self.folder):
            with bar("Study", self.plan().runs, "runs") as progress:
                work(self._request.processes, self._next, lambda job: self._ended(job, progress))
            result = results_of(self._look(), self._asked)
            write_study(self.folder, result)
            try:
                check_matplotlib()
            except InputError as error:
                say(f"no pictures: {error}")
            else:
                save_study_drawings(result, self.folder / "plots")
        return result

    def _next(self, running: frozenset[str]) -> Job | None:
        job = next((job for job in self._jobs() if job.name not in running), None)
        if job is not None and job.name in self._done:
            raise SanError(f"{job.name}: ended, and is not found; what it printed is in {job.log}")
        return job

    def _jobs(self) -> Iterator[Job]:
        """Give what can begin now, trainings first."""
        for cell in self.grid.due():
            yield self._training(cell)
        if self._asked.names:
            yield from self._evaluations()

    def _training(self, cell: Cell) -> Job:
        name = f"train {cell.name}"
        self._cells[name] = cell
        trial, log = self.grid.trial(cell), self.folder / LOGS / f"{cell.name}.log"
        config = self._request.accelerate
        launch = [] if config is None else ["--accelerate", str(config)]
        if trial is not None:
            return Job(name, ["train", str(trial.place), "--resume", *launch], log)
        recipe = self.folder / RECIPES / f"{cell.name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, to_yaml(cell.recipe))
        run = self.folder / RUNS / cell.name
        if run.exists():  # made by another state of the study's file, or of its rows
            run = run.with_name(f"{run.name}-{self._inputs.short(cell.recipe)}")
        return Job(name, ["train", str(recipe), "--output", str(run), *launch], log)

    def _evaluations(self) -> Iterator[Job]:
        """Give the evaluations of finished runs that are not there, the base's first."""
        runs = self.grid.measured_runs()
        if runs and not any(find_evaluation(run, self._asked, of_base=True) for run in runs):
            yield self._evaluation(runs[0], of_base=True)
        for run in runs:
            if find_evaluation(run, self._asked) is None:
                yield self._evaluation(run)

    def _evaluation(self, run: Path, of_base: bool = False) -> Job:
        of = f"base of {run.name}" if of_base else run.name
        options = ["--base-only"] if of_base else []
        log = self.folder / LOGS / f"eval-{'base' if of_base else run.name}.log"
        return Job(f"eval {of}", ["eval", str(run), *options, *self._asked.arguments], log)

    def _ended(self, ended: Ended, progress: Bar) -> None:
        name, cell = ended.job.name, self._cells.get(ended.job.name)
        if ended.code == InputError.exit_code:
            raise InputError(f"{name}: {ended.last_line}")
        if ended.code and cell is None:
            raise SanError(f"{name}: {ended.last_line}; all of it is in {ended.job.log}")
        if ended.code and cell is not None:
            say(f"{name}: failed: {ended.last_line}")
            keep_failure(self.folder, cell, ended.last_line, self._inputs)
        if ended.code == 0:
            self._done.add(name)
        self._look()
        progress.to(sum(map(len, (self.grid.of(v) for v in self.study.variants))), name)
