"""The control API: HTTP and JSON on a unix socket, for this user's own programs only."""
