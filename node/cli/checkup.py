"""What `meshd doctor` looks at: this machine, the data directory, the chain, the swarm.

Every check returns findings and raises nothing that it can meet. Uses the standard library for
all it asks: neither torch, libp2p nor web3 is loaded.
"""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meshd.config.paths import KEY
from meshd.config.schema import Config
from meshd.node.control.api import ControlError, Status
from meshd.p2p.identity import IdentityError, hex_address, load_or_create

State = Literal["ok", "warn", "fail"]

DATABASE = "meshd.sqlite3"
EXECUTOR_USER = "nobody"
"""Whom executors compute as when the daemon runs as root."""
LEAST_FREE, GOOD_FREE = 1 << 30, 5 << 30
"""Bytes of free disk below which it fails, and below which it warns."""
DIAL_S = 3.0
IMPORT_S = 120.0
MAX_DIALLED = 16


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    state: State
    text: str
    cure: str = ""


def check_user() -> Iterator[Finding]:
    """Who runs it."""
    if os.geteuid() == 0:
        yield Finding(
            "user",
            "warn",
            f"this is root; shards are computed as {EXECUTOR_USER!r}, the daemon itself is not "
            "confined",
            "run it as a user of its own: `meshd service install --system` does",
        )
    else:
        yield Finding("user", "ok", f"uid {os.geteuid()}, not root")


def check_data_dir(data_dir: Path) -> Iterator[Finding]:
    """Modes, key, database version and room of the data directory."""
    if not data_dir.exists():
        yield Finding("data directory", "ok", f"{data_dir} will be made at the first start")
    else:
        yield from _check_directory(data_dir)
        yield from _check_key(data_dir / KEY)
        yield from _check_database(data_dir / DATABASE)
    yield _check_room(data_dir)


def _check_directory(data_dir: Path) -> Iterator[Finding]:
    info = data_dir.stat()
    mode = stat.S_IMODE(info.st_mode)
    if not stat.S_ISDIR(info.st_mode):
        yield Finding("data directory", "fail", f"{data_dir} is no directory", "name another")
    elif not os.access(data_dir, os.W_OK | os.X_OK):
        owner = f"{data_dir} belongs to uid {info.st_uid} and cannot be written"
        yield Finding("data directory", "fail", owner, "run this as its owner")
    elif mode & 0o077:
        yield Finding(
            "data directory",
            "warn",
            f"{data_dir} has mode {mode:04o}: others may look into it",
            f"chmod 700 {data_dir}",
        )
    else:
        yield Finding("data directory", "ok", str(data_dir))


def _check_key(path: Path) -> Iterator[Finding]:
    if not path.exists():
        yield Finding("key", "ok", "it will be made at the first start")
        return
    try:
        identity = load_or_create(path)
    except IdentityError as error:
        yield Finding("key", "fail", str(error), "restore it from a backup, or correct its modes")
        return
    yield Finding("key", "ok", f"address {hex_address(identity.address)}, mode 0600")


def _check_database(path: Path) -> Iterator[Finding]:
    from meshd.node.store import VERSION

    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            (version,) = database.execute("pragma user_version").fetchone()
    except sqlite3.Error as error:
        cure = "restore it from a backup, or move it away to start afresh"
        yield Finding("database", "fail", f"{path} cannot be read: {error}", cure)
        return
    if version > VERSION:
        text = f"{path} has version {version}, this meshd knows {VERSION}"
        yield Finding("database", "fail", text, "upgrade meshd, or use another data directory")
    elif version < VERSION:
        text = f"version {version}; it is upgraded to {VERSION} at the next start"
        yield Finding("database", "ok", text)
    else:
        yield Finding("database", "ok", f"version {version}")


def _check_room(data_dir: Path) -> Finding:
    existing = next(folder for folder in (data_dir, *data_dir.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / (1 << 30):.1f} GiB free at {existing}"
    if free < LEAST_FREE:
        return Finding("disk", "fail", text, "make room: outputs and programs are kept there")
    if free < GOOD_FREE:
        return Finding("disk", "warn", text, "jobs with large data will not fit")
    return Finding("disk", "ok", text)


def check_torch(roles: tuple[str, ...]) -> Iterator[Finding]:
    """Whether torch can be imported, by the user who computes; for the roles that need it."""
    needing = sorted({"worker", "validator", "aggregator"} & set(roles))
    if not needing:
        yield Finding("torch", "ok", "not needed: none of its roles computes")
        return
    user = EXECUTOR_USER if os.geteuid() == 0 else None
    code = "import torch; print(torch.__version__)"
    command = [sys.executable, "-c", code]
    who = f"user {user}" if user else "this user"
    try:
        done = subprocess.run(
            command,
            user=user,
            group=_group_of(user),
            extra_groups=[] if user else None,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
            check=False,
        )
    except (OSError, LookupError, subprocess.SubprocessError) as error:
        cure = "let that user read the installation, or start it as another user"
        yield Finding("torch", "fail", f"{who} cannot run {sys.executable}: {error}", cure)
        return
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        cure = 'pip install "meshd[compute]"; that user must be able to read it'
        yield Finding("torch", "fail", f"{who} cannot import it: {why[:200]}", cure)
    else:
        text = f"version {done.stdout.strip()}, for {', '.join(needing)}"
        yield Finding("torch", "ok", text)


def _group_of(user: str | None) -> int | None:
    if user is None:
        return None
    import pwd

    return pwd.getpwnam(user).pw_gid


def check_daemon(status: Status | ControlError) -> Iterator[Finding]:
    """What the daemon says of itself, if one runs on the data directory."""
    if isinstance(status, ControlError):
        if status.code == "unavailable" and "no daemon runs" in status.message:
            yield Finding("daemon", "ok", "none runs on this data directory")
        else:
            yield Finding("daemon", "fail", status.message, status.cure)
        return
    yield Finding("daemon", "ok", f"process {status['pid']}, {status['version']}")
    if status["paused"]:
        yield Finding("paused", "warn", "it takes no new shards", "meshd resume")
    if status["chain"]["height"] is None:
        yield Finding("chain events", "warn", "it has seen no block yet", "wait, then see its log")
    if status["peers"]:
        yield Finding("peers", "ok", f"{status['peers']} connected")
    else:
        cure = "name a bootstrap peer that runs, on the same network"
        yield Finding("peers", "warn", "none is connected", cure)


def check_listening(config: Config, *, runs: bool) -> Iterator[Finding]:
    """Whether the addresses to listen on are free, unless the daemon has them already."""
    for address in config.listen:
        if runs:
            continue
        why = _bind_problem(address)
        if why is None:
            yield Finding("listen", "ok", f"{address} is free")
        else:
            cure = "stop who has it, or choose another with --listen"
            yield Finding("listen", "fail", f"{address}: {why}", cure)
    for warning in config.warnings:
        yield Finding("listen", "warn", warning, "see docs/configuration.md, allow_public")


def _bind_problem(address: str) -> str | None:
    _, protocol, host, _, port, *_ = address.split("/")
    family = socket.AF_INET6 if protocol in ("ip6", "dns6") else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, int(port)))
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_bootstrap(config: Config) -> Iterator[Finding]:
    """Whether the bootstrap peers' ports answer."""
    if not config.bootstrap:
        cure = "name one with bootstrap, unless others are to find this node"
        yield Finding("bootstrap", "warn", "no peer is named: nobody is dialled", cure)
        return
    addresses = config.bootstrap[:MAX_DIALLED]
    with ThreadPoolExecutor(len(addresses)) as threads:
        problems = list(threads.map(_dial_problem, addresses))
    lost = sum(problem is not None for problem in problems)
    for address, problem in zip(addresses, problems, strict=True):
        if problem is None:
            yield Finding("bootstrap", "ok", f"{address} answers")
        else:
            state: State = "fail" if lost == len(addresses) else "warn"
            cure = "see whether it runs and whether a firewall is between"
            yield Finding("bootstrap", state, f"{address}: {problem}", cure)


def _dial_problem(address: str) -> str | None:
    _, _, host, _, port, *_ = address.split("/")
    try:
        with socket.create_connection((host, int(port)), timeout=DIAL_S):
            return None
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
