"""`r1 plan`: what would be computed and what it takes."""
