"""An EVM node's JSON-RPC through web3's async API, under trio: what meshd asks of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, cast

import httpx
import trio
from eth_typing import Hash32
from eth_utils.address import to_canonical_address, to_checksum_address
from pydantic_core import from_json
from web3 import AsyncWeb3
from web3.exceptions import (
    BlockNotFound,
    ContractLogicError,
    TransactionIndexingInProgress,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.middleware import ExtraDataToPOAMiddleware
from web3.providers.async_base import AsyncJSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from meshd.ledger.chain import Block, ChainUnavailable
from meshd.ledger.chain_calls import CONTRACTS
from meshd.ledger.contract_abi import ContractAbi, error_name
from meshd.ledger.intents import Transaction
from meshd.ledger.outbox import Fees, Mined
from meshd.p2p.identity import Address

REQUEST_S = 10.0
"""How long an answer of the RPC may take."""
MAX_ANSWER = 32 * 1024 * 1024
"""Most bytes of an answer."""
MAX_LOG_BLOCKS = 5_000
"""Blocks whose events are asked for at once."""


class TrioProvider(AsyncJSONBaseProvider):
    """web3's requests over httpx, which runs under trio; answers are bounded and have a deadline.

    Raises ChainUnavailable for whatever is no answer.
    """

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__()
        self.url = url
        # The deadline is trio's; a proxy of the environment has no business between node and RPC.
        self._client = httpx.AsyncClient(
            transport=transport,
            timeout=None,
            trust_env=False,
            headers={"content-type": "application/json"},
        )

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Send one request and return the answer."""
        try:
            with trio.fail_after(REQUEST_S):
                raw = await self._post(self.encode_rpc_request(method, params))
            # Not json.loads: web3 raises the recursion limit so far that a deeply nested answer
            # overflows the stack there.
            reply = from_json(raw)
        except trio.TooSlowError as error:
            raise self._unavailable(f"gave no answer in {REQUEST_S:g} s") from error
        except httpx.HTTPError as error:
            raise self._unavailable(
                f"cannot be reached ({error or type(error).__name__})"
            ) from error
        except ValueError as error:
            raise self._unavailable("answered what is no JSON") from error
        if not isinstance(reply, dict) or not ("result" in reply or "error" in reply):
            raise self._unavailable("answered what is no JSON-RPC")
        return cast(RPCResponse, reply)

    async def _post(self, body: bytes) -> bytes:
        async with self._client.stream("POST", self.url, content=body) as response:
            if response.status_code != 200:
                raise self._unavailable(f"answered with status {response.status_code}")
            parts, size = [], 0
            body_parts = cast(AsyncGenerator[bytes, None], response.aiter_bytes())
            async with aclosing(body_parts):
                async for part in body_parts:
                    parts.append(part)
                    size += len(part)
                    if size > MAX_ANSWER:
                        raise self._unavailable(f"answered with over {MAX_ANSWER} bytes")
        return b"".join(parts)

    def _unavailable(self, what: str) -> ChainUnavailable:
        return ChainUnavailable(
            f"the chain at {self.url} {what}: check that it runs, and chain.rpc"
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class EvmRpc:
    """What meshd asks of an EVM node, and the outbox's Wire; all of it raises ChainUnavailable."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        self._provider = TrioProvider(url, transport)
        self._eth = AsyncWeb3(self._provider, middleware=[ExtraDataToPOAMiddleware]).eth

    async def aclose(self) -> None:
        """Close all connections."""
        await self._provider.aclose()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        # web3 raises the built-in ones where an answer is not of the form that it expects
        except (Web3Exception, ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"answered {type(error).__name__}: {error}"[:300]
            raise ChainUnavailable(
                f"the chain at {self.url} {what}: check chain.rpc and the deployment"
            ) from error

    async def chain_id(self) -> int:
        """Return the chain's id."""
        with self._talking():
            return int(await self._eth.chain_id)

    async def genesis(self) -> bytes:
        """Return the hash of the first block: two chains of one id differ in it."""
        with self._talking():
            return bytes((await self._eth.get_block(0))["hash"])

    async def has_code(self, account: Address) -> bool:
        """Return whether *account* is a contract."""
        with self._talking():
            return bool(await self._eth.get_code(to_checksum_address(account)))

    async def block(self, height: int | None = None) -> Block | None:
        """Return the block at *height*, the newest by default; None if there is none yet."""
        with self._talking():
            try:
                found = await self._eth.get_block("latest" if height is None else height)
            except BlockNotFound:
                return None
        return Block(int(found["number"]), bytes(found["hash"]), int(found["timestamp"]))

    async def height(self) -> int:
        """Return the newest block's height."""
        with self._talking():
            return int(await self._eth.block_number)

    async def balance(self, account: Address) -> int:
        """Return an account's native coin (wei)."""
        with self._talking():
            return int(await self._eth.get_balance(to_checksum_address(account)))

    async def nonce(self, sender: Address, height: int | None = None) -> int:
        """Return the nonce of *sender*'s next transaction, now or after block *height*."""
        with self._talking():
            account = to_checksum_address(sender)
            at: Any = "latest" if height is None else height
            return int(await self._eth.get_transaction_count(account, at))

    async def fees(self) -> Fees:
        """Return what gas costs now."""
        with self._talking():
            head = await self._eth.get_block("latest")
            return Fees(int(head["baseFeePerGas"]), int(await self._eth.max_priority_fee))

    async def gas(self, sender: Address, transaction: Transaction) -> int | None:
        """Return the gas that *transaction* needs; None if it would fail now."""
        with self._talking():
            try:
                return int(await self._eth.estimate_gas(_fields(sender, transaction)))
            except (ContractLogicError, Web3RPCError):
                return None

    async def broadcast(self, raw: bytes) -> str | None:
        """Send a signed transaction; return the refusal if there is one."""
        with self._talking():
            try:
                await self._eth.send_raw_transaction(raw)
            except Web3RPCError as error:
                return _message(error)
        return None

    async def mined(self, tx: bytes) -> Mined | None:
        """Return where a transaction is, None if it is in no block."""
        with self._talking():
            try:
                receipt = await self._eth.get_transaction_receipt(Hash32(tx))
            except (TransactionNotFound, TransactionIndexingInProgress):
                return None
        return Mined(int(receipt["blockNumber"]), int(receipt["status"]) == 1)

    async def created(self, tx: bytes) -> Address | None:
        """Return the contract that a mined transaction created."""
        with self._talking():
            receipt = await self._eth.get_transaction_receipt(Hash32(tx))
        found = receipt["contractAddress"]
        return None if found is None else Address(to_canonical_address(found))

    async def why_failed(self, sender: Address, transaction: Transaction, height: int) -> str:
        """Return the contract's error of a transaction that failed in block *height*.

        It is executed again after that block and, if it succeeds there, before it.
        """
        for at in (height, height - 1):
            with self._talking():
                try:
                    await self._eth.call(_fields(sender, transaction), at)
                except ContractLogicError as error:
                    return error_name(CONTRACTS, _revert_data(error))
                except Web3RPCError as error:
                    return _message(error)
        return "it failed in its block, and would not fail now: it may have run out of gas"

    async def read(
        self, abi: ContractAbi, contract: Address, name: str, *arguments: Any, at: int | None = None
    ) -> Any:
        """Return what a contract's view *name* says, now or after block *at*."""
        fields: Any = {
            "to": to_checksum_address(contract),
            "data": abi.call(name, *arguments),
        }
        with self._talking():
            data = await self._eth.call(fields, "latest" if at is None else at)
        try:
            return abi.result(name, bytes(data))
        except ValueError as error:
            raise ChainUnavailable(
                f"the chain at {self.url}: {error}: correct chain.deployment"
            ) from error

    async def logs(
        self, contract: Address, topics: Sequence[Any], first: int, last: int
    ) -> list[Any]:
        """Return a contract's logs in blocks *first* to *last*, in order."""
        found: list[Any] = []
        for start in range(first, last + 1, MAX_LOG_BLOCKS):
            wanted: Any = {
                "address": to_checksum_address(contract),
                "topics": list(topics),
                "fromBlock": start,
                "toBlock": min(last, start + MAX_LOG_BLOCKS - 1),
            }
            with self._talking():
                found.extend(await self._eth.get_logs(wanted))
        return found


def _fields(sender: Address, transaction: Transaction) -> Any:
    fields = {
        "from": to_checksum_address(sender),
        "data": transaction.data,
        "value": transaction.value,
    }
    if transaction.to is not None:
        fields["to"] = to_checksum_address(transaction.to)
    return fields


def _message(error: Web3RPCError) -> str:
    fault: Any = (error.rpc_response or {}).get("error")
    return str(fault.get("message", error) if isinstance(fault, dict) else error)


def _revert_data(error: ContractLogicError) -> bytes:
    text = error.data if isinstance(error.data, str) else ""
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        return b""
