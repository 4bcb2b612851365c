"""What recall_goalgan_ant.py adds to recall_trpo.py, against closed form, enumeration and plain loops."""

import ast
import copy
import inspect
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

import envs  # noqa: F401  registers the environments
import recall_goalgan_ant as script
import recall_trpo
from envs.u_maze import AntUMazeVectorEnv, PointUMazeVectorEnv
from recall_goalgan_ant import Actor, Args, BacktrackingModel, GoalGAN, GoalReplay, Normaliser, TrajectoryBuffer

torch.set_num_threads(1)
LOW, HIGH = np.array([-3.0, -3.0]), np.array([7.0, 5.0])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_actor(state_dim=6, action_dim=2, seed=0):
    torch.manual_seed(seed)
    return Actor(Normaliser(state_dim), state_dim, action_dim, 8)


def make_gan(seed=0):
    torch.manual_seed(seed)
    return GoalGAN(LOW, HIGH)


def rollouts(count, num_steps=30, num_envs=6, goals=((0.1, 0.1), (0.35, 0.0), (4.0, 4.0)), seed=0):
    points, rng = PointUMazeVectorEnv(num_envs, max_steps=20), np.random.default_rng(seed)
    return [script.collect_rollout(points, make_actor(), np.array(goals), num_steps, rng) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------ the same code


SAME = ["mlp", "Critic", "conjugate_gradients"]


@pytest.mark.parametrize("name", SAME)
def test_what_both_scripts_have_is_the_same_code(name):
    """So the tests of recall_trpo.py hold here too."""
    trees = []
    for module in (script, recall_trpo):
        tree = ast.parse(inspect.getsource(getattr(module, name)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        trees.append(ast.dump(tree))
    assert trees[0] == trees[1]


# ------------------------------------------------------------------------------------------------------ goals


def test_losses_of_the_goal_gan_are_those_of_least_squares():
    gan, noise = make_gan(), randn(20, 4)
    goals, labels = (
        torch.from_numpy(np.random.default_rng(0).uniform(LOW, HIGH, (20, 2))).float(),
        randn(20).sign() / 2 + 0.5,
    )
    discriminator_loss, generator_loss = gan.losses(goals, labels, noise)
    unit = (goals - torch.tensor([2.0, 1.0])) / torch.tensor([5.0, 4.0])
    real, fake = gan.discriminator(unit)[:, 0], gan.discriminator(2 * torch.tanh(gan.generator(noise)))[:, 0]
    expected = torch.where(labels == 1, (real - 1) ** 2, (real + 1) ** 2).mean() + ((fake + 1) ** 2).mean()
    torch.testing.assert_close(discriminator_loss, expected)
    torch.testing.assert_close(generator_loss, ((fake - 1) ** 2).mean())
    discriminator_loss.backward()
    assert all(weight.grad is None for weight in gan.generator.parameters())


def test_generated_goals_lie_in_the_box():
    gan = make_gan()
    with torch.no_grad():
        gan.generator[-1].bias[:] = torch.tensor([10.0, -10.0])
    goals = gan.goals(randn(100, 4), 0.5 * randn(100, 2, seed=1)).numpy()
    np.testing.assert_allclose(goals, np.broadcast_to([7.0, -3.0], (100, 2)))
    uniform = script.draw_goals(gan, 2000, Args(goals="uniform"), np.random.default_rng(0))
    assert (uniform >= LOW).all() and (uniform <= HIGH).all()
    np.testing.assert_allclose(uniform.mean(0), (LOW + HIGH) / 2, atol=0.3)


def test_the_goal_gan_learns_where_good_goals_are():
    gan, rng = make_gan(), np.random.default_rng(0)
    optimizers = [torch.optim.RMSprop(n.parameters(), lr=1e-3) for n in (gan.discriminator, gan.generator)]
    goals = rng.uniform(LOW, HIGH, (1000, 2))
    good = np.linalg.norm(goals - [4.0, 2.0], axis=1) < 1.5
    for _ in range(8):
        script.update_goal_gan(gan, optimizers, goals, good, Args(), rng)
    made = script.draw_goals(gan, 500, Args(goal_noise=0.0), rng)
    assert (np.linalg.norm(made - [4.0, 2.0], axis=1) < 2.0).mean() > 0.7  # by chance 0.16


def test_goals_that_are_kept_are_no_closer_than_told_and_none_is_missing():
    replay, candidates = GoalReplay(2, 0.3), np.random.default_rng(0).uniform(0, 3, (500, 2))
    replay.add(candidates[:200])
    replay.add(candidates[200:])
    distances = np.linalg.norm(replay.goals[:, None] - replay.goals, axis=-1) + 9 * np.eye(len(replay.goals))
    assert distances.min() >= 0.3
    assert np.linalg.norm(candidates[:, None] - replay.goals, axis=-1).min(1).max() < 0.3
    sample = replay.sample(20, np.random.default_rng(0))
    assert len(np.unique(sample, axis=0)) == 20
    assert len(replay.sample(10**6, np.random.default_rng(0))) == len(replay.goals)


@pytest.mark.parametrize("num_envs", [1, 3, 7, 40])
def test_every_goal_is_tried_as_often_as_told(num_envs):
    """Near goals are reached, far ones are not, however many environments share the work."""
    points = PointUMazeVectorEnv(num_envs, max_steps=5)
    goals = np.array([[0.1, 0.0], [4.0, 4.0], [0.0, -0.1], [4.0, 2.0], [0.05, 0.05]])
    results = script.successes(points, make_actor(), goals, 4, np.random.default_rng(0))
    assert results.tolist() == [[1.0, 0.0, 1.0, 0.0, 1.0]] * 4
    assert (points.episodes.sum() - num_envs) >= 4 * len(goals)


# ------------------------------------------------------------------------------------------------------ experience


def test_a_rollout_begins_at_the_start_and_gives_each_episode_one_of_the_goals():
    for rollout, ended in rollouts(3):
        done = rollout.terminated | rollout.truncated
        assert (rollout.states[0, :, :4] == 0).all()
        follows = ~done[:-1]
        assert np.array_equal(rollout.states[1:][follows], rollout.next_states[:-1][follows])
        assert (rollout.states[1:][done[:-1]][:, :4] == 0).all()
        assert np.array_equal(rollout.states[..., 4:], rollout.next_states[..., 4:])  # the goal of the same episode
        chosen = {tuple(goal) for goal in rollout.states[..., 4:].reshape(-1, 2).astype(float).round(3).tolist()}
        assert chosen <= {(0.1, 0.1), (0.35, 0.0), (4.0, 4.0)}
        distance = np.linalg.norm(rollout.next_states[..., :2] - rollout.next_states[..., 4:], axis=-1)
        assert np.array_equal(rollout.rewards, (distance < 0.3).astype(np.float32))
        assert [value for value, _ in ended] == rollout.rewards[done].tolist()
    assert rollout.truncated.any() and rollout.terminated.any()


def test_the_policy_explores_with_its_own_standard_deviation_in_rollouts_and_evaluations(monkeypatch):
    points, actor, seen = PointUMazeVectorEnv(50, max_steps=20), make_actor(), []
    actor.log_std.data[:] = torch.tensor([-1.0, 0.5])
    rollout, _ = script.collect_rollout(points, actor, np.array([[4.0, 4.0]]), 100, np.random.default_rng(0))
    choose, step = script.greedy_actions, points.step
    monkeypatch.setattr(script, "greedy_actions", lambda *args: seen.append(choose(*args)) or seen[-1])
    monkeypatch.setattr(points, "step", lambda actions: seen.append(actions) or step(actions))
    script.successes(points, actor, np.array([[4.0, 4.0]]), 250, np.random.default_rng(0))
    of_rollout = rollout.actions - choose(actor, rollout.states)
    for noise in (of_rollout.reshape(-1, 2), np.concatenate(seen[1::2]) - np.concatenate(seen[::2])):
        assert len(noise) >= 5000
        np.testing.assert_allclose(noise.mean(0), 0, atol=0.1)
        np.testing.assert_allclose(noise.std(0), np.exp([-1.0, 0.5]), rtol=0.05)


def test_the_buffer_holds_the_newest_trajectories_that_reached_their_goal(tmp_path):
    buffer, expected = TrajectoryBuffer(40, 4), []
    for rollout, _ in rollouts(6):
        buffer.add(rollout)
        for i in range(6):
            rows = []
            for t in range(30):
                state, goal = np.split(rollout.states[t, i], [4])
                rows.append((state, rollout.actions[t, i].clip(-1, 1), rollout.next_states[t, i, :4], goal))
                if rollout.terminated[t, i] or rollout.truncated[t, i]:
                    expected += [rows] if rollout.rewards[t, i] else []
                    rows = []
    assert buffer.number == len(expected) > 20
    kept = expected[-len(buffer.trajectories) :]
    assert sum(map(len, kept)) <= 40 < sum(map(len, kept)) + len(expected[-len(kept) - 1])
    for rows, tuples in zip(kept, buffer.trajectories, strict=True):
        for column, other in zip(zip(*rows, strict=True), tuples, strict=False):
            assert np.array_equal(np.array(column), other)
        assert tuples.times.tolist() == [*range(len(rows))]
    held_out = buffer.held_out()
    assert held_out == [(buffer.number - len(kept) + i) % 10 == 9 for i in range(len(kept))]
    learned = script.successful_tuples(buffer, "cpu")
    assert len(learned.times) == sum(len(rows) for rows, held in zip(kept, held_out, strict=True) if not held)
    assert script.successful_tuples(TrajectoryBuffer(40, 4), "cpu") is None
    other = TrajectoryBuffer(40, 4)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert other.number == buffer.number
    for one, two in zip(buffer.trajectories, other.trajectories, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one, two, strict=True))


# ------------------------------------------------------------------------------------------------------ recall traces


def test_high_value_states_are_points_that_have_just_reached_generated_goals_as_the_nearest_success_did():
    """Alg. 2"""
    buffer, gan = TrajectoryBuffer(10**6, 4), GoalGAN(np.array([-3.0, -3.0]), np.array([7.0, 7.0]))
    for rollout, _ in rollouts(3):
        buffer.add(rollout)
    made = np.random.default_rng(1).uniform(-3, 7, (len(buffer.trajectories) - 5, 2)).astype(np.float32)
    for i, tuples in enumerate(buffer.trajectories):  # the last five have the goals of the first five
        next_states = np.random.default_rng([2, i]).uniform(-0.2, 0.2, tuples.next_states.shape).astype(np.float32)
        next_states[:, :2] += made[i % len(made)]
        own_goals = np.tile(made[i % len(made)], (len(tuples.goals), 1))
        buffer.trajectories[i] = tuples._replace(goals=own_goals, next_states=next_states)
    args = Args(env_id="PointUMaze-v0")
    points = PointUMazeVectorEnv(1)
    states, goals = script.high_value_states(points, gan, None, buffer, 50, args, np.random.default_rng(0))
    oldest = {tuple(tuples.goals[-1]): tuples.next_states[-1] for tuples in buffer.trajectories[::-1]}  # of each goal
    assert len(oldest) == len(made) > 10
    their_goals, ends = np.array([*oldest]), np.array([*oldest.values()])
    drawn = script.draw_goals(gan, 100, args, np.random.default_rng(0))
    distances = np.linalg.norm(their_goals - drawn[:, None], axis=-1).min(-1)
    nearer = drawn[distances < np.median(distances)].astype(np.float32)
    assert sorted(map(tuple, goals.numpy())) == sorted(map(tuple, nearer))
    for state, goal in zip(states.numpy(), goals.numpy(), strict=True):
        nearest = np.linalg.norm(their_goals - goal, axis=1).argmin()
        assert np.array_equal(state[2:], ends[nearest, 2:])
        assert state[:2] - goal == pytest.approx(ends[nearest, :2] - their_goals[nearest], abs=1e-6)


def test_high_value_states_are_standing_ants_that_have_just_reached_generated_goals():
    ants, gan = gym.make_vec("AntUMaze-v0", 4, vectorization_mode="vector_entry_point"), make_gan()
    buffer = TrajectoryBuffer(1000, 41)
    buffer.add(script.collect_rollout(ants, make_actor(43, 8), np.array([[0.4, 0.0]]), 5, np.random.default_rng(0))[0])
    poses = ants.feasible_states(10, np.random.default_rng(0))
    states, goals = script.high_value_states(ants, gan, poses, buffer, 20, Args(), np.random.default_rng(0))
    assert states.shape == (20, 41)
    offsets = [tuples.next_states[-1][ants.places] - tuples.goals[-1] for tuples in buffer.trajectories]
    distances = torch.cdist(states[:, ants.places] - goals, torch.from_numpy(np.array(offsets)))
    assert distances.amin(1).max() < 1e-5 and (states[:, ants.places] - goals).norm(dim=1).min() > 0.2
    heights = {round(float(z), 4) for z in poses[:, 3]}
    assert {round(float(z), 4) for z in states[:, 2]} <= heights
    assert len(states[:, 2].unique()) > 3


def test_steps_at_a_goal_are_those_at_which_the_environment_ends_an_episode():
    points = PointUMazeVectorEnv(200)
    states, _ = points.reset(seed=0, options={"goals": np.random.default_rng(0).uniform(-0.5, 0.5, (200, 2))})
    goals = torch.from_numpy(states[:, 4:])
    states, _, terminated, _, infos = points.step(np.zeros((200, 2), dtype=np.float32))
    places = torch.from_numpy(infos["final_obs"][:, :2])
    assert script.outside(places[None], goals, points.tolerance)[0].tolist() == (~terminated).tolist()
    assert 20 < terminated.sum() < 180


def test_traces_are_relabelled_with_the_goal_at_their_end():
    states, actions = torch.arange(24.0).view(3, 8, 1), -torch.arange(24.0).view(3, 8, 1)
    goals, in_trace = 100 + torch.arange(8.0).view(8, 1), randn(3, 8) > 0
    parts = script.split_traces(states, goals, actions, in_trace, 2)
    assert len(parts) == 4
    for n, (some_states, some_actions) in enumerate(parts):
        pairs = [(t, i) for t in range(3) for i in (2 * n, 2 * n + 1) if in_trace[t, i]]
        assert some_states.tolist() == [[float(states[t, i]), 100.0 + i] for t, i in pairs]
        assert torch.equal(some_actions[:, 0], -some_states[:, 0])


@pytest.mark.parametrize("imitation_kl", [0.0, 1e-4, 1e9])
def test_imitation_raises_the_log_probability_of_the_traces_no_more_than_it_may(imitation_kl):
    """Eq. (3)"""
    actor = make_actor()
    states, actions = randn(50, 6), randn(50, 2, seed=1).clamp(-1, 1)  # a third of them at a bound
    expected, before = copy.deepcopy(actor), parameters_to_vector(actor.parameters()).detach().clone()
    loss = -expected.log_prob_of_clipped(states, actions).mean()
    gradients = torch.autograd.grad(loss, [*expected.parameters()])
    sgd = torch.optim.SGD(actor.parameters(), lr=0.05)
    losses = script.imitate(actor, sgd, [(states, actions)], states, Args(imitation_kl=imitation_kl))
    assert float(losses["recall/imitation_loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert 0.6 * min(imitation_kl, 1e-4) <= float(losses["recall/imitation_kl"]) <= imitation_kl
    change = parameters_to_vector(actor.parameters()).detach() - before
    if imitation_kl:
        direction = -parameters_to_vector(gradients)
        assert torch.cosine_similarity(change, direction, dim=0) > 0.999
        assert actor.log_prob_of_clipped(states, actions).mean() > -loss


def test_traces_are_compared_with_what_really_led_to_the_goals():
    buffer = TrajectoryBuffer(10**6, 4)
    for rollout, _ in rollouts(30, goals=((0.301, 0.0), (0.0, 0.302))):
        buffer.add(rollout)
    tuples, rng = script.successful_tuples(buffer, "cpu"), np.random.default_rng(0)
    model = BacktrackingModel(4, 2)
    model.normalise_by(tuples)
    compared = script.compare_traces(model, buffer, 6, Args(), rng)
    held_out = [t for t, held in zip(buffer.trajectories, buffer.held_out(), strict=True) if held]
    assert torch.equal(compared.starts, torch.from_numpy(np.array([t.next_states[-1] for t in held_out])))
    for i, trajectory in enumerate(held_out):
        length = min(6, len(trajectory.times))
        assert compared.known[:, i].tolist() == [step < length for step in range(6)]
        real = compared.real[:length, i].numpy()
        assert np.array_equal(real, trajectory.states[::-1][:length])


def test_traces_are_drawn_where_the_agent_was():
    """From the high-value state on, as far as predecessors are known; an ant is where its centre of mass is."""
    args = script.with_defaults(Args(env_id="AntUMaze-v0", env_threads=1))
    starts, real, imagined = randn(5, 41), randn(4, 5, 41, seed=1), randn(4, 5, 41, seed=2)
    known, in_trace = torch.arange(4)[:, None] < torch.arange(5), torch.ones(4, 5, dtype=torch.bool)
    compared = script.Comparison(starts, real, known, imagined, in_trace)
    figure = script.draw_traces(BacktrackingModel(41, 8), compared, script.make_envs(args, 1), args)
    lines = [line.get_xydata() for line in figure.axes[0].lines]
    for i in range(5):
        order = 4 - i  # those of which most is known are drawn first
        for line, states, kept in ((lines[order], real, known), (lines[5 + order], imagined, in_trace)):
            way = torch.cat((starts[None, i], states[:, i][kept[:, i]]))[:, 38:40]
            np.testing.assert_allclose(line, way, rtol=1e-6)
    np.testing.assert_allclose(lines[10][::-1], starts[:, 38:40], rtol=1e-6)
    assert len(figure.axes[0].patches) == 18  # walls


def test_what_never_changes_stays_as_it_is_in_traces():
    buffer = TrajectoryBuffer(10**6, 4)
    for rollout, _ in rollouts(30, goals=((0.301, 0.0), (0.0, 0.302))):
        buffer.add(rollout)
    tuples = script.successful_tuples(buffer, "cpu")
    tuples.states[:, 0] = tuples.next_states[:, 0] = 7.3
    model = BacktrackingModel(4, 2)
    model.normalise_by(tuples)
    states, *_ = script.recall_traces(model, tuples.next_states, 5, Args(trace_limit=100.0), np.random.default_rng(0))
    torch.testing.assert_close(states[..., 0], torch.full(states.shape[:2], 7.3), rtol=0, atol=1e-4)
    assert states.std((0, 1))[1:].min() > 1e-3


def test_sizes_and_other_defaults_of_each_environment():
    ant, point = (script.with_defaults(Args(env_id=name)) for name in ("AntUMaze-v0", "PointUMaze-v0"))
    assert (ant.num_envs * ant.num_steps, ant.inner_iterations, ant.trace_length) == (100_000, 5, 50)
    assert (point.num_envs * point.num_steps, point.inner_iterations, point.trace_length) == (20_000, 5, 20)
    assert ant.total_timesteps == 40 * 5 * 100_000
    given = (script.with_defaults(Args(env_id=ant.env_id, imitation_kl=kl)).imitation_kl for kl in (0.0, 0.1))
    assert (ant.imitation_kl, point.imitation_kl, *given) == (0.005, 0.02, 0.0, 0.1)
    assert math.isclose(script.make_envs(ant, 1).tolerance, 1.0)
    limits = [script.make_envs(args, 1, evaluation=e).max_steps for args in (ant, point) for e in (False, True)]
    assert limits == [500, 400, 200, 200]


def test_coverage_of_a_point_mass_is_measured_on_50_goals_that_can_be_reached():
    args = Args(env_id="PointMass-v0", dims=3)
    goals = script.evaluation_goals(script.make_envs(args, 1), args)
    assert goals.shape == (50, 3) and len(np.unique(goals, axis=0)) == 50
    assert (np.abs(goals) <= [1, 5, 0.3]).all() and (np.abs(goals).max(0) > [0.9, 4.5, 0.27]).all()
    assert np.array_equal(script.evaluation_goals(script.make_envs(args, 1), args), goals)


@pytest.mark.parametrize("learn_std", [False, True])
def test_the_standard_deviation_is_learned_only_where_told(learn_std, tmp_path):
    sizes = {"num_envs": 10, "num_steps": 40, "max_steps": 20, "inner_iterations": 1, "total_timesteps": 1200}
    sizes |= {"num_goals": 20, "label_rollouts": 1, "gan_updates": 10, "eval_episodes": 1, "trace_limit": 1e6}
    script.main(Args(env_id="PointUMaze-v0", run_dir=tmp_path / "run", learn_std=learn_std, **sizes))
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert "recall/imitation_loss" in checkpoint["losses"] and checkpoint["losses"]["losses/kl"] > 0
    assert torch.equal(checkpoint["actor"]["log_std"], torch.zeros(2)) == (not learn_std)


def test_a_goal_gan_that_diverges_ends_the_run_before_its_goals_are_used(tmp_path):
    sizes = {"num_envs": 10, "num_steps": 40, "max_steps": 20, "total_timesteps": 4000, "checkpoint_every": 10**6}
    with pytest.raises(SystemExit, match="losses/.* is .* at step 0"):
        script.main(Args(env_id="PointUMaze-v0", run_dir=tmp_path / "run", gan_lr=1e10, eval_episodes=1, **sizes))


def test_returns_that_are_all_alike_stop_no_run(tmp_path):
    """With a discount factor of 0 and nothing reached all are 0."""
    sizes = {"num_envs": 4, "num_steps": 5, "max_steps": 5, "total_timesteps": 40, "eval_episodes": 1}
    script.main(Args(env_id="PointMass-v0", run_dir=tmp_path / "run", gamma=0.0, recall="none", **sizes))
    losses = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["losses"]
    assert losses["losses/kl"].isfinite() and losses["losses/explained_variance"].isfinite()


@pytest.mark.parametrize("reached", [False, True])
def test_a_run_in_which_recall_never_began_says_so(reached, tmp_path, monkeypatch, capsys):
    sizes = {"num_envs": 10, "num_steps": 40, "max_steps": 20, "inner_iterations": 1, "total_timesteps": 1200}
    sizes |= {"num_goals": 20, "label_rollouts": 1, "gan_updates": 1, "eval_episodes": 1, "recall": "random"}
    if not reached:
        monkeypatch.setattr(script, "successful_tuples", lambda *_, **__: None)
    script.main(Args(env_id="PointUMaze-v0", run_dir=tmp_path / "run", **sizes))
    assert ("no recall phase: no goal had been reached" in capsys.readouterr().err) == (not reached)


@pytest.mark.parametrize(
    "inner_iterations, recall_every, expected", [(3, 1, [1, 4, 7, 10]), (3, 2, [1, 7]), (1, 2, [1, 3])]
)
def test_recall_follows_the_first_inner_iteration(inner_iterations, recall_every, expected, tmp_path, monkeypatch):
    sizes = {"num_envs": 10, "num_steps": 20, "max_steps": 20, "inner_iterations": inner_iterations}
    sizes |= {"num_goals": 20, "label_rollouts": 1, "gan_updates": 1, "eval_episodes": 1, "eval_every": 10**6}
    sizes["recall_every"] = recall_every
    updates, phases = [], []
    update = script.update_trpo
    monkeypatch.setattr(script, "update_trpo", lambda *args: updates.append(1) or update(*args))
    monkeypatch.setattr(script, "successful_tuples", lambda *args, **kwargs: phases.append(len(updates)))
    args = Args(env_id="PointUMaze-v0", run_dir=tmp_path / "run", total_timesteps=4 * inner_iterations * 200, **sizes)
    script.main(args)
    assert phases == expected


def test_goals_labels_and_traces_go_where_they_belong(tmp_path, monkeypatch):
    """Goals stay for an outer iteration, old ones among them; the GAN learns their labels, the replay keeps the
    intermediate ones and places just visited, the model learns from all successes, and no step at its goal is imitated.
    """
    calls = []

    def spy(name, owner=script):
        function = getattr(owner, name)

        def spied(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append((name, args, copy.deepcopy(result)))  # main changes in place which steps are in a trace
            return result

        monkeypatch.setattr(owner, name, spied)

    for name in ("collect_rollout", "successes", "update_goal_gan", "recall_traces", "outside", "imitate"):
        spy(name)
    for name in ("successful_tuples", "update_backtracking_model"):
        spy(name)
    spy("add", GoalReplay)
    sizes = {"num_envs": 20, "num_steps": 60, "max_steps": 20, "inner_iterations": 2, "total_timesteps": 4 * 2 * 1200}
    sizes |= {"num_goals": 20, "label_rollouts": 3, "gan_updates": 10, "eval_episodes": 1, "eval_every": 10**6}
    sizes |= {"trace_limit": 1e6, "num_traces": 8, "recall_updates": 2, "backtracking_updates": 20}
    sizes |= {"goal_distance": 0.02, "num_replayed_goals": 10}
    script.main(Args(env_id="PointUMaze-v0", run_dir=tmp_path / "run", **sizes))

    _, (_, _, visited, labels, *_), _ = next(call for call in calls if call[0] == "update_goal_gan")
    assert (np.abs(visited) < 1).all() and (labels == 1).all()  # where the agent is by itself
    goals = [args[2] for name, args, _ in calls if name == "collect_rollout"][1:]
    assert len(goals) == 8
    assert all(np.array_equal(*goals[i : i + 2]) for i in range(0, 8, 2))
    assert not any(np.array_equal(*goals[i : i + 2]) for i in range(1, 7, 2))

    names, intermediate = [name for name, *_ in calls], 0
    for i in [i for i, name in enumerate(names) if name == "add"]:
        assert names[i - 2 : i] == ["successes", "update_goal_gan"]
        (_, tried, rates), (_, learned, _), (_, added, _) = calls[i - 2 : i + 1]
        rates = rates.mean(0)
        assert rates.shape == (len(tried[2]),)
        assert np.array_equal(learned[2], tried[2]) and np.array_equal(learned[3], (rates > 0.1) & (rates < 0.9))
        kept = tried[2][(rates > 0.1) & (rates < 0.9)]
        assert np.array_equal(added[1][: len(kept)], kept)
        rollout = next(result[0] for name, _, result in calls[i::-1] if name == "collect_rollout")
        visited = rollout.next_states[..., :2].reshape(-1, 2)
        assert np.array_equal(np.sort(added[1][len(kept) :], axis=0), np.sort(visited, axis=0))
        intermediate += len(kept)
    assert intermediate > 0
    replay = next(args[0] for name, args, _ in calls if name == "add")  # as it is at the end
    assert [len(some) for some in goals[::2]] == [20, 30, 30, 30]
    assert all((some[20:, None] == replay.goals).all(-1).any(1).all() for some in goals[::2])

    phases = [i for i, name in enumerate(names) if name == "imitate"]
    assert len(phases) >= 2
    for i in phases:
        (_, _, (states, actions, in_trace)), (_, (_, goals, _), far), (_, imitated, _) = calls[i - 2 : i + 1]
        assert names[i - 23 : i - 2] == ["successful_tuples"] + 20 * ["update_backtracking_model"]
        (_, _, tuples), *updates = calls[i - 23 : i - 2]
        learned = torch.cat([args[2].next_states for _, args, _ in updates])
        assert len(learned) == 20 * 256
        assert len(learned.unique(dim=0)) > 0.9 * len(tuples.next_states.unique(dim=0)) > 40
        rollout = next(result[0] for name, _, result in calls[i::-1] if name == "collect_rollout")
        assert torch.equal(imitated[3], torch.from_numpy(rollout.states).flatten(0, 1))
        assert 0 < (in_trace & far).sum() < in_trace.sum()
        for part, (pairs, their_actions) in enumerate(imitated[2]):
            some = slice(8 * part, 8 * part + 8)
            mask = (in_trace & far)[:, some]
            relabelled = goals[some].expand(len(states), 8, 2)
            assert torch.equal(pairs, torch.cat((states[:, some], relabelled), dim=-1)[mask])
            assert torch.equal(their_actions, actions[:, some][mask])
    model = calls[phases[-1] - 2][1][0]  # as it is at the end
    torch.testing.assert_close(model.state_mean, tuples.next_states.mean(0))
    torch.testing.assert_close(model.action_std, tuples.actions.std(0))


@pytest.mark.parametrize("env_id", ["AntUMaze-v0", "PointUMaze-v0"])
def test_a_run_in_a_maze_that_is_made_longer_equals_one_that_was_long_from_the_start(env_id, tmp_path, monkeypatch):
    """What an ant's traces start from, its poses, is made anew, and alike."""
    make_poses = AntUMazeVectorEnv.feasible_states
    monkeypatch.setattr(AntUMazeVectorEnv, "feasible_states", lambda ants, count, rng: make_poses(ants, 5, rng))
    sizes = {"env_id": env_id, "num_envs": 5, "num_steps": 30, "max_steps": 30, "inner_iterations": 2, "num_goals": 20}
    sizes |= {
        "label_rollouts": 1,
        "gan_updates": 10,
        "eval_episodes": 1,
        "eval_every": 10**6,
        "backtracking_updates": 5,
    }
    sizes |= {"num_traces": 8, "recall_updates": 2, "trace_length": 40, "trace_limit": 1e6, "env_threads": 1}
    script.main(Args(run_dir=tmp_path / "grown", total_timesteps=450, **sizes))
    script.main(Args(resume=tmp_path / "grown", total_timesteps=900))
    script.main(Args(run_dir=tmp_path / "long", total_timesteps=900, **sizes))
    torch.use_deterministic_algorithms(False)
    one, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("grown", "long"))
    assert "recall/imitation_loss" in other["losses"]
    for part in ("actor", "critic", "backtracking_model", "gan"):
        assert all(torch.equal(one[part][name], weight) for name, weight in other[part].items())
    assert one["losses"] == other["losses"] and one["rngs"] == other["rngs"]
