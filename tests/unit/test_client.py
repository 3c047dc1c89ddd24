"""The Python client: the same calls with and without an event loop, modules in, tensors out."""

import difflib
import json
import tomllib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshd.config.job import JobSpec
from meshd.node.arrays import (
    columns_from_tensors,
    tensors_from_rows,
    tensors_from_safetensors,
)
from meshd.node.calls import AsyncClient
from meshd.node.client import Client, connect, connect_trio
from meshd.node.control import routes
from meshd.node.control.api import ControlError
from meshd.node.exchange import BrokenExchange, Exchange, Lines
from meshd.node.session import Job, job_toml
from meshd.node.transports import BlockingTransport, iterate_blocking, run_blocking
from meshd.node.workloads.datasetfile import open_dataset
from meshd.node.workloads.datasets import build_dataset
from meshd.node.workloads.errors import DatasetError, ExportError
from meshd.node.workloads.interpreter import load
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import RowSchema, pack_columns
from meshd.node.workloads.tensorfile import TensorData, write_tensors
from meshd.node.workloads.tensors import Column

JOB = "0x" + "3f" + "ab" * 31
LOOP = Path(__file__).resolve().parents[2] / "docs" / "examples" / "loop"


async def call(function: Callable[..., Any], *arguments: object, **options: object) -> Any:
    """Run a blocking call of the client in a thread."""
    return await trio.to_thread.run_sync(partial(function, *arguments, **options))


@pytest.fixture
def trio_client(daemon_dir: Path) -> AsyncClient:
    return connect_trio(daemon_dir, timeout_s=20)


def packed(**columns: torch.Tensor) -> bytes:
    """Return tensors as the packed rows of a result."""
    data = columns_from_tensors(columns)
    schema = RowSchema(tuple(Column(n, c.dtype, c.shape[1:]) for n, c in data.items()))
    count = next(iter(data.values())).shape[0]
    return pack_columns(schema, {name: c.data for name, c in data.items()}, count)


# ---- one implementation, two flavours ------------------------------------------------------


@pytest.mark.parametrize("method", ["status", "peers", "wallet", "jobs"])
async def test_both_flavours_give_the_same_answer(client, trio_client, method) -> None:
    assert await getattr(trio_client, method)() == await call(getattr(client, method))


async def test_both_flavours_send_the_same_request(client, trio_client, fake_node) -> None:
    await trio_client.stake("1.5")
    await call(client.stake, "1.5")
    assert fake_node.calls == [("stake", 15 * 10**17)] * 2


def test_every_call_has_both_flavours() -> None:
    public = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert public <= {name for name in vars(Client) if not name.startswith("_")}
    for name in public:
        assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__


async def test_other_tasks_run_while_a_call_waits(trio_client, fake_node, monkeypatch) -> None:
    begun = trio.Event()

    async def never() -> Any:
        begun.set()
        await trio.sleep_forever()

    monkeypatch.setattr(fake_node, "status", never)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio_client.status)
            await begun.wait()
            nursery.cancel_scope.cancel()


async def test_events_arrive_in_trio_and_leaving_early_hangs_up(trio_client, fake_node) -> None:
    fake_node.happens("running", "shard 3 accepted")
    async with aclosing(trio_client.watch(JOB)) as events:
        assert (await anext(events))["text"] == "shard 3 accepted"
        assert fake_node.watchers == 1
    with trio.fail_after(20):
        while fake_node.watchers:
            await trio.sleep(0.01)


async def test_leaving_a_blocking_watch_early_hangs_up(client, fake_node) -> None:
    fake_node.happens("running")

    def first() -> Any:
        events = client.watch(JOB)
        event = next(events)
        events.close()
        return event

    assert (await call(first))["state"] == "running"
    with trio.fail_after(20):
        while fake_node.watchers:
            await trio.sleep(0.01)


async def test_errors_are_told_alike(client, trio_client, fake_node, tmp_path) -> None:
    fake_node.fault = ControlError("again", "busy", "wait")
    with pytest.raises(ControlError, match="busy: wait") as one:
        await trio_client.wallet()
    with pytest.raises(ControlError, match="busy: wait") as other:
        await call(client.wallet)
    assert one.value.code == other.value.code == "again"
    with pytest.raises(ControlError, match="no daemon runs on"):
        await connect_trio(tmp_path / "nobody").status()
    with pytest.raises(ControlError, match="no daemon runs on"):
        await call(connect(tmp_path / "nobody").status)


@pytest.mark.parametrize("flavour", [connect, connect_trio])
async def test_a_silent_daemon_counts_as_gone_in_time(tmp_path, flavour) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    with listener:
        await listener.bind(str(tmp_path / "meshd.sock"))
        listener.listen(1)
        client = flavour(tmp_path, timeout_s=0.05)
        with pytest.raises(ControlError, match="broke off: timed out"):
            await (client.status() if flavour is connect_trio else call(client.status))


# ---- without an event loop -----------------------------------------------------------------


def test_a_coroutine_that_needs_an_event_loop_is_refused() -> None:
    class Later:
        def __await__(self) -> Any:
            yield

    async def waits() -> None:
        await Later()

    with pytest.raises(RuntimeError, match="waited for an event loop"):
        run_blocking(waits())


def test_a_generator_is_closed_when_its_reader_leaves() -> None:
    closed = []

    async def count() -> AsyncGenerator[int, None]:
        try:
            for number in range(9):
                await BlockingTransport().sleep(0)
                yield number
        finally:
            closed.append(True)

    assert list(iterate_blocking(count())) == list(range(9))
    numbers = iterate_blocking(count())
    assert next(numbers) == 0
    numbers.close()
    assert closed == [True, True]


# ---- HTTP without I/O ----------------------------------------------------------------------

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\n[1]\n"


@given(st.integers(1, len(ANSWER)))
def test_an_answer_may_come_in_pieces(size: int) -> None:
    exchange, body = Exchange("GET", "/v1/jobs"), b""
    for at in range(0, len(ANSWER), size):
        body += exchange.receive(ANSWER[at : at + size])
    assert (exchange.status, body, exchange.ended) == (200, b"[1]\n", True)


@pytest.mark.parametrize(
    "data", [b"", ANSWER[:-1], b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n"]
)
def test_an_answer_that_is_none_is_told(data: bytes) -> None:
    exchange = Exchange("POST", "/v1/stake", json.dumps({"amount": "5"}))
    with pytest.raises(BrokenExchange):  # noqa: PT012 - either of them may be the one that sees it
        exchange.receive(data or b"")
        exchange.receive(b"")


def test_lines_are_whole_and_not_endless() -> None:
    lines = Lines()
    assert lines.feed(b'{"a"') == []
    assert lines.feed(b": 1}\n\n\n{}") == [b'{"a": 1}']
    with pytest.raises(BrokenExchange, match="a line of more than"):
        lines.feed(b"x" * (1 << 20))


# ---- modules and tensors -------------------------------------------------------------------


class Scores(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Loss(Scores):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return (self.layer(x) - y).pow(2).mean()


class Taken:
    """What the daemon found on disk when a job was submitted."""

    def __init__(self, fake_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spec: JobSpec | None = None
        self.program, self.columns = b"", dict[str, Any]()
        self._submit = fake_node.job_submit
        monkeypatch.setattr(fake_node, "job_submit", self._take)

    async def _take(self, spec: JobSpec) -> Any:
        self.spec, self.program = spec, spec.program.read_bytes()
        self.columns = {
            c.name: (c.dtype, c.shape) for c in open_dataset(spec.data).manifest.columns
        }
        return await self._submit(spec)


@pytest.fixture
def taken(fake_node, monkeypatch) -> Taken:
    return Taken(fake_node, monkeypatch)


async def test_a_module_and_tensors_become_a_program_and_a_dataset(trio_client, taken) -> None:
    module, rows = Scores(), {"x": torch.randn(40, 3)}
    job = await trio_client.infer(
        module, rows, price="0.002", cap="5", rows_per_shard=8, audit={"rows": 4}, outputs=["y"]
    )
    assert job.id == JOB
    assert taken.columns == {"x": ("f32", (3,))}
    assert torch.equal(load(taken.program)(rows)["y"], module(rows["x"]).detach())
    spec = taken.spec
    assert spec is not None
    assert (spec.workload, spec.rows_per_shard, spec.audit.rows) == ("infer", 8, 4)
    assert (spec.price, spec.cap) == (2 * 10**15, 5 * 10**18)
    assert not spec.program.exists()


async def test_the_same_without_an_event_loop(client, taken) -> None:
    job = await call(client.infer, Scores(), {"x": torch.randn(1, 3)}, price="0.002", cap="5")
    assert isinstance(job, Job)
    assert job.id == JOB
    assert parse_program(taken.program).inputs[0].name == "x"


async def test_training_takes_a_module_that_returns_its_loss(trio_client, taken) -> None:
    rows = {"x": torch.randn(40, 3), "y": torch.randn(40, 2)}
    settings = {"rounds": 8, "shards": 4, "batch": 5, "lr": 0.05, "optimizer": "sgd"}
    await trio_client.train(Loss(), rows, price="1", cap="5", train=settings)
    spec = taken.spec
    assert spec is not None
    assert (spec.workload, spec.train.rounds, spec.train.lr) == ("train", 8, 0.05)
    assert parse_program(taken.program).graph.trainable == ("layer.bias", "layer.weight")


async def test_what_is_no_program_or_no_rows_is_told_before_anything_is_sent(
    trio_client, fake_node
) -> None:
    class Draws(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn(3)

    with pytest.raises(ExportError):
        await trio_client.infer(Draws(), {"x": torch.randn(4, 3)}, price="1", cap="5")
    with pytest.raises(DatasetError, match="convert it to one of"):
        await trio_client.infer(
            Scores(), {"x": torch.zeros(4, 3, dtype=torch.complex64)}, price="1", cap="5"
        )
    rows = {"x": torch.zeros(4, 3), "y": torch.zeros(5, 2)}
    with pytest.raises(DatasetError, match="same number of rows"):
        await trio_client.train(Loss(), rows, price="1", cap="5", train={})
    with pytest.raises(ControlError, match=r"cannot stand in job\.toml"):
        await trio_client.infer(Scores(), {"x": torch.zeros(4, 3)}, price="1", cap="5", x={1})
    assert fake_node.calls == []


async def test_a_key_that_is_unknown_is_told_with_the_nearest(trio_client, fake_node) -> None:
    with pytest.raises(ControlError, match=r"did you mean 'rows_per_shard'\?"):
        await trio_client.infer(
            Scores(), {"x": torch.zeros(4, 3)}, price="1", cap="5", rows_per_shards=4
        )
    assert fake_node.calls == []


# ---- results -------------------------------------------------------------------------------


class Results:
    """Results that a fake daemon writes when it is asked for them."""

    def __init__(self, fake_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data: bytes | None = None
        self.parts: dict[int, tuple[int, int, str, bytes]] = {}
        self.away = set[int]()
        self.asked = 0
        self._write = fake_node.job_result
        monkeypatch.setattr(fake_node, "job_result", self._result)
        more = (
            routes.Route("GET", "/v1/jobs/{id}/parts", self._list),
            routes.Route("POST", "/v1/jobs/{id}/parts/{part}", self._part),
        )
        monkeypatch.setattr(routes, "ROUTES", (*more, *routes.ROUTES))

    async def _result(self, job_id: bytes, path: Path) -> Any:
        self.asked += 1
        if self.data is None:
            raise ControlError("again", "no output yet", "wait")
        await trio.Path(path).write_bytes(self.data)
        return await self._write(job_id, path)

    async def _list(self, _node: Any, _names: Any, _body: Any) -> Any:
        return [
            {"number": number, "start": start, "stop": stop, "digest": digest}
            for number, (start, stop, digest, _) in self.parts.items()
        ]

    async def _part(self, _node: Any, names: dict[str, str], body: dict[str, Any]) -> Any:
        if int(names["part"]) in self.away:
            raise ControlError("again", "nobody has it now", "try again later")
        await trio.Path(body["path"]).write_bytes(self.parts[int(names["part"])][3])
        return await self._write(b"", Path(body["path"]))


@pytest.fixture
def results(fake_node, monkeypatch) -> Results:
    return Results(fake_node, monkeypatch)


async def test_a_result_is_fetched_as_soon_as_it_is_there(
    trio_client, fake_node, results, monkeypatch
) -> None:
    monkeypatch.setattr("meshd.node.session.POLL_S", 0.01)
    rows = torch.randn(6, 2)
    fake_node.happens("running")
    job = await trio_client.open_job("3fab")
    fetched: list[Any] = []

    async def fetch() -> None:
        fetched.append(await job.fetch())

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            fake_node.happens("settling")
            while results.asked < 2:
                await trio.sleep(0.01)
            results.data = packed(y=rows)
    assert torch.equal(fetched[0]["y"], rows)


async def test_a_job_that_came_to_nothing_has_no_result(client, fake_node, results) -> None:
    fake_node.state = "failed"
    fake_node.happens("failed")
    job = await call(client.open_job, JOB)
    with pytest.raises(ControlError, match=r"job 0x3fabababababab\w* is failed"):
        await call(job.fetch)
    fake_node.happens("failed")
    with pytest.raises(ControlError, match="is failed"):
        await call(job.wait)


async def test_waiting_ends_when_everybody_is_paid(client, fake_node) -> None:
    fake_node.happens("running")
    fake_node.happens("settled")
    fake_node.state = "settled"
    job = await call(client.open_job, JOB)
    assert (await call(job.wait))["state"] == "settled"
    assert (await call(job.cancel))["state"] == "cancelled"
    assert (await call(job.receipts))[0]["kind"] == "work"


async def test_results_arrive_shard_by_shard_and_again_if_redone(
    trio_client, fake_node, results
) -> None:
    job, seen = await trio_client.open_job(JOB), []
    first, second, third = (packed(y=torch.full((2, 2), float(n))) for n in range(3))
    with trio.fail_after(20):
        async with aclosing(job.results()) as arriving:
            results.parts = {1: (2, 4, "a", first)}
            fake_node.happens("running")
            seen.append(await anext(arriving))
            results.parts = {0: (0, 2, "b", second), 1: (2, 4, "c", third)}
            fake_node.state = "settled"
            fake_node.happens("settled")
            seen += [each async for each in arriving]
    assert [span for span, _ in seen] == [range(2, 4), range(2), range(2, 4)]
    assert [int(columns["y"][0, 0]) for _, columns in seen] == [0, 1, 2]


async def test_a_part_that_cannot_be_had_comes_with_the_whole(
    trio_client, fake_node, results
) -> None:
    job = await trio_client.open_job(JOB)
    results.data = packed(y=torch.arange(4.0).reshape(4, 1))
    results.parts = {0: (0, 2, "a", b""), 1: (2, 4, "b", packed(y=torch.ones(2, 1)))}
    results.away = {0}
    fake_node.state = "settled"
    for _ in range(2):  # one for the watch of the results, one for that of the whole
        fake_node.happens("settled")
    with trio.fail_after(20):
        seen = {span.start: columns["y"] async for span, columns in job.results()}
    assert (seen[0].tolist(), seen[2].tolist()) == ([[0.0], [1.0]], [[1.0], [1.0]])


async def test_one_round_in_every_few_is_a_checkpoint(
    client, fake_node, results, monkeypatch
) -> None:
    summary = fake_node.summary
    monkeypatch.setattr(fake_node, "summary", lambda job_id: summary(job_id) | {"kind": "train"})
    data = write_tensors([TensorData("w", "f32", (1,), bytes(4))])
    results.parts = {at: (at, at + 1, str(at), data) for at in range(6)}
    results.away = {3}
    fake_node.state = "settled"
    fake_node.happens("settled")
    job = await call(client.open_job, JOB)
    seen = await call(lambda: [(span, list(found)) for span, found in job.results(every=2)])
    assert seen == [(range(1, 2), ["w"]), (range(5, 6), ["w"])]


async def test_a_training_jobs_result_goes_into_the_module(
    client, fake_node, results, monkeypatch
) -> None:
    module, other = Loss(), Loss()
    summary = fake_node.summary
    monkeypatch.setattr(fake_node, "summary", lambda job_id: summary(job_id) | {"kind": "train"})
    results.data = write_tensors(
        TensorData(name, "f32", tuple(tensor.shape), tensor.detach().numpy().tobytes())
        for name, tensor in module.state_dict().items()
    )
    fake_node.happens("settling")
    job = await call(client.open_job, JOB)
    other.load_state_dict(await call(job.fetch))
    assert torch.equal(other.layer.weight, module.layer.weight)


@pytest.mark.parametrize("name", ["bool", "uint8", "int16", "int64", "bfloat16", "float64"])
def test_tensors_keep_their_dtype_shape_and_bits(name: str) -> None:
    tensor = (torch.arange(12) % 2).reshape(3, 2, 2).to(getattr(torch, name))
    assert torch.equal(tensors_from_rows(packed(x=tensor, y=tensor[:, 0, 0]))["x"], tensor)
    column = columns_from_tensors({"x": tensor})["x"]
    data = write_tensors([TensorData("x", column.dtype, column.shape, column.data)])
    assert torch.equal(tensors_from_safetensors(data)["x"], tensor)


def test_tensors_of_any_layout_are_rows() -> None:
    tensor = torch.randn(4, 3, requires_grad=True).t()
    assert build_dataset(columns_from_tensors({"x": tensor}), 8)
    assert torch.equal(tensors_from_rows(packed(x=tensor))["x"], tensor)


# ---- the description -----------------------------------------------------------------------

VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
TABLES = st.dictionaries(st.sampled_from("abcd"), VALUES | st.lists(VALUES, max_size=3), max_size=4)


@given(TABLES, TABLES)
def test_keys_become_toml_that_says_the_same(keys: dict[str, Any], table: dict[str, Any]) -> None:
    assert tomllib.loads(job_toml({**keys, "table": table})) == {**keys, "table": table}


def test_a_local_loop_becomes_a_swarm_job_with_five_changed_lines() -> None:
    local, swarm = ((LOOP / name).read_text().splitlines() for name in ("local.py", "swarm.py"))
    changed = [line for line in difflib.ndiff(local, swarm) if line[0] in "+-" and line[2:].strip()]
    assert 0 < sum(line[0] == "+" for line in changed) <= 5
    assert sum(line[0] == "-" for line in changed) <= 5
