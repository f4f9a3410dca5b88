"""What every module of a stage may rely on: typed configuration, errors, exit codes."""
