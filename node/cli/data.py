"""`meshd data`: datasets, made and inspected without a daemon."""

from __future__ import annotations

import json
from pathlib import Path

import click

from meshd.node.cli.lazy import LazyGroup
from meshd.node.cli.options import as_json
from meshd.node.cli.output import print_json, print_pairs, print_table

_WIDEST = 60
"""Characters of a value in a table."""


@click.group(cls=LazyGroup)
def data() -> None:
    """Make and inspect datasets.

    A dataset is rows of numbers in chunks that are named by their digest.
    """


@data.command(epilog="Example:  meshd data add sentences.npz --out sentences.data")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option(
    "--rows-per-chunk",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Rows that are fetched together.",
)
@as_json
def add(file: Path, out: Path, rows_per_chunk: int, as_json: bool) -> None:
    """Make a dataset of FILE.

    FILE is .safetensors, .npz or .jsonl, with one array for each column, whose first dimension
    is the rows. In .jsonl each line is an object of numbers and lists; whole numbers become
    i64, others f32.
    """
    from meshd.node.cli.importing import read_columns
    from meshd.node.workloads.datasetfile import open_dataset, write_dataset
    from meshd.node.workloads.datasets import build_dataset

    dataset = build_dataset(read_columns(file), rows_per_chunk)
    write_dataset(dataset, out)
    _print(_described(open_dataset(out).path), as_json)


@data.command(epilog="Example:  meshd data inspect sentences.data --json | jq .rows")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@as_json
def inspect(file: Path, as_json: bool) -> None:
    """Check the dataset in FILE and show what it holds."""
    _print(_described(file), as_json)


@data.command(epilog="Example:  meshd data head sentences.data --rows 3")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--rows", type=click.IntRange(1, 10_000), default=5, show_default=True)
@click.option("--from", "first", type=click.IntRange(0), default=0, help="The first row shown.")
@as_json
def head(file: Path, rows: int, first: int, as_json: bool) -> None:
    """Print the first rows of the dataset in FILE.

    Only the chunks that hold them are read and checked.
    """
    from meshd.node.cli.values import rows_of
    from meshd.node.workloads.datasetfile import open_dataset

    dataset = open_dataset(file)
    shown = rows_of(dataset, first, min(first + rows, dataset.manifest.rows))
    if as_json:
        print_json(shown)
        return
    names = [column.name for column in dataset.manifest.columns]
    table = [(first + at, *(_short(row[name]) for name in names)) for at, row in enumerate(shown)]
    print_table(("ROW", *names), table, f"{file} has {dataset.manifest.rows} rows")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _described(path: Path) -> dict[str, object]:
    from meshd.node.workloads.datasetfile import open_dataset

    dataset = open_dataset(path)
    manifest = dataset.manifest
    for index in range(len(manifest.chunks)):
        dataset.read_chunk(index)
    return {
        "path": str(path),
        "digest": "0x" + manifest.dataset_id.hex(),
        "rows": manifest.rows,
        "rows_per_chunk": manifest.rows_per_chunk,
        "chunks": len(manifest.chunks),
        "bytes": sum(chunk.size for chunk in manifest.chunks),
        "columns": [
            {"name": column.name, "dtype": column.dtype, "shape": list(column.shape)}
            for column in manifest.columns
        ],
    }


def _print(described: dict[str, object], as_json: bool) -> None:
    if as_json:
        print_json(described)
        return
    columns = described["columns"]
    assert isinstance(columns, list)
    print_pairs(
        {
            "dataset": described["path"],
            "digest": described["digest"],
            "rows": f"{described['rows']} in {described['chunks']} chunks, "
            f"{described['bytes']} bytes",
            "column": [f"{c['name']}: {c['dtype']} {c['shape']}" for c in columns],
        }
    )
