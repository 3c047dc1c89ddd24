"""The Python client of a daemon's control API: what researchers import, and what `meshd` uses.

from meshd.node.client import connect

job = connect().infer(module, {"tokens": tokens}, price="0.002", cap="50")
print(job.fetch()["embedding"])

With trio: `connect_trio()`, and the same methods as coroutines.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from meshd.config.paths import data_directory
from meshd.node.calls import AsyncClient
from meshd.node.transports import (
    BlockingTransport,
    TrioTransport,
    iterate_blocking,
    run_blocking,
)

if TYPE_CHECKING:
    from meshd.node.session import AsyncJob, Job

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT_S = 630.0
"""Seconds of silence after which a daemon counts as gone."""


def connect(data_dir: Path | str | None = None, *, timeout_s: float = TIMEOUT_S) -> Client:
    """Return the client of the daemon on *data_dir* (default: MESHD_DATA_DIR or the user's own).

    Nothing is sent yet. Every method raises ControlError: with code "unavailable" if no daemon
    runs there, else with what the daemon says.
    """
    return Client(AsyncClient(_directory(data_dir), timeout_s, BlockingTransport()))


def connect_trio(
    data_dir: Path | str | None = None, *, timeout_s: float = TIMEOUT_S
) -> AsyncClient:
    """Return the same with coroutines for methods, to be awaited in trio's event loop."""
    return AsyncClient(_directory(data_dir), timeout_s, TrioTransport())


def _directory(data_dir: Path | str | None) -> Path:
    return data_directory(None if data_dir is None else str(data_dir), os.environ)


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """Return *method* as one that waits for its answer."""

    @wraps(method)
    def wait(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run_blocking(method(client.core, *args, **kwargs))

    return wait


def _blocking_events(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Client, P], Generator[T, None, None]]:
    @wraps(method)
    def wait(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return iterate_blocking(method(client.core, *args, **kwargs))

    return wait


def _blocking_job(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, AsyncJob]],
) -> Callable[Concatenate[Client, P], Job]:
    @wraps(method)
    def wait(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Job:
        from meshd.node.session import Job

        return Job(run_blocking(method(client.core, *args, **kwargs)))

    return wait


class Client:
    """AsyncClient for those without an event loop: every method waits for its answer."""

    def __init__(self, core: AsyncClient) -> None:
        self.core = core

    status = _blocking(AsyncClient.status)
    peers = _blocking(AsyncClient.peers)
    wallet = _blocking(AsyncClient.wallet)
    stake = _blocking(AsyncClient.stake)
    earnings = _blocking(AsyncClient.earnings)
    pause = _blocking(AsyncClient.pause)
    resume = _blocking(AsyncClient.resume)
    submit = _blocking(AsyncClient.submit)
    submit_text = _blocking(AsyncClient.submit_text)
    jobs = _blocking(AsyncClient.jobs)
    job = _blocking(AsyncClient.job)
    why = _blocking(AsyncClient.why)
    log = _blocking(AsyncClient.log)
    retry = _blocking(AsyncClient.retry)
    watch = _blocking_events(AsyncClient.watch)
    replay = _blocking_events(AsyncClient.replay)
    cancel = _blocking(AsyncClient.cancel)
    result = _blocking(AsyncClient.result)
    parts = _blocking(AsyncClient.parts)
    part = _blocking(AsyncClient.part)
    receipts = _blocking(AsyncClient.receipts)
    infer = _blocking_job(AsyncClient.infer)
    train = _blocking_job(AsyncClient.train)
    open_job = _blocking_job(AsyncClient.open_job)
