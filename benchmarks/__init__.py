"""What is measured, and the paper's experiments (python -m benchmarks.paper)."""
