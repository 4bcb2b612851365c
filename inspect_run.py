# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "imageio==2.38.1", "matplotlib==3.11.2",
#                 "minari[hdf5]==0.5.4", "mujoco==4.0.0", "numpy==2.4.6", "pillow==13.0.0", "tensorboard==2.21.0",
#                 "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
"""How good are the recall traces of a trained agent? Draws them beside what really happened.

The agent plays fresh episodes, which its backtracking model has not seen. From their most valuable states the model
imagines traces backwards, and these are compared with the steps that really led there.

    python inspect_run.py RUN_DIR
    python inspect_run.py RUN_DIR --record-dataset halfcheetah/expert-v0 --episodes 7

RUN_DIR is the folder of a run of one of the scripts below. It gets the picture inspect_<step>.png, or its agent plays
episodes for a Minari dataset, which recall_bc.py and cat_bc.py learn from.
Shapes: S numbers of a state, T steps back, N traces.
"""

import importlib
import json
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass, fields, replace
from pathlib import Path

import gymnasium as gym
import minari
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from matplotlib.figure import Figure
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = ("recall_sac", "recall_trpo", "recall_goalgan_ant")


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]  # folder of a run with a backtracking model
    record_dataset: str = ""  # id of a new Minari dataset that gets greedy episodes of the agent; then nothing is drawn
    episodes: int = 10  # fresh episodes of the trained agent
    num_traces: int = 256  # recall traces, each from a state of its own
    fraction: float = 0.1  # traces start from this share of the states, the most valuable
    seed: int = 0  # seed of episodes and traces


# Arrays (L + 1, S) and (L, ...) of an episode of L steps; actions as they reach the environment.
Episode = namedtuple("Episode", "states actions rewards terminated truncated")
# Starts (N, S), states before them (T, N, S), where real ones are known (T, N), where traces have not ended (T, N).
Comparison = namedtuple("Comparison", "starts real imagined known inside")


def load_run(run_dir: Path, with_model: bool = True):
    """The script of a run, its arguments and step, its environment, and the trained actor and backtracking model."""
    try:
        saved = json.loads((run_dir / "args.json").read_text())
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        scripts = [importlib.import_module(name) for name in SCRIPTS]
        (script,) = [script for script in scripts if {field.name for field in fields(script.Args)} == saved.keys()]
        weights = checkpoint["model"] if with_model else {}
    except Exception as error:  # a damaged checkpoint can raise anything
        needed = f"the folder of a run of {' or '.join(SCRIPTS)}{' with a backtracking model' * with_model}"
        raise ValueError(f"RUN_DIR must be {needed}, {run_dir} is not: {error}".splitlines()[0]) from None
    args = replace(script.Args(**saved), device="cpu")
    env, step = script.make_env(args), checkpoint["progress"][0]
    (state_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    actor = script.Actor(state_dim, action_dim, args.hidden)
    actor.load_state_dict(checkpoint["actor"])
    model = script.BacktrackingModel(len(weights["state_mean"]), action_dim) if with_model else nn.Identity()
    model.load_state_dict(weights)
    return script, args, step, env, actor, model


def play(script, env, actor, episodes: int, seed: int, greedy: bool) -> list[Episode]:
    """Episodes of the policy: greedy, or with its noise, as in training."""
    played = []
    for i in range(episodes):
        states, steps, info = [env.reset(seed=seed + i)[0]], [], {}
        while "episode" not in info:
            action = script.act(actor, states[-1][None], greedy)[0]
            state, *outcome, info = env.step(action)
            states.append(state)
            steps.append((in_its_own_space(env, action), *outcome))
        played.append(Episode(np.array(states), *(np.array(column) for column in zip(*steps, strict=True))))
    return played


def in_its_own_space(env, action: np.ndarray) -> np.ndarray:
    """What reaches the environment itself of an action of the agent, which its wrappers rescale and clip."""
    while env is not env.unwrapped:
        if isinstance(env, gym.wrappers.TransformAction):
            action = env.action(action)
        env = env.env
    return action


def write_dataset(dataset_id: str, episodes: list[Episode], seed: int, spec, algorithm: str) -> None:
    """Writes episodes as a Minari dataset, with the seeds of their resets, by which they can be played again."""
    parse_dataset_id(dataset_id)  # raises ValueError before anything is written
    buffers = []
    for i, (states, *columns) in enumerate(episodes):
        actions, rewards, terminated, truncated = map(list, columns)
        buffers.append(EpisodeBuffer(None, seed + i, None, list(states), actions, rewards, terminated, truncated, {}))
    with warnings.catch_warnings(action="ignore"):  # of an author and other facts that are not given
        minari.create_dataset_from_buffers(dataset_id, buffers, spec, algorithm_name=algorithm)


def most_valuable(episodes: list[Episode], gamma: float, fraction: float) -> list[tuple[int, int]]:
    """(episode, time step t > 0) of the states s_t of highest value, best first.

    The value of s_t is what was earned on the step to it and after it, r_{t-1} + gamma r_t + gamma^2 r_{t+1} + ...
    """
    values = []
    for i, episode in enumerate(episodes):
        value = 0.0
        for t in reversed(range(len(episode.rewards))):
            value = episode.rewards[t] + gamma * value
            values.append((value, i, t + 1))
    values.sort(reverse=True)
    return [(i, t) for _, i, t in values[: max(1, round(fraction * len(values)))]]


def compare(recall_traces, model, episodes: list[Episode], ends: list[tuple[int, int]], args) -> Comparison:
    """Traces from the states `ends`, beside the real predecessors of these states, where the episode has them."""
    size, back = len(model.state_mean), np.arange(1, args.trace_length + 1)  # states without the goal, if there is one
    real = np.stack([episodes[i].states[np.maximum(t - back, 0), :size] for i, t in ends], axis=1)
    known = np.stack([back <= t for _, t in ends], axis=1)
    starts = torch.from_numpy(np.stack([episodes[i].states[t, :size] for i, t in ends]))
    imagined, _, inside = recall_traces(model, starts, args)
    return Comparison(starts, torch.from_numpy(real), imagined, torch.from_numpy(known), inside)


def errors(compared: Comparison, state_std: torch.Tensor) -> dict[str, torch.Tensor]:
    """Distances by step (T,) from the real states: of the imagined states, and of the starts.

    A distance is the root mean square over a state's numbers, in standard deviations. The mean is over the traces that
    have not ended and whose real state is known; nan where there is none. A model that knows nothing of the dynamics
    can stand still at the start. So that distance is the one to beat.
    """
    found, counted = {}, compared.known & compared.inside
    for name, states in (("imagined", compared.imagined), ("standing still", compared.starts)):
        distances = ((states - compared.real) / state_std).square().mean(-1).sqrt()
        found[name] = torch.where(counted, distances, 0).sum(-1) / counted.sum(-1)
    return found


def draw(compared: Comparison, model, args, run_dir: Path, places: slice | None) -> Figure:
    """Four pictures: traces, their error by step, how many last, and the learning curve of the run."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(f"{args.env_id}, --recall {args.recall}, seed {args.seed}")
    (plane, error), (lasting, curve) = figure.subplots(2, 2)
    starts, real, imagined = ((x - model.state_mean) / model.state_std for x in compared[:3])
    axes = torch.pca_lowrank(real[compared.known], q=2)[2]  # (S, 2), the plane in which real states vary most
    if places:  # positions in place of principal axes
        axes, (starts, real, imagined) = torch.eye(real.shape[-1])[:, places][:, :2], compared[:3]
    for states, kept, style in ((real, compared.known, "k.-"), (imagined, compared.known & compared.inside, "C1.-")):
        for i in compared.known.sum(0).argsort(descending=True, stable=True)[:8]:
            path = torch.cat((starts[i : i + 1], states[kept[:, i], i])) @ axes
            plane.plot(*path.T, style, ms=4, lw=0.8)
            plane.plot(*path[0], "C0*", ms=9, zorder=3)
    names = ("x [m]", "y [m]") if places else ("first principal axis", "second principal axis")
    plane.set(title="Backwards: real in black, imagined in orange", xlabel=names[0], ylabel=names[1])
    if args.env_id in ("AntUMaze-v0", "PointUMaze-v0"):
        importlib.import_module("envs.u_maze").draw_maze(plane)
    steps = np.arange(1, len(real) + 1)
    for (name, distances), style in zip(errors(compared, model.state_std).items(), ("C1.-", "k--"), strict=True):
        error.plot(steps, distances, style, label=name)
    error.set(title="Distance from the real states", xlabel="steps back", ylabel="standard deviations", ylim=(0, None))
    error.legend()
    lasting.plot(steps, compared.inside.float().mean(1), "C2.-")
    lasting.set(title="Traces that have not ended", xlabel="steps back", ylabel="share of traces", ylim=(0, 1.05))
    points = EventAccumulator(str(run_dir)).Reload().Scalars("eval/return")
    curve.plot([point.step for point in points], [point.value for point in points], ".-")
    curve.set(title="Learning curve", xlabel="environment steps", ylabel="return of the greedy policy")
    return figure


@torch.no_grad()
def main(args: Args) -> Path:
    """Writes the picture of a run and prints its numbers, or writes a dataset; returns the path of picture or run."""
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(text, file=sys.stderr))
    run_dir = Path(args.run_dir)
    script, run_args, step, env, actor, model = load_run(run_dir, with_model=not args.record_dataset)
    torch.manual_seed(args.seed)
    seed = 10**6 + args.seed  # other starts than in evaluations
    episodes = play(script, env, actor, args.episodes, seed, greedy=bool(args.record_dataset))
    returns = np.array([episode.rewards.sum() for episode in episodes])
    print(f"return {returns.mean():.1f}, standard deviation {returns.std():.1f}, over {len(episodes)} fresh episodes")
    if args.record_dataset:
        write_dataset(args.record_dataset, episodes, seed, env.unwrapped.spec, script.__name__)
        return run_dir
    ends = most_valuable(episodes, run_args.gamma, args.fraction)
    ends = [ends[i] for i in torch.randperm(len(ends))[: args.num_traces]]
    compared = compare(script.recall_traces, model, episodes, ends, run_args)
    print(f"a trace lasts {compared.inside.sum() / len(ends):.1f} of {run_args.trace_length} steps")
    for t, (imagined, still) in enumerate(zip(*errors(compared, model.state_std).values(), strict=True), start=1):
        if t in (1, 2, 5, 10, 20, 50) and imagined.isfinite():
            print(f"{t:2} steps back: {imagined:.2f} deviations from the real state, standing still {still:.2f}")
    path = run_dir / f"inspect_{step}.png"
    draw(compared, model, run_args, run_dir, getattr(env.unwrapped, "places", None)).savefig(path, dpi=100)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
