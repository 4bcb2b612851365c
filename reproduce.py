# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "filelock==4.3.1",
#     "gymnasium==1.4.0",
#     "imageio==2.38.1",
#     "matplotlib==3.11.2",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "pillow==13.0.0",
#     "scipy==1.17.1",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Makes the figures of the paper again: runs the scripts over many seeds, reads their curves, draws, and judges.

    python reproduce.py fig2                       # one figure, with all runs that it needs: results/fig2
    python reproduce.py --scale smoke              # every figure with tiny runs, in minutes: results/smoke
    python reproduce.py --list                     # what there is
    python reproduce.py fig2 --dry-run | xargs -P 16 -I {} sh -c "{}"    # run it your own way, then
    python reproduce.py fig2 --plot-only

Runs live in runs/reproduce, and figures share them. Interrupt it whenever you like: the next start keeps the runs that
are finished and resumes the others.
"""

import csv
import fcntl
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TextIO

import matplotlib
import matplotlib.ticker
import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import DegenerateDataWarning, bootstrap, fisher_exact, gmean, trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports what a resumed run logs anew


@dataclass
class Args:
    figures: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """figures to make, such as fig2 fig4; all that can be made if none is given"""
    list: bool = False
    """list all figures of the paper, and stop"""
    dry_run: bool = False
    """print the commands of all runs that are left, one a line, and stop"""
    plot_only: bool = False
    """start no run, draw what the finished ones give"""
    extend: bool = False
    """keep the numbers of data.csv, whichever version made them, and run what it lacks; pictures need run folders"""
    scale: Literal["smoke", "laptop", "paper"] = "laptop"
    """length of the runs; smoke: tiny, to see that all works; laptop: hours on 2 cores; paper: the paper's budget"""
    seeds: int | None = None
    """seeds of each setting, from 1 on; if not given, 1 for smoke, else 10, on MuJoCo 5, with Goal GAN 3 or 5"""
    workers: int = os.cpu_count() or 1
    """runs at a time, each with one torch thread"""
    engine: Literal["local", "slurm"] = "local"
    """slurm: submit the runs as one job array, --workers of them at a time (pip install submitit; shared folders)"""
    runs_dir: Path = Path("runs/reproduce")
    """folder of the runs"""
    results_dir: Path | None = None
    """folder of the figures; if not given, results for --scale laptop, else results/smoke or results/paper"""


# ------------------------------------------------------------------------------------------------------ figures

# Flags of each script at each scale. Four rooms are solved so fast that a laptop makes them at full length.
FOUR_ROOMS = {
    "smoke": "--total-timesteps 1000 --eval-every 250",
    "laptop": "--total-timesteps 100000",
    "paper": "--total-timesteps 100000",
}
# The laptop's networks and batches are those of the first version of soft actor-critic, a quarter of today's.
SOFT_ACTOR_CRITIC = {
    "smoke": "--total-timesteps 1200 --learning-starts 1000 --recall-every 100 --eval-every 600 --eval-episodes 1",
    "laptop": "--total-timesteps 60000 --hidden 128 --batch-size 128",
    "paper": "--total-timesteps 1000000",
}
# The paper's batch, KL bound and discount are those of Nagabandi et al. (2017).
TRUST_REGION = {
    "smoke": "--total-timesteps 4096 --num-envs 2 --num-steps 512 --recall-until 1 --eval-every 2048 --eval-episodes 1",
    "laptop": "--total-timesteps 500000 --eval-every 25000 --eval-episodes 5",
    "paper": "--total-timesteps 2000000 --num-envs 16 --num-steps 3125 --max-kl 0.05 --gamma 0.995 --recall-every 5 "
    "--recall-until 1 --eval-every 50000",
}
# 40 outer iterations for a point mass.
GOAL_GAN = {
    "smoke": "--total-timesteps 2000 --num-envs 20 --num-steps 50 --inner-iterations 1 --num-goals 20 "
    "--label-rollouts 1 --gan-updates 10 --eval-episodes 1",
    "laptop": "--total-timesteps 4000000",
    "paper": "--total-timesteps 4000000",
}
# 40 outer iterations with half of Goal GAN's batch for the ant; at the paper's scale 155.
GOAL_GAN_ANT = GOAL_GAN | {
    "laptop": "--total-timesteps 10000000 --num-envs 100",
    "paper": "--total-timesteps 77500000",
}
SCALES = {
    "recall_a2c_fourroom.py": FOUR_ROOMS,
    "per_a2c_fourroom.py": FOUR_ROOMS,
    "recall_sac.py": SOFT_ACTOR_CRITIC,
    "recall_trpo.py": TRUST_REGION,
    "recall_goalgan_ant.py": GOAL_GAN,
}

NONE = "recall_a2c_fourroom.py --recall none"
RECALL = "recall_a2c_fourroom.py --recall true"
GOAL_KNOWN = f"{RECALL} --start-states goal"
RANDOM = "recall_a2c_fourroom.py --recall random"
LEARNED = "recall_a2c_fourroom.py --recall learned"
PER = "per_a2c_fourroom.py --priority return"
TD_ERROR = "per_a2c_fourroom.py --priority td-error"
SAC_NONE = "recall_sac.py --recall none"
SAC_RANDOM = "recall_sac.py --recall random"
SAC_LEARNED = "recall_sac.py --recall learned"
TRPO_NONE = "recall_trpo.py --recall none"
TRPO_RANDOM = "recall_trpo.py --recall random"
TRPO_FORWARD = "recall_trpo.py --recall forward"
TRPO_LEARNED = "recall_trpo.py --recall learned"
GAN_NONE = "recall_goalgan_ant.py --recall none"
GAN_RANDOM = "recall_goalgan_ant.py --recall random"
GAN_LEARNED = "recall_goalgan_ant.py --recall learned"


class Panel(NamedTuple):
    """One panel: what is drawn, and the script and flags behind each label of its legend."""

    title: str
    runs: dict[str, str]
    # curves: tag against steps; finals: its last values; pictures: of a seed; growth: steps to success against the size
    kind: Literal["curves", "finals", "pictures", "growth"] = "curves"
    tag: str = "eval/return"
    until: float | None = None  # last environment step that is drawn; of pictures, only the last up to then


class PaperFigure(NamedTuple):
    place: str  # in the paper, or ours
    title: str
    panels: tuple[Panel, ...]
    note: str = ""  # how to read it
    seeds: int = 10  # of each setting, if --seeds does not say


PERS = {"PER": PER, "PER by TD error": TD_ERROR}
METHODS = {"actor-critic": NONE} | PERS | {"recall traces": RECALL}


def rooms(size: int, runs: dict[str, str], *kind_and_tag: str, until: float | None = None) -> Panel:
    runs = {label: f"{command} --size {size}" for label, command in runs.items()}
    return Panel(f"{size} x {size}", runs, *kind_and_tag, until=until)


def tasks(names: tuple[str, ...], runs: dict[str, str], *kind_and_tag: str) -> tuple[Panel, ...]:
    return tuple(
        Panel(name, {label: f"{command} --env-id {name}" for label, command in runs.items()}, *kind_and_tag)
        for name in names
    )


def trace_lengths(name: str) -> tuple[Panel, ...]:
    """TRPO with shorter and longer traces than those of Table 1, which are the default."""
    flags = {f"{n} steps": "" if n == TABLE_1[name] else f" --trace-length {n}" for n in (5, 10, 20, 50)}
    return tasks((name,), {"TRPO": TRPO_NONE} | {label: TRPO_LEARNED + flag for label, flag in flags.items()})


def visits(*sizes: int) -> tuple[Panel, ...]:
    maps = [rooms(size, PERS | {"recall traces": RECALL}, "pictures", "pictures/visits") for size in sizes]
    return *maps, *(rooms(size, METHODS, "finals", "eval/visited_cells") for size in sizes)


ONCE = f"{RECALL} --recall-updates 1 --trace-length 25"
RATIOS = {"1 : 1": ONCE, "5 : 1": f"{ONCE} --recall-every 5", "10 : 1": f"{ONCE} --recall-every 10"}
LENGTHS = {"1 : 1 (25)": ONCE} | {
    f"1 : {n} ({length})": f"{RECALL} --recall-updates {n} --trace-length {length}"
    for n, length in ((5, 25), (5, 10), (20, 25), (20, 5))
}

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")
MODELS = {"soft actor-critic": SAC_NONE, "untrained model": SAC_RANDOM, "recall traces": SAC_LEARNED}
# As in the paper, so many updates from recall traces for 5 of soft actor-critic; there are 200 between recall phases.
SAC_RATIOS = {"soft actor-critic": SAC_NONE} | {
    f"{n} : 5 ({length})": f"{SAC_LEARNED} --recall-updates {40 * n} --trace-length {length}"
    for n, length in ((5, 20), (10, 20), (20, 20), (20, 10))
}
TRPO_MODELS = {"TRPO": TRPO_NONE, "untrained model": TRPO_RANDOM, "forward model": TRPO_FORWARD}
TRPO_MODELS |= {"recall traces": TRPO_LEARNED}
TABLE_1 = {"HalfCheetah-v5": 20, "Hopper-v5": 10, "Walker2d-v5": 20, "Ant-v5": 50}
SHORT_TRACES = f"{TRPO_LEARNED} --trace-length 5"
GOALS = {"Goal GAN": GAN_NONE, "recall traces": GAN_LEARNED}
GOAL_MODELS = {"Goal GAN": GAN_NONE, "untrained model": GAN_RANDOM, "recall traces": GAN_LEARNED}
COVERAGE_CURVES, COVERAGE_MAPS = ("curves", "eval/coverage"), ("pictures", "pictures/coverage")


def heat_maps(name: str, *steps: int) -> tuple[Panel, ...]:
    """Coverage of a maze after so many steps, a row for each method."""
    return tuple(
        Panel(name, {label: f"{command} --env-id {name}"}, *COVERAGE_MAPS, until)
        for label, command in GOALS.items()
        for until in steps
    )


# What Goal GAN's code sets for points in boxes.
POINT_MASSES = tuple(
    Panel(
        f"{dims} dimensions",
        {
            label: f"{command} --env-id PointMass-v0 --dims {dims} --gamma 0.995 --hidden 32 --gan-updates 100"
            for label, command in GOALS.items()
        },
        tag="eval/coverage",
    )
    for dims in range(2, 7)
)

# The larger the maze, the more steps the plain actor-critic gets; the others, which are faster, get half of them.
MAZES = {11: 50_000, 15: 100_000, 19: 150_000, 25: 250_000, 31: 400_000, 41: 1_000_000}


def in_maze(command: str, size: int) -> str:
    """The command with a budget for a maze of that size, and with 50 evaluations."""
    budget = 50_000 if command == GOAL_KNOWN else MAZES[size] if command == NONE else MAZES[size] // 2
    return f"{command} --size {size} --total-timesteps {budget} --eval-every {budget // 50}"


GROWTH = METHODS | {"recall traces, goal known": GOAL_KNOWN}
STEP_SIZES = {"actor-critic": NONE, "recall traces": RECALL, "recall traces, goal known": GOAL_KNOWN}
STEP_SIZES |= {f"{label}, 2e-3": f"{command} --learning-rate 2e-3" for label, command in STEP_SIZES.items()}
REPLAY_UPDATES = {"PER, 1": f"{PER} --replay-updates 1", "PER, 4": f"{PER} --replay-updates 4", "PER, 16": PER}
REPLAY_UPDATES |= {"actor-critic": NONE, "recall traces": RECALL}

FIGURES = {
    "fig2": PaperFigure(
        "section 6.1",
        "Four rooms: recall traces against the actor-critic",
        tuple(rooms(size, {"actor-critic": NONE, "recall traces": RECALL}) for size in (15, 19)),
    ),
    "fig3": PaperFigure(
        "section 6.2",
        "Four rooms: where the trained policies go",
        visits(11, 15),
        note="The trained policies act by sampling, and visit the fewer cells the longer they have been sharpened. PER "
        "by TD error is down to one shortest way, as the paper says of PER. Of the others, the sooner one solved the "
        "maze, the fewer cells it visits in the end: recall traces, the first, no more than PER by return.",
    ),
    "fig4": PaperFigure(
        "section 6.2",
        "Four rooms: recall traces against prioritized replay",
        (rooms(11, METHODS, until=40_000), rooms(15, METHODS)),
        note="Drawn are, at 11 x 11, the first 40 000 of 100 000 steps.",
    ),
    "fig5": PaperFigure(
        "section 6.3",
        "U-maze ant: coverage heat maps",
        (
            *tasks(("AntUMaze-v0",), GOALS, *COVERAGE_MAPS),
            *tasks(("AntUMaze-v0",), GOALS, *COVERAGE_CURVES),
        ),
        note="With --scale laptop an outer iteration is 250 000 steps, half of Goal GAN's.",
        seeds=3,
    ),
    "fig6": PaperFigure(
        "section 6.4",
        "MuJoCo: recall traces with TRPO",
        tasks(TASKS, {"TRPO": TRPO_NONE, "recall traces": TRPO_LEARNED}),
        seeds=5,
    ),
    "fig7": PaperFigure(
        "section 6.5",
        "MuJoCo: recall traces with soft actor-critic",
        tasks(TASKS, {"soft actor-critic": SAC_NONE, "recall traces": SAC_LEARNED}),
        seeds=5,
    ),
    "fig8": PaperFigure("App. B", "MuJoCo: trace lengths with TRPO", sum(map(trace_lengths, TASKS), ()), seeds=5),
    "fig9": PaperFigure(
        "App. D",
        "Four rooms: all sizes",
        tuple(
            rooms(size, {"actor-critic": NONE, "recall traces": RECALL, "both learned": LEARNED}, until=until)
            for size, until in ((11, 40_000), (13, 60_000), (15, None), (19, None))
        ),
        note="Drawn are the first 40 000 of 100 000 steps at 11 x 11, the first 60 000 at 13 x 13.",
    ),
    "fig10": PaperFigure(
        "App. D",
        "Four rooms: recall traces against prioritized replay, 13 x 13",
        (*visits(13), rooms(13, METHODS)),
    ),
    "fig11": PaperFigure(
        "App. D",
        "Point mass in the U-maze: coverage heat maps",
        (
            *heat_maps("PointUMaze-v0", 200_000, 800_000, 1_500_000),
            *tasks(("PointUMaze-v0",), GOAL_MODELS, *COVERAGE_CURVES),
        ),
        note="An outer iteration is 100 000 steps. The paper shows no untrained model.",
        seeds=5,
    ),
    "fig12": PaperFigure(
        "App. D",
        "U-maze ant: coverage heat maps over time",
        (
            *heat_maps("AntUMaze-v0", 1_250_000, 5_000_000, 10_000_000),
            *tasks(("AntUMaze-v0",), GOALS, *COVERAGE_CURVES),
        ),
        note="With --scale laptop an outer iteration is 250 000 steps, half of Goal GAN's.",
        seeds=3,
    ),
    "fig13": PaperFigure(
        "App. D",
        "U-mazes: coverage curves",
        tasks(("PointUMaze-v0", "AntUMaze-v0"), GOALS, *COVERAGE_CURVES),
        seeds=3,
    ),
    "fig14": PaperFigure(
        "App. F",
        "Four rooms: learned against random backward actions",
        (rooms(15, {"actor-critic": NONE, "random backward actions": RANDOM, "recall traces": RECALL}),),
    ),
    "fig15": PaperFigure(
        "App. F",
        "MuJoCo: learned against untrained backtracking model, with soft actor-critic",
        tasks(TASKS, MODELS),
        note="The paper shows Walker2d and Ant.",
        seeds=5,
    ),
    "fig16": PaperFigure(
        "App. G",
        "MuJoCo: forward model and untrained backtracking model, with TRPO",
        tasks(TASKS, TRPO_MODELS),
        note="The paper shows Ant and Humanoid, and no untrained model.",
        seeds=5,
    ),
    "fig17": PaperFigure(
        "App. H",
        "Four rooms: real updates for each recall phase",
        tuple(rooms(size, RATIOS, until=40_000) for size in (12, 14, 15)),
        note="Real updates : recall phases of one imitation update each (the default, in Figure 2, is two). Drawn are "
        "the first 40 000 of 100 000 steps.",
    ),
    "fig18": PaperFigure(
        "App. H",
        "Four rooms: real to recall updates (longest trace)",
        tuple(rooms(size, LENGTHS, until=40_000) for size in (12, 14, 15)),
        note="One real update : so many imitation updates (longest trace in steps). Drawn are the first 40 000 of "
        "100 000 steps. Our traces end where their episode began, so long ones cannot undo the policy as in the paper, "
        "and are the best. Short ones teach only the last steps before the goal.",
    ),
    "fig19": PaperFigure(
        "App. H",
        "MuJoCo: recall updates for five updates of soft actor-critic (longest trace)",
        tasks(("HalfCheetah-v5", "Hopper-v5"), SAC_RATIOS),
        seeds=5,
    ),
    "point-mass": PaperFigure(
        "ours",
        "Goal GAN: points in boxes of 2 to 6 dimensions",
        POINT_MASSES,
        note="Section 6.3 names this task; its figures show mazes. At 4d474de the critic clipped extreme returns.",
        seeds=3,
    ),
    "maze-size": PaperFigure(
        "ours",
        "Four rooms: how the cost grows with the maze",
        (
            Panel(
                "steps to the first success",
                {f"{label}, {size}": in_maze(command, size) for label, command in GROWTH.items() for size in MAZES},
                "growth",
            ),
        ),
        note="Section 4 of the paper: the goal may be known ahead of time; then recall traces need not wait until the "
        "agent has been there. Interquartile means with 95 % intervals; x3: three seeds never succeed. They "
        "count as their whole budget, which is a million steps at 41 x 41 (500 000 but for the actor-critic).",
    ),
    "step-size": PaperFigure(
        "ours",
        "Four rooms: a faster actor-critic (RMSprop 2e-3 instead of 7e-4)",
        tuple(rooms(size, STEP_SIZES) for size in (15, 19)),
        note="A better tuned actor-critic narrows the lead of recall traces to a factor of three.",
    ),
    "replay-updates": PaperFigure(
        "ours",
        "Four rooms: batches for each phase of prioritized replay",
        (rooms(11, REPLAY_UPDATES, until=40_000), rooms(15, REPLAY_UPDATES)),
        note="More batches make prioritized replay faster. Recall traces are faster still. Drawn are, at 11 x 11, the "
        "first 40 000 of 100 000 steps.",
    ),
}


# ------------------------------------------------------------------------------------------------------ runs


class Run(NamedTuple):
    """One process: a script, its flags, and the folder where it writes. Figures that need the same run share it."""

    command: tuple[str, ...]
    folder: Path

    def start(self) -> list[str]:
        return [*self.command, "--run-dir", str(self.folder)]

    def shell_command(self, whole: bool = False) -> str:
        """What commands.txt says of it, and without its folder, which is no part of what a run is."""
        return shlex.join(("python", *(self.start() if whole else self.command)))


def make_run(command: str, seed: int, args: Args) -> Run:
    script, *flags = shlex.split(command)
    scales = GOAL_GAN_ANT if "AntUMaze-v0" in flags else SCALES[script]
    of_scale = shlex.split(scales[args.scale])
    own, usual = (dict(zip(words[::2], words[1::2], strict=True)) for words in (flags, of_scale))
    pairs = (own | usual if args.scale == "smoke" else own | {k: usual[k] for k in usual if k not in own}).items()
    words = [word for pair in (*pairs, ("--seed", str(seed))) for word in pair]
    name = "_".join(f"{flag.removeprefix('--')}={value}" for flag, value in zip(words[::2], words[1::2], strict=True))
    return Run((script, *words), args.runs_dir / script.removesuffix(".py") / name)


def figure_runs(name: str, args: Args) -> dict[str, list[Run]]:
    """The runs of a figure: the command of each setting to one run for each seed."""
    commands = dict.fromkeys(command for panel in FIGURES[name].panels for command in panel.runs.values())
    seeds = args.seeds or (1 if args.scale == "smoke" else FIGURES[name].seeds)
    return {command: [make_run(command, seed, args) for seed in range(1, seeds + 1)] for command in commands}


def read_run(run: Run) -> EventAccumulator | None:
    """All that a run has logged; None if it has not come to its end, where it logs its last evaluation and pictures."""
    if not run.folder.exists():
        return None
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    total = int(run.command[run.command.index("--total-timesteps") + 1])
    tags = events.Tags()
    pictures = [tag for tag in tags["images"] if events.Images(tag)[-1].step >= total]
    draws = run.command[0] not in ("recall_sac.py", "recall_trpo.py")
    if (pictures or not draws) and "eval/return" in tags["scalars"] and events.Scalars("eval/return")[-1].step >= total:
        return events
    return None


def has_other_arguments(run: Run) -> str:
    """Which argument of the run in the folder is not what its command means today, as a default has changed since."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(run.command[0].removesuffix(".py"))
    today = json.loads(json.dumps(asdict(tyro.cli(module.Args, args=run.start()[1:])), default=str))
    then = json.loads((run.folder / "args.json").read_text())
    for name, value in today.items():
        if value is not None and name != "run_dir" and then.get(name) != value:
            return f"{name} was {then.get(name)} and is {value} now"
    return ""


def what_is_left(run: Run) -> list[str]:
    """The command that starts or resumes a run; empty if the run is finished."""
    if read_run(run) is not None:
        return []
    return [run.command[0], "--resume", str(run.folder)] if (run.folder / "args.json").exists() else run.start()


class Processes:
    """The processes that are at work, and whether to stop."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.stopping = False


def execute(run: Run, processes: Processes) -> str:
    """Starts or resumes a run, unless it is finished, and waits for its end; returns a report if it failed.

    Its log file is locked as long as the process lives. So a second start, after this program was killed, waits for a
    process that is still at work rather than starting another one in the same folder.
    """
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{run.folder}.log", "a") as log:
            while not locked(log) and not processes.stopping:
                time.sleep(0.2)
            left = what_is_left(run)
            if (run.folder / "args.json").exists() and (difference := has_other_arguments(run)):
                return f"{run.folder} is of another version: {difference}. Delete it, or use another --runs-dir"
            if not left or processes.stopping:
                return ""
            if left == run.start():
                Path(f"{run.folder}.json").write_text(json.dumps(origin(), indent=4))
            command = [sys.executable, str(ROOT / left[0]), *left[1:]]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            processes.running.add(process)
            status = process.wait()
            processes.running.discard(process)
        last_lines = Path(f"{run.folder}.log").read_text().splitlines()[-5:]
        return "" if status == 0 else "\n".join((shlex.join(left), f"exit status {status}", *last_lines))
    except Exception as error:  # one run must not stop the others
        return f"{run.folder}: {error!r}"


def locked(log: TextIO) -> bool:
    """Whether the lock on a log file could be taken."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def origin() -> dict[str, str]:
    """What a result depends on: commit, package versions and hardware."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:  # there is no git here
        commit = "unknown"
    names = ("torch", "numpy", "gymnasium", "mujoco")
    installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        cpu = models[0] if models else cpu
    versions = {name: installed[name] for name in names if name in installed}
    found = {"commit": commit, "python": platform.python_version()} | versions
    return found | {"hardware": f"{os.cpu_count()} cores of {cpu}"}


def execute_locally(runs: list[Run], workers: int) -> list[str]:
    """Executes all runs, so many at a time, with a progress bar; returns the reports of those that failed."""
    failures, processes = [], Processes()
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(runs), unit=" runs", disable=None) as progress:
        futures = [pool.submit(execute, run, processes) for run in runs]
        try:
            for future in as_completed(futures):
                progress.update()
                if future.result():
                    failures.append(future.result())
                    progress.write(failures[-1], file=sys.stderr)
        except KeyboardInterrupt:
            processes.stopping = True
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                for process in [*processes.running]:
                    process.terminate()  # its last checkpoint stays
                time.sleep(0.2)
            raise
    return failures


def execute_on_slurm(runs: list[Run], workers: int) -> list[str]:
    """Executes all runs as one Slurm job array, so many tasks at a time; returns the reports of those that failed."""
    from submitit import AutoExecutor
    from submitit.helpers import as_completed

    folder, runs = runs[0].folder.parents[1] / "slurm", [run for run in runs if what_is_left(run)]
    try:
        executor = AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(
            name="recall-traces", cpus_per_task=1, timeout_min=24 * 60, slurm_array_parallelism=workers
        )
        jobs = executor.map_array(execute, runs, [Processes() for _ in runs])
    except Exception as error:  # no Slurm here, or whatever sbatch says
        fail(f"--engine slurm: the jobs cannot be submitted: {error}".splitlines()[0])
    failures = []
    with tqdm(total=len(jobs), unit=" runs", disable=None) as progress:
        try:
            for job in as_completed(jobs, poll_frequency=1):
                progress.update()
                error = job.exception()
                if report := job.result() if error is None else f"job {job.job_id}: {error}":
                    failures.append(report)
                    progress.write(failures[-1], file=sys.stderr)
        except KeyboardInterrupt:
            for job in jobs:
                job.cancel()
            raise
    return failures


# ------------------------------------------------------------------------------------------------------ data


class Curves(NamedTuple):
    """What the finished seeds of one setting have logged."""

    seeds: list[int]
    steps: np.ndarray  # (evaluations,)
    values: dict[str, np.ndarray]  # tag: (seeds, evaluations), NaN where it was not logged

    def success(self) -> np.ndarray | None:
        """The success rate, over all goals where there are many, (seeds, evaluations), if it was logged."""
        return self.values.get("eval/success_rate", self.values.get("eval/coverage"))


class Pictures(NamedTuple):
    """What one seed of a setting has drawn."""

    seed: int
    images: dict[str, dict[int, bytes]]  # by tag and step


def read_figure(name: str, args: Args) -> tuple[dict[str, Curves], dict[str, Pictures], list[Run], list[Run]]:
    """The curves of every setting of a figure, pictures of a typical seed, and which runs are new and which missing."""
    curves, pictures, finished, missing = kept(name, args), {}, [], []
    for command, runs in figure_runs(name, args).items():
        old = curves.get(command)
        read = {seed: read_run(run) for seed, run in enumerate(runs, start=1)}
        read = {n: events for n, events in read.items() if events is not None and not has_other_arguments(runs[n - 1])}
        new = [seed for seed in range(1, len(runs) + 1) if old is None or seed not in old.seeds]
        missing += [runs[seed - 1] for seed in new if seed not in read]
        new = [seed for seed in new if seed in read]
        finished += [runs[seed - 1] for seed in new]
        if new:
            found = curves_of({seed: read[seed] for seed in new})
            curves[command] = found if old is None else joined(old, found)
        if read:
            seed = typical_seed(curves[command], [*read])
            images, tags = read[seed].Images, read[seed].Tags()["images"]
            shown = {tag: {event.step: event.encoded_image_string for event in images(tag)} for tag in tags}
            pictures[command] = Pictures(seed, shown)
    return curves, pictures, finished, missing


def curves_of(read: dict[int, EventAccumulator]) -> Curves:
    """What these seeds have logged."""
    scalars = [
        {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        for events in read.values()
    ]
    tags = sorted({tag for tags in scalars for tag in tags if tag.startswith("eval/")})
    steps = sorted({step for tags in scalars for step in tags["eval/return"]})
    values = {tag: np.array([[s.get(tag, {}).get(step, np.nan) for step in steps] for s in scalars]) for tag in tags}
    return Curves([*read], np.array(steps), values)


def joined(one: Curves, other: Curves) -> Curves:
    """All seeds of both, which were evaluated at the same steps."""
    if not np.array_equal(one.steps, other.steps):
        fail("--extend: the new runs have other evaluation steps than data.csv, take another --results-dir")
    order, values = np.argsort([*one.seeds, *other.seeds]), {}
    for tag in one.values | other.values:
        columns = (c.values.get(tag, np.full((len(c.seeds), len(c.steps)), np.nan)) for c in (one, other))
        values[tag] = np.concatenate([*columns])[order]
    return Curves(sorted([*one.seeds, *other.seeds]), one.steps, values)


def write_data(path: Path, curves: dict[str, Curves]) -> None:
    """One row for each evaluation of each run."""
    tags = sorted({tag for setting in curves.values() for tag in setting.values})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("setting", "seed", "step", *tags))
        for command, setting in curves.items():
            nothing = np.full((len(setting.seeds), len(setting.steps)), np.nan)
            columns = [setting.values.get(tag, nothing) for tag in tags]
            for i, seed in enumerate(setting.seeds):
                for j, step in enumerate(setting.steps):
                    numbers = ("" if np.isnan(column[i, j]) else f"{column[i, j]:.6g}" for column in columns)
                    writer.writerow((command, seed, step, *numbers))


def read_data(path: Path) -> dict[str, Curves]:
    """What write_data wrote."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    tags, found = rows[0][3:], {}
    for command, seed, step, *values in rows[1:]:
        found.setdefault(command, {}).setdefault(int(seed), {})[int(step)] = [float(value or "nan") for value in values]
    curves = {}
    for command, seeds in found.items():
        table = np.array([[*evaluations.values()] for evaluations in seeds.values()])  # (seeds, evaluations, tags)
        steps = np.array([*next(iter(seeds.values()))])
        curves[command] = Curves([*seeds], steps, {tag: table[:, :, i] for i, tag in enumerate(tags)})
    return curves


def made_of(folder: Path) -> list[str]:
    """The commands of the runs that a figure has been made of."""
    return [line.split(" --run-dir ")[0] for line in (folder / "commands.txt").read_text().splitlines()]


def read_origins(folder: Path) -> Counter:
    """How many of these runs are of which origin, in JSON."""
    origins = Counter()
    for made in json.loads((folder / "origin.json").read_text()):
        origins[json.dumps({key: value for key, value in made.items() if key != "runs"})] += made["runs"]
    return origins


def kept(name: str, args: Args) -> dict[str, Curves]:
    """With --extend, the numbers that the figure has been made of so far."""
    folder = args.results_dir / name
    if not args.extend or not (folder / "data.csv").exists():
        return {}
    curves, made = read_data(folder / "data.csv"), made_of(folder)
    for command, setting in curves.items():
        if any(make_run(command, seed, args).shell_command() not in made for seed in setting.seeds):
            fail(f"--extend: {folder} was made with other flags than --scale {args.scale}, take another --results-dir")
    return curves


def runs_of(names: Iterable[str], args: Args) -> list[Run]:
    """All runs of these figures, but those that are kept."""
    runs = {}
    for name in names:
        old = kept(name, args)
        for command, of_setting in figure_runs(name, args).items():
            done = old[command].seeds if command in old else ()
            runs |= {run: None for seed, run in enumerate(of_setting, start=1) if seed not in done}
    return [*runs]


# ------------------------------------------------------------------------------------------------------ statistics


def interquartile_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    return trim_mean(values, 0.25, axis=axis)


def interval(
    *samples: np.ndarray, statistic=interquartile_mean, resamples: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of a statistic of samples whose last axis are the seeds, each resampled on its own."""
    if min(sample.shape[-1] for sample in samples) < 2:
        value = statistic(*samples, axis=-1)
        return value, value
    with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):
        drawn = bootstrap(
            samples, statistic, axis=-1, n_resamples=resamples, vectorized=True, method="percentile", rng=0
        )
    return drawn.confidence_interval.low, drawn.confidence_interval.high


def steps_to_success(setting: Curves) -> np.ndarray:
    """Environment steps to the first evaluation with a success rate of 0.9, or all steps if there is none, (seeds,)."""
    reached = setting.success() >= 0.9
    return setting.steps[np.where(reached.any(axis=1), reached.argmax(axis=1), -1)].astype(float)


def steps_to_lasting_success(setting: Curves) -> np.ndarray:
    """Environment steps to the first success from which on 90 % of all evaluations succeed, or all steps, (seeds,)."""
    success = setting.success()
    from_here_on = success[:, ::-1].cumsum(axis=1)[:, ::-1] / np.arange(success.shape[1], 0, -1)
    lasting = (success >= 0.9) & (from_here_on >= 0.9)
    return setting.steps[np.where(lasting.any(axis=1), lasting.argmax(axis=1), -1)].astype(float)


def success_at_the_end(setting: Curves) -> np.ndarray:
    """Mean success rate of the last tenth of all evaluations, (seeds,)."""
    success = setting.success()
    return success[:, -max(1, success.shape[1] // 10) :].mean(axis=1)


def statistics(setting: Curves) -> dict[str, np.ndarray]:
    """The numbers by which a setting is judged: name to values (seeds,)."""
    found = {f"last {tag}": values[:, -1] for tag, values in setting.values.items()}
    found["mean eval/return"] = setting.values["eval/return"].mean(axis=1)
    if setting.success() is not None:
        found |= {"steps to success": steps_to_success(setting), "success at the end": success_at_the_end(setting)}
        found["steps to lasting success"] = steps_to_lasting_success(setting)
    return found


def typical_seed(setting: Curves, among: list[int]) -> int:
    """Which of some seeds is nearest to the interquartile mean of cells visited or, if not counted, of all returns."""
    found = statistics(setting)
    values = found.get("last eval/visited_cells", found["mean eval/return"])
    distances = dict(zip(setting.seeds, np.abs(values - interquartile_mean(values)), strict=True))
    return min(among, key=distances.get)


def write_summary(path: Path, curves: dict[str, Curves]) -> None:
    """Interquartile means over the seeds with their 95 % bootstrap intervals."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("setting", "seeds", "statistic", "iqm", "low", "high", "least", "most"))
        for command, setting in curves.items():
            for name, values in statistics(setting).items():
                numbers = (interquartile_mean(values), *interval(values), values.min(), values.max())
                writer.writerow((command, len(values), name, *(f"{number:.6g}" for number in numbers)))


# ------------------------------------------------------------------------------------------------------ pictures

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"actor-critic": "#000000", "recall traces": "#0072b2", "PER": "#d55e00", "PER by TD error": "#e69f00"}
COLOURS |= {"both learned": "#009e73", "random backward actions": "#cc79a7", "PER, 16": "#d55e00"}
COLOURS |= {"actor-critic, 2e-3": "#888888", "recall traces, 2e-3": "#56b4e9", "recall traces, goal known": "#009e73"}
COLOURS |= {"recall traces, goal known, 2e-3": "#b2df8a"}
COLOURS |= dict.fromkeys(("soft actor-critic", "TRPO", "Goal GAN"), "#000000") | {"untrained model": "#cc79a7"}
DASHES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (6, 2, 1, 2)), (0, (1, 1.5)))
LABELS = {"eval/return": "return of the greedy policy", "eval/visited_cells": "distinct cells visited"}
LABELS["eval/coverage"] = "coverage: share of goals reached"
MORE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#d55e00", "#0072b2")  # of all other labels


def draw_figure(figure: PaperFigure, curves: dict[str, Curves], pictures: dict[str, Pictures]) -> Figure:
    """All panels of a figure; a panel of pictures is one axes for each of them."""
    boxes = []  # (panel, its runs)
    for panel in figure.panels:
        there = pictures if panel.kind == "pictures" else curves
        runs = {label: command for label, command in panel.runs.items() if command in there}
        boxes += [(panel, {label: runs[label]}) for label in runs] if panel.kind == "pictures" else [(panel, runs)]
    across = 2 if len(boxes) == 4 and not any(panel.kind == "pictures" for panel, _ in boxes) else min(len(boxes), 3)
    down = -(-len(boxes) // across)
    with matplotlib.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        drawing = Figure(figsize=(max(4.6 * across, 7), 3.8 * down + 0.5), layout="constrained")
        legend = {}
        for axes, (panel, runs) in zip(drawing.subplots(down, across, squeeze=False).flat, boxes, strict=False):
            if panel.kind == "pictures":
                ((label, command),) = runs.items()
                seed, images = pictures[command]
                shown = images[panel.tag]
                last = max(step for step in shown if panel.until is None or step <= panel.until)
                axes.imshow(Image.open(io.BytesIO(shown[last])))
                axes.axis("off")
                axes.set_title(f"{label}, {panel.title}, seed {seed}", fontsize=13)
                continue
            if panel.kind == "growth":
                legend |= draw_growth(axes, panel, runs, curves)
                continue
            free = [colour for colour in MORE_COLOURS if colour not in map(COLOURS.get, panel.runs)]
            own = [label for label in panel.runs if label not in COLOURS]
            for i, (label, command) in enumerate(runs.items()):
                colour, setting = COLOURS.get(label) or free[own.index(label) % len(free)], curves[command]
                values = setting.values[panel.tag]
                if panel.kind == "curves":
                    low, high = interval(values.T)
                    thousands = setting.steps / 1000
                    axes.plot(thousands, values.T, color=colour, lw=0.5, alpha=0.15)
                    axes.fill_between(thousands, low, high, color=colour, alpha=0.2, lw=0)
                    dashes = DASHES[[*panel.runs].index(label) % len(DASHES)]  # to see the lines below
                    legend[label] = axes.plot(thousands, interquartile_mean(values), color=colour, lw=2.2, ls=dashes)[0]
                else:
                    values = values[:, -1]
                    low, high = interval(values)
                    axes.scatter(i + np.linspace(-0.15, 0.15, len(values)), values, color=colour, alpha=0.4, s=20)
                    mean = interquartile_mean(values)
                    axes.errorbar(
                        i, mean, [[mean - low], [high - mean]], color=colour, fmt="_", ms=22, mew=3, capsize=6
                    )
            axes.set_title(panel.title)
            if not runs:
                axes.text(0.5, 0.5, "not run yet", ha="center", transform=axes.transAxes)
            if panel.kind == "curves":
                axes.set(xlabel="environment steps (thousands)", ylabel=LABELS[panel.tag])
                axes.locator_params(axis="x", nbins=6)
                if panel.until is not None:
                    axes.set_xlim(right=min(panel.until / 1000, axes.get_xlim()[1]))
            else:
                axes.set_xticks(range(len(runs)), [textwrap.fill(label, 10) for label in runs])
                axes.set(ylabel=LABELS[panel.tag], ylim=(0, None), xlim=(-0.5, len(runs) - 0.5))
        for axes in drawing.axes[len(boxes) :]:
            axes.axis("off")
        if legend:
            columns = min(len(legend), int(11 * drawing.get_figwidth() // (max(map(len, legend)) + 7)))
            drawing.legend(legend.values(), legend, loc="outside upper center", ncols=columns, frameon=False)
    return drawing


def draw_growth(axes, panel: Panel, runs: dict[str, str], curves: dict[str, Curves]) -> dict:
    """Steps to success against the size of the maze, a line for each method; returns the lines by label."""
    points = {}  # method: [(size, what its seeds have logged)]
    for key, command in runs.items():
        label, _, size = key.rpartition(", ")
        points.setdefault(label, []).append((int(size), curves[command]))
    lines = {}
    for i, (label, found) in enumerate(points.items()):
        sizes, settings = zip(*found, strict=True)
        steps = [steps_to_success(setting) for setting in settings]
        low, high = zip(*map(interval, steps), strict=True)
        means = [interquartile_mean(values) for values in steps]
        lines[label] = axes.plot(sizes, means, color=COLOURS[label], lw=2.2, marker="o", ms=5)[0]
        axes.fill_between(sizes, low, high, color=COLOURS[label], alpha=0.2, lw=0)
        for size, setting in found:
            failed = np.count_nonzero(~(setting.success() >= 0.9).any(axis=1))
            if failed:  # below each other
                y = setting.steps[-1] / 1.4**i
                axes.text(1.03 * size, y, f"x{failed}", color=COLOURS[label], weight="bold", fontsize=11)
    axes.set(xscale="log", yscale="log", xlabel="size of the maze", ylabel="environment steps", title=panel.title)
    axes.set_xticks(sorted({size for found in points.values() for size, _ in found}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    return lines


# ------------------------------------------------------------------------------------------------------ verdicts


class Claim(NamedTuple):
    """A claim as a number that has to be above a bound: a formula of interquartile means."""

    figure: str
    text: str
    settings: tuple[str, ...]
    formula: Callable[..., float] | None = lambda a, b: a / b  # None: counts the seeds that fail
    statistic: str = "steps to success"
    number: str = "ratio"
    above: float = 1


def in_rooms(figure: str, text: str, sizes: tuple[int, ...], *commands: str, **changes) -> list[Claim]:
    """The same claim for each of several mazes."""
    return [
        Claim(
            figure,
            f"{text} ({size} x {size})",
            tuple(f"{command} --size {size}" for command in commands),
            **changes,
        )
        for size in sizes
    ]


def grows(figure: str, text: str, small: int, large: int, a: str, b: str) -> Claim:
    """The ratio of a to b is larger in the large maze."""
    settings = tuple(f"{command} --size {size}" for size in (large, small) for command in (a, b))
    return Claim(
        figure,
        f"{text} ({large} against {small})",
        settings,
        lambda a, b, c, d: (a / b) / (c / d),
        number="ratio of both ratios",
    )


def on_tasks(figure: str, text: str, commands: tuple[str, ...], names: tuple[str, ...] = TASKS) -> list[Claim]:
    """The area under the learning curve is larger: on each task, and in the mean of the ratios over all of them."""
    settings = [tuple(f"{command} --env-id {name}" for command in commands) for name in names]
    each = [
        Claim(figure, f"{text} ({name})", pair, statistic=MEAN_RETURN)
        for name, pair in zip(names, settings, strict=True)
    ]
    if len(names) == 1:
        return each
    return each + [
        Claim(
            figure,
            f"{text} (mean of {len(names)} tasks)",
            sum(settings, ()),
            lambda *means: gmean([a / b for a, b in zip(means[::2], means[1::2], strict=True)]),
            statistic=MEAN_RETURN,
            number="geometric mean of the ratios",
        )
    ]


MEAN_RETURN = "mean eval/return"
VISITED = {"statistic": "last eval/visited_cells"}
AT_THE_END = {"statistic": "success at the end", "formula": lambda a, b: a - b, "number": "difference", "above": 0}
CLAIMS = (
    *in_rooms("fig2", "Recall traces need fewer steps than the actor-critic", (15, 19), NONE, RECALL),
    *in_rooms("fig2", "Several actor-critics fail to converge, recall traces never", (19,), NONE, RECALL, formula=None),
    *in_rooms("fig3", "Recall traces visit more cells than PER", (11, 15), RECALL, PER, **VISITED),
    *in_rooms("fig3", "Recall traces visit more cells than PER by TD error", (11, 15), RECALL, TD_ERROR, **VISITED),
    *in_rooms("fig4", "PER needs fewer steps than the actor-critic in the small maze", (11,), NONE, PER),
    *in_rooms("fig4", "Recall traces need fewer steps than PER", (11, 15), PER, RECALL),
    *in_rooms("fig4", "Recall traces need fewer steps than PER by TD error", (11, 15), TD_ERROR, RECALL),
    *in_rooms("fig4", "PER by TD error needs fewer steps than PER by return", (11, 15), PER, TD_ERROR),
    grows("fig4", "The lead of recall traces over PER grows with the maze", 11, 15, PER, RECALL),
    *on_tasks("fig5", "Goal GAN: recall traces raise coverage faster", (GAN_LEARNED, GAN_NONE), ("AntUMaze-v0",)),
    *on_tasks("fig6", "TRPO: recall traces learn faster", (TRPO_LEARNED, TRPO_NONE)),
    *on_tasks("fig7", "SAC: recall traces learn faster", (SAC_LEARNED, SAC_NONE)),
    *on_tasks("fig8", "TRPO: traces as long as in Table 1 are better than 5 steps", (TRPO_LEARNED, SHORT_TRACES)),
    grows("fig9", "The benefit of recall traces grows with the maze", 11, 19, NONE, RECALL),
    *in_rooms("fig10", "Recall traces need fewer steps than PER", (13,), PER, RECALL),
    *in_rooms("fig10", "Recall traces need fewer steps than PER by TD error", (13,), TD_ERROR, RECALL),
    *in_rooms("fig10", "PER by TD error needs fewer steps than PER by return", (13,), PER, TD_ERROR),
    *in_rooms("fig10", "Recall traces visit more cells than PER", (13,), RECALL, PER, **VISITED),
    *in_rooms("fig10", "Recall traces visit more cells than PER by TD error", (13,), RECALL, TD_ERROR, **VISITED),
    *on_tasks("fig11", "Goal GAN: recall traces raise coverage faster", (GAN_LEARNED, GAN_NONE), ("PointUMaze-v0",)),
    *(
        Claim("fig11", text, tuple(f"{command} --env-id PointUMaze-v0" for command in (slower, GAN_LEARNED)))
        for text, slower in (
            ("Goal GAN: recall traces need fewer steps to 90 % coverage (PointUMaze-v0)", GAN_NONE),
            ("Goal GAN: a learned model needs fewer steps to 90 % than a random one (PointUMaze-v0)", GAN_RANDOM),
        )
    ),
    *on_tasks(
        "fig13",
        "Goal GAN: recall traces raise coverage faster",
        (GAN_LEARNED, GAN_NONE),
        ("PointUMaze-v0", "AntUMaze-v0"),
    ),
    *in_rooms("fig14", "Learned backward actions need fewer steps than random ones", (15,), RANDOM, RECALL),
    *in_rooms("fig14", "Learned backward actions succeed more often in the end", (15,), RECALL, RANDOM, **AT_THE_END),
    *on_tasks("fig15", "SAC: a learned backtracking model is better than a random one", (SAC_LEARNED, SAC_RANDOM)),
    *on_tasks("fig15", "SAC: traces of a random backtracking model are better than none", (SAC_RANDOM, SAC_NONE)),
    *on_tasks("fig16", "TRPO: a backtracking model is better than a forward model", (TRPO_LEARNED, TRPO_FORWARD)),
    *on_tasks("fig16", "TRPO: a learned backtracking model is better than a random one", (TRPO_LEARNED, TRPO_RANDOM)),
    *on_tasks("fig16", "TRPO: no model is better than a forward model", (TRPO_NONE, TRPO_FORWARD)),
    *on_tasks("fig16", "TRPO: traces of a random backtracking model are better than none", (TRPO_RANDOM, TRPO_NONE)),
    *in_rooms(
        "fig17",
        "Rarer recall, 10 : 1 instead of 1 : 1, needs more steps",
        (12, 14, 15),
        RATIOS["10 : 1"],
        RATIOS["1 : 1"],
    ),
    *in_rooms(
        "fig18",
        "In the smaller maze 1 : 1 (25) needs fewer steps than 1 : 20 (25)",
        (12,),
        LENGTHS["1 : 20 (25)"],
        LENGTHS["1 : 1 (25)"],
    ),
    *in_rooms(
        "fig18",
        "More recall updates on short traces, 1 : 20 (5) instead of 1 : 1 (25), need fewer steps",
        (14, 15),
        LENGTHS["1 : 1 (25)"],
        LENGTHS["1 : 20 (5)"],
    ),
    *in_rooms(
        "fig18",
        "Many recall updates on long traces, 1 : 20 (25) instead of 1 : 20 (5), spoil the policy in the end",
        (12, 14, 15),
        LENGTHS["1 : 20 (5)"],
        LENGTHS["1 : 20 (25)"],
        **AT_THE_END,
    ),
    *on_tasks(
        "fig19",
        "SAC: 10 recall updates are better than 5, 10 : 5 (20) against 5 : 5 (20)",
        (SAC_RATIOS["10 : 5 (20)"], SAC_RATIOS["5 : 5 (20)"]),
        ("HalfCheetah-v5", "Hopper-v5"),
    ),
    *on_tasks(
        "fig19",
        "SAC: 20 recall updates need shorter traces, 20 : 5 (10) against 20 : 5 (20)",
        (SAC_RATIOS["20 : 5 (10)"], SAC_RATIOS["20 : 5 (20)"]),
        ("HalfCheetah-v5", "Hopper-v5"),
    ),
    *(
        Claim("maze-size", f"{text} ({n} x {n})", tuple(in_maze(command, n) for command in pair))
        for text, pair in (
            ("Recall traces need fewer steps than the actor-critic", (NONE, RECALL)),
            ("Recall traces with the goal known need fewer steps than the actor-critic", (NONE, GOAL_KNOWN)),
            ("Recall traces need fewer steps than PER", (PER, RECALL)),
            ("Recall traces need fewer steps than PER by TD error", (TD_ERROR, RECALL)),
        )
        for n in MAZES
    ),
    *in_rooms(
        "step-size",
        "Recall traces with the goal known need fewer steps than a faster actor-critic (RMSprop 2e-3)",
        (15, 19),
        f"{NONE} --learning-rate 2e-3",
        GOAL_KNOWN,
    ),
    *(
        Claim(
            "point-mass",
            f"Goal GAN: recall traces raise coverage faster ({panel.title})",
            (panel.runs["recall traces"], panel.runs["Goal GAN"]),
            statistic=MEAN_RETURN,
        )
        for panel in POINT_MASSES
    ),
)


def probability_of_improvement(a: np.ndarray, b: np.ndarray) -> float:
    """How often one of `a` is larger than one of `b`; equal ones count half (Agarwal et al., 2021)."""
    return float((a[:, None] > b).mean() + (a[:, None] == b).mean() / 2)


def judge(claim: Claim, curves: dict[str, Curves]) -> tuple[str, str, str]:
    """What came out, the seeds, and the verdict."""
    settings = [curves[command] for command in claim.settings]
    seeds = ", ".join(dict.fromkeys(str(len(setting.seeds)) for setting in settings))
    if claim.formula is None:
        failed = [int((success_at_the_end(setting) < 0.9).sum()) for setting in settings]
        table = [(count, len(setting.seeds) - count) for count, setting in zip(failed, settings, strict=True)]
        p = fisher_exact(table, alternative="greater").pvalue
        low, high, above = p < 0.05, 1, 0  # one-sided: it holds or is not shown
        ours = f"{failed[0]} against {failed[1]} seeds fail at the end; p = {p:.2f} (Fisher's exact test)"
    else:
        samples = [statistics(setting)[claim.statistic] for setting in settings]

        def number(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
            return claim.formula(*(interquartile_mean(sample, axis) for sample in samples))

        (low, high), above = interval(*samples, statistic=number, resamples=50_000), claim.above
        means = " / ".join(f"{m:,.0f}" if m >= 1000 else f"{m:.4g}" for m in map(interquartile_mean, samples))
        values = f"{claim.statistic}: {means}; " if len(samples) == 2 else f"{claim.statistic}; "
        no_ratio = claim.number != "difference" and min(map(interquartile_mean, samples)) <= 0
        ours = f"{values}no {claim.number}" if no_ratio else f"{values}{claim.number} {number(*samples):.2f}"
        if not no_ratio and min(len(setting.seeds) for setting in settings) > 2:
            ours += f" [{low:.2f}, {high:.2f}]"
        ours += f"; P = {probability_of_improvement(*samples):.2f}" if len(samples) == 2 else ""
    verdict = "holds" if low > above else "the reverse holds" if high < above else "not shown"
    if claim.formula is not None and no_ratio:
        verdict = "no ratio: a mean is not positive"
    if any(a.seeds != b.seeds for a, b in zip(settings[::2], settings[1::2], strict=True)):
        verdict = "incomplete: not all seeds have finished"
    elif min(len(setting.seeds) for setting in settings) < 5:
        verdict = "too few seeds"
    return ours, seeds, verdict


def write_verdicts(results_dir: Path) -> None:
    """results/README.md: what the paper claims and what came out here, and all figures."""

    def figure_with(claim: Claim) -> str:
        """The claim's own figure or, if that lacks some of its settings, another that has them."""
        return next((name for name in (claim.figure, *data) if {*claim.settings} <= data.get(name, {}).keys()), "")

    data = {
        name: read_data(results_dir / name / "data.csv")
        for name in FIGURES
        if (results_dir / name / "data.csv").exists()
    }
    lines = [
        "# Paper against ours",
        "",
        "Made by `reproduce.py` from the `data.csv` of each figure. Most claims are put as a ratio of interquartile",
        "means over the seeds (a quarter, rounded down, is left out on both sides) with its 95 % bootstrap interval: a",
        "claim *holds* if the whole interval is above 1, *the reverse holds* if it is below, and in between it is *not",
        "shown*. Shares of success are compared by their difference, which has to be above 0, and failing seeds are",
        "counted and tested. *P*, the probability of improvement, is the share of all pairs of seeds, one of each",
        "setting, in which the claim is true (equal ones count half). Some claims are put to more tasks than in the",
        "paper, and some are ours.",
        "Of three or four seeds an interval is given too, but it covers the true value less often than it says (of",
        "three, in about four cases of five): there is no verdict.",
        "",
        "*Steps to success*: environment steps to the first evaluation with a success rate of 0.9, the whole budget if",
        "there is none (in four rooms an evaluation succeeds or fails as a whole: its episodes are alike). *Steps to",
        "lasting success*, in summary.csv: to the first from which on 90 % of all evaluations succeed. *Success at the",
        "end*: mean success rate of the last tenth of all evaluations; a seed *fails* below 0.9. *Mean eval/return*:",
        "mean over all evaluations of a run, the area under its learning curve.",
        "",
        "| figure | claim | ours | seeds | verdict |",
        "|---|---|---|---|---|",
    ]
    not_run = {}  # the tasks on which each claim of each figure waits for runs
    for claim in CLAIMS:
        name = figure_with(claim)
        if not name:
            text, _, task = claim.text.removesuffix(")").rpartition(" (")
            not_run.setdefault((claim.figure, text), []).append(task)
            continue
        ours, seeds, verdict = judge(claim, data[name])
        figure = f"[{name}](#{name})" if name == claim.figure else f"{claim.figure}, from [{name}](#{name})"
        lines.append(f"| {figure} | {claim.text} | {ours} | {seeds} | **{verdict}** |")
    lines += ["", "Not run yet:", ""] if not_run else []
    lines += [f"- {figure}: {text} ({', '.join(tasks)})" for (figure, text), tasks in not_run.items()]
    for name in data:
        figure, made = FIGURES[name], json.loads((results_dir / name / "origin.json").read_text())
        hosts = (f"{o['runs']} at {o['commit']} on {o['hardware']}, torch {o.get('torch', '?')}" for o in made)
        files = ", ".join(f"[{file}]({name}/{file})" for file in ("commands.txt", "data.csv", "summary.csv"))
        seeds = max(setting.seeds[-1] for setting in data[name].values())
        command = f"python reproduce.py {name}" + (f" --seeds {seeds}" if seeds != figure.seeds else "")
        lines += ["", f"## {name}", "", f"{figure.title} ({figure.place}). `{command}`", ""]
        lines += [figure.note, ""] if figure.note else []
        lines += [f"![{name}]({name}/{name}.png)", "", f"Runs: {'; '.join(hosts) or 'of unknown origin'}. {files}"]
    (results_dir / "README.tmp").write_text("\n".join(lines) + "\n")
    os.replace(results_dir / "README.tmp", results_dir / "README.md")


# ------------------------------------------------------------------------------------------------------ main


def fail(message: str) -> None:
    """Ends the program with one line that names the flag and what would be accepted, and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check(args: Args) -> None:
    """Fails on the first argument that is out of range."""
    for name in args.figures:
        if name not in FIGURES:
            fail(f"figures must be among {', '.join(FIGURES)}, got {name}")
    for flag, value in (("seeds", args.seeds), ("workers", args.workers)):
        if value is not None and value < 1:
            fail(f"--{flag} must be at least 1, got {value}")
    if args.engine == "slurm" and importlib.util.find_spec("submitit") is None:
        fail("--engine slurm needs submitit: pip install submitit")
    for flag, folder in (("runs-dir", args.runs_dir), ("results-dir", args.results_dir)) if not args.dry_run else ():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            fail(f"--{flag} must be a folder that can be made and written, {folder} is not: {error.strerror}")
    for name in FIGURES:
        folder = args.results_dir / name
        if folder.is_file():
            fail(f"--results-dir must hold folders for the figures, {folder} is a file")
        if (folder / "data.csv").exists():
            try:
                read_data(folder / "data.csv"), read_origins(folder), made_of(folder)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
                fail(f"--results-dir: {folder} is damaged, it can be deleted: {error!r}")


def refuse_to_lose(name: str, args: Args) -> None:
    """Fails if a figure has been made of runs that it would lose."""
    folder = args.results_dir / name
    if args.extend or not (folder / "data.csv").exists():
        return
    there = {run.shell_command() for runs in figure_runs(name, args).values() for run in runs}
    if lost := [command for command in made_of(folder) if command not in there]:
        what = f"{folder} was made of {len(lost)} runs that it would lose, the first is {lost[0]}"
        fail(f"{what}: --extend keeps them, or take more --seeds, another --scale or another --results-dir")


@contextmanager
def alone_in(folder: Path):
    """Waits until no other process makes figures there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_figure(name: str, args: Args) -> bool:
    """Draws a figure and writes its data, from the runs that are finished; whether all of them are."""
    curves, pictures, finished, missing = read_figure(name, args)
    if missing:
        what = f"{len(missing)} runs are not finished or of another version"
        print(f"{name}: {what}, the first is {missing[0].folder}", file=sys.stderr)
    drawn = {command for panel in FIGURES[name].panels if panel.kind == "pictures" for command in panel.runs.values()}
    if not finished and (not curves or drawn - pictures.keys()):  # of curves alone it can be drawn again
        return not missing
    if without := sorted(drawn & curves.keys() - pictures.keys()):
        print(f"{name}: no pictures of {', '.join(without)}, as the run folders are gone", file=sys.stderr)
    folder = args.results_dir / name
    before = made_of(folder) if (folder / "data.csv").exists() and not args.extend else []
    if any(run.shell_command() in before for run in missing):
        print(f"{name}: {folder} was made of some of these and is left as it is", file=sys.stderr)
        return False
    origins = read_origins(folder) if kept(name, args) else Counter()
    for file in (Path(f"{run.folder}.json") for run in finished):
        if file.exists():
            origins[json.dumps(json.loads(file.read_text()))] += 1
    made = [json.loads(text) | {"runs": number} for text, number in origins.items()]
    with tempfile.TemporaryDirectory(dir=args.results_dir) as temporary:  # so that a kill leaves whole files
        new = Path(temporary)
        write_data(new / "data.csv", curves)
        curves = read_data(new / "data.csv")
        write_summary(new / "summary.csv", curves)
        of_all = (make_run(command, seed, args) for command, setting in curves.items() for seed in setting.seeds)
        (new / "commands.txt").write_text("".join(f"{run.shell_command(whole=True)}\n" for run in of_all))
        (new / "origin.json").write_text(json.dumps(made, indent=4) + "\n")
        draw_figure(FIGURES[name], curves, pictures).savefig(new / f"{name}.png", dpi=110)
        folder.mkdir(exist_ok=True)
        for file in sorted(new.iterdir(), key=lambda file: file.name == "data.csv"):  # the data last: then all is there
            os.replace(file, folder / file.name)
    print(f"{name}: {folder / f'{name}.png'}")
    return not missing


def main(args: Args) -> None:
    if args.list:
        for name, figure in FIGURES.items():
            print(f"{name:6} {figure.place:11} {figure.title}")
        return
    args.results_dir = args.results_dir or Path("results", "" if args.scale == "laptop" else args.scale)
    check(args)
    names = args.figures or [*FIGURES]
    runs = runs_of(names, args)
    if args.dry_run:
        for left in filter(None, map(what_is_left, runs)):
            print(shlex.join(("python", *left)))
        return
    for name in names:
        refuse_to_lose(name, args)
    execute_all = execute_on_slurm if args.engine == "slurm" else execute_locally
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        failures = execute_all(runs, args.workers) if runs and not args.plot_only else []
        with alone_in(args.results_dir):
            complete = [make_figure(name, args) for name in names]
            write_verdicts(args.results_dir)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if failures:
        print(f"{len(failures)} of {len(runs)} runs failed", file=sys.stderr)
    sys.exit(0 if all(complete) and not failures else 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
