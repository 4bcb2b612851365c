"""The mathematics of recall_bc.py: expert, augmentations, curriculum and cloning, against the environment itself."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Beta

import recall_bc as script
from inspect_run import Episode, write_dataset
from recall_bc import Actor, Args, Trajectory

torch.set_num_threads(1)
SMALL = {"env_id": "Reacher-v5", "dataset": "reacher/random-v0", "device": "cpu"}


# ------------------------------------------------------------------------------------------------------ helpers


@pytest.fixture(autouse=True)
def with_datasets(datasets):
    """Those of conftest.py."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reacher(**changes):
    args = Args(**SMALL | changes)
    env = script.make_env(args)
    return env, script.load_expert(env, args), args


def distorted(experts, args, seed=0):
    torch.manual_seed(seed)
    return script.distorted_actions(experts, args)


def trajectories(lengths, size=3):
    """Trajectories whose states say which trajectory and step they are of."""
    made = []
    for i, length in enumerate(lengths):
        states = np.zeros((length + 1, size), np.float32)
        states[:, 0], states[:, 1] = i, np.arange(length + 1)
        made.append(Trajectory(states, np.zeros((length, 2), np.float32), np.zeros(length, np.float32), i))
    return made


def run(tmp_path, **changes):
    small = {"hidden": 8, "batch_size": 8, "total_timesteps": 90, "eval_every": 30, "eval_episodes": 1, "episodes": 2}
    small |= {"num_traces": 9, "trace_length": 4, "backtracking_updates": 3, "run_dir": str(tmp_path / "run")}
    return script.main(Args(**SMALL | small | changes))


# ------------------------------------------------------------------------------------------------------ expert


def test_the_expert_is_what_the_environment_did():
    """Its actions, rescaled to -1 to 1, give its states again when they are taken."""
    env, experts, _ = reacher(episodes=4, expert_steps=20)
    assert [expert.seed for expert in experts] == [100, 101, 102, 103]
    for expert in experts:
        assert expert.states.shape == (21, 10) and expert.actions.shape == (20, 2) and expert.rewards.shape == (20,)
        played = script.replay(env, expert, expert.actions)
        np.testing.assert_array_equal(played.states, expert.states)
        np.testing.assert_array_equal(played.actions, expert.actions)
        np.testing.assert_allclose(played.rewards, expert.rewards, rtol=1e-6)


def test_actions_are_rescaled_from_the_environments_own_space():
    env = gym.make("Pendulum-v1")
    states, actions = [env.reset(seed=7)[0]], np.linspace(-2, 2, 9, dtype=np.float32)[:, None]
    outcomes = []
    for action in actions:
        state, *outcome, _ = env.step(action)
        states.append(state)
        outcomes.append(outcome)
    columns = (np.array(column) for column in zip(*outcomes, strict=True))
    write_dataset("pendulum/ramp-v0", [Episode(np.array(states), actions, *columns)], 7, env.spec, "none")
    args = Args(env_id="Pendulum-v1", dataset="pendulum/ramp-v0", episodes=1, device="cpu")
    env = script.make_env(args)
    (expert,) = script.load_expert(env, args)
    np.testing.assert_allclose(expert.actions[:, 0], np.linspace(-1, 1, 9), atol=1e-6)
    np.testing.assert_allclose(script.replay(env, expert, expert.actions).states, expert.states, atol=1e-5)


def test_tuples_are_the_steps_of_trajectories():
    _, experts, _ = reacher(episodes=3)
    tuples = script.tuples_of(experts, "cpu")
    assert len(tuples.states) == 150
    for i, expert in enumerate(experts):
        rows = slice(50 * i, 50 * (i + 1))
        np.testing.assert_array_equal(tuples.states[rows], expert.states[:-1])
        np.testing.assert_array_equal(tuples.next_states[rows], expert.states[1:])
        np.testing.assert_array_equal(tuples.actions[rows], expert.actions)
        np.testing.assert_array_equal(tuples.rewards[rows], expert.rewards)


# ------------------------------------------------------------------------------------------------------ rivals


def test_noise_is_uniform_and_every_expert_gets_as_much():
    _, experts, args = reacher(augment="noise", num_traces=70)
    made = distorted(experts, args)
    assert [expert.seed for expert, _ in made] == [100 + i % 7 for i in range(70)]
    noise = np.concatenate([actions - expert.actions for expert, actions in made]).ravel() / 0.9
    assert len(noise) == 7000 and np.abs(noise).max() <= 1.0001
    assert abs(noise.mean()) < 0.03 and noise.var() == pytest.approx(1 / 3, rel=0.05)  # of U(-1, 1)
    deciles = np.quantile(noise, np.linspace(0.1, 0.9, 9))
    np.testing.assert_allclose(deciles, np.linspace(-0.8, 0.8, 9), atol=0.06)


def test_what_is_replayed_happens_in_the_real_environment():
    """An environment of its own, made by Gymnasium, does the same with clipped actions."""
    env, experts, args = reacher(augment="noise", num_traces=4, episodes=2)
    for expert, actions in distorted(experts, args):
        played, real = script.replay(env, expert, actions), gym.make("Reacher-v5")
        states, rewards = [real.reset(seed=expert.seed)[0]], []
        for action in actions:
            state, reward, *_ = real.step(action.clip(-1, 1))
            states.append(state)
            rewards.append(reward)
        assert np.abs(actions).max() > 1
        np.testing.assert_allclose(played.states, np.array(states), atol=1e-6)
        np.testing.assert_allclose(played.rewards, rewards, atol=1e-6)
        np.testing.assert_array_equal(played.actions, actions)  # as they are, not as they were carried out


def test_a_replay_ends_in_a_terminal_state():
    env = script.make_env(Args(env_id="Hopper-v5"))
    state, _ = env.reset(seed=3)
    expert = Trajectory(np.array([state]), np.zeros((0, 3), np.float32), np.zeros(0, np.float32), 3)
    played = script.replay(env, expert, np.ones((500, 3), np.float32))
    steps = len(played.rewards)
    assert 5 < steps < 100 and played.states.shape == (steps + 1, 11) and played.actions.shape == (steps, 3)


@pytest.mark.parametrize("seed", [None, 99])
def test_what_cannot_be_replayed_is_refused(seed):
    """Without the seed of its reset, or with one that starts elsewhere."""
    env, (expert, *_), _ = reacher()
    with pytest.raises(script.UsageError, match="^--augment noise and mixup need a --dataset with the seeds"):
        script.replay(env, expert._replace(seed=seed), expert.actions)


def test_mixup_mixes_each_ordered_pair_of_experts_mostly_with_the_first():
    _, experts, args = reacher(augment="mixup")
    made, shares = distorted(experts, args), []
    assert len(made) == 42
    for (first, second), (expert, actions) in zip(itertools.permutations(experts, 2), made, strict=True):
        assert expert is first
        # a' = l' a_1 + (1 - l') a_2 is linear in l': a' - a_2 = l' (a_1 - a_2).
        share = np.sum((actions - second.actions) * (first.actions - second.actions))
        share /= np.sum((first.actions - second.actions) ** 2)
        np.testing.assert_allclose(actions, share * first.actions + (1 - share) * second.actions, atol=1e-5)
        shares.append(share)
    assert len({*shares}) > 30 and min(shares) >= 0.5 and max(shares) < 1.00001


def test_the_weights_of_mixup_are_the_larger_of_a_beta_and_its_rest():
    expert = trajectories([2])[0]
    pair = [expert._replace(actions=np.ones((2, 1))), expert._replace(actions=np.zeros((2, 1)))]
    shares = []
    for seed in range(400):
        (_, towards_one), (_, towards_zero) = distorted(pair, Args(augment="mixup", mixup_alpha=0.5), seed)
        shares += [towards_one[0, 0], 1 - towards_zero[0, 0]]
    torch.manual_seed(1)
    draws = Beta(0.5, 0.5).sample((100_000,))
    expected = torch.maximum(draws, 1 - draws).quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    np.testing.assert_allclose(np.quantile(shares, [0.1, 0.3, 0.5, 0.7, 0.9]), expected, atol=0.04)


def test_mixed_trajectories_are_as_long_as_the_shorter_expert():
    made = distorted(trajectories([5, 3, 4]), Args(augment="mixup"))
    assert [(expert.seed, len(actions)) for expert, actions in made] == [
        (0, 3), (0, 4), (1, 3), (1, 3), (2, 4), (2, 3)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ recall traces


def test_the_curriculum_goes_from_the_tail_over_the_middle_to_the_head():
    """Each state that has a predecessor is in one part, a third of each trajectory."""
    experts = trajectories([9, 10])
    places = script.places_of_starts(experts, Args(augment="bdm-cl", device="cpu"))
    steps = [[(int(i), int(t)) for i, t, _ in part.tolist()] for part in places]
    assert steps[0] == [(0, 7), (0, 8), (0, 9), (1, 8), (1, 9), (1, 10)]
    assert steps[1] == [(0, 4), (0, 5), (0, 6), (1, 5), (1, 6), (1, 7)]
    assert steps[2] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4)]
    (tail,) = script.places_of_starts(experts, Args(augment="bdm", device="cpu"))
    torch.testing.assert_close(tail, places[0])
    (everywhere,) = script.places_of_starts(experts, Args(augment="bdm", start_states="all", device="cpu"))
    torch.testing.assert_close(everywhere, torch.cat(places))


def test_parts_of_the_curriculum_are_added_one_after_the_other(tmp_path, monkeypatch):
    real, sizes = script.draw, []

    def draw(pairs, count):
        sizes.append(len(pairs[0]))
        return real(pairs, count)

    monkeypatch.setattr(script, "draw", draw)
    folder = run(tmp_path, augment="bdm-cl", curriculum_every=20, trace_limit=1e6)
    assert sizes[1::2] == [12] * 20 + [24] * 20 + [36] * 50  # three traces of four steps each
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("augment/pairs")] == [12, 24, 36, 36]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_clone_learns_from_traces_that_have_not_ended_and_so_many_pairs_of_the_expert(share, tmp_path, monkeypatch):
    """Nothing else: 2 experts, 9 traces from the last thirds, some of which are cut."""
    traced, learned, real = [], [], script.recall_traces

    def recall_traces(model, starts, args):
        states, actions, inside = real(model, starts, args)
        inside[2:, ::2] = False
        traced.append((starts, states[inside], actions[inside]))
        return states, actions, inside

    def clone(actor, optimizer, states, actions):
        learned.append((states, actions))
        return {}

    monkeypatch.setattr(script, "recall_traces", recall_traces)
    monkeypatch.setattr(script, "clone", clone)
    run(tmp_path, augment="bdm", with_expert=share)
    _, experts, _ = reacher(episodes=2)
    rows_of = [
        {tuple(row) for row in torch.cat(pairs, -1).tolist()} for pairs in (script.tuples_of(experts, "cpu")[:2],)
    ]
    (of_expert,), ((starts, *pairs),) = rows_of, traced
    of_traces = {tuple(row) for row in torch.cat(pairs, -1).tolist()}
    ends = {tuple(state) for expert in experts for state in expert.states[-16:].tolist()}
    assert len(starts) == 9 and {tuple(start) for start in starts.tolist()} <= ends
    assert len(learned) == 90
    for states, actions in learned:
        rows = [tuple(row) for row in torch.cat((states, actions), -1).tolist()]
        assert sum(row in of_expert for row in rows) == 8 * share
        assert sum(row in of_traces for row in rows) == 8 - 8 * share
    seen = {tuple(row) for states, actions in learned for row in torch.cat((states, actions), -1).tolist()}
    assert share == 1 or seen >= of_traces  # all of them, sooner or later


def test_a_model_that_leaves_the_data_at_once_is_refused(tmp_path):
    with pytest.raises(script.UsageError, match="^--trace-limit or --backtracking-lr"):
        run(tmp_path, augment="bdm", trace_limit=0.0)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ cloning


def test_one_step_is_along_the_gradient_of_the_mean_squared_error_of_sampled_actions():
    torch.manual_seed(0)
    actor, states, actions = Actor(3, 2, 4), randn(20, 3), randn(20, 2, seed=1)
    actor.log_std.data.copy_(torch.tensor([-0.5, 0.3]))
    actor.state_mean.copy_(torch.tensor([1.0, 0, -1]))
    optimizer, before = torch.optim.SGD(actor.parameters(), lr=0.1), [w.clone() for w in actor.parameters()]
    torch.manual_seed(2)
    noise = torch.normal(torch.zeros(20, 2), torch.ones(20, 2))
    loss = (
        (actor.net((states - actor.state_mean) / actor.state_std) + actor.log_std.exp() * noise - actions) ** 2
    ).mean()
    gradients = torch.autograd.grad(loss, [*actor.parameters()])
    torch.manual_seed(2)
    losses = script.clone(actor, optimizer, states, actions)
    torch.testing.assert_close(losses["losses/imitation_loss"], loss.detach())
    for weight, old, gradient in zip(actor.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(weight.detach(), old - 0.1 * gradient)


def test_the_error_is_that_of_the_mean_and_the_variance_of_the_policy():
    """E (m + std e - a)^2 = (m - a)^2 + std^2."""
    actor, states, actions = Actor(3, 2, 4), randn(5, 3), randn(5, 2, seed=1)
    actor.log_std.data.copy_(torch.tensor([-1.0, 0.0]))
    frozen = torch.optim.SGD(actor.parameters(), lr=0.0)
    mean = torch.stack(
        [script.clone(actor, frozen, states, actions)["losses/imitation_loss"] for _ in range(4000)]
    ).mean()
    expected = ((actor(states).mean - actions) ** 2).mean() + (actor.log_std.exp() ** 2).mean()
    torch.testing.assert_close(mean, expected.detach(), rtol=0.03, atol=0)


def test_a_clone_learns_a_linear_expert_and_forgets_its_noise():
    torch.manual_seed(0)
    actor, states = Actor(3, 2, 32), randn(2000, 3)
    actions = states @ randn(3, 2, seed=1) / 3
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    for _ in range(2500):
        losses = script.clone(actor, optimizer, *script.draw((states, actions), 64))
    assert losses["losses/std"] < 0.15
    new = randn(100, 3, seed=2)
    assert (actor(new).mean - new @ randn(3, 2, seed=1) / 3).square().mean() < 0.005


def test_pairs_are_drawn_together_and_uniformly():
    torch.manual_seed(0)
    states = torch.arange(5.0)
    drawn, actions = script.draw((states, 10 * states), 10_000)
    torch.testing.assert_close(actions, 10 * drawn)
    assert np.bincount(drawn.long()).tolist() == pytest.approx([2000] * 5, abs=150)


def test_actions_are_those_of_the_policy():
    torch.manual_seed(0)
    actor, states = Actor(3, 2, 4), randn(4000, 3).numpy()
    mean = actor(torch.from_numpy(states)).mean.detach().numpy()
    np.testing.assert_allclose(script.act(actor, states, greedy=True), mean, atol=1e-6)
    noise = script.act(actor, states) - mean
    assert noise.std(axis=0).tolist() == pytest.approx([1, 1], rel=0.05) and abs(noise.mean()) < 0.05
    with pytest.raises(FloatingPointError, match="an action is not finite"):
        script.act(actor, np.full((1, 3), np.nan, np.float32))
