"""Asks things of one inference server, in SGLang's HTTP dialect."""

import contextlib
from collections.abc import Sequence

import httpx
import msgspec

from xorl.types import PauseMode

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
    quantization: str | None = None
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    enable_lora: bool | None = None
    max_lora_rank: int | None = None
    fp8_gemm_runner_backend: str | None = None
    dequantizes: bool | None = None
    version: str | None = None


class Announcement(msgspec.Struct, frozen=True):
    """The tensors of one broadcast, in the order in which their bytes come."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]


class Receiver:
    """One inference server; every method blocks, and may be called from any thread.

    Raises:
        ReceiverError: from every method but `alive`.
    """

    def __init__(self, host: str, port: int, timeout_s: float = 120.0) -> None:
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._http = httpx.Client(
            base_url=f"http://{self.address}",
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            trust_env=False,  # weights and prompts never go through a proxy
        )

    def close(self) -> None:
        self._http.close()

    def alive(self) -> bool:
        return any(self._answers(path) for path in PROBES)

    def responsive(self) -> bool:
        """Whether it answers at once, paused or not."""
        return any(self._answers(path) for path in PROBES[1:])

    def server_info(self) -> ServerInfo:
        body = self._call("GET", "/server_info", absent_ok=True)
        if body is None:
            body = self._call("GET", "/get_server_info")
        try:
            return msgspec.convert(body, ServerInfo, strict=False)
        except msgspec.ValidationError as error:
            raise ReceiverError(f"{self.address} /server_info: {error}") from None

    def generate(self, request: object) -> object:
        return self._call("POST", "/generate", request)

    def load_adapter(self, name: str, directory: str) -> None:
        """Serve the PEFT adapter in `directory`, which the server must see too, in place of any of that name."""
        try:
            self.unload_adapter(name)
        except ReceiverError as error:
            if error.status is None:
                raise
        self._call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": directory, "pinned": False})

    def unload_adapter(self, name: str) -> None:
        self._call("POST", "/unload_lora_adapter", {"lora_name": name})

    def update_from_disk(self, directory: str) -> None:
        self._call("POST", "/update_weights_from_disk", {"model_path": directory})

    def pause(self, mode: PauseMode) -> None:
        self._call("POST", "/pause_generation", {"mode": mode})

    def resume(self) -> None:
        self._call("POST", "/continue_generation", {})

    def join_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Make the server join an update group. Blocks its scheduler until all members are there."""
        self._call(
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
        self._call("POST", "/destroy_weights_update_group", {"group_name": group_name})

    def begin_update(self) -> None:
        """Open an update session, closing one that a failed update left open. SGLang before 0.5.21 has none."""
        try:
            self._call("POST", "/begin_weight_update", {}, absent_ok=True)
        except ReceiverError as error:
            if error.status is None:
                raise
            with contextlib.suppress(ReceiverError):
                self.end_update()
            self._call("POST", "/begin_weight_update", {})

    def end_update(self) -> None:
        self._call("POST", "/end_weight_update", {}, absent_ok=True)

    def receive_bucket(self, tensors: Announcement, group_name: str) -> None:
        """Receive one broadcast and load it; returns when it is loaded."""
        self._call(
            "POST",
            "/update_weights_from_distributed",
            {
                "names": tensors.names,
                "dtypes": tensors.dtypes,
                "shapes": tensors.shapes,
                "group_name": group_name,
                "flush_cache": False,
                "load_format": "flattened_bucket",
            },
        )

    def set_weight_version(self, version: str) -> None:
        self._call("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def flush_cache(self) -> None:
        self._call("POST", "/flush_cache")

    def _answers(self, path: str) -> bool:
        try:
            return self._http.get(path, timeout=HEALTH_TIMEOUT_S).is_success
        except httpx.HTTPError:
            return False

    def _call(self, method: str, path: str, body: object = None, *, absent_ok: bool = False) -> object:
        """The decoded answer; None if it is not JSON or, with `absent_ok`, if the server has no such route."""
        where = f"{self.address} {path}"
        try:
            answer = (
                self._http.request(method, path, json=body) if body is not None else self._http.request(method, path)
            )
        except httpx.TimeoutException:
            raise ReceiverError(f"{where}: no answer within {self._http.timeout.read:g} s") from None
        except httpx.HTTPError as error:
            raise ReceiverError(f"{where}: {error or type(error).__name__}") from None
        if answer.status_code == 404 and absent_ok:
            return None
        content = _decoded(answer)
        if not answer.is_success or _says_failure(content):
            raise ReceiverError(f"{where}: {_reason(answer, content)}", answer.status_code)
        return content


def _decoded(answer: httpx.Response) -> object:
    try:
        return answer.json()
    except ValueError:
        return None


def _says_failure(content: object) -> bool:
    return isinstance(content, dict) and content.get("success") is False


def _reason(answer: httpx.Response, content: object) -> str:
    if isinstance(content, dict):
        reasons = [content[key] for key in ("message", "error_message", "error", "detail") if content.get(key)]
        if reasons:
            nested = reasons[0]
            return str(nested.get("message", nested) if isinstance(nested, dict) else nested)
    return f"HTTP {answer.status_code} {answer.text[:200].strip()}".strip()
