"""reproduce.py: its statistics, its tables, and that no run is lost, repeated or left out."""

import fcntl
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from PIL import Image
from scipy.stats import mannwhitneyu

import reproduce
from reproduce import FIGURES, Args, Curves, Run

ROOT = Path(__file__).parents[1]

SETTINGS = sorted(
    {command for figure in FIGURES.values() for panel in figure.panels for command in panel.runs.values()}
)
SMALL = "--size 7 --total-timesteps 6000 --checkpoint-every 1000 --eval-every 1000"


# ------------------------------------------------------------------------------------------------------ statistics


def test_interquartile_mean_leaves_out_a_quarter_on_both_sides():
    values = np.random.default_rng(0).normal(size=(12, 3))
    expected = [np.mean(sorted(column)[3:9]) for column in values.T]
    np.testing.assert_allclose(reproduce.interquartile_mean(values), expected)
    np.testing.assert_allclose(reproduce.interquartile_mean(values.T, axis=-1), expected)


@pytest.mark.parametrize("seeds, least, most", [(10, 0.85, 0.97), (3, 0.7, 0.85)])
def test_interval_covers_the_true_value_as_often_as_it_says(seeds, least, most):
    """Of ten normal numbers in about 95 % of all cases (somewhat less), of three in four of five, as the table says."""
    low, high = reproduce.interval(np.random.default_rng(0).normal(3, 1, size=(400, seeds)))
    assert least < ((low < 3) & (high > 3)).mean() < most


def test_interval_of_a_ratio_resamples_each_sample_on_its_own():
    rng = np.random.default_rng(0)
    a, b = rng.normal(10, 1, 10), rng.normal(5, 1, 12)

    def ratio(a, b, axis):
        return a.mean(axis=axis) / b.mean(axis=axis)

    low, high = reproduce.interval(a, b, statistic=ratio)
    drawn = [rng.choice(a, 10).mean() / rng.choice(b, 12).mean() for _ in range(5000)]
    np.testing.assert_allclose((low, high), np.percentile(drawn, [2.5, 97.5]), rtol=0.03)
    assert reproduce.interval(a, b, statistic=ratio) == (low, high)  # the same every time


def test_interval_of_one_seed_is_a_point():
    assert reproduce.interval(np.array([3.0])) == (3, 3)


def curves(success, returns=None, steps=None, visited=None):
    """Curves of success rates (seeds, evaluations)."""
    success = np.array(success, dtype=float)
    values = {"eval/success_rate": success, "eval/return": success if returns is None else np.array(returns)}
    if visited is not None:
        values["eval/visited_cells"] = np.array(visited, dtype=float)
    count = success.shape[1]
    return Curves([*range(1, len(success) + 1)], 100 * np.arange(count) if steps is None else np.array(steps), values)


def test_statistics_of_a_setting():
    setting = curves(
        [[0, 0.5, 0.9, 0.2], [1, 0, 0, 0], [0, 0, 0, 0.89]], visited=[[np.nan] * 3 + [n] for n in (7, 8, 9)]
    )
    found = reproduce.statistics(setting)
    assert found["steps to success"].tolist() == [200, 0, 300]  # the last one never, so all steps
    assert found["steps to lasting success"].tolist() == [300, 300, 300]
    assert found["success at the end"].tolist() == [0.2, 0, 0.89]
    assert found["last eval/visited_cells"].tolist() == [7, 8, 9]
    np.testing.assert_allclose(found["mean eval/return"], [0.4, 0.25, 0.2225])


def test_lasting_success_allows_one_failure_in_ten():
    once, often = [0, 1, 1] + 9 * [1] + [0] + 10 * [1], [0, 1] + 10 * [0, 1] + [1]
    lasting = reproduce.statistics(curves([once, often]))["steps to lasting success"]
    assert lasting.tolist() == [100, 2100]  # the last two; before them, every other one fails


def test_the_typical_seed_is_next_to_the_mean():
    visited = [[np.nan, n] for n in (30, 10, 11, 12, 90, 14, 15, 16)]  # the middle half: 12, 14, 15, 16
    everyone = [*range(1, 9)]
    assert reproduce.typical_seed(curves(np.zeros((8, 2)), visited=visited), everyone) == 6
    returns = [[0, n] for n in (30, 10, 11, 12, 90, 14, 15, 16)]
    assert reproduce.typical_seed(curves(returns), everyone) == 6
    assert reproduce.typical_seed(curves(returns), [1, 3, 5]) == 3


def test_a_panel_of_pictures_shows_the_last_one_up_to_its_step():
    data, shown = {command: curves(np.zeros((2, 4))) for command in ("one", "two")}, {}
    for n, command in enumerate(data):
        images = {step: Image.new("L", (2, 2), step // 100 + 10 * n) for step in (0, 100, 200, 300)}
        shown[command] = reproduce.Pictures(n, {"pictures/x": {}})
        for step, image in images.items():
            image.save(file := io.BytesIO(), "PNG")
            shown[command].images["pictures/x"][step] = file.getvalue()
    panels = tuple(
        reproduce.Panel("", {command: command}, "pictures", "pictures/x", until)
        for command in data
        for until in (50, 200, None)
    )
    axes = reproduce.draw_figure(reproduce.PaperFigure("", "", panels), data, shown).axes
    assert [int(np.max(ax.images[0].get_array())) for ax in axes] == [0, 2, 3, 10, 12, 13]


def test_data_and_summary_keep_what_they_are_given(tmp_path):
    rng = np.random.default_rng(0)
    success = rng.integers(0, 11, size=(4, 30)) / 10
    visited = np.full((4, 30), np.nan)
    visited[:, -1] = [5, 6, 7, 8]
    data = {"a --x 1": curves(success, visited=visited), "b": curves(success[:2] / 2, returns=success[:2] - 1)}
    reproduce.write_data(tmp_path / "data.csv", data)
    read = reproduce.read_data(tmp_path / "data.csv")
    assert read.keys() == data.keys()
    for command, setting in data.items():
        assert read[command].seeds == setting.seeds
        assert (read[command].steps == setting.steps).all()
        for tag, values in setting.values.items():
            np.testing.assert_allclose(read[command].values[tag], values, rtol=1e-5)
    reproduce.write_summary(tmp_path / "summary.csv", read)
    rows = [line.split(",") for line in (tmp_path / "summary.csv").read_text().splitlines()]
    (row,) = [row for row in rows if row[0] == "a --x 1" and row[2] == "last eval/visited_cells"]
    assert [float(value) for value in (row[1], row[3], row[6], row[7])] == [4, 6.5, 5, 8]


# ------------------------------------------------------------------------------------------------------ verdicts


def judge(*settings, **claim):
    names = tuple("abcd"[: len(settings)])
    claim = reproduce.Claim("fig2", "text", names, **claim)
    return reproduce.judge(claim, dict(zip(names, settings, strict=True)))


def solved_at(*evaluations):
    return curves([[float(i >= first) for i in range(11)] for first in evaluations])


def test_a_claim_holds_if_the_whole_interval_is_above_one():
    slow, fast = solved_at(*[8, 9] * 5), solved_at(*[2, 3] * 5)
    assert judge(slow, fast)[1:] == ("10", "holds")
    assert "850 / 250" in judge(slow, fast)[0]
    assert "ratio 3.40" in judge(slow, fast)[0]
    assert judge(fast, slow)[1:] == ("10", "the reverse holds")
    assert judge(slow, slow)[2] == "not shown"
    assert judge(solved_at(*[1, 2, 5, 9, 9] * 2), solved_at(*[1, 2, 4, 9, 9] * 2))[2] == "not shown"


def test_failures_are_counted_and_tested():
    def failing(number):
        return solved_at(*[2] * (10 - number), *[11] * number)

    ours, seeds, verdict = judge(failing(6), failing(0), formula=None)
    assert "6 against 0" in ours and "p = 0.01" in ours  # 1 - 10! 14! / (4! 20!) = 0.0054
    assert (seeds, verdict) == ("10", "holds")
    assert judge(failing(3), failing(0), formula=None)[2] == "not shown"  # p = 0.11
    assert judge(failing(2), failing(2), formula=None)[2] == "not shown"


def test_shares_of_success_are_compared_by_their_difference():
    def succeeding(number):
        return solved_at(*[2] * number, *[11] * (10 - number))

    verdicts = [judge(succeeding(a), succeeding(b), **reproduce.AT_THE_END)[2] for a, b in ((10, 0), (7, 0), (0, 0))]
    assert verdicts == ["holds", "holds", "not shown"]
    assert "difference 1.00 [1.00, 1.00]" in judge(succeeding(10), succeeding(0), **reproduce.AT_THE_END)[0]


def test_nothing_is_said_of_few_or_missing_seeds():
    slow, fast = solved_at(*[8, 9] * 5), solved_at(*[2, 3] * 5)
    assert judge(solved_at(8, 9, 8, 9), solved_at(2, 3, 2, 3))[1:] == ("4", "too few seeds")
    seeds, verdict = judge(slow, solved_at(*[2] * 9))[1:]
    assert (seeds, verdict) == ("10, 9", "incomplete: not all seeds have finished")
    other = fast._replace(seeds=[*range(2, 12)])
    assert judge(slow, other)[2].startswith("incomplete")
    four = (slow, fast, solved_at(*[8, 9] * 3), solved_at(*[2, 3] * 3))  # one maze may have more seeds than another
    both = {"number": "ratio of both ratios", "formula": lambda a, b, c, d: (a / b) * (c / d)}
    assert judge(*four, **both)[1:] == ("10, 6", "holds")
    assert judge(*four[:3], fast, **both)[2].startswith("incomplete")


def test_large_means_are_written_in_full():
    slow, fast = solved_at(*[10] * 10), solved_at(*[4] * 10)
    many = [setting._replace(steps=setting.steps * 57) for setting in (slow, fast)]
    assert "57,000 / 22,800" in judge(*many)[0]


def test_ratios_are_averaged_so_that_neither_side_gains_by_the_order():
    twice, half = [claim for claim in reproduce.CLAIMS if claim.number.startswith("geometric")][:2]
    assert twice.formula(2, 1, 1, 2) == pytest.approx(1) == half.formula(1, 2, 2, 1)
    assert twice.formula(8, 1, 2, 1) == pytest.approx(4)


def test_means_that_are_not_positive_have_no_ratio():
    def earning(*returns):
        return curves(np.zeros((5, 11)), returns=np.array(returns)[:, None] + np.zeros((5, 11)))

    bad, worse, good = (earning(*[mean] * 5) for mean in (-100.0, -200.0, 50.0))
    for pair in ((bad, worse), (good, worse), (worse, good)):
        ours, _, verdict = judge(*pair, statistic=reproduce.MEAN_RETURN)
        assert verdict.startswith("no ratio") and re.search(r"no ratio; P = [\d.]+$", ours)


def test_seeds_of_another_version_may_have_other_tags():
    old, new = curves(np.zeros((2, 3))), curves(np.zeros((1, 3)), visited=np.ones((1, 3)))
    del new.values["eval/success_rate"]
    both = reproduce.joined(old, new._replace(seeds=[9]))
    assert both.seeds == [*old.seeds, 9] and both.values.keys() == old.values.keys() | new.values.keys()
    for setting, own, others in ((old, slice(0, 2), slice(2, 3)), (new, slice(2, 3), slice(0, 2))):
        for tag, values in setting.values.items():
            np.testing.assert_array_equal(both.values[tag][own], values)
            assert tag in (old if setting is new else new).values or np.isnan(both.values[tag][others]).all()


def test_few_seeds_have_no_interval():
    assert judge(solved_at(8, 9), solved_at(2, 3))[0].endswith("ratio 3.40; P = 1.00")
    assert judge(solved_at(8, 9, 9), solved_at(2, 3, 3))[0].endswith("]; P = 1.00")


def test_the_probability_of_improvement_is_the_mann_whitney_statistic():
    a, b = np.array([3.0, 1.0, 7.0, 5.0, 5.0]), np.array([2.0, 5.0, 4.0])
    assert reproduce.probability_of_improvement(a, b) == pytest.approx(mannwhitneyu(a, b).statistic / 15)
    assert "; P = 0.19" in judge(solved_at(2, 9), solved_at(8, 9, 10, 10))[0]


def test_claims_are_judged_by_the_same_runs_of_other_figures_and_those_without_any_are_listed(tmp_path):
    settings = FIGURES["fig11"].panels[-1].runs.values()
    (tmp_path / "fig11").mkdir()
    reproduce.write_data(tmp_path / "fig11" / "data.csv", dict.fromkeys(settings, solved_at(*[3] * 5)))
    (tmp_path / "fig11" / "origin.json").write_text("[]")
    reproduce.write_verdicts(tmp_path)
    text = (tmp_path / "README.md").read_text()
    table, not_run = text.split("\nNot run yet:\n")
    judged = [line.split(" | ")[:2] for line in table.splitlines() if "PointUMaze-v0" in line]
    assert [figure for figure, _ in judged] == ["| [fig11](#fig11)"] * 3 + ["| fig13, from [fig11](#fig11)"]
    assert judged[0][1] == judged[3][1] == "Goal GAN: recall traces raise coverage faster (PointUMaze-v0)"
    assert "- fig13: Goal GAN: recall traces raise coverage faster (AntUMaze-v0, mean of 2 tasks)\n" in not_run
    assert "- fig8: " in not_run and "fig11:" not in not_run


# ------------------------------------------------------------------------------------------------------ tables


def test_all_figures_of_the_paper_are_there():
    assert [name for name, figure in FIGURES.items() if figure.place != "ours"] == [f"fig{i}" for i in range(2, 20)]
    assert all(figure.panels for figure in FIGURES.values())


@pytest.mark.parametrize("command", SETTINGS)
@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_scripts_accept_their_flags(command, scale):
    run = reproduce.make_run(command, 3, Args(scale=scale))
    module = importlib.import_module(run.command[0].removesuffix(".py"))
    args = tyro.cli(module.Args, args=[*run.command[1:], "--run-dir", str(run.folder)])
    assert args.seed == 3
    assert args.total_timesteps > 0


def test_pep_723_block_holds_all_that_the_scripts_need():
    block = re.search(r"(?ms)^# /// script$(.*?)^# ///$", (ROOT / "reproduce.py").read_text())[1]
    dependencies = tomllib.loads(re.sub(r"(?m)^# ?", "", block))["dependencies"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(dependencies) == {line for line in lines if not line.startswith(("#", "pytest"))}


def test_runs_have_folders_of_their_own():
    """A setting with a budget of its own may be another setting's run at --scale smoke, where all budgets are alike."""
    for scale in ("smoke", "laptop"):
        runs = [reproduce.make_run(command, seed, Args(scale=scale)) for command in SETTINGS for seed in (1, 2)]
        assert len({run.folder for run in runs}) == len({run.command for run in runs})
        assert scale == "smoke" or len({run.folder for run in runs}) == len(runs)
        own = reproduce.make_run(reproduce.in_maze(reproduce.NONE, 41), 1, Args(scale=scale)).command
        assert own[own.index("--total-timesteps") + 1] == ("1000" if scale == "smoke" else "1000000")
        assert own.count("--total-timesteps") == own.count("--eval-every") == 1


@pytest.mark.parametrize("name", reproduce.TASKS)
def test_the_default_is_one_of_the_trace_lengths_of_figure_8(name):
    (panel,) = reproduce.trace_lengths(name)
    length = 10 if name.startswith("Hopper") else 50 if name.startswith("Ant") else 20  # see test_recall_trpo.py
    assert panel.runs[f"{length} steps"] == f"{reproduce.TRPO_LEARNED} --env-id {name}"
    others = {label: command for label, command in panel.runs.items() if "--trace-length" in command}
    assert all(f"--trace-length {label.split()[0]} " in command for label, command in others.items())
    assert {int(label.split()[0]) for label in others} == {5, 10, 20, 50} - {length}


def test_no_two_settings_of_a_panel_have_the_same_colour():
    success = np.zeros((2, 4))
    for name in FIGURES:
        data = {command: curves(success) for panel in FIGURES[name].panels for command in panel.runs.values()}
        for setting in data.values():
            setting.values["eval/visited_cells"] = setting.values["eval/coverage"] = success
        figure = FIGURES[name]._replace(panels=tuple(p for p in FIGURES[name].panels if p.kind != "pictures"))
        for axes in reproduce.draw_figure(figure, data, {}).axes:
            colours = [line.get_color() for line in axes.lines if line.get_linewidth() > 2]
            assert len(colours) == len(set(colours)), name


def test_every_claim_is_about_settings_of_its_figure():
    for claim in reproduce.CLAIMS:
        settings = {command for panel in FIGURES[claim.figure].panels for command in panel.runs.values()}
        assert set(claim.settings) <= settings, claim.text
        assert bool(claim.settings) == bool(settings), claim.text
    assert {claim.figure for claim in reproduce.CLAIMS} >= {f"fig{i}" for i in range(2, 20)} - {"fig12"}


# ------------------------------------------------------------------------------------------------------ figures


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def in_this_process(monkeypatch):
    """Makes runs in this process, one after another, which is faster than a process for each."""
    made = []

    def execute(runs, workers):
        for run in runs:
            if not run.folder.exists():
                module = importlib.import_module(run.command[0].removesuffix(".py"))
                module.main(tyro.cli(module.Args, args=[*run.command[1:], "--run-dir", str(run.folder)]))
                made.append(run)
        return []

    monkeypatch.setattr(reproduce, "execute_locally", execute)
    return made


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FIGURES)
def test_smoke_makes_every_figure(name, tmp_path, smoke_runs, in_this_process, monkeypatch):
    """One panel of each kind; the flags of all others are parsed by the test of all settings."""
    kinds = {panel.kind: panel for panel in reversed(FIGURES[name].panels)}
    monkeypatch.setitem(FIGURES, name, FIGURES[name]._replace(panels=tuple(kinds.values())))
    args = Args(figures=(name,), scale="smoke", runs_dir=smoke_runs, results_dir=tmp_path / "results")
    with pytest.raises(SystemExit) as exit:
        reproduce.main(args)
    assert exit.value.code == 0
    folder = tmp_path / "results" / name
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["data.csv", "summary.csv", f"{name}.png", "commands.txt", "origin.json"]
    )
    with Image.open(folder / f"{name}.png") as image:
        assert image.width > 400
        assert len(set(image.convert("L").resize((64, 64)).get_flattened_data())) > 10  # not empty
    settings = {command for panel in FIGURES[name].panels for command in panel.runs.values()}
    assert reproduce.read_data(folder / "data.csv").keys() == settings
    assert len((folder / "commands.txt").read_text().splitlines()) == len(settings)
    verdicts = (tmp_path / "results" / "README.md").read_text()
    assert f"]({name}/{name}.png)" in verdicts
    assert all(claim.text.rpartition(" (")[0] in verdicts for claim in reproduce.CLAIMS)

    before, made = contents(tmp_path / "results"), len(in_this_process)
    shutil.rmtree(folder)
    with pytest.raises(SystemExit):
        reproduce.main(Args(figures=(name,), scale="smoke", runs_dir=smoke_runs, results_dir=tmp_path / "results"))
    after = contents(tmp_path / "results")
    assert {path for path in before if before[path] != after[path]} == set()
    assert len(in_this_process) == made  # nothing twice


def test_the_command_under_each_figure_of_the_results_makes_all_of_it():
    text, args = (ROOT / "results" / "README.md").read_text(), Args(results_dir=ROOT / "results")
    commands = re.findall(r"\)\. `python reproduce\.py (\S+)(?: --seeds (\d+))?`", text)
    assert [name for name, _ in commands] == [name for name in FIGURES if (args.results_dir / name).exists()]
    for name, seeds in commands:
        args.seeds = int(seeds) if seeds else None
        reproduce.refuse_to_lose(name, args)


# ------------------------------------------------------------------------------------------------------ processes

# A program that is reproduce.py with one short figure of two settings.
DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import reproduce
runs = {{label: f"recall_a2c_fourroom.py --recall {{label}}" for label in ("none", "learned")}}
reproduce.FIGURES = {{"fig2": reproduce.PaperFigure("6.1", "Four rooms", (reproduce.Panel("7 x 7", runs),))}}
reproduce.CLAIMS = ()
reproduce.SCALES["recall_a2c_fourroom.py"]["smoke"] = "STEPS"
if __name__ == "__main__":
    reproduce.main(reproduce.tyro.cli(reproduce.Args))
"""


def start(folder, *flags, steps=SMALL, **popen):
    """Starts the program in a folder."""
    (folder / "driver.py").write_text(DRIVER.replace("STEPS", steps))
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "driver.py", "--scale", "smoke", *flags]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def run(folder, *flags, **kwargs):
    process = start(folder, *flags, **kwargs)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def data(folder):
    return (folder / "results" / "smoke" / "fig2" / "data.csv").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder in which the program has run, with one seed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, out, errors = run(folder, steps=SMALL.replace("6000", "30000"))
    assert (status, errors) == (0, ""), errors
    return folder


@pytest.mark.parametrize("number, whole_group", [(9, False), (9, True), (signal.SIGINT, False)])
def test_killed_and_started_again_it_loses_nothing_and_runs_nothing_twice(number, whole_group, tmp_path, uninterrupted):
    """Killed alone, it leaves a process that goes on; killed as a group, one that has to be resumed."""
    steps = SMALL.replace("6000", "30000")
    process = start(tmp_path, "--workers", "1", steps=steps, start_new_session=True)
    runs = tmp_path / "runs" / "reproduce" / "recall_a2c_fourroom"
    deadline = time.time() + 120
    while len([*runs.glob("*/checkpoint.pt")]) < 2 and time.time() < deadline:  # in the middle of the second run
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "goes on from here" in errors
    (first,) = runs.glob("recall=none*seed=1")
    before = contents(first)
    others = [start(tmp_path, "--workers", "2", steps=steps) for _ in range(2)]  # two at once do no harm
    for other in others:
        _, errors = other.communicate(timeout=120)
        assert (other.returncode, errors) == (0, ""), errors
    assert contents(first) == before  # the first run was finished
    assert data(tmp_path) == data(uninterrupted)


def test_deleted_results_come_back_byte_for_byte(tmp_path, uninterrupted):
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "copy"))
    before = contents(folder / "results")
    shutil.rmtree(folder / "results")
    status, _, errors = run(folder, steps=SMALL.replace("6000", "30000"))
    assert (status, errors) == (0, "")
    assert contents(folder / "results") == before


def test_extend_keeps_what_there_is_and_runs_only_what_it_lacks(tmp_path, uninterrupted):
    steps = SMALL.replace("6000", "30000")
    shutil.copytree(uninterrupted / "results", tmp_path / "results")
    status, commands, errors = run(tmp_path, "--extend", "--seeds", "2", "--dry-run", steps=steps)
    assert (status, errors, commands.count("--seed 2"), len(commands.splitlines())) == (0, "", 2, 2)
    for _ in range(2):  # the second time there is nothing left to do
        status, _, errors = run(tmp_path, "--extend", "--seeds", "2", steps=steps)
        assert (status, errors) == (0, "")
        rows = data(tmp_path).decode().splitlines()
        assert [row for row in rows if ",2," not in row] == data(uninterrupted).decode().splitlines()
        assert len(rows) == 2 * len(data(uninterrupted).decode().splitlines()) - 1
        folder = tmp_path / "results" / "smoke" / "fig2"
        assert [made["runs"] for made in json.loads((folder / "origin.json").read_text())] == [4]
        assert [line.count("--seed 2") for line in (folder / "commands.txt").read_text().splitlines()] == [0, 1, 0, 1]
    folders = [path.parent for path in tmp_path.glob("runs/reproduce/*/*/args.json")]
    assert len(folders) == 2
    shutil.rmtree(tmp_path / "results")  # two runs again, one of them of another version: it is drawn in no way
    shutil.copytree(uninterrupted / "results", tmp_path / "results")
    arguments = json.loads((folders[0] / "args.json").read_text())
    (folders[0] / "args.json").write_text(json.dumps(arguments | {"num_traces": 7}))
    for _ in range(2):
        status, _, errors = run(tmp_path, "--extend", "--seeds", "2", "--plot-only", steps=steps)
        assert status == 1 and "1 runs are not finished or of another version" in errors
        assert [made["runs"] for made in json.loads((folder / "origin.json").read_text())] == [3]
    before = contents(tmp_path)
    status, _, errors = run(tmp_path, "--extend", "--seeds", "3", steps=SMALL)
    assert status == 2 and errors.startswith("error: --extend: ") and errors.count("\n") == 1
    assert {k: v for k, v in contents(tmp_path).items() if k.name != "driver.py"} == {
        k: v for k, v in before.items() if k.name != "driver.py"
    }


def test_figures_are_written_by_one_at_a_time(tmp_path, monkeypatch):
    """What is kept of a figure is read under a lock on the folder of the results."""
    calls = []
    monkeypatch.setattr(fcntl, "flock", lambda file, _: calls.append(os.fstat(file).st_ino))
    monkeypatch.setattr(reproduce, "make_figure", lambda *_: calls.append("figure"))
    with pytest.raises(SystemExit):
        reproduce.main(Args(figures=("fig2",), plot_only=True, results_dir=tmp_path, runs_dir=tmp_path / "runs"))
    assert calls == [tmp_path.stat().st_ino, "figure"]


def test_a_figure_never_loses_a_run(tmp_path, uninterrupted):
    steps = SMALL.replace("6000", "30000")
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "copy"))
    assert run(folder, "--seeds", "2", steps=steps)[0] == 0  # the same and more
    before = contents(folder / "results")
    for words, other in ((("--seeds", "1"), steps), (("--plot-only",), steps), (("--seeds", "2"), SMALL)):
        status, _, errors = run(folder, *words, steps=other)
        assert status == 2 and errors.count("\n") == 1
        assert "--extend keeps them, or take more --seeds, another --scale or another --results-dir" in errors
        assert contents(folder / "results") == before
    assert run(folder, "--extend", "--seeds", "1", steps=steps)[0] == 0
    assert contents(folder / "results") == before
    (lost,) = folder.glob("runs/reproduce/*/recall=none*seed=2")
    shutil.rmtree(lost)
    status, _, errors = run(folder, "--seeds", "2", "--plot-only", steps=steps)
    assert status == 1 and "was made of some of these and is left as it is" in errors
    assert contents(folder / "results") == before


@pytest.mark.parametrize(
    "file, text", [("data.csv", ""), ("data.csv", "setting,seed,step\na,b"), ("origin.json", "[3]")]
)
def test_damaged_results_are_refused_before_anything_is_run(file, text, tmp_path, uninterrupted):
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "copy"))
    (folder / "results" / "smoke" / "fig2" / file).write_text(text)
    before = contents(folder)
    status, _, errors = run(folder, "--seeds", "3", steps=SMALL.replace("6000", "30000"))
    assert status == 2 and errors.count("\n") == 1
    assert errors.startswith("error: --results-dir: results/smoke/fig2 is damaged")
    assert contents(folder) == before


def test_commands_of_a_dry_run_give_the_same_figure(tmp_path, uninterrupted):
    steps = SMALL.replace("6000", "30000")
    status, commands, _ = run(tmp_path, "--dry-run", steps=steps)
    assert status == 0
    assert len(commands.splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name != "driver.py"] == []
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "envs", tmp_path / "envs")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands.splitlines():
        subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, check=True, capture_output=True)
    status, _, errors = run(tmp_path, "--plot-only", steps=steps)
    assert (status, errors) == (0, "")
    assert data(tmp_path) == data(uninterrupted)
    assert run(tmp_path, "--dry-run", steps=steps) == (0, "", "")  # nothing is left
    (half_done,) = tmp_path.glob("runs/reproduce/*/recall=none*seed=1")
    for file in half_done.glob("events.*"):
        file.unlink()
    status, commands, _ = run(tmp_path, "--dry-run", steps=steps)
    assert commands == f"python recall_a2c_fourroom.py --resume {shlex.quote(str(half_done.relative_to(tmp_path)))}\n"


def test_a_run_that_fails_is_reported_and_stops_no_other(tmp_path):
    """The commands of `learned` are refused by the script, as its maze is too small."""
    (tmp_path / "recall_a2c_fourroom.py").write_text("")
    folder = tmp_path / "run"
    folder.mkdir()
    driver = DRIVER.replace('--recall {label}"', "--recall {label} --size {7 if label == 'none' else 6}\"")
    (folder / "broken.py").write_text(driver.replace("STEPS", SMALL.removeprefix("--size 7 ")))
    result = subprocess.run(
        [sys.executable, "broken.py", "--scale", "smoke"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1
    assert "exit status 2" in result.stderr
    assert "--size must be from 7" in result.stderr
    assert "1 of 2 runs failed" in result.stderr
    read = reproduce.read_data(folder / "results" / "smoke" / "fig2" / "data.csv")
    assert [setting.seeds for setting in read.values()] == [[1]]  # of the other setting


def test_an_interrupt_ends_the_wait_for_a_process_that_is_still_at_work(tmp_path):
    folder = tmp_path / "runs" / "reproduce" / "recall_a2c_fourroom"
    folder.mkdir(parents=True)
    (tmp_path / "driver.py").write_text(DRIVER.replace("STEPS", SMALL))
    listed = subprocess.run(
        [sys.executable, "driver.py", "--scale", "smoke", "--dry-run"], cwd=tmp_path, capture_output=True, text=True
    )
    logs = [Path(shlex.split(line)[-1] + ".log") for line in listed.stdout.splitlines()]
    with (tmp_path / logs[0]).open("a") as one, (tmp_path / logs[1]).open("a") as other:
        for log in (one, other):
            fcntl.flock(log, fcntl.LOCK_EX)
        process = start(tmp_path)
        time.sleep(5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert not [*folder.glob("*/args.json")]


def test_a_run_of_another_version_is_not_taken_for_one_of_today(tmp_path, uninterrupted):
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "copy"))
    (run_dir,) = folder.glob("runs/reproduce/*/recall=none*seed=1")
    saved = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(saved | {"num_steps": 5}))
    status, _, errors = run(folder, steps=SMALL.replace("6000", "30000"))
    assert status == 1
    assert "num_steps was 5 and is 192 now" in errors


def test_a_damaged_figure_is_never_left_behind(tmp_path, monkeypatch, smoke_runs, in_this_process):
    """Whatever is interrupted, data.csv is written last and whole."""
    args = {"figures": ("fig14",), "scale": "smoke", "runs_dir": smoke_runs, "results_dir": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(reproduce, "draw_figure", lambda *_: {}["broken"])
        reproduce.main(Args(**args))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))), reason="Slurm is not installed")
def test_slurm_makes_the_same_figure(tmp_path, uninterrupted):
    """On a real slurmctld and slurmd of our own."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    host, folder = os.uname().nodename, tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost={host}\nAuthType=auth/none\nCredType=cred/none\nSlurmUser=root\n"
        f"SlurmdUser=root\nStateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\n"
        f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\nSlurmctldPort=27917\n"
        f"SlurmdPort=27918\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\n"
        f"SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nReturnToService=2\n"
        f"NodeName={host} CPUs=2 State=UNKNOWN\nPartitionName=main Nodes=ALL Default=YES State=UP\n"
    )
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
    daemons = [
        subprocess.Popen([name, "-D"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]
    try:
        (tmp_path / "driver.py").write_text(DRIVER.replace("STEPS", SMALL.replace("6000", "30000")))
        command = [sys.executable, "driver.py", "--scale", "smoke", "--engine", "slurm"]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert data(tmp_path) == data(uninterrupted)
        assert len([*(tmp_path / "runs" / "reproduce" / "slurm").glob("*_submission.sh")]) == 1  # one job array
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(timeout=60)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "word, settings",
    [
        ("figures", {"figures": ("fig1",)}),
        ("figures", {"figures": ("fig2", "nonsense")}),
        ("--seeds", {"seeds": 0}),
        ("--workers", {"workers": 0}),
        ("--runs-dir", {"runs_dir": Path("file/runs")}),
        ("--results-dir", {"results_dir": Path("file")}),
        ("--results-dir", {"results_dir": Path("."), "figures": ("fig2",)}),
    ],
)
def test_refuses_bad_input(word, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "fig2"):
        Path(name).write_text("precious")
    with pytest.raises(SystemExit) as exit:
        reproduce.main(Args(**settings))
    out, errors = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert word in errors
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"file", "fig2"}
    assert Path("file").read_text() == "precious"


def test_slurm_without_submitit_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        reproduce.main(Args(engine="slurm"))
    assert exit.value.code == 2
    assert "pip install submitit" in capsys.readouterr().err


def test_slurm_that_cannot_be_had_is_refused(tmp_path, monkeypatch, capsys):
    """submitit looks for srun when the executor is made."""

    class NoSlurm:
        def __init__(self, *_, **__):
            raise RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=NoSlurm))
    monkeypatch.setitem(sys.modules, "submitit.helpers", SimpleNamespace(as_completed=None))
    with pytest.raises(SystemExit) as exit:
        reproduce.execute_on_slurm([Run(("recall_sac.py",), tmp_path / "runs" / "script" / "run")], 1)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: --engine slurm: the jobs cannot be submitted: Could not detect")


def test_plot_only_without_runs_writes_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        reproduce.main(Args(figures=("fig2",), plot_only=True))
    assert exit.value.code == 1
    assert "40 runs are not finished" in capsys.readouterr().err
    assert not (tmp_path / "results" / "fig2").exists()


@pytest.mark.parametrize(("name", "drawn"), [("fig14", True), ("fig3", False)])
def test_curves_are_drawn_again_from_data_alone_but_pictures_need_run_folders(name, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "write_verdicts", lambda folder: None)  # which takes its time
    shutil.copytree(Path(reproduce.__file__).parent / "results" / name, tmp_path / "results" / name)
    picture = tmp_path / "results" / name / f"{name}.png"
    picture.write_bytes(b"the old one")
    before = contents(tmp_path / "results" / name)
    with pytest.raises(SystemExit, match="0"):
        reproduce.main(Args(figures=(name,), extend=True, plot_only=True))
    after = contents(tmp_path / "results" / name)
    assert {path.name for path in before if after[path] != before[path]} == ({picture.name} if drawn else set())
    assert picture.read_bytes().startswith(b"\x89PNG" if drawn else b"the old one")


def test_list_names_all_figures(capsys):
    reproduce.main(Args(list=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*FIGURES]


def test_dry_run_prints_commands_of_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(Args(figures=("fig2", "fig9"), dry_run=True, seeds=2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 4 * 3 * 2  # figure 2 is part of figure 9
    assert all(shlex.split(line)[:2] == ["python", "recall_a2c_fourroom.py"] for line in lines)


def test_origin_names_commit_versions_and_hardware():
    origin = json.loads(json.dumps(reproduce.origin()))
    assert {"commit", "python", "torch", "numpy", "gymnasium", "hardware"} <= origin.keys()
    assert origin["hardware"].startswith(f"{os.cpu_count()} cores of ")


def test_origin_is_known_but_for_the_commit_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reproduce.origin()["commit"] == "unknown"
