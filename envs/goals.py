"""Environments with goals: many stepped as arrays, one for `gym.make`, and anybody's as vectors of state and goal."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

AS_ARRAYS = ("AntUMaze-v0", "PointUMaze-v0", "PointMass-v0")  # the environments here, which are stepped all at once


class GoalVectorEnv(VectorEnv):
    """n = `num_envs` environments with a goal each, stepped as arrays.

    Observations (n, S + G) are those of the states, then the goals; actions (n, A) are clipped to [-1, 1]. Within
    `tolerance` of the goal the reward is 1, and the episode ends; every other step has a reward of 0. There is no
    autoreset: an environment whose episode has ended stands still until it is reset. `options` of `reset` may hold the
    goals of the new episodes, "goals" (n, G), and which environments are reset, "reset_mask" (n,). Nothing is random
    but the goals that are drawn where none are given.

    `places` are the columns of an observation that have to come near the goal; goals may be wanted in all `goal_space`.
    A subclass says how states (n, ...) advance and are observed, and draws goals that can be reached.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}
    places = slice(0, 2)

    def __init__(self, first_state: np.ndarray, sizes, goals_between, num_envs: int, max_episode_steps, tolerance):
        state_dim, action_dim, goal_dim = sizes
        self.goal_space = spaces.Box(*(np.broadcast_to(np.float32(side), goal_dim) for side in goals_between))
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
        if going.any():
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
        """The states after these, (n, ...)."""
        raise NotImplementedError

    def observe(self, states: np.ndarray) -> np.ndarray:
        """The observations of states, without the goals, (n, S)."""
        return states

    def fallen(self, states: np.ndarray) -> np.ndarray:
        """In which states an episode ends without success, (n,)."""
        return np.zeros(len(states), dtype=bool)

    def draw_goals(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Goals that can be reached, (count, G)."""
        raise NotImplementedError

    def is_free(self, positions: np.ndarray) -> np.ndarray:
        """Which positions (..., 2) a point can have, for pictures."""
        raise NotImplementedError

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
    `reset(options={"goals": goal})` sets the goal. The time limit is that of gym.make.
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


class GoalWrapper(gym.Wrapper):
    """Any environment with a Dict of observation, achieved_goal and desired_goal, as one with vectors (S + G,).

    State: the observation, then the achieved goal, unless the environment says in which `places` of the observation it
    is. Goal: `options["goals"][index]` of `reset`, or the environment's own. Reward: 1 at the goal, where the episode
    ends. Actions are from -1 to 1.
    """

    def __init__(self, env: gym.Env, index: int = 0):
        super().__init__(env)
        space, bounds, names = env.observation_space, env.action_space, ("observation", "achieved_goal", "desired_goal")
        has_goals = isinstance(space, spaces.Dict) and {*names} <= space.keys()
        bounded = isinstance(bounds, spaces.Box) and np.isfinite(bounds.high - bounds.low).all()
        if not (has_goals and bounded and hasattr(env.unwrapped, "compute_reward")):
            raise ValueError(
                f"it needs a Dict of {', '.join(names)}, compute_reward, and bounded actions, not {bounds}"
            )
        self.index, self.knows_places = index, hasattr(env.unwrapped, "places")
        self.parts = ("observation",) if self.knows_places else ("observation", "achieved_goal")
        self.state_dim, self.goal_dim = sum(len(space[n].low) for n in self.parts), len(space["desired_goal"].low)
        appended = slice(self.state_dim - self.goal_dim, self.state_dim)
        self.places = env.unwrapped.places if self.knows_places else appended
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.state_dim + self.goal_dim,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, bounds.shape, np.float32)

    def _vector(self, observed: dict) -> np.ndarray:
        return np.concatenate([*(observed[name] for name in self.parts), self.goal], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observed, info = self.env.reset(seed=seed, options=options)
        self.goal = np.array(options["goals"][self.index] if options else observed["desired_goal"])
        return self._vector(observed), info

    def step(self, action: np.ndarray):
        low, high = self.env.action_space.low, self.env.action_space.high
        action = (low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)).clip(low, high)  # as rescaling rounds
        observed, _, terminated, truncated, info = self.env.step(action.astype(self.env.action_space.dtype))
        success = bool(self.reached(observed["achieved_goal"], self.goal))
        return self._vector(observed), float(success), terminated or success, truncated, info

    def reached(self, places: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Which places (n, G) are at their goals (n, G): they get the reward that the goal itself would get."""
        compute_reward = self.env.unwrapped.compute_reward
        return compute_reward(places, goals, {}) >= compute_reward(goals, goals, {})

    def own_goals(self, count: int) -> np.ndarray:
        """Goals (count, G) that the environment itself sets."""
        return np.stack([self.reset(seed=i)[0][-self.goal_dim :] for i in range(count)])

    def goal_box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest coordinates of goals, (G,): as the environment says, or of goals that it sets."""
        if self.knows_places:
            return self.env.unwrapped.goal_space.low, self.env.unwrapped.goal_space.high
        goals = self.own_goals(300)
        return goals.min(axis=0), goals.max(axis=0)


class GoalEnvs(VectorEnv):
    """Environments of others, stepped one after another, and reset and standing still as in a `GoalVectorEnv`."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, envs: list[GoalWrapper]):
        self.envs, self.num_envs = envs, len(envs)
        self.action_space = batch_space(envs[0].action_space, self.num_envs)
        self.last = [()] * self.num_envs  # (state, reward, terminated, truncated) of each environment

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        for i in np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs))):
            state, _ = self.envs[i].reset(seed=None if seed is None else seed + int(i), options=options)
            self.last[i] = state, 0.0, False, False
        return np.array([state for state, *_ in self.last]), {}

    def step(self, actions: np.ndarray):
        for i, (_, _, terminated, truncated) in enumerate(self.last):
            if not (terminated or truncated):
                self.last[i] = self.envs[i].step(actions[i])[:4]
        return (*map(np.array, zip(*self.last, strict=True)), {})


def make_goal_env(env_id: str, options: dict, index: int = 0) -> GoalWrapper:
    """One environment, with those options that are given; see `GoalWrapper`."""
    options = {name: value for name, value in options.items() if value}
    return GoalWrapper(gym.make(env_id, disable_env_checker=True, **options), index)


def make_goal_envs(env_id: str, num_envs: int, options: dict) -> VectorEnv:
    """Many environments: all stepped at once if they are from here, otherwise one after another."""
    if env_id not in AS_ARRAYS:
        return GoalEnvs([make_goal_env(env_id, options, i) for i in range(num_envs)])
    options = {name: value for name, value in options.items() if value}
    return gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **options)
