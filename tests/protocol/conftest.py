from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine is no failure: the facts here are about bytes, not about time.
settings.register_profile("facts", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("facts")
