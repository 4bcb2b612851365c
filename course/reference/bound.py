"""Recall traces as expectation maximization (section 4 of the paper), by listing all ways to the goal.

A way is a list of pairs (state, action), as long as the agent acts. Moves are certain, so a way has the probability
p(way) = product of pi(a_t | s_t). "Success" is that the goal is reached within a number of steps, the horizon.
Shapes: S states, A actions, n ways; next_cell (S, A) is where an action leads to, policy (S, A) holds pi(a | s).
"""

import numpy as np


def log_probs(ways, policy):
    """log p(way) of each way, (n,)."""
    return np.array([sum(np.log(policy[state, action]) for state, action in way) for way in ways])


def trajectories(next_cell, start, goal, horizon):
    """All ways from `start` that come to `goal` within `horizon` steps, as a list. A way ends when it comes there."""
    ways = []
    unfinished = [([], start)]  # a way so far, and the state it has come to
    for _ in range(horizon):
        longer = []
        for way, state in unfinished:
            for action in range(next_cell.shape[1]):
                after = int(next_cell[state, action])
                (ways if after == goal else longer).append(([*way, (state, action)], after))
        unfinished = longer
    return [way for way, _ in ways]


def log_evidence(ways, policy):
    """log p(success), a number: the logarithm of the sum of p(way) over all ways."""
    return np.log(np.exp(log_probs(ways, policy)).sum())


def posterior(ways, policy):
    """p(way | success) of each way, (n,): in which way did the agent come, if it came?"""
    return np.exp(log_probs(ways, policy) - log_evidence(ways, policy))


def elbo(ways, policy, q):
    """The lower bound of log p(success) for any q (n,): the sum of q(way) (log p(way) - log q(way)) over all ways."""
    return float(q @ (log_probs(ways, policy) - np.log(q)))


def best_backward_model(ways, weights, next_cell):
    """The q(s, a | s') of highest weighted likelihood, (S, A, S'): N(s, a, s') / N(s').

    N(s, a, s') adds up the weights (n,) of all steps from s by a to s', N(s') those of all steps to s'. The model is 0
    for an s' to which no way leads.
    """
    counts = np.zeros((*next_cell.shape, len(next_cell)))
    for way, weight in zip(ways, weights, strict=True):
        for state, action in way:
            counts[state, action, next_cell[state, action]] += weight
    arrivals = counts.sum(axis=(0, 1))
    return counts / np.where(arrivals == 0, 1, arrivals)


def m_step(ways, weights, policy):
    """The policy (S, A) of highest weighted likelihood: pi(a | s) = N(s, a) / N(s), counts as in best_backward_model.

    Where no way acts it stays as it was. The policy that is given is not changed.
    """
    counts = np.zeros(policy.shape)
    for way, weight in zip(ways, weights, strict=True):
        for state, action in way:
            counts[state, action] += weight
    acts = counts.sum(axis=1, keepdims=True)
    return np.where(acts == 0, policy, counts / np.where(acts == 0, 1, acts))


def divergence(ways, weights, model, next_cell):
    """How far a backward model (S, A, S') is from weights (n,), a number: the sum over ways of
    w(way) (log w(way) - log q(way)), where q(way) is the product of q(s_t, a_t | s_{t+1}) over its steps."""
    total = 0.0
    for way, weight in zip(ways, weights, strict=True):
        steps = [model[state, action, next_cell[state, action]] for state, action in way]
        total += weight * (np.log(weight) - np.log(steps).sum())
    return total
