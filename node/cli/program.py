"""`meshd program`: programs, made of an author's own modules, inspected and verified."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from meshd.node.cli.failures import printable
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
@click.option("--training", is_flag=True, help="The module returns a loss, and is to be trained.")
@as_json
def export(
    factory: str,
    out: Path,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    training: bool,
    as_json: bool,
) -> None:
    """Export a torch module of yours as a program.

    MODULE is a Python module or a .py file of yours; it runs on this machine. FACTORY takes
    nothing and returns an nn.Module, or the module and a dict of example arrays by name; without
    that dict --input says what one row of each input is. The program is run against the module
    and refused unless every bit agrees.
    """
    from meshd.node.cli.exporting import export_factory

    data = export_factory(factory, inputs, outputs, training=training)
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


@program.command(
    epilog="\b\nExamples:\n"
    "  meshd program verify my.program\n"
    "  meshd program verify my.program --against model.py:build --input tokens=i64[64]"
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--data",
    "rows_from",
    metavar="DATASET",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Run it on the first rows of this dataset.",
)
@click.option(
    "--against",
    metavar="MODULE:FACTORY",
    help="Export this module again and compare: it is your code, and runs here.",
)
@click.option("--input", "inputs", metavar="NAME=DTYPE[SIZES]", multiple=True, help="As exported.")
@click.option("--output", "outputs", metavar="NAME", multiple=True, help="As exported.")
@click.option(
    "--rows", type=click.IntRange(1), default=_ROWS, show_default=True, help="Rows of a shard."
)
@as_json
def verify(
    file: Path,
    rows_from: Path | None,
    against: str | None,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    rows: int,
    as_json: bool,
) -> int:
    """Run the program in FILE twice and compare every bit.

    It is read, planned and costed, then run in two executor processes on two numbers of rows:
    every bit has to agree, and no row may depend on those beside it. With --against the module
    is exported again, which runs it beside its program, and must give the same program. Exits 1
    if anything fails.
    """
    from meshd.node.cli.verifying import Check, trains
    from meshd.node.cli.verifying import verify as checks_of
    from meshd.node.workloads.program import parse_program, refuse_foreign

    refuse_foreign(file.name)
    checks = list(checks_of(file, rows_from, rows))
    if against is not None and all(check.state != "fail" for check in checks):
        from meshd.node.cli.exporting import export_factory

        program = parse_program(file.read_bytes())
        data = export_factory(against, inputs, outputs, training=trains(program))
        again = parse_program(data).digest
        same = again == program.digest
        text = "is" if same else f"is not (0x{again.hex()} is)"
        checks.append(
            Check("module", "ok" if same else "fail", f"this program {text} that of {against}")
        )
    failed = any(check.state == "fail" for check in checks)
    if as_json:
        print_json(
            {
                "path": str(file),
                "ok": not failed,
                "checks": [{"check": c.name, "state": c.state, "text": c.text} for c in checks],
            }
        )
    else:
        for check in checks:
            click.echo(printable(f"{check.state:<4}  {check.name}: {check.text}"))
    return 1 if failed else 0


def _described(path: Path, rows: int) -> dict[str, Any]:
    from meshd.node.workloads.planning import check_program, memory_bytes, units
    from meshd.node.workloads.program import parse_program, refuse_foreign

    refuse_foreign(path.name)
    found = parse_program(path.read_bytes())
    check_program(found)
    trains = any(not output.shape for output in found.outputs)
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
        "trains": trains,
        "units": units(found, rows, training=trains),
        "memory_bytes": memory_bytes(found, rows, training=trains),
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
            f"{rows} rows": ("an inner step: " if described["trains"] else "")
            + f"{described['units'] / 1e9:.6g} x 10^9 compute units, "
            f"{described['memory_bytes'] / (1 << 20):.1f} MiB",
        }
    )
