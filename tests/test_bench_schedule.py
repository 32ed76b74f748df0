"""The simulated scheduler's figures mean what they say."""

import json

import pytest

from bench.schedule import Arrival, FirstCome, fairness, main, max_min, policies, simulate, synthetic


@pytest.mark.parametrize("name", policies())
def test_every_policy_does_everything_once_and_a_models_requests_in_order(name):
    arrivals = synthetic(16, 2.0)
    done = simulate(arrivals, policies()[name])
    assert sorted(one.arrival for one in done) == sorted(arrivals)
    assert all(one.latency > 0 for one in done)
    for model_id in {arrival.model_id for arrival in arrivals}:
        times = [one.arrival.time for one in done if one.arrival.model_id == model_id]
        assert times == sorted(times)


def test_sharing_saves_the_overhead():
    arrivals = [Arrival(0.0, str(n), 10, "forward") for n in range(20)]
    together, apart = (simulate(arrivals, FirstCome(budget))[-1].stop for budget in (8192, 1))
    assert together < apart / 10


def test_fair_shares():
    assert max_min({"a": 10, "b": 100, "c": 100}, 110) == {"a": 10, "b": 50, "c": 50}
    assert max_min({"a": 10, "b": 20}, 100) == {"a": 10, "b": 20}


def test_jain_is_one_for_equal_parts_and_the_share_of_the_one_who_has_all():
    arrivals = [Arrival(0.0, name, 100, "forward") for name in "abcd" for _ in range(10)]
    done = simulate(arrivals, FirstCome(1))
    assert fairness(arrivals, done) == pytest.approx(1)
    assert fairness(arrivals, done[:4]) == pytest.approx(1 / 4)


def test_recorded_arrivals_are_replayed(tmp_path, capsys):
    lines = [{"time": n / 10, "model_id": "ab"[n % 2], "tokens": 100, "kind": "forward_backward"} for n in range(9)]
    path = tmp_path / "arrivals.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results, picture = tmp_path / "out" / "results.jsonl", tmp_path / "out" / "results.png"
    pytest.importorskip("matplotlib")
    main(["--arrivals", str(path), "--json", str(results), "--png", str(picture)])
    assert {json.loads(line)["tenants"] for line in results.read_text().splitlines()} == {2}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Jain" in capsys.readouterr().out


def test_the_small_mode_runs(capsys):
    main(["--small"])
    assert "xorl" in capsys.readouterr().out
