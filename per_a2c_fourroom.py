# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "matplotlib==3.11.2", "numpy==2.4.6", "pillow==13.0.0",
#                 "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
"""Advantage actor-critic with prioritized experience replay in the four-room maze: the baseline of recall traces.

After every few updates on its own rollouts the agent learns again from past experience, drawn by priority (Goyal et
al., ICLR 2019, section 6.2 and Table 3; Figures 3, 4 and 10). All else is as in recall_a2c_fourroom.py. "Alg. 1" and
"Eq. (1)" are those of Schaul et al. (2016), in main, ReplayBuffer and update_from_replay; (E.3) is a section, and
Table 3 a table, of Goyal et al.

    python per_a2c_fourroom.py --capture-video                # replay of high returns (self-imitation)
    python per_a2c_fourroom.py --priority td-error            # replay of surprises (Schaul et al., 2016)
    python per_a2c_fourroom.py --evaluate RUN_DIR             # play the trained agent

The greedy policy first solves the default 15 x 15 maze after about 15 000 environment steps, with td-error after
9 400; without replay it takes 38 000 (interquartile means of 10 seeds). 100 000 steps take about fifteen
seconds on one core of a laptop.
Shapes: S states, A actions, T x E steps of a rollout in E environments, n and B any number.
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

from envs.four_room import FourRoomEnv, FourRoomVectorEnv, draw_pictures, write_gif


@dataclass
class Args:
    # run
    seed: int = 1  # seed of networks and all sampling
    total_timesteps: int | None = None  # environment steps in total, 100 000 if not given; may grow with --resume
    run_dir: str = ""  # folder of this run; runs/<env>__<script>__<priority>__seed<seed>__<time> if not given
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
    # prioritized replay; return: only episodes with a positive reward, priority (R - V)+ with R the return-to-go
    # (self-imitation, Oh et al., 2018); td-error: all episodes, priority |TD error| (Schaul et al., 2016)
    priority: Literal["return", "td-error"] = "return"
    buffer_size: int = 100_000  # transitions in the replay buffer (E.3)
    replay_batch_size: int | None = None  # transitions per replay update, at most all in the buffer; default: Table 3
    replay_every: int = 3  # actor-critic updates per replay phase (Table 3)
    replay_updates: int = 16  # replay updates per replay phase, each with a new batch (Table 3: 1)
    priority_alpha: float | None = None  # exponent of the priorities, 0 is uniform replay; default: Table 3
    priority_beta: float = 0.1  # exponent of the importance weights, 0: all are 1 (Table 3)


TABLE_3 = {7: (200, 0.8), 13: (2000, 0.8), 15: (1000, 0.95)}  # from this size on: replay batch size, priority alpha


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


def sample(cumulative: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Draws an index (B,) from each row of cumulative probabilities (B, m), by uniform numbers u (B, 1) in [0, 1)."""
    return (u * cumulative[:, -1:] >= cumulative[:, :-1]).sum(axis=1)  # the last sum is 1 but for rounding


# ------------------------------------------------------------------------------------------------------ buffer
Rollout = namedtuple("Rollout", "states actions rewards next_states terminated truncated")  # arrays (T, E)
Tuples = namedtuple("Tuples", "states actions rewards next_states terminated returns")  # (n,); returns: to go


class ReplayBuffer:
    """Prioritized experience replay (Schaul et al., 2016, proportional) of the last `capacity` transitions."""

    def __init__(self, capacity: int, num_envs: int, gamma: float, alpha: float, priority: str):
        self.capacity, self.gamma, self.alpha, self.priority = capacity, gamma, alpha, priority
        self.tuples = Tuples(*(np.zeros(capacity, dtype) for dtype in (int, int, float, int, bool, float)))
        self.powers = np.zeros(capacity)  # p^alpha of the priorities p
        self.stored = 0  # transitions so far; number n lies in slot n % capacity
        self.unfinished = [[] for _ in range(num_envs)]  # [(s_t, a_t, r_t, s_{t+1}, terminated), ...] of each episode

    def __len__(self) -> int:
        return min(self.stored, self.capacity)

    def add(self, rollout: Rollout) -> list[tuple[float, int]]:
        """Adds a rollout; returns (return, length) of all episodes that ended in it."""
        ended = []
        for i, episode in enumerate(self.unfinished):
            for *step, truncated in zip(*(column[:, i].tolist() for column in rollout), strict=True):
                episode.append(step)
                if step[4] or truncated:
                    ended.append(self.add_episode(episode))
                    episode.clear()
        return ended

    def add_episode(self, episode: list) -> tuple[float, int]:
        """Stores an episode over the oldest transitions (Alg. 1, line 6); for `return` only if it got a reward > 0.

        New transitions get the highest priority in the buffer, or 1 if it is empty. Returns the episode's return and
        length.
        """
        columns = list(zip(*episode, strict=True))
        rewards = columns[2]
        if self.priority == "td-error" or max(rewards) > 0:
            returns = list(accumulate(reversed(rewards), lambda later, reward: reward + self.gamma * later))[::-1]
            slots = (self.stored + np.arange(len(rewards))) % self.capacity
            highest = self.powers[: len(self)].max(initial=0) or 1.0
            for column, new in zip(self.tuples, (*columns, returns), strict=True):
                column[slots] = new
            self.powers[slots] = highest
            self.stored += len(rewards)
        return sum(rewards), len(rewards)

    def sample(self, batch_size: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Slots (B,) drawn with P(i) = p_i^alpha / sum of p^alpha, Eq. (1), and their importance weights (B,).

        The sum of all p^alpha is cut into B equal parts, and one point is drawn uniformly in each; a slot is drawn if
        its p^alpha covers the point. The weights are w_i = (N P(i))^-beta, N the number of transitions in the buffer,
        divided by the largest w_i in the buffer.
        """
        powers = self.powers[: len(self)]
        cumulative = powers.cumsum()
        points = (np.arange(batch_size) + torch.rand(batch_size, dtype=torch.float64).numpy()) / batch_size
        slots = np.searchsorted(cumulative[:-1], points * cumulative[-1], side="right")
        return slots, (powers[slots] / powers.min()) ** -beta

    def state_dict(self) -> dict:
        columns = [torch.from_numpy(column[: len(self)].copy()) for column in (*self.tuples, self.powers)]
        return {"columns": columns, "stored": self.stored}

    def load_state_dict(self, state: dict) -> None:
        self.stored = state["stored"]
        for column, saved in zip((*self.tuples, self.powers), state["columns"], strict=True):
            column[: len(saved)] = saved.numpy()


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


# ------------------------------------------------------------------------------------------------------ replay
def update_from_replay(actor, critic, optimizer, buffer: ReplayBuffer, args: Args) -> dict[str, float]:
    """One step of A2C on transitions drawn by priority, without entropy bonus (E.3); returns means over the batch.

    The advantage A is (R - V)+ for `return`, R the return-to-go, and the TD error for `td-error`. The new priority of a
    transition is |A| + 1e-6. With the importance weights w and V' = V before the step, the loss is the mean of
    -w A log pi(a | s) plus vf_coef times that of w (V - (A + V'))^2. A batch is at most as large as the buffer.
    """
    # Alg. 1, lines 9 and 10: sample by priority, with importance weights
    slots, weights = buffer.sample(min(args.replay_batch_size, len(buffer)), args.priority_beta)
    tuples = Tuples(*(column[slots] for column in buffer.tuples))
    log_probs, values, _ = evaluate_all_states(actor, critic)
    v, next_v = (values.detach().numpy()[states] for states in (tuples.states, tuples.next_states))
    if args.priority == "return":  # Alg. 1, line 11
        advantages = np.maximum(tuples.returns - v, 0)  # (R - V)+
    else:
        advantages = tuples.rewards + args.gamma * np.where(tuples.terminated, 0, next_v) - v  # TD errors
    buffer.powers[slots] = (np.abs(advantages) + 1e-6) ** buffer.alpha  # Alg. 1, line 12
    # Alg. 1, lines 13 to 15: the weighted step
    states, actions = torch.from_numpy(tuples.states), torch.from_numpy(tuples.actions)
    columns = (weights, advantages, advantages + v)
    weights, advantages, targets = (torch.from_numpy(column).float() for column in columns)
    policy_loss = -(weights * advantages * log_probs[states, actions]).mean()
    value_loss = (weights * (values[states] - targets) ** 2).mean()
    optimizer.zero_grad()
    (policy_loss + args.vf_coef * value_loss).backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
    optimizer.step()
    logged = {"policy_loss": policy_loss, "value_loss": value_loss, "advantage": advantages, "weight": weights}
    return {f"replay/{name}": value.mean().item() for name, value in logged.items()}


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


RUN_NAME, TOTAL_TIMESTEPS = "FourRoom-v0__per_a2c_fourroom__{priority}__seed{seed}", 100_000
AT_LEAST = {"seed": 0, "size": 7}  # smallest accepted values; all others: 1 for int, 0 for float
AT_MOST = {"seed": 2**63 - 1, "gamma": 1, "gae_lambda": 1, "priority_alpha": 10, "priority_beta": 1}
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
    batch_size, alpha = TABLE_3[max(size for size in TABLE_3 if size <= args.size)]
    args = replace(args, replay_batch_size=args.replay_batch_size or batch_size)
    args = replace(args, priority_alpha=alpha if args.priority_alpha is None else args.priority_alpha)
    torch.set_num_threads(1)  # the fastest for networks of this size
    torch.manual_seed(args.seed)
    eval_env = FourRoomEnv(args.size)
    maze, (num_states, num_actions) = eval_env.maze, eval_env.maze.next_cell.shape
    actor = mlp(nn.Embedding(num_states, 64), num_actions)  # logits of pi(a | s), (B,) to (B, A)
    critic = mlp(nn.Embedding(num_states, 64), 1, gain=1.0)  # V(s), (B,) to (B, 1)
    optimizer = torch.optim.RMSprop([*actor.parameters(), *critic.parameters()], lr=args.learning_rate, eps=1e-5)
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, args.gamma, args.priority_alpha, args.priority)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer, "buffer": buffer}
    step, metrics, envs, batch = 0, {}, None, args.num_envs * args.num_steps
    if args.evaluate:
        step, *_ = load_checkpoint(Path(args.evaluate), parts)
        episode_return, path = play(eval_env, evaluate_all_states(actor, critic)[2])
        if args.capture_video:
            write_gif(Path(args.evaluate, f"agent_{step}.gif"), maze, path)
        print(f"return {episode_return:.2f} in {len(path) - 1} steps")
        return Path(args.evaluate)
    with open_run(args) as run_dir:
        if (run_dir / "checkpoint.pt").exists():
            step, metrics = load_checkpoint(run_dir, parts)
        first_step, started = step, time.time()
        bar = tqdm(total=-(-args.total_timesteps // batch) * batch, initial=step, unit=" steps", disable=None)
        with bar, SummaryWriter(run_dir, purge_step=step) as writer:
            while True:  # Alg. 1, line 4
                log_probs, values, policy = evaluate_all_states(actor, critic)
                for name, value in (metrics | {"policy": policy.sum(), "value": values.sum().item()}).items():
                    if not np.isfinite(value):
                        raise FloatingPointError(f"{name} is {value} at step {step}")
                finished = step >= args.total_timesteps
                if finished or envs is None or step % args.checkpoint_every < batch:
                    checkpoint = {name: part.state_dict() for name, part in parts.items()}
                    checkpoint |= {"rng": torch.get_rng_state(), "progress": (step, metrics)}
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
                rollout, states = collect_rollout(envs, states, policy, args.num_steps)  # Alg. 1, line 5
                step += batch
                bar.update(batch)
                rollout.truncated[-1] |= (step % args.checkpoint_every < batch) & ~rollout.terminated[-1]  # cut
                if ended := buffer.add(rollout):  # Alg. 1, line 6
                    mean_return, mean_length = np.mean(ended, axis=0).tolist()
                    metrics |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
                metrics |= update_actor_critic(optimizer, rollout, log_probs, values, args)
                if len(buffer) and step // batch % args.replay_every == 0:  # Alg. 1, line 7
                    for _ in range(args.replay_updates):  # Alg. 1, line 8
                        metrics |= update_from_replay(actor, critic, optimizer, buffer, args)  # Alg. 1, lines 9 to 15
            visits = np.concatenate([play(eval_env, policy, greedy=False)[1][:-1] for _ in range(100)])
            writer.add_scalar("eval/visited_cells", len(set(visits)), step)
            shares = 100 * buffer.powers / (buffer.powers.sum() or 1)
            replay = buffer.tuples.states, buffer.tuples.actions, shares
            for name, figure in draw_pictures(maze, visits, values.detach().numpy(), replay=replay).items():
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
