"""Sweeps as a user runs them: every launcher, killed and started again, and the exit codes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.popen_spawn_posix import Popen
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import crashing
from prototok.cli import main
from prototok.sweep import local
from prototok.sweep.experiments import plan, settings_of
from prototok.sweep.files import WorkersFailed
from prototok.sweep.local import LocalSettings, places_of
from prototok.sweep.lots import shard_of, to_do
from prototok.sweep.run_folder import RunFolder

CONFIG = """\
models: tiny-llama
sources: random
texts: {texts}
lengths: {length}
share: none
changes: {{max_steps: {steps}}}
"""


def sweep(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "prototok", "sweep", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def sweep_here(*arguments: str) -> int:
    """The command in this process, which has torch already; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *arguments])
    return int(ended.value.code or 0)


def planned(folder: Path, texts: int = 6, length: int = 2, steps: int = 150) -> RunFolder:
    (folder / "c.yaml").write_text(CONFIG.format(texts=texts, length=length, steps=steps))
    plan(folder / "run", "table3", settings_of("table3", "small", folder / "c.yaml"))
    return RunFolder.open(folder / "run")


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_plan_run_status_verify_compact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.format(texts=6, length=2, steps=150))
    assert sweep_here("plan", "table3", "--preset", "small", "--config", "c.yaml", "-o", "run") == 0
    run = RunFolder.open("run")
    mine = shard_of(run.units(), "0/2")
    ran = sweep(tmp_path, "run", "run", "--shard", "0/2", "--workers", "1")
    assert ran.returncode == 0, ran.stderr
    assert run.done() == {unit.key for unit in mine} and 0 < len(mine) < 6
    capsys.readouterr()
    assert sweep_here("status", "run") == 0
    counts = ["table3", "6", str(len(mine)), "0", str(6 - len(mine))]
    assert capsys.readouterr().out.splitlines()[1].split() == counts
    assert sweep_here("compact", "run") == 0
    assert pq.read_table(tmp_path / "run/compacted/table3.parquet").num_rows == len(mine)
    assert sweep_here("verify", "run", "--device", "cpu") == 0
    said = capsys.readouterr().err
    assert f"{len(mine)} units checked, {len(mine)} decoded again, 0 problems" in said
    assert sweep_here("run", "run", "--shard", "0/2") == 0
    assert "0 of 0 units done now" in capsys.readouterr().err
    next((tmp_path / "run" / "tensors").iterdir()).write_bytes(b"x")
    assert sweep_here("verify", "run", "--sample", "0") == 3


def test_a_unit_that_kills_its_worker_is_recorded_and_can_be_retried(tmp_path: Path) -> None:
    # One unit that takes long, whose worker is killed while it is at it.
    run = planned(tmp_path, texts=1, length=200, steps=100_000)
    command = [sys.executable, "-m", "prototok", "sweep", "run", "run", "--attempts", "2"]
    driver = subprocess.Popen(
        [*command, "--workers", "1", "--device", "cpu"], cwd=tmp_path, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    end = time.monotonic() + 600
    try:
        # A worker killed before it has its lot blames no unit, so this goes on until two had it.
        while driver.poll() is None:
            assert time.monotonic() < end, "it took too long"
            for pid in workers_past_their_start(driver.pid):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        said = driver.communicate(timeout=300)[1]
    finally:
        driver.kill()
    assert driver.returncode == 3, said
    (failure,) = run.failures().to_pylist()
    assert failure["reason"] == "its worker died: SIGKILL" and failure["attempts"] == 2
    assert to_do(run, None, retry_failed=False) == []
    assert len(to_do(run, None, retry_failed=True)) == 1


def test_a_worker_that_segfaults_takes_no_other_unit_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What C++ does to a process; a unit of three tokens is the one to blame here."""
    monkeypatch.setattr(local, "_work", crashing.crashing_work)
    run = planned(tmp_path, texts=1, length=2)
    units = list(run.units().values())
    culprit = dataclasses.replace(units[0], length=3)
    run.add("table3", {}, [*units, culprit], run.texts())
    settings = LocalSettings("cpu", workers=1, attempts=1, progress=False)
    local.run_local(run, to_do(run, None, False), settings)
    assert run.done() == {unit.key for unit in units}
    (failure,) = run.failures().to_pylist()
    assert failure["key"] == culprit.key and failure["reason"] == "its worker died: SIGSEGV"
    assert os.listdir(run.path / "tmp") == ["lock"]


@pytest.mark.parametrize("how", ["stillborn", "no more processes"])
def test_workers_that_cannot_start_are_one_sentence(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planned(tmp_path, texts=1, length=2)
    if how == "stillborn":
        monkeypatch.setattr(local, "_work", crashing.stillborn_work)
    else:
        monkeypatch.setattr(Popen, "_launch", refuse)
    assert sweep_here("run", str(run.path), "--workers", "1", "--device", "cpu") == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "worker 'local 0' could not be started (" in said
    assert said.endswith("0 units are done, and running it again goes on from there")
    assert os.listdir(run.path / "tmp") in ([], ["lock"])


def refuse(*_: object) -> None:
    raise BlockingIOError(11, "Resource temporarily unavailable")


def test_a_ray_cluster_that_is_not_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    from prototok.sweep.ray import run_ray

    run = planned(tmp_path, texts=1, length=2)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere at all")
    with pytest.raises(WorkersFailed, match="^ray: no cluster at nowhere at all"):
        run_ray(run, to_do(run, None, False), LocalSettings("cpu", workers=1, progress=False))


def workers_past_their_start(driver: int) -> list[int]:
    """Workers that have used seven seconds of a processor: more than imports and a model take."""
    found = []
    try:
        for child in Path(f"/proc/{driver}/task/{driver}/children").read_text().split():
            proc = Path("/proc") / child
            used = sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:13]))
            is_worker = b"spawn_main" in (proc / "cmdline").read_bytes()
            if is_worker and used > 7 * os.sysconf("SC_CLK_TCK"):
                found.append(int(child))
    except OSError:  # one of them has just ended
        pass
    return found


def test_an_interrupted_run_keeps_what_was_committed(tmp_path: Path) -> None:
    run = planned(tmp_path, texts=40, length=4, steps=400)
    driver = subprocess.Popen(
        [sys.executable, "-m", "prototok", "sweep", "run", "run", "--workers", "1"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until(lambda: len(run.done()) > 0)
        driver.send_signal(signal.SIGTERM)  # becomes what Ctrl-C is
        said = driver.communicate(timeout=300)[1]
    finally:
        driver.kill()
    assert driver.returncode == 130, said
    kept = run.done()
    assert f"interrupted; {len(kept)} units are done in run" in said and 0 < len(kept) < 40


def test_ray_actors_killed_at_work_lose_nothing(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    from prototok.sweep.ray import run_ray

    run = planned(tmp_path, texts=60, length=3, steps=200)
    env = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, runtime_env=env)
    killed: list[int] = []

    def kill_two() -> None:
        for _ in range(2):
            before = len(run.done())
            until(lambda before=before: len(run.done()) > before)
            for pid in actors_of(os.getpid())[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill_two, daemon=True)
    killer.start()
    try:
        run_ray(run, to_do(run, None, False), LocalSettings("cpu", progress=False))
    finally:
        ray.shutdown()
    killer.join(10)
    assert len(killed) == 2
    assert run.done() == set(run.units()) and run.fits().num_rows == len(run.units())
    assert run.failures().num_rows == 0
    assert {row["worker"] for row in run.fits().to_pylist()} <= {"ray 0", "ray 1"}


def actors_of(ancestor: int) -> list[int]:
    """Ray actors of this class that descend from a process."""
    found = []
    for proc in Path("/proc").iterdir():
        if not proc.name.isdigit():
            continue
        try:
            if not (proc / "cmdline").read_bytes().startswith(b"ray::Actor"):
                continue
            pid = int(proc.name)
            while pid > 1 and pid != ancestor:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if pid == ancestor:
            found.append(int(proc.name))
    return found


def test_slurm_jobs_do_their_shards(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra `slurm`")
    run = planned(tmp_path)
    ran = sweep(
        tmp_path, "run", "run", "--launcher", "slurm", "--workers", "2", "--slurm",
        "cluster=local", "--slurm", "timeout_min=60",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert run.done() == set(run.units())
    assert len(list((tmp_path / "run" / "slurm").glob("*_result.pkl"))) == 2


def test_places_are_devices_or_parts_of_the_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert places_of("cpu", 1) == [("cpu", tuple(cores))]
    every = places_of("cpu", len(cores))
    assert [place[1] for place in every] == [(core,) for core in cores]
    with pytest.raises(ValueError, match="device: 'tpu' is not auto, cpu, cuda or cuda:N"):
        places_of("tpu", None)
    with pytest.raises(ValueError, match="device: 'cuda:99' was asked for and torch"):
        places_of("cuda:99", None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "table9", "-o", "r"], "experiment: 'table9' is not one of"),
        (["plan", "table3", "-o", "r"], "source: none was given"),
        (["plan", "table3", "-o", "full", "--preset", "small"], "full exists and is not a run"),
        (["plan", "table3", "-o", "r", "--config", "no.yaml"], "config: no.yaml could not be read"),
        (["plan", "figure4", "-o", "r", "--preset", "small", "--source", "random"], "no contexts"),
        (["run", "nowhere"], "run: nowhere is not a run folder"),
        (["run", "made", "--shard", "2/2"], "shard: '2/2' is not i/n"),
        (["run", "made", "--launcher", "pbs"], "launcher: 'pbs' is not local, ray or slurm"),
        (["run", "made", "--workers", "0"], "workers: 0 is not a positive integer"),
        (["run", "made", "--slurm", "a=b"], "slurm: given beside the launcher 'local'"),
        (["status", "full"], "run: full is not a run folder"),
        (["verify", "made", "--sample", "-1"], "sample: -1 is negative"),
        (["compact", "nowhere"], "run: nowhere is not a run folder"),
    ],
)
def test_bad_usage_is_one_sentence_and_changes_nothing(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    RunFolder.create(tmp_path / "made")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert sweep_here(*arguments) == 2
    assert says in capsys.readouterr().err
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
