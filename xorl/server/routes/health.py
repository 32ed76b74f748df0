"""Serves health, metrics, and sleep."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from xorl.engine.commands import Sleep, WakeUp
from xorl.server import schema
from xorl.server.plane import Plane
from xorl.server.requests import StrictRoute

router = APIRouter(tags=["health"], route_class=StrictRoute)


@router.get("/health", responses={503: {"model": schema.Health}})
async def health(plane: Plane, response: Response) -> schema.Health:
    running = plane.engine.state == "running" and plane.engine.info is not None
    if not running:
        response.status_code = 503
    status = "healthy" if running else "unhealthy" if plane.engine.state == "dead" else "starting"
    return schema.Health(
        status=status,
        engine_running=running,
        active_requests=plane.futures.num_active,
        total_requests=plane.futures.num_total,
    )


@router.get("/api/v1/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/")
async def root(plane: Plane) -> dict[str, str | None]:
    info = plane.engine.info
    return {"name": "xorl", "version": _version(), "base_model": info.names[0] if info else None, "docs": "/docs"}


def _version() -> str:
    try:
        return version("xorl")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "source"


@router.get("/metrics")
async def metrics(plane: Plane) -> Response:
    running, queued, active = plane.engine.state == "running", plane.engine.num_queued, plane.futures.num_active
    return Response(plane.metrics.page(running=running, queued=queued, active=active), media_type=CONTENT_TYPE_LATEST)


@router.post("/sleep")
async def sleep(plane: Plane) -> schema.Moved:
    """Move the weights off the GPU. Training calls fail until /wake_up."""
    await plane.models.send_global(Sleep())
    return schema.Moved(success=True, result="asleep")


@router.post("/wake_up")
async def wake_up(plane: Plane) -> schema.Moved:
    await plane.models.send_global(WakeUp())
    return schema.Moved(success=True, result="awake")
