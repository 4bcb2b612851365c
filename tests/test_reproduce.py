"""reproduce.py: its statistics, its tables, and that no run is lost, repeated or left out."""

import fcntl
import importlib
import io
import itertools
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tyro
from PIL import Image
from scipy.stats import mannwhitneyu
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

import reproduce
from reproduce import CLAIMS, FIGURES, Args, Claim, Panel, PaperFigure, make_run

ROOT = Path(__file__).parents[1]
SETTINGS = sorted(
    {setting for figure in FIGURES.values() for panel in figure.panels for setting in panel.runs.values()}
)
smoke, processes = (pytest.mark.xdist_group(f"test_reproduce {name}") for name in ("smoke", "processes"))


# ------------------------------------------------------------------------------------------------------ statistics


def test_interquartile_mean_leaves_out_a_quarter_on_both_sides():
    values = np.random.default_rng(0).normal(size=(12, 3))
    expected = [np.mean(sorted(column)[3:9]) for column in values.T]
    np.testing.assert_allclose(reproduce.interquartile_mean(values), expected)
    np.testing.assert_allclose(reproduce.interquartile_mean(values.T, axis=-1), expected)


@pytest.mark.parametrize("seeds, least, most", [(10, 0.85, 0.97), (3, 0.7, 0.85)])
def test_interval_covers_the_true_value_as_often_as_it_says(seeds, least, most):
    """Of ten normal numbers in about 95 % of all cases (somewhat less), of three in four of five."""
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


def curves(success, returns=None, steps=None, visited=None, seeds=None):
    """What a setting has logged, from success rates (seeds, evaluations)."""
    success = np.array(success, dtype=float)
    tags = {"eval/success_rate": success, "eval/return": success if returns is None else returns}
    if visited is not None:
        tags["eval/visited_cells"] = visited
    seeds = range(1, len(success) + 1) if seeds is None else seeds
    steps = 100 * np.arange(success.shape[1]) if steps is None else steps
    index = pd.MultiIndex.from_product([seeds, steps], names=["seed", "step"])
    return pd.DataFrame({tag: np.array(values, dtype=float).ravel() for tag, values in tags.items()}, index)


def test_statistics_of_a_setting():
    setting = curves(
        [[0, 0.5, 0.9, 0.2], [1, 0, 0, 0], [0, 0, 0, 0.89]], visited=[[np.nan] * 3 + [n] for n in (7, 8, 9)]
    )
    found = reproduce.statistics(setting)
    assert found.index.tolist() == [1, 2, 3]
    assert found["steps to success"].tolist() == [200, 0, 300]  # the last one never, so all steps
    assert found["succeeds"].tolist() == [True, True, False]
    assert found["steps to lasting success"].tolist() == [300, 300, 300]
    assert found["success at the end"].tolist() == [0.2, 0, 0.89]
    assert found["last eval/visited_cells"].tolist() == [7, 8, 9]
    np.testing.assert_allclose(found["mean eval/return"], [0.4, 0.25, 0.2225])
    coverage = reproduce.statistics(setting.rename(columns={"eval/success_rate": "eval/coverage"}))
    assert coverage["steps to success"].tolist() == [200, 0, 300]
    assert "steps to success" not in reproduce.statistics(setting[["eval/return"]])


def test_lasting_success_allows_one_failure_in_ten():
    once, often = [0, 1, 1] + 9 * [1] + [0] + 10 * [1], [0, 1] + 10 * [0, 1] + [1]
    lasting = reproduce.statistics(curves([once, often]))["steps to lasting success"]
    assert lasting.tolist() == [100, 2100]  # the last two; before them, every other one fails


def test_the_typical_seed_is_next_to_the_mean():
    visited = [[np.nan, n] for n in (30, 10, 11, 12, 90, 14, 15, 16)]  # the middle half: 12, 14, 15, 16
    everyone = [*range(1, 9)]
    assert reproduce.typical_seed(curves(np.zeros((8, 2)), visited=visited), everyone) == 6
    returns = curves(np.zeros((8, 2)), [[0, n] for n in (30, 10, 11, 12, 90, 14, 15, 16)])
    assert reproduce.typical_seed(returns, everyone) == 6
    assert reproduce.typical_seed(returns, [1, 3, 5]) == 3


def test_a_panel_of_pictures_shows_the_last_one_up_to_its_step():
    data, shown = {command: curves(np.zeros((2, 4))) for command in ("one", "two")}, {}
    for n, command in enumerate(data):
        shown[command] = (n, {})
        for step in (0, 100, 200, 300):
            Image.new("L", (2, 2), step // 100 + 10 * n).save(file := io.BytesIO(), "PNG")
            shown[command][1][step] = file.getvalue()
    panels = (Panel("", {command: command}, "pictures", "", until) for command in data for until in (50, 200, None))
    axes = reproduce.draw_figure(PaperFigure("", "", tuple(panels)), data, shown).axes
    assert [int(np.max(ax.images[0].get_array())) for ax in axes] == [0, 2, 3, 10, 12, 13]


def test_curves_and_last_values_that_are_drawn_are_those_of_the_data():
    success = np.random.default_rng(0).random((5, 4))
    data = {"a": curves(success), "b": curves(success / 2)}
    runs = {"recall traces": "a", "other": "b"}
    panels = (Panel("c", runs, until=200), Panel("f", runs, "finals"), Panel("none", {"x": "not run"}))
    axes = reproduce.draw_figure(PaperFigure("", "", panels), data, {}).axes
    assert len(axes) == 2
    thick = [line for line in axes[0].lines if line.get_linewidth() > 2]
    for line, scale in zip(thick, (1, 2), strict=True):
        assert line.get_xdata().tolist() == [0, 0.1, 0.2, 0.3]
        np.testing.assert_allclose(line.get_ydata(), reproduce.interquartile_mean(success / scale))
    assert axes[0].get_xlim()[1] == 0.2
    np.testing.assert_allclose(axes[1].collections[0].get_offsets()[:, 1], success[:, -1])


def test_growth_is_drawn_by_size_and_says_how_many_seeds_never_succeed():
    panels = tuple(Panel(f"{n} x {n}", {"recall traces": f"r{n}", "PER": f"p{n}"}, "growth") for n in (11, 19))
    data = {
        "r11": solved_at(1, 1, 1),
        "r19": solved_at(2, 2, 11),
        "p11": solved_at(5, 5, 5),
        "p19": solved_at(11, 11, 11),
    }
    (axes,) = reproduce.draw_figure(PaperFigure("", "", panels), data, {}).axes
    lines = {line.get_label(): ([*line.get_xdata()], [*line.get_ydata()]) for line in axes.lines}
    assert lines == {"recall traces": ([11, 19], [100, pytest.approx(1400 / 3)]), "PER": ([11, 19], [500, 1000])}
    assert [text.get_text() for text in axes.texts] == ["", "x1", "", "x3"]


# ------------------------------------------------------------------------------------------------------ verdicts


def judge(*settings, **claim):
    names = tuple("abcd"[: len(settings)])
    return reproduce.judge(Claim("fig2", "text", names, **claim), dict(zip(names, settings, strict=True)))


def solved_at(*evaluations, **kwargs):
    return curves([[float(i >= first) for i in range(11)] for first in evaluations], **kwargs)


AT_LAST = dict(zip(("number", "statistic"), reproduce.AT_LAST[1:], strict=True))


def test_a_claim_holds_if_the_whole_interval_is_above_one():
    slow, fast = solved_at(*[8, 9] * 5), solved_at(*[2, 3] * 5)
    assert judge(slow, fast)[1:] == ("10", "**holds**")
    assert "850 / 250" in judge(slow, fast)[0]
    assert "ratio 3.40" in judge(slow, fast)[0]
    assert judge(fast, slow)[1:] == ("10", "**the reverse holds**")
    assert judge(slow, slow)[2] == "**no difference shown**"
    assert judge(solved_at(*[1, 2, 5, 9, 9] * 2), solved_at(*[1, 2, 4, 9, 9] * 2))[2] == "**no difference shown**"


def test_failures_are_counted_and_tested():
    def failing(number):
        return solved_at(*[2] * (10 - number), *[11] * number)

    ours, seeds, verdict = judge(failing(6), failing(0), number="failures")
    assert "6 against 0" in ours and "p = 0.01" in ours  # 1 - 10! 14! / (4! 20!) = 0.0054
    assert (seeds, verdict) == ("10", "**holds**")
    assert judge(failing(3), failing(0), number="failures")[2] == "**no difference shown**"  # p = 0.11
    assert judge(failing(2), failing(2), number="failures")[2] == "**no difference shown**"


def test_shares_of_success_are_compared_by_their_difference():
    def succeeding(number):
        return solved_at(*[2] * number, *[11] * (10 - number))

    verdicts = [judge(succeeding(a), succeeding(b), **AT_LAST)[2] for a, b in ((10, 0), (7, 0), (0, 0))]
    assert verdicts == ["**holds**", "**holds**", "**no difference shown**"]
    assert "difference 1.00 [1.00, 1.00]" in judge(succeeding(10), succeeding(0), **AT_LAST)[0]


def test_nothing_is_said_of_few_or_missing_seeds():
    slow, fast = solved_at(*[8, 9] * 5), solved_at(*[2, 3] * 5)
    assert judge(solved_at(8, 9, 8, 9), solved_at(2, 3, 2, 3))[1:] == ("4", "**too few seeds**")
    seeds, verdict = judge(slow, solved_at(*[2] * 9))[1:]
    assert (seeds, verdict) == ("10, 9", "**incomplete: not all seeds have finished**")
    assert judge(slow, solved_at(*[2, 3] * 5, seeds=range(2, 12)))[2].startswith("**incomplete")
    four = (slow, fast, solved_at(*[8, 9] * 3), solved_at(*[2, 3] * 3))  # one maze may have more seeds than another
    assert judge(*four, number="geometric mean of the ratios")[1:] == ("10, 6", "**holds**")
    assert judge(*four[:3], fast, number="ratio of both ratios")[2].startswith("**incomplete")


def test_large_means_are_written_in_full():
    many = [solved_at(*[n] * 10, steps=5700 * np.arange(11)) for n in (10, 4)]
    assert "57,000 / 22,800" in judge(*many)[0]


def test_numbers_of_several_means():
    """Of ratios the geometric mean, so that neither side gains by the order."""
    mean = reproduce.NUMBERS["geometric mean of the ratios"]
    assert mean(2, 1, 1, 2) == pytest.approx(1) == mean(1, 2, 2, 1)
    assert mean(8, 1, 2, 1) == pytest.approx(4)
    assert reproduce.NUMBERS["ratio of both ratios"](8, 2, 6, 3) == 2


def test_means_that_are_not_positive_have_no_ratio():
    def earning(*returns):
        return curves(np.zeros((5, 11)), returns=np.array(returns)[:, None] + np.zeros((5, 11)))

    bad, worse, good = (earning(*[mean] * 5) for mean in (-100.0, -200.0, 50.0))
    for pair in ((bad, worse), (good, worse), (worse, good)):
        ours, _, verdict = judge(*pair, statistic="mean eval/return")
        assert verdict.startswith("**no ratio") and re.search(r"no ratio; P = [\d.]+$", ours)


def test_few_seeds_have_no_interval():
    assert judge(solved_at(8, 9), solved_at(2, 3))[0].endswith("ratio 3.40; P = 1.00")
    assert judge(solved_at(8, 9, 9), solved_at(2, 3, 3))[0].endswith("]; P = 1.00")


def test_the_probability_of_improvement_is_the_mann_whitney_statistic():
    assert "; P = 0.19" in judge(solved_at(2, 9), solved_at(8, 9, 10, 10))[0]
    a, b = [3, 1, 7, 5, 5], [2, 5, 4, 4, 4]
    assert f"; P = {mannwhitneyu(a, b).statistic / 25:.2f}" in judge(solved_at(*a), solved_at(*b))[0]


def test_a_claim_is_judged_where_all_its_runs_are_and_listed_where_not(tmp_path):
    settings = FIGURES["fig11"].panels[-1].runs.values()
    table = pd.concat(dict.fromkeys(settings, solved_at(*[3] * 5)), names=["setting"])
    (tmp_path / "fig11").mkdir()
    table.to_csv(tmp_path / "fig11" / "data.csv")
    runs = pd.DataFrame({"command": "c", "commit": "0123456", "machine": "m"}, table.index.droplevel("step").unique())
    runs.to_csv(tmp_path / "fig11" / "runs.csv")
    reproduce.write_verdicts(tmp_path)
    judged, not_run = (tmp_path / "README.md").read_text().split("\nNot run yet:\n")
    judged = [line.split(" | ")[:2] for line in judged.splitlines() if line.startswith("| [")]
    assert [figure for figure, _ in judged] == ["| [fig11](#fig11)"] * 3
    assert judged[0][1] == "recall traces: more area under the learning curve than Goal GAN (PointUMaze-v0)"
    assert "- fig13: recall traces: more area in the mean than Goal GAN (PointUMaze-v0, AntUMaze-v0)\n" in not_run
    assert "- fig8: " in not_run and "- fig11:" not in not_run
    assert "Runs: 15 at 0123456 on m." in not_run  # not a number


# ------------------------------------------------------------------------------------------------------ tables


def test_all_figures_of_the_paper_are_there(capsys):
    assert [name for name, figure in FIGURES.items() if figure.place not in ("ours", "slides")] == [
        f"fig{i}" for i in range(2, 20)
    ]
    assert all(figure.panels for figure in FIGURES.values())
    assert reproduce.main(Args(list=True)) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*FIGURES]


def test_it_is_minimal():
    assert len((ROOT / "reproduce.py").read_text().splitlines()) <= 765


def test_scripts_accept_their_flags():
    """Each flag of each script, with each value that is a word."""
    parsed = set()
    for setting, scale in itertools.product(SETTINGS, ("smoke", "laptop", "paper")):
        _, script, *words = make_run(setting, 3, Args(scale=scale)).command.split()
        key = (script, *(word for word in words if not re.fullmatch(r"[\d.e-]+", word)))
        if key not in parsed:
            module = importlib.import_module(script.removesuffix(".py"))
            args = tyro.cli(module.Args, args=[*words, "--run-dir", "run"])
            assert args.seed == 3 and args.total_timesteps > 0
            parsed.add(key)
    assert len(parsed) > 60


def test_pep_723_block_holds_all_that_the_scripts_need():
    block = re.search(r"(?ms)^# /// script$(.*?)^# ///$", (ROOT / "reproduce.py").read_text())[1]
    dependencies = tomllib.loads(re.sub(r"(?m)^# ?", "", block))["dependencies"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(dependencies) == {line for line in lines if not line.startswith(("#", "pytest"))}


def test_runs_have_folders_of_their_own():
    """A setting with a budget of its own may be another setting's run at --scale smoke, where all budgets are alike."""
    largest = FIGURES["maze-size"].panels[-1].runs["actor-critic"]
    for scale in ("smoke", "laptop"):
        runs = [make_run(setting, seed, Args(scale=scale)) for setting in SETTINGS for seed in (1, 2)]
        assert len({run.folder for run in runs}) == len({run.command for run in runs})
        assert scale == "smoke" or len({run.folder for run in runs}) == len(runs)
        own = make_run(largest, 1, Args(scale=scale)).command.split()
        assert own[own.index("--total-timesteps") + 1] == ("1000" if scale == "smoke" else "1000000")
        assert own.count("--total-timesteps") == own.count("--eval-every") == 1


def test_lengths_of_traces_in_figure_8_are_the_default_and_three_others():
    module = importlib.import_module("recall_trpo")
    for name, length in reproduce.TABLE_1.items():
        assert getattr(module, "default_trace_length", lambda _, n=length: n)(name) == length
        (panel,) = reproduce.trace_lengths(name)
        assert panel.runs["as in Table 1"] == f"{reproduce.TRPO_RECALL} --env-id {name}"
        others = {label: run for label, run in panel.runs.items() if label.endswith("steps")}
        assert all(f"--trace-length {label.split()[0]} " in run for label, run in others.items())
        assert {int(label.split()[0]) for label in others} == {5, 10, 20, 50} - {length}


def test_no_two_labels_of_a_figure_have_the_same_colour():
    for figure in FIGURES.values():
        labels = {label for panel in figure.panels if panel.kind != "pictures" for label in panel.runs}
        assert len(labels) <= len(reproduce.COLOURS) + ("recall traces" in labels)
    assert len({reproduce.BLUE, *reproduce.COLOURS}) == 1 + len(reproduce.COLOURS)


def test_every_claim_is_about_settings_of_its_figure():
    for claim in CLAIMS:
        settings = {setting for panel in FIGURES[claim.figure].panels for setting in panel.runs.values()}
        assert claim.settings and set(claim.settings) <= settings, claim.text
    assert {claim.figure for claim in CLAIMS} >= {f"fig{i}" for i in range(2, 20)} - {"fig5"}  # the runs of fig12
    first = CLAIMS[0]  # the one that needs more steps comes first, so that the ratio is above 1 if the claim holds
    assert first.settings == (f"{reproduce.NONE} --size 15", f"{reproduce.RECALL} --size 15")
    (area,) = [claim for claim in CLAIMS if claim.figure == "fig6" and claim.text.endswith("(Ant-v5)")]
    assert area.settings == (f"{reproduce.TRPO_RECALL} --env-id Ant-v5", f"{reproduce.TRPO} --env-id Ant-v5")


def test_the_results_that_are_here_are_whole_and_of_the_commands_of_today(monkeypatch):
    monkeypatch.chdir(ROOT)
    reproduce.check(Args(dry_run=True))
    for name in FIGURES:
        if (ROOT / "results" / name).exists():
            data, runs = reproduce.read_tables(ROOT / "results" / name)
            assert len(data) > 0 and data.index.is_unique and runs.index.is_unique
            assert [*runs] == ["command", "commit", "machine", "versions"] and not runs.isna().any(axis=None)
            assert {path.name for path in (ROOT / "results" / name).iterdir()} == {
                "data.csv",
                "runs.csv",
                f"{name}.png",
            }


# ------------------------------------------------------------------------------------------------------ smoke


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@smoke
def test_one_figure_with_all_kinds_of_panels_and_all_scripts(tmp_path, monkeypatch, capsys):
    """With runs in this process, one after another, which is faster than a process for each."""
    made = []

    def execute_all(runs, args):
        for run in runs:
            _, script, *words = run.command.split()
            module = importlib.import_module(script.removesuffix(".py"))
            module.main(tyro.cli(module.Args, args=[*words, "--run-dir", str(run.folder)]))
            made.append(run)
        return 0

    rooms = {"recall traces": reproduce.RECALL, "PER": reproduce.PER}
    continuous = {"SAC": reproduce.SAC_RECALL, "TRPO": reproduce.TRPO_RECALL}
    panels = reproduce.panels(reproduce.ROOM, (11,), rooms, "pictures")
    panels += reproduce.panels(reproduce.ROOM, (11,), rooms, "finals", "eval/visited_cells")
    panels += reproduce.panels(reproduce.TASK, ("Hopper-v5",), continuous)
    maze = {"recall traces": reproduce.GAN_RECALL}
    panels += reproduce.panels(reproduce.TASK, ("PointUMaze-v0",), maze, "pictures")
    panels += reproduce.panels(reproduce.TASK, ("PointUMaze-v0",), maze, "curves", "eval/coverage")
    growing = (Panel("11 x 11", reproduce.panels(reproduce.ROOM, (11,), rooms)[0].runs, "growth"),)
    figures = {"fig2": PaperFigure("", "", panels), "fig3": PaperFigure("", "", growing)}
    monkeypatch.setattr(reproduce, "FIGURES", figures)
    monkeypatch.setattr(reproduce, "CLAIMS", ())
    monkeypatch.setattr(reproduce, "execute_all", execute_all)
    args = Args(scale="smoke", runs_dir=tmp_path / "runs", results_dir=tmp_path / "results")
    assert reproduce.main(args) == 0
    assert len(made) == 5  # the four-room runs serve both figures
    for name, settings in (("fig2", 5), ("fig3", 2)):
        folder = tmp_path / "results" / name
        assert sorted(path.name for path in folder.iterdir()) == ["data.csv", f"{name}.png", "runs.csv"]
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 400 and len(set(image.convert("L").resize((64, 64)).get_flattened_data())) > 10
        data, runs = reproduce.read_tables(folder)
        assert len(runs) == len(reproduce.by_setting(data)) == settings
        assert f"]({name}/{name}.png)" in (tmp_path / "results" / "README.md").read_text()

    before = contents(tmp_path / "results")
    shutil.rmtree(tmp_path / "results")
    assert reproduce.main(args) == 0 and len(made) == 5  # nothing twice
    assert contents(tmp_path / "results") == before
    shutil.rmtree(tmp_path / "runs")
    for name in figures:
        (tmp_path / "results" / name / f"{name}.png").write_bytes(b"the old one")
    capsys.readouterr()
    assert reproduce.main(args) == 0 and len(made) == 5  # all rows are there, and curves are drawn from them alone
    assert "the picture stays as it is, as the run folders of " in capsys.readouterr().err
    after = contents(tmp_path / "results")
    assert {path.name for path in before if after[path] != before[path]} == {"fig2.png"}
    assert after[Path("fig2/fig2.png")] == b"the old one"


@smoke
def test_the_slides_have_their_expert_its_dataset_and_all_clones(tmp_path, monkeypatch, capsys):
    """In this process, too. The expert is trained and recorded once, before all others."""
    made, results = [], tmp_path / "results"

    def execute(run, _):
        _, script, *words = run.command.split()
        module = importlib.import_module(script.removesuffix(".py"))
        module.main(tyro.cli(module.Args, args=[*words, "--run-dir", str(run.folder)]))
        made.append(script)
        return ""

    def record(words, **_):
        module = importlib.import_module("inspect_run")
        module.main(tyro.cli(module.Args, args=words[2:]))
        made.append("dataset")
        return SimpleNamespace(returncode=0)

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(reproduce, "FIGURES", {"slides": FIGURES["slides"]})
    monkeypatch.setattr(reproduce, "CLAIMS", tuple(claim for claim in CLAIMS if claim.figure == "slides"))
    monkeypatch.setattr(reproduce, "execute", execute)
    monkeypatch.setattr(reproduce, "execute_all", lambda runs, args: sum(len(execute(run, [])) for run in runs))
    args = Args(scale="smoke", runs_dir=tmp_path / "runs", results_dir=results)
    assert reproduce.main(reproduce.replace(args, dry_run=True)) == 0
    printed = capsys.readouterr()
    assert re.fullmatch("before all others: python recall_sac.py .* ; python inspect_run.py .*\n", printed.err)
    assert len(printed.out.splitlines()) == 11 and not made
    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=record, DEVNULL=None))  # not for all modules
    assert reproduce.main(args) == 0
    assert made == ["recall_sac.py", "dataset", "recall_bc.py", "cat_bc.py", *["recall_bc.py"] * 9]
    lines = (results / "README.md").read_text().splitlines()
    for label, number in reproduce.SLIDES.items():
        assert [
            line for line in lines if re.fullmatch(rf"\| 7 trajectories \| {label} \| {number} \| .* \| 1 \|", line)
        ]
    assert len([line for line in lines if line.startswith("| 50 steps of each | ")]) == 3
    assert len([line for line in lines if "**too few seeds**" in line]) == len(reproduce.CLAIMS) == 12
    shutil.rmtree(tmp_path / "runs")
    assert reproduce.main(args) == 0 and len(made) == 13  # nothing twice


# ------------------------------------------------------------------------------------------------------ processes

STUB = '''"""A script that needs a tenth of a second: it logs recorded evaluations, with a checkpoint after each."""
import fcntl, json, os, pickle, sys, time
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Args:
    recall: str = "none"
    total_timesteps: int = 4
    seed: int = 1
    num_steps: int = 192

if __name__ == "__main__":
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    if given.get("--recall") == "broken":
        sys.exit("a warning\\nerror: --recall cannot be broken")
    folder = Path(given.get("--resume") or given["--run-dir"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = open(folder / "lock", "a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another process is at work in {folder}")
    if "--run-dir" in given:
        args = {"num_steps": 192, "recall": given["--recall"], "run_dir": str(folder)}
        args |= {"seed": int(given["--seed"]), "total_timesteps": int(given["--total-timesteps"])}
        (folder / "args.json").write_text(json.dumps(args))
    args, checkpoint = json.loads((folder / "args.json").read_text()), folder / "checkpoint.pt"
    chunks = pickle.loads(Path(__file__).with_name("recorded").read_bytes())[args["recall"], args["seed"]]
    for step in range(len(checkpoint.read_bytes()) if checkpoint.exists() else 0, len(chunks)):
        while args["recall"] == "learned" and step == 2 and not Path(os.environ.get("GATE", "/")).exists():
            time.sleep(0.01)
        with open(folder / "events.out.tfevents.0", "ab") as events, open(folder / "steps", "a") as steps:
            events.write(chunks[step])
            steps.write(f"{step} ")
        checkpoint.with_name("new").write_bytes(b"." * (step + 1))
        checkpoint.with_name("new").replace(checkpoint)
'''


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with the script and what it logs: the file of events in pieces, one for each evaluation."""
    folder, recorded = tmp_path_factory.mktemp("scripts"), {}
    for recall, seed in itertools.product(("none", "learned"), (1, 2, 3)):
        recorded[recall, seed] = []
        for step in range(5):
            value = Summary.Value(tag="eval/return", simple_value=step / 3 + seed + (recall == "none") / 7)
            events = [Event(file_version="brain.Event:2")] if step == 0 else []
            writer = RecordWriter(file := io.BytesIO())
            for event in (*events, Event(step=step, summary=Summary(value=[value]))):
                writer.write(event.SerializeToString())
            recorded[recall, seed].append(file.getvalue())
    (folder / "recorded").write_bytes(pickle.dumps(recorded))
    (folder / "stub.py").write_text(STUB)
    return folder


@pytest.fixture(autouse=True)
def stubs(request, monkeypatch, tmp_path):
    """In tests of processes, the program makes one short figure of two settings of the script."""
    if request.node.get_closest_marker("xdist_group").args[0] != "test_reproduce processes":
        return
    monkeypatch.setattr(reproduce, "ROOT", scripts := request.getfixturevalue("scripts"))
    monkeypatch.setattr(reproduce, "FIGURES", {"fig2": figure("none", "learned")})
    monkeypatch.setattr(reproduce, "CLAIMS", ())
    scales = {"smoke": "--total-timesteps 4", "laptop": "--total-timesteps 3"}
    monkeypatch.setitem(reproduce.SCALES, "stub.py", scales)
    monkeypatch.setattr(reproduce, "origin", lambda: {"commit": "0123456", "machine": "1 core", "versions": "python 3"})
    monkeypatch.syspath_prepend(scripts)
    monkeypatch.chdir(tmp_path)


def figure(*modes):
    return PaperFigure("6.1", "Stub", (Panel("stub", {mode: f"stub.py --recall {mode}" for mode in modes}),))


def start(folder, *words, gate="/"):
    """Starts the program in a folder, as a fork of this process, which has all imports; returns its number.

    Runs with a learned model stop before their third evaluation until there is a file `gate`.
    """
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["GATE"] = str(gate)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in ((1, "out"), (2, "errors")):
            os.dup2(os.open(Path(f"{folder}.{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        try:
            status = reproduce.main(tyro.cli(Args, args=["--scale", "smoke", *words]))
        except (reproduce.UsageError, KeyboardInterrupt) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 130 if isinstance(error, KeyboardInterrupt) else 2
        except BaseException:
            traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def finish(child, folder):
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, Path(f"{folder}.out").read_text(), Path(f"{folder}.errors").read_text()


def run(folder, *words):
    folder.mkdir(exist_ok=True)
    return finish(start(folder, *words), folder)


def tables(folder):
    return {path: data for path, data in contents(folder / "results" / "smoke").items() if path.name != "lock"}


def wait_until(true):
    deadline = time.time() + 60
    while not true():
        assert time.time() < deadline
        time.sleep(0.005)


def is_free(run_dir):
    with open(run_dir / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A function that gives a folder in which the program has run with so many seeds, to be read only."""
    made = {}

    def folder(seeds=1):
        if seeds not in made:
            made[seeds] = tmp_path_factory.mktemp("finished") / "folder"
            status, out, errors = run(made[seeds], "--seeds", str(seeds))
            assert (status, errors) == (0, ""), errors
            assert out == "fig2: results/smoke/fig2/fig2.png\n"
        return made[seeds]

    return folder


@processes
@pytest.mark.parametrize("number, whole_group", [(9, False), (9, True), (signal.SIGINT, False)])
def test_interrupted_and_started_again_it_loses_nothing_and_runs_nothing_twice(number, whole_group, tmp_path, finished):
    """Killed alone, it leaves a process that goes on; killed as a group, or interrupted, one that is resumed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    child, runs = start(folder, "--workers", "1", gate=tmp_path / "gate"), folder / "runs" / "reproduce" / "stub"
    wait_until(lambda: len([*runs.glob("*/checkpoint.pt")]) == 2)  # in the middle of the second run
    os.killpg(child, number) if whole_group else os.kill(child, number)
    status, _, errors = finish(child, folder)
    first, second = (runs / f"recall={mode}_total-timesteps=4_seed=1" for mode in ("none", "learned"))
    before = contents(first)
    if number == signal.SIGINT:
        assert (status, errors) == (130, "error: stopped; the same command goes on from here\n")
    if number == 9 and not whole_group:
        status, _, errors = run(folder)  # which finds a run at work, says so and goes on
        assert status == 1 and f"error: another process is at work in {second.relative_to(folder)}\n" in errors
        assert "fig2: 1 runs are not finished" in errors
        assert len(reproduce.read_tables(folder / "results" / "smoke" / "fig2")[1]) == 1
    (tmp_path / "gate").touch()
    wait_until(lambda: is_free(second))
    assert ("4" in (second / "steps").read_text()) == (number == 9 and not whole_group)
    others = [start(folder, "--workers", "2") for _ in range(2)]  # two at once do no harm
    statuses = [finish(other, folder)[0] for other in others]
    assert 0 in statuses
    assert contents(first) == before  # the first run was finished
    steps = (second / "steps").read_text().split()
    assert [*dict.fromkeys(steps)] == [*"01234"] and len(steps) <= 6  # at most the one that was cut short again
    assert run(folder)[0] == 0
    assert tables(folder) == tables(finished())


@processes
def test_deleted_results_come_back_byte_for_byte_and_nothing_is_run_again(tmp_path, finished):
    folder = Path(shutil.copytree(finished(2), tmp_path / "copy"))
    before, runs = tables(folder), contents(folder / "runs")
    shutil.rmtree(folder / "results")
    assert run(folder, "--seeds", "2")[0] == 0
    assert tables(folder) == before and {*map(str, before)} >= {"fig2/data.csv", "fig2/runs.csv", "fig2/fig2.png"}
    assert contents(folder / "runs") == runs
    assert run(folder, "--plot-only")[0] == 0 and tables(folder) == before  # fewer seeds lose nothing


@processes
def test_rows_that_are_lacking_are_run_and_added(tmp_path, finished):
    """Without the folders of the runs that are there, which may have been made on another machine."""
    folder = tmp_path / "folder"
    shutil.copytree(finished() / "results", folder / "results")
    status, commands, errors = run(folder, "--seeds", "3", "--dry-run")
    assert (status, errors) == (0, "") and not (folder / "runs").exists()
    assert [line.split()[-3] for line in commands.splitlines()] == ["2", "3"] * 2
    for _ in range(2):  # the second time there is nothing left to do
        status, _, errors = run(folder, "--seeds", "3")
        assert (status, errors) == (0, "")
        assert tables(folder) == tables(finished(3))
        assert len([*(folder / "runs").glob("reproduce/stub/*/args.json")]) == 4
    data, runs = reproduce.read_tables(folder / "results" / "smoke" / "fig2")
    assert runs.index.tolist() == [
        (f"stub.py --recall {mode}", seed) for mode in ("none", "learned") for seed in (1, 2, 3)
    ]
    assert runs["command"].iloc[4] == "python stub.py --recall learned --total-timesteps 4 --seed 2"
    assert runs["commit"].tolist() == ["0123456"] * 6
    assert data.index.get_level_values("step").tolist() == [*range(5)] * 6
    expected = [step / 3 + seed + none / 7 for none in (1, 0) for seed in (1, 2, 3) for step in range(5)]
    np.testing.assert_allclose(data["eval/return"], expected, rtol=1e-5)


@processes
def test_rows_of_other_commands_runs_of_other_versions_and_damaged_tables_are_refused(tmp_path, finished):
    """In one line, before anything is run or changed."""

    def refused(message, *words, folder):
        before = contents(folder)
        status, _, errors = run(folder, *words)
        assert (status, errors.count("\n")) == (2, 1) and re.search(message, errors), errors
        assert contents(folder) == before

    folder = Path(shutil.copytree(finished(), tmp_path / "copy"))
    other = "fig2 was made by other commands than those of today: delete .*or take another --results-dir.*timesteps 4"
    refused(other, "--scale", "laptop", "--seeds", "3", "--results-dir", "results/smoke", folder=folder)
    arguments = next(folder.glob("runs/reproduce/*/recall=none*/args.json"))
    arguments.write_text(arguments.read_text().replace("192", "5"))
    words = ("--seeds", "2", "--results-dir", "new")
    (folder / "new").mkdir()
    (folder / "new" / "lock").touch()
    refused("is of another version: --num-steps was 5 and is 192 now. Delete it", *words, folder=folder)
    table = folder / "results" / "smoke" / "fig2" / "data.csv"
    for text in ("", "setting,seed,step\na,b", "setting,seed,step,eval/return\na,1,2,3", table.read_text() + "x,y"):
        table.write_text(text)
        refused("--results-dir: results/smoke/fig2 is damaged", "--seeds", "3", folder=folder)


@processes
def test_runs_that_were_evaluated_at_other_steps_are_not_mixed(tmp_path, finished):
    folder = Path(shutil.copytree(finished(), tmp_path / "copy"))
    table = folder / "results" / "smoke" / "fig2" / "data.csv"
    table.write_text(table.read_text().replace(",1,3,", ",1,30,"))
    before = tables(folder)
    status, _, errors = run(folder, "--seeds", "2")
    assert (status, errors) == (
        1,
        "fig2: new runs have other steps than results/smoke/fig2, take another --results-dir\n",
    )
    assert {path: data for path, data in tables(folder).items() if "fig2" in str(path)} == {
        path: data for path, data in before.items() if "fig2" in str(path)
    }


@processes
def test_commands_of_a_dry_run_give_the_same_numbers(tmp_path, finished, scripts):
    folder = tmp_path / "folder"
    shutil.copytree(scripts, folder)
    status, commands, _ = run(folder, "--dry-run")
    assert status == 0 and len(commands.splitlines()) == 2
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands.splitlines():
        subprocess.run(["sh", "-c", command], cwd=folder, env=env, check=True, capture_output=True)
    status, _, errors = run(folder, "--plot-only")
    assert (status, errors) == (0, "")
    found, expected = (tables(path) for path in (folder, finished()))
    assert found[Path("fig2/data.csv")] == expected[Path("fig2/data.csv")]
    assert b"unknown" in found[Path("fig2/runs.csv")]
    shutil.rmtree(folder / "results")
    assert run(folder, "--dry-run") == (0, "", "")  # nothing is left
    (half_done,) = folder.glob("runs/reproduce/*/recall=none*seed=1")
    (half_done / "events.out.tfevents.0").unlink()
    assert run(folder, "--dry-run")[1] == f"python stub.py --resume {shlex.quote(str(half_done.relative_to(folder)))}\n"


@processes
def test_a_run_that_fails_is_reported_and_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "FIGURES", {"fig2": figure("broken", "learned")})
    status, out, errors = run(tmp_path / "folder", "--workers", "1")
    assert (status, out) == (1, "fig2: results/smoke/fig2/fig2.png\n")
    report, missing = errors.splitlines()
    assert re.fullmatch(r"stub.py --recall broken .* exit status 1: error: --recall cannot be broken", report)
    assert missing.startswith("fig2: 1 runs are not finished, the first is runs/reproduce/stub/recall=broken_")
    data, _ = reproduce.read_tables(tmp_path / "folder" / "results" / "smoke" / "fig2")
    assert [*reproduce.by_setting(data)] == ["stub.py --recall learned"]


@processes
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, finished):
    reproduce.write(tmp_path / "file", b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: {}["killed"])
    with pytest.raises(KeyError):
        reproduce.write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


@processes
def test_slurm_gets_one_job_array(tmp_path, monkeypatch, finished):
    """Of so many jobs at a time, with a stand-in for submitit, which runs them here."""
    calls = []

    class Executor:
        def __init__(self, folder, cluster):
            calls.append((str(folder), cluster))

        def update_parameters(self, **options):
            calls.append(options["slurm_array_parallelism"])

        def map_array(self, function, *columns):
            columns = pickle.loads(pickle.dumps(columns))  # as they travel to another machine
            return [ThreadPoolExecutor(1).submit(function, *row) for row in zip(*columns, strict=True)]

    helpers = SimpleNamespace(as_completed=as_completed)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor, helpers=helpers))
    assert reproduce.main(Args(scale="smoke", engine="slurm", workers=7)) == 0
    assert calls == [("runs/reproduce/slurm", "slurm"), 7]
    assert tables(tmp_path) == tables(finished())


# ------------------------------------------------------------------------------------------------------ bad input


def test_refuses_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "fig2"):
        Path(name).write_text("precious")
    for word, settings in (
        ("figures", {"figures": ("fig1",)}),
        ("figures", {"figures": ("fig2", "nonsense")}),
        ("--seeds", {"seeds": 0}),
        ("--workers", {"workers": 0}),
        ("file", {"runs_dir": Path("file/runs")}),
        ("file", {"results_dir": Path("file")}),
    ):
        with pytest.raises((reproduce.UsageError, OSError)) as error:
            reproduce.main(Args(**settings))
        assert word in str(error.value) and len(str(error.value).splitlines()) == 1
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"file", "fig2", "lock"}
    assert Path("file").read_text() == "precious"


def test_the_command_line_is_refused_in_one_line(tmp_path, monkeypatch):
    command = [sys.executable, str(ROOT / "reproduce.py"), "fig1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: figures [^\n]*\n", result.stderr), result.stderr
    monkeypatch.chdir(tmp_path)
    with pytest.raises(reproduce.UsageError, match="--seeds"):
        reproduce.main(Args(seeds=0))
    if not importlib.util.find_spec("submitit"):  # otherwise it would go on
        with pytest.raises(ImportError, match="submitit"):
            reproduce.main(Args(figures=("fig2",), engine="slurm"))


def test_plot_only_without_runs_writes_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(Args(figures=("fig2",), plot_only=True)) == 1
    assert "40 runs are not finished" in capsys.readouterr().err
    assert not (tmp_path / "results" / "fig2").exists()


def test_dry_run_prints_commands_of_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(Args(figures=("fig2", "fig9"), dry_run=True, seeds=2)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 4 * 3 * 2  # figure 2 is part of figure 9
    assert all(shlex.split(line)[:2] == ["python", "recall_a2c_fourroom.py"] for line in lines)
    assert [*tmp_path.iterdir()] == []


def test_origin_names_commit_machine_and_versions(monkeypatch, tmp_path):
    origin = reproduce.origin()
    assert re.fullmatch(r"[0-9a-f]+(-dirty)?|unknown", origin["commit"])
    assert origin["machine"].startswith(f"{os.cpu_count()} cores of ")
    assert re.fullmatch(r"python [\d.]+; torch \S+; numpy \S+; gymnasium \S+; mujoco \S+", origin["versions"])
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)  # there is no git here
    assert reproduce.origin()["commit"] == "unknown"
