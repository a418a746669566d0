"""
Building derivations. Blocking plain Python, safe from any thread, no Twisted; above the store, below the protocol.
"""
