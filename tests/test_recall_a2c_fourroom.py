"""The mathematics of recall_a2c_fourroom.py against closed forms, enumeration and independent implementations."""

import copy
import io
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import recall_a2c_fourroom as script
from envs.four_room import FourRoomEnv, FourRoomMaze, FourRoomVectorEnv
from recall_a2c_fourroom import Actor, Args, BacktrackingModel, Critic, Rollout, TrajectoryBuffer, Tuples

torch.set_num_threads(1)
RECALLS = ("true", "learned", "random")


# ------------------------------------------------------------------------------------------------------ helpers


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


def joint(model, next_cell):
    """q(s_t, a_t | s_{t+1} = next_cell) of every cell and action, (S, A) in float64, through log_prob."""
    num_cells, num_actions = len(model.cells), model.impossible.shape[1]
    cells, actions = (grid.ravel() for grid in np.indices((num_cells, num_actions)))
    with torch.no_grad():
        log_probs = model.log_prob(
            torch.from_numpy(cells), torch.from_numpy(actions), torch.full((len(cells),), int(next_cell))
        )
    return log_probs.double().exp().numpy().reshape(num_cells, num_actions)


def make_tuples(cells, actions, next_cells, rewards=None, values=None, first_cells=None):
    cells, actions, next_cells = (np.asarray(column, dtype=np.int64) for column in (cells, actions, next_cells))
    rewards = np.zeros(len(cells)) if rewards is None else np.asarray(rewards, dtype=float)
    values = np.zeros(len(cells)) if values is None else np.asarray(values, dtype=float)
    first_cells = np.zeros(len(cells), dtype=np.int64) if first_cells is None else np.asarray(first_cells)
    return Tuples(cells, actions, next_cells, rewards, values, first_cells)


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


class FixedRandom:
    """In place of a numpy Generator: gives the same number everywhere."""

    def __init__(self, u):
        self.u = u

    def random(self, shape):
        return np.full(shape, self.u)


# ------------------------------------------------------------------------------------------------------ sample


def draw(probs, rng):
    return script.sample(script.thresholds(probs), rng)


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


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, np.nextafter(np.float32(1), np.float32(0)), np.nextafter(1.0, 0.0)])
def test_sample_never_returns_an_index_of_probability_zero(u):
    rows = rounded_rows(np.random.default_rng(0), 50)
    if u > 0.9:
        assert (rows.cumsum(axis=1)[:, -1] < 1).all() and (rows[:, -1] == 0).all()
    chosen = draw(rows, FixedRandom(u))
    assert (rows[np.arange(len(rows)), chosen] > 0).all()
    one_hot = np.eye(5, dtype=np.float32)
    assert (draw(one_hot, FixedRandom(u)) == np.arange(5)).all()


def test_sample_inverts_the_cumulative_sum():
    """Rows of quarters, so that the boundaries are exact: u in [0, 1/4) gives the first quarter, and so on."""
    probs = np.array([[0.25, 0.0, 0.5, 0.25], [0.0, 0.5, 0.5, 0.0]])
    expected = {0.0: (0, 1), 0.2499: (0, 1), 0.25: (2, 1), 0.4999: (2, 1), 0.5: (2, 2), 0.7499: (2, 2), 0.75: (3, 2)}
    for u, indices in expected.items():
        assert tuple(draw(probs, FixedRandom(u))) == indices


def test_sample_draws_every_row_on_its_own_with_its_frequencies():
    number, rng = 40_000, np.random.default_rng(1)
    rows = rng.dirichlet(np.ones(4), size=2)
    first, second = draw(np.tile(rows, (number, 1)), rng).reshape(number, 2).T
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
    columns = {"cells": empty, "actions": empty, "rewards": rewards, "next_cells": empty}
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
    cells, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    policy = rng.dirichlet(np.ones(4), size=len(envs.maze.free))
    return script.collect_rollout(envs, cells, policy, num_steps, rng)[0]


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.01, 1e6])
def test_update_actor_critic_equals_an_independent_implementation(max_grad_norm):
    """Three updates, with torch.distributions for the losses, and clipping and RMSprop written out in float64."""
    args = Args(max_grad_norm=max_grad_norm, ent_coef=0.3, vf_coef=0.7, gamma=0.9, gae_lambda=0.8)
    torch.manual_seed(0)
    actor, critic = perturbed(Actor(49, 4)), perturbed(Critic(49), seed=1)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.RMSprop(parameters, lr=args.learning_rate, alpha=0.99, eps=1e-5)
    actor_copy, critic_copy = copy.deepcopy(actor).double(), copy.deepcopy(critic).double()
    reference = [*actor_copy.parameters(), *critic_copy.parameters()]
    squares, clipped = [torch.zeros_like(parameter) for parameter in reference], []
    for update in range(3):
        rollout = real_rollout(seed=update)
        assert rollout.terminated.any() and rollout.truncated.any()
        losses = script.update_actor_critic(actor, critic, optimizer, rollout, args)

        values, next_values = (critic_copy(torch.from_numpy(c)) for c in (rollout.cells, rollout.next_cells))
        frozen = values.detach().numpy(), next_values.detach().numpy()
        advantages = torch.from_numpy(gae_by_definition(rollout, *frozen, args.gamma, args.gae_lambda))
        policy = torch.distributions.Categorical(logits=actor_copy(torch.from_numpy(rollout.cells)))
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


def test_policy_table_is_the_softmax_of_the_actor():
    actor = perturbed(Actor(49, 4))
    expected = torch.distributions.Categorical(logits=actor(torch.arange(49)).detach().double()).probs.numpy()
    np.testing.assert_allclose(script.policy_table(actor), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ rollouts


def test_rollouts_equal_single_environments_and_go_on_where_the_last_one_ended():
    """The true next cells also where an episode ended, against one FourRoomEnv each that replays the actions."""
    num_envs, settings = 6, {"size": 7, "start": "random", "max_steps": 4}
    envs, singles = FourRoomVectorEnv(num_envs, **settings), [FourRoomEnv(**settings) for _ in range(num_envs)]
    cells, _ = envs.reset(seed=3)
    expected_cells = [env.reset(seed=3 + i)[0] for i, env in enumerate(singles)]
    policy, rng = np.full((49, 4), 0.25), np.random.default_rng(0)
    ends = Counter()
    for _ in range(12):
        rollout, cells = script.collect_rollout(envs, cells, policy, 7, rng)
        for t, i in itertools.product(range(7), range(num_envs)):
            assert rollout.cells[t, i] == expected_cells[i]
            after, reward, terminated, truncated, _ = singles[i].step(int(rollout.actions[t, i]))
            assert rollout.next_cells[t, i] == after
            assert rollout.rewards[t, i] == pytest.approx(reward)
            assert (rollout.terminated[t, i], rollout.truncated[t, i]) == (terminated, truncated)
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            expected_cells[i] = singles[i].reset()[0] if terminated or truncated else after
        assert cells.tolist() == expected_cells
    assert min(ends["terminated"], ends["truncated"]) >= 5


def test_rollouts_follow_the_policy():
    envs = FourRoomVectorEnv(5_000, size=7, start="random")
    cells, _ = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(4), size=49)
    rollout, _ = script.collect_rollout(envs, cells, policy, 8, rng)
    for cell in np.unique(rollout.cells):
        taken = np.bincount(rollout.actions[rollout.cells == cell], minlength=4)
        assert within_five_sigma(taken, policy[cell], taken.sum())


# ------------------------------------------------------------------------------------------------------ q(s, a | s')


def make_model(recall, size=7, **kwargs):
    torch.manual_seed(0)
    maze = FourRoomMaze(size, **kwargs)
    return maze, perturbed(BacktrackingModel(maze, recall))


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
            pairs = {(int(cell), int(action)) for cell, action in np.argwhere(q > 0)}
            for action in range(4):
                before = predecessors[action, int(after)]
                imagined = {cell for cell, taken in pairs if taken == action}
                assert imagined == (before - {after} or before)  # the neighbour, or else the bump


@pytest.mark.parametrize("recall", RECALLS)
def test_log_prob_of_a_tuple_does_not_depend_on_the_batch(recall):
    """A batch of one: --top-fraction may leave a single tuple to count for the trace error."""
    maze, model = make_model(recall)
    tuples = random_transitions(maze, 20, np.random.default_rng(0), neighbours_only=True)
    columns = [torch.from_numpy(column) for column in tuples[:3]]
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


def test_state_predictor_is_a_network_on_one_hot_cell_and_action():
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
        cells = torch.from_numpy(np.random.default_rng(0).integers(49, size=len(after)))
        of_actions = torch.distributions.Categorical(logits=model.action_predictor(after))
        expected = of_actions.log_prob(actions) + expected.log_prob(cells)  # Eq. (1)
        torch.testing.assert_close(model.log_prob(cells, actions, after), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recall", RECALLS)
def test_first_step_of_recall_traces_follows_log_prob(recall):
    """Frequencies of (s_t, a_t) within five standard deviations of q(s_t, a_t | s_{t+1}), none of probability 0."""
    maze, model = make_model(recall, goal=(2, 4))
    number, rng = 20_000, np.random.default_rng(0)
    for after in (maze.goal, 7 * 1 + 1, 7 * 1 + 3, 7 * 4 + 4):  # also a corner, a doorway and a crossroads
        starts = np.full(number, after)
        states, actions, in_trace = script.recall_traces(model, starts, np.full(number, -1), 1, rng)
        assert states.shape == actions.shape == in_trace.shape == (1, number) and in_trace.all()
        counts, q = np.zeros((49, 4)), joint(model, after)
        np.add.at(counts, (states[0], actions[0]), 1)
        assert not counts[q == 0].any()
        assert within_five_sigma(counts, q, number)


def test_later_steps_of_recall_traces_follow_the_unrolled_model():
    """The third state back is distributed as the matrix of q(s_t | s_{t+1}) to the third power."""
    maze, model = make_model("learned")
    number, length = 20_000, 3
    backward = np.stack([joint(model, after).sum(axis=1) for after in range(49)])
    starts = np.full(number, maze.goal)
    states, _, _ = script.recall_traces(model, starts, np.full(number, -1), length, np.random.default_rng(0))
    expected = np.linalg.matrix_power(backward, length)[maze.goal]
    assert within_five_sigma(np.bincount(states[-1], minlength=49), expected / expected.sum(), number)


@pytest.mark.parametrize("recall", ["true", "random"])
@pytest.mark.parametrize("settings", [{"size": 7}, {"size": 11, "goal": (5, 2)}])
def test_recall_traces_of_exact_predecessors_are_transitions_backwards(recall, settings):
    maze, model = make_model(recall, **settings)
    predecessors = exact_predecessors(maze)
    starts = np.repeat(np.flatnonzero(maze.free), 20)
    first_cells = np.full(len(starts), -1)
    states, actions, in_trace = script.recall_traces(model, starts, first_cells, 15, np.random.default_rng(0))
    assert in_trace.all() and states.shape == actions.shape == (15, len(starts))
    later = np.vstack((starts, states[:-1]))
    assert (maze.next_cell[states, actions] == later).all()
    assert (states != maze.goal).all()  # no action is taken there
    bumps = states == later
    assert bumps.any()
    for action, after in zip(actions[bumps], later[bumps], strict=True):
        assert predecessors[int(action), int(after)] == {int(after)}  # no neighbour could have moved there


@pytest.mark.parametrize("recall", RECALLS)
def test_recall_traces_end_with_the_first_cell(recall):
    maze, model = make_model(recall)
    rng = np.random.default_rng(0)
    starts, first_cells = rng.choice(np.flatnonzero(maze.free), size=(2, 500))
    states, _, in_trace = script.recall_traces(model, starts, first_cells, 12, rng)
    lengths = []
    for i in range(500):
        trace = states[:, i].tolist()
        length = trace.index(first_cells[i]) + 1 if first_cells[i] in trace else 12
        assert in_trace[:, i].tolist() == [True] * length + [False] * (12 - length)
        lengths.append(length)
    assert min(lengths) == 1 and max(lengths) == 12


# -------------------------------------------------------------------------------------------------- maximum likelihood


class FixedBatch:
    """In place of a numpy Generator: draws the given batch."""

    def __init__(self, batch):
        self.batch = batch

    def integers(self, high, size):
        assert (self.batch < high).all() and size == len(self.batch)
        return self.batch


@pytest.mark.parametrize("recall", ["true", "learned"])
def test_backtracking_update_descends_the_mean_negative_log_likelihood(recall):
    """Eq. (2): loss and SGD step against the gradient of probabilities normalised by hand, in float64."""
    maze, model = make_model(recall)
    possible = torch.from_numpy(maze.num_predecessors > 0)
    rng = np.random.default_rng(0)
    tuples = random_transitions(maze, 50, rng, neighbours_only=True)
    batch = rng.integers(50, size=30)
    reference = copy.deepcopy(model).double()
    nll = 0
    for i in batch:
        cell, action, after = (torch.tensor(column[i]) for column in tuples[:3])
        weights = reference.action_predictor(after).exp() * (possible[after] if recall == "true" else 1)
        nll -= (weights[action] / weights.sum()).log()
        if recall == "learned":
            weights = reference.state_predictor(torch.stack((after, 49 + action)).unsqueeze(0))[0].exp()
            nll -= (weights[cell] / weights.sum()).log()
    loss = nll / len(batch)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    args = Args(recall=recall, backtracking_batch_size=len(batch))
    losses = script.update_backtracking_model(model, optimizer, tuples, args, FixedBatch(batch))
    assert losses["recall/backtracking_loss"] == pytest.approx(loss.item(), abs=1e-5)
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.5 * gradient.float(), rtol=0, atol=1e-5)


def fit(model, tuples, rng, schedule, **kwargs):
    """Updates the backtracking model with Adam; yields after every (learning rate, number of updates)."""
    args = Args(**kwargs)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for lr, updates in schedule:
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(updates):
            script.update_backtracking_model(model, optimizer, tuples, args, rng)
        yield


def test_backtracking_batches_are_drawn_uniformly():
    """Without learning, the mean loss of many batches is the mean over all tuples, within five standard errors."""
    maze, model = make_model("learned")
    rng = np.random.default_rng(0)
    tuples = random_transitions(maze, 40, rng)
    with torch.no_grad():
        nll = -model.log_prob(*(torch.from_numpy(column) for column in tuples[:3])).double().numpy()
    optimizer, args = torch.optim.SGD(model.parameters(), lr=0), Args(recall="learned", backtracking_batch_size=64)
    losses = [script.update_backtracking_model(model, optimizer, tuples, args, rng) for _ in range(200)]
    mean = np.mean([loss["recall/backtracking_loss"] for loss in losses])
    assert abs(mean - nll.mean()) < 5 * nll.std() / math.sqrt(200 * 64)


@pytest.mark.parametrize("recall", ["true", "learned"])
def test_backtracking_model_converges_to_the_conditional_frequencies(recall):
    """The maximum of the likelihood of q(s_t, a_t | s_{t+1}) is the share of each pair among those into s_{t+1}.

    With exact predecessors the share of the actions is left to learn, of data in which nobody bumps into walls. Every
    batch is the whole data, so that nothing but the number of updates keeps the model from the maximum.
    """
    maze, rng = FourRoomMaze(7), np.random.default_rng(0)
    torch.manual_seed(0)
    model = BacktrackingModel(maze, recall)
    tuples = random_transitions(maze, 400, rng, neighbours_only=recall == "true")
    untrained = script.trace_error(model, tuples, "cpu")
    batch, schedule = FixedBatch(np.arange(400)), [(1e-2, 200), (1e-3, 100)]
    for _ in fit(model, tuples, batch, schedule, recall=recall, backtracking_batch_size=400):
        pass
    for after in np.unique(tuples.next_cells):
        into, frequencies = tuples.next_cells == after, np.zeros((49, 4))
        np.add.at(frequencies, (tuples.cells[into], tuples.actions[into]), 1 / into.sum())
        np.testing.assert_allclose(joint(model, after), frequencies, rtol=0, atol=0.01)
    assert untrained > 0.1 and script.trace_error(model, tuples, "cpu") < 0.005


@pytest.mark.parametrize("recall", RECALLS)
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_trace_error_is_the_mean_total_variation_over_all_pairs(recall, scale):
    """Half the sum of |p - q| over all (s_t, a_t), p counted from the tuples (with bumps that only `learned` knows)."""
    maze = FourRoomMaze(7)
    torch.manual_seed(0)
    model = perturbed(BacktrackingModel(maze, recall), scale=scale)
    tuples = random_transitions(maze, 300, np.random.default_rng(0))
    distances = []
    for after in tuples.next_cells:
        counts = np.zeros((49, 4))
        np.add.at(counts, tuple(column[tuples.next_cells == after] for column in (tuples.cells, tuples.actions)), 1)
        distances.append(np.abs(counts / counts.sum() - joint(model, after)).sum() / 2)
    assert script.trace_error(model, tuples, "cpu") == pytest.approx(np.mean(distances), abs=1e-5)


# ------------------------------------------------------------------------------------------------------ imitation


def test_imitation_follows_the_gradient_of_the_pairs_in_the_traces_only():
    """Eq. (3): the gradient in the logits is (softmax - one-hot) / n for each of the n pairs, in one SGD step."""
    actor = perturbed(Actor(49, 4))
    rng = np.random.default_rng(0)
    states, actions = rng.integers(49, size=(6, 10)), rng.integers(4, size=(6, 10))
    in_trace = np.arange(6)[:, None] < rng.integers(1, 7, size=10)
    assert not in_trace.all()
    before = copy.deepcopy(actor)
    pairs = [(int(states[i]), int(actions[i])) for i in zip(*np.nonzero(in_trace), strict=True)]
    logits = before(torch.tensor([state for state, _ in pairs]))
    with torch.no_grad():
        weights = logits.double().exp()
        probs = weights / weights.sum(dim=1, keepdim=True)
        gradient, loss = probs.clone(), 0.0
        for row, (_, action) in enumerate(pairs):
            gradient[row, action] -= 1
            loss -= math.log(probs[row, action]) / len(pairs)
    logits.backward((gradient / len(pairs)).float())
    losses = script.imitate(actor, torch.optim.SGD(actor.parameters(), lr=0.1), states, actions, in_trace, "cpu")
    assert losses["recall/imitation_loss"] == pytest.approx(loss, abs=1e-5)
    for new, old in zip(actor.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), (old - 0.1 * old.grad).detach(), rtol=0, atol=1e-6)
    policies = (script.policy_table(network) for network in (actor, before))
    after, earlier = (np.mean([math.log(policy[pair]) for pair in pairs]) for policy in policies)
    assert after > earlier


def test_imitation_makes_the_policy_walk_the_traces():
    """On a single path, whose pairs do not contradict each other, every one of them becomes almost certain."""
    states, actions = np.arange(10)[:, None], np.arange(10)[:, None] % 4
    torch.manual_seed(0)
    actor = Actor(49, 4)
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    for _ in range(100):
        script.imitate(actor, optimizer, states, actions, np.ones((10, 1), dtype=bool), "cpu")
    assert (script.policy_table(actor)[states, actions] > 0.9).all()


# -------------------------------------------------------------------------------------------------- high-value states


class TableCritic(Critic):
    """V(s) from a table."""

    def __init__(self, table):
        super().__init__(len(table))
        self.table = torch.tensor(table)

    def forward(self, cells):
        return self.table[cells]


@pytest.mark.parametrize(
    ("start_states", "expected"),
    [
        ("reward", {(12, 8, 3.0): 1, (40, 8, 5.0): 2, (40, 9, 4.0): 1}),  # (state, first cell, value): its tuples
        ("goal", {(40, 8, 5.0): 2, (40, 9, 4.0): 1}),
        ("value", {(11, 9, 7.0): 1, (33, 8, 7.0): 2}),
    ],
)
def test_high_value_states(start_states, expected):
    """States of all tuples that qualify, each as often, with the cell where its episode began and its value.

    `reward` and `goal` look at the states that the tuples lead into, the critic at those in which actions were taken:
    it learns nothing about the terminal goal.
    """
    envs = FourRoomVectorEnv(1, size=7)
    assert envs.maze.goal == 40
    table = np.zeros(49, dtype=np.float32)
    table[[11, 33, 39]], table[[12, 40, 20]] = (7, 7, 6), (8, 9, 10)  # no action was taken in these
    tuples = make_tuples(
        [5, 5, 11, 5, 39, 33, 33, 39],
        [1, 1, 1, 1, 1, 2, 2, 1],
        [11, 12, 12, 13, 40, 40, 40, 11],
        [-0.01, 0.5, -0.01, 0, 5, 5, 5, -0.01],
        [1, 3, 6, 9, 4, 5, 5, 0],
        [8, 8, 9, 8, 9, 8, 8, 9],
    )
    number = 4_000
    args, rng = Args(start_states=start_states, num_traces=number), np.random.default_rng(0)
    found = script.high_value_states(tuples, TableCritic(table), envs, args, rng)
    assert all(column.shape == (number,) for column in found)
    counts = Counter(zip(*(column.tolist() for column in found), strict=True))
    assert set(counts) == set(expected)
    share = np.array([expected[key] for key in counts]) / sum(expected.values())
    assert within_five_sigma(np.array(list(counts.values())), share, number)


def test_high_value_state_of_a_goal_known_ahead_of_time():
    """Nobody has been there: the goal, what the step into it gives, and no cell in which the traces would begin."""
    envs = FourRoomVectorEnv(1, size=7, goal_reward=3.0)
    args = Args(start_states="goal", num_traces=5)
    starts, first_cells, values = script.high_value_states(None, Critic(49), envs, args, np.random.default_rng(0))
    assert starts.tolist() == [40] * 5 and first_cells.tolist() == [-1] * 5 and values.tolist() == [2.99] * 5


def test_most_valued_state_when_all_tuples_lead_into_the_goal():
    """--top-fraction may leave nothing but last steps: the critic does not value the goal, but the cells before it."""
    envs = FourRoomVectorEnv(1, size=7)
    table = np.zeros(49, dtype=np.float32)
    table[[33, 39, 40]] = 1, 2, 3
    tuples = make_tuples([39, 33], [1, 2], [40, 40], [4.99, 4.99], [4.99, 4.99], [8, 9])
    args = Args(start_states="value", num_traces=5)
    found = script.high_value_states(tuples, TableCritic(table), envs, args, np.random.default_rng(0))
    assert [column.tolist() for column in found] == [[39] * 5, [8] * 5, [2.0] * 5]


# -------------------------------------------------------------------------------------------------- trajectory buffer


class NaiveBuffer:
    """Elite retention with lists, one step at a time."""

    def __init__(self, capacity, num_envs, gamma):
        self.capacity, self.gamma = capacity, gamma
        self.running = [[] for _ in range(num_envs)]
        self.best, self.returns, self.looped, self.tied = [], [], 0, 0  # best: (return, rows of a Tuples), worst first

    def add(self, rollout):
        ended = []
        for i, t in np.ndindex(*rollout.cells.T.shape):
            cell, action, reward, after, terminated, truncated = (column[t, i].item() for column in rollout)
            self.running[i].append((cell, action, after, reward))
            if terminated or truncated:
                episode, self.running[i] = self.running[i], []
                ended.append((sum(step[3] for step in episode), len(episode)))
                if any(step[3] > 0 for step in episode):
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
            cells = [episode[k][0] for k in way]
            if step[0] in cells:
                del way[cells.index(step[0]) :]
            way.append(t)
        self.looped += len(way) < len(episode)
        return [
            (*episode[t], sum(self.gamma**k * step[3] for k, step in enumerate(episode[t:])), episode[0][0])
            for t in way
        ]


def walks(rng, num_envs=5, rollouts=120, num_steps=6, **kwargs):
    """Rollouts of a random walk; its returns may be negative even where the goal is reached, and are often equal."""
    settings = {"size": 7, "start": "random", "goal_reward": 0.15, "max_steps": 40, **kwargs}
    envs = FourRoomVectorEnv(num_envs, **settings)
    cells, _ = envs.reset(seed=0)
    for _ in range(rollouts):
        rollout, cells = script.collect_rollout(envs, cells, np.full((len(envs.maze.free), 4), 0.25), num_steps, rng)
        yield rollout


@pytest.mark.parametrize("capacity", [1, 4, 1_000])
def test_buffer_equals_a_naive_one(capacity):
    """After every rollout: what ended, what is kept in which order, and its tuples with values and first cells."""
    buffer, naive, num_ended = TrajectoryBuffer(capacity, 5, 0.9), NaiveBuffer(capacity, 5, 0.9), 0
    for rollout in walks(np.random.default_rng(0)):
        ended, expected = buffer.add(rollout), naive.add(rollout)
        assert [length for _, length in ended] == [length for _, length in expected]
        assert [value for value, _ in ended] == pytest.approx([value for value, _ in expected])
        num_ended += len(ended)
        assert [value for value, _ in buffer.best] == pytest.approx([value for value, _ in naive.best])
        for (_, tuples), (_, rows) in zip(buffer.best, naive.best, strict=True):
            np.testing.assert_allclose(np.stack(tuples, axis=1), np.array(rows), rtol=0, atol=1e-9)
    assert 10 < len(naive.returns) < num_ended  # some found the goal and some did not,
    assert min(naive.returns) < 0 and naive.looped and (naive.tied or capacity != 4)  # with losses, loops and ties


def test_kept_tuples_lead_from_the_first_cell_to_the_goal_without_loops():
    buffer, maze = TrajectoryBuffer(12, 5, 0.9), FourRoomMaze(7, start="random")
    for rollout in walks(np.random.default_rng(1)):
        buffer.add(rollout)
    assert len(buffer.best) == 12
    for _, tuples in buffer.best:
        assert len(set(tuples.cells.tolist())) == len(tuples.cells)
        assert (maze.next_cell[tuples.cells, tuples.actions] == tuples.next_cells).all()
        assert (tuples.cells[1:] == tuples.next_cells[:-1]).all() and tuples.next_cells[-1] == maze.goal
        assert (tuples.first_cells == tuples.cells[0]).all()
        assert (np.diff(tuples.values) > 0).all()  # later is nearer to the reward


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5, 0.1, 0.0])
def test_values_are_discounted_returns_to_go(gamma):
    """Any --gamma from 0 to 1 and the longest episode of the largest maze of the paper."""
    length, rng = 361, np.random.default_rng(0)
    rewards = rng.normal(size=length)
    steps, never = np.arange(length), np.zeros(length, dtype=bool)
    columns = {"cells": steps, "actions": steps % 4, "rewards": rewards, "next_cells": steps + 1, "truncated": never}
    columns["terminated"] = steps == length - 1
    buffer = TrajectoryBuffer(1, 1, gamma)
    buffer.add(Rollout(**{name: column[:, None] for name, column in columns.items()}))
    expected, value = np.zeros(length), 0.0
    for t in reversed(range(length)):
        expected[t] = value = rewards[t] + gamma * value
    ((total, tuples),) = buffer.best
    assert total == pytest.approx(rewards.sum())
    np.testing.assert_allclose(tuples.values, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1, 1e-9])
def test_most_valuable_takes_the_top_fraction_of_all_tuples(fraction):
    buffer = TrajectoryBuffer(6, 5, 0.9)
    for rollout in walks(np.random.default_rng(0)):
        buffer.add(rollout)
    everything = Counter(row for _, tuples in buffer.best for row in zip(*tuples, strict=True))
    chosen = Counter(zip(*buffer.most_valuable(fraction), strict=True))
    assert chosen <= everything
    assert chosen.total() == max(1, round(fraction * everything.total()))
    rest = everything - chosen
    assert min(row[4] for row in chosen) >= max((row[4] for row in rest), default=-math.inf)
    assert fraction == 1 or len(rest) > 0


def test_buffer_goes_on_after_a_round_trip_through_a_file():
    """Saved in the midst of episodes, the copy in a new buffer holds and finds the same trajectories from there on."""
    buffer, restored, num_ended = TrajectoryBuffer(4, 5, 0.9), TrajectoryBuffer(4, 5, 0.9), 0
    for i, rollout in enumerate(walks(np.random.default_rng(0))):
        ended = buffer.add(rollout)
        if i == 60:
            file = io.BytesIO()
            torch.save(buffer.state_dict(), file)
            file.seek(0)
            restored.load_state_dict(torch.load(file, weights_only=True))
            kept = [value for value, _ in buffer.best]
        elif i > 60:
            assert restored.add(rollout) == ended
            num_ended += len(ended)
        if i >= 60:
            assert [value for value, _ in restored.best] == [value for value, _ in buffer.best]
            for (_, tuples), (_, copied) in zip(buffer.best, restored.best, strict=True):
                for column, other in zip(tuples, copied, strict=True):
                    assert column.dtype == other.dtype and (column == other).all()
    assert len(kept) == len(restored.best) == 4 and num_ended
    assert kept != [value for value, _ in restored.best]


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

        def note_real(actor, critic, optimizer, rollout, args):
            real[0] += 1
            if rollout.terminated.any():
                found.append(real[0])

        counted("update_actor_critic", note_real)
        counted("imitate", lambda *_: imitations.append(real[0]))
        counted("update_backtracking_model", lambda *_: fits.append(real[0]))
        monkeypatch.setattr(script, "draw_pictures", lambda *_: {})
        settings = {"num_envs": 16, "num_steps": 5, "num_traces": 4, "backtracking_batch_size": 8, "eval_every": 10**9}
        settings |= {"recall_updates": 1, "backtracking_updates": 1, **kwargs}
        script.main(Args(run_dir=tmp_path / "run", **settings))
        return real[0], imitations, fits, found[0] if found else None

    yield run
    torch.use_deterministic_algorithms(False)


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
    policy = script.policy_table(perturbed(Actor(121, 4), seed=1, scale=0.2)).astype(np.float64)
    np.testing.assert_allclose(policy.sum(axis=1), 1, rtol=0, atol=1e-6)
    return policy / policy.sum(axis=1, keepdims=True)


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
                policy[cell, action] * h[EVENTS[event] - t - 1, after] / h[EVENTS[event] - t, cell]
                for t, (cell, action, after) in enumerate(steps_of([taken], [visited]))
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
    actor = perturbed(Actor(121, 4), seed=1, scale=0.2)
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
    traces = [(states[i][3::-1], actions[i][::-1]) for i in range(6) for _ in range(counts[i])]
    columns = (np.array(column).T for column in zip(*traces, strict=True))
    script.imitate(actor, torch.optim.SGD(actor.parameters(), lr=0.1), *columns, np.ones((4, 16), dtype=bool), "cpu")
    for new, old in zip(actor.parameters(), expected, strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=1e-6)
    assert elbo(actor) > before


@pytest.mark.parametrize("recall", RECALLS)
def test_recall_traces_from_the_goal_are_samples_from_q(recall):
    """Whole traces that reach the start in 4 steps: as frequent as the product of q(s_t, a_t | s_{t+1}) says."""
    maze = FourRoomMaze(**SETTINGS)
    torch.manual_seed(0)
    model, number = perturbed(BacktrackingModel(maze, recall), scale=0.1), 4_000
    actions, states, prior = event_trajectories(maze, random_policy(), "shortest paths")
    if recall == "learned":  # otherwise hardly any trace would reach the start
        tuples = make_tuples(*zip(*steps_of(actions, states), strict=True))
        list(fit(model, tuples, np.random.default_rng(0), [(1e-2, 40)], recall=recall, backtracking_batch_size=64))
    starts, first_cells = np.full(number, maze.goal), np.full(number, maze.starts[0])
    traces = script.recall_traces(model, starts, first_cells, 9, np.random.default_rng(0))
    counts = Counter()
    for visited, taken, in_trace in zip(*(column.T for column in traces), strict=True):
        if visited[in_trace][-1] == maze.starts[0]:
            counts[tuple(taken[in_trace][::-1].tolist())] += 1
    q = np.exp(backward_log_prob(model, actions, states))
    assert q.sum() > 0.02
    assert within_five_sigma(np.array([counts[taken] for taken in actions]), q, number)


def rejection_samples(policy, event, number, rng):
    """Trajectories of the policy, at most `number`, of which those with R > L are kept: their actions, and a Tuples."""
    envs = FourRoomVectorEnv(number, max_steps=HORIZON, **SETTINGS)
    cells, _ = envs.reset(seed=0)
    rollout, _ = script.collect_rollout(envs, cells, policy, HORIZON, rng)
    done = rollout.terminated | rollout.truncated
    first = np.cumsum(done, axis=0) - done == 0  # the first episode of each environment
    returns = (first * GAMMA ** np.arange(HORIZON)[:, None] * rollout.rewards).sum(axis=0)
    kept = first & (returns > threshold(event))
    actions = [tuple(rollout.actions[kept[:, i], i].tolist()) for i in np.flatnonzero(kept.any(axis=0))]
    return actions, make_tuples(*(column[kept] for column in (rollout.cells, rollout.actions, rollout.next_cells)))


@pytest.mark.parametrize("event", EVENTS)
def test_rejection_samples_follow_the_posterior(event):
    """Section 4: forward-generated trajectories which lead to R > L are samples from p(tau | R > L)."""
    maze, policy = FourRoomMaze(**SETTINGS), random_policy()
    number = 30_000
    actions, _, prior = event_trajectories(maze, policy, event)
    drawn, _ = rejection_samples(policy, event, number, np.random.default_rng(0))
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
    - If R > L only for shortest paths, a cell tells how many steps are left. Then the posterior, a Markov chain whose
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
        excess = sum(n * math.log(n / into[s] / tables[s][cell, action]) for (cell, action, s), n in counts.items())
        assert forward == pytest.approx(minimum + excess, abs=1e-4)
        return forward, kl(q / q.sum(), posterior)

    rng = np.random.default_rng(0)
    _, tuples = rejection_samples(policy, event, 30_000, rng)
    torch.manual_seed(0)
    model = BacktrackingModel(maze, recall)
    course = [divergences(model)]
    schedule = [(1e-3, 20)] * 10 + [(3e-3, 40)] * 4 + [(5e-4, 50)]
    for _ in fit(model, tuples, rng, schedule, recall=recall, backtracking_batch_size=512):
        course.append(divergences(model))
    forward, reverse = np.array(course).T
    assert (np.diff(forward) < 0.1).all() and (np.diff(forward[:5]) < 0).all()
    assert minimum - 1e-6 <= forward[-1] < minimum + 0.1 < forward[0]
    assert reverse[-1] < reverse[0] / 2
    if event == "shortest paths":
        assert reverse[-1] < 0.05


def test_exact_predecessors_give_no_probability_to_avoidable_bumps():
    """So `true` and `random` are at an infinite divergence from a posterior in which the agent bumps into walls."""
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
        assert (np.isneginf(log_q) == bumps).all()
