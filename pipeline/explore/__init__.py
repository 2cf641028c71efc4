"""The page on which people look at a corpus and choose: a server on aiohttp, and plain files."""
