"""Four rooms: the grid world of Recall Traces (Goyal et al., ICLR 2019), section 6.1 and appendices D, F and H.

The agent walks from one corner of a square maze to the opposite one through bottleneck doorways. The paper shows the
returns of this maze (its axes run from between -4 and -1 to 3 or 5) but neither the rewards nor the doorways. We chose
a bonus of 5 for the goal and a penalty of 0.01 a step, which give such returns, and a doorway in the middle of
each of the four inner walls.

    #########   `FourRoomMaze` holds the geometry and both dynamics as arrays: `next_cell[cell, action]` forward and
    #S..#...#   `predecessors[next_cell, action]` backward, the exact backtracking model of section 6.1.
    #.......#   `FourRoomEnv` is one maze for `gym.make`, `FourRoomVectorEnv` steps many as arrays for `gym.make_vec`.
    #...#...#   `draw_cells` draws any quantity per cell (visits, values, traces) over the maze: Figures 3 and 10.
    ##.###.##
    #...#...#   A cell is the index `row * size + column`; the actions are 0 up, 1 right, 2 down, 3 left.
    #.......#   Walking into a wall leaves the agent where it is. Reaching the goal ends the episode.
    #...#..G#
    #########
"""

from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

MIN_SIZE = 7
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # (row, column) of up, right, down, left
ARROWS = "^>v<"
Position = tuple[int, int]


class FourRoomMaze:
    """Geometry and dynamics of a four-room maze of `size` x `size` cells (S = size**2 cells, A = 4 actions).

    `start` and `goal` are (row, column), where negative numbers count from the end; `start` may be "random", any free
    cell but the goal.

    free:              (S,) bool, the cells that are no wall
    starts:            (n,) the cells in which an episode may start
    goal:              the cell that ends the episode
    next_cell:         (S, A) the forward dynamics (a wall cell, and the terminal goal, lead to themselves)
    predecessors:      (S, A, 2) the exact backward dynamics, see `exact_predecessors`

    Raises ValueError for a size below 7, and for a start or goal in a wall, outside the maze, or the same.
    """

    def __init__(self, size: int, start: Position | Literal["random"] = (1, 1), goal: Position = (-2, -2)):
        if size < MIN_SIZE:
            raise ValueError(f"size must be at least {MIN_SIZE} for four rooms, got {size}")
        middle, last = size // 2, size - 1
        free = np.zeros((size, size), dtype=bool)
        free[1:last, 1:last] = True
        free[middle, :] = free[:, middle] = False
        for door in (middle // 2, (middle + last) // 2):
            free[middle, door] = free[door, middle] = True

        self.size = size
        self.free = free.ravel()
        self.goal = self._cell("goal", goal)
        if start == "random":
            self.starts = np.flatnonzero(self.free & (np.arange(size**2) != self.goal))
        else:
            self.starts = np.array([self._cell("start", start)])
        if self.goal in self.starts:
            raise ValueError(f"start and goal must differ, both are {goal}")

        cells = np.arange(size**2)
        neighbours = cells[:, None] + MOVES @ (size, 1)
        blocked = ~self.free[neighbours % size**2] | ~self.free[:, None] | (cells == self.goal)[:, None]
        self.next_cell = np.where(blocked, cells[:, None], neighbours)

        self.predecessors = exact_predecessors(self.next_cell, self.free & (cells != self.goal))

    def _cell(self, name: str, position: Position) -> int:
        row, column = (int(p) + self.size * (p < 0) for p in position)
        inside = 0 <= row < self.size and 0 <= column < self.size
        if not (inside and self.free[row * self.size + column]):
            raise ValueError(
                f"{name} must be a free cell (row, column) of the {self.size} x {self.size} maze, got {position}"
            )
        return row * self.size + column

    def start_cells(self, seeds: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        """The cells in which episodes start, given the seeds of their environments and their numbers, uint64 arrays.

        They are a hash of seed and number, SplitMix64 (Steele et al., 2014), in place of a random stream. So the starts
        of many environments are computed at once, and do not depend on how many environments there are.
        """
        bits = seeds + (episodes + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return self.starts[(bits ^ (bits >> np.uint64(31))) % np.uint64(len(self.starts))]

    def text(self, agent: int | None = None) -> str:
        """The maze as lines of text: # wall, S start, G goal, A agent."""
        symbols = np.where(self.free, ".", "#")
        if len(self.starts) == 1:
            symbols[self.starts] = "S"
        symbols[self.goal] = "G"
        if agent is not None:
            symbols[agent] = "A"
        return "\n".join("".join(row) for row in symbols.reshape(self.size, self.size))

    def image(self, agent: int | None = None, pixels: int = 16) -> np.ndarray:
        """The maze as an RGB image of `pixels` x `pixels` a cell, (size * pixels, size * pixels, 3) uint8."""
        colours = {"#": (51, 51, 51), ".": (250, 250, 250), "S": (160, 200, 235), "G": (60, 160, 90), "A": (213, 94, 0)}
        image = np.array(
            [[colours[symbol] for symbol in line] for line in self.text(agent).splitlines()], dtype=np.uint8
        )
        return image.repeat(pixels, axis=0).repeat(pixels, axis=1)


def exact_predecessors(next_cell: np.ndarray, can_act: np.ndarray) -> np.ndarray:
    """The cells from which each action leads into each cell, (S, A, 2): the exact backtracking model of section 6.1.

    predecessors[cell, action] are the cells in which `action` may have been taken to enter `cell`, at most two: first
    the neighbour, if one leads there, then the cell itself, if the action bumps into a wall; missing ones are -1 at the
    end. next_cell: (S, A) the cell that each action leads to; can_act: (S,) bool, the cells in which the agent acts,
    neither walls nor the goal; other cells are nobody's predecessor.
    """
    predecessors = np.full((*next_cell.shape, 2), -1)
    for bumps in (False, True):  # moves first, so that they come before bumps
        for cell in np.flatnonzero(can_act):
            for action, after in enumerate(next_cell[cell]):
                if (after == cell) == bumps:
                    slot = 0 if predecessors[after, action, 0] == -1 else 1
                    predecessors[after, action, slot] = cell
    return predecessors


class FourRoomEnv(gym.Env):
    """One four-room maze; see the top of this file for the dynamics.

    Observation: the agent's cell, Discrete(size**2). Action: Discrete(4). Reward: -`step_penalty` for every step, plus
    `goal_reward` for the one that reaches the goal and so terminates the episode; `max_steps` (default size**2)
    truncate the episode.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 10}

    def __init__(
        self,
        size: int = 11,
        start: Position | Literal["random"] = (1, 1),
        goal: Position = (-2, -2),
        goal_reward: float = 5.0,
        step_penalty: float = 0.01,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ):
        self.maze = FourRoomMaze(size, start, goal)
        self.goal_reward, self.step_penalty = goal_reward, step_penalty
        self.max_steps = _checked_max_steps(max_steps, size)
        self.render_mode = render_mode
        self.observation_space = spaces.Discrete(size**2)
        self.action_space = spaces.Discrete(len(MOVES))
        self.episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.episode = 0
        seeds = np.array([self.np_random_seed % 2**64], dtype=np.uint64)
        self.cell = int(self.maze.start_cells(seeds, np.array([self.episode], dtype=np.uint64))[0])
        self.steps = 0
        self.episode += 1
        return self.cell, {}

    def step(self, action: int):
        if not self.action_space.contains(action):
            raise ValueError(f"action must be 0 (up), 1 (right), 2 (down) or 3 (left), got {action}")
        self.cell = int(self.maze.next_cell[self.cell, action])
        self.steps += 1
        terminated = self.cell == self.maze.goal
        truncated = self.steps >= self.max_steps and not terminated
        return self.cell, terminated * self.goal_reward - self.step_penalty, terminated, truncated, {}

    def render(self):
        if self.render_mode == "ansi":
            return self.maze.text(self.cell)
        if self.render_mode == "rgb_array":
            return self.maze.image(self.cell)


class FourRoomVectorEnv(VectorEnv):
    """`num_envs` four-room mazes stepped as arrays: the same trajectories as that many `FourRoomEnv`.

    An episode that ends is reset within the same step; its true last observation is in `infos["final_obs"]`, as in
    Gymnasium's own vector environments. Environment i is seeded with seed + i.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        size: int = 11,
        start: Position | Literal["random"] = (1, 1),
        goal: Position = (-2, -2),
        goal_reward: float = 5.0,
        step_penalty: float = 0.01,
        max_steps: int | None = None,
    ):
        self.num_envs = num_envs
        self.maze = FourRoomMaze(size, start, goal)
        self.goal_reward, self.step_penalty = goal_reward, step_penalty
        self.rewards = np.full(size**2, -step_penalty, dtype=float)  # of a step into each cell
        self.rewards[self.maze.goal] += goal_reward
        self.max_steps = _checked_max_steps(max_steps, size)
        self.single_observation_space = spaces.Discrete(size**2)
        self.single_action_space = spaces.Discrete(len(MOVES))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.seeds = None

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        if isinstance(seed, int | np.integer):
            seed = [seed + i for i in range(self.num_envs)]
        if seed is None and self.seeds is None:
            seed = [None] * self.num_envs
        if seed is not None:
            if len(seed) != self.num_envs:
                raise ValueError(f"seed must be a number or a list of {self.num_envs}, got {seed}")
            entropy = np.random.SeedSequence().generate_state(self.num_envs, np.uint64).tolist()
            seed = [drawn if given is None else int(given) % 2**64 for given, drawn in zip(seed, entropy, strict=True)]
            self.seeds, self.episodes = np.array(seed, dtype=np.uint64), np.zeros(self.num_envs, dtype=np.uint64)
        self.cells = self.maze.start_cells(self.seeds, self.episodes)
        self.episodes = self.episodes + np.uint64(1)
        self.steps = np.zeros(self.num_envs, dtype=np.int64)
        return self.cells.copy(), {}

    def step(self, actions: np.ndarray):
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or ((actions < 0) | (actions > 3)).any():
            raise ValueError(f"actions must be {self.num_envs} of 0 (up), 1 (right), 2 (down), 3 (left), got {actions}")
        self.cells = self.maze.next_cell[self.cells, actions]
        self.steps += 1
        rewards = self.rewards[self.cells]
        terminated = self.cells == self.maze.goal
        truncated = (self.steps >= self.max_steps) & ~terminated
        done = terminated | truncated
        infos = {}
        if np.count_nonzero(done):
            infos = {"final_obs": np.where(done, self.cells.astype(object), None), "_final_obs": done}
            infos |= {"final_info": {}, "_final_info": done.copy()}
            self.cells[done] = self.maze.start_cells(self.seeds[done], self.episodes[done])
            self.episodes[done] += np.uint64(1)
            self.steps[done] = 0
        return self.cells.copy(), rewards, terminated, truncated, infos


def _checked_max_steps(max_steps: int | None, size: int) -> int:
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    return size**2 if max_steps is None else max_steps


def draw_cells(maze: FourRoomMaze, values: np.ndarray, title: str = "", arrows: np.ndarray | None = None):
    """Draws any quantity per cell over the maze, as in Figures 3 and 10, and returns the matplotlib Figure.

    values: (S,); the colours start at 0, or at the lowest value if that is less. Cells of value 0 are left blank.
    arrows: (S, A) weights of the actions; each cell gets one arrow along their mean direction.
    """
    from matplotlib.figure import Figure  # the environments themselves need no matplotlib

    grid = (maze.size, maze.size)
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.where(maze.free, 1.0, 0.2).reshape(grid), cmap="gray", vmin=0, vmax=1)
    shown = np.ma.masked_where(~maze.free | (values == 0), values).reshape(grid)
    heat = axes.imshow(shown, cmap="viridis", vmin=min(0, shown.min()) if shown.count() else None)
    figure.colorbar(heat, ax=axes, shrink=0.9)
    if arrows is not None:
        rows, columns = np.divmod(np.flatnonzero(arrows.sum(axis=1) > 0), maze.size)
        weights = arrows.reshape(*grid, -1)[rows, columns]
        down, right = (weights / weights.sum(axis=1, keepdims=True) @ MOVES).T
        axes.quiver(columns, rows, right, -down, color="white", pivot="mid", scale=1.2 * maze.size, width=0.006)
    for name, cells in (("S", maze.starts), ("G", [maze.goal])):
        if len(cells) == 1:
            row, column = divmod(int(cells[0]), maze.size)
            box = {"boxstyle": "circle,pad=0.1", "facecolor": "white", "linewidth": 0}
            axes.text(column, row, name, color="#d55e00", weight="bold", ha="center", va="center", bbox=box)
    axes.set(title=title, xticks=[], yticks=[])
    return figure


def draw_pairs(maze: FourRoomMaze, cells, actions, weights, title: str):
    """Draws the weight on each cell, and the mean direction of its actions; cells, actions and weights (n,)."""
    sums = np.zeros(maze.next_cell.shape)
    np.add.at(sums, (np.asarray(cells), np.asarray(actions)), weights)
    return draw_cells(maze, sums.sum(axis=1), title, arrows=sums)


def draw_pictures(maze: FourRoomMaze, visits, values, traces=None, replay=None) -> dict[str, Any]:
    """The figures that a run saves at its end, by name.

    visits: (n,) the cells of 100 episodes, without the last of each (Figures 3 and 10); values: (S,) the value of each
    cell; traces: cells and actions (n,) of recall traces; replay: cells, actions and weights (n,) of replay.
    """
    counts = np.bincount(visits, minlength=maze.size**2)
    title = f"Visits in 100 episodes: {np.count_nonzero(counts)} of {np.count_nonzero(maze.free) - 1} cells"
    values = np.where(np.arange(maze.size**2) == maze.goal, 0, values)  # no action is taken there
    figures = {"visits": draw_cells(maze, counts, title), "values": draw_cells(maze, values, "Value of each cell")}
    if traces is not None:
        figures["traces"] = draw_pairs(maze, *traces, 1, "Recall traces")
    if replay is not None:
        figures["replay"] = draw_pairs(maze, *replay, "Share of each cell in replay, %")
    return figures


def write_gif(path: Path, maze: FourRoomMaze, cells: list[int]) -> None:
    """Writes an episode that visited these cells as a GIF."""
    from PIL import Image

    first, *others = (Image.fromarray(maze.image(cell)) for cell in cells)
    first.save(path, save_all=True, append_images=others, duration=[100] * len(others) + [1500], loop=0)
