"""The tinker SDK's dialect: protobuf, checked against the SDK's own code, and its extra routes."""

import numpy as np
import pytest
import zstandard
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from inprocess import Server
from xorl.engine.commands import CreateModel, Forward, ForwardBackward, LoadWeights, UnloadModel
from xorl.types import Cispo

pytestmark = pytest.mark.anyio

MODEL = "s1:train:0"
PROTOBUF = {"content-type": "application/x-protobuf"}


@pytest.fixture
async def tinker(server: Server) -> Server:
    lora = {"rank": 8, "train_unembed": True, "train_mlp": True, "train_attn": True}
    await server.do("create_model", {"session_id": "s1", "model_seq_id": 0, "base_model": "base", "lora_config": lora})
    return server


def floats(values: list, shape: list[int] | None = None) -> types.TensorData:
    return types.TensorData(data=values, dtype="float32", shape=shape or [len(values)])


def ints(values: list, shape: list[int] | None = None) -> types.TensorData:
    return types.TensorData(data=values, dtype="int64", shape=shape or [len(values)])


def datum(tokens: list[int], **inputs: types.TensorData) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def request(
    *data: types.Datum, loss_fn: str = "cross_entropy", config: dict | None = None, seq_id: int = 1, only: bool = False
) -> pb.ForwardBackwardRequest:
    given = ForwardBackwardInput(data=list(data), loss_fn=loss_fn, loss_fn_config=config)
    message = forward_backward_request_to_proto(
        ForwardBackwardRequest(model_id=MODEL, seq_id=seq_id, forward_backward_input=given)
    )
    message.forward_only = only
    return message


async def submit(server: Server, message: pb.ForwardBackwardRequest, status: int = 200, **headers: str) -> dict:
    body = message.SerializeToString()
    if headers:
        body = zstandard.compress(body)
    response = await server.http.post("/api/v1/forward_backward", content=body, headers={**PROTOBUF, **headers})
    assert response.status_code == status, response.text
    return response.json()


async def run(server: Server, message: pb.ForwardBackwardRequest):
    ref = await submit(server, message)
    headers = {"accept": "application/x-protobuf"}
    response = await server.http.post(
        "/api/v1/retrieve_future", json={"request_id": ref["request_id"]}, headers=headers
    )
    assert response.headers["content-type"] == "application/x-protobuf"
    return deserialize_forward_backward_output(response.content)


SIMPLE = datum([5, 9, 2], target_tokens=ints([9, 2, 7]), weights=floats([0.0, 1.0, 1.0]))


async def test_forward_backward(tinker: Server):
    output = await run(tinker, request(SIMPLE, datum([1], target_tokens=ints([3]))))
    assert [o["logprobs"].tolist() for o in output.loss_fn_outputs] == [[-5.0, -3.0, -3.0], [-4.0]]
    assert [o["logprobs"].shape for o in output.loss_fn_outputs] == [[3], [1]]
    assert output.metrics["loss:sum"] == 10.0
    assert all(key.count(":") == 1 for key in output.metrics)
    (command,) = tinker.engine.sent(ForwardBackward)
    assert not command.token_mean  # tinker's gradient is the sum


async def test_requests_are_counted_under_their_path(tinker: Server):
    await submit(tinker, request(SIMPLE))
    page = (await tinker.http.get("/metrics")).text
    assert 'path="/api/v1/forward_backward",status="200"} 1.0' in page
    assert 'xorl_tokens_total{call="forward_backward"} 3.0' in page


async def test_the_json_form_of_the_result_is_there_too(tinker: Server):
    ref = await submit(tinker, request(SIMPLE))
    assert ref["model_id"] == MODEL
    result = await tinker.retrieve(ref["request_id"])
    assert result["loss_fn_outputs"][0]["logprobs"]["data"] == [-5.0, -3.0, -3.0]


async def test_forward_only(tinker: Server):
    await run(tinker, request(SIMPLE, only=True))
    assert len(tinker.engine.sent(Forward)) == 1
    assert not tinker.engine.sent(ForwardBackward)


async def test_options_are_numbers_or_text(tinker: Server):
    inputs = {"logprobs": floats([-1, -1, -1]), "advantages": floats([1, 1, 1]), "target_tokens": ints([1, 2, 3])}
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "compute_kl_stats": 1.0}
    await run(tinker, request(datum([1, 2, 3], **inputs), loss_fn="cispo", config=config))
    assert tinker.engine.sent(ForwardBackward)[0].loss == Cispo(
        clip_low_threshold=0.8, clip_high_threshold=1.2, compute_kl_stats=True
    )
    legacy = request(datum([1, 2, 3], **inputs), loss_fn="cispo", seq_id=2)
    legacy.loss_fn_config["clip_low_threshold"] = 0.5
    await run(tinker, legacy)
    assert tinker.engine.sent(ForwardBackward)[1].loss == Cispo(clip_low_threshold=0.5)


async def test_soft_targets_dense_and_sparse_are_the_same(tinker: Server):
    targets = np.array([[3, 4, 0, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0]])
    weights = np.array([[0.5, 0.5, 0, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0, 0, 0]], dtype=np.float32)
    import torch

    dense = datum(
        [1, 2], target_tokens=ints(targets.ravel().tolist(), [2, 8]), weights=floats(weights.ravel().tolist(), [2, 8])
    )
    sparse = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch_sparse(torch.from_numpy(targets)),
            "weights": types.TensorData.from_torch_sparse(torch.from_numpy(weights)),
        },
    )
    message = request(sparse)
    assert message.data[0].loss_fn_inputs["weights"].WhichOneof("encoding") == "sparse_csr"
    output = await run(tinker, request(dense, SIMPLE))
    again = await run(tinker, request(sparse, SIMPLE, seq_id=2))
    assert output.loss_fn_outputs[0]["logprobs"].shape == [2, 8] == again.loss_fn_outputs[0]["logprobs"].shape
    assert output.loss_fn_outputs[1]["logprobs"].shape == [3]
    assert output.loss_fn_outputs[0]["logprobs"].tolist() == again.loss_fn_outputs[0]["logprobs"].tolist()
    one, two = tinker.engine.sent(ForwardBackward)
    assert one.datums == two.datums


async def test_zstd(tinker: Server):
    ref = await submit(tinker, request(SIMPLE), **{"content-encoding": "zstd"})
    assert "metrics" in await tinker.retrieve(ref["request_id"])


async def test_zstd_has_a_bound(serve):
    async with serve(max_body_mb=64) as server:
        bomb = zstandard.compress(b"\0" * (65 * 2**20))
        headers = {**PROTOBUF, "content-encoding": "zstd"}
        for body, status in ((bomb, 413), (b"not zstd", 400)):
            response = await server.http.post("/api/v1/forward_backward", content=body, headers=headers)
            assert response.status_code == status


async def test_a_repeat_gets_the_first_request_id(tinker: Server):
    first = await submit(tinker, request(SIMPLE))
    assert await submit(tinker, request(SIMPLE)) == first
    refused = await submit(tinker, request(SIMPLE, SIMPLE), 400)
    assert refused["detail"].startswith("seq_id: 1 of s1:train:0")
    assert len(tinker.engine.sent(ForwardBackward)) == 1


def broken(change) -> pb.ForwardBackwardRequest:
    message = request(SIMPLE)
    change(message)
    return message


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.data[0].loss_fn_inputs["weights"].shape.append(2), "data[0].loss_fn_inputs.weights: shape [3, 2]"),
        (
            lambda m: setattr(m.data[0].loss_fn_inputs["weights"], "dense", b"123"),
            "data[0].loss_fn_inputs.weights: 3 b",
        ),
        (lambda m: setattr(m.data[0].loss_fn_inputs["weights"], "dtype", 4), "data[0].loss_fn_inputs.weights: unsupp"),
        (lambda m: setattr(m.data[0].model_input[0].image, "data", b"x"), "data[0].model_input[0]: only encoded_text"),
        (lambda m: setattr(m.data[0].model_input[0].encoded_text, "tokens", b"\xff\xff\xff\xff"), "data[0]"),
        (lambda m: m.ClearField("data"), "data: empty"),
        (lambda m: setattr(m, "loss_fn", "nope"), "loss_fn:"),
        (lambda m: setattr(m, "model_id", "s1:train:9"), "model_id: s1:train:9 is not registered"),
        (
            lambda m: setattr(
                m.data[0].loss_fn_inputs["weights"], "dense", np.array([np.nan, 1, 1], np.float32).tobytes()
            ),
            "data[0].loss_fn_inputs.weights: nan at position 0",
        ),
        (lambda m: m.data[0].loss_fn_inputs["target_tokens"].sparse_csr.SetInParent(), "data[0].loss_fn_inputs.target"),
    ],
)
async def test_what_is_wrong_is_named(tinker: Server, change, place: str):
    refused = await submit(tinker, broken(change), 400)
    assert refused["detail"].startswith(place)


async def test_what_is_not_protobuf_is_refused(tinker: Server):
    response = await tinker.http.post("/api/v1/forward_backward", content=b"\xff" * 20, headers=PROTOBUF)
    assert response.status_code == 400
    assert response.json()["detail"].startswith("body: not a ForwardBackwardRequest")


async def test_the_table_is_the_sdks_own():
    """Numbers and wire types of every field that we know equal those of the SDK."""
    from xorl.server.tinker_proto import _CLASSES

    names = {"EncodedText": "EncodedTextChunk"}
    wire = {5: 0, 3: 0, 14: 0, 8: 0, 13: 0, 1: 1, 9: 2, 11: 2, 12: 2}  # field type -> wire type
    for name, ours in _CLASSES.items():
        theirs = pb.DESCRIPTOR.message_types_by_name[names.get(name, name)]
        for field in ours.DESCRIPTOR.fields:
            other = theirs.fields_by_name[field.name]
            assert (field.number, wire[field.type]) == (other.number, wire[other.type]), f"{name}.{field.name}"


async def test_save_and_create_from_it(tinker: Server):
    saved = await tinker.do("save_weights", {"model_id": MODEL, "path": "a", "seq_id": 1, "overwrite": False})
    assert saved["path"] == "tinker://s1:train:0/weights/a"
    assert (tinker.output_dir / "s1%3Atrain%3A0" / "weights" / "a").is_dir()
    body = {"session_id": "s1", "model_seq_id": 1, "path": saved["path"], "optimizer": True, "type": "load_weights"}
    made = await tinker.post("/api/v1/load_weights", body)
    assert await tinker.post("/api/v1/load_weights", body) == made
    result = await tinker.retrieve(made["request_id"])
    assert result == {"model_id": "s1:train:1", "path": saved["path"], "type": "load_weights"}
    first, second = tinker.engine.sent(CreateModel)
    assert second.lora == first.lora
    assert len(tinker.engine.sent(LoadWeights)) == 1
    info = await tinker.post("/api/v1/get_info", {"model_id": "s1:train:1"})
    assert info["lora_rank"] == 8
    await tinker.refused("load_weights", {**body, "model_seq_id": 2, "path": "tinker://s1:train:0/weights/no"}, 404)
    await tinker.refused("get_info", {"model_id": "s1:train:2"})


async def test_a_model_whose_checkpoint_cannot_be_loaded_is_not_left_behind(tinker: Server):
    saved = await tinker.do("save_weights", {"model_id": MODEL, "path": "a"})
    tinker.engine.gate.clear()
    body = {"session_id": "s1", "model_seq_id": 1, "path": saved["path"]}
    ref = await tinker.post("/api/v1/load_weights", body)
    (tinker.output_dir / "s1%3Atrain%3A0/weights/a/manifest.json").unlink()
    tinker.engine.gate.set()
    assert "error" in await tinker.retrieve(ref["request_id"])
    await tinker.refused("get_info", {"model_id": "s1:train:1"})
    assert tinker.engine.sent(UnloadModel)[0].model_id == "s1:train:1"


async def test_a_checkpoint_that_cannot_be_loaded_costs_no_model_that_was_there(tinker: Server):
    await tinker.do("optim_step", {"model_id": MODEL, "seq_id": 1})
    body = {"session_id": "s1", "model_seq_id": 0, "path": "tinker://s1:train:0/weights/nope"}
    assert "error" in await tinker.do("load_weights", body)
    assert (await tinker.do("optim_step", {"model_id": MODEL, "seq_id": 2}))["metrics"]["step"] == 2


async def test_start_up(server: Server):
    assert await server.post("/api/v1/client/config", {"sdk_version": "0.38.0"}) == {"parallel_fwdbwd_chunks": False}
    assert await server.post("/api/v1/client/dynamic_config", {}) == {}
    assert await server.post("/api/v1/telemetry", {"events": []}) == {"status": "accepted"}
    session = await server.post("/api/v1/create_session", {"type": "create_session"})
    session_id = session["session_id"]
    assert await server.post(f"/api/v1/sessions/{session_id}/finish", {"reason": {"type": "close"}}) is None
    capabilities = await server.get("/api/v1/get_server_capabilities")
    assert capabilities["supported_models"][0]["model_name"] == "tiny/base"
    assert capabilities["supported_models"][0]["max_context_length"] == 64
    await server.do("create_model", {"session_id": session_id, "model_seq_id": 0, "base_model": "tiny/base"})
    assert await server.get("/api/v1/sessions") == {"sessions": [session_id]}
    assert await server.get(f"/api/v1/sessions/{session_id}") == {
        "training_run_ids": [f"{session_id}:train:0"],
        "sampler_ids": [],
    }
    await server.get("/api/v1/sessions/nope", 404)


async def test_runs_and_their_checkpoints(tinker: Server):
    await tinker.do("save_weights", {"model_id": MODEL, "path": "a"})
    run = types.TrainingRun.model_validate(await tinker.get(f"/api/v1/training_runs/{MODEL}"))
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == "tinker://s1:train:0/weights/a"
    listed = await tinker.get(f"/api/v1/training_runs/{MODEL}/checkpoints")
    assert listed["checkpoints"][0]["checkpoint_id"] == "weights/a"
    everything = await tinker.get("/api/v1/checkpoints")
    assert everything["cursor"]["total_count"] == 1
    deleted = await tinker.http.delete(f"/api/v1/training_runs/{MODEL}/checkpoints/weights/a")
    assert deleted.status_code == 204
    assert (await tinker.http.delete(f"/api/v1/training_runs/{MODEL}/checkpoints/weights/a")).status_code == 404
    await tinker.get("/api/v1/training_runs/nope", 404)
