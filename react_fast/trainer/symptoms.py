"""What a run's metrics say about it: a table of symptoms, each with its likely cause and what to change."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

History = Sequence[Mapping[str, float]]

# Steps over which a symptom is judged: single steps of few prompts are noise.
STEPS = 5
# Evaluations in a row that must get worse: by chance one in 24 quadruples falls.
EVALUATIONS = 4
# What symptoms are judged by; nothing else of a step is remembered.
WATCHED = (
    "clip_ratio/high", "clip_ratio/low", "completions/clipped_ratio", "entropy", "episodes/truncated_ratio",
    "eval/loss", "eval/reward", "frac_reward_zero_std", "grad_norm", "kl", "loss", "reward", "reward_std",
    "sampling/clipped_ratio", "skipped_updates",
)  # fmt: skip
# Steps remembered; what is compared with the start is compared with that of these.
REMEMBERED = 1000


@dataclass(frozen=True)
class Symptom:
    """A warning that is given when its level rises above `limit`, and again only after it was at most `rest`.

    Attributes:
        level: of a history under a TrainerConfig; None: not known yet, or it does not apply.
        text: cause and remedy; {level} and {config} are put in.
    """

    name: str
    level: Callable[[History, Any], float | None]
    limit: float
    rest: float
    text: str


class Watch:
    """Looks at the metrics of every step of a training.

    Args:
        config: TrainerConfig.
        symptoms: what to look for.
    """

    def __init__(self, config: Any, symptoms: Sequence[Symptom] | None = None) -> None:
        self.config, self.symptoms = config, SYMPTOMS if symptoms is None else symptoms
        self._history: deque[Mapping[str, float]] = deque(maxlen=REMEMBERED)
        self._given: set[str] = set()

    def see(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Take note of a step. Returns: the warnings that it gives rise to, by name."""
        self._history.append({name: float(metrics[name]) for name in WATCHED if name in metrics})
        found, history = {}, list(self._history)
        for symptom in self.symptoms:
            level = symptom.level(history, self.config)
            if level is None:
                continue
            if level > symptom.limit and symptom.name not in self._given:
                self._given.add(symptom.name)
                found[symptom.name] = symptom.text.format(level=level, config=self.config, steps=STEPS)
            elif level <= symptom.rest:
                self._given.discard(symptom.name)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The steps remembered, as numbers [steps, WATCHED] and which of them there are; the warnings given."""
        values = [[metrics.get(name, 0.0) for name in WATCHED] for metrics in self._history]
        known = [[name in metrics for name in WATCHED] for metrics in self._history]
        return {
            "names": list(WATCHED),
            "values": torch.tensor(values, dtype=torch.float64).reshape(-1, len(WATCHED)),
            "known": torch.tensor(known, dtype=torch.bool).reshape(-1, len(WATCHED)),
            "given": sorted(self._given),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the watch whose state it is; an empty one has seen nothing."""
        self._history.clear()
        self._given = set(state.get("given", ()))
        if "values" not in state:
            return
        for values, known in zip(state["values"].tolist(), state["known"].tolist(), strict=True):
            step = zip(state["names"], values, known, strict=True)
            self._history.append({name: value for name, value, there in step if there})


def _values(history: History, name: str) -> list[float]:
    return [float(metrics[name]) for metrics in history if name in metrics]


def _mean(*names: str) -> Callable[[History, Any], float | None]:
    """Of the sum of some metrics over the last steps."""

    def level(history: History, config: Any) -> float | None:
        found = [_values(history[-STEPS:], name) for name in names]
        if len(history) < STEPS or any(len(values) < STEPS for values in found):
            return None
        return sum(map(sum, found)) / STEPS

    return level


def _constant(history: History, config: Any) -> float | None:
    rewards = _values(history[-STEPS:], "reward")
    spreads = _values(history[-STEPS:], "reward_std")
    if min(len(rewards), len(spreads)) < STEPS:
        return None
    return float(max(spreads) == 0 and max(rewards) == min(rewards))


def _equal_groups(history: History, config: Any) -> float | None:
    """Where groups are compared, and not everything is the same anyway."""
    if config.group_size == 1 or _constant(history, config):
        return None
    return _mean("frac_reward_zero_std")(history, config)


def _entropy_fall(history: History, config: Any) -> float | None:
    """The first steps' entropy over the last steps', in reinforcement learning."""
    entropies = _values([metrics for metrics in history if "reward" in metrics], "entropy")
    if len(entropies) < 2 * STEPS:
        return None
    now = sum(entropies[-STEPS:]) / STEPS
    return sum(entropies[:STEPS]) / STEPS / max(now, 1e-12)


def _not_finite(history: History, config: Any) -> float | None:
    """Steps among the last with an update that was skipped."""
    recent = history[-STEPS:]
    skipped = [metrics.get("skipped_updates", 0.0) for metrics in recent]
    norms = [not math.isfinite(metrics.get("grad_norm", 0.0)) for metrics in recent]
    return float(sum(bool(s) or n for s, n in zip(skipped, norms, strict=True)))


def _parting(trained: str, held_out: str, sign: int) -> Callable[[History, Any], float | None]:
    """1 where the held-out metric got worse with every evaluation while the trained one got better; `sign` is that
    of getting better."""

    def level(history: History, config: Any) -> float | None:
        at = [i for i, metrics in enumerate(history) if held_out in metrics][-EVALUATIONS:]
        if len(at) < EVALUATIONS:
            return None
        evaluations = [sign * history[i][held_out] for i in at]
        falling = all(later < before for before, later in pairwise(evaluations))
        between = _values(history[at[0] :], trained)
        half = len(between) // 2
        if not half:
            return None
        gain = sign * (sum(between[-half:]) - sum(between[:half])) / half
        return float(falling and gain > 0)

    return level


_OVERFITTING = (
    " over the last evaluations: it over-fits. Set trainer.early_stopping, raise weight_decay, kl_coef or"
    " dropout,"
    " augment the prompts (env.augment) or take more of them"
)

SYMPTOMS: tuple[Symptom, ...] = (
    Symptom(
        "constant_reward", _constant, 0.5, 0.0,
        "every reward of the last {steps} steps was the same, so nothing is learned: the reward does not"
        " tell the"
        " answers apart. Look at samples.jsonl, try the reward (env.reward) on a right and a wrong answer,"
        " and if"
        " all are wrong begin with warm_start.steps or easier prompts",
    ),
    Symptom(
        "equal_rewards", _equal_groups, 0.8, 0.6,
        "in {level:.0%} of the groups all responses got the same reward, which gives no gradient: the"
        " prompts are too"
        " easy or too hard, or the reward is too coarse. Raise trainer.group_size or trainer.temperature,"
        " choose"
        " other prompts, warm-start longer, or grade the reward",
    ),
    Symptom(
        "entropy_collapse", _entropy_fall, 10.0, 5.0,
        "the entropy fell to 1/{level:.0f} of what it was: the policy hardly explores any more. If the reward"
        " stopped rising, raise trainer.entropy_coef or kl_coef, lower trainer.learning_rate, or clip higher"
        " (algorithm dapo)",
    ),
    Symptom(
        "kl_blow_up", _mean("kl"), 1.0, 0.5,
        "the KL divergence to the starting policy is {level:.2g} nats per token: the policy has left it"
        " behind,"
        " perhaps to exploit the reward. Raise trainer.kl_coef, lower trainer.learning_rate, or check"
        " high-reward"
        " samples",
    ),
    Symptom(
        "clipped_completions", _mean("completions/clipped_ratio"), 0.5, 0.4,
        "{level:.0%} of the completions were cut at trainer.max_new_tokens = {config.max_new_tokens} before"
        " their end"
        " token, and are rewarded as cut. Raise it; if the answers ramble, warm-start on references, which"
        " end, or"
        " reward brevity",
    ),
    Symptom(
        "truncated_episodes", _mean("episodes/truncated_ratio"), 0.5, 0.4,
        "{level:.0%} of the episodes were truncated by the environment before they were over. Raise"
        " env.max_turns, or"
        " let the reward favour finishing sooner",
    ),
    Symptom(
        "gradient_not_finite", _not_finite, 0.0, 0.0,
        "the gradient norm is not finite, so an update was skipped: log-probabilities or rewards are"
        " infinite, or the"
        " weights diverge. Lower trainer.learning_rate, set trainer.max_grad_norm, check that rewards are"
        " finite, or"
        " use trainer.precision float32",
    ),
    Symptom(
        "clipped_ratios", _mean("clip_ratio/low", "clip_ratio/high"), 0.3, 0.2,
        "the probability ratio of {level:.0%} of the tokens was clipped: a batch's updates lead too far from"
        " the"
        " policy that sampled it. Lower trainer.learning_rate, trainer.epochs or trainer.minibatches",
    ),
    Symptom(
        "sampler_mismatch", _mean("sampling/clipped_ratio"), 0.1, 0.05,
        "the importance weight of {level:.0%} of the tokens was out of bounds: the rollout engine samples"
        " from another"
        " distribution than the trainer scores. Check its weights are synchronised (rollout.sync_dir), its"
        " precision"
        " and rollout.server_logprobs",
    ),
    Symptom(
        "overfitting", _parting("reward", "eval/reward", 1), 0.5, 0.0,
        "the held-out reward falls while the training reward rises" + _OVERFITTING,
    ),
    Symptom(
        "overfitting_loss", _parting("loss", "eval/loss", -1), 0.5, 0.0,
        "the held-out loss rises while the training loss falls" + _OVERFITTING,
    ),
)  # fmt: skip
