"""The engine of a tiny policy before a double of a server."""

from typing import Any

from react_fast.trainer.model import fresh_model
from react_fast.trainer.rollout import SamplingParams
from react_fast.trainer.rollout.http import JsonClient
from react_fast.trainer.rollout.openai_engine import OpenAIEngine

from .completion_server import Double

SIZES = {"vocab_size": 280, "hidden_size": 8, "layers": 1, "heads": 1, "max_length": 32}
MODEL, TOKENIZER = fresh_model(["say one two", "abc"], seed=0, **SIZES)
EOS = TOKENIZER.eos_token_id
IDS, LOGPROBS = [70, 71, EOS], [-0.5, -1.25, -0.125]
PROMPT = TOKENIZER("say", add_special_tokens=True)["input_ids"]
PARAMS = SamplingParams(3, seed=1)


def make_engine(server: Double, **options: Any) -> OpenAIEngine:
    client = JsonClient(server.url, timeout=options.pop("timeout", 5.0), retries=3, backoff=0.01)
    return OpenAIEngine(server.url, tokenizer=TOKENIZER, eos_id=EOS, client=client, **options)
