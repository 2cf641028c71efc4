"""Sources, stages, corpus format, engine, report and command line."""
