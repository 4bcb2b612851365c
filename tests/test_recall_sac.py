"""The mathematics of recall_sac.py against torch.distributions, closed forms, enumeration and real dynamics."""

import copy
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import recall_sac as script
from recall_sac import Actor, Args, BacktrackingModel, Batch, Critic, ReplayBuffer

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


def random_transitions(count, seed=0):
    """Of a Line with random actions, in the order of Batch: arrays (count, ...), without the resets."""
    env, rng, rows = Line(), np.random.default_rng(seed), []
    state, _ = env.reset(seed=seed)
    while len(rows) < count:
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        next_state, reward, terminated, truncated, _ = env.step(action)
        rows.append((state.astype(np.float32), action, reward, terminated, next_state.astype(np.float32)))
        state = env.reset()[0] if terminated or truncated else next_state
    return rows


def filled_buffer(capacity, count):
    buffer = ReplayBuffer(capacity, 3, 2, "cpu")
    for row in random_transitions(count):
        buffer.add(*row)
    return buffer


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
    states = randn(50, STATE_DIM)
    mean, log_std = actor(states)
    torch.manual_seed(3)
    noise = torch.randn(50, ACTION_DIM)
    torch.manual_seed(3)
    actions, log_prob = actor.sample(states)
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
        actions = actor.sample(states)[0].clamp(-0.98, 0.98)
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
        for weight, bias in zip(critic.weights, critic.biases, strict=True):
            x = x @ weight[twin] + bias[twin]
            x = x.relu() if weight is not critic.weights[-1] else x
        torch.testing.assert_close(values[twin], x.squeeze(-1))
    assert not torch.equal(critic.weights[0][0], critic.weights[0][1])
    bound = 1 / math.sqrt(STATE_DIM + ACTION_DIM)  # of torch's own linear layers
    assert 0.8 * bound < critic.weights[0].abs().max() <= bound


# ------------------------------------------------------------------------------------------------------ actor-critic


class Learner:
    """Small networks, a batch and noise, and one update of theirs by plain gradient descent."""

    def __init__(self, temperature=0.2, adapted=True):
        (self.actor, self.critic), self.target_critic = networks(), networks(1)[1].requires_grad_(False)
        self.actor.log_temperature = nn.Parameter(torch.tensor(temperature).log(), requires_grad=adapted)
        self.batch = random_batch()
        torch.manual_seed(9)
        self.noise = torch.randn(16, ACTION_DIM), torch.randn(16, ACTION_DIM)  # what an update draws

    def update(self, **args):
        optimizer = sgd([*self.actor.parameters(), *self.critic.parameters()])
        torch.manual_seed(9)
        nets = self.actor, self.critic, self.target_critic
        return script.update_actor_critic(*nets, optimizer, self.batch, Args(**args))

    def sample(self, states, noise):
        mean, log_std = self.actor(states)
        actions = (mean + log_std.exp() * noise).tanh()
        return actions, tanh_gaussian(self.actor, states).log_prob(actions)

    def targets(self, gamma, reward_scale):
        next_actions, log_prob = self.sample(self.batch.next_states, self.noise[0])
        soft = self.target_critic(self.batch.next_states, next_actions).min(0)[0] - 0.2 * log_prob
        return torch.where(self.batch.terminated == 1, 0.0, gamma * soft) + reward_scale * self.batch.rewards


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
    targets = learner.targets(0.9, reward_scale).detach()
    loss = sum(nn.functional.mse_loss(q, targets) for q in critic(batch.states, batch.actions))
    expected = step_along(critic, loss)
    torch.manual_seed(9)
    args = Args(gamma=0.9, reward_scale=reward_scale)
    torch.testing.assert_close(
        script.critic_targets(learner.actor, learner.target_critic, batch, args), targets, rtol=1e-4, atol=1e-5
    )
    losses = learner.update(gamma=0.9, tau=0.25, reward_scale=reward_scale)
    assert float(losses["losses/value_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_near(critic, expected)  # and so the actor's loss has moved none of their weights
    moved = [0.75 * old + 0.25 * new for old, new in zip(targets_before, copies(critic), strict=True)]
    assert_near(learner.target_critic, moved)


def test_actor_steps_along_the_gradient_of_its_loss():
    learner = Learner()
    actions, log_prob = learner.sample(learner.batch.states, learner.noise[1])
    loss = (0.2 * log_prob - learner.critic(learner.batch.states, actions).min(0)[0]).mean()
    expected = step_along(learner.actor.net, loss)
    losses = learner.update()
    assert float(losses["losses/policy_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float(losses["losses/entropy"]) == pytest.approx(-float(log_prob.mean().detach()), rel=1e-4)
    assert_near(learner.actor.net, expected)


def test_temperature_moves_towards_an_entropy_of_minus_one_for_each_action_dimension():
    broad, narrow = Learner(1.0), Learner(1.0)
    entropy = float(broad.update()["losses/entropy"])
    assert broad.actor.log_temperature.item() == pytest.approx(
        -0.1 * (entropy + ACTION_DIM), rel=1e-4
    )  # d loss / d log alpha
    with torch.no_grad():
        narrow.actor.net[-1].bias[ACTION_DIM:] = -5  # a policy that is nearly deterministic
    narrow.update()
    assert broad.actor.log_temperature.item() < 0 < narrow.actor.log_temperature.item()


def test_a_given_temperature_stays():
    learner = Learner(0.2, adapted=False)
    assert float(learner.update(temperature=0.2)["losses/temperature"]) == pytest.approx(0.2)
    assert float(learner.actor.log_temperature) == pytest.approx(math.log(0.2))
    given, adapted = Actor(3, 2, 8, 0.2), Actor(3, 2, 8)
    assert float(given.log_temperature) == pytest.approx(math.log(0.2)) and not given.log_temperature.requires_grad
    assert adapted.log_temperature.item() == 0 and adapted.log_temperature.requires_grad


# ------------------------------------------------------------------------------------------------------ replay buffer


@pytest.mark.parametrize("capacity, count", [(1000, 300), (64, 300), (64, 64), (1, 5)])
def test_replay_buffer_holds_the_newest_transitions(capacity, count):
    buffer, true = filled_buffer(capacity, count), random_transitions(count)
    held = {row.tobytes() for row in rows_of(buffer.sample(20 * capacity))}
    newest = [np.concatenate([np.ravel(part) for part in row]).astype(np.float32) for row in true][-capacity:]
    assert held == {row.tobytes() for row in newest}


def test_transitions_are_drawn_uniformly():
    buffer = filled_buffer(60, 200)
    rows = [row.tobytes() for row in rows_of(buffer.sample(100_000))]
    counts = np.array([rows.count(row) for row in set(rows)])
    assert len(counts) == 60 and counts.sum() == 100_000
    expected = 100_000 / 60
    assert ((counts - expected) ** 2 / expected).sum() < 60 + 5 * math.sqrt(2 * 60)  # chi-square


@pytest.mark.parametrize("capacity", [64, 1000])
def test_a_saved_buffer_goes_on_where_it_was(capacity, tmp_path):
    buffer, other = filled_buffer(capacity, 100), ReplayBuffer(capacity, 3, 2, "cpu")
    torch.save(buffer.state_dict(), tmp_path / "saved.pt")
    other.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    drawn = []
    for part in (buffer, other):
        for row in random_transitions(30, seed=5):
            part.add(*row)
        torch.manual_seed(3)
        drawn.append(rows_of(part.sample(300)))
    assert np.array_equal(*drawn)


def test_a_saved_buffer_is_as_small_as_what_it_holds(tmp_path):
    torch.save(filled_buffer(1_000_000, 100).state_dict(), tmp_path / "saved.pt")
    assert (tmp_path / "saved.pt").stat().st_size < 20_000


# ------------------------------------------------------------------------------------------------------ environments


@pytest.fixture
def registered():
    """Registers an environment under a name of its own."""
    before = dict(gym.registry)

    def register(name, environment, max_episode_steps=7):
        gym.register(name, environment, max_episode_steps=max_episode_steps)
        return name

    yield register
    gym.registry.clear()
    gym.registry.update(before)


def small(env_id, **changes):
    """Arguments of a run of a second."""
    arguments = {"env_id": env_id, "hidden": 8, "batch_size": 8, "learning_starts": 60, "recall_tuples": 50}
    arguments |= {
        "recall_every": 20,
        "recall_updates": 5,
        "backtracking_updates": 2,
        "num_traces": 4,
        "trace_length": 3,
    }
    return Args(**arguments | {"total_timesteps": 150, "eval_episodes": 1, "eval_every": 50} | changes)


@pytest.mark.parametrize("bounds", [(-1.57, 1.57), (0.2, 0.7), (-0.1, 1e-3), (-3e8, 5e8)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_action_lies_in_the_action_space(bounds, dtype, registered):
    """Rounding alone would leave it: 1.57 becomes 1.5700002."""
    seen = []

    class Strict(Line):
        action_space = gym.spaces.Box(*bounds, (2,), dtype)

        def step(self, action):
            assert self.action_space.contains(action), action
            seen.append(action)
            return super().step(0 * action)

    env = script.make_env(Args(env_id=registered("Strict-v0", Strict, 10**6)))
    env.reset(seed=1)
    for number in (-1.0, 1.0, np.nextafter(np.float32(1), np.float32(0)), 0.0, 0.3):
        env.step(np.full(2, number, dtype=np.float32))
    space = Strict.action_space
    width = float(space.high[0]) - float(space.low[0])
    expected = [space.low, space.high, space.high, (space.low.astype(float) + space.high) / 2]
    np.testing.assert_allclose(seen[:4], expected, rtol=0, atol=1e-6 * width)


def test_actions_are_rescaled_to_the_bounds_of_the_environment():
    env = script.make_env(Args(env_id="Humanoid-v5"))
    env.reset(seed=1)
    env.step(np.ones(17, dtype=np.float32))
    np.testing.assert_allclose(env.unwrapped.data.ctrl, 0.4, rtol=1e-6)


def test_contact_forces_can_be_left_out():
    sizes = [script.make_env(Args(env_id="Ant-v5", contact_forces=c)).observation_space.shape for c in (True, False)]
    assert sizes == [(105,), (27,)]


def refused(args, *words):
    """Before there is a folder, in one line that holds these words."""
    with pytest.raises(script.UsageError) as caught:
        script.main(args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message


def test_refuses_what_no_run_could_work_with(registered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad_actions = {"Infinite": (-np.inf, np.inf), "Narrow": (0.5, 0.5), "Wide": (-3.4e38, 3.4e38)}
    for name, bounds in bad_actions.items():
        other = type(name, (Line,), {"action_space": gym.spaces.Box(*bounds, (2,), np.float32)})
        refused(small(registered(f"{name}-v0", other)), f"--env-id {name}-v0", "bounded, continuous actions")
    whole = type("Whole", (Line,), {"action_space": gym.spaces.Box(-1, 1, (2,), np.int64)})
    refused(small(registered("Whole-v0", whole)), "--env-id Whole-v0", "bounded, continuous actions")
    for name in ("CartPole-v1", "FrozenLake-v1"):
        refused(small(name), f"--env-id {name}", "Discrete")
    for name in ("NoSuchMaze-v0", "no:such-v0", "nonsense v0", ""):
        refused(small(name), "--env-id")
    refused(small("Reacher-v5", contact_forces=False), "--no-contact-forces")
    refused(small("Reacher-v5", device="abacus"), "--device abacus")
    if not torch.cuda.is_available():
        refused(small("Reacher-v5", device="cuda"), "--device cuda")
    longer = type("Longer", (Line,), {"reset": lambda self, **_: (np.zeros(4), {})})
    refused(small(registered("Longer-v0", longer)), "--env-id Longer-v0", "cannot reshape")
    two = type("Two", (Line,), {"step": lambda self, action: (np.zeros(3), np.zeros(2), False, False, {})})
    refused(small(registered("Two-v0", two)), "--env-id Two-v0")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_what_is_not_finite_never_reaches_the_environment(what, registered, tmp_path):
    class Failing(Line):
        def step(self, action):
            assert np.isfinite(action).all()
            state, reward, *others = super().step(action)
            bad = np.nan if self.state[2] > 4 else 0.0
            return (state, reward + bad, *others) if what == "reward" else (state + bad, reward, *others)

    with pytest.raises(FloatingPointError, match="an action is not finite.*--resume .* goes on from the last check"):
        script.main(small(registered("Failing-v0", Failing), checkpoint_every=10**9, run_dir=str(tmp_path / "run")))


def test_an_environment_without_time_limit_needs_one(registered, tmp_path):
    name = registered("Endless-v0", lambda: Line(limit=10**9), None)
    refused(small(name), "--env-id Endless-v0", "--max-episode-steps")
    run = script.main(small(name, max_episode_steps=9, run_dir=str(tmp_path / "run")))
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["buffer"]["ring"][0][:, 2].max() == 8  # the third number of a state counts the steps


def test_what_an_environment_returns_need_not_be_an_array(registered, tmp_path):
    """Observations as lists, rewards of shape (1,), ends as numpy's: the same run as with plain ones."""

    class Odd(Line):
        def reset(self, **options):
            return super().reset(**options)[0].tolist(), {}

        def step(self, action):
            state, reward, terminated, truncated, info = super().step(action)
            return state.tolist(), np.array([reward]), np.bool_(terminated), np.bool_(truncated), info

    saved = []
    for name, environment in (("Odd-v0", Odd), ("Plain-v0", Line)):
        run = script.main(small(registered(name, environment), run_dir=str(tmp_path / name)))
        saved.append(torch.load(run / "checkpoint.pt", weights_only=True))
    torch.testing.assert_close(saved[0]["buffer"], saved[1]["buffer"], rtol=0, atol=0)
    torch.testing.assert_close(saved[0]["actor"], saved[1]["actor"], rtol=0, atol=0)


@pytest.mark.parametrize("frame", [None, [np.zeros((8, 8, 3), np.uint8)], "no mode"])
def test_refuses_a_video_of_what_cannot_be_drawn(frame, registered, tmp_path):
    class Unseen(Line):
        metadata = {"render_modes": ["rgb_array"]}

        def __init__(self, render_mode=None):
            super().__init__()
            self.render_mode = render_mode
            if frame == "no mode" and render_mode:
                raise ValueError("no drawing here")

        def render(self):
            return frame

    name = registered("Unseen-v0", Unseen)
    refused(small(name, capture_video=True, run_dir=str(tmp_path / "run")), "--capture-video")
    assert not (tmp_path / "run").exists()
    script.main(small(name, run_dir=str(tmp_path / "run")))


def test_a_video_without_frames_per_second(registered, tmp_path):
    class Drawn(Line):
        metadata = {"render_modes": ["rgb_array"], "render_fps": None}

        def __init__(self, render_mode=None):
            super().__init__()
            self.render_mode = render_mode

        def render(self):
            return np.full((64, 64, 3), 9 * int(self.state[2]), np.uint8)

    run = script.main(small(registered("Drawn-v0", Drawn), capture_video=True, run_dir=str(tmp_path / "run")))
    with Image.open(run / "agent.gif") as image:
        assert image.format == "GIF" and image.n_frames > 1


def test_an_environment_that_hides_state_is_resumed_exactly(registered, tmp_path):
    """Its reset forgets nothing: only new objects do the same again. Stopped by an error in the middle of episodes."""
    tired, fails = [], False  # of the environments that have made 33 steps, the sixth fails: one after a checkpoint

    class Tiring(Line):
        steps_in_all = 0

        def step(self, action):
            self.steps_in_all += 1
            tired.extend([1] if self.steps_in_all == 33 else [])
            if fails and len(tired) == 6:
                raise RuntimeError("killed")
            return super().step(action * 0.99**self.steps_in_all)

    name, settings = registered("Tiring-v0", Tiring), {"num_envs": 3, "checkpoint_every": 120, "buffer_size": 100}
    settings |= {"total_timesteps": 360, "updates_per_step": 0.5}
    whole = script.main(small(name, run_dir=str(tmp_path / "whole"), **settings))
    tired, fails = [], True
    with pytest.raises(RuntimeError, match="killed"):
        script.main(small(name, run_dir=str(tmp_path / "parts"), **settings))
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["progress"][0] == 120
    fails = False
    parts = script.main(Args(resume=str(tmp_path / "parts")))
    saved = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, parts)]
    progress = [checkpoint.pop("progress") for checkpoint in saved]
    assert progress[0][0] == 360
    torch.testing.assert_close((saved[0], *progress[0]), (saved[1], *progress[1]), rtol=0, atol=0)


def test_plays_whole_episodes_of_the_greedy_policy(registered):
    actor, _ = networks(state_dim=3, action_dim=2)
    args = Args(env_id=registered("Line-v0", Line), seed=5, eval_episodes=4)
    returns = script.play(actor, args)
    for i in range(4):
        env = Line()
        state, total, done = env.reset(seed=5 + i)[0].astype(np.float32), 0.0, False
        while not done:
            action = 2 * actor(torch.from_numpy(state))[0].tanh().detach().numpy()
            state, reward, terminated, truncated, _ = env.step(action)
            state, total, done = state.astype(np.float32), total + reward, terminated or truncated
        assert returns[i] == pytest.approx(total, rel=1e-4)


def test_the_camera_follows_the_agent(tmp_path, monkeypatch):
    """A hopper that is put 50 m further is in the picture nevertheless; it is the only thing there that is brown."""
    make_env = script.make_env

    class Far(gym.Wrapper):
        def reset(self, **options):
            found = super().reset(**options)
            self.unwrapped.set_state(self.unwrapped.data.qpos + 50 * np.eye(6)[0], self.unwrapped.data.qvel)
            return found

    monkeypatch.setattr(script, "make_env", lambda *args: Far(make_env(*args)))
    script.play(Actor(11, 3, 8), Args(env_id="Hopper-v5", eval_episodes=1), tmp_path / "agent.gif")
    with Image.open(tmp_path / "agent.gif") as image:
        red, _, blue = np.asarray(image.convert("RGB")).astype(int).transpose(2, 0, 1)
    assert (red - blue > 40).sum() > 300


@pytest.mark.parametrize("env_id, length", [("Ant-v5", 50), ("HalfCheetah-v5", 20), ("Hopper-v5", 20)])
def test_traces_are_as_long_as_in_table_2(env_id, length, tmp_path):
    args = Args(env_id=env_id, total_timesteps=1, max_episode_steps=3, run_dir=str(tmp_path))
    saved = json.loads((script.main(args) / "args.json").read_text())
    assert saved["trace_length"] == length and saved["device"] == "cpu"


def test_products_are_in_single_precision(monkeypatch):
    state, x, y = torch.get_rng_state(), randn(300, 400).double(), randn(400, 200).double()
    with script.fast_products("cpu"):
        torch.testing.assert_close((x.float() @ y.float()).double(), x @ y, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(torch, "allclose", lambda *args, **kwargs: False)  # as on a processor that rounds to bfloat16
    with script.fast_products("cpu"):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(torch.get_rng_state(), state)  # none of the run's random numbers is drawn


def test_a_run_leaves_the_products_of_the_process_as_they_were(registered, tmp_path):
    for recall in ("none", "learned"):
        run = script.main(small(registered("Line-v0", Line), recall=recall, run_dir=str(tmp_path / recall)))
        assert torch.get_float32_matmul_precision() == "highest"
        script.main(Args(evaluate=str(run)))
        assert torch.get_float32_matmul_precision() == "highest"


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
    traces, _, inside = script.recall_traces(model, next_states, Args(trace_length=5))
    assert traces.shape == (5, 50, STATE_DIM) and inside.sum() > 50
    torch.testing.assert_close(traces[..., 0], torch.full((5, 50), value), rtol=0, atol=1e-4)


def test_one_update_is_a_step_along_the_gradient_of_the_log_likelihood():
    """Eq. (2)"""
    batch = random_batch(64)
    model = fitted(batch.states, batch.actions, batch.next_states)
    torch.manual_seed(7)
    rows = torch.randint(64, (5,))
    tuples, batch = batch, Batch(*(column[rows] for column in batch))
    expected = copy.deepcopy(model)
    parts = expected.log_prob(batch.states, batch.actions, batch.next_states)
    loss = -sum(parts).mean()
    for weight, gradient in zip(
        expected.parameters(), torch.autograd.grad(loss, [*expected.parameters()]), strict=True
    ):
        weight.data -= 0.1 * gradient
    torch.manual_seed(7)
    args = Args(backtracking_batch_size=5)
    losses = script.update_backtracking_model(model, sgd(model.parameters()), tuples, args)
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
    batch = Batch(states[:-1].flatten(0, 1), actions.flatten(0, 1), *torch.zeros(2, 39 * 64), states[1:].flatten(0, 1))
    model = fitted(batch.states, batch.actions, batch.next_states)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 1500)  # to an end without a jolt
    for _ in range(1500):
        script.update_backtracking_model(model, optimizer, batch, Args())
        schedule.step()
    return rotation, pushes, batch, model


def test_traces_reach_back_along_a_system_with_known_linear_dynamics(linear):
    """Each imagined predecessor is M^-1 (s' - B a), and the actions of a trace lead forward to its high-value state."""
    rotation, pushes, batch, model = linear
    starts = batch.next_states[:200]
    states, actions, in_trace = script.recall_traces(model, starts, Args(state_noise=0.0, trace_length=4))
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
    args = Args(action_noise=0.3, state_noise=0.0, trace_length=1, trace_limit=1e9)
    (actions,) = script.recall_traces(model, starts, args)[1]
    mean = model.action_mean + model.action_std * model.predict_action(starts[:1])
    inside = (mean.abs() + 4 * 0.3 * model.action_std < 0.98).squeeze(0)  # not clipped
    assert actions.abs().max() <= 0.98
    torch.testing.assert_close(actions.mean(0)[inside], mean[0][inside], atol=0.01, rtol=0.02)
    torch.testing.assert_close(actions.std(0)[inside], (0.3 * model.action_std)[inside], atol=0, rtol=0.05)
    args = Args(action_noise=0.0, state_noise=0.5, trace_length=1, trace_limit=1e9)
    (states,) = script.recall_traces(model, starts, args)[0]
    action = mean.clamp(-0.98, 0.98)
    change, log_std = model.predict_change(action, starts[:1])
    expected = starts[:1] + model.change_mean + model.change_std * change
    spread = 0.5 * log_std.exp() * model.change_std
    torch.testing.assert_close(states.mean(0), expected[0], atol=0.05 * float(spread.max()), rtol=0.01)
    torch.testing.assert_close(states.std(0), spread[0], atol=0.0, rtol=0.05)


def test_a_trace_ends_where_it_leaves_the_data(linear):
    """With a stub model that goes a known way: pairs of one step back come first, and none comes after an end."""

    class Stub:
        state_mean, state_std = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 10.0])

        def sample(self, next_states, args):
            return next_states - torch.tensor([1.0, 0.0]), next_states[:, :1] / 100

    starts = torch.tensor([[3.5, 0.0], [0.5, 0.0], [2.0, 0.0], [2.0, 20.5]])  # inside: from -1 to 3, and from -20 to 20
    states, actions, inside = script.recall_traces(Stub(), starts, Args(trace_length=4, trace_limit=2.0))
    assert states[inside][:, 0].tolist() == [2.5, -0.5, 1.0] + [1.5, 0.0] + [0.5, -1.0] + [-0.5]
    assert inside.sum(0).tolist() == [4, 1, 3, 0]
    torch.testing.assert_close(actions[..., 0], (states[..., 0] + 1) / 100)  # the action that led to the next state
    *_, inside = script.recall_traces(Stub(), torch.tensor([[5.5, 0.0]]), Args(trace_length=4, trace_limit=2.0))
    assert not inside.any()  # one that comes back into the data has ended nevertheless


def test_traces_of_a_wild_model_stay_finite(linear):
    _, _, batch, model = linear
    wild = copy.deepcopy(model)
    with torch.no_grad():
        for weight in wild.state_predictor.parameters():
            weight *= 1.5
    args = Args(trace_limit=2.0, trace_length=50)
    states, actions, inside = script.recall_traces(wild, batch.next_states[:200], args)
    deviations = ((states - batch.next_states.mean(0)) / batch.next_states.std(0)).abs()
    assert (deviations[inside] <= 2.01).all() and 0 < inside.sum() < 0.7 * 200 * 50
    with torch.no_grad():
        for weight in wild.state_predictor.parameters():
            weight *= 1e30
    states, actions, inside = script.recall_traces(wild, batch.next_states[:200], args)
    assert not states.isfinite().all()
    assert states[inside].isfinite().all() and actions[inside].isfinite().all()


def test_start_states_are_the_most_valuable_and_never_terminal():
    buffer = filled_buffer(1000, 500)
    actor, critic = networks(state_dim=3, action_dim=2)
    for fraction in (0.25, 1.0, 1e-9):
        torch.manual_seed(4)
        tuples, values = script.high_value_states(buffer, actor, critic, Args(recall_tuples=400, top_fraction=fraction))
        torch.manual_seed(4)
        drawn = buffer.sample(400)
        value = critic(drawn.next_states, actor(drawn.next_states)[0].tanh()).min(0)[0]
        best = sorted(value[drawn.terminated == 0].tolist(), reverse=True)
        assert values.tolist() == pytest.approx(best[: math.ceil(fraction * len(best))])
        again = critic(tuples.next_states, actor(tuples.next_states)[0].tanh()).min(0)[0]
        torch.testing.assert_close(again, values)
        assert not tuples.terminated.any() and drawn.terminated.any()
        assert {row.tobytes() for row in rows_of(tuples)} <= {row.tobytes() for row in rows_of(drawn)}


def test_imitation_raises_the_log_probability_of_the_traces():
    """Eq. (3)"""
    actor, _ = networks()
    traces, inside = (randn(10, 8, STATE_DIM), randn(10, 8, ACTION_DIM, seed=1).tanh() * 0.9), randn(10, 8) > -0.2
    states, actions = (part[inside] for part in traces)
    loss = -tanh_gaussian(actor, states).log_prob(actions).mean()
    gradients = torch.autograd.grad(loss, [*actor.net.parameters()])
    expected = [w.detach() - 0.01 * g for w, g in zip(actor.net.parameters(), gradients, strict=True)]
    before = actor.log_prob_of_clipped(states, actions).mean()
    losses = script.imitate(actor, sgd(actor.net.parameters(), 0.01), *traces, inside)
    assert float(losses["recall/trace_length"]) == pytest.approx(len(states) / 8)
    assert float(losses["recall/imitation_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    for weight, other in zip(actor.net.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.detach(), other, rtol=1e-4, atol=1e-6)
    assert actor.log_prob_of_clipped(states, actions).mean() > before


def test_where_no_trace_stayed_inside_the_data_the_policy_stands_still():
    actor, _ = networks()
    optimizer = torch.optim.Adam(actor.parameters())
    traces = randn(2, 4, STATE_DIM), randn(2, 4, ACTION_DIM).tanh()
    script.imitate(actor, optimizer, *traces, torch.ones(2, 4) > 0)  # momentum
    before = copies(actor)
    assert script.imitate(actor, optimizer, *traces, torch.zeros(2, 4) > 0) == {"recall/trace_length": 0}
    assert all(torch.equal(*pair) for pair in zip(actor.parameters(), before, strict=True))


def test_what_the_training_loop_remembers_learns_from_and_recalls(tmp_path, monkeypatch, registered):
    """B holds what happened, the model gets the most valuable tuples, and traces start from their next states."""
    phases, happened, add = [], [], ReplayBuffer.add

    def recorded_add(buffer, *transition):
        happened.append(np.concatenate([np.ravel(part) for part in transition]).astype(np.float32))
        add(buffer, *transition)

    def recorded_tuples(*args, high_value_states=script.high_value_states):
        tuples, values = high_value_states(*args)
        phases.append({"tuples": tuples, "values": values, "starts": [], "fits": 0})
        return tuples, values

    def recorded_fit(model, optimizer, tuples, args, fit=script.update_backtracking_model):
        assert tuples is phases[-1]["tuples"]
        phases[-1]["fits"] += 1
        return fit(model, optimizer, tuples, args)

    def recorded_traces(model, starts, args, recall_traces=script.recall_traces):
        phases[-1]["starts"].append(starts)
        torch.testing.assert_close(model.state_mean, phases[-1]["tuples"].next_states.mean(0))
        return recall_traces(model, starts, args)

    monkeypatch.setattr(ReplayBuffer, "add", recorded_add)
    monkeypatch.setattr(script, "high_value_states", recorded_tuples)
    monkeypatch.setattr(script, "update_backtracking_model", recorded_fit)
    monkeypatch.setattr(script, "recall_traces", recorded_traces)
    always = np.full((2, 2), 0.5, np.float32)
    monkeypatch.setattr(script, "act", lambda actor, states, greedy=False: always[: len(states)])
    args = small(registered("Line-v0", lambda: Line(speed=0.1)), learning_starts=300, total_timesteps=600, num_envs=2)
    args = script.replace(args, recall_every=50, num_traces=5, recall_updates=4, backtracking_updates=8)
    run = script.main(script.replace(args, run_dir=str(tmp_path / "run"), checkpoint_every=240))
    ring = Batch(*torch.load(run / "checkpoint.pt", weights_only=True)["buffer"]["ring"])
    assert np.array_equal(rows_of(ring), happened) and len(happened) == 600
    assert (ring.actions[:300] != 0.5).all() and (ring.actions[300:] == 0.5).all()  # random ones, then the policy's
    outside = ring.next_states[:, :2].abs().amax(-1) > 1
    assert (
        torch.equal(ring.terminated.bool(), outside) and 20 < outside.sum() < 100
    )  # a time limit is no terminal state
    assert (ring.next_states[~outside][:, 2] == 7).any()
    starts = ring.states[:, 2] == 0
    going = (~starts[2:]).nonzero().squeeze(1) + 2  # of two environments in turns
    assert torch.equal(ring.states[going], ring.next_states[going - 2])
    ended = outside | (ring.next_states[:, 2] == 7)
    cut = torch.isin(torch.arange(600), torch.tensor([238, 239, 478, 479]))  # where the environments are made afresh
    assert torch.equal(starts[2:], (ended | cut)[:-2])
    assert len(phases) == 6
    for phase in phases:
        candidates = {state.numpy().tobytes() for state in phase["tuples"].next_states}
        assert {state.numpy().tobytes() for state in torch.cat(phase["starts"])} <= candidates
        assert phase["fits"] == 8 and all(len(starts) == 5 for starts in phase["starts"])
    assert 16 <= sum(len(phase["starts"]) for phase in phases) <= 24


@pytest.mark.parametrize("recall_every, recall_updates", [(10, 10), (10, 3), (7, 5), (10, 25)])
def test_imitation_updates_are_spread_evenly(recall_every, recall_updates, tmp_path, monkeypatch, registered):
    done = []  # the number of real updates before each imitation update
    real, imitate, update = [], script.imitate, script.update_actor_critic
    monkeypatch.setattr(script, "update_actor_critic", lambda *args: (real.append(1), update(*args))[1])
    monkeypatch.setattr(script, "imitate", lambda *args: (done.append(len(real)), imitate(*args))[1])
    args = small(registered("Line-v0", Line), recall_every=recall_every, recall_updates=recall_updates)
    script.main(script.replace(args, run_dir=str(tmp_path / "run"), total_timesteps=60 + 3 * recall_every - 1))
    counts = np.bincount(done, minlength=3 * recall_every)[recall_every : 3 * recall_every]
    assert counts.sum() == len(done)  # none before the first phase, which comes after recall_every real updates
    assert counts.max() - counts.min() <= 1
    assert abs(len(done) - 2 * recall_updates) <= math.ceil(recall_updates / recall_every)


@pytest.mark.parametrize(
    "updates_per_step, num_envs, expected", [(1.0, 1, 40), (0.25, 1, 10), (3.0, 1, 120), (1.0, 4, 40)]
)
def test_updates_for_each_environment_step(updates_per_step, num_envs, expected, tmp_path, monkeypatch, registered):
    real, update = [], script.update_actor_critic
    monkeypatch.setattr(script, "update_actor_critic", lambda *args: (real.append(1), update(*args))[1])
    args = small(registered("Line-v0", Line), updates_per_step=updates_per_step, num_envs=num_envs, recall="none")
    script.main(script.replace(args, run_dir=str(tmp_path / "run"), total_timesteps=100))
    assert len(real) == expected


def test_a_task_of_terminal_states_only_trains(tmp_path, registered):
    """There is no valuable state then, and no recall phase."""
    run = script.main(small(registered("Short-v0", lambda: Line(speed=1e9)), run_dir=str(tmp_path / "run")))
    assert torch.load(run / "checkpoint.pt", weights_only=True)["progress"][0] == 150
