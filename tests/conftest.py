"""What every test shares: hypothesis without a clock, because busy machines stall at times, and
an import path for helpers (`from sim.swarm import Swarm`)."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("meshd", deadline=None, print_blob=True)
settings.load_profile("meshd")
