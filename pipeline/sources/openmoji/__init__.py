"""The demo's source: drawings of OpenMoji, rendered and served by a local web server."""
