# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "imageio==2.38.1", "minari[hdf5]==0.5.4", "mujoco==4.0.0",
#                 "numpy==2.4.6", "pillow==13.0.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1",
#                 "tyro==1.0.17"]
# ///
"""Behaviour cloning of an expert, with recall traces or other augmentations (after Goyal et al., ICLR 2019, App. C).

A clone of few trajectories fails as soon as it leaves them. A backtracking model learns from them which action and
change of state may have come before a state. Unrolled backwards from the expert's states it imagines traces that lead
there, and the clone learns from these recall traces. Two rivals play distorted actions in the real environment.
This file is all there is; Algorithm 1 of the paper is what is left of it in main, where the expert is the policy.

    python recall_bc.py --augment bdm                         # recall traces, from the dataset halfcheetah/expert-v0
    python recall_bc.py --augment none                        # the expert's own trajectories
    python recall_bc.py --evaluate RUN_DIR                    # play the trained clone

20 000 updates take about a minute on one core. docs/recall_bc.md says how to record the dataset, and what came out.
Shapes: states (B, S), actions (B, A) from -1 to 1, trajectories of L steps, T steps of N traces, n and B any number.
"""

import io
import json
import math
import os
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from PIL import Image
from torch.distributions import Beta, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1  # seed of networks and all sampling
    total_timesteps: int | None = None  # updates of the clone in all, 20 000 if not given; may grow with --resume
    run_dir: str = ""  # folder of this run; runs/<env>__<script>__<augment>__seed<seed>__<time> if not given
    resume: str = ""  # go on with the interrupted run in this folder, with its own arguments
    evaluate: str = ""  # play --eval-episodes episodes with the trained clone in this folder
    eval_every: int = 5_000  # updates between evaluations of the greedy clone
    eval_episodes: int | None = None  # episodes per evaluation, each time from the same starts, 10 if not given
    checkpoint_every: int = 10_000  # updates between checkpoints
    capture_video: bool = False  # write a GIF of the greedy clone, at the end of training or with --evaluate
    device: str | None = None  # torch device of networks and data, cpu if not given
    torch_threads: int = 1  # CPU threads of torch
    # environment and expert
    env_id: str = "HalfCheetah-v5"  # Gymnasium id of the expert's environment
    max_episode_steps: int | None = None  # time limit of an episode, that of the environment if not given
    contact_forces: bool = True  # whether Ant and Humanoid observe the contact forces, 78 of Ant's 105 numbers
    dataset: str = "halfcheetah/expert-v0"  # id of a Minari dataset on this machine, whose first episodes are used
    episodes: int = 7  # trajectories of the expert (the slides: 7)
    expert_steps: int | None = None  # steps of each trajectory that are used, the first ones, all if not given
    # behaviour cloning
    hidden: int = 64  # units in each of the two hidden layers of the clone
    learning_rate: float = 3e-4  # step size of Adam for the clone
    batch_size: int = 128  # pairs of state and action per update (the slides: 100 000 updates)
    # augmentation. none: clone the expert; noise, mixup: distorted actions, played in the real environment;
    # bdm: recall traces of a backtracking model; bdm-cl: the same as a curriculum, from the tail of trajectories on
    augment: Literal["none", "noise", "mixup", "bdm", "bdm-cl"] = "bdm"
    with_expert: float = 0.0  # share of each batch that is the expert's own, beside augmented pairs (the slides: 0)
    num_traces: int = 497  # trajectories of noise, 71 for each of 7 of the expert, or recall traces
    uniform_noise: float = 0.9  # noise: largest number that is added to an action
    mixup_alpha: float = 0.1  # mixup: both parameters of the Beta distribution of the share of the second trajectory
    # recall traces
    start_states: Literal["tail", "all"] = "tail"  # bdm: traces start in the last third of trajectories, or anywhere
    trace_length: int = 20  # longest trace in steps, as in Table 2 for HalfCheetah
    curriculum_every: int = 5_000  # bdm-cl: updates with traces from the tail alone, then with those from the middle
    backtracking_updates: int = 5_000  # updates of the model, before those of the clone; 0: an untrained one (App. F)
    backtracking_batch_size: int = 256  # (state, action, next state) tuples per backtracking model update
    backtracking_lr: float = 1e-3  # step size of Adam for the backtracking model (beta in Alg. 1)
    action_noise: float = 1.0  # standard deviation of imagined actions as a share of the model's (App. C: 1)
    state_noise: float = 1.0  # standard deviation of imagined changes of state as a share of the model's (the paper: 1)
    trace_limit: float = 5.0  # standard deviations; a trace ends where its state is further from the mean of the data


LARGEST_ACTION = 1.0  # actions of traces are clipped to it


# ------------------------------------------------------------------------------------------------------ networks
def mlp(inputs: int, hidden: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """Two hidden layers."""
    layers = [nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Actor(nn.Module):
    """pi_theta(a | s), from states (B, S) to Gaussians of actions (B, A), with a std that is alike in all states."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.net, self.log_std = mlp(state_dim, hidden, action_dim, nn.Tanh), nn.Parameter(torch.zeros(action_dim))
        self.register_buffer("state_mean", torch.zeros(state_dim))  # of the expert's states
        self.register_buffer("state_std", torch.ones(state_dim))

    def forward(self, states: torch.Tensor) -> Normal:
        return Normal(self.net((states - self.state_mean) / self.state_std), self.log_std.exp(), validate_args=False)


class BacktrackingModel(nn.Module):
    """q_phi(ds_t, a_t | s_{t+1}) = q(a_t | s_{t+1}) q(ds_t | a_t, s_{t+1}) with ds_t = s_t - s_{t+1}, Eq. (1).

    Both are Gaussians of normalised quantities (App. C), actions with variance 1, changes of state with a learned one.
    """

    def __init__(self, state_dim: int, action_dim: int, hidden: int = 128):
        super().__init__()
        self.action_predictor = mlp(state_dim, hidden, action_dim, nn.Tanh)
        self.state_predictor = mlp(state_dim + action_dim, hidden, 2 * state_dim, nn.ReLU)
        for name, size in (("state", state_dim), ("action", action_dim), ("change", state_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def normalise_by(self, tuples) -> None:
        """Takes the means and standard deviations of these tuples."""
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
        return mean, -5 + nn.functional.softplus(6 - nn.functional.softplus(1 - log_std))  # bounds: -5, about 1

    def log_prob(self, states, actions, next_states) -> tuple[torch.Tensor, torch.Tensor]:
        """log q(a_t | s_{t+1}) and log q(ds_t | a_t, s_{t+1}), whose sum is the logarithm of Eq. (1), (B,) each."""
        action = (actions - self.action_mean) / self.action_std
        change = (states - next_states - self.change_mean) / self.change_std
        action_mean, (mean, log_std) = self.predict_action(next_states), self.predict_change(actions, next_states)
        of_actions = -0.5 * ((action - action_mean) ** 2 + math.log(2 * math.pi))
        of_changes = -0.5 * (((change - mean) / log_std.exp()) ** 2 + math.log(2 * math.pi)) - log_std
        return of_actions.sum(-1), of_changes.sum(-1)

    def sample(self, next_states: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
        """States s_t (B, S) and actions a_t (B, A) before `next_states`."""
        mean = self.predict_action(next_states)
        actions = self.action_mean + self.action_std * (mean + args.action_noise * torch.randn_like(mean))
        actions = actions.clamp(-LARGEST_ACTION, LARGEST_ACTION)
        mean, log_std = self.predict_change(actions, next_states)
        change = mean + args.state_noise * log_std.exp() * torch.randn_like(mean)
        return next_states + self.change_mean + self.change_std * change, actions


# ------------------------------------------------------------------------------------------------------ trajectories
# Arrays: states (L + 1, S), actions (L, A) from -1 to 1, rewards (L,); and the seed of the reset, None if not known.
Trajectory = namedtuple("Trajectory", "states actions rewards seed")
Tuples = namedtuple("Tuples", "states actions rewards next_states")  # tensors (n, ...)


def load_expert(env: gym.Env, args: Args) -> list[Trajectory]:
    """The first --episodes trajectories of a Minari dataset, with actions rescaled to -1 to 1."""
    try:
        dataset = minari.load_dataset(args.dataset)
        episodes = [dataset[i] for i in range(args.episodes)]
        seeds = [facts.get("seed") for facts in dataset.storage.get_episode_metadata(range(args.episodes))]
    except Exception as error:  # it is missing or damaged, or has fewer episodes
        needed = f"a Minari dataset on this machine (minari download gets one) with --episodes {args.episodes}"
        raise UsageError(f"--dataset {args.dataset} is not {needed}: {error}".splitlines()[0]) from None
    space, trajectories = dataset.action_space, []
    if (dataset.observation_space.shape, space.shape) != (env.observation_space.shape, env.action_space.shape):
        raise UsageError(f"--dataset {args.dataset} has other states or actions than --env-id {args.env_id}")
    low, width = space.low.astype(float), space.high.astype(float) - space.low
    for episode, seed in zip(episodes, seeds, strict=True):
        columns = episode.observations, 2 * (episode.actions - low) / width - 1, episode.rewards
        states, actions, rewards = (column.astype(np.float32) for column in columns)
        steps = args.expert_steps or len(rewards)
        trajectories.append(Trajectory(states[: steps + 1], actions[:steps], rewards[:steps], seed))
    return trajectories


def tuples_of(trajectories: list[Trajectory], device: str) -> Tuples:
    """All (s_t, a_t, r_t, s_{t+1}) of trajectories."""
    columns = zip(*((t.states[:-1], t.actions, t.rewards, t.states[1:]) for t in trajectories), strict=True)
    return Tuples(*(torch.from_numpy(np.concatenate(column)).to(device) for column in columns))


def distorted_actions(experts: list[Trajectory], args: Args) -> list[tuple[Trajectory, np.ndarray]]:
    """Trajectories whose first states are to be taken, and actions (L, A) to be played from there on.

    noise: --num-traces times an expert's actions with uniform noise, each expert as often. mixup: for each ordered pair
    of experts actions l' a_1 + (1 - l') a_2, from the start of the first, l' = max(l, 1 - l), l ~ Beta(alpha, alpha).
    """
    if args.augment == "noise":
        chosen = [experts[i % len(experts)] for i in range(args.num_traces)]
        noise = (2 * torch.rand(expert.actions.shape).numpy() - 1 for expert in chosen)
        return [(e, e.actions + args.uniform_noise * n) for e, n in zip(chosen, noise, strict=True)]
    mixed, beta = [], Beta(args.mixup_alpha, args.mixup_alpha)
    for first, second in permutations(experts, 2):
        share, length = beta.sample().item(), min(len(first.actions), len(second.actions))
        share = max(share, 1 - share)
        mixed.append((first, share * first.actions[:length] + (1 - share) * second.actions[:length]))
    return mixed


def replay(env: gym.Env, expert: Trajectory, actions: np.ndarray) -> Trajectory:
    """What really happens when actions (L, A) are taken from a trajectory's first state on, until a terminal state. The
    environment carries them out clipped to -1 to 1. The trajectory has them as they are: in the mean the expert's."""
    states, rewards, terminated = [env.reset(seed=expert.seed)[0]], [], False
    if expert.seed is None or not np.allclose(states[0], expert.states[0], atol=1e-4):
        raise UsageError("--augment noise and mixup need a --dataset with the seeds of its resets in --env-id")
    while len(rewards) < len(actions) and not terminated:
        state, reward, terminated, _, _ = env.step(actions[len(rewards)])
        states.append(state)
        rewards.append(reward)
    return Trajectory(np.array(states), actions[: len(rewards)], np.array(rewards, np.float32), expert.seed)


# ------------------------------------------------------------------------------------------------------ recall traces
def update_backtracking_model(model: BacktrackingModel, optimizer, tuples, args: Args) -> dict[str, torch.Tensor]:
    """One maximum likelihood step on a uniformly drawn batch of the valuable tuples; returns losses."""
    rows = torch.randint(len(tuples.rewards), (args.backtracking_batch_size,), device=tuples.rewards.device)
    batch = tuples._make(column[rows] for column in tuples)
    of_actions, of_changes = model.log_prob(batch.states, batch.actions, batch.next_states)
    backtracking_loss = -(of_actions + of_changes).mean()  # Eq. (2), its mean over the batch
    optimizer.zero_grad()
    backtracking_loss.backward()
    optimizer.step()
    losses = {"backtracking_loss": backtracking_loss, "action_nll": -of_actions.mean(), "state_nll": -of_changes.mean()}
    return {f"recall/{name}": loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def recall_traces(model: BacktrackingModel, starts: torch.Tensor, args: Args) -> tuple[torch.Tensor, ...]:
    """Unrolls the model backwards from N high-value states `starts` (N, S), for T = --trace-length steps.

    A step draws a_t ~ q(a_t | s_{t+1}), then ds_t ~ q(ds_t | a_t, s_{t+1}); s_t = s_{t+1} + ds_t. A trace ends where
    s_t is further than --trace-limit standard deviations from the mean of the tuples that the model has learned from.
    Returns states (T, N, S) and actions (T, N, A), those one step before the starts first, and which of them belong to
    a trace that has not ended, (T, N).
    """
    states, actions, inside, next_states = [], [], [], starts
    for _ in range(args.trace_length):
        next_states, action = model.sample(next_states, args)
        states.append(next_states)
        actions.append(action)
        inside.append(((next_states - model.state_mean).abs() <= args.trace_limit * model.state_std).all(-1))
    return torch.stack(states), torch.stack(actions), torch.stack(inside).cumprod(0).bool()


def places_of_starts(experts: list[Trajectory], args: Args) -> list[torch.Tensor]:
    """States (n, S) from which traces start, as the parts of the curriculum: the last, middle and first thirds of all
    trajectories, without their first states, before which there was nothing. For bdm the last thirds, or all, at once.
    """
    thirds = zip(*(np.array_split(expert.states[1:], 3) for expert in experts), strict=True)
    head, middle, tail = (torch.from_numpy(np.concatenate(third)).to(args.device) for third in thirds)
    if args.augment == "bdm-cl":
        return [tail, middle, head]
    return [tail] if args.start_states == "tail" else [torch.cat((tail, middle, head))]


# ------------------------------------------------------------------------------------------------------ cloning
@torch.no_grad()
def act(actor: Actor, states: np.ndarray, greedy: bool = False) -> np.ndarray:
    """Actions (B, A) of the policy in states (B, S)."""
    policy = actor(torch.tensor(states, device=actor.log_std.device))
    actions = (policy.mean if greedy else policy.sample()).cpu().numpy()
    if not np.isfinite(actions).all():
        raise FloatingPointError("an action is not finite, as the policy's weights or its observations are not")
    return actions


def draw(pairs: tuple[torch.Tensor, torch.Tensor], count: int) -> list[torch.Tensor]:
    """So many pairs of state and action, uniformly and with replacement."""
    rows = torch.randint(len(pairs[0]), (count,), device=pairs[0].device)
    return [column[rows] for column in pairs]


def clone(actor: Actor, optimizer, states: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step of the clone: the mean squared error of actions that are drawn from its policy. The mean learns what
    Eq. (3), the likelihood, would teach it; the standard deviation, which adds its square to the error, goes to 0."""
    imitation_loss = ((actor(states).rsample() - actions) ** 2).mean()
    optimizer.zero_grad()
    imitation_loss.backward()
    optimizer.step()
    return {"losses/imitation_loss": imitation_loss.detach(), "losses/std": actor.log_std.detach().exp().mean()}


# ------------------------------------------------------------------------------------------------------ environment
def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The environment with vectors of actions from -1 to 1 and of observations in single precision."""
    if render_mode and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    options = {} if args.contact_forces else {"include_cfrc_ext_in_observation": False}
    options |= {"render_mode": render_mode} if render_mode else {}
    env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps, disable_env_checker=True, **options)
    states, actions = env.observation_space, env.action_space
    vectors = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (states, actions))
    width = actions.high.astype(float) - actions.low.astype(float) if vectors else np.zeros(1)
    if not (vectors and actions.dtype.kind == "f" and ((width > 0) & (width < 1e38)).all()):
        raise ValueError(f"observations and bounded, continuous actions must be vectors, not {states} and {actions}")
    if env.spec.max_episode_steps is None:
        raise ValueError("there is no time limit, --max-episode-steps must be given")
    if render_mode and hasattr(env.unwrapped, "mujoco_renderer"):
        camera = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        env.unwrapped.mujoco_renderer.camera_id = camera  # which follows the agent; -1, the free one, if there is none
    env = gym.wrappers.TransformAction(env, lambda a: a.astype(actions.dtype).clip(actions.low, actions.high), actions)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))  # rounds, and may leave the bounds
    env = gym.wrappers.TransformObservation(env, lambda s: np.asarray(s, np.float32).reshape(states.shape), states)
    env = gym.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())
    return gym.wrappers.RecordEpisodeStatistics(env)


def play(actor: Actor, args: Args, video: Path | None = None) -> np.ndarray:
    """Returns of --eval-episodes greedy episodes, side by side; may write ten seconds of the first one as a GIF."""
    envs = [make_env(args, "rgb_array" if video and i == 0 else None) for i in range(args.eval_episodes or 10)]
    states = np.stack([env.reset(seed=args.seed + i)[0] for i, env in enumerate(envs)])
    step, returns, frames, fps = 0, {}, [], envs[0].metadata.get("render_fps") or 25
    every = max(1, round(fps / 25))  # steps from frame to frame
    while len(returns) < len(envs):
        if video and 0 not in returns and step % every == 0 and step < 10 * fps:
            frames.append(Image.fromarray(envs[0].render()).reduce(2))
        actions = act(actor, states, greedy=True)
        for i, env in enumerate(envs):
            if i not in returns:
                states[i], _, _, _, info = env.step(actions[i])
                if "episode" in info:
                    returns[i] = info["episode"]["r"]
                    env.close()
        step += 1
    if video:
        frames[0].save(video, save_all=True, append_images=frames[1:], duration=1000 * every / fps, loop=0)
    return np.array([returns[i] for i in range(len(envs))])


def try_out(args: Args) -> tuple[int, int]:
    """Tries the device, and a step and a frame of the environment; returns the sizes of states and actions."""
    tried = f"--device {args.device}"
    try:
        torch.zeros(1, device=args.device)
        options = " --no-contact-forces" * (not args.contact_forces) + " --capture-video" * args.capture_video
        tried = f"--env-id {args.env_id}{options}"
        env = make_env(args, "rgb_array" if args.capture_video else None)
        state, _ = env.reset(seed=args.seed)
        env.step(np.zeros(env.action_space.shape, np.float32))
        if args.capture_video:
            Image.fromarray(env.render()).quantize()
        env.close()
    except Exception as error:  # each device, environment and renderer has its own
        raise UsageError(f"{tried}: {' '.join(str(error).split())}") from None
    return len(state), env.action_space.shape[0]


# ------------------------------------------------------------------------------------------------------ run
RUN_NAME, TOTAL_TIMESTEPS = "{env_id}__recall_bc__{augment}__seed{seed}", 20_000
# others: 1 for whole numbers, 0 for the rest
AT_LEAST = {"seed": 0, "mixup_alpha": 1e-9, "backtracking_updates": 0, "expert_steps": 3}
AT_MOST = {"seed": 2**63 - 1, "with_expert": 1}
MAY_CHANGE = ("resume", "evaluate", "total_timesteps", "capture_video", "device", "eval_episodes")  # given anew


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
    """Trains a clone, or plays the trained one of --evaluate; returns the folder of its run."""
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(text, file=sys.stderr))  # as models are
    args = check(args)
    args = replace(args, device=args.device or "cpu")
    state_dim, action_dim = try_out(args)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    actor = Actor(state_dim, action_dim, args.hidden).to(args.device)  # Alg. 1, line 1
    optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, fused=True)
    parts = {"actor": actor, "optimizer": optimizer}
    if args.evaluate:
        step, *_ = load_checkpoint(Path(args.evaluate), {"actor": actor})
        returns = play(actor, args, Path(args.evaluate, f"agent_{step}.gif") if args.capture_video else None)
        print(*(f"episode {i}: return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
        print(f"mean return {returns.mean():.2f}, standard deviation {returns.std():.2f}")
        return Path(args.evaluate)
    env, metrics = make_env(args), {}
    trajectories = experts = load_expert(env, args)  # Alg. 1, line 5: all of B
    tuples = tuples_of(experts, args.device)  # Alg. 1, line 8: all of them are valuable
    actor.state_mean.copy_(tuples.states.mean(0))
    actor.state_std.copy_(tuples.states.std(0).clamp(min=1e-4))
    if args.augment in ("noise", "mixup"):
        trajectories = [replay(env, *distorted) for distorted in distorted_actions(experts, args)]
    parts_of_pairs = [tuples_of(trajectories, args.device)[:2]]  # what is cloned; a curriculum has several parts
    if args.augment in ("bdm", "bdm-cl"):
        model = BacktrackingModel(state_dim, action_dim).to(args.device)  # Alg. 1, line 2
        model_optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr, fused=True)
        parts["model"] = model
        model.normalise_by(tuples)
        for _ in range(args.backtracking_updates):  # Alg. 1, line 9
            metrics |= update_backtracking_model(model, model_optimizer, tuples, args)
        places, parts_of_pairs, lasting = places_of_starts(experts, args), [], []
        for starts in places:  # Alg. 1, line 10
            rows = torch.randint(len(starts), (math.ceil(args.num_traces / len(places)),))
            states, actions, inside = recall_traces(model, starts[rows], args)  # Alg. 1, line 11
            parts_of_pairs.append((states[inside], actions[inside]))
            lasting.append(inside.sum() / inside.shape[1])
        metrics["recall/trace_length"] = sum(lasting) / len(lasting)
        if not all(len(states) for states, _ in parts_of_pairs):
            raise UsageError("--trace-limit or --backtracking-lr: all traces of a part leave the data at once")
    else:
        metrics["augment/return"] = float(np.mean([trajectory.rewards.sum() for trajectory in trajectories]))
    stages = [[*map(torch.cat, zip(*parts_of_pairs[: i + 1], strict=True))] for i in range(len(parts_of_pairs))]
    weights = [w.detach() for part in parts.values() if isinstance(part, nn.Module) for w in part.parameters()]
    step = 0
    with open_run(args) as run_dir:
        if (run_dir / "checkpoint.pt").exists():
            step, metrics = load_checkpoint(run_dir, parts)
        first_step, started = step, time.time()
        bar = tqdm(total=args.total_timesteps, initial=step, unit=" updates", disable=None)
        with bar, SummaryWriter(run_dir, purge_step=step) as writer:
            while True:  # Alg. 1, line 3
                finished = step >= args.total_timesteps
                must_save = finished or step == first_step or step % args.checkpoint_every == 0
                must_evaluate = finished or step % args.eval_every == 0
                pairs = stages[min(step // args.curriculum_every, len(stages) - 1)]
                if must_save or must_evaluate:
                    for name, value in (metrics | {"weights": sum(weight.sum() for weight in weights)}).items():
                        if not math.isfinite(value):
                            raise FloatingPointError(f"{name} is {value} at step {step}")
                if must_save:
                    checkpoint = {name: part.state_dict() for name, part in parts.items()}
                    checkpoint |= {"rng": torch.get_rng_state(), "progress": (step, metrics)}
                    writer.flush()
                    torch.save(checkpoint, file := io.BytesIO())
                    (run_dir / "checkpoint.tmp").write_bytes(file.getbuffer())
                    (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")  # a kill leaves a whole one
                    torch.cuda.manual_seed_all(torch.randint(2**62, ()).item())  # alike in both, if there is a GPU
                if must_evaluate:
                    mean_return, seconds = play(actor, args).mean(), time.time() - started
                    scalars = {"eval/return": mean_return, "charts/SPS": (step - first_step) / seconds}
                    for name, value in (metrics | scalars | {"augment/pairs": len(pairs[0])}).items():
                        writer.add_scalar(name, float(value), step)
                    bar.set_postfix_str(f"return {mean_return:.0f}")
                if finished:
                    break
                of_expert = round(args.with_expert * args.batch_size)
                drawn = draw(tuples[:2], of_expert), draw(pairs, args.batch_size - of_expert)
                batch = map(torch.cat, zip(*drawn, strict=True))
                metrics |= clone(actor, optimizer, *batch)  # Alg. 1, lines 12 and 13
                step += 1
                bar.update(1)
        if args.capture_video:
            play(actor, args, run_dir / "agent.gif")
    print(f"curves and the trained clone are in {run_dir}")
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
