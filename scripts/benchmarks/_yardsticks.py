"""What the yardsticks do: `python _yardsticks.py NAME [--option=value ...]`, figures as JSON.

Runs outside meshd's environment: at its head it imports the standard library only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import site
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MESHD_PACKAGES = ROOT / ".venv" / "lib" / "python3.11" / "site-packages"
WARM_UP = 50
BATCH = 32
"""Rows that torch computes at a time; larger ones are slower on a processor."""


def negate(row: list[float]) -> list[float]:
    """Do the one operator on one row."""
    return [-x for x in row]


# ---- dispatch ------------------------------------------------------------------------------


def dispatch_ray(options: argparse.Namespace) -> dict[str, float]:
    """Send one-operator tasks through Ray: one after another, then all at once."""
    with _ray(options.workers) as ray:
        task = ray.remote(negate)
        send = task.remote
        return _time_tasks(options.tasks, lambda row: ray.get(send(row)), _all_ray(ray, send))


def _all_ray(ray: Any, send: Callable[..., Any]) -> Callable[[list[list[float]]], Any]:
    return lambda rows: ray.get([send(row) for row in rows])


def dispatch_dask(options: argparse.Namespace) -> dict[str, float]:
    """Send one-operator tasks through Dask's distributed scheduler."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=options.workers, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        return _time_tasks(
            options.tasks,
            lambda row: client.submit(negate, row, pure=False).result(),
            lambda rows: client.gather([client.submit(negate, row, pure=False) for row in rows]),
        )


def _time_tasks(
    tasks: int, one: Callable[[list[float]], Any], many: Callable[[list[list[float]]], Any]
) -> dict[str, float]:
    rows = [[float(i), 1.0, 2.0, 3.0] for i in range(tasks)]
    for row in rows[:WARM_UP]:
        one(row)
    many(rows[:WARM_UP])
    taken = []
    for row in rows[: max(WARM_UP, tasks // 4)]:
        began = time.perf_counter()
        one(row)
        taken.append(time.perf_counter() - began)
    began = time.perf_counter()
    many(rows)
    seconds = time.perf_counter() - began
    return {"p50_ms": 1000 * statistics.median(taken), "shards_per_s": tasks / seconds}


# ---- embed ---------------------------------------------------------------------------------


class Embedder:
    """MiniLM in plain torch, one thread."""

    def __init__(self) -> None:
        self.rank = os.getpid()
        _borrow_meshd()
        from meshd.node.demo.model import go_offline, load_encoder

        go_offline(1)
        import torch

        torch.set_num_threads(1)
        self._torch = torch
        self._encoder = load_encoder()

    def embed(self, tokens: Any, mask: Any) -> Any:
        """Return the embeddings of padded sentences: i64 (rows, 64) in, f32 (rows, 384) out."""
        torch = self._torch
        found = []
        with torch.inference_mode():
            for at in range(0, len(tokens), BATCH):
                ids = torch.from_numpy(tokens[at : at + BATCH].copy())
                masked = torch.from_numpy(mask[at : at + BATCH].copy())
                hidden = self._encoder(input_ids=ids, attention_mask=masked).last_hidden_state
                weights = masked.unsqueeze(-1).float()
                mean = (hidden * weights).sum(1) / weights.sum(1)
                found.append(torch.nn.functional.normalize(mean, dim=1))
        return torch.cat(found).numpy()


def embed_torch(options: argparse.Namespace) -> dict[str, float]:
    """Embed the sentences in a plain loop, in as many processes as there are workers."""
    shards = _shards(options)
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(options.workers)
    spans: Any = spawn.Queue()
    parts = [shards[i :: options.workers] for i in range(options.workers)]
    processes = [spawn.Process(target=_embed_part, args=(part, ready, spans)) for part in parts]
    for process in processes:
        process.start()
    found = [spans.get() for _ in processes]
    for process in processes:
        process.join()
    seconds = max(end for _, end in found) - min(began for began, _ in found)
    return {"rows_per_s": options.rows / seconds, "seconds": seconds}


def _embed_part(part: list[Any], ready: Any, spans: Any) -> None:
    embedder = Embedder()
    embedder.embed(*part[0])
    ready.wait()
    began = time.monotonic()
    for tokens, mask in part:
        embedder.embed(tokens, mask)
    spans.put((began, time.monotonic()))


def embed_ray(options: argparse.Namespace) -> dict[str, float]:
    """Embed the sentences with as many Ray actors as there are workers."""
    shards = _shards(options)
    with _ray(options.workers) as ray:
        from ray.util import ActorPool

        actors = [ray.remote(Embedder).remote() for _ in range(options.workers)]
        ray.get([actor.embed.remote(*shards[0]) for actor in actors])
        began = time.perf_counter()
        pool = ActorPool(actors)
        count = sum(len(rows) for rows in pool.map(lambda a, s: a.embed.remote(*s), shards))
        seconds = time.perf_counter() - began
    if count != options.rows:
        raise SystemExit(f"Ray returned {count} rows of {options.rows}")
    return {"rows_per_s": count / seconds, "seconds": seconds}


def _shards(options: argparse.Namespace) -> list[tuple[Any, Any]]:
    """Return the sentences of the job as padded tokens, cut into its shards; not timed."""
    _borrow_meshd()
    from meshd.node.demo.model import go_offline, tokenize

    go_offline(1)
    texts = options.sentences.read_text().splitlines()[: options.rows]
    columns = tokenize(texts)
    ids, mask = (columns[name].numpy() for name in ("input_ids", "attention_mask"))
    size = options.rows_per_shard
    return [(ids[i : i + size], mask[i : i + size]) for i in range(0, len(texts), size)]


def _borrow_meshd() -> None:
    """Let this process import torch, the model and meshd from meshd's own environment."""
    if str(MESHD_PACKAGES) not in sys.path:
        site.addsitedir(str(MESHD_PACKAGES))


@contextmanager
def _ray(cpus: int) -> Iterator[Any]:
    import ray

    ray.init(num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


YARDSTICKS = {
    "dispatch-ray": dispatch_ray,
    "dispatch-dask": dispatch_dask,
    "embed-torch": embed_torch,
    "embed-ray": embed_ray,
}


def main() -> None:
    """Run one yardstick; the last line printed is the JSON of what it measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=YARDSTICKS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rows-per-shard", type=int, default=128)
    parser.add_argument("--sentences", type=Path)
    options = parser.parse_args()
    print(json.dumps(YARDSTICKS[options.name](options)))


if __name__ == "__main__":
    main()
