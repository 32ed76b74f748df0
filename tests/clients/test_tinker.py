"""The tinker SDK 0.38.0, unmodified, against a real server."""

import math
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM

from builders import random_sequences

ADAM = types.AdamParams(learning_rate=5e-3)


@pytest.fixture
def service(trainer: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(base_url=trainer, api_key="tml-test")
    yield client
    client.close("success").result()


@pytest.fixture
def client(service: tinker.ServiceClient, tiny_model: Path) -> tinker.TrainingClient:
    return service.create_lora_training_client(tiny_model.name, rank=4, seed=3, train_unembed=False).result()


def data(seed: int = 0, lengths: tuple[int, ...] = (6, 11, 3), **inputs: list[np.ndarray]) -> list[types.Datum]:
    sequences = random_sequences(np.random.default_rng(seed), lengths)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(sequence[:-1]),
            loss_fn_inputs={
                "target_tokens": np.array(sequence[1:], np.int64),
                **{name: np.asarray(values[i], np.float32) for name, values in inputs.items()},
            },
        )
        for i, sequence in enumerate(sequences)
    ]


def ones(lengths: tuple[int, ...] = (6, 11, 3)) -> list[np.ndarray]:
    return [np.ones(length) for length in lengths]


def logprobs(output: types.ForwardBackwardOutput) -> list[list[float]]:
    return [entry["logprobs"].tolist() for entry in output.loss_fn_outputs]


def step(client: tinker.TrainingClient, batch: list[types.Datum], loss_fn: str = "cross_entropy") -> float:
    future = client.forward_backward(batch, loss_fn)
    update = client.optim_step(ADAM)
    update.result()
    return future.result().metrics["loss:sum"]


def test_the_loss_falls_and_logprobs_are_the_models_own(client: tinker.TrainingClient, tiny_model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    batch = data(weights=ones())
    output = client.forward(batch, "cross_entropy").result()
    for datum, ours in zip(batch, logprobs(output), strict=True):
        tokens = torch.tensor(datum.model_input.to_ints())
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].tolist())
        with torch.no_grad():
            expected = network(tokens[None]).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)
    losses = [step(client, batch) for _ in range(12)]
    assert losses[0] == pytest.approx(-sum(map(sum, logprobs(output))), rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]


def test_the_gradient_is_the_sum(client: tinker.TrainingClient) -> None:
    norms = []
    for scale in (1.0, 20.0):
        client.forward_backward(data(weights=[scale * w for w in ones()]), "cross_entropy").result()
        norms.append(client.optim_step(types.AdamParams(learning_rate=0)).result().metrics["grad_norm"])
    assert norms[1] == pytest.approx(20 * norms[0], rel=1e-4)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro"])
def test_rl_losses(client: tinker.TrainingClient, loss_fn: str) -> None:
    before = logprobs(client.forward(data(weights=ones()), "cross_entropy").result())
    batch = data(logprobs=[np.array(x) for x in before], advantages=[np.ones(6), -np.ones(11), np.zeros(3)])
    output = client.forward_backward(batch, loss_fn).result()
    client.optim_step(ADAM).result()
    assert output.metrics["ratio_mean:mean"] == pytest.approx(1, abs=1e-4)
    after = logprobs(client.forward(batch, loss_fn).result())
    assert np.mean(after[0]) > np.mean(before[0])
    assert np.mean(after[1]) < np.mean(before[1])


def test_loss_config_arrives(client: tinker.TrainingClient) -> None:
    before = logprobs(client.forward(data(weights=ones()), "cross_entropy").result())
    far = data(logprobs=[np.minimum(np.array(x) - 1, 0) for x in before], advantages=ones())
    clipped = client.forward(far, "ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}).result()
    assert clipped.metrics["loss:sum"] == pytest.approx(-1.1 * 20, rel=1e-3)


def test_a_custom_loss(client: tinker.TrainingClient) -> None:
    def square(batch: list[types.Datum], values: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        loss = sum((value**2).sum() for value in values)
        return loss, {"square": loss.item()}

    first = client.forward_backward_custom(data(), square).result().metrics["square"]
    for _ in range(8):
        client.optim_step(ADAM).result()
        last = client.forward_backward_custom(data(), square).result().metrics["square"]
    assert last < first


def test_soft_targets(client: tinker.TrainingClient) -> None:
    sequence = random_sequences(np.random.default_rng(0), (6,))[0]
    targets = np.stack([sequence[1:], np.roll(sequence[1:], 1)], axis=1).astype(np.int64)
    weights = np.tile([0.75, 0.25], (6, 1)).astype(np.float32)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(sequence[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )
    output = client.forward_backward([datum], "cross_entropy").result()
    values = np.array(output.loss_fn_outputs[0]["logprobs"].tolist()).reshape(6, 2)
    assert output.metrics["loss:sum"] == pytest.approx(-(values * weights).sum(), rel=1e-4)


def test_save_train_load_restores_exactly(client: tinker.TrainingClient) -> None:
    batch = data(weights=ones())
    for _ in range(3):
        step(client, batch)
    path = client.save_state("before").result().path
    assert path.startswith("tinker://")
    saved = logprobs(client.forward(batch, "cross_entropy").result())
    continued = [step(client, batch) for _ in range(3)]
    client.load_state_with_optimizer(path).result()
    assert logprobs(client.forward(batch, "cross_entropy").result()) == saved
    assert [step(client, batch) for _ in range(3)] == continued


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_new_model_starts_from_state(
    service: tinker.ServiceClient, client: tinker.TrainingClient, with_optimizer: bool
) -> None:
    batch = data(weights=ones())
    step(client, batch)
    path = client.save_state("a").result().path
    saved = logprobs(client.forward(batch, "cross_entropy").result())
    create = (
        service.create_training_client_from_state_with_optimizer
        if with_optimizer
        else service.create_training_client_from_state
    )
    resumed = create(path).result()
    assert logprobs(resumed.forward(batch, "cross_entropy").result()) == saved
    assert resumed.get_info().model_data.model_name


def test_default_options_train_the_unembedding_too(service: tinker.ServiceClient, tiny_model: Path) -> None:
    client = service.create_lora_training_client(tiny_model.name, rank=2).result()
    losses = [step(client, data(weights=ones())) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_errors_name_their_field_and_harm_nothing(client: tinker.TrainingClient) -> None:
    client.forward_backward(data(weights=ones()), "cross_entropy").result()
    short = data(weights=[np.ones(6), np.ones(10), np.ones(3)])
    with pytest.raises(tinker.BadRequestError, match=r"data\[1\].loss_fn_inputs.weights"):
        client.forward_backward(short, "cross_entropy").result()
    with pytest.raises(tinker.BadRequestError, match="finite"):
        client.forward_backward(data(weights=[np.full(6, np.nan), np.ones(11), np.ones(3)]), "cross_entropy").result()
    assert client.optim_step(ADAM).result().metrics["grad_norm"] > 0


def test_rest_reads(client: tinker.TrainingClient, trainer: str, tiny_model: Path) -> None:
    path = client.save_state("a").result().path
    sampling = client.save_weights_for_sampler("b").result().path
    rest = tinker.RestClient(base_url=trainer, api_key="tml-test")
    info = client.get_info()
    run = rest.get_training_run(info.model_id).result()
    assert (run.training_run_id, run.lora_rank) == (info.model_id, 4)
    assert info.model_id in [r.training_run_id for r in rest.list_training_runs(limit=100).result().training_runs]
    listed = rest.list_checkpoints(info.model_id).result().checkpoints
    assert {row.tinker_path for row in listed} == {path, sampling}
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    assert any(row.tinker_path == path for row in rest.list_user_checkpoints().result().checkpoints)
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert [row.tinker_path for row in rest.list_checkpoints(info.model_id).result().checkpoints] == [sampling]
    models = rest.get_server_capabilities().result().supported_models
    assert tiny_model.name in [model.model_name for model in models]
    assert rest.list_sessions().result().sessions


@pytest.fixture
def endpoint(trainer: str, sampler: str) -> Iterator[None]:
    address = {"host": urlsplit(sampler).hostname, "port": urlsplit(sampler).port}
    assert httpx.post(f"{trainer}/add_inference_endpoint", json=address).json()["success"]
    yield
    assert httpx.post(f"{trainer}/remove_inference_endpoint", json=address).json()["success"]


def trained_logprobs(client: tinker.TrainingClient, tokens: list[int]) -> list[float]:
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:], np.int64),
            "weights": np.ones(len(tokens) - 1, np.float32),
        },
    )
    return logprobs(client.forward([datum], "cross_entropy").result())[0]


@pytest.mark.usefixtures("endpoint")
def test_sampling_from_the_trained_weights(client: tinker.TrainingClient) -> None:
    for _ in range(3):
        step(client, data(weights=ones()))
    sampling = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([5, 9, 2, 17])
    params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=11, stop=[])
    response = sampling.sample(prompt, num_samples=3, sampling_params=params).result()
    assert len(response.sequences) == 3
    for sequence in response.sequences:
        ours = trained_logprobs(client, [5, 9, 2, 17, *sequence.tokens])[3:]
        np.testing.assert_allclose(sequence.logprobs, ours, atol=2e-4)
    again = sampling.sample(prompt, num_samples=3, sampling_params=params).result()
    assert [s.tokens for s in again.sequences] == [s.tokens for s in response.sequences]
    values = sampling.compute_logprobs(prompt).result()
    assert values[0] is None or math.isnan(values[0])
    np.testing.assert_allclose(values[1:], trained_logprobs(client, [5, 9, 2, 17]), atol=2e-4)


@pytest.mark.usefixtures("endpoint")
def test_sampling_clients_from_a_path_and_from_the_base(
    service: tinker.ServiceClient, client: tinker.TrainingClient, tiny_model: Path
) -> None:
    for _ in range(3):
        step(client, data(weights=ones()))
    path = client.save_weights_for_sampler("policy").result().path
    sampling = service.create_sampling_client(model_path=path).result()
    prompt = [5, 9, 2, 17, 8]
    trained = sampling.compute_logprobs(types.ModelInput.from_ints(prompt)).result()[1:]
    np.testing.assert_allclose(trained, trained_logprobs(client, prompt), atol=2e-4)
    assert service.create_sampling_client(base_model=tiny_model.name).result()
