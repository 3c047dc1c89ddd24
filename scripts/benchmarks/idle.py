"""What an idle worker costs: memory, processor, time to ready and the answer of `meshd status`.

Yardsticks in the same run: a bare process that imports libp2p and web3 and does nothing (the
least a daemon on them can weigh), and `python -c pass` (the least a command can take).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import trio

from meshd.node.demo.processes import open_processes
from meshd.node.demo.swarm import Swarm

IDLE_S = 60.0
SETTLE_S = 15.0
GOALS = {"rss_mb": 130.0, "cpu_percent": 0.6, "ready_s": 2.5, "status_ms": 200.0}


def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=IDLE_S)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as folder:
        figures = trio.run(_measure, Path(folder), options.seconds)
    figures |= _yardsticks()
    print(f"{'':14}{'measured':>10}{'goal':>8}{'yardstick':>11}{'ratio':>8}")
    for name, goal in GOALS.items():
        yardstick = figures.get(f"{name}_yardstick")
        ratio = f"{figures[name] / yardstick:8.2f}" if yardstick else ""
        shown = f"{yardstick:11.1f}" if yardstick else " " * 11
        print(f"{name:14}{figures[name]:10.2f}{goal:8.1f}{shown}{ratio}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


async def _measure(folder: Path, seconds: float) -> dict[str, float]:
    async with open_processes(folder) as processes:
        swarm = Swarm(folder, processes)
        await swarm.start_chain()
        await swarm.add("orchestrator", "orchestrator", ("orchestrator", "aggregator"))
        await trio.sleep(SETTLE_S)
        began = time.monotonic()
        await swarm.add("worker", "worker", ("worker",))
        ready_s = time.monotonic() - began
        process = psutil.Process(swarm.participants["worker"].child.pid)
        await trio.sleep(SETTLE_S)
        before = process.cpu_times()
        began = time.monotonic()
        await trio.sleep(seconds)
        after = process.cpu_times()
        used = after.user + after.system - before.user - before.system
        return {
            "rss_mb": process.memory_info().rss / 1e6,
            "cpu_percent": 100 * used / (time.monotonic() - began),
            "ready_s": ready_s,
            "status_ms": await trio.to_thread.run_sync(_time_status, folder / "worker"),
        }


def _time_status(data_dir: Path) -> float:
    command = [str(Path(sys.executable).parent / "meshd"), "status", "--data-dir", str(data_dir)]
    return _median_ms(command)


def _median_ms(command: list[str], times: int = 9) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


def _yardsticks() -> dict[str, float]:
    code = "import libp2p, web3, resource; print(open('/proc/self/statm').read().split()[1])"
    command = [sys.executable, "-W", "ignore", "-c", code]
    began = time.perf_counter()
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "ready_s_yardstick": time.perf_counter() - began,
        "rss_mb_yardstick": int(printed) * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "status_ms_yardstick": _median_ms([sys.executable, "-c", "pass"]),
    }


if __name__ == "__main__":
    main()
