"""What recall_goalgan_ant.py adds to recall_trpo.py, against closed form, enumeration and plain loops."""

import copy
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import recall_goalgan_ant as script
from envs.u_maze import AntUMazeVectorEnv, PointUMazeVectorEnv
from recall_goalgan_ant import Actor, Args, GoalGAN, Tuples

torch.set_num_threads(1)
LOW, HIGH = np.array([-3.0, -3.0]), np.array([7.0, 5.0])
SMALL = {"env_id": "PointUMaze-v0", "num_envs": 10, "num_steps": 40, "max_episode_steps": 20, "inner_iterations": 1}
SMALL |= {"total_timesteps": 1200, "num_goals": 20, "label_rollouts": 1, "gan_updates": 50, "goal_noise": 0.3}
SMALL |= {"eval_episodes": 1, "trace_limit": 1e6, "num_traces": 8, "recall_updates": 2, "backtracking_updates": 5}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_actor(state_dim=6, action_dim=2, seed=0):
    torch.manual_seed(seed)
    return Actor(state_dim, action_dim, 8)


def make_gan(low=LOW, high=HIGH, seed=0):
    torch.manual_seed(seed)
    return GoalGAN(low, high)


def empty_buffer(state_dim=4, action_dim=2):
    return Tuples(*(torch.zeros(0, *shape) for shape in ((state_dim,), (action_dim,), (), (state_dim,), (2,))))


def rollouts(count, num_steps=30, num_envs=6, goals=((0.1, 0.1), (0.35, 0.0), (4.0, 4.0)), seed=0):
    points, actor = PointUMazeVectorEnv(num_envs, max_episode_steps=20), make_actor()
    torch.manual_seed(seed)
    return [script.collect_episodes(points, actor, torch.tensor(goals), num_steps) for _ in range(count)]


def run(tmp_path, name="run", **changes):
    return script.main(Args(**SMALL | {"run_dir": str(tmp_path / name)} | changes))


def load(run_dir):
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)


# ------------------------------------------------------------------------------------------------------ goals


def test_losses_of_the_goal_gan_are_those_of_least_squares():
    gan = make_gan()
    goals = torch.from_numpy(np.random.default_rng(0).uniform(LOW, HIGH, (20, 2))).float()
    labels, generated = randn(20).sign() / 2 + 0.5, gan.generate(20)
    real = gan.discriminator((goals - torch.tensor([2.0, 1.0])) / torch.tensor([5.0, 4.0]))[:, 0]
    fake = gan.discriminator((generated - torch.tensor([2.0, 1.0])) / torch.tensor([5.0, 4.0]))[:, 0]
    expected = torch.where(labels == 1, (real - 1) ** 2, (real + 1) ** 2).mean() + ((fake + 1) ** 2).mean()
    torch.testing.assert_close(script.discriminator_loss(gan, goals, labels, generated), expected)
    torch.testing.assert_close(script.generator_loss(gan, generated), ((fake - 1) ** 2).mean())


def test_discriminator_and_generator_learn_each_from_its_own_loss():
    gan, learned = make_gan(), make_gan()
    goals, labels = torch.zeros(1, 2), torch.ones(1)
    for updated in ("discriminator", "generator"):
        optimizers = {
            name: torch.optim.SGD(getattr(learned, name).parameters(), lr=0.1 if name == updated else 0.0)
            for name in ("discriminator", "generator")
        }
        torch.manual_seed(3)
        script.update_goal_gan(learned, optimizers, goals, labels, Args(gan_updates=1, gan_batch_size=5))
        torch.manual_seed(3)
        torch.randint(1, (5,))
        generated = gan.generate(5)
        if updated == "discriminator":
            loss = script.discriminator_loss(gan, goals.expand(5, 2), labels.expand(5), generated.detach())
        else:
            loss = script.generator_loss(gan, generated)
        weights = [*getattr(gan, updated).parameters()]
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight -= 0.1 * gradient
        for name, weight in gan.state_dict().items():
            torch.testing.assert_close(learned.state_dict()[name], weight)


def test_generated_goals_lie_in_the_box_and_are_drawn_from_twice_its_width():
    gan = make_gan()
    with torch.no_grad():
        gan.generator[-1].bias[:] = torch.tensor([10.0, -10.0])
    np.testing.assert_allclose(gan.generate(3).detach(), np.broadcast_to([12.0, -7.0], (3, 2)), atol=1e-3)
    goals = script.draw_goals(gan, 100, Args())
    np.testing.assert_allclose(goals, np.broadcast_to([7.0, -3.0], (100, 2)))
    with torch.no_grad():
        gan.generator[-1].weight.zero_()
        gan.generator[-1].bias.zero_()
    goals = script.draw_goals(gan, 5000, Args(goal_noise=0.3))
    np.testing.assert_allclose(goals.mean(0), [2.0, 1.0], atol=0.02)
    np.testing.assert_allclose(goals.std(0), 0.3, rtol=0.05)


def test_the_goal_gan_learns_where_good_goals_are_and_does_not_collapse():
    gan, rng = make_gan(), np.random.default_rng(0)
    networks = {"discriminator": gan.discriminator, "generator": gan.generator}
    optimizers = {name: torch.optim.RMSprop(network.parameters(), lr=1e-3) for name, network in networks.items()}
    goals = torch.from_numpy(rng.uniform(LOW, HIGH, (1000, 2))).float()
    good = ((goals - torch.tensor([4.0, 2.0])).norm(dim=1) < 1.5).float()
    for _ in range(8):
        script.update_goal_gan(gan, optimizers, goals, good, Args())
    made = script.draw_goals(gan, 500, Args(goal_noise=0.0))
    assert ((made - torch.tensor([4.0, 2.0])).norm(dim=1) < 2.0).float().mean() > 0.7  # by chance 0.16
    assert made.std(0).min() > 0.3


def test_good_goals_are_reached_neither_too_seldom_nor_too_often():
    rates = torch.tensor([0.0, 0.1, 0.1001, 1 / 3, 2 / 3, 0.8999, 0.9, 1.0])
    assert script.goal_labels(rates, Args()).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert script.goal_labels(rates, Args(least_success=0.5, most_success=1.0)).tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


def test_goals_that_are_kept_are_no_closer_than_told_and_none_is_missing():
    candidates = torch.from_numpy(np.random.default_rng(0).uniform(0, 3, (500, 2))).float()
    old_goals = script.keep_for_replay(torch.zeros(0, 2), candidates[:200], 0.3)
    kept = script.keep_for_replay(old_goals, candidates[200:], 0.3)
    assert torch.equal(kept[: len(old_goals)], old_goals) and len(kept) > len(old_goals)
    expected = []
    for goal in candidates:
        if all((goal - other).norm() >= 0.3 for other in expected):
            expected.append(goal)
    assert torch.equal(kept, torch.stack(expected))
    assert torch.cdist(candidates, kept).amin(1).max() < 0.3
    assert len(script.keep_for_replay(kept, kept, 0.0)) == 2 * len(kept)


@pytest.mark.parametrize("num_envs", [1, 3, 7, 20, 40])
def test_every_goal_is_tried_as_often_as_told(num_envs):
    """Near goals are reached, far ones are not, however many environments share the work."""
    points = PointUMazeVectorEnv(num_envs, max_episode_steps=5)
    goals = torch.tensor([[0.1, 0.0], [4.0, 4.0], [0.0, -0.1], [4.0, 2.0], [0.05, 0.05]])
    results = script.success_rates(points, make_actor(), goals, 4)
    assert results.tolist() == [[1.0, 0.0, 1.0, 0.0, 1.0]] * 4


# ------------------------------------------------------------------------------------------------------ experience


def test_a_rollout_begins_at_the_start_and_gives_each_episode_one_of_the_goals():
    for rollout, means in rollouts(3):
        done = rollout.terminated | rollout.truncated
        assert (rollout.states[0, :, :4] == 0).all()
        follows = ~done[:-1]
        assert np.array_equal(rollout.states[1:][follows], rollout.next_states[:-1][follows])
        assert (rollout.states[1:][done[:-1]][:, :4] == 0).all()
        assert np.array_equal(rollout.states[..., 4:], rollout.next_states[..., 4:])  # the goal of the same episode
        chosen = {tuple(goal) for goal in rollout.states[..., 4:].reshape(-1, 2).astype(float).round(3).tolist()}
        assert chosen == {(0.1, 0.1), (0.35, 0.0), (4.0, 4.0)}
        distance = np.linalg.norm(rollout.next_states[..., :2] - rollout.next_states[..., 4:], axis=-1)
        assert np.array_equal(rollout.rewards, (distance < 0.3).astype(np.float32))
        lengths = [np.diff(np.flatnonzero(column), prepend=-1) for column in done.T]
        assert means["charts/episodic_return"] == pytest.approx(rollout.rewards[done].mean())
        assert means["charts/episodic_length"] == pytest.approx(np.concatenate(lengths).mean())
    assert rollout.truncated.any() and rollout.terminated.any()
    assert rollouts(1, num_steps=3, goals=((4.0, 4.0),))[0][1] == {}  # no episode has ended


def test_the_policy_explores_with_its_own_standard_deviation_in_rollouts_and_evaluations(monkeypatch):
    points, actor, seen = PointUMazeVectorEnv(50, max_episode_steps=20), make_actor(), []
    actor.log_std.data[:] = torch.tensor([-1.0, 0.5])
    rollout, _ = script.collect_episodes(points, actor, torch.tensor([[4.0, 4.0]]), 100)
    act = script.act
    monkeypatch.setattr(script, "act", lambda *args: seen.append((args[1], act(*args))) or seen[-1][1])
    script.success_rates(points, actor, torch.tensor([[4.0, 4.0]]), 250)
    tried = [np.concatenate(column) for column in zip(*seen, strict=True)]
    for states, actions in ((rollout.states.reshape(-1, 6), rollout.actions.reshape(-1, 2)), tried):
        noise = actions - act(actor, states, greedy=True)
        assert len(noise) >= 5000
        np.testing.assert_allclose(noise.mean(0), 0, atol=0.1)
        np.testing.assert_allclose(noise.std(0), np.exp([-1.0, 0.5]), rtol=0.05)


def test_the_buffer_holds_the_newest_steps_of_trajectories_that_reached_their_goal():
    buffer, expected = empty_buffer(), []
    for rollout, _ in rollouts(12, goals=((0.1, 0.1), (0.31, 0.0), (0.0, 0.32), (4.0, 4.0))):
        buffer = script.add_successes(buffer, rollout, Args(buffer_size=40))
        for i in range(6):
            rows = []
            for t in range(30):
                state, goal = np.split(rollout.states[t, i], [4])
                actions = rollout.actions[t, i].clip(-1, 1)
                rows.append((state, actions, rollout.rewards[t, i], rollout.next_states[t, i, :4], goal))
                if rollout.terminated[t, i] or rollout.truncated[t, i]:
                    expected += rows if rollout.rewards[t, i] else []
                    rows = []
    assert len(expected) > 60 and len(buffer.rewards) == 40
    for column, other in zip(buffer, zip(*expected[-40:], strict=True), strict=True):
        assert np.array_equal(column, np.array(other))
        assert column.untyped_storage().nbytes() == column.nbytes  # a checkpoint holds no more than it


# ------------------------------------------------------------------------------------------------------ recall traces


def test_high_value_states_are_points_that_have_just_reached_generated_goals_as_the_nearest_success_did():
    """Alg. 2"""
    env, gan = script.make_env(Args(env_id="PointUMaze-v0")).env, make_gan(LOW, np.array([7.0, 7.0]))
    goals = np.random.default_rng(1).uniform(-3, 7, (30, 2)).astype(np.float32)
    goals = np.concatenate((goals, goals[:5]))  # the last five have the goals of the first five
    ends = np.random.default_rng(2).uniform(-0.2, 0.2, (35, 4)).astype(np.float32)
    ends[:, :2] += goals
    columns = np.zeros((70, 4)), np.zeros((70, 2)), np.tile([0, 1], 35), np.repeat(ends, 2, 0), np.repeat(goals, 2, 0)
    buffer = Tuples(*(torch.from_numpy(column).float() for column in columns))  # of two steps each
    buffer.next_states[::2] = 99.0
    args = Args(env_id="PointUMaze-v0", num_traces=10, recall_updates=5)
    torch.manual_seed(4)
    states, their_goals = script.high_value_states(env, gan, None, buffer, args)
    torch.manual_seed(4)
    drawn = script.draw_goals(gan, 100, args)
    distances = torch.cdist(drawn, torch.from_numpy(goals)).amin(1)
    nearer = drawn[distances.argsort()[:50]]
    assert sorted(map(tuple, their_goals.tolist())) == sorted(map(tuple, nearer.tolist()))
    assert their_goals.tolist() != nearer.tolist()  # in an order that says nothing
    for state, goal in zip(states.numpy(), their_goals.numpy(), strict=True):
        nearest = np.linalg.norm(goals - goal, axis=1).argmin()  # the first, and so the oldest
        assert np.array_equal(state[2:], ends[nearest, 2:])
        assert state[:2] - goal == pytest.approx(ends[nearest, :2] - goals[nearest], abs=1e-5)
    env.knows_places = False  # as somebody else's environment
    states, their_goals = script.high_value_states(env, gan, None, buffer, args)
    for state, goal in zip(states.tolist(), their_goals.tolist(), strict=True):
        assert state == ends[goals.tolist().index(goal)].tolist()


def test_high_value_states_are_standing_ants_that_have_just_reached_generated_goals():
    args = Args(num_traces=10, recall_updates=2)
    env, gan, ants = script.make_env(args).env, make_gan(), AntUMazeVectorEnv(4)
    rollout, _ = script.collect_episodes(ants, make_actor(43, 8), torch.tensor([[0.4, 0.0]]), 5)
    buffer = script.add_successes(empty_buffer(41, 8), rollout, args)
    poses = ants.standing_ants(10, seed=0)
    states, goals = script.high_value_states(env, gan, poses, buffer, args)
    assert states.shape == (20, 41)
    ends = buffer.rewards > 0
    offsets = buffer.next_states[ends][:, ants.places] - buffer.goals[ends]
    distances = torch.cdist(states[:, ants.places] - goals, offsets)
    assert distances.amin(1).max() < 1e-5 and (states[:, ants.places] - goals).norm(dim=1).min() > 0.2
    heights = {round(float(z), 4) for z in poses[:, 3]}
    assert {round(float(z), 4) for z in states[:, 2]} <= heights
    assert len(states[:, 2].unique()) > 3


def test_traces_are_relabelled_and_steps_at_the_goal_are_not_imitated():
    """Where the environment would end an episode."""
    env, points = script.make_env(Args(env_id="PointUMaze-v0")).env, PointUMazeVectorEnv(200)
    goals = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 2)).astype(np.float32)
    points.reset(options={"goals": goals})
    seen, _, terminated, *_ = points.step(np.ones((200, 2), dtype=np.float32))
    states, inside = torch.from_numpy(seen[:, :4]).expand(3, 200, 4), randn(3, 200) > 0
    relabelled, imitated = script.relabel(env, states, torch.from_numpy(goals), inside)
    assert torch.equal(relabelled, torch.from_numpy(seen).expand(3, 200, 6))
    assert torch.equal(imitated, inside & ~torch.from_numpy(terminated)) and 20 < terminated.sum() < 180
    states = torch.full((3, 200, 4), torch.inf)  # a trace that has left the data
    assert not script.relabel(env, states, torch.from_numpy(goals), torch.zeros(3, 200, dtype=bool))[1].any()


# ------------------------------------------------------------------------------------------------------ runs


def test_sizes_and_other_defaults_of_each_environment():
    ant, point = (script.with_defaults(Args(env_id=f"{n}UMaze-v0"), t) for n, t in (("Ant", 500), ("Point", 200)))
    assert (ant.num_envs * ant.num_steps, ant.inner_iterations, ant.trace_length) == (100_000, 5, 50)
    assert (point.num_envs * point.num_steps, point.inner_iterations, point.trace_length) == (20_000, 5, 20)
    assert (ant.total_timesteps, ant.eval_every, ant.checkpoint_every) == (40 * 5 * 100_000, 500_000, 100_000)
    given = (script.with_defaults(Args(imitation_kl=kl), 500).imitation_kl for kl in (0.0, 0.1))
    assert (ant.imitation_kl, point.imitation_kl, *given) == (0.005, 0.02, 0.0, 0.1)
    assert (ant.learn_std, point.learn_std, ant.env_threads) == (True, False, None)
    assert [args.max_episode_steps for args in (ant, point)] == [500, 200]
    assert [args.eval_steps for args in (ant, point)] == [400, 200]
    assert script.make_envs(ant, 1, 400, 0).max_episode_steps == 400
    for name, steps in (("AntUMaze-v0", 500), ("PointUMaze-v0", 200), ("PointMass-v0", 200)):
        assert script.make_env(Args(env_id=name)).env.spec.max_episode_steps == steps


def test_coverage_is_measured_on_goals_that_can_be_reached_and_draws_no_number_of_training(monkeypatch):
    tried = []
    monkeypatch.setattr(script, "success_rates", lambda *args: tried.append(args[2]) or torch.rand(3))
    for env_id, count in (("PointMass-v0", 50), ("PointUMaze-v0", 112)):
        args = script.with_defaults(Args(env_id=env_id), 200)
        env, before = script.make_env(args).env, torch.get_rng_state()
        results = [script.measure_coverage(env, None, args) for _ in range(2)]
        assert torch.equal(*results) and torch.equal(torch.get_rng_state(), before)
        assert torch.equal(*tried[-2:]) and len(tried[-1].unique(dim=0)) == count
    goals = tried[0]
    assert (goals.abs() <= torch.tensor([1, 5])).all() and (goals.abs().amax(0) > torch.tensor([0.9, 4.5])).all()


def test_the_standard_deviation_is_learned_only_where_told(tmp_path):
    for learn_std in (False, True):
        checkpoint = load(run(tmp_path, str(learn_std), learn_std=learn_std))
        assert "recall/imitation_loss" in checkpoint["progress"][1] and checkpoint["progress"][1]["losses/kl"] > 0
        assert torch.equal(checkpoint["actor"]["log_std"], torch.zeros(2)) == (not learn_std)


def test_returns_that_are_all_alike_stop_no_run(tmp_path):
    """With a discount factor of 0 and nothing reached all are 0."""
    sizes = {"num_envs": 4, "num_steps": 5, "max_episode_steps": 5, "total_timesteps": 40, "gamma": 0.0}
    metrics = load(run(tmp_path, env_id="PointMass-v0", recall="none", gan_updates=1, goal_noise=9.0, **sizes))
    assert all(np.isfinite(float(value)) for value in metrics["progress"][1].values())


def test_a_goal_gan_that_diverges_ends_the_run_before_its_goals_are_used(tmp_path):
    with pytest.raises(FloatingPointError, match=r"losses/\w+ is \S+ at step 0"):
        run(tmp_path, gan_lr=1e10)


def test_coverage_is_drawn_over_the_maze(tmp_path):
    folder = run(tmp_path)
    assert (folder / "coverage.png").stat().st_size > 10_000
    assert json.loads((folder / "args.json").read_text())["env_threads"] is None


def test_recall_follows_the_first_inner_iteration(tmp_path, monkeypatch):
    updates, phases, update, normalise = [], [], script.update_trpo, script.BacktrackingModel.normalise_by
    monkeypatch.setattr(script, "update_trpo", lambda *args: updates.append(1) or update(*args))
    monkeypatch.setattr(
        script.BacktrackingModel, "normalise_by", lambda *args: phases.append(len(updates)) or normalise(*args)
    )
    for inner, every, expected in ((3, 1, [1, 4, 7, 10]), (3, 2, [1, 7]), (1, 2, [1, 3])):
        updates.clear(), phases.clear()
        steps = {"total_timesteps": 4 * inner * 400, "eval_every": 10**6}
        run(tmp_path, f"{inner} {every}", inner_iterations=inner, recall_every=every, **steps)
        assert phases == expected


def test_goals_labels_and_traces_go_where_they_belong(tmp_path, monkeypatch):
    """Goals stay for an outer iteration, old ones among them; the GAN learns their labels, the replay keeps the
    intermediate ones and places just visited, the model learns from all successes, and no step at its goal is imitated.
    """
    calls = []

    def spy(name):
        function = getattr(script, name)

        def spied(*args):
            result = function(*args)
            calls.append((name, args, copy.deepcopy(result)))
            return result

        monkeypatch.setattr(script, name, spied)

    for name in ("collect_episodes", "success_rates", "update_goal_gan", "keep_for_replay", "recall_traces"):
        spy(name)
    for name in ("relabel", "imitate", "update_backtracking_model", "limit_change"):
        spy(name)
    sizes = {"num_envs": 20, "num_steps": 60, "inner_iterations": 2, "total_timesteps": 4 * 2 * 1200}
    sizes |= {"label_rollouts": 3, "eval_every": 10**6, "backtracking_updates": 20, "num_replayed_goals": 10}
    progress = load(run(tmp_path, goal_distance=0.02, **sizes))["progress"]

    names = [name for name, *_ in calls]
    assert names[:2] == ["collect_episodes", "update_goal_gan"]
    _, (_, _, visited, labels, _), _ = calls[1]
    assert (visited.abs() < 1).all() and (labels == 1).all()  # where the agent is by itself
    goals = [args[2] for name, args, _ in calls if name == "collect_episodes"][1:]
    assert len(goals) == 8 and [len(some) for some in goals[::2]] == [20, 30, 30, 30]
    assert all(torch.equal(*goals[i : i + 2]) for i in range(0, 8, 2))
    assert not any(torch.equal(*goals[i : i + 2]) for i in range(1, 7, 2))

    intermediate = 0
    kept = [i for i, name in enumerate(names) if name == "keep_for_replay"]
    for i in kept:
        assert names[i - 2 : i] == ["success_rates", "update_goal_gan"]
        (_, (_, _, tried, episodes), rates), (_, learned, _), (_, (_, added, _), old_goals) = calls[i - 2 : i + 1]
        assert rates.shape == (episodes, len(tried)) == (3, len(tried))
        good = (rates.mean(0) > 0.1) & (rates.mean(0) < 0.9)
        assert torch.equal(learned[2], tried) and torch.equal(learned[3], good.float())
        assert torch.equal(added[: good.sum()], tried[good])
        rollout = next(result[0] for name, _, result in calls[i::-1] if name == "collect_episodes")
        places = rollout.states[..., :2].reshape(-1, 2)
        assert np.array_equal(np.sort(added[good.sum() :], axis=0), np.sort(places, axis=0))
        intermediate += int(good.sum())
        if i != kept[-1]:
            following = next(args[2] for name, args, _ in calls[i:] if name == "collect_episodes")
            assert (following[20:, None] == old_goals).all(-1).any(1).all()  # the replayed ones
    assert intermediate > 0 and torch.equal(progress[3], old_goals)

    phases = [i for i, name in enumerate(names) if name == "limit_change"]
    assert len(phases) >= 2
    imitated_steps = []
    for i in phases:
        assert names[i - 26 : i] == 20 * ["update_backtracking_model"] + 2 * ["recall_traces", "relabel", "imitate"]
        tuples = calls[i - 26][1][2]
        model = calls[i - 6][1][0]
        assert (tuples.rewards > 0).sum() > 2
        for _, args, _ in calls[i - 26 : i - 6]:
            assert all(torch.equal(*pair) for pair in zip(args[2], tuples, strict=True))
        for part in (calls[i - 6 : i - 3], calls[i - 3 : i]):
            (_, _, (states, actions, inside)), (_, relabelling, (states_with_goals, far)), (_, imitated, _) = part
            assert torch.equal(relabelling[1], states) and torch.equal(relabelling[3], inside)
            assert torch.equal(states_with_goals[..., 4:], relabelling[2].expand(len(states), 8, 2))
            assert all(torch.equal(*pair) for pair in zip(imitated[2:], (states_with_goals, actions, far), strict=True))
            imitated_steps.append(int(far.sum()))
            assert far.sum() < inside.sum()
        rollout = next(result[0] for name, _, result in calls[i::-1] if name == "collect_episodes")
        assert torch.equal(calls[i][1][2], torch.from_numpy(rollout.states).flatten(0, 1))
    assert sum(imitated_steps) > 0
    torch.testing.assert_close(model.state_mean, tuples.next_states.mean(0))  # as it is at the end
    torch.testing.assert_close(model.action_std, tuples.actions.std(0))


@pytest.mark.parametrize("env_id", ["AntUMaze-v0", "PointUMaze-v0"])
def test_a_run_in_a_maze_that_is_made_longer_equals_one_that_was_long_from_the_start(env_id, tmp_path, monkeypatch):
    """What an ant's traces start from, its poses, is made anew, and alike; on another number of threads, too."""
    make_poses = AntUMazeVectorEnv.standing_ants
    monkeypatch.setattr(AntUMazeVectorEnv, "standing_ants", lambda ants, count, seed: make_poses(ants, 5, seed))
    sizes = {"env_id": env_id, "num_envs": 5, "num_steps": 30, "max_episode_steps": 30, "inner_iterations": 2}
    sizes |= {"gan_updates": 10, "eval_every": 10**6, "trace_length": 40}
    grown = run(tmp_path, "grown", total_timesteps=450, env_threads=1, **sizes)
    script.main(Args(resume=str(grown), total_timesteps=900, env_threads=2))
    one, other = load(grown), load(run(tmp_path, "long", total_timesteps=900, **sizes))
    assert "recall/imitation_loss" in other["progress"][1]
    for part in ("actor", "critic", "model", "gan"):
        assert all(torch.equal(one[part][name], weight) for name, weight in other[part].items())
    assert torch.equal(one["rng"], other["rng"]) and one["progress"][1] == other["progress"][1]


class Stranger(gym.Env):
    """Somebody's environment: a point that moves by its action, from a random start, rewarded as in Gymnasium-Robotics
    with -1 until it is at its goal."""

    observation_space = gym.spaces.Dict(
        {name: gym.spaces.Box(-9, 9, (2,)) for name in ("observation", "achieved_goal", "desired_goal")}
    )
    action_space = gym.spaces.Box(-0.2, 0.2, (2,))

    def _seen(self):
        return {"observation": self.last, "achieved_goal": self.place.astype(np.float32), "desired_goal": self.goal}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-0.2, 0.2, 2)
        self.goal, self.last = self.np_random.uniform(-1, 1, 2).astype(np.float32), np.zeros(2, np.float32)
        return self._seen(), {}

    def step(self, action):
        self.place, self.last = self.place + action, action
        return self._seen(), -1.0, False, False, {}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.25).astype(np.float32)


def test_an_agent_learns_in_somebody_elses_environment(tmp_path):
    """And a run that is resumed there equals one that was not, though its starts are random."""
    gym.register("Stranger-v0", Stranger, max_episode_steps=10)
    try:
        sizes = {"env_id": "Stranger-v0", "num_envs": 4, "num_steps": None, "max_episode_steps": None}
        sizes |= {"inner_iterations": 5, "goal_noise": 0.1, "max_kl": 0.05, "checkpoint_every": 80}
        one = run(tmp_path, "grown", total_timesteps=400, **sizes)
        script.main(Args(resume=str(one), total_timesteps=800))
        other = run(tmp_path, "long", total_timesteps=800, **sizes)
        one, other = load(one), load(other)
        assert all(torch.equal(one["actor"][name], weight) for name, weight in other["actor"].items())
        assert one["progress"][1] == other["progress"][1]
        assert {"recall/imitation_loss", "recall/backtracking_loss"} <= other["progress"][1].keys()
        assert other["actor"]["net.0.weight"].shape[1] == 6 and other["model"]["state_mean"].shape == (4,)
    finally:
        gym.registry.pop("Stranger-v0")
