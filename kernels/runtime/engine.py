"""Runs a closed set of requests, and keeps the device busy until every one has ended.

In each turn of the loop a prefill step and a decode step are planned and enqueued, and then the tokens of the turn
before are looked at, so that the host works while the device does. The device feeds tokens back to itself; the host
needs them only to see where an answer ends, which it does one step late: that step's token is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qoq.kernels.runtime.graphs import DecodeSteps
from qoq.kernels.runtime.model import RuntimeModel
from qoq.kernels.runtime.sampling import sample
from qoq.kernels.runtime.scheduler import Chunk, DecodePlan, Finish, Request, Running, Scheduler, decode_batches
from qoq.kernels.runtime.steps import DecodeInputs, Piece, draws_of, row_of
from qoq.kernels.upload import Upload
from qoq.recipes.errors import InputError

OnToken = Callable[[int, int], None]
"""on_token(index of the request, token)."""


@dataclass(frozen=True)
class Completion:
    """The answer to a request.

    times         seconds from the start of the run to when the host knew each token
    preemptions   how often it was set back, its pages given to others
    """

    tokens: tuple[int, ...]
    finish: Finish
    times: tuple[float, ...]
    preemptions: int


@dataclass(frozen=True)
class RunStats:
    """What a run did: steps of each kind, and rows of decode steps, those that were idle included."""

    seconds: float
    prefill_steps: int
    decode_steps: int
    decode_rows: int


class Engine:
    """Generates with a model; one run at a time. `stats` are those of the last run."""

    def __init__(self, model: RuntimeModel) -> None:
        self.model = model
        self.stats = RunStats(0.0, 0, 0, 0)
        max_pages = model.pool.pages_for(model.longest)
        self._inputs = DecodeInputs(model.decoder.cache, model.max_batch, max_pages, model.device)
        graphs = model.options.graphs and model.device.type == "cuda"
        self._steps = DecodeSteps(self._decode, self._inputs, graphs=graphs)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], *, on_token: OnToken = lambda index, token: None
    ) -> list[Completion]:
        """The answers, in the order of the requests; `on_token` is told of each token when it is known.

        Raises InputError, before anything runs, for a request that makes no sense or is longer than there is room for.
        """
        longest, vocabulary = self.model.longest, self.model.config.vocab_size
        for index, request in enumerate(requests):
            if request.prompt and not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
                raise InputError(
                    f"request {index}: tokens {min(request.prompt)} to {max(request.prompt)}, but the model has "
                    f"{vocabulary}, from 0 on",
                    remedy="use the tokenizer of this model",
                )
            if request.longest > longest:
                raise InputError(
                    f"request {index}: {len(request.prompt)} tokens and {request.max_new_tokens} new ones, but a "
                    f"sequence has at most {longest}",
                    remedy="shorten the prompt or ask for fewer tokens",
                )
        run = _Run(self.model, self._inputs, self._steps, requests, on_token)
        try:
            while run.scheduler.unfinished:
                run.turn()
        finally:
            run.end()
        self.stats = run.stats()
        return run.completions()

    @torch.inference_mode()
    def warm_up(self, *, draws: bool = False) -> None:
        """Capture the graphs of all batches now, the largest first, so that no run waits for one."""
        for batch in reversed(decode_batches(self.model.max_batch)):
            self._steps.prepare(batch, draws)

    @torch.inference_mode()
    def prepare_decode(self, plan: DecodePlan) -> Callable[[], None]:
        """What enqueues this greedy decode step again and again, for measurements; not while a run is under way."""
        self._steps.prepare(plan.batch, False)
        self._inputs.send(plan)
        return torch.inference_mode()(partial(self._steps.launch, plan.batch, False))

    def _decode(self, batch: int, draws: bool) -> None:
        """A decode step of the first rows: reads and replaces their tokens, all on the device."""
        inputs, decoder = self._inputs, self.model.decoder
        logits = decoder.decode(inputs.tokens[:batch], inputs.step(batch))
        tokens = sample(logits, inputs.draws(batch) if draws else None)
        inputs.tokens[:batch] = tokens


@dataclass(frozen=True)
class _Flight:
    """Tokens that were asked for, of which sequences; on the host once `ready` is reached (None: at once)."""

    sequences: tuple[Running, ...]
    tokens: Tensor
    rows: tuple[int, ...]
    ready: torch.cuda.Event | None


class _Run:
    """One closed set of requests on its way."""

    def __init__(
        self,
        model: RuntimeModel,
        inputs: DecodeInputs,
        steps: DecodeSteps,
        requests: Sequence[Request],
        on_token: OnToken,
    ) -> None:
        self._model, self._inputs, self._steps, self._on_token = model, inputs, steps, on_token
        options = model.options
        self.scheduler = Scheduler(model.pool, max_batch=model.max_batch, chunk_tokens=options.chunk_tokens)
        self._sequences = self.scheduler.add(requests)
        self._times: list[list[float]] = [[] for _ in requests]
        self._flights: deque[_Flight] = deque()
        self._prefill_steps = self._decode_steps = self._decode_rows = 0
        self._started = time.perf_counter()

    def turn(self) -> None:
        """Launch what can run, then look at the tokens of the turn before: of this one too if nothing was launched."""
        before, rows = len(self._flights), 0
        chunks = self.scheduler.next_chunks()
        if chunks:
            self._prefill(chunks)
        if not (chunks and self._model.options.prefill_first):
            if self.scheduler.lacks_pages():
                self._land(0)
                before = 0
            rows = self._decode()
        self._land(len(self._flights) - before if chunks or rows else 0)

    def end(self) -> None:
        """Give back the pages of a run that was broken off; one that ended has none."""
        for sequence in self._sequences:
            self._model.pool.give_back(sequence.pages)
            sequence.pages = []

    def stats(self) -> RunStats:
        seconds = time.perf_counter() - self._started
        return RunStats(seconds, self._prefill_steps, self._decode_steps, self._decode_rows)

    def completions(self) -> list[Completion]:
        return [_completion(sequence, times) for sequence, times in zip(self._sequences, self._times, strict=True)]

    def _prefill(self, chunks: Sequence[Chunk]) -> None:
        """Prefill chunks, and draw a token for each sequence whose last one is among them."""
        hidden = self._model.extend([
            Piece(chunk.sequence.tokens[chunk.start : chunk.start + chunk.count], chunk.start, chunk.sequence.pages)
            for chunk in chunks
        ])  # fmt: skip
        self._prefill_steps += 1
        ended, lasts, rows, last = [], [], [], -1
        for chunk in chunks:
            last += chunk.count
            if chunk.row is not None:
                ended.append(chunk.sequence)
                lasts.append(last)
                rows.append(chunk.row)
        if not ended:
            return
        upload = Upload(self._model.device)
        last_rows, targets = upload.add(lasts, torch.int64), upload.add(rows, torch.int64)
        draws = draws_of(ended, upload)
        upload.send()
        tokens = sample(self._model.decoder.logits(hidden.index_select(0, last_rows)), draws)
        self._inputs.tokens.index_copy_(0, targets, tokens)
        self._fly(ended, tokens, range(len(ended)))

    def _decode(self) -> int:
        """Rows of the decode step that was launched; 0 for none."""
        plan = self.scheduler.next_decode()
        if plan is None:
            return 0
        draws = any(sequence.request.temperature > 0 for sequence in plan.sequences)
        self._steps.prepare(plan.batch, draws)
        self._inputs.send(plan)
        self._steps.launch(plan.batch, draws)
        self._decode_steps += 1
        self._decode_rows += plan.batch
        self._fly(plan.sequences, self._inputs.tokens[: plan.batch], [row_of(s) for s in plan.sequences])
        return plan.batch

    def _fly(self, sequences: Sequence[Running], tokens: Tensor, rows: Sequence[int]) -> None:
        """Send tokens [B] to the host: those of `sequences` are in `rows`."""
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
        host.copy_(tokens, non_blocking=True)
        ready = None
        if tokens.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._flights.append(_Flight(tuple(sequences), host, tuple(rows), ready))
        self.scheduler.launched(sequences)

    def _land(self, most: int) -> None:
        """Look at tokens until at most so many flights are under way."""
        while len(self._flights) > most:
            flight = self._flights.popleft()
            if flight.ready is not None:
                flight.ready.synchronize()
            now = time.perf_counter() - self._started
            tokens = flight.tokens.tolist()
            for sequence, row in zip(flight.sequences, flight.rows, strict=True):
                if sequence.finish is None:
                    self._times[sequence.index].append(now)
                    self.scheduler.record(sequence, tokens[row])
                    self._on_token(sequence.index, tokens[row])


def _completion(sequence: Running, times: Sequence[float]) -> Completion:
    if sequence.finish is None:
        raise RuntimeError(f"request {sequence.index} has not ended")
    answer = sequence.tokens[len(sequence.request.prompt) :]
    return Completion(tuple(answer), sequence.finish, tuple(times), sequence.preemptions)
