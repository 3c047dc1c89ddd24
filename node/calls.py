"""Every request to a daemon's control API, written once as coroutines over a transport."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from meshd.config.paths import SOCKET, read_text
from meshd.node.control.api import (
    ENDED,
    EXIT_CODES,
    MAX_BODY,
    Code,
    ControlError,
    Earnings,
    JobDetail,
    JobEvent,
    JobPart,
    JobSummary,
    JobWhy,
    LogPage,
    PeerInfo,
    ReceiptInfo,
    ReplayEvent,
    ResultFile,
    Staked,
    Status,
    Submitted,
    Wallet,
)
from meshd.node.exchange import BrokenExchange, Exchange, Lines
from meshd.node.transports import Stream, Transport

if TYPE_CHECKING:
    from torch import Tensor, nn

    from meshd.node.session import AsyncJob


class AsyncClient:
    """One daemon's control API; a connection per call, so it may be shared and kept."""

    def __init__(self, data_dir: Path, timeout_s: float, transport: Transport) -> None:
        self._data_dir = data_dir
        self._timeout_s = timeout_s
        self.transport = transport
        """How it waits."""

    # ---- the daemon ----------------------------------------------------------------------

    async def status(self) -> Status:
        """Return the daemon in one glance."""
        return cast(Status, await self._call("GET", "/v1/status"))

    async def peers(self) -> list[PeerInfo]:
        """Return the connected peers."""
        return cast(list[PeerInfo], await self._call("GET", "/v1/peers"))

    async def wallet(self) -> Wallet:
        """Return what the node's account holds."""
        return cast(Wallet, await self._call("GET", "/v1/wallet"))

    async def stake(self, amount: str) -> Staked:
        """Stake *amount* (decimal MCC, "100") and return when it is on chain."""
        return cast(Staked, await self._call("POST", "/v1/stake", {"amount": amount}))

    async def earnings(self) -> Earnings:
        """Return what the account that is paid has earned."""
        return cast(Earnings, await self._call("GET", "/v1/earnings"))

    async def pause(self) -> Status:
        """Have the worker take no new shards until `resume`, over restarts too."""
        return cast(Status, await self._call("POST", "/v1/pause", {}))

    async def resume(self) -> Status:
        """Have the worker take shards again."""
        return cast(Status, await self._call("POST", "/v1/resume", {}))

    # ---- jobs ----------------------------------------------------------------------------

    async def submit(self, path: Path | str) -> Submitted:
        """Submit the job that the job.toml at *path* describes.

        Relative names in it count from its directory. Raises ConfigError if it cannot be read.
        """
        file = _absolute(path)
        text = await self.transport.call(lambda: read_text(file, "job description"))
        return await self.submit_text(text, file.parent, file.name)

    async def submit_text(self, toml: str, directory: Path, source: str = "job.toml") -> Submitted:
        """Submit the job that *toml* describes; relative names count from *directory*."""
        body = {"toml": toml, "directory": str(_absolute(directory)), "source": source}
        return cast(Submitted, await self._call("POST", "/v1/jobs", body))

    async def jobs(self) -> list[JobSummary]:
        """Return the jobs that the daemon knows, the newest first."""
        return cast(list[JobSummary], await self._call("GET", "/v1/jobs"))

    async def job(self, job_id: str) -> JobDetail:
        """Return everything known of a job; *job_id* may be the unique beginning of one."""
        return cast(JobDetail, await self._call("GET", _job(job_id)))

    async def why(self, job_id: str) -> JobWhy:
        """Return why the job is not further: a reason for each pending shard and each node."""
        return cast(JobWhy, await self._call("GET", _job(job_id) + "/why"))

    async def log(self, job_id: str, after: int = 0) -> LogPage:
        """Return some of the job's log, beginning after batch *after*."""
        return cast(LogPage, await self._call("GET", f"{_job(job_id)}/log/{after}"))

    async def retry(self, job_id: str, deadline: str = "") -> Submitted:
        """Submit the terms of a job that failed or was cancelled again.

        Its work may take *deadline* ("2h") from now; without it as long as the first time.
        """
        body = {"deadline": deadline}
        return cast(Submitted, await self._call("POST", _job(job_id) + "/retry", body))

    async def watch(self, job_id: str) -> AsyncGenerator[JobEvent, None]:
        """Yield the job as it is, then every event until it has ended."""
        path, has_ended = _job(job_id) + "/events", False
        async with aclosing(self._events(path)) as events:
            async for event in events:
                has_ended = event["state"] in ENDED
                yield cast(JobEvent, event)
        if not has_ended:
            raise self._broken(EOFError("before the job had ended"))

    async def replay(
        self, job_id: str, round_: int | None = None
    ) -> AsyncGenerator[ReplayEvent, None]:
        """Have the daemon compute a training job (or one round of it) again; yield every event.

        The last event, "end", says whether everything is equal.
        """
        path = _job(job_id) + "/replay" + ("" if round_ is None else f"/{round_}")
        has_ended = False
        async with aclosing(self._events(path)) as events:
            async for event in events:
                has_ended = event["event"] == "end"
                yield cast(ReplayEvent, event)
        if not has_ended:
            raise self._broken(EOFError("before the replay had ended"))

    async def cancel(self, job_id: str) -> JobSummary:
        """Take a job back, or stop it if it has started: what passed is paid."""
        return cast(JobSummary, await self._call("POST", _job(job_id) + "/cancel", {}))

    async def result(self, job_id: str, path: Path | str) -> ResultFile:
        """Have the job's final output written to *path*."""
        body = {"path": str(_absolute(path))}
        return cast(ResultFile, await self._call("POST", _job(job_id) + "/result", body))

    async def parts(self, job_id: str) -> list[JobPart]:
        """Return the parts of the job's result that can be fetched before it is complete."""
        return cast(list[JobPart], await self._call("GET", _job(job_id) + "/parts"))

    async def part(self, job_id: str, number: int, path: Path | str) -> ResultFile:
        """Have a part of the job's result written to *path*."""
        body = {"path": str(_absolute(path))}
        return cast(ResultFile, await self._call("POST", f"{_job(job_id)}/parts/{number}", body))

    async def receipts(self, job_id: str) -> list[ReceiptInfo]:
        """Return the job's receipts so far."""
        return cast(list[ReceiptInfo], await self._call("GET", _job(job_id) + "/receipts"))

    # ---- modules and tensors -------------------------------------------------------------

    async def infer(
        self,
        module: nn.Module,
        rows: Mapping[str, Tensor],
        /,
        *,
        price: str,
        cap: str,
        deadline: str = "1d",
        outputs: Sequence[str] | None = None,
        **keys: object,
    ) -> AsyncJob:
        """Submit `module(**rows)`; the job's results are its outputs, row by row.

        *rows* maps the names of forward's parameters to tensors of shape (rows, ...); *outputs*
        names what forward returns (else "out"). *price* and *cap* are decimal MCC; further
        *keys* are those of job.toml, its tables as dicts: `rows_per_shard=64,
        audit={"rows": 4}`. Needs torch. Raises ExportError for a module that has no program,
        DatasetError for tensors that are no rows.
        """
        from meshd.node.session import ModuleInputs, submit_module

        keys |= {"workload": "infer", "price": price, "cap": cap, "deadline": deadline}
        return await submit_module(self, ModuleInputs(module, rows, outputs), keys)

    async def train(
        self,
        module: nn.Module,
        rows: Mapping[str, Tensor],
        /,
        *,
        price: str,
        cap: str,
        deadline: str = "1d",
        train: Mapping[str, object],
        **keys: object,
    ) -> AsyncJob:
        """Submit the training of *module*, whose forward returns a scalar loss of a batch.

        *train* holds the keys of job.toml's [train], such as `{"rounds": 8, "shards": 4}`; the
        rest is as for `infer`. The job's result goes into `module.load_state_dict`.
        """
        from meshd.node.session import ModuleInputs, submit_module

        keys |= {"workload": "train", "price": price, "cap": cap, "deadline": deadline}
        keys["train"] = train
        return await submit_module(self, ModuleInputs(module, rows, training=True), keys)

    async def open_job(self, job_id: str) -> AsyncJob:
        """Return a job that was submitted before; *job_id* may be the unique beginning of one."""
        from meshd.node.session import AsyncJob

        found = await self.job(job_id)
        return AsyncJob(self, found["id"], found["kind"])

    # ---- one request ---------------------------------------------------------------------

    async def _call(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        payload = None if body is None else json.dumps(body)
        if payload is not None and len(payload) > MAX_BODY:
            raise ControlError("usage", "the request is longer than 1 MiB", "shorten it")
        exchange = Exchange(method, path, payload)
        stream = await self._send(exchange)
        try:
            answer = json.loads(await self._rest(stream, exchange))
        except (BrokenExchange, ValueError) as error:
            raise self._broken(error) from error
        finally:
            await stream.aclose()
        if exchange.status != 200:
            raise _error(answer)
        return answer

    async def _events(self, path: str) -> AsyncGenerator[Any, None]:
        """Yield what the daemon sends in answer, line by line."""
        exchange, lines = Exchange("GET", path), Lines()
        stream = await self._send(exchange)
        try:
            while not exchange.ended:
                body = await self._receive(stream, exchange)
                if exchange.status not in (0, 200):
                    raise _error(json.loads(body + await self._rest(stream, exchange)))
                for line in lines.feed(body):
                    event = json.loads(line)
                    if "error" in event:
                        raise _error(event)
                    yield event
        except (BrokenExchange, ValueError) as error:
            raise self._broken(error) from error
        finally:
            await stream.aclose()

    async def _send(self, exchange: Exchange) -> Stream:
        """Return the connection over which the answer comes, to be closed."""
        try:
            stream = await self.transport.open(self._data_dir / SOCKET, self._timeout_s)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise ControlError(
                "unavailable",
                f"no daemon runs on {self._data_dir}",
                "start one with `meshd up`, or name its directory with --data-dir",
            ) from error
        except OSError as error:
            raise self._broken(error) from error
        try:
            await stream.send_all(exchange.request)
        except ConnectionError:
            pass  # it may have answered before it hung up
        except BaseException as error:
            await stream.aclose()
            if isinstance(error, OSError):
                raise self._broken(error) from error
            raise
        return stream

    async def _receive(self, stream: Stream, exchange: Exchange) -> bytes:
        """Return the next piece of the answer's body."""
        try:
            return exchange.receive(await stream.receive())
        except OSError as error:
            raise self._broken(error) from error

    async def _rest(self, stream: Stream, exchange: Exchange) -> bytes:
        """Return all of the body that is still to come."""
        parts = []
        while not exchange.ended:
            parts.append(await self._receive(stream, exchange))
        return b"".join(parts)

    def _broken(self, error: Exception) -> ControlError:
        if isinstance(error, PermissionError):
            return ControlError(
                "unavailable",
                f"the daemon on {self._data_dir} belongs to another user",
                "run this as that user",
            )
        return ControlError(
            "unavailable",
            f"the daemon on {self._data_dir} broke off: {error}",
            "see its log; is it still running?",
        )


def _absolute(path: Path | str) -> Path:
    return Path(path).absolute()


def _job(job_id: str) -> str:
    if not job_id.isascii() or not job_id.isalnum() or len(job_id) > 66:
        raise ControlError(
            "usage",
            f"{job_id[:80]!r} is not a job id",
            "write 0x and hex digits; see: meshd job ls",
        )
    return f"/v1/jobs/{job_id}"


def _error(answer: Any) -> ControlError:
    told = answer["error"]
    code: Code = told["code"] if told["code"] in EXIT_CODES else "failed"
    return ControlError(code, told["message"], told["cure"])
