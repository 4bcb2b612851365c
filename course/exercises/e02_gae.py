"""E2 Advantages that end where they should

An actor-critic collects T steps of each of E environments and asks of every action: was it better than usual? That is
the advantage. Generalized advantage estimation adds up the surprises that follow an action:

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
    A_t     = delta_t + gamma lambda A_{t+1}

Episodes end inside of the T steps, in two ways, and this exercise is about the difference:

- terminated: the agent is at the goal. Nothing comes after it, so V(s_{t+1}) counts as 0.
- truncated: a time limit has cut the episode. The state s_{t+1} has a future, so V(s_{t+1}) counts. But step t + 1 of
  the arrays belongs to another episode, so its advantage must not flow back over the cut.

A hand-sized example, T = 3 and E = 1, with gamma = 0.5 and lambda = 1:

    rewards      1    0    2
    values       2    4    1
    next_values  4    3    8
    terminated   no   no   no
    truncated    no   yes  no

delta = (1 + 2 - 2, 0 + 1.5 - 4, 2 + 4 - 1) = (1, -2.5, 5). The second step is cut, so A = (1 - 0.5 * 2.5, -2.5, 5) =
(-0.25, -2.5, 5). Had it been terminated, delta would be (1, -4, 5) and A = (-1, -4, 5).

Reading: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation (2016), Eq. 16.

Hints: next_values[t] is the value of the state that step t has led to. At the end of an episode it is not values[t+1].
Do not change the arrays that you are given.
"""

EXERCISE = {
    "number": 2,
    "scripts": ["recall_a2c_fourroom"],
    "blank": ["generalized_advantages"],
    "points": 8,
    "minutes": 40,
    "difficulty": 2,
    "importance": 5,
    "seconds": 20,
}


def run(script, case):
    rollout = script.Rollout(None, None, case["rewards"], None, case["terminated"], case["truncated"])
    arguments = case["values"], case["next_values"], case["gamma"], case["gae_lambda"]
    advantages = script.generalized_advantages(rollout, *arguments)
    return {"advantages": advantages, "rewards afterwards": case["rewards"], "values afterwards": case["values"]}


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402

TOLERANCE = {"default": [1e-5, 1e-6]}  # of single precision


def cases(rng):
    hand = {
        "rewards": np.array([[1.0], [0.0], [2.0]]),
        "values": np.array([[2.0], [4.0], [1.0]]),
        "next_values": np.array([[4.0], [3.0], [8.0]]),
        "terminated": np.zeros((3, 1), bool),
        "truncated": np.array([[False], [True], [False]]),
        "gamma": 0.5,
        "gae_lambda": 1.0,
    }
    return [
        ("the hand-sized example", 1, [hand]),
        ("no episode ends", 1, [random_case(rng, 0, 0) for _ in range(5)]),
        ("episodes that reach the goal", 2, [random_case(rng, 0.3, 0) for _ in range(5)]),
        ("episodes that a time limit cuts", 2, [random_case(rng, 0, 0.3) for _ in range(5)]),
        ("both, and lambda from 0 to 1", 2, [random_case(rng, 0.2, 0.2, lam) for lam in (0, 0.3, 0.6, 0.9, 1)]),
    ]


def random_case(rng, terminated, truncated, gae_lambda=None):
    shape = rng.integers(6, 12), rng.integers(2, 4)
    values = rng.normal(size=(shape[0] + 1, shape[1]))
    ends = rng.random(shape) < terminated
    cuts = (rng.random(shape) < truncated) & ~ends
    if terminated:
        ends[shape[0] // 2, 0], cuts[shape[0] // 2, 0] = True, False
    if truncated:
        cuts[shape[0] // 2, -1], ends[shape[0] // 2, -1] = True, False
    return {
        "rewards": rng.normal(size=shape),
        "values": values[:-1],
        # after the end of an episode the next state is not the one that the arrays go on with
        "next_values": np.where(ends | cuts, rng.normal(size=shape), values[1:]),
        "terminated": ends,
        "truncated": cuts,
        "gamma": rng.uniform(0.8, 0.95),
        "gae_lambda": rng.uniform(0.6, 0.9) if gae_lambda is None else float(gae_lambda),
    }


def advantages(case, bootstrap=None, stop=None, values_after=None, decay=None):
    """The sum over k >= t of (gamma lambda)^(k - t) delta_k, up to and with the first step k at which `stop` is."""
    rewards, values = case["rewards"], case["values"]
    stop = case["terminated"] | case["truncated"] if stop is None else stop
    bootstrap = ~case["terminated"] if bootstrap is None else bootstrap
    values_after = case["next_values"] if values_after is None else values_after
    decay = case["gamma"] * case["gae_lambda"] if decay is None else decay
    result = np.zeros(rewards.shape)
    for t, e in np.ndindex(*rewards.shape):
        for k in range(t, len(rewards)):
            result[t, e] += decay ** (k - t) * (
                rewards[k, e] + case["gamma"] * bootstrap[k, e] * values_after[k, e] - values[k, e]
            )
            if stop[k, e]:
                break
    return {"advantages": result}


def answer(case):
    return advantages(case) | {"rewards afterwards": case["rewards"], "values afterwards": case["values"]}


def shifted(case):
    return np.concatenate([case["values"][1:], case["next_values"][-1:]])


def one_step_late(case):
    stop = case["terminated"] | case["truncated"]
    return advantages(case, stop=np.concatenate([stop[1:], stop[:1] & False]))


WRONG = [
    (
        "a truncated step is taken for a terminated one: V(s_{t+1}) counts after a time limit",
        lambda case: advantages(case, bootstrap=~(case["terminated"] | case["truncated"])),
    ),
    (
        "the value of a terminal state is counted: nothing comes after the goal",
        lambda case: advantages(case, bootstrap=np.ones(case["terminated"].shape)),
    ),
    (
        "your sum runs into the next episode: it must stop at a truncated step, too",
        lambda case: advantages(case, stop=case["terminated"]),
    ),
    (
        "your sum never stops: it must stop at terminated and at truncated steps",
        lambda case: advantages(case, stop=case["terminated"] & False),
    ),
    (
        "values[t + 1] is used for next_values[t]: after an end that is a state of another episode",
        lambda case: advantages(case, values_after=shifted(case)),
    ),
    ("the end of an episode is looked up one step late: at t + 1 in place of t", one_step_late),
    (
        "A_{t+1} is multiplied by lambda without gamma",
        lambda case: advantages(case, decay=case["gae_lambda"]),
    ),
    (
        "these are returns, not advantages: V(s_t) is to be subtracted",
        lambda case: {"advantages": advantages(case)["advantages"] + case["values"]},
    ),
]

ORAL = [
    (
        "What goes wrong if truncated steps count as terminated, and when does it hardly show?",
        "States near the time limit look worthless. In this maze limits are rare after the first success.",
    ),
    (
        "Which values of lambda give the TD error, and which the return minus the value?",
        "0 and 1. Between them, bias is traded for variance.",
    ),
]

ALTERNATIVES = [
    {
        "generalized_advantages": """
last = np.zeros(rollout.rewards.shape[1])
rows = []
for t in range(len(rollout.rewards))[::-1]:
    ends = rollout.terminated[t] | rollout.truncated[t]
    delta = rollout.rewards[t] + gamma * next_values[t] * (1 - rollout.terminated[t]) - values[t]
    last = delta + gamma * gae_lambda * (1 - ends) * last
    rows.insert(0, last)
return np.stack(rows)
"""
    }
]
