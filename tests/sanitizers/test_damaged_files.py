"""Some of `make asan`'s damaged files without sanitizers: every reader takes them or refuses them in words."""

import pytest
from sanitizers.damaged_files import KINDS, run

pytest.importorskip("pyarrow", reason="compaction needs pyarrow")

SEED = 20261130
SOME = {"log": 30, "batch": 20, "model": 150, "snapshot": 60, "state": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_taken_or_refused(kind, tmp_path):
    failed = run(kind, SEED, range(SOME[kind]), tmp_path)
    assert not failed, f"tests/sanitizers/damaged_files.py {failed[0]}"
