"""The systemd unit that `meshd service install` writes: what it says, and how exposed it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meshd.config.errors import ConfigError
from meshd.node.cli import main
from meshd.node.cli.unit import Service

MOST_EXPOSED = 1.5
"""Of systemd-analyze security."""
HOME = Path("/home/alice")
HARDENED = {
    *("NoNewPrivileges=yes", "CapabilityBoundingSet=", "AmbientCapabilities="),
    *("DynamicUser=yes", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes"),
    *("PrivateDevices=yes", "PrivateUsers=yes", "PrivateMounts=yes", "ProtectHostname=yes"),
    *("ProtectClock=yes", "ProtectKernelTunables=yes", "ProtectKernelModules=yes"),
    *("ProtectKernelLogs=yes", "ProtectControlGroups=yes", "ProtectProc=invisible"),
    *("RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK", "RestrictNamespaces=yes"),
    *("RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes", "RemoveIPC=yes"),
    *("SystemCallArchitectures=native", "SystemCallFilter=~@privileged", "UMask=0077"),
}


def unit(*, system: bool, name: str = "meshd", config: str | None = "/etc/meshd/node.toml"):
    return Service(name, ("/opt/meshd/bin/meshd",), Path(config) if config else None, system)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("system", [True, False])
def test_the_daemon_tells_when_it_is_ready_and_that_it_lives(system: bool) -> None:
    said = lines(unit(system=system).text(HOME))
    assert {"Type=notify", "NotifyAccess=main", "Restart=on-failure", "KillMode=mixed"} <= set(said)
    assert any(line.startswith("WatchdogSec=") for line in said)


def test_configuration_errors_are_not_tried_again() -> None:
    assert "RestartPreventExitStatus=2 78" in lines(unit(system=True).text(HOME))


def test_a_system_service_has_a_user_and_a_directory_of_its_own() -> None:
    said = lines(unit(system=True, name="second").text(HOME))
    assert {"DynamicUser=yes", "StateDirectory=meshd-second", "WantedBy=multi-user.target"} <= {
        *said
    }
    assert (
        "ExecStart=/opt/meshd/bin/meshd up --data-dir /var/lib/meshd-second "
        "--config /etc/meshd/node.toml --set log.format=json"
    ) in said


def test_a_users_service_is_in_its_home_and_asks_for_no_root() -> None:
    service = unit(system=False)
    assert service.path(HOME) == HOME / ".config/systemd/user/meshd.service"
    assert service.path(HOME, Path("/c")) == Path("/c/systemd/user/meshd.service")
    said = lines(service.text(HOME))
    assert "WantedBy=default.target" in said
    assert not any(line.startswith(("DynamicUser", "StateDirectory", "Capab")) for line in said)


def test_paths_with_blanks_and_signs_are_quoted_as_systemd_reads_them() -> None:
    service = Service("meshd", ("/opt/my mesh/meshd",), Path('/etc/100%/a"b$c'), system=True)
    assert '"/opt/my mesh/meshd" up' in service.text(HOME)
    assert r'"/etc/100%%/a\"b$$c"' in service.text(HOME)
    with pytest.raises(ConfigError, match="control character"):
        Service("meshd", ("/opt/a\nExecStart=/bin/sh",), None, system=True).text(HOME)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "Upper", "a b", "x" * 33, "a\n"])
def test_a_name_that_is_no_units_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a service"):
        unit(system=True, name=name)


def test_a_system_service_is_hardly_exposed(tmp_path: Path) -> None:
    service = Service("meshd", (sys.executable,), None, system=True)
    assert set(lines(service.text(HOME))) >= HARDENED
    if shutil.which("systemd-analyze") is not None:  # elsewhere the lines have to do
        file = tmp_path / "meshd.service"
        file.write_text(service.text(HOME))
        assert exposure(file) <= MOST_EXPOSED


def exposure(file: Path) -> float:
    """Return what systemd itself says of a unit, from 0 (best) to 10."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_COLORS": "0", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    assert "Unknown" not in done.stderr
    found = re.search(r"Overall exposure level for meshd.service: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return float(found.group(1))


def test_the_command_prints_or_writes_the_unit_and_says_how_to_start_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (tmp_path / "node.toml").write_text("")
    path = tmp_path / ".config/systemd/user/meshd-two.service"
    options = ["--user", "--name", "two", "--config", str(tmp_path / "node.toml")]
    assert main(["service", "install", *options, "--print"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("[Unit]")
    assert not path.exists()
    assert main(["service", "install", *options]) == 0
    said = capfd.readouterr()
    assert path.read_text() == printed
    assert "systemctl --user enable --now meshd-two" in said.out
    assert said.err == ""
    assert main(["service", "install", *options, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert (answer["path"], answer["written"]) == (str(path), True)
    assert f"--data-dir {tmp_path}/.local/share/meshd-two " in answer["text"]


def test_what_a_service_would_not_find_is_warned_of(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["service", "install"]) == 2
    assert "--user or --system" in capfd.readouterr().err
    config = "/home/nobody-at-all/node.toml"
    assert main(["service", "install", "--system", "--print", "--config", config]) == 0
    warned = capfd.readouterr().err
    assert "does not exist yet" in warned
    assert "in a home directory, which a system service does not see" in warned
