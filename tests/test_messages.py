"""Prompts of messages: the tokenizer's chat template renders them, TRL's reward functions get them as they are."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from react_fast.cli import main
from react_fast.envs import Record, TextEnv, TokenView, ToolEnv, load_jsonl
from react_fast.envs.record import rendered
from react_fast.reference.trainer import Trainer as ReferenceTrainer
from react_fast.trainer.algorithms import DPO, GRPO, ILQL, SFT
from react_fast.trainer.meters import samples
from react_fast.trainer.rollout import OpenAIEngine, SamplingParams, demonstration, opening
from react_fast.trainer.trainer import Trainer

from . import training
from .completion_server import Double, text
from .tiny import records, train_words

# A template with a beginning of its own, as Llama's has, and marks around every message, as ChatML has.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASKED = [{"role": "system", "content": "brief"}, {"role": "user", "content": "es>pt:Alemania="}]
RECORDS = [
    Record(ASKED, "Alemanha", {"rejected": "Germany"}),
    Record([{"role": "user", "content": "b"}], "B", {"rejected": "C"}),
]


def policy():
    """A tokenizer that begins every text with a mark, which the template writes, too."""
    model, tokenizer = training.make_policy()
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def judge(prompts, completions, **columns):
    assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions)
    return [float(len(p)) + len(c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]


def test_the_template_renders_prompts_and_trls_functions_get_messages():
    seen = []

    def spy(prompts, completions, **columns):
        seen.append((prompts, completions))
        return judge(prompts, completions)

    _, tokenizer = policy()
    env = TextEnv(RECORDS, reward=spy).rendered(tokenizer)
    state, _ = env.reset(options={"index": 0})
    assert state == f"{tokenizer.bos_token}[system] brief\n[user] es>pt:Alemania=\n[assistant] "
    assert env.step("Alemanha")[1] == 2 + 8
    assert seen == [([ASKED], [[{"role": "assistant", "content": "Alemanha"}]])]
    assert env.rendered(tokenizer) is env
    assert env.reward("", "x", RECORDS[1]) == 1 + 1, "records that were not rendered are conversations, too"


def test_texts_and_messages_may_stand_together():
    seen = []
    env = TextEnv(
        [Record("ab"), RECORDS[1]], reward=lambda prompts, completions: seen.append(prompts) or [1, 1]
    )
    envs = [env.rendered(policy()[1]) for _ in range(2)]
    for i, one in enumerate(envs):
        one.reset(options={"index": i})
    envs[1].reward = envs[0].reward
    TextEnv.step_many(envs, ["x", "y"])
    assert seen == [["ab", [{"role": "user", "content": "b"}]]]


@pytest.mark.parametrize("algorithm", [GRPO(), SFT(), DPO(), ILQL()], ids=lambda a: type(a).__name__)
def test_tokens_are_the_templates_and_special_ones_not_doubled(algorithm):
    model, tokenizer = policy()
    config = training.make_config(steps=1)
    env = TextEnv(RECORDS, reward=judge)
    trainer = Trainer(model, tokenizer, env, algorithm=algorithm, config=config, eval_env=env)
    for one in trainer.collect():
        expected = tokenizer.apply_chat_template(RECORDS[one.record].prompt, add_generation_prompt=True)
        ids = expected["input_ids"] if hasattr(expected, "keys") else expected
        prompt = one.token_ids[: int(one.action_mask.int().argmax())].tolist()
        assert prompt == list(ids)
        assert prompt.count(tokenizer.bos_token_id) == 1
    assert math.isfinite(trainer.train()["loss"])
    assert 1 <= trainer.evaluate()["eval/reward"] <= 2 + 12


def test_the_reference_trainer_reads_them_alike():
    (model, tokenizer), (slow, _) = policy(), policy()
    config = training.make_config(steps=1, max_new_tokens=3, credit="monte_carlo", credit_samples=1)
    env = TextEnv(RECORDS, reward=judge)
    fast = Trainer(model, tokenizer, env, algorithm=GRPO(), config=config)
    reference = ReferenceTrainer(slow, tokenizer, fast.env, algorithm=GRPO(), config=config)
    fast.train()
    reference.train()
    torch.testing.assert_close(training.weights(model), training.weights(slow), rtol=1e-9, atol=1e-12)


def test_samples_and_augmented_prompts_show_the_rendered_text():
    def louder(record, draw):
        return Record([{"role": "user", "content": record.prompt[-1]["content"].upper()}], record.reference)

    model, tokenizer = policy()
    env = TextEnv(RECORDS, reward=judge)
    trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), config=training.make_config(), augment=louder)
    rows = samples(trainer.collect(), trainer.env.records, tokenizer)
    assert {row["prompt"] for row in rows} <= {
        f"{tokenizer.bos_token}[user] {text}\n[assistant] " for text in ("ES>PT:ALEMANIA=", "B")
    }


def test_token_view_begins_with_the_templates_tokens():
    _, tokenizer = policy()
    view = TokenView(TextEnv(RECORDS[1:], reward=judge), tokenizer, window=64)
    seen = view.reset(seed=0)[0]
    assert seen[seen > 0].tolist()[0] == tokenizer.bos_token_id + 1
    assert (seen == tokenizer.bos_token_id + 1).sum() == 1


def test_a_server_of_texts_gets_the_templates_special_tokens_and_opens_the_sequence_itself():
    _, tokenizer = policy()
    tokenizer.chat_template = TEMPLATE.replace("\n{% endfor", "{{ eos_token }}{% endfor")
    record = rendered(RECORDS[1], tokenizer)
    assert record.prompt == "<bos>[user] b<eos>[assistant] "
    with Double(text("B"), models=["m"]) as server:
        engine = OpenAIEngine(server.url, tokenizer=tokenizer, eos_id=tokenizer.eos_token_id)
        with pytest.warns(match="no log-probabilities"):
            (sample,) = engine.generate([opening(tokenizer, record.prompt, record)], SamplingParams(4))
    assert server.requests[-1][1]["prompt"] == "[user] b<eos>[assistant] "
    assert not sample.drifted


def test_what_messages_cannot_have_is_told_in_one_line():
    _, tokenizer = policy()
    bare = training.make_policy()[1]
    with pytest.raises(ValueError, match=r"no chat template, which prompts of messages need: take a model"):
        TextEnv(RECORDS).rendered(bare)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"cannot render .*: TemplateError: roles must alternate$") as caught:
        TextEnv(RECORDS).rendered(tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"env\.rendered\(tokenizer\) makes one of messages"):
        TextEnv(RECORDS).reset(options={"index": 0})
    with pytest.raises(ValueError, match="max_turns must be 1 for prompts of messages, got 2"):
        TextEnv(RECORDS, max_turns=2)
    with pytest.raises(
        ValueError, match="records must have texts as prompts where tools answer, got messages"
    ):
        ToolEnv(RECORDS, [training.vowels])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (3, "must be a text or a list of messages, got int"),
        ([], "is empty"),
        (["hello"], "[0] must be a message, got str"),
        ([ASKED[0], {"content": "a"}], "[1] must have a text as 'role', got None"),
        ([{"role": "user", "content": ["a"]}], "[0] must have a text as 'content', got ['a']"),
    ],
)
def test_what_is_no_conversation_is_refused(prompt, message, tmp_path):
    with pytest.raises((TypeError, ValueError)) as caught:
        TextEnv([Record("a"), Record(prompt)])
    assert str(caught.value).startswith("records[1].prompt")
    assert message in str(caught.value)
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises((TypeError, ValueError), match=rf"{path.name}:1: field 'prompt'"):
        load_jsonl(path)


def test_a_run_takes_them_from_files_with_a_template_of_its_own(tmp_path, capsys):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    words = train_words(tmp_path, env={"reward": None, "rewards": {f"{__name__}:judge": 1.0}})
    for split in ("train", "validation", "test"):
        lines = [
            json.loads(line) for line in Path(records(tmp_path / f"{split}.jsonl")).read_text().splitlines()
        ]
        for line in lines:
            line["prompt"] = [{"role": "user", "content": line["prompt"]}]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert main(words) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    words += ["--model.chat_template", str(tmp_path / "chat.jinja"), "--trainer.sample_every", "1"]
    assert main([*words, "--dry-run"]) == 0
    assert main([*words, "--resume", "auto"]) == 0
    run = tmp_path / "run"
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["prompt"].startswith("<bos>[user] say ")
    (tmp_path / "chat.jinja").unlink()
    capsys.readouterr()
    assert main(["explain", str(run), "--text", "say 1:", "--chat"]) == 0
    assert "assistant" in capsys.readouterr().out
    assert "[user]" in (run / "report.html").read_text()


def test_demonstrations_end_with_the_end_token():
    _, tokenizer = policy()
    env = TextEnv(RECORDS).rendered(tokenizer)
    one = demonstration(tokenizer, env.records[1], "B", 1)
    assert tokenizer.decode(one.token_ids.tolist()) == "<bos>[user] b\n[assistant] B<eos>"
