"""Jobs made of a module and tensors: from them to a daemon's files, and from results to tensors.

The files lie in a temporary directory until the daemon has taken them; the results come back as
tensors. torch is imported by those who call this, never by the daemon or the command.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from meshd.node.control.api import (
    ENDED,
    ControlError,
    JobDetail,
    JobEvent,
    JobSummary,
    ReceiptInfo,
)
from meshd.node.transports import iterate_blocking, run_blocking

if TYPE_CHECKING:
    from torch import Tensor, nn

    from meshd.node.calls import AsyncClient

POLL_S: Final = 0.5
CHUNK_ROWS: Final = 1024
"""Rows of a dataset that are fetched together."""

Columns = dict[str, "Tensor"]
Result = tuple[range, Columns]
"""Which rows (training: which rounds), and their tensors by name."""


PROGRAM: Final = "module.program"
DATA: Final = "rows.data"


@dataclass(frozen=True)
class ModuleInputs:
    """A module and what it is to read."""

    module: nn.Module
    rows: Mapping[str, Tensor]
    outputs: Sequence[str] | None = None
    training: bool = False

    def write(self, directory: Path) -> None:
        """Write them into *directory*, as a program and a dataset."""
        from meshd.node.arrays import columns_from_tensors, export_module
        from meshd.node.workloads.datasetfile import write_dataset
        from meshd.node.workloads.datasets import build_dataset

        columns = columns_from_tensors(self.rows)
        dataset = build_dataset(columns, CHUNK_ROWS)
        data = export_module(self.module, self.rows, self.outputs, training=self.training)
        (directory / PROGRAM).write_bytes(data)
        write_dataset(dataset, directory / DATA)


async def submit_module(
    client: AsyncClient, inputs: ModuleInputs, keys: Mapping[str, object]
) -> AsyncJob:
    """Write program, dataset and description of a job, have them taken, return the job."""
    call = client.transport.call
    with await call(TemporaryDirectory) as folder:
        await call(partial(inputs.write, Path(folder)))
        text = job_toml({"program": PROGRAM, "data": DATA, **keys})
        submitted = await client.submit_text(text, Path(folder))
    return AsyncJob(client, submitted["id"], "train" if inputs.training else "infer")


def job_toml(keys: Mapping[str, object]) -> str:
    """Return *keys*, whose dicts are tables, as TOML."""
    lines, tables = [], []
    for name, value in keys.items():
        if isinstance(value, Mapping):
            tables.append(f"\n[{name}]\n" + job_toml(value))
        elif value is not None:
            lines.append(f"{name} = {_toml_value(value)}\n")
    return "".join(lines + tables)


def _toml_value(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(part) for part in value) + "]"
    if isinstance(value, Path):
        value = str(value.absolute())
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # nan and inf are TOML's words too; the daemon says what it thinks
    if isinstance(value, bool | int | float | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise ControlError(
        "usage", f"a {type(value).__name__} cannot stand in job.toml", "give text or a number"
    )


class AsyncJob:
    """A submitted job."""

    def __init__(self, client: AsyncClient, job_id: str, workload: str) -> None:
        self._client = client
        self.id = job_id
        self.workload = workload
        """What is done: infer or train."""

    async def detail(self) -> JobDetail:
        """Return everything that is known of it."""
        return await self._client.job(self.id)

    def events(self) -> AsyncGenerator[JobEvent, None]:
        """Yield the job as it is, then every event until it has ended."""
        return self._client.watch(self.id)

    async def receipts(self) -> list[ReceiptInfo]:
        """Return its receipts so far."""
        return await self._client.receipts(self.id)

    async def cancel(self) -> JobSummary:
        """Take it back, or stop it if it has started: what passed is paid."""
        return await self._client.cancel(self.id)

    async def wait(self) -> JobDetail:
        """Return when everybody is paid; raises ControlError("failed") if it came to nothing."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        detail = await self.detail()
        if detail["state"] != "settled":
            raise _came_to_nothing(detail)
        return detail

    async def fetch(self) -> Columns:
        """Return the result as soon as it is there, before everybody is paid.

        Of inference every output's tensor of shape (rows, ...), of training what
        `load_state_dict` takes. Raises ControlError("failed") if there will be none.
        """
        async with aclosing(self.events()) as events:
            async for event in events:
                if event["state"] == "settling":
                    break
        with await self._client.transport.call(TemporaryDirectory) as folder:
            path = Path(folder) / "result"
            while not await self._is_written(path):
                detail = await self.detail()
                if detail["state"] in ENDED and not detail["output"]:
                    raise _came_to_nothing(detail)
                await self._client.transport.sleep(POLL_S)
            return await self._client.transport.call(partial(_tensors, path, self.workload))

    async def results(self, *, every: int = 1) -> AsyncGenerator[Result, None]:
        """Yield results as they arrive, in any order, as (numbers, tensors by name).

        Of inference a shard's rows once they are accepted; they come again, computed by
        somebody else, if their worker is found to cheat later on. Of training (range(r, r + 1),
        the weights after round r), one round in *every*; one that nobody has any more is left
        out. Raises ControlError("failed") if the job comes to nothing.
        """
        done: dict[int, str] = {}
        async with aclosing(self.events()) as events:
            async for _ in events:
                for part in await self._client.parts(self.id):
                    wanted = self.workload == "infer" or part["stop"] % every == 0
                    if wanted and done.get(part["number"]) != part["digest"]:
                        columns = await self._part(part["number"])
                        if columns is not None:
                            done[part["number"]] = part["digest"]
                            yield range(part["start"], part["stop"]), columns
        detail = await self.detail()
        if detail["state"] != "settled":
            raise _came_to_nothing(detail)
        if self.workload == "infer":
            missing = [p for p in await self._client.parts(self.id) if p["number"] not in done]
            whole = await self.fetch() if missing else {}
            for part in missing:
                span = slice(part["start"], part["stop"])
                columns = {name: tensor[span] for name, tensor in whole.items()}
                yield range(part["start"], part["stop"]), columns

    async def _is_written(self, path: Path) -> bool:
        """Have the result written to *path*; return whether there is one already."""
        try:
            await self._client.result(self.id, path)
        except ControlError as error:
            if error.code == "again":
                return False
            raise
        return True

    async def _part(self, number: int) -> Columns | None:
        """Return a part; None if it cannot be had now."""
        call = self._client.transport.call
        with await call(TemporaryDirectory) as folder:
            path = Path(folder) / "part"
            try:
                await self._client.part(self.id, number, path)
            except ControlError as error:
                if error.code == "again":
                    return None
                raise
            return await call(partial(_tensors, path, self.workload))


class Job:
    """AsyncJob for those without an event loop: every method waits."""

    def __init__(self, core: AsyncJob) -> None:
        self.core = core

    @property
    def id(self) -> str:
        """The job's id."""
        return self.core.id

    def detail(self) -> JobDetail:
        """As AsyncJob.detail."""
        return run_blocking(self.core.detail())

    def events(self) -> Generator[JobEvent, None, None]:
        """As AsyncJob.events."""
        return iterate_blocking(self.core.events())

    def receipts(self) -> list[ReceiptInfo]:
        """As AsyncJob.receipts."""
        return run_blocking(self.core.receipts())

    def cancel(self) -> JobSummary:
        """As AsyncJob.cancel."""
        return run_blocking(self.core.cancel())

    def wait(self) -> JobDetail:
        """As AsyncJob.wait."""
        return run_blocking(self.core.wait())

    def fetch(self) -> Columns:
        """As AsyncJob.fetch."""
        return run_blocking(self.core.fetch())

    def results(self, *, every: int = 1) -> Generator[Result, None, None]:
        """As AsyncJob.results."""
        return iterate_blocking(self.core.results(every=every))


def _came_to_nothing(detail: JobDetail) -> ControlError:
    note = f": {detail['note']}" if detail["note"] else ""
    return ControlError(
        "failed",
        f"job {detail['id'][:18]} is {detail['state']}{note}",
        "`meshd job show` says more",
    )


def _tensors(path: Path, workload: str) -> Columns:
    from meshd.node.arrays import tensors_from_rows, tensors_from_safetensors

    data = path.read_bytes()
    return tensors_from_safetensors(data) if workload == "train" else tensors_from_rows(data)
