"""Live traffic on both versions of a model, for a trial.

Invariants: a caller gets an answer of the version that runs whenever the candidate does not give one; what a caller
does not wait for is bounded (BESIDE), and beyond it requests go to the running version alone; a request that the
running version refuses too is no fault of the candidate.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.rhythm import wait_up_to
from edge_agent.update.trial import Figures, Tally, Why, Worse, figures, judge, slower
from edge_agent.wire.updates import Trial

BESIDE = 4
PROBES = 5
PATIENCE_S = (1.0, 60.0)  # how long a candidate may take to be compared at all
_HINT = "the version before goes on; the samples and the log say where it differs"
Q = TypeVar("Q")
A = TypeVar("A")


class Mirror(Generic[Q, A]):
    """`new` asks the candidate within seconds; `agree` compares answers; `show` writes a request down."""

    def __init__(
        self,
        plan: Trial,
        new: Callable[[Q, float], Awaitable[A]],
        agree: Callable[[A, A], float | None],
        show: Callable[[Q], str],
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.plan, self._new, self._agree, self._show, self._chance = plan, new, agree, show, chance
        self.probes, self.traffic = Tally(), Tally()
        self._beside: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self.alone = False  # the old version is gone: everything goes to the new one

    async def ask(self, question: Q, old: Callable[[Q], Awaitable[A]]) -> A:
        """An answer for a caller. Raises what the running version raises."""
        if self.alone:
            return await self._only(question, old)
        if not self._picks():
            return await old(question)
        if self.plan.mode == "shadow":
            answer, took = await _timed(old(question))
            self._spawn(self._compare(self.traffic, question, answer, took))
            return answer
        try:
            answer, took = await _timed(self._new(question, self._patience()))
        except OutriderError as error:
            answer = await old(question)
            self._erred(self.traffic, question, error)
            return answer
        self._spawn(self._behind(question, old, answer, took))
        return answer

    def heard(self, question: Q, answer: A, took: float) -> None:
        """An answer that the running version gave piece by piece."""
        if not self.alone and self._picks():
            self._spawn(self._compare(self.traffic, question, answer, took))

    async def probe(self, question: Q, old: Callable[[Q], Awaitable[A]]) -> list[tuple[A, float]]:
        """The running version's answers to a golden question, and their times; none when it takes no such question."""
        try:
            await old(question)
            return [await _timed(old(question)) for _ in range(PROBES)]
        except OutriderError:
            return []

    async def measure(self, question: Q, before: list[tuple[A, float]]) -> None:
        """Ask the candidate the golden question as often. Raises Worse when it is too slow or does not answer.

        How far it agrees is judged here when no traffic can, else at the end when none did.
        """
        for answer, took in before:
            await self._compare(self.probes, question, answer, took)
        ratio, least = self.plan.max_latency_ratio, self.plan.min_agreement if self.alone else 0.0
        plan = Trial(max_error_rate=0.0, max_latency_ratio=ratio, min_agreement=least)
        if reason := judge(plan, self.probes, PROBES):
            raise self.worse(reason, "probe", self.probes, 0.0)

    async def run(self) -> Figures:
        """Watch the traffic for the plan's time. Raises Worse as soon as a budget is broken."""
        began, plan = time.monotonic(), self.plan
        try:
            while (left := began + plan.seconds - time.monotonic()) > 0:
                self._news.clear()
                if reason := judge(plan, self.traffic, plan.minimum):
                    raise self.worse(reason, "traffic", self.traffic, time.monotonic() - began)
                await wait_up_to(left, self._news)
        finally:
            for task in self._beside:
                task.cancel()
            await asyncio.gather(*self._beside, return_exceptions=True)
        seconds, traffic = time.monotonic() - began, self.traffic
        enough, note = traffic.asked >= plan.minimum, ""
        if not enough:
            note = (
                f"{traffic.asked} requests came in {seconds:.0f} s, {plan.minimum} are asked: the golden probe decides"
            )
        for tally, decided in ((traffic, "traffic"), *([] if enough else [(self.probes, "probe")])):
            if tally.asked and (reason := judge(plan, tally, min(tally.asked, plan.minimum))):
                raise self.worse(reason, decided, tally, seconds, note)
        return figures("traffic" if enough else "probe", plan, traffic if enough else self.probes, seconds, note)

    def worse(self, reason: str, decided: str, tally: Tally, seconds: float, note: str = "") -> Worse:
        why = Why(figures(decided, self.plan, tally, seconds, note), tally.samples)
        return Worse(f"worse than the version that runs, by {decided}: {reason}", _HINT, why)

    def _picks(self) -> bool:
        return len(self._beside) < BESIDE and self._chance() < self.plan.share

    def _patience(self) -> float:
        usual = max(self.traffic.old_s or 0.0, self.probes.old_s or 0.0)
        least, most = PATIENCE_S
        return min(most, max(least, 5 * self.plan.max_latency_ratio * usual)) if usual else most

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _only(self, question: Q, new: Callable[[Q], Awaitable[A]]) -> A:
        try:
            answer, took = await _timed(new(question))
        except Retry as error:
            self._erred(self.traffic, question, error)
            raise
        self._take(self.traffic, question, self.probes.old_s, took, None)
        return answer

    async def _behind(self, question: Q, old: Callable[[Q], Awaitable[A]], answer: A, took: float) -> None:
        try:
            before, old_s = await _timed(old(question))
        except OutriderError:
            return
        self._take(self.traffic, question, old_s, took, await asyncio.to_thread(self._agree, before, answer))

    async def _compare(self, tally: Tally, question: Q, old: A, old_s: float) -> None:
        began, patience = time.monotonic(), self._patience()
        try:
            answer, took = await _timed(self._new(question, patience))
        except OutriderError as error:
            waited = time.monotonic() - began
            if isinstance(error, Retry) and waited >= patience:  # it might have answered yet, but far too late
                self._take(tally, question, old_s, waited, None)
            else:
                self._erred(tally, question, error)
            return
        self._take(tally, question, old_s, took, await asyncio.to_thread(self._agree, old, answer))

    def _take(self, tally: Tally, question: Q, old_s: float | None, new_s: float, agreement: float | None) -> None:
        tally.compared(old_s, new_s, agreement)
        if agreement is not None and agreement < (self.plan.min_agreement or 0.0):
            tally.keep(f"agrees to {agreement:.3f}: {self._show(question)}")
        elif times := slower(self.plan, old_s, new_s):
            tally.keep(f"{new_s * 1e3:.1f} ms, {times:.1f} times as long: {self._show(question)}")
        self._news.set()

    def _erred(self, tally: Tally, question: Q, error: OutriderError) -> None:
        tally.erred()
        tally.keep(f"{'refused' if isinstance(error, Refused) else 'failed'}: {error.message}: {self._show(question)}")
        self._news.set()


async def _timed(answer: Awaitable[A]) -> tuple[A, float]:
    began = time.monotonic()
    return await answer, time.monotonic() - began
