"""Served LoRA adapters equal PEFT's."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sampler.serving import Client, drive, generate, logprobs, ok, refused

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7], [30, 31, 32]]
GREEDY = {"max_new_tokens": 10, "ignore_eos": True, "temperature": 0}


def save_adapter(model: Path, folder: Path, targets: list[str], *, rank: int = 4, seed: int = 0) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, task_type="CAUSAL_LM")
    peft = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    peft.save_pretrained(str(folder))
    return folder


def peft_logprobs(model: Path, adapter: Path | None, prompt: list[int], output: list[int]) -> list[float]:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter))
    tokens = torch.tensor([prompt + output])
    with torch.no_grad():
        table = network(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    return table.gather(1, tokens[0, 1:, None])[:, 0].tolist()[len(prompt) - 1 :]


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "a": save_adapter(tiny_model, root / "a", every, seed=1),
        "b": save_adapter(tiny_model, root / "b", ["q_proj", "down_proj", "lm_head"], rank=7, seed=2),
    }


def test_adapters_share_a_batch_with_the_base_model(tiny_model: Path, adapters: dict[str, Path]) -> None:
    async def scenario(client: Client) -> None:
        for name, path in adapters.items():
            answer = await ok(client, "/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
            assert answer["loaded_adapters"][name] == str(path)
        names = ["b", None, "a", "b"]
        answers = await generate(client, PROMPTS, GREEDY, lora_path=names, return_logprob=True)
        for prompt, name, answer in zip(PROMPTS, names, answers, strict=True):
            expected = peft_logprobs(tiny_model, adapters[name] if name else None, prompt, answer["output_ids"])
            assert logprobs(answer) == pytest.approx(expected, abs=1e-4)
            alone = await generate(client, prompt, GREEDY, lora_path=name)
            assert alone["output_ids"] == answer["output_ids"]
        scored = await generate(
            client, PROMPTS[1], {"max_new_tokens": 0}, lora_path="b", return_logprob=True, logprob_start_len=0
        )
        expected = peft_logprobs(tiny_model, adapters["b"], PROMPTS[1][:1], PROMPTS[1][1:])
        assert [entry[0] for entry in scored["meta_info"]["input_token_logprobs"]][1:] == pytest.approx(
            expected, abs=1e-4
        )
        served = (await client.get("/v1/models")).json()
        assert [card["id"] for card in served["data"]] == [str(tiny_model), "a", "b"]

    drive(tiny_model, scenario)


def test_adapters_come_and_go(tiny_model: Path, adapters: dict[str, Path]) -> None:
    async def scenario(client: Client) -> None:
        body = {"lora_name": "x", "lora_path": str(adapters["a"])}
        await ok(client, "/load_lora_adapter", body)
        assert "already loaded" in await refused(client, "/load_lora_adapter", body)
        first = await generate(client, PROMPTS[0], GREEDY, lora_path="x")
        await ok(client, "/unload_lora_adapter", {"lora_name": "x"})
        assert "x" in await refused(client, "/unload_lora_adapter", {"lora_name": "x"})
        assert "'x'" in await refused(client, "/generate", {"input_ids": [5], "lora_path": "x"})
        await ok(client, "/load_lora_adapter", body | {"lora_path": str(adapters["b"])})
        second = await generate(client, PROMPTS[0], GREEDY, lora_path="x")
        assert first["output_ids"] != second["output_ids"]

    drive(tiny_model, scenario)


def test_adapters_that_do_not_fit_are_refused(tiny_model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def variant(name: str, old: str, new: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file in adapters["a"].glob("adapter_*"):
            (folder / file.name).write_bytes(file.read_bytes())
        config = (folder / "adapter_config.json").read_text()
        assert old in config
        (folder / "adapter_config.json").write_text(config.replace(old, new))
        return str(folder)

    wrong = {
        str(tmp_path / "nowhere"): "nowhere",
        variant("rank", '"r": 4', '"r": 5'): "shape",
        variant("dora", '"use_dora": false', '"use_dora": true'): "use_dora",
        variant("kind", '"LORA"', '"IA3"'): "peft_type",
        variant(
            "broken",
            "{",
            "[",
        ): "adapter",
    }

    async def scenario(client: Client) -> None:
        for path, named in wrong.items():
            assert named in await refused(client, "/load_lora_adapter", {"lora_name": "x", "lora_path": path})
        await generate(client, [5], GREEDY)

    drive(tiny_model, scenario)
