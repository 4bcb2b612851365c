"""The mathematics of recall_sac.py against torch.distributions, closed forms, enumeration and real dynamics."""

import copy
import itertools
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import recall_sac as script
from recall_sac import Actor, Args, BacktrackingModel, Batch, Critic, Episodes, ReplayBuffer

torch.set_num_threads(1)
STATE_DIM, ACTION_DIM = 3, 2


# ------------------------------------------------------------------------------------------------------ helpers


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def networks(seed=0, hidden=8, state_dim=STATE_DIM, action_dim=ACTION_DIM):
    torch.manual_seed(seed)
    return Actor(state_dim, action_dim, hidden), Critic(state_dim, action_dim, hidden)


def random_batch(size=16, seed=0):
    states, next_states = randn(size, STATE_DIM, seed=seed), randn(size, STATE_DIM, seed=seed + 1)
    actions, rewards = randn(size, ACTION_DIM, seed=seed + 2).tanh(), randn(size, seed=seed + 3)
    return Batch(states, actions, rewards, (torch.arange(size) % 3 == 0).float(), next_states)


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(list(parameters), lr=lr)


def copies(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


class Line(gym.Env):
    """s' = s + `speed` * a in two dimensions; ends beyond 1 and after `limit` steps. States also count the steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def __init__(self, limit=7, speed=0.3, render_mode=None):
        self.limit, self.speed = limit, speed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.append(self.np_random.uniform(-0.5, 0.5, 2), 0.0)
        return self.state.copy(), {}

    def step(self, action):
        self.state = self.state + np.append(self.speed * action, 1.0)
        terminated = bool(np.abs(self.state[:2]).max() > 1)
        return self.state.copy(), float(action[0]), terminated, self.state[2] >= self.limit, {}


def play_into(buffer, episodes, steps, seed=0):
    """Random actions in all environments; returns the true transitions as rows (s, a, r, terminated, s')."""
    rng, rows = np.random.default_rng(seed), []
    for i, state in enumerate(episodes.states):
        buffer.add_state(i, state)
    for _ in range(steps):
        for i in range(len(episodes.envs)):
            action, state = rng.uniform(-1, 1, 2).astype(np.float32), episodes.states[i].copy()
            next_state, reward, terminated, truncated = episodes.step(i, action)
            buffer.add_step(i, action, reward, terminated, next_state)
            rows.append(np.concatenate((state, action, [reward, terminated], next_state)).astype(np.float32))
            if terminated or truncated:
                episodes.next_episode(i)
                buffer.next_row(i)
                buffer.add_state(i, episodes.states[i])
    return np.array(rows)


def rows_of(batch):
    return np.concatenate(
        [column.numpy().reshape(len(batch.rewards), -1) for column in batch], axis=1
    )  # the order of Batch is (s, a, r, terminated, s')


# ------------------------------------------------------------------------------------------------------ networks


def tanh_gaussian(actor, states):
    mean, log_std = actor(states)
    return TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform(cache_size=1)])


def test_log_prob_of_samples_against_torch_distributions():
    actor, _ = networks()
    states, noise = randn(50, STATE_DIM), randn(50, ACTION_DIM, seed=1)
    mean, log_std = actor(states)
    actions, log_prob = actor.sample(states, noise)
    # the base density at u and the Jacobian 1 - tanh(u)^2 of each dimension, which TanhTransform sums for us
    expected = tanh_gaussian(actor, states).log_prob((mean + log_std.exp() * noise).tanh())
    torch.testing.assert_close(actions, (mean + log_std.exp() * noise).tanh())
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)


def test_an_action_at_its_bound_is_as_likely_as_all_beyond_it():
    """At their mean density: their probability over their share of the actions, the last 0.02 on each side."""
    actor, _ = networks()
    states, actions = randn(50, STATE_DIM), (1.5 * randn(50, ACTION_DIM, seed=2)).clamp(-0.98, 0.98)
    mean, log_std = actor(states)
    gaussian, bound = Normal(mean.double(), log_std.exp().double()), torch.tensor(0.98).double().atanh()
    expected = TransformedDistribution(gaussian, [TanhTransform(cache_size=1)]).log_prob(actions.double())
    expected = torch.where(actions >= 0.98, ((1 - gaussian.cdf(bound)) / 0.02).log(), expected)
    expected = torch.where(actions <= -0.98, (gaussian.cdf(-bound) / 0.02).log(), expected)
    assert 20 < (actions.abs() >= 0.98).sum() < 80
    log_probs = actor.log_prob_of_clipped(states, actions)
    torch.testing.assert_close(log_probs, expected.sum(-1).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean, log_std", [(1.0, -4.0), (20.0, -6.0), (50.0, -9.0), (50.0, -20.0)])
def test_actions_far_beyond_what_the_policy_does_pull_it_like_a_parabola(mean, log_std):
    """As the tail of a Gaussian does, unless it is a million deviations away; nothing is infinite there, either."""
    actor, _ = networks()
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        actor.net[-1].bias.copy_(torch.tensor([mean, -mean, log_std, log_std]))
    actions, bias = torch.tensor([[-0.98, 0.98]]), actor.net[-1].bias
    (gradient,) = torch.autograd.grad(actor.log_prob_of_clipped(randn(1, STATE_DIM), actions).sum(), bias)
    distance, std = mean + math.atanh(0.98), math.exp(log_std)
    expected = [-distance / std**2, distance / std**2, (distance / std) ** 2, (distance / std) ** 2]
    expected = torch.tensor(expected) if distance / std < 1e6 else torch.zeros(4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=0)


def test_density_of_actions_integrates_to_one():
    """With those beyond the bound."""
    torch.manual_seed(0)
    actor = Actor(1, 1, 8)
    actions = torch.linspace(-1, 1, 20_001)[1:-1].clamp(-0.98, 0.98).unsqueeze(-1)
    density = actor.log_prob_of_clipped(torch.ones(len(actions), 1), actions).exp()
    assert float(density.detach().sum()) * 1e-4 == pytest.approx(1, abs=1e-3)


def test_imitating_its_own_actions_leaves_the_policy_as_it_is():
    """Though they were clipped. A policy that took them for its draws would have its mean and deviation pulled in."""
    actor, _ = networks()
    states = randn(200_000, STATE_DIM)
    with torch.no_grad():
        actor.net[-1].bias[:ACTION_DIM] += 2
        actions = actor.sample(states, randn(200_000, ACTION_DIM, seed=1))[0].clamp(-0.98, 0.98)
    right, wrong = (
        torch.autograd.grad(log_prob(actions).mean(), actor.net[-1].bias)[0].abs()
        for log_prob in (lambda a: actor.log_prob_of_clipped(states, a), tanh_gaussian(actor, states).log_prob)
    )
    assert right.max() < 0.01 < 0.1 < wrong.min()


def test_log_prob_stays_finite_where_tanh_rounds_to_one():
    log_prob = script.tanh_gaussian_log_prob(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([[50.0]]))
    # log of the slope 1 - tanh(u)^2 = 4 exp(-2u) for large u
    assert float(log_prob) == pytest.approx(-0.5 * math.log(2 * math.pi) - (math.log(4) - 100), rel=1e-5)


def test_twin_critics_are_two_separate_networks():
    _, critic = networks()
    states, actions = randn(5, STATE_DIM), randn(5, ACTION_DIM, seed=1)
    values = critic(states, actions)
    assert values.shape == (2, 5)
    for twin in range(2):
        x = torch.cat((states, actions), dim=-1)
        for layer in critic.layers:
            x = x @ layer.weight[twin] + layer.bias[twin]
            x = x.relu() if layer is not critic.layers[-1] else x
        torch.testing.assert_close(values[twin], x.squeeze(-1))
    assert not torch.equal(critic.layers[0].weight[0], critic.layers[0].weight[1])
    bound = 1 / math.sqrt(STATE_DIM + ACTION_DIM)  # of torch's own linear layers
    assert 0.8 * bound < critic.layers[0].weight.abs().max() <= bound


# ------------------------------------------------------------------------------------------------------ actor-critic


class Learner:
    """Small networks, a batch and noise, and one update of theirs by plain gradient descent."""

    def __init__(self, temperature=0.2):
        (self.actor, self.critic), self.target_critic = networks(), networks(1)[1]
        self.batch, self.noise = random_batch(), randn(2, 16, ACTION_DIM, seed=9)
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def update(self, **args):
        optimizer = sgd([*self.actor.parameters(), *self.critic.parameters(), self.log_temperature])
        nets = self.actor, self.critic, self.target_critic, self.log_temperature
        return script.update_actor_critic(*nets, optimizer, self.batch, self.noise, Args(**args))

    def sample(self, states, noise):
        mean, log_std = self.actor(states)
        actions = (mean + log_std.exp() * noise).tanh()
        return actions, tanh_gaussian(self.actor, states).log_prob(actions)


def step_along(module, loss):
    """The parameters after one step of gradient descent on the loss."""
    gradients = torch.autograd.grad(loss, [*module.parameters()])
    return [weight.detach() - 0.1 * gradient for weight, gradient in zip(module.parameters(), gradients, strict=True)]


def assert_near(module, weights):
    for weight, expected in zip(module.parameters(), weights, strict=True):
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reward_scale", [1.0, 5.0])
def test_critics_step_towards_the_soft_bellman_target(reward_scale):
    learner = Learner()
    batch, critic, targets_before = learner.batch, learner.critic, copies(learner.target_critic)
    next_actions, log_prob = learner.sample(batch.next_states, learner.noise[0])
    soft = learner.target_critic(batch.next_states, next_actions).min(0)[0] - 0.2 * log_prob
    targets = torch.where(batch.terminated == 1, 0.0, 0.9 * soft) + reward_scale * batch.rewards
    loss = sum(nn.functional.mse_loss(q, targets.detach()) for q in critic(batch.states, batch.actions))
    expected = step_along(critic, loss)
    losses = learner.update(gamma=0.9, tau=0.25, reward_scale=reward_scale)
    assert float(losses["losses/value_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_near(critic, expected)  # and so the actor's loss has moved none of their weights
    moved = [0.75 * old + 0.25 * new for old, new in zip(targets_before, copies(critic), strict=True)]
    assert_near(learner.target_critic, moved)


def test_actor_steps_along_the_gradient_of_its_loss():
    learner = Learner()
    actions, log_prob = learner.sample(learner.batch.states, learner.noise[1])
    loss = (0.2 * log_prob - learner.critic(learner.batch.states, actions).min(0)[0]).mean()
    expected = step_along(learner.actor, loss)
    losses = learner.update()
    assert float(losses["losses/policy_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float(losses["losses/entropy"]) == pytest.approx(-float(log_prob.mean().detach()), rel=1e-4)
    assert_near(learner.actor, expected)


def test_temperature_moves_towards_an_entropy_of_minus_one_for_each_action_dimension():
    broad, narrow = Learner(1.0), Learner(1.0)
    entropy = float(broad.update()["losses/entropy"])
    assert broad.log_temperature.item() == pytest.approx(
        -0.1 * (entropy + ACTION_DIM), rel=1e-4
    )  # d loss / d log alpha
    with torch.no_grad():
        narrow.actor.net[-1].bias[ACTION_DIM:] = -5  # a policy that is nearly deterministic
    narrow.update()
    assert broad.log_temperature.item() < 0 < narrow.log_temperature.item()


def test_a_given_temperature_stays():
    learner = Learner(0.2)
    assert float(learner.update(temperature=0.2)["losses/temperature"]) == pytest.approx(0.2)
    assert float(learner.log_temperature) == pytest.approx(math.log(0.2))


# ------------------------------------------------------------------------------------------------------ replay buffer


@pytest.mark.parametrize("num_envs, size, steps", [(1, 1000, 300), (1, 64, 300), (3, 90, 200), (3, 1000, 100)])
def test_replay_buffer_holds_the_true_newest_transitions(num_envs, size, steps):
    """Against a list of them; a row between two episodes is none, and the ring forgets the oldest first."""
    episodes = Episodes([Line() for _ in range(num_envs)], seed=1)
    buffer = ReplayBuffer(size, num_envs, 3, 2, "cpu")
    true = play_into(buffer, episodes, steps)
    held = rows_of(buffer.at(torch.from_numpy(np.flatnonzero(buffer.acted))))
    known = {row.tobytes(): n for n, row in enumerate(true)}
    found = sorted(known[row.tobytes()] for row in held)
    assert len(found) == len(set(found))
    for i in range(num_envs):  # of each environment the newest, without a gap
        mine = [n // num_envs for n in found if n % num_envs == i]
        assert mine == list(range(steps - len(mine), steps))
        assert len(mine) == steps or len(mine) > 0.7 * size / num_envs  # the last states of episodes take rows too
    drawn = rows_of(buffer.at(torch.from_numpy(buffer.draw_rows(500, np.random.default_rng(0)))))
    assert {row.tobytes() for row in drawn} <= {row.tobytes() for row in held}


def test_rows_are_drawn_uniformly():
    episodes, buffer = Episodes([Line(), Line(limit=3)], seed=1), ReplayBuffer(60, 2, 3, 2, "cpu")
    play_into(buffer, episodes, 200)
    rows = np.flatnonzero(buffer.acted)
    counts = np.bincount(buffer.draw_rows(100_000, np.random.default_rng(0)), minlength=60)[rows]
    expected = 100_000 / len(rows)
    assert counts.sum() == 100_000
    assert ((counts - expected) ** 2 / expected).sum() < len(rows) + 5 * math.sqrt(2 * len(rows))  # chi-square


@pytest.mark.parametrize("held_out", [False, True])
def test_distinct_rows_are_drawn_uniformly_among_those_held_out_or_not(held_out):
    episodes, buffer = Episodes([Line()], seed=1), ReplayBuffer(5000, 1, 3, 2, "cpu")
    play_into(buffer, episodes, 1000)
    rows, rng = np.flatnonzero(buffer.acted), np.random.default_rng(0)
    rows = rows[(rows // 100 % 10 == 9) == held_out]
    draws = [buffer.draw_distinct_rows(40, rng, held_out) for _ in range(2000)]
    assert all(len(np.unique(draw)) == 40 for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=5000)[rows]
    expected = 80_000 / len(rows)
    assert counts.sum() == 80_000
    assert ((counts - expected) ** 2 / expected).sum() < len(rows) + 5 * math.sqrt(2 * len(rows))  # chi-square
    assert np.array_equal(np.sort(buffer.draw_distinct_rows(10_000, rng, held_out)), rows)  # all there are


def test_a_time_limit_is_no_terminal_state():
    episodes, buffer = Episodes([Line()], seed=1), ReplayBuffer(1000, 1, 3, 2, "cpu")
    play_into(buffer, episodes, 300)
    batch = buffer.at(torch.from_numpy(np.flatnonzero(buffer.acted)))
    outside = batch.next_states[:, :2].abs().amax(-1) > 1
    assert torch.equal(batch.terminated.bool(), outside)
    assert (batch.next_states[:, 2] == 7).any() and outside.any()


@pytest.mark.parametrize("size", [64, 1000])
def test_a_saved_buffer_goes_on_where_it_was(size, tmp_path):
    def play(buffer, episodes, seed):
        rng = np.random.default_rng(seed)
        for _ in range(100):
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            next_state, reward, terminated, truncated = episodes.step(0, action)
            buffer.add_step(0, action, reward, terminated, next_state)
            if terminated or truncated:
                episodes.next_episode(0)
                buffer.next_row(0)
                buffer.add_state(0, episodes.states[0])

    episodes, buffer = Episodes([Line()], seed=1), ReplayBuffer(size, 1, 3, 2, "cpu")
    play_into(buffer, episodes, 100)
    torch.save({"buffer": buffer.state_dict(), "episodes": episodes.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True, mmap=True)
    other, others = ReplayBuffer(size, 1, 3, 2, "cpu"), Episodes([Line()], seed=1)
    other.load_state_dict(saved["buffer"])
    others.load_state_dict(saved["episodes"])
    play(buffer, episodes, 5)
    play(other, others, 5)
    rows = [b.draw_rows(300, np.random.default_rng(3)) for b in (buffer, other)]
    assert np.array_equal(*rows)
    assert np.array_equal(rows_of(buffer.at(torch.from_numpy(rows[0]))), rows_of(other.at(torch.from_numpy(rows[1]))))


def test_a_saved_buffer_is_as_small_as_what_it_holds(tmp_path):
    episodes, buffer = Episodes([Line()], seed=1), ReplayBuffer(1_000_000, 1, 3, 2, "cpu")
    play_into(buffer, episodes, 100)
    torch.save(buffer.state_dict(), tmp_path / "saved.pt")
    assert (tmp_path / "saved.pt").stat().st_size < 20_000


def test_a_million_steps_of_humanoid_take_what_the_docs_say():
    buffer = ReplayBuffer(1_000_000, 1, 348, 17, "cpu")
    tensors = [*buffer.columns.values(), torch.from_numpy(buffer.acted)]
    assert sum(tensor.nbytes for tensor in tensors) < 1.4 * 2**30
    assert sum(348 in column.shape for column in buffer.columns.values()) == 1  # one copy of each state


def test_the_backtracking_model_never_learns_from_what_is_held_out():
    episodes, buffer = Episodes([Line(), Line()], seed=1), ReplayBuffer(10_000, 2, 3, 2, "cpu")
    play_into(buffer, episodes, 3000)
    actor, critic = networks(state_dim=3, action_dim=2)
    for held_out in (False, True):
        rows = script.high_value_states(buffer, actor, critic, Args(), np.random.default_rng(0), held_out)[2]
        assert ((rows // 2 // 100 % 10 == 9) == held_out).all()
    assert 0.08 < np.mean(buffer.held_out(np.arange(2 * 3000))) < 0.12


# ------------------------------------------------------------------------------------------------------ episodes


def test_episodes_are_played_again_from_their_seed_and_actions():
    def steps(episodes, seed):
        rng, seen = np.random.default_rng(seed), []
        for i in itertools.islice(itertools.cycle(range(2)), 60):
            _, _, terminated, truncated = outcome = episodes.step(i, rng.uniform(-1, 1, 2).astype(np.float32))
            if terminated or truncated:
                outcome = (*outcome, episodes.next_episode(i))
            seen.append([*outcome[0].tolist(), *outcome[1:]])
        return seen

    episodes = Episodes([Line(), Line(limit=50)], seed=1)
    steps(episodes, 0)
    state = episodes.state_dict()
    other = Episodes([Line(), Line(limit=50)], seed=1)
    other.load_state_dict(state)
    assert np.array_equal(episodes.states, other.states)
    assert steps(episodes, 1) == steps(other, 1)


def test_mujoco_is_exact_in_the_middle_of_an_episode():
    envs = [gym.make("Hopper-v5") for _ in range(2)]
    episodes, other = Episodes(envs[:1], seed=1), Episodes(envs[1:], seed=1)
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (20, 3)).astype(np.float32)
    for action in actions[:12]:
        episodes.step(0, action)
    other.load_state_dict(episodes.state_dict())
    for action in actions[12:]:
        assert np.array_equal(episodes.step(0, action)[0], other.step(0, action)[0])


def test_every_episode_starts_elsewhere_and_every_seed_too():
    starts = []
    for seed in (1, 2):
        episodes = Episodes([Line(), Line()], seed=seed)
        for _ in range(3):
            starts += [tuple(state) for state in episodes.states]
            episodes.next_episode(0)
            episodes.next_episode(1)
    assert len(set(starts)) == 12


def test_an_environment_that_cannot_be_played_again_is_noticed():
    class Restless(Line):
        def step(self, action):
            return super().step(action + np.random.default_rng().normal())

    episodes = Episodes([Restless()], seed=1)
    episodes.step(0, np.zeros(2, dtype=np.float32))
    with pytest.raises(ValueError, match="did something else"):
        Episodes([Restless()], seed=1).load_state_dict(episodes.state_dict())


def test_a_run_in_several_environments_is_resumed_exactly(tmp_path):
    """In the middle of episodes, after the ring has wrapped around."""
    small = {"env_id": "Reacher-v5", "num_envs": 3, "buffer_size": 300, "hidden": 16, "batch_size": 16}
    small |= {"learning_starts": 100, "recall_every": 50, "recall_tuples": 100, "backtracking_updates": 2}
    small |= {"eval_every": 200, "eval_episodes": 1}
    checkpoints = []
    for name, halves in (("whole", [900]), ("halves", [500, 900])):
        for steps in halves:
            arguments = {"run_dir": tmp_path / name, **small} if steps == halves[0] else {"resume": tmp_path / name}
            script.main(Args(total_timesteps=steps, **arguments))
        checkpoints.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
    torch.use_deterministic_algorithms(False)
    whole, halves = checkpoints
    assert whole.pop("rngs") == halves.pop("rngs")
    del whole["event_sizes"], halves["event_sizes"]  # the names of the event files hold the time
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ environments


def test_actions_are_rescaled_to_the_bounds_of_the_environment():
    env = script.make_env(Args(env_id="Humanoid-v5"))
    env.reset(seed=1)
    env.step(np.ones(17, dtype=np.float32))
    np.testing.assert_allclose(env.unwrapped.data.ctrl, 0.4, rtol=1e-6)


def test_contact_forces_can_be_left_out():
    sizes = [script.make_env(Args(env_id="Ant-v5", contact_forces=c)).observation_space.shape for c in (True, False)]
    assert sizes == [(105,), (27,)]


@pytest.mark.parametrize("env_id, word", [("CartPole-v1", "actions"), ("FrozenLake-v1", "observations")])
def test_refuses_discrete_spaces_in_words(env_id, word, capsys):
    with pytest.raises(SystemExit) as exit:
        script.make_env(Args(env_id=env_id))
    assert exit.value.code == 2
    assert f"a vector of {word}" in capsys.readouterr().err


@pytest.mark.parametrize("bound, dtype", [(np.inf, np.float32), (1, np.int64)])
def test_refuses_unbounded_and_whole_actions_in_words(bound, dtype, capsys):
    class Other(Line):
        action_space = gym.spaces.Box(-bound, bound, (2,), dtype)

    gym.register(f"Other{dtype.__name__}-v0", Other)
    with pytest.raises(SystemExit) as exit:
        script.make_env(Args(env_id=f"Other{dtype.__name__}-v0"))
    assert exit.value.code == 2
    assert "bounded actions that are real numbers" in capsys.readouterr().err


def test_plays_whole_episodes_of_the_greedy_policy():
    actor, _ = networks(state_dim=3, action_dim=2)
    args, limits = Args(seed=5), (7, 3, 50)
    returns, lengths = script.play([Line(limit) for limit in limits], actor, args)
    for i, limit in enumerate(limits):
        env = Line(limit)
        state, total, length, done = env.reset(seed=5 + i)[0].astype(np.float32), 0.0, 0, False
        while not done:
            action = actor(torch.from_numpy(state))[0].tanh().detach().numpy()
            state, reward, terminated, truncated, _ = env.step(action)
            state, total, length, done = state.astype(np.float32), total + reward, length + 1, terminated or truncated
        assert (returns[i], lengths[i]) == (pytest.approx(total, rel=1e-4), length)


# ------------------------------------------------------------------------------------------------------ recall traces


def fitted(states, actions, next_states, seed=0):
    torch.manual_seed(seed)
    model = BacktrackingModel(states.shape[1], actions.shape[1])
    model.normalise_by(Batch(states, actions, None, None, next_states))
    return model


def test_log_prob_against_torch_distributions():
    """Eq. (1) of normalised quantities: variance 1 for actions, a learned one for changes of state."""
    batch = random_batch(200)
    model = fitted(batch.states, batch.actions, batch.next_states)
    of_actions, of_changes = model.log_prob(batch.states, batch.actions, batch.next_states)

    def normal(x):
        return (x - x.mean(0)) / x.std(0)

    changes, next_states, actions = (
        normal(batch.states - batch.next_states),
        normal(batch.next_states),
        normal(batch.actions),
    )
    expected = Independent(Normal(model.action_predictor(next_states), 1.0), 1).log_prob(actions)
    torch.testing.assert_close(of_actions, expected, rtol=1e-4, atol=1e-4)
    mean, log_std = model.predict_change(batch.actions, batch.next_states)
    torch.testing.assert_close(mean, model.state_predictor(torch.cat((next_states, actions), -1))[:, :STATE_DIM])
    expected = Independent(Normal(mean, log_std.exp()), 1).log_prob(changes)
    torch.testing.assert_close(of_changes, expected, rtol=1e-4, atol=1e-4)


def test_architecture_is_that_of_appendix_c():
    model = BacktrackingModel(17, 6)
    for predictor, activation in ((model.action_predictor, nn.Tanh), (model.state_predictor, nn.ReLU)):
        layers = [layer for layer in predictor if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in layers[:-1]] == [128, 128]
        assert all(isinstance(layer, activation) for layer in predictor if not isinstance(layer, nn.Linear))


@pytest.mark.parametrize("output", [-1e6, -10.0, 0.0, 10.0, 1e6])
def test_the_learned_variance_is_bounded(output):
    batch = random_batch(50)
    model = fitted(batch.states, batch.actions, batch.next_states)
    with torch.no_grad():
        model.state_predictor[-1].bias[STATE_DIM:] = output
    log_std = model.predict_change(batch.actions, batch.next_states)[1]
    assert -5.01 <= float(log_std.min()) <= float(log_std.max()) <= 1.01


@pytest.mark.parametrize("value", [0.0, 7.3])
def test_what_never_changes_stays_as_it_is_in_traces(value):
    batch = random_batch(50)
    states, next_states = batch.states.clone(), batch.next_states.clone()
    states[:, 0], next_states[:, 0] = value, value  # as some of the contact forces of an ant
    model = fitted(states, batch.actions, next_states)
    assert all(part.isfinite().all() for part in model.log_prob(states, batch.actions, next_states))
    traces = script.recall_traces(model, next_states, 5, Args(), np.random.default_rng(0))
    torch.testing.assert_close(traces[0][..., 0], torch.full((5, 50), value), rtol=0, atol=1e-4)


def test_one_update_is_a_step_along_the_gradient_of_the_log_likelihood():
    """Eq. (2)"""
    batch = random_batch(64)
    model = fitted(batch.states, batch.actions, batch.next_states)
    batch = Batch(*(column[[3, 3, 17, 40]] for column in batch))
    expected = copy.deepcopy(model)
    parts = expected.log_prob(batch.states, batch.actions, batch.next_states)
    loss = -sum(parts).mean()
    for weight, gradient in zip(
        expected.parameters(), torch.autograd.grad(loss, [*expected.parameters()]), strict=True
    ):
        weight.data -= 0.1 * gradient
    losses = script.update_backtracking_model(model, sgd(model.parameters()), batch)
    assert float(losses["recall/backtracking_loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(losses["recall/action_nll"]) == pytest.approx(-float(parts[0].mean()), rel=1e-5)
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def linear():
    """A stable linear system s' = M s + B a, its random transitions, and a model that has learned from them."""
    rotation = torch.tensor([[0.9, -0.3, 0.0], [0.3, 0.9, 0.0], [0.0, 0.2, 0.9]])
    pushes = torch.tensor([[0.3, 0.0], [0.0, 0.3], [0.2, -0.2]])
    states, actions = [torch.zeros(64, 3)], [randn(64, 2, seed=t).clamp(-0.95, 0.95) for t in range(60)]
    for action in actions:
        states.append(states[-1] @ rotation.T + action @ pushes.T)
    states, actions = torch.stack(states[20:]), torch.stack(actions[20:])
    batch = Batch(states[:-1].flatten(0, 1), actions.flatten(0, 1), None, None, states[1:].flatten(0, 1))
    model, rng = fitted(batch.states, batch.actions, batch.next_states), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 1500)  # to an end without a jolt
    for _ in range(1500):
        rows = torch.from_numpy(rng.integers(len(batch.states), size=256))
        columns = [None if column is None else column[rows] for column in batch]
        script.update_backtracking_model(model, optimizer, Batch(*columns))
        schedule.step()
    return rotation, pushes, batch, model


def test_traces_reach_back_along_a_system_with_known_linear_dynamics(linear):
    """Each imagined predecessor is M^-1 (s' - B a), and the actions of a trace lead forward to its high-value state."""
    rotation, pushes, batch, model = linear
    starts = batch.next_states[:200]
    states, actions, in_trace = script.recall_traces(model, starts, 4, Args(state_noise=0.0), np.random.default_rng(0))
    assert states.shape == (4, 200, 3) and actions.shape == (4, 200, 2)
    assert in_trace[0].float().mean() > 0.9
    next_states = torch.cat((starts[None], states[:-1]))
    exact = (next_states - actions @ pushes.T) @ torch.linalg.inv(rotation).T
    errors = ((states - exact) / batch.states.std(0))[in_trace].abs()
    assert errors.mean() < 0.02
    assert ((states - next_states) / batch.states.std(0))[in_trace].abs().mean() > 4 * errors.mean()
    whole = in_trace.all(0)
    forward = states[-1]
    for action in actions.flip(0):
        forward = forward @ rotation.T + action @ pushes.T
    assert whole.sum() > 100
    assert ((forward - starts) / batch.states.std(0))[whole].abs().mean() < 0.05


def test_noise_of_a_trace_is_a_share_of_the_models_own(linear):
    _, _, batch, model = linear
    starts = batch.next_states[:1].expand(20_000, 3)
    args, rng = Args(action_noise=0.3, state_noise=0.0), np.random.default_rng(0)
    _, actions, _ = script.recall_traces(model, starts, 1, args, rng)
    mean = model.action_mean + model.action_std * model.predict_action(starts[:1])
    inside = (mean.abs() + 4 * 0.3 * model.action_std < script.LARGEST_ACTION).squeeze(0)  # not clipped
    assert actions.abs().max() <= script.LARGEST_ACTION
    torch.testing.assert_close(actions[0].mean(0)[inside], mean[0][inside], atol=0.01, rtol=0.02)
    states = script.recall_traces(model, starts, 1, Args(action_noise=0.0, state_noise=0.5), rng)[0][0]
    action = mean.clamp(-script.LARGEST_ACTION, script.LARGEST_ACTION)
    change, log_std = model.predict_change(action, starts[:1])
    expected = starts[:1] + model.change_mean + model.change_std * change
    spread = 0.5 * log_std.exp() * model.change_std
    torch.testing.assert_close(states.mean(0), expected[0], atol=0.05 * float(spread.max()), rtol=0.01)
    torch.testing.assert_close(states.std(0), spread[0], atol=0.0, rtol=0.05)


def test_a_trace_ends_where_it_leaves_the_data_and_its_numbers_stay_finite(linear):
    _, _, batch, model = linear
    wild = copy.deepcopy(model)
    with torch.no_grad():
        for weight in wild.state_predictor.parameters():
            weight *= 1.5
    args, rng = Args(trace_limit=2.0), np.random.default_rng(0)
    states, actions, in_trace = script.recall_traces(wild, batch.next_states[:200], 50, args, rng)
    inside = ((states - batch.next_states.mean(0)).abs() <= 2 * batch.next_states.std(0)).all(-1)
    for i in range(200):
        left = int(inside[:, i].long().argmin()) if not inside[:, i].all() else 50
        assert in_trace[:left, i].all() and not in_trace[left:, i].any()
    assert 0 < in_trace.float().mean() < 0.7
    with torch.no_grad():
        for weight in wild.state_predictor.parameters():
            weight *= 10
    states, actions, _ = script.recall_traces(wild, batch.next_states[:200], 50, args, rng)
    assert states.isfinite().all() and actions.isfinite().all()


def test_start_states_are_the_most_valuable_and_never_terminal():
    episodes, buffer = Episodes([Line()], seed=1), ReplayBuffer(1000, 1, 3, 2, "cpu")
    play_into(buffer, episodes, 500)
    actor, critic = networks(state_dim=3, action_dim=2)
    args, rng = Args(recall_tuples=400, top_fraction=0.25), np.random.default_rng(0)
    tuples, values, rows = script.high_value_states(buffer, actor, critic, args, rng, held_out=False)
    drawn = buffer.at(torch.from_numpy(buffer.draw_distinct_rows(400, np.random.default_rng(0), held_out=False)))
    value = critic(drawn.next_states, actor(drawn.next_states)[0].tanh()).min(0)[0]
    best = sorted(value[drawn.terminated == 0].tolist(), reverse=True)[:100]
    assert values.tolist() == pytest.approx(best)
    torch.testing.assert_close(script.state_values(actor, critic, tuples.next_states), values)
    assert np.array_equal(rows_of(buffer.at(torch.from_numpy(rows))), rows_of(tuples))
    assert not tuples.terminated.any() and drawn.terminated.any()
    everything = Args(recall_tuples=400, top_fraction=1.0)
    tuples, values, _ = script.high_value_states(buffer, actor, critic, everything, rng, held_out=False)
    assert len(values) == (drawn.terminated == 0).sum() and not tuples.terminated.any() and values.isfinite().all()


def test_imitation_raises_the_log_probability_of_the_traces():
    """Eq. (3)"""
    actor, _ = networks()
    states, actions = randn(50, STATE_DIM), randn(50, ACTION_DIM, seed=1).tanh() * 0.9
    expected = copy.deepcopy(actor)
    loss = -tanh_gaussian(expected, states).log_prob(actions).mean()
    for weight, gradient in zip(
        expected.parameters(), torch.autograd.grad(loss, [*expected.parameters()]), strict=True
    ):
        weight.data -= 0.01 * gradient
    before = actor.log_prob_of_clipped(states, actions).mean()
    losses = script.imitate(actor, sgd(actor.parameters(), 0.01), states, actions)
    assert float(losses["recall/imitation_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    for weight, other in zip(actor.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6)
    assert actor.log_prob_of_clipped(states, actions).mean() > before


def test_where_no_trace_stayed_inside_the_data_the_policy_stands_still():
    actor, _ = networks()
    optimizer = torch.optim.Adam(actor.parameters())
    script.imitate(actor, optimizer, randn(4, STATE_DIM), randn(4, ACTION_DIM).tanh())  # momentum
    before = copies(actor)
    assert script.imitate(actor, optimizer, randn(0, STATE_DIM), randn(0, ACTION_DIM)) == {}
    assert all(torch.equal(*pair) for pair in zip(actor.parameters(), before, strict=True))


def test_traces_are_compared_with_what_really_led_to_their_high_value_states():
    episodes, buffer = Episodes([Line(limit=40, speed=0.03)], seed=1), ReplayBuffer(5000, 1, 3, 2, "cpu")
    play_into(buffer, episodes, 2000)
    actor, critic = networks(state_dim=3, action_dim=2)
    batch = buffer.at(torch.from_numpy(np.flatnonzero(buffer.acted)))
    model = fitted(batch.states, batch.actions, batch.next_states)
    args = Args(top_fraction=1.0, trace_limit=1.5)
    compared = script.compare_traces(model, buffer, actor, critic, 6, args, np.random.default_rng(0))
    usable = buffer.acted & (np.arange(5000) // 100 % 10 == 9)  # a way back ends where the model has learned, too
    expected = [np.all([np.roll(usable, back) for back in range(n)], axis=0).sum() for n in range(1, 7)]
    assert compared.known.sum(-1).tolist() == expected
    later = torch.cat((compared.starts[None], compared.real[:-1]))
    for step in range(6):
        known = compared.known[step]
        # the third number counts the steps of an episode, so it tells whether each is the predecessor of the last
        assert torch.equal(compared.real[step, known, 2], later[step, known, 2] - 1)
    assert compared.known[0].all() and not compared.known[-1].all()
    assert not (compared.known[1:] & ~compared.known[:-1]).any()
    assert not compared.in_trace[0].all()
    errors = script.trace_errors(model, compared)
    counted = compared.known[0] & compared.in_trace[0]
    distance = ((compared.imagined[0] - compared.real[0]) / model.state_std).square().mean(-1).sqrt()
    assert float(errors[0]) == pytest.approx(float(distance[counted].mean()), rel=1e-5)
    perfect = compared._replace(imagined=compared.real, in_trace=torch.ones_like(compared.in_trace))
    assert script.trace_errors(model, perfect).nan_to_num().abs().max() == 0  # nan: none known


def test_traces_are_drawn_in_the_plane_in_which_the_real_ones_vary_most():
    """Wherever they are: three numbers with deviations of 1, 3 and 2, of which the first is far from the mean."""
    real = randn(4, 50, 3) * torch.tensor([1.0, 3.0, 2.0]) + torch.tensor([100.0, 0.0, 0.0])
    model, there = BacktrackingModel(3, 2), torch.ones(4, 50, dtype=torch.bool)
    figure = script.draw_traces(model, script.Comparison(real[0], real, there, real, real, there))
    drawn = np.concatenate([line.get_xydata() for line in figure.axes[0].lines if line.get_color() == "k"])
    deviations = real[:, :8].reshape(-1, 3).std(0)
    assert drawn.std(0) == pytest.approx([float(deviations[1]), float(deviations[2])], rel=0.15)


def test_advantages_are_what_an_action_gains_over_the_greedy_one():
    (actor, critic), states, actions = networks(), randn(50, STATE_DIM), randn(50, ACTION_DIM, seed=1).tanh()
    with torch.no_grad():
        greedy = actor(states)[0].tanh()
        expected = critic(states, actions).min(0)[0] - critic(states, greedy).min(0)[0]
    torch.testing.assert_close(script.advantages(actor, critic, states, actions), expected)
    assert script.advantages(actor, critic, states, greedy).abs().max() < 1e-5


@pytest.mark.parametrize(
    "env_id, length", [("Ant-v5", 50), ("Humanoid-v5", 50), ("HalfCheetah-v5", 20), ("Hopper-v5", 20)]
)
def test_traces_are_as_long_as_in_table_2(env_id, length):
    assert script.default_trace_length(env_id) == length


def test_traces_are_split_into_the_pairs_of_each_imitation_update():
    states, actions = torch.arange(24.0).view(3, 8, 1), -torch.arange(24.0).view(3, 8, 1)
    in_trace = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    parts = script.split_traces(states, actions, in_trace, 2)
    assert len(parts) == 4
    for n, (some_states, some_actions) in enumerate(parts):
        expected = [float(states[t, i]) for t in range(3) for i in (2 * n, 2 * n + 1) if in_trace[t, i]]
        assert some_states.flatten().tolist() == expected
        assert torch.equal(some_actions, -some_states)


@pytest.mark.parametrize("recall_every, said", [(100, False), (101, True)])
def test_a_run_in_which_recall_never_began_says_so(recall_every, said, tmp_path, capsys):
    small = {"env_id": "Reacher-v5", "hidden": 8, "batch_size": 8, "eval_episodes": 1, "recall_updates": 1}
    small |= {"total_timesteps": 200, "learning_starts": 100, "recall_every": recall_every, "backtracking_updates": 1}
    script.main(Args(run_dir=tmp_path / "run", **small))
    assert ("no recall phase: fewer than --recall-every updates" in capsys.readouterr().err) == said


def test_playing_takes_no_replay_buffer_and_no_compiler(tmp_path, monkeypatch):
    small = {"env_id": "Reacher-v5", "hidden": 8, "total_timesteps": 20, "eval_episodes": 1, "recall": "none"}
    script.main(Args(run_dir=tmp_path / "run", buffer_size=5000, **small))
    arguments = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(arguments | {"compile": True}))
    made, buffer = [], ReplayBuffer
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(script, "ReplayBuffer", lambda size, *others: made.append(size) or buffer(size, *others))
    script.main(Args(evaluate=tmp_path / "run", eval_episodes=1))
    assert sum(made) <= 10


def test_refuses_to_compile_without_a_compiler(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(SystemExit) as exit:
        script.main(Args(run_dir=tmp_path / "run", compile=True))
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: --compile does not work here: no compiler\n"
    assert not (tmp_path / "run").exists()


def test_what_the_training_loop_remembers_learns_from_and_recalls(tmp_path, monkeypatch):
    """B holds what happened, the model gets the most valuable tuples, and traces start from the best of them."""
    gym.register("Line-v0", lambda **_: Line(speed=0.2))
    happened, phases, step = [], [], Episodes.step

    def recorded_step(episodes, i, action):
        state = episodes.states[i].copy()
        next_state, reward, terminated, truncated = step(episodes, i, action)
        happened.append(np.concatenate((state, action, [reward, terminated], next_state)).astype(np.float32))
        return next_state, reward, terminated, truncated

    def recorded_tuples(*args, held_out, high_value_states=script.high_value_states):
        found = high_value_states(*args, held_out=held_out)
        if not held_out:
            phases.append({"tuples": found[0], "values": found[1], "batches": []})
        return found

    def recorded_fit(model, optimizer, batch, fit=script.update_backtracking_model):
        phases[-1]["batches"].append(rows_of(batch))
        return fit(model, optimizer, batch)

    def recorded_traces(model, starts, *args, recall_traces=script.recall_traces):
        if phases and "starts" not in phases[-1]:
            phases[-1] |= {"starts": starts, "mean": model.state_mean.clone()}
        return recall_traces(model, starts, *args)

    monkeypatch.setattr(Episodes, "step", recorded_step)
    monkeypatch.setattr(script, "high_value_states", recorded_tuples)
    monkeypatch.setattr(script, "update_backtracking_model", recorded_fit)
    monkeypatch.setattr(script, "recall_traces", recorded_traces)
    monkeypatch.setattr(script, "act", lambda actor, states, noise: torch.full((len(states), 2), 0.5))
    small = {"env_id": "Line-v0", "hidden": 8, "batch_size": 8, "learning_starts": 300, "eval_every": 10_000}
    small |= {"num_envs": 2, "eval_episodes": 1, "recall_every": 50, "num_traces": 5, "recall_updates": 4}
    script.main(Args(run_dir=tmp_path / "run", total_timesteps=600, backtracking_updates=8, **small))
    torch.use_deterministic_algorithms(False)

    buffer, saved = ReplayBuffer(1_000_000, 2, 3, 2, "cpu"), torch.load(tmp_path / "run" / "checkpoint.pt")["buffer"]
    buffer.load_state_dict(saved)
    held = rows_of(buffer.at(torch.from_numpy(np.flatnonzero(buffer.acted))))
    assert sorted(row.tobytes() for row in held) == sorted(row.tobytes() for row in happened)
    actions = np.stack(happened)[:, 3:5]
    assert (actions[:300] != 0.5).all() and (actions[300:] == 0.5).all()  # random ones, then the policy's
    terminated = np.stack(happened)[:, 6]
    assert 20 < terminated.sum() < 100  # the other episodes end by their time limit
    assert len(phases) == 6
    for phase in phases:
        best = phase["tuples"].next_states[:20]
        assert torch.equal(phase["starts"].unique(dim=0), best.unique(dim=0))
        assert not torch.equal(phase["starts"][:5], best[:5])  # the five of the first update are any of the best
        torch.testing.assert_close(phase["mean"], phase["tuples"].next_states.mean(0))
        assert [len(batch) for batch in phase["batches"]] == [256] * 8
        learned = np.unique(np.concatenate(phase["batches"]), axis=0)  # all the most valuable tuples, and no others
        assert np.array_equal(learned, np.unique(rows_of(phase["tuples"]), axis=0))


@pytest.mark.parametrize("recall_every, recall_updates", [(10, 10), (10, 3), (7, 5), (10, 25)])
def test_imitation_updates_are_spread_evenly_between_recall_phases(recall_every, recall_updates, tmp_path, monkeypatch):
    done = []  # the number of real updates before each imitation update
    real, imitate, update = [], script.imitate, script.update_actor_critic
    monkeypatch.setattr(script, "update_actor_critic", lambda *args: (real.append(1), update(*args))[1])
    monkeypatch.setattr(script, "imitate", lambda *args: (done.append(len(real)), imitate(*args))[1])
    small = {"env_id": "Reacher-v5", "hidden": 8, "batch_size": 8, "learning_starts": 50, "recall_tuples": 100}
    small |= {"backtracking_updates": 1, "eval_episodes": 1, "eval_every": 1000, "trace_length": 2}
    small |= {"recall_every": recall_every, "recall_updates": recall_updates}
    script.main(Args(run_dir=tmp_path / "run", total_timesteps=50 + 3 * recall_every - 1, **small))
    torch.use_deterministic_algorithms(False)
    counts = np.bincount(done, minlength=3 * recall_every)[recall_every : 3 * recall_every]
    assert counts.sum() == 2 * recall_updates == len(done)  # the first phase comes after recall_every real updates
    assert counts.max() - counts.min() <= 1
