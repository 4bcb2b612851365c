"""Bug hunts: a script with one bug, which a student finds, repairs and catches by a test.

    python course/kit.py bugs list
    python course/kit.py bugs make 3 --out hunt3           # the folder for students
    python course/kit.py bugs grade 3 FOLDER               # a folder with the repaired script and test_bug.py

A bug is one find and replace. Its check passes on the script and fails on the bug. Students' tests also have to pass on
decoys: other ways of writing the same thing, or harmless changes.
"""

import ast
import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path

import check
import kit


@dataclass
class Bug:
    title: str  # for the teacher only
    script: str
    find: str
    replace: str
    seen: str  # what runs show, for students too


# ------------------------------------------------------------------------------------------------------ bugs
BUGS = {
    1: Bug(
        "the actions of the buffer's tuples are shifted by one (the authors' first prototype)",
        "recall_a2c_fourroom",
        "            trajectory = [(*episode[t], returns[t]) for t in cut_loops(states)]\n",
        "            actions = [step[1] for step in [*episode[1:], episode[-1]]]\n"
        "            steps = [(states[t], actions[t], *episode[t][2:], returns[t]) for t in range(len(states))]\n"
        "            trajectory = [steps[t] for t in cut_loops(states)]\n",
        "With `--recall learned` at 15 x 15, 100 000 steps: two of three seeds never reach the goal, the "
        "third does after 78 000 steps and loses it again; without the bug after 10 000 to 12 000. The "
        "backtracking loss falls all the same, from about 6 to 0.6, 0.7 and 0.0 (without the bug to 0.1 or "
        "0.2).",
    ),
    2: Bug(
        "the first state of the next episode is stored as the next state of the last step",
        "recall_trpo",
        "        steps.append((states, actions, np.array(rewards, np.float32), next_states, terminated, truncated))\n"
        "        states = np.array(next_states)\n"
        "        for i, info in enumerate(infos):\n"
        '            if "episode" in info:\n'
        '                metrics["charts/episodic_return"] = float(info["episode"]["r"])\n'
        '                metrics["charts/episodic_length"] = info["episode"]["l"]\n'
        "                states[i], _ = envs[i].reset()\n",
        "        states_before, states = states, np.array(next_states)\n"
        "        for i, info in enumerate(infos):\n"
        '            if "episode" in info:\n'
        '                metrics["charts/episodic_return"] = float(info["episode"]["r"])\n'
        '                metrics["charts/episodic_length"] = info["episode"]["l"]\n'
        "                states[i], _ = envs[i].reset()\n"
        "        rewards = np.array(rewards, np.float32)\n"
        "        steps.append((states_before, actions, rewards, states, terminated, truncated))\n",
        "Hopper-v5 ends by falls: three seeds of 100 000 steps are the same to the last bit as without the "
        "bug. Reacher-v5 is cut by a time limit, and there, with `--recall-until 1`, returns are alike (-7.4, "
        "-5.4, -6.6; without the bug -7.8, -7.1, -6.5), but the state loss is lower: -27, -28 and -22 in "
        "place of -17, -7 and -19.",
    ),
    3: Bug(
        "a truncated step counts as terminated",
        "recall_a2c_fourroom",
        "np.where(rollout.terminated, 0, next_values)",
        "np.where(rollout.terminated | rollout.truncated, 0, next_values)",
        "With `--recall none` at 15 x 15 three seeds succeed after 49 000 to 61 000 steps (without the bug 33 "
        "000 to 58 000) and stay there: the curve hardly shows it. The value of the first cell is 3.0 to 3.3 "
        "in place of 3.6 to 3.7, and the loss of the values at the end is 0.04 to 0.06 in place of 0.01 to "
        "0.03.",
    ),
    4: Bug(
        "a terminated step counts as truncated",
        "per_a2c_fourroom",
        "gamma * np.where(rollout.terminated, 0, next_values) - values  # delta_t so far",
        "gamma * next_values - values  # delta_t so far",
        "At 15 x 15 three seeds succeed as soon as without the bug, after 10 000 to 16 000 steps. But the "
        "value of the first cell is 4.8 to 6.5, where the best discounted return is 3.8, and the largest "
        "value is 6.3 to 8.6, where no return is above 5.",
    ),
    5: Bug(
        "imagined actions stay normalised",
        "recall_sac",
        "actions = self.action_mean + self.action_std * (mean + args.action_noise * torch.randn_like(mean))",
        "actions = mean + args.action_noise * torch.randn_like(mean)",
        "On Pendulum-v1 (5 000 steps, `--hidden 32 --learning-rate 3e-3`) three seeds return the same, -142 "
        "to -143, and the action loss is alike, 1.2 to 1.4 (without the bug 1.2 or 1.3). Only the imitation "
        "loss at the end shows it: 2.2 to 3.9 in place of 0.7 to 1.1.",
    ),
    6: Bug(
        "traces store the state after the action, so imitation begins at the goal",
        "recall_a2c_fourroom",
        "steps.append((states, actions))\n        next_states = states[",
        "steps.append((next_states, actions))\n        next_states = states[",
        "At 15 x 15 the greedy agent of three seeds never reaches the goal in 100 000 steps (without the bug "
        "after 2 300 to 15 400). The imitation loss falls to 0.2 to 0.4 all the same (without the bug to 0.1 "
        "or 0.2).",
    ),
    7: Bug(
        "the sign of the tanh's slope in the policy's density",
        "recall_sac",
        "- 0.5 * math.log(2 * math.pi) - log_slope",
        "- 0.5 * math.log(2 * math.pi) + log_slope",
        "On Pendulum-v1 (5 000 steps, `--hidden 32 --learning-rate 3e-3`) three seeds do not learn: returns "
        "of about -1500 in place of -142. The entropy of the one action from -1 to 1 is 68 000 to 93 000 at "
        "the end, where log 2 = 0.69 is the largest possible; without the bug it is about -0.9.",
    ),
    8: Bug(
        "importance weights are not divided by the largest",
        "per_a2c_fourroom",
        "(powers[slots] / powers.min()) ** -beta",
        "(len(powers) * powers[slots] / powers.sum()) ** -beta",
        "At 15 x 15 three seeds succeed after 8 000 to 19 000 steps (without the bug 10 000 to 18 000): the "
        "curve does not show it. The mean weight, `replay/weight`, is 0.94 to 0.99 at the first replay in "
        "place of 0.26, and the steps are so much larger.",
    ),
    9: Bug(
        "the target critics have no lag",
        "recall_sac",
        "target.lerp_(weight.detach(), args.tau)",
        "target.lerp_(weight.detach(), 1 - args.tau)",
        "On Pendulum-v1 (5 000 steps, `--hidden 32 --learning-rate 3e-3`) three seeds do not learn: returns "
        "of -1290 to -1490 in place of -142. Values of the data are -820 to -1210 (without the bug -64 to "
        "-80), and the loss of the values reaches 1 100 to 62 000.",
    ),
    10: Bug(
        "tuples are ranked by V(s) in place of V(s')",
        "recall_sac",
        "for s in tuples.next_states.split(1000)",
        "for s in tuples.states.split(1000)",
        "On Pendulum-v1 (5 000 steps, `--hidden 32 --learning-rate 3e-3`) three seeds return the same, -142 "
        "to -144. `recall/start_value` is -9.5, -2.2 and -4.6 at the end, where it is -8.0, -1.9 and -4.9 "
        "without the bug: it looks fine.",
    ),
    11: Bug(
        "the model's density takes for a variance what is sampled as a standard deviation",
        "recall_trpo",
        "-0.5 * (((change - mean) / log_std.exp()) ** 2 + math.log(2 * math.pi)) - log_std",
        "-0.5 * ((change - mean) ** 2 / log_std.exp() + math.log(2 * math.pi) + log_std)",
        "On Hopper-v5 with `--recall-until 1`, 100 000 steps, returns of three seeds are 640 to 1370 at the "
        "end (without the bug 680 to 960). The state loss is -8.7 to -11.5 (without the bug -8.4 to -14.4): "
        "both within the scatter of seeds.",
    ),
    12: Bug(
        "new priorities are written to the first slots, not to those that were drawn",
        "per_a2c_fourroom",
        "buffer.powers[slots] = ",
        "buffer.powers[: len(slots)] = ",
        "At 15 x 15 three seeds succeed after 9 000 to 14 000 steps (without the bug 10 000 to 18 000): the "
        "curve does not show it. The mean weight, `replay/weight`, stays at 0.24 to the end, where it rises "
        "to 1 without the bug, as all priorities become alike.",
    ),
}

DECOYS = {  # script: [(find, replace)]; a test that fails on them tests how the code is written, not what it does
    "recall_sac": [
        (
            "    optimizer.zero_grad()\n"
            "    (value_loss + policy_loss + temperature_loss).backward()\n"
            "    optimizer.step()\n"
            "    for target, weight in zip(target_critic.parameters(), critic.parameters(), strict=True):\n"
            "        target.lerp_(weight.detach(), args.tau)\n",
            "    for target, weight in zip(target_critic.parameters(), critic.parameters(), strict=True):\n"
            "        target.lerp_(weight.detach(), args.tau)\n"
            "    optimizer.zero_grad()\n"
            "    (value_loss + policy_loss + temperature_loss).backward()\n"
            "    optimizer.step()\n",
        ),
    ],
}
MASK_BY_A_LOOP = (
    "    return torch.stack(states), torch.stack(actions), torch.stack(inside).cumprod(0).bool()\n",
    "    for t in range(1, len(inside)):\n"
    "        inside[t] = inside[t] & inside[t - 1]\n"
    "    return torch.stack(states), torch.stack(actions), torch.stack(inside)\n",
)
DECAY_BY_WHERE = (
    "    decay = gamma * gae_lambda * ~(rollout.terminated | rollout.truncated)\n",
    "    decay = np.where(rollout.terminated | rollout.truncated, 0, gamma * gae_lambda)\n",
)
DECOYS["recall_sac"].append(MASK_BY_A_LOOP)
DECOYS["recall_trpo"] = [MASK_BY_A_LOOP, DECAY_BY_WHERE]
DECOYS["recall_a2c_fourroom"] = DECOYS["per_a2c_fourroom"] = [DECAY_BY_WHERE]


# ------------------------------------------------------------------------------------------------------ checks
# Each passes on the script and on its decoys, and fails on the bug of its number. They are what students' tests may be.
def check_1(script):
    buffer = script.TrajectoryBuffer(10, 1, 0.99)
    buffer.add_episode([[0, 1, 0.0, 1], [1, 2, 0.0, 2], [2, 3, 5.0, 3]])
    tuples = buffer.most_valuable(1.0)
    assert {(s, a) for s, a in zip(tuples.states, tuples.actions, strict=True)} == {(0, 1), (1, 2), (2, 3)}


def check_2(script):
    import numpy as np

    class Counter:  # its state is the number of steps of the episode, which has three
        def reset(self):
            self.steps = 0
            return np.zeros(1), {}

        def step(self, action):
            self.steps += 1
            info = {"episode": {"r": 0.0, "l": 3}} if self.steps == 3 else {}
            return np.full(1, self.steps, float), 0.0, self.steps == 3, False, info

    env = Counter()
    states, _ = env.reset()
    rollout, *_ = script.collect_rollout([env], states[None], script.Actor(1, 1, 4), 7)
    assert (rollout.next_states == rollout.states + 1).all()


def check_3(script):
    import numpy as np

    no, yes, one = np.zeros((1, 1), bool), np.ones((1, 1), bool), np.ones((1, 1))
    rollout = script.Rollout(None, None, one, None, no, yes)
    advantages = script.generalized_advantages(rollout, 0 * one, 4 * one, 0.5, 0.9)
    assert abs(advantages[0, 0] - 3) < 1e-9  # r + gamma V(s'), as the state has a future


def check_4(script):
    import numpy as np

    no, yes, one = np.zeros((1, 1), bool), np.ones((1, 1), bool), np.ones((1, 1))
    rollout = script.Rollout(None, None, one, None, yes, no)
    advantages = script.generalized_advantages(rollout, 0 * one, 4 * one, 0.5, 0.9)
    assert abs(advantages[0, 0] - 1) < 1e-9  # r alone, as nothing follows the goal


def check_5(script):
    import torch

    torch.manual_seed(0)
    actions = torch.tensor([0.6, -0.4]) + 0.05 * torch.randn(500, 2)
    states = torch.randn(500, 3)
    model = script.BacktrackingModel(3, 2)
    model.normalise_by(script.Batch(states, actions, None, None, states + 0.1 * torch.randn(500, 3)))
    _, imagined = model.sample(states, script.Args())
    assert (imagined.mean(0) - actions.mean(0)).abs().max() < 0.1


def check_6(script):
    import torch

    from envs.four_room import FourRoomMaze

    torch.manual_seed(0)
    maze = FourRoomMaze(9)
    model = script.BacktrackingModel(maze, "true")
    starts = maze.goal + 0 * torch.arange(20).numpy()
    states, actions = script.recall_traces(model, starts, int(maze.starts[0]), 5)
    assert (states != maze.goal).all()  # no action is taken at the goal
    assert maze.goal in maze.next_cell[states, actions]


def check_7(script):
    import torch

    u = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = script.tanh_gaussian_log_prob(u / 0.7, torch.tensor(0.7).log() + 0 * u, u).exp()
    assert abs(torch.trapezoid(density, u.tanh()) - 1) < 1e-3


def check_8(script):
    buffer = script.ReplayBuffer(100, 1, 0.99, 0.8, "td-error")
    buffer.add_episode([[0, 0, 0.0, 1, False]] * 50)
    buffer.powers[:50] = [0.1] * 25 + [2.0] * 25
    _, weights = buffer.sample(1000, 0.5)
    assert abs(weights.max() - 1) < 1e-6


def check_9(script):
    import torch

    torch.manual_seed(0)
    actor, critic, target = script.Actor(3, 2, 8), script.Critic(3, 2, 8), script.Critic(3, 2, 8).requires_grad_(False)
    before = [weight.clone() for weight in target.parameters()]
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-5)
    batch = script.Batch(torch.randn(4, 3), torch.zeros(4, 2), torch.ones(4), torch.zeros(4), torch.randn(4, 3))
    script.update_actor_critic(actor, critic, target, optimizer, batch, script.Args(tau=0.005))
    moved = sum((now - old).abs().sum() for now, old in zip(target.parameters(), before, strict=True))
    apart = sum((aim - old).abs().sum() for aim, old in zip(critic.parameters(), before, strict=True))
    assert 0.004 < moved / apart < 0.006


def check_10(script):
    import torch

    torch.manual_seed(0)
    buffer, actor, critic = script.ReplayBuffer(50, 3, 2, "cpu"), script.Actor(3, 2, 8), script.Critic(3, 2, 8)
    for _ in range(50):
        buffer.add(torch.randn(3), torch.zeros(2), 0.0, 0.0, torch.randn(3))
    tuples, values = script.high_value_states(buffer, actor, critic, script.Args(recall_tuples=50, top_fraction=0.5))
    with torch.no_grad():
        own = critic(tuples.next_states, actor(tuples.next_states)[0].tanh()).amin(0)
    assert torch.allclose(values, own, atol=1e-5)


def check_11(script):
    import torch

    torch.manual_seed(0)
    model, state = script.BacktrackingModel(1, 1), torch.zeros(20_000, 1)
    mean, log_std = model.predict_change(state[:1], state[:1])
    model.predict_change = lambda actions, after: (mean + 0 * after, torch.tensor(0.6).log() + 0 * after)
    model.action_std.fill_(1e-6)  # so that all actions are alike
    imagined, _ = model.sample(state, script.Args(state_noise=1.0))
    grid = torch.linspace(-8, 8, 4001)[:, None]
    _, log_density = model.log_prob(grid, 0 * grid, 0 * grid)
    density = log_density.exp()
    centre = torch.trapezoid(density * grid[:, 0], grid[:, 0])
    spread = torch.trapezoid(density * (grid[:, 0] - centre) ** 2, grid[:, 0]).sqrt()
    assert abs(spread - imagined.std()) < 0.03


def check_12(script):
    import numpy as np
    import torch

    buffer = script.ReplayBuffer(40, 1, 0.99, 0.8, "td-error")
    buffer.add_episode([[0, 0, float(i), 1, True] for i in range(40)])
    buffer.sample = lambda batch_size, beta: (np.array([30, 35]), np.ones(2))
    actor, critic = script.mlp(torch.nn.Embedding(3, 8), 4), script.mlp(torch.nn.Embedding(3, 8), 1)
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters()], lr=0.0)
    before = buffer.powers.copy()
    args = script.Args(replay_batch_size=2, priority="td-error")
    script.update_from_replay(actor, critic, optimizer, buffer, args)
    assert set(np.flatnonzero(buffer.powers != before)) == {30, 35}


CHECKS = {number: function for name, function in globals().copy().items() if name.startswith("check_")
          for number in [int(name[6:])]}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ grading
def patched(script: str, find: str, replace: str) -> str:
    """The text of a script with one place replaced."""
    source = kit.reference(f"{script}.py")
    if source.count(find) != 1:
        raise ValueError(f"a patch of {script}.py matches {source.count(find)} times, not once: {find.strip()}")
    return source.replace(find, replace)


RUN = """EXERCISE = {{"scripts": ["{script}"]}}


def run(script, case):
    import test_bug

    test_bug.{function}(script)
    return {{"passed": 1}}
"""


def passes(script: str, source: str, test: str, function: str, start) -> str:
    """What is wrong if this function of a test file is called with the script in a child; "" if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        files = {"run.py": RUN.format(script=script, function=function), "test_bug.py": test, f"{script}.py": source}
        for file, text in (files | {file: kit.reference(file) for file in kit.ENVS}).items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text)
        ((outcome,),) = check.run_cases(folder, [{"cases": [({}, {}, [])]}], 30, start)
    return outcome if isinstance(outcome, str) else ""


def passes_check(number: int, source: str, start) -> str:
    """What is wrong if a script does not pass the check of this bug; "" if it does."""
    test = inspect.getsource(CHECKS[number])
    return passes(BUGS[number].script, source, test, f"check_{number}", start)


def grade(number: int, folder: Path, start) -> list[tuple[str, float, float, str]]:
    """Title, points, points possible and what is wrong, of the three parts of a hunt."""
    bug, texts = BUGS[number], {}
    for name in (f"{bug.script}.py", "test_bug.py"):
        paths = sorted(folder.rglob(name))
        texts[name] = paths[0].read_text(errors="replace") if paths else ""
    repaired, test = texts.values()

    def outcome(source: str) -> str:
        return passes(bug.script, source, test, "test_bug", start)

    wrong = passes_check(number, repaired, start) if repaired else "there is no repaired script"
    of_test = "there is no test_bug.py" if not test else outcome(kit.reference(f"{bug.script}.py"))
    if of_test:
        of_test = f"the test fails on the script without the bug: {of_test}"
    elif not outcome(patched(bug.script, bug.find, bug.replace)):
        of_test = "the test passes on the script with the bug"
    elif problem := next((text for decoy in DECOYS[bug.script] if (text := outcome(patched(bug.script, *decoy)))), ""):
        of_test = f"the test fails on a harmless change, so it tests how the code is written: {problem}"
    return [
        ("the script is repaired", 0 if wrong else 1, 1, wrong),
        ("the test catches the bug, and nothing else", 0 if of_test else 2, 2, of_test),
        ("why the curve shows it, or does not: by hand", 0, 1, ""),
    ]


PAGE = """# Bug hunt {number}

`{script}.py` has one bug. It runs, and this is what runs of it show:

> {seen}

Hand in a folder with

1. the repaired `{script}.py` (1 point);
2. `test_bug.py` with a function `test_bug(script)` that gets the imported script, passes on the right one and fails, by
   `assert`, on the one with the bug (2 points). It must also pass on other ways of writing the same thing;
3. one sentence: why does the learning curve show the bug, or why does it not? (1 point)

Hints: do not read all lines. Say what each function promises, choose an input for which you know the answer, and look.
A loss that is computed from the bug's own output may be blind to it, or even improve.
"""
TEMPLATE = '''"""Run me: python test_bug.py"""


def test_bug(script):
    assert False, "not written yet"


if __name__ == "__main__":
    import {script}

    test_bug({script})
    print("passed")
'''


def make(number: int, out: Path) -> None:
    """Writes the folder of a hunt for students."""
    bug = BUGS[number]
    if out.exists() and any(out.iterdir()):
        raise kit.UsageError(f"--out must be new or empty, {out} is not")
    files = {f"{bug.script}.py": patched(bug.script, bug.find, bug.replace)}
    files["README.md"] = PAGE.format(number=number, script=bug.script, seen=bug.seen)
    files["test_bug.py"] = TEMPLATE.format(script=bug.script)
    for path, text in (files | {file: kit.reference(file) for file in ("requirements.txt", *kit.ENVS)}).items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text)


def verify(start) -> list[str]:
    """What is wrong with the hunts; an empty list if nothing is."""
    problems = []
    for number, bug in BUGS.items():
        source, broken = kit.reference(f"{bug.script}.py"), patched(bug.script, bug.find, bug.replace)
        ast.parse(broken)
        versions = {"the script": source}
        versions |= {f"decoy {i}": patched(bug.script, *decoy) for i, decoy in enumerate(DECOYS[bug.script])}
        for name, text in versions.items():
            if problem := passes_check(number, text, start):
                problems.append(f"bug {number}: {name} fails the check: {problem}")
        problem = passes_check(number, broken, start)
        if not problem.startswith("AssertionError"):
            problems.append(f"bug {number}: its check gives {problem or 'no error'}")
    return problems


def main(args) -> int:
    command, *words = args.words or ["list"]
    if command == "list":
        for number, bug in BUGS.items():
            print(f"{number:2} {bug.script:20} {bug.title}")
        return 0
    if command not in ("make", "grade") or not words or not words[0].isdigit() or int(words[0]) not in BUGS:
        raise kit.UsageError(
            f"bugs needs list, make NUMBER --out DIR or grade NUMBER FOLDER, numbers from 1 to {len(BUGS)}"
        )
    number = int(words[0])
    if command == "make":
        if not args.out:
            raise kit.UsageError("bugs make needs --out")
        make(number, args.out)
        return 0
    if len(words) != 2 or not Path(words[1]).is_dir():
        raise kit.UsageError("bugs grade needs the number of the hunt and a folder that exists")
    with kit.starter(args.user) as start:
        print(check.report(f"Bug hunt {number}", grade(number, Path(words[1]), start)))
    return 0
