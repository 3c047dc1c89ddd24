"""Balances as the chain has them, asked by the demo itself and not through any daemon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meshd.config.deployment import read_deployment
from meshd.ledger.evm_chain import EvmChain
from meshd.ledger.intents import InlineDatabase
from meshd.p2p.identity import Identity, address_from_hex


async def mcc_balances(rpc: str, deployment: Path, addresses: Sequence[str]) -> dict[str, int]:
    """Return each address's MCC (smallest unit) now."""
    chain = EvmChain(
        rpc, read_deployment(deployment), Identity.generate(), InlineDatabase(), network="demo"
    )
    try:
        return {each: await chain.balance(address_from_hex(each)) for each in addresses}
    finally:
        await chain.aclose()
