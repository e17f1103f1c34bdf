"""A log folder of the shop app, for the tests of what stands on the log."""

from pathlib import Path

import pytest
from offline.shop_log import OPTIONS, SHOP, fill

from penstock import Engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log folder with 400 scored orders and some logins."""
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        fill(engine, 400)
    return tmp_path / "log"
