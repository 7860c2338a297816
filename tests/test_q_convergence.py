"""Fitted Q on a token MDP that is small enough to solve: every kind of target leads to the Q it is meant for."""

import pytest
import torch

import react_fast as rf

GAMMA = 0.9
STATES, TOKENS, LENGTH = 5, 3, 24


class MDP:
    """s' = to(s, a), a reward for each (s, a), and tokens that end the text."""

    def __init__(self):
        self.reward = torch.randn(STATES, TOKENS, dtype=torch.float64)
        self.to = torch.randint(STATES, (STATES, TOKENS))
        self.ends = torch.zeros(STATES, TOKENS, dtype=torch.bool)
        self.ends[torch.arange(STATES), torch.randint(TOKENS, (STATES,))] = True
        self.policy = torch.randn(STATES, TOKENS, dtype=torch.float64)  # logits of whom we evaluate
        self.behavior = torch.randn(STATES, TOKENS, dtype=torch.float64) / 2  # of who wrote the texts

    def solve(self, value):
        """The fixed point of Q = r + gamma (1 - end) value(Q(s')); 0.9^400 < 1e-18."""
        q = torch.zeros_like(self.reward)
        for _ in range(400):
            q = self.reward + GAMMA * torch.where(self.ends, 0.0, value(q)[self.to])
        return q

    def texts(self, rows):
        """(states [B, T + 1], tokens, mask): what follows an end does not count."""
        states, tokens = torch.zeros(rows, LENGTH + 1, dtype=torch.int64), torch.zeros(rows, LENGTH).long()
        states[:, 0] = torch.randint(STATES, (rows,))
        mask, live = torch.zeros(rows, LENGTH, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)
        for t in range(LENGTH):
            tokens[:, t] = torch.multinomial(self.behavior.softmax(1)[states[:, t]], 1)[:, 0]
            mask[:, t] = live
            live = live & ~self.ends[states[:, t], tokens[:, t]]
            states[:, t + 1] = self.to[states[:, t], tokens[:, t]]
        return states, tokens, mask


def _fit(mdp, target_of, steps, rows=400, tau=1.0):
    """Q tables trained by q_loss alone, whose minimum over all visits of (s, a) is the mean of their targets."""
    states, tokens, mask = mdp.texts(rows)
    here = (states[:, :-1], tokens)
    flags = {"terminated": mdp.ends[here], "mask": mask}
    online = torch.zeros(STATES, TOKENS, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(STATES, TOKENS, dtype=torch.float64)
    visits = torch.zeros(STATES, TOKENS, dtype=torch.float64).index_put_(here, mask.double(), accumulate=True)
    assert bool((visits > 0).all())
    for _ in range(steps):
        y = target_of(online.detach(), target, states, here, mdp.reward[here], flags)
        loss = rf.q_loss(online[here], y, mask, aggregation="token_sum_norm", denominator=1.0).loss
        (grad,) = torch.autograd.grad(loss, online)
        with torch.no_grad():
            online -= grad / visits  # Newton's step of a sum of squares
        rf.polyak_update([target], [online.detach()], tau=tau)
    return online.detach()


def _one_step(value):
    def target(online, old, states, here, rewards, flags):
        behind = value(online, old)[states[:, 1:]]
        return rf.q_targets(rewards, behind, gamma=GAMMA, **flags)

    return target


@pytest.mark.parametrize(("steps", "tau"), [(250, 1.0), (500, 0.5)])
def test_double_dqn_finds_the_best_policy(steps, tau):
    """Off-policy data, a deterministic MDP: Q* exactly, with a copied or an averaged target network."""
    mdp = MDP()
    best = mdp.solve(lambda q: q.amax(1))
    for value in (lambda online, old: rf.double_q_values(online, old), lambda _, old: rf.max_q_values(old)):
        found = _fit(mdp, _one_step(value), steps, tau=tau)
        torch.testing.assert_close(found, best, rtol=0, atol=1e-9)  # 0.9^250 of values below 30, or 0.95^500


def test_twin_heads_find_the_best_policy_without_noise():
    """The lower of two equal heads is either."""
    mdp = MDP()
    found = _fit(mdp, _one_step(lambda online, old: rf.double_q_values((online, online), (old, old))), 250)
    torch.testing.assert_close(found, mdp.solve(lambda q: q.amax(1)), rtol=0, atol=1e-9)


def test_soft_q_finds_the_soft_policy():
    mdp, alpha = MDP(), 0.5
    prior = torch.randn(STATES, TOKENS, dtype=torch.float64).log_softmax(1)
    for given in (None, prior):
        found = _fit(
            mdp, _one_step(lambda _, old, p=given: rf.soft_values(old, alpha=alpha, prior_logprobs=p)), 250
        )
        price = 0 if given is None else given
        best = mdp.solve(lambda q, p=price: alpha * torch.logsumexp(q / alpha + p, 1))
        torch.testing.assert_close(found, best, rtol=0, atol=1e-9)


def test_expected_sarsa_evaluates_the_policy():
    mdp = MDP()
    pi = mdp.policy.softmax(1)
    found = _fit(mdp, _one_step(lambda _, old: rf.expected_q_values(old, mdp.policy)), 250)
    torch.testing.assert_close(found, mdp.solve(lambda q: (pi * q).sum(1)), rtol=0, atol=1e-9)


def test_n_steps_evaluate_who_wrote_the_data():
    """Uncorrected n-step targets are on policy: with a deterministic writer, exactly its Q."""
    mdp = MDP()
    mdp.behavior = torch.zeros(STATES, TOKENS, dtype=torch.float64)
    written = torch.randint(TOKENS, (STATES,))
    mdp.ends[torch.arange(STATES), written] = False
    exact = mdp.solve(lambda q: q[torch.arange(STATES), written])
    # One free token, then the writer's own.
    states, tokens = (
        torch.zeros(45, LENGTH + 1, dtype=torch.int64),
        torch.zeros(45, LENGTH, dtype=torch.int64),
    )
    states[:, 0], tokens[:, 0] = torch.arange(45) % STATES, torch.arange(45) // STATES % TOKENS
    for t in range(LENGTH):
        if t:
            tokens[:, t] = written[states[:, t]]
        states[:, t + 1] = mdp.to[states[:, t], tokens[:, t]]
    here = (states[:, :-1], tokens)
    ended = mdp.ends[here].cumsum(1)
    mask = (ended - mdp.ends[here].long()) == 0
    value = exact[torch.arange(STATES), written]
    for n in (1, 2, 7, LENGTH):
        y = rf.q_targets(
            mdp.reward[here], value[states[:, 1:]], gamma=GAMMA, n=n, terminated=mdp.ends[here], mask=mask
        )
        torch.testing.assert_close(y[mask], exact[here][mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_retrace_evaluates_the_policy_from_other_peoples_data(lam):
    """At Q^pi each r + gamma V^pi(s') - Q^pi(s, a) of a deterministic MDP is 0: no noise, for any lam."""
    mdp = MDP()
    pi, mu = mdp.policy.log_softmax(1), mdp.behavior.log_softmax(1)
    exact = mdp.solve(lambda q: (pi.exp() * q).sum(1))

    def target(_, old, states, here, rewards, flags):
        behind = rf.expected_q_values(old, mdp.policy)[states[:, 1:]]
        return rf.retrace(rewards, old[here], behind, (pi - mu)[here], gamma=GAMMA, lam=lam, **flags)

    found = _fit(mdp, target, 250, rows=1000)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tau", [0.5, 0.8, 0.95])
def test_ilql_learns_the_expectile_of_the_data(tau):
    """One state, ten texts of one token with its reward: V is the tau-expectile of the rewards."""
    rewards = torch.tensor([0.0, 1.0, 3.0, 10.0], dtype=torch.float64)
    counts = torch.tensor([4, 3, 2, 1])
    tokens = torch.repeat_interleave(torch.arange(4), counts)[:, None]
    mask, ended = torch.ones(10, 1).bool(), torch.ones(10, 1).bool()
    q = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    old = [torch.zeros(4, dtype=torch.float64)]
    target, optimizer = rf.TargetUpdate(old, [q.detach()], every=2), torch.optim.SGD([q, v], lr=0.5)
    for _ in range(1500):
        loss = rf.ilql_loss(
            q[tokens],
            old[0][tokens],
            v.expand(10, 1),
            rewards[tokens],
            mask,
            gamma=GAMMA,
            tau=tau,
            terminated=ended,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.step()
    torch.testing.assert_close(q.detach(), rewards, rtol=0, atol=1e-9)
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        gap = counts * (rewards - middle)
        low, high = (
            (middle, high)
            if tau * gap.clamp_min(0).sum() > (tau - 1) * gap.clamp_max(0).sum()
            else (low, middle)
        )
    assert float(v.detach()) == pytest.approx(low, abs=1e-9)


def test_conservative_q_prefers_the_data():
    """Regression leaves what was never taken where it started; with CQL it ends below the data's tokens."""
    ids, mask = torch.tensor([[0, 1]]), torch.ones(1, 2).bool()
    y = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    for weight in (0.0, 0.1):
        q = torch.full((2, 4), 5.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([q], lr=0.5)
        for _ in range(2000):
            taken = q.gather(1, ids.T).T
            loss = rf.q_loss(taken, y, mask).loss + weight * rf.cql_loss(q[None], ids, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        taken = q.detach().gather(1, ids.T)
        others = q.detach().scatter(1, ids.T, -torch.inf).amax(1, keepdim=True)
        assert bool((others < taken).all()) == (weight > 0)
        assert float((taken.T - y).abs().max()) <= weight + 1e-9  # the push of CQL is at most its weight
