"""Other people's benchmarks, by lm-evaluation-harness."""
