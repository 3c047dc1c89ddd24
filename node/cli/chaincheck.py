"""What `meshd doctor` asks of the chain: JSON-RPC by the standard library's own client."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from meshd.config.deployment import Deployment
from meshd.config.quantities import format_account
from meshd.node.cli.checkup import Finding

ASK_S = 5.0
SKEW_S = 120
"""Seconds by which a clock may be off: signed messages are good for as long."""
_MAX_ANSWER = 8 << 20


class NoAnswer(Exception):
    """The RPC did not answer as a chain does; the text says what it did."""


def check_chain(rpc: str, deployment: Deployment, account: str | None) -> Iterator[Finding]:
    """Whether the chain answers, is the right one, has the contracts and agrees on the time.

    *account* is the node's address, if it has one: it needs coin for gas.
    """
    try:
        chain_id = int(_ask(rpc, "eth_chainId"), 16)
    except (NoAnswer, TypeError, ValueError) as error:
        cure = "start it, or correct chain.rpc; a development chain: `meshd chain dev`"
        yield Finding("chain", "fail", f"{rpc}: {error}", cure)
        return
    if chain_id != deployment.chain_id:
        text = f"{rpc} has the id {chain_id}, the deployment is on {deployment.chain_id}"
        yield Finding("chain", "fail", text, "correct chain.rpc or chain.deployment")
        return
    yield Finding("chain", "ok", f"{rpc} answers, id {chain_id}")
    try:
        yield from _check_contracts(rpc, deployment)
        yield _check_clock(rpc, time.time())
        if account is not None:
            yield _check_gas(rpc, account)
    except (NoAnswer, TypeError, KeyError, ValueError) as error:
        yield Finding("chain", "fail", f"{rpc}: {error}", "use an RPC that answers in full")


def _check_contracts(rpc: str, deployment: Deployment) -> Iterator[Finding]:
    contracts = {
        "MCC": deployment.mcc,
        "NodeRegistry": deployment.registry,
        "JobEscrow": deployment.escrow,
    }
    missing = [
        f"{name} ({format_account(address)})"
        for name, address in contracts.items()
        if len(_ask(rpc, "eth_getCode", format_account(address), "latest")) <= 2
    ]
    if missing:
        text = f"the chain has no {', no '.join(missing)}"
        yield Finding("contracts", "fail", text, "run `meshd chain deploy`, or name its file")
    else:
        yield Finding("contracts", "ok", ", ".join(contracts))


def _check_clock(rpc: str, now: float) -> Finding:
    block = _ask(rpc, "eth_getBlockByNumber", "latest", False)
    ahead = int(block["timestamp"], 16) - now
    height = int(block["number"], 16)
    if ahead > SKEW_S:
        text = f"block {height} is {ahead:.0f} s ahead of this clock"
        return Finding("clock", "fail", text, "set it: others refuse what this node signs")
    if ahead < -SKEW_S:
        text = f"block {height} is {-ahead:.0f} s old: the chain stands, or this clock is ahead"
        return Finding("clock", "warn", text, "compare this clock with another; look at the chain")
    return Finding("clock", "ok", f"within {abs(ahead):.0f} s of block {height}")


def _check_gas(rpc: str, account: str) -> Finding:
    balance = int(_ask(rpc, "eth_getBalance", account, "latest"), 16)
    if not balance:
        text = f"{account} has no coin for gas"
        return Finding("gas", "warn", text, "send it some: it cannot stake, submit or claim")
    return Finding("gas", "ok", f"{balance / 10**18:.6g} coin")


def _ask(rpc: str, method: str, *parameters: object) -> Any:
    """Return the result of a call; raises NoAnswer."""
    question = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(parameters)}
    request = urllib.request.Request(
        rpc,
        data=json.dumps(question).encode(),
        headers={"content-type": "application/json"},
    )
    # chain.rpc begins with http:// or https://: the configuration takes nothing else.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ASK_S) as response:
            answer = json.loads(response.read(_MAX_ANSWER))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise NoAnswer(f"{method}: {reason}") from error
    if not isinstance(answer, dict) or answer.get("result") is None:
        raise NoAnswer(f"{method}: {str(answer)[:200]}")
    return answer["result"]
