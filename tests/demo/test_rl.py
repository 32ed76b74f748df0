"""The arithmetic of the loop: from rollouts to datums."""

import pytest

pytest.importorskip("xorl_client")

from xorl.demo.rl import Rollout, datums

PROMPT = [5, 6, 7]


def rollout(completion: list[int], reward: float) -> Rollout:
    return Rollout(PROMPT, completion, [-0.5 - i for i in range(len(completion))], reward)


def test_a_group_rewarded_alike_teaches_nothing():
    assert list(datums([rollout([8], 1.0), rollout([9], 1.0)])) == []


def test_advantages_of_a_group_sum_to_zero():
    group = [rollout([8, 3], reward) for reward in (1.0, 0.0, 0.0, 1.0)]
    advantages = [datum.loss_fn_inputs["advantages"].data[-1] for datum in datums(group)]
    assert advantages == [0.5, -0.5, -0.5, 0.5]


def test_position_i_is_trained_on_token_i_plus_one_and_the_prompt_is_not():
    first, second = datums([rollout([8, 3], 1.0), rollout([9], 0.0)])
    assert first.model_input.to_ints() == [5, 6, 7, 8]
    assert {name: value.data for name, value in first.loss_fn_inputs.items()} == {
        "target_tokens": [-100, -100, 8, 3],
        "logprobs": [0.0, 0.0, -0.5, -1.5],
        "advantages": [0.0, 0.0, 0.5, 0.5],
    }
    assert second.model_input.to_ints() == PROMPT
    assert second.loss_fn_inputs["target_tokens"].data == [-100, -100, 9]
