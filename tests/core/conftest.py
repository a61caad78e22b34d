"""How long the random tests of the core search.

By default the whole folder stays under 40 seconds on one core. To search longer, for example overnight:

    pytest tests/core --hypothesis-profile long --timeout 0
"""

from hypothesis import HealthCheck, settings

_ALWAYS = settings(
    deadline=None,  # a shared machine is slow at times, which is no failure
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("core", _ALWAYS, max_examples=100, stateful_step_count=40)
settings.register_profile("long", _ALWAYS, max_examples=5000, stateful_step_count=100)
settings.load_profile("core")
