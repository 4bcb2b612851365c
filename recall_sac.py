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
"""Soft actor-critic with recall traces for continuous control (Goyal et al., ICLR 2019, sections 6.5, C, E.2, F and H).

A backtracking model imagines, from the states that the critic values most, which (state, action) pairs may have led
there; the policy imitates these recall traces. This file is all there is.

    python recall_sac.py --capture-video                      # HalfCheetah-v5
    python recall_sac.py --recall none                        # plain soft actor-critic
    python recall_sac.py --evaluate RUN_DIR                   # play the trained agent

A run of 100 000 steps takes 20 to 40 minutes on one core. On HalfCheetah and Hopper recall traces may gain a little,
but those of an untrained model no less: see docs/recall_sac.md.
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1
    """seed of networks, environments and all sampling"""
    total_timesteps: int | None = None
    """environment steps in all, over all environments (100 000 if not given); may grow with --resume"""
    run_dir: Path | None = None
    """folder of this run; runs/<env>__<script>__<recall>__seed<seed>__<time> if not given"""
    resume: Path | None = None
    """go on with the interrupted run in this folder, with its own arguments"""
    evaluate: Path | None = None
    """play --eval-episodes episodes with the agent in this folder and print their returns"""
    eval_every: int = 5_000
    """environment steps between evaluations of the greedy policy"""
    eval_episodes: int = 10
    """episodes per evaluation, each time from the same starts"""
    checkpoint_every: int = 10_000
    """environment steps between checkpoints, which hold the replay buffer"""
    capture_video: bool = False
    """write a GIF of the greedy agent, at the end of training or with --evaluate"""
    device: str = "cpu"
    """torch device of networks and replay buffer"""
    torch_threads: int = 1
    """CPU threads of torch"""
    compile: bool = False
    """compile the soft actor-critic update; on a GPU it, acting and the backtracking model's update become CUDA graphs;
    no gain on a CPU"""

    # environment
    env_id: str = "HalfCheetah-v5"
    """Gymnasium id of an environment with a vector of observations, a bounded vector of actions and a time limit"""
    num_envs: int = 1
    """environments stepped side by side"""
    contact_forces: bool = True
    """whether the observations of Ant and Humanoid hold the contact forces, 78 of Ant's 105 numbers"""

    # soft actor-critic
    hidden: int = 256
    """units in each of the two hidden layers of actor and critics"""
    learning_rate: float = 3e-4
    """step size of Adam for actor, critics and temperature"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """how far the target critics move towards the critics after each update"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 1_000_000
    """rows of the replay buffer: one for each environment step, and one more for each episode"""
    learning_starts: int = 5_000
    """environment steps with uniformly random actions before the first update"""
    updates_per_step: float = 1.0
    """updates for each environment step"""
    temperature: float | None = None
    """weight of the policy's entropy; if not given, it is adapted until the entropy is -1 for each action dimension"""
    reward_scale: float = 1.0
    """factor of all rewards that the critics see (Haarnoja et al., 2018a: 5, with --temperature 1)"""

    # recall traces
    recall: Literal["none", "random", "learned"] = "learned"
    """none: plain soft actor-critic; learned: with a backtracking model (Eq. 2); random: an untrained one (App. F)"""
    num_traces: int = 64
    """recall traces per imitation update, each from a state of its own (so the paper's N, traces per state, is 1)"""
    trace_length: int | None = None
    """longest trace in steps; if not given, 50 for Ant and Humanoid and 20 for all others (Table 2)"""
    recall_every: int = 200
    """soft actor-critic updates per recall phase"""
    recall_updates: int = 10
    """imitation updates per recall phase, each with new traces (App. H: 200, 400 or 800 for 200 real updates)"""
    recall_tuples: int = 20_000
    """tuples drawn from the replay buffer for each recall phase (E.2)"""
    top_fraction: float = 0.1
    """k, share of these tuples, those with the most valuable next state, that the backtracking model learns from"""
    backtracking_updates: int = 50
    """backtracking model updates per recall phase (App. C: a hundred for every 5 updates of the policy)"""
    backtracking_batch_size: int = 256
    """(state, action, next state) tuples per backtracking model update"""
    backtracking_lr: float = 1e-3
    """step size of Adam for the backtracking model (beta in Alg. 1)"""
    imitation_lr: float = 3e-4
    """step size of Adam for the imitation of traces"""
    action_noise: float = 1.0
    """standard deviation of imagined actions as a share of the model's own, which is that of the data (App. C)"""
    state_noise: float = 0.5
    """standard deviation of imagined changes of state as a share of the model's own (the paper: 1)"""
    trace_limit: float = 5.0
    """a trace ends where a number of its state is further from the mean of the data, in standard deviations"""


# ------------------------------------------------------------------------------------------------------ networks


def mlp(inputs: int, hidden: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """Two hidden layers."""
    layers = [nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


LARGEST_ACTION = 0.98  # in size, of imagined ones; one clipped to it stands for all beyond it


class Actor(nn.Module):
    """pi_theta(a | s), the tanh of a Gaussian, from states (B, S) to its mean and log std, (B, A) each."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.net = mlp(state_dim, hidden, 2 * action_dim, nn.ReLU)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(states).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, states: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A) made of standard normal noise (B, A), and their log pi(a | s), (B,)."""
        mean, log_std = self(states)
        u = mean + log_std.exp() * noise
        return u.tanh(), tanh_gaussian_log_prob(noise, log_std, u).sum(-1)

    def log_prob_of_clipped(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """log pi(a | s) of actions of traces, (B,). One at +-0.98 stands for all beyond it: log(P(beyond) / 0.02)."""
        mean, log_std = self(states)
        u, bound = actions.clamp(-LARGEST_ACTION, LARGEST_ACTION).atanh(), math.atanh(LARGEST_ACTION)
        std = log_std.exp()
        inside = tanh_gaussian_log_prob((u - mean) / std, log_std, u)
        # The gradient of log_ndtr subtracts large squares, hence doubles; clamped, it is 0 at last.
        deviations = ((actions.sign() * mean - bound) / std).double().clamp(min=-1e6)
        beyond = torch.special.log_ndtr(deviations).float() - math.log(1 - LARGEST_ACTION)
        return torch.where(actions.abs() < LARGEST_ACTION, inside, beyond).sum(-1)


def tanh_gaussian_log_prob(noise: torch.Tensor, log_std: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """log pi of each number of tanh(u), u = mean + std * noise, with log(1 - tanh(u)^2) so that it is never log 0."""
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - log_slope


class TwinLinear(nn.Module):
    """Two linear layers side by side, from (B, inputs) or (2, B, inputs) to (2, B, outputs)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        pair = [nn.Linear(inputs, outputs) for _ in range(2)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in pair]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach().unsqueeze(0) for layer in pair]))

    def forward(self, x: torch.Tensor, frozen: bool) -> torch.Tensor:
        weight, bias = (self.weight.detach(), self.bias.detach()) if frozen else (self.weight, self.bias)
        return torch.baddbmm(bias, x.expand(2, *x.shape[-2:]), weight)


class Critic(nn.Module):
    """Q_1(s, a) and Q_2(s, a), from states (B, S) and actions (B, A) to (2, B).

    `frozen`: the gradient goes through to the actions, but none is computed for the critics' own weights.
    """

    def __init__(self, state_dim: int, action_dim: int, hidden: int):
        super().__init__()
        sizes = state_dim + action_dim, hidden, hidden, 1
        self.layers = nn.ModuleList([TwinLinear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True)])

    def forward(self, states: torch.Tensor, actions: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        x = torch.cat((states, actions), dim=-1)
        for layer in self.layers[:-1]:
            x = layer(x, frozen).relu_()
        return self.layers[-1](x, frozen).squeeze(-1)


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

    def normalise_by(self, tuples: "Batch") -> None:
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
        """States and actions in (-1, 1) before `next_states`, made of normal noise (B, A) and (B, S)."""
        actions = self.action_mean + self.action_std * (self.predict_action(next_states) + action_noise)
        actions = actions.clamp(-LARGEST_ACTION, LARGEST_ACTION)
        mean, log_std = self.predict_change(actions, next_states)
        changes = self.change_mean + self.change_std * (mean + log_std.exp() * state_noise)
        return next_states + changes, actions


def as_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def normal(rng: np.random.Generator, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return as_tensor(rng.standard_normal(shape, dtype=np.float32), device)


# ------------------------------------------------------------------------------------------------------ experience


class Batch(NamedTuple):
    """Transitions: states and next states (B, S), actions (B, A), rewards and terminated (B,), all float32."""

    states: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor
    next_states: torch.Tensor


class ReplayBuffer:
    """B: a ring with one copy of each state, held in columns whose row t * num_envs + i is slot t of environment i.

    A row holds a state and what was done there; the next state is num_envs rows further. The last state of an episode
    has a slot of its own, in which nothing was done.
    """

    def __init__(self, buffer_size: int, num_envs: int, state_dim: int, action_dim: int, device: torch.device | str):
        self.length, self.time, self.full = buffer_size // num_envs, np.zeros(num_envs, dtype=int), False
        self.acted = np.zeros(self.length * num_envs, dtype=bool)  # which rows are transitions
        shapes = {"states": (state_dim,), "actions": (action_dim,), "rewards": (), "terminated": ()}
        self.columns = {k: torch.zeros(len(self.acted), *shape, device=device) for k, shape in shapes.items()}

    def add_state(self, i: int, state: np.ndarray) -> None:
        """The state that environment i is in now."""
        row = self.time[i] * len(self.time) + i
        self.columns["states"][row] = torch.from_numpy(state)
        self.acted[row] = False

    def add_step(self, i: int, action: np.ndarray, reward: float, terminated: bool, next_state: np.ndarray) -> None:
        """What environment i did in its state, and what came of it."""
        row = self.time[i] * len(self.time) + i
        self.columns["actions"][row] = torch.from_numpy(action)
        self.columns["rewards"][row], self.columns["terminated"][row] = reward, float(terminated)
        self.acted[row] = True
        self.next_row(i)
        self.add_state(i, next_state)

    def next_row(self, i: int) -> None:
        """Also called at the end of an episode, whose last state keeps its row."""
        self.time[i] = (self.time[i] + 1) % self.length
        self.full |= bool(self.time[i] == 0)

    def filled(self) -> int:
        """The number of rows up to the last one written; with several environments some of them may be empty."""
        return len(self.acted) if self.full else (int(self.time.max()) + 1) * len(self.time)

    def held_out(self, rows: np.ndarray) -> np.ndarray:
        """Which rows the backtracking model never sees, to be tested on them: every tenth stretch of 100 steps."""
        return rows // (100 * len(self.time)) % 10 == 9

    def draw_rows(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Rows of transitions, uniform and independent, (count,)."""
        rows = rng.integers(self.filled(), size=count)
        while len(refused := np.flatnonzero(~self.acted[rows])):
            rows[refused] = rng.integers(self.filled(), size=len(refused))
        return rows

    def draw_distinct_rows(self, count: int, rng: np.random.Generator, held_out: bool) -> np.ndarray:
        """Rows of transitions (not) held out, each at most once: `count`, or all if there are fewer."""
        written = np.arange(self.filled())
        rows = written[self.acted[written] & (self.held_out(written) == held_out)]
        return rng.choice(rows, min(count, len(rows)), replace=False)

    def later(self, rows: np.ndarray | torch.Tensor, steps: int) -> np.ndarray | torch.Tensor:
        """The rows so many steps later, or earlier if negative."""
        return (rows + steps * len(self.time)) % len(self.acted)

    def at(self, rows: torch.Tensor) -> Batch:
        columns = [column.index_select(0, rows) for column in self.columns.values()]
        return Batch(*columns, self.columns["states"].index_select(0, self.later(rows, 1)))

    def state_dict(self) -> dict:
        """Without a copy: a slice made by numpy has a storage of its own size, which is all that torch.save writes."""
        filled = self.filled()
        columns = {k: torch.from_numpy(column[:filled].cpu().numpy()) for k, column in self.columns.items()}
        columns["acted"] = torch.from_numpy(self.acted[:filled])
        return {"columns": columns, "time": self.time.tolist(), "full": self.full}

    def load_state_dict(self, state: dict) -> None:
        for name, column in (self.columns | {"acted": torch.from_numpy(self.acted)}).items():
            column[: len(state["columns"][name])] = state["columns"][name].to(column.device)
        self.time[:], self.full = state["time"], state["full"]


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


# ------------------------------------------------------------------------------------------------------ actor-critic


@torch.no_grad()
def act(actor: Actor, states: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Actions (B, A) in states (B, S): sampled with noise (B, A), or the greedy ones without."""
    mean, log_std = actor(states)
    return (mean if noise is None else mean + log_std.exp() * noise).tanh()


def update_actor_critic(actor, critic, target_critic, log_temperature, optimizer, batch: Batch, noise, args: Args):
    """One step of critics, actor and temperature at once (Haarnoja et al., 2018b), noise (2, B, A); returns losses."""
    temperature = log_temperature.detach().exp()
    with torch.no_grad():
        next_actions, log_probs = actor.sample(batch.next_states, noise[0])
        next_values = target_critic(batch.next_states, next_actions).amin(0) - temperature * log_probs
        targets = args.reward_scale * batch.rewards + args.gamma * (1 - batch.terminated) * next_values
    values = critic(batch.states, batch.actions)
    value_loss = ((values - targets) ** 2).mean(-1).sum()

    actions, log_probs = actor.sample(batch.states, noise[1])
    policy_loss = (temperature * log_probs - critic(batch.states, actions, frozen=True).amin(0)).mean()
    entropy = -log_probs.detach().mean()
    loss = value_loss + policy_loss
    if args.temperature is None:
        loss = loss + log_temperature * (entropy + actions.shape[-1])  # the target entropy is -A

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for target, weight in zip(target_critic.parameters(), critic.parameters(), strict=True):
            target.lerp_(weight, args.tau)
    losses = {"value_loss": value_loss, "q_value": values.mean(), "policy_loss": policy_loss, "entropy": entropy}
    return {f"losses/{name}": loss.detach() for name, loss in (losses | {"temperature": temperature}).items()}


class CudaGraph:
    """A function on a GPU without the time that Python takes: recorded once, its kernels are launched by a single call.

    It takes tensors, of the same shapes in every call, and what it returns is overwritten by the next. What else it
    reads or writes (weights, the optimizer's state, the replay buffer) must stay where it is, and numbers as they are.
    """

    def __init__(self, function):
        self.function, self.calls = function, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *inputs: torch.Tensor):
        self.calls += 1
        if self.calls <= 3:  # plain ones, in which it is compiled and the optimizer's state is made
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.calls == 4:
            self.inputs = [x.clone() for x in inputs]
            with torch.cuda.graph(self.graph, stream=self.stream):  # records, and computes nothing
                self.outputs = self.function(*self.inputs)
        for recorded, x in zip(self.inputs, inputs, strict=True):
            recorded.copy_(x)
        self.graph.replay()
        return self.outputs


# ------------------------------------------------------------------------------------------------------ recall traces


@torch.no_grad()
def state_values(actor: Actor, critic: Critic, states: torch.Tensor) -> torch.Tensor:
    """V(s) of states (B, S): the smaller Q of the greedy action, (B,)."""
    return critic(states, actor(states)[0].tanh()).amin(0)


def high_value_states(buffer: ReplayBuffer, actor: Actor, critic: Critic, args: Args, rng, held_out: bool):
    """The most valuable of the tuples drawn from B, best first, their next states' values and rows (Alg. 1, line 8).

    Without those with a terminal next state: it has no value, and no recall trace can start there.
    """
    rows = buffer.draw_distinct_rows(args.recall_tuples, rng, held_out)
    batch = buffer.at(as_tensor(rows, args.device))
    values = torch.cat([state_values(actor, critic, part) for part in batch.next_states.split(1000)])  # fits a cache
    values, best = values.masked_fill(batch.terminated.bool(), -torch.inf).sort(descending=True, stable=True)
    count = min(max(1, round(args.top_fraction * len(rows))), int(values.isfinite().sum()))
    values, best = values[:count], best[:count]
    return Batch(*(column[best] for column in batch)), values, rows[best.cpu().numpy()]


def update_backtracking_model(model: BacktrackingModel, optimizer, batch: Batch) -> dict[str, torch.Tensor]:
    """One maximum likelihood step on some of the most valuable tuples (Alg. 1, line 9); returns losses."""
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


def split_traces(states, actions, in_trace, num_traces: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs (n, S) and (n, A) of so many traces at a time, of traces (length, N, ...)."""
    parts = zip(*(column.split(num_traces, dim=1) for column in (states, actions, in_trace)), strict=True)
    return [(states[inside], actions[inside]) for states, actions, inside in parts]


def imitate(actor: Actor, optimizer, states, actions) -> dict[str, torch.Tensor]:
    """One step that raises log pi(a | s) on pairs (n, S) and (n, A) of traces (Alg. 1, lines 12 and 13)."""
    if len(actions) == 0:
        return {}
    loss = -actor.log_prob_of_clipped(states, actions).mean()  # Eq. (3), its mean over the pairs
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"recall/imitation_loss": loss.detach()}


@torch.no_grad()
def advantages(actor: Actor, critic: Critic, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """How much the critics prefer actions (n, A) in states (n, S) to the greedy one, (n,)."""
    return critic(states, actions).amin(0) - state_values(actor, critic, states)


def default_trace_length(env_id: str) -> int:
    """Table 2."""
    return 50 if env_id.startswith(("Ant", "Humanoid")) else 20


class Comparison(NamedTuple):
    """Imagined and real backward trajectories from the same high-value states, (length, N, ...)."""

    starts: torch.Tensor  # (N, S)
    real: torch.Tensor
    known: torch.Tensor  # where there is a real predecessor, one of the same episode
    imagined: torch.Tensor
    actions: torch.Tensor
    in_trace: torch.Tensor


@torch.no_grad()
def compare_traces(model: BacktrackingModel, buffer: ReplayBuffer, actor, critic, length: int, args: Args, rng):
    """Recall traces beside what really led to the high-value states; the model has not learned from these tuples."""
    _, _, rows = high_value_states(buffer, actor, critic, args, rng, held_out=True)
    if len(rows) == 0:
        return None
    rows = rng.permutation(rows)[:256]
    rows = np.stack([buffer.later(rows, -steps) for steps in range(length)])
    known = as_tensor(np.logical_and.accumulate(buffer.acted[rows] & buffer.held_out(rows)), args.device)
    rows = as_tensor(rows, args.device)
    starts, real = buffer.at(rows[0]).next_states, buffer.at(rows.ravel()).states.unflatten(0, rows.shape)
    return Comparison(starts, real, known, *recall_traces(model, starts, length, args, rng))


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
    while going:
        actions, still_going = act(actor, as_tensor(states[going], args.device), None).cpu().numpy(), []
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
    frames, done = [], False
    for step in range(round(10 * fps)):
        if step % every == 0 or done:
            frames.append(Image.fromarray(env.render()))
            frames[-1].thumbnail((240, 240))
        if done:
            break
        action = act(actor, as_tensor(state.astype(np.float32), args.device), None).cpu().numpy()
        state, _, terminated, truncated, _ = env.step(action)
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


AT_MOST = {"gamma": 1, "tau": 1, "top_fraction": 1, "seed": 2**63 - 1, "torch_threads": 1024, "num_envs": 1024}
AT_MOST |= dict.fromkeys(("num_traces", "batch_size", "backtracking_batch_size", "recall_updates"), 10**5)
AT_MOST |= {"hidden": 10**4, "recall_tuples": 10**7, "buffer_size": 10**9, "backtracking_updates": 10**9}
AT_MOST |= dict.fromkeys(("updates_per_step", "trace_length", "eval_episodes"), 1000)


def check(args: Args) -> None:
    """Fails on the first argument that is out of range."""
    for name, value in vars(args).items():
        least = 0 if isinstance(value, float | bool) or name == "seed" else 1
        most = AT_MOST.get(name, sys.float_info.max)
        if isinstance(value, int | float) and not least <= value <= most:
            allowed = f"from {least} to {most}" if name in AT_MOST else f"of at least {least}"
            fail(f"--{name.replace('_', '-')} must be a number {allowed}, got {value}")
    if args.temperature is not None and not torch.tensor(args.temperature).log().isfinite():
        fail(f"--temperature must be a number greater than 0 in single precision, got {args.temperature}")
    if args.buffer_size < 10 * args.num_envs:
        fail(f"--buffer-size must be at least 10 for each of {args.num_envs} environments, got {args.buffer_size}")
    rows = args.backtracking_updates * args.backtracking_batch_size
    if args.recall != "none" and rows > 10**8:
        fail(f"--backtracking-updates times --backtracking-batch-size must be at most {10**8}, got {rows}")
    try:
        torch.zeros(1, device=args.device, dtype=torch.float64).cpu()
    except Exception:  # each kind of device has its own
        fail(f"--device {args.device} is not available here in double precision, a new run can have --device cpu")
    if args.compile:
        try:
            torch.compile(torch.neg)(torch.zeros(1, device=args.device))
        except Exception as error:  # such as of a missing compiler
            fail(f"--compile does not work here: {error}".splitlines()[0])
    env = make_env(args)
    shapes = *env.observation_space.shape, *env.action_space.shape
    steps = args.num_traces * args.recall_updates * args.trace_length
    if args.recall != "none" and steps * sum(shapes) > 10**9:
        allowed = f"at most {10**9 // sum(shapes)} with {args.env_id}"
        fail(f"--num-traces times --recall-updates times --trace-length must be {allowed}, got {steps}")
    try:
        ReplayBuffer(args.buffer_size, args.num_envs, *shapes, args.device)
    except (RuntimeError, MemoryError):
        fail(f"--buffer-size {args.buffer_size} does not fit into memory")
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
    saved = replace(saved, buffer_size=10 * saved.num_envs, compile=False)  # as playing needs no more
    check(saved)
    torch.set_num_threads(args.torch_threads)
    envs = [make_env(saved) for _ in range(args.eval_episodes)]
    actor = Actor(*envs[0].observation_space.shape, *envs[0].action_space.shape, saved.hidden).to(args.device)
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
        args.total_timesteps = 100_000 if args.total_timesteps is None else args.total_timesteps
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
    actor = Actor(state_dim, action_dim, args.hidden).to(args.device)  # Alg. 1, line 1
    critic = Critic(state_dim, action_dim, args.hidden).to(args.device)
    target_critic = deepcopy(critic)
    log_temperature = nn.Parameter(
        torch.tensor(1.0 if args.temperature is None else args.temperature, device=args.device).log()
    )
    weights = [*actor.parameters(), *critic.parameters(), log_temperature]
    recorded = args.compile and args.device.startswith("cuda")  # as CUDA graphs
    if recorded and ":" in args.device:
        torch.cuda.set_device(args.device)  # where they are recorded
    optimizer = torch.optim.Adam(weights, lr=args.learning_rate, fused=True, capturable=recorded)
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, state_dim, action_dim, args.device)
    for i, state in enumerate(episodes.states):
        buffer.add_state(i, state)
    parts = {"actor": actor, "critic": critic, "target_critic": target_critic, "buffer": buffer, "episodes": episodes}
    parts |= {"temperature": nn.ParameterList([log_temperature]), "optimizer": optimizer}
    rngs = {"rollout": np.random.default_rng([args.seed, 0]), "update": np.random.default_rng([args.seed, 1])}
    if args.recall != "none":
        model = BacktrackingModel(state_dim, action_dim).to(args.device)  # Alg. 1, line 2
        imitation_optimizer = torch.optim.Adam(actor.parameters(), lr=args.imitation_lr, fused=True)
        parts |= {"backtracking_model": model, "imitation_optimizer": imitation_optimizer}
        if args.recall == "learned":
            backtracking_optimizer = torch.optim.Adam(
                model.parameters(), lr=args.backtracking_lr, fused=True, capturable=recorded
            )
            parts["backtracking_optimizer"] = backtracking_optimizer
        rngs["recall"] = np.random.default_rng([args.seed, 2])
    traces = []  # one entry for each imitation update that is left of the last recall phase
    step, losses, evaluations = 0, {}, []  # evaluations: (step, mean return)
    finished = []  # (return, length) of the episodes since the last evaluation
    if checkpoint:
        try:
            for name, part in parts.items():  # all but the buffer copied, so that the file can go
                part.load_state_dict(checkpoint[name] if part is buffer else deepcopy(checkpoint[name]))
            for name, rng in rngs.items():
                rng.bit_generator.state = checkpoint["rngs"][name]
            step, losses = checkpoint["step"], deepcopy(checkpoint["losses"])
            finished, evaluations = checkpoint["finished"], checkpoint["evaluations"]
            traces = [tuple(part.to(args.device) for part in deepcopy(pairs)) for pairs in checkpoint["traces"]]
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
        state |= {"finished": finished, "evaluations": evaluations, "traces": traces}
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
            survived = compared.in_trace.float().mean()
            gained = advantages(
                actor, critic, compared.imagined[compared.in_trace], compared.actions[compared.in_trace]
            )
            scalars |= {"recall/trace_survival": survived, "recall/trace_advantage": gained.mean()}
            errors = trace_errors(model, compared)
            scalars |= {"recall/trace_error": errors.nanmean(), "recall/trace_error_of_first_step": errors[0]}
        if step > first_step:
            scalars["charts/SPS"] = (step - first_step) / (time.time() - started)
        for name, value in scalars.items():
            if np.isfinite(float(value)):  # no trace may have stayed inside the data
                writer.add_scalar(name, float(value), step)
        progress.set_postfix_str(f"return {returns.mean():.0f}")

    def compare() -> Comparison | None:
        if "recall/start_value" not in losses:  # no recall phase yet
            return None
        rng = np.random.default_rng([args.seed, 3, step])
        return compare_traces(model, buffer, actor, critic, args.trace_length, args, rng)

    def write_pictures() -> None:
        pictures = {"returns": draw_returns(evaluations, f"{args.env_id}, recall {args.recall}, seed {args.seed}")}
        if compared := compare():
            pictures["traces"] = draw_traces(model, compared)
        for name, figure in pictures.items():
            figure.savefig(args.run_dir / f"{name}.png", dpi=120)
            image = np.asarray(Image.open(args.run_dir / f"{name}.png").convert("RGB"))
            writer.add_image(f"pictures/{name}", image, step, dataformats="HWC")
        if args.capture_video:
            write_video(args.run_dir / "agent.gif", args, actor)

    # acting and two kinds of updates as functions of nothing but tensors, which can be recorded
    def choose(states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return act(actor, states, noise)

    def update(rows: torch.Tensor, noises: torch.Tensor) -> dict[str, torch.Tensor]:
        networks = actor, critic, target_critic, log_temperature
        return update_actor_critic(*networks, optimizer, buffer.at(rows), noises, args)

    def fit(*tuples: torch.Tensor) -> dict[str, torch.Tensor]:
        return update_backtracking_model(model, backtracking_optimizer, Batch(*tuples))

    if args.compile:
        update = torch.compile(update)
    if recorded:
        choose, update, fit = CudaGraph(choose), CudaGraph(update), CudaGraph(fit)
    first_step, started = step, time.time()
    whole_steps = -(-args.total_timesteps // args.num_envs) * args.num_envs
    progress = tqdm(total=whole_steps, initial=step, unit=" steps", disable=None)
    with SummaryWriter(args.run_dir) as writer, progress, catch_signals() as caught:
        while step < args.total_timesteps:  # Alg. 1, line 3
            if caught or step % args.checkpoint_every < args.num_envs:
                save_checkpoint()
            if caught:
                print(f"stopped at step {step}; --resume {args.run_dir} goes on from there", file=sys.stderr)
                sys.exit(128 + caught[0])
            if step % args.eval_every < args.num_envs:
                log()

            # Alg. 1, line 4: execute the policy
            noise = normal(rngs["rollout"], (args.num_envs, action_dim), args.device)
            if step < args.learning_starts:
                actions = rngs["rollout"].uniform(-1, 1, noise.shape).astype(np.float32)
            else:
                actions = choose(as_tensor(episodes.states, args.device), noise).cpu().numpy()
            # Alg. 1, line 5: add what it did to B
            for i, action in enumerate(actions):
                next_state, reward, terminated, truncated = episodes.step(i, action)
                buffer.add_step(i, action, reward, terminated, next_state)
                if terminated or truncated:
                    finished.append(episodes.next_episode(i))
                    buffer.next_row(i)
                    buffer.add_state(i, episodes.states[i])
            step += args.num_envs
            progress.update(args.num_envs)

            steps_before, steps_now = (max(0, n - args.learning_starts) for n in (step - args.num_envs, step))
            for n in range(int(steps_before * args.updates_per_step), int(steps_now * args.updates_per_step)):
                # Alg. 1, lines 6 and 7: improve the policy with the RL algorithm
                drawn = as_tensor(buffer.draw_rows(args.batch_size, rngs["update"]), args.device)
                noises = normal(rngs["update"], (2, args.batch_size, action_dim), args.device)
                losses |= update(drawn, noises)
                if args.recall == "none":
                    continue

                updates_since_phase, rng = (n + 1) % args.recall_every, rngs["recall"]
                if updates_since_phase == 0:
                    # Alg. 1, line 8: what led to the most valuable states
                    tuples, values, _ = high_value_states(buffer, actor, critic, args, rng, held_out=False)
                    if len(values) < 2:  # next to nothing but terminal states
                        continue
                    model.normalise_by(tuples)
                    # Alg. 1, line 9: fit the backtracking model to it
                    if args.recall == "learned":
                        shape = args.backtracking_updates, args.backtracking_batch_size
                        for rows in as_tensor(rng.integers(len(values), size=shape), args.device):
                            losses |= fit(*(column[rows] for column in tuples))
                    # Alg. 1, lines 10 and 11: recall traces from the most valuable states, in random order
                    chosen = rng.permutation(args.num_traces * args.recall_updates) % len(values)
                    losses["recall/start_value"] = values[chosen].mean()
                    starts = tuples.next_states[chosen]
                    traces = split_traces(*recall_traces(model, starts, args.trace_length, args, rng), args.num_traces)
                # Alg. 1, lines 12 and 13: imitate them, some after each update, so that none is left at the next phase
                left_at_most = args.recall_updates * (args.recall_every - 1 - updates_since_phase) / args.recall_every
                while len(traces) > left_at_most:
                    losses |= imitate(actor, imitation_optimizer, *traces.pop())

        save_checkpoint()
        log()
        write_pictures()
    if args.recall != "none" and "recall/start_value" not in losses:
        why = "fewer than --recall-every updates, or fewer than two valuable tuples that are not terminal"
        print(f"no recall phase: {why}", file=sys.stderr)
    print(f"pictures, curves and the trained agent are in {args.run_dir}")


if __name__ == "__main__":
    main(tyro.cli(Args))
