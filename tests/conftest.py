"""
What holds for all tests.
"""

from hypothesis import settings

# Machines that run tests are slow at times; how fast something is, benchmarks say.
settings.register_profile("nixserve", deadline=None)
settings.load_profile("nixserve")
