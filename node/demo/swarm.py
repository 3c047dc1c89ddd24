"""The demo's swarm: an embedded chain and one daemon a participant, each a process of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from meshd.node.client import Client, connect
from meshd.node.control.api import ControlError, Status
from meshd.node.demo.errors import DemoError
from meshd.node.demo.processes import Child, Processes, port_of

T = TypeVar("T")

READY_S = 90.0
"""Seconds that starting a participant, or finding all others, may take."""
MCC_EACH = "1000"
COIN_EACH = "10"
STAKE = "200"
POLL_S = 0.25

CONFIG = """\
data_dir = "{data_dir}"
network = "demo"
roles = [{roles}]
bootstrap = [{bootstrap}]

[chain]
rpc = "{rpc}"
deployment = "{deployment}"

[log]
format = "human"
level = "info"
"""


@dataclass
class Participant:
    """A daemon of the demo."""

    name: str
    role: str
    """What the report calls it: orchestrator, worker, validator or researcher."""
    child: Child
    client: Client
    status: Status
    arguments: tuple[str, ...]
    """What its process is started with."""

    @property
    def address(self) -> str:
        """Its account and identity."""
        return self.status["address"]

    @property
    def port(self) -> int:
        """Its TCP port on loopback."""
        return port_of(self.status["listen"][0])


@dataclass
class Swarm:
    """The chain, and everybody on it."""

    folder: Path
    processes: Processes
    rpc: str = ""
    chain: Child | None = None
    participants: dict[str, Participant] = field(default_factory=dict)

    @property
    def deployment(self) -> Path:
        """The file with the contracts' addresses."""
        return self.folder / "deployment.json"

    def of_role(self, role: str) -> list[Participant]:
        """Return the participants of one role, in the order of their names."""
        return [p for p in self.participants.values() if p.role == role]

    def put_in_order(self) -> None:
        """Order the participants by name, whoever was ready first; the orchestrator stays first."""
        names = sorted(
            self.participants, key=lambda name: (name.rstrip("0123456789"), len(name), name)
        )
        self.participants = {name: self.participants[name] for name in names}

    async def start_chain(self) -> None:
        """Start the embedded chain and deploy the contracts on it."""
        data_dir = str(self.folder / "chain")
        arguments = ["meshd.node.cli", "chain", "dev", "--port", "0", "--data-dir", data_dir]
        self.chain = self.processes.start("chain", arguments)
        with _deadline(READY_S, "the chain did not start"):
            while not (found := re.search(r"at (http://\S+),", self.chain.log.read_text())):
                self.processes.check()
                await trio.sleep(POLL_S)
        self.rpc = found.group(1)
        options = ["--rpc", self.rpc, "--data-dir", data_dir]
        out = ["--out", str(self.deployment), "--minimum-stake", "100", "--epoch-blocks", "5"]
        await self.processes.run("deploy", ["meshd.node.cli", "chain", "deploy", *options, *out])

    async def add(
        self, name: str, role: str, roles: tuple[str, ...], *, module: str = "meshd.node.cli"
    ) -> None:
        """Start a participant and wait until it is ready; the first one is the bootstrap peer."""
        first = next(iter(self.participants.values()), None)
        bootstrap = first.status["listen"][0] if first else None
        data_dir = self.folder / name
        config = self.folder / f"{name}.toml"
        config.write_text(
            CONFIG.format(
                data_dir=data_dir,
                roles=", ".join(f'"{each}"' for each in roles),
                bootstrap=f'"{bootstrap}"' if bootstrap else "",
                rpc=self.rpc,
                deployment=self.deployment,
            )
        )
        command = [module, "up", "--config"] if module == "meshd.node.cli" else [module]
        arguments = (*command, str(config))
        child = self.processes.start(name, arguments)
        client = connect(data_dir)
        status = await self._wait_ready(child, client)
        self.participants[name] = Participant(name, role, child, client, status, arguments)

    async def restart(self, name: str) -> None:
        """Start a participant that was killed again, with its key and its data directory."""
        old = self.participants[name]
        child = self.processes.start(name, old.arguments)
        status = await self._wait_ready(child, old.client)
        self.participants[name] = replace(old, child=child, status=status)

    async def _wait_ready(self, child: Child, client: Client) -> Status:
        with _deadline(READY_S, f"{child.name} did not get ready"):
            while True:
                self.processes.check()
                try:
                    return await call(client.status)
                except ControlError:
                    await trio.sleep(POLL_S)

    async def fund(self) -> None:
        """Give every participant coin for gas and MCC."""
        accounts = [p.address for p in self.participants.values()]
        options = ["--rpc", self.rpc, "--data-dir", str(self.folder / "chain")]
        amounts = ["--coin", COIN_EACH, "--mcc", MCC_EACH, "--deployment", str(self.deployment)]
        command = ["meshd.node.cli", "chain", "fund", *accounts, *options, *amounts]
        await self.processes.run("fund", command)

    async def stake(self) -> None:
        """Have orchestrator and validators register and stake."""
        async with trio.open_nursery() as nursery:
            for participant in [*self.of_role("orchestrator"), *self.of_role("validator")]:
                nursery.start_soon(call, partial(participant.client.stake, STAKE))

    async def wait_discovered(self) -> None:
        """Wait until every participant is connected to every other one it needs."""
        needed = len(self.participants) - 1
        with _deadline(READY_S, "the participants did not find one another"):
            for participant in self.participants.values():
                while (await call(participant.client.status))["peers"] < min(needed, 6):
                    self.processes.check()
                    await trio.sleep(POLL_S)
            researcher = self.of_role("researcher")[0]
            while True:
                peers = await call(researcher.client.peers)
                workers = sum("worker" in peer["roles"] for peer in peers)
                if workers >= min(2, len(self.of_role("worker"))):
                    return
                await trio.sleep(POLL_S)


async def call(request: Callable[[], T]) -> T:
    """Make a request of a daemon without stopping the others."""
    return await trio.to_thread.run_sync(request, abandon_on_cancel=True)  # type: ignore[call-arg]


def last_json(text: str) -> dict[str, object]:
    """Return the JSON object in the last line of what a process printed."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise DemoError(f"no JSON line in: {text[-500:]}")
    value = json.loads(lines[-1])
    assert isinstance(value, dict)
    return value


def number_of(answer: dict[str, object], name: str) -> int:
    """Return a whole number in a JSON object that a process of the demo printed."""
    value = answer[name]
    assert isinstance(value, int)
    return value


@contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise DemoError(f"{what} within {seconds:g} s") from error
