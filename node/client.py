"""The Python client of a daemon's control API: what researchers import, and what `meshd` uses.

from meshd.node.client import connect

job = connect().submit("job.toml")
for event in connect().watch(job["id"]):
    print(event["text"])
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from meshd.config.paths import SOCKET, data_directory, read_text
from meshd.node.control.api import (
    ENDED,
    EXIT_CODES,
    MAX_BODY,
    Code,
    ControlError,
    JobDetail,
    JobEvent,
    JobSummary,
    PeerInfo,
    ReceiptInfo,
    ResultFile,
    Staked,
    Status,
    Submitted,
    Wallet,
)
from meshd.node.control.socket import socket_address

_MAX_LINE = 1 << 20


def connect(data_dir: Path | str | None = None, *, timeout_s: float = 630.0) -> Client:
    """Return the client of the daemon on *data_dir* (default: MESHD_DATA_DIR or the user's own).

    Nothing is sent yet. Every method raises ControlError: with code "unavailable" if no daemon
    runs there, else with what the daemon says.
    """
    directory = data_directory(None if data_dir is None else str(data_dir), os.environ)
    return Client(directory, timeout_s)


class Client:
    """One daemon's control API; a connection per call, so it may be shared and kept."""

    def __init__(self, data_dir: Path, timeout_s: float) -> None:
        self._data_dir = data_dir
        self._timeout_s = timeout_s

    def status(self) -> Status:
        """Return the daemon in one glance."""
        return cast(Status, self._call("GET", "/v1/status"))

    def peers(self) -> list[PeerInfo]:
        """Return the connected peers."""
        return cast(list[PeerInfo], self._call("GET", "/v1/peers"))

    def wallet(self) -> Wallet:
        """Return what the node's account holds."""
        return cast(Wallet, self._call("GET", "/v1/wallet"))

    def stake(self, amount: str) -> Staked:
        """Stake *amount* (decimal MCC, "100") and return when it is on chain."""
        return cast(Staked, self._call("POST", "/v1/stake", {"amount": amount}))

    def submit(self, path: Path | str) -> Submitted:
        """Submit the job that the job.toml at *path* describes.

        Relative names in it count from its directory. Raises ConfigError if it cannot be read.
        """
        file = Path(path).absolute()
        return self.submit_text(read_text(file, "job description"), file.parent, file.name)

    def submit_text(self, toml: str, directory: Path, source: str = "job.toml") -> Submitted:
        """Submit the job that *toml* describes; relative names count from *directory*."""
        body = {"toml": toml, "directory": str(directory.absolute()), "source": source}
        return cast(Submitted, self._call("POST", "/v1/jobs", body))

    def jobs(self) -> list[JobSummary]:
        """Return the jobs that the daemon knows, the newest first."""
        return cast(list[JobSummary], self._call("GET", "/v1/jobs"))

    def job(self, job_id: str) -> JobDetail:
        """Return everything known of a job; *job_id* may be the unique beginning of one."""
        return cast(JobDetail, self._call("GET", _job(job_id)))

    def watch(self, job_id: str) -> Iterator[JobEvent]:
        """Yield the job as it is, then every event until it has ended."""
        response = self._open("GET", _job(job_id) + "/events", None)
        has_ended = False
        try:
            while line := response.readline(_MAX_LINE):
                if line.strip():
                    event = json.loads(line)
                    if "error" in event:
                        raise _error(event)
                    has_ended = event["state"] in ENDED
                    yield cast(JobEvent, event)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            response.close()
        if not has_ended:  # http.client takes a broken stream for a complete one
            raise self._broken(EOFError("before the job had ended"))

    def cancel(self, job_id: str) -> JobSummary:
        """Take a job back, or stop it if it has started: what passed is paid."""
        return cast(JobSummary, self._call("POST", _job(job_id) + "/cancel", {}))

    def result(self, job_id: str, path: Path | str) -> ResultFile:
        """Have the job's final output written to *path*."""
        body = {"path": str(Path(path).absolute())}
        return cast(ResultFile, self._call("POST", _job(job_id) + "/result", body))

    def receipts(self, job_id: str) -> list[ReceiptInfo]:
        """Return the job's receipts so far."""
        return cast(list[ReceiptInfo], self._call("GET", _job(job_id) + "/receipts"))

    def _call(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        response = self._open(method, path, body)
        try:
            return json.loads(response.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            response.close()

    def _open(
        self, method: str, path: str, body: dict[str, str] | None
    ) -> http.client.HTTPResponse:
        """Return the answer, to be read and closed; the daemon ends the connection after it."""
        payload = None if body is None else json.dumps(body)
        if payload is not None and len(payload) > MAX_BODY:
            raise ControlError("usage", "the request is longer than 1 MiB", "shorten it")
        connection = _UnixConnection(self._data_dir / SOCKET, self._timeout_s)
        try:
            headers = {} if payload is None else {"Content-Type": "application/json"}
            connection.request(method, path, payload, headers)
            response = connection.getresponse()
            if response.status != 200:
                with response:
                    raise _error(json.loads(response.read(_MAX_LINE)))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise ControlError(
                "unavailable",
                f"no daemon runs on {self._data_dir}",
                "start one with `meshd up`, or name its directory with --data-dir",
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            connection.close()  # an answer keeps what it needs
        return response

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


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("meshd", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with socket_address(self._path) as address:
            self.sock.connect(address)


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
