"""The RPC of the embedded chain: answers, errors, logs, calls and estimates."""

from __future__ import annotations

from typing import Any

import pytest
from eth_abi.abi import encode
from eth_utils import keccak

from meshd.ledger.devchain import methods, params
from meshd.ledger.devchain import rpc as rpc_module
from meshd.ledger.devchain.chain import Devchain
from meshd.ledger.devchain.methods import METHODS
from meshd.p2p.identity import hex_address
from tests.chain.conftest import ETHER, GWEI, START, Clock, Rpc, Sender, creation_code, word

NOBODY = "0x" + "00" * 20
SOMEBODY = "0x" + "11" * 20


def hx(raw: bytes) -> str:
    return "0x" + raw.hex()


# -- JSON-RPC itself --


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"nope", b"[" * 100_000])
async def test_what_is_no_json_is_a_parse_error(rpc: Rpc, body: bytes) -> None:
    assert (await rpc.raw(body))["error"]["code"] == -32700


@pytest.mark.parametrize(
    "request_",
    [1, "x", None, {}, {"method": "eth_chainId"}, {"jsonrpc": "2.0"}, [], [1],
     {"jsonrpc": "2.0", "method": 7, "id": 1}, {"jsonrpc": "1.0", "method": "eth_chainId"}],
)  # fmt: skip
async def test_what_is_no_request_is_an_invalid_request(rpc: Rpc, request_: Any) -> None:
    reply = await rpc.raw(request_)
    reply = reply[0] if isinstance(reply, list) else reply
    if reply is not None:
        assert reply["error"]["code"] == -32600


async def test_an_unknown_method_is_said_to_be_unknown(rpc: Rpc) -> None:
    error = await rpc.error("evm_snapshot")
    assert error["code"] == -32601
    assert "evm_snapshot" in error["message"]


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("eth_getBalance", []),
        ("eth_getBalance", ["0x11"]),
        ("eth_getBalance", [SOMEBODY, "soon"]),
        ("eth_getBalance", [SOMEBODY, 5]),
        ("eth_getBalance", [7, "latest"]),
        ("eth_getBlockByNumber", ["0xzz"]),
        ("eth_getBlockByNumber", ["0x"]),
        ("eth_getBlockByNumber", ["0x" + "1" * 65]),
        ("eth_getBlockByHash", ["0x11"]),
        ("eth_getTransactionReceipt", [None]),
        ("eth_sendRawTransaction", ["02f8"]),
        ("eth_sendRawTransaction", ["0x123"]),
        ("eth_call", ["0x11"]),
        ("eth_call", [{"to": SOMEBODY, "colour": "red"}]),
        ("eth_call", [{"to": SOMEBODY}, "latest", {SOMEBODY: {}}]),
        ("eth_call", [{"to": SOMEBODY, "accessList": [1]}]),
        ("eth_estimateGas", [{"to": 1}]),
        ("eth_getLogs", []),
        ("eth_getLogs", [[]]),
        ("eth_getLogs", [{"address": {"a": 1}}]),
        ("eth_getLogs", [{"topics": "0x11"}]),
        ("eth_getLogs", [{"topics": [["0x11"]]}]),
        ("eth_getLogs", [{"topics": [None] * 5}]),
        ("eth_getLogs", [{"fromBlock": "0x2", "toBlock": "0x1"}]),
        ("eth_getLogs", [{"fromBlock": "0x2", "blockHash": hx(bytes(32))}]),
        ("eth_feeHistory", ["0x1", "latest", [50, 10]]),
        ("eth_feeHistory", ["0x1", "latest", ["x"]]),
    ],
)
async def test_wrong_parameters_are_invalid_parameters(
    rpc: Rpc, method: str, values: list[Any]
) -> None:
    assert (await rpc.error(method, *values))["code"] == -32602


async def test_parameters_by_name_are_invalid_parameters(rpc: Rpc) -> None:
    request = {"jsonrpc": "2.0", "id": 1, "method": "eth_getBalance", "params": {"a": SOMEBODY}}
    assert (await rpc.raw(request))["error"]["code"] == -32602


async def test_a_fault_inside_is_an_internal_error_and_the_chain_goes_on(
    rpc: Rpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(chain: Devchain, values: params.Params) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(METHODS, "eth_chainId", broken)
    assert (await rpc.error("eth_chainId"))["code"] == -32603
    assert await rpc("eth_blockNumber") == "0x0"


async def test_a_batch_is_answered_in_order_without_its_notifications(rpc: Rpc) -> None:
    replies = await rpc.raw(
        [
            {"jsonrpc": "2.0", "id": "a", "method": "eth_chainId"},
            {"jsonrpc": "2.0", "method": "eth_chainId"},
            {"jsonrpc": "2.0", "id": 2, "method": "nope", "params": []},
        ]
    )
    assert [reply["id"] for reply in replies] == ["a", 2]
    assert (replies[0]["result"], replies[1]["error"]["code"]) == ("0x7a8d", -32601)


async def test_notifications_get_no_answer(rpc: Rpc) -> None:
    assert await rpc.raw({"jsonrpc": "2.0", "method": "eth_chainId"}) is None
    assert await rpc.raw([{"jsonrpc": "2.0", "method": "eth_chainId"}]) is None


async def test_a_batch_is_bounded_in_requests_and_in_bytes_of_answers(
    rpc: Rpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId"}
    assert (await rpc.raw([one] * 1_001))["error"]["code"] == -32600
    monkeypatch.setattr(rpc_module, "MAX_ANSWER_BYTES", 100)
    replies = await rpc.raw([one] * 10)
    assert [("result" in reply) for reply in replies] == [True] * 3 + [False] * 7


# -- the chain --


async def test_the_chain_says_that_it_is_for_development_only(rpc: Rpc) -> None:
    version = await rpc("web3_clientVersion")
    assert "single-authority development chain, never for real value" in version


async def test_the_chain_names_itself(rpc: Rpc) -> None:
    assert await rpc("eth_chainId") == "0x7a8d"
    assert await rpc("net_version") == "31373"
    assert await rpc("eth_syncing") is False
    assert await rpc("eth_accounts") == []


async def test_every_tag_names_a_block(chain: Devchain, rpc: Rpc, clock: Clock) -> None:
    clock.now += 1
    await chain.produce_block()
    for tag in ("latest", "pending", "safe", "finalized", "0x1"):
        assert (await rpc("eth_getBlockByNumber", tag, False))["number"] == "0x1"
    assert (await rpc("eth_getBlockByNumber", "earliest", False))["number"] == "0x0"
    assert await rpc("eth_getBlockByNumber", "0x2", False) is None
    assert await rpc("eth_getBlockByHash", hx(bytes(32)), False) is None


async def test_a_block_is_the_same_by_number_and_by_hash(
    chain: Devchain, rpc: Rpc, alice: Sender
) -> None:
    hashes = [hx(chain.submit(alice.sign())) for _ in range(2)]
    await chain.produce_block()
    block = await rpc("eth_getBlockByNumber", "0x1", False)
    assert block == await rpc("eth_getBlockByHash", block["hash"], False)
    assert block["transactions"] == hashes
    assert block["parentHash"] == (await rpc("eth_getBlockByNumber", "0x0", False))["hash"]
    full = await rpc("eth_getBlockByNumber", "0x1", True)
    assert [entry["hash"] for entry in full["transactions"]] == hashes
    assert full["transactions"][1] == await rpc("eth_getTransactionByHash", hashes[1])


async def test_state_can_be_read_as_of_any_block(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    box = await rpc.deploy(alice, "box", clock)
    for value in (7, 8):
        chain.submit(alice.call(box, word(value)))
        await chain.produce_block()
    await chain.produce_block()  # empty
    slots = [await rpc("eth_getStorageAt", box, "0x0", hex(number)) for number in range(5)]
    assert [int(slot, 16) for slot in slots] == [0, 0, 7, 8, 8]
    reads = [await rpc("eth_call", {"to": box}, hex(number)) for number in range(1, 5)]
    assert [int(read, 16) for read in reads] == [0, 7, 8, 8]
    block = await rpc("eth_getBlockByNumber", "0x2", False)
    for named in ({"blockHash": block["hash"]}, {"blockNumber": "0x2"}):
        assert int(await rpc("eth_call", {"to": box}, named), 16) == 7
    assert await rpc("eth_getCode", box, "0x0") == "0x"
    assert len(await rpc("eth_getCode", box)) > 2
    assert int(await rpc("eth_getBalance", SOMEBODY), 16) == 0
    assert await rpc("eth_getBalance", hex_address(alice.address), "0x0") == hex(1_000 * ETHER)


async def test_state_of_an_unknown_block_is_an_error(rpc: Rpc) -> None:
    error = await rpc.error("eth_getBalance", SOMEBODY, "0x5")
    assert error == {"code": -32000, "message": "header not found: 0x5"}


async def test_the_pending_nonce_counts_what_waits(
    chain: Devchain, rpc: Rpc, alice: Sender
) -> None:
    account = hex_address(alice.address)
    for nonce in (0, 1, 3):
        chain.submit(alice.sign(nonce=nonce))
    counts = [await rpc("eth_getTransactionCount", account, t) for t in ("latest", "pending")]
    assert counts == ["0x0", "0x2"]


# -- transactions --


async def test_a_transaction_is_seen_waiting_and_then_in_its_block(
    chain: Devchain, rpc: Rpc, alice: Sender
) -> None:
    sent = await rpc("eth_sendRawTransaction", hx(alice.sign(value=5)))
    waiting = await rpc("eth_getTransactionByHash", sent)
    assert (waiting["blockNumber"], waiting["gasPrice"]) == (None, hex(10 * GWEI))
    assert await rpc("eth_getTransactionReceipt", sent) is None
    await chain.produce_block()
    mined = await rpc("eth_getTransactionByHash", sent)
    price = hex(chain.head.base_fee_per_gas + GWEI)
    assert (mined["blockNumber"], mined["gasPrice"], mined["value"]) == ("0x1", price, "0x5")
    assert mined["from"] == hex_address(alice.address)


async def test_a_legacy_transaction_shows_its_replay_protection(
    chain: Devchain, rpc: Rpc, alice: Sender
) -> None:
    sent = await rpc("eth_sendRawTransaction", hx(alice.sign(gasPrice=2 * GWEI)))
    await chain.produce_block()
    view = await rpc("eth_getTransactionByHash", sent)
    assert int(view["v"], 16) in (31373 * 2 + 35, 31373 * 2 + 36)
    assert (view["type"], view["gasPrice"]) == ("0x0", hex(2 * GWEI))
    assert "maxFeePerGas" not in view
    receipt = await rpc("eth_getTransactionReceipt", sent)
    assert receipt["effectiveGasPrice"] == hex(2 * GWEI)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"nonce": 0}, "nonce too low: next nonce 1, tx nonce 0"),
        ({"chainId": 5}, "invalid chain id for signer: have 5 want 31373"),
        ({"value": 10**30}, "insufficient funds for gas * price + value"),
    ],
)
async def test_a_refused_transaction_has_geths_text(
    chain: Devchain, rpc: Rpc, alice: Sender, changed: dict[str, Any], text: str
) -> None:
    chain.submit(alice.sign())
    await chain.produce_block()
    error = await rpc.error("eth_sendRawTransaction", hx(alice.sign(**changed)))
    assert error["code"] == -32000
    assert error["message"].startswith(text)


async def test_a_receipt_counts_gas_and_logs_within_its_block(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    contract = await rpc.deploy(alice, "log3", clock)
    sent = []
    for number in range(3):
        data = b"".join(map(word, (number, 1, 2, 100 + number)))
        sent.append(hx(chain.submit(alice.call(contract, data))))
    await chain.produce_block()
    receipts = [await rpc("eth_getTransactionReceipt", each) for each in sent]
    gas = [int(receipt["gasUsed"], 16) for receipt in receipts]
    total = [int(receipt["cumulativeGasUsed"], 16) for receipt in receipts]
    assert total == [gas[0], gas[0] + gas[1], sum(gas)]
    assert chain.head.gas_used == sum(gas)
    logs = [log for receipt in receipts for log in receipt["logs"]]
    assert [log["logIndex"] for log in logs] == ["0x0", "0x1", "0x2"]
    assert [log["transactionIndex"] for log in logs] == ["0x0", "0x1", "0x2"]
    assert [int(log["data"], 16) for log in logs] == [100, 101, 102]
    assert logs == await rpc("eth_getLogs", {"fromBlock": "0x2"})
    blooms = [int(receipt["logsBloom"], 16) for receipt in receipts]
    assert blooms[0] | blooms[1] | blooms[2] == chain.head.bloom != 0


async def test_a_receipt_of_a_deployment_names_the_contract(
    chain: Devchain, rpc: Rpc, alice: Sender
) -> None:
    sent = await rpc("eth_sendRawTransaction", hx(alice.deploy("box")))
    await chain.produce_block()
    receipt = await rpc("eth_getTransactionReceipt", sent)
    assert receipt["to"] is None
    assert len(await rpc("eth_getCode", receipt["contractAddress"])) > 2


# -- logs --


@pytest.fixture
async def logged(chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock) -> list[str]:
    """Two emitters; blocks 3 to 5 hold logs 1 2 3 of the first, block 4 also 9 of the second."""
    contracts = [await rpc.deploy(alice, name, clock) for name in ("log3", "log1")]
    for number in (1, 2, 3):
        data = b"".join(map(word, (number, 50, 60 + number, 0)))
        chain.submit(alice.call(contracts[0], data))
        if number == 2:
            chain.submit(alice.call(contracts[1], word(9) + word(90)))
        clock.now += 1
        await chain.produce_block()
    return contracts


async def firsts(rpc: Rpc, **wanted: Any) -> list[int]:
    logs = await rpc("eth_getLogs", {"fromBlock": "earliest", **wanted})
    return [int(log["topics"][0], 16) for log in logs]


async def test_logs_are_found_by_address(rpc: Rpc, logged: list[str]) -> None:
    assert await firsts(rpc) == [1, 2, 9, 3]
    assert await firsts(rpc, address=logged[0]) == [1, 2, 3]
    assert await firsts(rpc, address=[logged[1]]) == [9]
    assert await firsts(rpc, address=logged) == [1, 2, 9, 3]
    assert await firsts(rpc, address=[]) == [1, 2, 9, 3]
    assert await firsts(rpc, address=SOMEBODY) == []


async def test_logs_are_found_by_topics_at_their_places(rpc: Rpc, logged: list[str]) -> None:
    one, two, nine = hx(word(1)), hx(word(2)), hx(word(9))
    fifty, sixty_three = hx(word(50)), hx(word(63))
    assert await firsts(rpc, topics=[two]) == [2]
    assert await firsts(rpc, topics=[[one, nine]]) == [1, 9]
    assert await firsts(rpc, topics=[None, fifty]) == [1, 2, 3]
    assert await firsts(rpc, topics=[fifty]) == []
    assert await firsts(rpc, topics=[None, None, sixty_three]) == [3]
    assert await firsts(rpc, topics=[[one, two], fifty, sixty_three]) == []
    assert await firsts(rpc, topics=[None, None]) == [1, 2, 3]  # log 9 has one topic only
    assert await firsts(rpc, topics=[[], []]) == [1, 2, 3]
    assert await firsts(rpc, topics=[]) == [1, 2, 9, 3]


async def test_logs_are_found_by_range_and_by_block(rpc: Rpc, logged: list[str]) -> None:
    assert await firsts(rpc, fromBlock="0x4", toBlock="0x4") == [2, 9]
    assert await firsts(rpc, fromBlock="0x4", toBlock="0x99") == [2, 9, 3]
    assert await firsts(rpc, fromBlock="0x80", toBlock="0x99") == []
    assert [len(await rpc("eth_getLogs", {}))] == [1]  # the newest block
    block = await rpc("eth_getBlockByNumber", "0x4", False)
    logs = await rpc("eth_getLogs", {"blockHash": block["hash"]})
    assert [log["blockHash"] for log in logs] == [block["hash"]] * 2
    assert [log["transactionHash"] for log in logs] == block["transactions"]
    error = await rpc.error("eth_getLogs", {"blockHash": hx(bytes(32))})
    assert error["message"] == "unknown block"


async def test_a_query_for_logs_is_bounded(
    chain: Devchain, rpc: Rpc, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "MAX_LOGS", 3)
    error = await rpc.error("eth_getLogs", {"fromBlock": "0x0"})
    assert (error["code"], "smaller ranges" in error["message"]) == (-32005, True)
    monkeypatch.setattr(params, "MAX_LOG_BLOCKS", 2)
    error = await rpc.error("eth_getLogs", {"fromBlock": "0x0", "toBlock": "0x2"})
    assert error["message"] == "blocks 0 to 2 are more than 2: ask for smaller ranges"
    topics = [[hx(word(number)) for number in range(1_001)]]
    assert (await rpc.error("eth_getLogs", {"topics": topics}))["code"] == -32005


# -- calls --


async def test_a_revert_carries_the_contracts_own_bytes(
    rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    contract = await rpc.deploy(alice, "echo_revert", clock)
    custom = keccak(b"TooEarly(uint256)")[:4] + word(7)
    reason = keccak(b"Error(string)")[:4] + encode(["string"], ["not yet"])
    cases = {
        custom: "execution reverted",
        reason: "execution reverted: not yet",
        reason[:40]: "execution reverted",
        b"": "execution reverted",
    }
    for data, message in cases.items():
        for method in ("eth_call", "eth_estimateGas"):
            error = await rpc.error(method, {"to": contract, "input": hx(data)})
            assert error == {"code": 3, "message": message, "data": hx(data)}


async def test_a_call_that_runs_out_of_gas_is_an_error_without_data(
    rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    contract = await rpc.deploy(alice, "loop", clock)
    error = await rpc.error("eth_call", {"to": contract, "gas": hex(50_000)})
    assert error["code"] == -32000
    assert error["message"].startswith("OutOfGas")
    assert "data" not in error
    error = await rpc.error("eth_call", {"to": contract, "gas": hex(20_000)})
    assert error["message"] == "intrinsic gas too low: have 20000, want 21000"


async def test_a_call_needs_no_coin_for_gas_but_has_to_have_what_it_sends(
    rpc: Rpc, carol: Sender
) -> None:
    poor = {"from": hex_address(carol.address), "to": SOMEBODY}
    assert await rpc("eth_call", poor | {"maxFeePerGas": hex(10**12)}) == "0x"
    error = await rpc.error("eth_call", poor | {"value": "0x1"})
    assert "Insufficient funds" in error["message"]


async def test_a_call_may_come_from_a_contract_and_leaves_no_trace(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    box = await rpc.deploy(alice, "box", clock)
    root = chain.head.state_root
    await rpc("eth_call", {"from": box, "to": box, "input": hx(word(9))})
    assert int(await rpc("eth_call", {"to": box}), 16) == 0
    await chain.produce_block()
    assert chain.head.state_root == root


async def test_a_call_can_create_a_contract(rpc: Rpc) -> None:
    runtime = await rpc("eth_call", {"data": hx(creation_code("box"))})
    assert bytes.fromhex(runtime[2:]) == creation_code("box")[14:]


async def test_a_call_sees_the_block_that_it_names(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    contract = await rpc.deploy(alice, "context", clock)
    clock.now = START + 10
    await chain.produce_block()
    clock.now = START + 20
    await chain.produce_block()

    async def context(tag: str) -> list[int]:
        words = bytes.fromhex((await rpc("eth_call", {"to": contract, "from": NOBODY}, tag))[2:])
        return [int.from_bytes(words[at : at + 32], "big") for at in range(0, 160, 32)]

    for number in (1, 2, 3):
        header, parent = chain.header(number), chain.header(number - 1)
        assert header is not None
        assert parent is not None
        assert await context(hex(number)) == [
            number,
            header.timestamp,
            int.from_bytes(header.mix_hash, "big"),
            int.from_bytes(parent.hash, "big"),
            0,
        ]
    clock.now = START + 30
    pending = await context("pending")
    assert pending[:2] == [4, START + 30]
    assert pending[3] == int.from_bytes(chain.head.hash, "big")


# -- fees and gas --


async def test_the_estimate_of_a_transfer_is_exact(rpc: Rpc) -> None:
    assert await rpc("eth_estimateGas", {"to": SOMEBODY}) == hex(21_000)


@pytest.mark.parametrize("name", ["box", "forward"])
async def test_a_transaction_succeeds_with_its_estimate_and_fails_with_much_less(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock, name: str
) -> None:
    box = await rpc.deploy(alice, "box", clock)
    contract = await rpc.deploy(alice, name, clock)
    data = word(5) if name == "box" else bytes(12) + bytes.fromhex(box[2:])
    sender = hex_address(alice.address)
    call = {"from": sender, "to": contract, "input": hx(data)}
    estimate = int(await rpc("eth_estimateGas", call), 16)
    enough = chain.submit(alice.call(contract, data, gas=estimate))
    await chain.produce_block()
    mined = chain.store.mined(enough)
    assert mined is not None
    assert mined.status == 1
    assert estimate <= mined.gas_used * 1.2 + 3_000
    if name == "box":  # nothing kept back: one unit less is too little
        assert estimate == mined.gas_used
        error = await rpc.error("eth_call", call | {"gas": hex(estimate - 1)}, "0x2")
        assert error["message"].startswith("OutOfGas")


async def test_an_estimate_is_made_for_the_next_block(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    sent = chain.submit(alice.deploy("box"))
    await chain.produce_block()
    mined = chain.store.mined(sent)
    assert mined is not None
    estimate = await rpc("eth_estimateGas", {"from": SOMEBODY, "data": hx(creation_code("box"))})
    assert estimate == hex(mined.gas_used)


async def test_fee_history_tells_base_fees_use_and_tips(
    chain: Devchain, rpc: Rpc, alice: Sender, bob: Sender
) -> None:
    await chain.produce_block()
    chain.submit(alice.sign(maxPriorityFeePerGas=GWEI))
    chain.submit(bob.sign(maxPriorityFeePerGas=3 * GWEI))
    await chain.produce_block()
    history = await rpc("eth_feeHistory", "0x2", "latest", [0, 50, 100])
    assert history["oldestBlock"] == "0x1"
    assert [int(fee, 16) for fee in history["baseFeePerGas"]][:2] == [875_000_000, 765_625_000]
    assert len(history["baseFeePerGas"]) == 3
    assert history["gasUsedRatio"] == [0, 42_000 / 30_000_000]
    assert [int(tip, 16) // GWEI for tip in history["reward"][1]] == [1, 1, 3]
    assert history["reward"][0] == ["0x0"] * 3
    assert "reward" not in await rpc("eth_feeHistory", "0x400", "latest", [])


async def test_the_gas_price_is_the_next_base_fee_and_the_suggested_tip(rpc: Rpc) -> None:
    tip = int(await rpc("eth_maxPriorityFeePerGas"), 16)
    assert int(await rpc("eth_gasPrice"), 16) == 875_000_000 + tip
