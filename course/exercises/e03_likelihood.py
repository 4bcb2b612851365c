"""E3 The likelihood of what came before

The backtracking model gives a probability to the state and the action that came before a state:

    q(s_t, a_t | s_{t+1}) = q(a_t | s_{t+1}) q(s_t | a_t, s_{t+1})                                  (Eq. 1)

Everything is conditioned on the later state. The model is fitted by raising log q of what really happened (Eq. 2).

1. Cells (recall_a2c_fourroom.py). `action_log_probs` and `state_log_probs` give the two factors for all actions and
   states; pick the right entries. Without a `state_predictor` the previous state is known exactly: it is
   `predecessors[next_state, action]`, and any other state has the log-probability -1e9.
2. Vectors (recall_sac.py). The model predicts Gaussians of normalised numbers: the action, with variance 1, and the
   change of state s_t - s_{t+1}, with a learned standard deviation. To normalise is to subtract the mean and divide by
   the standard deviation of the data (`action_mean`, `action_std`, `change_mean`, `change_std`). `predict_action` and
   `predict_change` take states and actions as they are. Log densities of several numbers add up.
3. `update_backtracking_model` in both scripts: one step of the optimizer on a batch. It returns a dict with the loss,
   {"recall/backtracking_loss": number}; what else is in it is not checked.

A hand-sized example with two states and two actions. For one s', q(a | s') = (0.25, 0.75), and q(s | a = 1, s') =
(0.8, 0.2). Then q(s = 0, a = 1 | s') = 0.75 * 0.8 = 0.6, and its logarithm is -0.511.

Reading: section 2.1 and Appendix C of the paper.

Hints: no term for the change of variables is wanted, as the densities are of normalised numbers. An optimizer adds
new gradients to old ones, unless you set those to zero. Use `backtracking_batch_size` tuples, drawn with replacement.
"""

EXERCISE = {
    "number": 3,
    "scripts": ["recall_a2c_fourroom", "recall_sac"],
    "blank": ["BacktrackingModel.log_prob", "update_backtracking_model"],
    "points": 10,
    "minutes": 60,
    "difficulty": 3,
    "importance": 5,
    "seconds": 30,
}


def run(script, case):
    import torch

    case = {name: torch.tensor(value) if hasattr(value, "shape") else value for name, value in case.items()}
    if case["what"] == "update":
        return run_update(script, case)
    model = Cells(case) if case["what"] == "cells" else Vectors(case)
    log_prob = script.BacktrackingModel.log_prob(model, case["states"], case["actions"], case["next_states"])
    if case["what"] == "cells":
        return {"log_prob": log_prob}
    return {"of_actions": log_prob[0], "of_changes": log_prob[1]}


class Cells:
    """A model of cells whose networks are tables of logits: for actions (S', A), for states (S', A, S)."""

    def __init__(self, case):
        self.case, self.num_states = case, len(case["action_logits"])
        self.predecessors = case["predecessors"]
        self.state_predictor = None if case["exact"] else "a table"

    def action_log_probs(self, next_states):
        return self.case["action_logits"][next_states].log_softmax(-1)

    def state_log_probs(self, actions, next_states):
        return self.case["state_logits"][next_states, actions].log_softmax(-1)


class Vectors:
    """A model of vectors whose networks are linear."""

    def __init__(self, case):
        for name in ("state_mean", "state_std", "action_mean", "action_std", "change_mean", "change_std"):
            setattr(self, name, case[name])
        self.case = case

    def predict_action(self, next_states):
        return next_states @ self.case["action_weight"]

    def predict_change(self, actions, next_states):
        mean = next_states @ self.case["mean_weight"] + actions @ self.case["mean_of_action"]
        return mean, next_states @ self.case["std_weight"]


def run_update(script, case):
    """Two steps with a model of one number a tuple: log q of tuple i is theta_i."""
    import types

    import torch

    theta = case["theta"].clone().requires_grad_()
    rows = torch.arange(len(theta))
    model = types.SimpleNamespace()
    if case["vectors"]:
        tuples = script.Batch(*[rows] * 5)
        model.log_prob = lambda states, actions, after: (theta[states] / 4, theta[actions] / 2 + theta[after] / 4)
    else:
        tuples = script.Tuples(*[rows.numpy()] * 5)
        model.log_prob = lambda states, actions, after: (theta[states] + theta[actions] + theta[after]) / 3
    optimizer = torch.optim.SGD([theta], lr=1.0)
    args = types.SimpleNamespace(backtracking_batch_size=case["batch_size"])
    for _ in range(2):
        losses = script.update_backtracking_model(model, optimizer, tuples, args)
    return {"theta": theta, "loss": losses["recall/backtracking_loss"]}


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402
from scipy.special import log_softmax  # noqa: E402

TOLERANCE = {"default": [1e-6, 1e-9], "theta": [0.03, 0.03], "loss": [0.03, 0.03]}


def cases(rng):
    return [
        ("the hand-sized example", 1, [hand()]),
        ("cells, learned states", 2, [of_cells(rng, exact=False) for _ in range(5)]),
        ("cells, exact predecessors", 1, [of_cells(rng, exact=True) for _ in range(5)]),
        ("vectors", 3, [of_vectors(rng) for _ in range(5)]),
        ("two steps on tuples of cells", 2, [of_update(rng, "recall_a2c_fourroom") for _ in range(3)]),
        ("two steps on tuples of vectors", 1, [of_update(rng, "recall_sac") for _ in range(3)]),
    ]


def hand():
    logits = np.log([[0.25, 0.75], [0.5, 0.5]])
    state_logits = np.log([[[0.5, 0.5], [0.8, 0.2]], [[0.9, 0.1], [0.5, 0.5]]])
    columns = {"states": np.array([0]), "actions": np.array([1]), "next_states": np.array([0])}
    return columns | {
        "what": "cells",
        "exact": False,
        "action_logits": logits,
        "state_logits": state_logits,
        "predecessors": np.full((2, 2), -1),
    }


def of_cells(rng, exact):
    states, actions = rng.integers(3, 6), 4
    every = np.indices((states, actions, states)).reshape(3, -1)  # all s, a, s'
    return {
        "what": "cells",
        "exact": exact,
        "states": every[0],
        "actions": every[1],
        "next_states": every[2],
        "action_logits": rng.normal(size=(states, actions)),
        "state_logits": rng.normal(size=(states, actions, states)),
        "predecessors": rng.integers(-1, states, size=(states, actions)),
    }


def of_vectors(rng):
    n, s, a = 7, 3, 2
    case = {
        "what": "vectors",
        "script": "recall_sac",
        "states": rng.normal(size=(n, s)),
        "actions": rng.normal(size=(n, a)),
    }
    case["next_states"] = rng.normal(size=(n, s))
    for name, size in (("state", s), ("action", a), ("change", s)):
        case[f"{name}_mean"], case[f"{name}_std"] = rng.normal(size=size), rng.uniform(0.3, 3, size=size)
    shapes = {"action_weight": (s, a), "mean_weight": (s, s), "mean_of_action": (a, s), "std_weight": (s, s)}
    return case | {name: 0.3 * rng.normal(size=shape) for name, shape in shapes.items()}


def of_update(rng, script):
    vectors = script == "recall_sac"
    theta = rng.normal(size=4)
    return {"what": "update", "script": script, "vectors": vectors, "theta": theta, "batch_size": 20_000}


def normal_log_density(x, mean, std):
    return -((x - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))


def cells(case, floor=-1e9, states_given=True, actions_given=True):
    s, a, after = case["states"], case["actions"], case["next_states"]
    log_prob = log_softmax(case["action_logits"], -1)[after, a] * actions_given
    if case["exact"]:
        return {"log_prob": np.where(case["predecessors"][after, a] == s, log_prob, floor)}
    return {"log_prob": log_prob + log_softmax(case["state_logits"], -1)[after, a, s] * states_given}


def vectors(case, given="next_states", sign=1, normalised=True, jacobian=False, variance=False, reduce=np.sum):
    given, change = case[given], sign * (case["states"] - case["next_states"])
    action, change_mean, change_std = case["actions"], case["change_mean"], case["change_std"]
    if normalised:
        action, change = (action - case["action_mean"]) / case["action_std"], (change - change_mean) / change_std
    mean = given @ case["mean_weight"] + case["actions"] @ case["mean_of_action"]
    std = np.exp(given @ case["std_weight"] * (0.5 if variance else 1))
    of_actions = normal_log_density(action, given @ case["action_weight"], 1)
    of_changes = normal_log_density(change, mean, std)
    if jacobian:
        of_actions, of_changes = of_actions - np.log(case["action_std"]), of_changes - np.log(change_std)
    return {"of_actions": reduce(of_actions, axis=-1), "of_changes": reduce(of_changes, axis=-1)}


def update(case, factor=2.0, before=1.0):
    """The mean of theta over a large batch has the gradient 1 / n for each theta; the loss is that before the step."""
    theta = case["theta"]
    n = len(theta)
    return {"theta": theta + factor / n, "loss": -(theta.mean() + before / n)}


def answer(case):
    return {"cells": cells, "vectors": vectors, "update": update}[case["what"]](case)


def of(what, wrong):
    return lambda case: wrong(case) if case["what"] == what else None


def conditioned_on_the_wrong_state(case):
    if case["what"] == "update":
        return None
    swapped = case | {"states": case["next_states"], "next_states": case["states"]}
    return cells(swapped) if case["what"] == "cells" else vectors(case, given="states")


WRONG = [
    ("the model is conditioned on s_t: everything is given s_{t+1}, the later state", conditioned_on_the_wrong_state),
    ("the factor q(s_t | a_t, s_{t+1}) is missing", of("cells", lambda case: cells(case, states_given=False))),
    ("the factor q(a_t | s_{t+1}) is missing", of("cells", lambda case: cells(case, actions_given=False))),
    (
        "a state that is not the exact predecessor must get -1e9, not -inf",
        of("cells", lambda case: cells(case, -np.inf)),
    ),
    ("the change of state is s_t - s_{t+1}, not s_{t+1} - s_t", of("vectors", lambda case: vectors(case, sign=-1))),
    (
        "actions and changes are not normalised by their mean and standard deviation",
        of("vectors", lambda case: vectors(case, normalised=False)),
    ),
    (
        "a term for the change of variables is added: the densities are those of normalised numbers",
        of("vectors", lambda case: vectors(case, jacobian=True)),
    ),
    (
        "a variance is taken for a standard deviation, or the other way: exp(log_std) is the deviation",
        of("vectors", lambda case: vectors(case, variance=True)),
    ),
    (
        "the mean over dimensions is taken: log densities add up",
        of("vectors", lambda case: vectors(case, reduce=np.mean)),
    ),
    ("the step goes the wrong way: the loss is minus log q", of("update", lambda case: update(case, -2, -1))),
    (
        "the sum over the batch is taken in place of the mean",
        of("update", lambda case: update(case, 2 * case["batch_size"], case["batch_size"])),
    ),
    (
        "old gradients are added to new ones: optimizer.zero_grad() is missing",
        of("update", lambda case: update(case, 3)),
    ),
    ("nothing is learned: backward() and step() are both needed", of("update", lambda case: update(case, 0, 0))),
]

ORAL = [
    (
        "Why is everything conditioned on s_{t+1} and not on s_t?",
        "A trace is unrolled backwards: the later state is what is known.",
    ),
    (
        "Why do the widths of the normalisation not appear in the loss?",
        "They are constants: they shift the loss and change no gradient.",
    ),
]

ALTERNATIVES = [
    {
        "BacktrackingModel.log_prob": """
if hasattr(self, "action_std"):
    normal = torch.distributions.Normal
    mean, log_std = self.predict_change(actions, next_states)
    a = (actions - self.action_mean) / self.action_std
    d = ((states - next_states) - self.change_mean) / self.change_std
    of_actions = normal(self.predict_action(next_states), 1.0).log_prob(a)
    return of_actions.sum(1), normal(mean, log_std.exp()).log_prob(d).sum(1)
rows = torch.arange(len(states))
total = self.action_log_probs(next_states)[rows, actions]
if self.state_predictor is not None:
    return total + self.state_log_probs(actions, next_states)[rows, states]
return torch.where(self.predecessors[next_states, actions] == states, total, torch.full_like(total, -1e9))
""",
        "update_backtracking_model": """
import random
rows = random.choices(range(len(tuples.actions)), k=args.backtracking_batch_size)
pick = [torch.as_tensor(column)[rows] for column in (tuples.states, tuples.actions, tuples.next_states)]
result = model.log_prob(*pick)
loss = -(sum(result) if isinstance(result, tuple) else result).sum() / len(rows)
optimizer.zero_grad(set_to_none=True)
loss.backward()
optimizer.step()
return {"recall/backtracking_loss": float(loss)}
""",
    }
]
