"""The OpenAPI document: it is valid, names every path, and schemathesis finds the server true to it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")

EXAMPLES = "25" if os.environ.get("CI") == "true" else "4"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("oip_models", HERE / "oip_models.py")
    oip_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oip_models)
    folder = tmp_path_factory.mktemp("openapi")
    oip_models.make_models(folder / "models")
    process = oip_models.ServerProcess(
        *(str(HERE / "fraud_app.py"), "--models", str(folder / "models"), "--models-control", "poll"),
        *("--trace-file", str(folder / "trace.json")),
        cwd=folder,
    )
    yield process
    process.close()


@pytest.fixture(scope="module")
def document(server):
    import json
    from urllib.request import urlopen

    with urlopen(server.url + "/openapi.json") as answer:
        return json.load(answer)


def test_every_reference_and_name_is_right(document):
    text = str(document)
    for name in re.findall(r"#/components/schemas/([^'\"]+)", text):
        assert name in document["components"]["schemas"]
    identifiers = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(identifiers) == len(set(identifiers))
    for path, operations in document["paths"].items():
        for operation in operations.values():
            given = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            assert given == set(re.findall(r"{(\w+)}", path)), path
            if "503" in operation["responses"]:
                assert "Retry-After" in operation["responses"]["503"]["headers"]


def test_every_path_that_the_index_lists_is_described(server, document):
    from urllib.request import urlopen

    with urlopen(server.url + "/") as answer:
        listed = [line.split()[-1] for line in answer.read().decode().splitlines()]
    assert {path for path in listed if path != "/"} <= set(document["paths"])


def _run(server, *arguments):
    if not SCHEMATHESIS.exists():
        pytest.skip("needs schemathesis")
    done = subprocess.run(
        [
            *(SCHEMATHESIS, "--config-file", HERE / "schemathesis.toml", "run", server.url + "/openapi.json"),
            *("--no-color", "--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", "1"),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=server.folder,  # it leaves its cache there
        env=os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    return done.stdout


def test_schemathesis_finds_no_failure(server):
    _run(server, "--exclude-operation-id", "oip.repository.unload")
    assert server.process.poll() is None
    assert not server.said("Traceback", timeout=0.1), "".join(server.lines)


def test_schemathesis_finds_no_failure_while_models_come_and_go(server):
    _run(server, "--include-tag", "oip")
    assert server.process.poll() is None
    assert not server.said("Traceback", timeout=0.1), "".join(server.lines)
