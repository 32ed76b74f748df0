"""Turns sampling sessions and asample into calls of the inference endpoints."""

import asyncio
from collections import OrderedDict
from typing import NamedTuple

import httpx
import msgspec
import numpy as np

from xorl.engine.commands import ModelInfo
from xorl.errors import InternalError, InvalidRequest, XorlError
from xorl.server.answers import SampleAnswer
from xorl.server.checkpoints import CheckpointRef, Checkpoints
from xorl.server.datums import prompt_tokens
from xorl.server.endpoints import Endpoint, Endpoints, Weights
from xorl.server.schema_inference import SampleRequest
from xorl.server.tinker_proto import SampledSequence
from xorl.sync.receiver import CONNECT_TIMEOUT_S, ReceiverError, authorization

GENERATE_TIMEOUT_S = 3600.0
MAX_REPEATS = 100_000

UNSUPPORTED = ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k", "target_prompt_logprobs")


class FinishReason(msgspec.Struct, frozen=True):
    type: str
    message: str = ""


class Meta(msgspec.Struct, frozen=True):
    finish_reason: FinishReason
    weight_version: str | None = None
    output_token_logprobs: list[tuple[float | None, int, str | None]] = []
    input_token_logprobs: list[tuple[float | None, int, str | None]] = []


class Generated(msgspec.Struct, frozen=True):
    """What /generate answers, as far as it is used here."""

    output_ids: list[int]
    meta_info: Meta


class Prompt(NamedTuple):
    """A checked asample: its tokens, what /generate is sent without seed and n, and the first position scored."""

    tokens: list[int]
    sampling_params: dict[str, object]
    first_scored: int | None


class Repeats:
    """request_id of the latest requests by what makes them the same: session, seq_id and content."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, int, bytes], str] = OrderedDict()

    def earlier(self, session_id: str | None, seq_id: int | None, content: bytes) -> str | None:
        return self._known.get((session_id, seq_id, content)) if session_id and seq_id is not None else None

    def accept(self, session_id: str | None, seq_id: int | None, content: bytes, request_id: str) -> None:
        if session_id and seq_id is not None:
            self._known[session_id, seq_id, content] = request_id
            if len(self._known) > MAX_REPEATS:
                self._known.popitem(last=False)


class Sampling:
    """Loads sampler weights on the endpoints, of each model's adapters the most recently used ones."""

    def __init__(self, endpoints: Endpoints, checkpoints: Checkpoints, max_adapters: int) -> None:
        self._endpoints = endpoints
        self._checkpoints = checkpoints
        self._max_adapters = max_adapters
        self._used: dict[str, OrderedDict[str, None]] = {}
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(GENERATE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self.repeats = Repeats()

    async def close(self) -> None:
        await self._client.aclose()

    def num_adapters(self) -> dict[str, int]:
        return {model_id: len(names) for model_id, names in self._used.items()}

    def weights(self, ref: CheckpointRef) -> Weights:
        """What a sampler checkpoint is called on the endpoints.

        xorl-client asks them for the bare name. tinker's clients never see it, so there it is one that no other
        model's checkpoint has: model ids have no dot and no @.

        Raises:
            UnknownId: no such checkpoint.
            InvalidRequest: it is a training checkpoint.
        """
        if ref.kind != "sampler_weights":
            raise InvalidRequest(
                f"model_path: {ref.native_uri} is no sampler checkpoint; save_weights_for_sampler writes one"
            )
        manifest = self._checkpoints.manifest(ref)
        adapter = f"{ref.name}@{ref.model_id.replace(':', '.')}" if ":" in ref.model_id else ref.name
        name = None if manifest.lora is None else adapter
        return Weights(name, str(self._checkpoints.directory(ref)), manifest.time)

    async def load(self, model_id: str, weights: Weights) -> None:
        """Load on every endpoint, making room first.

        Raises:
            InvalidRequest: no endpoint could take it.
        """
        if not len(self._endpoints):
            raise InvalidRequest("there is no inference endpoint: POST /add_inference_endpoint first")
        await self._touch(model_id, weights)
        failures: list[ReceiverError] = []
        for outcome in await asyncio.gather(
            *(endpoint.load(weights, again=True) for endpoint in self._endpoints), return_exceptions=True
        ):
            if isinstance(outcome, ReceiverError):
                failures.append(outcome)
            elif outcome is not None:
                raise outcome
        if len(failures) == len(self._endpoints):
            raise InvalidRequest(f"no inference endpoint loaded the weights: {failures[0]}")

    async def _touch(self, model_id: str, weights: Weights) -> None:
        """Note the use of an adapter; the least recently used ones leave."""
        if weights.name is None:
            return
        used = self._used.setdefault(model_id, OrderedDict())
        used[weights.name] = None
        used.move_to_end(weights.name)
        while len(used) > self._max_adapters:
            oldest, _ = used.popitem(last=False)
            await asyncio.gather(*(endpoint.unload(oldest) for endpoint in self._endpoints), return_exceptions=True)

    def check(self, request: SampleRequest, info: ModelInfo) -> Prompt:
        """Refuse what can be seen to be wrong, naming it."""
        for name in UNSUPPORTED:
            if getattr(request, name):
                raise InvalidRequest(f"{name}: not supported")
        ids = prompt_tokens(request.prompt, "prompt")
        if ids.ndim != 1 or not len(ids) or ((ids != np.trunc(ids)) | (ids < 0) | (ids >= info.vocab_size)).any():
            raise InvalidRequest(f"prompt: expected token ids in [0, {info.vocab_size}), at least one")
        if len(ids) >= info.max_context_length:
            raise InvalidRequest(f"prompt: {len(ids)} tokens fill the context of {info.max_context_length}")
        params = request.sampling_params
        room = max(1, info.max_context_length - len(ids) - 1)
        wire: dict[str, object] = {
            "max_new_tokens": min(params.max_tokens or room, room),
            "temperature": params.temperature,
            "top_k": params.top_k or -1,
            "top_p": params.top_p,
            "skip_special_tokens": False,
        }
        match params.stop:
            case []:
                wire["ignore_eos"] = True
            case [int(), *_] as token_ids:
                wire["stop_token_ids"] = token_ids
            case str() | [str(), *_] as texts:
                wire["stop"] = texts
            case _:
                pass
        first_scored = max(0, len(ids) - (request.prompt_logprobs_last_n or len(ids)))
        return Prompt(ids.astype(int).tolist(), wire, first_scored if request.prompt_logprobs else None)

    async def sample(
        self, prompt: Prompt, num_samples: int, seed: int | None, model_id: str, weights: Weights | None
    ) -> SampleAnswer:
        """Sample from one endpoint; the next one gets its chance where one does not answer."""
        if weights is not None:
            await self._touch(model_id, weights)
        reason = "all of them missed the last weight sync" if len(self._endpoints) else "POST /add_inference_endpoint"
        problem: XorlError = InvalidRequest(f"there is no inference endpoint to sample from: {reason}")
        for endpoint in self._endpoints.usable():
            try:
                generated = await self._sample_loaded(endpoint, prompt, num_samples, seed, weights)
            except (ReceiverError, httpx.TransportError) as error:
                endpoint.healthy = False
                problem = InternalError(f"inference endpoint {endpoint.url}: {error or type(error).__name__}")
            else:
                endpoint.healthy = True
                return _answer(generated, prompt)
        raise problem

    async def _sample_loaded(
        self, endpoint: Endpoint, prompt: Prompt, num_samples: int, seed: int | None, weights: Weights | None
    ) -> list[Generated]:
        """Load an adapter that is not there, also one that we think is: a server that was restarted has none."""
        if weights is None:
            return await self._sample_from(endpoint, prompt, num_samples, seed, None)
        await endpoint.load(weights)
        loaded = endpoint.loaded.get(weights.name)
        try:
            return await self._sample_from(endpoint, prompt, num_samples, seed, weights)
        except InvalidRequest as error:
            if weights.name is None or "lora" not in str(error).lower():
                raise
            if endpoint.loaded.get(weights.name) is loaded:  # nobody has loaded it anew since
                endpoint.loaded.pop(weights.name, None)
            await endpoint.load(weights)
            return await self._sample_from(endpoint, prompt, num_samples, seed, weights)

    async def _sample_from(
        self, endpoint: Endpoint, prompt: Prompt, num_samples: int, seed: int | None, weights: Weights | None
    ) -> list[Generated]:
        """One request without a seed; with one, a request for each sample, since the i-th has seed + i."""
        lora_path = weights.name if weights else None
        if seed is None:
            return await self._generate(endpoint, prompt, {"n": num_samples}, lora_path, scored=True)
        groups = await asyncio.gather(
            *(
                self._generate(endpoint, prompt, {"sampling_seed": (seed + i) % 2**31}, lora_path, scored=i == 0)
                for i in range(num_samples)
            )
        )
        return [generated for group in groups for generated in group]

    async def _generate(
        self, endpoint: Endpoint, prompt: Prompt, more: dict[str, int], lora_path: str | None, *, scored: bool
    ) -> list[Generated]:
        body: dict[str, object] = {
            "input_ids": prompt.tokens,
            "sampling_params": prompt.sampling_params | more,
            "return_logprob": True,
        }
        if scored and prompt.first_scored is not None:
            body["logprob_start_len"] = prompt.first_scored
        if lora_path is not None:
            body["lora_path"] = lora_path
        headers = authorization(endpoint.api_key)
        response = await self._client.post(f"{endpoint.url}/generate", json=body, headers=headers)
        if response.status_code != 200:
            reason = f"{response.status_code} {response.text[:500]}"
            if response.status_code == 400:
                raise InvalidRequest(f"inference endpoint {endpoint.url}: {reason}")
            raise ReceiverError(reason, response.status_code)
        try:
            answer = msgspec.json.decode(response.content, type=Generated | list[Generated])
        except msgspec.DecodeError as error:
            raise InternalError(f"inference endpoint {endpoint.url}: unexpected answer: {error}") from None
        samples = answer if isinstance(answer, list) else [answer]
        await _refuse_old_weights(endpoint, samples)
        return samples


async def _refuse_old_weights(endpoint: Endpoint, samples: list[Generated]) -> None:
    """
    Raises:
        ReceiverError: the endpoint was started again, and has not had the weights of the last sync since.
    """
    served = {sample.meta_info.weight_version for sample in samples}
    if endpoint.version is None or served <= {None, endpoint.version}:
        return
    await endpoint.check_version()  # it may also have been synced meanwhile
    if endpoint.stale:
        raise ReceiverError(f"it serves {served.pop()}, not {endpoint.version}: it was restarted; sync it again")


def _answer(generated: list[Generated], prompt: Prompt) -> SampleAnswer:
    prompt_logprobs = None
    if prompt.first_scored is not None:
        scored = [logprob for logprob, *_ in generated[0].meta_info.input_token_logprobs]
        missing = [None] * (len(prompt.tokens) - len(scored))
        prompt_logprobs = np.array([*missing, *scored], dtype=np.float32)  # None becomes NaN
        prompt_logprobs[0] = np.nan
    return SampleAnswer([_sequence(one) for one in generated], prompt_logprobs)


def _sequence(generated: Generated) -> SampledSequence:
    reason = generated.meta_info.finish_reason
    if reason.type == "abort":
        raise InternalError(f"the inference endpoint aborted the request: {reason.message}")
    logprobs = np.array([logprob for logprob, *_ in generated.meta_info.output_token_logprobs], dtype=np.float32)
    tokens = np.array(generated.output_ids, dtype=np.int32)
    return SampledSequence("length" if reason.type == "length" else "stop", tokens, logprobs)
