# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium==1.4.0",
#     "imageio==2.38.1",
#     "matplotlib==3.11.2",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "pillow==13.0.0",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Trust region policy optimization with recall traces (Goyal et al., ICLR 2019, sections 6.4, B, C, E.1 and G).

A backtracking model imagines, from the states that earned most, which (state, action) pairs may have led there; the
policy imitates these recall traces. This file is all there is, and `--recall none` is a plain TRPO to read and copy.

    python recall_trpo.py --capture-video                     # HalfCheetah-v5
    python recall_trpo.py --recall none                       # plain trust region policy optimization
    python recall_trpo.py --evaluate RUN_DIR                  # play the trained agent

A run of 500 000 steps takes two to four minutes on one core. Plain, it reaches returns of about 2 600 on HalfCheetah-v5
and 3 000 on Hopper-v5; no gain of recall traces is certain, see docs/recall_trpo.md.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1
    """seed of networks, environments and all sampling"""
    total_timesteps: int | None = None
    """environment steps in all, over all environments (500 000 if not given); may grow with --resume"""
    run_dir: Path | None = None
    """folder of this run; runs/<env>__<script>__<recall>__seed<seed>__<time> if not given"""
    resume: Path | None = None
    """go on with the interrupted run in this folder, with its own arguments"""
    evaluate: Path | None = None
    """play --eval-episodes episodes with the agent in this folder and print their returns"""
    eval_every: int = 20_000
    """environment steps between evaluations of the greedy policy"""
    eval_episodes: int = 10
    """episodes per evaluation, each time from the same starts"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints"""
    capture_video: bool = False
    """write a GIF of the greedy agent, at the end of training or with --evaluate"""
    device: str = "cpu"
    """torch device of the networks"""
    torch_threads: int = 1
    """CPU threads of torch"""

    # environment
    env_id: str = "HalfCheetah-v5"
    """Gymnasium id of an environment with a vector of observations, a bounded vector of actions and a time limit"""
    num_envs: int = 8
    """environments stepped side by side"""
    contact_forces: bool = True
    """whether the observations of Ant and Humanoid hold the contact forces, 78 of Ant's 105 numbers"""

    # trust region policy optimization
    num_steps: int = 256
    """steps of each environment per iteration"""
    hidden: int = 64
    """units in each of the two hidden layers of actor and critic"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """decay of generalized advantage estimation"""
    max_kl: float = 0.01
    """trust region: largest mean KL divergence between the policies before and after a natural gradient step"""
    cg_iterations: int = 10
    """iterations of conjugate gradients per natural gradient"""
    cg_damping: float = 0.1
    """added to the diagonal of the Fisher matrix"""
    line_search_steps: int = 10
    """lengths of a step that the line search tries, each a fifth shorter, before it gives up"""
    critic_lr: float = 1e-3
    """step size of Adam for the critic"""
    critic_epochs: int = 10
    """passes of the critic over each batch"""
    critic_batch_size: int = 256
    """states per update of the critic"""

    # recall traces
    recall: Literal["none", "random", "learned", "forward"] = "learned"
    """none: plain TRPO; learned: with a backtracking model (Eq. 2); random: an untrained one (App. F); forward: with a
    forward model and the experience that it imagines (App. G)"""
    start_states: Literal["return", "reward"] = "return"
    """which states are valuable: those with a high return-to-go, or those that received a high reward (E.1)"""
    num_traces: int = 64
    """recall traces per imitation update, each from a state of its own (so the paper's N, traces per state, is 1)"""
    trace_length: int | None = None
    """longest trace in steps; if not given, 10 for Hopper, 50 for Ant and Humanoid and 20 for others (Tables 1, 2)"""
    recall_every: int = 2
    """iterations per recall phase (App. C: 5)"""
    recall_updates: int = 5
    """imitation updates per recall phase, each with new traces"""
    recall_until: float = 0.1
    """share of --total-timesteps after which no more traces are imitated"""
    buffer_size: int = 50_000
    """environment steps whose trajectories the buffer holds, the newest"""
    top_trajectories: int = 20
    """k_traj, how many of these trajectories are used, those of highest return"""
    top_fraction: float = 0.25
    """k, share of their tuples that the backtracking model learns from, those with the most valuable next state"""
    backtracking_updates: int = 100
    """backtracking model updates per recall phase (App. C)"""
    backtracking_batch_size: int = 128
    """(state, action, next state) tuples per backtracking model update"""
    backtracking_lr: float = 1e-3
    """step size of Adam for the backtracking model (beta in Alg. 1)"""
    imitation_lr: float = 3e-4
    """step size of Adam for the imitation of traces"""
    imitation_kl: float = 0.01
    """largest mean KL divergence between the policies before and after a recall phase"""
    action_noise: float = 1.0
    """standard deviation of imagined actions as a share of the model's own"""
    state_noise: float = 0.5
    """standard deviation of imagined changes of state as a share of the model's own (the paper: 1)"""
    trace_limit: float = 5.0
    """a trace ends where a number of its state is further from the mean of the data, in standard deviations"""


# ------------------------------------------------------------------------------------------------------ networks


def mlp(inputs: int, hidden: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """Two hidden layers."""
    layers = [nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Normaliser(nn.Module):
    """Running mean and standard deviation of all that was added; brings what it is given to mean 0 and variance 1."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def add(self, values: torch.Tensor) -> None:
        """Adds values (n, size), by the parallel algorithm of Chan et al. (1979)."""
        share = len(values) / (self.count + len(values))
        change, var = values.mean(0) - self.mean, values.var(0, unbiased=False)
        old_var = self.std**2 if self.count else 0.0
        self.std.copy_(((1 - share) * old_var + share * var + share * (1 - share) * change**2).sqrt().clamp(min=1e-4))
        self.mean.copy_(self.mean + share * change)
        self.count += len(values)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return ((values - self.mean) / self.std).clamp(-10, 10)


class Actor(nn.Module):
    """pi_theta(a | s), a Gaussian: from states (B, S) to its mean (B, A) and its log std (A,), alike in all."""

    def __init__(self, normaliser: Normaliser, state_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        self.normaliser, self.net = normaliser, mlp(state_dim, hidden, action_dim, nn.Tanh)
        self.net[-1].weight.data.mul_(0.01)  # the first policy is nearly the same in all states

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net(self.normaliser(states)), self.log_std

    def log_prob(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """log pi(a | s), (B,)."""
        mean, log_std = self(states)
        noise = (actions - mean) / log_std.exp()
        return -(0.5 * noise**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def log_prob_of_clipped(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """log pi of actions as they are carried out, (B,): one at its bound stands for all draws beyond it."""
        mean, log_std = self(states)
        std = log_std.exp()
        inside = -(0.5 * ((actions - mean) / std) ** 2 + log_std + 0.5 * math.log(2 * math.pi))
        beyond = torch.special.log_ndtr((actions.sign() * mean - 1) / std)
        return torch.where(actions.abs() < 1, inside, beyond).sum(-1)


class Critic(nn.Module):
    """V(s), from states (B, S) to (B,). The network itself gives values of mean 0 and variance 1."""

    def __init__(self, normaliser: Normaliser, state_dim: int, hidden: int):
        super().__init__()
        self.normaliser, self.net = normaliser, mlp(state_dim, hidden, 1, nn.Tanh)
        self.scale = Normaliser(1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (self.net(self.normaliser(states)) * self.scale.std + self.scale.mean).squeeze(-1)

    @torch.no_grad()
    def rescale(self, returns: torch.Tensor) -> None:
        """Adds returns (n,) to the statistics; V stays what it was (PopArt, van Hasselt et al., 2016)."""
        mean, std, last = self.scale.mean.clone(), self.scale.std.clone(), self.net[-1]
        self.scale.add(returns.unsqueeze(-1))
        last.weight.mul_(std / self.scale.std)
        last.bias.mul_(std).add_(mean - self.scale.mean).div_(self.scale.std)


class BacktrackingModel(nn.Module):
    """q_phi(ds_t, a_t | s_{t+1}) = q(a_t | s_{t+1}) q(ds_t | a_t, s_{t+1}), ds_t = s_t - s_{t+1}, Eq. (1).

    Both are Gaussians over normalised quantities (App. C): actions with variance 1, changes of state with a learned
    variance. The statistics that normalise are part of the model. States are (B, S), actions (B, A).
    """

    def __init__(self, state_dim: int, action_dim: int, hidden: int = 128):
        super().__init__()
        self.action_predictor = mlp(state_dim, hidden, action_dim, nn.Tanh)
        self.state_predictor = mlp(state_dim + action_dim, hidden, 2 * state_dim, nn.ReLU)
        for name, size in (("state", state_dim), ("action", action_dim), ("change", state_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def normalise_by(self, tuples: "Tuples") -> None:
        """Takes the statistics of these tuples."""
        changes = tuples.states - tuples.next_states
        for name, values in (("state", tuples.next_states), ("action", tuples.actions), ("change", changes)):
            std, unchanged = values.std(0), 1e-6 if name == "change" else 1  # what never changes stays so in traces
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-6, std, unchanged))

    def predict_action(self, next_states: torch.Tensor) -> torch.Tensor:
        """Mean of q(a_t | s_{t+1}), normalised, (B, A); its variance is 1."""
        return self.action_predictor((next_states - self.state_mean) / self.state_std)

    def predict_change(self, actions: torch.Tensor, next_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of q(ds_t | a_t, s_{t+1}), normalised, (B, S) each."""
        actions = (actions - self.action_mean) / self.action_std
        next_states = (next_states - self.state_mean) / self.state_std
        mean, log_std = self.state_predictor(torch.cat((next_states, actions), dim=-1)).chunk(2, dim=-1)
        return mean, -5 + F.softplus(6 - F.softplus(1 - log_std))  # smoothly bounded: from -5 to about 1

    def log_prob(self, states, actions, next_states) -> tuple[torch.Tensor, torch.Tensor]:
        """log q(a_t | s_{t+1}) and log q(ds_t | a_t, s_{t+1}) of normalised actions and changes, (B,) each."""
        action = (actions - self.action_mean) / self.action_std
        change = (states - next_states - self.change_mean) / self.change_std
        action_mean, (mean, log_std) = self.predict_action(next_states), self.predict_change(actions, next_states)
        of_actions = -0.5 * ((action - action_mean) ** 2 + math.log(2 * math.pi))
        of_changes = -0.5 * (((change - mean) / log_std.exp()) ** 2 + math.log(2 * math.pi)) - log_std
        # Eq. (1)
        return of_actions.sum(-1), of_changes.sum(-1)

    def sample(self, next_states, action_noise, state_noise) -> tuple[torch.Tensor, torch.Tensor]:
        """States and actions from -1 to 1 before `next_states`, made of normal noise (B, A) and (B, S)."""
        actions = self.action_mean + self.action_std * (self.predict_action(next_states) + action_noise)
        actions = actions.clamp(-1, 1)
        mean, log_std = self.predict_change(actions, next_states)
        changes = self.change_mean + self.change_std * (mean + log_std.exp() * state_noise)
        return next_states + changes, actions


class ForwardModel(nn.Module):
    """p(ds_t, r_t | s_t, a_t), ds_t = s_{t+1} - s_t: the state predictor's twin that looks ahead (App. G)."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int = 128):
        super().__init__()
        self.net = mlp(state_dim + action_dim, hidden, 2 * (state_dim + 1), nn.ReLU)
        for name, size in (("state", state_dim), ("action", action_dim), ("outcome", state_dim + 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def normalise_by(self, tuples: "Tuples") -> None:
        """Takes the statistics of these tuples."""
        for name, values in (("state", tuples.states), ("action", tuples.actions), ("outcome", self.outcomes(tuples))):
            std, unchanged = values.std(0), 1e-6 if name == "outcome" else 1  # what never changes stays so
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-6, std, unchanged))

    @staticmethod
    def outcomes(tuples: "Tuples") -> torch.Tensor:
        """Changes of state and rewards, (B, S + 1)."""
        return torch.cat((tuples.next_states - tuples.states, tuples.rewards.unsqueeze(-1)), dim=-1)

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of the normalised outcome, (B, S + 1) each."""
        actions = (actions - self.action_mean) / self.action_std
        states = (states - self.state_mean) / self.state_std
        mean, log_std = self.net(torch.cat((states, actions), dim=-1)).chunk(2, dim=-1)
        return mean, -5 + F.softplus(6 - F.softplus(1 - log_std))  # as in the backtracking model

    def log_prob(self, tuples: "Tuples") -> torch.Tensor:
        """log p of the normalised outcomes, (B,)."""
        outcome = (self.outcomes(tuples) - self.outcome_mean) / self.outcome_std
        mean, log_std = self(tuples.states, tuples.actions)
        return (-0.5 * (((outcome - mean) / log_std.exp()) ** 2 + math.log(2 * math.pi)) - log_std).sum(-1)

    def sample(self, states, actions, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """Next states (B, S) and rewards (B,), made of normal noise (B, S + 1)."""
        mean, log_std = self(states, actions)
        outcomes = self.outcome_mean + self.outcome_std * (mean + log_std.exp() * noise)
        return states + outcomes[:, :-1], outcomes[:, -1]


def as_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def normal(rng: np.random.Generator, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return as_tensor(rng.standard_normal(shape, dtype=np.float32), device)


# ------------------------------------------------------------------------------------------------------ experience


class Rollout(NamedTuple):
    """What `num_steps` steps of all environments gave, arrays (num_steps, num_envs, ...)."""

    states: np.ndarray
    actions: np.ndarray  # as the policy drew them; the environments clip them to [-1, 1]
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    next_states: np.ndarray  # the last state of an episode, not the first of the next


class Tuples(NamedTuple):
    """Tuples of trajectories: arrays or tensors (B, ...)."""

    states: np.ndarray
    actions: np.ndarray  # from -1 to 1
    rewards: np.ndarray
    next_states: np.ndarray
    values: np.ndarray  # of the next states
    times: np.ndarray  # steps since the episode's start


class Episodes:
    """The environments, with an episode under way in each.

    Every episode has a seed of its own. So the actions since its start are all that a checkpoint needs to know of the
    simulator: `load_state_dict` plays them again.
    """

    def __init__(self, envs: list[gym.Env], seed: int):
        self.envs, self.seed = envs, seed
        self.number = [0] * len(envs)  # of the episode under way in each environment
        self.actions: list[list[np.ndarray]] = [[] for _ in envs]
        self.total_reward = [0.0] * len(envs)
        self.states = np.stack([self.reset(i) for i in range(len(envs))])

    def reset(self, i: int) -> np.ndarray:
        seed = np.random.SeedSequence([self.seed, i, self.number[i]]).generate_state(1)[0]
        state, _ = self.envs[i].reset(seed=int(seed))
        self.actions[i], self.total_reward[i] = [], 0.0
        return state.astype(np.float32)

    def step(self, i: int, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """One step of environment i: next state, reward, terminated, truncated. `next_episode` follows the last."""
        self.actions[i].append(action)
        next_state, reward, terminated, truncated, _ = self.envs[i].step(action)
        self.total_reward[i] += float(reward)
        self.states[i] = next_state
        return self.states[i].copy(), float(reward), bool(terminated), bool(truncated)

    def next_episode(self, i: int) -> tuple[float, int]:
        """Starts the next episode in environment i; returns the return and the length of the last."""
        ended = self.total_reward[i], len(self.actions[i])
        self.number[i] += 1
        self.states[i] = self.reset(i)
        return ended

    def state_dict(self) -> dict:
        actions = [torch.from_numpy(np.array(actions)) for actions in self.actions]
        return {"number": self.number.copy(), "actions": actions, "states": torch.from_numpy(self.states.copy())}

    def load_state_dict(self, state: dict) -> None:
        self.number = state["number"].copy()
        for i, actions in enumerate(state["actions"]):
            self.states[i] = self.reset(i)
            for action in actions.numpy():
                self.step(i, action)
        if not np.array_equal(self.states, state["states"].numpy()):
            raise ValueError("the environment did something else than it did before")


class TrajectoryBuffer:
    """B: the trajectories of the last `capacity` steps whose episodes have ended, and the episodes under way.

    Every tenth trajectory is held out: the backtracking model never sees it, so that it can be tested on it.
    """

    def __init__(self, capacity: int, num_envs: int, start_states: str, gamma: float):
        self.capacity, self.start_states, self.gamma = capacity, start_states, gamma
        self.trajectories: list[tuple[float, bool, Tuples]] = []  # (return, held out, tuples), oldest first
        self.number = 0  # of trajectories so far
        self.under_way: list[list[Rollout]] = [[] for _ in range(num_envs)]

    def add(self, rollout: Rollout) -> None:
        for i, parts in enumerate(self.under_way):
            own = Rollout(*(column[:, i] for column in rollout))
            start = 0
            for end in (np.flatnonzero(own.terminated | own.truncated) + 1).tolist():
                parts.append(Rollout(*(column[start:end] for column in own)))
                tuples = self._tuples(Rollout(*map(np.concatenate, zip(*parts, strict=True))))
                parts.clear()
                start = end
                self.trajectories.append((float(tuples.rewards.sum()), self.number % 10 == 9, tuples))
                self.number += 1
            if start < len(own.rewards):
                parts.append(Rollout(*(column[start:] for column in own)))
        steps = sum(len(tuples.rewards) for _, _, tuples in self.trajectories)
        while len(self.trajectories) > 1 and steps > self.capacity:
            steps -= len(self.trajectories.pop(0)[2].rewards)

    def _tuples(self, episode: Rollout) -> Tuples:
        """The tuples of an episode. No trace may start in a terminal state: its value is -inf."""
        values = episode.rewards.copy()
        if self.start_states == "return":
            # What a time limit cuts off: for as many steps again, it is taken to give what the episode gave on average.
            goes_on = (self.gamma ** np.arange(len(values))).sum()
            values[-1] = 0.0 if episode.terminated[-1] else goes_on * episode.rewards.mean()
            for t in reversed(range(len(values) - 1)):
                values[t] = episode.rewards[t + 1] + self.gamma * values[t + 1]
        values[episode.terminated] = -np.inf
        actions, times = episode.actions.clip(-1, 1), np.arange(len(values))
        return Tuples(episode.states, actions, episode.rewards, episode.next_states, values, times)

    def state_dict(self) -> dict:
        columns = zip(*(tuples for *_, tuples in self.trajectories), strict=True)
        under_way = [zip(*parts, strict=True) for parts in self.under_way]
        return {
            "columns": [as_tensor(np.concatenate(column), "cpu") for column in columns],
            "lengths": [len(tuples.rewards) for *_, tuples in self.trajectories],
            "number": self.number,
            "under_way": [[as_tensor(np.concatenate(column), "cpu") for column in columns] for columns in under_way],
        }

    def load_state_dict(self, state: dict) -> None:
        ends, first = np.cumsum(state["lengths"], dtype=int), state["number"] - len(state["lengths"])
        columns = [np.split(column.numpy(), ends[:-1]) for column in state["columns"]]
        self.trajectories = [
            (float(tuples.rewards.sum()), (first + i) % 10 == 9, tuples)
            for i, tuples in enumerate(Tuples(*part) for part in zip(*columns, strict=True))
        ]
        self.under_way = [[Rollout(*(x.numpy() for x in columns))] if columns else [] for columns in state["under_way"]]
        self.number = state["number"]


# ------------------------------------------------------------------------------------------------------ TRPO


def greedy_policy(actor: Actor):
    """The policy's mean as a function of arrays, (B, S) -> (B, A). For few states numpy is faster than torch."""
    mean, std = (x.cpu().numpy() for x in (actor.normaliser.mean, actor.normaliser.std))
    weights = [weight.detach().cpu().numpy() for weight in actor.net.parameters()]
    layers = [*zip(weights[::2], weights[1::2], strict=True)]

    def policy(states: np.ndarray) -> np.ndarray:
        x = ((states - mean) / std).clip(-10, 10)
        for weight, bias in layers[:-1]:
            x = np.tanh(x @ weight.T + bias)
        return x @ layers[-1][0].T + layers[-1][1]

    return policy


def collect_rollout(episodes: Episodes, actor: Actor, num_steps: int, rng: np.random.Generator):
    """Steps all environments `num_steps` times with the policy; returns the Rollout and what `next_episode` said."""
    num_envs, state_dim = episodes.states.shape
    policy, std = greedy_policy(actor), actor.log_std.detach().exp().cpu().numpy()
    noise, finished = std * rng.standard_normal((num_steps, num_envs, len(std)), dtype=np.float32), []
    states, rewards = np.empty((2, num_steps, num_envs, state_dim), np.float32), np.empty(noise.shape[:2], np.float32)
    terminated, truncated = np.empty((2, num_steps, num_envs), bool)
    rollout = Rollout(states[0], np.empty_like(noise), rewards, terminated, truncated, states[1])
    for t in range(num_steps):
        rollout.states[t] = episodes.states
        rollout.actions[t] = policy(episodes.states) + noise[t]
        for i, action in enumerate(rollout.actions[t].clip(-1, 1)):
            outcome = episodes.step(i, action)
            rollout.next_states[t, i], rewards[t, i], terminated[t, i], truncated[t, i] = outcome
            if terminated[t, i] or truncated[t, i]:
                finished.append(episodes.next_episode(i))
    return rollout, finished


def generalized_advantages(rollout: Rollout, values, next_values, gamma: float, gae_lambda: float) -> np.ndarray:
    """GAE (Schulman et al., 2016), (num_steps, num_envs). A time limit cuts the sum, but not the value that follows."""
    errors = rollout.rewards + gamma * np.where(rollout.terminated, 0, next_values) - values
    decay = gamma * gae_lambda * ~(rollout.terminated | rollout.truncated)
    advantages, later = np.zeros_like(errors), 0.0
    for t in reversed(range(len(errors))):
        advantages[t] = later = errors[t] + decay[t] * later
    return advantages


def kl_divergence(mean, log_std, new_mean, new_log_std) -> torch.Tensor:
    """KL(old || new) of two Gaussian policies, the mean over all states, ()."""
    old_var, new_var = (2 * log_std).exp(), (2 * new_log_std).exp()
    return (new_log_std - log_std + (old_var + (mean - new_mean) ** 2) / (2 * new_var) - 0.5).sum(-1).mean()


def fisher_matrix(actor: Actor, states: torch.Tensor, damping: float):
    """The function v -> (F + damping I) v of flat vectors, F the policy's Fisher matrix, its mean over states (n, S).

    A Gaussian's own Fisher matrix is 1 / std^2 for its mean and 2 for its log std. So F v = J^T diag(1 / std^2) J v for
    the means' Jacobian J, and 2 v for the log std.
    """
    weights = dict(actor.named_parameters())
    log_std = weights.pop("log_std").detach()
    weights = [*weights.values()]
    means = actor(states)[0]
    u = torch.zeros_like(means, requires_grad=True)
    pulled_back = torch.autograd.grad(means, weights, u, create_graph=True)  # J^T u, whose derivative by u is J^T

    def product(vector: torch.Tensor) -> torch.Tensor:
        of_log_std, rest = vector.split((len(log_std), len(vector) - len(log_std)))
        direction = [part.view_as(w) for part, w in zip(rest.split([w.numel() for w in weights]), weights, strict=True)]
        (change,) = torch.autograd.grad(pulled_back, u, direction, retain_graph=True)  # J v
        change = change / (2 * log_std).exp() / len(states)
        gradient = torch.autograd.grad(means, weights, change, retain_graph=True)  # J^T (...)
        return parameters_to_vector((2 * of_log_std, *gradient)) + damping * vector

    return product


def conjugate_gradients(product, b: torch.Tensor, iterations: int) -> torch.Tensor:
    """x with product(x) = b for a positive definite matrix, nearly (Hestenes and Stiefel, 1952)."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = residual @ residual
    for _ in range(iterations):
        if square <= 1e-20:
            break
        image = product(direction)
        length = square / (direction @ image)
        x += length * direction
        residual -= length * image
        square, last = residual @ residual, square
        direction = residual + square / last * direction
    return x


def update_actor(actor: Actor, states, actions, advantages, args: Args) -> dict[str, torch.Tensor]:
    """One natural gradient step within the trust region (Schulman et al., 2015) on states (n, S), actions (n, A) and
    advantages (n,); returns losses."""
    weights = parameters_to_vector(actor.parameters()).detach()
    old_policy = [part.detach() for part in actor(states)]
    old_log_probs = actor.log_prob(states, actions)
    # The ratio pi / pi_old is 1 here, but its gradient is that of log pi.
    surrogate = (advantages * (old_log_probs - old_log_probs.detach()).exp()).mean()
    gradient = parameters_to_vector(torch.autograd.grad(surrogate, [*actor.parameters()]))
    product = fisher_matrix(actor, states, args.cg_damping)
    direction = conjugate_gradients(product, gradient, args.cg_iterations)
    step = direction * (2 * args.max_kl / (direction @ product(direction)).clamp(min=1e-20)).sqrt()
    with torch.no_grad():
        for i in range(args.line_search_steps):
            vector_to_parameters(weights + 0.8**i * step, actor.parameters())
            gain = (advantages * (actor.log_prob(states, actions) - old_log_probs).exp()).mean() - surrogate
            kl = kl_divergence(*old_policy, *actor(states))
            if gain > 0 and kl <= args.max_kl:
                break
        else:
            vector_to_parameters(weights, actor.parameters())
            gain, kl, i = torch.zeros(()), torch.zeros(()), args.line_search_steps
    entropy = (actor.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().detach()
    losses = {"policy_loss": -gain, "kl": kl, "entropy": entropy, "line_search_steps": torch.tensor(float(i))}
    return {f"losses/{name}": loss for name, loss in losses.items()}


def update_critic(critic: Critic, optimizer, states, returns, args: Args, rng) -> dict[str, torch.Tensor]:
    """Regression of V(s) on the returns (n,) of states (n, S), in units of their running variance."""
    critic.rescale(returns)
    states, targets = critic.normaliser(states), (returns.unsqueeze(-1) - critic.scale.mean) / critic.scale.std
    for _ in range(args.critic_epochs):
        for rows in as_tensor(rng.permutation(len(states)), args.device).split(args.critic_batch_size):
            loss = F.mse_loss(critic.net(states[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {"losses/value_loss": loss.detach()}


def update_trpo(actor: Actor, critic: Critic, optimizer, rollout: Rollout, args: Args, rng) -> dict[str, torch.Tensor]:
    """One iteration of trust region policy optimization; returns losses."""
    states, next_states, actions = (
        as_tensor(column, args.device).flatten(0, 1)
        for column in (rollout.states, rollout.next_states, rollout.actions)
    )
    with torch.no_grad():
        values, next_values = (critic(s).cpu().numpy().reshape(rollout.rewards.shape) for s in (states, next_states))
    advantages = generalized_advantages(rollout, values, next_values, args.gamma, args.gae_lambda)
    returns = as_tensor((advantages + values).ravel(), args.device)
    advantages = as_tensor(advantages.ravel(), args.device)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    losses = update_actor(actor, states, actions, advantages, args)
    losses |= update_critic(critic, optimizer, states, returns, args, rng)
    left = (returns - as_tensor(values.ravel(), args.device)).var()
    return losses | {"losses/explained_variance": 1 - left / returns.var().clamp(min=1e-8)}


# ------------------------------------------------------------------------------------------------------ recall traces


def high_value_states(buffer: TrajectoryBuffer, args: Args) -> Tuples:
    """Of the trajectories of highest return in B (k_traj) the most valuable tuples (k), best first (Alg. 1, line 8).

    Without those with a terminal next state: it has no value, and no recall trace can start there.
    """
    seen = [(value, tuples) for value, held_out, tuples in buffer.trajectories if not held_out]
    if not seen:
        return Tuples(*(torch.zeros(0) for _ in Tuples._fields))
    best = sorted(seen, key=lambda part: -part[0])[: args.top_trajectories]
    tuples = Tuples(*map(np.concatenate, zip(*(tuples for _, tuples in best), strict=True)))
    chosen = np.argsort(-tuples.values, kind="stable")[: max(2, round(args.top_fraction * len(tuples.values)))]
    chosen = chosen[np.isfinite(tuples.values[chosen])]
    return Tuples(*(as_tensor(column[chosen], args.device) for column in tuples))


def update_backtracking_model(model: BacktrackingModel, optimizer, batch: Tuples) -> dict[str, torch.Tensor]:
    """One maximum likelihood step on some of the most valuable tuples (Alg. 1, line 9); returns losses."""
    of_actions, of_changes = model.log_prob(batch.states, batch.actions, batch.next_states)
    losses = {"recall/action_nll": -of_actions.mean(), "recall/state_nll": -of_changes.mean()}
    losses["recall/backtracking_loss"] = sum(losses.values())  # Eq. (2)
    optimizer.zero_grad()
    losses["recall/backtracking_loss"].backward()
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def update_forward_model(model: ForwardModel, optimizer, batch: Tuples) -> dict[str, torch.Tensor]:
    """One maximum likelihood step on some of the tuples (App. G); returns its loss."""
    loss = -model.log_prob(batch).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"recall/forward_loss": loss.detach()}


@torch.no_grad()
def recall_traces(model: BacktrackingModel, starts: torch.Tensor, length: int, args: Args, rng: np.random.Generator):
    """Unrolls the backtracking model from the states `starts` (N, S) backwards (section 2.1; Alg. 1, line 11).

    Returns states (length, N, S) and actions (length, N, A), ordered from the high-value state backwards, and which of
    them belong to a trace (length, N): it ends where it leaves the data that the model has learned from.
    """
    states, actions, inside, next_states = [], [], [], starts
    reach = args.trace_limit * model.state_std
    for _ in range(length):
        action_noise = args.action_noise * normal(rng, (len(starts), len(model.action_mean)), starts.device)
        state_noise = args.state_noise * normal(rng, starts.shape, starts.device)
        next_states, action = model.sample(next_states, action_noise, state_noise)
        states.append(next_states)
        actions.append(action)
        inside.append(((next_states - model.state_mean).abs() <= reach).all(-1))
        # One that has left is of no more use; it waits at the border, so that its numbers stay finite.
        next_states = next_states.clamp(model.state_mean - reach, model.state_mean + reach)
    return torch.stack(states), torch.stack(actions), torch.stack(inside).cumprod(0).bool()


@torch.no_grad()
def forward_traces(
    model: ForwardModel, actor: Actor, critic: Critic, starts: torch.Tensor, length: int, args: Args, rng
):
    """Imagines what the policy would do from the states `starts` (N, S) on (App. G).

    Returns states (length, N, S), actions (length, N, A), as the policy drew them, and advantages (length, N), in units
    of their standard deviation: imagined rewards up to the last state inside the data and its value, less V(s); 0 after
    that.
    """
    states, actions, rewards, inside, state = [], [], [], [], starts
    reach = args.trace_limit * model.state_std
    for _ in range(length):
        states.append(state)
        mean, log_std = actor(state)
        actions.append(mean + log_std.exp() * normal(rng, mean.shape, mean.device))
        noise = args.state_noise * normal(rng, (len(state), state.shape[1] + 1), state.device)
        state, reward = model.sample(state, actions[-1].clamp(-1, 1), noise)
        rewards.append(reward)
        inside.append(((state - model.state_mean).abs() <= reach).all(-1))
        state = state.clamp(model.state_mean - reach, model.state_mean + reach)
    in_trace, values = torch.stack(inside).cumprod(0).bool(), critic(torch.stack([*states, state]))
    advantages, later = torch.zeros_like(values[1:]), values[-1]
    for t in reversed(range(length)):
        goes_on = in_trace[t + 1] if t + 1 < length else torch.zeros_like(in_trace[t])
        later = rewards[t] + args.gamma * torch.where(goes_on, later, values[t + 1])
        advantages[t] = later - values[t]
    scale = advantages[in_trace].std() + 1e-8 if in_trace.sum() > 1 else 1.0
    return torch.stack(states), torch.stack(actions), in_trace * advantages / scale


def split_traces(states, actions, weights, num_traces: int) -> list[tuple[torch.Tensor, ...]]:
    """Traces (length, N, ...) in groups of `num_traces`: states (n, S), actions (n, A), weights (n,) other than 0."""
    parts = zip(*(column.split(num_traces, dim=1) for column in (states, actions, weights)), strict=True)
    return [(states[weights != 0], actions[weights != 0], weights[weights != 0]) for states, actions, weights in parts]


def imitate(actor: Actor, optimizer, traces: list, states: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """Steps that raise log pi(a | s) on the pairs of traces (Alg. 1, lines 12 and 13), shortened until the policy has
    changed by no more than --imitation-kl on the states (n, S) of the last rollout; returns losses."""
    before = parameters_to_vector(actor.parameters()).detach()
    old_policy, losses = [part.detach().clone() for part in actor(states)], {}
    for trace_states, actions, weights in traces:
        if len(weights) == 0:
            continue
        loss = -(weights * actor.log_prob_of_clipped(trace_states, actions)).mean()  # Eq. (3), its mean over the pairs
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses["recall/imitation_loss"] = loss.detach()
    with torch.no_grad():
        change = parameters_to_vector(actor.parameters()) - before
        while (kl := kl_divergence(*old_policy, *actor(states))) > args.imitation_kl:
            change *= 0.8
            vector_to_parameters(before + change, actor.parameters())
    return losses | {"recall/imitation_kl": kl}


def default_trace_length(env_id: str) -> int:
    """Tables 1 and 2."""
    return 10 if env_id.startswith("Hopper") else 50 if env_id.startswith(("Ant", "Humanoid")) else 20


class Comparison(NamedTuple):
    """Imagined and real backward trajectories from the same high-value states, (length, N, ...)."""

    starts: torch.Tensor  # (N, S)
    real: torch.Tensor
    known: torch.Tensor  # where there is a real predecessor, one of the same episode
    imagined: torch.Tensor
    in_trace: torch.Tensor


@torch.no_grad()
def compare_traces(model: BacktrackingModel, buffer: TrajectoryBuffer, length: int, args: Args, rng):
    """Recall traces beside what really led to the high-value states; the model has not learned from these tuples."""
    held_out = [tuples for _, held_out, tuples in buffer.trajectories if held_out]
    if not held_out:
        return None
    tuples = Tuples(*map(np.concatenate, zip(*held_out, strict=True)))
    best = np.argsort(-tuples.values, kind="stable")[: max(1, round(args.top_fraction * len(tuples.values)))]
    ends = rng.permutation(best[np.isfinite(tuples.values[best])])[:256]
    if len(ends) == 0:  # nothing but terminal states
        return None
    steps = np.arange(length)[:, None]
    known = as_tensor(tuples.times[ends] >= steps, args.device)
    real = as_tensor(tuples.states[np.maximum(ends - steps, 0)], args.device)
    starts = as_tensor(tuples.next_states[ends], args.device)
    imagined, _, in_trace = recall_traces(model, starts, length, args, rng)
    return Comparison(starts, real, known, imagined, in_trace)


def trace_errors(model: BacktrackingModel, compared: Comparison) -> torch.Tensor:
    """Root mean square distance of imagined from real predecessors, in standard deviations of the states, (length,)."""
    distances = ((compared.imagined - compared.real) / model.state_std).square().mean(-1).sqrt()
    counted = (compared.known & compared.in_trace).float()
    return (counted * distances).sum(-1) / counted.sum(-1)  # nan where there is none


# ------------------------------------------------------------------------------------------------------ evaluation


def play(envs: list[gym.Env], actor: Actor, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Plays one episode of the greedy policy in each environment; returns returns and lengths (len(envs),)."""
    states = np.stack([env.reset(seed=args.seed + i)[0] for i, env in enumerate(envs)]).astype(np.float32)
    returns, lengths, going = np.zeros(len(envs)), np.zeros(len(envs), dtype=int), list(range(len(envs)))
    policy = greedy_policy(actor)
    while going:
        actions, still_going = policy(states[going]).clip(-1, 1), []
        for i, action in zip(going, actions, strict=True):
            states[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            if not (terminated or truncated):
                still_going.append(i)
        going = still_going
    return returns, lengths


def draw_traces(model: BacktrackingModel, compared: Comparison) -> Figure:
    """Imagined and real backward trajectories in the plane in which the real ones vary most, and the error by step."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    plane, errors = figure.subplots(1, 2)
    real, imagined, starts = (
        (x - model.state_mean) / model.state_std for x in (compared.real, compared.imagined, compared.starts)
    )
    there = real[compared.known]
    axes = torch.linalg.svd(there - there.mean(0), full_matrices=False)[2][:2].T
    shown = compared.known.sum(0).argsort(descending=True, stable=True)[:8].tolist()
    for label, states, kept, style in (
        ("real", real, compared.known, "k-"),
        ("imagined", imagined, compared.in_trace, "C1-"),
    ):
        for n, i in enumerate(shown):
            way = torch.cat((starts[None, i], states[:, i][kept[:, i]])) @ axes
            plane.plot(*way.T.cpu().numpy(), style, lw=1, alpha=0.7, marker=".", ms=3, label=None if n else label)
    plane.plot(*(starts[shown] @ axes).T.cpu().numpy(), "C0*", ms=9, ls="", label="high-value state")
    plane.set(
        title="Backward trajectories from high-value states", xlabel="1st principal axis", ylabel="2nd principal axis"
    )
    still = compared._replace(imagined=compared.starts.expand_as(compared.real))
    steps = np.arange(1, len(compared.real) + 1)
    errors.plot(steps, trace_errors(model, compared).cpu(), "C1", marker=".", label="imagined")
    errors.plot(steps, trace_errors(model, still).cpu(), "k--", label="standing still")
    survival = compared.in_trace.float().mean(-1).cpu()
    errors.plot(steps, survival, "C2:", label="share of traces inside the data")
    errors.set(title="Distance from the real predecessors", xlabel="steps back", ylim=(0, None))
    errors.set_ylabel("standard deviations of the states")
    for ax in (plane, errors):
        ax.legend()
    return figure


def draw_returns(evaluations: list[tuple[int, float]], title: str) -> Figure:
    """The learning curve: (step, mean return) of each evaluation."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(*zip(*evaluations, strict=True), marker=".")
    ax.set(title=title, xlabel="environment steps", ylabel="return of the greedy policy")
    return figure


def write_video(path: Path, args: Args, actor: Actor) -> None:
    """Writes the first ten seconds of an episode of the greedy agent as a GIF, at about 25 frames a second."""
    env = make_env(args, render_mode="rgb_array")
    if isinstance(env.unwrapped, MujocoEnv):  # the camera that follows the agent; -1, the free one, if there is none
        camera = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        env.unwrapped.mujoco_renderer.camera_id = camera
    fps = env.metadata.get("render_fps", 25)
    every = max(1, round(fps / 25))
    state, _ = env.reset(seed=args.seed)
    frames, done, policy = [], False, greedy_policy(actor)
    for step in range(round(10 * fps)):
        if step % every == 0 or done:
            frames.append(Image.fromarray(env.render()))
            frames[-1].thumbnail((240, 240))
        if done:
            break
        state, _, terminated, truncated, _ = env.step(policy(state[None].astype(np.float32))[0].clip(-1, 1))
        done = terminated or truncated
    env.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 * every / fps, loop=0)


# ------------------------------------------------------------------------------------------------------ checkpoint


def fail(message: str) -> None:
    """Ends the program with one line that names the flag and what would be accepted, and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The environment with actions from -1 to 1."""
    options = {} if args.contact_forces else {"include_cfrc_ext_in_observation": False}
    options |= {} if render_mode is None else {"render_mode": render_mode}
    try:
        env = gym.make(args.env_id, disable_env_checker=True, **options)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        if "include_cfrc_ext_in_observation" in str(error):
            fail(f"--no-contact-forces is for Ant and Humanoid from v5 on, {args.env_id} has no such option")
        fail(f"--env-id must be the id of a Gymnasium environment such as HalfCheetah-v5: {error}")
    states, actions = env.observation_space, env.action_space
    if not isinstance(states, gym.spaces.Box) or len(states.shape) != 1:
        fail(f"--env-id must have a vector of observations (a Box with one axis), {args.env_id} has {states}")
    if not isinstance(actions, gym.spaces.Box) or len(actions.shape) != 1:
        fail(f"--env-id must have a vector of actions (a Box with one axis), {args.env_id} has {actions}")
    if not actions.is_bounded() or not np.issubdtype(actions.dtype, np.floating):
        fail(f"--env-id must have bounded actions that are real numbers, those of {args.env_id} are {actions}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


AT_MOST = {"gamma": 1, "gae_lambda": 1, "top_fraction": 1, "recall_until": 1, "seed": 2**63 - 1, "num_envs": 1024}
AT_MOST |= {"hidden": 10**4}
AT_MOST |= dict.fromkeys(("num_traces", "num_steps", "critic_batch_size", "backtracking_batch_size"), 10**5)
AT_MOST |= dict.fromkeys(("recall_updates", "backtracking_updates", "buffer_size", "top_trajectories"), 10**9)
AT_MOST |= dict.fromkeys(("cg_iterations", "line_search_steps", "trace_length", "eval_episodes", "torch_threads"), 1000)


def check(args: Args) -> None:
    """Fails on the first argument that is out of range."""
    for name, value in vars(args).items():
        least = 0 if isinstance(value, float | bool) or name == "seed" else 1
        most = AT_MOST.get(name, sys.float_info.max)
        if isinstance(value, int | float) and not least <= value <= most:
            allowed = f"from {least} to {most}" if name in AT_MOST else f"of at least {least}"
            fail(f"--{name.replace('_', '-')} must be a number {allowed}, got {value}")
    if args.max_kl == 0:
        fail("--max-kl must be greater than 0, got 0.0")
    rows = args.backtracking_updates * args.backtracking_batch_size
    if args.recall != "none" and rows > 10**8:
        fail(f"--backtracking-updates times --backtracking-batch-size must be at most {10**8}, got {rows}")
    try:
        torch.zeros(1, device=args.device, dtype=torch.float64).cpu()
    except Exception:  # each kind of device has its own
        fail(f"--device {args.device} is not available here, a new run can have --device cpu")
    env = make_env(args)
    shapes = *env.observation_space.shape, *env.action_space.shape
    steps = args.num_traces * args.recall_updates * args.trace_length
    if args.recall != "none" and steps * sum(shapes) > 10**9:
        allowed = f"at most {10**9 // sum(shapes)} with {args.env_id}"
        fail(f"--num-traces times --recall-updates times --trace-length must be {allowed}, got {steps}")
    if args.num_envs * args.num_steps < 2:
        fail("--num-envs times --num-steps must be at least 2, got 1")
    if args.num_envs * args.num_steps * shapes[0] > 10**8:
        fail(f"--num-envs times --num-steps must leave a rollout in memory, got {args.num_envs} times {args.num_steps}")
    if args.capture_video:
        try:
            env = make_env(args, render_mode="rgb_array")
            env.reset()
            env.render()
        except Exception as error:  # every renderer has its own
            fail(f"--capture-video cannot draw {args.env_id} here (MUJOCO_GL=osmesa may help): {error}")
    env.close()


def show_warning(message: str) -> None:
    """What MuJoCo has to say, but for the age of Gymnasium's models."""
    if "deprecated" not in message:
        print(f"MuJoCo: {message.strip()}", file=sys.stderr)


def read_run(args: Args, name: str, own: tuple[str, ...]) -> tuple[Args, dict | None]:
    """The arguments and the checkpoint (None before the first one) of the run in --resume or --evaluate.

    Of all other flags only its own may differ from the run's.
    """
    run_dir = getattr(args, name)
    try:
        saved = Args(**json.loads((run_dir / "args.json").read_text()))
    except (OSError, ValueError, TypeError):
        fail(f"--{name} must be the folder of a run of this script, with its args.json; {run_dir} is not")
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        assert len(dict(checkpoint)["actor"]["net.0.weight"]) == saved.hidden
    except FileNotFoundError:
        checkpoint = None
    except Exception:  # torch.load raises a different one for every way in which a file can be damaged
        fail(f"--{name}: {run_dir / 'checkpoint.pt'} is damaged or not a checkpoint of this run")
    saved.run_dir = run_dir
    words = [word.split("=")[0].replace("_", "-").replace("--no-", "--") for word in sys.argv]
    for field in fields(args):
        flag, value, old = f"--{field.name}".replace("_", "-"), getattr(args, field.name), getattr(saved, field.name)
        given = value != field.default or flag in words  # a flag may be given with its default value
        if field.name not in (name, *own) and given and value != old:
            others = ", --".join(own).replace("_", "-")
            fail(f"{flag} cannot change with --{name}, the run has {old}; only --{others} may")
    return saved, checkpoint


def resume_run(args: Args) -> tuple[Args, dict | None]:
    """The run in --resume with its own arguments; --total-timesteps may grow."""
    saved, checkpoint = read_run(args, "resume", ("total_timesteps",))
    if args.total_timesteps is not None and args.total_timesteps < saved.total_timesteps:
        fail(f"--total-timesteps can only grow with --resume, from {saved.total_timesteps}, got {args.total_timesteps}")
    saved.total_timesteps = args.total_timesteps or saved.total_timesteps
    check(saved)
    return saved, checkpoint


def cut_event_files(run_dir: Path, sizes: dict[str, int]) -> None:
    """Forgets what was logged after the checkpoint, at which the event files had these sizes: it is logged again."""
    for file in run_dir.glob("events.out.tfevents.*"):
        if file.name in sizes:
            os.truncate(file, sizes[file.name])
        else:
            file.unlink()


def make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(file.suffix != ".tmp" for file in run_dir.iterdir()):
            fail(f"--run-dir must be new or empty, {run_dir} is not; --resume {run_dir} goes on with a run")
        (run_dir / "args.tmp").touch()
    except OSError as error:
        fail(f"--run-dir must be a folder that can be made and written, {run_dir} is not: {error.strerror}")


def replace_file(path: Path, write) -> None:
    """Writes a file under a temporary name and renames it, so that a kill at any moment leaves a whole one."""
    write(path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


@contextmanager
def catch_signals():
    """A list that gets the number of a SIGINT or SIGTERM, so that the training loop can stop at a good place.

    Each is caught once: a second Ctrl-C ends the process at once.
    """
    caught, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(number, _) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluate_run(args: Args) -> None:
    """--evaluate: plays greedy episodes with a trained agent, prints their returns and may write a GIF."""
    own = ("seed", "device", "torch_threads", "eval_episodes", "capture_video")
    saved, checkpoint = read_run(args, "evaluate", own)
    if checkpoint is None:
        fail(f"--evaluate: {args.evaluate} has no checkpoint.pt yet")
    saved = replace(saved, **{name: getattr(args, name) for name in own})
    check(saved)
    torch.set_num_threads(args.torch_threads)
    envs = [make_env(saved) for _ in range(args.eval_episodes)]
    state_dim, action_dim = *envs[0].observation_space.shape, *envs[0].action_space.shape
    actor = Actor(Normaliser(state_dim), state_dim, action_dim, saved.hidden).to(args.device)
    try:
        actor.load_state_dict(checkpoint["actor"])
    except RuntimeError:  # networks of another task
        fail(f"--evaluate: {args.evaluate / 'checkpoint.pt'} is not a checkpoint of this run")
    returns, lengths = play(envs, actor, saved)
    for i in range(args.eval_episodes):
        print(f"episode {i}: return {returns[i]:.2f} in {lengths[i]} steps")
    print(f"mean return {returns.mean():.2f}, standard deviation {returns.std():.2f}")
    if args.capture_video:
        path = args.evaluate / f"agent_{checkpoint['step']}.gif"
        write_video(path, saved, actor)
        print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------------ main


def main(args: Args) -> None:
    mujoco.set_mju_user_warning(show_warning)
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    if args.evaluate is not None:
        return evaluate_run(args)
    checkpoint = None
    if args.resume is not None:
        args, checkpoint = resume_run(args)
    else:
        name = f"{args.env_id}__{Path(__file__).stem}__{args.recall}__seed{args.seed}__{int(time.time())}"
        args = replace(args, run_dir=args.run_dir or Path("runs", name))
        args.total_timesteps = 500_000 if args.total_timesteps is None else args.total_timesteps
        if args.trace_length is None:
            args.trace_length = default_trace_length(args.env_id)
        check(args)
        make_run_dir(args.run_dir)

    torch.set_num_threads(args.torch_threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any, and filling takes time
    eval_envs = [make_env(args) for _ in range(args.eval_episodes)]
    episodes = Episodes([make_env(args) for _ in range(args.num_envs)], args.seed)
    state_dim, action_dim = episodes.states.shape[1], eval_envs[0].action_space.shape[0]
    torch.manual_seed(args.seed)
    normaliser = Normaliser(state_dim)
    actor = Actor(normaliser, state_dim, action_dim, args.hidden).to(args.device)  # Alg. 1, line 1
    critic = Critic(normaliser, state_dim, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(critic.net.parameters(), lr=args.critic_lr, fused=True)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer, "episodes": episodes}
    rngs = {"rollout": np.random.default_rng([args.seed, 0]), "update": np.random.default_rng([args.seed, 1])}
    if args.recall != "none":
        if args.recall == "forward":
            model, update_model = ForwardModel(state_dim, action_dim).to(args.device), update_forward_model
        else:
            model = BacktrackingModel(state_dim, action_dim).to(args.device)  # Alg. 1, line 2
            update_model = update_backtracking_model
        buffer = TrajectoryBuffer(args.buffer_size, args.num_envs, args.start_states, args.gamma)
        imitation_optimizer = torch.optim.Adam(actor.parameters(), lr=args.imitation_lr, fused=True)
        kind = "forward" if args.recall == "forward" else "backtracking"
        parts |= {f"{kind}_model": model, "buffer": buffer, "imitation_optimizer": imitation_optimizer}
        if args.recall != "random":
            model_optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr, fused=True)
            parts[f"{kind}_optimizer"] = model_optimizer
        rngs["recall"] = np.random.default_rng([args.seed, 2])
    step, losses, evaluations = 0, {}, []  # evaluations: (step, mean return)
    finished = []  # (return, length) of the episodes since the last evaluation
    if checkpoint:
        try:
            for name, part in parts.items():  # copied, so that the file can go
                part.load_state_dict(deepcopy(checkpoint[name]))
            for name, rng in rngs.items():
                rng.bit_generator.state = checkpoint["rngs"][name]
            step, losses = checkpoint["step"], deepcopy(checkpoint["losses"])
            finished, evaluations = checkpoint["finished"], checkpoint["evaluations"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            fail(f"--resume: {args.run_dir / 'checkpoint.pt'} is not a checkpoint of this run: {error}".splitlines()[0])
    cut_event_files(args.run_dir, checkpoint["event_sizes"] if checkpoint else {})
    del checkpoint
    arguments = json.dumps(asdict(args), indent=4, default=str)
    replace_file(args.run_dir / "args.json", lambda path: path.write_text(arguments))

    def save_checkpoint() -> None:
        check_losses()
        modules = [part for part in parts.values() if isinstance(part, nn.Module)]
        if not all(weight.isfinite().all() for module in modules for weight in module.parameters()):
            largest = max(losses, key=lambda name: abs(float(losses[name])))
            stop(f"a weight is not finite, the largest loss is {largest},")
        writer.flush()
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"rngs": {name: rng.bit_generator.state for name, rng in rngs.items()}}
        event_sizes = {file.name: file.stat().st_size for file in args.run_dir.glob("events.out.tfevents.*")}
        state |= {"step": step, "losses": losses, "event_sizes": event_sizes}
        state |= {"finished": finished, "evaluations": evaluations}
        replace_file(args.run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    def check_losses() -> None:
        for name, loss in losses.items():
            if not np.isfinite(float(loss)):
                stop(f"{name} is {losses[name]}")

    def stop(reason: str) -> None:
        sys.exit(f"error: {reason} at step {step}; {args.run_dir} keeps the last good checkpoint")

    def log() -> None:
        check_losses()
        returns, _ = play(eval_envs, actor, args)
        evaluations.append((step, float(returns.mean())))
        scalars = {"eval/return": returns.mean(), **losses}
        if finished:
            scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(finished, axis=0)
            finished.clear()
        if compared := compare():
            scalars["recall/trace_survival"] = compared.in_trace.float().mean()
            errors = trace_errors(model, compared)
            scalars |= {"recall/trace_error": errors.nanmean(), "recall/trace_error_of_first_step": errors[0]}
        if step > first_step:
            scalars["charts/SPS"] = (step - first_step) / (time.time() - started)
        for name, value in scalars.items():
            if np.isfinite(float(value)):  # no trace may have stayed inside the data
                writer.add_scalar(name, float(value), step)
        progress.set_postfix_str(f"return {returns.mean():.0f}")

    def compare() -> Comparison | None:
        if args.recall == "forward" or "recall/start_value" not in losses:  # no recall phase yet
            return None
        rng = np.random.default_rng([args.seed, 3, step])
        return compare_traces(model, buffer, args.trace_length, args, rng)

    def show(name: str, figure: Figure) -> None:
        figure.savefig(args.run_dir / f"{name}.png", dpi=120)
        image = np.asarray(Image.open(args.run_dir / f"{name}.png").convert("RGB"))
        writer.add_image(f"pictures/{name}", image, step, dataformats="HWC")

    def write_traces() -> None:
        if compared := compare():
            show("traces", draw_traces(model, compared))

    def write_pictures() -> None:
        show("returns", draw_returns(evaluations, f"{args.env_id}, recall {args.recall}, seed {args.seed}"))
        write_traces()
        if args.capture_video:
            write_video(args.run_dir / "agent.gif", args, actor)

    batch, first_step, started = args.num_envs * args.num_steps, step, time.time()
    whole_batches = -(-args.total_timesteps // batch) * batch
    progress = tqdm(total=whole_batches, initial=step, unit=" steps", disable=None)
    with SummaryWriter(args.run_dir) as writer, progress, catch_signals() as caught:
        while step < args.total_timesteps:  # Alg. 1, line 3
            if caught or step % args.checkpoint_every < batch:
                save_checkpoint()
            if caught:
                print(f"stopped at step {step}; --resume {args.run_dir} goes on from there", file=sys.stderr)
                sys.exit(128 + caught[0])
            if step % args.eval_every < batch:
                log()

            # Alg. 1, line 4: execute the policy
            rollout, ended = collect_rollout(episodes, actor, args.num_steps, rngs["rollout"])
            finished += ended
            # Alg. 1, lines 6 and 7: improve the policy with the RL algorithm
            losses |= update_trpo(actor, critic, optimizer, rollout, args, rngs["update"])
            states = as_tensor(rollout.states, args.device).flatten(0, 1)
            normaliser.add(states)  # only now, so that rollout and update saw the same policy
            step += batch
            progress.update(batch)
            if args.recall == "none":
                continue

            buffer.add(rollout)  # Alg. 1, line 5
            if step > args.recall_until * args.total_timesteps:
                if "recall/start_value" in losses:  # the last traces, and no more of their losses
                    write_traces()
                    losses = {name: loss for name, loss in losses.items() if not name.startswith("recall/")}
                elif step - batch <= args.recall_until * args.total_timesteps:
                    why = "too few iterations, or no episode ended,"
                    print(f"no recall phase: {why} before --recall-until {args.recall_until}", file=sys.stderr)
                continue
            if step // batch % args.recall_every:
                continue
            tuples, rng = high_value_states(buffer, args), rngs["recall"]  # Alg. 1, line 8
            if len(tuples.values) < 2:
                continue
            model.normalise_by(tuples)
            if args.recall != "random":
                shape = args.backtracking_updates, args.backtracking_batch_size
                for rows in as_tensor(rng.integers(len(tuples.values), size=shape), args.device):
                    some = Tuples(*(column[rows] for column in tuples))
                    losses |= update_model(model, model_optimizer, some)  # Alg. 1, line 9
            # Alg. 1, lines 10 and 11: recall traces from the most valuable states
            chosen = rng.permutation(args.num_traces * args.recall_updates) % len(tuples.values)
            losses["recall/start_value"] = tuples.values[chosen].mean()
            if args.recall == "forward":
                traces = forward_traces(model, actor, critic, tuples.states[chosen], args.trace_length, args, rng)
            else:
                traces = recall_traces(model, tuples.next_states[chosen], args.trace_length, args, rng)
            # Alg. 1, lines 12 and 13: imitate them
            losses |= imitate(actor, imitation_optimizer, split_traces(*traces, args.num_traces), states, args)

        save_checkpoint()
        log()
        write_pictures()
    print(f"pictures, curves and the trained agent are in {args.run_dir}")


if __name__ == "__main__":
    main(tyro.cli(Args))
