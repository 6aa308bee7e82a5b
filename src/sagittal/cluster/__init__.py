"""Work of many machines: folds, sweeps and cohorts on Ray and on SLURM."""

import os
from pathlib import Path

# Ray reports its use to its makers unless this is said before it is imported; machines with patients' data report
# nothing. Every import of Ray goes through this package, so this is the one place.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray would warn of a change to come in how it hides GPUs from work that asked for none; this is what it will do.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# A head that has a token asks for it, and `ray start` uses this machine's by itself; whoever joins must say so before
# Ray is imported. A head that asks for none does not mind.
if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or (
    Path("~/.ray/auth_token").expanduser().is_file()
):
    os.environ.setdefault("RAY_AUTH_MODE", "token")
