"""Settings of every test run."""

from __future__ import annotations

import os

# Several workers share the cores: threads of their own would only wait for each other. Set before
# torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
