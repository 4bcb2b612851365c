"""E11 Goals neither easy nor impossible

Goal GAN gives an agent its own curriculum. It labels goals by how often they were reached, and a generator learns to
propose goals like the good ones, those neither too easy nor too hard.

1. `goal_labels`: 1 for goals whose rate of success lies strictly between two bounds, 0 for all others.
2. `GoalGAN.judge`: the discriminator sees goals brought from the box `low` to `high` to the box from -1 to 1.
3. `discriminator_loss` and `generator_loss`, by least squares. The discriminator is to be 1 for good goals, and -1
   for bad and for generated ones; the generator wants its goals to be judged 1.

A hand-sized example: bounds 0.1 and 0.9, rates 0, 0.1, 0.5, 0.9: only 0.5 is good. In a box from 2 to 6 a goal of 3
becomes -0.5. With d = (0.5, -1) for two goals with labels (1, 0) and d = 0 for one generated goal, the
discriminator's loss is (0.25 + 0) / 2 + 1 = 1.125, and the generator's is 1.

Reading: section 6.3 and Appendix A of the paper; Florensa et al., Automatic Goal Generation (2018), section 4.

Hints: bad goals count, too: they tell the discriminator what to avoid. Each loss is a sum of means, not a mean of all.
"""

EXERCISE = {
    "number": 11,
    "scripts": ["recall_goalgan_ant"],
    "blank": ["goal_labels", "GoalGAN.judge", "discriminator_loss", "generator_loss"],
    "points": 8,
    "minutes": 40,
    "difficulty": 2,
    "importance": 3,
    "seconds": 30,
}


def run(script, case):
    import types

    import torch

    case = {name: torch.tensor(value) if hasattr(value, "shape") else value for name, value in case.items()}
    if case["what"] == "labels":
        args = types.SimpleNamespace(least_success=case["least"], most_success=case["most"])
        return {"labels": script.goal_labels(case["rates"], args)}
    if case["what"] == "judge":
        gan = types.SimpleNamespace(low=case["low"], high=case["high"])
        gan.discriminator = lambda goals: goals @ case["weight"]
        return {"judged": script.GoalGAN.judge(gan, case["goals"])}
    weight, gan = case["judge"].clone().requires_grad_(), types.SimpleNamespace()
    gan.judge = lambda goals: goals @ weight
    of_discriminator = script.discriminator_loss(gan, case["goals"], case["labels"], case["generated"])
    of_generator = script.generator_loss(gan, case["generated"])
    gradient = torch.autograd.grad(of_discriminator, weight)[0]
    return {"of_discriminator": of_discriminator, "of_generator": of_generator, "gradient": gradient}


# ------------------------------------------------------------------------------------------ never handed out
import numpy as np  # noqa: E402

TOLERANCE = {"default": [1e-5, 1e-7]}


def cases(rng):
    labels = {"what": "labels", "rates": np.array([0.0, 0.1, 0.5, 0.9]), "least": 0.1, "most": 0.9}
    judge = {"what": "judge", "low": np.array([2.0]), "high": np.array([6.0]), "goals": np.array([[3.0]])}
    losses = {"what": "losses", "judge": np.ones(1), "goals": np.array([[0.5], [-1.0]]), "labels": np.array([1.0, 0.0])}
    hand = [labels, judge | {"weight": np.ones((1, 1))}, losses | {"generated": np.zeros((1, 1))}]
    return [
        ("the hand-sized example", 1, hand),
        ("labels", 2, [labels_case(rng) for _ in range(5)]),
        ("goals in the unit box", 2, [judge_case(rng) for _ in range(5)]),
        ("both losses", 3, [losses_case(rng) for _ in range(5)]),
    ]


def labels_case(rng):
    """Rates in quarters and bounds that are among them, so that the bounds matter."""
    rates = np.append(rng.integers(0, 5, size=12) / 4, [0, 0.25, 0.5, 0.75, 1])
    return {
        "what": "labels",
        "rates": rates,
        "least": float(rng.choice([0, 0.25])),
        "most": float(rng.choice([0.75, 1])),
    }


def judge_case(rng):
    low = rng.normal(size=3)
    case = {"what": "judge", "low": low, "high": low + rng.uniform(1, 5, size=3)}
    return case | {"goals": 4 * rng.normal(size=(7, 3)), "weight": rng.normal(size=(3, 1))}


def losses_case(rng):
    case = {
        "what": "losses",
        "judge": rng.normal(size=3),
        "goals": rng.normal(size=(9, 3)),
        "generated": rng.normal(size=(5, 3)),
    }
    return case | {"labels": np.append(rng.integers(0, 2, size=7), [0, 1]).astype(float)}


def labelled(case, below=np.less, above=np.greater, invert=False):
    good = above(case["rates"], case["least"]) & below(case["rates"], case["most"])
    return {"labels": (good ^ invert).astype(float)}


def judged(case, place=lambda x: 2 * x - 1):
    unit = (case["goals"] - case["low"]) / (case["high"] - case["low"])  # from 0 to 1
    return {"judged": (place(unit) * case["weight"].T).sum(axis=1)}


def squared(case, target=lambda y: 2 * y - 1, of_generated=-1.0, of_generator=1.0, drop_bad=False, pooled=False):
    goals, y = case["goals"], case["labels"]
    if drop_bad:
        goals, y = goals[y == 1], y[y == 1]
    inputs = np.concatenate([goals, case["generated"]])
    wanted = np.concatenate([target(y), np.full(len(case["generated"]), of_generated)])
    share = np.concatenate([np.full(len(x), 1 / len(x)) for x in (goals, case["generated"])])
    share = np.full(len(inputs), 1 / len(inputs)) if pooled else share
    errors = inputs @ case["judge"] - wanted
    generator = np.mean((case["generated"] @ case["judge"] - of_generator) ** 2)
    return {"of_discriminator": share @ errors**2, "of_generator": generator, "gradient": 2 * (share * errors) @ inputs}


def answer(case):
    return {"labels": labelled, "judge": judged, "losses": squared}[case["what"]](case)


def of(kind, wrong, **changes):
    return lambda case: wrong(case, **changes) if case["what"] == kind else None


WRONG = [
    (
        "a rate that is equal to a bound counts as good: the bounds are strict",
        of("labels", labelled, below=np.less_equal, above=np.greater_equal),
    ),
    ("easy and hard goals are labelled 1: good are those between", of("labels", labelled, invert=True)),
    (
        "the goals are not scaled: the discriminator sees the box from -1 to 1",
        of("judge", lambda case: {"judged": (case["goals"] @ case["weight"])[:, 0]}),
    ),
    ("the goals are brought to the box from 0 to 1, not from -1 to 1", of("judge", judged, place=lambda x: x)),
    ("the targets are 2 y - 1, so 1 and -1, not the labels 1 and 0", of("losses", squared, target=lambda y: y)),
    ("generated goals are to be judged -1 by the discriminator, not 0", of("losses", squared, of_generated=0.0)),
    ("the generator wants its goals to be judged 1, not 0", of("losses", squared, of_generator=0.0)),
    ("goals with label 0 are dropped: they tell what to avoid", of("losses", squared, drop_bad=True)),
    ("one mean over all goals is taken: the loss is a sum of two means", of("losses", squared, pooled=True)),
]

ORAL = [
    ("Why are goals that are always reached bad?", "There is nothing left to learn from them."),
    ("Why must the discriminator's loss not move the generator?", "The generator would learn to be recognised."),
]

ALTERNATIVES = [
    {
        "goal_labels": """
low, high = args.least_success, args.most_success
return torch.tensor([1.0 if low < rate < high else 0.0 for rate in rates.tolist()])
""",
        "GoalGAN.judge": """
middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
return self.discriminator((goals - middle) / half).flatten()
""",
        "discriminator_loss": """
targets = torch.where(labels == 1, 1.0, -1.0).to(goals.dtype)
of_goals = nn.functional.mse_loss(gan.judge(goals), targets)
judged = gan.judge(generated)
return of_goals + nn.functional.mse_loss(judged, -torch.ones_like(judged))
""",
        "generator_loss": "return (1 - gan.judge(generated)).square().mean()",
    }
]
