"""Workers whose disk is full: they hand back what they have, rest, and come back to the job."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Collection
from typing import TypeVar

import trio
from sim.cast import CountingExecutor, check_whole_output, finish, gather, log_of, wait_until
from sim.swarm import SimNode, Swarm, simulated

from meshd.node.availability import REST_S
from meshd.node.store import Store, StoreError
from meshd.p2p.blobs import BlobStore
from meshd.p2p.identity import Address
from meshd.p2p.messages import LeaseEndReason

T = TypeVar("T")


class Disk:
    """Whether there is room."""

    full = False


class FullStore(Store):
    """Refuses to write while the disk is full."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk = disk

    async def write(self, step: Callable[[sqlite3.Connection], T]) -> T:
        if self._disk.full:
            await trio.lowlevel.checkpoint()
            raise StoreError("the database cannot be written (database or disk is full)")
        return await super().write(step)


class FullBlobs(BlobStore):
    """Refuses blobs while the disk is full."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk = disk

    def put(self, data: bytes, *, readers: Collection[Address] | None = None) -> bytes:
        if self._disk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().put(data, readers=readers)


async def add_worker(swarm: Swarm, name: str) -> tuple[SimNode, Disk, CountingExecutor]:
    """Add a worker whose disk can fill up."""
    disk, executor = Disk(), CountingExecutor()
    node = await swarm.add(name, "worker", executor=executor)
    swarm.kill(node)
    node.store, node.blobs = FullStore(disk), FullBlobs(disk)
    await swarm.start(node)
    return node, disk, executor


@simulated
async def test_a_worker_whose_disk_fills_up_hands_its_shard_back_and_the_rounds_go_on(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm)
    node, disk, executor = await add_worker(swarm, "zoe")
    job = await swarm.submit_training(rita, rounds=20)
    await wait_until(lambda: any(r == 2 for r, _ in executor.running))
    disk.full = True
    fills = swarm.seconds
    assert node.node is not None
    availability = node.node.ports.availability
    await wait_until(lambda: availability.resting)
    given = len(executor.begun)
    await trio.sleep(REST_S / 2)
    assert len(executor.begun) == given
    assert "No space left" in availability.trouble or "disk is full" in availability.trouble
    disk.full = False
    await wait_until(lambda: len(executor.begun) > given)
    assert swarm.seconds - fills > REST_S
    job = await finish(swarm, job)
    state = log_of(swarm, job)
    assert len(state.rounds.closes) == 20
    assert all(len(close.message.commitments) == 4 for close in state.rounds.closes)
    assert state.workers[node.address].works
    ended = [lease.ended for lease in state.workers[node.address].leases if lease.ended]
    assert set(ended) == {LeaseEndReason.FAILED}


@simulated
async def test_a_worker_whose_disk_is_full_before_a_job_comes_to_it_when_there_is_room(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, workers=1, speed=200)
    node, disk, executor = await add_worker(swarm, "zoe")
    disk.full = True
    job = await swarm.submit(rita)
    await trio.sleep(20)
    assert node.up
    assert not executor.inputs
    disk.full = False
    job = await finish(swarm, job)
    check_whole_output(swarm, job)
    assert executor.inputs
