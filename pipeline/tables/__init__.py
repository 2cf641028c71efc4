"""Caches made from commits, which may be deleted: the sample table and the commit table."""
