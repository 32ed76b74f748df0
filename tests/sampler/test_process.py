"""`xorl sampler` as a process: it becomes ready, answers over a socket, and stops on SIGTERM."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx

from processes import running


def test_thirty_two_clients_at_once(tiny_model: Path, tmp_path: Path) -> None:
    with (
        running(tmp_path / "log", "sampler", "--model", str(tiny_model)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(32) as pool,
    ):

        def ask(idx: int) -> list[int]:
            params = {"max_new_tokens": 20, "ignore_eos": True, "sampling_seed": idx % 4}
            answer = client.post("/generate", json={"input_ids": [5, 6, 7], "sampling_params": params})
            return answer.raise_for_status().json()["output_ids"]

        answers = list(pool.map(ask, range(32)))
    assert [answers[idx % 4] for idx in range(32)] == answers
    assert len({tuple(answer) for answer in answers}) == 4


def test_it_stops_while_requests_are_held(tiny_model: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running(tmp_path / "log", "sampler", "--model", str(tiny_model)) as url:
            httpx.post(f"{url}/pause_generation", json={"mode": "retract"}).raise_for_status()
            held = pool.submit(httpx.post, f"{url}/generate", json={"input_ids": [5], "rid": "held"}, timeout=60)
        with suppress(httpx.TransportError):
            assert held.result().status_code != 200
