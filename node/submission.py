"""From a job description to the terms of a job: checked, priced, with its blobs in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from meshd.config.amounts import format_mcc
from meshd.config.job import JobSpec, check_cap
from meshd.ledger.draws import PPM
from meshd.ledger.settlement import BURN_PPM, amount_of
from meshd.ledger.terms import terms_problem
from meshd.ledger.works import FEW, sample_size
from meshd.node.ports import Ports
from meshd.node.researcher import SubmitError
from meshd.node.workloads.datasetfile import DatasetFile, open_dataset
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.infer import InferPlan, shard_count
from meshd.node.workloads.planning import check_program, memory_bytes
from meshd.node.workloads.plans import Plan, make_plan
from meshd.node.workloads.program import Program, parse_program, refuse_foreign
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.state import initial_state, with_weights
from meshd.p2p.codec import Signed, digest
from meshd.p2p.identity import NOBODY, Address, hex_address
from meshd.p2p.messages import ZERO, Capability, JobTerms

T = TypeVar("T")

SHORTEST_S = 120
"""Seconds from its submission to its deadline in which the smallest job can be done."""


@dataclass(frozen=True)
class Draft:
    """Terms that can be submitted, and what their researcher should know of them."""

    terms: JobTerms
    plan: Plan
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Inputs:
    """What a description names, read from disk."""

    program_bytes: bytes
    program: Program
    dataset: DatasetFile
    settings: TrainSettings | None = None
    state: bytes = b""
    """The state of round 0; without training empty, as `settings` is None."""


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

    Puts program, data and first state into the blob store. Raises SubmitError, ConfigError,
    WorkloadError.
    """
    now = int(ports.wall())
    if spec.deadline < now + SHORTEST_S:
        raise SubmitError(
            f"deadline = {spec.deadline} (Unix seconds) is {spec.deadline - now} s from now, and "
            f"a job takes {SHORTEST_S} s at least to be begun, checked and ended: "
            'set deadline to a later time, such as "2h"'
        )
    inputs = await _in_thread(partial(_read_inputs, spec))
    orchestrator = await _orchestrator(ports, Address(spec.orchestrator))
    terms = _terms(ports, spec, inputs, orchestrator)
    plan = await _in_thread(partial(make_plan, terms, inputs.program, inputs.dataset.manifest))
    terms = terms.model_copy(
        update={"memory_bytes": max(_memory_needed(terms, plan), spec.need.memory)}
    )
    problem = terms_problem(terms)
    if problem is not None:
        raise SubmitError(f"{problem}: correct job.toml")
    units = await _in_thread(partial(_units, plan))
    check_cap(spec, max(units))
    _check_whole(terms, units)
    workers = _matching_workers(ports, terms, _memory_needed(terms, plan))
    await _check_balance(ports, terms)
    await _store(ports, inputs)
    warnings = _warnings(terms, workers)
    return Draft(terms, plan, warnings)


async def _in_thread(function: Callable[[], T]) -> T:
    """Return what *function* returns; the daemon goes on while it reads and computes."""
    return await trio.to_thread.run_sync(function)


def _read_inputs(spec: JobSpec) -> _Inputs:
    data, program = read_program(spec.program)
    dataset = open_dataset(spec.data)
    if spec.workload == "infer":
        try:
            program.output_schema  # noqa: B018 - it is checked by being made
        except WorkloadError as error:
            raise SubmitError(
                f'program {spec.program} cannot infer: {error}: write workload = "train", or '
                "export the module without --training"
            ) from error
        return _Inputs(data, program, dataset)
    settings = TrainSettings.fill(spec.train.settings)
    try:
        trained_weights(program)
        state = initial_state(data, settings)
    except WorkloadError as error:
        raise SubmitError(f"program {spec.program} cannot be trained: {error}") from error
    if spec.train.start is not None:
        state = _started_from(spec.train.start, state)
    return _Inputs(data, program, dataset, settings, state)


def _started_from(path: Path, state: bytes) -> bytes:
    try:
        refuse_foreign(path.name)
        return with_weights(state, path.read_bytes())
    except OSError as error:
        raise SubmitError(
            f"train.start = {str(path)!r} cannot be read ({error.strerror}): name the file that "
            "`meshd job result` wrote"
        ) from error
    except WorkloadError as error:
        raise SubmitError(f"train.start = {str(path)!r} cannot be used: {error}") from error


async def _store(ports: Ports, inputs: _Inputs) -> None:
    """Put everything that the job is computed from into the blob store."""
    for blob in (inputs.program_bytes, inputs.dataset.manifest_bytes, inputs.state):
        if blob:
            await _in_thread(partial(ports.blobs.put, blob))
    for index in range(len(inputs.dataset.manifest.chunks)):
        await _in_thread(partial(_store_chunk, ports, inputs.dataset, index))


def _store_chunk(ports: Ports, dataset: DatasetFile, index: int) -> None:
    ports.blobs.put(dataset.read_chunk(index))


async def _orchestrator(ports: Ports, wished: Address) -> Address:
    """Return who is to run the job; zero leaves it to the ranking of those with stake."""
    if wished == NOBODY and not await ports.chain.orchestrators():
        raise SubmitError(
            "no orchestrator has active stake on this chain: name one in job.toml "
            '(orchestrator = "0x..."), or wait until one is registered'
        )
    return wished


def _terms(ports: Ports, spec: JobSpec, inputs: _Inputs, orchestrator: Address) -> JobTerms:
    """Return the terms but for the memory that a shard needs: their plan says that."""
    dataset, audit = inputs.dataset, spec.audit
    rows = dataset.manifest.rows
    is_training = inputs.settings is not None
    return JobTerms(
        network=ports.domain.network,
        workload=spec.workload,
        researcher=ports.address,
        orchestrator=orchestrator,
        program=digest(inputs.program_bytes),
        data=dataset.manifest.dataset_id,
        rows=rows,
        shards=spec.train.shards or shard_count(rows, spec.rows_per_shard),
        rows_per_shard=inputs.settings.rows if inputs.settings else spec.rows_per_shard,
        rounds=spec.train.rounds or 1,
        initial_state=digest(inputs.state) if is_training else ZERO,
        hyperparameters=inputs.settings.encode() if inputs.settings else (),
        seed=spec.seed_bytes,
        price=spec.price,
        cap=spec.cap,
        orchestrator_share=spec.pay.orchestrator_share,
        aggregator_share=spec.pay.aggregator_share,
        audit_budget=audit.budget,
        audit_rows=1 if is_training else spec.audit_rows,
        probation_rows=1 if is_training else spec.probation_rows,
        probation_shards=audit.probation_shards,
        span_shards=audit.span_shards,
        audit_shards=min(audit.audit_shards, audit.span_shards),
        probation_span_shards=min(audit.probation_span_shards, audit.span_shards),
        second_audit_share=audit.second_share,
        retention=audit.retention,
        max_unsettled=spec.max_unsettled,
        epoch_limit=min(spec.epoch_limit, spec.cap),
        window=spec.time.window,
        work_deadline=spec.deadline,
        settle_deadline=spec.settle_deadline,
        beacon_source="blockhash",
        lag=spec.time.lag,
        silence=audit.silence,
        challenge_blocks=audit.challenge_blocks,
        audit_blocks=audit.blocks,
        lease_blocks=spec.time.lease_blocks,
        memory_bytes=spec.need.memory,
        device=spec.need.device,
        workers=spec.workers,
        allow_tolerance=False,
    )


def _units(plan: Plan) -> list[int]:
    """Return the compute units of every shard of a round."""
    return [plan.units(shard) for shard in range(plan.terms.shards)]


def _memory_needed(terms: JobTerms, plan: Plan) -> int:
    """Return the bytes that the largest shard needs."""
    if isinstance(plan, InferPlan):
        return memory_bytes(plan.program, min(terms.rows_per_shard, terms.rows))
    return plan.memory_bytes


def cost_of(terms: JobTerms, units: Sequence[int]) -> int:
    """Return what a job may cost whose round has shards of these *units*.

    With its services and audits, and the deposit's burn.
    """
    work = terms.rounds * sum(amount_of(each, terms.price) for each in units)
    shares = terms.orchestrator_share + terms.aggregator_share + terms.audit_budget
    receipts = terms.rounds * len(units)  # each is rounded up
    return -(-work * (PPM + shares) // (PPM - BURN_PPM)) + receipts


def _check_whole(terms: JobTerms, units: Sequence[int]) -> None:
    needed = cost_of(terms, units)
    if terms.cap >= needed:
        return
    if terms.rounds > 1:
        work, cure = f"{terms.rounds} rounds of {terms.shards} shards", "take fewer rounds"
    else:
        work, cure = f"all {terms.shards} shards", "take fewer rows"
    raise SubmitError(
        f"cap = {format_mcc(terms.cap)!r} MCC does not pay for {work}: "
        f"with services, audits and the burnt share that is {format_mcc(needed)} MCC: "
        f"raise cap, lower price, or {cure}"
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


def _matching_workers(ports: Ports, terms: JobTerms, needed: int) -> int:
    """Return how many of the workers that are known match the terms.

    Raises SubmitError if none is known, or none matches; *needed* is the memory of a shard.
    """
    workers = [
        signed for signed in ports.network.capabilities() if "worker" in signed.message.roles
    ]
    if not workers:
        raise SubmitError(
            "no worker is known on this network: check `meshd peers` and the bootstrap peers, "
            "or wait for one to join"
        )
    largest = max(signed.message.memory_bytes for signed in workers)
    if largest < terms.memory_bytes:
        raise SubmitError(_too_large(terms, needed, largest, len(workers)))
    reasons = [_mismatch(signed, terms) for signed in workers]
    if all(reasons):
        raise SubmitError(
            f"no worker matches the job, {len(workers)} are known; "
            f"{hex_address(workers[0].signer)}: {reasons[0]}: change job.toml, or wait for others"
        )
    return reasons.count("")


def _too_large(terms: JobTerms, needed: int, largest: int, workers: int) -> str:
    """Say by how much no worker has the memory, and what makes the job smaller."""
    smaller = "take a smaller train.batch" if terms.hyperparameters else "lower rows_per_shard"
    if needed < terms.memory_bytes:
        why, cure = f"need.memory asks for {_mib(terms.memory_bytes)}", "lower need.memory"
    else:
        why, cure = f"a shard needs {_mib(needed)} of memory", f"{smaller} or a smaller program"
    return (
        f"{why}, and the largest of {workers} known workers offers {_mib(largest)}: "
        f"{_mib(terms.memory_bytes - largest)} are missing: {cure}, or wait for a larger worker"
    )


def _mib(size: int) -> str:
    """Return *size* bytes in MiB, rounded up."""
    return f"{-(-size // (1 << 20))} MiB"


def _warnings(terms: JobTerms, workers: int) -> tuple[str, ...]:
    """Return what a researcher should know before the job begins."""
    warnings = []
    if workers < 2:
        warnings.append(f"only {workers} worker matches the job: if it leaves, the job waits")
    if not terms.hyperparameters:
        return tuple(warnings)
    if terms.shards < FEW:
        warnings.append(
            f"a round of {terms.shards} shards is too small to compare their directions: every "
            f"shard is computed again to check it; with {FEW} or more a small part is"
        )
    each = -(-terms.rounds * terms.shards // workers)
    drawn = audited_shards(terms, each)
    if 10 * drawn > each:
        warnings.append(
            f"about {100 * drawn // each} % of the work is computed again to check it: the job is "
            f"short, {each} shards for each of {workers} workers"
        )
    if terms.rows < terms.rows_per_shard:
        warnings.append(
            f"a shard reads {terms.rows_per_shard} rows and the data has {terms.rows}: "
            "every row comes more than once in each shard"
        )
    return tuple(warnings)


def audited_shards(terms: JobTerms, shards: int) -> int:
    """Return how many of a worker's *shards* are computed again when nothing is found."""
    drawn = 0
    for start in range(0, shards, terms.span_shards):
        span = min(terms.span_shards, shards - start)
        drawn += sample_size(terms, span, first=not start)
    return drawn


def _mismatch(signed: Signed[Capability], terms: JobTerms) -> str:
    """Return why a worker cannot work on the job; empty if it can."""
    worker = signed.message
    if terms.workers and signed.signer not in terms.workers:
        return f"it is not one of the {len(terms.workers)} that workers names"
    if worker.ask > terms.price:
        asked, paid = format_mcc(worker.ask), format_mcc(terms.price)
        return f"price = {paid} MCC per 10^9 units is below the {asked} that it asks"
    if worker.memory_bytes < terms.memory_bytes:
        offered, needed = _mib(worker.memory_bytes), _mib(terms.memory_bytes)
        return f"it offers {offered} of memory, a shard takes {needed}"
    if terms.device not in ("any", worker.device):
        return f"it has a {worker.device}, need.device is {terms.device}"
    return ""
