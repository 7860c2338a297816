"""Other packages: those the benchmarks race with (`contestants`), and their tests under ours (`run_suites`)."""
