"""Other packages: those the benchmarks race with (`contestants`), and their tests with our patch (`run_suites`)."""
