"""The mathematics of imitation_gain.py."""

import math

import pytest
import torch

from imitation_gain import gain, means_gradient
from recall_trpo import Actor, fisher_matrix


def setting():
    torch.manual_seed(0)
    actor, states = Actor(3, 2, 4), torch.randn(50, 3)
    actor.net[-1].weight.data.mul_(100)  # as it was before it was made small
    actor.log_std.data = torch.tensor([0.3, -0.4])
    g, h = (means_gradient(actor, actor(states).log_prob(torch.randn(50, 2)).sum(-1).mean()) for _ in range(2))
    product = fisher_matrix(actor, states, 0.0)
    return actor, states, g, h, torch.stack([product(row) for row in torch.eye(len(g))]).double()


def test_the_gain_against_a_direct_solve():
    actor, states, g, h, fisher = setting()
    d = torch.linalg.solve(fisher + 0.01 * torch.eye(len(h)), h.double())
    assert gain(actor, g, h, states) == pytest.approx(float(g.double() @ d / (d @ fisher @ d).sqrt()), rel=0.02)


def test_the_gain_does_not_depend_on_the_size_of_a_gradient_and_changes_sign_with_it():
    actor, states, g, h, _ = setting()
    assert gain(actor, g, 7 * h, states) == pytest.approx(gain(actor, g, h, states), rel=0.02)
    assert gain(actor, g, -h, states) == pytest.approx(-gain(actor, g, h, states), rel=0.02)


def test_nothing_gains_more_than_the_policy_gradient_itself():
    """Of all directions with the same KL divergence it is F^-1 g that gains most, the root of g^T F^-1 g."""
    actor, states, g, h, fisher = setting()
    own = gain(actor, g, g, states)
    assert own > abs(gain(actor, g, h, states))
    assert own <= math.sqrt(float(g.double() @ torch.linalg.pinv(fisher) @ g.double())) * 1.02


def test_the_standard_deviation_is_left_alone():
    actor, _, g, _, _ = setting()
    assert g[: len(actor.log_std)].tolist() == [0, 0] and g[len(actor.log_std) :].abs().min() > 0
