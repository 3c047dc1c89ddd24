"""The embedded chain as it really runs: a process with a port, killed, restarted, used by web3."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import trio
from eth_abi.abi import encode
from eth_utils import keccak, to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import ContractCustomError, ContractLogicError, Web3RPCError

from meshd.ledger.devchain.errors import ChainFileError, DevchainError
from meshd.ledger.devchain.service import DevchainConfig, run, serve
from meshd.ledger.evm import TrioProvider
from meshd.p2p.identity import Address
from tests.chain.conftest import ETHER, GWEI, Sender, creation_code, word

SOMEBODY = "0x" + "11" * 20
PROGRAM = """
import json, sys, trio
from pathlib import Path
from meshd.ledger.devchain.service import serve
from meshd.ledger.evm import TrioProvider
from meshd.p2p.identity import Address

async def main():
    accounts = {Address(bytes.fromhex(a)): w for a, w in json.loads(sys.argv[2]).items()}
    async with trio.open_nursery() as nursery:
        async def start(task_status):
            await serve(Path(sys.argv[1]), accounts=accounts, block_time=float(sys.argv[3]),
                        task_status=task_status)
        print("port", await nursery.start(start), flush=True)

trio.run(main)
"""


class Client:
    """JSON-RPC over one kept-alive connection."""

    def __init__(self, http: httpx.AsyncClient, port: int) -> None:
        self._http = http
        self.url = f"http://127.0.0.1:{port}"

    async def __call__(self, method: str, *params: Any) -> Any:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        reply = (await self._http.post(self.url, json=request)).json()
        assert "error" not in reply, reply
        return reply["result"]

    async def wait_mined(self, transaction: str) -> Any:
        """The receipt, as soon as there is one."""
        with trio.fail_after(20):
            while (receipt := await self("eth_getTransactionReceipt", transaction)) is None:
                await trio.sleep(0.02)
        return receipt


@pytest.fixture
def accounts(alice: Sender, bob: Sender) -> dict[Address, int]:
    return {alice.address: 1_000 * ETHER, bob.address: 1_000 * ETHER}


@asynccontextmanager
async def process(
    path: Path, accounts: dict[Address, int], *, block_time: float = 1.0
) -> AsyncIterator[tuple[trio.Process, Client]]:
    """A chain in a process of its own; killed at the end if the test has not done so."""
    listed = json.dumps({address.hex(): wei for address, wei in accounts.items()})
    command = [sys.executable, "-c", PROGRAM, str(path), listed, str(block_time)]
    child = await trio.lowlevel.open_process(command, stdout=-1)
    try:
        with trio.fail_after(30):
            output = b""
            while b"port" not in output or not output.endswith(b"\n"):
                part = await child.stdout.receive_some()
                assert part, output
                output += part
        async with httpx.AsyncClient(timeout=10) as http:
            yield child, Client(http, int(output.split(b"port")[1]))
    finally:
        child.kill()
        with trio.CancelScope(shield=True):
            await child.wait()
            await child.stdout.aclose()


@asynccontextmanager
async def served(path: Path, accounts: dict[Address, int], **options: Any) -> AsyncIterator[Client]:
    """A chain in this process, behind its real port."""
    async with trio.open_nursery() as nursery:
        port = await nursery.start(partial(serve, path, accounts=accounts, **options))
        async with httpx.AsyncClient(timeout=10) as http:
            yield Client(http, port)
        nursery.cancel_scope.cancel()


# -- the process --


async def test_nothing_acknowledged_is_lost_when_the_process_is_killed_while_sending(
    tmp_path: Path, accounts: dict[Address, int], alice: Sender, bob: Sender
) -> None:
    acknowledged: list[str] = []
    for attempt in range(3):
        async with process(tmp_path / "c", accounts, block_time=0.2) as (child, rpc):

            async def send(sender: Sender, rpc: Client = rpc) -> None:
                account = sender.account.address
                sender.nonce = int(await rpc("eth_getTransactionCount", account, "pending"), 16)
                with suppress(httpx.HTTPError):  # until the process is dead
                    while True:
                        raw = "0x" + sender.sign().hex()
                        acknowledged.append(await rpc("eth_sendRawTransaction", raw))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, alice)
                nursery.start_soon(send, bob)
                while len(acknowledged) < 15 * (attempt + 1):
                    await trio.sleep(0.002)
                child.kill()
    assert len(acknowledged) >= 45
    async with process(tmp_path / "c", accounts, block_time=0.2) as (_, rpc):
        receipts = [await rpc.wait_mined(transaction) for transaction in acknowledged]
        assert {receipt["status"] for receipt in receipts} == {"0x1"}
        # Those that were written but not answered any more are there too, exactly once.
        balance = int(await rpc("eth_getBalance", SOMEBODY, "latest"), 16)
        assert len(acknowledged) <= balance <= len(acknowledged) + 6
        head = int(await rpc("eth_blockNumber"), 16)
        blocks = [await rpc("eth_getBlockByNumber", hex(n), False) for n in range(head + 1)]
    for parent, block in itertools.pairwise(blocks):
        assert block["parentHash"] == parent["hash"]
        assert int(block["timestamp"], 16) > int(parent["timestamp"], 16)
    assert max(len(block["transactions"]) for block in blocks) >= 5


async def test_timestamps_stay_within_a_second_of_the_clock(
    tmp_path: Path, accounts: dict[Address, int]
) -> None:
    async with served(tmp_path / "c", accounts, block_time=0.05) as rpc:
        seen = 0
        with trio.fail_after(20):
            while seen < 3:
                block = await rpc("eth_getBlockByNumber", "latest", False)
                assert int(block["timestamp"], 16) <= time.time() + 1
                seen = int(block["number"], 16)
                await trio.sleep(0.02)


async def test_a_stopped_chain_goes_on_where_it_was(
    tmp_path: Path, accounts: dict[Address, int], alice: Sender
) -> None:
    clock = FastClock()
    async with served(tmp_path / "c", accounts, block_time=0.02, clock=clock) as rpc:
        sent = await rpc("eth_sendRawTransaction", "0x" + alice.sign().hex())
        receipt = await rpc.wait_mined(sent)
    async with served(tmp_path / "c", accounts, block_time=0.02, clock=clock) as rpc:
        assert await rpc("eth_getTransactionReceipt", sent) == receipt
        block = await rpc("eth_getBlockByHash", receipt["blockHash"], False)
        assert block["transactions"] == [sent]


class FastClock:
    """Unix time that runs a hundred times as fast, so that blocks may come a hundred times as
    often."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def __call__(self) -> float:
        return 1_800_000_000 + (time.monotonic() - self._begun) * 100


async def test_the_chain_says_at_its_start_what_it_is(
    tmp_path: Path, accounts: dict[Address, int]
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with served(tmp_path / "c", accounts):
            pass
    assert logs[0]["notice"] == "single-authority development chain, never for real value"
    assert logs[0]["url"].startswith("http://127.0.0.1:")


async def test_a_taken_port_is_one_clear_error(
    tmp_path: Path, accounts: dict[Address, int]
) -> None:
    async with served(tmp_path / "a", accounts) as rpc:
        port = int(rpc.url.rsplit(":", 1)[1])
        with pytest.raises(DevchainError, match=f"cannot listen on 127.0.0.1:{port}"):
            await serve(tmp_path / "b", accounts=accounts, port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::"])
async def test_the_chain_serves_this_machine_only(
    tmp_path: Path, accounts: dict[Address, int], host: str
) -> None:
    with pytest.raises(DevchainError, match="loopback only"):
        await serve(tmp_path / "c", accounts=accounts, host=host)
    assert not (tmp_path / "c").exists()


async def test_a_configuration_says_everything(
    tmp_path: Path, accounts: dict[Address, int]
) -> None:
    config = DevchainConfig(tmp_path / "c", accounts, port=0, chain_id=77)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(run, config)
        async with httpx.AsyncClient() as http:
            assert await Client(http, port)("eth_chainId") == "0x4d"
        with pytest.raises(ChainFileError):
            await run(config)
        nursery.cancel_scope.cancel()


# -- web3 --


ABI = [
    {
        "type": "event",
        "name": "Moved",
        "anonymous": False,
        "inputs": [
            {"name": "source", "type": "address", "indexed": True},
            {"name": "target", "type": "address", "indexed": True},
            {"name": "amount", "type": "uint256", "indexed": False},
        ],
    },
    {
        "type": "error",
        "name": "TooEarly",
        "inputs": [{"name": "height", "type": "uint256"}],
    },
]


@pytest.fixture
async def web3(
    tmp_path: Path, accounts: dict[Address, int]
) -> AsyncIterator[AsyncWeb3[TrioProvider]]:
    options = {"block_time": 0.02, "clock": FastClock()}
    async with served(tmp_path / "c", accounts, **options) as rpc:
        provider = TrioProvider(rpc.url)
        yield AsyncWeb3(provider)
        await provider.aclose()


async def mine(web3: AsyncWeb3[TrioProvider], sender: Sender, **fields: Any) -> Any:
    """Let web3 fill in what is left out, sign, send, and wait for the receipt."""
    account = sender.account.address
    nonce = await web3.eth.get_transaction_count(account, "pending")
    filled = {"from": account, "nonce": nonce, "chainId": await web3.eth.chain_id} | fields
    if "maxFeePerGas" not in filled:
        tip = await web3.eth.max_priority_fee
        base = (await web3.eth.get_block("latest"))["baseFeePerGas"]
        filled |= {"maxFeePerGas": 2 * base + tip, "maxPriorityFeePerGas": tip}
    filled["gas"] = await web3.eth.estimate_gas(filled)
    raw = sender.account.sign_transaction(filled).raw_transaction
    sent = await web3.eth.send_raw_transaction(raw)
    with trio.fail_after(20):
        while True:
            try:
                return await web3.eth.get_transaction_receipt(sent)
            except Web3RPCError:
                await trio.sleep(0.02)


async def test_web3_reads_blocks_fees_and_balances(
    web3: AsyncWeb3[TrioProvider], alice: Sender
) -> None:
    assert await web3.eth.chain_id == 31_373
    assert await web3.eth.syncing is False
    assert await web3.eth.accounts == []
    assert await web3.eth.gas_price > 0
    assert "development chain" in await web3.client_version
    block = await web3.eth.get_block("latest", full_transactions=True)
    assert block == await web3.eth.get_block(block["hash"], full_transactions=True)
    history = await web3.eth.fee_history(1, "latest", [50.0])
    assert len(history["baseFeePerGas"]) == 2
    assert await web3.eth.get_balance(alice.account.address) == 1_000 * ETHER


async def test_web3_deploys_a_contract_and_reads_its_events(
    web3: AsyncWeb3[TrioProvider], alice: Sender
) -> None:
    receipt = await mine(web3, alice, data=creation_code("log3"))
    contract = web3.eth.contract(receipt["contractAddress"], abi=ABI)
    topic = keccak(b"Moved(address,address,uint256)")
    source, target = Address(bytes([5]) * 20), Address(bytes([6]) * 20)
    data = topic + bytes(12) + source + bytes(12) + target + word(77)
    receipt = await mine(web3, alice, to=contract.address, data=data)
    assert receipt["status"] == 1
    (event,) = await contract.events.Moved().get_logs(from_block=0)
    assert event["args"] == {
        "source": to_checksum_address(source),
        "target": to_checksum_address(target),
        "amount": 77,
    }
    assert event["transactionHash"] == receipt["transactionHash"]
    filters = {"target": to_checksum_address(source)}
    assert await contract.events.Moved().get_logs(from_block=0, argument_filters=filters) == []
    assert contract.events.Moved().process_receipt(receipt)[0]["args"] == event["args"]


async def test_web3_sees_why_a_call_was_reverted(
    web3: AsyncWeb3[TrioProvider], alice: Sender
) -> None:
    receipt = await mine(web3, alice, data=creation_code("echo_revert"))
    custom = keccak(b"TooEarly(uint256)")[:4] + word(9)
    call = {"to": receipt["contractAddress"], "data": custom}
    with pytest.raises(ContractCustomError) as custom_error:
        await web3.eth.call(call)
    assert custom_error.value.data == "0x" + custom.hex()
    with pytest.raises(ContractCustomError):
        await web3.eth.estimate_gas(call)
    reason = keccak(b"Error(string)")[:4] + encode(["string"], ["not yet"])
    with pytest.raises(ContractLogicError, match="not yet"):
        await web3.eth.call(call | {"data": reason})


async def test_web3_sees_why_a_transaction_was_refused(
    web3: AsyncWeb3[TrioProvider], alice: Sender
) -> None:
    raw = alice.sign(nonce=0, maxFeePerGas=3 * GWEI)
    await web3.eth.send_raw_transaction(raw)
    await mine(web3, alice, to=SOMEBODY)
    with pytest.raises(Web3RPCError, match="nonce too low"):
        await web3.eth.send_raw_transaction(raw)
