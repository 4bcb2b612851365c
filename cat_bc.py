# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "imageio==2.38.1", "minari[hdf5]==0.5.4", "mujoco==4.0.0",
#                 "numpy==2.4.6", "pillow==13.0.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1",
#                 "tyro==1.0.17"]
# ///
"""Behaviour cloning with corrected augmentation for trajectories, CAT (Antotsiou et al., 2021), the rival of recall_bc.

An expert's actions with noise, played from its first states on, soon lead astray. A generator learns to correct them:
it sees the state and the noisy action, and acts such that a discriminator takes it for the expert. It is trained by
trust region policy optimization, in the real environment. Its trajectories that succeed are cloned.

    python cat_bc.py                                          # from the dataset halfcheetah/expert-v0
    python cat_bc.py --penalty 0                              # the second form, free to leave the noisy action
    python cat_bc.py --evaluate RUN_DIR                       # play the trained clone

1 000 000 steps take about five minutes on one core (the original has 49 million). docs/cat_bc.md says what came out.
Shapes: states (B, S), actions (B, A) from -1 to 1, trajectories of L steps, T steps in each of E environments.
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

import gymnasium as gym
import minari
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from PIL import Image
from torch.distributions import Normal
from torch.nn.functional import softplus
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1  # seed of networks and all sampling
    total_timesteps: int | None = None  # environment steps of the generator, 1 000 000 if not given; may grow
    run_dir: str = ""  # folder of this run; runs/<env>__<script>__<penalty>__seed<seed>__<time> if not given
    resume: str = ""  # go on with the interrupted run in this folder, with its own arguments
    evaluate: str = ""  # play --eval-episodes episodes with the trained clone in this folder
    eval_every: int = 20_000  # environment steps between points of the curves; the clone comes at the end
    eval_episodes: int | None = None  # episodes of the clone's evaluation, 10 if not given
    checkpoint_every: int = 50_000  # environment steps between checkpoints; the environments are made afresh after each
    capture_video: bool = False  # write a GIF of the greedy clone, at the end of training or with --evaluate
    device: str | None = None  # torch device of the networks, cpu if not given
    torch_threads: int = 1  # CPU threads of torch
    # environment and expert
    env_id: str = "HalfCheetah-v5"  # Gymnasium id of the expert's environment
    num_envs: int = 8  # environments stepped side by side
    max_episode_steps: int | None = None  # time limit of an episode, that of the environment if not given
    contact_forces: bool = True  # whether Ant and Humanoid observe the contact forces, 78 of Ant's 105 numbers
    dataset: str = "halfcheetah/expert-v0"  # id of a Minari dataset on this machine, whose first episodes are used
    episodes: int = 7  # trajectories of the expert
    expert_steps: int | None = None  # steps of each trajectory that are used, the first ones, all if not given
    # trust region policy optimization of the generator
    num_steps: int = 256  # steps of each environment per iteration (2^14 in all in the original)
    hidden: int = 64  # units in each of the two hidden layers of all networks
    gamma: float = 0.995  # discount factor
    gae_lambda: float = 0.97  # decay of generalized advantage estimation
    max_kl: float = 0.01  # trust region: largest mean KL divergence from the old policy to that after an update
    cg_iterations: int = 10  # iterations of conjugate gradients per update
    cg_damping: float = 0.1  # added to the diagonal of the Fisher matrix
    line_search_steps: int = 10  # lengths of a step that the line search tries, each a fifth shorter than the last
    critic_lr: float = 1e-3  # step size of Adam for the critic
    critic_epochs: int = 5  # passes of the critic over each rollout
    critic_batch_size: int = 128  # states per step of the critic
    # corrected augmentation for trajectories
    uniform_noise: float = 0.9  # largest number that is added to an action of the expert
    penalty: float = 0.1  # weight (lambda) of the squared distance between generated and noisy action in the reward
    discriminator_lr: float = 1e-3  # step size of Adam for the discriminator (the original: 3e-4)
    discriminator_every: int = 1  # iterations of the generator per step of the discriminator (the original: 3)
    discriminator_entropy: float = 1e-3  # weight of the discriminator's entropy in its loss
    num_traces: int = 497  # corrected trajectories, 71 for each of 7 of the expert
    least_success: float = 0.5  # least share of the expert's mean return with which a corrected trajectory succeeds
    # behaviour cloning
    clone_updates: int = 20_000  # updates of the clone, at the end (the original: 100 000)
    learning_rate: float = 3e-4  # step size of Adam for the clone
    batch_size: int = 128  # pairs of state and action per update


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


class Discriminator(nn.Module):
    """log D(s, a) - log(1 - D(s, a)), (B,): how sure it is that an action (B, A) in a state (B, S) is the expert's."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.normaliser = Normaliser(state_dim + action_dim)
        self.net = mlp(state_dim + action_dim, hidden, 1, nn.Tanh)

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.net(self.normaliser(torch.cat((states, actions), dim=-1))).squeeze(-1)


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


class NoisyExpert(gym.Wrapper):
    """The environment from the first state of one of the experts on. What is observed is the state s_t and the noisy
    action a'_t, that of the expert with uniform noise. Beyond the last one it stays the last one."""

    def __init__(self, env: gym.Env, experts: list[Trajectory], noise: float):
        super().__init__(env)
        self.experts, self.noise = experts, noise

    def reset(self, **_):
        expert = self.experts[torch.randint(len(self.experts), ()).item()]
        self.actions = expert.actions + self.noise * (2 * torch.rand(expert.actions.shape).numpy() - 1)
        (state, info), self.steps = self.env.reset(seed=expert.seed), 0
        return np.concatenate((state, self.actions[0])), info

    def step(self, action: np.ndarray):
        state, *outcome = self.env.step(action)
        self.steps += 1
        return np.concatenate((state, self.actions[min(self.steps, len(self.actions) - 1)])), *outcome


# ------------------------------------------------------------------------------------------------------ TRPO
Rollout = namedtuple("Rollout", "states actions rewards next_states terminated truncated")  # arrays (T, E, ...)


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


# ------------------------------------------------------------------------------------------------------ CAT
def update_discriminator(discriminator: Discriminator, optimizer, expert, generated, args: Args) -> dict:
    """One step along L_u = -E log D(s, a) of the expert - E log(1 - D(s, a)) of the generator, Eq. (1), and less the
    entropy of D. Both are pairs of states (n, S) and actions (n, A), not necessarily as many."""
    of_expert, of_generator = discriminator(*expert), discriminator(*generated)
    both = torch.cat((of_expert, of_generator))
    entropy = (softplus(both) - both.sigmoid() * both).mean()
    loss = softplus(-of_expert).mean() + softplus(of_generator).mean() - args.discriminator_entropy * entropy
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    accuracy = ((of_expert > 0).float().mean() + (of_generator < 0).float().mean()) / 2
    return {"losses/discriminator_loss": loss.detach(), "losses/discriminator_accuracy": accuracy}


@torch.no_grad()
def generator_reward(discriminator: Discriminator, states, actions, noisy_actions, args: Args) -> torch.Tensor:
    """-log(1 - D(s, a)) - lambda times the mean square of a - a', after Eq. (5), for each step of a rollout."""
    distance = ((actions - noisy_actions) ** 2).mean(-1)
    return softplus(discriminator(states, actions)) - args.penalty * distance


def corrected_trajectories(envs: list, generator: Actor, args: Args) -> list[Trajectory]:
    """--num-traces trajectories of the greedy generator, with actions as they were carried out."""
    made, under_way = [], [([], [], []) for _ in envs]
    observations = [env.reset()[0] for env in envs]
    while len(made) < args.num_traces:
        actions = act(generator, np.stack(observations), greedy=True).clip(-1, 1)
        for i, (env, action) in enumerate(zip(envs, actions, strict=True)):
            states, taken, rewards = under_way[i]
            states.append(observations[i][: -len(action)])
            observations[i], reward, terminated, truncated, _ = env.step(action)
            taken.append(action)
            rewards.append(reward)
            if terminated or truncated:
                states.append(observations[i][: -len(action)])
                made.append(Trajectory(np.array(states), np.array(taken), np.array(rewards, np.float32), None))
                under_way[i], (observations[i], _) = ([], [], []), env.reset()
    return made[: args.num_traces]


def successful(trajectories: list[Trajectory], experts: list[Trajectory], args: Args) -> list[Trajectory]:
    """Those whose return is at least --least-success of the expert's mean return; the best one, if there is none.
    Of a negative mean m, as costs are, it is m - (1 - share) |m|."""
    returns = [float(trajectory.rewards.sum()) for trajectory in trajectories]
    mean = np.mean([expert.rewards.sum() for expert in experts])
    bound = min(mean - (1 - args.least_success) * abs(mean), max(returns))
    return [t for t, total in zip(trajectories, returns, strict=True) if total >= bound]


# ------------------------------------------------------------------------------------------------------ cloning
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


def clone_corrected(actor: Actor, generator: Actor, experts: list[Trajectory], args: Args) -> dict:
    """Trains a new clone on the corrected trajectories that succeed. Its random numbers are not those of the run, which
    can go on with the generator as if there had been no clone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs = [NoisyExpert(make_env(args), experts, args.uniform_noise) for _ in range(args.num_envs)]
        corrected = corrected_trajectories(envs, generator, args)
        cloned = successful(corrected, experts, args)
        pairs = tuples_of(cloned, args.device)[:2]
        actor.load_state_dict(Actor(pairs[0].shape[1], pairs[1].shape[1], args.hidden).state_dict())
        actor.normaliser.add(pairs[0])
        optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, fused=True)
        for _ in range(args.clone_updates):
            losses = clone(actor, optimizer, *draw(pairs, args.batch_size))
    mean_return = float(np.mean([trajectory.rewards.sum() for trajectory in corrected]))
    success = {"augment/success_rate": len(cloned) / len(corrected), "augment/pairs": len(pairs[0])}
    return losses | success | {"augment/return": mean_return}


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
RUN_NAME, TOTAL_TIMESTEPS = "{env_id}__cat_bc__{penalty}__seed{seed}", 1_000_000
AT_LEAST = {"seed": 0, "num_steps": 2, "max_kl": 1e-37}  # others: 1 for whole numbers, 0 for the rest
AT_MOST = {"seed": 2**63 - 1, "gamma": 1, "gae_lambda": 1, "least_success": 1}
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
    """Trains a generator and a clone, or plays the clone of --evaluate; returns the folder of its run."""
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(text, file=sys.stderr))  # as models are
    args = check(args)
    args = replace(args, device=args.device or "cpu")
    state_dim, action_dim = try_out(args)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    actor = Actor(state_dim, action_dim, args.hidden).to(args.device)  # the clone
    generator = Actor(state_dim + action_dim, action_dim, args.hidden).to(args.device)  # pi(a | s, a')
    critic = Critic(generator.normaliser, state_dim + action_dim, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(critic.net.parameters(), lr=args.critic_lr, fused=True)
    discriminator = Discriminator(state_dim, action_dim, args.hidden).to(args.device)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.discriminator_lr, fused=True)
    parts = {"actor": actor, "generator": generator, "critic": critic, "optimizer": optimizer}
    parts |= {"discriminator": discriminator, "discriminator_optimizer": discriminator_optimizer}
    weights = [w.detach() for part in parts.values() if isinstance(part, nn.Module) for w in part.parameters()]
    step, metrics, envs, batch = 0, {}, [], args.num_envs * args.num_steps
    if args.evaluate:
        step, *_ = load_checkpoint(Path(args.evaluate), {"actor": actor})
        returns = play(actor, args, Path(args.evaluate, f"agent_{step}.gif") if args.capture_video else None)
        print(*(f"episode {i}: return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
        print(f"mean return {returns.mean():.2f}, standard deviation {returns.std():.2f}")
        return Path(args.evaluate)
    env = make_env(args)
    experts = load_expert(env, args)
    if not all(e.seed is not None and np.allclose(env.reset(seed=e.seed)[0], e.states[0], atol=1e-4) for e in experts):
        raise UsageError("--dataset must have the seeds of its resets in --env-id")
    expert = tuples_of(experts, args.device)[:2]
    discriminator.normaliser.add(torch.cat(expert, dim=-1))
    with open_run(args) as run_dir:
        if (run_dir / "checkpoint.pt").exists():
            step, metrics = load_checkpoint(run_dir, parts)
        first_step, started = step, time.time()
        bar = tqdm(total=-(-args.total_timesteps // batch) * batch, initial=step, unit=" steps", disable=None)
        with bar, SummaryWriter(run_dir, purge_step=step) as writer:
            while True:
                finished = step >= args.total_timesteps
                must_save = finished or not envs or step % args.checkpoint_every < batch
                must_evaluate = finished or step % args.eval_every < batch
                of_clone = clone_corrected(actor, generator, experts, args) if finished else {}
                if must_save or must_evaluate:
                    for name, value in (
                        metrics | of_clone | {"weights": sum(weight.sum() for weight in weights)}
                    ).items():
                        if not math.isfinite(value):
                            raise FloatingPointError(f"{name} is {value} at step {step}")
                if must_save:
                    checkpoint = {name: part.state_dict() for name, part in parts.items()}
                    checkpoint |= {"rng": torch.get_rng_state(), "progress": (step, metrics)}
                    writer.flush()
                    torch.save(checkpoint, file := io.BytesIO())
                    (run_dir / "checkpoint.tmp").write_bytes(file.getbuffer())
                    (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")  # a kill leaves a whole one
                    envs = [NoisyExpert(make_env(args), experts, args.uniform_noise) for _ in range(args.num_envs)]
                    torch.cuda.manual_seed_all(torch.randint(2**62, ()).item())  # alike in both, if there is a GPU
                    observations = np.stack([env.reset()[0] for env in envs])  # afresh, as in a run resumed from here
                if must_evaluate:
                    scalars = {"charts/SPS": (step - first_step) / (time.time() - started)}
                    scalars |= of_clone | {"eval/return": play(actor, args).mean()} if finished else {}
                    for name, value in (metrics | scalars).items():
                        writer.add_scalar(name, float(value), step)
                    bar.set_postfix_str(f"return {metrics.get('charts/episodic_return', math.nan):.0f}")
                if finished:
                    break
                rollout, observations, episode = collect_rollout(envs, observations, generator, args.num_steps)
                step += batch
                bar.update(batch)
                rollout.truncated[-1] |= (step % args.checkpoint_every < batch) & ~rollout.terminated[-1]  # cut
                visited, actions = (torch.from_numpy(x).to(args.device) for x in rollout[:2])
                states, noisy_actions = visited[..., :state_dim], visited[..., state_dim:]
                actions = actions.clamp(-1, 1)  # as they were carried out
                rewards = generator_reward(discriminator, states, actions, noisy_actions, args).cpu().numpy()
                metrics |= episode | {"losses/generator_reward": float(rewards.mean())}
                metrics |= update_trpo(generator, critic, optimizer, rollout._replace(rewards=rewards), args)
                generator.normaliser.add(visited.flatten(0, 1))  # only now, as rollout and update saw the same policy
                if step // batch % args.discriminator_every == 0:
                    generated = states.flatten(0, 1), actions.flatten(0, 1)
                    metrics |= update_discriminator(discriminator, discriminator_optimizer, expert, generated, args)
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
