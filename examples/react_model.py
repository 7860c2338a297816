"""The seed of the framework: an embedding and a linear layer, trained by the same Trainer as any language model.

The task is a random permutation of 1000 symbols: the answer to symbol i is symbol p(i). 100 epochs of
cross-entropy with Adam at a learning rate of 1e-3.

    python examples/react_model.py
"""

import argparse
from collections.abc import Sequence

import torch

import react_fast as rf
from react_fast.envs import Record, TextEnv
from react_fast.envs.rewards import exact_match


class ReActModel(torch.nn.Module):
    """ids [B, T] -> logits [B, T, output_size]; each position sees its own token only."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(input_size, hidden_size)
        self.linear = torch.nn.Linear(hidden_size, output_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(ids))


class Symbols:
    """A tokenizer whose texts are numbers: "17 523" is [17, 523]."""

    eos_token_id = None
    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def train(size: int = 1000, hidden: int = 256, epochs: int = 100) -> dict[str, float]:
    """Returns: share of right greedy answers of the "random" and of the "trained" policy."""
    torch.manual_seed(0)
    model = ReActModel(size, hidden, size)
    answers = torch.randperm(size).tolist()
    env = TextEnv([Record(str(i), str(answers[i])) for i in range(size)], reward=exact_match)
    batch = size // 10
    config = rf.TrainerConfig(
        steps=epochs * (size // batch), prompts_per_step=batch, group_size=1, optimizer="adam", learning_rate=1e-3,
        max_new_tokens=1, eval_batch=size, threads=1,
    )  # fmt: skip
    trainer = rf.Trainer(model, Symbols(), env, algorithm=rf.SFT(), config=config)
    accuracy = {"random": trainer.evaluate(env)["eval/reward"]}
    for epoch in range(1, epochs + 1):
        losses = [trainer.train_step()["loss"] for _ in range(size // batch)]
        if epoch % max(1, epochs // 10) == 0:
            print(f"epoch {epoch}/{epochs}  cross-entropy {sum(losses) / len(losses):.4f}")
    accuracy["trained"] = trainer.evaluate(env)["eval/reward"]
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    for name, value in train(epochs=parser.parse_args().epochs).items():
        print(f"{name}: {value:.1%} of the answers right")
