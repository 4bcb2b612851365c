"""Spreads the tests over all cores; those of one script or file stay in one process, where they share their runs."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: all cores are taken by other tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        script = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if not item.get_closest_marker("xdist_group"):
            of_script = item.path.stem == "test_runs" and script
            item.add_marker(pytest.mark.xdist_group(script if of_script else item.path.stem))
