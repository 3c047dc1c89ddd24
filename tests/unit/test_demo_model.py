"""The demo's real model: exported, run as a program, and compared with plain torch."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from meshd.node.demo.errors import ComparisonError
from meshd.node.demo.model import DIMENSIONS, OUTPUT
from meshd.node.demo.reference import REFERENCE_FILE, compare
from meshd.node.workloads.datasetfile import open_dataset
from meshd.node.workloads.datasets import slice_rows
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import RowSchema, f32_bytes, floats, pack, unpack
from meshd.node.workloads.tensors import Column

SENTENCES = 140
"""More than one chunk of 128."""
SCHEMA = RowSchema((Column(OUTPUT, "f32", (DIMENSIONS,)),))


def run(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module of the demo as the demo does and return the JSON of its last line."""
    command = [sys.executable, "-m", f"meshd.node.demo.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder with program, dataset and text, and what the command said of them."""
    folder = tmp_path_factory.mktemp("demo")
    answer = run("model", "--out", str(folder), "--sentences", str(SENTENCES), "--seed", "1")
    yield folder, answer
    for path in folder.iterdir():
        path.unlink()  # 90 MB, which pytest would keep


def test_the_program_computes_in_a_swarm_what_plain_torch_computes(
    made: tuple[Path, dict[str, Any]],
) -> None:
    from meshd.node.workloads.interpreter import infer_rows, load

    folder, answer = made
    dataset = open_dataset(Path(answer["data"]))
    chunk = {dataset.manifest.chunks[1].digest: dataset.read_chunk(1)}
    indices = range(128, SENTENCES)
    interpreter = load(Path(answer["program"]).read_bytes())
    output = folder / "embeddings.rows"
    output.write_bytes(
        infer_rows(interpreter, unpack(slice_rows(dataset.manifest, chunk, indices)))
    )

    texts = (folder / "sentences.txt").read_text().splitlines()
    (folder / "sentences.txt").write_text("".join(f"{text}\n" for text in texts[128:]))
    computed = run("reference", "--stage", "compute", "--dir", str(folder))
    assert computed["rows"] == len(indices)
    compared = run("reference", "--stage", "compare", "--dir", str(folder), "--output", str(output))
    assert compared["rows"] == len(indices)
    assert compared["max_abs_diff"] <= 1e-6
    norms = [math.hypot(*floats(row, "f32")) for row in unpack(output.read_bytes()).rows()]
    assert norms == pytest.approx([1.0] * len(indices), abs=1e-5)


def test_what_is_made_fits_together(made: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = made
    assert answer["rows"] == SENTENCES
    assert answer["seconds"] > 0
    manifest = open_dataset(folder / "sentences.data").manifest
    program = parse_program((folder / "minilm.program").read_bytes())
    assert (manifest.rows, manifest.rows_per_chunk) == (SENTENCES, 128)
    assert program.input_schema == manifest.schema
    assert program.output_schema == SCHEMA
    assert 170e9 < answer["units_per_shard_of_128"] < 200e9


def test_too_many_sentences_end_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meshd.node.demo.model", "--sentences", "9999999"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("meshd: ")
    assert "9999999 are needed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# ---- comparing, without any model ----------------------------------------------------------


def embeddings(*values: float) -> list[list[float]]:
    return [[value] * DIMENSIONS for value in values]


def write(folder: Path, output: Sequence[Sequence[float]], reference: bytes) -> Path:
    (folder / REFERENCE_FILE).write_bytes(reference)
    path = folder / "out.rows"
    path.write_bytes(pack(SCHEMA, [f32_bytes(row) for row in output]))
    return path


def test_the_largest_difference_of_any_number_is_found(tmp_path: Path) -> None:
    rows = embeddings(0.5, -0.25, 0.125)
    reference = b"".join(map(f32_bytes, rows))
    assert compare(tmp_path, write(tmp_path, rows, reference)).max_abs_diff == 0
    rows[1][17] += 0.0625
    rows[2][0] -= 0.03125
    compared = compare(tmp_path, write(tmp_path, rows, reference))
    assert (compared.rows, compared.max_abs_diff) == (3, 0.0625)


def test_rows_in_another_order_differ(tmp_path: Path) -> None:
    reference = b"".join(map(f32_bytes, embeddings(0.5, 0.25)))
    assert compare(tmp_path, write(tmp_path, embeddings(0.25, 0.5), reference)).max_abs_diff == 0.25


def test_an_output_of_other_length_is_refused(tmp_path: Path) -> None:
    reference = b"".join(map(f32_bytes, embeddings(0.5, 0.25)))
    with pytest.raises(ComparisonError, match=r"has 1 rows, reference\.f32 has 2"):
        compare(tmp_path, write(tmp_path, embeddings(0.5), reference))


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    reference = f32_bytes([0.0] * DIMENSIONS)
    output = write(tmp_path, embeddings(math.nan), reference)
    with pytest.raises(ComparisonError, match="'embedding' contains NaN"):
        compare(tmp_path, output)
    broken = struct.pack("<f", math.inf) + reference[4:]
    output = write(tmp_path, embeddings(0.0), broken)
    with pytest.raises(ComparisonError, match=r"reference\.f32 contains NaN or infinity"):
        compare(tmp_path, output)


def test_a_foreign_output_is_refused(tmp_path: Path) -> None:
    output = write(tmp_path, embeddings(0.0), f32_bytes([0.0] * DIMENSIONS))
    output.write_bytes(b"PK\x03\x04")
    with pytest.raises(ComparisonError, match=r"out\.rows is not the job's output"):
        compare(tmp_path, output)
    other = RowSchema((Column("logits", "f32", (DIMENSIONS,)),))
    output.write_bytes(pack(other, [f32_bytes([0.0] * DIMENSIONS)]))
    with pytest.raises(ComparisonError, match="other columns"):
        compare(tmp_path, output)


def test_a_missing_reference_is_named(tmp_path: Path) -> None:
    output = write(tmp_path, embeddings(0.0), b"")
    (tmp_path / REFERENCE_FILE).unlink()
    with pytest.raises(ComparisonError, match=r"reference\.f32 cannot be read"):
        compare(tmp_path, output)
