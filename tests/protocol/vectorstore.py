"""
Stores that hold objects of the messages' vectors.
"""

from nixserve.testing import FakeStore, addObject
from tests.vectors.serve.messages import CONTENTS, nar


def storeWith(*infos):
    """A L{FakeStore} in which these are valid; they come in order."""
    store = FakeStore()
    session = store.inner.openSession()
    for info in infos:
        addObject(session, info, nar(CONTENTS[info.path]))
    session.close()
    return store
