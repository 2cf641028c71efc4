"""MosaicML's streaming format (MDS): read into a corpus, and written from one."""
