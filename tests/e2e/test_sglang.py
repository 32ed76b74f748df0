"""Pushes weights into a real SGLang server on the CPU and asks it what it serves.

XORL_SGLANG_PYTHON names the Python of an environment that holds SGLang; it need not be ours.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import xorl_client
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig
from xorl_client import types

from builders import sync_into
from e2e.sglang import PYTHON, generate, served_logprobs, sglang
from processes import running
from tiny import save_tiny_model
from xorl.engine.commands import SyncReport
from xorl.quantization import Fp8
from xorl.sync import terms
from xorl.sync.disk import Shelf, save
from xorl.sync.formats import Weight, is_quantized, one_by_one
from xorl.sync.produce import Plan
from xorl.sync.push import WeightSync
from xorl.types import PauseMode
from xorl_kernels.fp8_quantize import dequantize, fp8_quantize

PROMPT = [5, 17, 99, 3, 42, 64, 8, 120]
CPU = torch.device("cpu")
BUCKET_BYTES = 60_000
SIZES: dict[str, int] = {
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
"""What the models made here have in common."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="XORL_SGLANG_PYTHON does not name a Python that has SGLang"),
]


def weights_of(model: PreTrainedModel) -> list[Weight]:
    return [Weight(name, parameter, parameter.dtype) for name, parameter in model.named_parameters()]


@torch.no_grad()
def true_logprobs(model: PreTrainedModel) -> list[float]:
    logits = model(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()


def assert_serves(port: int, model: PreTrainedModel) -> None:
    assert served_logprobs(port, PROMPT) == pytest.approx(true_logprobs(model), abs=1e-4)


def push(
    sync: WeightSync, model: PreTrainedModel, version: str, *ports: int, pause_mode: PauseMode = "retract"
) -> SyncReport:
    """Sync with verification; all must succeed, and be verified."""
    command = sync_into(*ports, bucket_bytes=BUCKET_BYTES, pause_mode=pause_mode, weight_version=version, verify=True)
    report = sync.push(command, weights_of(model))
    print(report)
    assert [endpoint.success for endpoint in report.endpoints] == [True] * len(ports), report
    assert not any("verified" in endpoint.message for endpoint in report.endpoints), report
    return report


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sglang_serves_what_was_pushed(tmp_path: Path, tied: bool) -> None:
    start, *changed = [
        AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / str(seed), tied=tied, seed=seed)).eval()
        for seed in range(3)
    ]
    sync = WeightSync(30.0, CPU)
    with sglang(tmp_path / "0", tmp_path / "server.log") as port, ThreadPoolExecutor(1) as threads:
        assert_serves(port, start)
        request = threads.submit(generate, port, PROMPT, 300)
        for pause_mode, version, model in zip(("retract", "abort"), ("v1", "v2"), changed, strict=True):
            report = push(sync, model, version, port, pause_mode=pause_mode)
            assert report.num_buckets > 2
            assert_serves(port, model)
            assert generate(port, PROMPT, 1)["weight_version"] == version
            if pause_mode == "retract":
                assert request.result(60)["completion_tokens"] == 300, "it went on after the push"
        sync.close()
        again = WeightSync(30.0, CPU)
        push(again, start, "v3", port)
        assert_serves(port, start)
        again.close()


def test_plain_quantised_and_separate_servers_in_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one has FP8 blocks; the third one is kept out of the group, and reads from disk."""
    config = Qwen3Config(
        **SIZES,
        architectures=["Qwen3ForCausalLM"],
        hidden_size=256,
        intermediate_size=384,
        head_dim=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    fp8 = Fp8("block", not_converted=("model.layers.1.self_attn",))
    start, trained = random_models(config, 2)
    for name, form in (("plain", None), ("blocks", fp8), ("apart", None)):
        save(Plan.of(weights_of(start), form, 1 << 20), tmp_path / name, config)
    monkeypatch.setattr(terms, "no_group", lambda info, _: "it is apart" if "apart" in info.model_path else None)
    sync = WeightSync(60.0, CPU, Shelf(tmp_path / "apart-shelf", config))
    with ExitStack() as stack:
        plain, blocks, apart = [
            stack.enter_context(sglang(tmp_path / name, tmp_path / f"{name}.log"))
            for name in ("plain", "blocks", "apart")
        ]
        assert_serves(blocks, rounded(start, fp8))
        for version, model in (("v1", trained), ("v2", start)):
            push(sync, model, version, plain, blocks, apart)
            assert_serves(plain, model)
            assert_serves(blocks, rounded(model, fp8))
            assert_serves(apart, model)
            assert {generate(port, PROMPT, 1)["weight_version"] for port in (plain, blocks, apart)} == {version}
        sync.close()


def test_stacked_experts_arrive(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **SIZES,
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        head_dim=16,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    start, trained = random_models(config, 2)
    save(Plan.of(weights_of(start), None, 1 << 20), tmp_path / "model", config)
    sync = WeightSync(60.0, CPU)
    with sglang(tmp_path / "model", tmp_path / "server.log") as port:
        push(sync, trained, "v1", port)
        assert_serves(port, trained)
        sync.close()


def random_models(config: Qwen3Config | Qwen3MoeConfig, number: int) -> list[PreTrainedModel]:
    torch.manual_seed(0)
    return [AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for _ in range(number)]


@torch.no_grad()
def rounded(model: PreTrainedModel, fp8: Fp8) -> PreTrainedModel:
    """The model with the weights that FP8 leaves of it."""
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    copy.load_state_dict(model.state_dict())
    for weight in one_by_one(weights_of(copy)):
        if is_quantized(weight, fp8):
            weight.tensor.copy_(dequantize(*fp8_quantize(weight.tensor.detach(), fp8.form)))
    return copy


def test_a_client_trains_and_two_servers_serve_it(tmp_path: Path) -> None:
    """First the adapter itself, on a server that takes adapters; then merged, with another one of two ranks."""
    model = save_tiny_model(tmp_path / "model")
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all", "--lora-backend", "torch_native")
    serve = ("serve", "--model", str(model), "--output-dir", str(tmp_path / "output"))
    with (
        sglang(model, tmp_path / "one.log", *lora) as one,
        sglang(model, tmp_path / "two.log", tp=2) as two,
        running(tmp_path / "serve.log", *serve) as url,
        xorl_client.ServiceClient(base_url=url) as service,
    ):
        client = service.create_lora_training_client(model.name, rank=4)
        untrained = trainer_logprobs(client)
        assert served_logprobs(one, PROMPT) == pytest.approx(untrained, abs=2e-4)
        assert client.add_inference_endpoint("127.0.0.1", one).result().success
        for _ in range(2):
            train(client)
            path = client.save_weights_for_sampler("policy").result().path
            service.create_sampling_client(base_url=f"http://127.0.0.1:{one}", model_path=path)
            assert served_logprobs(one, PROMPT, lora_path="policy") == pytest.approx(trainer_logprobs(client), abs=2e-4)
        assert served_logprobs(one, PROMPT) == pytest.approx(untrained, abs=2e-4), "beside the adapter"
        assert client.add_inference_endpoint("127.0.0.1", two, world_size=2).result().success
        for _ in range(2):
            train(client)
            report = client.sync_inference_weights(master_port=0).result()
            assert report.success, report
            for port in (one, two):
                assert served_logprobs(port, PROMPT) == pytest.approx(trainer_logprobs(client), abs=2e-4)
        assert trainer_logprobs(client) != pytest.approx(untrained, abs=0.05)


def train(client: xorl_client.TrainingClient) -> None:
    client.forward_backward([datum()])
    client.optim_step(types.AdamParams(learning_rate=5e-3)).result()


def trainer_logprobs(client: xorl_client.TrainingClient) -> list[float]:
    (output,) = client.forward([datum()]).result().loss_fn_outputs
    return output["logprobs"].tolist()


def datum() -> types.Datum:
    targets = types.TensorData(data=PROMPT[1:], dtype="int64", shape=[len(PROMPT) - 1])
    return types.Datum(model_input=types.ModelInput.from_ints(PROMPT[:-1]), loss_fn_inputs={"target_tokens": targets})
