"""The single-process reference: the same answers however requests are batched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.errors import BatchError, OutOfBlocks
from engine.generate import GenerationRequest, generate
from engine.runner import ModelRunner
from engine.sampling import SamplingParams
from engine.stopping import StopCriteria
from tests.unit.engine.conftest import MakeRunner


def request(
    prompt_ids: Sequence[int], max_new_tokens: int = 12, **sampling: float
) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=prompt_ids,
        stop=StopCriteria(max_new_tokens=max_new_tokens),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
    )


def prompt(length: int) -> list[int]:
    return [(length * 7 + i * i * 3) % 128 for i in range(length)]


def test_greedy_answers_equal_hugging_face(checkpoint: Path, make_runner: MakeRunner) -> None:
    (result,) = generate(make_runner(checkpoint), [request(prompt(19))])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    output = model.generate(
        torch.tensor([prompt(19)]),
        attention_mask=torch.ones(1, 19),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert result.token_ids == output[0, 19:].tolist()
    assert result.finish_reason == "length"
    assert result.prefill_s > 0


@pytest.mark.parametrize("max_batched_tokens", [4, 9, 512])
def test_answers_do_not_depend_on_the_batch(runner: ModelRunner, max_batched_tokens: int) -> None:
    requests = [
        request(prompt(30)),
        request(prompt(1), temperature=1.0, seed=7),
        request(prompt(17), temperature=0.8, top_p=0.9, seed=2**63),
        request(prompt(8), max_new_tokens=1),
        request(prompt(40), max_new_tokens=25, repetition_penalty=1.3),
        request(prompt(5), temperature=1.2, top_k=20, frequency_penalty=0.5, seed=3),
    ]
    alone = [generate(runner, [each])[0].token_ids for each in requests]
    together = generate(runner, requests, max_batched_tokens=max_batched_tokens, max_sequences=4)
    assert [result.token_ids for result in together] == alone
    assert [len(ids) for ids in alone] == [12, 12, 12, 1, 25, 12]


def test_requests_wait_for_blocks(runner: ModelRunner) -> None:
    requests = [request(prompt(200), max_new_tokens=40) for _ in range(4)]  # 30 of 64 blocks each
    results = generate(runner, requests)
    assert len({tuple(result.token_ids) for result in results}) == 1


def test_stop_ids_end_an_answer_and_belong_to_it(runner: ModelRunner) -> None:
    (free,) = generate(runner, [request(prompt(9))])
    stop_id = free.token_ids[4]
    first = free.token_ids.index(stop_id)
    stop = StopCriteria(max_new_tokens=12, stop_token_ids=frozenset({stop_id}))
    (stopped,) = generate(runner, [GenerationRequest(prompt_ids=prompt(9), stop=stop)])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"


def test_min_new_tokens_puts_the_end_off(runner: ModelRunner) -> None:
    everything = frozenset(range(127))
    stop = StopCriteria(max_new_tokens=6, min_new_tokens=3, eos_token_ids=everything)
    (result,) = generate(runner, [GenerationRequest(prompt_ids=prompt(9), stop=stop)])
    assert result.token_ids[:3] == [127, 127, 127]
    assert len(result.token_ids) == 4 or set(result.token_ids) == {127}


def test_logprobs_come_with_each_token(runner: ModelRunner) -> None:
    (result,) = generate(runner, [request(prompt(9), max_new_tokens=5, logprobs=3)])
    assert len(result.logprobs) == 5
    for token_id, logprobs in zip(result.token_ids, result.logprobs, strict=True):
        assert logprobs.top[0] == (token_id, logprobs.chosen)
        assert len(logprobs.top) == 3


def test_a_request_that_can_never_fit_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(OutOfBlocks, match="65 blocks needed, 64 free"):
        generate(runner, [request(prompt(500), max_new_tokens=13)])


def test_an_empty_prompt_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(BatchError, match="0 tokens"):
        generate(runner, [request([])])


def test_a_budget_below_the_batch_size_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(ValueError, match="at least max_sequences"):
        generate(runner, [request([1])], max_batched_tokens=2, max_sequences=4)
