"""E6 Which states are worth recalling?

Traces are unrolled from states of high value, and the backtracking model is fitted to the tuples that lead there. Which
tuples are these? Three functions choose:

1. `TrajectoryBuffer.most_valuable` in recall_a2c_fourroom.py: of all steps of all trajectories in the buffer, the given
   fraction of highest return-to-go, best first.
2. `high_value_states` in recall_a2c_fourroom.py: N states to start from, drawn uniformly from the candidates that
   `start_states` names: `reward`, next states of tuples with a reward > 0; `value`, the states of the tuples whose
   V(s) is the largest among them; `goal`, the goal.
3. `high_value_states` in recall_sac.py: of `recall_tuples` tuples from the buffer those of highest V(s_{t+1}), best
   first. V is the smaller one of both critics for the greedy action, tanh of the policy's mean. A terminal state has
   no value.

A hand-sized example: two trajectories with returns-to-go (1, 2, 3) and (4, 0.5), of which half are chosen. That is the
half of 5 steps, rounded to 2 as Python does: those of 4 and 3.

Reading: Algorithm 1, lines 8 to 10, and Algorithm 2 of the paper.

Hints: a tuple is valuable because of where it leads to, so V(s_{t+1}) ranks it and not V(s_t). The smaller one of two
critics guards against chance: the larger one is often merely the wrong one.
"""

EXERCISE = {
    "number": 6,
    "scripts": ["recall_a2c_fourroom", "recall_sac"],
    "blank": ["TrajectoryBuffer.most_valuable", "high_value_states"],
    "points": 6,
    "minutes": 30,
    "difficulty": 2,
    "importance": 4,
    "seconds": 30,
}


def run(script, case):
    import types

    import torch

    if case["what"] == "most valuable":
        best, first = [], 0
        for length in case["lengths"]:
            steps = zip(*(case[name][first : first + length].tolist() for name in script.Tuples._fields), strict=True)
            best.append((0.0, list(steps)))
            first += length
        buffer = types.SimpleNamespace(best=best)
        return script.TrajectoryBuffer.most_valuable(buffer, case["fraction"])._asdict()
    if case["what"] == "starts":
        tuples = script.Tuples(*(case[name] for name in script.Tuples._fields))
        maze = types.SimpleNamespace(goal=case["goal"])
        args = types.SimpleNamespace(start_states=case["start_states"], num_traces=case["num_traces"])
        starts = script.high_value_states(tuples, case["values"], maze, args)
        share = [(starts == state).mean() for state in range(len(case["values"]))]
        return {"number": len(starts), "share": share}
    batch = script.Batch(*(torch.tensor(case[name]) for name in script.Batch._fields))
    actor, critic = Greedy(case), Twins(case)
    buffer = types.SimpleNamespace(sample=lambda count: script.Batch(*(column[:count] for column in batch)))
    args = types.SimpleNamespace(recall_tuples=case["count"], top_fraction=case["fraction"])
    tuples, values = script.high_value_states(buffer, actor, critic, args)
    return tuples._asdict() | {"values": values}


class Greedy:
    """A policy: mean and log standard deviation (B, A) of states (B, S)."""

    def __init__(self, case):
        self.case = case

    def __call__(self, states):
        import torch

        mean = states @ torch.tensor(self.case["actor"])
        return mean, torch.zeros_like(mean)


class Twins:
    """Two critics: values (2, B) of states (B, S) and actions (B, A)."""

    def __init__(self, case):
        self.case = case

    def __call__(self, states, actions):
        import torch

        return torch.tensor(self.case["critics"]) @ torch.cat((states, actions), dim=-1).T


# ------------------------------------------------------------------------------------------ never handed out
import math  # noqa: E402

import numpy as np  # noqa: E402

TOLERANCE = {"default": [1e-6, 1e-9], "share": [0, 0.05]}
NAMES = ("states", "actions", "rewards", "next_states", "returns")


def cases(rng):
    return [
        ("the hand-sized example", 1, [hand()]),
        ("the best steps of a buffer", 1, [most_valuable(rng) for _ in range(5)]),
        ("where traces start in a maze", 1, [starts(rng, name) for name in ("reward", "value", "goal")]),
        ("the most valuable tuples", 2, [valuable(rng, 0) for _ in range(5)]),
        ("among terminal ones", 1, [valuable(rng, 0.3) for _ in range(5)]),
    ]


def hand():
    case = {name: np.arange(5) for name in NAMES} | {"rewards": np.zeros(5), "returns": np.array([1, 2, 3, 4, 0.5])}
    return case | {"what": "most valuable", "lengths": np.array([3, 2]), "fraction": 0.5}


def most_valuable(rng):
    lengths = rng.integers(3, 7, size=3)
    n = lengths.sum()
    case = {
        "what": "most valuable",
        "lengths": lengths,
        "fraction": rng.uniform(0.2, 0.8),
        "returns": rng.permutation(n) / 4,
    }
    case |= {name: rng.integers(50, size=n) for name in ("states", "actions", "next_states")}
    return case | {"rewards": rng.normal(size=n)}


def starts(rng, name):
    n, states = 12, 6
    case = {"states": rng.integers(0, states, size=n), "actions": rng.integers(4, size=n)}
    case |= {"rewards": np.where(np.arange(n) % 3, -0.01, 5.0), "next_states": rng.integers(0, states, size=n)}
    case |= {"returns": rng.normal(size=n), "values": rng.permutation(states) / 7}
    case["values"][2:4] = 5, 9  # no tuple has state 3, and 2 is only a next state
    case["states"][(case["states"] == 2) | (case["states"] == 3)] = 4
    case["next_states"][case["next_states"] == 3] = 1
    case["next_states"][:2] = 2, 0
    return case | {"what": "starts", "start_states": name, "goal": 5, "num_traces": 4000}


def valuable(rng, terminal):
    n, s, a = 20, 3, 2
    return {
        "what": "tuples",
        "script": "recall_sac",
        "states": rng.normal(size=(n, s)),
        "actions": rng.normal(size=(n, a)),
        "rewards": rng.normal(size=n),
        "terminated": (rng.random(n) < terminal).astype(float) if terminal else np.zeros(n),
        "next_states": rng.normal(size=(n, s)),
        "actor": rng.normal(size=(s, a)),
        "critics": rng.normal(size=(2, s + a)),
        "count": 18,
        "fraction": rng.uniform(0.2, 0.6),
    }


def best_steps(case, key="returns", sign=-1, whole=False):
    order = np.argsort(sign * case[key])
    if whole:  # the best trajectories as a whole
        ends = np.cumsum(case["lengths"])
        parts = sorted(np.split(np.arange(ends[-1]), ends[:-1]), key=lambda rows: -case["returns"][rows[0]])
        order = np.concatenate(parts)
    chosen = order[: max(1, round(case["fraction"] * len(order)))]
    return {name: case[name][chosen] for name in NAMES}


def candidates(case, of_all=False, states="states", rewarded="next_states"):
    if case["start_states"] == "goal":
        found = [case["goal"]]
    elif case["start_states"] == "reward":
        found = [s for s, reward in zip(case[rewarded], case["rewards"], strict=True) if reward > 0]
    else:
        best = max(case["values"] if of_all else case["values"][case[states]])
        found = [s for s in (range(6) if of_all else case[states]) if case["values"][s] == best]
    share = [np.mean([s == state for s in found]) for state in range(len(case["values"]))]
    return {"number": case["num_traces"], "share": share}


def best_tuples(case, of="next_states", sign=-1, reduce=np.min, keep_terminal=False, squashed=True):
    names = ("states", "actions", "rewards", "terminated", "next_states")
    columns = {name: case[name][: case["count"]] for name in names}
    alive = (columns["terminated"] == 0) | keep_terminal
    columns = {name: column[alive] for name, column in columns.items()}
    mean = columns[of] @ case["actor"]
    inputs = np.concatenate([columns[of], np.tanh(mean) if squashed else mean], axis=1)
    values = reduce(inputs @ case["critics"].T, axis=1)
    order = np.argsort(sign * values)[: math.ceil(case["fraction"] * len(values))]
    return {name: column[order] for name, column in columns.items()} | {"values": values[order]}


FUNCTIONS = {"most valuable": best_steps, "starts": candidates, "tuples": best_tuples}


def answer(case):
    return FUNCTIONS[case["what"]](case)


def of(kind, **changes):
    return lambda case: FUNCTIONS[kind](case, **changes) if case["what"] == kind else None


WRONG = [
    (
        "the worst come first: the best are wanted, best first",
        lambda case: FUNCTIONS[case["what"]](case, sign=1) if case["what"] != "starts" else None,
    ),
    ("steps are ranked by their reward, not by their return-to-go", of("most valuable", key="rewards")),
    (
        "whole trajectories are chosen: single steps are wanted, whatever trajectory they are from",
        of("most valuable", whole=True),
    ),
    ("a reward is got in the next state: traces start there, not in the state before", of("starts", rewarded="states")),
    ("only states of the buffer's tuples may be chosen, not the best of all states", of("starts", of_all=True)),
    ("V is that of the states of the tuples, not of their next states", of("starts", states="next_states")),
    ("tuples are ranked by V(s_t): a tuple is valuable because of where it leads to", of("tuples", of="states")),
    ("the larger one of both critics is taken, not the smaller one", of("tuples", reduce=np.max)),
    ("the mean of both critics is taken, not the smaller one", of("tuples", reduce=np.mean)),
    ("terminal next states are kept: nothing follows them, so they have no value", of("tuples", keep_terminal=True)),
    ("the greedy action is the tanh of the mean", of("tuples", squashed=False)),
]

ORAL = [
    (
        "Why do traces never start from a terminal state here, but at the goal in the maze?",
        "Its value is not learned by the critics; in the maze the reward marks it.",
    ),
    (
        "What is the difference between the best trajectories and the best tuples?",
        "k_traj and k: a bad trajectory may contain a good tuple.",
    ),
]

ALTERNATIVES = [
    {
        "TrajectoryBuffer.most_valuable": """
rows = [row for _, trajectory in self.best for row in trajectory]
rows.sort(key=lambda row: row[-1], reverse=True)
count = max(1, int(round(len(rows) * fraction)))
return Tuples(*[np.array([row[k] for row in rows[:count]]) for k in range(5)])
""",
        "high_value_states": """
if "buffer" in locals():
    drawn = locals()["buffer"].sample(args.recall_tuples)
    keep = [i for i in range(len(drawn.rewards)) if not drawn.terminated[i]]
    drawn = Batch(*[column[keep] for column in drawn])
    mean, _ = locals()["actor"](drawn.next_states)
    both = locals()["critic"](drawn.next_states, torch.tanh(mean))
    value = torch.minimum(both[0], both[1])
    order = torch.sort(value, descending=True).indices[: math.ceil(args.top_fraction * len(keep))]
    return Batch(*[column[order] for column in drawn]), value[order]
maze, tuples, values = locals()["maze"], locals()["tuples"], locals()["values"]
if args.start_states == "goal":
    pool = np.array([maze.goal])
elif args.start_states == "reward":
    pool = np.array([s for s, r in zip(tuples.next_states, tuples.rewards) if r > 0])
else:
    pool = np.array([max(tuples.states, key=lambda s: values[s])])
return np.random.default_rng(0).choice(pool, size=args.num_traces)
""",
    }
]
