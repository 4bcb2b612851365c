# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "imageio==2.38.1", "mujoco==4.0.0", "numpy==2.4.6",
#                 "pillow==13.0.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
"""Trust region policy optimization with recall traces (Goyal et al., ICLR 2019, sections 6.4, B, C, E.1, F and G).

A backtracking model learns which action and change of state may have come before a state. Unrolled backwards from the
states that earned most, it imagines traces that lead there, and the policy imitates these recall traces.
This file is all there is; Algorithm 1 of the paper is the loop at the end of main.

    python recall_trpo.py --capture-video                     # HalfCheetah-v5
    python recall_trpo.py --recall none                       # plain trust region policy optimization
    python recall_trpo.py --evaluate RUN_DIR                  # play the trained agent

500 000 steps take two to four minutes on one core. Plain TRPO then returns about 2 600 on HalfCheetah-v5 and 3 000 on
Hopper-v5. No gain of recall traces is certain, see docs/recall_trpo.md.
Shapes: states (B, S), actions (B, A), T steps in each of E environments or N traces, n and B any number.
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
from torch.distributions import Normal
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1  # seed of networks, environments and all sampling
    total_timesteps: int | None = None  # environment steps in all, 500 000 if not given; may grow with --resume
    run_dir: str = ""  # folder of this run; runs/<env>__<script>__<recall>__seed<seed>__<time> if not given
    resume: str = ""  # go on with the interrupted run in this folder, with its own arguments
    evaluate: str = ""  # play --eval-episodes episodes with the trained agent in this folder
    eval_every: int = 20_000  # environment steps between evaluations of the greedy policy
    eval_episodes: int | None = None  # episodes per evaluation, each time from the same starts, 10 if not given
    checkpoint_every: int = 50_000  # environment steps between checkpoints; the environments are made afresh after each
    capture_video: bool = False  # write a GIF of the greedy agent, at the end of training or with --evaluate
    device: str | None = None  # torch device of the networks, cpu if not given
    torch_threads: int = 1  # CPU threads of torch
    # environment
    env_id: str = "HalfCheetah-v5"  # Gymnasium id of an environment with vectors of observations and bounded actions
    num_envs: int = 8  # environments stepped side by side
    max_episode_steps: int | None = None  # time limit of an episode, that of the environment if not given
    contact_forces: bool = True  # whether Ant and Humanoid observe the contact forces, 78 of Ant's 105 numbers
    # trust region policy optimization
    num_steps: int = 256  # steps of each environment per iteration
    hidden: int = 64  # units in each of the two hidden layers of actor and critic
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # decay of generalized advantage estimation
    max_kl: float = 0.01  # trust region: largest mean KL divergence from the old policy to that after an update
    cg_iterations: int = 10  # iterations of conjugate gradients per update
    cg_damping: float = 0.1  # added to the diagonal of the Fisher matrix
    line_search_steps: int = 10  # lengths of a step that the line search tries, each a fifth shorter than the last
    critic_lr: float = 1e-3  # step size of Adam for the critic
    critic_epochs: int = 10  # passes of the critic over each rollout
    critic_batch_size: int = 256  # states per step of the critic
    # recall traces: of a learned or an untrained (App. F) backtracking model; forward: imagined experience (App. G)
    recall: Literal["none", "random", "learned", "forward"] = "learned"
    start_states: Literal["return", "reward"] = "return"  # valuable are next states of high return-to-go, reward (E.1)
    num_traces: int = 64  # recall traces per imitation update, each from a state of its own (the paper's N is 1)
    trace_length: int | None = None  # longest trace in steps, as in Tables 1 and 2 (10, 20 or 50) if not given
    recall_every: int = 2  # iterations per recall phase, which fits the backtracking model (App. C: 5)
    recall_updates: int = 5  # imitation updates per recall phase, each with new traces
    recall_until: float = 0.1  # share of --total-timesteps after which no more traces are imitated
    buffer_size: int = 50_000  # environment steps whose trajectories the buffer holds, the newest
    top_trajectories: int = 20  # k_traj, how many of these trajectories are used, those of highest return
    top_fraction: float = 0.25  # k, share of their tuples, those of most valuable next states, that is learned from
    backtracking_updates: int = 100  # backtracking model updates per recall phase (App. C)
    backtracking_batch_size: int = 128  # (state, action, next state) tuples per backtracking model update
    backtracking_lr: float = 1e-3  # step size of Adam for the backtracking model (beta in Alg. 1)
    imitation_lr: float = 3e-4  # step size of Adam for the imitation of traces (in Alg. 1 the policy's own, alpha)
    imitation_kl: float = 0.01  # largest mean KL divergence from the policy before a recall phase to that after it
    action_noise: float = 1.0  # standard deviation of imagined actions as a share of the model's (App. C: 1)
    state_noise: float = 0.5  # standard deviation of imagined changes of state as a share of the model's (the paper: 1)
    trace_limit: float = 5.0  # standard deviations; a trace ends where its state is further from the mean of the data


LARGEST_ACTION = 1.0  # actions of traces are clipped to it, as the environment clips those of the policy


# ------------------------------------------------------------------------------------------------------ networks
def mlp(inputs: int, hidden: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """Two hidden layers."""
    layers = [nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Normaliser(nn.Module):
    """Brings values to mean 0 and variance 1, by mean and standard deviation of all values that were added so far."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def add(self, values: torch.Tensor) -> None:
        """Adds values (n, size), by the parallel algorithm of Chan et al. (1979)."""
        share = len(values) / (self.count + len(values))
        change, var = values.mean(0) - self.mean, values.var(0, unbiased=False)
        var = (1 - share) * self.std**2 + share * var + share * (1 - share) * change**2
        self.std.copy_(var.sqrt().clamp(min=1e-4))
        self.mean.copy_(self.mean + share * change)
        self.count += len(values)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return ((values - self.mean) / self.std).clamp(-10, 10)


class Actor(nn.Module):
    """pi_theta(a | s), from states (B, S) to Gaussians of actions (B, A), with a std that is alike in all states."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        self.normaliser, self.net = Normaliser(state_dim), mlp(state_dim, hidden, action_dim, nn.Tanh)
        self.net[-1].weight.data.mul_(0.01)  # the first policy is nearly the same in all states

    def forward(self, states: torch.Tensor) -> Normal:
        return Normal(self.net(self.normaliser(states)), self.log_std.exp(), validate_args=False)

    def log_prob_of_clipped(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """log pi(a | s) of actions as they are carried out, (B,): one at its bound stands for all draws beyond it."""
        policy = self(states)
        beyond = torch.special.log_ndtr((actions.sign() * policy.mean - LARGEST_ACTION) / policy.stddev)
        return torch.where(actions.abs() < LARGEST_ACTION, policy.log_prob(actions), beyond).sum(-1)


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
Rollout = namedtuple("Rollout", "states actions rewards next_states terminated truncated")  # arrays (T, E, ...)
Tuples = namedtuple("Tuples", "states actions rewards next_states values")  # tensors (n, ...); values of next_states


def add_trajectories(buffer: list, under_way: list, rollout: Rollout, args: Args) -> None:
    """Adds the episodes that ended in a rollout to B, a list of (return, columns of Tuples), and drops the oldest ones
    when there are more than --buffer-size steps. `under_way` are the parts of each environment's episode so far."""
    for i, parts in enumerate(under_way):
        ends = np.flatnonzero(rollout.terminated[:, i] | rollout.truncated[:, i]) + 1
        *ended, rest = zip(*(np.split(column[:, i], ends) for column in rollout), strict=True)
        for last_part in ended:
            episode = Rollout(*map(np.concatenate, zip(*parts, last_part, strict=True)))
            values, actions = values_of_next_states(episode, args), episode.actions.clip(-1, 1)  # as carried out
            columns = episode.states, actions, episode.rewards, episode.next_states, values
            columns = [torch.from_numpy(column[~episode.terminated]) for column in columns]
            if not episode.terminated[0]:  # otherwise there is no tuple but that of a terminal state
                buffer.append((float(episode.rewards.sum()), columns))
            parts.clear()
        parts.append(rest)
    while len(buffer) > 1 and sum(len(columns[0]) for _, columns in buffer) > args.buffer_size:
        buffer.pop(0)


def values_of_next_states(episode: Rollout, args: Args) -> np.ndarray:
    """How valuable the states s_{t+1} of an episode (T, ...) are, (T,): r_t, or the discounted rewards from r_{t+1} on.
    Where it was cut, T steps of its mean reward are taken to follow. Otherwise its last states would be the best ones
    wherever rewards are negative. What is returned for a terminal state is not used."""
    if args.start_states == "reward":
        return episode.rewards
    later = (args.gamma ** np.arange(len(episode.rewards))).sum() * episode.rewards.mean() * ~episode.terminated[-1]
    values = np.append(episode.rewards[1:], later).astype(np.float32)
    for t in reversed(range(len(values) - 1)):
        values[t] += args.gamma * values[t + 1]
    return values


# ------------------------------------------------------------------------------------------------------ TRPO
def act(actor: Actor, states: np.ndarray, greedy: bool = False) -> np.ndarray:
    """Actions (B, A) of the policy in states (B, S), in numpy, which for few states is twice as fast as torch."""
    log_std, _, mean, std, w1, b1, w2, b2, w3, b3 = (x.cpu().numpy() for x in actor.state_dict().values())
    x = ((states - mean) / std).clip(-10, 10)
    x = np.tanh(np.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    if not np.isfinite(x).all():
        raise FloatingPointError("an action is not finite, as the policy's weights or its observations are not")
    return x if greedy else x + np.exp(log_std) * torch.randn(x.shape).numpy()


def collect_rollout(envs: list, states: np.ndarray, actor: Actor, num_steps: int) -> tuple[Rollout, np.ndarray, dict]:
    """Runs the policy for T = num_steps steps from states (E, S); returns the rollout, the states after it, and return
    and length of the episode that ended last, if any did."""
    steps, metrics = [], {}
    for _ in range(num_steps):
        actions = act(actor, states)
        outcomes = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        next_states, rewards, terminated, truncated, infos = zip(*outcomes, strict=True)
        steps.append((states, actions, np.array(rewards, np.float32), next_states, terminated, truncated))
        states = np.array(next_states)
        for i, info in enumerate(infos):
            if "episode" in info:
                metrics["charts/episodic_return"] = float(info["episode"]["r"])
                metrics["charts/episodic_length"] = info["episode"]["l"]
                states[i], _ = envs[i].reset()
    return Rollout(*map(np.array, zip(*steps, strict=True))), states, metrics


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


def kl_divergence(old: Normal, new: Normal) -> torch.Tensor:
    """KL(old || new) of Gaussian policies in n states, their mean over the states, (). Of each of the A numbers of an
    action it is log(new_std / std) + (std^2 + (mean - new_mean)^2) / (2 new_std^2) - 1/2; these add up."""
    squares = old.variance + (old.mean - new.mean) ** 2
    return ((new.stddev / old.stddev).log() + squares / (2 * new.variance) - 0.5).sum(-1).mean()


def fisher_matrix(actor: Actor, states: torch.Tensor, damping: float):
    """The function v -> (F + damping I) v of flat vectors, F the policy's Fisher matrix, its mean over states (n, S).

    A Gaussian's own Fisher matrix is 1 / std^2 for its mean and 2 for its log std. So F v = J^T diag(1 / std^2) J v for
    the means' Jacobian J, and 2 v for the log std.
    """
    policy, (log_std, *weights) = actor(states), actor.parameters()
    u = torch.zeros_like(policy.mean, requires_grad=True)
    pulled_back = parameters_to_vector(torch.autograd.grad(policy.mean, weights, u, create_graph=True))  # J^T u

    def product(vector: torch.Tensor) -> torch.Tensor:
        of_log_std, of_means = vector.split((len(log_std), len(pulled_back)))
        (change,) = torch.autograd.grad(pulled_back, u, of_means, retain_graph=True)  # J v, as J^T is d(J^T u) / du
        change = change / policy.variance.detach() / len(states)
        gradient = torch.autograd.grad(policy.mean, weights, change, retain_graph=True)  # J^T (...)
        return parameters_to_vector((2 * of_log_std, *gradient)) + damping * vector

    return product


def conjugate_gradients(product, b: torch.Tensor, iterations: int) -> torch.Tensor:
    """x with M x = b, nearly, given the function x -> M x of a positive definite matrix M (Hestenes and Stiefel, 1952).

    Starts at x = 0 with the residual r = b - M x as direction d. Each iteration goes (r^T r / d^T M d) d, to where
    x^T M x / 2 - b^T x is least along d. The next d is the new r + (new r^T r / r^T r) d. If r is 0, it ends earlier.
    """
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


@torch.no_grad()
def line_search(actor: Actor, step: torch.Tensor, states, actions, advantages, args: Args) -> dict[str, torch.Tensor]:
    """Adds to the actor's weights the longest step that stays in the trust region and improves the policy.

    Tried are `step` (a flat vector), 0.8 `step`, 0.64 `step` and so on, --line-search-steps in all. The first is taken
    for which the mean KL divergence from the old policy to the new one is at most --max-kl and the surrogate, the mean
    of A pi_new(a | s) / pi_old(a | s), is larger than before. If there is none, the weights stay as they were.
    """
    old_actor, old_policy = deepcopy(actor), actor(states)
    steps = step.split([weight.numel() for weight in actor.parameters()])
    for i in range(args.line_search_steps):
        for weight, old, part in zip(actor.parameters(), old_actor.parameters(), steps, strict=True):
            weight.copy_(old + 0.8**i * part.view_as(old))
        policy = actor(states)
        ratios = (policy.log_prob(actions) - old_policy.log_prob(actions)).sum(-1).exp()
        gain, kl = (advantages * ratios).mean() - advantages.mean(), kl_divergence(old_policy, policy)
        if gain > 0 and kl <= args.max_kl:
            return {"losses/policy_loss": -gain, "losses/kl": kl, "losses/line_search_steps": i}
    actor.load_state_dict(old_actor.state_dict())
    return {"losses/policy_loss": 0.0, "losses/kl": 0.0, "losses/line_search_steps": args.line_search_steps}


def update_actor(actor: Actor, states, actions, advantages, args: Args) -> dict[str, torch.Tensor]:
    """One natural gradient step (Schulman et al., 2015) for states (n, S), actions (n, A) and advantages (n,)."""
    surrogate = (advantages * actor(states).log_prob(actions).sum(-1)).mean()  # whose gradient is the policy gradient
    gradient = parameters_to_vector(torch.autograd.grad(surrogate, [*actor.parameters()]))
    product = fisher_matrix(actor, states, args.cg_damping)
    direction = conjugate_gradients(product, gradient, args.cg_iterations)
    step = direction * (2 * args.max_kl / (direction @ product(direction)).clamp(min=1e-20)).sqrt()
    losses = line_search(actor, step, states, actions, advantages, args)
    return losses | {"losses/entropy": actor(states[:1]).entropy().sum().detach()}


def update_trpo(actor: Actor, critic: Critic, optimizer, rollout: Rollout, args: Args) -> dict[str, torch.Tensor]:
    """One iteration on a rollout: a step of the actor, then regression of V(s) on A + V_old(s); returns losses."""
    states, actions, _, next_states = (torch.from_numpy(x).to(args.device).flatten(0, 1) for x in rollout[:4])
    with torch.no_grad():
        values, next_values = (critic(s).cpu().numpy().reshape(rollout.rewards.shape) for s in (states, next_states))
    advantages = generalized_advantages(rollout, values, next_values, args.gamma, args.gae_lambda)
    explained_variance = 1 - float(advantages.var() / (advantages + values).var().clip(1e-8))
    returns, advantages = (torch.from_numpy(x).to(args.device).flatten() for x in (advantages + values, advantages))
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    losses = update_actor(actor, states, actions, advantages, args)
    critic.rescale(returns)
    states, targets = critic.normaliser(states), (returns.unsqueeze(-1) - critic.scale.mean) / critic.scale.std
    for _ in range(args.critic_epochs):
        for rows in torch.randperm(len(states)).to(args.device).split(args.critic_batch_size):
            value_loss = nn.functional.mse_loss(critic.net(states[rows]), targets[rows])
            optimizer.zero_grad()
            value_loss.backward()
            optimizer.step()
    return losses | {"losses/value_loss": value_loss.detach(), "losses/explained_variance": explained_variance}


# ------------------------------------------------------------------------------------------------------ recall traces
def high_value_states(buffer: list, args: Args) -> Tuples:
    """Of the trajectories of highest return in B (k_traj) the tuples of most valuable next states (k), best first. A
    forward model gets them with s_t and s_{t+1} exchanged, and with r_t beside s_{t+1}, which it predicts."""
    best = sorted(buffer, key=lambda episode: -episode[0])[: args.top_trajectories]
    tuples = Tuples(*map(torch.cat, zip(*(columns for _, columns in best), strict=True)))
    chosen = tuples.values.topk(math.ceil(args.top_fraction * len(tuples.values))).indices
    tuples = Tuples(*(column[chosen].to(args.device) for column in tuples))
    if args.recall == "forward":
        outcomes = torch.cat((tuples.next_states, tuples.rewards.unsqueeze(-1)), dim=-1)
        return tuples._replace(states=outcomes, next_states=nn.functional.pad(tuples.states, (0, 1)))
    return tuples


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


@torch.no_grad()
def limit_change(actor: Actor, old_actor: Actor, states: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """Takes back a fifth of a change, and again, until KL(old || new) in states (n, S) is at most --imitation-kl."""
    while (kl := kl_divergence(old_actor(states), actor(states))) > args.imitation_kl:
        for weight, old in zip(actor.parameters(), old_actor.parameters(), strict=True):
            weight.lerp_(old, 0.2)
    return {"recall/imitation_kl": kl}


@torch.no_grad()
def forward_rollout(model: BacktrackingModel, actor: Actor, starts: torch.Tensor, args: Args) -> Rollout:
    """What the policy would do in T = --trace-length steps from `starts` (N, S + 1) on (App. G), by a model of tuples
    that are reversed in time. What leaves their range is cut, as by a time limit, and begins anew."""
    steps, states = [], starts
    for _ in range(args.trace_length):
        actions = actor(states[:, :-1]).sample()
        mean, log_std = model.predict_change(actions.clamp(-LARGEST_ACTION, LARGEST_ACTION), states)
        change = mean + args.state_noise * log_std.exp() * torch.randn_like(mean)
        next_states = states + model.change_mean + model.change_std * change
        rewards, next_states[:, -1] = next_states[:, -1].clone(), 0
        left = ((next_states - model.state_mean).abs() > args.trace_limit * model.state_std).any(-1)
        steps.append((states[:, :-1], actions, rewards, next_states[:, :-1], torch.zeros_like(left), left))
        states = torch.where(left.unsqueeze(-1), starts, next_states)
    return Rollout(*(torch.stack(column).cpu().numpy() for column in zip(*steps, strict=True)))


# ------------------------------------------------------------------------------------------------------ run
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


RUN_NAME, TOTAL_TIMESTEPS = "{env_id}__recall_trpo__{recall}__seed{seed}", 500_000
AT_LEAST = {"seed": 0, "top_fraction": 1e-9, "num_steps": 2, "max_kl": 1e-37}  # others: 1 for whole numbers, else 0
AT_MOST = {"seed": 2**63 - 1, "gamma": 1, "gae_lambda": 1, "top_fraction": 1, "recall_until": 1}
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
    length = 10 if args.env_id.startswith("Hopper") else 50 if args.env_id.startswith(("Ant", "Humanoid")) else 20
    args = replace(args, device=args.device or "cpu", trace_length=args.trace_length or length)
    state_dim, action_dim = try_out(args)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    actor = Actor(state_dim, action_dim, args.hidden).to(args.device)  # Alg. 1, line 1
    critic = Critic(actor.normaliser, state_dim, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(critic.net.parameters(), lr=args.critic_lr, fused=True)
    buffer, under_way = [], [[] for _ in range(args.num_envs)]
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer}
    if args.recall != "none":
        forward, part = args.recall == "forward", "forward_model" if args.recall == "forward" else "model"
        model = BacktrackingModel(state_dim + forward, action_dim).to(args.device)  # Alg. 1, line 2
        model_optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr, fused=True)
        imitation_optimizer = torch.optim.Adam(actor.parameters(), lr=args.imitation_lr, fused=True)
        parts |= {part: model, "model_optimizer": model_optimizer, "imitation_optimizer": imitation_optimizer}
    weights = [w.detach() for part in parts.values() if isinstance(part, nn.Module) for w in part.parameters()]
    step, metrics, envs, batch = 0, {}, [], args.num_envs * args.num_steps
    if args.evaluate:
        step, *_ = load_checkpoint(Path(args.evaluate), {"actor": actor})
        returns = play(actor, args, Path(args.evaluate, f"agent_{step}.gif") if args.capture_video else None)
        print(*(f"episode {i}: return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
        print(f"mean return {returns.mean():.2f}, standard deviation {returns.std():.2f}")
        return Path(args.evaluate)
    with open_run(args) as run_dir:
        if (run_dir / "checkpoint.pt").exists():
            step, metrics, buffer = load_checkpoint(run_dir, parts)
        first_step, started = step, time.time()
        bar = tqdm(total=-(-args.total_timesteps // batch) * batch, initial=step, unit=" steps", disable=None)
        with bar, SummaryWriter(run_dir, purge_step=step) as writer:
            while True:  # Alg. 1, line 3
                finished = step >= args.total_timesteps
                must_save = finished or not envs or step % args.checkpoint_every < batch
                must_evaluate = finished or step % args.eval_every < batch
                if must_save or must_evaluate:
                    for name, value in (metrics | {"weights": sum(weight.sum() for weight in weights)}).items():
                        if not math.isfinite(value):
                            raise FloatingPointError(f"{name} is {value} at step {step}")
                if must_save:
                    checkpoint = {name: part.state_dict() for name, part in parts.items()}
                    checkpoint |= {"rng": torch.get_rng_state(), "progress": (step, metrics, buffer)}
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
                rollout, states, episode = collect_rollout(envs, states, actor, args.num_steps)  # Alg. 1, line 4
                step += batch
                bar.update(batch)
                rollout.truncated[-1] |= (step % args.checkpoint_every < batch) & ~rollout.terminated[-1]  # cut
                metrics |= episode | update_trpo(actor, critic, optimizer, rollout, args)  # Alg. 1, lines 6 and 7
                visited = torch.from_numpy(rollout.states).to(args.device).flatten(0, 1)
                actor.normaliser.add(visited)  # only now, so that rollout and update have seen the same policy
                if args.recall == "none":
                    continue
                add_trajectories(buffer, under_way, rollout, args)  # Alg. 1, line 5
                if step > args.recall_until * args.total_timesteps or not buffer or step // batch % args.recall_every:
                    continue
                tuples = high_value_states(buffer, args)  # Alg. 1, line 8
                model.normalise_by(tuples)
                for _ in range(args.backtracking_updates if args.recall != "random" else 0):  # Alg. 1, line 9
                    metrics |= update_backtracking_model(model, model_optimizer, tuples, args)
                rows = torch.randperm(args.num_traces * args.recall_updates) % len(tuples.values)  # Alg. 1, line 10
                metrics["recall/start_value"], old_actor = tuples.values[rows].mean(), deepcopy(actor)
                for starts in tuples.next_states[rows].split(args.num_traces):
                    if forward:
                        update_trpo(actor, critic, optimizer, forward_rollout(model, actor, starts, args), args)
                        continue
                    traces = recall_traces(model, starts, args)  # Alg. 1, line 11
                    metrics |= imitate(actor, imitation_optimizer, *traces)  # Alg. 1, lines 12 and 13
                metrics |= limit_change(actor, old_actor, visited, args)
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
