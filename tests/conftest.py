"""What every test shares: hypothesis without a clock, because busy machines stall at times."""

from hypothesis import settings

settings.register_profile("meshd", deadline=None, print_blob=True)
settings.load_profile("meshd")
