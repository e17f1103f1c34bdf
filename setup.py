"""Build of the extensions: every ext/*.pyx becomes penstock._ext.* (engine/penstock/_ext is a link to ext/).

Baseline is x86-64-v2; AVX2 variants are functions with a target attribute, chosen at run time. No flag may change
what a floating-point expression means: no contraction, no fast-math, no -march=native.
PENSTOCK_EXT=windows,trees builds only those modules (for development).
PENSTOCK_SANITIZE=1 builds with the address and undefined-behaviour sanitizers and the kernels' own checks (make asan).
"""

import os
import platform
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
SOURCES = "engine/penstock/_ext"

# C files that belong to each module beside its own .pyx.
C_FILES: dict[str, list[str]] = {
    "windows": ["window_state.c"],
    "trees": ["tree_kernel.c", "tree_form.c"],
    "split": ["hashes.c", "assignment.c"],
    "expressions": ["expression.c"],
    "onnx": ["onnx_session.c"],
    "events": [],
    "decision": [],
    "steps": [],
    "core": [],
    "batch": [],
    "flow": ["pool.c"],
    "wire": [],
    "infer": [],
    "http": [],
    "resp": [],
    "loop_lag": [],
    "signals": [],
    "metrics_text": [],
    "log": ["event_log.c"],
    "history": [],
    "log_columns": [],
    "own_events": [],
    "spine": [],
    "asof": ["asof_join.c"],
    "snapshot": ["page_delta.c"],
    "event_ids": ["id_table.c"],
}

flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-unused-function"]
if platform.machine() in ("x86_64", "AMD64"):
    flags += ["-msse4.2", "-mpopcnt", "-mcx16"]
sanitizers: list[str] = []
if os.environ.get("PENSTOCK_SANITIZE"):
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += [*sanitizers, "-O1", "-g", "-fno-omit-frame-pointer", "-DPENSTOCK_DEBUG"]

only = {name for name in os.environ.get("PENSTOCK_EXT", "").split(",") if name}
unknown = only - C_FILES.keys()
if unknown:
    raise SystemExit(f"PENSTOCK_EXT: no such extension: {', '.join(sorted(unknown))} (have {', '.join(C_FILES)})")

extensions = [
    Extension(
        f"penstock._ext.{name}",
        [f"{SOURCES}/{name}.pyx", *(f"{SOURCES}/{c}" for c in c_files)],
        include_dirs=[SOURCES],
        depends=[str(p.relative_to(HERE)) for p in sorted((HERE / "ext").glob("*.h"))],
        extra_compile_args=flags,
        extra_link_args=sanitizers,
    )
    for name, c_files in C_FILES.items()
    if (not only or name in only) and (HERE / "ext" / f"{name}.pyx").exists()
]

setup(
    ext_modules=cythonize(
        extensions,
        nthreads=int(os.environ.get("PENSTOCK_JOBS", "2")),
        include_path=["engine"],
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "freethreading_compatible": False,
        },
    ),
    options={"build_ext": {"parallel": 2}},
)
