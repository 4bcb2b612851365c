# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "imageio==2.38.1", "matplotlib==3.11.2", "mujoco==4.0.0",
#                 "numpy==2.4.6", "pillow==13.0.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1",
#                 "tyro==1.0.17"]
# ///
"""Goal GAN with trust region policy optimization and recall traces (Goyal et al., ICLR 2019, sections 6.3, A, C and D).

An ant in a U-shaped maze is to reach every place. A generative adversarial network proposes goals that are neither
too easy nor too hard; a backtracking model imagines what may lead to them, and the policy imitates these recall traces.
The mazes are in envs, all else is in this file; Algorithm 1 of the paper is the loop at the end of main.

    python recall_goalgan_ant.py --env-id PointUMaze-v0       # a point mass in the maze
    python recall_goalgan_ant.py --capture-video              # the ant, with Goal GAN's batch
    python recall_goalgan_ant.py --recall none                # Goal GAN alone
    python recall_goalgan_ant.py --evaluate RUN_DIR           # measure the trained agent's coverage

The point mass reaches 90 % of the maze after about 17 outer iterations; a run of 40 takes 6 minutes on a core. What
recall traces gain and do not gain, there and on the ant, is in docs/recall_goalgan_ant.md.
Shapes: states (B, S), goals (B, G), actions (B, A) from -1 to 1, T steps in each of E environments or N traces; for
policy and critic a state ends with the goal, (B, S + G), for the backtracking model it does not.
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

from envs.goals import AS_ARRAYS, make_goal_env, make_goal_envs
from envs.u_maze import coverage_goals, draw_coverage


@dataclass
class Args:
    # run
    seed: int = 1  # seed of networks, environments and all sampling
    total_timesteps: int | None = None  # environment steps in all, 40 outer iterations if not given; may grow
    run_dir: str = ""  # folder of this run; runs/<env>__<script>__<recall>__seed<seed>__<time> if not given
    resume: str = ""  # go on with the interrupted run in this folder, with its own arguments
    evaluate: str = ""  # measure the coverage of the agent in this folder
    eval_every: int | None = None  # environment steps between evaluations, an outer iteration if not given
    eval_episodes: int | None = None  # episodes per goal and evaluation, 3 if not given
    checkpoint_every: int | None = None  # environment steps between checkpoints, an inner iteration if not given
    capture_video: bool = False  # write a GIF of the greedy agent, at the end of training or with --evaluate
    device: str | None = None  # torch device of the networks, cpu if not given
    torch_threads: int = 1  # CPU threads of torch
    # environment
    env_id: str = "AntUMaze-v0"  # or PointUMaze-v0, PointMass-v0, any with a Dict of goals as PointMaze_UMaze-v3
    num_envs: int | None = None  # environments stepped side by side; if not given, 200 ants or 100 others
    env_threads: int | None = None  # native threads that step the ants, one for each core if not given
    max_episode_steps: int | None = None  # time limit of an episode, that of the environment if not given
    eval_steps: int | None = None  # time limit in evaluations; if not given, 400 for the ant, else as in training
    contact_forces: bool = False  # whether the ant sees its contact forces
    dims: int | None = None  # dimensions of PointMass-v0, 2 if not given
    # trust region policy optimization
    num_steps: int | None = None  # steps of each environment per inner iteration, those of an episode if not given
    inner_iterations: int = 5  # updates per outer iteration, which is a set of goals
    hidden: int = 64  # units in each of the two hidden layers of actor and critic
    learn_std: bool | None = None  # whether the policy's std is learned or 1; if not given, 1 in PointUMaze-v0 only
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.98  # decay of generalized advantage estimation
    max_kl: float = 0.01  # trust region: largest mean KL divergence from the old policy to that after an update
    cg_iterations: int = 10  # iterations of conjugate gradients per update
    cg_damping: float = 0.1  # added to the diagonal of the Fisher matrix
    line_search_steps: int = 10  # lengths of a step that the line search tries, each a fifth shorter than the last
    critic_lr: float = 1e-3  # step size of Adam for the critic
    critic_epochs: int = 5  # passes of the critic over each rollout
    critic_batch_size: int = 1000  # states per step of the critic
    # Goal GAN
    num_goals: int = 200  # new goals per outer iteration
    num_replayed_goals: int = 100  # old goals per outer iteration
    label_rollouts: int = 3  # episodes per goal that tell how hard it is
    least_success: float = 0.1  # goals that the agent reaches no more often than that are too hard
    most_success: float = 0.9  # goals that the agent reaches no less often than that are too easy
    goal_noise: float = 0.5  # standard deviation of what is added to generated goals, in metres
    goal_distance: float = 0.3  # least distance of any two old goals, in metres
    gan_updates: int = 250  # updates of generator and discriminator per outer iteration
    gan_batch_size: int = 64  # goals per update
    gan_lr: float = 1e-3  # step size of RMSprop for generator and discriminator
    # recall traces: of no, an untrained (App. F) or a learned backtracking model (Eq. 2)
    recall: Literal["none", "random", "learned"] = "learned"
    num_traces: int = 64  # recall traces per imitation update, each from a state of its own (the paper's N is 1)
    trace_length: int | None = None  # longest trace in steps; if not given, 50 for the ant, 20 for others (App. D)
    recall_every: int = 1  # outer iterations per recall phase, which comes after the first inner iteration
    recall_updates: int = 20  # imitation updates per recall phase, each with new traces
    buffer_size: int = 100_000  # steps that the buffer holds, of successful trajectories only, the newest
    backtracking_updates: int = 100  # backtracking model updates per recall phase (App. C)
    backtracking_batch_size: int = 256  # (state, action, next state) tuples per backtracking model update
    backtracking_lr: float = 1e-3  # step size of Adam for the backtracking model (beta in Alg. 1)
    imitation_lr: float = 1e-3  # step size of Adam for the imitation of traces (in Alg. 1 the policy's own, alpha)
    imitation_kl: float | None = None  # largest mean KL divergence of a recall phase; 0.005 for the ant, else 0.02
    action_noise: float = 1.0  # standard deviation of imagined actions as a share of the model's (App. C: 1)
    state_noise: float = 0.5  # standard deviation of imagined changes of state as a share of the model's (the paper: 1)
    trace_limit: float = 5.0  # standard deviations; a trace ends where its state is further from the mean of the data


LARGEST_ACTION = 1.0  # actions of traces are clipped to it, as the environment clips those of the policy
MAZES = ("AntUMaze-v0", "PointUMaze-v0")  # coverage of which is measured on a grid, and drawn


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


class GoalGAN(nn.Module):
    """Goal GAN's generator (noise -> goal) and discriminator (goal -> how good it is), in the box `low` to `high`."""

    def __init__(self, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.register_buffer("low", torch.from_numpy(low).float())
        self.register_buffer("high", torch.from_numpy(high).float())
        self.generator = mlp(4, 256, len(low), nn.ReLU)
        self.discriminator = mlp(len(low), 128, 1, lambda: nn.LeakyReLU(0.1))

    def generate(self, count: int) -> torch.Tensor:
        """Goals (count, G) from a region twice as wide as the box."""
        noise = torch.randn(count, 4).to(self.low.device)
        return (self.low + self.high) / 2 + (self.high - self.low) * self.generator(noise).tanh()

    def judge(self, goals: torch.Tensor) -> torch.Tensor:
        """How good the goals (B, G) are, (B,): about 1 for good ones, -1 for bad and for generated ones."""
        return self.discriminator((2 * goals - self.low - self.high) / (self.high - self.low)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------ buffer
Rollout = namedtuple("Rollout", "states actions rewards next_states terminated truncated")  # arrays (T, E, ...)
Tuples = namedtuple("Tuples", "states actions rewards next_states goals")  # tensors (n, ...); states without goals


def add_successes(buffer: Tuples, rollout: Rollout, args: Args) -> Tuples:
    """B with the steps of those episodes of a rollout that reached their goal, of which the newest --buffer-size stay.

    A trajectory's steps follow one another, and only its last one has a reward, 1. Actions are kept as the environment
    carried them out. An episode that the end of the rollout cuts has not reached its goal.
    """
    success, successes = np.zeros(rollout.rewards.shape[1], dtype=bool), []  # of the episode to which each step belongs
    for t in reversed(range(len(rollout.rewards))):
        success = np.where(rollout.terminated[t] | rollout.truncated[t], rollout.rewards[t] > 0, success)
        successes.append(success)
    chosen = np.array(successes[::-1]).T  # (E, T), environment by environment
    states, actions, rewards, next_states = (torch.from_numpy(x.swapaxes(0, 1)[chosen]) for x in rollout[:4])
    size = buffer.states.shape[1]
    columns = states[:, :size], actions.clamp(-1, 1), rewards, next_states[:, :size], states[:, size:]
    return Tuples(*(torch.cat(pair)[-args.buffer_size :].clone() for pair in zip(buffer, columns, strict=True)))


# ------------------------------------------------------------------------------------------------------ TRPO
def act(actor: Actor, states: np.ndarray, greedy: bool = False) -> np.ndarray:
    """Actions (B, A) of the policy in states (B, S), in numpy, which for few states is twice as fast as torch."""
    log_std, _, mean, std, w1, b1, w2, b2, w3, b3 = (x.cpu().numpy() for x in actor.state_dict().values())
    x = ((states - mean) / std).clip(-10, 10)
    x = np.tanh(np.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    if not np.isfinite(x).all():
        raise FloatingPointError("an action is not finite, as the policy's weights or its observations are not")
    return x if greedy else x + np.exp(log_std) * torch.randn(x.shape).numpy()


def collect_episodes(envs, actor: Actor, goals: torch.Tensor, num_steps: int) -> tuple[Rollout, dict]:
    """Runs the policy for T = num_steps steps from the start; each episode has one of the goals (n, G), drawn anew.
    Returns the rollout, and mean return and length of the episodes that ended in it."""
    drawn = goals[torch.randint(len(goals), (num_steps + 1, envs.num_envs))].numpy()  # for episodes that begin then
    states, _ = envs.reset(options={"goals": drawn[-1]})
    steps, ended, lengths = [], [], np.zeros(envs.num_envs)
    for t in range(num_steps):
        actions = act(actor, states)
        next_states, rewards, terminated, truncated, _ = envs.step(actions)
        steps.append((states, actions, rewards.astype(np.float32), next_states, terminated, truncated))
        states, lengths, done = next_states, lengths + 1, terminated | truncated
        if done.any():
            ended += zip(rewards[done], lengths[done], strict=True)
            states, _ = envs.reset(options={"goals": drawn[t], "reset_mask": done})
            lengths[done] = 0
    names = "charts/episodic_return", "charts/episodic_length"
    means = dict(zip(names, np.mean(ended, axis=0).tolist(), strict=True)) if ended else {}
    return Rollout(*map(np.array, zip(*steps, strict=True))), means


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


# ------------------------------------------------------------------------------------------------------ goals
@torch.no_grad()
def draw_goals(gan: GoalGAN, count: int, args: Args) -> torch.Tensor:
    """New goals (count, G): generated, then with normal noise of std --goal-noise added, and clipped to the box."""
    goals = gan.generate(count)
    return (goals + args.goal_noise * torch.randn_like(goals)).clamp(gan.low, gan.high).cpu()


def goal_labels(rates: torch.Tensor, args: Args) -> torch.Tensor:
    """Which goals are good, given how often each was reached, (n,): 1 for goals of intermediate difficulty, whose rate
    lies strictly between --least-success and --most-success, 0 for others."""
    return ((rates > args.least_success) & (rates < args.most_success)).float()


def discriminator_loss(gan: GoalGAN, goals, labels, generated: torch.Tensor) -> torch.Tensor:
    """Least-squares loss (Mao et al., 2017) of the discriminator d, which is to be 1 for goals (B, G) with label y = 1,
    -1 for those with y = 0 and generated ones: mean of (d(goal) - (2 y - 1))^2 plus mean of (d(generated) + 1)^2."""
    return ((gan.judge(goals) - (2 * labels - 1)) ** 2).mean() + ((gan.judge(generated) + 1) ** 2).mean()


def generator_loss(gan: GoalGAN, generated: torch.Tensor) -> torch.Tensor:
    """Least-squares loss of the generator, whose goals are to look good: the mean of (d(generated) - 1)^2."""
    return ((gan.judge(generated) - 1) ** 2).mean()


def update_goal_gan(gan: GoalGAN, optimizers, goals: torch.Tensor, labels: torch.Tensor, args: Args) -> dict:
    """--gan-updates steps of discriminator and generator on batches of goals (n, G) with labels (n,); returns losses.
    They go in turns, as with both at once the generated goals collapse to one place."""
    goals, labels = goals.to(gan.low.device), labels.to(gan.low.device)
    for _ in range(args.gan_updates):
        rows, generated = torch.randint(len(goals), (args.gan_batch_size,)), gan.generate(args.gan_batch_size)
        of_discriminator = discriminator_loss(gan, goals[rows], labels[rows], generated.detach())
        optimizers["discriminator"].zero_grad()
        of_discriminator.backward()
        optimizers["discriminator"].step()
        of_generator = generator_loss(gan, generated)
        optimizers["generator"].zero_grad()
        of_generator.backward()
        optimizers["generator"].step()
    return {"losses/discriminator_loss": of_discriminator.detach(), "losses/generator_loss": of_generator.detach()}


def keep_for_replay(old_goals: torch.Tensor, goals: torch.Tensor, distance: float) -> torch.Tensor:
    """Old goals (m, G) and those of the goals (n, G), in their order, that are at least `distance` from all before."""
    waiting, kept = torch.cat((old_goals, goals)), []
    while len(waiting):
        first, rest = waiting[0], waiting[1:]
        kept.append(first)
        waiting = rest[(rest - first).norm(dim=-1) >= distance]
    return torch.stack(kept)


def success_rates(envs, actor: Actor, goals: torch.Tensor, episodes: int) -> torch.Tensor:
    """Whether the policy, with its noise, reaches each of the goals (n, G), in so many episodes each, (episodes, n)."""
    goals, results = goals.repeat(episodes, 1).numpy(), []
    for first in range(0, len(goals), envs.num_envs):  # one episode in each environment
        rows = np.arange(first, first + envs.num_envs) % len(goals)  # the last ones may be too many
        states, _ = envs.reset(options={"goals": goals[rows]})
        running, actions = np.ones(len(rows), dtype=bool), np.zeros(envs.action_space.shape, np.float32)
        success = np.zeros(len(rows), np.float32)
        while running.any():
            actions[running] = act(actor, states[running])
            states, rewards, terminated, truncated, _ = envs.step(actions)
            success[running] = rewards[running]
            running &= ~(terminated | truncated)
        results.append(success)
    return torch.from_numpy(np.concatenate(results)[: len(goals)]).view(episodes, -1)


# ------------------------------------------------------------------------------------------------------ recall traces
def high_value_states(env, gan: GoalGAN, poses, buffer: Tuples, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """States (n, S), and their goals (n, G), that the Goal GAN calls valuable (Alg. 2), for all traces of a phase.

    Of twice as many goals these are the half nearer to goals that have been reached; others may lie in walls. An
    episode ends near its goal. So D puts the agent at the same offset from the goal at which the trajectory with the
    nearest goal (the oldest such one) ended from its own. Where there is no D, these ends and their goals are taken.
    """
    count, ends = args.num_traces * args.recall_updates, buffer.rewards > 0
    goals = draw_goals(gan, 2 * count, args)  # Alg. 2, line 2
    reached, oldest = np.unique(buffer.goals[ends].numpy(), axis=0, return_index=True)
    reached, ends = torch.from_numpy(reached), buffer.next_states[ends][oldest]
    distances, nearest = torch.cdist(goals, reached).min(dim=1)
    chosen = distances.argsort()[:count][torch.randperm(count)]
    goals, ends, reached = goals[chosen], ends[nearest[chosen]], reached[nearest[chosen]]
    if not env.knows_places:
        return ends, reached  # Alg. 2, line 6
    return decode(env, goals + ends[:, env.places] - reached, ends, poses), goals  # Alg. 2, lines 3 and 4


def decode(env, places: torch.Tensor, ends: torch.Tensor, poses: np.ndarray | None) -> torch.Tensor:
    """D: g -> s, states (n, S) of agents at the places (n, G): an ant in a pose drawn from `poses`, so "a valid random
    joint-angle configuration at that goal position"; a point with the velocity of the state in `ends` (n, S)."""
    if poses is not None:
        ants = poses[torch.randint(len(poses), (len(places),)).numpy()]
        return torch.from_numpy(env.unwrapped.envs.put(ants, places.numpy())).float()
    states = ends.clone()
    states[:, env.places] = places
    return states


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


def relabel(env, states: torch.Tensor, goals: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States of traces (T, N, S) with the goals (N, G) of their traces appended; and which of them are imitated (T, N):
    those inside whose goal has not been reached yet, as an episode ends there."""
    goals = goals.expand(len(states), -1, -1)
    far = ~torch.from_numpy(env.reached(states[inside][:, env.places].cpu().numpy(), goals[inside].cpu().numpy()))
    return torch.cat((states, goals), dim=-1), inside.masked_scatter(inside, far.to(inside.device))


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


# ------------------------------------------------------------------------------------------------------ environment
def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment, with vectors of state and goal, and of actions from -1 to 1."""
    if render_mode and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    options = {"max_episode_steps": args.max_episode_steps, "dims": args.dims, "contact_forces": args.contact_forces}
    env = make_goal_env(args.env_id, options | {"render_mode": render_mode})
    return gym.wrappers.RecordEpisodeStatistics(env)


def make_envs(args: Args, num_envs: int, time_limit: int, step: int) -> gym.vector.VectorEnv:
    """Many environments side by side: `num_envs`, but at most --num-envs if they are stepped one after another."""
    num_envs = num_envs if args.env_id in AS_ARRAYS else min(num_envs, args.num_envs)
    options = {"max_episode_steps": time_limit, "dims": args.dims, "contact_forces": args.contact_forces}
    options |= {"num_threads": args.env_threads} if args.env_id == "AntUMaze-v0" else {}
    envs = make_goal_envs(args.env_id, num_envs, options)
    envs.reset(seed=np.random.SeedSequence((args.seed, step)).generate_state(1).item())
    return envs


def measure_coverage(env, actor: Actor, args: Args) -> torch.Tensor:
    """Whether the policy, with its noise, reaches the goals of an evaluation, (episodes, n): 112 in the mazes, 50 that
    the environment itself sets elsewhere. Draws no random number of training."""
    goals = torch.tensor(coverage_goals() if args.env_id in MAZES else env.own_goals(50)).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs = make_envs(args, args.eval_episodes * len(goals), args.eval_steps, step=0)
        return success_rates(envs, actor, goals, args.eval_episodes)


def write_video(path: Path, actor: Actor, args: Args) -> None:
    """Writes --eval-episodes greedy episodes as a GIF, each to a goal that the environment sets."""
    env, frames = make_env(args, "rgb_array"), []
    for i in range(args.eval_episodes):
        step, (state, info) = 0, env.reset(seed=args.seed + i)
        while "episode" not in info:
            if step % 2 == 0:
                frames.append(Image.fromarray(env.render()))
            state, _, _, _, info = env.step(act(actor, state[None], greedy=True)[0])
            step += 1
    env.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0)


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
RUN_NAME, TOTAL_TIMESTEPS = "{env_id}__recall_goalgan_ant__{recall}__seed{seed}", None  # see with_defaults
AT_LEAST = {"seed": 0, "num_steps": 2, "num_replayed_goals": 0, "dims": 2, "max_kl": 1e-37}  # others: 1 for int, 0
AT_MOST = {"seed": 2**63 - 1, "gamma": 1, "gae_lambda": 1, "least_success": 1, "most_success": 1, "dims": 6}
MAY_CHANGE = ("resume", "evaluate", "total_timesteps", "capture_video", "device", "eval_episodes", "env_threads")


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


def with_defaults(args: Args, time_limit: int) -> Args:
    """Fills in what depends on the environment and its time limit (Held et al., 2018; App. D)."""
    if args.least_success >= args.most_success:
        raise UsageError(f"--least-success must be less than --most-success, which is {args.most_success}")
    ant = args.env_id == "AntUMaze-v0"
    num_envs, num_steps = args.num_envs or (200 if ant else 100), args.num_steps or time_limit
    batch, outer_batch = num_envs * num_steps, args.inner_iterations * num_envs * num_steps
    defaults = {"num_envs": num_envs, "num_steps": num_steps, "checkpoint_every": batch, "eval_every": outer_batch}
    defaults |= {"max_episode_steps": time_limit, "eval_steps": min(400, time_limit) if ant else time_limit}
    defaults |= {"trace_length": 50 if ant else 20, "imitation_kl": 0.005 if ant else 0.02, "device": "cpu"}
    defaults |= {"learn_std": args.env_id != "PointUMaze-v0", "total_timesteps": 40 * outer_batch, "eval_episodes": 3}
    return replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


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
    """Trains an agent, or measures the coverage of the trained one of --evaluate; returns the folder of its run."""
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(text, file=sys.stderr))  # as models are
    args = check(args)
    state_dim, action_dim = try_out(args)
    env = make_env(args).env
    args = with_defaults(args, env.spec.max_episode_steps or 200)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    actor = Actor(state_dim, action_dim, args.hidden).to(args.device)  # Alg. 1, line 1
    if not args.learn_std:
        actor.log_std.register_hook(torch.zeros_like)  # its gradient is 0, so the standard deviation stays 1
    critic = Critic(actor.normaliser, state_dim, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(critic.net.parameters(), lr=args.critic_lr, fused=True)
    gan = GoalGAN(*env.goal_box()).to(args.device)
    networks = {"discriminator": gan.discriminator, "generator": gan.generator}
    gan_optimizers = {name: torch.optim.RMSprop(n.parameters(), lr=args.gan_lr) for name, n in networks.items()}
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer, "gan": gan, **gan_optimizers}
    shapes = (env.state_dim,), (action_dim,), (), (env.state_dim,), (env.goal_dim,)
    buffer = Tuples(*(torch.zeros(0, *shape) for shape in shapes))
    if args.recall != "none":
        model = BacktrackingModel(env.state_dim, action_dim).to(args.device)  # Alg. 1, line 2
        model_optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr, fused=True)
        imitation_optimizer = torch.optim.Adam(actor.parameters(), lr=args.imitation_lr, fused=True)
        parts |= {"model": model, "model_optimizer": model_optimizer, "imitation_optimizer": imitation_optimizer}
        poses = env.unwrapped.envs.standing_ants(200, args.seed) if args.env_id == "AntUMaze-v0" else None
    weights = [w.detach() for part in parts.values() if isinstance(part, nn.Module) for w in part.parameters()]
    step, metrics, envs, batch = 0, {}, None, args.num_envs * args.num_steps
    outer_batch = args.inner_iterations * batch
    if args.evaluate:
        step, *_ = load_checkpoint(Path(args.evaluate), {"actor": actor})
        returns = measure_coverage(env, actor, args).mean(dim=1).tolist()
        print(*(f"episode {i}: return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
        print(f"mean return {np.mean(returns):.2f}, which is the coverage")
        if args.capture_video:
            write_video(Path(args.evaluate, f"agent_{step}.gif"), actor, args)
        return Path(args.evaluate)
    with open_run(args) as run_dir:
        if (run_dir / "checkpoint.pt").exists():
            step, metrics, goals, old_goals, buffer = load_checkpoint(run_dir, parts)
            buffer = Tuples(*buffer)
        else:
            everywhere = (gan.low + (gan.high - gan.low) * torch.rand(1000, env.goal_dim).to(args.device)).cpu()
            envs = make_envs(args, args.num_envs, args.max_episode_steps, step)
            rollout, _ = collect_episodes(envs, actor, everywhere, args.num_steps)
            visited = torch.from_numpy(rollout.states[..., env.places]).flatten(0, 1)  # where the agent goes by itself
            metrics |= update_goal_gan(gan, gan_optimizers, visited, torch.ones(len(visited)), args)
            goals, old_goals = draw_goals(gan, args.num_goals, args), torch.zeros(0, env.goal_dim)
        first_step, started = step, time.time()
        bar = tqdm(total=-(-args.total_timesteps // batch) * batch, initial=step, unit=" steps", disable=None)
        with bar, SummaryWriter(run_dir, purge_step=step) as writer:
            while True:  # Alg. 1, line 3
                for name, value in (metrics | {"weights": sum(weight.sum() for weight in weights)}).items():
                    if not math.isfinite(value):
                        raise FloatingPointError(f"{name} is {value} at step {step}")
                finished = step >= args.total_timesteps
                if finished or step == first_step or step % args.checkpoint_every < batch:
                    checkpoint = {name: part.state_dict() for name, part in parts.items()}
                    progress = step, metrics, goals, old_goals, [*buffer]
                    checkpoint |= {"rng": torch.get_rng_state(), "progress": progress}
                    writer.flush()
                    torch.save(checkpoint, file := io.BytesIO())
                    (run_dir / "checkpoint.tmp").write_bytes(file.getbuffer())
                    (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")  # a kill leaves a whole one
                    torch.cuda.manual_seed_all(torch.randint(2**62, ()).item())  # alike in both, if there is a GPU
                    envs = make_envs(args, args.num_envs, args.max_episode_steps, step)  # afresh, as if resumed here
                if finished or step % args.eval_every < batch:
                    rates = measure_coverage(env, actor, args).mean(dim=0)
                    coverage, speed = rates.mean().item(), (step - first_step) / (time.time() - started)
                    scalars = {"eval/coverage": coverage, "eval/return": coverage, "charts/SPS": speed}
                    for name, value in (metrics | scalars).items():
                        writer.add_scalar(name, float(value), step)
                    if args.env_id in MAZES:
                        figure = draw_coverage(rates.numpy(), f"{coverage:.0%} coverage after {step} steps")
                        figure.savefig(run_dir / "coverage.png", dpi=120)
                        writer.add_figure("pictures/coverage", figure, step)
                    bar.set_postfix_str(f"coverage {coverage:.2f}")
                if finished:
                    break
                rollout, episodes = collect_episodes(envs, actor, goals, args.num_steps)  # Alg. 1, line 4
                step += batch
                bar.update(batch)
                metrics |= episodes | update_trpo(actor, critic, optimizer, rollout, args)  # Alg. 1, lines 6 and 7
                visited = torch.from_numpy(rollout.states).to(args.device).flatten(0, 1)
                actor.normaliser.add(visited)  # only now, so that rollout and update have seen the same policy
                if args.recall != "none":
                    buffer = add_successes(buffer, rollout, args)  # Alg. 1, line 5
                recalls = args.recall != "none" and (step - batch) % (outer_batch * args.recall_every) == 0
                if recalls and len(buffer.rewards) > 1:
                    tuples = Tuples(*(column.to(args.device) for column in buffer))  # Alg. 1, line 8: all successes
                    model.normalise_by(tuples)
                    for _ in range(args.backtracking_updates if args.recall == "learned" else 0):  # Alg. 1, line 9
                        metrics |= update_backtracking_model(model, model_optimizer, tuples, args)
                    starts = high_value_states(env, gan, poses, buffer, args)  # Alg. 1, line 10, which is Alg. 2
                    starts, their_goals = (x.to(args.device) for x in starts)
                    metrics["recall/start_value"] = critic(torch.cat((starts, their_goals), dim=1)).mean().detach()
                    old_actor = deepcopy(actor)
                    for some in torch.arange(len(starts)).split(args.num_traces):
                        states, actions, inside = recall_traces(model, starts[some], args)  # Alg. 1, line 11
                        states, inside = relabel(env, states, their_goals[some], inside)  # Alg. 1, lines 12 and 13
                        metrics |= imitate(actor, imitation_optimizer, states, actions, inside)
                    metrics |= limit_change(actor, old_actor, visited, args)
                if step % outer_batch == 0:  # an outer iteration ends: which goals are of intermediate difficulty now?
                    labellers = make_envs(args, args.label_rollouts * len(goals), args.max_episode_steps, step)
                    labels = goal_labels(success_rates(labellers, actor, goals, args.label_rollouts).mean(dim=0), args)
                    metrics |= update_goal_gan(gan, gan_optimizers, goals, labels, args)
                    metrics |= {"goals/intermediate": labels.mean()}
                    places = visited[torch.randperm(len(visited))[:10_000], env.places].cpu()
                    old_goals = keep_for_replay(old_goals, torch.cat((goals[labels == 1], places)), args.goal_distance)
                    replayed = old_goals[torch.randperm(len(old_goals))[: args.num_replayed_goals]]
                    goals = torch.cat((draw_goals(gan, args.num_goals, args), replayed))
        if args.capture_video:
            write_video(run_dir / "agent.gif", actor, args)
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
