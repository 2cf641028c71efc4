from tests.trainer.conftest import coloured

__all__ = ["coloured"]
