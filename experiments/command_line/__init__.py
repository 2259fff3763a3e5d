"""The parts of the command line: configurations, run directories, the run itself, tables."""
