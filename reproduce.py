# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.3.1", "gymnasium==1.4.0", "imageio==2.38.1", "matplotlib==3.11.2",
#                 "minari[hdf5]==0.5.4", "mujoco==4.0.0", "numpy==2.4.6", "pandas==3.1.1", "pillow==13.0.0",
#                 "scipy==1.17.1", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
"""Makes the figures of the paper again: runs the scripts over many seeds, reads their curves, draws, and judges.

    python reproduce.py fig2                       # one figure, with all runs that it lacks: results/fig2
    python reproduce.py fig2 --seeds 20            # more seeds, whose rows are added to those that are there
    python reproduce.py fig2 --dry-run | xargs -P 16 -I {} sh -c "{}"    # run it your own way, then --plot-only

The folder of a figure holds data.csv (a row for each evaluation), runs.csv (a row for each run: its command, commit,
machine and versions) and the picture. Interrupt it whenever you like: the next start goes on.
"""

import importlib.metadata
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import matplotlib.figure
import minari
import numpy as np
import pandas as pd
import tyro
from filelock import FileLock
from PIL import Image
from scipy.stats import DegenerateDataWarning, bootstrap, fisher_exact, gmean, trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports what a resumed run logs anew


@dataclass
class Args:
    figures: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # such as fig2 fig4; all if none is given
    list: bool = False  # list all figures of the paper, and stop
    dry_run: bool = False  # print the commands of all runs that are left, one a line, and stop
    plot_only: bool = False  # start no run, draw what the finished ones give
    # length of the runs; smoke: tiny, to see that all works; laptop: hours on 2 cores; paper: the paper's budget
    scale: Literal["smoke", "laptop", "paper"] = "laptop"
    # seeds of each setting, from 1 on; if not given, 1 for smoke, else 10 in four rooms, 5 on MuJoCo, 3 with Goal GAN
    seeds: int | None = None
    workers: int = os.cpu_count() or 1  # runs at a time, each with one torch thread
    # slurm: submit the runs as one job array, --workers of them at a time (pip install submitit; shared folders)
    engine: Literal["local", "slurm"] = "local"
    runs_dir: Path = Path("runs/reproduce")  # folder of the runs
    results_dir: Path | None = None  # of the figures; if not given, results for laptop, else results/smoke or /paper


# ------------------------------------------------------------------------------------------------------ figures
# Flags at each scale. The laptop's soft actor-critic has networks and batches of half the size; the paper's TRPO has
# batch, KL bound and discount of Nagabandi et al. (2017). Goal GAN has 40 outer iterations, the paper's ant 155.
FOUR_ROOMS = dict.fromkeys(("laptop", "paper"), "--total-timesteps 100000")
FOUR_ROOMS["smoke"] = "--total-timesteps 1000 --eval-every 250"
GOAL_GAN = dict.fromkeys(("laptop", "paper"), "--total-timesteps 4000000")
GOAL_GAN["smoke"] = "--total-timesteps 1000 --num-envs 10 --num-steps 50 --max-episode-steps 50 --inner-iterations 1 "
GOAL_GAN["smoke"] += "--num-goals 10 --label-rollouts 1 --gan-updates 10 --num-traces 4 --eval-episodes 1"
ANT_MAZE = GOAL_GAN | {"laptop": "--total-timesteps 10000000 --num-envs 100", "paper": "--total-timesteps 77500000"}
CLONE = "--dataset halfcheetah/slides-v0 --eval-episodes 100"
SMOKE_CLONE = "--dataset halfcheetah/smoke-v0 --eval-episodes 1 --num-traces 7"
SCALES = {
    "recall_a2c_fourroom.py": FOUR_ROOMS,
    "per_a2c_fourroom.py": FOUR_ROOMS,
    "recall_sac.py": {
        "smoke": "--total-timesteps 400 --learning-starts 200 --recall-every 99 --eval-every 400 --eval-episodes 1",
        "laptop": "--total-timesteps 60000 --hidden 128 --batch-size 128",
        "paper": "--total-timesteps 1000000",
    },
    "recall_trpo.py": {
        "smoke": "--total-timesteps 512 --num-steps 64 --recall-until 1 --eval-every 512 --eval-episodes 1",
        "laptop": "--total-timesteps 500000 --eval-every 25000 --eval-episodes 5",
        "paper": "--total-timesteps 2000000 --num-envs 16 --num-steps 3125 --max-kl 0.05 --gamma 0.995 "
        "--recall-every 5 --recall-until 1 --eval-every 50000",
    },
    "recall_goalgan_ant.py": GOAL_GAN,
    "recall_bc.py": {
        "smoke": f"{SMOKE_CLONE} --total-timesteps 20 --eval-every 20 --backtracking-updates 9",
        "laptop": f"{CLONE} --total-timesteps 20000 --eval-every 20000",
        "paper": f"{CLONE} --total-timesteps 100000 --eval-every 100000",
    },
    "cat_bc.py": {
        "smoke": f"{SMOKE_CLONE} --total-timesteps 64 --num-steps 8 --clone-updates 9",
        "laptop": f"{CLONE} --total-timesteps 1000000",
        "paper": f"{CLONE} --total-timesteps 49000000 --num-steps 2048 --clone-updates 100000",
    },
}
EXPERT = "recall_sac.py --recall none --total-timesteps 48000"  # with seed 1 it returns about 2 440, as in the slides
PICTURES = dict.fromkeys(("recall_a2c_fourroom.py", "per_a2c_fourroom.py"), "pictures/visits")
SEEDS = dict.fromkeys(PICTURES, 10) | {"recall_goalgan_ant.py": 3}  # of each setting; of other scripts 5
PICTURES["recall_goalgan_ant.py"] = "pictures/coverage"  # what a script draws at the end of a run


class Panel(NamedTuple):
    """What is drawn, and the script and flags (a setting) behind each label of the legend."""

    title: str
    runs: dict[str, str]
    # curves: a tag against steps; finals: its last values; pictures: a seed's, for each label; growth: all in one
    kind: Literal["curves", "finals", "pictures", "growth"] = "curves"
    tag: str = "eval/return"
    until: int | None = None  # last environment step that is drawn; of pictures, only the last up to then


class PaperFigure(NamedTuple):
    place: str  # in the paper, or ours
    title: str
    panels: tuple[Panel, ...]


# The titles of panels, and the flags that all runs of a panel get. For point masses, they are those of Goal GAN's code.
ROOM, TASK = ("{0} x {0}", "--size {0}"), ("{0}", "--env-id {0}")
BOX = ("{0} dimensions", "--env-id PointMass-v0 --dims {0} --gamma 0.995 --hidden 32 --gan-updates 100")


def panels(where: tuple[str, str], values: tuple, runs: dict[str, str], *kind_tag_until) -> tuple[Panel, ...]:
    """A panel for each of several rooms, tasks or boxes."""
    title, flags = where
    all_runs = [{label: f"{run} {flags.format(value)}" for label, run in runs.items()} for value in values]
    return tuple(
        Panel(title.format(n), its_runs, *kind_tag_until) for n, its_runs in zip(values, all_runs, strict=True)
    )


NONE, RECALL, RANDOM, LEARNED = (f"recall_a2c_fourroom.py --recall {r}" for r in ("none", "true", "random", "learned"))
PER, TD_ERROR = (f"per_a2c_fourroom.py --priority {priority}" for priority in ("return", "td-error"))
GOAL_KNOWN = f"{RECALL} --start-states goal"
BOTH = {"actor-critic": NONE, "recall traces": RECALL}
REPLAY = {"PER": PER, "PER by TD error": TD_ERROR, "recall traces": RECALL}
METHODS = {"actor-critic": NONE} | REPLAY
MODELS, ACTIONS = BOTH | {"both learned": LEARNED}, BOTH | {"random backward actions": RANDOM}
REPLAY_UPDATES = {"PER, 1": f"{PER} --replay-updates 1", "PER, 4": f"{PER} --replay-updates 4", "PER, 16": PER} | BOTH
STEP_SIZES = BOTH | {"goal known": GOAL_KNOWN}
STEP_SIZES |= {f"{label}, 2e-3": f"{run} --learning-rate 2e-3" for label, run in STEP_SIZES.items()}
ONCE = f"{RECALL} --recall-updates 1 --trace-length 25"
RATIOS = {"1 : 1": ONCE, "5 : 1": f"{ONCE} --recall-every 5", "10 : 1": f"{ONCE} --recall-every 10"}
LENGTHS = {"1 : 1 (25)": ONCE} | {
    f"1 : {n} ({length})": f"{RECALL} --recall-updates {n} --trace-length {length}"
    for n, length in ((5, 25), (5, 10), (20, 25), (20, 5))
}
POINT, FLAT, ANT = "PointUMaze-v0", "envs:PointUMazeFlat-v0", "AntUMaze-v0"
TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")
SAC, SAC_RECALL, SAC_RANDOM = (f"recall_sac.py --recall {recall}" for recall in ("none", "learned", "random"))
SAC_BOTH = {"soft actor-critic": SAC, "recall traces": SAC_RECALL}
SAC_MODELS = SAC_BOTH | {"untrained model": SAC_RANDOM}
# As in the paper, so many updates from recall traces for 5 of soft actor-critic; there are 200 between recall phases.
SAC_RATIOS = {"soft actor-critic": SAC} | {
    f"{n} : 5 ({length})": f"{SAC_RECALL} --recall-updates {40 * n} --trace-length {length}"
    for n, length in ((5, 20), (10, 20), (20, 20), (20, 10))
}
TRPO, TRPO_RECALL, TRPO_RANDOM = (f"recall_trpo.py --recall {recall}" for recall in ("none", "learned", "random"))
TRPO_BOTH = {"TRPO": TRPO, "recall traces": TRPO_RECALL}
TRPO_MODELS = TRPO_BOTH | {"untrained model": TRPO_RANDOM, "forward model": "recall_trpo.py --recall forward"}
SPARSE = "--recall-until 1 --total-timesteps 1000000 --eval-every 50000 --eval-episodes 20"
SPARSE_RUNS = {label: f"{run} {SPARSE}" for label, run in (TRPO_BOTH | {"untrained model": TRPO_RANDOM}).items()}
TABLE_1 = {"HalfCheetah-v5": 20, "Hopper-v5": 10, "Walker2d-v5": 20, "Ant-v5": 50}  # lengths of traces, the default
GAN, GAN_RECALL, GAN_RANDOM = (f"recall_goalgan_ant.py --recall {recall}" for recall in ("none", "learned", "random"))
GAN_BOTH = {"Goal GAN": GAN, "recall traces": GAN_RECALL}
GAN_MODELS = GAN_BOTH | {"untrained model": GAN_RANDOM}
OURS = "recall_bc.py --augment bdm --start-states all --with-expert 0.5 --trace-length 5 --num-traces 7000"
CLONES = {"expert": "recall_bc.py --augment none", "CAT": "cat_bc.py --penalty 0.1"}
CLONES |= {x: f"recall_bc.py --augment {x.lower().replace('_', '-')}" for x in ("noise", "mixup", "BDM", "BDM_CL")}
CLONES |= {"BDM, all states": "recall_bc.py --augment bdm --start-states all", "recall traces": OURS}
SHORT = {label: f"{CLONES[label]} --expert-steps 50" for label in ("expert", "recall traces")}
SHORT["untrained model"] = f"{SHORT['recall traces']} --backtracking-updates 0"
CLONE_PANELS = Panel("7 trajectories", CLONES, "finals"), Panel("50 steps of each", SHORT, "finals")
SLIDES = {"expert": 991, "CAT": 2906, "noise": 1342, "mixup": 1240, "BDM": 319, "BDM_CL": 1096}  # returns there


def visits(*sizes: int) -> tuple[Panel, ...]:
    return panels(ROOM, sizes, REPLAY, "pictures") + panels(ROOM, sizes, METHODS, "finals", "eval/visited_cells")


def coverage(name: str, runs: dict[str, str], *steps: int | None) -> tuple[Panel, ...]:
    """Coverage of a maze: maps after so many steps, a row for each of two methods, and curves."""
    maps = (panels(TASK, (name,), {m: GAN_BOTH[m]}, "pictures", "", step) for m in GAN_BOTH for step in steps)
    return sum(maps, ()) + panels(TASK, (name,), runs, "curves", "eval/coverage")


def trace_lengths(name: str) -> tuple[Panel, ...]:
    others = {f"{n} steps": f"{TRPO_RECALL} --trace-length {n}" for n in (5, 10, 20, 50) if n != TABLE_1[name]}
    return panels(TASK, (name,), {"TRPO": TRPO, "as in Table 1": TRPO_RECALL} | others)


def growth(size: int, budget: int) -> Panel:
    """A maze with 50 evaluations: the actor-critic gets all of the budget, the others, which are faster, half of it."""
    runs = {}
    for label, run in (METHODS | {"goal known": GOAL_KNOWN}).items():
        steps = 50_000 if run == GOAL_KNOWN else budget if run == NONE else budget // 2
        runs[label] = f"{run} --size {size} --total-timesteps {steps} --eval-every {steps // 50}"
    return Panel(f"{size} x {size}", runs, "growth")


EARLY = ("curves", "eval/return", 60_000)
MAZES = {11: 50_000, 15: 100_000, 19: 150_000, 25: 250_000, 31: 400_000, 41: 1_000_000}
FIGURES = {
    "fig2": PaperFigure("6.1", "Four rooms: recall traces against the actor-critic", panels(ROOM, (15, 19), BOTH)),
    "fig3": PaperFigure("6.2", "Four rooms: where the trained policies go", visits(11, 15)),
    "fig4": PaperFigure("6.2", "Four rooms: prioritized replay", panels(ROOM, (11, 15), METHODS, *EARLY)),
    "fig5": PaperFigure("6.3", "Ant in the U-maze: coverage", coverage(ANT, GAN_BOTH, None)),
    "fig6": PaperFigure("6.4", "MuJoCo: recall traces with TRPO", panels(TASK, TASKS, TRPO_BOTH)),
    "fig7": PaperFigure("6.5", "MuJoCo: recall traces with soft actor-critic", panels(TASK, TASKS, SAC_BOTH)),
    "fig8": PaperFigure("App. B", "MuJoCo: trace lengths with TRPO", sum(map(trace_lengths, TASKS), ())),
    "fig9": PaperFigure("App. D", "Four rooms: all sizes", panels(ROOM, (11, 13, 15, 19), MODELS)),
    "fig10": PaperFigure("App. D", "Four rooms: prioritized replay", visits(13) + panels(ROOM, (13,), METHODS)),
    "fig11": PaperFigure("App. D", "Point mass: coverage", coverage(POINT, GAN_MODELS, 200_000, 800_000, 1_500_000)),
    "fig12": PaperFigure("App. D", "Ant: coverage", coverage(ANT, GAN_BOTH, 1_250_000, 5_000_000, 10_000_000)),
    "fig13": PaperFigure("App. D", "U-mazes: coverage", coverage(POINT, GAN_BOTH) + coverage(ANT, GAN_BOTH)),
    "fig14": PaperFigure("App. F", "Four rooms: random backward actions", panels(ROOM, (15,), ACTIONS)),
    "fig15": PaperFigure("App. F", "MuJoCo: untrained model, soft actor-critic", panels(TASK, TASKS, SAC_MODELS)),
    "fig16": PaperFigure("App. G", "MuJoCo: other models, TRPO", panels(TASK, TASKS, TRPO_MODELS)),
    "fig17": PaperFigure("App. H", "Real updates : recall phases", panels(ROOM, (12, 14, 15), RATIOS, *EARLY)),
    "fig18": PaperFigure("App. H", "Real : recall updates (length)", panels(ROOM, (12, 14, 15), LENGTHS, *EARLY)),
    "fig19": PaperFigure("App. H", "MuJoCo: recall : SAC updates (length)", panels(TASK, TASKS[:2], SAC_RATIOS)),
    "slides": PaperFigure("slides", "HalfCheetah: clones of an expert", CLONE_PANELS),
    "point-mass": PaperFigure("ours", "Points in boxes", panels(BOX, range(2, 7), GAN_BOTH, "curves", "eval/coverage")),
    "sparse": PaperFigure("ours", "U-maze, TRPO, goals anywhere", panels(TASK, (FLAT,), SPARSE_RUNS)),
    "maze-size": PaperFigure("ours", "Four rooms: larger mazes", tuple(growth(*maze) for maze in MAZES.items())),
    "step-size": PaperFigure("ours", "Four rooms: RMSprop 2e-3 instead of 7e-4", panels(ROOM, (15, 19), STEP_SIZES)),
    "replay-updates": PaperFigure("ours", "PER: batches a phase", panels(ROOM, (11, 15), REPLAY_UPDATES, *EARLY)),
}


# ------------------------------------------------------------------------------------------------------ claims
class Claim(NamedTuple):
    """A claim as a number, of the interquartile means of settings, that has to be above a bound."""

    figure: str
    text: str
    settings: tuple[str, ...]
    number: str = "ratio"  # one of NUMBERS; failures: counts the seeds that fail
    statistic: str = "steps to success"


NUMBERS = {
    "ratio": lambda a, b: a / b,
    "difference": lambda a, b: a - b,
    "ratio of both ratios": lambda a, b, c, d: (a / b) / (c / d),
    "geometric mean of the ratios": lambda *means: gmean([a / b for a, b in zip(means[::2], means[1::2], strict=True)]),
}
# What is better, one of NUMBERS, and a statistic. MEAN and LEAD are about all panels at once.
STEPS, CELLS = ("fewer steps", "ratio", "steps to success"), ("more cells visited", "ratio", "last eval/visited_cells")
AT_LAST = ("more success at the end", "difference", "success at the end")
FAILURES = ("fewer failures at the end", "failures", "success at the end")
AREA = ("more area under the learning curve", "ratio", "mean eval/return")
MEAN = ("more area in the mean", "geometric mean of the ratios", "mean eval/return")
LAST = ("higher return", "difference", "last eval/return")
LEAD = ("fewer steps, the more so the larger the maze,", "ratio of both ratios", "steps to success")


def claim(figures: str, better: str, worse: str, kind: tuple[str, str, str], *titles: str) -> list[Claim]:
    """That one label is better than another, in each panel of the figures, or in those of some titles."""
    claims = []
    for figure in figures.split():
        runs = {panel.title: panel.runs for panel in FIGURES[figure].panels}
        for what, number, statistic in (AREA, MEAN) if kind == AREA and len(runs) > 1 else (kind,):
            a, b = (worse, better) if "fewer" in what else (better, worse)
            pairs = {title: (runs[title][a], runs[title][b]) for title in titles or runs}
            pairs = {", ".join(pairs): sum(pairs.values(), ())} if number in (MEAN[1], LEAD[1]) else pairs
            text = f"{better}: {what} than {worse}"
            claims += [Claim(figure, f"{text} ({title})", pair, number, statistic) for title, pair in pairs.items()]
    return claims


CLAIMS = (
    *claim("fig2 maze-size", "recall traces", "actor-critic", STEPS),
    *claim("fig2", "recall traces", "actor-critic", FAILURES, "19 x 19"),
    *claim("fig3 fig10", "recall traces", "PER", CELLS),
    *claim("fig3 fig10", "recall traces", "PER by TD error", CELLS),
    *claim("fig4", "PER", "actor-critic", STEPS, "11 x 11"),
    *claim("fig4 fig10 maze-size", "recall traces", "PER", STEPS),
    *claim("fig4 fig10 maze-size", "recall traces", "PER by TD error", STEPS),
    *claim("fig4 fig10", "PER by TD error", "PER", STEPS),
    *claim("fig4", "recall traces", "PER", LEAD, "15 x 15", "11 x 11"),
    *claim("fig9", "recall traces", "actor-critic", LEAD, "19 x 19", "11 x 11"),
    *claim("maze-size", "goal known", "actor-critic", STEPS),
    *claim("step-size", "goal known", "actor-critic, 2e-3", STEPS),
    *claim("fig11 fig12 fig13 point-mass", "recall traces", "Goal GAN", AREA),
    *claim("fig11", "recall traces", "Goal GAN", STEPS),
    *claim("fig11", "recall traces", "untrained model", STEPS),
    *claim("fig14", "recall traces", "random backward actions", STEPS),
    *claim("fig14", "recall traces", "random backward actions", AT_LAST),
    *claim("fig17", "1 : 1", "10 : 1", STEPS),
    *claim("fig18", "1 : 1 (25)", "1 : 20 (25)", STEPS, "12 x 12"),
    *claim("fig18", "1 : 20 (5)", "1 : 1 (25)", STEPS, "14 x 14", "15 x 15"),
    *claim("fig18", "1 : 20 (5)", "1 : 20 (25)", AT_LAST),
    *claim("fig6", "recall traces", "TRPO", AREA),
    *claim("fig7", "recall traces", "soft actor-critic", AREA),
    *claim("fig8", "as in Table 1", "5 steps", AREA),
    *claim("fig15 fig16", "recall traces", "untrained model", AREA),
    *claim("fig15", "untrained model", "soft actor-critic", AREA),
    *claim("fig16", "recall traces", "forward model", AREA),
    *claim("fig16", "TRPO", "forward model", AREA),
    *claim("fig16", "untrained model", "TRPO", AREA),
    *claim("sparse", "recall traces", "TRPO", AREA),
    *claim("sparse", "recall traces", "untrained model", AREA),
    *claim("fig19", "10 : 5 (20)", "5 : 5 (20)", AREA),
    *claim("fig19", "20 : 5 (10)", "20 : 5 (20)", AREA),
    *claim("slides", "expert", "BDM", LAST, "7 trajectories"),
    *claim("slides", "BDM_CL", "BDM", LAST, "7 trajectories"),
    *(c for label in CLONES if label != "CAT" for c in claim("slides", "CAT", label, LAST, "7 trajectories")),
    *claim("slides", "recall traces", "expert", LAST),
    *claim("slides", "recall traces", "untrained model", LAST, "50 steps of each"),
)


# ------------------------------------------------------------------------------------------------------ runs
class UsageError(ValueError):
    """A wrong argument, in one line that names its flag and what is accepted."""


class Run(NamedTuple):
    """One process: a script with its flags, and the folder where it writes. Figures that need the same run share it."""

    command: str
    folder: Path

    def next_command(self) -> list[str]:
        """What starts the run, or resumes it."""
        _, script, *flags = self.command.split()
        resume = (self.folder / "args.json").exists()
        return [script, "--resume", str(self.folder)] if resume else [script, *flags, "--run-dir", str(self.folder)]

    def check_version(self) -> None:
        """Raises UsageError if a default has changed since the run was started, so that its command means another."""
        _, script, *flags = self.command.split()
        today = asdict(tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags))
        then = json.loads((self.folder / "args.json").read_text())
        for name, value in json.loads(json.dumps(today, default=str)).items():
            if value not in (None, then.get(name)) and name != "run_dir":
                what = f"--{name.replace('_', '-')} was {then.get(name)} and is {value} now"
                raise UsageError(f"{self.folder} is of another version: {what}. Delete it, or take another --runs-dir")

    def read(self) -> EventAccumulator | None:
        """All that the run has logged, if it has come to its end."""
        if not (self.folder / "args.json").exists():
            return None
        events = EventAccumulator(str(self.folder), size_guidance={"scalars": 0, "images": 0}).Reload()
        script, total = self.command.split()[1], int(self.command.split("--total-timesteps ")[1].split()[0])
        try:
            tags = [events.Scalars("eval/return")]  # and pictures, but a point mass in a box has none
            tags += [events.Images(PICTURES[script])] if script in PICTURES and "PointMass" not in self.command else []
        except KeyError:  # not logged yet
            return None
        return events if min(tag[-1].step for tag in tags) >= total else None


def make_run(setting: str, seed: int, args: Args) -> Run:
    script, *flags = setting.split()
    of_scale = (ANT_MAZE if ANT in flags else SCALES[script])[args.scale].split()
    own, usual = (dict(zip(words[::2], words[1::2], strict=True)) for words in (flags, of_scale))
    pairs = own | usual | ({} if args.scale == "smoke" else own) | {"--seed": seed}  # a smoke run is short at any rate
    name = "_".join(f"{flag.removeprefix('--')}={value}" for flag, value in pairs.items())
    command = " ".join(("python", script, *(f"{flag} {value}" for flag, value in pairs.items())))
    return Run(command, args.runs_dir / script.removesuffix(".py") / name)


def figure_runs(name: str, args: Args) -> dict[tuple[str, int], Run]:
    """All runs of a figure, by setting and seed."""
    runs = {}
    for setting in (setting for panel in FIGURES[name].panels for setting in panel.runs.values()):
        seeds = args.seeds or (1 if args.scale == "smoke" else SEEDS.get(setting.split()[0], 5))
        runs |= {(setting, seed): make_run(setting, seed, args) for seed in range(1, seeds + 1)}
    return runs


def origin() -> dict[str, str]:
    """What a result depends on beside its command."""
    commands = ("git describe --always --dirty", "sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1")
    options = {"shell": True, "cwd": ROOT, "capture_output": True, "text": True}
    commit, cpu = (subprocess.run(command, **options).stdout.strip() or "unknown" for command in commands)
    packages = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "gymnasium", "mujoco"))
    versions = "; ".join((f"python {sys.version.split()[0]}", *packages))
    return {"commit": commit, "machine": f"{os.cpu_count()} cores of {cpu}", "versions": versions}


def execute(run: Run, processes: list[subprocess.Popen]) -> str:
    """Starts or resumes a run, unless it is finished, and waits for its end; returns a line if it failed."""
    if run.read() is not None:
        return ""
    script, *flags = run.next_command()
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    if "--resume" not in flags:
        Path(f"{run.folder}.json").write_text(json.dumps(origin(), indent=4))
    with open(f"{run.folder}.log", "a+") as log:
        command, env = [sys.executable, str(ROOT / script), *flags], os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(process := subprocess.Popen(command, stdout=log, stderr=log, env=env))
        status = process.wait()
        log.seek(0)
        last_line = ([*log] or [""])[-1].strip()
    return f"{shlex.join((script, *flags))}: exit status {status}: {last_line}" if status else ""


def execute_all(runs: list[Run], args: Args) -> int:
    """Executes all runs, here or as one Slurm job array, --workers at a time; returns how many failed."""
    failures, processes, finished = 0, [], as_completed
    if args.engine == "slurm":
        submitit = importlib.import_module("submitit")
        pool, finished = submitit.AutoExecutor(args.runs_dir / "slurm", cluster="slurm"), submitit.helpers.as_completed
        pool.update_parameters(cpus_per_task=1, timeout_min=24 * 60, slurm_array_parallelism=args.workers)
        futures = pool.map_array(execute, runs, [[] for _ in runs])
    else:
        pool = ThreadPoolExecutor(args.workers)
        futures = [pool.submit(execute, run, processes) for run in runs]
    try:
        for future in tqdm(finished(futures), total=len(runs), unit=" runs", disable=None):
            if report := future.exception() or future.result():  # one run does not stop the others
                tqdm.write(str(report), file=sys.stderr)
                failures += 1
    except KeyboardInterrupt:
        for future in futures:
            future.cancel()
        while args.engine == "local" and not all(future.done() for future in futures):
            for process in processes:
                process.terminate()  # its last checkpoint stays
            time.sleep(0.1)
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    return failures


def make_dataset(runs: list[Run], args: Args) -> None:
    """What clones learn from, unless it is there: seven episodes of EXPERT, which is trained if it has to be."""
    dataset = SCALES["recall_bc.py"][args.scale].split()[1]
    if args.plot_only or not any(dataset in run.command for run in runs) or dataset in minari.list_local_datasets():
        return
    expert = make_run(EXPERT, 1, args if args.scale == "smoke" else replace(args, scale="laptop"))
    record = ["inspect_run.py", str(expert.folder), "--record-dataset", dataset, "--episodes", "7"]
    if args.dry_run:
        print("before all others: python", *expert.next_command(), "; python", *record, file=sys.stderr)
    elif report := execute(expert, []):
        raise RuntimeError(report)
    elif subprocess.run([sys.executable, ROOT / record[0], *record[1:]], stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"no dataset was recorded: {shlex.join(record)}")


# ------------------------------------------------------------------------------------------------------ data
KEYS = ["setting", "seed", "step"]


def read_tables(folder: Path) -> list[pd.DataFrame]:
    """data.csv and runs.csv of a figure, without rows if there are none."""
    if not (folder / "data.csv").exists():
        return [pd.DataFrame(index=pd.MultiIndex.from_arrays([[]] * n, names=KEYS[:n])) for n in (3, 2)]
    try:
        data = pd.read_csv(folder / "data.csv", index_col=KEYS).astype(float)
        runs = pd.read_csv(folder / "runs.csv", index_col=KEYS[:2], dtype={"commit": str})
        return [data, runs.loc[data["eval/return"].index.droplevel("step").unique()]]
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(f"--results-dir: {folder} is damaged, it can be deleted: {error}".splitlines()[0]) from None


def by_setting(data: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each setting what it has logged, by seed and step."""
    return {s: table.droplevel("setting").dropna(axis=1, how="all") for s, table in data.groupby("setting", sort=False)}


def rows(key: tuple[str, int], run: Run, events: EventAccumulator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of a run for data.csv and for runs.csv."""
    tags = sorted(tag for tag in events.Tags()["scalars"] if tag.startswith("eval/"))
    data = pd.DataFrame({tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags})
    data.index = pd.MultiIndex.from_tuples([(*key, step) for step in data.index], names=KEYS)
    made = Path(f"{run.folder}.json")  # there is none if the run was started by hand
    made = json.loads(made.read_text()) if made.exists() else {"commit": "unknown", "machine": "?", "versions": "?"}
    return data, pd.DataFrame({"command": run.command} | made, pd.MultiIndex.from_tuples([key], names=KEYS[:2]))


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    path.with_name(f"new_{path.name}").write_bytes(content)
    path.with_name(f"new_{path.name}").replace(path)


def make_figure(name: str, args: Args) -> bool:
    """Adds the rows of the runs that have finished since, and draws; whether all runs of the figure are there."""
    folder, wanted = args.results_dir / name, figure_runs(name, args)
    tables = read_tables(folder)
    lacking = {key: run for key, run in wanted.items() if key not in tables[1].index}
    new = {key: events for key, run in lacking.items() if (events := run.read()) is not None}
    if missing := [run.folder for key, run in lacking.items() if key not in new]:
        print(f"{name}: {len(missing)} runs are not finished, the first is {missing[0]}", file=sys.stderr)
    if new:
        order = {setting: i for i, (setting, _) in enumerate(wanted)}
        added = (rows(key, wanted[key], events) for key, events in new.items())
        for i, parts in enumerate(zip(tables, *added, strict=True)):
            tables[i] = pd.concat(parts).sort_index(key=lambda k: k.map(order) if k.name == "setting" else k)
        if any(table["eval/return"].unstack().isna().any(axis=None) for table in by_setting(tables[0]).values()):
            print(f"{name}: new runs have other steps than {folder}, take another --results-dir", file=sys.stderr)
            return False
        folder.mkdir(exist_ok=True)
        write(folder / "runs.csv", tables[1].to_csv(lineterminator="\n").encode())
        write(folder / "data.csv", tables[0].to_csv(float_format="%.6g", lineterminator="\n").encode())
        tables = read_tables(folder)  # with the numbers as they are written
    curves, images = by_setting(tables[0]), {}
    shown = (setting for panel in FIGURES[name].panels if panel.kind == "pictures" for setting in panel.runs.values())
    for setting in (shown := curves.keys() & shown):
        read = {key[1]: new.get(key) or run.read() for key, run in wanted.items() if key[0] == setting}
        if seeds := [seed for seed, events in read.items() if events is not None]:
            seed = typical_seed(curves[setting], seeds)
            pictures = read[seed].Images(PICTURES[setting.split()[0]])
            images[setting] = seed, {event.step: event.encoded_image_string for event in pictures}
    if without := sorted(shown - images.keys()):
        print(f"{name}: the picture stays as it is, as the run folders of {without[0]} are gone", file=sys.stderr)
    elif curves:
        draw_figure(FIGURES[name], curves, images).savefig(picture := io.BytesIO(), dpi=110)
        write(folder / f"{name}.png", picture.getvalue())
        print(f"{name}: {folder / f'{name}.png'}")
    return not missing


# ------------------------------------------------------------------------------------------------------ statistics
interquartile_mean = partial(trim_mean, proportiontocut=0.25, axis=0)  # of the middle half of the seeds


def interval(*samples, statistic=interquartile_mean, resamples: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of a statistic of samples whose last axis are the seeds, each resampled on its own."""
    if min(sample.shape[-1] for sample in samples) < 2:
        return (statistic(*samples, axis=-1),) * 2
    options = {"n_resamples": resamples, "vectorized": True, "method": "percentile", "rng": 0, "axis": -1}
    with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):
        found = bootstrap(samples, statistic, **options)
    return found.confidence_interval.low, found.confidence_interval.high


def statistics(setting: pd.DataFrame) -> pd.DataFrame:
    """The numbers by which a setting is judged, a row for each seed; success is a success rate or coverage of 0.9."""
    curves = {tag: setting[tag].unstack("step") for tag in setting}  # (seeds, evaluations)
    found = pd.DataFrame({f"last {tag}": curve.iloc[:, -1] for tag, curve in curves.items()})
    found["mean eval/return"] = curves["eval/return"].mean(axis=1)
    rates = curves.get("eval/success_rate", curves.get("eval/coverage"))
    if rates is not None:
        steps, success = rates.columns.to_numpy(float), rates.to_numpy() >= 0.9
        from_here_on = rates.to_numpy()[:, ::-1].cumsum(axis=1)[:, ::-1] / np.arange(len(steps), 0, -1)
        for name, reached in (("success", success), ("lasting success", success & (from_here_on >= 0.9))):
            found[f"steps to {name}"] = np.where(reached.any(1), steps[reached.argmax(1)], steps[-1])  # or all steps
        found["succeeds"] = success.any(axis=1)
        found["success at the end"] = rates.iloc[:, -max(1, len(steps) // 10) :].mean(axis=1)
    return found


def typical_seed(setting: pd.DataFrame, among: list[int]) -> int:
    """Which of some seeds is nearest to the interquartile mean of cells visited or, if not counted, of all returns."""
    found = statistics(setting)
    values = found.get("last eval/visited_cells", found["mean eval/return"])
    return (values - interquartile_mean(values)).abs().loc[among].idxmin()


# ------------------------------------------------------------------------------------------------------ pictures
# Okabe and Ito's colours, which colour-blind readers can tell apart. Recall traces have one of their own.
BLUE, COLOURS = "#0072b2", ("#000000", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#888888", "#f0e442")
DASHES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (6, 2, 1, 2)), (0, (1, 1.5)))  # to see the lines below
LABELS = {"eval/return": "return of the greedy policy", "eval/visited_cells": "cells visited"}


def draw_curves(axes, panel: Panel, found: dict, colours: dict[str, str]) -> None:
    """Every seed of a tag against steps, and their interquartile mean with its interval."""
    for (label, _), setting in found.items():
        curve, dashes = setting[panel.tag].unstack("step"), DASHES[[*colours].index(label) % len(DASHES)]
        thousands, values, colour = curve.columns / 1000, curve.to_numpy(), colours[label]
        axes.plot(thousands, values.T, color=colour, lw=0.5, alpha=0.15)
        axes.fill_between(thousands, *interval(values.T), color=colour, alpha=0.2, lw=0)
        axes.plot(thousands, interquartile_mean(values), color=colour, lw=2.2, ls=dashes, label=label)
    axes.set(xlabel="environment steps (thousands)", ylabel=LABELS.get(panel.tag, "coverage"), title=panel.title)
    axes.set_xlim(right=min((panel.until or np.inf) / 1000, axes.get_xlim()[1]))
    axes.locator_params(axis="x", nbins=6)


def draw_finals(axes, panel: Panel, found: dict, colours: dict[str, str]) -> None:
    """The last value of a tag for every seed, and their interquartile mean with its interval."""
    for i, ((label, _), setting) in enumerate(found.items()):
        values = statistics(setting)[f"last {panel.tag}"].to_numpy()
        (low, high), mean, style = interval(values), interquartile_mean(values), {"color": colours[label]}
        axes.scatter(i + np.linspace(-0.15, 0.15, len(values)), values, alpha=0.4, s=20, **style)
        axes.errorbar(i, mean, [[mean - low], [high - mean]], fmt="_", ms=22, mew=3, capsize=6, **style)
    names = [label.replace(" ", "\n", 1) for label, _ in found]
    axes.set_xticks(range(len(found)), names, rotation=90 * (len(found) > 5))
    axes.set(ylabel=LABELS[panel.tag], xlim=(-0.5, len(found) - 0.5), title=panel.title)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def draw_growth(axes, panel: Panel, found: dict, colours: dict[str, str]) -> None:
    """Steps to success against the size of the maze, a line for each method."""
    for i, (method, colour) in enumerate(colours.items()):
        tables = {int(title.split()[0]): s for (label, title), s in found.items() if label == method}
        steps = [statistics(setting)["steps to success"].to_numpy() for setting in tables.values()]
        axes.plot([*tables], [*map(interquartile_mean, steps)], color=colour, lw=2.2, marker="o", ms=5, label=method)
        axes.fill_between([*tables], *zip(*map(interval, steps), strict=True), color=colour, alpha=0.2, lw=0)
        for size, setting in tables.items():
            failed = int((~statistics(setting)["succeeds"]).sum())
            axes.text(1.03 * size, setting.index[-1][1] / 1.4**i, f"x{failed}" if failed else "", color=colour)
    sizes = sorted({int(title.split()[0]) for _, title in found})
    axes.set(xscale="log", yscale="log", xlabel="size of the maze", ylabel="steps to the first success")
    axes.set_xticks(sizes, sizes)
    axes.set_xticks([], minor=True)


def draw_pictures(axes, panel: Panel, found: dict, colours: dict[str, str]) -> None:
    """What one seed has drawn, at last or until a step."""
    (((label, _), (seed, pictures)),) = found.items()
    last = max(step for step in pictures if step <= (panel.until or np.inf))
    axes.imshow(Image.open(io.BytesIO(pictures[last])))
    axes.set_title(f"{label}, {panel.title}, seed {seed}", fontsize=13)
    axes.axis("off")


def draw_figure(figure: PaperFigure, curves: dict[str, pd.DataFrame], images: dict[str, tuple]):
    """All panels of a figure that have runs."""
    labels = dict.fromkeys(label for panel in figure.panels if panel.kind != "pictures" for label in panel.runs)
    others = [label for label in labels if label != "recall traces"]
    colours = dict.fromkeys(labels, BLUE) | dict(zip(others, COLOURS, strict=False))
    boxes = {}
    for i, panel in enumerate(figure.panels):
        given = images if panel.kind == "pictures" else curves
        for label in (label for label, setting in panel.runs.items() if setting in given):
            key = {"pictures": (i, label), "growth": "all sizes"}.get(panel.kind, i)
            boxes.setdefault(key, (panel, {}))[1][label, panel.title] = given[panel.runs[label]]
    across = 2 if len(boxes) == 4 and not images else min(len(boxes), 3)
    down = -(-len(boxes) // across)
    draw = {"curves": draw_curves, "finals": draw_finals, "growth": draw_growth, "pictures": draw_pictures}
    with matplotlib.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        drawing = matplotlib.figure.Figure(figsize=(max(4.6 * across, 7), 3.8 * down + 0.5), layout="constrained")
        legend = {}
        for i, (panel, found) in enumerate(boxes.values()):
            axes = drawing.add_subplot(down, across, i + 1)
            draw[panel.kind](axes, panel, found, colours)
            legend |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if legend:
            columns = min(len(legend), int(11 * drawing.get_figwidth() // (max(map(len, legend)) + 7)))
            drawing.legend(legend.values(), legend, loc="outside upper center", ncols=columns, frameon=False)
    return drawing


# ------------------------------------------------------------------------------------------------------ verdicts
def judge(claim: Claim, curves: dict[str, pd.DataFrame]) -> list[str]:
    """What came out, the seeds, and the verdict."""
    found = [statistics(curves[setting]) for setting in claim.settings]
    fewest, above, no_ratio = min(map(len, found)), 0 if claim.number in ("difference", "failures") else 1, False
    if claim.number == "failures":
        failed = [int((table["success at the end"] < 0.9).sum()) for table in found]
        counts = [(count, len(table) - count) for count, table in zip(failed, found, strict=True)]
        p = fisher_exact(counts, alternative="greater").pvalue
        low, high = p < 0.05, 1  # one-sided: it holds or no difference is shown
        ours = f"{failed[0]} against {failed[1]} seeds fail at the end; p = {p:.2f} (Fisher's exact test)"
    else:
        samples = [table[claim.statistic].to_numpy() for table in found]

        def number(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
            return NUMBERS[claim.number](*(interquartile_mean(sample, axis=axis) for sample in samples))

        (low, high), means = interval(*samples, statistic=number, resamples=50_000), [*map(interquartile_mean, samples)]
        no_ratio = claim.number != "difference" and min(means) <= 0
        two = " / ".join(f"{mean:,.0f}" if mean >= 1000 else f"{mean:.4g}" for mean in means) if len(means) == 2 else ""
        ours = f"{claim.statistic}{': ' if two else ''}{two}; "
        ours += f"no {claim.number}" if no_ratio else f"{claim.number} {number(*samples):.2f}"
        ours += f" [{low:.2f}, {high:.2f}]" if fewest > 2 and not no_ratio else ""
        ours += f"; P = {np.heaviside(np.subtract.outer(*samples), 0.5).mean():.2f}" if two else ""
    verdict = "holds" if low > above else "the reverse holds" if high < above else "no difference shown"
    verdict = "too few seeds" if fewest < 5 else "no ratio: a mean is not positive" if no_ratio else verdict
    if any({*a.index} != {*b.index} for a, b in zip(found[::2], found[1::2], strict=True)):
        verdict = "incomplete: not all seeds have finished"
    return ours, ", ".join(dict.fromkeys(str(len(table)) for table in found)), f"**{verdict}**"


def slides_table(curves: dict[str, pd.DataFrame]) -> list[str]:
    """Returns of the clones beside those of the slides."""
    lines = ["| data | clone of | slides | ours | seeds |", "|---|---|---|---|---|"]
    for panel, slides in zip(CLONE_PANELS, (SLIDES, {}), strict=True):
        for label, setting in panel.runs.items():
            if setting in curves:
                values = statistics(curves[setting])["last eval/return"].to_numpy()
                ours = "{:,.0f} [{:,.0f}, {:,.0f}]".format(interquartile_mean(values), *interval(values))
                lines.append(f"| {panel.title} | {label} | {slides.get(label, '')} | {ours} | {len(values)} |")
    return [*lines, ""]


def write_verdicts(results_dir: Path) -> None:
    """results/README.md: what the paper claims and what came out here, and all figures."""
    tables = {name: read_tables(results_dir / name) for name in FIGURES if (results_dir / name / "data.csv").exists()}
    curves = {name: by_setting(data) for name, (data, _) in tables.items()}
    found, waiting, certain = [], [], ("**holds**", "**the reverse holds**", "**no difference shown**", "")
    for claim in sorted(CLAIMS, key=lambda claim: [*FIGURES].index(claim.figure)):
        if {*claim.settings} <= curves.get(claim.figure, {}).keys():
            ours = " | ".join(judge(claim, curves[claim.figure]))
            found.append(f"| [{claim.figure}](#{claim.figure}) | {claim.text} | {ours} |")
        else:
            waiting.append(f"- {claim.figure}: {claim.text}")
    lines = ["# Paper against ours\n\nHow to read this is in docs/results.md. What is certain comes first.\n"]
    lines += ["| figure | claim | ours | seeds | verdict |", "|---|---|---|---|---|"]
    lines += sorted(found, key=lambda line: [verdict in line for verdict in certain].index(True))
    lines += ["\nNot run yet:\n", *waiting] if waiting else []
    for name, (_, runs) in tables.items():
        made = runs.groupby(["commit", "machine"], sort=False).size().items()
        made = "; ".join(f"{count} at {commit} on {machine}" for (commit, machine), count in made)
        title, command = FIGURES[name].title, f"python reproduce.py {name} --seeds {runs.index.levels[1].max()}"
        lines += [f"\n## {name}\n\n{title} ({FIGURES[name].place}). `{command}`\n"]
        lines += slides_table(curves[name]) if name == "slides" else []
        lines += [f"![{name}]({name}/{name}.png)\n\nRuns: {made}. [data]({name}/data.csv), [runs]({name}/runs.csv)"]
    write(results_dir / "README.md", ("\n".join(lines) + "\n").encode())


# ------------------------------------------------------------------------------------------------------ main
def check(args: Args) -> Args:
    """The arguments with all figures and the folder of the results. Raises UsageError for one that is out of range."""
    results_dir = args.results_dir or Path("results", "" if args.scale == "laptop" else args.scale)
    args = replace(args, figures=args.figures or tuple(FIGURES), results_dir=results_dir)
    if unknown := [name for name in args.figures if name not in FIGURES]:
        raise UsageError(f"figures must be among {', '.join(FIGURES)}, got {unknown[0]}")
    for flag, value in (("seeds", args.seeds), ("workers", args.workers)):
        if value is not None and value < 1:
            raise UsageError(f"--{flag} must be at least 1, got {value}")
    for folder in () if args.dry_run else (args.runs_dir, results_dir):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    for name in FIGURES:
        _, runs = read_tables(results_dir / name)
        for key, command in runs.get("command", {}).items() if name in args.figures else ():
            if make_run(*key, args).command != command:
                where = f"delete {results_dir / name}, or take another --results-dir"
                raise UsageError(f"{name} was made by other commands than those of today: {where}. One was {command}")
    return args


def main(args: Args) -> int:
    """Makes the figures; returns the exit status."""
    if args.list:
        print(*(f"{name:14} {figure.place:7} {figure.title}" for name, figure in FIGURES.items()), sep="\n")
        return 0
    args = check(args)
    there = {name: read_tables(args.results_dir / name)[1].index for name in args.figures}
    runs = [run for name in args.figures for key, run in figure_runs(name, args).items() if key not in there[name]]
    for run in (run for run in runs if (run.folder / "args.json").exists()):
        run.check_version()
    runs = [run for run in dict.fromkeys(runs) if run.read() is None]
    make_dataset(runs, args)
    if args.dry_run:
        sys.stdout.writelines(f"{shlex.join(('python', *run.next_command()))}\n" for run in runs)
        return 0
    failures = execute_all(runs, args) if runs and not args.plot_only else 0
    with FileLock(args.results_dir / "lock"):  # figures are written by one at a time
        complete = [make_figure(name, args) for name in args.figures]
        write_verdicts(args.results_dir)
    return 0 if all(complete) and not failures else 1


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except (UsageError, OSError, ImportError, RuntimeError, KeyboardInterrupt) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
