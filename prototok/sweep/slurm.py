"""The Slurm launcher: an array of jobs, each a shard on one local launcher (extra `slurm`).

Jobs know nothing of each other. One that is preempted or killed is submitted again, by Slurm or by
running the same command again, and goes on where its shard stands.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from prototok.sweep.files import WorkersFailed
from prototok.sweep.local import LocalSettings, run_local
from prototok.sweep.lots import to_do
from prototok.sweep.run_folder import RunFolder


def shard_job(path: str, shard: str, settings: LocalSettings) -> int:
    """Run a job's shard; return how many of its units are done when it ends."""
    run = RunFolder.open(Path(path))
    units = to_do(run, shard, retry_failed=False)
    run_local(run, units, settings)
    return sum(run.is_done(unit.key) for unit in units)


def run_slurm(run: RunFolder, settings: LocalSettings, parameters: dict[str, str]) -> None:
    """Submit `settings.workers` jobs, one shard each, and wait for them.

    `parameters` go to submitit, numbers as numbers, such as partition, gpus_per_node, timeout_min;
    `cluster=local` runs the jobs as processes of this host. Ctrl-C stops waiting, not the jobs.

    Raises:
        ValueError: submitit is not installed, or it refuses a parameter.
        WorkersFailed: a job ended with an error; the others were waited for.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError(
            "launcher: submitit is not installed; pip install 'prototok[slurm]'"
        ) from None
    jobs_wanted = settings.workers or 1
    options: dict[str, Any] = {
        name: int(value) if value.isdigit() else value for name, value in parameters.items()
    }
    try:
        executor = submitit.AutoExecutor(
            folder=str(run.path.resolve() / "slurm"), cluster=options.pop("cluster", None)
        )
        executor.update_parameters(name="prototok", **{"timeout_min": 24 * 60} | options)
    except (ValueError, TypeError, NameError, RuntimeError) as error:
        raise ValueError(f"slurm: {error}") from None
    inside = dataclasses.replace(settings, workers=None)
    path = str(run.path.resolve())
    with executor.batch():
        jobs = [
            executor.submit(shard_job, path, f"{i}/{jobs_wanted}", inside)
            for i in range(jobs_wanted)
        ]
    while not all(job.done() for job in jobs):
        time.sleep(1)
    errors = [job.exception() for job in jobs]
    ended = [error for error in errors if error is not None]
    if ended:
        first = str(ended[0]).strip().split("\n")[-1]
        raise WorkersFailed(f"slurm: {len(ended)} of {len(jobs)} jobs failed ({first})")
