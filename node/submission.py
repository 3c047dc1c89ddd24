"""From a job description to the terms of a job: checked, priced, with its blobs in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshd.config.amounts import format_mcc
from meshd.config.job import JobSpec, check_cap
from meshd.ledger.draws import PPM
from meshd.ledger.settlement import BURN_PPM, amount_of
from meshd.node.ports import Ports
from meshd.node.researcher import SubmitError
from meshd.node.workloads.datasetfile import DatasetFile, open_dataset
from meshd.node.workloads.infer import InferPlan, shard_count
from meshd.node.workloads.planning import memory_bytes
from meshd.node.workloads.program import Program, parse_program, refuse_foreign
from meshd.p2p.codec import digest
from meshd.p2p.identity import NOBODY, Address
from meshd.p2p.messages import ZERO, Capability, JobTerms


@dataclass(frozen=True)
class Draft:
    """Terms that can be submitted, and what their researcher should know of them."""

    terms: JobTerms
    plan: InferPlan
    warnings: tuple[str, ...]


def read_program(path: Path) -> tuple[bytes, Program]:
    """Return a program's file and what it holds; raises WorkloadError, SubmitError."""
    refuse_foreign(path.name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SubmitError(
            f"program {path} cannot be read ({error.strerror}): name the file that "
            "`meshd program export` wrote"
        ) from error
    return data, parse_program(data)


async def draft_job(ports: Ports, spec: JobSpec) -> Draft:
    """Check a description against its program, its data, this network and the clock.

    Puts program and data into the blob store. Raises SubmitError, ConfigError, WorkloadError.
    """
    now = int(ports.wall())
    if spec.deadline <= now:
        raise SubmitError(
            f"deadline = {spec.deadline} (Unix seconds) has passed, it is {now}: "
            'set deadline to a later time, such as "2h"'
        )
    data, program = read_program(spec.program)
    dataset = open_dataset(spec.data)
    orchestrator = await _orchestrator(ports, Address(spec.orchestrator))
    terms = _terms(ports, spec, digest(data), program, dataset, orchestrator)
    plan = InferPlan(terms, program, dataset.manifest)
    check_cap(spec, plan.units(0))
    _check_whole(terms, plan)
    warnings = _check_workers(ports, terms)
    ports.blobs.put(data)
    ports.blobs.put(dataset.manifest_bytes)
    for index in range(len(dataset.manifest.chunks)):
        ports.blobs.put(dataset.read_chunk(index))
    return Draft(terms, plan, warnings)


async def _orchestrator(ports: Ports, wished: Address) -> Address:
    """Return who is to run the job; zero leaves it to the ranking of those with stake."""
    if wished == NOBODY and not await ports.chain.orchestrators():
        raise SubmitError(
            "no orchestrator has active stake on this chain: name one in job.toml "
            '(orchestrator = "0x..."), or wait until one is registered'
        )
    return wished


def _terms(
    ports: Ports,
    spec: JobSpec,
    program_digest: bytes,
    program: Program,
    dataset: DatasetFile,
    orchestrator: Address,
) -> JobTerms:
    rows = dataset.manifest.rows
    needed = memory_bytes(program, min(spec.rows_per_shard, rows))
    return JobTerms(
        network=ports.domain.network,
        workload=spec.workload,
        researcher=ports.address,
        orchestrator=orchestrator,
        program=program_digest,
        data=dataset.manifest.dataset_id,
        rows=rows,
        shards=shard_count(rows, spec.rows_per_shard),
        rows_per_shard=spec.rows_per_shard,
        rounds=1,
        initial_state=ZERO,
        hyperparameters=(),
        seed=spec.seed_bytes,
        price=spec.price,
        cap=spec.cap,
        orchestrator_share=spec.pay.orchestrator_share,
        aggregator_share=spec.pay.aggregator_share,
        audit_budget=spec.audit.budget,
        audit_rows=spec.audit_rows,
        probation_rows=spec.probation_rows,
        probation_shards=spec.audit.probation_shards,
        span_shards=32,
        audit_shards=1,
        probation_span_shards=8,
        second_audit_share=spec.audit.second_share,
        retention=spec.audit.retention,
        max_unsettled=spec.pay.max_unsettled,
        epoch_limit=min(spec.epoch_limit, spec.cap),
        window=spec.time.window,
        work_deadline=spec.deadline,
        settle_deadline=spec.settle_deadline,
        beacon_source="blockhash",
        lag=spec.time.lag,
        silence=spec.audit.silence,
        challenge_blocks=spec.audit.challenge_blocks,
        audit_blocks=spec.audit.blocks,
        lease_blocks=spec.time.lease_blocks,
        memory_bytes=max(needed, spec.need.memory),
        device=spec.need.device,
        workers=spec.workers,
        allow_tolerance=False,
    )


def cost_of(terms: JobTerms, plan: InferPlan) -> int:
    """Return what the whole job may cost with its services and audits, deposit's burn included."""
    work = sum(amount_of(plan.units(shard), terms.price) for shard in range(terms.shards))
    shares = terms.orchestrator_share + terms.aggregator_share + terms.audit_budget
    return -(-work * (PPM + shares) // (PPM - BURN_PPM)) + terms.shards


def _check_whole(terms: JobTerms, plan: InferPlan) -> None:
    needed = cost_of(terms, plan)
    if terms.cap < needed:
        raise SubmitError(
            f"cap = {format_mcc(terms.cap)!r} MCC does not pay for all {terms.shards} shards: "
            f"with services, audits and the burnt share that is {format_mcc(needed)} MCC: "
            "raise cap, lower price, or take fewer rows"
        )


def _check_workers(ports: Ports, terms: JobTerms) -> tuple[str, ...]:
    """Raise SubmitError if workers are known and none of them matches; warn of small numbers."""
    workers = [
        signed
        for signed in ports.network.capabilities()
        if "worker" in signed.message.roles
        and (not terms.workers or signed.signer in terms.workers)
    ]
    if not workers:
        raise SubmitError(
            "no worker is known on this network: check `meshd peers` and the bootstrap peers, "
            "or wait for one to join"
        )
    reasons = [_mismatch(signed.message, terms) for signed in workers]
    if all(reasons):
        raise SubmitError(f"none of the {len(workers)} known workers matches the job: {reasons[0]}")
    matching = reasons.count("")
    if matching < 2:
        return (f"only {matching} worker matches the job: if it leaves, the job waits",)
    return ()


def _mismatch(worker: Capability, terms: JobTerms) -> str:
    if worker.ask > terms.price:
        asked, paid = format_mcc(worker.ask), format_mcc(terms.price)
        return f"price = {paid} MCC per 10^9 units is below the {asked} that it asks"
    if worker.memory_bytes < terms.memory_bytes:
        return f"it offers {worker.memory_bytes} bytes of memory, need.memory is " + str(
            terms.memory_bytes
        )
    if terms.device not in ("any", worker.device):
        return f"it has a {worker.device}, need.device is {terms.device}"
    return ""
