"""From a job description to terms: what is drafted, what it may cost, and what is refused."""

import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from meshd.config.amounts import format_mcc
from meshd.config.errors import JobSpecError
from meshd.config.job import parse_job
from meshd.ledger.draws import PPM
from meshd.ledger.settlement import BURN_PPM
from meshd.node.compute.toy import affine_dataset, affine_program
from meshd.node.ports import Ports
from meshd.node.researcher import SubmitError
from meshd.node.submission import Draft, audited_shards, draft_job
from meshd.node.workloads.datasetfile import write_dataset
from meshd.node.workloads.datasets import ColumnData, build_dataset
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.program import Graph, Node, Output, Ref, encode_program, parse_program
from meshd.node.workloads.tensorfile import TensorData, write_tensors
from meshd.node.workloads.tensors import Column
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.state import initial_state, parse_state, result_file
from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain, digest
from meshd.p2p.identity import Address
from meshd.p2p.messages import ZERO, Capability

NOW = 1_900_000_000
ALICE, BOB = Address(b"\xa1" * 20), Address(b"\xb0" * 20)
DOMAIN = Domain("dev", 7, Address(b"\x0e" * 20))
MIB = 1 << 20
WEIGHTS = struct.pack("<8f", *range(8))
TRAIN = {"workload": "train", "train.rounds": 8, "train.shards": 4, "train.batch": 2}


@dataclass(frozen=True)
class Worker:
    """A capability as the network hands it out: who signed it, and what it says."""

    message: Capability
    signer: Address = BOB


def worker(memory: int = 2048 * MIB) -> Worker:
    return Worker(
        Capability(
            roles=("worker",),
            addresses=(),
            device="cpu",
            memory_bytes=memory,
            units_per_second=1,
            ask=0,
            issued=NOW,
        )
    )


@dataclass
class FakePorts:
    """The ports of a researcher's node, as far as a draft needs them."""

    workers: list[Worker] = field(default_factory=lambda: [worker()] * 4)
    held: int = 10**24
    address: Address = ALICE
    domain: Domain = DOMAIN
    blobs: BlobStore = field(default_factory=BlobStore)

    @property
    def chain(self) -> "FakePorts":
        return self

    @property
    def network(self) -> "FakePorts":
        return self

    def wall(self) -> float:
        return float(NOW)

    def capabilities(self) -> list[Worker]:
        return self.workers

    async def orchestrators(self) -> list[Address]:
        return [ALICE]

    async def balance(self, account: Address) -> int:
        assert account == self.address
        return self.held


def loss_program(*, trainable: Iterable[str] = ("weight",)) -> bytes:
    """x -> mean((x * weight - y)^2), rows of eight numbers."""
    graph = Graph(
        inputs=(Column("x", "f32", (8,)), Column("y", "f32", (8,))),
        outputs=(Output("loss", "f32", (), 4),),
        nodes=(Node("mul", (Ref(1), Ref(0))), Node("mse_loss", (Ref(3), Ref(2), "mean"))),
        trainable=tuple(trainable),
    )
    return encode_program(graph, [TensorData("weight", "f32", (8,), WEIGHTS)])


def numbers(rows: int, width: int = 8) -> ColumnData:
    count = rows * width
    return ColumnData("f32", (rows, width), struct.pack(f"<{count}f", *range(count)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "affine.program").write_bytes(affine_program())
    write_dataset(affine_dataset(64), tmp_path / "affine.data")
    (tmp_path / "loss.program").write_bytes(loss_program())
    columns = {"x": numbers(200), "y": numbers(200)}
    write_dataset(build_dataset(columns, 50), tmp_path / "loss.data")
    return tmp_path


def toml(name: str, changes: dict[str, Any]) -> str:
    keys = {
        "program": f"{name}.program",
        "data": f"{name}.data",
        "price": "1000",
        "cap": "100",
        "deadline": "2h",
    } | changes
    return "".join(
        f"{key} = {value if isinstance(value, int) else repr(value)}\n"
        for key, value in keys.items()
    )


async def drafted(folder: Path, name: str, ports: FakePorts | None = None, **keys: Any) -> Draft:
    changes = {key.replace("__", "."): value for key, value in keys.items()}
    if name == "loss":
        changes = TRAIN | changes
    spec = parse_job(toml(name, changes), now=float(NOW), directory=folder)
    return await draft_job(cast(Ports, ports or FakePorts()), spec)


async def refusal(folder: Path, name: str, ports: FakePorts | None = None, **keys: Any) -> str:
    with pytest.raises((SubmitError, WorkloadError, JobSpecError)) as caught:
        await drafted(folder, name, ports, **keys)
    return str(caught.value)


async def test_an_inference_job_is_cut_into_shards_of_rows(folder: Path) -> None:
    draft = await drafted(folder, "affine", rows_per_shard=10)
    terms = draft.terms
    assert (terms.workload, terms.rounds, terms.shards, terms.rows) == ("infer", 1, 7, 64)
    assert (terms.initial_state, terms.hyperparameters) == (ZERO, ())
    assert (terms.max_unsettled, terms.memory_bytes) == (32, 2048 * MIB)
    assert draft.warnings == ()


async def test_a_training_job_is_rounds_of_shards_over_a_public_state(folder: Path) -> None:
    ports = FakePorts()
    draft = await drafted(folder, "loss", ports, train__lr=1)
    terms, program = draft.terms, loss_program()
    settings = TrainSettings.parse(terms.hyperparameters)
    assert (terms.workload, terms.rounds, terms.shards, terms.rows) == ("train", 8, 4, 200)
    assert terms.rows_per_shard == settings.steps * settings.batch == 14
    assert (settings.lr, settings.total_steps, settings.beta) == (1, 56, 0.9)
    assert terms.initial_state == digest(initial_state(program, settings))
    assert parse_state(ports.blobs.read(terms.initial_state), parse_program(program), settings)
    assert (terms.span_shards, terms.audit_shards, terms.probation_span_shards) == (32, 1, 8)
    assert terms.max_unsettled == 96


async def test_everything_that_a_job_is_computed_from_becomes_a_blob(folder: Path) -> None:
    ports = FakePorts()
    terms = (await drafted(folder, "loss", ports)).terms
    dataset = build_dataset({"x": numbers(200), "y": numbers(200)}, 50)
    assert terms.program == digest(loss_program())
    assert terms.data == dataset.dataset_id
    for blob in (loss_program(), dataset.manifest_bytes, *dataset.chunks):
        assert ports.blobs.read(digest(blob)) == blob


async def test_files_are_read_and_stored_beside_the_event_loop(folder: Path, monkeypatch) -> None:
    put, threads = BlobStore.put, set[str]()

    def noted(self: BlobStore, data: bytes, **options: Any) -> bytes:
        threads.add(threading.current_thread().name)
        return put(self, data, **options)

    monkeypatch.setattr(BlobStore, "put", noted)
    await drafted(folder, "loss")
    assert threads
    assert threading.current_thread().name not in threads


async def test_training_goes_on_from_an_earlier_result(folder: Path) -> None:
    other = struct.pack("<8f", *range(8, 16))
    before = write_tensors([TensorData("weight", "f32", (8,), other)])
    (folder / "before.safetensors").write_bytes(before)
    ports = FakePorts()
    terms = (await drafted(folder, "loss", ports, train__start="before.safetensors")).terms
    state = ports.blobs.read(terms.initial_state)
    assert result_file(state, parse_program(loss_program())) == before


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("none.safetensors", None, "No such file"),
        ("before.pt", b"", "pickle"),
        ("before.safetensors", b"xyz", "cannot be used"),
        (
            "before.safetensors",
            write_tensors([TensorData("weight", "f32", (4,), WEIGHTS[:16])]),
            "start from a result of the same program",
        ),
    ],
)
async def test_weights_that_do_not_fit_are_refused(folder: Path, name, data, told) -> None:
    if data is not None:
        (folder / name).write_bytes(data)
    refused = await refusal(folder, "loss", train__start=name)
    assert refused.startswith("train.start = ")
    assert told in refused


async def test_a_cap_that_does_not_pay_for_every_round_is_refused_with_the_sum(
    folder: Path,
) -> None:
    draft = await drafted(folder, "loss")
    work = 8 * 4 * draft.plan.units(0) * draft.terms.price // 10**9
    shares = PPM + 20_000 + 30_000 + 100_000
    needed = -(-work * shares // (PPM - BURN_PPM)) + 32
    told = await refusal(folder, "loss", cap=format_mcc(needed - 1))
    assert "does not pay for 8 rounds of 4 shards" in told
    assert f"that is {format_mcc(needed)} MCC: raise cap, lower price, or take fewer rounds" in told
    await drafted(folder, "loss", cap=format_mcc(needed))


async def test_a_cap_below_one_shard_names_both(folder: Path) -> None:
    told = await refusal(folder, "loss", cap="0.0000001")
    assert "below the price of one shard" in told
    assert told.endswith("lower price or train.steps = 7")


async def test_a_program_without_a_loss_cannot_be_trained(folder: Path) -> None:
    (folder / "loss.program").write_bytes(affine_program())
    told = await refusal(folder, "loss")
    assert "loss.program cannot be trained" in told
    assert "it has no loss" in told


async def test_a_program_without_anything_to_train_is_refused(folder: Path) -> None:
    (folder / "loss.program").write_bytes(loss_program(trainable=()))
    assert "no trainable weight" in await refusal(folder, "loss")


async def test_a_program_with_a_loss_cannot_infer(folder: Path) -> None:
    told = await refusal(folder, "affine", program="loss.program", data="loss.data")
    assert "loss.program cannot infer" in told
    assert 'workload = "train"' in told


@pytest.mark.parametrize("name", ["affine", "loss"])
async def test_data_that_does_not_fit_the_inputs_is_refused_with_both(folder, name) -> None:
    told = await refusal(folder, name, data="loss.data" if name == "affine" else "affine.data")
    assert "the program reads x f32[" in told
    assert "the dataset has x f32[" in told


async def test_data_that_is_cut_off_is_refused(folder: Path) -> None:
    whole = (folder / "loss.data").read_bytes()
    (folder / "loss.data").write_bytes(whole[:-1])
    assert "its chunks need" in await refusal(folder, "loss")


async def test_a_job_larger_than_every_workers_memory_says_by_how_much(folder: Path) -> None:
    ports = FakePorts([worker(64 * MIB), worker(100 * MIB)])
    told = await refusal(folder, "affine", ports)
    assert "need.memory asks for 2048 MiB, and the largest of 2 known workers offers 100" in told
    assert "1948 MiB are missing: lower need.memory" in told
    told = await refusal(
        folder, "loss", ports, need__memory="1MiB", train__batch=1 << 18, cap="100000"
    )
    assert "a shard needs " in told
    assert "are missing: take a smaller train.batch" in told


async def test_a_job_for_which_one_worker_is_large_enough_is_drafted(folder: Path) -> None:
    ports = FakePorts([worker(64 * MIB), worker()])
    assert (await drafted(folder, "affine", ports)).warnings == (
        "only 1 worker matches the job: if it leaves, the job waits",
    )


async def test_what_a_short_training_job_pays_for_checking_is_said(folder: Path) -> None:
    (warning,) = (await drafted(folder, "loss")).warnings
    assert warning.startswith("about 25 % of the work is computed again")
    assert "8 shards for each of 4 workers" in warning


async def test_rounds_of_few_shards_and_little_data_are_told(folder: Path) -> None:
    columns = {"x": numbers(10), "y": numbers(10)}
    write_dataset(build_dataset(columns, 50), folder / "loss.data")
    told = "\n".join((await drafted(folder, "loss", train__shards=3)).warnings)
    assert "a round of 3 shards is too small" in told
    assert "about 100 % of the work" in told
    assert "a shard reads 14 rows and the data has 10" in told


async def test_a_long_job_is_audited_one_shard_in_32(folder: Path) -> None:
    draft = await drafted(folder, "loss", cap="1000000", train__rounds=4000)
    assert not draft.warnings
    assert audited_shards(draft.terms, 32) == 8
    assert audited_shards(draft.terms, 3200) == 8 + 99


async def test_an_account_that_cannot_pay_the_deposit_is_told_what_is_missing(folder) -> None:
    told = await refusal(folder, "loss", FakePorts(held=10**18))
    assert "99 MCC are missing" in told
