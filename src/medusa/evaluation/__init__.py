"""Measuring: benchmarks, ablations, traces. The top of the house: nothing else imports it."""
