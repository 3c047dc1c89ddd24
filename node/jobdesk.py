"""What a daemon tells and does about its user's jobs: that half of the control API's Node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meshd.config.amounts import format_mcc
from meshd.config.job import JobSpec
from meshd.ledger.chain import Anchored, JobOnChain
from meshd.ledger.evm_chain import EvmChain
from meshd.ledger.joblog import Genesis
from meshd.ledger.rounds import is_training
from meshd.node import answers
from meshd.node.control.api import (
    ENDED,
    Anchor,
    ControlError,
    JobDetail,
    JobEvent,
    JobPart,
    JobSummary,
    JobWhy,
    LogPage,
    ReceiptInfo,
    ResultFile,
    SendEvent,
    SendReplay,
    Submitted,
)
from meshd.node.control.api import JobState as JobStateName
from meshd.node.failing import missing_blobs
from meshd.node.jobs import JobRecord
from meshd.node.node import Node
from meshd.node.parts import PartError, parts_of, read_part
from meshd.node.replaydesk import tell_replay
from meshd.node.researcher import SubmitError
from meshd.node.submission import SHORTEST_S, draft_job
from meshd.node.submitted import SubmittedJob
from meshd.node.why import Candidate, job_text, node_reasons, shard_reasons
from meshd.node.workloads.errors import RowsError, WorkloadError
from meshd.node.workloads.rows import unpack
from meshd.p2p.blobs import BlobError
from meshd.p2p.codec import digest
from meshd.p2p.identity import NOBODY, hex_address
from meshd.p2p.libp2p import Libp2pNetwork
from meshd.p2p.messages import JobTerms

WATCH_S = 2.0


@dataclass(frozen=True)
class JobDesk:
    """Answers for the jobs that were submitted through this daemon."""

    node: Node
    network: Libp2pNetwork
    chain: EvmChain
    replaying: set[bytes] = field(default_factory=set, kw_only=True)
    """Jobs that are being replayed: one replay of each at a time."""

    async def job_submit(self, spec: JobSpec) -> Submitted:
        """Check and store program and data, open the escrow, announce the job."""
        await self.chain.head()  # one that cannot be reached is told at once, not waited for
        try:
            draft = await draft_job(self.node.ports, spec)
        except SubmitError as error:
            raise ControlError("usage", str(error)) from error
        return await self._open(draft.terms, draft.warnings)

    async def _open(self, terms: JobTerms, warnings: Sequence[str]) -> Submitted:
        """Submit a job of these terms and return when its escrow is open."""
        try:
            job = await self.node.researcher.submit(terms)
            outcome = await self.chain.wait(f"open:{job.id.hex()}")
        except SubmitError as error:
            raise ControlError("usage", str(error)) from error
        if outcome.error is not None:
            raise ControlError("failed", f"the escrow was not opened: {outcome.error}")
        return Submitted(
            id="0x" + job.id.hex(),
            state=job.state.value,
            shards=job.counts.total,
            cap=format_mcc(terms.cap),
            deadline=terms.work_deadline,
            warnings=list(warnings),
        )

    async def job_list(self) -> list[JobSummary]:
        """Return the jobs that this daemon submitted, the newest first."""
        return [self._summary(job) for job in reversed(self.node.researcher.submitted.values())]

    def _job(self, job_id: bytes) -> SubmittedJob:
        job = self.node.researcher.submitted.get(job_id)
        if job is None:
            raise ControlError(
                "not-found",
                f"no job 0x{job_id.hex()} was submitted by this daemon",
                "see `meshd job ls`",
            )
        return job

    def _summary(self, job: SubmittedJob) -> JobSummary:
        terms = job.terms.message
        state: JobStateName = job.state.value
        return JobSummary(
            id="0x" + job.id.hex(),
            kind=terms.workload,
            state=state,
            researcher=hex_address(terms.researcher),
            shards=answers.shard_counts(job.counts),
            cap=format_mcc(terms.cap),
            deadline=terms.work_deadline,
            seconds=round((job.ended or self.node.ports.wall()) - job.created, 1),
            note=job.detail,
        )

    async def job_show(self, job_id: bytes) -> JobDetail:
        """Return everything known of a job."""
        job = self._job(job_id)
        terms = job.terms.message
        on_chain = await self.chain.job(job_id)
        view = await self.node.researcher.view_of(job)
        record = self.node.jobs.records.get(job_id)
        genesis = view.job.genesis if view is not None else None
        if genesis is None and record is not None and record.started is not None:
            genesis = Genesis.from_start(record.started, record.orchestrator, terms.lag)
        amounts = (0, 0, 0, 0)
        if on_chain is not None:
            amounts = (on_chain.deposited, on_chain.burnt, on_chain.paid, on_chain.refunded)
        deposited, burnt, paid, refunded = (format_mcc(amount) for amount in amounts)
        return JobDetail(
            **self._summary(job),
            program="0x" + terms.program.hex(),
            data="0x" + terms.data.hex(),
            rows=terms.rows,
            price=format_mcc(terms.price),
            orchestrator=hex_address(genesis.orchestrator if genesis else terms.orchestrator),
            committee=[hex_address(member) for member in genesis.committee] if genesis else [],
            quorum=genesis.quorum if genesis else 0,
            term=view.state.term if view else 0,
            certified_seq=view.seq if view else 0,
            workers=answers.worker_shares(view.state) if view else [],
            audits=answers.audit_infos(view.state) if view else [],
            escrow={"deposited": deposited, "burnt": burnt, "paid": paid, "refunded": refunded},
            anchors=await self._anchors(on_chain) if on_chain is not None else [],
            output="0x" + job.output.hex() if job.output else "",
            rounds=answers.rounds_info(view.state) if view else None,
        )

    async def _anchors(self, job: JobOnChain) -> list[Anchor]:
        head = await self.chain.head()
        events = await self.chain.events(job.opened, head.height)
        return [
            Anchor(
                epoch=event.epoch,
                root="0x" + event.root.hex(),
                total=format_mcc(event.total),
                tx="0x" + event.tx.hex(),
            )
            for event in events
            if isinstance(event, Anchored) and event.job_id == job.job_id
        ]

    async def job_watch(self, job_id: bytes, send: SendEvent) -> None:
        """Send the job as it is now, then every event; return when it has ended."""
        job = self._job(job_id)
        last: tuple[object, ...] = ()
        while True:
            summary = self._summary(job)
            counts = summary["shards"]
            rounds = job.view.state.rounds if job.view is not None else None
            closed = rounds.open if rounds is not None and rounds.training else None
            now = (summary["state"], closed, *counts.values())
            if now != last:
                name = "shards"
                text = f"{counts['accepted']} of {counts['total']} shards accepted"
                if last and last[1] != closed:
                    name = "round"
                if closed is not None:
                    text = f"{closed} of {job.terms.message.rounds} rounds closed; {text}"
                if not last or last[0] != now[0]:
                    name = "state"
                await send(
                    JobEvent(
                        time=self.node.ports.wall(),
                        event=name,
                        text=summary["note"] or text,
                        state=summary["state"],
                        shards=counts,
                    )
                )
                last = now
            if summary["state"] in ENDED:
                return
            await self.node.researcher.wait_changed(WATCH_S)

    async def job_replay(self, job_id: bytes, only: int | None, send: SendReplay) -> None:
        """Compute the closed rounds of a training job again (or *only* that one) and compare."""
        if job_id in self.replaying:
            raise ControlError(
                "again", f"job 0x{job_id.hex()} is being replayed already", "wait for its end"
            )
        self.replaying.add(job_id)
        try:
            await tell_replay(self.node, job_id, only, send)
        finally:
            self.replaying.discard(job_id)

    async def job_cancel(self, job_id: bytes) -> JobSummary:
        """Take the job back before its start; after it, stop it: what passed is paid."""
        job = self._job(job_id)
        try:
            await self.node.researcher.cancel(job_id)
        except SubmitError as error:
            raise ControlError("failed", str(error)) from error
        return self._summary(job)

    async def job_result(self, job_id: bytes, path: Path) -> ResultFile:
        """Write the final output to *path*, replacing it only when complete."""
        job = self._job(job_id)
        if job.output is None:
            raise ControlError(
                "again",
                f"job 0x{job_id.hex()} is {job.state.value} and has no output yet",
                "wait for it with `meshd job watch`",
            )
        try:
            data = self.node.ports.blobs.read(job.output)
        except BlobError as error:
            raise ControlError("failed", f"the output is damaged: {error}") from error
        return _write(path, data, job, digest=job.output)

    async def job_parts(self, job_id: bytes) -> list[JobPart]:
        """Return the parts of the result that are accepted, or closed, by now."""
        view = await self.node.researcher.view_of(self._job(job_id))
        return [
            JobPart(
                number=part.number,
                start=part.start,
                stop=part.stop,
                digest="0x" + part.digest.hex(),
            )
            for part in (parts_of(view.state) if view is not None else [])
        ]

    async def job_part(self, job_id: bytes, number: int, path: Path) -> ResultFile:
        """Write a part of the result to *path*, as `job_result` does the whole."""
        job = self._job(job_id)
        view = await self.node.researcher.view_of(job)
        record = self.node.jobs.records.get(job_id)
        if view is None or record is None:
            raise ControlError(
                "again",
                f"job 0x{job_id.hex()} has not begun, or its log is not followed any more",
                "a job that is over has its whole result: `meshd job result`",
            )
        try:
            data = await read_part(self.node.ports, self.node.jobs, record, view, number)
        except PartError as error:
            raise ControlError("again", str(error), "try again later") from error
        return _write(path, data, job, digest=digest(data))

    async def job_receipts(self, job_id: bytes) -> list[ReceiptInfo]:
        """Return the job's receipts so far, in the order of its log."""
        view = await self.node.researcher.view_of(self._job(job_id))
        return answers.receipt_infos(view.state) if view is not None else []

    async def job_log(self, job_id: bytes, after: int) -> LogPage:
        """Return the entries of the job's log after batch *after* (0: from the beginning)."""
        view = await self.node.researcher.view_of(self._job(job_id))
        return answers.log_page(view.log.batches if view is not None else [], after)

    async def job_why(self, job_id: bytes) -> JobWhy:
        """Return why the job is not further: a reason for each pending shard and each node."""
        job = self._job(job_id)
        terms = job.terms.message
        height = (await self.chain.head()).height
        over = job.state.value in ENDED
        state = job.view.state if job.view is not None and not over else None
        record = self.node.jobs.records.get(job_id)
        note = job.detail
        if not over:
            orchestrator = record.orchestrator if record is not None else NOBODY
            note = _start_text(job, record) or job_text(terms, state, orchestrator)
            missing = missing_blobs(self.node.ports.blobs, terms)
            if missing and not note:
                note = f"{missing[0]} is not on this machine any more: others may not get it"
        return JobWhy(
            id="0x" + job_id.hex(),
            state=job.state.value,
            note=note or ("it is over" if over else ""),
            height=height,
            shards=[answers.shard_why(r) for r in shard_reasons(state, height)] if state else [],
            nodes=[]
            if over
            else [answers.node_why(r) for r in node_reasons(state, terms, self._candidates())],
        )

    def _candidates(self) -> list[Candidate]:
        """Return every node that this one knows, itself too if it works."""
        own = self.node.ports.address
        connected = {peer.address for peer in self.network.peers()}
        offers = {signed.signer: signed.message for signed in self.network.capabilities()}
        return [
            Candidate(address, offers.get(address), address in connected or address == own)
            for address in dict.fromkeys([*offers, *connected])
        ]

    async def job_retry(self, job_id: bytes, deadline_s: int | None) -> Submitted:
        """Submit the terms of a job that failed or was cancelled again.

        Its work may take *deadline_s* seconds from now; None: as long as the first time.
        """
        job = self._job(job_id)
        if job.state.value not in ("failed", "cancelled"):
            raise ControlError(
                "usage",
                f"job 0x{job_id.hex()} is {job.state.value}: only one that failed or was "
                "cancelled can be tried again",
                "submit its description again with `meshd job submit`",
            )
        old, now = job.terms.message, int(self.node.ports.wall())
        seconds = deadline_s if deadline_s is not None else old.work_deadline - int(job.created)
        if seconds < SHORTEST_S:
            raise ControlError(
                "usage", f"a job takes {SHORTEST_S} s at least, not {seconds}", "add --deadline 2h"
            )
        self._check_blobs(old)
        until = now + seconds
        later = until + old.settle_deadline - old.work_deadline
        terms = old.model_copy(update={"work_deadline": until, "settle_deadline": later})
        return await self._open(terms, ())

    def _check_blobs(self, terms: JobTerms) -> None:
        """Raise ControlError unless everything that the job reads is in the blob store."""
        try:
            missing = missing_blobs(self.node.ports.blobs, terms)
        except (BlobError, WorkloadError) as error:
            raise ControlError("failed", f"the job's data is damaged: {error}") from error
        if missing:
            raise ControlError(
                "failed",
                f"{len(missing)} of the job's blobs are not on this machine any more, first "
                f"{missing[0]}",
                "submit its description again with `meshd job submit`",
            )


def _write(path: Path, data: bytes, job: SubmittedJob, *, digest: bytes) -> ResultFile:
    """Write rows, or weights, to *path*, replacing it only when complete."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        count = 0 if is_training(job.terms.message) else unpack(data).count
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ControlError("failed", f"{path} cannot be written: {error.strerror}") from error
    except RowsError as error:
        raise ControlError("failed", f"the output is damaged: {error}") from error
    return ResultFile(path=str(path), bytes=len(data), digest="0x" + digest.hex(), rows=count)


def _start_text(job: SubmittedJob, record: JobRecord | None) -> str:
    """Return why a job has not started; empty once its log can be followed."""
    if record is None:
        return "its escrow is being opened: the transaction is not confirmed yet"
    if record.started is None:
        return f"its escrow is open since block {record.opened.height}; its committee is not drawn"
    return "" if job.view is not None else "its program and data are being read"
