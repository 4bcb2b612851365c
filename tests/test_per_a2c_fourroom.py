"""The mathematics of per_a2c_fourroom.py against closed forms and independent implementations."""

import ast
import io
import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from scipy.stats import chisquare

import per_a2c_fourroom as script
import recall_a2c_fourroom as twin
from per_a2c_fourroom import Args, ReplayBuffer, Rollout, Tuples

torch.set_num_threads(1)
ALPHA, EPSILON, STATES, ACTIONS = 0.7, 1e-6, 49, 4


# ------------------------------------------------------------------------------------------------------ helpers


def random_rollout(rng, num_steps, num_envs, end=0.1):
    """Any transitions; a terminated episode has found something of value, a truncated one has not."""
    shape = (num_steps, num_envs)
    states, actions, next_states = (rng.integers(number, size=shape) for number in (STATES, ACTIONS, STATES))
    terminated = rng.random(shape) < end
    truncated = ~terminated & (rng.random(shape) < end)
    rewards = np.where(terminated, 5.0, -rng.random(shape))
    return Rollout(states, actions, rewards, next_states, terminated, truncated)


def set_priorities(buffer, slots, priorities):
    buffer.powers[slots] = (priorities + EPSILON) ** buffer.alpha


def filled_buffer(size, capacity=None, priority="td-error", alpha=ALPHA, seed=0):
    """A buffer with `size` transitions or more in it, each with a priority of its own, and these priorities."""
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer(capacity or 4 * size, 2, 0.9, alpha, priority)
    while buffer.stored < size:
        buffer.add(random_rollout(rng, 10, 2))
    priorities = rng.exponential(size=len(buffer))
    set_priorities(buffer, np.arange(len(buffer)), priorities)
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
            for t in range(len(rollout.states)):
                episode.append([column[t, i].item() for column in rollout])
                if rollout.terminated[t, i] or rollout.truncated[t, i]:
                    self.ended.append((sum(row[2] for row in episode), len(episode)))
                    if self.priority == "td-error" or any(row[2] > 0 for row in episode):
                        for k, (state, action, reward, next_state, terminated, _) in enumerate(episode):
                            value = sum(self.gamma**j * row[2] for j, row in enumerate(episode[k:]))
                            self.kept.append((state, action, reward, next_state, terminated, value))
                    episode.clear()


def networks(seed=0):
    """Actor and critic with weights far from their initial ones, and the optimizer of both."""
    torch.manual_seed(seed)
    actor = script.mlp(nn.Embedding(STATES, 64), ACTIONS)
    critic = script.mlp(nn.Embedding(STATES, 64), 1, gain=1.0)
    weights = [*actor.parameters(), *critic.parameters()]
    with torch.no_grad():
        for weight in weights:
            weight += 0.3 * torch.randn_like(weight)
    return actor, critic, torch.optim.SGD(weights, lr=1.0)


@torch.no_grad()
def values_of(critic, states):
    """V(s) of states (n,), as a list."""
    return critic(torch.from_numpy(states)).squeeze(-1).tolist()


def replay_args(priority, **changes):
    return Args(
        **{"priority": priority, "replay_batch_size": 50, "priority_alpha": ALPHA, "priority_beta": 0.4} | changes
    )


def td_errors(tuples, critic, gamma):
    """r + gamma V(s') - V(s), with V(s') = 0 after a terminal step; a truncated step is not terminal."""
    v, next_v = values_of(critic, tuples.states), values_of(critic, tuples.next_states)
    return np.array(
        [
            reward + (0 if terminated else gamma * after) - before
            for reward, terminated, before, after in zip(tuples.rewards, tuples.terminated, v, next_v, strict=True)
        ]
    )


# ------------------------------------------------------------------------------------------------------ the twin


def definitions(module):
    text = Path(module.__file__).read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def test_it_differs_from_its_twin_only_where_replay_takes_the_place_of_recall():
    mine, other = definitions(script), definitions(twin)
    different = {name for name in mine.keys() & other.keys() if mine[name] != other[name]}
    assert different == {"Args", "main"}
    assert mine.keys() - other.keys() == {"ReplayBuffer", "update_from_replay"}
    recall = {"BacktrackingModel", "TrajectoryBuffer", "cut_loops", "update_backtracking_model"}
    assert other.keys() - mine.keys() == recall | {"high_value_states", "recall_traces", "imitate"}
    settings = [vars(module.Args()).items() for module in (script, twin)]
    assert {name for name, _ in settings[0] ^ settings[1]} >= {"priority", "recall"}
    shared = vars(script.Args()).keys() & vars(twin.Args()).keys()
    assert {name: vars(script.Args())[name] for name in shared} == {name: vars(twin.Args())[name] for name in shared}
    assert {"learning_rate", "num_steps", "num_envs", "gamma", "gae_lambda", "ent_coef", "vf_coef"} <= shared


@pytest.mark.parametrize("priority", ["return", "td-error"])
def test_without_replay_it_is_the_plain_actor_critic(priority, tmp_path):
    """The same bits as `recall_a2c_fourroom.py --recall none`: replay is all that it adds."""
    settings = {"size": 7, "num_envs": 4, "num_steps": 8, "total_timesteps": 2000, "eval_every": 500}
    script.main(script.Args(run_dir=str(tmp_path / "per"), priority=priority, replay_every=1000, **settings))
    twin.main(twin.Args(run_dir=str(tmp_path / "none"), recall="none", **settings))
    mine, other = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("per", "none"))
    for part in ("actor", "critic"):
        assert all(torch.equal(mine[part][key], other[part][key]) for key in other[part])
    assert torch.equal(mine["rng"], other["rng"])
    assert mine["progress"][:2] == other["progress"][:2]  # step and losses


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95])
def test_transitions_are_drawn_with_probability_proportional_to_a_power_of_their_priority(alpha):
    """In one draw at a time, which are independent."""
    buffer, priorities = filled_buffer(20, alpha=alpha)
    number = 20_000
    torch.manual_seed(1)
    drawn = np.concatenate([buffer.sample(1, 0.4)[0] for _ in range(number)])
    expected = number * probabilities(priorities, alpha)
    assert chisquare(np.bincount(drawn, minlength=len(buffer)), expected).pvalue > 1e-4
    uniform = np.full(len(buffer), number / len(buffer))
    assert (chisquare(np.bincount(drawn, minlength=len(buffer)), uniform).pvalue > 1e-4) == (alpha == 0)


def test_batches_are_drawn_with_these_probabilities_from_equal_shares():
    """A batch holds each transition as often as expected, or one time more or less; on average as often as expected."""
    buffer, priorities = filled_buffer(300)
    size, number = 250, 2000
    torch.manual_seed(1)
    counts = np.array([np.bincount(buffer.sample(size, 0.4)[0], minlength=len(buffer)) for _ in range(number)])
    expected = size * probabilities(priorities)
    assert (np.abs(counts - expected) < 2).all()
    error = counts.std(axis=0) / np.sqrt(number)
    assert (np.abs(counts.mean(axis=0) - expected) < 5 * error + 1e-3).all()


def test_the_same_seed_draws_the_same_batch():
    buffer, _ = filled_buffer(100)

    def drawn(seed):
        torch.manual_seed(seed)
        return buffer.sample(30, 0.4)[0]

    assert (drawn(5) == drawn(5)).all() and (drawn(5) != drawn(6)).any()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_first_and_the_last_number_draw_the_first_and_the_last_transition(u, monkeypatch):
    """0 and 1 - 2^-53, the least and the largest number of torch.rand."""
    monkeypatch.setattr(script.torch, "rand", lambda *shape, dtype: torch.full(shape, u, dtype=dtype))
    buffer, _ = filled_buffer(50)
    slots, _ = buffer.sample(len(buffer), 0.4)
    assert slots.min() >= 0 and slots.max() < len(buffer)
    assert slots[0 if u == 0 else -1] == (0 if u == 0 else len(buffer) - 1)


@pytest.mark.parametrize("u", [0.0, 0.5])
def test_the_share_of_a_transition_begins_where_that_of_the_one_before_ends(u, monkeypatch):
    """Of 64 with equal priorities each of 64 shares draws its own, also if its number is the least in it."""
    monkeypatch.setattr(script.torch, "rand", lambda *shape, dtype: torch.full(shape, u, dtype=dtype))
    buffer, _ = filled_buffer(64, capacity=64)
    buffer.powers[:] = 1
    assert buffer.sample(64, 0.4)[0].tolist() == list(range(64))


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_importance_weights_match_their_definition(beta):
    buffer, priorities = filled_buffer(40)
    torch.manual_seed(2)
    slots, weights = buffer.sample(30, beta)
    all_weights = (len(buffer) * probabilities(priorities)) ** -beta
    np.testing.assert_allclose(weights, all_weights[slots] / all_weights.max(), rtol=1e-12)


def test_full_importance_weights_make_the_mean_of_any_quantity_uniform():
    """E_P[w f] is proportional to the plain mean of f if beta is 1."""
    buffer, priorities = filled_buffer(40)
    values = np.random.default_rng(3).normal(2, 1, len(buffer))
    torch.manual_seed(4)
    batches = [buffer.sample(40, 1.0) for _ in range(3000)]
    slots, weights = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    terms = weights * values[slots] / weights.mean()
    assert abs(terms.mean() - values.mean()) < 5 * terms.std() / np.sqrt(len(terms))
    assert abs(values[slots].mean() - values.mean()) > 5 * terms.std() / np.sqrt(len(terms))  # not so without them


def test_updated_priorities_take_effect_at_once():
    buffer, priorities = filled_buffer(40)
    priorities[[3, 7]] = 0.0, 2 * priorities.sum()
    set_priorities(buffer, np.array([3, 7]), priorities[[3, 7]])
    number = 20_000
    torch.manual_seed(1)
    drawn = np.concatenate([buffer.sample(1, 0.4)[0] for _ in range(number)])
    counts, expected = np.bincount(drawn, minlength=len(buffer)), number * probabilities(priorities)
    often = expected > 5
    assert counts[3] <= 5 and not often[3]
    assert chisquare(counts[often], expected[often] * counts[often].sum() / expected[often].sum()).pvalue > 1e-4


def test_even_a_priority_of_zero_is_drawn_now_and_then():
    buffer, _ = filled_buffer(10)
    set_priorities(buffer, np.arange(len(buffer)), np.zeros(len(buffer)))
    torch.manual_seed(0)
    slots, weights = buffer.sample(len(buffer), 1.0)
    assert len(set(slots.tolist())) > 1
    np.testing.assert_allclose(weights, 1)


@pytest.mark.parametrize("alpha, beta", [(0.8, 0.1), (0.95, 0.1), (1.0, 1.0), (10.0, 1.0)])
def test_priorities_of_zero_among_others_leave_weights_and_frequencies_as_defined(alpha, beta):
    """The normal case of returns: what went no better than expected has priority zero."""
    buffer, priorities = filled_buffer(30, alpha=alpha)
    priorities[::3] = 0
    set_priorities(buffer, np.arange(len(buffer)), priorities)
    p = probabilities(priorities, alpha)
    torch.manual_seed(3)
    batches = [buffer.sample(30, beta) for _ in range(300)]
    slots, weights = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_allclose(weights, (p[slots] / p.min()) ** -beta, rtol=1e-9)
    assert (weights > 0).all() and (weights <= 1).all()
    expected = 9000 * p
    often = expected > 5
    counts = np.bincount(slots, minlength=len(buffer))
    assert chisquare(counts[often], expected[often] * counts[often].sum() / expected[often].sum()).pvalue > 1e-4
    assert counts[~often].sum() <= 20


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
        assert len(ended) > sum(row[4] for row in rows(buffer))  # some found nothing


def test_new_transitions_get_the_highest_priority_and_others_keep_theirs():
    buffer = ReplayBuffer(50, 2, 0.9, ALPHA, "td-error")
    rng = np.random.default_rng(0)
    while not len(buffer):
        buffer.add(random_rollout(rng, 5, 2))
    first = len(buffer)
    assert (buffer.powers[:first] == 1).all()
    while buffer.stored < 300:
        set_priorities(buffer, np.arange(len(buffer)), rng.exponential(size=len(buffer)))
        powers, stored = buffer.powers.copy(), buffer.stored
        buffer.add(random_rollout(rng, 3, 2))
        new = np.unique(np.arange(stored, buffer.stored) % buffer.capacity)
        old = np.setdiff1d(np.arange(buffer.capacity), new)
        assert (buffer.powers[old] == powers[old]).all()
        assert (buffer.powers[new] == powers.max()).all()
    assert (buffer.powers > 0).all()


def test_buffer_goes_on_after_a_round_trip_through_a_file():
    """As if the episodes under way had not been begun: they are not saved."""
    for size in (30, 400):  # before and after the wrap-around
        buffer, _ = filled_buffer(size, capacity=400)
        for _ in range(size // 10):
            buffer.add(random_rollout(np.random.default_rng(7), 10, 2))
        assert any(buffer.unfinished)
        file, other = io.BytesIO(), ReplayBuffer(400, 2, 0.9, ALPHA, "td-error")
        torch.save(buffer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        buffer.unfinished = [[], []]
        draws = []
        for one in (buffer, other):
            set_priorities(one, np.arange(5), np.full(5, 9.0))
            one.add(random_rollout(np.random.default_rng(8), 30, 2))
            torch.manual_seed(9)
            draws.append(one.sample(20, 0.4))
        assert rows(buffer) == rows(other)
        assert all((mine == its).all() for mine, its in zip(*draws, strict=True))


# ------------------------------------------------------------------------------------------------------ the update


@pytest.mark.parametrize("priority", ["return", "td-error"])
@pytest.mark.parametrize("max_grad_norm", [1e9, 0.05])
def test_update_from_replay_equals_an_independent_implementation(priority, max_grad_norm):
    """One pass over the batch in plain Python; no entropy bonus; new priorities are the size of the advantages."""
    args = replay_args(priority, max_grad_norm=max_grad_norm, vf_coef=0.3, gamma=0.9)
    buffer, _ = filled_buffer(200, priority=priority)
    torch.manual_seed(5)
    slots, weights = buffer.sample(50, args.priority_beta)
    tuples = Tuples(*(column[slots] for column in buffer.tuples))
    powers = buffer.powers.copy()

    actor, critic, _ = networks()
    if priority == "return":
        values = values_of(critic, tuples.states)
        advantages = np.array([max(r - v, 0) for r, v in zip(tuples.returns, values, strict=True)])
        assert 0 < np.count_nonzero(advantages) < 50
    else:
        advantages = td_errors(tuples, critic, 0.9)
        assert tuples.terminated.any()
    loss = 0
    for i in range(50):
        state = torch.tensor(tuples.states[i])
        log_prob = torch.distributions.Categorical(logits=actor(state)).log_prob(torch.tensor(tuples.actions[i]))
        target = critic(state).detach() + advantages[i]
        loss = loss + weights[i] / 50 * (-advantages[i] * log_prob + 0.3 * (target - critic(state)) ** 2).sum()
    loss.backward()
    parameters = [*actor.parameters(), *critic.parameters()]
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    expected = [p.detach() - p.grad * min(1, max_grad_norm / norm.item()) for p in parameters]

    actor, critic, optimizer = networks()
    torch.manual_seed(5)
    losses = script.update_from_replay(actor, critic, optimizer, buffer, args)
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
    losses = script.update_from_replay(actor, critic, optimizer, buffer, args)
    assert [losses[f"replay/{name}"] for name in ("policy_loss", "value_loss", "advantage")] == [0, 0, 0]
    after = [*actor.parameters(), *critic.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------------------------ the run


@pytest.fixture
def count_replays(tmp_path, monkeypatch):
    """A function that trains and gives (batch size, transitions in the buffer, beta, alpha) of every replay update."""

    def count(**settings):
        batches, sample = [], ReplayBuffer.sample

        def counted(self, batch_size, beta):
            batches.append((batch_size, len(self), beta, self.alpha))
            return sample(self, batch_size, beta)

        monkeypatch.setattr(ReplayBuffer, "sample", counted)
        monkeypatch.setattr(script, "draw_pictures", lambda *_, **__: {})
        small = {"size": 7, "num_envs": 4, "num_steps": 5, "total_timesteps": 20 * 60, "run_dir": str(tmp_path / "run")}
        script.main(Args(**small | settings))
        return batches

    return count


@pytest.mark.parametrize("every, updates", [(1, 1), (3, 4), (7, 2)])
def test_replay_phases_come_every_so_many_updates_and_hold_so_many(count_replays, every, updates, monkeypatch):
    """All of them with td-error once an episode has ended: at the latest after 49 steps each."""
    real, replays = [0], []

    def counted(name, note):
        function = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *args: (note(), function(*args))[1])

    counted("update_actor_critic", lambda: real.append(real[-1] + 1))
    counted("update_from_replay", lambda: replays.append(real[-1]))
    batches = count_replays(priority="td-error", replay_every=every, replay_updates=updates)
    assert real[-1] == 60 and len(batches) == len(replays)
    first = replays[0]
    assert first % every == 0 and first < -(-49 // 5) + every
    assert replays == [update for update in range(first, 61, every) for _ in range(updates)]


@pytest.mark.parametrize("buffer_size", [50, 100_000])
def test_a_small_buffer_gives_small_batches(count_replays, buffer_size):
    batches = count_replays(
        priority="td-error", replay_batch_size=500, priority_beta=0.3, priority_alpha=0.6, buffer_size=buffer_size
    )
    assert all(size == min(500, held) and (beta, alpha) == (0.3, 0.6) for size, held, beta, alpha in batches)
    assert batches[0][0] <= batches[-1][0] == min(500, buffer_size)


def saved_args(tmp_path, monkeypatch, **settings):
    """The arguments in the folder of a run that is as short as can be."""
    monkeypatch.setattr(script, "play", lambda *_, **__: (0.0, [8, 8]))
    monkeypatch.setattr(script, "draw_pictures", lambda *_, **__: {})
    script.main(Args(total_timesteps=1, num_steps=1, run_dir=str(tmp_path / "run"), **settings))
    return json.loads((tmp_path / "run" / "args.json").read_text())


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
def test_hyper_parameters_follow_table_3(size, batch_size, alpha, tmp_path, monkeypatch):
    saved = saved_args(tmp_path, monkeypatch, size=size)
    assert (saved["replay_batch_size"], saved["priority_alpha"]) == (batch_size, alpha)
    assert (saved["priority_beta"], saved["replay_every"], saved["buffer_size"]) == (0.1, 3, 100_000)


def test_hyper_parameters_given_by_flags_stay(tmp_path, monkeypatch):
    saved = saved_args(tmp_path, monkeypatch, size=13, replay_batch_size=7, priority_alpha=0.0)
    assert (saved["replay_batch_size"], saved["priority_alpha"]) == (7, 0.0)


@pytest.mark.parametrize("buffer_size", [100_000, 100])  # before and after the wrap-around
def test_the_picture_of_the_replay_shows_the_probability_of_every_pair(buffer_size, tmp_path, monkeypatch):
    """In percent: what main gives to draw_pictures adds up to P(i) of the transitions in the last checkpoint."""
    shown = {}
    monkeypatch.setattr(script, "draw_pictures", lambda *_, replay: shown.update(replay=replay) or {})
    settings = {"size": 7, "num_envs": 4, "num_steps": 5, "total_timesteps": 20 * 60, "buffer_size": buffer_size}
    script.main(Args(run_dir=str(tmp_path / "run"), priority="td-error", **settings))
    buffer = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["buffer"]
    assert (buffer["stored"] > buffer_size) == (buffer_size == 100)
    states, actions, *_, powers = (column.numpy() for column in buffer["columns"])
    expected, drawn = np.zeros((2, STATES, ACTIONS))
    for state, action, power in zip(states, actions, powers, strict=True):
        expected[state, action] += 100 * power / powers.sum()
    np.add.at(drawn, shown["replay"][:2], shown["replay"][2])
    np.testing.assert_allclose(drawn, expected, atol=1e-9)
    assert drawn.sum() == pytest.approx(100) and np.count_nonzero(drawn) > 5
