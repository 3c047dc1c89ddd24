"""Calls an author's factory and exports what it returns; imports torch, on the author's machine."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import Tensor, nn

from meshd.node.workloads.errors import ExportError
from meshd.node.workloads.export import export_program
from meshd.node.workloads.kernels import TORCH_DTYPES

_INPUT: Final = re.compile(r"([A-Za-z_]\w*)=(\w+)\[([0-9, ]*)\]")
_ROWS: Final = 3


def export_factory(
    factory: str, inputs: Sequence[str], outputs: Sequence[str], *, training: bool = False
) -> bytes:
    """Return the program of what MODULE:FACTORY returns; with *training* its loss and gradients.

    Raises ExportError if it cannot be called or exported, UsageError for options that do not
    fit it.
    """
    module, example = _build(factory)
    if example is None:
        example = _example(inputs)
    elif inputs:
        raise click.UsageError(f"{factory} returns examples of its own: leave out --input")
    return export_program(module, example, outputs=outputs or None, training=training)


def _build(factory: str) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """Return what the author's factory returns: a module, and its example if it has one."""
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


def _example(inputs: Sequence[str]) -> dict[str, Tensor]:
    """Return rows of zeros and ones, valid as indices too, or of normal numbers for floats."""
    if not inputs:
        raise click.UsageError("say what one row of each input is, such as --input tokens=i64[64]")
    generator = torch.Generator().manual_seed(0)
    example: dict[str, Tensor] = {}
    for text in inputs:
        match = _INPUT.fullmatch(text)
        if match is None or match.group(2) not in TORCH_DTYPES:
            raise click.UsageError(
                f"--input {text!r} is not NAME=DTYPE[SIZES] with a dtype of "
                f"{', '.join(TORCH_DTYPES)}: write one like tokens=i64[64]"
            )
        dtype = TORCH_DTYPES[match.group(2)]
        sizes = [int(size) for size in match.group(3).replace(" ", "").split(",") if size]
        shape = (_ROWS, *sizes)
        if dtype.is_floating_point:
            example[match.group(1)] = torch.randn(shape, generator=generator).to(dtype)
        else:
            example[match.group(1)] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return example
