"""The RPC methods of the embedded chain: what web3 and meshd call, and nothing that signs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version

import trio
from eth.vm.forks.prague.blocks import PragueBlockHeader

from meshd.ledger.devchain.chain import Devchain
from meshd.ledger.devchain.errors import ExecutionFailed, ExecutionReverted, TransactionRefused
from meshd.ledger.devchain.execution import base_fee, decode_transaction, next_base_fee
from meshd.ledger.devchain.params import (
    INVALID_PARAMS,
    LIMIT_EXCEEDED,
    SERVER_ERROR,
    Params,
    RpcError,
    find_header,
)
from meshd.ledger.devchain.store import Log
from meshd.ledger.devchain.views import (
    Json,
    block_view,
    data,
    effective_price,
    log_view,
    mined_view,
    quantity,
    receipt_view,
    waiting_view,
)

NOTICE = "single-authority development chain, never for real value"
"""What the chain says of itself wherever somebody looks."""

SUGGESTED_TIP = 1_000_000_000
"""Tip in wei per gas that callers are told to give."""
MAX_LOGS = 10_000
"""Most logs in one answer."""
MAX_FEE_HISTORY = 1_024
"""Most blocks in one answer of eth_feeHistory."""

EXECUTION_REVERTED = 3

Method = Callable[[Devchain, Params], Awaitable[Json]]
METHODS: dict[str, Method] = {}
"""Every method by its name."""


def _method(name: str) -> Callable[[Method], Method]:
    def register(function: Method) -> Method:
        METHODS[name] = function
        return function

    return register


# -- the chain itself --


@_method("web3_clientVersion")
async def _client_version(chain: Devchain, params: Params) -> Json:
    return f"meshd-devchain/{version('meshd')}/py-evm-{version('py-evm')} ({NOTICE})"


@_method("net_version")
async def _net_version(chain: Devchain, params: Params) -> Json:
    return str(chain.chain_id)


@_method("eth_chainId")
async def _chain_id(chain: Devchain, params: Params) -> Json:
    return quantity(chain.chain_id)


@_method("eth_syncing")
async def _syncing(chain: Devchain, params: Params) -> Json:
    return False


@_method("eth_accounts")
async def _accounts(chain: Devchain, params: Params) -> Json:
    return []


@_method("eth_blockNumber")
async def _block_number(chain: Devchain, params: Params) -> Json:
    return quantity(chain.head.block_number)


# -- fees --


@_method("eth_gasPrice")
async def _gas_price(chain: Devchain, params: Params) -> Json:
    return quantity(next_base_fee(chain.head) + SUGGESTED_TIP)


@_method("eth_maxPriorityFeePerGas")
async def _max_priority_fee(chain: Devchain, params: Params) -> Json:
    return quantity(SUGGESTED_TIP)


@_method("eth_feeHistory")
async def _fee_history(chain: Devchain, params: Params) -> Json:
    newest = params.header(chain, 1)
    percentiles = params.at(2, [])
    is_rising = isinstance(percentiles, list) and all(
        isinstance(share, int | float) and 0 <= share <= 100 for share in percentiles
    )
    if not is_rising or percentiles != sorted(percentiles) or len(percentiles) > 100:
        raise RpcError(INVALID_PARAMS, "invalid argument 2: percentiles rise from 0 to 100")
    count = max(1, min(params.quantity(0), MAX_FEE_HISTORY, newest.block_number + 1))
    oldest = newest.block_number - count + 1
    headers = []
    for number in range(oldest, newest.block_number + 1):
        header = chain.header(number)
        if header is None:
            raise RpcError(SERVER_ERROR, f"block {number} is not kept any more: ask for less")
        headers.append(header)
        await trio.lowlevel.checkpoint()
    answer = {
        "oldestBlock": quantity(oldest),
        "baseFeePerGas": [quantity(base_fee(h)) for h in headers]
        + [quantity(next_base_fee(newest))],
        "gasUsedRatio": [header.gas_used / header.gas_limit for header in headers],
    }
    if percentiles:
        answer["reward"] = [_tips(chain, header, percentiles) for header in headers]
    return answer


def _tips(chain: Devchain, header: PragueBlockHeader, percentiles: list[float]) -> list[str]:
    tips = sorted(
        (effective_price(decode_transaction(mined.raw), header) - base_fee(header), mined.gas_used)
        for mined in chain.store.mined_in(header.block_number)
    )
    return [quantity(_tip_at(tips, header.gas_used * share / 100)) for share in percentiles]


def _tip_at(tips: list[tuple[int, int]], gas: float) -> int:
    passed, tip = 0, 0
    for offered, gas_used in tips:
        passed, tip = passed + gas_used, offered
        if passed >= gas:
            break
    return tip


# -- accounts --


@_method("eth_getBalance")
async def _get_balance(chain: Devchain, params: Params) -> Json:
    return quantity(chain.accounts(params.header(chain, 1)).balance(params.address(0)))


@_method("eth_getTransactionCount")
async def _get_transaction_count(chain: Devchain, params: Params) -> Json:
    if params.at(1) == "pending":
        return quantity(chain.pending_nonce(params.address(0)))
    return quantity(chain.accounts(params.header(chain, 1)).nonce(params.address(0)))


@_method("eth_getCode")
async def _get_code(chain: Devchain, params: Params) -> Json:
    return data(chain.accounts(params.header(chain, 1)).code(params.address(0)))


@_method("eth_getStorageAt")
async def _get_storage_at(chain: Devchain, params: Params) -> Json:
    accounts = chain.accounts(params.header(chain, 2))
    slot = params.quantity(1)
    return data(accounts.storage(params.address(0), slot).to_bytes(32, "big"))


# -- execution --


@_method("eth_call")
async def _call(chain: Devchain, params: Params) -> Json:
    if params.at(2):
        raise RpcError(INVALID_PARAMS, "invalid argument 2: overrides of state are not supported")
    try:
        return data(chain.execution.call(_surroundings(chain, params), params.call(0)).output)
    except ExecutionFailed as error:
        raise _failed(error) from error


@_method("eth_estimateGas")
async def _estimate_gas(chain: Devchain, params: Params) -> Json:
    if params.at(2):
        raise RpcError(INVALID_PARAMS, "invalid argument 2: overrides of state are not supported")
    # Without a block: where the transaction will be executed, not where the last one was.
    header = _surroundings(chain, params) if params.at(1) else chain.pending_header()
    gas = 0
    try:
        for better in chain.execution.estimate_gas(header, params.call(0)):
            gas = better
            await trio.lowlevel.checkpoint()
    except ExecutionFailed as error:
        raise _failed(error) from error
    return quantity(gas)


def _surroundings(chain: Devchain, params: Params) -> PragueBlockHeader:
    return chain.pending_header() if params.at(1) == "pending" else params.header(chain, 1)


def _failed(error: ExecutionFailed) -> RpcError:
    if isinstance(error, ExecutionReverted):
        return RpcError(EXECUTION_REVERTED, str(error), data(error.data))
    return RpcError(SERVER_ERROR, str(error))


@_method("eth_sendRawTransaction")
async def _send_raw_transaction(chain: Devchain, params: Params) -> Json:
    try:
        return data(chain.submit(params.data(0)))
    except TransactionRefused as error:
        raise RpcError(SERVER_ERROR, str(error)) from error


# -- blocks, transactions, logs --


@_method("eth_getBlockByNumber")
async def _get_block_by_number(chain: Devchain, params: Params) -> Json:
    header = find_header(chain, params.at(0, "latest"), "argument 0")
    return _block(chain, header, params)


@_method("eth_getBlockByHash")
async def _get_block_by_hash(chain: Devchain, params: Params) -> Json:
    number = chain.store.block_number(params.hash(0))
    return _block(chain, None if number is None else chain.header(number), params)


def _block(chain: Devchain, header: PragueBlockHeader | None, params: Params) -> Json:
    if header is None:
        return None
    return block_view(chain.store, header, is_full=bool(params.at(1, False)))


@_method("eth_getTransactionByHash")
async def _get_transaction_by_hash(chain: Devchain, params: Params) -> Json:
    waiting = chain.pool.get(params.hash(0))
    if waiting is not None:
        return waiting_view(waiting)
    mined = chain.store.mined(params.hash(0))
    header = None if mined is None else chain.header(mined.block)
    return None if mined is None or header is None else mined_view(mined, header)


@_method("eth_getTransactionReceipt")
async def _get_transaction_receipt(chain: Devchain, params: Params) -> Json:
    mined = chain.store.mined(params.hash(0))
    header = None if mined is None else chain.header(mined.block)
    if mined is None or header is None:
        return None
    return receipt_view(mined, chain.store.logs_of(mined), header)


@_method("eth_getLogs")
async def _get_logs(chain: Devchain, params: Params) -> Json:
    found = chain.store.logs(params.log_filter(chain, 0), MAX_LOGS + 1)
    if len(found) > MAX_LOGS:
        raise RpcError(LIMIT_EXCEEDED, f"more than {MAX_LOGS} logs: ask for smaller ranges")
    return _log_views(chain, found)


def _log_views(chain: Devchain, logs: list[Log]) -> list[Json]:
    views = []
    number, block_hash, transactions = -1, b"", []
    for log in logs:
        if log.block != number:
            number = log.block
            block_hash = chain.store.block_hash(number) or b""
            transactions = [mined.hash for mined in chain.store.mined_in(number)]
        views.append(log_view(log, block_hash, transactions[log.position]))
    return views
