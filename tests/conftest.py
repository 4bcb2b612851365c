"""Spreads the tests over all cores; those of one script or file stay in one process, where they share their runs."""

import os
import time
import types

import pytest
from tensorboard.summary.writer import event_file_writer

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: all cores are taken by other tests

# TensorBoard reads the files of a run in the order of their names, which begin with the second of their making. Runs of
# these tests are resumed within one second: theirs begin with the microsecond.
event_file_writer.time = types.SimpleNamespace(time=lambda: time.time_ns() // 1000)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        script = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if not (item.get_closest_marker("xdist_group") or item.get_closest_marker("slow")):
            of_script = item.path.stem == "test_runs" and script
            item.add_marker(pytest.mark.xdist_group(script if of_script else item.path.stem))
