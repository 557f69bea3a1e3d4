"""Runs that another study has finished already."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from opdlab.errors import require
from opdlab.records import package_versions
from opdlab.studies.job import RunSpec
from opdlab.studies.schema import EVALUATIONS, RUN, RUNS, STUDY, RunFolder, locked


def take_over(specs: Iterable[RunSpec], studies: Sequence[Path]) -> int:
    """Copy runs of other studies that are the very runs wanted: equal configuration, seed, threads and versions.

    With equal seed such a run would come out the same, so it is not repeated. Its ``run.json`` says where it was made.

    Args:
        specs: the runs wanted; those that have begun are left alone.
        studies: folders of other studies.

    Returns:
        How many were taken over.

    Raises:
        UsageError: a folder is no study's.
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
                        # It comes last: it is what makes a run count.
                        replace(record, variant=spec.variant, taken_from=str(source.path)).write(spec.folder)
                taken += 1
                break
    return taken
