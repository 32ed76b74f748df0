"""Runs a further rank of the engine: takes the steps that the first one tells, and has its share of them.

Started by `xorl.engine.client` as `python -m xorl.engine.follower`, or as `xorl serve` by torchrun. It has no sockets
and no say: all that it knows comes from the first rank, and it ends with it.
"""

import os
import signal
import sys
from pathlib import Path

from xorl.config import Config
from xorl.engine.engine import Engine
from xorl.engine.loop import set_up
from xorl.engine.ranks import ManyRanks, join
from xorl.engine.stages import Stages, or_end
from xorl.engine.trace import Trace
from xorl.errors import EngineLost, XorlError


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the first rank
    ranks = join()
    assert isinstance(ranks, ManyRanks)
    config, spill_dir = ranks.from_first(_told)
    set_up(config.engine)
    try:
        engine = Engine(config, spill_dir / str(ranks.rank), ranks)
    except XorlError as error:
        sys.exit(f"xorl: rank {ranks.rank}: {error}")
    or_end(lambda: follow(engine, ranks))


def follow(engine: Engine, ranks: ManyRanks) -> None:
    """Take part for as long as the first rank lives."""
    stages = Stages(engine, Trace(), lambda *_: None)
    stages.start()
    while True:
        try:
            order = ranks.hear()
        except EngineLost as error:
            print(f"xorl: rank {ranks.rank} ends: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # the other threads may wait for ranks that are gone
        if order.commands:
            stages.take_room()
            stages.take([(0, command) for command in order.commands], order.max_tokens)


def _told() -> tuple[Config, Path]:
    raise AssertionError("the first rank has these")


if __name__ == "__main__":
    main()
