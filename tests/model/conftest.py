from tests.servers.hub import hub

__all__ = ["hub"]
