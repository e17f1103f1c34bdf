"""The floor of the HTTP rows: a Python asyncio.Protocol on uvloop that writes one constant answer and parses nothing.

One answer per read: right for clients that do not pipeline and whose requests fit one segment. Run as a script:
floor_server.py --port P --length N, where N is the length of the whole answer in bytes (header included).
"""

from __future__ import annotations

import argparse
import asyncio
import gc

import uvloop


def constant_answer(length: int) -> bytes:
    """An HTTP/1.1 200 answer of exactly `length` bytes, header included; ValueError when that is too short."""
    # Where the number of digits changes, a second space before it makes up for the length that no body gives.
    for space in (b" ", b"  "):
        for body in range(max(0, length - 120), length):
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:%s%d\r\n\r\n" % (space, body)
            if len(head) + body == length:
                return head + b" " * body
    raise ValueError(f"--length: no HTTP answer is {length} bytes long; the shortest is about 70")


class Floor(asyncio.Protocol):
    """Writes `answer` for every read."""

    answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(self.answer)


async def serve(host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Floor, host, port, backlog=1024)
    gc.collect()
    gc.freeze()
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--length", type=int, default=300, help="bytes of the whole answer, header included")
    args = parser.parse_args()
    Floor.answer = constant_answer(args.length)
    uvloop.run(serve(args.host, args.port))
