"""The HTML page about a corpus."""
