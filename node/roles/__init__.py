"""The four roles: each module reads like its paragraph in docs/architecture.md."""
