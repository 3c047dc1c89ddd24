"""How work is checked: digests, draws and comparisons (pure; no I/O)."""
