"""The Open Inference Protocol row: binary requests as tritonclient shapes them, beside a constant-answer floor.

The model is a 100-tree ensemble on 30 float32 inputs; one row a request, raw tensors both ways. The requests' bytes are
what tritonclient sent to a socket here, with other numbers in each; where tritonclient is missing they are written
after what it sent. Same method as load/serving.py: server CPU per request against the floor's, interleaved slices.
Run as a script: python bench/load/oip.py
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.remove(str(Path(__file__).resolve().parent))

import numpy as np
from app import stream, train
from load.generator import CACHE, Server, answer_of, frame, free_port, run_load
from load.serving import CONNECTIONS, SLICES, floor_server, median, sliced
from rows import error_row, row
from timing import note

COMMAND = "make bench ARGS='--only oip'"
REQUESTS = 20_000
WARM_S = 4.0


def inputs(n_features: int) -> np.ndarray:
    """Rows of a model: the 15 fraud features, and noise up to n_features; float32 (REQUESTS, n_features)."""
    x = stream.features(stream.transactions(60_000, seed=19))[-REQUESTS:]
    noise = np.random.default_rng(6).normal(size=(len(x), max(0, n_features - x.shape[1])))
    return np.hstack([x, noise])[:, :n_features].astype(np.float32)


def captured(model: str, output: str, n_features: int) -> tuple[bytes, str]:
    """(what tritonclient sends for one row of zeros, its version or why the shape is written by hand)."""
    try:
        import importlib.metadata

        from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
    except ImportError:
        head = {
            "inputs": [
                {
                    "name": "input",
                    "shape": [1, n_features],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": 4 * n_features},
                }
            ],
            "outputs": [{"name": output, "parameters": {"binary_data": True}}],
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        fields = (
            f"POST /v2/models/{model}/infer HTTP/1.1\r\nUser-Agent: python/gevent-http-client-2.3.4\r\n"
            f"Inference-Header-Content-Length: {len(text)}\r\nHost: 127.0.0.1:8000\r\n"
            f"Content-Length: {len(text) + 4 * n_features}\r\n\r\n"
        )
        return fields.encode() + text + bytes(4 * n_features), "tritonclient is missing: its shape from memory"
    taken = bytearray()

    def take(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(10)
        with connection:
            while b"\r\n\r\n" not in taken or len(taken) < whole_length(bytes(taken)):
                part = connection.recv(65536)
                if not part:
                    return
                taken.extend(part)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=take, args=(listener,))
        thread.start()
        port = listener.getsockname()[1]
        client = InferenceServerClient(f"127.0.0.1:{port}", network_timeout=5, connection_timeout=5)
        tensor = InferInput("input", [1, n_features], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, n_features), np.float32))
        try:
            client.infer(model, [tensor], outputs=[InferRequestedOutput(output, binary_data=True)])
        except Exception as error:  # nobody answers: the connection ends
            note(f"captured ({type(error).__name__} is expected)")
        thread.join()
        client.close()
    if len(taken) < 4 * n_features:
        raise RuntimeError(f"tritonclient sent only {bytes(taken)!r}")
    return bytes(taken), f"tritonclient {importlib.metadata.version('tritonclient')}"


def whole_length(data: bytes) -> int:
    """Bytes of a request whose head is complete."""
    head, _, _ = data.partition(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
    return len(head) + 4 + int(fields[b"content-length"])


def requests(model: str, output: str, n_features: int) -> Path:
    """20,000 whole requests, framed; each is the captured one with another row in it."""
    template, what = captured(model, output, n_features)
    note(f"requests of {len(template)} bytes as {what} sends them")
    before = template[: -4 * n_features]
    path = CACHE / f"oip-{model}.requests"
    path.write_bytes(frame([before + values.tobytes() for values in inputs(n_features)]))
    return path


def models_server(port: int, folder: Path, *arguments: str, ready: str) -> Server:
    """Our server with a model folder and no app; ready when this model is."""
    return Server(
        [
            *(sys.executable, "-m", "penstock", "serve", "--models", str(folder)),
            *("--models-control", "none", "--port", str(port), *arguments),
        ],
        port,
        probe=("GET", f"/v2/models/{ready}/ready", None),
        ready_within=300,
        name="penstock-models",
    )


def check(port: int, model: str, output: str, path: Path) -> None:
    """What was timed must be right: the answer to a request equals ONNX Runtime's, and is binary."""
    import onnxruntime

    x = inputs(30 if model == "wide" else 15)[:1]
    session = onnxruntime.InferenceSession(str(train.folder() / "served" / model / "1" / "model.onnx"))
    (want,) = session.run([output], {"input": x})
    data = path.read_bytes()
    request = data[4 : 4 + int.from_bytes(data[:4], "little")]
    with socket.create_connection(("127.0.0.1", port), timeout=5) as s:
        s.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer or len(answer) < whole_length(answer):
            part = s.recv(65536)
            if not part:
                raise RuntimeError(f"no whole answer: {answer[:300]!r}")
            answer += part
    got = np.frombuffer(answer[-want.nbytes :], want.dtype).reshape(want.shape)
    if not answer.startswith(b"HTTP/1.1 200") or not np.allclose(got, want, rtol=1e-5, atol=1e-6):
        raise RuntimeError(f"expected {want}, got {got} in {answer[:400]!r}")


def binary_rows(model: str, output: str, n_features: int) -> list[dict[str, Any]]:
    path = requests(model, output, n_features)
    port, floor_port = free_port(), free_port()

    def load(to: int, **options: Any) -> dict[str, Any]:
        return run_load(to, request_raw=path, framed=True, connections=CONNECTIONS, **options)

    with models_server(port, train.folder() / "served", ready=model) as server:
        check(port, model, output, path)
        length = round(load(port, duration=WARM_S)["response_bytes_mean"])
        with floor_server(floor_port, length) as floor:
            load(floor_port, duration=1.0)
            note(f"{SLICES} interleaved slices against a floor of {length} bytes")
            mine, bare = [], []
            for _ in range(SLICES):
                mine.append(sliced(server, lambda **o: load(port, **o)))
                bare.append(sliced(floor, lambda **o: load(floor_port, **o)))
        status, stats = answer_of(port, "GET", f"/v2/models/{model}/stats", None)
        if status == 200:
            counted = json.loads(stats)["model_stats"][0]["inference_stats"]
            compute = counted["compute_infer"]
            note(f"model itself: {compute['ns'] / max(1, compute['count']) / 1000:.2f} us a request")
    cpu, floor_cpu = median([c for c, _ in mine]), median([c for c, _ in bare])
    rate, floor_rate = median([r for _, r in mine]), median([r for _, r in bare])
    return [
        row("oip.binary_ratio_to_floor", floor_cpu / cpu, "floor/ours", COMMAND),
        row("oip.binary_cpu_us", cpu, "us/request", COMMAND, floor_cpu, cpu / floor_cpu),
        row("oip.binary_requests_per_s", rate, "requests/s", COMMAND, floor_rate, rate / floor_rate),
    ]


def run() -> list[dict[str, Any]]:
    train.folder()
    try:
        return binary_rows("wide", "probabilities", 30)
    except Exception as e:
        return [error_row("oip.binary_ratio_to_floor", f"{type(e).__name__}: {e}", COMMAND)]


if __name__ == "__main__":
    from rows import table

    print(table(run()))
