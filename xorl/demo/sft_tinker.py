"""Supervised fine-tuning with the tinker SDK, against a running `xorl serve`.

    python -m xorl.demo.sft_tinker --base-url http://localhost:5555 --model NAME

If the server knows an inference endpoint (POST /add_inference_endpoint), it also samples from what it trained.
"""

import argparse

import numpy as np
import tinker
from tinker import types
from transformers import AutoTokenizer, PreTrainedTokenizerBase

EXAMPLES = (
    ("Q: What do you train with?\nA:", " With xorl.\n"),
    ("Q: Where do the weights go?\nA:", " Into SGLang, after every step.\n"),
    ("Q: How many adapters fit on one base?\nA:", " As many as you have tenants.\n"),
)


def datum(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> types.Datum:
    """Next-token targets with weight on the answer alone."""
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)
    tokens = prompt_tokens + tokenizer.encode(answer, add_special_tokens=False)
    num_answer = len(tokens) - len(prompt_tokens)
    weights = [0.0] * (len(prompt_tokens) - 1) + [1.0] * num_answer
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": array(tokens[1:], np.int64), "weights": array(weights, np.float32)},
    )


def array(values: list, dtype: type) -> types.TensorData:
    return types.TensorData.from_numpy(np.array(values, dtype))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base-url", default="http://localhost:5555")
    arguments.add_argument("--model", required=True, help="the base model that the server serves")
    arguments.add_argument("--steps", type=int, default=15)
    options = arguments.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    service = tinker.ServiceClient(base_url=options.base_url, api_key="tml-local")
    # lm_head is left out: SmolLM2 ties it to the embedding, and inference servers then have no place for its adapter
    client = service.create_lora_training_client(options.model, rank=16, train_unembed=False).result()
    data = [datum(tokenizer, prompt, answer) for prompt, answer in EXAMPLES]
    for step in range(1, options.steps + 1):
        output = client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        metrics = output.result().metrics
        print(f"step {step:3}  loss {metrics['loss:sum'] / metrics['valid_tokens:sum']:.3f}")
    print("saved as", client.save_state("sft", overwrite=True).result().path)
    sample(client, tokenizer)
    service.close("success").result()


def sample(client: tinker.TrainingClient, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answer the first question with the trained weights, where an inference endpoint is registered."""
    prompt = types.ModelInput.from_ints(tokenizer.encode(EXAMPLES[0][0], add_special_tokens=False))
    params = types.SamplingParams(max_tokens=16, temperature=0.0, stop="\n")
    try:
        sampling = client.save_weights_and_get_sampling_client().result()
        answer = sampling.sample(prompt, num_samples=1, sampling_params=params).result()
    except tinker.RequestFailedError as error:
        print("no sample:", error)
    else:
        print(EXAMPLES[0][0] + str(tokenizer.decode(answer.sequences[0].tokens)))


if __name__ == "__main__":
    main()
