"""Executor processes: what they may not do, how they end, and that nothing outlives the daemon."""

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Protocol

import psutil
import pytest
import trio

from meshd.node.compute.channel import Channel, ChannelClosed
from meshd.node.compute.executor import (
    ExecutorDied,
    ExecutorUnavailable,
    InferRequest,
    LimitExceeded,
    Limits,
    ShardFailed,
)
from meshd.node.compute.forkserver import ForkserverExecutor, open_forkserver
from meshd.node.compute.framing import (
    FRAME,
    FramingError,
    Kind,
    frame,
    pack_control,
    parse_control,
    parse_frame,
)
from meshd.node.compute.measuring import benchmark_program, benchmark_rows
from meshd.node.compute.processes import ForkserverOptions, ServerProcess
from meshd.node.workloads.program import Graph, Node, Output, Ref, encode_program
from meshd.node.workloads.rows import RowSchema, f32_bytes, pack, unpack
from meshd.node.workloads.tensors import Column

X = RowSchema((Column("x", "f32", (4,)),))


def endless() -> bytes:
    """A program that would compute for minutes."""
    nodes = (
        Node("reshape", (Ref(0), (512, 512))),
        *(Node("matmul", (Ref(1), Ref(1))) for _ in range(19_000)),
        Node("mul", (Ref(0), 1.0)),
    )
    columns = (Column("x", "f32", (512, 512)),)
    graph = Graph(columns, (Output("y", "f32", (None, 512, 512), len(nodes)),), nodes, ())
    return encode_program(graph, [])


ENDLESS = endless()
ZEROS = pack(RowSchema((Column("x", "f32", (512, 512)),)), [bytes(4 * 512 * 512)])


def quick(slot: int = 0, limits: Limits | None = None) -> InferRequest:
    return InferRequest(b"quick", slot, QUICK, benchmark_rows(8, 2), limits or Limits())


def slow(limits: Limits | None = None) -> InferRequest:
    return InferRequest(b"slow", 0, ENDLESS, ZEROS, limits or Limits())


QUICK = benchmark_program(8, 8)
TORCH_SETS = ("KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "LC_CTYPE")


class Shared(Protocol):
    """The executor that tests share; see conftest."""

    executor: ForkserverExecutor

    async def infer(self, job: InferRequest) -> bytes: ...


@pytest.fixture
def shared(shared_forkserver: Shared) -> Shared:
    return shared_forkserver


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(120):
        while not condition():
            await trio.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def computing(executor: ForkserverExecutor) -> list[int]:
    """The children that have been computing for a while."""
    pids = [pid for pid in executor.child_pids() if lives(pid)]
    return [pid for pid in pids if sum(psutil.Process(pid).cpu_times()[:2]) > 0.1]


async def wait_computing(executor: ForkserverExecutor) -> int:
    """Wait for a child that has not been computing for long before, and return its pid."""
    before = set(computing(executor))
    await until(lambda: bool(set(computing(executor)) - before))
    return (set(computing(executor)) - before).pop()


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def limits_of(pid: int) -> dict[str, list[str]]:
    """Soft and hard limits by name."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return {line[:26].strip(): line[26:].split()[:2] for line in lines}


async def started(shared: Shared, job: InferRequest) -> list[int]:
    """Compute a shard; return the processes that were started for it."""
    before = set(shared.executor.child_pids())
    await shared.infer(job)
    return sorted(set(shared.executor.child_pids()) - before)


async def test_a_process_serves_the_shards_of_one_job_and_slot(shared: Shared) -> None:
    assert len(await started(shared, quick(slot=10))) == 1
    assert len(await started(shared, quick(slot=10))) == 0
    assert len(await started(shared, quick(slot=11))) == 1


async def test_other_limits_mean_another_process(shared: Shared) -> None:
    (first,) = await started(shared, quick(slot=12))
    (second,) = await started(shared, quick(slot=12, limits=Limits(memory_bytes=1 << 29)))
    await until(lambda: not lives(first))
    assert lives(second)


async def test_processes_have_no_privileges_no_files_and_no_secrets(shared: Shared) -> None:
    (child,) = await started(shared, quick(slot=13))
    server = shared.executor.server_pid
    assert server is not None
    for pid in (server, child):
        status = status_of(pid)
        if os.geteuid() == 0:
            assert "0" not in status["Uid"].split() + status["Gid"].split()
            assert status["Groups"].split() == []
            assert int(status["CapEff"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert psutil.Process(pid).nice() >= 10
        assert set(psutil.Process(pid).environ()) <= {
            "ATEN_CPU_CAPABILITY",
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "LANG",
            *TORCH_SETS,
        }
        files = [
            os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")
        ]
        assert files.count("/dev/null") == 3
        others = [file for file in files if file != "/dev/null"]
        assert all(file.startswith(("socket:", "anon_inode:")) for file in others)
    limits = limits_of(child)
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert int(limits["Max data size"][1]) < 4 << 30
    assert int(limits["Max address space"][1]) < 6 << 30


async def test_a_killed_process_costs_its_shard_only(shared: Shared) -> None:
    async def kill() -> None:
        os.kill(await wait_computing(shared.executor), signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        with pytest.raises(ExecutorDied, match="signal 9"):
            await shared.infer(slow())
    assert unpack(await shared.infer(quick())).count == 2


async def test_processor_time_is_limited(shared: Shared) -> None:
    with pytest.raises(LimitExceeded) as caught:
        await shared.infer(slow(Limits(cpu_s=0)))
    assert (caught.value.which, caught.value.value) == ("cpu_s", 0)


async def test_time_is_limited_while_a_shard_computes(shared: Shared) -> None:
    with pytest.raises(LimitExceeded) as caught:
        await shared.infer(slow(Limits(wall_s=0.5)))
    assert caught.value.which == "wall_s"


async def test_a_cancelled_shard_stops_computing_and_a_killed_server_is_started_anew() -> None:
    async with open_forkserver() as executor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.infer, slow())
            pid = await wait_computing(executor)
            nursery.cancel_scope.cancel()
        await until(lambda: not lives(pid))
        assert unpack(await executor.infer(quick())).count == 2

        async def kill() -> None:
            await wait_computing(executor)
            assert executor.server_pid is not None
            os.kill(executor.server_pid, signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            with pytest.raises(ExecutorDied, match="with its server"):
                await executor.infer(slow())
        assert unpack(await executor.infer(quick())).count == 2


async def test_a_child_refuses_memory_beyond_its_limit_and_frames_without_a_place() -> None:
    nodes = (
        Node("expand", (Ref(0), (1 << 26, -1, -1))),
        Node("clone", (Ref(1),)),
        Node("repeat", (Ref(2), (4, 1, 1))),
        Node("amax", (Ref(3), (0,), False)),
    )
    graph = Graph(X.columns, (Output("y", "f32", (None, 4), 4),), nodes, ())
    rows = pack(X, [f32_bytes([1, 2, 3, 4])])
    server = ServerProcess(ForkserverOptions())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        await server.wait_ready()
        child = server.prepare(1, Limits(memory_bytes=64 << 20))
        await server.spawn(child)
        await child.channel.request(Kind.PROGRAM, (encode_program(graph, []),), 0)
        with pytest.raises(LimitExceeded) as caught:
            await child.channel.request(Kind.ROWS, (struct.pack("<I", 60), rows), 100, 64 << 20)
        assert (caught.value.which, caught.value.value) == ("memory_bytes", 64 << 20)
        child.channel.close()
        misplaced = [(Kind.ROWS, bytes(8)), (Kind.DONE, b""), (Kind.PROGRAM, bytes(2 << 20))]
        for number, (kind, payload) in enumerate(misplaced, 2):
            child = server.prepare(number, Limits(memory_bytes=1 << 20))
            await server.spawn(child)
            with pytest.raises(ChannelClosed):
                await child.channel.request(kind, (payload,), 0)
            await child.exited.wait()
            assert child.status == 1
            child.channel.close()
        server.close()


async def test_idle_processes_end_and_come_back_when_needed() -> None:
    async with open_forkserver(ForkserverOptions(idle_s=0.2)) as executor:
        await executor.infer(quick())
        pids = [executor.server_pid, *executor.child_pids()]
        await until(lambda: not any(lives(pid) for pid in pids if pid is not None))
        assert unpack(await executor.infer(quick())).count == 2


async def test_closing_ends_what_computes_and_leaves_nothing() -> None:
    async with open_forkserver() as executor:
        assert executor.server_pid is None

        async def close() -> None:
            pids.append(await wait_computing(executor))
            pids.append(executor.server_pid or 0)
            await executor.aclose()

        pids: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with pytest.raises(ExecutorDied):
                await executor.infer(slow())
    assert [lives(pid) for pid in pids] == [False, False]
    with pytest.raises(ExecutorUnavailable, match="closed"):
        await executor.infer(quick())


async def test_root_does_not_compute_as_somebody_unknown() -> None:
    async with open_forkserver(ForkserverOptions(user="no-such-user")) as executor:
        if os.geteuid() == 0:
            with pytest.raises(ExecutorUnavailable, match="user 'no-such-user'"):
                await executor.infer(quick())
        else:  # anybody else computes as who he is
            assert unpack(await executor.infer(quick())).count == 2


def test_root_does_not_become_root() -> None:
    script = "from meshd.node.compute.confinement import drop_privileges; drop_privileges('root')"
    done = subprocess.run(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=False
    )
    assert ("user 'root' is root" in done.stderr) is (os.geteuid() == 0)


DAEMON = """
import sys, trio
from meshd.node.compute.executor import InferRequest
from meshd.node.compute.forkserver import open_forkserver
sys.path.insert(0, sys.argv[1])
from test_forkserver import quick, slow, wait_computing

async def main():
    async with open_forkserver() as executor:
        await executor.infer(quick())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.infer, slow())
            await wait_computing(executor)
            print(executor.server_pid, *executor.child_pids(), flush=True)
            print(*[name for name in ("torch", "numpy") if name in sys.modules], flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


async def test_nothing_outlives_a_killed_daemon_and_the_daemon_never_loads_torch() -> None:
    command = [sys.executable, "-c", DAEMON, str(Path(__file__).parent)]
    async with trio.open_nursery() as nursery:
        daemon = await nursery.start(partial(trio.run_process, command, stdout=PIPE, check=False))
        text = b""
        with trio.fail_after(120):
            while text.count(b"\n") < 2:
                text += await daemon.stdout.receive_some()
        pids, loaded = (line.split() for line in text.splitlines())
        alive = [lives(int(pid)) for pid in pids]
        daemon.kill()
    assert loaded == []
    assert alive == [True, True, True]
    await until(lambda: not any(lives(int(pid)) for pid in pids))


# What the daemon reads from a child that may be anything.


@pytest.mark.parametrize(
    ("reply", "error", "reason"),
    [
        (b"", ChannelClosed, "closed its end"),
        (b"d", ChannelClosed, "closed its end"),
        (FRAME.pack(b"x", 0), ChannelClosed, "unknown kind"),
        (frame(Kind.DONE, 5) + b"12345", ChannelClosed, "4 expected"),
        (frame(Kind.DONE, 1 << 60), ChannelClosed, "4 expected"),
        (frame(Kind.DONE, 4) + b"123", ChannelClosed, "closed its end"),
        (frame(Kind.ROWS, 4) + b"1234", ChannelClosed, "ROWS"),
        (frame(Kind.FAILED, 1 << 40), ChannelClosed, "FAILED"),
        (frame(Kind.MEMORY, 1) + b"1", ChannelClosed, "MEMORY"),
        (frame(Kind.MEMORY, 0), LimitExceeded, "memory_bytes"),
        (frame(Kind.FAILED, 6) + b"a\x1b[2Jb", ShardFailed, r"^a \[2Jb$"),
        (frame(Kind.FAILED, 2) + b"\xff\n", ShardFailed, "^� $"),
    ],
)
async def test_a_child_that_misbehaves_is_noticed(
    reply: bytes, error: type[Exception], reason: str
) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        theirs.sendall(reply)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(error, match=reason):
            await channel.request(Kind.ROWS, (b"",), 4)
    channel.close()


async def test_a_reply_that_fits_is_returned() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        theirs.sendall(frame(Kind.DONE, 4) + b"1234")
        assert await channel.request(Kind.ROWS, (b"ab", b"c"), 4) == b"1234"
        assert theirs.recv(100) == frame(Kind.ROWS, 3) + b"abc"
    channel.close()


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x80", b"\x01", b"\x91\x90", b"\x91\xc0", b"\x91\x81\x01\x02", b"\x91"]
)
def test_control_messages_are_words_and_integers(data: bytes) -> None:
    with pytest.raises(FramingError):
        parse_control(data)
    assert parse_control(pack_control("kill", 3)) == ("kill", 3)
    assert parse_frame(frame(Kind.DONE, 7)) == (Kind.DONE, 7)
