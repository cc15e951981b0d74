"""The experiments of a report, one a module: its tables and charts, ours and the paper's.

E1 … E9 are the paper's experiments in its order; every one has its section, planned or not. A new
experiment is a module with a `STUDY`, and a place in `STUDIES`.
"""

from __future__ import annotations

from prototok.report.experiments import (
    arrangements,
    capacity,
    distances,
    fit_time,
    information,
    paths,
    sharing,
    solutions,
    throughput,
)
from prototok.report.results import Results
from prototok.report.section import Section, Study, section_of

_CONTINUING = Study(
    code="E9",
    title="Continuing from the vectors",
    source="v2, a negative result",
    names=(),
    there="(e, m) of 128 tokens, continued from combinations of e, m and BOS; judged by eye",
    make=None,
)
STUDIES = (
    arrangements.STUDY,
    sharing.STUDY,
    capacity.STUDY,
    information.STUDY,
    throughput.STUDY,
    distances.STUDY,
    paths.STUDY,
    fit_time.STUDY,
    _CONTINUING,
)


def sections(results: Results) -> list[Section]:
    """Make the sections E1 … E9, and that of what lies beyond the paper."""
    return [*(section_of(study, results) for study in STUDIES), solutions.section(results)]
