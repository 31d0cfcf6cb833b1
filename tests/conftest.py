"""Settings and fixtures for all tests."""

from __future__ import annotations

import os
from unittest import mock

import pytest
from families import tiny
from hypothesis import settings

import ckv_compile

# CI draws the same examples every time; developers' runs go on exploring.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="module")
def model():
    """One model for all tests of a file; they make more kinds of calls than a program does."""
    with mock.patch("ckv_compile.region.RECOMPILE_LIMIT", 200):
        return ckv_compile.optimize(tiny(), 0.5, lowering="eager")


@pytest.fixture
def half(model):
    """The same at half the budget, whatever the last test has made of it."""
    return ckv_compile.optimize(model, 0.5, lowering="eager")
