"""Where a daemon's files are, found without reading the whole configuration."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from meshd.config.errors import ConfigError

SOCKET: Final = "meshd.sock"
LOCK: Final = "meshd.lock"
KEY: Final = "identity.key"
CHAIN: Final = "devchain.sqlite3"

_LIMIT = 1 << 20


def data_directory(
    flag: str | None, environ: Mapping[str, str], file_text: str | None = None
) -> Path:
    """Return the data directory: flag, MESHD_DATA_DIR, the file's data_dir, or the user's own.

    The last is ``$XDG_DATA_HOME/meshd`` or the platform's equal of it.
    """
    named = flag or environ.get("MESHD_DATA_DIR") or _from_file(file_text)
    if named is None:
        import platformdirs  # 10 ms, seldom needed

        return platformdirs.user_data_path("meshd")
    return Path(named).expanduser().absolute()


def config_file(flag: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the configuration file: flag or MESHD_CONFIG, else the user's own if it exists."""
    named = flag or environ.get("MESHD_CONFIG")
    if named:
        return Path(named).expanduser()
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", ""), ".config")
    own = Path(home) / "meshd" / "config.toml"
    return own if own.is_absolute() and own.is_file() else None


def read_text(path: Path, what: str) -> str:
    """Return the text of the file at *path* (at most 1 MiB); raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be read: {error.strerror}: check the name and its permissions"
        ) from error
    if len(raw) > _LIMIT:
        raise ConfigError(f"{what} {path} is longer than 1 MiB: it is not one; name another file")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text: {error.reason}: save it so") from error


def _from_file(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        named = tomllib.loads(text).get("data_dir")
    except tomllib.TOMLDecodeError:
        return None  # whoever needs more than the directory will say what is wrong
    return named if isinstance(named, str) and named else None
