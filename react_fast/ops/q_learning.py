"""Q-learning for language models: n-step targets, values over a vocabulary, soft values, guided decoding.

Every token is an action, every vocabulary entry a choice. Retrace's targets come from `retrace`, whose
`next_values` are the `expected_q_values` of the state behind each token.
"""

import torch

from .. import reference
from . import _check, _q_learning
from ._arrays import numpy_too
from ._logprob import HIGH, LOW
from .advantage import _check_like, _steps
from .backend import accumulation_dtype, use_reference

Pair = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Maybe = torch.Tensor | None


@numpy_too
def n_step_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    n: int,
    last_values: Maybe = None,
    terminated: Maybe = None,
    truncated: Maybe = None,
    bootstrap_values: Maybe = None,
    mask: Maybe = None,
    cu_seqlens: Maybe = None,
) -> torch.Tensor:
    """Rewards of n steps and the value of the state behind them.

        G_t = r_t + gamma r_{t+1} + ... + gamma^{n-1} r_{t+n-1} + gamma^n V_{t+n}

    t counts counting steps. A window ends early at a cut: with 0 behind `terminated`, `bootstrap_values` behind
    `truncated`, `last_values` behind a row's last counting step. Two operations a step, whatever n.

    Args:
        rewards, values: [B, T], or packed [N] with `cu_seqlens`, of one dtype; `values` as in `gae`: of the state
            in which the action of step t was taken.
        gamma: discount in [0, 1].
        n: steps, at least 1; as long as a row or longer: `discounted_returns`.
        last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens: see `discounted_returns`.
    Returns: like `rewards`, float32 (float64 for float64), 0 where masked. Differentiable in rewards, values, last
        and bootstrap values.
    Raises: see `discounted_returns`; TypeError or ValueError for another n.
    Source: Sutton & Barto 2018, eq. 7.1; time limits: Pardo et al. 2018 (arXiv:1712.00378).
    """
    _check.tensor("values", values)
    flags = _steps(rewards, values, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens)
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    n = _count("n", n)
    if use_reference():
        return reference.n_step_returns(
            rewards, values, gamma=gamma, n=n, last_values=last_values, terminated=flags[0], truncated=flags[1],
            bootstrap_values=bootstrap_values, mask=flags[2], cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return _q_learning.n_step(
        rewards, values, last_values, bootstrap_values, *flags, cu_seqlens, gamma, n, False
    )


@numpy_too
def q_targets(
    rewards: torch.Tensor,
    next_values: torch.Tensor,
    *,
    gamma: float,
    n: int = 1,
    last_values: Maybe = None,
    terminated: Maybe = None,
    truncated: Maybe = None,
    bootstrap_values: Maybe = None,
    mask: Maybe = None,
    cu_seqlens: Maybe = None,
) -> torch.Tensor:
    """Targets of Q(s_t, a_t): a constant, no gradient.

        y_t = r_t + gamma r_{t+1} + ... + gamma^{k-1} r_{t+k-1} + gamma^k V'_{t+k-1}

    V'_t is the value *behind* step t; k = n, or fewer where the episode ends or is cut. One step of (s, a, r, s')
    in any order is n = 1 with `double_q_values` of s'.

    The data's own n steps, uncorrected; for another policy's data `retrace` weighs them, from `expected_q_values`.

    Args:
        rewards, next_values: [B, T], or packed [N] with `cu_seqlens`, of one dtype. `next_values` is 0 where
            `terminated`, whatever stands there; where `truncated`, it is what follows.
        gamma: discount in [0, 1].  n: steps, at least 1.
        last_values: [B], in place of `next_values` at a row's last counting step.
        bootstrap_values: like `rewards`, in place of `next_values` where `truncated`.
        terminated, truncated, mask, cu_seqlens: see `discounted_returns`.
    Returns: like `rewards`, float32 (float64 for float64), 0 where masked.
    Raises: see `n_step_returns`, except that `truncated` needs no bootstrap_values.
    Source: Watkins & Dayan 1992; n steps: Mnih et al. 2016 (arXiv:1602.01783), section 4. `dones` of trlx' ILQL
        marks the steps that are *not* terminal.
    """
    _check.tensor("next_values", next_values)
    if truncated is not None and bootstrap_values is None:
        bootstrap_values = next_values
    _check_next(rewards, next_values, cu_seqlens)
    flags = _steps(rewards, None, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens)
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    n = _count("n", n)
    bootstrap_values = None if bootstrap_values is next_values else bootstrap_values
    if use_reference():
        return reference.q_targets(
            rewards, next_values, gamma=gamma, n=n, last_values=last_values, terminated=flags[0],
            truncated=flags[1], bootstrap_values=bootstrap_values, mask=flags[2], cu_seqlens=cu_seqlens,
        )  # fmt: skip
    given = [None if x is None else x.detach() for x in (rewards, next_values, last_values, bootstrap_values)]
    return _q_learning.n_step(*given, *flags, cu_seqlens, gamma, n, True)


@numpy_too
def path_consistency(
    values: torch.Tensor,
    rewards: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    gamma: float,
    alpha: float,
    span: int | None = None,
    ref_logprobs: Maybe = None,
    last_values: Maybe = None,
    terminated: Maybe = None,
    truncated: Maybe = None,
    bootstrap_values: Maybe = None,
    mask: Maybe = None,
    cu_seqlens: Maybe = None,
) -> torch.Tensor:
    """Residual that is 0 on every path for the soft-optimal value and policy.

        C_t = -V_t + gamma^d V_{t+d} + sum_{i<d} gamma^i (r_{t+i} - alpha log(pi / pi_ref)_{t+i})

    d = span, or fewer where the episode ends or is cut; span 1 is the soft Bellman residual, None reaches to the
    end. The loss is `q_loss(C, 0)`, whose gradient reaches the policy and the value.

    Args:
        values, rewards, logprobs, ref_logprobs: [B, T], or packed [N] with `cu_seqlens`, of one dtype;
            ref_logprobs None: entropy in place of KL.
        gamma: discount in [0, 1].  alpha: temperature of the entropy or KL, not negative.
        span: d, at least 1.
        last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens: see `n_step_returns`.
    Returns: like `rewards`, float32 (float64 for float64), 0 where masked. Differentiable in values, rewards,
        logprobs, last and bootstrap values.
    Raises: see `n_step_returns`.
    Source: Nachum et al. 2017 (arXiv:1702.08892), eq. 14; KL: Nachum et al. 2018 (arXiv:1707.01891).
    """
    _check.tensor("values", values)
    flags = _steps(rewards, values, last_values, terminated, truncated, bootstrap_values, mask, cu_seqlens)
    for name, x in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs)):
        if x is not None:
            _check_like(name, x, rewards, rewards.shape, "rewards")
    _check.tensor("logprobs", logprobs)
    gamma = _check.number("gamma", gamma, low=0.0, high=1.0)
    alpha = _check.number("alpha", alpha, low=0.0)
    n = max(rewards.shape[-1], 1) if span is None else _count("span", span)
    if use_reference():
        return reference.path_consistency(
            values, rewards, logprobs, gamma=gamma, alpha=alpha, span=n, ref_logprobs=ref_logprobs,
            last_values=last_values, terminated=flags[0], truncated=flags[1], bootstrap_values=bootstrap_values,
            mask=flags[2], cu_seqlens=cu_seqlens,
        )  # fmt: skip
    wide = accumulation_dtype(rewards.dtype)
    price = logprobs.to(wide) if ref_logprobs is None else logprobs.to(wide) - ref_logprobs.to(wide)
    paid, own = torch.sub(rewards.to(wide), price, alpha=alpha), values.to(wide)
    tails = [None if x is None else x.to(wide) for x in (last_values, bootstrap_values)]
    found = _q_learning.n_step(paid, own, *tails, *flags, cu_seqlens, gamma, n, False) - own
    return found if flags[2] is None else torch.where(flags[2], found, 0.0)


def max_q_values(q: Pair, *, mask: Maybe = None) -> torch.Tensor:
    """The best token's Q, V(s) = max_a Q(s, a): a constant, no gradient. Plain Q-learning and DQN.

    Args:
        q: [..., V] float32, bfloat16, float16 or float64, any strides; or two heads, of which the lower counts at
            every token. -inf forbids a token.
        mask: [...] bool or 0/1 integers; the other rows return 0 and are not looked at.
    Returns: [...] float32 (float64 for float64). A row with NaN gives NaN; without an allowed token, -inf.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape or device.
    Source: Mnih et al. 2015 (DQN); two heads: Fujimoto et al. 2018 (arXiv:1802.09477).
    """
    heads = _heads("q", q, None, "q")
    return _best(heads, (), mask, "q")


def double_q_values(q_online: Pair, q_target: Pair, *, mask: Maybe = None) -> torch.Tensor:
    """The target network's Q of the online network's best token: a constant, no gradient.

        V(s) = Q_target(s, argmax_a Q_online(s, a))

    One read of `q_online`; of `q_target` one element a row is read.

    Args:
        q_online: [..., V] float32, bfloat16, float16 or float64, any strides. Ties: the lowest id. -inf forbids a
            token. Two heads: the lower counts at every token.
        q_target: like `q_online`. Two heads: the lower of the two at the chosen token.
        mask: [...] bool or 0/1 integers; the other rows return 0 and are not looked at.
    Returns: [...] float32 (float64 for float64). A row of `q_online` with NaN gives NaN; without an allowed token,
        -inf.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape or device.
    Source: van Hasselt et al. 2016 (arXiv:1509.06461); two heads: Fujimoto et al. 2018 (arXiv:1802.09477).
    """
    online = _heads("q_online", q_online, None, "q_online")
    target = _heads("q_target", q_target, online[0], "q_online")
    return _best(online, target, mask, "q_online")


def expected_q_values(
    q: torch.Tensor, logits: torch.Tensor, *, temperature: float = 1.0, mask: Maybe = None
) -> torch.Tensor:
    """Q's mean under a policy, V(s) = sum_a pi(a | s) Q(s, a): a constant, no gradient.

        pi = softmax(logits / temperature)

    What expected SARSA, Retrace and tree backup bootstrap from. One read of both; no [..., V] is written.

    Args:
        q, logits: [..., V] of one dtype, float32, bfloat16, float16 or float64, any strides. A logit of -inf
            forbids the token: its Q is not looked at.
        temperature: a number in [1e-30, 1e30].
        mask: [...] bool or 0/1 integers; the other rows return 0 and are not looked at.
    Returns: [...] float32 (float64 for float64). A row of logits with NaN or inf gives NaN; without an allowed
        token, -inf.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or temperature.
    Source: van Seijen et al. 2009, expected SARSA; Munos et al. 2016 (arXiv:1606.02647).
    """
    (q,) = _heads("q", q, None, "q")
    _heads("logits", logits, q, "q")
    temperature = _check.number("temperature", temperature, low=LOW, high=HIGH)
    mask = _row_mask(mask, q, "q")
    if use_reference():
        return reference.expected_q_values(q, logits, temperature=temperature, mask=mask)
    return _q_learning.expected_values(logits.detach(), q.detach(), mask, temperature)


def soft_values(
    q: torch.Tensor, *, alpha: float, prior_logprobs: Maybe = None, mask: Maybe = None
) -> torch.Tensor:
    """The soft maximum, the value of the policy softmax(q / alpha) with its entropy.

        V(s) = alpha log sum_a exp(q_a / alpha)        dV / dq_a = softmax(q / alpha)_a

    alpha -> 0: the maximum. With a prior, V = alpha log sum_a prior_a exp(q_a / alpha), the KL-regularised value
    (one tensor like q is written then). The sum is that of `token_logprobs` at temperature alpha, so
    alpha token_logprobs(q, id, temperature=alpha) = q_id - V: a language model's logits are the soft-optimal Q of
    some reward, up to a constant a row.

    Args:
        q: [..., V] float32, bfloat16, float16 or float64, any strides. -inf forbids a token.
        alpha: a number in [1e-30, 1e30].
        prior_logprobs: like `q`, the prior's log-probabilities, or None.
        mask: [...] bool or 0/1 integers; the other rows give 0 and gradient 0 and are not looked at.
    Returns: [...] float32 (float64 for float64), differentiable in `q` and `prior_logprobs`. No allowed token:
        -inf, gradient 0.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or alpha.
    Source: Haarnoja et al. 2017 (arXiv:1702.08165); Rafailov et al. 2024 (arXiv:2404.12358).
    """
    (q,) = _heads("q", q, None, "q")
    alpha = _check.number("alpha", alpha, low=LOW, high=HIGH)
    if prior_logprobs is not None:
        _heads("prior_logprobs", prior_logprobs, q, "q")
    mask = _row_mask(mask, q, "q")
    if use_reference():
        return reference.soft_values(q, alpha=alpha, prior_logprobs=prior_logprobs, mask=mask)
    if prior_logprobs is not None:
        wide = accumulation_dtype(q.dtype)
        q = torch.add(q.to(wide), prior_logprobs.to(wide), alpha=alpha)
    return _q_learning.soft_values(q, mask, alpha)[0]


def guided_logits(logits: torch.Tensor, q: Pair, values: Maybe = None, *, beta: float) -> torch.Tensor:
    """Logits to decode from: the policy's, moved towards tokens that are better than the state's value.

        logits_a + beta (Q_a - V)

    Softmax of it is pi(a) exp(beta (Q_a - V)) up to a constant a row, as ILQL decodes. `values` and the normaliser
    of the logits do not move the distribution, only what is compared across rows. One pass, no gradient.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any strides. -inf stays -inf, whatever q is.
        q: like `logits`; two heads: the lower of the two at every token. -inf forbids the token.
        values: [...] of the state, like `logits` or float32; None: 0.
        beta: a number, not negative.
    Returns: [..., V] float32 (float64 for float64).
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or beta.
    Source: Snell et al. 2022 (arXiv:2206.11871), section 4.2.
    """
    _heads("logits", logits, None, "logits")
    heads = _heads("q", q, logits, "logits")
    beta = _check.number("beta", beta, low=0.0)
    if values is not None:
        _floating_like("values", values, logits, logits.shape[:-1], "logits[..., 0]")
    if use_reference():
        return reference.guided_logits(logits, heads if len(heads) == 2 else heads[0], values, beta=beta)
    other = heads[1].detach() if len(heads) == 2 else None
    given = None if values is None else values.detach()
    return _q_learning.guided_logits(logits.detach(), heads[0].detach(), other, given, beta)


def _best(
    online: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...], mask: Maybe, name: str
) -> torch.Tensor:
    mask = _row_mask(mask, online[0], name)
    if use_reference():
        pairs = [x if len(x) == 2 else x[0] for x in (online, target) if x]
        return (reference.double_q_values if target else reference.max_q_values)(*pairs, mask=mask)
    found = [*(x.detach() for x in online), None][:2] + [*(x.detach() for x in target), None, None][:2]
    return _q_learning.best_values(*found, mask)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return min(value, 2**62)  # an operator takes 64 bits; no row is longer


def _check_next(rewards: torch.Tensor, next_values: torch.Tensor, cu_seqlens: Maybe) -> None:
    _check.floating("rewards", rewards)
    _check_like("next_values", next_values, rewards, rewards.shape, "rewards")


def _heads(name: str, value: Pair, like: Maybe, other: str) -> tuple[torch.Tensor, ...]:
    """One or two [..., V] tensors, alike, and like `like` where that is given."""
    pair = isinstance(value, tuple)
    found = value if isinstance(value, tuple) else (value,)
    if pair and len(found) != 2:
        raise ValueError(f"{name} must be a tensor or a pair of two, got {len(found)}")
    for i, x in enumerate(found):
        called = f"{name}[{i}]" if pair else name
        _check.floating(called, x)
        if like is None:
            if x.dim() == 0:
                raise ValueError(f"{called} must be [..., V], got a scalar")
            like, other = x, called
            continue
        _check.dtype(called, x, like.dtype, other)
        _check.shape(called, x, like.shape, other)
        _check.device(called, x, like.device, other)
    return found


def _row_mask(mask: Maybe, q: torch.Tensor, name: str) -> Maybe:
    return None if mask is None else _check.mask("mask", mask, q.shape[:-1], f"{name}[..., 0]", q.device)


def _floating_like(name: str, x: torch.Tensor, like: torch.Tensor, shape: torch.Size, other: str) -> None:
    """Of the dtype of `like`, or of the one that ops return for it."""
    _check.floating(name, x)
    if x.dtype != accumulation_dtype(like.dtype):
        _check.dtype(name, x, like.dtype, other)
    _check.shape(name, x, shape, other)
    _check.device(name, x, like.device, other)
