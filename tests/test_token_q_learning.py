"""Q-learning on tokens: targets by hand, exploration, memory, and values that travel over several tokens."""

from typing import Any

import pytest
import torch

from react_fast.envs import Record, TextEnv
from react_fast.trainer.algorithms import ILQL, SoftQ, TokenDQN
from react_fast.trainer.algorithms.q_policies import epsilon_greedy
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.trainer import Trainer

from .test_algorithms import LETTERS, Letters, _model
from .training import weights


def _pair(state: str, action: str, record: Record) -> float:
    """Half for every right letter, paid at the end."""
    return sum(a == b for a, b in zip(action, record.reference or "", strict=True)) / 2


def _env(**options: Any) -> TextEnv:
    return TextEnv([Record(a, "bd") for a in LETTERS[8:12]], reward=_pair, **options)


def _trainer(algorithm: Any, env: TextEnv | None = None, **changes: Any) -> Trainer:
    few = {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 2, "learning_rate": 1e-2, "steps": 60}
    config = TrainerConfig(**{**few, "max_grad_norm": None, "threads": 1, **changes})
    env = env or _env()
    return Trainer(_model(), Letters(), env, algorithm=algorithm, config=config, eval_env=env)


def _logits(policy: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(ids[None]).logits[0]


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("algorithm", [TokenDQN(gamma=0.9), SoftQ(gamma=0.9)], ids=["double", "soft"])
def test_targets_are_those_of_the_equation(algorithm, truncated):
    trainer = _trainer(algorithm, temperature=0.5)
    trajectories = trainer.collect()
    with torch.no_grad():
        for parameter in trainer.policy.parameters():  # away from the target network
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for i, one in enumerate(trajectories):
        one.truncated, one.rewards = truncated, [i / 8]
    found = trainer.score(trajectories).returns
    for row, one in enumerate(trajectories):
        online, target = (_logits(p, one.token_ids) for p in (trainer.policy, trainer.memory.target))
        if isinstance(algorithm, SoftQ):
            values = 0.5 * torch.logsumexp(target / 0.5, -1)
        else:
            values = target.gather(1, online.argmax(1, keepdim=True)).squeeze(1)
        behind = 0.9 * float(values[2]) if truncated else 0.0
        expected = torch.tensor([0.9 * float(values[1]), one.rewards[0] + behind])
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", [TokenDQN(), SoftQ()], ids=["double", "soft"])
def test_two_tokens_that_are_paid_at_the_end_are_found(algorithm):
    trainer = _trainer(algorithm, steps=150, epochs=2, temperature=0.1)
    assert trainer.evaluate()["eval/reward"] < 0.6
    while trainer.step < trainer.config.steps and trainer.evaluate()["eval/reward"] < 1.0:
        for _ in range(5):
            trainer.train_step()
    assert trainer.evaluate()["eval/reward"] == 1.0


def test_exploration_is_epsilon_greedy_at_any_temperature():
    q = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    p = epsilon_greedy(q, 0.2).exp()
    torch.testing.assert_close(p, torch.tensor([[0.05, 0.85, 0.05, 0.05]]))
    trainer = _trainer(TokenDQN(epsilon=0.4), temperature=0.3, group_size=64)
    found = torch.stack([one.sampler_logprobs[1:] for one in trainer.collect()]).exp()
    ways = torch.tensor([0.4 / 16, 0.6 + 0.4 / 16])  # another token, the best one
    assert float((found[..., None] - ways).abs().min(-1).values.max()) < 1e-5
    greedy = float((found > 0.5).double().mean())
    assert abs(greedy - 0.625) < 0.1  # 512 draws: five standard errors


def test_memory_keeps_the_newest_and_resumes_to_the_bit(tmp_path):
    options = {"steps": 6, "save_every": 3, "keep_checkpoints": 5, "checkpoint_dir": str(tmp_path)}
    algorithm = TokenDQN(capacity=40, target_every=2, target_tau=1.0)
    whole = _trainer(algorithm, **options)
    whole.train()
    assert len(whole.memory.trajectories) == 40
    again = _trainer(algorithm, **options)
    again.load(tmp_path / "step-00000003")
    again.train()
    assert torch.equal(weights(again.policy), weights(whole.policy))
    assert torch.equal(weights(again.memory.target), weights(whole.memory.target))


def test_offline_values_lead_the_decoding_to_the_better_answer():
    """The cross-entropy of both answers alone cannot tell them apart."""
    records = [Record(a, None, {"answers": [b, c]}) for a, b, c in zip("abcd", "efgh", "ijkl", strict=True)]
    env = TextEnv(
        records, reward=lambda state, action, record: float(action == record.metadata["answers"][1])
    )
    found = {}
    for beta in (0.0, 8.0):
        trainer = _trainer(ILQL(beta=beta), env, max_new_tokens=1, group_size=1, steps=40)
        while trainer.step < trainer.config.steps:
            trainer.train_step()
        found[beta] = trainer.evaluate(greedy=False)["eval/reward"]
    assert found[8.0] == 1.0
    assert found[0.0] < 1.0


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        (TokenDQN(), {"credit": "causal"}, "trainer.credit must be 'uniform'"),
        (SoftQ(), {"kl_coef": 0.1}, "kl_coef and entropy_coef 0"),
        (ILQL(), {"sharded": True}, "trainer.sharded must be false for ILQL"),
    ],
)
def test_what_does_not_go_together_is_refused(algorithm, changes, message):
    with pytest.raises(ValueError, match=message):
        _trainer(algorithm, **changes)
