"""The parts of the comparison of placement policies: traces, pools on a virtual clock, figures."""
