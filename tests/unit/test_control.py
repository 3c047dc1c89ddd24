"""The control API over real unix sockets: who may ask, what comes back, what breaks nothing."""

import fcntl
import json
import os
import socket
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from meshd.config.errors import ConfigError
from meshd.ledger.chain import CallFailed, ChainUnavailable
from meshd.node.client import Client, connect
from meshd.node.control import routes, server
from meshd.node.control.api import ControlError
from meshd.node.control.server import serve
from meshd.node.control.socket import data_directory_lock, listening_socket, may_connect
from meshd.node.workloads.errors import ProgramError
from meshd.p2p.identity import IdentityError
from meshd.p2p.network import Unreachable

JOB = "0x" + "3f" + "ab" * 31


async def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Run a blocking call of the client in a thread."""
    return await trio.to_thread.run_sync(partial(function, *arguments))


async def fault_of(function: Callable[..., Any], *arguments: object) -> ControlError:
    with pytest.raises(ControlError) as caught:
        await call(function, *arguments)
    return caught.value


async def exchange(directory: Path, request: bytes, *, ends: bool = False) -> bytes:
    """Send raw bytes and return everything that comes back."""
    with trio.fail_after(20):
        stream = await trio.open_unix_socket(directory / "meshd.sock")
        async with stream:
            try:
                await stream.send_all(request)
                if ends:
                    await stream.send_eof()
            except trio.BrokenResourceError:
                pass  # refused before it was read whole
            answer = b""
            try:
                while piece := await stream.receive_some(65536):
                    answer += piece
            except trio.BrokenResourceError:
                pass
            return answer


def request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: meshd\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_every_answer_reaches_the_client_as_the_node_gave_it(client, fake_node) -> None:
    assert await call(client.status) == await fake_node.status()
    assert await call(client.peers) == await fake_node.peers()
    assert await call(client.wallet) == await fake_node.wallet()
    assert await call(client.jobs) == await fake_node.job_list()
    assert await call(client.job, JOB) == await fake_node.job_show(bytes.fromhex(JOB[2:]))
    assert await call(client.receipts, JOB) == await fake_node.job_receipts(b"")
    assert (await call(client.cancel, JOB))["state"] == "cancelled"


async def test_a_stake_arrives_in_the_smallest_unit(client, fake_node) -> None:
    assert (await call(client.stake, "1.5"))["stake"] == "1.5"
    assert fake_node.calls == [("stake", 15 * 10**17)]


async def test_orders_and_questions_about_the_daemon_and_its_jobs_reach_the_node(
    client, fake_node
) -> None:
    name = bytes.fromhex(JOB[2:])
    assert (await call(client.pause))["paused"]
    assert not (await call(client.resume))["paused"]
    assert (await call(client.earnings))["pending"] == "0.25"
    assert (await call(client.why, JOB))["shards"][0]["state"] == "free"
    assert (await call(client.log, JOB, 1))["lines"][0]["kind"] == "assignment"
    assert (await call(client.retry, JOB))["shards"] == 16
    await call(client.retry, JOB, "1h30m")
    asked = [asked for asked in fake_node.calls if asked[0] != "status"]
    assert asked == [
        ("pause",),
        ("resume",),
        ("earnings",),
        ("job_why", name),
        ("job_log", name, 1),
        ("job_retry", name, None),
        ("job_retry", name, 5400),
    ]


async def test_a_part_of_a_result_is_written_where_the_client_says(
    client, fake_node, tmp_path
) -> None:
    (part,) = await call(client.parts, JOB)
    await call(client.part, JOB, part["number"], tmp_path / "part")
    assert fake_node.calls[-1] == ("job_part", bytes.fromhex(JOB[2:]), 3, tmp_path / "part")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", f"/v1/jobs/{JOB}/log/x1", b""),
        ("GET", f"/v1/jobs/{JOB}/log/9999999999", b""),
        ("GET", f"/v1/jobs/{JOB}/replay/x", b""),
        ("POST", f"/v1/jobs/{JOB}/parts/one", b'{"path": "/tmp/x"}'),
        ("POST", f"/v1/jobs/{JOB}/parts/1", b'{"path": "x"}'),
        ("POST", f"/v1/jobs/{JOB}/retry", b'{"deadline": "soon"}'),
        ("POST", f"/v1/jobs/{JOB}/retry", b"{}"),
        ("POST", "/v1/pause", b'{"for": "1h"}'),
    ],
)
async def test_what_is_no_number_path_or_duration_never_reaches_the_node(
    daemon_dir, fake_node, method, path, body
) -> None:
    assert b" 400 " in await exchange(daemon_dir, request(method, path, body))
    assert fake_node.calls == []


@pytest.mark.parametrize("amount", ["0", "-1", "1e3", ""])
async def test_a_stake_that_is_no_amount_never_reaches_the_node(client, fake_node, amount) -> None:
    fault = await fault_of(client.stake, amount)
    assert fault.code == "usage"
    assert fake_node.calls == []


async def test_a_result_goes_to_an_absolute_path(client, fake_node, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = await call(client.result, JOB, "out.rows")
    assert answer["path"] == str(tmp_path / "out.rows")
    assert fake_node.calls == [("job_result", bytes.fromhex(JOB[2:]), tmp_path / "out.rows")]


async def test_a_relative_path_is_refused_by_the_daemon(daemon_dir) -> None:
    answer = await exchange(daemon_dir, request("POST", f"/v1/jobs/{JOB}/result", b'{"path":"x"}'))
    assert b" 400 " in answer
    assert b"not absolute" in answer


def describe_job(directory: Path, **changes: str) -> Path:
    (directory / "my.program").write_bytes(b"")
    (directory / "my.data").write_bytes(b"")
    keys = {
        "program": '"my.program"',
        "data": '"my.data"',
        "price": '"0.002"',
        "cap": '"50"',
        "deadline": '"2h"',
    } | changes
    file = directory / "job.toml"
    file.write_text("".join(f"{key} = {value}\n" for key, value in keys.items()))
    return file


async def test_a_submitted_job_arrives_checked_and_with_absolute_paths(
    client, fake_node, tmp_path
) -> None:
    answer = await call(client.submit, describe_job(tmp_path))
    assert answer["id"] == JOB
    ((_, spec),) = fake_node.calls
    assert spec.program == tmp_path / "my.program"
    assert spec.cap == 50 * 10**18


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"deadlin": '"2h"'}, "job.toml: unknown key 'deadlin': did you mean 'deadline'?"),
        ({"cap": "50"}, "job.toml: cap = 50: a bare number is no amount"),
        ({"deadline": '"2020-01-01T00:00:00Z"'}, "is in the past"),
        ({"program": '"none.program"'}, "does not exist"),
        ({"program": '"model.pt2"'}, "torch.export.load runs what they contain"),
        ({"data": '"rows.pkl"'}, "unpickling runs code"),
    ],
)
async def test_a_wrong_job_is_refused_before_the_node_sees_it(
    client, fake_node, tmp_path, changes, told
) -> None:
    fault = await fault_of(client.submit, describe_job(tmp_path, **changes))
    assert told in str(fault)
    assert fault.exit_code == 2
    assert fake_node.calls == []


async def test_the_beginning_of_an_id_is_enough_if_no_other_job_has_it(client, fake_node) -> None:
    assert (await call(client.job, "3fab"))["id"] == JOB
    ambiguous = await fault_of(client.job, "0x3f")
    assert (ambiguous.code, ambiguous.message) == ("usage", "2 jobs begin with 0x3f")
    assert (await fault_of(client.job, "0x99")).code == "not-found"
    assert (await fault_of(client.job, "0x" + "99" * 32)).code == "not-found"
    assert (await fault_of(client.job, "xyz")).code == "usage"
    assert (await fault_of(client.job, "../../status")).code == "usage"


@pytest.mark.parametrize(
    ("fault", "code", "exit_code"),
    [
        (ControlError("again", "busy", "wait"), "again", 75),
        (ConfigError("wrong"), "usage", 2),
        (ProgramError("operator 'foo' is not in the table"), "usage", 2),
        (IdentityError("key file has mode 0644"), "config", 78),
        (ChainUnavailable("no answer from http://x"), "unavailable", 69),
        (CallFailed("JobEscrowWindow"), "failed", 1),
        (Unreachable("alice"), "unavailable", 69),
        (trio.TooSlowError(), "unavailable", 69),
    ],
)
async def test_a_known_error_reaches_the_client_with_its_kind(
    client, fake_node, fault, code, exit_code
) -> None:
    fake_node.fault = fault
    told = await fault_of(client.wallet)
    assert (told.code, told.exit_code) == (code, exit_code)
    assert getattr(fault, "message", str(fault)) in told.message


async def test_an_unexpected_error_is_told_and_the_server_goes_on(client, fake_node) -> None:
    fake_node.fault = ZeroDivisionError("division by zero")
    assert "internal error: ZeroDivisionError" in (await fault_of(client.status)).message
    fake_node.fault = None
    assert (await call(client.status))["pid"] == 42


async def test_events_arrive_as_they_happen_until_the_job_has_ended(client, fake_node) -> None:
    fake_node.happens("running", "shard 3 accepted")
    fake_node.happens("settled", "paid")
    events = await call(list, client.watch(JOB))
    assert [(event["state"], event["text"]) for event in events] == [
        ("running", "shard 3 accepted"),
        ("settled", "paid"),
    ]


async def test_a_watch_of_an_unknown_job_is_an_error_and_no_stream(client, fake_node) -> None:
    fake_node.fault = ControlError("not-found", "no such job", "see: meshd job ls")
    fault = await fault_of(list, client.watch(JOB))
    assert (fault.code, fault.cure) == ("not-found", "see: meshd job ls")


async def test_an_error_in_the_middle_of_a_watch_reaches_the_client(client, fake_node) -> None:
    fake_node.happens("running")
    fake_node.send_events.send_nowait(ChainUnavailable("the RPC went away"))
    fault = await fault_of(list, client.watch(JOB))
    assert (fault.code, fault.message) == ("unavailable", "the RPC went away")


async def test_a_watch_ends_when_its_client_leaves(daemon_dir, fake_node) -> None:
    with trio.fail_after(20):
        stream = await trio.open_unix_socket(daemon_dir / "meshd.sock")
        await stream.send_all(request("GET", f"/v1/jobs/{JOB}/events"))
        fake_node.happens("running")
        assert b"running" in await stream.receive_some(65536)
        assert fake_node.watchers == 1
        await stream.aclose()
        while fake_node.watchers:
            await trio.sleep(0.01)


async def test_the_events_of_a_replay_arrive_until_its_end(client, fake_node) -> None:
    fake_node.replays("equal", "different")
    events = await call(list, client.replay(JOB))
    assert events == fake_node.replayed
    assert await call(list, client.replay(JOB, 3)) == events
    name = bytes.fromhex(JOB[2:])
    assert fake_node.calls == [("job_replay", name, None), ("job_replay", name, 3)]


async def test_a_replay_that_breaks_off_is_an_error(client, fake_node) -> None:
    fake_node.replays("equal")
    fake_node.replayed[-1:] = [ControlError("unavailable", "nobody serves it", "start a peer")]
    fault = await fault_of(list, client.replay(JOB))
    assert (fault.code, fault.message) == ("unavailable", "nobody serves it")
    fake_node.replayed.pop()
    assert "before the replay had ended" in (await fault_of(list, client.replay(JOB))).message
    fake_node.fault = ControlError("usage", "only training is replayed")
    assert (await fault_of(list, client.replay(JOB))).exit_code == 2


async def test_a_client_that_leaves_ends_its_replay(daemon_dir, fake_node) -> None:
    with trio.fail_after(20):
        stream = await trio.open_unix_socket(daemon_dir / "meshd.sock")
        await stream.send_all(request("GET", f"/v1/jobs/{JOB}/replay"))
        while not fake_node.watchers:
            await trio.sleep(0.01)
        await stream.aclose()
        while fake_node.watchers:
            await trio.sleep(0.01)


async def test_a_silent_watch_sends_empty_lines(daemon_dir, fake_node, monkeypatch) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_S", 0.01)
    with trio.fail_after(20):
        stream = await trio.open_unix_socket(daemon_dir / "meshd.sock")
        async with stream:
            await stream.send_all(request("GET", f"/v1/jobs/{JOB}/events"))
            seen = b""
            while seen.count(b"1\r\n\n\r\n") < 2:
                seen += await stream.receive_some(65536)


async def test_a_daemon_that_dies_in_the_middle_is_told_to_the_watcher(tmp_path, fake_node) -> None:
    path = tmp_path / "meshd.sock"
    async with trio.open_nursery() as nursery:
        daemon = await nursery.start(_serve_in_scope, fake_node, path)
        fake_node.happens("running")

        def watch() -> None:
            events = connect(tmp_path, timeout_s=20).watch(JOB)
            assert next(events)["state"] == "running"
            trio.from_thread.run_sync(daemon.cancel)
            with pytest.raises(ControlError, match="broke off"):
                next(events)

        await trio.to_thread.run_sync(watch)


async def _serve_in_scope(fake_node: Any, path: Path, *, task_status: Any) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, fake_node, path)
            task_status.started(scope)


async def test_the_socket_is_for_this_user_only(daemon_dir) -> None:
    mode = (daemon_dir / "meshd.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_only_the_daemons_own_user_and_root_may_connect() -> None:
    assert may_connect(1000, 1000)
    assert may_connect(0, 1000)
    assert not may_connect(1001, 1000)
    assert not may_connect(1000, 0)


async def test_a_connection_of_another_user_is_closed_unanswered(
    daemon_dir, fake_node, monkeypatch
) -> None:
    monkeypatch.setattr(server, "peer_uid", lambda stream: os.geteuid() + 1)
    assert await exchange(daemon_dir, request("GET", "/v1/status")) == b""
    assert fake_node.calls == []


async def test_who_connects_is_the_kernels_word_and_not_the_clients(
    daemon_dir, fake_node, monkeypatch
) -> None:
    monkeypatch.setattr(server.os, "geteuid", lambda: 12_345)  # the daemon's user is another one
    daemon_dir.chmod(0o755)
    (daemon_dir / "meshd.sock").chmod(0o666)  # even if the modes were wrong
    stranger = (
        "import os, socket, sys\n"
        "os.getuid() == 0 and os.setuid(65534)\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.connect('meshd.sock')\n"
        "try:\n"
        "    sock.sendall(b'GET /v1/status HTTP/1.1\\r\\nHost: m\\r\\n\\r\\n')\n"
        "    print(sock.recv(1000))\n"
        "except OSError:\n"
        "    print(b'')\n"
    )
    ended = await trio.run_process(
        [sys.executable, "-c", stranger], cwd=daemon_dir, capture_stdout=True
    )
    assert ended.stdout == b"b''\n"
    assert fake_node.calls == []


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"404"),
        (b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: m\r\n\r\n", b"400"),
        (request("GET", "/v1/nothing"), b"404"),
        (request("DELETE", "/v1/status"), b"400"),
        (request("POST", "/v1/stake", b"{"), b"400"),
        (request("POST", "/v1/stake", b"[1]"), b"400"),
        (request("POST", "/v1/stake", b"[" * 100_000), b"400"),
        (request("POST", "/v1/stake", b'{"amount": 5}'), b"400"),
        (request("POST", "/v1/stake", b'{"amount": "5", "more": 1}'), b"400"),
        (request("POST", "/v1/stake", b" " * (1 << 20) + b"{}"), b"400"),
        (request("GET", "/v1/status", b'{"x": 1}'), b"400"),
    ],
)
async def test_a_malformed_request_is_refused_and_the_server_goes_on(
    daemon_dir, client, fake_node, raw, status
) -> None:
    answer = await exchange(daemon_dir, raw)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"code", "message", "cure"}
    assert fake_node.calls == []
    assert (await call(client.status))["pid"] == 42


async def test_a_client_that_leaves_in_the_middle_breaks_nothing(daemon_dir, client) -> None:
    for cut in (b"", b"GET /v1", request("POST", "/v1/stake", b'{"amount": "5"}')[:-3]):
        assert await exchange(daemon_dir, cut, ends=True) == b"" or cut
    assert (await call(client.status))["pid"] == 42


async def test_a_client_that_sends_nothing_is_dropped_in_time(daemon_dir, monkeypatch) -> None:
    monkeypatch.setattr(server, "REQUEST_DEADLINE_S", 0.05)
    assert await exchange(daemon_dir, b"GET /v1/status HT") == b""


async def test_too_many_connections_are_told_to_come_again(
    daemon_dir, client, fake_node, monkeypatch
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 1)
    with trio.fail_after(20):
        stream = await trio.open_unix_socket(daemon_dir / "meshd.sock")
        async with stream:
            await stream.send_all(request("GET", f"/v1/jobs/{JOB}/events"))
            fake_node.happens("running")
            await stream.receive_some(65536)
            assert (await fault_of(client.status)).code == "again"


async def test_a_slow_answer_is_given_up_in_time(client, fake_node, monkeypatch) -> None:
    async def never() -> Any:
        await trio.sleep_forever()

    monkeypatch.setattr(fake_node, "status", never)

    def hurried(method: str, path: str) -> tuple[routes.Route, dict[str, str]]:
        route, names = routes.find_route(method, path)
        return routes.Route(route.method, route.path, route.call, 0.05), names

    monkeypatch.setattr(server, "find_route", hurried)
    assert "took too long" in (await fault_of(client.status)).message


async def test_a_socket_file_of_a_dead_daemon_is_replaced(tmp_path, fake_node, nursery) -> None:
    path = tmp_path / "meshd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert (await fault_of(connect(tmp_path).status)).code == "unavailable"
    await nursery.start(serve, fake_node, path)
    assert (await call(connect(tmp_path).status))["pid"] == 42


async def test_a_data_directory_with_a_long_path_works_too(tmp_path, fake_node, nursery) -> None:
    directory = tmp_path / ("x" * 60) / ("y" * 60)
    directory.mkdir(parents=True)
    await nursery.start(serve, fake_node, directory / "meshd.sock")
    assert (await call(connect(directory).status))["pid"] == 42


def test_the_socket_file_is_gone_when_the_daemon_is(tmp_path: Path) -> None:
    path = tmp_path / "meshd.sock"
    with listening_socket(path):
        assert path.exists()
    assert not path.exists()


def test_without_a_daemon_the_client_says_where_and_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ControlError) as caught:
        connect(tmp_path / "none").status()
    assert caught.value.exit_code == 69
    assert str(tmp_path / "none") in str(caught.value)
    assert "meshd up" in caught.value.cure


def test_a_second_daemon_on_the_same_directory_is_refused_with_the_firsts_process(
    tmp_path: Path,
) -> None:
    with data_directory_lock(tmp_path / "data"):
        with pytest.raises(ControlError) as caught, data_directory_lock(tmp_path / "data"):
            pass
        assert caught.value.exit_code == 75
        assert f"second daemon, process {os.getpid()}" in caught.value.message
    with data_directory_lock(tmp_path / "data"):
        pass


def test_a_lock_file_that_a_dead_daemon_left_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / "meshd.lock").write_text("99999\n")
    with data_directory_lock(tmp_path):
        assert (tmp_path / "meshd.lock").read_text() == f"{os.getpid()}\n"


def test_the_data_directory_is_made_for_this_user_only(tmp_path: Path) -> None:
    with data_directory_lock(tmp_path / "a" / "data"):
        assert stat.S_IMODE((tmp_path / "a" / "data").stat().st_mode) == 0o700
        with (
            (tmp_path / "a" / "data" / "meshd.lock").open() as file,
            pytest.raises(BlockingIOError),
        ):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_data_directory_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ControlError) as caught, data_directory_lock(tmp_path / "file" / "data"):
        pass
    assert caught.value.exit_code == 78


def test_a_client_serves_any_number_of_calls(tmp_path: Path) -> None:
    assert isinstance(connect(tmp_path), Client)
