"""What can go wrong in the demo, apart from what its last page is there to show.

    DemoError
    ├── SentencesError    the standard library on this machine has too few sentences
    ├── SourceTextError   the standard library on this machine has too little source text
    └── ComparisonError   the job's output cannot be compared with plain torch

Every message names the thing, its value and the cure.
"""


class DemoError(Exception):
    """Root of what the demo raises."""


class SentencesError(DemoError):
    """The standard library on this machine has too few sentences."""


class SourceTextError(DemoError):
    """The standard library on this machine has too little source text."""


class ComparisonError(DemoError):
    """The job's output cannot be compared with plain torch: a file is missing or another one."""
