"""E9 A step in the metric of the policy

A gradient depends on how a policy is written down; the natural gradient F^-1 g does not. F is the Fisher matrix, the
curvature of the KL divergence between the policy and a changed one. It is never written out: conjugate gradients need
only products F v.

1. `conjugate_gradients` solves M x = b with products of M alone. In n dimensions n iterations are exact, but for
   rounding.
2. `fisher_matrix` returns the function v -> (F + damping I) v. A Gaussian's own Fisher matrix is 1 / std^2 for its
   mean and 2 for its log std, so F v = J^T diag(1 / std^2) J v with the Jacobian J of the means, averaged over the
   states.
3. `line_search` tries the step, then shorter ones, until the KL divergence is at most `max_kl` and the surrogate gains.

A hand-sized example: M = diag(1, 4), b = (1, 4). First d = r = b; r r = 17, d M d = 65, so x = 17/65 b = (0.2615,
1.0462). The second iteration gives x = (1, 1), the solution.

Reading: Schulman et al., Trust Region Policy Optimization (2015), Appendix C; section 6.4 of the paper.

Hints: for J v use the trick that the gradient of u^T J v in u is J v: first J^T u with create_graph=True, then its
derivative in the direction v. The first parameter of the actor is log_std, the others are those of the network. Compare
your product with a matrix that you write out.
"""

EXERCISE = {
    "number": 9,
    "scripts": ["recall_trpo"],
    "blank": ["conjugate_gradients", "fisher_matrix", "line_search"],
    "points": 12,
    "minutes": 90,
    "difficulty": 5,
    "importance": 3,
    "seconds": 30,
}


def run(script, case):
    import types

    import torch

    case = {name: torch.tensor(value) if hasattr(value, "shape") else value for name, value in case.items()}
    if case["what"] == "solve":
        calls = []

        def product(vector):
            calls.append(1)
            return case["matrix"] @ vector

        x = script.conjugate_gradients(product, case["b"], case["iterations"])
        return {"x": x, "products_too_many": max(0, len(calls) - case["iterations"])}
    actor = script.Actor(3, 2, 4).double()
    torch.nn.utils.vector_to_parameters(case["weights"], actor.parameters())
    if case["what"] == "fisher":
        product = script.fisher_matrix(actor, case["states"], case["damping"])
        unit_vectors = torch.eye(len(case["weights"]), dtype=torch.float64)
        return {"matrix": torch.stack([product(vector).detach() for vector in unit_vectors])}
    args = types.SimpleNamespace(max_kl=case["max_kl"], line_search_steps=case["tries"])
    arguments = case["states"], case["actions"], case["advantages"], args
    script.line_search(actor, case["step"], *arguments)
    return {"weights": torch.nn.utils.parameters_to_vector(actor.parameters())}


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402

TOLERANCE = {"default": [1e-6, 1e-8]}
SHAPES = ((2,), (4, 3), (4,), (4, 4), (4,), (2, 4), (2,))  # log_std, then weights and biases of three layers
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


def cases(rng):
    hand = {"what": "solve", "matrix": np.diag([1.0, 4.0]), "b": np.array([1.0, 4.0]), "iterations": 1}
    return [
        ("the hand-sized example", 1, [hand, hand | {"iterations": 2}]),
        ("conjugate gradients, all iterations", 2, [system(rng, 6, 6) for _ in range(5)]),
        ("conjugate gradients, few iterations", 2, [system(rng, 8, k) for k in (1, 2, 3, 4, 5)]),
        ("the Fisher matrix", 4, [fisher_case(rng) for _ in range(3)]),
        ("the line search", 3, [search_case(rng, kind) for kind in ("fits", "too far", "too far", "no gain")]),
    ]


def system(rng, n, iterations):
    root = rng.normal(size=(n, n))
    return {"what": "solve", "matrix": root @ root.T + np.eye(n), "b": rng.normal(size=n), "iterations": iterations}


def fisher_case(rng):
    weights = 0.5 * rng.normal(size=SIZE)
    return {
        "what": "fisher",
        "weights": weights,
        "states": rng.normal(size=(5, 3)),
        "damping": float(rng.uniform(0.1, 1)),
    }


def search_case(rng, kind):
    case = {"what": "search", "weights": 0.5 * rng.normal(size=SIZE), "states": rng.normal(size=(12, 3)), "tries": 6}
    case |= {"actions": rng.normal(size=(12, 2)), "advantages": rng.normal(size=12), "max_kl": 0.01}
    gradient = np.array([surrogate(case, case["weights"] + 1e-30j * unit).imag / 1e-30 for unit in np.eye(SIZE)])
    step = gradient / np.linalg.norm(gradient) * (-1 if kind == "no gain" else 1)
    if kind == "fits":
        return case | {"step": 0.01 * step}
    if kind == "no gain":
        return case | {"step": 0.02 * step}
    far = step
    while divergence(case, case["weights"] + 0.8**2 * far) > case["max_kl"]:
        far = 0.95 * far
    return case | {"step": far}  # the third try fits


def forward(weights, states):
    """Means and log standard deviations; holomorphic, so that complex steps give exact derivatives."""
    parts = np.split(weights, np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1])
    log_std, *layers = (part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True))
    x = states
    for i in range(3):
        x = x @ layers[2 * i].T + layers[2 * i + 1]
        x = np.tanh(x) if i < 2 else x
    return x, log_std


def surrogate(case, weights):
    """The mean of A pi_new / pi_old, a complex number for complex weights."""
    logs = []
    for parameters in (weights, case["weights"]):
        mean, log_std = forward(parameters, case["states"])
        logs.append((-((case["actions"] - mean) ** 2) / (2 * np.exp(2 * log_std)) - log_std).sum(axis=1))
    return (case["advantages"] * np.exp(logs[0] - logs[1])).mean()


def divergence(case, weights, reverse=False):
    old, new = forward(case["weights"], case["states"]), forward(weights, case["states"])
    (m, s), (new_m, new_s) = (new, old) if reverse else (old, new)
    terms = new_s - s + (np.exp(2 * s) + (m - new_m) ** 2) / (2 * np.exp(2 * new_s)) - 0.5
    return terms.sum(axis=1).mean()


def krylov(case, iterations=None):
    """Conjugate gradients minimise x M x / 2 - b x over the span of b, M b, ..., M^(k - 1) b."""
    basis, vector = [], case["b"]
    for _ in range(case["iterations"] if iterations is None else iterations):
        for _ in range(2):  # orthogonal to those before, twice for the rounding
            for other in basis:
                vector = vector - (vector @ other) * other
        basis.append(vector / np.linalg.norm(vector))
        vector = case["matrix"] @ basis[-1]
    basis = np.array(basis).T
    inner = basis.T @ case["matrix"] @ basis
    return {"x": basis @ np.linalg.solve(inner, basis.T @ case["b"]), "products_too_many": 0}


def steepest(case):
    x = np.zeros(len(case["b"]))
    for _ in range(case["iterations"]):
        residual = case["b"] - case["matrix"] @ x
        if residual @ residual > 1e-20:
            x = x + (residual @ residual) / (residual @ case["matrix"] @ residual) * residual
    return {"x": x}


def fisher(case, damping=1, of_log_std=2, mean=True, inverse_power=2):
    n = len(case["states"])
    columns = [forward(case["weights"] + 1e-30j * unit, case["states"])[0].imag / 1e-30 for unit in np.eye(SIZE)]
    jacobian = np.array(columns).reshape(SIZE, -1)  # (weights, n A)
    std = np.tile(np.exp(case["weights"][:2]), n)
    matrix = (jacobian / std**inverse_power) @ jacobian.T / (n if mean else 1)
    matrix[:2, :2] += of_log_std * np.eye(2)
    return {"matrix": matrix + damping * case["damping"] * np.eye(SIZE)}


def search(case, by_kl=True, by_gain=True, restore=True, add=False, factor=0.8):
    weights = case["weights"]
    for i in range(case["tries"]):
        tried = weights + factor**i * case["step"] if add else case["weights"] + factor**i * case["step"]
        gain = surrogate(case, tried).real - case["advantages"].mean()
        if (gain > 0 or not by_gain) and (divergence(case, tried) <= case["max_kl"] or not by_kl):
            return {"weights": tried}
        if add:
            weights = tried
    return {"weights": case["weights"] if restore else tried}


def answer(case):
    return {"solve": krylov, "fisher": fisher, "search": search}[case["what"]](case)


def of(kind, wrong, **changes):
    return lambda case: wrong(case, **changes) if case["what"] == kind else None


WRONG = [
    ("this is steepest descent: the new direction must be conjugate to the last", of("solve", steepest)),
    (
        "one iteration is missing",
        of(
            "solve",
            lambda case: krylov(case, case["iterations"] - 1) if case["iterations"] > 1 else {"x": 0 * case["b"]},
        ),
    ),
    ("the damping is missing", of("fisher", fisher, damping=0)),
    ("the damping is added twice", of("fisher", fisher, damping=2)),
    ("the block of log_std is 2, not 1", of("fisher", fisher, of_log_std=1)),
    ("the products are to be averaged over the states: 1 / n is missing", of("fisher", fisher, mean=False)),
    (
        "the means are to be divided by the variance, not by the standard deviation",
        of("fisher", fisher, inverse_power=1),
    ),
    (
        "a step is taken that leaves the trust region: the KL divergence must be at most max_kl",
        of("search", search, by_kl=False),
    ),
    ("a step is taken that does not gain: both conditions must hold", of("search", search, by_gain=False)),
    (
        "no step was accepted, but the weights stay at the last try: put the old ones back",
        of("search", search, restore=False),
    ),
    ("steps are added to the weights of the last try, not to the old weights", of("search", search, add=True)),
    ("each try is half of the last: 0.8 is wanted", of("search", search, factor=0.5)),
]

ORAL = [
    (
        "Why is F never written out?",
        "It has as many rows as the policy has weights; products are as cheap as two gradients.",
    ),
    (
        "Why is the line search needed, if the step has the length of the trust region?",
        "That length is from a quadratic approximation, and g from a linear one.",
    ),
]

ALTERNATIVES = [
    {
        "conjugate_gradients": """
x = torch.zeros_like(b)
r, d = b - x, b - x
for i in range(iterations):
    Md = product(d)
    step = (r @ d) / (d @ Md)
    x = x + step * d
    r = r - step * Md
    if r.norm() < 1e-12:
        break
    d = r - (r @ Md) / (d @ Md) * d
return x
""",
        "fisher_matrix": """
policy = actor(states)
old = Normal(policy.mean.detach(), policy.stddev.detach())
first = torch.autograd.grad(kl_divergence(old, policy), list(actor.parameters()), create_graph=True)
flat = torch.cat([part.reshape(-1) for part in first])
def product(vector):
    second = torch.autograd.grad(flat @ vector, list(actor.parameters()), retain_graph=True)
    return torch.cat([part.reshape(-1) for part in second]) + damping * vector
return product
""",
        "line_search": """
from torch.nn.utils import vector_to_parameters
old = parameters_to_vector(actor.parameters()).clone()
before = actor(states)
log_before = before.log_prob(actions).sum(-1)
for power in range(args.line_search_steps):
    vector_to_parameters(old + 0.8**power * step, actor.parameters())
    now = actor(states)
    surrogate = (advantages * (now.log_prob(actions).sum(-1) - log_before).exp()).mean()
    kl = torch.distributions.kl_divergence(before, now).sum(-1).mean()
    if kl <= args.max_kl and surrogate > advantages.mean():
        return {"losses/kl": kl}
vector_to_parameters(old, actor.parameters())
return {}
""",
    }
]
