"""One executor with torch for many tests: importing torch takes longer than most of them."""

import os
import queue
import threading
from collections.abc import Iterator

import pytest
import trio

from meshd.node.compute.executor import (
    CloseRequest,
    CloseResult,
    InferRequest,
    TrainRequest,
    TrainResult,
)
from meshd.node.compute.forkserver import ForkserverExecutor, open_forkserver

SECRET = "MESHD_TEST_SECRET"


class SharedForkserver:
    """A forkserver in a thread with a trio of its own, so that it outlives a test's."""

    def __init__(self) -> None:
        started: queue.Queue[tuple[ForkserverExecutor, trio.Event, trio.lowlevel.TrioToken]]
        started = queue.Queue()

        async def main() -> None:
            async with open_forkserver() as executor:
                stop = trio.Event()
                started.put((executor, stop, trio.lowlevel.current_trio_token()))
                await stop.wait()

        self._thread = threading.Thread(target=trio.run, args=(main,))
        self._thread.start()
        self.executor, self._stop, self._token = started.get(timeout=60)

    async def infer(self, job: InferRequest) -> bytes:
        return await trio.to_thread.run_sync(self._infer, job)

    def _infer(self, job: InferRequest) -> bytes:
        return trio.from_thread.run(self.executor.infer, job, trio_token=self._token)

    async def train(self, job: TrainRequest) -> TrainResult:
        return await trio.to_thread.run_sync(self._train, job)

    def _train(self, job: TrainRequest) -> TrainResult:
        return trio.from_thread.run(self.executor.train, job, trio_token=self._token)

    async def close_round(self, job: CloseRequest) -> CloseResult:
        return await trio.to_thread.run_sync(self._close_round, job)

    def _close_round(self, job: CloseRequest) -> CloseResult:
        return trio.from_thread.run(self.executor.close_round, job, trio_token=self._token)

    async def measure(self) -> int:
        return await trio.to_thread.run_sync(self._measure)

    def _measure(self) -> int:
        return trio.from_thread.run(self.executor.measure, trio_token=self._token)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def end(self) -> None:
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join()


@pytest.fixture(scope="session")
def shared_forkserver() -> Iterator[SharedForkserver]:
    """An executor with torch that all tests of this run share; SECRET is in its environment."""
    os.environ[SECRET] = "hunter2"
    shared = SharedForkserver()
    yield shared
    shared.end()
    del os.environ[SECRET]
