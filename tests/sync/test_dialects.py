import pytest

from sync.fake_sglang import FakeSglang
from xorl.sync.dialects import InSession, Sessionless, TwoPhase, dialect_of, takes_buckets
from xorl.sync.receiver import Receiver, ServerInfo


@pytest.mark.parametrize(
    ("kind", "dialect"), [({}, InSession), ({"sessions": False}, Sessionless), ({"two_phase": True}, TwoPhase)]
)
def test_the_dialect_shows_in_the_routes_and_asking_does_nothing(kind, dialect):
    with FakeSglang(**kind).serving() as server:
        receiver = Receiver("127.0.0.1", server.port)
        assert type(dialect_of(receiver)) is dialect
        assert server.calls == []
        receiver.close()


def test_an_update_session_left_open_is_closed_first():
    with FakeSglang().serving() as server:
        server.session = True
        receiver = Receiver("127.0.0.1", server.port)
        dialect_of(receiver).begin()
        assert server.session
        assert server.calls == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]
        receiver.close()


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.5.23", True), ("0.5.17.post1", True), ("1.0.0", True), ("0.5.3", False), ("0.4.10", False), ("dev", True)],
)
def test_old_servers_take_tensor_by_tensor(version, expected):
    assert takes_buckets(ServerInfo(version=version)) is expected
