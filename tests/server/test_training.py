"""forward, forward_backward and optim_step over JSON."""

import numpy as np
import pytest

from inprocess import Server
from xorl.engine.commands import ForwardBackward

pytestmark = pytest.mark.anyio

CE = {"loss_fn": "cross_entropy"}


def tensor(values: list, dtype: str = "float32", shape: list[int] | None = None) -> dict:
    return {"data": values, "dtype": dtype, "shape": shape or [len(values)]}


def datum(tokens: list[int], targets: list[int], **inputs: object) -> dict:
    return {
        "model_input": {"input_ids": tokens},
        "loss_fn_inputs": {"target_tokens": tensor(targets, "int64"), **inputs},
    }


def supervised(*data: dict, **more: object) -> dict:
    return {"forward_backward_input": {"loss_fn": "cross_entropy", "data": list(data)}, **more}


def rl(loss_fn: str, params: dict | None = None, **inputs: object) -> dict:
    given = {"logprobs": [-1.0, -2.0, -3.0], "advantages": [1.0, 0, -1], **inputs}
    return {
        "forward_backward_input": {
            "loss_fn": loss_fn,
            "loss_fn_params": params,
            "data": [datum([5, 9, 2], [9, 2, 7], **{k: v for k, v in given.items() if v is not None})],
        }
    }


async def test_supervised_step_as_the_client_sends_it(server: Server):
    body = supervised(datum([5, 9, 2], [9, 2, 7], weights=tensor([0.0, 1.0, 1.0])), model_id="default", seq_id=1)
    result = await server.do("forward_backward", body)
    assert result == {
        "loss_fn_output_type": "CrossEntropyLossReturn",
        "loss_fn_outputs": [
            {
                "logprobs": {"data": [-5.0, -3.0, -3.0], "dtype": "float32", "shape": [3]},
                "elementwise_loss": {"data": [0.0, 3.0, 3.0], "dtype": "float32", "shape": [3]},
            }
        ],
        "metrics": {"loss:sum": 6.0, "loss:mean": 3.0, "valid_tokens:sum": 2.0},
        "info": {},
    }
    adam = {"learning_rate": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 5.0}
    step = await server.do("optim_step", {"model_id": "default", "seq_id": 2, "adam_params": adam})
    assert step == {"metrics": {"grad_norm": 2.0, "learning_rate": 0.5, "step": 1}, "info": {}}


async def test_json_divides_by_tokens_at_the_step(server: Server):
    await server.do("forward_backward", supervised(datum([1, 2], [2, 3])))
    assert server.engine.sent(ForwardBackward)[0].token_mean


async def test_labels_are_shifted(server: Server):
    data = [
        {"model_input": {"input_ids": [5, 9, 2]}, "loss_fn_inputs": {"labels": [-100, 9, 2], "weights": [7, 1, 0.5]}}
    ]
    result = await server.do("forward", {"forward_input": {"data": data}})
    (output,) = result["loss_fn_outputs"]
    assert output["logprobs"]["data"] == [-5.0, -3.0]
    assert output["elementwise_loss"]["data"] == [5.0, 1.5]


@pytest.mark.parametrize(
    "model_input",
    [
        {"input_ids": [5, 9, 2]},
        {"input_ids": tensor([5, 9, 2], "int64")},
        {"input_ids": [5.0, 9, 2]},
        {"chunks": [{"type": "encoded_text", "tokens": [5]}, {"type": "encoded_text", "tokens": [9, 2]}]},
    ],
)
async def test_every_spelling_of_model_input_means_the_same(server: Server, model_input: dict):
    body = supervised({"model_input": model_input, "loss_fn_inputs": {"target_tokens": [9, 2, 7.0]}})
    await server.do("forward_backward", body)
    (command,) = server.engine.sent(ForwardBackward)
    assert np.frombuffer(command.datums.tokens, np.int32).tolist() == [5, 9, 2]
    assert np.frombuffer(command.datums.targets, np.int32).tolist() == [9, 2, 7]


async def test_soft_targets_of_different_width_come_back_in_theirs(server: Server):
    wide = tensor([1, 2, 3, 4, 5, 6], "int64", [2, 3])
    body = supervised(
        {
            "model_input": {"input_ids": [1, 2]},
            "loss_fn_inputs": {"target_tokens": wide, "weights": tensor([0.5, 0.25, 0.25, 1, 0, 0], shape=[2, 3])},
        },
        datum([5, 9, 2], [9, 2, 7]),
    )
    soft, hard = (await server.do("forward_backward", body))["loss_fn_outputs"]
    assert soft["logprobs"] == tensor([-2.0, -3.0, -4.0, -5.0, -1.0, -2.0], shape=[2, 3])
    assert hard["logprobs"] == tensor([-5.0, -3.0, -3.0])
    assert soft["elementwise_loss"]["data"] == [2.75, 5.0]
    assert hard["elementwise_loss"]["data"] == [5.0, 3.0, 3.0]


async def test_long_lists_mean_what_short_ones_do(server: Server):
    """Long enough for the reader that makes arrays of them."""
    num_tokens, targets = 60, [7 * i % 100 for i in range(60)]
    values = [-i / 7 for i in range(num_tokens)]
    tensors = [values, tensor(values), [[value] for value in values], tensor(values, shape=[num_tokens, 1])]
    for spelling in tensors:
        body = rl("ppo", logprobs=spelling, advantages=spelling)
        body["forward_backward_input"]["data"] = [
            datum(targets, targets, **{"logprobs": spelling, "advantages": spelling, "unknown": ["text"] * 50})
        ] * 3
        await server.do("forward_backward", body)
    commands = server.engine.sent(ForwardBackward)
    assert len(commands) == len(tensors)
    assert all(command.datums == commands[0].datums for command in commands)
    columns = {"tokens": np.int32, "targets": np.int32}
    for name, dtype in columns.items():
        assert np.frombuffer(getattr(commands[0].datums, name), dtype).tolist() == targets * 3
    assert np.frombuffer(commands[0].datums.loss_inputs["advantages"], np.float32).tolist() == [
        float(np.float32(value)) for value in values * 3
    ]


async def test_forward_leaves_the_gradient_alone(server: Server):
    await server.do("forward", {"forward_input": {"data": [datum([1, 2], [2, 3])]}})
    assert (await server.do("optim_step", {"learning_rate": 0.1}))["metrics"]["grad_norm"] == 0


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "gspo", "policy_loss", "drgrpo"])
async def test_rl_losses_need_logprobs_and_advantages(server: Server, name: str):
    result = await server.do("forward_backward", rl(name))
    assert result["loss_fn_output_type"] == "TorchLossReturn"
    assert list(result["loss_fn_outputs"][0]) == ["logprobs"]
    for missing in ("logprobs", "advantages"):
        detail = await server.refused("forward_backward", rl(name, **{missing: None}))
        assert detail.startswith(f"data[0].loss_fn_inputs.{missing}: missing")


async def test_options_reach_the_loss(server: Server):
    from xorl.types import DrGrpo, Ppo

    await server.do("forward_backward", rl("ppo", {"clip_low_threshold": 0.9, "compute_kl_stats": 1.0}))
    old = {"logprobs": None, "old_logprobs": [-1, -2, -3], "ref_logprobs": [-1, -2, -3]}
    await server.do("forward_backward", rl("drgrpo", {"beta": 0.1, "kl_type": "k1", "clip_low": None}, **old))
    ppo, drgrpo = server.engine.sent(ForwardBackward)
    assert ppo.loss == Ppo(clip_low_threshold=0.9, compute_kl_stats=True)
    assert drgrpo.loss == DrGrpo(beta=0.1, kl_type="k1")
    assert set(drgrpo.datums.loss_inputs) == {"logprobs", "advantages", "ref_logprobs"}


@pytest.mark.parametrize(
    ("inputs", "place"),
    [
        ({"logprobs": [-1.0, 0.5, -1.0]}, "data[0].loss_fn_inputs.logprobs: 0.5 at position 1"),
        ({"logprobs": [-1.0, -1.0]}, "data[0].loss_fn_inputs.logprobs: length 2 does not match model_input length 3"),
        ({"advantages": [1e300, 0, 0]}, "data[0].loss_fn_inputs.advantages: inf at position 0"),
        ({"advantages": [True, 0, 0]}, "data[0].loss_fn_inputs.advantages: expected numbers, found bool"),
        ({"advantages": ["1", 0, 0]}, "data[0].loss_fn_inputs.advantages: expected numbers, found str"),
        ({"target_tokens": [9, 2, 7.5]}, "data[0].loss_fn_inputs.target_tokens: 7.5 at position 2"),
        ({"target_tokens": [9, 2, True]}, "data[0].loss_fn_inputs.target_tokens: expected numbers"),
        ({"target_tokens": [9, 100, 7]}, "data[0].loss_fn_inputs.target_tokens: 100 at position 1"),
        ({"target_tokens": [9, -1, 7]}, "data[0].loss_fn_inputs.target_tokens: -1 at position 1"),
        ({"target_tokens": [[9, 1]] * 3}, "data[0].loss_fn_inputs.target_tokens: two dimensions"),
        ({"target_tokens": tensor([9, 1], "int64", [3])}, "data[0].loss_fn_inputs.target_tokens: shape [3]"),
        ({"weights": [[1, 1]] * 3}, "data[0].loss_fn_inputs.weights: shape (3, 2)"),
        ({"advantages": {"dtype": "float32"}}, "data[0].loss_fn_inputs.advantages.data: missing"),
    ],
)
async def test_a_bad_input_is_named(server: Server, inputs: dict, place: str):
    response = await server.http.post("/api/v1/forward_backward", json=rl("ppo", **inputs))
    assert response.status_code in (400, 422)
    assert response.json()["detail"].startswith(place)
    assert not server.engine.commands


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ([], "data: empty"),
        ([datum([], [])], "data[0].model_input: 0 tokens"),
        ([datum([1] * 65, [1] * 65)], "data[0].model_input: 65 tokens; 1 to 64"),
        ([datum([1], [1]), datum([1, 100], [1, 1])], "data[1].model_input: 100 at position 1"),
        ([datum([1], [1]), datum([1, 1.5], [1, 1])], "data[1].model_input: 1.5 at position 1"),
        ([{"model_input": {"input_ids": [1, 2]}}], "data[0].loss_fn_inputs.target_tokens: missing"),
        ([{"model_input": {}, "loss_fn_inputs": {"target_tokens": [1]}}], "data[0].model_input: needs"),
        ([datum([1], [1]), {"loss_fn_inputs": {}}], "data[1].model_input: missing"),
        ([{"model_input": {"chunks": [{"type": "image"}]}}], "data[0].model_input.chunks[0]: only encoded_text"),
        ([{"model_input": {"input_ids": [1]}, "loss_fn_inputs": {"labels": [1]}}], "data[0].loss_fn_inputs.labels"),
    ],
)
async def test_a_bad_datum_is_named(server: Server, data: list, place: str):
    response = await server.http.post("/api/v1/forward_backward", json=supervised(*data))
    assert response.status_code in (400, 422)
    assert response.json()["detail"].startswith(place)


@pytest.mark.parametrize(
    ("loss_fn", "params", "place"),
    [
        ("nll", None, "loss_fn: there is no loss 'nll'"),
        ("ppo", {"eps": 0.2}, "loss_fn_params.eps: ppo has no such option"),
        ("ppo", {"clip_low_threshold": "low"}, "loss_fn_params: Expected `float`"),
        ("drgrpo", {"kl_type": "k9"}, "loss_fn_params: Invalid enum value 'k9'"),
        ("drgrpo", {"beta": 0.1}, "data[0].loss_fn_inputs.ref_logprobs: missing"),
        ("policy_loss", {"logprob_temperature": 0}, "loss_fn_params.logprob_temperature: 0"),
    ],
)
async def test_a_bad_option_is_named(server: Server, loss_fn: str, params: dict | None, place: str):
    assert (await server.refused("forward_backward", rl(loss_fn, params))).startswith(place)


async def test_an_input_of_some_datums_only_is_refused_unless_it_has_a_default(server: Server):
    mixed = supervised(datum([1], [2], weights=[2.0]), datum([1], [2]))
    result = await server.do("forward_backward", mixed)
    assert [o["elementwise_loss"]["data"] for o in result["loss_fn_outputs"]] == [[6.0], [3.0]]
    body = rl("policy_loss", rollout_logprobs=[-1, -1, -1])
    body["forward_backward_input"]["data"].append(rl("policy_loss")["forward_backward_input"]["data"][0])
    assert (await server.refused("forward_backward", body)).startswith(
        "data[1].loss_fn_inputs.rollout_logprobs: missing"
    )


async def test_unknown_keys_are_ignored(server: Server):
    body = supervised(datum([1], [2], mask=[1.0], group="x"[:0] or None), model="name", type="forward_backward")
    assert "error" not in await server.do("forward_backward", body)


async def test_routing_is_refused_by_name_unless_empty(server: Server):
    body = supervised(datum([1], [2]))
    body["forward_backward_input"]["routed_experts"] = []
    assert "error" not in await server.do("forward_backward", body)
    body["forward_backward_input"]["routed_experts"] = [[[[1]]]]
    assert (await server.refused("forward_backward", body)).startswith("routed_experts:")


async def test_not_a_number_is_not_json(server: Server):
    body = '{"forward_backward_input": {"data": [], "x": NaN}}'
    response = await server.http.post(
        "/api/v1/forward_backward", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["detail"].startswith("body: not JSON")


async def test_the_rate_of_a_step_comes_from_the_nearest(server: Server):
    optimizer = {
        "type": "adamw",
        "learning_rate": 0.3,
        "betas": [0.8, 0.9],
        "weight_decay": 0.01,
        "optimizer_dtype": None,
    }
    body = {"model_id": "m", "base_model": "base", "optimizer_config": optimizer}
    await server.do("create_model", body)

    async def rate(model_id: str, **step: object) -> float:
        return (await server.do("optim_step", {"model_id": model_id, **step}))["metrics"]["learning_rate"]

    assert await rate("m") == 0.3
    assert await rate("m", adam_params={"learning_rate": 0.2}) == 0.2
    assert await rate("m", adam_params={"learning_rate": 0.2}, lr=0.1) == 0.1
    assert await rate("m", adam_params={"learning_rate": None}) == 0.3
    assert await rate("default") == 1e-4


async def test_step_parameters_are_checked(server: Server):
    for name, value in [("learning_rate", -1), ("beta1", 1.0), ("beta2", -0.1), ("eps", 0), ("grad_clip_norm", -1)]:
        detail = await server.refused("optim_step", {"adam_params": {name: value}})
        assert detail.startswith(f"adam_params.{name}:")
    assert "dimuon" in await server.refused("optim_step", {"optimizer_params": {"type": "dimuon"}})


async def test_session_id_names_the_model_too(server: Server):
    await server.create("m")
    ref = await server.post("/api/v1/optim_step", {"session_id": "m", "learning_rate": 0.1})
    assert ref["model_id"] == "m"
