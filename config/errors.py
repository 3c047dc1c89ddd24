"""What can be wrong with configuration, job descriptions and quantities.

    ConfigError
    ├── QuantityError    a text is not the amount, share, size, duration or account it stands for
    └── JobSpecError     a job description cannot be used

Every message names the key, its value and the cure; several problems stand one per line.
"""


class ConfigError(Exception):
    """Root of what this package raises about its input."""


class QuantityError(ConfigError, ValueError):
    """A text is not the amount, share, size, duration or account it stands for."""


class JobSpecError(ConfigError):
    """A job description cannot be used."""
