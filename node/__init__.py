"""One daemon and what it does."""
