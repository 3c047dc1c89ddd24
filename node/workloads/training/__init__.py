"""Training: independent shards over a public state, and how a round's contributions become one."""
