"""Spreads the tests over all cores; those of one script or file stay in one process, where they share their runs."""

import os
import time
import types
import warnings

import gymnasium as gym
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


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """Minari datasets of random actions in two tasks, the folder of all datasets of these tests."""
    import minari
    from minari.data_collector import EpisodeBuffer

    folder = tmp_path_factory.mktemp("minari")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    for dataset_id, env_id, steps in (("reacher", "Reacher-v5", 50), ("halfcheetah", "HalfCheetah-v5", 20)):
        env, episodes = gym.make(env_id), []
        env.action_space.seed(0)
        for i in range(7):
            states, taken = [env.reset(seed=100 + i)[0]], []
            for _ in range(steps):
                action = env.action_space.sample()
                state, *outcome, _ = env.step(action)
                states.append(state)
                taken.append((action, *outcome))
            columns = (list(column) for column in zip(*taken, strict=True))
            episodes.append(EpisodeBuffer(None, 100 + i, None, states, *columns, infos={}))
        with warnings.catch_warnings(action="ignore"):  # of facts that are not given
            minari.create_dataset_from_buffers(f"{dataset_id}/random-v0", episodes, env.spec)
    yield folder
    del os.environ["MINARI_DATASETS_PATH"]
