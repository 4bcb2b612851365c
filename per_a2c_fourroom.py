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
"""Advantage actor-critic with prioritized experience replay in the four-room maze: the rival of recall traces.

After every few updates on its own rollouts the agent learns again from past experience, drawn by priority (Goyal et
al., ICLR 2019, section 6.2 and Table 3; Figures 3, 4 and 10). All else is recall_a2c_fourroom.py, line for line.

    python per_a2c_fourroom.py --capture-video                # replay of high returns (self-imitation)
    python per_a2c_fourroom.py --priority td-error            # replay of surprises (Schaul et al., 2016)
    python per_a2c_fourroom.py --evaluate RUN_DIR             # play the trained agent

The default 15 x 15 maze is solved after about 14 000 environment steps, with td-error after 10 000, against 44 000 of
the plain actor-critic and 9 000 with recall traces (interquartile means of 10 seeds). A run of 100 000 steps takes
about fifteen seconds on one core of a laptop.
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
    """folder of this run; runs/<env>__<script>__<priority>__seed<seed>__<time> if not given"""
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

    # prioritized replay
    priority: Literal["return", "td-error"] = "return"
    """return: replay steps that went better than the critic expected, by (R - V)+, of episodes with a positive reward
    (self-imitation, Oh et al., 2018); td-error: replay all steps, by |TD error| (Schaul et al., 2016)"""
    buffer_size: int = 100_000
    """transitions in the replay buffer (E.3)"""
    replay_batch_size: int | None = None
    """transitions per replay update, fewer while the buffer holds fewer; if not given, Table 3: 200 up to size 12, 2000
    for 13 and 14, 1000 from 15 on"""
    replay_every: int = 3
    """actor-critic updates per replay phase (Table 3: 3)"""
    replay_updates: int = 16
    """replay updates per replay phase, each with a new batch; 16, the most that we tried, did best (Table 3: 1, with
    rollouts that were probably much shorter)"""
    priority_alpha: float | None = None
    """exponent of the priorities, 0 is uniform replay; if not given, Table 3: 0.8 up to size 14, 0.95 from 15 on"""
    priority_beta: float = 0.1
    """exponent of the importance weights: 0 is none; 1 makes the loss that of uniform replay, but much smaller with
    return, as all weights are relative to that of the rarest transition (Table 3: 0.1)"""


TABLE_3 = {11: (200, 0.8), 13: (2000, 0.8), 15: (1000, 0.95)}  # size of the maze: (replay batch size, priority alpha)


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
    values: np.ndarray  # discounted return-to-go, the reward of this transition included
    terminated: np.ndarray


class ReplayBuffer:
    """Prioritized experience replay (Schaul et al., 2016, proportional) of the last `capacity` transitions.

    Episodes are stored when they end: with `td-error` all of them, with `return` those with a positive reward (a return
    that a time limit cut short says nothing). Transition i is drawn with probability P(i) = p_i^alpha / sum of p^alpha,
    Eq. (1), by bisection in the cumulative sum of p^alpha: at this size it costs less than the update of the networks.
    """

    def __init__(self, capacity: int, num_envs: int, gamma: float, alpha: float, priority: str):
        self.capacity, self.gamma, self.alpha, self.priority = capacity, gamma, alpha, priority
        self.tuples = Tuples(*(np.zeros(capacity, dtype) for dtype in (int, int, int, float, float, bool)))
        self.powers = np.zeros(capacity)  # p^alpha
        self.stored = 0  # transitions so far; number n lies in slot n % capacity
        self.under_way = [np.zeros((0, 5)) for _ in range(num_envs)]  # rows (s_t, a_t, r_t, s_{t+1}, terminated)

    def __len__(self) -> int:
        return min(self.stored, self.capacity)

    def add(self, rollout: Rollout) -> list[tuple[float, int]]:
        """Adds a rollout; returns (return, length) of every episode that ended in it."""
        rows = np.stack(rollout[:5], axis=-1)
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
                if self.priority == "td-error" or episode[:, 2].max() > 0:
                    self._store(self._tuples(episode))
        return ended

    def _tuples(self, episode: np.ndarray) -> Tuples:
        """The tuples of an episode (T, 5)."""
        cells, actions, next_cells = episode[:, [0, 1, 3]].T.astype(np.int64)
        values = episode[:, 2].copy()
        for t in reversed(range(len(values) - 1)):
            values[t] += self.gamma * values[t + 1]
        return Tuples(cells, actions, next_cells, episode[:, 2], values, episode[:, 4].astype(bool))

    def _store(self, tuples: Tuples) -> None:
        """Stores transitions in place of the oldest, with the highest priority of all (Alg. 1, line 6)."""
        slots = (self.stored + np.arange(len(tuples.cells))) % self.capacity
        highest = self.powers[: len(self)].max(initial=0) or 1.0
        for column, new in zip(self.tuples, tuples, strict=True):
            column[slots] = new
        self.powers[slots] = highest
        self.stored += len(slots)

    def sample(self, batch_size: int, beta: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Slots of transitions drawn by priority, one from each of `batch_size` equal shares of it, and their weights.

        The importance weights are w_i = (N P(i))^-beta, divided by the largest one of the buffer (Alg. 1, line 10).
        """
        if batch_size > len(self):
            raise ValueError(f"a batch of {batch_size} transitions is more than the {len(self)} in the buffer")
        powers = self.powers[: len(self)]
        cumulative = powers.cumsum()
        shares = (np.arange(batch_size) + rng.random(batch_size)) / batch_size
        slots = np.searchsorted(cumulative[:-1], shares * cumulative[-1], side="right")  # Eq. (1)
        return slots, (powers[slots] / powers.min()) ** -beta

    def set_priorities(self, slots: np.ndarray, priorities: np.ndarray) -> None:
        self.powers[slots] = (priorities + 1e-6) ** self.alpha

    def state_dict(self) -> dict:
        columns = [as_tensor(column[: len(self)].copy(), "cpu") for column in (*self.tuples, self.powers)]
        under_way = [as_tensor(rows, "cpu") for rows in self.under_way]
        return {"columns": columns, "stored": self.stored, "under_way": under_way}

    def load_state_dict(self, state: dict) -> None:
        self.stored = state["stored"]
        for column, saved in zip((*self.tuples, self.powers), state["columns"], strict=True):
            column[: len(self)] = saved.numpy()
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


# ------------------------------------------------------------------------------------------------------ replay


def update_from_replay(actor: Actor, critic: Critic, optimizer, buffer: ReplayBuffer, args: Args, rng):
    """One actor-critic step on transitions drawn by priority, without entropy bonus (E.3); returns its losses.

    The advantages are (R - V)+ with `return` (self-imitation learning: a step that went no better than the critic
    expects has no weight), and one-step TD errors with `td-error`. The weights correct for prioritized instead of
    uniform draws from the buffer, but not for its actions, which come from older policies.
    """
    # Schaul et al., Alg. 1, lines 9 and 10: sample by priority, with importance weights
    slots, weights = buffer.sample(min(args.replay_batch_size, len(buffer)), args.priority_beta, rng)
    tuples = Tuples(*(column[slots] for column in buffer.tuples))
    log_probs, values = actor.everywhere().log_softmax(-1), critic.everywhere()
    table = values.detach().cpu().numpy()
    v, next_v = table[tuples.cells], table[tuples.next_cells]
    # Schaul et al., Alg. 1, lines 11 and 12: new priorities
    if args.priority == "return":
        advantages = np.maximum(tuples.values - v, 0)  # (R - V)+
    else:
        advantages = tuples.rewards + args.gamma * next_v * ~tuples.terminated - v
    buffer.set_priorities(slots, np.abs(advantages))
    cells, actions = as_tensor(tuples.cells, args.device), as_tensor(tuples.actions, args.device)
    weights, advantages, returns = (as_tensor(a, args.device).float() for a in (weights, advantages, advantages + v))

    # Schaul et al., Alg. 1, lines 13 to 15: the weighted step
    policy_loss = -(weights * advantages * log_probs[cells, actions]).mean()
    value_loss = (weights * (values[cells] - returns) ** 2).mean()
    optimizer.zero_grad()
    (policy_loss + args.vf_coef * value_loss).backward()
    nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], args.max_grad_norm)
    optimizer.step()
    losses = {"policy_loss": policy_loss, "value_loss": value_loss}
    losses |= {"advantage": advantages.mean(), "weight": weights.mean()}
    return {f"replay/{name}": loss.item() for name, loss in losses.items()}


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
def draw_pictures(maze: FourRoomMaze, visits: np.ndarray, critic: Critic, buffer: ReplayBuffer) -> dict:
    """Where the trained policy goes (Figures 3 and 10), what the critic expects, what is replayed: name to Figure."""
    title = f"Visits in 100 episodes: {np.count_nonzero(visits)} of {maze.free.sum()} cells"
    pictures = {"visits": draw_cells(maze, np.where(visits > 0, visits, np.nan), title)}
    values = critic.everywhere().cpu().numpy()
    values[maze.goal] = np.nan  # no action is taken there
    pictures["values"] = draw_cells(maze, values, "Value of each cell under the critic")
    if len(buffer):
        shares = np.zeros_like(maze.next_cell, dtype=float)
        np.add.at(shares, (buffer.tuples.cells, buffer.tuples.actions), 100 * buffer.powers / buffer.powers.sum())
        replayed = np.where(shares.any(axis=1), shares.sum(axis=1), np.nan)
        title = f"Replay of {len(buffer)} transitions: share of each cell, %"
        pictures["replay"] = draw_cells(maze, replayed, title, arrows=shares)
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


AT_MOST = {"gamma": 1, "gae_lambda": 1, "priority_alpha": 10, "priority_beta": 1, "buffer_size": 10**7, "size": 500}
AT_MOST |= {"num_envs": 10**5, "num_steps": 10**5, "eval_episodes": 10**5, "seed": 2**63 - 1, "torch_threads": 1024}
AT_MOST |= {"learning_rate": 1e38}


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
    make_envs(args, 1)  # or fails
    if args.replay_batch_size is not None and args.replay_batch_size > args.buffer_size:
        fail(f"--replay-batch-size must be at most {args.buffer_size}, the --buffer-size, got {args.replay_batch_size}")
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
        name = f"{args.env_id}__{Path(__file__).stem}__{args.priority}__seed{args.seed}__{int(time.time())}"
        args = replace(args, run_dir=args.run_dir or Path("runs", name))
        args.total_timesteps = 100_000 if args.total_timesteps is None else args.total_timesteps
        batch_size, alpha = TABLE_3[max((size for size in TABLE_3 if size <= args.size), default=11)]
        batch_size = min(batch_size, args.buffer_size)
        args.replay_batch_size = batch_size if args.replay_batch_size is None else args.replay_batch_size
        args.priority_alpha = alpha if args.priority_alpha is None else args.priority_alpha
        check(args)
        make_run_dir(args.run_dir)

    torch.set_num_threads(args.torch_threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any, and filling takes time
    envs, eval_envs = make_envs(args, args.num_envs), make_envs(args, args.eval_episodes)
    maze = envs.maze
    num_cells, num_actions = maze.next_cell.shape
    torch.manual_seed(args.seed)
    actor, critic = Actor(num_cells, num_actions).to(args.device), Critic(num_cells).to(args.device)
    weights = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.RMSprop(weights, lr=args.learning_rate, alpha=0.99, eps=1e-5, foreach=True)
    # Schaul et al. (2016), Alg. 1, lines 1 and 2
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, args.gamma, args.priority_alpha, args.priority)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer, "buffer": buffer}
    rngs = {"rollout": np.random.default_rng([args.seed, 0])}
    rngs["replay"] = np.random.default_rng([args.seed, 1])
    cells, _ = envs.reset(seed=args.seed)  # Schaul et al. (2016), Alg. 1, line 3
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
        if step > first_step:
            scalars["charts/SPS"] = (step - first_step) / (time.time() - started)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        progress.set_postfix_str(f"return {returns.mean():.2f}, success {successes.mean():.0%}")

    def write_pictures() -> None:
        visits = play(make_envs(args, 100), policy, args.seed, np.random.default_rng([args.seed, 2]))[3]
        writer.add_scalar("eval/visited_cells", np.count_nonzero(visits), step)
        for name, figure in draw_pictures(maze, visits, critic, buffer).items():
            figure.savefig(args.run_dir / f"{name}.png", dpi=120)
            image = np.asarray(Image.open(args.run_dir / f"{name}.png").convert("RGB"))
            writer.add_image(f"pictures/{name}", image, step, dataformats="HWC")
        if args.capture_video:
            write_video(args.run_dir / "agent.gif", args, policy)

    batch, first_step, started = args.num_envs * args.num_steps, step, time.time()
    whole_batches = -(-args.total_timesteps // batch) * batch
    progress = tqdm(total=whole_batches, initial=step, unit=" steps", disable=None)
    with SummaryWriter(args.run_dir) as writer, progress, catch_signals() as caught:
        while step < args.total_timesteps:  # Schaul et al., Alg. 1, line 4
            if caught or step % args.checkpoint_every < batch:
                save_checkpoint()
            if caught:
                print(f"stopped at step {step}; --resume {args.run_dir} goes on from there", file=sys.stderr)
                sys.exit(128 + caught[0])
            policy = policy_table(actor)
            if step % args.eval_every < batch:
                log()

            # Schaul et al., Alg. 1, lines 5 and 6: execute the policy, store its trajectories
            rollout, cells = collect_rollout(envs, cells, policy, args.num_steps, rngs["rollout"])
            finished += buffer.add(rollout)
            # Improve the policy with the RL algorithm
            losses |= update_actor_critic(actor, critic, optimizer, rollout, args)
            step += batch

            # Schaul et al., Alg. 1, lines 7 to 15: every few updates, learn from replayed transitions
            if step // batch % args.replay_every == 0 and len(buffer):
                for _ in range(args.replay_updates):
                    losses |= update_from_replay(actor, critic, optimizer, buffer, args, rngs["replay"])

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
