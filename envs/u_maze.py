"""U-mazes with an ant and with a point mass, and goals anywhere in them (Held et al., 2018; Recall Traces, 6.3).

    #####   Five by five blocks of 2 m; x points right, y down (in pictures, up). The agent starts at S, (0, 0), and has
    #S..#   to come near a goal: somewhere in the seven free blocks, or where `next_goals` says, even in a wall. Within
    ###.#   `tolerance` of it the reward is 1, and the episode ends; every other step has a reward of 0.
    #...#
    #####   Observations end with the goal. `GoalVectorEnv` steps many environments as arrays, `GoalEnv` is one of them
            for `gym.make`. `coverage_goals` is the grid on which coverage is measured, `draw_coverage` draws it.

`AntUMaze-v0`: Gymnasium's ant in a maze whose walls and time step are set here, stepped by MuJoCo in native threads.
`PointUMaze-v0`: a point with velocity and acceleration, which slides along walls.
"""

import os
from functools import cached_property
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
    """`num_envs` environments with a goal each, stepped as arrays.

    Observations are (num_envs, S + G), the state's and the goal; actions are (num_envs, A), clipped to [-1, 1]. An
    episode that ends is reset within the same step: `infos["final_obs"]` holds the true last observations, to be read
    where `infos["_final_obs"]` is true. `infos["distance"]` is how far from its goal each agent came, before a reset.

    Goals: an episode's goal is its row of `next_goals` (num_envs, G), which may be changed at any time; where that is
    nan, a goal is drawn that can be reached. Environment i is seeded with seed + i; nothing but such goals is random.
    `goal_space` is where goals may be wanted, `places` are the columns of an observation that have to come near them.

    A subclass says how the states, `self.states` (num_envs, ...), advance: `first_states`, `advance`, `observe`,
    `fallen` and `draw_goal`.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
    autoreset = True  # but in `GoalEnv`
    places = slice(0, 2)

    def __init__(self, num_envs: int, sizes: tuple[int, int, int], goals_between, max_steps: int, tolerance: float):
        state_dim, action_dim, goal_dim = sizes
        self.goal_space = spaces.Box(
            *(np.broadcast_to(side, goal_dim).astype(np.float64) for side in goals_between), dtype=np.float64
        )
        self.num_envs, self.max_steps, self.tolerance, self.goal_dim = num_envs, max_steps, tolerance, goal_dim
        self.single_observation_space = spaces.Box(-1e6, 1e6, (state_dim + goal_dim,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.next_goals = np.full((num_envs, goal_dim), np.nan)
        self.goals, self.steps = np.zeros((num_envs, goal_dim)), np.zeros(num_envs, dtype=np.int64)
        self.seeds, self.episodes = None, np.zeros(num_envs, dtype=np.int64)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        """`options={"goals": goals}` sets `next_goals`."""
        if seed is not None or self.seeds is None:
            seed = [seed + i for i in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
            seed = [None] * self.num_envs if seed is None else seed
            entropy = np.random.SeedSequence().generate_state(self.num_envs, np.uint64).tolist()
            self.seeds = [new if old is None else int(old) for old, new in zip(seed, entropy, strict=True)]
            self.episodes[:] = 0
        if options and "goals" in options:
            self.next_goals[:] = options["goals"]
        self.states = np.repeat(self.first_states(), self.num_envs, axis=0)
        self._begin(np.ones(self.num_envs, dtype=bool))
        return self.observations(), {}

    def _begin(self, chosen: np.ndarray) -> None:
        """The next episode of the chosen environments (num_envs,) bool."""
        self.states[chosen] = self.first_states()
        self.goals[chosen] = self.next_goals[chosen]
        for i in np.flatnonzero(chosen & np.isnan(self.next_goals).any(-1)):
            self.goals[i] = self.draw_goal(np.random.default_rng([self.seeds[i], self.episodes[i]]))
        self.episodes[chosen] += 1
        self.steps[chosen] = 0

    def observations(self) -> np.ndarray:
        """What the environments look like now, (num_envs, S + G)."""
        return np.concatenate((self.observe(), self.goals), axis=1, dtype=np.float32)

    def step(self, actions: np.ndarray):
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions must have the shape {self.action_space.shape}, got {actions.shape}")
        self.advance(actions.clip(-1, 1))
        self.steps += 1
        observations = self.observations()
        distance = np.sqrt(((observations[:, self.places] - self.goals) ** 2).sum(-1))
        reached = distance < self.tolerance
        terminated = reached | self.fallen()
        truncated = (self.steps >= self.max_steps) & ~terminated
        infos = {"distance": distance, "_distance": np.ones(self.num_envs, bool)}
        done = terminated | truncated
        if self.autoreset and np.count_nonzero(done):
            infos |= {"final_obs": observations, "_final_obs": done, "final_info": {}, "_final_info": done.copy()}
            self._begin(done)
            observations = observations.copy()
            observations[done] = np.concatenate((np.tile(self.first_seen, (done.sum(), 1)), self.goals[done]), axis=1)
        return observations, reached.astype(np.float64), terminated, truncated, infos

    @cached_property
    def first_seen(self) -> np.ndarray:
        """The first observation of every episode, without the goal, (S,)."""
        before, self.states = self.states, self.first_states()
        seen, self.states = self.observe()[0], before
        return seen

    def first_states(self) -> np.ndarray:
        """The state in which every episode starts, (1, ...)."""
        raise NotImplementedError

    def advance(self, actions: np.ndarray) -> None:
        """Replaces `self.states` by the next ones."""
        raise NotImplementedError

    def observe(self) -> np.ndarray:
        """The observations without the goals, (num_envs, S)."""
        raise NotImplementedError

    def position(self) -> np.ndarray:
        """What is to come near the goal, (num_envs, G)."""
        return self.observe()[:, self.places]

    def fallen(self) -> np.ndarray:
        """Which episodes end without success, (num_envs,)."""
        return np.zeros(self.num_envs, dtype=bool)

    def draw_goal(self, rng: np.random.Generator) -> np.ndarray:
        """A goal that can be reached, (G,)."""
        while True:
            goal = rng.uniform(LOW, HIGH)
            if is_free(goal):
                return goal


class GoalEnv(gym.Env):
    """One environment of a `GoalVectorEnv`; `reset(options={"goals": goal})` sets the goal of all its episodes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, make: type[GoalVectorEnv], render_mode: str | None = None, **options):
        self.envs, self.render_mode = make(1, **options), render_mode
        self.envs.autoreset = False  # so that the last state of an episode can be rendered
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        observations, _ = self.envs.reset(seed=None if seed is None else [seed], options=options)
        return observations[0], {}

    def step(self, action: np.ndarray):
        observations, rewards, terminated, truncated, infos = self.envs.step(np.asarray(action)[None])
        info = {"distance": float(infos["distance"][0])}
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), info

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
    for x, y in WALLS:
        spec.worldbody.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=[x, y, 0.5],
            size=[BLOCK / 2, BLOCK / 2, 0.5],
            conaffinity=1,
            rgba=[0.25, 0.25, 0.3, 1.0],
        )
    spec.worldbody.add_site(
        name="goal",
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        pos=[0.0, 0.0, 0.01],  # not the world's origin: MuJoCo would take a site there for one that never moves
        size=[0.3, 0.02, 0.0],
        rgba=[0.85, 0.1, 0.1, 1.0],
    )
    spec.worldbody.add_camera(name="above", pos=[2.0, 2.0, 13.0], fovy=48)
    return spec.compile()


class AntUMazeVectorEnv(GoalVectorEnv):
    """Ants in U-mazes. The centre of mass of a torso with its legs has to come within 1 m of the goal.

    Observation (43): positions (15) and velocities (14) of the joints, the torso's rotation matrix (9), the centre of
    mass (3), the goal (2); with `contact_forces` also those on each body, clipped to [-1, 1] (78, before the goal).
    The episode ends when the torso is lower than 0.3 m or higher than 1 m, or after `max_steps` steps of 0.02 s.

    The states of all environments are one array, stepped by MuJoCo in `num_threads` native threads. Every step starts
    the solver afresh, so that the trajectories do not depend on how many environments run side by side.
    """

    places = slice(38, 40)

    def __init__(
        self,
        num_envs: int = 1,
        contact_forces: bool = False,
        num_threads: int | None = None,
        max_steps: int = 500,
        tolerance: float = 1.0,
    ):
        self.model, self.contact_forces = ant_maze(), contact_forces
        size = 41 + contact_forces * 6 * (self.model.nbody - 1)
        super().__init__(num_envs, (size, 8, 2), (LOW, HIGH), max_steps, tolerance)
        num_threads = min(num_envs, num_threads or os.cpu_count() or 1)
        self.pool = Rollout(nthread=num_threads if num_threads > 1 else 0)
        self.data = [mujoco.MjData(self.model) for _ in range(num_threads)]
        self._measure_legs()

    def first_states(self) -> np.ndarray:
        return np.concatenate(([0.0], self.model.numeric("init_qpos").data, np.zeros(14)))[None]  # time, qpos, qvel

    def advance(self, actions: np.ndarray) -> None:
        states, _ = self.pool.rollout(self.model, self.data, self.states, actions[:, None], nstep=1)
        self.states = states[:, 0]

    def observe(self) -> np.ndarray:
        rotation = self._rotations()
        parts = [self.states[:, 1:], rotation.reshape(-1, 9), self._centres_of_mass(rotation)]
        if self.contact_forces:
            parts.append(np.stack([self._contact_forces(state) for state in self.states]).clip(-1, 1))
        return np.concatenate(parts, axis=1)

    def fallen(self) -> np.ndarray:
        height = self.states[:, 3]
        return ~((height >= 0.3) & (height <= 1.0) & np.isfinite(self.states).all(-1))

    def _rotations(self) -> np.ndarray:
        """The torsos' rotation matrices, (num_envs, 3, 3), of unit quaternions."""
        w, x, y, z = self.states[:, 4:8].T
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

    def _centres_of_mass(self, rotations: np.ndarray) -> np.ndarray:
        """(num_envs, 3), by the kinematics of the legs: MuJoCo's own is of the state before the last step."""
        hips, knees = self.states[:, 8:16:2], self.states[:, 9:16:2, None]
        lower = self.along + self.around[0] * np.cos(knees) + self.around[1] * np.sin(knees)  # Rodrigues' formula
        legs, cos, sin = self.upper + lower, np.cos(hips), np.sin(hips)
        x, y, z = legs[..., 0], legs[..., 1], legs[..., 2]
        legs = np.stack(((cos * x - sin * y).sum(1), (sin * x + cos * y).sum(1), z.sum(1)), axis=1)
        offsets = (self.rest + legs) / self.mass
        return self.states[:, 1:4] + (rotations @ offsets[..., None])[..., 0]

    def _contact_forces(self, state: np.ndarray) -> np.ndarray:
        data = self.data[0]
        mujoco.mj_setState(self.model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        data.ctrl[:], data.qacc_warmstart[:] = 0, 0
        mujoco.mj_forward(self.model, data)
        mujoco.mj_rnePostConstraint(self.model, data)
        return data.cfrc_ext[1:].flatten()

    def feasible_states(self, count: int, rng: np.random.Generator, steps: int = 100) -> np.ndarray:
        """`count` states (count, 30) of ants that stand: after `steps` Brownian actions from the standing pose, kept if
        the ant has not fallen and would not fall within as many steps without any action (facts of Florensa et al.,
        2017). Their positions are near the start; `decode` takes them elsewhere."""
        found = []
        before = getattr(self, "states", None)
        while sum(map(len, found)) < count:
            self.states = np.repeat(self.first_states(), self.num_envs, axis=0)
            alive, actions = np.ones(self.num_envs, dtype=bool), np.zeros((self.num_envs, 8))
            for step in range(2 * steps):
                if step == steps:
                    kept = self.states.copy()
                actions = (actions + rng.normal(0, 0.3, actions.shape)).clip(-1, 1) if step < steps else 0 * actions
                self.advance(actions)
                alive &= ~self.fallen()
            found.append(kept[alive])
        self.states = before
        return np.concatenate(found)[:count]

    def decode(self, goals: np.ndarray, poses: np.ndarray) -> np.ndarray:
        """D: g -> s, observations (n, S) of ants in poses (n, 30) with their centres of mass at the goals (n, 2)."""
        before, self.states = getattr(self, "states", None), poses.copy()
        self.states[:, 1:3] += goals - self.position()
        seen, self.states = self.observe(), before
        return seen

    def image(self, width: int = 240, height: int = 240) -> np.ndarray:
        """The first maze from above, (height, width, 3) uint8."""
        if not hasattr(self, "renderer"):
            self.renderer = MujocoRenderer(self.model, self.data[0], width=width, height=height, camera_name="above")
        data = self.data[0]
        mujoco.mj_setState(self.model, data, self.states[0], mujoco.mjtState.mjSTATE_FULLPHYSICS)
        self.model.site("goal").pos[:2] = self.goals[0]
        mujoco.mj_forward(self.model, data)
        return self.renderer.render("rgb_array")

    def close_extras(self, **_: Any) -> None:
        self.pool.close()
        if hasattr(self, "renderer"):
            self.renderer.close()


class AntUMazeEnv(GoalEnv):
    def __init__(self, render_mode: str | None = None, **options):
        super().__init__(AntUMazeVectorEnv, render_mode, **options)


# ------------------------------------------------------------------------------------------------------ point mass


class PointUMazeVectorEnv(GoalVectorEnv):
    """Points in U-mazes, which have to come within 0.3 m of the goal.

    Observation (6): position (2), velocity (2), goal (2). Actions are forces of up to 2 N in each direction, held for
    0.02 s, on a mass of 0.42 kg, a sphere of 0.1 m with rllab's density of 100 kg/m^3; nothing slows a point down but
    walls, along which it slides. `max_steps` steps truncate the episode.
    """

    ACCELERATION = 2 / (100 * 4 / 3 * np.pi * 0.1**3)  # the largest, 4.8 m/s^2

    def __init__(self, num_envs: int = 1, max_steps: int = 200, tolerance: float = 0.3):
        super().__init__(num_envs, (4, 2, 2), (LOW, HIGH), max_steps, tolerance)

    def first_states(self) -> np.ndarray:
        return np.zeros((1, 4))

    def advance(self, actions: np.ndarray) -> None:
        change, dt = self.ACCELERATION * 0.02 * actions, 0.02
        position, velocity = self.states[:, :2].copy(), self.states[:, 2:] + change
        moved = position + dt * (velocity - 0.5 * change)  # what RK4 gives, exactly
        for axis in range(2):  # one after the other, so that a point slides along a wall
            before = position[:, axis].copy()
            position[:, axis] = moved[:, axis]
            blocked = ~is_free(position)
            position[blocked, axis], velocity[blocked, axis] = before[blocked], 0
        self.states = np.concatenate((position, velocity), axis=1)

    def observe(self) -> np.ndarray:
        return self.states

    def image(self, pixels: int = 24) -> np.ndarray:
        """The first maze from above, (10 * pixels, 10 * pixels, 3) uint8: red goal, blue point."""
        centres = LOW[0] + (np.arange(10 * pixels) + 0.5) / pixels
        here = np.stack(np.meshgrid(centres, centres[::-1]), axis=-1)
        image = np.where(is_free(here)[..., None], 250, 120).repeat(3, axis=-1).astype(np.uint8)
        for centre, radius, colour in ((self.goals[0], 0.3, (213, 30, 30)), (self.states[0, :2], 0.15, (30, 60, 200))):
            image[((here - centre) ** 2).sum(-1) < radius**2] = colour
        return image


class PointUMazeEnv(GoalEnv):
    def __init__(self, render_mode: str | None = None, **options):
        super().__init__(PointUMazeVectorEnv, render_mode, **options)


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
