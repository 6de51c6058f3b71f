"""Property tests are not timed: a loaded machine is no failure.

What fails is printed so that it can be run again.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "unit", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")
