"""Parts of `python -m bench.router`: mock instances, load, and the figures that come of them."""
