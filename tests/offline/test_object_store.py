"""Compacted history in an object store: the same code as for a folder, against a server that speaks S3."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from offline.compacting import records_of, recovered, shop_log
from offline.test_erasure import SECRET, shop_with_secret
from offline.test_retention import APP, OPTIONS, days

from penstock import Engine
from penstock.errors import LogError
from penstock.offline.batches import BatchStore
from penstock.offline.compaction import compact
from penstock.offline.erasure import erase
from penstock.offline.history import History
from penstock.offline.keeper import take_snapshot
from penstock.offline.log_folder import LogFolder
from penstock.offline.retention import retain

fs = pytest.importorskip("pyarrow.fs", reason="compaction needs pyarrow")
moto_server = pytest.importorskip("moto.server", reason="the S3-compatible server of moto is not installed")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty bucket, for which the AWS_* variables are set."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3 = fs.S3FileSystem(endpoint_override=endpoint, region="us-east-1", allow_bucket_creation=True)
    s3.create_dir("history")
    s3.delete_dir_contents("history")
    return "s3://history/logs/shop"


def test_compaction_recovery_retention_and_erasure(tmp_path: Path, store: str) -> None:
    folder = shop_with_secret(tmp_path / "log")
    records, state = records_of(folder), recovered(folder)
    report = compact(folder, store, batch_bytes=1)
    assert (report.batches, report.to) == (2, store)
    assert not (folder / "parquet").exists()
    take_snapshot(folder)
    assert compact(folder).removed == 2
    assert records_of(folder) == records
    (folder / "snapshots").rename(tmp_path / "aside")
    assert recovered(folder) == state
    (tmp_path / "aside").rename(folder / "snapshots")
    erased = erase(folder, "customer", SECRET)
    assert (erased.batches, erased.events) == (2, 30)
    remote = BatchStore.of(LogFolder(folder))
    files = [path for part in ("events", "scores", "batches") for path in remote.listed(part)]
    assert len(files) == 2 * 4
    assert all(".1.parquet" in p for p in files if p.endswith(".parquet"))
    assert not any(SECRET.encode() in remote.read(path) for path in files)
    assert len(records_of(folder)) == len(records)
    kept = retain(folder, 0, now=1 << 60)
    assert kept.batches == 0
    assert "event ids are remembered" in str(kept)
    for batch in remote.batches()[:1]:
        LogFolder(folder).begin_at(batch.last_sequence + 1)
        remote.remove_batch(batch)
    assert [p for p in remote.listed("events") if batch.name in p] == []
    history = History(LogFolder(folder))
    history.check()
    assert history.first_sequence == batch.last_sequence + 1


def test_an_address_may_say_everything_itself(
    tmp_path: Path, store: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    address = f"{store}?region=us-east-1&scheme=http&endpoint_override={endpoint.removeprefix('http://')}"
    folder = shop_log(tmp_path / "log", n=20)
    records = records_of(folder)
    take_snapshot(folder)
    report = compact(folder, address)
    assert report.removed == 2
    assert "endpoint" not in str(report)
    assert records_of(folder) == records


def test_a_bucket_that_is_not_there_is_named_and_the_log_stays(tmp_path: Path, store: str) -> None:
    folder = shop_log(tmp_path / "log", n=20)
    records = records_of(folder)
    take_snapshot(folder)
    with pytest.raises(LogError, match="s3://no-such-bucket"):
        compact(folder, "s3://no-such-bucket/logs")
    assert records_of(folder) == records
    assert compact(folder, store).removed == 2  # another place may be named while nothing is there
    assert records_of(folder) == records


def test_an_engine_starts_without_the_object_store(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = days(tmp_path / "log", 3)  # without event ids, which may have to be read again
    records = records_of(folder)
    assert compact(folder, store).removed == 2
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with Engine(APP, log=folder, log_options=OPTIONS) as engine:
            assert engine.core.next_sequence == 15
    # A folder that was restored without its copies of the manifests asks the store.
    shutil.rmtree(folder / "batches")
    assert records_of(folder) == records


def test_a_kill_between_the_store_and_the_folder_is_cleaned_up(tmp_path: Path, store: str) -> None:
    folder = shop_log(tmp_path / "log", n=20)
    records = records_of(folder)
    compact(folder, store, batch_bytes=1)
    remote = BatchStore.of(LogFolder(folder))
    (folder / "batches" / f"{remote.batches()[-1].name}.json").unlink()
    (folder / "writing.json").write_bytes(b"{}")
    assert records_of(folder) == records
    assert compact(folder, batch_bytes=1).batches == 1
    assert len(remote.listed("batches")) == len(remote.batches()) == 2
    assert records_of(folder) == records
