"""Requests that nobody thought of, made from the API's own description."""

import asyncio
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis import Case, GenerationMode

import inprocess
from fakes import FakeEngine, FakeReceivers
from xorl.server.app import create_app

QUICK = hypothesis_settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.filterwarnings("ignore::Warning")  # the generator's own
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_breaks_the_server(mode: GenerationMode, tmp_path: Path):
    """Every call, with bodies as its schema has them and not: what is refused is refused with 4xx and a reason."""
    app = create_app(inprocess.settings(tmp_path, retrieve_hold_s=0.01), FakeEngine(), FakeReceivers().connect)
    operations = [result.ok() for result in schemathesis.openapi.from_dict(app.openapi()).get_all_operations()]
    with asyncio.Runner() as runner:

        async def send(case: Case) -> httpx.Response:
            request = case.as_transport_kwargs(base_url="http://xorl")
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, cookies=request.pop("cookies", None)) as http:
                return await http.request(**request)

        lifespan = app.router.lifespan_context(app)
        runner.run(lifespan.__aenter__())
        for operation in operations:

            @QUICK
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Case) -> None:
                response = runner.run(send(case))
                assert response.status_code < 500, f"{case.method} {case.formatted_path} {case.body!r}: {response.text}"
                assert response.status_code != 409
                if response.status_code >= 400:
                    assert isinstance(response.json()["detail"], str)

            if mode is GenerationMode.POSITIVE or operation.body:
                check()
        runner.run(lifespan.__aexit__(None, None, None))
    assert len(operations) > 40
