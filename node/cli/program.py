"""`meshd program`: programs, made of an author's own modules and inspected without a daemon."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshd.node.cli.lazy import LazyGroup
from meshd.node.cli.options import as_json
from meshd.node.cli.output import print_json, print_pairs

if TYPE_CHECKING:
    from torch import Tensor

_INPUT = re.compile(r"([A-Za-z_]\w*)=(\w+)\[([0-9, ]*)\]")
_EXAMPLE_ROWS = 3


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
    from meshd.node.workloads.export import export_program

    module, example = _build(factory)
    if example is None:
        example = _example(inputs)
    elif inputs:
        raise click.UsageError(f"{factory} returns examples of its own: leave out --input")
    data = export_program(module, example, outputs=outputs or None)
    temporary = out.with_name(f".{out.name}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    _print(_described(out, _EXAMPLE_ROWS), as_json)


@program.command(epilog="Example:  meshd program inspect minilm.program --rows 128")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--rows", type=click.IntRange(1), default=128, show_default=True, help="Rows of a shard."
)
@as_json
def inspect(file: Path, rows: int, as_json: bool) -> None:
    """Check the program in FILE and show what it holds.

    Nothing of it is run. A .pt2, a pickle or another format that can carry code is refused.
    """
    _print(_described(file, rows), as_json)


def _build(factory: str) -> tuple[Any, dict[str, Tensor] | None]:
    """Return what the author's factory returns: a module, and its example if it has one."""
    from torch import Tensor, nn

    from meshd.node.workloads.errors import ExportError

    name, colon, attribute = factory.rpartition(":")
    if not colon or not name or not attribute:
        raise click.UsageError(f"{factory!r} is not MODULE:FACTORY: write one like model.py:build")
    try:
        built = getattr(_import(name), attribute)()
    except Exception as error:  # the author's own code, which may raise anything
        raise ExportError(
            f"{factory} cannot be called: {type(error).__name__}: {error}: "
            "it must be a function without parameters that returns an nn.Module"
        ) from error
    module, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, nn.Module):
        raise ExportError(f"{factory} returns a {type(module).__name__}: return an nn.Module")
    if example is not None and not (
        isinstance(example, dict) and all(isinstance(array, Tensor) for array in example.values())
    ):
        raise ExportError(f"{factory} returns an example that is no dict of arrays by name")
    return module, example


def _import(name: str) -> Any:
    if not name.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        return importlib.import_module(name)
    path = Path(name).resolve()
    sys.path.insert(0, str(path.parent))  # as `python FILE` does
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _example(inputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Return rows of zeros and ones, valid as indices too, or of normal numbers for floats."""
    import torch

    dtypes = {
        "bool": torch.bool,
        "u8": torch.uint8,
        "i8": torch.int8,
        "i16": torch.int16,
        "i32": torch.int32,
        "i64": torch.int64,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "f32": torch.float32,
        "f64": torch.float64,
    }
    if not inputs:
        raise click.UsageError("say what one row of each input is, such as --input tokens=i64[64]")
    generator = torch.Generator().manual_seed(0)
    example: dict[str, Tensor] = {}
    for text in inputs:
        match = _INPUT.fullmatch(text)
        if match is None or match.group(2) not in dtypes:
            raise click.UsageError(
                f"--input {text!r} is not NAME=DTYPE[SIZES] with a dtype of {', '.join(dtypes)}: "
                "write one like tokens=i64[64]"
            )
        dtype = dtypes[match.group(2)]
        sizes = [int(size) for size in match.group(3).replace(" ", "").split(",") if size]
        shape = (_EXAMPLE_ROWS, *sizes)
        if dtype.is_floating_point:
            example[match.group(1)] = torch.randn(shape, generator=generator).to(dtype)
        else:
            example[match.group(1)] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return example


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
