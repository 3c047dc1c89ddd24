"""The committed contract artifacts load, and have what the Python side calls and reads."""

import json
import re
from pathlib import Path

import pytest

from meshd.contracts import Artifact, ContractName, artifact

CONTRACTS: tuple[ContractName, ...] = ("MCC", "NodeRegistry", "JobEscrow")
ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "contracts"
DOCUMENTATION = ROOT / "docs" / "contracts.md"

SETTLEMENT = "(bytes32,uint32,uint64,bytes32,bytes32,uint256,uint64,uint64,bytes32,bytes32,bool)"
FUNCTIONS: dict[ContractName, set[str]] = {
    "MCC": {
        "approve(address,uint256)",
        "balanceOf(address)",
        "transfer(address,uint256)",
        "permit(address,address,uint256,uint256,uint8,bytes32,bytes32)",
        "burn(uint256)",
    },
    "NodeRegistry": {
        "register(uint8,address)",
        "registerBySig(address,uint8,address,uint256,bytes)",
        "setRoles(uint8)",
        "setPayout(address,address)",
        "stake(address,uint256)",
        "startUnbond(address,uint256)",
        "withdraw(address)",
        "refreshSeats(address)",
        "appointCourt(address)",
        "lock(address)",
        "unlock(address)",
        "slash(address,uint256,address)",
        "court()",
        "currentEpoch()",
        "epochOf(uint256)",
        "nodeOf(address)",
        "activeStake(address)",
        "validators()",
        "orchestrators()",
        "activeAt(uint8,uint256)",
        "drawCommittee(bytes32,uint256,uint256)",
    },
    "JobEscrow": {
        "open(bytes32,bytes32,uint96,uint96,uint32,uint40,uint40)",
        "openWithPermit(bytes32,bytes32,uint96,uint96,uint32,uint40,uint40,uint256,uint8,bytes32,bytes32)",
        "start(bytes32)",
        "cancel(bytes32)",
        f"anchor({SETTLEMENT},address[],uint256,bytes)",
        "voidRoot(bytes32)",
        "claim(bytes32,uint64,address,uint256,bytes32,bytes32[])",
        "claimMany((bytes32,uint64,address,uint256,bytes32,bytes32[])[])",
        "refund(bytes32)",
        "job(bytes32)",
        "jobIdOf(address,bytes32,bytes32)",
        "committeeHash(bytes32)",
        "roots(bytes32,uint64)",
        "rootOf(bytes32,uint64)",
        "claimed(bytes32,address)",
        "quorumOf(uint256)",
        f"settlementDigest({SETTLEMENT})",
        "leafOf(bytes32,address,uint256,bytes32)",
    },
}
EVENTS: dict[ContractName, set[str]] = {
    "MCC": {"Transfer(address,address,uint256)", "Approval(address,address,uint256)"},
    "NodeRegistry": {
        "NodeRegistered(address,uint8,address)",
        "RolesChanged(address,uint8)",
        "PayoutChanged(address,address)",
        "Staked(address,address,uint256,uint256)",
        "UnbondStarted(address,uint256,uint256)",
        "Withdrawn(address,address,uint256)",
        "SeatChanged(uint8,address,uint256,uint256)",
        "CourtAppointed(address,uint256)",
        "NodeLocked(address,uint256)",
        "NodeUnlocked(address,uint256)",
        "Slashed(address,uint256,address)",
    },
    "JobEscrow": {
        "JobOpened(bytes32,address,bytes32,bytes32,uint256,uint256,uint256,uint256,uint256,uint256)",
        "JobStarted(bytes32,address[],uint256,bytes32)",
        "JobCancelled(bytes32,address,uint256)",
        "Anchored(bytes32,uint64,bytes32,uint32,bytes32,uint256,uint64,uint64,bytes32,bytes32,bool,uint256,uint256)",
        "Claimed(bytes32,address,uint64,uint256,uint256)",
        "Refunded(bytes32,address,uint256)",
        "RootVoided(bytes32,uint64,bytes32)",
    },
}


def type_of(parameter: dict[str, object]) -> str:
    """Return a parameter's canonical type, tuples written out."""
    kind = str(parameter["type"])
    components = parameter.get("components")
    if not isinstance(components, list):
        return kind
    return f"({','.join(type_of(inner) for inner in components)}){kind.removeprefix('tuple')}"


def signatures(built: Artifact, kind: str) -> set[str]:
    """Return the signatures of all functions, events or errors."""
    return {
        f"{entry['name']}({','.join(type_of(parameter) for parameter in entry['inputs'])})"
        for entry in built.abi
        if entry["type"] == kind
    }


@pytest.mark.parametrize("name", CONTRACTS)
def test_an_artifact_holds_abi_and_bytecode_below_the_size_limit(name: ContractName) -> None:
    built = artifact(name)
    assert built.name == name
    assert built.bytecode[:1] in {b"\x60", b"\x61"}
    assert len(built.bytecode) < 2 * 24576


@pytest.mark.parametrize("name", CONTRACTS)
def test_an_artifact_has_the_functions_and_events_that_are_documented(name: ContractName) -> None:
    built = artifact(name)
    assert signatures(built, "function") >= FUNCTIONS[name]
    assert signatures(built, "event") >= EVENTS[name]


@pytest.mark.parametrize("name", ["NodeRegistry", "JobEscrow"])
def test_every_error_of_our_own_begins_with_its_contract(name: ContractName) -> None:
    libraries = {"ECDSA", "Safe", "Reentrancy", "Invalid", "String", "Checkpoint"}
    for error in signatures(artifact(name), "error"):
        assert error.startswith((name, *libraries)), error


def test_nothing_in_the_token_mints_pauses_or_is_owned() -> None:
    names = {signature.split("(")[0] for signature in signatures(artifact("MCC"), "function")}
    assert not names & {
        "mint",
        "pause",
        "owner",
        "transferOwnership",
        "grantRole",
        "upgradeToAndCall",
    }


@pytest.mark.parametrize("name", CONTRACTS)
def test_an_artifact_is_written_with_sorted_keys(name: ContractName) -> None:
    text = (SOURCES / "artifacts" / f"{name}.json").read_text(encoding="utf-8")
    assert json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n" == text


def test_an_unknown_contract_has_no_artifact() -> None:
    with pytest.raises(FileNotFoundError, match="DisputeCourt"):
        artifact("DisputeCourt")


def test_the_deployed_code_of_an_immutable_is_left_open_for_the_constructor() -> None:
    built = json.loads((SOURCES / "artifacts" / "JobEscrow.json").read_text(encoding="utf-8"))
    code = bytes.fromhex(built["deployedBytecode"]["object"][2:])
    spans = [
        span for uses in built["deployedBytecode"]["immutableReferences"].values() for span in uses
    ]
    assert spans
    assert all(not any(code[s["start"] : s["start"] + s["length"]]) for s in spans)


def test_the_lock_file_names_exact_versions_and_no_registry() -> None:
    lock = json.loads((SOURCES / "package-lock.json").read_text(encoding="utf-8"))
    packages = {path: package for path, package in lock["packages"].items() if path}
    assert all("resolved" not in package for package in packages.values())
    assert all("integrity" in package for package in packages.values())
    assert packages["node_modules/solc"]["version"] == "0.8.37"
    assert packages["node_modules/@openzeppelin/contracts"]["version"] == "5.7.0"


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_documentation_names_everything_in_the_abi(name: ContractName) -> None:
    documented = set(re.findall(r"\w+", DOCUMENTATION.read_text(encoding="utf-8")))
    built = artifact(name)
    names = {entry["name"] for entry in built.abi if entry["type"] in {"function", "event"}}
    names |= {
        entry["name"]
        for entry in built.abi
        if entry["type"] == "error" and entry["name"].startswith(name)
    }
    libraries = {"EIP712DomainChanged", "Transfer", "Approval"}
    assert names - documented <= libraries


def test_every_test_that_the_documentation_names_exists() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    attacks = text[text.index("## Attacks") : text.index("## Gas")]
    named = set(re.findall(r"`([a-z]\w{14,})`", attacks))
    written = {
        name
        for path in (SOURCES / "test").glob("*.sol")
        for name in re.findall(r"function test(?:Fuzz)?_(\w+)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 40
    assert named <= written


def test_the_documented_gas_is_the_committed_snapshot() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8").replace(",", "")
    snapshot: dict[str, int] = json.loads((SOURCES / "gas-snapshot").read_text(encoding="utf-8"))
    for step, gas in snapshot.items():
        shown = round(gas / 20) if "claimMany of 20" in step else gas
        assert str(shown) in text, step
