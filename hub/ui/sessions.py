"""Who is logged in at the dashboard.

Invariants: the browser holds a random id in an HttpOnly cookie and nothing else; the access token stays here, in
memory, bounded; every question of permission goes to the same `Auth` as the API's, with the grants of this moment, so
an expired or revoked login ends at the next look.
"""

import secrets
from collections import OrderedDict

import msgspec

from edge_agent.wire.grants import Subject
from hub.auth import Auth
from hub.errors import Refused

COOKIE = "outrider_session"
MAX_SESSIONS = 10_000


class Session(msgspec.Struct):
    """One login; `dark` is None while the look follows the system."""

    id: str
    token: str
    subject: Subject
    dark: bool | None = None


class Sessions:
    """Logins by cookie. A session is forgotten when its token has expired, at log-out, or as the oldest of too many."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def open(self, auth: Auth, token: str) -> Session:
        """Raises Refused 401 when the token is not good."""
        session = Session(secrets.token_urlsafe(32), token, auth.subject(token))
        self._sessions[session.id] = session
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return session

    def get(self, auth: Auth, id: str | None) -> Session | None:
        """The session, while its token is good."""
        session = self._sessions.get(id or "")
        if session is not None:
            try:
                session.subject = auth.subject(session.token)
            except Refused:
                self.close(session.id)
                return None
        return session

    def close(self, id: str) -> None:
        self._sessions.pop(id, None)
