"""Episodes that are played again with other actions: the reward calls of interventions and step values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..envs import TextEnv
from .rollout import RolloutEngine, SamplingParams, answered, opening


@dataclass
class Replay:
    """An episode to play with given actions.

    Attributes:
        record, seed: of the environment's reset; with the seed of the rollout its randomness comes again.
        turns: tokens of each turn's action.
        open: whether the policy goes on with the last of them; else it acts only where the given ones run out.
        number: names the stream of random numbers that the policy draws from, each token of a turn by its place
            in the turn: episodes of one number differ where their actions lead apart, not by chance.
    """

    record: int
    seed: int
    turns: list[list[int]]
    open: bool = False
    number: int = 0


@dataclass
class Count:
    """What replays cost."""

    environment_steps: int = 0
    tokens: int = 0

    def add(self, other: "Count") -> None:
        self.environment_steps += other.environment_steps
        self.tokens += other.tokens


def replay(
    engine: RolloutEngine,
    tokenizer: Any,
    env: TextEnv,
    wanted: Sequence[Replay],
    params: SamplingParams,
    count: Count,
) -> list[float]:
    """Return of every episode, the sum of its rewards; `count` is added to.

    Raises: ValueError if the environment's transition rewrites the text so far.
    """
    envs = [env.clone() for _ in wanted]
    states = [e.reset(seed=r.seed, options={"index": r.record})[0] for e, r in zip(envs, wanted, strict=True)]
    texts = [opening(tokenizer, s, env.records[r.record]) for s, r in zip(states, wanted, strict=True)]
    returns = [0.0] * len(wanted)
    running, turn = list(range(len(wanted))), 0
    while running:
        actions = _actions(engine, tokenizer, [(texts[i], wanted[i]) for i in running], turn, params, count)
        decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in actions]
        steps = TextEnv.step_many([envs[i] for i in running], decoded, actions)
        still = []
        for i, ids, action, step in zip(running, actions, decoded, steps, strict=True):
            before = states[i] + action
            states[i], reward, terminated, truncated, _ = step
            count.environment_steps += 1
            returns[i] += float(reward)
            if not (terminated or truncated):
                texts[i] += ids + answered(tokenizer, states[i], before)
                still.append(i)
        running, turn = still, turn + 1
    return returns


def _actions(
    engine: RolloutEngine,
    tokenizer: Any,
    rows: Sequence[tuple[list[int], Replay]],
    turn: int,
    params: SamplingParams,
    count: Count,
) -> list[list[int]]:
    """Every row's action of a turn: given, begun and continued by the policy, or all the policy's. The engine is
    asked for what is left of max_new_tokens, once for all rows of which as much is left."""
    actions = [list(row.turns[turn]) if turn < len(row.turns) else [] for _, row in rows]
    free = [
        i
        for i, (_, row) in enumerate(rows)
        if (turn >= len(row.turns) or (row.open and turn == len(row.turns) - 1))
        and len(actions[i]) < params.max_new_tokens
        and actions[i][-1:] != [tokenizer.eos_token_id]
    ]
    for left in sorted({params.max_new_tokens - len(actions[i]) for i in free}):
        some = [i for i in free if params.max_new_tokens - len(actions[i]) == left]
        numbers = [rows[i][1].number for i in some]
        own = replace(
            params, max_new_tokens=left, turn=turn, rows=numbers, skip=[len(actions[i]) for i in some]
        )
        samples = engine.generate([rows[i][0] + actions[i] for i in some], own)
        for i, sample in zip(some, samples, strict=True):
            actions[i] += sample.ids
            count.tokens += len(sample.ids)
    return actions
