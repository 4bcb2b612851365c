"""U-mazes with an ant and with a point mass, and goals anywhere in them (Held et al., 2018; Recall Traces, 6.3).

    #####   Five by five blocks of 2 m; x points right, y down (in pictures, up). An episode starts at S, (0, 0). Within
    #S..#   `tolerance` of the goal the reward is 1, and the episode ends; every other step has a reward of 0. Goals are
    ###.#   drawn from the seven free blocks, or are those that `reset` is given, even in walls.
    #...#
    #####   `GoalVectorEnv` steps many environments as arrays. `GoalEnv` is one of them for `gym.make`, with a Dict of
            observation, achieved_goal and desired_goal. Coverage is measured on the grid `coverage_goals`.

`AntUMaze-v0`: Gymnasium's ant in a maze whose walls and time step are set here, stepped by MuJoCo in native threads.
`PointUMaze-v0`: a point with velocity and acceleration, which slides along walls.
"""

import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from mujoco.rollout import Rollout

LAYOUT = ("#####", "#S..#", "###.#", "#...#", "#####")
BLOCK = 2.0  # metres
LOW, HIGH = np.array([-3.0, -3.0]), np.array([7.0, 7.0])  # the outer square
_BLOCKS = np.array([[symbol != "#" for symbol in row] for row in LAYOUT])  # [row, column], True where free
_PADDED = np.pad(_BLOCKS, 1)
_CENTRES = BLOCK * (np.indices(_BLOCKS.shape)[::-1].T - 1.0).transpose(1, 0, 2)  # [row, column] -> (x, y)
FREE, WALLS = _CENTRES[_BLOCKS], _CENTRES[~_BLOCKS]  # centres of the 7 free blocks and of the 18 walls, (n, 2)


def is_free(positions: np.ndarray) -> np.ndarray:
    """Which positions (..., 2) lie in a free block of the maze, (...)."""
    columns, rows = np.floor((np.moveaxis(positions, -1, 0) - LOW[0]) / BLOCK).clip(-1, 5).astype(int)
    return _PADDED[rows + 1, columns + 1]


def coverage_goals() -> np.ndarray:
    """16 goals for each free block, half a metre apart, (112, 2) (Held et al., 2018)."""
    offsets = np.array([-0.75, -0.25, 0.25, 0.75])
    grid = np.stack(np.meshgrid(offsets, offsets), axis=-1).reshape(-1, 2)
    return (FREE[:, None] + grid).reshape(-1, 2)


class GoalVectorEnv(VectorEnv):
    """n = `num_envs` environments with a goal each, stepped as arrays.

    Observations (n, S + G) are those of the states, then the goals; actions (n, A) are clipped to [-1, 1]. There is no
    autoreset: an environment whose episode has ended stands still until it is reset. `options` of `reset` may hold the
    goals of the new episodes, "goals" (n, G), and which environments are reset, "reset_mask" (n,). Nothing is random
    but the goals that are drawn where none are given.

    `places` are the columns of an observation that have to come near the goal; goals may be wanted in all `goal_space`.
    A subclass says how simulator states (n, ...) advance and are observed: `advance`, `observe` and `fallen`.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}
    places = slice(0, 2)

    def __init__(self, first_state: np.ndarray, sizes, goals_between, num_envs: int, max_episode_steps, tolerance):
        state_dim, action_dim, goal_dim = sizes
        low, high = (np.broadcast_to(side, goal_dim).astype(np.float32) for side in goals_between)
        self.goal_space = spaces.Box(low, high)
        self.num_envs, self.max_episode_steps, self.tolerance = num_envs, max_episode_steps, tolerance
        self.single_observation_space = spaces.Box(-1e6, 1e6, (state_dim + goal_dim,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.first_state, self.states = first_state, np.tile(first_state, (num_envs, 1))
        self.goals, self.steps = np.zeros((num_envs, goal_dim), np.float32), np.zeros(num_envs, dtype=int)
        self.ended = np.zeros(num_envs, dtype=bool)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        options = options or {}
        mask = options.get("reset_mask", np.ones(self.num_envs, dtype=bool))
        goals = options["goals"] if "goals" in options else self.draw_goals(self.num_envs, self.np_random)
        self.goals[mask] = np.broadcast_to(goals, self.goals.shape)[mask]
        self.states[mask], self.steps[mask], self.ended[mask] = self.first_state, 0, False
        return self._observations(), {}

    def step(self, actions: np.ndarray):
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(f"actions must have the shape {self.action_space.shape}, got {np.shape(actions)}")
        going = ~self.ended
        self.states[going] = self.advance(self.states[going], np.asarray(actions, np.float64)[going].clip(-1, 1))
        self.steps[going] += 1
        observations = self._observations()
        rewards = self.compute_reward(observations[:, self.places], self.goals)
        terminated = (rewards > 0) | self.fallen(self.states)
        truncated = (self.steps >= self.max_episode_steps) & ~terminated
        self.ended = terminated | truncated
        return observations, rewards, terminated, truncated, {}

    def _observations(self) -> np.ndarray:
        return np.concatenate((self.observe(self.states), self.goals), axis=1, dtype=np.float32)

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any = None) -> np.ndarray:
        """1 where places (..., G) are within the tolerance of their goals (..., G), 0 elsewhere, (...)."""
        return (np.linalg.norm(achieved_goal - desired_goal, axis=-1) < self.tolerance).astype(np.float32)

    def advance(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The states after these (n, ...)."""
        raise NotImplementedError

    def observe(self, states: np.ndarray) -> np.ndarray:
        """The observations of states, without the goals, (n, S)."""
        return states

    def fallen(self, states: np.ndarray) -> np.ndarray:
        """In which states an episode ends without success, (n,)."""
        return np.zeros(len(states), dtype=bool)

    def draw_goals(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Goals that can be reached, (count, G)."""
        return FREE[rng.integers(len(FREE), size=count)] + rng.uniform(-BLOCK / 2, BLOCK / 2, (count, 2))

    def is_free(self, positions: np.ndarray) -> np.ndarray:
        """Where a point may be, for `image`."""
        return is_free(positions)

    def image(self, pixels: int = 24) -> np.ndarray:
        """The first of the environments from above, its first two dimensions: red goal, blue point, (240, 240, 3)."""
        centres = self.goal_space.low[0] + (np.arange(10 * pixels) + 0.5) / pixels
        here = np.stack(np.meshgrid(centres, centres[::-1]), axis=-1)
        image = np.where(self.is_free(here)[..., None], 250, 120).repeat(3, axis=-1).astype(np.uint8)
        for centre, radius, colour in ((self.goals[0], 0.3, (213, 30, 30)), (self.states[0], 0.15, (30, 60, 200))):
            image[((here - centre[:2]) ** 2).sum(-1) < radius**2] = colour
        return image


class GoalEnv(gym.Env):
    """One environment of a `GoalVectorEnv`, in the convention of goal-conditioned environments.

    Observations are a Dict of observation (S,), achieved_goal and desired_goal (G,); `compute_reward` takes batches.
    `reset(options={"goals": goal})` sets the goal. gym.make sets the time limit.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    vector_env: type[GoalVectorEnv]

    def __init__(self, render_mode: str | None = None, **options):
        self.envs, self.render_mode = self.vector_env(1, max_episode_steps=np.inf, **options), render_mode
        self.places, self.goal_space = self.envs.places, self.envs.goal_space
        self.compute_reward, self.action_space = self.envs.compute_reward, self.envs.single_action_space
        (goal_dim,), (whole_dim,) = self.goal_space.shape, self.envs.single_observation_space.shape
        sizes = {"observation": whole_dim - goal_dim, "achieved_goal": goal_dim, "desired_goal": goal_dim}
        boxes = {name: spaces.Box(-1e6, 1e6, (size,), np.float32) for name, size in sizes.items()}
        self.observation_space = spaces.Dict(boxes)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.envs.np_random = self.np_random
        return self._split(self.envs.reset(options=options)[0]), {}

    def step(self, action: np.ndarray):
        observations, rewards, terminated, _, _ = self.envs.step(np.asarray(action)[None])
        info = {"is_success": bool(rewards[0])}
        return self._split(observations), float(rewards[0]), bool(terminated[0]), False, info

    def _split(self, observations: np.ndarray) -> dict[str, np.ndarray]:
        state, goal = np.split(observations[0], [-len(self.goal_space.low)])
        return {"observation": state, "achieved_goal": state[self.places], "desired_goal": goal}

    def render(self):
        return self.envs.image() if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.envs.close()


# ------------------------------------------------------------------------------------------------------ ant
def ant_maze() -> mujoco.MjModel:
    """Gymnasium's own ant in the U-maze, one RK4 step of 0.02 s, and a mark that shows the goal.

    Its motors turn with up to 150 Nm, as those of rllab's ant do.
    """
    spec = mujoco.MjSpec.from_file(str(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / "ant.xml"))
    spec.option.timestep = 0.02
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET  # a state that is not finite has fallen
    box, cylinder, size = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER, [BLOCK / 2, BLOCK / 2, 0.5]
    for x, y in WALLS:
        spec.worldbody.add_geom(type=box, pos=[x, y, 0.5], size=size, conaffinity=1, rgba=[0.25, 0.25, 0.3, 1])
    place = [0, 0, 0.01]  # not the world's origin: MuJoCo would take a site there for one that never moves
    spec.worldbody.add_site(name="goal", type=cylinder, pos=place, size=[0.3, 0.02, 0], rgba=[0.85, 0.1, 0.1, 1])
    spec.worldbody.add_camera(name="above", pos=[2.0, 2.0, 13.0], fovy=48)
    return spec.compile()


class AntUMazeVectorEnv(GoalVectorEnv):
    """Ants in U-mazes. The centre of mass of a torso with its legs has to come within 1 m of the goal.

    Observation (43): positions (15) and velocities (14) of the joints, the torso's rotation matrix (9), the centre of
    mass (3), the goal (2); with `contact_forces` also those on each body, clipped to [-1, 1] (78, before the goal).
    The episode ends when the torso is lower than 0.3 m or higher than 1 m, or after 500 steps of 0.02 s.

    The states of all environments are one array (time, positions, velocities), stepped by MuJoCo in `num_threads`
    native threads. Every step starts the solver afresh, so that the trajectories do not depend on how many environments
    run side by side.
    """

    places = slice(38, 40)

    def __init__(
        self, num_envs: int = 1, max_episode_steps=500, contact_forces: bool = False, num_threads: int | None = None
    ):
        self.model, self.contact_forces = ant_maze(), contact_forces
        first_state = np.concatenate(([0.0], self.model.numeric("init_qpos").data, np.zeros(14)))
        sizes = 41 + contact_forces * 6 * (self.model.nbody - 1), 8, 2
        super().__init__(first_state, sizes, (LOW, HIGH), num_envs, max_episode_steps, tolerance=1.0)
        num_threads = min(num_envs, num_threads or os.cpu_count() or 1)
        self.pool = Rollout(nthread=num_threads if num_threads > 1 else 0)
        self.data, self.renderer = [mujoco.MjData(self.model) for _ in range(num_threads)], None
        self._measure_legs()

    def advance(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return self.pool.rollout(self.model, self.data, states, actions[:, None], nstep=1)[0][:, 0]

    def observe(self, states: np.ndarray) -> np.ndarray:
        rotations = self._rotations(states)
        parts = [states[:, 1:], rotations.reshape(-1, 9), self._centres_of_mass(states, rotations)]
        if self.contact_forces:
            parts.append(np.stack([self._contact_forces(state) for state in states]).clip(-1, 1))
        return np.concatenate(parts, axis=1)

    def fallen(self, states: np.ndarray) -> np.ndarray:
        return ~((states[:, 3] >= 0.3) & (states[:, 3] <= 1.0) & np.isfinite(states).all(-1))

    def _rotations(self, states: np.ndarray) -> np.ndarray:
        """The torsos' rotation matrices, (n, 3, 3), of unit quaternions."""
        w, x, y, z = states[:, 4:8].T
        rows = (
            (w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z),
        )
        return np.array(rows).transpose(2, 0, 1)

    def _measure_legs(self) -> None:
        """What the centre of mass needs to know of the four legs: each is a fixed part, an upper and a lower one."""
        model = self.model
        fixed, upper, lower = (np.arange(4) * 3 + first for first in (2, 3, 4))
        mass = model.body_mass[:, None]
        knee_axes, weight = model.jnt_axis[2::2], mass[lower] * model.body_ipos[lower]  # the hips turn about z
        self.along = knee_axes * (knee_axes * weight).sum(-1, keepdims=True)
        self.around = weight - self.along, np.cross(knee_axes, weight)
        self.upper = mass[upper] * model.body_ipos[upper] + mass[lower] * model.body_pos[lower]
        hips = model.body_pos[fixed] + model.body_pos[upper]
        self.rest = (mass[fixed] * (model.body_pos[fixed] + model.body_ipos[fixed])).sum(0)
        self.rest += ((mass[upper] + mass[lower]) * hips).sum(0) + (mass[1] * model.body_ipos[1])
        self.mass = model.body_mass.sum()

    def _centres_of_mass(self, states: np.ndarray, rotations: np.ndarray) -> np.ndarray:
        """(n, 3), by the kinematics of the legs: MuJoCo's own is of the state before the last step."""
        hips, knees = states[:, 8:16:2], states[:, 9:16:2, None]
        lower = self.along + self.around[0] * np.cos(knees) + self.around[1] * np.sin(knees)  # Rodrigues' formula
        legs, cos, sin = self.upper + lower, np.cos(hips), np.sin(hips)
        x, y, z = legs[..., 0], legs[..., 1], legs[..., 2]
        legs = np.stack(((cos * x - sin * y).sum(1), (sin * x + cos * y).sum(1), z.sum(1)), axis=1)
        offsets = (self.rest + legs) / self.mass
        return states[:, 1:4] + (rotations @ offsets[..., None])[..., 0]

    def _contact_forces(self, state: np.ndarray) -> np.ndarray:
        data = self._simulate(state)
        mujoco.mj_rnePostConstraint(self.model, data)
        return data.cfrc_ext[1:].flatten()

    def _simulate(self, state: np.ndarray) -> mujoco.MjData:
        """MuJoCo's own data in a state without actions."""
        data = self.data[0]
        mujoco.mj_setState(self.model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        data.ctrl[:], data.qacc_warmstart[:] = 0, 0
        mujoco.mj_forward(self.model, data)
        return data

    def standing_ants(self, count: int, rng: np.random.Generator, steps: int = 100) -> np.ndarray:
        """`count` states (count, 30) of ants that stand: after `steps` Brownian actions from the first state, kept if
        the ant has not fallen and would not fall within as many steps without any action (facts of Florensa et al.,
        2017). Their positions are near the start."""
        found = np.zeros((0, 30))
        while len(found) < count:
            states, actions = np.tile(self.first_state, (count, 1)), np.zeros((count, 8))
            standing = np.ones(count, dtype=bool)
            for step in range(2 * steps):
                if step == steps:
                    candidates = states
                actions = (actions + rng.normal(0, 0.3, actions.shape)).clip(-1, 1) if step < steps else 0 * actions
                states = self.advance(states, actions)
                standing &= ~self.fallen(states)
            found = np.concatenate((found, candidates[standing]))
        return found[:count]

    def put(self, ants: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Observations (n, S), without goals, of ants (n, 30) with their centres of mass moved to places (n, 2)."""
        states = ants.copy()
        states[:, 1:3] += places - self.observe(states)[:, self.places]
        return self.observe(states)

    def image(self, pixels: int = 240) -> np.ndarray:
        """The first maze from above, (pixels, pixels, 3) uint8."""
        self.model.site("goal").pos[:2] = self.goals[0]
        data = self._simulate(self.states[0])
        if self.renderer is None:
            self.renderer = MujocoRenderer(self.model, data, width=pixels, height=pixels, camera_name="above")
        return self.renderer.render("rgb_array")

    def close_extras(self, **_: Any) -> None:
        self.pool.close()
        if self.renderer is not None:
            self.renderer.close()


class AntUMazeEnv(GoalEnv):
    vector_env = AntUMazeVectorEnv


# ------------------------------------------------------------------------------------------------------ point mass
class PointUMazeVectorEnv(GoalVectorEnv):
    """Points in U-mazes, which have to come within 0.3 m of the goal.

    Observation (6): position (2), velocity (2), goal (2). Actions are forces of up to 2 N in each direction, held for
    0.02 s, on a mass of 0.42 kg, a sphere of 0.1 m with rllab's density of 100 kg/m^3; nothing slows a point down but
    walls, along which it slides. An episode has at most 200 steps.
    """

    ACCELERATION = 2 / (100 * 4 / 3 * np.pi * 0.1**3)  # the largest, 4.8 m/s^2

    def __init__(self, num_envs: int = 1, max_episode_steps=200):
        super().__init__(np.zeros(4), (4, 2, 2), (LOW, HIGH), num_envs, max_episode_steps, tolerance=0.3)

    def advance(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        change, dt = self.ACCELERATION * 0.02 * actions, 0.02
        position, velocity = states[:, :2], states[:, 2:] + change
        moved = position + dt * (velocity - 0.5 * change)  # what RK4 gives, exactly
        for axis in range(2):  # one after the other, so that a point slides along a wall
            before = position[:, axis].copy()
            position[:, axis] = moved[:, axis]
            blocked = ~is_free(position)
            position[blocked, axis], velocity[blocked, axis] = before[blocked], 0
        return np.concatenate((position, velocity), axis=1)


class PointUMazeEnv(GoalEnv):
    vector_env = PointUMazeVectorEnv


# ------------------------------------------------------------------------------------------------------ pictures
def draw_coverage(rates: np.ndarray, title: str = ""):
    """Success rates (112,) of `coverage_goals` over the maze, red success and blue failure (Figures 5, 11 and 12).

    Returns the matplotlib Figure.
    """
    from matplotlib.figure import Figure  # the environments themselves need no matplotlib

    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    draw_maze(axes)
    heat = axes.scatter(*coverage_goals().T, c=rates, cmap="coolwarm", vmin=0, vmax=1, marker="s", s=180)
    figure.colorbar(heat, ax=axes, shrink=0.9, label="success rate")
    axes.set_title(title)
    return figure


def draw_maze(axes) -> None:
    """Draws the walls and the start into matplotlib's `axes`."""
    from matplotlib.patches import Rectangle

    for corner in WALLS - BLOCK / 2:
        axes.add_patch(Rectangle(corner, BLOCK, BLOCK, facecolor="0.6"))
    axes.text(0, 0, "S", ha="center", va="center", weight="bold")
    axes.set(xlim=(LOW[0], HIGH[0]), ylim=(LOW[1], HIGH[1]), aspect="equal", xlabel="x [m]", ylabel="y [m]")
