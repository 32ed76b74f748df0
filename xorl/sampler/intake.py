"""Checks a /generate request and lays it out as rows."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from xorl.errors import InvalidRequest
from xorl.sampler.adapters import LoadedAdapter
from xorl.sampler.rows import Prompt, Row
from xorl.sampler.schema import GenerateRequest, SamplingParams
from xorl.sampler.text import Text

T = TypeVar("T")


class Limits(NamedTuple):
    """What the model can take."""

    vocab_size: int
    context_tokens: int
    eos_token_ids: frozenset[int]


class Wanted(NamedTuple):
    """What a row's answer is to hold."""

    logprobs: bool
    keep_stop: bool


class Intake(NamedTuple):
    """The rows of one request, n consecutive ones for each prompt, and what is wanted of each.

    Attributes:
        single: one prompt with n = 1, not in a list: the answer is an object, not a list.
    """

    rows: list[Row]
    wanted: list[Wanted]
    single: bool


def lay_out(request: GenerateRequest, text: Text, limits: Limits, adapters: Mapping[str, LoadedAdapter]) -> Intake:
    """Turn a request into rows.

    Raises:
        InvalidRequest: naming the field.
    """
    _refuse_unimplemented(request)
    prompts, listed = _prompts(request, text)
    count = len(prompts)
    params = [_params(given, place) for given, place in _each_params(request.sampling_params, count)]
    wants_logprob = _each("return_logprob", request.return_logprob or False, count)
    starts = _each("logprob_start_len", -1 if request.logprob_start_len is None else request.logprob_start_len, count)
    num_tops = _each("top_logprobs_num", request.top_logprobs_num or 0, count)
    loras = _each("lora_path", request.lora_path, count)
    request_ids = _request_ids(request.rid, count, listed)
    rows: list[Row] = []
    wanted: list[Wanted] = []
    for idx, tokens in enumerate(prompts):
        _check_tokens(tokens, f"input_ids[{idx}]" if listed else "input_ids", params[idx], limits)
        _check_logprobs(tokens, starts[idx], num_tops[idx], limits)
        if params[idx].stop and not text:
            raise InvalidRequest("sampling_params.stop: this model has no tokenizer; use stop_token_ids")
        logprobs = wants_logprob[idx]
        first = Prompt(
            request_id=request_ids[idx],
            tokens=tuple(tokens),
            sampling=params[idx].sampling,
            stop=params[idx].stop_rule(limits.eos_token_ids, limits.context_tokens - len(tokens)),
            adapter=_adapter(loras[idx], adapters),
            seed=params[idx].any_seed,
            sample_idx=0,
            logprob_start=starts[idx] if logprobs and starts[idx] >= 0 else None,
            num_top=num_tops[idx] if logprobs else 0,
        )
        rows += [Row(prompt) for prompt in _samples(first, params[idx].n)]
        wanted += [Wanted(logprobs, params[idx].no_stop_trim)] * params[idx].n
    return Intake(rows, wanted, single=not listed and len(rows) == 1)


def _samples(first: Prompt, count: int) -> list[Prompt]:
    if count == 1:
        return [first]
    return [
        msgspec.structs.replace(first, request_id=f"{first.request_id}_{sample_idx}", sample_idx=sample_idx)
        for sample_idx in range(count)
    ]


def _refuse_unimplemented(request: GenerateRequest) -> None:
    for field in ("stream", "token_ids_logprob", "return_hidden_states", "input_embeds", "image_data"):
        if getattr(request, field):
            raise InvalidRequest(f"{field}: it is not implemented by this server")


def _prompts(request: GenerateRequest, text: Text) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt, and whether a list of prompts was sent."""
    if (request.input_ids is None) == (request.text is None):
        raise InvalidRequest("exactly one of text and input_ids must be given")
    if isinstance(request.text, str):
        return [text.encode(request.text)], False
    if request.text is not None:
        prompts = [text.encode(one) for one in request.text]
    else:
        assert request.input_ids is not None
        nested = [entry for entry in request.input_ids if isinstance(entry, list)]
        if not nested:
            return [[entry for entry in request.input_ids if isinstance(entry, int)]], False
        if len(nested) != len(request.input_ids):
            raise InvalidRequest("input_ids: holds both tokens and lists of tokens")
        prompts = nested
    if not prompts:
        raise InvalidRequest("text: the batch is empty")
    return prompts, True


def _each_params(given: dict[str, Any] | list[dict[str, Any]] | None, count: int) -> list[tuple[dict[str, Any], str]]:
    if not isinstance(given, list):
        return [(given or {}, "sampling_params")] * count
    return [(one, f"sampling_params[{idx}]") for idx, one in enumerate(_each("sampling_params", given, count))]


def _params(given: dict[str, Any], place: str) -> SamplingParams:
    """A null means the default, except that max_new_tokens null means as many as there is room for."""
    present = {key: value for key, value in given.items() if value is not None or key == "max_new_tokens"}
    try:
        params = msgspec.convert(present, SamplingParams)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{place}: {error}") from None
    params.check(place)
    return params


def _each(field: str, value: T | list[T], count: int) -> Sequence[T]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{field}: has {len(value)} entries for {count} prompts")
    return value


def _request_ids(rid: str | list[str] | None, count: int, listed: bool) -> Sequence[str]:
    if isinstance(rid, list):
        return _each("rid", rid, count)
    rid = rid or secrets.token_hex(16)
    return [f"{rid}_{idx}" for idx in range(count)] if listed else [rid]


def _adapter(name: str | None, adapters: Mapping[str, LoadedAdapter]) -> LoadedAdapter | None:
    if name is None:
        return None
    if name not in adapters:
        raise InvalidRequest(f"lora_path: adapter {name!r} is not loaded; loaded are {sorted(adapters)}")
    return adapters[name]


def _check_tokens(tokens: Sequence[int], place: str, params: SamplingParams, limits: Limits) -> None:
    if not tokens:
        raise InvalidRequest(f"{place}: the prompt is empty")
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise InvalidRequest(f"{place}: token {wrong} is not in the vocabulary of {limits.vocab_size}")
    total = len(tokens) + (params.max_new_tokens or 0)
    if total > limits.context_tokens:
        raise InvalidRequest(
            f"{place}: {len(tokens)} tokens and max_new_tokens {params.max_new_tokens} "
            f"exceed the context of {limits.context_tokens}"
        )
    stops = params.stop_token_ids
    if stops and (min(stops) < 0 or max(stops) >= limits.vocab_size):
        raise InvalidRequest(f"sampling_params.stop_token_ids: not all in the vocabulary of {limits.vocab_size}")


def _check_logprobs(tokens: Sequence[int], start: int, num_top: int, limits: Limits) -> None:
    if not -1 <= start <= len(tokens):
        raise InvalidRequest(f"logprob_start_len: {start} is beyond the prompt's {len(tokens)} tokens")
    if not 0 <= num_top <= limits.vocab_size:
        raise InvalidRequest(f"top_logprobs_num: {num_top} is not between 0 and {limits.vocab_size}")
