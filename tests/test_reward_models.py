"""Reward models equal a loop over the texts, one at a time; what they cannot take is told in one line."""

import json
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from react_fast.cli import main
from react_fast.envs import Record, RewardFunction, RewardModel, TextEnv
from react_fast.trainer.algorithms import GRPO
from react_fast.trainer.trainer import Trainer

from . import training
from .tiny import train_words

SIZES = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 24}
WIDE = {"hidden_size": 16, "intermediate_size": 32, **SIZES}
PROMPTS = ["es>pt:Alemania=", "a", "es>it:Suiza="]
ANSWERS = ["Alemanha", "", "Svizzera, que está nos Alpes, como toda a gente sabe"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def tokens():
    return training.make_policy()[1]


def classifier(kind, labels=1, **options):
    """A random model whose dropout would show if it were not in evaluation mode."""
    tokenizer = tokens()
    common = {"vocab_size": len(tokenizer), "num_labels": labels, "pad_token_id": tokenizer.pad_token_id}
    common |= options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "gpt2":
            config = GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=24, **common)
            return GPT2ForSequenceClassification(config).train(), tokenizer
        if kind == "bert":
            return BertForSequenceClassification(BertConfig(**{**WIDE, **common})).train(), tokenizer
        return LlamaForSequenceClassification(LlamaConfig(**{**WIDE, **common})).train(), tokenizer


@torch.no_grad()
def alone(model, tokenizer, texts, longest):
    """Every text for itself, without padding, the pooled token by hand where the model pools the last one."""
    model.eval()
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)[-longest:]])
        if isinstance(model, BertForSequenceClassification):
            found.append(float(model(ids).logits[0, 0]))
        else:
            hidden = getattr(model, model.base_model_prefix)(ids).last_hidden_state
            found.append(float(model.score(hidden[0, -1])[0]))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_a_loop_over_texts_whatever_side_the_tokenizer_pads(kind, side, batch_size):
    model, tokenizer = classifier(kind)
    tokenizer.padding_side = side
    rewards = RewardModel(model, tokenizer, batch_size=batch_size)(PROMPTS, ANSWERS)
    texts = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert max(len(tokenizer.encode(t)) for t in texts) > 24
    assert rewards == pytest.approx(alone(model, tokenizer, texts, 24), abs=1e-6)
    assert len(set(rewards)) == 3
    assert not model.training


def test_any_module_and_a_length_of_its_own():
    class Ends(torch.nn.Module):
        """The last token that is no padding, and how many there are."""

        def forward(self, input_ids, attention_mask):
            assert not torch.is_grad_enabled()
            lengths = attention_mask.sum(1)
            return (1000 * lengths + input_ids[torch.arange(len(input_ids)), lengths - 1])[:, None].float()

    tokenizer = tokens()
    model = RewardModel(Ends(), tokenizer, max_length=5, batch_size=2)
    counts = []
    found = model(PROMPTS, ANSWERS, lambda name, values: counts.append((name, values)))
    ids = [tokenizer.encode(p + a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert found == [1000 * min(len(i), 5) + i[-1] for i in ids]
    assert counts == [("truncated", [float(len(i) > 5) for i in ids])]
    assert model.__name__ == "Ends"


def test_conversations_are_rendered_with_their_answer():
    model, tokenizer = classifier("llama", max_position_embeddings=64)
    tokenizer.chat_template = TEMPLATE
    rendered = "[user] ab\n[assistant] cd\n"
    env = TextEnv([Record([{"role": "user", "content": "ab"}])], reward=RewardModel(model, tokenizer))
    env = env.rendered(tokenizer)
    env.reset(options={"index": 0})
    assert env.step("cd")[1] == pytest.approx(alone(model, tokenizer, [rendered], 64)[0], abs=1e-6)
    bare = TextEnv(env.records, reward=RewardModel(*classifier("llama"), name="j"))
    bare.records = [Record([{"role": "user", "content": "ab"}])]
    with pytest.raises(
        ValueError, match=r"the tokenizer of reward model j has no chat template, .*beside it"
    ):
        bare.rendered(tokenizer)


def test_the_trainer_logs_it_and_counts_what_was_cut():
    model, tokenizer = classifier("llama")
    judge = RewardModel(model, tokenizer, max_length=9)
    env = TextEnv(training.RECORDS, reward=[RewardFunction(judge, weight=2.0, name="judge"), training.vowels])
    policy, tokenizer = training.make_policy()
    log = training.Log()
    config = training.make_config(steps=1)
    trainer = Trainer(policy, tokenizer, env, algorithm=GRPO(), config=config, reporter=log)
    played = trainer.collect()
    trainer.train()
    texts = [
        env.records[t.record].prompt + tokenizer.decode(t.token_ids[t.action_mask], skip_special_tokens=True)
        for t in played
    ]
    expected = alone(model, tokenizer, texts, 9)
    (logged,) = log.metrics
    assert logged["rewards/judge/mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert logged["rewards/judge/truncated"] == sum(len(tokenizer.encode(text)) > 9 for text in texts) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, t: RewardModel(3, t), "model must be a torch.nn.Module, got int"),
        (lambda m, t: RewardModel(m, None), "tokenizer must be callable, got NoneType"),
        (lambda m, t: RewardModel(m, t, batch_size=0), "batch_size must be an integer of at least 1, got 0"),
        (
            lambda m, t: RewardModel(m, t, max_length=True),
            "max_length must be an integer of at least 1, got True",
        ),
        (
            lambda m, t: RewardModel(m, t, max_length=25),
            "max_length must be at most 24, which the model takes, got 25",
        ),
    ],
)
def test_constructor_refuses(make, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make(*classifier("llama"))
    assert str(caught.value) == message


def test_pad_tokens_labels_and_empty_texts_are_told():
    model, tokenizer = classifier("llama", pad_token_id=None)
    with pytest.raises(
        ValueError, match=r"model.config.pad_token_id must be 0 like the tokenizer's .*, got None"
    ):
        RewardModel(model, tokenizer)
    one = RewardModel(model, tokenizer, batch_size=1)
    assert one(PROMPTS[:1], ANSWERS[:1]) == pytest.approx(
        alone(model, tokenizer, ["es>pt:Alemania=Alemanha"], 24)
    )
    with pytest.raises(ValueError, match="the text must hold at least one token, got ''"):
        one([""], [""])
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer must have a pad token for batch_size 8"):
        RewardModel(model, tokenizer)
    two, tokenizer = classifier("llama", labels=2)
    with pytest.raises(ValueError, match=r"must give \[1, 1\] for 1 texts, got \[1, 2\]"):
        RewardModel(two, tokenizer)(["a"], ["b"])
    with pytest.raises(ValueError, match="no chat template"):
        RewardModel(*classifier("llama"))([[{"role": "user", "content": "a"}]], [[]])


@pytest.fixture
def words(tmp_path):
    """The folder of a reward model, and the words of a command that takes it."""
    model, tokenizer = classifier("llama")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "judge")
    judge = {"model": str(tmp_path / "judge"), "weight": 0.5, "batch_size": 3}
    rewards = {"reward": None, "rewards": {"tests.tiny:odd": 1.0, "judge": judge}}
    return train_words(tmp_path, env=rewards, warm_start={"steps": 0}, trainer={"steps": 1})


def test_a_run_takes_one_from_its_folder(words, tmp_path, capsys):
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "# reward model judge: about " in shown
    assert "batch_size: 3" in shown
    assert main(words) == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert math.isfinite(metrics["rewards/judge/std"])
    assert metrics["rewards/judge/truncated"] == 0
    whole = metrics["rewards/odd/mean"] + 0.5 * metrics["rewards/judge/mean"]
    assert metrics["reward"] == pytest.approx(whole, abs=1e-6)
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "nowhere", "env.rewards.judge: model path must be a local folder, got nowhere"),
        ("model", "none", "env.rewards.judge.model must name a folder, got none"),
        ("batch", "3", "env.rewards.judge.batch is not a key; did you mean env.rewards.judge.batch_size?"),
        (
            "max_length",
            "99",
            "env.rewards.judge: max_length must be at most 24, which the model takes, got 99",
        ),
        ("weight", "heavy", "env.rewards.judge.weight must be a valid number, got 'heavy'"),
    ],
)
def test_wrong_keys_are_one_line(words, capsys, key, value, message):
    assert main([*words, f"--env.rewards.judge.{key}", value]) == 2
    assert capsys.readouterr().err.startswith(f"react-fast: {message}")


def test_wrong_folders_are_one_line(words, tmp_path, capsys):
    def told():
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.removeprefix("react-fast: env.rewards.judge: ")

    folder = tmp_path / "judge"
    classifier("llama", labels=2)[0].save_pretrained(folder)
    assert told() == f"model folder {folder} must hold a classifier with one label, got 2\n"
    policy, tokenizer = training.make_policy()
    policy.config.num_labels = 1
    policy.save_pretrained(folder)
    assert "missing keys, first score.weight" in told()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    classifier("llama")[0].save_pretrained(folder)
    assert told().startswith("tokenizer must have a pad token for batch_size 3")
    (folder / "model.safetensors").unlink()
    assert "has no weights" in told()
