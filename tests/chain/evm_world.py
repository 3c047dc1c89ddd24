"""The embedded chain with meshd's contracts, in this process and under trio's (virtual) clock."""

from __future__ import annotations

from pathlib import Path

import httpx
import trio
from eth_account import Account

from meshd.config.deployment import Deployment
from meshd.ledger import deploy as deployment_module
from meshd.ledger.chain import Chain
from meshd.ledger.chain_calls import MCC as MCC_ABI
from meshd.ledger.devchain.chain import Devchain, Genesis
from meshd.ledger.devchain.rpc import answer
from meshd.ledger.evm_chain import EvmChain
from meshd.node.store import Store
from meshd.p2p.identity import Identity, hex_address

BANK = Identity(b"\xba" * 32)
CHAIN_ID = 31337
URL = "http://devchain"
MCC = 10**18
ETHER = 10**18


class DevchainTransport(httpx.AsyncBaseTransport):
    """Carries requests to a chain in this process; can be cut."""

    def __init__(self, chain: Devchain) -> None:
        self._chain = chain
        self.is_cut = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        if self.is_cut:
            raise httpx.ConnectError("cut", request=request)
        return httpx.Response(200, content=await answer(self._chain, await request.aread()))


class EvmWorld:
    """A chain with a block every second, and any number of nodes' accounts on it."""

    minimum_stake = 10 * MCC
    epoch_length = 5

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._start = trio.current_time()
        self.devchain = Devchain(
            path, Genesis(CHAIN_ID, {BANK.address: 10**6 * ETHER}), clock=self._wall
        )
        self.transport = DevchainTransport(self.devchain)
        self.deployment: Deployment | None = None
        self._stores: dict[bytes, Store] = {}

    def _wall(self) -> float:
        return 1_800_000_000 + trio.current_time() - self._start

    async def start(self) -> None:
        """Begin to make blocks, and deploy the contracts."""
        self._nursery.start_soon(self._make_blocks)
        self.deployment = await deployment_module.deploy(
            URL,
            BANK,
            epoch_blocks=self.epoch_length,
            unbonding_s=100,
            minimum_stake=self.minimum_stake,
            transport=self.transport,
        )

    async def _make_blocks(self) -> None:
        while True:
            await trio.sleep(1)
            await self.devchain.produce_block()

    def chain(self, who: Identity) -> Chain:
        """Return a new adapter of *who*, as after a restart of its node."""
        chain = self.adapter(who)
        self._nursery.start_soon(chain.run)
        return chain

    def adapter(self, who: Identity) -> EvmChain:
        """Return an adapter that does not run yet, on what *who*'s node has on disk."""
        if self.deployment is None:
            raise AssertionError("start the world first")
        store = self._stores.setdefault(who.address, Store(None))
        return EvmChain(
            URL,
            self.deployment,
            who,
            store,
            network="testnet",
            poll_s=0.5,
            transport=self.transport,
        )

    async def fund(self, who: Identity, amount: int) -> None:
        """Give MCC, and what transactions cost."""
        if self.deployment is None:
            raise AssertionError("start the world first")
        give = MCC_ABI.call("transfer", who.address, amount)
        self._submit({"to": hex_address(who.address), "value": ETHER})
        last = self._submit({"to": hex_address(self.deployment.mcc), "data": give})
        while self.devchain.store.mined(last) is None:
            await trio.sleep(0.25)

    def _submit(self, fields: dict[str, object]) -> bytes:
        """Put a transaction of the bank straight into the chain's pool."""
        signed = Account.from_key(BANK.secret).sign_transaction(
            {
                "type": 2,
                "chainId": CHAIN_ID,
                "nonce": self.devchain.pending_nonce(BANK.address),
                "gas": 100_000,
                "maxFeePerGas": 10**11,
                "maxPriorityFeePerGas": 10**9,
            }
            | fields
        )
        return self.devchain.submit(bytes(signed.raw_transaction))

    def close(self) -> None:
        """Close what is open."""
        self.devchain.close()
        for store in self._stores.values():
            store.close()
