"""What can be wrong with a training job, its state or its contributions.

    WorkloadError
    └── TrainingError         the program or the data cannot be trained like this
        ├── SettingsError     a setting is unknown, missing, malformed or out of bounds
        ├── StateError        the bytes are no state of this program and these settings
        ├── ContributionError the bytes are no contribution to it
        └── TrainingDiverged  a loss, gradient or parameter became NaN or infinite

Every message names the thing, its value and the cure.
"""

from meshd.node.workloads.errors import WorkloadError


class TrainingError(WorkloadError):
    """The program or the data cannot be trained like this."""


class SettingsError(TrainingError):
    """A setting is unknown, missing, malformed or out of bounds."""


class StateError(TrainingError):
    """The bytes are no state of this program and these settings."""


class ContributionError(TrainingError):
    """The bytes are no contribution of this program and these settings."""


class TrainingDiverged(TrainingError):
    """A loss, a gradient or a parameter became NaN or infinite."""
