from collections.abc import Iterator

import pytest

from sync.fake_sglang import FakeSglang
from xorl.sync.receiver import Receiver, ReceiverError, ServerInfo


@pytest.fixture
def server() -> Iterator[FakeSglang]:
    with FakeSglang().serving() as server:
        yield server


@pytest.fixture
def receiver(server: FakeSglang) -> Iterator[Receiver]:
    receiver = Receiver("127.0.0.1", server.port, timeout_s=5)
    yield receiver
    receiver.close()


def test_a_paused_server_is_alive(server, receiver):
    assert receiver.alive()
    receiver.pause("retract")
    assert receiver.alive()
    assert server.calls[-2:] == ["/health", "/model_info"]


def test_a_server_that_is_gone_is_not_alive():
    with FakeSglang().serving() as server:
        pass
    receiver = Receiver("127.0.0.1", server.port)
    assert not receiver.alive()
    with pytest.raises(ReceiverError, match=f"127.0.0.1:{server.port} /server_info: .*refused") as caught:
        receiver.server_info()
    assert caught.value.status is None


def test_server_info_keeps_what_we_know_and_none_for_the_rest(server, receiver):
    server.info = {"model_path": "m", "tp_size": 2, "enable_lora": True, "max_total_num_tokens": 4}
    assert receiver.server_info() == ServerInfo(model_path="m", tp_size=2, enable_lora=True)


def test_an_adapter_takes_the_place_of_its_namesake(server, receiver):
    receiver.load_adapter("a", "/one")
    receiver.load_adapter("a", "/two")
    assert server.adapters == {"a": "/two"}
    receiver.unload_adapter("a")
    assert server.adapters == {}


def test_a_refusal_names_server_route_and_reason(server, receiver):
    with pytest.raises(ReceiverError, match=f"^127.0.0.1:{server.port} /unload_lora_adapter: not loaded$") as caught:
        receiver.unload_adapter("never")
    assert caught.value.status == 400


def test_a_key_is_sent_where_one_is_asked_for():
    with FakeSglang(api_key="secret").serving() as server:
        without, holder = Receiver("127.0.0.1", server.port), Receiver("127.0.0.1", server.port, "secret")
        assert holder.server_info().model_path == "m"
        with pytest.raises(ReceiverError, match="it asks for an API key") as caught:
            without.server_info()
        assert caught.value.status == 401
        without.close()
        holder.close()
