"""
What people run: the C{nixserve} and C{nixserve-store} commands and the C{twistd} plugin.
"""
