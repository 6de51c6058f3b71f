"""Property tests are not timed: a loaded machine is no failure. Their examples are the same in each
run, so that none fails by chance: `--hypothesis-profile=explore` tries others.

What fails is printed so that it can be run again.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "explore", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("unit", settings.get_profile("explore"), derandomize=True)
settings.load_profile("unit")
