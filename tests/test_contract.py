"""What recall_goalgan_ant.py promises: see SCRIPTS. The other scripts: tests/test_runs.py."""

import ast
import errno
import importlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tokenize
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]


RECALL_TRACES = frozenset({f"Alg. 1, line {i}" for i in range(1, 14)} | {f"Eq. ({i})" for i in range(1, 4)})


class Script(NamedTuple):
    """What the tests have to know about a script."""

    steps: int  # environment steps of a run of about half a second
    arguments: dict  # small ones, with which a run of that many steps recalls
    needs: tuple[str, ...] = ()  # local folders
    refused: tuple[tuple[str, dict], ...] = ()  # further bad input: (flag that the error names, arguments)
    left_out: frozenset[str] = frozenset()  # flags and tags that it rightly lacks
    places: frozenset[str] = RECALL_TRACES  # the places of the paper that it implements
    mode: str = "recall"  # the flag that chooses the method, and names the run
    tags: frozenset[str] = frozenset()  # further ones


FLAGS = ["seed", "total-timesteps", "env-id", "num-envs", "recall", "trace-length", "num-traces", "recall-every"]
FLAGS += ["recall-updates", "backtracking-updates", "backtracking-batch-size", "backtracking-lr", "imitation-lr"]
FLAGS += ["top-fraction", "top-trajectories", "eval-every", "eval-episodes", "checkpoint-every", "run-dir", "resume"]
FLAGS += ["evaluate", "capture-video", "device", "torch-threads"]
RECALL = ("recall", "trace", "num-traces", "backtracking", "imitation", "top")  # what flags of the method start with

SCRIPTS = {
    "recall_goalgan_ant": Script(
        steps=2000,
        arguments={
            "env_id": "PointMass-v0",
            "hidden": 16,
            "num_envs": 10,
            "num_steps": 10,
            "max_steps": 6,
            "inner_iterations": 2,
            "cg_iterations": 3,
            "critic_epochs": 1,
            "num_goals": 20,
            "label_rollouts": 1,
            "goal_noise": 0.1,
            "gan_updates": 20,
            "trace_limit": 1e6,
            "state_noise": 1000.0,  # so that traces leave the goals' surroundings, though these points hardly move
            "recall_updates": 1,
            "num_traces": 8,
            "trace_length": 5,
            "backtracking_updates": 4,
            "backtracking_batch_size": 32,
        },
        needs=("envs",),
        refused=(
            ("env-id", {"env_id": "HalfCheetah-v5"}),
            ("contact-forces", {"contact_forces": True}),
            ("dims", {"dims": 7}),
            ("max-kl", {"max_kl": 0.0}),
            ("num-traces", {"num_traces": 10**4, "recall_updates": 10**4}),
            ("trace-length", {"trace_length": 10**6}),
            ("backtracking-updates", {"backtracking_updates": 10**7}),
            ("num-envs", {"num_envs": 10**5, "num_steps": 10**5}),
            ("max-steps", {"max_steps": 10**6}),
            ("dims", {"env_id": "PointUMaze-v0", "dims": 3}),
            ("least-success", {"least_success": 0.9, "most_success": 0.1}),
            ("goal-distance", {"goal_distance": 1e155}),
            ("gan-lr", {"gan_lr": 1e39}),
        ),
        left_out=frozenset({"top-fraction", "top-trajectories"}),
        tags=frozenset(
            {"goals/intermediate", "recall/trace_survival", "recall/imitation_kl", "recall/trace_error_of_first_step"}
        ),
    ),
}

BASE_TAGS = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/return"}
RECALL_TAGS = {  # of each --recall
    "none": set(),
    "random": {"recall/imitation_loss", "recall/start_value", "recall/trace_error"},
}
RECALL_TAGS["true"] = RECALL_TAGS["random"] | {"recall/backtracking_loss", "recall/action_nll"}
RECALL_TAGS["learned"] = RECALL_TAGS["true"] | {"recall/state_nll"}
PACKAGES = {"PIL": "pillow", "torch.utils.tensorboard": "tensorboard"}  # modules that are named unlike their package
TACIT = {"mujoco": "imageio"}  # gymnasium's MuJoCo environments import it, but gymnasium alone does not bring it
LIMITS = ("total_timesteps", "num_envs", "eval_every", "eval_episodes", "checkpoint_every", "trace_length")
LIMITS += ("num_traces", "recall_every", "torch_threads")  # flags that refuse 0
LIMITS += ("hidden", "batch_size", "recall_tuples", "num_steps", "top_trajectories", "cg_iterations")


# ------------------------------------------------------------------------------------------------------ the source


def source(name):
    return (ROOT / f"{name}.py").read_text()


def arg_fields(name):
    """The fields of Args in the source: name to (annotation, the string under it or None)."""
    body = next(n.body for n in ast.parse(source(name)).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    fields = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            below = after.value if isinstance(after, ast.Expr) else None
            text = below.value if isinstance(below, ast.Constant) and isinstance(below.value, str) else None
            fields[node.target.id] = (ast.unparse(node.annotation), text)
    return fields


def recall_modes(name):
    """The values of --recall that a script has."""
    return modes(name) if SCRIPTS[name].mode == "recall" else []


def modes(name):
    """The methods that a script has."""
    return re.findall(r"'([\w-]+)'", arg_fields(name)[SCRIPTS[name].mode][0])


every_script = pytest.mark.parametrize("name", SCRIPTS)
every_recalling_script = pytest.mark.parametrize("name", [name for name in SCRIPTS if recall_modes(name)])


def places(text):
    """The places of the paper that a text names, "Alg. 1, lines 8 and 9" as two of them."""
    found = set()
    number = r"\(?(\d+)\)?(?:(,| and|-| to) ?\(?(\d+)\)?)?"
    for form, pattern in (("Alg. 1, line {}", rf"Alg\. 1, lines? {number}"), ("Eq. ({})", rf"Eqs?\. {number}")):
        for first, link, last in re.findall(pattern, text):
            numbers = range(int(first), int(last) + 1) if link in ("-", " to") else (first, last or first)
            found |= {form.format(i) for i in numbers}
    return found


def marked_places(name):
    """The places of the paper that the comments and docstrings of a script name: line number to set of places."""
    tree, marks = ast.parse(source(name)), {}
    for token in tokenize.generate_tokens(io.StringIO(source(name)).readline):
        if token.type == tokenize.COMMENT:
            marks[token.start[0]] = places(token.string)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            string = node.body[0].value
            for i, line in enumerate(source(name).splitlines()[string.lineno - 1 : string.end_lineno]):
                marks[string.lineno + i] = places(line)
    return marks


def imported_modules(path):
    """The modules that a file, and the local files that it imports, import anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path.name}"
            found.add(node.module)
    for module in [*found]:
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            folder = ROOT.joinpath(*parts[:i])
            for file in (folder / "__init__.py", folder.with_suffix(".py")):
                if file.is_file() and file != path:
                    found |= imported_modules(file)
    return found


# ------------------------------------------------------------------------------------------------------ running


def settings(name, **changes):
    """The arguments of a short run: ten checkpoints, five evaluations."""
    steps = SCRIPTS[name].steps
    short = {"total_timesteps": steps, "checkpoint_every": steps // 10, "eval_every": steps // 5, "eval_episodes": 2}
    return short | SCRIPTS[name].arguments | changes


def long_settings(name):
    """The arguments of a run that is long enough to be hit by signals: 40 checkpoints, 24 evaluations."""
    steps = SCRIPTS[name].steps
    return settings(name, total_timesteps=4 * steps, checkpoint_every=steps // 10, eval_every=steps // 6)


def flags(**arguments):
    """The arguments as a command line."""
    words = []
    for key, value in arguments.items():
        words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def call(name, **arguments):
    module = importlib.import_module(name)
    module.main(module.Args(**arguments))


def train(name, run_dir, **changes):
    call(name, **settings(name, run_dir=run_dir, **changes))
    return run_dir


def execute(*command, cwd, **environment):
    """Runs a Python command; no module of this repository can be found unless it is told."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env = inherited | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def send_signal(number, name, run_dir, arguments, checkpoints, delay):
    """Starts a run by command line, sends it a signal `delay` seconds after it has written so many checkpoints.

    Returns exit status and stderr.
    """

    def written():
        path = run_dir / "checkpoint.pt"
        return path.stat().st_mtime_ns if path.exists() else None

    seen = {written()}
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags(**arguments)]
    process = subprocess.Popen(
        command, cwd=run_dir.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while len(seen) <= checkpoints and process.poll() is None:
            time.sleep(0.0005)
            seen.add(written())
        time.sleep(delay)
        assert process.poll() is None, f"ended before the signal: {process.stderr.read()}"
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return process.returncode, errors


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def tensors(value):
    """All tensors in a checkpoint or a part of one."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in inner for tensor in tensors(part)]


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


def compare(one, other, without=()):
    """Where the checkpoints of two runs differ; the names of the event files hold the time and never agree."""
    parts = [
        {key: part for key, part in load(run).items() if key not in ("event_sizes", *without)} for run in (one, other)
    ]
    return differences(*parts)


def logged(run_dir):
    """All that TensorBoard shows of a run but its speed: tag to [(step, value)], pictures as bytes."""
    curves = {}
    for file in sorted(run_dir.glob("events.out.tfevents.*")):
        events = EventAccumulator(
            str(file), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=False
        ).Reload()
        for tag in events.Tags()["scalars"]:
            curves.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["images"]:
            curves.setdefault(tag, []).extend((event.step, event.encoded_image_string) for event in events.Images(tag))
    curves.pop("charts/SPS", None)
    return {tag: sorted(points, key=lambda point: point[0]) for tag, points in curves.items()}


def assert_same(run, reference):
    """The same bits in checkpoint and TensorBoard, each step once, the same files."""
    assert compare(run, reference) == []
    curves, expected = logged(run), logged(reference)
    assert curves.keys() == expected.keys()
    for tag, points in curves.items():
        assert [step for step, _ in points] == [step for step, _ in expected[tag]], tag
        assert points == expected[tag], tag
    pictures = [sorted(path.name for path in folder.glob("*.png")) for folder in (run, reference)]
    assert pictures[0] == pictures[1] != []
    arguments = [json.loads((folder / "args.json").read_text()) | {"run_dir": None} for folder in (run, reference)]
    assert arguments[0] == arguments[1]


def contents(folder):
    """All files (with their bytes) and folders in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def leave_no_trace(tmp_path, monkeypatch):
    """Runs each test in an empty folder and undoes what a run sets for the whole process."""
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


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


@pytest.fixture
def refuse(tmp_path, capfd, recwarn):
    """A function that asserts that a call ends with status 2 and one line that names the flag, and changes no file."""

    def check(name, flag, **arguments):
        before = contents(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            call(name, **arguments)
        out, errors = capfd.readouterr()
        assert exit.value.code == 2
        assert out == ""
        assert len(errors.splitlines()) == 1, errors
        assert re.search(rf"--{flag}\b", errors), errors
        assert [str(warning.message) for warning in recwarn.list] == []
        assert contents(tmp_path) == before

    return check


# ------------------------------------------------------------------------------------------------------ the file


def watch_networks(name, monkeypatch):
    """A list that fills with each network that the script makes and what its parameters are at first, by name."""
    module, made = importlib.import_module(name), []
    for network in [getattr(module, n) for n in ("Actor", "Critic", "BacktrackingModel") if hasattr(module, n)]:

        def build(self, *args, init=network.__init__, **kwargs):
            init(self, *args, **kwargs)
            made.append((self, {key: value.detach().clone() for key, value in self.named_parameters()}))

        monkeypatch.setattr(network, "__init__", build)
    return made


@every_script
def test_importing_does_nothing(name, tmp_path):
    """No output, no file, no look at the command line, and nothing changed for the whole process."""
    state = (
        "[torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.get_num_threads(),"
        " torch.are_deterministic_algorithms_enabled(), signal.getsignal(2), signal.getsignal(15)]"
    )
    code = f"import signal, torch, numpy as np; before = {state}; import {name}; assert {state} == before"
    result = execute("-c", code, "--no-such-flag", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert contents(tmp_path) == {}


@every_script
def test_copied_alone_it_trains_and_every_network_changes(name, tmp_path, monkeypatch, finished):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ROOT / f"{name}.py", home)
    for folder in SCRIPTS[name].needs:
        shutil.copytree(ROOT / folder, home / folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = contents(home)
    result = execute(f"{name}.py", *flags(**settings(name)), cwd=home)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr  # and no progress bar outside a terminal

    (run,) = (home / "runs").iterdir()
    assert {path for path in contents(home) if not path.is_relative_to(home / "runs")} == before.keys()
    saved = json.loads((run / "args.json").read_text())
    assert re.fullmatch(rf"{saved['env_id']}__{name}__{saved[SCRIPTS[name].mode]}__seed{saved['seed']}__\d+", run.name)

    made = watch_networks(name, monkeypatch)
    assert_same(train(name, tmp_path / "here"), run)  # the command line and main(Args(...)) are the same run
    for network, initial in made:
        for key, value in network.named_parameters():
            assert not torch.equal(value, initial[key]), f"{type(network).__name__} {key} did not change"
    checkpoint, parts = load(run), {"actor": "Actor"}
    if recall_modes(name):
        parts["backtracking_model"] = "BacktrackingModel"
        assert "recall/imitation_loss" in logged(run)
        assert differences(checkpoint["actor"], load(finished(name, recall="none"))["actor"]) != []
    for part, network in parts.items():
        states = [trained.cpu().state_dict() for trained, _ in made if type(trained).__name__ == network]
        assert any(differences(checkpoint[part], state) == [] for state in states), part


@every_script
def test_pep_723_block_agrees_with_requirements_and_imports(name):
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source(name))["content"]
    script = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    requirements = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert set(script["dependencies"]) <= requirements
    assert len(set(script["dependencies"])) == len(script["dependencies"])
    minimum = tuple(map(int, re.fullmatch(r">=(\d+)\.(\d+)", script["requires-python"]).groups()))
    assert minimum <= sys.version_info[:2]

    imported = imported_modules(ROOT / f"{name}.py")
    local = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {module.split(".")[0] for module in imported} & local == set(SCRIPTS[name].needs)
    packages = {PACKAGES.get(module, module.split(".")[0]) for module in imported}
    packages |= {TACIT[package] for package in packages & TACIT.keys()}
    declared = {re.match(r"[\w.-]+", dependency)[0] for dependency in script["dependencies"]}
    assert declared == packages - local - set(sys.stdlib_module_names)


@every_script
def test_flags_are_spelt_alike_and_explained(name, capsys):
    fields = arg_fields(name)
    assert set(FLAGS) - SCRIPTS[name].left_out <= {field.replace("_", "-") for field in fields}
    assert [field for field, (_, text) in fields.items() if not (text or "").strip()] == []
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as exit:
        module.tyro.cli(module.Args, args=["--help"])
    assert exit.value.code == 0
    words = re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out))
    for field, (_, text) in fields.items():
        assert f"--{field.replace('_', '-')}" in words
        assert " ".join(text.split()) in words


@every_script
def test_every_line_of_the_algorithm_and_every_equation_is_marked(name):
    """Equations anywhere; the algorithm in main, so that a reader finds all of it there."""
    marks = marked_places(name)
    marked = set().union(*marks.values())
    main = next(n for n in ast.parse(source(name)).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    there = set().union(*(marks.get(i, set()) for i in range(main.lineno, main.end_lineno + 1)))
    expected = SCRIPTS[name].places
    assert {place for place in expected if place.startswith("Alg.")} - there == set()
    assert expected - marked == set()
    assert {place for place in marked if place.startswith(("Alg. 1,", "Eq."))} <= expected | {"Alg. 1, line 14"}


@every_script
def test_the_map_in_the_docs_is_true(name):
    """Rows `| Alg. 1, line 8 | `code` | 123 |` under "## Map": the code is there, its mark at most 6 lines above."""
    page = (ROOT / "docs" / f"{name}.md").read_text()
    section = re.search(r"(?ms)^## Map$(.*?)(?=^## |\Z)", page)[1]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]  # without its head
    lines, marks, mapped = source(name).splitlines(), marked_places(name), set()
    for row in table:
        match = re.fullmatch(r"\|\s*([^|`]+?)\s*\|\s*(`+)\s?(.+?)\s?\2\s*\|\s*(\d+)\s*\|\s*", row)
        assert match, f"not a row of the map: {row}"
        place, code, number = places(match[1]), match[3].replace(r"\|", "|"), int(match[4])
        assert place, f"no place of the paper: {row}"
        assert 1 <= number <= len(lines) and lines[number - 1].strip() == code, row
        near = set().union(*(marks.get(i, set()) for i in range(number - 6, number + 1)))
        assert place <= near, f"not marked there: {row}"
        mapped |= place
    assert SCRIPTS[name].places - mapped == set()


# ------------------------------------------------------------------------------------------------------ the same bits


@every_script
def test_same_seed_same_bits(name, tmp_path, finished):
    assert_same(train(name, tmp_path / "again"), finished(name))


@every_script
def test_another_seed_is_another_run(name, tmp_path, monkeypatch, finished):
    """Other networks from the start, and other experience."""
    run, made = finished(name), watch_networks(name, monkeypatch)
    other = train(name, tmp_path / "other", seed=2)
    first = [initial for _, initial in made]
    made.clear()
    train(name, tmp_path / "short", total_timesteps=1)
    assert len(made) == len(first)
    for (network, initial), another in zip(made, first, strict=True):
        assert differences(initial, another) != [], f"{type(network).__name__} starts alike"
    assert logged(other)["charts/episodic_return"] != logged(run)["charts/episodic_return"]


@every_recalling_script
def test_recall_flags_change_nothing_without_recall(name, tmp_path, monkeypatch, finished):
    """--recall none draws the same random numbers whatever they say, and no recall code is executed."""
    others = {"trace_length": 3, "num_traces": 5, "recall_every": 2, "recall_updates": 3, "backtracking_updates": 2}
    others |= {"backtracking_batch_size": 7, "backtracking_lr": 0.5, "imitation_lr": 0.5, "top_fraction": 0.5}
    others |= {"top_trajectories": 2}
    module = importlib.import_module(name)
    for part in ("BacktrackingModel", "update_backtracking_model", "high_value_states", "recall_traces", "imitate"):
        monkeypatch.setattr(module, part, lambda *args, part=part, **kwargs: pytest.fail(f"{part} was called"))
    others = {flag: value for flag, value in others.items() if flag in arg_fields(name)}
    run, reference = train(name, tmp_path / "run", recall="none", **others), finished(name, recall="none")
    assert compare(run, reference, without=("buffer",)) == []  # it may hold fewer trajectories; nobody reads them
    assert logged(run) == logged(reference)


@every_script
def test_evaluation_changes_no_training_number(name, tmp_path, finished):
    run = train(name, tmp_path / "run", eval_every=10**9, eval_episodes=5, capture_video=True)
    assert len(logged(run)["eval/return"]) < len(logged(finished(name))["eval/return"])
    without = ("finished", "evaluations")  # episodes since the last evaluation, and what that showed
    assert compare(run, finished(name), without) == []


# ------------------------------------------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def uninterrupted(finished):
    return lambda name: finished(name, **long_settings(name))


@every_script
def test_killed_and_stopped_at_any_moment_and_resumed_equals_uninterrupted(name, tmp_path, uninterrupted):
    run, rng, arguments = tmp_path / "run", random.Random(1), long_settings(name) | {"run_dir": tmp_path / "run"}
    steps = [0]
    for number, status, checkpoints in (
        (signal.SIGKILL, -signal.SIGKILL, 3),
        (signal.SIGINT, 130, 2),
        (signal.SIGKILL, -signal.SIGKILL, 7),
        (signal.SIGTERM, 143, 2),
    ):
        ended, message = send_signal(number, name, run, arguments, checkpoints, rng.uniform(0, 0.03))
        assert ended == status, message
        steps.append(load(run)["step"])
        if number != signal.SIGKILL:  # a checkpoint of that very moment, and how to go on
            assert len(message.splitlines()) == 1
            assert f"--resume {run}" in message
            assert re.search(rf"\bstep {steps[-1]}\b", message)
        arguments = {"resume": run}
    assert steps == sorted(set(steps))  # each time it went on
    assert steps[-1] < long_settings(name)["total_timesteps"]
    call(name, resume=run)
    assert_same(run, uninterrupted(name))


@every_script
def test_a_second_signal_ends_a_run_that_hangs(name):
    """The first asks it to stop at a good place, which it may never reach: an environment may never end an episode."""
    module = importlib.import_module(name)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored, as in background jobs
    try:
        with module.catch_signals() as caught:
            signal.raise_signal(signal.SIGINT)
            assert caught == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@every_script
def test_killed_before_the_first_checkpoint_and_resumed_equals_uninterrupted(name, tmp_path, finished):
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    (run / "checkpoint.pt").unlink()
    call(name, resume=run)
    assert_same(run, finished(name))


@every_script
def test_killed_while_a_checkpoint_is_written_and_resumed_equals_uninterrupted(name, tmp_path, monkeypatch, finished):
    """The checkpoint before is still there, whole."""
    save, sizes = torch.save, []

    def write_a_part(state, path):
        save(state, path)
        sizes.append(path.stat().st_size)
        if len(sizes) == 5:
            os.truncate(path, sizes[-1] // 2)
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_a_part)
        with pytest.raises(InterruptedError):
            train(name, tmp_path / "run")
    assert 0 < load(tmp_path / "run")["step"] < SCRIPTS[name].steps
    call(name, resume=tmp_path / "run")
    assert_same(tmp_path / "run", finished(name))


@every_script
def test_a_run_that_grows_equals_a_long_one(name, tmp_path, uninterrupted):
    long = long_settings(name)
    run = train(name, tmp_path / "run", **long | {"total_timesteps": long["total_timesteps"] // 2})
    (events,) = run.glob("events.out.tfevents.*")
    shutil.copy(events, run / "events.out.tfevents.1.host.1.1")  # of a resumed run that was killed before a checkpoint
    with events.open("ab") as file:
        file.write(events.read_bytes()[:50])  # a record that was cut short
    call(name, resume=run, total_timesteps=long["total_timesteps"])
    assert_same(run, uninterrupted(name))


# ------------------------------------------------------------------------------------------------------ files and tags


@every_script
def test_a_run_holds_arguments_checkpoint_events_and_pictures(name, finished):
    run = finished(name)
    names = sorted(path.name for path in run.iterdir())
    pictures = [n for n in names if n.endswith(".png")]
    assert [n for n in names if not n.startswith("events.") and n not in pictures] == ["args.json", "checkpoint.pt"]
    assert {f"pictures/{n.removesuffix('.png')}" for n in pictures} == {t for t in logged(run) if t.startswith("pict")}
    saved = json.loads((run / "args.json").read_text())
    assert saved.keys() == arg_fields(name).keys()
    assert settings(name).items() <= saved.items()
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] >= saved["total_timesteps"]
    assert all(tensor.isfinite().all() for tensor in tensors(checkpoint))


@pytest.mark.parametrize("name, mode", [(name, mode) for name in SCRIPTS for mode in modes(name)])
def test_tags_are_spelt_alike(name, mode, finished):
    run = finished(name, **{SCRIPTS[name].mode: mode})
    curves = logged(run)
    scalars = {tag for tag in curves if not tag.startswith("pictures/")} | {"charts/SPS"}
    unlike = {"none": "recall/", "forward": "recall/trace"}.get(mode, "-")  # how tags begin that a mode lacks
    own = RECALL_TAGS.get(mode, set()) | {tag for tag in SCRIPTS[name].tags if not tag.startswith(unlike)}
    expected = BASE_TAGS | own
    assert expected - SCRIPTS[name].left_out <= scalars
    allowed = expected | {"eval/success_rate", "eval/coverage", "eval/visited_cells"}
    assert {tag for tag in scalars if not tag.startswith("losses/")} <= allowed
    assert any(tag.startswith("losses/") for tag in scalars)
    assert any(tag.startswith("pictures/") for tag in curves)
    total = settings(name)["total_timesteps"]
    for tag, points in curves.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
        assert tag.startswith("pictures/") or np.isfinite([value for _, value in points]).all(), tag
    assert all(curves[tag][-1][0] >= total for tag in ("eval/return", *own))
    assert len(curves["eval/return"]) == 6  # before the first step, every fifth of the run, and at its end


@every_recalling_script
def test_losses_of_rare_recall_phases_are_logged(name, tmp_path):
    curves = logged(train(name, tmp_path / "run", recall_every=7))
    assert {"recall/imitation_loss", "recall/start_value"} <= curves.keys()


@every_script
def test_speed_is_logged_outside_a_terminal_too(name, finished):
    speeds = EventAccumulator(str(finished(name))).Reload().Scalars("charts/SPS")
    assert all(event.value > 0 for event in speeds[1:])


@every_script
def test_evaluate_prints_the_last_evaluation_and_writes_only_a_video(name, tmp_path, capsys, finished):
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    before, episodes = contents(tmp_path), settings(name)["eval_episodes"]
    capsys.readouterr()
    call(name, evaluate=run, eval_episodes=episodes)
    printed = capsys.readouterr().out
    returns = [float(value) for value in re.findall(r"(?m)^episode \d+: return (-?\d+\.\d+)\b", printed)]
    (mean,) = re.findall(r"mean return (-?\d+\.\d+)", printed)
    assert len(returns) == episodes
    assert float(mean) == pytest.approx(np.mean(returns), abs=0.011)
    assert mean == f"{logged(run)['eval/return'][-1][1]:.2f}"
    assert contents(tmp_path) == before

    call(name, evaluate=run, eval_episodes=episodes, capture_video=True)
    after = contents(tmp_path)
    (video,) = after.keys() - before.keys()
    assert {path: after[path] for path in before} == before
    with Image.open(video) as image:
        assert (image.format, image.n_frames > 1) == ("GIF", True)


@every_script
def test_training_writes_a_video_only_when_told(name, tmp_path, finished):
    assert [*finished(name).glob("*.gif")] == []
    (video,) = train(name, tmp_path / "run", capture_video=True).glob("*.gif")
    with Image.open(video) as image:
        assert image.n_frames > 1


# ------------------------------------------------------------------------------------------------------ bad input


BAD_NUMBERS = [
    pytest.param(name, field, value, id=f"{name}-{field}={value}")
    for name in SCRIPTS
    for field, (annotation, _) in arg_fields(name).items()
    if re.match(r"(int|float)\b", annotation)
    for value in ((-1.0, float("nan"), float("inf")) if annotation.startswith("float") else (-1,))
] + [
    pytest.param(name, field, 0, id=f"{name}-{field}=0")
    for name in SCRIPTS
    for field in LIMITS
    if field in arg_fields(name)
]


@pytest.mark.parametrize("name, field, value", BAD_NUMBERS)
def test_refuses_a_number_out_of_range(name, field, value, refuse):
    refuse(name, field.replace("_", "-"), **settings(name) | {field: value})


BAD_ARGUMENTS = [
    ("num-steps", {"num_steps": 10**9}),
    ("gamma", {"gamma": 1.5}),
    ("top-fraction", {"top_fraction": 1.5}),
    ("seed", {"seed": 2**64}),
]
BAD_ARGUMENTS += [("env-id", {"env_id": env}) for env in ("NoSuchMaze-v0", "no:such-v0", "nonsense v0", "")]
BAD_ARGUMENTS += [("device", {"device": "abacus"})]
BAD_ARGUMENTS = [
    pytest.param(name, flag, arguments, id=f"{name}-{arguments}")
    for name, script in SCRIPTS.items()
    for flag, arguments in (*BAD_ARGUMENTS, *script.refused)
    if flag.replace("-", "_") in arg_fields(name)
]


@pytest.mark.parametrize("name, flag, arguments", BAD_ARGUMENTS)
def test_refuses_a_bad_argument(name, flag, arguments, refuse):
    refuse(name, flag, **settings(name) | arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@every_script
def test_refuses_cuda_where_there_is_none(name, refuse):
    refuse(name, "device", **settings(name, device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@every_script
def test_refuses_to_resume_a_run_on_cuda_where_there_is_none(name, tmp_path, refuse, finished):
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    saved = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(saved | {"device": "cuda"}))
    refuse(name, "(device|resume)", resume=run)


@pytest.mark.parametrize("path", ["full", "full/file", "full/file/run", "name" * 100])
@every_script
def test_refuses_a_run_dir_that_is_not_empty_or_cannot_be_made(name, path, tmp_path, refuse):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    refuse(name, "run-dir", **settings(name, run_dir=tmp_path / path))


@pytest.mark.parametrize("arguments, flag", [("--no-such-flag", "--no-such-flag"), ("--seed one", "--seed")])
@every_script
def test_refuses_what_it_cannot_parse(name, arguments, flag, tmp_path, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as exit:
        module.tyro.cli(module.Args, args=arguments.split())
    assert exit.value.code == 2
    assert flag in capsys.readouterr().err


@every_script
def test_refuses_by_command_line(name, tmp_path):
    flag = f"--{SCRIPTS[name].mode}"
    result = execute(str(ROOT / f"{name}.py"), flag, "perfectly", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert flag in result.stderr
    assert contents(tmp_path) == {}


class Attack:
    """A pickle that makes a file in the working directory."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def save_attack(path):
    torch.save({"step": Attack()}, path)


def save_plain_attack(path):
    path.write_bytes(pickle.dumps({"step": Attack()}, protocol=2))


def save_without_actor(path):
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["actor"]
    torch.save(checkpoint, path)


def save_larger_actor(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["actor"] = {key: torch.cat((value, value)) for key, value in checkpoint["actor"].items()}
    torch.save(checkpoint, path)


def save_actor_of_another_task(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["actor"] = {
        key: value[..., 1:] if value.ndim == 2 else value for key, value in checkpoint["actor"].items()
    }
    torch.save(checkpoint, path)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "something else": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "incomplete": save_without_actor,
    "of another size": save_larger_actor,
    "of another task": save_actor_of_another_task,
    "a bare tensor": lambda path: torch.save(torch.zeros(3), path),
    "attack": save_attack,
    "plain attack": save_plain_attack,
}


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
@pytest.mark.parametrize("damage", DAMAGES)
@every_script
def test_refuses_a_damaged_checkpoint(name, damage, flag, tmp_path, refuse, finished):
    """And leaves the run as it was; a checkpoint that holds code is not executed."""
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    DAMAGES[damage](run / "checkpoint.pt")
    refuse(name, flag, **{flag: run})


def test_the_attack_would_work(tmp_path):
    save_attack(tmp_path / "checkpoint.pt")
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    (tmp_path / "executed").unlink()
    save_plain_attack(tmp_path / "checkpoint.pt")
    pickle.loads((tmp_path / "checkpoint.pt").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
@every_script
def test_refuses_a_folder_without_a_run(name, flag, tmp_path, refuse, finished):
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    (run / "args.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("nothing", "empty", "file", "run"):
        refuse(name, flag, **{flag: tmp_path / path})


@every_script
def test_refuses_to_evaluate_before_the_first_checkpoint(name, tmp_path, refuse, finished):
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    (run / "checkpoint.pt").unlink()
    refuse(name, "evaluate", evaluate=run)


@every_script
def test_refuses_to_resume_with_other_arguments(name, tmp_path, refuse, finished):
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    for flag, value in (("seed", 7), ("num-envs", 3), ("run-dir", tmp_path / "other"), ("capture-video", True)):
        refuse(name, flag, resume=run, **{flag.replace("-", "_"): value})
    for fewer in (settings(name)["total_timesteps"] - 1, 0, -1):
        refuse(name, "total-timesteps", resume=run, total_timesteps=fewer)


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
@every_script
def test_refuses_a_default_value_if_the_run_has_another(name, flag, tmp_path, refuse, monkeypatch, finished):
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    default = importlib.import_module(name).Args.checkpoint_every
    for words in (["--checkpoint-every", str(default)], [f"--checkpoint_every={default}"]):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", f"--{flag}", str(run), *words])
        refuse(name, "checkpoint-every", **{flag: run})
    if flag == "resume":
        arguments = json.loads((run / "args.json").read_text())
        (run / "args.json").write_text(json.dumps(arguments | {"capture_video": True}))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--resume", str(run), "--no-capture-video"])
        refuse(name, "capture-video", resume=run)


@every_script
def test_refuses_to_evaluate_with_arguments_that_it_would_ignore(name, tmp_path, refuse, finished):
    run = Path(shutil.copytree(finished(name), tmp_path / "run"))
    for flag, value in (("num-envs", 3), ("run-dir", tmp_path / "other"), ("resume", run), ("total-timesteps", 9)):
        refuse(name, flag, evaluate=run, **{flag.replace("-", "_"): value})


@every_script
def test_refuses_a_run_dir_that_cannot_be_written(name, tmp_path, refuse, monkeypatch):
    def denied(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Path, "touch", denied)  # by hand, as root may write everywhere
    refuse(name, "run-dir", **settings(name, run_dir=tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------ divergence


STEP_SIZES = [(name, f) for name in SCRIPTS for f in arg_fields(name) if f.endswith(("learning_rate", "_lr"))]


@pytest.mark.parametrize("name, field", STEP_SIZES)
def test_a_loss_that_diverges_ends_the_run_and_keeps_a_good_checkpoint(name, field, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as exit:
        train(name, run, checkpoint_every=1, **{field: 1e38})
    message = capsys.readouterr().err + str(exit.value.code)
    assert exit.value.code not in (None, 0, 2)
    assert len(message.splitlines()) == 1
    assert re.search(r"\b(losses|recall|replay)/\w+", message), message
    assert 0 <= load(run)["step"] <= int(re.search(r"\bstep (\d+)\b", message)[1])
    assert all(tensor.isfinite().all() for tensor in tensors(load(run)))
