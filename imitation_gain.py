# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "imageio==2.38.1", "mujoco==4.0.0", "numpy==2.4.6",
#                 "pandas==3.1.1", "pillow==13.0.0", "scipy==1.17.1", "tensorboard==2.21.0", "torch==2.13.0",
#                 "tqdm==4.70.1", "tyro==1.0.17"]
# ///
"""Is it a step uphill to imitate a recall trace? Measured on policies that plain TRPO has trained for a while.

    python imitation_gain.py --env-id HalfCheetah-v5

Let g be the policy gradient of many fresh steps and h the gradient of some imitation: of the mean log pi(a | s) over
the states and actions that are imitated. Its natural gradient d = F^-1 h changes the return by g^T d, and the policy
by a KL divergence of d^T F d / 2. So g^T d / sqrt(d^T F d) is what the imitation gains per root of KL divergence. Its
unit is what the policy gradient of one batch of TRPO gains on that batch itself.

A row is a kind of imitation, a column a number of iterations. Given are the mean over the seeds, its 95 % interval by
Student's t, and the table of all numbers in --csv.
"""

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from scipy.stats import t as student
from torch.nn.utils import parameters_to_vector

trpo = importlib.import_module("recall_trpo")  # what is measured, as in inspect_run.py and reproduce.py


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # Gymnasium id of the environment
    iterations: tuple[int, ...] = (10, 40, 100)  # of TRPO, after which is measured
    seeds: int = 5  # runs of TRPO, from seed 1 on
    batches: int = 24  # fresh batches of 2 048 steps for g, and half as many for the imitation
    csv: str = ""  # file for the numbers of all seeds


def collect(actor, critic, envs: list, count: int, args: trpo.Args) -> tuple[list, torch.Tensor, torch.Tensor, list]:
    """Fresh batches of TRPO: states (n, S), actions (n, A) and advantages (n,) of all, and the trajectories in them."""
    states, buffer, under_way = np.stack([env.reset()[0] for env in envs]), [], [[] for _ in envs]
    rollouts, advantages = [], []
    for _ in range(count):
        rollout, states, _ = trpo.collect_rollout(envs, states, actor, args.num_steps)
        with torch.no_grad():
            values, next_values = (critic(torch.from_numpy(x)).numpy() for x in (rollout.states, rollout.next_states))
        advantages.append(trpo.generalized_advantages(rollout, values, next_values, args.gamma, args.gae_lambda))
        trpo.add_trajectories(buffer, under_way, rollout, args)
        rollouts.append(rollout)
    columns = (np.concatenate([getattr(r, name) for r in rollouts]) for name in ("states", "actions"))
    advantages = torch.from_numpy(np.concatenate(advantages)).flatten()
    return (
        *(torch.from_numpy(x).flatten(0, 1) for x in columns),
        (advantages - advantages.mean()) / advantages.std(),
        buffer,
    )


def means_gradient(actor, loss: torch.Tensor) -> torch.Tensor:
    """The gradient (P,) of a loss by the actor's weights; the standard deviation is left alone."""
    gradient = parameters_to_vector(torch.autograd.grad(loss, [*actor.parameters()], materialize_grads=True))
    gradient[: len(actor.log_std)] = 0
    return gradient


def gain(actor, g: torch.Tensor, h: torch.Tensor, states: torch.Tensor) -> float:
    """g^T d / sqrt(d^T F d) of d = F^-1 h (damping 0.01), F the mean over states (n, S)."""
    direction = trpo.conjugate_gradients(trpo.fisher_matrix(actor, states, 0.01), h, 20)
    return (g @ direction / (direction @ trpo.fisher_matrix(actor, states, 0.0)(direction)).sqrt()).item()


def measure(run_dir: Path, count: int, seed: int) -> dict[str, float]:
    """The gain of each kind of imitation for the trained policy of a run, in the unit of the docstring above."""
    args = trpo.read_args(trpo.Args(evaluate=str(run_dir)))
    length = {"Hopper-v5": 10, "Ant-v5": 50}.get(args.env_id, 20)  # Table 1
    args = trpo.replace(args, device="cpu", trace_length=length)
    envs = [trpo.make_env(args) for _ in range(args.num_envs)]
    for i, env in enumerate(envs):
        env.reset(seed=1_000_000 + 100 * seed + i)
    state_dim, action_dim = len(envs[0].observation_space.low), envs[0].action_space.shape[0]
    actor = trpo.Actor(state_dim, action_dim, args.hidden)
    critic = trpo.Critic(actor.normaliser, state_dim, args.hidden)
    trpo.load_checkpoint(run_dir, {"actor": actor, "critic": critic})
    torch.manual_seed(seed)

    def policy_gradient(states, actions, advantages):
        return means_gradient(actor, (advantages * actor(states).log_prob(actions).sum(-1)).mean())

    states, actions, advantages, _ = collect(actor, critic, envs, count, args)
    g = policy_gradient(states, actions, advantages)
    states, actions, advantages, buffer = collect(actor, critic, envs, count // 2, args)
    batch = args.num_envs * args.num_steps
    own = policy_gradient(states[:batch], actions[:batch], advantages[:batch])
    gradients = {"the policy gradient of another batch": own}
    tuples = trpo.high_value_states(buffer, args)
    for label, updates in (("recall traces", 1000), ("traces of an untrained model", 0)):
        model = trpo.BacktrackingModel(state_dim, action_dim)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.backtracking_lr)
        model.normalise_by(tuples)
        for _ in range(updates):
            trpo.update_backtracking_model(model, optimizer, tuples, args)
        starts = tuples.next_states[torch.randperm(len(tuples.values))[: 5 * args.num_traces]]
        imagined, its_actions, inside = trpo.recall_traces(model, starts, args)
        log_probs = actor.log_prob_of_clipped(imagined[inside], its_actions[inside])
        gradients[label] = means_gradient(actor, log_probs.mean())
    of_tuples = actor.log_prob_of_clipped(tuples.states, tuples.actions)
    gradients["real steps to the same high-value states"] = means_gradient(actor, of_tuples.mean())
    best = advantages.topk(len(advantages) // 4).indices
    better = actor(states[best]).log_prob(actions[best]).sum(-1)
    gradients["real steps that went better than expected"] = means_gradient(actor, better.mean())
    unit = gain(actor, own, own, states[:batch])
    return {label: gain(actor, g, gradient, states) / unit for label, gradient in gradients.items()}


def main(args: Args) -> pd.DataFrame:
    """Trains, measures and prints; returns the numbers of all seeds, a row each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, args.seeds + 1):
            run_dir, options = f"{folder}/{seed}", {"recall": "none", "env_id": args.env_id, "seed": seed}
            for i, iterations in enumerate(sorted(args.iterations)):
                options = options | {"run_dir": run_dir, "eval_every": 10**9} if i == 0 else {"resume": run_dir}
                trpo.main(trpo.Args(**options, total_timesteps=iterations * 2048))
                for label, value in measure(Path(run_dir), args.batches, seed).items():
                    rows.append({"imitated": label, "iterations": iterations, "seed": seed, "gain": value})
                    print(f"{args.env_id}, seed {seed}, {iterations} iterations, {label}: {value:.3f}", file=sys.stderr)
    table = pd.DataFrame(rows)
    if args.csv:
        table.to_csv(args.csv, index=False, float_format="%.5g")
    groups = table.groupby(["imitated", "iterations"], sort=False)["gain"]
    half = groups.sem() * student.ppf(0.975, args.seeds - 1)
    shown = groups.mean().map("{:.2f}".format) + " ± " + half.map("{:.2f}".format)
    print(shown.unstack(sort=False).to_string())
    return table


if __name__ == "__main__":
    main(tyro.cli(Args))
