"""Studies: variants of a stage over seeds, what is measured of them, and what that says about claims."""
