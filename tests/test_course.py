"""The course kit: exercises against their own promises, hand-outs without solutions, and thirty submissions."""

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from envs.four_room import FourRoomMaze

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "course"))
import bugs  # noqa: E402
import check  # noqa: E402
import kit  # noqa: E402
from exercises.mazes import dynamics, four_rooms  # noqa: E402


@pytest.fixture(scope="module")
def start():
    with kit.starter() as start:
        yield start


def execute(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)


def reference_in(folder, *ids):
    """Puts the reference into the places of a hand-out that are to be filled in."""
    for exercise in kit.chosen(ids):
        for file in exercise.files:
            path = folder / exercise.name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(kit.reference(file))
    return folder


# ------------------------------------------------------------------------------------------------------ exercises
def test_exercises_keep_their_promises(start):
    """The reference gets all points, the blank and lazy solutions none, each known wrong solution its own message."""
    assert kit.verify([], start) == []
    assert sum(exercise.EXERCISE["points"] for exercise in kit.graded()) == 100


def test_bugs_are_caught_by_their_checks_and_decoys_are_not(start):
    assert bugs.verify(start) == []


def test_page_for_teachers_names_all_exercises_and_hunts():
    page = (ROOT / "docs/teaching.md").read_text()
    for exercise in kit.exercises().values():
        title = exercise.title.partition(" ")[2]
        assert f"| E{exercise.EXERCISE['number']} | {title}" in page
        if exercise.files:
            assert f"| {exercise.EXERCISE['points']} | {exercise.EXERCISE['minutes']} |" in page
    for number, bug in bugs.BUGS.items():
        assert f"| {number} | `{bug.script}.py` | {bug.seen} |" in page


def test_mazes_of_the_cases_are_those_of_the_project():
    for size in (7, 8, 11, 15):
        maze = FourRoomMaze(size)
        next_cell, can_act = dynamics(four_rooms(size), divmod(maze.goal, size))
        np.testing.assert_array_equal(next_cell, maze.next_cell)
        np.testing.assert_array_equal(can_act, maze.free & (np.arange(size**2) != maze.goal))


def test_exact_expectation_maximization():
    """Section 4 in a small maze: 142 ways to a goal four steps away within six steps, and log p(success) rises to 0."""
    scope = {}
    exec(kit.reference("bound.py"), scope)
    next_cell = FourRoomMaze(11, goal=(3, 3)).next_cell
    ways, policy, logs = scope["trajectories"](next_cell, 12, 36, 6), np.full((121, 4), 0.25), []
    for _ in range(6):
        logs.append(scope["log_evidence"](ways, policy))
        policy = scope["m_step"](ways, scope["posterior"](ways, policy), policy)
    lengths = np.bincount([len(way) for way in ways])
    assert len(ways) == 142 and lengths[4] == 6
    assert logs[0] == pytest.approx(np.log((lengths / 4.0 ** np.arange(7)).sum()))
    assert (np.diff(logs) > 0).all() and -0.02 < logs[-1] < 0


def test_verify_finds_what_is_wrong(start, monkeypatch):
    (exercise,) = kit.chosen(["e02"])
    monkeypatch.setattr(exercise, "EXERCISE", exercise.EXERCISE | {"blank": ["no_such_function"]})
    assert kit.verify(["e02"], start) == ["e02: there is no function no_such_function in recall_a2c_fourroom.py"]
    monkeypatch.undo()
    monkeypatch.setattr(exercise, "WRONG", [("never seen", exercise.answer)])
    assert any("no check recognises: never seen" in problem for problem in kit.verify(["e02"], start))


def test_verdicts():
    right, tolerance = {"x": np.array([1.0, 2.0])}, {"default": [1e-6, 0]}

    def of(own, wrong=()):
        return check.verdict({"x": np.array(own)}, right, [*wrong], tolerance)

    assert of([1.0, 2.0]) == ""
    assert of([[1.0, 2.0]]) == "x has the shape (1, 2), expected is (2,)"
    assert of(1.0) == "x has the shape (), expected is (2,)"  # nothing is broadcast
    assert of([np.nan, 2.0]) == "x is not finite in 1 of 2 places"
    assert of([1.0, 3.0]) == "x[1] is 3, expected is 2"
    assert of([1.0, 3.0], [("a known error", {"x": np.array([1.0, 3.0])})]) == "a known error"
    assert of("text") == "x: numbers are expected, not text"
    assert check.verdict({}, right, [], tolerance) == "x: numbers are expected, not nothing"
    assert check.verdict("ValueError: no", right, [], tolerance) == "ValueError: no"


def test_blanking_changes_nothing_else():
    source = kit.reference("recall_trpo.py")
    cut = kit.blank(source, kit.graded())
    first, body, last = kit.functions(source)["line_search"]
    assert source.splitlines()[first] == "@torch.no_grad()"
    lines = source.splitlines(keepends=True)
    only_one = kit.put(source, {"line_search": 'raise NotImplementedError("E9: line_search")'})
    expected = [*lines[:body], '    raise NotImplementedError("E9: line_search")\n', *lines[last:]]
    assert only_one == "".join(expected)
    assert cut.count("raise NotImplementedError(") == 10  # twins of other exercises, too
    assert kit.with_references(cut, "recall_trpo.py", kit.chosen(["e09"])[0]).count("raise NotImplementedError(") == 3


# ------------------------------------------------------------------------------------------------------ hand-outs
def test_hand_out_of_everything_has_no_solution_and_a_planted_leak_is_found(tmp_path, monkeypatch):
    everything = [*kit.exercises()]
    kit.handout(everything, tmp_path / "all")
    wanted = kit.chosen(everything)
    assert kit.leaks(tmp_path / "all", wanted) == []
    script = tmp_path / "all/e09_natural_gradient/recall_trpo.py"
    text = script.read_text()
    for line in (
        "        image = product(direction)",  # of a blanked body
        "    for t, e in np.ndindex(*rewards.shape):",  # of what is never handed out
    ):
        script.write_text(text + line + "\n")
        assert kit.leaks(tmp_path / "all", wanted) == [f"e09_natural_gradient/recall_trpo.py: {line.strip()}"]
    monkeypatch.setattr(kit, "blank", lambda source, blanked: source)
    monkeypatch.setattr(kit, "handed_out", lambda exercise: Path(exercise.__file__).read_text())
    monkeypatch.setattr(kit, "leaks", lambda folder, wanted: ["a leak"])
    with pytest.raises(RuntimeError, match="a leak"):
        kit.handout(["e02"], tmp_path / "leaky")
    assert not (tmp_path / "leaky").exists()


def test_hand_out_works_alone(tmp_path, start):
    """In an empty folder, with nothing but its zip: the blank, the solution, and what is handed in."""
    kit.handout(["e02"], tmp_path / "hw1")
    with zipfile.ZipFile(tmp_path / "hw1.zip") as file:
        file.extractall(tmp_path / "student")
    shutil.rmtree(tmp_path / "hw1")
    folder = tmp_path / "student"
    result = execute("check.py", "e02", "--check", "3", cwd=folder)
    assert result.returncode == 1 and "not filled in yet: E2: generalized_advantages" in result.stdout
    reference_in(folder, "e02")
    result = execute("check.py", cwd=folder)
    assert result.returncode == 0 and "8 of 8 points" in result.stdout, result.stdout + result.stderr
    assert execute("check.py", "--submit", cwd=folder).returncode == 0
    results = kit.grade_all(folder / "submission.zip", [], 5, start)
    assert [*results] == ["e02"] and kit.gradescope_json(results)["score"] == 8


def test_files_for_gradescope_and_classroom(tmp_path):
    kit.gradescope(["e02", "e07"], tmp_path / "autograder.zip", 7)
    with zipfile.ZipFile(tmp_path / "autograder.zip") as file:
        assert {"setup.sh", "run_autograder", "course/kit.py", "envs/four_room.py"} <= {*file.namelist()}
        assert (file.getinfo("run_autograder").external_attr >> 16) & 0o111
        file.extractall(tmp_path / "source")
    assert "--only e02 e07 --seed 7 --user student" in (tmp_path / "source/run_autograder").read_text()
    submission = reference_in(tmp_path / "submission", "e02", "e07")
    command = "course/kit.py", "grade", submission, "--only", "e02", "e07", "--seed", 7, "--json", tmp_path / "r.json"
    assert execute(*command, cwd=tmp_path / "source").returncode == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["score"] == 22 and len(results["tests"]) == 11

    kit.classroom(["e02", "e07"], tmp_path / "repo")
    workflow = (tmp_path / "repo/.github/workflows/classroom.yml").read_text()
    assert workflow.count("command: python check.py e0") == 11
    assert sum(int(line.split()[-1]) for line in workflow.splitlines() if "max-score" in line) == 22


def test_usage_errors_are_one_line(tmp_path):
    for words, named in (
        (["handout", "e99", "--out", tmp_path / "x"], "e99"),
        (["handout", "e02"], "--out"),
        (["grade", tmp_path / "nothing"], "grade"),
        (["bugs", "make", "99", "--out", tmp_path / "x"], "bugs"),
    ):
        result = execute("course/kit.py", *words)
        assert result.returncode == 2 and named in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


# ------------------------------------------------------------------------------------------------------ submissions
def gae(body):
    """The script of E2 with this body of generalized_advantages."""
    return kit.put(kit.reference("recall_a2c_fourroom.py"), {"generalized_advantages": body.strip("\n")})


ENDS = "rollout.terminated | rollout.truncated"


def solution(bootstrap="~rollout.terminated", stop=ENDS, after="next_values", end=""):
    return f"""
last, result = 0, np.zeros(rollout.rewards.shape)
for t in reversed(range(len(result))):
    delta = rollout.rewards[t] + gamma * ({bootstrap})[t] * ({after})[t] - values[t]
    last = result[t] = delta + gamma * gae_lambda * ~({stop})[t] * last
{end or "return result"}
"""


FULL = (8, "")
SUBMISSIONS = {  # body of generalized_advantages: points, and a part of the note
    "right": (solution(), *FULL),
    "right, a view": (solution(end="return np.flip(np.flip(result, 0).copy(), 0)"), *FULL),
    "right, a list": (solution(end="return result.tolist()"), *FULL),
    "right, a tensor": (solution(end="return torch.tensor(result, requires_grad=True)"), *FULL),
    "right, single precision": (solution(end="return result.astype(np.float32)"), *FULL),
    "wrong, changes its inputs": (solution(end="values[:] = 0; return result"), 0, "values afterwards"),
    "right, 100 MB of output": (solution(end="print('x' * 6_000_000); return result"), *FULL),  # in each of 17 cases
    "wrong, limit as end": (solution(bootstrap=f"~({ENDS})"), 3, "taken for a terminated"),
    "wrong, value of the goal": (solution(bootstrap="~(rollout.terminated & False)"), 4, "value of a terminal state"),
    "wrong, runs over limits": (solution(stop="rollout.terminated"), 3, "runs into the next episode"),
    "wrong, next row": (solution(after="np.append(values[1:], next_values[-1:], 0)"), 3, "values[t + 1] is used"),
    "wrong, returns": (solution(end="return result + values"), 0, "these are returns"),
    "wrong, unknown": (solution(end="return 2 * result"), 0, "expected is"),
    "wrong, shape": (solution(end="return result[..., None]"), 0, "has the shape"),
    "wrong, not finite": (solution(end="return result / 0"), 0, "not finite"),
    "wrong, None": ("return None", 0, "numbers are expected, not None"),
    "crash": ("return rollout.reward", 0, "AttributeError"),
    "endless": ("import time\nwhile True:\n    time.sleep(1)", 0, "no answer within 10 seconds"),
    "endless in the third check": (
        "import time\nargs = generalized_advantages.__dict__\nargs['n'] = args.get('n', 0) + 1\n"
        "while args['n'] > 6:\n    time.sleep(1)" + solution(),
        2,
        "no answer within 10 seconds",
    ),
    "sys.exit": ("import sys\nsys.exit()", 0, "SystemExit"),
    "os._exit": ("import os\nos._exit(0)", 0, "ended without an answer"),
    "kills": ("import os\nos.kill(os.getppid(), 9)\nos._exit(0)", 0, "ended without an answer"),
    "reads": ("return float(input())", 0, "Error"),
    "memory": ("return np.ones(10**11)", 0, "MemoryError"),
    "huge": ("return np.zeros(20_000_000)", 0, "ended without an answer"),
    "imports the script": ("import recall_a2c_fourroom\nreturn recall_a2c_fourroom.generalized_advantages("
                           "rollout, values, next_values, gamma, gae_lambda)", 0, "RecursionError"),
}  # fmt: skip


def test_thirty_submissions(tmp_path, monkeypatch):
    folder, expected = tmp_path / "submissions", {}

    def submit(name, text, points, note=""):
        path = folder / name / "e02_gae/recall_a2c_fourroom.py"
        path.parent.mkdir(parents=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        expected[name] = points, note

    for name, (body, points, note) in SUBMISSIONS.items():
        submit(name, gae(body), points, note)
    blank = kit.blank(kit.reference("recall_a2c_fourroom.py"), kit.chosen(["e02", "e04"]))
    submit("blank", blank, 0, "not filled in yet")
    submit("syntax", blank + "\nx = (", 0, "SyntaxError")
    submit("no text", b"\xff\xfe\x00", 0, "codec")
    spoiled = gae(solution()).replace("def recall_traces(", "def recall_traces(nonsense=undefined, *,")
    submit("right, others spoiled", spoiled, 8)
    for name, member, points, note in (
        ("zip", "hw/e02_gae/recall_a2c_fourroom.py", 8, ""),
        ("zip with dots", "../recall_a2c_fourroom.py", 0, "refused"),
        ("zip absolute", "/tmp/recall_a2c_fourroom.py", 0, "refused"),
    ):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
            file.writestr(member, gae(solution()))
            file.writestr(".venv/lib/site-packages/recall_a2c_fourroom.py", "not needed")
        expected[name] = points, note
    (folder / "zip in a folder").mkdir()
    shutil.copy(folder / "zip.zip", folder / "zip in a folder/submission.zip")
    expected["zip in a folder"] = 8, ""
    (folder / "no zip.zip").write_bytes(b"garbage")
    expected["no zip"] = 0, "cannot be read"
    (folder / "one file").mkdir()  # without the exercise's folder
    (folder / "one file/recall_a2c_fourroom.py").write_text(gae(solution()))
    expected["one file"] = 8, ""
    (folder / "empty").mkdir()
    expected["empty"] = 0, "there is no"
    assert len(expected) >= 30

    monkeypatch.setitem(kit.exercises()["e02"].EXERCISE, "seconds", 10)
    columns, rows = kit.collect(folder, ["e02"], 11, 2, None)
    assert columns == ["student", "e02", "total", "note"]
    assert {row["student"]: row["total"] for row in rows} == {name: points for name, (points, _) in expected.items()}
    for row in rows:
        points, note = expected[row["student"]]
        assert note in row["note"] and bool(row["note"]) == (points < 8), row
    assert not (tmp_path / "recall_a2c_fourroom.py").exists()


def test_collect_writes_a_table_and_feedback(tmp_path):
    reference_in(tmp_path / "submissions/ann", "e02", "e12")
    command = "collect", tmp_path / "submissions", "--csv", tmp_path / "grades.csv", "--feedback", tmp_path / "feedback"
    result = execute("course/kit.py", *command)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "grades.csv") as file:
        assert [*csv.DictReader(file)] == [{"student": "ann", "e02": "8", "total": "8", "note": ""}]
    assert "8 of 8 points" in (tmp_path / "feedback/ann.txt").read_text()


def test_runs_of_figure_2(tmp_path, start):
    """E12: right files get 10 points; another flag, a wrong step, a wrong interval and a wrong word cost theirs."""
    (exercise,) = kit.chosen(["e12"])
    folder, steps, lines = tmp_path / "e12_figure2", {}, ["recall,seed,steps"]
    for recall, seed in exercise.RUNS:
        run = folder / f"runs/{recall}_{seed}"
        first = 10 * (seed + (30 if recall == "none" else 10))
        with SummaryWriter(run) as writer:
            for step in range(0, 500, 10):
                writer.add_scalar("eval/success_rate", float(step >= first), step)
        (run / "args.json").write_text(json.dumps({"recall": recall, "seed": seed, "size": 15, "run_dir": str(run)}))
        steps[recall, seed] = first
        lines.append(f"{recall},{seed},{first}")
    table = exercise.statistics(steps)
    assert table["none"][0] == 355 and table["true"][0] == 155
    rows = [f"{what},{iqm},{low},{high}" for what, (iqm, low, high) in table.items()]
    files = {"runs.csv": lines, "summary.csv": ["what,iqm,low,high", *rows], "verdict.md": ["Verdict: holds", "Why."]}

    def points(changes):
        for name, content in (files | changes).items():
            (folder / name).write_text("\n".join(content) + "\n")
        return [earned for _, earned, _, _ in kit.grade_all(tmp_path, ["e12"], 0, start)["e12"]]

    assert points({}) == [3, 3, 2, 2, 0]
    assert points({"runs.csv": [lines[0], "none,1,7", *lines[2:]]}) == [3, 0, 2, 2, 0]
    assert points({"summary.csv": ["what,iqm,low,high", *rows[:2], "ratio,9,8,10"]}) == [3, 3, 0, 2, 0]
    assert points({"verdict.md": ["Verdict: open"]}) == [3, 3, 2, 0, 0]
    (folder / "runs/true_4/args.json").write_text(json.dumps({"recall": "true", "seed": 4, "size": 13, "run_dir": ""}))
    assert points({}) == [0, 3, 2, 2, 0]
    shutil.rmtree(folder)
    assert sum(earned for _, earned, _, _ in kit.grade_all(tmp_path, ["e12"], 0, start)["e12"]) == 0


def test_a_bug_hunt_is_graded(tmp_path, start):
    bugs.make(3, tmp_path / "hunt")
    handed_out = (tmp_path / "hunt/recall_a2c_fourroom.py").read_text()
    assert "terminated | rollout.truncated, 0" in handed_out
    pages = "".join(path.read_text() for path in (tmp_path / "hunt").glob("*.[mp]*") if "recall" not in path.name)
    assert bugs.BUGS[3].title not in pages

    def points(script, test):
        (tmp_path / "hunt/recall_a2c_fourroom.py").write_text(script)
        (tmp_path / "hunt/test_bug.py").write_text(test)
        return [earned for _, earned, _, _ in bugs.grade(3, tmp_path / "hunt", start)]

    right = kit.reference("recall_a2c_fourroom.py")
    template = (tmp_path / "hunt/test_bug.py").read_text()
    good = bugs.inspect.getsource(bugs.check_3).replace("check_3", "test_bug")
    assert points(handed_out, template) == [0, 0, 0]
    assert points(right, good) == [1, 2, 0]
    assert points(handed_out, good) == [0, 2, 0]
    of_the_text = "import inspect\ndef test_bug(script):\n    assert '* ~(' in inspect.getsource(script)"
    assert points(right, of_the_text) == [1, 0, 0]


def test_kit_needs_only_what_students_install():
    """check.py imports numpy and the standard library."""
    code = "import sys; sys.path.insert(0, 'course'); import check; print('torch' in sys.modules, 'kit' in sys.modules)"
    assert execute("-c", code).stdout.split() == ["False", "False"]
