"""Whether a cluster still has a node that the work fits on; Ray itself would wait for one for ever, without a word."""

from __future__ import annotations

from collections.abc import Callable

from sagittal.cluster.ray_session import Needs, Session
from sagittal.errors import ResourceError

NO_NODE_S = 120.0
"""How long there may be no such node before the run ends."""
LOOK_EVERY_S = 1.0


class Room:
    """Looks for nodes now and then.

    Args:
        session: the cluster.
        needs: of a piece of work.
        say: receives a line once there is no node.
    """

    def __init__(self, session: Session, needs: Needs, say: Callable[[str], None]) -> None:
        self._session, self._needs, self._say = session, needs, say
        self._looked_at: float | None = None
        self._none_since: float | None = None

    def look(self, now_s: float) -> None:
        """Look for a node, unless that was done a moment ago.

        Args:
            now_s: by a clock that never goes back.

        Raises:
            ResourceError: none was left, and none came for long.
        """
        if self._looked_at is not None and now_s - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now_s
        if self._session.slots(self._needs):
            self._none_since = None
            return
        gone = f"no node of {self._session.place} that has {self._needs} is left"
        if self._none_since is None:
            self._none_since = now_s
            self._say(f"{gone}; waiting for one for {NO_NODE_S:g} s")
        elif now_s - self._none_since > NO_NODE_S:
            raise ResourceError(
                f"{gone}, and none came for {NO_NODE_S:g} s. Add one, then go on with --resume.", code="no_node"
            )
