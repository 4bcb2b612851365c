# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium==1.4.0",
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "pillow==13.0.0",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Advantage actor-critic with recall traces in the four-room maze (Goyal et al., ICLR 2019, sections 6.1, D, F and H).

A backtracking model imagines, from the states that received a high reward, which (state, action) pairs may have led
there; the policy imitates these recall traces. This file and the maze, envs/four_room.py, are all there is.

    python recall_a2c_fourroom.py --capture-video             # exact predecessors, learned backward policy (6.1)
    python recall_a2c_fourroom.py --recall none               # the plain actor-critic
    python recall_a2c_fourroom.py --evaluate RUN_DIR          # play the trained agent

The default 15 x 15 maze is solved after about 9 000 environment steps, against 44 000 of the plain actor-critic
(interquartile means of 10 seeds). A run of 100 000 steps takes about ten seconds on one core of a laptop.
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.four_room import FourRoomMaze, FourRoomVectorEnv, draw_cells


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
    eval_every: int = 1_000
    """environment steps between evaluations of the greedy policy"""
    eval_episodes: int = 10
    """episodes per evaluation; all alike, unless the maze of --env-id has random starts"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints"""
    capture_video: bool = False
    """write a GIF of the greedy agent, at the end of training or with --evaluate"""
    device: str = "cpu"
    """torch device; these networks are so small that a CPU is fastest"""
    torch_threads: int = 1
    """CPU threads of torch; one is fastest for networks of this size"""

    # environment
    env_id: str = "FourRoom-v0"
    """Gymnasium id of a four-room maze"""
    size: int = 15
    """cells along each side of the maze, walls included (paper: 11, 12, 13, 14, 15, 19)"""
    num_envs: int = 2
    """environments stepped side by side"""

    # actor-critic
    num_steps: int = 192
    """steps of each environment between two updates"""
    learning_rate: float = 7e-4
    """step size of RMSprop for the actor and the critic"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """decay of generalized advantage estimation"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the critic's loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient of an actor-critic update"""

    # recall traces
    recall: Literal["none", "true", "learned", "random"] = "true"
    """none: plain actor-critic; true: exact predecessors, learned backward policy (6.1); learned: both learned (Eq. 2);
    random: exact predecessors, uniform backward policy (App. F)"""
    start_states: Literal["reward", "value", "goal"] = "reward"
    """where traces start: states that received a high reward (on-policy rule of 2.1), the state that the critic values
    most (Alg. 2), or the goal, if it is known ahead of time (4)"""
    num_traces: int = 32
    """N, recall traces per imitation update"""
    trace_length: int = 25
    """longest trace in steps; one that reaches the cell where its episode began ends there"""
    recall_every: int = 1
    """actor-critic updates per recall phase (App. H, Fig. 17)"""
    recall_updates: int = 2
    """imitation updates per recall phase, each with new traces (App. H, Fig. 18)"""
    backtracking_updates: int = 2
    """backtracking model updates per recall phase"""
    backtracking_batch_size: int = 128
    """(state, action, next state) tuples per backtracking model update"""
    backtracking_lr: float = 1e-2
    """step size of Adam for the backtracking model (beta in Alg. 1)"""
    imitation_lr: float = 1e-2
    """step size of Adam for the imitation of traces (in Alg. 1 the policy's own, alpha)"""
    top_trajectories: int = 10
    """k_traj, trajectories with the highest return that are kept in the buffer"""
    top_fraction: float = 1.0
    """k, share of their tuples, with the highest return-to-go: the model learns from these, and traces start there"""


# ------------------------------------------------------------------------------------------------------ networks


def mlp(first: nn.Module, hidden: int, outputs: int, activation: type[nn.Module], gain: float) -> nn.Sequential:
    """Two hidden layers on a table lookup `first`, which is a linear layer on one-hot inputs; orthogonal weights."""
    layers = [first, activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, outputs)]
    for layer, scale in zip(layers[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
    for layer in layers[2::2]:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """pi_theta(a | s), from cells (B,) to action logits (B, A).

    A maze has few cells, and the policy stands still between two updates: `everywhere`, the logits of all cells (S, A),
    serves all steps of a rollout, and costs less than a forward pass over its states. So it does for the critic.
    """

    def __init__(self, num_cells: int, num_actions: int, hidden: int = 64):
        super().__init__()
        self.net = mlp(nn.Embedding(num_cells, hidden), hidden, num_actions, nn.Tanh, gain=0.01)
        self.register_buffer("cells", torch.arange(num_cells), persistent=False)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.net(cells)

    def everywhere(self) -> torch.Tensor:
        return self(self.cells)


class Critic(nn.Module):
    """V(s), from cells (B,) to values (B,)."""

    def __init__(self, num_cells: int, hidden: int = 64):
        super().__init__()
        self.net = mlp(nn.Embedding(num_cells, hidden), hidden, 1, nn.Tanh, gain=1.0)
        self.register_buffer("cells", torch.arange(num_cells), persistent=False)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.net(cells).squeeze(-1)

    def everywhere(self) -> torch.Tensor:
        return self(self.cells)


class BacktrackingModel(nn.Module):
    """q_phi(s_t, a_t | s_{t+1}) = q(a_t | s_{t+1}) q(s_t | a_t, s_{t+1}), Eq. (1), for the cells of a maze (App. C).

    Cells being discrete, q(s_t | a_t, s_{t+1}) is a Multinoulli over the cells rather than a density of their change.
    Only `learned` has that state predictor. `true` and `random` know the exact predecessors and give no probability to
    an action that cannot have led into a cell; among the others, `random` chooses uniformly.
    """

    def __init__(self, maze: FourRoomMaze, recall: str, hidden: int = 128):
        super().__init__()
        num_cells, num_actions = maze.next_cell.shape
        self.action_predictor = self.state_predictor = None
        if recall != "random":
            self.action_predictor = mlp(nn.Embedding(num_cells, hidden), hidden, num_actions, nn.Tanh, gain=0.01)
        if recall == "learned":
            first = nn.EmbeddingBag(num_cells + num_actions, hidden, mode="sum")  # one-hot cell and one-hot action
            self.state_predictor = mlp(first, hidden, num_cells, nn.ReLU, gain=0.01)
        # The first of two predecessors is the neighbour: a bump is imagined only where no move can have happened.
        self.predecessors = maze.predecessors[:, :, 0]
        self.register_buffer("impossible", torch.from_numpy(maze.num_predecessors == 0), persistent=False)
        self.register_buffer("cells", torch.arange(num_cells), persistent=False)

    def action_log_probs(self, next_cells: torch.Tensor) -> torch.Tensor:
        """log q(a_t | s_{t+1}) of every action, from cells (B,) to (B, A)."""
        if self.state_predictor is not None:
            return self.action_predictor(next_cells).log_softmax(-1)
        impossible = self.impossible[next_cells]
        logits = torch.zeros_like(impossible, dtype=torch.float32)
        if self.action_predictor is not None:
            logits = self.action_predictor(next_cells)
        return logits.masked_fill(impossible, -torch.inf).log_softmax(-1)

    def state_log_probs(self, actions: torch.Tensor, next_cells: torch.Tensor) -> torch.Tensor:
        """log q(s_t | a_t, s_{t+1}) of every cell, from actions and cells (B,) to (B, S)."""
        if self.state_predictor is not None:
            return self.state_predictor(torch.stack((next_cells, len(self.cells) + actions), dim=-1)).log_softmax(-1)
        exact = as_tensor(self.predecessors[next_cells.cpu().numpy(), actions.cpu().numpy()], self.cells.device)
        return (exact.unsqueeze(-1) == self.cells).float().log()

    def log_prob(self, cells: torch.Tensor, actions: torch.Tensor, next_cells: torch.Tensor) -> torch.Tensor:
        """log q(s_t, a_t | s_{t+1}), Eq. (1), of tuples (B,)."""
        of_actions = self.action_log_probs(next_cells).gather(-1, actions.unsqueeze(-1))
        of_states = self.state_log_probs(actions, next_cells).gather(-1, cells.unsqueeze(-1))
        return (of_actions + of_states).squeeze(-1)

    def sample_states(self, actions: np.ndarray, next_cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """s_t ~ q(s_t | a_t, s_{t+1}), arrays (N,)."""
        if self.state_predictor is None:
            return self.predecessors[next_cells, actions]
        device = self.cells.device
        log_probs = self.state_log_probs(as_tensor(actions, device), as_tensor(next_cells, device))
        return sample(thresholds(log_probs.exp().cpu().numpy()), rng)


def thresholds(probs: np.ndarray) -> np.ndarray:
    """Cumulative probabilities of rows (n, k), without the last, (n, k - 1): between them lie the indices to sample."""
    cumulative = probs.cumsum(axis=1)
    return cumulative[:, :-1] / cumulative[:, -1:]  # so that rounding never gives an index of probability 0


def sample(thresholds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index for each row of `thresholds` (n, k - 1), (n,)."""
    return (rng.random((len(thresholds), 1)) >= thresholds).sum(axis=1)


def as_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


# ------------------------------------------------------------------------------------------------------ experience


class Rollout(NamedTuple):
    """What `num_steps` steps of all environments gave, arrays (num_steps, num_envs)."""

    cells: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_cells: np.ndarray  # the true ones, also where an episode ended
    terminated: np.ndarray
    truncated: np.ndarray


class Tuples(NamedTuple):
    """Transitions of one or more trajectories, arrays (n,)."""

    cells: np.ndarray
    actions: np.ndarray
    next_cells: np.ndarray
    rewards: np.ndarray
    values: np.ndarray  # discounted return-to-go, this reward included, of the trajectory as it was walked, with loops
    first_cells: np.ndarray  # where the episode began


class TrajectoryBuffer:
    """B: the `capacity` trajectories of highest return that found something of value, and the episodes under way.

    Elite retention (App. C): once B is full, a new trajectory has to be better than the worst one, which it replaces.
    """

    def __init__(self, capacity: int, num_envs: int, gamma: float):
        self.capacity, self.gamma = capacity, gamma
        self.best: list[tuple[float, Tuples]] = []  # (return, tuples), worst first
        self.under_way = [np.zeros((0, 4)) for _ in range(num_envs)]  # rows (s_t, a_t, r_t, s_{t+1})

    def add(self, rollout: Rollout) -> list[tuple[float, int]]:
        """Adds a rollout; returns (return, length) of every episode that ended in it."""
        rows = np.stack(rollout[:4], axis=-1)
        ended = []
        for i in range(len(self.under_way)):
            ends = np.flatnonzero(rollout.terminated[:, i] | rollout.truncated[:, i]) + 1
            *episodes, rest = np.split(rows[:, i], ends)
            if episodes:
                episodes[0] = np.concatenate((self.under_way[i], episodes[0]))
                self.under_way[i] = rest
            else:
                self.under_way[i] = np.concatenate((self.under_way[i], rest))
            for episode in episodes:
                ended.append((float(episode[:, 2].sum()), len(episode)))
                if episode[:, 2].max() > 0 and (len(self.best) < self.capacity or ended[-1][0] > self.best[0][0]):
                    self.best = sorted([*self.best, (ended[-1][0], self._tuples(episode))], key=lambda b: b[0])
                    del self.best[: -self.capacity]
        return ended

    def _tuples(self, episode: np.ndarray) -> Tuples:
        """The tuples of an episode (T, 4) without its loops: from each cell on its way, only the last exit counts.

        What came before it is a loop (or a bump into a wall), which made the state no more valuable.
        """
        cells, actions, next_cells = episode[:, [0, 1, 3]].T.astype(np.int64)
        values = episode[:, 2].copy()
        for t in reversed(range(len(values) - 1)):
            values[t] += self.gamma * values[t + 1]
        last_exit = {cell: t for t, cell in enumerate(cells.tolist())}
        way = [last_exit[int(cells[0])]]
        while (cell := int(next_cells[way[-1]])) in last_exit:
            way.append(last_exit[cell])
        columns = (cells, actions, next_cells, episode[:, 2], values, np.full_like(cells, cells[0]))
        return Tuples(*(column[way] for column in columns))

    def most_valuable(self, fraction: float) -> Tuples:
        """The given fraction of all tuples in B, those of the highest value."""
        tuples = Tuples(*map(np.concatenate, zip(*(tuples for _, tuples in self.best), strict=True)))
        best = np.argsort(-tuples.values, kind="stable")[: max(1, round(fraction * len(tuples.values)))]
        return Tuples(*(column[best] for column in tuples))

    def state_dict(self) -> dict:
        best = [(value, [as_tensor(column, "cpu") for column in tuples]) for value, tuples in self.best]
        return {"best": best, "under_way": [as_tensor(rows, "cpu") for rows in self.under_way]}

    def load_state_dict(self, state: dict) -> None:
        self.best = [(value, Tuples(*(column.numpy() for column in tuples))) for value, tuples in state["best"]]
        self.under_way = [rows.numpy() for rows in state["under_way"]]


# ------------------------------------------------------------------------------------------------------ actor-critic


@torch.no_grad()
def policy_table(actor: Actor) -> np.ndarray:
    """pi(a | s) of every cell, (S, A)."""
    return actor.everywhere().softmax(-1).cpu().numpy()


def collect_rollout(envs, cells: np.ndarray, policy: np.ndarray, num_steps: int, rng: np.random.Generator):
    """Steps all environments `num_steps` times with the policy (S, A); returns the Rollout and the cells after it."""
    shape = (num_steps, envs.num_envs)
    rollout = Rollout(*(np.empty(shape, dtype) for dtype in (int, int, float, int, bool, bool)))
    policy_thresholds = thresholds(policy)
    for t in range(num_steps):
        actions = sample(policy_thresholds[cells], rng)
        next_cells, rewards, terminated, truncated, infos = envs.step(actions)
        for column, row in zip(rollout, (cells, actions, rewards, next_cells, terminated, truncated), strict=True):
            column[t] = row
        if "final_obs" in infos:
            ended = infos["_final_obs"]
            rollout.next_cells[t, ended] = infos["final_obs"][ended]
        cells = next_cells
    return rollout, cells


def generalized_advantages(rollout: Rollout, values, next_values, gamma: float, gae_lambda: float) -> np.ndarray:
    """GAE (Schulman et al., 2016), (num_steps, num_envs). A time limit cuts the sum, but not the value that follows."""
    errors = rollout.rewards + gamma * next_values * ~rollout.terminated - values
    decay = gamma * gae_lambda * ~(rollout.terminated | rollout.truncated)
    advantages, later = np.zeros_like(errors), 0.0
    for t in reversed(range(len(errors))):
        advantages[t] = later = errors[t] + decay[t] * later
    return advantages


def update_actor_critic(actor: Actor, critic: Critic, optimizer, rollout: Rollout, args: Args) -> dict[str, float]:
    """One advantage actor-critic step on the whole rollout (Mnih et al., 2016); returns its losses."""
    log_probs, values = actor.everywhere().log_softmax(-1), critic.everywhere()
    table = values.detach().cpu().numpy()
    v, next_v = table[rollout.cells], table[rollout.next_cells]
    advantages = generalized_advantages(rollout, v, next_v, args.gamma, args.gae_lambda)
    cells, actions = as_tensor(rollout.cells, args.device), as_tensor(rollout.actions, args.device)
    advantages, returns = (as_tensor(array, args.device).float() for array in (advantages, advantages + v))

    policy_loss = -(advantages * log_probs[cells, actions]).mean()
    value_loss = F.mse_loss(values[cells], returns)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[cells].mean()
    optimizer.zero_grad()
    (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
    nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], args.max_grad_norm)
    optimizer.step()
    losses = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    return {f"losses/{name}": loss.item() for name, loss in losses.items()}


# ------------------------------------------------------------------------------------------------------ recall traces


def update_backtracking_model(model: BacktrackingModel, optimizer, tuples: Tuples, args: Args, rng) -> dict[str, float]:
    """One maximum likelihood step on a batch of valuable tuples (Alg. 1, lines 8 and 9); returns its losses."""
    batch = rng.integers(len(tuples.cells), size=args.backtracking_batch_size)
    cells, actions, next_cells = (as_tensor(column[batch], args.device) for column in tuples[:3])
    losses = {"recall/action_nll": F.nll_loss(model.action_log_probs(next_cells), actions)}
    if model.state_predictor is not None:
        losses["recall/state_nll"] = F.nll_loss(model.state_log_probs(actions, next_cells), cells)
    losses["recall/backtracking_loss"] = sum(losses.values())  # Eq. (2)
    optimizer.zero_grad()
    losses["recall/backtracking_loss"].backward()
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def high_value_states(tuples: Tuples | None, critic: Critic, envs: FourRoomVectorEnv, args: Args, rng):
    """N high-value states (Alg. 1, line 10), the cells where their episodes began, and their values, arrays (N,)."""
    if tuples is None:  # the goal is known ahead of time, and the agent has not been there
        return tuple(np.full(args.num_traces, fill) for fill in (envs.maze.goal, -1, envs.rewards[envs.maze.goal]))
    states, values = tuples.next_cells, tuples.values
    if args.start_states == "reward":
        candidates = np.flatnonzero(tuples.rewards > 0)
    elif args.start_states == "goal":
        candidates = np.flatnonzero(states == envs.maze.goal)
    else:  # Alg. 2, line 6
        with torch.no_grad():
            states, values = tuples.cells, critic.everywhere().cpu().numpy()[tuples.cells]
        candidates = np.flatnonzero(values == values.max())
    chosen = rng.choice(candidates, args.num_traces)
    return states[chosen], tuples.first_cells[chosen], values[chosen]


@torch.no_grad()
def recall_traces(model: BacktrackingModel, starts: np.ndarray, first_cells: np.ndarray, length: int, rng):
    """Unrolls the backtracking model from the cells `starts` (N,) backwards (section 2.1; Alg. 1, line 11).

    Returns states and actions (length, N), ordered from the high-value state backwards, and which of them belong to a
    trace (length, N): like the trajectory that found its high-value state, a trace begins at its cell of `first_cells`.
    """
    # One forward pass for the actions of all cells serves all steps.
    action_thresholds = thresholds(model.action_log_probs(model.cells).exp().cpu().numpy())
    shape = (length, len(starts))
    states, actions, in_trace = np.empty(shape, dtype=int), np.empty(shape, dtype=int), np.ones(shape, dtype=bool)
    next_states = starts
    for t in range(length):
        actions[t] = sample(action_thresholds[next_states], rng)  # a_t ~ q(a_t | s_{t+1})
        states[t] = model.sample_states(actions[t], next_states, rng)  # s_t ~ q(s_t | a_t, s_{t+1})
        next_states = states[t]
    in_trace[1:] = ~np.logical_or.accumulate(states == first_cells)[:-1]
    return states, actions, in_trace


def imitate(actor: Actor, optimizer, states, actions, in_trace, device: str) -> dict[str, float]:
    """One step that raises log pi(a | s) on the traces (Alg. 1, lines 12 and 13); returns its loss."""
    log_probs = actor.everywhere().log_softmax(-1)
    pairs = as_tensor(states[in_trace], device), as_tensor(actions[in_trace], device)
    loss = -log_probs[pairs].mean()  # Eq. (3), its mean over the pairs
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"recall/imitation_loss": loss.item()}


@torch.no_grad()
def trace_error(model: BacktrackingModel, tuples: Tuples, device: str) -> float:
    """Total-variation distance of q(s_t, a_t | s_{t+1}) from the exact p(s_t, a_t | s_{t+1}), the mean over `tuples`.

    The maze is deterministic, so counting gives p: the share of each (s_t, a_t) among the tuples that end in s_{t+1}.
    As only counted pairs have p > 0, the distance is 1 - sum of min(p, q) over them.
    """
    triples, counts = np.unique(np.stack(tuples[:3]), axis=1, return_counts=True)
    p = counts / np.bincount(triples[2], weights=counts)[triples[2]]
    q = model.log_prob(*(as_tensor(row, device) for row in triples)).exp().cpu().numpy()
    return float(1 - (counts / p * np.minimum(p, q)).sum() / counts.sum())


# ------------------------------------------------------------------------------------------------------ evaluation


def play(envs: FourRoomVectorEnv, policy: np.ndarray, seed: int, rng: np.random.Generator | None = None):
    """Plays one episode in each environment with the policy (S, A): greedily, or sampled if `rng` is given.

    Returns returns, lengths and successes (num_envs,), and the visits of every cell (S,).
    """
    cells, _ = envs.reset(seed=seed)
    greedy_actions, policy_thresholds = policy.argmax(axis=1), thresholds(policy)
    returns, lengths, visits = np.zeros(len(cells)), np.zeros(len(cells), dtype=int), np.zeros(len(policy), dtype=int)
    going, successes = np.ones(len(cells), dtype=bool), np.zeros(len(cells), dtype=bool)
    while np.count_nonzero(going):
        visits += np.bincount(cells[going], minlength=len(policy))
        actions = greedy_actions[cells] if rng is None else sample(policy_thresholds[cells], rng)
        cells, rewards, terminated, truncated, _ = envs.step(actions)
        returns += going * rewards
        lengths += going
        successes |= going & terminated
        going &= ~(terminated | truncated)
    return returns, lengths, successes, visits


@torch.no_grad()
def draw_pictures(maze: FourRoomMaze, visits: np.ndarray, critic: Critic, traces: tuple | None) -> dict:
    """Where the trained policy goes (Figures 3 and 10), what the critic expects, what is recalled: name to Figure."""
    title = f"Visits in 100 episodes: {np.count_nonzero(visits)} of {maze.free.sum()} cells"
    pictures = {"visits": draw_cells(maze, np.where(visits > 0, visits, np.nan), title)}
    values = critic.everywhere().cpu().numpy()
    values[maze.goal] = np.nan  # no action is taken there
    pictures["values"] = draw_cells(maze, values, "Value of each cell under the critic")
    if traces is not None:
        states, actions, in_trace = traces
        counts = np.zeros_like(maze.next_cell)
        np.add.at(counts, (states[in_trace], actions[in_trace]), 1)
        passed = np.where(counts.any(axis=1), counts.sum(axis=1), np.nan)
        title = f"{states.shape[1]} recall traces of up to {len(states)} steps"
        pictures["traces"] = draw_cells(maze, passed, title, arrows=counts)
    return pictures


def write_video(path: Path, args: Args, policy: np.ndarray) -> None:
    """Writes one episode of the greedy agent as a GIF."""
    env = gym.make(args.env_id, size=args.size, render_mode="rgb_array")
    cell, _ = env.reset(seed=args.seed)
    frames, done = [Image.fromarray(env.render())], False
    while not done:
        cell, _, terminated, truncated, _ = env.step(int(policy[cell].argmax()))
        frames.append(Image.fromarray(env.render()))
        done = terminated or truncated
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100] * (len(frames) - 1) + [1500], loop=0)


# ------------------------------------------------------------------------------------------------------ checkpoint


def fail(message: str) -> None:
    """Ends the program with one line that names the flag and what would be accepted, and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def make_envs(args: Args, num_envs: int) -> FourRoomVectorEnv:
    try:
        envs = gym.make_vec(args.env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", size=args.size)
    except ValueError as error:
        fail(f"--size: {error}")
    except (gym.error.Error, ImportError, TypeError) as error:
        fail(f"--env-id must be a four-room maze such as FourRoom-v0: {error}")
    if not isinstance(envs.unwrapped, FourRoomVectorEnv):
        fail(f"--env-id must be a four-room maze such as FourRoom-v0, {args.env_id} is none")
    return envs.unwrapped


AT_MOST = {"gamma": 1, "gae_lambda": 1, "top_fraction": 1, "size": 500, "seed": 2**63 - 1, "torch_threads": 1024}
AT_MOST |= {"learning_rate": 1e38}
AT_MOST |= dict.fromkeys(("num_envs", "num_steps", "num_traces", "backtracking_batch_size", "eval_episodes"), 10**5)


def check(args: Args) -> None:
    """Fails on the first argument that is out of range."""
    for name, value in vars(args).items():
        least = 0 if isinstance(value, float) or name in ("seed", "capture_video") else 1
        most = AT_MOST.get(name, sys.float_info.max)
        if isinstance(value, int | float) and not least <= value <= most:
            allowed = f"from {least} to {most}" if name in AT_MOST else f"of at least {least}"
            fail(f"--{name.replace('_', '-')} must be a number {allowed}, got {value}")
    if args.num_envs * args.num_steps > 10**7:
        fail(f"--num-envs times --num-steps must be at most {10**7}, got {args.num_envs * args.num_steps}")
    longest = make_envs(args, 1).max_steps
    if args.trace_length > longest:
        fail(f"--trace-length must be at most {longest}, the longest episode in this maze, got {args.trace_length}")
    try:
        torch.zeros(1, device=args.device).cpu()
    except Exception:  # each kind of device has its own
        fail(f"--device {args.device} is not available here, a new run can have --device cpu")


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
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        assert len(dict(checkpoint)["actor"]["net.0.weight"]) == saved.size**2
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
    torch.set_num_threads(args.torch_threads)
    own = ("seed", "device", "torch_threads", "eval_episodes", "capture_video")
    saved, checkpoint = read_run(args, "evaluate", own)
    if checkpoint is None:
        fail(f"--evaluate: {args.evaluate} has no checkpoint.pt yet")
    envs = make_envs(saved, args.eval_episodes)
    actor = Actor(*envs.maze.next_cell.shape).to(args.device)
    try:
        actor.load_state_dict(checkpoint["actor"])
    except RuntimeError:  # networks of another task
        fail(f"--evaluate: {args.evaluate / 'checkpoint.pt'} is not a checkpoint of this run")
    policy = policy_table(actor)
    returns, lengths, successes, _ = play(envs, policy, args.seed)
    for i in range(args.eval_episodes):
        print(f"episode {i}: return {returns[i]:.2f} in {lengths[i]} steps")
    print(f"mean return {returns.mean():.2f}, success rate {successes.mean():.2f}")
    if args.capture_video:
        path = args.evaluate / f"agent_{checkpoint['step']}.gif"
        write_video(path, saved, policy)
        print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------------ main


def main(args: Args) -> None:
    if args.evaluate is not None:
        check(args)
        return evaluate_run(args)
    checkpoint = None
    if args.resume is not None:
        args, checkpoint = resume_run(args)
    else:
        name = f"{args.env_id}__{Path(__file__).stem}__{args.recall}__seed{args.seed}__{int(time.time())}"
        args = replace(args, run_dir=args.run_dir or Path("runs", name))
        args.total_timesteps = 100_000 if args.total_timesteps is None else args.total_timesteps
        check(args)
        make_run_dir(args.run_dir)

    torch.set_num_threads(args.torch_threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any, and filling takes time
    envs, eval_envs = make_envs(args, args.num_envs), make_envs(args, args.eval_episodes)
    maze = envs.maze
    num_cells, num_actions = maze.next_cell.shape
    torch.manual_seed(args.seed)
    actor, critic = Actor(num_cells, num_actions).to(args.device), Critic(num_cells).to(args.device)  # Alg. 1, line 1
    weights = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.RMSprop(weights, lr=args.learning_rate, alpha=0.99, eps=1e-5, foreach=True)
    buffer = TrajectoryBuffer(args.top_trajectories, args.num_envs, args.gamma)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer, "buffer": buffer}
    rngs = {"rollout": np.random.default_rng([args.seed, 0])}
    if args.recall != "none":
        model = BacktrackingModel(maze, args.recall).to(args.device)  # Alg. 1, line 2
        imitation_optimizer = torch.optim.Adam(actor.parameters(), lr=args.imitation_lr, fused=True)
        parts |= {"backtracking_model": model, "imitation_optimizer": imitation_optimizer}
        if args.recall != "random":
            backtracking_optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr, fused=True)
            parts["backtracking_optimizer"] = backtracking_optimizer
        rngs["recall"] = np.random.default_rng([args.seed, 1])
    cells, _ = envs.reset(seed=args.seed)
    step, finished, losses = 0, [], {}  # finished: (return, length) of the episodes since the last evaluation
    if checkpoint:
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            for name, rng in rngs.items():
                rng.bit_generator.state = checkpoint["rngs"][name]
            envs.set_state(checkpoint["envs"])
            step, finished, losses = checkpoint["step"], checkpoint["finished"], checkpoint["losses"]
        except (KeyError, RuntimeError, ValueError):
            fail(f"--resume: {args.run_dir / 'checkpoint.pt'} is not a checkpoint of this run")
        cells = envs.cells.copy()
    cut_event_files(args.run_dir, checkpoint["event_sizes"] if checkpoint else {})
    arguments = json.dumps(asdict(args), indent=4, default=str)
    replace_file(args.run_dir / "args.json", lambda path: path.write_text(arguments))

    def save_checkpoint() -> None:
        modules = [part for part in parts.values() if isinstance(part, nn.Module)]
        if not all(weight.isfinite().all() for module in modules for weight in module.parameters()):
            stop(f"a weight is not finite, the largest loss is {max(losses, key=lambda name: abs(losses[name]))},")
        writer.flush()
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"rngs": {name: rng.bit_generator.state for name, rng in rngs.items()}, "envs": envs.get_state()}
        event_sizes = {file.name: file.stat().st_size for file in args.run_dir.glob("events.out.tfevents.*")}
        state |= {"step": step, "finished": finished, "losses": losses, "event_sizes": event_sizes}
        replace_file(args.run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    def stop(reason: str) -> None:
        sys.exit(f"error: {reason} at step {step}; {args.run_dir} keeps the last good checkpoint")

    def log() -> None:
        returns, _, successes, _ = play(eval_envs, policy, args.seed)
        scalars = {"eval/return": returns.mean(), "eval/success_rate": successes.mean(), **losses}
        if finished:
            scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(finished, axis=0)
            finished.clear()
        if args.recall != "none" and buffer.best:
            scalars["recall/trace_error"] = trace_error(model, buffer.most_valuable(args.top_fraction), args.device)
        if step > first_step:
            scalars["charts/SPS"] = (step - first_step) / (time.time() - started)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        progress.set_postfix_str(f"return {returns.mean():.2f}, success {successes.mean():.0%}")

    def write_pictures() -> None:
        visits = play(make_envs(args, 100), policy, args.seed, np.random.default_rng([args.seed, 2]))[3]
        writer.add_scalar("eval/visited_cells", np.count_nonzero(visits), step)
        traces = None
        if args.recall != "none" and buffer.best:
            tuples, rng = buffer.most_valuable(args.top_fraction), np.random.default_rng([args.seed, 3])
            starts, first_cells, _ = high_value_states(tuples, critic, envs, args, rng)
            traces = recall_traces(model, starts, first_cells, args.trace_length, rng)
        for name, figure in draw_pictures(maze, visits, critic, traces).items():
            figure.savefig(args.run_dir / f"{name}.png", dpi=120)
            image = np.asarray(Image.open(args.run_dir / f"{name}.png").convert("RGB"))
            writer.add_image(f"pictures/{name}", image, step, dataformats="HWC")
        if args.capture_video:
            write_video(args.run_dir / "agent.gif", args, policy)

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
            policy = policy_table(actor)
            if step % args.eval_every < batch:
                log()

            # Alg. 1, lines 4 and 5: execute the policy, add its trajectories to B
            rollout, cells = collect_rollout(envs, cells, policy, args.num_steps, rngs["rollout"])
            finished += buffer.add(rollout)
            # Alg. 1, lines 6 and 7: improve the policy with the RL algorithm
            losses |= update_actor_critic(actor, critic, optimizer, rollout, args)
            step += batch

            of_value = buffer.best or args.start_states == "goal"
            if args.recall != "none" and of_value and step // batch % args.recall_every == 0:
                tuples = buffer.most_valuable(args.top_fraction) if buffer.best else None
                # Alg. 1, lines 8 and 9: fit the backtracking model to the most valuable states of the best trajectories
                if args.recall != "random" and tuples is not None:
                    for _ in range(args.backtracking_updates):
                        losses |= update_backtracking_model(model, backtracking_optimizer, tuples, args, rngs["recall"])
                for _ in range(args.recall_updates):
                    # Alg. 1, lines 10 and 11: recall traces from high-value states
                    starts, first_cells, values = high_value_states(tuples, critic, envs, args, rngs["recall"])
                    traces = recall_traces(model, starts, first_cells, args.trace_length, rngs["recall"])
                    # Alg. 1, lines 12 and 13: imitate them
                    losses |= imitate(actor, imitation_optimizer, *traces, args.device)
                losses["recall/start_value"] = float(values.mean())

            for name in losses:
                if not np.isfinite(losses[name]):
                    stop(f"{name} is {losses[name]}")
            progress.update(batch)

        save_checkpoint()
        policy = policy_table(actor)
        log()
        write_pictures()
    print(f"pictures, curves and the trained agent are in {args.run_dir}")


if __name__ == "__main__":
    main(tyro.cli(Args))
