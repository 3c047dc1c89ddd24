"""JSON-RPC 2.0: a request body in, the body of its answer out.

https://www.jsonrpc.org/specification
"""

from __future__ import annotations

import json

import structlog
import trio
from pydantic_core import from_json

from meshd.ledger.devchain.chain import Devchain
from meshd.ledger.devchain.methods import METHODS
from meshd.ledger.devchain.params import INVALID_PARAMS, Params, RpcError
from meshd.ledger.devchain.views import Json

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INTERNAL_ERROR = -32603

MAX_BATCH = 1_000
"""Most requests in a batch."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""After this many bytes the rest of a batch is refused."""

_log = structlog.get_logger(__name__)


async def answer(chain: Devchain, body: bytes) -> bytes:
    """Return the answer to the request, or batch of requests, in *body*.

    Empty if nothing in it asks for one. An error of any kind is an answer, never an exception.
    """
    try:
        # Not json.loads: py-evm raises Python's recursion limit so far that a deeply nested body
        # overflows the stack there. This parser has its own limit.
        request = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        return _encode(_error(None, RpcError(PARSE_ERROR, f"parse error: {error}"[:200])))
    if not isinstance(request, list):
        reply = await _answer_one(chain, request)
        return b"" if reply is None else _encode(reply)
    if not 0 < len(request) <= MAX_BATCH:
        wrong = RpcError(INVALID_REQUEST, f"a batch holds 1 to {MAX_BATCH} requests")
        return _encode(_error(None, wrong))
    replies, size = [], 0
    for entry in request:
        if size > MAX_ANSWER_BYTES:
            full = RpcError(INVALID_REQUEST, f"batch of over {MAX_ANSWER_BYTES} bytes of answers")
            reply = _error(entry.get("id") if isinstance(entry, dict) else None, full)
        else:
            reply = await _answer_one(chain, entry)
        if reply is not None:
            replies.append(_encode(reply))
            size += len(replies[-1])
    return b"[" + b",".join(replies) + b"]" if replies else b""


async def _answer_one(chain: Devchain, request: Json) -> Json:
    await trio.lowlevel.checkpoint()
    identifier = request.get("id") if isinstance(request, dict) else None
    if isinstance(identifier, list | dict):
        identifier = None
    try:
        result = await _call(chain, request)
    except RpcError as error:
        reply = _error(identifier, error)
    except Exception:  # the outermost edge: whatever a request does, the chain goes on
        _log.exception("devchain.request_failed", method=str(request.get("method"))[:64])
        reply = _error(identifier, RpcError(INTERNAL_ERROR, "internal error: see the chain's log"))
    else:
        reply = {"jsonrpc": "2.0", "id": identifier, "result": result}
    is_notification = isinstance(request, dict) and "id" not in request and "method" in request
    return None if is_notification else reply


async def _call(chain: Devchain, request: Json) -> Json:
    if not isinstance(request, dict) or request.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'invalid request: no object with "jsonrpc": "2.0"')
    name, values = request.get("method"), request.get("params", [])
    if not isinstance(name, str):
        raise RpcError(INVALID_REQUEST, "invalid request: no method")
    method = METHODS.get(name)
    if method is None:
        raise RpcError(
            METHOD_NOT_FOUND, f"the method {name[:64]} does not exist on this development chain"
        )
    if not isinstance(values, list):
        raise RpcError(INVALID_PARAMS, "invalid params: give them as a list, in order")
    return await method(chain, Params(values))


def _error(identifier: Json, error: RpcError) -> Json:
    fault: dict[str, Json] = {"code": error.code, "message": error.message}
    if error.data is not None:
        fault["data"] = error.data
    return {"jsonrpc": "2.0", "id": identifier, "error": fault}


def _encode(reply: Json) -> bytes:
    return json.dumps(reply, separators=(",", ":")).encode()
