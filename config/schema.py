"""A daemon's whole configuration: one frozen value, resolved in one pure function."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meshd.config.errors import ConfigError
from meshd.config.fields import Account, Amount, Listen, PeerAddress, Size, Words
from meshd.config.quantities import is_loopback
from meshd.config.reading import build, check_keys, flatten, keys_of, parse_toml, unknown_key

Role = Literal["orchestrator", "worker", "validator", "aggregator"]
PRESETS: Final = ("home", "orchestrator", "validator")
"""Ready configurations; each is a TOML file in this package."""

_PREFIX = "MESHD_"
_FILES = ("MESHD_CONFIG", "MESHD_PRESET")  # they choose files, and are no keys themselves
_MAX_BYTES = 1 << 48


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChainConfig(_Table):
    """Which chain, and where meshd's contracts are on it."""

    rpc: str = Field(
        default="http://127.0.0.1:8545",
        pattern=r"^https?://[^\s/]+(/\S*)?$",
        max_length=512,
        description="the URL of the chain's JSON-RPC, for example http://127.0.0.1:8545",
    )
    deployment: Path | None = Field(
        default=None,
        description="the file that `meshd chain deploy` wrote: chain id and contract addresses",
    )
    chain_id: int | None = Field(
        default=None, ge=1, lt=2**53, description="the chain's id, for example 31337"
    )
    mcc: Account | None = Field(default=None, description="the address of the MCC token")
    registry: Account | None = Field(default=None, description="the address of NodeRegistry")
    escrow: Account | None = Field(default=None, description="the address of JobEscrow")

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        named = {
            "chain.chain_id": self.chain_id,
            "chain.mcc": self.mcc,
            "chain.registry": self.registry,
            "chain.escrow": self.escrow,
        }
        missing = [key for key, value in named.items() if value is None]
        if self.deployment is not None and len(missing) < len(named):
            given = next(key for key, value in named.items() if value is not None)
            raise ValueError(f"chain.deployment and {given} are both set: keep one of the two")
        if self.deployment is None and missing:
            raise ValueError(
                f"{missing[0]} is missing: set chain.deployment to the file that "
                "`meshd chain deploy` wrote, or chain_id, mcc, registry and escrow in [chain]"
            )
        return self


class WorkerConfig(_Table):
    """What a worker gives to jobs."""

    slots: int = Field(
        default=1, ge=1, le=256, description="how many shards are computed side by side, such as 2"
    )
    memory: Size = Field(
        default=2 << 30, ge=64 << 20, le=_MAX_BYTES, description="bytes a slot may take, like 2GiB"
    )
    device: Literal["cpu"] = Field(
        default="cpu", description='where shards are computed; "cpu" is the only device today'
    )


class LogConfig(_Table):
    """What the daemon writes to standard error."""

    format: Literal["auto", "human", "json"] = Field(
        default="auto", description='"human", "json", or "auto": human on a terminal, else json'
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description='the least severity shown: "debug", "info", "warning", "error"'
    )


class Config(_Table):
    """Everything that a daemon is told at its start; units as in the fields' types."""

    data_dir: Path | None = Field(
        default=None, description="the directory of all state; without one it is kept in memory"
    )
    network: str = Field(
        default="dev",
        pattern=r"^[a-z0-9][a-z0-9-]{0,31}$",
        description="the swarm's name: lower-case letters, digits and '-', at most 32",
    )
    roles: Annotated[tuple[Role, ...], Words] = Field(
        default=(),
        description="any of orchestrator, worker, validator, aggregator; none: only a client",
    )
    listen: Annotated[tuple[Listen, ...], Words] = Field(
        default=("/ip4/127.0.0.1/tcp/0",),
        min_length=1,
        max_length=8,
        description='multiaddrs to listen on, for example ["/ip4/127.0.0.1/tcp/4001"]',
    )
    allow_public: bool = Field(
        default=False, description="whether `listen` may name addresses beyond this machine"
    )
    bootstrap: Annotated[tuple[PeerAddress, ...], Words] = Field(
        default=(),
        max_length=64,
        description="multiaddrs with /p2p/PEER of the peers that are dialled first",
    )
    payout: Account | None = Field(
        default=None, description="the address that is paid; without one the node's own"
    )
    ask: Amount = Field(
        default=0, description='the least MCC per 10^9 compute units, for example "0.002"'
    )
    chain: ChainConfig
    worker: WorkerConfig = WorkerConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        public = [address for address in self.listen if not is_loopback(address)]
        if public and not self.allow_public:
            raise ValueError(
                f"listen = {public[0]!r} is open to other machines, and jobs have no sandbox yet: "
                "use /ip4/127.0.0.1/..., or set allow_public = true if you accept that"
            )
        if len(set(self.roles)) != len(self.roles):
            raise ValueError(f"roles = {list(self.roles)} names a role twice: name each once")
        return self

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should be told before the daemon starts."""
        public = [address for address in self.listen if not is_loopback(address)]
        return tuple(
            f"listening on {address}, beyond this machine: jobs from strangers run without a "
            "sandbox; do this on a network you trust"
            for address in public
        )


def resolve(
    file_text: str | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    *,
    preset: str | None = None,
    source: str = "configuration",
) -> Config:
    """Return the configuration: defaults < preset < file < environment MESHD_* < flags.

    *flags* has dotted keys (``chain.rpc``); lists may be text with commas. The variable of a
    key is its name in capitals after ``MESHD_``, dots as underscores (``MESHD_CHAIN_RPC``).
    Nothing is read but the arguments and this package's presets. Raises ConfigError, one line
    for each key that is unknown or has a wrong value.
    """
    preset = preset or environ.get("MESHD_PRESET") or None
    layers: list[tuple[str, dict[str, Any]]] = []
    problems: list[str] = []
    if preset is not None:
        layers.append((f"preset {preset}", dict(flatten(parse_toml(preset_text(preset), preset)))))
    if file_text is not None:
        table = parse_toml(file_text, source)
        problems += check_keys(Config, table, source)
        layers.append((source, dict(flatten(table))))
    variables, unknown = _from_environment(environ)
    problems += unknown
    layers.append(("environment", variables))
    known = keys_of(Config)
    problems += [unknown_key("flags", key, known) for key in flags if key not in known]
    layers.append(("flags", dict(flags)))
    if problems:
        raise ConfigError("\n".join(problems))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, layer in layers:
        for key, value in layer.items():
            values[key] = _expand(value, environ) if key in _PATHS else value
            sources[key] = variable_of(key) if name == "environment" else name
    values.setdefault("chain.rpc", ChainConfig.model_fields["rpc"].default)
    return build(Config, values, lambda key: sources.get(key, source))


_PATHS = ("data_dir", "chain.deployment")


def variable_of(key: str) -> str:
    """Return the environment variable of a dotted *key*."""
    return _PREFIX + key.replace(".", "_").upper()


def preset_text(name: str) -> str:
    """Return the TOML of the preset *name*; raises ConfigError if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name[:80]!r} does not exist: use one of {', '.join(PRESETS)}")
    return resources.files("meshd.config").joinpath(f"{name}.toml").read_text(encoding="utf-8")


def config_as_table(config: Config) -> dict[str, Any]:
    """Return *config* as JSON-serialisable tables in the form in which it is written."""
    return config.model_dump(mode="json", exclude_none=True)


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    known = {variable_of(key): key for key in keys_of(Config)}
    values: dict[str, str] = {}
    problems: list[str] = []
    for variable, value in environ.items():
        if variable in known:
            values[known[variable]] = value
        elif variable.startswith(_PREFIX) and variable not in _FILES:
            problems.append(unknown_key("environment", variable, known))
    return values, problems


def _expand(path: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(path, str) and path.startswith("~/") and environ.get("HOME"):
        return environ["HOME"] + path[1:]
    return path
