# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "matplotlib==3.11.2", "numpy==2.4.6", "pillow==13.0.0",
#                 "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
"""Advantage actor-critic with recall traces in the four-room maze (Goyal et al., ICLR 2019, sections 6.1, D, F and H).

A backtracking model learns which state and action may have come before a state. Unrolled backwards from states of high
value, it imagines traces that lead to them, and the policy imitates these recall traces. Algorithm 1 of the paper is in
main: search for "Alg. 1"; (2.1) is section 2.1 of the paper. The maze is in envs/four_room.py, all else in this file.

    python recall_a2c_fourroom.py --capture-video             # exact predecessors, learned backward policy (6.1)
    python recall_a2c_fourroom.py --recall none               # the plain actor-critic
    python recall_a2c_fourroom.py --evaluate RUN_DIR          # play the trained agent

The greedy policy first solves the default 15 x 15 maze after about 5 000 environment steps; without recall traces it
takes 38 000 (interquartile means of 10 seeds). 100 000 steps take about ten seconds on one core of a laptop.
Shapes: S states, A actions, T steps in each of E environments, N traces; n and B stand for any number.
"""

import io
import json
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.four_room import FourRoomEnv, FourRoomMaze, FourRoomVectorEnv, draw_pictures, write_gif


@dataclass
class Args:
    # run
    seed: int = 1  # seed of networks and all sampling
    total_timesteps: int | None = None  # environment steps in total, 100 000 if not given; may grow with --resume
    run_dir: str = ""  # folder of this run; runs/<env>__<script>__<recall>__seed<seed>__<time> if not given
    resume: str = ""  # go on with the interrupted run in this folder, with its own arguments
    evaluate: str = ""  # play an episode with the trained agent in this folder
    eval_every: int = 1_000  # environment steps between evaluations of the greedy policy
    checkpoint_every: int = 50_000  # environment steps between checkpoints; episodes under way are cut there
    capture_video: bool = False  # write a GIF of the greedy agent, at the end of training or with --evaluate
    # environment
    size: int = 15  # cells along each side of the maze, walls included (paper: 11, 12, 13, 14, 15, 19)
    num_envs: int = 2  # environments stepped side by side
    # actor-critic
    num_steps: int = 192  # steps of each environment between two updates
    learning_rate: float = 7e-4  # step size of RMSprop for the actor and the critic
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # decay of generalized advantage estimation
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the critic's loss
    max_grad_norm: float = 0.5  # largest norm of the gradient of an actor-critic update
    # recall traces; none: no traces; true: learned actions, exact predecessors (6.1); learned: learned actions, learned
    # predecessors (Eq. 2); random: uniformly drawn actions, exact predecessors (App. F)
    recall: Literal["none", "true", "learned", "random"] = "true"
    # where traces start: next states of rewards > 0 (2.1), the buffer's state of highest V(s) (Alg. 2), the goal (4)
    start_states: Literal["reward", "value", "goal"] = "reward"
    num_traces: int = 32  # N, recall traces per imitation update
    trace_length: int | None = None  # most steps of a trace, 2 * size if not given; it may end earlier
    recall_every: int = 1  # actor-critic updates per recall phase (App. H, Fig. 17)
    recall_updates: int = 2  # imitation updates per recall phase, each with new traces (App. H, Fig. 18)
    backtracking_updates: int = 2  # backtracking model updates per recall phase
    backtracking_batch_size: int = 128  # (state, action, next state) tuples per backtracking model update
    backtracking_lr: float = 1e-2  # step size of Adam for the backtracking model (beta in Alg. 1)
    imitation_lr: float = 1e-2  # step size of Adam for the imitation of traces (Alg. 1 uses alpha here, too)
    top_trajectories: int = 10  # k_traj, how many trajectories the buffer keeps, those of highest return
    top_fraction: float = 1.0  # k, share of the buffer's tuples that is used, those of highest return-to-go


# ------------------------------------------------------------------------------------------------------ networks
def mlp(first: nn.Module, outputs: int, activation: type[nn.Module] = nn.Tanh, gain: float = 0.01) -> nn.Sequential:
    """Two hidden layers, the first one an embedding (a linear layer on one-hot inputs); `gain` scales the output."""
    hidden = first.embedding_dim
    layers = [first, activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, outputs)]
    for layer, scale in zip(layers[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
    for layer in layers[2::2]:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def evaluate_all_states(actor: nn.Module, critic: nn.Module) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """log pi(a | s) (S, A) and V(s) (S,) with gradients, and pi(a | s) (S, A) without them, for all states at once."""
    states = torch.arange(actor[0].num_embeddings)
    log_probs = actor(states).log_softmax(-1)
    return log_probs, critic(states).squeeze(-1), log_probs.detach().exp().numpy()


class BacktrackingModel(nn.Module):
    """q_phi(s_t, a_t | s_{t+1}) = q(a_t | s_{t+1}) q(s_t | a_t, s_{t+1}), Eq. (1), of the states of a maze (App. C)."""

    def __init__(self, maze: FourRoomMaze, recall: str):
        super().__init__()
        self.num_states, num_actions = maze.next_cell.shape
        gain = 0.0 if recall == "random" else 0.01  # 0: all actions get the same logit
        self.action_predictor = mlp(nn.Embedding(self.num_states, 128), num_actions, gain=gain)
        self.state_predictor = None
        if recall == "learned":
            one_hot_state_and_action = nn.EmbeddingBag(self.num_states + num_actions, 128, mode="sum")
            self.state_predictor = mlp(one_hot_state_and_action, self.num_states, nn.ReLU)
        self.predecessors = torch.from_numpy(maze.predecessors[:, :, 0])  # (S, A), neighbour before bump; -1: none

    def action_log_probs(self, next_states: torch.Tensor) -> torch.Tensor:
        """log q(a_t | s_{t+1}) of every action, (B, A), for the next states (B,)."""
        logits = self.action_predictor(next_states)
        if self.state_predictor is None:  # actions without a predecessor get probability 0
            logits = logits.masked_fill(self.predecessors[next_states] == -1, -1e9)
        return logits.log_softmax(-1)

    def state_log_probs(self, actions: torch.Tensor, next_states: torch.Tensor) -> torch.Tensor:
        """log q(s_t | a_t, s_{t+1}) of every state, (B, S), for actions and next states (B,); `learned` only."""
        return self.state_predictor(torch.stack((next_states, self.num_states + actions), dim=1)).log_softmax(-1)

    def log_prob(self, states: torch.Tensor, actions: torch.Tensor, next_states: torch.Tensor) -> torch.Tensor:
        """log q(s_t, a_t | s_{t+1}), Eq. (1), as (B,); -1e9 where s_t is not the exact predecessor (if not learned)."""
        log_prob = self.action_log_probs(next_states).gather(1, actions.unsqueeze(1)).squeeze(1)
        if self.state_predictor is None:
            return log_prob.masked_fill(states != self.predecessors[next_states, actions], -1e9)
        return log_prob + self.state_log_probs(actions, next_states).gather(1, states.unsqueeze(1)).squeeze(1)

    def sample_states(self, actions: np.ndarray, next_states: np.ndarray) -> np.ndarray:
        """s_t ~ q(s_t | a_t, s_{t+1}), arrays (B,)."""
        if self.state_predictor is None:
            return self.predecessors.numpy()[next_states, actions]
        probs = self.state_log_probs(torch.from_numpy(actions), torch.from_numpy(next_states)).exp().numpy()
        return sample(probs.cumsum(axis=1), torch.rand(len(probs), 1).numpy())


def sample(cumulative: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Draws an index (B,) from each row of cumulative probabilities (B, m), by uniform numbers u (B, 1) in [0, 1)."""
    return (u * cumulative[:, -1:] >= cumulative[:, :-1]).sum(axis=1)  # the last sum is 1 but for rounding


# ------------------------------------------------------------------------------------------------------ buffer
Rollout = namedtuple("Rollout", "states actions rewards next_states terminated truncated")  # arrays (T, E)
Tuples = namedtuple("Tuples", "states actions rewards next_states returns")  # arrays (n,); returns: returns-to-go


def cut_loops(states: list[int]) -> list[int]:
    """The time steps of a trajectory's states that remain when its loops are cut out: [3, 4, 5, 4, 6] gives [0, 3, 4].

    When a state comes again, its earlier visit and all steps since are dropped, so only the last visit of it remains.
    """
    kept = {}  # state: time step, in the order of the trajectory
    for t, state in enumerate(states):
        while state in kept:
            kept.popitem()  # the latest entry
        kept[state] = t
    return list(kept.values())


class TrajectoryBuffer:
    """B (App. C): the trajectories of highest return that got a reward > 0. We, not the paper, cut out their loops."""

    def __init__(self, capacity: int, num_envs: int, gamma: float):
        self.capacity, self.gamma = capacity, gamma
        self.best = []  # (return, [(s_t, a_t, r_t, s_{t+1}, return-to-go), ...]), worst first
        self.unfinished = [[] for _ in range(num_envs)]  # [(s_t, a_t, r_t, s_{t+1}), ...] of each environment's episode

    def add(self, rollout: Rollout) -> list[tuple[float, int]]:
        """Adds a rollout; returns (return, length) of all episodes that ended in it."""
        ended = []
        for i, episode in enumerate(self.unfinished):
            for *step, terminated, truncated in zip(*(column[:, i].tolist() for column in rollout), strict=True):
                episode.append(step)
                if terminated or truncated:
                    ended.append(self.add_episode(episode))
                    episode.clear()
        return ended

    def add_episode(self, episode: list) -> tuple[float, int]:
        """Keeps an episode if it is one of the best; returns its return and length."""
        states, _, rewards, _ = zip(*episode, strict=True)
        if max(rewards) > 0 and (len(self.best) < self.capacity or sum(rewards) > self.best[0][0]):
            returns = list(accumulate(reversed(rewards), lambda later, reward: reward + self.gamma * later))[::-1]
            trajectory = [(*episode[t], returns[t]) for t in cut_loops(states)]
            self.best = sorted([*self.best, (sum(rewards), trajectory)], key=lambda pair: pair[0])[-self.capacity :]
        return sum(rewards), len(rewards)

    def most_valuable(self, fraction: float) -> Tuples:
        """The given fraction (rounded, at least one) of all tuples in the buffer, best first, by their return-to-go."""
        steps = [step for _, trajectory in self.best for step in trajectory]
        steps = sorted(steps, key=lambda step: -step[4])[: max(1, round(fraction * len(steps)))]  # [4]: return-to-go
        return Tuples(*map(np.array, zip(*steps, strict=True)))


# ------------------------------------------------------------------------------------------------------ actor-critic
def collect_rollout(envs, states: np.ndarray, policy: np.ndarray, num_steps: int) -> tuple[Rollout, np.ndarray]:
    """Runs the policy (S, A) for T = num_steps steps from states (E,); returns the rollout and the states after it."""
    steps, cumulative = [], policy.cumsum(axis=1)
    for u in torch.rand(num_steps, len(states), 1).numpy():
        actions = sample(cumulative[states], u)
        observed, rewards, terminated, truncated, infos = envs.step(actions)
        next_states = observed
        if infos:  # where an episode has ended, the first state of the next episode is observed
            next_states = np.where(infos["_final_obs"], infos["final_obs"], observed).astype(int)
        steps.append((states, actions, rewards, next_states, terminated, truncated))
        states = observed
    return Rollout(*map(np.array, zip(*steps, strict=True))), states


def generalized_advantages(rollout: Rollout, values, next_values, gamma: float, gae_lambda: float) -> np.ndarray:
    """Advantages A_t (T, E) of a rollout, given V(s_t) and V(s_{t+1}), both (T, E) (GAE, Schulman et al., 2016).

    A_t = delta_t + gamma lambda A_{t+1} with delta_t = r_t + gamma V(s_{t+1}) - V(s_t). V(s_{t+1}) counts as 0
    after a terminated step. A_{t+1} counts as 0 after a terminated or truncated step, and after step T.
    """
    advantages = rollout.rewards + gamma * np.where(rollout.terminated, 0, next_values) - values  # delta_t so far
    decay = gamma * gae_lambda * ~(rollout.terminated | rollout.truncated)
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


def update_actor_critic(optimizer, rollout: Rollout, log_probs, values, args: Args) -> dict[str, float]:
    """One step of A2C (Mnih et al., 2016) on a rollout, given log pi(a | s) (S, A) and V(s) (S,); returns losses."""
    v, next_v = (values.detach().numpy()[states] for states in (rollout.states, rollout.next_states))
    advantages = generalized_advantages(rollout, v, next_v, args.gamma, args.gae_lambda)
    states, actions = torch.from_numpy(rollout.states), torch.from_numpy(rollout.actions)
    targets, advantages = torch.from_numpy(advantages + v).float(), torch.from_numpy(advantages).float()
    policy_loss = -(advantages * log_probs[states, actions]).mean()
    value_loss = nn.functional.mse_loss(values[states], targets)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[states].mean()
    optimizer.zero_grad()
    (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
    optimizer.step()
    losses = {"losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/entropy": entropy}
    return {name: loss.item() for name, loss in losses.items()}


# ------------------------------------------------------------------------------------------------------ recall traces
def update_backtracking_model(model: BacktrackingModel, optimizer, tuples: Tuples, args: Args) -> dict[str, float]:
    """One step on the mean of -log q of a batch of tuples, drawn with replacement; gives "recall/backtracking_loss"."""
    indices = torch.randint(len(tuples.states), (args.backtracking_batch_size,)).numpy()
    columns = tuples.states[indices], tuples.actions[indices], tuples.next_states[indices]
    backtracking_loss = -model.log_prob(*map(torch.from_numpy, columns)).mean()  # Eq. (2), its mean over the batch
    optimizer.zero_grad()
    backtracking_loss.backward()
    optimizer.step()
    return {"recall/backtracking_loss": backtracking_loss.item()}


def high_value_states(tuples: Tuples | None, values: np.ndarray, maze: FourRoomMaze, args: Args) -> np.ndarray:
    """The N states in which traces start, (N,), drawn uniformly from those that args.start_states names; V(s): (S,)."""
    if args.start_states == "goal":  # known ahead of time (4)
        return np.full(args.num_traces, maze.goal)
    candidates = tuples.next_states[tuples.rewards > 0]
    if args.start_states == "value":  # Alg. 2, line 6
        candidates = tuples.states[values[tuples.states] == values[tuples.states].max()]
    return candidates[torch.randint(len(candidates), (args.num_traces,)).numpy()]


@torch.no_grad()
def recall_traces(model: BacktrackingModel, starts: np.ndarray, first_state: int, length: int) -> tuple:
    """Unrolls the model backwards from N high-value states `starts` (N,), each for at most `length` steps (2.1).

    A step draws a_t ~ q(a_t | s_{t+1}), then s_t ~ q(s_t | a_t, s_{t+1}). A trace that reaches `first_state`, in which
    episodes begin, ends there. Returns states and actions (n,): first the last steps of all traces, and so backwards.
    """
    backward_policy = model.action_log_probs(torch.arange(model.num_states)).exp().numpy().cumsum(axis=1)  # (S, A)
    steps, next_states = [], starts
    for _ in range(length):
        u = torch.rand(len(next_states), 1).numpy()
        actions = sample(backward_policy[next_states], u)  # a_t ~ q(a_t | s_{t+1})
        states = model.sample_states(actions, next_states)  # s_t ~ q(s_t | a_t, s_{t+1})
        steps.append((states, actions))
        next_states = states[states != first_state]  # of the traces that go on
    return tuple(torch.from_numpy(np.concatenate(column)) for column in zip(*steps, strict=True))


def imitate(actor: nn.Sequential, optimizer, states: torch.Tensor, actions: torch.Tensor) -> dict[str, float]:
    """One step on the mean of -log pi(a | s) over all steps (n,) of the traces; gives "recall/imitation_loss"."""
    log_probs = actor(torch.arange(actor[0].num_embeddings)).log_softmax(-1)
    imitation_loss = -log_probs[states, actions].mean()  # Eq. (3), its mean over all steps of all traces
    optimizer.zero_grad()
    imitation_loss.backward()
    optimizer.step()
    return {"recall/imitation_loss": imitation_loss.item()}


# ------------------------------------------------------------------------------------------------------ run
def play(env: FourRoomEnv, policy: np.ndarray, greedy: bool = True) -> tuple[float, list[int]]:
    """The return and the states of an episode with the policy (S, A)."""
    states, episode_return, done = [env.reset()[0]], 0.0, False
    while not done:
        probs = policy[states[-1:]]
        action = probs.argmax() if greedy else sample(probs.cumsum(axis=1), torch.rand(1, 1).numpy())[0]
        state, reward, terminated, truncated, _ = env.step(action)
        states.append(state)
        episode_return, done = episode_return + reward, terminated or truncated
    return episode_return, states


RUN_NAME, TOTAL_TIMESTEPS = "FourRoom-v0__recall_a2c_fourroom__{recall}__seed{seed}", 100_000
AT_LEAST = {"seed": 0, "size": 7}  # smallest accepted values; all others: 1 for int, 0 for float
AT_MOST = {"seed": 2**63 - 1, "gamma": 1, "gae_lambda": 1, "top_fraction": 1}
MAY_CHANGE = ("resume", "evaluate", "total_timesteps", "capture_video")  # what an old run may be given anew


class UsageError(ValueError):
    """A wrong argument, in one line that names its flag and what is accepted."""


def read_args(args: Args) -> Args:
    """The arguments of the run in --resume or --evaluate; of the given ones only those that may change."""
    folder = args.resume or args.evaluate
    given = {name: value for name in MAY_CHANGE if (value := getattr(args, name))}
    try:
        return replace(Args(**json.loads(Path(folder, "args.json").read_text())), run_dir=folder, **given)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"--resume and --evaluate need the folder of a run of this script: {error}") from None


def check(args: Args) -> Args:
    """The arguments of the run. Raises UsageError for one that is out of range, or differs from the resumed run's."""
    run = read_args(args) if args.resume or args.evaluate else args
    nothing_else_given = args == Args(**{name: getattr(args, name) for name in MAY_CHANGE})  # Args(resume=...)
    for name, value in vars(run).items():
        flag, given = f"--{name.replace('_', '-')}", getattr(args, name)
        least, most = AT_LEAST.get(name, int(type(value) is int)), AT_MOST.get(name, sys.float_info.max)
        if type(value) in (int, float) and not least <= value <= most:
            raise UsageError(f"{flag} must be from {least} to {most:.4g}, got {value}")
        if given not in (None, "", value) and not nothing_else_given:
            raise UsageError(f"{flag} cannot change, it is {value} in {run.run_dir}, got {given}")
    return replace(run, total_timesteps=run.total_timesteps or TOTAL_TIMESTEPS)


@contextmanager
def open_run(args: Args):
    """The folder of a run, in which no other process can train at the same time."""
    name = f"runs/{RUN_NAME.format(**vars(args)).replace('/', '-').replace(':', '-')}__{int(time.time())}"
    run_dir, path = Path(args.run_dir or name), "args.tmp" if args.resume else "args.json"
    while not args.run_dir and run_dir.exists():  # the default name is taken
        run_dir = Path(f"{run_dir}_2")
    run_dir.mkdir(parents=True, exist_ok=bool(args.run_dir))
    if not args.resume and any(run_dir.iterdir()):
        raise UsageError(f"--run-dir must be new or empty, {run_dir} is not; --resume {run_dir} goes on with a run")
    try:
        with FileLock(run_dir / "lock", timeout=0):
            with open(run_dir / path, "w" if args.resume else "x") as file:
                json.dump(asdict(replace(args, resume="")), file, indent=4, default=str)
            (run_dir / path).replace(run_dir / "args.json")
            yield run_dir
    except Timeout:
        raise UsageError(f"another process is at work in {run_dir}") from None
    except (FloatingPointError, KeyboardInterrupt, OSError) as error:  # such as a full disk
        (run_dir / "checkpoint.tmp").unlink(missing_ok=True)
        raise type(error)(f"{str(error) or 'stopped'}; --resume {run_dir} goes on from the last checkpoint") from None


def load_checkpoint(run_dir: Path, parts: dict) -> tuple:
    """Brings all parts of a run to where the last checkpoint left them; returns its progress."""
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        return checkpoint["progress"]
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{run_dir} has no checkpoint of this run: {error}".splitlines()[0]) from None


def main(args: Args) -> Path:
    """Trains an agent, or plays the trained one of --evaluate; returns the folder of its run."""
    args = check(args)
    args = replace(args, trace_length=args.trace_length or 2 * args.size)
    torch.set_num_threads(1)  # the fastest for networks of this size
    torch.manual_seed(args.seed)
    eval_env = FourRoomEnv(args.size)
    maze, (num_states, num_actions) = eval_env.maze, eval_env.maze.next_cell.shape
    actor = mlp(nn.Embedding(num_states, 64), num_actions)  # Alg. 1, line 1: logits of pi(a | s), (B,) to (B, A)
    critic = mlp(nn.Embedding(num_states, 64), 1, gain=1.0)  # V(s), (B,) to (B, 1)
    optimizer = torch.optim.RMSprop([*actor.parameters(), *critic.parameters()], lr=args.learning_rate, eps=1e-5)
    buffer = TrajectoryBuffer(args.top_trajectories, args.num_envs, args.gamma)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer}
    if args.recall != "none":
        model = BacktrackingModel(maze, args.recall)  # Alg. 1, line 2
        model_optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr, fused=True)
        imitation_optimizer = torch.optim.Adam(actor.parameters(), lr=args.imitation_lr, fused=True)
        parts |= {"model": model, "model_optimizer": model_optimizer, "imitation_optimizer": imitation_optimizer}
    step, metrics, envs, traces, batch = 0, {}, None, None, args.num_envs * args.num_steps
    if args.evaluate:
        step, *_ = load_checkpoint(Path(args.evaluate), parts)
        episode_return, path = play(eval_env, evaluate_all_states(actor, critic)[2])
        if args.capture_video:
            write_gif(Path(args.evaluate, f"agent_{step}.gif"), maze, path)
        print(f"return {episode_return:.2f} in {len(path) - 1} steps")
        return Path(args.evaluate)
    with open_run(args) as run_dir:
        if (run_dir / "checkpoint.pt").exists():
            step, metrics, buffer.best, traces = load_checkpoint(run_dir, parts)
        first_step, started = step, time.time()
        bar = tqdm(total=-(-args.total_timesteps // batch) * batch, initial=step, unit=" steps", disable=None)
        with bar, SummaryWriter(run_dir, purge_step=step) as writer:
            while True:  # Alg. 1, line 3
                log_probs, values, policy = evaluate_all_states(actor, critic)
                for name, value in (metrics | {"policy": policy.sum(), "value": values.sum().item()}).items():
                    if not np.isfinite(value):
                        raise FloatingPointError(f"{name} is {value} at step {step}")
                finished = step >= args.total_timesteps
                if finished or envs is None or step % args.checkpoint_every < batch:
                    checkpoint = {name: part.state_dict() for name, part in parts.items()}
                    checkpoint |= {"rng": torch.get_rng_state(), "progress": (step, metrics, buffer.best, traces)}
                    writer.flush()
                    torch.save(checkpoint, file := io.BytesIO())  # in memory first: torch hides that a disk is full
                    (run_dir / "checkpoint.tmp").write_bytes(file.getvalue())
                    (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")  # never half a file
                    envs = FourRoomVectorEnv(args.num_envs, args.size)  # afresh, as in a run that is resumed from here
                    states, _ = envs.reset(seed=args.seed + step)
                if finished or step % args.eval_every < batch:
                    episode_return, path = play(eval_env, policy)
                    scalars = {"eval/return": episode_return, "eval/success_rate": float(path[-1] == maze.goal)}
                    scalars["charts/SPS"] = (step - first_step) / (time.time() - started + 1e-9)
                    for name, value in (metrics | scalars).items():
                        writer.add_scalar(name, value, step)
                    bar.set_postfix_str(f"return {episode_return:.2f}")
                if finished:
                    break
                rollout, states = collect_rollout(envs, states, policy, args.num_steps)  # Alg. 1, line 4
                step += batch
                bar.update(batch)
                rollout.truncated[-1] |= (step % args.checkpoint_every < batch) & ~rollout.terminated[-1]  # cut
                if ended := buffer.add(rollout):  # Alg. 1, line 5
                    mean_return, mean_length = np.mean(ended, axis=0).tolist()
                    metrics |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
                metrics |= update_actor_critic(optimizer, rollout, log_probs, values, args)  # Alg. 1, lines 6 and 7
                may_recall = args.recall != "none" and (buffer.best or args.start_states == "goal")
                if may_recall and step // batch % args.recall_every == 0:
                    tuples = buffer.most_valuable(args.top_fraction) if buffer.best else None
                    if tuples and args.recall != "random":  # Alg. 1, lines 8 and 9: fit the model to the best tuples
                        for _ in range(args.backtracking_updates):
                            metrics |= update_backtracking_model(model, model_optimizer, tuples, args)
                    for _ in range(args.recall_updates):
                        starts = high_value_states(tuples, values.detach().numpy(), maze, args)  # Alg. 1, line 10
                        traces = recall_traces(model, starts, maze.starts[0], args.trace_length)  # Alg. 1, line 11
                        metrics |= imitate(actor, imitation_optimizer, *traces)  # Alg. 1, lines 12 and 13
                    metrics["recall/trace_length"] = len(traces[0]) / args.num_traces
            visits = np.concatenate([play(eval_env, policy, greedy=False)[1][:-1] for _ in range(100)])
            writer.add_scalar("eval/visited_cells", len(set(visits)), step)
            for name, figure in draw_pictures(maze, visits, values.detach().numpy(), traces).items():
                figure.savefig(run_dir / f"{name}.png", dpi=120)
                writer.add_figure(f"pictures/{name}", figure, step)
            if args.capture_video:
                write_gif(run_dir / "agent.gif", maze, path)
    print(f"pictures, curves and the trained agent are in {run_dir}")
    return run_dir


if __name__ == "__main__":
    try:
        args = tyro.cli(Args)
        if args.resume or args.evaluate:  # flags that are not given are those of the run
            args = tyro.cli(Args, default=read_args(args))
        main(args)
    except (UsageError, FloatingPointError, OSError, KeyboardInterrupt) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit({FloatingPointError: 1, KeyboardInterrupt: 130}.get(type(error), 2))
