"""`make asan`: the extensions with address and undefined-behaviour sanitizers, the tests over them, and damaged files
(control path).

They are built into build/asan, beside the normal build. What must stay true: every test file below runs whole or is
left out here with its reason, and any report of a sanitizer, in a child process too, fails the run.

    run.py [--jobs N] [--seed S] [--times N] [--only-damaged] [--build-only] [pytest arguments, in place of the list]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "asan"
REPORTS = BUILD / "reports"
TESTS = ["tests/ext", "tests/engine", "tests/features", "tests/models", "tests/offline", "tests/test_engine.py"]
# What is left out, and why.
SLOW = "measures time or memory, which mean nothing here"
LEFT_OUT = {
    "tests/engine/test_out_of_memory.py": "limits the process's memory, of which the sanitizer maps terabytes",
    "tests/models/test_deployment.py": "child processes and the event loop; the runtimes are tested beside it",
    "tests/models/test_folder.py": "Python alone",
    "tests/models/test_loader.py": "child processes; what they parse is in the tests of each format",
    "tests/models/test_pipelines.py": "child processes and the event loop; the runtimes are tested beside it",
    "tests/models/test_repository.py": "child processes; what they parse is in the tests of each format",
    "tests/models/test_trial.py": "limits the memory of processes, of which the sanitizer maps terabytes",
    "tests/offline/test_beside_compaction.py": "child processes and how they end, which hangs under the sanitizer",
    "tests/offline/test_object_store.py": "a server and the network; the files are those of the compaction's tests",
    "tests/offline/test_ray.py": "a cluster",
}
DAMAGED = ["log", "batch", "model", "snapshot", "state"]
DESELECTED = {
    "tests/ext/test_event_ids.py::test_a_window_that_slides_holds_what_it_needs_for_ever": SLOW,
    "tests/ext/test_event_ids.py::test_at_most_32_bytes_an_id_growing_and_shrinking_and_memory_goes_back": SLOW,
    "tests/ext/test_event_ids.py::test_memory_of_decisions_comes_as_they_do": SLOW,
    "tests/ext/test_event_ids.py::test_no_call_takes_long": SLOW,
    "tests/ext/test_infer.py::test_no_byte_is_read_past_the_end": "builds a program with sanitizers of its own",
    "tests/ext/test_infer.py::test_memory_does_not_grow_and_no_garbage_is_tracked": SLOW,
    "tests/ext/test_onnx.py::test_no_threads_are_started_and_no_memory_is_lost": SLOW,
    "tests/ext/test_onnx.py::test_the_c_api_is_reached_without_importing_the_package": "a process without the library",
    "tests/offline/test_log_folder.py::test_clock_steps": "preloads a library before the sanitizer's",
    "tests/ext/test_windows.py::test_no_call_pauses_for_a_millisecond": SLOW,
    "tests/offline/test_damage.py::test_every_byte_flipped": "two minutes; the damaged files flip bytes too",
    "tests/test_engine.py::test_scoring_does_not_leak": SLOW,
    "tests/test_engine.py::test_tables_do_not_leak": SLOW,
}


def build() -> None:
    """Only what changed since the last time is compiled; the Python files are copied anew."""
    for old in (BUILD / "lib").rglob("*.py"):
        old.unlink()
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(BUILD / "lib")]
    command += ["--build-temp", str(BUILD / "temp")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PENSTOCK_SANITIZE": "1"}, check=True)


def environment() -> dict[str, str]:
    """CPython leaks at its end by design; its pools would hide what lies behind an object, so it gets plain malloc. The
    C++ library comes first too: the sanitizer wraps its exceptions, which other packages throw."""
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    options = {
        "detect_leaks": "0",
        "abort_on_error": "0",
        "exitcode": "99",
        "log_path": str(REPORTS / "asan"),
        "allocator_may_return_null": "1",
    }
    joined = ":".join(f"{name}={value}" for name, value in options.items())
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(BUILD / "lib"), str(ROOT / "tests")]),
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": joined,
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={REPORTS / 'ubsan'}",
        "PENSTOCK_SANITIZED": "1",
    }


def files() -> list[str]:
    """The test files, the longest first as far as size tells."""
    found: list[Path] = []
    for name in TESTS:
        path = ROOT / name
        found += [path] if path.is_file() else path.glob("test_*.py")
    names = {str(p.relative_to(ROOT)): p.stat().st_size for p in found}
    for name, reason in LEFT_OUT.items():
        assert name in names, f"{name} is left out, and is not there"
        print(f"left out: {name}: {reason}")
        del names[name]
    for name, reason in DESELECTED.items():
        print(f"left out: {name}: {reason}")
    return sorted(names, key=lambda name: -names[name])


def run(what: str, command: list[str], env: dict[str, str]) -> bool:
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    last = (text.strip().splitlines() or ["no output"])[-1]
    good = process.returncode in (0, 5)  # 5: no test was selected
    took = f"{time.monotonic() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU"
    print(f"{'ok    ' if good else 'FAILED'} {what} ({took}): {last}", flush=True)
    if not good:
        print(f"exit code {process.returncode}\n{text[-12000:]}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--seed", type=int, default=1, help="of the damaged files; 0: another one each time")
    parser.add_argument("--times", type=int, default=1, help="so many times as many damaged files")
    parser.add_argument("--only-damaged", action="store_true", help="the damaged files alone")
    parser.add_argument("--build-only", action="store_true")
    given, pytest_arguments = parser.parse_known_args()
    began = time.monotonic()
    build()
    print(f"built in {time.monotonic() - began:.0f} s", flush=True)
    if given.build_only:
        return 0
    REPORTS.mkdir(parents=True, exist_ok=True)
    for old in REPORTS.iterdir():
        old.unlink()
    env = environment()
    # What a sanitizer writes past Python goes to our own output, also where it ends the process.
    pytest = [sys.executable, "-m", "pytest", "--timeout", "600", "--capture=sys"]
    jobs: list[tuple[str, list[str]]] = []
    if pytest_arguments:
        jobs.append((" ".join(pytest_arguments), [*pytest, *pytest_arguments]))
    else:
        damaged = [sys.executable, str(Path(__file__).with_name("damaged_files.py"))]
        damaged += ["--seed", str(given.seed), "--times", str(given.times), "--only"]
        jobs += [(f"damaged files: {kind}", [*damaged, kind]) for kind in DAMAGED]
        if not given.only_damaged:
            leave = [argument for name in DESELECTED for argument in ("--deselect", name)]
            jobs += [(name, [*pytest, name, *leave]) for name in files()]
    with ThreadPoolExecutor(given.jobs) as pool:
        good = list(pool.map(lambda job: run(*job, env), jobs))
    reports = sorted(REPORTS.iterdir())
    for report in reports:
        print(f"---- {report.name}\n{report.read_text(errors='replace')[:6000]}")
    failed = len(good) - sum(good)
    print(f"sanitizers: {len(good)} runs, {failed} failed, {len(reports)} reports, {time.monotonic() - began:.0f} s")
    return 1 if failed or reports else 0


if __name__ == "__main__":
    raise SystemExit(main())
