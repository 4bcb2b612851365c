"""A point mass in a narrow box of many dimensions (Held et al., 2018; Recall Traces, 6.3).

Goals are wanted in all of [-5, 5]^N, but only a thin part of that can be reached: |x_1| <= 1, |x_2| <= 5, and 0.3 in
every further dimension. So the more dimensions, the smaller the share of goals that is worth trying.
"""

import numpy as np

from envs.u_maze import GoalEnv, GoalVectorEnv


def feasible_box(dims: int) -> np.ndarray:
    """The largest coordinates that can be reached, (dims,)."""
    return np.array([1.0, 5.0, *[0.3] * (dims - 2)])


class PointMassVectorEnv(GoalVectorEnv):
    """Points of unit mass with `dims` dimensions, which have to come within 0.3 sqrt(dims / 2) m of the goal.

    Observation (3 * dims): position, velocity, goal. Actions are accelerations of up to 2 m/s^2 in each direction, held
    for 0.02 s; velocities are clipped to 5 m/s, positions to the box. `max_steps` steps truncate the episode.
    """

    def __init__(self, num_envs: int = 1, dims: int = 2, max_steps: int = 200):
        if not 2 <= dims <= 6:
            raise ValueError(f"dims must be from 2 to 6, got {dims}")
        super().__init__(num_envs, (2 * dims, dims, dims), (-5.0, 5.0), max_steps, 0.3 * np.sqrt(dims / 2))
        self.places = slice(0, dims)
        self.box = feasible_box(dims)

    def first_states(self) -> np.ndarray:
        return np.zeros((1, 2 * self.goal_dim))

    def advance(self, actions: np.ndarray) -> None:
        position, velocity = np.split(self.states, 2, axis=1)
        velocity = (velocity + 0.02 * 2.0 * actions).clip(-5, 5)
        self.states = np.concatenate(((position + 0.02 * velocity).clip(-self.box, self.box), velocity), axis=1)

    def observe(self) -> np.ndarray:
        return self.states

    def draw_goal(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-self.box, self.box)

    def image(self, pixels: int = 24) -> np.ndarray:
        """The first two dimensions of the first box, (10 * pixels, 10 * pixels, 3) uint8: red goal, blue point."""
        centres = -5 + (np.arange(10 * pixels) + 0.5) / pixels
        here = np.stack(np.meshgrid(centres, centres[::-1]), axis=-1)
        inside = (np.abs(here) <= self.box[:2]).all(-1)
        image = np.where(inside[..., None], 250, 120).repeat(3, axis=-1).astype(np.uint8)
        for centre, radius, colour in ((self.goals[0], 0.3, (213, 30, 30)), (self.states[0], 0.15, (30, 60, 200))):
            image[((here - centre[:2]) ** 2).sum(-1) < radius**2] = colour
        return image


class PointMassEnv(GoalEnv):
    def __init__(self, render_mode: str | None = None, **options):
        super().__init__(PointMassVectorEnv, render_mode, **options)
