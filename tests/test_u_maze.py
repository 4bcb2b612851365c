"""The U-mazes against MuJoCo's own functions, single environments, and closed form."""

import os
import sys

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401  registers the environments
from envs import u_maze
from envs.goals import GoalWrapper, make_goal_envs
from envs.point_mass import PointMassVectorEnv
from envs.u_maze import AntUMazeVectorEnv, PointUMazeVectorEnv

ALL = [("AntUMaze-v0", {}), ("AntUMaze-v0", {"contact_forces": True}), ("PointUMaze-v0", {})]
ALL += [("PointMass-v0", {"dims": dims}) for dims in (2, 4, 6)]
every_env = pytest.mark.parametrize("env_id, options", ALL)
PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS


def make_many(env_id, num_envs, max_episode_steps, **options):
    return make_goal_envs(env_id, num_envs, {"max_episode_steps": max_episode_steps, **options})


@every_env
def test_passes_gymnasiums_checks_without_a_warning(env_id, options, recwarn):
    check_env(gym.make(env_id, **options).unwrapped, skip_render_check=True)
    assert [str(warning.message) for warning in recwarn.list] == []


def test_the_maze_has_seven_free_blocks_around_a_wall():
    assert {tuple(centre) for centre in u_maze.FREE.tolist()} == {
        (0, 0),
        (2, 0),
        (4, 0),
        (4, 2),
        (0, 4),
        (2, 4),
        (4, 4),
    }
    assert len(u_maze.WALLS) == 25 - 7
    assert u_maze.is_free(u_maze.FREE).all() and not u_maze.is_free(u_maze.WALLS).any()
    points = np.random.default_rng(0).uniform(-5, 9, (5000, 2))
    inside = (np.abs(points - 2) < 3).all(
        -1
    )  # the inner square, less the wall from the left, x in [-1, 3], y in [1, 3]
    wall = (points[:, 0] < 3) & (points[:, 1] > 1) & (points[:, 1] < 3)
    assert np.array_equal(u_maze.is_free(points), inside & ~wall)


def test_coverage_is_measured_on_16_goals_a_block_of_which_a_motionless_agent_reaches_12():
    goals = u_maze.coverage_goals()
    assert goals.shape == (112, 2) and u_maze.is_free(goals).all()
    blocks, counts = np.unique(np.floor((goals + 3) / 2), axis=0, return_counts=True)
    assert len(blocks) == 7 and (counts == 16).all()
    distances = np.linalg.norm(goals[:, None] - goals, axis=-1) + 9 * np.eye(112)
    assert distances.min() == pytest.approx(0.5)
    assert (np.linalg.norm(goals, axis=-1) < 1.0).sum() == 12


@every_env
def test_many_environments_take_the_trajectories_of_single_ones_bit_for_bit(env_id, options):
    """Resets of some of them in the middle included; one whose episode has ended stands still until it is reset."""
    rng, count, steps = np.random.default_rng(0), 5, 60
    envs_ = make_many(env_id, count, 25, **options)
    singles = [gym.make(env_id, disable_env_checker=True, max_episode_steps=25, **options) for _ in range(count)]
    goals, done, ended = envs_.draw_goals(count, rng), np.ones(count, dtype=bool), 0
    for _ in range(steps):
        if done.any():
            goals[done] = envs_.draw_goals(done.sum(), rng)
            observations, _ = envs_.reset(options={"goals": goals, "reset_mask": done})
            for i in np.flatnonzero(done):
                seen, _ = singles[i].reset(options={"goals": goals[i]})
                assert np.array_equal(observations[i], np.concatenate((seen["observation"], seen["desired_goal"])))
        actions = rng.uniform(-1, 1, envs_.action_space.shape).astype(np.float32)
        observations, rewards, terminated, truncated, _ = envs_.step(actions)
        for i, env in enumerate(singles):
            seen, *outcome, info = env.step(actions[i])
            assert outcome == [rewards[i], terminated[i], truncated[i]] and info["is_success"] == (rewards[i] > 0)
            assert np.array_equal(observations[i], np.concatenate((seen["observation"], seen["desired_goal"])))
        done = terminated | truncated
        ended += done.sum()
        if done.any():
            again, *_ = envs_.step(actions)
            assert np.array_equal(again[done], observations[done])
            for env, action in zip(np.array(singles)[~done], actions[~done], strict=True):
                env.step(action)
            done = envs_.ended.copy()
    assert ended >= 2 * count


def test_the_number_of_threads_changes_nothing():
    runs = []
    for threads in (1, 2, 3):
        ants, rng = AntUMazeVectorEnv(7, num_threads=threads), np.random.default_rng(0)
        ants.reset(seed=1)
        for _ in range(50):
            ants.step(rng.uniform(-1, 1, (7, 8)))
        runs.append(ants.states)
    assert np.array_equal(runs[0], runs[1]) and np.array_equal(runs[0], runs[2])


def test_ants_step_as_mujoco_does_and_are_seen_as_mujoco_sees_them():
    ants, rng = AntUMazeVectorEnv(3, contact_forces=True), np.random.default_rng(0)
    ants.reset(seed=1, options={"goals": np.full((3, 2), 4.0)})
    data = [mujoco.MjData(ants.model) for _ in range(3)]
    for i in range(3):
        mujoco.mj_setState(ants.model, data[i], ants.states[i], PHYSICS)
    assert (ants.model.opt.timestep, ants.model.opt.integrator) == (0.02, mujoco.mjtIntegrator.mjINT_RK4)
    touched = 0
    for _ in range(40):
        actions = rng.uniform(-1, 1, (3, 8))
        observations, *_ = ants.step(actions)
        for i, one in enumerate(data):
            one.ctrl[:], one.qacc_warmstart[:] = actions[i], 0
            mujoco.mj_step(ants.model, one)
            assert np.array_equal(ants.states[i], np.concatenate(([one.time], one.qpos, one.qvel)))
            seen = mujoco.MjData(ants.model)
            mujoco.mj_setState(ants.model, seen, ants.states[i], PHYSICS)
            mujoco.mj_forward(ants.model, seen)
            mujoco.mj_rnePostConstraint(ants.model, seen)
            parts = one.qpos, one.qvel, seen.xmat[1], seen.subtree_com[1], seen.cfrc_ext[1:].clip(-1, 1).ravel()
            expected = np.concatenate((*parts, ants.goals[i]))
            np.testing.assert_allclose(observations[i], expected, rtol=1e-5, atol=1e-6)
            touched += np.abs(seen.cfrc_ext).max() > 0
    assert touched > 20


def test_walls_hold_an_ant_back():
    ants = AntUMazeVectorEnv(1)
    states, furthest = ants.states.copy(), []
    states[0, 16] = 6.0  # thrown to the right
    for _ in range(100):
        states = ants.advance(states, np.zeros((1, 8)))
        furthest.append(ants.observe(states)[0, ants.places])
    assert 2.0 < np.max(furthest) < 5.0 + 0.3


@pytest.mark.parametrize("height, fallen", [(0.29, True), (0.31, False), (0.99, False), (1.01, True), (np.nan, True)])
def test_an_ant_has_fallen_where_its_torso_is_too_low_or_too_high(height, fallen):
    ants = AntUMazeVectorEnv(1)
    ants.reset(seed=1)
    ants.states[0, 3] = height
    assert ants.fallen(ants.states).tolist() == [fallen]


@every_env
def test_the_goal_ends_an_episode_with_a_reward_and_the_time_limit_without(env_id, options):
    envs_ = make_many(env_id, 2, 3, **options)
    goals = np.zeros((2, envs_.goals.shape[1]))
    goals[1, 0] = 4.0
    observations, _ = envs_.reset(options={"goals": goals})
    np.testing.assert_allclose(observations[:, -goals.shape[1] :], goals)
    for step in range(3):
        _, rewards, terminated, truncated, _ = envs_.step(np.zeros(envs_.action_space.shape))
        assert rewards.tolist() == [1.0, 0.0] and terminated.tolist() == [True, False]
        assert truncated.tolist() == [False, step == 2]
    at_once = make_many(env_id, 2, 1, **options)
    at_once.reset(options={"goals": goals})
    _, _, terminated, truncated, _ = at_once.step(np.zeros(envs_.action_space.shape))
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, True]  # never both


@every_env
def test_single_environments_keep_to_the_convention_of_goals(env_id, options):
    """What hindsight experience replay needs of them, which is that of Gymnasium-Robotics."""
    env = gym.make(env_id, **options)
    seen, _ = env.reset(seed=1)
    assert np.array_equal(seen["desired_goal"], env.reset(seed=1)[0]["desired_goal"])
    assert not np.array_equal(seen["desired_goal"], env.reset(seed=2)[0]["desired_goal"])
    assert {*seen} == {"observation", "achieved_goal", "desired_goal"} and env.observation_space.contains(seen)
    places, goals = [], []
    for _ in range(30):
        seen, reward, terminated, _, info = env.step(env.action_space.sample())
        assert np.array_equal(seen["observation"][env.unwrapped.places], seen["achieved_goal"])
        assert reward == env.unwrapped.compute_reward(seen["achieved_goal"], seen["desired_goal"], info)
        places.append(seen["achieved_goal"])
        goals.append(seen["achieved_goal"] + np.random.default_rng(len(goals)).normal(0, 0.5, len(places[0])))
    rewards = env.unwrapped.compute_reward(np.array(places), np.array(goals), [{}] * 30)
    near = np.linalg.norm(np.array(places) - goals, axis=1) < env.unwrapped.envs.tolerance
    assert np.array_equal(rewards, near) and rewards.dtype.kind == "f" and rewards.any()


def test_hindsight_experience_replay_of_stable_baselines3_trains_on_the_point_unchanged():
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    agent = stable_baselines3.SAC(
        "MultiInputPolicy",
        gym.make("PointUMaze-v0"),
        replay_buffer_class=stable_baselines3.HerReplayBuffer,
        policy_kwargs={"net_arch": [8]},
        learning_starts=250,
        batch_size=16,
    )
    agent.learn(300)
    rewards = agent.replay_buffer.sample(200).rewards
    assert {*rewards.flatten().tolist()} == {0.0, 1.0}  # some of the goals are what was achieved later


class Stranger(gym.Env):
    """Somebody's environment: a point that moves by its action, bounded by [0.2, 0.7] x [-3, 3], to goals in a box."""

    observation_space = gym.spaces.Dict(
        observation=gym.spaces.Box(-9, 9, (1,)),
        achieved_goal=gym.spaces.Box(-9, 9, (2,)),
        desired_goal=gym.spaces.Box(-9, 9, (2,)),
    )
    action_space = gym.spaces.Box(np.float32([0.2, -3]), np.float32([0.7, 3]))

    def _seen(self):
        return {"observation": self.place[:1] * 2, "achieved_goal": self.place, "desired_goal": self.goal}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.uniform(-1, 1, 2), self.np_random.uniform(2, 4, 2)
        return self._seen(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.place = self.place + action
        return self._seen(), np.array([7.0]), False, False, {}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.5).astype(float)


def test_environments_of_others_become_vectors_of_state_and_goal():
    gym.register("Stranger-v0", Stranger)
    try:
        env = GoalWrapper(gym.make("Stranger-v0", max_episode_steps=9, disable_env_checker=True))
        seen, _ = env.reset(seed=1)
        base = env.unwrapped
        assert np.array_equal(seen, np.float32([2 * base.place[0], *base.place, *base.goal]))
        assert (env.state_dim, env.goal_dim, env.places, env.knows_places) == (3, 2, slice(1, 3), False)
        before = base.place
        seen, reward, *_ = env.step(np.float32([-2, 0.5]))
        np.testing.assert_allclose(base.place - before, [0.2, 1.5], atol=1e-6)  # clipped and rescaled
        low, high = env.goal_box()
        assert (low > 2).all() and (low < 2.1).all() and (high < 4).all() and (high > 3.9).all()
        assert env.reached(np.array([[0.0, 0.0], [0.0, 0.6]]), np.zeros((2, 2))).tolist() == [True, False]
        many, goals = make_many("Stranger-v0", 3, 4), np.float32([[9, 9], [9, 9], [9, 9]])
        many.reset(seed=1)
        states, _ = many.reset(options={"goals": goals})
        assert np.array_equal(states[:, 3:], goals)
        goals[1] = states[1, 1:3] + [0.45, 0.0]  # reached by the next step
        many.reset(options={"goals": goals, "reset_mask": np.array([False, True, False])})
        states, rewards, terminated, truncated, _ = many.step(np.zeros((3, 2), np.float32))
        assert not truncated.any() and np.array_equal(rewards > 0, terminated)
        assert np.array_equal(rewards > 0, np.linalg.norm(states[:, 1:3] - states[:, 3:], axis=1) <= 0.5)
        for bad in ("CartPole-v1", "Pendulum-v1"):
            with pytest.raises(ValueError, match="Dict of observation"):
                GoalWrapper(gym.make(bad))
    finally:
        gym.registry.pop("Stranger-v0")


def test_goals_that_are_drawn_can_be_reached_and_fill_what_can_be_reached():
    for envs_ in (PointUMazeVectorEnv(500), PointMassVectorEnv(500, dims=3)):
        envs_.reset(seed=1)
        goals = envs_.goals.copy()
        inside = u_maze.is_free(goals) if goals.shape[1] == 2 else (np.abs(goals) <= [1, 5, 0.3]).all(-1)
        assert inside.all() and len(np.unique(goals, axis=0)) == len(goals)
        np.testing.assert_allclose(np.abs(goals).max(0), [5, 5] if goals.shape[1] == 2 else [1, 5, 0.3], rtol=0.03)
        envs_.reset()
        assert not np.array_equal(goals, envs_.goals)
        envs_.reset(seed=1)
        assert np.array_equal(goals, envs_.goals)
    blocks = np.floor((PointUMazeVectorEnv(1).draw_goals(7000, np.random.default_rng(0)) + 3) / 2)
    _, counts = np.unique(blocks, axis=0, return_counts=True)
    assert len(counts) == 7 and counts.min() > 900


def test_points_move_as_under_a_constant_force_and_slide_along_walls():
    points = PointUMazeVectorEnv(1, max_episode_steps=10**6)
    points.reset(seed=1, options={"goals": np.array([[4.0, 4.0]])})
    acceleration = 2 / 0.41888  # N / kg
    for n in range(1, 31):
        points.step(np.array([[1.0, 0.0]]))
        time = 0.02 * n
        expected = [acceleration * time**2 / 2, 0, acceleration * time, 0]
        np.testing.assert_allclose(points.states[0], expected, rtol=1e-4)
    points.states[0] = [4.99, 0.5, 3.0, 0.5]
    points.step(np.zeros((1, 2)))
    np.testing.assert_allclose(points.states[0], [4.99, 0.51, 0.0, 0.5])  # it slides along the wall at x = 5
    points.states[0] = [4.99, -0.99, 3.0, -2.0]
    points.step(np.zeros((1, 2)))
    np.testing.assert_allclose(points.states[0], [4.99, -0.99, 0.0, 0.0])  # and stops in a corner
    rng = np.random.default_rng(0)
    for _ in range(3000):
        points.step(rng.uniform(-1, 1, (1, 2)))
        assert u_maze.is_free(points.states[:, :2]).all()
    assert not u_maze.is_free(np.array([[np.nan, 0.0], [np.inf, 0.0], [0.0, -np.inf]])).any()


def test_an_episode_is_long_enough_to_reach_every_place():
    """By a controller that aims at the corners, then at the goal, with a spring and a damper."""
    goals, corners = u_maze.coverage_goals(), np.array([[4.0, 0.0], [4.0, 4.0]])
    points = PointUMazeVectorEnv(len(goals))
    states, _ = points.reset(seed=0, options={"goals": goals})
    passed, reached = np.zeros(len(goals), dtype=int), np.zeros(len(goals), dtype=bool)
    corners_before = np.where(goals[:, 1] <= 1, 0, np.where(goals[:, 0] >= 3, 1, 2))
    for _ in range(points.max_episode_steps):
        position, velocity, next_corners = states[:, :2], states[:, 2:4], corners[passed.clip(max=1)]
        on_the_way = passed < corners_before
        target = np.where(on_the_way[:, None], next_corners, goals)
        passed += on_the_way & (np.abs(position - next_corners).max(-1) < 1)
        states, rewards, *_ = points.step(1.25 * (target - position) - 0.6 * velocity)
        reached |= rewards > 0
    assert reached.all()


def test_point_masses_move_as_under_a_constant_acceleration():
    points = PointMassVectorEnv(1, dims=3, max_episode_steps=10**6)
    points.reset(seed=1, options={"goals": np.full((1, 3), 5.0)})
    actions = np.array([[0.1, -1.0, 0.02]])
    for n in range(1, 51):
        points.step(actions)
        velocity = 0.02 * n * 2 * actions
        position = 0.02 * 0.02 * n * (n + 1) / 2 * 2 * actions  # each step with the velocity at its end
        np.testing.assert_allclose(points.states, np.concatenate((position, velocity), axis=1))


@pytest.mark.parametrize("dims", [2, 3, 6])
def test_point_masses_stay_in_their_box_and_keep_to_their_speed(dims):
    points, rng = PointMassVectorEnv(20, dims=dims, max_episode_steps=10**6), np.random.default_rng(0)
    points.reset(seed=1, options={"goals": np.full((20, dims), 5.0)})
    for _ in range(500):
        actions = rng.uniform(-1, 1, (20, dims)) + 0.8
        points.step(actions)
    position, velocity = np.split(points.states, 2, axis=1)
    assert (np.abs(position) <= [1, 5, *[0.3] * (dims - 2)]).all() and np.abs(velocity).max() <= 5
    assert points.tolerance == pytest.approx(0.3 * np.sqrt(dims / 2))
    with pytest.raises(ValueError, match="dims"):
        PointMassVectorEnv(1, dims=7)


def test_standing_ants_stand_and_can_be_put_anywhere():
    ants = AntUMazeVectorEnv(1)
    poses = ants.standing_ants(30, seed=0)
    assert poses.shape == (30, 30) and ((poses[:, 3] >= 0.3) & (poses[:, 3] <= 1.0)).all()
    joints = poses[:, 8:16]
    assert len(np.unique(joints.round(3), axis=0)) == 30
    assert joints.std(0).min() > 0.2  # radians
    later = poses
    for _ in range(100):
        later = ants.advance(later, np.zeros((30, 8)))
        assert not ants.fallen(later).any()
    places = np.random.default_rng(1).uniform(-1, 5, (30, 2))
    seen = ants.put(poses, places)
    np.testing.assert_allclose(seen[:, 38:40], places, atol=1e-6)
    np.testing.assert_allclose(seen[:, 2:29], poses[:, 3:30])


def test_coverage_is_drawn_red_where_the_agent_succeeds():
    figure = u_maze.draw_coverage(np.linspace(0, 1, 112), "coverage")
    colours = figure.axes[0].collections[0]
    colours.update_scalarmappable()
    low, high = colours.get_facecolor()[[0, -1]]
    assert low[2] > low[0] and high[0] > high[2]


def test_the_last_picture_of_an_episode_shows_where_it_ended():
    point = gym.make("PointUMaze-v0", render_mode="rgb_array", max_episode_steps=30)
    point.reset(seed=0, options={"goals": np.array([4.0, 0.0])})
    truncated = False
    while not truncated:
        seen, _, terminated, truncated, _ = point.step(np.array([1, 0], np.float32))
    red, green, blue = point.render().astype(int).transpose(2, 0, 1)
    _, columns = np.nonzero((blue > 150) & (red < 100))
    assert seen["observation"][0] > 0.5
    assert -3 + (columns.mean() + 0.5) / 24 == pytest.approx(seen["observation"][0], abs=0.05)
    point.close()
    assert point.unwrapped.envs.closed


def test_pictures_show_the_ant_and_its_goal_where_they_are(monkeypatch):
    """The camera is 13 m above (2, 2); 24 degrees to each side of it are half of the 240 pixels."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        monkeypatch.setenv("MUJOCO_GL", "egl")
    ants = gym.make_vec("AntUMaze-v0", 1, vectorization_mode="vector_entry_point")
    for goal in ((4.0, 4.0), (0.0, 4.0), (4.0, 1.0)):
        ants.reset(seed=0, options={"goals": np.array([goal])})
        red, green, blue = ants.image().astype(int).transpose(2, 0, 1)
        mark = (red > 150) & (green < 120)
        for place, shown in ((goal, mark), ((0, 0), (red - blue > 60) & ~mark)):  # the ant is brown
            rows, columns = np.nonzero(shown)
            metres = 13 * np.tan(np.radians(24)) / 120
            found = 2 + (columns.mean() - 119.5) * metres, 2 - (rows.mean() - 119.5) * metres
            assert found == pytest.approx(place, abs=0.3)
    ants.close()
