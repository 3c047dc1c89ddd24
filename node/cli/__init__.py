"""The meshd command: one module per group, talking only to the control API."""
