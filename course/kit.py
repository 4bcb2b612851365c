"""The course kit: makes hand-outs and graders from the scripts of this repository. docs/teaching.md explains it.

    python course/kit.py list
    python course/kit.py handout e02 e04 --out hw1             # folder and zip for students, without any solution
    python course/kit.py grade FILE_OR_FOLDER [--only e02] [--seed N] [--json results.json]
    python course/kit.py collect submissions --csv grades.csv [--feedback DIR] [--only e02 e04] [--seed N]
    python course/kit.py gradescope e02 e04 --out autograder.zip --seed N
    python course/kit.py classroom e02 e04 --out repo          # for GitHub Classroom
    python course/kit.py bugs list | make 3 --out DIR | grade 3 FOLDER
    python course/kit.py verify                                # the kit's own test

An exercise is one file in course/exercises. What stands above its line "never handed out" is the student's page and
`run`, which calls the student's functions; below it are the cases, the answers and the known wrong solutions.
Code of students is run in a process of its own with a time limit. That is no sandbox: grade in a container.
"""

import argparse
import ast
import contextlib
import csv
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import check  # noqa: E402  what students get too

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
MARK = "# ------------------------------------------------------------------------------------------ never handed out\n"
LARGEST_MEMORY = 8 * 2**30  # bytes of address space of a child, of which torch takes two or three
ENVS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "envs").glob("*.py"))


COMMANDS = ("list", "handout", "grade", "collect", "gradescope", "classroom", "bugs", "verify", "nursery")


class UsageError(ValueError):
    """A wrong argument, in one line."""


# ------------------------------------------------------------------------------------------------------ exercises
@cache
def exercises() -> dict:
    """All exercises as modules, by id such as e02, with `id`, `name`, `title` and `files` (those to be filled in)."""
    found = {}
    for path in sorted((COURSE / "exercises").glob("e*.py")):
        spec = importlib.util.spec_from_file_location(f"exercises.{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.id, module.name = path.stem[:3], path.stem
        module.title = module.__doc__.splitlines()[0]
        if not (module.EXERCISE["scripts"] or hasattr(module, "grade_folder")):
            module.grade_folder = lambda folder, points=module.EXERCISE["points"]: [("by hand", 0, points, "")]
        module.files = [script.replace(".", "/") + ".py" for script in module.EXERCISE["scripts"]]
        found[module.id] = module
    return found


def graded() -> list:
    """The exercises with automatic checks."""
    return [exercise for exercise in exercises().values() if exercise.EXERCISE["scripts"]]


def chosen(ids: list[str]) -> list:
    """The exercises of these ids."""
    for name in ids:
        if name not in exercises():
            raise UsageError(f"there is no exercise {name}, only {' '.join(exercises())}")
    return [exercises()[name] for name in ids]


@cache
def reference(file: str) -> str:
    """The text of a script, or of a solution that no script contains."""
    path = ROOT / file
    return (path if path.exists() else COURSE / "reference" / file).read_text()


def handed_out(exercise) -> str:
    """The part of an exercise's file that students get."""
    return Path(exercise.__file__).read_text().split(MARK)[0]


def make_checks(exercise, seed: int) -> list:
    """The checks of an exercise with random inputs of this seed; right and known wrong outputs are computed here."""

    def arrays(columns: dict) -> dict:
        return {name: np.asarray(value) for name, value in columns.items()}

    rng, checks = np.random.default_rng([seed, zlib.crc32(exercise.name.encode())]), []
    for title, points, inputs in exercise.cases(rng):
        cases = []
        for case in inputs:
            expected = arrays(exercise.answer(case))
            outputs = [(message, wrong(case)) for message, wrong in exercise.WRONG]
            wrong = [(message, expected | arrays(columns)) for message, columns in outputs if columns is not None]
            cases.append((arrays(case), expected, wrong))
        checks.append({"title": title, "points": points, "cases": cases})
    return checks


# ------------------------------------------------------------------------------------------------------ blanking
@cache
def functions(source: str) -> dict[str, tuple[int, int, int]]:
    """Where the functions of a file are: name, or Class.name -> (lines before it, lines before its body, last line).

    Decorators belong to a function. Its body begins after the docstring.
    """
    found = {}
    for node in ast.parse(source).body:
        members, prefix = (node.body, f"{node.name}.") if isinstance(node, ast.ClassDef) else ([node], "")
        for member in members:
            if isinstance(member, ast.FunctionDef):
                first = min(part.lineno for part in (member, *member.decorator_list)) - 1
                body = member.body[0].end_lineno if ast.get_docstring(member) else member.body[0].lineno - 1
                found[prefix + member.name] = (first, body, member.end_lineno)
    return found


def put(source: str, bodies: dict[str, str]) -> str:
    """The file with other lines as the bodies of these functions; all other lines stay byte for byte."""
    found, lines = functions(source), source.splitlines(keepends=True)
    for name in sorted(bodies, key=lambda name: found[name], reverse=True):
        _, start, end = found[name]
        indent = "        " if "." in name else "    "
        lines[start:end] = [f"{indent}{line}\n" if line else "\n" for line in bodies[name].splitlines()]
    return "".join(lines)


def blank(source: str, blanked: list) -> str:
    """The file with the bodies of all functions that these exercises ask for cut out, in whatever script they are."""
    found = functions(source)
    numbers = {name: exercise.EXERCISE["number"] for exercise in blanked for name in exercise.EXERCISE["blank"]}
    bodies = {name: f'raise NotImplementedError("E{number}: {name}")' for name, number in numbers.items()}
    return put(source, {name: body for name, body in bodies.items() if name in found})


def with_references(source: str, file: str, exercise) -> str:
    """A student's file with the functions of all other exercises as they are in the script: errors do not cascade."""
    others = {name for other in graded() for name in other.EXERCISE["blank"]} - {*exercise.EXERCISE["blank"]}
    found, of_script = functions(source), functions(reference(file))
    lines, script_lines = (text.splitlines(keepends=True) for text in (source, reference(file)))
    for name in sorted(others & found.keys() & of_script.keys(), key=lambda name: found[name], reverse=True):
        (start, _, end), (first, _, last) = found[name], of_script[name]
        lines[start:end] = script_lines[first:last]
    return "".join(lines)


# ------------------------------------------------------------------------------------------------------ running
class Nursery:
    """Starts children quickly: a process that has imported torch and knows no answer forks one for each folder."""

    def __init__(self, user: str = ""):
        self.user = user
        self.open()

    def open(self) -> None:
        command = [sys.executable, str(COURSE / "kit.py"), "nursery"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, cwd="/", text=True, **pipes)

    def __call__(self, folder: Path, seconds: float) -> bool:
        """Runs a child in this folder; False if its time was not enough."""
        if self.user:
            shutil.chown(folder, self.user)
        try:
            print(json.dumps([str(folder), seconds, self.user]), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):  # the child has killed the nursery
            self.__exit__()
            self.open()
            return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def nursery() -> None:
    """What the process of a Nursery does."""
    with contextlib.suppress(ImportError):
        for package in ("torch.utils.tensorboard", "gymnasium", "mujoco", "tyro", "tqdm", "filelock"):
            importlib.import_module(package)
        torch = sys.modules["torch"]
        torch.set_num_threads(1)
        torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first optimizer imports a lot
    for line in sys.stdin:
        folder, seconds, user = json.loads(line)
        deadline = time.monotonic() + seconds
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                become_child(user)
                check.child(Path(folder))
            os._exit(0)
        while (in_time := time.monotonic() < deadline) and os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # the child, and what it has started
        if not in_time:
            os.waitpid(pid, 0)
        print(json.dumps(in_time), flush=True)


def become_child(user: str) -> None:
    """A process group of its own, no input, no output, bounds of files and memory, and another user if one is given."""
    import resource  # not on Windows, where there is no nursery

    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (check.LARGEST_FILE, check.LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_AS, (LARGEST_MEMORY, LARGEST_MEMORY))
    if user:
        import pwd

        account = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)


@contextlib.contextmanager
def starter(user: str = ""):
    """What starts children: a nursery on Linux, elsewhere a new Python process for each."""
    if sys.platform == "linux":
        with Nursery(user) as start:
            yield start
    else:
        yield check.start_process


def run_sources(exercise, sources: dict[str, str], checks: list, start) -> list:
    """The outcomes of all cases with these files (path -> text) as the solution."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        for file, text in (
            {"run.py": handed_out(exercise)} | {file: reference(file) for file in ENVS} | sources
        ).items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text)
        return check.run_cases(folder, checks, exercise.EXERCISE["seconds"], start)


# ------------------------------------------------------------------------------------------------------ grading
NEEDED = re.compile(r"^(?!.*(site-packages|__MACOSX)).*(\.(py|csv|json|md)|events\.out\.[^/]*)$")  # files of a zip


def open_submission(path: Path, folder: Path) -> Path:
    """The folder of a submission: a folder, a zip, a folder with one zip in it, or a file; zips go to `folder`."""
    zips = sorted(path.glob("*.zip")) if path.is_dir() else []
    scripts = {Path(file).name for exercise in graded() for file in exercise.files}
    path = zips[0] if len(zips) == 1 and not any(file.name in scripts for file in path.rglob("*.py")) else path
    if path.suffix != ".zip":
        return path
    try:
        with zipfile.ZipFile(path) as file:
            members = [member for member in file.infolist() if NEEDED.search(member.filename)]
            for member in members:
                if member.filename.startswith("/") or "\\" in member.filename or ".." in Path(member.filename).parts:
                    raise UsageError(f"the zip is refused: a member is called {member.filename}")
            if sum(member.file_size for member in members) > check.LARGEST_FILE:
                raise UsageError("the zip is refused: it is too large")
            file.extractall(folder, members)
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise UsageError(f"the zip cannot be read: {error}") from None
    return folder


def find_file(submission: Path, exercise, file: str) -> Path | None:
    """Where a submission has a file of an exercise: in the exercise's own folder, or anywhere else if it is alone."""
    if submission.is_file():
        return submission if submission.name == Path(file).name else None
    paths = [path for path in sorted(submission.rglob(Path(file).name)) if path.is_file() and not path.is_symlink()]
    own = [path for path in paths if any(part.startswith(exercise.id) for part in path.relative_to(submission).parts)]
    loose = [path for path in paths if not re.search(r"(^|/)e\d\d", str(path.relative_to(submission)))]
    return own[0] if own else loose[0] if len(loose) == 1 else None


def grade(exercise, submission: Path, seed: int, start) -> list[tuple[str, float, float, str]]:
    """The results of a folder or file: title, points, points possible, what is wrong, of each check."""
    if hasattr(exercise, "grade_folder"):
        return exercise.grade_folder(submission)
    checks, problem, sources = make_checks(exercise, seed), "", {}
    for file in exercise.files:
        path = find_file(submission, exercise, file)
        try:
            if not path:
                raise UsageError(f"there is no {exercise.name}/{file}")
            if path.stat().st_size > 1_000_000:
                raise UsageError(f"{file} is larger than a megabyte")
            sources[file] = with_references(path.read_text("utf-8-sig"), file, exercise)  # Windows writes a mark
        except SyntaxError as error:
            problem = f"{check.explain(error)} ({file}, line {error.lineno})"
        except Exception as error:  # not readable, no text, too deep for the parser
            problem = str(error)
    if problem:
        outcomes = [[problem] * len(of["cases"]) for of in checks]
    else:
        outcomes = run_sources(exercise, sources, checks, start)
    return check.judge(checks, exercise.TOLERANCE, outcomes)


def grade_all(path: Path, ids: list[str], seed: int, start) -> dict[str, list]:
    """The results of a submission, by exercise; those that it has files of, if no ids are given."""
    with tempfile.TemporaryDirectory() as folder:
        submission = open_submission(path, Path(folder))
        wanted = chosen(ids) or [e for e in graded() if any(find_file(submission, e, file) for file in e.files)]
        return {exercise.id: grade(exercise, submission, seed, start) for exercise in wanted}


def text_of(results: dict[str, list]) -> str:
    return "\n\n".join(check.report(exercises()[name].title, of_one) for name, of_one in results.items())


def gradescope_json(results: dict[str, list]) -> dict:
    """The results as Gradescope reads them."""
    tests = [
        {
            "name": f"{name} {title}",
            "score": points,
            "max_score": of,
            "output": problem,
            "status": "failed" if problem else "passed",
        }
        for name, of_one in results.items()
        for title, points, of, problem in of_one
    ]
    return {"score": sum(test["score"] for test in tests), "tests": tests}


def collect(
    folder: Path, ids: list[str], seed: int, workers: int, feedback: Path | None
) -> tuple[list[str], list[dict]]:
    """Columns and rows of the grades of all submissions in a folder, one folder, zip or file each."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    names = [path.name if path.is_dir() else path.stem for path in paths]
    names = [name if names.count(name) == 1 else path.name for name, path in zip(names, paths, strict=True)]

    def one_share(share: list) -> list:
        rows = []
        with starter() as start:
            for name, path in share:
                row = {"student": name}
                try:
                    results = grade_all(path, ids, seed, start)
                    row |= {key: sum(points for _, points, _, _ in of_one) for key, of_one in results.items()}
                    row["total"], text = sum(value for key, value in row.items() if key != "student"), text_of(results)
                    found = ((key, check) for key, of_one in results.items() for check in of_one if check[-1])
                    notes = (f"{key}, {title}: {problem}" for key, (title, _, _, problem) in found)
                    row["note"] = next(notes, "" if results else "no file of any exercise")
                except Exception as error:  # a row, never a stop
                    row |= {"total": 0, "note": str(error)}
                    text = f"0 points: {error}"
                if feedback:
                    (feedback / f"{name}.txt").write_text(text + "\n")
                rows.append(row)
        return rows

    pairs, workers = [*zip(names, paths, strict=True)], max(1, min(workers, len(paths)))
    with ThreadPoolExecutor(workers) as pool:
        rows = [row for share in pool.map(one_share, [pairs[i::workers] for i in range(workers)]) for row in share]
    columns = [name for name in exercises() if any(name in row for row in rows)]
    return ["student", *columns, "total", "note"], sorted(rows, key=lambda row: row["student"])


# ------------------------------------------------------------------------------------------------------ hand-outs
START = """{titles}

Install (Python 3.11 to 3.13) and check, in this folder:

    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python check.py

On Windows the programs are in .venv\\Scripts in place of .venv/bin. On Linux, a CPU build of torch saves several GB:
add `--extra-index-url https://download.pytorch.org/whl/cpu` to the first command.

Each exercise has a folder. README.md is the task. In the script the functions to be filled in raise
NotImplementedError, and their docstrings say what they must do. Change nothing else, so that the grader finds its way.

    .venv/bin/python check.py e02               # one exercise
    .venv/bin/python check.py e02 --check 3     # one check of it
    .venv/bin/python check.py --submit          # writes submission.zip, which is what you hand in

Your work is graded by the same checks. The scripts are from a public repository; who copies from it
learns nothing, and may be asked to explain each line.
"""


def page(exercise) -> str:
    """The student's page of an exercise."""
    of, text = exercise.EXERCISE, exercise.__doc__.strip().partition("\n")
    facts = f"{of['points']} points, about {of['minutes']} minutes, difficulty {of['difficulty']} of 5, "
    facts += f"importance {of['importance']} of 5"
    fill_in = ", ".join(f"`{name}`" for name in of["blank"])
    where = " and ".join(f"`{file}`" for file in exercise.files)
    task = f"\n\nFill in {fill_in} in {where}.\n" if fill_in else "\n"
    return f"# {text[0]}\n\n{facts}{task}{text[2]}\n"


def handout(ids: list[str], out: Path) -> None:
    """Writes the students' folder, and a zip of it. Functions of all chosen exercises are blank in all files."""
    wanted = chosen(ids)
    if not wanted:
        raise UsageError("handout needs exercises, such as e02 e04")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"--out must be new or empty, {out} is not")
    needed = [line for line in reference("requirements.txt").splitlines() if not re.match("pytest|scipy|pandas", line)]
    files = {"requirements.txt": "\n".join(needed) + "\n", "check.py": (COURSE / "check.py").read_text()}
    files["README.md"] = START.format(titles="\n".join(f"- {exercise.title}" for exercise in wanted)).replace(
        "\\\\", "\\"
    )
    for exercise in wanted:
        files[f"{exercise.name}/README.md"] = page(exercise)
        if exercise.files:
            files[f"{exercise.name}/run.py"] = handed_out(exercise)
            for file in {*ENVS, *exercise.files}:
                files[f"{exercise.name}/{file}"] = blank(reference(file), wanted)
    for path, text in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text)
    for exercise in wanted:
        if exercise.files:
            about = exercise.EXERCISE | {"title": exercise.title, "files": exercise.files}
            path = out / exercise.name / "checks.npz"
            check.save_checks(path, about, exercise.TOLERANCE, make_checks(exercise, seed=0))
    if found := leaks(out, wanted):
        shutil.rmtree(out)
        raise RuntimeError(f"the hand-out would hold a part of a solution: {found[0]}")
    shutil.make_archive(str(out), "zip", out)


def telling(lines) -> set[str]:
    """Those of the lines that are long enough to give something away."""
    return {line.strip() for line in lines if len(line.strip()) > 25}


def leaks(folder: Path, wanted: list) -> list[str]:
    """Lines in the text files of a hand-out that stand only in solutions, or in what is never handed out."""
    secret, public = set(), set()
    for exercise in wanted:
        secret |= telling(Path(exercise.__file__).read_text().split(MARK)[1].splitlines())
        public |= telling(handed_out(exercise).splitlines())
    for file in {*ENVS, *(file for exercise in wanted for file in exercise.files)}:
        whole, cut = (telling(text.splitlines()) for text in (reference(file), blank(reference(file), wanted)))
        secret |= whole - cut
        public |= cut
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".npz"):
        lines = telling(path.read_text().splitlines())
        found += [f"{path.relative_to(folder)}: {line}" for line in lines & (secret - public)]
    return found


SETUP = """#!/usr/bin/env bash
set -euo pipefail
curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR=/usr/local/bin sh
export UV_PYTHON_INSTALL_DIR=/opt/python
uv venv --python 3.12 /autograder/venv
uv pip install --python /autograder/venv --index-url https://download.pytorch.org/whl/cpu torch=={torch}
uv pip install --python /autograder/venv -r /autograder/source/requirements.txt
useradd --no-create-home student
chmod 700 /autograder/source
"""
RUN_AUTOGRADER = """#!/usr/bin/env bash
mkdir -p /autograder/results
echo '{{"score": 0, "output": "The grader was stopped. Does your code end?"}}' > /autograder/results/results.json
cd /autograder/source
/autograder/venv/bin/python course/kit.py grade /autograder/submission --only {ids} --seed {seed} --user student \\
    --json /autograder/results/results.json
"""


def gradescope(ids: list[str], out: Path, seed: int) -> None:
    """Writes Gradescope's autograder.zip. The grader runs as root, the students' code as another user."""
    files = {file: reference(file) for exercise in chosen(ids) for file in exercise.files if (ROOT / file).exists()}
    files |= {file: reference(file) for file in ("requirements.txt", *ENVS)}
    files |= {str(path.relative_to(ROOT)): path.read_text() for path in COURSE.rglob("*.py")}
    torch = re.search(r"torch==(\S+)", files["requirements.txt"])[1]
    files |= {"setup.sh": SETUP.format(torch=torch)}
    files |= {"run_autograder": RUN_AUTOGRADER.format(ids=" ".join(ids), seed=seed)}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for path, text in files.items():
            member = zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0))
            member.external_attr = (0o755 if "." not in path or path.endswith(".sh") else 0o644) << 16
            file.writestr(member, text)


STEP = """      - name: {name}
        id: {key}
        uses: classroom-resources/autograding-command-grader@v1
        with:
          test-name: {name}
          command: python check.py {id} --check {number}
          timeout: 5
          max-score: {points}
"""


def classroom(ids: list[str], out: Path) -> None:
    """Writes a hand-out with a workflow for GitHub Classroom, one step for each check."""
    handout(ids, out)
    steps, runners = "", []
    for exercise in chosen(ids):
        for number, (title, points, _) in enumerate(
            exercise.cases(np.random.default_rng(0)) if exercise.files else [], 1
        ):
            key, name = f"{exercise.id}-{number}", json.dumps(f"{exercise.id} {title}")
            steps += STEP.format(name=name, key=key, id=exercise.id, number=number, points=points)
            runners.append(key)
    results = "".join(f"          {key.upper()}_RESULTS: ${{{{steps.{key}.outputs.result}}}}\n" for key in runners)
    workflow = f"""name: Autograding
on: [push, workflow_dispatch]
permissions: {{checks: write, actions: read, contents: read}}
jobs:
  grade:
    runs-on: ubuntu-latest
    if: github.actor != 'github-classroom[bot]'
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {{python-version: "3.12", cache: pip}}
      - run: pip install -r requirements.txt --extra-index-url https://download.pytorch.org/whl/cpu
{steps}      - name: Reporter
        uses: classroom-resources/autograding-grading-reporter@v1
        env:
{results}        with:
          runners: {",".join(runners)}
"""
    (out / ".github/workflows").mkdir(parents=True)
    (out / ".github/workflows/classroom.yml").write_text(workflow)


# ------------------------------------------------------------------------------------------------------ verify
def verify(ids: list[str], start) -> list[str]:
    """What is wrong with the exercises: see each message. An empty list if nothing is."""
    problems = []
    for exercise in chosen(ids) if ids else graded():
        problems += [f"{exercise.id}: {problem}" for problem in verify_exercise(exercise, start)]
    return problems


def verify_exercise(exercise, start) -> list[str]:
    problems, blanked = [], exercise.EXERCISE["blank"]
    sources = {file: reference(file) for file in exercise.files}
    for name in blanked:
        if not any(name in functions(text) for text in sources.values()):
            return [f"there is no function {name} in {' '.join(exercise.files)}"]
    checks = [made for seed in (0, 1, 2) for made in make_checks(exercise, seed)]  # in one child
    first = checks[: len(checks) // 3]
    if len(exercise.ORAL) != 2:
        problems.append("there are not two questions to ask by word of mouth")
    if (points := sum(of["points"] for of in first)) != exercise.EXERCISE["points"]:
        problems.append(f"the checks have {points} points")

    def results(solution: dict, of: list) -> list:
        return check.judge(of, exercise.TOLERANCE, run_sources(exercise, solution, of, start))

    def changed(body) -> dict:
        """The files with body(arguments) as the body of each blanked function."""
        files = dict(sources)
        for file, text in files.items():
            bodies = {}
            for name in {*blanked} & functions(text).keys():
                first, _, last = functions(text)[name]
                node = ast.parse(textwrap.dedent("\n".join(text.splitlines()[first:last]))).body[0]
                arguments = [argument.arg for argument in node.args.args if argument.arg != "self"]
                bodies[name] = body(name, arguments)
            files[file] = put(text, bodies)
        return files

    problems += [f"the reference fails {title}: {text}" for title, _, _, text in results(sources, checks) if text]
    lazy = {
        "the blank": lambda name, arguments: "raise NotImplementedError('E: blank')",
        "None": lambda name, arguments: "return None",
        "the first argument": lambda name, arguments: f"return {arguments[0] if arguments else None}",
    }
    for what, body in lazy.items():
        problems += [f"{what} passes {title}" for title, _, _, text in results(changed(body), first) if not text]
    for i, alternative in enumerate(getattr(exercise, "ALTERNATIVES", [])):
        solution = changed(lambda name, _, bodies=alternative: bodies[name].strip("\n"))
        problems += [f"alternative {i} fails {title}: {text}" for title, _, _, text in results(solution, first) if text]
    zeros = [[{key: 0 * value for key, value in case[1].items()} for case in of["cases"]] for of in first]
    problems += [
        f"zeros pass {title}" for title, _, _, text in check.judge(first, exercise.TOLERANCE, zeros) if not text
    ]
    for message, _ in exercise.WRONG:
        outcomes = [[dict(wrong).get(message, right) for _, right, wrong in of["cases"]] for of in first]
        found = [text.partition(": ")[2] for *_, text in check.judge(first, exercise.TOLERANCE, outcomes)]
        if message not in found:
            problems.append(f"no check recognises: {message}; it gives {[text for text in found if text][:2]}")
    own = telling(Path(exercise.__file__).read_text().replace(exercise.__doc__, "").splitlines())
    for file in exercise.files:
        copied = own & (
            telling(reference(file).splitlines()) - telling(blank(reference(file), [exercise]).splitlines())
        )
        problems += [f"a line is copied from the script: {line}" for line in copied]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("words", nargs="*", help="ids of exercises, or what the command needs")
    parser.add_argument("--out", type=Path, help="folder, or file, to write")
    parser.add_argument("--only", nargs="+", default=[], help="ids of the exercises to grade")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the checks' numbers; 0, the default, are those that students have; keep yours secret",
    )
    parser.add_argument("--json", type=Path, help="also write the results for Gradescope")
    parser.add_argument("--csv", type=Path, default=Path("grades.csv"), help="table of grades")
    parser.add_argument("--feedback", type=Path, help="folder for a text file for each student")
    parser.add_argument("--workers", type=int, default=2, help="submissions that are graded at the same time")
    parser.add_argument("--user", default="", help="run students' code as this user; the grader must be root")
    args = parser.parse_args()
    if args.command == "nursery":
        nursery()
        return 0
    if args.command == "bugs":
        return importlib.import_module("bugs").main(args)
    if args.command == "list":
        for exercise in exercises().values():
            points, minutes = exercise.EXERCISE["points"], exercise.EXERCISE["minutes"]
            print(f"{exercise.name:20} {points:3} points {minutes:5} minutes   {exercise.title}")
        return 0
    if args.command == "verify":
        with starter() as start:
            problems = verify(args.words, start)
            if not args.words:
                problems += importlib.import_module("bugs").verify(start)
        print("\n".join(problems) or "all exercises are in order")
        return 1 if problems else 0
    if args.command in ("handout", "gradescope", "classroom") and not args.out:
        raise UsageError(f"{args.command} needs --out")
    if args.command == "handout":
        handout(args.words, args.out)
        print(f"{args.out} and {args.out}.zip are ready")
        return 0
    if args.command == "gradescope":
        gradescope([exercise.id for exercise in chosen(args.words)], args.out, args.seed)
        return 0
    if args.command == "classroom":
        classroom(args.words, args.out)
        return 0
    if len(args.words) != 1 or not Path(args.words[0]).exists():
        raise UsageError(f"{args.command} needs one file or folder that exists")
    path = Path(args.words[0])
    if args.command == "grade":
        with starter(args.user) as start:
            results = grade_all(path, args.only, args.seed, start)
        if args.json:
            args.json.write_text(json.dumps(gradescope_json(results), indent=4))
        print(text_of(results) or "no file of any exercise")
        return 0
    if args.feedback:
        args.feedback.mkdir(parents=True, exist_ok=True)
    columns, rows = collect(path, args.only, args.seed, args.workers, args.feedback)
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval=0)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows are in {args.csv}")
    if args.seed == 0:
        print("students have had these numbers; --seed gives others", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.modules["kit"] = sys.modules["__main__"]  # bugs.py imports this module, not a second one
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
