"""`r1 doctor`: what this machine, its servers and a recipe lack."""
