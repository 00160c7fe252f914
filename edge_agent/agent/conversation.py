"""What was said before in a conversation, as the next task reads it: the last exchanges as they were, the rest short.

Invariants: a conversation is one subject's own; what a task reads of it is kept with the task, so a crash changes
nothing of it. All is bounded: the exchanges by the policy's window of tokens, what falls out of it by MAX_SUMMARY, the
conversations of a device by KEEP. Answers and summaries are untrusted text (taint.py): tools wrote part of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

from edge_agent.agent.calls import Answer
from edge_agent.agent.decide import Model, Speaker
from edge_agent.agent.taint import decisions
from edge_agent.agent.transcript import Exchange, Task
from edge_agent.engines.base import Generate
from edge_agent.errors import OutriderError
from edge_agent.store import Connection, Store

KEEP, MAX_ANSWER, MAX_SUMMARY, SUMMARY_S = 500, 400, 600, 20.0
SYSTEM = "Sum up the conversation in at most three short sentences: what was asked, what was found, what was done."
_log = logging.getLogger("outrider.conversation")


class Conversation(msgspec.Struct, frozen=True):
    """The newest exchanges, oldest first, and what came before them in short."""

    summary: str = ""
    exchanges: list[Exchange] = []

    def read(self) -> list[Exchange]:
        """As the next task reads it."""
        return [Exchange("", "", self.summary)] * bool(self.summary) + self.exchanges


class Conversations:
    """Those of a device, over a store that was opened with the transcripts' migrations."""

    def __init__(self, store: Store, model: Model, speakers: Callable[[], Sequence[Speaker]]) -> None:
        self._store, self._model, self._speakers = store, model, speakers

    def begin(self, db: Connection, task: Task) -> None:
        """Tell a task that begins what was said before it."""
        if task.conversation and not task.steps:
            task.before = _get(db, task).read()

    async def add(self, task: Task) -> None:
        """Take in a task that is over, once. Raises Retry when the disk is full."""
        said = Exchange(task.id, task.text[:MAX_ANSWER], (task.answer or task.error)[:MAX_ANSWER])

        def work(db: Connection) -> None:
            had = _get(db, task)
            if task.id not in [each.id for each in had.exchanges]:
                _put(db, task, msgspec.structs.replace(had, exchanges=[*had.exchanges, said]))

        await self._store.write(work)

    async def fold(self, task: Task, tokens: int) -> None:
        """Sum up what no longer fits the window. Raises Retry when the disk is full."""
        had = await self._store.read(lambda db: _get(db, task))
        if (out := fallen(had.exchanges, tokens)) == 0:
            return
        summary = await self._summary(Conversation(had.summary, had.exchanges[:out]))
        left = Conversation(summary[:MAX_SUMMARY], had.exchanges[out:])
        await self._store.write(lambda db: _put(db, task, left))

    async def _summary(self, old: Conversation) -> str:
        """By the first model that takes free text, else the beginnings of what was said."""
        told = "\n".join(f"{each.text}\n{each.answer}" for each in old.read())
        try:
            speaker = next((each for each in self._speakers() if each.endpoint), None)
            if speaker is not None:
                messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": told}]
                asked = Generate("", "", max_tokens=150, chat={"messages": messages}, model=speaker.model, priority=3)
                said = decisions((await self._model.generate(asked, SUMMARY_S)).text)
                if said and isinstance(said[0], Answer) and said[0].text.strip():
                    return said[0].text.strip()
        except OutriderError as error:
            _log.warning("a conversation is cut instead of summed up: %s", error)
        return extract(old)


def fallen(exchanges: Sequence[Exchange], tokens: int) -> int:
    """How many of the oldest do not fit; a token is taken for four characters."""
    left = 4 * tokens
    for n in range(len(exchanges) - 1, -1, -1):
        left -= len(exchanges[n].text) + len(exchanges[n].answer)
        if left < 0:
            return n + 1
    return 0


def extract(old: Conversation) -> str:
    """The newest beginnings of requests and answers that have room, after what was kept before."""
    lines = [f"{each.text[:80]}: {each.answer.partition('.')[0][:80]}" for each in old.exchanges]
    return "; ".join([old.summary, *lines] if old.summary else lines)[-MAX_SUMMARY:]


def _get(db: Connection, task: Task) -> Conversation:
    sql = "SELECT body FROM conversations WHERE subject = ? AND name = ?"
    row = db.execute(sql, (task.subject.name, task.conversation)).fetchone()
    return msgspec.json.decode(row[0], type=Conversation) if row else Conversation()


def _put(db: Connection, task: Task, body: Conversation) -> None:
    row = (task.subject.name, task.conversation, msgspec.json.encode(body), task.created)
    db.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?)", row)
    old = "SELECT rowid FROM conversations ORDER BY ts DESC LIMIT -1 OFFSET ?"
    db.execute(f"DELETE FROM conversations WHERE rowid IN ({old})", (KEEP,))
