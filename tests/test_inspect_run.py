"""The mathematics of inspect_run.py, and that it works for every script with a Gaussian backtracking model."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from PIL import Image

import inspect_run as script
from inspect_run import Args, Comparison, Episode

SMALL = {
    "recall_trpo": {
        "num_envs": 2,
        "num_steps": 100,
        "recall_until": 1.0,
        "recall_every": 1,
        "backtracking_updates": 20,
    },
    "recall_goalgan_ant": {
        "env_id": "PointUMaze-v0",
        "num_envs": 10,
        "num_steps": 20,
        "max_episode_steps": 20,
        "goal_noise": 0.3,
        "trace_limit": 1e6,
        "gan_updates": 50,
        "backtracking_updates": 20,
    },
    "recall_sac": {"hidden": 16, "batch_size": 16, "learning_starts": 200, "recall_every": 100, "recall_tuples": 500},
}


def random_episodes(lengths, size=3):
    rng = np.random.default_rng(0)
    rest = (None, None)  # terminated, truncated
    return [
        Episode(rng.normal(size=(n + 1, size)).astype(np.float32), None, rng.normal(size=n), *rest) for n in lengths
    ]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_the_most_valuable_states_are_those_that_earned_most(gamma):
    episodes = random_episodes([5, 1, 9])
    values = {}
    for i, rewards in enumerate(episode.rewards for episode in episodes):
        for t in range(1, len(rewards) + 1):
            later = rewards[t - 1 :]
            values[i, t] = (gamma ** np.arange(len(later)) * later).sum()
    best = sorted(values, key=values.get, reverse=True)
    assert script.most_valuable(episodes, gamma, fraction=1.0) == best
    assert script.most_valuable(episodes, gamma, fraction=0.4) == best[:6]
    assert script.most_valuable(episodes, gamma, fraction=0.0) == best[:1]


def test_traces_are_compared_with_what_led_to_their_starts():
    episodes, ends = random_episodes([6, 3]), [(0, 6), (1, 1), (0, 2)]
    model = SimpleNamespace(state_mean=torch.zeros(2))  # the third number of a state is its goal

    def recall_traces(model, starts, args):
        states = torch.stack([starts + step for step in range(args.trace_length)])
        return states, None, torch.ones(states.shape[:2]) > 0

    compared = script.compare(recall_traces, model, episodes, ends, SimpleNamespace(trace_length=4))
    assert compared.known.T.tolist() == [[True] * 4, [True] + [False] * 3, [True] * 2 + [False] * 2]
    for n, (i, t) in enumerate(ends):
        np.testing.assert_array_equal(compared.starts[n], episodes[i].states[t, :2])
        for back in range(1, min(t, 4) + 1):
            np.testing.assert_array_equal(compared.real[back - 1, n], episodes[i].states[t - back, :2])
    torch.testing.assert_close(compared.imagined[2], compared.starts + 2)


def test_errors_are_root_mean_squares_over_what_is_known_and_not_ended():
    starts, real = torch.zeros(3, 2), torch.tensor([[[3.0, 8.0]], [[6.0, 0.0]]]).repeat(1, 3, 1)
    imagined = real + torch.tensor([[[3.0, 8.0], [0.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [1.0, 1.0], [7.0, 7.0]]])
    known = torch.tensor([[True, True, True], [False, True, True]])
    inside = torch.tensor([[True, True, False], [True, False, False]])
    found = script.errors(Comparison(starts, real, imagined, known, inside), torch.tensor([3.0, 4.0]))
    first = ((1 + 4) / 2) ** 0.5  # 3 / 3 and 8 / 4 deviations
    torch.testing.assert_close(found["imagined"], torch.tensor([first / 2, torch.nan]), equal_nan=True)
    torch.testing.assert_close(found["standing still"], torch.tensor([first, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("name", SMALL)
def test_a_run_of_every_script_gets_a_picture_and_numbers(name, tmp_path, capsys):
    module = importlib.import_module(name)
    usual = {"env_id": "Pendulum-v1", "total_timesteps": 400, "eval_episodes": 1}
    args = module.Args(**usual | SMALL[name])
    run = module.main(module.replace(args, run_dir=str(tmp_path / "run")))
    capsys.readouterr()
    path = script.main(Args(str(run), episodes=2, num_traces=9))
    with Image.open(path) as image:
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
        assert image.size == (1100, 800) and len(colours) > 50
    printed = capsys.readouterr().out
    assert "over 2 fresh episodes" in printed and " 1 steps back: " in printed and "of 20 steps" in printed
    script.main(Args(str(run), episodes=2, num_traces=9))
    assert capsys.readouterr().out == printed  # the same seed, the same numbers
    without = module.main(module.replace(args, recall="none", run_dir=str(tmp_path / "none")))
    for folder in (without, tmp_path):
        with pytest.raises(ValueError, match="^RUN_DIR must be the folder of a run of [^\n]*$"):
            script.main(Args(str(folder)))


@pytest.mark.parametrize("name", ["recall_sac", "recall_trpo"])
def test_actions_are_recorded_as_they_reach_the_environment(name, tmp_path, capsys, datasets):
    """Greedy episodes of an agent without recall traces. Played again in Gymnasium's own environment, from their seeds,
    they are the same to the bit, rewards and ends too."""
    module = importlib.import_module(name)
    usual = {"env_id": "Pendulum-v1", "total_timesteps": 400, "eval_episodes": 1, "recall": "none"}
    run = module.main(module.Args(**usual | SMALL[name] | {"run_dir": str(tmp_path / "run")}))
    dataset_id = f"pendulum/{name.replace('_', '-')}-v0"
    args = Args(str(run), record_dataset=dataset_id, episodes=3)
    script.main(args)
    assert "over 3 fresh episodes" in capsys.readouterr().out and not [*run.glob("inspect_*.png")]
    dataset, env = minari.load_dataset(dataset_id), gym.make("Pendulum-v1")
    assert dataset.total_episodes == 3 and dataset.env_spec.id == "Pendulum-v1"
    assert dataset.action_space == env.action_space and dataset.observation_space == env.observation_space
    seeds = [facts["seed"] for facts in dataset.storage.get_episode_metadata(range(3))]
    assert seeds == [10**6, 10**6 + 1, 10**6 + 2]
    for episode, seed in zip(dataset, seeds, strict=True):
        states, outcomes = [env.reset(seed=int(seed))[0]], []
        for action in episode.actions:
            assert env.action_space.contains(action)
            state, *outcome, _ = env.step(action)
            states.append(state)
            outcomes.append(outcome)
        np.testing.assert_array_equal(episode.observations, states)
        columns = episode.rewards, episode.terminations, episode.truncations
        np.testing.assert_array_equal(np.array(columns, float).T, np.array(outcomes, float))
        assert len(outcomes) == 200 and episode.truncations[-1]
    actor = module.Actor(3, 1, module.Args(**SMALL[name]).hidden)
    actor.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["actor"])
    greedy = module.act(actor, episode.observations[:-1], greedy=True).clip(-1, 1)
    np.testing.assert_allclose(episode.actions, 2 * greedy, atol=1e-5)
    for wrong in (dataset_id, "no id"):  # there is one already
        with pytest.raises(ValueError, match=r"^[^\n]*(already exists|Malformed dataset ID)[^\n]*$"):
            script.main(Args(str(run), record_dataset=wrong, episodes=1))


def test_the_script_stays_short():
    assert len(Path(script.__file__).read_text().splitlines()) <= 216
