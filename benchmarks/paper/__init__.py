"""The experiments of Li & Arora (ICLR 2020), one short module each: python -m benchmarks.paper NAME, or all.

setup.py says how all of them train, methods.py the methods that are compared, data.py, models.py, training.py
and results.py the rest that they share.
"""
