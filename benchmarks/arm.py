"""One arm of a benchmark, in a process of its own: calls a function and prints what it found as one JSON line.

    python benchmarks/arm.py sides:preftune FOLDER '{"dtype": "bfloat16", "tokens": 4096, "steps": 6}'
    python benchmarks/arm.py sides:trl FOLDER '{"dtype": "bfloat16", "batch": 4, "accumulation": 2, "checkpointing": false}'

The function is named by its module and takes the folder that rows.prepare made, and the settings.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would report its use otherwise


def peak_gb() -> float:
    """Most memory of this process that was resident at once. 1 GB = 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def resident_gb() -> float:
    """Memory of this process that is resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def forget_peak() -> None:
    """The peak is from here on that of what follows."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    with suppress(OSError):  # where memory runs out it is this process that goes, and nothing beside it
        Path("/proc/self/oom_score_adj").write_text("1000")
    module, function = sys.argv[1].split(":")
    found = getattr(import_module(module), function)(Path(sys.argv[2]), json.loads(sys.argv[3]))
    print(json.dumps({**found, "peak_gb": peak_gb()}))
