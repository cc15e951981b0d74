"""The Ray launcher: one actor a GPU of a Ray cluster, each holding its model (extra `ray`).

The run folder must be on a file system that every host sees under the same path. Ray starts an
actor again when its process or host dies, and gives it the same lot up to twice more; after that
the lot is halved, as by the local launcher. See docs/scaling.md for clusters of several hosts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prototok.common.progress import Progress
from prototok.sweep.files import RunNotWritable, WorkersFailed
from prototok.sweep.local import LocalSettings
from prototok.sweep.lots import CPU_POSITIONS, CUDA_POSITIONS, Lots
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit

TASK_RETRIES = 2


class Actor:
    """A worker inside Ray; what it is asked twice it does once, as the run folder knows."""

    def __init__(self, path: str, device: str, batch_size: int | str, name: str) -> None:
        from prototok.sweep.work import Worker

        self.worker = Worker(RunFolder.open(Path(path)), device, batch_size, name)

    def do(self, specs: list[str]) -> int:
        """Fit a lot; return how many of its units this call fitted."""
        return sum(1 for _ in self.worker.do([Unit.parse(spec) for spec in specs]))


def run_ray(run: RunFolder, units: list[Unit], settings: LocalSettings) -> None:
    """Do units on the cluster that RAY_ADDRESS names, or on one started here.

    Raises:
        ValueError: ray is not installed, or the cluster has no room for a worker.
        KeyboardInterrupt: Ctrl-C; what was committed stays.
        RunNotWritable: the disk is full; what was committed stays.
        WorkersFailed: there is no cluster at that address.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("launcher: ray is not installed; pip install 'prototok[ray]'") from None

    run.sweep_up()
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        try:
            ray.init(
                address=address, log_to_driver=False, configure_logging=False,
                include_dashboard=False,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).strip().split("\n")[0]
            raise WorkersFailed(f"ray: no cluster at {address or 'this host'} ({first})") from None
    try:
        _dispatch(ray, run, units, settings)
    finally:
        if started:
            ray.shutdown()


def _dispatch(ray: Any, run: RunFolder, units: list[Unit], settings: LocalSettings) -> None:
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    on_cuda = settings.device.startswith("cuda") or (settings.device == "auto" and gpus > 0)
    room = gpus if on_cuda else int(resources.get("CPU", 0))
    count = min(settings.workers or room, room)
    if count < 1:
        raise ValueError(f"device: the Ray cluster has no {'GPU' if on_cuda else 'CPU'} for it")
    positions = CUDA_POSITIONS if on_cuda else CPU_POSITIONS
    lots = Lots(run, units, count, positions, settings.attempts)
    kind = ray.remote(Actor).options(
        num_gpus=int(on_cuda), num_cpus=1, max_restarts=-1, max_task_retries=TASK_RETRIES
    )
    device = "cuda" if on_cuda else "cpu"  # Ray shows each actor its own GPU alone
    path = str(run.path.resolve())
    actors = [
        kind.remote(path, device, settings.batch_size, f"ray {i}")
        for i in range(min(count, len(lots)))
    ]
    idle = list(range(len(actors)))
    models: dict[int, str] = {}
    busy: dict[Any, tuple[int, list[Unit]]] = {}
    with Progress(len(units), "units", settings.progress, steady=True) as bar:
        while len(lots) or busy:
            while idle and len(lots):
                actor = idle.pop()
                lot = lots.take(models.get(actor))
                assert lot is not None
                models[actor] = lot[0].model
                busy[actors[actor].do.remote([unit.spec() for unit in lot])] = actor, lot
            ended, _ = ray.wait(list(busy), num_returns=1, timeout=5)
            for task in ended:
                actor, lot = busy.pop(task)
                idle.append(actor)
                try:
                    ray.get(task)
                except RunNotWritable as error:  # Ray's own, of this kind as well
                    raise RunNotWritable(str(error.cause)) from None  # type: ignore[attr-defined]
                except ray.exceptions.RayError as error:
                    lots.died(lot, type(error).__name__)
            finished = (
                len(units) - sum(map(len, lots.queue)) - sum(len(v[1]) for v in busy.values())
            )
            bar.update(finished, f"{len(lots)} lots wait, {len(busy)} are under way")
