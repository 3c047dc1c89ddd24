"""Runs the command as `python -m meshd.node.cli`."""

import sys

from meshd.node.cli import main

sys.exit(main())
