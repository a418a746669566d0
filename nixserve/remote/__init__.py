"""
Sessions on the store that a URL names: what the URL says, the ways to get there, and what went wrong on the way.
"""
