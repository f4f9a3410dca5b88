"""When things run: the graph of a recipe as Prefect tasks, the child processes, and the command line."""

from stages.runtime.platform import refuse_native_windows

refuse_native_windows()
