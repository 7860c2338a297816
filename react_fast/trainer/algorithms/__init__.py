"""One small class per algorithm; each is read from top to bottom.

| name | advantage | loss | source |
| --- | --- | --- | --- |
| sft | none: the references | cross-entropy | |
| reinforce | return less the mean of the batch or group | -A log p | Williams 1992 |
| a2c | GAE of a value head | -A log p + value | arXiv:1602.01783 |
| ppo | GAE of a value head, KL in the reward | clipped ratio + clipped value | arXiv:1707.06347 |
| grpo | (r - mean) / std of the group | clipped ratio | arXiv:2402.03300 |
| dapo | GRPO's, groups of equal reward left out, soft length limit | clip-higher, per token | arXiv:2503.14476 |
| dr_grpo | r - mean of the group | clipped ratio, divided by a constant | arXiv:2503.20783 |
| gspo | GRPO's | clipped ratio of the whole response | arXiv:2507.18071 |
| cispo | GRPO's | bounded weight, -w A log p | arXiv:2506.13585 |
| gmpo | GRPO's | geometric mean of clipped ratios | arXiv:2507.20673 |
| sapo | GRPO's | smooth gate on the ratio | arXiv:2511.20347 |
| rloo | r - mean of the others, KL in the reward | clipped ratio, per response | arXiv:2402.14740 |
| reinforce_pp | return with token KL, whitened over the batch | clipped ratio | arXiv:2501.03262 |
| reinforce_pp_baseline | r - mean of the group, whitened over the batch | clipped ratio, k2 | arXiv:2501.03262 |
| dpo | written pairs | sigmoid, IPO or hinge of the margin | arXiv:2305.18290 |
| online_dpo | best and worst of the group | as dpo | arXiv:2402.04792 |
| dqn | none: Q is regressed on r + gamma V | Huber, double DQN | arXiv:1509.06461 |
| soft_q | likewise, V = alpha log sum exp(Q / alpha) | Huber | arXiv:1702.08165 |
| ilql | none: written answers with rewards | Q, expectile V, conservative | arXiv:2206.11871 |

A new one is a class on `Algorithm` or `PolicyGradient` with what differs, and a line in the table.
"""

from .base import Algorithm, PolicyGradient
from .dpo import DPO, OnlineDPO
from .dqn import SoftQ, TokenDQN
from .grpo import CISPO, DAPO, GMPO, GRPO, GSPO, SAPO, DrGRPO
from .ilql import ILQL
from .ppo import A2C, PPO
from .reinforce import REINFORCE
from .reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from .rloo import RLOO
from .sft import SFT

ALGORITHMS: dict[str, type[Algorithm]] = {
    "sft": SFT,
    "reinforce": REINFORCE,
    "a2c": A2C,
    "ppo": PPO,
    "grpo": GRPO,
    "dapo": DAPO,
    "dr_grpo": DrGRPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "gmpo": GMPO,
    "sapo": SAPO,
    "rloo": RLOO,
    "reinforce_pp": ReinforcePlusPlus,
    "reinforce_pp_baseline": ReinforcePlusPlusBaseline,
    "dpo": DPO,
    "online_dpo": OnlineDPO,
    "dqn": TokenDQN,
    "soft_q": SoftQ,
    "ilql": ILQL,
}

__all__ = ["ALGORITHMS", "Algorithm", "PolicyGradient", *sorted(one.__name__ for one in ALGORITHMS.values())]
