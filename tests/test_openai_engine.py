"""Rollouts over HTTP: token ids where the server has them, text counted, failures retried and told in one line."""

import math
import threading
import time
from typing import Any

import pytest

from react_fast.envs import Record, TextEnv
from react_fast.trainer.rollout import EngineError, Episodes, SamplingParams, retokenised
from react_fast.trainer.rollout.completions import read_sample
from react_fast.trainer.rollout.http import HttpError, JsonClient
from react_fast.trainer.rollout.openai_engine import OpenAIEngine

from .completion_client import EOS, IDS, LOGPROBS, PARAMS, PROMPT, TOKENIZER
from .completion_client import make_engine as _engine
from .completion_server import Double, completion, failing, llama_cpp, text, vllm

FORMS = {
    "vLLM, return_token_ids": vllm(IDS, LOGPROBS, "stop"),
    "vLLM, return_tokens_as_token_ids": vllm(IDS, LOGPROBS, "stop", spelled=True),
    "llama.cpp": llama_cpp(IDS, LOGPROBS, "stop"),
}


@pytest.mark.parametrize("form", FORMS)
def test_token_ids_go_in_and_out(form):
    with Double(FORMS[form], models=["m"]) as server:
        engine = _engine(server)
        assert engine.capabilities.token_prompts
        assert engine.capabilities.token_ids
        assert engine.capabilities.logprobs
        samples = engine.generate([PROMPT, [5, 6]], PARAMS)
        bodies = [body for _, body in server.requests[-2:]]
    for sample in samples:
        assert (sample.ids, sample.logprobs, sample.finish_reason) == (IDS, LOGPROBS, "stop")
        assert sample.exact_tokens
        assert not sample.drifted
        assert sample.weights_version == 0
    assert sorted(body["prompt"] for body in bodies) == sorted([PROMPT, [5, 6]])
    # What a server would do by itself is switched off, and every row has a seed of its own.
    expected = {"model": "m", "max_tokens": 3, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    assert all(expected.items() <= body.items() for body in bodies)
    assert len({body["seed"] for body in bodies}) == 2


def test_an_action_may_have_no_tokens():
    with Double(vllm([], [], "length"), models=["m"]) as server:
        (sample,) = _engine(server).generate([PROMPT], PARAMS)
    assert (sample.ids, sample.logprobs, sample.exact_tokens) == ([], [], True)


def test_text_is_tokenised_again_and_marked():
    pieces = TOKENIZER(" one", add_special_tokens=False)["input_ids"]
    logprobs = {
        "tokens": [TOKENIZER.decode([i]) for i in pieces],
        "token_logprobs": [-0.5] * len(pieces),
        "text_offset": [],
        "top_logprobs": None,
    }
    with Double(text(" one", logprobs=logprobs), models=["m"]) as server:
        engine = _engine(server)
        assert not engine.capabilities.token_prompts
        assert not engine.capabilities.token_ids
        (sample,) = engine.generate([PROMPT], SamplingParams(8))
        assert server.requests[-1][1]["prompt"] == "say"
    assert sample.ids == [*pieces, EOS]
    assert sample.logprobs[:-1] == [-0.5] * len(pieces)
    assert math.isnan(sample.logprobs[-1])  # nobody told the end token's
    assert not sample.exact_tokens
    assert not sample.drifted


def test_drift_is_counted():
    """The server's tokens are other ones than the text's: its log-probabilities belong to none of ours."""
    other = {
        "tokens": ["o", "ne", "!"],
        "token_logprobs": [-1.0] * 3,
        "text_offset": [],
        "top_logprobs": None,
    }
    with Double(text("one", logprobs=other), models=["m"]) as server:
        engine = _engine(server)
        env = TextEnv([Record("say", "one")], reward=lambda state, action, record: float(action == "one"))
        trajectories = Episodes(engine, TOKENIZER, env).play([0, 0], [0, 0], SamplingParams(8))
    assert [sum(t.rewards) for t in trajectories] == [1.0, 1.0]
    assert retokenised(trajectories) == {
        "rollout/retokenised": 2.0,
        "rollout/drift": 1.0,
        "rollout/weights_version": 0.0,
    }
    assert all(t.sampler_logprobs[t.action_mask].isnan().all() for t in trajectories)


def test_text_that_is_too_long_is_cut():
    with Double(text("one two one two"), models=["m"]) as server, pytest.warns(match="no log-probabilities"):
        (sample,) = _engine(server).generate([PROMPT], SamplingParams(2))
    assert (len(sample.ids), sample.finish_reason, sample.drifted) == (2, "length", True)


def test_logprobs_of_another_temperature_are_not_used():
    params = SamplingParams(3, temperature=0.7)
    with Double(vllm(IDS, LOGPROBS), models=["m"]) as server:
        with pytest.warns(UserWarning, match="--logprobs-mode processed_logprobs"):
            (raw,) = _engine(server).generate([PROMPT], params)
        (processed,) = _engine(server, server_logprobs="processed").generate([PROMPT], params)
    assert all(map(math.isnan, raw.logprobs))
    assert processed.logprobs == LOGPROBS


def _late(handler: Any, body: dict[str, Any]) -> None:
    time.sleep(2)


def _drip(handler: Any, body: dict[str, Any]) -> None:
    """A byte now and then for 20 s: each arrives within any timeout of the socket."""
    handler.raw(200, b" ", length=100)
    try:
        for _ in range(400):
            time.sleep(0.05)
            handler.wfile.write(b" ")
    except OSError:
        pass


FAILURES = {
    "HTTP 500": failing(500),
    "HTTP 429 with Retry-After": failing(429, Retry_After="0.05"),
    "no answer": _late,
    "a byte now and then": _drip,
    "not JSON": lambda handler, body: handler.raw(200, b"<html>proxy</html>"),
    "cut off": lambda handler, body: handler.raw(200, b'{"choices": [', length=4000),
    "connection closed": lambda handler, body: handler.connection.close(),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_retried(failure):
    good = vllm(IDS, LOGPROBS, "stop")
    with Double(good, FAILURES[failure], good, models=["m"]) as server:
        engine = _engine(server)
        engine.client.timeout = 1.0 if failure in ("no answer", "a byte now and then") else 5.0
        start = time.monotonic()
        (sample,) = engine.generate([PROMPT], PARAMS)
        assert time.monotonic() - start < 4
        assert engine.client.retried == 1
    assert sample.ids == IDS


ERRORS = {
    "HTTP 500": (
        failing(500, "out of\nmemory"),
        r"completions: HTTP 500: out of memory \(after 4 attempts\)",
    ),
    "HTTP 400": (failing(400, "prompt too long"), "completions: HTTP 400: prompt too long$"),
    "no answer": (_late, r"no answer within 0.1 s \(after 4 attempts\)"),
    "not JSON": (lambda handler, body: handler.raw(200, b"<html>"), "the answer is not JSON: '<html>'"),
    "no choices": (lambda handler, body: handler.send(200, {"ok": 1}), "must have one choice, got {'ok': 1}"),
    "no reason": (vllm(IDS, LOGPROBS, "abort"), "a finish_reason of 'stop' or 'length', got 'abort'"),
    "fewer log-probs": (vllm(IDS, LOGPROBS[:1]), "must have a log-probability for each of its 3 tokens"),
    "ids that are none": (vllm(["x"], [0.0]), "must have whole numbers as token_ids"),
    "negative ids": (vllm([-1], [0.0]), "must have whole numbers as token_ids, none of them negative"),
    "ids with fractions": (vllm([5.7], [0.0]), "must have whole numbers as token_ids, .* got .5.7"),
    "ids in a text": (vllm("56", [0.0, 0.0]), "must have whole numbers as token_ids, .* got .56."),
    "unknown ids": (
        vllm([9999], [0.0]),
        "must have token_ids below 280, the size of the policy's vocabulary",
    ),
    "log-probs in texts": (vllm([5], ["-1"]), "must have numbers as token_logprobs, got ..-1"),
    "no text": (
        lambda handler, body: handler.send(200, completion(None)),
        "must have text or token ids in its choice",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case):
    reply, message = ERRORS[case]
    with Double(vllm(IDS, LOGPROBS), reply, models=["m"]) as server:
        engine = _engine(server, vocabulary=280)
        engine.client.timeout = 0.1 if case == "no answer" else 5.0
        with pytest.raises(EngineError, match=message) as error:
            engine.generate([PROMPT], PARAMS)
    assert "\n" not in str(error.value)


def _read(ids: Any, logprobs: Any, reason: str, most: int = 3, **choice: Any) -> tuple[Any, ...]:
    found = completion("?", reason, logprobs={"token_logprobs": logprobs}, token_ids=ids, **choice)
    sample = read_sample(found["choices"][0], TOKENIZER, EOS, most)
    return sample.ids, [None if math.isnan(x) else x for x in sample.logprobs], sample.finish_reason


def test_an_action_ends_with_its_first_end_token():
    assert _read([5, EOS, 6], [-1.0, -2.0, -3.0], "length") == ([5, EOS], [-1.0, -2.0], "stop")


def test_an_action_that_another_token_ended_gets_no_second_end():
    assert _read([5, 6], [-1.0, -2.0], "stop", stop_reason=6) == ([5, 6], [-1.0, -2.0], "stop")
    assert _read([5, 6], [-1.0, -2.0], "stop") == ([5, 6, EOS], [-1.0, -2.0, None], "stop")
    assert _read([5, 6, 7], [-1.0] * 3, "stop") == ([5, 6, 7], [-1.0] * 3, "stop")


def test_a_logprob_that_is_not_finite_is_not_known():
    assert _read([5, 6], [-math.inf, math.nan], "length") == ([5, 6], [None, None], "length")


def test_logprobs_of_tokens_that_are_not_told_are_not_used():
    """A shorter list would shift all that follows in an episode of several turns."""
    found = completion("say", "stop", logprobs={"token_logprobs": [-1.0]})["choices"][0]
    sample = read_sample(found, TOKENIZER, EOS, 9)
    assert len(sample.logprobs) == len(sample.ids)
    assert all(map(math.isnan, sample.logprobs))
    tokens = [TOKENIZER.decode([i]) for i in TOKENIZER("say", add_special_tokens=False)["input_ids"]]
    found["logprobs"]["tokens"] = [*tokens]
    found["logprobs"]["token_logprobs"] = [-1.0] * (len(tokens) + 1)
    with pytest.raises(EngineError, match="must have a log-probability for each of its"):
        read_sample(found, TOKENIZER, EOS, 9)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://x", "http://", "http://[::1/v1", "http://a:99999", None]
)
def test_what_is_no_address_is_told_in_one_line(url):
    with pytest.raises(EngineError, match="base_url must be like http://localhost:8000/v1, got "):
        OpenAIEngine(url, tokenizer=TOKENIZER, eos_id=EOS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be above 0, got 0"),
        ({"timeout": "1"}, "timeout must be a number that is not negative, got '1'"),
        ({"retries": -1}, "retries must be a number that is not negative, got -1"),
        ({"concurrency": "2"}, "concurrency must be an integer of at least 1, got '2'"),
    ],
)
def test_numbers_of_a_server_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        OpenAIEngine("http://127.0.0.1:9/v1", tokenizer=TOKENIZER, eos_id=EOS, **options)


def test_a_server_that_is_down_is_told_in_one_line():
    client = JsonClient("http://127.0.0.1:9/v1", retries=1, backoff=0.01)
    with pytest.raises(
        EngineError, match=r"127.0.0.1:9/v1/models: cannot be reached: .*\(after 2 attempts\)"
    ):
        OpenAIEngine("", tokenizer=TOKENIZER, eos_id=EOS, client=client)


@pytest.mark.parametrize(
    ("models", "asked", "message"),
    [
        (["small", "large"], "smal", "serves small, large, not 'smal'; did you mean small?"),
        (
            ["small", "large"],
            None,
            "served_model must name one of the server's models, got None for small, large",
        ),
        (None, None, "served_model must name one of the server's models"),
    ],
)
def test_an_unknown_model_is_told_in_one_line(models, asked, message):
    with Double(vllm(IDS, LOGPROBS), models=models) as server, pytest.raises(EngineError, match=message):
        _engine(server, model=asked)


def test_a_server_that_refuses_every_form_is_told_in_one_line():
    with (
        Double(failing(401, "no key"), models=["m"]) as server,
        pytest.raises(EngineError, match=r"no form of completion was accepted: .*HTTP 401: no key"),
    ):
        _engine(server)


def test_no_more_requests_at_once_than_asked_for():
    now, most, lock = 0, 0, threading.Lock()
    good = vllm(IDS, LOGPROBS)

    def counted(handler: Any, body: dict[str, Any]) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        good(handler, body)

    with Double(counted, models=["m"]) as server:
        assert len(_engine(server, concurrency=2).generate([PROMPT] * 6, PARAMS)) == 6
    assert most == 2


def test_a_truncated_sampler_is_refused():
    with (
        Double(vllm(IDS, LOGPROBS), models=["m"]) as server,
        pytest.raises(ValueError, match="must keep all tokens"),
    ):
        _engine(server).generate([PROMPT], SamplingParams(3, top_p=0.9))


def test_the_key_is_sent():
    seen = []

    def reply(handler: Any, body: dict[str, Any]) -> None:
        seen.append(handler.headers["Authorization"])
        handler.send(200, {})

    with Double(reply) as server:
        JsonClient(server.url, api_key="secret").post("completions", {})
    assert seen == ["Bearer secret"]


def test_statuses_may_be_final():
    with Double(failing(500), models=["m"]) as server:
        client = JsonClient(server.url, backoff=0.01)
        with pytest.raises(HttpError) as error:
            client.post("completions", {}, final=(500,))
        assert (error.value.status, client.retried, len(server.requests)) == (500, 0, 1)
