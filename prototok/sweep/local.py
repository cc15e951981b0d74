"""The local launcher: one supervised process a device, or several on the CPU, each on its cores.

The driver hands out lots, restarts a worker that died and ends when nothing is left. It keeps no
state: what is done is in the run folder, so the driver may be killed and started again as well.
Workers end with their driver. torch is imported late: a worker sets its threads before that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from prototok.common.progress import Progress
from prototok.sweep.files import RunNotWritable, WorkersFailed
from prototok.sweep.lots import CPU_POSITIONS, CUDA_POSITIONS, Lots
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit

_MOST_CPU_WORKERS = 4
_MOST_FAILED_STARTS = 3


@dataclass(frozen=True)
class LocalSettings:
    """Settings of the local launcher.

    Attributes:
        device: "auto", "cpu", "cuda" (all of them) or one, such as "cuda:1".
        workers: processes a CUDA device, or on the CPU, where the default is one a core, at most 4.
        batch_size: rows a forward, or "auto".
        attempts: times that a unit may kill its worker before it is recorded as failed.
        progress: as `prototok.common.progress.Progress` takes it.
    """

    device: str = "auto"
    workers: int | None = None
    batch_size: int | str = "auto"
    attempts: int = 3
    progress: bool | None = True


@dataclass
class _Process:
    """A worker as its driver sees it."""

    name: str
    device: str
    cores: tuple[int, ...]
    process: Any = None
    pipe: Any = None
    lot: list[Unit] | None = None
    model: str | None = None
    ready: bool = False
    failed_starts: int = 0


def run_local(run: RunFolder, units: list[Unit], settings: LocalSettings) -> None:
    """Do units on this machine; returns when each is done or has failed.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the workers were ended, what they committed stays.
        RunNotWritable: the disk is full; what was committed stays.
        WorkersFailed: workers cannot be started.
    """
    places = places_of(settings.device, settings.workers)
    run.sweep_up()
    positions = CPU_POSITIONS if places[0][0] == "cpu" else CUDA_POSITIONS
    lots = Lots(run, units, len(places), positions, settings.attempts)
    workers = [
        _Process(f"local {i}", device, cores)
        for i, (device, cores) in enumerate(places[: max(1, len(lots))])
    ]
    previous = signal.getsignal(signal.SIGTERM)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread:
        signal.signal(signal.SIGTERM, _interrupt)
    done = failed = 0
    try:
        with Progress(len(units), "units", settings.progress, steady=True) as bar:
            while True:
                for worker in workers:
                    _employ(run, worker, lots, settings)
                busy = [worker for worker in workers if worker.process is not None]
                if not busy:
                    return
                ends = [worker.pipe for worker in busy]
                ends += [worker.process.sentinel for worker in busy]
                connection.wait(ends, timeout=5)
                for worker in busy:
                    for ok in _listen(worker):
                        done, failed = done + ok, failed + (not ok)
                    if not worker.process.is_alive():
                        for ok in _listen(worker):
                            done, failed = done + ok, failed + (not ok)
                        _bury(worker, lots)
                bar.update(done + failed, f"{failed} failed, {len(lots)} lots wait")
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, previous)
        for worker in workers:
            if worker.process is not None:
                worker.process.terminate()
                worker.process.join(10)
                worker.process.kill()
                worker.process.join()
        with contextlib.suppress(OSError):
            run.sweep_up()


def places_of(device: str, workers: int | None) -> list[tuple[str, tuple[int, ...]]]:
    """Return (device, cores) of each worker; ValueError for a device that is not there."""
    count = 0 if device == "cpu" else _cuda_devices()
    found = device
    if device == "auto":
        found = "cuda" if count else "cpu"
    if found.startswith("cuda"):
        index = found.partition(":")[2]
        numbers = list(range(count)) if not index else [int(index)] if index.isdigit() else []
        if not numbers or max(numbers) >= count:
            raise ValueError(
                f"device: {device!r} was asked for and torch sees {count} CUDA devices"
            )
        return [(f"cuda:{n}", ()) for n in numbers for _ in range(workers or 1)]
    if found != "cpu":
        raise ValueError(f"device: {device!r} is not auto, cpu, cuda or cuda:N")
    cores = sorted(os.sched_getaffinity(0))
    number = workers or min(len(cores), _MOST_CPU_WORKERS)
    if number > len(cores):
        return [("cpu", (cores[i % len(cores)],)) for i in range(number)]
    per = len(cores) // number
    return [("cpu", tuple(cores[i * per : (i + 1) * per])) for i in range(number)]


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _employ(run: RunFolder, worker: _Process, lots: Lots, settings: LocalSettings) -> None:
    """Give an idle worker its next lot, starting its process if need be; or let it go."""
    if worker.process is None:
        if not len(lots):
            return
        context = get_context("spawn")
        worker.pipe, theirs = context.Pipe()
        worker.process = context.Process(
            target=_work,
            args=(
                str(run.path), theirs, worker.device, worker.cores, settings.batch_size,
                worker.name,
            ),
            daemon=True,
        )  # fmt: skip
        try:
            worker.process.start()
        except OSError as error:  # as of a process too many
            worker.process = None
            raise WorkersFailed(f"worker {worker.name!r} could not be started ({error})") from None
        theirs.close()
        worker.ready, worker.lot = False, None
    elif worker.ready and worker.lot is None:
        worker.lot = lots.take(worker.model)
        try:
            worker.pipe.send([unit.spec() for unit in worker.lot or []])
        except OSError:
            return  # it has just died; the caller will see that
        if worker.lot is None:
            worker.process.join()
            worker.process = None
        else:
            worker.model = worker.lot[0].model


def _listen(worker: _Process) -> Iterable[bool]:
    """Hear a worker: it is ready for a lot, a unit was done or not, or why it cannot go on."""
    try:
        while worker.pipe.poll():
            said = worker.pipe.recv()
            if said == "ready":
                worker.ready, worker.lot, worker.failed_starts = True, None, 0
            elif isinstance(said, str):
                raise RunNotWritable(said)
            else:
                yield bool(said)
    except RunNotWritable:
        raise
    except (EOFError, OSError):
        return


def _bury(worker: _Process, lots: Lots) -> None:
    """Take back the lot of a worker that died."""
    code = worker.process.exitcode
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    if worker.lot is not None and code == -signal.SIGTERM:
        lots.put_back(worker.lot)  # somebody stopped it; no unit is to blame
    elif worker.lot is not None:
        lots.died(worker.lot, how)
    elif not worker.ready:
        worker.failed_starts += 1
        if worker.failed_starts >= _MOST_FAILED_STARTS and code != -signal.SIGKILL:
            raise WorkersFailed(f"worker {worker.name!r} could not be started ({how})")
    worker.pipe.close()
    worker.process, worker.lot, worker.model, worker.ready = None, None, None, False


def _work(
    path: str, pipe: connection.Connection, device: str, cores: tuple[int, ...],
    batch_size: int | str, name: str,
) -> None:  # fmt: skip
    """Run a worker's process: lots come through the pipe, an empty one ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)
        os.environ["OMP_NUM_THREADS"] = str(len(cores))
    from prototok.sweep.work import Worker

    worker = Worker(RunFolder.open(Path(path)), device, batch_size, name)
    try:
        while True:
            pipe.send("ready")
            lot = [Unit.parse(spec) for spec in pipe.recv()]
            if not lot:
                return
            for _, ok in worker.do(lot):
                pipe.send(ok)
    except RunNotWritable as error:
        pipe.send(str(error))
        sys.exit(1)
    except (EOFError, BrokenPipeError):
        sys.exit(1)


def _end_with_parent() -> None:
    """End with the driver: one that was killed cannot end its workers."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
