"""`meshd program`: programs, made of an author's own modules and inspected without a daemon."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from meshd.node.cli.lazy import LazyGroup
from meshd.node.cli.options import as_json
from meshd.node.cli.output import print_json, print_pairs

_ROWS = 128
"""Rows of the shard whose cost is shown."""


@click.group(cls=LazyGroup)
def program() -> None:
    """Make and inspect programs.

    A program is what a job computes, as data and never as code.
    """


@program.command(
    epilog="Example:  meshd program export model.py:build --input tokens=i64[64] --out my.program"
)
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option(
    "--input",
    "inputs",
    metavar="NAME=DTYPE[SIZES]",
    multiple=True,
    help="One row of an input, such as tokens=i64[64]; may be repeated.",
)
@click.option("--output", "outputs", metavar="NAME", multiple=True, help="Name of a result.")
@as_json
def export(
    factory: str, out: Path, inputs: tuple[str, ...], outputs: tuple[str, ...], as_json: bool
) -> None:
    """Export a torch module of yours as a program.

    MODULE is a Python module or a .py file of yours; it runs on this machine. FACTORY takes
    nothing and returns an nn.Module, or the module and a dict of example arrays by name; without
    that dict --input says what one row of each input is. The program is run against the module
    and refused unless every bit agrees.
    """
    from meshd.node.cli.exporting import export_factory

    data = export_factory(factory, inputs, outputs)
    temporary = out.with_name(f".{out.name}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    _print(_described(out, _ROWS), as_json)


@program.command(epilog="Example:  meshd program inspect minilm.program --rows 128")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--rows", type=click.IntRange(1), default=_ROWS, show_default=True, help="Rows of a shard."
)
@as_json
def inspect(file: Path, rows: int, as_json: bool) -> None:
    """Check the program in FILE and show what it holds.

    Nothing of it is run. A .pt2, a pickle or another format that can carry code is refused.
    """
    _print(_described(file, rows), as_json)


def _described(path: Path, rows: int) -> dict[str, Any]:
    from meshd.node.workloads.planning import check_program, memory_bytes, units
    from meshd.node.workloads.program import parse_program, refuse_foreign

    refuse_foreign(path.name)
    found = parse_program(path.read_bytes())
    check_program(found)
    operators = Counter(node.operator for node in found.nodes)
    return {
        "path": str(path),
        "digest": "0x" + found.digest.hex(),
        "bytes": found.size,
        "inputs": [
            {"name": column.name, "dtype": column.dtype, "shape": list(column.shape)}
            for column in found.inputs
        ],
        "outputs": [
            {"name": output.name, "dtype": output.dtype, "shape": list(output.shape)[1:]}
            for output in found.outputs
        ],
        "weights": len(found.weights),
        "parameters": sum(weight.spec.elements for weight in found.weights),
        "nodes": len(found.nodes),
        "operators": dict(operators.most_common()),
        "rows": rows,
        "units": units(found, rows),
        "memory_bytes": memory_bytes(found, rows),
    }


def _print(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(described)
        return
    common = list(described["operators"].items())
    rows = described["rows"]
    print_pairs(
        {
            "program": described["path"],
            "digest": described["digest"],
            "size": f"{described['bytes']} bytes, {described['parameters']} parameters in "
            f"{described['weights']} weights",
            "input": [f"{c['name']}: {c['dtype']} {c['shape']}" for c in described["inputs"]],
            "output": [f"{c['name']}: {c['dtype']} {c['shape']}" for c in described["outputs"]],
            "steps": f"{described['nodes']}: "
            + ", ".join(f"{count} {name}" for name, count in common[:8])
            + (f" and {len(common) - 8} more kinds" if len(common) > 8 else ""),
            f"{rows} rows": f"{described['units'] / 1e9:.6g} x 10^9 compute units, "
            f"{described['memory_bytes'] / (1 << 20):.1f} MiB",
        }
    )
