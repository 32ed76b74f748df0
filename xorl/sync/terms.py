"""Decides in which form an inference server takes weights, or why it cannot.

A server answers 200 to names that it does not know and to weights that it misreads, and an FP8 checkpoint shows nowhere
in what SGLang says of itself. So the config of its model is read here, and all is refused that the server gets wrong.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xorl.errors import InvalidRequest
from xorl.quantization import Fp8, read_fp8
from xorl.sync.formats import Weight, is_quantized, one_by_one
from xorl.sync.receiver import ServerInfo

UNQUANTIZED = ("", "auto", "none", "unquant")
"""What servers say of their quantization that were started without any; their checkpoint may be quantised still."""

FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers whose outputs servers put side by side and cut for their ranks, on the borders of blocks only."""

CUT_ALONG_INPUTS = ("o_proj", "down_proj")
BLOCK_SIZE = 128


class Unfit(Exception):
    """The server cannot take these weights; the text says what would help."""


class Served(NamedTuple):
    """What a server serves, as the config of its model says: the names that transformers gives its weights."""

    shapes: Mapping[str, tuple[int, ...]]
    quantization: Mapping[str, object] | None
    num_kv_heads: int


def taken_form(
    info: ServerInfo,
    served: Served | None,
    asked: Fp8 | None,
    weights: Sequence[Weight],
    *,
    ranks: int,
    blackwell: bool,
) -> Fp8 | None:
    """The form of weights, None for plain, that a server takes into its `ranks`.

    Args:
        served: None where its config is not readable here; then what was asked for is believed.
        asked: what the caller wants to send; None leaves it to the server.
        weights: as transformers names them.
        blackwell: it is taken for granted that servers have the GPUs that we have.

    Raises:
        Unfit: it takes none, or another than what was asked for.
        InvalidRequest: a weight cannot be sent in that form to anybody.
    """
    if info.tp_size is not None and info.tp_size != ranks:
        raise Unfit(f"it has {info.tp_size} tensor-parallel ranks; register it with world_size {info.tp_size}")
    if served is not None:
        _compare(served.shapes, weights)
    if info.dequantizes:
        return asked
    held = _held(info, served, asked)
    if held is None and asked is None:
        return None
    if held is None or (asked is not None and not _alike(held, asked, weights)):
        raise Unfit(
            f"it serves {_words(held)} weights, and {_words(asked)} ones would be misread; see set_sync_quantization"
        )
    _check_online(held, info, served, weights, ranks, blackwell=blackwell)
    return asked or held


def read_served(model_path: str | None) -> Served | None:
    """What a model's folder, or the local cache of Hugging Face's hub, says; None if neither has it."""
    try:
        config = AutoConfig.from_pretrained(model_path, local_files_only=True) if model_path else None
    except (OSError, ValueError):
        return None
    if config is None:
        return None
    fields = config.to_dict()
    heads = fields.get("num_key_value_heads") or fields.get("num_attention_heads") or 1
    return Served(_shapes(config.to_json_string(use_diff=False)), fields.get("quantization_config"), heads)


@lru_cache(maxsize=8)
def _shapes(config: str) -> dict[str, tuple[int, ...]]:
    """Of the weights of a model, by its config in JSON."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _compare(theirs: Mapping[str, tuple[int, ...]], weights: Sequence[Weight]) -> None:
    ours = {weight.name: tuple(weight.tensor.shape) for weight in weights}
    for name, shape in ours.items():
        if name not in theirs:
            raise Unfit(f"its model has no {name}, which would be dropped silently")
        if theirs[name] != shape:
            raise Unfit(f"{name}: its shape is {list(theirs[name])} there and {list(shape)} here")
    missing = sorted(theirs.keys() - ours.keys())
    if missing:
        raise Unfit(f"its model has {missing[0]}, which is not in this one and would stay as it is")


def _held(info: ServerInfo, served: Served | None, asked: Fp8 | None) -> Fp8 | None:
    method = (info.quantization or "").lower()
    if method not in (*UNQUANTIZED, "fp8"):
        raise Unfit(f"it serves {method} weights; only plain and FP8 ones can be sent")
    if served is None:
        if method == "fp8" and asked is None:
            raise Unfit(
                f"it serves fp8 weights, and its config at {info.model_path} is not readable here: say how they "
                "are quantised with set_sync_quantization"
            )
        return asked
    if served.quantization is None:
        if method == "fp8":
            raise Unfit(
                "it quantises plain weights as it loads them, which it cannot repeat online; start it from an "
                "FP8 checkpoint, or without quantization"
            )
        return None
    try:
        return read_fp8(served.quantization)
    except InvalidRequest as error:
        raise Unfit(f"its model config: {error}") from None


def _alike(held: Fp8, asked: Fp8, weights: Sequence[Weight]) -> bool:
    """Whether they differ in words only. Scales that are powers of two are scales."""
    matrices = one_by_one(weights)
    converted = [[is_quantized(weight, fp8) for weight in matrices] for fp8 in (held, asked)]
    return held.form == asked.form and converted[0] == converted[1]


def _words(fp8: Fp8 | None) -> str:
    if fp8 is None:
        return "plain"
    return f"FP8 ({fp8.form}, {len(fp8.not_converted)} modules not converted)"


def _check_online(
    held: Fp8, info: ServerInfo, served: Served | None, weights: Sequence[Weight], ranks: int, *, blackwell: bool
) -> None:
    """What SGLang 0.5.23 would get wrong without an error."""
    if held.form != "block":
        raise Unfit(f"it serves FP8 weights with a scale a {held.form}, which it cannot load online; serve blocks")
    if info.enable_lora:
        raise Unfit("with LoRA enabled it does not find the scales of FP8 weights; start it without --enable-lora")
    if blackwell and (info.fp8_gemm_runner_backend or "auto") in ("auto", "deep_gemm"):
        raise Unfit("on Blackwell DeepGEMM repacks the scales of FP8 weights; start it with --fp8-gemm-backend triton")
    num_kv_heads = served.num_kv_heads if served else ranks
    for weight in one_by_one(weights):
        if is_quantized(weight, held):
            whole_experts = info.ep_size or 1 if ".experts." in weight.name else 1
            _check_blocks(weight, ranks // whole_experts, num_kv_heads)


def _check_blocks(weight: Weight, ranks: int, num_kv_heads: int) -> None:
    leaf = weight.name.split(".")[-2]
    rows, cols = weight.tensor.shape
    if leaf in FUSED:
        shares = min(ranks, num_kv_heads) if leaf in ("k_proj", "v_proj") else ranks  # heads are not cut but copied
        size, what = rows / shares, "outputs"
    elif leaf in CUT_ALONG_INPUTS and ranks > 1:
        size, what = cols / ranks, "inputs"
    else:
        return
    if size % BLOCK_SIZE:
        raise Unfit(
            f"{weight.name}: {size:g} {what} a rank are no multiple of {BLOCK_SIZE}; serve it plain or in fewer ranks"
        )
