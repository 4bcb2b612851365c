"""E8 Draw by priority, weigh it back

Prioritized replay draws transitions that surprise more often: P(i) = p_i^alpha / sum of all p^alpha. That is no
longer an average over the buffer, so each drawn transition gets a weight w_i = (N P(i))^-beta, divided by the largest
weight of the buffer. With beta = 1 the weighted mean of a batch is again that of uniform draws, up to a constant.

1. `ReplayBuffer.sample` draws slots and gives their weights. `powers` holds p^alpha, for the first `len(self)` slots.
2. `update_from_replay` makes one step on a batch and writes new priorities, (|A| + 1e-6)^alpha, into the slots that
   were drawn. The advantage A is the TD error, or (R - V)+ for `priority` "return". After a terminated step V(s')
   counts as 0.

A hand-sized example: p^alpha = (1, 4, 5). P = (0.1, 0.4, 0.5), N P = (0.3, 1.2, 1.5), and with beta = 1 the weights are
(3.33, 0.83, 0.67) before, and (1, 0.25, 0.2) after they are divided by the largest.

Reading: section 6.2 and Table 3 of the paper; Schaul et al., Prioritized Experience Replay (2016), section 3.3.

Hints: an advantage is a number here, no gradient flows through it. `evaluate_all_states` gives log pi and V of all
states with gradients. Clip the gradient with `max_grad_norm` as `update_actor_critic` does. The regression target A +
V does not change while the step is made.
"""

EXERCISE = {
    "number": 8,
    "scripts": ["per_a2c_fourroom"],
    "blank": ["ReplayBuffer.sample", "update_from_replay"],
    "points": 8,
    "minutes": 45,
    "difficulty": 3,
    "importance": 3,
    "seconds": 20,
}


def run(script, case):
    import types

    import numpy as np
    import torch

    if case["what"] == "draws":
        buffer = Buffer(powers=case["powers"].copy(), number=case["number"], alpha=case["alpha"])
        slots, weights = script.ReplayBuffer.sample(buffer, case["batch_size"], case["beta"])
        share = np.bincount(slots, minlength=case["number"]) / len(slots)
        # a weight times p^(alpha beta) is the same number for all slots
        return {"share": share, "weight": np.asarray(weights) * case["powers"][slots] ** case["beta"]}
    logits, values = (torch.tensor(case[name]).requires_grad_() for name in ("logits", "values"))
    optimizer = torch.optim.SGD([logits, values], lr=1.0)
    columns = [case[name] for name in script.Tuples._fields]
    buffer = Buffer(powers=case["powers"].copy(), number=len(columns[0]), alpha=case["alpha"])
    buffer.tuples = script.Tuples(*columns)
    buffer.sample = lambda batch_size, beta: (case["slots"][:batch_size], case["weights"][:batch_size])
    args = types.SimpleNamespace(priority=case["priority"], gamma=0.9, vf_coef=0.5, max_grad_norm=100.0)
    args.replay_batch_size, args.priority_beta = 1000, 0.5
    script.update_from_replay(Table(logits), Table(values[:, None]), optimizer, buffer, args)
    return {"logits": logits, "values": values, "powers": buffer.powers}


class Buffer:
    """A buffer with room for more transitions than it holds."""

    def __init__(self, powers, number, alpha):
        self.powers, self.number, self.alpha = powers, number, alpha

    def __len__(self):
        return self.number


class Table:
    """A network of one-hot states: a table, one row a state."""

    def __init__(self, table):
        self.table, self.num_embeddings = table, len(table)

    def __getitem__(self, index):
        return self

    def __call__(self, states):
        return self.table[states]


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402

TOLERANCE = {"default": [2e-4, 1e-5], "share": [0, 0.013]}
COLUMNS = ("states", "actions", "rewards", "next_states", "terminated", "returns")


def cases(rng):
    hand = {
        "what": "draws",
        "powers": np.array([1.0, 4, 5]),
        "number": 3,
        "alpha": 1.0,
        "beta": 1.0,
        "batch_size": 40_000,
    }
    return [
        ("the hand-sized example", 1, [hand]),
        ("slots and weights", 3, [draws(rng) for _ in range(5)]),
        ("a step by TD errors", 2, [step(rng, "td-error") for _ in range(5)]),
        ("a step by returns", 2, [step(rng, "return") for _ in range(5)]),
    ]


def draws(rng):
    """The least power is too small ever to be drawn; slots that are not filled hold a power that must not be used."""
    powers = np.append(rng.permutation([1e-9, 0.2, 0.5, 1, 2, 3, 4]), [50.0, 60.0])
    beta = float(rng.uniform(0.1, 0.4))
    return {"what": "draws", "powers": powers, "number": 7, "alpha": 0.5, "beta": beta, "batch_size": 40_000}


def step(rng, priority):
    n, states, actions = 10, 6, 4
    case = {name: rng.integers(states, size=n) for name in ("states", "next_states")}
    case |= {"rewards": rng.normal(size=n), "terminated": rng.random(n) < 0.4, "returns": 2 * rng.normal(size=n)}
    case |= {"actions": rng.integers(actions, size=n), "powers": rng.uniform(1, 2, size=n + 3), "alpha": 0.7}
    case |= {"logits": rng.normal(size=(states, actions)), "values": rng.normal(size=states), "priority": priority}
    slots = np.concatenate([rng.choice(np.arange(4, n), size=5, replace=False), [9, 9, 8, 7, 6]])
    return case | {"what": "step", "slots": slots, "weights": rng.uniform(0.2, 1, size=n)}


def sampled(case, probabilities=None, constant=None):
    powers = case["powers"][: case["number"]]
    share = powers if probabilities is None else probabilities
    constant = powers.min() ** case["beta"] if constant is None else constant
    return {"share": share / share.sum(), "weight": np.full(case["batch_size"], constant)}


def stepped(
    case, weighted=True, bootstrap=False, positive=True, slots=None, alpha=None, signed=False, value_weighted=True
):
    rows = case["slots"]
    s, a, r, after, end, returns = (case[name][rows] for name in COLUMNS)
    v, w = case["values"], case["weights"] if weighted else np.ones(len(rows))
    if case["priority"] == "return":
        advantages = returns - v[s]
        advantages = np.maximum(advantages, 0) if positive else advantages
    else:
        advantages = r + 0.9 * v[after] * (bootstrap | ~end) - v[s]
    pi = np.exp(case["logits"]) / np.exp(case["logits"]).sum(axis=1, keepdims=True)
    logits, values, powers = case["logits"].copy(), v.copy(), case["powers"].copy()
    for i in range(len(rows)):  # by hand: d log pi(a) / d logits = one-hot(a) - pi
        logits[s[i]] += w[i] * advantages[i] * ((np.arange(4) == a[i]) - pi[s[i]]) / len(rows)
        values[s[i]] += 0.5 * (w[i] if value_weighted else 1) * 2 * advantages[i] / len(rows)
    size = np.abs(advantages) if not signed else np.maximum(advantages, 0)
    powers[rows if slots is None else slots] = (size + 1e-6) ** (case["alpha"] if alpha is None else alpha)
    return {"logits": logits, "values": values, "powers": powers}


def answer(case):
    return sampled(case) if case["what"] == "draws" else stepped(case)


def of_draws(function):
    return lambda case: function(case, case["powers"][: case["number"]]) if case["what"] == "draws" else None


def of_step(**changes):
    return lambda case: stepped(case, **changes) if case["what"] == "step" else None


def unnormalised(case, powers):
    return sampled(case, constant=(len(powers) / powers.sum()) ** -case["beta"])


def by_rank(case, powers):
    return sampled(case, 1 / (1 + np.argsort(np.argsort(-powers))))


WRONG = [
    ("the weights are not divided by the largest: weights above 1 are a hidden step size", of_draws(unnormalised)),
    (
        "the weights are divided by the largest of the batch: that of the whole buffer is wanted",
        of_draws(lambda case, powers: sampled(case, constant=np.sort(powers)[1] ** case["beta"])),
    ),
    (
        "alpha is used twice: `powers` holds p^alpha already",
        of_draws(lambda case, powers: sampled(case, powers ** case["alpha"])),
    ),
    ("slots are drawn by rank: they are to be drawn in proportion to p^alpha", of_draws(by_rank)),
    ("slots are drawn uniformly", of_draws(lambda case, powers: sampled(case, np.ones(len(powers))))),
    ("the importance weights are not used", of_step(weighted=False)),
    ("the importance weights are not used in the loss of the values", of_step(value_weighted=False)),
    ("V(s') counts as 0 after a terminated step", of_step(bootstrap=True)),
    ("for `return` the advantage is (R - V)+: negative ones count as 0", of_step(positive=False)),
    ("the priority is the size |A|: a negative surprise is one, too", of_step(signed=True)),
    ("new priorities are to be stored as p^alpha", of_step(alpha=1.0)),
    ("new priorities are in the wrong slots: they belong to those that were drawn", of_step(slots=np.arange(10))),
]

ORAL = [
    ("Why are weights divided by the largest?", "They then only shrink steps; otherwise rare draws make huge ones."),
    ("Why 1e-6?", "A transition of priority 0 would never be drawn again, and its weight would be infinite."),
]

ALTERNATIVES = [
    {
        "ReplayBuffer.sample": """
powers = torch.tensor(self.powers[: len(self)])
slots = torch.multinomial(powers, batch_size, replacement=True).numpy()
w = (len(self) * self.powers[: len(self)] / self.powers[: len(self)].sum()) ** -beta
return slots, w[slots] / w.max()
""",
        "update_from_replay": """
n = min(args.replay_batch_size, len(buffer))
slots, weights = buffer.sample(n, args.priority_beta)
s, a, r, after, end, R = (torch.as_tensor(column[slots]) for column in buffer.tuples)
w = torch.as_tensor(weights)
log_pi, v, _ = evaluate_all_states(actor, critic)
with torch.no_grad():
    if args.priority == "return":
        adv = (R - v[s]).clamp(min=0)
    else:
        adv = r + args.gamma * v[after] * (~end) - v[s]
    target = adv + v[s]
policy_loss = -(w * adv * log_pi[s, a]).mean()
value_loss = (w * (v[s] - target) ** 2).mean()
optimizer.zero_grad()
loss = policy_loss + args.vf_coef * value_loss
loss.backward()
torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], args.max_grad_norm)
optimizer.step()
buffer.powers[slots] = (adv.abs().numpy() + 1e-6) ** buffer.alpha
return {}
""",
    }
]
