"""What can be wrong with a program, a dataset or rows.

    WorkloadError
    ├── ProgramError      the bytes are not a program, or the program cannot run on these rows
    ├── TensorFileError   the bytes are not the one canonical safetensors form
    ├── DatasetError      a manifest, a chunk or an import that is not what it claims to be
    ├── RowsError         packed rows that are malformed
    └── ExportError       the author's module has no equal program

Every message names the thing, its value and the cure.
"""


class WorkloadError(Exception):
    """Root of everything that this package raises about its input."""


class ProgramError(WorkloadError):
    """The bytes are not a program, or the program cannot run on the given number of rows."""


class TensorFileError(WorkloadError):
    """The bytes are not safetensors in the one canonical form."""


class DatasetError(WorkloadError):
    """A manifest, a chunk or the data to import is not what it claims to be."""


class RowsError(WorkloadError):
    """Packed rows are malformed."""


class ExportError(WorkloadError):
    """The author's module has no program that computes the same bits."""
