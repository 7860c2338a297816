"""Compiled hot paths on raw memory: addresses, element strides and dtype tags (csrc/dtype.h)."""

from collections.abc import Sequence

openmp: bool

def isa() -> str: ...
def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...

# ---- logprob

def token_logprobs(
    logits: int,
    token_ids: int,
    mask: int,
    temperatures: int,
    floors: int,
    dtype: int,
    id_dtype: int,
    rows: int,
    vocab: int,
    tokens: int,
    inner: int,
    outer_stride: int,
    stride: int,
    temperature: float,
    softcap: float,
    low: float,
    high: float,
    logp: int,
    entropy: int,
    stats: int,
    threads: int,
) -> tuple[str, int]: ...
def token_logprobs_backward(
    logits: int,
    token_ids: int,
    mask: int,
    temperatures: int,
    floors: int,
    dtype: int,
    id_dtype: int,
    rows: int,
    vocab: int,
    tokens: int,
    inner: int,
    outer_stride: int,
    stride: int,
    temperature: float,
    softcap: float,
    stats: int,
    entropy: int,
    d_logp: int,
    d_entropy: int,
    d_logits: int,
    threads: int,
) -> None: ...

# ---- advantage

def gae(
    rewards: int,
    values: int,
    last_values: int,
    bootstrap_values: int,
    terminated: int,
    truncated: int,
    mask: int,
    lams: int,
    offsets: int,
    rows: int,
    length: int,
    dtype: int,
    gamma: float,
    lam: float,
    advantages: int,
    returns: int,
    want_moments: int,
    threads: int,
) -> list[float]: ...
def gae_backward(
    d_advantages: int,
    d_returns: int,
    terminated: int,
    truncated: int,
    mask: int,
    lams: int,
    offsets: int,
    rows: int,
    length: int,
    dtype: int,
    gamma: float,
    lam: float,
    d_rewards: int,
    d_values: int,
    d_last_values: int,
    d_bootstrap_values: int,
    threads: int,
) -> None: ...
def reverse_linear_scan(
    a: int, b: int, init: int, offsets: int, rows: int, length: int, dtype: int, out: int, threads: int
) -> None: ...
def reverse_linear_scan_backward(
    a: int,
    y: int,
    init: int,
    upstream: int,
    offsets: int,
    rows: int,
    length: int,
    dtype: int,
    d_a: int,
    d_b: int,
    d_init: int,
    threads: int,
) -> None: ...
def group_advantages(
    rewards: int,
    groups: int,
    valid: int,
    upstream: int,
    aside: int,
    count: int,
    baseline: int,
    scale: int,
    raw_singleton: bool,
    eps: float,
    ddof: float,
    min_std: float,
    out: int,
) -> None: ...
def moments(x: int, mask: int, dtype: int, count: int, threads: int) -> list[float]: ...
def merge_moments(a: list[float], b: list[float]) -> list[float]: ...
def whiten(
    x: int,
    mask: int,
    dtype: int,
    count: int,
    shift: float,
    scale: float,
    offset: float,
    out: int,
    threads: int,
) -> None: ...
def whiten_sums(
    x: int, mask: int, upstream: int, dtype: int, count: int, mean: float, threads: int
) -> list[float]: ...
def whiten_backward(
    x: int,
    mask: int,
    upstream: int,
    dtype: int,
    count: int,
    mean: float,
    slope: float,
    constant: float,
    linear: float,
    d_x: int,
    threads: int,
) -> None: ...
def zeros_and_ones(mask: int, dtype: int, count: int, flags: int) -> bool: ...
def gae_carried_whitened(
    rewards: int,
    values: int,
    mask: int,
    mask_dtype: int,
    rows: int,
    length: int,
    dtype: int,
    gamma: float,
    lam: float,
    eps: float,
    advantages: int,
    returns: int,
    threads: int,
) -> bool: ...
def gae_by_time(
    rewards: int,
    values: int,
    last_values: int,
    terminated: int,
    rows: int,
    length: int,
    dtype: int,
    gamma: float,
    decay: float,
    advantages: int,
    returns: int,
    threads: int,
) -> None: ...
def gae_ahead(
    rewards: int,
    values: int,
    next_values: int,
    terminated: int,
    done: int,
    rows: int,
    length: int,
    gamma: float,
    decay: float,
    advantages: int,
    returns: int,
    threads: int,
) -> None: ...

# ---- off_policy

def vtrace(
    rewards: int,
    values: int,
    log_rhos: int,
    bootstrap_values: int,
    last_values: int,
    terminated: int,
    truncated: int,
    mask: int,
    lams: int,
    offsets: int,
    rows: int,
    length: int,
    dtype: int,
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
    advantage_rho_clip: float,
    targets: int,
    advantages: int,
    threads: int,
) -> None: ...
def retrace(
    rewards: int,
    q_values: int,
    log_rhos: int,
    next_values: int,
    terminated: int,
    truncated: int,
    mask: int,
    lams: int,
    offsets: int,
    rows: int,
    length: int,
    dtype: int,
    gamma: float,
    lam: float,
    targets: int,
    threads: int,
) -> None: ...

# ---- policy_loss

def policy_loss(
    logprobs: int,
    old_logprobs: int,
    advantages: int,
    ref_logprobs: int,
    entropy: int,
    importance: int,
    mask: int,
    cu_seqlens: int,
    tokens: int,
    rows: int,
    row_length: int,
    dtype: int,
    row_advantages: bool,
    objective: int,
    parameters: Sequence[float],
    aggregation: int,
    denominator: float,
    kl_coef: float,
    kl_estimator: int,
    kl_gradient: int,
    entropy_coef: float,
    loss: int,
    stats: int,
    d_logprobs: int,
    d_entropy: int,
    threads: int,
) -> None: ...
def value_loss(
    values: int,
    old_values: int,
    returns: int,
    mask: int,
    tokens: int,
    dtype: int,
    clip: float,
    denominator: float,
    loss: int,
    d_values: int,
    threads: int,
) -> None: ...
def importance_weights(
    logprobs: int,
    behavior_logprobs: int,
    mask: int,
    cu_seqlens: int,
    tokens: int,
    rows: int,
    row_length: int,
    dtype: int,
    level: int,
    mode: int,
    low: float,
    high: float,
    bound_level: int,
    veto: float,
    normalize: int,
    weights: int,
    stats: int,
    threads: int,
) -> None: ...
def high_entropy_mask(
    entropy: int, mask: int, tokens: int, dtype: int, fraction: float, kept: int, threads: int
) -> None: ...
def kl_rewards(
    rewards: int,
    logprobs: int,
    ref_logprobs: int,
    mask: int,
    cu_seqlens: int,
    tokens: int,
    rows: int,
    row_length: int,
    dtype: int,
    row_rewards: bool,
    kl_coef: float,
    estimator: int,
    clip: float,
    shaped: int,
    stats: int,
    threads: int,
) -> None: ...

# ---- q_learning; strides are [inner, outer_stride, stride]

def best_token(
    q: int,
    q_strides: Sequence[int],
    other: int,
    other_strides: Sequence[int],
    dtype: int,
    mask: int,
    rows: int,
    vocab: int,
    values: int,
    ids: int,
    threads: int,
) -> None: ...
def expected_values(
    logits: int,
    logits_strides: Sequence[int],
    q: int,
    q_strides: Sequence[int],
    dtype: int,
    mask: int,
    rows: int,
    vocab: int,
    temperature: float,
    out: int,
    threads: int,
) -> None: ...
def soft_values_backward(
    q: int,
    q_strides: Sequence[int],
    dtype: int,
    mask: int,
    rows: int,
    vocab: int,
    stats: int,
    upstream: int,
    alpha: float,
    d_q: int,
    threads: int,
) -> None: ...
def guided_logits(
    logits: int,
    logits_strides: Sequence[int],
    q: int,
    q_strides: Sequence[int],
    other: int,
    other_strides: Sequence[int],
    dtype: int,
    rows: int,
    vocab: int,
    values: int,
    beta: float,
    out: int,
    threads: int,
) -> None: ...
def n_step(
    rewards: int,
    values: int,
    last_values: int,
    bootstrap_values: int,
    terminated: int,
    truncated: int,
    mask: int,
    offsets: int,
    rows: int,
    length: int,
    dtype: int,
    gamma: float,
    n: int,
    behind: bool,
    out: int,
    threads: int,
) -> None: ...
def n_step_backward(
    upstream: int,
    terminated: int,
    truncated: int,
    mask: int,
    offsets: int,
    rows: int,
    length: int,
    dtype: int,
    gamma: float,
    n: int,
    behind: bool,
    d_rewards: int,
    d_values: int,
    d_last_values: int,
    d_bootstrap_values: int,
    threads: int,
) -> None: ...
def q_loss(
    first: int,
    second: int,
    targets: int,
    weights: int,
    mask: int,
    cu_seqlens: int,
    tokens: int,
    rows: int,
    row_length: int,
    wide: bool,
    kind: int,
    parameter: float,
    aggregation: int,
    denominator: float,
    loss: int,
    stats: int,
    d_first: int,
    d_second: int,
    threads: int,
) -> None: ...

# ---- linear_logprob: tiles of logits between two GEMMs

def fold_tile(
    tile: int,
    bias: int,
    token_ids: int,
    temperatures: int,
    dtype: int,
    rows: int,
    columns: int,
    stride: int,
    first: int,
    scale: float,
    temperature: float,
    softcap: float,
    state: int,
    moment: bool,
    factor: int,
    shift: int,
    weights: int,
    weighted: int,
    threads: int,
) -> None: ...
def turn_tile(
    tile: int,
    bias: int,
    token_ids: int,
    temperatures: int,
    dtype: int,
    rows: int,
    columns: int,
    stride: int,
    first: int,
    scale: float,
    temperature: float,
    softcap: float,
    stats: int,
    out: int,
    threads: int,
) -> None: ...

# ---- packed sequences

def bounds_rise(bounds: int, count: int, total: int) -> bool: ...

# ---- attribution

def attribution_scores(
    grad: int,
    activation: int,
    dtype: int,
    reduction: int,
    rows: int,
    dim: int,
    grad_stride: int,
    activation_stride: int,
    out: int,
    threads: int,
) -> None: ...
def attribution_scores_backward(
    grad: int,
    activation: int,
    upstream: int,
    scores: int,
    dtype: int,
    reduction: int,
    rows: int,
    dim: int,
    grad_stride: int,
    activation_stride: int,
    d_grad: int,
    d_activation: int,
    threads: int,
) -> None: ...
def segment_sum(
    scores: int, offsets: int, dtype: int, segments: int, elements: int, out: int, threads: int
) -> None: ...
def segment_spread(
    values: int, offsets: int, dtype: int, segments: int, elements: int, out: int, threads: int
) -> None: ...
def accumulate_by_id(
    scores: int, ids: int, mask: int, elements: int, size: int, count: int, mean: int, m2: int
) -> int: ...

# ---- sum_tree: a tree is its memory and its capacity

def sum_tree_size(capacity: int) -> int: ...
def sum_tree_build(nodes: int, capacity: int) -> None: ...
def sum_tree_summary(nodes: int, capacity: int) -> tuple[float, float]: ...
def sum_tree_update(
    nodes: int, capacity: int, indices: int, priorities: int, count: int
) -> tuple[str, int]: ...
def sum_tree_sample(
    nodes: int, capacity: int, uniforms: int, count: int, indices: int, priorities: int
) -> tuple[str, int]: ...

# ---- stream: the physical limit that benchmarks measure

def stream(
    reads: list[tuple[int, int]], writes: list[tuple[int, int]], chunks: int, elements: int, threads: int
) -> int: ...
