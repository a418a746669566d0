"""
The serve protocol on Twisted: the reactor's side of everything. Never blocks; what blocks goes through
L{nixserve.protocol.workers}.
"""
