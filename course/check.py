"""Checks your solutions.

    python check.py                   # all exercises
    python check.py e02               # one exercise
    python check.py e02 --check 3     # one check of it
    python check.py --submit          # writes submission.zip, which is what you hand in

Your code runs in a process of its own, with a time limit. It gets inputs and gives outputs. This process compares them
with the right ones. A check earns its points only if all its cases are right.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path

import numpy as np

IMPORTS_SECONDS = 60  # how long the imports of a script may take on a slow disk
LARGEST_FILE = 50_000_000  # bytes


# ------------------------------------------------------------------------------------------------------ checks
# A check is a dict of title, points and cases. A case is a tuple (inputs, expected, wrong) of two dicts of arrays and
# the outputs of known wrong solutions, [(message, dict of arrays), ...].
def save_checks(path: Path, exercise: dict, tolerance: dict, checks: list) -> None:
    """Writes checks as numbers and messages, without any code."""
    arrays, described = {}, []
    for c, check in enumerate(checks):
        messages = []  # of each case
        for i, (inputs, expected, wrong) in enumerate(check["cases"]):
            parts = {"in": inputs, "out": expected} | {f"wrong{k}": outputs for k, (_, outputs) in enumerate(wrong)}
            arrays |= {f"{c}/{i}/{part}/{name}": x for part, columns in parts.items() for name, x in columns.items()}
            messages.append([message for message, _ in wrong])
        described.append({"title": check["title"], "points": check["points"], "messages": messages})
    about = {"exercise": exercise, "tolerance": tolerance, "checks": described}
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)


def load_checks(path: Path) -> tuple[dict, dict, list]:
    """What `save_checks` has written: exercise, tolerance, checks."""
    parts = {}  # (number of the check, number of the case, part) -> its arrays
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        for key in file.files[1:]:
            c, i, part, name = key.split("/")
            parts.setdefault((int(c), int(i), part), {})[name] = file[key]
    for c, check in enumerate(about["checks"]):
        check["cases"] = []
        for i, messages in enumerate(check.pop("messages")):
            wrong = [(message, parts[c, i, f"wrong{k}"]) for k, message in enumerate(messages)]
            check["cases"].append((parts[c, i, "in"], parts[c, i, "out"], wrong))
    return about["exercise"], about["tolerance"], about["checks"]


# ------------------------------------------------------------------------------------------------------ verdicts
def same(own: np.ndarray, other: np.ndarray, tolerance: list) -> bool:
    """Whether two arrays have exactly the same shape, and the same numbers within (relative, absolute) tolerance."""
    return own.shape == other.shape and np.allclose(own, other, *tolerance, equal_nan=True)


def verdict(outcome: dict | str, expected: dict, wrong: list, tolerance: dict) -> str:
    """What is wrong with the outcome of a case, in one line; "" if nothing is. A string as outcome is an error."""
    if isinstance(outcome, str):
        return outcome
    allowed = {name: tolerance.get(name, tolerance["default"]) for name in expected}
    for name in expected:
        if name not in outcome or outcome[name].dtype.kind not in "biuf":
            return f"{name}: numbers are expected, not {outcome.get(name, 'nothing')}"
    differing = [name for name in expected if not same(outcome[name], expected[name], allowed[name])]
    if not differing:
        return ""
    for message, outputs in wrong:
        if all(same(outcome[name], outputs[name], allowed[name]) for name in expected):
            return message
    name = differing[0]
    own, right = outcome[name], expected[name]
    if own.shape != right.shape:
        return f"{name} has the shape {own.shape}, expected is {right.shape}"
    if not np.isfinite(own).all():
        return f"{name} is not finite in {(~np.isfinite(own)).sum()} of {own.size} places"
    index = tuple(np.argwhere(~np.isclose(own, right, *allowed[name]))[0].tolist())
    return f"{name}{list(index) if index else ''} is {own[index]:.7g}, expected is {right[index]:.7g}"


def judge(checks: list, tolerance: dict, outcomes: list) -> list[tuple[str, float, float, str]]:
    """Title, points earned, points possible, and what is wrong, of each check, given the outcomes of all its cases."""
    results = []
    for check, of_cases in zip(checks, outcomes, strict=True):
        verdicts = [verdict(own, *case[1:], tolerance) for own, case in zip(of_cases, check["cases"], strict=True)]
        first = next((f"case {i + 1}: {text}" for i, text in enumerate(verdicts) if text), "")
        results.append((check["title"], 0 if first else check["points"], check["points"], first))
    return results


# ------------------------------------------------------------------------------------------------------ the child
def run_cases(folder: Path, checks: list, seconds: float, start) -> list:
    """The outcomes of all cases of all checks, by a child in `folder`, which holds the solution and run.py.

    `start(folder, seconds)` starts the child and waits; it returns False if the time was not enough. The child finds
    inputs only. What it had written before it was stopped counts.
    """
    for c, check in enumerate(checks):
        for i, (inputs, _, _) in enumerate(check["cases"]):
            np.savez(folder / f"{c}_{i}.in.npz", **inputs)
    in_time = start(folder, seconds)
    nothing = "the program ended without an answer" if in_time else f"no answer within {seconds} seconds"
    count = [len(check["cases"]) for check in checks]
    return [[read_outcome(folder / f"{c}_{i}.npz", nothing) for i in range(n)] for c, n in enumerate(count)]


def read_outcome(path: Path, nothing: str) -> dict | str:
    """What the child has written for a case: a dict of arrays, or an error."""
    try:
        with zipfile.ZipFile(path) as file:
            if sum(member.file_size for member in file.infolist()) > LARGEST_FILE:
                return "the outputs are too large"
        with np.load(path, allow_pickle=False) as file:
            outcome = dict(file)
    except Exception:  # a file that is missing or damaged
        return nothing
    return str(outcome["error"]) if "error" in outcome else outcome


def start_process(folder: Path, seconds: float) -> bool:
    """Starts a child in a new Python process and waits for it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder)]
    try:
        subprocess.run(command, cwd=folder, env=environment, timeout=IMPORTS_SECONDS + seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def child(folder: Path) -> None:
    """Runs all cases of a folder, in their order, and writes each outcome to a file of its own."""
    os.chdir(folder)
    sys.path[0] = str(folder)  # in place of the folder of this file
    sys.stdin = None  # input() is an error
    problem, run = "", None
    try:
        run = importlib.import_module("run")
        scripts = {name: importlib.import_module(name) for name in run.EXERCISE["scripts"]}
    except BaseException as error:
        problem = explain(error)
    for path in sorted(folder.glob("*.in.npz"), key=lambda path: [int(x) for x in path.name[:-7].split("_")]):
        outcome = {"error": problem}
        if not problem:
            with np.load(path) as file:
                case = {name: x if x.ndim else x.item() for name, x in dict(file).items()}
            try:
                if "torch" in sys.modules:
                    sys.modules["torch"].manual_seed(0)
                    sys.modules["torch"].set_num_threads(1)
                script = scripts[case.pop("script", run.EXERCISE["scripts"][0])]
                outcome = {name: as_array(value) for name, value in run.run(script, case).items()}
            except BaseException as error:  # SystemExit and KeyboardInterrupt, too
                outcome = {"error": explain(error)}
        np.savez(str(path).replace(".in.npz", ".npz"), **outcome)


def as_array(value) -> np.ndarray:
    """An array of numbers, from a tensor too; of anything else its description."""
    array = np.array(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    return array if array.dtype.kind in "biuf" else np.array(repr(value)[:200])


def explain(error: BaseException) -> str:
    """An error in one line, with the line of the student's file in which it arose."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if isinstance(error, NotImplementedError) and str(error).startswith("E"):
        return f"not filled in yet: {error}"
    if isinstance(error, SyntaxError):
        return f"{text}: {(error.text or '').strip()}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(os.getcwd()) and path.name != "run.py":
            return f"{text} ({path.name}, line {frame.lineno}: {frame.line})"
    return f"what your function returns cannot be used: {text}"


# ------------------------------------------------------------------------------------------------------ command line
def report(name: str, results: list) -> str:
    """A table of the results of an exercise."""
    earned, possible = (sum(result[i] for result in results) for i in (1, 2))
    lines = [f"{name}: {earned:g} of {possible:g} points"]
    for number, (title, points, of, problem) in enumerate(results, start=1):
        lines.append(f"  {number}  {points:g} / {of:g}  {title}" + (f"\n       {problem}" if problem else ""))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercises", nargs="*", help="such as e02; all if none is given")
    parser.add_argument("--check", type=int, help="only the check of this number")
    parser.add_argument("--submit", action="store_true", help="write submission.zip")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child.resolve())
        return 0
    here = Path(__file__).resolve().parent
    folders = sorted(path.parent for path in here.glob("e*/run.py"))
    folders = [folder for folder in folders if not args.exercises or folder.name.startswith(tuple(args.exercises))]
    if not folders:
        parser.error(f"no such exercise here: {' '.join(args.exercises)}")
    if args.submit:
        with zipfile.ZipFile(here / "submission.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for folder in folders:
                for path in load_checks(folder / "checks.npz")[0]["files"]:
                    file.write(folder / path, f"{folder.name}/{path}")
        print(f"hand in {here / 'submission.zip'}")
        return 0
    everything_right = True
    for folder in folders:
        exercise, tolerance, checks = load_checks(folder / "checks.npz")
        if args.check and not 1 <= args.check <= len(checks):
            parser.error(f"--check must be from 1 to {len(checks)}, got {args.check}")
        chosen = checks[args.check - 1 : args.check] if args.check else checks
        with tempfile.TemporaryDirectory() as copy:
            for path in [*folder.glob("*.py"), *folder.glob("envs/*.py")]:
                target = Path(copy).resolve() / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
            outcomes = run_cases(Path(copy).resolve(), chosen, exercise["seconds"], start_process)
        results = judge(chosen, tolerance, outcomes)
        everything_right &= all(points == of for _, points, of, _ in results)
        print(report(f"{folder.name} {exercise['title']}", results))
    return 0 if everything_right else 1


if __name__ == "__main__":
    sys.exit(main())
