"""Training sets on Ray (control path): the passes of training.py as tasks of a cluster, where a machine is too small.

What must stay true: a task is the same function that a local worker runs, on the same rows and the same events, so that
the result is equal bit for bit; and a task whose worker dies is run again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..app import load_plan
from ..errors import PenstockError
from ..tables import pyarrow
from .history import History
from .own_events import Reads
from .spine import Asked, Job, Task, history_events, open_history
from .training import Tally, check_split, kept

__all__ = ["run_tasks"]

RETRIES = 3  # of a task whose worker died


def run_tasks(
    app: str,
    log: str | Path,
    history: History,
    job: Job,
    tasks: list[Task],
    budget: int,
    folder: str | None,
    tally: Tally,
) -> dict[int, list[Any]]:
    """Every task on the cluster that this process is connected to, or that RAY_ADDRESS names, or else on a local one.

    The workers load the app by its path or module and read the log folder by the path given here.
    Returns tables by unit. Raises PenstockError where a worker cannot do its task.
    """
    ray = _ray()
    path = str(Path(log).resolve())
    events = history_events(history)
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        spine, reads = ray.put(job.spine), ray.put(job.reads)
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(run_task)

        def start(task: Task) -> Any:
            return remote.remote(app, path, history.last_sequence, spine, job.asked, reads, task, budget)

        waiting = {start(task): task for task in tasks}
        results: dict[int, list[Any]] = {u: [] for u in range(len(job.units))}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            for reference in done:
                task = waiting.pop(reference)
                table = _own(_result(ray, reference, task), folder, task)
                tally.add(events)
                if table is not None:
                    results[task.unit].append(table)
                    continue
                check_split(task, budget)
                tally.add(0, 2 * events)
                for half in task.halves():
                    waiting[start(half)] = half
        return results
    finally:
        if began:
            ray.shutdown()


def run_task(
    app: str, log: str, last_sequence: int, spine: Any, asked: Asked, reads: Reads, task: Task, budget: int
) -> Any:
    """What a worker of the cluster does: one pass over the log. None where the state does not fit into the budget."""
    job = Job(load_plan(app), spine, asked, reads)
    history = open_history(log, last_sequence)
    return job.run(task, history, budget, lambda _: None)


def _result(ray: Any, reference: Any, task: Task) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.as_instanceof_cause()
        if isinstance(cause, PenstockError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        raise PenstockError(
            f"part {task.part} of {task.parts} was not computed, {RETRIES + 1} times: {str(error).splitlines()[0]}"
        ) from error


def _own(table: Any, folder: str | None, task: Task) -> Any:
    """The result in this process: what lies in the store of the cluster goes with the connection to it."""
    if table is None or folder is not None:
        return kept(table, folder, task)
    pa = pyarrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise PenstockError("Ray is missing: pip install 'penstock[ray]'") from None
    return ray
