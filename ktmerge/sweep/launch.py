"""Workers of a sweep: processes of this machine, Slurm jobs, or actors of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from ktmerge.checkpoints.signals import uninterrupted
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.sweep.outcome import Outcome
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.voices import Chorus, Voice
from ktmerge.sweep.worker import Worker, search

Where = Literal["here", "slurm", "local jobs", "ray"]

_ANSWER_SECONDS = 10.0
_PAUSE = 1.0
"""Seconds between looks at jobs."""
_SHOWN = 300
"""Characters of why one died."""
_NO_CLUSTER = "--ray: no Ray cluster is running here; start one with 'ray start --head'."
_CONTEXT = multiprocessing.get_context("spawn")


def launch(settings: SweepSettings, workers: int, where: Where, jobs: Path, progress: Progress = SILENT) -> Outcome:
    """Run a sweep with so many workers until it is done.

    Args:
        settings: the sweep.
        workers: how many.
        where: processes here, of which this one is one; jobs of Slurm (or, to try that, of this machine); Ray actors.
        jobs: folder for the jobs' files.
        progress: told what this process does.

    Raises:
        UsageError: a package or a cluster is missing, or the storage is out of the workers' reach.
        KtmergeError: all workers failed.
    """
    if where == "here":
        return _here(settings, workers, progress)
    if "://" not in settings.storage:
        settings = replace(settings, storage=str(Path(settings.storage).absolute()))
    return _ray(settings, workers, progress) if where == "ray" else _jobs(settings, workers, where, jobs, progress)


def _here(settings: SweepSettings, workers: int, progress: Progress) -> Outcome:
    """This process is the first; that one of the others dies costs only its time."""
    import torch

    threads = max(1, torch.get_num_threads() // workers)
    if workers == 1:
        return _search(settings, threads, progress)
    chorus = Chorus(progress)
    others: list[BaseProcess] = []
    listeners = []
    try:
        for number in range(2, workers + 1):
            notes, told = _CONTEXT.Pipe(duplex=False)
            others.append(_CONTEXT.Process(target=_beside, args=(settings, threads, told), daemon=True))
            with told:  # the process has its own
                _start(others[-1])
            listeners.append(Thread(target=chorus.listen, args=(number, others[-1], notes), daemon=True))
            with uninterrupted():
                listeners[-1].start()
        with chorus.first.speaking():
            outcome = _search(settings, threads, chorus.first)
        for listener in listeners:
            listener.join()
        return outcome
    finally:
        chorus.end()
        for other in others:
            if other.pid is not None:
                other.terminate()


def _beside(settings: SweepSettings, threads: int, told: Connection[str, Any]) -> None:
    """The life of another worker, which ends with the first: nobody would know of it, nor end it."""
    Thread(target=_follow, daemon=True).start()

    def say(text: str) -> None:
        with suppress(OSError):
            told.send(text)

    voice = Voice(say)
    try:
        with voice.speaking():
            _search(settings, threads, voice)
    except KtmergeError as error:
        say(f"cannot go on: {error}")


def _follow() -> None:
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()
        os._exit(1)


def _search(settings: SweepSettings, threads: int, progress: Progress = SILENT) -> Outcome:
    """Take part with so many threads: each worker with as many as there are cores, they would wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return search(settings, progress)
    finally:
        torch.set_num_threads(before)


def _start(process: BaseProcess) -> None:
    """Ctrl-C on a terminal goes to all processes; this one answers it, and ends the others."""
    with uninterrupted():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which processes inherit
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def require(where: Where) -> None:
    """Refuse to begin where something is missing that `launch` needs, before anything is written.

    Raises:
        UsageError: a package or a cluster.
    """
    if where == "ray":
        _cluster()
    elif where != "here":
        _executor(where, Path())


def _executor(where: Where, folder: Path) -> Any:
    """What submits jobs; it writes nothing before that."""
    try:
        import submitit

        return submitit.AutoExecutor(folder=folder, cluster="slurm" if where == "slurm" else "local")
    except ImportError:
        raise UsageError("--slurm needs submitit; install it with: pip install 'ktmerge[slurm]'.") from None
    except RuntimeError as error:
        raise UsageError(f"--slurm: there is no Slurm on this machine: {error}") from None


def _jobs(settings: SweepSettings, workers: int, where: Where, folder: Path, progress: Progress) -> Outcome:
    executor = _executor(where, folder)
    executor.update_parameters(name="ktmerge-sweep", timeout_min=24 * 60, tasks_per_node=1, nodes=1)
    if where == "slurm" and settings.device != "cpu":
        executor.update_parameters(gpus_per_node=1)
    submitted = [executor.submit(search, settings) for _ in range(workers)]
    progress.note(
        f"submitted {workers} jobs: {', '.join(job.job_id for job in submitted)}; their output is in {folder}"
    )
    try:
        return _first(_as_they_end(submitted), progress)
    except KeyboardInterrupt:
        for job in submitted:
            job.cancel()
        raise


def _as_they_end(jobs: list[Any]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Name and result of every job, those that ended first, first."""
    left = list(jobs)
    while left:
        for job in [one for one in left if one.done()]:
            left.remove(job)
            yield f"job {job.job_id}", job.result
        if left:
            time.sleep(_PAUSE)


def _ray(settings: SweepSettings, workers: int, progress: Progress) -> Outcome:
    """One actor a GPU, if the cluster has any; each loads its model once."""
    ray = _cluster()
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        raise UsageError(_NO_CLUSTER) from None
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") and settings.device != "cpu" else 0
        actor = ray.remote(num_gpus=gpus, num_cpus=1)(Worker)
        running = [actor.remote(settings).run.remote() for _ in range(workers)]
        return _first(_as_they_come(ray, running), progress)
    finally:
        ray.shutdown()


def _cluster() -> Any:
    """Ray, where a cluster of it answers."""
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs ray; install it with: pip install 'ktmerge[ray]'.") from None
    try:
        _require_answer()
    except ConnectionError:
        raise UsageError(_NO_CLUSTER) from None
    return ray


def _require_answer() -> None:
    """Refuse a cluster that has died and left its address: Ray would ask it again for a quarter of an hour.

    Raises:
        UsageError: nothing answers there.
        ConnectionError: there is no address.
    """
    from ray._private import services

    try:
        address = services.canonicalize_bootstrap_address_or_die("auto")
    except (AttributeError, ValueError):
        return  # another version of Ray, or an address of another kind, which it knows how to reach
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError:
        raise UsageError(
            f"--ray: no Ray cluster answers at {address}, where there was one; start one with 'ray start --head'."
        ) from None


def _as_they_come(ray: Any, running: list[Any]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Name and result of every actor's run, those that ended first, first."""
    left = list(running)
    while left:
        (done, *_), left = ray.wait(left, num_returns=1)
        yield f"actor {running.index(done) + 1}", partial(ray.get, done)


def _first(results: Iterable[tuple[str, Callable[[], Outcome]]], progress: Progress) -> Outcome:
    """What the first worker that came through says; all say the same. One that died before is told of at once.

    Args:
        results: name and result of every worker, as they end.
        progress: told of those that died.
    """
    failures = []
    for name, result in results:
        try:
            return result()
        except KeyboardInterrupt:
            raise
        except Exception as error:  # a job or actor that died: whatever the launcher raises
            failures.append(error)
            reason = " ".join((str(error) or type(error).__name__).split())  # submitit's begins with a path
            progress.note(f"{name} cannot go on: {reason[:_SHOWN]}")
    raise KtmergeError(f"all {len(failures)} workers failed; the first: {failures[0]}")
