"""The parts that all calls share: health, keys, bounds, error texts."""

import subprocess
import sys

import httpx
import pytest

from fakes import FakeEngine, FakeReceivers
from inprocess import Server, settings
from xorl.server.app import create_app

pytestmark = pytest.mark.anyio


async def test_health(server: Server):
    assert await server.get("/health") == {
        "status": "healthy",
        "engine_running": True,
        "active_requests": 0,
        "total_requests": 0,
    }
    await server.do("optim_step", {})
    assert (await server.get("/health"))["total_requests"] == 1
    assert await server.get("/api/v1/healthz") == {"status": "ok"}
    assert (await server.get("/"))["base_model"] == "tiny/base"


async def test_a_starting_engine_is_not_healthy_and_takes_nothing(tmp_path, monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(engine, "become_ready", lambda: None)
    app = create_app(settings(tmp_path), engine, FakeReceivers().connect)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://xorl") as http:
        health = await http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        for call in ("optim_step", "unload_model", "save_weights"):
            refused = await http.post(f"/api/v1/{call}", json={})
            assert (refused.status_code, refused.json()) == (503, {"detail": "the engine is still starting"})
        assert (await http.post("/sleep")).status_code == 503


async def test_sleep_and_wake_up(server: Server):
    assert await server.post("/sleep", {}) == {"success": True, "result": "asleep"}
    failed = await server.do("optim_step", {})
    assert failed == {"error": "the model is asleep: POST /wake_up first", "category": "user"}
    assert (await server.post("/wake_up", {}))["success"]
    assert "metrics" in await server.do("optim_step", {})


async def test_a_database_that_takes_nothing_stops_no_training_and_is_named_where_it_matters(server: Server):
    await server.create("m")
    server.app.state.plane.store._db.execute("PRAGMA query_only = 1")
    assert "run database" in await server.refused("create_session", {}, 507)
    assert "run database" in await server.refused("create_model", {"model_id": "n", "base_model": "base"}, 507)
    assert "n" not in server.engine.models
    assert "metrics" in await server.do("optim_step", {"model_id": "m"})


async def test_a_key_opens_every_door_but_health(serve):
    async with serve(api_key="tml-secret") as server:
        await server.get("/health")
        await server.get("/api/v1/healthz")
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "tml-secret"},
            {"x-api-key": "tml-secre"},
            {"x-api-key": "ключ"},
        ):
            raw = {name: value.encode() for name, value in headers.items()}
            response = await server.http.get("/api/v1/session_info", headers=raw)
            assert response.status_code == 401
            assert "detail" in response.json()
        for headers in ({"authorization": "Bearer tml-secret"}, {"x-api-key": "tml-secret"}):
            assert (await server.http.get("/api/v1/session_info", headers=headers)).status_code == 200


async def test_a_body_has_a_bound(serve):
    async with serve(max_body_mb=64) as server:

        async def pieces():
            for _ in range(65):
                yield b" " * 2**20

        for body in (b" " * (64 * 2**20 + 1), pieces()):
            headers = {"content-type": "application/json"}
            response = await server.http.post("/api/v1/forward_backward", content=body, headers=headers)
            assert response.status_code == 413
            assert "larger than" in response.json()["detail"]


@pytest.mark.parametrize(("declared", "most_taken"), [(None, 65), (65 * 2**20, 0)])
async def test_a_body_beyond_the_bound_is_not_read_whole(serve, declared: int | None, most_taken: int):
    taken = 0

    async def pieces():
        nonlocal taken
        for taken in range(1, 1000):  # noqa: B007
            yield b" " * 2**20

    async with serve(max_body_mb=64) as server:
        headers = {"content-type": "application/json"} | ({"content-length": str(declared)} if declared else {})
        for path in ("/api/v1/forward_backward", "/api/v1/save_weights"):
            taken = 0
            response = await server.http.post(path, content=pieces(), headers=headers)
            assert response.status_code == 413
            assert taken <= most_taken


async def test_what_is_not_declared_as_json_is_refused(server: Server):
    for content_type in ("text/plain", "", "application/x-www-form-urlencoded"):
        headers = {"content-type": content_type}
        for call in ("optim_step", "save_weights"):
            response = await server.http.post(f"/api/v1/{call}", content=b"{}", headers=headers)
            assert response.status_code == 400
            assert response.json()["detail"].startswith("body: ")
    for content_type in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"):
        response = await server.http.post("/api/v1/optim_step", content=b"{}", headers={"content-type": content_type})
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"{", 400, "body: not JSON"),
        (b"", 422, "body: missing"),
        (b"[1]", 400, "body: "),
        (b'{"request_id": 1}', 400, "request_id: "),
        (b"{}", 422, "request_id: missing"),
        (b'{"request_id": "\\ud800"}', 400, "body: not JSON"),
    ],
)
async def test_errors_are_text_that_names_the_place(server: Server, body: bytes, status: int, detail: str):
    headers = {"content-type": "application/json"}
    response = await server.http.post("/api/v1/retrieve_future", content=body, headers=headers)
    assert response.status_code == status
    assert response.json()["detail"].startswith(detail)


async def test_a_field_called_path_is_named_too(server: Server):
    assert (await server.refused("load_weights", {"path": None})).startswith("path: ")
    assert await server.refused("load_weights", {}, 422) == "path: missing"
    assert (await server.refused("forward", {"forward_input": None})).startswith("forward_input: ")


async def test_calls_outside_the_api_are_not_found(server: Server):
    for path in ("/connect_inference_endpoint", "/api/v1/save_full_weights_safetensors", "/api/v1/nope"):
        assert (await server.http.post(path, json={})).status_code == 404
    assert (await server.http.get("/api/v1/optim_step")).status_code == 405


async def test_metrics(server: Server):
    await server.do("optim_step", {})
    page = (await server.http.get("/metrics")).text
    assert 'xorl_commands_total{command="OptimStep",outcome="ok"} 1.0' in page
    assert 'xorl_http_requests_total{path="/api/v1/optim_step",status="200"} 1.0' in page
    assert "xorl_engine_running 1.0" in page


def test_the_control_plane_does_not_load_torch():
    code = "import sys, xorl.server.app, xorl.engine.client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
