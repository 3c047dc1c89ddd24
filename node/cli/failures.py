"""From an exception to one clear line and an exit code.

0 done · 1 it failed · 2 wrong use or input · 69 something needed is not available · 75 try again
later · 78 configuration · 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator

from meshd.config.errors import ConfigError, JobSpecError, QuantityError
from meshd.node.control.api import EXIT_CODES, ControlError

# By name, since an exception that was raised has been imported and others need not be.
_BY_NAME = {
    "meshd.p2p.identity.IdentityError": EXIT_CODES["config"],
    "meshd.node.store.StoreError": EXIT_CODES["config"],
    "meshd.node.daemon.DaemonFailed": EXIT_CODES["failed"],
    "meshd.p2p.libp2p.host.ListenError": EXIT_CODES["config"],
    "meshd.p2p.network.NetworkError": EXIT_CODES["unavailable"],
    "meshd.ledger.chain.WrongChain": EXIT_CODES["config"],
    "meshd.ledger.chain.ChainUnavailable": EXIT_CODES["unavailable"],
    "meshd.ledger.chain.ChainError": EXIT_CODES["failed"],
    "meshd.ledger.devchain.errors.DevchainError": EXIT_CODES["config"],
    "meshd.node.workloads.errors.WorkloadError": EXIT_CODES["usage"],
}


def exit_code(error: BaseException) -> int | None:
    """Return the exit code of an *error* that a user can cure; None for all others."""
    match error:
        case ControlError():
            return error.exit_code
        case JobSpecError() | QuantityError():
            return EXIT_CODES["usage"]
        case ConfigError():
            return EXIT_CODES["config"]
        case OSError() if error.errno == errno.EADDRINUSE:
            return EXIT_CODES["config"]
        case OSError() if error.filename is not None:
            return EXIT_CODES["failed"]
    for cls in type(error).__mro__:
        if (code := _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            return code
    return None


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors inside *error*, which nurseries wrap in groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def report(error: BaseException) -> int | None:
    """Print each known error inside *error* as a line and return the first one's exit code.

    None, and nothing is printed, if there is none.
    """
    found = [(leaf, code) for leaf in leaves(error) if (code := exit_code(leaf)) is not None]
    for leaf, _ in found:
        for line in describe(leaf).splitlines():
            print(f"meshd: {line}", file=sys.stderr)
    return found[0][1] if found else None


def describe(error: BaseException) -> str:
    """Return the text of *error*, safe for a terminal."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        text = f"an address to listen on is in use: {error}: stop who has it, or choose another"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}: check the name, the permissions and the disk"
    else:
        text = str(error) or type(error).__name__
    return printable(text)


def printable(text: str) -> str:
    """Return *text* with everything escaped that a terminal would obey instead of showing."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )
