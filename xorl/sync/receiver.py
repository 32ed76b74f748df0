"""Asks things of one inference server, in SGLang's HTTP dialect."""

from collections.abc import Mapping
from typing import TypeVar

import httpx
import msgspec

from xorl.types import PauseMode

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 3.0
"""/health generates a token, which takes a second on an idle server and 20 s on a paused one."""

PROBES = ("/health", "/model_info", "/v1/models")


class ReceiverError(Exception):
    """An inference server refused or did not answer; the text names it, the route and the reason.

    Attributes:
        status: what it answered with; None if it did not answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerInfo(msgspec.Struct, frozen=True):
    """What a server says of itself; None where it does not say.

    Attributes:
        dequantizes: it takes FP8 weights of every form into plain ones.
    """

    model_path: str | None = None
    served_model_name: str | None = None
    tp_size: int | None = None
    ep_size: int | None = None
    pp_size: int | None = None
    dp_size: int | None = None
    enable_dp_attention: bool | None = None
    device: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    enable_lora: bool | None = None
    max_lora_rank: int | None = None
    fp8_gemm_runner_backend: str | None = None
    dequantizes: bool | None = None
    version: str | None = None


class Checksums(msgspec.Struct, frozen=True):
    """Of what each tensor-parallel rank holds, by the server's own names of its parameters."""

    ranks: list[Mapping[str, str]]
    whole: str


class Receiver:
    """One inference server; every method blocks, and may be called from any thread.

    Raises:
        ReceiverError: from every method but `alive`.
    """

    def __init__(self, host: str, port: int, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._http = httpx.Client(
            base_url=f"http://{self.address}",
            headers=authorization(api_key),
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            trust_env=False,  # weights and prompts never go through a proxy
            verify=False,  # it is plain HTTP: loading certificates would take longer than a small sync
        )

    def close(self) -> None:
        self._http.close()

    def alive(self) -> bool:
        return any(self._answers(path) for path in PROBES)

    def has(self, path: str) -> bool:
        """Whether it has this route, by a request that it acts on in no way."""
        return self._request("OPTIONS", path).status_code != 404

    def server_info(self) -> ServerInfo:
        return self._ask("/server_info", "/get_server_info", ServerInfo)

    def weight_version(self) -> str | None:
        """What its weights were last called; a restarted server has forgotten."""
        return self._ask("/model_info", "/get_model_info", _ModelInfo).weight_version

    def checksums(self) -> Checksums:
        answer = self.call("POST", "/weights_checker", {"action": "checksum"})
        try:
            checked = msgspec.convert(answer, _Checked)
        except msgspec.ValidationError as error:
            raise ReceiverError(f"{self.address} /weights_checker: {error}", 200) from None
        return Checksums([rank.checksums for rank in checked.ranks], checked.per_engine_checksum)

    def generate(self, request: object) -> object:
        return self.call("POST", "/generate", request)

    def load_adapter(self, name: str, directory: str) -> None:
        """Serve the PEFT adapter in `directory`, which the server must see too, in place of any of that name."""
        try:
            self.unload_adapter(name)
        except ReceiverError as error:
            if error.status is None:
                raise
        self.call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": directory, "pinned": False})

    def unload_adapter(self, name: str) -> None:
        self.call("POST", "/unload_lora_adapter", {"lora_name": name})

    def update_from_disk(self, directory: str, version: str, *, flush_cache: bool = True) -> None:
        """Load the model in `directory`, which the server must see too, and call its weights `version`."""
        body = {"model_path": directory, "weight_version": version, "flush_cache": flush_cache}
        self.call("POST", "/update_weights_from_disk", body)

    def pause(self, mode: PauseMode) -> None:
        self.call("POST", "/pause_generation", {"mode": mode})

    def resume(self) -> None:
        self.call("POST", "/continue_generation", {})

    def join_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Make the server join an update group. Blocks its scheduler until all members are there."""
        self.call(
            "POST",
            "/init_weights_update_group",
            {
                "master_address": master_address,
                "master_port": master_port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
        )

    def leave_group(self, group_name: str) -> None:
        self.call("POST", "/destroy_weights_update_group", {"group_name": group_name})

    def set_weight_version(self, version: str) -> None:
        self.call("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def flush_cache(self) -> None:
        self.call("POST", "/flush_cache")

    def call(self, method: str, path: str, body: object = None) -> object:
        """The decoded answer; None if it is not JSON."""
        answer = self._request(method, path, body)
        content = _decoded(answer)
        if not answer.is_success or _says_failure(content):
            raise ReceiverError(f"{self.address} {path}: {_reason(answer, content)}", answer.status_code)
        return content

    def _answers(self, path: str) -> bool:
        try:
            return self._http.get(path, timeout=HEALTH_TIMEOUT_S).is_success
        except httpx.HTTPError:
            return False

    def _ask(self, path: str, older_path: str, kind: type[T]) -> T:
        """What it says of itself; servers of some years ago have an older path for it."""
        try:
            answer = self.call("GET", path)
        except ReceiverError as error:
            if error.status != 404:
                raise
            answer = self.call("GET", older_path)
        try:
            return msgspec.convert(answer, kind, strict=False)
        except msgspec.ValidationError as error:
            raise ReceiverError(f"{self.address} {path}: {error}") from None

    def _request(self, method: str, path: str, body: object = None) -> httpx.Response:
        where = f"{self.address} {path}"
        try:
            if body is None:
                return self._http.request(method, path)
            return self._http.request(method, path, json=body)
        except httpx.TimeoutException:
            raise ReceiverError(f"{where}: no answer within {self._http.timeout.read:g} s") from None
        except httpx.HTTPError as error:
            raise ReceiverError(f"{where}: {error or type(error).__name__}") from None


class _ModelInfo(msgspec.Struct, frozen=True):
    weight_version: str | None = None


class _CheckedRank(msgspec.Struct, frozen=True):
    checksums: dict[str, str]


class _Checked(msgspec.Struct, frozen=True):
    ranks: list[_CheckedRank]
    per_engine_checksum: str


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that an endpoint asks for which was started with a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _decoded(answer: httpx.Response) -> object:
    try:
        return answer.json()
    except ValueError:
        return None


def _says_failure(content: object) -> bool:
    return isinstance(content, dict) and content.get("success") is False


def _reason(answer: httpx.Response, content: object) -> str:
    if answer.status_code == 401:
        return "it asks for an API key: give the right one as api_key when adding the endpoint"
    if isinstance(content, dict):
        reasons = [content[key] for key in ("message", "error_message", "error", "detail") if content.get(key)]
        if reasons:
            nested = reasons[0]
            return str(nested.get("message", nested) if isinstance(nested, dict) else nested)
    return f"HTTP {answer.status_code} {answer.text[:200].strip()}".strip()
