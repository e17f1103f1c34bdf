"""Clients of a Penstock server (control path): HTTP and RESP by URL, threads and asyncio, typed results, deadlines.

What must stay true: importing this loads neither the engine nor numpy; a client needs no compiled part of Penstock.
"""

from .asynchronous import AsyncBatch, AsyncClient
from .errors import (
    AccessDenied,
    ClientError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidEvent,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
)
from .results import Decision, FeatureRows, Ingested, ModelMetadata, Tensor
from .synchronous import Batch, Client

__all__ = [
    "AccessDenied",
    "AsyncBatch",
    "AsyncClient",
    "Batch",
    "Client",
    "ClientError",
    "ConnectionLost",
    "DeadlineExceeded",
    "Decision",
    "FeatureRows",
    "Ingested",
    "InvalidEvent",
    "InvalidRequest",
    "ModelMetadata",
    "NotFound",
    "Overloaded",
    "ServerError",
    "Tensor",
]
