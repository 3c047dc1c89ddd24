"""The control API's routes: from a method and a path to a call of the Node."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic_core import from_json

from meshd.config.amounts import parse_mcc
from meshd.config.errors import ConfigError
from meshd.config.job import parse_job
from meshd.config.quantities import parse_duration
from meshd.node.control.api import ControlError
from meshd.node.control.port import Node
from meshd.node.workloads.program import refuse_foreign

Call = Callable[[Node, dict[str, str], dict[str, Any]], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
"""Hands one event, a dict, to whoever listens."""


@dataclass(frozen=True)
class Route:
    """One request that is understood: where it goes and how long its answer may take."""

    method: str
    path: str
    call: Call
    deadline_s: float = 30.0


@dataclass(frozen=True)
class Stream:
    """An answer that is sent event by event, until `run` returns."""

    run: Callable[[Send], Awaitable[None]]


def find_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """Return the route of a request and the names in its path; raises ControlError."""
    known = False
    for route in ROUTES:
        pattern = re.sub(r"{(\w+)}", r"(?P<\1>[0-9A-Za-z]{1,80})", route.path)
        if match := re.fullmatch(pattern, path):
            if route.method == method:
                return route, match.groupdict()
            known = True
    if known:
        raise ControlError("usage", f"{path} does not take {method[:16]}", "see docs/cli.md")
    raise ControlError(
        "not-found", f"there is no {path[:200]!r} in the control API", "see docs/cli.md"
    )


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body; an empty body is an empty object."""
    if not raw:
        return {}
    try:
        # Not json.loads: web3 raises Python's recursion limit so far that a deeply nested body
        # overflows the stack there. This parser has its own limit.
        body = from_json(raw)
    except ValueError as error:
        raise ControlError(
            "usage", f"the body is not JSON: {error}", "send a JSON object"
        ) from None
    if not isinstance(body, dict):
        raise ControlError("usage", f"the body is a {type(body).__name__}", "send a JSON object")
    return body


async def _status(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.status()


async def _peers(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.peers()


async def _wallet(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.wallet()


async def _stake(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    (text,) = _texts(body, "amount")
    amount = parse_mcc(text)
    if not amount:
        raise ControlError("usage", "a stake of 0 MCC changes nothing", "name a larger amount")
    return await node.stake(amount)


async def _pause(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.pause()


async def _resume(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.resume()


async def _earnings(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.earnings()


async def _job_list(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.job_list()


async def _job_submit(node: Node, _names: dict[str, str], body: dict[str, Any]) -> Any:
    text, directory, source = _texts(body, "toml", "directory", "source")
    spec = parse_job(text, now=time.time(), directory=_absolute(directory), source=source[:200])
    for key, path in (("program", spec.program), ("data", spec.data)):
        refuse_foreign(path.name)
        if not path.exists():
            raise ControlError(
                "usage", f"{source}: {key} = {str(path)!r} does not exist", "correct the name"
            )
    return await node.job_submit(spec)


async def _job_show(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.job_show(await _job_id(node, names["id"]))


async def _job_why(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.job_why(await _job_id(node, names["id"]))


async def _job_log(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.job_log(await _job_id(node, names["id"]), _number(names["after"]))


async def _job_retry(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    (text,) = _texts(body, "deadline")
    seconds = parse_duration(text) if text else None
    return await node.job_retry(await _job_id(node, names["id"]), seconds)


async def _job_events(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return Stream(partial(node.job_watch, await _job_id(node, names["id"])))


async def _job_replay(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    only = _number(names["round"]) if "round" in names else None
    return Stream(partial(node.job_replay, await _job_id(node, names["id"]), only))


async def _job_cancel(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.job_cancel(await _job_id(node, names["id"]))


async def _job_result(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    (path,) = _texts(body, "path")
    return await node.job_result(await _job_id(node, names["id"]), _absolute(path))


async def _job_parts(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.job_parts(await _job_id(node, names["id"]))


async def _job_part(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    (path,) = _texts(body, "path")
    job_id = await _job_id(node, names["id"])
    return await node.job_part(job_id, _number(names["number"]), _absolute(path))


async def _job_receipts(node: Node, names: dict[str, str], body: dict[str, Any]) -> Any:
    _texts(body)
    return await node.job_receipts(await _job_id(node, names["id"]))


ROUTES: Final = (
    Route("GET", "/v1/status", _status),
    Route("GET", "/v1/peers", _peers),
    Route("GET", "/v1/wallet", _wallet),
    Route("POST", "/v1/stake", _stake, 300.0),
    Route("POST", "/v1/pause", _pause),
    Route("POST", "/v1/resume", _resume),
    Route("GET", "/v1/earnings", _earnings, 300.0),
    Route("GET", "/v1/jobs", _job_list),
    Route("POST", "/v1/jobs", _job_submit, 600.0),
    Route("GET", "/v1/jobs/{id}", _job_show),
    Route("GET", "/v1/jobs/{id}/events", _job_events),
    Route("GET", "/v1/jobs/{id}/why", _job_why),
    Route("GET", "/v1/jobs/{id}/log/{after}", _job_log, 120.0),
    Route("GET", "/v1/jobs/{id}/replay", _job_replay),
    Route("GET", "/v1/jobs/{id}/replay/{round}", _job_replay),
    Route("POST", "/v1/jobs/{id}/retry", _job_retry, 300.0),
    Route("POST", "/v1/jobs/{id}/cancel", _job_cancel, 300.0),
    Route("POST", "/v1/jobs/{id}/result", _job_result, 600.0),
    Route("GET", "/v1/jobs/{id}/parts", _job_parts),
    Route("POST", "/v1/jobs/{id}/parts/{number}", _job_part, 300.0),
    Route("GET", "/v1/jobs/{id}/receipts", _job_receipts),
)
"""Every request that is understood."""


async def _job_id(node: Node, text: str) -> bytes:
    """Return the job id that *text* names: complete, or the unique beginning of a known one."""
    digits = text.removeprefix("0x").lower()
    if not re.fullmatch(r"[0-9a-f]{1,64}", digits):
        raise ControlError(
            "usage", f"{text[:80]!r} is not a job id", "write 0x and hex digits; see: meshd job ls"
        )
    if len(digits) == 64:
        return bytes.fromhex(digits)
    ids = [job["id"] for job in await node.job_list()]
    found = [known for known in ids if known.startswith("0x" + digits)]
    if len(found) == 1:
        return bytes.fromhex(found[0][2:])
    if found:
        raise ControlError(
            "usage", f"{len(found)} jobs begin with {text}", "write more digits of the id"
        )
    raise ControlError("not-found", f"no job begins with {text}", "see: meshd job ls")


def _number(text: str) -> int:
    if not text.isdigit() or len(text) > 9:
        raise ControlError("usage", f"{text!r} is not a number from 0", "write digits")
    return int(text)


def _texts(body: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """Return the texts of exactly *keys* in a body."""
    for key in body:
        if key not in keys:
            raise ControlError(
                "usage",
                f"unknown key {key[:80]!r} in the body",
                f"it takes {', '.join(keys) or 'nothing'}",
            )
    for key in keys:
        if not isinstance(body.get(key), str):
            raise ControlError("usage", f"the body needs {key!r} as text", "add it")
    return tuple(body[key] for key in keys)


def _absolute(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise ConfigError(f"path {text[:200]!r} is not absolute: begin it with /")
    return path
