"""xorl-client 0.1.0, unmodified, against a real server."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
import xorl_client
from transformers import AutoModelForCausalLM
from xorl_client import types

from clients.datums import data, logprobs, tensor

ADAM = types.AdamParams(learning_rate=5e-3)


@pytest.fixture
def service(trainer: str) -> Iterator[xorl_client.ServiceClient]:
    with xorl_client.ServiceClient(base_url=trainer) as client:
        yield client


@pytest.fixture
def create(
    service: xorl_client.ServiceClient, tiny_model: Path, model_id: str
) -> Callable[..., xorl_client.TrainingClient]:
    def make(model_id: str = model_id, rank: int = 4) -> xorl_client.TrainingClient:
        return service.create_lora_training_client(tiny_model.name, rank=rank, alpha=8, model_id=model_id)

    return make


def step(
    client: xorl_client.TrainingClient, batch: list[types.Datum], **options: object
) -> types.ForwardBackwardOutput:
    future = client.forward_backward(batch, **options)
    update = client.optim_step(ADAM)
    update.result()
    return future.result()


def test_the_loss_falls(create: Callable[..., xorl_client.TrainingClient]) -> None:
    client = create()
    losses = [step(client, data()).metrics["loss:mean"] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_logprobs_are_the_models_own_in_input_order(
    create: Callable[..., xorl_client.TrainingClient], tiny_model: Path
) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    batch = data(lengths=(2, 9, 4, 9, 1))
    output = create().forward(batch).result()
    assert len(output.loss_fn_outputs) == len(batch)
    for datum, ours in zip(batch, logprobs(output), strict=True):
        tokens = torch.tensor(datum.model_input.to_ints())
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].tolist())
        with torch.no_grad():
            expected = network(tokens[None]).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)


def test_forward_equals_forward_backward(create: Callable[..., xorl_client.TrainingClient]) -> None:
    client = create()
    step(client, data())
    forward = client.forward(data()).result()
    both = client.forward_backward(data()).result()
    assert logprobs(forward) == logprobs(both)
    assert forward.metrics == both.metrics


def test_two_accumulated_calls_equal_one(create: Callable[..., xorl_client.TrainingClient]) -> None:
    client, batch = create(), data()
    start = client.save_state("start").result().path
    results = []
    for parts in ([batch], [batch[:1], batch[1:]]):
        client.load_state_with_optimizer(start).result()
        for part in parts:
            client.forward_backward(part)
        metrics = client.optim_step(ADAM).result().metrics
        results.append((metrics["grad_norm"], np.concatenate(logprobs(client.forward(batch).result()))))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-4)


def test_save_train_load_restores_exactly(create: Callable[..., xorl_client.TrainingClient]) -> None:
    client = create()
    for _ in range(3):
        step(client, data())
    path = client.save_state("before").result().path
    saved = logprobs(client.forward(data()).result())
    continued = [step(client, data(1)).metrics["loss:sum"] for _ in range(3)]
    client.load_state_with_optimizer(path).result()
    assert logprobs(client.forward(data()).result()) == saved
    assert [step(client, data(1)).metrics["loss:sum"] for _ in range(3)] == continued


def test_a_new_client_resumes_from_state(
    create: Callable[..., xorl_client.TrainingClient], service: xorl_client.ServiceClient, model_id: str
) -> None:
    client = create()
    step(client, data())
    path = client.save_state().result().path
    saved = logprobs(client.forward(data()).result())
    client.unload().result()
    resumed = service.create_training_client_from_state_with_optimizer(path, rank=4)
    assert resumed.model_id == model_id
    assert logprobs(resumed.forward(data()).result()) == saved
    assert resumed.optim_step(ADAM).result().metrics["grad_norm"] == 0


@pytest.mark.parametrize(
    ("loss_fn", "params"),
    [
        ("importance_sampling", {}),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", {}),
        ("dro", {"beta": 0.1}),
        ("gspo", {}),
        ("policy_loss", {"eps_clip": 0.1, "compute_kl_stats": True}),
        ("drgrpo", {"ratio_type": "sequence"}),
    ],
)
def test_rl_losses_raise_what_was_rewarded(
    create: Callable[..., xorl_client.TrainingClient], loss_fn: str, params: dict[str, object]
) -> None:
    client = create()
    before = logprobs(client.forward(data(lengths=(6, 11))).result())
    batch = data(lengths=(6, 11), logprobs=[np.array(x) for x in before], advantages=[np.ones(6), -np.ones(11)])
    output = client.forward_backward(batch, loss_fn=loss_fn, loss_fn_params=params).result()
    client.optim_step(ADAM).result()
    assert output.metrics["ratio_mean:mean"] == pytest.approx(1, abs=1e-4)
    assert output.metrics["kl_sample_train_k3:mean"] == pytest.approx(0, abs=1e-4)
    assert {"ratio_min:min", "ratio_max:max", "loss:sum", "valid_tokens:sum"} <= set(output.metrics)
    after = logprobs(client.forward(batch, loss_fn=loss_fn, loss_fn_params=params).result())
    assert np.mean(after[0]) > np.mean(before[0])
    assert np.mean(after[1]) < np.mean(before[1])


def test_errors_name_their_field_and_harm_nothing(create: Callable[..., xorl_client.TrainingClient]) -> None:
    client = create()
    client.forward_backward(data()).result()
    short = data()
    short[1].loss_fn_inputs["target_tokens"] = tensor([5], "int64")
    with pytest.raises(xorl_client.BadRequestError, match=r"data\[1\].loss_fn_inputs.target_tokens"):
        client.forward_backward(short).result()
    with pytest.raises(xorl_client.BadRequestError, match="advantages"):
        client.forward_backward(data(logprobs=[-np.ones(n) for n in (6, 11, 3)]), loss_fn="ppo").result()
    with pytest.raises(xorl_client.BadRequestError, match="clip_lo"):
        client.forward_backward(data(), loss_fn="ppo", loss_fn_params={"clip_lo": 1}).result()
    with pytest.raises(xorl_client.BadRequestError, match="loss_fn"):
        client.forward_backward(data(), loss_fn="miles").result()
    outside = data()
    outside[0].loss_fn_inputs["target_tokens"] = tensor([5000] * 6, "int64")
    with pytest.raises(xorl_client.BadRequestError, match=r"data\[0\].loss_fn_inputs.target_tokens"):
        client.forward_backward(outside).result()
    assert client.optim_step(ADAM).result().metrics["grad_norm"] > 0


def test_checkpoints_are_listed_described_and_deleted(
    create: Callable[..., xorl_client.TrainingClient], service: xorl_client.ServiceClient, model_id: str
) -> None:
    client = create()
    rest = service.create_rest_client(model_id)
    training = client.save_state("a").result().path
    sampling = client.save_weights_for_sampler("b").result().path
    assert (training, sampling) == (f"xorl://{model_id}/weights/a", f"xorl://{model_id}/sampler_weights/b")
    listed = {row.checkpoint_id: row for row in rest.list_checkpoints().result().checkpoints}
    assert set(listed) == {"weights/a", "sampler_weights/b"}
    client.delete_checkpoint_from_xorl_path(training).result()
    client.delete_checkpoint("sampler_weights/b").result()
    assert not rest.list_checkpoints().result().checkpoints


def test_weights_info_and_training_runs(
    create: Callable[..., xorl_client.TrainingClient],
    service: xorl_client.ServiceClient,
    tiny_model: Path,
    model_id: str,
) -> None:
    path = create().save_state("a").result().path
    rest = service.create_rest_client(model_id)
    runs = rest.list_training_runs(limit=100).result()
    assert model_id in [run.training_run_id for run in runs.training_runs]
    info = rest.get_weights_info(path).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (str(tiny_model), True, 4)


def test_unload_frees_the_id(create: Callable[..., xorl_client.TrainingClient]) -> None:
    client = create()
    step(client, data())
    client.unload().result()
    with pytest.raises(xorl_client.BadRequestError, match="model_id"):
        client.forward(data()).result()
    create(rank=8)


def test_kill_session_saves_a_checkpoint(create: Callable[..., xorl_client.TrainingClient]) -> None:
    client = create()
    step(client, data())
    answer = client.kill_session(save_checkpoint=True).result()
    assert answer.success
    assert answer.checkpoint_path


def test_eight_clients_at_once_get_what_each_gets_alone(trainer: str, tiny_model: Path, model_id: str) -> None:
    def run(name: str, seed: int, results: dict[str, list[float]]) -> None:
        with xorl_client.ServiceClient(base_url=trainer) as service:
            client = service.create_lora_training_client(tiny_model.name, rank=2 + seed % 3, alpha=8, model_id=name)
            checkpoint = f"xorl://{model_id}-{seed}/weights/start"
            if name.endswith("alone"):
                client.load_state_with_optimizer(checkpoint).result()
            else:
                client.save_state("start").result()
            results[name] = [step(client, data(seed)).metrics["loss:sum"] for _ in range(4)]

    together: dict[str, list[float]] = {}
    threads = [threading.Thread(target=run, args=(f"{model_id}-{seed}", seed, together)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone: dict[str, list[float]] = {}
    for seed in range(8):
        run(f"{model_id}-{seed}-alone", seed, alone)
        assert alone[f"{model_id}-{seed}-alone"] == pytest.approx(together[f"{model_id}-{seed}"], rel=1e-5)


def test_full_weights(full_trainer: str, tiny_model: Path) -> None:
    with xorl_client.ServiceClient(base_url=full_trainer) as service:
        client = service.create_training_client(tiny_model.name)
        losses = [step(client, data()).metrics["loss:mean"] for _ in range(8)]
        assert losses[-1] < 0.5 * losses[0]
        path = client.save_state("full").result().path
        saved = logprobs(client.forward(data()).result())
        step(client, data())
        client.load_state_with_optimizer(path).result()
        assert logprobs(client.forward(data()).result()) == saved
        resumed = service.create_training_client_from_state(path)
        assert logprobs(resumed.forward(data()).result()) == saved


@contextmanager
def registered(client: xorl_client.TrainingClient, sampler: str) -> Iterator[None]:
    """The client's server knows the sampler."""
    address = urlsplit(sampler)
    assert client.add_inference_endpoint(address.hostname, address.port).result().success
    yield
    assert client.remove_inference_endpoint(address.hostname, address.port).result().success


def served_logprobs(sampler: str, tokens: list[int], **options: object) -> list[float]:
    answer = httpx.post(
        f"{sampler}/generate",
        json={
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            **options,
        },
    ).json()
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]][1:]


def check_served(sampler: str, client: xorl_client.TrainingClient, **options: object) -> None:
    """The sampler's log-probabilities are the trainer's."""
    batch = data(seed=3)
    for datum, ours in zip(batch, logprobs(client.forward(batch).result()), strict=True):
        tokens = [*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()[-1]]
        np.testing.assert_allclose(served_logprobs(sampler, tokens, **options), ours, atol=2e-4)


def test_synced_weights_are_served(create: Callable[..., xorl_client.TrainingClient], fresh_sampler: str) -> None:
    client = create("default")  # the model that a sync without a model_id means
    with registered(client, fresh_sampler):
        for _ in range(2):
            step(client, data())
            report = client.sync_inference_weights(master_port=0).result()
            assert report.success
            check_served(fresh_sampler, client)
        assert len(client.list_inference_endpoints().result().endpoints) == 1
    client.unload().result()


def test_synced_full_weights_are_served(full_trainer: str, tiny_model: Path, fresh_sampler: str) -> None:
    with xorl_client.ServiceClient(base_url=full_trainer) as service:
        client = service.create_training_client(tiny_model.name)
        with registered(client, fresh_sampler):
            step(client, data())
            assert client.sync_inference_weights(master_port=0).result().success
            check_served(fresh_sampler, client)


def test_a_sampling_client_samples_from_the_adapter(
    create: Callable[..., xorl_client.TrainingClient], service: xorl_client.ServiceClient, sampler: str
) -> None:
    client = create()
    with registered(client, sampler):
        step(client, data())
        path = client.save_weights_for_sampler("policy").result().path
        sampling = service.create_sampling_client(base_url=sampler, model_path=path)
        check_served(sampler, client, lora_path="policy")
        response = sampling.sample(
            prompt=types.ModelInput.from_ints([5, 9, 2, 17]),
            num_samples=2,
            sampling_params=types.SamplingParams(max_tokens=5, temperature=1.0),
        ).result()
        assert len(response.sequences) == 2
        assert all(len(s.tokens) == len(s.logprobs) for s in response.sequences)
        step(client, data())
        client.save_weights_for_sampler("policy").result()
        service.create_sampling_client(base_url=sampler, model_path=path)
        check_served(sampler, client, lora_path="policy")
