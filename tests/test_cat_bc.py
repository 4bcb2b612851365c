"""The mathematics of cat_bc.py: noisy experts, discriminator, reward, correction, success. TRPO is recall_trpo.py's."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli
from torch.nn.functional import binary_cross_entropy_with_logits

import cat_bc as script
from cat_bc import Actor, Args, Discriminator, NoisyExpert, Trajectory

torch.set_num_threads(1)
SMALL = {"env_id": "Reacher-v5", "dataset": "reacher/random-v0", "device": "cpu", "hidden": 8}
STATE_DIM, ACTION_DIM = 10, 2


@pytest.fixture(autouse=True)
def with_datasets(datasets):
    """Those of conftest.py."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reacher(**changes):
    args = Args(**SMALL | changes)
    experts = script.load_expert(script.make_env(args), args)
    return NoisyExpert(script.make_env(args), experts, args.uniform_noise), experts, args


def networks(seed=0):
    torch.manual_seed(seed)
    discriminator = Discriminator(STATE_DIM, ACTION_DIM, 8)
    discriminator.normaliser.add(2 * randn(100, STATE_DIM + ACTION_DIM) + 1)
    return Actor(STATE_DIM + ACTION_DIM, ACTION_DIM, 8), discriminator


def pairs(size, seed):
    return randn(size, STATE_DIM, seed=seed), randn(size, ACTION_DIM, seed=seed + 1).clamp(-1, 1)


def test_what_is_observed_is_the_state_and_the_noisy_action_of_one_expert():
    env, experts, _ = reacher(expert_steps=40)
    torch.manual_seed(0)
    begun, noise = [], []
    for _ in range(30):
        observation, _ = env.reset(seed=5)  # of which nothing depends
        state, noisy = observation[:STATE_DIM], [observation[STATE_DIM:]]
        (which,) = [i for i, expert in enumerate(experts) if np.array_equal(state, expert.states[0])]
        begun.append(which)
        truncated = False
        while not truncated:
            observation, _, _, truncated, info = env.step(experts[which].actions[min(len(noisy) - 1, 39)])
            if len(noisy) <= 40:  # the expert's own actions give its own states
                np.testing.assert_array_equal(observation[:STATE_DIM], experts[which].states[len(noisy)])
            noisy.append(observation[STATE_DIM:])
        assert len(noisy) == 51 and info["episode"]["l"] == 50
        np.testing.assert_array_equal(noisy[39:], [noisy[39]] * 12)  # there are no more than 40
        noise.append(np.array(noisy[:40]) - experts[which].actions)
    assert {*begun} == {*range(7)}
    noise = np.concatenate(noise).ravel() / 0.9
    assert np.abs(noise).max() <= 1.0001 and noise.var() == pytest.approx(1 / 3, rel=0.06)


@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_discriminator_loss_against_its_formula(entropy):
    """L_u = -E log D of the expert - E log(1 - D) of the generator, less the entropy of D: as a Bernoulli's."""
    _, discriminator = networks()
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    expert, generated, before = pairs(30, 1), pairs(50, 5), copy.deepcopy(discriminator)
    odds = before(*expert), before(*generated)
    real, false = (
        binary_cross_entropy_with_logits(x, torch.full_like(x, y)) for x, y in zip(odds, (1, 0), strict=True)
    )
    bonus = Bernoulli(logits=torch.cat(odds)).entropy().mean()
    probabilities = [x.sigmoid() for x in odds]
    formula = -probabilities[0].log().mean() - (1 - probabilities[1]).log().mean()
    torch.testing.assert_close(real + false, formula)
    loss = formula - entropy * bonus
    args = Args(**SMALL, discriminator_entropy=entropy)
    losses = script.update_discriminator(discriminator, optimizer, expert, generated, args)
    torch.testing.assert_close(losses["losses/discriminator_loss"], loss.detach())
    right = (probabilities[0] > 0.5).float().mean() / 2 + (probabilities[1] < 0.5).float().mean() / 2
    torch.testing.assert_close(losses["losses/discriminator_accuracy"], right)
    gradients = torch.autograd.grad(loss, [*before.parameters()])
    for new, old, gradient in zip(discriminator.parameters(), before.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - 0.1 * gradient)


def test_the_discriminator_learns_to_tell_them_apart():
    _, discriminator = networks()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    states, actions = pairs(500, 1)
    for _ in range(200):
        generated = states, -states[:, :2].tanh()
        losses = script.update_discriminator(
            discriminator, optimizer, (states, states[:, :2].tanh()), generated, Args()
        )
    assert losses["losses/discriminator_accuracy"] > 0.95
    rewards = [
        script.generator_reward(discriminator, states, sign * states[:, :2].tanh(), actions, Args(penalty=0.0)).mean()
        for sign in (1, -1)
    ]
    assert rewards[0] > rewards[1] + 1


@pytest.mark.parametrize("penalty", [0.0, 0.1, 2.0])
def test_the_reward_in_closed_form(penalty):
    """-log(1 - D) - lambda mean (a - a')^2, for rollouts (T, E)."""
    _, discriminator = networks()
    states, actions, noisy = randn(4, 3, STATE_DIM), randn(4, 3, ACTION_DIM, seed=1), randn(4, 3, ACTION_DIM, seed=2)
    rewards = script.generator_reward(discriminator, states, actions, noisy, Args(penalty=penalty))
    assert rewards.shape == (4, 3)
    for t in range(4):
        for e in range(3):
            odds = discriminator(states[t, e][None], actions[t, e][None])
            distance = sum((actions[t, e, i] - noisy[t, e, i]) ** 2 for i in range(ACTION_DIM)) / ACTION_DIM
            expected = -torch.log(1 - odds.sigmoid())[0] - penalty * distance
            torch.testing.assert_close(rewards[t, e], expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_generator_is_rewarded_for_what_the_environment_carried_out(tmp_path, monkeypatch):
    """States without noisy actions, actions clipped to -1 to 1, the noisy actions that were observed; and no reward of
    the environment reaches it."""
    seen, real = [], script.generator_reward

    def generator_reward(discriminator, states, actions, noisy_actions, args):
        seen.append((states, actions, noisy_actions, real(discriminator, states, actions, noisy_actions, args)))
        return seen[-1][-1]

    def update_trpo(generator, critic, optimizer, rollout, args):
        states, actions, noisy_actions, rewards = seen[-1]
        np.testing.assert_array_equal(rollout.rewards, rewards)
        np.testing.assert_array_equal(rollout.states, torch.cat((states, noisy_actions), -1))
        np.testing.assert_array_equal(rollout.actions.clip(-1, 1), actions)
        assert np.abs(rollout.actions).max() > 1 and noisy_actions.abs().max() > 1
        return {}

    monkeypatch.setattr(script, "generator_reward", generator_reward)
    monkeypatch.setattr(script, "update_trpo", update_trpo)
    small = {"num_envs": 2, "num_steps": 10, "total_timesteps": 60, "num_traces": 2, "clone_updates": 2}
    script.main(Args(**SMALL | small, eval_episodes=1, run_dir=str(tmp_path / "run")))
    assert len(seen) == 3 and seen[0][0].shape == (10, 2, STATE_DIM)


def test_corrected_trajectories_are_what_happens_when_the_greedy_generator_acts():
    env, experts, args = reacher(num_traces=5)
    generator, _ = networks()
    generator.net[-1].weight.data.mul_(300)
    torch.manual_seed(3)
    made = script.corrected_trajectories([env, reacher()[0]], generator, args)
    assert [len(trajectory.rewards) for trajectory in made] == [50] * 5
    real = script.make_env(args)
    for trajectory in made:
        (seed,) = [e.seed for e in experts if np.array_equal(e.states[0], trajectory.states[0])]
        states, rewards = [real.reset(seed=seed)[0]], []
        for action in trajectory.actions:
            state, reward, *_ = real.step(action)
            states.append(state)
            rewards.append(reward)
        np.testing.assert_array_equal(trajectory.states, states)
        np.testing.assert_allclose(trajectory.rewards, rewards, rtol=1e-5)
        assert np.abs(trajectory.actions).max() <= 1
    assert np.mean([np.abs(t.actions).mean() for t in made]) > 0.1


def of_returns(*returns):
    return [Trajectory(None, None, np.array([value / 2] * 2), None) for value in returns]


def test_those_succeed_that_reach_a_share_of_the_experts_mean_return():
    corrected = of_returns(49, 50, 51, 200)
    assert script.successful(corrected, of_returns(80, 120), Args(least_success=0.5)) == corrected[1:]
    assert script.successful(corrected, of_returns(80, 120), Args(least_success=1.0)) == corrected[3:]
    assert script.successful(corrected, of_returns(1000), Args()) == corrected[3:]  # the best one
    costs = of_returns(-160, -149, -10)
    assert script.successful(costs, of_returns(-100), Args(least_success=0.5)) == costs[1:]


def test_a_clone_of_corrected_trajectories_changes_no_random_number_of_the_run():
    _, experts, args = reacher(num_traces=3, num_envs=2, clone_updates=30)
    generator, _ = networks()
    actor = Actor(STATE_DIM, ACTION_DIM, 8)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = script.clone_corrected(actor, generator, experts, args)
    assert torch.equal(torch.get_rng_state(), state)
    weights = copy.deepcopy(actor.state_dict())
    torch.manual_seed(12)
    again = script.clone_corrected(actor, generator, experts, args)
    assert all(torch.equal(actor.state_dict()[name], weight) for name, weight in weights.items())
    assert first == again and first["augment/pairs"] == 50 * round(3 * first["augment/success_rate"])


@pytest.mark.parametrize("seed", [None, 99])
def test_a_dataset_that_cannot_be_played_again_is_refused(seed, tmp_path, monkeypatch):
    """Without the seeds of its resets, or with others."""
    real = script.load_expert
    monkeypatch.setattr(script, "load_expert", lambda *args: [e._replace(seed=seed) for e in real(*args)])
    with pytest.raises(script.UsageError, match="^--dataset must have the seeds of its resets in --env-id$"):
        script.main(Args(**SMALL, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
