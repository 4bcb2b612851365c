"""E5 Imitate, also at the edge

The policy imitates a trace by raising log pi(a_t | s_t) of its pairs (Eq. 3). Soft actor-critic's policy draws a
Gaussian number u and takes the action a = tanh(u). Two things then need care.

1. `tanh_gaussian_log_prob`: the density of tanh(u) is that of u divided by the slope of the tanh, 1 - tanh(u)^2.
   Where the tanh is flat, many u share few actions: the density rises. Far out, 1 - tanh(u)^2 rounds to 0, and log 0
   must not happen. Use 1 - tanh(u)^2 = 4 / (exp(u) + exp(-u))^2.
2. `Actor.log_prob_of_clipped`: actions of traces are clipped to +-0.98. One that was clipped stands for all actions
   beyond 0.98. These have the probability P(u > atanh 0.98), or P(u < -atanh 0.98) on the other side; divided by
   their width 0.02 it is a mean density. Numbers of an action are independent: their logarithms add up.
3. `imitate`: one step of the optimizer on the steps of traces that count (`inside`). It returns a dict with the loss as
   "recall/imitation_loss", and as "recall/trace_length" the mean number of steps that count of a trace. If no step
   counts, the optimizer makes none, and there is no loss in the dict.

A hand-sized example: mean 0, std 1, u = 0. The density of u is 0.3989 and the slope of the tanh 1, so the log density
of the action 0 is -0.9189. An action of 0.98 stands for u > 2.2976, of probability 0.0108; its log density is
log(0.0108 / 0.02) = -0.617.

Reading: section 3.2, Eq. 3 of the paper; Haarnoja et al., Soft Actor-Critic (2018), Appendix C.

Hints: log(exp(u) + exp(-u)) = u + softplus(-2 u). torch.special.log_ndtr is the logarithm of the normal distribution
function. Check that your density integrates to 1 over the actions.
"""

EXERCISE = {
    "number": 5,
    "scripts": ["recall_sac"],
    "blank": ["tanh_gaussian_log_prob", "Actor.log_prob_of_clipped", "imitate"],
    "points": 12,
    "minutes": 75,
    "difficulty": 4,
    "importance": 5,
    "seconds": 30,
}


def run(script, case):
    import torch

    case = {name: torch.tensor(value) if hasattr(value, "shape") else value for name, value in case.items()}
    if case["what"] == "density":
        return {"log_density": script.tanh_gaussian_log_prob(case["noise"], case["log_std"], case["u"])}
    if case["what"] == "integral":  # over actions from -1 to 1, in small steps of u
        u = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
        noise = (u - case["mean"]) / case["log_std"].exp()
        density = script.tanh_gaussian_log_prob(noise, case["log_std"].expand(len(u)), u).exp()
        return {"integral": torch.trapezoid(density, u.tanh())}
    if case["what"] == "clipped":
        return {"log_prob": script.Actor.log_prob_of_clipped(Policy(case), case["states"], case["actions"])}
    theta = case["theta"].clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.1)
    actor = Imitator(theta)
    for _ in range(2):
        losses = script.imitate(actor, optimizer, case["states"], case["actions"], case["inside"])
    loss = losses.get("recall/imitation_loss", torch.tensor(0.0))
    return {"theta": theta, "loss": loss, "trace_length": losses["recall/trace_length"]}


class Policy:
    """A policy without a network: its means and log standard deviations are the halves of its states."""

    def __init__(self, case):
        self.case = case

    def __call__(self, states):
        return states.chunk(2, dim=-1)


class Imitator:
    """A policy of one weight for each number: log pi(a | s) is minus the sum of (a - theta s)^2."""

    def __init__(self, theta):
        self.theta = theta

    def log_prob_of_clipped(self, states, actions):
        return -((actions - self.theta * states) ** 2).sum(-1)


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402
from scipy.special import log_ndtr  # noqa: E402

TOLERANCE = {"default": [2e-4, 2e-5], "integral": [0, 2e-3]}
EDGE = 0.98


def cases(rng):
    hand = {"what": "density", "noise": np.zeros(1), "log_std": np.zeros(1), "u": np.zeros(1)}
    edge = {"what": "clipped", "states": np.zeros((2, 2), np.float32)}
    edge["actions"] = np.array([[0.0], [EDGE]], np.float32)
    return [
        ("the hand-sized example", 1, [hand, edge]),
        ("density of tanh(u)", 2, [density(rng, spread=1.5) for _ in range(5)]),
        ("it integrates to 1", 1, [integral(rng) for _ in range(3)]),
        ("far out, where the slope rounds to 0", 2, [density(rng, spread=30) for _ in range(5)]),
        ("actions of traces, some clipped", 3, [clipped(rng) for _ in range(5)]),
        ("two steps on the pairs of traces", 2, [steps(rng, 0.8) for _ in range(5)]),
        ("no step counts", 1, [steps(rng, 0) for _ in range(2)]),
    ]


def density(rng, spread):
    noise, log_std = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    u = spread * rng.normal(size=(6, 2))
    if spread > 10:
        u[0] = 40, -40
    columns = {"noise": noise, "log_std": log_std, "u": u}
    return {"what": "density"} | {name: x.astype(np.float32) for name, x in columns.items()}


def integral(rng):
    return {"what": "integral", "mean": rng.normal(size=1), "log_std": rng.uniform(-1.0, -0.3, size=1)}


def clipped(rng):
    mean, log_std = rng.normal(size=(8, 3)), rng.uniform(-1, 0.5, size=(8, 3))
    actions = np.clip(1.2 * rng.normal(size=(8, 3)), -EDGE, EDGE)
    actions[0] = EDGE, -EDGE, 0.5
    columns = {"states": np.concatenate([mean, log_std], axis=1), "actions": actions}
    return {"what": "clipped"} | {name: x.astype(np.float32) for name, x in columns.items()}


def steps(rng, share):
    shape = 5, 4, 2
    inside = np.cumprod(rng.random(shape[:2]) < share, axis=0).astype(bool)
    inside[0, 0], inside[-1, -1] = share > 0, False
    return {
        "what": "steps",
        "states": rng.normal(size=shape),
        "actions": rng.normal(size=shape),
        "inside": inside,
        "theta": 0.5 * np.ones(2),
    }


def of_density(case, of_slope=-1.0, rounded=False, epsilon=0.0):
    noise, log_std, u = (case[name].astype(float) for name in ("noise", "log_std", "u"))
    log_slope = 2 * (np.log(2) - np.logaddexp(u, -u))
    if rounded:
        with np.errstate(divide="ignore"):
            log_slope = np.log(1 - np.tanh(case["u"]) ** 2 + np.float32(epsilon)).astype(float)
    of_u = -(noise**2) / 2 - log_std - np.log(2 * np.pi) / 2
    return {"log_density": of_u + of_slope * log_slope}


def of_integral(case, of_slope=-1):
    u = np.linspace(-9, 9, 20_001)
    std = np.exp(case["log_std"])
    of_u = np.exp(-((u - case["mean"]) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi))
    return {"integral": np.trapezoid(of_u * np.cosh(u) ** (-2.0 * of_slope), np.tanh(u))}


def of_clipped(case, edges=True, width=1 - EDGE, of_slope=-1, reduce=np.sum, mirrored=True):
    mean, log_std = np.split(case["states"].astype(float), 2, axis=1)
    actions = np.clip(case["actions"].astype(float), -EDGE, EDGE)
    u = np.arctanh(actions)
    inside = of_density({"noise": (u - mean) / np.exp(log_std), "log_std": log_std, "u": u}, of_slope)["log_density"]
    sign = np.sign(actions) if mirrored else 1
    beyond = log_ndtr((sign * mean - np.arctanh(EDGE)) / np.exp(log_std)) - np.log(width)
    is_clipped = np.abs(case["actions"]) >= np.float32(EDGE)
    return {"log_prob": reduce(np.where(is_clipped & edges, beyond, inside), axis=1)}


def of_steps(case, total=False, everything=False, sign=1, keep=False):
    """Two steps of 0.1 along the gradient of the mean of (a - theta s)^2."""
    inside, theta, old = case["inside"], case["theta"].copy(), 0
    length = inside.sum() / inside.shape[1]
    if not inside.any():
        return {"theta": theta, "loss": 0.0, "trace_length": length}
    chosen = inside | everything
    s, a = case["states"][chosen], case["actions"][chosen]
    count = 1 if total else len(s)
    for _ in range(2):
        loss = sign * ((a - theta * s) ** 2).sum() / count
        gradient = sign * (-2 * s * (a - theta * s)).sum(axis=0) / count
        old = gradient + (old if keep else 0)
        theta = theta - 0.1 * old
    return {"theta": theta, "loss": loss, "trace_length": length}


def answer(case):
    functions = {"density": of_density, "integral": of_integral, "clipped": of_clipped, "steps": of_steps}
    return functions[case["what"]](case)


def of(*kinds, **changes):
    functions = {"density": of_density, "integral": of_integral, "clipped": of_clipped, "steps": of_steps}
    return lambda case: functions[case["what"]](case, **changes) if case["what"] in kinds else None


WRONG = [
    (
        "the sign of the slope: tanh squeezes, so the density rises by 1 / slope",
        of("density", "integral", "clipped", of_slope=1),
    ),
    (
        "the slope of the tanh is left out: this is the density of u, not of tanh(u)",
        of("density", "integral", "clipped", of_slope=0),
    ),
    ("log(1 - tanh(u)^2) fails where the tanh rounds to 1: write it with exp or softplus", of("density", rounded=True)),
    (
        "a small number inside of the logarithm hides log 0, but far out the density is then far too low",
        of("density", rounded=True, epsilon=1e-6),
    ),
    ("a clipped action is taken for exactly 0.98: it stands for all actions beyond", of("clipped", edges=False)),
    ("the probability beyond 0.98 is to be divided by the width 0.02 of these actions", of("clipped", width=1.0)),
    ("at -0.98 the probability is that of u < -atanh 0.98, not of u > atanh 0.98", of("clipped", mirrored=False)),
    ("the mean over the numbers of an action is taken: log densities add up", of("clipped", reduce=np.mean)),
    ("the sum over all pairs is taken in place of their mean", of("steps", total=True)),
    ("pairs after the end of a trace are imitated: only `inside` counts", of("steps", everything=True)),
    ("the step makes the traces less likely: the loss is minus the mean of log pi", of("steps", sign=-1)),
    ("old gradients are added to new ones: optimizer.zero_grad() is missing", of("steps", keep=True)),
]

ORAL = [
    (
        "What would a policy at its bounds learn if a clipped action were taken for exactly 0.98?",
        "To come back from the bound.",
    ),
    (
        "Why does the log density rise where the tanh is flat?",
        "Many u fall on few actions; the mass is kept, the width shrinks.",
    ),
]

ALTERNATIVES = [
    {
        "tanh_gaussian_log_prob": """
import torch
of_u = torch.distributions.Normal(0.0, 1.0).log_prob(noise.double()) - log_std.double()
return of_u - math.log(4) + 2 * torch.logaddexp(u.double(), -u.double())
""",
        "Actor.log_prob_of_clipped": """
mean, log_std = self(states)
total = 0
for k in range(actions.shape[1]):
    m, std, a = mean[:, k].double(), log_std[:, k].double().exp(), actions[:, k].double()
    edge = torch.tensor(0.98).double()
    clipped = a.abs() >= edge.float()
    u = torch.where(clipped, 0.0, a).atanh()
    inside = tanh_gaussian_log_prob((u - m) / std, std.log(), u)
    high, low = ((m - edge.atanh()) / std), ((-edge.atanh() - m) / std)
    beyond = torch.special.log_ndtr(torch.where(a > 0, high, low)) - math.log(0.02)
    total = total + torch.where(clipped, beyond, inside)
return total
""",
        "imitate": """
pairs = [(states[t, n], actions[t, n]) for t, n in inside.nonzero().tolist()]
result = {"recall/trace_length": inside.float().sum(0).mean()}
if pairs:
    losses = [-actor.log_prob_of_clipped(s, a) for s, a in pairs]
    loss = sum(losses) / len(losses)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    result["recall/imitation_loss"] = loss.detach()
return result
""",
    }
]
