"""Spreads the tests over all cores; those of one script or file stay in one process, where they share their runs."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: all cores are taken by other tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        script = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        contract = item.path.stem == "test_contract" and script
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(script if contract else item.path.stem))
