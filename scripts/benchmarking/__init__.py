"""What scripts/benchmark.py is made of: workers, baselines, measurements and plots."""
