"""Fixtures for tests of the embedded chain: a chain on a clock that the test turns, and senders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account

from meshd.ledger.devchain.chain import CHAIN_ID, Devchain, Genesis
from meshd.ledger.devchain.rpc import answer
from meshd.p2p.identity import Address

GWEI = 10**9
ETHER = 10**18
START = 1_800_000_000

# Runtime code of tiny contracts; comments give the instructions.
CONTRACTS = {
    # CALLDATACOPY(0, 96, 32); LOG3(0, 32, word 0, word 1, word 2)
    "log3": "6020606060003760403560203560003560206000a300",
    # CALLDATACOPY(0, 32, 32); LOG1(0, 32, word 0)
    "log1": "6020602060003760003560206000a100",
    # REVERT with the call's data
    "echo_revert": "366000600037366000fd",
    # no data: return slot 0; else SSTORE(0, word 0)
    "box": "36600f5760005460005260206000f35b60003560005500",
    # JUMPDEST; PUSH1 0; JUMP
    "loop": "5b600056",
    # return NUMBER, TIMESTAMP, PREVRANDAO, BLOCKHASH(NUMBER - 1), CALLER
    "context": "43600052426020524460405260014303406060523360805260a06000f3",
    # CALL itself with all gas
    "recurse": "60006000600060006000305af100",
    # CALL the address in word 0 with all gas, revert if it fails
    "forward": "600060006000600060006000355af1601657600080fd5b00",
}


def creation_code(name: str) -> bytes:
    """The code that deploys one of CONTRACTS: CODECOPY what follows it and return that."""
    runtime = bytes.fromhex(CONTRACTS[name])
    size = len(runtime).to_bytes(2, "big").hex()
    return bytes.fromhex(f"61{size}600e60003961{size}6000f3") + runtime


def word(value: int) -> bytes:
    return value.to_bytes(32, "big")


@dataclass
class Clock:
    """Unix time as the test says it is."""

    now: float = START

    def __call__(self) -> float:
        return self.now


@dataclass
class Sender:
    """A funded account that signs what the test wants, counting its own nonces."""

    seed: int
    nonce: int = 0
    account: Any = field(init=False)

    def __post_init__(self) -> None:
        self.account = Account.from_key(bytes([self.seed]) * 32)

    @property
    def address(self) -> Address:
        return Address(bytes.fromhex(self.account.address[2:]))

    def sign(self, **changed: Any) -> bytes:
        """A signed transaction: one wei to nobody in particular, unless told otherwise."""
        fields = {
            "type": 2,
            "chainId": CHAIN_ID,
            "nonce": self.nonce,
            "to": "0x" + "11" * 20,
            "value": 1,
            "gas": 21_000,
            "maxFeePerGas": 10 * GWEI,
            "maxPriorityFeePerGas": GWEI,
            "data": b"",
        } | changed
        if "gasPrice" in fields:
            for name in ("type", "maxFeePerGas", "maxPriorityFeePerGas"):
                del fields[name]
        if fields["to"] is None:
            del fields["to"]
        self.nonce = max(self.nonce, int(fields["nonce"]) + 1)
        return bytes(self.account.sign_transaction(fields).raw_transaction)

    def deploy(self, name: str) -> bytes:
        return self.sign(to=None, value=0, gas=200_000, data=creation_code(name))

    def call(self, to: str, data: bytes, **changed: Any) -> bytes:
        return self.sign(**{"to": to, "value": 0, "gas": 200_000, "data": data} | changed)


@dataclass
class Rpc:
    """Calls a chain's RPC without a socket."""

    chain: Devchain

    async def __call__(self, method: str, *params: Any) -> Any:
        """The result; raises KeyError with the answer if that is an error."""
        return (await self.raw({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))[
            "result"
        ]

    async def error(self, method: str, *params: Any) -> Any:
        """The error; raises KeyError if there is none."""
        return (await self.raw({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))[
            "error"
        ]

    async def raw(self, request: Any) -> Any:
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        reply = await answer(self.chain, body)
        return json.loads(reply) if reply else None

    async def deploy(self, sender: Sender, name: str, clock: Clock) -> str:
        """Deploy one of CONTRACTS in a block of its own and return its address."""
        transaction = self.chain.submit(sender.deploy(name))
        clock.now += 1
        await self.chain.produce_block()
        receipt = await self("eth_getTransactionReceipt", "0x" + transaction.hex())
        assert receipt["status"] == "0x1"
        return str(receipt["contractAddress"])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def alice() -> Sender:
    return Sender(1)


@pytest.fixture
def bob() -> Sender:
    return Sender(2)


@pytest.fixture
def carol() -> Sender:
    """Has no coin."""
    return Sender(3)


@pytest.fixture
def genesis(alice: Sender, bob: Sender) -> Genesis:
    return Genesis(CHAIN_ID, {alice.address: 1_000 * ETHER, bob.address: 1_000 * ETHER})


@pytest.fixture
def open_chain(tmp_path: Path, genesis: Genesis, clock: Clock) -> Iterator[Callable[[], Devchain]]:
    """Opens the chain; again: as after a restart of its process."""
    opened: list[Devchain] = []

    def reopen() -> Devchain:
        for chain in opened:
            chain.close()
        opened.append(Devchain(tmp_path / "chain.sqlite3", genesis, clock=clock))
        return opened[-1]

    yield reopen
    for chain in opened:
        chain.close()


@pytest.fixture
def chain(open_chain: Callable[[], Devchain]) -> Devchain:
    return open_chain()


@pytest.fixture
def rpc(chain: Devchain) -> Rpc:
    return Rpc(chain)
