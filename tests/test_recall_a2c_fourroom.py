"""The mathematics of recall_a2c_fourroom.py against closed forms, enumeration and independent implementations."""

import copy
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import recall_a2c_fourroom as script
from envs.four_room import FourRoomEnv, FourRoomMaze, FourRoomVectorEnv
from recall_a2c_fourroom import Args, BacktrackingModel, Rollout, TrajectoryBuffer, Tuples, cut_loops

torch.set_num_threads(1)
RECALLS = ("true", "learned", "random")


# ------------------------------------------------------------------------------------------------------ helpers


def make_actor(num_states=49):
    return script.mlp(nn.Embedding(num_states, 64), 4)


def make_critic(num_states=49):
    return script.mlp(nn.Embedding(num_states, 64), 1, gain=1.0)


@torch.no_grad()
def policy_of(actor):
    """pi(a | s) of every state, (S, A), in float64."""
    return actor(torch.arange(actor[0].num_embeddings)).double().softmax(-1).numpy()


def perturbed(module, seed=0, scale=0.3):
    """The module with noise on all its weights: those at initialisation are too close to uniform to tell much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def forward_transitions(maze):
    """All (cell, action, next cell) in which an agent can act: from every free cell but the terminal goal."""
    cells = [cell for cell in np.flatnonzero(maze.free).tolist() if cell != maze.goal]
    return [(cell, action, int(maze.next_cell[cell, action])) for cell in cells for action in range(4)]


def exact_predecessors(maze):
    """{(action, next cell): set of cells}, by brute force over the forward dynamics."""
    predecessors = defaultdict(set)
    for cell, action, after in forward_transitions(maze):
        predecessors[action, after].add(cell)
    return predecessors


def joint(model, next_state):
    """q(s_t, a_t | s_{t+1} = next_state) of every state and action, (S, A) in float64, through log_prob."""
    states, actions = (torch.from_numpy(grid.ravel()) for grid in np.indices(model.predecessors.shape))
    with torch.no_grad():
        log_probs = model.log_prob(states, actions, torch.full((len(states),), int(next_state)))
    return log_probs.double().exp().numpy().reshape(model.predecessors.shape)


def make_tuples(states, actions, next_states, rewards=None, returns=None):
    states, actions, next_states = (np.asarray(column, dtype=np.int64) for column in (states, actions, next_states))
    rewards = np.zeros(len(states)) if rewards is None else np.asarray(rewards, dtype=float)
    returns = np.zeros(len(states)) if returns is None else np.asarray(returns, dtype=float)
    return Tuples(states, actions, rewards, next_states, returns)


def triples(tuples):
    """(s_t, a_t, s_{t+1}) as tensors."""
    return [torch.from_numpy(column) for column in (tuples.states, tuples.actions, tuples.next_states)]


def random_transitions(maze, number, rng, neighbours_only=False):
    """Tuples of forward transitions, drawn with an arbitrary weight each; neighbours_only leaves out the bumps."""
    transitions = np.array([t for t in forward_transitions(maze) if not (neighbours_only and t[0] == t[2])])
    weights = rng.exponential(size=len(transitions))
    chosen = rng.choice(len(transitions), size=number, p=weights / weights.sum())
    return make_tuples(*transitions[chosen].T)


def within_five_sigma(counts, probs, number):
    """Whether binomial counts are within five standard deviations, and a margin of 5 for the rarest outcomes.

    The margin is there because a binomial with a mean below 1 is Poisson, whose tail is heavier than a normal one.
    """
    return (np.abs(counts - number * probs) <= 5 * np.sqrt(number * probs * (1 - probs)) + 5).all()


# ------------------------------------------------------------------------------------------------------ sample


def draw(probs, u):
    """Indices for rows of probabilities (B, k) and a random number, or one for each row (B,)."""
    return script.sample(probs.cumsum(axis=1), np.broadcast_to(u, len(probs))[:, None])


def rounded_rows(rng, number):
    """Float32 probabilities that add up to less than 1 in float32, with zeros at the start, inside and at the end."""
    rows = []
    while len(rows) < number:
        row = rng.dirichlet(np.full(300, 0.5)).astype(np.float32)
        row[[0, 1, 100, 101, 298, 299]] = 0
        row /= row.sum()
        if row.cumsum()[-1] < 1:
            rows.append(row)
    return np.stack(rows)


@pytest.mark.parametrize("u", [*np.float32([0, 1e-30, 0.5, 1 - 2**-24]), 1e-300, 1 - 2**-53])
def test_sample_never_returns_an_index_of_probability_zero(u):
    """Neither for the least and the largest number of torch.rand, 0 and 1 - 2^-24, nor for those of float64."""
    rows = rounded_rows(np.random.default_rng(0), 50)
    if u > 0.9:
        assert (rows.cumsum(axis=1)[:, -1] < 1).all() and (rows[:, -1] == 0).all()
    chosen = draw(rows, u)
    assert (rows[np.arange(len(rows)), chosen] > 0).all()
    one_hot = np.eye(5, dtype=np.float32)
    assert (draw(one_hot, u) == np.arange(5)).all()


def test_sample_inverts_the_cumulative_sum():
    """Rows of quarters, so that the boundaries are exact: u in [0, 1/4) gives the first quarter, and so on."""
    probs = np.array([[0.25, 0.0, 0.5, 0.25], [0.0, 0.5, 0.5, 0.0]])
    expected = {0.0: (0, 1), 0.2499: (0, 1), 0.25: (2, 1), 0.4999: (2, 1), 0.5: (2, 2), 0.7499: (2, 2), 0.75: (3, 2)}
    for u, indices in expected.items():
        assert tuple(draw(probs, u)) == indices


def test_sample_draws_every_row_on_its_own_with_its_frequencies():
    number = 40_000
    rows = np.random.default_rng(1).dirichlet(np.ones(4), size=2)
    torch.manual_seed(0)
    first, second = draw(np.tile(rows, (number, 1)), torch.rand(2 * number).numpy()).reshape(number, 2).T
    for drawn, row in zip((first, second), rows, strict=True):
        assert within_five_sigma(np.bincount(drawn, minlength=4), row, number)
    pairs = np.bincount(4 * first + second, minlength=16)
    assert within_five_sigma(pairs, np.outer(*rows).ravel(), number)


# ------------------------------------------------------------------------------------------------------ actor-critic


def gae_by_definition(rollout, values, next_values, gamma, lam):
    """(1 - lam) sum_n lam^(n-1) A^(n), the weight of all longer ones on the last, A^(n) the n-step advantage."""
    rewards, terminated, done = rollout.rewards, rollout.terminated, rollout.terminated | rollout.truncated
    advantages = np.zeros_like(values)
    for t, i in np.ndindex(*values.shape):
        end = next((k for k in range(t, len(values)) if done[k, i]), len(values) - 1)
        longest = end - t + 1
        for n in range(1, longest + 1):
            n_step = sum(gamma**k * rewards[t + k, i] for k in range(n))
            if not terminated[t + n - 1, i]:
                n_step += gamma**n * next_values[t + n - 1, i]
            weight = lam ** (n - 1) * (1 - lam if n < longest else 1)
            advantages[t, i] += weight * (n_step - values[t, i])
    return advantages


def random_rollout(rng, num_steps, num_envs):
    """Rewards and ends drawn at random, and values that agree with each other inside an episode."""
    rewards, values = rng.normal(size=(2, num_steps, num_envs))
    terminated = rng.random((num_steps, num_envs)) < 0.2
    done = terminated | (rng.random((num_steps, num_envs)) < 0.2)
    next_values = np.where(done, rng.normal(size=done.shape), np.vstack((values[1:], rng.normal(size=num_envs))))
    empty = np.zeros(done.shape, dtype=np.int64)
    columns = {"states": empty, "actions": empty, "rewards": rewards, "next_states": empty}
    return Rollout(**columns, terminated=terminated, truncated=done & ~terminated), values, next_values


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (0.7, 1.0), (1.0, 0.5), (0.0, 0.3)])
def test_generalized_advantages_are_the_weighted_n_step_advantages(gamma, lam):
    rollout, values, next_values = random_rollout(np.random.default_rng(0), 9, 40)
    assert rollout.truncated.any() and rollout.terminated.any()
    expected = gae_by_definition(rollout, values, next_values, gamma, lam)
    actual = script.generalized_advantages(rollout, values, next_values, gamma, lam)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def real_rollout(num_envs=16, num_steps=8, seed=0, **kwargs):
    envs = FourRoomVectorEnv(num_envs, **{"size": 7, "start": "random", "max_steps": 5, **kwargs})
    states, _ = envs.reset(seed=seed)
    policy = np.random.default_rng(seed).dirichlet(np.ones(4), size=len(envs.maze.free))
    torch.manual_seed(seed)
    return script.collect_rollout(envs, states, policy, num_steps)[0]


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.01, 1e6])
def test_update_actor_critic_equals_an_independent_implementation(max_grad_norm):
    """Three updates, with torch.distributions for the losses, and clipping and RMSprop written out in float64."""
    args = Args(max_grad_norm=max_grad_norm, ent_coef=0.3, vf_coef=0.7, gamma=0.9, gae_lambda=0.8)
    torch.manual_seed(0)
    actor, critic = perturbed(make_actor()), perturbed(make_critic(), seed=1)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.RMSprop(parameters, lr=args.learning_rate, eps=1e-5)
    actor_copy, critic_copy = copy.deepcopy(actor).double(), copy.deepcopy(critic).double()
    reference = [*actor_copy.parameters(), *critic_copy.parameters()]
    squares, clipped = [torch.zeros_like(parameter) for parameter in reference], []
    for update in range(3):
        rollout = real_rollout(seed=update)
        assert rollout.terminated.any() and rollout.truncated.any()
        log_probs, values, _ = script.evaluate_all_states(actor, critic)
        losses = script.update_actor_critic(optimizer, rollout, log_probs, values, args)

        both = rollout.states, rollout.next_states
        values, next_values = (critic_copy(torch.from_numpy(states)).squeeze(-1) for states in both)
        frozen = values.detach().numpy(), next_values.detach().numpy()
        advantages = torch.from_numpy(gae_by_definition(rollout, *frozen, args.gamma, args.gae_lambda))
        policy = torch.distributions.Categorical(logits=actor_copy(torch.from_numpy(rollout.states)))
        policy_loss = -(policy.log_prob(torch.from_numpy(rollout.actions)) * advantages).mean()
        value_loss = (advantages + values.detach() - values).square().mean()
        entropy = policy.entropy().mean()
        gradients = torch.autograd.grad(policy_loss + 0.7 * value_loss - 0.3 * entropy, reference)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        clipped.append(norm > max_grad_norm)
        with torch.no_grad():
            for parameter, gradient, square in zip(reference, gradients, squares, strict=True):
                gradient = gradient * min(1.0, max_grad_norm / norm)
                square.mul_(0.99).add_(0.01 * gradient**2)
                parameter -= args.learning_rate * gradient / (square.sqrt() + 1e-5)

        expected = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        assert losses == pytest.approx({f"losses/{name}": loss.item() for name, loss in expected.items()}, abs=1e-5)
        for ours, theirs in zip(parameters, reference, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
    assert all(clipped) == any(clipped) == (max_grad_norm < 100)


def test_one_pass_gives_the_policy_and_the_value_of_every_state():
    """Softmax and value of two hidden layers of 64 tanh units on one-hot states, written out in float64."""
    actor, critic = perturbed(make_actor()), perturbed(make_critic(), seed=1)
    log_probs, values, policy = script.evaluate_all_states(actor, critic)
    outputs = []
    for network in (actor, critic):
        table, weight, bias, last, offset = (parameter.detach().double().numpy() for parameter in network.parameters())
        assert table.shape == (49, 64) and weight.shape == (64, 64)
        outputs.append(np.tanh(np.tanh(table) @ weight.T + bias) @ last.T + offset)
    expected = np.exp(outputs[0]) / np.exp(outputs[0]).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(policy, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(log_probs.detach().numpy(), np.log(expected), rtol=0, atol=1e-5)
    np.testing.assert_allclose(values.detach().numpy(), outputs[1][:, 0], rtol=0, atol=1e-5)
    assert log_probs.shape == policy.shape == (49, 4) and values.shape == (49,)


@pytest.mark.parametrize("gain", [0.01, 1.0])
def test_networks_start_with_orthogonal_weights_of_their_gains(gain):
    """W W^T, or W^T W if that is smaller, is the square of the gain on the diagonal: 2, 2 and that of the outputs."""
    torch.manual_seed(0)
    first, _, second, _, last = script.mlp(nn.Embedding(225, 64), 4, gain=gain)
    for layer, square in ((first, 2), (second, 2), (last, gain**2)):
        weight = layer.weight.detach().double()
        weight = weight if len(weight) < len(weight.T) else weight.T
        torch.testing.assert_close(weight @ weight.T, square * torch.eye(len(weight)).double(), rtol=0, atol=1e-5)
    assert not second.bias.any() and not last.bias.any()


# ------------------------------------------------------------------------------------------------------ rollouts


def test_rollouts_equal_single_environments_and_go_on_where_the_last_one_ended():
    """The true next states also where an episode ended, against one FourRoomEnv each that replays the actions."""
    num_envs, settings = 6, {"size": 7, "start": "random", "max_steps": 4}
    envs, singles = FourRoomVectorEnv(num_envs, **settings), [FourRoomEnv(**settings) for _ in range(num_envs)]
    states, _ = envs.reset(seed=3)
    expected_states = [env.reset(seed=3 + i)[0] for i, env in enumerate(singles)]
    policy, ends = np.full((49, 4), 0.25), Counter()
    torch.manual_seed(0)
    for _ in range(12):
        rollout, states = script.collect_rollout(envs, states, policy, 7)
        for t, i in itertools.product(range(7), range(num_envs)):
            assert rollout.states[t, i] == expected_states[i]
            after, reward, terminated, truncated, _ = singles[i].step(int(rollout.actions[t, i]))
            assert rollout.next_states[t, i] == after
            assert rollout.rewards[t, i] == pytest.approx(reward)
            assert (rollout.terminated[t, i], rollout.truncated[t, i]) == (terminated, truncated)
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            expected_states[i] = singles[i].reset()[0] if terminated or truncated else after
        assert states.tolist() == expected_states
    assert min(ends["terminated"], ends["truncated"]) >= 5


def test_rollouts_follow_the_policy():
    envs = FourRoomVectorEnv(5_000, size=7, start="random")
    states, _ = envs.reset(seed=0)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), size=49)
    torch.manual_seed(0)
    rollout, _ = script.collect_rollout(envs, states, policy, 8)
    for state in np.unique(rollout.states):
        taken = np.bincount(rollout.actions[rollout.states == state], minlength=4)
        assert within_five_sigma(taken, policy[state], taken.sum())


def test_play_gives_the_return_and_the_states_of_the_greedy_policy():
    """Until the goal or the time limit, against the most likely actions one after another."""
    env, rng, goals = FourRoomEnv(7, start="random", max_steps=20), np.random.default_rng(0), 0
    env.reset(seed=0)
    for _ in range(100):
        policy = rng.dirichlet(np.ones(4), size=49) + [0, 0.3, 0.3, 0]  # mostly right and down
        episode_return, states = script.play(env, policy)
        expected = states[:1]
        while len(expected) <= 20 and expected[-1] != env.maze.goal:
            expected.append(int(env.maze.next_cell[expected[-1], np.argsort(policy[expected[-1]])[-1]]))
        assert states == expected
        assert episode_return == pytest.approx(5.0 * (states[-1] == env.maze.goal) - 0.01 * (len(states) - 1))
        goals += states[-1] == env.maze.goal
    assert 5 <= goals <= 95


def test_play_samples_the_policy_unless_it_is_greedy():
    maze, policy = FourRoomMaze(7), np.random.default_rng(0).dirichlet(np.ones(4), size=49)
    moves = np.zeros((49, 49))
    np.add.at(moves, (np.arange(49)[:, None], maze.next_cell), policy)
    torch.manual_seed(0)
    counts, env = np.zeros((49, 49)), FourRoomEnv(7)
    for _ in range(100):
        states = script.play(env, policy, greedy=False)[1]
        np.add.at(counts, (states[:-1], states[1:]), 1)
    assert counts.sum() > 2_000
    for state in np.flatnonzero(counts.sum(axis=1)):
        assert within_five_sigma(counts[state], moves[state], counts[state].sum())


# ------------------------------------------------------------------------------------------------------ q(s, a | s')


def make_model(recall, size=7, **kwargs):
    torch.manual_seed(0)
    maze = FourRoomMaze(size, **kwargs)
    model = BacktrackingModel(maze, recall)
    return maze, model if recall == "random" else perturbed(model)  # the uniform one is never trained


@pytest.mark.parametrize("recall", RECALLS)
@pytest.mark.parametrize("maze", [{}, {"goal": (3, 1)}, {"size": 8, "start": (-2, -2), "goal": (1, 1)}])
def test_backtracking_model_is_a_distribution_over_predecessors(recall, maze):
    """q(s_t, a_t | s_{t+1}) adds up to 1; with exact predecessors only pairs that do lead to s_{t+1} have any."""
    maze, model = make_model(recall, **maze)
    predecessors = exact_predecessors(maze)
    for after in np.flatnonzero(maze.free):
        q = joint(model, after)
        assert q.sum() == pytest.approx(1, abs=1e-5)
        if recall != "learned":
            pairs = {(int(state), int(action)) for state, action in np.argwhere(q > 0)}
            for action in range(4):
                before = predecessors[action, int(after)]
                imagined = {state for state, taken in pairs if taken == action}
                assert imagined == (before - {after} or before)  # the neighbour, or else the bump


@pytest.mark.parametrize("recall", RECALLS)
def test_log_prob_of_a_tuple_does_not_depend_on_the_batch(recall):
    maze, model = make_model(recall)
    columns = triples(random_transitions(maze, 20, np.random.default_rng(0), neighbours_only=True))
    with torch.no_grad():
        one_by_one = torch.cat([model.log_prob(*(column[i : i + 1] for column in columns)) for i in range(20)])
        torch.testing.assert_close(one_by_one, model.log_prob(*columns), rtol=0, atol=1e-5)


@pytest.mark.parametrize("recall", RECALLS)
def test_action_predictor_is_a_masked_categorical(recall):
    maze, model = make_model(recall)
    predecessors = exact_predecessors(maze)
    for after in np.flatnonzero(maze.free).tolist():
        possible = torch.tensor([float(bool(predecessors[action, after])) for action in range(4)], dtype=torch.float64)
        logits = torch.zeros(4) if recall == "random" else model.action_predictor(torch.tensor(after)).detach()
        weights = logits.double().exp() * (1 if recall == "learned" else possible)
        expected = torch.distributions.Categorical(probs=weights).probs
        if recall == "random":
            torch.testing.assert_close(expected, possible / possible.sum())  # uniform over the possible actions
        actual = model.action_log_probs(torch.tensor([after])).detach().double().exp()[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(joint(model, after).sum(axis=0), expected.numpy(), rtol=0, atol=1e-5)


def test_state_predictor_is_a_network_on_one_hot_state_and_action():
    """Appendix C: two hidden layers of 128 ReLU units, here on the concatenation of both one-hot vectors."""
    maze, model = make_model("learned")
    first, _, second, _, last = model.state_predictor
    assert first.weight.shape == (49 + 4, 128) and second.weight.shape == (128, 128) and last.weight.shape == (49, 128)
    after, actions = (torch.from_numpy(grid.ravel()) for grid in np.indices((49, 4)))
    with torch.no_grad():
        hidden = (torch.cat((F.one_hot(after, 49), F.one_hot(actions, 4)), dim=1).float() @ first.weight).clamp(min=0)
        hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
        expected = torch.distributions.Categorical(logits=hidden @ last.weight.T + last.bias)
        q = torch.distributions.Categorical(logits=model.state_log_probs(actions, after))
        torch.testing.assert_close(q.probs, expected.probs, rtol=0, atol=1e-5)
        states = torch.from_numpy(np.random.default_rng(0).integers(49, size=len(after)))
        of_actions = torch.distributions.Categorical(logits=model.action_predictor(after))
        expected = of_actions.log_prob(actions) + expected.log_prob(states)  # Eq. (1)
        torch.testing.assert_close(model.log_prob(states, actions, after), expected, rtol=0, atol=1e-4)


def unrolled(model, starts, first_state, length):
    """recall_traces as rows: states and actions (length, N), and which of them belong to a trace (length, N)."""
    states, actions = (column.numpy() for column in script.recall_traces(model, starts, first_state, length))
    rows = np.full((2, length, len(starts)), -1)
    going, used = np.arange(len(starts)), 0
    for t in range(length):
        rows[:, t, going] = states[used : used + len(going)], actions[used : used + len(going)]
        used += len(going)
        going = going[rows[0, t, going] != first_state]
    assert states.shape == actions.shape == (used,)
    return *rows, rows[1] >= 0


@pytest.mark.parametrize("recall", RECALLS)
def test_first_step_of_recall_traces_follows_log_prob(recall):
    """Frequencies of (s_t, a_t) within five standard deviations of q(s_t, a_t | s_{t+1}), none of probability 0."""
    maze, model = make_model(recall, goal=(2, 4))
    number = 20_000
    torch.manual_seed(0)
    for after in (maze.goal, 7 * 1 + 1, 7 * 1 + 3, 7 * 4 + 4):  # also a corner, a doorway and a crossroads
        states, actions = script.recall_traces(model, np.full(number, after), maze.starts[0], 1)
        assert states.shape == actions.shape == (number,)
        counts, q = np.zeros((49, 4)), joint(model, after)
        np.add.at(counts, (states.numpy(), actions.numpy()), 1)
        assert not counts[q == 0].any()
        assert within_five_sigma(counts, q, number)


@pytest.mark.parametrize("first_state", [-1, 7 * 5 + 3])
def test_later_steps_of_recall_traces_follow_the_unrolled_model(first_state):
    """The third state back is distributed as the matrix of q(s_t | s_{t+1}) to the third power.

    If traces end in a state that is reached, the matrix leads out of it to nothing.
    """
    maze, model = make_model("learned")
    number, length = 20_000, 3
    backward = np.stack([joint(model, after).sum(axis=1) for after in range(49)])
    backward /= backward.sum(axis=1, keepdims=True)
    backward[first_state if first_state >= 0 else []] = 0
    torch.manual_seed(0)
    states, _, in_trace = unrolled(model, np.full(number, maze.goal), first_state, length)
    expected = np.linalg.matrix_power(backward, length)[maze.goal]
    assert within_five_sigma(np.bincount(states[-1][in_trace[-1]], minlength=49), expected, number)
    assert in_trace.all() == (first_state == -1) and expected.sum() > 0.8


@pytest.mark.parametrize("recall", ["true", "random"])
@pytest.mark.parametrize("settings", [{"size": 7}, {"size": 11, "goal": (5, 2)}])
def test_recall_traces_of_exact_predecessors_are_transitions_backwards(recall, settings):
    """Each trace on its own, also where others have come to the state in which episodes begin, and ended."""
    maze, model = make_model(recall, **settings)
    predecessors, starts = exact_predecessors(maze), np.repeat(np.flatnonzero(maze.free), 20)
    torch.manual_seed(0)
    states, actions, in_trace = unrolled(model, starts, maze.starts[0], 15)
    assert in_trace[0].all() and 0.1 < in_trace[-1].mean() < 0.98
    later = np.vstack((starts, states[:-1]))
    states, actions, later = states[in_trace], actions[in_trace], later[in_trace]
    assert (maze.next_cell[states, actions] == later).all()
    assert (states != maze.goal).all()  # no action is taken there
    bumps = states == later
    assert bumps.any()
    for action, after in zip(actions[bumps], later[bumps], strict=True):
        assert predecessors[int(action), int(after)] == {int(after)}  # no neighbour could have moved there


@pytest.mark.parametrize("recall", RECALLS)
def test_recall_traces_end_with_the_first_state(recall):
    """A single trace holds that state in its last step or not at all; then it is as long as allowed."""
    maze, model = make_model(recall)
    rng, lengths = np.random.default_rng(0), []
    torch.manual_seed(0)
    for start, first_state in rng.choice(np.flatnonzero(maze.free), size=(300, 2)):
        states, actions = script.recall_traces(model, np.array([start]), first_state, 12)
        assert len(states) == len(actions) and first_state not in states[:-1]
        assert len(states) == 12 or states[-1] == first_state
        lengths.append(len(states))
    assert min(lengths) == 1 and max(lengths) == 12


def test_no_trace_goes_on_after_the_last_one_has_ended():
    """In a learned model that knows but one way, from the goal to the first state, which is 8 steps long."""
    maze = FourRoomMaze(7)
    torch.manual_seed(0)
    model, way = BacktrackingModel(maze, "learned"), [8, 9, 10, 11, 18, 25, 32, 33, 40]
    tuples = make_tuples(way[:-1], [0] * 8, way[1:])
    for _ in fit(model, tuples, [(1e-2, 200)], backtracking_batch_size=64):
        pass
    states, actions = script.recall_traces(model, np.full(5, maze.goal), way[0], 100)
    assert states.tolist() == [state for state in way[-2::-1] for _ in range(5)] and not actions.any()


# -------------------------------------------------------------------------------------------------- maximum likelihood


def draw_batch(monkeypatch, batch):
    """In place of torch.randint: draws the given batch."""

    def randint(high, size):
        assert (batch < high).all() and size == batch.shape
        return torch.from_numpy(batch)

    monkeypatch.setattr(script.torch, "randint", randint)


@pytest.mark.parametrize("recall", ["true", "learned"])
def test_backtracking_update_descends_the_mean_negative_log_likelihood(recall, monkeypatch):
    """Eq. (2): loss and SGD step against the gradient of probabilities normalised by hand, in float64."""
    maze, model = make_model(recall)
    predecessors, rng = exact_predecessors(maze), np.random.default_rng(0)
    possible = torch.tensor([[bool(predecessors[action, after]) for action in range(4)] for after in range(49)])
    tuples = random_transitions(maze, 50, rng, neighbours_only=True)
    batch = rng.integers(50, size=30)
    reference = copy.deepcopy(model).double()
    nll = 0
    for i in batch:
        state, action, after = (column[i] for column in triples(tuples))
        weights = reference.action_predictor(after).exp() * (possible[after] if recall == "true" else 1)
        nll -= (weights[action] / weights.sum()).log()
        if recall == "learned":
            weights = reference.state_predictor(torch.stack((after, 49 + action)).unsqueeze(0))[0].exp()
            nll -= (weights[state] / weights.sum()).log()
    loss = nll / len(batch)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    draw_batch(monkeypatch, batch)
    losses = script.update_backtracking_model(model, optimizer, tuples, Args(backtracking_batch_size=len(batch)))
    assert losses == {"recall/backtracking_loss": pytest.approx(loss.item(), abs=1e-5)}
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.5 * gradient.float(), rtol=0, atol=1e-5)


def fit(model, tuples, schedule, **kwargs):
    """Updates the backtracking model with Adam; yields after every (learning rate, number of updates)."""
    args = Args(**kwargs)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for lr, updates in schedule:
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(updates):
            script.update_backtracking_model(model, optimizer, tuples, args)
        yield


def test_backtracking_batches_are_drawn_uniformly():
    """Without learning, the mean loss of many batches is the mean over all tuples, within five standard errors."""
    maze, model = make_model("learned")
    tuples = random_transitions(maze, 40, np.random.default_rng(0))
    with torch.no_grad():
        nll = -model.log_prob(*triples(tuples)).double().numpy()
    optimizer, args = torch.optim.SGD(model.parameters(), lr=0), Args(backtracking_batch_size=64)
    losses = [script.update_backtracking_model(model, optimizer, tuples, args) for _ in range(200)]
    mean = np.mean([loss["recall/backtracking_loss"] for loss in losses])
    assert abs(mean - nll.mean()) < 5 * nll.std() / math.sqrt(200 * 64)


@pytest.mark.parametrize("recall", ["true", "learned"])
def test_backtracking_model_converges_to_the_conditional_frequencies(recall, monkeypatch):
    """The maximum of the likelihood of q(s_t, a_t | s_{t+1}) is the share of each pair among those into s_{t+1}.

    With exact predecessors the share of the actions is left to learn, of data in which nobody bumps into walls. Every
    batch is the whole data, so that nothing but the number of updates keeps the model from the maximum.
    """
    maze, rng = FourRoomMaze(7), np.random.default_rng(0)
    torch.manual_seed(0)
    model = BacktrackingModel(maze, recall)
    tuples = random_transitions(maze, 400, rng, neighbours_only=recall == "true")
    frequencies = {after: np.zeros((49, 4)) for after in np.unique(tuples.next_states)}
    for state, action, after in zip(tuples.states, tuples.actions, tuples.next_states, strict=True):
        frequencies[after][state, action] += 1 / (tuples.next_states == after).sum()

    def distances():
        """The total variation between model and frequencies, for each s_{t+1}."""
        return [np.abs(shares - joint(model, after)).sum() / 2 for after, shares in frequencies.items()]

    assert np.mean(distances()) > 0.1
    draw_batch(monkeypatch, np.arange(400))
    for _ in fit(model, tuples, [(1e-2, 200), (1e-3, 100)], backtracking_batch_size=400):
        pass
    assert max(distances()) < 0.01


# ------------------------------------------------------------------------------------------------------ imitation


def test_imitation_follows_the_gradient_of_all_pairs():
    """Eq. (3): the gradient in the logits is (softmax - one-hot) / n for each of the n pairs, in one SGD step."""
    actor = perturbed(make_actor())
    rng = np.random.default_rng(0)
    pairs = list(zip(rng.integers(49, size=37).tolist(), rng.integers(4, size=37).tolist(), strict=True))
    before = copy.deepcopy(actor)
    logits = before(torch.tensor([state for state, _ in pairs]))
    with torch.no_grad():
        weights = logits.double().exp()
        probs = weights / weights.sum(dim=1, keepdim=True)
        gradient, loss = probs.clone(), 0.0
        for row, (_, action) in enumerate(pairs):
            gradient[row, action] -= 1
            loss -= math.log(probs[row, action]) / len(pairs)
    logits.backward((gradient / len(pairs)).float())
    states, actions = torch.tensor(pairs).T
    losses = script.imitate(actor, torch.optim.SGD(actor.parameters(), lr=0.1), states, actions)
    assert losses == {"recall/imitation_loss": pytest.approx(loss, abs=1e-5)}
    for new, old in zip(actor.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), (old - 0.1 * old.grad).detach(), rtol=0, atol=1e-6)
    after, earlier = (np.mean([math.log(policy_of(network)[pair]) for pair in pairs]) for network in (actor, before))
    assert after > earlier


def test_imitation_makes_the_policy_walk_the_traces():
    """On a single path, whose pairs do not contradict each other, every one of them becomes almost certain."""
    states, actions = torch.arange(10), torch.arange(10) % 4
    torch.manual_seed(0)
    actor = make_actor()
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    for _ in range(100):
        script.imitate(actor, optimizer, states, actions)
    assert (policy_of(actor)[states, actions] > 0.9).all()


# -------------------------------------------------------------------------------------------------- high-value states


@pytest.mark.parametrize(
    ("start_states", "expected"),
    [("reward", {12: 1, 40: 3}), ("goal", {40: 1}), ("value", {11: 1, 33: 2})],  # state: its tuples
)
def test_high_value_states(start_states, expected):
    """States of all tuples that qualify, each as often; a goal that is known is one, whatever the tuples say.

    `reward` looks at the states that the tuples lead into, the critic at those in which actions were taken: it learns
    nothing about the terminal goal.
    """
    maze = FourRoomMaze(7)
    assert maze.goal == 40
    values = np.zeros(49, dtype=np.float32)
    values[[11, 33, 39]], values[[12, 40, 20]] = (7, 7, 6), (8, 9, 10)  # no action was taken in these
    tuples = make_tuples(
        [5, 5, 11, 5, 39, 33, 33, 39],
        [1, 1, 1, 1, 1, 2, 2, 1],
        [11, 12, 12, 13, 40, 40, 40, 11],
        [-0.01, 0.5, -0.01, 0, 5, 5, 5, -0.01],
        [1, 3, 6, 9, 4, 5, 5, 0],
    )
    number = 4_000
    torch.manual_seed(0)
    found = script.high_value_states(tuples, values, maze, Args(start_states=start_states, num_traces=number))
    counts = Counter(found.tolist())
    assert found.shape == (number,) and set(counts) == set(expected)
    share = np.array([expected[state] for state in counts]) / sum(expected.values())
    assert within_five_sigma(np.array(list(counts.values())), share, number)


def test_high_value_state_of_a_goal_known_ahead_of_time():
    """Nobody has been there."""
    found = script.high_value_states(None, np.zeros(49), FourRoomMaze(7), Args(start_states="goal", num_traces=5))
    assert found.tolist() == [40] * 5


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize(("start_states", "expected"), [("reward", 40), ("value", 39)])
def test_high_value_states_when_all_tuples_lead_into_the_goal(start_states, expected, number):
    """--top-fraction may leave nothing but last steps: the critic does not value the goal, but the state before it."""
    values = np.zeros(49, dtype=np.float32)
    values[[33, 39, 40]] = 1, 2, 3
    tuples = make_tuples([39, 33], [1, 2], [40, 40], [4.99, 4.99], [4.99, 4.99])
    args = Args(start_states=start_states, num_traces=number)
    found = script.high_value_states(tuples, values, FourRoomMaze(7), args)
    assert isinstance(found, np.ndarray) and found.tolist() == [expected] * number


# -------------------------------------------------------------------------------------------------- trajectory buffer


def test_loops_end_with_the_last_exit_from_each_state():
    """From each state on the way, only the step counts with which the trajectory leaves it for the last time."""
    assert cut_loops([3, 4, 5, 4, 6]) == [0, 3, 4]
    assert cut_loops([7, 7, 7]) == [2]
    assert cut_loops([1, 2, 3, 2, 1, 4]) == [4, 5]
    rng, shortened = np.random.default_rng(0), 0
    for _ in range(500):
        states = rng.integers(rng.integers(1, 12), size=rng.integers(1, 20)).tolist()
        last_exit = {state: t for t, state in enumerate(states)}
        way = [last_exit[states[0]]]
        while way[-1] < len(states) - 1:
            way.append(last_exit[states[way[-1] + 1]])
        assert cut_loops(states) == way
        shortened += 1 < len(way) < len(states)
    assert shortened > 100


class NaiveBuffer:
    """Elite retention with lists, one step at a time."""

    def __init__(self, capacity, num_envs, gamma):
        self.capacity, self.gamma = capacity, gamma
        self.running = [[] for _ in range(num_envs)]
        self.best, self.returns, self.looped, self.tied = [], [], 0, 0  # best: (return, rows of a Tuples), worst first

    def add(self, rollout):
        ended = []
        for i, t in np.ndindex(*rollout.states.T.shape):
            *step, terminated, truncated = (column[t, i].item() for column in rollout)
            self.running[i].append(step)
            if terminated or truncated:
                episode, self.running[i] = self.running[i], []
                ended.append((sum(step[2] for step in episode), len(episode)))
                if any(step[2] > 0 for step in episode):
                    self.keep(round(ended[-1][0], 9), self.rows(episode))
        return ended

    def keep(self, value, rows):
        """The oldest of the worst goes for a better one, none for an equal one."""
        self.returns.append(value)
        if len(self.best) == self.capacity:
            worst = min(range(self.capacity), key=lambda k: self.best[k][0])
            self.tied += value == self.best[worst][0]
            if value <= self.best[worst][0]:
                return
            del self.best[worst]
        self.best.insert(sum(kept <= value for kept, _ in self.best), (value, rows))

    def rows(self, episode):
        """Loops cut out in the order in which they close."""
        way = []
        for t, step in enumerate(episode):
            states = [episode[k][0] for k in way]
            if step[0] in states:
                del way[states.index(step[0]) :]
            way.append(t)
        self.looped += len(way) < len(episode)
        return [(*episode[t], sum(self.gamma**k * step[2] for k, step in enumerate(episode[t:]))) for t in way]


def walks(seed, num_envs=5, rollouts=120, num_steps=6, **kwargs):
    """Rollouts of a random walk; its returns may be negative even where the goal is reached, and are often equal."""
    settings = {"size": 7, "start": "random", "goal_reward": 0.15, "max_steps": 40, **kwargs}
    envs = FourRoomVectorEnv(num_envs, **settings)
    states, _ = envs.reset(seed=0)
    torch.manual_seed(seed)
    for _ in range(rollouts):
        rollout, states = script.collect_rollout(envs, states, np.full((len(envs.maze.free), 4), 0.25), num_steps)
        yield rollout


@pytest.mark.parametrize("capacity", [1, 4, 1_000])
def test_buffer_equals_a_naive_one(capacity):
    """After every rollout: what ended, what is kept in which order, and its tuples with their returns-to-go."""
    buffer, naive, num_ended = TrajectoryBuffer(capacity, 5, 0.9), NaiveBuffer(capacity, 5, 0.9), 0
    for rollout in walks(0):
        ended, expected = buffer.add(rollout), naive.add(rollout)
        assert [length for _, length in ended] == [length for _, length in expected]
        assert [value for value, _ in ended] == pytest.approx([value for value, _ in expected])
        num_ended += len(ended)
        assert [value for value, _ in buffer.best] == pytest.approx([value for value, _ in naive.best])
        for (_, trajectory), (_, rows) in zip(buffer.best, naive.best, strict=True):
            np.testing.assert_allclose(np.array(trajectory), np.array(rows), rtol=0, atol=1e-9)
    assert 10 < len(naive.returns) < num_ended  # some found the goal and some did not,
    assert min(naive.returns) < 0 and naive.looped and (naive.tied or capacity != 4)  # with losses, loops and ties


def columns_of(trajectory):
    return Tuples(*map(np.array, zip(*trajectory, strict=True)))


def test_kept_tuples_lead_to_the_goal_without_loops():
    buffer, maze = TrajectoryBuffer(12, 5, 0.9), FourRoomMaze(7, start="random")
    for rollout in walks(1):
        buffer.add(rollout)
    assert len(buffer.best) == 12
    for _, trajectory in buffer.best:
        tuples = columns_of(trajectory)
        assert len(set(tuples.states.tolist())) == len(tuples.states)
        assert (maze.next_cell[tuples.states, tuples.actions] == tuples.next_states).all()
        assert (tuples.states[1:] == tuples.next_states[:-1]).all() and tuples.next_states[-1] == maze.goal
        assert (np.diff(tuples.returns) > 0).all()  # later is nearer to the reward


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5, 0.1, 0.0])
def test_values_are_discounted_returns_to_go(gamma):
    """Any --gamma from 0 to 1 and the longest episode of the largest maze of the paper."""
    length, rng = 361, np.random.default_rng(0)
    rewards = rng.normal(size=length)
    steps, never = np.arange(length), np.zeros(length, dtype=bool)
    columns = {"states": steps, "actions": steps % 4, "rewards": rewards, "next_states": steps + 1, "truncated": never}
    columns["terminated"] = steps == length - 1
    buffer = TrajectoryBuffer(1, 1, gamma)
    buffer.add(Rollout(**{name: column[:, None] for name, column in columns.items()}))
    expected, value = np.zeros(length), 0.0
    for t in reversed(range(length)):
        expected[t] = value = rewards[t] + gamma * value
    ((total, trajectory),) = buffer.best
    assert total == pytest.approx(rewards.sum())
    np.testing.assert_allclose(columns_of(trajectory).returns, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1, 1e-9])
def test_most_valuable_takes_the_top_fraction_of_all_tuples(fraction):
    buffer = TrajectoryBuffer(6, 5, 0.9)
    for rollout in walks(0):
        buffer.add(rollout)
    everything = Counter(row for _, trajectory in buffer.best for row in trajectory)
    tuples = buffer.most_valuable(fraction)
    assert (np.diff(tuples.returns) <= 0).all()
    chosen = Counter(zip(*(column.tolist() for column in tuples), strict=True))
    assert chosen <= everything
    assert chosen.total() == max(1, round(fraction * everything.total()))
    rest = everything - chosen
    assert tuples.returns.min() >= max((row[4] for row in rest), default=-math.inf)
    assert fraction == 1 or len(rest) > 0


# ------------------------------------------------------------------------------------------------------ schedule


@pytest.fixture
def count_updates(monkeypatch, tmp_path):
    """Runs main and gives the number of real updates before each imitation and each backtracking update.

    Also the real update with which the goal was first reached, or None.
    """

    def run(**kwargs):
        real, imitations, fits, found = [0], [], [], []

        def counted(name, note):
            function = getattr(script, name)

            def wrapper(*args):
                note(*args)
                return function(*args)

            monkeypatch.setattr(script, name, wrapper)

        def note_real(optimizer, rollout, log_probs, values, args):
            real[0] += 1
            if rollout.terminated.any():
                found.append(real[0])

        counted("update_actor_critic", note_real)
        counted("imitate", lambda *_: imitations.append(real[0]))
        counted("update_backtracking_model", lambda *_: fits.append(real[0]))
        monkeypatch.setattr(script, "draw_pictures", lambda *_, **__: {})
        settings = {"num_envs": 16, "num_steps": 5, "num_traces": 4, "backtracking_batch_size": 8, "eval_every": 10**9}
        settings |= {"recall_updates": 1, "backtracking_updates": 1, **kwargs}
        script.main(Args(run_dir=str(tmp_path / "run"), **settings))
        return real[0], imitations, fits, found[0] if found else None

    return run


@pytest.mark.parametrize("every", [1, 3, 4])
def test_recall_phases_of_a_known_goal_are_one_in_every_so_many_updates(count_updates, every):
    real, imitations, _, _ = count_updates(size=7, start_states="goal", recall_every=every, total_timesteps=80 * 11)
    assert real == 11
    assert imitations == list(range(every, 12, every)) and len(imitations) == real // every


@pytest.mark.parametrize("recall", ["true", "learned"])
def test_recall_phases_hold_so_many_updates_of_both_models(count_updates, recall):
    real, imitations, fits, found = count_updates(
        size=7,
        recall=recall,
        start_states="goal",
        recall_every=2,
        recall_updates=3,
        backtracking_updates=5,
        total_timesteps=80 * 30,
    )
    assert real == 30 and 2 < found < 30
    assert imitations == [phase for phase in range(2, 31, 2) for _ in range(3)]
    assert fits == [phase for phase in range(2, 31, 2) for _ in range(5) if phase >= found]


@pytest.mark.parametrize("recall", ["true", "random"])
def test_recall_starts_with_the_first_reward(count_updates, recall):
    real, imitations, fits, found = count_updates(size=7, recall=recall, recall_every=2, total_timesteps=80 * 30)
    assert real == 30 and 2 < found < 30
    assert imitations == [update for update in range(2, 31, 2) if update >= found]
    assert fits == (imitations if recall == "true" else [])


@pytest.mark.parametrize("settings", [{"recall": "true"}, {"recall": "learned"}, {"recall": "none"}])
def test_nothing_is_recalled_without_a_reward(count_updates, settings):
    """The goal of this maze is farther away than the run is long."""
    real, imitations, fits, found = count_updates(size=15, total_timesteps=80 * 4, **settings)
    assert (real, imitations, fits, found) == (4, [], [], None)


def test_plain_actor_critic_never_recalls(count_updates):
    _, imitations, fits, found = count_updates(size=7, recall="none", start_states="goal", total_timesteps=80 * 30)
    assert found and not imitations and not fits


# ------------------------------------------------------------------------------------------------------ section 4

HORIZON, GAMMA, SETTINGS = 6, 0.99, {"size": 11, "start": (1, 1), "goal": (3, 3)}
EVENTS = {"shortest paths": 4, "reaches the goal": HORIZON}  # the event R > L is that of at most so many steps


def discounted_return(length, reached):
    return sum(GAMMA**t * (-0.01 + 5.0 * (reached and t == length - 1)) for t in range(length))


def threshold(event):
    """L: half way between the returns of the slowest trajectory that is to exceed it and the next one."""
    return (discounted_return(EVENTS[event], True) + discounted_return(EVENTS[event] + 1, EVENTS[event] < HORIZON)) / 2


def random_policy():
    torch.manual_seed(0)
    return policy_of(perturbed(make_actor(121), seed=1, scale=0.2))


def all_trajectories(maze, policy):
    """{actions: (states with the last one, p(tau))} of all trajectories up to the goal or the horizon."""
    trajectories, stack = {}, [((), (int(maze.starts[0]),), 1.0)]
    while stack:
        actions, states, prob = stack.pop()
        if states[-1] == maze.goal or len(actions) == HORIZON:
            trajectories[actions] = (states, prob)
            continue
        for action in range(4):
            after = int(maze.next_cell[states[-1], action])
            stack.append(((*actions, action), (*states, after), prob * policy[states[-1], action]))
    return trajectories


def event_trajectories(maze, policy, event):
    """Of the trajectories with R > L: actions, states and p(tau)."""
    trajectories = all_trajectories(maze, policy)
    assert sum(prob for _, prob in trajectories.values()) == pytest.approx(1, abs=1e-12)
    kept = {
        actions: (states, prob)
        for actions, (states, prob) in trajectories.items()
        if discounted_return(len(actions), states[-1] == maze.goal) > threshold(event)
    }
    assert all(states[-1] == maze.goal and len(actions) <= EVENTS[event] for actions, (states, _) in kept.items())
    return list(kept), [states for states, _ in kept.values()], np.array([prob for _, prob in kept.values()])


def chances(maze, policy, steps):
    """h[k, s], the chance to reach the goal from s in at most k steps, by dynamic programming."""
    h = np.zeros((steps + 1, len(policy)))
    h[:, maze.goal] = 1
    for k in range(steps):
        h[k + 1] = np.where(np.arange(len(policy)) == maze.goal, 1, (policy * h[k][maze.next_cell]).sum(axis=1))
    return h


def backward_log_prob(model, actions, states):
    """log of the product of q(s_t, a_t | s_{t+1}) over a trajectory, for each of many, in float64."""
    with torch.no_grad():
        table = model.log_prob(*(torch.tensor(column) for column in zip(*steps_of(actions, states), strict=True)))
    ends = np.cumsum([len(taken) for taken in actions])
    return np.array([part.sum() for part in np.split(table.double().numpy(), ends[:-1])])


def steps_of(actions, states):
    """(s_t, a_t, s_{t+1}) of all steps of all trajectories."""
    return [
        (visited[t], taken[t], visited[t + 1])
        for taken, visited in zip(actions, states, strict=True)
        for t in range(len(taken))
    ]


def kl(p, q):
    return float((p * (np.log(p) - np.log(q))).sum())


@pytest.mark.parametrize("event", EVENTS)
def test_log_evidence_is_elbo_plus_divergence_from_the_posterior(event):
    """Eq. (4), for any q on the trajectories with R > L. (With q > 0 elsewhere, ELBO = -inf and KL = inf.)

    Neither side is defined by the other here: p(R > L) is the chance to reach the goal in time, by dynamic programming,
    and p(tau | R > L) the chain that this chance h steers, pi(a | s) h(s') / h(s) at each step. The environment being
    deterministic, p(tau) is the product of pi(a_t | s_t). The q are arbitrary, among them the (renormalised) one of the
    backtracking model. The bound is tight for the posterior and strict for all the others.
    """
    maze, policy = FourRoomMaze(**SETTINGS), random_policy()
    actions, states, prior = event_trajectories(maze, policy, event)
    h = chances(maze, policy, EVENTS[event])
    evidence = math.log(h[-1, maze.starts[0]])
    posterior = np.array(
        [
            math.prod(
                policy[state, action] * h[EVENTS[event] - t - 1, after] / h[EVENTS[event] - t, state]
                for t, (state, action, after) in enumerate(steps_of([taken], [visited]))
            )
            for taken, visited in zip(actions, states, strict=True)
        ]
    )
    assert posterior.sum() == pytest.approx(1, abs=1e-12)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    recalled = np.exp(backward_log_prob(perturbed(BacktrackingModel(maze, "learned")), actions, states))
    others = [rng.dirichlet(np.full(len(prior), a)) + 1e-300 for a in (0.1, 1, 10) for _ in range(5)]
    for q in (*others, recalled / recalled.sum(), posterior):
        elbo = (q * np.log(prior / q)).sum()  # Eq. (5), with p(R > L | tau) = 1
        assert elbo + kl(q, posterior) == pytest.approx(evidence, abs=1e-10)
        assert elbo == pytest.approx(evidence, abs=1e-10) if q is posterior else elbo < evidence - 0.01


def test_imitation_of_samples_from_q_ascends_the_elbo():
    """The policy's part of Eq. (5) is the mean of sum_t log pi(a_t | s_t) under q: that of Eq. (3) over its traces.

    For a q of sixteenths over the shortest paths, so that 16 traces of 4 steps are exactly its distribution.
    """
    maze = FourRoomMaze(**SETTINGS)
    torch.manual_seed(0)
    actor = perturbed(make_actor(121), seed=1, scale=0.2)
    actions, states, _ = event_trajectories(maze, random_policy(), "shortest paths")
    counts = [1, 2, 3, 1, 4, 5]
    q = np.array(counts) / sum(counts)

    def elbo(actor):
        log_policy = actor(torch.arange(121)).double().log_softmax(-1)
        log_prior = [sum(log_policy[s, a] for s, a, _ in steps_of([actions[i]], [states[i]])) for i in range(6)]
        return sum(q[i] * (log_prior[i] - math.log(q[i])) for i in range(6))

    before = elbo(actor)
    gradients = torch.autograd.grad(before, list(actor.parameters()))
    expected = [
        (old + 0.1 / 4 * gradient).detach() for old, gradient in zip(actor.parameters(), gradients, strict=True)
    ]
    pairs = [step[:2] for i in range(6) for step in steps_of([actions[i]], [states[i]]) * counts[i]]
    script.imitate(actor, torch.optim.SGD(actor.parameters(), lr=0.1), *torch.tensor(pairs).T)
    for new, old in zip(actor.parameters(), expected, strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=1e-6)
    assert elbo(actor) > before


@pytest.mark.parametrize("recall", RECALLS)
def test_recall_traces_from_the_goal_are_samples_from_q(recall):
    """Whole traces that reach the start in 4 steps: as frequent as the product of q(s_t, a_t | s_{t+1}) says."""
    maze = FourRoomMaze(**SETTINGS)
    torch.manual_seed(0)
    model, number = BacktrackingModel(maze, recall), 4_000
    model = model if recall == "random" else perturbed(model, scale=0.1)
    actions, states, prior = event_trajectories(maze, random_policy(), "shortest paths")
    if recall == "learned":  # otherwise hardly any trace would reach the start
        tuples = make_tuples(*zip(*steps_of(actions, states), strict=True))
        list(fit(model, tuples, [(1e-2, 40)], backtracking_batch_size=64))
    traces = unrolled(model, np.full(number, maze.goal), maze.starts[0], 9)
    counts = Counter()
    for visited, taken, in_trace in zip(*(column.T for column in traces), strict=True):
        if visited[in_trace][-1] == maze.starts[0]:
            counts[tuple(taken[in_trace][::-1].tolist())] += 1
    q = np.exp(backward_log_prob(model, actions, states))
    assert q.sum() > 0.02
    assert within_five_sigma(np.array([counts[taken] for taken in actions]), q, number)


def rejection_samples(policy, event, number):
    """Trajectories of the policy, at most `number`, of which those with R > L are kept: their actions, and a Tuples."""
    envs = FourRoomVectorEnv(number, max_steps=HORIZON, **SETTINGS)
    states, _ = envs.reset(seed=0)
    torch.manual_seed(0)
    rollout, _ = script.collect_rollout(envs, states, policy, HORIZON)
    done = rollout.terminated | rollout.truncated
    first = np.cumsum(done, axis=0) - done == 0  # the first episode of each environment
    returns = (first * GAMMA ** np.arange(HORIZON)[:, None] * rollout.rewards).sum(axis=0)
    kept = first & (returns > threshold(event))
    actions = [tuple(rollout.actions[kept[:, i], i].tolist()) for i in np.flatnonzero(kept.any(axis=0))]
    return actions, make_tuples(*(column[kept] for column in (rollout.states, rollout.actions, rollout.next_states)))


@pytest.mark.parametrize("event", EVENTS)
def test_rejection_samples_follow_the_posterior(event):
    """Section 4: forward-generated trajectories which lead to R > L are samples from p(tau | R > L)."""
    maze, policy = FourRoomMaze(**SETTINGS), random_policy()
    number = 30_000
    actions, _, prior = event_trajectories(maze, policy, event)
    drawn, _ = rejection_samples(policy, event, number)
    counts = Counter(drawn)
    assert set(counts) <= set(actions)
    assert within_five_sigma(np.array([counts[taken] for taken in actions]), prior, number)
    assert within_five_sigma(np.array(len(drawn)), prior.sum(), number)


@pytest.mark.parametrize(
    ("recall", "event"),
    [("learned", "shortest paths"), ("true", "shortest paths"), ("learned", "reaches the goal")],
)
def test_maximum_likelihood_on_rejection_samples_brings_q_to_the_posterior(recall, event):
    """The wake-sleep direction of section 4 lowers KL(p(tau | R > L) || q(tau)), computed by enumeration.

    q(tau) = q(length) prod_t q_phi(s_t, a_t | s_{t+1}), unrolled from the final state, here always the goal. For each
    length the product is a distribution over all backward paths of that length; q(length) is that of the posterior.
    True for every q_phi, with N the expected counts of the steps of a trajectory of the posterior:

    - The divergence exceeds its minimum by sum over s' of N(s') KL(N(., . | s') || q_phi(., . | s')), so that the
      minimum is at the ratios of counts N(s, a, s') / N(s'). What is fitted is thus Eq. (2), every *step* weighing the
      same, not every trajectory.
    - If R > L only for shortest paths, a state tells how many steps are left. Then the posterior, a Markov chain whose
      steps depend on (s, time left), is one whose steps depend on s alone, reversed as well as forward: the minimum is
      0, at q = p(tau | R > L). There the other divergence, KL(q || p(tau | R > L)) with q renormalised to the support
      of the posterior, is 0 as well: the gap between ELBO and log p(R > L) closes, Eq. (4). It may widen on the way.
    - Otherwise the minimum is above 0, as q_phi does not know the time. That KL(q || p(tau | R > L)) decreases as well
      is then no theorem; it does here.
    """
    maze, policy = FourRoomMaze(**SETTINGS), random_policy()
    actions, states, prior = event_trajectories(maze, policy, event)
    posterior = prior / prior.sum()
    lengths = np.array([len(taken) for taken in actions])
    of_length = np.bincount(lengths, weights=posterior)[lengths]
    counts, into = Counter(), Counter()
    for step, weight in zip(steps_of(actions, states), np.repeat(posterior, lengths), strict=True):
        counts[step] += weight
        into[step[2]] += weight
    best = [
        of_length[i] * math.prod(counts[s] / into[s[2]] for s in steps_of([actions[i]], [states[i]]))
        for i in range(len(actions))
    ]
    minimum = kl(posterior, np.array(best))
    assert abs(minimum) < 1e-10 if event == "shortest paths" else minimum > 0.1

    def divergences(model):
        q = of_length * np.exp(backward_log_prob(model, actions, states))
        forward = kl(posterior, q)
        tables = {after: joint(model, after) for after in into}
        excess = sum(n * math.log(n / into[s] / tables[s][state, action]) for (state, action, s), n in counts.items())
        assert forward == pytest.approx(minimum + excess, abs=1e-4)
        return forward, kl(q / q.sum(), posterior)

    _, tuples = rejection_samples(policy, event, 30_000)
    torch.manual_seed(0)
    model = BacktrackingModel(maze, recall)
    course = [divergences(model)]
    schedule = [(1e-3, 20)] * 10 + [(3e-3, 40)] * 4 + [(5e-4, 50)]
    for _ in fit(model, tuples, schedule, backtracking_batch_size=512):
        course.append(divergences(model))
    forward, reverse = np.array(course).T
    assert (np.diff(forward) < 0.1).all() and (np.diff(forward[:5]) < 0).all()
    assert minimum - 1e-6 <= forward[-1] < minimum + 0.1 < forward[0]
    assert reverse[-1] < reverse[0] / 2
    if event == "shortest paths":
        assert reverse[-1] < 0.05


def test_exact_predecessors_give_no_probability_to_avoidable_bumps():
    """So `true` and `random` are far from a posterior in which the agent bumps into walls: log q is -1e9 or less."""
    maze, policy = FourRoomMaze(**SETTINGS), random_policy()
    actions, states, _ = event_trajectories(maze, policy, "reaches the goal")
    bumps = np.array(
        [
            any(visited[t] == visited[t + 1] for t in range(len(taken)))
            for taken, visited in zip(actions, states, strict=True)
        ]
    )
    assert bumps.any() and not bumps.all()
    for recall in ("true", "random"):
        log_q = backward_log_prob(BacktrackingModel(maze, recall), actions, states)
        assert ((log_q < -0.9e9) == bumps).all() and (log_q[~bumps] > -100).all()
