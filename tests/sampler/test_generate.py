"""What /generate answers equals what a plain forward of the model says."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sampler.serving import Client, drive, generate, logprobs, ok, refused

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [20], [5, 6, 7], [30, 31, 32, 33, 34]]
FREE = {"max_new_tokens": 12, "ignore_eos": True}
GREEDY = FREE | {"temperature": 0}


def plain_logprobs(model: Path, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """log p of each token after the first, given those before it."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([tokens])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_greedy_is_what_transformers_generates(tiny_models: dict[str, Path], arch: str) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_models[arch], dtype=torch.float32)

    async def scenario(client: Client) -> None:
        answers = await generate(client, PROMPTS, GREEDY)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = network.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert answer["output_ids"] == expected[0, len(prompt) :].tolist()
            assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 12}

    drive(tiny_models[arch], scenario)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward(tiny_model: Path, temperature: float) -> None:
    async def scenario(client: Client) -> None:
        answers = await generate(
            client, PROMPTS, FREE | {"temperature": temperature}, return_logprob=True, logprob_start_len=0
        )
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            tokens = prompt + answer["output_ids"]
            expected = plain_logprobs(tiny_model, tokens, temperature)
            assert logprobs(answer) == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
            meta = answer["meta_info"]
            assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
            assert [entry[1] for entry in meta["input_token_logprobs"]] == prompt
            assert meta["input_token_logprobs"][0][0] is None
            scored = [entry[0] for entry in meta["input_token_logprobs"][1:]]
            assert scored == pytest.approx(plain_logprobs(tiny_model, tokens)[: len(prompt) - 1], abs=1e-4)

    drive(tiny_model, scenario)


def test_a_batch_answers_as_each_prompt_alone(tiny_model: Path) -> None:
    params = FREE | {"sampling_seed": 11, "temperature": 0.9, "top_p": 0.9, "top_k": 40}

    async def scenario(client: Client) -> None:
        batch = await generate(client, PROMPTS, params, return_logprob=True)
        for prompt, answer in zip(PROMPTS, batch, strict=True):
            alone = await generate(client, prompt, params, return_logprob=True)
            assert alone["output_ids"] == answer["output_ids"]
            assert logprobs(alone) == pytest.approx(logprobs(answer), abs=1e-4)

    drive(tiny_model, scenario)


def test_n_samples_differ_and_share_one_prefill(tiny_model: Path) -> None:
    async def scenario(client: Client) -> None:
        answers = await generate(client, PROMPTS[1], FREE | {"n": 4, "seed": 3}, return_logprob=True)
        assert len({tuple(answer["output_ids"]) for answer in answers}) == 4
        assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [0, 7, 7, 7]
        for answer in answers:
            expected = plain_logprobs(tiny_model, PROMPTS[1] + answer["output_ids"])
            assert logprobs(answer) == pytest.approx(expected[6:], abs=1e-4)
        again = await generate(client, PROMPTS[1], FREE | {"n": 4, "seed": 3})
        assert [one["output_ids"] for one in again] == [one["output_ids"] for one in answers]
        pairs = await generate(client, PROMPTS[:2], FREE | {"n": 2})
        assert [one["meta_info"]["prompt_tokens"] for one in pairs] == [3, 3, 7, 7]

    drive(tiny_model, scenario)


def test_rows_come_and_go_without_disturbing_each_other(tiny_model: Path) -> None:
    lengths = [1 + 5 * (idx % 7) for idx in range(32)]
    prompts = [[3 + (idx * 7 + step) % 100 for step in range(1 + idx % 9)] for idx in range(32)]

    async def scenario(client: Client) -> None:
        async def one(idx: int) -> Any:
            params = {"max_new_tokens": lengths[idx], "seed": idx, "ignore_eos": True}
            return await generate(client, prompts[idx], params, return_logprob=True)

        crowd = await asyncio.gather(*map(one, range(32)))
        for idx in range(32):
            expected = plain_logprobs(tiny_model, prompts[idx] + crowd[idx]["output_ids"])
            assert len(crowd[idx]["output_ids"]) == lengths[idx]
            assert logprobs(crowd[idx]) == pytest.approx(expected[len(prompts[idx]) - 1 :], abs=1e-4)
        alone = await one(5)
        assert alone["output_ids"] == crowd[5]["output_ids"]

    drive(tiny_model, scenario)


def test_stop_tokens_and_strings(tiny_model: Path) -> None:
    async def scenario(client: Client) -> None:
        free = await generate(client, PROMPTS[0], GREEDY)
        tokens = free["output_ids"]
        stop = tokens[4]
        first = tokens.index(stop) + 1
        answer = await generate(client, PROMPTS[0], GREEDY | {"stop_token_ids": [stop]})
        assert answer["output_ids"] == tokens[:first]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert answer["text"] == " ".join(f"w{token}" for token in tokens[: first - 1])
        answer = await generate(client, PROMPTS[0], GREEDY | {"stop": f"w{stop}"})
        assert answer["output_ids"] == tokens[:first]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": f"w{stop}"}
        assert f"w{stop}" not in answer["text"]
        kept = await generate(client, PROMPTS[0], GREEDY | {"stop": [f"w{stop}"], "no_stop_trim": True})
        assert kept["text"].endswith(f"w{stop}")
        forced = await generate(client, PROMPTS[0], GREEDY | {"stop_token_ids": [stop], "min_new_tokens": 8})
        assert stop not in forced["output_ids"][:8]
        assert len(forced["output_ids"]) >= 8

    drive(tiny_model, scenario)


def test_text_and_top_logprobs(tiny_model: Path) -> None:
    body = {"text": "w5 w6 w7", "sampling_params": GREEDY, "return_logprob": True, "top_logprobs_num": 3}

    async def scenario(client: Client) -> None:
        answer = await ok(client, "/generate", body | {"logprob_start_len": 1, "return_text_in_logprobs": True})
        same = await generate(client, PROMPTS[0], GREEDY)
        assert answer["output_ids"] == same["output_ids"]
        meta = answer["meta_info"]
        assert [len(entries) for entries in meta["output_top_logprobs"]] == [3] * 12
        assert [entries[0] for entries in meta["output_top_logprobs"]] == meta["output_token_logprobs"]
        assert [entry[1:] for entry in meta["input_token_logprobs"]] == [[6, "w6"], [7, "w7"]]
        assert meta["input_top_logprobs"][0] is None
        assert len(meta["input_top_logprobs"]) == 2
        assert meta["weight_version"] == "default"
        assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 12}]

    drive(tiny_model, scenario)


def test_prompt_alone_can_be_scored(tiny_model: Path) -> None:
    async def scenario(client: Client) -> None:
        answer = await generate(client, PROMPTS[1], {"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0)
        assert answer["output_ids"] == []
        scored = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        assert scored == pytest.approx(plain_logprobs(tiny_model, PROMPTS[1]), abs=1e-4)

    drive(tiny_model, scenario)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input_ids": [1], "sampling_params": {"max_new_token": 3}}, "max_new_token"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [1], "sampling_params": {"frequency_penalty": 0.5}}, "frequency_penalty"),
        ({"input_ids": [1], "sampling_params": [{}, {}]}, "sampling_params"),
        ({"input_ids": [[1], [2]], "lora_path": [None]}, "lora_path"),
        ({"input_ids": [1], "lora_path": "nobody"}, "nobody"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[1], []]}, "input_ids[1]"),
        ({"input_ids": [128]}, "128"),
        ({"input_ids": [1], "text": "w3"}, "exactly one"),
        ({}, "exactly one"),
        ({"input_ids": "w"}, "input_ids"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 512}}, "512"),
        ({"input_ids": [1], "stream": True}, "stream"),
        ({"input_ids": [1], "logprob_start_len": 2, "return_logprob": True}, "logprob_start_len"),
    ],
)
def test_wrong_requests_are_refused_by_name(tiny_model: Path, body: dict[str, Any], named: str) -> None:
    async def scenario(client: Client) -> None:
        assert named in await refused(client, "/generate", body)
        await generate(client, [1], {"max_new_tokens": 1})

    drive(tiny_model, scenario)


def test_bfloat16_is_served(tiny_model: Path) -> None:
    async def scenario(client: Client) -> None:
        info = (await client.get("/server_info")).json()
        assert info["dtype"] == "bfloat16"
        answers = await generate(client, PROMPTS, GREEDY, return_logprob=True)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = plain_logprobs(tiny_model, prompt + answer["output_ids"])
            assert logprobs(answer) == pytest.approx(expected[len(prompt) - 1 :], abs=0.2)

    drive(tiny_model, scenario, dtype="bfloat16")
