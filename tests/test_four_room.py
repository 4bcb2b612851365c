"""FourRoom-v0 against an independent walk over the characters of the drawn maze, single environments and Gymnasium."""

import itertools
from collections import Counter, deque

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from PIL import Image, ImageSequence

from envs import four_room
from envs.four_room import FourRoomEnv, FourRoomMaze, FourRoomVectorEnv, draw_cells, exact_predecessors

UP, RIGHT, DOWN, LEFT = range(4)
MAZES = [
    {"size": 7},
    {"size": 8},
    {"size": 11},
    {"size": 7, "start": "random", "goal": (3, 1)},  # the goal in a doorway
    {"size": 8, "start": (-2, 1), "goal": (2, -3)},
    {"size": 11, "start": "random", "goal": (1, 1)},
]


def free_positions(maze):
    """All (row, column) that the drawing does not show as a wall."""
    return [(r, c) for r, line in enumerate(maze.text().split("\n")) for c, s in enumerate(line) if s != "#"]


def walk(lines, position, action):
    """One step over the characters of the maze, with the moves written out again."""
    row, column = position
    next_row = row + (action == DOWN) - (action == UP)
    next_column = column + (action == RIGHT) - (action == LEFT)
    return position if lines[next_row][next_column] == "#" else (next_row, next_column)


def shortest_paths(lines, start):
    """The actions of a shortest path to each cell that can be reached from start without passing through the goal."""
    paths, queue = {start: ()}, deque([start])
    while queue:
        position = queue.popleft()
        if lines[position[0]][position[1]] == "G":
            continue
        for action in range(4):
            following = walk(lines, position, action)
            if following not in paths:
                paths[following] = (*paths[position], action)
                queue.append(following)
    return paths


@pytest.mark.parametrize("size", range(7, 41))
def test_four_rooms_connected_by_one_doorway_each(size):
    lines = FourRoomMaze(size).text().split("\n")
    middle, last = size // 2, size - 1
    assert [len(line) for line in lines] == [size] * size
    border = lines[0] + lines[last] + "".join(line[0] + line[last] for line in lines)
    assert set(border) == {"#"}

    row, column = lines[middle], "".join(line[middle] for line in lines)
    arms = (row[:middle], row[middle + 1 :], column[:middle], column[middle + 1 :])
    assert [len(arm) - arm.count("#") for arm in arms] == [1, 1, 1, 1]
    assert row[middle] == "#"
    assert sum(len(line) - line.count("#") for line in lines) == (size - 3) ** 2 + 4  # no other inner wall

    # Moves can be walked back, so reaching all cells from one cell, not through the goal, connects all pairs.
    paths = shortest_paths(lines, (1, 1))
    assert set(paths) == set(free_positions(FourRoomMaze(size)))
    assert lines[1][1] == "S" and lines[size - 2][size - 2] == "G"
    assert len(paths[size - 2, size - 2]) == 2 * (size - 3)


@pytest.mark.parametrize("kwargs", MAZES)
def test_forward_dynamics_follow_the_drawing(kwargs):
    maze = FourRoomMaze(**kwargs)
    size, lines, free = maze.size, maze.text().split("\n"), free_positions(maze)
    assert np.flatnonzero(maze.free).tolist() == [r * size + c for r, c in free]
    bumps = 0
    for cell, action in itertools.product(range(size**2), range(4)):
        position, following = divmod(cell, size), divmod(int(maze.next_cell[cell, action]), size)
        if position not in free or lines[position[0]][position[1]] == "G":
            assert following == position
            continue
        assert following == walk(lines, position, action)
        moved = [abs(a - b) for a, b in zip(position, following, strict=True)]
        assert sorted(moved) in ([0, 0], [0, 1])
        bumps += moved == [0, 0]
    assert bumps > 0


@pytest.mark.parametrize("kwargs", MAZES)
def test_environment_walks_over_the_drawing(kwargs):
    """A long random walk of FourRoomEnv itself, without its own dynamics arrays."""
    env = FourRoomEnv(max_steps=1000, **kwargs)
    lines, rng = env.maze.text().split("\n"), np.random.default_rng(0)
    goals = 0
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = int(rng.integers(4))
            row, column = walk(lines, divmod(observation, env.maze.size), action)
            observation, _, terminated, truncated, _ = env.step(action)
            assert observation == row * env.maze.size + column
            assert terminated == (lines[row][column] == "G")
            over = terminated or truncated
        goals += terminated
    assert goals > 0


@pytest.mark.parametrize("kwargs", [*MAZES, {"size": 15}])
def test_backward_model_is_exact(kwargs):
    """Against all steps over the drawing; it is a function of the forward model alone."""
    maze = FourRoomMaze(**kwargs)
    size, lines = maze.size, maze.text().split("\n")
    expected = {key: set() for key in itertools.product(range(size**2), range(4))}
    for (row, column), action in itertools.product(free_positions(maze), range(4)):
        if lines[row][column] != "G":
            next_row, next_column = walk(lines, (row, column), action)
            expected[next_row * size + next_column, action].add(row * size + column)

    assert maze.predecessors.shape == (size**2, 4, 2)
    assert any(cell in sources and len(sources) == 2 for (cell, _), sources in expected.items())  # bumps are in it
    for (cell, action), sources in expected.items():
        found = maze.predecessors[cell, action].tolist()
        assert set(found[: len(sources)]) == sources
        assert found[len(sources) :] == [-1] * (2 - len(sources))
        assert cell not in found[:-1] or len(sources) == 1  # the neighbour comes before the bump
    assert maze.goal not in maze.predecessors
    can_act = maze.free & (np.arange(size**2) != maze.goal)
    assert (exact_predecessors(maze.next_cell, can_act) == maze.predecessors).all()


def test_predecessors_in_a_corridor():
    """Four cells in a row, to be walked to the left or the right, and the goal at the right end."""
    next_cell, can_act = np.array([[0, 1], [0, 2], [1, 3], [3, 3]]), np.array([True, True, True, False])
    from_right, from_left = [[1, 0], [2, -1], [-1, -1], [-1, -1]], [[-1, -1], [0, -1], [1, -1], [2, -1]]
    assert exact_predecessors(next_cell, can_act).swapaxes(0, 1).tolist() == [from_right, from_left]


VECTOR_CASES = [
    {"size": 7, "max_steps": 20},
    {"size": 7, "max_steps": 12, "start": "random"},
    {"size": 8, "start": "random", "goal": (3, 5), "goal_reward": 2.5, "step_penalty": 0.5},
]


def biased_actions(steps, num_envs, seed=0):
    """Mostly right and down, so that some episodes reach the goal and some do not."""
    return np.random.default_rng(seed).choice(4, size=(steps, num_envs), p=[0.15, 0.35, 0.35, 0.15])


@pytest.mark.parametrize("kwargs", VECTOR_CASES)
@pytest.mark.parametrize("seed", [3, [11, 4, 2**40, 4, 0]])
def test_vector_equals_single_environments(kwargs, seed):
    num_envs, actions = 5, biased_actions(1500, 5)
    vector = FourRoomVectorEnv(num_envs, **kwargs)
    singles = [FourRoomEnv(**kwargs) for _ in range(num_envs)]
    seeds = [seed + i for i in range(num_envs)] if isinstance(seed, int) else seed

    got, expected = (
        [vector.reset(seed=seed)[0]],
        [[env.reset(seed=s)[0] for env, s in zip(singles, seeds, strict=True)]],
    )
    ends = Counter()
    for t, step_actions in enumerate(actions):
        if t == 300:  # an unseeded reset in the middle of episodes goes on with the next ones
            got.append(vector.reset()[0])
            expected.append([env.reset()[0] for env in singles])
        got.append(vector.step(step_actions))
        row = []
        for env, action in zip(singles, step_actions, strict=True):
            observation, reward, terminated, truncated, _ = env.step(action)
            last = observation if terminated or truncated else None
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            row.append((observation if last is None else env.reset()[0], reward, terminated, truncated, last))
        expected.append(row)
    assert ends["terminated"] >= 20 and ends["truncated"] >= 20

    for ours, theirs in zip(got, expected, strict=True):
        if not isinstance(ours, tuple):
            assert ours.tolist() == theirs
            continue
        observations, rewards, terminated, truncated, infos = ours
        final = infos.get("final_obs", np.full(num_envs, None)).tolist()
        arrays = (observations.tolist(), rewards.tolist(), terminated.tolist(), truncated.tolist(), final)
        assert list(zip(*arrays, strict=True)) == theirs


@pytest.mark.parametrize("kwargs", VECTOR_CASES)
def test_vector_equals_gymnasium_sync(kwargs):
    num_envs, actions = 4, biased_actions(1500, 4, seed=1)
    ours = FourRoomVectorEnv(num_envs, **kwargs)
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    sync = gym.make_vec("FourRoom-v0", num_envs, vectorization_mode="sync", vector_kwargs=same_step, **kwargs)
    for space in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(ours, space) == getattr(sync, space)

    results = []
    for env in (ours, sync):
        observations, infos = env.reset(seed=7)
        results.append([(observations, infos), *[env.step(a) for a in actions]])
    assert sum(step[2].sum() for step in results[0][1:]) >= 20  # terminated
    assert sum(step[3].sum() for step in results[0][1:]) >= 20  # truncated
    for (*arrays, infos), (*sync_arrays, sync_infos) in zip(*results, strict=True):
        for array, sync_array in zip(arrays, sync_arrays, strict=True):
            np.testing.assert_array_equal(array, sync_array)
            assert array.dtype == sync_array.dtype
        assert set(infos) == set(sync_infos)
        for key in infos:
            np.testing.assert_equal(infos[key], sync_infos[key])
            assert getattr(infos[key], "dtype", None) == getattr(sync_infos[key], "dtype", None)


@pytest.mark.parametrize("mode", ["vector_entry_point", None])
def test_make_vec_gives_the_vector_environment(mode):
    env = gym.make_vec("FourRoom-v0", num_envs=3, vectorization_mode=mode, size=8, goal=(1, 2))
    assert type(env.unwrapped) is FourRoomVectorEnv
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.num_envs == 3 and env.single_observation_space.n == 64
    observations, _ = env.reset(seed=0)
    assert observations.tolist() == [9, 9, 9]
    observations, _, terminated, _, infos = env.step(np.array([RIGHT, DOWN, UP]))
    assert terminated.tolist() == [True, False, False]
    assert observations.tolist() == [9, 17, 9] and infos["final_obs"].tolist() == [10, None, None]


def starts_over_episodes(number):
    env = FourRoomEnv(size=7, start="random")
    return [env.reset(seed=0)[0], *[env.reset()[0] for _ in range(number - 1)]]


def starts_over_seeds(number):
    return FourRoomVectorEnv(number, size=7, start="random").reset(seed=0)[0].tolist()


@pytest.mark.parametrize("starts", [starts_over_episodes, starts_over_seeds])
def test_random_starts_are_uniform(starts):
    allowed = [r * 7 + c for r, c in free_positions(FourRoomMaze(7)) if (r, c) != (5, 5)]
    assert len(allowed) == 19
    number = 2 * 20 * 19**2
    drawn = starts(number)
    counts = Counter(drawn)
    assert sorted(counts) == allowed
    # A count is binomial: five standard deviations fail with probability 1e-5 for one of 19 fair cells, and a cell that
    # is drawn a quarter too often or too rarely is beyond them.
    mean = number / 19
    deviation = np.sqrt(mean * (1 - 1 / 19))
    assert 5 * deviation < 0.25 * mean
    assert all(abs(counts[cell] - mean) < 5 * deviation for cell in allowed)
    # Each start follows each: 20 are expected of each of the 19**2 pairs, so one is missing with 361 * exp(-20) < 1e-6.
    assert len(set(zip(drawn[::2], drawn[1::2], strict=True))) == 19**2


def test_random_starts_depend_on_the_seed_alone():
    def starts(env, seed):
        return [env.reset(seed=seed)[0], *[env.reset()[0] for _ in range(30)]]

    used = FourRoomEnv(size=9, start="random")
    sequences = [starts(used, seed) for seed in range(50)]
    assert len({tuple(sequence) for sequence in sequences}) == 50
    # Nor does a seed repeat another's starts one episode later, as it would if seed and episode were merely added.
    assert not {tuple(sequence[1:]) for sequence in sequences} & {tuple(sequence[:-1]) for sequence in sequences}
    for _ in range(13):
        used.step(RIGHT)
    assert starts(used, 8) == starts(FourRoomEnv(size=9, start="random"), 8) == sequences[8]


def test_seeded_reset_of_a_used_vector_environment_equals_a_fresh_one():
    used, fresh = (FourRoomVectorEnv(4, size=7, start="random", max_steps=10) for _ in range(2))
    actions = biased_actions(100, 4)
    used.reset(seed=1)
    for step_actions in actions[:55]:
        used.step(step_actions)
    for env in (used, fresh):
        env.reset(seed=2)
    for step_actions in actions:
        np.testing.assert_equal(used.step(step_actions), fresh.step(step_actions))


def test_unseeded_environments_differ():
    vectors = [FourRoomVectorEnv(20, size=11, start="random") for _ in range(2)]
    assert vectors[0].reset()[0].tolist() != vectors[1].reset()[0].tolist()
    singles = [FourRoomEnv(size=11, start="random") for _ in range(2)]
    first, second = ([env.reset()[0] for _ in range(20)] for env in singles)
    assert first != second


@pytest.mark.parametrize(("goal_reward", "step_penalty"), [(5.0, 0.01), (1.0, 0.0), (-2.0, 0.5)])
def test_rewards(goal_reward, step_penalty):
    env = FourRoomEnv(size=7, goal_reward=goal_reward, step_penalty=step_penalty)
    path = shortest_paths(env.maze.text().split("\n"), (1, 1))[5, 5]
    env.reset(seed=0)
    steps = [env.step(action)[1:4] for action in (UP, *path)]  # a bump costs as much as a move
    assert steps[:-1] == [(-step_penalty, False, False)] * len(path)
    assert steps[-1] == (pytest.approx(goal_reward - step_penalty), True, False)


def test_default_rewards_give_the_documented_return():
    env = gym.make("FourRoom-v0")
    path = shortest_paths(env.unwrapped.maze.text().split("\n"), (1, 1))[9, 9]
    env.reset(seed=0)
    assert len(path) == 16
    assert sum(env.step(action)[1] for action in path) == pytest.approx(5 - 0.16)


@pytest.mark.parametrize(("size", "max_steps", "expected"), [(7, 1, 1), (7, 30, 30), (7, None, 49), (12, None, 144)])
def test_truncates_at_exactly_max_steps(size, max_steps, expected):
    env = FourRoomEnv(size=size, max_steps=max_steps)
    vector = FourRoomVectorEnv(1, size=size, max_steps=max_steps)
    vector.reset(seed=0)
    for episode in range(2):
        env.reset(seed=0 if episode == 0 else None)
        flags = [env.step(LEFT)[2:4] for _ in range(expected)]
        assert flags == [(False, False)] * (expected - 1) + [(False, True)]
        assert [vector.step(np.array([LEFT]))[3].item() for _ in range(expected)] == [False] * (expected - 1) + [True]


def test_goal_on_the_last_step_terminates_and_does_not_truncate():
    path = shortest_paths(FourRoomMaze(7).text().split("\n"), (1, 1))[5, 5]
    for max_steps, expected in ((len(path), (True, False)), (len(path) - 1, (False, True))):
        env = FourRoomEnv(size=7, max_steps=max_steps)
        vector = FourRoomVectorEnv(1, size=7, max_steps=max_steps)
        env.reset(seed=0)
        vector.reset(seed=0)
        flags = [env.step(action)[2:4] for action in path[:max_steps]]
        assert flags == [(False, False)] * (max_steps - 1) + [expected]
        steps = [vector.step(np.array([action])) for action in path[:max_steps]]
        assert [(step[2].item(), step[3].item()) for step in steps] == flags


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("render_mode", [None, "rgb_array", "ansi"])
@pytest.mark.parametrize("start", [(1, 1), "random"])
def test_check_env_finds_nothing(start, render_mode):
    """Any warning is an error; the environment has a spec, so that check_env also makes and checks the render modes."""
    env = gym.make("FourRoom-v0", size=7, start=start, render_mode=render_mode).unwrapped
    assert env.spec is not None and env.render_mode == render_mode
    check_env(env)


def test_ansi_rendering():
    env = gym.make("FourRoom-v0", size=7, render_mode="ansi")
    env.reset(seed=0)
    empty = env.unwrapped.maze.text().split("\n")
    assert Counter("".join(empty)) == {"#": 29, ".": 18, "S": 1, "G": 1}
    assert env.render().split("\n") == [empty[0], "#A" + empty[1][2:], *empty[2:]]
    env.step(RIGHT)
    assert env.render().split("\n") == [empty[0], "#SA" + empty[1][3:], *empty[2:]]

    env = gym.make("FourRoom-v0", size=7, start="random", render_mode="ansi")
    env.reset(seed=0)
    assert Counter(env.render().replace("\n", "")) == {"#": 29, ".": 18, "A": 1, "G": 1}


@pytest.mark.parametrize("size", [7, 10])
def test_rgb_rendering_shows_the_drawing_and_the_agent_moves(size):
    env = gym.make("FourRoom-v0", size=size, render_mode="rgb_array")
    env.reset(seed=0)
    agent_positions, colours = [], set()
    for _ in range(2):
        image = env.render()
        assert image.shape == (16 * size, 16 * size, 3) and image.dtype == np.uint8
        lines = env.unwrapped.maze.text(env.unwrapped.cell).split("\n")
        for row, column in itertools.product(range(size), repeat=2):
            block = image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1, 3)
            assert (block == block[0]).all()
            colours.add((lines[row][column], tuple(block[0].tolist())))
            if lines[row][column] == "A":
                agent_positions.append((row, column))
                agent_colour = block[0]
        assert (image == agent_colour).all(axis=-1).sum() == 16 * 16
        env.step(RIGHT)
    assert agent_positions == [(1, 1), (1, 2)]
    assert sorted(symbol for symbol, _ in colours) == sorted("#.SGA")  # one colour for each symbol
    assert len({colour for _, colour in colours}) == 5


@pytest.mark.parametrize("make", [FourRoomEnv, FourRoomVectorEnv])
@pytest.mark.parametrize(
    ("named", "kwargs"),
    [
        ("size", {"size": 6}),
        ("size", {"size": -7}),
        ("start", {"size": 7, "start": (0, 3)}),
        ("start", {"size": 7, "start": (3, 3)}),
        ("start", {"size": 7, "start": (1, 9)}),
        ("goal", {"size": 7, "goal": (5, 5 + 7)}),
        ("goal", {"size": 7, "goal": (7, 1)}),
        ("goal", {"size": 7, "goal": (-8, 1)}),
        ("goal", {"size": 7, "goal": (6, 6)}),
        ("start", {"size": 7, "start": (5, 5)}),
        ("goal", {"size": 7, "start": (-2, 1), "goal": (5, 1)}),
        ("max_steps", {"size": 7, "max_steps": 0}),
    ],
)
def test_wrong_parameters_are_named(make, named, kwargs):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        make(**kwargs)


@pytest.mark.parametrize("action", [4, -1, np.int64(4), 1.5, None])
def test_wrong_action_is_refused_and_changes_nothing(action):
    env = FourRoomEnv(size=7, max_steps=2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        env.step(action)
    assert env.step(RIGHT)[0] == 1 * 7 + 2
    assert env.step(np.int64(RIGHT))[2:4] == (False, True)  # the second step, not the third


@pytest.mark.parametrize("actions", [[RIGHT, 4], [-1, RIGHT]])
def test_wrong_vector_action_is_refused_and_changes_nothing(actions):
    env = FourRoomVectorEnv(2, size=7, max_steps=2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        env.step(np.array(actions))
    assert env.step(np.array([RIGHT, DOWN]))[0].tolist() == [1 * 7 + 2, 2 * 7 + 1]
    assert env.step(np.array([UP, LEFT]))[3].tolist() == [True, True]  # the second step, not the third


def test_actions_of_every_integer_type():
    envs = FourRoomVectorEnv(2, size=7)
    for dtype in "bhilqBHILQ":
        envs.reset(seed=0)
        assert envs.step(np.array([RIGHT, DOWN], dtype))[0].tolist() == [1 * 7 + 2, 2 * 7 + 1]


def test_returned_observations_belong_to_the_caller():
    env = FourRoomVectorEnv(2, size=7)
    observations, _ = env.reset(seed=0)
    for expected in ([9, 15], [10, 22]):
        observations[:] = 0
        observations = env.step(np.array([RIGHT, DOWN]))[0]
        assert observations.tolist() == expected


def test_negative_positions_count_from_the_end():
    maze = FourRoomMaze(8, start=(-2, 1), goal=(2, -3))
    assert maze.starts.tolist() == [6 * 8 + 1] and maze.goal == 2 * 8 + 5
    assert maze.text().split("\n")[6][1] == "S" and maze.text().split("\n")[2][5] == "G"


def test_stable_baselines3_a2c_learns():
    """A2C, unchanged, goes from random walks (returns of 1 to 2 over seeds) to the shortest path (4.92 at best)."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = stable_baselines3.A2C("MlpPolicy", gym.make("FourRoom-v0", size=7), seed=0, device="cpu").learn(5000)
    torch.set_num_threads(threads)
    returns = np.array(model.get_env().envs[0].get_episode_rewards())
    assert returns[:30].mean() < 3.5
    assert returns[-30:].mean() > 4.5
    assert returns.max() == pytest.approx(5 - 8 * 0.01)  # nothing pays more than the shortest path of 8 steps


# ------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("lowest, expected", [(100, 0), (-2, -2)])
def test_colours_of_the_cells_start_at_zero_or_below(lowest, expected):
    """So that a cell visited a hundred times is never the darkest. Walls and cells of value 0 are blank."""
    maze = FourRoomMaze(7)
    values = lowest + np.arange(49.0)
    values[np.flatnonzero(maze.free)[:2]] = lowest, 0
    heat = draw_cells(maze, values).axes[0].images[-1]
    assert heat.get_clim() == (expected, values[maze.free].max())
    shown = heat.get_array().ravel()
    assert (shown.mask == ~maze.free | (values == 0)).all()
    assert (shown.compressed() == values[~shown.mask]).all()


def test_a_picture_without_values_is_blank():
    assert draw_cells(FourRoomMaze(7), np.zeros(49)).axes[0].images[-1].get_array().mask.all()


def test_arrows_point_along_the_mean_direction_of_the_actions():
    """In the cells that have any weight; their lengths are those of the means."""
    maze, weights = FourRoomMaze(7), np.zeros((49, 4))
    weights[8], weights[10], weights[33] = (0, 3, 0, 0), (2, 0, 2, 4), (1, 0, 3, 0)  # up, right, down, left
    (arrows,) = [
        c for c in draw_cells(maze, weights.sum(axis=1), arrows=weights).axes[0].collections if hasattr(c, "U")
    ]
    drawn = zip(*(column.tolist() for column in (arrows.X, arrows.Y, arrows.U, arrows.V)), strict=True)
    assert sorted(drawn) == [(1, 1, 1, 0), (3, 1, -0.5, 0), (5, 4, 0, -0.5)]  # column, row, to the right, upwards


@pytest.fixture
def drawn(monkeypatch):
    """What draw_cells is given, title: (values, arrows), in place of its pictures."""
    panels = {}

    def draw(maze, values, title, arrows=None):
        panels[title] = values, arrows
        return title

    monkeypatch.setattr(four_room, "draw_cells", draw)
    return panels


def test_a_picture_of_pairs_adds_up_their_weights(drawn):
    """Of each action in each cell for the arrows, and over the actions for the colours; one weight may serve all."""
    maze, rng = FourRoomMaze(8), np.random.default_rng(0)
    cells, actions, weights = rng.integers(64, size=300), rng.integers(4, size=300), rng.exponential(size=300)
    for weight, title in ((weights, "many"), (2.5, "one")):
        expected = np.zeros((64, 4))
        for cell, action, share in zip(cells, actions, np.broadcast_to(weight, 300), strict=True):
            expected[cell, action] += share
        assert four_room.draw_pairs(maze, cells, actions, weight, title) == title
        values, arrows = drawn[title]
        np.testing.assert_allclose(arrows, expected, rtol=1e-12)
        np.testing.assert_allclose(values, expected.sum(axis=1), rtol=1e-12)


def test_pictures_of_a_run_show_visits_values_traces_and_replay(drawn):
    """Each cell as often as it was visited, the values of all cells but the goal, and all pairs, once or by weight."""
    maze, rng = FourRoomMaze(7), np.random.default_rng(0)
    visits, values = np.array([8, 8, 9, 8, 33]), rng.normal(size=49)
    assert four_room.draw_pictures(maze, visits, values).keys() == {"visits", "values"}
    pairs = np.array([8, 8, 32]), np.array([1, 1, 2])
    names = four_room.draw_pictures(maze, visits, values, traces=pairs, replay=(*pairs, np.array([20.0, 30.0, 50.0])))
    assert names.keys() == {"visits", "values", "traces", "replay"}
    assert names["visits"] == "Visits in 100 episodes: 3 of 19 cells"  # all but the goal
    shown = {name: drawn[title] for name, title in names.items()}
    assert [(cell, n) for cell, n in enumerate(shown["visits"][0]) if n] == [(8, 3), (9, 1), (33, 1)]
    assert (shown["values"][0] == np.where(np.arange(49) == 40, 0, values)).all()
    for name, weights in (("traces", {(8, 1): 2, (32, 2): 1}), ("replay", {(8, 1): 50, (32, 2): 50})):
        cells, arrows = shown[name]
        assert {(c, a): arrows[c, a] for c, a in np.argwhere(arrows)} == weights
        assert (cells == arrows.sum(axis=1)).all()


def test_a_gif_shows_every_cell_of_an_episode_for_a_tenth_of_a_second(tmp_path):
    """Also two in a row where the agent bumps into a wall; the last one stays longer."""
    maze, cells = FourRoomMaze(7), [8, 8, 9, 10, 10, 10, 11, 18, 25, 32, 33, 40]
    four_room.write_gif(tmp_path / "agent.gif", maze, cells)
    tenths = []
    with Image.open(tmp_path / "agent.gif") as video:
        for frame in ImageSequence.Iterator(video):
            tenths += [np.asarray(frame.convert("RGB"))] * (frame.info["duration"] // 100)
    assert len(tenths) == len(cells) - 1 + 15
    for image, cell in zip(tenths, cells + [40] * 14, strict=True):
        assert (image == maze.image(cell)).all()
