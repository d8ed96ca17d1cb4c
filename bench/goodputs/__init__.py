"""The parts of `python -m bench.goodput`: load, records, figures, search, reports."""
