"""The systemd units that `meshd service install` writes, each line with its reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from meshd.config.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

_HEAD = """\
[Unit]
Description=meshd daemon ({name})
# The chain's RPC and the bootstrap peers are reached over the network.
Wants=network-online.target
After=network-online.target
# Give up after five failures in five minutes: what fails so often needs a person.
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
# The daemon says READY=1 when it listens, its database is open and its chain answers.
Type=notify
NotifyAccess=main
ExecStart={command}
# SIGTERM hands leases back (3 s) and ends; what is still there after 15 s is killed.
KillSignal=SIGTERM
KillMode=mixed
TimeoutStartSec=60
TimeoutStopSec=15
# Fed while the event loop and the database answer.
WatchdogSec=60
Restart=on-failure
RestartSec=2
# 2: wrong use, 78: wrong configuration: starting it again changes nothing.
RestartPreventExitStatus=2 78
# An executor that takes too much memory is killed alone; the daemon goes on.
OOMPolicy=continue
# Others on this machine come first.
Nice=10
CPUWeight=20
IOSchedulingClass=idle
MemoryHigh=75%
TasksMax=512
LimitNOFILE=65536
LimitCORE=0
UMask=0077
"""

_SANDBOX = """\
# No privilege is gained, by setuid programs or otherwise.
NoNewPrivileges=yes
RestrictSUIDSGID=yes
# IPv4, IPv6 and unix sockets; netlink tells the own addresses.
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
# Executors lower their own limits and priority (setrlimit, setpriority), so @resources stays.
# MemoryDenyWriteExecute is missing: torch's kernels are compiled while they run.
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
"""

_SYSTEM = """\
# A user of its own for as long as it runs; state in /var/lib/{unit}, and nothing else.
DynamicUser=yes
StateDirectory={unit}
StateDirectoryMode=0700
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateUsers=yes
PrivateMounts=yes
ProtectHostname=yes
ProtectClock=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectProc=invisible
RemoveIPC=yes
"""


@dataclass(frozen=True)
class Service:
    """One daemon as a service: `meshd` alone, or one of several with a name of its own.

    Raises ConfigError for a name that is none.
    """

    name: str
    command: tuple[str, ...]
    """The meshd program: its absolute path, perhaps with the interpreter before it."""
    config: Path | None
    system: bool
    """Of the system, with a user of its own; else of the user who installs it."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name[:80]!r} is no name of a service: use lower-case letters, digits and -"
            )

    @property
    def unit(self) -> str:
        """The unit's name without its ending."""
        return self.name if self.name.startswith("meshd") else f"meshd-{self.name}"

    def path(self, home: Path, config_home: Path | None = None) -> Path:
        """Return where the unit belongs; *home* is the user's directory."""
        if self.system:
            return Path("/etc/systemd/system") / f"{self.unit}.service"
        folder = config_home or home / ".config"
        return folder / "systemd" / "user" / f"{self.unit}.service"

    def data_dir(self, home: Path) -> str:
        """Return the data directory: the system's state directory, or one of the user's own."""
        if self.system:
            return f"/var/lib/{self.unit}"
        return str(home / ".local" / "share" / self.unit)

    def text(self, home: Path) -> str:
        """Return the unit file."""
        arguments = [*self.command, "up", "--data-dir", self.data_dir(home)]
        if self.config is not None:
            arguments += ["--config", str(self.config)]
        arguments += ["--set", "log.format=json"]
        command = " ".join(_quoted(argument) for argument in arguments)
        head = _HEAD.format(name=self.name, command=command)
        if not self.system:
            return f"{head}{_SANDBOX}\n[Install]\nWantedBy=default.target\n"
        system = _SYSTEM.format(unit=self.unit)
        return f"{head}{system}{_SANDBOX}\n[Install]\nWantedBy=multi-user.target\n"


def _quoted(argument: str) -> str:
    """Return *argument* as systemd reads it back; raises ConfigError if it cannot be written."""
    if any(ord(char) < 32 for char in argument):
        raise ConfigError(f"path {argument!r} has a control character: choose another")
    plain = argument.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", plain):
        return plain
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
