"""E7 Recall as expectation maximization

Section 4 of the paper says why imitating recall traces is right: it raises a lower bound of log p(success). In a small
maze all of it can be computed, because all ways to the goal can be listed. The file bound.py is yours alone: no
script of the project contains these functions.

The policy is pi(a | s), moves are certain, and p(way) is the product of pi(a_t | s_t) over the steps of a way.
Success is to reach the goal within `horizon` steps. For any distribution q over ways,

    log p(success) = ELBO(q) + KL(q || p(way | success)),    ELBO(q) = sum of q(way) (log p(way) - log q(way)).

The E-step is to make the divergence small, the M-step to raise the ELBO by a better policy. Recall traces do both: the
backtracking model is fitted to successful ways (wake), and its traces are imitated.

A hand-sized example: the corridor of E1, cells 0, 1 and the goal 2, a uniform policy over four actions, start 0 and
horizon 3. The ways are right, right (probability 1/16); a bump in cell 0 first, by one of three actions; or a bump in
cell 1 between, by one of two (1/64 each). So p(success) = 1/16 + 5/64 = 9/64, and its logarithm is -1.962. Given
success, the short way has the probability 4/9.

Written part, half a page: the seminar slides on this paper write argmin KL(q || p) and argmin KL(p || q) as if they
were equal. When are they? Use `divergence` for ways of the least length, and for ways within two more steps.

Reading: section 4 of the paper; Dayan and Hinton, Using Expectation-Maximization for Reinforcement Learning (1997).

Hints: the number of ways is small, so lists and loops will do. The logarithm of a sum is not the sum of logarithms.
"""

EXERCISE = {
    "number": 7,
    "scripts": ["bound"],
    "blank": [
        "trajectories",
        "log_evidence",
        "posterior",
        "elbo",
        "best_backward_model",
        "m_step",
        "divergence",
    ],
    "points": 14,
    "minutes": 120,
    "difficulty": 4,
    "importance": 4,
    "seconds": 30,
}


def run(script, case):
    import numpy as np

    if case["what"] == "ways":
        arguments = case["next_cell"], case["start"], case["goal"], case["horizon"]
        ways = sorted(tuple((int(s), int(a)) for s, a in way) for way in script.trajectories(*arguments))
        table = np.full((len(ways), case["horizon"], 2), -1)
        for row, way in zip(table, ways, strict=True):
            row[: len(way)] = way
        return {"ways": table, "log_evidence": script.log_evidence(ways, case["policy"])}
    ways = [[(s, a) for s, a in way.tolist() if s >= 0] for way in case["ways"]]
    if case["what"] == "bound":
        elbo = script.elbo(ways, case["policy"], case["q"])
        return {"posterior": script.posterior(ways, case["policy"]), "elbo": elbo}
    if case["what"] == "model":
        model = script.best_backward_model(ways, case["weights"], case["next_cell"])
        return {"model": model}
    if case["what"] == "m-step":
        return {"policy": script.m_step(ways, case["weights"], case["policy"])}
    if case["what"] == "em":  # log p(success) after each iteration of expectation maximization
        policy, rising = case["policy"], []
        for _ in range(5):
            policy = script.m_step(ways, script.posterior(ways, policy), policy)
            rising.append(script.log_evidence(ways, policy))
        return {"log_evidence": rising}
    return {"divergence": script.divergence(ways, case["weights"], case["model"], case["next_cell"])}


# ------------------------------------------------------------------------------------------ never handed out
import itertools  # noqa: E402

import numpy as np  # noqa: E402
from exercises.mazes import dynamics, four_rooms  # noqa: E402

TOLERANCE = {"default": [1e-8, 1e-10]}
CORRIDOR = np.array([[0, 1, 0, 0], [1, 2, 1, 0], [2, 2, 2, 2]])


def cases(rng):
    corridor = {
        "what": "ways",
        "next_cell": CORRIDOR,
        "start": 0,
        "goal": 2,
        "horizon": 3,
        "policy": np.full((3, 4), 0.25),
    }
    return [
        ("the corridor", 1, [corridor]),
        ("ways and evidence in the maze", 3, [ways_case(rng, horizon) for horizon in (4, 5, 6)]),
        ("the bound, for any q", 4, [bound_case(rng) for _ in range(5)]),
        ("the backward model of the wake phase", 2, [case(rng, "model", 6) for _ in range(3)]),
        (
            "the policy of the M-step, and that log p rises",
            2,
            [case(rng, "m-step", 6), case(rng, "em", 6), case(rng, "em", 5)],
        ),
        ("how far the backward model is", 2, [divergence_case(rng, 4), divergence_case(rng, 6)]),
    ]


def maze(rng, horizon):
    next_cell, _ = dynamics(four_rooms(11), (3, 3))
    policy = rng.dirichlet(np.ones(4), size=len(next_cell))
    return {"next_cell": next_cell, "start": 12, "goal": 36, "horizon": horizon, "policy": policy}


def ways_case(rng, horizon):
    return {"what": "ways"} | maze(rng, horizon)


def case(rng, what, horizon):
    of = maze(rng, horizon)
    ways = all_ways(of)
    return of | {"what": what, "ways": ways, "weights": rng.dirichlet(np.ones(len(ways)))}


def bound_case(rng):
    of = case(rng, "bound", 5)
    return of | {"q": of["weights"]}


def divergence_case(rng, horizon):
    of = case(rng, "divergence", horizon)
    weights = posterior(of)
    if horizon > 4:
        weights = of["weights"]
    return of | {"weights": weights, "model": model(of | {"weights": weights})}


def all_ways(of, exactly=False, through=False):
    """Tries every sequence of actions; sorted, and padded with -1."""
    horizon, found = of["horizon"], set()
    for actions in itertools.product(range(4), repeat=horizon):
        state, way = of["start"], []
        for action in actions:
            if state == of["goal"] and not through:
                break
            way.append((int(state), action))
            state = of["next_cell"][state, action]
        if state == of["goal"] and (len(way) == horizon or not exactly):
            found.add(tuple(way))
    table = np.full((len(found), horizon, 2), -1)
    for row, way in zip(table, sorted(found), strict=True):
        row[: len(way)] = way
    return table


def evidence(of):
    """By dynamic programming: the mass that has come to the goal within the horizon."""
    mass = np.zeros(len(of["next_cell"]))
    mass[of["start"]] = 1
    for _ in range(of["horizon"]):
        after = np.zeros(len(mass))
        for state in np.flatnonzero(mass):
            if state == of["goal"]:
                after[state] += mass[state]
            else:
                np.add.at(after, of["next_cell"][state], mass[state] * of["policy"][state])
        mass = after
    return np.log(mass[of["goal"]])


def log_p(of, policy=None):
    states, actions = of["ways"][..., 0], of["ways"][..., 1]
    logs = np.log((of["policy"] if policy is None else policy)[states, actions])
    return np.where(states >= 0, logs, 0).sum(axis=1)


def posterior(of, policy=None):
    p = np.exp(log_p(of, policy))
    return p / p.sum()


def steps(of):
    """For each step of all ways: its indices s, a, s' and the number of its way."""
    n, _ = np.nonzero(of["ways"][..., 0] >= 0)
    states, actions = of["ways"][of["ways"][..., 0] >= 0].T
    return states, actions, of["next_cell"][states, actions], n


def model(of, weighted=True, given_later=True):
    s, a, after, n = steps(of)
    counts = np.zeros((*of["next_cell"].shape, len(of["next_cell"])))
    np.add.at(counts, (s, a, after), of["weights"][n] if weighted else 1.0)
    total = counts.sum(axis=(0, 1), keepdims=True) if given_later else counts.sum(axis=(1, 2), keepdims=True)
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)


def improved(of, weights, policy, keep=True, weighted=True):
    s, a, _, n = steps(of)
    counts = 0 * policy
    np.add.at(counts, (s, a), weights[n] if weighted else 1.0)
    result = policy.copy() if keep else np.zeros(policy.shape)
    for state in np.unique(s):
        result[state] = counts[state] / counts[state].sum()
    return result


def rising(of, weighted=True):
    policy, logs = of["policy"], []
    for _ in range(5):
        policy = improved(of, posterior(of, policy), policy, weighted=weighted)
        logs.append(np.log(np.exp(log_p(of, policy)).sum()))
    return {"log_evidence": logs}


def diverging(of, forwards=False):
    s, a, after, n = steps(of)
    q = np.bincount(n, np.log(of["model"][s, a, after]), minlength=len(of["ways"]))
    weights = of["weights"]
    return {"divergence": (weights * (np.log(weights) - q)).sum() if not forwards else (weights * -q).sum()}


def answer(of):
    if of["what"] == "ways":
        return {"ways": all_ways(of), "log_evidence": evidence(of)}
    if of["what"] == "bound":  # log p minus the divergence
        exact = posterior(of)
        log_evidence = np.log(np.exp(log_p(of)).sum())
        return {"posterior": exact, "elbo": log_evidence - (of["q"] * np.log(of["q"] / exact)).sum()}
    if of["what"] == "model":
        return {"model": model(of)}
    if of["what"] == "m-step":
        return {"policy": improved(of, of["weights"], of["policy"])}
    return rising(of) if of["what"] == "em" else diverging(of)


def when(*kinds):
    """A wrong solution of cases of these kinds only."""
    return lambda wrong: lambda of: wrong(of) if of["what"] in kinds else None


def evidence_of(of, ways):
    return np.log(np.exp(log_p(of | {"ways": ways})).sum())


def other_ways(**changes):
    def wrong(of):
        ways = all_ways(of, **changes)
        return {"ways": ways, "log_evidence": evidence_of(of, ways)} if len(ways) else None

    return when("ways")(wrong)


WRONG = [
    ("only ways of exactly `horizon` steps are listed: shorter ones succeed, too", other_ways(exactly=True)),
    ("ways go on through the goal: a way ends when it comes there", other_ways(through=True)),
    (
        "this is the sum of the logarithms: the evidence is the logarithm of the sum",
        when("ways")(lambda of: {"log_evidence": log_p(of | {"ways": all_ways(of)}).sum()}),
    ),
    (
        "the evidence is its logarithm, not p(success) itself",
        when("ways")(lambda of: {"log_evidence": np.exp(evidence(of))}),
    ),
    (
        "p(way) is to be divided by p(success): the posterior sums to 1",
        when("bound")(lambda of: {"posterior": np.exp(log_p(of))}),
    ),
    ("the entropy of q is missing in the bound: - log q(way)", when("bound")(lambda of: {"elbo": of["q"] @ log_p(of)})),
    (
        "the entropy of q has the wrong sign in the bound",
        when("bound")(lambda of: {"elbo": of["q"] @ (log_p(of) + np.log(of["q"]))}),
    ),
    (
        "this is p(a, s' | s): the counts are to be divided by those of the later state",
        when("model")(lambda of: {"model": model(of, given_later=False)}),
    ),
    (
        "the ways are counted without their weights",
        lambda of: (
            {"model": model(of, weighted=False)}
            if of["what"] == "model"
            else {"policy": improved(of, of["weights"], of["policy"], weighted=False)}
            if of["what"] == "m-step"
            else None
        ),
    ),
    (
        "where no way acts the policy is to stay as it was",
        when("m-step")(lambda of: {"policy": improved(of, of["weights"], of["policy"], keep=False)}),
    ),
    ("the term log w(way) is missing in the divergence", when("divergence")(lambda of: diverging(of, forwards=True))),
]

ORAL = [
    (
        "When is argmin KL(q || p) the argmin of KL(p || q)?",
        "When the family of q contains p: then both are p. Otherwise one covers p, the other seeks a mode.",
    ),
    (
        "Why is the divergence 0 for ways of the least length?",
        "Given success, such ways are a Markov chain backwards: what comes before s' depends on s' alone.",
    ),
]
