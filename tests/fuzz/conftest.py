"""How long the fuzzing takes; FASTALEX_FUZZ chooses.  "fast": a minute on one core, "long": twenty, "once": as "fast",
and without shrinking what fails.

    FASTALEX_FUZZ=long python -m pytest tests/fuzz --hypothesis-seed=7

"fast" tries the same inputs every time, so that it fails where something changed and nowhere else.  `examples(n)` of a
test is what it does in the fast profile.
"""

import os

from hypothesis import HealthCheck, Phase, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("fast", **COMMON, derandomize=True)
settings.register_profile("once", **COMMON, phases=[Phase.explicit, Phase.generate])
settings.register_profile("long", **COMMON)
settings.load_profile(os.environ.get("FASTALEX_FUZZ", "fast"))
