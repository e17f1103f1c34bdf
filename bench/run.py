"""`make bench`: runs every group in a process of its own, prints its table, writes bench/results/latest.json.

Control path. A piece that is missing or fails is an error row and makes the exit code 1; a missed bar does not.
Options: --only windows,trees   --out FILE   --list
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve()
HERE = SCRIPT.parent
sys.path.insert(0, str(HERE))  # run.py may be imported by a test

from rows import check_row, error_row, table, write  # noqa: E402


@dataclass(frozen=True)
class Group:
    """A module with run() -> rows; whether its process is pinned to one core; how long it may take, in seconds."""

    module: str
    pinned: bool
    limit: float
    asked: bool = False  # runs only where --only names it


GROUPS = {
    "trees": Group("micro.trees", True, 240),
    "onnx": Group("micro.onnx", True, 90),
    "infer": Group("micro.infer", True, 90),
    "split": Group("micro.split", True, 60),
    "expressions": Group("micro.expressions", True, 60),
    "windows": Group("micro.windows", True, 180),
    "ids": Group("micro.ids", True, 360, asked=True),
    "engine": Group("micro.engine", True, 120),
    "log": Group("micro.log", True, 200),
    "pit": Group("micro.pit", True, 240),
    "http": Group("load.serving", False, 300),
    "oip": Group("load.oip", False, 180),
    "resp": Group("load.resp", False, 360),
    "overload": Group("load.overload", False, 300),
    "many": Group("load.many", False, 400),
    "scale": Group("micro.scale", False, 600, asked=True),
}
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS")


def command_of(name: str) -> str:
    return f"make bench ARGS='--only {name}'"


def run_here(name: str, path: Path) -> None:
    """Runs one group in this process and writes its rows to `path`."""
    group = GROUPS[name]
    if group.pinned:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        rows = [check_row(r) for r in importlib.import_module(group.module).run()]
        if not rows:
            raise RuntimeError(f"{group.module}.run() gave no rows")
    except Exception as e:
        traceback.print_exc()
        rows = [error_row(name, f"{type(e).__name__}: {e}", command_of(name))]
    path.write_text(json.dumps(rows))


def run_group(name: str) -> list[dict[str, Any]]:
    """Runs one group in a new process; error rows when it crashes or takes too long."""
    group = GROUPS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, str(SCRIPT), "--group", name, "--out", str(path)]
        process = subprocess.Popen(command, env={**os.environ, **dict.fromkeys(ONE_THREAD, "1")})
        try:
            code = process.wait(group.limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return [error_row(name, f"took more than {group.limit:.0f} s", command_of(name))]
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if not path.exists():
            return [error_row(name, f"the process ended with code {code}", command_of(name))]
        return [check_row(r) for r in json.loads(path.read_text())]


def machine() -> str:
    model = next(
        (s.partition(":")[2].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s),
        platform.processor(),
    )
    kernel = f"{platform.system()} {platform.release()}"
    return f"{len(os.sched_getaffinity(0))} cores, {model}, {kernel}, Python {platform.python_version()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="GROUPS", help=f"a comma-separated part of {','.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "latest.json", help="where the rows go")
    parser.add_argument("--list", action="store_true", help="print the groups and end")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(GROUPS))
        return 0
    if options.group:
        run_here(options.group, options.out)
        return 0
    names = [n.strip() for n in options.only.split(",")] if options.only else [n for n in GROUPS if not GROUPS[n].asked]
    if unknown := [n for n in names if n not in GROUPS]:
        parser.error(f"--only: no such group: {', '.join(unknown)} (have {', '.join(GROUPS)})")
    print(machine())
    if os.getloadavg()[0] > 0.7:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): expect slower times and long tails")
    all_rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for i, name in enumerate(names, 1):
        print(f"[{i}/{len(names)}] {name} ({time.perf_counter() - begin:.0f} s so far)", file=sys.stderr, flush=True)
        rows = run_group(name)
        all_rows += rows
        print(f"\n{name}\n{table(rows)}", flush=True)
        write(all_rows, options.out)
    errors = [r["name"] for r in all_rows if r["value"] is None]
    print(f"\n{len(all_rows)} rows in {time.perf_counter() - begin:.0f} s, written to {os.path.relpath(options.out)}")
    if errors:
        print(f"errors: {', '.join(errors)}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
