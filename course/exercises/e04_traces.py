"""E4 Unroll a trace

A recall trace starts in a valuable state and is unrolled backwards: draw the action that came before, then the state
that came before, and go on from there (Alg. 1, line 11). What is imitated later are pairs (s_t, a_t), so the state
that is stored is the earlier one, in which the action was taken.

Three functions are graded. All other blanks in the scripts belong to other exercises: leave them.

1. `recall_traces` in recall_a2c_fourroom.py: N traces in a maze. A trace that reaches the first cell of the episodes
   ends there. The pair of the first cell counts, nothing after it. It returns tensors.
2. `recall_traces` in recall_sac.py: N traces of vectors, all of the same number of steps, and a mask that says which
   steps count. A trace ends where it leaves the data, in any number of its state: that step and all later ones do not
   count, even if it comes back.
3. `relabel` in recall_goalgan_ant.py: the goal that a trace starts from is appended to all states of the trace; a
   state in which the goal is already reached is not imitated. `states[..., env.places]` is where the agent is, and
   `env.reached(places, goals)` says of arrays (n, G) which places are at their goals.

A hand-sized example: a corridor of cells 0, 1, 2, 3. Episodes begin in cell 0, and every cell is entered from its
left by the action 1. A trace from cell 3 stores (2, 1), (1, 1), (0, 1), in this order, and ends, whatever its
greatest length is.

Reading: section 2.1 and Algorithm 1, line 11 of the paper.

Hints: `sample(cumulative, u)` draws actions from rows of cumulative probabilities. In the maze, the pairs of all traces
stand step by step: first the last steps of all traces, then those before them. The bounds of the data count as inside.
"""

EXERCISE = {
    "number": 4,
    "scripts": ["recall_a2c_fourroom", "recall_sac", "recall_goalgan_ant"],
    "blank": ["recall_traces", "relabel"],
    "points": 8,
    "minutes": 45,
    "difficulty": 2,
    "importance": 5,
    "seconds": 30,
}


def run(script, case):
    import types

    import torch

    if case["what"] == "maze":
        model = Cells(case)
        traces = script.recall_traces(model, case["starts"], case["first_state"], case["length"])
        return dict(zip(("states", "actions"), traces, strict=True))
    case = {name: torch.tensor(value) if hasattr(value, "shape") else value for name, value in case.items()}
    if case["what"] == "vectors":
        model = types.SimpleNamespace(state_mean=case["state_mean"], state_std=case["state_std"])
        model.sample = lambda after, args: step_back(case, after)
        args = types.SimpleNamespace(trace_length=case["length"], trace_limit=case["limit"])
        traces = script.recall_traces(model, case["starts"], args)
        return dict(zip(("states", "actions", "inside"), traces, strict=True))
    env = types.SimpleNamespace(places=slice(0, 2))
    env.reached = lambda places, goals: ((places - goals) ** 2).sum(-1) < case["radius"] ** 2
    states, inside = script.relabel(env, case["states"], case["goals"], case["inside"])
    return {"states": states, "inside": inside}


class Cells:
    """A model that knows for each cell one action that leads there, and where it was taken: (S,) and (S, A)."""

    def __init__(self, case):
        self.case, self.num_states = case, len(case["before"])

    def action_log_probs(self, next_states):
        import torch

        chosen = torch.tensor(self.case["action"])[next_states]
        return torch.where(torch.arange(4) == chosen[:, None], 0.0, -1e9)

    def sample_states(self, actions, next_states):
        return self.case["before"][next_states, actions]


def step_back(case, after):
    """A model without randomness: the state before depends on the state after and on the action."""
    actions = after @ case["action_weight"]
    return after @ case["state_weight"] + actions @ case["weight_of_action"], actions


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402
from exercises.mazes import dynamics, four_rooms  # noqa: E402

TOLERANCE = {"default": [1e-6, 1e-9]}


def cases(rng):
    before = np.array([[-1] * 4, [-1, 0, -1, -1], [-1, 1, -1, -1], [-1, 2, -1, -1]])
    hand = {"what": "maze", "before": before, "action": np.ones(4, int), "starts": np.array([3])}
    hand |= {"first_state": 0, "length": 10}
    return [
        ("the corridor", 1, [hand]),
        ("traces in mazes", 2, [maze(rng, length=60) for _ in range(5)]),
        ("short traces in mazes", 1, [maze(rng, length=3) for _ in range(5)]),
        ("traces of vectors that leave the data and come back", 3, [at_the_bound(), *(vectors(rng) for _ in range(5))]),
        ("goals of traces", 1, [goals(rng) for _ in range(5)]),
    ]


def maze(rng, length):
    """A random tree of ways from a first cell to all cells of a maze of four rooms."""
    size = int(rng.integers(7, 10))
    goal = size - 2, size - 2
    next_cell, _ = dynamics(four_rooms(size), goal)
    first, found = size + 1, [size + 1]
    before, action = np.full((size**2, 4), -1), np.zeros(size**2, int)
    for cell in found:
        for a in rng.permutation(4):
            after = int(next_cell[cell, a])
            if after not in found:
                found.append(after)
                before[after, a], action[after] = cell, a
    starts = rng.choice(found[1:], size=4)
    starts[0] = found[-1]
    case = {"what": "maze", "before": before, "action": action, "starts": starts}
    return case | {"first_state": first, "length": length}


def vectors(rng):
    """Rotations: what has left a box may come back into it."""
    n, angle = 6, rng.uniform(0.3, 0.8)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    action_weight, weight_of_action = rng.normal(size=(2, 1)), 0.05 * rng.normal(size=(1, 2))
    return {
        "what": "vectors",
        "script": "recall_sac",
        "starts": np.array([2, 0.5]) * rng.normal(size=(n, 2)),
        "state_weight": rotation,
        "action_weight": action_weight,
        "weight_of_action": weight_of_action,
        "state_mean": 0.2 * rng.normal(size=2),
        "state_std": np.array([1.0, 0.4]),
        "length": int(rng.integers(8, 14)),
        "limit": 2.0,
    }


def at_the_bound():
    """States that stay where they are: one exactly at the bound, one beyond it."""
    case = {"what": "vectors", "script": "recall_sac", "starts": np.array([[2.0, 0.0], [2.5, 0.0], [-1.5, 1.5]])}
    case |= {"state_weight": np.eye(2), "action_weight": np.ones((2, 1)), "weight_of_action": np.zeros((1, 2))}
    return case | {"state_mean": np.zeros(2), "state_std": np.ones(2), "length": 3, "limit": 2.0}


def goals(rng):
    t, n = 5, 4
    case = {"what": "goals", "script": "recall_goalgan_ant", "states": rng.normal(size=(t, n, 3)), "radius": 1.0}
    inside = np.cumprod(rng.random((t, n)) < 0.9, axis=0).astype(bool)
    inside[:, 0] = True
    return case | {"goals": rng.normal(size=(n, 2)), "inside": inside}


def in_maze(case, earlier=True, keep_first=True, stop=True, forward=False):
    """Trace by trace; then the steps of all traces are put side by side."""
    rows = []
    for n, cell in enumerate(case["starts"]):
        for step in range(case["length"]):
            action = case["action"][cell]
            before = case["before"][cell, action]  # -1 before the first cell, where a trace should have ended
            if keep_first or before != case["first_state"]:
                rows.append((step, n, before if earlier else cell, action))
            cell = before
            if stop and cell == case["first_state"]:
                break
    rows.sort(key=lambda row: (-row[0] if forward else row[0], row[1]))
    table = np.array(rows)
    return {"states": table[:, 2], "actions": table[:, 3]}


def of_vectors(case, earlier=True, revive=False, late=False, forward=False, bound=np.less_equal, norm=False):
    states, actions, alive, cell = [], [], [], case["starts"]
    lives = np.ones(len(cell), bool)
    for _ in range(case["length"]):
        action = cell @ case["action_weight"]
        before = cell @ case["state_weight"] + action @ case["weight_of_action"]
        states.append(before if earlier else cell)
        actions.append(action)
        deviations = np.abs(before - case["state_mean"]) / case["state_std"]
        within = bound(np.hypot(*deviations.T) if norm else deviations.max(axis=1), case["limit"])
        alive.append(within if revive else lives if late else lives & within)
        lives, cell = lives & within, before
    order = slice(None, None, -1 if forward else 1)
    return {"states": np.array(states)[order], "actions": np.array(actions)[order], "inside": np.array(alive)[order]}


def of_goals(case, mask=True, only_before=False):
    states, inside = np.zeros((*case["states"].shape[:2], 5)), case["inside"].copy()
    for t, n in np.ndindex(*inside.shape):
        states[t, n] = [*case["states"][t, n], *case["goals"][n]]
        reached = np.hypot(*(case["states"][t, n, :2] - case["goals"][n])) < case["radius"]
        inside[t, n] &= not (mask and reached)
    return {"states": states, "inside": inside if not only_before else np.cumprod(inside, axis=0).astype(bool)}


def answer(case):
    return {"maze": in_maze, "vectors": of_vectors, "goals": of_goals}[case["what"]](case)


def of(wrong_in_maze=None, wrong_of_vectors=None, wrong_of_goals=None):
    """What known wrong solutions of the three functions give; None where a case is of another function."""
    wrong = {"maze": wrong_in_maze, "vectors": wrong_of_vectors, "goals": wrong_of_goals}
    return lambda case: wrong[case["what"]](case) if wrong[case["what"]] else None


WRONG = [
    (
        "the state is stored before the step back: the first pair sits at the start of the trace, such as the goal",
        of(lambda case: in_maze(case, earlier=False), lambda case: of_vectors(case, earlier=False)),
    ),
    (
        "the pair of the first cell is missing: it is the last that counts",
        of(lambda case: in_maze(case, keep_first=False)),
    ),
    ("the trace goes on beyond the first cell of an episode", of(lambda case: in_maze(case, stop=False))),
    (
        "the order is forwards: the steps just before the starts of the traces come first",
        of(lambda case: in_maze(case, forward=True), lambda case: of_vectors(case, forward=True)),
    ),
    (
        "a trace that has ended revives when it comes back into the data",
        of(None, lambda case: of_vectors(case, revive=True)),
    ),
    (
        "the step that leaves the data still counts: the mask is one step late",
        of(None, lambda case: of_vectors(case, late=True)),
    ),
    ("a number exactly at its bound counts as inside", of(None, lambda case: of_vectors(case, bound=np.less))),
    (
        "each number of a state has a bound of its own: what counts is not the length of the vector",
        of(None, lambda case: of_vectors(case, norm=True)),
    ),
    (
        "states in which the goal is reached are imitated, but an episode ends there",
        of(None, None, lambda case: of_goals(case, mask=False)),
    ),
    (
        "a trace is cut where it touches its goal: only states at the goal are left out, those before them count",
        of(None, None, lambda case: of_goals(case, only_before=True)),
    ),
]

ORAL = [
    (
        "Why may a trace end at the first cell of the episodes?",
        "It is complete. Beyond it, it can only wander around the start.",
    ),
    (
        "Why does a trace end where it leaves the data?",
        "The model has never seen such states; what it imagines there is noise.",
    ),
]

ALTERNATIVES = [
    {
        "recall_traces": """
if hasattr(model, "sample_states"):
    first_state, length = locals().get("first_state"), locals().get("length")
    now, states, actions = list(starts), [], []
    for _ in range(length):
        after = []
        for cell in now:
            log_probs = model.action_log_probs(torch.tensor([int(cell)]))[0]
            a = int(torch.distributions.Categorical(logits=log_probs).sample())
            s = int(model.sample_states(np.array([a]), np.array([cell]))[0])
            states.append(s)
            actions.append(a)
            after += [s] if s != first_state else []
        now = after
    return np.array(states), np.array(actions)
args = locals()["args"]
rows, alive, now = [], torch.ones(len(starts), dtype=torch.bool), starts
while len(rows) < args.trace_length:
    now, action = model.sample(now, args)
    alive = alive & (((now - model.state_mean) / model.state_std).abs().amax(1) <= args.trace_limit)
    rows.append((now, action, alive))
return tuple(torch.stack(column) for column in zip(*rows))
""",
        "relabel": """
repeated = torch.stack([goals] * len(states))
reached = env.reached(states[..., env.places].flatten(0, 1).numpy(), repeated.flatten(0, 1).numpy())
return torch.cat([states, repeated], -1), inside & ~torch.tensor(reached).view(inside.shape)
""",
    }
]
