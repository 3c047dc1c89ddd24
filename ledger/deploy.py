"""What is done once for a chain: deploying meshd's contracts, and handing out coins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import rlp  # type: ignore[import-untyped]
import trio
from eth_hash.auto import keccak

from meshd.config.deployment import Deployment
from meshd.ledger.chain import CallFailed, ChainError
from meshd.ledger.chain_calls import ESCROW, MCC, REGISTRY
from meshd.ledger.evm import EvmRpc
from meshd.ledger.intents import InlineDatabase, Transaction
from meshd.ledger.outbox import Outbox
from meshd.p2p.identity import Address, Identity, hex_address

_CREATION_GAS = 6_000_000
_TRANSFER_GAS = 100_000


async def deploy(
    rpc: str,
    sender: Identity,
    *,
    epoch_blocks: int,
    unbonding_s: int,
    minimum_stake: int,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Deployment:
    """Deploy MCC, NodeRegistry and JobEscrow and return where they are.

    *sender* receives the whole supply of MCC. Registry epochs have *epoch_blocks* blocks;
    *minimum_stake* is in MCC's smallest unit. Raises ChainUnavailable or CallFailed.
    """
    async with _outbox(rpc, sender, transport) as (node, outbox):
        nonce = await node.nonce(sender.address)
        mcc, registry, escrow = (
            Address(keccak(rlp.encode([bytes(sender.address), nonce + place]))[12:])
            for place in range(3)
        )
        creations = {
            mcc: MCC.creation(sender.address),
            registry: REGISTRY.creation(mcc, epoch_blocks, unbonding_s, minimum_stake),
            escrow: ESCROW.creation(mcc, registry),
        }
        for place, code in creations.items():
            await outbox.put(place.hex(), [Transaction(None, code, _CREATION_GAS)])
        for place in creations:
            created = await node.created(await _landed(outbox, place.hex()))
            if created != place:
                raise ChainError(
                    f"a contract was created at another address than {hex_address(place)}: "
                    f"let nothing else send from {hex_address(sender.address)}, and deploy again"
                )
        return Deployment(chain_id=await node.chain_id(), mcc=mcc, registry=registry, escrow=escrow)


async def fund(
    rpc: str,
    sender: Identity,
    accounts: Sequence[Address],
    *,
    coin: int,
    mcc: int = 0,
    token: Address | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> None:
    """Send *coin* wei, and *mcc* (smallest unit) of the contract *token*, to each of *accounts*.

    Returns when all of it is on chain. Raises ChainUnavailable or CallFailed.
    """
    wanted = [Transaction(Address(one), b"", _TRANSFER_GAS, coin) for one in accounts if coin]
    if mcc and token is not None:
        wanted += [
            Transaction(Address(token), MCC.call("transfer", one, mcc), _TRANSFER_GAS)
            for one in accounts
        ]
    async with _outbox(rpc, sender, transport) as (_, outbox):
        for place, transaction in enumerate(wanted):
            await outbox.put(str(place), [transaction])
        for place in range(len(wanted)):
            await _landed(outbox, str(place))


@asynccontextmanager
async def _outbox(
    rpc: str, sender: Identity, transport: httpx.AsyncBaseTransport | None
) -> AsyncIterator[tuple[EvmRpc, Outbox]]:
    """Return the node at *rpc* and an outbox of *sender*'s that works while this is open."""
    node, database = EvmRpc(rpc, transport), InlineDatabase()
    try:
        chain_id, genesis = await node.chain_id(), await node.genesis()
        if not await node.balance(sender.address):
            raise CallFailed(
                f"{hex_address(sender.address)} has no coin for gas on chain {chain_id}: "
                "name another key, or send it some"
            )
        outbox = Outbox(database, node, sender, chain_id=chain_id, genesis=genesis, confirmations=0)
        error: ChainError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.run)
            try:
                yield node, outbox
            except ChainError as failure:  # out of the nursery as itself, not in a group
                error = failure
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
    finally:
        database.close()
        with trio.move_on_after(1) as closing:
            closing.shield = True
            await node.aclose()


async def _landed(outbox: Outbox, key: str) -> bytes:
    outcome = await outbox.wait(key)
    if outcome.error is not None:
        raise CallFailed(f"transaction {outcome.tx.hex()} failed: {outcome.error}")
    return outcome.tx
