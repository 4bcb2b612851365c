"""E10 The soft target

Soft actor-critic learns two critics by regression on a target that rewards entropy:

    y = c r + gamma (1 - d) (min_i Q_i(s', a') - alpha log pi(a' | s'))

Here a' is drawn from the policy as it is now, Q_i are the two target critics, alpha is the temperature, c the reward
scale and d = 1 at a terminal state. After each step the target critics move a small way tau towards the critics.

1. `critic_targets` computes y.
2. `update_actor_critic` makes one step of critics, actor and temperature at once. The critics' loss is the sum over
   both of the mean of (Q_i(s, a) - y)^2. The actor's loss is the mean of alpha log pi(a | s) - min_i Q_i(s, a) with a
   drawn from the policy; it must not move the critics. The temperature's loss is log alpha (H + A) with the mean
   entropy H = - mean of log pi and the number A of action dimensions; it must move nothing else.

A hand-sized example: r = 1, gamma = 0.9, alpha = 0.5, log pi = -2, target critics 3 and 5. Then y = 1 + 0.9 (3 + 1) =
4.6; at a terminal state y = 1.

Reading: Haarnoja et al., Soft Actor-Critic Algorithms and Applications (2018), sections 4 and 5; section 6.5 of the
paper.

Hints: `log_temperature` holds log alpha. `requires_grad_(False)` on the critic keeps the actor's loss from moving it,
while the gradient of the actions still flows through. Return a dict of losses; which ones is up to you here.
"""

EXERCISE = {
    "number": 10,
    "scripts": ["recall_sac"],
    "blank": ["critic_targets", "update_actor_critic"],
    "points": 8,
    "minutes": 60,
    "difficulty": 3,
    "importance": 4,
    "seconds": 20,
}


def run(script, case):
    import types

    import torch

    batch = script.Batch(*(torch.tensor(case[name]) for name in script.Batch._fields))
    target, critic, actor = Twins(case["target"]), Twins(case["critic"]), Actor(case)
    args = types.SimpleNamespace(gamma=case["gamma"], reward_scale=case["reward_scale"], tau=case["tau"])
    if case["what"] == "targets":
        targets = script.critic_targets(actor, target, batch, args)
        return {"targets": targets, "carries_a_gradient": targets.requires_grad}
    target.requires_grad_(False)
    optimizer = torch.optim.SGD([*critic.parameters(), *actor.parameters()], lr=0.1)
    script.update_actor_critic(actor, critic, target, optimizer, batch, args)
    alpha = actor.log_temperature
    return {"critic": critic.weight, "target": target.weight, "policy": actor.weight, "log_temperature": alpha}


def Twins(weight):
    """Two critics, linear in state and action: Q_i(s, a), (2, B), of states (B, 1) and actions (B, 1)."""
    import torch

    class Critics(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(weight))

        def forward(self, states, actions):
            return self.weight @ torch.cat((states, actions, torch.ones_like(states)), dim=-1).T

    return Critics()


def Actor(case):
    """A policy without randomness: a = w s, with log pi(a | s) = v s^2."""
    import torch

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(case["policy"]))
            self.log_temperature = torch.nn.Parameter(torch.tensor(case["log_temperature"], dtype=torch.float64))

        def sample(self, states):
            return self.weight[0] * states, self.weight[1] * states.squeeze(-1) ** 2

    return Policy()


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402

TOLERANCE = {"default": [1e-6, 1e-9]}


def cases(rng):
    return [
        ("the hand-sized example", 1, [hand()]),
        ("targets", 2, [random_case(rng, "targets", 0) for _ in range(5)]),
        ("targets at terminal states", 2, [random_case(rng, "targets", 0.5) for _ in range(5)]),
        ("one step of critics, actor and temperature", 3, [random_case(rng, "step", 0.3) for _ in range(5)]),
    ]


def hand():
    one = np.ones((2, 1))
    case = {
        "states": one,
        "actions": one,
        "rewards": np.ones(2),
        "terminated": np.array([0.0, 1.0]),
        "next_states": one,
    }
    case |= {"target": np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 1.0]]), "critic": np.ones((2, 3))}
    case |= {"policy": np.array([1.0, -2.0]), "log_temperature": float(np.log(0.5))}
    return case | {"what": "targets", "gamma": 0.9, "reward_scale": 1.0, "tau": 0.1}


def random_case(rng, what, terminal):
    n = 8
    case = {name: rng.normal(size=(n, 1)) for name in ("states", "actions", "next_states")}
    case |= {"rewards": rng.normal(size=n), "terminated": (rng.random(n) < terminal).astype(float)}
    if terminal:
        case["terminated"][:2] = 1, 0
    case |= {"target": rng.normal(size=(2, 3)), "critic": rng.normal(size=(2, 3)), "policy": rng.normal(size=2)}
    case |= {"log_temperature": float(rng.uniform(-1, 0.5)), "gamma": 0.95}
    return case | {"what": what, "reward_scale": float(rng.uniform(2, 5)), "tau": float(rng.uniform(0.05, 0.2))}


def values(weight, s, a):
    return weight[:, :1] * s + weight[:, 1:2] * a + weight[:, 2:]


def targets(case, critic="target", reduce=np.min, entropy=-1, inside=True, action="policy", scale=True, masked=True):
    after = case["next_states"][:, 0]
    w, v = case["policy"]
    a = w * after if action == "policy" else case["actions"][:, 0]
    alive = 1 - case["terminated"] if masked else 1
    soft = entropy * np.exp(case["log_temperature"]) * v * after**2
    value = reduce(values(case[critic], after, a), axis=0)
    later = alive * (value + soft) if inside else alive * value + soft
    rewards = case["rewards"] * (case["reward_scale"] if scale else 1)
    return rewards + case["gamma"] * later


def step(case, lag=True, mean=False, moved_by_actor=False, alpha_from_entropy=False, lost_sign=1, of_max=False):
    """The gradients by hand: critics and policy are linear."""
    s, a, n, lr = case["states"][:, 0], case["actions"][:, 0], len(case["states"]), 0.1
    w, v = case["policy"]
    alpha, q = np.exp(case["log_temperature"]), case["critic"]
    errors = values(q, s, a) - targets(case)
    inputs = np.stack([s, a, np.ones(n)])
    critic_gradient = 2 * errors @ inputs.T / n / (2 if mean else 1)
    own = w * s
    twins = values(q, s, own)
    smaller = (twins.argmax if of_max else twins.argmin)(axis=0)
    policy_gradient = np.array([lost_sign * -(q[smaller, 1] * s).mean(), (alpha * s**2).mean()])
    if moved_by_actor:
        for i in range(n):
            critic_gradient[smaller[i]] -= np.array([s[i], own[i], 1]) / n
    temperature_gradient = -(v * s**2).mean() + 1
    if alpha_from_entropy:
        temperature_gradient = temperature_gradient + alpha * (v * s**2).mean()
    critic = q - lr * critic_gradient
    tau = case["tau"] if lag else 1
    return {
        "critic": critic,
        "target": case["target"] + tau * (critic - case["target"]),
        "policy": case["policy"] - lr * policy_gradient,
        "log_temperature": case["log_temperature"] - lr * temperature_gradient,
    }


def answer(case):
    return {"targets": targets(case), "carries_a_gradient": False} if case["what"] == "targets" else step(case)


def of_targets(**changes):
    return lambda case: {"targets": targets(case, **changes)} if case["what"] == "targets" else None


def of_step(**changes):
    return lambda case: step(case, **changes) if case["what"] == "step" else None


WRONG = [
    ("the mean of both critics is taken, not the smaller one", of_targets(reduce=np.mean)),
    ("the larger one of both critics is taken, not the smaller one", of_targets(reduce=np.max)),
    ("the entropy has the wrong sign: alpha log pi is subtracted", of_targets(entropy=1)),
    ("the entropy term is missing", of_targets(entropy=0)),
    ("the entropy stands outside of (1 - d): nothing follows a terminal state", of_targets(inside=False)),
    ("terminal states are followed by a value: (1 - d) is missing", of_targets(masked=False)),
    ("the action of the data is used: a' is drawn from the policy", of_targets(action="data")),
    ("the rewards are not multiplied by the reward scale", of_targets(scale=False)),
    (
        "the targets carry a gradient: they are numbers, to which the critics are drawn",
        lambda case: {"carries_a_gradient": True} if case["what"] == "targets" else None,
    ),
    ("the target critics are copied: they move by tau of the way only", of_step(lag=False)),
    ("the critics' losses add up: their mean is taken", of_step(mean=True)),
    ("the actor's loss moves the critics, too", of_step(moved_by_actor=True)),
    ("the actor's loss moves the temperature, too: alpha is a number there", of_step(alpha_from_entropy=True)),
    ("the actor runs down the values: - min Q belongs into its loss", of_step(lost_sign=-1)),
    ("the actor follows the larger one of both critics, not the smaller one", of_step(of_max=True)),
]

ORAL = [
    (
        "Why the smaller one of two critics?",
        "The maximum over noisy estimates is too high; the smaller one counteracts.",
    ),
    ("Why does a time limit not set d to 1?", "The state has a future; only the recording stops there."),
]

ALTERNATIVES = [
    {
        "critic_targets": """
a, log_pi = actor.sample(batch.next_states)
q1, q2 = target_critic(batch.next_states, a)
soft = torch.min(q1, q2) - actor.log_temperature.exp() * log_pi
alive = batch.terminated == 0
return (args.reward_scale * batch.rewards + args.gamma * torch.where(alive, soft, 0.0)).detach()
""",
        "update_actor_critic": """
y = critic_targets(actor, target_critic, batch, args)
q1, q2 = critic(batch.states, batch.actions)
value_loss = nn.functional.mse_loss(q1, y) + nn.functional.mse_loss(q2, y)
a, log_pi = actor.sample(batch.states)
frozen = deepcopy(critic).requires_grad_(False)
policy_loss = (actor.log_temperature.exp().detach() * log_pi - torch.min(*frozen(batch.states, a))).mean()
alpha_loss = -actor.log_temperature * (log_pi.detach() - a.shape[1]).mean()
optimizer.zero_grad()
for loss in (value_loss, policy_loss, alpha_loss):
    loss.backward()
optimizer.step()
with torch.no_grad():
    for slow, fast in zip(target_critic.parameters(), critic.parameters()):
        slow.copy_((1 - args.tau) * slow + args.tau * fast)
return {"loss": float(value_loss)}
""",
    }
]
