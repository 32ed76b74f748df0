"""Describes what is generated: a prompt as asked for, a row as it grows, why it ended."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

import msgspec

from xorl.sampler.adapters import LoadedAdapter
from xorl.sampler.sampling import Sampling, uniform
from xorl.sampler.text import Text


class StopRule(msgspec.Struct, frozen=True):
    """When a row ends. `token_ids` include the end-of-sequence tokens unless these are to be ignored."""

    max_new_tokens: int
    min_new_tokens: int = 0
    token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    skip_special_tokens: bool = True


class Length(msgspec.Struct, frozen=True, tag_field="type", tag="length"):
    length: int


class Stop(msgspec.Struct, frozen=True, tag_field="type", tag="stop"):
    matched: int | str


class Abort(msgspec.Struct, frozen=True, tag_field="type", tag="abort"):
    message: str = "Aborted"
    status_code: int | None = None
    err_type: str | None = None


FinishReason = Length | Stop | Abort


class WeightSpan(msgspec.Struct):
    """The output tokens start..end were drawn under this version of the weights."""

    version: str
    start: int
    end: int


class TopTokens(NamedTuple):
    logprobs: list[float]
    tokens: list[int]


class PromptLogprobs(NamedTuple):
    """Of the prompt's tokens after `start`, each given all before it; `top` is empty when none were asked for."""

    start: int
    logprobs: list[float]
    top: list[TopTokens]


class Prompt(msgspec.Struct, frozen=True, eq=False):
    """One sequence to generate.

    Attributes:
        sample_idx: which of the n samples of a request this is; with the seed it decides every draw.
        logprob_start: first prompt token whose logprob is wanted, less one; None for outputs only.
    """

    request_id: str
    tokens: tuple[int, ...]
    sampling: Sampling
    stop: StopRule
    adapter: LoadedAdapter | None
    seed: int
    sample_idx: int
    logprob_start: int | None
    num_top: int


@dataclass(eq=False)
class Row:
    """A prompt and what was generated so far. The engine thread alone changes it, until `future` is done."""

    prompt: Prompt
    future: "Future[Row]" = field(default_factory=lambda: certain_future())
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopTokens] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    weight_spans: list[WeightSpan] = field(default_factory=list)
    cached_tokens: int = 0
    finish: FinishReason | None = None
    created: float = field(default_factory=monotonic)
    weight_version: str = ""  # when it ended
    latency_s: float = 0.0

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt.tokens, *self.output)

    @property
    def next_uniform(self) -> float:
        return uniform(self.prompt.seed, self.prompt.sample_idx, len(self.output))

    @property
    def suppressed(self) -> frozenset[int]:
        """Tokens that may not come next: those that would end the row too early."""
        early = len(self.output) < self.prompt.stop.min_new_tokens
        return self.prompt.stop.token_ids if early else frozenset()

    def append(self, token: int, logprob: float, weight_version: str) -> None:
        if not self.weight_spans or self.weight_spans[-1].version != weight_version:
            self.weight_spans.append(WeightSpan(weight_version, len(self.output), len(self.output)))
        self.output.append(token)
        self.logprobs.append(logprob)
        self.weight_spans[-1].end = len(self.output)

    def end(self, reason: FinishReason, weight_version: str) -> None:
        self.finish = reason
        self.weight_version = weight_version
        self.latency_s = monotonic() - self.created
        self.future.set_result(self)

    def fail(self, error: Exception) -> None:
        if self.finish is None:
            self.finish = Abort(str(error), 500)
            self.future.set_exception(error)


def certain_future() -> "Future[Any]":
    """A future that whoever waits for it cannot cancel, so that the engine may always set it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def finish_reason(row: Row, text: Text) -> FinishReason | None:
    """Why the row ends with the token it has just got, if it does."""
    rule, length = row.prompt.stop, len(row.output)
    if length >= rule.max_new_tokens:
        stop = _matched(row, text)
        return stop or Length(length)
    return _matched(row, text) if length >= rule.min_new_tokens else None


def output_text(row: Row, text: Text, *, keep_stop: bool) -> str:
    """The text of the output, cut before what stopped it."""
    tokens: Sequence[int] = row.output
    match row.finish:
        case Stop(matched=int(token)) if not keep_stop and tokens[-1] == token:
            tokens = tokens[:-1]
        case _:
            pass
    decoded = text.decode(tokens, skip_special_tokens=row.prompt.stop.skip_special_tokens)
    match row.finish:
        case Stop(matched=str(string)) if not keep_stop and string in decoded:
            return decoded[: decoded.index(string)]
        case _:
            return decoded


def _matched(row: Row, text: Text) -> Stop | None:
    rule = row.prompt.stop
    if not row.output:
        return None
    if row.output[-1] in rule.token_ids:
        return Stop(row.output[-1])
    if rule.strings:
        # a character takes at most 4 tokens; one more token may begin before the string does
        window = 4 * max(map(len, rule.strings)) + 1
        tail = text.decode(row.output[-window:], skip_special_tokens=rule.skip_special_tokens)
        for string in rule.strings:
            if string in tail:
                return Stop(string)
    return None
