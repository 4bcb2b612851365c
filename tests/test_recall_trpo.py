"""The mathematics of recall_trpo.py against torch.distributions, explicit matrices, enumeration and real dynamics."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as exact_kl_divergence
from torch.nn.utils import parameters_to_vector

import recall_trpo as script
from recall_trpo import (
    Actor,
    Args,
    BacktrackingModel,
    Critic,
    Episodes,
    ForwardModel,
    Normaliser,
    TrajectoryBuffer,
    Tuples,
)

torch.set_num_threads(1)
STATE_DIM, ACTION_DIM = 3, 2


# ------------------------------------------------------------------------------------------------------ helpers


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def networks(seed=0, hidden=4):
    """A critic and an actor whose policy differs from state to state, with a normaliser that has seen something."""
    torch.manual_seed(seed)
    normaliser = Normaliser(STATE_DIM)
    normaliser.add(2 * randn(100, STATE_DIM, seed=9) + 1)
    actor, critic = Actor(normaliser, STATE_DIM, ACTION_DIM, hidden), Critic(normaliser, STATE_DIM, hidden)
    actor.net[-1].weight.data.mul_(100)
    actor.log_std.data.copy_(torch.tensor([-0.3, 0.2]))
    return actor, critic


def policy(actor, states):
    mean, log_std = actor(states)
    return Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)


def random_tuples(size=64, seed=0):
    states, next_states = randn(size, STATE_DIM, seed=seed), randn(size, STATE_DIM, seed=seed + 1)
    actions, rewards = randn(size, ACTION_DIM, seed=seed + 2).tanh(), randn(size, seed=seed + 3)
    return Tuples(states, actions, rewards, next_states, randn(size, seed=seed + 4), torch.arange(size))


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(list(parameters), lr=lr)


class Line(gym.Env):
    """s' = s + `speed` * a in two dimensions; ends beyond 1 and after `limit` steps. States also count the steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, limit=7, speed=0.3, render_mode=None):
        self.limit, self.speed = limit, speed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.append(self.np_random.uniform(-0.5, 0.5, 2), 0.0)
        return self.state.copy(), {}

    def step(self, action):
        assert np.abs(action).max() <= 1
        self.state = self.state + np.append(self.speed * action, 1.0)
        terminated = bool(np.abs(self.state[:2]).max() > 1)
        return self.state.copy(), float(action[0]), terminated, self.state[2] >= self.limit, {}


def rollouts(count, num_steps=5, limits=(7, 4), seed=0):
    """So many rollouts in lines of these limits, and what `next_episode` said of each."""
    episodes, rng = Episodes([Line(limit) for limit in limits], seed), np.random.default_rng(seed)
    actor, _ = networks()
    return [script.collect_rollout(episodes, actor, num_steps, rng) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------ networks


def test_log_prob_against_torch_distributions():
    actor, _ = networks()
    states, actions = randn(50, STATE_DIM), randn(50, ACTION_DIM, seed=1)
    torch.testing.assert_close(actor.log_prob(states, actions), policy(actor, states).log_prob(actions))


def test_an_action_at_its_bound_is_as_likely_as_all_draws_beyond_it():
    actor, _ = networks()
    states, actions = randn(50, STATE_DIM), (2 * randn(50, ACTION_DIM, seed=1)).clamp(-1, 1)
    gaussian = policy(actor, states).base_dist
    expected = gaussian.log_prob(actions)
    expected = torch.where(actions == 1, (1 - gaussian.cdf(torch.ones(()))).log(), expected)
    expected = torch.where(actions == -1, gaussian.cdf(-torch.ones(())).log(), expected)
    assert 20 < (actions.abs() == 1).sum() < 80
    torch.testing.assert_close(actor.log_prob_of_clipped(states, actions), expected.sum(-1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # far from the bounds it is finite, too
        actor.net[-1].bias.fill_(50.0)
    loss = actor.log_prob_of_clipped(states, actions).sum()
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, [*actor.parameters()]))


def test_imitating_its_own_actions_leaves_the_policy_as_it_is():
    """Though they were clipped. A Gaussian that took them for its draws would pull its mean and its deviation in."""
    actor, _ = networks()
    with torch.no_grad():
        actor.net[-1].bias += 1.5
        states = randn(200_000, STATE_DIM)
        actions = policy(actor, states).sample().clamp(-1, 1)
    last = [actor.net[-1].bias, actor.log_std]
    right, wrong = (
        torch.cat(torch.autograd.grad(log_prob(states, actions).mean(), last)).abs()
        for log_prob in (actor.log_prob_of_clipped, actor.log_prob)
    )
    assert right.max() < 0.01 < 0.1 < wrong.min()


def test_the_policy_in_numpy_is_the_policy():
    actor, _ = networks()
    states = randn(50, STATE_DIM)
    expected = policy(actor, states).mean.detach().numpy()
    np.testing.assert_allclose(script.greedy_policy(actor)(states.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_the_normaliser_knows_mean_and_variance_of_all_it_was_given():
    normaliser, values = Normaliser(3), 5 * randn(700, 3) + torch.tensor([1.0, -20.0, 300.0])
    assert torch.equal(normaliser(values[:1]), values[:1].clamp(-10, 10))  # nothing known yet
    for part in values.split(128):
        normaliser.add(part)
    torch.testing.assert_close(normaliser.mean, values.mean(0))
    torch.testing.assert_close(normaliser.std, values.std(0, unbiased=False), rtol=1e-3, atol=1e-3)
    assert normaliser.count == 700
    normal = normaliser(values)
    torch.testing.assert_close(normal.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(normal.std(0), torch.ones(3), atol=1e-2, rtol=0)


def test_values_stay_when_their_scale_changes():
    """PopArt: the last layer makes up for the new statistics."""
    _, critic = networks()
    states = randn(50, STATE_DIM)
    for returns in (100 + 10 * randn(200), -1000 + 500 * randn(300, seed=1)):
        before = critic(states)
        critic.rescale(returns)
        torch.testing.assert_close(critic(states), before, rtol=1e-3, atol=1e-3)
    assert critic.scale.count == 500


# ------------------------------------------------------------------------------------------------------ TRPO


def test_kl_divergence_against_torch_distributions():
    (old, _), (new, _) = networks(), networks(seed=1)
    new.log_std.data.copy_(torch.tensor([0.4, -1.0]))
    states = randn(50, STATE_DIM)
    expected = exact_kl_divergence(policy(old, states), policy(new, states)).mean()
    torch.testing.assert_close(script.kl_divergence(*old(states), *new(states)), expected)


def explicit_fisher_matrix(actor, states):
    """The Hessian of the mean KL divergence from the policy, where that is 0."""
    names, weights = zip(*actor.named_parameters(), strict=True)
    sizes, old = [weight.numel() for weight in weights], policy(actor, states)
    old = Independent(Normal(old.mean.detach(), old.stddev.detach()), 1)

    def kl(vector):
        parts = zip(names, weights, vector.split(sizes), strict=True)
        new = {name: part.view_as(weight) for name, weight, part in parts}
        mean, log_std = torch.func.functional_call(actor, new, (states,))
        return exact_kl_divergence(old, Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)).mean()

    return torch.autograd.functional.hessian(kl, parameters_to_vector(weights).detach())


def test_fisher_vector_product_against_the_explicit_matrix():
    actor, _ = networks()
    states = randn(30, STATE_DIM)
    matrix, product = explicit_fisher_matrix(actor, states), script.fisher_matrix(actor, states, damping=0.1)
    for seed in range(5):
        vector = randn(len(matrix), seed=seed)
        torch.testing.assert_close(product(vector), matrix @ vector + 0.1 * vector, rtol=1e-3, atol=1e-4)


def test_conjugate_gradients_against_a_direct_solve():
    root = randn(20, 20).double()
    matrix, b = root @ root.T + torch.eye(20), randn(20, seed=1).double()
    x = script.conjugate_gradients(lambda vector: matrix @ vector, b, iterations=40)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b))
    assert torch.equal(script.conjugate_gradients(lambda v: matrix @ v, torch.zeros(20), 10), torch.zeros(20))
    few = script.conjugate_gradients(lambda vector: matrix @ vector, b, iterations=5)
    assert 0 < (matrix @ few - b).norm() < b.norm()


def batch_of(actor, size=200):
    states = randn(size, STATE_DIM)
    actions = policy(actor, states).mean.detach() + randn(size, ACTION_DIM, seed=1)
    return states, actions, randn(size, seed=2)


def surrogate(actor, old_log_probs, states, actions, advantages):
    return float((advantages * (actor.log_prob(states, actions) - old_log_probs).exp()).mean().detach())


def test_the_step_is_the_natural_gradient_as_long_as_the_trust_region_allows():
    actor, _ = networks()
    states, actions, advantages = batch_of(actor)
    before, args = parameters_to_vector(actor.parameters()).detach(), Args(max_kl=1e-6, cg_iterations=200)
    loss = (advantages * actor.log_prob(states, actions)).mean()  # the plain policy gradient
    gradient = parameters_to_vector(torch.autograd.grad(loss, [*actor.parameters()]))
    matrix = explicit_fisher_matrix(actor, states) + 0.1 * torch.eye(len(before))
    direction = torch.linalg.solve(matrix, gradient)
    script.update_actor(actor, states, actions, advantages, args)
    step = parameters_to_vector(actor.parameters()).detach() - before
    assert torch.cosine_similarity(step, direction, dim=0) > 0.999
    assert float(0.5 * step @ matrix @ step) == pytest.approx(1e-6, rel=0.02)


@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 1.0])
def test_a_step_improves_the_surrogate_within_the_bound(max_kl):
    actor, _ = networks()
    batch = batch_of(actor)
    old, old_log_probs = copy.deepcopy(actor), actor.log_prob(*batch[:2]).detach()
    before = surrogate(actor, old_log_probs, *batch)
    losses = script.update_actor(actor, *batch, Args(max_kl=max_kl))
    gain = surrogate(actor, old_log_probs, *batch) - before
    kl = float(exact_kl_divergence(policy(old, batch[0]), policy(actor, batch[0])).mean().detach())
    assert gain > 0 and 0.1 * max_kl < kl <= max_kl
    assert float(losses["losses/kl"]) == pytest.approx(kl, rel=1e-3)
    assert float(losses["losses/policy_loss"]) == pytest.approx(-gain, rel=1e-3, abs=1e-6)
    entropy = float(policy(actor, batch[0]).entropy()[0])
    assert float(losses["losses/entropy"]) == pytest.approx(entropy, rel=1e-4)


def test_the_line_search_shortens_a_step_that_breaks_the_bound(monkeypatch):
    actor, _ = networks()
    batch, kl_divergence = batch_of(actor), script.kl_divergence
    tried = []
    monkeypatch.setattr(script, "kl_divergence", lambda *a: tried.append(3 * kl_divergence(*a)) or tried[-1])
    losses = script.update_actor(actor, *batch, Args(max_kl=0.01))
    assert len(tried) > 1
    assert all(kl > 0.01 for kl in tried[:-1]) and tried[-1] <= 0.01
    assert float(losses["losses/line_search_steps"]) == len(tried) - 1


@pytest.mark.parametrize("broken", ["bound", "surrogate"])
def test_the_line_search_refuses_what_breaks_the_bound_or_improves_nothing(broken, monkeypatch):
    actor, _ = networks()
    states, actions, advantages = batch_of(actor)
    if broken == "bound":
        monkeypatch.setattr(script, "kl_divergence", lambda *_: torch.tensor(1.0))
    else:
        conjugate_gradients = script.conjugate_gradients
        monkeypatch.setattr(script, "conjugate_gradients", lambda *a: -conjugate_gradients(*a))  # downhill
    before = parameters_to_vector(actor.parameters()).detach().clone()
    losses = script.update_actor(actor, states, actions, advantages, Args())
    assert torch.equal(parameters_to_vector(actor.parameters()), before)
    assert (float(losses["losses/kl"]), float(losses["losses/line_search_steps"])) == (0.0, 10.0)


def test_advantages_against_the_definition_of_gae():
    """The sum of (gamma lambda)^k times the k-th later error, up to the end of the episode or the rollout."""
    rng, shape = np.random.default_rng(0), (9, 3)
    rollout, gamma, lam = rollouts(1)[0][0], 0.9, 0.8
    values, next_values, rewards = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    terminated, truncated = rng.random(shape) < 0.15, rng.random(shape) < 0.15
    next_values[terminated] = np.nan  # such as V of a state that the simulator broke in
    rollout = rollout._replace(rewards=rewards, terminated=terminated, truncated=truncated)
    advantages = script.generalized_advantages(rollout, values, next_values, gamma, lam)
    for t in range(9):
        for i in range(3):
            expected, weight = 0.0, 1.0
            for k in range(t, 9):
                bootstrap = 0.0 if terminated[k, i] else next_values[k, i]
                expected += weight * (rewards[k, i] + gamma * bootstrap - values[k, i])
                weight *= gamma * lam
                if terminated[k, i] or truncated[k, i]:
                    break
            assert advantages[t, i] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_iteration_bootstraps_from_the_last_state_of_a_truncated_episode():
    (actor, critic), (rollout, _) = networks(), rollouts(1)[0]
    assert rollout.truncated.any()
    with torch.no_grad():
        next_values = critic(torch.from_numpy(rollout.next_states)).numpy()
    seen, args = [], Args(critic_epochs=1, gamma=0.9, gae_lambda=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update_critic", lambda *a: seen.append(a[3]) or {})
        script.update_trpo(actor, critic, None, rollout, args, None)
    expected = rollout.rewards + 0.9 * next_values * ~rollout.terminated  # with lambda = 0
    np.testing.assert_allclose(seen[0].numpy(), expected.ravel(), rtol=1e-4, atol=1e-4)


def test_the_actor_gets_each_step_with_its_own_advantage():
    """Normalised; losses/explained_variance is of the values before the update."""
    (actor, critic), (rollout, _) = networks(), rollouts(1)[0]
    values, next_values = (
        critic(torch.from_numpy(states)).detach().numpy() for states in (rollout.states, rollout.next_states)
    )
    seen, args = [], Args(critic_epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update_actor", lambda *a: seen.append(a[1:4]) or {})
        patch.setattr(script, "update_critic", lambda *a: {})
        losses = script.update_trpo(actor, critic, None, rollout, args, None)
    states, actions, advantages = seen[0]
    assert np.array_equal(states, rollout.states.reshape(-1, STATE_DIM))
    assert np.array_equal(actions, rollout.actions.reshape(-1, ACTION_DIM))
    expected = script.generalized_advantages(rollout, values, next_values, args.gamma, args.gae_lambda)
    scaled = (expected - expected.mean()) / expected.std(ddof=1)
    np.testing.assert_allclose(advantages.numpy(), scaled.ravel(), rtol=1e-3, atol=1e-4)
    explained = 1 - expected.var() / (expected + values).var()
    assert float(losses["losses/explained_variance"]) == pytest.approx(explained, rel=1e-3)


def test_the_critic_learns_the_returns():
    _, critic = networks(hidden=32)
    states = randn(500, STATE_DIM)
    returns = 300 + 100 * states[:, 0]
    optimizer, rng = torch.optim.Adam(critic.net.parameters(), lr=1e-2), np.random.default_rng(0)
    for _ in range(20):
        script.update_critic(critic, optimizer, states, returns, Args(critic_batch_size=64), rng)
    assert float((critic(states) - returns).abs().mean()) < 10


def test_the_critic_learns_returns_that_are_far_from_all_earlier_ones():
    _, critic = networks(hidden=32)
    optimizer, rng, states = torch.optim.Adam(critic.net.parameters(), lr=1e-2), np.random.default_rng(0), randn(500, 3)
    for _ in range(150):
        critic.rescale(randn(500))
    script.update_critic(critic, optimizer, states, torch.full((500,), 50.0), Args(critic_epochs=200), rng)
    assert float((critic(states) - 50).abs().mean()) < 1


def test_a_rollout_holds_what_happened():
    """Among it the last state of each episode, not the first of the next, and actions before they are clipped."""
    for rollout, finished in rollouts(6):
        ended = rollout.terminated | rollout.truncated
        step = rollout.next_states - rollout.states
        np.testing.assert_allclose(step[..., :2], 0.3 * rollout.actions.clip(-1, 1), atol=1e-5)
        np.testing.assert_allclose(step[..., 2], 1)
        assert np.array_equal(rollout.states[1:][~ended[:-1]], rollout.next_states[:-1][~ended[:-1]])
        assert (rollout.states[1:][ended[:-1]][:, 2] == 0).all()
        assert len(finished) == ended.sum()
        np.testing.assert_allclose(rollout.rewards, rollout.actions[..., 0].clip(-1, 1), rtol=1e-5)
    actions = np.concatenate([rollout.actions for rollout, _ in rollouts(6)])
    assert np.abs(actions).max() > 1


# ------------------------------------------------------------------------------------------------------ buffer


def whole_episodes(made):
    """The episodes that ended in these rollouts, in the order of their ends: lists of (s, a, r, s', terminated)."""
    episodes, under_way = [], {}
    for rollout, _ in made:
        parts = [[] for _ in range(rollout.rewards.shape[1])]
        for i in range(rollout.rewards.shape[1]):
            for t in range(len(rollout.rewards)):
                row = rollout.states[t, i], rollout.actions[t, i].clip(-1, 1), rollout.rewards[t, i]
                under_way.setdefault(i, []).append((*row, rollout.next_states[t, i], rollout.terminated[t, i]))
                if rollout.terminated[t, i] or rollout.truncated[t, i]:
                    parts[i].append(under_way.pop(i))
        episodes += [episode for part in parts for episode in part]
    return episodes


@pytest.mark.parametrize("start_states", ["return", "reward"])
def test_the_buffer_holds_the_newest_whole_trajectories_with_the_values_of_their_next_states(start_states):
    made, buffer = rollouts(30), TrajectoryBuffer(60, 2, start_states, gamma=0.9)
    for rollout, _ in made:
        buffer.add(rollout)
    episodes, lengths = whole_episodes(made), [len(tuples.rewards) for *_, tuples in buffer.trajectories]
    assert 50 < sum(lengths) <= 60 < sum(map(len, episodes))
    assert buffer.number == len(episodes)
    first = len(episodes) - len(lengths)
    for n, (total, held_out, tuples) in enumerate(buffer.trajectories):
        episode = episodes[first + n]
        states, actions, rewards, next_states, terminated = map(np.array, zip(*episode, strict=True))
        assert held_out == ((first + n) % 10 == 9)
        assert total == pytest.approx(rewards.sum(), rel=1e-5, abs=1e-6)
        for column, expected in zip(tuples[:4], (states, actions, rewards, next_states), strict=True):
            assert np.array_equal(column, expected)
        assert tuples.times.tolist() == [*range(len(episode))]
        for t in range(len(episode)):
            to_come = [*rewards[t + 1 :]] + [rewards.mean()] * (0 if terminated[-1] else len(rewards))
            later = sum(0.9**k * reward for k, reward in enumerate(to_come))
            value = later if start_states == "return" else rewards[t]
            assert tuples.values[t] == pytest.approx(-math.inf if terminated[t] else value, rel=1e-4, abs=1e-5)


def test_the_buffer_keeps_one_trajectory_that_is_longer_than_itself():
    buffer = TrajectoryBuffer(3, 2, "return", gamma=0.9)
    for rollout, _ in rollouts(4):
        buffer.add(rollout)
    assert len(buffer.trajectories) == 1


def test_a_saved_buffer_goes_on_where_it_was(tmp_path):
    made = rollouts(12)
    one, other = (TrajectoryBuffer(60, 2, "return", gamma=0.9) for _ in range(2))
    for rollout, _ in made[:7]:
        one.add(rollout)
    torch.save(one.state_dict(), tmp_path / "buffer.pt")
    other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    for rollout, _ in made[7:]:
        one.add(rollout)
        other.add(rollout)
    assert one.number == other.number
    for (total, held_out, tuples), part in zip(one.trajectories, other.trajectories, strict=True):
        assert (total, held_out) == part[:2]
        assert all(np.array_equal(*pair) for pair in zip(tuples, part[2], strict=True))


def test_high_value_states_are_the_best_tuples_of_the_best_trajectories_and_never_terminal_or_held_out():
    buffer = TrajectoryBuffer(10**6, 2, "return", gamma=0.9)
    for rollout, _ in rollouts(40):
        buffer.add(rollout)
    tuples = script.high_value_states(buffer, Args(top_trajectories=8, top_fraction=0.5))
    seen = sorted([part for part in buffer.trajectories if not part[1]], key=lambda part: -part[0])[:8]
    values = np.concatenate([part[2].values for part in seen])
    best = np.sort(values)[::-1][: round(0.5 * len(values))]
    assert tuples.values.tolist() == pytest.approx(best[np.isfinite(best)].tolist())
    known = {tuple(row) for part in seen for row in part[2].next_states.tolist()}
    assert {tuple(row) for row in tuples.next_states.tolist()} <= known
    everything = script.high_value_states(buffer, Args(top_trajectories=10**6, top_fraction=1.0))
    assert everything.values.isfinite().all()
    assert not np.isfinite(np.concatenate([part[2].values for part in buffer.trajectories])).all()
    assert len(script.high_value_states(TrajectoryBuffer(9, 2, "return", 0.9), Args()).values) == 0


# ------------------------------------------------------------------------------------------------------ recall traces


def fitted(tuples, kind=BacktrackingModel):
    torch.manual_seed(0)
    model = kind(tuples.states.shape[1], tuples.actions.shape[1])
    model.normalise_by(tuples)
    return model


def normal(x):
    return (x - x.mean(0)) / x.std(0)


def test_backtracking_model_against_torch_distributions():
    """Eq. (1) of normalised quantities: variance 1 for actions, a learned one for changes of state."""
    tuples = random_tuples(200)
    model = fitted(tuples)
    of_actions, of_changes = model.log_prob(tuples.states, tuples.actions, tuples.next_states)
    changes, next_states, actions = map(
        normal, (tuples.states - tuples.next_states, tuples.next_states, tuples.actions)
    )
    expected = Independent(Normal(model.action_predictor(next_states), 1.0), 1).log_prob(actions)
    torch.testing.assert_close(of_actions, expected, rtol=1e-4, atol=1e-4)
    mean, log_std = model.predict_change(tuples.actions, tuples.next_states)
    torch.testing.assert_close(mean, model.state_predictor(torch.cat((next_states, actions), -1))[:, :STATE_DIM])
    expected = Independent(Normal(mean, log_std.exp()), 1).log_prob(changes)
    torch.testing.assert_close(of_changes, expected, rtol=1e-4, atol=1e-4)


def test_forward_model_against_torch_distributions():
    tuples = random_tuples(200)
    model = fitted(tuples, ForwardModel)
    outcomes = normal(torch.cat((tuples.next_states - tuples.states, tuples.rewards.unsqueeze(-1)), -1))
    mean, log_std = model(tuples.states, tuples.actions)
    expected = Independent(Normal(mean, log_std.exp()), 1).log_prob(outcomes)
    torch.testing.assert_close(model.log_prob(tuples), expected, rtol=1e-4, atol=1e-4)


def test_architecture_is_that_of_appendix_c():
    model = BacktrackingModel(17, 6)
    for predictor, activation in ((model.action_predictor, nn.Tanh), (model.state_predictor, nn.ReLU)):
        layers = [layer for layer in predictor if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in layers[:-1]] == [128, 128]
        assert all(isinstance(layer, activation) for layer in predictor if not isinstance(layer, nn.Linear))


def test_what_never_changes_stays_as_it_is_when_imagined():
    tuples = random_tuples(50)
    tuples.states[:, 0] = tuples.next_states[:, 0] = tuples.rewards[:] = 7.3
    model, forward = fitted(tuples), fitted(tuples, ForwardModel)
    traces = script.recall_traces(model, tuples.next_states, 5, Args(), np.random.default_rng(0))
    next_states, rewards = forward.sample(tuples.states, tuples.actions, randn(50, STATE_DIM + 1, seed=9))
    for imagined in (*traces[0][..., 0], next_states[:, 0], rewards):
        torch.testing.assert_close(imagined, torch.full((50,), 7.3), rtol=0, atol=1e-4)
    assert next_states.std(0)[1:].min() > 0.1 < traces[0].std((0, 1))[1:].min()


def test_one_update_is_a_step_along_the_gradient_of_the_log_likelihood():
    """Eq. (2), and the forward model's likelihood"""
    tuples = random_tuples()
    some = Tuples(*(column[[3, 3, 17, 40]] for column in tuples))
    for kind, update, name in (
        (BacktrackingModel, script.update_backtracking_model, "recall/backtracking_loss"),
        (ForwardModel, script.update_forward_model, "recall/forward_loss"),
    ):
        model = fitted(tuples, kind)
        expected = copy.deepcopy(model)
        of_pairs = (
            expected.log_prob(some)
            if kind is ForwardModel
            else sum(expected.log_prob(some.states, some.actions, some.next_states))
        )
        loss, weights = -of_pairs.mean(), [*expected.parameters()]
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.1 * gradient
        losses = update(model, sgd(model.parameters()), some)
        assert float(losses[name]) == pytest.approx(float(loss.detach()), rel=1e-5)
        for weight, other in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def linear():
    """A stable linear system s' = M s + B a with reward s_1, its random transitions, and both models of them."""
    rotation = torch.tensor([[0.9, -0.3, 0.0], [0.3, 0.9, 0.0], [0.0, 0.2, 0.9]])
    pushes = torch.tensor([[0.3, 0.0], [0.0, 0.3], [0.2, -0.2]])
    states, actions = [torch.zeros(64, 3)], [randn(64, 2, seed=t).clamp(-0.95, 0.95) for t in range(60)]
    for action in actions:
        states.append(states[-1] @ rotation.T + action @ pushes.T)
    states, actions = torch.stack(states[20:]), torch.stack(actions[20:])
    now, later = states[:-1].flatten(0, 1), states[1:].flatten(0, 1)
    tuples = Tuples(now, actions.flatten(0, 1), now[:, 0], later, now[:, 0], torch.arange(len(now)))
    models, rng = (fitted(tuples), fitted(tuples, ForwardModel)), np.random.default_rng(0)
    updates = script.update_backtracking_model, script.update_forward_model
    for model, update in zip(models, updates, strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 1500)  # to an end without a jolt
        for _ in range(1500):
            rows = torch.from_numpy(rng.integers(len(now), size=256))
            update(model, optimizer, Tuples(*(column[rows] for column in tuples)))
            schedule.step()
    return rotation, pushes, tuples, *models


def test_traces_reach_back_along_a_system_with_known_linear_dynamics(linear):
    """Each imagined predecessor is M^-1 (s' - B a), and the actions of a trace lead forward to its high-value state."""
    rotation, pushes, tuples, model, _ = linear
    starts = tuples.next_states[:200]
    states, actions, in_trace = script.recall_traces(model, starts, 4, Args(state_noise=0.0), np.random.default_rng(0))
    assert states.shape == (4, 200, 3) and actions.shape == (4, 200, 2)
    assert in_trace[0].float().mean() > 0.9
    next_states = torch.cat((starts[None], states[:-1]))
    exact = (next_states - actions @ pushes.T) @ torch.linalg.inv(rotation).T
    errors = ((states - exact) / tuples.states.std(0))[in_trace].abs()
    assert errors.mean() < 0.02
    whole, forward = in_trace.all(0), states[-1]
    for action in actions.flip(0):
        forward = forward @ rotation.T + action @ pushes.T
    assert whole.sum() > 100
    assert ((forward - starts) / tuples.states.std(0))[whole].abs().mean() < 0.05


def test_imagined_experience_follows_a_system_with_known_linear_dynamics(linear):
    """And its advantages are those of the imagined rewards (App. G)."""
    rotation, pushes, tuples, _, model = linear
    (actor, critic), starts, args = networks(), tuples.states[:200], Args(state_noise=0.0, gamma=0.9)
    rng = np.random.default_rng(0)
    states, actions, advantages = script.forward_traces(model, actor, critic, starts, 4, args, rng)
    assert torch.equal(states[0], starts)
    mean, log_std = actor(states)
    noise = (actions - mean) / log_std.exp()  # as drawn: clipped actions would drive the policy's deviation
    assert float(noise.mean()) == pytest.approx(0, abs=0.1) and float(noise.std()) == pytest.approx(1, rel=0.1)
    spread = tuples.states.std(0)
    next_states = states @ rotation.T + actions.clamp(-1, 1) @ pushes.T
    inside = advantages[1:] != 0
    assert inside.float().mean() > 0.9
    assert ((states[1:] - next_states[:-1]) / spread)[inside].abs().mean() < 0.05
    whole = (advantages != 0).all(0)
    expected = torch.zeros(4, 200)
    for t in range(4):
        returns = sum(0.9 ** (k - t) * states[k, :, 0] for k in range(t, 4))
        expected[t] = returns + 0.9 ** (4 - t) * critic(next_states[3]).detach() - critic(states[t]).detach()
    ratio = advantages[:, whole] / expected[:, whole]
    assert float((ratio / ratio.median() - 1).abs().median()) < 0.1
    assert float(advantages[advantages != 0].std()) == pytest.approx(1.0, rel=0.05)


def test_a_trace_ends_where_it_leaves_the_data_and_its_numbers_stay_finite(linear):
    _, _, tuples, model, forward_model = linear
    wild, args = copy.deepcopy(model), Args(trace_limit=2.0)
    with torch.no_grad():
        for weight in wild.state_predictor.parameters():
            weight *= 1.5
    states, actions, in_trace = script.recall_traces(wild, tuples.next_states[:200], 50, args, np.random.default_rng(0))
    inside = ((states - tuples.next_states.mean(0)).abs() <= 2 * tuples.next_states.std(0)).all(-1)
    for i in range(200):
        left = int(inside[:, i].long().argmin()) if not inside[:, i].all() else 50
        assert in_trace[:left, i].all() and not in_trace[left:, i].any()
    assert 0 < in_trace.float().mean() < 0.9
    assert states.isfinite().all() and actions.isfinite().all()
    actor, critic = networks()
    starts, rng = tuples.states[:200], np.random.default_rng(0)
    states, _, advantages = script.forward_traces(forward_model, actor, critic, starts, 50, args, rng)
    assert states.isfinite().all() and advantages.isfinite().all()
    gone = advantages == 0
    assert gone.any() and not (gone[:-1] & ~gone[1:]).any()


def test_no_trace_from_a_terminal_state_is_compared():
    buffer = TrajectoryBuffer(10**6, 2, "return", gamma=0.9)
    for rollout, _ in rollouts(60):
        buffer.add(rollout)
    held_out = [tuples for _, held_out, tuples in buffer.trajectories if held_out]
    assert any(np.isinf(tuples.values).any() for tuples in held_out)
    model, rng = BacktrackingModel(STATE_DIM, ACTION_DIM), np.random.default_rng(0)
    compared = script.compare_traces(model, buffer, 3, Args(top_fraction=1.0), rng)
    assert len(compared.starts) == sum(np.isfinite(tuples.values).sum() for tuples in held_out)
    assert (compared.starts[:, :2].abs() <= 1).all()  # beyond that, Line terminates


@pytest.mark.parametrize(
    "env_id, length",
    [("Ant-v5", 50), ("Humanoid-v5", 50), ("HalfCheetah-v5", 20), ("Walker2d-v5", 20), ("Hopper-v5", 10)],
)
def test_traces_are_as_long_as_in_table_1(env_id, length):
    assert script.default_trace_length(env_id) == length


def test_traces_are_split_into_the_pairs_of_each_imitation_update():
    states, actions = torch.arange(24.0).view(3, 8, 1), -torch.arange(24.0).view(3, 8, 1)
    weights = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).round()
    parts = script.split_traces(states, actions, weights, 2)
    assert len(parts) == 4
    for n, (some_states, some_actions, some_weights) in enumerate(parts):
        expected = [float(states[t, i]) for t in range(3) for i in (2 * n, 2 * n + 1) if weights[t, i]]
        assert some_states.flatten().tolist() == expected
        assert torch.equal(some_actions, -some_states)
        assert some_weights.tolist() == [1.0] * len(expected)


def test_imitation_raises_the_log_probability_of_the_traces():
    """Eq. (3), weighted"""
    actor, _ = networks()
    states, actions, weights = randn(50, STATE_DIM), randn(50, ACTION_DIM, seed=1).tanh(), randn(50, seed=2)
    for weight in (torch.ones(50, dtype=torch.bool), weights):
        trained, expected = copy.deepcopy(actor), copy.deepcopy(actor)
        loss = -(weight * policy(expected, states).log_prob(actions)).mean()
        parameters = [*expected.parameters()]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.01 * gradient
        pairs, args = [(states, actions, weight)], Args(imitation_kl=1e9)
        losses = script.imitate(trained, sgd(trained.parameters(), 0.01), pairs, states, args)
        assert float(losses["recall/imitation_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        for parameter, other in zip(trained.parameters(), parameters, strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)
        kl = exact_kl_divergence(policy(actor, states), policy(trained, states)).mean()
        assert float(losses["recall/imitation_kl"]) == pytest.approx(float(kl.detach()), rel=1e-3)


@pytest.mark.parametrize("imitation_kl", [0.0, 1e-4, 0.01])
def test_imitation_changes_the_policy_no_more_than_it_may(imitation_kl):
    actor, _ = networks()
    old, states = copy.deepcopy(actor), randn(100, STATE_DIM, seed=5)
    pairs = [(randn(50, STATE_DIM, seed=n), randn(50, ACTION_DIM, seed=n + 9), torch.ones(50)) for n in range(5)]
    losses = script.imitate(actor, sgd(actor.parameters(), 0.1), pairs, states, Args(imitation_kl=imitation_kl))
    kl = float(exact_kl_divergence(policy(old, states), policy(actor, states)).mean())
    assert 0.5 * imitation_kl <= kl <= imitation_kl + 1e-7
    assert float(losses["recall/imitation_kl"]) == pytest.approx(kl, abs=1e-6)


def test_where_no_step_is_left_the_policy_stands_still():
    actor, _ = networks()
    before, nothing = parameters_to_vector(actor.parameters()).detach().clone(), torch.zeros(0)
    pairs = [(torch.zeros(0, STATE_DIM), torch.zeros(0, ACTION_DIM), nothing)]
    losses = script.imitate(actor, sgd(actor.parameters()), pairs, randn(9, STATE_DIM), Args())
    assert torch.equal(parameters_to_vector(actor.parameters()), before)
    assert "recall/imitation_loss" not in losses


def test_traces_are_compared_with_what_really_led_to_their_high_value_states():
    buffer = TrajectoryBuffer(10**6, 2, "return", gamma=0.9)
    for rollout, _ in rollouts(60, limits=(30, 12)):
        buffer.add(rollout)
    everything = script.high_value_states(buffer, Args(top_trajectories=10**6, top_fraction=1.0))
    model, rng = fitted(everything), np.random.default_rng(0)
    compared = script.compare_traces(model, buffer, 6, Args(), rng)
    held_out = np.concatenate([tuples.next_states for _, held_out, tuples in buffer.trajectories if held_out])
    assert {tuple(row) for row in compared.starts.tolist()} <= {tuple(row) for row in held_out.tolist()}
    later = torch.cat((compared.starts[None], compared.real[:-1]))
    for step in range(6):
        known = compared.known[step]
        # the third number counts the steps of an episode, so it tells whether each is the predecessor of the last
        assert torch.equal(compared.real[step, known, 2], later[step, known, 2] - 1)
    assert compared.known[0].all() and not compared.known[-1].all()
    errors = script.trace_errors(model, compared)
    counted = compared.known[0] & compared.in_trace[0]
    distance = ((compared.imagined[0] - compared.real[0]) / model.state_std).square().mean(-1).sqrt()
    assert float(errors[0]) == pytest.approx(float(distance[counted].mean()), rel=1e-5)
    assert script.compare_traces(model, TrajectoryBuffer(9, 2, "return", 0.9), 6, Args(), rng) is None


# ------------------------------------------------------------------------------------------------------ main


@pytest.mark.parametrize("recall_every, until, phases", [(1, 1.0, 8), (3, 1.0, 2), (2, 0.5, 2)])
def test_recall_phases_come_as_often_and_as_long_as_told(recall_every, until, phases, tmp_path, monkeypatch):
    done, imitate = [], script.imitate
    monkeypatch.setattr(script, "imitate", lambda *args: done.append(1) or imitate(*args))
    small = {"env_id": "Reacher-v5", "num_envs": 4, "num_steps": 50, "eval_episodes": 1, "eval_every": 10**6}
    small |= {"backtracking_updates": 1, "recall_every": recall_every, "recall_until": until}
    script.main(Args(run_dir=tmp_path / "run", total_timesteps=1600, **small))
    torch.use_deterministic_algorithms(False)
    assert len(done) == phases


def test_what_recall_logs_ends_with_it(tmp_path, capsys):
    small = {"env_id": "Reacher-v5", "num_envs": 4, "num_steps": 50, "eval_episodes": 1, "eval_every": 200}
    small |= {"backtracking_updates": 1, "trace_limit": 1e6, "total_timesteps": 1600}
    script.main(Args(run_dir=tmp_path / "run", recall_until=0.5, **small))
    assert "no recall phase" not in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for tag in ("recall/imitation_loss", "recall/imitation_kl", "recall/start_value", "recall/trace_survival"):
        assert events.Scalars(tag)[-1].step == 800, tag
    assert [event.step for event in events.Images("pictures/traces")] == [1000]
    assert [event.step for event in events.Scalars("losses/kl")] == [*range(200, 1601, 200)]
    script.main(Args(run_dir=tmp_path / "short", recall_until=0.1, **small))
    assert "before --recall-until 0.1\n" in capsys.readouterr().err
    small |= {"num_steps": 8, "total_timesteps": 800, "recall_every": 1}  # in 80 steps no episode ends
    script.main(Args(run_dir=tmp_path / "no_episode", recall_until=0.1, **small))
    assert "before --recall-until 0.1\n" in capsys.readouterr().err
    torch.use_deterministic_algorithms(False)
