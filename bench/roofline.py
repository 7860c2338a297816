"""The least that an op must move and compute, from its shapes: one place for benchmarks and kernels' notes.

Every input is read once and every result written once; what an implementation reads again is its own affair. A
function bears its op's name. Numbers are float32 unless `size`, bytes an element, says otherwise; masks take a
byte, ids and bounds eight.
"""

from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class Work:
    """Bytes read and written and floating-point operations of a call; `path`: the kernel file that does it."""

    path: str
    read: float
    written: float
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """One behind the other; the first one's path."""
        read, written = self.read + other.read, self.written + other.written
        return Work(self.path, read, written, self.flops + other.flops)

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The larger of what moving and what computing takes at least."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


# From logits [rows, vocab].


def token_logprobs(rows: int, vocab: int, size: int) -> Work:
    return Work("logprob", rows * vocab * size, 0)


def token_logprobs_backward(rows: int, vocab: int, size: int) -> Work:
    return Work("logprob_backward", rows * vocab * size, rows * vocab * size)


def token_logprobs_both(rows: int, vocab: int, size: int) -> Work:
    return Work("logprob", 2 * rows * vocab * size, rows * vocab * size)


def values(rows: int, vocab: int, size: int, matrices: int = 1) -> Work:
    """max_q_values, soft_values; with a second matrix expected_q_values."""
    return Work("q_learning", matrices * rows * vocab * size, 0)


def guided_logits(rows: int, vocab: int, size: int, matrices: int = 2) -> Work:
    """The logits, Q and perhaps its twin read, float32 written."""
    return Work("q_learning", matrices * rows * vocab * size, 4 * rows * vocab)


# From hidden states [rows, dim] and a head [vocab, dim].


def linear_token_logprobs(rows: int, dim: int, vocab: int, size: int, gemms: int = 1) -> Work:
    """gemms: 1 without gradients, 2 with a frozen head, 4 with a trained one; gradients are as large as leaves."""
    leaves = (rows + vocab) * dim * size
    written = {1: 0, 2: rows * dim * size}.get(gemms, leaves)
    return Work("linear_logprob", leaves, written, gemms * 2.0 * rows * dim * vocab)


def linear_token_logprobs_of_few(rows: int, dim: int, vocab: int, size: int) -> Work:
    """Without gradients: the head is read whatever the number of rows."""
    return replace(linear_token_logprobs(rows, dim, vocab, size), path="linear_logprob_few")


def linear_policy_loss(rows: int, dim: int, vocab: int, size: int) -> Work:
    leaves = (rows + vocab) * dim * size
    return Work("linear_logprob", leaves, leaves, 3 * 2.0 * rows * dim * vocab)


def fold(logits: int, dim: int, size: int, result: int) -> Work:
    """A tile of the head between two GEMMs; the FLOPs are the GEMM's."""
    return Work("linear_logprob", logits * size, logits * result, 2.0 * logits * dim)


# Returns over steps.


def gae(steps: int, mask: bool = False) -> Work:
    return Work("advantage", (8 + mask) * steps, 8 * steps, 6 * steps)


def gae_of_one_row(steps: int) -> Work:
    """With a mask. As gae, whose chunks read again what the least does not count."""
    return replace(gae(steps, mask=True), path="advantage_chunks")


def gae_in_chunks(steps: int) -> Work:
    """What it costs to read rewards and values twice."""
    return Work("advantage_chunks", 16 * steps, 8 * steps, 12 * steps)


def gae_whitened(steps: int) -> Work:
    """With a mask; the advantages are read and written once more."""
    return Work("advantage", (9 + 5) * steps, (8 + 4) * steps, 12 * steps)


def reverse_linear_scan(steps: int) -> Work:
    return Work("advantage", 8 * steps, 4 * steps, 2 * steps)


def reverse_linear_scan_backward(steps: int) -> Work:
    return Work("advantage", 12 * steps, 8 * steps, 3 * steps)


def vtrace(steps: int) -> Work:
    """With a mask: rewards, values and log-ratios in, targets and advantages out."""
    return Work("off_policy", 13 * steps, 8 * steps, 15 * steps)


def retrace(steps: int) -> Work:
    return Work("off_policy", 17 * steps, 4 * steps, 15 * steps)


def n_step_returns(steps: int) -> Work:
    return Work("n_step", 8 * steps, 4 * steps, 2 * steps)


def moments(elements: int) -> Work:
    return Work("whiten", 5 * elements, 0, 12 * elements)


def scaled(elements: int) -> Work:
    """Elements and mask, by moments that are known."""
    return Work("whiten", 5 * elements, 4 * elements, 2 * elements)


def whiten(elements: int) -> Work:
    """The moments must be known before the first element is written: two reads."""
    return Work("whiten", 10 * elements, 4 * elements, 14 * elements)


def whiten_backward(elements: int) -> Work:
    return Work("whiten", 18 * elements, 4 * elements, 20 * elements)


def group_advantages(rewards: int) -> Work:
    return Work("group_advantages", 12 * rewards, 4 * rewards, 6 * rewards)


# Losses over tokens.


def policy_loss(tokens: int, size: int = 4, streams: int = 3, mask: int = 1) -> Work:
    """streams: log-probs, old ones and advantages of every token; ref, entropy, importance are one more each."""
    return Work("policy_loss", (streams * size + mask) * tokens, 4 * tokens, 80 * tokens)


def value_loss(tokens: int) -> Work:
    """Values, old values, returns and mask; the gradient."""
    return Work("policy_loss", 13 * tokens, 4 * tokens, 12 * tokens)


def token_weights(tokens: int) -> Work:
    return Work("policy_loss_layout", tokens, 0)


def row_states(tokens: int, streams: int = 4) -> Work:
    """What rows say to their tokens; streams: log-probs, old ones, advantages and importance weights of tokens."""
    return Work("sequence_objectives", (4 * streams + 1) * tokens, 0, 30 * tokens)


def selection(tokens: int, key: int = 4) -> Work:
    """Log-probs, advantages and mask, once for the means and once for the keys."""
    return Work("selection", 18 * tokens, key * tokens, 6 * tokens)


def importance_weights(tokens: int) -> Work:
    return Work("importance_weights", 9 * tokens, 4 * tokens, 30 * tokens)


def kl_rewards(tokens: int) -> Work:
    return Work("kl_rewards", 13 * tokens, 4 * tokens, 20 * tokens)


def q_loss(tokens: int, heads: int = 1) -> Work:
    """Prediction and gradient of every head, one target and mask."""
    return Work("q_loss", (4 * heads + 5) * tokens, 4 * heads * tokens, 20 * heads * tokens)


def polyak_update(numbers: int) -> Work:
    return Work("target_network", 8 * numbers, 4 * numbers, 3 * numbers)


# Attribution.


def attribution_scores(shape: tuple[int, ...], size: int) -> Work:
    return Work("attribution", 2 * prod(shape) * size, 4 * prod(shape[:-1]), 2 * prod(shape))


def segment_sum(scores: int, segments: int) -> Work:
    return Work("attribution", 4 * scores + 8 * segments, 4 * segments, scores)


def accumulate_by_id(scores: int, ids: int = 0) -> Work:
    """Scores and ids, and count, mean and M2 of every id that is met, read and written."""
    return Work("moments", 12 * scores + 24 * ids, 24 * ids, 8 * scores)


def _time(seconds: float) -> str:
    unit, scale = next((u, s) for u, s in (("us", 1e-6), ("ns", 1e-9), ("ps", 1e-12)) if seconds >= s)
    number = seconds / scale
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def _of_h100(work: Work) -> str:
    return f"{_time(work.bytes / 3e12)} of 3 TB/s"


_RATE = 800e12
_ROW = 131072
_FOLD = fold(1, 4096, 4, 2)

# What a kernel file's note says of one step, token, row or score, word for word.
NOTES: dict[str, tuple[str, ...]] = {
    "advantage": (
        f"{gae(1, mask=True).bytes:g} bytes ({_time(gae(1000, mask=True).bytes / 3e12)} a thousand steps",
        f"scan: {reverse_linear_scan(1).bytes:g} bytes forward, "
        f"{reverse_linear_scan_backward(1).bytes:g} backward",
    ),
    "advantage_chunks": (f"{gae_in_chunks(1).bytes:g} bytes where the walk moves {gae(1).bytes:g}",),
    "attribution": (
        f"4096 bf16 is {attribution_scores((4096,), 2).read / 2**10:g} KiB",
        _of_h100(Work("", attribution_scores((4096,), 2).read, 0)),
    ),
    "group_advantages": (
        f"{group_advantages(1).read:g} bytes read and {group_advantages(1).written:g} written",
    ),
    "importance_weights": (f"float32: {importance_weights(1).bytes:g} bytes",),
    "kl_rewards": (f"float32: {kl_rewards(1).bytes:g} bytes",),
    "linear_logprob": (
        f"{_of_h100(_FOLD)} for float32 in and bfloat16 out",
        f"{_time(_FOLD.flops / _RATE)} of 800 TFLOP/s at D = 4096",
    ),
    "logprob": (
        f"131072 bf16 is {token_logprobs(1, _ROW, 2).bytes / 2**10:g} KiB",
        _of_h100(token_logprobs(1, _ROW, 2)),
    ),
    "logprob_backward": (f"131072 bf16: {_of_h100(token_logprobs_backward(1, _ROW, 2))}",),
    "moments": (f"{accumulate_by_id(1).bytes:g} bytes a score and {accumulate_by_id(0, 1).bytes:g} an id",),
    "n_step": (f"at least {n_step_returns(1).bytes:g} bytes",),
    "off_policy": (
        f"V-trace reads {vtrace(1).read:g} bytes and writes {vtrace(1).written:g} "
        f"({_time(vtrace(1000).bytes / 3e12)} a thousand steps",
        f"Retrace reads {retrace(1).read:g} and writes {retrace(1).written:g}",
    ),
    "policy_loss": (f"float32: {policy_loss(1).bytes:g} bytes, {policy_loss(1000).bytes / 3e3:.1f} ns",),
    "policy_loss_layout": (f"{token_weights(1).bytes:g} byte a token",),
    "q_learning": (f"131072 of bf16: {_of_h100(values(1, _ROW, 2))}",),
    "q_loss": (
        f"{q_loss(1).bytes:g} bytes",
        f"{q_loss(1, 2).bytes - q_loss(1).bytes:g} more for a second head",
    ),
    "selection": (f"{selection(1).read:g} bytes a token",),
    "sequence_objectives": (f"{row_states(1).bytes:g} bytes a token",),
    "whiten": (
        f"{_time(moments(10**6).bytes / 3e12)}, {_time(scaled(10**6).bytes / 3e12)} and "
        f"{_of_h100(whiten_backward(10**6))}",
    ),
}
