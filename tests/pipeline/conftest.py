from tests.s3 import corpus_url, s3_server, s3_url

__all__ = ["corpus_url", "s3_server", "s3_url"]
