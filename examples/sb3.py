"""Stable-Baselines3's PPO on an environment of this package, seen token by token: two letters, backwards.

Of 16 prompts such as `ad>` the right answer is `da`; every right letter is worth 1/2, so chance earns 1/4. PPO
earns 1.0 after 2048 tokens, in seconds.

    pip install stable-baselines3
    python examples/sb3.py
"""

import itertools
from collections.abc import Sequence

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from react_fast.envs import Record, TextEnv, TokenView

LETTERS = "abcd>"


class Characters:
    """A token a character."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) for letter in text]}

    def __len__(self) -> int:
        return len(LETTERS)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(LETTERS[i] for i in ids)


def right_letters(state: str, action: str, record: Record) -> float:
    """The share of right letters."""
    return sum(a == b for a, b in zip(action, record.reference or "", strict=True)) / 2


def make_env() -> TokenView:
    words = ["".join(pair) for pair in itertools.product("abcd", repeat=2)]
    env = TextEnv([Record(f"{word}>", word[::-1]) for word in words], reward=right_letters)
    return TokenView(env, Characters(), window=4, max_tokens=2, tokens=range(4))


def train(steps: int = 2048) -> dict[str, float]:
    """Returns: mean reward of an episode of the "random" and of the "trained" policy."""
    sizes = {"n_steps": 256, "batch_size": 64, "n_epochs": 8}
    model = PPO("MlpPolicy", make_env(), learning_rate=3e-3, gamma=1.0, seed=0, device="cpu", **sizes)
    reward = {}
    for name, count in (("random", 0), ("trained", steps)):
        model.learn(count)
        env, greedy = make_env(), name == "trained"
        env.reset(seed=1)
        found, _ = evaluate_policy(model, env, n_eval_episodes=256, deterministic=greedy, warn=False)
        reward[name] = float(found)
    return reward


if __name__ == "__main__":
    for policy, found in train().items():
        print(f"{policy}: {found:.2f} of 1.00")
