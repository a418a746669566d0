"""
Benchmarks: programs, not tests. Each compares with the real pair in the same run and prints ratios.
"""
