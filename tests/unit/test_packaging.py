"""What setup.cfg, constraints.txt and the tree say about one another."""

import configparser
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# Data that is built from, and not installed: Solidity sources, their tests and their tool chain.
NOT_INSTALLED = ("contracts/",)


def lines_of(section: str, option: str) -> list[str]:
    return [line.strip() for line in SETUP[section][option].splitlines() if line.strip()]


def folders_of_packages() -> dict[str, Path]:
    pairs = (line.split("=") for line in lines_of("options", "package_dir"))
    return {package.strip(): ROOT / folder.strip() for package, folder in pairs}


def packages_in_the_tree() -> Iterator[str]:
    for package, folder in folders_of_packages().items():
        for marker in folder.rglob("__init__.py"):
            if "node_modules" not in marker.parts:
                yield ".".join((package, *marker.parent.relative_to(folder).parts))


def pins() -> dict[str, str]:
    names_and_versions = (
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    return {canonicalize_name(name): version for name, version in names_and_versions}


def requirements_of_all_extras() -> dict[str, Requirement]:
    """Every requirement that installing meshd[test] pulls in, walked through what is installed."""
    found: dict[str, Requirement] = {}
    queue = [Requirement("meshd[test]")]
    walked: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in walked:
            continue
        walked.add((name, frozenset(requirement.extras)))
        found.setdefault(name, requirement)
        for text in distribution(requirement.name).requires or ():
            child = Requirement(text)
            wanted = child.marker is None or any(
                child.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            )
            if wanted:
                queue.append(child)
    del found["meshd"]
    return found


def test_every_package_of_the_tree_is_listed_and_nothing_else() -> None:
    assert sorted(lines_of("options", "packages")) == sorted(packages_in_the_tree())


def test_only_the_name_meshd_is_installed() -> None:
    assert all(package.startswith("meshd.") for package in lines_of("options", "packages"))
    assert "py_modules" not in SETUP["options"]
    assert not (ROOT / "meshd").exists()


@pytest.mark.parametrize("package", sorted(folders_of_packages()))
def test_the_data_files_named_for_a_package_exist(package: str) -> None:
    for pattern in SETUP["options.package_data"][package].split(","):
        assert list(folders_of_packages()[package].glob(pattern.strip())), pattern


def test_every_data_file_in_the_packages_is_named() -> None:
    data = SETUP["options.package_data"]
    named = {
        path
        for package, folder in folders_of_packages().items()
        for pattern in data[package].split(",")
        for path in folder.glob(pattern.strip())
    }
    present = {
        path
        for folder in folders_of_packages().values()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    forgotten = sorted(path.relative_to(ROOT).as_posix() for path in present - named)
    assert [path for path in forgotten if not path.startswith(NOT_INSTALLED)] == []


@pytest.mark.parametrize("package", sorted(folders_of_packages()))
def test_type_checkers_find_a_package_through_its_link(package: str) -> None:
    link = ROOT / "typings" / Path(*package.split("."))
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == folders_of_packages()[package]


def test_a_constraint_is_a_name_and_an_exact_public_version() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_every_requirement_and_what_it_requires_is_pinned_within_its_range() -> None:
    pinned = pins()
    for name, requirement in requirements_of_all_extras().items():
        assert name in pinned, f"{name} is missing from constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), requirement


def test_what_is_installed_is_what_the_constraints_say() -> None:
    for name in requirements_of_all_extras():
        assert Version(distribution(name).version).public == Version(pins()[name]).public


def test_the_meshd_command_is_installed_and_can_be_called() -> None:
    (command,) = (point for point in entry_points(group="console_scripts") if point.name == "meshd")
    assert callable(command.load())


def test_the_command_loads_neither_torch_nor_libp2p_nor_web3_nor_the_daemon() -> None:
    program = "import sys, meshd.node.cli; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    heavy = {"torch", "libp2p", "web3", "eth", "transformers", "meshd.node.daemon"}
    assert heavy.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("name", ["setup", "demo", "test", "check", "bench"])
def test_an_entry_script_can_be_executed(name: str) -> None:
    assert os.access(ROOT / "scripts" / name, os.X_OK)


def test_the_licence_is_the_whole_text_of_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert SETUP["metadata"]["license"] == "Apache-2.0"
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
