"""How long the tests of `tests/hardening` may try: bounded as a rule, and longer by `--hypothesis-profile=long`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

LONG = "long"
settings.register_profile(
    LONG, max_examples=20_000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)


def effort(bounded: int, long: int) -> int:
    """Return how often to try, by the profile of this run."""
    return long if settings.get_current_profile_name() == LONG else bounded
