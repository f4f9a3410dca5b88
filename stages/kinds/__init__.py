"""One module per kind of stage, and the registry of kinds."""
