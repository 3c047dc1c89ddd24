"""Where meshd's contracts are on a chain: the file that `meshd chain deploy` writes."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshd.config.errors import ConfigError
from meshd.config.fields import Account
from meshd.config.schema import ChainConfig

_LIMIT = 64 * 1024


class Deployment(BaseModel):
    """A chain's id and the addresses of MCC, NodeRegistry and JobEscrow on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    chain_id: int = Field(ge=1, lt=2**53)
    mcc: Account
    registry: Account
    escrow: Account


def read_deployment(path: Path) -> Deployment:
    """Return the deployment in the JSON file at *path*; raises ConfigError."""
    try:
        with path.open("rb") as file:
            text = file.read(_LIMIT)
        return Deployment.model_validate_json(text)
    except OSError as error:
        raise ConfigError(
            f"chain.deployment = {str(path)!r} cannot be read: {error.strerror}: "
            "name the file that `meshd chain deploy` wrote"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path} is no deployment: {where or 'JSON'}: "
            f"{first['msg'].removeprefix('Value error, ')}: run `meshd chain deploy` again"
        ) from error


def write_deployment(deployment: Deployment, path: Path) -> None:
    """Write *deployment* to *path* as JSON, replacing what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(deployment.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def deployment_of(chain: ChainConfig) -> Deployment:
    """Return the deployment that *chain* names, by file or key by key; raises ConfigError."""
    if chain.deployment is not None:
        return read_deployment(chain.deployment)
    if not (chain.chain_id and chain.mcc and chain.registry and chain.escrow):
        raise AssertionError("a ChainConfig without a deployment file names all contracts")
    return Deployment(
        chain_id=chain.chain_id,
        mcc=chain.mcc,
        registry=chain.registry,
        escrow=chain.escrow,
    )
