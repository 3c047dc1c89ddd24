"""The demo's cheater: a daemon whose executor saves itself work, whatever the job.

Of inference it invents half of the rows of every shard. Of training it leaves out a quarter of
the inner steps of every shard and extrapolates the change from the others. Cheating is no option
of a daemon: this module wraps the executor and is run only by the demo.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from pathlib import Path

from meshd.config.paths import read_text
from meshd.config.schema import resolve
from meshd.node.compute.executor import (
    CloseRequest,
    CloseResult,
    Executor,
    InferRequest,
    TrainRequest,
    TrainResult,
    read_program,
)
from meshd.node.daemon import main as run_daemon
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import pack, unpack
from meshd.node.workloads.training.contribution import (
    Layout,
    Part,
    contribution_head,
    layout_of,
    losses_of,
)
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.settings import TrainSettings

LEFT_OUT = 4
"""It leaves out one inner step in so many; a canary's two steps it computes as they are."""


class CheatingExecutor:
    """Computes a part of every shard and makes up the rest."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    async def infer(self, job: InferRequest) -> bytes:
        """Return rows of which every second half is invented: copies of the first."""
        rows = unpack(job.inputs)
        computed = (rows.count + 1) // 2
        half = pack(rows.schema, rows.rows()[:computed])
        answer = unpack(await self._inner.infer(replace(job, inputs=half)))
        honest = answer.rows()
        invented = [honest[(7 * i + 3) % computed] for i in range(rows.count - computed)]
        return pack(answer.schema, honest + invented)

    async def train(self, job: TrainRequest) -> TrainResult:
        """Return a contribution that is extrapolated from three quarters of its steps."""
        whole = TrainSettings.parse(job.settings)
        fewer = replace(whole, steps=whole.steps - whole.steps // LEFT_OUT)
        if fewer == whole:
            return await self._inner.train(job)
        rows = unpack(job.inputs)
        first = pack(rows.schema, rows.rows()[: fewer.rows])
        result = await self._inner.train(replace(job, settings=fewer.encode(), inputs=first))
        weights = trained_weights(parse_program(read_program(job.program)))
        layouts = layout_of(weights, fewer), layout_of(weights, whole)
        return TrainResult(extrapolated(result.contribution, *layouts), result.end_digest)

    async def close_round(self, job: CloseRequest) -> CloseResult:
        """Close a round as everybody does: each member would see another result."""
        return await self._inner.close_round(job)

    async def measure(self) -> int:
        """Return what the machine is worth if it worked."""
        return await self._inner.measure()

    async def aclose(self) -> None:
        """End the honest executor."""
        await self._inner.aclose()


def extrapolated(contribution: bytes, fewer: Layout, whole: Layout) -> bytes:
    """Return a contribution of *whole* as if all went on as in that of *fewer* steps.

    Every number is scaled by the ratio of steps; what was never computed repeats the last loss.
    """
    ratio = whole.steps / fewer.steps
    losses = losses_of(contribution)
    made = [contribution_head([*losses, *[losses[-1]] * (whole.steps - fewer.steps)])]
    for place in fewer.places:
        made += [_scaled(contribution, place.theta, ratio)]
        made += [_scaled(contribution, place.momentum, ratio)]
        made += [contribution[at : at + 2 * elements] for _, elements, at in place.second]
    return b"".join(made)


def _scaled(contribution: bytes, part: Part, ratio: float) -> bytes:
    """Return a part with every scale times *ratio*: they are stored far below fp16's largest."""
    scales = struct.unpack(f"<{part.blocks}e", contribution[part.scales_at : part.digits_at])
    scaled = struct.pack(f"<{part.blocks}e", *(scale * ratio for scale in scales))
    exponent = contribution[part.offset : part.scales_at]
    return exponent + scaled + contribution[part.digits_at : part.end]


def main(arguments: list[str]) -> None:
    """Run a daemon with the configuration file *arguments[0]*, cheating."""
    path = Path(arguments[0])
    config = resolve(read_text(path, "configuration"), {}, {}, source=str(path))
    run_daemon(config, CheatingExecutor)


if __name__ == "__main__":
    main(sys.argv[1:])
