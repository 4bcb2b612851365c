"""Spreads the tests over all cores; those of one file stay in one process, where they share their runs."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: all cores are taken by other tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
