"""When things run: the graph of a recipe as Prefect tasks, the child processes, and the command line."""
