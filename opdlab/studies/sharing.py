"""Reuse of runs that another study has finished."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from opdlab.errors import require
from opdlab.locks import locked
from opdlab.records import package_versions
from opdlab.studies.job import RunSpec
from opdlab.studies.schema import EVALUATIONS, RUN, RUNS, STUDY, RunFolder


def take_over(specs: Iterable[RunSpec], studies: Sequence[Path]) -> int:
    """Copy runs from other studies that equal the requested ones in configuration, seed, threads and versions.

    Such a run would give the same results, so it is not repeated. Its ``run.json`` names the folder it comes from.

    Args:
        specs: the requested runs; runs that have begun are not changed.
        studies: folders of other studies.

    Returns:
        Number of copied runs.

    Raises:
        UsageError: a folder is not a study.
    """
    for study in studies:
        require((study / STUDY).is_file(), f"--share has '{study}', which has no {STUDY}: give a study's folder")
    versions, taken = package_versions(), 0
    for spec in specs:
        if (spec.folder / RUN).exists() or (spec.folder / EVALUATIONS).exists():
            continue
        paths = [path for study in studies for path in sorted((study / RUNS).glob(f"*/seed-{spec.seed}"))]
        for source in (RunFolder(path, spec.evaluated_at) for path in paths):
            record = source.record
            alike = record.digest == spec.digest and record.versions.items() >= versions.items()
            if alike and source.finished:
                with locked(spec.folder) as mine:
                    if mine:
                        shutil.copytree(source.path / EVALUATIONS, spec.folder / EVALUATIONS, dirs_exist_ok=True)
                        # Written last: a run counts as finished once this file exists.
                        replace(record, variant=spec.variant, taken_from=str(source.path)).write(spec.folder)
                taken += 1
                break
    return taken
