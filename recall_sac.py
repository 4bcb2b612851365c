# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "imageio==2.38.1", "mujoco==4.0.0", "numpy==2.4.6",
#                 "pillow==13.0.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
"""Soft actor-critic with recall traces for continuous control (Goyal et al., ICLR 2019, sections 6.5, C, E.2, F and H).

A backtracking model learns which action and change of state may have come before a state. Unrolled backwards from the
states that the critics value most, it imagines traces that lead there, and the policy imitates these recall traces.
This file is all there is; Algorithm 1 of the paper is the loop at the end of main.

    python recall_sac.py --capture-video                      # HalfCheetah-v5
    python recall_sac.py --recall none                        # plain soft actor-critic
    python recall_sac.py --evaluate RUN_DIR                   # play the trained agent

100 000 steps take 10 to 40 minutes on one core. What recall traces gain and do not gain is in docs/recall_sac.md.
Shapes: states (B, S), actions (B, A) from -1 to 1, E environments, N traces, n and B any number.
"""

import io
import json
import math
import os
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1  # seed of networks, environments and all sampling
    total_timesteps: int | None = None  # environment steps in all, 100 000 if not given; may grow with --resume
    run_dir: str = ""  # folder of this run; runs/<env>__<script>__<recall>__seed<seed>__<time> if not given
    resume: str = ""  # go on with the interrupted run in this folder, with its own arguments
    evaluate: str = ""  # play --eval-episodes episodes with the trained agent in this folder
    eval_every: int = 5_000  # environment steps between evaluations of the greedy policy
    eval_episodes: int | None = None  # episodes per evaluation, each time from the same starts, 10 if not given
    checkpoint_every: int = 10_000  # environment steps between checkpoints; the environments are made afresh after each
    capture_video: bool = False  # write a GIF of the greedy agent, at the end of training or with --evaluate
    device: str | None = None  # torch device of networks and replay buffer, cpu if not given
    torch_threads: int = 1  # CPU threads of torch
    # environment
    env_id: str = "HalfCheetah-v5"  # Gymnasium id of an environment with vectors of observations and bounded actions
    num_envs: int = 1  # environments stepped side by side
    max_episode_steps: int | None = None  # time limit of an episode, that of the environment if not given
    contact_forces: bool = True  # whether Ant and Humanoid observe the contact forces, 78 of Ant's 105 numbers
    # soft actor-critic
    hidden: int = 256  # units in each of the two hidden layers of actor and critics
    learning_rate: float = 3e-4  # step size of Adam for actor, critics and temperature
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # how far the target critics move towards the critics after each update
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    learning_starts: int = 5_000  # environment steps with uniformly random actions before the first update
    updates_per_step: float = 1.0  # updates for each environment step
    temperature: float | None = None  # weight of the entropy, adapted to an entropy of -1 per action number by default
    reward_scale: float = 1.0  # factor of the rewards (Haarnoja et al., 2018a: 5, with --temperature 1)
    # recall traces
    recall: Literal["none", "random", "learned"] = "learned"  # traces of no, an untrained (App. F) or a learned model
    num_traces: int = 64  # recall traces per imitation update, each from a state of its own (the paper's N is 1)
    trace_length: int | None = None  # longest trace in steps; default: 50 for Ant and Humanoid, 20 for others (Table 2)
    recall_every: int = 200  # soft actor-critic updates per recall phase, which fits the backtracking model
    recall_updates: int = 10  # imitation updates per recall phase, spread evenly (App. H: 200, 400 or 800)
    recall_tuples: int = 20_000  # tuples drawn from the replay buffer for each recall phase (E.2)
    top_fraction: float = 0.1  # k, share of these tuples, those of most valuable next states, that are learned from
    backtracking_updates: int = 50  # backtracking model updates per recall phase (App. C: 100 for every 5 real updates)
    backtracking_batch_size: int = 256  # (state, action, next state) tuples per backtracking model update
    backtracking_lr: float = 1e-3  # step size of Adam for the backtracking model (beta in Alg. 1)
    imitation_lr: float = 3e-4  # step size of Adam for the imitation of traces (in Alg. 1 the policy's own, alpha)
    action_noise: float = 1.0  # standard deviation of imagined actions as a share of the model's (App. C: 1)
    state_noise: float = 0.5  # standard deviation of imagined changes of state as a share of the model's (the paper: 1)
    trace_limit: float = 5.0  # standard deviations; a trace ends where its state is further from the mean of the data


# ------------------------------------------------------------------------------------------------------ networks
LARGEST_ACTION = 0.98  # actions of traces are clipped to it: there the tanh of the policy still has a slope


def mlp(inputs: int, hidden: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """Two hidden layers."""
    layers = [nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Actor(nn.Module):
    """pi_theta(a | s), the tanh of a Gaussian with mean and log std, (B, A) each; and alpha, its entropy's weight."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int, temperature: float | None = None):
        super().__init__()
        self.net = mlp(state_dim, hidden, 2 * action_dim, nn.ReLU)
        self.log_temperature = nn.Parameter(torch.tensor(temperature or 1.0).log(), requires_grad=temperature is None)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(states).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A) and their log pi(a | s), (B,)."""
        mean, log_std = self(states)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        return u.tanh(), tanh_gaussian_log_prob(noise, log_std, u).sum(-1)

    def log_prob_of_clipped(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """log pi(a | s) of actions of traces, (B,). One clipped to +-0.98 stands for all beyond: P(beyond) / 0.02."""
        mean, log_std = self(states)
        u = actions.clamp(-LARGEST_ACTION, LARGEST_ACTION).atanh()
        inside = tanh_gaussian_log_prob((u - mean) / log_std.exp(), log_std, u)
        # The gradient of log_ndtr subtracts large squares, hence doubles; beyond the clamp it is 0.
        deviations = ((actions.sign() * mean - math.atanh(LARGEST_ACTION)) / log_std.exp()).double().clamp(min=-1e6)
        beyond = torch.special.log_ndtr(deviations).float() - math.log(1 - LARGEST_ACTION)
        return torch.where(actions.abs() < LARGEST_ACTION, inside, beyond).sum(-1)


def tanh_gaussian_log_prob(noise: torch.Tensor, log_std: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Log density of each number tanh(u), u = mean + std * noise, with log(1 - tanh(u)^2) so that it is never log 0."""
    log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - log_slope


class Critic(nn.Module):
    """Q_1(s, a) and Q_2(s, a), two networks in batched products, from states (B, S) and actions (B, A) to (2, B)."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int):
        super().__init__()
        pairs = [*zip(*(mlp(state_dim + action_dim, hidden, 1, nn.ReLU)[::2] for _ in range(2)), strict=True)]
        self.weights = nn.ParameterList([torch.stack([a.weight.T, b.weight.T]).detach() for a, b in pairs])
        self.biases = nn.ParameterList([torch.stack([a.bias, b.bias]).detach().unsqueeze(1) for a, b in pairs])

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat((states, actions), dim=-1).expand(2, -1, -1)
        *hidden_layers, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden_layers:
            x = torch.baddbmm(bias, x, weight).relu_()
        return torch.baddbmm(last_bias, x, last_weight).squeeze(-1)


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


# ------------------------------------------------------------------------------------------------------ buffer
Batch = namedtuple("Batch", "states actions rewards terminated next_states")  # (B, S), (B, A), (B,), (B,), (B, S)


class ReplayBuffer:
    """B: the last `capacity` transitions."""

    def __init__(self, capacity: int, state_dim: int, action_dim: int, device: str):
        shapes = (state_dim,), (action_dim,), (), (), (state_dim,)
        self.ring, self.added = Batch(*(torch.zeros(capacity, *shape, device=device) for shape in shapes)), 0

    def add(self, *transition) -> None:
        """Adds (s_t, a_t, r_t, terminated, s_{t+1}) in place of the oldest transition, if the buffer is full."""
        for column, value in zip(self.ring, transition, strict=True):
            column[self.added % len(column)] = torch.as_tensor(value)
        self.added += 1

    def sample(self, count: int) -> Batch:
        """So many of the transitions, drawn uniformly and with replacement."""
        rows = torch.randint(min(self.added, len(self.ring.rewards)), (count,), device=self.ring.rewards.device)
        return Batch(*(column.index_select(0, rows) for column in self.ring))

    def state_dict(self) -> dict:
        """Without the rows that are still empty, hence by numpy: torch.save writes slices of a tensor with all rows."""
        return {"added": self.added, "ring": [torch.from_numpy(x[: self.added].cpu().numpy()) for x in self.ring]}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for column, saved in zip(self.ring, state["ring"], strict=True):
            column[: self.added] = saved


# ------------------------------------------------------------------------------------------------------ actor-critic
@torch.no_grad()
def act(actor: Actor, states: np.ndarray, greedy: bool = False) -> np.ndarray:
    """Actions (B, A) of the policy in states (B, S)."""
    states = torch.tensor(states, device=actor.log_temperature.device)  # a copy, as bits depend on where memory begins
    actions = (actor(states)[0].tanh() if greedy else actor.sample(states)[0]).cpu().numpy()
    if not np.isfinite(actions).all():
        raise FloatingPointError("an action is not finite, as the policy's weights or its observations are not")
    return actions


@torch.no_grad()
def critic_targets(actor: Actor, target_critic: Critic, batch: Batch, args: Args) -> torch.Tensor:
    """Targets y (B,) of both critics: r + gamma (min_i Q_i(s', a') - alpha log pi(a' | s')), and r at a terminal state.

    Q_i are the target critics, a' ~ pi(a' | s'), alpha is the temperature, and r is multiplied by the reward scale.
    """
    next_actions, log_probs = actor.sample(batch.next_states)
    next_values = target_critic(batch.next_states, next_actions).amin(0) - actor.log_temperature.exp() * log_probs
    return args.reward_scale * batch.rewards + args.gamma * (1 - batch.terminated) * next_values


def update_actor_critic(actor: Actor, critic: Critic, target_critic, optimizer, batch: Batch, args: Args) -> dict:
    """One step of critics, actor and temperature at once (Haarnoja et al., 2018b); returns losses."""
    targets = critic_targets(actor, target_critic, batch, args)
    values = critic(batch.states, batch.actions)
    value_loss = ((values - targets) ** 2).mean(-1).sum()
    actions, log_probs = actor.sample(batch.states)
    critic.requires_grad_(False)  # only the actions need the gradient of the actor's loss
    temperature = actor.log_temperature.detach().exp()
    policy_loss = (temperature * log_probs - critic(batch.states, actions).amin(0)).mean()
    critic.requires_grad_(True)
    entropy = -log_probs.detach().mean()
    temperature_loss = actor.log_temperature * (entropy + actions.shape[-1])  # until the entropy is -A
    optimizer.zero_grad()
    (value_loss + policy_loss + temperature_loss).backward()
    optimizer.step()
    for target, weight in zip(target_critic.parameters(), critic.parameters(), strict=True):
        target.lerp_(weight.detach(), args.tau)
    losses = {"value_loss": value_loss, "q_value": values.mean(), "policy_loss": policy_loss, "entropy": entropy}
    return {f"losses/{name}": loss.detach() for name, loss in (losses | {"temperature": temperature}).items()}


# ------------------------------------------------------------------------------------------------------ recall traces
@torch.no_grad()
def high_value_states(buffer: ReplayBuffer, actor: Actor, critic: Critic, args: Args) -> tuple[Batch, torch.Tensor]:
    """Of --recall-tuples tuples of B those of highest V(s_{t+1}), best first, and these V (min Q of greedy actions)."""
    tuples = buffer.sample(args.recall_tuples)
    tuples = Batch(*(column[tuples.terminated == 0] for column in tuples))  # a terminal state has no value
    values = torch.cat([critic(s, actor(s)[0].tanh()).amin(0) for s in tuples.next_states.split(1000)])  # fits a cache
    values, best = values.topk(math.ceil(args.top_fraction * len(values)))
    return Batch(*(column[best] for column in tuples)), values


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


def imitate(actor: Actor, optimizer, states, actions, inside: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step that raises log pi(a | s) of the recall traces' states and actions; returns its loss."""
    trace_length = {"recall/trace_length": inside.sum() / inside.shape[1]}
    if not inside.any():  # all traces have left the data at once
        return trace_length
    imitation_loss = -actor.log_prob_of_clipped(states[inside], actions[inside]).mean()  # Eq. (3), its mean
    optimizer.zero_grad()
    imitation_loss.backward()
    optimizer.step()
    return trace_length | {"recall/imitation_loss": imitation_loss.detach()}


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


@contextmanager
def fast_products(device: str):
    """Multiplies matrices by oneDNN ("medium"), faster than MKL on some processors, where that is as exact as MKL."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    torch.set_float32_matmul_precision("medium")
    if not torch.allclose((x @ x).double(), x.double() @ x.double(), rtol=1e-5, atol=1e-4):  # such as bfloat16
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:  # torch's default, for whatever else runs in this process
        torch.set_float32_matmul_precision("highest")


# ------------------------------------------------------------------------------------------------------ run
RUN_NAME, TOTAL_TIMESTEPS = "{env_id}__recall_sac__{recall}__seed{seed}", 100_000
AT_LEAST = {"seed": 0, "top_fraction": 1e-9, "temperature": 1e-37}  # others: 1 for whole numbers, 0 for the rest
AT_MOST = {"seed": 2**63 - 1, "gamma": 1, "tau": 1, "top_fraction": 1, "temperature": 1e37}
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
    """Trains an agent, or plays the trained one of --evaluate; returns the folder of its run."""
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(text, file=sys.stderr))  # as models are
    args = check(args)
    length = 50 if args.env_id.startswith(("Ant", "Humanoid")) else 20  # Table 2
    args = replace(args, device=args.device or "cpu", trace_length=args.trace_length or length)
    state_dim, action_dim = try_out(args)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    actor = Actor(state_dim, action_dim, args.hidden, args.temperature).to(args.device)  # Alg. 1, line 1
    critic = Critic(state_dim, action_dim, args.hidden).to(args.device)
    target_critic = deepcopy(critic).requires_grad_(False)
    buffer = ReplayBuffer(args.buffer_size, state_dim, action_dim, args.device)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=args.learning_rate, fused=True)
    parts = {"actor": actor, "critic": critic, "target_critic": target_critic, "optimizer": optimizer, "buffer": buffer}
    if args.recall != "none":
        model = BacktrackingModel(state_dim, action_dim).to(args.device)  # Alg. 1, line 2
        model_optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr, fused=True)
        imitation_optimizer = torch.optim.Adam(actor.net.parameters(), lr=args.imitation_lr, fused=True)
        parts |= {"model": model, "model_optimizer": model_optimizer, "imitation_optimizer": imitation_optimizer}
    weights = [w.detach() for part in parts.values() if isinstance(part, nn.Module) for w in part.parameters()]
    step, metrics, starts, envs = 0, {}, torch.zeros(0), []
    if args.evaluate:
        step, *_ = load_checkpoint(Path(args.evaluate), {"actor": actor})
        with fast_products(args.device):
            returns = play(actor, args, Path(args.evaluate, f"agent_{step}.gif") if args.capture_video else None)
        print(*(f"episode {i}: return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
        print(f"mean return {returns.mean():.2f}, standard deviation {returns.std():.2f}")
        return Path(args.evaluate)
    with open_run(args) as run_dir, fast_products(args.device):
        if (run_dir / "checkpoint.pt").exists():
            step, metrics, starts = load_checkpoint(run_dir, parts)
        first_step, started = step, time.time()
        bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", disable=None)
        with bar, SummaryWriter(run_dir, purge_step=step) as writer:
            while True:  # Alg. 1, line 3
                finished = step >= args.total_timesteps
                must_save = finished or not envs or step % args.checkpoint_every < args.num_envs
                must_evaluate = finished or step % args.eval_every < args.num_envs
                if must_save or must_evaluate:
                    for name, value in (metrics | {"weights": sum(weight.sum() for weight in weights)}).items():
                        if not math.isfinite(value):
                            raise FloatingPointError(f"{name} is {value} at step {step}")
                if must_save:
                    checkpoint = {name: part.state_dict() for name, part in parts.items()}
                    checkpoint |= {"rng": torch.get_rng_state(), "progress": (step, metrics, starts)}
                    writer.flush()
                    torch.save(checkpoint, file := io.BytesIO())
                    (run_dir / "checkpoint.tmp").write_bytes(file.getbuffer())
                    (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")  # a kill leaves a whole one
                    envs = [make_env(args) for _ in range(args.num_envs)]  # afresh, as in a run resumed from here
                    torch.cuda.manual_seed_all(torch.randint(2**62, ()).item())  # alike in both, if there is a GPU
                    seeds = np.random.SeedSequence((args.seed, step)).generate_state(args.num_envs).tolist()
                    states = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
                if must_evaluate:
                    mean_return, seconds = play(actor, args).mean(), time.time() - started
                    scalars = {"eval/return": mean_return, "charts/SPS": (step - first_step) / seconds}
                    for name, value in (metrics | scalars).items():
                        writer.add_scalar(name, float(value), step)
                    bar.set_postfix_str(f"return {mean_return:.0f}")
                if finished:
                    break
                random = step < args.learning_starts
                actions = 2 * torch.rand(args.num_envs, action_dim).numpy() - 1 if random else act(actor, states)
                for i, env in enumerate(envs):  # Alg. 1, lines 4 and 5: execute the policy and add what it did to B
                    next_state, reward, terminated, truncated, info = env.step(actions[i])
                    buffer.add(states[i], actions[i], reward, terminated, next_state)
                    if terminated or truncated:
                        metrics["charts/episodic_return"] = float(info["episode"]["r"])
                        metrics["charts/episodic_length"] = info["episode"]["l"]
                        next_state, _ = env.reset()
                    states[i] = next_state
                first, last = (max(0, step + n - args.learning_starts) for n in (0, args.num_envs))
                step += args.num_envs
                bar.update(args.num_envs)
                for update in range(int(first * args.updates_per_step), int(last * args.updates_per_step)):
                    batch = buffer.sample(args.batch_size)  # Alg. 1, lines 6 and 7: a step of the RL algorithm
                    metrics |= update_actor_critic(actor, critic, target_critic, optimizer, batch, args)
                    if args.recall != "none" and (update + 1) % args.recall_every == 0:
                        tuples, values = high_value_states(buffer, actor, critic, args)  # Alg. 1, line 8
                        if len(values) == 0:
                            continue
                        model.normalise_by(tuples)
                        metrics["recall/start_value"], starts = values.mean(), tuples.next_states
                        for _ in range(args.backtracking_updates if args.recall == "learned" else 0):  # Alg. 1, line 9
                            metrics |= update_backtracking_model(model, model_optimizer, tuples, args)
                    before, after = (n * args.recall_updates // args.recall_every for n in (update, update + 1))
                    for _ in range(after - before if len(starts) else 0):  # spread evenly over all updates
                        rows = torch.randint(len(starts), (args.num_traces,))  # Alg. 1, line 10: high-value states
                        traces = recall_traces(model, starts[rows].to(args.device), args)  # Alg. 1, line 11
                        metrics |= imitate(actor, imitation_optimizer, *traces)  # Alg. 1, lines 12 and 13
        if args.capture_video:
            play(actor, args, run_dir / "agent.gif")
    print(f"curves and the trained agent are in {run_dir}")
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
