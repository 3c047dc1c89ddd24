"""A daemon that is not one: its control API is real, what stands behind it is made up."""

from pathlib import Path
from typing import Literal

import pytest
import trio

from meshd.config.amounts import format_mcc
from meshd.config.job import JobSpec
from meshd.node.client import Client, connect
from meshd.node.control.api import (
    ENDED,
    ControlError,
    Earnings,
    JobDetail,
    JobEvent,
    JobPart,
    JobState,
    JobSummary,
    JobWhy,
    LogPage,
    PeerInfo,
    ReceiptInfo,
    ReplayEvent,
    ReplayResult,
    ResultFile,
    SendEvent,
    SendReplay,
    ShardCounts,
    Staked,
    Status,
    Submitted,
    Wallet,
)
from meshd.node.control.server import serve

ALICE = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
JOB = "0x" + "3f" + "ab" * 31
OTHER = "0x" + "3f" + "cd" * 31


class FakeNode:
    """Answers like a daemon and notes down what it was asked; `fault` is raised instead."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.calls: list[tuple[object, ...]] = []
        self.state: JobState = "running"
        self.send_events, self.events = trio.open_memory_channel[JobEvent | Exception](100)
        self.watchers = 0
        self.replayed: list[ReplayEvent | Exception] = []
        self.paused = False

    def note(self, *call: object) -> None:
        self.calls.append(call)
        if self.fault is not None:
            raise self.fault

    async def status(self) -> Status:
        self.note("status")
        return {
            "version": "0.1.0",
            "pid": 42,
            "network": "dev",
            "address": ALICE,
            "peer_id": "16Uiu2HAm",
            "roles": ["worker"],
            "listen": ["/ip4/127.0.0.1/tcp/4001"],
            "uptime_s": 3700.0,
            "peers": 3,
            "jobs": 1,
            "shards": 2,
            "paused": self.paused,
            "chain": {"rpc": "http://127.0.0.1:8545", "chain_id": 7, "height": 12},
            "warnings": [],
        }

    async def peers(self) -> list[PeerInfo]:
        self.note("peers")
        return [
            {
                "address": ALICE,
                "peer_id": "16Uiu2HAm",
                "multiaddrs": [],
                "roles": ["validator"],
                "latency_ms": 0.5,
                "device": "evil\x1b[2Jdevice",
                "ask": None,
            }
        ]

    async def wallet(self) -> Wallet:
        self.note("wallet")
        return {
            "address": ALICE,
            "payout": ALICE,
            "chain_id": 7,
            "mcc": "12.5",
            "coin": "1",
            "stake": "0",
        }

    async def stake(self, amount: int) -> Staked:
        self.note("stake", amount)
        return {"tx": "0x" + "11" * 32, "height": 9, "stake": format_mcc(amount)}

    async def pause(self) -> Status:
        self.note("pause")
        self.paused = True
        return await self.status()

    async def resume(self) -> Status:
        self.note("resume")
        self.paused = False
        return await self.status()

    async def earnings(self) -> Earnings:
        self.note("earnings")
        return {
            "account": ALICE,
            "paid": "1.5",
            "pending": "0.25",
            "jobs": [
                {"job": JOB, "receipts": 7, "earned": "1.75", "paid": "1.5"},
                {"job": OTHER, "receipts": None, "earned": None, "paid": "0"},
            ],
            "payments": [{"job": JOB, "amount": "1.5", "height": 9, "tx": "0x" + "55" * 32}],
        }

    async def job_retry(self, job_id: bytes, deadline_s: int | None) -> Submitted:
        self.note("job_retry", job_id, deadline_s)
        return {
            "id": OTHER,
            "state": "announced",
            "shards": 16,
            "cap": "50",
            "deadline": 1_900_000_000,
            "warnings": [],
        }

    async def job_submit(self, spec: JobSpec) -> Submitted:
        self.note("job_submit", spec)
        return {
            "id": JOB,
            "state": "announced",
            "shards": 16,
            "cap": format_mcc(spec.cap),
            "deadline": spec.deadline,
            "warnings": ["small committee: you trust its quorum"],
        }

    def summary(self, job_id: str) -> JobSummary:
        return {
            "id": job_id,
            "kind": "infer",
            "state": self.state,
            "researcher": ALICE,
            "shards": self.shards(),
            "cap": "50",
            "deadline": 1_900_000_000,
            "seconds": 61.0,
            "note": "",
        }

    def shards(self) -> ShardCounts:
        return {"total": 16, "accepted": 4, "rejected": 1, "reissued": 2}

    async def job_list(self) -> list[JobSummary]:
        self.note("job_list")
        return [self.summary(JOB), self.summary(OTHER)]

    async def job_show(self, job_id: bytes) -> JobDetail:
        self.note("job_show", job_id)
        if "0x" + job_id.hex() not in (JOB, OTHER):
            raise ControlError("not-found", f"no job 0x{job_id.hex()}", "see: meshd job ls")
        return {
            **self.summary("0x" + job_id.hex()),
            "program": "0x" + "22" * 32,
            "data": "0x" + "33" * 32,
            "rows": 2000,
            "price": "0.002",
            "orchestrator": ALICE,
            "committee": [ALICE] * 3,
            "quorum": 2,
            "term": 0,
            "certified_seq": 5,
            "workers": [
                {
                    "account": ALICE,
                    "accepted": 4,
                    "rejected": 0,
                    "voided": 0,
                    "leases": 5,
                    "lost": 1,
                    "finding": "",
                }
            ],
            "audits": [],
            "escrow": {"deposited": "50", "burnt": "0.5", "paid": "0", "refunded": "0"},
            "anchors": [],
            "output": "",
            "rounds": None,
        }

    async def job_why(self, job_id: bytes) -> JobWhy:
        self.note("job_why", job_id)
        return {
            "id": "0x" + job_id.hex(),
            "state": "running",
            "note": "",
            "height": 12,
            "shards": [
                {
                    "round": 0,
                    "shard": at,
                    "attempt": 1,
                    "state": "free",
                    "worker": "",
                    "reason": "no worker has it; attempt 0 ended: lapsed",
                }
                for at in range(30)
            ],
            "nodes": [
                {"address": ALICE, "state": "price", "reason": "it asks 2, the job pays 1\x1b[2J"}
            ],
        }

    async def job_log(self, job_id: bytes, after: int) -> LogPage:
        self.note("job_log", job_id, after)
        kind = "assignment" if after else "job-terms"
        return {
            "lines": [
                {
                    "term": 0,
                    "seq": after + 1,
                    "height": 7,
                    "kind": kind,
                    "signer": ALICE,
                    "text": "shard 3" if after else "",
                    "digest": "0x" + "66" * 32,
                }
            ],
            "next": None if after else 1,
        }

    async def job_parts(self, job_id: bytes) -> list[JobPart]:
        self.note("job_parts", job_id)
        return [{"number": 3, "start": 384, "stop": 512, "digest": "0x" + "77" * 32}]

    async def job_part(self, job_id: bytes, number: int, path: Path) -> ResultFile:
        self.note("job_part", job_id, number, path)
        return {"path": str(path), "bytes": 9, "digest": "0x" + "44" * 32, "rows": 1}

    async def job_watch(self, job_id: bytes, send: SendEvent) -> None:
        self.note("job_watch", job_id)
        self.watchers += 1
        try:
            while True:
                event = await self.events.receive()
                if isinstance(event, Exception):
                    raise event
                await send(event)
                if event["state"] in ENDED:
                    return
        finally:
            self.watchers -= 1

    def happens(self, state: JobState, text: str = "something") -> None:
        """Let the watched job come into *state*."""
        self.send_events.send_nowait(
            {"time": 0.0, "event": "news", "text": text, "state": state, "shards": self.shards()}
        )

    async def job_replay(self, job_id: bytes, only: int | None, send: SendReplay) -> None:
        self.note("job_replay", job_id, only)
        self.watchers += 1
        try:
            for event in self.replayed:
                if isinstance(event, Exception):
                    raise event
                await send(event)
            if not self.replayed:
                await trio.sleep_forever()
        finally:
            self.watchers -= 1

    def replays(self, *results: ReplayResult) -> None:
        """Let a replay find these *results*, of one shard each, and the last one in the end."""
        for at, result in enumerate(results):
            self.replayed += [self._replay_event("shard", result, at)]
        self.replayed += [self._replay_event(event, results[-1], 0) for event in ("round", "end")]

    def _replay_event(
        self, event: Literal["shard", "round", "end"], result: ReplayResult, at: int
    ) -> ReplayEvent:
        return {
            "event": event,
            "result": result,
            "text": f"{event} {at}: {result}\x1b[2J",
            "round": 0,
            "rounds": 1,
            "done": at + 1,
            "total": 2,
            "state": "0x" + "88" * 32,
            "logged": "0x" + "88" * 32,
            "shards": [
                {"round": 0, "shard": at, "worker": ALICE, "result": result, "audit": "accepted"}
            ],
        }

    async def job_cancel(self, job_id: bytes) -> JobSummary:
        self.note("job_cancel", job_id)
        self.state = "cancelled"
        return self.summary("0x" + job_id.hex())

    async def job_result(self, job_id: bytes, path: Path) -> ResultFile:
        self.note("job_result", job_id, path)
        return {"path": str(path), "bytes": 10, "digest": "0x" + "44" * 32, "rows": 2}

    async def job_receipts(self, job_id: bytes) -> list[ReceiptInfo]:
        self.note("job_receipts", job_id)
        return [
            {
                "kind": "work",
                "shard": 3,
                "attempt": 0,
                "account": ALICE,
                "units": 10**9,
                "charged": "0",
                "amount": "0.002",
                "log_seq": 4,
            }
        ]


@pytest.fixture
def fake_node() -> FakeNode:
    """What stands behind the control API of `daemon_dir`."""
    return FakeNode()


@pytest.fixture
async def daemon_dir(fake_node: FakeNode, tmp_path: Path, nursery: trio.Nursery) -> Path:
    """The data directory of a running (fake) daemon."""
    directory = tmp_path / "data"
    directory.mkdir()
    await nursery.start(serve, fake_node, directory / "meshd.sock")
    return directory


@pytest.fixture
async def client(daemon_dir: Path) -> Client:
    """A client of that daemon; its calls block, so they belong into threads."""
    return connect(daemon_dir, timeout_s=20)
