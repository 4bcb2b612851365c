"""A point mass in a narrow box of many dimensions (Held et al., 2018; Recall Traces, 6.3).

Goals are wanted in all of [-5, 5]^N, but only a thin part of that can be reached: |x_1| <= 1, |x_2| <= 5, and 0.3 in
every further dimension. So the more dimensions, the smaller the share of goals that is worth trying.
"""

import numpy as np

from envs.goals import GoalEnv, GoalVectorEnv


class PointMassVectorEnv(GoalVectorEnv):
    """Points of unit mass with `dims` dimensions, which have to come within 0.3 sqrt(dims / 2) m of the goal.

    Observation (3 * dims): position, velocity, goal. Actions are accelerations of up to 2 m/s^2 in each direction, held
    for 0.02 s; velocities are clipped to 5 m/s, positions to the box. An episode has at most 200 steps.
    """

    def __init__(self, num_envs: int = 1, max_episode_steps=200, dims: int = 2):
        if not 2 <= dims <= 6:
            raise ValueError(f"dims must be from 2 to 6, got {dims}")
        sizes, tolerance = (2 * dims, dims, dims), 0.3 * np.sqrt(dims / 2)
        super().__init__(np.zeros(2 * dims), sizes, (-5.0, 5.0), num_envs, max_episode_steps, tolerance)
        self.places = slice(0, dims)
        self.box = np.array([1.0, 5.0, *[0.3] * (dims - 2)])  # the largest coordinates that can be reached

    def advance(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        position, velocity = np.split(states, 2, axis=1)
        velocity = (velocity + 0.02 * 2.0 * actions).clip(-5, 5)
        return np.concatenate(((position + 0.02 * velocity).clip(-self.box, self.box), velocity), axis=1)

    def draw_goals(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-self.box, self.box, (count, len(self.box)))

    def is_free(self, positions: np.ndarray) -> np.ndarray:
        return (np.abs(positions) <= self.box[:2]).all(-1)


class PointMassEnv(GoalEnv):
    vector_env = PointMassVectorEnv
