"""The mathematics of per_a2c_fourroom.py against closed forms and independent implementations."""

import ast
import io
import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import per_a2c_fourroom as script
import recall_a2c_fourroom as twin
from envs.four_room import FourRoomMaze
from per_a2c_fourroom import Actor, Args, Critic, ReplayBuffer, Rollout, Tuples

torch.set_num_threads(1)
ALPHA, EPSILON, CELLS, ACTIONS = 0.7, 1e-6, 49, 4


# ------------------------------------------------------------------------------------------------------ helpers


def random_rollout(rng, num_steps, num_envs, end=0.1):
    """Any transitions; a terminated episode has found something of value, a truncated one has not."""
    shape = (num_steps, num_envs)
    cells, actions, next_cells = (
        rng.integers(CELLS, size=shape),
        rng.integers(4, size=shape),
        rng.integers(49, size=shape),
    )
    terminated = rng.random(shape) < end
    truncated = ~terminated & (rng.random(shape) < end)
    return Rollout(cells, actions, np.where(terminated, 5.0, -rng.random(shape)), next_cells, terminated, truncated)


def filled_buffer(size, capacity=None, priority="td-error", alpha=ALPHA, seed=0):
    """A buffer with `size` transitions or more in it, each with a priority of its own, and these priorities."""
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer(capacity or 4 * size, 2, 0.9, alpha, priority)
    while buffer.stored < size:
        buffer.add(random_rollout(rng, 10, 2))
    priorities = rng.exponential(size=len(buffer))
    buffer.set_priorities(np.arange(len(buffer)), priorities)
    return buffer, priorities


def probabilities(priorities, alpha=ALPHA):
    """P(i) of Schaul et al., Eq. (1)."""
    powers = (np.asarray(priorities) + EPSILON) ** alpha
    return powers / powers.sum()


def rows(buffer):
    """What a buffer holds, oldest first: a tuple for each transition."""
    order = (np.arange(len(buffer)) + (buffer.stored if buffer.stored > buffer.capacity else 0)) % buffer.capacity
    return [tuple(column[slot].item() for column in buffer.tuples) for slot in order]


class NaiveBuffer:
    """The same in plain Python, one transition after another."""

    def __init__(self, capacity, num_envs, gamma, priority):
        self.kept, self.gamma, self.priority = deque(maxlen=capacity), gamma, priority
        self.episodes, self.ended = [[] for _ in range(num_envs)], []

    def add(self, rollout):
        for i, episode in enumerate(self.episodes):
            for t in range(len(rollout.cells)):
                episode.append([column[t, i].item() for column in rollout])
                if rollout.terminated[t, i] or rollout.truncated[t, i]:
                    self.ended.append((sum(row[2] for row in episode), len(episode)))
                    if self.priority == "td-error" or any(row[2] > 0 for row in episode):
                        for k, (cell, action, reward, next_cell, terminated, _) in enumerate(episode):
                            value = sum(self.gamma**j * row[2] for j, row in enumerate(episode[k:]))
                            self.kept.append((cell, action, next_cell, reward, value, terminated))
                    episode.clear()


def networks(seed=0):
    """Actor and critic with weights far from their initial ones, and the optimizer of both."""
    torch.manual_seed(seed)
    actor, critic = Actor(CELLS, ACTIONS), Critic(CELLS)
    weights = [*actor.parameters(), *critic.parameters()]
    with torch.no_grad():
        for weight in weights:
            weight += 0.3 * torch.randn_like(weight)
    return actor, critic, torch.optim.SGD(weights, lr=1.0)


def replay_args(priority, **changes):
    return Args(
        **{"priority": priority, "replay_batch_size": 50, "priority_alpha": ALPHA, "priority_beta": 0.4} | changes
    )


def td_errors(tuples, critic, gamma):
    """r + gamma V(s') - V(s), with V(s') = 0 after a terminal step; a truncated step is not terminal."""
    with torch.no_grad():
        v, next_v = critic(torch.from_numpy(tuples.cells)), critic(torch.from_numpy(tuples.next_cells))
    return np.array(
        [
            reward + (0 if terminated else gamma * after) - before
            for reward, terminated, before, after in zip(
                tuples.rewards, tuples.terminated, v.tolist(), next_v.tolist(), strict=True
            )
        ]
    )


# ------------------------------------------------------------------------------------------------------ the twin


def definitions(module):
    tree = ast.parse(Path(module.__file__).read_text())
    return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_it_differs_from_its_twin_only_where_replay_takes_the_place_of_recall():
    mine, other = definitions(script), definitions(twin)
    different = {name for name in mine.keys() & other.keys() if mine[name] != other[name]}
    assert different == {"Args", "Tuples", "draw_pictures", "check", "main"}
    assert mine.keys() - other.keys() == {"ReplayBuffer", "update_from_replay"}
    recall = {"high_value_states", "recall_traces", "imitate", "trace_error"}
    assert other.keys() - mine.keys() == recall | {"BacktrackingModel", "TrajectoryBuffer", "update_backtracking_model"}
    settings = [vars(module.Args()).items() for module in (script, twin)]
    assert {name for name, _ in settings[0] ^ settings[1]} >= {"priority", "recall"}
    shared = vars(script.Args()).keys() & vars(twin.Args()).keys()
    assert {name: vars(script.Args())[name] for name in shared} == {name: vars(twin.Args())[name] for name in shared}
    assert {"learning_rate", "num_steps", "num_envs", "gamma", "gae_lambda", "ent_coef", "vf_coef"} <= shared


@pytest.mark.parametrize("priority", ["return", "td-error"])
def test_without_replay_it_is_the_plain_actor_critic(priority, tmp_path):
    """The same bits as `recall_a2c_fourroom.py --recall none`: replay is all that it adds."""
    settings = {"size": 7, "num_envs": 4, "num_steps": 8, "total_timesteps": 2000, "eval_every": 500}
    script.main(script.Args(run_dir=tmp_path / "per", priority=priority, replay_every=1000, **settings))
    twin.main(twin.Args(run_dir=tmp_path / "none", recall="none", **settings))
    mine, other = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("per", "none"))
    for part in ("actor", "critic"):
        assert all(torch.equal(mine[part][key], other[part][key]) for key in other[part])
    assert mine["losses"] == other["losses"]


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95])
def test_transitions_are_drawn_with_probability_proportional_to_a_power_of_their_priority(alpha):
    """In one draw at a time, which are independent."""
    buffer, priorities = filled_buffer(20, alpha=alpha)
    rng, number = np.random.default_rng(1), 20_000
    drawn = np.concatenate([buffer.sample(1, 0.4, rng)[0] for _ in range(number)])
    expected = number * probabilities(priorities, alpha)
    assert chisquare(np.bincount(drawn, minlength=len(buffer)), expected).pvalue > 1e-4
    uniform = np.full(len(buffer), number / len(buffer))
    assert (chisquare(np.bincount(drawn, minlength=len(buffer)), uniform).pvalue > 1e-4) == (alpha == 0)


def test_batches_are_drawn_with_these_probabilities_from_equal_shares():
    """A batch holds each transition as often as expected, or one time more or less; on average as often as expected."""
    buffer, priorities = filled_buffer(300)
    rng, size, number = np.random.default_rng(1), 250, 2000
    counts = np.array([np.bincount(buffer.sample(size, 0.4, rng)[0], minlength=len(buffer)) for _ in range(number)])
    expected = size * probabilities(priorities)
    assert (np.abs(counts - expected) < 2).all()
    error = counts.std(axis=0) / np.sqrt(number)
    assert (np.abs(counts.mean(axis=0) - expected) < 5 * error + 1e-3).all()


def test_the_same_generator_draws_the_same_batch():
    buffer, _ = filled_buffer(100)
    one, other = (buffer.sample(30, 0.4, np.random.default_rng(5))[0] for _ in range(2))
    assert (one == other).all()
    assert (one != buffer.sample(30, 0.4, np.random.default_rng(6))[0]).any()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_first_and_the_last_number_draw_the_first_and_the_last_transition(u):
    class FixedRandom:
        def random(self, size):
            return np.full(size, u)

    buffer, _ = filled_buffer(50)
    slots, _ = buffer.sample(len(buffer), 0.4, FixedRandom())
    assert slots.min() >= 0
    assert slots[0 if u == 0 else -1] == (0 if u == 0 else len(buffer) - 1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_importance_weights_match_their_definition(beta):
    buffer, priorities = filled_buffer(40)
    slots, weights = buffer.sample(30, beta, np.random.default_rng(2))
    all_weights = (len(buffer) * probabilities(priorities)) ** -beta
    np.testing.assert_allclose(weights, all_weights[slots] / all_weights.max(), rtol=1e-12)


def test_full_importance_weights_make_the_mean_of_any_quantity_uniform():
    """E_P[w f] is proportional to the plain mean of f if beta is 1."""
    buffer, priorities = filled_buffer(40)
    values, rng = np.random.default_rng(3).normal(2, 1, len(buffer)), np.random.default_rng(4)
    slots, weights = (np.concatenate(parts) for parts in zip(*(buffer.sample(40, 1.0, rng) for _ in range(3000))))  # noqa: B905
    terms = weights * values[slots] / weights.mean()
    assert abs(terms.mean() - values.mean()) < 5 * terms.std() / np.sqrt(len(terms))
    assert abs(values[slots].mean() - values.mean()) > 5 * terms.std() / np.sqrt(len(terms))  # not so without them


def test_updated_priorities_take_effect_at_once_and_on_nothing_else():
    buffer, priorities = filled_buffer(40)
    before = buffer.powers.copy()
    buffer.set_priorities(np.array([3, 7]), np.array([0.0, 2 * priorities.sum()]))
    changed = np.flatnonzero(buffer.powers != before)
    assert changed.tolist() == [3, 7]
    priorities[[3, 7]] = 0.0, 2 * priorities.sum()
    rng, number = np.random.default_rng(1), 20_000
    drawn = np.concatenate([buffer.sample(1, 0.4, rng)[0] for _ in range(number)])
    counts, expected = np.bincount(drawn, minlength=len(buffer)), number * probabilities(priorities)
    often = expected > 5
    assert counts[3] <= 5 and not often[3]
    assert chisquare(counts[often], expected[often] * counts[often].sum() / expected[often].sum()).pvalue > 1e-4


def test_even_a_priority_of_zero_is_drawn_now_and_then():
    buffer, _ = filled_buffer(10)
    buffer.set_priorities(np.arange(len(buffer)), np.zeros(len(buffer)))
    slots, weights = buffer.sample(len(buffer), 1.0, np.random.default_rng(0))
    assert len(set(slots.tolist())) > 1
    np.testing.assert_allclose(weights, 1)


@pytest.mark.parametrize("alpha, beta", [(0.8, 0.1), (0.95, 0.1), (1.0, 1.0), (10.0, 1.0)])
def test_priorities_of_zero_among_others_leave_weights_and_frequencies_as_defined(alpha, beta):
    """The normal case of returns: what went no better than expected has priority zero."""
    buffer, priorities = filled_buffer(30, alpha=alpha)
    priorities[::3] = 0
    buffer.set_priorities(np.arange(len(buffer)), priorities)
    rng, p = np.random.default_rng(3), probabilities(priorities, alpha)
    slots, weights = (np.concatenate(parts) for parts in zip(*(buffer.sample(30, beta, rng) for _ in range(300))))  # noqa: B905
    np.testing.assert_allclose(weights, (p[slots] / p.min()) ** -beta, rtol=1e-9)
    assert (weights > 0).all() and (weights <= 1).all()
    expected = 9000 * p
    often = expected > 5
    counts = np.bincount(slots, minlength=len(buffer))
    assert chisquare(counts[often], expected[often] * counts[often].sum() / expected[often].sum()).pvalue > 1e-4
    assert counts[~often].sum() <= 20


def test_a_batch_larger_than_the_buffer_is_an_error_in_words():
    buffer, _ = filled_buffer(10)
    for size in (len(buffer) + 1, 10_000):
        with pytest.raises(ValueError, match=rf"\b{size}\b.*\b{len(buffer)}\b"):
            buffer.sample(size, 0.4, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\b1\b.*\b0\b"):
        ReplayBuffer(10, 1, 0.9, ALPHA, "return").sample(1, 0.4, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------------ storing


@pytest.mark.parametrize("priority", ["return", "td-error"])
@pytest.mark.parametrize("capacity", [1, 7, 64, 100_000])
def test_buffer_equals_a_naive_one(priority, capacity):
    """Before, at and after the wrap-around, with episodes longer than the buffer, across rollouts."""
    rng = np.random.default_rng(0)
    buffer, naive = ReplayBuffer(capacity, 3, 0.9, ALPHA, priority), NaiveBuffer(capacity, 3, 0.9, priority)
    ended = []
    for _ in range(60):
        rollout = random_rollout(rng, int(rng.integers(1, 12)), 3)
        ended += buffer.add(rollout)
        naive.add(rollout)
        assert len(buffer) == len(naive.kept)
        np.testing.assert_allclose(np.array(rows(buffer), float), np.array([*naive.kept], float))
    np.testing.assert_allclose(ended, naive.ended)
    assert len(ended) > 100
    if priority == "return":
        assert len(ended) > sum(row[-1] for row in rows(buffer))  # some found nothing


def test_new_transitions_get_the_highest_priority_and_others_keep_theirs():
    buffer = ReplayBuffer(50, 2, 0.9, ALPHA, "td-error")
    rng = np.random.default_rng(0)
    while not len(buffer):
        buffer.add(random_rollout(rng, 5, 2))
    first = len(buffer)
    assert (buffer.powers[:first] == 1).all()
    while buffer.stored < 300:
        buffer.set_priorities(np.arange(len(buffer)), rng.exponential(size=len(buffer)))
        powers, stored = buffer.powers.copy(), buffer.stored
        buffer.add(random_rollout(rng, 3, 2))
        new = np.unique(np.arange(stored, buffer.stored) % buffer.capacity)
        old = np.setdiff1d(np.arange(buffer.capacity), new)
        assert (buffer.powers[old] == powers[old]).all()
        assert (buffer.powers[new] == powers.max()).all()
    assert (buffer.powers > 0).all()


def test_buffer_goes_on_after_a_round_trip_through_a_file():
    for size in (30, 400):  # before and after the wrap-around
        buffer, _ = filled_buffer(size, capacity=400)
        for _ in range(size // 10):
            buffer.add(random_rollout(np.random.default_rng(7), 10, 2))
        file, other = io.BytesIO(), ReplayBuffer(400, 2, 0.9, ALPHA, "td-error")
        torch.save(buffer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        for one in (buffer, other):
            one.set_priorities(np.arange(5), np.full(5, 9.0))
            one.add(random_rollout(np.random.default_rng(8), 30, 2))
        assert rows(buffer) == rows(other)
        draws = [one.sample(20, 0.4, np.random.default_rng(9)) for one in (buffer, other)]
        assert all((mine == its).all() for mine, its in zip(*draws, strict=True))


# ------------------------------------------------------------------------------------------------------ the update


@pytest.mark.parametrize("priority", ["return", "td-error"])
@pytest.mark.parametrize("max_grad_norm", [1e9, 0.05])
def test_update_from_replay_equals_an_independent_implementation(priority, max_grad_norm):
    """One pass over the batch in plain Python; no entropy bonus; new priorities are the size of the advantages."""
    args = replay_args(priority, max_grad_norm=max_grad_norm, vf_coef=0.3, gamma=0.9)
    buffer, _ = filled_buffer(200, priority=priority)
    slots, weights = buffer.sample(50, args.priority_beta, np.random.default_rng(5))
    tuples = Tuples(*(column[slots] for column in buffer.tuples))
    powers = buffer.powers.copy()

    actor, critic, _ = networks()
    if priority == "return":
        with torch.no_grad():
            values = critic(torch.from_numpy(tuples.cells)).numpy()
        advantages = np.array([max(r - v, 0) for r, v in zip(tuples.values, values.tolist(), strict=True)])
        assert 0 < np.count_nonzero(advantages) < 50
    else:
        advantages = td_errors(tuples, critic, 0.9)
        assert tuples.terminated.any()
    loss = 0
    for i in range(50):
        cell = torch.tensor([tuples.cells[i]])
        log_prob = torch.distributions.Categorical(logits=actor(cell)).log_prob(torch.tensor([tuples.actions[i]]))
        target = critic(cell).detach() + advantages[i]
        loss = loss + weights[i] / 50 * (-advantages[i] * log_prob + 0.3 * (target - critic(cell)) ** 2).sum()
    loss.backward()
    parameters = [*actor.parameters(), *critic.parameters()]
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    expected = [p.detach() - p.grad * min(1, max_grad_norm / norm.item()) for p in parameters]

    actor, critic, optimizer = networks()
    losses = script.update_from_replay(actor, critic, optimizer, buffer, args, np.random.default_rng(5))
    for parameter, value in zip([*actor.parameters(), *critic.parameters()], expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-5)
    assert losses["replay/policy_loss"] + 0.3 * losses["replay/value_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert losses["replay/weight"] == pytest.approx(weights.mean(), rel=1e-4)
    assert losses["replay/advantage"] == pytest.approx(advantages.mean(), rel=1e-4)
    powers[slots] = (np.abs(advantages) + EPSILON) ** ALPHA
    np.testing.assert_allclose(buffer.powers, powers, rtol=1e-4)


def test_returns_that_the_critic_expects_or_surpasses_teach_nothing():
    args, (buffer, _) = replay_args("return"), filled_buffer(200, priority="return")
    actor, critic, optimizer = networks()
    with torch.no_grad():
        [*critic.parameters()][-1].fill_(100)
    before = [parameter.detach().clone() for parameter in (*actor.parameters(), *critic.parameters())]
    losses = script.update_from_replay(actor, critic, optimizer, buffer, args, np.random.default_rng(0))
    assert [losses[f"replay/{name}"] for name in ("policy_loss", "value_loss", "advantage")] == [0, 0, 0]
    after = [*actor.parameters(), *critic.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------------------------ the run


@pytest.fixture
def count_replays(tmp_path, monkeypatch):
    """A function that trains and gives the batch size of every replay update."""

    def count(**settings):
        batches, sample = [], ReplayBuffer.sample

        def counted(self, batch_size, beta, rng):
            batches.append((batch_size, len(self), beta))
            return sample(self, batch_size, beta, rng)

        monkeypatch.setattr(ReplayBuffer, "sample", counted)
        small = {"size": 7, "num_envs": 4, "num_steps": 5, "total_timesteps": 20 * 60, "run_dir": tmp_path / "run"}
        script.main(Args(**small | settings))
        return batches

    return count


@pytest.mark.parametrize("every, updates", [(1, 1), (3, 4), (7, 2)])
def test_replay_phases_come_every_so_many_updates_and_hold_so_many(count_replays, every, updates):
    """All of them with td-error once an episode has ended: at the latest after 49 steps each."""
    batches = count_replays(priority="td-error", replay_every=every, replay_updates=updates)
    phases = 60 // every
    skipped = phases - len(batches) / updates
    assert len(batches) % updates == 0
    assert 0 <= skipped <= -(-49 // 5)
    assert len(batches) > 0


def test_a_small_buffer_gives_small_batches(count_replays):
    batches = count_replays(priority="td-error", replay_batch_size=500, priority_beta=0.3)
    assert all(size == min(500, held) and beta == 0.3 for size, held, beta in batches)
    assert batches[0][0] < batches[-1][0] == 500


@pytest.mark.parametrize(
    "size, batch_size, alpha",
    [
        (7, 200, 0.8),
        (11, 200, 0.8),
        (12, 200, 0.8),
        (13, 2000, 0.8),
        (14, 2000, 0.8),
        (15, 1000, 0.95),
        (19, 1000, 0.95),
    ],
)
def test_hyper_parameters_follow_table_3(size, batch_size, alpha, tmp_path):
    script.main(Args(size=size, total_timesteps=1, run_dir=tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (saved["replay_batch_size"], saved["priority_alpha"]) == (batch_size, alpha)
    assert (saved["priority_beta"], saved["replay_every"], saved["buffer_size"]) == (0.1, 3, 100_000)


def test_the_batch_of_table_3_is_cut_to_a_smaller_buffer(tmp_path):
    script.main(Args(size=13, buffer_size=50, total_timesteps=1, run_dir=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["replay_batch_size"] == 50


def test_hyper_parameters_given_by_flags_stay(tmp_path):
    script.main(Args(size=13, replay_batch_size=7, priority_alpha=0.0, total_timesteps=1, run_dir=tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (saved["replay_batch_size"], saved["priority_alpha"]) == (7, 0.0)


@pytest.mark.parametrize("number", [50, 500])  # before and after the wrap-around
def test_the_picture_of_the_replay_shows_the_probability_of_every_cell(number, monkeypatch):
    maze, drawn = FourRoomMaze(7), {}
    monkeypatch.setattr(
        script, "draw_cells", lambda maze, values, title, arrows=None: drawn.update({title: (values, arrows)})
    )
    buffer, _ = filled_buffer(number, capacity=100)
    script.draw_pictures(maze, np.zeros(49), Critic(CELLS), buffer)
    ((shares, arrows),) = (panel for title, panel in drawn.items() if "Replay" in title)
    expected = np.zeros((CELLS, ACTIONS))
    for slot in range(len(buffer)):
        power = 100 * buffer.powers[slot] / buffer.powers[: len(buffer)].sum()
        expected[buffer.tuples.cells[slot], buffer.tuples.actions[slot]] += power
    np.testing.assert_allclose(arrows, expected, atol=1e-9)
    np.testing.assert_allclose(np.nan_to_num(shares), expected.sum(axis=1), atol=1e-9)
    assert np.nansum(shares) == pytest.approx(100)
    assert (np.isnan(shares) == (expected.sum(axis=1) == 0)).all()
