"""The mathematics of recall_trpo.py against torch.distributions, explicit matrices, enumeration and real dynamics."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as exact_kl_divergence
from torch.nn.utils import parameters_to_vector

import recall_trpo as script
from recall_trpo import Actor, Args, BacktrackingModel, Critic, Normaliser, Rollout, Tuples

torch.set_num_threads(1)
STATE_DIM, ACTION_DIM = 3, 2


# ------------------------------------------------------------------------------------------------------ helpers


def arguments(**changes):
    return Args(device="cpu", **{"trace_length": 5} | changes)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def networks(seed=0, hidden=4):
    """A critic and an actor whose policy differs from state to state, with a normaliser that has seen something."""
    torch.manual_seed(seed)
    actor = Actor(STATE_DIM, ACTION_DIM, hidden)
    critic = Critic(actor.normaliser, STATE_DIM, hidden)
    actor.normaliser.add(2 * randn(100, STATE_DIM, seed=9) + 1)
    actor.net[-1].weight.data.mul_(100)
    actor.log_std.data.copy_(torch.tensor([-0.3, 0.2]))
    return actor, critic


def policy(actor, states):
    mean = actor.net(actor.normaliser(states))
    return Independent(Normal(mean, actor.log_std.exp().expand_as(mean)), 1)


def random_tuples(size=64, seed=0):
    states, next_states = randn(size, STATE_DIM, seed=seed), randn(size, STATE_DIM, seed=seed + 1)
    actions, rewards = randn(size, ACTION_DIM, seed=seed + 2).tanh(), randn(size, seed=seed + 3)
    return Tuples(states, actions, rewards, next_states, randn(size, seed=seed + 4))


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(list(parameters), lr=lr)


class Line:
    """s' = s + 0.3 a in two dimensions; ends beyond 1 and after `limit` steps. States also count the steps."""

    def __init__(self, limit, seed=0):
        self.limit, self.rng = limit, np.random.default_rng(seed)

    def reset(self):
        self.state, self.rewards = np.append(self.rng.uniform(-0.5, 0.5, 2), 0.0).astype(np.float32), []
        return self.state.copy(), {}

    def step(self, action):
        action = action.clip(-1, 1)  # as the environment of a run does
        self.state = (self.state + np.append(0.3 * action, 1.0)).astype(np.float32)
        self.rewards.append(float(action[0]))
        terminated, truncated = bool(np.abs(self.state[:2]).max() > 1), bool(self.state[2] >= self.limit)
        episode = {"episode": {"r": sum(self.rewards), "l": len(self.rewards)}} if terminated or truncated else {}
        return self.state.copy(), float(action[0]), terminated, truncated, episode


def rollouts(count, num_steps=5, limits=(7, 4)):
    """So many rollouts in lines of these limits, and what was said of the last episode of each."""
    envs, made = [Line(limit, i) for i, limit in enumerate(limits)], []
    states, (actor, _) = np.stack([env.reset()[0] for env in envs]), networks()
    for _ in range(count):
        rollout, states, metrics = script.collect_rollout(envs, states, actor, num_steps)
        made.append((rollout, metrics))
    return made


def buffer_of(made, **changes):
    buffer, under_way = [], [[] for _ in range(made[0][0].rewards.shape[1])]
    for rollout, _ in made:
        script.add_trajectories(buffer, under_way, rollout, arguments(**changes))
    return buffer


# ------------------------------------------------------------------------------------------------------ networks


def test_the_policy_is_a_gaussian_of_the_network():
    actor, _ = networks()
    states, actions = randn(50, STATE_DIM), randn(50, ACTION_DIM, seed=1)
    torch.testing.assert_close(actor(states).log_prob(actions).sum(-1), policy(actor, states).log_prob(actions))


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
    log_probs = actor.log_prob_of_clipped(states, actions), policy(actor, states).log_prob(actions)
    right, wrong = (torch.cat(torch.autograd.grad(log_prob.mean(), last)).abs() for log_prob in log_probs)
    assert right.max() < 0.01 < 0.1 < wrong.min()


def test_actions_in_numpy_are_those_of_the_policy():
    """Greedy ones its means, which draw no random number; others with its deviation."""
    actor, _ = networks()
    states = randn(50, STATE_DIM)
    means = policy(actor, states).mean.detach().numpy()
    state = torch.get_rng_state()
    np.testing.assert_allclose(script.act(actor, states.numpy(), greedy=True), means, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    noise = np.stack([script.act(actor, states.numpy()) - means for _ in range(2000)])
    np.testing.assert_allclose(noise.mean((0, 1)), 0, atol=0.02)
    np.testing.assert_allclose(noise.std((0, 1)), actor.log_std.detach().exp(), rtol=0.02)


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
    torch.testing.assert_close(script.kl_divergence(old(states), new(states)), expected)


def explicit_fisher_matrix(actor, states):
    """The Hessian of the mean KL divergence from the policy, where that is 0."""
    names, weights = zip(*actor.named_parameters(), strict=True)
    sizes, old = [weight.numel() for weight in weights], policy(actor, states)
    old = Independent(Normal(old.mean.detach(), old.stddev.detach()), 1)

    def kl(vector):
        parts = zip(names, weights, vector.split(sizes), strict=True)
        new = {name: part.view_as(weight) for name, weight, part in parts}
        return exact_kl_divergence(old, Independent(torch.func.functional_call(actor, new, (states,)), 1)).mean()

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
    return float((advantages * (policy(actor, states).log_prob(actions) - old_log_probs).exp()).mean().detach())


def test_the_step_is_the_natural_gradient_as_long_as_the_trust_region_allows():
    actor, _ = networks()
    states, actions, advantages = batch_of(actor)
    before, args = parameters_to_vector(actor.parameters()).detach(), arguments(max_kl=1e-6, cg_iterations=200)
    loss = (advantages * policy(actor, states).log_prob(actions)).mean()  # the plain policy gradient
    gradient = parameters_to_vector(torch.autograd.grad(loss, [*actor.parameters()]))
    matrix = explicit_fisher_matrix(actor, states) + 0.1 * torch.eye(len(before))
    direction = torch.linalg.solve(matrix, gradient)
    script.update_actor(actor, states, actions, advantages, args)
    step = parameters_to_vector(actor.parameters()).detach() - before
    assert torch.cosine_similarity(step, direction, dim=0) > 0.999
    assert float(0.5 * step @ matrix @ step) == pytest.approx(1e-6, rel=0.02)


def test_a_step_improves_the_surrogate_within_the_bound():
    for max_kl in (1e-4, 0.01, 1.0):
        actor, _ = networks()
        batch = batch_of(actor)
        old, old_log_probs = copy.deepcopy(actor), policy(actor, batch[0]).log_prob(batch[1]).detach()
        before = surrogate(actor, old_log_probs, *batch)
        losses = script.update_actor(actor, *batch, arguments(max_kl=max_kl))
        gain = surrogate(actor, old_log_probs, *batch) - before
        kl = float(exact_kl_divergence(policy(old, batch[0]), policy(actor, batch[0])).mean().detach())
        assert gain > 0 and 0.1 * max_kl < kl <= max_kl
        assert float(losses["losses/kl"]) == pytest.approx(kl, rel=1e-3)
        assert float(losses["losses/policy_loss"]) == pytest.approx(-gain, rel=1e-3, abs=1e-6)
        entropy = float(policy(actor, batch[0]).entropy()[0].detach())
        assert float(losses["losses/entropy"]) == pytest.approx(entropy, rel=1e-4)


def test_the_line_search_takes_the_longest_step_that_is_allowed():
    """Each a fifth shorter than the last; and it says what was gained."""
    actor, _ = networks()
    states, actions, advantages = batch = batch_of(actor)
    old, weights = copy.deepcopy(actor), parameters_to_vector(actor.parameters()).detach()
    old_log_probs = policy(old, states).log_prob(actions).detach()
    loss = surrogate(actor, old_log_probs, *batch)
    gradient = (advantages * policy(actor, states).log_prob(actions)).mean()
    step = 3 * parameters_to_vector(torch.autograd.grad(gradient, [*actor.parameters()]))
    allowed = []
    for i in range(10):
        tried = copy.deepcopy(actor)
        torch.nn.utils.vector_to_parameters(weights + 0.8**i * step, tried.parameters())
        kl = float(exact_kl_divergence(policy(old, states), policy(tried, states)).mean().detach())
        allowed.append((surrogate(tried, old_log_probs, *batch) > loss and kl <= 0.01, kl))
    first = [good for good, _ in allowed].index(True)
    assert first > 1
    losses = script.line_search(actor, step, *batch, arguments(max_kl=0.01))
    assert losses["losses/line_search_steps"] == first
    assert float(losses["losses/kl"]) == pytest.approx(allowed[first][1], rel=1e-3)
    expected = weights + 0.8**first * step
    torch.testing.assert_close(parameters_to_vector(actor.parameters()).detach(), expected, rtol=1e-5, atol=1e-6)
    gain = surrogate(actor, old_log_probs, *batch) - loss
    assert float(losses["losses/policy_loss"]) == pytest.approx(-gain, rel=1e-3, abs=1e-6)


def test_the_line_search_refuses_what_breaks_the_bound_or_improves_nothing():
    actor, _ = networks()
    batch = batch_of(actor)
    gradient = (batch[2] * policy(actor, batch[0]).log_prob(batch[1])).mean()
    uphill = parameters_to_vector(torch.autograd.grad(gradient, [*actor.parameters()]))
    before = parameters_to_vector(actor.parameters()).detach().clone()
    for step in (1e4 * uphill, -0.01 * uphill, float("nan") * uphill):
        losses = script.line_search(actor, step, *batch, arguments())
        assert torch.equal(parameters_to_vector(actor.parameters()), before)
        assert (losses["losses/kl"], losses["losses/policy_loss"], losses["losses/line_search_steps"]) == (0, 0, 10)


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


def test_an_iteration_gives_each_step_its_own_advantage_and_bootstraps_where_an_episode_was_cut(monkeypatch):
    """Advantages are normalised; losses/explained_variance is of the values before the update."""
    (actor, critic), (rollout, _), seen = networks(), rollouts(1)[0], {}
    assert rollout.truncated.any()
    args = arguments(critic_epochs=1, gamma=0.9, gae_lambda=0.0)
    with torch.no_grad():
        values, next_values = (critic(torch.from_numpy(s)).numpy() for s in (rollout.states, rollout.next_states))
    monkeypatch.setattr(script, "update_actor", lambda *a: seen.update(actor=a[1:4]) or {})
    monkeypatch.setattr(Critic, "rescale", lambda self, returns: seen.update(returns=returns))
    losses = script.update_trpo(actor, critic, sgd(critic.net.parameters()), rollout, args)
    returns = rollout.rewards + 0.9 * next_values * ~rollout.terminated  # with lambda = 0
    np.testing.assert_allclose(seen["returns"].numpy(), returns.ravel(), rtol=1e-4, atol=1e-4)
    states, actions, advantages = seen["actor"]
    assert np.array_equal(states, rollout.states.reshape(-1, STATE_DIM))
    assert np.array_equal(actions, rollout.actions.reshape(-1, ACTION_DIM))
    expected = returns - values
    scaled = (expected - expected.mean()) / expected.std(ddof=1)
    np.testing.assert_allclose(advantages.numpy(), scaled.ravel(), rtol=1e-3, atol=1e-4)
    explained = 1 - expected.var() / returns.var()
    assert losses["losses/explained_variance"] == pytest.approx(explained, rel=1e-3, abs=1e-4)


def test_the_critic_learns_the_returns():
    """Also those that are far from all earlier ones. Without a discount the return of a step is its reward."""
    for epochs, iterations, scale in ((10, 20, 100.0), (200, 1, 0.0)):
        actor, critic = networks(hidden=32)
        optimizer, states = torch.optim.Adam(critic.net.parameters(), lr=1e-2), randn(50, 10, STATE_DIM).numpy()
        rewards = np.float32(300 + scale * states[..., 0])
        actions, never = np.zeros((50, 10, ACTION_DIM), np.float32), np.zeros((50, 10), bool)
        rollout = Rollout(states, actions, rewards, states, never, never)
        args = arguments(gamma=0.0, critic_epochs=epochs, critic_batch_size=64)
        for _ in range(150 if scale == 0 else 0):
            critic.rescale(randn(500))
        for _ in range(iterations):
            script.update_trpo(actor, critic, optimizer, rollout, args)
        errors = critic(torch.from_numpy(states)).detach().numpy() - rewards
        assert np.abs(errors).mean() < (10 if scale else 6)


def test_a_rollout_holds_what_happened():
    """Among it the last state of each episode, not the first of the next, and actions before they are clipped."""
    made, last = rollouts(6), None
    for rollout, metrics in made:
        ended = rollout.terminated | rollout.truncated
        step = rollout.next_states - rollout.states
        np.testing.assert_allclose(step[..., :2], 0.3 * rollout.actions.clip(-1, 1), atol=1e-5)
        np.testing.assert_allclose(step[..., 2], 1)
        assert np.array_equal(rollout.states[1:][~ended[:-1]], rollout.next_states[:-1][~ended[:-1]])
        assert (rollout.states[1:][ended[:-1]][:, 2] == 0).all()
        assert rollout.states.dtype == rollout.next_states.dtype == rollout.rewards.dtype == np.float32
        np.testing.assert_allclose(rollout.rewards, rollout.actions[..., 0].clip(-1, 1), rtol=1e-5)
        if last is not None:  # the next rollout goes on where this one ended
            goes_on = ~(last.terminated | last.truncated)[-1]
            assert np.array_equal(rollout.states[0][goes_on], last.next_states[-1][goes_on])
        last = rollout
        if ended.any():
            t, i = max(zip(*np.nonzero(ended), strict=True))
            assert metrics["charts/episodic_length"] == rollout.next_states[t, i, 2]
    assert max(np.abs(rollout.actions).max() for rollout, _ in made) > 1


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


def test_the_buffer_holds_the_newest_whole_trajectories_with_the_values_of_their_next_states():
    """Without tuples of a terminal next state, which has no value."""
    made = rollouts(30)
    for start_states in ("return", "reward"):
        buffer = buffer_of(made, buffer_size=60, start_states=start_states, gamma=0.9)
        episodes, lengths = whole_episodes(made), [len(columns[0]) for _, columns in buffer]
        assert 50 < sum(lengths) <= 60 < sum(map(len, episodes))
        assert any(episode[-1][-1] for episode in episodes[-len(lengths) :])
        for (total, columns), episode in zip(buffer, episodes[-len(lengths) :], strict=True):
            *kept, terminated = map(np.array, zip(*episode, strict=True))
            rewards = kept[2]
            assert total == pytest.approx(rewards.sum(), rel=1e-5, abs=1e-6)
            for column, expected in zip(columns[:4], kept, strict=True):
                assert np.array_equal(column.numpy(), expected[~terminated])
            for t in range(len(columns[0])):
                to_come = [*rewards[t + 1 :]] + [rewards.mean()] * (0 if terminated[-1] else len(rewards))
                later = sum(0.9**k * reward for k, reward in enumerate(to_come))
                value = later if start_states == "return" else rewards[t]
                assert columns[4][t] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_the_buffer_keeps_one_trajectory_that_is_longer_than_itself_and_no_empty_one():
    assert len(buffer_of(rollouts(4), buffer_size=3)) == 1
    made = rollouts(1, limits=(7,))
    ends = np.ones_like(made[0][0].terminated)
    made = [(made[0][0]._replace(terminated=ends), {})]  # each step is an episode that ends in a terminal state
    assert buffer_of(made) == []


def test_the_buffer_is_what_a_checkpoint_can_hold(tmp_path):
    buffer = buffer_of(rollouts(12))
    torch.save(buffer, tmp_path / "buffer.pt")
    for (total, columns), (other, others) in zip(buffer, torch.load(tmp_path / "buffer.pt"), strict=True):
        assert total == other and all(torch.equal(*pair) for pair in zip(columns, others, strict=True))


def test_high_value_states_are_the_best_tuples_of_the_best_trajectories():
    buffer = buffer_of(rollouts(40))
    tuples = script.high_value_states(buffer, arguments(top_trajectories=8, top_fraction=0.5))
    seen = sorted(buffer, key=lambda episode: -episode[0])[:8]
    values = torch.cat([columns[4] for _, columns in seen]).sort(descending=True).values
    assert torch.equal(tuples.values, values[: math.ceil(0.5 * len(values))])
    known = {tuple(row) for _, columns in seen for row in torch.cat([c.view(len(c), -1) for c in columns], 1).tolist()}
    rows = torch.cat([column.view(len(column), -1) for column in tuples], 1).tolist()
    assert len(rows) > 5 and {tuple(row) for row in rows} <= known
    exchanged = script.high_value_states(buffer, arguments(top_trajectories=8, top_fraction=0.5, recall="forward"))
    assert torch.equal(exchanged.states, torch.cat((tuples.next_states, tuples.rewards[:, None]), 1))
    assert torch.equal(exchanged.next_states, torch.cat((tuples.states, torch.zeros(len(rows), 1)), 1))
    for name in ("actions", "rewards", "values"):
        assert torch.equal(getattr(exchanged, name), getattr(tuples, name))


# ------------------------------------------------------------------------------------------------------ recall traces
# The model itself, its update and recall_traces are those of recall_sac.py to the letter: tests/test_recall_sac.py.


def exchanged(tuples):
    """Tuples for a forward model, as high_value_states gives them."""
    outcomes = torch.cat((tuples.next_states, tuples.rewards.unsqueeze(-1)), -1)
    return tuples._replace(states=outcomes, next_states=nn.functional.pad(tuples.states, (0, 1)))


def fitted(tuples):
    torch.manual_seed(0)
    model = BacktrackingModel(tuples.states.shape[1], tuples.actions.shape[1])
    model.normalise_by(tuples)
    return model


def normal(x):
    return (x - x.mean(0)) / x.std(0)


def test_a_forward_model_is_a_backtracking_model_of_exchanged_tuples():
    """Its second factor is the likelihood of change of state and reward, given state and action (App. G)."""
    tuples = random_tuples(200)
    data = exchanged(tuples)
    model = fitted(data)
    outcomes = normal(torch.cat((tuples.next_states - tuples.states, tuples.rewards.unsqueeze(-1)), -1))
    mean, log_std = model.predict_change(tuples.actions, data.next_states)
    expected = Independent(Normal(mean, log_std.exp()), 1).log_prob(outcomes)
    _, of_outcomes = model.log_prob(data.states, data.actions, data.next_states)
    torch.testing.assert_close(of_outcomes, expected, rtol=1e-4, atol=1e-4)


def test_what_never_changes_stays_as_it_is_when_imagined():
    tuples = random_tuples(50)
    tuples.states[:, 0] = tuples.next_states[:, 0] = tuples.rewards[:] = 7.3
    states, _, _ = script.recall_traces(fitted(tuples), tuples.next_states, arguments())
    data, (actor, _) = exchanged(tuples), networks()
    rollout = script.forward_rollout(fitted(data), actor, data.next_states, arguments(trace_limit=1e6))
    for imagined in (states[..., 0].numpy(), rollout.next_states[..., 0], rollout.rewards):
        np.testing.assert_allclose(imagined, np.full((5, 50), 7.3), atol=1e-3)
    assert states.std((0, 1))[1:].min() > 0.1 < rollout.next_states.std((0, 1))[1:].min()


@pytest.fixture(scope="module")
def linear():
    """A stable linear system s' = M s + B a with reward s_1, its random transitions, and a forward model of them."""
    rotation = torch.tensor([[0.9, -0.3, 0.0], [0.3, 0.9, 0.0], [0.0, 0.2, 0.9]])
    pushes = torch.tensor([[0.3, 0.0], [0.0, 0.3], [0.2, -0.2]])
    states, actions = [torch.zeros(64, 3)], [randn(64, 2, seed=t).clamp(-0.95, 0.95) for t in range(60)]
    for action in actions:
        states.append(states[-1] @ rotation.T + action @ pushes.T)
    states, actions = torch.stack(states[20:]), torch.stack(actions[20:])
    now, later = states[:-1].flatten(0, 1), states[1:].flatten(0, 1)
    tuples = Tuples(now, actions.flatten(0, 1), now[:, 0], later, now[:, 0])
    data = exchanged(tuples)
    model = fitted(data)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 1500)  # to an end without a jolt
    for _ in range(1500):
        script.update_backtracking_model(model, optimizer, data, arguments(backtracking_batch_size=256))
        schedule.step()
    return rotation, pushes, tuples, model


def test_imagined_experience_follows_a_system_with_known_linear_dynamics(linear):
    """Its actions are the policy's draws, its rewards those of the states; what leaves the data is cut, begins anew."""
    rotation, pushes, tuples, model = linear
    (actor, _), starts = networks(), exchanged(tuples).next_states[:200]
    rollout = script.forward_rollout(model, actor, starts, arguments(trace_length=8, state_noise=0.0, trace_limit=2.0))
    states, actions, rewards, next_states = (torch.from_numpy(column) for column in rollout[:4])
    assert torch.equal(states[0], starts[:, :-1]) and not rollout.terminated.any()
    gaussian = policy(actor, states).base_dist
    noise = (actions - gaussian.mean) / gaussian.stddev
    assert noise.mean().item() == pytest.approx(0, abs=0.1) and noise.std().item() == pytest.approx(1, rel=0.1)
    spread, mean = tuples.states.std(0), tuples.states.mean(0)
    exact = states @ rotation.T + actions.clamp(-1, 1) @ pushes.T
    assert ((next_states - exact) / spread).abs().mean() < 0.05
    assert ((rewards - states[..., 0]) / spread[0]).abs().mean() < 0.05
    left = torch.from_numpy(rollout.truncated)
    assert torch.equal(left, ((next_states - mean).abs() > 2 * spread).any(-1)) and 0.05 < left.float().mean() < 0.95
    expected = torch.where(left[:-1, :, None], starts[:, :-1], next_states[:-1])
    assert torch.equal(states[1:], expected)


def test_imitation_raises_the_log_probability_of_the_steps_of_traces_that_have_not_ended():
    """Eq. (3)"""
    actor, _ = networks()
    states, actions = randn(4, 9, STATE_DIM), randn(4, 9, ACTION_DIM, seed=1).tanh()
    inside = (randn(4, 9, seed=2) > -1).int().cumprod(0).bool()
    assert 0 < inside.sum() < 36
    trained, expected = copy.deepcopy(actor), copy.deepcopy(actor)
    loss = -policy(expected, states[inside]).log_prob(actions[inside]).mean()
    parameters = [*expected.parameters()]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= 0.01 * gradient
    losses = script.imitate(trained, sgd(trained.parameters(), 0.01), states, actions, inside)
    assert float(losses["recall/imitation_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float(losses["recall/trace_length"]) == pytest.approx(float(inside.sum()) / 9)
    for parameter, other in zip(trained.parameters(), parameters, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)
    before = parameters_to_vector(trained.parameters()).detach().clone()
    losses = script.imitate(trained, sgd(trained.parameters()), states, actions, torch.zeros(4, 9, dtype=torch.bool))
    assert torch.equal(parameters_to_vector(trained.parameters()), before) and losses == {"recall/trace_length": 0}


def test_imitation_changes_the_policy_no_more_than_it_may():
    states = randn(100, STATE_DIM, seed=5)
    for bound in (0.0, 1e-4, 0.01, 1e9):
        actor, _ = networks()
        old, inside = copy.deepcopy(actor), torch.ones(5, 10, dtype=torch.bool)
        for n in range(5):
            traces = randn(5, 10, STATE_DIM, seed=n), randn(5, 10, ACTION_DIM, seed=n + 9)
            script.imitate(actor, sgd(actor.parameters()), *traces, inside)
        whole = parameters_to_vector(actor.parameters()).detach() - parameters_to_vector(old.parameters()).detach()
        losses = script.limit_change(actor, old, states, arguments(imitation_kl=bound))
        kl = float(exact_kl_divergence(policy(old, states), policy(actor, states)).mean())
        assert float(losses["recall/imitation_kl"]) == pytest.approx(kl, abs=1e-6, rel=1e-3)
        change = parameters_to_vector(actor.parameters()).detach() - parameters_to_vector(old.parameters()).detach()
        if bound == 1e9:
            assert torch.equal(change, whole)
            continue
        assert 0.5 * bound <= kl <= bound + 1e-7
        if bound:  # it goes straight back
            torch.testing.assert_close(change, float(change.norm() / whole.norm()) * whole, rtol=1e-2, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ main


SMALL = {"env_id": "Reacher-v5", "num_envs": 4, "num_steps": 50, "eval_episodes": 1, "backtracking_updates": 1}


def test_traces_are_as_long_as_in_tables_1_and_2(tmp_path):
    small = SMALL | {"num_envs": 1, "num_steps": 2, "total_timesteps": 2, "recall": "none"}
    for name, length in (("Ant-v5", 50), ("Humanoid-v5", 50), ("HalfCheetah-v5", 20), ("Hopper-v5", 10)):
        run = script.main(Args(run_dir=str(tmp_path / name), **small | {"env_id": name}))
        assert json.loads((run / "args.json").read_text())["trace_length"] == length


def test_recall_phases_come_as_often_and_as_long_as_told(tmp_path, monkeypatch):
    """Five imitation updates each. From the next evaluation on what was logged stays as it was."""
    done, imitate = [], script.imitate
    monkeypatch.setattr(script, "imitate", lambda *args: done.append(1) or imitate(*args))
    for recall_every, until, phases in ((1, 1.0, 8), (3, 1.0, 2), (2, 0.5, 2), (1, 0.1, 0)):
        small = SMALL | {"recall_every": recall_every, "recall_until": until, "eval_every": 200}
        run = script.main(Args(run_dir=str(tmp_path / f"{recall_every} {until}"), total_timesteps=1600, **small))
        assert len(done) == 5 * phases
        done.clear()
        events = EventAccumulator(str(run)).Reload()
        if phases == 2 and recall_every == 2:
            curve = [(event.step, event.value) for event in events.Scalars("recall/imitation_loss")]
            assert [step for step, _ in curve] == [*range(400, 1601, 200)]
            assert len({value for step, value in curve if step >= 800}) == 1
        assert ("recall/imitation_loss" in events.Tags()["scalars"]) == (phases > 0)


def test_each_of_the_most_valuable_states_is_the_start_of_about_as_many_traces(tmp_path, monkeypatch):
    starts, valuable = [], []
    recall_traces, high_value_states = script.recall_traces, script.high_value_states
    monkeypatch.setattr(script, "recall_traces", lambda m, s, a: starts.append(s) or recall_traces(m, s, a))
    monkeypatch.setattr(script, "high_value_states", lambda *a: valuable.append(high_value_states(*a)) or valuable[-1])
    for num_traces in (8, 60):  # fewer and more than there are valuable states
        starts.clear(), valuable.clear()
        small = SMALL | {"recall_until": 1.0, "recall_every": 2, "num_traces": num_traces, "top_trajectories": 4}
        script.main(Args(run_dir=str(tmp_path / str(num_traces)), total_timesteps=400, **small))
        (tuples,) = valuable
        assert [len(s) for s in starts] == 5 * [num_traces]
        number = {tuple(row): i for i, row in enumerate(tuples.next_states.tolist())}
        counts = np.bincount([number[tuple(row)] for row in torch.cat(starts).tolist()], minlength=len(number))
        shares = np.bincount(np.arange(5 * num_traces) % len(number), minlength=len(number))
        assert (40 < len(number) <= 50) and (counts == shares).all()


def test_episodes_are_cut_at_checkpoints(tmp_path, monkeypatch):
    """As by a time limit; all others go on from rollout to rollout."""
    seen, update = [], script.update_trpo
    monkeypatch.setattr(script, "update_trpo", lambda *args: seen.append(args[3]) or update(*args))
    small = SMALL | {"num_steps": 20, "checkpoint_every": 160, "recall": "none"}
    script.main(Args(run_dir=str(tmp_path / "run"), total_timesteps=480, **small))
    cut = [rollout.truncated[-1].all() for rollout in seen]
    assert cut == [False, True, False, True, False, True]
    for rollout, later in zip(seen, seen[1:], strict=False):
        goes_on = ~rollout.truncated[-1]
        assert np.array_equal(rollout.next_states[-1][goes_on], later.states[0][goes_on])
        assert not (rollout.next_states[-1][~goes_on] == later.states[0][~goes_on]).all(-1).any()
