"""The Node port: what the control API needs of a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from meshd.config.job import JobSpec
from meshd.node.control.api import (
    Earnings,
    JobDetail,
    JobPart,
    JobSummary,
    JobWhy,
    LogPage,
    PeerInfo,
    ReceiptInfo,
    ResultFile,
    SendEvent,
    SendReplay,
    Staked,
    Status,
    Submitted,
    Wallet,
)


class Node(Protocol):
    """What the control API needs of a daemon.

    Each method raises ControlError with the cure; ConfigError, WorkloadError, IdentityError,
    NetworkError and ChainError are translated by the server. Job ids come complete and well
    formed (32 bytes); an unknown one is ControlError("not-found").
    """

    async def status(self) -> Status:
        """Return the daemon in one glance; from memory, without asking anybody."""
        ...

    async def peers(self) -> list[PeerInfo]:
        """Return the connected peers."""
        ...

    async def wallet(self) -> Wallet:
        """Return what the node's account holds, asked of the chain now."""
        ...

    async def stake(self, amount: int) -> Staked:
        """Register if need be, stake *amount* (smallest unit), return when it is on chain."""
        ...

    async def pause(self) -> Status:
        """Take no new shards until `resume`, over restarts too; those it has are finished."""
        ...

    async def resume(self) -> Status:
        """Take shards again."""
        ...

    async def earnings(self) -> Earnings:
        """Return what the account that is paid has earned."""
        ...

    async def job_submit(self, spec: JobSpec) -> Submitted:
        """Check and store program and data, open the escrow, announce the job."""
        ...

    async def job_retry(self, job_id: bytes, deadline_s: int | None) -> Submitted:
        """Submit the terms of a job that failed or was cancelled again.

        Its work may take *deadline_s* seconds from now; None: as long as the first time.
        """
        ...

    async def job_list(self) -> list[JobSummary]:
        """Return the jobs that this daemon knows, the newest first."""
        ...

    async def job_show(self, job_id: bytes) -> JobDetail:
        """Return everything known of a job."""
        ...

    async def job_why(self, job_id: bytes) -> JobWhy:
        """Return why the job is not further: a reason for each pending shard and each node."""
        ...

    async def job_log(self, job_id: bytes, after: int) -> LogPage:
        """Return the entries of the job's log after batch *after* (0: from the beginning)."""
        ...

    async def job_watch(self, job_id: bytes, send: SendEvent) -> None:
        """Send the job as it is now, then every event; return when it has ended.

        `send` waits until the client has read; it is cancelled when the client leaves.
        """
        ...

    async def job_replay(self, job_id: bytes, only: int | None, send: SendReplay) -> None:
        """Compute the closed rounds of a training job again (or *only* that one) and compare.

        Sends an event for each shard and each round, and one for the end. Of any job that this
        daemon can follow or has followed.
        """
        ...

    async def job_cancel(self, job_id: bytes) -> JobSummary:
        """Take the job back before its start; after it, stop it: what passed is paid."""
        ...

    async def job_result(self, job_id: bytes, path: Path) -> ResultFile:
        """Write the final output to *path* (absolute), replacing it only when complete."""
        ...

    async def job_parts(self, job_id: bytes) -> list[JobPart]:
        """Return the parts of the result that are accepted, or closed, by now."""
        ...

    async def job_part(self, job_id: bytes, number: int, path: Path) -> ResultFile:
        """Write a part of the result to *path* (absolute), as `job_result` does the whole."""
        ...

    async def job_receipts(self, job_id: bytes) -> list[ReceiptInfo]:
        """Return the job's receipts so far, in the order of its log."""
        ...
