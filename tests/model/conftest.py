from tests.hub import hub

__all__ = ["hub"]
