"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# CI draws the same examples every time; developers' runs go on exploring.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
