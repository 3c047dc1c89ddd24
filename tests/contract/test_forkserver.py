"""Executor processes: what they may not do, how they end, and that nothing outlives the daemon."""

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

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


@pytest.fixture
async def executor() -> AsyncIterator[ForkserverExecutor]:
    async with open_forkserver() as opened:
        yield opened


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def computes(executor: ForkserverExecutor) -> bool:
    """Whether some child has been computing for a while."""
    pids = executor.child_pids()
    return any(lives(pid) and sum(psutil.Process(pid).cpu_times()[:2]) > 0.3 for pid in pids)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


async def test_a_process_serves_the_shards_of_one_job_and_slot(
    executor: ForkserverExecutor,
) -> None:
    await executor.infer(quick())
    (first,) = executor.child_pids()
    await executor.infer(quick())
    assert executor.child_pids() == [first]
    await executor.infer(quick(slot=1))
    assert len(executor.child_pids()) == 2


async def test_other_limits_mean_another_process(executor: ForkserverExecutor) -> None:
    await executor.infer(quick())
    (first,) = executor.child_pids()
    await executor.infer(quick(limits=Limits(memory_bytes=1 << 29)))
    await until(lambda: len(executor.child_pids()) == 1)
    assert executor.child_pids() != [first]


async def test_processes_have_no_privileges_no_files_and_no_secrets(
    executor: ForkserverExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHD_KEY_PASSWORD", "hunter2")
    with open(os.devnull) as secret:
        os.set_inheritable(secret.fileno(), True)
        await executor.infer(quick())
        assert executor.server_pid is not None
        for pid in [executor.server_pid, *executor.child_pids()]:
            status = status_of(pid)
            assert "0" not in status["Uid"].split() or os.geteuid() != 0
            assert "0" not in status["Gid"].split() or os.geteuid() != 0
            assert status["Groups"].split() == [] or os.geteuid() != 0
            assert int(status["CapEff"], 16) == 0
            assert status["NoNewPrivs"] == "1"
            assert psutil.Process(pid).nice() >= 10
            assert "hunter2" not in Path(f"/proc/{pid}/environ").read_text()
            files = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            assert all(
                file == "/dev/null" or file.startswith(("socket:", "anon_inode:", "pipe:"))
                for file in files
            )
            assert files.count("/dev/null") == 3
    for pid in executor.child_pids():
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        chosen = {line[:26].strip(): line[26:].split()[:2] for line in limits}
        assert chosen["Max file size"] == chosen["Max core file size"] == ["0", "0"]
        assert int(chosen["Max data size"][1]) < 4 << 30


async def test_a_killed_process_costs_its_shard_only(executor: ForkserverExecutor) -> None:
    async def kill() -> None:
        await until(lambda: computes(executor))
        os.kill(executor.child_pids()[0], signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        with pytest.raises(ExecutorDied, match="signal 9"):
            await executor.infer(slow())
    assert unpack(await executor.infer(quick())).count == 2


async def test_a_killed_server_is_started_anew(executor: ForkserverExecutor) -> None:
    async def kill() -> None:
        await until(lambda: computes(executor))
        assert executor.server_pid is not None
        os.kill(executor.server_pid, signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        with pytest.raises(ExecutorDied, match="with its server"):
            await executor.infer(slow())
    assert unpack(await executor.infer(quick())).count == 2


async def test_a_cancelled_shard_stops_computing(executor: ForkserverExecutor) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(executor.infer, slow())
        await until(lambda: computes(executor))
        (pid,) = executor.child_pids()
        nursery.cancel_scope.cancel()
    await until(lambda: not lives(pid))
    assert unpack(await executor.infer(quick())).count == 2


async def test_processor_time_is_limited(executor: ForkserverExecutor) -> None:
    with pytest.raises(LimitExceeded) as caught:
        await executor.infer(slow(Limits(cpu_s=0)))
    assert (caught.value.which, caught.value.value) == ("cpu_s", 0)


async def test_time_is_limited_while_a_shard_computes(executor: ForkserverExecutor) -> None:
    await executor.infer(quick())
    with pytest.raises(LimitExceeded) as caught:
        await executor.infer(slow(Limits(wall_s=0.5)))
    assert caught.value.which == "wall_s"
    await until(lambda: len(executor.child_pids()) == 1)


async def test_memory_that_no_rule_foresaw_is_refused_by_the_system() -> None:
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
        server.close()


async def test_a_child_refuses_frames_that_have_no_place() -> None:
    server = ServerProcess(ForkserverOptions())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        await server.wait_ready()
        for number, (kind, payload) in enumerate(
            [(Kind.ROWS, bytes(8)), (Kind.DONE, b""), (Kind.PROGRAM, bytes(2 << 20))]
        ):
            child = server.prepare(number, Limits(memory_bytes=1 << 20))
            await server.spawn(child)
            with pytest.raises(ChannelClosed):
                await child.channel.request(kind, (payload,), 0)
            await child.exited.wait()
            assert child.status == 1
        server.close()


async def test_idle_processes_end_and_come_back_when_needed() -> None:
    async with open_forkserver(ForkserverOptions(idle_s=0.2)) as executor:
        await executor.infer(quick())
        pids = [executor.server_pid, *executor.child_pids()]
        await until(lambda: not any(lives(pid) for pid in pids if pid is not None))
        assert unpack(await executor.infer(quick())).count == 2


async def test_nothing_is_left_when_the_executor_is_closed() -> None:
    async with open_forkserver() as executor:
        await executor.infer(quick())
        pids = [executor.server_pid, *executor.child_pids()]
    assert None not in pids
    assert not any(lives(pid) for pid in pids if pid is not None)
    with pytest.raises(ExecutorUnavailable, match="closed"):
        await executor.infer(quick())


async def test_closing_ends_what_computes() -> None:
    async with open_forkserver() as executor:

        async def close() -> None:
            await until(lambda: computes(executor))
            await executor.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with pytest.raises(ExecutorDied):
                await executor.infer(slow())


async def test_an_executor_that_was_never_used_starts_no_process(
    executor: ForkserverExecutor,
) -> None:
    await trio.testing.wait_all_tasks_blocked()
    assert executor.server_pid is None


async def test_root_without_an_unprivileged_user_does_not_compute() -> None:
    for user in ("no-such-user", "root"):
        async with open_forkserver(ForkserverOptions(user=user)) as executor:
            if os.geteuid() != 0:  # anybody else computes as who he is
                assert unpack(await executor.infer(quick())).count == 2
                continue
            with pytest.raises(ExecutorUnavailable, match=f"user '{user}'"):
                await executor.infer(quick())


DAEMON = """
import sys, trio
from meshd.node.compute.executor import InferRequest
from meshd.node.compute.forkserver import open_forkserver
sys.path.insert(0, sys.argv[1])
from test_forkserver import quick, slow, computes, until

async def main():
    async with open_forkserver() as executor:
        await executor.infer(quick())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.infer, slow())
            await until(lambda: computes(executor))
            print(executor.server_pid, *executor.child_pids(), flush=True)
            print(*[name for name in ("torch", "numpy") if name in sys.modules], flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


async def test_nothing_outlives_a_killed_daemon_and_the_daemon_never_loads_torch() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    ) as daemon:
        assert daemon.stdout is not None
        pids = [int(pid) for pid in (await trio.to_thread.run_sync(daemon.stdout.readline)).split()]
        loaded = (await trio.to_thread.run_sync(daemon.stdout.readline)).split()
        alive = [lives(pid) for pid in pids]
        daemon.kill()
    assert loaded == []
    assert alive == [True, True, True]
    await until(lambda: not any(lives(pid) for pid in pids))


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
