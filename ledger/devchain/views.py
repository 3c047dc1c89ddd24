"""Blocks, transactions, receipts and logs in the JSON shapes of the Ethereum RPC.

https://ethereum.github.io/execution-apis/ names the fields. Quantities are hexadecimal without
leading zeros, everything else is hexadecimal of its full length.
"""

from __future__ import annotations

from typing import Any

import rlp  # type: ignore[import-untyped]
from eth.abc import SignedTransactionAPI
from eth.vm.forks.prague.blocks import PragueBlockHeader
from eth_bloom.bloom import BloomFilter
from eth_hash.auto import keccak

from meshd.ledger.devchain.execution import base_fee, decode_transaction
from meshd.ledger.devchain.pool import Waiting
from meshd.ledger.devchain.store import Log, MinedTransaction, Store
from meshd.p2p.identity import hex_address

Json = Any
"""A value that the json module can write."""


def quantity(number: int) -> str:
    """Return *number* as the RPC writes quantities."""
    return hex(number)


def data(raw: bytes) -> str:
    """Return *raw* as the RPC writes bytes."""
    return "0x" + raw.hex()


def block_view(store: Store, header: PragueBlockHeader, *, is_full: bool) -> Json:
    """Return the block of *header*, with its transactions in full or only their hashes."""
    mined = store.mined_in(header.block_number)
    raws = [transaction.raw for transaction in mined]
    items = [raw if raw[0] < 0x80 else rlp.decode(raw) for raw in raws]
    size = len(rlp.encode([rlp.decode(rlp.encode(header)), items, [], []]))
    return {
        "number": quantity(header.block_number),
        "hash": data(header.hash),
        "parentHash": data(header.parent_hash),
        "timestamp": quantity(header.timestamp),
        "gasLimit": quantity(header.gas_limit),
        "gasUsed": quantity(header.gas_used),
        "baseFeePerGas": quantity(base_fee(header)),
        "miner": hex_address(header.coinbase),
        "stateRoot": data(header.state_root),
        "transactionsRoot": data(header.transaction_root),
        "receiptsRoot": data(header.receipt_root),
        "logsBloom": data(header.bloom.to_bytes(256, "big")),
        "difficulty": quantity(header.difficulty),
        "extraData": data(header.extra_data),
        "nonce": data(header.nonce),
        "mixHash": data(header.mix_hash),
        "sha3Uncles": data(header.uncles_hash),
        "uncles": [],
        "withdrawals": [],
        "withdrawalsRoot": data(header.withdrawals_root or b""),
        "blobGasUsed": quantity(header.blob_gas_used),
        "excessBlobGas": quantity(header.excess_blob_gas),
        "parentBeaconBlockRoot": data(header.parent_beacon_block_root or b""),
        "requestsHash": data(header.requests_hash),
        "size": quantity(size),
        "transactions": [
            mined_view(transaction, header) if is_full else data(transaction.hash)
            for transaction in mined
        ],
    }


def mined_view(mined: MinedTransaction, header: PragueBlockHeader) -> Json:
    """Return a transaction in the block of *header*."""
    transaction = decode_transaction(mined.raw)
    return {
        **_transaction_view(transaction),
        "hash": data(mined.hash),
        "from": hex_address(mined.sender),
        "gasPrice": quantity(effective_price(transaction, header)),
        "blockHash": data(header.hash),
        "blockNumber": quantity(mined.block),
        "transactionIndex": quantity(mined.position),
    }


def waiting_view(waiting: Waiting) -> Json:
    """Return a transaction that is in no block yet."""
    return {
        **_transaction_view(waiting.transaction),
        "hash": data(waiting.hash),
        "from": hex_address(waiting.sender),
        "gasPrice": quantity(waiting.max_fee),
        "blockHash": None,
        "blockNumber": None,
        "transactionIndex": None,
    }


def receipt_view(mined: MinedTransaction, logs: list[Log], header: PragueBlockHeader) -> Json:
    """Return the receipt of a transaction in the block of *header*."""
    transaction = decode_transaction(mined.raw)
    bloom = BloomFilter()
    for log in logs:
        bloom.extend([log.address, *log.topics])
    is_creation = transaction.to == b""
    return {
        "type": quantity(transaction.type_id or 0),
        "status": quantity(mined.status),
        "transactionHash": data(mined.hash),
        "transactionIndex": quantity(mined.position),
        "blockHash": data(header.hash),
        "blockNumber": quantity(mined.block),
        "from": hex_address(mined.sender),
        "to": None if is_creation else hex_address(transaction.to),
        "contractAddress": _created(mined, transaction) if is_creation else None,
        "gasUsed": quantity(mined.gas_used),
        "cumulativeGasUsed": quantity(mined.cumulative_gas_used),
        "effectiveGasPrice": quantity(effective_price(transaction, header)),
        "logsBloom": data(int(bloom).to_bytes(256, "big")),
        "logs": [log_view(log, header.hash, mined.hash) for log in logs],
    }


def log_view(log: Log, block_hash: bytes, transaction_hash: bytes) -> Json:
    """Return one log."""
    return {
        "address": hex_address(log.address),
        "topics": [data(topic) for topic in log.topics],
        "data": data(log.data),
        "blockNumber": quantity(log.block),
        "blockHash": data(block_hash),
        "transactionHash": data(transaction_hash),
        "transactionIndex": quantity(log.position),
        "logIndex": quantity(log.index),
        "removed": False,
    }


def effective_price(transaction: SignedTransactionAPI, header: PragueBlockHeader) -> int:
    """Return what *transaction* pays per gas in the block of *header*, in wei."""
    return min(
        transaction.max_fee_per_gas,
        base_fee(header) + transaction.max_priority_fee_per_gas,
    )


def _transaction_view(transaction: SignedTransactionAPI) -> dict[str, Json]:
    kind = transaction.type_id or 0
    view: dict[str, Json] = {
        "type": quantity(kind),
        "chainId": quantity(transaction.chain_id or 0),
        "nonce": quantity(transaction.nonce),
        "gas": quantity(transaction.gas),
        "to": hex_address(transaction.to) if transaction.to else None,
        "value": quantity(transaction.value),
        "input": data(transaction.data),
        "r": quantity(transaction.r),
        "s": quantity(transaction.s),
    }
    if kind == 0:
        parity = (transaction.chain_id or 0) * 2 + 35 + transaction.y_parity
        return {**view, "v": quantity(parity)}
    view |= {
        "v": quantity(transaction.y_parity),
        "yParity": quantity(transaction.y_parity),
        "accessList": [
            {
                "address": hex_address(address),
                "storageKeys": [data(slot.to_bytes(32, "big")) for slot in slots],
            }
            for address, slots in transaction.access_list
        ],
    }
    if kind == 2:
        view |= {
            "maxFeePerGas": quantity(transaction.max_fee_per_gas),
            "maxPriorityFeePerGas": quantity(transaction.max_priority_fee_per_gas),
        }
    return view


def _created(mined: MinedTransaction, transaction: SignedTransactionAPI) -> str:
    return hex_address(keccak(rlp.encode([mined.sender, transaction.nonce]))[12:])
