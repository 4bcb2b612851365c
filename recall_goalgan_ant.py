# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium==1.4.0",
#     "imageio==2.38.1",
#     "matplotlib==3.11.2",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "pillow==13.0.0",
#     "scipy==1.17.1",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Goal GAN with trust region policy optimization and recall traces (Goyal et al., ICLR 2019, sections 6.3, A, C and D).

An ant in a U-shaped maze is to reach every place. A generative adversarial network proposes goals that are neither
too easy nor too hard; a backtracking model imagines what may lead to them, and the policy imitates these recall traces.
This file and the mazes in envs are all there is.

    python recall_goalgan_ant.py --env-id PointUMaze-v0       # a point mass in the maze
    python recall_goalgan_ant.py --capture-video              # the ant, with Goal GAN's batch
    python recall_goalgan_ant.py --recall none                # Goal GAN alone
    python recall_goalgan_ant.py --evaluate RUN_DIR           # measure the trained agent's coverage

The point mass reaches 90 % of the maze after 13 outer iterations with recall traces, 17 without (20 seeds; a run of 40
outer iterations takes 6 minutes on a core). Three seeds of the ant show no difference; see docs/recall_goalgan_ant.md.
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
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from PIL import Image
from scipy.spatial import KDTree
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.u_maze import FREE, GoalVectorEnv, coverage_goals, draw_coverage, draw_maze


@dataclass
class Args:
    # run
    seed: int = 1
    """seed of networks, environments and all sampling"""
    total_timesteps: int | None = None
    """environment steps of training in all (40 outer iterations if not given); may grow with --resume"""
    run_dir: Path | None = None
    """folder of this run; runs/<env>__<script>__<recall>__seed<seed>__<time> if not given"""
    resume: Path | None = None
    """go on with the interrupted run in this folder, with its own arguments"""
    evaluate: Path | None = None
    """measure the coverage of the agent in this folder"""
    eval_every: int | None = None
    """environment steps of training between evaluations; every outer iteration if not given"""
    eval_episodes: int = 3
    """episodes per goal and evaluation"""
    checkpoint_every: int | None = None
    """environment steps of training between checkpoints; every inner iteration if not given"""
    capture_video: bool = False
    """write a GIF of the agent on its way to a goal, at the end of training or with --evaluate"""
    device: str = "cpu"
    """torch device of the networks"""
    torch_threads: int = 1
    """CPU threads of torch"""

    # environment
    env_id: str = "AntUMaze-v0"
    """AntUMaze-v0, PointUMaze-v0 or PointMass-v0"""
    num_envs: int | None = None
    """environments stepped side by side; if not given, 200 ants or 100 points"""
    env_threads: int = os.cpu_count() or 1
    """native threads that step the ant"""
    contact_forces: bool = False
    """whether the ant sees its contact forces"""
    dims: int = 2
    """dimensions of PointMass-v0"""
    max_steps: int | None = None
    """steps of an episode at most, evaluations too; if not given, 500 for the ant (400 in evaluations), else 200"""

    # trust region policy optimization
    num_steps: int | None = None
    """steps of each environment per inner iteration; those of an episode if not given"""
    inner_iterations: int = 5
    """iterations of trust region policy optimization per outer iteration, for each set of goals"""
    hidden: int = 64
    """units in each of the two hidden layers of actor and critic"""
    learn_std: bool | None = None
    """whether the policy's standard deviation is learned or stays 1; if not given, learned, except in PointUMaze-v0"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.98
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
    critic_epochs: int = 5
    """passes of the critic over each batch"""
    critic_batch_size: int = 1000
    """states per update of the critic"""

    # goals
    goals: Literal["gan", "uniform"] = "gan"
    """where goals come from: a Goal GAN, or uniformly from the box, walls included (then no labels and no old goals)"""
    num_goals: int = 200
    """new goals per outer iteration"""
    num_replayed_goals: int = 100
    """old goals per outer iteration"""
    label_rollouts: int = 3
    """episodes per goal that tell how hard it is"""
    least_success: float = 0.1
    """goals that the agent reaches no more often than that are too hard"""
    most_success: float = 0.9
    """goals that the agent reaches no less often than that are too easy"""
    goal_noise: float = 0.5
    """standard deviation of what is added to generated goals, in metres"""
    goal_distance: float = 0.3
    """least distance of any two goals that are kept for replay, in metres"""
    gan_updates: int = 250
    """updates of generator and discriminator per outer iteration"""
    gan_batch_size: int = 64
    """goals per update of the discriminator"""
    gan_lr: float = 1e-3
    """step size of RMSprop for generator and discriminator"""

    # recall traces
    recall: Literal["none", "random", "learned"] = "learned"
    """none: Goal GAN alone; learned: with a backtracking model (Eq. 2); random: an untrained one (App. F)"""
    num_traces: int = 64
    """recall traces per imitation update, each from a state of its own (so the paper's N, traces per state, is 1)"""
    trace_length: int | None = None
    """longest trace in steps; if not given, 50 for the ant and 20 for the others (App. D)"""
    recall_every: int = 1
    """a recall phase comes every so many outer iterations, after the first inner iteration"""
    recall_updates: int = 20
    """imitation updates per recall phase, each with new traces"""
    buffer_size: int = 100_000
    """steps that the buffer holds, of successful trajectories only, the newest"""
    backtracking_updates: int = 100
    """backtracking model updates per recall phase (App. C)"""
    backtracking_batch_size: int = 256
    """(state, action, next state) tuples per backtracking model update"""
    backtracking_lr: float = 1e-3
    """step size of Adam for the backtracking model (beta in Alg. 1)"""
    imitation_lr: float = 1e-3
    """step size of Adam for the imitation of traces"""
    imitation_kl: float | None = None
    """largest mean KL divergence between the policies before and after a recall phase; if not given, 0.005 for the ant
    and 0.02 for the points"""
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


class GoalGAN(nn.Module):
    """Generator (noise -> goal) and discriminator (goal -> how good a goal it is) of Goal GAN (Held et al., 2018).

    Both work on goals in a unit box; the generator's image is twice as wide as the box, and clipped to it.
    """

    NOISE = 4

    def __init__(self, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.register_buffer("centre", torch.from_numpy((low + high) / 2).float())
        self.register_buffer("reach", torch.from_numpy((high - low) / 2).float())
        self.generator = mlp(self.NOISE, 256, len(low), nn.ReLU)
        layers = [nn.Linear(len(low), 128), nn.LeakyReLU(0.1), nn.Linear(128, 128), nn.LeakyReLU(0.1)]
        self.discriminator = nn.Sequential(*layers, nn.Linear(128, 1))

    def generate(self, noise: torch.Tensor) -> torch.Tensor:
        """Goals (n, G) in the unit box, or up to twice as far out, made of normal noise (n, 4)."""
        return 2 * self.generator(noise).tanh()

    def goals(self, noise: torch.Tensor, goal_noise: torch.Tensor) -> torch.Tensor:
        """Goals (n, G) in metres, within the box."""
        with torch.no_grad():
            goals = self.centre + self.reach * self.generate(noise) + goal_noise
        return goals.clamp(self.centre - self.reach, self.centre + self.reach)

    def losses(self, goals: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> tuple:
        """Losses of the discriminator on goals (n, G) with labels (n,) 0 or 1, and of the generator, least-squares GANs
        (Mao et al., 2017) with targets 2 y - 1 for goals, -1 for generated ones, and 1 for the generator."""
        real = self.discriminator((goals - self.centre) / self.reach).squeeze(-1)
        made = self.generate(noise)
        fake = self.discriminator(made.detach()).squeeze(-1)
        judged = self.discriminator(made).squeeze(-1)
        return ((real - (2 * labels - 1)) ** 2).mean() + ((fake + 1) ** 2).mean(), ((judged - 1) ** 2).mean()


def as_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def normal(rng: np.random.Generator, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return as_tensor(rng.standard_normal(shape, dtype=np.float32), device)


# ------------------------------------------------------------------------------------------------------ experience


class Rollout(NamedTuple):
    """What `num_steps` steps of all environments gave, arrays (num_steps, num_envs, ...). States end with the goal."""

    states: np.ndarray
    actions: np.ndarray  # as the policy drew them; the environments clip them to [-1, 1]
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    next_states: np.ndarray  # the last state of an episode, not the first of the next


class Tuples(NamedTuple):
    """Tuples of trajectories, arrays or tensors (B, ...). States are without goals."""

    states: np.ndarray
    actions: np.ndarray  # from -1 to 1
    next_states: np.ndarray
    goals: np.ndarray
    times: np.ndarray  # steps since the episode's start


class TrajectoryBuffer:
    """B: the newest trajectories that reached their goal, `capacity` steps in all.

    Every tenth trajectory is held out: the backtracking model never sees it, so that it can be tested on it.
    """

    def __init__(self, capacity: int, state_dim: int):
        self.capacity, self.state_dim = capacity, state_dim
        self.trajectories: list[Tuples] = []  # oldest first
        self.number = 0  # of trajectories so far

    def held_out(self) -> list[bool]:
        """Which of the trajectories are held out."""
        first = self.number - len(self.trajectories)
        return [(first + i) % 10 == 9 for i in range(len(self.trajectories))]

    def add(self, rollout: Rollout) -> None:
        """Adds those of the rollout's episodes that reached their goal."""
        for i in range(rollout.rewards.shape[1]):
            start = 0
            for end in (np.flatnonzero(rollout.terminated[:, i] | rollout.truncated[:, i]) + 1).tolist():
                if rollout.rewards[end - 1, i] > 0:
                    states, goals = np.split(rollout.states[start:end, i].copy(), [self.state_dim], axis=-1)
                    next_states = rollout.next_states[start:end, i, : self.state_dim].copy()
                    actions = rollout.actions[start:end, i].clip(-1, 1)
                    self.trajectories.append(Tuples(states, actions, next_states, goals, np.arange(end - start)))
                    self.number += 1
                start = end
        steps = sum(len(tuples.times) for tuples in self.trajectories)
        while len(self.trajectories) > 1 and steps > self.capacity:
            steps -= len(self.trajectories.pop(0).times)

    def state_dict(self) -> dict:
        columns = zip(*self.trajectories, strict=True)
        lengths = [len(tuples.times) for tuples in self.trajectories]
        columns = [as_tensor(np.concatenate(column), "cpu") for column in columns]
        return {"columns": columns, "lengths": lengths, "number": self.number}

    def load_state_dict(self, state: dict) -> None:
        ends = np.cumsum(state["lengths"], dtype=int)
        columns = [np.split(column.numpy(), ends[:-1]) for column in state["columns"]]
        self.trajectories, self.number = [Tuples(*part) for part in zip(*columns, strict=True)], state["number"]


# ------------------------------------------------------------------------------------------------------ TRPO


@torch.no_grad()
def greedy_actions(actor: Actor, states: np.ndarray) -> np.ndarray:
    """The policy's means (B, A) in states (B, S)."""
    return actor(as_tensor(states, actor.log_std.device))[0].cpu().numpy()


def collect_rollout(envs: GoalVectorEnv, actor: Actor, goals: np.ndarray, num_steps: int, rng):
    """`num_steps` steps of the policy in all environments, from their start; each episode has one of the goals (n, G).

    Returns the Rollout and (return, length) of the episodes that ended.
    """
    std, ended = actor.log_std.detach().exp().cpu().numpy(), []
    noise = std * rng.standard_normal((num_steps, envs.num_envs, len(std)), dtype=np.float32)
    chosen = rng.integers(len(goals), size=(num_steps + 1, envs.num_envs))  # of an episode that begins at each step
    states, _ = envs.reset(seed=0, options={"goals": goals[chosen[-1]]})
    shape = num_steps, envs.num_envs
    columns = np.empty((*shape, states.shape[1]), np.float32), np.empty_like(noise), np.empty(shape, np.float32)
    rollout = Rollout(*columns, np.empty(shape, bool), np.empty(shape, bool), np.empty_like(columns[0]))
    for t in range(num_steps):
        rollout.states[t], rollout.actions[t] = states, greedy_actions(actor, states) + noise[t]
        envs.next_goals[:], lengths = goals[chosen[t]], envs.steps + 1
        states, rollout.rewards[t], rollout.terminated[t], rollout.truncated[t], infos = envs.step(rollout.actions[t])
        rollout.next_states[t] = infos.get("final_obs", states)
        done = np.flatnonzero(rollout.terminated[t] | rollout.truncated[t])
        ended += zip(rollout.rewards[t, done].tolist(), lengths[done].tolist(), strict=True)
    return rollout, ended


def successes(envs: GoalVectorEnv, actor: Actor, goals: np.ndarray, episodes: int, rng) -> np.ndarray:
    """Whether the policy reaches goals (n, G), each tried in so many episodes, (episodes, n)."""
    std = actor.log_std.detach().exp().cpu().numpy()
    goals = np.tile(goals, (episodes, 1))  # one job each; an environment that is ready takes the next
    results, left, taken = np.zeros(len(goals) + 1), len(goals), 2 * envs.num_envs
    job, next_job = np.arange(taken).clip(max=len(goals)).reshape(2, -1)  # the last number is no job
    goals = np.concatenate((goals, goals[:1]))
    states, _ = envs.reset(seed=0, options={"goals": goals[job]})
    while left:
        envs.next_goals[:] = goals[next_job]
        noise = std * rng.standard_normal((envs.num_envs, len(std)), dtype=np.float32)
        states, rewards, terminated, truncated, _ = envs.step(greedy_actions(actor, states) + noise)
        for i in np.flatnonzero(terminated | truncated):
            results[job[i]] = rewards[i]
            left -= int(job[i] < len(goals) - 1)
            job[i], next_job[i] = next_job[i], min(taken, len(goals) - 1)
            taken += 1
    return results[:-1].reshape(episodes, -1)


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


# ------------------------------------------------------------------------------------------------------ goals


class GoalReplay:
    """Goals of once intermediate difficulty and places where the agent was, no two closer than `distance`."""

    def __init__(self, goal_dim: int, distance: float):
        self.goals, self.distance = np.zeros((0, goal_dim)), distance

    def add(self, goals: np.ndarray) -> None:
        """Adds those of the goals (n, G), in their order, that are far enough from all others."""
        for goal in self.goals:
            goals = goals[((goals - goal) ** 2).sum(-1) >= self.distance**2]
        while len(goals):
            goal, goals = goals[0], goals[1:]
            self.goals = np.concatenate((self.goals, goal[None]))
            goals = goals[((goals - goal) ** 2).sum(-1) >= self.distance**2]

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """At most so many of them, each at most once."""
        return self.goals[rng.permutation(len(self.goals))[:count]]

    def state_dict(self) -> dict:
        return {"goals": torch.from_numpy(self.goals.copy())}

    def load_state_dict(self, state: dict) -> None:
        self.goals = state["goals"].numpy()


def draw_goals(gan: GoalGAN, count: int, args: Args, rng: np.random.Generator) -> np.ndarray:
    """New goals (count, G): generated, or uniform in the box."""
    low, high = (gan.centre - gan.reach).cpu().numpy(), (gan.centre + gan.reach).cpu().numpy()
    if args.goals == "uniform":
        return rng.uniform(low, high, (count, len(low)))
    noise, goal_noise = normal(rng, (count, gan.NOISE), args.device), normal(rng, (count, len(low)), args.device)
    return gan.goals(noise, args.goal_noise * goal_noise).cpu().numpy().astype(np.float64)


def update_goal_gan(gan: GoalGAN, optimizers, goals: np.ndarray, labels: np.ndarray, args: Args, rng) -> dict:
    """`--gan-updates` steps of discriminator and generator on goals (n, G) with labels (n,); returns losses."""
    goals, labels = (as_tensor(np.asarray(x, dtype=np.float32), args.device) for x in (goals, labels))
    for _ in range(args.gan_updates):
        rows = as_tensor(rng.integers(len(goals), size=args.gan_batch_size), args.device)
        noise = normal(rng, (args.gan_batch_size, gan.NOISE), args.device)
        for optimizer, which in zip(optimizers, (0, 1), strict=True):
            loss = gan.losses(goals[rows], labels[rows], noise)[which]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    discriminator_loss, generator_loss = gan.losses(goals[rows], labels[rows], noise)
    losses = {"discriminator_loss": discriminator_loss, "generator_loss": generator_loss}
    return {f"losses/{name}": loss.detach() for name, loss in losses.items()}


# ------------------------------------------------------------------------------------------------------ recall traces


def successful_tuples(buffer: TrajectoryBuffer, device: str, held_out: bool = False) -> Tuples | None:
    """The tuples of the trajectories that reached their goal (Alg. 1, line 8), or of those that are held out."""
    chosen = [tuples for tuples, held in zip(buffer.trajectories, buffer.held_out(), strict=True) if held == held_out]
    if not chosen:
        return None
    return Tuples(*(as_tensor(np.concatenate(column), device) for column in zip(*chosen, strict=True)))


def high_value_states(envs, gan: GoalGAN, poses: np.ndarray | None, buffer: TrajectoryBuffer, count: int, args, rng):
    """States (count, S), and their goals (count, G), that the Goal GAN calls valuable (Alg. 2, lines 2 to 4).

    Of twice as many goals these are the half nearer to goals that have been reached; others may lie in walls. D turns a
    goal into a state that has just reached it, at the offset at which the trajectory with the nearest goal (the oldest,
    if several had that one) ended from its own: an ant in a pose of `poses`, or a point with that trajectory's last
    velocity.
    """
    goals = draw_goals(gan, 2 * count, args, rng)  # Alg. 2, line 2
    reached, oldest = np.unique([tuples.goals[-1] for tuples in buffer.trajectories], axis=0, return_index=True)
    ends = np.stack([buffer.trajectories[i].next_states[-1] for i in oldest])
    distances, nearest = KDTree(reached).query(goals)
    chosen = rng.permutation(distances.argsort(stable=True)[:count])
    goals, nearest = goals[chosen], nearest[chosen]
    places = goals + (ends[:, envs.places] - reached)[nearest]
    if args.env_id == "AntUMaze-v0":  # Alg. 2, line 3
        states = envs.decode(places, poses[rng.integers(len(poses), size=count)])
    else:
        states = np.concatenate((places, ends[nearest, places.shape[1] :]), axis=1)
    return tuple(as_tensor(x.astype(np.float32), args.device) for x in (states, goals))  # Alg. 2, line 4


def update_backtracking_model(model: BacktrackingModel, optimizer, batch: Tuples) -> dict[str, torch.Tensor]:
    """One maximum likelihood step on some of the successful tuples (Alg. 1, line 9); returns losses."""
    of_actions, of_changes = model.log_prob(batch.states, batch.actions, batch.next_states)
    losses = {"recall/action_nll": -of_actions.mean(), "recall/state_nll": -of_changes.mean()}
    losses["recall/backtracking_loss"] = sum(losses.values())  # Eq. (2)
    optimizer.zero_grad()
    losses["recall/backtracking_loss"].backward()
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


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


def outside(places: torch.Tensor, goals: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Where the goals (N, G) have not been reached yet, (length, N); there an episode to them would go on."""
    return ((places - goals) ** 2).sum(-1) >= tolerance**2


def split_traces(states, goals, actions, in_trace, num_traces: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs (n, S + G) and (n, A) of so many traces (length, N, ...) at a time, which end at goals (N, G)."""
    states = torch.cat((states, goals.expand(len(states), *goals.shape)), dim=-1)  # relabelled
    parts = zip(*(column.split(num_traces, dim=1) for column in (states, actions, in_trace)), strict=True)
    return [(states[inside], actions[inside]) for states, actions, inside in parts]


def imitate(actor: Actor, optimizer, traces: list, states: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """Steps that raise log pi(a | s) on the pairs of traces (Alg. 1, lines 12 and 13), shortened until the policy has
    changed by no more than --imitation-kl on the states (n, S) of the last rollout; returns losses."""
    before = parameters_to_vector(actor.parameters()).detach()
    old_policy, losses = [part.detach().clone() for part in actor(states)], {}
    for trace_states, actions in traces:
        if len(actions) == 0:
            continue
        loss = -actor.log_prob_of_clipped(trace_states, actions).mean()  # Eq. (3), its mean over the pairs
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


class Comparison(NamedTuple):
    """Imagined and real backward trajectories from the same high-value states, (length, N, ...)."""

    starts: torch.Tensor  # (N, S)
    real: torch.Tensor
    known: torch.Tensor  # where there is a real predecessor, one of the same episode
    imagined: torch.Tensor
    in_trace: torch.Tensor


@torch.no_grad()
def compare_traces(model: BacktrackingModel, buffer: TrajectoryBuffer, length: int, args: Args, rng):
    """Recall traces beside what really led to the goals of trajectories that the model has not learned from."""
    tuples = successful_tuples(buffer, args.device, held_out=True)
    if tuples is None:
        return None
    ends = torch.nonzero(tuples.times.diff(append=tuples.times.new_zeros(1)) <= 0).squeeze(-1)[-256:]
    steps = torch.arange(length, device=args.device)[:, None]
    known, starts = tuples.times[ends] >= steps, tuples.next_states[ends]
    real = tuples.states[(ends - steps).clamp(min=0)]
    imagined, _, in_trace = recall_traces(model, starts, length, args, rng)
    return Comparison(starts, real, known, imagined, in_trace)


def trace_errors(model: BacktrackingModel, compared: Comparison) -> torch.Tensor:
    """Root mean square distance of imagined from real predecessors, in standard deviations of the states, (length,)."""
    distances = ((compared.imagined - compared.real) / model.state_std).square().mean(-1).sqrt()
    counted = (compared.known & compared.in_trace).float()
    return (counted * distances).sum(-1) / counted.sum(-1)  # nan where there is none


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluation_goals(envs: GoalVectorEnv, args: Args) -> np.ndarray:
    """Those on which coverage is measured: 112 in the mazes, 50 uniform ones in the box of the point mass."""
    if args.env_id != "PointMass-v0":
        return coverage_goals()
    return np.stack([envs.draw_goal(np.random.default_rng([0, i])) for i in range(50)])


def draw_curve(evaluations: list[tuple[int, float]], batch: int, title: str) -> Figure:
    """Coverage against outer iterations of `batch` steps, with the environment steps above."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    steps, coverage = zip(*evaluations, strict=True)
    ax.plot(np.array(steps) / batch, coverage, marker=".")
    ax.set(title=title, xlabel="outer iterations", ylabel="coverage", ylim=(0, 1))
    ax.secondary_xaxis("top", functions=(lambda x: x * batch / 1e6, lambda x: x * 1e6 / batch)).set_xlabel(
        "million environment steps"
    )
    return figure


def write_video(path: Path, args: Args, actor: Actor) -> None:
    """Writes an episode of the greedy agent as a GIF, on its way to the far end of the maze or to a goal in the box."""
    envs = make_envs(args, 1)
    goal = FREE[4] if args.env_id != "PointMass-v0" else evaluation_goals(envs, args)[0]
    states, _ = envs.reset(seed=args.seed, options={"goals": goal[None]})
    frames = [Image.fromarray(envs.image())]
    for step in range(envs.max_steps):
        states, _, terminated, truncated, _ = envs.step(greedy_actions(actor, states))
        if terminated[0] or truncated[0]:
            break
        if step % 2:
            frames.append(Image.fromarray(envs.image()))
    envs.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0)


def draw_traces(model: BacktrackingModel, compared: Comparison, envs: GoalVectorEnv, args: Args) -> Figure:
    """Imagined and real backward trajectories over the maze (or two dimensions of the box), and the error by step."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    plane, errors = figure.subplots(1, 2)
    if args.env_id != "PointMass-v0":
        draw_maze(plane)
    starts, real, imagined = (x[..., envs.places][..., :2] for x in (compared.starts, compared.real, compared.imagined))
    shown = compared.known.sum(0).argsort(descending=True, stable=True)[:32].tolist()
    for label, states, kept, style in (
        ("real", real, compared.known, "k-"),
        ("imagined", imagined, compared.in_trace, "C1-"),
    ):
        for n, i in enumerate(shown):
            way = torch.cat((starts[None, i], states[:, i][kept[:, i]]))
            plane.plot(*way.T.cpu().numpy(), style, lw=1, alpha=0.7, marker=".", ms=3, label=None if n else label)
    plane.plot(*starts[shown].T.cpu().numpy(), "C0*", ms=9, ls="", label="high-value state")
    plane.set(title="Backward trajectories from high-value states", xlabel="x [m]", ylabel="y [m]")
    still = compared._replace(imagined=compared.starts.expand_as(compared.real))
    steps = np.arange(1, len(compared.real) + 1)
    errors.plot(steps, trace_errors(model, compared).cpu(), "C1", marker=".", label="imagined")
    errors.plot(steps, trace_errors(model, still).cpu(), "k--", label="standing still")
    survival = compared.in_trace.float().mean(-1).cpu()
    errors.plot(steps, survival, "C2:", label="share of traces inside the data")
    errors.set(title="Distance from the real predecessors", xlabel="steps back", ylim=(0, None))
    errors.set_ylabel("standard deviations of the states")
    plane.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    errors.legend()
    return figure


# ------------------------------------------------------------------------------------------------------ checkpoint


def fail(message: str) -> None:
    """Ends the program with one line that names the flag and what would be accepted, and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


MAX_STEPS = {"AntUMaze-v0": 500, "PointUMaze-v0": 200, "PointMass-v0": 200}
NUM_ENVS = {"AntUMaze-v0": 200, "PointUMaze-v0": 100, "PointMass-v0": 100}


def make_envs(args: Args, num_envs: int, evaluation: bool = False) -> GoalVectorEnv:
    max_steps = 400 if evaluation and args.env_id == "AntUMaze-v0" else MAX_STEPS[args.env_id]
    options = {"max_steps": args.max_steps or max_steps}
    if args.env_id == "AntUMaze-v0":
        options |= {"contact_forces": args.contact_forces, "num_threads": args.env_threads}
    elif args.env_id == "PointMass-v0":
        options["dims"] = args.dims
    return gym.make_vec(args.env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", **options)


def with_defaults(args: Args) -> Args:
    """Fills in what depends on the environment (Held et al., 2018; App. D)."""
    ant = args.env_id == "AntUMaze-v0"
    num_envs = args.num_envs or NUM_ENVS[args.env_id]
    num_steps = args.num_steps or args.max_steps or MAX_STEPS[args.env_id]
    batch = num_envs * num_steps
    return replace(
        args,
        num_envs=num_envs,
        num_steps=num_steps,
        trace_length=args.trace_length or (50 if ant else 20),
        imitation_kl=(0.005 if ant else 0.02) if args.imitation_kl is None else args.imitation_kl,
        learn_std=args.env_id != "PointUMaze-v0" if args.learn_std is None else args.learn_std,
        total_timesteps=args.total_timesteps or 40 * args.inner_iterations * batch,
        eval_every=args.eval_every or args.inner_iterations * batch,
        checkpoint_every=args.checkpoint_every or batch,
    )


AT_MOST = {"gamma": 1, "gae_lambda": 1, "least_success": 1, "most_success": 1, "seed": 2**63 - 1, "env_threads": 1024}
AT_MOST |= {"hidden": 10**4, "goal_distance": 10**6, "gan_lr": 1e38}
AT_MOST |= dict.fromkeys(("num_traces", "critic_batch_size", "backtracking_batch_size", "max_steps"), 10**5)
AT_MOST |= dict.fromkeys(("num_goals", "num_replayed_goals", "gan_batch_size", "label_rollouts"), 10**5)
AT_MOST |= dict.fromkeys(("num_envs", "num_steps"), 10**5)
AT_MOST |= dict.fromkeys(("cg_iterations", "line_search_steps", "trace_length", "eval_episodes", "torch_threads"), 1000)
AT_MOST |= dict.fromkeys(("recall_updates", "backtracking_updates", "buffer_size"), 10**9)


def check(args: Args) -> None:
    """Fails on the first argument that is out of range."""
    if args.env_id not in MAX_STEPS:
        fail(f"--env-id must be one of {', '.join(MAX_STEPS)}, got {args.env_id}")
    for name, value in vars(args).items():
        least = 0 if isinstance(value, float | bool) or name in ("seed", "num_replayed_goals") else 1
        most = AT_MOST.get(name, sys.float_info.max)
        if isinstance(value, int | float) and not least <= value <= most:
            allowed = f"from {least} to {most}" if name in AT_MOST else f"of at least {least}"
            fail(f"--{name.replace('_', '-')} must be a number {allowed}, got {value}")
    if args.max_kl == 0:
        fail("--max-kl must be greater than 0, got 0.0")
    if args.least_success >= args.most_success:
        fail(f"--least-success must be less than --most-success, got {args.least_success} and {args.most_success}")
    if not 2 <= args.dims <= 6:
        fail(f"--dims must be from 2 to 6, got {args.dims}")
    if args.dims != 2 and args.env_id != "PointMass-v0":
        fail(f"--dims is for PointMass-v0, {args.env_id} has its own")
    if args.contact_forces and args.env_id != "AntUMaze-v0":
        fail(f"--contact-forces is for AntUMaze-v0, {args.env_id} has none")
    whole = with_defaults(args)
    if args.num_traces * args.recall_updates * whole.trace_length > 10**7:
        fail(f"--num-traces times --recall-updates times --trace-length must be at most {10**7}")
    rows = args.backtracking_updates * args.backtracking_batch_size
    if rows > 10**8:
        fail(f"--backtracking-updates times --backtracking-batch-size must be at most {10**8}, got {rows}")
    if not 2 <= whole.num_envs * whole.num_steps <= 10**7:
        given = f"{whole.num_envs} times {whole.num_steps}"
        fail(f"--num-envs times --num-steps must be from 2 to {10**7}, got {given}")
    try:
        torch.zeros(1, device=args.device, dtype=torch.float64).cpu()
    except Exception:  # each kind of device has its own
        fail(f"--device {args.device} is not available here, a new run can have --device cpu")
    if args.capture_video:
        try:
            envs = make_envs(args, 1)
            envs.reset()
            envs.image()
            envs.close()
        except Exception as error:  # every renderer has its own
            fail(f"--capture-video cannot draw {args.env_id} here (MUJOCO_GL=osmesa may help): {error}")


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
    """--evaluate: measures the coverage of a trained agent, and may write a GIF."""
    own = ("seed", "device", "torch_threads", "eval_episodes", "capture_video")
    saved, checkpoint = read_run(args, "evaluate", own)
    if checkpoint is None:
        fail(f"--evaluate: {args.evaluate} has no checkpoint.pt yet")
    saved = replace(saved, **{name: getattr(args, name) for name in own})
    check(saved)
    torch.set_num_threads(args.torch_threads)
    envs = make_envs(saved, saved.num_envs, evaluation=True)
    goals = evaluation_goals(envs, saved)
    state_dim, action_dim = *envs.single_observation_space.shape, *envs.single_action_space.shape
    actor = Actor(Normaliser(state_dim), state_dim, action_dim, saved.hidden).to(args.device)
    try:
        actor.load_state_dict(checkpoint["actor"])
    except RuntimeError:  # networks of another task
        fail(f"--evaluate: {args.evaluate / 'checkpoint.pt'} is not a checkpoint of this run")
    rng = np.random.default_rng([saved.seed, 4, checkpoint["step"]])
    returns = successes(envs, actor, goals, args.eval_episodes, rng).mean(-1)
    for i, coverage in enumerate(returns):
        print(f"episode {i}: return {coverage:.2f}, the mean over {len(goals)} goals")
    print(f"mean return {returns.mean():.2f}, which is the coverage")
    if args.capture_video:
        path = args.evaluate / f"agent_{checkpoint['step']}.gif"
        write_video(path, saved, actor)
        print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------------ main


def main(args: Args) -> None:
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    if args.evaluate is not None:
        return evaluate_run(args)
    checkpoint = None
    if args.resume is not None:
        args, checkpoint = resume_run(args)
    else:
        name = f"{args.env_id}__{Path(__file__).stem}__{args.recall}__seed{args.seed}__{int(time.time())}"
        check(args)
        args = with_defaults(replace(args, run_dir=args.run_dir or Path("runs", name)))
        make_run_dir(args.run_dir)

    torch.set_num_threads(args.torch_threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any, and filling takes time
    envs = make_envs(args, args.num_envs)
    eval_envs = make_envs(args, args.num_envs, evaluation=True)
    state_dim, action_dim = *envs.single_observation_space.shape, *envs.single_action_space.shape
    torch.manual_seed(args.seed)
    normaliser = Normaliser(state_dim)
    actor = Actor(normaliser, state_dim, action_dim, args.hidden).to(args.device)  # Alg. 1, line 1
    if not args.learn_std:
        actor.log_std.register_hook(torch.zeros_like)  # its gradient is always 0
    critic = Critic(normaliser, state_dim, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(critic.net.parameters(), lr=args.critic_lr, fused=True)
    gan = GoalGAN(envs.goal_space.low, envs.goal_space.high).to(args.device)
    gan_optimizers = [torch.optim.RMSprop(n.parameters(), lr=args.gan_lr) for n in (gan.discriminator, gan.generator)]
    replay = GoalReplay(envs.goal_dim, args.goal_distance)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer, "gan": gan, "goal_replay": replay}
    parts |= {"discriminator_optimizer": gan_optimizers[0], "generator_optimizer": gan_optimizers[1]}
    names = ("rollout", "update", "goals", "labels")
    rngs = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(names)}
    poses = None
    if args.recall != "none":
        model = BacktrackingModel(state_dim - envs.goal_dim, action_dim).to(args.device)  # Alg. 1, line 2
        buffer = TrajectoryBuffer(args.buffer_size, state_dim - envs.goal_dim)
        imitation_optimizer = torch.optim.Adam(actor.parameters(), lr=args.imitation_lr, fused=True)
        parts |= {"backtracking_model": model, "buffer": buffer, "imitation_optimizer": imitation_optimizer}
        if args.recall == "learned":
            model_optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr, fused=True)
            parts["backtracking_optimizer"] = model_optimizer
        rngs["recall"] = np.random.default_rng([args.seed, 5])
        if args.env_id == "AntUMaze-v0":
            poses = envs.feasible_states(200, np.random.default_rng([args.seed, 6]))
    goals = np.zeros((0, envs.goal_dim))  # of this outer iteration
    step, losses, evaluations = 0, {}, []  # evaluations: (step, coverage)
    finished = []  # (return, length) of the episodes since the last evaluation
    if checkpoint:
        try:
            for name, part in parts.items():  # copied, so that the file can go
                part.load_state_dict(deepcopy(checkpoint[name]))
            for name, rng in rngs.items():
                rng.bit_generator.state = checkpoint["rngs"][name]
            step, losses, goals = checkpoint["step"], deepcopy(checkpoint["losses"]), checkpoint["goals"].numpy().copy()
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
        state |= {"finished": finished, "evaluations": evaluations, "goals": torch.from_numpy(goals)}
        replace_file(args.run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    def check_losses() -> None:
        for name, loss in losses.items():
            if not np.isfinite(float(loss)):
                stop(f"{name} is {losses[name]}")

    def stop(reason: str) -> None:
        sys.exit(f"error: {reason} at step {step}; {args.run_dir} keeps the last good checkpoint")

    def log() -> None:
        check_losses()
        rng = np.random.default_rng([args.seed, 4, step])
        rates = successes(eval_envs, actor, evaluation_goals(eval_envs, args), args.eval_episodes, rng).mean(0)
        evaluations.append((step, float(rates.mean())))
        scalars = {"eval/coverage": rates.mean(), "eval/return": rates.mean(), **losses}
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
        if args.env_id != "PointMass-v0":
            show("coverage", draw_coverage(rates, f"{rates.mean():.0%} coverage after {step} steps"))
        progress.set_postfix_str(f"coverage {rates.mean():.2f}")

    def show(name: str, figure: Figure) -> None:
        figure.savefig(args.run_dir / f"{name}.png", dpi=120)
        image = np.asarray(Image.open(args.run_dir / f"{name}.png").convert("RGB"))
        writer.add_image(f"pictures/{name}", image, step, dataformats="HWC")

    def compare() -> Comparison | None:
        if "recall/imitation_kl" not in losses:  # no recall phase yet
            return None
        return compare_traces(model, buffer, args.trace_length, args, np.random.default_rng([args.seed, 7, step]))

    def write_pictures() -> None:
        title = f"{args.env_id}, recall {args.recall}, seed {args.seed}"
        show("returns", draw_curve(evaluations, outer_batch, title))
        if compared := compare():
            show("traces", draw_traces(model, compared, envs, args))
        if args.capture_video:
            write_video(args.run_dir / "agent.gif", args, actor)

    batch, first_step, started = args.num_envs * args.num_steps, step, time.time()
    outer_batch, places = args.inner_iterations * batch, envs.places
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

            if step == 0 and args.goals == "gan":  # the generator first learns where the agent goes by itself
                everywhere = rngs["goals"].uniform(envs.goal_space.low, envs.goal_space.high, (1000, envs.goal_dim))
                rollout, _ = collect_rollout(envs, actor, everywhere, args.num_steps, rngs["labels"])
                visited = rollout.states[..., places].reshape(-1, envs.goal_dim)
                losses |= update_goal_gan(gan, gan_optimizers, visited, np.ones(len(visited)), args, rngs["goals"])
            if step % outer_batch == 0:
                check_losses()  # the environments take nan for "any goal"
                new = draw_goals(gan, args.num_goals, args, rngs["goals"])
                goals = np.concatenate((new, replay.sample(args.num_replayed_goals, rngs["goals"])))

            # Alg. 1, line 4: execute the policy
            rollout, ended = collect_rollout(envs, actor, goals, args.num_steps, rngs["rollout"])
            finished += ended
            # Alg. 1, lines 6 and 7: improve the policy with the RL algorithm
            losses |= update_trpo(actor, critic, optimizer, rollout, args, rngs["update"])
            seen = as_tensor(rollout.states, args.device).flatten(0, 1)
            normaliser.add(seen)  # only now, so that rollout and update saw the same policy
            step += batch
            progress.update(batch)
            if args.recall != "none":
                buffer.add(rollout)  # Alg. 1, line 5
            if args.goals == "gan" and step % outer_batch == 0:  # which goals are of intermediate difficulty now?
                rates = successes(envs, actor, goals, args.label_rollouts, rngs["labels"]).mean(0)
                labels = (rates > args.least_success) & (rates < args.most_success)
                losses |= update_goal_gan(gan, gan_optimizers, goals, labels, args, rngs["goals"])
                losses["goals/intermediate"] = torch.tensor(labels.mean())
                visited = rollout.next_states[..., places].reshape(-1, envs.goal_dim)
                visited = visited[np.isfinite(visited).all(-1)]  # a simulation may break
                replay.add(np.concatenate((goals[labels], rngs["goals"].permutation(visited)[:10_000])))

            # Recall follows the first inner iteration on new goals, which did best in trials (docs, What was tried).
            if args.recall == "none" or (step - batch) % (outer_batch * args.recall_every):
                continue
            tuples, rng = successful_tuples(buffer, args.device), rngs["recall"]  # Alg. 1, line 8
            if tuples is None or len(tuples.times) < 2:
                continue
            model.normalise_by(tuples)
            if args.recall == "learned":
                shape = args.backtracking_updates, args.backtracking_batch_size
                for rows in as_tensor(rng.integers(len(tuples.times), size=shape), args.device):
                    some = Tuples(*(column[rows] for column in tuples))
                    losses |= update_backtracking_model(model, model_optimizer, some)  # Alg. 1, line 9
            # Alg. 1, lines 10 and 11: recall traces from states at the goals that the GAN proposes
            count = args.num_traces * args.recall_updates
            starts, their_goals = high_value_states(envs, gan, poses, buffer, count, args, rng)
            losses["recall/start_value"] = critic(torch.cat((starts, their_goals), dim=-1)).mean().detach()
            trace_states, actions, in_trace = recall_traces(model, starts, args.trace_length, args, rng)
            # Alg. 1, lines 12 and 13: imitate them
            in_trace &= outside(trace_states[..., places], their_goals, envs.tolerance)
            traces = split_traces(trace_states, their_goals, actions, in_trace, args.num_traces)
            losses |= imitate(actor, imitation_optimizer, traces, seen, args)

        save_checkpoint()
        log()
        write_pictures()
    if args.recall != "none" and "recall/start_value" not in losses:
        print("no recall phase: no goal had been reached when one was due", file=sys.stderr)
    print(f"pictures, curves and the trained agent are in {args.run_dir}")


if __name__ == "__main__":
    main(tyro.cli(Args))
