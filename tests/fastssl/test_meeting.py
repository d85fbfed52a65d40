"""The roll call: all are there, some are missing, leftovers of ended processes mislead nobody."""

from __future__ import annotations

import threading
import time

import pytest
from processes import free_port

from fastssl.distributed.rendezvous import NotMet, Patience, agent_keeps_store, connect, meet, read
from fastssl.errors import FastSSLError


class Place:
    """A store that outlives the processes, as torchrun's does; "processes" are threads with a connection of their
    own.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.store = connect("127.0.0.1", self.port, 5, keep=True)

    def meet(self, ranks: list[int], size: int, seconds: float = 10, delays: tuple[float, ...] = ()) -> dict[int, str]:
        """What each of ``ranks`` got: its word, or the message of ``NotMet``."""
        found: dict[int, str] = {}

        def one(rank: int, delay: float) -> None:
            time.sleep(delay)
            try:
                found[rank] = meet(connect("127.0.0.1", self.port, 5), rank, size, seconds)
            except NotMet as error:
                found[rank] = f"NotMet: {error}"

        threads = [
            threading.Thread(target=one, args=(rank, delay))
            for rank, delay in zip(ranks, delays or (0.0,) * len(ranks))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        return found


def test_all_get_one_word_in_whatever_order_they_come() -> None:
    place = Place()
    words = set()
    for delays in ((0.0, 0.0, 0.0), (0.5, 0.0, 0.2), (0.0, 0.4, 0.1)):
        found = place.meet([0, 1, 2], 3, delays=delays)
        assert set(found) == {0, 1, 2} and len(set(found.values())) == 1 and not found[0].startswith("NotMet")
        words.add(found[0])
    assert len(words) == 3, "whoever is started again meets under a new word"


def test_everyone_says_who_is_missing() -> None:
    place = Place()
    assert place.meet([0, 2], 4, seconds=0.5) == dict.fromkeys((0, 2), "NotMet: processes 1 and 3 are missing")
    assert read(place.store, "call") == ""
    assert place.meet([1, 2], 3, seconds=0.3) == dict.fromkeys((1, 2), "NotMet: process 0 is missing")
    assert place.meet([0], 2, seconds=0.3) == {0: "NotMet: process 1 is missing"}
    assert place.meet([0], 20, seconds=0.3) == {0: "NotMet: processes 1, 2, 3, 4, 5, 6, 7, 8 and 11 others are missing"}


def test_the_call_of_an_ended_process_is_not_taken_for_a_living_one() -> None:
    place = Place()
    assert len(set(place.meet([0, 1], 2).values())) == 1
    # The store still holds a call, this process's answer to it and a confirmation; process 0 comes late, or never.
    found = place.meet([1], 2, seconds=0.5)
    assert found[1].startswith("NotMet: process 0 ")
    found = place.meet([1, 0], 2, delays=(0.0, 0.5))
    assert found[0] == found[1] and not found[0].startswith("NotMet")


def test_the_environment_sets_the_patience() -> None:
    assert Patience.from_environment({}) == Patience(10, 60)
    assert Patience.from_environment({"FASTSSL_MEET_MINUTES": "0.5", "FASTSSL_SILENT_SECONDS": "300"}) == Patience(
        0.5, 300
    )
    assert Patience.from_environment({"FASTSSL_MEET_MINUTES": ""}) == Patience()
    for text in ("soon", "-1", "0", "nan", "inf"):
        with pytest.raises(FastSSLError, match=f"FASTSSL_SILENT_SECONDS='{text}'"):
            Patience.from_environment({"FASTSSL_SILENT_SECONDS": text})


def test_torchruns_store_is_used_where_torchrun_serves_it() -> None:
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    assert agent_keeps_store("head", 29500, agent)
    assert not agent_keeps_store("head", 29501, agent)
    assert not agent_keeps_store("head", 29500, {**agent, "TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not agent_keeps_store("head", 29500, {})
