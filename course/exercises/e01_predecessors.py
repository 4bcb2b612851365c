"""E1 Who could have come before?

A recall trace asks of a state: which state and action came before? In a maze the answer can be listed. For each cell
and each action, find all cells in which this action leads to that cell. There are at most two: the neighbour that moves
in, and the cell itself, if the action bumps into a wall there. The neighbour comes first; what is missing is -1.

A hand-sized example is a corridor of three cells, 0, 1 and the goal 2. The actions are 0 up, 1 right, 2 down, 3 left.

    next_cell   up  right  down  left        predecessors   up      right    down    left
    cell 0       0    1      0     0         cell 0         0 -1    -1 -1    0 -1    1  0
    cell 1       1    2      1     0         cell 1         1 -1     0 -1    1 -1   -1 -1
    cell 2       2    2      2     2         cell 2        -1 -1     1 -1   -1 -1   -1 -1

Left leads to cell 0 from cell 1, which moves, and from cell 0 itself, which bumps. Left never leads to cell 1: that
would be a step out of the goal, and no action is taken there. `can_act` is (True, True, False).

Reading: section 6.1 of the paper; the top of envs/four_room.py.

Hints: go through all cells and actions forwards, and note where you arrive. Then draw the picture of a corner.
"""

EXERCISE = {
    "number": 1,
    "scripts": ["envs.four_room"],
    "blank": ["exact_predecessors"],
    "points": 6,
    "minutes": 30,
    "difficulty": 1,
    "importance": 4,
    "seconds": 20,
}


def run(script, case):
    return {"predecessors": script.exact_predecessors(case["next_cell"], case["can_act"])}


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402
from exercises.mazes import dynamics, four_rooms  # noqa: E402

TOLERANCE = {"default": [0, 0]}


def cases(rng):
    corridor = [[0, 1, 0, 0], [1, 2, 1, 0], [2, 2, 2, 2]]
    hand = {"next_cell": np.array(corridor), "can_act": np.array([True, True, False])}
    return [
        ("the corridor", 1, [hand]),
        ("mazes of four rooms", 3, [maze(four_rooms(size), rng) for size in (7, 8, 11, 15)]),
        ("mazes with random walls", 2, [maze(random_walls(rng), rng) for _ in range(5)]),
    ]


def maze(walls, rng):
    free = np.argwhere(~walls)
    next_cell, can_act = dynamics(walls, free[rng.integers(len(free))])
    return {"next_cell": next_cell, "can_act": can_act}


def random_walls(rng):
    walls = rng.random((rng.integers(5, 9), rng.integers(5, 9))) < 0.3
    walls[0], walls[-1], walls[:, 0], walls[:, -1] = True, True, True, True
    walls[1, 1:3] = walls[2, 1] = False
    return walls


def predecessors(case, acting=None, bumps=True, itself_last=True, slots=2):
    """Lists, for each cell and action, every acting cell that arrives there."""
    next_cell = case["next_cell"]
    acting = case["can_act"] if acting is None else acting
    result = np.full((*next_cell.shape, 2), -1)
    for after, action in np.ndindex(*next_cell.shape):
        before = [s for s in range(len(next_cell)) if acting[s] and next_cell[s, action] == after]
        before = [s for s in before if bumps or s != after]
        before.sort(key=lambda s: (s == after) == itself_last)
        result[after, action, : len(before[:slots])] = before[:slots]
    return {"predecessors": result}


def answer(case):
    return predecessors(case)


def opposite(case):
    """As if a step back were the opposite action."""
    result = np.full((*case["next_cell"].shape, 2), -1)
    for cell, action in np.ndindex(*case["next_cell"].shape):
        result[cell, action, 0] = case["next_cell"][cell, (action + 2) % 4]
    return {"predecessors": result}


def also_the_goal(case):
    entered = [(case["next_cell"][case["can_act"]] == cell).any() for cell in range(len(case["can_act"]))]
    return predecessors(case, acting=case["can_act"] | np.array(entered))


WRONG = [
    (
        "bumps are missing: an action into a wall leaves you where you are, so a cell can precede itself",
        lambda case: predecessors(case, bumps=False),
    ),
    ("an episode ends at the goal: no action is taken there, so it is nobody's predecessor", also_the_goal),
    (
        "can_act is not looked at: walls and the goal are nobody's predecessors, not even their own",
        lambda case: predecessors(case, acting=case["can_act"] | True),
    ),
    ("the opposite action is taken for a step back: at walls and at the goal that is not so", opposite),
    (
        "the cell itself comes before the neighbour: the neighbour is to be the first",
        lambda case: predecessors(case, itself_last=False),
    ),
    (
        "only one predecessor is kept where there are two: the neighbour and the cell itself",
        lambda case: predecessors(case, slots=1),
    ),
]

ORAL = [
    (
        "Which cells have two predecessors under one action?",
        "Those beside a wall, under the action into it, if a cell lies opposite.",
    ),
    (
        "In a slippery maze, what becomes of this function?",
        "A distribution p(s, a | s'), which depends on how often each s is visited.",
    ),
]

ALTERNATIVES = [
    {
        "exact_predecessors": """
table = -np.ones((*next_cell.shape, 2), dtype=int)
arrivals = {}
for cell in range(len(next_cell)):
    for action in range(next_cell.shape[1]):
        if can_act[cell]:
            arrivals.setdefault((int(next_cell[cell, action]), action), []).append(cell)
for (after, action), before in arrivals.items():
    for slot, cell in enumerate(sorted(before, key=lambda cell: cell == after)):
        table[after, action, slot] = cell
return table
"""
    }
]
