"""Runs rows together: prompts once each, then one token a row a step. T: tokens; B: rows; V: vocabulary; H: hidden."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xorl.errors import InternalError
from xorl.sampler.cache import KvRows
from xorl.sampler.network import Network
from xorl.sampler.rows import PromptLogprobs, Row, TopTokens
from xorl.sampler.sampling import draw, top

_LOGPROB_CHUNK_TOKENS = 256


class Batch:
    """The running rows and their keys and values, in one order, rows of one adapter side by side."""

    def __init__(self, network: Network) -> None:
        self.rows: list[Row] = []
        self._network = network
        self._kv: KvRows | None = None

    def prefill(self, rows: Sequence[Row], weight_version: str) -> None:
        """Compute the rows' tokens so far, draw the next of each, then let them join. Equal ones are computed once."""
        rows = sorted(rows, key=lambda row: (id(row.prompt.adapter), len(row.tokens)))
        try:
            kv = self._prefill(rows, weight_version)
            self._kv = kv if self._kv is None else self._kv.join(kv)
        except Exception as error:  # rows that have not joined yet are nobody else's to fail
            for row in rows:
                row.fail(InternalError(f"{type(error).__name__}: {error}"))
            return
        self.rows = self.rows + rows
        self._reorder(sorted(range(len(self.rows)), key=lambda row: id(self.rows[row].prompt.adapter)))

    def decode(self, weight_version: str) -> None:
        """Draw the next token of every row."""
        assert self._kv is not None
        adapters = [row.prompt.adapter for row in self.rows]
        hidden_BH = self._network.decode([row.output[-1] for row in self.rows], self._kv, adapters)
        self._draw(hidden_BH, self.rows, weight_version)

    def drop_finished(self) -> None:
        live = [row_idx for row_idx, row in enumerate(self.rows) if row.finish is None]
        self._reorder(live)

    def take_all(self) -> list[Row]:
        """Empty the batch; the rows' keys and values are gone."""
        rows, self.rows, self._kv = self.rows, [], None
        return rows

    def _prefill(self, rows: Sequence[Row], weight_version: str) -> KvRows:
        first: dict[object, int] = {}  # what is computed -> its place in the pack
        sources, unique = [], list[Row]()
        for row in rows:
            key = (row.tokens, id(row.prompt.adapter), _logprob_start(row), row.prompt.num_top)
            if key in first:
                row.cached_tokens = len(row.prompt.tokens)
            else:
                first[key] = len(unique)
                unique.append(row)
            sources.append(first[key])
        lengths = [len(row.tokens) for row in unique]
        hidden_TH, cache = self._network.prefill([row.tokens for row in unique], [row.prompt.adapter for row in unique])
        logprobs = self._prompt_logprobs(hidden_TH, unique, lengths)
        for row, source in zip(rows, sources, strict=True):
            row.prompt_logprobs = row.prompt_logprobs or logprobs[source]
        last = torch.tensor(lengths).cumsum(0)[sources] - 1
        self._draw(hidden_TH[last.to(hidden_TH.device)], rows, weight_version)
        return cache.unpack(lengths, sources)

    def _draw(self, hidden_BH: Tensor, rows: Sequence[Row], weight_version: str) -> None:
        logits_BV = self._network.logits(hidden_BH, [row.prompt.adapter for row in rows], [1] * len(rows))
        for row_idx, row in enumerate(rows):
            if row.suppressed:
                logits_BV[row_idx, sorted(row.suppressed)] = float("-inf")
        drawn = draw(logits_BV, [row.prompt.sampling for row in rows], [row.next_uniform for row in rows])
        for row, token, logprob in zip(rows, drawn.tokens, drawn.logprobs, strict=True):
            if not math.isfinite(logprob):
                row.fail(InternalError("the model's logits are not finite"))
            elif row.prompt.stop.max_new_tokens > 0:
                row.append(token, logprob, weight_version)
        self._add_top(drawn.logprobs_BV, rows)

    def _add_top(self, logprobs_BV: Tensor, rows: Sequence[Row]) -> None:
        curious = [row_idx for row_idx, row in enumerate(rows) if row.prompt.num_top and len(row.output)]
        if not curious:
            return
        num_top = max(rows[row_idx].prompt.num_top for row_idx in curious)
        for row_idx, values, tokens in zip(curious, *top(logprobs_BV[curious], num_top), strict=True):
            kept = rows[row_idx].prompt.num_top
            rows[row_idx].top.append(TopTokens(values[:kept], tokens[:kept]))

    def _prompt_logprobs(
        self, hidden_TH: Tensor, rows: Sequence[Row], lengths: Sequence[int]
    ) -> list[PromptLogprobs | None]:
        found: list[PromptLogprobs | None] = []
        begin = 0
        for row, length in zip(rows, lengths, strict=True):
            start = _logprob_start(row)
            found.append(None if start is None else self._score(hidden_TH[begin : begin + length], row, start))
            begin += length
        return found

    def _score(self, hidden_TH: Tensor, row: Row, start: int) -> PromptLogprobs:
        """Log-probabilities, at temperature 1, of the prompt's tokens after `start`."""
        prompt = row.prompt
        scored = PromptLogprobs(start, [], [])
        for chunk_start in range(start, len(prompt.tokens) - 1, _LOGPROB_CHUNK_TOKENS):
            chunk_stop = min(chunk_start + _LOGPROB_CHUNK_TOKENS, len(prompt.tokens) - 1)
            hidden_CH = hidden_TH[chunk_start:chunk_stop]
            logprobs_CV = self._network.logits(hidden_CH, [prompt.adapter], [len(hidden_CH)]).log_softmax(dim=-1)
            targets_C = torch.tensor(prompt.tokens[chunk_start + 1 : chunk_stop + 1], device=hidden_CH.device)
            scored.logprobs.extend(logprobs_CV.gather(1, targets_C[:, None])[:, 0].tolist())
            if prompt.num_top:
                scored.top.extend(map(TopTokens, *top(logprobs_CV, prompt.num_top)))
        return scored

    def _reorder(self, order: list[int]) -> None:
        """Keep these rows, in this order."""
        if order == list(range(len(self.rows))):
            return
        self.rows = [self.rows[row_idx] for row_idx in order]
        self._kv = self._kv.select(order) if self._kv is not None and order else None


def _logprob_start(row: Row) -> int | None:
    """Where scoring of the prompt begins, unless it is not wanted or done (before a retraction)."""
    return row.prompt.logprob_start if row.prompt_logprobs is None else None
