"""The demo's task: sums of two numbers below twenty, whose reward anyone can check."""

import random
from typing import NamedTuple

SHOWN = ((13, 4), (8, 5))
EXAMPLES = "".join(f"{a}+{b}={a + b}\n" for a, b in SHOWN)
"""What shows the model the form of an answer: the sum and a line's end."""

NUM_HELD_OUT = 64


class Problem(NamedTuple):
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{EXAMPLES}{self.a}+{self.b}="

    def reward(self, completion: str) -> float:
        """1 for the right sum and nothing else on the line, else 0."""
        return float(completion == f"{self.a + self.b}\n")


def problems() -> tuple[list[Problem], list[Problem]]:
    """All problems, cut into those to train on and those held out; the same cut in every run."""
    every = [Problem(a, b) for a in range(20) for b in range(20) if (a, b) not in SHOWN]
    random.Random(0).shuffle(every)
    return every[NUM_HELD_OUT:], every[:NUM_HELD_OUT]
