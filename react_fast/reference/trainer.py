"""The trainer as a loop over sequences: rollouts without a cache, logits materialised, plain autograd.

`collect -> score -> credit -> update`, with the random numbers, losses and updates of `react_fast.Trainer`. It
reads the fields of the same algorithm and configuration objects and nothing else of them.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .algorithms import RULES
from .credit import CREDITS, add_effects, philox_key
from .logprob import token_logprobs
from .rollout import Trajectory, draw, importance, step_rewards

_ORDER, _DROPOUT, _ENVIRONMENT = 1, 2, 4
# Metrics that are summed over sequences and updates; the others are means over tokens, "/max" the largest.
_TOTALS = ("loss", "tokens", "clamped")


@dataclass
class Now:
    """What the policy says of one sequence of L tokens, [L - 1] each; values are a critic's."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None = None


@dataclass
class Scored:
    """A trajectory and what the update needs about its L tokens; entry t - 1 of a tensor belongs to token t."""

    ids: torch.Tensor  # [L]
    mask: torch.Tensor  # [L - 1] bool: token t is an action
    reward: float
    step_rewards: torch.Tensor  # [L - 1]: each turn's reward at its last action
    group: int
    sampler_logprobs: torch.Tensor  # [L - 1]
    logit_floor: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    attribution: torch.Tensor | None = None
    effects: torch.Tensor | None = None
    step_advantages: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    values: torch.Tensor | None = None
    last_value: float = 0.0  # of the state behind the last token, if the episode was truncated
    returns: torch.Tensor | None = None
    importance: torch.Tensor | None = None

    @property
    def preference(self) -> float:
        """Above 0 for the better one of a pair, 0 where neither is."""
        assert self.advantages is not None
        return float(self.advantages.sum())


class Trainer:
    """See `react_fast.Trainer`; no checkpoints, no evaluation, no early stopping.

    Args:
        model: maps ids [1, T] to logits [1, T, V], as a tensor or as the attribute `logits`.
        tokenizer, env, algorithm, config: as `react_fast.Trainer`'s.
        tracker: `react_fast.reference.Tracker` or None.
    """

    def __init__(
        self, model: Any, tokenizer: Any, env: Any, *, algorithm: Any, tracker: Any = None, config: Any
    ) -> None:
        self.model, self.tokenizer, self.env = model, tokenizer, env
        self.algorithm, self.tracker, self.config = algorithm, tracker, config
        self.rule = RULES[type(algorithm).__name__]
        self.value = self._value_head() if self.rule.critic else None
        trained = [p for p in self._parameters() if p.requires_grad]
        make = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[
            config.optimizer
        ]
        self.optimizer = make(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        frozen = self.rule.compares or (config.kl_coef and not algorithm.supervised)
        self.reference = copy.deepcopy(model).eval().requires_grad_(False) if frozen else None
        self.replays: Any = None
        if config.credit in CREDITS and not algorithm.supervised:
            self.replays = CREDITS[config.credit](self)
        self.step = 0
        self.updates = 0
        self.environment_steps = 0

    def train(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        while self.step < self.config.steps:
            metrics = self.train_step(self.collect())
        return metrics

    def train_step(self, trajectories: Sequence[Any]) -> dict[str, float]:
        """score, credit and update on one step's trajectories (`collect()`, or another trainer's)."""
        metrics = self.update(self.credit(self.score(self.rule.select(trajectories))))
        self.step += 1
        if not self.algorithm.supervised:
            metrics["environment_steps"] = self.environment_steps
            metrics["reward"] = sum(sum(t.rewards) for t in trajectories) / len(trajectories)
        return metrics

    # ---- collect -------------------------------------------------------------------------------------------

    def collect(self) -> list[Trajectory]:
        if self.algorithm.supervised:
            return [one for record in self._records() for one in self._demonstrations(record)]
        size = self.config.group_size
        records = [record for record in self._records() for _ in range(size)]
        return [self._episode(record, row, row // size) for row, record in enumerate(records)]

    def _records(self) -> list[int]:
        """The step's records: position after position in an endless row of permutations."""
        count, size = len(self.env.records), self.config.prompts_per_step
        chosen = []
        for position in range(self.step * size, (self.step + 1) * size):
            order = np.random.Generator(np.random.Philox(philox_key(self.config.seed, position // count)))
            chosen.append(int(order.permutation(count)[position % count]))
        return chosen

    def _demonstrations(self, record: int) -> list[Trajectory]:
        prompt, found = self.opening(self.env.records[record].prompt, record), []
        for text, reward in self.rule.answers(self.env.records[record]):
            answer = self.encode(text, False)
            if self.tokenizer.eos_token_id is not None:
                answer = [*answer, self.tokenizer.eos_token_id]
            learnt = 1 if getattr(self.algorithm, "learns", "reference") == "all" else len(prompt)
            actions = [t >= learnt for t in range(len(prompt + answer))]
            nothing = [0] * len(actions)
            found.append(
                Trajectory(prompt + answer, actions, nothing, [reward], record, sampler_logprobs=nothing)
            )
        return found

    def _episode(self, record: int, row: int, group: int) -> Trajectory:
        env = self.env.clone()
        seed = philox_key(self.config.seed, _ENVIRONMENT, self.step, row)
        state, _ = env.reset(seed=seed, options={"index": record})
        ids = self.opening(state, record)
        episode = Trajectory([], [], [], [], group, record, seed, logit_floor=[])
        episode.extend([(i, 0.0, -math.inf) for i in ids], False, 0)
        over, turn = False, 0
        while not over:
            chosen = self.sample(episode.token_ids, row, turn)
            episode.extend(chosen, True, turn)
            action = self.tokenizer.decode([i for i, _, _ in chosen], skip_special_tokens=True)
            before = state
            state, reward, terminated, truncated, _ = env.step(action)
            episode.rewards.append(float(reward))
            over, turn = terminated or truncated, turn + 1
            episode.truncated = truncated and not terminated
            answer = state[len(before) + len(action) :]
            if not over and answer:
                episode.extend([(i, 0.0, -math.inf) for i in self.encode(answer, False)], False, turn)
        return episode

    def act(
        self, prompt: list[int], row: int, turn: int, seed: int | None = None, skip: int = 0
    ) -> list[int]:
        """Tokens of one action; see `sample`."""
        return [i for i, _, _ in self.sample(prompt, row, turn, seed, skip)]

    def draws(self, row: int, turn: int, seed: int, skip: int) -> np.ndarray:
        """[max_new_tokens] of the stream keyed (seed, step) and (turn, row), from its place `skip` on."""
        key = np.array([seed, self.step], dtype=np.uint64)
        counter = np.array([0, 0, turn, row], dtype=np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return stream.random(skip + self.config.max_new_tokens)[skip:]

    @torch.no_grad()
    def sample(
        self, prompt: list[int], row: int, turn: int, seed: int | None = None, skip: int = 0
    ) -> list[tuple[int, float, float]]:
        """Sample one action by inverse transform from `draws`: tokens with their log-probabilities and logit
        floors."""
        draws = self.draws(row, turn, self.config.seed if seed is None else seed, skip)
        self.model.eval()
        chosen: list[tuple[int, float, float]] = []
        for u in draws:
            logits = self.logits(torch.tensor(prompt + [i for i, _, _ in chosen]))[-1]
            chosen.append(draw(logits, u, self.config))
            if chosen[-1][0] == self.tokenizer.eos_token_id:
                break
        return chosen

    def opening(self, state: str, record: int) -> list[int]:
        """Tokens of an episode's first state; a chat template has written the special ones."""
        return self.encode(state, self.env.records[record].conversation is None)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    # ---- score ---------------------------------------------------------------------------------------------

    def score(self, trajectories: Sequence[Any]) -> list[Scored]:
        batch = []
        for trajectory in trajectories:
            ids = torch.as_tensor(trajectory.token_ids)
            mask = torch.as_tensor(trajectory.action_mask)[1:]
            rewards = step_rewards(trajectory)[1:].to(self._dtype)
            sampler = torch.as_tensor(trajectory.sampler_logprobs)[1:]
            one = Scored(ids, mask, float(sum(trajectory.rewards)), rewards, trajectory.group, sampler)
            if trajectory.logit_floor is not None:
                one.logit_floor = torch.as_tensor(trajectory.logit_floor)[1:]
            if self._keeps_old:
                before = self._frozen(self.model, one)
                one.old_logprobs, one.values = before.logprobs, before.values
            if self.reference is not None:
                one.ref_logprobs = self._frozen(self.reference, one).logprobs
            if self.value is not None and trajectory.truncated:
                one.last_value = float(self._values(ids)[-1].detach())
            if self.config.credit == "attribution" and not self.algorithm.supervised:
                one.attribution = self.tracker.score(ids, torch.as_tensor(trajectory.action_mask))[1:]
            batch.append(one)
        self.rule.score(self, batch)
        if self.replays is not None:
            self.environment_steps += self.replays.score(trajectories, batch)
        self.environment_steps += sum(len(t.rewards) for t in trajectories)
        return batch

    @property
    def _keeps_old(self) -> bool:
        """Whether the policy as it was before the update is asked for."""
        if self.algorithm.supervised:
            return False
        several = self.config.minibatches * self.config.epochs > 1
        in_reward = self.reference is not None and getattr(self.algorithm, "kl_in_reward", False)
        return several or in_reward or self.rule.critic

    def logprobs(self, one: Scored) -> torch.Tensor:
        """[L - 1]: of the actions under the policy as it is."""
        return self._frozen(self.model, one).logprobs

    @torch.no_grad()
    def _frozen(self, model: Any, one: Scored) -> Now:
        model.eval()
        return self._now(model, one)

    def _now(self, model: Any, one: Scored) -> Now:
        """log p of every action, the entropy there, and what its state is worth."""
        temperature = 1.0 if self.algorithm.supervised else self.config.temperature
        logits = self.logits(one.ids, model)[:-1]
        logp, entropy = token_logprobs(
            logits,
            one.ids[1:],
            mask=one.mask,
            temperature=temperature,
            return_entropy=True,
            # The policy is scored over what the sampler kept of it, the reference over all tokens.
            logit_floor=None if model is self.reference else one.logit_floor,
        )
        worth = self._values(one.ids)[:-1] if self.value is not None and model is self.model else None
        return Now(logp, entropy, worth)

    def _values(self, ids: torch.Tensor) -> torch.Tensor:
        """[L]: value of the state behind every token."""
        assert self.value is not None
        hidden = self.model(ids[None], output_hidden_states=True).hidden_states[-1]
        return self.value(hidden[0])[:, 0]

    def _value_head(self) -> torch.nn.Linear:
        weight = self.model.get_output_embeddings().weight
        head = torch.nn.Linear(weight.shape[1], 1, dtype=weight.dtype)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        return head

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.model.parameters(), *(self.value.parameters() if self.value is not None else ())]

    @property
    def _dtype(self) -> torch.dtype:
        wide = next(self.model.parameters()).dtype == torch.float64
        return torch.float64 if wide else torch.float32

    def logits(self, ids: torch.Tensor, model: Any = None) -> torch.Tensor:
        out = (model or self.model)(ids[None])
        return getattr(out, "logits", out)[0]

    # ---- credit --------------------------------------------------------------------------------------------

    def credit(self, batch: list[Scored]) -> list[Scored]:
        for one, advantages in zip(batch, self.rule.advantages(self, batch), strict=True):
            advantages = torch.as_tensor(advantages).expand(one.mask.shape)
            if one.attribution is not None:
                advantages = self._spread(one, advantages, one.attribution.abs())
            if one.step_advantages is not None:
                advantages = one.step_advantages
            one.advantages = torch.where(one.mask, advantages, 0.0)
        if any(one.effects is not None for one in batch):
            add_effects(batch, self.config.credit_floor)
        return batch

    def _spread(self, one: Scored, advantages: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """A_t w_t with w_t = floor + (1 - floor) size_t sum A / sum A size, the sums over the actions with the
        sign of A_t; w_t = 1 where none of them has a size."""
        floor, spread = self.config.credit_floor, advantages.clone()
        for sign in (1, -1):
            part = [t for t in range(len(size)) if one.mask[t] and sign * advantages[t] > 0]
            whole = sum(float(advantages[t]) for t in part)
            sized = sum(float(advantages[t]) * float(size[t]) for t in part)
            for t in part if sized else ():
                spread[t] *= floor + (1 - floor) * float(size[t]) * whole / sized
        return spread

    # ---- update --------------------------------------------------------------------------------------------

    def update(self, batch: list[Scored]) -> dict[str, float]:
        self.model.train(self.algorithm.supervised)
        sums: dict[str, float] = {}
        weight = 0
        for rows in self._minibatches(len(batch)):
            weight += self._update_once([batch[row] for row in rows], sums)
        count = self.config.minibatches * self.config.epochs
        parts = dict.fromkeys(("grad_norm", "learning_rate"), count) | dict.fromkeys(_TOTALS, 1)
        return {
            name: total if name.endswith("/max") else total / parts.get(name, max(weight, 1))
            for name, total in sums.items()
        }

    def _update_once(self, batch: list[Scored], sums: dict[str, float]) -> int:
        denominator, together = max(self.rule.denominator(self, batch), 1), self.rule.together
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(philox_key(self.config.seed, _DROPOUT, self.updates))
        for start in range(0, len(batch), together):
            part = batch[start : start + together]
            with self._observed(part):
                now = [self._now(self.model, one) for one in part]
                for one, seen in zip(part, now, strict=True):
                    self._weigh(one, seen.logprobs)
                loss, metrics = self.rule.loss(self, part, now, denominator)
                loss.backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                if name.endswith("/max"):
                    sums[name] = max(float(value), sums.get(name, -math.inf))
                else:
                    weight = 1 if name in _TOTALS else self.rule.weight(part)
                    sums[name] = sums.get(name, 0.0) + float(value) * weight
        limit = self.config.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters(), math.inf if limit is None else limit))
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        sums["learning_rate"] = sums.get("learning_rate", 0.0) + self._learning_rate()
        sums["grad_norm"] = sums.get("grad_norm", 0.0) + norm
        if math.isfinite(norm):
            self.optimizer.step()
        self.updates += 1
        return self.rule.weight(batch)

    def _observed(self, part: list[Scored]) -> Any:
        if self.tracker is None:
            return nullcontext()
        (one,) = part
        return self.tracker.observe(one.ids, torch.nn.functional.pad(one.mask, (1, 0)), step=self.step)

    def _weigh(self, one: Scored, logprobs: torch.Tensor) -> None:
        """What the sampler's tokens weigh under the policy as it was before the update."""
        if not self.algorithm.supervised:
            before = logprobs.detach() if one.old_logprobs is None else one.old_logprobs
            one.importance = importance(self.config, before, one.sampler_logprobs, one.mask)

    def _learning_rate(self) -> float:
        config = self.config
        if self.updates < config.lr_warmup_steps:
            return config.learning_rate * (self.updates + 1) / config.lr_warmup_steps
        total = config.steps * config.minibatches * config.epochs
        done = min((self.updates - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps), 1.0)
        shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return config.learning_rate * shapes[config.lr_schedule]

    def _minibatches(self, count: int) -> Iterator[list[int]]:
        for epoch in range(self.config.epochs):
            together = self.rule.together
            order = np.arange(count // together)
            if self.config.minibatches * self.config.epochs > 1:
                key = philox_key(self.config.seed, _ORDER, self.step, epoch)
                order = np.random.Generator(np.random.Philox(key)).permutation(len(order))
            size = -(-len(order) // self.config.minibatches)
            for start in range(0, len(order), size):
                units = order[start : start + size].tolist()
                yield [unit * together + i for unit in units for i in range(together)]
