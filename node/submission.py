"""From a job description to the terms of a job: checked, priced, with its blobs in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshd.config.amounts import format_mcc
from meshd.config.job import JobSpec, check_cap
from meshd.ledger.draws import PPM
from meshd.ledger.settlement import BURN_PPM, amount_of
from meshd.ledger.terms import terms_problem
from meshd.node.ports import Ports
from meshd.node.researcher import SubmitError
from meshd.node.workloads.datasetfile import DatasetFile, open_dataset
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.infer import InferPlan, shard_count
from meshd.node.workloads.planning import check_program, memory_bytes
from meshd.node.workloads.program import Program, parse_program, refuse_foreign
from meshd.p2p.codec import Signed, digest
from meshd.p2p.identity import NOBODY, Address, hex_address
from meshd.p2p.messages import ZERO, Capability, JobTerms

SHORTEST_S = 120
"""Seconds from its submission to its deadline in which the smallest job can be done."""


@dataclass(frozen=True)
class Draft:
    """Terms that can be submitted, and what their researcher should know of them."""

    terms: JobTerms
    plan: InferPlan
    warnings: tuple[str, ...]


def read_program(path: Path) -> tuple[bytes, Program]:
    """Return a program's file and what it holds; raises SubmitError, which names the file."""
    try:
        refuse_foreign(path.name)
        data = path.read_bytes()
        program = parse_program(data)
        check_program(program)
    except OSError as error:
        raise SubmitError(
            f"program {path} cannot be read ({error.strerror}): name the file that "
            "`meshd program export` wrote"
        ) from error
    except WorkloadError as error:
        raise SubmitError(f"program {path} cannot be used: {error}") from error
    return data, program


async def draft_job(ports: Ports, spec: JobSpec) -> Draft:
    """Check a description against its program, its data, this network and the clock.

    Puts program and data into the blob store. Raises SubmitError, ConfigError, WorkloadError.
    """
    now = int(ports.wall())
    if spec.deadline < now + SHORTEST_S:
        raise SubmitError(
            f"deadline = {spec.deadline} (Unix seconds) is {spec.deadline - now} s from now, and "
            f"a job takes {SHORTEST_S} s at least to be begun, checked and ended: "
            'set deadline to a later time, such as "2h"'
        )
    data, program = read_program(spec.program)
    dataset = open_dataset(spec.data)
    orchestrator = await _orchestrator(ports, Address(spec.orchestrator))
    terms = _terms(ports, spec, digest(data), program, dataset, orchestrator)
    problem = terms_problem(terms)
    if problem is not None:
        raise SubmitError(f"{problem}: correct job.toml")
    plan = InferPlan(terms, program, dataset.manifest)
    check_cap(spec, plan.units(0))
    _check_whole(terms, plan)
    warnings = _check_workers(ports, terms)
    await _check_balance(ports, terms)
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


async def _check_balance(ports: Ports, terms: JobTerms) -> None:
    """Raise SubmitError, with what is missing, if this account cannot pay the deposit."""
    held = await ports.chain.balance(ports.address)
    if held < terms.cap:
        raise SubmitError(
            f"cap = {format_mcc(terms.cap)!r} MCC is the deposit, and this account holds "
            f"{format_mcc(held)} MCC: {format_mcc(terms.cap - held)} MCC are missing: "
            "send them to it, or lower cap"
        )


def _check_workers(ports: Ports, terms: JobTerms) -> tuple[str, ...]:
    """Raise SubmitError if workers are known and none of them matches; warn of small numbers."""
    workers = [
        signed for signed in ports.network.capabilities() if "worker" in signed.message.roles
    ]
    if not workers:
        raise SubmitError(
            "no worker is known on this network: check `meshd peers` and the bootstrap peers, "
            "or wait for one to join"
        )
    reasons = [_mismatch(signed, terms) for signed in workers]
    if all(reasons):
        raise SubmitError(
            f"no worker matches the job, {len(workers)} are known; "
            f"{hex_address(workers[0].signer)}: {reasons[0]}: change job.toml, or wait for others"
        )
    matching = reasons.count("")
    if matching < 2:
        return (f"only {matching} worker matches the job: if it leaves, the job waits",)
    return ()


def _mismatch(signed: Signed[Capability], terms: JobTerms) -> str:
    """Return why a worker cannot work on the job; empty if it can."""
    worker = signed.message
    if terms.workers and signed.signer not in terms.workers:
        return f"it is not one of the {len(terms.workers)} that workers names"
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
