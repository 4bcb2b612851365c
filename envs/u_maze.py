"""U-mazes with an ant and with a point mass, and goals anywhere in them (Held et al., 2018; Recall Traces, 6.3).

    #####   Five by five blocks of 2 m; x points right, y down (in pictures, up). An episode starts at S, (0, 0). Goals
    #S..#   are drawn from the seven free blocks, or are those that `reset` is given, even in walls. What observations,
    ###.#   rewards and resets are is in envs/goals.py. Coverage is measured on the grid `coverage_goals`, and drawn by
    #...#   `draw_coverage`.
    #####

`AntUMaze-v0`: Gymnasium's ant in a maze whose walls and time step are set here, stepped by MuJoCo in native threads.
`PointUMaze-v0`: a point with velocity and acceleration, which slides along walls.
"""

import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from mujoco.rollout import Rollout

from envs.goals import GoalEnv, GoalVectorEnv

LAYOUT = ("#####", "#S..#", "###.#", "#...#", "#####")
BLOCK = 2.0  # metres
LOW, HIGH = np.array([-3.0, -3.0]), np.array([7.0, 7.0])  # the outer square
_BLOCKS = np.array([[symbol != "#" for symbol in row] for row in LAYOUT])  # [row, column], True where free
_PADDED = np.pad(_BLOCKS, 1)
_CENTRES = BLOCK * (np.indices(_BLOCKS.shape)[::-1].T - 1.0).transpose(1, 0, 2)  # [row, column] -> (x, y)
FREE, WALLS = _CENTRES[_BLOCKS], _CENTRES[~_BLOCKS]  # centres of the 7 free blocks and of the 18 walls, (n, 2)


def is_free(positions: np.ndarray) -> np.ndarray:
    """Which positions (..., 2) lie in a free block of the maze, (...)."""
    blocks = np.floor((np.moveaxis(positions, -1, 0) - LOW[0]) / BLOCK)
    columns, rows = np.fmax(np.fmin(blocks, 5), -1).astype(int)  # nan is in no free block
    return _PADDED[rows + 1, columns + 1]


def coverage_goals() -> np.ndarray:
    """16 goals for each free block, half a metre apart, (112, 2) (Held et al., 2018)."""
    offsets = np.array([-0.75, -0.25, 0.25, 0.75])
    grid = np.stack(np.meshgrid(offsets, offsets), axis=-1).reshape(-1, 2)
    return (FREE[:, None] + grid).reshape(-1, 2)


class UMazeVectorEnv(GoalVectorEnv):
    """What both mazes have: goals may be wanted in the outer square, and can be reached in the free blocks."""

    def draw_goals(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return FREE[rng.integers(len(FREE), size=count)] + rng.uniform(-BLOCK / 2, BLOCK / 2, (count, 2))

    def is_free(self, positions: np.ndarray) -> np.ndarray:
        return is_free(positions)


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


class AntUMazeVectorEnv(UMazeVectorEnv):
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

    def standing_ants(self, count: int, seed: int, steps: int = 100) -> np.ndarray:
        """`count` states (count, 30) of ants that stand: after `steps` Brownian actions from the first state, kept if
        the ant has not fallen and would not fall within as many steps without any action (facts of Florensa et al.,
        2017). Their positions are near the start."""
        found, rng = np.zeros((0, 30)), np.random.default_rng(seed)
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
class PointUMazeVectorEnv(UMazeVectorEnv):
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
