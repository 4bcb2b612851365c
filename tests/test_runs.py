"""What a run of the scripts in SCRIPTS promises: its folder, checkpoints, resume, errors, tags.

The functions of the run are the same to the letter in these scripts, and a test holds them to it. So one script is
tested in depth, and the others where it is cheap.
"""

import ast
import errno
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
SCRIPTS = {  # the flag that chooses the method, and small arguments: 1 200 steps take less than half a second
    "recall_a2c_fourroom": (
        "recall",
        {"size": 7, "num_envs": 4, "num_steps": 5, "num_traces": 16, "backtracking_batch_size": 64},
    ),
    "per_a2c_fourroom": ("priority", {"size": 7, "num_envs": 4, "num_steps": 5, "replay_batch_size": 64}),
    "recall_sac": (
        "recall",
        {
            "env_id": "Reacher-v5",
            "hidden": 16,
            "batch_size": 16,
            "learning_starts": 300,
            "updates_per_step": 0.1,
            "recall_every": 10,
            "recall_updates": 5,
            "recall_tuples": 500,
            "num_traces": 8,
            "trace_length": 5,
            "backtracking_updates": 4,
            "backtracking_batch_size": 32,
            "eval_episodes": 2,
        },
    ),
    "recall_trpo": (
        "recall",
        {
            "env_id": "Reacher-v5",
            "hidden": 16,
            "num_envs": 4,
            "num_steps": 15,
            "cg_iterations": 3,
            "critic_epochs": 1,
            "recall_every": 1,
            "recall_until": 1.0,
            "num_traces": 8,
            "trace_length": 5,
            "backtracking_updates": 4,
            "backtracking_batch_size": 32,
            "eval_episodes": 2,
        },
    ),
    "recall_goalgan_ant": (
        "recall",
        {
            "env_id": "PointMass-v0",
            "hidden": 16,
            "num_envs": 6,
            "num_steps": 20,
            "max_episode_steps": 20,
            "inner_iterations": 2,
            "cg_iterations": 3,
            "critic_epochs": 1,
            "num_goals": 20,
            "label_rollouts": 1,
            "gan_updates": 50,
            "goal_noise": 0.3,
            "num_traces": 8,
            "trace_length": 5,
            "trace_limit": 1e6,
            "recall_updates": 2,
            "backtracking_updates": 4,
            "backtracking_batch_size": 32,
            "eval_episodes": 2,
        },
    ),
    "recall_bc": (
        "augment",
        {
            "env_id": "Reacher-v5",
            "dataset": "reacher/random-v0",
            "episodes": 3,
            "hidden": 16,
            "batch_size": 16,
            "num_traces": 9,
            "trace_length": 5,
            "curriculum_every": 300,
            "backtracking_updates": 4,
            "backtracking_batch_size": 32,
            "eval_episodes": 2,
        },
    ),
    "cat_bc": (
        "penalty",
        {
            "env_id": "Reacher-v5",
            "dataset": "reacher/random-v0",
            "episodes": 3,
            "hidden": 16,
            "num_envs": 4,
            "num_steps": 15,
            "cg_iterations": 3,
            "critic_epochs": 1,
            "discriminator_every": 2,
            "num_traces": 4,
            "clone_updates": 20,
            "eval_episodes": 2,
        },
    ),
}
CLONES = ("recall_bc", "cat_bc")  # which learn from a dataset
FOUR_ROOMS = ("recall_a2c_fourroom", "per_a2c_fourroom")
ENVS = dict.fromkeys(FOUR_ROOMS, ("four_room",)) | {"recall_goalgan_ant": ("goals", "u_maze", "point_mass")}
MODES = {
    "recall_a2c_fourroom": ("none", "true", "learned", "random"),
    "per_a2c_fourroom": ("return", "td-error"),
    "recall_sac": ("none", "learned", "random"),
    "recall_trpo": ("none", "learned", "random", "forward"),
    "recall_goalgan_ant": ("none", "learned", "random"),
    "recall_bc": ("none", "noise", "mixup", "bdm", "bdm-cl"),
    "cat_bc": (0.1, 0.0),
}
LINES = {
    "recall_a2c_fourroom": (470, 100),
    "per_a2c_fourroom": (420, 100),
    "recall_sac": (590, 110),
    "recall_trpo": (720, 110),
    "recall_goalgan_ant": (860, 120),
    "recall_bc": (535, 110),
    "cat_bc": (685, 110),
}  # of script, of main
every_script = pytest.mark.parametrize("name", SCRIPTS)
BASE_TAGS = {"charts/episodic_return", "charts/episodic_length", "eval/return"}
BASE_TAGS |= {"losses/policy_loss", "losses/value_loss", "losses/entropy"}
OWN_TAGS = dict.fromkeys(FOUR_ROOMS, {"eval/success_rate", "eval/visited_cells"})
OWN_TAGS["recall_sac"] = {"losses/q_value", "losses/temperature"}
OWN_TAGS["recall_trpo"] = {"losses/kl", "losses/line_search_steps", "losses/explained_variance"}
OWN_TAGS["recall_goalgan_ant"] = OWN_TAGS["recall_trpo"] | {"eval/coverage", "goals/intermediate"}
OWN_TAGS["recall_goalgan_ant"] |= {"losses/discriminator_loss", "losses/generator_loss"}
REPLAY_TAGS = {"replay/policy_loss", "replay/value_loss", "replay/advantage", "replay/weight"}
TAGS = {"none": set(), "random": {"recall/imitation_loss", "recall/trace_length"}}
TAGS["true"] = TAGS["learned"] = TAGS["random"] | {"recall/backtracking_loss"}
SAC_TAGS = {"none": set(), "random": TAGS["random"] | {"recall/start_value"}}
SAC_TAGS["learned"] = SAC_TAGS["random"] | {"recall/backtracking_loss", "recall/action_nll", "recall/state_nll"}
TRPO_TAGS = {mode: tags | {"recall/imitation_kl"} if tags else tags for mode, tags in SAC_TAGS.items()}
TRPO_TAGS["forward"] = TRPO_TAGS["learned"] - TAGS["random"]
TAGS["return"] = TAGS["td-error"] = REPLAY_TAGS
BASE_TAGS = dict.fromkeys(SCRIPTS, BASE_TAGS)
BASE_TAGS["recall_bc"] = {"eval/return", "losses/imitation_loss", "losses/std", "augment/pairs"}
BASE_TAGS["cat_bc"] = BASE_TAGS["recall_sac"] | BASE_TAGS["recall_bc"] | {"augment/return", "augment/success_rate"}
OWN_TAGS["recall_bc"], OWN_TAGS["cat_bc"] = set(), OWN_TAGS["recall_trpo"] | {"losses/generator_reward"}
OWN_TAGS["cat_bc"] |= {"losses/discriminator_loss", "losses/discriminator_accuracy"}
CLONE_TAGS = dict.fromkeys(("none", "noise", "mixup"), {"augment/return"}) | dict.fromkeys((0.1, 0.0), set())
CLONE_TAGS["bdm"] = SAC_TAGS["learned"] - {"recall/imitation_loss", "recall/start_value"}
CLONE_TAGS["bdm-cl"] = CLONE_TAGS["bdm"]


def settings(name, **changes):
    """A short run: five checkpoints and evaluations."""
    short = {"total_timesteps": 1200, "checkpoint_every": 240, "eval_every": 240}
    return short | SCRIPTS[name][1] | changes


def call(name, **arguments):
    module = importlib.import_module(name)
    return module.main(module.Args(**arguments))


def train(name, run_dir, **changes):
    return call(name, **settings(name, run_dir=str(run_dir), **changes))


def flags(**arguments):
    pairs = ((f"--{key.replace('_', '-')}", value) for key, value in arguments.items())
    return [word for flag, value in pairs for word in ([flag] if value is True else [flag, str(value)])]


def execute(*command, cwd, **environment):
    """Runs a Python command; no module of this repository can be found unless it is told."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def fork(function):
    """Runs a function in a child process, which has all imports of this one; returns its number."""
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            function()
        status = 0
    finally:
        os._exit(status)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def load(run_dir):
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)


def differences(one, other, path="checkpoint"):
    """Where two checkpoints, or parts of them, differ in a single bit."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes() else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [found for key in one for found in differences(one[key], other[key], f"{path}[{key!r}]")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path]
        return [f for i, pair in enumerate(zip(one, other, strict=True)) for f in differences(*pair, f"{path}[{i}]")]
    return [] if one == other or (one != one and other != other) else [path]


def tensors(value):
    """All tensors in a checkpoint or a part of one."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in inner for tensor in tensors(part)]


def logged(run_dir):
    """All that TensorBoard shows of a run but its speed: tag to [(step, value)], of pictures their bytes."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0}).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["images"]:
        curves[tag] = [(event.step, event.encoded_image_string) for event in events.Images(tag)]
    curves.pop("charts/SPS", None)
    return curves


def assert_same(run, reference):
    """The same bits in checkpoint and TensorBoard, each step once, the same files."""
    assert differences(load(run), load(reference)) == []
    curves, expected = logged(run), logged(reference)
    assert curves.keys() == expected.keys()
    for tag, points in curves.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
        assert points == expected[tag], tag
    pictures = [sorted(path.name for path in Path(folder).glob("*.png")) for folder in (run, reference)]
    assert pictures[0] == pictures[1]
    arguments = [json.loads(Path(f, "args.json").read_text()) | {"run_dir": None} for f in (run, reference)]
    assert arguments[0] == arguments[1]


def contents(folder):
    """All files (with their bytes) and folders in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, datasets):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A function that gives the folder of a finished run, to be read only; each run is made once."""
    made = {}

    def run(name, **changes):
        key = (name, *sorted(changes.items()))
        if key not in made:
            made[key] = train(name, tmp_path_factory.mktemp("runs") / "run", **changes)
        return made[key]

    return run


def refused(name, flag, **arguments):
    """Asserts that main refuses these arguments, in one line that names the flag."""
    module = importlib.import_module(name)
    with pytest.raises(module.UsageError) as caught:
        call(name, **arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert re.search(rf"--{flag}\b", message), message


# ------------------------------------------------------------------------------------------------------ the file


def source(name):
    return (ROOT / f"{name}.py").read_text()


def places(text):
    """The places of the paper that a text names, "Alg. 1, lines 8 and 9" as two of them."""
    found = set()
    number = r"\(?(\d+)\)?(?:(,| and|-| to) ?\(?(\d+)\)?)?"
    for form, pattern in (("Alg. 1, line {}", rf"Alg\. 1, lines? {number}"), ("Eq. ({})", rf"Eqs?\. {number}")):
        for first, link, last in re.findall(pattern, text):
            numbers = range(int(first), int(last) + 1) if link in ("-", " to") else (first, last or first)
            found |= {form.format(i) for i in numbers}
    return found


# What mazes (of which all states can be listed) and continuous control have under one name, but not alike.
OF_A_DOMAIN = ("mlp", "BacktrackingModel", "ReplayBuffer", "update_actor_critic", "update_backtracking_model")
OF_A_DOMAIN += ("recall_traces", "imitate", "play", "collect_rollout")
# What each base algorithm has of its own, and what each script: environments, and where its valuable states are.
OF_AN_ALGORITHM, OF_A_SCRIPT = ("Actor", "Critic", "act"), ("high_value_states",)
# The generator and the clone of cat_bc imitate no traces: an Actor without the likelihood of clipped actions.
OWN = (("make_env", "recall_goalgan_ant"), ("Actor", "cat_bc"))


def test_functions_of_one_name_are_the_same_to_the_letter():
    """Whoever has read one script knows half of the next. Args and main differ: they are what a script is about."""
    found = {}
    for name in SCRIPTS:
        text = source(name)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("Args", "main"):
                key = (node.name, name in FOUR_ROOMS) if node.name in OF_A_DOMAIN else node.name
                algorithm = "recall_trpo" if name in ("recall_goalgan_ant", "cat_bc") else name
                key = (node.name, algorithm) if node.name in OF_AN_ALGORITHM else key
                own = node.name in OF_A_SCRIPT or (node.name, name) in OWN
                key = (node.name, name) if own else key
                found.setdefault(key, {})[name] = ast.get_source_segment(text, node)
            if isinstance(node, ast.If):  # under __name__ == "__main__"
                found.setdefault("the command line", {})[name] = ast.get_source_segment(text, node)
    everywhere = {name for name, texts in found.items() if len(texts) == len(SCRIPTS)}
    assert everywhere == {"UsageError", "read_args", "check", "open_run", "load_checkpoint", "the command line"}
    assert {
        ("update_actor_critic", True),
        ("recall_traces", False),
        ("Actor", "recall_trpo"),
        "generalized_advantages",
        "make_env",
        "try_out",
        "load_expert",
        "clone",
    } <= found.keys()
    for name, texts in found.items():
        assert len({*texts.values()}) == 1, f"{name} differs"


@every_script
def test_a_script_is_minimal(name):
    lines, main_lines = LINES[name]
    tree = ast.parse(source(name))
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert len(source(name).splitlines()) <= lines and main.end_lineno - main.lineno < main_lines
    assert [node for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []  # which python -O leaves out


@every_script
def test_every_line_of_the_algorithm_and_every_equation_is_marked(name):
    """Equations anywhere; the algorithm from main on, so that a reader finds it there."""
    main = source(name)[source(name).index("\ndef main(") :]
    if name == "cat_bc":
        assert {"Eq. (1)", "Eq. (5)"} <= places(source(name))  # of the slides
    elif "recall" in name:
        no_policy = {4, 6, 7} if name == "recall_bc" else set()  # is executed and improved by reinforcement learning
        assert {f"Alg. 1, line {i}" for i in {*range(1, 14)} - no_policy} <= places(main)
        assert {f"Eq. ({i})" for i in range(1, 4)} <= places(source(name))
    else:
        assert {f"Alg. 1, line {i}" for i in range(4, 16)} <= places(main)
        assert "Eq. (1)" in places(source(name))


@every_script
def test_flags_are_explained(name, capsys):
    """The comment behind or above each field of Args is its help."""
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as exit:
        module.tyro.cli(module.Args, args=["--help"])
    assert exit.value.code == 0
    words = re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out))
    for field in vars(module.Args()):
        flag = f"--{field.replace('_', '-')}"
        (behind,) = re.findall(rf"(?m)^    {field}: [^#\n]+?(?:  # (.+))?$", source(name))
        (above,) = re.findall(rf"((?:    # .+\n)*)    {field}: ", source(name))
        help = behind or " ".join(line.strip(" #") for line in above.splitlines())
        assert help and flag in words and " ".join(help.split()) in words, flag


@every_script
def test_pep_723_block_agrees_with_requirements_and_imports(name):
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source(name))["content"]
    script = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    requirements = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert {*script["dependencies"]} <= requirements
    assert sys.version_info[:2] >= tuple(map(int, script["requires-python"].removeprefix(">=").split(".")))
    local = "".join((ROOT / "envs" / f"{module}.py").read_text() for module in ENVS.get(name, ()))
    imported = re.findall(r"(?m)^ *(?:import|from) (\w+)", source(name) + local)
    packages = {"PIL": "pillow", "minari": "minari[hdf5]"}
    expected = {packages.get(module, module) for module in imported} - {*sys.stdlib_module_names, "envs"}
    expected |= {"imageio"} if "mujoco" in expected else set()  # which Gymnasium's MuJoCo environments import
    assert "torch.utils.tensorboard" in source(name)
    declared = {dependency.split("==")[0] for dependency in script["dependencies"]}
    assert declared == expected | {"tensorboard"}


@every_script
def test_copied_alone_it_is_the_same_run_by_command_line(name, tmp_path, finished):
    """With envs/ beside it where it needs that; and no progress bar outside a terminal."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    if name in ENVS:
        shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    before = {*contents(tmp_path)}
    result = execute(f"{name}.py", *flags(**settings(name)), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert {path for path in contents(tmp_path) if not path.is_relative_to(tmp_path / "runs")} == before
    mode = vars(importlib.import_module(name).Args())[SCRIPTS[name][0]]
    env_id = SCRIPTS[name][1].get("env_id", "FourRoom-v0")
    assert re.fullmatch(rf"{env_id}__{name}__{mode}__seed1__\d+", run.name)
    assert_same(run, finished(name))


# ------------------------------------------------------------------------------------------------------ bits


@every_script
def test_same_seed_same_bits_and_another_seed_is_another_run(name, tmp_path, finished):
    assert_same(train(name, tmp_path / "again"), finished(name))
    other = train(name, tmp_path / "other", seed=2)
    assert differences(load(other)["actor"], load(finished(name))["actor"]) != []
    tag = "losses/imitation_loss" if name in CLONES else "charts/episodic_return"
    assert logged(other)[tag] != logged(finished(name))[tag]


@pytest.mark.parametrize("name", ["recall_a2c_fourroom", "recall_sac", "recall_trpo", "recall_goalgan_ant"])
def test_recall_flags_change_nothing_without_recall(name, tmp_path, monkeypatch, finished):
    """--recall none draws the same random numbers whatever they say, and no recall code is executed."""
    others = {"trace_length": 3, "num_traces": 5, "recall_every": 2, "recall_updates": 3, "backtracking_updates": 2}
    others |= {"backtracking_batch_size": 7, "backtracking_lr": 0.5, "imitation_lr": 0.5}
    others |= {"top_fraction": 0.5} if name != "recall_goalgan_ant" else {"buffer_size": 9}
    for part in ("BacktrackingModel", "update_backtracking_model", "high_value_states", "recall_traces", "imitate"):
        monkeypatch.setattr(f"{name}.{part}", lambda *args, part=part, **kwargs: pytest.fail(f"{part} was called"))
    run, reference = train(name, tmp_path / "run", recall="none", **others), finished(name, recall="none")
    assert differences(load(run), load(reference)) == []
    assert logged(run) == logged(reference)


@every_script
def test_evaluation_changes_no_training_number(name, tmp_path, finished):
    run = train(name, tmp_path / "run", eval_every=10**9, capture_video=True)
    assert [step for step, _ in logged(run)["eval/return"]] == ([1200] if name == "cat_bc" else [0, 1200])
    assert differences(load(run), load(finished(name))) == []


# ------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    "name, changes",
    [
        ("recall_a2c_fourroom", {"recall": "true"}),
        ("recall_a2c_fourroom", {"recall": "learned"}),
        ("recall_a2c_fourroom", {"recall": "none"}),
        ("per_a2c_fourroom", {"priority": "td-error"}),
        ("recall_sac", {"recall": "learned"}),
        ("recall_sac", {"recall": "none", "num_envs": 3, "buffer_size": 1000}),
        ("recall_trpo", {"recall": "learned"}),
        ("recall_trpo", {"recall": "forward", "env_id": "Hopper-v5", "eval_episodes": 1}),
        ("recall_trpo", {"recall": "none", "num_envs": 3, "num_steps": 21}),
        ("recall_goalgan_ant", {"recall": "learned"}),
        ("recall_goalgan_ant", {"recall": "none", "checkpoint_every": 120, "inner_iterations": 3}),
        ("recall_bc", {"augment": "bdm-cl", "with_expert": 0.5}),
        ("recall_bc", {"augment": "noise"}),
        ("cat_bc", {"num_envs": 3, "num_steps": 21}),
    ],
)
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(name, changes, tmp_path, finished):
    """SIGKILL, five times, each after one to four checkpoints more and a random time."""
    longer = {"total_timesteps": 4800, **changes}
    run, rng, reached = tmp_path / "run", random.Random(1), [0]
    for kill in range(5):
        arguments = {"resume": str(run)} if kill else settings(name, run_dir=str(run), **longer)
        child = fork(lambda arguments=arguments: call(name, **arguments))
        path, seen, wanted = run / "checkpoint.pt", set(), rng.randint(2, 5)
        while len(seen) < wanted:
            time.sleep(0.0005)
            if path.exists():
                seen.add(path.stat().st_mtime_ns)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL, "it ended before the signal"
        reached.append(load(run)["progress"][0])
    assert reached == sorted(reached) and 0 < reached[1] < reached[-1] < 4800
    assert wait(fork(lambda: call(name, resume=str(run)))) == 0
    assert_same(run, finished(name, **longer))


@every_script
def test_killed_before_the_first_checkpoint_and_resumed_equals_uninterrupted(name, tmp_path, finished):
    train(name, tmp_path / "run", total_timesteps=20)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    call(name, resume=tmp_path / "run", total_timesteps=1200)
    assert_same(tmp_path / "run", finished(name))


@every_script
def test_a_run_that_grows_equals_a_long_one(name, tmp_path, finished):
    """Where the shorter one ends with a checkpoint that the longer one makes too."""
    run = train(name, tmp_path / "run", total_timesteps=720)
    call(name, resume=run, total_timesteps=1200)
    assert_same(run, finished(name))
    assert json.loads((run / "args.json").read_text())["total_timesteps"] == 1200
    call(name, resume=run)  # of a finished run nothing changes
    assert_same(run, finished(name))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch, finished):
    name, write, written = "recall_a2c_fourroom", Path.write_bytes, []

    def fill(path, data):
        written.append(data)
        if len(written) == 4:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        with pytest.raises(OSError, match=r"^[^\n]*No space left on device; --resume \S*run goes on[^\n]*$"):
            train(name, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.tmp").exists()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == written[2]
    call(name, resume=tmp_path / "run")
    assert_same(tmp_path / "run", finished(name))


def test_ctrl_c_says_how_to_go_on(tmp_path, finished):
    command = [sys.executable, str(ROOT / "recall_a2c_fourroom.py"), "--run-dir", "run"]
    command += flags(**settings("recall_a2c_fourroom", total_timesteps=10**6))
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # background jobs ignore it
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, **options)
    try:
        while not (tmp_path / "run" / "checkpoint.pt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.fullmatch(r"error: stopped; --resume run goes on from the last checkpoint\n", errors), errors


# ------------------------------------------------------------------------------------------------------ folder


def test_two_processes_that_start_in_the_same_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    name = "recall_a2c_fourroom"
    runs = [call(name, **settings(name)) for _ in range(3)]
    assert len({*runs}) == 3 and all((run / "checkpoint.pt").exists() for run in runs)
    first = "FourRoom-v0__recall_a2c_fourroom__true__seed1__1700000000"
    assert sorted(run.name for run in runs) == [first, f"{first}_2", f"{first}_2_2"]


@pytest.mark.parametrize("resumed", [False, True])
def test_two_processes_with_one_folder(resumed, tmp_path, finished):
    """One goes on, undisturbed, the others are refused in one line; also where all of them start at once."""
    name, run = "recall_a2c_fourroom", tmp_path / "run"
    if resumed:
        train(name, run, total_timesteps=240)
    arguments = {"resume": str(run), "total_timesteps": 1200} if resumed else settings(name, run_dir=str(run))
    statuses, module = [], importlib.import_module(name)

    def start():
        try:
            call(name, **arguments)
        except module.UsageError:
            os._exit(2)

    statuses = [wait(child) for child in [fork(start) for _ in range(4)]]
    if resumed:  # one that comes when the first has ended finds a finished run
        assert statuses.count(0) >= 1 and set(statuses) <= {0, 2}
    else:
        assert sorted(statuses) == [0, 2, 2, 2]
    assert_same(run, finished(name))


def test_a_run_that_is_at_work_is_not_resumed_by_another_process(tmp_path):
    """Its folder is free again as soon as its process is gone, however it ended."""
    name, run = "recall_a2c_fourroom", tmp_path / "run"
    child = fork(lambda: train(name, run, total_timesteps=10**7))
    while not (run / "checkpoint.pt").exists():
        time.sleep(0.001)
    module = importlib.import_module(name)
    for arguments in ({"resume": str(run)}, settings(name, run_dir=str(run))):
        with pytest.raises(module.UsageError, match=r"another process|--run-dir must be new or empty"):
            call(name, **arguments)
    assert call(name, evaluate=str(run)) == run  # which writes nothing
    os.kill(child, signal.SIGKILL)
    wait(child)
    step = load(run)["progress"][0]
    call(name, resume=str(run), total_timesteps=step + 20)
    assert load(run)["progress"][0] == step + 20


@every_script
def test_a_run_holds_arguments_checkpoint_events_and_pictures(name, finished):
    run = finished(name)
    names = sorted(path.name for path in run.iterdir() if not path.name.startswith("events.out.tfevents."))
    pictures = [n for n in names if n.endswith(".png")]
    assert [n for n in names if n not in (*pictures, "lock")] == ["args.json", "checkpoint.pt"]
    assert {f"pictures/{n.removesuffix('.png')}" for n in pictures} == {t for t in logged(run) if t.startswith("pict")}
    drawn = {"visits.png", "values.png", "traces.png" if "recall" in name else "replay.png"}
    assert {*pictures} == (drawn if name in FOUR_ROOMS else set())
    assert settings(name).items() <= json.loads((run / "args.json").read_text()).items()
    checkpoint = load(run)
    assert checkpoint["progress"][0] == 1200
    assert all(tensor.isfinite().all() for tensor in tensors(checkpoint))


@pytest.mark.parametrize("name, mode", [(name, mode) for name in SCRIPTS for mode in MODES[name]])
def test_tags_are_spelt_alike(name, mode, finished):
    run = finished(name, **{SCRIPTS[name][0]: mode})
    curves = {tag: points for tag, points in logged(run).items() if not tag.startswith("pictures/")}
    tags = {"recall_sac": SAC_TAGS, "recall_trpo": TRPO_TAGS, "recall_goalgan_ant": TRPO_TAGS}
    tags = (tags | dict.fromkeys(CLONES, CLONE_TAGS)).get(name, TAGS)
    assert {*curves} == BASE_TAGS[name] | OWN_TAGS[name] | tags[mode]
    assert all(np.isfinite([value for _, value in points]).all() for points in curves.values())
    evaluated = [1200] if name == "cat_bc" else [0, 240, 480, 720, 960, 1200]  # there is a clone only at the end
    assert [step for step, _ in curves["eval/return"]] == evaluated
    assert all(points[-1][0] == 1200 for points in curves.values())
    speeds = EventAccumulator(str(run)).Reload().Scalars("charts/SPS")
    assert all(event.value > 0 for event in speeds[1:])


# ------------------------------------------------------------------------------------------------------ evaluation


@every_script
def test_evaluate_plays_the_last_evaluation_and_writes_only_a_video(name, tmp_path, capsys, finished):
    run = train(name, tmp_path / "run")
    before = contents(tmp_path)
    capsys.readouterr()
    call(name, evaluate=str(run))
    printed = capsys.readouterr().out
    value = re.search(r"(?m)^(?:mean )?return (-?\d+\.\d+)", printed)[1]
    assert value == f"{logged(run)['eval/return'][-1][1]:.2f}"
    if name not in FOUR_ROOMS:
        returns = [float(number) for number in re.findall(r"(?m)^episode \d: return (-?\d+\.\d+)$", printed)]
        assert len(returns) == 2 and np.mean(returns) == pytest.approx(float(value), abs=0.011)
        call(name, evaluate=str(run), eval_episodes=3)
        assert capsys.readouterr().out.count("episode ") == 3
    assert contents(tmp_path) == before
    call(name, evaluate=str(run), capture_video=True)
    after = contents(tmp_path)
    (video,) = after.keys() - before.keys()
    assert {path: after[path] for path in before} == before
    with Image.open(video) as image:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]  # equal frames are joined
        steps = re.search(r"in (\d+) steps", printed)  # Reacher's 50 steps take a second
        seconds = 0.8 if name == "recall_goalgan_ant" else 1  # two episodes of 20 steps at 50 steps a second
        assert (image.format, sum(durations)) == ("GIF", 100 * int(steps[1]) + 1500 if steps else 1000 * seconds)
    assert [*run.glob("agent.gif")] == []  # training writes one only when told
    assert [*train(name, tmp_path / "other", capture_video=True).glob("agent.gif")] != []


@every_script
def test_an_agent_is_loaded_in_five_lines_of_python(name, tmp_path, finished):
    """Those of its page, with the folder of a run in place of RUN_DIR."""
    page = (ROOT / "docs" / f"{name}.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 5
    larger = {
        "recall_sac": {"env_id": "HalfCheetah-v5", "hidden": 256},
        "recall_trpo": {"env_id": "HalfCheetah-v5", "hidden": 64},
        "recall_goalgan_ant": {"env_id": "PointUMaze-v0", "hidden": 64},
        "recall_bc": {"env_id": "HalfCheetah-v5", "hidden": 64, "dataset": "halfcheetah/random-v0"},
        "cat_bc": {"env_id": "HalfCheetah-v5", "hidden": 64, "dataset": "halfcheetah/random-v0"},
    }.get(name, {"size": 15})
    run = train(name, tmp_path / "run", total_timesteps=20, **larger)
    scope = {}
    exec(code.replace("RUN_DIR", str(run)), scope)
    module = importlib.import_module(name)
    if name not in FOUR_ROOMS:
        hidden = larger["hidden"]
        state_dim, action_dim = (17, 6) if larger["env_id"] == "HalfCheetah-v5" else (6, 2)
        actor, states = module.Actor(state_dim, action_dim, hidden), torch.randn(5, state_dim)
        actor.load_state_dict(load(run)["actor"])
        torch.testing.assert_close(scope["action"](states), torch.from_numpy(module.act(actor, states.numpy(), True)))
        return
    actor = module.mlp(torch.nn.Embedding(225, 64), 4)
    actor.load_state_dict(load(run)["actor"])
    expected = torch.softmax(actor(torch.arange(225)), dim=1)
    torch.testing.assert_close(scope["policy"], expected.detach())


# ------------------------------------------------------------------------------------------------------ surroundings


def test_a_program_with_flags_of_its_own_trains_in_a_thread_and_goes_on(tmp_path):
    """From a source without a file, too, as in a notebook, and with python -O, which removes every assert."""
    code = f"""
import sys, threading
source = open({str(ROOT / "recall_a2c_fourroom.py")!r}).read()
cell = {{"__name__": "cell"}}
exec(compile(source, "<cell>", "exec"), cell)
import recall_a2c_fourroom as script
arguments = {settings("recall_a2c_fourroom")!r}
runs = []
def work(Args, main):
    run = main(Args(run_dir="", **arguments))
    runs.append(main(Args(resume=str(run), total_timesteps=1240)))
for scope in (vars(script), cell):
    thread = threading.Thread(target=work, args=(scope["Args"], scope["main"]))
    thread.start(); thread.join()
assert False, "-O removes this"
print(len(set(runs)), sys.argv[1:])
"""
    result = execute("-O", "-c", code, "--seed", "x", "--own-flag", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "2 ['--seed', 'x', '--own-flag']"


def test_two_runs_in_two_threads_of_one_program(tmp_path):
    """Each has its own folder; they share torch's random numbers."""
    threads = [
        threading.Thread(target=train, args=("recall_a2c_fourroom", tmp_path / folder)) for folder in ("one", "two")
    ]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert all((tmp_path / folder / "checkpoint.pt").exists() for folder in ("one", "two"))


@every_script
def test_importing_does_nothing(name, tmp_path):
    """No output, no file, no look at the command line, and nothing changed for the whole process."""
    state = (
        "[torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.get_num_threads(),"
        " torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),"
        " signal.getsignal(2), signal.getsignal(15)]"
    )
    code = f"import signal, torch, numpy as np; before = {state}; import {name}; assert {state} == before"
    result = execute("-c", code, "--no-such-flag", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------------------------------------ bad input


@every_script
def test_refuses_numbers_out_of_range(name, tmp_path):
    module = importlib.import_module(name)
    may_be_zero, tried = ["seed", "num_replayed_goals"] + ["backtracking_updates"] * (name == "recall_bc"), 0
    for field, annotation in module.Args.__annotations__.items():
        bad = []
        if annotation in (float, float | None):
            bad = [-1.0, float("nan"), float("inf")]
        if annotation in (int, int | None):
            bad = [-1] if field in may_be_zero else [-1, 0]
        for number in bad:
            refused(name, field.replace("_", "-"), **settings(name) | {field: number})
            tried += 1
    assert tried > 30
    own = {
        "recall_sac": (("tau", 1.5), ("temperature", 0.0), ("top_fraction", 0.0)),
        "recall_trpo": (("recall_until", 1.5), ("max_kl", 0.0)),
    }
    own |= {"recall_bc": (("with_expert", 1.5), ("mixup_alpha", 0.0)), "cat_bc": (("least_success", 1.5),)}
    own["recall_goalgan_ant"] = (("dims", 7), ("most_success", 1.5), ("least_success", 0.9), ("max_kl", 0.0))
    discount = () if name == "recall_bc" else (("gamma", 1.5),)
    for field, number in (*own.get(name, (("size", 6), ("gae_lambda", 1.01))), *discount, ("seed", 2**64)):
        refused(name, field.replace("_", "-"), **settings(name) | {field: number})
    assert contents(tmp_path) == {}


@every_script
def test_refuses_a_folder_that_is_not_empty_or_cannot_be_made(name, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    before = contents(tmp_path)
    refused(name, "run-dir", **settings(name, run_dir=str(tmp_path / "full")))
    for path in ("full/file", "full/file/run", "name" * 100):
        with pytest.raises(OSError, match=re.escape(path.split("/")[0])):
            call(name, **settings(name, run_dir=str(tmp_path / path)))
    assert contents(tmp_path) == before


@every_script
def test_refuses_to_go_on_with_other_arguments(name, tmp_path, finished):
    run = train(name, tmp_path / "run")
    before = contents(tmp_path)
    for flag in ("resume", "evaluate"):
        own = ("num_traces", 3) if name == "recall_bc" else ("gamma", 0.5)
        for field, value in (("seed", 7), ("eval_every", 3), ("run_dir", "other"), own):
            refused(name, field.replace("_", "-"), **{flag: run}, **settings(name) | {field: value})
        refused(name, "total-timesteps", **{flag: run}, total_timesteps=-1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["recall_sac"])  # all have the same lines for it
def test_the_command_line_is_refused_in_one_line(name, tmp_path, finished):
    """Status 2, nothing on stdout, no file: bad flags, bad folders, and a default value where the run has another."""
    run = str(train(name, tmp_path / "run", seed=3))
    before = contents(tmp_path)
    script = str(ROOT / f"{name}.py")
    for words, named in (
        (["--hidden", "0"], "--hidden"),
        (["--resume", run, "--seed", "1"], "--seed"),
        (["--run-dir", f"{run}/args.json"], "args.json"),
    ):
        result = execute(script, *words, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, ""), words
        assert re.fullmatch(rf"error: [^\n]*{named}[^\n]*\n", result.stderr), result.stderr
    result = execute(script, f"--{SCRIPTS[name][0]}", "perfectly", cwd=tmp_path)
    assert result.returncode == 2 and f"--{SCRIPTS[name][0]}" in result.stderr
    assert contents(tmp_path) == before


class Attack:
    """A pickle that makes a file in the working directory."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_damaged_or_foreign_checkpoint_is_one_line_and_its_code_is_not_executed(tmp_path, finished):
    name = "recall_a2c_fourroom"
    run = train(name, tmp_path / "run")
    whole = (run / "checkpoint.pt").read_bytes()
    torch.save({"actor": Attack()}, tmp_path / "attack")
    torch.save(load(run) | {"actor": load(train(name, tmp_path / "larger", size=8))["actor"]}, tmp_path / "larger.pt")
    module, damaged = importlib.import_module(name), [whole[: len(whole) // 2], b"", b"garbage" * 1000]
    for data in (*damaged, *((tmp_path / file).read_bytes() for file in ("attack", "larger.pt"))):
        (run / "checkpoint.pt").write_bytes(data)
        before = contents(run)
        for flag in ("resume", "evaluate"):
            with pytest.raises(module.UsageError, match=r"^[^\n]*run has no checkpoint of this run[^\n]*$"):
                call(name, **{flag: str(run)})
        assert {path: data for path, data in contents(run).items() if path.name != "args.json"} == {
            path: data for path, data in before.items() if path.name != "args.json"
        }
    (run / "checkpoint.pt").unlink()
    with pytest.raises(module.UsageError, match="no checkpoint"):
        call(name, evaluate=str(run))
    assert not Path("executed").exists()
    torch.load(tmp_path / "attack", weights_only=False)
    assert Path("executed").exists()  # it would have worked


@every_script
def test_a_loss_that_diverges_ends_the_run_and_keeps_a_good_checkpoint(name, tmp_path):
    fields = [f for f in vars(importlib.import_module(name).Args()) if f.endswith(("learning_rate", "_lr"))]
    for field in fields:
        run = tmp_path / field
        if (name, field) == ("recall_bc", "backtracking_lr"):  # its traces are made before the run
            refused(name, "backtracking-lr", **settings(name) | {field: 1e38})
            continue
        with pytest.raises(FloatingPointError) as caught:
            train(name, run, **{SCRIPTS[name][0]: MODES[name][1], field: 1e38})
        message = str(caught.value)
        if field == "gan_lr":  # the first goals are made before the first checkpoint
            assert "at step 0" in message and not (run / "checkpoint.pt").exists()
            continue
        found = r"(policy|value|weights|\w+/\w+) is (nan|inf|-inf) at step \d+|an action is not finite[^\n;]*"
        assert re.fullmatch(rf"({found}); --resume \S+ goes on [^\n]*", message)
        assert 0 <= load(run)["progress"][0] < int((re.search(r"\bstep (\d+)\b", message) or [0, 1200])[1])
        assert all(tensor.isfinite().all() for tensor in tensors(load(run)))


def test_settings_of_every_flag_run(tmp_path):
    """One run with another value of every flag that has one."""
    name = "recall_a2c_fourroom"
    others = {"seed": 5, "size": 8, "num_envs": 3, "num_steps": 7, "learning_rate": 1e-3, "gamma": 0.9}
    others |= {"gae_lambda": 0.5, "ent_coef": 0.0, "vf_coef": 1.0, "max_grad_norm": 1.0, "num_traces": 3}
    others |= {"trace_length": 5, "recall_every": 2, "recall_updates": 3, "backtracking_updates": 1}
    others |= {"backtracking_batch_size": 9, "backtracking_lr": 1e-3, "imitation_lr": 1e-3, "top_trajectories": 2}
    for mode, start in itertools.product(("true", "learned"), ("value", "goal")):
        run = tmp_path / f"{mode} {start}"
        train(name, run, recall=mode, start_states=start, top_fraction=0.5, capture_video=True, **others)
        assert load(run)["progress"][0] == 1218
        assert "recall/imitation_loss" in logged(run)


def test_settings_of_every_flag_of_soft_actor_critic_run(tmp_path):
    others = {"seed": 5, "env_id": "Pendulum-v1", "num_envs": 3, "max_episode_steps": 30, "hidden": 8, "gamma": 0.9}
    others |= {"learning_rate": 1e-3, "tau": 0.1, "batch_size": 8, "buffer_size": 500, "learning_starts": 90}
    others |= {"updates_per_step": 0.2, "temperature": 0.3, "reward_scale": 2.0, "num_traces": 3, "trace_length": 4}
    others |= {"recall_every": 7, "recall_updates": 9, "recall_tuples": 60, "top_fraction": 0.5, "action_noise": 0.5}
    others |= {"state_noise": 1.0, "trace_limit": 4.0, "backtracking_updates": 2, "backtracking_batch_size": 9}
    others |= {"backtracking_lr": 1e-2, "imitation_lr": 1e-3, "device": "cpu", "eval_episodes": 1}
    others |= {"checkpoint_every": 100, "eval_every": 100}
    run = train("recall_sac", tmp_path / "run", **others)
    assert load(run)["progress"][0] == 1200
    curves = logged(run)
    assert {"recall/imitation_loss", "recall/trace_length"} <= curves.keys()
    assert [value for _, value in curves["losses/temperature"]] == pytest.approx(
        [0.3] * len(curves["losses/temperature"])
    )
    assert curves["charts/episodic_length"][-1][1] == 30
    ant = {"env_id": "Ant-v5", "contact_forces": False, "total_timesteps": 20, "torch_threads": 2}
    assert load(train("recall_sac", tmp_path / "ant", **ant))["buffer"]["ring"][0].shape == (20, 27)


def test_settings_of_every_flag_of_trust_region_policy_optimization_run(tmp_path):
    others = {"seed": 5, "env_id": "Pendulum-v1", "num_envs": 3, "max_episode_steps": 30, "hidden": 8, "gamma": 0.9}
    others |= {"num_steps": 20, "gae_lambda": 0.5, "max_kl": 0.1, "cg_iterations": 2, "cg_damping": 0.0}
    others |= {"line_search_steps": 3, "critic_lr": 1e-2, "critic_epochs": 2, "critic_batch_size": 16, "num_traces": 3}
    others |= {"trace_length": 4, "recall_every": 3, "recall_updates": 2, "recall_until": 0.8, "buffer_size": 200}
    others |= {"top_trajectories": 3, "top_fraction": 0.5, "backtracking_updates": 2, "backtracking_batch_size": 9}
    others |= {"backtracking_lr": 1e-2, "imitation_lr": 1e-3, "imitation_kl": 1e-4, "action_noise": 0.5}
    others |= {"state_noise": 1.0, "trace_limit": 4.0, "device": "cpu", "eval_episodes": 1}
    for mode in ("learned", "forward"):
        run = train("recall_trpo", tmp_path / mode, recall=mode, start_states="reward", **others)
        step, _, buffer = load(run)["progress"]
        assert step == 1200 and 170 < sum(len(columns[0]) for _, columns in buffer) <= 200
        curves = logged(run)
        assert curves["charts/episodic_length"][-1][1] == 30
        assert max(value for _, value in curves["recall/imitation_kl"]) <= 1e-4
    ant = {"env_id": "Ant-v5", "contact_forces": False, "total_timesteps": 60, "torch_threads": 2}
    assert load(train("recall_trpo", tmp_path / "ant", **ant))["actor"]["net.0.weight"].shape == (16, 27)


def test_settings_of_every_flag_of_goal_gan_run(tmp_path):
    others = {"seed": 5, "dims": 3, "num_envs": 5, "num_steps": 12, "max_episode_steps": 15, "eval_steps": 10}
    others |= {"inner_iterations": 3, "hidden": 8, "learn_std": False, "gamma": 0.9, "gae_lambda": 0.5, "max_kl": 0.1}
    others |= {"cg_iterations": 2, "cg_damping": 0.01, "line_search_steps": 3, "critic_lr": 1e-2, "critic_epochs": 2}
    others |= {"critic_batch_size": 16, "num_goals": 7, "num_replayed_goals": 0, "label_rollouts": 2}
    others |= {"least_success": 0.0, "most_success": 1.0, "goal_distance": 0.0, "gan_batch_size": 50}
    others |= {"gan_lr": 9e-4, "num_traces": 3, "trace_length": 4, "recall_every": 2, "recall_updates": 3}
    others |= {"buffer_size": 20, "backtracking_updates": 2, "backtracking_batch_size": 9, "backtracking_lr": 1e-2}
    others |= {"imitation_lr": 1e-2, "imitation_kl": 1e-4, "action_noise": 0.5, "state_noise": 1.0, "trace_limit": 9.0}
    others |= {"device": "cpu", "eval_episodes": 1, "env_threads": 1}
    train("recall_goalgan_ant", tmp_path / "threads", torch_threads=2, total_timesteps=120)
    run = train("recall_goalgan_ant", tmp_path / "run", **others)
    step, _, goals, old_goals, buffer = load(run)["progress"]
    assert step == 1200 and goals.shape == (7, 3) and len(buffer[0]) == 20 and len(old_goals) > 60
    assert load(run)["actor"]["log_std"].tolist() == [0.0] * 3
    assert max(value for _, value in logged(run)["recall/imitation_kl"]) <= 1e-4


def test_settings_of_every_flag_of_clones_run(tmp_path):
    others = {"seed": 5, "max_episode_steps": 30, "hidden": 8, "episodes": 2, "expert_steps": 9, "learning_rate": 1e-3}
    others |= {"batch_size": 9, "num_traces": 5, "uniform_noise": 0.1, "device": "cpu"}
    others |= {"total_timesteps": 120, "eval_every": 60, "checkpoint_every": 60}
    of_traces = {"with_expert": 0.3, "mixup_alpha": 1.0, "start_states": "all", "trace_length": 3, "trace_limit": 9.0}
    of_traces |= {"curriculum_every": 30, "backtracking_updates": 2, "backtracking_batch_size": 9}
    of_traces |= {"backtracking_lr": 1e-2, "action_noise": 0.5, "state_noise": 2.0}
    for mode, most in (("none", 18), ("noise", 45), ("mixup", 18), ("bdm", 15), ("bdm-cl", 18)):
        pairs = logged(train("recall_bc", tmp_path / mode, augment=mode, **others, **of_traces))["augment/pairs"]
        assert pairs[-1][1] == most if mode in ("none", "noise", "mixup") else 0 < pairs[0][1] <= pairs[-1][1] <= most
    of_generator = {"num_envs": 3, "num_steps": 20, "gamma": 0.9, "gae_lambda": 0.5, "max_kl": 0.1, "cg_damping": 0.0}
    of_generator |= {"line_search_steps": 3, "critic_lr": 1e-2, "critic_epochs": 2, "critic_batch_size": 16}
    of_generator |= {"discriminator_lr": 1e-2, "discriminator_every": 1, "discriminator_entropy": 0.1}
    of_generator |= {"penalty": 0.5, "least_success": 0.9, "clone_updates": 3, "checkpoint_every": 120}
    curves = logged(train("cat_bc", tmp_path / "cat", **others | of_generator))
    assert curves["charts/episodic_length"][-1][1] == 30 and curves["augment/pairs"][-1][1] % 30 == 0


def test_a_dataset_that_is_missing_or_of_another_task_is_one_line(tmp_path):
    for name in CLONES:
        refused(name, "dataset", **settings(name, dataset="nobody/knows-v0"))
        refused(name, "dataset", **settings(name, dataset="not an id"))
        refused(name, "episodes", **settings(name, episodes=99))
        refused(name, "env-id", **settings(name, dataset="halfcheetah/random-v0"))
    assert contents(tmp_path) == {}
