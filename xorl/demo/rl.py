"""A whole RL trainer: roll out, reward, train, sync, again. Copy it and put your own task in.

It talks to two servers over HTTP and to nothing else: `xorl serve` through xorl-client, and an inference server with
SGLang's protocol (SGLang itself, or `xorl sampler`).
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import xorl_client
from transformers import PreTrainedTokenizerBase
from xorl_client import types

from xorl.demo.task import Problem, problems

IGNORED = -100
"""A target that costs nothing and has no gradient: the prompt is not trained on."""


@dataclass(frozen=True)
class Settings:
    steps: int = 36
    num_problems: int = 32  # a step
    group_size: int = 8  # completions of one problem, whose mean reward is the baseline of each
    rank: int = 16
    learning_rate: float = 5e-4  # of the first step; it falls evenly to a tenth at the last
    max_new_tokens: int = 4  # two digits, the line's end, and one to be wrong with
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        return self.learning_rate * (1 - 0.9 * (step - 1) / max(1, self.steps - 1))


class Rollout(NamedTuple):
    """One sampled completion, with the log-probabilities it was sampled at."""

    prompt: list[int]
    completion: list[int]
    logprobs: list[float]
    reward: float


class StepReport(NamedTuple):
    """What one training step did; `kl` is the gap between the sampler's and the trainer's log-probabilities."""

    step: int
    reward: float
    kl: float
    grad_norm: float
    rollout_s: float
    update_s: float
    sync_s: float


class Sampler:
    """The inference server, asked for completions of problems."""

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self._http = httpx.Client(base_url=url, timeout=600)
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._line_end = tokenizer.encode("\n", add_special_tokens=False)[-1]

    def roll_out(self, batch: Sequence[Problem], group_size: int, temperature: float, seed: int) -> list[list[Rollout]]:
        """`group_size` completions of each problem, each drawn with a seed of its own."""
        prompts = [self._tokenizer.encode(problem.prompt) for problem in batch]
        params = {
            "temperature": temperature,
            "max_new_tokens": self._max_new_tokens,
            "stop_token_ids": [self._line_end],
        }
        body = {
            "input_ids": [prompt for prompt in prompts for _ in range(group_size)],
            "sampling_params": [{**params, "sampling_seed": seed + i} for i in range(len(prompts) * group_size)],
            "return_logprob": True,
        }
        answer = self._http.post("/generate", json=body)
        answer.raise_for_status()
        samples = iter(answer.json())
        return [
            [self._rollout(problem, prompt, next(samples)) for _ in range(group_size)]
            for problem, prompt in zip(batch, prompts, strict=True)
        ]

    def _rollout(self, problem: Problem, prompt: list[int], sample: dict) -> Rollout:
        completion = sample["output_ids"]
        logprobs = [logprob for logprob, *_ in sample["meta_info"]["output_token_logprobs"]]
        return Rollout(prompt, completion, logprobs, problem.reward(str(self._tokenizer.decode(completion))))


def train(
    trainer_url: str, sampler_url: str, model: str, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Iterator[StepReport | float]:
    """Train an adapter.

    Yields:
        The accuracy on held-out problems (greedy), then a report of each step, then the accuracy again.
    """
    sampler = Sampler(sampler_url, tokenizer, settings.max_new_tokens)
    address = urlsplit(sampler_url)
    rng = random.Random(settings.seed)
    training, held_out = problems()
    with xorl_client.ServiceClient(base_url=trainer_url) as service:
        client = service.create_lora_training_client(model, rank=settings.rank, alpha=32)
        client.add_inference_endpoint(address.hostname, address.port).result()
        yield accuracy(sampler, held_out)
        for step in range(1, settings.steps + 1):
            batch = rng.sample(training, settings.num_problems)
            start = time.monotonic()
            groups = sampler.roll_out(batch, settings.group_size, temperature=1.0, seed=rng.randrange(2**30))
            rolled_out = time.monotonic()
            data = [datum for group in groups for datum in datums(group)]
            metrics, grad_norm = update(client, data, settings.learning_rate_at(step)) if data else ({}, 0.0)
            updated = time.monotonic()
            synced = client.sync_inference_weights(master_port=0).result()
            if not synced.success:
                raise RuntimeError(f"the weights did not reach the sampler: {synced.message}")
            yield StepReport(
                step=step,
                reward=mean([rollout.reward for group in groups for rollout in group]),
                kl=metrics.get("kl_sample_train_k3:mean", 0.0),
                grad_norm=grad_norm,
                rollout_s=rolled_out - start,
                update_s=updated - rolled_out,
                sync_s=time.monotonic() - updated,
            )
        yield accuracy(sampler, held_out)


def datums(group: Sequence[Rollout]) -> Iterator[types.Datum]:
    """Each completion with its advantage over the group's mean; none if all were rewarded alike."""
    baseline = mean([rollout.reward for rollout in group])
    for rollout in group:
        advantage = rollout.reward - baseline
        if advantage:
            tokens = rollout.prompt + rollout.completion
            prompt_zeros = [0.0] * (len(rollout.prompt) - 1)
            yield types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": tensor([IGNORED] * len(prompt_zeros) + rollout.completion, "int64"),
                    "logprobs": tensor(prompt_zeros + rollout.logprobs, "float32"),
                    "advantages": tensor(prompt_zeros + [advantage] * len(rollout.completion), "float32"),
                },
            )


def tensor(values: list, dtype: str) -> types.TensorData:
    return types.TensorData(data=values, dtype=dtype, shape=[len(values)])


def update(
    client: xorl_client.TrainingClient, data: list[types.Datum], learning_rate: float
) -> tuple[dict[str, float], float]:
    """One policy-gradient step; both calls are on their way before the first has its result."""
    gradients = client.forward_backward(data, loss_fn="importance_sampling")
    step = client.optim_step(types.AdamParams(learning_rate=learning_rate))
    return gradients.result().metrics, step.result().metrics["grad_norm"]


def accuracy(sampler: Sampler, held_out: Sequence[Problem]) -> float:
    return mean([group[0].reward for group in sampler.roll_out(held_out, 1, temperature=0.0, seed=0)])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
