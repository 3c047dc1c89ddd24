"""The local swarm that scripts/demo starts, with its cheater."""
