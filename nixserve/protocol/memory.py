"""
How much memory the sessions of each key make this process hold, and what happens when that is too much.

What a peer can have us hold is counted for each session: the bytes of a request that is not complete, what it became
when it is, what a worker makes of it, and replies that are not read. A session measures itself; L{Memory} adds up, for
each key, and for all keys that are not trusted. Where there is no room a session waits, with its peer paused.

Waiting ends. Of those who wait for the same memory the one that came first may go on all the same, up to what one key
may have by itself; so of many half requests one gets complete, and then the next. All lines have the same order, so
whoever is first in one is never waiting for somebody behind it in another. What would be too much all by itself is
refused. So the sessions of a key hold at most twice its limit, for the time of one request. And however much of what
all keys share one of them has taken, each of the others finds room up to an equal part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from nixserve.errors import PolicyError
from nixserve.protocol.limits import DEFAULT_LIMITS, Limits

__all__ = ["Account", "Memory"]

LOOK_SECONDS: Final = 0.25
"""How often those who wait look whether there is room: peers that read what was written say nothing about it."""


class _Ledger:
    """What the sessions of one key, or of everybody who is not trusted, hold together."""

    def __init__(self, clock: IReactorTime, limit: int, setting: str) -> None:
        self._clock = clock
        self._measured = clock.seconds()
        self.limit = limit
        self.setting = setting
        self.total = 0
        # How many keys have a part of it.
        self.keys = 0
        self.accounts: set[Account] = set()
        # In the order in which they came; a dict, for it keeps that.
        self.line: dict[Account, None] = {}

    def hasRoom(self, more: int) -> bool:
        """Is there room for C{more} bytes? Before the answer is no, sessions are measured anew, now and then."""
        if self.total + more <= self.limit:
            return True
        now = self._clock.seconds()
        if now - self._measured < LOOK_SECONDS:
            return False
        self._measured = now
        for account in self.accounts:
            account.measure()
        return self.total + more <= self.limit

    def isFirst(self, account: Account) -> bool:
        """Whether nobody has waited longer than C{account}."""
        return next(iter(self.line), account) is account


class Memory:
    """
    The memory that peers make one process hold.
    """

    def __init__(self, clock: IReactorTime, limits: Limits = DEFAULT_LIMITS) -> None:
        self._clock = clock
        self._limits = limits
        self._untrusted = _Ledger(clock, limits.untrustedMemory, "max-untrusted-memory")
        self._keys: dict[tuple[str, bool], _Ledger] = {}
        self._waiting: dict[Account, None] = {}
        self._looking: IDelayedCall | None = None

    def open(self, key: str, trusted: bool, measure: Callable[[], int]) -> Account:
        """
        A session begins.

        @param measure: how many bytes it holds now.
        """
        ledger = self._keys.get((key, trusted))
        if ledger is None:
            ledger = self._keys[key, trusted] = _Ledger(self._clock, *self._limits.memoryOf(trusted))
            if not trusted:
                self._untrusted.keys += 1
        ledgers = (ledger,) if trusted else (ledger, self._untrusted)
        return Account(self, (key, trusted), ledgers, measure)

    def forget(self, account: Account) -> None:
        """Take no more account of a session that has ended."""
        self._waiting.pop(account, None)
        if not account.ledgers[0].accounts and self._keys.pop(account.name, None) is not None:
            _key, trusted = account.name
            if not trusted:
                self._untrusted.keys -= 1
        self.look()

    @property
    def isWaited(self) -> bool:
        """Whether any session waits for room."""
        return bool(self._waiting)

    def wait(self, account: Account) -> None:
        """Have C{account} look again when there may be room."""
        self._waiting[account] = None
        if self._looking is None:
            self._looking = self._clock.callLater(LOOK_SECONDS, self._lookAgain)

    def giveUp(self, account: Account) -> None:
        """Have C{account} wait no more."""
        self._waiting.pop(account, None)

    def look(self) -> None:
        """Somebody holds less: let those go on who may, in the order in which they came."""
        for account in list(self._waiting):
            # Who goes on may end at once, and so come here again.
            if account in self._waiting and account.mayGoOn():
                self.giveUp(account)
                account.goOn()
        if not self._waiting and self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def _lookAgain(self) -> None:
        self._looking = None
        self.look()
        if self._waiting:
            self._looking = self._clock.callLater(LOOK_SECONDS, self._lookAgain)


class Account:
    """
    What one session holds.

    @ivar name: the key whose session it is, and whether that is trusted.
    @ivar ledgers: where it is counted, the key's first.
    """

    def __init__(
        self, memory: Memory, name: tuple[str, bool], ledgers: tuple[_Ledger, ...], measure: Callable[[], int]
    ) -> None:
        self.name = name
        self.ledgers = ledgers
        self._memory = memory
        self._measure = measure
        self._held = 0
        self._wanted = 0
        self._waiting: Deferred[None] | None = None
        for ledger in ledgers:
            ledger.accounts.add(self)

    def measure(self) -> None:
        """The session holds more or less than before."""
        self.grew(self._measure() - self._held)

    def grew(self, more: int) -> None:
        """The session holds so much more than when it was measured."""
        for ledger in self.ledgers:
            ledger.total += more
        self._held += more

    def hasRoom(self, more: int) -> bool:
        """Could it hold C{more} bytes than it does, without being first in a line?"""
        self.measure()
        return all(self._fits(ledger, more) for ledger in self.ledgers)

    def _fits(self, ledger: _Ledger, more: int) -> bool:
        """
        Is there room? What all share may be full of what others hold: up to a fair part of it each key has room.
        """
        own = self.ledgers[0]
        return ledger.hasRoom(more) or (ledger is not own and own.total + more <= ledger.limit // ledger.keys)

    @property
    def share(self) -> int:
        """Bytes that are its key's in any case."""
        return min(ledger.limit // max(1, ledger.keys) for ledger in self.ledgers)

    def mayGrow(self, more: int) -> bool:
        """
        Could it hold C{more} bytes that only make it faster? They leave half of everything free.
        """
        self.measure()
        return all(ledger.total + more <= ledger.limit // 2 for ledger in self.ledgers)

    def takes(self, more: int) -> bool:
        """
        Hold C{more} bytes more, if it is plain that they are there: nobody waits, and half of everything is free.
        Nothing is measured.

        @return: whether it does.
        """
        for ledger in self.ledgers:
            if ledger.line or ledger.total + more > ledger.limit // 2:
                return False
        self.grew(more)
        return True

    def gives(self, less: int) -> bool:
        """
        Hold C{less} bytes less, which it held but for a moment. Nothing is measured, and who waits for memory hears
        nothing of it before the next look: those may be hundreds, and this happens a thousand times a second.

        @return: whether it does; not if others wait for its place in a line.
        """
        if self in self.ledgers[0].line:
            return False
        self.grew(-less)
        return True

    def wait(self, more: int) -> Deferred[None] | None:
        """
        Ask for room.

        @param more: for how many bytes more than the session holds.
        @return: C{None} if there is, or fires when there is. Cancelling gives up.
        @raise PolicyError: there never will be.
        """
        self.measure()
        own = self.ledgers[0]
        if self._held + more > own.limit:
            raise PolicyError(
                f"this request needs more memory than the {own.limit >> 20} MiB that a key may use here "
                f"('{own.setting}'): ask about fewer paths at once"
            )
        self._wanted = more
        if all(self._fits(ledger, more) for ledger in self.ledgers):
            return None
        for ledger in self.ledgers:
            ledger.line[self] = None
        if self.mayGoOn():
            return None
        self._waiting = Deferred(lambda _: self._gaveUp())
        self._memory.wait(self)
        return self._waiting

    def mayGoOn(self) -> bool:
        """Is there room for what it asked for, or is it the first one who waits?"""
        return all(ledger.isFirst(self) or self._fits(ledger, self._wanted) for ledger in self.ledgers)

    def goOn(self) -> None:
        """Have the session go on if it waits: there is room."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)

    def requestEnds(self) -> None:
        """What it held for a request is gone: whoever is next in the lines may go on."""
        if self in self.ledgers[0].line:
            self._leaveLines()
        self.shrank()

    def shrank(self) -> None:
        """It may hold less than before: let those go on for whom there is room now."""
        self.measure()
        if self._memory.isWaited:
            self._memory.look()

    def close(self) -> None:
        """The session has ended and holds nothing any more."""
        for ledger in self.ledgers:
            ledger.total -= self._held
            ledger.accounts.discard(self)
        self._held = 0
        self._measure = int
        self._leaveLines()
        self._memory.forget(self)

    def _leaveLines(self) -> None:
        for ledger in self.ledgers:
            ledger.line.pop(self, None)

    def _gaveUp(self) -> None:
        self._waiting = None
        self._memory.giveUp(self)
        self._leaveLines()
