"""The demo's cheater: a daemon whose executor invents half of the rows of every shard.

Cheating is no option of a daemon: this module wraps the executor and is run only by the demo.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from meshd.config.paths import read_text
from meshd.config.schema import resolve
from meshd.node.compute.executor import Executor, InferRequest
from meshd.node.daemon import main as run_daemon
from meshd.node.workloads.rows import pack, unpack


class InventingExecutor:
    """Computes the first half of a shard's rows and answers the rest with copies of them."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    async def infer(self, job: InferRequest) -> bytes:
        """Return rows of which every second half is invented."""
        rows = unpack(job.inputs)
        computed = (rows.count + 1) // 2
        half = pack(rows.schema, rows.rows()[:computed])
        answer = unpack(await self._inner.infer(replace(job, inputs=half)))
        honest = answer.rows()
        invented = [honest[(7 * i + 3) % computed] for i in range(rows.count - computed)]
        return pack(answer.schema, honest + invented)

    async def measure(self) -> int:
        """Return what the machine is worth if it worked."""
        return await self._inner.measure()

    async def aclose(self) -> None:
        """End the honest executor."""
        await self._inner.aclose()


def main(arguments: list[str]) -> None:
    """Run a daemon with the configuration file *arguments[0]*, cheating."""
    path = Path(arguments[0])
    config = resolve(read_text(path, "configuration"), {}, {}, source=str(path))
    run_daemon(config, InventingExecutor)


if __name__ == "__main__":
    main(sys.argv[1:])
