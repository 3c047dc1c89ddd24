"""Configuration: layers, suggestions, and one line with key, value and cure for each mistake."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from meshd.config.deployment import Deployment, deployment_of, read_deployment, write_deployment
from meshd.config.errors import ConfigError
from meshd.config.paths import config_file, data_directory, read_text
from meshd.config.reading import keys_of
from meshd.config.schema import PRESETS, Config, config_as_table, resolve, variable_of

CHAIN = '[chain]\ndeployment = "deployment.json"\n'
ALICE = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"


def problem(text: str, environ=None, flags=None, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(text, environ or {}, flags or {}, source="node.toml", **kwargs)
    return str(caught.value)


def test_flags_beat_the_environment_which_beats_the_file_which_beats_the_preset() -> None:
    text = CHAIN + "[worker]\nslots = 2\n"
    environ = {"MESHD_WORKER_SLOTS": "3"}
    flags = {"worker.slots": 4}
    assert resolve(CHAIN, {}, {}, preset="home").worker.slots == 1
    assert resolve(text, {}, {}, preset="home").worker.slots == 2
    assert resolve(text, environ, {}, preset="home").worker.slots == 3
    assert resolve(text, environ, flags, preset="home").worker.slots == 4


def test_nothing_but_the_arguments_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHD_WORKER_SLOTS", "7")
    assert resolve(CHAIN, {}, {}).worker.slots == 1


def test_a_configuration_can_come_from_the_environment_alone() -> None:
    environ = {
        "MESHD_CHAIN_DEPLOYMENT": "/srv/deployment.json",
        "MESHD_ROLES": "orchestrator, aggregator",
        "MESHD_ALLOW_PUBLIC": "true",
        "MESHD_LISTEN": "/ip4/0.0.0.0/tcp/4001",
        "PATH": "/bin",
    }
    config = resolve(None, environ, {})
    assert config.roles == ("orchestrator", "aggregator")
    assert config.listen == ("/ip4/0.0.0.0/tcp/4001",)


def test_amounts_sizes_and_accounts_become_integers_and_bytes() -> None:
    config = resolve(f'ask = "0.5"\npayout = "{ALICE}"\n{CHAIN}[worker]\nmemory = "4GiB"', {}, {})
    assert config.ask == 5 * 10**17
    assert config.payout == bytes.fromhex(ALICE[2:])
    assert config.worker.memory == 4 << 30


def test_without_a_data_directory_everything_is_in_memory() -> None:
    assert resolve(CHAIN, {}, {}).data_dir is None
    assert resolve('data_dir = "/srv/meshd"\n' + CHAIN, {}, {"data_dir": None}).data_dir is None


def test_a_leading_tilde_is_the_home_of_the_given_environment() -> None:
    config = resolve('data_dir = "~/mesh"\n' + CHAIN, {"HOME": "/home/alice"}, {})
    assert config.data_dir == Path("/home/alice/mesh")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_configuration_once_a_chain_is_named(preset: str) -> None:
    config = resolve(CHAIN, {}, {}, preset=preset)
    assert config.roles
    assert resolve(CHAIN, {"MESHD_PRESET": preset}, {}) == config


def test_an_unknown_preset_is_refused_with_those_that_exist() -> None:
    assert problem(CHAIN, preset="hone") == (
        "preset 'hone' does not exist: use one of home, orchestrator, validator"
    )


def test_what_is_shown_resolves_to_the_same_configuration() -> None:
    text = (
        f'roles = ["worker"]\nask = "0.25"\npayout = "{ALICE}"\n{CHAIN}[worker]\nmemory = "3GiB"\n'
    )
    config = resolve(text, {}, {})
    table = config_as_table(config)
    assert table["ask"] == "0.25"
    assert Config.model_validate(table) == config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rolse = []\n", "node.toml: unknown key 'rolse': did you mean 'roles'?"),
        (
            "[chian]\nrpc = 'http://x'\n",
            "node.toml: unknown key 'chian.rpc': did you mean 'chain.rpc'?",
        ),
        ("slots = 2\n", "node.toml: unknown key 'slots': did you mean 'worker.slots'?"),
        ("worker = 2\n", "node.toml: worker = 2: it is a table: write [worker]"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(text: str, line: str) -> None:
    assert problem(text + CHAIN) == line


def test_an_unknown_key_that_resembles_none_lists_them_all() -> None:
    assert "known keys: data_dir, network" in problem("zzzzzz = 1\n" + CHAIN)


def test_unknown_variables_and_flags_are_refused_like_unknown_keys() -> None:
    assert problem(CHAIN, {"MESHD_CHAIN_RCP": "x"}) == (
        "environment: unknown key 'MESHD_CHAIN_RCP': did you mean 'MESHD_CHAIN_RPC'?"
    )
    assert problem(CHAIN, flags={"worker.slot": "1"}) == (
        "flags: unknown key 'worker.slot': did you mean 'worker.slots'?"
    )


def test_every_mistake_is_told_at_once_one_line_each() -> None:
    told = problem("ask = 1.5\n" + CHAIN + "[worker]\nslots = 0\n[log]\nlevel = 'loud'\n")
    lines = told.splitlines()
    assert lines[0] == (
        "node.toml: ask = 1.5: a bare number is no amount of MCC: write it as text, in quotes"
    )
    assert lines[1].startswith("node.toml: worker.slots = 0: input should be greater than or equal")
    assert lines[2].startswith('node.toml: log.level = "loud": input should be')
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ('ask = "1,5"', "write digits like"),
        ("payout = '0x12'", "40 hex digits"),
        ("network = 'My Net'", "lower-case letters"),
        ("roles = ['miner']", "orchestrator, worker, validator, aggregator"),
        ("roles = ['worker', 'worker']", "name each once"),
        ("listen = []", "multiaddrs to listen on"),
        ("listen = ['tcp://x']", "/ip4/HOST/tcp/PORT"),
        ("bootstrap = ['/ip4/127.0.0.1/tcp/1']", "/p2p/PEER"),
        ("worker.device = 'tpu'", "cpu"),
        ("worker.memory = '2GB'", "512MiB"),
        ("chain.rpc = 'localhost:8545'", "http://127.0.0.1:8545"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_cure(text: str, cure: str) -> None:
    told = problem(text + "\nchain.deployment = 'd.json'\n")
    key = text.split(" =")[0]
    assert "\n" not in told
    assert told.startswith("node.toml: ")
    assert key in told
    assert cure in told


def test_the_source_of_a_wrong_value_is_named() -> None:
    assert problem(CHAIN, {"MESHD_WORKER_SLOTS": "x"}).startswith("MESHD_WORKER_SLOTS: ")
    assert problem(CHAIN, flags={"worker.slots": "x"}).startswith("flags: ")


def test_broken_toml_is_refused_with_its_line() -> None:
    assert re.match(r"node.toml: not TOML: .*line 2", problem("a = 1\nb = \n"))


def test_listening_beyond_loopback_needs_consent_and_then_warns() -> None:
    public = 'listen = ["/ip4/0.0.0.0/tcp/4001"]\n'
    assert "allow_public = true" in problem(public + CHAIN)
    config = resolve(public + "allow_public = true\n" + CHAIN, {}, {})
    assert "sandbox" in config.warnings[0]
    assert resolve(CHAIN, {}, {}).warnings == ()


def test_the_contracts_must_be_named_by_file_or_one_by_one_but_not_both() -> None:
    keys = f'mcc = "{ALICE}"\nregistry = "{ALICE}"\nescrow = "{ALICE}"\n'
    assert "chain.chain_id is missing" in problem("[chain]\n" + keys)
    assert "meshd chain deploy" in problem("")
    assert "both set" in problem(CHAIN + keys)
    config = resolve("[chain]\nchain_id = 5\n" + keys, {}, {})
    assert deployment_of(config.chain).chain_id == 5


def test_a_configuration_cannot_be_changed() -> None:
    config = resolve(CHAIN, {}, {})
    with pytest.raises(ValidationError):
        config.network = "other"  # type: ignore[misc]


def test_a_deployment_survives_its_file(tmp_path: Path) -> None:
    contract = bytes.fromhex(ALICE[2:])
    deployment = Deployment(chain_id=7, mcc=contract, registry=contract, escrow=contract)
    file = tmp_path / "deep" / "deployment.json"
    write_deployment(deployment, file)
    assert read_deployment(file) == deployment
    assert ALICE in file.read_text()
    named = resolve(None, {}, {"chain.deployment": file})
    assert deployment_of(named.chain) == deployment


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"chain_id": 1, "mcc": "0x"}'])
def test_a_file_that_is_no_deployment_is_refused_with_the_cure(tmp_path: Path, text: str) -> None:
    file = tmp_path / "deployment.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="meshd chain deploy"):
        read_deployment(file)


def test_a_missing_deployment_file_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*meshd chain deploy"):
        read_deployment(tmp_path / "none.json")


def test_the_data_directory_is_found_without_the_schema(tmp_path: Path) -> None:
    text = 'data_dir = "/srv/from-file"\n'
    environ = {"MESHD_DATA_DIR": "/srv/from-environment"}
    assert data_directory("/srv/flag", environ, text) == Path("/srv/flag")
    assert data_directory(None, environ, text) == Path("/srv/from-environment")
    assert data_directory(None, {}, text) == Path("/srv/from-file")
    assert data_directory(None, {}, "not toml at all").name == "meshd"


def test_the_users_own_config_file_is_used_only_if_it_exists(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert config_file(None, environ) is None
    own = tmp_path / ".config" / "meshd" / "config.toml"
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert config_file(None, environ) == own
    assert config_file("/srv/other.toml", environ) == Path("/srv/other.toml")
    assert config_file(None, environ | {"MESHD_CONFIG": "/srv/e.toml"}) == Path("/srv/e.toml")


def test_a_file_that_is_missing_huge_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(tmp_path / "none", "configuration")
    (tmp_path / "huge").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="longer than 1 MiB"):
        read_text(tmp_path / "huge", "configuration")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_text(tmp_path / "binary", "configuration")


def test_every_key_has_a_description_and_a_variable_of_its_own() -> None:
    keys = keys_of(Config)
    assert all(field.description for field in keys.values())
    assert len({variable_of(key) for key in keys}) == len(keys)
