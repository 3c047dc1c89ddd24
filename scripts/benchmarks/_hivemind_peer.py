"""One Hivemind peer that trains with the others: `hivemind.Optimizer`, gradients averaged by epoch.

Runs in the environment of `_hivemind`, outside of meshd's. An epoch is what meshd calls a round:
all peers together do `peers x STEPS` steps, then average. A step is a sleep, so that processors
are free. One JSON line an event goes to the standard output; the clock is the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from functools import partial
from typing import Any

STEPS = 8
"""Steps of a peer in an epoch, when all are there."""
TUNED: dict[str, Any] = {
    "matchmaking_time": 1.5,
    "averaging_timeout": 6.0,
    "allreduce_timeout": 4.0,
    "next_chunk_timeout": 1.0,
    "load_state_timeout": 10.0,
    "averager_opts": {"request_timeout": 0.5},
    "tracker_opts": {
        "min_refresh_period": 0.1,
        "default_refresh_period": 0.3,
        "max_refresh_period": 1.0,
        "metadata_expiration": 5.0,
    },
}
"""Times fit for loopback. Without these everything is Hivemind's default.

It hands `averager_opts` to one of its two averagers only: `main` gives them to the other one.
"""


def note(kind: str, **what: object) -> None:
    """Write down that something happened just now."""
    print(json.dumps({"kind": kind, "at": time.monotonic(), **what}), flush=True)


def main() -> None:
    """Train until killed."""
    import hivemind
    import torch
    from hivemind.optim.grad_averager import GradientAverager

    options = _options()
    initial = [options.initial] if options.initial else []
    dht = hivemind.DHT(initial_peers=initial, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    _note_averaging(options.dies_averaging, whole=options.whole)
    weights = torch.nn.Parameter(torch.zeros(options.elements))
    tuned = dict(TUNED)
    tuned["grad_averager_factory"] = partial(GradientAverager, **tuned["averager_opts"])
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="bench",
        params=[weights],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
        batch_size_per_step=1,
        target_batch_size=options.peers * STEPS,
        **(tuned if options.tuned else {}),
    )
    note("ready", address=str(dht.get_visible_maddrs()[0]))
    _wait_until(options.begin)
    while True:
        if weights.grad is None:
            weights.grad = torch.ones_like(weights)
        time.sleep(options.compute_s / STEPS)
        before = optimizer.local_epoch
        optimizer.step()
        if optimizer.local_epoch != before:
            note("epoch", number=optimizer.local_epoch)


def _wait_until(path: str) -> None:
    """Wait for a file, which says that all peers are there."""
    while not os.path.exists(path):
        time.sleep(0.02)


def _note_averaging(dies: int, *, whole: bool) -> None:
    """Note every averaging of gradients; die in the *dies*th one.

    The main process dies, or with *whole* all processes of this peer, as by a power cut.
    """
    from hivemind.averaging.allreduce import AllReduceRunner
    from hivemind.optim.optimizer import Optimizer

    average = Optimizer._average_gradients_and_load_into_optimizer
    fall_back = Optimizer._load_local_gradients_into_optimizer
    run = AllReduceRunner.run
    local = [False]
    begun = [0]
    main_process = os.getpid()

    def noted(optimizer: Any, control: Any) -> None:
        local[0] = control is None
        note("averaging")
        average(optimizer, control)
        note("alone" if local[0] else "averaged")

    def noted_fall_back(optimizer: Any) -> None:
        local[0] = True
        fall_back(optimizer)

    async def dying(runner: Any) -> Any:
        begun[0] += 1
        if begun[0] == dies:
            note("died")
            if whole:
                os.killpg(0, signal.SIGKILL)
            os.kill(main_process, signal.SIGKILL)
        async for each in run(runner):
            yield each

    Optimizer._average_gradients_and_load_into_optimizer = noted
    Optimizer._load_local_gradients_into_optimizer = noted_fall_back
    AllReduceRunner.run = dying


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--initial", default="")
    parser.add_argument("--begin", required=True, help="training begins when this file exists")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--elements", type=int, default=108_928)
    parser.add_argument("--compute-s", type=float, default=1.0, help="of a peer in an epoch")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--dies-averaging", type=int, default=0, metavar="EPOCH")
    parser.add_argument("--whole", action="store_true", help="dies with all its processes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
