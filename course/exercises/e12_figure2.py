"""E12 Does Figure 2 hold?

Figure 2 of the paper says that recall traces need fewer steps in the four-room maze than an actor-critic without them.
You check that with runs of your own, in a clone of the project. Your numbers need not be those of the project:
processors round differently, and a seed may take another course.

Run recall_a2c_fourroom.py, with default settings (15 x 15), for `--recall none` and `--recall true` and the seeds 1
to 10, about 4 minutes in all on one core:

    for seed in 1 2 3 4 5 6 7 8 9 10; do for recall in none true; do
        python recall_a2c_fourroom.py --recall $recall --seed $seed --run-dir e12_figure2/runs/${recall}_$seed
    done; done

Then write three files into the folder e12_figure2, beside `runs`, and hand in the folder as a zip. Of `runs` only
args.json and the event files (events.out.tfevents.*) are needed.

- runs.csv with the columns recall, seed, steps, one row a run. `steps` are those of the first evaluation at which
  `eval/success_rate` is 1. A run that never succeeds counts as its whole budget, the step of its last evaluation.
- summary.csv with the columns what, iqm, low, high and the rows none, true, ratio. `iqm` is the interquartile mean of
  the steps of the ten seeds: the mean without the two lowest and the two highest. `ratio` is that of none divided by
  that of true. `low` and `high` are the ends of a 95 % percentile bootstrap interval: draw ten seeds with replacement
  (for the ratio from both groups), compute again, do so 10 000 times, and take the 2.5 % and the 97.5 % quantile.
- verdict.md. Its first line is `Verdict: holds` if the interval of the ratio lies above 1, `Verdict: fails` if it lies
  below 1, and `Verdict: open` otherwise. Below it, on one page: what the interval says and what it does not; how many
  seeds failed; whether the comparison is fair (try `--learning-rate 2e-3` for `none`; three seeds will do, in another
  folder than `runs`); and one plot.

Half of the points are given automatically, half by hand for the page.

Reading: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (2021); Figure 2 of the
paper.

Hints: tensorboard's EventAccumulator(folder).Scalars("eval/success_rate") lists step and value. An interval of ten
seeds is about the mean over seeds, not about the next seed.
"""

EXERCISE = {
    "number": 12,
    "scripts": [],
    "blank": [],
    "points": 20,
    "minutes": 120,
    "difficulty": 3,
    "importance": 5,
    "seconds": 0,
}

# ------------------------------------------------------------------------------------------ never handed out
import csv  # noqa: E402
import json  # noqa: E402

import numpy as np  # noqa: E402

RUNS = [(recall, seed) for recall in ("none", "true") for seed in range(1, 11)]
BY_HAND = "the page: interval 3, failing seeds 2, tuned baseline 3, plot 2 points, by hand"
ORAL = [
    (
        "Why not the mean and its standard error?",
        "Ten skewed numbers, some of them a budget: one seed would decide.",
    ),
    ("Is a ratio whose interval includes 1 a proof that both are alike?", "No, these seeds cannot tell."),
]


def grade_folder(folder):
    """Title, points, points possible and what is wrong, of each part; the page is graded by hand."""
    found = sorted(folder.rglob("runs.csv"))
    folder = found[0].parent if found else folder
    steps, results = {}, []
    for title, points, part in (
        ("the same ten seeds, and nothing but --recall differs", 3, same_settings),
        ("the steps are those of the event files", 3, steps_of_events),
        ("interquartile means and their intervals", 2, summary),
        ("the verdict follows from the interval", 2, verdict),
    ):
        try:
            problem = part(folder, steps)
        except Exception as error:  # a file that is missing or is not what it should be
            problem = f"{type(error).__name__}: {error}"
        results.append((title, 0 if problem else points, points, problem))
    return [*results, (BY_HAND, 0, 10, "")]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same_settings(folder, steps):
    settings = {}  # of each run
    for path in sorted((folder / "runs").rglob("args.json")):
        args = json.loads(path.read_text())
        if (key := (args.pop("recall"), args.pop("seed"))) in RUNS:
            settings[key] = args | {"run_dir": ""}
    if missing := [key for key in RUNS if key not in settings]:
        return f"there is no args.json of {missing[0]}"
    for key, others in settings.items():
        for name, value in settings["none", 1].items():
            if others.get(name) != value:
                return f"{name} is {others.get(name)} in {key}, and {value} in the run of none with seed 1"
    return ""


def steps_of_events(folder, steps):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = {(row["recall"], int(row["seed"])): float(row["steps"]) for row in rows(folder / "runs.csv")}
    for path in sorted((folder / "runs").rglob("args.json")):
        args = json.loads(path.read_text())
        if (key := (args["recall"], args["seed"])) in RUNS:
            events = EventAccumulator(str(path.parent), size_guidance={"scalars": 0}).Reload()
            curve = [(event.step, event.value) for event in events.Scalars("eval/success_rate")]
            successes = [step for step, value in curve if value == 1]
            steps[key] = successes[0] if successes else curve[-1][0]
    if len(steps) < len(RUNS):
        return f"there are event files of {len(steps)} of {len(RUNS)} runs"
    for key, right in steps.items():
        if given.get(key) != right:
            return f"runs.csv says {given.get(key)} for {key[0]} {key[1]}, its events say {right}"
    return ""


def statistics(steps):
    """Interquartile mean, and ends of its interval, of what summary.csv lists."""
    rng = np.random.default_rng(0)
    samples = {recall: np.array([steps[recall, seed] for seed in range(1, 11)], float) for recall in ("none", "true")}
    means, draws = {}, {}
    for recall, sample in samples.items():
        means[recall] = np.sort(sample)[2:-2].mean()
        draws[recall] = np.sort(rng.choice(sample, size=(10_000, 10)), axis=1)[:, 2:-2].mean(axis=1)
    means["ratio"], draws["ratio"] = means["none"] / means["true"], draws["none"] / draws["true"]
    return {what: (means[what], *np.quantile(draws[what], (0.025, 0.975))) for what in means}


def summary(folder, steps):
    given = {row["what"]: [float(row[name]) for name in ("iqm", "low", "high")] for row in rows(folder / "summary.csv")}
    for what, right in statistics(steps).items():
        for name, own, number in zip(("iqm", "low", "high"), given[what], right, strict=True):
            if abs(own - number) > 0.05 * abs(number):
                return f"{name} of {what} is {own:.6g}, from the event files it is {number:.6g}"
    return ""


def verdict(folder, steps):
    _, low, high = statistics(steps)["ratio"]
    right = "holds" if low > 1 else "fails" if high < 1 else "open"
    first = (folder / "verdict.md").read_text().splitlines()[0].strip()
    return (
        "" if first == f"Verdict: {right}" else f"the first line is {first!r}; the interval is {low:.3g} to {high:.3g}"
    )
