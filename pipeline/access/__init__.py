"""Read a built corpus from Python: SQL, joined rows, and datasets of webdataset, torch and Ray."""
